"""The machine that a run is on: device, precision, memory, several processes.

A run's numbers do not depend on what is chosen here, but for rounding.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import conditions
from console import Stopped, UserError, fits, message, opened, out_of_memory
from unet import Head, recompute_blocks

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


def laid_out(model, device):
    """The model as sampling wants it: on a CPU a copy with channels last, 1.2 times as fast.

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


# ---------------------------------------- memory


def free_memory(device):
    """Bytes that this process can still take on the device; None where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = [line for line in lines_of("/proc/meminfo") if line.startswith("MemAvailable")]
    if not available:
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1024 * int(available[0].split()[1]) // processes


def lines_of(path):
    """The lines of a text file; none where there is no such file."""
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def shortage(network, cfg, device):
    """What a run takes at the least and what is free, in words; None where that fits.

    Weights, gradient, AdamW's two moments and EMA are 20 bytes a number. A step holds its batch,
    an evaluation the noise and the masks of an ensemble, in float32.
    """
    free, weights = free_memory(device), 20 * sum(p.numel() for p in network.parameters())
    images = 2 * max(cfg.batch_size, cfg.ensemble) * 4 * cfg.image_size**2
    if free is None or weights + images <= free:
        return None
    batch = f"--batch-size {cfg.batch_size}, --image-size {cfg.image_size}"
    batch += f", --ensemble {cfg.ensemble}"
    numbers = f"weights and optimiser take {weights / 1e9:.1f} GB (--set channels={cfg.channels})"
    numbers += f", images at least {images / 1e9:.1f} GB ({batch})"
    return f"{numbers}; {free / 1e9:.1f} GB are free"


def kept_for_backward(model, cfg, device):
    """Bytes of activations that autograd keeps for each image of a batch.

    Counted in the forward passes of one and of two images, so that what is kept once, such as
    weights in 16 bits, falls out.
    """
    return kept_by(model, cfg, device, 2) - kept_by(model, cfg, device, 1)


def kept_by(model, cfg, device, n):
    """Bytes that autograd keeps in the forward pass of n images."""
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        storages[storage._cdata] = storage.nbytes()  # what two layers keep counts once
        return x

    def unpack(x):
        return x

    y = torch.zeros(n, 1, cfg.image_size, cfg.image_size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), autocast(cfg, device):
        if cfg.supervised:
            model(y)
        else:
            t = torch.ones(n, dtype=torch.long, device=device)
            given = conditions.unknown(cfg, n, device)
            model(y, t, given if cfg.task == "synthesis" else y)
    return sum(storages.values())


BUSY = 16  # images a forward pass that keep a GPU busy


def micro_batch_that_fits(n, free, kept, kept_recomputed):
    """(images a forward pass, whether blocks are computed again) for n images in `free` bytes.

    kept, kept_recomputed  bytes an image without and with recomputation

    As few forward passes as fit, all of about one size. Computing blocks again costs a third more
    arithmetic, so it is done only where not even BUSY images fit without. A step peaks above what
    is kept: in the backward pass come the gradients of a few activations, and with recomputation
    the activations of one block, about 15 % of what is not kept
    (test_the_memory_of_a_step_at_the_reports_size_is_what_is_planned_for).
    """
    peak = 1.02 * kept
    peak_recomputed = kept_recomputed + 0.15 * (kept - kept_recomputed)
    recompute = free < min(n, BUSY) * peak
    fit = max(1, int(free // (peak_recomputed if recompute else peak)))
    passes = -(-n // fit)
    return -(-n // passes), recompute


def fit_memory(trainer):
    """Choose a trainer's micro-batch and recomputation by the free memory. Returns the words."""
    cfg, model, n = trainer.cfg, trainer.model, trainer.images
    free = free_memory(trainer.device)
    if free is None:
        words = "images a forward pass (the free memory cannot be told here)"
        return f"{trainer.micro_batch} {words}"
    # The gradients, and AdamW's two moments where they are not there yet
    parameters = sum(p.numel() for p in model.parameters())
    room = 0.9 * free - 4 * parameters * (1 if trainer.optimizer.state else 3)
    kept = []
    for recompute in (False, True):
        has_blocks = recompute_blocks(model, recompute)
        kept.append(kept_for_backward(model, cfg, trainer.device))
    fit, recompute = micro_batch_that_fits(cfg.micro_batch or n, room, *kept)
    recompute_blocks(model, recompute)
    trainer.micro_batch = cfg.micro_batch or fit
    again = " (blocks computed again)" if recompute and has_blocks else ""
    memory = f"{kept[recompute] / 1e6:.0f} MB an image{again}, {free / 1e9:.1f} GB free"
    return f"{min(n, trainer.micro_batch)} of {n} images a forward pass; {memory}"


def halved_when_memory_runs_out(gradient):
    """Decorator of Trainer.gradient: calls it again with half the micro-batch until it fits.

    UserError where the micro-batch was given, is one image, or is that of several processes.
    """

    @functools.wraps(gradient)
    def until_it_fits(trainer, batch):
        while True:
            try:
                return gradient(trainer, batch)
            except (RuntimeError, MemoryError) as e:
                if hasattr(e, "inner_exception") and not out_of_memory(e):  # from torch.compile
                    why = str(e.inner_exception).strip().partition("\n")[0]
                    raise UserError(f"--set plan=compiled does not work here: {why}") from e
                if not out_of_memory(e):
                    raise
            # Outside of the except block: its traceback holds the activations of what failed
            n = trainer.micro_batch
            if trainer.cfg.micro_batch or n == 1 or world() > 1:
                what = f"out of memory with {n} images at once"
                raise UserError(f"{what}; try a smaller --micro-batch or --set channels")
            if trainer.device.type == "cuda":
                torch.cuda.empty_cache()
            trainer.micro_batch = -(-n // 2)
            size = f"{trainer.micro_batch} images at once; the batch stays {trainer.cfg.batch_size}"
            message(f"out of memory: from here on {size}")

    return until_it_fits


def in_chunks(function, rows, device, members=1):
    """Yields (chunk of the rows, function(chunk)). The chunks halve when memory runs out.

    No number depends on their size. members: how many samples a row stands for
    """
    size = max(1, (256 if torch.device(device).type == "cuda" else 32) // members)
    while len(rows):
        try:
            answer = function(rows[:size])
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e) or size == 1:
                raise
            size = -(-size // 2)
            continue
        yield rows[:size], answer
        rows = rows[size:]


def peak_memory(function, *args):
    """Peak bytes of function(*args) in a process of its own: resident, or allocated on a GPU.

    nan where it does not fit.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process holds and does not use
    peaks = [math.nan]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        job = functools.partial(pool.apply, call_and_read_peak, (function, *args))
        fits("peak memory", lambda: peaks.append(job()))
    return peaks[-1]


def call_and_read_peak(function, *args):
    """What peak_memory runs in the new process."""
    function(*args)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    for line in lines_of("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    import resource  # not on Windows; on Linux a child would inherit its parent's peak

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
