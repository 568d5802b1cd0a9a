"""What notebook 3 says of the network of weights/synthesis.pt, on a few X-rays."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import image_metrics
import synthesis
from testing import CPU, chests, network


@pytest.fixture(scope="module")
def net():
    """(network, settings) of weights/synthesis.pt."""
    return network("synthesis")


@pytest.fixture(scope="module")
def known():
    """The first 40 images of the network's training."""
    return xrays(0)


@pytest.fixture(scope="module")
def new():
    """40 phantoms that nobody has seen."""
    return xrays(99)


@pytest.fixture(scope="module")
def samples(net):
    """32 X-rays by DDIM in ten passes."""
    return drawn(net, 32, ddim_steps=10)


def xrays(seed):
    """40 phantoms of this seed as the network sees them."""
    return data.to_float(chests(seed, range(1, 41), "COVID-19").images)


def drawn(net, n, **how):
    """n X-rays from noise. X-ray i always begins at the same x_T."""
    cfg = dataclasses.replace(net[1], **how)
    return synthesis.sample_images(net[0], cfg, range(n), CPU).cpu()


def rms(a, b):
    return float((a - b).square().mean().sqrt())


def test_ddim_comes_nearer_to_its_limit_with_every_doubling_of_the_passes(net):
    """From one x_T without noise: about half as far each time; fresh noise draws another X-ray."""
    finest = drawn(net, 3, ddim_steps=60)
    far = [rms(drawn(net, 3, ddim_steps=k), finest) for k in (5, 10, 20)]
    assert far[1] < 0.75 * far[0] and far[2] < 0.75 * far[1]
    another = rms(finest, finest.roll(1, 0))
    assert far[2] < 0.15 * another
    assert rms(drawn(net, 3, ddim_steps=30, eta=1.0), finest) > 0.6 * another


def test_samples_in_ten_passes_lie_among_real_phantoms_and_in_two_do_not(net, known, new, samples):
    """Fréchet distance of 32 X-rays from 32 new phantoms, against that of 100 sets of phantoms."""
    reference, others = image_metrics.image_features(new[:32]), image_metrics.image_features(known)
    rng = np.random.default_rng(0)
    chosen = [rng.choice(len(others), 32, replace=False) for _ in range(100)]
    chance = [image_metrics.frechet_distance(others[rows], reference) for rows in chosen]
    few, ten = (
        image_metrics.frechet_distance(image_metrics.image_features(x), reference)
        for x in (drawn(net, 32, ddim_steps=2), samples)
    )
    assert ten < max(chance) < few


def test_a_training_image_is_remembered_from_step_300_and_forgotten_from_step_800(net, known):
    """Noised to step t and brought back by DDIM: is its own start the nearest of 40?"""
    model, cfg = net
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    eps_model = evaluate.eps_model_of(model, cfg, s, CPU)

    def recognised(t):
        noise = torch.randn(known[:8].shape, generator=torch.Generator().manual_seed(0))
        start = diffusion.q_sample(s, known[:8], t, noise)
        back = diffusion.ddim_sample(s, eps_model, lambda: start, steps=8, start=t)
        nearest = torch.cdist(back.flatten(1), known.flatten(1)).argmin(1)
        return float((nearest == torch.arange(8)).float().mean())

    assert recognised(300) == 1 and recognised(800) <= 0.5


def test_samples_are_not_nearer_to_training_than_to_new_phantoms(known, new, samples):
    """A half, within three standard errors."""
    near = [torch.cdist(samples.flatten(1), x.flatten(1)).min(1).values for x in (known, new)]
    share = float((near[0] < near[1]).float().mean())
    assert abs(share - 0.5) < 3 * 0.5 / 32**0.5
