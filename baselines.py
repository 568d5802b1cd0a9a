r"""The supervised U-Nets that the report compares with (§4.4, §4.5): X-ray in, mask out, one pass.

unet           UNet2015       the U-Net of Ronneberger et al. [15]
res50attunet   Res50AttUNet   a ResNet-50 (He et al., arXiv 1512.03385) as encoder, attention gates
                              (Oktay et al., arXiv 1804.03999) on the skips
report-unet    OnePass        the network of §3.2 and §4.2 without diffusion: the same weights to
                              learn, x_t = 0 and t = T at every call

Each takes X-rays y, (B, 1, H, W) in [-1, 1], and answers logits (B, 1, H, W), whose sigmoid is the
probability that a pixel is inside the mask. All start from random weights.

What differs from the papers: convolutions are padded, so that the mask has the X-ray's size.
GroupNorm stands where [15] has no norm and ResNet has BatchNorm: with GroupNorm neither gradient
nor answer depends on how a batch is divided. There is one logit instead of two, and no dropout.
"""

import torch
from torch import nn
from torch.nn import functional as F

from unet import group_norm


def l_supervised(logits, x0):
    """Cross-entropy of each pixel, mean over pixels: the loss of [15] without its weights.

    logits (B, 1, H, W) of any precision; x0: masks like them in [-1, 1]. Returns a number.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), (x0 + 1) / 2)


def convolution(c_in, c_out, side=3, stride=1):
    """Padded convolution and norm; weights drawn as [15] says, N(0, 2 / inputs of an output)."""
    conv = nn.Conv2d(c_in, c_out, side, stride, padding=side // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, group_norm(c_out))


def two_convolutions(c_in, c_out):
    """The block of [15]: twice a 3x3 convolution and ReLU."""
    return nn.Sequential(convolution(c_in, c_out), nn.ReLU(), convolution(c_out, c_out), nn.ReLU())


class UNet2015(nn.Module):
    """The U-Net of [15], Figure 1: five levels of two convolutions.

    Max pooling leads down, a 2x2 up-convolution leads up.

    channels        of the first level, 64 in [15]; they double at each
    image_channels  of y and the logits: 1 but in patches.py
    y               sides divisible by 16
    """

    shrinks = 16  # how many times smaller the lowest level is

    def __init__(self, channels=64, image_channels=1):
        super().__init__()
        widths = [channels * m for m in (1, 2, 4, 8, 16)]
        self.down = nn.ModuleList(
            [two_convolutions(a, b) for a, b in zip([image_channels, *widths], widths)]
        )
        self.up = nn.ModuleList([nn.ConvTranspose2d(w, w // 2, 2, stride=2) for w in widths[:0:-1]])
        self.merge = nn.ModuleList([two_convolutions(w, w // 2) for w in widths[:0:-1]])
        self.head = nn.Conv2d(channels, image_channels, 1)

    def forward(self, y):
        skips = [self.down[0](y)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        h = skips.pop()
        for up, merge in zip(self.up, self.merge):
            h = merge(torch.cat([skips.pop(), up(h)], 1))
        return self.head(h)


class Bottleneck(nn.Module):
    """A block of ResNet-50: 1x1, 3x3 and 1x1 convolutions, + the input.

    The input passes a 1x1 convolution where its size changes.
    """

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.inner = nn.Sequential(
            convolution(c_in, c, 1),
            nn.ReLU(),
            convolution(c, c, 3, stride),
            nn.ReLU(),
            convolution(c, 4 * c, 1),
        )
        nn.init.zeros_(self.inner[-1][1].weight)  # a fresh block is its shortcut alone
        same_size = (c_in, stride) == (4 * c, 1)
        self.shortcut = nn.Identity() if same_size else convolution(c_in, 4 * c, 1, stride)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.inner(x))


class AttentionGate(nn.Module):
    """What the decoder lets through of a skip, by one factor a pixel.

        skip * sigmoid(psi(ReLU(W_x skip + W_g gate)))

    skip  (B, C, H, W)
    gate  (B, C_g, H, W): what the decoder knows so far, enlarged to the skip's size
    """

    def __init__(self, c_skip, c_gate):
        super().__init__()
        c = max(1, c_skip // 2)
        self.W_x = nn.Conv2d(c_skip, c, 1, bias=False)
        self.W_g = nn.Conv2d(c_gate, c, 1)
        self.psi = nn.Conv2d(c, 1, 1)

    def forward(self, skip, gate):
        return skip * self.psi(F.relu(self.W_x(skip) + self.W_g(gate))).sigmoid()


class Res50AttUNet(nn.Module):
    """ResNet-50 as the encoder of a U-Net: skips at 1/2 to 1/16 of the side, the bottom at 1/32.

    Each skip passes an attention gate.

    channels        of the stem, 64 in ResNet-50
    image_channels  of y and the logits: 1 but in patches.py
    y               sides divisible by 32
    """

    shrinks = 32

    def __init__(self, channels=64, image_channels=1):
        super().__init__()
        self.stem = nn.Sequential(convolution(image_channels, channels, 7, stride=2), nn.ReLU())
        self.stages, skips = nn.ModuleList(), [channels]
        for i, blocks in enumerate((3, 4, 6, 3)):
            c = channels * 2**i
            first = Bottleneck(skips[-1], c, stride=2 if i else 1)
            others = [Bottleneck(4 * c, c) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *others))
            skips.append(4 * c)
        C = skips.pop()
        self.up, self.gates, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c_skip, c in zip(reversed(skips), (8 * channels, 4 * channels, 2 * channels, channels)):
            self.up.append(nn.ConvTranspose2d(C, c, 2, stride=2))
            self.gates.append(AttentionGate(c_skip, c))
            self.merge.append(two_convolutions(c_skip + c, c))
            C = c
        enlarge = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.head = nn.Sequential(enlarge, two_convolutions(C, C), nn.Conv2d(C, image_channels, 1))

    def forward(self, y):
        skips = [self.stem(y)]
        h = F.max_pool2d(skips[0], 3, stride=2, padding=1)
        for stage in self.stages:
            h = stage(h)
            skips.append(h)
        h = skips.pop()
        for up, gate, merge in zip(self.up, self.gates, self.merge):
            h = up(h)
            h = merge(torch.cat([gate(skips.pop(), h), h], 1))
        return self.head(h)


class OnePass(nn.Module):
    """The report's network as a supervised one: it never sees a noisy mask, x_t is 0 and t is T.

    net  a conditional.ConditionalUNet
    """

    def __init__(self, net, T):
        super().__init__()
        self.net, self.T = net, T

    def forward(self, y):
        return self.net(torch.zeros_like(y), torch.full((len(y),), self.T, device=y.device), y)


U_NETS = {"unet": UNet2015, "res50attunet": Res50AttUNet}
