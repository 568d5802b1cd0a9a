"""What notebook 8 says of weights/ambiguous.pt and weights/infection-*.pt, on new pictures."""

import dataclasses

import numpy as np
import pytest

import ambiguous
import data
import evaluate
import intervals
import metrics
from diffusion import ImageNoise, ddim_sample, schedule
from testing import CPU, chests, network


def unseen(n):
    """n phantoms of a seed that no run has: a data.Split, and their lungs (n, 1, 64, 64) bool."""
    images, lungs, infected = chests(9, range(n), "COVID-19")
    return data.Split(images, np.uint8(255) * infected, [str(i) for i in range(n)]), lungs


def said(name, n, masks=1):
    """The intervals.Shares of n unseen phantoms; a mask has five passes, as in the notebook."""
    model, cfg = network(name)
    cfg = dataclasses.replace(cfg, ddim_steps=5)
    return intervals.shares_of([(model, cfg)], *unseen(n), masks, CPU, None)


@pytest.fixture(scope="module")
def diffusion():
    """Ten masks of each of 16 phantoms."""
    return said("infection-concat", 16, 10)


@pytest.fixture(scope="module")
def supervised():
    return said("infection-report-unet-concat", 60)


def test_masks_know_how_far_the_area_may_be_off_and_independent_pixels_do_not():
    """The network's masks say more than 0.6 of the exact spread, independent pixels below 0.3."""
    model, cfg = network("ambiguous")
    cfg = dataclasses.replace(cfg, ddim_steps=10)
    pictures = [ambiguous.picture(5, i) for i in range(10)]
    y = data.to_float(ambiguous.split(pictures).images)
    drawn = evaluate.sample_masks(model, cfg, y, range(10), 10, CPU)
    ours, alone, exact = (drawn > 0).sum((2, 3, 4)).numpy().var(1, ddof=1), [], []
    for p in pictures:
        area, pixels = p.masks.sum((1, 2)), np.tensordot(p.prob, p.masks, 1)
        exact.append(p.prob @ (area - p.prob @ area) ** 2)
        alone.append((pixels * (1 - pixels)).sum())
    assert 0.6 < (ours.mean() / np.mean(exact)) ** 0.5 < 1.2
    assert (np.mean(alone) / np.mean(exact)) ** 0.5 < 0.3


def test_the_perfect_network_draws_possible_masks_alone_and_the_trained_one_few():
    """Possible: equal, pixel by pixel, to one of the K masks of the picture."""
    model, cfg = network("ambiguous")
    cfg, s = dataclasses.replace(cfg, ddim_steps=10), schedule(cfg.T, cfg.pixel_shift)
    p = ambiguous.picture(5, 0)

    def perfect(xt, t, y):
        a, std = s.abar[t[0]].sqrt(), (1 - s.abar[t[0]]).sqrt()
        return (xt - a * ambiguous.posterior_mean(p, xt, a, std)) / std

    def possible(masks):
        drawn = masks.numpy().reshape(-1, 1, 32, 32) > 0
        return (drawn == p.masks).all((2, 3)).any(1).mean()

    best = ddim_sample(s, perfect, ImageNoise(0, [0], (1, 32, 32), 8), steps=10)
    y = data.to_float(ambiguous.split([p]).images)
    ours = evaluate.sample_masks(model, cfg, y, range(1), 8, CPU).flatten(0, 1)
    assert possible(best) == 1 and possible(ours) < 0.5


def test_raw_intervals_of_infections_hold_far_fewer_truths_than_samples_can(diffusion):
    """The masks differ from one another by less than half of what they differ from the truth."""
    low, high = metrics.central_interval(diffusion.samples)
    assert metrics.level_of(10) == pytest.approx(9 / 11)
    assert metrics.coverage(low, high, diffusion.true) < 0.6
    spread = diffusion.samples.var(1, ddof=1).mean() * (1 + 1 / 10)
    assert spread**0.5 < 0.5 * np.square(diffusion.true - diffusion.estimate).mean() ** 0.5


def test_both_networks_know_the_share_far_better_than_its_mean_does(diffusion, supervised):
    """Mean absolute error; the two differ by less than two standard errors."""
    true = diffusion.true
    errors = [abs(one.estimate[:16] - true) for one in (diffusion, supervised)]
    nothing = abs(true - supervised.true[16:].mean()).mean()
    assert max(error.mean() for error in errors) < 0.6 * nothing
    difference = errors[0] - errors[1]
    assert abs(difference.mean()) < 2 * difference.std(ddof=1) / 4


def test_a_conformal_interval_covers_without_a_network_and_is_narrow_with_one(supervised):
    """Halves of 30 phantoms, both ways: coverage within chance, width less than half."""
    true, n = supervised.true, len(supervised.true)
    spread = supervised.spreads["pixels, alike"]
    answers = (np.full(n, true.mean()), np.ones(n)), (supervised.estimate, spread)
    hit, widths = [], []
    for estimate, spread in answers:
        covered, width = [], []
        for taught, new in ((slice(30), slice(30, 60)), (slice(30, 60), slice(30))):
            half = metrics.conformal_factor(abs(estimate - true)[taught], spread[taught])
            half = half * spread[new]
            covered += list(abs(estimate - true)[new] <= half)
            width.append(2 * half.mean())
        hit.append(np.mean(covered))
        widths.append(np.mean(width))
    assert min(hit) > 0.75
    assert widths[1] < 0.5 * widths[0]
