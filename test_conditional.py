"""§4.2: how the condition enters the U-Net."""

import re

import pytest
import torch
from torch.nn import functional as F

import conditional
import diffusion
from conditional import ConditionalUNet
from conditions import Given
from rrdb import ConditionEmbedder
from test_unet import SMALL, awake, batch, changed, close, parameters_of, randn
from unet import AddLevel, CrossAttention, timestep_embedding

CONDITIONINGS = [*conditional.CONDITIONINGS, None]


def small(cond, **options):
    return awake(ConditionalUNet(cond, growth=4, **SMALL | options))


@pytest.mark.parametrize("cond", CONDITIONINGS)
def test_eq7_an_untrained_network_answers_0_and_its_loss_is_1(cond):
    """The head starts at 0, so L_simple starts at E eps^2 = 1: 16,384 draws, 5 standard errors."""
    net = ConditionalUNet(cond, growth=4, **SMALL)
    x0 = torch.zeros(64, 1, 16, 16)
    y = None if cond is None else randn(64, 1, 16, 16)
    assert not net(x0[:2] + 1, torch.tensor([1, 1000]), None if y is None else y[:2]).any()
    s, eps = diffusion.linear_schedule(), randn(*x0.shape, seed=3)
    with torch.no_grad():
        loss = diffusion.l_simple(s, net, x0, y, eps=eps)
    assert loss.item() == pytest.approx(1, abs=5 * (2 / x0.numel()) ** 0.5)


@pytest.mark.parametrize("cond", CONDITIONINGS)
def test_sec32_every_parameter_receives_a_gradient(cond):
    """No layer is built and not used, for any way of conditioning."""
    net = small(cond)
    xt, t, y = batch()
    net(xt, t, y).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() >= 1e-6, name


@pytest.mark.parametrize("cond", CONDITIONINGS)
def test_sec32_a_batch_of_two_is_two_batches_of_one(cond):
    """No image sees another, nor another's t or y."""
    net = small(cond)
    xt, t, y = batch()
    with torch.no_grad():
        one_by_one = torch.cat([net(xt[[i]], t[[i]], y[[i]]) for i in range(2)])
        close(net(xt, t, y), one_by_one, rel=1e-4, abs=1e-4 * one_by_one.abs().max())


def test_sec42_what_the_unet_is_given():
    """add: x_t on every channel of RRDB(y); lift: its convolution; concat: x_t, then RRDB(y).

    none: x_t, then y; levels, cross and None: x_t alone.
    """
    channels = {"add": 16, "lift": 16, "concat": 17, "levels": 1, "none": 2, "cross": 1, None: 1}
    xt, t, y = batch()
    for cond in CONDITIONINGS:
        net, seen = small(cond), []
        net.unet.stem.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        with torch.no_grad():
            net(xt, t, y)
            e = net.embedder(y) if cond in ("add", "lift", "concat") else y
        got = seen[0]
        assert got.shape[1] == channels[cond]
        if cond == "add":
            assert all(torch.equal(got[:, [i]], xt + e[:, [i]]) for i in range(16))
        elif cond == "lift":
            lifted = F.conv2d(xt, net.lift.weight, net.lift.bias, padding=1)
            close(got, e + lifted, rel=1e-5, abs=1e-5)
        else:
            assert torch.equal(got[:, :1], xt)
            assert cond in ("levels", "cross", None) or torch.equal(got[:, 1:], e)


def test_sec42_the_embedder_is_the_rrdb_where_there_is_one():
    """Report size: 16 features of growth 32; none and None carry no embedder."""
    for cond in CONDITIONINGS:
        with torch.device("meta"):
            net = ConditionalUNet(cond)
        embedder = 0 if cond in ("none", None) else parameters_of(ConditionEmbedder())
        more = 16 * 9 + 16 if cond == "lift" else 0
        more = parameters_of(net.encoder) if cond == "levels" else more
        assert parameters_of(net) - parameters_of(net.unet) == embedder + more
    segdiff = ConditionalUNet("add", rrdbs=2, segdiff=True, **SMALL).embedder
    report = ConditionEmbedder(blocks=2)
    assert parameters_of(segdiff) == parameters_of(report)
    assert (segdiff.blocks[1].scale, report.blocks[1].scale) == (0.2, 1)


@pytest.mark.parametrize("cond", CONDITIONINGS)
def test_sec42_the_xray_matters_where_it_is_a_condition(cond):
    """Another y changes the answer, image by image; without conditioning y may be missing."""
    net = small(cond)
    xt, t, y = batch()
    with torch.no_grad():
        answer, other = net(xt, t, y), net(xt, t, torch.cat([y[:1], -y[1:]]))
        if cond is None:
            assert torch.equal(answer, net(xt, t))
        else:
            assert changed(answer[0], other[0]) < 1e-4 and changed(answer[1], other[1]) > 1e-3


@pytest.mark.parametrize("cond", CONDITIONINGS)
def test_sec42_embedding_once_and_denoising_is_the_forward_pass(cond):
    """denoise(x_t, t, embed(y)) is forward(x_t, t, y), and embed does not look at x_t or t."""
    net = small(cond)
    xt, t, y = batch()
    with torch.no_grad():
        e = net.embed(y)
        for shift in (0, 1):
            assert torch.equal(net.denoise(xt + shift, t + shift, e), net(xt + shift, t + shift, y))


def test_sec42_addition_is_a_special_case_of_concatenation():
    """Give x_t the sum of addition's 16 kernels, the features the kernels: the same network."""
    add, concat = small("add"), small("concat")
    weights = add.state_dict()
    kernel = weights["unet.stem.weight"]
    weights["unet.stem.weight"] = torch.cat([kernel.sum(1, keepdim=True), kernel], 1)
    concat.load_state_dict(weights)
    xt, t, y = batch()
    with torch.no_grad():
        answer = add(xt, t, y)
        close(concat(xt, t, y), answer, rel=1e-3, abs=1e-4 * answer.abs().max())


def test_sec42_concatenation_can_begin_as_addition():
    """x_t's kernel is the sum of the 16 others.

    It has 17 times the variance that concatenation draws it with.
    """
    net = ConditionalUNet("concat", **SMALL | dict(channels=240))
    own = net.unet.stem.weight.detach().clone()
    conditional.begin_as_addition(net)
    from_add = net.unet.stem.weight.detach()
    close(from_add[:, 0], from_add[:, 1:].sum(1), rel=1e-5, abs=1e-6)
    assert float(own[:, 0].var() / own[:, 1:].var()) == pytest.approx(1, rel=0.15)
    assert float(from_add[:, 0].var() / own[:, 0].var()) == pytest.approx(17, rel=0.15)


def test_sec4_cross_attention_sees_the_embedding_patch_by_patch():
    """32x32 images: a token is one of 16x16 patches of 2x2.

    A pixel of the embedding changes its own token alone.
    """
    net = small("cross", image_size=32, attention_at=(16,))
    layer, seen = next(m for m in net.modules() if isinstance(m, CrossAttention)), []
    layer.register_forward_pre_hook(lambda m, a: seen.append(a[1]))
    xt, t, _ = batch(1, 32)
    e = randn(1, 16, 32, 32)
    spot = e.clone()
    spot[0, 3, 10, 21] += 1
    with torch.no_grad():
        net.denoise(xt, t, e), net.denoise(xt, t, spot)
    assert seen[0].shape == (1, 64, 16, 16)
    assert (seen[0] != seen[1]).any(1).nonzero().tolist() == [[0, 5, 10]]


def test_sec42_levels_adds_its_map_after_the_first_residual_block_of_each_level():
    """Each map has the size of its level. What follows sees residual block + map, to the bit."""
    net = small("levels", channel_mult=(1, 2, 3), blocks=2)
    xt, t, y = batch()
    maps, seen = net.embed(y), {}
    assert [m.shape[1:] for m in maps] == [(24, 16, 16), (48, 8, 8), (72, 4, 4)]
    for i, block in enumerate(net.unet.encoder):
        block[0].register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, []).append(out))
        block.register_forward_hook(lambda m, a, out, i=i: seen[i].append(out))
    net.unet.encoder[3][2].register_forward_pre_hook(lambda m, args: seen[3].append(args[0]))
    net.denoise(xt, t, maps)
    joined = [any(isinstance(layer, AddLevel) for layer in block) for block in net.unet.encoder]
    assert [i for i, found in enumerate(joined) if found] == [0, 3, 6]
    assert torch.equal(seen[0][1], seen[0][0] + maps[0])
    assert torch.equal(seen[3][1], seen[3][0] + maps[1])  # what its attention sees
    assert torch.equal(seen[6][1], seen[6][0] + maps[2])


def test_sec42_levels_without_an_xray_is_the_unconditional_network():
    """With maps of 0 the layers of the U-Net are those of §3.2, and their weights are enough."""
    net, plain = small("levels"), ConditionalUNet(None, **SMALL)
    for ours, others in zip(plain.parameters(), net.unet.parameters(), strict=True):
        ours.data = others.data
    xt, t, y = batch()
    maps = [torch.zeros_like(level) for level in net.embed(y)]
    with torch.no_grad():
        close(net.denoise(xt, t, maps), plain(xt, t))


def test_sec42_an_embedding_is_repeated_image_by_image():
    """Of each image n copies follow one another, tensor or list of levels alike."""
    e = torch.arange(6.0).view(2, 3)
    assert conditional.repeated(e, 2).tolist() == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2
    first, second = conditional.repeated([e, -e], 3)
    assert torch.equal(first, e[[0, 0, 0, 1, 1, 1]]) and torch.equal(second, -first)


def test_sec42_an_unknown_conditioning_is_refused_in_words():
    refusal = "one of ('add', 'lift', 'concat', 'levels', 'none', 'cross') or None, got 'film'"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        ConditionalUNet("film", **SMALL)


# ---------------------------------------- §4: what an X-ray is drawn from


@pytest.mark.parametrize("cond", conditional.CONDITIONINGS)
def test_sec4_masks_that_are_given_enter_as_the_xray_of_a_mask_does(cond):
    """Two masks in place of one X-ray: the same layers, with two channels of y."""
    net = small(cond, y_channels=2)
    xt, t, y = batch()
    masks = torch.cat([y, y.flip(3)], 1)
    assert torch.equal(net(xt, t, Given(masks, None)), net.denoise(xt, t, net.embed(masks)))
    assert not torch.equal(net(xt, t, Given(masks, None)), net(xt, t, Given(masks.flip(1), None)))


def test_sec4_the_class_is_added_to_the_time_embedding_of_its_own_picture():
    """0, no class, has a vector too; without classes nothing is added."""
    net = small(None, classes=3)
    xt, t, _ = batch(4)
    seen = []
    for block in net.unet.encoder:
        block.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    label = torch.tensor([0, 3, 1, 1])
    answer = net(xt, t, Given(None, label))
    close(seen[0], net.unet.time(timestep_embedding(t, 24)) + net.of_class.weight[label])
    assert all(torch.equal(emb, seen[0]) for emb in seen)
    close(answer[2:3], net(xt[2:3], t[2:3], Given(None, label[2:3])), rel=1e-4, abs=1e-5)
    plain = net.denoise(xt, t, None)
    close(seen[-1], net.unet.time(timestep_embedding(t, 24)))
    assert (plain - answer).abs().amax((1, 2, 3)).min() > 1e-4


def test_sec4_a_network_without_classes_has_the_weights_it_always_had():
    """The classes are drawn last: what a seed gives the other layers stays as it is."""
    torch.manual_seed(0)
    plain = ConditionalUNet("concat", growth=4, **SMALL).state_dict()
    torch.manual_seed(0)
    more = ConditionalUNet("concat", growth=4, classes=3, **SMALL).state_dict()
    assert set(more) - set(plain) == {"of_class.weight"}
    assert all(torch.equal(plain[name], more[name]) for name in plain)
    assert more["of_class.weight"].shape == (4, 96)
