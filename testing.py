"""What several test files share: tiny settings, images, networks, comparisons of two runs."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config
import data
import diffusion
import improved
import metrics
import phantoms
import runs

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")

# A run of 4 steps with 2 evaluations, on the tiny data of the fixture `root`
SIZES = "--size small --recipe best --image-size 16 --batch-size 4 --precision fp32 --device cpu"
TINY = f"{SIZES} --steps 4 --eval-images 4 --ddim-steps 2 --set channels=4 eval_every=2"


def tiny(**changes):
    """A Config of these sizes: lung masks, 10 steps."""
    words = f"--task lung {SIZES} --steps 10 --set channels=4"
    return dataclasses.replace(config.configure(config.parse(words.split()), CPU), **changes)


def split(n, seed=0):
    """n random images. A mask is where its image is brighter than 127."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 1, 16, 16), np.uint8)
    return data.Split(images, np.uint8(255) * (images > 127), [str(i) for i in range(n)])


def tensors(n):
    """The images and masks of split(n), as Trainer.train_step takes them."""
    return [torch.from_numpy(pixels) for pixels in split(n)[:2]]


def shake(model):
    """Move all weights away from the zero initialisation, so that each one has a gradient."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))
    return model


class Oracle(torch.nn.Module):
    """A network that knows the mask: x_0 = +-1 where the X-ray is above or below 0.

    It answers what cfg.target asks for.
    """

    def __init__(self, cfg):
        super().__init__()
        self.s, self.target = improved.schedule_of(cfg), cfg.target

    def embed(self, y):
        return y

    def denoise(self, xt, t, e):
        x0 = torch.where(e > 0, 1.0, -1.0)
        eps = diffusion.predict_eps(self.s, xt, t, x0)
        return diffusion.target_of(self.s, self.target, x0, t, eps)


def group_norm_as_on_cuda(monkeypatch, kind=torch.Tensor):
    """Tensors of this class say is_cuda, and F.group_norm is as CUDA has it.

    Under autocast it is float32, without autocast its arguments have one dtype.
    """
    exact = F.group_norm

    def group_norm(x, groups, weight, bias, eps):
        if not torch.is_autocast_enabled("cpu"):
            assert weight.dtype == bias.dtype == x.dtype
            return exact(x, groups, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return exact(x.float(), groups, weight.float(), bias.float(), eps)

    monkeypatch.setattr(F, "group_norm", group_norm)
    monkeypatch.setattr(kind, "is_cuda", True, raising=False)


# ---------------------------------------- trained networks, on phantoms of their own


class Chests(NamedTuple):
    """Phantoms: images uint8, lungs and infected bool, each (N, 1, 64, 64)."""

    images: np.ndarray
    lungs: np.ndarray
    infected: np.ndarray


def chests(seed, rows, kind=None, healthy=False):
    """These phantoms of a seed as a network sees them: Chests. kind: None has all, in turn."""
    drawn = [phantoms.phantom(seed, i, kind or data.CLASSES[i % 3], healthy=healthy) for i in rows]
    images = [data.resize_image(image, 64)[None] for image, _, _ in drawn]
    masks = ([data.resize_mask(one[part], 64)[None] for one in drawn] for part in (1, 2))
    return Chests(*map(np.stack, (images, *masks)))


def network(name):
    """(model, Config) of weights/NAME.pt."""
    return runs.load_run(ROOT / "weights" / f"{name}.pt")[:2]


def dice(masks, true, threshold=0.0):
    """DICE over all pixels of these masks."""
    return metrics.scores(metrics.confusion(masks, true, threshold).pooled())["DICE index"]


# ---------------------------------------- run folders


def state_of(folder):
    """The dict of last.pt, without how long the run took and by which command."""
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state.pop("minutes") >= 0
    assert state.pop("command").startswith(("python train.py --task ", "torchrun "))
    return state


def assert_same(a, b, where=""):
    """Bit for bit, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, list):
        for i, (c, d) in enumerate(zip(a, b, strict=True)):
            assert_same(c, d, f"{where}[{i}]")
    else:
        assert a == b, where


def log_of(folder):
    """The lines of log.jsonl, without the seconds of an evaluation."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def evaluations_of(folder):
    """The lines of log.jsonl that are evaluations."""
    return [line for line in log_of(folder) if "Val" in line]


def results_of(folder):
    """The dict of results.json."""
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------- commands in processes of their own


def start(command, folder):
    """A Python command in a folder, each of its processes with one thread, as a Popen."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def torchrun(processes, script, words, folder):
    """start() of a script on several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return start([*launcher, script, *words], folder)


def wait_for_log(folder):
    """Until a run has logged a line, at most a minute."""
    log = Path(folder) / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text():
            return
        time.sleep(0.1)
