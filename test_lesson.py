"""notebooks/lesson.py: networks that compare, the images of every evaluation, tables, progress."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import runs
from notebooks import lesson


@pytest.fixture
def project(lung_run, tmp_path, monkeypatch):
    """A folder with two finished runs of 4 steps in runs/, and others in weights/ of step 9."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(lung_run, Path("runs", f"{name}-0"))
        state = torch.load(lung_run / "last.pt", weights_only=True)
        half = {key: value.half() for key, value in state["ema"].items()}
        Path("weights").mkdir(exist_ok=True)
        state = dict(config=state["config"], step=9, ema=half)
        torch.save(state, Path("weights", f"{name}.pt"))
    return tmp_path


def change(name, step=None, **settings):
    """Write another step or other settings into a run's results."""
    file = Path("runs", f"{name}-0", "results.json")
    result = json.loads(file.read_text())
    result["config"] |= settings
    result["evaluation"]["step"] = step or result["evaluation"]["step"]
    file.write_text(json.dumps(result))


def labels(*names):
    return [network.label for network in lesson.networks(*names).values()]


def test_your_own_runs_are_taken_where_all_are_finished(project):
    """Else the weights of all: never one run of yours beside one of weights/."""
    own = [f"X-rays, runs/{name}-0, step 4" for name in "ab"]
    given = [f"X-rays, weights/{name}.pt, step 9" for name in "ab"]
    assert labels("a", "b") == own and labels("a") == own[:1]
    (project / "runs" / "b-0" / "results.json").unlink()
    assert labels("a", "b") == given and labels("a") == own[:1]


@pytest.mark.parametrize(
    "settings",
    [dict(step=3), *({name: "other"} for name in lesson.ALIKE)],
    ids=lambda settings: next(iter(settings)),
)
def test_runs_that_are_not_alike_are_not_compared(project, settings):
    """Of unequal steps, or of another size, recipe, data, image size or seed."""
    change("b", **settings)
    assert labels("a", "b") == [f"X-rays, weights/{name}.pt, step 9" for name in "ab"]


@pytest.mark.parametrize("settings", [dict(task="infection"), dict(model="unet")])
def test_runs_of_two_tasks_or_models_may_have_taken_unequal_steps(project, settings):
    """Equal time is not equal steps."""
    change("b", step=3, **settings)
    assert lesson.comparable([Path("runs/a-0"), Path("runs/b-0")])


def test_halves_are_read_as_float32(project):
    """The weights of a file of weights/ are those of the run, rounded."""
    (project / "runs" / "a-0" / "results.json").unlink()
    found = lesson.networks("a")["a"].model.state_dict()
    expected = runs.load_run("runs/a-0")[0].state_dict()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].half().float())


def test_the_images_are_those_of_every_evaluation(project, root):
    """Of validation, or of another split; the lungs where asked for."""
    cfg = runs.load_run("runs/a-0")[1]
    split, rows = lesson.held_out(cfg, 5)
    assert split.names == data.load(root, "lung", "Val", None, 16).names
    np.testing.assert_array_equal(rows, evaluate.evaluated_rows(len(split.names), 5))
    assert lesson.held_out(cfg, 5, split="Test")[0].names != split.names
    lungs, _ = lesson.held_out(cfg, 5, masks="lung masks")
    np.testing.assert_array_equal(lungs.masks, split.masks)


def test_a_table_has_four_digits():
    """Of floats; words and counts stay."""
    expected = "| a | b |\n|---|---|\n| x | 0.1235 |\n| 3 | y |"
    assert lesson.table(["a", "b"], [["x", 0.123456], [3, "y"]]).data == expected


def test_a_rehearsal_is_asked_for_by_fast(monkeypatch):
    """FAST=1 takes the second of two numbers."""
    monkeypatch.delenv("FAST", raising=False)
    assert lesson.either(64, fast=4) == 64
    monkeypatch.setenv("FAST", "1")
    assert lesson.either(64, fast=4) == 4


def test_progress_counts_and_is_gone_at_the_end(monkeypatch):
    """A line a second at most, with the time left."""
    shown, clock = [], iter([0.0, 0.5, 2.0, 2.5, 4.0])
    monkeypatch.setattr(lesson.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("IPython.display.display", lambda text, display_id: Line(shown, text))
    add = lesson.progress("masks", 8)
    for _ in range(4):
        add(2)
    assert shown == ["masks", "masks: 4 of 8, 2 s left", ""]


class Line:
    """A display handle that notes what it shows."""

    def __init__(self, shown, text):
        self.shown = shown
        self.update(text)

    def update(self, text):
        self.shown.append(text.data)
