"""What every notebook begins with: the project's folder, trained networks, their X-rays."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

import config
import devices
import evaluate
import phantoms
import runs
import tables

ROOT = Path(__file__).resolve().parent.parent
ALIKE = ("size", "recipe", "data", "image_size", "seed")  # settings of runs that compare


class Network(NamedTuple):
    """A trained network. label: its data, where it lies and how long it has learned."""

    model: torch.nn.Module  # with the averaged weights
    cfg: config.Config
    label: str


def begin():
    """Go to the project's folder, where runs/, weights/ and phantoms/ are. Returns the device."""
    os.chdir(ROOT)
    device = devices.choose_device()
    print(f"torch {torch.__version__}, {device}{', rehearsal' if rehearsal() else ''}")
    return device


def rehearsal():
    """Whether FAST=1 asks for few images and passes: every cell runs, and nothing can be seen."""
    return bool(os.environ.get("FAST"))


def either(full, fast):
    """`full`, or `fast` in a rehearsal."""
    return fast if rehearsal() else full


def networks(*names, device="cpu"):
    """{name: Network} of weights/NAME.pt, or of your own runs in runs/NAME-0.

    Your own are taken if all of them are finished and alike: of one size, recipe, data, image size
    and seed, and those of one task and model after equally many steps. So what is compared here is
    comparable. NAME is a run's folder without its seed, such as lung-concat.
    """
    own = {name: Path("runs", f"{name}-0") for name in names}
    places = own if comparable(list(own.values())) else {n: Path("weights", f"{n}.pt") for n in own}
    found = {}
    for name, place in places.items():
        model, cfg, step = runs.load_run(place, torch.device(device))
        images = cfg.images_are
        found[name] = Network(model, cfg, f"{images}, {place}, step {step}")
    return found


def comparable(folders):
    """Whether all these runs are finished and alike, see networks."""
    files = [folder / "results.json" for folder in folders]
    if not all(file.exists() for file in files):
        return False
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    first, steps = results[0]["config"], {}
    for result in results:
        cfg, step = result["config"], result["evaluation"]["step"]
        alike = all(cfg[name] == first[name] for name in ALIKE)
        if not alike or step != steps.setdefault((cfg["task"], cfg["model"]), step):
            return False
    return True


def held_out(cfg, n, masks=None, split="Val"):
    """(data.Split, the n rows of it that every evaluation looks at).

    masks: those of the lungs, "lung masks", instead of the task's
    """
    images = phantoms.splits_of(phantoms.find_data(cfg, None), (split,), masks=masks)[split]
    return images, evaluate.evaluated_rows(len(images.images), n)


def table(columns, rows):
    """A table, shown as the last value of a cell. A number gets four digits."""
    from IPython.display import Markdown  # only notebooks have it

    def words(cell):
        return f"{cell:.4f}" if isinstance(cell, float) else str(cell)

    return Markdown(tables.table(columns, (map(words, row) for row in rows)))


def progress(label, total):
    """progress(images) for the samplers: one line below the cell, which is gone at the end."""
    from IPython.display import Markdown, display

    line, done, began = display(Markdown(label), display_id=True), 0, time.monotonic()
    shown_at = began

    def add(images):
        nonlocal done, shown_at
        done, now = done + images, time.monotonic()
        if done >= total:
            line.update(Markdown(""))
        elif now - shown_at > 1:
            shown_at, left = now, (now - began) * (total - done) / done
            line.update(Markdown(f"{label}: {done} of {total}, {left:.0f} s left"))

    return add
