"""notebooks/lesson.py: a notebook gets the finished run, or a shorter one that is found again."""

import signal
from pathlib import Path

import pytest
import torch

import runs
import train
from console import Stopped
from notebooks import lesson
from testing import SIZES

SHORT = "--steps 4 --eval-images 4 --ddim-steps 2 --set eval_every=2"


@pytest.fixture
def words(root, elsewhere, no_pictures):
    """A command whose full run has 500 steps, in a folder without runs."""
    return f"--task lung --data {root} {SIZES} --set channels=4"


@pytest.fixture
def begun(monkeypatch):
    """The step that each training step of this test began at."""
    begun, step = [], train.Trainer.train_step

    def counted(self, *split):
        begun.append(self.step)
        return step(self, *split)

    monkeypatch.setattr(train.Trainer, "train_step", counted)
    return begun


def test_a_shorter_run_is_trained_here_once_gone_on_with_after_a_stop_and_found_again(
    words, begun, monkeypatch
):
    """Stopped at its first evaluation, and then finished by the next call; the third finds it."""
    evaluate = train.Run.evaluate
    monkeypatch.setattr(train.Run, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match="lung-concat-0-4-steps was not trained to its end"):
        lesson.open_run(words, SHORT)
    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    for _ in range(2):
        _, cfg, folder, label = lesson.open_run(words, SHORT)
        assert begun == [0, 1, 2, 3] and folder == Path("runs/lung-concat-0-4-steps")
        assert cfg.steps == 4 and label == f"X-rays, {folder}, step 4"


def test_the_full_run_is_preferred_and_one_of_fewer_steps_does_not_count(words, begun):
    """runs/lung-concat-0 of 3 steps is not that of --steps 5. Prolonged to 5 it is."""
    shorter = "--steps 2 --set eval_every=2"
    line = f"{words} --eval-images 4 --ddim-steps 2".split()
    assert train.main([*line, "--steps", "3"]) == 0 and len(begun) == 3
    full = f"{words} --eval-images 4 --ddim-steps 2"
    short = lesson.open_run(full, shorter)[2]
    assert short == Path("runs/lung-concat-0-2-steps") and len(begun) == 5
    assert train.main(["--resume", "runs/lung-concat-0", "--steps", "5"]) == 0
    model, _, folder, _ = lesson.open_run(f"{full} --steps 5", "")
    assert folder == Path("runs/lung-concat-0") and len(begun) == 7
    expected = runs.load_run(folder)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    folder.rename("runs/named")
    named = lesson.open_run(f"{full} --steps 5 --out runs/named", "")[2]
    assert named == Path("runs/named") and len(begun) == 7
