r"""What a user waits and pays for, measured in one run on this machine.

    python benchmark.py                         the training step, the sampler, memory, start-up
    python benchmark.py --peers                 beside the U-Nets of other libraries (peers.py)
    python benchmark.py --models                what a mask costs, by each model
    python benchmark.py --gains                 each choice of step and sampler: time without it
    python benchmark.py --scaling               against batch, image size, channels and images
    python benchmark.py --decode 33920          decode so many X-rays and masks, then read the cache
    python benchmark.py --out results/cpu.json  keep the numbers, with hardware and commit

The training step is Trainer.train_step and the sampler is evaluate.sample_masks: what train.py and
sample.py call, not copies. Their arithmetic is counted on the network itself (networks.flops_of). A
"share" is that arithmetic a second, over what this machine reaches at a plain matrix product or
convolution in the same number format; "training step: ..." is a part of the step's time. Jobs take
turns in rounds, and the median of a job's rounds counts: what else the machine does changes ratios
less than seconds.
"""

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import baselines
import batches
import config
import console
import data
import devices
import diffusion
import evaluate
import memory
import networks
import peers
import phantoms
import runs
import synthesis
import train
import unet
from console import Parser, UserError, exit_status, fits, message, path_of, progress_line
from memory import peak_memory
from tables import table

CPU = torch.device("cpu")
PAIRS = 120  # X-rays with masks that are drawn to be decoded
AS_IT_IS = "as it is"  # --gains: the job that the others are compared with
EAGER = "eager mode, not torch.compile"
PLAIN_FORMULA = "attention of few positions by the plain formula on a CPU"

# ---------------------------------------- seconds, arithmetic, memory


def seconds_of(job, device=CPU):
    """Seconds of one call, until the device has done all that it was given."""
    wait = torch.get_device_module(device).synchronize
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start


def interleaved(jobs, device, rounds=5, warm=1):
    """Median seconds of each job: {name: function} -> {name: seconds}, but for `warm` rounds."""
    measures = {name: partial(seconds_of, job, device) for name, job in jobs.items()}
    return medians(measures, rounds, warm)


def timed(makers, device, rounds):
    """interleaved() of jobs of which one is alive at a time: {name: (function, *args)}.

    Each turn makes its job anew, and calls it twice: the first call sets up what it needs.
    """

    def measured(make, *args):
        job = make(*args)
        job()
        return seconds_of(job, device)

    return medians({name: partial(measured, *maker) for name, maker in makers.items()}, rounds)


def medians(measures, rounds, warm=0):
    """The median of what each function returns: {name: function} -> {name: number}.

    Rounds begin with another function each. What runs out of memory is left out.
    """
    found, names = {name: [] for name in measures}, list(measures)
    for k in range(-warm, rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            if name in found and not fits(name, lambda: found[name].append(measures[name]())):
                del found[name]
    return {name: statistics.median(numbers[warm:]) for name, numbers in found.items()}


def machine_rates(device, dtype, rounds=5):
    """Matrix product and 3x3 convolution in FLOP/s, copy in bytes/s (read and written)."""
    n, (B, C, S), size = 2048, (16, 64, 64), 2**26
    if device.type == "cuda":
        n, (B, C, S), size = 8192, (512, 192, 64), 2**30
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(B, C, S, S, device=device, dtype=dtype)
    kernel = torch.randn(C, C, 3, 3, device=device, dtype=dtype)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    jobs = {
        "matrix product": partial(torch.matmul, a, b),
        "convolution": partial(F.conv2d, x, kernel, padding=1),
        "copy": partial(torch.empty_like(block).copy_, block),
    }
    amounts = (2 * n**3, 2 * 9 * C * C * B * S * S, 2 * size)
    with torch.inference_mode():
        seconds = interleaved(jobs, device, rounds, warm=2)
    return {name: amount / seconds[name] for name, amount in zip(jobs, amounts)}


# ---------------------------------------- the jobs


def trainer_of(cfg, device):
    """A fresh Trainer that has chosen its micro-batch by the free memory."""
    gc.collect()  # what earlier jobs held
    trainer = train.Trainer(cfg, device)
    memory.fit_memory(trainer)
    return trainer


def training_job(cfg, device, trainer=None, images=None):
    """One call is one step of train.py. By default: a fresh trainer, images for two batches."""
    trainer = trainer_of(cfg, device) if trainer is None else trainer
    split = batches.noise_split(cfg, 2 * cfg.batch_size if images is None else images)
    return partial(trainer.train_step, *batches.on_device(cfg, split, device))


def repeat(job, times):
    for _ in range(times):
        job()


def two_steps(make_job, *args):
    """Make a training job and call it twice: from the second on AdamW's moments take memory too."""
    repeat(make_job(*args), 2)


def epoch_seconds(cfg, device, images):
    """Seconds to train one epoch of so many images, after a first step."""
    step = training_job(cfg, device, train.Trainer(cfg, device), images)
    step()
    return seconds_of(partial(repeat, step, images // cfg.batch_size), device)


def ready(model, device):
    """An untrained network on the device, ready to sample."""
    return model.to(device).requires_grad_(False).eval()


def sampling_job(cfg, device, n, model=None):
    """One call samples n masks, or X-rays, as an evaluation does. Without a model a fresh one."""
    if model is None:
        model = devices.laid_out(ready(networks.build_model(cfg), device), device)
    model = devices.cast_once(model, cfg)
    if cfg.task == "synthesis":
        return partial(synthesis.sample_images, model, cfg, range(n), device)
    y = data.to_float(batches.noise_split(cfg, n).images).to(device)
    return partial(evaluate.sample_masks, model, cfg, y, range(n), cfg.ensemble, device)


def load_pairs(folder):
    """The X-rays and masks of this folder as 64x64 arrays: decoded, or read from their cache."""
    return data.load(folder, "lung", "Train", ("Normal",), cache=folder / "cache")


def seconds_to_decode(folder, n):
    """Seconds to decode n X-rays with masks: 256x256 phantoms, drawn into a new folder before."""
    drawn = min(n, PAIRS)  # beyond these the files repeat
    counts = {split: {"Normal": k} for split, k in zip(data.SPLITS, (drawn, 4, 4))}
    phantoms.write_phantoms(folder, data.LUNG_TREE, counts)
    for kind in (data.tree_folder(folder, "lung") / "Train" / "Normal").iterdir():
        files = sorted(kind.glob("*.png"))
        for i in range(drawn, n):
            os.link(files[i % drawn], kind / f"again ({i}).png")
    return seconds_of(partial(load_pairs, folder))


def seconds_from_cache(folder):
    """Seconds to read what seconds_to_decode has decoded and cached in this folder."""
    return interleaved({"cache": partial(load_pairs, folder)}, CPU)["cache"]


# ---------------------------------------- what is measured


def measure(cfg, device, rounds, folder):
    """{quantity with its unit: number} of these settings; what does not fit has none."""
    n = min(cfg.batch_size, 64)
    jobs = {"step": (training_job, cfg, device), "sample": (sampling_job, cfg, device, n)}
    seconds = dict.fromkeys(jobs, math.nan) | timed(jobs, device, rounds)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    rates = machine_rates(device, dtype, rounds)
    product, convolution = rates["matrix product"], rates["convolution"]
    step_flops = 3 * networks.flops_of_passes(cfg, 1) * cfg.batch_size  # backward: twice forward
    sample_flops = networks.flops_of_passes(cfg, cfg.ensemble * cfg.ddim_steps) * n
    numbers = {
        "seconds a training step": seconds["step"],
        "training images/s": cfg.batch_size / seconds["step"],
        "training FLOP a step": step_flops,
        "training share of matrix product": step_flops / seconds["step"] / product,
        "training share of convolution": step_flops / seconds["step"] / convolution,
        **shares_of_a_step(cfg, device, rounds),
        f"sampling images/s, DDIM-{cfg.ddim_steps}": n / seconds["sample"],
        "sampling share of matrix product": sample_flops / seconds["sample"] / product,
        "training peak memory, GB": peak_memory(two_steps, training_job, cfg, device) / 1e9,
        "decoding pairs/s": PAIRS / seconds_to_decode(folder, PAIRS),
        "cache pairs/s": PAIRS / seconds_from_cache(folder),
        "start to the end of the first step, s": start_up(folder, cfg, device),
        "matrix product, GFLOP/s": product / 1e9,
        "convolution, GFLOP/s": convolution / 1e9,
        "copy, GB/s": rates["copy"] / 1e9,
    }
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def shares_of_a_step(cfg, device, rounds):
    """Where the time of a training step goes: {part: share}."""
    trainer = trainer_of(cfg, device)
    images = batches.on_device(cfg, batches.noise_split(cfg, 2 * cfg.batch_size), device)
    batch = batches.batch(cfg, 1, *images)

    def forward():
        for part in batch.parts(trainer.micro_batch):
            with devices.autocast(cfg, device):
                trainer.loss(trainer.parallel, part)

    jobs = dict(step=partial(trainer.train_step, *images), forward=forward)
    jobs |= dict(batch=partial(batches.batch, cfg, 1, *images))
    jobs |= dict(gradient=partial(trainer.gradient, batch))
    seconds = interleaved(jobs, device, rounds)
    parts = {"drawing the batch": seconds["batch"], "forward": seconds["forward"]}
    parts["backward"] = seconds["gradient"] - seconds["forward"]
    parts["AdamW, clipping, EMA"] = seconds["step"] - seconds["gradient"] - seconds["batch"]
    return {f"training step: {name}": part / seconds["step"] for name, part in parts.items()}


def start_up(folder, cfg, device):
    """Seconds of a train.py of one step on this folder's X-rays, Python and torch included."""
    words = f"--task lung --classes Normal --size {cfg.size} --recipe {cfg.recipe} --steps 1"
    words += f" --batch-size {min(cfg.batch_size, 16)} --eval-images 2 --ddim-steps 1"
    words += f" --device {device.type} --set channels={cfg.channels}"
    folders = ["--data", str(folder), "--out", str(folder / "run")]
    command = [sys.executable, train.__file__, *words.split(), *folders]
    return seconds_of(partial(subprocess.run, command, check=True, capture_output=True))


def peer_training_job(name, cfg, device, n):
    """Eq. (7) in the plain loop that a peer's manual teaches, n images of the batch at a time."""
    x0 = data.to_float(batches.noise_split(cfg, cfg.batch_size).images).to(device)
    loss = partial(diffusion.l_simple, diffusion.schedule(cfg.T, device=device))
    return peers.plain_loop(name, cfg, loss, device, x0.split(n))


def peer_sampling_job(name, cfg, device):
    """DDIM of 8 images by our sampler and a peer's network."""
    return sampling_job(cfg, device, 8, ready(peers.Peer(name, cfg), device))


def peer_step_that_fits(name, cfg, device):
    """(peer_training_job, its arguments), the batch halved until two steps fit; None: none does."""
    for halvings in range(cfg.batch_size.bit_length()):
        step = peer_training_job, name, cfg, device, cfg.batch_size >> halvings
        if fits(f"{name}, {step[-1]} images at once", partial(two_steps, *step)):
            return step


def compare(cfg, device, rounds):
    """Our network, also in float32, and those of the installed peers; a row for each that fits.

    All are unconditional, of one size, a peer's in float32. Sampling: DDIM-10 of 8, our sampler.
    Rows: {network, parameters, step, sampling: seconds, memory: bytes}
    """
    cfg = replace(cfg, task="synthesis", cond=None, ddim_steps=10, target="eps")
    float32 = replace(cfg, precision="fp32")
    ours = {f"here, {c.precision}": c for c in (cfg, float32)}
    steps = {name: (training_job, c, device) for name, c in ours.items()}
    samples = {name: (sampling_job, c, device, 8) for name, c in ours.items()}
    for name in peers.installed():
        if step := peer_step_that_fits(name, cfg, device):
            steps[name], samples[name] = step, (peer_sampling_job, name, float32, device)
    step_s, sample_s = timed(steps, device, rounds), timed(samples, device, rounds)
    rows = []
    for name in filter(sample_s.get, step_s):
        model = networks.without_memory(cfg) if name in ours else peers.Peer(name, cfg)
        row = dict(network=name, parameters=networks.parameters(model), step=step_s[name])
        row |= dict(sampling=sample_s[name], memory=peak_memory(two_steps, *steps[name]))
        rows.append(row)
    return rows


def models(cfg, device, rounds):
    """What a training image and a mask cost by each model; a row for each.

    Masks are drawn many at a time, as in an evaluation.
    Rows: {model, parameters, flop: of a mask, training: seconds an image, mask: seconds}
    """
    configs, n = configs_of_models(cfg, device), min(cfg.batch_size, 64)
    steps = {c.model: (training_job, c, device) for c in configs.values()}
    samples = {name: (sampling_job, c, device, n) for name, c in configs.items()}
    step_s, mask_s = timed(steps, device, rounds), timed(samples, device, rounds)
    rows = []
    for name, c in ((name, configs[name]) for name in filter(mask_s.get, configs)):
        row = dict(model=name, parameters=networks.parameters(networks.without_memory(c)))
        row |= dict(
            flop=networks.flops_of_passes(c, c.ensemble * c.ddim_steps), mask=mask_s[name] / n
        )
        rows.append(row | dict(training=step_s.get(c.model, math.nan) / c.batch_size))
    return rows


def configs_of_models(cfg, device):
    """{name: Config}: the supervised networks of this size and recipe, diffusion by its passes."""
    words = f"--task lung --size {cfg.size} --recipe {cfg.recipe} --precision {cfg.precision}"
    words += f" --batch-size {cfg.batch_size} --image-size {cfg.image_size} --steps {cfg.steps}"
    configs = {}
    for name in baselines.U_NETS:
        configs[name] = config.configure(config.parse([*words.split(), "--model", name]), device)
    configs["report-unet"] = replace(cfg, model="report-unet")
    by_passes = [replace(cfg, ddim_steps=n) for n in (1, cfg.ddim_steps, 5, 50)]
    for c in [*by_passes, replace(cfg, ensemble=9)]:
        configs[f"diffusion, {c.ensemble} x DDIM-{c.ddim_steps}"] = c
    return configs


def gains(cfg, device, rounds):
    """{choice: time without it, over time with it}, of a training step and of a sampling job.

    Choices that are not made on this device are in it too: below 1, they would pay.
    """
    ratios = {}
    for kind, jobs_without in (("training", steps_without), ("sampling", samples_without)):
        seconds = timed(jobs_without(cfg, device), device, rounds)
        with_all = seconds.pop(AS_IT_IS, math.nan)
        ratios |= {f"{kind}: {choice}": without / with_all for choice, without in seconds.items()}
    return ratios


def steps_without(cfg, device):
    """{choice: training job that does without it}, as timed takes it, and AS_IT_IS."""
    choices = [AS_IT_IS, "fused AdamW", PLAIN_FORMULA, "contiguous images", "no recomputation"]
    choices += ["bf16"] * (cfg.precision == "bf16") + [EAGER] * (device.type == "cuda")
    return {choice: (step_without, choice, cfg, device) for choice in choices}


def step_without(choice, cfg, device):
    """The training job of a fresh Trainer that does without one choice."""
    changes = {"contiguous images": dict(plan="channels-last"), EAGER: dict(plan="compiled")}
    changes["bf16"] = dict(precision="fp32")
    trainer = trainer_of(replace(cfg, **changes.get(choice, {})), device)
    if choice == "fused AdamW":
        weights, decay = trainer.model.parameters(), cfg.weight_decay
        trainer.optimizer = torch.optim.AdamW(weights, cfg.lr, weight_decay=decay)
    if choice == PLAIN_FORMULA:
        networks.attend_by(trainer.model, F.scaled_dot_product_attention)
    if choice == "no recomputation":
        unet.recompute_blocks(trainer.model, True)
    return training_job(trainer.cfg, device, trainer)


def samples_without(cfg, device):
    """{choice: sampling job whose model does without it}, as timed takes it, and AS_IT_IS."""
    plain, *copies = (ready(networks.build_model(cfg), device) for _ in range(5))
    as_it_is, groups, attention, embedding = (devices.laid_out(model, device) for model in copies)
    for layer in groups.modules():
        if isinstance(layer, unet.GroupNorm):
            layer.contiguous_below = 0
    networks.attend_by(attention, F.scaled_dot_product_attention)
    models = {
        AS_IT_IS: as_it_is,
        "channels last on a CPU": plain,
        "GroupNorm of small images laid out anew": groups,
        PLAIN_FORMULA: attention,
        "X-ray embedded once a mask": EmbedsEveryPass(embedding),
    }
    n, float32 = min(cfg.batch_size, 64), replace(cfg, precision="fp32")
    jobs = {choice: (sampling_job, cfg, device, n, model) for choice, model in models.items()}
    if cfg.precision == "bf16":
        jobs["bf16"] = sampling_job, float32, device, n, as_it_is
    return jobs


class EmbedsEveryPass(torch.nn.Module):
    """A model that embeds y at every pass, as for a sampler that knows only model(xt, t, y)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.embed = model, torch.nn.Identity()

    def denoise(self, xt, t, y):
        return self.model.denoise(xt, t, self.model.embed(y))


def scaling_of_a_step(cfg, device, rounds):
    """{setting: {value: [seconds, peak bytes]}} of a training step.

    Attention stays at its levels of the U-Net, so that a larger image has more positions there.
    """
    halves, rows = (0.5, 1, 2), {}
    for name, times in dict(batch_size=halves, image_size=halves, channels=(1, 2, 4)).items():
        values = [max(1, int(factor * getattr(cfg, name))) for factor in times]
        steps = {v: (training_job, replace(cfg, **{name: v}), device) for v in values}
        seconds = timed(steps, device, rounds)
        rows[name] = {v: [seconds[v], peak_memory(two_steps, *steps[v])] for v in seconds}
    return rows


def scaling_with_images(cfg, device, folder):
    """{what: {number of images: [seconds, None]}}, the median of three runs in turn."""
    sizes = dict(batch_size=16, channels=8, head_channels=8, image_size=32)
    small, decoding, epochs = replace(cfg, **sizes), {}, {}
    for n in 3 * (320, 3200):
        new_folder = Path(tempfile.mkdtemp(dir=folder))
        decoding.setdefault(n, []).append(seconds_to_decode(new_folder, n))
    for n in 3 * (320, 3200):
        epochs.setdefault(n, []).append(epoch_seconds(small, device, n))
    rows = {"images decoded": decoding, "images in an epoch (8 channels, 32x32)": epochs}
    for name, row in rows.items():
        rows[name] = {n: [statistics.median(seconds), None] for n, seconds in row.items()}
    return rows


def exponent(seconds):
    """Slope of log seconds on log value, {value: seconds}: 1 is linear."""
    values, times = np.log(list(seconds)), np.log(list(seconds.values()))
    return float(np.polyfit(values, times, 1)[0])


# ---------------------------------------- tables


def tables(result):
    """All that was measured, as Markdown."""
    cfg = result["config"]  # older runs have a preset, not size and recipe
    size = f"size {cfg['size']}, recipe {cfg['recipe']}" if "size" in cfg else "preset {preset}"
    head = "{task}, " + size + ", {channels} channels, batch {batch_size}, {precision}; "
    head = head.format(**cfg) + "{hardware}, torch {torch}, {commit}".format(**result)
    rows = [[name, f"{value:,.4g}"] for name, value in result["measured"].items()]
    parts = [table([head, ""], rows)]
    if "peers" in result:
        parts.append(peers.table(result["peers"]))
    if "models" in result:
        titles = ["model", "parameters", "training, ms an image", "a mask, GFLOP", "a mask, ms"]
        parts.append(table(titles, map(cells_of_model, result["models"])))
    if "gains" in result:
        rows = [[choice, f"{ratio:.2f}"] for choice, ratio in result["gains"].items()]
        parts.append(table(["choice", "time without it / with it"], rows))
    if "scaling" in result:
        parts.append(table_of_scaling(result["scaling"]))
    if "decode" in result:
        line = "{images:,} X-rays and masks decoded in {decoded:.1f} s"
        line += ", read from the cache in {cached:.2f} s"
        parts.append(line.format(**result["decode"]))
    return "\n\n".join(parts)


def cells_of_model(row):
    cells = [row["model"], f"{row['parameters']:,}", f"{1e3 * row['training']:.1f}"]
    return [*cells, f"{row['flop'] / 1e9:.2f}", f"{1e3 * row['mask']:.1f}"]


def table_of_scaling(rows):
    """Seconds and peak bytes, each with the exponent of its growth. JSON makes values strings."""
    lines = []
    for name, row in rows.items():
        seconds = {int(value): s for value, (s, _) in row.items()}
        peaks = {int(value): peak / 1e9 for value, (_, peak) in row.items() if peak}
        cells = [name]
        for numbers, digits in ((seconds, ".3g"), (peaks, ".2f")):
            cells.append(", ".join(f"{value}: {y:{digits}}" for value, y in numbers.items()))
            cells.append(f"{exponent(numbers):.2f}" if numbers else "")
        lines.append(cells)
    return table(["against", "seconds", "exponent", "peak, GB", "exponent"], lines)


# ---------------------------------------- the command


def parse(argv):
    """The command line -> argparse.Namespace."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("benchmark.py", description=__doc__, formatter_class=formatter)
    for name in ("size", "recipe", "channels", "batch_size", "precision"):
        p.add_argument(f"--{name.replace('_', '-')}", **config.argument(config.SETTINGS[name]))
    count = dict(type=int, metavar="N")
    p.add_argument(
        "--ddim-steps",
        **count,
        default=50,
        help="passes a sample (default 50, §3.2; recipe best takes 2 for a mask)",
    )
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--rounds", **count, default=5, help="timed runs of every job (default 5)")
    p.add_argument("--peers", action="store_true", help="measure other libraries' U-Nets too")
    p.add_argument("--models", action="store_true", help="measure what a mask costs, by each model")
    p.add_argument("--gains", action="store_true", help="measure what each choice is worth")
    p.add_argument("--scaling", action="store_true", help="measure how time and memory grow")
    p.add_argument("--decode", **count, help="measure decoding of N X-rays and masks")
    p.add_argument("--out", type=path_of, metavar="FILE", help="write the numbers there, as JSON")
    return p.parse_args(argv)


def configure(args, device):
    """The Config of what is measured: lung masks. UserError: what cannot be, or cannot be built."""
    for name in ("rounds", "decode"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    console.refuse_out(args.out, "benchmark.py", '{\n "config": ')
    words = ["--task", "lung"]
    for name in ("size", "recipe", "batch_size", "ddim_steps", "precision"):
        if getattr(args, name) is not None:
            words += [config.flag(name), str(getattr(args, name))]
    if args.channels is not None:
        words += ["--set", f"channels={args.channels}"]
    cfg = config.configure(config.parse(words), device)
    networks.without_memory(cfg)
    return replace(cfg, steps=10**6)  # no learning rate falls to 0 here


def parts(args, cfg, device, folder):
    """Measure what was asked for; yields (name, numbers) of each part, as tables() takes them."""
    yield "measured", measure(cfg, device, args.rounds, folder)
    if args.peers:
        yield "peers", compare(cfg, device, args.rounds)
    if args.models:
        yield "models", models(cfg, device, args.rounds)
    if args.gains:
        yield "gains", gains(cfg, device, args.rounds)
    if args.scaling:
        by_setting = scaling_of_a_step(cfg, device, args.rounds)
        yield "scaling", by_setting | scaling_with_images(cfg, device, folder)
    if args.decode:
        seconds = dict(decoded=seconds_to_decode(folder / "many", args.decode))
        seconds["cached"] = seconds_from_cache(folder / "many")
        yield "decode", dict(images=args.decode) | seconds


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)

    def work():
        device = devices.choose_device(args.device)
        cfg = configure(args, device)
        result = dict(config=asdict(cfg)) | runs.provenance(device)
        optional = (args.peers, args.models, args.gains, args.scaling, args.decode)
        progress, total = progress_line("measured, parts:"), 1 + sum(map(bool, optional))
        with tempfile.TemporaryDirectory() as folder:
            for done, (name, numbers) in enumerate(parts(args, cfg, device, Path(folder)), 1):
                result[name] = numbers
                if args.out:
                    runs.write_result(args.out, result, device)
                progress(done, total)
        message(tables(result))
        return 0

    less = "try a smaller --batch-size or --channels"
    return exit_status("benchmark.py", work, less, "the parts that were done are in --out")


if __name__ == "__main__":
    sys.exit(main())
