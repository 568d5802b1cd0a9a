"""train.py or compare.py with MONAI's DynUNet, the network of nnU-Net, as one more --model.

pip install monai
python results/models/monai_dynunet.py train --task lung --model monai-dynunet --steps 1400
python results/models/monai_dynunet.py compare dice RUN RUN
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from monai.networks.nets import DynUNet

import baselines


class MonaiDynUNet(torch.nn.Module):
    """X-rays (B, 1, H, W) -> logits like them. channels: of the first of its five levels."""

    shrinks = 16

    def __init__(self, channels=32):
        super().__init__()
        widths = [channels * m for m in (1, 2, 4, 8, 10)]
        self.net = DynUNet(2, 1, 1, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=widths)

    def forward(self, y):
        return self.net(y)


baselines.U_NETS["monai-dynunet"] = MonaiDynUNet  # before config reads their names
if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    sys.exit(importlib.import_module(script).main(arguments))
