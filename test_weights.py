"""weights/: small files that are named, come from no machine, and are what their README says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import runs
from testing import chests

ROOT = Path(__file__).resolve().parent
JUDGES = [ROOT / "weights" / name for name in ("features.pt", "judge.pt")]
FILES = sorted(set(ROOT.glob("weights/*.pt")) - set(JUDGES))
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


@pytest.mark.parametrize("file", JUDGES, ids=lambda file: file.name)
def test_a_judge_is_small_and_its_row_is_that_of_its_json(file):
    """At most 1 MB; class, each class and alteration."""
    assert file.stat().st_size <= 1e6
    assert torch.load(file, weights_only=True).keys() == {"classifier"}
    facts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    right, name = facts["accuracy"], file.stem
    each = [row[i] / sum(row) for i, row in enumerate(right["class confusion"])]
    shares = [f"{share:.3f}" for share in each]
    cells = [f"[{name}]({name}.json)", f"{right['class']:.4f}", *shares]
    assert f"| {' | '.join(cells)} | {right['alteration']:.4f} |\n" in README
    assert f"    {facts['command'].replace(' --phantoms 12000 --steps 2500', '')}\n" in README
    assert facts["commit"] in README


def test_the_lines_of_the_readme_find_the_lungs_of_phantoms(monkeypatch):
    """Typed as they stand. New phantoms: 0.97 of the pixels are right."""
    monkeypatch.chdir(ROOT)
    xrays, true, _ = chests(9, range(3), "Normal")
    lines = README.split("In Python, ")[1].split("\n\n")[1]
    names = dict(np=np, torch=torch, runs=runs, evaluate=evaluate, xrays=xrays)
    exec("\n".join(line.strip() for line in lines.splitlines()), names)
    assert np.mean(names["lungs"].numpy() == true) > 0.97
