r"""How far a share of the lungs may be off: intervals from masks, or from probabilities. [1], [21]

The infected share of the lungs grades the severity of a pneumonia. Masks that are drawn from one
X-ray each have a share, and these shares have a spread. The probabilities of a supervised network
give a spread only with a guess at how pixels go together. Both spreads can be too small, for what
a network has not learned. A conformal interval scales the spread by one number, learned on images
that were held out of training.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

import evaluate
import metrics


class Shares(NamedTuple):
    """What one network, or several together, say about the shares of n X-rays."""

    true: np.ndarray  # (n,)
    estimate: np.ndarray  # (n,)
    spreads: dict  # {how it was found: (n,)}, from 0 for certain
    samples: np.ndarray | None  # (n, N) shares of N masks; None: one supervised network
    quality: dict  # DICE of the mean mask, calibration error of its pixels


def shares_of(networks, split, lungs, masks, device, progress):
    """The Shares of all X-rays of a split by the networks [(model, cfg), ...] of one kind.

    Diffusion: all networks together draw `masks` masks, and the estimate is the mean of their
    shares. Supervised: it is the sum of the probabilities. The spread is the standard deviation of
    the masks, or of several networks; or what the probabilities, those of the mean mask in
    diffusion, give if pixels are independent, or all alike.
    lungs: (n, 1, H, W) bool, of which the shares are; None: of the picture
    """
    rows, K, found = np.arange(len(split.images)), len(networks), []
    for k, (model, cfg) in enumerate(networks):
        members = 1 if cfg.supervised else masks // K + (k < masks % K)
        cfg = dataclasses.replace(cfg, ensemble=members)
        found.append(evaluate.ensembles(model, cfg, split, rows, device, progress))
    means, areas, _ = zip(*found)
    p, true = (torch.stack(means).double().numpy() + 1) / 2, split.masks > 127  # (K, n, 1, H, W)
    p, each = p.mean(0).clip(0, 1), metrics.shares(p.swapaxes(0, 1), lungs)
    whole = metrics.pixels_of(lungs, true)
    variance = (p * (1 - p)).sum((1, 2, 3))
    spreads = {"pixels, independent": variance**0.5 / whole, "pixels, alike": variance / whole}
    if networks[0][1].supervised:
        spreads |= {f"{K} networks": each.std(1, ddof=1)} if K > 1 else {}
        estimate, samples = each.mean(1), each if K > 1 else None
    else:
        samples = np.concatenate(areas, 1) / whole[:, None]
        estimate, spreads = samples.mean(1), {f"{masks} masks": samples.std(1, ddof=1)} | spreads
    dice = metrics.scores(metrics.confusion(p > 0.5, true).pooled())["DICE index"]
    quality = {"DICE": dice, "calibration error": metrics.expected_calibration_error(p, true)}
    return Shares(metrics.shares(true[:, None], lungs)[:, 0], estimate, spreads, samples, quality)


def rows_of_intervals(held_out, new):
    """How good the intervals of `new` Shares are, a row for each spread: a list of dicts.

    raw        the central interval of the samples, as they come
    conformal  estimate ± factor spread, the factor learned on the held-out training images. Its law
               for the CRPS is estimate + spread (true - estimate) / spread of each held-out image
    """
    rows, true = [], new.true
    error = new.estimate - true
    facts = {"bias": float(error.mean()), "mean absolute error": float(abs(error).mean())}
    for name, spread in new.spreads.items():
        spread, before = np.maximum(spread, 1e-6), np.maximum(held_out.spreads[name], 1e-6)
        misses = held_out.true - held_out.estimate
        half = metrics.conformal_factor(abs(misses), before) * spread
        law = new.estimate[:, None] + spread[:, None] * (misses / before)
        row = {"spread": name} | new.quality | facts
        if new.samples is not None and name[0].isdigit():
            row["raw"] = interval_facts(*metrics.central_interval(new.samples), true)
            row["raw"]["CRPS"] = metrics.crps(new.samples, true)
        row["conformal"] = interval_facts(new.estimate - half, new.estimate + half, true)
        rows.append(row | {"conformal": row["conformal"] | {"CRPS": metrics.crps(law, true)}})
    return rows


def interval_facts(low, high, true):
    """Coverage, mean width and interval score."""
    width, score = float(np.mean(high - low)), metrics.interval_score(low, high, true)
    return {"coverage": metrics.coverage(low, high, true), "width": width, "interval score": score}
