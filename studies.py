r"""Three studies of §4.1 with trained networks. The networks of the first two never saw a mask.

    python studies.py anomalies runs/synthesis-Normal-0      infections as what is not expected [12]
    python studies.py labels runs/synthesis-0 --task lung    masks from 5 to 50 labelled images [3]
    python studies.py shares runs/infection-concat-0         the infected share, and its interval

anomalies  The run has learned --classes Normal. Its maps of what it does not expect in COVID-19
           X-rays, inside the lungs, are held against the true infections.
labels     A pixel classifier on the run's activations, and the same U-Net from scratch, both
           trained on the same few labelled images.
shares     How far a share may be off, said by the masks of a diffusion run or the probabilities of
           a supervised one: raw, and as a conformal interval. Several runs are one ensemble. They
           were trained with --set held_out=0.2; intervals are learned on what was held out.

Each prints a table of what it finds on validation. --out FILE writes all numbers as JSON.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import batches
import config
import data
import devices
import diffusion
import evaluate
import metrics
import phantoms
import probes
import runs
import train
from config import refuse
from console import Parser, exit_status, message, passes_line, path_of, progress_line
from diffusion import Purpose

# ---------------------------------------- anomaly maps [12]

BAND = range(400, 601, 10)  # the steps of a map [12]
SMOOTH = 5  # pixels: side of the squares that smooth averages over
PERCENTILE = 95  # of the pixels in healthy lungs: what lies above is called an anomaly


def smooth(x):
    """The mean of each pixel's square: one pixel's noise is as large as an opacity's residual."""
    return F.avg_pool2d(x, SMOOTH, 1, SMOOTH // 2, count_include_pad=False)


def anomaly_maps(model, cfg, images, index, device):
    """Three smooth maps of X-rays: {name: (B, 1, H, W) on the CPU}.

    images  (B, 1, H, W) in [-1, 1]
    index   B ints: the noise of image i comes from i alone
    """
    s, x0 = diffusion.schedule(cfg.T, cfg.shift, device), images.to(device)
    eps_model = evaluate.eps_model_of(model, cfg, s, device)
    key = evaluate.EVAL_SEED, index, x0.shape[1:], 1, device, Purpose.ANOMALY_MAP
    noise = diffusion.ImageNoise(*key)
    back = sum(probes.reconstruct(s, eps_model, x0, cfg.T // 2, 10, noise()) for _ in range(4)) / 4
    loss, signed = probes.anomaly_map(s, eps_model, x0, BAND, noise)
    maps = {"loss, Eq. (7)": loss, "signed": signed, "X-ray - reconstruction": x0 - back}
    return {name: smooth(found).cpu() for name, found in maps.items()}


class Chests(NamedTuple):
    """N X-rays of validation, and where their lungs and infections are."""

    rows: np.ndarray  # (N,) ints, their places in validation
    images: np.ndarray  # (N, 1, H, W) uint8
    lungs: np.ndarray  # (N, 1, H, W) bool
    infected: np.ndarray  # (N, 1, H, W) bool


def validation_chests(cfg, root, n):
    """The Chests of n Normal X-rays, and of n COVID-19 X-rays; of fewer where there are fewer."""
    load = functools.partial(data.load, root, split="Val", image_size=cfg.image_size)
    sick, lungs = load("infection"), load("infection", masks="lung masks")  # of COVID-19
    well = load("lung", classes="Normal")

    def chests(images, lungs, infected):
        rows = evaluate.evaluated_rows(len(images), n)
        return Chests(rows, images[rows], lungs[rows] > 127, infected[rows] > 127)

    healthy = chests(well.images, well.masks, np.zeros_like(well.masks))
    return healthy, chests(sick.images, lungs.masks, sick.masks)


def maps_of(model, cfg, chests, device, progress):
    """{name: (N, 1, H, W) float32}: the gray value itself, then anomaly_maps. progress(0..1)"""
    (rows, images, *_), parts = chests, []
    for first in range(0, len(rows), 16):
        i = slice(first, first + 16)
        parts.append(anomaly_maps(model, cfg, data.to_float(images[i]), rows[i], device))
        progress(min(first + 16, len(rows)) / len(rows))
    maps = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return {"gray value itself": images.astype(np.float32)} | maps


def anomalies(model, cfg, root, device, images, progress):
    """How well a network of healthy X-rays finds the infections of validation: a dict for results/.

    Each map has its AUROC and the eight metrics, over the pixels inside the lungs. A pixel counts
    as infected above the PERCENTILE of the map in healthy lungs.
    """
    healthy, sick = validation_chests(cfg, root, images)
    healthy_maps = maps_of(model, cfg, healthy, device, lambda share: progress(share, 2))
    sick_maps = maps_of(model, cfg, sick, device, lambda share: progress(1 + share, 2))
    infected, found = sick.infected[sick.lungs], {}
    for name in sick_maps:
        values = sick_maps[name][sick.lungs]
        threshold = float(np.percentile(healthy_maps[name][healthy.lungs], PERCENTILE))
        numbers = {"AUROC": metrics.auroc(values, infected), "threshold": threshold}
        found[name] = numbers | scores_of_pixels(values > threshold, infected)
    everything = scores_of_pixels(np.ones_like(infected), infected)
    found["every pixel of the lungs"] = {"AUROC": 0.5} | everything
    counts = {"images": len(sick.rows), "healthy images": len(healthy.rows)}
    return counts | {"infected share": float(infected.mean()), "maps": found}


def scores_of_pixels(predicted, true):
    """The eight metrics of all pixels together. predicted, true: bool arrays of one shape."""
    return metrics.scores(metrics.confusion(predicted[None], true[None]).pooled())


# ---------------------------------------- few labels [3]

STEPS = (50, 150, 250)  # where the activations of the decoder's middle half are taken [3]
NOISES = 4  # over which they are averaged; one in [3]


def probe(model, cfg, x, positive, seed, device, members=10):
    """A pixel classifier on the network's activations: segment(images) -> probabilities.

    x, positive  the labelled images: (n, 1, H, W) in [-1, 1], and bool
    """
    s, n = diffusion.schedule(cfg.T, cfg.shift, device), len(model.unet.decoder)
    key = evaluate.EVAL_SEED, [seed], x.shape[1:], NOISES, device, Purpose.PROBE
    noises = diffusion.ImageNoise(*key)()

    def features_of(images):
        middle = range(n // 4, n - n // 4)
        return probes.features(s, model.unet, images.to(device), STEPS, middle, noises)

    known = probes.pixels(torch.cat([features_of(part) for part in x.split(8)]))
    truth = positive.to(device).flatten()
    classifiers = probes.fit(known, truth, members, steps=500, batch=256, seed=seed)

    def probabilities(images):
        return probes.classify(classifiers, features_of(images)).cpu()

    return lambda images: torch.cat([probabilities(part) for part in images.split(8)])


def from_scratch(cfg, x, positive, seed, device, steps=200, batch=8):
    """As probe, by the same U-Net with fresh weights: X-ray in, mask out in one pass (t = 1)."""
    net = config.build_model(dataclasses.replace(cfg, seed=seed)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    cfg = dataclasses.replace(cfg, steps=steps, warmup=steps // 10, lr_decay="cosine")
    g = batches.generator(seed, Purpose.FROM_SCRATCH)

    def logits(images):
        t = torch.ones(len(images), dtype=torch.long, device=device)
        return net(images.to(device), t).float()

    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (batch,), generator=g)
        with devices.autocast(cfg, device):
            truth = positive[rows].float().to(device)
            loss = F.binary_cross_entropy_with_logits(logits(x[rows]), truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(cfg, step)
        optimizer.step()
    net.requires_grad_(False)
    return lambda images: torch.cat([logits(part).sigmoid().cpu() for part in images.split(16)])


def few_labels(model, cfg, task, root, device, labels, draws, images, progress):
    """DICE on validation of both, trained on the same few images of Train.

    Returns a list of {"labels", "draw", "probe", "from scratch"}. In a draw, the fewer images are
    among the more. UserError: more labels than Train has images.
    """
    Train, Val = (data.load(root, task, name, None, cfg.image_size) for name in ("Train", "Val"))
    rule = f"--labels must be at most the {len(Train.images)} images of Train"
    refuse(max(labels) > len(Train.images), f"{rule}, got {max(labels)}")
    rows, found = evaluate.evaluated_rows(len(Val.images), images), []
    unseen, true = data.to_float(Val.images[rows]), Val.masks[rows] > 127

    def dice(segment):
        return scores_of_pixels(segment(unseen).numpy() > 0.5, true)["DICE index"]

    for draw in range(draws):
        order = np.random.default_rng([draw, Purpose.LABELS]).permutation(len(Train.images))
        for n in labels:
            x = data.to_float(Train.images[order[:n]])
            few = x, torch.from_numpy(Train.masks[order[:n]] > 127), draw, device
            row = {"labels": n, "draw": draw, "probe": dice(probe(model, cfg, *few))}
            found.append(row | {"from scratch": dice(from_scratch(cfg, *few))})
            progress(len(found), draws * len(labels))
    return found


# ---------------------------------------- a share and its interval [1], [21]


class Shares(NamedTuple):
    """What one network, or several together, say about the shares of n X-rays."""

    true: np.ndarray  # (n,)
    estimate: np.ndarray  # (n,)
    spreads: dict  # {how it was found: (n,)}, from 0 for certain
    samples: np.ndarray | None  # (n, N) shares of N masks; None: one supervised network
    quality: dict  # DICE of the mean mask, calibration error of its pixels


def shares_of(networks, split, lungs, masks, device, progress):
    """The Shares of all X-rays of a split by the networks [(model, cfg), ...] of one kind.

    Diffusion: all networks together draw `masks` masks. The estimate is the mean of their shares,
    the spread their standard deviation. Supervised: the estimate is the sum of the probabilities,
    and the spread is what they give if pixels are independent, or all alike, or how several
    networks differ.
    lungs: (n, 1, H, W) bool, of which the shares are; None: of the picture
    """
    rows, K, found = np.arange(len(split.images)), len(networks), []
    for k, (model, cfg) in enumerate(networks):
        members = 1 if cfg.supervised else masks // K + (k < masks % K)
        cfg = dataclasses.replace(cfg, ensemble=members)
        found.append(evaluate.ensembles(model, cfg, split, rows, device, progress))
    means, areas, _ = zip(*found)
    p, true = (torch.stack(means).double().numpy() + 1) / 2, split.masks > 127  # (K, n, 1, H, W)
    p, each = p.mean(0).clip(0, 1), metrics.shares(p.swapaxes(0, 1), lungs)
    whole = metrics.pixels_of(lungs, true)
    if networks[0][1].supervised:
        variance = (p * (1 - p)).sum((1, 2, 3))
        spreads = {"pixels, independent": variance**0.5 / whole, "pixels, alike": variance / whole}
        spreads |= {f"{K} networks": each.std(1, ddof=1)} if K > 1 else {}
        estimate, samples = each.mean(1), each if K > 1 else None
    else:
        samples = np.concatenate(areas, 1) / whole[:, None]
        estimate, spreads = samples.mean(1), {f"{masks} masks": samples.std(1, ddof=1)}
    dice = metrics.scores(metrics.confusion(p > 0.5, true).pooled())["DICE index"]
    quality = {"DICE": dice, "calibration error": metrics.expected_calibration_error(p, true)}
    return Shares(metrics.shares(true[:, None], lungs)[:, 0], estimate, spreads, samples, quality)


def intervals(held_out, new):
    """How good the intervals of `new` Shares are, a row for each spread: a list of dicts.

    raw        the central interval of the samples, as they come
    conformal  estimate ± factor spread, the factor learned on the held-out training images. Its law
               for the CRPS is estimate + spread (true - estimate) / spread of each held-out image
    """
    rows, true = [], new.true
    error = new.estimate - true
    facts = {"bias": float(error.mean()), "mean absolute error": float(abs(error).mean())}
    for name, spread in new.spreads.items():
        spread, before = np.maximum(spread, 1e-6), np.maximum(held_out.spreads[name], 1e-6)
        misses = held_out.true - held_out.estimate
        half = metrics.conformal_factor(abs(misses), before) * spread
        law = new.estimate[:, None] + spread[:, None] * (misses / before)
        row = {"spread": name} | new.quality | facts
        if new.samples is not None and name[0].isdigit():
            row["raw"] = interval_facts(*metrics.central_interval(new.samples), true)
            row["raw"]["CRPS"] = metrics.crps(new.samples, true)
        row["conformal"] = interval_facts(new.estimate - half, new.estimate + half, true)
        rows.append(row | {"conformal": row["conformal"] | {"CRPS": metrics.crps(law, true)}})
    return rows


def interval_facts(low, high, true):
    """Coverage, mean width and interval score."""
    width, score = float(np.mean(high - low)), metrics.interval_score(low, high, true)
    return {"coverage": metrics.coverage(low, high, true), "width": width, "interval score": score}


# ---------------------------------------- the command


def table(result):
    """What a study found, as Markdown."""
    if "maps" in result:
        return table_of_maps(result["maps"])
    rows = result["rows"]
    return table_of_shares(rows) if rows and "spread" in rows[0] else table_of_labels(rows)


def table_of_maps(maps):
    """What `anomalies` found, a row for each map."""
    names = ("AUROC", "DICE index", "Sensitivity", "Specificity")
    lines = ["| map | AUROC | DICE | Sensitivity | Specificity |", "|---" * 5 + "|"]
    for name, found in maps.items():
        lines.append(evaluate.row_of([name, *(f"{found[key]:.3f}" for key in names)]))
    return "\n".join(lines)


def table_of_labels(rows):
    """What `few_labels` found, mean ± standard deviation over the draws."""
    lines = ["| labelled images | probe | from scratch |", "|---" * 3 + "|"]
    for n in sorted({row["labels"] for row in rows}):
        cells = [str(n)]
        for name in ("probe", "from scratch"):
            values = [row[name] for row in rows if row["labels"] == n]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        lines.append(evaluate.row_of(cells))
    return "\n".join(lines)


def table_of_shares(rows):
    """What `intervals` found, a row for each spread."""
    names = ("raw: coverage", "width", "CRPS", "conformal: coverage", "width", "CRPS")
    lines = [evaluate.row_of(["spread", "DICE", "bias", "mean absolute error", *names])]
    lines.append("|---" * 10 + "|")
    for row in rows:
        cells = [row["spread"], f"{row['DICE']:.4f}", f"{row['bias']:+.4f}"]
        cells.append(f"{row['mean absolute error']:.4f}")
        for kind in ("raw", "conformal"):
            found = row.get(kind) or dict.fromkeys(("coverage", "width", "CRPS"), math.nan)
            cells += [f"{found['coverage']:.2f}", f"{found['width']:.4f}", f"{found['CRPS']:.5f}"]
        lines.append(evaluate.row_of(cells).replace("nan", ""))
    return "\n".join(lines)


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("studies.py", description=__doc__, formatter_class=formatter)
    p.add_argument("study", choices=("anomalies", "labels", "shares"))
    p.add_argument("runs", type=path_of, nargs="+", metavar="RUN", help="folders of trained runs")
    task = dict(choices=("lung", "infection"), default="infection")
    p.add_argument("--task", **task, help="labels: what the masks show; default %(default)s")
    number, counts = dict(type=int, metavar="N"), dict(nargs="+", default=[5, 10, 20, 50])
    p.add_argument("--labels", **number, **counts, help="numbers of labelled images")
    p.add_argument("--draws", **number, default=5, help="how often these images are drawn anew")
    p.add_argument("--images", **number, default=64, help="of validation, at most; shares: all")
    p.add_argument(
        "--masks", **number, default=25, help="shares: of each X-ray; default %(default)s"
    )
    p.add_argument("--ddim-steps", **number, help="shares: passes a mask; default: the run's")
    p.add_argument("--test", action="store_true", help="shares: of the Test split, not of Val")
    p.add_argument("--data", type=path_of, metavar="DIR", help="COVID-QU-Ex; default: the run's")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", type=path_of, metavar="FILE", help="write all numbers there as JSON")
    return p.parse_args(argv)


def check(args, networks):
    """Refuse numbers out of range, runs that have not learned what the study needs, a bad --out."""
    for name in ("labels", "draws", "images", "masks"):
        least = min(np.atleast_1d(getattr(args, name)))
        refuse(least < 1, f"--{name} must be at least 1, got {least}")
    first = networks[0][1]
    if args.study == "shares":
        rule = f"--masks must be at least 2 for each of {len(networks)} runs, got {args.masks}"
        refuse(args.masks < 2 * len(networks), rule)
        alike = ("task", "supervised", "held_out", "image_size", "classes", "data")
        for run, (_, cfg) in zip(args.runs, networks):
            refuse(cfg.task == "synthesis", f"{run} draws X-rays; shares are of masks")
            refuse(not cfg.held_out, f"{run} must be trained with --set held_out=0.2, got 0")
            other = [name for name in alike if getattr(cfg, name) != getattr(first, name)]
            refuse(other, f"{run} differs from {args.runs[0]} in {', '.join(other)}")
    else:
        run, rule = args.runs[0], f"{args.study} takes one run"
        refuse(len(networks) > 1, f"{rule}, got {' '.join(args.runs)}")
        refuse(first.task != "synthesis", f"{run} must be a synthesis run, got {first.task}")
        rule = f"{run} must have learned healthy X-rays alone (--classes Normal)"
        others = args.study == "anomalies" and first.classes != ("Normal",)
        refuse(others, f"{rule}, got {', '.join(first.classes)}")
    if args.out:
        out = Path(args.out).absolute()
        place = next(folder for folder in out.parents if folder.exists())
        earlier = out.is_file() and out.read_bytes().startswith(b'{\n "study": ')
        writable = place.is_dir() and os.access(place, os.W_OK) and (earlier or not out.exists())
        rule = "--out must be a new file where one can be written, or a result of studies.py"
        refuse(not writable, f"{rule}, got {args.out}")


def shares(args, networks, root, device):
    """The study of shares: a dict for results/."""
    cfg, name = networks[0][1], "Test" if args.test else "Val"

    def parts(masks=None):
        which = (cfg.classes, cfg.image_size)
        Train, new = (data.load(root, cfg.task, s, *which, masks=masks) for s in ("Train", name))
        return data.divided(Train, cfg.held_out)[1], new

    infection = cfg.task == "infection"
    lungs = [split.masks > 127 for split in parts("lung masks")] if infection else (None, None)
    both, masks = parts(), len(networks) if cfg.supervised else args.masks
    passes, n = evaluate.passes_of(cfg), sum(len(split.images) for split in both)
    progress = passes_line("segmenting: passes", n * masks * passes)
    found = [shares_of(networks, s, w, args.masks, device, progress) for s, w in zip(both, lungs)]
    facts = {"runs": args.runs, "task": cfg.task, "masks": masks, "passes": passes}
    facts |= {"split": name, "images": len(found[1].true), "held out": len(found[0].true)}
    return facts | {"rows": intervals(*found)}


def carry_out(args):
    """The study that the command line asks for. Returns the exit status."""
    device = devices.choose_device(args.device)
    networks = []
    for run in args.runs:
        model, cfg, step = runs.load_run(run, device)
        cfg = dataclasses.replace(cfg, ddim_steps=args.ddim_steps or cfg.ddim_steps)
        config.check(cfg)
        networks.append((model, cfg))
    check(args, networks)
    cfg = phantoms.find_data(cfg, args.data)
    task = {"anomalies": "infection", "labels": args.task, "shares": cfg.task}[args.study]
    if Path(cfg.data) == phantoms.PHANTOMS:
        phantoms.ensure_phantoms(task, progress_line("drawing phantoms"))
    how = (args.images, progress_line(args.study))
    if args.study == "anomalies":
        result = anomalies(model, cfg, cfg.data, device, *how)
    elif args.study == "labels":
        rows = few_labels(model, cfg, task, cfg.data, device, args.labels, args.draws, *how)
        result = {"task": task, "images": args.images, "rows": rows}
    else:
        result = shares(args, networks, cfg.data, device)
    kind = "phantoms" if cfg.phantoms else "X-rays"
    message(f"{kind}, {' '.join(args.runs)}, step {step}\n\n{table(result)}")
    if args.out:
        what = {"study": args.study, "data": kind, "step": step, "seed": cfg.seed}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        runs.write_whole(Path(args.out), runs.as_json(what | result | runs.provenance(device)))
    return 0


def main(argv=None):
    args = parse(argv)
    less_memory = "try fewer --images, or --device cpu"
    return exit_status("studies.py", lambda: carry_out(args), less_memory, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
