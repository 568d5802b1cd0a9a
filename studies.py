r"""Three studies with a trained network that never saw a mask: two of §4.1, one of [10].

    python studies.py anomalies runs/synthesis-Normal-0      infections as what is not expected [12]
    python studies.py labels runs/synthesis-0 --task lung    masks from 5 to 50 labelled images [3]
    python studies.py likelihood runs/synthesis-0            bits per dimension in few passes [10]

anomalies  The run has learned --classes Normal. Its maps of what it does not expect in COVID-19
           X-rays, inside the lungs, are held against the true infections.
labels     A pixel classifier on the run's activations, and the same U-Net from scratch, both
           trained on the same few labelled images.
likelihood The variational bound (§2) of X-rays, for each variance of Eq. (5) and number of passes;
           the learned variance for a run with --set variance=learned.

Each prints a table of what it finds on validation. --out FILE writes all numbers as JSON.
"""

import argparse
import dataclasses
import functools
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
import improved
import memory
import metrics
import networks
import phantoms
import probes
import runs
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
    s, x0 = improved.schedule_of(cfg, device), images.to(device)
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
    s, n = improved.schedule_of(cfg, device), len(model.unet.decoder)
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
    net = networks.build_model(dataclasses.replace(cfg, seed=seed, variance="beta")).to(device)
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


# ---------------------------------------- bits per dimension [10]


def bounds(model, cfg, images, rows, variance, passes, device, progress=None):
    """The variational bound of these rows, (n,) float64 in bits per dimension, for 8-bit levels.

    images    (N, 1, H, W) uint8
    variance  of improved.VARIANCES; "learned" needs a network that has learned it
    passes    of the network, 2..T; progress(images) is called after each

    x0_hat is clipped, as in sampling. The noise of image i comes from i alone: it is the same for
    every variance and every network.
    """
    learned, s = variance == "learned", improved.schedule_of(cfg, device)
    eps_model = evaluate.eps_model_of(model, cfg, s, device, progress, learned)
    s, eps_model = improved.walk(s, eps_model, passes, learned)

    def of_chunk(chunk):
        x0 = data.to_float(images[chunk]).to(device)
        key = evaluate.EVAL_SEED, chunk, x0.shape[1:], 1, device, Purpose.LIKELIHOOD
        how = dict(variance=improved.fixed(variance), clip=True)
        return diffusion.vlb_terms(s, eps_model, x0, diffusion.ImageNoise(*key), **how).sum(0)

    found = [bits.cpu() for _, bits in memory.in_chunks(of_chunk, rows, device)]
    return torch.cat(found).double().numpy()


def likelihood(model, cfg, images, passes, device, n):
    """The bounds of n X-rays for each variance that the run has, and each number of passes.

    images: (N, 1, H, W) uint8, of validation. Returns a list of {"passes", "variance", "bits": one
    number an image}.
    """
    rows = evaluate.evaluated_rows(len(images), n)
    fixed = cfg.variance != "learned"
    variances = improved.VARIANCES[:2] if fixed else improved.VARIANCES
    total = len(rows) * len(variances) * sum(set(passes))
    progress, found = passes_line("likelihood: passes", total), []
    for k in dict.fromkeys(passes):
        for variance in variances:
            bits = bounds(model, cfg, images, rows, variance, k, device, progress)
            found.append({"passes": k, "variance": variance, "bits": bits.tolist()})
    return found


# ---------------------------------------- the command


def table(result):
    """What a study found, as Markdown."""
    if "bounds" in result:
        return table_of_bounds(result["bounds"])
    return table_of_maps(result["maps"]) if "maps" in result else table_of_labels(result["rows"])


def table_of_bounds(bounds):
    """What `likelihood` found, a row for each number of passes: mean ± standard error."""
    names = list(dict.fromkeys(found["variance"] for found in bounds))
    columns = ["passes", *(f"bits per dimension, {name}" for name in names)]
    rows = {found["passes"]: [str(found["passes"])] for found in bounds}
    for found in bounds:
        bits = np.array(found["bits"])
        error = f" ± {bits.std(ddof=1) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
        rows[found["passes"]].append(f"{bits.mean():.4f}{error}")
    return tables.table(columns, rows.values())


def table_of_maps(maps):
    """What `anomalies` found, a row for each map."""
    names = ("AUROC", "DICE index", "Sensitivity", "Specificity")
    rows = [[name, *(f"{found[key]:.3f}" for key in names)] for name, found in maps.items()]
    return tables.table(["map", "AUROC", "DICE", "Sensitivity", "Specificity"], rows)


def table_of_labels(rows):
    """What `few_labels` found, mean ± standard deviation over the draws."""
    lines = []
    for n in sorted({row["labels"] for row in rows}):
        cells = [str(n)]
        for name in ("probe", "from scratch"):
            values = [row[name] for row in rows if row["labels"] == n]
            cells.append(tables.spread(values))
        lines.append(cells)
    return tables.table(["labelled images", "probe", "from scratch"], lines)


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("studies.py", description=__doc__, formatter_class=formatter)
    p.add_argument("study", choices=("anomalies", "labels", "likelihood"))
    p.add_argument("run", type=path_of, metavar="RUN", help="folder of a trained synthesis run")
    task = dict(choices=("lung", "infection"), default="infection")
    p.add_argument("--task", **task, help="labels: what the masks show; default %(default)s")
    number, counts = dict(type=int, metavar="N"), dict(nargs="+", default=[5, 10, 20, 50])
    p.add_argument(
        "--labels", **number, **counts, help="labels: images with a mask; default 5 10 20 50"
    )
    p.add_argument(
        "--draws", **number, default=5, help="labels: how often they are drawn; default 5"
    )
    default = [25, 50, 100, 1000]
    p.add_argument(
        "--passes", **number, nargs="+", default=default, help="likelihood; default 25 50 100 1000"
    )
    p.add_argument("--images", **number, default=64, help="of validation, at most; default 64")
    p.add_argument("--data", type=path_of, metavar="DIR", help="COVID-QU-Ex; default: the run's")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", type=path_of, metavar="FILE", help="write all numbers there as JSON")
    return p.parse_args(argv)


def check(args, cfg):
    """Refuse numbers out of range, a run that has not learned what the study needs, a bad --out."""
    for name in ("labels", "draws", "images"):
        least = min(np.atleast_1d(getattr(args, name)))
        refuse(least < 1, f"--{name} must be at least 1, got {least}")
    rule = f"{args.run} must be a synthesis run, got {cfg.task}"
    refuse(cfg.task != "synthesis", rule)
    rule = f"{args.run} must draw X-rays, from noise alone"
    refuse(cfg.given or cfg.draw != "X-rays", f"{rule}, got {config.kind_of(cfg)}")
    rule = f"{args.run} must have learned healthy X-rays alone (--classes Normal)"
    others = args.study == "anomalies" and cfg.classes != ("Normal",)
    refuse(others, f"{rule}, got {', '.join(cfg.classes)}")
    for passes in args.passes if args.study == "likelihood" else ():
        rule = f"--passes must be between 2 and T = {cfg.T}"
        refuse(not 2 <= passes <= cfg.T, f"{rule}, got {passes}")
    refuse_out(args.out, "studies.py", STARTS)


STARTS = '{\n "study": '  # what a result of studies.py starts with


def carry_out(args):
    """The study that the command line asks for. Returns the exit status."""
    device = devices.choose_device(args.device)
    model, cfg, step = runs.load_run(args.run, device)
    check(args, cfg)
    cfg = phantoms.find_data(cfg, args.data)
    task = {"anomalies": "infection", "likelihood": cfg.task}.get(args.study, args.task)
    if Path(cfg.data) == phantoms.PHANTOMS:
        phantoms.ensure_phantoms(task, progress_line("drawing phantoms"))
    how = (args.images, progress_line(args.study))
    if args.study == "likelihood":
        images = phantoms.splits_of(cfg, ["Val"])["Val"].images
        result = {"bounds": likelihood(model, cfg, images, args.passes, device, args.images)}
    elif args.study == "anomalies":
        result = anomalies(model, cfg, cfg.data, device, *how)
    else:
        rows = few_labels(model, cfg, task, cfg.data, device, args.labels, args.draws, *how)
        result = {"task": task, "images": args.images, "rows": rows}
    kind = cfg.images_are
    message(f"{kind}, {args.run}, step {step}\n\n{table(result)}")
    if args.out:
        what = {"study": args.study, "data": kind, "step": step, "seed": cfg.seed}
        runs.write_result(args.out, what | result, device)
    return 0


def main(argv=None):
    args = parse(argv)
    less_memory = "try fewer --images, or --device cpu"
    return exit_status("studies.py", lambda: carry_out(args), less_memory, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
