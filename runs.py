"""A run's folder: checkpoint, log, tables and pictures, and where its numbers come from.

config.json   every setting             curves.png    loss and metrics
log.jsonl     a line per log            masks.png     or samples.png
last.pt       go on or sample from here
best.pt       best on validation        table.md      beside the report's table
results.json  all numbers               test.md       the table of Test, with --test
split.csv     how your own images were divided: the run goes on with no other division

A finished run stays as it is. Another evaluation of it is written to a folder of its own below
evaluations, named ddim-2-x9-64: 2 steps of DDIM, the mean of 9 masks, 64 images.
"""

import contextlib
import dataclasses
import json
import math
import operator
import platform
import re
import subprocess
import zipfile
from pathlib import Path

import torch

import conditions
import config
import data
import networks
import pairs
import phantoms
from console import UserError, failure_named, message, refuse_pipe, write_whole
from devices import first_process_first, laid_out, processor, rank, world

FILES = "config.json log.jsonl last.pt best.pt results.json table.md test.md".split()
FILES += "curves.png masks.png samples.png split.csv".split()
# What a killed write_whole leaves in a run folder
TEMPORARY = rf"\.({'|'.join(name.partition('.')[0] for name in FILES)})\.\d+\.\w+"

# ---------------------------------------- files


def as_json(content):
    """What write_whole calls to write this dict."""
    return as_text(json.dumps(content, indent=1))


def as_text(text):
    """What write_whole calls to write this text and a newline."""
    return lambda path: path.write_text(text + "\n", encoding="utf-8")


def write_result(out, result, device):
    """Write a dict, and where its numbers come from, as JSON to --out."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), as_json(result | provenance(device)))


class Log:
    """log.jsonl: a dict a line, each with its step. Process 0 writes it.

    A run that goes on from `step` drops the lines after it, and those that are damaged: cut off,
    or not as train.py writes them. table(line): an error in an evaluation that is not.
    """

    def __init__(self, path, step=0, table=str):
        self.path, self.lines, damaged = path, [], 0
        for text in path.read_bytes().splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
                at = operator.index(line["step"])
                if "lr" in line:
                    float(line["loss"])
                if "Val" in line:
                    line["protocol"]["ddim_steps"], table(line)
                self.lines += [line] if at <= step else []
            except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
                damaged += 1
        if damaged:
            message(f"{path}: {damaged} damaged lines are left out")
        if not rank():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(path, lambda f: f.write_text(text))

    def add(self, **line):
        """Append a line."""
        self.lines.append(line)
        if not rank():
            with failure_named(self.path), open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def evaluations(self, protocol=None):
        """The lines of evaluations, in order; with a protocol, those under it alone."""
        lines = [line for line in self.lines if "Val" in line]
        return [line for line in lines if protocol in (None, line["protocol"])]


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
    groups = trainer.optimizer.state_dict()["param_groups"]  # the Config has all that is in them
    moments = checkpoint["optimizer"]["state"]
    trainer.optimizer.load_state_dict(dict(state=moments, param_groups=groups))


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
        written = path.stat().st_mtime_ns
        with zipfile.ZipFile(path) as records:
            rotten = records.testzip()  # torch.load compares no CRC-32; 0.6 s for 3.5 GB
        config.refuse(rotten, f"{rotten} in it is not what was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        facts = {"noises": checkpoint["config"].get("noises", 1), "written": written}
        checkpoint |= {"config": config_of(checkpoint["config"])} | facts
        whole = {k: x.float() if x.dtype == torch.half else x for k, x in checkpoint["ema"].items()}
        checkpoint["ema"] = whole  # the files of weights/ hold halves
        fault = fault_of(checkpoint)
    except Exception as e:
        why = " ".join(str(e).split())[:200] if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"{path}: not a checkpoint of train.py, or a damaged one ({why})") from e
    if fault:
        raise UserError(f"{path}: {fault}")
    return checkpoint


def config_of(settings):
    """The Config of a checkpoint. UserError: a setting of another type, or out of range."""
    cfg = config.from_dict(settings)
    for name, field in config.SETTINGS.items():
        value, kinds = getattr(cfg, name), (int, float) if field.type is float else (field.type,)
        wrong = type(value) not in kinds and (name, value) != ("cond", None)
        wrong = wrong or field.type is float and not math.isfinite(value)
        config.refuse(wrong, f"{name} cannot be {value!r}")
    unconditional = cfg.task == "synthesis" and not conditions.masks_of(cfg.given)
    alone = unconditional or cfg.model in config.baselines.U_NETS
    wrong = alone != (cfg.cond is None) or cfg.task == "synthesis" and cfg.supervised
    config.refuse(wrong, f"cond cannot be {cfg.cond} for {cfg.task} by {cfg.model}")
    config.check(cfg)
    return cfg


def fault_of(checkpoint):
    """What is wrong with the numbers and tensors of a checkpoint, in words; None: nothing."""
    for name, least in dict(step=0, images=1, minutes=0.0, command="").items():
        value = checkpoint.get(name, least)
        if type(value) is not type(least) or value < least or value == math.inf or value != value:
            return f"its {name} cannot be {str(value)[:100]}"
    network, step = networks.without_memory(checkpoint["config"]), checkpoint["step"]
    weights, state = network.state_dict(), checkpoint.get("optimizer", {}).get("state", {})
    moments = [dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p) for p in network.parameters()]
    parts = [("ema", checkpoint["ema"], weights)]
    if "model" in checkpoint:
        parts.append(("model", checkpoint["model"], weights))
        parts.append(("optimizer", state, dict(enumerate(moments)) if step else {}))
    for name, found, expected in parts:
        if form_of(found) != form_of(expected):
            return f"its weights do not fit its configuration: {name}"
        if not all(math.isfinite(n) for x in tensors_of(found) for n in torch.aminmax(x)):
            return f"a weight is not finite: {name}; train.py never saves such a model"
    for s in state.values():
        if s["step"] != min(step, 2**24) or s["exp_avg_sq"].min() < 0:  # float32 counts to 2^24
            return f"its optimizer has not taken {step} steps"
    return None


def form_of(nested):
    """Dicts of tensors with the shape and type in place of each tensor: equal where they fit."""
    if isinstance(nested, dict):
        return {name: form_of(value) for name, value in nested.items()}
    return nested.shape, nested.dtype, nested.is_contiguous()


def tensors_of(nested):
    """The values in dicts of dicts."""
    for value in nested.values():
        yield from tensors_of(value) if isinstance(value, dict) else [value]


def load_run(path, device="cpu"):
    """(model with the averaged weights, Config, step) of a run folder or a checkpoint.

    The model is ready to sample. UserError: damaged, of other sizes, or with a nan.
    """
    checkpoint = read_checkpoint(path)
    cfg = checkpoint["config"]
    model = networks.build_model(cfg).to(device)
    model.load_state_dict(checkpoint["ema"])
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
        phantoms.locate(args.data, cfg.images_of)  # a folder without data is refused first
    if not args.dry_run:
        refuse_taken(folder)
    return cfg, folder, None


def refuse_taken(folder):
    """UserError: the folder holds a run that has taken a step, or files that are not a run's."""
    names = {f.name for f in folder.iterdir()} if folder.exists() else set()
    if "last.pt" in names:
        if read_checkpoint(folder)["step"]:
            what = f"go on with --resume {folder}, or choose another --out"
            raise UserError(f"{folder} holds a run already; {what}")
        names -= {"last.pt", "config.json", "log.jsonl", "split.csv"}  # before the first step
    if others := sorted(name for name in names if not re.fullmatch(TEMPORARY, name)):
        raise UserError(f"{folder} holds other files, such as {others[0]}; choose another --out")


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
    if missing := {"model", "optimizer", "images", "minutes", "command"} - checkpoint.keys():
        rule = "a best.pt has the averaged weights alone, and no run goes on from it"
        raise UserError(f"{folder / 'last.pt'} has no {', '.join(sorted(missing))}; {rule}")
    config.refuse_foreign(given, checkpoint["config"].model)
    cfg = dataclasses.replace(checkpoint["config"], **given)
    config.check(cfg)
    rule = f"{folder} was trained with several noises an image, which is no more"
    config.refuse(checkpoint["noises"] > 1 and cfg.steps > checkpoint["step"], rule)
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
    names = ("Train", "Val", "Test") if args.test else ("Train", "Val")
    with first_process_first():
        cfg = phantoms.find_data(cfg, args.data)
        splits = phantoms.splits_of(cfg, names, path if checkpoint else None)
    if cfg.held_out:
        splits["Train"], splits["Val"] = data.divided(splits["Train"], cfg.held_out)
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
    if cfg.task == "masks":
        found, line = pairs.find(root, cfg.group)
        return line, {name: sum(pair.split == name for pair in found) for name in splits}
    if root == phantoms.PHANTOMS and not (root / data.TREES[cfg.images_of]).is_dir():
        counts = phantoms.PHANTOM_COUNTS[data.TREES[cfg.images_of]]
        sizes = {name: sum(counts[name][c] for c in cfg.classes) for name in splits}
        return f"{root}, phantoms, to be drawn", sizes
    tree = data.tree_folder(root, cfg.images_of)
    sizes = {s: sum(len(data.scan(tree / s / c / "images")) for c in cfg.classes) for s in splits}
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


def protocol_of(cfg):
    """How an evaluation samples. Where nothing is given there is no guidance."""
    names = [name for name in config.PROTOCOL if name != "guidance" or cfg.given]
    return {name: getattr(cfg, name) for name in names}


class Folder:
    """A locked run folder that process 0 writes to.

    A finished run keeps its files: what is measured later goes to `place`, below evaluations.
    UserError: another process has written here since the checkpoint was read.
    """

    def __init__(self, path, cfg, checkpoint):
        self.path, self.cfg, self.place = path, cfg, path
        step, before = (checkpoint["step"], checkpoint["config"]) if checkpoint else (0, cfg)
        self.another, measured_at = protocol_of(cfg) != protocol_of(before), None
        for name in FILES:
            refuse_pipe(path / name)
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
            measured_at = json.loads((path / "results.json").read_bytes())["evaluation"]["step"]
        self.finished = step == cfg.steps and (self.another or measured_at == step)
        if self.finished:
            sampler = "one-pass" if cfg.supervised else f"{cfg.sampler}-{cfg.ddim_steps}"
            sampler += f"-eta{cfg.eta:g}" if cfg.eta else ""
            self.place = path / "evaluations" / f"{sampler}-x{cfg.ensemble}-{cfg.eval_images}"
        if not rank():
            if not checkpoint:
                refuse_taken(path)
            elif (path / "last.pt").stat().st_mtime_ns != checkpoint["written"]:
                raise UserError(f"{path}: another run went on with it meanwhile; start again")
            for file in path.rglob(".*.*.*"):
                if re.fullmatch(TEMPORARY, file.name):
                    file.unlink()

    def begin(self, step, table):
        """Writes config.json. Returns the Log up to this step."""
        log = Log(self.path / "log.jsonl", step, lambda line: table(self.cfg, line))
        if not self.finished:
            self.write("config.json", as_json(dataclasses.asdict(self.cfg)))
            if self.cfg.task == "masks":
                found, _ = pairs.find(self.cfg.data, self.cfg.group)
                self.write("split.csv", lambda f: f.write_bytes(pairs.as_csv(found)))
        return log

    def write(self, name, write, size="room"):
        """A file, whole."""
        if not rank():
            self.place.mkdir(parents=True, exist_ok=True)
            write_whole(self.place / name, write, size)

    def write_checkpoint(self, name, state):
        """last.pt, or best.pt, which has the averaged weights alone; of a finished run neither."""
        if name == "best.pt":
            state = {key: state[key] for key in ("config", "step", "ema")}
        if not self.finished:
            size = sum(getattr(x, "nbytes", 0) for x in tensors_of(state))
            self.write(name, lambda f: torch.save(state, f), f"{size / 1e6:.1f} MB")

    def write_pictures(self, lines, shown, step):
        """curves.png of the log, and masks.png or samples.png of what an evaluation shows."""
        import figures  # matplotlib takes a while to load

        cfg = self.cfg
        title = f"{config.kind_of(cfg)}, {cfg.images_are}, step {step}"
        if not self.finished:
            self.write("curves.png", lambda f: figures.save_curves(f, lines, title))
        if cfg.task == "synthesis":
            self.write("samples.png", lambda f: figures.save_image_grid(f, shown[:64], title))
        else:
            self.write("masks.png", lambda f: figures.save_mask_grid(f, *shown, title))

    def write_results(self, tables, command, evaluation, minutes, tested, device):
        """table.md, test.md, and results.json: the last evaluation, and where it comes from."""
        known = not self.another or (self.place / "results.json").exists()
        if self.finished and known and not tested:
            return
        for name, table in tables.items():
            self.write(name, as_text(table))
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
