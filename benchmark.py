r"""What a user waits and pays for, measured in one run on this machine, as medians of interleaved rounds.

    python benchmark.py                         the small preset where there is no NVIDIA GPU, the report's where there is
    python benchmark.py --peers                 beside the nearest equal networks of diffusers, MONAI and denoising-diffusion-pytorch,
                                                where they are installed
    python benchmark.py --models                what a mask costs: the supervised networks, and diffusion by its passes
    python benchmark.py --gains                 what each choice of the step and of the sampler is worth: the time without it
    python benchmark.py --scaling               time and memory against batch, image size, channels and number of images, with the exponent
    python benchmark.py --decode 33920          decode so many 256x256 X-rays and masks, and read them from the cache
    python benchmark.py --out results/cpu.json  keep the numbers, with hardware and commit

The training step is Trainer.train_step and the sampler is train.sample_masks: what train.py and sample.py call, not copies.
Their arithmetic is counted on the network itself (flops_of) and divided by what this machine reaches at a plain matrix
product in the same number format, so that "share" says how far from the ceiling a step is. Seconds depend on what else the
machine is doing; the ratios of one run do not, because its jobs take turns.
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # as train.py
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

import argparse
import dataclasses
import gc
import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import train
import unet

# ------------------------------------------------------------------------------------- measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(jobs, device, rounds=5, warm=1):
    """Median seconds of each job: {name: callable} -> {name: seconds}. Every round runs each job once, and begins with another one."""
    seconds, names = {name: [] for name in jobs}, list(jobs)
    for k in range(-warm, rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            synchronise(device)
            start = time.perf_counter()
            jobs[name]()
            synchronise(device)
            if k >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops_of(model, *args):
    """Floating-point operations of one forward pass on these arguments: twice its multiply-accumulates.

    torch counts convolutions and linear layers. The softmax attention of §3.2, which it sees or not depending on the device,
    is counted here: Q K^T and (...) V take 2 * 2 * N^2 * C for N positions and C channels. Cross-attention is not counted.
    """
    attention, hooks = [], []
    count = lambda layer, given, out: attention.append(4 * out.shape[0] * out.shape[2:].numel() ** 2 * out.shape[1])
    for layer in model.modules():
        if isinstance(layer, unet.LinearAttention):
            hooks.append(layer.register_forward_hook(count))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    for hook in hooks:
        hook.remove()
    seen = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op) and "bmm" not in str(op))
    return seen + sum(attention)


def machine_rates(device, dtype, rounds=5):
    """What the machine reaches: matrix product and 3x3 convolution in FLOP/s, copy in bytes/s (read and written)."""
    n, (B, C, S), size = (8192, (512, 192, 64), 2**30) if device.type == "cuda" else (2048, (16, 64, 64), 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(B, C, S, S, device=device, dtype=dtype)
    w = torch.randn(C, C, 3, 3, device=device, dtype=dtype)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    jobs = {"matrix product": lambda: a @ b, "convolution": lambda: F.conv2d(x, w, padding=1), "copy": lambda: target.copy_(block)}
    with torch.inference_mode():
        seconds = interleaved(jobs, device, rounds, warm=2)
    work = {"matrix product": 2 * n**3, "convolution": 2 * 9 * C * C * B * S * S, "copy": 2 * size}
    return {name: work[name] / seconds[name] for name in jobs}


def peak_memory(work, *args):
    """Peak memory in bytes of work(*args) in a process of its own: resident on the CPU, allocated on a GPU."""
    return in_process_of_its_own(_peak, work, *args)


def in_process_of_its_own(work, *args, environment=()):
    """work(*args) in a fresh process, started with these environment variables beside its own."""
    before = dict(os.environ)
    os.environ.update(environment)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process holds and does not use
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(work, args)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _peak(work, *args):
    work(*args)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    kilobytes = [line.split()[1] for line in train.lines_of("/proc/self/status") if line.startswith("VmHWM")]
    return int(kilobytes[0]) * 1024 if kilobytes else resident_peak()


def resident_peak():
    """Where there is no /proc. On Linux this would not do: a child inherits it from its parent."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------- our jobs


def random_split(cfg, n):
    """n X-rays and masks of noise, uint8 on the CPU: speed does not depend on what they show."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, cfg.image_size, cfg.image_size), generator=g, dtype=torch.uint8)
    return images, (images > 127) * torch.tensor(255, dtype=torch.uint8)


def training_job(cfg, device):
    """One call is one step of train.py."""
    trainer = train.Trainer(cfg, device)
    trainer.fit_memory()
    images, masks = (a.to(device) for a in random_split(cfg, 2 * cfg.batch_size))
    masks = None if cfg.task == "synthesis" else masks
    job = lambda: trainer.train_step(images, masks)
    job.trainer = trainer
    return job


def sampling_job(cfg, device, n, model=None):
    """One call samples n masks (or X-rays) as an evaluation does, by default with a fresh model laid out as there."""
    model = model or train.laid_out(train.build_model(cfg).to(device).requires_grad_(False).eval(), device)
    if cfg.task == "synthesis":
        return lambda: train.sample_images(model, cfg, range(n), device)
    y = data.to_float(random_split(cfg, n)[0]).to(device)
    return lambda: train.sample_masks(model, cfg, y, range(n), cfg.ensemble, device)


def decoding_seconds(folder, n=120):
    """Seconds for n X-rays with masks, 256x256 PNG to 64x64 arrays, without a cache; and from it. Phantoms; beyond 120 their files repeat."""
    drawn = min(n, 120)  # their pictures are alike in size and detail
    data.write_phantoms(folder, "Lung Segmentation Data", {split: {"Normal": k} for split, k in (("Train", drawn), ("Val", 4), ("Test", 4))})
    files = {kind: sorted(kind.glob("*.png")) for kind in next(folder.glob("**/Train/Normal")).iterdir()}
    for kind, pictures in files.items():
        for i in range(drawn, n):
            os.link(pictures[i % drawn], kind / f"again ({i}).png")
    read = lambda: data.load(folder, "lung", "Train", ("Normal",), cache=folder / "cache")
    start = time.perf_counter()
    assert len(read().images) == n
    decoded = time.perf_counter() - start
    return decoded, interleaved({"cache": read}, torch.device("cpu"))["cache"]


def start_up(folder, cfg, device):
    """Seconds from the command to the end of the first training step and a checkpoint, Python and torch included."""
    words = ["--task", "lung", "--classes", "Normal", "--preset", cfg.preset]
    words += ["--data", folder, "--out", folder / "run", "--steps", "1", "--device", device.type]
    words += ["--eval-images", "2", "--ddim-steps", "1", "--channels", str(cfg.channels), "--batch-size", str(min(cfg.batch_size, 16))]
    start = time.perf_counter()
    subprocess.run([sys.executable, Path(train.__file__), *map(str, words)], check=True, capture_output=True)
    return time.perf_counter() - start


def decode_many(folder, n):
    decoded, cached = decoding_seconds(folder, n)
    return dict(images=n, decoded=decoded, cached=cached)


# ------------------------------------------------------------------------------------- the nearest equal networks


class Peer(torch.nn.Module):
    """Another library's U-Net called like ours: model(xt, t, y). Unconditional; the parameters are its own defaults otherwise."""

    def __init__(self, name, cfg):
        super().__init__()
        C = [cfg.channels * m for m in cfg.channel_mult]
        groups = max(g for g in range(1, 33) if not cfg.channels % g and cfg.channels // g >= min(4, cfg.channels))
        attends = [level in cfg.attention_levels for level in range(len(C))]
        self.name = name
        if name == "diffusers":
            from diffusers import UNet2DModel

            self.net = UNet2DModel(
                cfg.image_size,
                1,
                1,
                layers_per_block=cfg.blocks,
                block_out_channels=C,
                norm_num_groups=groups,
                attention_head_dim=cfg.head_channels,
                downsample_type="resnet",
                upsample_type="resnet",
                down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
                up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
            )
        elif name == "monai":
            from monai.networks.nets import DiffusionModelUNet

            self.net = DiffusionModelUNet(
                2,
                1,
                1,
                num_res_blocks=cfg.blocks,
                channels=C,
                attention_levels=attends,
                norm_num_groups=groups,
                num_head_channels=cfg.head_channels,
                resblock_updown=True,
                use_flash_attention=torch.cuda.is_available(),
            )
        else:
            from denoising_diffusion_pytorch import Unet

            self.net = Unet(
                cfg.channels,
                dim_mults=cfg.channel_mult,
                channels=1,
                flash_attn=True,
                full_attn=tuple(attends),
                attn_dim_head=cfg.head_channels,
                attn_heads=C[-1] // cfg.head_channels,
            )

    def forward(self, xt, t, y=None):
        answer = self.net(xt, t)
        return answer.sample if self.name == "diffusers" else answer

    def embed(self, y):
        return None

    def denoise(self, xt, t, e):
        return self.forward(xt, t)


PEERS = {"diffusers": "diffusers", "monai": "monai", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}


def peer_training_job(name, cfg, device):
    """The plain loop that their manuals teach: float32, MSE on the noise of Eq. (7), backward, AdamW. No averaged weights, no clipping."""
    model, s = Peer(name, cfg).to(device), train.schedule(cfg.T)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr)
    x0 = data.to_float(random_split(cfg, cfg.batch_size)[0]).to(device)

    def step():
        optimizer.zero_grad()
        train.diffusion.l_simple(s, model, x0).backward()
        optimizer.step()

    return step


def peer_sampling_job(name, cfg, device, n):
    """Our sampler around their network, so that only the network differs."""
    model = Peer(name, cfg).to(device).requires_grad_(False).eval()
    plain = dataclasses.replace(cfg, precision="fp32")
    return lambda: train.sample_images(model, plain, range(n), device)


def fits(name, job):
    """Whether the job finds the memory it needs; said where not."""
    try:
        job()
    except RuntimeError as e:
        if not train.out_of_memory(e):
            raise
        print(f"{name}: out of memory, left out", file=sys.stderr)
        return False
    return True


def run_steps(make, *args, steps=2):
    job = make(*args)
    for _ in range(steps):
        job()


# ------------------------------------------------------------------------------------- what each choice is worth


def gains(cfg, device, rounds):
    """{choice: seconds of a training step, or of a sample, without it, over seconds with it}, in one run.

    What is not chosen on this device, because it was not measured there or did not pay, is in the list too: below 1 means it would pay.
    """
    n, few = min(cfg.batch_size, 64), "attention of few positions by the plain formula on a CPU"

    def with_another(owner, name, function, job):
        def run():
            ours = getattr(owner, name)
            setattr(owner, name, function)
            job()
            setattr(owner, name, ours)

        return run

    def changed(change):
        job = training_job(cfg, device)
        change(job.trainer)
        return job

    def adamw_not_fused(trainer):
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), cfg.lr, weight_decay=cfg.weight_decay)

    def channels_last(trainer):
        trainer.model.to(memory_format=torch.channels_last)
        trainer.ema.to(memory_format=torch.channels_last)

    def compiled(trainer):
        trainer.parallel = torch.compile(trainer.model)

    def recomputed(trainer):
        trainer.model.unet.recompute = True

    other = dataclasses.replace(cfg, precision="fp32")
    steps = {
        "as it is": training_job(cfg, device),
        "fused AdamW": changed(adamw_not_fused),
        few: with_another(unet, "fused_attend", F.scaled_dot_product_attention, training_job(cfg, device)),
        "contiguous images": changed(channels_last),
        "no recomputation": changed(recomputed),
        **({"bf16": training_job(other, device)} if cfg.precision == "bf16" else {}),
        **({"eager mode, not torch.compile": changed(compiled)} if device.type == "cuda" else {}),
    }
    plain = train.build_model(cfg).to(device).requires_grad_(False).eval()
    samples = {
        "as it is": sampling_job(cfg, device, n),
        "channels last on a CPU": sampling_job(cfg, device, n, plain),
        "GroupNorm of small images laid out anew": with_another(unet.GroupNorm, "forward", torch.nn.GroupNorm.forward, sampling_job(cfg, device, n)),
        few: with_another(unet, "fused_attend", F.scaled_dot_product_attention, sampling_job(cfg, device, n)),
        "X-ray embedded once a mask": sampling_job(cfg, device, n, EmbedsEveryPass(train.laid_out(plain, device))),
        **({"bf16": sampling_job(other, device, n)} if cfg.precision == "bf16" else {}),
    }
    found = {}
    for kind, jobs in (("training", steps), ("sampling", samples)):
        seconds = interleaved(jobs, device, rounds)
        found |= {f"{kind}: {name}": s / seconds["as it is"] for name, s in seconds.items() if name != "as it is"}
    if device.type == "cpu":
        spinning = {"as it is": {}, "no": {"GOMP_SPINCOUNT": "0"}}
        apart = {name: [] for name in spinning}
        for _ in range(3):
            for name, environment in spinning.items():
                apart[name].append(in_process_of_its_own(step_seconds, cfg, device, environment=environment))
        found["training: OpenMP threads spin a moment before they sleep"] = statistics.median(apart["no"]) / statistics.median(apart["as it is"])
    return found


class EmbedsEveryPass:
    """A model that embeds y at every pass, as a sampler does that knows only model(xt, t, y)."""

    def __init__(self, model):
        self.model, self.embed = model, lambda y: y

    def denoise(self, xt, t, y):
        return self.model.denoise(xt, t, self.model.embed(y))


def step_seconds(cfg, device, rounds=7):
    return interleaved({"step": training_job(cfg, device)}, device, rounds, warm=2)["step"]


# ------------------------------------------------------------------------------------- tables


def measure(cfg, device, rounds, folder):
    """What this machine does with this configuration: a flat dict of numbers with their units in their names."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    n = min(cfg.batch_size, 64)
    with torch.device("meta"):
        net = train.build_model(cfg).unet
        forward = flops_of(net, torch.empty(1, net.in_channels, cfg.image_size, cfg.image_size), torch.ones(1, dtype=torch.long))
    jobs = {"step": training_job(cfg, device), "sample": sampling_job(cfg, device, n)}
    seconds = interleaved(jobs, device, rounds)
    del jobs
    gc.collect()
    rates = machine_rates(device, dtype, rounds)
    decoded, cached = decoding_seconds(folder)
    step_flops, sample_flops = 3 * forward * cfg.batch_size * cfg.noises, forward * n * cfg.ddim_steps  # backward is twice forward
    return {
        "seconds a training step": seconds["step"],
        "training images/s": cfg.batch_size / seconds["step"],
        "training FLOP a step": step_flops,
        "training share of matrix product": step_flops / seconds["step"] / rates["matrix product"],
        "training share of convolution": step_flops / seconds["step"] / rates["convolution"],
        f"sampling images/s, DDIM-{cfg.ddim_steps}": n / seconds["sample"],
        "sampling share of matrix product": sample_flops / seconds["sample"] / rates["matrix product"],
        "training peak memory, GB": peak_memory(run_steps, training_job, cfg, device) / 1e9,
        "decoding pairs/s": 120 / decoded,
        "cache pairs/s": 120 / cached,
        "start to the end of the first step, s": start_up(folder, cfg, device),
        "matrix product, GFLOP/s": rates["matrix product"] / 1e9,
        "convolution, GFLOP/s": rates["convolution"] / 1e9,
        "copy, GB/s": rates["copy"] / 1e9,
    }


def compare(cfg, device, rounds):
    """Rows (name, parameters, step s, sampling s, peak bytes): ours with and without bf16, and the peers that are installed.

    One unconditional network of one size; a training step of one batch, each image noised once, and DDIM-10 of 8 images.
    """
    cfg = dataclasses.replace(cfg, task="synthesis", cond=None, ddim_steps=10, target="eps", noises=1)
    ours = {f"here, {p}": dataclasses.replace(cfg, precision=p) for p in dict.fromkeys((cfg.precision, "fp32"))}
    installed = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    peers = {name: job for name in installed if fits(name, job := peer_training_job(name, cfg, device))}
    steps = {name: training_job(c, device) for name, c in ours.items()} | peers
    samples = {name: sampling_job(c, device, 8) for name, c in ours.items()} | {n: peer_sampling_job(n, cfg, device, 8) for n in peers}
    step_s, sample_s = interleaved(steps, device, rounds), interleaved(samples, device, rounds)
    count = lambda model: sum(p.numel() for p in model.parameters())
    rows = []
    for name in steps:
        model = Peer(name, cfg) if name in peers else train.build_model(cfg)
        job = (peer_training_job, name, cfg, device) if name in peers else (training_job, ours[name], device)
        seconds = dict(step=step_s[name], sampling=sample_s[name])
        rows.append(dict(network=name, parameters=count(model), **seconds, memory=peak_memory(run_steps, *job)))
    return rows


def models(cfg, device, rounds):
    """What a training image and a mask cost: rows of the supervised networks of the preset, and of diffusion in several passes.

    n masks are drawn together, as in an evaluation. FLOP a mask is counted on the network, the X-ray embedded once.
    """
    n = min(cfg.batch_size, 64)
    words = f"--task lung --preset {cfg.preset} --precision {cfg.precision} --batch-size {cfg.batch_size} --image-size {cfg.image_size}".split()
    configs = {name: train.configure(train.parse([*words, "--model", name]), device) for name in train.baselines.U_NETS}
    configs = {name: dataclasses.replace(c, steps=cfg.steps) for name, c in configs.items()}
    configs["report-unet"] = dataclasses.replace(cfg, model="report-unet")
    diffusion = [dataclasses.replace(cfg, ddim_steps=passes) for passes in dict.fromkeys((1, cfg.ddim_steps, 5, 50))]
    diffusion.append(dataclasses.replace(cfg, ensemble=9))
    configs |= {f"diffusion, {c.ensemble} x DDIM-{c.ddim_steps}": c for c in diffusion}
    step_s = interleaved({c.model: training_job(c, device) for c in configs.values()}, device, rounds)
    gc.collect()
    mask_s = interleaved({name: sampling_job(c, device, n) for name, c in configs.items()}, device, rounds)
    rows = []
    for name, c in configs.items():
        with torch.device("meta"):
            model, y, t = train.build_model(c), torch.empty(1, 1, c.image_size, c.image_size), torch.ones(1, dtype=torch.long)
            flop = flops_of(model, *((y,) if c.supervised else (y, t, y)))
            if not c.supervised:
                unet_input = torch.empty(1, model.unet.in_channels, c.image_size, c.image_size)
                flop += (c.ensemble * c.ddim_steps - 1) * flops_of(model.unet, unet_input, t)
        seconds = dict(training=step_s[c.model] / c.batch_size, mask=mask_s[name] / n)
        rows.append(dict(model=name, parameters=sum(p.numel() for p in model.parameters()), flop=flop, **seconds))
    return rows


def scaling(cfg, device, rounds, folder):
    """{what: {value: [seconds, peak bytes]}}: a training step against batch, image size and channels, and data against images.

    The network keeps attention at the level it has, so a larger image has more positions there.
    """
    what = {
        "batch_size": [cfg.batch_size // 2, cfg.batch_size, 2 * cfg.batch_size],
        "image_size": [cfg.image_size // 2, cfg.image_size, 2 * cfg.image_size],
        "channels": [cfg.channels, 2 * cfg.channels, 4 * cfg.channels],
    }
    found = {}
    for name, values in what.items():
        configs = {value: dataclasses.replace(cfg, **{name: value}) for value in values}
        seconds = interleaved({value: training_job(c, device) for value, c in configs.items()}, device, rounds)
        gc.collect()
        found[name] = {v: [seconds[v], peak_memory(run_steps, training_job, c, device)] for v, c in configs.items()}
    small = dataclasses.replace(cfg, batch_size=16, channels=8, head_channels=8, image_size=32)
    work = {
        "images decoded": lambda n: decoding_seconds(Path(tempfile.mkdtemp(dir=folder)), n)[0],
        "images in an epoch (8 channels, 32x32)": lambda n: epoch_seconds(small, device, n),
    }
    for name, of in work.items():
        seconds = {n: [] for n in (320, 3200)}
        for _ in range(3):
            for n in seconds:
                seconds[n].append(of(n))
        found[name] = {n: [statistics.median(s), None] for n, s in seconds.items()}
    return found


def epoch_seconds(cfg, device, n):
    """Seconds to train one epoch of n images, after a first step."""
    trainer = train.Trainer(cfg, device)
    images, masks = (a.to(device) for a in random_split(cfg, n))
    trainer.train_step(images, masks)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(n // cfg.batch_size):
        trainer.train_step(images, masks)
    synchronise(device)
    return time.perf_counter() - start


def exponent(seconds):
    """Slope of log seconds on log value, {value: seconds}: 1 is linear."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def tables(result):
    """All that was measured, as Markdown."""
    cfg = result["config"]
    of = f"{cfg['task']}, preset {cfg['preset']}, {cfg['channels']} channels, batch {cfg['batch_size']}, {cfg['precision']}"
    of += f"; {result['hardware']}, torch {result['torch']}, {result['commit']}"
    lines = [f"| {of} | |", "|---|---|", *(f"| {name} | {value:,.4g} |" for name, value in result["measured"].items())]
    if rows := result.get("peers"):
        base = min((row for row in rows if not row["network"].startswith("here")), key=lambda row: row["step"], default=rows[0])
        times = f"times as fast as {base['network']}"
        lines += ["", f"| network | parameters | step, s | {times} | DDIM-10 of 8, s | {times} | peak, GB |", "|---" * 7 + "|"]
        for row in rows:
            ratios = f"{base['step'] / row['step']:.2f} | {row['sampling']:.3f} | {base['sampling'] / row['sampling']:.2f}"
            lines.append(f"| {row['network']} | {row['parameters']:,} | {row['step']:.3f} | {ratios} | {row['memory'] / 1e9:.2f} |")
    if rows := result.get("models"):
        lines += ["", "| model | parameters | training, ms an image | a mask, GFLOP | a mask, ms |", "|---" * 5 + "|"]
        for row in rows:
            name, count, training, mask = row["model"], row["parameters"], 1e3 * row["training"], 1e3 * row["mask"]
            lines.append(f"| {name} | {count:,} | {training:.1f} | {row['flop'] / 1e9:.2f} | {mask:.1f} |")
    if found := result.get("gains"):
        lines += ["", "| choice | time without it / with it |", "|---|---|", *(f"| {name} | {ratio:.2f} |" for name, ratio in found.items())]
    if rows := result.get("scaling"):
        lines += ["", "| against | seconds | exponent | peak, GB | exponent |", "|---|---|---|---|---|"]
    for name, values in result.get("scaling", {}).items():
        seconds, peaks = ({int(n): v[i] for n, v in values.items() if v[i]} for i in (0, 1))
        cells = [name, ", ".join(f"{n}: {s:.3g}" for n, s in seconds.items()), f"{exponent(seconds):.2f}"]
        cells += [", ".join(f"{n}: {b / 1e9:.2f}" for n, b in peaks.items()), f"{exponent(peaks):.2f}"] if peaks else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if decode := result.get("decode"):
        lines += ["", f"{decode['images']:,} X-rays and masks decoded in {decode['decoded']:.1f} s, read from the cache in {decode['cached']:.2f} s"]
    return "\n".join(lines)


def parse(argv):
    p = train.Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=train.PRESETS, help="as train.py")
    p.add_argument("--peers", action="store_true", help="measure the installed peers too")
    p.add_argument("--models", action="store_true", help="measure the supervised networks, and diffusion by its passes")
    p.add_argument("--gains", action="store_true", help="measure each choice of the step and of the sampler")
    p.add_argument("--scaling", action="store_true", help="measure against batch, image size, channels and number of images")
    p.add_argument("--decode", type=int, metavar="N", help="measure decoding of N X-rays and masks")
    p.add_argument("--channels", type=int, metavar="N", help="width of the first level")
    p.add_argument("--batch-size", type=int, metavar="N", help="images a step")
    p.add_argument("--ddim-steps", type=int, metavar="N", default=50, help="passes a sample; default 50, the report's")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="as train.py")
    p.add_argument("--rounds", type=int, metavar="N", default=5, help="every job runs this often; the median counts")
    p.add_argument("--device", help="as train.py")
    p.add_argument("--out", metavar="FILE", help="write the numbers there, as JSON")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        device = train.choose_device(args.device)
        given = {k: getattr(args, k) for k in ("preset", "channels", "batch_size", "ddim_steps", "precision")}
        words = [word for k, v in given.items() if v is not None for word in ("--" + k.replace("_", "-"), str(v))]
        cfg = train.configure(train.parse(["--task", "lung", *words]), device)
        train.describe(cfg)  # refuses what cannot be built
        for name in ("rounds", "decode"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise train.UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
        cfg = dataclasses.replace(cfg, steps=10**6)
        with tempfile.TemporaryDirectory() as folder:
            parts = {
                "measured": lambda: measure(cfg, device, args.rounds, Path(folder)),
                "peers": lambda: compare(cfg, device, args.rounds),
                "models": lambda: models(cfg, device, args.rounds),
                "gains": lambda: gains(cfg, device, args.rounds),
                "scaling": lambda: scaling(cfg, device, args.rounds, Path(folder)),
                "decode": lambda: decode_many(Path(folder, "many"), args.decode),
            }
            asked = [name for name in parts if name == "measured" or getattr(args, name)]
            progress, result = data.progress_line("measured, parts:"), {"config": dataclasses.asdict(cfg), **train.provenance(device)}
            for done, name in enumerate(asked, 1):
                result[name] = parts[name]()
                progress(done, len(asked))
                if args.out:
                    train.write_whole(Path(args.out), train.as_json(result))
    except (train.UserError, data.DataError, OSError) as e:
        print(f"benchmark.py: error: {e}", file=sys.stderr)
        return 2
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
