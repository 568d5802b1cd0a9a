"""Pictures whose posterior is known: Bayes' rule, the rates, and the passes a sampler needs."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

import ambiguous
import data
import diffusion
import evaluate
import runs
from testing import ROOT


def pictures(n, seed=0):
    return [ambiguous.picture(seed, i) for i in range(n)]


def test_a_picture_has_every_mask_with_its_probability_and_shows_none_of_them():
    """Counted over 1500 pictures: squares at their rate; every edge of a band as often.

    The picture is complete before its mask is drawn, so it cannot tell which one it is.
    """
    drawn = {rate: [] for rate in ambiguous.RATES}
    places = []
    for p in pictures(1500):
        K = len(p.masks)
        assert p.prob.sum() == pytest.approx(1) and len({m.tobytes() for m in p.masks}) == K
        (which,) = np.flatnonzero((p.masks == p.mask).all((1, 2)))
        drawn[p.rate].append(which >= K // 2)
        places.append((which % (K // 2) + 0.5) / (K // 2))
        disc, square = p.masks[0, :, :16].sum(), p.masks[-1, :, :16].sum()
        assert abs(disc - square) < 0.25 * disc
    for rate, squares in drawn.items():
        assert 0.001 < binom.cdf(sum(squares), len(squares), rate) < 0.999
    assert np.mean(places) == pytest.approx(0.5, abs=0.03)
    assert np.std(places) == pytest.approx(np.sqrt(1 / 12), abs=0.02)
    again, same = ambiguous.picture(0, 3), pictures(4)[3]
    assert np.array_equal(again.image, same.image) and np.array_equal(again.mask, same.mask)


def test_the_perfect_network_is_bayes_rule():
    """E[x_0 | x_t] from the densities N(x_t; a x_k, std^2) of every mask, one by one."""
    p, g = ambiguous.picture(0, 5), torch.Generator().manual_seed(0)
    x = 2.0 * torch.from_numpy(p.masks).double() - 1
    for a, std in ((0.3, 2.0), (0.05, 1.0)):
        xt = a * x[[4, 9]] + std * torch.randn(2, 32, 32, generator=g, dtype=torch.float64)
        densities = norm.logpdf(xt[:, None], a * x[None], std).sum((2, 3)) + np.log(p.prob)
        weights = np.exp(densities - densities.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        want = np.einsum("bk,kij->bij", weights, x.numpy())
        got = ambiguous.posterior_mean(p, xt[:, None], a, std)[:, 0]
        np.testing.assert_allclose(got, want, atol=1e-9)
        assert weights.max() < 0.999  # a question with more than one answer


def test_masks_drawn_from_the_posterior_are_judged_right():
    """400 masks of each of 40 pictures; the same mask every time has no spread."""
    rng, several = np.random.default_rng(0), pictures(40)
    masks = [p.masks[rng.choice(len(p.masks), 400, p=p.prob)] for p in several]
    report = ambiguous.judged(several, masks)
    for rate, share in report["squares"].items():
        assert share == pytest.approx(rate, abs=0.02)
    assert report["spread"] == pytest.approx(1, abs=0.03) and abs(report["bias"]) < 0.1
    fixed = [np.repeat(p.mask[None], 400, 0) for p in several]
    report = ambiguous.judged(several, fixed)
    assert report["spread"] == 0
    lower = [np.repeat(p.masks[-1][None], 400, 0) for p in several]
    halves = np.mean([len(p.masks) / 2 - 1 for p in several]) / 2
    assert ambiguous.judged(several, lower)["bias"] == pytest.approx(halves)
    assert ambiguous.judged(several, lower)["squares"] == {rate: 1.0 for rate in ambiguous.RATES}


@pytest.mark.parametrize("steps, off, spread", [(2, 0.2, 0.62), (5, 0.05, 0.92), (20, 0.03, 0.98)])
def test_ddim_with_the_perfect_network_needs_few_passes(steps, off, spread):
    """Schedule shifted by 0.3: two passes make the rarer shape rarer, five are nearly right."""
    s, several, masks = diffusion.schedule(1000, 0.3), pictures(40, seed=1), []
    for i, p in enumerate(several):

        def eps_model(xt, t, y, p=p):
            a, std = s.abar[t[0]].sqrt().item(), (1 - s.abar[t[0]]).sqrt().item()
            return (xt - a * ambiguous.posterior_mean(p, xt, a, std)) / std

        noise = diffusion.ImageNoise(0, [i], (1, 32, 32), 40)
        masks.append(diffusion.ddim_sample(s, eps_model, noise, steps=steps)[:, 0].numpy() > 0)
    report = ambiguous.judged(several, masks)
    errors = [abs(share - rate) for rate, share in report["squares"].items()]
    assert report["spread"] == pytest.approx(spread, abs=0.04)
    assert max(errors) == pytest.approx(off, abs=0.04)


def test_a_trained_network_has_found_the_rates_and_the_spread():
    """weights/ambiguous.pt on 60 other pictures, 8 masks each in ten passes.

    With 25 masks each it has 0.19, 0.43 and 0.71 for 0.2, 0.5 and 0.8, and 0.89 of the spread.
    """
    model, cfg, step = runs.load_run(ROOT / "weights" / "ambiguous.pt")
    assert step == 600 and cfg.seed == 0
    several, masks = pictures(60), []
    cfg, own = dataclasses.replace(cfg, ddim_steps=10), ambiguous.split(several)
    for rows in np.arange(60).reshape(-1, 6):
        y = data.to_float(own.images[rows])
        masks += [(x > 0).numpy()[:, 0] for x in evaluate.sample_masks(model, cfg, y, rows, 8)]
    report = ambiguous.judged(several, masks)
    for rate, share in report["squares"].items():
        assert share == pytest.approx(rate, abs=0.14)
    assert report["spread"] == pytest.approx(0.89, abs=0.1) and abs(report["bias"]) < 0.8
