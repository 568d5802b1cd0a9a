"""A run's folder: checkpoint, log, tables and pictures, and where its numbers come from.

config.json   every setting             curves.png    loss and metrics
log.jsonl     a line per log            masks.png     or samples.png
last.pt       go on or sample from here
best.pt       best validation DICE      table.md      beside the report's table
results.json  all numbers
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
from pathlib import Path

import torch

import config
import data
import phantoms
from console import UserError, progress_line
from devices import first_process_first, laid_out, lines_of, rank, world

# ---------------------------------------- files


def write_whole(path, write):
    """write(temporary path), then rename: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_json(content):
    """What write_whole calls to write this dict."""
    return as_text(json.dumps(content, indent=1))


def as_text(text):
    """What write_whole calls to write this text and a newline."""

    def write(path):
        path.write_text(text + "\n", encoding="utf-8")

    return write


class Log:
    """log.jsonl: a dict a line, each with its step. Process 0 writes it.

    A run that goes on from `step` drops the lines after it, and a line that was cut off.
    """

    def __init__(self, path, step=0):
        self.path = path
        self.lines = []
        for text in lines_of(path):
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                self.lines += [line] if line["step"] <= step else []
        if not rank():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(path, lambda f: f.write_text(text))

    def add(self, **line):
        """Append a line."""
        self.lines.append(line)
        if not rank():
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def evaluations(self):
        """The lines of evaluations, in order."""
        return [line for line in self.lines if "Val" in line]


# ---------------------------------------- checkpoints


def state_of(trainer):
    """A Trainer as plain numbers and tensors, which torch.load(weights_only=True) reads."""
    return dict(
        config=dataclasses.asdict(trainer.cfg),
        step=trainer.step,
        model=trainer.model.state_dict(),
        ema=trainer.ema.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
    )


def restore(trainer, checkpoint):
    """Give a fresh Trainer the step, the weights and the optimiser of a checkpoint."""
    trainer.step = checkpoint["step"]
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.ema.load_state_dict(checkpoint["ema"])
    optimizer = checkpoint["optimizer"]
    fused = [group | {"fused": True} for group in optimizer["param_groups"]]  # older runs: False
    trainer.optimizer.load_state_dict(optimizer | {"param_groups": fused})


def read_checkpoint(path):
    """The dict of last.pt, of best.pt or of a run folder's last.pt, on the CPU, with a Config.

    UserError where there is none, or a damaged one.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        how = "python train.py --help shows how to train one"
        raise UserError(f"{path}: no checkpoint there; {how}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {"config": config.from_dict(checkpoint["config"])}
    except Exception as e:
        name = type(e).__name__
        raise UserError(f"{path}: not a checkpoint of train.py, or a damaged one ({name})") from e


def load_run(path, device="cpu"):
    """(model with the averaged weights, Config, step) of a run folder or a checkpoint.

    The model is ready to sample. UserError: damaged, of other sizes, or with a nan.
    """
    checkpoint = read_checkpoint(path)
    cfg = checkpoint["config"]
    model = config.build_model(cfg).to(device)
    try:
        model.load_state_dict(checkpoint["ema"])
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: its weights do not fit its configuration") from e
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: a weight is not finite; train.py never saves such a model")
    model.requires_grad_(False).eval()
    return laid_out(model, device), cfg, checkpoint["step"]


# ---------------------------------------- new or resumed


def prepare(args, device):
    """(Config, folder, checkpoint) of the run that a command line asks for.

    The checkpoint is None for a new run. UserError: a folder that is taken, or flags that a resumed
    run cannot change.
    """
    if args.resume is not None:
        return resumed(args)
    cfg = config.configure(args, device)
    folder = Path(args.out or Path("runs", config.name_of(cfg)))
    if args.data is not None:
        phantoms.locate(args.data, cfg.task)  # a folder without data is refused first
    if (folder / "last.pt").exists() and not args.dry_run:
        what = f"go on with --resume {folder}, or choose another --out"
        raise UserError(f"{folder} holds a run already; {what}")
    return cfg, folder, None


def resumed(args):
    """prepare, for --resume."""
    given = config.settings_given(args)
    fixed = [config.flag(name) for name in given if name not in config.RESUMABLE]
    fixed += ["--out"] if args.out is not None else []
    if fixed:
        rule = "--resume keeps the run's settings, but steps, data, device and evaluation"
        raise UserError(f"{rule}, got {', '.join(sorted(fixed))}")
    folder = Path(args.resume)
    if folder.is_file():
        raise UserError(f"--resume takes the run folder: --resume {folder.parent}")
    checkpoint = read_checkpoint(folder)
    config.refuse_foreign(given, checkpoint["config"].model)
    cfg = dataclasses.replace(checkpoint["config"], **given)
    config.check(cfg)
    if cfg.steps < checkpoint["step"]:
        rule = f"--steps must be at least the {checkpoint['step']} steps that {folder} has taken"
        raise UserError(f"{rule}, got {cfg.steps}")
    return cfg, folder, checkpoint


# ---------------------------------------- the images of a run


def load_splits(args, cfg, checkpoint, path):
    """(Config with the folder of its images and its steps, {split: data.Split}) of a run.

    UserError: too few images, too many processes, or other images than the checkpoint's.
    """
    if cfg.batch_size < world():
        rule = f"--batch-size must be at least the {world()} processes"
        raise UserError(f"{rule}, got {cfg.batch_size}")
    splits = {}
    with first_process_first():
        cfg = phantoms.find_data(cfg, args.data)
        for name in ("Train", "Val", "Test") if args.test else ("Train", "Val"):
            which = (cfg.data, cfg.task, name, cfg.classes, cfg.image_size)
            splits[name] = data.load(*which, progress=progress_line(f"decoding {name}"))
    n, m = len(splits["Train"].images), len(splits["Val"].images)
    if cfg.task == "synthesis" and m < 4:
        rule = "--task synthesis compares with at least 4 images of Val"
        raise UserError(f"{rule}, {cfg.data} has {m}")
    if checkpoint and checkpoint["images"] != n:
        was = f"{path} was trained on {checkpoint['images']} images"
        raise UserError(f"{was}, and Train of {cfg.data} has {n}")
    return with_steps(cfg, n), splits


def images_found(args, cfg):
    """(The folder of the images in words, {split: how many}). No image is read or drawn."""
    root, drawn = phantoms.root_of(cfg, args.data)
    splits = ("Train", "Val", "Test") if args.test else ("Train", "Val")
    if root == phantoms.PHANTOMS and not (root / data.TREES[cfg.task]).is_dir():
        counts = phantoms.PHANTOM_COUNTS[data.TREES[cfg.task]]
        sizes = {name: sum(counts[name][c] for c in cfg.classes) for name in splits}
        return f"{root}, phantoms, to be drawn", sizes
    tree = data.tree_folder(root, cfg.task)
    sizes = {
        name: sum(len(data.scan(tree / name / c / "images")) for c in cfg.classes)
        for name in splits
    }
    return f"{root}, {'phantoms' if drawn else 'X-rays'}", sizes


def with_steps(cfg, n):
    """The Config with its steps, and the steps between evaluations, for n training images."""
    steps = cfg.steps or math.ceil(cfg.epochs * n / cfg.batch_size)
    every = cfg.eval_every or math.ceil(steps / cfg.evaluations)
    return dataclasses.replace(cfg, steps=steps, eval_every=every)


def describe_sizes(cfg, sizes):
    """How many images each split has, and how many an evaluation samples, in lines."""
    lines = []
    for name, n in sizes.items():
        sampled = f"{cfg.eval_images} evaluated"
        if n < cfg.eval_images:
            sampled = f"all {n} evaluated (fewer than {cfg.eval_images})"
        lines.append(f"  {name:17}{n} images, {sampled}")
    return "\n".join(lines)


# ---------------------------------------- what a run writes


class Folder:
    """A run folder that is being written, by process 0."""

    def __init__(self, path, cfg):
        self.path, self.cfg = path, cfg
        path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", as_json(dataclasses.asdict(cfg)))

    def write(self, name, write):
        """A file, whole."""
        if not rank():
            write_whole(self.path / name, write)

    def write_checkpoint(self, name, state):
        """last.pt, or best.pt, which has the averaged weights alone."""
        if name == "best.pt":
            state = {key: state[key] for key in ("config", "step", "ema")}
        self.write(name, lambda f: torch.save(state, f))

    def write_pictures(self, lines, shown, step):
        """curves.png of the log, and masks.png or samples.png of what an evaluation shows."""
        import figures  # matplotlib takes a while to load

        cfg = self.cfg
        title = f"{config.kind_of(cfg)}, {'phantoms' if cfg.phantoms else 'X-rays'}, step {step}"
        self.write("curves.png", lambda f: figures.save_curves(f, lines, title))
        if cfg.task == "synthesis":
            self.write("samples.png", lambda f: figures.save_image_grid(f, shown[:64], title))
        else:
            self.write("masks.png", lambda f: figures.save_mask_grid(f, *shown, title))

    def write_results(self, table, command, evaluation, minutes, tested, device):
        """table.md, and results.json: the last evaluation, and where it comes from."""
        self.write("table.md", as_text(table))
        facts = dict(command=command, config=dataclasses.asdict(self.cfg), evaluation=evaluation)
        facts |= dict(minutes=round(minutes, 1)) | tested | provenance(device)
        self.write("results.json", as_json(facts))


def provenance(device):
    """Where a number comes from: commit, hardware, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    hardware = name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    if world() > 1:
        hardware += f", {world()} processes"
    versions = dict(torch=torch.__version__, python=platform.python_version())
    return dict(commit=commit() or "unknown", hardware=hardware) | versions


def processor():
    """The name of the CPU."""
    for line in lines_of("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit():
    """This checkout's commit, "+changes" where files differ from it; "" where there is none."""
    here = Path(__file__).resolve().parent
    if git("rev-parse", "--show-toplevel") != str(here):
        return ""  # a repository around an unpacked archive says nothing
    changes = "+changes" if git("status", "--porcelain", "-uno") else ""
    return git("rev-parse", "--short", "HEAD") + changes


def git(*words):
    """What a git command prints here; "" on a machine without git."""
    command = ["git", "-C", Path(__file__).resolve().parent, *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
