"""X-rays larger than 64x64: patches lose nothing, and the network on them is the one of §4.2."""

import numpy as np
import pytest
import torch

import baselines
import config
import diffusion
import evaluate
import networks
import score
import train
from conditional import CONDITIONINGS, ConditionalUNet, begin_as_addition
from patches import PatchedUNet, PatchUNet, patch_of, positions_of, to_patches, to_pixels
from testing import CPU, SIZES, shake, tiny

TINY = dict(channels=8, channel_mult=(1, 2), blocks=1, attention_at=(4,), head_channels=8)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_patches_are_undone_exactly(p):
    """Every pixel by its number."""
    x = torch.arange(2 * 36 * p * p).view(2, 1, 6 * p, 6 * p)
    found = to_patches(x, p)
    assert found.shape == (2, p * p, 6, 6) and torch.equal(to_pixels(found, p), x)
    for i in range(p):
        for j in range(p):
            assert torch.equal(found[:, p * i + j], x[:, 0, i::p, j::p])


def test_the_network_always_has_at_most_64_positions_a_side():
    """A size that 64 does not divide is refused, and the nearest is named."""
    assert [patch_of(size) for size in (1, 16, 64, 128, 192, 256, 4096)] == [1, 1, 1, 2, 3, 4, 64]
    assert [positions_of(size) for size in (16, 64, 128, 192, 4096)] == [16, 64, 64, 64, 64]
    for size, near in ((65, 64), (100, 128), (250, 256), (300, 320)):
        rule = f"image_size above 64 must be a multiple of 64, such as {near}, got {size}"
        with pytest.raises(ValueError, match=f"^{rule}$"):
            patch_of(size)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("cond", [*CONDITIONINGS, None])
def test_the_network_on_patches_is_that_of_section_4_2_with_the_pixels_of_a_patch_as_channels(
    cond, p
):
    """The same weights in a ConditionalUNet of p^2 image channels, fed by hand."""
    net = shake(PatchUNet(cond, p, 8 * p, growth=4, **TINY))
    C, features = p * p, {2: 16, 3: 18, 4: 16}[p]
    inner = ConditionalUNet(cond, features, 4, image_size=8, image_channels=C, **TINY)
    inner.load_state_dict(net.state_dict())
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 1, 8 * p, 8 * p, generator=g)
    t = torch.tensor([3, 700])
    e = None if cond is None else inner.embed(to_patches(y, p))
    xt = to_patches(x, p)
    if cond == "add":  # pixel k of a patch on every p^2-th channel of RRDB(y)
        xt = torch.cat([xt] * (features // C), 1)
        assert e.shape[1] == features == xt.shape[1]
    expected = to_pixels(inner.denoise(xt, t, e), p)
    found = net(x, t, None if cond is None else y)
    assert torch.equal(found, expected) and found.shape == x.shape
    assert found.std() > 0.01


def test_concatenation_on_patches_can_begin_as_addition():
    """p = 2: with the kernels that it is given, it answers what addition does."""
    add, concat = (PatchUNet(cond, 2, 16, growth=4, **TINY) for cond in ("add", "concat"))
    shake(add)
    begin_as_addition(concat)
    first = concat.unet.stem.weight.detach()
    weights = add.state_dict()
    weights["unet.stem.weight"] = first[:, 4:]  # of RRDB(y); those of x_t follow from it
    add.load_state_dict(weights)
    concat.load_state_dict(weights | {"unet.stem.weight": first})
    x, y = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    torch.testing.assert_close(concat(x, t, y), add(x, t, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", baselines.U_NETS)
def test_a_supervised_network_on_patches_sees_the_pixels_of_a_patch_as_channels(name):
    """Its logits are put back where the pixels came from."""
    net = shake(PatchedUNet(baselines.U_NETS[name](8, image_channels=4), 2))
    y = torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = net.net(to_patches(y, 2))
    assert expected.shape == (2, 4, 64, 64) and expected.std() > 0.01
    for k in range(4):
        assert torch.equal(net(y)[:, 0, k // 2 :: 2, k % 2 :: 2], expected[:, k])


@pytest.mark.parametrize(
    "words", ["--cond concat", "--cond add", "--model unet", "--task synthesis"]
)
def test_up_to_64x64_nothing_is_patched_and_above_the_weights_hardly_grow(words):
    """To the last parameter: the classes without patches; at 256 the first and last layers grow."""
    task = "" if "task" in words else "--task lung "

    def build(size):
        text = f"{task}{words} --size small --recipe best --image-size {size}"
        return networks.build_model(config.configure(config.parse(text.split()), CPU))

    small, large = build(64), build(256)
    assert type(small) in (ConditionalUNet, baselines.UNet2015)
    assert type(large) in (PatchUNet, PatchedUNet)
    wider = ("stem.", "head.", "embedder.lift.", "down.0.0.")
    sizes = {name.removeprefix("net."): p.shape for name, p in large.named_parameters()}
    assert sizes.keys() == {name for name, _ in small.named_parameters()}
    grown = [name for name, p in small.named_parameters() if sizes[name] != p.shape]
    assert grown and all(any(part in name for part in wider) for name in grown), grown
    more = networks.parameters(large) / networks.parameters(small)
    assert 1 < more < 1.01


def test_a_size_that_64_does_not_divide_is_refused_in_one_line(capsys):
    """By the flag's name, before anything is read."""
    assert train.main("--task lung --image-size 100 --device cpu --dry-run".split()) == 2
    error = capsys.readouterr().err
    assert "--image-size 100" in error and "such as 128, got 100" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_a_patch_hears_as_much_noise_as_a_pixel_of_64x64(size):
    """The signal-to-noise ratio of the mean of its p^2 pixels is that of the unpatched schedule."""
    cfg, p = tiny(image_size=size, shift=0.3), max(1, size // 64)
    pixel, expected = (
        diffusion.schedule(100, shift).abar[1:] for shift in (cfg.pixel_shift, cfg.shift)
    )
    ratio = [abar / (1 - abar) for abar in (pixel, expected)]
    torch.testing.assert_close(ratio[0] * p**2, ratio[1])


@pytest.mark.parametrize("words", ["", "--sampler ode --ddim-steps 3", "--objective vp"])
def test_loss_and_sampling_run_on_the_schedule_of_a_pixel(words, monkeypatch):
    """At 128x128 all of their schedules are those of shift / 2."""
    line = f"--task lung {SIZES} --image-size 128 --set channels=4 shift=0.5 {words}"
    cfg, used = config.configure(config.parse(line.split()), CPU), []
    schedule = diffusion.schedule
    score.process_of.cache_clear()  # it remembers a schedule, and would not ask for it

    def noted(T, shift=1.0, device="cpu", *kind):
        used.append(shift)
        return schedule(T, shift, device, *kind)

    monkeypatch.setattr(diffusion, "schedule", noted)
    trainer = train.Trainer(cfg, CPU)
    images = torch.zeros(4, 1, 128, 128, dtype=torch.uint8)
    trainer.train_step(images, images)
    rows = np.arange(2)
    evaluate.segment(trainer.ema, cfg, images.numpy(), rows, CPU)
    assert len(used) >= 2 and set(used) == {0.25}
