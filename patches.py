r"""X-rays larger than 64x64: the networks run on 64x64 patches of p x p pixels each.

    (B, 1, 64 p, 64 p)  <->  (B, p^2, 64, 64)      to_patches, to_pixels: nothing is lost or added

The report chose 64x64 for want of memory. A network that sees the p^2 pixels of a patch as channels
answers 256x256 at nearly the price of 64x64: its first and last convolutions alone become wider.
At p = 1 nothing here is used.
"""

import functools

from torch import nn
from torch.nn import functional as F

from conditional import ConditionalUNet

POSITIONS = 64  # a side, of the report's images


def patch_of(image_size):
    """p, the side of a patch in pixels; 1 up to 64x64. ValueError: 64 does not divide the size."""
    if image_size <= POSITIONS:
        return 1
    if image_size % POSITIONS:
        near = POSITIONS * round(image_size / POSITIONS)
        rule = f"image_size above {POSITIONS} must be a multiple of {POSITIONS}, such as {near}"
        raise ValueError(f"{rule}, got {image_size}")
    return image_size // POSITIONS


def positions_of(image_size):
    """The side of what the U-Net works on: 64, or that of a smaller image."""
    return image_size // patch_of(image_size)


def to_patches(x, p):
    """(B, 1, p H, p W) -> (B, p^2, H, W): pixel (i, j) of each patch is channel p i + j."""
    return F.pixel_unshuffle(x, p)


def to_pixels(x, p):
    """(B, n p^2, H, W) -> (B, n, p H, p W), image by image the inverse of to_patches."""
    return F.pixel_shuffle(x, p)


class PatchUNet(ConditionalUNet):
    """eps_theta(x_t, y, t) of §4.2 on patches: x_t, y and each answer are (B, 1, p S, p S).

    features  channels of RRDB(y): the first multiple of p^2 that is 16 or more. Addition adds pixel
              k of each patch of x_t to every p^2-th of them, from the k-th on
    The rest as ConditionalUNet; image_size p S counts pixels.
    """

    def __init__(self, cond, p, image_size, y_channels=1, **settings):
        features = p**2 * -(-16 // p**2)
        size = dict(image_size=image_size // p, image_channels=p**2, features=features)
        size |= dict(y_channels=p**2 * y_channels)
        super().__init__(cond, **size, **settings)
        self.p, self.copies = p, features // p**2 if cond == "add" else 1

    def embed_image(self, y):
        return super().embed_image(to_patches(y, self.p))

    def denoise(self, xt, t, e):
        xt = to_patches(xt, self.p).repeat(1, self.copies, 1, 1)
        return to_pixels(super().denoise(xt, t, e), self.p)


class PatchedUNet(nn.Module):
    """A supervised network on patches: X-rays (B, 1, p H, p W) -> logits like them.

    net  (B, p^2, H, W) -> (B, p^2, H, W)
    """

    def __init__(self, net, p):
        super().__init__()
        self.net, self.p = net, p

    def forward(self, y):
        return to_pixels(self.net(to_patches(y, self.p)), self.p)


def conditional_unet(cond, image_size, **settings):
    """The network of §4.2 for images of this size, on patches above 64x64."""
    p = patch_of(image_size)
    kind = ConditionalUNet if p == 1 else functools.partial(PatchUNet, p=p)
    return kind(cond, image_size=image_size, **settings)


def supervised_unet(kind, channels, image_size):
    """A network of baselines.U_NETS for X-rays of this size, on patches above 64x64."""
    p = patch_of(image_size)
    return kind(channels) if p == 1 else PatchedUNet(kind(channels, p**2), p)
