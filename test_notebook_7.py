"""What notebook 7 says of trained networks, on phantoms that no network has seen."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import diffusion
import evaluate
import metrics
import probes
import studies
from testing import CPU, Chests, chests, dice, network

NEW = 99  # the seed of these phantoms


def ill(rows, healthy=False):
    """These phantoms with COVID-19, or before it: Chests, with the masks as tensors."""
    images, *masks = chests(NEW, rows, "COVID-19", healthy)
    return Chests(images, *map(torch.from_numpy, masks))


def masks_of(name, images, passes, members):
    """(N, members, 1, 64, 64) in [-1, 1]."""
    model, cfg = network(name)
    how = dataclasses.replace(cfg, ddim_steps=passes, ensemble=members)
    shape, rows = (members, *images.shape[1:]), np.arange(len(images))
    return evaluate.sampled(lambda _, masks: masks, shape, model, how, images, rows, CPU)


@pytest.fixture(scope="module")
def sick():
    """64 phantoms with COVID-19."""
    return ill(range(64))


@pytest.fixture(scope="module")
def two_passes(sick):
    """Three masks of each infection in two passes."""
    return masks_of("infection-concat", sick.images, 2, 3)


@pytest.fixture(scope="module")
def five_passes(sick):
    """Three masks of the first 24 in five passes."""
    return masks_of("infection-concat", sick.images[:24], 5, 3)


def test_the_signed_map_ranks_infections_better_than_gray_and_the_loss_worse(sick):
    """AUROC inside the lungs. X-ray minus healthy twin is better than all of them."""
    model, cfg = network("synthesis-Normal")
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    x, rows, lungs = data.to_float(sick.images[:24]), range(24), sick.lungs[:24]
    noise = diffusion.ImageNoise(0, rows, x.shape[1:])
    eps_model = evaluate.eps_model_of(model, cfg, s, CPU)
    loss, signed = probes.anomaly_map(s, eps_model, x, range(400, 601, 25), noise)
    difference = x - data.to_float(ill(rows, healthy=True).images)

    def auroc(found):
        return metrics.auroc(found[lungs].numpy(), sick.infected[:24][lungs].numpy())

    loss, signed, twin = (auroc(studies.smooth(found)) for found in (loss, signed, difference))
    assert loss + 0.05 < auroc(x) < signed - 0.05 < twin - 0.1


def test_the_middle_of_the_decoder_knows_infections_better_than_its_end_and_than_at_much_noise():
    """DICE of classifiers that learned from eight phantoms, on 12 others."""
    model, cfg = network("synthesis")
    known, other = ill(range(100, 108)), ill(range(12))
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    eps = diffusion.ImageNoise(0, [0], (1, 64, 64))()

    def asked(block, t):
        learned, new = (
            probes.features(s, model.unet, data.to_float(some.images), [t], [block], eps)
            for some in (known, other)
        )
        classifiers = probes.fit(probes.pixels(learned), known.infected.flatten(), 1, 120, 256)
        return dice(probes.classify(classifiers, new) - 0.5, other.infected)

    middle = asked(3, 50)
    assert middle > asked(7, 50) + 0.05 and middle > asked(3, 800) + 0.05


def test_the_mean_of_two_passes_is_calibrated_unless_the_truth_chooses_the_pixels(sick, two_passes):
    """p is right over all pixels; too low inside the true lungs, less in those that are found."""
    p = probes.agreement(two_passes)[0].clamp(0, 1)
    found = masks_of("lung-concat", sick.images, 2, 1)[:, 0] > 0
    assert metrics.expected_calibration_error(p, sick.infected) < 0.02
    true, seen = ((sick.infected.float() - p)[where].mean() for where in (sick.lungs, found))
    assert 0.02 < true and seen < true - 0.008


def test_the_error_of_the_mean_sits_at_the_border_of_the_true_lung(sick, two_passes):
    """p is too low inside and too high outside, and about right deep inside."""
    p = probes.agreement(two_passes)[0].clamp(0, 1)
    inside, outside = (
        F.max_pool2d((~mask).float(), 5, 1, 2) == 0 for mask in (sick.lungs, ~sick.lungs)
    )
    bands = (sick.lungs & ~inside, ~sick.lungs & ~outside, inside)
    at_border, beyond, deep = ((sick.infected.float() - p)[band].mean() for band in bands)
    assert at_border > 0.04 and beyond < -0.03 and abs(deep) < 0.035 < at_border - deep


def test_masks_as_votes_are_too_sure_and_five_passes_leave_a_gray_background(
    sick, two_passes, five_passes
):
    """The calibration error of the votes is twice that of the mean; the background is not 0."""
    p, votes = probes.agreement(two_passes)[0].clamp(0, 1), (two_passes > 0).float().mean(1)
    errors = [metrics.expected_calibration_error(q, sick.infected) for q in (p, votes)]
    assert errors[1] > 2 * errors[0]
    most, few = (sick.infected[(votes - k / 3).abs() < 0.1].float().mean() for k in (2, 1))
    assert most < 0.63 and few > 0.4
    healthy = ~sick.lungs[:24]
    background = [
        probes.agreement(masks)[0][healthy].mean() for masks in (two_passes[:24], five_passes)
    ]
    assert background[1] > 2 * background[0]


def test_several_masks_gain_with_five_passes_and_hardly_with_two(sick, two_passes, five_passes):
    """DICE of the mean of three less that of one. Where the mean is wrong the masks differ more."""
    true = sick.infected[:24]
    two, five = (
        dice(masks.mean(1), true) - dice(masks[:, 0], true)
        for masks in (two_passes[:24], five_passes)
    )
    assert two < 0.004 and five > two + 0.005
    mean, variance, _ = probes.agreement(five_passes)
    wrong, lungs = (mean > 0.5) != true, sick.lungs[:24]
    assert variance[wrong & lungs].mean() > 1.5 * variance[~wrong & lungs].mean()


def test_one_and_two_passes_are_level_with_the_supervised_network_and_more_score_lower():
    """Lungs. A mask drawn from the supervised p expects what it scores: that p is right."""
    well = ill(range(12))
    scores = [
        dice(masks_of("lung-concat", well.images, n, 1)[:, 0], well.lungs) for n in (1, 2, 5, 10)
    ]
    p = (masks_of("lung-report-unet-concat", well.images, 1, 1)[:, 0] + 1) / 2
    cut = probes.expected_dice(p > 0.5, well.lungs)
    assert scores[:2] == pytest.approx([cut, cut], abs=0.004)
    assert scores[1] > scores[2] + 0.003 and scores[2] > scores[3] + 0.003
    expected, found = (probes.expected_dice(p, truth) for truth in (p, well.lungs))
    assert found == pytest.approx(expected, abs=0.005)
