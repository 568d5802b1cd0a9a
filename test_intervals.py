"""A share and its interval: Gaussian shares with known errors, masks with known shares."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

import data
import evaluate
import intervals
import metrics
from testing import CPU, tiny


def ignore(*_):
    """A progress that shows nothing."""


def gaussian_shares(n, spread_said, seed, N=25, bias=0.0):
    """Shares whose error has a standard deviation of its own for each image.

    The network says `spread_said` times that. Its samples are Gaussian.
    """
    rng = np.random.default_rng(seed)
    true, sd = rng.uniform(0.3, 0.7, n), rng.uniform(0.01, 0.05, n)
    middle = true + bias + sd * rng.standard_normal(n)
    samples = middle[:, None] + spread_said * sd[:, None] * rng.standard_normal((n, N))
    spreads = {"25 masks": spread_said * sd}
    return intervals.Shares(true, middle, spreads, samples, {"DICE": 0.9, "calibration error": 0.1})


@pytest.mark.parametrize("said", [1.0, 0.4])
def test_conformal_intervals_mend_a_spread_that_is_too_small(said):
    """Errors N(0, sd^2): width 2 z mean sd, CRPS sd / sqrt(pi); raw, Phi of what was said."""
    (row,) = intervals.rows_of_intervals(
        gaussian_shares(4000, said, 0), gaussian_shares(4000, said, 1)
    )
    z, sd = norm.ppf(0.95), 0.03
    assert row["raw"]["coverage"] == pytest.approx(2 * norm.cdf(z * said) - 1, abs=0.05)
    assert row["conformal"]["coverage"] == pytest.approx(0.9, abs=0.015)
    assert row["conformal"]["width"] == pytest.approx(2 * z * sd, rel=0.05)
    assert row["conformal"]["CRPS"] == pytest.approx(sd / np.sqrt(np.pi), rel=0.05)
    assert row["raw"]["CRPS"] > row["conformal"]["CRPS"] - 1e-4 and abs(row["bias"]) < 0.002
    assert row["mean absolute error"] == pytest.approx(sd * np.sqrt(2 / np.pi), rel=0.05)
    assert (row["spread"], row["DICE"], row["calibration error"]) == ("25 masks", 0.9, 0.1)
    (row,) = intervals.rows_of_intervals(
        *(gaussian_shares(4000, said, k, bias=0.05) for k in (0, 1))
    )
    assert row["bias"] == pytest.approx(0.05, abs=0.002)  # too large a share is above 0


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("model", ["diffusion", "unet"])
def test_the_shares_of_several_networks_are_those_of_one_ensemble(model, networks, monkeypatch):
    """Known masks and probabilities: samples, estimate and spread by hand; 5 masks for 2 networks.

    Shares are of the lungs, half the picture.
    """
    N, asked, rng = 3, [], np.random.default_rng(0)
    p = rng.random((networks, N, 1, 4, 4))
    true = np.uint8(255) * (rng.random((N, 1, 4, 4)) < 0.5)
    lungs = np.zeros((N, 1, 4, 4), bool)
    lungs[:, :, :2] = True
    areas = [rng.integers(0, 9, (N, 5)).astype(float) for _ in range(networks)]

    def ensembles(k, cfg, split, rows, device, progress):
        asked.append(cfg.ensemble)
        return torch.from_numpy(2 * p[k] - 1), areas[k][:, : cfg.ensemble], None

    monkeypatch.setattr(evaluate, "ensembles", ensembles)
    cfg = tiny(model=model, cond=None if model == "unet" else "concat")
    split = data.Split(true, true, ["a", "b", "c"])
    given = [(k, cfg) for k in range(networks)]
    found = intervals.shares_of(given, split, lungs, 5, CPU, ignore)
    np.testing.assert_allclose(found.true, (true > 127).reshape(N, -1).sum(1) / 8)
    mean = p.mean(0)
    dice = metrics.scores(metrics.confusion(mean > 0.5, true > 127).pooled())["DICE index"]
    assert found.quality["DICE"] == dice
    sums, variance = p.reshape(networks, N, -1).sum(2), (mean * (1 - mean)).reshape(N, -1)
    np.testing.assert_allclose(found.spreads["pixels, alike"], variance.sum(1) / 8)
    want = np.sqrt(variance.sum(1)) / 8
    np.testing.assert_allclose(found.spreads["pixels, independent"], want)
    if model == "diffusion":
        assert asked == ([5] if networks == 1 else [3, 2])
        samples = np.concatenate([a[:, :n] for a, n in zip(areas, asked)], 1) / 8
        np.testing.assert_allclose(found.samples, samples)
        np.testing.assert_allclose(found.estimate, samples.mean(1))
        np.testing.assert_allclose(found.spreads["5 masks"], samples.std(1, ddof=1))
    else:
        assert asked == [1] * networks
        np.testing.assert_allclose(found.estimate, sums.mean(0) / 8)
        assert (found.samples is None) == (networks == 1)
        if networks == 2:
            np.testing.assert_allclose(found.spreads["2 networks"], sums.std(0, ddof=1) / 8)
