"""What notebook 6 says of trained networks on a few images."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import score
import synthesis
from testing import CPU, chests, dice, network

NEW = 99  # the seed of phantoms that no network has seen


def rms(a, b):
    return float((a - b).square().mean().sqrt())


def test_the_ode_draws_the_x_ray_of_ddim_and_samplers_with_noise_draw_others():
    """From the same x_T: rms from DDIM's X-ray, beside that of another x_T."""
    model, cfg = network("synthesis")

    def drawn(sampler, passes):
        how = dataclasses.replace(cfg, sampler=sampler, ddim_steps=passes)
        return synthesis.sample_images(model, how, range(3), CPU).cpu()

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
    x = data.to_float(chests(NEW, range(1), "Normal").images)
    with torch.inference_mode():
        noised = score.ode_heun(of_level, x, levels[-2::-1])
        back = score.ode_heun(of_level, noised, levels)
    assert rms(back, x) < 0.03
    assert float((noised / levels[0]).std()) == pytest.approx(1, abs=0.1)


def test_masks_of_recipe_best_are_best_in_two_passes_and_worst_by_langevin_dynamics():
    """DICE of the same X-rays: DDIM in 2 passes, DDIM and the ODE in 25, Langevin in 101."""
    model, cfg = network("lung-concat")
    images, lungs, _ = chests(NEW, range(3), "Normal")
    found = {}
    for sampler, passes in (("ddim", 2), ("ddim", 25), ("ode", 25), ("langevin", 101)):
        how = dataclasses.replace(cfg, sampler=sampler, ddim_steps=passes)
        drawn = evaluate.segment(model, how, images, np.arange(3), CPU)
        found[sampler, passes] = dice(drawn, lungs)
    assert found["ddim", 2] > found["ddim", 25] > found["ode", 25] > found["langevin", 101]
