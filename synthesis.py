r"""A trained network that draws: X-rays from noise (§3), or from what is given (§4).

conditions.py says what may be given. A mask of lungs or of an infection is drawn in the same way.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import batches
import conditions
import data
import devices
import diffusion
import image_metrics
import improved
import pairs
import runs
from console import passes_line, refuse
from devices import autocast, cast_once
from evaluate import (
    EVAL_SEED,
    calls_of,
    eps_model_of,
    evaluated_rows,
    on_all_processes,
    sample_with,
)
from memory import in_chunks


@torch.inference_mode()
def sample_images(model, cfg, index, device="cpu", progress=None, seed=EVAL_SEED, given=None):
    """Pictures from noise: (B, 1, H, W) in [-1, 1].

    The noise of image i comes from (seed, i) alone.
    given  conditions.Given of the B pictures, on the device; None: nothing is given
    """
    s = improved.schedule_of(cfg, device)
    shape = (1, cfg.image_size, cfg.image_size)
    noise = diffusion.ImageNoise(seed, index, shape, device=device)
    eps_model, e = eps_model_of(model, cfg, s, device, progress, cfg.learned), None
    if cfg.given:
        nothing = conditions.unknown(cfg, len(index), device)
        with autocast(cfg, device):
            e, nothing = (model.embed(y) for y in (nothing if given is None else given, nothing))
        if cfg.guidance:
            eps_model = conditions.guided(eps_model, cfg.guidance, nothing)
    return sample_with(cfg, s, eps_model, noise, e)


def evaluate_images(model, cfg, splits, device, progress=None):
    """§3: Eq. (7) on each split, and how far samples are from held-out images.

    Returns {"Train": {"images", "loss"}, "Val": {"images", "loss", two distances}} and the samples.
    """
    report = {name: eq7_loss(model, cfg, split, device) for name, split in splits.items()}
    distances, samples = distances_to_held_out(model, cfg, splits["Val"], device, progress)
    report["Val"] |= distances
    return report, samples


@torch.inference_mode()
def eq7_loss(model, cfg, split, device):
    """Eq. (7) on the evaluated rows, with fixed t (uniform) and eps: {"images", "loss"}."""
    s, alone = improved.schedule_of(cfg, device), improved.without_v(model)
    rows = evaluated_rows(len(split.images), cfg.eval_images)
    x0, given = data.to_float(split.images[rows]), conditions.of_split(cfg, split)
    as_eq7 = dict(seed=EVAL_SEED, t_power=1.0, objective="eps")
    t, eps = batches.draws(dataclasses.replace(cfg, **as_eq7), 0, x0)  # (n,), (n, 1, H, W)

    def summed_loss(i):
        y = conditions.rows_of(given, rows[i], device)
        with autocast(cfg, device):
            x, noise = x0[i].to(device), eps[i].to(device)
            mean = diffusion.l_simple(s, alone, x, y, t[i], noise, cfg.target)
        return float(mean) * len(i)

    losses = [loss for _, loss in in_chunks(summed_loss, np.arange(len(rows)), device)]
    return {"images": len(rows), "loss": sum(losses) / len(rows)}


def distances_to_held_out(model, cfg, split, device, progress=None):
    """How far samples are from one half of the held-out images, and how far the other half is.

    The distance of the two halves is what a perfect model can hope for. What is given is that of
    the first half. Returns ({name: Fréchet distance of image_metrics.image_features}, the samples
    as uint8).
    """
    order = np.random.default_rng(EVAL_SEED).permutation(len(split.images))
    other, half = np.array_split(order, 2)
    half, given = half[: cfg.eval_images], conditions.of_split(cfg, split)
    samples = draw(model, cfg, conditions.rows_of(given, half), len(half), device, progress)
    held_out = (data.to_float(split.images[i]) for i in (half, other[: len(half)]))
    ours, reference, others = (image_metrics.image_features(x) for x in (samples, *held_out))
    return {
        "Fréchet distance": image_metrics.frechet_distance(ours, reference),
        "Fréchet distance of two held-out halves": image_metrics.frechet_distance(
            others, reference
        ),
    }, data.to_uint8(samples)


def draw(model, cfg, given, N, device, progress=None, seed=EVAL_SEED):
    """N pictures, in chunks and on every process: (N, 1, H, W) in [-1, 1], on the CPU.

    given: conditions.Given of all N, or None
    """
    model = cast_once(model, cfg)

    def drawn(i):
        y = conditions.part_of(given, i, device)
        x0 = sample_images(model, cfg, i, device, progress, seed, y)
        return data.without_nan(x0).cpu()

    return on_all_processes(drawn, np.arange(N), (1, cfg.image_size, cfg.image_size), device)


# ---------------------------------------- what is given


def given_to(cfg, N, wanted, seed=EVAL_SEED, device="cpu"):
    """The conditions of N pictures, on the CPU: conditions.Given; None: the network knows none.

    wanted  {"class": one of data.CLASSES; "lung", "infection": where the masks are}, or None for
            each. Masks are in a file, or in the files of a folder, which are taken in turn; or a
            run draws them, one for each picture.

    UserError: a file that is no mask; a run that does not draw such masks.
    """
    given = conditions.unknown(cfg, N)
    if wanted.get("class"):
        given.label[:] = 1 + data.CLASSES.index(wanted["class"])
    for place, kind in enumerate(conditions.masks_of(cfg.given)):
        where = wanted.get(kind)
        if where and (where.endswith(".pt") or Path(where, "last.pt").is_file()):
            given.masks[:, place] = masks_drawn(where, kind, cfg, given, seed, device)
        elif where:
            masks = masks_read(where, cfg.image_size)
            given.masks[:, place] = masks[np.arange(N) % len(masks)]
    return given


def masks_read(where, size):
    """The masks in a file, or in the files of a folder: (n, S, S) float32, -1 or +1."""
    files = [where]
    if Path(where).is_dir():
        files = [Path(where, name) for name in pairs.image_files(where)[0]]
    masks = np.stack([data.resize_mask(data.read_mask(file), size) for file in files])
    return torch.from_numpy(masks) * 2.0 - 1


def masks_drawn(run, kind, cfg, given, seed, device):
    """A mask for each picture, drawn by a run: (N, S, S) float32, -1 or +1.

    The run is given what it knows of `given`, such as the lungs for the mask of an infection.
    """
    model, own, _ = runs.load_run(run, device)
    own, size = devices.in_precision_of(own, device), cfg.image_size
    rule = f"--{kind}-mask must be a run that draws {kind} masks at {size}x{size}, got {run}"
    refuse((own.task, own.draw, own.image_size) != ("synthesis", kind, size), rule)
    known, N = conditions.selected(given, cfg.given, own.given), conditions.number_of(given)
    progress = passes_line(f"drawing {kind} masks: passes", N * calls_of(own))
    drawn = draw(model, own, known, N, device, progress, seed)
    return (drawn[:, 0] > 0) * 2.0 - 1
