"""What notebook 1 says of X-rays and masks in noise, on phantoms drawn here. It has no network."""

import numpy as np
import pytest
import torch

import data
import diffusion
import phantoms

S = diffusion.linear_schedule()


@pytest.fixture(scope="module")
def pictures():
    """32 phantoms as {"X-rays": x_0, "masks": x_0}, float64."""
    drawn = [phantoms.phantom(0, i, data.CLASSES[i % 3], size=64) for i in range(32)]
    xrays = np.stack([image for image, _, _ in drawn])[:, None]
    masks = np.stack([lung for _, lung, _ in drawn])[:, None] * np.uint8(255)
    return {"X-rays": data.to_float(xrays).double(), "masks": data.to_float(masks).double()}


def drowned_at(x):
    """The step at which the noise passes the power of 0, 1, 4, 8 and 32 cycles an image."""
    power = torch.fft.fft2(x - x.mean(0), norm="ortho").abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(64) * 64
    ring = torch.hypot(frequency[:, None], frequency).round()
    snr = S.abar[1:] / (1 - S.abar[1:])
    return [int((power[ring == k].mean() * snr > 1).sum()) + 1 for k in (0, 1, 4, 8, 32)]


def test_fine_detail_drowns_first_and_exposure_last(pictures):
    """In X-rays, at about the steps that the notebook names; masks outlive them but in exposure."""
    xrays, masks = drowned_at(pictures["X-rays"]), drowned_at(pictures["masks"])
    assert xrays == sorted(xrays, reverse=True)
    for step, named in zip(xrays, (704, 436, 256, 106, 8)):
        assert step == pytest.approx(named, abs=40)
    assert all(mask > xray + 20 for mask, xray in zip(masks[1:], xrays[1:]))
    assert masks[0] < xrays[0]


def named(x, t, draws=4):
    """How often x_t is nearest to its own x_0, of all."""
    g, right = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        eps = torch.randn(x.shape, generator=g, dtype=x.dtype)
        xt = diffusion.q_sample(S, x, t, eps)
        nearest = torch.cdist(xt.flatten(1), S.abar[t].sqrt() * x.flatten(1)).argmin(1)
        right.append(nearest == torch.arange(len(x)))
    return float(torch.cat(right).double().mean())


def test_all_pixels_name_the_patient_long_after_single_pixels_are_lost(pictures):
    """At t = 500 by X-ray, at t = 600 by mask; at t = 900 by neither."""
    xrays, masks = pictures["X-rays"], pictures["masks"]
    signal = S.abar[500] / (1 - S.abar[500]) * xrays.var()
    assert signal < 0.03 and named(xrays, 500) > 0.9
    assert named(masks, 600) > named(xrays, 600) + 0.15
    assert named(xrays, 900) < 0.15 and named(masks, 900) < 0.25
