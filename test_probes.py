"""Anomaly maps, label-efficient features and ensembles (§4.1) against ideal networks, known labels and known probabilities."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffusion
import probes
import train
import unet

S = diffusion.linear_schedule()


def healthy(n=4, side=8):
    """A finite set of healthy images, far from each other, float64."""
    return 0.8 * torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sign()


def ideal(images):
    """The eps_model of a network that has learned this finite set perfectly: x_0_hat is the posterior mean over it."""

    def eps_model(xt, t, y=None):
        a, s = (v.view(-1, 1, 1, 1).to(xt.dtype) for v in (S.abar[t].sqrt(), (1 - S.abar[t]).sqrt()))
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
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=g, dtype=like.dtype)


# ------------------------------------------------------------------------------------- anomaly maps


def test_sec41_the_anomaly_map_is_zero_on_healthy_pixels_and_known_where_a_square_was_painted():
    """An ideal network: the square's value is mean_t abar / (1 - abar) 0.5^2, because eps_hat - eps = sqrt(abar) (x_0 - x_0_hat) / s."""
    x0, ts = healthy(), range(100, 301, 20)
    assert probes.anomaly_map(S, ideal(x0), x0, ts, draws(x0))[0].abs().max() < 1e-12
    x, where = painted(x0)
    found, _ = probes.anomaly_map(S, ideal(x0), x, ts, draws(x0))
    expected = sum(float(S.abar[t] / (1 - S.abar[t])) * 0.25 for t in ts) / len(ts)
    assert found[~where].max() < 1e-12 and torch.allclose(found[where], torch.tensor(expected, dtype=torch.float64))
    _, signed = probes.anomaly_map(S, ideal(x0), 2 * x0 - x, ts, draws(x0))  # the same square, darker
    expected = -sum(float((S.abar[t] / (1 - S.abar[t])).sqrt()) * 0.5 for t in ts) / len(ts)
    assert signed[~where].abs().max() < 1e-6 and torch.allclose(signed[where], torch.tensor(expected, dtype=torch.float64))


def test_sec41_the_anomaly_map_is_a_mean_over_steps_each_with_its_own_noise():
    """A network that always answers 0: the map is the mean of eps^2; it is asked at x_t, t and y, once a step, a repeated step twice."""
    x0, asked = healthy(2), []

    def silent(xt, t, y):
        asked.append((xt, t, y))
        return torch.zeros_like(xt)

    (found, signed), noise = probes.anomaly_map(S, silent, x0, [50, 50, 400], draws(x0), "y"), draws(x0)
    eps = [noise() for _ in range(3)]
    torch.testing.assert_close(found, sum(e.square() for e in eps) / 3)
    torch.testing.assert_close(signed, -sum(eps) / 3)
    for (xt, t, y), step, e in zip(asked, [50, 50, 400], eps):
        assert t.tolist() == [step, step] and y == "y"
        torch.testing.assert_close(xt, diffusion.q_sample(S, x0, step, e))


def test_sec41_the_reconstruction_is_the_healthy_image_and_the_residual_the_square():
    """Noised to t = 300 and denoised in 7 passes by the ideal network; from t = 300, not from T."""
    x0, steps, began = healthy(), [], []
    x, where = painted(x0, 0.6)
    model = lambda xt, t, y: steps.append(int(t[0])) or began.append(xt) or ideal(x0)(xt, t)
    back = probes.reconstruct(S, model, x, 300, 7, draws(x0)())
    torch.testing.assert_close(began[0], diffusion.q_sample(S, x, 300, draws(x0)()))
    torch.testing.assert_close(back, x0)
    torch.testing.assert_close(x - back, 0.6 * where.double())
    assert steps == diffusion.ddim_timesteps(300, 7)[:-1]


# ------------------------------------------------------------------------------------- label-efficient features


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = unet.UNet(channels=8, channel_mult=(1, 2), blocks=1, attention_at=(), head_channels=8, image_size=16)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)  # its zero-initialised layers too
    return net.eval().requires_grad_(False)


def test_sec41_hooks_change_no_bit_and_are_removed(network):
    """With and without them one and the same output; they are gone after the context, and after an error in it."""
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
    """In the order of steps, then blocks; the same noise for every image and every step; of two noises the mean."""
    x0, eps, ts, blocks = 0.5 * torch.randn(1, 1, 16, 16).repeat(2, 1, 1, 1), torch.randn(1, 1, 16, 16), (50, 400), (3, 0)
    of = lambda noises: probes.features(S, network, x0, ts, blocks, noises)
    found, expected = of(eps), []
    for t in ts:
        with probes.recorded(dict(enumerate(network.decoder))) as seen:
            network(diffusion.q_sample(S, x0, t, eps.repeat(2, 1, 1, 1)), torch.tensor([t, t]))
        small = seen[0]
        expected += [seen[3], torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")]
    assert small.shape[2] == 8 and found.shape == (2, 48, 16, 16)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(of(torch.cat([eps, -2 * eps])), (found + of(-2 * eps)) / 2)


def test_sec41_the_classifier_learns_a_mask_that_is_a_linear_function_of_the_features():
    """Fresh pixels: 97 of 100 right. The ensemble's members differ, the same seed gives the same, and the caller's generator stays."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4000, 6, generator=g), torch.randn(6, generator=g)
    state = torch.get_rng_state()
    classifiers = probes.fit(x[:2000], (x[:2000] @ w) > 0, members=2, steps=400)
    assert torch.equal(torch.get_rng_state(), state)
    images = x[2000:].view(5, 20, 20, 6).permute(0, 3, 1, 2)
    p = probes.classify(classifiers, images)
    assert p.shape == (5, 1, 20, 20) and ((p > 0.5).flatten() == (x[2000:] @ w > 0)).float().mean() > 0.97
    one, other = (probes.classify([c], images) for c in classifiers)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(p, (one + other) / 2)
    torch.testing.assert_close(probes.classify(classifiers, images[:1]), p[:1])  # an image's answer is its own
    again = probes.fit(x[:2000], (x[:2000] @ w) > 0, members=1, steps=400)
    assert torch.equal(probes.classify(again, images), one)
    assert not torch.allclose(probes.classify(probes.fit(x[:2000], (x[:2000] @ w) > 0, 1, 400, seed=1), images), one)


def test_sec41_a_probability_stands_where_its_pixel_stands():
    """A classifier that repeats the second feature: the map is its sigmoid, pixel by pixel."""
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(probes.classify([lambda pixels: pixels[:, 1:2]], x), x[:, 1:2].sigmoid())


# ------------------------------------------------------------------------------------- ensembles


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


def test_sec41_calibration_counts_what_comes_true():
    """True with probability p: no error but chance. Certain and right 7 times in 10: an error of 0.3. Empty bins are nan."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=g, dtype=torch.float64)
    mean, share, count = probes.calibration(p, torch.rand(len(p), generator=g) < p)
    assert (mean - share).abs().max() < 0.015 and count.sum() == len(p) and (mean * 10).long().tolist() == list(range(10))
    assert probes.expected_calibration_error(p, torch.rand(len(p), generator=g) < p) < 0.01
    sure, right = torch.ones(10), torch.arange(10) < 7
    mean, share, count = probes.calibration(sure, right)
    assert (float(mean[-1]), float(share[-1])) == pytest.approx((1, 0.7)) and count.tolist() == [0] * 9 + [10] and mean[:9].isnan().all()
    assert probes.expected_calibration_error(sure, right) == pytest.approx(0.3)
    half = torch.cat([sure, torch.full((30,), 0.05)])  # 30 pixels that are never positive, at 0.05
    assert probes.expected_calibration_error(half, torch.cat([right, torch.zeros(30) > 1])) == pytest.approx((10 * 0.3 + 30 * 0.05) / 40)


def test_sec41_a_drawn_mask_has_the_dice_of_its_probabilities_and_less_than_the_mean():
    """Masks that come true with probability p or q, pixels alone or tied together in blocks, counted on 10^6 pixels."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1000, 1000, generator=g) ** k for k in (3, 1))
    dice = lambda a, b: 2 * float((a & b).sum()) / float(a.sum() + b.sum())
    for block in (1, 10):
        luck = lambda block=block: torch.rand(1000 // block, 1000 // block, generator=g).repeat_interleave(block, 0).repeat_interleave(block, 1)
        true, drawn, other = luck() < p, luck() < p, luck() < q
        assert dice(drawn, true) == pytest.approx(probes.expected_dice(p, p), abs=0.01)
        assert dice(drawn, other) == pytest.approx(probes.expected_dice(p, q), abs=0.01)
        assert dice(p > 0.5, true) == pytest.approx(probes.expected_dice(p > 0.5, p), abs=0.01)
        assert probes.expected_dice(drawn, true) == pytest.approx(dice(drawn, true))
    assert probes.expected_dice(p, p) < probes.expected_dice(p > 0.5, p) - 0.05


# ------------------------------------------------------------------------------------- the studies

SIDE = 32


def config(**changes):
    settings = {"task": "synthesis", "image_size": SIDE, "classes": ("Normal",), "lr": 0.01, "target": "x0"}
    settings |= {"channels": 16, "channel_mult": (1, 2, 2), "blocks": 1, "attention_levels": (), "head_channels": 16}
    return train.Config(**settings | changes)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two healthy X-rays in the lung tree, and in the infection tree the same two with a brighter square in the left lung.

    Outside their lungs both have something bright that is no infection.
    """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    well = data.to_uint8(healthy(2, SIDE))
    lung, short, square, marker, label = (np.zeros((SIDE, SIDE), np.uint8) for _ in range(5))
    lung[4:28, 3:14], short[4:20, 3:14], square[10:18, 5:12], marker[10:18, 20:28], label[20:26, 3:14] = [255] * 5
    brighter = lambda where, by: np.where(where > 0, np.clip(well.astype(int) + by, 0, 255), well).astype(np.uint8)
    sick, labelled = brighter(square | marker, 60), brighter(label, 150)

    def save(tree, split, c, i, **kinds):
        name = data.NAMES[c].format(f"{split}{i}")
        for kind, picture in kinds.items():
            file = tmp_path / "set" / data.TREES[tree] / split / c / kind.replace("_", " ") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)

    for split in data.SPLITS:
        for i in range(2):
            for c in data.CLASSES:
                save("lung", split, c, i, images=labelled[i, 0], lung_masks=short)
                save("infection", split, c, i, images=sick[i, 0], lung_masks=lung, infection_masks=square)
    return tmp_path / "set"


def test_sec41_an_ideal_network_of_healthy_xrays_finds_every_infected_pixel_and_no_other(root, monkeypatch):
    """AUROC 1 by the loss, by its sign and by the reconstruction, at a cost of 1 healthy pixel in 20; gray values do not know."""
    monkeypatch.setattr(probes, "SMOOTH", 1)
    monkeypatch.setattr(probes, "BAND", range(200, 301, 50))
    monkeypatch.setattr(train, "eps_model_of", lambda *_: ideal(data.to_float(data.to_uint8(healthy(2, SIDE)))))
    seen = []
    found = probes.anomalies(None, config(), root, torch.device("cpu"), 2, lambda *at: seen.append(at))
    for name in ("loss, Eq. (7)", "signed", "X-ray - reconstruction"):
        assert found["maps"][name]["AUROC"] == pytest.approx(1, abs=1e-3) and found["maps"][name]["Sensitivity"] == 1, name
        assert abs(found["maps"][name]["threshold"]) < 1e-5 and found["maps"][name]["Specificity"] == pytest.approx(0.95, abs=0.05)
    assert 0.5 < found["maps"]["gray value itself"]["AUROC"] < 0.9 and found["maps"]["gray value itself"]["DICE index"] < 0.9
    assert found["maps"]["every pixel of the lungs"]["DICE index"] == pytest.approx(2 * 56 / (264 + 56))
    assert (found["images"], found["healthy images"], found["infected share"]) == (2, 2, pytest.approx(56 / 264)) and seen[-1] == (2, 2)


def test_sec41_a_map_is_the_mean_of_its_neighbourhood_and_needs_nothing_beyond_the_edge():
    """Squares of 5; at the border the mean of the pixels that are there."""
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = x[0, 0, 0, 0] = 1
    found = probes.smooth(x)
    assert float(found[0, 0, 4, 4]) == pytest.approx(1 / 25) and float(found[0, 0, 0, 0]) == pytest.approx(1 / 9)


def few_images(n, seed):
    """X-rays whose mask is where they are bright: smooth random pictures."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 1, 4, 4, generator=g), size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
    return x, x > 0.2


def random_network(cfg):
    model = train.build_model(cfg)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def test_sec41_both_learners_find_bright_pixels_from_a_few_images():
    """Probe of a random network, and the same U-Net from scratch: unseen images, 0.85 DICE; of other seeds, other answers."""
    (x, positive), (unseen, true), cfg = few_images(6, 0), few_images(4, 1), config()
    dice = lambda p: 2 * float(((p > 0.5) & true).sum()) / float((p > 0.5).sum() + true.sum())
    learners = {
        "probe": lambda seed: probes.probe(random_network(cfg), cfg, x, positive, seed, torch.device("cpu"), members=2),
        "from scratch": lambda seed: probes.from_scratch(cfg, x, positive, seed, torch.device("cpu"), steps=60),
    }
    for name, learner in learners.items():
        p, other = learner(0)(unseen), learner(1)(unseen)
        assert p.shape == unseen.shape and 0 <= p.min() and p.max() <= 1 and dice(p) > 0.85, name
        assert not torch.allclose(p, other), name


def test_sec41_both_learners_see_the_same_few_images_and_all_of_validation(root, monkeypatch):
    """Of a draw the fewer are among the more; DICE 1 for the truth and 0 for its opposite."""
    given, true = [], torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    true[..., 10:18, 5:12] = True
    learn = lambda answer: lambda *a: given.append((a[-4], a[-3], a[-2])) or (lambda images: answer[: len(images)].float())
    monkeypatch.setattr(probes, "probe", learn(true))
    monkeypatch.setattr(probes, "from_scratch", learn(~true))
    rows = probes.few_labels(None, config(), "infection", root, torch.device("cpu"), (1, 2), 3, 64)
    assert [(r["labels"], r["draw"]) for r in rows] == [(n, draw) for draw in range(3) for n in (1, 2)]
    assert all(r["probe"] == 1 and r["from scratch"] == 0 for r in rows)
    for a, b in zip(given[::2], given[1::2]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert [len(x) for x, _, _ in given[::2]] == [1, 2] * 3
    assert all(torch.equal(one[0][0], two[0][0]) for one, two in zip(given[::4], given[2::4]))
    assert all(torch.equal(positive, true[: len(x)]) for x, positive, _ in given)
    with pytest.raises(train.UserError, match="--labels must be at most the 2 images of Train, got 3"):
        probes.few_labels(None, config(), "infection", root, torch.device("cpu"), (3,), 1)


@pytest.fixture
def run(tmp_path):
    """run(**config) -> a folder with last.pt."""

    def write(**changes):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        cfg = config(**changes)
        state = {"config": dataclasses.asdict(cfg), "step": 7, "ema": train.build_model(cfg).state_dict()}
        torch.save(state, folder / "last.pt")
        return str(folder)

    return write


def test_the_command_prints_its_table_and_writes_its_numbers(root, run, tmp_path, monkeypatch, capsys):
    """Both studies; the JSON says where the numbers come from."""
    words = ["--data", str(root), "--device", "cpu", "--out", str(tmp_path / "out" / "numbers.json")]
    assert probes.main(["anomalies", run(), *words]) == 0
    assert "| signed |" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert {"study", "commit", "hardware", "torch", "seed", "data", "maps"} <= numbers.keys() and numbers["data"] == "X-rays"
    rows = [{"labels": 5, "draw": k, "probe": 0.5 + k, "from scratch": 0.25} for k in range(2)]
    monkeypatch.setattr(probes, "few_labels", lambda *_: rows)
    assert probes.main(["labels", run(classes=data.CLASSES), *words]) == 0
    assert "| 5 | 1.0000 ± 0.7071 | 0.2500 ± 0.0000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["anomalies"], {"classes": data.CLASSES}, "healthy X-rays alone (--classes Normal), got COVID-19, Non-COVID, Normal"),
        (["labels"], {"task": "lung", "cond": "none"}, "must be a run of --task synthesis, got lung"),
        (["labels", "--draws", "0"], {}, "--draws must be at least 1, got 0"),
        (["labels", "--labels", "5", "0"], {}, "--labels must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, words, changes, message, capsys):
    """The rule and the offending value."""
    assert probes.main([words[0], run(**changes), *words[1:], "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("probes.py: error: ") and message in error and error.count("\n") == 1
