r"""The eight numbers of Tables 1 and 2, from one confusion matrix (§4.3).

A pixel is positive where the mask is above the threshold: 0.5 for masks in [0, 1] (§4.3), which is
0 for the [-1, 1] masks that the diffusion model samples.

Counts of pixels add up over batches, devices and processes. Every number is a function of the four
sums, so that J = D / (2 - D) holds exactly. The report averaged its ratios over batches, which is
why its tables miss this by up to 0.001.

A ratio 0/0 is nan: no infected pixel, found or true, is neither a score of 0 nor of 1. MCC's 0/0 is
nan here too, where scikit-learn returns 0.
"""

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


# ---------------------------------------- synthesis: how far are two sets of X-rays?


def image_features(images):
    """128 plain numbers an image: mean and standard deviation of each cell of an 8x8 grid.

    The means show the layout, the standard deviations the texture.

    images  (N, 1, H, W) in [-1, 1], H and W multiples of 8. Returns (N, 128) float64.
    """
    x = as_array(images).astype(np.float64)
    N, _, H, W = x.shape
    cells = x.reshape(N, 8, H // 8, 8, W // 8).transpose(0, 1, 3, 2, 4).reshape(N, 64, -1)
    return np.concatenate([cells.mean(2), cells.std(2)], 1)


def frechet_distance(a, b):
    """Distance between the Gaussians fitted to two sets of features, (N, D) and (M, D).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    0 when mean and covariance agree. The formula is that of the Fréchet Inception Distance, on
    whatever features are given: numbers compare within one kind of features only.
    """
    C_a, C_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(C_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ C_b @ root_a)  # also those of C_a C_b
    root_trace = np.sqrt(eigenvalues.clip(0)).sum()
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(means + np.trace(C_a) + np.trace(C_b) - 2 * root_trace)
