"""What notebook 9 says of weights/synthesis-class-lung-concat.pt, on masks that nobody has seen."""

import dataclasses

import numpy as np
import pytest
import torch

import conditions
import data
import evaluate
import synthesis
from testing import CPU, chests, dice, network

COVID, NORMAL = 1, 3  # labels: places in data.CLASSES, from 1 on


@pytest.fixture(scope="module")
def net():
    return network("synthesis-class-lung-concat")


@pytest.fixture(scope="module")
def lungs():
    """The lungs of 8 healthy phantoms of a seed that no run has, (8, 1, 64, 64) bool."""
    return chests(9, range(8), "Normal").lungs


def drawn(net, n, label=0, masks=None, w=0.0):
    """n X-rays by the flow ODE in 15 passes. X-ray i always begins at the same x_T."""
    model, cfg = net
    cfg = dataclasses.replace(cfg, sampler="ode", ddim_steps=15, guidance=w)
    given = conditions.unknown(cfg, n)
    given.label[:] = label
    if masks is not None:
        given.masks[:] = torch.from_numpy(masks) * 2.0 - 1
    return synthesis.sample_images(model, cfg, range(n), CPU, given=given)


def test_at_w_minus_1_the_class_plays_no_part(net):
    one, other, none = (drawn(net, 1, label, w=w) for label, w in ((1, -1), (3, -1), (0, 0)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    torch.testing.assert_close(one, none, rtol=0, atol=1e-3)


def test_with_guidance_the_lungs_of_normal_are_darker_than_those_of_covid(net, lungs):
    """Around the same masks, from the same noise; and more so than without guidance."""

    def gray(label, w):
        x = drawn(net, 4, label, lungs[:4], w).numpy()
        return np.array([image[mask].mean() for image, mask in zip(x, lungs)])

    gap = {w: gray(COVID, w) - gray(NORMAL, w) for w in (0.0, 3.0)}
    assert gap[3.0].min() > 0.05 and gap[3.0].mean() > gap[0.0].mean() > 0


def test_a_drawn_xray_keeps_to_its_mask_and_with_guidance_more_than_a_phantom(net, lungs):
    """DICE of the lungs that weights/lung-concat.pt finds with the mask that was given."""
    model, cfg = network("lung-concat")

    def kept(x):
        return dice(evaluate.segment(model, cfg, data.to_uint8(x), np.arange(8), CPU), lungs)

    plain, guided = (kept(drawn(net, 8, 0, lungs, w)) for w in (0.0, 2.0))
    assert 0.9 < plain < guided and guided > 0.97
