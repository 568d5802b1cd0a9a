"""Other libraries' U-Nets of nearly equal size, called like ours: what benchmark.py compares with.

diffusers                     UNet2DModel
monai                         DiffusionModelUNet
denoising-diffusion-pytorch   Unet, which has linear attention at the levels where ours has none

Their packages are not needed, and are loaded only when a Peer is built. Each function below takes
our Config, or anything with its `image_size`, `channels`, `channel_mult`, `blocks`,
`attention_levels` and `head_channels`. Whatever our settings do not say is the library's default.
"""

import importlib.util

import torch

import tables

PEERS = {  # the name here, and the package to import
    "diffusers": "diffusers",
    "monai": "monai",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
}


def installed():
    """The names of the peers whose package is there."""
    return [name for name, package in PEERS.items() if importlib.util.find_spec(package)]


class Peer(torch.nn.Module):
    """A peer's unconditional U-Net, called like conditional.ConditionalUNet. It ignores y and e.

    name  of PEERS. ModuleNotFoundError where its package is missing
    """

    def __init__(self, name, cfg):
        super().__init__()
        self.name = name
        if name == "diffusers":
            self.net = diffusers_unet(cfg)
        elif name == "monai":
            self.net = monai_unet(cfg)
        elif name == "denoising-diffusion-pytorch":
            self.net = denoising_diffusion_pytorch_unet(cfg)
        else:
            raise ValueError(f"a peer is one of {', '.join(PEERS)}, got {name!r}")

    def forward(self, xt, t, y=None):
        """xt (B, 1, H, W), t (B,) int64 in 1..T -> (B, 1, H, W)."""
        answer = self.net(xt, t)
        return answer.sample if self.name == "diffusers" else answer

    def embed(self, y):
        return None

    def denoise(self, xt, t, e):
        return self.forward(xt, t)


def plain_loop(name, cfg, loss, device, parts):
    """The training step that a peer's manual teaches: float32, backward, AdamW at cfg.lr.

    Without averaged weights, without clipping.
    loss(model, part)  the mean loss of a part of the batch
    parts              tensors of images that make up the batch; their gradients add up
    """
    model = Peer(name, cfg).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr)
    images = sum(map(len, parts))

    def step():
        optimizer.zero_grad()
        for part in parts:
            (loss(model, part) * (len(part) / images)).backward()
        optimizer.step()

    return step


def widths_of(cfg):
    """The channels of each level."""
    return [cfg.channels * m for m in cfg.channel_mult]


def attends(cfg):
    """Of each level, whether it has attention."""
    return [level in cfg.attention_levels for level in range(len(cfg.channel_mult))]


def groups_of(cfg):
    """Groups of every GroupNorm: at most 32, of 4 or more of the first level's channels each."""
    least = min(4, cfg.channels)
    divisors = [g for g in range(1, 33) if cfg.channels % g == 0]
    return max(g for g in divisors if cfg.channels // g >= least)


def diffusers_unet(cfg):
    """diffusers.UNet2DModel, with residual blocks that resample."""
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends(cfg)]
    up = ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends(cfg))]
    return UNet2DModel(
        sample_size=cfg.image_size,
        in_channels=1,
        out_channels=1,
        layers_per_block=cfg.blocks,
        block_out_channels=widths_of(cfg),
        norm_num_groups=groups_of(cfg),
        attention_head_dim=cfg.head_channels,
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=down,
        up_block_types=up,
    )


def monai_unet(cfg):
    """monai.networks.nets.DiffusionModelUNet in two dimensions. Fused attention is CUDA's alone."""
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=cfg.blocks,
        channels=widths_of(cfg),
        attention_levels=attends(cfg),
        norm_num_groups=groups_of(cfg),
        num_head_channels=cfg.head_channels,
        resblock_updown=True,
        use_flash_attention=torch.cuda.is_available(),
    )


def denoising_diffusion_pytorch_unet(cfg):
    """denoising_diffusion_pytorch.Unet. It has two residual blocks a level, whatever cfg.blocks."""
    from denoising_diffusion_pytorch import Unet

    return Unet(
        cfg.channels,
        dim_mults=cfg.channel_mult,
        channels=1,
        flash_attn=True,
        full_attn=tuple(attends(cfg)),
        attn_dim_head=cfg.head_channels,
        attn_heads=widths_of(cfg)[-1] // cfg.head_channels,
    )


def table(rows):
    """The rows of benchmark.compare, ours and the peers', as Markdown.

    Ratios are over the peer with the fastest step; without a peer over our own network.
    """
    theirs = [row for row in rows if row["network"] in PEERS]
    base = min(theirs, key=lambda row: row["step"], default=rows[0])
    times = f"times as fast as {base['network']}"
    titles = ["network", "parameters", "step, s", times, "DDIM-10 of 8, s", times, "peak, GB"]
    lines = []
    for row in rows:
        cells = [row["network"], f"{row['parameters']:,}"]
        for kind in ("step", "sampling"):
            cells += [f"{row[kind]:.3f}", f"{base[kind] / row[kind]:.2f}"]
        lines.append([*cells, f"{row['memory'] / 1e9:.2f}"])
    return tables.table(titles, lines)
