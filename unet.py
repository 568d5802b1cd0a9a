r"""The noise-predicting U-Net of §3.2, and the same network conditioned on an X-ray (§4.2).

report                    here                      shape
x_t                       xt                        (B, C_in, H, W)
t                         t                         (B,) int64, 1..T
positional embedding      timestep_embedding        (B, channels), then two Linear layers: (B, 4 channels), called emb
Residual Block            ResidualBlock             (B, C, H, W), emb -> (B, C', H', W')
Linear Attention Layer    LinearAttention           (B, C, H, W) -> (B, C, H, W)
eps_theta(x_t, t)         UNet                      (B, C_in, H, W), t -> (B, C_out, H, W)
eps_theta(x_t, y, t)      ConditionalUNet           the U-Net, fed with RRDB(y) by addition, concatenation, ...

The report's prose simplifies the network of [14] and [6]; this is that network to the last parameter (217,859,905 at
one input channel): the last level does not downsample, the decoder has one block a level more than the encoder, and
each decoder block takes one skip.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rrdb import ConditionEmbedder


def timestep_embedding(t, dim):
    r"""Sinusoidal embedding of t (§3.2): [cos, sin] of t exp(-ln(10000) i / (dim/2)), i = 0..dim/2 - 1. (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class GroupNorm(nn.GroupNorm):
    """torch's. On a CPU its kernel is 4 to 8 times slower for small images with channels last, so they are laid out anew."""

    def forward(self, x):
        return super().forward(x.contiguous() if x.shape[2:].numel() < 1024 else x)


def group_norm(channels):
    """GroupNorm of 32 groups; in a small network fewer, of at least 4 channels.

    A group of one channel subtracts that channel's mean, and with it the time embedding, constant over the image.
    """
    groups = min(32, max(1, channels // 4))
    return GroupNorm(math.gcd(groups, channels), channels, eps=1e-5)


def zero(layer):
    """The layer with all its parameters 0: a fresh block changes nothing, a fresh network answers 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResidualBlock(nn.Module):
    """§3.2: norm, SiLU, [resample], convolution, + time embedding, norm, SiLU, convolution; + the (resampled) input.

    resample  None; "down": average pooling by 2; "up": nearest interpolation by 2
    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, c_in, c_out, c_emb, resample=None):
        super().__init__()
        self.resample = {
            None: nn.Identity(),
            "down": nn.AvgPool2d(2),
            "up": nn.Upsample(scale_factor=2, mode="nearest"),
        }[resample]
        self.norm_1, self.conv_1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm_2, self.conv_2 = group_norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv_1(self.resample(F.silu(self.norm_1(x))))  # (B, C', H', W')
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.shortcut(self.resample(x)) + h


def attend(q, k, v):
    """softmax(Q K^T / sqrt(D)) V of §3.2, for (B, heads, positions, D): the formula, quadratic in positions.

    The network computes it by fused_attend; the test compares the two.
    """
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def fused_attend(q, k, v):
    """attend(q, k, v) by torch's fused kernel, which never holds the positions x positions matrix.

    On a CPU the backward pass of that kernel loses to the plain formula where positions are few (3 times at 64, bf16).
    """
    if q.device.type == "cpu" and q.shape[2] <= 64:
        return attend(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(z, D):
    """Channels cut into equal pieces of D: (B, C, positions) -> (B, C / D, positions, D), as the fused kernels want it laid out."""
    return z.unflatten(1, (-1, D)).transpose(2, 3).contiguous()


class LinearAttention(nn.Module):
    """The report's "Linear Attention Layer" (§3.2): linear *projections*, softmax attention over H*W positions, heads of D.

    Not the linear-complexity attention of the literature: the formula the report prints is the quadratic one.
    """

    def __init__(self, channels, head_channels=64):
        super().__init__()
        self.D = head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x).flatten(2)).chunk(3, dim=1)  # 3 x (B, C, HW)
        q, k, v = (split_heads(z, self.D) for z in (q, k, v))  # 3 x (B, heads, HW, D)
        out = fused_attend(q, k, v).transpose(2, 3).flatten(1, 2)  # (B, C, HW)
        return x + self.out(out).view_as(x)


class CrossAttention(nn.Module):
    """Attention from the positions of x to tokens of the condition (§4: "cross-attention ... to intermediate levels").

    context  (B, C_ctx, h, w), the tokens on their own grid. Queries and keys also see where they are (position_code),
    so that a position can look for its own place in the X-ray.
    """

    def __init__(self, channels, context_channels, head_channels=64):
        super().__init__()
        self.D = head_channels
        self.norm = group_norm(channels)
        self.q = nn.Conv1d(channels + 24, channels, 1)
        self.k = nn.Conv1d(context_channels + 24, channels, 1, bias=False)  # a bias adds the same to all scores of a query
        self.v = nn.Conv1d(context_channels, channels, 1)
        self.out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, context):
        q = self.q(torch.cat([self.norm(x), position_code(x)], 1).flatten(2))  # (B, C, HW)
        k = self.k(torch.cat([context, position_code(context)], 1).flatten(2))  # (B, C, hw)
        v = self.v(context.flatten(2))
        q, k, v = (split_heads(z, self.D) for z in (q, k, v))
        out = fused_attend(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.out(out).view_as(x)


def position_code(x):
    """Where each pixel of x lies, whatever the grid: cos and sin of 6 octaves of row and column in [0, 1]. (B, 24, H, W)."""
    B, _, H, W = x.shape
    row = (torch.arange(H, device=x.device) + 0.5).div(H)[:, None].expand(H, W)
    column = (torch.arange(W, device=x.device) + 0.5).div(W).expand(H, W)
    angles = torch.stack([row, column])[:, None] * torch.pi * 2 ** torch.arange(6, device=x.device)[:, None, None]  # (2, 6, H, W)
    return torch.cat([angles.cos(), angles.sin()]).flatten(0, 1).to(x.dtype).expand(B, 24, H, W)


class Block(nn.Sequential):
    """One row of the encoder, middle or decoder: layers in order, each given what it takes besides the image."""

    def forward(self, h, emb, context):
        for layer in self:
            if isinstance(layer, ResidualBlock):
                h = layer(h, emb)
            elif isinstance(layer, CrossAttention):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


class UNet(nn.Module):
    """The U-Net of §3.2. The defaults are the report's; for 64x64 images they make 217.9 million parameters.

    in_channels, out_channels  of x_t (1; 16 or 17 with a condition, §4.2) and of the answer
    channels, channel_mult     C = channels * channel_mult[level] at each level; every level but the last halves the image
    blocks                     residual blocks a level in the encoder (the decoder has one more)
    attention_at               resolutions that have attention after each of these blocks
    head_channels              D, the width of an attention head; divides the channels wherever there is attention
    image_size                 H = W the resolutions are counted from; divisible by 2^(levels - 1)
    context_channels           channels of the condition's tokens for cross-attention, or 0: none
    """

    def __init__(
        self,
        in_channels=1,
        out_channels=1,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        blocks=2,
        attention_at=(32, 16, 8),
        head_channels=64,
        image_size=64,
        context_channels=0,
    ):
        super().__init__()
        widths = [channels * m for m in channel_mult]
        resolutions = [image_size >> level for level in range(len(widths))]
        check_sizes(channels, widths, resolutions, attention_at, head_channels, image_size)
        self.in_channels, self.channels, self.shrinks = in_channels, channels, 2 ** (len(widths) - 1)
        self.recompute = False  # True: blocks keep only their input for the backward pass and compute the rest again
        emb = 4 * channels

        def attention(C, resolution):
            if resolution not in attention_at:
                return []
            cross = [CrossAttention(C, context_channels, head_channels)] if context_channels else []
            return [LinearAttention(C, head_channels), *cross]

        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        C, skips = channels, [channels]  # skips: the channels of every output that the decoder will take
        self.encoder = nn.ModuleList()
        for level, (width, resolution) in enumerate(zip(widths, resolutions)):
            for _ in range(blocks):
                self.encoder.append(Block(ResidualBlock(C, width, emb), *attention(width, resolution)))
                C = width
                skips.append(C)
            if level < len(widths) - 1:
                self.encoder.append(Block(ResidualBlock(C, C, emb, "down")))
                skips.append(C)

        cross = [CrossAttention(C, context_channels, head_channels)] if context_channels else []
        self.middle = Block(ResidualBlock(C, C, emb), LinearAttention(C, head_channels), *cross, ResidualBlock(C, C, emb))

        self.decoder = nn.ModuleList()
        for level, (width, resolution) in reversed(list(enumerate(zip(widths, resolutions)))):
            for i in range(blocks + 1):
                layers = [ResidualBlock(C + skips.pop(), width, emb), *attention(width, resolution)]
                if level > 0 and i == blocks:
                    layers.append(ResidualBlock(width, width, emb, "up"))
                self.decoder.append(Block(*layers))
                C = width

        self.head = nn.Sequential(group_norm(C), nn.SiLU(), zero(nn.Conv2d(C, out_channels, 3, padding=1)))

    def forward(self, xt, t, context=None):
        """xt (B, in_channels, H, W), t (B,) int64 in 1..T -> (B, out_channels, H, W); H and W divisible by 2^(levels - 1)."""
        if xt.shape[1] != self.in_channels or xt.shape[2] % self.shrinks or xt.shape[3] % self.shrinks:
            rule = f"{self.in_channels} channels and sides divisible by {self.shrinks}"
            raise ValueError(f"this U-Net takes images of {rule}, got {tuple(xt.shape)}")
        emb = self.time(timestep_embedding(t, self.channels).to(xt.dtype))  # (B, 4 channels)
        h = self.stem(xt)
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if self.recompute else lambda block, *args: block(*args)
        skips = [h]
        for block in self.encoder:
            h = run(block, h, emb, context)
            skips.append(h)
        h = run(self.middle, h, emb, context)
        for block in self.decoder:
            h = run(block, torch.cat([h, skips.pop()], 1), emb, context)
        return self.head(h)


def check_sizes(channels, widths, resolutions, attention_at, head_channels, image_size):
    """Refuse a combination that cannot be built, in words."""
    if min(head_channels, image_size) < 1:
        raise ValueError(f"head_channels and image_size must be at least 1, got {head_channels} and {image_size}")
    if channels < 2 or channels % 2:
        raise ValueError(f"channels must be even (cos and sin of the time embedding) and at least 2, got {channels}")
    if image_size % 2 ** (len(widths) - 1):
        raise ValueError(f"image_size must be divisible by {2 ** (len(widths) - 1)} for {len(widths)} levels, got {image_size}")
    for resolution in attention_at:
        if resolution not in resolutions:
            raise ValueError(f"attention_at must be among the resolutions {resolutions}, got {resolution}")
    attended = {width for width, resolution in zip(widths, resolutions) if resolution in attention_at} | {widths[-1]}
    for width in sorted(attended):
        if width % head_channels:
            raise ValueError(f"head_channels must divide the {width} channels that have attention, got {head_channels}")


CONDITIONINGS = ("add", "lift", "concat", "none", "cross")


class ConditionalUNet(nn.Module):
    """eps_theta(x_t, y, t) of §4.2: the U-Net, and how the X-ray y enters it.

    cond          U-Net sees                            input channels
    "add"         x_t + RRDB(y), x_t on every channel   16
    "lift"        conv(x_t) + RRDB(y), as SegDiff [1]   16
    "concat"      [x_t, RRDB(y)]                        17
    "none"        [x_t, y], no embedder                 2
    "cross"       x_t, and RRDB(y) by cross-attention   1
    None          x_t alone: unconditional, §3          1

    features, growth, rrdbs, segdiff  of the embedder (rrdb.py); the rest as UNet
    from_add  with "concat": the first convolution begins as that of a fresh "add", which it contains: x_t's kernel is the sum
              of the kernels of its 16 channels. Otherwise each channel's kernel is drawn alike, x_t's as small as one of RRDB(y)'s
    """

    def __init__(self, cond, features=16, growth=32, rrdbs=1, segdiff=False, from_add=False, image_size=64, **unet):
        super().__init__()
        in_channels = {None: 1, "add": features, "lift": features, "concat": 1 + features, "none": 2, "cross": 1}
        if cond not in in_channels:
            raise ValueError(f"cond must be one of {CONDITIONINGS} or None, got {cond!r}")
        self.cond = cond
        self.patch = next(p for p in range(max(1, image_size // 16), 0, -1) if image_size % p == 0)  # cross: a token a patch
        context_channels = features * self.patch**2 if cond == "cross" else 0
        self.embedder = None if cond in (None, "none") else ConditionEmbedder(1, features, growth, rrdbs, segdiff)
        self.unet = UNet(in_channels[cond], 1, image_size=image_size, context_channels=context_channels, **unet)
        self.lift = nn.Conv2d(1, features, 3, padding=1) if cond == "lift" else None
        if from_add:
            kernels = nn.Conv2d(features, self.unet.channels, 3).weight.detach()  # as torch draws them for 16 channels
            self.unet.stem.weight.data = torch.cat([kernels.sum(1, keepdim=True), kernels], 1)

    def embed(self, y):
        """What the U-Net needs of the X-ray, once for all steps: RRDB(y), y itself, or nothing."""
        return y if self.embedder is None else self.embedder(y)

    def denoise(self, xt, t, e):
        """One pass of the U-Net at x_t, given e = embed(y)."""
        if self.cond is None:
            return self.unet(xt, t)
        if self.cond == "add":
            return self.unet(xt + e, t)  # (B, 1, H, W) + (B, 16, H, W)
        if self.cond == "lift":
            return self.unet(self.lift(xt) + e, t)
        if self.cond == "cross":
            return self.unet(xt, t, F.pixel_unshuffle(e, self.patch))
        return self.unet(torch.cat([xt, e], 1), t)

    def forward(self, xt, t, y=None):
        """xt (B, 1, H, W), t (B,) int64, y (B, 1, H, W) in [-1, 1] or None -> (B, 1, H, W).

        y may hold B / K X-rays, each of which serves K masks in a row; it is embedded once for them.
        """
        e = self.embed(y)
        return self.denoise(xt, t, e if e is None else e.repeat_interleave(len(xt) // len(e), 0))
