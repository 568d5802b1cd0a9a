r"""Pictures whose mask is uncertain, and whose posterior is known exactly (§4: p(mask | X-ray)).

What samples of masks must get right, where it can be checked: the rates of two shapes, and how far
an edge may lie. Two parts of a picture are independent of each other.

    left    A blurred blob. Its mask is a disc, or a square of the same area. The blob's gray level
            says how probable the square is: 0.2, 0.5 or 0.8. Its outline says nothing.
    right   A bright bar that ends somewhere behind a gray band. Each row of the band, and the row
            below it, is equally probable to be the first one that the bar does not reach.

So a picture has 2 (h + 1) possible masks, h being the height of the band, and
E[x_0 | x_t, picture] is a sum over them (posterior_mean): the perfect network. Whatever a sampler
gets wrong with it is the sampler's fault; what it gets wrong beyond that is the network's.
"""

from typing import NamedTuple

import numpy as np
import torch

import data
from diffusion import Purpose, philox

SIDE, HALF = 32, 16  # pixels: a picture, and where its right part begins
RATES = 0.2, 0.5, 0.8  # probability of the square, by the gray level of the blob
GRAYS = 0.5, 0.7, 0.9  # of the blob


class Picture(NamedTuple):
    """A picture, one mask that was drawn for it, and all masks that could have been.

    image  (S, S) uint8
    mask   (S, S) bool
    masks  (K, S, S) bool, the possible ones: shape by shape, and within a shape edge by edge
    prob   (K,) float64, their probabilities
    rate   of the square: one of RATES
    bar    slice of the bar's columns
    """

    image: np.ndarray
    mask: np.ndarray
    masks: np.ndarray
    prob: np.ndarray
    rate: float
    bar: slice


def picture(seed, index):
    """Picture number `index`, a function of (seed, index)."""
    rng = philox(seed, Purpose.AMBIGUOUS, index)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    across, down, radius = rng.uniform(7, 9), rng.uniform(8, 24), rng.uniform(4, 6)
    far = np.hypot(x - across, y - down)
    disc = far < radius
    square = np.maximum(abs(x - across), abs(y - down)) < radius * np.sqrt(np.pi) / 2
    level = rng.integers(len(RATES))
    rate = RATES[level]

    h = int(rng.integers(4, 17))
    top = int(rng.integers(6, 26 - h))
    bar = slice(int(rng.integers(18, 21)), int(rng.integers(27, 31)))
    image = 0.1 + (GRAYS[level] - 0.1) * np.exp(-((far / radius) ** 4))
    image[:top, bar], image[top : top + h, bar] = 0.8, 0.45
    image += 0.05 * rng.standard_normal(image.shape)

    masks = np.stack([shape for shape in (disc, square) for _ in range(h + 1)])
    for k, mask in enumerate(masks):
        mask[: top + k % (h + 1), bar] = True
    prob = np.repeat([1 - rate, rate], h + 1) / (h + 1)
    drawn = masks[rng.choice(len(masks), p=prob)]
    return Picture((255 * image.clip(0, 1)).astype(np.uint8), drawn, masks, prob, rate, bar)


def split(pictures):
    """Pictures as a data.Split, to train on or to segment."""
    images, masks = (np.stack([part[i] for part in pictures])[:, None] for i in (0, 1))
    return data.Split(images, np.uint8(255) * masks, [str(i) for i in range(len(pictures))])


def posterior_mean(pictured, xt, a, std):
    """E[x_0 | x_t, picture] for x_t = a x_0 + std eps, by Bayes' rule: like xt, (B, 1, S, S).

    Of |x_t - a x|^2 only -2 a x_t x differs from mask to mask: all have the same |x|^2.
    """
    x = 2 * torch.from_numpy(pictured.masks).flatten(1).to(xt) - 1  # (K, S S), +-1
    logits = a * xt.flatten(1) @ x.T / std**2 + torch.from_numpy(pictured.prob).to(xt).log()
    return (logits.softmax(1) @ x).view_as(xt)


def found(pictured, masks):
    """What masks of a picture say: (share that is nearer to the square, edge of the bar of each).

    masks  (N, S, S) bool. The edge, (N,), is a number of rows: the positive pixels within the
           columns of the bar / those columns
    """
    first = pictured.masks[:: len(pictured.masks) // 2, :, :HALF]  # disc, square
    off = [(masks[:, :, :HALF] != shape).sum((1, 2)) for shape in first]
    edges = masks[:, :, pictured.bar].sum((1, 2)) / (pictured.bar.stop - pictured.bar.start)
    return float(np.mean(off[1] < off[0])), edges


def judged(pictures, masks):
    """How right the masks of many pictures are, as a dict of numbers.

    masks  (B, N, S, S) bool, N of each picture

    squares  {rate: share of squares among the masks of the pictures with that rate}
    spread   standard deviation of the bar's edge over the masks of a picture / its exact one, as
             root mean squares over the pictures
    bias     mean distance of the edge from its exact mean, in rows
    """
    squares, spread, exact, bias = {rate: [] for rate in RATES}, [], [], []
    for pictured, own in zip(pictures, masks):
        share, edges = found(pictured, own)
        _, possible = found(pictured, pictured.masks)
        mean = pictured.prob @ possible
        squares[pictured.rate].append(share)
        spread.append(edges.var(ddof=1))
        exact.append(pictured.prob @ (possible - mean) ** 2)
        bias.append(edges.mean() - mean)
    return {
        "squares": {rate: float(np.mean(shares)) for rate, shares in squares.items() if shares},
        "spread": float(np.sqrt(np.sum(spread) / np.sum(exact))),
        "bias": float(np.mean(bias)),
    }
