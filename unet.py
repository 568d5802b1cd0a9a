r"""The noise-predicting U-Net of §3.2. conditional.py joins an X-ray to it (§4.2).

report                   here                 shape
x_t                      xt                   (B, C_in, H, W)
t                        t                    (B,) int64, 1..T
positional embedding     timestep_embedding   (B, channels)
  after linear layers    emb                  (B, 4 channels)
Residual Block           ResidualBlock        (B, C, H, W), emb -> (B, C', H', W')
Linear Attention Layer   LinearAttention      (B, C, H, W) -> (B, C, H, W)
eps_theta(x_t, t)        UNet                 (B, C_in, H, W), t -> (B, C_out, H, W)

The report's prose simplifies the network of [14] and [6]. This file has that network to the last
parameter (217,859,905 at one input channel): the last level does not downsample, the decoder has
one block a level more than the encoder, and each decoder block takes one skip.
"""

import contextlib
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim):
    r"""Sinusoidal embedding of t (§3.2), (B,) -> (B, dim):

    [cos, sin] of t exp(-ln(10000) i / (dim/2)),   i = 0..dim/2 - 1
    """
    i, half = torch.arange(dim // 2, device=t.device), dim // 2
    frequencies = torch.exp(-math.log(10_000) * i / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm: 16-bit activations stay in 16 bits, and are summed in float32.

    CUDA's autocast would widen them to float32, and with them all that follows up to the next
    convolution. Its kernel takes weights of the activations' own type alone. On a CPU autocast
    leaves GroupNorm as it is; there torch's kernel is 4 to 8 times slower for small images (below
    `contiguous_below` pixels) in the channels-last layout, so they are laid out anew.
    """

    contiguous_below = 1024

    def forward(self, x):
        small = x.shape[2:].numel() < self.contiguous_below
        x = x.contiguous() if small else x
        if not x.is_cuda:
            return super().forward(x)
        with without_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def without_autocast(x):
    """A context in which the operations on x keep its dtype; torch has none on its meta device."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def group_norm(channels):
    """GroupNorm of 32 groups; in a small network fewer, of at least 4 channels.

    A group of one channel would subtract that channel's mean, and with it the time embedding, which
    is constant over the image.
    """
    groups = min(32, max(1, channels // 4))
    return GroupNorm(math.gcd(groups, channels), channels, eps=1e-5)


def zero(layer):
    """Sets all parameters of the layer to 0. So a fresh block changes nothing, and a fresh network
    answers 0.
    """
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResidualBlock(nn.Module):
    """§3.2: norm, SiLU, [resample], convolution, + time embedding, norm, SiLU, convolution.

    To the result the block adds its own input, resampled likewise.

    resample  None; "down": average pooling by 2; "up": nearest interpolation by 2

    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, c_in, c_out, c_emb, resample=None):
        super().__init__()
        self.resample = nn.Identity()
        if resample == "down":
            self.resample = nn.AvgPool2d(2)
        if resample == "up":
            self.resample = nn.Upsample(scale_factor=2, mode="nearest")
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
    """softmax(Q K^T / sqrt(D)) V of §3.2, for (B, heads, positions, D). Quadratic in positions.

    The network computes it by fast_attend. A test compares the two.
    """
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def fast_attend(q, k, v):
    """attend(q, k, v) by torch's fused kernel, which never holds the positions x positions matrix.

    On a CPU the plain formula is faster where positions are few: three times at 64 positions, in
    the backward pass in bf16.
    """
    if q.device.type == "cpu" and q.shape[2] <= 64:
        return attend(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(z, D):
    """Cuts the channels into heads of D: (B, C, positions) -> (B, C / D, positions, D).

    The result is contiguous, the layout that the fused kernels want.
    """
    return z.unflatten(1, (-1, D)).transpose(2, 3).contiguous()


class LinearAttention(nn.Module):
    """The report's "Linear Attention Layer" (§3.2): softmax attention over H*W positions.

    The heads have D channels each. Only the *projections* are linear. This is not the attention of
    linear complexity in the literature: the report's formula is quadratic in the positions.
    """

    def __init__(self, channels, head_channels=64):
        super().__init__()
        self.D, self.attend = head_channels, fast_attend
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x).flatten(2)).chunk(3, dim=1)  # 3 x (B, C, HW)
        q, k, v = (split_heads(z, self.D) for z in (q, k, v))  # 3 x (B, heads, HW, D)
        out = self.attend(q, k, v).transpose(2, 3).flatten(1, 2)  # (B, C, HW)
        return x + self.out(out).view_as(x)


class CrossAttention(nn.Module):
    """Attention from the positions of x to tokens of the condition: the cross-attention of §4.

    context  (B, C_ctx, h, w), the tokens on their own grid

    Queries and keys also see where they are (position_code), so that a position can look for its
    own place in the X-ray.
    """

    def __init__(self, channels, context_channels, head_channels=64):
        super().__init__()
        self.D, self.attend = head_channels, fast_attend
        self.norm = group_norm(channels)
        self.q = nn.Conv1d(channels + 24, channels, 1)
        # No bias for the keys: it would add the same to all scores of a query
        self.k = nn.Conv1d(context_channels + 24, channels, 1, bias=False)
        self.v = nn.Conv1d(context_channels, channels, 1)
        self.out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, context):
        q = self.q(torch.cat([self.norm(x), position_code(x)], 1).flatten(2))  # (B, C, HW)
        k = self.k(torch.cat([context, position_code(context)], 1).flatten(2))  # (B, C, hw)
        v = self.v(context.flatten(2))
        q, k, v = (split_heads(z, self.D) for z in (q, k, v))
        out = self.attend(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.out(out).view_as(x)


class AddLevel(nn.Module):
    """Adds the map of one level of the condition to x of the same size, as [22] and [23] join them.

    context  a map for each level of the U-Net, (B, C_level, H / 2^level, W / 2^level)
    """

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x, context):
        return x + context[self.level]


def position_code(x):
    """Where each pixel of x lies, on a grid of any size: (B, 24, H, W).

    cos and sin of 6 octaves of the row and of the column, which run from 0 to 1.
    """
    B, _, H, W = x.shape
    row = (torch.arange(H, device=x.device) + 0.5).div(H)[:, None].expand(H, W)
    column = (torch.arange(W, device=x.device) + 0.5).div(W).expand(H, W)
    octaves = 2 ** torch.arange(6, device=x.device)[:, None, None]
    angles = torch.stack([row, column])[:, None] * torch.pi * octaves  # (2, 6, H, W)
    code = torch.cat([angles.cos(), angles.sin()]).flatten(0, 1)
    return code.to(x.dtype).expand(B, 24, H, W)


class Block(nn.Sequential):
    """One row of the encoder, middle or decoder: layers in order, each given what it needs.

    recompute  True: keep only the block's input for the backward pass, and compute the rest again
               (recompute_blocks)
    """

    recompute = False

    def forward(self, h, emb, context):
        if self.recompute:
            options = dict(use_reentrant=False, preserve_rng_state=False)  # no layer is random
            return checkpoint(self.layers, h, emb, context, **options)
        return self.layers(h, emb, context)

    def layers(self, h, emb, context):
        for layer in self:
            if isinstance(layer, ResidualBlock):
                h = layer(h, emb)
            elif isinstance(layer, (CrossAttention, AddLevel)):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


def recompute_blocks(model, recompute):
    """Turns recomputation on or off in every Block of a model. Returns False if it has no Block."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute = recompute
    return bool(blocks)


class Head(nn.Sequential):
    """The last row of §3.2's table: norm, SiLU, convolution. The convolution is in float32.

    Under bf16 autocast its rounding of eps alone would move x_0_hat by 0.26 at t = 1000, where Eq.
    (2) solved for x_0 divides by sqrt(abar_1000) = 0.0064.
    """

    def forward(self, h):
        norm, silu, convolution = self
        h = silu(norm(h))
        with without_autocast(h):
            return convolution(h.to(convolution.weight.dtype))


class UNet(nn.Module):
    """The U-Net of §3.2. The defaults are the report's: 217.9 million parameters.

    in_channels       channels of x_t: 1; 16 or 17 with a condition, §4.2
    out_channels      channels of the answer
    channels          of the first level
    channel_mult      C = channels * channel_mult[level]; every level but the last halves the image
    blocks            residual blocks a level in the encoder (the decoder has one more)
    attention_at      resolutions that have attention after each of these blocks
    head_channels     D, the width of an attention head; divides C wherever there is attention
    image_size        H = W the resolutions are counted from; divisible by 2^(levels - 1)
    context_channels  channels of the condition's tokens for cross-attention, or 0: none
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
        self.in_channels, self.channels, self.emb_channels = in_channels, channels, 4 * channels
        self.widths, self.blocks, self.shrinks = widths, blocks, 2 ** (len(widths) - 1)
        emb = self.emb_channels

        def cross_attention(C):
            return [CrossAttention(C, context_channels, head_channels)] if context_channels else []

        def attention(C, resolution):
            if resolution not in attention_at:
                return []
            cross = cross_attention(C)  # drawn first: the order decides which weights a seed gives
            return [LinearAttention(C, head_channels), *cross]

        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        C, skips = channels, [channels]  # skips: channels of each output that the decoder will take
        self.encoder = nn.ModuleList()
        for level, (width, resolution) in enumerate(zip(widths, resolutions)):
            for _ in range(blocks):
                residual = ResidualBlock(C, width, emb)
                self.encoder.append(Block(residual, *attention(width, resolution)))
                C = width
                skips.append(C)
            if level < len(widths) - 1:
                self.encoder.append(Block(ResidualBlock(C, C, emb, "down")))
                skips.append(C)

        cross = cross_attention(C)  # drawn first here, too
        layers = [ResidualBlock(C, C, emb), LinearAttention(C, head_channels), *cross]
        self.middle = Block(*layers, ResidualBlock(C, C, emb))

        self.decoder = nn.ModuleList()
        for level, (width, resolution) in reversed(list(enumerate(zip(widths, resolutions)))):
            for i in range(blocks + 1):
                layers = [ResidualBlock(C + skips.pop(), width, emb), *attention(width, resolution)]
                if level > 0 and i == blocks:
                    layers.append(ResidualBlock(width, width, emb, "up"))
                self.decoder.append(Block(*layers))
                C = width

        answer = zero(nn.Conv2d(C, out_channels, 3, padding=1))
        self.head = Head(group_norm(C), nn.SiLU(), answer)

    def forward(self, xt, t, context=None, of_class=None):
        """xt (B, in_channels, H, W), t (B,) int64 in 1..T -> (B, out_channels, H, W).

        H and W are divisible by 2^(levels - 1). of_class (B, 4 channels) is added to the time
        embedding.
        """
        _, C, H, W = xt.shape
        if C != self.in_channels or H % self.shrinks or W % self.shrinks:
            rule = f"{self.in_channels} channels and sides divisible by {self.shrinks}"
            raise ValueError(f"this U-Net takes images of {rule}, got {tuple(xt.shape)}")
        emb = self.time(timestep_embedding(t, self.channels).to(xt.dtype))  # (B, 4 channels)
        if of_class is not None:
            emb = emb + of_class.to(emb.dtype)
        h = self.stem(xt)
        skips = [h]
        for block in self.encoder:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle(h, emb, context)
        for block in self.decoder:
            h = block(torch.cat([h, skips.pop()], 1), emb, context)
        return self.head(h)


def check_sizes(channels, widths, resolutions, attention_at, head_channels, image_size):
    """Raises ValueError for sizes that no U-Net can have."""
    if min(head_channels, image_size) < 1:
        both = f"{head_channels} and {image_size}"
        raise ValueError(f"head_channels and image_size must be at least 1, got {both}")
    if channels < 2 or channels % 2:
        need = "even (cos and sin of the time embedding) and at least 2"
        raise ValueError(f"channels must be {need}, got {channels}")
    shrinks = 2 ** (len(widths) - 1)
    if image_size % shrinks:
        rule = f"divisible by {shrinks} for {len(widths)} levels"
        raise ValueError(f"image_size must be {rule}, got {image_size}")
    for resolution in attention_at:
        if resolution not in resolutions:
            choices = f"among the resolutions {resolutions}"
            raise ValueError(f"attention_at must be {choices}, got {resolution}")
    attended = {width for width, size in zip(widths, resolutions) if size in attention_at}
    for width in sorted(attended | {widths[-1]}):  # the middle always has attention
        if width % head_channels:
            rule = f"divide the {width} channels that have attention"
            raise ValueError(f"head_channels must {rule}, got {head_channels}")
