r"""The other ways to segment of §4.1: a diffusion model that never saw a mask, and many masks instead of one.

anomaly maps, Pinaya et al. [12]               anomaly_map, reconstruct: a network of healthy X-rays is wrong where an X-ray is not healthy
label-efficient features, Baranchuk et al. [3] recorded, features, fit, classify: activations of the decoder, and a pixel classifier on them
ensembles, Amit et al. [1], Wolleb et al. [21] agreement, calibration, expected_dice: what N masks of one X-ray say together

x_0, eps and eps_model as in diffusion.py: (B, 1, H, W), images in [-1, 1]. Two studies run from the command line:

    python train.py --task synthesis --classes Normal && python probes.py anomalies runs/synthesis-Normal-0
    python probes.py labels runs/synthesis-0 --task infection
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # as train.py
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
import diffusion
import metrics
import train
from diffusion import ddim_sample, q_sample

# ------------------------------------------------------------------------------------- anomaly maps [12]


@torch.inference_mode()
def anomaly_map(s, eps_model, x0, ts, noise, y=None):
    r"""Eq. (7) pixel by pixel, mean over steps and noises, and the same without the square: two maps (B, 1, H, W).

        loss    mean_t (eps_theta(x_t, t) - eps)^2,   0 or more
        signed  mean_t (eps_theta(x_t, t) - eps),     where eps_theta - eps = sqrt(abar_t / (1 - abar_t)) (x_0 - x_0_hat): above 0
                where the image is brighter than the network expects. Errors that point both ways cancel

    ts       the steps, such as range(400, 601, 10); a step that is listed twice is visited with two noises
    noise()  fresh eps (B, 1, H, W) for each of them
    """
    loss, signed = torch.zeros_like(x0), torch.zeros_like(x0)
    for t in ts:
        eps = noise()
        error = eps_model(q_sample(s, x0, t, eps), torch.full((len(x0),), t, device=x0.device), y) - eps
        loss += error.square()
        signed += error
    return loss / len(ts), signed / len(ts)


def reconstruct(s, eps_model, x0, t, steps, eps, y=None):
    r"""The X-ray as the network would have it: noised to step t by Eq. (2), denoised by DDIM in `steps` passes."""
    return ddim_sample(s, eps_model, lambda: q_sample(s, x0, t, eps), y, steps, start=t)


# ------------------------------------------------------------------------------------- label-efficient features [3]


@contextlib.contextmanager
def recorded(modules):
    """The output of the last call of each module while the context is open: {name: tensor}. Hooks that change nothing, removed at the end.

    modules  {name: module}
    """
    seen = {}
    hooks = [m.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output})) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def features(s, unet, x0, ts, blocks, noises):
    """What the decoder makes of each pixel: (B, D, H, W) float32, activations at every step of ts, blocks within a step.

    unet    an unconditional unet.UNet
    blocks  which of unet.decoder, such as (2, 3, 4, 5); their outputs are enlarged to H x W, bilinearly
    noises  (R, 1, H, W): each for all steps and, as [3] advises, for all images; the activations are the mean over the R ([3] has one)
    """

    def activations(t, eps):
        unet(q_sample(s, x0, t, eps.expand_as(x0)), torch.full((len(x0),), t, device=x0.device))
        return torch.cat([F.interpolate(seen[i].float(), size=x0.shape[2:], mode="bilinear") for i in blocks], 1)

    with recorded({i: unet.decoder[i] for i in blocks}) as seen:
        return torch.cat([sum(activations(t, eps) for eps in noises) / len(noises) for t in ts], 1)


def pixels(x):
    """(B, D, H, W) -> (B H W, D): what a pixel classifier takes."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_classifier(D):
    """D numbers of a pixel -> its logit: two hidden layers of 128 and 32 with ReLU and batch norm [3]."""
    hidden = [[nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b)] for a, b in ((D, 128), (128, 32))]
    return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(32, 1))


def fit(x, positive, members=10, steps=2000, batch=64, lr=1e-3, seed=0):
    """An ensemble of pixel classifiers [3], each from its own weights and its own order of the pixels: a list of modules.

    x         (pixels, D) features, such as pixels(features(...))
    positive  (pixels,) bool
    steps     of Adam, `batch` pixels each
    """
    classifiers = []
    for member in range(members):
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
            torch.manual_seed(1000 * seed + member)
            classifier = pixel_classifier(x.shape[1]).to(x.device)
            optimizer = torch.optim.Adam(classifier.parameters(), lr)
            for _ in range(steps):
                rows = torch.randint(len(x), (batch,)).to(x.device)
                loss = F.binary_cross_entropy_with_logits(classifier(x[rows])[:, 0], positive[rows].to(x.dtype))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        classifiers.append(classifier.eval().requires_grad_(False))
    return classifiers


def classify(classifiers, x):
    """(B, D, H, W) features -> (B, 1, H, W), the probability of a positive pixel, mean over the ensemble."""
    rows = pixels(x)
    p = sum(classifier(rows).sigmoid() for classifier in classifiers) / len(classifiers)
    return p.view(len(x), 1, *x.shape[2:])


# ------------------------------------------------------------------------------------- ensembles [1], [21]


def agreement(masks):
    """What N masks of each image say together: mean probability, variance, and share of the masks that side with the majority.

    masks  (B, N, 1, H, W) in [-1, 1], such as train.sample_masks returns. Three arrays (B, 1, H, W); the last is 0.5 to 1.
    """
    p = (masks + 1) / 2
    positive = (masks > 0).float().mean(1)
    return p.mean(1), p.var(1, unbiased=False), torch.maximum(positive, 1 - positive)


def calibration(p, true, bins=10):
    """Is a pixel of probability p positive p of the time? Three (bins,) arrays: mean p, share of positive pixels, number of pixels.

    p     any shape, 0..1;  true  bool, like p. nan where a bin is empty. Bins are of equal width, the last holds 1.
    """
    place = (p.flatten() * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    total = lambda x: torch.bincount(place, weights=x.flatten().double(), minlength=bins) / count
    return total(p), total(true), count


def expected_calibration_error(p, true, bins=10):
    """Mean of |mean p - share of positive pixels| over the bins of `calibration`, each weighted by its pixels."""
    mean, share, count = calibration(p, true, bins)
    filled = count > 0
    return float(((mean - share).abs() * count)[filled].sum() / count.sum())


def expected_dice(p, q):
    r"""DICE of a mask that is drawn from p against another that is drawn from q:   2 sum p q / (sum p + sum q).

    p, q  alike, each pixel's probability to be inside; of a certain mask 0 and 1. Any shape

    The quotient of expected numbers of pixels, exact where pixels are many, whatever they have to do with each other. With the right
    p, a network that samples perfectly scores expected_dice(p, p) against one truth, and the mask {p > 1/2} expected_dice(p > 0.5, p),
    which is more: a sample pays for its diversity.
    """
    p, q = p.double(), q.double()
    return float(2 * (p * q).sum() / (p.sum() + q.sum()))


# ------------------------------------------------------------------------------------- the study of anomaly maps

BAND = range(400, 601, 10)  # of steps, [12]
SMOOTH = 5  # pixels: a map is averaged over squares of this side, because one pixel's noise is as large as an opacity's residual
PERCENTILE = 95  # of the pixels in healthy lungs: what lies above is called an anomaly


def smooth(x):
    return F.avg_pool2d(x, SMOOTH, 1, SMOOTH // 2, count_include_pad=False)


def anomaly_maps(model, cfg, images, index, device):
    """Three maps of X-rays (B, 1, H, W) in [-1, 1]: {name: (B, 1, H, W) on the CPU}. Image i's noise comes from its index alone."""
    s = train.schedule(cfg.T, cfg.shift)
    net, x0 = train.eps_model_of(model, cfg, s, device), images.to(device)
    noise = lambda: diffusion.ImageNoise(train.EVAL_SEED, index, x0.shape[1:], device=device)
    fresh = noise()
    back = sum(reconstruct(s, net, x0, cfg.T // 2, 10, fresh()) for _ in range(4)) / 4
    loss, signed = anomaly_map(s, net, x0, BAND, noise())
    maps = {"loss, Eq. (7)": loss, "signed": signed, "X-ray - reconstruction": x0 - back}
    return {name: smooth(found).cpu() for name, found in maps.items()}


def anomalies(model, cfg, root, device, images=64, progress=None):
    """The infection masks of validation found by a network of healthy X-rays: a dict for results/, AUROC and DICE inside the lungs.

    A pixel is called infected above the PERCENTILE of the maps of healthy validation X-rays, in their lungs.
    """
    load = lambda task, classes, masks: data.load(root, task, "Val", classes, cfg.image_size, masks=masks)
    sick, lungs = load("infection", ("COVID-19",), None), load("infection", ("COVID-19",), "lung masks")
    well = load("lung", ("Normal",), None)
    found = []
    for k, (split, inside) in enumerate(((well, well.masks), (sick, lungs.masks))):
        rows, maps = train.chosen(len(split.images), images), []
        for i in range(0, len(rows), 16):
            piece = rows[i : i + 16]
            maps.append(anomaly_maps(model, cfg, data.to_float(split.images[piece]), piece, device))
            if progress:
                progress(k + (i + len(piece)) / len(rows), 2)
        found.append((rows, inside[rows] > 127, {name: torch.cat([m[name] for m in maps]).numpy() for name in maps[0]}))
    (healthy_rows, healthy_lungs, healthy), (rows, lung, maps) = found
    true, result = sick.masks[rows] > 127, {}
    gray = {"gray value itself": (sick.images[rows].astype(np.float32), well.images[healthy_rows].astype(np.float32))}
    for name, (here, there) in (gray | {name: (maps[name], healthy[name]) for name in maps}).items():
        threshold = float(np.percentile(there[healthy_lungs], PERCENTILE))
        scores = metrics.scores(metrics.confusion(here[lung][None] > threshold, true[lung][None]).pooled())
        result[name] = {"AUROC": metrics.auroc(here[lung], true[lung]), "threshold": threshold} | scores
    everything = metrics.scores(metrics.confusion(lung[lung][None], true[lung][None]).pooled())
    result["every pixel of the lungs"] = {"AUROC": 0.5} | everything
    return {"images": len(rows), "healthy images": len(healthy_rows), "infected share": float(true[lung].mean()), "maps": result}


# ------------------------------------------------------------------------------------- the study of few labels

STEPS = (50, 150, 250)  # where the activations are taken [3]; and in the middle half of the decoder's blocks
NOISES = 4  # over which they are averaged; one in [3]


def probe(model, cfg, x, positive, seed, device, members=10):
    """segment(images) -> probabilities: a pixel classifier on the network's activations. x (n, 1, H, W) and positive: labelled images."""
    s = train.schedule(cfg.T, cfg.shift)
    noises = diffusion.ImageNoise(train.EVAL_SEED, [seed], x.shape[1:], NOISES, device)()  # (NOISES, 1, H, W)
    n = len(model.unet.decoder)
    of = lambda images: features(s, model.unet, images.to(device), STEPS, range(n // 4, n - n // 4), noises)
    f = torch.cat([of(x[i : i + 8]) for i in range(0, len(x), 8)])
    classifiers = fit(pixels(f), positive.to(device).flatten(), members, steps=500, batch=256, seed=seed)
    return lambda images: torch.cat([classify(classifiers, of(images[i : i + 8])).cpu() for i in range(0, len(images), 8)])


def from_scratch(cfg, x, positive, seed, device, steps=200, batch=8):
    """segment(images) -> probabilities: the same U-Net with fresh weights, X-ray in, mask out in one pass (t fixed), trained on x."""
    net = train.build_model(dataclasses.replace(cfg, seed=seed)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    one_pass = lambda images: net(images.to(device), torch.ones(len(images), dtype=torch.long, device=device)).float()
    g, schedule = torch.Generator().manual_seed(seed), dataclasses.replace(cfg, steps=steps, warmup=steps // 10, lr_decay="cosine")
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (batch,), generator=g)
        with train.autocast(cfg, device):
            loss = F.binary_cross_entropy_with_logits(one_pass(x[rows]), positive[rows].float().to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(schedule, step)
        optimizer.step()
    net.requires_grad_(False)
    return lambda images: torch.cat([one_pass(images[i : i + 16]).sigmoid().cpu() for i in range(0, len(images), 16)])


def few_labels(model, cfg, task, root, device, labels=(5, 10, 20, 50), draws=5, images=64, progress=None):
    """DICE on validation of both, learned from the same few images: a list of {"labels", "draw", "probe", "from scratch"}."""
    Train, Val = (data.load(root, task, split, None, cfg.image_size) for split in ("Train", "Val"))
    if max(labels) > len(Train.images):
        raise train.UserError(f"--labels must be at most the {len(Train.images)} images of Train, got {max(labels)}")
    rows = train.chosen(len(Val.images), images)
    x, true = data.to_float(Val.images[rows]), Val.masks[rows] > 127
    dice = lambda p: metrics.scores(metrics.confusion(p, true, 0.5).pooled())["DICE index"]
    found = []
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(Train.images))
        for n in labels:  # of a draw, the fewer are among the more
            few, positive = data.to_float(Train.images[order[:n]]), torch.from_numpy(Train.masks[order[:n]] > 127)
            scores = {"probe": dice(probe(model, cfg, few, positive, draw, device)(x))}
            scores["from scratch"] = dice(from_scratch(cfg, few, positive, draw, device)(x))
            found.append({"labels": n, "draw": draw} | scores)
            if progress:
                progress(len(found), draws * len(labels))
    return found


# ------------------------------------------------------------------------------------- the command


def parse(argv):
    p = train.Parser(prog="probes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", choices=("anomalies", "labels"))
    p.add_argument("run", help="folder of a synthesis run; for anomalies, of healthy X-rays alone (--classes Normal)")
    p.add_argument("--task", choices=("lung", "infection"), default="infection", help="labels: what the masks show; default infection")
    p.add_argument("--labels", type=int, nargs="+", metavar="N", default=[5, 10, 20, 50], help="numbers of labelled images")
    p.add_argument("--draws", type=int, metavar="N", default=5, help="how often these images are drawn anew")
    p.add_argument("--images", type=int, metavar="N", default=64, help="of validation, at most")
    p.add_argument("--data", metavar="DIR", help="folder with COVID-QU-Ex; default: the run's own")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", metavar="FILE", help="write all numbers there as JSON")
    return p.parse_args(argv)


def table(result):
    """The numbers of a study as lines of Markdown."""
    if "maps" in result:
        lines = ["| map | AUROC | DICE | Sensitivity | Specificity |", "|---" * 5 + "|"]
        for name, v in result["maps"].items():
            numbers = (v[k] for k in ("AUROC", "DICE index", "Sensitivity", "Specificity"))
            lines.append(f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
        return "\n".join(lines)
    lines = ["| labelled images | probe | from scratch |", "|---" * 3 + "|"]
    for n in sorted({row["labels"] for row in result["rows"]}):
        values = {name: [row[name] for row in result["rows"] if row["labels"] == n] for name in ("probe", "from scratch")}
        spread = lambda v: f" ± {np.std(v, ddof=1):.4f}" if len(v) > 1 else ""
        lines.append(f"| {n} | " + " | ".join(f"{np.mean(v):.4f}{spread(v)}" for v in values.values()) + " |")
    return "\n".join(lines)


def study(args):
    device = train.choose_device(args.device)
    for name in ("labels", "draws", "images"):
        if min(np.atleast_1d(getattr(args, name))) < 1:
            raise train.UserError(f"--{name} must be at least 1, got {min(np.atleast_1d(getattr(args, name)))}")
    model, cfg, step = train.load_run(args.run, device)
    if cfg.task != "synthesis":
        raise train.UserError(f"{args.run} must be a run of --task synthesis, got {cfg.task}")
    if args.study == "anomalies" and cfg.classes != ("Normal",):
        raise train.UserError(f"{args.run} must have learned healthy X-rays alone (--classes Normal), got {', '.join(cfg.classes)}")
    task = "infection" if args.study == "anomalies" else args.task
    cfg = train.find_data(cfg, args.data)
    if Path(cfg.data) == data.PHANTOMS:
        data.ensure_phantoms(task, data.progress_line("drawing phantoms"))
    progress = data.progress_line(args.study)
    if args.study == "anomalies":
        result = anomalies(model, cfg, cfg.data, device, args.images, progress)
    else:
        result = {"task": task, "images": args.images}
        result["rows"] = few_labels(model, cfg, task, cfg.data, device, args.labels, args.draws, args.images, progress)
    what = {"study": args.study, "data": "phantoms" if cfg.phantoms else "X-rays", "step": step, "seed": cfg.seed}
    result = what | result | train.provenance(device)
    print(f"{what['data']}, {args.run}, step {step}\n\n{table(result)}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        train.write_whole(Path(args.out), train.as_json(result))
    return 0


def main(argv=None):
    args = parse(argv)
    return train.exit_status("probes.py", lambda: study(args), "try fewer --images, or --device cpu", "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
