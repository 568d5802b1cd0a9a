"""What notebook 4 says of weights/lung-*.pt, on phantoms of its own."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

import data
import evaluate
import metrics
from testing import CPU, chests, dice, network


@pytest.fixture(scope="module")
def networks():
    """{"add": (model, cfg), "concat": (model, cfg)}"""
    return {cond: network(f"lung-{cond}") for cond in ("add", "concat")}


@pytest.fixture(scope="module")
def unseen():
    """48 phantoms of a seed that no run has: X-rays (48, 1, 64, 64) uint8, lungs as bool."""
    return chests(9, range(48))[:2]


def sampled(trained, unseen, n, members, passes):
    """Masks of the first n phantoms, (n, members, 1, 64, 64)."""
    model, cfg = trained[0], dataclasses.replace(trained[1], ddim_steps=passes)
    y = data.to_float(unseen[0][:n])
    return evaluate.sample_masks(model, cfg, y, range(n), members, CPU)


def test_the_two_networks_differ_in_the_conditioning_alone(networks):
    """Like with like: every other setting is the same."""
    (_, a), (_, b) = networks.values()
    assert dataclasses.replace(a, cond=b.cond, eval_every=b.eval_every) == b
    assert (a.cond, b.cond) == ("add", "concat")


def test_both_find_the_lungs_and_are_level(networks, unseen):
    """One mask of two passes each: they differ by less than 0.003."""
    counts = []
    for trained in networks.values():
        masks = sampled(trained, unseen, 24, 1, 2)[:, 0]
        assert dice(masks, unseen[1][:24]) > 0.96
        counts.append([metrics.confusion(masks, unseen[1][:24])])
    gain, error = metrics.dice_difference(*counts, np.random.default_rng(0))
    assert abs(gain) < 0.003 and error < 0.002


def wrong_at_the_edge_and_elsewhere(masks, true):
    """Wrong pixels at most two from the true outline, and the others."""
    true = torch.from_numpy(true)
    grown = max_pool2d(true.float(), 5, 1, 2)
    edge = grown != -max_pool2d(-true.float(), 5, 1, 2)
    wrong = (masks > 0) != true
    return int((wrong & edge).sum()), int((wrong & ~edge).sum())


def test_two_passes_are_level_with_one(networks, unseen):
    """They cost no DICE."""
    true, one, two = (
        unseen[1][:12],
        *(sampled(networks["concat"], unseen, 12, 1, k) for k in (1, 2)),
    )
    counts = [[metrics.confusion(masks[:, 0], true)] for masks in (two, one)]
    gain, _ = metrics.dice_difference(*counts, np.random.default_rng(0))
    assert abs(gain) < 0.003


@pytest.mark.parametrize("cond", ["add", "concat"])
def test_ten_passes_score_lower_and_their_errors_are_specks(networks, unseen, cond):
    """Lower by ten standard errors; away from the outline one pass makes hardly an error."""
    true, one, ten = unseen[1][:12], *(sampled(networks[cond], unseen, 12, 1, k) for k in (1, 10))
    counts = [[metrics.confusion(masks[:, 0], true)] for masks in (one, ten)]
    gain, error = metrics.dice_difference(*counts, np.random.default_rng(0))
    assert gain > 10 * error
    (edge_1, far_1), (edge_10, far_10) = (
        wrong_at_the_edge_and_elsewhere(masks[:, 0], true) for masks in (one, ten)
    )
    assert far_1 < 0.1 * edge_1 and far_10 - far_1 > edge_10 - edge_1


def test_one_pass_is_a_mean_of_plausible_masks(networks, unseen):
    """It is nearer to the mean of seven masks of five passes than an eighth one is."""
    one = sampled(networks["concat"], unseen, 4, 1, 1)[:, 0]
    many = sampled(networks["concat"], unseen, 4, 8, 5)
    others = many[:, 1:].mean(1) > 0
    assert torch.sum((one > 0) != others) < 0.75 * torch.sum((many[:, 0] > 0) != others)
