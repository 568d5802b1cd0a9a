r"""How good are the X-rays that a run draws?

    python realism.py distances runs/synthesis-class-0 --guidance 0 1 2 4
    python realism.py pairs pairs --task lung --labels 5 20

distances  N drawn X-rays are held against N fresh phantoms (of a run on X-rays: against Val), and
           so are as many others of these: what a perfect network can hope for. A run that knows
           the classes draws all three equally often. Features are those of weights/features.pt,
           and "judged right" is how often weights/judge.pt finds the class that was asked for.
pairs      Train on drawn, test on real: the U-Net of [15] learns from drawn pairs alone, from all
           of Train, and from a few images of Train with and without the drawn ones. DIR is a
           folder of sample.py with images/ and masks/ (or lung-masks/, infection-masks/).

Each prints a table. --out FILE writes all numbers as JSON.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import classifier
import conditions
import config
import data
import devices
import evaluate
import image_metrics
import phantoms
import runs
import synthesis
import tables
import train
from console import (
    Parser,
    exit_status,
    message,
    passes_line,
    path_of,
    progress_line,
    refuse,
    refuse_out,
)
from diffusion import Purpose

WEIGHTS = Path(__file__).resolve().parent / "weights"
REFERENCE, OTHERS = 2000, 2001  # seeds of the fresh phantoms

# ---------------------------------------- distances


class Judged:
    """The ruler: real X-rays, what the run learned from, and two networks that look at them."""

    def __init__(self, real, learned):
        """real, learned: (N, 1, S, S) uint8."""
        names = ("features", "judge")
        self.looks, self.judge = (classifier.load(WEIGHTS / f"{name}.pt") for name in names)
        self.real, self.learned = self.features(real), self.features(learned)

    def features(self, images):
        """Texture and plain features of (N, 1, S, S) uint8: {name: (N, 128)}."""
        texture = classifier.answers(self.looks, images).features
        return {"texture": texture, "plain": image_metrics.image_features(data.to_float(images))}

    def row(self, images, labels=None):
        """What is measured on drawn images: a dict. labels: (N,) places of the classes asked for.

        C_T is about copies of what was learned. Its control takes the real images in their place.
        """
        drawn, found = self.features(images), {"N": len(images)}
        for name, features in drawn.items():
            ours = features, self.real[name]
            found[f"Fréchet, {name}"] = image_metrics.frechet_jackknife(*ours)
            found[f"KID, {name}"] = image_metrics.kernel_distance(*ours)
        ours, real, learned = (x["texture"] for x in (drawn, self.real, self.learned))
        found["precision"], found["recall"] = image_metrics.precision_recall(real, ours)
        half = len(real) // 2
        found["C_T"] = image_metrics.memorisation(ours, learned, real)
        found["C_T, control"] = image_metrics.memorisation(ours, real[:half], real[half:])
        if labels is not None:
            asked = classifier.answers(self.judge, images).classes.argmax(1) == labels
            found["judged right"] = float(asked.mean())
        return found


def reference(cfg, splits, N):
    """(real X-rays, as many others, labels of the others): N fresh phantoms each, or halves of Val.

    splits: {"Train", "Val"} of the run. Labels are places in data.CLASSES.
    """
    if cfg.phantoms:
        seeds = (REFERENCE, OTHERS)
        drawn = [classifier.fresh(seed, N, progress_line("phantoms")) for seed in seeds]
        return drawn[0][0], *drawn[1]
    order = np.random.default_rng(evaluate.EVAL_SEED).permutation(len(splits["Val"].images))
    real, others = np.array_split(order, 2)
    classes = [data.CLASSES.index(splits["Val"].names[i].split("/")[0]) for i in others]
    return splits["Val"].images[real], splits["Val"].images[others], np.array(classes)


def distances(model, cfg, splits, device, N, guidances, seeds):
    """A row for as many others, then one for each guidance and seed of x_T: a list of dicts."""
    real, others, labels = reference(cfg, splits, N)
    judged = Judged(real, splits["Train"].images)
    rows = [dict(images="others") | judged.row(others, labels)]
    N, knows = len(others), "class" in conditions.kinds_of(cfg.given)
    for w, seed in ((w, seed) for w in guidances for seed in seeds):
        how, given = dataclasses.replace(cfg, guidance=w), conditions.unknown(cfg, N)
        if knows:
            given.label[:] = 1 + torch.from_numpy(labels)
        progress = passes_line(f"w = {w:g}, seed {seed}: passes", N * evaluate.calls_of(how))
        drawn = data.to_uint8(synthesis.draw(model, how, given, N, device, progress, seed))
        found = judged.row(drawn, labels if knows else None)
        rows.append(dict(images="drawn", guidance=w, seed=seed) | found)
    return rows


def table_of_distances(rows):
    """The rows of `distances`, as Markdown."""
    columns = ["images", "w", "KID, texture", "Fréchet, texture", "KID, plain", "precision"]
    columns += ["recall", "C_T", "control", "judged right"]
    lines = []
    for row in rows:
        cells = [f"{row['N']} {row['images']}", str(row.get("guidance", ""))]
        for name, digits in (("KID, texture", 1), ("Fréchet, texture", 1), ("KID, plain", 4)):
            value, error = row[name]
            cells.append(f"{value:.{digits}f} ± {error:.{digits}f}")
        cells += [f"{row[name]:.3f}" for name in ("precision", "recall")]
        cells += [f"{row[name]:.1f}" for name in ("C_T", "C_T, control")]
        cells.append(f"{row['judged right']:.3f}" if "judged right" in row else "")
        lines.append(cells)
    return tables.table(columns, lines)


# ---------------------------------------- train on drawn, test on real


def drawn_pairs(folders, task, size):
    """(X-rays, masks) of folders that sample.py wrote, (N, 1, S, S) uint8 each."""
    files = []
    for folder in map(Path, folders):
        masks = folder / f"{task}-masks"
        masks = masks if masks.is_dir() else folder / "masks"
        names = sorted(data.scan(folder / "images"))
        missing = [name for name in names if not (masks / name).is_file()]
        rule = f"{folder} must hold images/ and masks/ of the same names"
        refuse(missing, f"{rule}; there is no {masks / missing[0] if missing else ''}")
        files += [(folder / "images" / name, masks / name) for name in names]
    parts = (data.decode(paths, size)[0][:, None] for paths in zip(*files))
    return tuple(parts)


def learned(cfg, images, masks, device, progress):
    """The averaged weights after cfg.steps on these images and masks, (N, 1, S, S) uint8."""
    trainer = train.Trainer(cfg, device)
    both = [torch.from_numpy(x).to(device) for x in (images, masks)]
    for _ in range(cfg.steps):
        trainer.train_step(*both)
        progress()
    return devices.laid_out(trainer.ema.eval(), device)


def mixed(real, drawn):
    """Both together, the fewer repeated until they are about as many: half of what is seen is real.

    real, drawn: (images, masks), uint8
    """
    most = max(len(real[0]), len(drawn[0]))
    parts = [[np.resize(x, (most, *x.shape[1:])) for x in pair] for pair in (real, drawn)]
    return tuple(np.concatenate(both) for both in zip(*parts))


def pairs(cfg, splits, drawn, labels, draws, device):
    """DICE on Val by what was learned from: a list of {"real", "drawn", "draw", "DICE index"}."""
    Train, Val = splits["Train"], splits["Val"]
    real = Train.images, Train.masks
    sets = [(len(real[0]), 0, 0, real), (0, len(drawn[0]), 0, drawn)]
    for draw in range(draws):
        rows = np.random.default_rng([draw, Purpose.LABELS]).permutation(len(real[0]))
        for n in labels:
            few = tuple(x[rows[:n]] for x in real)
            sets.append((n, 0, draw, few))
            sets.append((n, len(drawn[0]), draw, mixed(few, drawn)))
    found, show, done = [], progress_line("pairs: steps"), 0

    def progress():
        nonlocal done
        done += 1
        show(done, len(sets) * cfg.steps)

    for n, m, draw, both in sets:
        model = learned(dataclasses.replace(cfg, seed=draw), *both, device, progress)
        report, _ = evaluate.evaluate_masks(model, cfg, {"Val": Val}, device)
        dice = report["Val"]["pooled"]["DICE index"]
        found.append({"real": n, "drawn": m, "draw": draw, "DICE index": dice})
    return found


def table_of_pairs(rows):
    """The rows of `pairs`, as Markdown: mean ± standard deviation over the draws of few images."""
    lines, by_set = [], {}
    for row in rows:
        by_set.setdefault((row["real"], row["drawn"]), []).append(row["DICE index"])
    for (n, m), values in by_set.items():
        alone = by_set.get((n, 0), []) if m else []
        gains = [a - b for a, b in zip(values, alone)]
        gain = f"in {sum(g > 0 for g in gains)} of {len(gains)} draws" if gains else ""
        lines.append([str(n), str(m), tables.spread(values), gain])
    return tables.table(["real images", "drawn pairs", "DICE", "more than without"], lines)


# ---------------------------------------- the command


def table(result):
    """What was measured, as Markdown."""
    of = table_of_distances if result["realism"] == "distances" else table_of_pairs
    return of(result["rows"])


STARTS = '{\n "realism": '  # what a result of realism.py starts with


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("realism.py", description=__doc__, formatter_class=formatter)
    p.add_argument("realism", choices=("distances", "pairs"), metavar="distances | pairs")
    words = "distances: a synthesis run; pairs: folders of sample.py"
    p.add_argument("places", nargs="+", type=path_of, metavar="RUN | DIR", help=words)
    number = dict(type=int, metavar="N")
    p.add_argument("--samples", **number, default=1000, help="drawn images; default %(default)s")
    numbers = dict(nargs="+", metavar="X")
    p.add_argument("--guidance", **numbers, type=float, default=[0.0], help="w; default 0")
    p.add_argument("--seeds", **number, nargs="+", default=[0], help="of x_T; default 0")
    p.add_argument("--sampler", choices=config.SAMPLERS, help="default: the run's")
    p.add_argument("--ddim-steps", **number, help="passes; default: the run's")
    task = dict(choices=("lung", "infection"), default="lung")
    p.add_argument("--task", **task, help="pairs: what the masks show; default %(default)s")
    p.add_argument("--labels", **number, nargs="*", default=[], help="pairs: few images of Train")
    p.add_argument("--draws", **number, default=5, help="how often these are drawn; default 5")
    p.add_argument("--steps", **number, default=400, help="pairs: of training; default %(default)s")
    p.add_argument("--data", type=path_of, metavar="DIR", help="COVID-QU-Ex; default: phantoms")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", type=path_of, metavar="FILE", help="write all numbers there as JSON")
    return p.parse_args(argv)


def check(args):
    """Refuse numbers out of range, and a bad --out."""
    for name, least in dict(samples=200, draws=1, steps=1, labels=1, seeds=0).items():
        smallest = min(np.atleast_1d(getattr(args, name)), default=least)
        refuse(smallest < least, f"--{name} must be at least {least}, got {smallest}")
    refuse_out(args.out, "realism.py", STARTS)


def carry_out(args):
    """What the command line asks for. Returns the exit status."""
    check(args)
    device = devices.choose_device(args.device)
    if args.realism == "distances":
        cfg, result = measure_distances(args, device)
    else:
        cfg, result = measure_pairs(args, device)
    kind = cfg.images_are
    result = {"realism": args.realism, "data": kind, "places": args.places} | result
    message(f"{kind}, {config.kind_of(cfg)}\n\n{table(result)}")
    if args.out:
        runs.write_result(args.out, result, device)
    return 0


def measure_distances(args, device):
    """(Config, numbers) of `distances`."""
    refuse(len(args.places) > 1, f"distances takes one run, got {', '.join(args.places)}")
    model, cfg, step = runs.load_run(args.places[0], device)
    drawn = (cfg.task, cfg.draw, cfg.image_size)
    rule = "distances needs a run that draws X-rays of 64x64"
    refuse(drawn != ("synthesis", "X-rays", 64), f"{rule}, got {config.kind_of(cfg)}")
    sampler, passes = args.sampler or cfg.sampler, args.ddim_steps or cfg.ddim_steps
    cfg = dataclasses.replace(cfg, sampler=sampler, ddim_steps=passes)
    cfg = devices.in_precision_of(phantoms.find_data(cfg, args.data), device)
    for w in args.guidance:
        config.check(dataclasses.replace(cfg, guidance=w))
    splits = phantoms.splits_of(cfg, ("Train", "Val"))
    found = distances(model, cfg, splits, device, args.samples, args.guidance, args.seeds)
    how = dict(step=step, sampler=sampler, passes=evaluate.passes_of(cfg))
    return cfg, how | dict(rows=found)


def measure_pairs(args, device):
    """(Config, numbers) of `pairs`."""
    words = f"--task {args.task} --model unet --size small --steps {args.steps}"
    cfg = config.configure(config.parse([*words.split(), "--eval-images", "1000"]), device)
    cfg = phantoms.find_data(cfg, args.data)
    splits = phantoms.splits_of(cfg, ("Train", "Val"))
    drawn = drawn_pairs(args.places, args.task, cfg.image_size)
    rule = f"--labels must be at most the {len(splits['Train'].images)} images of Train"
    most = max(args.labels, default=0)
    refuse(most > len(splits["Train"].images), f"{rule}, got {most}")
    found = pairs(cfg, splits, drawn, args.labels, args.draws, device)
    measured = dict(task=args.task, steps=args.steps, images=len(splits["Val"].images))
    return cfg, measured | dict(rows=found)


def main(argv=None):
    args = parse(argv)
    less_memory = "try fewer --samples, or --device cpu"
    return exit_status("realism.py", lambda: carry_out(args), less_memory, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
