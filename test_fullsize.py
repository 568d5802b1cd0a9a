"""Masks at the size of their files: enlarging, DICE and outlines against known pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import fullsize
import pairs
from testing import CPU, Oracle, tiny

S = 16


def test_where_a_side_shrinks_all_pixels_under_an_output_pixel_count():
    """Columns -1, 1, 1, -1 at a quarter of the width: 0, and not what the middle of four shows."""
    x = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(8, 8)
    assert np.abs(fullsize.enlarge(x, (8, 8), data.to_uint8) - 127.5).max() < 0.3 * 127.5


@pytest.mark.parametrize("size", [(S, S), (300, 411), (411, 30), (5, 2000), (1, 90), (7, 9)])
def test_an_enlargement_in_strips_is_that_of_the_whole_bit_for_bit(monkeypatch, size):
    """For each width of the strips, that of one column too."""
    x = torch.rand(S, S, generator=torch.Generator().manual_seed(0))
    whole = dict(size=size, mode="bilinear", antialias=True)
    whole = torch.nn.functional.interpolate(x[None, None], **whole)[0, 0].numpy()
    for n in (1, 7, 64, 10**6):
        strips = [slice(i, i + n) for i in range(0, size[1], n)]
        monkeypatch.setattr(data, "strips", lambda shape, strips=strips: strips)
        bits = np.stack([fullsize.enlarge(x, size, byte_of(k)) for k in range(4)], -1)
        assert np.array_equal(bits.view(np.float32)[..., 0], whole)


def byte_of(k):
    """(H, W) float32 -> byte k of each number, (H, W) uint8."""
    return lambda x: x.contiguous().numpy().view(np.uint8)[:, k::4]


def test_one_column_is_enlarged_as_one_row_is():
    x = torch.rand(S, S, generator=torch.Generator().manual_seed(0))
    column, row = (fullsize.enlarge(a, b, data.to_uint8) for a, b in ((x, (90, 1)), (x.T, (1, 90))))
    assert np.ptp(column) > 20 and np.abs(column.T.astype(int) - row).max() <= 1


def write(path, mask):
    """A bool mask as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(255) * mask).save(path)
    return path


def test_masks_are_scored_at_the_size_of_each_file(tmp_path):
    """Left halves of 16 columns against 20 of 40 columns, 24 of 40, 8 of 16: pooled by hand."""
    mask = torch.where(torch.arange(S) < S // 2, 1.0, -1.0).expand(3, 1, S, S)
    files, TP, FN = [], 0, 0
    for i, (columns, size) in enumerate(((20, 40), (24, 40), (8, 16))):
        true = np.arange(size) < columns
        files.append(write(tmp_path / f"{i}.png", np.tile(true, (30, 1))))
        TP, FN = TP + 30 * size // 2, FN + 30 * (columns - size // 2)
    found = fullsize.scores(mask, files)
    assert found["DICE index"] == pytest.approx(2 * TP / (2 * TP + FN))
    assert found["outline distance"] == pytest.approx((0 + 4 + 0) / 3)
    blank = write(tmp_path / "blank.png", np.zeros((30, 40), bool))
    both = fullsize.scores(mask[:2], [blank, files[0]])
    assert both["outline distance"] == 0 and both["DICE index"] < 1
    assert np.isnan(fullsize.scores(mask[:1], [blank])["outline distance"])
    gray = tmp_path / "gray.png"
    Image.fromarray(np.tile(np.uint8([10] * 20 + [90] * 20), (30, 1))).save(gray)
    assert fullsize.scores(-mask[:1], [gray], threshold=50)["DICE index"] == 1


def test_an_evaluation_scores_at_the_size_of_the_files(tmp_path, root, elsewhere):
    """A network that knows the mask at 16x16, and files of 64x64: what the file has beyond it."""
    model = Oracle(tiny())
    for i in range(4):
        spot = np.zeros((64, 64), bool)
        spot[8 + i : 40, 16:48] = True
        for part in pairs.PARTS:
            write(tmp_path / "own" / part / f"{i}.png", spot)
    cfg = tiny(task="masks", classes=(), data=str(tmp_path / "own"), eval_images=4)
    splits = pairs.splits_of(cfg, ("Train", "Val"))
    report, _ = evaluate.evaluate_masks(model, cfg, splits, CPU)
    for name, split in splits.items():
        rows = evaluate.evaluated_rows(len(split.images), 4)
        files = [split.files[row] for row in rows]
        masks = torch.from_numpy(split.masks[rows] / 127.5 - 1).float()
        expected = fullsize.scores(masks, files)
        assert report[name][evaluate.FULL_SIZE] == pytest.approx(expected)
        assert report[name]["pooled"]["DICE index"] == 1 > expected["DICE index"] > 0.9
    line = dict(step=3, **report)
    words = f"DICE {expected['DICE index']:.4f}, outlines {expected['outline distance']:.2f} pixels"
    assert f"At the size of the files, validation: {words} apart." in evaluate.markdown_table(
        cfg, line
    )
    lungs = data.load(root, "lung", "Val", None, 16)
    assert [path.parent.parent.name + "/" + path.name for path in lungs.files] == lungs.names
    assert all(path.parent.name == "lung masks" for path in lungs.files)
    learned, out = data.divided(lungs, 0.4)
    assert [out.names.index(n) for n in out.names] == [out.files.index(f) for f in out.files]
    assert {*learned.files, *out.files} == {*lungs.files}
    plain, _ = evaluate.evaluate_masks(
        model, dataclasses.replace(cfg), {"Val": lungs._replace(files=None)}, CPU
    )
    assert evaluate.FULL_SIZE not in plain["Val"]
