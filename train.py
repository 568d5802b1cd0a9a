r"""Train one model of the report: X-rays from noise (§3), or masks from X-rays (§4).

    python train.py --task lung --cond concat        §4.4  lung masks       (Table 1, Figure 5)
    python train.py --task lung --cond add           §4.4                   (Table 1, Figure 4)
    python train.py --task infection --cond add      §4.5  infection masks  (Table 2, Figure 7)
    python train.py --task synthesis                 §3    chest X-rays     (Figure 3)
    python train.py --task lung --model unet         §4.4  without diffusion, one pass; or res50attunet, report-unet
    python train.py --resume runs/lung-concat-0      go on with a run that was stopped
    python train.py --resume runs/lung-concat-0 --eval-images 512 --ensemble 9     evaluate a finished run in another way

Data: COVID-QU-Ex in ./COVID-QU-Ex or in --data DIR; without it, generated chest phantoms. Preset: `report` is the
report's network and hyperparameters, for an NVIDIA GPU; `best` the same network, trained and sampled by what wins on phantoms;
`small` that at a size a laptop trains in minutes.
Without --preset the machine decides. Ctrl-C saves and says how to go on. Several GPUs, or CPU processes, share every batch:

    torchrun --nproc-per-node 4 train.py --task lung --cond concat        same flags, same batches, same numbers

A run folder, by default runs/<task>-<model>-<cond>-<seed> with what applies, holds
    config.json   every setting             curves.png    loss and metrics           last.pt   go on or sample from here
    log.jsonl     a line per log            masks.png or samples.png                 best.pt   best validation DICE
    table.md      beside the report's table                                          results.json   all numbers
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded
    # Idle OpenMP threads that spin make a busy machine 5 times slower, those that sleep at once an idle one 1.3 times.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}  # spin for some microseconds, then sleep

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import baselines
import data
import diffusion
import metrics
import score
from unet import CONDITIONINGS, ConditionalUNet, UNet

TASKS = ("synthesis", "lung", "infection")
MODELS = ("diffusion", *baselines.U_NETS, "report-unet")  # all but the first see the X-ray and answer in one pass
EVAL_SEED = 0  # chooses the evaluated images and their x_T: the same in every run, so that runs compare (§4.3)
OBJECTIVES = ("eps", "ncsn", "vp")
SAMPLERS = ("ddim", "ddpm", "ode", "sde", "pc", "langevin")
OF_DIFFUSION = ("objective", "target", "shift", "t_power", "noises", "sampler", "ddim_steps", "eta", "ensemble")  # what the others have no use for
PROTOCOL = ("eval_images", "sampler", "ddim_steps", "eta", "ensemble")  # how an evaluation samples; --resume may change it
RESUMABLE = ("steps", "micro_batch", "eval_every", *PROTOCOL)  # what may change when a run goes on
SAVE_EVERY = 300  # seconds between checkpoints
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
}


class UserError(ValueError):
    """Something the user can mend: one clear line, exit status 2."""


class Stopped(Exception):
    """One of STOP_SIGNALS arrived; the run is to be saved and left."""


# ------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers. The defaults are the report's, each with its section; see PRESETS for the small size."""

    task: str  # synthesis (§3), lung (§4.4), infection (§4.5)
    model: str = "diffusion"  # or a supervised network (baselines.py): unet, res50attunet, report-unet
    cond: str | None = None  # how the X-ray enters the U-Net (§4.2): add, concat, none, cross; None where it has no other way
    data: str = ""  # folder the images came from
    phantoms: bool = False  # whether they are generated
    classes: tuple = ()  # of data.CLASSES
    preset: str = "report"
    objective: str = "eps"  # at which noise it learns: eps: steps 1..T, Eq. (7); §2.1's losses: ncsn, ten noise levels; vp, every real t
    target: str = "eps"  # what the network predicts: eps is Eq. (7)
    shift: float = 1.0  # the schedule's signal-to-noise ratio is shift^2 times that of §3.2; below 1: more noise
    t_power: float = 1.0  # t is drawn with density t^(t_power - 1): 1 is Eq. (7)'s uniform, 2 prefers high noise
    noises: int = 1  # draws of t and eps for each image of a batch, each from another part of t's distribution; its X-ray is embedded once
    augment: float = 0.0  # strength of data.augment on X-ray and mask; 0: none, as the report
    epochs: float = 100.0  # §4.4; 2400 in §4.5
    steps: int = 0  # gradient steps; 0: as many as the epochs take
    batch_size: int = 512  # §4.4, §4.5
    micro_batch: int = 0  # images a forward pass; 0: as many of the batch as the memory holds
    lr: float = 3e-3  # §4.4, §4.5
    lr_decay: str = "none"  # none, or cosine: to 0 over the run
    warmup: int = 200  # steps of linear warm-up; 0: none
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    weight_decay: float = 0.01  # AdamW
    ema: float = 0.999  # decay of the averaged weights that are evaluated; 0: none
    channels: int = 192  # §3.2
    channel_mult: tuple = (1, 2, 3, 4)  # §3.2
    blocks: int = 2  # §3.2
    attention_levels: tuple = (1, 2, 3)  # §3.2: 32, 16 and 8 of 64
    head_channels: int = 64  # §3.2
    growth: int = 32  # of the embedder's RDBs, [1]
    rrdbs: int = 1  # §4.2: how many the embedder has
    rrdb: str = "report"  # or segdiff: with the residual scaling of [1]
    stem: str = "own"  # first weights of the U-Net's first convolution; add, with concat: those that make it addition
    image_size: int = 64  # §3.1
    T: int = 1000  # §3.2
    sampler: str = "ddim"  # §3.2; the others of §2 and §2.1: see sample_with
    ddim_steps: int = 50  # §3.2: passes of the network, whatever the sampler
    eta: float = 0.0  # [18]
    ensemble: int = 1  # masks averaged for one image; §4.3: "we decided to calculate each mask one time"
    eval_images: int = 512  # §4.3: of train and of validation, the same at every evaluation
    evaluations: int = 10  # in a run; §4.3: one an epoch
    eval_every: int = 0  # steps from one to the next; 0: as many as make that number
    seed: int = 0
    precision: str = "fp32"  # or bf16: autocast with float32 parameters

    @property
    def supervised(self):
        """Whether the network sees the X-ray alone and answers in one pass."""
        return self.model != "diffusion"


OF_MASKS = dict(target="v", lr_decay="cosine", t_power=4.0, noises=2, ddim_steps=2)
WINS = {"synthesis": dict(target="v", lr_decay="cosine"), "lung": OF_MASKS, "infection": OF_MASKS}  # where it differs from the report: README
PRESETS = {
    "report": {"synthesis": {}, "lung": {}, "infection": dict(epochs=2400)},
    "best": {"synthesis": WINS["synthesis"], "lung": WINS["lung"], "infection": dict(epochs=2400) | WINS["infection"]},
    "small": {
        task: WINS[task]
        | dict(
            steps={"synthesis": 1500, "lung": 500, "infection": 1000}[task],
            evaluations=2,
            batch_size=16,
            warmup=50,
            ema=0.995,
            channels=16,
            blocks=1,
            attention_levels=(3,),
            head_channels=16,
            growth=8,
            eval_images=64,
        )
        for task in TASKS
    },
}


def parse(argv):
    """The command line -> argparse.Namespace; what was not given is None."""
    p = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=TASKS, help="what to learn; needed unless --resume")
    p.add_argument("--model", choices=MODELS, help="default diffusion; the others are supervised: X-ray in, mask out, one pass")
    p.add_argument("--cond", choices=CONDITIONINGS, help="how the X-ray enters the U-Net (§4.2); default concat")
    p.add_argument("--data", metavar="DIR", help="folder with COVID-QU-Ex; default ./COVID-QU-Ex, else phantoms")
    p.add_argument("--classes", nargs="+", metavar="CLASS", help=f"some of {', '.join(data.CLASSES)}")
    p.add_argument("--preset", choices=PRESETS, help="default: report where there is an NVIDIA GPU, small elsewhere")
    p.add_argument("--objective", choices=OBJECTIVES, help="at which noise it learns: steps 1..T (Eq. 7), or §2.1: ten levels, or every real t")
    p.add_argument("--target", choices=diffusion.TARGETS, help="what the network predicts: the noise (Eq. 7), a mix, the image")
    p.add_argument("--shift", type=float, metavar="X", help="signal-to-noise ratio of the schedule, times X^2: below 1 more noise; 1: §3.2")
    p.add_argument("--t-power", type=float, metavar="X", help="t is drawn with density t^(X-1): 1 uniform (Eq. 7), above 1 more noise")
    p.add_argument("--noises", type=int, metavar="N", help="noised copies of each mask or image of a batch; the X-ray is embedded once")
    p.add_argument("--augment", type=float, metavar="X", help="move, turn and expose X-ray and mask anew each time; 0: no")
    p.add_argument("--steps", type=int, metavar="N", help="gradient steps")
    p.add_argument("--epochs", type=float, metavar="X", help="passes over the training images (instead of --steps)")
    p.add_argument("--batch-size", type=int, metavar="N", help="images a gradient step")
    p.add_argument("--micro-batch", type=count_or_auto, metavar="N", help="images a forward pass, or auto; the gradient is the whole batch's")
    p.add_argument("--lr", type=float, metavar="X", help="learning rate of AdamW")
    p.add_argument("--lr-decay", choices=("none", "cosine"), help="learning rate after the warm-up")
    p.add_argument("--warmup", type=int, metavar="N", help="steps of linear warm-up; 0: none")
    p.add_argument("--clip", type=float, metavar="X", help="largest norm of the gradient; 0: no clipping")
    p.add_argument("--ema", type=float, metavar="X", help="decay of the averaged weights; 0: none")
    p.add_argument("--channels", type=int, metavar="N", help="width of the first level")
    p.add_argument("--rrdbs", type=int, metavar="N", help="RRDBs of the embedder; default 1 (§4.2)")
    p.add_argument("--rrdb", choices=("report", "segdiff"), help="§4.2's, or with SegDiff's scaling by 0.2 and no fifth activation")
    p.add_argument("--stem", choices=("own", "add"), help="add, with --cond concat: begin with the weights that make it addition")
    p.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    p.add_argument("--sampler", choices=SAMPLERS, help="DDIM (§3.2), DDPM's T passes, or those of §2.1; default ddim")
    p.add_argument("--ddim-steps", type=int, metavar="N", help="passes of the network to sample one image, by any sampler but ddpm")
    p.add_argument("--eta", type=float, metavar="X", help="fresh noise in DDIM, 0 (only x_T is random) to 1")
    p.add_argument("--ensemble", type=int, metavar="N", help="masks averaged for one image (Amit et al.)")
    p.add_argument("--eval-images", type=int, metavar="N", help="images of train and of validation that an evaluation samples")
    p.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations")
    p.add_argument("--seed", type=int, metavar="N", help="of the initial weights, the order of the images and the noise")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where the device is fast at it")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--out", metavar="DIR", help="run folder; default runs/<task>-<cond>-<seed>")
    p.add_argument("--resume", metavar="RUN", help="go on with this run, or evaluate it in another way (--eval-images 512 --ensemble 9)")
    p.add_argument("--test", action="store_true", help="at the end, evaluate on the Test split too; choose nothing by it")
    p.add_argument("--dry-run", action="store_true", help="print the configuration and the sizes, and stop")
    return p.parse_args(argv)


def count_or_auto(word):
    if word != "auto" and not word.isdigit():
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {word}")
    return 0 if word == "auto" else int(word)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message}\n")


def configure(args, device):
    """Preset, then the flags given -> Config; UserError names the flag and the value of what cannot be."""
    if args.task is None:
        raise UserError(f"--task is needed: one of {', '.join(TASKS)}")
    if args.task == "synthesis" and args.cond:
        raise UserError(f"--cond is about segmentation; --task synthesis is unconditional (§3), got --cond {args.cond}")
    if args.task == "synthesis" and args.model not in (None, "diffusion"):
        raise UserError(f"--model {args.model} finds masks; --task synthesis needs --model diffusion")
    for name in ("cond", "rrdbs", "rrdb", "stem"):
        if args.model in baselines.U_NETS and (given := getattr(args, name)) is not None:
            raise UserError(f"--{name} is about the report's network; --model {args.model} sees the X-ray itself, got --{name} {given}")
    refuse_flags_of_diffusion(args, args.model)
    if args.steps is not None and args.epochs is not None:
        raise UserError("--steps and --epochs say the same thing twice; give one")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    preset = args.preset or ("report" if device.type == "cuda" else "small")
    cond = None if args.task == "synthesis" or args.model in baselines.U_NETS else "concat"
    settings = dict(task=args.task, cond=cond, preset=preset, precision="bf16" if bf16_is_fast(device) else "fp32")
    settings |= PRESETS[preset][args.task]
    if args.model in baselines.U_NETS:
        settings |= dict(channels=32 if preset == "small" else 64)  # as wide as published; or as long a step as the diffusion model's
    if args.sampler not in (None, "ddim"):  # few passes do for DDIM alone
        settings |= dict(ddim_steps=Config.ddim_steps)
    if args.objective == "ncsn":  # it knows the score at its levels alone
        settings |= dict(sampler="langevin", ddim_steps=101)
    fields = {f.name for f in dataclasses.fields(Config)}
    settings |= {k: v for k, v in vars(args).items() if k in fields - {"data"} and v is not None}
    settings["classes"] = tuple(settings.get("classes") or data.DEFAULT_CLASSES[args.task])
    if args.epochs is not None:
        settings["steps"] = 0
    cfg = Config(**settings)
    check(cfg)
    return cfg


def refuse_flags_of_diffusion(args, model):
    """A supervised model has no noise to choose and no way to sample."""
    for name in OF_DIFFUSION:
        if model not in (None, "diffusion") and (given := getattr(args, name, None)) is not None:
            raise UserError(f"--{name.replace('_', '-')} is about diffusion; --model {model} answers in one pass, got {given}")


def check(cfg):
    """Refuse settings out of range, by the flag's name."""
    least = dict(steps=0, batch_size=1, micro_batch=0, warmup=0, channels=2, image_size=1, ddim_steps=1, ensemble=1)
    least |= dict(eval_images=2, eval_every=0, seed=0, clip=0, ema=0, rrdbs=1, noises=1)
    for name, low in least.items():
        if not getattr(cfg, name) >= low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(cfg, name)}")
    for name in ("lr", "epochs", "t_power", "shift"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite, got {getattr(cfg, name)}")
    if not cfg.seed < 2**63:
        raise UserError(f"--seed must be below 2^63, got {cfg.seed}")
    if cfg.task == "synthesis" and cfg.ensemble > 1:
        raise UserError(f"--ensemble averages masks; --task synthesis has none, got {cfg.ensemble}")
    if cfg.task == "synthesis" and cfg.augment:
        raise UserError(f"--augment moves an X-ray and its mask; --task synthesis would learn to draw the moves, got {cfg.augment}")
    if cfg.cond in (None, "none") and (cfg.rrdbs, cfg.rrdb) != (1, "report"):
        raise UserError(f"--rrdbs and --rrdb are about the embedder, and --cond {cfg.cond} has none, got {cfg.rrdbs} and {cfg.rrdb}")
    if cfg.stem == "add" and cfg.cond != "concat":
        raise UserError(f"--stem add is about --cond concat, got --cond {cfg.cond}")
    if cfg.model in baselines.U_NETS and cfg.image_size % baselines.U_NETS[cfg.model].shrinks:
        shrinks = baselines.U_NETS[cfg.model].shrinks
        raise UserError(f"--image-size must be divisible by {shrinks} for --model {cfg.model}, got {cfg.image_size}")
    if not 0 <= cfg.augment <= 2:
        raise UserError(f"--augment must be between 0 and 2, got {cfg.augment}")
    if not cfg.ema < 1:
        raise UserError(f"--ema must be below 1, got {cfg.ema}")
    if not 0 <= cfg.eta <= 1:
        raise UserError(f"--eta must be between 0 and 1, got {cfg.eta}")
    least_passes = {"ode": 3, "sde": 2, "pc": 3, "langevin": 11}.get(cfg.sampler, 1)
    if cfg.ddim_steps < least_passes:
        raise UserError(f"--ddim-steps must be at least {least_passes} for --sampler {cfg.sampler}, got {cfg.ddim_steps}")
    if cfg.eta and cfg.sampler != "ddim":
        raise UserError(f"--eta is about --sampler ddim, got {cfg.eta} for --sampler {cfg.sampler}")
    if cfg.ddim_steps > cfg.T:
        raise UserError(f"--ddim-steps must be at most T = {cfg.T}, got {cfg.ddim_steps}")
    if set(cfg.classes) - set(data.CLASSES):
        raise UserError(f"--classes must be some of {', '.join(data.CLASSES)}, got {', '.join(cfg.classes)}")
    if cfg.task == "infection" and "COVID-19" not in cfg.classes:
        raise UserError(f"--classes needs COVID-19 for --task infection: the masks of the others are blank, got {', '.join(cfg.classes)}")


def choose_device(name=None):
    """--device as a torch.device that works here; None: the best there is. Under torchrun, each process has its own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device must be cuda, mps or cpu, got {name}")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} does not work here: {str(e).splitlines()[0]}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what the processes of torchrun talk by
    return device


def bf16_is_fast(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def build_model(cfg):
    """The network of a configuration, with fresh weights from its seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        torch.manual_seed(cfg.seed)
        if cfg.model in baselines.U_NETS:
            return baselines.U_NETS[cfg.model](cfg.channels)
        net = ConditionalUNet(
            cfg.cond,
            growth=cfg.growth,
            rrdbs=cfg.rrdbs,
            segdiff=cfg.rrdb == "segdiff",
            from_add=cfg.stem == "add",
            image_size=cfg.image_size,
            channels=cfg.channels,
            channel_mult=cfg.channel_mult,
            blocks=cfg.blocks,
            attention_at=tuple(cfg.image_size >> level for level in cfg.attention_levels),
            head_channels=cfg.head_channels,
        )
        return baselines.OnePass(net, cfg.T) if cfg.supervised else net


def autocast(cfg, device):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.precision == "bf16")


def out_of_memory(error):
    """Whether a RuntimeError says so; CUDA has a class for it, MPS and cuBLAS only words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


# ------------------------------------------------------------------------------------- several processes


def rank():
    """Which of the processes that torchrun started this is; 0 alone writes and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    """How many processes share the work; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Join the processes that torchrun started, if any; all but the first are silent until an error ends them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    distributed.init_process_group()  # NCCL between GPUs, Gloo between CPUs
    with contextlib.ExitStack() as stack:
        if rank():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield
        distributed.destroy_process_group()  # after an error the others are not waited for


@contextlib.contextmanager
def first_process_first():
    """Files are made by the first process, and found by the others."""
    if rank():
        distributed.barrier()
    yield
    if world() > 1 and not rank():
        distributed.barrier()


def any_process(*flags):
    """Each flag, true if it is so in one of the processes."""
    if world() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return flags.bool().tolist()


def shared(work, N):
    """work(indices) -> a row for each, over 0..N-1: every process works on its share and gets all rows, in order.

    Stopped in one of them stops all.
    """
    if world() == 1:
        return work(np.arange(N))
    try:
        mine = work(np.arange(rank(), N, world()))
    except Stopped:
        mine = None
    shares = [None] * world()
    distributed.all_gather_object(shares, mine)
    if any(share is None for share in shares):
        raise Stopped
    rows = torch.empty(N, *shares[0].shape[1:])
    for i, share in enumerate(shares):
        rows[i :: world()] = share
    return rows


# ------------------------------------------------------------------------------------- memory


def free_memory(device):
    """Bytes that this process can still take on the device; None where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    kilobytes = [int(line.split()[1]) for line in lines_of("/proc/meminfo") if line.startswith("MemAvailable")]
    return 1024 * kilobytes[0] // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if kilobytes else None


def kept_for_backward(model, cfg, device):
    """Bytes of activations that autograd keeps for each image of a batch, counted in the forward passes of one and of two images."""

    def kept(n):
        seen = {}

        def note(x):
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()  # a storage that two layers keep counts once
            return x

        y = torch.zeros(n, 1, cfg.image_size, cfg.image_size, device=device)
        xt, t = y.repeat_interleave(cfg.noises, 0), torch.ones(n * cfg.noises, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(cfg, device):
            model(*((y,) if cfg.supervised else (xt, t, y if cfg.cond else None)))
        return sum(seen.values())

    return kept(2) - kept(1)  # what is kept once, weights in 16 bits, falls out


FEW = 16  # images a forward pass that keep a GPU busy


def pieces_that_fit(n, free, kept, kept_recomputed):
    """(images a forward pass, whether blocks are computed again) for n images in `free` bytes, kept bytes an image.

    As few pieces as fit. Computing blocks again costs a third more arithmetic, so only where not even FEW images fit without.
    """
    kept, kept_recomputed = (1.4 * k for k in (kept, kept_recomputed))  # gradients and temporaries on the way
    recompute = free < min(n, FEW) * kept
    fit = max(1, int(free // (kept_recomputed if recompute else kept)))
    return -(-n // -(-n // fit)), recompute


# ------------------------------------------------------------------------------------- training


@functools.lru_cache(maxsize=2)
def order_of(seed, epoch, N):
    """The order of N images in one pass over them."""
    return np.random.default_rng([seed, 1, epoch]).permutation(N)


def batch_indices(cfg, N, step):
    """Which images batch `step` (1, 2, ...) holds: B consecutive places in an endless row of permutations of 0..N-1.

    A function of (seed, step) alone, so that a resumed run needs no memory of the order.
    """
    places = np.arange((step - 1) * cfg.batch_size, step * cfg.batch_size)
    return torch.from_numpy(np.concatenate([order_of(cfg.seed, e, N)[places[places // N == e] % N] for e in np.unique(places // N)]))


def generator(*words):
    """A torch.Generator on the CPU, of these numbers alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


@functools.lru_cache(maxsize=2)
def schedule(T, shift=1.0):
    """§3.2's schedule of T steps, shifted where a run says so."""
    s = diffusion.linear_schedule(T)
    return s if shift == 1 else diffusion.shifted(s, shift)


@functools.lru_cache(maxsize=2)
def process_of(T, shift=1.0):
    """The schedule as the process of §2.1."""
    return score.steps_of(schedule(T, shift).abar)


@functools.lru_cache(maxsize=2)
def ncsn_steps(T):
    """Where the ten noise levels of objective ncsn and of sampler langevin lie: geometric levels, nearest steps, largest first.

    The same steps on a shifted schedule, which multiplies all levels alike.
    """
    process = process_of(T)
    sigmas = score.geometric(score.level(process, 1.0), score.level(process, 1 / T), 10)
    return [max(1, round(score.time_of(process, sigma) * T)) for sigma in sigmas]


def draws(cfg, step, like):
    """t (B, K) and eps (B, K, C, H, W) of Eq. (7) for batch `step`, K = cfg.noises for each image of like (B, C, H, W).

    A function of (seed, step) alone, the same on every device. The K draws of an image come from K parts, of equal probability, of t's
    distribution. t is int64 in 1..T; with objective ncsn among the steps of its levels; with vp float64 in [1, T].
    """
    g, K = generator(cfg.seed, 2, step), cfg.noises
    u = (torch.arange(K) + torch.rand(len(like), K, generator=g, dtype=torch.float64)) / K
    t = (cfg.T * u ** (1 / cfg.t_power)).clamp(min=1)  # P(t <= k) = (k / T)^t_power
    if cfg.objective == "ncsn":
        steps = torch.tensor(ncsn_steps(cfg.T)[::-1])
        t = steps[(len(steps) * u ** (1 / cfg.t_power)).long()]
    elif cfg.objective == "eps":
        t = t.ceil().long()
    eps = torch.randn(len(like), K, *like.shape[1:], generator=g, pin_memory=like.is_cuda)
    return t, eps.to(like.device, non_blocking=True)


def learning_rate(cfg, step):
    """Linear warm-up, then constant, or a cosine to 0 at the last step."""
    warm = min(1.0, step / cfg.warmup) if cfg.warmup else 1.0
    return cfg.lr * warm * (1 if cfg.lr_decay == "none" else (1 + math.cos(math.pi * (step - 1) / cfg.steps)) / 2)


def score_matching(process, T, model, x0, y, t, eps, target):
    r"""The losses of §2.1 with lambda = s(t)^2 (score.dsm_loss, score.sde_loss), for a network that is asked for x_0, eps or v:

        || eps_hat(a x_0 + s eps, t) - eps ||^2,      averaged over pixels; t (B,), a real number of steps in 1..T

    An NCSN of noise level sigma = s / a is the same network, fed with x / sqrt(1 + sigma^2).
    """
    abar = torch.tensor([process.marginal(float(u) / T)[0] ** 2 for u in t], dtype=torch.float64)
    s, i = diffusion.Schedule(None, None, abar), torch.arange(len(t))  # entry i is the abar of image i
    xt = diffusion.q_sample(s, x0, i, eps)
    answer = model(xt, t.to(xt.device), y).to(x0.dtype)
    return (diffusion.eps_of(s, target, answer, xt, i) - eps).square().mean()


class Trainer:
    """Model, averaged model (EMA), optimiser and step: what a checkpoint holds, and the gradient step that moves it."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.step = cfg, device, 0
        self.s = schedule(cfg.T, cfg.shift)
        self.model = build_model(cfg).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if world() > 1 else self.model
        places = [cfg.batch_size * i // world() for i in (rank(), rank() + 1)]
        self.mine, self.images = slice(*places), places[1] - places[0]  # the part of the batch whose gradient this process takes
        self.micro_batch = cfg.micro_batch or self.images

    def fit_memory(self):
        """Choose micro_batch, and whether blocks are computed again in the backward pass, by what is free. Returns what was chosen, in words."""
        free, n = free_memory(self.device), self.images
        unets = [m for m in self.model.modules() if isinstance(m, UNet)]  # the U-Nets of baselines.py compute nothing again
        if free is None:
            return f"{self.micro_batch} images a forward pass (the free memory cannot be told here)"
        parameters = sum(p.numel() for p in self.model.parameters())
        room = 0.9 * free - 4 * parameters * (1 if self.optimizer.state else 3)  # gradients, and AdamW's two moments if not yet there
        kept = []
        for recompute in (False, True):
            for unet in unets:
                unet.recompute = recompute
            kept.append(kept_for_backward(self.model, self.cfg, self.device))
        fit, recompute = pieces_that_fit(self.cfg.micro_batch or n, room, *kept)
        self.micro_batch = self.cfg.micro_batch or fit
        for unet in unets:
            unet.recompute = recompute
        again = " (blocks computed again)" if recompute and unets else ""
        how = f"{kept[recompute] / 1e6:.0f} MB an image{again}, {free / 1e9:.1f} GB free"
        return f"{min(n, self.micro_batch)} of {n} images a forward pass; {how}"

    def train_step(self, images, masks):
        """One step of AdamW on Eq. (7) or l_supervised. images, masks: the split, uint8 on the device. Returns the loss, still on the device."""
        cfg = self.cfg
        self.step += 1
        rows = batch_indices(cfg, len(images), self.step).to(images.device)
        image = data.to_float(images[rows])
        # §3: x_0 is the X-ray. §4.1: x_0 is the mask and y the X-ray.
        x0, y = (image, None) if masks is None else (data.to_float(masks[rows]), image)
        if cfg.augment:
            y, x0 = data.augment(y, x0, generator(cfg.seed, 3, self.step), cfg.augment)
        t, eps = (None, None) if cfg.supervised else draws(cfg, self.step, x0)

        loss = self.gradient(*(a if a is None else a[self.mine] for a in (x0, y, t, eps)))
        if cfg.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, self.step)
        self.optimizer.step()
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss

    def gradient(self, x0, y, t, eps):
        """Gradient of the batch's mean loss, in pieces of micro_batch images; the pieces halve when memory runs out.

        x0, y, t, eps: of the images of this process; t and eps as from draws. The gradient is the sum over all processes, the loss returned
        this one's part.
        """
        while True:
            try:
                self.optimizer.zero_grad(set_to_none=True)
                total = 0.0
                for a in range(0, len(x0), self.micro_batch):
                    b = min(a + self.micro_batch, len(x0))
                    together = contextlib.nullcontext() if b == len(x0) or world() == 1 else self.parallel.no_sync()
                    with together:  # gradients of the processes meet once, in the last piece
                        share = (b - a) / self.cfg.batch_size
                        total = total + self.piece(*(v if v is None else v[a:b] for v in (x0, y, t, eps)), share)
                return total
            except RuntimeError as e:
                if not out_of_memory(e):
                    raise
            # out of the except block, whose traceback holds the activations of the piece that failed
            if self.cfg.micro_batch or self.micro_batch == 1 or world() > 1:
                raise UserError(f"out of memory with {self.micro_batch} images at once; try a smaller --micro-batch or --channels")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch = -(-self.micro_batch // 2)
            say(f"out of memory: from here on {self.micro_batch} images at once; the batch stays {self.cfg.batch_size}")

    def piece(self, x0, y, t, eps, share):
        """Add the gradient of one piece, which is this share of the batch. Returns its part of the mean loss."""
        if not self.cfg.supervised:
            x0, t, eps = x0.repeat_interleave(self.cfg.noises, 0), t.flatten(), eps.flatten(0, 1)
        with autocast(self.cfg, self.device):
            if self.cfg.supervised:
                loss = baselines.l_supervised(self.parallel(y), x0) * share
            elif self.cfg.objective == "eps":
                loss = diffusion.l_simple(self.s, self.parallel, x0, y, t, eps, self.cfg.target) * share
            else:
                process = process_of(self.s.T, self.cfg.shift)
                loss = score_matching(process, self.s.T, self.parallel, x0, y, t, eps, self.cfg.target) * share
        (loss * world()).backward()  # of which DistributedDataParallel takes the mean over the processes
        return loss.detach()

    def state(self):
        """Plain numbers and tensors: torch.load(weights_only=True) reads it, load_run rebuilds the model from it."""
        return dict(
            config=dataclasses.asdict(self.cfg),
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )

    def load_state(self, c):
        self.step = c["step"]
        self.model.load_state_dict(c["model"])
        self.ema.load_state_dict(c["ema"])
        groups = [group | {"fused": True} for group in c["optimizer"]["param_groups"]]  # older runs have False
        self.optimizer.load_state_dict(c["optimizer"] | {"param_groups": groups})


def write_whole(path, write):
    """write(temporary path), then rename: a file is there whole or not at all."""
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
    return lambda f: f.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_checkpoint(path):
    """The dict of a checkpoint, on the CPU, from last.pt, best.pt or a run folder. UserError where there is none or a damaged one."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; python train.py --help shows how to train one")
    try:
        c = torch.load(path, map_location="cpu", weights_only=True)
        as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in c["config"].items()}
        return dict(c, config=Config(**as_tuples))
    except Exception as e:
        raise UserError(f"{path}: not a checkpoint of train.py, or a damaged one ({type(e).__name__})") from e


def load_run(path, device="cpu"):
    """(model with the averaged weights, config, step) of a run folder or checkpoint; what sample.py and the notebooks call."""
    c = read_checkpoint(path)
    model = build_model(c["config"]).to(device)
    try:
        model.load_state_dict(c["ema"])
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: its weights do not fit its configuration") from e
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: a weight is not finite; train.py never saves such a model")
    return laid_out(model.requires_grad_(False).eval(), device), c["config"], c["step"]


def laid_out(model, device):
    """The model as sampling wants it: on a CPU a copy with channels last, 1.2 times as fast. (In training, its backward pass loses that again.)"""
    return copy.deepcopy(model).to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else model


def open_run(words, otherwise, device="cpu"):
    """What the notebooks look at: the finished run of `python train.py WORDS`, or else a shorter one, trained here and now.

    words      "--task lung --cond concat": its run is looked for in runs/ of the current folder, or at --out; one of fewer steps does not count
    otherwise  "--steps 200": added to the words where there is none; that run is kept in runs/...-200-steps, and found the next time

    Returns (model with the averaged weights, config, folder, label); the label says which data and which run.
    """

    def finished(folder, steps):
        file = folder / "results.json"
        return file.exists() and json.loads(file.read_text(encoding="utf-8"))["evaluation"]["step"] >= steps

    full, short = (configure(parse(w.split()), torch.device(device)) for w in (words, f"{words} {otherwise}"))
    folder = Path(parse(words.split()).out or Path("runs", name_of(full)))
    if not finished(folder, full.steps):
        folder = folder.with_name(f"{folder.name}-{short.steps}-steps")
    if not finished(folder, short.steps):
        went_on = ["--resume", str(folder)] if (folder / "last.pt").exists() else [*words.split(), *otherwise.split(), "--out", str(folder)]
        if main([*went_on, "--device", str(device)]):
            raise Stopped(f"{folder} was not trained to its end")
    model, cfg, step = load_run(folder, device)
    return model, cfg, folder, f"{'phantoms' if cfg.phantoms else 'X-rays'}, {folder}, step {step}"


# ------------------------------------------------------------------------------------- evaluation: §4.3


def passes_line(label, total, check=lambda: None):
    """A progress(images) for the samplers below: images passed through the network, of `total`, and the time left."""
    line, done = data.progress_line(label), 0

    def progress(images):
        nonlocal done
        line(done := done + images, total)
        check()

    return progress


def eps_model_of(model, cfg, s, device, progress=None):
    """The network as the samplers want it, eps_model(xt, t, e), whatever it predicts. e = model.embed(y), once for all steps."""

    def eps_model(xt, t, e):
        with autocast(cfg, device):
            answer = model.denoise(xt, t, e).float()
        if progress:
            progress(len(xt))
        return diffusion.eps_of(s, cfg.target, answer, xt, t)

    return eps_model


def passes_of(cfg):
    """How often the network is called for one image."""
    N = cfg.ddim_steps
    if cfg.supervised:
        return 1
    exact = {"ddpm": cfg.T, "ode": 2 * ((N + 1) // 2) - 1, "pc": 2 * ((N - 1) // 2) + 1, "langevin": 10 * ((N - 1) // 10) + 1}
    return exact.get(cfg.sampler, N)


def sample_with(cfg, s, eps_model, noise, e):
    """x_0 by one of SAMPLERS, in at most cfg.ddim_steps passes of the network (DDPM: T), x_0_hat clipped in all of them.

    ode       the probability-flow ODE by Heun's method, noise levels evenly spaced in sigma^(1/7) down to 0.02, then 0
    sde, pc   the reverse SDE by Euler-Maruyama, and with a Langevin step before each (of a length averaged over the images
              that are sampled together, as in [20]: with pc alone, an image depends a little on its batch)
    langevin  annealed Langevin dynamics over ten of the schedule's noise levels (ncsn_steps)
    """
    N, T = cfg.ddim_steps, s.T
    if cfg.sampler == "ddim":
        return diffusion.ddim_sample(s, eps_model, noise, e, N, cfg.eta)
    if cfg.sampler == "ddpm":
        return diffusion.ddpm_sample(s, eps_model, noise, e)
    process = process_of(T, cfg.shift)
    at_time = score.score_of_eps(process, eps_model, T, e, clip=True)
    at_level = score.score_at_level(process, at_time)
    if cfg.sampler == "ode":
        sigmas = score.on_grid(process, score.heun_levels(score.level(process, 1.0), 0.02, (N + 1) // 2), T)
        return score.ode_heun(at_level, sigmas[0] * noise(), sigmas)
    if cfg.sampler == "langevin":
        sigmas = [score.level(process, k / T) for k in ncsn_steps(T)]
        return score.langevin(at_level, noise, sigmas, (N - 1) // 10, step=0.2 * sigmas[-1] ** 2)
    correct = 0.16 if cfg.sampler == "pc" else None
    return score.reverse_sde(process, at_time, noise, score.times((N - 1) // (2 if correct else 1), 1 / T, T, rho=2.0), correct)


@torch.inference_mode()
def sample_masks(model, cfg, y, index, members=1, device="cpu", progress=None, seed=EVAL_SEED):
    """Masks for X-rays: (B, members, 1, H, W) in [-1, 1]. A supervised model has one, its probabilities.

    y      (B, 1, H, W) in [-1, 1], on the device
    index  B ints: image i's noise comes from (seed, i) alone
    """
    if cfg.supervised:
        with autocast(cfg, device):
            probability = model(y).float().sigmoid()
        if progress:
            progress(len(y))
        return (2 * probability - 1)[:, None]
    s = schedule(cfg.T, cfg.shift)
    with autocast(cfg, device):
        e = model.embed(y).repeat_interleave(members, 0)
    noise = diffusion.ImageNoise(seed, index, y.shape[1:], members, device)
    x0 = sample_with(cfg, s, eps_model_of(model, cfg, s, device, progress), noise, e)
    return x0.unflatten(0, (len(y), members))


@torch.inference_mode()
def sample_images(model, cfg, index, device="cpu", progress=None, seed=EVAL_SEED):
    """X-rays from noise: (B, 1, H, W) in [-1, 1]; image i from (seed, i) alone."""
    s = schedule(cfg.T, cfg.shift)
    noise = diffusion.ImageNoise(seed, index, (1, cfg.image_size, cfg.image_size), device=device)
    return sample_with(cfg, s, eps_model_of(model, cfg, s, device, progress), noise, None)


def chosen(N, n):
    """The rows of a split that every evaluation samples: n of N at random, the same in every run (§4.3)."""
    return np.sort(np.random.default_rng(EVAL_SEED).permutation(N)[:n])


def in_pieces(work, rows, device, members=1):
    """Yields (piece of the rows, work(piece)). The pieces halve when memory runs out; no number depends on their size."""
    size = max(1, (256 if torch.device(device).type == "cuda" else 32) // members)
    while len(rows):
        try:
            done = work(rows[:size])
        except RuntimeError as e:
            if not out_of_memory(e) or size == 1:
                raise
            size = -(-size // 2)
            continue
        yield rows[:size], done
        rows = rows[size:]


def shared_pieces(work, rows, shape, device, members=1):
    """work(piece of the rows) -> (n, *shape) for all rows together, in pieces and on every process that there is."""
    mine = lambda i: torch.cat([torch.empty(0, *shape), *(done for _, done in in_pieces(work, rows[i], device, members))])
    return shared(mine, len(rows))


def segment(model, cfg, images, rows, device, progress=None):
    """The mask of each chosen X-ray, mean of cfg.ensemble samples: (n, 1, H, W) float32 in [-1, 1] on the CPU."""

    def work(piece):
        y = data.to_float(images[piece]).to(device)
        return sample_masks(model, cfg, y, piece, cfg.ensemble, device, progress).mean(1).cpu()

    return shared_pieces(work, rows, images.shape[1:], device, cfg.ensemble)


def evaluate_masks(model, cfg, splits, device, progress=None):
    """§4.3: the eight metrics on the chosen images of train and of validation.

    Returns {split: {"images": n, "pooled": {name: value}, "per image": {name: (mean, sd, n)}}} and validation's masks.
    """
    report, shown = {}, None
    for name, split in splits.items():
        rows = chosen(len(split.images), cfg.eval_images)
        masks = segment(model, cfg, split.images, rows, device, progress)
        counts = metrics.confusion(masks, data.to_float(split.masks[rows]))
        report[name] = {
            "images": len(rows),
            "pooled": metrics.scores(counts.pooled()),
            "per image": metrics.per_image(counts),
        }
        shown = (split.images[rows], split.masks[rows], data.to_uint8(masks), metrics.scores(counts)["DICE index"])
    return report, shown


@torch.inference_mode()
def evaluate_images(model, cfg, splits, device, progress=None):
    """§3: Eq. (7) on the chosen images with fixed t and eps, and how far samples are from held-out images.

    The Fréchet distance of metrics.image_features between as many samples and held-out X-rays, beside that between two
    halves of the held-out X-rays: the least that can be hoped for.
    """
    s, report = schedule(cfg.T, cfg.shift), {}
    for name, split in splits.items():
        rows = chosen(len(split.images), cfg.eval_images)
        x0 = data.to_float(split.images[rows])
        t, eps = draws(dataclasses.replace(cfg, seed=EVAL_SEED, t_power=1.0, noises=1, objective="eps"), 0, x0)
        t, eps = t[:, 0], eps[:, 0]

        def loss(i, x0=x0, t=t, eps=eps):
            with autocast(cfg, device):
                mean = diffusion.l_simple(s, model, x0[i].to(device), None, t[i], eps[i].to(device), cfg.target)
            return float(mean) * len(i)

        losses = [part for _, part in in_pieces(loss, np.arange(len(rows)), device)]
        report[name] = {"images": len(rows), "loss": sum(losses) / len(rows)}

    held_out = splits["Val"].images
    a, b = np.array_split(np.random.default_rng(EVAL_SEED).permutation(len(held_out)), 2)
    b = b[: cfg.eval_images]
    draw = lambda i: sample_images(model, cfg, i, device, progress).cpu()
    samples = shared_pieces(draw, np.arange(len(b)), held_out.shape[1:], device)
    features = [metrics.image_features(x) for x in (samples, data.to_float(held_out[b]), data.to_float(held_out[a[: len(b)]]))]
    report["Val"]["Fréchet distance"] = metrics.frechet_distance(features[0], features[1])
    report["Val"]["Fréchet distance of two held-out halves"] = metrics.frechet_distance(features[2], features[1])
    return report, data.to_uint8(samples)


# ------------------------------------------------------------------------------------- the run folder


class Log:
    """log.jsonl: one dict a line, with its step. Lines after the step that a run resumes from are dropped. The first process writes it."""

    def __init__(self, path, step=0):
        self.path = path
        self.lines = []
        for text in lines_of(path):
            with contextlib.suppress(ValueError):  # a line that a kill or a power cut left half-written
                line = json.loads(text)
                self.lines += [line] if line["step"] <= step else []
        if not rank():
            write_whole(path, lambda f: f.write_text("".join(json.dumps(line) + "\n" for line in self.lines)))

    def add(self, **line):
        self.lines.append(line)
        if not rank():
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def evaluations(self):
        return [line for line in self.lines if "Val" in line]


def quality(line):
    """What makes one evaluation better than another: validation DICE, or for synthesis minus the validation loss."""
    val = line["Val"]
    number = val["pooled"]["DICE index"] if "pooled" in val else -val["loss"]
    return -math.inf if math.isnan(number) else number


def markdown_table(cfg, line):
    """The last evaluation beside the report's Table 1 or 2, as Markdown."""
    what = f"step {line['step']}, {'phantoms' if cfg.phantoms else 'X-rays'}"
    if cfg.task == "synthesis":
        rows = [f"| {name} | {value:.4f} |" for name, value in line["Val"].items() if name != "images"]
        return "\n".join([f"| synthesis, {what} | validation |", "|---|---|", f"| Train loss | {line['Train']['loss']:.4f} |", *rows])
    number = {"lung": 1, "infection": 2}[cfg.task]
    n, m = line["Train"]["images"], line["Val"]["images"]
    head = f"{kind_of(cfg, ' masks')}, {what}"
    rows = [
        f"| {head} | report, Table {number}: addition | report: concatenation "
        f"| here: {n} of train | **here: {m} of validation** | mean ± sd of the images |",
        "|---|---|---|---|---|---|",
    ]
    for name, (add, concat) in REPORT_TABLES[cfg.task].items():
        mean, sd, _ = line["Val"]["per image"][name]
        train, val = line["Train"]["pooled"][name], line["Val"]["pooled"][name]
        rows.append(f"| {name} | {add:.4f} | {concat:.4f} | {train:.4f} | **{val:.4f}** | {mean:.4f} ± {sd:.4f} |")
    return "\n".join(rows)


def provenance(device):
    """Where a number comes from: commit and hardware."""
    here = Path(__file__).resolve().parent

    def git(*command):
        try:
            return subprocess.run(["git", "-C", here, *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git on this machine
            return ""

    ours = git("rev-parse", "--show-toplevel") == str(here)  # and not a repository around an unpacked archive
    commit = git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "") if ours else ""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cpu = next((c.split(":")[1].strip() for c in lines_of("/proc/cpuinfo") if c.startswith("model name")), platform.processor())
    hardware = gpu or f"{cpu}, {torch.get_num_threads()} threads"
    hardware += f", {world()} processes" if world() > 1 else ""
    return dict(commit=commit or "unknown", hardware=hardware, torch=torch.__version__, python=platform.python_version())


def lines_of(path):
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def say(*words):
    print(*words, flush=True)


# ------------------------------------------------------------------------------------- the run


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class StopSignals(contextlib.AbstractContextManager):
    """Within it, the first of STOP_SIGNALS is noted in `asked`; a second one acts at once."""

    asked = None

    def __enter__(self):
        self.before = {sig: signal.signal(sig, self.note) for sig in STOP_SIGNALS}
        return self

    def note(self, sig, frame):
        self.asked = sig
        self.__exit__()
        print(f"\n{signal.Signals(sig).name}: saving, one moment", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def check(self):
        if self.asked:
            raise Stopped


class Run:
    """One run folder while it trains: the loop, what it shows, and what it writes."""

    def __init__(self, cfg, device, folder, splits, state, command):
        self.cfg, self.device, self.folder, self.splits = cfg, device, folder, splits
        self.command = f"{state['command']} && {command}" if state else command  # all that made this run
        self.trainer = Trainer(cfg, device)
        if state:
            self.trainer.load_state(state)
        folder.mkdir(parents=True, exist_ok=True)
        self.write("config.json", as_json(dataclasses.asdict(cfg)))
        self.log = Log(folder / "log.jsonl", self.trainer.step)
        self.losses = []  # of the steps since the last log line, still on the device: a step reads nothing back
        self.status, self.first_step = data.StatusLine(), self.trainer.step
        self.train_s = self.evaluate_s = 0.0
        self.began = self.saved_at = time.monotonic()
        self.minutes_before = state["minutes"] if state else 0.0

    def write(self, name, write):
        """A file of the run folder, whole, by the first process."""
        if not rank():
            write_whole(self.folder / name, write)

    def train(self):
        """Steps, logs, evaluations and checkpoints, until cfg.steps. Ends early with Stopped, saved."""
        cfg, trainer = self.cfg, self.trainer
        if trainer.step == 0:
            self.save()  # the folder is taken from now on, and there is always a checkpoint to go back to
        images, masks = (a if a is None else torch.from_numpy(a).to(self.device) for a in self.splits["Train"][:2])
        log_every = min(50, max(1, cfg.steps // 100))
        with StopSignals() as signals:
            try:
                while True:
                    if self.evaluation_due():
                        self.evaluate(signals)
                    if trainer.step >= cfg.steps:
                        return
                    start = time.monotonic()
                    self.losses.append(trainer.train_step(images, masks))
                    if trainer.step % log_every == 0:
                        self.log_loss()
                    self.train_s += time.monotonic() - start
                    self.show()
                    stop, due = any_process(signals.asked is not None, time.monotonic() - self.saved_at > SAVE_EVERY)
                    if stop:
                        raise Stopped
                    if due:
                        self.save()
            except Stopped:
                self.save()
                raise

    def log_loss(self):
        """The mean loss since the last log line. A loss that is not finite ends the run; the last checkpoint is older and good."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).cpu()
        if world() > 1:
            distributed.all_reduce(losses)
        losses = losses.tolist()
        first = self.trainer.step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self.not_finite(f"the loss is {loss}", step)
        self.log.add(step=self.trainer.step, loss=float(np.mean(losses)), lr=learning_rate(self.cfg, self.trainer.step))
        self.losses = []

    def check_finite(self):
        """Before anything is measured or saved: neither a loss nor a weight is nan or infinite."""
        self.log_loss()
        if not all(p.isfinite().all() for p in self.trainer.model.parameters()):
            raise self.not_finite("a weight is not finite", self.trainer.step)

    def not_finite(self, what, step):
        lr = learning_rate(self.cfg, step)
        return FloatingPointError(f"{what} at step {step} (learning rate {lr:.2g}); the last good checkpoint is {self.folder / 'last.pt'}")

    def save(self):
        self.check_finite()
        state = self.trainer.state() | {"minutes": self.minutes(), "images": len(self.splits["Train"].images), "command": self.command}
        self.write("last.pt", lambda f: torch.save(state, f))
        self.saved_at = time.monotonic()

    def minutes(self):
        """Of this run, those before it was resumed included; reading the images is not."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def evaluation_due(self):
        """At every eval_every-th step and the last, once under each protocol."""
        step, evaluations = self.trainer.step, self.log.evaluations()
        due = step > 0 and (step % self.cfg.eval_every == 0 or step == self.cfg.steps)
        done = evaluations and evaluations[-1]["step"] == step and evaluations[-1]["protocol"] == self.protocol()
        return due and not done

    def protocol(self):
        return {name: getattr(self.cfg, name) for name in PROTOCOL}

    def evaluate(self, signals):
        """Evaluate, log, draw, and keep last.pt and best.pt."""
        from notebooks import figures  # matplotlib takes a while to load

        cfg, start = self.cfg, time.monotonic()
        self.check_finite()
        progress = passes_line(f"evaluating step {self.trainer.step}: passes", self.passes(self.splits) // world(), signals.check)
        function = evaluate_images if cfg.task == "synthesis" else evaluate_masks
        model = laid_out(self.trainer.ema, self.device)
        report, shown = function(model, cfg, self.splits, self.device, progress)
        self.evaluate_s = time.monotonic() - start
        self.log.add(step=self.trainer.step, protocol=self.protocol(), **report, seconds=round(self.evaluate_s, 1))

        same = [line for line in self.log.evaluations() if line["protocol"] == self.protocol()]
        best = max(same, key=quality)
        anew = sum(line["step"] == self.trainer.step for line in self.log.evaluations()) > 1
        if best["step"] == self.trainer.step and not anew:
            state = {k: v for k, v in self.trainer.state().items() if k in ("config", "step", "ema")}
            self.write("best.pt", lambda f: torch.save(state, f))
        self.save()

        title = f"{kind_of(cfg)}, {'phantoms' if cfg.phantoms else 'X-rays'}, step {self.trainer.step}"
        self.write("curves.png", lambda f: figures.save_curves(f, self.log.lines, title))
        if cfg.task == "synthesis":
            self.write("samples.png", lambda f: figures.save_image_grid(f, shown[:64], title))
        else:
            self.write("masks.png", lambda f: figures.save_mask_grid(f, *shown, title))
        val = self.log.lines[-1]["Val"]
        best = f"best so far at step {best['step']}"
        number = f"DICE {val['pooled']['DICE index']:.4f}" if "pooled" in val else f"loss {val['loss']:.4f}"
        say(f"step {self.trainer.step}: validation {number} ({best}); {self.folder}/")

    def test(self, splits):
        """{"Test": as evaluate_masks}, of the chosen images of Test; logged and said."""
        progress = passes_line("evaluating Test: passes", self.passes(splits) // world())
        report, _ = evaluate_masks(laid_out(self.trainer.ema, self.device), self.cfg, splits, self.device, progress)
        self.log.add(step=self.trainer.step, protocol=self.protocol(), **report)
        say(f"Test, {report['Test']['images']} images: DICE {report['Test']['pooled']['DICE index']:.4f}")
        return report

    def passes(self, splits):
        """Images through the network in one evaluation."""
        cfg, N = self.cfg, {name: len(split.images) for name, split in splits.items()}
        if cfg.task == "synthesis":
            return min(N["Val"] // 2, cfg.eval_images) * passes_of(cfg)
        return sum(min(n, cfg.eval_images) for n in N.values()) * passes_of(cfg) * cfg.ensemble

    def show(self):
        """step, loss, images/s and time left, evaluations included (until the first is measured: a pass is 1/3 of a step)."""
        cfg, step = self.cfg, self.trainer.step
        each = self.train_s / (step - self.first_step)
        evaluations = -(-cfg.steps // cfg.eval_every) - step // cfg.eval_every
        evaluate_s = self.evaluate_s or self.passes(self.splits) * each / cfg.batch_size / 3
        left = data.clock((cfg.steps - step) * each + evaluations * evaluate_s)
        loss = next((f"{line['loss']:.4f}" for line in reversed(self.log.lines) if "loss" in line), "...")
        text = f"step {step}/{cfg.steps}  loss {loss}  {cfg.batch_size / each:.1f} images/s  {left} left"
        self.status.show(text, last=step == cfg.steps)


# ------------------------------------------------------------------------------------- the command


def describe(cfg):
    """The resolved configuration, and the sizes of network and embedder, in lines. Refuses what cannot be built."""
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except ValueError as e:
        raise UserError(f"--channels {cfg.channels}, --image-size {cfg.image_size}: {e}") from e
    count = lambda module: sum(p.numel() for p in module.parameters())
    unsaid = {"epochs"} if cfg.steps else {"steps"}  # one says the other; and where the images are, once that is known
    unsaid |= set() if cfg.data else {"data", "phantoms"}
    unsaid |= {*OF_DIFFUSION} if cfg.supervised else set()
    if cfg.model in baselines.U_NETS:
        unsaid |= {"cond", "channel_mult", "blocks", "attention_levels", "head_channels", "growth", "rrdbs", "rrdb", "stem", "T"}
    lines = [f"  {name:17}{value}" for name, value in dataclasses.asdict(cfg).items() if name not in unsaid]
    net = model.net if cfg.model == "report-unet" else model
    lines.append(f"  U-Net            {count(getattr(net, 'unet', net)):,} parameters")
    if getattr(net, "embedder", None) is not None:
        lines.append(f"  embedder         {count(net.embedder):,} parameters")
    return "\n".join(lines)


def kind_of(cfg, noun=""):
    """What a run is, in words: "lung, concat", "lung, unet", or with a noun "lung masks, concat"."""
    return ", ".join(filter(None, (cfg.task + noun, cfg.model if cfg.supervised else None, cfg.cond)))


def name_of(cfg):
    """A run's folder under runs/: lung-concat-0, lung-unet-0; synthesis-vp-0, synthesis-Normal-0 with other --objective or --classes."""
    model = cfg.model if cfg.supervised else None
    objective = None if cfg.objective == "eps" else cfg.objective
    classes = () if cfg.classes == data.DEFAULT_CLASSES[cfg.task] else cfg.classes
    return "-".join(filter(None, (cfg.task, model, cfg.cond, objective, *classes, str(cfg.seed))))


def prepare(args, device):
    """Configuration, run folder and checkpoint (or None) of a new or a resumed run."""
    if not args.resume:
        cfg = configure(args, device)
        folder = Path(args.out or Path("runs", name_of(cfg)))
        if args.data is not None:
            data.locate(args.data, cfg.task)  # refuses a folder that holds no data, before anything else is complained about
        if (folder / "last.pt").exists() and not args.dry_run:
            raise UserError(f"{folder} holds a run already; go on with --resume {folder}, or choose another --out")
        return cfg, folder, None
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    fixed = given.keys() - {"resume", "data", "device", "test", "dry_run", *RESUMABLE}
    if fixed:
        flags = ", ".join("--" + k.replace("_", "-") for k in sorted(fixed))
        raise UserError(f"--resume keeps the run's settings (but --steps, --data, --device and those of evaluation), got {flags}")
    folder = Path(args.resume)
    if folder.is_file():
        raise UserError(f"--resume takes the run folder: --resume {folder.parent}")
    state = read_checkpoint(folder)
    refuse_flags_of_diffusion(args, state["config"].model)
    cfg = dataclasses.replace(state["config"], **{k: v for k, v in given.items() if k in RESUMABLE})
    check(cfg)
    if cfg.steps < state["step"]:
        raise UserError(f"--steps must be at least the {state['step']} steps that {folder} has taken, got {cfg.steps}")
    return cfg, folder, state


def find_data(cfg, given):
    """The configuration with the folder of its images; phantoms are announced, and made on the first use.

    A run on phantoms keeps its images: those of its own folder, or, in a run that came from elsewhere, the same ones here.
    """
    if given is None and cfg.phantoms and (cfg.data == str(data.PHANTOMS) or not Path(cfg.data).is_dir()):
        root, phantoms = data.PHANTOMS, True
    else:
        root, phantoms = data.locate(given or cfg.data or None, cfg.task)
    if given is None and root == data.PHANTOMS:
        if not cfg.data:
            say(
                f"No X-rays found: COVID-QU-Ex is looked for in {' and '.join(map(str, data.DATA_HOMES))}. It can be had from "
                "Kaggle (anasmohammedtahir/covidqu); unpack it there, or name its folder with --data. Until then this run "
                "uses chest phantoms: generated X-rays whose masks are known. Its numbers are about phantoms."
            )
        data.ensure_phantoms(cfg.task, data.progress_line("drawing phantoms"))
    return dataclasses.replace(cfg, data=str(root), phantoms=phantoms)


def start(args, command):
    device = choose_device(args.device)
    cfg, folder, state = prepare(args, device)
    sizes = describe(cfg)
    if args.test and cfg.task == "synthesis":
        raise UserError("--test evaluates masks; --task synthesis has none")
    if args.dry_run:
        say(f"{folder} on {device}\n{sizes}")
        return 0
    if cfg.batch_size < world():
        raise UserError(f"--batch-size must be at least the {world()} processes, got {cfg.batch_size}")
    with first_process_first():
        cfg = find_data(cfg, args.data)
        splits = {
            name: data.load(cfg.data, cfg.task, name, cfg.classes, cfg.image_size, progress=data.progress_line(f"decoding {name}"))
            for name in (("Train", "Val", "Test") if args.test else ("Train", "Val"))
        }
    test = {"Test": splits.pop("Test")} if args.test else {}
    if cfg.task == "synthesis" and len(splits["Val"].images) < 4:
        raise UserError(f"--task synthesis compares with at least 4 images of Val, {cfg.data} has {len(splits['Val'].images)}")
    if state and state["images"] != len(splits["Train"].images):
        raise UserError(f"{folder} was trained on {state['images']} images, and Train of {cfg.data} has {len(splits['Train'].images)}")
    steps = cfg.steps or math.ceil(cfg.epochs * len(splits["Train"].images) / cfg.batch_size)
    cfg = dataclasses.replace(cfg, steps=steps, eval_every=cfg.eval_every or math.ceil(steps / cfg.evaluations))
    say(f"{folder} on {device}{f', {world()} processes' if world() > 1 else ''}\n{describe(cfg)}")
    for name, split in splits.items():
        n = len(split.images)
        few = f", all {n} evaluated (fewer than {cfg.eval_images})" if n < cfg.eval_images else f", {cfg.eval_images} evaluated"
        say(f"  {name:17}{n} images{few}")

    run = Run(cfg, device, folder, splits, state, command)
    del state  # a copy of all that the run now holds
    say(f"  memory           {run.trainer.fit_memory()}")
    try:
        run.train()
    except Stopped:
        say(f"stopped and saved at step {run.trainer.step} of {cfg.steps}; go on with: python train.py --resume {shlex.quote(str(folder))}")
        return 130
    tested = run.test(test) if test else {}
    last = run.log.evaluations()[-1]
    table = markdown_table(cfg, last)
    run.write("table.md", lambda f: f.write_text(table + "\n", encoding="utf-8"))
    facts = dict(command=run.command, config=dataclasses.asdict(cfg), evaluation=last, minutes=round(run.minutes(), 1))
    facts |= tested | provenance(device)
    run.write("results.json", as_json(facts))
    say(f"\n{table}\n\ncheckpoint, pictures and numbers: {folder}/")
    return 0


def exit_status(program, work, less_memory, left_behind):
    """What work() returns, or after one line about it: 2 for bad input or too little memory, 130 for Ctrl-C."""
    try:
        return work()
    except (UserError, data.DataError, OSError) as e:
        print(f"{program}: error: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        print(f"{program}: error: out of memory; {less_memory}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; {left_behind}", file=sys.stderr)
        return 130


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def work():
        try:
            with joined():
                launcher = ["torchrun", "--nproc-per-node", str(world())] if world() > 1 else ["python"]
                return start(args, shlex.join([*launcher, "train.py", *argv]))
        except FloatingPointError as e:
            print(f"train.py: stopped: {e}", file=sys.stderr)
            return 1
        except RuntimeError as e:
            if not (distributed.is_initialized() and "peer" in str(e)):
                raise
            print("train.py: stopped: another process ended", file=sys.stderr)
            return 1

    # Ctrl-C is meant before or after the training; within it, StopSignals saves
    less_memory = "--resume goes on from the last checkpoint, --device cpu is slow but fits"
    return exit_status("train.py", work, less_memory, "what was written before is whole")


if __name__ == "__main__":
    sys.exit(main())
