"""weights/: small files that are named, come from no machine, and are what their README says."""

import re
from pathlib import Path

import pytest
import torch

import runs

ROOT = Path(__file__).resolve().parent
FILES = sorted(ROOT.glob("weights/*.pt"))
README = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_is_small_named_and_ready_to_sample(file):
    """At most 5 MB; its averaged weights alone, float32 once read; no path of a machine."""
    assert file.stat().st_size <= 5e6 and file.name in README
    state = torch.load(file, weights_only=True)
    assert state.keys() == {"config", "step", "ema"}
    assert not re.search(r"/(work|root|home|tmp)/", str(state["config"]))
    model, cfg, step = runs.load_run(file)
    assert step == cfg.steps and {p.dtype for p in model.parameters()} == {torch.float32}
