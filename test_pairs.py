"""Your own images: what is paired with what, how it is divided, and what is refused in which words.

Every folder is a tiny one, written here. The gray of an X-ray, or the area of a mask, is its number
in the list of names.
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare
import data
import pairs
import phantoms
import train
from console import UserError
from data import SPLITS
from testing import CPU, TINY, results_of

SIZE = 16
NAMES = [f"chest {i}" for i in range(1, 13)]  # 1 is the beginning of 10, 11 and 12


def xray(i):
    """X-ray number i: all of one gray, but for a corner that differs from one to the next."""
    a = np.full((SIZE, SIZE), 20 + 15 * i, np.uint8)
    a[:4, :4] = np.random.default_rng(i).integers(0, 256, (4, 4))
    return a


def mask(i):
    """Its mask: i + 1 rows are inside."""
    return np.uint8(255) * np.broadcast_to(np.arange(SIZE)[:, None] <= i, (SIZE, SIZE))


def save(path, a, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **options)
    return path


def write(root, images="{}.png", masks="{}.png", names=NAMES):
    """images/ and masks/ of these names."""
    for i, name in enumerate(names):
        save(root / "images" / images.format(name), xray(i))
        save(root / "masks" / masks.format(name), mask(i))
    return root


@pytest.fixture
def own(tmp_path):
    return write(tmp_path / "own")


def load_all(root, cache, **options):
    """{number of the image: number of its mask} of all splits, read from the pixels."""
    found = {}
    for split in SPLITS:
        s = pairs.load(pairs.find(root)[0], split, SIZE, cache=cache, **options)
        assert s.images.shape == s.masks.shape == (len(s.names), 1, SIZE, SIZE)
        grays = (s.images[:, 0, -1, -1].astype(int) - 20 + 7) // 15
        found |= dict(zip(grays.tolist(), ((s.masks[:, 0, :, 0] > 0).sum(1) - 1).tolist()))
        assert set(np.unique(s.masks)) <= {0, 255}
    return found


ITSELF = {i: i for i in range(len(NAMES))}

# ---------------------------------------- who belongs to whom


@pytest.mark.parametrize(
    "images, masks, words",
    [
        ("{}", "{}", ""),
        ("{}", "{}_mask", "masks are named NAME_mask"),
        ("{}", "mask of {}", "masks are named mask of NAME"),
        ("{} xray", "{}", "masks are named NAME where images are named NAME xray"),
        ("img-{}", "mask-{}", "masks are named mask-NAME where images are named img-NAME"),
        ("{}.a", "{}.b", "masks are named NAME.b where images are named NAME.a"),
        ("2021_{}_0", "2021_{}_0_mask", "masks are named NAME_mask"),
        ("a ({})", "a ({})_mask", "masks are named NAME_mask"),
    ],
)
@pytest.mark.parametrize("numbers", [NAMES, [name[6:] for name in NAMES]])
def test_a_mask_is_found_by_what_all_names_have_in_common(tmp_path, images, masks, words, numbers):
    """Each image has the mask of its own number, also where the names are numbers."""
    write(tmp_path, f"{images}.png", f"{masks}.png", numbers)
    assert load_all(tmp_path, tmp_path / "cache") == ITSELF
    line = pairs.find(tmp_path)[1]
    assert line.startswith(f"{tmp_path}: 12 pairs, 8 Train, 2 Val, 2 Test")
    assert words in line and ("named" in line) == bool(words)


def test_a_name_does_not_end_within_a_number():
    """patient01 is not the image of seg31, though all nine names end alike."""
    images, masks = ([f"{word}{i}" for i in range(1, 10)] for word in ("patient0", "seg3"))
    assert pairs.naming(images, masks) == ({}, "")


def test_few_names_decide_nothing():
    """What else is in the folder of masks is left over: it pairs less than half."""
    images = ["a", "b", "c"]
    assert pairs.naming(images, ["a", "b", "a_old"])[0] == {"a": "a", "b": "b"}
    assert pairs.naming(images, ["x_1", "y_2", "a_mask"])[0] == {}
    assert pairs.naming(images, ["a", "y", "z"])[0] == {"a": "a"}


def test_the_division_by_you_is_kept(tmp_path):
    """A name may be in several splits. What is alone is said with its split."""
    parts = {"Train": NAMES[:6], "Val": NAMES[:2], "Test": NAMES[4:6]}
    for split, names in parts.items():
        write(tmp_path / split, "{}.png", "{}_m.png", names)
    (tmp_path / "Val" / "images" / "chest 1.png").unlink()
    found, line = pairs.find(tmp_path)
    for split, names in parts.items():
        s = pairs.load(found, split, SIZE, cache=tmp_path / "cache")
        expected = [f"{split}/{name}.png" for name in names]
        assert s.names == [n for n in expected if n != "Val/chest 1.png"]
    assert "9 pairs, 6 Train, 1 Val, 2 Test; masks are named NAME_m" in line
    assert line.endswith("masks without an image: Val/chest 1_m.png")


def test_what_is_left_over_is_said_five_of_a_kind(own):
    """And what hides itself is no file of yours."""
    for i in range(7):
        save(own / "images" / f"alone {i}.tif", xray(0))
    save(own / "masks" / "other.png", mask(0))
    for name in ("notes.txt", "scan.dcm", ".DS_Store", "Thumbs.db"):
        (own / "images" / name).write_bytes(b"x")
    (own / "masks" / "more").mkdir()
    line = pairs.find(own)[1]
    alone = ", ".join(f"alone {i}.tif" for i in range(5))
    assert line == (
        f"{own}: 12 pairs, 8 Train, 2 Val, 2 Test; images without a mask: {alone} and 2 more; "
        "masks without an image: other.png; "
        "no image files: images/notes.txt, images/scan.dcm, masks/more"
    )


# ---------------------------------------- files


def test_images_are_known_by_the_suffixes_of_the_formats_that_are_read(tmp_path):
    """In upper case too. PDF, PostScript and DICOM are not among them."""
    images = [f"a{s}" for s in (".bmp", ".gif", ".jfif", ".jp2", ".JPEG", ".jpg", ".pgm", ".png")]
    images += [f"a{suffix}" for suffix in (".ppm", ".TIF", ".tiff", ".webp")]
    others = ["a.dcm", "a.eps", "a.nii.gz", "a.pdf", "png"]
    for name in (*images, *others):
        (tmp_path / name).touch()
    assert pairs.image_files(tmp_path) == (sorted(images), others)


WAYS = {  # suffix of the file: how an X-ray is stored
    "png": lambda a: Image.fromarray(a),
    "PNG": lambda a: Image.fromarray(a).convert("RGB"),
    "tif": lambda a: Image.fromarray(a.astype(np.uint16) * 257),
    "tiff": lambda a: Image.fromarray(a).convert("RGBA"),
    "BMP": lambda a: Image.fromarray(a).convert("P"),
    "pgm": lambda a: Image.fromarray(a),
    "gif": lambda a: Image.fromarray(a),
}


def test_every_format_and_depth_reads_the_same_and_a_mask_may_have_another(tmp_path):
    """16 bits, gray stored as colour, a palette; masks of 0 and 1, 255 or 65535, and of one bit."""
    tops = [np.uint8(255), np.uint8(1), np.uint16(65535), np.uint16(1), np.bool(True)]
    ways = list(WAYS.items())
    for i, name in enumerate(NAMES):
        suffix, way = ways[i % len(ways)]
        (tmp_path / "images").mkdir(exist_ok=True)
        way(xray(i)).save(tmp_path / "images" / f"{name}.{suffix}")
        a = (mask(i) > 0) * tops[i % len(tops)]
        save(tmp_path / "masks" / f"{name}{('.png', '.TIF')[i % 2]}", a)
    assert load_all(tmp_path, tmp_path / "cache") == ITSELF
    found = pairs.find(tmp_path)[0]
    for split in SPLITS:
        s = pairs.load(found, split, SIZE, cache=tmp_path / "cache")
        for name, image in zip(s.names, s.images):
            assert np.array_equal(image[0], xray(NAMES.index(Path(name).stem)))


def as_jpeg(a, **options):
    """The values that an array has after a JPEG file, as of the report's 256x256 masks."""
    file = io.BytesIO()
    Image.fromarray(a).save(file, "JPEG", **options)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_the_ringing_of_a_jpeg_mask_is_cut_at_the_middle_and_said(tmp_path, quality):
    """The lungs of a phantom: the very pixels come back, of gray and of colour files."""
    lungs = [phantoms.phantom(0, i, "Normal", 128)[1] for i in range(3)]
    for i, lung in enumerate(lungs):
        save(tmp_path / "images" / f"{i}.jpg", np.zeros((128, 128), np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture = Image.fromarray(np.uint8(255) * lung).convert(("L", "RGB", "L")[i])
        picture.save(tmp_path / "masks" / f"{i}.JPG", quality=quality)
    assert len(np.unique(as_jpeg(np.uint8(255) * lungs[0], quality=quality))) > 10
    found, line = pairs.find(tmp_path)
    assert line.endswith("; JPEG masks are cut at 128, if no threshold is given")
    for split in SPLITS:
        s = pairs.load(found, split, 128, cache=tmp_path / "cache")
        for name, m in zip(s.names, s.masks):
            assert np.array_equal(m[0] > 0, lungs[int(name[0])])


@pytest.mark.parametrize("grays", [(0, 127, 255), (0, 60), (0, 1, 2)])
def test_a_jpeg_mask_that_is_not_black_and_white_is_refused(tmp_path, grays):
    """Three areas; too dark; noise around 0."""
    a = np.repeat(np.resize(np.uint8(grays), 8), 8)
    path = save(tmp_path / "m.jpg", np.tile(a, (64, 1)), quality=95)
    assert len(np.unique(data.gray_values(path))) > 1
    with pytest.raises(UserError, match=r"m\.jpg: a mask has the values 0 and 255, or 0 and 1"):
        data.read_mask(path)


@pytest.mark.parametrize("kind, top", [(np.uint8, 255), (np.uint16, 65535)])
def test_a_threshold_takes_what_is_n_or_more_as_the_file_stores_it(tmp_path, kind, top):
    """Every N and every value around it; masks of 0 and 1 too."""
    values = np.unique(np.clip([0, 1, 2, 99, 100, 101, top - 1, top], 0, top)).astype(kind)
    path = save(tmp_path / "m.png", np.tile(values, (8, 1)))
    for n in (1, 2, 100, top):
        inside = data.read_mask(path, n)
        assert inside.dtype == bool and (inside == (values >= n)).all()
    for n in (None, 0):
        with pytest.raises(UserError, match="a mask has the values") as e:
            data.read_mask(path, n)
        assert ("--set threshold=N" in str(e.value)) == (n == 0)


def test_another_threshold_is_not_answered_by_the_cache(own, tmp_path):
    """Masks of 0, 100 and 200: two thresholds, and the first again."""
    for i, name in enumerate(NAMES):
        save(own / "masks" / f"{name}.png", np.where(mask(i) > 0, np.uint8(100), np.uint8(0)))
        a = np.array(Image.open(own / "masks" / f"{name}.png"))
        a[0, 8:] = 200
        save(own / "masks" / f"{name}.png", a)
    found = pairs.find(own)[0]
    for n, row in ((50, SIZE), (150, SIZE // 2), (50, SIZE)):
        s = pairs.load(found, "Train", SIZE, n, tmp_path / "cache")
        assert ((s.masks[:, 0, 0] > 0).sum(1) == row).all()


def test_a_folder_is_decoded_once_and_blank_masks_are_masks(own, tmp_path):
    """All three splits of a folder are in one cache."""
    for name in NAMES[:5]:
        save(own / "masks" / f"{name}.png", np.zeros((SIZE, SIZE), np.uint8))
    seen = []
    found = load_all(own, tmp_path / "cache", progress=lambda *done: seen.append(done))
    assert found == ITSELF | dict.fromkeys(range(5), -1)
    assert seen == [(i, 24) for i in range(1, 25)]


# ---------------------------------------- the division


@pytest.mark.parametrize(
    "n, counts", [(3, (1, 1, 1)), (12, (8, 2, 2)), (30, (19, 5, 6)), (100, (64, 16, 20))]
)
def test_images_are_divided_64_16_20(n, counts):
    """And every thousand exactly so."""
    split_of = pairs.divide({f"{i}": f"{i}" for i in range(n)})
    assert [list(split_of.values()).count(split) for split in SPLITS] == list(counts)
    split_of = pairs.divide({f"a{i}": f"a{i}" for i in range(1000)})
    assert [list(split_of.values()).count(split) for split in SPLITS] == [640, 160, 200]


def test_the_division_knows_the_names_alone(own, tmp_path):
    """Not the order, the seed of a run, the pixels, the folder, nor the suffix of a file."""
    stems = {name: name for name in NAMES}
    assert pairs.divide(stems) == pairs.divide(dict(reversed(stems.items())))
    other = write(tmp_path / "other", "{}.tif", "{}.bmp", NAMES[::-1])
    ours, theirs = (pairs.find(root)[0] for root in (own, other))
    assert {p.name[:-4]: p.split for p in ours} == {p.name[:-4]: p.split for p in theirs}
    assert pairs.divide(stems) == {p.name[:-4]: p.split for p in ours}
    many = {f"{i}": f"{i}" for i in range(900)}
    halves = [[s for n, s in pairs.divide(many).items() if int(n) % 2 == k] for k in (0, 1)]
    shares = [half.count("Train") / 450 for half in halves]  # no pattern of the numbers
    assert np.allclose(shares, 0.64, atol=0.06)


@pytest.mark.parametrize(
    "group, patient",
    [(r"^p\d+", lambda s: s.split("_")[0]), (r"_(left|right)", lambda s: s.split("_")[1])],
)
def test_the_images_of_a_patient_stay_together(group, patient):
    """The whole match, or its first group."""
    stems = [f"p{i}_{side}_{k}" for i in range(40) for side in ("left", "right") for k in "ab"]
    stems += ["p40_front_a", "p41_back_b"]
    if "left" in group:
        group = "_(left|right|front|back)"
    patients = pairs.patients_of(stems, group)
    assert patients == {stem: patient(stem) for stem in stems}
    split_of = pairs.divide(patients)
    homes = {p: {split_of[s] for s in stems if patients[s] == p} for p in patients.values()}
    assert all(len(splits) == 1 for splits in homes.values())
    assert set(split_of.values()) == set(SPLITS)
    if len(homes) > 4:
        share = list(split_of.values()).count("Train") / len(stems)
        assert abs(share - 0.64) < 0.03


def test_a_patient_in_two_splits_of_yours_is_refused(tmp_path):
    """Where --group says who is who."""
    for split, names in (("Train", ["1_a", "2_a"]), ("Val", ["3_a"]), ("Test", ["2_b"])):
        write(tmp_path / split, names=names)
    assert len(pairs.find(tmp_path)[0]) == 4
    with pytest.raises(UserError, match=r"two splits, got \^\\d\+: it finds 2 in two"):
        pairs.find(tmp_path, r"^\d+")


def test_split_csv_lists_every_image_and_tells_of_every_change(own, tmp_path):
    """A comma, a quote, a new line and a byte that is no UTF-8 are parts of a name."""
    odd = os.fsdecode(b'a,"b"\nc\xff')
    write(own, names=[odd])
    found = pairs.find(own)[0]
    file = tmp_path / "split.csv"
    file.write_bytes(pairs.as_csv(found))
    lines = file.read_bytes().splitlines()
    assert lines[0] == b"image,split" and b"chest 1.png,Train" in lines
    assert b'"a,""b""' in lines
    pairs.verify(file, found)
    with pytest.raises(UserError, match=r"split\.csv: .*: chest 1\.png; put the files back"):
        pairs.verify(file, [pair for pair in found if pair.name != "chest 1.png"])
    other = {"Train": "Test", "Test": "Train", "Val": "Val"}
    changed = [pair._replace(split=other[pair.split]) for pair in found]
    with pytest.raises(UserError, match=r"another split since: .* and \d+ more; "):
        pairs.verify(file, changed)
    file.unlink()
    with pytest.raises(UserError, match="is missing; begin a new run"):
        pairs.verify(file, found)


# ---------------------------------------- near duplicates


def split_of(images, name):
    """A data.Split of these images."""
    pixels = np.stack(images)[:, None]
    return data.Split(pixels, None, [f"{name} {i}" for i in range(len(images))])


def copies(a):
    """What becomes of a picture on its way through other hands."""
    n = len(a)
    small = Image.fromarray(a).resize((3 * n // 4, 3 * n // 4), Image.Resampling.BICUBIC)
    yield as_jpeg(a, quality=50)
    yield np.asarray(small.resize((n, n), Image.Resampling.BICUBIC))
    yield (255 * (a / 255) ** 0.7).astype(np.uint8)
    yield np.clip(1.3 * a.astype(float) - 30, 0, 255).astype(np.uint8)


def test_copies_across_splits_are_found_and_no_two_phantoms_are_taken_for_copies():
    """60 phantoms of all classes; of four, four copies each are in another split."""
    chests = [phantoms.phantom(0, i, data.CLASSES[i % 3], 128)[0] for i in range(60)]
    small = [data.resize_image(a, 64) for a in chests]
    splits = dict(zip(SPLITS, (small[:40], small[40:50], small[50:])))
    splits = {name: split_of(images, name) for name, images in splits.items()}
    assert pairs.near_duplicates(splits) == []
    for i in (0, 13, 44):
        copied = [data.resize_image(np.ascontiguousarray(a), 64) for a in copies(chests[i])]
        name = next(n for n, s in splits.items() if (s.images[:, 0] == small[i]).all((1, 2)).any())
        other = "Test"
        extra = split_of(copied, "copy")
        pixels = np.concatenate([splits[other].images, extra.images])
        names = [*splits[other].names, *extra.names]
        found = pairs.near_duplicates(splits | {other: data.Split(pixels, None, names)})
        row = (splits[name].images[:, 0] == small[i]).all((1, 2)).argmax()
        assert {frozenset(line.split(" and ")) for line in found} == {
            frozenset((f"{name} {row}", f"copy {c}")) for c in range(4)
        }


def test_what_all_chests_have_in_common_makes_no_near_duplicate():
    """The same shading, to which each adds fine structure of its own, a tenth as strong."""
    rng, shading = np.random.default_rng(0), np.linspace(20, 220, 16)[:, None]
    a, b = (np.uint8(shading + rng.uniform(-15, 15, (16, 16))) for _ in range(2))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97
    assert pairs.near_duplicates({"Train": split_of([a], "T"), "Val": split_of([b], "V")}) == []


def test_the_most_alike_come_first_and_copies_within_a_split_are_no_leak():
    """The same picture, then a blurred one."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 16, 16), np.uint8)
    near = np.clip(b + rng.normal(0, 8, (16, 16)), 0, 255).astype(np.uint8)
    splits = {"Train": split_of([a, b], "T"), "Val": split_of([near, a, a], "V")}
    assert pairs.near_duplicates(splits) == ["T 0 and V 1", "T 0 and V 2", "T 1 and V 0"]


# ---------------------------------------- a run


@pytest.fixture
def go_own(own, tmp_path, elsewhere, no_pictures):
    """go_own("words") trains a tiny run on the folder. Returns (exit status, run folder)."""

    def go(words="", out="run", given=TINY):
        given = given.replace("--steps 4", "--steps 1")
        line = ["--task", "masks", "--data", str(own), *given.split(), "--out", str(tmp_path / out)]
        return train.main([*line, *words.split()]), tmp_path / out

    return go


def test_a_run_has_a_table_of_its_own_numbers_alone_and_test_where_asked_for(go_own, own, capsys):
    """The eight metrics of Train, Val and Test; who is where stands in split.csv."""
    status, folder = go_own("--test --ensemble 2")
    assert status == 0
    assert pairs.find(own)[1] in capsys.readouterr().out
    title, _, *rows = (folder / "table.md").read_text().splitlines()
    assert title == (
        "| masks, concat, step 1, X-rays | here: 4 of train | **here: 2 of validation** "
        "| mean ± sd of the images |"
    )
    evaluation = results_of(folder)["evaluation"]
    names = [row.split(" | ")[0][2:] for row in rows[: rows.index("")]]
    assert names == list(evaluation["Val"]["pooled"])
    assert rows[-1].startswith("At the size of the files, validation: DICE ")
    assert "**here: 2 of Test**" in (folder / "test.md").read_text()
    assert "lungs" not in evaluation["Val"]["share"]
    assert (folder / "split.csv").read_bytes() == pairs.as_csv(pairs.find(own)[0])


@pytest.fixture
def seen(monkeypatch):
    """The names of the images that each run is given, by split."""
    names, init = [], train.Run.__init__

    def noted(self, cfg, device, path, splits, *rest):
        names.append({name: split.names for name, split in splits.items()})
        init(self, cfg, device, path, splits, *rest)

    monkeypatch.setattr(train.Run, "__init__", noted)
    return names


def test_the_images_of_a_run_are_those_of_split_csv(go_own, own, seen):
    """Held out from Train: Val and Test stay unseen. Another seed has the same."""
    lines = pairs.as_csv(pairs.find(own)[0]).decode().splitlines()[1:]
    names = {s: [n for n, split in (line.split(",") for line in lines) if split == s]
             for s in SPLITS}  # fmt: skip
    for i, words in enumerate(("", "--seed 5", "--set held_out=0.25", "--model unet")):
        rest = TINY.replace("--ddim-steps 2 ", "") if "unet" in words else TINY
        assert go_own(words, f"run {i}", rest)[0] == 0
    whole = {name: names[name] for name in ("Train", "Val")}
    assert seen[0] == seen[1] == seen[3] == whole
    assert seen[2]["Val"] == names["Train"][3::4]
    assert sorted(seen[2]["Train"] + seen[2]["Val"]) == names["Train"]


def test_a_resumed_run_has_the_same_patients_wherever_the_folder_is(go_own, own, tmp_path, seen):
    """With the --group and the threshold that it began with."""
    status, folder = go_own(r"--group ([24680]|[13579])$ --set threshold=200")
    before = (folder / "split.csv").read_bytes()
    moved = own.rename(tmp_path / "moved")
    assert (
        status == 0 == train.main(["--resume", str(folder), "--data", str(moved), "--steps", "2"])
    )
    assert seen[0] == seen[1] and len(seen[0]["Train"]) == 8
    assert (folder / "split.csv").read_bytes() == before != pairs.as_csv(pairs.find(moved)[0])
    assert results_of(folder)["config"]["data"] == str(moved)


def test_a_run_does_not_go_on_with_other_images(go_own, own, capsys):
    """Neither one more nor one of another name, though as many; a finished run neither."""
    _, folder = go_own()
    capsys.readouterr()
    (own / "images" / "chest 3.png").rename(own / "images" / "chest 13.png")
    (own / "masks" / "chest 3.png").rename(own / "masks" / "chest 13.png")
    for more in ([], ["--steps", "2"], ["--ensemble", "2"]):
        assert train.main(["--resume", str(folder), *more]) == 2
        error = capsys.readouterr().err
        assert "split since: chest 13.png, chest 3.png" in error and error.count("\n") == 1
    assert results_of(folder)["config"]["steps"] == 1


def test_a_comparison_looks_at_the_images_of_split_csv(go_own, own):
    """What was held out of Train, and Test; not where the folder has changed."""
    _, folder = go_own("--set held_out=0.25")
    one = compare.read_run(str(folder), CPU)
    names = {split: [p.name for p in pairs.find(own)[0] if p.split == split] for split in SPLITS}
    assert compare.split_of("held-out", one, own).names == names["Train"][3::4]
    assert compare.split_of("Test", one, own).names == names["Test"]
    (own / "images" / "chest 3.png").unlink()
    with pytest.raises(UserError, match=r"split since: .*; put the files back"):
        compare.split_of("Test", one, own)


def test_a_warning_names_five_near_duplicates_unless_patients_are_named(go_own, own, capsys):
    """All twelve images are the same."""
    for i in range(len(NAMES)):
        save(own / "images" / f"{NAMES[i]}.png", xray(3))
    assert go_own()[0] == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert line.count(" and chest") == 5 and " and 1 more look the same" in line
    assert go_own(r"--group \d+", "grouped")[0] == 0
    assert "warning: " not in capsys.readouterr().out


def test_phantoms_of_ones_own_are_phantoms(own):
    """PHANTOMS.txt beside the folders, or above."""
    assert phantoms.locate(own, "masks") == (own, False)
    for place in (own, own.parent):
        (place / phantoms.PHANTOMS_NOTE).touch()
        assert phantoms.locate(own, "masks") == (own, True)
        (place / phantoms.PHANTOMS_NOTE).unlink()


def test_the_other_tasks_name_the_task_of_such_a_folder(own, tmp_path, capsys):
    """Also of one that is divided by you."""
    (tmp_path / "divided").mkdir()
    shutil.copytree(own, tmp_path / "divided" / "Train")
    for root, task in ((own, "lung"), (tmp_path / "divided", "infection")):
        line = ["--task", task, "--data", str(root), "--device", "cpu"]
        assert train.main(line) == 2
        rule = f"{root}: a folder of images/ and masks/ is for --task masks, got --task {task}\n"
        assert capsys.readouterr().err == f"train.py: error: {rule}"


def test_a_dry_run_says_what_a_run_would_learn_from(own, capsys, tmp_path, elsewhere):
    line = ["--task", "masks", "--data", str(own), "--dry-run", *TINY.split()]
    assert train.main(line) == 0
    out = capsys.readouterr().out
    assert f"  data             {pairs.find(own)[1]}\n" in out
    assert "  Train            8 images" in out and "--group: " in out and "--classes" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


# ---------------------------------------- what is refused


def damaged(own, what):
    """Get one thing wrong."""
    images, masks = own / "images", own / "masks"
    if what.startswith("no "):
        shutil.rmtree(own if what == "no folder" else own / what[3:])
    elif what.startswith("empty "):
        for file in (own / what[6:]).iterdir():
            file.unlink()
    elif what == "nothing":
        shutil.rmtree(images), shutil.rmtree(masks)
    elif what == "a file":
        shutil.rmtree(own)
        own.write_text("x")
    elif what == "upper case":
        images.rename(own / "Images")
    elif what == "images is a file":
        shutil.rmtree(images)
        images.write_text("x")
    elif what == "both layouts":
        (own / "Train").mkdir()
    elif what in ("two of three", "Test without masks", "Val without pairs", "the report's"):
        for split in SPLITS:
            shutil.copytree(images, own / split / "images")
            shutil.copytree(masks, own / split / "masks")
        shutil.rmtree(images), shutil.rmtree(masks)
        if what == "two of three":
            shutil.rmtree(own / "Test")
        elif what == "Test without masks":
            shutil.rmtree(own / "Test" / "masks")
        elif what == "the report's":
            (own / "Lung Segmentation Data").mkdir()
            for split in SPLITS:
                (own / split).rename(own / "Lung Segmentation Data" / split)
        else:
            for i, file in enumerate(sorted((own / "Val" / "masks").iterdir())):
                file.rename(file.with_name(f"{chr(97 + i)}.png"))
    elif what == "DICOM":
        for file in images.iterdir():
            file.rename(file.with_suffix(".dcm"))
    elif what == "subfolders":
        (images / "patient").mkdir()
        for file in list(images.glob("*.png")):
            file.rename(images / "patient" / file.name)
    elif what == "other names":
        for i, file in enumerate(sorted(masks.iterdir())):
            file.rename(masks / f"{chr(97 + i)}.png")
    elif what == "two images":
        save(images / "chest 3.jpg", xray(3))
    elif what == "two masks":
        save(masks / "chest 3.tif", mask(3))
    elif what == "left and right":
        for file in list(masks.iterdir()):
            shutil.copy(file, masks / f"{file.stem}_right.png")
            file.rename(masks / f"{file.stem}_left.png")
    elif what == "two pairs":
        for name in NAMES[2:]:
            (images / f"{name}.png").unlink()
    elif what in ("three values", "gray edges"):
        a = mask(5).copy()
        a[0, : 1 if what == "three values" else 9] = range(100, 101 if what[0] == "t" else 109)
        save(masks / "chest 5.png", a)
    elif what == "a photograph":
        save(masks / "chest 5.jpg", np.arange(256, dtype=np.uint8).reshape(16, 16))
        (masks / "chest 5.png").unlink()
    elif what == "colour":
        for name in NAMES[:7]:
            save(images / f"{name}.png", np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    elif what == "transparent":
        Image.new("LA", (SIZE, SIZE), (9, 9)).save(images / "chest 2.png")
    elif what == "text":
        (images / "chest 2.png").write_text("no image")
    elif what == "half a file":
        file = images / "chest 2.png"
        file.write_bytes(file.read_bytes()[:80])
    elif what == "two frames":
        frame = Image.fromarray(xray(1))
        frame.save(images / "chest 2.png", save_all=True, append_images=[frame.rotate(90)])
    elif what == "float":
        save(images / "chest 2.tif", xray(2).astype(np.float32))
        (images / "chest 2.png").unlink()
    elif what == "CMYK":
        Image.new("CMYK", (SIZE, SIZE)).save(images / "chest 2.tif")
        (images / "chest 2.png").unlink()
    elif what == "another size":
        for name in NAMES[:7]:
            save(masks / f"{name}.png", np.zeros((8, 20), np.uint8))
    elif what == "a pipe":
        (images / "chest 2.png").unlink()
        os.mkfifo(images / "chest 2.png")
        for file in images.glob("chest 1*"):
            file.unlink()
        for file in list(images.glob("chest [3-9]*")):
            file.unlink()
    else:
        assert what == ""


BOTH = "must hold images/ and masks/, or Train/, Val/ and Test/ with images/ and masks/ each"
VALUES = "a mask has the values 0 and 255, or 0 and 1; found"
CUT = "--set threshold=N makes inside what is N or more"
FORMATS = "must hold image files (PNG, JPEG, TIFF, BMP, PPM, GIF, WEBP, JPEG2000)"
WRONG = [  # what, words: the one line; DIR is the folder
    ("no folder", "", "DIR: --data must be a folder, and there is none of that name"),
    ("a file", "", "DIR: --data must be a folder, and there is none of that name"),
    ("nothing", "", f"DIR: {BOTH}; found nothing, but no folder images, masks"),
    ("no images", "", f"DIR: {BOTH}; found masks, but no folder images"),
    ("no masks", "", f"DIR: {BOTH}; found images, but no folder masks"),
    ("upper case", "", f"DIR: {BOTH}; found Images, masks, but no folder images"),
    ("images is a file", "", f"DIR: {BOTH}; found images, masks, but no folder images"),
    ("both layouts", "", f"DIR: {BOTH}, and not some of both; found Train, images, masks"),
    (
        "two of three",
        "",
        f"DIR: {BOTH}; found Train, Val, but no folder Test/images, Test/masks",
    ),
    ("Test without masks", "", f"DIR: {BOTH}; found Test, Train, Val, but no folder Test/masks"),
    ("the report's", "", f"DIR: {BOTH}; the report's data are for --task lung or infection, not"),
    (
        "Val without pairs",
        "",
        "DIR/Val: a mask must have its image's name, as 1.tif or 1_mask.tif for 1.png; "
        "found images chest 1.png, chest 10.png, chest 11.png, chest 12.png, chest 2.png and 7 "
        "more and masks a.png, b.png, ",
    ),
    ("empty images", "", f"DIR/images: {FORMATS}, subfolders are not searched; found nothing"),
    ("empty masks", "", f"DIR/masks: {FORMATS}, subfolders are not searched; found nothing"),
    ("DICOM", "", f"DIR/images: {FORMATS}, subfolders are not searched; found chest 1.dcm, "),
    ("subfolders", "", f"DIR/images: {FORMATS}, subfolders are not searched; found patient"),
    ("a pipe", "", f"DIR/images: {FORMATS}, subfolders are not searched; found chest 2.png"),
    (
        "other names",
        "",
        "DIR: a mask must have its image's name, as 1.tif or 1_mask.tif for 1.png; "
        "found images chest 1.png, ",
    ),
    (
        "two images",
        "",
        "DIR/images: one file of a name is wanted, keep one each of chest 3.jpg and chest 3.png",
    ),
    (
        "two masks",
        "",
        "DIR/masks: one file of a name is wanted, keep one each of chest 3.png and chest 3.tif",
    ),
    (
        "left and right",
        "",
        "an image must have one mask, and masks are named in two ways; keep one of them: "
        "masks are named NAME_left, masks are named NAME_right",
    ),
    (
        "two pairs",
        "",
        "Train, Val and Test need at least 3 images, of 3 patients where --group says so; "
        "found chest 1, chest 2",
    ),
    ("three values", "", f"DIR/masks/chest 5.png: {VALUES} 0, 100, 255; {CUT}"),
    ("gray edges", "", f"DIR/masks/chest 5.png: {VALUES} 0, 100, 101, 102, 103, ... (11 values)"),
    ("a photograph", "", f"DIR/masks/chest 5.jpg: {VALUES} "),
    (
        "colour",
        "",
        "DIR/images/chest 1.png: coloured pixels, a gray image (R = G = B) is wanted (and 6 more "
        "bad files: chest 2.png, chest 3.png, chest 4.png, chest 5.png)",
    ),
    ("transparent", "", "DIR/images/chest 2.png: transparent pixels, an opaque gray image is"),
    ("text", "", "DIR/images/chest 2.png: cannot be read: not an image file"),
    ("half a file", "", "DIR/images/chest 2.png: cannot be read: "),
    ("two frames", "", "DIR/images/chest 2.png: cannot be read: holds 2 frames, one is wanted"),
    ("float", "", "DIR/images/chest 2.tif: pixels of kind F, gray is wanted"),
    ("CMYK", "", "DIR/images/chest 2.tif: pixels of kind CMYK, gray is wanted"),
    (
        "another size",
        "",
        "DIR: an image and its mask must be of one size; not so: "
        "chest 1.png (16x16, its mask 20x8), chest 2.png",
    ),
    ("", "--group (", "--group must be a regular expression, got (: "),
    (
        "",
        r"--group ^1",
        r"--group must find a patient in every name, got ^1: none in chest 1, ",
    ),
    (
        "",
        r"--group \d*",
        r"--group must find a patient in every name, got \d*: none in chest 1, ",
    ),
    (
        "",
        "--group chest",
        "Train, Val and Test need at least 3 images, of 3 patients where --group says so; "
        "found chest",
    ),
    ("", "--classes Normal", "--classes must not be given for --task masks, got Normal"),
    ("", "--set threshold=300", "--set threshold must leave something inside a mask of Train, "),
    ("", "--set threshold=half", "--set threshold must be a whole number, got half"),
]


@pytest.mark.parametrize("what, words, message", WRONG, ids=[f"{w}{f}" for w, f, _ in WRONG])
def test_each_way_to_get_it_wrong_is_one_line_that_says_what_to_do(
    own, tmp_path, capsys, monkeypatch, what, words, message
):
    """Exit status 2, no traceback; nothing is left behind but a cache."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    damaged(own, what)
    before = sorted(p.name for p in tmp_path.iterdir() if p.name != "cache")
    line = ["--task", "masks", "--data", str(own), *TINY.split()]
    line = [word for word in line if not word.startswith("eval_every")]
    assert train.main([*line, *words.split()]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"train.py: error: {message.replace('DIR', str(own))}")
    assert all(text.startswith("decoding ") for text in error[:-1])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == before
    assert len(error[-1]) < 600 and len(WRONG) >= 25
