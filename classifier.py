r"""A small network that looks at X-rays: which class is it, and how was its texture altered?

    python classifier.py --seed 0 --out weights/features.pt
    python classifier.py --seed 1 --out weights/judge.pt

Each draws fresh phantoms, learns both questions, prints how often it is right on other fresh
phantoms, and writes the weights and, beside them, a JSON of these facts.

What drawn X-rays are measured by (image_metrics.py) should see what is wrong with them. The
features of a network that was asked for the class alone may overlook a blur, as blurred pneumonia
is pneumonia. This one was asked for the blur, too. A second network of another seed is the judge of
the class: what was compared or chosen by the first is not judged by the first.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import batches
import console
import data
import phantoms
import runs
from console import Parser, UserError, exit_status, message, path_of, refuse
from data import CLASSES
from diffusion import Purpose, seed_of
from unet import group_norm

D = 128  # features of an X-ray
SIZE = 64  # side of the X-rays that the network learns from
FIRST_SEED = 1000  # of the phantoms here; seeds 0 and 1 are those of Train, Val and Test
HELD_OUT = 3000  # phantoms that measure a network
ALTERATIONS = (  # what happens to the texture, and how strongly
    ("none", 0.0),
    ("blur", 0.4),  # standard deviation, in pixels
    ("blur", 0.8),
    ("noise", 0.03),  # standard deviation, of the range [-1, 1]
    ("noise", 0.08),
    ("sharpen", 1.0),  # what a blur of this standard deviation takes away is added
)

# ---------------------------------------- alterations


def blur(x, sigma):
    """Gaussian blur, cut off at 3 sigma; the picture is mirrored at its edges. (B, 1, H, W)."""
    reach = math.ceil(3 * sigma)
    place = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-(place**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def altered(x, kind, strength, generator=None):
    """X-rays (B, 1, H, W) in [-1, 1] after one of ALTERATIONS, as the gray values of a file.

    generator  torch.Generator on the CPU, of the noise
    """
    if kind == "blur":
        x = blur(x, strength)
    if kind == "noise":
        x = x + strength * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if kind == "sharpen":
        x = 2 * x - blur(x, strength)
    return data.to_float(data.to_uint8(x)).to(x)


def alter(x, which, generator):
    """Each X-ray of (B, 1, H, W) after ALTERATIONS[its entry of `which`, (B,) int]."""
    out = torch.empty_like(x)
    for k, how in enumerate(ALTERATIONS):
        rows = which == k
        if rows.any():
            out[rows] = altered(x[rows], *how, generator)
    return out


# ---------------------------------------- the network


class Refine(nn.Module):
    """x + SiLU(norm(3x3 convolution of x))."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), group_norm(channels)

    def forward(self, x):
        return x + F.silu(self.norm(self.conv(x)))


def halve(c_in, c_out):
    """A 3x3 convolution of stride 2, norm, SiLU: half the side."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), group_norm(c_out), nn.SiLU())


class Classifier(nn.Module):
    """X-rays (B, 1, H, W) in [-1, 1] -> logits of CLASSES, (B, 3), and of ALTERATIONS, (B, 6).

    Four convolutions of stride 2, a refinement after the last three, the mean of each cell of a
    4x4 grid, and D features that both answers are read from: where an opacity lies is part of its
    class. 274,553 parameters. Any side of 16 or more; it has learned SIZE.
    """

    def __init__(self):
        super().__init__()
        layers = [halve(1, 32)]
        for c_in, c_out in ((32, 48), (48, 64), (64, 96)):
            layers += [halve(c_in, c_out), Refine(c_out)]
        self.body = nn.Sequential(*layers, nn.Conv2d(96, 16, 1), nn.AdaptiveAvgPool2d(4))
        self.to_features = nn.Linear(16 * 4 * 4, D)
        self.to_class, self.to_alteration = nn.Linear(D, 3), nn.Linear(D, len(ALTERATIONS))

    def features(self, x):
        """(B, D): what both answers are read from."""
        return F.silu(self.to_features(self.body(x).flatten(1)))

    def heads(self, features):
        return self.to_class(features), self.to_alteration(features)

    def forward(self, x):
        return self.heads(self.features(x))


class Answers(NamedTuple):
    """What a Classifier says about N X-rays: float32 arrays."""

    features: np.ndarray  # (N, D)
    classes: np.ndarray  # (N, 3) probabilities of CLASSES
    alterations: np.ndarray  # (N, 6) probabilities of ALTERATIONS


@torch.inference_mode()
def answers(model, images):
    """The Answers to X-rays (N, 1, H, W): uint8, or float in [-1, 1]. The model is on the CPU."""
    images = torch.as_tensor(images)
    images = data.to_float(images) if images.dtype == torch.uint8 else images
    parts = []
    for x in images.split(256):
        features = model.features(x)
        parts.append((features, *(logits.softmax(1) for logits in model.heads(features))))
    return Answers(*(torch.cat(part).numpy() for part in zip(*parts)))


# ---------------------------------------- training and measuring


def train_classifier(images, labels, seed, steps, batch=64, lr=3e-3, progress=lambda *_: None):
    """A Classifier by AdamW on the sum of two cross-entropies: class and alteration.

    Each X-ray of a batch is mirrored in half of the cases, which leaves its class, and altered in
    one of six ways. The learning rate rises for 50 steps and falls by a cosine.

    images    (N, 1, S, S) uint8
    labels    (N,) int64, places in CLASSES
    seed      of weights, batches and alterations
    progress  called as progress(done, steps) after each step
    """
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        torch.manual_seed(seed_of(seed, Purpose.JUDGE))
        model = Classifier()
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    g = batches.generator(seed, Purpose.JUDGE, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch,), generator=g)
        which = torch.randint(len(ALTERATIONS), (batch,), generator=g)
        mirrored = torch.rand(batch, 1, 1, 1, generator=g) < 0.5
        x = data.to_float(images[rows])
        x = alter(torch.where(mirrored, x.flip(3), x), which, g)
        of_class, of_alteration = model(x)
        loss = F.cross_entropy(of_class, labels[rows]) + F.cross_entropy(of_alteration, which)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        progress(step, steps)
    return model.eval().requires_grad_(False)


def accuracy(model, images, labels):
    """How often a Classifier is right on X-rays that it has not seen: a dict.

    The class is asked of each X-ray as it is. The alteration is asked of each X-ray after one of
    them, all equally often. A confusion has a row for each truth and a column for each answer, in
    numbers of X-rays.

    images  (N, 1, S, S) uint8, in random order or the classes in turn
    labels  (N,) int64, places in CLASSES
    """
    which = torch.arange(len(images)) // len(CLASSES) % len(ALTERATIONS)
    g = batches.generator(0, Purpose.ALTERATION)
    found = answers(model, images).classes.argmax(1)
    seen = answers(model, alter(data.to_float(images), which, g)).alterations.argmax(1)
    of_class = confusion(np.asarray(labels), found, len(CLASSES))
    of_alteration = confusion(which.numpy(), seen, len(ALTERATIONS))
    return {
        "images": len(images),
        "class": right(of_class),
        "class confusion": of_class.tolist(),
        "alteration": right(of_alteration),
        "alteration confusion": of_alteration.tolist(),
    }


def confusion(true, found, n):
    """(n, n) int: how often truth i got answer j."""
    return np.bincount(n * true + found, minlength=n * n).reshape(n, n)


def right(table):
    """The share of a confusion that is on its diagonal."""
    return float(np.trace(table) / table.sum())


# ---------------------------------------- fresh phantoms


def drawn(seed, rows):
    """These phantoms of a seed, (n, 1, SIZE, SIZE) uint8; number i is of class i mod 3.

    Drawn at 256x256 and reduced, as those are that train.py reads.
    """
    found = [phantoms.phantom(seed, i, CLASSES[i % len(CLASSES)])[0] for i in rows]
    return np.stack([data.resize_image(image, SIZE)[None] for image in found])


def fresh(seed, n, progress=lambda *_: None):
    """The first n phantoms of a seed and their labels, in worker processes.

    Returns (n, 1, SIZE, SIZE) uint8 and (n,) int64, places in CLASSES.
    """
    parts, images = np.array_split(np.arange(n), -(-n // 100)), []
    with console.worker_processes() as pool:
        for future in [pool.submit(drawn, seed, part) for part in parts]:
            images.append(future.result())
            progress(sum(map(len, images)), n)
    return np.concatenate(images), np.arange(n) % len(CLASSES)


# ---------------------------------------- files and the command


def as_saved(model):
    """The model with its weights rounded to half precision: what `save` keeps."""
    for p in model.parameters():
        p.copy_(p.half())
    return model


def save(model, path):
    """Write the weights in half precision, half a megabyte."""
    weights = {name: w.half() for name, w in model.state_dict().items()}
    console.write_whole(Path(path), lambda file: torch.save({"classifier": weights}, file))


def load(path):
    """The Classifier of a file, ready to answer. UserError: none, a damaged one, or another's."""
    refuse(not Path(path).is_file(), f"{path}: there is no file of that name")
    model = Classifier()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["classifier"]
        refuse(not all(w.isfinite().all() for w in weights.values()), "a weight is not finite")
        model.load_state_dict({name: w.float() for name, w in weights.items()})
    except Exception as e:  # a damaged file can raise a dozen
        why = str(e) if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"{path}: not a file of classifier.py, or a damaged one ({why})") from e
    return model.eval().requires_grad_(False)


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("classifier.py", description=__doc__, formatter_class=formatter)
    p.add_argument("--out", type=path_of, required=True, metavar="FILE.pt", help="the weights")
    words = "of weights and batches; its phantoms have seeds of their own (default 0)"
    p.add_argument("--seed", type=int, default=0, help=words)
    words = "fresh ones to learn from (default %(default)s)"
    p.add_argument("--phantoms", type=int, default=12_000, metavar="N", help=words)
    words = "of 64 X-rays (default %(default)s)"
    p.add_argument("--steps", type=int, default=2500, metavar="N", help=words)
    args = p.parse_args(argv)
    for name, least, most in (("seed", 0, 2**31), ("phantoms", 1, 10**6), ("steps", 1, 10**6)):
        value = getattr(args, name)
        if not least <= value <= most:
            p.error(f"--{name} must be {least} to {most}, got {value}")
    return args


def carry_out(args):
    """Draw, learn, measure, write. UserError: --out is no place for a result."""
    out, command = Path(args.out), "python classifier.py "
    facts_file = out.with_suffix(".json")
    refuse(out.suffix != ".pt", f"--out must end in .pt, got {out}")
    console.refuse_out(facts_file, "classifier.py", f'{{\n "command": "{command}')
    if out.exists():
        load(out)  # a file of something else is not replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    began, seed = time.monotonic(), FIRST_SEED + 2 * args.seed
    xrays = fresh(seed, args.phantoms, console.progress_line("drawing phantoms"))
    line = console.progress_line("learning: steps")
    model = as_saved(train_classifier(*xrays, args.seed, args.steps, progress=line))
    others = fresh(seed + 1, HELD_OUT, console.progress_line("drawing other phantoms"))
    facts = accuracy(model, *others)
    message(table(facts))
    words = f"--seed {args.seed} --phantoms {args.phantoms} --steps {args.steps} --out {args.out}"
    size = f"{SIZE}x{SIZE}"
    result = {
        "command": command + words,
        "seed": args.seed,
        "steps": args.steps,
        "data": f"{args.phantoms} phantoms of seed {seed}, {size}",
        "held out": f"{HELD_OUT} phantoms of seed {seed + 1}, {size}",
        "accuracy": facts,
        "minutes": (time.monotonic() - began) / 60,
    }
    save(model, out)
    runs.write_result(facts_file, result, torch.device("cpu"))
    return 0


def table(facts):
    """The facts of `accuracy` in words, a line for each answer."""
    n, lines = facts["images"], []
    kinds = [f"{kind} {strength:g}" if strength else kind for kind, strength in ALTERATIONS]
    for what, names in (("class", CLASSES), ("alteration", kinds)):
        p = facts[what]
        error = (p * (1 - p) / n) ** 0.5
        each = [row[i] / max(sum(row), 1) for i, row in enumerate(facts[f"{what} confusion"])]
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, each))
        lines.append(f"{what}: right {p:.4f} ± {error:.4f} of {n} held-out phantoms ({shares})")
    return "\n".join(lines)


def main(argv=None):
    args = parse(argv)

    def work():
        return carry_out(args)

    return exit_status("classifier.py", work, "try fewer --phantoms", "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
