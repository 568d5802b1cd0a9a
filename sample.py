r"""Use a trained run: draw X-rays from noise (§3), or find the masks of your own X-ray files (§4).

    python sample.py runs/synthesis-0 -n 16               16 X-rays, and all in one picture
    python sample.py runs/synthesis-0 --sampler ode       by another sampler of §2.1
    python sample.py RUN --class COVID-19 --guidance 2    of a class (train.py --given class)
    python sample.py RUN --lung-mask a.png -n 8           that have these lungs (--given lung)
    python sample.py RUN --lung-mask RUN2 -n 2000 --out DIR    pairs: RUN2 draws a mask (--set
                                                               draw=lung), RUN an X-ray for it
    python sample.py runs/lung-concat-0 --images a.png b.png           a mask and an overlay of each
    python sample.py runs/lung-concat-0 --images DIR --ensemble 9      and where 9 samples disagree
    python sample.py runs/infection-concat-0 --images a.png --ensemble 25 --lungs runs/lung-concat-0
    python sample.py runs/lung-unet-0 --images a.png      a supervised network's mask, in one pass
    python sample.py runs/lung-add-0/best.pt --images a.png --masks a-true.png    and its scores
    python sample.py runs/masks-concat-0 --images DIR/images --masks DIR/masks    of a whole folder

RUN is a run folder of train.py (its last.pt, which its tables are about) or a checkpoint file, such
as best.pt, which validation chose. X-rays are gray image files of any size up to 100 megapixels, of
8 or 16 bits (16 bits: 0..65535 is black to white); a small network then takes less than 1 GiB of
memory. The network sees them squeezed to its own square, as in training. A folder stands for the
image files in it, and nothing is written there. Masks have the X-ray's own size. Files of an X-ray
NAME.png, in <RUN folder>/samples or --out DIR:

    NAME-mask.png           0 outside, 255 inside: where the ensemble's mean is above 0 of [-1, 1]
    NAME-overlay.png        the outline of the mask on the X-ray, and of the true mask with --masks
    scores.md               with --masks: the metrics of each X-ray and of all pixels together
    NAME-mean.png           of an ensemble's masks. 0: outside in all; 255: inside in all
    NAME-disagreement.png   the standard deviation of an ensemble's masks in [-1, 1], times 255.
                            0: all agree; 255: half of them say inside, half outside

A synthesis run gives sample-0000.png, sample-0001.png, ... and the first 64 in samples.png. Where
masks are given, the X-rays are in images/, and the mask of each in masks/, or of two kinds in
lung-masks/ and infection-masks/: train.py --task masks --data DIR takes such a folder. The noise of
image i (its place in the list) depends on --seed and i alone. A later call replaces files
that sample.py wrote (each says so) and refuses to replace others. Not for diagnosis: the masks are
those of a network at a low resolution, for study; no finding may rest on them.
"""

import argparse
import dataclasses
import gc
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

import conditions
import config
import console
import data
import devices
import evaluate
import fullsize
import memory
import metrics
import pairs
import runs
import synthesis
import tables
from console import Parser, UserError, exit_status, message, path_of, printable, refuse, write_whole

# Settings of the run that a flag replaces
CHANGEABLE = ("sampler", "ddim_steps", "ensemble", "guidance")
MOST_MEMBERS = 64  # of an ensemble: those of one X-ray go through the network together
DRAWN, MOST_DRAWN, GRID = 16, 10**6, 64  # X-rays without -n; with -n; in samples.png
MARK = "sample.py of Diffusion models for chest X-rays"  # stands near the beginning of each file

# ---------------------------------------- the command line


def parse(argv):
    """The command line -> argparse.Namespace; what was not given is None."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("sample.py", description=__doc__, formatter_class=formatter)
    p.add_argument("run", type=path_of, metavar="RUN", help="run folder, its last.pt or best.pt")
    p.add_argument("-n", type=int, metavar="N", help=f"synthesis: X-rays to draw; default {DRAWN}")
    files = dict(type=path_of, nargs="+", metavar="FILE")
    p.add_argument("--images", **files, help="X-rays to segment, or folders of them")
    words = "their true masks, to score with: in the same order, or folders, by their names"
    p.add_argument("--masks", **files, help=words)
    words = "a lung run: an infection's share is then of the lungs that it finds"
    p.add_argument("--lungs", type=path_of, metavar="RUN", help=words)
    words = "the class of the X-rays to draw; default: none is given"
    p.add_argument("--class", dest="label", choices=data.CLASSES, help=words)
    for kind in conditions.MASKS:
        words = f"their {kind} masks: a file, a folder (in turn), or a run that draws them"
        p.add_argument(f"--{kind}-mask", type=path_of, metavar="WHERE", help=words)
    for name in CHANGEABLE:
        field = config.SETTINGS[name]
        words = f"{field.metadata['words']}; default: the run's"
        about = config.argument(field) | dict(help=words)
        p.add_argument(f"--{name.replace('_', '-')}", **about)
    seed = dict(type=int, default=evaluate.EVAL_SEED)
    p.add_argument("--seed", **seed, help="of the noise; default %(default)s")
    p.add_argument("--out", type=path_of, metavar="DIR", help="default <RUN folder>/samples")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return p.parse_args(argv)


def files_in(paths):
    """The paths, the image files of a folder in its place. UserError: there are none in it."""
    folders = {path: pairs.image_files(path)[0] for path in paths if os.path.isdir(path)}
    return [str(Path(path, name)) for path in paths for name in folders.get(path, [""])]


def replace_folders(args):
    """Files for the folders of --images and --masks. Returns the folders.

    Masks of a folder belong to the X-rays by their names, as in training (pairs.naming). UserError:
    no image file in a folder, two masks of one name, an X-ray without a mask.
    """
    given = [*(args.images or ()), *(args.masks or ())]
    folders = [path for path in given if os.path.isdir(path)]
    args.images = args.images and files_in(args.images)
    if set(args.masks or ()) & set(folders):
        masks = pairs.by_stem("--masks", files_in(args.masks))
        mask_of, _ = pairs.naming([Path(path).stem for path in args.images], list(masks))
        alone = [path for path in args.images if Path(path).stem not in mask_of]
        rule = "--masks must have one for each X-ray, and none is for"
        refuse(alone, f"{rule} {pairs.listed(alone)}")
        args.masks = [masks[mask_of[Path(path).stem]] for path in args.images]
    return folders


def conditions_given(args):
    """(flag, kind, value) of --class and of the masks; the value is None where it is not given."""
    masks = [(f"--{kind}-mask", kind, getattr(args, f"{kind}_mask")) for kind in conditions.MASKS]
    return [("--class", "class", args.label), *masks]


def check_flags(args, cfg):
    """Refuse flags that do not belong to this kind of run, or are out of range."""
    task = cfg.task
    run = f"{args.run} is a {task} run"
    if task == "synthesis":
        for name in ("images", "masks", "ensemble", "lungs"):
            rule = f"--{name} is about masks; {run}, which draws X-rays: give -n"
            refuse(getattr(args, name) is not None, rule)
        for flag, kind, value in conditions_given(args):
            rule = f"{flag} needs a run that was trained with --given {kind}"
            refuse(value and kind not in conditions.kinds_of(cfg.given), f"{rule}; {run}")
    else:
        rule = "-n draws X-rays from a synthesis run"
        refuse(args.n is not None, f"{rule}; {run}: give --images")
        for flag, _, value in conditions_given(args):
            rule = f"{flag} is about X-rays that are drawn"
            refuse(value, f"{rule}; {run}")
        refuse(not args.images, f"{run}: give the X-rays to segment with --images FILE...")
        rule = "--lungs is about the share of an infection"
        refuse(args.lungs and task != "infection", f"{rule}; {run}")
    images, masks = len(args.images or ()), len(args.masks or ())
    rule = f"--masks must be as many as --images, got {masks} for {images}"
    refuse(masks not in (0, images), rule)
    rule = f"-n must be between 1 and {MOST_DRAWN}, got {args.n}"
    refuse(args.n is not None and not 1 <= args.n <= MOST_DRAWN, rule)
    rule = f"--seed must be between 0 and 2^63 - 1, got {args.seed}"
    refuse(not 0 <= args.seed < 2**63, rule)
    members = 1 if args.ensemble is None else args.ensemble
    rule = f"--ensemble must be between 1 and {MOST_MEMBERS}, got {members}"
    refuse(not 1 <= members <= MOST_MEMBERS, rule)


def configure(args, cfg, device):
    """The run's settings, changed by the flags given.

    UserError: a flag that the run's model has no use for, or a value out of range.
    """
    given = {name: getattr(args, name) for name in CHANGEABLE if getattr(args, name) is not None}
    config.refuse_foreign(given, cfg.model)
    cfg = dataclasses.replace(cfg, **given)
    config.check(cfg)
    return devices.in_precision_of(cfg, device)


def files_to_write(args, cfg, out):
    """The files of this call. UserError: two X-rays of one name; a given file is among them."""
    if cfg.task == "synthesis":
        names = [f"sample-{i:04}.png" for i in range(args.n or DRAWN)]
        folders = [out / folder for folder in ("images", *mask_folders(args))]
        folders = [out] if len(folders) == 1 else folders
        return [*(folder / name for folder in folders for name in names), out / "samples.png"]
    kinds = ("mask", "overlay", "mean", "disagreement")[: 4 if cfg.ensemble > 1 else 2]
    first = {}  # of each name; some file systems do not tell A.png from a.png
    for path in map(Path, args.images):
        same = first.setdefault(path.stem.casefold(), path)
        both = f"{same} and {path} would both become {out / path.stem}-mask.png"
        rule = "segment them in two calls, each with its own --out"
        refuse(same is not path, f"{both}; {rule}")
    files = [out / f"{Path(path).stem}-{kind}.png" for path in args.images for kind in kinds]
    files += [out / "scores.md"] if args.masks else []
    paths = filter(os.path.exists, [*args.images, *(args.masks or [])])
    given = {identity(path): path for path in paths}
    rule = "would be overwritten by a result of that name; choose another --out"
    for file in filter(Path.exists, files):
        refuse(identity(file) in given, f"{given.get(identity(file))} {rule}")
    return files


def written_here(file):
    """Whether sample.py wrote this file."""
    return file.is_file() and MARK.encode() in file.read_bytes()[:1000]


def identity(path):
    """What a file and all links to it have in common."""
    return os.stat(path).st_dev, os.stat(path).st_ino


# ---------------------------------------- masks of X-rays: §4


def read_xrays(images, masks, cfg):
    """The X-rays as the network sees them: (N, 1, S, S) uint8. All files are read before any work.

    Each is read again when its mask is written: memory holds one at a time at its own size.
    """
    size, threshold = cfg.image_size, cfg.threshold or None
    small = np.empty((len(images), 1, size, size), np.uint8)
    progress = console.progress_line("reading")
    for i, path in enumerate(images):
        xray = data.read_gray(path)
        if masks and (mask := data.read_mask(masks[i], threshold)).shape != xray.shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (mask, xray)]
            raise UserError(f"{masks[i]}: is {sizes[0]} pixels, its image {path} is {sizes[1]}")
        if xray.max() < 64:  # such as 12 bits stored in 16: 4095 is 16 of 255
            dark = f"{path}: is very dark, its brightest pixel is {xray.max()} of 255"
            message(f"{dark}; does it use all its bits?")
        small[i, 0] = data.resize_image(xray, size)
        progress(i + 1, len(images))
        xray = mask = None  # before the next is read
    return small


def write_masks(model, cfg, small, args, device, out, title):
    """§4.1: the masks of all X-rays are sampled, and the files of each X-ray are written.

    small: from read_xrays. Returns the positive pixels of each mask, (N, members), and the Counts
    of each X-ray (§4.3), or None without --masks.
    """
    N, members, areas, counts = len(small), cfg.ensemble, [], []
    progress = console.passes_line("segmenting: passes", N * members * evaluate.passes_of(cfg))

    def sample(rows):
        y = data.to_float(small[rows]).to(device)  # (B, 1, S, S) in [-1, 1]
        how = dict(device=device, progress=progress, seed=args.seed)
        return evaluate.sample_masks(model, cfg, y, rows, members, **how).cpu()

    for rows, masks in memory.in_chunks(sample, np.arange(N), device, members):
        areas.append((masks > 0).flatten(2).sum(2).numpy())
        for i, x0 in zip(rows, masks[:, :, 0]):
            true = args.masks and data.read_mask(args.masks[i], cfg.threshold or None)
            name = out / Path(args.images[i]).stem
            counts += write_files_of_xray(name, args.images[i], true, x0, title)
    scored = metrics.Counts(*map(np.concatenate, zip(*counts))) if counts else None
    return np.concatenate(areas), scored


def pixels_of_lungs(run, small, device):
    """Pixels of the lungs that a lung run finds in each X-ray, (N,), as the network sees them."""
    model, cfg, _ = runs.load_run(run, device)
    cfg = devices.in_precision_of(cfg, device)
    refuse(cfg.task != "lung", f"--lungs must be a lung run, {run} is a {cfg.task} run")
    side = small.shape[-1]
    rule = f"--lungs must be a run at the same resolution, {side}"
    refuse(cfg.image_size != side, f"{rule}, got {cfg.image_size}")
    lungs = evaluate.segment(model, cfg, small, np.arange(len(small)), device)
    return (lungs > 0).flatten(1).sum(1).numpy()


def share_lines(images, areas, whole, words):
    """A line for each X-ray: the share of its masks, and where the middle 90 % of them lie.

    areas: (N, members); whole: (N,), what they are a share of. The interval is of samples, as they
    come: it holds fewer truths than it says where the network has not learned enough.
    """
    shares = metrics.ratio(areas * 1.0, np.broadcast_to(whole[:, None], areas.shape))
    N, level = areas.shape[1], metrics.level_of(areas.shape[1])
    lines = []
    for path, mean, low, high in zip(images, shares.mean(1), *metrics.central_interval(shares)):
        interval = f"{level:.0%} interval of {N} masks {low:.3f} to {high:.3f}"
        lines.append(f"{printable(Path(path).name)}: {mean:.3f} of {words}, {interval}")
    return lines


def write_files_of_xray(name, image, true, masks, title):
    """Writes NAME-mask.png, NAME-overlay.png, ...; name: their path up to NAME.

    image: file of the X-ray; true: (H, W) bool, or None; masks: (N, S, S) in [-1, 1].
    Returns a list of the Counts, empty without a true mask.
    """
    import figures  # matplotlib takes a while to load

    xray = data.read_gray(image)
    mean, spread = masks.mean(0), masks.std(0, correction=0)  # -1..1, 0..1
    data.to_uint8(mean)  # refuses nan
    inside = fullsize.inside(mean, xray.shape)
    write_gray(f"{name}-mask.png", np.uint8(255) * inside)
    if len(masks) > 1:
        write_gray(f"{name}-mean.png", fullsize.enlarge(mean, xray.shape, data.to_uint8))
        spread = fullsize.enlarge(spread, xray.shape, lambda x: data.to_uint8(2 * x - 1))
        write_gray(f"{name}-disagreement.png", spread)
        del spread  # memory is for the overlay
    title = f"{printable(name.name)}\n{title}; not for diagnosis"
    what = f"mean of {len(masks)} masks" if len(masks) > 1 else "sampled mask"
    overlay = dict(image=xray, mask=inside, title=title, true=true, what=what, software=MARK)
    write_whole(Path(f"{name}-overlay.png"), lambda f: figures.save_overlay(f, **overlay))
    gc.collect()  # the parts of a picture refer to each other, and would stay
    return [] if true is None else [metrics.confusion(inside[None], true[None])]


def write_gray(path, gray):
    """gray: (H, W) uint8."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    write_whole(Path(path), lambda f: Image.fromarray(gray).save(f, pnginfo=info))


def score_table(images, counts, title):
    """The eight metrics of each X-ray, and of the pixels of all of them together, as Markdown."""
    each, pooled = metrics.scores(counts), metrics.scores(counts.pooled())
    names = [printable(Path(path).name).replace("|", r"\|") for path in images]
    numbers = [[f"{each[m][i]:.4f}" for m in metrics.NAMES] for i in range(len(names))]
    rows = [[name, *row] for name, row in zip(names, numbers)]
    rows.append(["**all pixels together**", *(f"**{pooled[m]:.4f}**" for m in metrics.NAMES)])
    undefined = any("nan" in cell for row in rows for cell in row[1:])
    head = ["image", *metrics.NAMES]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    table = [head, ["-" * width for width in widths], *rows]
    lines = [tables.row_of(map(str.ljust, row, widths)) for row in table]
    note = ["", "nan is 0/0: nothing to count"] if undefined else []
    return "\n".join([title, "", *lines, *note])


# ---------------------------------------- X-rays from noise: §3


def mask_folders(args):
    """{folder below --out: kind} of the masks that are given."""
    kinds = [kind for _, kind, value in conditions_given(args)[1:] if value]
    return {"masks" if len(kinds) == 1 else f"{kind}-masks": kind for kind in kinds}


def write_xrays(model, cfg, args, device, out, title):
    """The X-rays are drawn, and written with what is given to the files of files_to_write."""
    import figures  # matplotlib takes a while to load

    N = args.n or DRAWN
    places, folders = {kind: value for _, kind, value in conditions_given(args)}, mask_folders(args)
    given = synthesis.given_to(cfg, N, places, args.seed, device)
    progress = console.passes_line("drawing: passes", N * evaluate.calls_of(cfg))
    images = out / "images" if folders else out
    for folder in (images, *(out / folder for folder in folders)):
        folder.mkdir(parents=True, exist_ok=True)

    def sample(rows):
        of_rows = conditions.part_of(given, rows, device)
        return synthesis.sample_images(model, cfg, rows, device, progress, args.seed, of_rows)

    shown = []
    for rows, x0 in memory.in_chunks(sample, np.arange(N), device):
        for i, gray in zip(rows, data.to_uint8(x0)):  # (1, S, S)
            write_gray(images / f"sample-{i:04}.png", gray[0])
            for folder, kind in folders.items():
                mask = given.masks[i, conditions.masks_of(cfg.given).index(kind)]
                write_gray(out / folder / f"sample-{i:04}.png", data.to_uint8(mask))
            shown += [gray] if i < GRID else []
    title += f"; generated{f', first {GRID} of {N}' if N > GRID else ''}"
    grid = out / "samples.png"
    write_whole(grid, lambda f: figures.save_image_grid(f, np.stack(shown), title, software=MARK))


# ---------------------------------------- the command


def use_run(args):
    """Does what the command line asks for. Returns the exit status."""
    needed = "--masks are the true masks of --images, and there are no --images"
    refuse(args.masks and not args.images, needed)
    folders = replace_folders(args)
    device = devices.choose_device(args.device)
    model, cfg, step = runs.load_run(args.run, device)
    check_flags(args, cfg)
    cfg = configure(args, cfg, device)
    rule = "--lungs needs several masks: give --ensemble 25"
    refuse(args.lungs and cfg.ensemble < 2, f"{rule}, got {cfg.ensemble}")
    model = devices.cast_once(model, cfg)
    run = Path(args.run)
    out = Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "samples"
    rule = "--out must not be a folder of --images or --masks, where nothing is written"
    given = [os.path.realpath(folder) for folder in folders]
    refuse(os.path.realpath(out) in given, f"{rule}, got {out}")
    files = files_to_write(args, cfg, out)
    there = list(filter(os.path.lexists, files))
    for file in there:
        rule = f"{file} is there, and sample.py did not write it; choose another --out"
        refuse(not written_here(file), rule)
    segments = cfg.task != "synthesis"
    small = read_xrays(args.images, args.masks, cfg) if segments else None
    whole, words = np.full(len(args.images or ()), cfg.image_size**2), "the picture"
    if args.lungs:
        whole, words = pixels_of_lungs(args.lungs, small, device), "the lungs"
    out.mkdir(parents=True, exist_ok=True)

    kind = cfg.images_are
    title = f"{config.kind_of(cfg)}, trained on {kind}, step {step}"
    passes = evaluate.passes_of(cfg)
    how = f"{passes} DDIM steps" if cfg.sampler == "ddim" else f"{passes} passes, {cfg.sampler}"
    how = "one pass" if cfg.supervised else how
    members = f", {cfg.ensemble} masks an X-ray" if segments else ""
    what = f"{title}; {how}, seed {args.seed}{members}"
    message(f"{what}, on {device}")
    if cfg.phantoms:
        moral = "what it draws are phantoms, not X-rays"
        moral = "what it makes of a real X-ray means nothing" if segments else moral
        message(f"This model was trained on phantoms, generated images: {moral}.")
    if segments:
        areas, counts = write_masks(model, cfg, small, args, device, out, title)
        if cfg.ensemble > 1:
            message("\n".join(share_lines(args.images, areas, whole, words)))
            message("What the network has not learned widens no interval (results/shares).")
        if counts:
            table = score_table(args.images, counts, f"{MARK}: {what}")
            write_whole(out / "scores.md", runs.as_text(table))
            message(f"\n{table}\n")
    else:
        write_xrays(model, cfg, args, device, out, title)
    names = [file.name for file in files]
    listed = ", ".join(names if len(names) <= 8 else [*names[:4], "...", names[-1]])
    novelty = f"{len(there)} of them replaced" if there else "all new"
    message(f"{out}/: {len(names)} files ({novelty}): {listed}")
    return 0


def main(argv=None):
    args = parse(argv)
    less_memory = "try a smaller --ensemble, or --device cpu"
    left_behind = "the files written until now are whole"
    return exit_status("sample.py", lambda: use_run(args), less_memory, left_behind)


if __name__ == "__main__":
    sys.exit(main())
