r"""The condition embedder of §4.2, a Residual in Residual Dense Block: 64x64x1 -> 64x64x16.

report            here                 shape
y (the X-ray)     y                    (B, 1, H, W) in [-1, 1]
RDB, RRDB         RDB, RRDB            (B, F, H, W) -> (B, F, H, W), F features
embedding         ConditionEmbedder    (B, 1, H, W) -> (B, 16, H, W)

The report gives the blocks in words and no widths. F = 16 is its output; the growth (channels that
each inner convolution adds) is the 32 of SegDiff [1].
"""

import torch
from torch import nn
from torch.nn import functional as F


class RDB(nn.Module):
    """Residual Dense Block: 5 convolutions, a LeakyReLU after each; + input.

    Each convolution is fed with the input and all outputs before it.

    features  channels of the input and of the output
    growth    channels of each of the first four convolutions
    segdiff   as in [1]: no activation after the fifth convolution, and 0.2 times what it answers
    """

    def __init__(self, features=16, growth=32, segdiff=False):
        super().__init__()
        self.segdiff = segdiff
        self.convs = nn.ModuleList()
        for i, width in enumerate([growth] * 4 + [features]):
            self.convs.append(nn.Conv2d(features + i * growth, width, 3, padding=1))

    def forward(self, x):
        outputs = [x]
        for conv in self.convs[:-1]:
            outputs.append(F.leaky_relu(conv(torch.cat(outputs, 1)), 0.2))  # (B, growth, H, W)
        last = self.convs[-1](torch.cat(outputs, 1))  # (B, features, H, W)
        return x + (0.2 * last if self.segdiff else F.leaky_relu(last, 0.2))


class RRDB(nn.Module):
    """Residual in Residual Dense Block: three RDBs in a row, + input.

    segdiff  as in [1]: 0.2 times what they answer
    """

    def __init__(self, features=16, growth=32, segdiff=False):
        super().__init__()
        self.scale = 0.2 if segdiff else 1.0
        self.rdbs = nn.Sequential(*[RDB(features, growth, segdiff) for _ in range(3)])

    def forward(self, x):
        return x + self.scale * self.rdbs(x)


class ConditionEmbedder(nn.Module):
    """The X-ray as the U-Net takes it in, §4.2: one convolution to 16 channels, then RRDBs.

    channels  of the X-ray
    features  channels of the embedding
    growth    inside an RDB
    blocks    number of RRDBs; the report has one
    segdiff   with the scaling of [1]
    """

    def __init__(self, channels=1, features=16, growth=32, blocks=1, segdiff=False):
        super().__init__()
        self.lift = nn.Conv2d(channels, features, 3, padding=1)
        self.blocks = nn.Sequential(*[RRDB(features, growth, segdiff) for _ in range(blocks)])

    def forward(self, y):
        return self.blocks(self.lift(y))  # (B, 1, H, W) -> (B, features, H, W)
