"""What a run takes of the memory, and what fits: the micro-batch, recomputation, chunks.

A run's numbers do not depend on what is chosen here, but for rounding and the sampler pc, whose
images depend a little on their batch.
"""

import functools
import gc
import math
import multiprocessing
import os
import sys
from typing import NamedTuple

import torch

import conditions
from console import UserError, fits, message, out_of_memory
from devices import autocast, lines_of, world
from unet import recompute_blocks

# ---------------------------------------- what is free, what is taken


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
    recompute = free < min(n, BUSY) * peak_of_an_image(kept, kept_recomputed, False)
    fit = max(1, int(free // peak_of_an_image(kept, kept_recomputed, recompute)))
    passes = -(-n // fit)
    return -(-n // passes), recompute


def peak_of_an_image(kept, kept_recomputed, recompute):
    """Bytes that an image of a forward pass adds to the peak of a step, of those it keeps."""
    return kept_recomputed + 0.15 * (kept - kept_recomputed) if recompute else 1.02 * kept


class Plan(NamedTuple):
    """How a batch goes through memory. kept, peak: bytes an image; free: bytes, None: unknown."""

    micro_batch: int
    recompute: bool
    kept: float
    peak: float
    free: int | None


def planned(trainer, cfg, n):
    """The Plan of a step of n images of this process, by the memory that is free now."""
    model, kept = trainer.model, []
    for recompute in (False, True):
        recompute_blocks(model, recompute)
        kept.append(kept_for_backward(model, cfg, trainer.device))
    free, fit, recompute = free_memory(trainer.device), n, False
    if free is not None:
        # The gradients, and AdamW's two moments where they are not there yet
        parameters = sum(p.numel() for p in model.parameters())
        room = 0.9 * free - 4 * parameters * (1 if trainer.optimizer.state else 3)
        fit, recompute = micro_batch_that_fits(cfg.micro_batch or n, room, *kept)
    recompute = recompute_blocks(model, recompute) and recompute
    peak = peak_of_an_image(*kept, recompute)
    return Plan(min(n, cfg.micro_batch or fit), recompute, kept[recompute], peak, free)


def fit_memory(trainer):
    """Choose a trainer's micro-batch and recomputation by the free memory. Returns the words."""
    n = trainer.images
    if free_memory(trainer.device) is None:
        words = "images a forward pass (the free memory cannot be told here)"
        return f"{trainer.micro_batch} {words}"
    plan = planned(trainer, trainer.cfg, n)
    trainer.micro_batch = plan.micro_batch
    again = " (blocks computed again)" if plan.recompute else ""
    memory = f"{plan.kept / 1e6:.0f} MB an image{again}, {plan.free / 1e9:.1f} GB free"
    return f"{plan.micro_batch} of {n} images a forward pass; {memory}"


def peak_with(trainer, cfg):
    """Bytes that a step of cfg peaks at: this process's own peak, and what more images take.

    trainer  has made steps of fewer images
    """
    peak = own_peak()  # before planned() makes passes of its own
    plan = planned(trainer, cfg, cfg.batch_size // world())
    return peak + (plan.micro_batch - trainer.micro_batch) * plan.peak


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

    No number depends on their size, but with the sampler pc.
    members: how many samples a row stands for
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
    return own_peak()


def own_peak():
    """Bytes that this process has taken at its peak: resident, or allocated on a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    for line in lines_of("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    import resource  # not on Windows; on Linux a child would inherit its parent's peak

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
