r"""What a picture is drawn from (§4): the class of the X-ray, masks of its lungs and infection.

The report aims "to generate data from the conditional densities of our dataset" and goes on to
p(mask | X-ray). Here are the others, such as p(X-ray | class, lung mask). One network learns them
and those of fewer conditions, because in training some of them are taken away at random [8].

    --given class+lung     KINDS joined by +: what the network is told
    --set draw=lung        what it draws: DRAWN, X-rays by default

A mask is -1 outside and +1 inside, and 0 everywhere where it is not given. A class is its place in
data.CLASSES, from 1 on, and 0 where it is not given.
"""

from typing import NamedTuple

import numpy as np
import torch

import data
from console import refuse

MASKS = ("lung", "infection")
KINDS = ("class", *MASKS)
DRAWN = ("X-rays", "lung", "infection")


class Given(NamedTuple):
    """The conditions of B pictures, or what a network makes of them.

    masks  (B, M, S, S) in [-1, 1], M masks an X-ray in the order of KINDS; None: M = 0
    label  (B,) int64, 0..3; None: the network knows no classes
    """

    masks: torch.Tensor | None
    label: torch.Tensor | None


def kinds_of(given):
    """The kinds in "class+lung", in their own order. UserError: another word, or one twice."""
    words = given.split("+") if given else []
    rule = f"--given must be some of {', '.join(KINDS)}, joined by +"
    refuse(set(words) - set(KINDS) or len(set(words)) < len(words), f"{rule}; got {given}")
    return [kind for kind in KINDS if kind in words]


def masks_of(given):
    """The kinds of masks among them: some of "lung" and "infection"."""
    return [kind for kind in kinds_of(given) if kind != "class"]


def load(cfg, split, progress=None, masks=None):
    """A split of a run's images, as data.load has it: data.Split.

    Of a network that draws, `images` are what it draws, and `masks` those that are given,
    (N, M, S, S) uint8, or None; those of the folder `masks` if that is asked for. `names` begin
    with the class.
    """

    def loaded(masks=None):
        which = cfg.data, cfg.images_of, split, cfg.classes, cfg.image_size
        return data.load(*which, progress=progress, masks=masks)

    if cfg.task != "synthesis" or masks:
        return loaded(masks)
    masks = [loaded(data.MASKS[kind]).masks for kind in masks_of(cfg.given)]
    drawn = loaded(data.MASKS.get(cfg.draw))
    images = drawn.images if cfg.draw == "X-rays" else drawn.masks
    return data.Split(images, np.concatenate(masks, 1) if masks else None, drawn.names)


def of_split(cfg, split, device="cpu"):
    """All that is given of a split, on the device: Given with masks in uint8; None: nothing is."""
    if not cfg.given:
        return None
    masks = None if split.masks is None else torch.from_numpy(split.masks).to(device)
    label = None
    if "class" in kinds_of(cfg.given):
        places = [1 + data.CLASSES.index(name.split("/")[0]) for name in split.names]
        label = torch.tensor(places, device=device)
    return Given(masks, label)


def rows_of(split_given, rows, device="cpu"):
    """The conditions of some pictures of a split, with masks in [-1, 1]. None: nothing is given."""
    masks, label = part_of(split_given, rows, device) or (None, None)
    return split_given and Given(None if masks is None else data.to_float(masks), label)


def part_of(given, rows, device="cpu"):
    """Some rows of a Given, on the device; None of None."""

    def of(x):
        return None if x is None else x[rows].to(device)

    return given and Given(*map(of, given))


def unknown(cfg, n, device="cpu"):
    """The conditions of n pictures of which nothing is given; None where the network has none."""
    if not cfg.given:
        return None
    M, side = len(masks_of(cfg.given)), cfg.image_size
    masks = torch.zeros(n, M, side, side, device=device) if M else None
    knows_classes = "class" in kinds_of(cfg.given)
    return Given(masks, torch.zeros(n, dtype=torch.long, device=device) if knows_classes else None)


def guided(eps_model, w, nothing):
    r"""Classifier-free guidance [8], Eq. (6), as an eps_model of any sampler.

        eps = (1 + w) eps_theta(x_t, t, y) - w eps_theta(x_t, t, nothing)

    w        >= -1. 0: eps_theta itself. -1: without y. Above 0: p(x_t) p(y | x_t)^(1 + w) at each t
    nothing  like y: no condition is given

    Of a model of pairs (eps, v), see improved.py, eps alone is guided: v is that of y.
    """

    def model(xt, t, y):
        given, without = eps_model(xt, t, y), eps_model(xt, t, nothing)
        if isinstance(given, tuple):
            return (1 + w) * given[0] - w * without[0], given[1]
        return (1 + w) * given - w * without

    return model


def number_of(given):
    """How many pictures these conditions belong to."""
    return len(given.masks if given.label is None else given.label)


def selected(given, kinds, wanted):
    """What a network of the kinds `wanted` knows of `given`, which has other kinds; both as "a+b".

    Masks are in [-1, 1]; a kind that is not among `given` is not given.
    """
    if not wanted:
        return None
    n, label = number_of(given), given.label
    names, nothing = masks_of(kinds), torch.zeros_like(given.masks[:, 0])
    masks = [given.masks[:, names.index(k)] if k in names else nothing for k in masks_of(wanted)]
    if "class" in kinds_of(wanted) and label is None:
        label = torch.zeros(n, dtype=torch.long)
    knows_classes = "class" in kinds_of(wanted)
    return Given(torch.stack(masks, 1) if masks else None, label if knows_classes else None)


def some_of(given, drop, generator):
    """The conditions of a batch, of which some are taken away, as in [8].

    With probability `drop` a picture keeps a random subset of its conditions, each subset alike;
    none and all are among them.

    generator  torch.Generator on the CPU: the draws are the same on every device
    """
    masks, label = given
    M = 0 if masks is None else masks.shape[1]
    u = torch.rand(number_of(given), 2 + M, generator=generator)
    kept = (u[:, :1] >= drop) | (u[:, 1:] >= 0.5)  # (n, 1 + M): the class, and each mask
    if masks is not None:
        masks = masks * kept[:, 1:, None, None].to(masks)
    return Given(masks, None if label is None else label * kept[:, 0].to(label))
