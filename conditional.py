r"""How the condition y enters the U-Net (§4.2): at the input, at every level, by cross-attention.

report                   here               shape
y                        y                  (B, 1, H, W) in [-1, 1], the X-ray of a mask
RRDB(y)                  e = embed(y)       (B, features, H, W), once for all steps
                                            "levels": a list, a map for each level; "none": y
eps_theta(x_t, y, t)     ConditionalUNet    x_t, t, y -> (B, 1, H, W)

Where an X-ray is drawn from its class and masks, y is conditions.Given: the masks enter like the
X-ray of a mask, and the class is added to the time embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F

from conditions import Given
from rrdb import ConditionEmbedder
from unet import AddLevel, UNet

CONDITIONINGS = ("add", "lift", "concat", "levels", "none", "cross")


class ConditionalUNet(nn.Module):
    """eps_theta(x_t, y, t) of §4.2: the U-Net, and how the X-ray y enters it.

    cond          U-Net sees                            input channels
    "add"         x_t + RRDB(y), x_t on every channel   16
    "lift"        conv(x_t) + RRDB(y), as SegDiff [1]   16
    "concat"      [x_t, RRDB(y)]                        17
    "levels"      x_t, and at each level an encoding    1
                  of RRDB(y), as MedSegDiff [22, 23]
    "none"        [x_t, y], no embedder                 2
    "cross"       x_t, and RRDB(y) by cross-attention   1
    None          x_t alone: unconditional, §3          1

    features, growth, rrdbs, segdiff  of the embedder (rrdb.py); the rest as UNet
    image_channels                    C of x_t and of the answer: 1, but in patches.py
    y_channels                        of y; None: C
    classes                           that may be given (conditions.py); 0: none
    answers                           2: the target, then v of a learned variance (improved.py)
    """

    def __init__(
        self,
        cond,
        features=16,
        growth=32,
        rrdbs=1,
        segdiff=False,
        image_size=64,
        image_channels=1,
        y_channels=None,
        classes=0,
        answers=1,
        **unet,
    ):
        super().__init__()
        if cond not in (*CONDITIONINGS, None):
            raise ValueError(f"cond must be one of {CONDITIONINGS} or None, got {cond!r}")
        self.cond, self.patch, C = cond, patch_side(image_size), image_channels
        C_y = C if y_channels is None else y_channels
        self.embedder = None
        if cond not in ("none", None):
            self.embedder = ConditionEmbedder(C_y, features, growth, rrdbs, segdiff)
        of_cond = dict(add=features, lift=features, concat=C + features, none=C + C_y)
        in_channels = of_cond.get(cond, C)  # x_t alone by cross-attention, or without a condition
        tokens = features * self.patch**2 if cond == "cross" else 0
        size = dict(image_size=image_size, context_channels=tokens)
        self.unet = UNet(in_channels, answers * C, **size, **unet)
        self.lift = nn.Conv2d(C, features, 3, padding=1) if cond == "lift" else None
        self.encoder = None
        if cond == "levels":
            self.encoder = LevelEncoder(features, self.unet.widths)
            join_levels(self.unet)
        self.of_class = nn.Embedding(1 + classes, self.unet.emb_channels) if classes else None

    def embed(self, y):
        """What the U-Net needs of y, once for all steps: RRDB(y), its levels, y itself, or None."""
        if isinstance(y, Given):
            of_class = None if y.label is None else self.of_class(y.label)  # (B, 4 channels)
            return Given(None if y.masks is None else self.embed_image(y.masks), of_class)
        return None if y is None else self.embed_image(y)

    def embed_image(self, y):
        e = y if self.embedder is None else self.embedder(y)
        return e if self.encoder is None else self.encoder(e)

    def denoise(self, xt, t, e):
        """One pass of the U-Net at x_t, given e = embed(y)."""
        e, of_class = e if isinstance(e, Given) else (e, None)
        xt, context = self.joined(xt, e)
        return self.unet(xt, t, context, of_class)

    def joined(self, xt, e):
        """(what the U-Net takes in, the context of its blocks), by the table above."""
        if self.cond is None:
            return xt, None
        if self.cond == "add":
            return xt + e, None  # (B, 1, H, W) + (B, 16, H, W)
        if self.cond == "lift":
            return self.lift(xt) + e, None
        if self.cond == "levels":
            return xt, e
        if self.cond == "cross":
            return xt, F.pixel_unshuffle(e, self.patch)
        return torch.cat([xt, e], 1), None

    def forward(self, xt, t, y=None):
        """xt (B, 1, H, W), t (B,) int64 -> (B, 1, H, W).

        y: (B, 1, H, W) in [-1, 1], or conditions.Given, or None
        """
        return self.denoise(xt, t, self.embed(y))


class LevelEncoder(nn.Module):
    """RRDB(y) at every level of a U-Net of these widths, for join_levels: "levels".

    (B, features, H, W) -> a list of (B, C_level, H / 2^level, W / 2^level)
    """

    def __init__(self, features, widths):
        super().__init__()
        first = nn.Conv2d(features, widths[0], 3, padding=1)
        further = [halving(a, b) for a, b in zip(widths, widths[1:])]
        self.levels = nn.ModuleList([first, *further])

    def forward(self, e):
        maps = [e]
        for level in self.levels:
            maps.append(level(maps[-1]))
        return maps[1:]


def halving(c_in, c_out):
    """Two convolutions, the first of which halves the image."""
    half = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    return nn.Sequential(nn.SiLU(), half, nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))


def join_levels(unet):
    """Lets a U-Net add the map of its level after the first residual block of each level."""
    for level in range(len(unet.widths)):
        unet.encoder[level * (unet.blocks + 1)].insert(1, AddLevel(level))


def repeated(e, n):
    """e = embed(y) of n samples for each image of y, one after the other."""
    if isinstance(e, list):
        return [level.repeat_interleave(n, 0) for level in e]
    return e.repeat_interleave(n, 0)


def patch_side(image_size):
    """Side, in pixels, of the patches of the X-ray that "cross" makes tokens of.

    It divides the image's side, and is at most a sixteenth of it (or 1).
    """
    return max(s for s in range(1, max(2, image_size // 16 + 1)) if image_size % s == 0)


def begin_as_addition(model):
    """Makes the first convolution of a fresh "concat" network that of a fresh "add" network.

    Concatenation contains addition as a special case: the kernel of x_t is the sum of the kernels
    of the embedding's channels. Without this, x_t's kernel is as small as one channel's of RRDB(y).
    """
    stem, features = model.unet.stem, model.embedder.lift.out_channels
    kernels = nn.Conv2d(features, stem.out_channels, 3).weight.detach()  # as "add" draws them
    of_xt = kernels.unflatten(1, (-1, stem.in_channels - features)).sum(1)
    stem.weight.data = torch.cat([of_xt, kernels], 1)
