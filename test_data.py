"""§3.1: what the loader promises. Every tree is a tiny one, written here; no data set is needed."""

import math
import os
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data

NAMES = {
    "COVID-19": ["covid_1.png", "covid_10.png", "covid_2.PNG"],  # code points: 10 before 2
    "Non-COVID": ["non_COVID (1).png", "non_COVID (2).png"],
    "Normal": ["Normal (1).png", "Normal [2].png"],
}
TREE = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data"}
MASKS = {"lung": ["lung masks"], "infection": ["infection masks", "lung masks"]}  # the first is the task's own
SIZE = 8


def save(path, a, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, "PNG", **options)
    return path


def write_tree(root, task="lung", doubled=True, seed=0):
    """All splits and classes with random images, random masks of each kind, and names that differ between splits."""
    rng = np.random.default_rng(seed)
    tree = root / TREE[task] / (TREE[task] if doubled else "")
    for split in data.SPLITS:
        for c in data.CLASSES:
            for name in NAMES[c]:
                name = name if split == "Train" else f"{split} {name}"
                save(tree / split / c / "images" / name, rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
                for kind in MASKS[task]:
                    save(tree / split / c / kind / name, np.uint8(255) * (rng.random((SIZE, SIZE)) < 0.5))
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
        return data.load(root, task, split, *args, **{"image_size": SIZE, "cache": tmp_path / "cache"} | options)

    return load


def same(a, b):
    masks = (a.masks is None) == (b.masks is None) and (a.masks is None or np.array_equal(a.masks, b.masks))
    return masks and np.array_equal(a.images, b.images) and a.names == b.names


# ranges


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


# the horizontal coordinate of affine_grid; linear, so bilinear sampling is exact
RAMP = (2 * (torch.arange(32) + 0.5) / 32 - 1).expand(32, 32)


def augmented(x, n, strength=1.0, seed=0):
    """n draws for one (32, 32) image that is its own mask; the same draws for every image, because the seed is the same."""
    x = x.expand(n, 1, 32, 32).clone()
    return data.augment(x, x, torch.Generator().manual_seed(seed), strength)


def moves_of(n, strength):
    """Contrast, brightness, and the place (n, 2, 32, 32) that each pixel shows, read off images whose values are places."""
    brightness = augmented(torch.zeros(32, 32), n, strength)[0].mean((1, 2, 3))
    contrast = (augmented(torch.full((32, 32), 0.5), n, strength)[0].mean((1, 2, 3)) - brightness) / 0.5
    place = [(augmented(0.5 * r, n, strength)[0][:, 0] - brightness[:, None, None]) / contrast[:, None, None] / 0.5 for r in (RAMP, RAMP.T)]
    return contrast, brightness, torch.stack(place, 1)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_augmentation_is_the_stated_map_within_the_stated_ranges(strength):
    """Ramps give the map back: a rotation times a scale, never a flip; the ends of each range are reached by 2000 draws."""
    contrast, brightness, place = moves_of(2000, strength)
    inner = place[:, :, 12:20, 12:20]  # away from the edge, which repeats
    step = 2 / 32
    matrix = torch.stack([inner.diff(dim=3).mean((2, 3)), inner.diff(dim=2).mean((2, 3))], 2) / step  # columns: right, down
    s = matrix.det().sqrt()
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    torch.testing.assert_close(matrix, s[:, None, None] * rotation, atol=1e-4, rtol=0)
    d = inner.mean((2, 3))
    ranges = [(angle, math.radians(10)), (s.log(), math.log(1.1)), (d[:, 0], 0.1), (d[:, 1], 0.1)]
    for values, largest in ranges + [(contrast.log(), math.log(1.25)), (brightness, 0.2)]:
        largest *= strength
        assert 0.95 * largest < values.max() <= 1.001 * largest and -0.95 * largest > values.min() >= -1.001 * largest
        assert abs(values.mean()) < 0.06 * largest


def test_augmentation_moves_the_mask_with_its_xray_and_keeps_it_two_valued():
    """A disc off the centre: the mask is the disc at the places that the X-ray's own ramps show, up to its pixelated edge."""
    disc = lambda right, down: (right - 0.3) ** 2 + (down + 0.2) ** 2 < 0.16
    _, _, place = moves_of(200, 1.0)
    expected = disc(place[:, 0], place[:, 1])
    mask = augmented(torch.where(disc(RAMP, RAMP.T), 1.0, -1.0), 200)[1]
    assert mask.unique().tolist() == [-1, 1]
    dice = lambda a: 2 * (a & expected).sum((1, 2)) / (a.sum((1, 2)) + expected.sum((1, 2)))
    assert dice(mask[:, 0] > 0).min() > 0.93 and dice(disc(RAMP, RAMP.T).expand(200, 32, 32)).min() < 0.8


def test_augmentation_of_strength_0_changes_nothing_and_stays_within_the_range_otherwise():
    """Strength 0 is the identity; an X-ray that fills -1..1 is clipped to it, not folded or scaled."""
    x = torch.rand(32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    same, mask = augmented(x, 3, 0.0)
    torch.testing.assert_close(same[:, 0], x.expand(3, 32, 32), atol=1e-5, rtol=0)
    assert torch.equal(mask[0, 0] > 0, x > 0)
    assert augmented(0.9 * RAMP.sign(), 50)[0].abs().max() == 1


def test_to_uint8_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        data.to_uint8(torch.tensor([0.0, float("nan")]))


# one file


def test_16_bit_gray_is_scaled_exactly_and_never_clipped(tmp_path):
    v = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = (2 * 255 * v.astype(np.int64) + 65535) // (2 * 65535)  # round(255 v / 65535) in whole numbers
    for suffix in (".png", ".tif"):
        Image.fromarray(v).save(tmp_path / f"v{suffix}")
        assert np.array_equal(data.read_gray(tmp_path / f"v{suffix}"), exact)


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_one_gray_image_in_every_mode_reads_the_same(tmp_path, mode):
    image = Image.fromarray(GRAY.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(GRAY).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "x.png")
    assert np.array_equal(data.read_gray(tmp_path / "x.png"), GRAY)


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
        (Image.fromarray(GRAY), "holds 2 frames", {"save_all": True, "append_images": [Image.fromarray(GRAY.T.copy())]}),
    ],
    ids=["RGB", "RGBA", "palette", "LA", "RGBA-alpha", "tRNS", "frames"],
)
def test_images_that_are_not_one_opaque_gray_picture_are_refused(tmp_path, image, rule, options):
    image.save(tmp_path / "x (1).png", **options)
    with pytest.raises(data.DataError, match=rf"x \(1\)\.png: .*{rule}"):
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
    with pytest.raises(data.DataError, match=rule):
        data.read_gray(tmp_path / f"x.{suffix}")


def test_damaged_files_are_refused(tmp_path):
    good = save(tmp_path / "x.png", GRAY).read_bytes()
    for content in (good[: len(good) // 2], good[:-20], b"not a picture", b""):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(data.DataError, match=r"x\.png: cannot be read: \S"):
            data.read_gray(tmp_path / "x.png")
    with pytest.raises(data.DataError, match=r"gone\.png: cannot be read"):
        data.read_gray(tmp_path / "gone.png")


def test_a_flipped_bit_anywhere_in_the_pixels_of_a_file_is_noticed(tmp_path):
    good = save(tmp_path / "x.png", np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)).read_bytes()
    for at in range(good.index(b"IDAT") + 4, good.index(b"IEND") - 4):
        bad = bytearray(good)
        bad[at] ^= 4
        (tmp_path / "x.png").write_bytes(bad)
        with pytest.raises(data.DataError, match=r"x\.png: cannot be read"):
            data.read_gray(tmp_path / "x.png")


INSIDE = np.tri(8, dtype=bool)


@pytest.mark.parametrize(
    "a", [INSIDE * np.uint8(255), INSIDE * np.uint8(1), INSIDE * np.uint16(65535), INSIDE * np.uint16(1), INSIDE * np.uint16(255), INSIDE], ids=str
)
def test_a_mask_of_two_values_is_read_at_every_depth(tmp_path, a):
    mask = data.read_mask(save(tmp_path / "m.png", a))
    assert mask.dtype == bool and np.array_equal(mask, INSIDE)


@pytest.mark.parametrize("value, inside", [(0, False), (1, True), (255, True)])
def test_a_mask_of_one_value_is_blank_or_full(tmp_path, value, inside):
    assert (data.read_mask(save(tmp_path / "m.png", np.full((4, 4), value, np.uint8))) == inside).all()


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
    a = np.resize(np.array(values, np.uint8), (6, 6))
    with pytest.raises(data.DataError, match=rf"m\.png: a mask has the values 0 and 255, or 0 and 1; found {found}$"):
        data.read_mask(save(tmp_path / "m.png", a))


# resizing


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
    assert np.array_equal(data.resize_image(GRAY, 8), GRAY) and np.array_equal(data.resize_mask(INSIDE, 8), INSIDE)
    wide = np.repeat(np.array([[10, 200]], np.uint8), 5, 0)  # (5, 2)
    assert data.resize_image(wide, 4).tolist() == [[10, 10, 200, 200]] * 4


# one split


@pytest.mark.parametrize("task", ["lung", "infection"])
def test_each_row_holds_the_image_and_the_mask_of_its_own_name(tmp_path, task):
    tree = write_tree(tmp_path, task)
    for split in data.SPLITS:
        s = data.load(tmp_path, task, split, data.CLASSES, SIZE, tmp_path / "cache")
        assert len(s.names) == 7 and s.images.shape == s.masks.shape == (7, 1, SIZE, SIZE)
        for image, mask, name in zip(s.images, s.masks, s.names):
            c, file = name.split("/")
            assert np.array_equal(image[0], np.asarray(Image.open(tree / split / c / "images" / file)))
            assert np.array_equal(mask[0], np.asarray(Image.open(tree / split / c / MASKS[task][0] / file)))


def test_the_infection_tree_has_lung_masks_too(tmp_path):
    tree = write_tree(tmp_path, "infection")
    s = data.load(tmp_path, "infection", "Val", None, SIZE, tmp_path / "cache", masks="lung masks")
    for mask, name in zip(s.masks, s.names):
        c, file = name.split("/")
        assert np.array_equal(mask[0], np.asarray(Image.open(tree / "Val" / c / "lung masks" / file)))


def test_resized_rows_match_their_names_too(here, load):
    s = load(image_size=4)
    i = s.names.index("COVID-19/covid_10.png")
    a = np.asarray(Image.open(here / "images" / "covid_10.png")).reshape(4, 2, 4, 2).mean((1, 3))
    m = np.asarray(Image.open(here / "lung masks" / "covid_10.png")).reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(s.images[i, 0] - a).max() <= 0.5 and np.array_equal(s.masks[i, 0], 255 * (m >= 127.5))


def test_order_is_class_then_name_whatever_the_directory_says(load, monkeypatch, tmp_path):
    first = load()
    assert first.names == [f"{c}/{name}" for c in data.CLASSES for name in NAMES[c]]
    scandir = os.scandir
    monkeypatch.setattr(data.os, "scandir", lambda path: reversed(list(scandir(path))))
    assert same(load(cache=tmp_path / "other"), first)
    assert load(classes=["Normal", "COVID-19"]).names == first.names[:3] + first.names[5:]


def test_many_threads_decode_what_one_does(tmp_path):
    rng = np.random.default_rng(0)
    paths = [
        save(tmp_path / "images" / f"{i}.png", rng.integers(0, 256, ((512, 8)[i % 2],) * 2, dtype=np.uint8)) for i in range(24)
    ]  # large and small in turn, so that they finish out of order
    alone, together = data.decode(paths, 8, workers=1), data.decode(paths, 8, workers=8)
    assert np.array_equal(alone[0], together[0]) and np.array_equal(alone[1], together[1])
    assert alone[1][:2].tolist() == [[512, 512], [8, 8]] and len({a.tobytes() for a in alone[0]}) == 24


def test_doubled_folder_single_folder_and_the_tree_itself_are_the_same(tmp_path):
    tree = write_tree(tmp_path / "doubled")
    write_tree(tmp_path / "single", doubled=False)
    splits = [data.load(r, "lung", "Val", None, SIZE, tmp_path / "cache") for r in (tmp_path / "doubled", tmp_path / "single", tree, tree.parent)]
    assert all(same(s, splits[0]) for s in splits)


def test_the_other_tasks_tree_is_not_taken_for_this_ones(root):
    for r in (root, root / TREE["lung"], root / TREE["lung"] / TREE["lung"]):
        with pytest.raises(data.DataError, match=r"no data for infection: looked for Train, Val, Test in .*Infection"):
            data.load(r, "infection", "Train")


def test_synthesis_has_the_images_of_lung_and_no_masks(load):
    s = load("synthesis")
    assert s.masks is None and np.array_equal(s.images, load("lung").images) and len(s.names) == 7


def test_infection_means_covid_19_unless_asked_otherwise(tmp_path):
    write_tree(tmp_path, "infection")
    names = [data.load(tmp_path, "infection", "Test", c, SIZE, tmp_path / "cache").names for c in (None, data.CLASSES)]
    assert [len(n) for n in names] == [3, 7] and all(n.startswith("COVID-19/") for n in names[0])


def test_a_choice_of_classes_is_that_part_of_the_whole(load):
    whole, part = load(), load(classes=("Non-COVID",))
    assert part.names == whole.names[3:5] and same(load(classes="Non-COVID"), part)
    assert np.array_equal(part.images, whole.images[3:5]) and np.array_equal(part.masks, whole.masks[3:5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "lungs"}, "task must be one of lung, infection, synthesis; got 'lungs'"),
        ({"split": "train"}, "split must be one of Train, Val, Test; got 'train'"),
        ({"classes": ["Normal", "covid"]}, "classes must be some of COVID-19, Non-COVID, Normal; got 'Normal', 'covid'"),
        ({"classes": []}, "classes must be some of .*; got none"),
        ({"image_size": 0}, "image_size must be 1 or more; got 0"),
    ],
)
def test_arguments_are_refused_by_naming_what_is_allowed(load, options, message):
    with pytest.raises(data.DataError, match=message):
        load(**options)


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


@pytest.mark.parametrize(
    "what, message",
    [
        ("mask", r"images/covid_10\.png: has no mask of the same name$"),
        ("two masks", r"images/covid_10\.png: has no mask of the same name \(and 1 more bad files\)$"),
        ("image", r"images/covid_10\.png: is missing, and has a mask$"),
        ("leak", r"Train/COVID-19/images/covid_10\.png: is in Val too; a file may be in one split only$"),
        ("stray", r"images/notes\.txt: only \.png files belong here$"),
        ("subfolder", r"images/more\.png: only \.png files belong here$"),
        ("empty", r"COVID-19/images: holds no \.png file$"),
        ("folder", r"COVID-19/images: no such folder$"),
        ("size", r"COVID-19/covid_10\.png: the image is \[8, 8\], its mask \[16, 16\] \(H, W\)$"),
        ("gray mask", r"lung masks/covid_10\.png: a mask has the values 0 and 255, or 0 and 1; found 0, 4, 8"),
        ("two colours", r"images/covid_1\.png: coloured pixels.* \(and 1 more bad files\)$"),
    ],
)
def test_bad_data_stops_the_load_and_names_the_file_and_the_rule(here, load, tmp_path, what, message):
    break_(what, here)
    for _ in range(2):  # the second time a cache may answer, and must let nothing through
        with pytest.raises(data.DataError, match=message) as e:
            load()
        assert "\n" not in str(e.value)


def test_a_validation_image_may_not_be_a_training_image(here, load):
    break_("leak", here)
    with pytest.raises(data.DataError, match=r"Val/COVID-19/images/covid_10\.png: is in Train too"):
        load(split="Val")
    with pytest.raises(data.DataError, match="is in Train too"):
        load("synthesis", "Val")
    assert len(load(split="Test").names) == 7


@pytest.mark.parametrize("what", ["gray mask", "two colours"])
def test_a_refused_file_leaves_no_cache(here, load, tmp_path, what):
    break_(what, here)
    with pytest.raises(data.DataError):
        load()
    assert not (tmp_path / "cache").exists()


# the cache


@pytest.fixture
def decoded(monkeypatch):
    """How many files each call of data.decode was asked for."""
    counts, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda paths, *a: counts.append(len(paths)) or decode(paths, *a))
    return counts


def test_the_second_load_decodes_nothing_and_is_the_same(load, decoded):
    assert same(load(), load()) and decoded == [14, 0]


def test_the_tasks_and_any_choice_of_classes_share_the_cache_and_sizes_and_splits_do_not(load, decoded):
    load("synthesis", classes=["Normal"]), load("lung", classes=["Normal"]), load("synthesis")
    assert decoded == [2, 2, 5]
    assert load(image_size=4).images.shape == (7, 1, 4, 4) and load(split="Val").names != load().names
    assert decoded[3:] == [14, 14, 5]


def test_two_data_sets_in_one_cache_keep_apart(tmp_path, load, decoded):
    write_tree(tmp_path / "other", seed=1)
    first = load()
    other = data.load(tmp_path / "other", "lung", "Train", None, SIZE, tmp_path / "cache")
    assert not np.array_equal(first.images, other.images) and same(load(), first) and decoded == [14, 14, 0]


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
    assert np.array_equal(s.images[:3], first.images[[1, 2, 0]]) and np.array_equal(s.masks[:3], first.masks[[1, 2, 0]])


def test_a_flipped_byte_anywhere_in_the_cache_is_noticed(load, tmp_path, capsys):
    first = load()
    file = next((tmp_path / "cache").glob("Train-COVID-19-lung masks-*"))
    good = file.read_bytes()
    for at in (*range(0, len(good), 7), len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x10
        file.write_bytes(bad)
        assert same(load(), first), at
        assert file.read_bytes() == good, "it should have been written anew"
    assert f"cache {file} is damaged (wrong checksum); decoding the images again\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:40], lambda b: b"", lambda b: b + b"x", lambda b: b"PK\x03\x04 something else", lambda b: bytes(1000)],
    ids=["short", "head only", "empty", "long", "foreign", "zeros"],
)
def test_a_truncated_or_foreign_cache_is_rebuilt_and_that_is_said(load, tmp_path, capsys, damage):
    first = load()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert same(load(), first)
    assert capsys.readouterr().err.count("is damaged") == 6
    assert same(load(), first) and capsys.readouterr().err == ""


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


def test_an_interrupted_decoding_stops_at_once_and_leaves_no_cache(here, load, tmp_path, monkeypatch):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(progress=interrupt)
    assert not (tmp_path / "cache").exists()

    read = []
    monkeypatch.setattr(data, "read_gray", lambda path: read.append(path) or time.sleep(0.01) or GRAY)
    with pytest.raises(KeyboardInterrupt):
        data.decode([here / "images" / "covid_1.png"] * 50, SIZE, interrupt, workers=1)
    assert len(read) < 25


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


# progress


def test_progress_counts_every_file_to_be_decoded(load):
    calls = []
    load(progress=lambda *a: calls.append(a))
    assert calls == [(i, 14) for i in range(1, 15)]


def test_the_progress_line_says_rate_and_time_left_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    progress = data.progress_line("decoding")
    for seconds, done in ((1, 500), (20, 1000), (21, 1050), (3719, 33000), (3720, 33920)):
        now[0] = 100.0 + seconds
        progress(done, 33920)
    assert capsys.readouterr().err == (
        "decoding 1000/33920 50/s 10:58 left\n"  # 32920 left, at 1000 in 20 s
        "decoding 33000/33920 8.87/s 1:44 left\n"
        "decoding 33920/33920 9.12/s took 1:02:00\n"
    )


def test_on_a_terminal_the_progress_line_overwrites_itself(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = data.progress_line("x")
    for done in (1, 2, 3):
        now[0] = float(done)
        progress(done, 3)
    lines = ["x 1/3 1.00/s 0:02 left", "x 2/3 1.00/s 0:01 left", "x 3/3 1.00/s took 0:03"]
    assert capsys.readouterr().err == "".join(f"\r{line:<78}" for line in lines) + "\n"


# where the data is


def test_locate_takes_a_given_folder_or_says_what_it_looked_for(root, tmp_path):
    assert data.locate(str(root), "lung") == (root, False)
    with pytest.raises(data.DataError, match=r"no data for infection: looked for Train, Val, Test in .*Infection Segm"):
        data.locate(root, "infection")
    with pytest.raises(data.DataError, match=r"nowhere: no data for lung"):
        data.locate(tmp_path / "nowhere", "lung")


def test_locate_without_a_folder_takes_the_first_home_that_is_there_else_phantoms(root, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA_HOMES", (tmp_path / "nowhere", root))
    assert data.locate(None, "lung") == (root, False)
    with pytest.raises(data.DataError, match="no data for infection"):  # a data set that lacks it is no reason for phantoms
        data.locate(None, "infection")
    monkeypatch.setattr(data, "DATA_HOMES", (tmp_path / "nowhere",))
    assert data.locate(None, "infection") == (data.PHANTOMS, True)


def test_phantoms_given_by_name_are_still_phantoms(root):
    assert not data.locate(root, "lung")[1]
    (root / data.PHANTOMS_NOTE).write_text("generated")
    assert data.locate(root, "lung") == (root, True) and data.locate(root / TREE["lung"], "lung")[1]


# ------------------------------------------------------------------------------------- chest phantoms


@pytest.fixture(scope="module")
def phantoms():
    """24 phantoms of each class at 64x64: {class: (images, lungs, infections)}, each (24, 64, 64)."""
    sets = {c: [data.phantom(7, i, c, 64) for i in range(24)] for c in data.CLASSES}
    return {c: tuple(np.stack(part) for part in zip(*s)) for c, s in sets.items()}


def best_threshold_dice(images, masks):
    """The best pooled DICE of "brighter than c" and "darker than c" over all c."""
    inside, everywhere = (np.bincount(a, minlength=256) for a in (images[masks], images.ravel()))
    best = 0
    for hits, found in ((np.cumsum(inside), np.cumsum(everywhere)), (np.cumsum(inside[::-1]), np.cumsum(everywhere[::-1]))):
        best = max(best, (2 * hits / (found + masks.sum())).max())
    return best


def test_a_phantom_is_a_function_of_seed_index_and_class(phantoms):
    """Drawn again, alone and last first, it is the same; another seed, index or class gives another picture."""
    again = [data.phantom(7, i, "COVID-19", 64) for i in (23, 5)]
    for i, phantom in zip((23, 5), again):
        assert all(np.array_equal(a, b[i]) for a, b in zip(phantom, phantoms["COVID-19"]))
    others = [data.phantom(8, 5, "COVID-19", 64), data.phantom(7, 6, "COVID-19", 64), data.phantom(7, 5, "Normal", 64)]
    assert all(not np.array_equal(again[1][0], other[0]) for other in others)


def test_the_healthy_twin_of_a_phantom_differs_by_its_opacities_alone(monkeypatch):
    """No infection, the same lungs; the very same picture once opacities hold no density; darker where they were; not a Normal phantom."""
    sick, lung, infection = data.phantom(0, 3, "COVID-19")
    twin, same, blank = data.phantom(0, 3, "COVID-19", healthy=True)
    assert np.array_equal(lung, same) and infection.any() and not blank.any()
    brighter = sick.astype(float) - twin
    assert brighter[infection].mean() > 10 + abs(brighter[~lung].mean())
    assert np.array_equal(data.phantom(0, 3, "Normal", healthy=True)[0], data.phantom(0, 3, "Normal")[0])
    assert not np.array_equal(data.phantom(0, 3, "Normal")[0], twin)
    opacity = data._opacity
    monkeypatch.setattr(data, "_opacity", lambda b, kind: [0 * part for part in opacity(b, kind)])
    assert np.array_equal(data.phantom(0, 3, "COVID-19")[0], twin)


def test_the_masks_of_a_phantom_are_those_of_its_class(phantoms):
    """Infection lies within the lungs, in every COVID-19 phantom and in no other; shares of the picture as in real ones."""
    for c, (_, lung, infection) in phantoms.items():
        assert not (infection & ~lung).any() and infection.any((1, 2)).all() == (c == "COVID-19") == infection.any()
        assert 0.15 < lung.mean() < 0.33
    assert 0.06 < phantoms["COVID-19"][2].mean() < 0.17


def test_the_masks_of_a_phantom_fit_its_picture(phantoms):
    """Lung is darker than what lies around it, infection brighter than the lung beside it; masks of the next phantom fit worse."""

    def contrast(images, inside, beside):
        return np.mean([im[a].mean() - im[b].mean() for im, a, b in zip(images, inside, beside) if a.any() and b.any()])

    images, lung, _ = phantoms["Normal"]
    near = np.stack([np.asarray(Image.fromarray(m).resize((64, 64)).convert("L")) > 0 for m in lung])
    around = np.zeros_like(near)
    around[:, 3:-3, 3:-3] = True
    fit = contrast(images, lung, around & ~lung)
    assert fit < -25 and contrast(images, np.roll(lung, 1, 0), around & ~np.roll(lung, 1, 0)) > fit + 3
    images, lung, infection = phantoms["COVID-19"]
    fit = contrast(images, infection, lung & ~infection)
    assert fit > 8
    assert contrast(images, np.roll(infection, 1, 0) & lung, lung & ~np.roll(infection, 1, 0)) < fit / 2


def test_no_threshold_solves_the_phantoms(phantoms):
    """The best single intensity threshold, either way: under 0.80 DICE on lung and under 0.50 on infection."""
    everything = [np.concatenate([phantoms[c][k] for c in data.CLASSES]) for k in (0, 1)]
    assert best_threshold_dice(*everything) < 0.80
    assert best_threshold_dice(phantoms["COVID-19"][0], phantoms["COVID-19"][2]) < 0.50


def test_phantoms_are_written_in_the_layout_and_read_by_the_loader(tmp_path):
    """Both trees at 32x32: what `load` returns is what `phantom` drew, and no picture is in two splits."""
    counts = {split: dict.fromkeys(data.CLASSES, n) for split, n in (("Train", 2), ("Val", 1), ("Test", 1))}
    seen = []
    for tree, task in ((data.TREES["lung"], "lung"), (data.TREES["infection"], "infection")):
        calls = []
        data.write_phantoms(tmp_path, tree, counts, seed=3, size=32, progress=lambda *a, calls=calls: calls.append(a))
        assert calls == [(i, 12) for i in range(1, 13)]
        index = 0
        for split in data.SPLITS:
            got = data.load(tmp_path, task, split, data.CLASSES, 32, tmp_path / "cache")
            row = 0
            for kind, n in counts[split].items():
                for _ in range(n):
                    index += 1
                    image, lung, infection = data.phantom(3, index, kind, 32)
                    assert np.array_equal(got.images[row, 0], image)
                    assert np.array_equal(got.masks[row, 0] > 0, lung if task == "lung" else infection)
                    row += 1
            seen += [image.tobytes() for image in got.images] if task == "lung" else []
    assert len(set(seen)) == 12
    assert data.locate(str(tmp_path), "lung") == (tmp_path, True)


def test_an_interrupted_drawing_leaves_no_tree(tmp_path):
    """Stopped after the third phantom: neither the tree nor a part of it is there, and the next call draws it whole."""

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    tree, counts = data.TREES["lung"], {split: {"Normal": 2} for split in data.SPLITS}
    with pytest.raises(KeyboardInterrupt):
        data.write_phantoms(tmp_path, tree, counts, size=16, progress=stop)
    assert [f.name for f in tmp_path.iterdir()] == [data.PHANTOMS_NOTE]
    data.write_phantoms(tmp_path, tree, counts, size=16)
    assert len(data.load(tmp_path, "lung", "Val", "Normal", 16, tmp_path / "cache").names) == 2


def test_each_task_gets_phantoms_of_its_own(tmp_path, monkeypatch):
    """ensure_phantoms draws the tree of the task, once, and another seed for the other tree."""
    drawn = []
    monkeypatch.setattr(data, "PHANTOMS", tmp_path)
    draw = lambda root, tree, counts, seed, progress: drawn.append((tree, seed)) or (root / tree).mkdir()
    monkeypatch.setattr(data, "write_phantoms", draw)
    for task in ("lung", "synthesis", "infection", "lung"):
        data.ensure_phantoms(task)
    assert drawn == [(data.TREES["lung"], 0), (data.TREES["infection"], 1)]


def test_ctrl_c_while_phantoms_are_drawn_cancels_what_has_not_begun_and_leaves_nothing(tmp_path, monkeypatch):
    """The pool is told to cancel; the tree does not appear, and neither does a half-written one."""
    told = []

    class Pool(data.ProcessPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            told.append(cancel_futures)
            super().shutdown(wait, cancel_futures=cancel_futures)

    def interrupt(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "ProcessPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        data.write_phantoms(tmp_path, "Lung Segmentation Data", {"Train": {"Normal": 50}}, size=16, progress=interrupt)
    assert told[0] is True and [p.name for p in tmp_path.iterdir()] == [data.PHANTOMS_NOTE]
