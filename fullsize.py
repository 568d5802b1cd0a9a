r"""Masks at the size of their files: what a network finds, enlarged, beside the true mask.

A mask that is perfect at 64x64 has a DICE of about 0.98 against the 256x256 file that it comes
from. So the scores at the network's own size say nothing about larger sizes, and those at the
files' size compare networks of every size.
"""

import numpy as np
from torch.nn import functional as F

import data
import metrics


def enlarge(x, size, pixels_of):
    """pixels_of(x enlarged), (H, W) uint8, of x (S, S). Bilinear; strips need little memory.

    Where a side shrinks, all pixels under an output pixel count.
    """
    pixels, wide = np.empty(size, np.uint8), widened(x, size[1])  # (H, W), (S, W)
    for columns in data.strips(size[::-1]):
        pixels[:, columns] = pixels_of(widened(wide[:, columns].T, size[0])).T
    return pixels


def widened(x, width):
    """(H, W) -> (H, width). The height never changes: torch 2.13 gets that of one column wrong."""
    return F.interpolate(x[None, None], (len(x), width), mode="bilinear", antialias=True)[0, 0]


def inside(x, size):
    """(H, W) bool: where x (S, S) in [-1, 1], enlarged, is above 0."""
    return enlarge(x, size, lambda strip: (strip > 0).numpy()).view(bool)


def scores(masks, files, threshold=None):
    """How good masks are at the size of their files: {"DICE index", "outline distance"}.

    masks      (n, 1, S, S) float in [-1, 1], on the CPU
    files      the n files of the true masks
    threshold  as data.read_mask has it

    DICE is pooled over all pixels of all files. The distance is metrics.outline_distance in pixels
    of the files, its mean over the images that have one.
    """
    counts, distances = [], []
    for mask, file in zip(masks[:, 0], files):
        true = data.read_mask(file, threshold)
        found = inside(mask, true.shape)
        counts.append(metrics.confusion(found[None], true[None]).pooled())
        distances.append(metrics.outline_distance(found, true))
    dice = metrics.scores(metrics.Counts(*map(sum, zip(*counts))))["DICE index"]
    defined = [d for d in distances if not np.isnan(d)]
    return {"DICE index": dice, "outline distance": float(np.mean(defined)) if defined else np.nan}
