r"""Use a trained run: draw X-rays from noise (§3), or find the masks of your own X-ray files (§4). Not for diagnosis.

    python sample.py runs/synthesis-0 -n 16                                  16 X-rays, and all of them in samples.png
    python sample.py runs/synthesis-0 --sampler ode --ddim-steps 25          ... by another sampler of §2.1
    python sample.py runs/lung-concat-0 --images a.png b.png                 a mask and an overlay of each
    python sample.py runs/lung-concat-0 --images *.png --ensemble 9          ... and where 9 samples disagree
    python sample.py runs/lung-unet-0 --images a.png                         a supervised network's only mask, in one pass
    python sample.py runs/infection-add-0/best.pt --images a.png --masks a-true.png     ... and the eight metrics (§4.3)

RUN is a run folder of train.py (its last.pt) or a checkpoint file. X-rays are gray image files of any size, of 8 or 16
bits (16 bits: 0..65535 is black to white). The network sees them squeezed to its own square, as in training; all that
is written has the X-ray's own size. In <RUN folder>/samples or --out DIR, for an X-ray NAME.png:

    NAME-mask.png           0 outside, 255 inside: where the mean of the ensemble is above 0 of [-1, 1]
    NAME-overlay.png        the outline of the mask on the X-ray, and of the true mask where --masks gives it
    NAME-mean.png           with --ensemble N > 1: the mean of its masks. 0: outside in all; 255: inside in all
    NAME-disagreement.png   with --ensemble N > 1: the standard deviation of its masks in [-1, 1], times 255.
                            0: all agree; 255: half of them say inside and half outside
    scores.md               with --masks: the metrics of each X-ray and of all pixels together

and of a synthesis run sample-0000.png, sample-0001.png, ... and the first 64 in samples.png. The noise of image i (its
place in the list) depends on --seed and i alone. A later call replaces files of the same names and no others; your own
images and masks are never overwritten. The masks are those of a network at a low resolution, for study: no
finding about a patient may rest on them.
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # as train.py
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch.nn import functional as F

import data
import metrics
import train
from train import UserError, say

MOST_MEMBERS = 64  # of an ensemble: those of one X-ray go through the network together
GRID = 64  # images in samples.png


def parse(argv):
    """The command line -> argparse.Namespace; what was not given is None."""
    p = train.Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", metavar="RUN", help="run folder of train.py, or its last.pt or best.pt")
    p.add_argument("-n", type=int, metavar="N", help="X-rays to draw from a synthesis run; default 16")
    p.add_argument("--images", nargs="+", metavar="FILE", help="X-rays to segment with a lung or infection run")
    p.add_argument("--masks", nargs="+", metavar="FILE", help="their true masks, in the same order, to score with")
    p.add_argument("--ensemble", type=int, metavar="N", help="masks sampled for an X-ray; default: the run's")
    p.add_argument("--sampler", choices=train.SAMPLERS, help="DDIM, DDPM, or those of §2.1: ode, sde, pc, langevin; default: the run's")
    p.add_argument("--ddim-steps", type=int, metavar="N", help="passes of the network a sample, by any sampler but ddpm; default: the run's")
    p.add_argument("--seed", type=int, default=train.EVAL_SEED, help="of the noise; default %(default)s")
    p.add_argument("--out", metavar="DIR", help="folder to write to; default <RUN folder>/samples")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return p.parse_args(argv)


def check_flags(args, task):
    """Refuse flags that do not belong to this kind of run, or are out of range."""
    segments = task != "synthesis"
    if segments and args.n is not None:
        raise UserError(f"-n draws X-rays from a synthesis run; {args.run} is a {task} run: give --images")
    if segments and not args.images:
        raise UserError(f"{args.run} is a {task} run: give the X-rays to segment with --images FILE...")
    for flag in () if segments else ("images", "masks", "ensemble"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is about masks; {args.run} is a synthesis run, which draws X-rays: give -n")
    if args.masks and len(args.masks) != len(args.images):
        raise UserError(f"--masks must be as many as --images, got {len(args.masks)} for {len(args.images)}")
    if args.n is not None and args.n < 1:
        raise UserError(f"-n must be at least 1, got {args.n}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63 - 1, got {args.seed}")
    if args.ensemble is not None and args.ensemble > MOST_MEMBERS:
        raise UserError(f"--ensemble must be at most {MOST_MEMBERS}, got {args.ensemble}")


def configure(args, cfg, device):
    """The run's settings with the flags given. bf16 where it is slow becomes fp32."""
    changes = {"sampler": args.sampler, "ddim_steps": args.ddim_steps, "ensemble": args.ensemble}
    cfg = dataclasses.replace(cfg, **{k: v for k, v in changes.items() if v is not None})
    train.check(cfg)
    return cfg if train.bf16_is_fast(device) else dataclasses.replace(cfg, precision="fp32")


def read_xrays(images, masks, size):
    """Every file is read and checked before any work: (N, 1, S, S) uint8, the X-rays as the network sees them.

    They are read a second time when their masks are written, so that memory does not hold them all at their own size.
    """
    small, progress = np.empty((len(images), 1, size, size), np.uint8), data.progress_line("reading")
    for i, path in enumerate(images):
        xray = data.read_gray(path)
        if masks and (mask := data.read_mask(masks[i])).shape != xray.shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (mask, xray)]
            raise UserError(f"{masks[i]}: is {sizes[0]} pixels, its image {path} is {sizes[1]}")
        if xray.max() < 64:  # such as 12 bits stored in 16: 4095 is 16 of 255
            say(f"{path}: is very dark, its brightest pixel is {xray.max()} of 255; does it use all its bits?")
        small[i, 0] = data.resize_image(xray, size)
        progress(i + 1, len(images))
    return small


def plan(args, cfg, out):
    """The files this call writes. Refuses two X-rays of one name, and to overwrite a file it was given."""
    if cfg.task == "synthesis":
        return [*(out / f"sample-{i:04}.png" for i in range(args.n or 16)), out / "samples.png"]
    kinds = ("mask", "overlay", "mean", "disagreement")[: 4 if cfg.ensemble > 1 else 2]
    first = {}
    for path in map(Path, args.images):
        same = first.setdefault(path.stem.casefold(), path)  # some file systems do not tell A.png from a.png
        if same is not path:
            both = f"{same} and {path} would both become {out / path.stem}-mask.png"
            raise UserError(f"{both}; segment them in two calls, each with its own --out")
    files = [out / f"{Path(path).stem}-{kind}.png" for path in args.images for kind in kinds]
    files += [out / "scores.md"] if args.masks else []
    given = {(s.st_dev, s.st_ino): path for path in [*args.images, *(args.masks or [])] for s in [os.stat(path)]}
    for file in files:
        if file.exists() and (path := given.get((file.stat().st_dev, file.stat().st_ino))):
            raise UserError(f"{path} would be overwritten by a result of that name; choose another --out")
    return files


def save_gray(path, gray):
    train.write_whole(path, lambda f: Image.fromarray(gray).save(f))


def draw(model, cfg, N, seed, device, out, title):
    """N X-rays from noise, §3: sample-0000.png, ... and samples.png."""
    from notebooks import figures  # matplotlib takes a while to load

    progress, shown = train.passes_line("drawing: passes", N * train.passes_of(cfg)), []
    sample = lambda rows: train.sample_images(model, cfg, rows, device, progress, seed=seed)  # (B, 1, S, S)
    for rows, x0 in train.in_pieces(sample, np.arange(N), device):
        for i, gray in zip(rows, data.to_uint8(x0)):
            save_gray(out / f"sample-{i:04}.png", gray[0])
            shown += [gray] if i < GRID else []
    title += f", first {GRID} of {N}" if N > GRID else ""
    train.write_whole(out / "samples.png", lambda f: figures.save_image_grid(f, np.stack(shown), title))


def enlarge(x, size):
    """(S, S) float -> (H, W) float, bilinear; where a side shrinks, over all the pixels under an output pixel."""
    return F.interpolate(x[None, None], size, mode="bilinear", antialias=True)[0, 0]


def segment(model, cfg, small, args, device, out, title):
    """The mask of every X-ray, §4.1, and its pictures. Returns the Counts of each (§4.3), None without --masks."""
    from notebooks import figures

    N, counts = len(small), []
    progress = train.passes_line("segmenting: passes", N * cfg.ensemble * train.passes_of(cfg))

    def sample(rows):
        y = data.to_float(small[rows]).to(device)
        return train.sample_masks(model, cfg, y, rows, cfg.ensemble, device, progress, seed=args.seed).cpu()

    for rows, samples in train.in_pieces(sample, np.arange(N), device, cfg.ensemble):
        for i, members in zip(rows, samples[:, :, 0]):  # (members, S, S) in [-1, 1]
            xray, name = data.read_gray(args.images[i]), out / Path(args.images[i]).stem
            mean = enlarge(members.mean(0), xray.shape)  # (H, W) in [-1, 1]
            inside, share = (mean > 0).numpy(), data.to_uint8(mean)  # to_uint8 refuses nan
            true = data.read_mask(args.masks[i]) if args.masks else None
            save_gray(Path(f"{name}-mask.png"), np.uint8(255) * inside)
            if cfg.ensemble > 1:
                spread = enlarge(members.std(0, correction=0), xray.shape)  # 0..1
                save_gray(Path(f"{name}-mean.png"), share)
                save_gray(Path(f"{name}-disagreement.png"), data.to_uint8(2 * spread - 1))
            overlay = {"image": xray, "mask": inside, "title": f"{name.name}\n{title}", "true": true}
            overlay |= {"what": f"mean of {cfg.ensemble} masks"} if cfg.ensemble > 1 else {}
            train.write_whole(Path(f"{name}-overlay.png"), functools.partial(figures.save_overlay, **overlay))
            if args.masks:
                counts.append(metrics.confusion(inside[None], true[None]))
    return metrics.Counts(*map(np.concatenate, zip(*counts))) if counts else None


def score_table(names, counts, title):
    """The eight numbers of each X-ray, and of the pixels of all of them together, as Markdown."""
    each, pooled = metrics.scores(counts), metrics.scores(counts.pooled())
    rows = [[name.replace("|", r"\|"), *(f"{each[m][i]:.4f}" for m in metrics.NAMES)] for i, name in enumerate(names)]
    rows.append(["**all pixels together**", *(f"**{pooled[m]:.4f}**" for m in metrics.NAMES)])
    head = ["image", *metrics.NAMES]
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    line = lambda cells: f"| {' | '.join(f'{cell:{w}}' for cell, w in zip(cells, widths))} |"
    lines = [title, "", line(head), line(["-" * w for w in widths]), *map(line, rows)]
    undefined = any("nan" in cell for row in rows for cell in row[1:])
    return "\n".join(lines + ["", "nan is 0/0: nothing to count"] * undefined)


def start(args):
    if args.masks and not args.images:
        raise UserError("--masks are the true masks of --images, and there are no --images")
    device = train.choose_device(args.device)
    model, cfg, step = train.load_run(args.run, device)
    check_flags(args, cfg.task)
    train.refuse_flags_of_diffusion(args, cfg.model)
    cfg = configure(args, cfg, device)
    segments = cfg.task != "synthesis"
    small = read_xrays(args.images, args.masks, cfg.image_size) if segments else None
    run = Path(args.run)
    out = Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "samples"
    files = plan(args, cfg, out)
    out.mkdir(parents=True, exist_ok=True)
    replaced = sum(file.exists() for file in files)

    kind = "phantoms" if cfg.phantoms else "X-rays"
    title = f"{train.kind_of(cfg)}, trained on {kind}, step {step}"
    members = f", {cfg.ensemble} masks an X-ray" if segments else ""
    sampler = f"{cfg.ddim_steps} DDIM steps" if cfg.sampler == "ddim" else f"{train.passes_of(cfg)} passes, {cfg.sampler}"
    how = "one pass" if cfg.supervised else sampler
    say(f"{title}; {how}, seed {args.seed}{members}, on {device}")
    if cfg.phantoms:
        moral = "what it makes of a real X-ray means nothing" if segments else "what it draws are phantoms, not X-rays"
        say(f"This model was trained on phantoms, generated images: {moral}.")
    if segments:
        counts = segment(model, cfg, small, args, device, out, f"{title}; not for diagnosis")
        if counts:
            what = f"{title}; {how}, seed {args.seed}{members}"
            table = score_table([Path(path).name for path in args.images], counts, what)
            train.write_whole(out / "scores.md", lambda f: f.write_text(table + "\n", encoding="utf-8"))
            say(f"\n{table}\n")
    else:
        draw(model, cfg, args.n or 16, args.seed, device, out, f"{title}; generated")
    names = [file.name for file in files]
    listed = ", ".join(names if len(names) <= 8 else [*names[:4], "...", names[-1]])
    say(f"{out}/: {len(names)} files ({f'{replaced} of them replaced' if replaced else 'all new'}): {listed}")
    return 0


def main(argv=None):
    args = parse(argv)
    more = "try a smaller --ensemble, or --device cpu"
    return train.exit_status("sample.py", lambda: start(args), more, "the files written until now are whole")


if __name__ == "__main__":
    sys.exit(main())
