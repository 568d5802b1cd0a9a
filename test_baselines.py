"""The supervised networks: published sizes, what each layer sees, and the loss; that they learn."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import baselines
import config
import evaluate
import networks
import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_seed():
    torch.manual_seed(0)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def of_norms(net):
    """How many parameters the norms of a network have."""
    return sum(parameters(m) for m in net.modules() if isinstance(m, nn.GroupNorm))


def without_norms(net):
    """GroupNorm sees the whole image; without it a pixel depends on what convolutions see alone."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return net


def seen(net, side=64):
    """How many pixels to each side of the middle one the answer there depends on."""
    y = torch.randn(1, 1, side, side, requires_grad=True)
    net(y)[0, 0, side // 2, side // 2].backward()
    return int((torch.nonzero(y.grad[0, 0]) - side // 2).abs().max())


def shapes_of_answers(blocks):
    """A list that grows by (C, H, W) whenever one of the blocks answers."""
    shapes = []
    for block in blocks:
        block.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[1:])))
    return shapes


def config_of(words):
    return config.configure(config.parse(words.split()), CPU)


# ---------------------------------------- the networks


def test_sec44_the_unet_has_the_published_number_of_parameters():
    """[15] at one input and one output channel, biases included: 31,030,593; and our norms."""
    with torch.device("meta"):
        net = baselines.UNet2015()
    assert parameters(net) - of_norms(net) == 31_030_593


def test_sec45_the_encoder_is_resnet50():
    """25,557,032 published parameters, less the classifier's 2,049,000 and two input channels.

    ResNet's convolutions have no biases (BatchNorm follows); ours are not counted. GroupNorm has
    BatchNorm's parameters.
    """
    with torch.device("meta"):
        net = baselines.Res50AttUNet()
    encoder = nn.ModuleList([net.stem, net.stages])
    biases = sum(m.bias.numel() for m in encoder.modules() if isinstance(m, nn.Conv2d))
    assert parameters(encoder) - biases == 25_557_032 - 2_049_000 - 2 * 64 * 7 * 7
    net = baselines.Res50AttUNet(8)
    sizes = shapes_of_answers([net.stem, *net.stages])
    net(torch.zeros(1, 1, 64, 64))
    assert sizes == [(8, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]


def test_sec44_the_unets_levels_are_those_of_its_figure():
    """64x64 down to 4x4 with doubling channels and up again, each way two convolutions a level."""
    net = baselines.UNet2015(4)
    sizes = shapes_of_answers([*net.down, *net.merge])
    assert net(torch.zeros(2, 1, 64, 64)).shape == (2, 1, 64, 64)
    assert sizes == [(4 * 2**i, 64 >> i, 64 >> i) for i in (0, 1, 2, 3, 4, 3, 2, 1, 0)]


def test_sec44_a_skip_carries_each_level_of_the_unet_around_what_lies_below():
    """With one up-convolution silenced, a pixel sees only what the levels above it see.

    That is 2 pixels a convolution and level, both ways.
    """
    net, reach = without_norms(baselines.UNet2015(4)), []
    for up in reversed(net.up):
        weights = {name: p.clone() for name, p in up.state_dict().items()}
        for p in up.parameters():
            nn.init.zeros_(p)
        reach.append(seen(net))
        up.load_state_dict(weights)
    assert reach[0] == 4 and reach == sorted(reach)
    assert reach[1] in range(10, 16) and reach[2] > 20 and seen(net) > 31


def test_sec45_an_attention_gate_is_its_formula_and_can_shut_a_skip_out():
    skip, gate = torch.randn(2, 6, 5, 5), torch.randn(2, 3, 5, 5)
    net = baselines.AttentionGate(6, 3)
    assert net.W_x.weight.shape == (3, 6, 1, 1)  # half of the skip's channels, as in the paper

    def by_pixel(layer, x):
        return torch.einsum("dc,bchw->bdhw", layer.weight[:, :, 0, 0], x)

    inner = by_pixel(net.W_x, skip) + by_pixel(net.W_g, gate) + net.W_g.bias[:, None, None]
    factor = torch.sigmoid(by_pixel(net.psi, inner.relu()) + net.psi.bias[:, None, None])
    torch.testing.assert_close(net(skip, gate), skip * factor)

    unet, y = baselines.Res50AttUNet(4), torch.randn(1, 1, 64, 64)
    open_ = unet(y)
    for gate in unet.gates:
        nn.init.constant_(gate.psi.bias, -1e4)
    shut = unet(y)
    for gate in unet.gates:
        gate.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert torch.equal(unet(y), shut) and not torch.equal(open_, shut)
    other = unet(torch.randn(1, 1, 64, 64))
    assert not torch.allclose(other, shut), "what lies below reaches the answer on its own"


def test_every_convolution_begins_as_the_paper_says():
    """[15]: weights N(0, 2 / inputs of an output), here 3 * 3 * 64 and 7 * 7 * 8 of them."""
    for c_in, side in ((64, 3), (8, 7)):
        weight = baselines.convolution(c_in, 128, side)[0].weight.detach()
        error = math.sqrt(1 / (2 * weight.numel()))  # of a standard deviation, relative
        assert float(weight.mean()) == pytest.approx(0, abs=0.01)
        expected = math.sqrt(2 / (side * side * c_in))
        assert float(weight.std()) == pytest.approx(expected, rel=5 * error)


def test_sec45_the_stem_is_a_7x7_convolution_relu_and_the_maximum_of_3x3():
    """ResNet's: two strides of 2, so that the stages begin at a quarter of the side."""
    net, entered, y = baselines.Res50AttUNet(8), [], torch.randn(2, 1, 64, 64)
    net.stages[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    net(y)
    conv, norm = net.stem[0]
    h = norm(nn.functional.conv2d(y, conv.weight, conv.bias, stride=2, padding=3)).relu()
    windows = nn.functional.pad(h, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    torch.testing.assert_close(entered[0], windows.amax((4, 5)))


def test_sec45_a_bottleneck_is_three_convolutions_beside_a_shortcut():
    """A fresh one is ReLU of the shortcut: of the input itself where the size stays."""
    x = torch.randn(2, 8, 8, 8)
    same, smaller = baselines.Bottleneck(8, 2), baselines.Bottleneck(8, 2, stride=2)
    assert torch.equal(same(x), x.relu())
    assert torch.equal(smaller(x), smaller.shortcut(x).relu()) and smaller(x).shape == (2, 8, 4, 4)
    nn.init.ones_(same.inner[-1][1].weight)
    assert torch.equal(same(x), (x + same.inner(x)).relu()) and not torch.equal(same(x), x.relu())
    assert [m.kernel_size[0] for m in smaller.modules() if isinstance(m, nn.Conv2d)] == [1, 3, 1, 1]


@pytest.mark.parametrize("name", baselines.U_NETS)
def test_each_image_is_answered_alone_and_every_parameter_learns(name):
    """The answer does not depend on the batch, as it would with BatchNorm."""
    net, y = baselines.U_NETS[name](4), torch.randn(3, 1, 64, 64)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # where a fresh one answers nothing at all
    answer = net(y)
    torch.testing.assert_close(net(y[1:2]), answer[1:2], rtol=1e-4, atol=1e-5)
    answer.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_reports_network_in_one_pass_is_the_diffusion_network_at_x_T_of_zeros():
    """The same initial weights, bit for bit; x_t = 0 and t = T whatever the X-ray."""
    words = "--task lung --cond add --size small --recipe best --image-size 16 --precision fp32"
    cfg = config_of(f"{words} --set channels=4")
    diffusion = networks.build_model(dataclasses.replace(cfg, model="diffusion"))
    one_pass = networks.build_model(dataclasses.replace(cfg, model="report-unet"))
    for a, b in zip(diffusion.parameters(), one_pass.parameters(), strict=True):
        assert torch.equal(a, b)
    for p in diffusion.parameters():
        p.data.normal_(0, 0.1)
    y, zeros = torch.randn(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    one_pass.net.load_state_dict(diffusion.state_dict())
    found = one_pass(y)
    assert torch.equal(found, diffusion(zeros, torch.tensor([1000, 1000]), y))
    assert not torch.allclose(found, diffusion(zeros, torch.tensor([1, 1]), y))


# ---------------------------------------- the loss


def test_the_loss_is_minus_the_log_probability_of_the_mask():
    """log 2 for an undecided network; by hand for a decided one, in any precision of its logits."""
    x0 = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    assert float(baselines.l_supervised(torch.zeros_like(x0), x0)) == pytest.approx(math.log(2))
    p = torch.tensor([0.9, 0.2, 0.6, 0.5]).view(1, 1, 2, 2)
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.5)) / 4
    assert float(baselines.l_supervised(p.logit(), x0)) == pytest.approx(expected)
    logits, x0 = torch.randn(4, 1, 16, 16).bfloat16(), torch.randn(4, 1, 16, 16).sign()
    in_float32 = float(baselines.l_supervised(logits.float(), x0))
    assert float(baselines.l_supervised(logits, x0)) == in_float32


@pytest.mark.parametrize("model", ["unet", "res50attunet", "report-unet"])
def test_each_learns_which_pixels_are_bright(model):
    """80 of train.py's own steps on images of smooth patterns: 0.9 DICE on unseen images."""
    words = f"--task lung --model {model} --size small --recipe best --image-size 32 --batch-size 8"
    cfg = config_of(f"{words} --steps 80 --precision fp32 --set channels=8 warmup=5 ema=0.5")
    trainer, x = train.Trainer(cfg, CPU), smooth(32)
    for _ in range(cfg.steps):
        trainer.train_step(pixels(x), 255 * (x > 0.2).byte())
    unseen = smooth(8)
    y = pixels(unseen) / 127.5 - 1
    found, true = evaluate.sample_masks(trainer.ema, cfg, y, range(8))[:, 0] > 0, unseen > 0.2
    assert 2 * float((found & true).sum()) / float(found.sum() + true.sum()) > 0.9


def smooth(n):
    """n smooth patterns, (n, 1, 32, 32)."""
    return nn.functional.interpolate(torch.randn(n, 1, 4, 4), size=(32, 32), mode="bicubic")


def pixels(x):
    """Patterns as uint8 images."""
    return (x.clamp(-2, 2) * 60 + 128).byte()
