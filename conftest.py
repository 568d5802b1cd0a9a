"""What pytest sets up, and the fixtures that several test files share: tiny data and tiny runs."""

import os

# Read when torch is loaded. The tests' networks are so small that a second thread makes them
# slower, and threads that wait must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import phantoms
from testing import TINY


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data set with 6 Train, 5 Val and 1 Test image of each class, 16x16, in both trees.

    A mask is where its image is brighter than 127.
    """
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for tree, masks in (("Lung", ["lung masks"]), ("Infection", ["lung masks", "infection masks"])):
        for split, n in (("Train", 6), ("Val", 5), ("Test", 1)):
            for c in data.CLASSES:
                folder = root / f"{tree} Segmentation Data" / split / c
                for part in ("images", *masks):
                    (folder / part).mkdir(parents=True)
                for i in range(n):
                    image, name = rng.integers(0, 256, (16, 16), np.uint8), f"{split} ({i}).png"
                    Image.fromarray(image).save(folder / "images" / name)
                    for part in masks:
                        mask = np.uint8(255) * (image > 127)
                        Image.fromarray(mask).save(folder / part / name)
    return root


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are empty files: matplotlib takes seconds, and one test draws."""
    draw_nothing(monkeypatch)


def draw_nothing(monkeypatch):
    def touch(path, *_):
        Path(path).touch()

    for name in ("save_curves", "save_mask_grid", "save_image_grid"):
        monkeypatch.setattr(f"figures.{name}", touch)


@pytest.fixture(scope="session")
def decoded(tmp_path_factory):
    """The cache of the tiny data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, decoded):
    """Runs and caches go to a folder of the test, not to that of the person who tests."""
    monkeypatch.setattr(data, "CACHE", decoded)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without images: no COVID-QU-Ex, no phantoms. Returns where both would be."""
    folder = tmp_path / "nowhere"
    monkeypatch.setattr(phantoms, "DATA_HOMES", (folder / "COVID-QU-Ex",))
    monkeypatch.setattr(phantoms, "PHANTOMS", folder / "phantoms")
    return folder


@pytest.fixture
def go(root, tmp_path, elsewhere):
    """go("--task lung ...") runs train.py in this process on the tiny data.

    Returns (exit status, run folder). given: further words; None leaves out data and folder too.
    """

    def go(words, out="run", given=TINY):
        return train_here(words, root, tmp_path / out, given)

    return go


def train_here(words, root, folder, given):
    import train  # here, so that a fault in train.py fails its own tests alone

    if given and "--model" in words:
        given = given.replace("--ddim-steps 2 ", "")
    if given and "synthesis" in words:
        given = given.replace("--ddim-steps 2", "--ddim-steps 3")  # the fewest of the flow ODE
    rest = [] if given is None else [*given.split(), "--data", str(root), "--out", str(folder)]
    try:
        return train.main([*words.split(), *rest]), folder
    except SystemExit as e:
        return e.code, folder


@pytest.fixture(scope="session")
def finished_run(root, tmp_path_factory, decoded):
    """The folder of a finished tiny run of --task lung, trained once: only for reading."""
    folder = tmp_path_factory.mktemp("runs") / "lung"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(data, "CACHE", decoded)
        draw_nothing(monkeypatch)
        assert train_here("--task lung", root, folder, TINY)[0] == 0
    return folder


@pytest.fixture
def lung_run(finished_run, tmp_path, elsewhere, no_pictures):
    """A copy of finished_run, for a test that goes on with it or damages it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
