"""§4.1 against ideal networks, known labels and known probabilities."""

import pytest
import torch

import diffusion
import probes
import unet

S = diffusion.linear_schedule()


def healthy(n=4, side=8):
    """A finite set of healthy images, far from each other, float64."""
    g = torch.Generator().manual_seed(0)
    return 0.8 * torch.randn(n, 1, side, side, generator=g, dtype=torch.float64).sign()


def ideal(images):
    """The eps_model of a network that has learned this finite set perfectly.

    Its x_0_hat is the posterior mean over the set.
    """

    def eps_model(xt, t, y=None):
        a = S.abar[t].sqrt().view(-1, 1, 1, 1).to(xt.dtype)
        s = (1 - S.abar[t]).sqrt().view(-1, 1, 1, 1).to(xt.dtype)
        distance = (xt[:, None] - a[:, None] * images).square().sum((2, 3, 4))  # (B, n)
        w = (-distance / (2 * s.view(-1, 1) ** 2)).softmax(1)
        return (xt - a * torch.einsum("bn,nchw->bchw", w, images)) / s

    return eps_model


def painted(x0, value=0.5):
    """The images with a square of rows 2, 3 and columns 5, 6 that is brighter; and where it is."""
    where = torch.zeros_like(x0, dtype=torch.bool)
    where[..., 2:4, 5:7] = True
    return x0 + value * where, where


def draws(like, seed=1):
    """noise() of its own seed, like a tensor."""
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=g, dtype=like.dtype)


# ---------------------------------------- anomaly maps


def test_sec41_the_anomaly_map_is_zero_on_healthy_pixels_and_known_where_a_square_was_painted():
    """An ideal network: the square's value is mean_t abar / (1 - abar) 0.5^2.

    For eps_hat - eps = sqrt(abar) (x_0 - x_0_hat) / s.
    """
    x0, ts = healthy(), range(100, 301, 20)
    assert probes.anomaly_map(S, ideal(x0), x0, ts, draws(x0))[0].abs().max() < 1e-12
    x, where = painted(x0)
    found, _ = probes.anomaly_map(S, ideal(x0), x, ts, draws(x0))
    expected = sum(float(S.abar[t] / (1 - S.abar[t])) * 0.25 for t in ts) / len(ts)
    assert found[~where].max() < 1e-12
    assert torch.allclose(found[where], torch.tensor(expected, dtype=torch.float64))
    darker = 2 * x0 - x  # the same square
    _, signed = probes.anomaly_map(S, ideal(x0), darker, ts, draws(x0))
    expected = -sum(float((S.abar[t] / (1 - S.abar[t])).sqrt()) * 0.5 for t in ts) / len(ts)
    assert signed[~where].abs().max() < 1e-6
    assert torch.allclose(signed[where], torch.tensor(expected, dtype=torch.float64))


def test_sec41_the_anomaly_map_is_a_mean_over_steps_each_with_its_own_noise():
    """A network that always answers 0: the map is the mean of eps^2.

    It is asked at x_t, t and y, once a step, and twice at a step that is listed twice.
    """
    x0, asked = healthy(2), []

    def silent(xt, t, y):
        asked.append((xt, t, y))
        return torch.zeros_like(xt)

    found, signed = probes.anomaly_map(S, silent, x0, [50, 50, 400], draws(x0), "y")
    noise = draws(x0)
    eps = [noise() for _ in range(3)]
    torch.testing.assert_close(found, sum(e.square() for e in eps) / 3)
    torch.testing.assert_close(signed, -sum(eps) / 3)
    assert len(asked) == 3
    for (xt, t, y), step, e in zip(asked, [50, 50, 400], eps):
        assert t.tolist() == [step, step] and y == "y"
        torch.testing.assert_close(xt, diffusion.q_sample(S, x0, step, e))


def test_sec41_the_reconstruction_is_the_healthy_image_and_the_residual_the_square():
    """Noised to t = 300 and denoised in 7 passes by the ideal network; from t = 300, not from T."""
    x0, steps, began = healthy(), [], []
    x, where = painted(x0, 0.6)

    def model(xt, t, y):
        assert y == "y"
        steps.append(int(t[0]))
        began.append(xt)
        return ideal(x0)(xt, t)

    back = probes.reconstruct(S, model, x, 300, 7, draws(x0)(), "y")
    torch.testing.assert_close(began[0], diffusion.q_sample(S, x, 300, draws(x0)()))
    torch.testing.assert_close(back, x0)
    torch.testing.assert_close(x - back, 0.6 * where.double())
    assert steps == diffusion.ddim_timesteps(300, 7)[:-1]


# ---------------------------------------- label-efficient features


@pytest.fixture(scope="module")
def network():
    """An unconditional U-Net of 6 decoder blocks, with random weights."""
    torch.manual_seed(0)
    sizes = dict(channels=8, channel_mult=(1, 2), blocks=1, attention_at=(), head_channels=8)
    net = unet.UNet(image_size=16, **sizes)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)  # its zero-initialised layers too
    return net.eval().requires_grad_(False)


def test_sec41_hooks_change_no_bit_and_are_removed(network):
    """With and without them one and the same output.

    They are gone after the context, and after an error in it.
    """
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    plain = network(x, t)
    with probes.recorded({"up": network.decoder[1], "head": network.head}) as seen:
        assert torch.equal(network(x, t), plain)
    assert torch.equal(seen["head"], plain) and seen["up"].shape == (2, 16, 16, 16)
    with pytest.raises(RuntimeError, match="planted"), probes.recorded({"up": network.decoder[1]}):
        raise RuntimeError("planted")
    assert not any(m._forward_hooks for m in network.modules())
    before = seen["head"]
    network(x + 1, t)
    assert seen["head"] is before


def test_sec41_features_are_the_blocks_outputs_enlarged_at_every_step(network):
    """In the order of steps, then blocks; the same noise for every image and every step.

    Of two noises the mean.
    """
    x0 = 0.5 * torch.randn(1, 1, 16, 16).repeat(2, 1, 1, 1)
    eps, ts, blocks = torch.randn(1, 1, 16, 16), (50, 400), (3, 0)

    def features_of(noises):
        return probes.features(S, network, x0, ts, blocks, noises)

    found, expected = features_of(eps), []
    for t in ts:
        with probes.recorded(dict(enumerate(network.decoder))) as seen:
            xt = diffusion.q_sample(S, x0, t, eps.repeat(2, 1, 1, 1))
            network(xt, torch.tensor([t, t]))
        small = seen[0]
        enlarged = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")
        expected += [seen[3], enlarged]
    assert small.shape[2] == 8 and found.shape == (2, 48, 16, 16)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert torch.equal(found[0], found[1])
    mean = (found + features_of(-2 * eps)) / 2
    torch.testing.assert_close(features_of(torch.cat([eps, -2 * eps])), mean)


def test_sec41_the_classifier_learns_a_mask_that_is_a_linear_function_of_the_features():
    """Fresh pixels: 97 of 100 right.

    The ensemble's members differ, the same seed gives the same, and the caller's generator stays.
    """
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4000, 6, generator=g), torch.randn(6, generator=g)
    known, labels = x[:2000], (x[:2000] @ w) > 0
    state = torch.get_rng_state()
    classifiers = probes.fit(known, labels, members=2, steps=600)
    assert torch.equal(torch.get_rng_state(), state)
    images = x[2000:].view(5, 20, 20, 6).permute(0, 3, 1, 2)
    p = probes.classify(classifiers, images)
    assert p.shape == (5, 1, 20, 20)
    assert ((p > 0.5).flatten() == (x[2000:] @ w > 0)).float().mean() > 0.97
    one, other = (probes.classify([c], images) for c in classifiers)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(p, (one + other) / 2)
    torch.testing.assert_close(probes.classify(classifiers, images[:1]), p[:1])  # each by itself
    again = probes.fit(known, labels, members=1, steps=600)
    assert torch.equal(probes.classify(again, images), one)
    another = probes.fit(known, labels, members=1, steps=600, seed=1)
    assert not torch.allclose(probes.classify(another, images), one)


def test_sec41_a_classifier_has_two_hidden_layers_each_with_relu_and_batch_norm():
    """[3]: 128 and 32 wide, by the formula on a batch of four pixels."""
    net, x = probes.pixel_classifier(6), torch.randn(4, 6)
    first, _, norm_1, second, _, norm_2, last = net
    h = x
    for linear, norm, width in ((first, norm_1, 128), (second, norm_2, 32)):
        h = torch.relu(h @ linear.weight.T + linear.bias)
        assert h.shape == (4, width) and norm.weight.shape == (width,)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(net(x), h @ last.weight.T + last.bias, rtol=1e-4, atol=1e-5)


def test_sec41_a_probability_stands_where_its_pixel_stands():
    """A classifier that repeats the second feature: the map is its sigmoid, pixel by pixel."""
    x = torch.randn(2, 3, 4, 5)
    found = probes.classify([lambda pixels: pixels[:, 1:2]], x)
    torch.testing.assert_close(found, x[:, 1:2].sigmoid())


# ---------------------------------------- ensembles


def test_sec41_identical_masks_have_no_variance_and_full_agreement():
    """Nine times the same; and three of four that say yes."""
    mask = torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 1, 1, 3)
    mean, variance, sides = probes.agreement(mask.repeat(1, 9, 1, 1, 1))
    assert mean.flatten().tolist() == [0, 1, 1] and variance.max() == 0 and sides.min() == 1
    masks = mask.repeat(1, 4, 1, 1, 1)
    masks[:, 0] *= -1
    mean, variance, sides = probes.agreement(masks)
    assert mean.shape == (1, 1, 1, 3) and mean.flatten().tolist() == [0.25, 0.75, 0.75]
    assert variance.flatten().tolist() == [0.1875] * 3 and sides.flatten().tolist() == [0.75] * 3
    soft = torch.tensor([0.2, 0.4, -0.8]).view(1, 3, 1, 1, 1)  # two of three side with inside
    assert probes.agreement(soft)[2].item() == pytest.approx(2 / 3)


def test_sec41_a_drawn_mask_has_the_dice_of_its_probabilities_and_less_than_the_mean():
    """Masks that come true with probability p or q, counted on 10^6 pixels.

    The pixels are alone, or tied together in blocks.
    """
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1000, 1000, generator=g) ** k for k in (3, 1))

    def dice(a, b):
        return 2 * float((a & b).sum()) / float(a.sum() + b.sum())

    def luck(block):
        u = torch.rand(1000 // block, 1000 // block, generator=g)
        return u.repeat_interleave(block, 0).repeat_interleave(block, 1)

    for block in (1, 10):
        true, drawn, other = luck(block) < p, luck(block) < p, luck(block) < q
        assert dice(drawn, true) == pytest.approx(probes.expected_dice(p, p), abs=0.01)
        assert dice(drawn, other) == pytest.approx(probes.expected_dice(p, q), abs=0.01)
        assert dice(p > 0.5, true) == pytest.approx(probes.expected_dice(p > 0.5, p), abs=0.01)
        assert probes.expected_dice(drawn, true) == pytest.approx(dice(drawn, true))
    assert probes.expected_dice(p, p) < probes.expected_dice(p > 0.5, p) - 0.05
