"""X-rays that are drawn: from noise (§3), from what is given (§4); how they are measured."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import image_metrics
import networks
import synthesis
from conditions import Given
from testing import CPU, shake, split, tiny


def no_samples(model, cfg, index, *_):
    """Black images in place of sample_images, where only the loss is asked for."""
    return torch.zeros(len(index), 1, 16, 16)


def test_sec3_every_run_is_measured_by_eq7_at_the_same_t_and_eps():
    """However a run was trained, one network has one loss: t uniform, one noise, the same draws."""
    settings = dict(task="synthesis", cond=None)
    model = shake(networks.build_model(tiny(**settings)))

    def loss(**how):
        return synthesis.eq7_loss(model, tiny(**settings, **how), split(40), CPU)["loss"]

    plain = dict(t_power=1.0, objective="eps", seed=0)
    for other in (dict(t_power=4.0), dict(objective="vp"), dict(seed=1)):
        assert loss(**plain | other) == loss(**plain)


def test_sec3_the_loss_of_a_perfect_network_is_zero_and_that_of_zeros_is_the_noises_square():
    """Black images alone: x_0 is known, so eps is; a network of zeros has the mean of eps^2."""
    cfg = tiny(task="synthesis", cond=None, target="eps", eval_images=5)
    black = data.Split(np.zeros((9, 1, 16, 16), np.uint8), None, [])
    s, noises = diffusion.schedule(cfg.T, cfg.pixel_shift), []

    def perfect(xt, t, y):
        noises.append(diffusion.predict_eps(s, xt, t, torch.full_like(xt, -1.0)))
        return noises[-1]

    assert synthesis.eq7_loss(perfect, cfg, black, CPU)["loss"] < 1e-6
    zeros = synthesis.eq7_loss(lambda xt, t, y: torch.zeros_like(xt), cfg, black, CPU)
    assert zeros["images"] == 5 == len(torch.cat(noises))
    assert zeros["loss"] == pytest.approx(float(torch.cat(noises).square().mean()), rel=1e-4)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_sec3_a_network_is_measured_by_what_it_predicts(target):
    """Black images: who answers what its target is scores 0, the others do not."""
    cfg = tiny(task="synthesis", cond=None, target=target, eval_images=5)
    black = data.Split(np.zeros((9, 1, 16, 16), np.uint8), None, [])
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    for answered in diffusion.TARGETS:

        def perfect(xt, t, y, answered=answered):
            x0 = torch.full_like(xt, -1.0)
            eps = diffusion.predict_eps(s, xt, t, x0)
            return diffusion.target_of(s, answered, x0, t, eps)

        loss = synthesis.eq7_loss(perfect, cfg, black, CPU)["loss"]
        assert (loss < 1e-6) == (answered == target)


def test_a_shifted_schedule_is_the_one_a_run_is_measured_by(monkeypatch):
    """Eq. (7) in an evaluation is that of the shifted schedule, on both splits."""
    used, expected = [], diffusion.shifted(diffusion.linear_schedule(), 0.5).abar

    def l_simple(s, *_):
        used.append(s)
        return torch.zeros(())

    monkeypatch.setattr(diffusion, "l_simple", l_simple)
    monkeypatch.setattr(synthesis, "sample_images", no_samples)
    cfg = tiny(task="synthesis", cond=None, shift=0.5)
    synthesis.evaluate_images(None, cfg, {"Train": split(4), "Val": split(8)}, CPU)
    assert len(used) == 2 and all(torch.equal(s.abar, expected) for s in used)


def test_sec3_samples_are_compared_with_one_half_of_the_held_out_images(monkeypatch):
    """As many samples; the other half, which has no image of the first, is compared with it too."""

    def as_bytes(images):
        return [image.tobytes() for image in images.numpy()]

    pairs, held_out = [], split(9)
    monkeypatch.setattr(image_metrics, "image_features", as_bytes)
    monkeypatch.setattr(
        image_metrics, "frechet_distance", lambda *pair: pairs.append(pair) or len(pairs)
    )
    cfg = tiny(task="synthesis", cond=None)
    model = networks.build_model(cfg)
    found, samples = synthesis.distances_to_held_out(model, cfg, held_out, CPU)
    (ours, reference), (others, again) = pairs
    assert list(found.values()) == [1, 2] and "halves" in list(found)[1] and again == reference
    expected = synthesis.sample_images(model, cfg, range(4))
    assert ours == as_bytes(expected)
    assert np.array_equal(samples, data.to_uint8(expected))
    every = set(as_bytes(data.to_float(held_out.images)))
    assert len({*reference, *others}) == 8 and {*reference, *others} < every
    of_three = dataclasses.replace(cfg, eval_images=3)
    synthesis.distances_to_held_out(model, of_three, held_out, CPU)
    assert [list(map(len, pair)) for pair in pairs[2:]] == [[3, 3], [3, 3]]


# ---------------------------------------- from what is given


class Believer:
    """A network that knows its image: x_0 is what is given, -0.5 where nothing is.

    halves  2: it answers a v beside it, see improved.py
    """

    def __init__(self, halves=1):
        self.halves = halves

    def embed(self, y):
        return torch.where(y.label > 0, y.label / 4.0, -0.5).view(-1, 1, 1, 1)

    def denoise(self, xt, t, e):
        return e.expand_as(xt).repeat(1, self.halves, 1, 1)


@pytest.mark.parametrize("variance", ["beta", "learned"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "strided", "ode", "sde"])
def test_guidance_reaches_every_sampler_and_counts_its_passes(sampler, variance):
    """Both answers are x_0: guided it is (1 + w) x_0 - w (-0.5), clipped; two calls a pass."""
    kind = dict(task="synthesis", cond=None, given="class", target="x0")
    cfg = tiny(**kind, sampler=sampler, variance=variance)
    model = Believer(2 if variance == "learned" else 1)
    T = 20 if sampler == "ddpm" else 1000
    cfg = dataclasses.replace(cfg, T=T, ddim_steps=7, eval_images=2)
    given, passed = Given(None, torch.tensor([1, 2])), []
    for w in (0.0, 0.5):
        how = dataclasses.replace(cfg, guidance=w)
        x0 = synthesis.sample_images(model, how, range(2), given=given, progress=passed.append)
        expected = (1 + w) * torch.tensor([0.25, 0.5]) + w * 0.5
        assert torch.allclose(x0.mean((1, 2, 3)), expected.clamp(-1, 1), atol=0.06), w
        assert sum(passed) == evaluate.images_sampled(how, {"Val": 4})
        passed.clear()
    nothing = synthesis.sample_images(model, cfg, range(2))
    assert torch.allclose(nothing.mean((1, 2, 3)), torch.full((2,), -0.5), atol=0.06)


def test_a_run_is_measured_on_pictures_of_what_each_held_out_one_is_given(monkeypatch):
    """Eq. (7) and the samples: row by row the label of the picture that they are compared with."""
    cfg = tiny(task="synthesis", cond=None, given="class", target="x0", eval_images=4)
    names = [f"{data.CLASSES[i % 3]}/{i}.png" for i in range(8)]
    val, seen = split(8)._replace(names=names, masks=None), []
    label = torch.tensor([1 + i % 3 for i in range(8)])

    def l_simple(s, model, x0, y, *_):
        rows = [int((data.to_float(val.images) == x).flatten(1).all(1).nonzero()) for x in x0]
        seen.append(torch.equal(y.label, label[rows]))
        return torch.zeros(())

    monkeypatch.setattr(diffusion, "l_simple", l_simple)
    assert synthesis.eq7_loss(None, cfg, val, CPU)["images"] == 4 and seen == [True]
    model = networks.build_model(cfg)
    monkeypatch.setattr(synthesis, "cast_once", lambda *_: Believer())
    _, samples = synthesis.distances_to_held_out(model, cfg, val, CPU)
    order = np.random.default_rng(evaluate.EVAL_SEED).permutation(8)
    half = np.array_split(order, 2)[1]
    expected = data.to_uint8(label[half].float() / 4)
    assert np.abs(samples.mean((1, 2, 3)) - expected).max() <= 6


def test_masks_are_drawn_by_a_run_from_what_it_knows_of_the_others(tmp_path, monkeypatch):
    """Lungs first, then the infection of these lungs; and what is drawn is given as -1 and +1."""
    asked = []

    def load_run(where, device):
        given = {"lungs": "", "infections": "lung"}[where]
        draws = tiny(task="synthesis", cond=None, draw=where[:-1], given=given)
        return where, draws, 7

    def draw(model, cfg, known, N, device, progress, seed):
        asked.append((model, known, seed))
        return torch.linspace(-1, 1, N * 256).view(N, 1, 16, 16) * (1 if model == "lungs" else -1)

    monkeypatch.setattr(synthesis, "draw", draw)
    cfg = tiny(task="synthesis", cond="concat", given="class+lung+infection")
    wanted = {"class": "Non-COVID", "infection": "infections.pt", "lung": "lungs.pt"}
    monkeypatch.setattr(synthesis.runs, "load_run", lambda p, d: load_run(p.removesuffix(".pt"), d))
    given = synthesis.given_to(cfg, 4, wanted, 5, CPU)
    lungs = torch.where(draw("lungs", *[None] * 1, None, 4, None, None, 5) > 0, 1.0, -1.0)
    assert torch.equal(given.masks, torch.cat([lungs, -lungs], 1))
    assert given.label.tolist() == [2] * 4
    (_, none, seed), (_, known, _) = asked[:2]
    assert none is None and seed == 5
    assert torch.equal(known.masks, lungs) and known.label is None
