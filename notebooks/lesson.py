"""What every notebook begins with: a trained network to look at."""

import json
from pathlib import Path

import torch

import config
import runs
import train
from console import Stopped


def open_run(words, otherwise, device="cpu"):
    """The finished run of `python train.py WORDS`, or else a shorter one that is trained here, now.

    words      "--task lung --cond concat". Its run is looked for in runs/ of the current folder, or
               at its --out. A run of fewer steps does not count
    otherwise  "--steps 200": added to the words where there is no such run. The shorter run is kept
               in runs/...-200-steps and found the next time

    Returns (model with the averaged weights, Config, folder, label). The label names data and run.
    Stopped: the shorter run was stopped before its end; the next call goes on with it.
    """
    device = torch.device(device)
    full, short = (
        config.configure(config.parse(line.split()), device)
        for line in (words, f"{words} {otherwise}")
    )
    folder = Path(config.parse(words.split()).out or Path("runs", config.name_of(full)))
    if not finished(folder, full.steps):
        folder = folder.with_name(f"{folder.name}-{short.steps}-steps")
    if not finished(folder, short.steps):
        line = [*words.split(), *otherwise.split(), "--out", str(folder)]
        if (folder / "last.pt").exists():
            line = ["--resume", str(folder)]
        if train.main([*line, "--device", str(device)]):
            raise Stopped(f"{folder} was not trained to its end")
    model, cfg, step = runs.load_run(folder, device)
    images = "phantoms" if cfg.phantoms else "X-rays"
    return model, cfg, folder, f"{images}, {folder}, step {step}"


def finished(folder, steps):
    """Whether a run folder has the results of at least so many steps."""
    file = folder / "results.json"
    if not file.exists():
        return False
    return json.loads(file.read_text(encoding="utf-8"))["evaluation"]["step"] >= steps
