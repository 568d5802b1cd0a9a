r"""A trained network in use: masks and X-rays sampled from it, and what §4.3 measures on them.

    python evaluate.py results/lung-add-phantoms.json results/infection-add-phantoms.json

prints the eight metrics of these runs beside those of the report's Tables 1 and 2.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import config
import data
import diffusion
import fullsize
import improved
import metrics
import score
import tables
from conditional import repeated
from console import Parser, UserError, exit_status, message, passes_line, path_of
from devices import autocast, cast_once, divided_among_processes, world
from memory import in_chunks

EVAL_SEED = 0  # chooses the images that are evaluated and their x_T, the same in every run (§4.3)
FULL_SIZE = "at the size of the files"
REPORT_TABLES = {  # Tables 1 and 2: (addition, concatenation)
    "lung": {
        "DICE index": (0.9529, 0.9541),
        "Jaccard index": (0.9101, 0.9123),
        "Accuracy": (0.9792, 0.9793),
        "Sensitivity": (0.9455, 0.9502),
        "Specificity": (0.9888, 0.9878),
        "Balanced Accuracy": (0.9672, 0.9793),
        "Precision": (0.9604, 0.9581),
        "MCC": (0.9396, 0.9408),
    },
    "infection": {
        "DICE index": (0.6755, 0.4708),
        "Jaccard index": (0.5105, 0.3087),
        "Accuracy": (0.9183, 0.8967),
        "Sensitivity": (0.6687, 0.3646),
        "Specificity": (0.9550, 0.9736),
        "Balanced Accuracy": (0.8119, 0.6691),
        "Precision": (0.6838, 0.6674),
        "MCC": (0.6293, 0.4431),
    },
    "masks": {},  # your own
}

# ---------------------------------------- sampling


def eps_model_of(model, cfg, s, device, progress=None, both=False):
    """The network as the samplers call it, eps_model(xt, t, e), whatever it predicts.

    e = model.embed(y), once for all steps. progress(images) is called after each pass. With `both`
    it answers (eps, v), see improved.py.
    """

    def eps_model(xt, t, e):
        with autocast(cfg, device):
            answer, v = improved.halves(model.denoise(xt, t, e).float(), xt)
        if progress:
            progress(len(xt))
        eps = diffusion.eps_of(s, cfg.target, answer, xt, t)
        return (eps, v) if both else eps

    return eps_model


def passes_of(cfg):
    """How often the network is called for one image."""
    N, T = cfg.ddim_steps, cfg.T
    if cfg.supervised:
        return 1
    exact = {
        "ddpm": T,
        "ode": 2 * ((N + 1) // 2) - 1,
        "pc": 2 * ((N - 1) // 2) + 1,
        "langevin": 10 * ((N - 1) // 10) + 1,
    }
    return exact.get(cfg.sampler, N)


def calls_of(cfg):
    """passes_of, doubled by guidance: one call with and one without what is given."""
    return passes_of(cfg) * (2 if cfg.guidance else 1)


def sample_with(cfg, s, eps_model, noise, e):
    """x_0 by cfg.sampler in at most cfg.ddim_steps passes (DDPM: T), with x_0_hat clipped.

    ode       the probability-flow ODE by Heun's method; the noise levels are evenly spaced in
              sigma^(1/7) down to 0.02, then 0
    sde, pc   the reverse SDE by Euler-Maruyama; pc with a step of Langevin dynamics before each,
              whose length is averaged over the images that are sampled together, as in [20]: with
              pc alone an image depends a little on its batch
    langevin  annealed Langevin dynamics over ten of the schedule's noise levels (score.ncsn_steps)
    """
    N, T = cfg.ddim_steps, s.T
    if cfg.sampler == "ddim":
        return diffusion.ddim_sample(s, eps_model, noise, e, N, cfg.eta)
    if cfg.sampler in ("ddpm", "strided"):
        return improved.ancestral(cfg, s, eps_model, noise, e)
    process = score.process_of(T, cfg.pixel_shift)
    at_time = score.score_of_eps(process, eps_model, T, e, clip=True)
    at_level = score.score_at_level(process, at_time)
    if cfg.sampler == "ode":
        largest = score.level(process, 1.0)
        sigmas = score.on_grid(process, score.heun_levels(largest, 0.02, (N + 1) // 2), T)
        return score.ode_heun(at_level, sigmas[0] * noise(), sigmas)
    if cfg.sampler == "langevin":
        sigmas = [score.level(process, k / T) for k in score.ncsn_steps(T)]
        return score.langevin(at_level, noise, sigmas, (N - 1) // 10, step=0.2 * sigmas[-1] ** 2)
    if cfg.sampler == "pc":
        ts = score.times((N - 1) // 2, 1 / T, T, rho=2.0)
        return score.reverse_sde(process, at_time, noise, ts, correct=0.16)
    return score.reverse_sde(process, at_time, noise, score.times(N - 1, 1 / T, T, rho=2.0))


@torch.inference_mode()
def sample_masks(model, cfg, y, index, members=1, device="cpu", progress=None, seed=EVAL_SEED):
    """Masks of X-rays: (B, members, 1, H, W) in [-1, 1].

    A supervised model has one, its probability p as 2 p - 1.
    y      (B, 1, H, W) in [-1, 1], on the device
    index  B ints: the noise of image i comes from (seed, i) alone
    """
    if cfg.supervised:
        with autocast(cfg, device):
            probability = model(y).float().sigmoid()
        if progress:
            progress(len(y))
        return (2 * probability - 1)[:, None]
    s = improved.schedule_of(cfg, device)
    with autocast(cfg, device):
        e = repeated(model.embed(y), members)
    noise = diffusion.ImageNoise(seed, index, y.shape[1:], members, device)
    eps_model = eps_model_of(model, cfg, s, device, progress, cfg.learned)
    x0 = sample_with(cfg, s, eps_model, noise, e)
    return data.without_nan(x0).unflatten(0, (len(y), members))


def segment(model, cfg, images, rows, device, progress=None):
    """The mask of each X-ray of these rows: (n, 1, H, W) float32 in [-1, 1], on the CPU.

    images: (N, 1, H, W) uint8. The mask is the mean of cfg.ensemble samples.
    """

    def mean(chunk, masks):
        return masks.mean(1)

    return sampled(mean, images.shape[1:], model, cfg, images, rows, device, progress)


def sampled(numbers_of, shape, model, cfg, images, rows, device, progress=None):
    """numbers_of(chunk of the rows, their masks) -> (n, *shape), for all rows, on the CPU.

    masks: (n, cfg.ensemble, 1, H, W) in [-1, 1]. They are drawn in chunks, on every process, and
    let go when their numbers are known.
    """
    model = cast_once(model, cfg)

    def numbers(chunk):
        y = data.to_float(images[chunk]).to(device)
        masks = sample_masks(model, cfg, y, chunk, cfg.ensemble, device, progress)
        return numbers_of(chunk, masks.cpu())

    return on_all_processes(numbers, rows, shape, device, cfg.ensemble)


def on_all_processes(function, rows, shape, device, members=1):
    """function(chunk of the rows) -> (n, *shape), for all rows: in chunks, on every process."""

    def rows_of(i):
        answers = [answer for _, answer in in_chunks(function, rows[i], device, members)]
        return torch.cat([torch.empty(0, *shape), *answers])

    return divided_among_processes(rows_of, len(rows))


# ---------------------------------------- measuring: §4.3


def evaluated_rows(N, n):
    """The rows of a split that every evaluation samples: n of N at random, alike in every run."""
    return np.sort(np.random.default_rng(EVAL_SEED).permutation(N)[:n])


def images_sampled(cfg, sizes):
    """How many images one evaluation passes through the network, counted once for each pass.

    sizes: {split: number of images}
    """
    if cfg.task == "synthesis":
        return min(sizes["Val"] // 2, cfg.eval_images) * calls_of(cfg)
    n = sum(min(size, cfg.eval_images) for size in sizes.values())
    return n * passes_of(cfg) * cfg.ensemble


def progress_of(cfg, what, sizes, check=lambda: None):
    """progress(images) that shows how far this process has come with an evaluation."""
    total = images_sampled(cfg, sizes) // world()
    return passes_line(f"evaluating {what}: passes", total, check)


def time_left(cfg, sizes, step, each, evaluate_s=0.0):
    """Seconds from `step` to the end of a run, evaluations included.

    sizes       {split: number of images}
    each        seconds a step
    evaluate_s  seconds an evaluation; 0: not yet measured, so a pass counts as a third of a step
    """
    passes = images_sampled(cfg, sizes) / cfg.batch_size
    evaluations = -(-cfg.steps // cfg.eval_every) - step // cfg.eval_every
    return (cfg.steps - step) * each + evaluations * (evaluate_s or passes * each / 3)


def evaluate_masks(model, cfg, splits, device, progress=None):
    """The eight metrics on the evaluated rows of each split.

    Returns {split: {"images": n, "pooled": {name: value}, "per image": {name: (mean, sd, n)}}} and,
    of the last split, what figures.mask_grid shows: X-rays, true masks, masks, DICE of each. Where
    the split has files it has FULL_SIZE too, see fullsize.scores; of an ensemble "share", see
    metrics.share_report.
    """
    report, shown = {}, None
    for name, split in splits.items():
        rows = evaluated_rows(len(split.images), cfg.eval_images)
        true = split.masks[rows] > 127
        masks, areas, distances = ensembles(model, cfg, split, rows, device, progress)
        counts = metrics.confusion(masks, true)
        pooled, each = metrics.scores(counts.pooled()), metrics.per_image(counts)
        report[name] = {"images": len(rows), "pooled": pooled, "per image": each}
        if cfg.ensemble > 1:
            p, lungs = ((masks + 1) / 2).clamp(0, 1), lungs_of(cfg, name, rows)
            share = metrics.share_report(p.numpy(), areas, true, lungs)
            report[name]["share"] = share | {"energy distance": float(distances.mean())}
        if split.files:
            files = [split.files[row] for row in rows]
            report[name][FULL_SIZE] = fullsize.scores(masks, files, cfg.threshold)
        dice = metrics.scores(counts)["DICE index"]
        shown = split.images[rows], split.masks[rows], data.to_uint8(masks), dice
    return report, shown


def ensembles(model, cfg, split, rows, device, progress=None):
    """cfg.ensemble masks of each X-ray of these rows, and what is kept of them.

    Returns their mean, (n, 1, H, W) float32 in [-1, 1] on the CPU; how many pixels of each are
    positive, (n, N); and metrics.energy_distance between them and the true mask, (n,).
    """
    shape = split.images.shape[1:]

    def numbers(chunk, masks):
        inside, true = masks > 0, split.masks[chunk, None] > 127
        distance = torch.from_numpy(metrics.energy_distance(inside, true))
        return torch.cat([masks.mean(1).flatten(1), inside.flatten(2).sum(2), distance[:, None]], 1)

    parts = math.prod(shape), cfg.ensemble, 1
    found = sampled(numbers, (sum(parts),), model, cfg, split.images, rows, device, progress)
    mean, areas, distances = found.split(parts, 1)
    return mean.reshape(-1, *shape), areas.double().numpy(), distances[:, 0].double().numpy()


def lungs_of(cfg, split, rows):
    """The lungs of which an infection's share is reported, (n, 1, H, W) bool; of lungs None."""
    if cfg.task != "infection":
        return None
    how = dict(classes=cfg.classes, image_size=cfg.image_size, masks="lung masks")
    return data.load(cfg.data, cfg.task, split, **how).masks[rows] > 127


def quality(line):
    """What makes an evaluation better than another: validation DICE, or minus Eq. (7)'s loss."""
    val = line["Val"]
    number = val["pooled"]["DICE index"] if "pooled" in val else -val["loss"]
    return -math.inf if math.isnan(number) else number


def headline(measured):
    """One split's evaluation in a word and a number: "DICE 0.9740", "loss 0.0312"."""
    if "pooled" in measured:
        return f"DICE {measured['pooled']['DICE index']:.4f}"
    return f"loss {measured['loss']:.4f}"


# ---------------------------------------- tables


def markdown_table(cfg, line, split="Val"):
    """An evaluation, as a line of log.jsonl, beside the report's Table 1 or 2; as Markdown.

    KeyError, TypeError or ValueError: the line is not an evaluation of such a run.
    """
    what = f"step {line['step']}, {cfg.images_are}"
    if cfg.task == "synthesis":
        lines = [f"| synthesis, {what} | validation |", "|---|---|"]
        lines.append(f"| Train loss | {line['Train']['loss']:.4f} |")
        names = ("loss", "Fréchet distance", "Fréchet distance of two held-out halves")
        return "\n".join([*lines, *(f"| {name} | {line['Val'][name]:.4f} |" for name in names)])
    report, number = REPORT_TABLES[cfg.task], {"lung": 1, "infection": 2}.get(cfg.task)
    n, m = line["Train"]["images"], line[split]["images"]
    of = {"Val": "held-out train" if cfg.held_out else "validation"}.get(split, split)
    columns = [f"{config.kind_of(cfg, ' masks')}, {what}"]
    columns += [f"report, Table {number}: addition", "report: concatenation"] if report else []
    columns += [f"here: {n} of train", f"**here: {m} of {of}**", "mean ± sd of the images"]
    lines = []
    for name in metrics.NAMES:
        mean, sd, _ = line[split]["per image"][name]
        train, val = line["Train"]["pooled"][name], line[split]["pooled"][name]
        numbers = [f"{value:.4f}" for value in (*report.get(name, ()), train)]
        lines.append([name, *numbers, f"**{val:.4f}**", f"{mean:.4f} ± {sd:.4f}"])
    found = tables.table(columns, lines)
    if full := line[split].get(FULL_SIZE):
        numbers = "DICE {DICE index:.4f}, outlines {outline distance:.2f} pixels apart"
        found += f"\n\nAt the size of the files, {of}: {numbers.format(**full)}."
    return with_note(found)


def tables_of(cfg, line, tested):
    """{file: table} of an evaluation, and of Test where there is {"Test": as evaluate_masks}."""
    files = {"table.md": markdown_table(cfg, line)}
    return files | ({"test.md": markdown_table(cfg, line | tested, "Test")} if tested else {})


def with_note(table):
    """The table, with a note where it quotes the misprint of Table 1."""
    cell = "| Balanced Accuracy | 0.9672 | 0.9793"
    note = "\n\n† a misprint: (0.9502 + 0.9878) / 2 = 0.9690"
    return table.replace(cell, f"{cell}†") + note * (cell in table)


def comparison(results):
    """The eight metrics of published runs beside the report's, as Markdown.

    results: dicts as in results/*.json, of lung and infection runs; validation, pooled over pixels
    """
    columns = [("", list(metrics.NAMES))]
    for task, table in REPORT_TABLES.items():
        runs = [result for result in results if result["config"]["task"] == task]
        for i, cond in enumerate(("add", "concat")):
            if runs and table:
                numbers = [f"{table[name][i]:.4f}" for name in metrics.NAMES]
                columns.append((f"report: {task}, {cond}", numbers))
        for run in runs:
            cfg = config.from_dict(run["config"])
            pooled = run["evaluation"]["Val"]["pooled"]
            numbers = [f"{pooled[name]:.4f}" for name in metrics.NAMES]
            columns.append((f"{cfg.images_are}: {config.kind_of(cfg)}", numbers))
    titles, columns = zip(*columns)
    return with_note(tables.table(titles, zip(*columns)))


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("evaluate.py", description=__doc__, formatter_class=formatter)
    p.add_argument("results", type=path_of, nargs="+", metavar="FILE", help="results.json of masks")
    return p.parse_args(argv)


def read_result(path):
    """The dict of a results.json. UserError: not one, a damaged one, or of a synthesis run."""
    if not Path(path).is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: there is no file of that name")
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        REPORT_TABLES[result["config"]["task"]], comparison([result])
    except Exception as e:  # a value of another type can raise a dozen
        raise UserError(f"{path}: not the results.json of a run that has masks") from e
    return result


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)

    def work():
        message(comparison([read_result(path) for path in args.results]))
        return 0

    return exit_status("evaluate.py", work, "there is little to save", "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
