r"""Several trained runs on the same images: how good, how soon, how certain.

    python compare.py dice runs/lung-report-unet-0 runs/lung-concat-0
    python compare.py time runs/lung-report-unet-0 runs/lung-concat-0
    python compare.py shares runs/infection-concat-0

dice    The DICE of each on all of validation, how much higher it is than that of the first run, and
        how far chance alone moves the difference. --full-size judges at the size of the mask files,
        where runs of any --image-size compare, and says how far apart the outlines are.
time    Minutes of training on this machine. The steps of all runs are timed in turns; the DICE at
        each time is that of the run's own evaluations.
shares  How far a share of the lungs may be off, said by the masks of diffusion or the probabilities
        of a supervised network: raw, and as a conformal interval. Several runs are one ensemble.
        They were trained with --set held_out=0.2; intervals are learned on what was held out.

dice and time take runs that differ in their seed alone together, in one row. A run folder is named
NAME-SEED. --out FILE.json writes all numbers; time draws its curves beside it, FILE.png.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import benchmark
import config
import data
import devices
import evaluate
import fullsize
import intervals
import metrics
import phantoms
import runs
import tables
from console import (
    Parser,
    UserError,
    exit_status,
    message,
    passes_line,
    path_of,
    refuse,
    refuse_out,
)
from diffusion import Purpose, philox

# ---------------------------------------- the runs


class Trained(NamedTuple):
    """A trained run. name: of its folder, without the seed."""

    run: str
    name: str
    model: torch.nn.Module
    cfg: config.Config


def read_run(run, device):
    """The Trained of a run folder."""
    model, cfg, _ = runs.load_run(run, device)
    return Trained(run, Path(run).name.removesuffix(f"-{cfg.seed}"), model, cfg)


def groups_of(trained):
    """{name: runs that differ in their seed alone}, in the order given.

    UserError: two runs of one name, NAME-SEED, differ in more. check looks at their data.
    """
    groups = {}
    for one in trained:
        group = groups.setdefault(one.name, [])
        group.append(one)
        alike = [dataclasses.asdict(other.cfg) | dict(seed=0, data=None) for other in group]
        other = [name for name, value in alike[0].items() if alike[-1][name] != value]
        rule = f"{one.run} differs from {group[0].run} in {', '.join(other)}"
        refuse(other, f"{rule}; give runs of different settings different names")
        seeds = [other.cfg.seed for other in group]
        again = one.cfg.seed in seeds[:-1]
        refuse(again, f"{one.run}: a run named {one.name} has its seed, {one.cfg.seed}")
    return groups


def trained_at(run):
    """The commit at which a run was trained, by its results.json; None where there is none."""
    file = Path(run, "results.json")
    return evaluate.read_result(file).get("commit") if file.exists() else None


def split_of(name, one, root, masks=None):
    """The images that a comparison looks at, as data.Split: Val, Test, or what a run held out."""
    cfg, place = dataclasses.replace(one.cfg, data=root), "Train" if name == "held-out" else name
    split = phantoms.splits_of(cfg, (place,), one.run, masks)[place]
    return data.divided(split, cfg.held_out)[1] if name == "held-out" else split


# ---------------------------------------- DICE, and how far chance moves it


def configure(cfg, way):
    """A run's settings, sampled as a way says: (masks averaged, passes of each)."""
    return dataclasses.replace(cfg, ensemble=way[0], ddim_steps=way[1])


class Judged(NamedTuple):
    """The masks of n images beside the true ones."""

    counts: metrics.Counts  # of (n,)
    outlines: np.ndarray | None  # (n,) pixels apart, at the size of the files; nan: undefined


def judge(trained, ways, split, full_size, device, progress):
    """{way: Judged}; a supervised network has the way (1, 1) alone."""
    rows, found = np.arange(len(split.images)), {}
    for way in [(1, 1)] if trained.cfg.supervised else ways:
        cfg = configure(trained.cfg, way)
        mean = evaluate.segment(trained.model, cfg, split.images, rows, device, progress)
        if full_size:
            found[way] = Judged(*fullsize.measured(mean, split.files, cfg.threshold))
        else:
            found[way] = Judged(metrics.confusion(mean, split.masks[rows] > 127), None)
    return found


def rows_of_dice(groups, judged):
    """A row for each group and way: DICE of each seed, and its difference to the first row.

    judged  {run: what `judge` returns}. A standard error is by bootstrap over the images.
    """
    first, rows = None, []
    for name, group in groups.items():
        for masks, passes in judged[group[0].run]:
            found = [judged[one.run][masks, passes] for one in group]
            each = [one.counts for one in found]
            dice = [metrics.scores(c.pooled())["DICE index"] for c in each]
            row = {"name": name, "steps": group[0].cfg.steps, "masks": masks, "passes": passes}
            row |= {"seeds": [one.cfg.seed for one in group], "DICE": dice}
            if first:
                rng = philox(evaluate.EVAL_SEED, Purpose.BOOTSTRAP, 0)
                difference, error = metrics.dice_difference(each, first, rng)
                row |= {"difference": difference, "standard error": error}
            if found[0].outlines is not None:
                row["outlines"] = [fullsize.mean_distance(one.outlines) for one in found]
            first = first or each
            rows.append(row)
    return rows


def table_of_dice(rows):
    """What rows_of_dice returns, as Markdown."""
    names = ["run", "steps", "seeds", "masks x passes", "DICE", "less the first row's"]
    names += ["outlines, pixels apart"] if "outlines" in rows[0] else []
    lines = []
    for row in rows:
        cells = [row["name"], row["steps"], len(row["seeds"]), f"{row['masks']} x {row['passes']}"]
        apart = (
            f"{row['difference']:+.4f} ± {row['standard error']:.4f}" if "difference" in row else ""
        )
        cells += [tables.spread(row["DICE"]), apart]
        cells += [tables.spread(row["outlines"], 2)] if "outlines" in row else []
        lines.append(map(str, cells))
    return tables.table(names, lines)


def dice(args, trained, root, device):
    """The study of DICE: a dict for results/."""
    groups = groups_of(trained)
    sizes = {one.cfg.image_size: one for one in trained}  # a run of each size
    splits = {size: split_of(args.split, one, root) for size, one in sizes.items()}
    images = len(splits[trained[0].cfg.image_size].images)
    each = [1 if one.cfg.supervised else sum(m * n for m, n in args.ways) for one in trained]
    progress, judged = passes_line("segmenting: passes", images * sum(each)), {}
    for one in trained:
        split = splits[one.cfg.image_size]
        judged[one.run] = judge(one, args.ways, split, args.full_size, device, progress)
    facts = {"images": images} | ({"full size": True} if args.full_size else {})
    return facts | {"rows": rows_of_dice(groups, judged)}


# ---------------------------------------- DICE against minutes


def curve_of(one):
    """{step: DICE of validation} in a run's log, sampled as its settings say. UserError: none."""
    log, protocol = Path(one.run) / "log.jsonl", runs.protocol_of(one.cfg)
    try:
        lines = [json.loads(line) for line in log.read_bytes().splitlines()]
        found = [e for e in lines if "Val" in e and e["protocol"] == protocol]
        curve = {e["step"]: float(e["Val"]["pooled"]["DICE index"]) for e in found}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{log}: cannot be read, or is damaged ({type(e).__name__})") from e
    refuse(not curve, f"{log}: holds no evaluation by the run's own settings")
    return curve


def rows_of_time(groups, seconds, reach):
    """A row for each group: seconds a step, and DICE of validation over minutes of training.

    seconds  {name: of a step}
    reach    DICEs; a row says at how many minutes its evaluations first have them, mean of seeds
    """
    rows = []
    for name, group in groups.items():
        curves = [curve_of(one) for one in group]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [float(np.mean([curve[step] for curve in curves])) for step in steps]
        minutes = [step * seconds[name] / 60 for step in steps]
        row = {"name": name, "seeds": [one.cfg.seed for one in group], "step": seconds[name]}
        row |= {"passes": evaluate.passes_of(group[0].cfg), "minutes": minutes, "DICE": mean}
        first = {str(d): next((m for m, v in zip(minutes, mean) if v >= d), None) for d in reach}
        rows.append(row | {"reached": first})
    return rows


def table_of_time(rows):
    """What rows_of_time returns, as Markdown."""
    reached = list(rows[0]["reached"])
    names = ["run", "passes", "seconds a step", "minutes", "DICE"]
    names += [f"min to {d}" for d in reached]
    lines = []
    for row in rows:
        cells = [row["name"], str(row["passes"]), f"{row['step']:.3f}"]
        cells += [f"{row['minutes'][-1]:.1f}", f"{row['DICE'][-1]:.4f}"]
        cells += ["" if m is None else f"{m:.1f}" for m in row["reached"].values()]
        lines.append(cells)
    return tables.table(names, lines)


def time(args, trained, root, device):
    """The study of minutes: a dict for results/."""
    groups = groups_of(trained)
    configs = {name: group[0].cfg for name, group in groups.items()}
    jobs = {name: (benchmark.training_job, cfg, device) for name, cfg in configs.items()}
    seconds = benchmark.timed(jobs, device, args.rounds)
    rows = rows_of_time(groups, seconds, args.reach)
    return {"images": trained[0].cfg.eval_images, "rows": rows}


def picture_of(out):
    """FILE.png of --out FILE.json. UserError: it would replace something else."""
    picture = Path(out).with_suffix(".png")
    foreign = picture == Path(out) or picture.exists() and not Path(out).exists()
    refuse(foreign, f"--out draws {picture} too, and must not replace anything else, got {out}")
    return picture


def draw_time(rows, path, title):
    """The curves of rows_of_time."""
    import figures  # matplotlib takes a while to load

    lines = {f"{row['name']}, 1 x {row['passes']}": (row["minutes"], row["DICE"]) for row in rows}
    how = dict(xlabel="minutes of training", ylabel="DICE of validation", ylim=(0.9, 1.0))
    picture = figures.plot(dict(lines=lines, style="both", **how), title=title, height=3.6)
    runs.write_whole(path, lambda f: picture.savefig(f, dpi=150))


# ---------------------------------------- a share and its interval [1], [21]


def shares(args, trained, root, device):
    """The study of shares: a dict for results/."""
    networks = [(one.model, one.cfg) for one in trained]
    cfg = trained[0].cfg

    def parts(masks=None):
        return [split_of(name, trained[0], root, masks) for name in ("held-out", args.split)]

    both, infection = parts(), cfg.task == "infection"
    lungs = [split.masks > 127 for split in parts("lung masks")] if infection else (None, None)
    masks = len(networks) if cfg.supervised else args.masks
    passes, n = evaluate.passes_of(cfg), sum(len(split.images) for split in both)
    progress = passes_line("segmenting: passes", n * masks * passes)
    found = [
        intervals.shares_of(networks, s, w, args.masks, device, progress)
        for s, w in zip(both, lungs)
    ]
    facts = {"masks": masks, "passes": passes, "held out": len(both[0].images)}
    rows = intervals.rows_of_intervals(*found)
    return facts | {"images": len(both[1].images), "rows": rows}


# ---------------------------------------- the command


def table(result):
    """What a comparison found, as a Markdown table."""
    of = {"dice": table_of_dice, "time": table_of_time, "shares": table_of_shares}
    return of[result["compare"]](result["rows"])


def table_of_shares(rows):
    """What intervals.rows_of_intervals found, a row for each spread."""
    facts = ("coverage", "width", "interval score", "CRPS")
    names = ["spread", "DICE", "bias", "mean absolute error"]
    names += [f"raw: {facts[0]}", *facts[1:], f"conformal: {facts[0]}", *facts[1:]]
    lines = []
    for row in rows:
        cells = [row["spread"], f"{row['DICE']:.4f}", f"{row['bias']:+.4f}"]
        cells.append(f"{row['mean absolute error']:.4f}")
        for kind in ("raw", "conformal"):
            found = row.get(kind) or dict.fromkeys(facts, math.nan)
            cells += [f"{found[fact]:.3f}" for fact in facts[:3]] + [f"{found['CRPS']:.4f}"]
        lines.append(cell.replace("nan", "") for cell in cells)
    return tables.table(names, lines)


def way(text):
    """--ways: 9x2 is the mean of nine masks of two passes each, (9, 2)."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"must be masks x passes, such as 9x2, got {text}")
    return tuple(map(int, text.split("x")))


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("compare.py", description=__doc__, formatter_class=formatter)
    p.add_argument("compare", choices=("dice", "time", "shares"))
    p.add_argument("runs", type=path_of, nargs="+", metavar="RUN", help="folders of trained runs")
    ways = dict(type=way, nargs="+", default=[(1, 1), (1, 2), (9, 2), (1, 5)], metavar="MxN")
    p.add_argument("--ways", **ways, help="dice: masks averaged x passes; default 1x1 1x2 9x2 1x5")
    full = "dice: at the size of the mask files; runs may differ in --image-size"
    p.add_argument("--full-size", action="store_true", help=full)
    reach = dict(type=float, nargs="+", default=[0.95, 0.97], metavar="DICE")
    p.add_argument("--reach", **reach, help="time: how soon these are reached; default 0.95 0.97")
    number = dict(type=int, metavar="N")
    p.add_argument("--rounds", **number, default=5, help="time: steps of each; default %(default)s")
    p.add_argument("--masks", **number, default=25, help="shares: per X-ray; default %(default)s")
    p.add_argument("--ddim-steps", **number, help="shares: passes a mask; default: the run's")
    split = dict(choices=("Val", "Test", "held-out"), default="Val")
    p.add_argument("--split", **split, help="the images; held-out: what --set held_out kept")
    p.add_argument("--data", type=path_of, metavar="DIR", help="COVID-QU-Ex; default: the runs'")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", type=path_of, metavar="FILE", help="write all numbers there as JSON")
    return p.parse_args(argv)


def check(args, trained):
    """Refuse numbers out of range, runs that cannot be compared, and a bad --out."""
    for name in ("rounds", "masks"):
        refuse(getattr(args, name) < 1, f"--{name} must be at least 1, got {getattr(args, name)}")
    first, alike = trained[0].cfg, ["task", "classes", "group", "held_out"]
    refuse(
        args.full_size and args.compare != "dice", f"--full-size is about dice, got {args.compare}"
    )
    alike += [] if args.full_size else ["image_size"]
    alike += [] if args.data else ["data"]
    if args.compare == "shares":
        rule = f"--masks must be at least 2 for each of {len(trained)} runs, got {args.masks}"
        refuse(args.masks < 2 * len(trained), rule)
        alike += ["supervised"]
    for run, _, _, cfg in trained:
        refuse(cfg.task == "synthesis", f"{run} draws X-rays; compare.py is about masks")
        rule = f"{run} must be trained with --set held_out=0.2, got 0"
        needed = args.compare == "shares" or args.split == "held-out"
        refuse(needed and not cfg.held_out, rule)
        for way in args.ways:
            config.check(configure(cfg, way))
        other = [name for name in alike if getattr(cfg, name) != getattr(first, name)]
        refuse(other, f"{run} differs from {trained[0].run} in {', '.join(other)}")
    refuse_out(args.out, "compare.py", STARTS)
    if args.out and args.compare == "time":
        picture_of(args.out)


STARTS = '{\n "compare": '  # what a result of compare.py starts with


def carry_out(args):
    """The comparison that the command line asks for. Returns the exit status."""
    device = devices.choose_device(args.device)
    trained = [read_run(run, device) for run in args.runs]
    if args.ddim_steps:
        cfgs = [dataclasses.replace(one.cfg, ddim_steps=args.ddim_steps) for one in trained]
        trained = [one._replace(cfg=cfg) for one, cfg in zip(trained, cfgs)]
    for one in trained:
        config.check(one.cfg)
    check(args, trained)
    cfg = phantoms.find_data(trained[0].cfg, args.data)
    study = {"dice": dice, "time": time, "shares": shares}[args.compare]
    kind = cfg.images_are
    what = {"compare": args.compare, "data": kind, "split": args.split, "task": cfg.task}
    what |= {"precision": cfg.precision, "runs": {run: trained_at(run) for run in args.runs}}
    result = what | study(args, trained, cfg.data, device)
    message(f"{kind}, {args.split}, {result['images']} images\n\n{table(result)}")
    if args.out:
        runs.write_result(args.out, result, device)
        if args.compare == "time":
            draw_time(result["rows"], picture_of(args.out), f"{cfg.task} masks of {kind}")
    return 0


def main(argv=None):
    args = parse(argv)
    less_memory = "try --device cpu"
    return exit_status("compare.py", lambda: carry_out(args), less_memory, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
