"""How good drawn X-rays are: what is held against what, and what a segmenter learns from them."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
import data
import image_metrics
import realism
import synthesis
import train
from console import UserError
from testing import CPU, split, tiny


def pictures(n, seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, size, size), np.uint8)


@pytest.fixture
def judged(monkeypatch):
    """A ruler whose two networks see mean and spread of a picture; dark is class 0, bright 2."""

    def answers(model, images):
        x = torch.as_tensor(images).float().flatten(1)
        features = torch.stack([x.mean(1), x.std(1), x[:, 0]], 1).numpy() / 255
        classes = np.eye(3)[np.digitize(features[:, 0], [0.4, 0.6])]
        return classifier.Answers(features, classes, None)

    monkeypatch.setattr(classifier, "load", lambda path: path.stem)
    monkeypatch.setattr(classifier, "answers", answers)
    return realism.Judged(pictures(60), pictures(50, 1))


def test_each_number_is_that_of_its_two_sets(judged):
    """Drawn against real; copies against what was learned, their control against half of real."""
    drawn = pictures(40, 2) // 2
    row = judged.row(drawn, np.zeros(40, int))
    ours, real, learned = (judged.features(x) for x in (drawn, pictures(60), pictures(50, 1)))
    for name in ("texture", "plain"):
        both = ours[name], real[name]
        assert row[f"KID, {name}"] == image_metrics.kernel_distance(*both)
        assert row[f"Fréchet, {name}"] == image_metrics.frechet_jackknife(*both)
    ours, real, learned = (x["texture"] for x in (ours, real, learned))
    expected = image_metrics.precision_recall(real, ours)
    assert (row["precision"], row["recall"]) == expected
    assert row["C_T"] == image_metrics.memorisation(ours, learned, real)
    assert row["C_T, control"] == image_metrics.memorisation(ours, real[:30], real[30:])
    assert row["N"] == 40 and row["judged right"] == 1.0  # all are dark, class 0
    assert judged.row(drawn, np.ones(40, int))["judged right"] == 0.0
    assert "judged right" not in judged.row(drawn)


def test_copies_of_what_was_learned_are_found_and_fresh_pictures_are_not(judged):
    """C_T is far below 0 for copies alone; its control is near 0 for both."""
    for images, is_copy in ((pictures(50, 1), True), (pictures(50, 7), False)):
        row = judged.row(images)
        assert (row["C_T"] < -5) == is_copy and abs(row["C_T, control"]) < 3


@pytest.mark.parametrize("given", ["", "class"])
def test_the_drawn_are_asked_for_the_classes_of_the_others_and_held_against_the_same(
    judged, monkeypatch, given
):
    """A network that draws the others themselves has their numbers, at every guidance and seed."""
    real, others = pictures(60), pictures(60, 3)
    labels, asked = np.arange(60) % 3, []
    monkeypatch.setattr(realism, "reference", lambda *_: (real, others, labels))

    def draw(model, cfg, known, N, device, progress, seed):
        asked.append((cfg.guidance, seed, known and known.label.tolist(), N))
        return data.to_float(others)

    monkeypatch.setattr(synthesis, "draw", draw)
    cfg = tiny(task="synthesis", cond=None, given=given)
    splits = {"Train": split(50)._replace(images=pictures(50, 1))}
    first, *rows = realism.distances(None, cfg, splits, CPU, 60, [0.0, 2.0], [5, 6])
    expected = (labels + 1).tolist() if given else None
    assert asked == [(w, seed, expected, 60) for w in (0.0, 2.0) for seed in (5, 6)]
    assert [(row["guidance"], row["seed"]) for row in rows] == [call[:2] for call in asked]
    for row in rows:
        measured = {name: row[name] for name in first if name in row and name != "images"}
        assert measured.items() <= first.items() and ("judged right" in row) == (given == "class")
    table = realism.table_of_distances([first, *rows]).splitlines()
    assert len(table) == 2 + 5 and table[2].startswith("| 60 others |  |")
    assert (
        table[4].startswith("| 60 drawn | 0.0 |") and len({line.count("|") for line in table}) == 1
    )


def test_xrays_are_held_against_one_half_of_val_and_the_other_half_stands_for_perfection():
    names = [f"{data.CLASSES[i % 3]}/{i}.png" for i in range(9)]
    val = split(9)._replace(names=names)
    cfg = dataclasses.replace(tiny(task="synthesis", cond=None), phantoms=False)
    real, others, labels = realism.reference(cfg, {"Val": val}, 1000)
    every = {image.tobytes(): i for i, image in enumerate(val.images)}
    rows = [[every[image.tobytes()] for image in half] for half in (real, others)]
    assert sorted(sum(rows, [])) == list(range(9)) and len(rows[0]) == 5
    assert labels.tolist() == [i % 3 for i in rows[1]]


def test_phantoms_are_held_against_fresh_ones_of_two_seeds(monkeypatch):
    monkeypatch.setattr(classifier, "fresh", lambda seed, n, _: (seed, n))
    cfg = dataclasses.replace(tiny(task="synthesis", cond=None), phantoms=True)
    assert realism.reference(cfg, None, 300) == (2000, 2001, 300)


# ---------------------------------------- train on drawn, test on real


def write_pairs(folder, n, masks="masks", first=0):
    for i in range(first, first + n):
        image = np.full((16, 16), i + 1, np.uint8)
        for name, pixels in (("images", image), (masks, np.uint8(255) * (image > 2))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"sample-{i:04}.png")
    return folder


def test_pairs_are_those_of_all_folders_each_beside_its_own_mask(tmp_path):
    """masks/, or those of the task where there are two kinds."""
    a = write_pairs(tmp_path / "a", 3)
    b = write_pairs(tmp_path / "b", 2, "infection-masks", first=3)
    images, masks = realism.drawn_pairs([a, b], "infection", 16)
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert masks[:, 0, 0, 0].tolist() == [0, 0, 255, 255, 255]
    (a / "masks" / "sample-0001.png").unlink()
    with pytest.raises(UserError, match="a must hold images/ and masks/ of the same names; there "):
        realism.drawn_pairs([a], "lung", 16)


def test_half_of_what_is_seen_is_real_where_both_are_mixed():
    real, drawn = (pictures(3), pictures(3, 1)), (pictures(8, 2), pictures(8, 3))
    images, masks = realism.mixed(real, drawn)
    assert len(images) == len(masks) == 16
    assert np.array_equal(images[:8], real[0][[0, 1, 2, 0, 1, 2, 0, 1]])
    assert np.array_equal(masks[:8], real[1][[0, 1, 2, 0, 1, 2, 0, 1]])
    assert np.array_equal(images[8:], drawn[0]) and np.array_equal(masks[8:], drawn[1])


def test_what_is_learned_are_the_averaged_weights_of_train_py():
    cfg = tiny(model="unet", cond=None, channels=4, steps=3)
    images, masks = split(6)[:2]
    counted = []
    found = realism.learned(cfg, images, masks, CPU, lambda: counted.append(1))
    trainer = train.Trainer(cfg, CPU)
    for _ in range(3):
        trainer.train_step(torch.from_numpy(images), torch.from_numpy(masks))
    assert len(counted) == 3
    for a, b in zip(found.parameters(), trainer.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_set_is_learned_from_and_measured_on_val(monkeypatch):
    """All real, drawn alone, few of a draw without and with the drawn; fewer are among the more."""
    train_split, drawn = split(9), (pictures(4, 5), pictures(4, 6))
    number = {image.tobytes(): i for i, image in enumerate([*train_split.images, *drawn[0]])}
    sets = []

    def learned(cfg, images, masks, device, progress):
        sets.append((cfg.seed, [number[image.tobytes()] for image in images]))
        return len(sets)

    def evaluate_masks(model, cfg, splits, device):
        assert list(splits) == ["Val"]
        return {"Val": {"pooled": {"DICE index": model / 10}}}, None

    monkeypatch.setattr(realism, "learned", learned)
    monkeypatch.setattr(realism.evaluate, "evaluate_masks", evaluate_masks)
    splits = {"Train": train_split, "Val": split(3, 1)}
    rows = realism.pairs(tiny(model="unet", steps=1), splits, drawn, [2, 3], 2, CPU)
    found = [(row["real"], row["drawn"], row["draw"]) for row in rows]
    few = [(n, m, draw) for draw in (0, 1) for n in (2, 3) for m in (0, 4)]
    assert found == [(9, 0, 0), (0, 4, 0), *few]
    assert [row["DICE index"] for row in rows] == pytest.approx(np.arange(1, 11) / 10)
    assert sets[0] == (0, list(range(9))) and sets[1] == (0, [9, 10, 11, 12])
    for draw, first in ((0, 2), (1, 6)):
        seeds, (two, two_more, three, three_more) = zip(*sets[first : first + 4])
        assert set(seeds) == {draw} and two == three[:2] and len(set(three)) == 3
        assert set(two_more) == {*two, 9, 10, 11, 12} and two_more[4:] == [9, 10, 11, 12]
        assert set(three_more) == {*three, 9, 10, 11, 12}
    assert sets[2][1] != sets[6][1]
    table = realism.table_of_pairs(rows).splitlines()
    few = ["| 2 | 0 | 0.5000 ± 0.2828 |  |", "| 2 | 4 | 0.6000 ± 0.2828 | in 2 of 2 draws |"]
    assert table[2:6] == ["| 9 | 0 | 0.1000 |  |", "| 0 | 4 | 0.2000 |  |", *few]


@pytest.mark.parametrize(
    "words, message",
    [
        ("distances none", "none: no checkpoint there"),
        ("distances a b", "distances takes one run, got a, b"),
        ("distances a --samples 3", "--samples must be at least 200, got 3"),
        ("distances a --seeds 0 -1", "--seeds must be at least 0, got -1"),
        ("pairs none", "none/images: no such folder"),
        ("pairs a --labels 5 0", "--labels must be at least 1, got 0"),
        ("pairs a --labels 19", "--labels must be at most the 18 images of Train, got 19"),
        ("pairs a --out a", "--out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, root, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "a", 2)
    status = realism.main([*words.split(), "--data", str(root), "--device", "cpu"])
    err = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and err.startswith("realism.py: error: ") and message in err
