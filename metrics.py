r"""The eight numbers of Tables 1 and 2, from one confusion matrix (§4.3).

A pixel is positive where the mask is above the threshold: 0.5 for masks in [0, 1] (§4.3), which is
0 for the [-1, 1] masks that the diffusion model samples.

Counts of pixels add up over batches, devices and processes. Every number is a function of the four
sums, so that J = D / (2 - D) holds exactly. The report seems to have averaged its ratios, which is
why its tables miss this by up to 0.001.

A ratio 0/0 is nan: no infected pixel, found or true, is neither a score of 0 nor of 1. MCC's 0/0 is
nan here too, where scikit-learn returns 0.
"""

import math
from typing import NamedTuple

import numpy as np

NAMES = (
    "DICE index",
    "Jaccard index",
    "Accuracy",
    "Sensitivity",
    "Specificity",
    "Balanced Accuracy",
    "Precision",
    "MCC",
)


class Counts(NamedTuple):
    """Numbers of pixels: ints, or (B,) int64 arrays, one entry an image.

    c + d adds entry by entry; c.pooled() sums the images.
    """

    TP: int
    FP: int
    FN: int
    TN: int

    def __add__(self, other):
        return Counts(*(a + b for a, b in zip(self, other)))

    def pooled(self):
        return Counts(*(int(np.sum(n)) for n in self))


def confusion(predicted, true, threshold=0.0):
    """Counts of each image: four (B,) int64 arrays.

    predicted, true  (B, ...) tensors or arrays of one shape, numbers or bool;
                     a number is positive above `threshold`
    """
    predicted, true = as_bool(predicted, threshold), as_bool(true, threshold)
    if predicted.shape != true.shape:
        shapes = f"{predicted.shape} and {true.shape}"
        raise ValueError(f"a mask and its truth must have one shape, got {shapes}")
    return Counts(
        TP=count(predicted & true),
        FP=count(predicted & ~true),
        FN=count(~predicted & true),
        TN=count(~predicted & ~true),
    )


def as_bool(mask, threshold):
    """The positive pixels: a bool mask itself, and of numbers those above the threshold."""
    mask = as_array(mask)
    return mask if mask.dtype == bool else mask > threshold


def as_array(x):
    """A tensor of any device, or an array, as a numpy array."""
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def count(hit):
    """True pixels of each image: (B, ...) bool -> (B,) int64."""
    return hit.reshape(len(hit), -1).sum(1, dtype=np.int64)


def scores(counts):
    """The eight numbers of Tables 1 and 2 as a dict of float64, in the tables' order.

    DICE = 2 TP / (2 TP + FP + FN)   Jaccard = TP / (TP + FP + FN)   Accuracy = (TP + TN) / all
    Sensitivity = TP / (TP + FN)     Specificity = TN / (TN + FP)    Balanced Accuracy = their mean
    Precision = TP / (TP + FP)
    MCC = (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))

    The values are arrays (B,) where the counts are.
    """
    TP, FP, FN, TN = (np.asarray(n, dtype=np.float64) for n in counts)
    sensitivity, specificity = ratio(TP, TP + FN), ratio(TN, TN + FP)
    values = (
        ratio(2 * TP, 2 * TP + FP + FN),
        ratio(TP, TP + FP + FN),
        ratio(TP + TN, TP + FP + FN + TN),
        sensitivity,
        specificity,
        (sensitivity + specificity) / 2,
        ratio(TP, TP + FP),
        ratio(TP * TN - FP * FN, np.sqrt((TP + FP) * (TP + FN)) * np.sqrt((TN + FP) * (TN + FN))),
    )
    return {name: value if value.ndim else float(value) for name, value in zip(NAMES, values)}


def ratio(a, b):
    """a / b, and nan where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) != 0)


def per_image(counts):
    """Mean and spread over the images that have a value: dict name -> (mean, spread, their number).

    The spread is the sample standard deviation (n - 1); nan for fewer than two images with a value.
    """
    summary = {}
    for name, values in scores(counts).items():
        defined = values[~np.isnan(values)]
        mean = float(defined.mean()) if len(defined) else float("nan")
        spread = float(defined.std(ddof=1)) if len(defined) > 1 else float("nan")
        summary[name] = (mean, spread, len(defined))
    return summary


def auroc(score, true):
    """Area under the ROC curve: the chance that a positive pixel scores higher than a negative one.

    A tie counts half.

    score, true  arrays or tensors of one size, numbers and bool

    Returns nan where there is no positive pixel, or no negative one.
    """
    score, true = as_array(score).ravel(), as_array(true).ravel()
    if score.shape != true.shape or true.dtype != bool:
        rule = "a score and its truth must have one size, and the truth be bool"
        raise ValueError(f"{rule}, got {score.shape}, {true.shape}, {true.dtype}")
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]  # 1 for the smallest; ties share a mean rank
    P, N = int(true.sum()), int((~true).sum())
    return float(ratio(rank[true].sum() - P * (P + 1) / 2, float(P * N)))


# ---------------------------------------- masks as a distribution: a share and its interval

LEVEL = 0.9  # of intervals


def shares(masks, whole=None):
    """Positive pixels of each mask as a share of `whole`: (B, N) float64. nan: a whole of nothing.

    masks  (B, N, ...), N masks an image: bool, or probabilities in 0..1
    whole  (B, ...) bool, such as the lungs for their infected share; None: all pixels
    """
    masks = as_array(masks)
    part = masks.reshape(*masks.shape[:2], -1).sum(-1, dtype=np.float64)
    return part / pixels_of(whole, masks[:, 0])[:, None]


def pixels_of(whole, images):
    """Pixels of each whole, (B,) float64, nan where it has none. None: of each image, (B, ...)."""
    n = np.full(len(images), images[0].size) if whole is None else count(as_array(whole))
    return np.where(n > 0, n, np.nan)


def central_interval(samples, level=LEVEL):
    """Where the middle `level` of N samples lies: (low, high), each (B,).

    Quantile q is sample number q (N + 1) in ascending order, interpolated. One more draw from the
    law of the samples then falls inside with probability `level`. That takes N >= (1 + level) /
    (1 - level), 19 for 0.9. Fewer give smallest and largest, with probability (N - 1) / (N + 1).

    samples  (B, N)
    """
    ends = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(samples, ends, axis=1, method="weibull")
    return low, high


def level_of(N):
    """How often the interval of N samples holds one more draw: LEVEL, or less for few samples."""
    return min(LEVEL, (N - 1) / (N + 1))


def coverage(low, high, true):
    """In which part of the images the truth is in its interval. All (B,)."""
    return float(np.mean((low <= true) & (true <= high)))


def interval_score(low, high, true, level=LEVEL):
    """The interval score of Gneiting and Raftery (2007), Eq. (43); less is better. All (B,).

        width + 2 / (1 - level) (distance of the truth from the interval),   mean over the images

    It is smallest for the quantiles of the truth's law: neither width nor misses are free.
    """
    miss = np.maximum(low - true, 0) + np.maximum(true - high, 0)
    return float(np.mean(high - low + 2 / (1 - level) * miss))


def crps(samples, true):
    """Continuous ranked probability score, Gneiting and Raftery (2007), Eq. (21); less is better.

        E |X - true| - E |X - X'| / 2,   mean over the images

    X, X' are two different samples of an image, so that the expectation does not depend on N. With
    N = 1 the score is the mean absolute error.

    samples  (B, N)
    true     (B,)
    """
    N = samples.shape[1]
    ordered, place = np.sort(samples, 1), np.arange(N)
    pairs = (ordered * (2 * place - N + 1)).sum(1) / max(N * (N - 1) / 2, 1)  # mean |X - X'|
    return float(np.mean(np.abs(samples - true[:, None]).mean(1) - pairs / 2))


def conformal_factor(error, spread, level=LEVEL):
    """The factor by which a spread becomes an interval that holds `level` of new truths.

    Split conformal prediction: the number ceil(level (n + 1)) in ascending order of error / spread
    on n images that the network has not seen. The truth of another such image is in
    estimate ± factor spread with probability >= level, whatever the network; inf for n too small.

    error, spread  (n,), not negative; a spread of 0 counts as the smallest positive number
    """
    ratios = np.sort(error / np.maximum(spread, np.finfo(np.float64).tiny))
    place = math.ceil(level * (len(ratios) + 1))
    return float(ratios[place - 1]) if place <= len(ratios) else math.inf


def share_report(p, areas, true, whole=None):
    """What N masks of each image say about the share of its positive pixels: a dict of numbers.

    A raw coverage below its level: the masks differ less from one another than from the truth.

    p      (B, 1, H, W) in 0..1: each pixel's probability, the mean of the masks
    areas  (B, N) positive pixels of each mask
    true   (B, 1, H, W) bool
    whole  (B, 1, H, W) bool, see shares
    """
    x, y = areas / pixels_of(whole, true)[:, None], shares(true[:, None], whole)[:, 0]
    low, high = central_interval(x)
    estimates = {
        "mean of the masks": x.mean(1),
        "mask of the mean": shares(p[:, None] > 0.5, whole)[:, 0],
        "sum of the probabilities": shares(p[:, None], whole)[:, 0],
    }
    errors = {name: estimate - y for name, estimate in estimates.items()}
    return {
        "level": level_of(x.shape[1]),
        "coverage": coverage(low, high, y),
        "width": float(np.mean(high - low)),
        "interval score": interval_score(low, high, y),
        "CRPS": crps(x, y),
        "bias": {name: float(error.mean()) for name, error in errors.items()},
        "mean absolute error": {name: float(abs(error).mean()) for name, error in errors.items()},
        "calibration error": expected_calibration_error(p, true),
    }


def energy_distance(a, b):
    """Squared generalised energy distance of sets of masks, (B, N, ...) and (B, M, ...), as (B,).

        2 E d(A, B) - E d(A, A') - E d(B, B'),   d = 1 - Jaccard index, 0 for two empty masks

    A' is drawn independently of A, so it may be A. 0 where both sets have the same masks at the
    same rates. With M = 1, one truth an image, the last term is 0 (Kohl et al., arXiv 1806.05034).
    """

    def mean_distance(x, y):  # (B, N, P) and (B, M, P) of 0 and 1 -> (B,)
        both = x @ y.transpose(0, 2, 1)
        either = x.sum(2)[:, :, None] + y.sum(2)[:, None] - both
        return 1 - np.where(either > 0, both / np.maximum(either, 1), 1).mean((1, 2))

    x, y = (flat_bits(masks) for masks in (a, b))
    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def flat_bits(masks):
    """(B, N, ...) masks in [-1, 1] or bool -> (B, N, P) float32 of 0 and 1."""
    bits = as_bool(masks, 0.0)
    return bits.reshape(*bits.shape[:2], -1).astype(np.float32)


def calibration(p, true, bins=10):
    """Is a pixel of probability p positive p of the time? Three (bins,) arrays.

    They are mean p, share of positive pixels, number of pixels. The first two are nan where a bin
    is empty. Bins are of equal width, the last one holds 1.

    p     any shape, 0..1
    true  bool, like p
    """
    p, true = as_array(p).ravel().astype(np.float64), as_array(true).ravel()
    bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)
    n = np.bincount(bin_of, minlength=bins)
    sums = (np.bincount(bin_of, weights=x, minlength=bins) for x in (p, true))
    return *(ratio(total, n) for total in sums), n


def expected_calibration_error(p, true, bins=10):
    """Mean of |mean p - share of positive pixels| over the bins, each weighted by its pixels."""
    mean, share, n = calibration(p, true, bins)
    return float(np.nansum(np.abs(mean - share) * n) / n.sum())


def dice_difference(a, b, rng, draws=2000):
    """How much higher the pooled DICE of a is than that of b, and how far chance alone moves it.

    a, b  lists of Counts of the same B images, four (B,) arrays each: one for each seed, whose
          pooled DICEs are averaged
    rng   numpy Generator

    Returns the difference, and its standard error by paired bootstrap over the images: all are
    pooled over the same B images, drawn `draws` times with replacement.
    """
    B = len(a[0].TP)

    def dice(networks, times):  # of each image
        drawn = (Counts(*(times @ n for n in counts)) for counts in networks)
        return np.mean([scores(counts)["DICE index"] for counts in drawn], 0)

    def difference(times):
        return dice(a, times) - dice(b, times)

    drawn = difference(rng.multinomial(B, np.full(B, 1 / B), draws))
    return float(difference(np.ones(B, int))), float(np.std(drawn, ddof=1))


def outline_distance(a, b):
    """Mean distance, in pixels, between the outlines of two masks: from each to the nearest of the
    other, over the pixels of both. nan where a mask has no outline.

    a, b  (H, W) bool. An outline is the pixels inside that have one outside above, below or beside;
          the edge of the picture is none.
    """
    a, b = outline(a), outline(b)
    if not (len(a) and len(b)):
        return float("nan")
    return float(np.concatenate([to_nearest(a, b), to_nearest(b, a)]).mean())


def outline(mask):
    """(H, W) bool -> (n, 2) rows and columns of the pixels of its outline."""
    m = np.pad(mask, 1, mode="edge")
    within = m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
    return np.argwhere(mask & ~within)


def to_nearest(points, others):
    """(n, 2), (m, 2) -> (n,) distances to the nearest of the others; parts need little memory."""
    parts = np.array_split(points, 1 + len(points) * len(others) // 2**20)
    squares = [((part[:, None] - others) ** 2).sum(2).min(1) for part in parts]
    return np.concatenate(squares) ** 0.5
