r"""What step k of a training sees: which images, moved how, with which t and eps.

All of it is a function of (seed, k) alone: the same on every device, with any number of processes,
and in a run that was resumed.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import conditions
import data
import score
from conditions import Given
from diffusion import Purpose, seed_of
from score import sent


class Batch(NamedTuple):
    """B images.

    x0   (B, 1, S, S) in [-1, 1]: what is noised, an X-ray (§3) or a mask (§4.1)
    y    (B, 1, S, S) in [-1, 1]: the X-ray that the mask belongs to; in synthesis
         conditions.Given, or None
    t    (B,) and eps (B, 1, S, S), see draws; None for a supervised network
    """

    x0: torch.Tensor
    y: torch.Tensor | Given | None
    t: torch.Tensor | None
    eps: torch.Tensor | None

    def rows(self, rows):
        """The images of a slice."""

        def of(x):
            if isinstance(x, Given):
                return conditions.part_of(x, rows, self.x0.device)
            return None if x is None else x[rows]

        return Batch(*map(of, self))

    def parts(self, n):
        """The batch in micro-batches of at most n images."""
        return [self.rows(slice(first, first + n)) for first in range(0, len(self.x0), n)]


def batch(cfg, step, images, masks):
    """The batch of a step (1, 2, ...).

    images, masks: the whole split, uint8 on the device. Where images are drawn, `masks` are the
    conditions of the split (conditions.of_split), or None.
    """
    rows = sent(batch_indices(cfg, len(images), step), images.device)
    x0, y = data.to_float(images[rows]), None
    if isinstance(masks, Given):
        taken = generator(cfg.seed, Purpose.CONDITIONS, step)
        y = conditions.some_of(conditions.rows_of(masks, rows, images.device), cfg.drop, taken)
    elif masks is not None:
        x0, y = data.to_float(masks[rows]), x0
    if cfg.augment:
        y, x0 = augment(y, x0, generator(cfg.seed, Purpose.AUGMENTATION, step), cfg.augment)
    if cfg.supervised:
        return Batch(x0, y, None, None)
    t, eps = draws(cfg, step, x0)
    t = sent(t, images.device) if cfg.objective == "eps" else t  # §2.1 reads its t on the CPU
    return Batch(x0, y, t, sent(eps, images.device))


def on_device(cfg, split, device):
    """A data.Split as `batch` takes it: (images, masks) on the device."""
    images = torch.from_numpy(split.images).to(device)
    if cfg.task == "synthesis":
        return images, conditions.of_split(cfg, split, device)
    return images, torch.from_numpy(split.masks).to(device)


def noise_split(cfg, n):
    """A data.Split of n pictures of noise, where a step is only timed."""
    M = len(conditions.masks_of(cfg.given)) if cfg.task == "synthesis" else 1
    shape = (1 + M, n, 1, cfg.image_size, cfg.image_size)
    images, *masks = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    masks = np.concatenate(masks, 1) > 127 if M else None
    names = n * [f"{data.CLASSES[0]}/noise"]
    return data.Split(images, np.uint8(255) * masks if M else None, names)


# ---------------------------------------- which images


@functools.lru_cache(maxsize=2)
def order_of(seed, epoch, N):
    """The order of N images in one pass over them."""
    return np.random.default_rng([seed, Purpose.ORDER, epoch]).permutation(N)


def batch_indices(cfg, N, step):
    """Which of N images batch `step` holds: the next B places in an endless row of permutations."""
    places = np.arange((step - 1) * cfg.batch_size, step * cfg.batch_size)
    epochs = places // N
    parts = [order_of(cfg.seed, e, N)[places[epochs == e] % N] for e in np.unique(epochs)]
    return torch.from_numpy(np.concatenate(parts))


# ---------------------------------------- t and eps


def generator(seed, purpose, *numbers):
    """A torch.Generator on the CPU, seeded by these numbers alone."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *numbers))


def draws(cfg, step, like):
    """t (B,) and eps (B, C, H, W) of Eq. (7) for batch `step`.

    Both are on the CPU. Every process draws those of the whole batch: torch's generator cannot
    skip the rows of the others.

    like  (B, C, H, W)
    t     int64 in 1..T; objective ncsn: the steps of its ten levels; vp: float64 in [1, T]
    """
    g = generator(cfg.seed, Purpose.NOISE, step)
    u = torch.rand(len(like), generator=g, dtype=torch.float64)
    t = (cfg.T * u ** (1 / cfg.t_power)).clamp(min=1)  # P(t <= k) = (k / T)^t_power
    if cfg.objective == "ncsn":
        steps = torch.tensor(score.ncsn_steps(cfg.T)[::-1])
        t = steps[(len(steps) * u ** (1 / cfg.t_power)).long()]
    if cfg.objective == "eps":
        t = t.ceil().long()
    return t, torch.randn(like.shape, generator=g)


# ---------------------------------------- augmentation


def augment(x, mask, generator, strength=1.0):
    r"""An X-ray and its mask as another exposure of the same patient could have shown them.

        p = R(a) s p' + d                              the place p' of the new picture shows p
        x = contrast x(p) + brightness, clipped        in [-1, 1]
        mask = +1 where mask(p) > 0, else -1

    x, mask    (B, 1, S, S) float in [-1, 1]; each pair has its own draw
    generator  torch.Generator on the CPU: the draws are the same on every device
    strength   0: nothing changes. 1: rotation a to 10 degrees, scale s from 1/1.1 to 1.1, shift d
               to a twentieth of the side, contrast from 1/1.25 to 1.25, brightness to 0.1 of the
               range, each uniform (s and contrast in their logarithm). What moves in from outside
               repeats the edge.

    No flips: the heart is on one side.
    """
    u = torch.rand(6, len(x), 1, 1, generator=generator)
    u = sent(strength * (2 * u - 1), x.device).to(x.dtype)
    angle, scale, contrast = math.pi / 18 * u[0], 1.1 ** u[1], 1.25 ** u[4]
    right, down, brightness = 0.1 * u[2], 0.1 * u[3], 0.2 * u[5]
    first = torch.cat([scale * angle.cos(), -scale * angle.sin(), right], -1)  # (B, 1, 3)
    second = torch.cat([scale * angle.sin(), scale * angle.cos(), down], -1)
    places = F.affine_grid(torch.cat([first, second], 1), x.shape, align_corners=False)
    both = torch.cat([x, mask], 1)
    moved = F.grid_sample(both, places, padding_mode="border", align_corners=False)
    x = moved[:, :1] * contrast[:, None] + brightness[:, None]
    return x.clamp(-1, 1), torch.where(moved[:, 1:] > 0, 1.0, -1.0)
