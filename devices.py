"""The machine that a run is on: device, precision, memory, several processes.

A run's numbers do not depend on what is chosen here, but for rounding.
"""

import contextlib
import copy
import dataclasses
import os
import platform
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from console import Stopped, UserError, opened
from unet import Head

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------- device and precision


def choose_device(name=None):
    """--device as a torch.device that works here; None: the best there is.

    Under torchrun each process has a GPU of its own.
    """
    if name is None and torch.cuda.is_available():
        name = "cuda"
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
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
    """Whether the device computes in bf16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def in_precision_of(cfg, device):
    """cfg, with bf16 only where it is fast."""
    return cfg if bf16_is_fast(device) else dataclasses.replace(cfg, precision="fp32")


def autocast(cfg, device):
    """bf16 autocast where cfg.precision asks for it; parameters stay float32."""
    bf16 = cfg.precision == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


def processor():
    """The name of the CPU."""
    for line in lines_of("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def lines_of(path):
    """The lines of a text file; none where there is no such file."""
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def laid_out(model, device):
    """The model as sampling wants it: on a CPU a copy with channels last, 1.3 times as fast.

    In training the backward pass loses that again.
    """
    if torch.device(device).type != "cpu":
        return model
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def cast_once(model, cfg):
    """A copy of the model with the 16-bit weights that autocast makes of it at every pass.

    The numbers are the same. A GPU is spared a cast for every layer and pass; on a CPU no gain was
    measured. The head's convolution stays in float32. In precision fp32 it is the model itself.
    """
    if cfg.precision != "bf16":
        return model
    model = copy.deepcopy(model)
    heads = [module[-1] for module in model.modules() if isinstance(module, Head)]
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) and layer not in heads:
            layer.to(torch.bfloat16)
    return model


def layout(plan):
    """How --set plan wants images in memory: channels last, or as they are."""
    return torch.channels_last if plan == "channels-last" else torch.preserve_format


# ---------------------------------------- several processes


def rank():
    """Which of the processes that torchrun started this is. Process 0 alone writes and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    """How many processes share the training; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Join the processes that torchrun started, if any. All but process 0 are silent."""
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
        distributed.destroy_process_group()  # not after an error: the others are not waited for


@contextlib.contextmanager
def locked(folder):
    """A folder that no other process of this machine writes to, until the context is left.

    Process 0 holds the lock. Its death releases it too. Windows has no such lock. UserError:
    another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank() or not fcntl:
        yield
        return
    with opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{folder}: another run is writing there; choose another --out") from e
        yield


@contextlib.contextmanager
def first_process_first():
    """Process 0 runs the body first and writes the files. The others then find the files ready."""
    if rank():
        distributed.barrier()
    yield
    if world() > 1 and not rank():
        distributed.barrier()


def any_process(*flags):
    """Each flag, true where it is true in one of the processes."""
    if world() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return flags.bool().tolist()


def summed(numbers):
    """A float tensor on the CPU, summed over the processes."""
    if world() > 1:
        distributed.all_reduce(numbers)
    return numbers


def rows_of_this_process(N):
    """The slice of N rows that this process works on; all of them without torchrun."""
    return slice(N * rank() // world(), N * (rank() + 1) // world())


def parallel(model, plan="plain"):
    """What a step calls: the model with gradients averaged over the processes, or the model itself.

    With --set plan=compiled its first call compiles it, which takes minutes.
    """
    model = torch.compile(model) if plan == "compiled" else model
    if world() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def without_exchange(model):
    """A context in which no gradients are exchanged: they meet once, in the last micro-batch."""
    return contextlib.nullcontext() if world() == 1 else model.no_sync()


def backward(loss):
    """loss.backward(), so that gradients are summed over the processes and not averaged."""
    (loss * world()).backward()


def divided_among_processes(function, N):
    """function(indices) -> a row for each of 0..N-1. Each process does its part, all get all rows.

    Raises Stopped in every process if it was raised in one.
    """
    if world() == 1:
        return function(np.arange(N))
    try:
        part = function(np.arange(rank(), N, world()))
    except Stopped:
        part = None
    parts = [None] * world()
    distributed.all_gather_object(parts, part)
    if any(part is None for part in parts):
        raise Stopped
    rows = torch.empty(N, *parts[0].shape[1:])
    for process, part in enumerate(parts):
        rows[process :: world()] = part
    return rows
