"""What notebook 4 says of weights/lung-*.pt, on phantoms of its own."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import evaluate
import metrics
import phantoms
import runs
from testing import CPU, ROOT


@pytest.fixture(scope="module")
def networks():
    """{"add": (model, cfg), "concat": (model, cfg)}"""
    found = {cond: ROOT / "weights" / f"lung-{cond}.pt" for cond in ("add", "concat")}
    return {cond: runs.load_run(file)[:2] for cond, file in found.items()}


@pytest.fixture(scope="module")
def unseen():
    """48 phantoms of a seed that no run has: X-rays (48, 1, 64, 64) uint8, lungs as bool."""
    drawn = [phantoms.phantom(9, i, data.CLASSES[i % 3]) for i in range(48)]
    images = np.stack([data.resize_image(image, 64) for image, _, _ in drawn])[:, None]
    lungs = np.stack([data.resize_mask(lung, 64) for _, lung, _ in drawn])
    return images, lungs[:, None]


def sampled(network, unseen, n, members, passes):
    """Masks of the first n phantoms, (n, members, 1, 64, 64)."""
    model, cfg = network[0], dataclasses.replace(network[1], ddim_steps=passes)
    y = data.to_float(unseen[0][:n])
    return evaluate.sample_masks(model, cfg, y, range(n), members, CPU)


def dice(masks, true):
    return metrics.scores(metrics.confusion(masks, true).pooled())["DICE index"]


def test_the_two_networks_differ_in_the_conditioning_alone(networks):
    """Like with like: every other setting is the same."""
    (_, a), (_, b) = networks.values()
    assert dataclasses.replace(a, cond=b.cond, eval_every=b.eval_every) == b
    assert (a.cond, b.cond) == ("add", "concat")


def test_both_find_the_lungs_and_concatenation_is_ahead(networks, unseen):
    """One mask of two passes each; the difference is more than its standard error."""
    counts = {}
    for cond, network in networks.items():
        masks = sampled(network, unseen, 48, 1, 2)[:, 0]
        assert dice(masks, unseen[1]) > 0.96
        counts[cond] = [metrics.confusion(masks, unseen[1])]
    rng = np.random.default_rng(0)
    gain, error = metrics.dice_difference(counts["concat"], counts["add"], rng)
    assert gain > error


@pytest.mark.parametrize("cond", ["add", "concat"])
def test_one_pass_scores_higher_than_ten(networks, unseen, cond):
    """By more than two standard errors."""
    true, few, many = unseen[1][:12], *(sampled(networks[cond], unseen, 12, 1, k) for k in (1, 10))
    counts = [[metrics.confusion(masks[:, 0], true)] for masks in (few, many)]
    gain, error = metrics.dice_difference(*counts, np.random.default_rng(0))
    assert gain > 2 * error


def test_one_pass_is_a_mean_of_plausible_masks(networks, unseen):
    """It differs on fewer pixels from the mean of 7 masks of ten passes than an eighth one does."""
    one = sampled(networks["concat"], unseen, 3, 1, 1)[:, 0]
    many = sampled(networks["concat"], unseen, 3, 8, 10)
    others = many[:, 1:].mean(1) > 0
    assert torch.sum((one > 0) != others) < 0.75 * torch.sum((many[:, 0] > 0) != others)


def test_masks_of_two_passes_differ_more_than_those_of_one(networks, unseen):
    """So that a mean of several of them says more than one."""
    few, more = ((sampled(networks["concat"], unseen, 4, 4, k) > 0).float() for k in (1, 2))
    assert more.var(1).mean() > 1.2 * few.var(1).mean()
