"""§3.2's network: facts of the published network it simplifies, and the formulas of its layers."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diffusion
import unet
from conditional import ConditionalUNet
from testing import group_norm_as_on_cuda
from unet import CrossAttention, LinearAttention, ResidualBlock, UNet

SMALL = dict(channels=24, channel_mult=(1, 2), attention_at=(8,), head_channels=24, image_size=16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(net, scale=0.1):
    """The network with noise on all its parameters: no layer is 0 any more."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.eval()


def batch(n=2, size=16):
    """x_t, t and y for n images."""
    xt, y = randn(n, 1, size, size, seed=1), randn(n, 1, size, size, seed=2)
    return xt, torch.arange(1, n + 1) * 300, y.clamp(-1, 1)


def report_size(in_channels):
    with torch.device("meta"):  # shapes without numbers
        return UNet(in_channels)


def run_without_numbers(net, inputs):
    """One pass at 64x64 of a network on the "meta" device: its hooks see the shapes."""
    xt = torch.zeros(1, inputs, 64, 64, device="meta")
    net(xt, torch.ones(1, dtype=torch.int64, device="meta"))


def parameters_of(module):
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def close(a, b, rel=1e-9, abs=1e-11):
    torch.testing.assert_close(a, b, rtol=rel, atol=abs)


def changed(a, b):
    """How far two answers are apart, on the answers' own scale."""
    return ((a - b).abs().max() / a.abs().max()).item()


# ---------------------------------------- the published network

PARAMETERS = [(1, 217_859_905), (16, 217_885_825), (17, 217_887_553)]
MULTIPLY_ACCUMULATES = [(1, 85_688_549_376), (16, 85_794_717_696), (17, 85_801_795_584)]


@pytest.mark.parametrize("inputs, parameters", PARAMETERS)
def test_sec32_report_size_has_the_published_number_of_parameters(inputs, parameters):
    """The public code that the report builds on, at 64x64.

    Inputs are 1, 16 (addition) and 17 (concatenation).
    """
    assert parameters_of(report_size(inputs)) == parameters


@pytest.mark.parametrize("inputs, parameters", [(1, 1_060_673), (16, 1_064_993), (17, 1_065_281)])
def test_sec32_small_size_has_the_published_number_of_parameters(inputs, parameters):
    """The same public code at 16x16: 2 levels, 32 channels, attention at 8x8, heads of 32."""
    net = UNet(inputs, **SMALL | dict(channels=32, head_channels=32))
    assert parameters_of(net) == parameters


@pytest.mark.parametrize("inputs, macs", MULTIPLY_ACCUMULATES)
def test_sec32_report_size_costs_the_published_multiply_accumulates(inputs, macs):
    """Counted at the layers as they run.

    They are convolutions, linear layers, and the two products QK^T and (softmax)V.
    """
    net, count = report_size(inputs), []

    def hook(layer, args, out):
        if isinstance(layer, LinearAttention):
            count.append(2 * out.shape[1] * (out.shape[2] * out.shape[3]) ** 2)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            count.append(out.numel() * layer.weight[0].numel())

    for layer in net.modules():
        layer.register_forward_hook(hook)
    run_without_numbers(net, inputs)
    assert sum(count) == macs


# Channels in of each residual block; channels and side of what comes out; heads of the attention
ENCODER = [
    *[([192], 192, 64, None)] * 2, ([192], 192, 32, None),
    ([192], 384, 32, 6), ([384], 384, 32, 6), ([384], 384, 16, None),
    ([384], 576, 16, 9), ([576], 576, 16, 9), ([576], 576, 8, None),
    ([576], 768, 8, 12), ([768], 768, 8, 12),
]  # fmt: skip
MIDDLE = [([768, 768], 768, 8, 12)]
DECODER = [
    *[([1536], 768, 8, 12)] * 2, ([1344, 768], 768, 16, 12),
    ([1344], 576, 16, 9), ([1152], 576, 16, 9), ([960, 576], 576, 32, 9),
    ([960], 384, 32, 6), ([768], 384, 32, 6), ([576, 384], 384, 64, 6),
    ([576], 192, 64, None), *[([384], 192, 64, None)] * 2,
]  # fmt: skip


def test_sec32_the_blocks_are_those_of_the_published_network_in_its_order():
    """The block list of the public code: 28 residual blocks, 16 attentions.

    Sizes are measured as the network runs.
    """
    net, rows = report_size(1), []

    def hook(block, args, out):
        attention = [layer for layer in block if isinstance(layer, LinearAttention)]
        heads = attention[0].norm.num_channels // attention[0].D if attention else None
        inputs = [layer.conv_1.in_channels for layer in block if isinstance(layer, ResidualBlock)]
        rows.append((inputs, out.shape[1], out.shape[2], heads))

    blocks = [m for m in net.modules() if isinstance(m, unet.Block)]
    for block in blocks:
        block.register_forward_hook(hook)
    run_without_numbers(net, 1)
    assert rows == ENCODER + MIDDLE + DECODER
    kinds = [type(layer) for block in blocks for layer in block]
    assert kinds.count(ResidualBlock) == 28 and kinds.count(LinearAttention) == 16
    shortcuts = [m.shortcut for m in net.modules() if isinstance(m, ResidualBlock)]
    assert sum(isinstance(shortcut, nn.Conv2d) for shortcut in shortcuts) == 15
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-5)}


def test_sec32_a_fresh_network_is_its_shortcuts():
    """45 layers start at 0: the last of each of 28 residual blocks and 16 attentions, the head."""
    net = UNet(channels=16, channel_mult=(1, 2, 3, 4), head_channels=16)
    convolutions = [m for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    assert sum(not m.weight.any() and not m.bias.any() for m in convolutions) == 45


# ---------------------------------------- layers


@pytest.mark.parametrize("dim", [2, 24, 192])
def test_sec32_timestep_embedding_is_cos_and_sin_of_geometric_frequencies(dim):
    """Real and imaginary part of exp(i t 10000^(-k / (dim/2))), from numpy's complex numbers.

    All 1000 steps differ. The angles reach 1000 in float32, hence the tolerance.
    """
    t = torch.arange(1, 1001)
    emb = unet.timestep_embedding(t, dim)
    turn = np.exp(1j * t.numpy()[:, None] * 10_000.0 ** (-np.arange(dim // 2) / (dim // 2)))
    assert np.allclose(emb.numpy(), np.concatenate([turn.real, turn.imag], 1), atol=5e-4)
    assert len(emb.unique(dim=0)) == 1000


def test_sec32_attend_is_torchs_scaled_dot_product_attention():
    """softmax(QK^T / sqrt(D)) V in float64; queries and values differ in number of positions."""
    q, k, v = (randn(2, 3, n, 16, seed=n, dtype=torch.float64) for n in (20, 30, 30))
    close(unet.attend(q, k, v), F.scaled_dot_product_attention(q, k, v), abs=1e-12)


def pieces_attended(q, k, v, D):
    """§3.2 in numpy, position by position: channels cut into pieces of D, outputs joined.

    The formula of a piece is softmax(QK^T / sqrt(D)) V.
    """
    q, k, v = (z.detach().numpy() for z in (q, k, v))  # (B, C, positions)
    out = np.zeros((q.shape[0], v.shape[1], q.shape[2]))
    for c in range(0, q.shape[1], D):
        piece = slice(c, c + D)
        weight = np.exp(np.einsum("bci,bcj->bij", q[:, piece], k[:, piece]) / D**0.5)
        softmax = weight / weight.sum(2, keepdims=True)
        out[:, piece] = np.einsum("bij,bcj->bci", softmax, v[:, piece])
    return torch.from_numpy(out)


def convolved(layer, x):
    """A one-dimensional convolution of kernel size 1, as a product of matrices."""
    return torch.einsum("oc,bcn->bon", layer.weight[..., 0], x) + layer.bias[:, None]


@pytest.mark.parametrize("D, H, W", [(4, 3, 5), (8, 3, 5), (24, 3, 5), (8, 9, 8)])
def test_sec32_linear_attention_is_the_printed_formula(D, H, W):
    """Norm, one-dimensional convolution to Q, K, V, pieces of D, the formula, out; + the input.

    For few positions and for many.
    """
    layer = awake(LinearAttention(24, D).double(), 0.5)
    x = randn(2, 24, H, W, dtype=torch.float64)
    q, k, v = convolved(layer.qkv, layer.norm(x).flatten(2)).split(24, 1)
    out = convolved(layer.out, pieces_attended(q, k, v, D))
    close(layer(x), x + out.reshape(x.shape))


def test_sec32_linear_attention_does_not_know_where_positions_are():
    """Permuting the positions of a non-square image permutes the output and does nothing else."""
    layer, x = awake(LinearAttention(24, 8).double(), 0.5), randn(2, 24, 3, 5, dtype=torch.float64)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))

    def shuffle(z):
        return z.flatten(2)[..., order].reshape(z.shape)

    close(layer(shuffle(x)), shuffle(layer(x)))
    assert changed(layer(x), x) > 0.1


@pytest.mark.parametrize("D", [8, 24])
def test_sec4_cross_attention_is_the_formula_with_keys_and_values_of_the_condition(D):
    """Queries of the image, keys and values of the tokens.

    Queries and keys also see the position code.
    """
    layer = awake(CrossAttention(24, 10, D).double(), 0.3)
    x = randn(2, 24, 3, 5, dtype=torch.float64)
    tokens = randn(2, 10, 4, 2, seed=1, dtype=torch.float64)
    q = layer.q(torch.cat([layer.norm(x), unet.position_code(x)], 1).flatten(2))
    k = layer.k(torch.cat([tokens, unet.position_code(tokens)], 1).flatten(2))
    out = layer.out(pieces_attended(q, k, layer.v(tokens.flatten(2)), D))
    close(layer(x, tokens), x + out.reshape(x.shape))


def test_sec4_position_code_names_places_whatever_the_grid():
    """Rows and columns are told apart on 64x64.

    A pixel of a 3x3 grid has the code of the same place on a 9x15 grid.
    """
    fine = unet.position_code(torch.zeros(1, 1, 9, 15))
    coarse = unet.position_code(torch.zeros(2, 1, 3, 3))
    close(coarse[1], fine[0, :, 1::3, 2::5], abs=1e-4)
    codes = unet.position_code(torch.zeros(1, 1, 64, 64))[0].flatten(1)
    k, row = torch.arange(6), (torch.arange(9) + 0.5) / 9
    turns = torch.pi * 2.0 ** k[:, None] * row  # octaves: 1, 2, 4, ... half turns
    close(fine[0, :6, :, 0], turns.cos(), abs=1e-4)
    close(fine[0, 12:18, :, 0], turns.sin(), abs=1e-4)
    nearest_other_place = torch.cdist(codes.T[::7], codes.T).sort(1).values[:, 1]
    assert nearest_other_place.min() > 0.05


def silu(z):
    return z * torch.sigmoid(z)


def resampled(z, how):
    """Down: means of 2x2 pixels. Up: each pixel four times."""
    if how == "down":
        return (z[..., ::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, ::2] + z[..., 1::2, 1::2]) / 4
    if how == "up":
        return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return z


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("c_out", [12, 24])
def test_sec32_residual_block_is_its_list_of_layers(resample, c_out):
    """Norm, SiLU, resample, convolution, + Linear(SiLU(emb)), norm, SiLU, convolution.

    + resampled, projected input.
    """
    block = awake(ResidualBlock(12, c_out, 5, resample).double(), 0.3)
    x, emb = randn(2, 12, 4, 6, dtype=torch.float64), randn(2, 5, dtype=torch.float64)
    h = block.conv_1(resampled(silu(block.norm_1(x)), resample))
    h = h + block.emb(silu(emb))[:, :, None, None]
    shortcut = resampled(x, resample)
    if c_out != 12:
        weight, bias = block.shortcut.weight[:, :, 0, 0], block.shortcut.bias[:, None, None]
        shortcut = torch.einsum("oc,bchw->bohw", weight, shortcut) + bias
    close(block(x, emb), shortcut + block.conv_2(silu(block.norm_2(h))))


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 192])
def test_sec32_every_residual_block_hears_the_time(channels):
    """Another time embedding changes the block's answer, at any width.

    A norm of one channel a group would erase it.
    """
    block = awake(ResidualBlock(channels, channels, 8).double())
    x, emb = randn(1, channels, 4, 4, dtype=torch.float64), randn(2, 1, 8, dtype=torch.float64)
    assert changed(block(x, emb[0]), block(x, emb[1])) > 1e-3


# ---------------------------------------- 16 bits


def test_activations_stay_in_16_bits_between_the_convolutions_also_on_cuda(monkeypatch):
    """Where autocast would widen GroupNorm. The head's convolution alone takes float32.

    The answer is the float32 network's up to the rounding of 16 bits.
    """
    net, seen = awake(ConditionalUNet("add", growth=4, **SMALL)), {}
    xt, t, y = batch()
    with torch.no_grad():
        exact = net(xt, t, y)
    group_norm_as_on_cuda(monkeypatch)
    for name, layer in net.unet.named_modules():
        if isinstance(layer, (nn.GroupNorm, nn.Conv2d, nn.SiLU)):
            layer.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(xt, t, y)
        answer.square().sum().backward()
    assert seen.pop("stem") == seen.pop("head.2") == answer.dtype == torch.float32
    assert len(seen) > 20 and set(seen.values()) == {torch.bfloat16}
    assert changed(exact, answer.detach()) < 0.03
    for name, p in net.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.abs().max() > 0, name


def test_the_statistics_of_16_bit_activations_are_in_float32():
    """The norm of 16-bit numbers that sum to 4 million differs by their last rounding alone."""
    x = (1000 + randn(2, 24, 16, 16)).bfloat16()
    norm = awake(unet.group_norm(24))
    with torch.autocast("cpu", torch.bfloat16):
        answer = norm(x)
    exact = F.group_norm(x.double(), 6, norm.weight.double(), norm.bias.double(), 1e-5)
    assert answer.dtype == torch.bfloat16
    close(answer.double(), exact, rel=2**-8, abs=1e-3)


def test_eq2_a_16_bit_network_knows_x0_at_the_noisiest_step():
    """The head answers in float32: bf16's rounding of eps would move x_0 by 0.26 at t = 1000."""
    head = awake(UNet(**SMALL).head, 0.3)
    h = randn(1, 24, 16, 16).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eps = head(h)
        exact = head[2].double()(head[1](head[0](h)).double())
    s, xt, t = diffusion.linear_schedule(), randn(1, 1, 16, 16, dtype=torch.float64), 1000
    x0, exact_x0 = (diffusion.predict_x0(s, xt, t, e.double()) for e in (eps, exact))
    assert (x0 - exact_x0).abs().max() < 1e-3
    rounded = diffusion.predict_x0(s, xt, t, exact.bfloat16().double())
    assert (rounded - exact_x0).abs().max() > 0.1


# ---------------------------------------- the whole network


def test_sec32_the_time_passes_two_linear_layers_and_the_answer_norm_silu_and_convolution():
    """What every block hears of t, and what the head makes of the last block's output."""
    net, heard, ends = awake(UNet(**SMALL)), [], []
    for block in (*net.encoder, net.middle, *net.decoder):
        block.register_forward_pre_hook(lambda m, args: heard.append(args[1]))
    net.decoder[-1].register_forward_hook(lambda m, args, out: ends.append(out))
    xt, t, _ = batch()
    answer = net(xt, t)
    first, last = net.time[0], net.time[-1]
    code = unet.timestep_embedding(t, SMALL["channels"])
    hidden = silu(torch.einsum("oc,bc->bo", first.weight, code) + first.bias)
    emb = torch.einsum("oc,bc->bo", last.weight, hidden) + last.bias
    for h in heard:
        close(h, emb, abs=1e-5)
    norm, convolution = net.head[0], net.head[-1]
    normed = F.group_norm(ends[0], norm.num_groups, norm.weight, norm.bias, 1e-5)
    weight, bias = convolution.weight, convolution.bias
    close(answer, F.conv2d(silu(normed), weight, bias, padding=1), abs=1e-5)


def test_sec32_the_answer_depends_on_image_and_time():
    """Another t changes the answer; so does one pixel in a corner, at the opposite corner.

    Attention joins them.
    """
    net = awake(UNet(**SMALL))
    xt, t, _ = batch(1)
    spot = torch.zeros_like(xt)
    spot[..., 0, 0] = 1
    with torch.no_grad():
        answer = net(xt, t)
        assert changed(answer, net(xt, t + 300)) > 1e-2
        assert changed(answer[..., -1, -1], net(xt + spot, t)[..., -1, -1]) > 1e-5


def test_sec32_each_decoder_block_takes_one_skip_last_in_first_out():
    """What enters decoder block k is [the output before it, the output of encoder block -k].

    Each channel of each skip matters.
    """
    net = awake(UNet(**SMALL))
    pushed, flow, taken = [], [], []
    for block in (net.stem, *net.encoder):
        block.register_forward_hook(lambda m, a, out: pushed.append(out))
    for block in (net.middle, *net.decoder):
        block.register_forward_hook(lambda m, a, out: flow.append(out))
    for block in net.decoder:
        block.register_forward_pre_hook(lambda m, a: taken.append(a[0]))
    xt, t, _ = batch()
    answer = net(xt, t)
    assert len(pushed) == len(taken) == 6  # of 2 levels: the stem, 2 blocks each, one down
    for h, skip, joined in zip(flow, reversed(pushed), taken):
        assert torch.equal(joined, torch.cat([h, skip], 1))
    for skip, gradient in zip(reversed(pushed), torch.autograd.grad(answer.square().sum(), taken)):
        assert gradient[:, -skip.shape[1] :].abs().amax((0, 2, 3)).min() > 1e-6


def test_sec32_float64_and_float32_agree():
    """The network in double precision gives the single-precision answer: nothing is rounded."""
    net = awake(UNet(**SMALL))
    xt, t, _ = batch()
    with torch.no_grad():
        answer = net(xt, t)
        close(net.double()(xt.double(), t).float(), answer, rel=1e-3, abs=1e-4 * answer.abs().max())


def test_sec32_any_image_size_the_levels_divide():
    """A 12x20 image mirrored along its diagonal gives the mirrored answer by mirrored kernels."""
    net = awake(UNet(**SMALL))
    mirrored = copy.deepcopy(net)
    for p in mirrored.parameters():
        p.data = p.data.mT.contiguous() if p.ndim == 4 else p.data
    xt, t = randn(1, 1, 12, 20), torch.tensor([700])
    with torch.no_grad():
        answer, other = net(xt, t), mirrored(xt.mT.contiguous(), t)
    assert answer.shape == xt.shape
    close(other.mT, answer, rel=1e-3, abs=1e-4 * answer.abs().max())


EVEN = r"channels must be even \(cos and sin of the time embedding\) and at least 2"
AMONG = r"attention_at must be among the resolutions \[64, 32, 16, 8\]"
DIVIDE, ATTENDED = "head_channels must divide the", "channels that have attention"
REFUSED = [
    (dict(image_size=66), "image_size must be divisible by 8 for 4 levels, got 66"),
    (dict(attention_at=(24,)), f"{AMONG}, got 24"),
    (dict(head_channels=40), f"{DIVIDE} 384 {ATTENDED}, got 40"),
    (dict(head_channels=7, attention_at=()), f"{DIVIDE} 768 {ATTENDED}, got 7"),
    (dict(channels=15), f"{EVEN}, got 15"),
    (dict(channels=0), f"{EVEN}, got 0"),
]


@pytest.mark.parametrize("wrong, words", REFUSED)
def test_sec32_a_network_that_cannot_be_built_is_refused_in_words(wrong, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        UNet(**wrong)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 1, 15, 16), (1, 1, 16, 15)])
def test_sec32_an_image_that_does_not_fit_is_refused_in_words(shape):
    refusal = f"1 channels and sides divisible by 2, got {shape}"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        UNet(**SMALL)(torch.zeros(shape), torch.ones(1, dtype=torch.int64))


def test_sec32_attention_takes_a_fused_kernel_and_not_the_fallback(monkeypatch):
    """What LinearAttention hands to torch has last stride 1, as torch's fused kernels demand."""
    seen, exact = [], F.scaled_dot_product_attention

    def watched(q, k, v):
        seen.append((q, k, v))
        return exact(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    LinearAttention(64, 32)(torch.randn(2, 64, 16, 16))
    assert all(z.stride(-1) == 1 for z in seen[0])
