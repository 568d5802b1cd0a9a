"""What notebook 6 says of trained networks on a few images."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import metrics
import phantoms
import runs
import score
from testing import CPU, ROOT

NEW = 99  # the seed of phantoms that no network has seen


def network(name):
    """(network, settings) of weights/NAME.pt."""
    return runs.load_run(ROOT / "weights" / f"{name}.pt")[:2]


def chests(n):
    """n phantoms, (images, lung masks), uint8, at 64x64."""
    found = [phantoms.phantom(NEW, i, "Normal")[:2] for i in range(n)]
    images = np.stack([data.resize_image(image, 64)[None] for image, _ in found])
    masks = np.stack([data.resize_mask(lung, 64)[None] for _, lung in found])
    return images, np.uint8(255) * masks


def rms(a, b):
    return float((a - b).square().mean().sqrt())


def test_the_ode_draws_the_x_ray_of_ddim_and_samplers_with_noise_draw_others():
    """From the same x_T: rms from DDIM's X-ray, beside that of another x_T."""
    model, cfg = network("synthesis")

    def drawn(sampler, passes):
        how = dataclasses.replace(cfg, sampler=sampler, ddim_steps=passes)
        return evaluate.sample_images(model, how, range(3), CPU).cpu()

    ddim = drawn("ddim", 40)
    another = rms(ddim, ddim.roll(1, 0))
    assert rms(drawn("ode", 39), ddim) < 0.15 * another
    assert rms(drawn("sde", 50), ddim) > 0.5 * another


def test_an_x_ray_goes_to_noise_and_comes_back():
    """By the flow ODE, with Heun's method: held-out X-rays return; their noise has variance 1."""
    model, cfg = network("synthesis")
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    process = score.process_of(cfg.T, cfg.pixel_shift)
    eps_model = evaluate.eps_model_of(model, cfg, s, CPU)
    of_level = score.score_at_level(
        process, score.score_of_eps(process, eps_model, cfg.T, clip=True)
    )
    levels = score.on_grid(process, score.heun_levels(score.level(process, 1.0), 0.02, 40), cfg.T)
    x = data.to_float(chests(1)[0])
    with torch.inference_mode():
        noised = score.ode_heun(of_level, x, levels[-2::-1])
        back = score.ode_heun(of_level, noised, levels)
    assert rms(back, x) < 0.03
    assert float((noised / levels[0]).std()) == pytest.approx(1, abs=0.1)


def test_masks_of_recipe_best_are_best_in_two_passes_and_worst_by_langevin_dynamics():
    """DICE of the same X-rays: DDIM in 2 passes, DDIM and the ODE in 25, Langevin in 101."""
    model, cfg = network("lung-concat")
    images, masks = chests(3)
    dice = {}
    for sampler, passes in (("ddim", 2), ("ddim", 25), ("ode", 25), ("langevin", 101)):
        how = dataclasses.replace(cfg, sampler=sampler, ddim_steps=passes)
        drawn = evaluate.segment(model, how, images, np.arange(3), CPU)
        counts = metrics.confusion(drawn, masks > 127)
        dice[sampler, passes] = metrics.scores(counts.pooled())["DICE index"]
    assert dice["ddim", 2] > dice["ddim", 25] > dice["ode", 25] > dice["langevin", 101]
