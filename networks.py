"""The network of a configuration, its arithmetic, and the configuration in words."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

import baselines
import conditions
import patches
import unet
from conditional import begin_as_addition
from config import FOUND, NOT_OF, SETTINGS, flag
from console import UserError
from data import CLASSES


def build_model(cfg):
    """The network of a configuration, with fresh weights that depend on its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # its low 32 bits; cfg.seed has no others
        if cfg.model in baselines.U_NETS:
            kind = baselines.U_NETS[cfg.model]
            return patches.supervised_unet(kind, cfg.channels, cfg.image_size)
        names = "image_size growth rrdbs channels channel_mult blocks head_channels".split()
        settings = {name: getattr(cfg, name) for name in names}
        positions = patches.positions_of(cfg.image_size)
        attention_at = tuple(positions >> level for level in cfg.attention_levels)
        settings |= dict(segdiff=cfg.rrdb == "segdiff", attention_at=attention_at)
        settings["answers"] = 2 if cfg.variance == "learned" else 1
        if cfg.given:
            kinds = conditions.kinds_of(cfg.given)
            settings |= dict(y_channels=len(conditions.masks_of(cfg.given)))
            settings |= dict(classes=len(CLASSES) if "class" in kinds else 0)
        net = patches.conditional_unet(cfg.cond, **settings)
        if cfg.stem == "add":
            begin_as_addition(net)
        return baselines.OnePass(net, cfg.T) if cfg.supervised else net


def without_memory(cfg):
    """build_model on torch's meta device. UserError: what cannot be built."""
    try:
        with torch.device("meta"):
            return build_model(cfg)
    except ValueError as e:
        sizes = f"--set channels={cfg.channels}, --image-size {cfg.image_size}"
        raise UserError(f"{sizes}: {e}") from e


def parameters(module):
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------- its arithmetic


def attend_by(model, attend):
    """Let all attention of a model be computed by attend(q, k, v), a function like unet.attend."""
    for layer in model.modules():
        if isinstance(layer, (unet.LinearAttention, unet.CrossAttention)):
            layer.attend = attend


def flops_of(model, *args):
    """Floating-point operations of one forward pass: twice its multiply-accumulates.

    Attention is counted in the formula of §3.2: torch does not see inside its fused kernels on
    every device. Q K^T and (...) V take 2 * 2 * N^2 * C for N positions and C channels.
    """
    model = copy.deepcopy(model)
    attend_by(model, unet.attend)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


def flops_of_a_pass(cfg):
    """Of one image through the U-Net; counted on torch's meta device, which computes nothing."""
    net = without_memory(cfg).unet
    with torch.device("meta"):
        xt = torch.empty(1, net.in_channels, *2 * [patches.positions_of(cfg.image_size)])
        return flops_of(net, xt, torch.ones(1, dtype=torch.long))


def flops_of_passes(cfg, passes):
    """Of so many passes for one image, whose X-ray is embedded once; a supervised model has one."""
    model = without_memory(cfg)
    with torch.device("meta"):
        y, t = torch.empty(1, 1, cfg.image_size, cfg.image_size), torch.ones(1, dtype=torch.long)
        if cfg.supervised:
            return flops_of(model, y)
        return flops_of(model, y, t, y) + (passes - 1) * flops_of_a_pass(cfg)


# ---------------------------------------- in words


def describe(cfg, words=False):
    """The settings that say something about this run, and the sizes of its networks, in lines.

    words  True: each line also has the flag, the words and the section of its setting
    """
    model = without_memory(cfg)
    lines = [setting_line(cfg, name, words) for name in SETTINGS if name not in unused(cfg)]
    net = model.net if cfg.model == "report-unet" else model
    lines.append(f"  U-Net            {parameters(getattr(net, 'unet', net)):,} parameters")
    if getattr(net, "embedder", None) is not None:
        lines.append(f"  embedder         {parameters(net.embedder):,} parameters")
    return "\n".join(lines)


def setting_line(cfg, name, words):
    """A setting and its value, and what it means where `words` is true."""
    facts, value = SETTINGS[name].metadata, getattr(cfg, name)
    line = f"  {name:17}{', '.join(map(str, value)) if isinstance(value, tuple) else value}"
    if not words or name in FOUND:
        return line
    return f"{line:<34} {flag(name)}: {facts['words']} ({facts['section']})".removesuffix(" ()")


def unused(cfg):
    """The names of the settings that say nothing about this run."""
    names = {"epochs" if cfg.steps else "steps", *NOT_OF[cfg.task]}  # the one gives the other
    names |= set() if cfg.data else set(FOUND)
    names |= set() if cfg.task == "synthesis" else {"draw", "given"}
    names |= set() if cfg.given else {"drop", "guidance"}
    foreign = {"diffusion": cfg.supervised, "network": cfg.model in baselines.U_NETS}
    return names | {n for n, field in SETTINGS.items() if foreign.get(field.metadata["about"])}
