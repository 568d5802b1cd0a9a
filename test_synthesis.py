"""X-rays that are drawn: from noise (§3), from what is given (§4); how they are measured."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import metrics
import networks
import synthesis
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
    monkeypatch.setattr(metrics, "image_features", as_bytes)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *pair: pairs.append(pair) or len(pairs))
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
