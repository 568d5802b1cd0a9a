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


def measured(masks, files, threshold=None):
    """Masks beside the true ones, at the size of each file.

    masks      (n, 1, S, S) float in [-1, 1], on the CPU
    files      the n files of the true masks
    threshold  as data.read_mask has it

    Returns metrics.Counts of (n,), and (n,) metrics.outline_distance in pixels of the files.
    """
    counts, distances = [], []
    for mask, file in zip(masks[:, 0], files):
        true = data.read_mask(file, threshold)
        found = inside(mask, true.shape)
        counts.append(metrics.confusion(found[None], true[None]).pooled())
        distances.append(metrics.outline_distance(found, true))
    return metrics.Counts(*map(np.array, zip(*counts))), np.array(distances)


def scores(masks, files, threshold=None):
    """What `measured` finds, in two numbers: {"DICE index", "outline distance"}.

    DICE is pooled over all pixels of all files. The distance is the mean over the images that have
    one; nan if none has.
    """
    counts, distances = measured(masks, files, threshold)
    dice = metrics.scores(counts.pooled())["DICE index"]
    return {"DICE index": dice, "outline distance": mean_distance(distances)}


def mean_distance(distances):
    """The mean of the defined ones; nan where none is."""
    defined = distances[~np.isnan(distances)]
    return float(defined.mean()) if len(defined) else np.nan
