"""§3.1: what the loader promises. Every tree is a tiny one, written here; no data set is needed."""

import io
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from console import UserError

NAMES = {
    "COVID-19": ["covid_1.png", "covid_10.png", "covid_2.PNG"],  # code points: 10 before 2
    "Non-COVID": ["non_COVID (1).png", "non_COVID (2).png"],
    "Normal": ["Normal (1).png", "Normal [2].png"],
}
TREE = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data"}
# The first is the task's own
MASKS = {"lung": ["lung masks"], "infection": ["infection masks", "lung masks"]}
SIZE = 8


def save(path, a, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, "PNG", **options)
    return path


def read(path):
    return np.asarray(Image.open(path))


def write_tree(root, task="lung", doubled=True, seed=0):
    """All splits and classes: random images and masks of each kind, a name in one split only."""
    rng = np.random.default_rng(seed)
    tree = root / TREE[task] / (TREE[task] if doubled else "")
    for split in data.SPLITS:
        for c in data.CLASSES:
            for name in NAMES[c]:
                name = name if split == "Train" else f"{split} {name}"
                image = rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
                save(tree / split / c / "images" / name, image)
                for kind in MASKS[task]:
                    mask = np.uint8(255) * (rng.random((SIZE, SIZE)) < 0.5)
                    save(tree / split / c / kind / name, mask)
    return tree


@pytest.fixture
def root(tmp_path):
    write_tree(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def here(root):
    """Train/COVID-19 of the lung tree."""
    return root / TREE["lung"] / TREE["lung"] / "Train" / "COVID-19"


@pytest.fixture
def load(root, tmp_path):
    def load(task="lung", split="Train", *args, **options):
        options = {"image_size": SIZE, "cache": tmp_path / "cache"} | options
        return data.load(root, task, split, *args, **options)

    return load


def same(a, b):
    if a.masks is None or b.masks is None:
        masks = a.masks is b.masks
    else:
        masks = np.array_equal(a.masks, b.masks)
    return masks and np.array_equal(a.images, b.images) and a.names == b.names


# ---------------------------------------- ranges


def test_all_256_gray_values_survive_the_way_to_the_model_and_back():
    u = np.arange(256, dtype=np.uint8)
    x = data.to_float(u)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.allclose(x.diff(), torch.tensor(2 / 255), atol=1e-6)  # evenly spaced
    assert np.array_equal(data.to_uint8(x), u)


def test_to_uint8_rounds_to_the_nearest_and_clamps():
    x = torch.tensor([-7.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 254.4 / 127.5 - 1, 1.0, 3.0])
    assert data.to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_masks_reach_the_model_as_minus_one_and_plus_one(load):
    x = data.to_float(load().masks)
    assert set(x.unique().tolist()) == {-1.0, 1.0}


def test_to_float_refuses_what_is_already_converted_and_leaves_its_argument_alone():
    u = torch.tensor([7], dtype=torch.uint8)
    data.to_float(u)
    assert u.item() == 7
    with pytest.raises(ValueError, match=r"takes uint8 \(0..255\), got torch.float32"):
        data.to_float(np.zeros(3, np.float32))


def test_to_uint8_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        data.to_uint8(torch.tensor([0.0, float("nan")]))


# ---------------------------------------- one file


def test_16_bit_gray_is_scaled_exactly_and_never_clipped(tmp_path):
    v = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    # round(255 v / 65535) in whole numbers
    exact = (2 * 255 * v.astype(np.int64) + 65535) // (2 * 65535)
    for suffix in (".png", ".tif"):
        Image.fromarray(v).save(tmp_path / f"v{suffix}")
        assert np.array_equal(data.read_gray(tmp_path / f"v{suffix}"), exact)


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_one_gray_image_in_every_mode_reads_the_same(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(GRAY.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(GRAY).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "x.png")
    assert np.array_equal(data.read_gray(tmp_path / "x.png"), GRAY)


FRAME = Image.fromarray(GRAY.T.copy())


def coloured(mode):
    a = np.stack([GRAY] * 3, -1)
    a[5, 3, 2] += 1  # one pixel, one channel, one level
    return Image.fromarray(a).convert(mode)


def transparent(mode):
    image = Image.fromarray(GRAY).convert(mode)
    image.putpixel((3, 5), (*image.getpixel((3, 5))[:-1], 254))
    return image


@pytest.mark.parametrize(
    "image, rule, options",
    [
        (coloured("RGB"), "coloured", {}),
        (coloured("RGBA"), "coloured", {}),
        (coloured("RGB").quantize(256), "coloured", {}),
        (transparent("LA"), "transparent", {}),
        (transparent("RGBA"), "transparent", {}),
        (Image.fromarray(GRAY), "transparent", {"transparency": int(GRAY[0, 1])}),
        (Image.fromarray(GRAY), "holds 2 frames", {"save_all": True, "append_images": [FRAME]}),
    ],
    ids=["RGB", "RGBA", "palette", "LA", "RGBA-alpha", "tRNS", "frames"],
)
def test_images_that_are_not_one_opaque_gray_picture_are_refused(tmp_path, image, rule, options):
    image.save(tmp_path / "x (1).png", **options)
    with pytest.raises(UserError, match=rf"x \(1\)\.png: .*{rule}"):
        data.read_gray(tmp_path / "x (1).png")


@pytest.mark.parametrize(
    "image, suffix, rule",
    [
        (Image.fromarray(GRAY.astype(np.float32)), "tif", "pixels of kind F"),
        (Image.fromarray(GRAY).convert("CMYK"), "tif", "pixels of kind CMYK"),
        (Image.fromarray(GRAY.astype(np.int32) - 1), "tif", r"gray values -1\.\.251"),
        (Image.fromarray(GRAY.astype(np.int32) * 300), "tif", r"gray values 0\.\.75600"),
    ],
    ids=["float", "CMYK", "negative", "too large"],
)
def test_files_of_other_number_kinds_are_refused(tmp_path, image, suffix, rule):
    image.save(tmp_path / f"x.{suffix}")
    with pytest.raises(UserError, match=rule):
        data.read_gray(tmp_path / f"x.{suffix}")


def test_damaged_files_are_refused(tmp_path):
    good = save(tmp_path / "x.png", GRAY).read_bytes()
    for content in (good[: len(good) // 2], good[:-20], b"not a picture", b""):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.png: cannot be read: \S"):
            data.read_gray(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        data.read_gray(tmp_path / "gone.png")


def test_what_is_no_file_or_of_another_format_is_refused(tmp_path):
    """A pipe would never end, and PostScript is a program: neither is opened."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path(os.devnull)):
        with pytest.raises(UserError, match="is not a file$"):
            data.read_gray(path)
    Image.fromarray(GRAY).convert("RGB").save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: cannot be read: not an image file"):
        data.read_gray(tmp_path / "x.png")


def header_of_png(width, height, bits, kind):
    """The beginning of a PNG file: kind 0 is gray, 6 RGBA. No pixel follows."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + b"\0\0\0\1IDAT"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits, kind", [(1, 0), (8, 0), (16, 0), (8, 6)])
@pytest.mark.parametrize("size", [(13300, 13300), (40000, 40000), (1, 65537)])
def test_a_picture_above_100_megapixels_is_refused_by_its_header(tmp_path, bits, kind, size):
    (tmp_path / "x.png").write_bytes(header_of_png(*size, bits, kind))
    rule = f"{size[0]} x {size[1]} pixels; at most 100 megapixels and 65536 a side are read$"
    with pytest.raises(UserError, match=rf"x\.png: cannot be read: {rule}"):
        data.read_gray(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(header_of_png(10000, 10000, bits, kind))
    with pytest.raises(UserError, match="cannot be read: (?!.*at most)"):  # no pixels
        data.read_gray(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P", "I;16", "I"])
def test_a_large_picture_is_read_in_strips_and_alike(tmp_path, monkeypatch, mode):
    a = np.random.default_rng(0).integers(0, 256, (50, 30), np.uint8)
    image = Image.fromarray(a.astype(np.uint16) * 250) if mode[0] == "I" else Image.fromarray(a)
    image = image if image.mode == mode else image.convert(mode)
    image.save(tmp_path / "x.tif" if mode == "I" else tmp_path / "x.png")
    (path,) = tmp_path.iterdir()
    whole = data.gray_values(path), data.read_gray(path)
    monkeypatch.setattr(data, "strips", rows_of_3)
    strips = data.gray_values(path), data.read_gray(path)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(whole, strips))


def rows_of_3(shape):
    return [slice(i, min(i + 3, shape[0])) for i in range(0, shape[0], 3)]


def test_strips_are_all_rows_in_order_a_million_pixels_at_most():
    for shape in ((10000, 10000), (65536, 1500), (7, 9), (2, 2**21)):
        strips = data.strips(shape)
        assert [i for rows in strips for i in range(rows.start, rows.stop)] == [*range(shape[0])]
        longest = max(rows.stop - rows.start for rows in strips)
        assert longest == 1 or longest * shape[1] <= 2**20


def test_16_bits_take_little_more_memory_than_their_pixels(tmp_path):
    """(H, W) uint16 and uint8, and a strip: no copy of the whole in wider numbers."""
    path = save(tmp_path / "x.png", np.zeros((3000, 3000), np.uint16), compress_level=1)
    tracemalloc.start()
    data.read_gray(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 3000 * 3000


def test_a_flipped_bit_anywhere_in_the_pixels_of_a_file_is_noticed(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    good = save(tmp_path / "x.png", a).read_bytes()
    for at in range(good.index(b"IDAT") + 4, good.index(b"IEND") - 4):
        bad = bytearray(good)
        bad[at] ^= 4
        (tmp_path / "x.png").write_bytes(bad)
        with pytest.raises(UserError, match=r"x\.png: cannot be read"):
            data.read_gray(tmp_path / "x.png")


INSIDE = np.tri(8, dtype=bool)


TOPS = [np.uint8(255), np.uint8(1), np.uint16(65535), np.uint16(1), np.uint16(255), np.bool(1)]


@pytest.mark.parametrize("top", TOPS, ids=repr)
def test_a_mask_of_two_values_is_read_at_every_depth(tmp_path, top):
    mask = data.read_mask(save(tmp_path / "m.png", INSIDE * top))
    assert mask.dtype == bool and np.array_equal(mask, INSIDE)


@pytest.mark.parametrize("value, inside", [(0, False), (1, True), (255, True)])
def test_a_mask_of_one_value_is_blank_or_full(tmp_path, value, inside):
    path = save(tmp_path / "m.png", np.full((4, 4), value, np.uint8))
    assert (data.read_mask(path) == inside).all()


TWO_VALUES = "a mask has the values 0 and 255, or 0 and 1"


@pytest.mark.parametrize(
    "values, found",
    [
        ([0, 127], "0, 127"),
        ([0, 1, 255], "0, 1, 255"),
        ([1, 255], "1, 255"),
        ([0, 254], "0, 254"),
        (range(0, 256, 10), r"0, 10, 20, 30, 40, \.\.\. \(26 values\)"),
    ],
)
def test_a_mask_of_other_values_is_refused_by_naming_them(tmp_path, values, found):
    path = save(tmp_path / "m.png", np.resize(np.array(values, np.uint8), (6, 6)))
    with pytest.raises(UserError, match=rf"m\.png: {TWO_VALUES}; found {found}$"):
        data.read_mask(path)


# ---------------------------------------- resizing


def test_256_to_64_is_the_mean_of_4_by_4_pixels_rounded_once():
    a = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    mean = a.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.abs(data.resize_image(a, 64) - mean).max() <= 0.5  # two roundings would exceed it


def test_a_resized_mask_is_inside_where_half_or_more_is():
    for k in (2, 3, 4, 6):  # k x k pixels, 0 .. k*k of them inside
        blocks = np.array([[np.arange(k * k) < n for n in range(k * k + 1)]])  # (1, k*k+1, k*k)
        row = np.concatenate([b.reshape(k, k) for b in blocks[0]], 1)  # (k, k*(k*k+1))
        a = np.tile(row, (k * k + 1, 1))  # square
        expected = np.arange(k * k + 1) * 2 >= k * k
        mask = data.resize_mask(a, k * k + 1)
        assert mask.dtype == bool and (mask == expected).all()


def test_at_its_own_size_nothing_changes_and_any_shape_becomes_square():
    assert np.array_equal(data.resize_image(GRAY, 8), GRAY)
    assert np.array_equal(data.resize_mask(INSIDE, 8), INSIDE)
    wide = np.repeat(np.array([[10, 200]], np.uint8), 5, 0)  # (5, 2)
    assert data.resize_image(wide, 4).tolist() == [[10, 10, 200, 200]] * 4


# ---------------------------------------- one split


@pytest.mark.parametrize("task", ["lung", "infection"])
def test_each_row_holds_the_image_and_the_mask_of_its_own_name(tmp_path, task):
    tree = write_tree(tmp_path, task)
    for split in data.SPLITS:
        s = data.load(tmp_path, task, split, data.CLASSES, SIZE, tmp_path / "cache")
        assert len(s.names) == 7 and s.images.shape == s.masks.shape == (7, 1, SIZE, SIZE)
        for image, mask, name in zip(s.images, s.masks, s.names):
            c, file = name.split("/")
            assert np.array_equal(image[0], read(tree / split / c / "images" / file))
            assert np.array_equal(mask[0], read(tree / split / c / MASKS[task][0] / file))


def test_the_infection_tree_has_lung_masks_too(tmp_path):
    tree = write_tree(tmp_path, "infection")
    s = data.load(tmp_path, "infection", "Val", None, SIZE, tmp_path / "cache", masks="lung masks")
    for mask, name in zip(s.masks, s.names):
        c, file = name.split("/")
        assert np.array_equal(mask[0], read(tree / "Val" / c / "lung masks" / file))


def test_resized_rows_match_their_names_too(here, load):
    s = load(image_size=4)
    i = s.names.index("COVID-19/covid_10.png")
    a = read(here / "images" / "covid_10.png").reshape(4, 2, 4, 2).mean((1, 3))
    m = read(here / "lung masks" / "covid_10.png").reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(s.images[i, 0] - a).max() <= 0.5
    assert np.array_equal(s.masks[i, 0], 255 * (m >= 127.5))


def test_order_is_class_then_name_whatever_the_directory_says(load, monkeypatch, tmp_path):
    first = load()
    assert first.names == [f"{c}/{name}" for c in data.CLASSES for name in NAMES[c]]
    scandir = os.scandir
    monkeypatch.setattr(data.os, "scandir", lambda path: reversed(list(scandir(path))))
    assert same(load(cache=tmp_path / "other"), first)
    assert load(classes=["Normal", "COVID-19"]).names == first.names[:3] + first.names[5:]


def test_many_threads_decode_what_one_does(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(24):
        size = (512, 8)[i % 2]  # large and small in turn, so that they finish out of order
        a = rng.integers(0, 256, (size, size), dtype=np.uint8)
        paths.append(save(tmp_path / "images" / f"{i}.png", a))
    alone, together = data.decode(paths, 8, workers=1), data.decode(paths, 8, workers=8)
    assert np.array_equal(alone[0], together[0]) and np.array_equal(alone[1], together[1])
    assert alone[1][:2].tolist() == [[512, 512], [8, 8]]
    assert len({a.tobytes() for a in alone[0]}) == 24


def test_doubled_folder_single_folder_and_the_tree_itself_are_the_same(tmp_path):
    tree = write_tree(tmp_path / "doubled")
    write_tree(tmp_path / "single", doubled=False)
    roots = tmp_path / "doubled", tmp_path / "single", tree, tree.parent
    splits = [data.load(r, "lung", "Val", None, SIZE, tmp_path / "cache") for r in roots]
    assert all(same(s, splits[0]) for s in splits)


def test_the_other_tasks_tree_is_not_taken_for_this_ones(root):
    rule = r"no data for infection: looked for Train, Val, Test in .*Infection"
    for r in (root, root / TREE["lung"], root / TREE["lung"] / TREE["lung"]):
        with pytest.raises(UserError, match=rule):
            data.load(r, "infection", "Train")


def test_synthesis_has_the_images_of_lung_and_no_masks(load):
    s = load("synthesis")
    assert s.masks is None and np.array_equal(s.images, load("lung").images) and len(s.names) == 7


def test_infection_means_covid_19_unless_asked_otherwise(tmp_path):
    write_tree(tmp_path, "infection")
    default, whole = (
        data.load(tmp_path, "infection", "Test", c, SIZE, tmp_path / "cache").names
        for c in (None, data.CLASSES)
    )
    assert len(default) == 3 and all(name.startswith("COVID-19/") for name in default)
    assert len(whole) == 7


def test_a_choice_of_classes_is_that_part_of_the_whole(load):
    whole, part = load(), load(classes=("Non-COVID",))
    assert part.names == whole.names[3:5] and same(load(classes="Non-COVID"), part)
    assert np.array_equal(part.images, whole.images[3:5])
    assert np.array_equal(part.masks, whole.masks[3:5])


SOME_CLASSES = "classes must be some of COVID-19, Non-COVID, Normal"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "lungs"}, "task must be one of lung, infection, synthesis; got 'lungs'"),
        ({"split": "train"}, "split must be one of Train, Val, Test; got 'train'"),
        ({"classes": ["Normal", "covid"]}, f"{SOME_CLASSES}; got 'Normal', 'covid'"),
        ({"classes": []}, "classes must be some of .*; got none"),
        ({"image_size": 0}, "image_size must be 1 or more; got 0"),
    ],
)
def test_arguments_are_refused_by_naming_what_is_allowed(load, options, message):
    with pytest.raises(UserError, match=message):
        load(**options)


def test_a_name_that_is_no_utf_8_or_has_a_new_line_is_a_name(here, load, decoded):
    first = load()
    for folder in here.iterdir():
        (folder / "covid_2.PNG").rename(folder / os.fsdecode(b"covid_2\xff\x1b[31m\n.png"))
    assert same(load(), first._replace(names=load().names)) and decoded == [14, 6, 0]


def test_hidden_files_and_thumbs_db_are_passed_over(here, load):
    first = load()
    for name in (".DS_Store", "._covid_1.png", "Thumbs.db"):
        (here / "images" / name).write_bytes(b"x")
    assert same(load(), first)


def break_(what, here):
    """Break one rule in Train/COVID-19."""
    if what == "mask":
        (here / "lung masks" / "covid_10.png").unlink()
    elif what == "two masks":
        (here / "lung masks" / "covid_10.png").unlink()
        (here / "lung masks" / "covid_2.PNG").unlink()
    elif what == "image":
        (here / "images" / "covid_10.png").unlink()
    elif what == "leak":
        save(here.parents[1] / "Val" / "COVID-19" / "images" / "covid_10.png", GRAY)
        save(here.parents[1] / "Val" / "COVID-19" / "lung masks" / "covid_10.png", INSIDE)
    elif what == "stray":
        (here / "images" / "notes.txt").write_text("x")
    elif what == "subfolder":
        (here / "images" / "more.png").mkdir()
    elif what == "empty":
        for folder in here.iterdir():
            for file in folder.iterdir():
                file.unlink()
    elif what == "folder":
        here.rename(here.with_name("covid"))
    elif what == "size":
        save(here / "lung masks" / "covid_10.png", np.tri(16, dtype=bool))
    elif what == "gray mask":
        save(here / "lung masks" / "covid_10.png", GRAY)
    elif what == "two colours":
        for name in ("covid_1.png", "covid_10.png"):
            coloured("RGB").save(here / "images" / name)


ONE_SPLIT = "a file may be in one split only"


@pytest.mark.parametrize(
    "what, message",
    [
        ("mask", r"images/covid_10\.png: has no mask of the same name$"),
        (
            "two masks",
            r"images/covid_10\.png: has no mask of the same name \(and 1 more bad files\)$",
        ),
        ("image", r"images/covid_10\.png: is missing, and has a mask$"),
        ("leak", rf"Train/COVID-19/images/covid_10\.png: is in Val too; {ONE_SPLIT}$"),
        ("stray", r"images/notes\.txt: only \.png files belong here$"),
        ("subfolder", r"images/more\.png: only \.png files belong here$"),
        ("empty", r"COVID-19/images: holds no \.png file$"),
        ("folder", r"COVID-19/images: no such folder$"),
        ("size", r"COVID-19/covid_10\.png: the image is \[8, 8\], its mask \[16, 16\] \(H, W\)$"),
        ("gray mask", rf"lung masks/covid_10\.png: {TWO_VALUES}; found 0, 4, 8"),
        (
            "two colours",
            r"images/covid_1\.png: coloured pixels.* \(and 1 more bad files: covid_10\.png\)$",
        ),
    ],
)
def test_bad_data_stops_the_load_and_names_the_file_and_the_rule(
    here, load, tmp_path, what, message
):
    break_(what, here)
    for _ in range(2):  # the second time a cache may answer, and must let nothing through
        with pytest.raises(UserError, match=message) as e:
            load()
        assert "\n" not in str(e.value)


def test_a_validation_image_may_not_be_a_training_image(here, load):
    break_("leak", here)
    with pytest.raises(UserError, match=r"Val/COVID-19/images/covid_10\.png: is in Train too"):
        load(split="Val")
    with pytest.raises(UserError, match="is in Train too"):
        load("synthesis", "Val")
    assert len(load(split="Test").names) == 7


@pytest.mark.parametrize("what", ["gray mask", "two colours"])
def test_a_refused_file_leaves_no_cache(here, load, tmp_path, what):
    break_(what, here)
    with pytest.raises(UserError):
        load()
    assert not (tmp_path / "cache").exists()


# ---------------------------------------- the cache


@pytest.fixture
def decoded(monkeypatch):
    """How many files each call of data.decode was asked for."""
    counts, decode = [], data.decode

    def counted(paths, *arguments):
        counts.append(len(paths))
        return decode(paths, *arguments)

    monkeypatch.setattr(data, "decode", counted)
    return counts


def test_the_second_load_decodes_nothing_and_is_the_same(load, decoded):
    assert same(load(), load()) and decoded == [14, 0]


def test_tasks_and_any_choice_of_classes_share_the_cache_and_sizes_and_splits_do_not(load, decoded):
    load("synthesis", classes=["Normal"]), load("lung", classes=["Normal"]), load("synthesis")
    assert decoded == [2, 2, 5]
    assert load(image_size=4).images.shape == (7, 1, 4, 4)
    assert load(split="Val").names != load().names
    assert decoded[3:] == [14, 14, 5]


def test_two_data_sets_in_one_cache_keep_apart(tmp_path, load, decoded):
    write_tree(tmp_path / "other", seed=1)
    first = load()
    other = data.load(tmp_path / "other", "lung", "Train", None, SIZE, tmp_path / "cache")
    assert not np.array_equal(first.images, other.images)
    assert same(load(), first) and decoded == [14, 14, 0]


@pytest.mark.parametrize("folder", ["images", "lung masks"])
def test_a_file_that_changed_is_decoded_again_though_its_length_is_the_same(here, load, folder):
    file = here / folder / "covid_10.png"
    save(file, INSIDE * np.uint8(255), compress_level=0)
    first, before = load(), file.stat()
    save(file, ~INSIDE * np.uint8(255), compress_level=0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    field = "images" if folder == "images" else "masks"
    assert np.array_equal(getattr(load(), field)[1], 255 - getattr(first, field)[1])


def test_a_file_of_another_length_is_decoded_again_though_its_time_is_the_same(here, load):
    file = here / "images" / "covid_10.png"
    load()
    before = file.stat()
    save(file, np.zeros((SIZE, SIZE), np.uint8))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not load().images[1].any()


def test_files_that_come_and_go_are_seen(here, load):
    for file in here.glob("*/*"):  # all of one length and one time: only the names tell
        save(file, np.asarray(Image.open(file)), compress_level=0)
        os.utime(file, (0, 0))
    first = load()
    for folder in here.iterdir():
        (folder / "covid_1.png").rename(folder / "covid_3.png")
    s = load()
    assert s.names[:3] == ["COVID-19/covid_10.png", "COVID-19/covid_2.PNG", "COVID-19/covid_3.png"]
    assert np.array_equal(s.images[:3], first.images[[1, 2, 0]])
    assert np.array_equal(s.masks[:3], first.masks[[1, 2, 0]])


@pytest.fixture
def cached(load, tmp_path):
    """A split that was loaded, and the file that caches its masks of COVID-19."""
    split = load()
    (file,) = (tmp_path / "cache").glob("Train-COVID-19-lung masks-*")
    return split, file


def contents(file):
    """The places in a zip file of what its checksums cover: every byte of every member."""
    places = []
    with zipfile.ZipFile(file) as z:
        for member in z.infolist():
            with open(file, "rb") as f:
                f.seek(member.header_offset + 26)  # two lengths end the 30 bytes of a local header
                name, extra = struct.unpack("<HH", f.read(4))
            first = member.header_offset + 30 + name + extra
            places += range(first, first + member.compress_size)
    return places


def test_a_flipped_byte_anywhere_in_the_cache_is_noticed_or_harmless(cached, load, capsys):
    """Each 7th byte and 300 random bits: the pixels are exact every time.

    A flipped bit in an array is said, and the file is written anew. Dates and the like may pass.
    """
    first, file = cached
    good, held = file.read_bytes(), set(contents(file))
    rng = np.random.default_rng(0)
    bits = {(at, 4) for at in (*range(0, len(good), 7), len(good) - 1)}
    bits |= {divmod(bit, 8) for bit in rng.integers(0, 8 * len(good), 300).tolist()}
    noticed = set()
    for at, bit in sorted(bits):
        bad = bytearray(good)
        bad[at] ^= 1 << bit
        file.write_bytes(bad)
        assert same(load(), first), (at, bit)
        err = capsys.readouterr().err
        if err:
            assert re.fullmatch(rf"cache {re.escape(str(file))} is damaged \(.+\); .*again\n", err)
            assert file.read_bytes() == good, "it should have been written anew"
            noticed.add(at)
        else:
            assert file.read_bytes() == bad
            file.write_bytes(good)
    assert held & {at for at, _ in bits} <= noticed
    assert len(held) > 0.5 * len(good)


def test_pixels_that_changed_in_the_cache_are_a_wrong_checksum(cached, load, capsys):
    first, file = cached
    content = bytearray(file.read_bytes())
    content[contents(file)[-1]] ^= 1  # the last pixel
    file.write_bytes(content)
    assert same(load(), first)
    said = f"cache {file} is damaged (wrong checksum); decoding the images again\n"
    assert capsys.readouterr().err == said


def npy():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


FOREIGN = {
    "short": lambda b: b[:-1],
    "half": lambda b: b[: len(b) // 2],
    "head only": lambda b: b[:40],
    "tail only": lambda b: b[40:],
    "empty": lambda b: b"",
    "foreign": lambda b: b"PK\x03\x04 something else",
    "text": lambda b: b"data.py-cache 0123 4567\n",
    "zeros": lambda b: bytes(1000),
    "npy": lambda b: npy(),
    "pickle": lambda b: pickle.dumps([1, 2, 3]),
    "zip of nothing": lambda b: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_truncated_or_foreign_cache_is_rebuilt_and_that_is_said(load, tmp_path, capsys, kind):
    first = load()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(FOREIGN[kind](file.read_bytes()))
    assert same(load(), first)
    err = capsys.readouterr().err
    assert err.count("is damaged") == err.count("\n") == 6
    assert same(load(), first) and capsys.readouterr().err == ""


def test_what_follows_a_whole_cache_file_does_no_harm(cached, load, capsys):
    first, file = cached
    file.write_bytes(file.read_bytes() + b"x")
    assert same(load(), first)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, change",
    [
        ("pixels", lambda a: a[:1]),  # it would be repeated
        ("pixels", lambda a: a[:, :4, :4]),
        ("pixels", lambda a: a.astype(np.float64)),  # it would be cast
        ("pixels", lambda a: a.astype(np.int8)),
        ("pixels", lambda a: a.astype(object)),  # pickled
        ("pixels", lambda a: None),
        ("shapes", lambda a: a[:1]),
        ("shapes", lambda a: a[:, :1]),
        ("shapes", lambda a: a.astype(np.int64)),
        ("shapes", lambda a: None),
        ("fingerprint", lambda a: None),
    ],
)
def test_a_cache_of_another_shape_or_type_is_damaged(cached, load, capsys, name, change):
    first, file = cached
    with np.load(file) as arrays:
        arrays = dict(arrays)
    arrays[name] = change(arrays[name])
    np.savez(file, **{key: a for key, a in arrays.items() if a is not None})
    assert same(load(), first)
    err = capsys.readouterr().err
    assert err.startswith(f"cache {file} is damaged (") and err.count("\n") == 1
    assert same(load(), first) and capsys.readouterr().err == ""


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_cache_is_unpickled(cached, load, tmp_path, capsys):
    first, file = cached
    with np.load(file) as arrays:
        arrays = dict(arrays)
    arrays["pixels"] = np.array([MakesFolder(str(tmp_path / "made"))], object)
    np.savez(file, **arrays)
    assert same(load(), first)
    assert not (tmp_path / "made").exists()
    assert capsys.readouterr().err.startswith(f"cache {file} is damaged (")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_what_is_no_file_in_the_place_of_a_cache_is_said_and_no_obstacle(
    cached, load, capsys, make
):
    """A folder, a pipe and a device: nothing waits for what is in them."""
    first, file = cached
    file.unlink()
    make(file)
    assert same(load(), first)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"cache cannot be written ({file}: is there, and is not a file);")
    assert not file.is_file() and file.exists()


def test_a_stale_cache_is_decoded_again_and_nothing_is_said(here, load, capsys):
    load()
    save(here / "images" / "covid_10.png", np.zeros((SIZE, SIZE), np.uint8))
    load()
    assert capsys.readouterr().err == ""


def test_an_interrupted_write_leaves_no_cache(load, tmp_path, monkeypatch, decoded):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(data.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert list((tmp_path / "cache").iterdir()) == []
    load()
    assert decoded == [14, 14]


def test_the_cache_file_appears_under_its_name_only_when_it_is_whole(load, tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def look(temporary, file):
        seen.append(file.exists() or temporary.parent != file.parent)
        replace(temporary, file)

    monkeypatch.setattr(data.os, "replace", look)
    load()
    assert seen == [False] * 6


def test_an_interrupted_decoding_stops_at_once_and_leaves_no_cache(
    here, load, tmp_path, monkeypatch
):
    def interrupt(done, total):
        raise KeyboardInterrupt

    def slow_read(path):
        reads.append(path)
        time.sleep(0.01)
        return GRAY

    with pytest.raises(KeyboardInterrupt):
        load(progress=interrupt)
    assert not (tmp_path / "cache").exists()

    reads = []
    monkeypatch.setattr(data, "read_gray", slow_read)
    with pytest.raises(KeyboardInterrupt):
        data.decode([here / "images" / "covid_1.png"] * 50, SIZE, interrupt, workers=1)
    assert len(reads) < 25


def test_a_cache_that_cannot_be_written_is_one_line_and_no_obstacle(load, tmp_path, capsys):
    first = load()
    (tmp_path / "a file").write_text("in the way")
    assert same(load(cache=tmp_path / "a file"), first)
    err = capsys.readouterr().err
    assert err.startswith("cache cannot be written (") and err.count("\n") == 1


def test_a_change_of_the_decoding_makes_older_caches_stale(load, decoded, monkeypatch):
    load()
    monkeypatch.setattr(data, "CACHE_FORMAT", data.CACHE_FORMAT + 1)
    load()
    assert decoded == [14, 14]


# ---------------------------------------- progress


def test_progress_counts_every_file_to_be_decoded(load):
    calls = []
    load(progress=lambda *a: calls.append(a))
    assert calls == [(i, 14) for i in range(1, 15)]


@pytest.mark.parametrize("share, out", [(0.2, [4, 9]), (0.5, [1, 3, 5, 7, 9]), (0.25, [3, 7])])
def test_what_is_held_out_is_spread_evenly_and_nothing_is_in_both_parts(share, out):
    """Ten images: every fifth, second, fourth. Image, mask and name stay together."""
    numbers = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    whole = data.Split(numbers, numbers + 100, [str(i) for i in range(10)])
    learned, held_out = data.divided(whole, share)
    assert held_out.images.ravel().tolist() == out
    assert sorted([*learned.images.ravel(), *held_out.images.ravel()]) == list(range(10))
    for part in (learned, held_out):
        assert (part.masks - part.images == 100).all()
        assert part.names == [str(i) for i in part.images.ravel()]
    assert data.divided(whole._replace(masks=None), share)[1].masks is None


def test_a_loop_of_links_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop/x: no data for lung: no such folder"):
        data.tree_folder(tmp_path / "loop" / "x", "lung")
