r"""Your own X-rays and their masks: the files of two folders, paired by name.

    DIR/images/NAME.png           DIR/masks/NAME.png            divided here: 64, 16 and 20 %
    DIR/SPLIT/images/NAME.png     DIR/SPLIT/masks/NAME.png      SPLIT is Train, Val and Test

Files are of any of data.FORMATS, an image and its mask of two if need be; subfolders are not
searched. NAME is the file's name without its suffix. Where masks are named otherwise, as NAME_mask
or mask_1 beside img_1, that is found out and said. Images and masks that have no partner are left
over, and said. What could be meant in two ways is refused.

The division is a function of the names alone: runs of any two seeds are evaluated on the same
images. Its patients, the images that --group puts together, or else single images, are taken from
the largest to the smallest, those of one size in the order of their SHA-256. Each goes to the split
that has none, or the least of its share. A run keeps it in split.csv, and goes on with no other.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
from console import UserError, message, progress_line, refuse
from data import SPLITS

PARTS = ("images", "masks")
SHARES = {"Train": 0.64, "Val": 0.16, "Test": 0.20}  # as COVID-QU-Ex is divided
SHOWN = 5  # names in a message
ALIKE = 0.95  # correlation of two thumbnails from which two images are called near duplicates


class Pair(NamedTuple):
    """An image and its mask."""

    name: str  # of the image's file; Val/a.png where DIR holds Train, Val and Test
    split: str
    folder: Path  # holds images/ and masks/
    image: str  # names of files
    mask: str


# ---------------------------------------- the folders


def listed(names):
    """The first five names, and how many there are beyond."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def digest(name):
    """SHA-256 of a name: an order without a pattern, the same everywhere."""
    return hashlib.sha256(os.fsencode(name)).digest()


def entries(folder):
    """The names in a folder, in the order of code points, without hidden ones and Thumbs.db."""
    names = sorted(os.listdir(folder))
    return [n for n in names if not n.startswith(".") and n.lower() != "thumbs.db"]


def image_files(folder):
    """(names of image files, other names) of a folder. UserError: no folder, no image file in it.

    A file counts as an image by its suffix, in upper or lower case.
    """
    folder = Path(folder)
    refuse(not folder.is_dir(), f"{folder}: must be a folder, and there is none of that name")
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix, name in formats.items() if name in data.FORMATS}
    names = entries(folder)
    images = [n for n in names if Path(n).suffix.lower() in suffixes and (folder / n).is_file()]
    others = sorted(set(names) - set(images))
    rule = f"{folder}: must hold image files ({', '.join(data.FORMATS)})"
    what = listed(others) if others else "nothing"
    refuse(not images, f"{rule}, subfolders are not searched; found {what}")
    return images, others


def by_stem(folder, images):
    """{stem: name} of the image files of a folder. UserError: two of one stem."""
    stems = {}
    for name in images:
        stems.setdefault(Path(name).stem, []).append(name)
    twice = [" and ".join(names) for names in stems.values() if len(names) > 1]
    refuse(twice, f"{folder}: one file of a name is wanted, keep one each of {listed(twice)}")
    return {stem: names[0] for stem, names in stems.items()}


def layout(root):
    """(the folder, {split: folder that holds images/ and masks/}); undivided: {"": folder}.

    UserError: no such folder, or neither of the two layouts.
    """
    root = Path(os.path.realpath(Path(root).expanduser()))
    refuse(not root.is_dir(), f"{root}: --data must be a folder, and there is none of that name")
    found, both = entries(root), "images/ and masks/"
    rule = f"{root}: must hold {both}, or Train/, Val/ and Test/ with {both} each"
    report = "the report's data are for --task lung or infection, not --task masks"
    refuse(set(found) & set(data.TREES.values()), f"{rule}; {report}; found {listed(found)}")
    divided, flat = set(found) & set(SPLITS), set(found) & set(PARTS)
    refuse(divided and flat, f"{rule}, and not some of both; found {listed(found)}")
    folders = {split: root / split for split in SPLITS} if divided else {"": root}
    wanted = [folder / part for folder in folders.values() for part in PARTS]
    missing = [str(path.relative_to(root)) for path in wanted if not path.is_dir()]
    what = listed(found) if found else "nothing"
    refuse(missing, f"{rule}; found {what}, but no folder {listed(missing)}")
    return root, folders


# ---------------------------------------- how masks are named


def ending(image, mask):
    """How the ends of two stems differ: (length of NAME, the image's ending, the mask's).

    NAME is what both begin with. It does not end within a number (1 is no beginning of 10), nor
    with the separator where both go on (001 of 001_image and 001_mask).
    """
    n = len(os.path.commonprefix([image, mask]))
    while n and image[n - 1].isdigit() and any(stem[n:][:1].isdigit() for stem in (image, mask)):
        n -= 1
    while n and not image[n - 1].isalnum() and len(image) > n < len(mask):
        n -= 1
    return n, image[n:], mask[n:]


def renamings(images, masks, way):
    """{(ending of images, ending of masks): {image stem: mask stem}}, the ten likeliest.

    way: 1, or -1 for what the stems begin with. Twenty masks, as they come by their SHA-256, vote
    for the images that have the longest NAME in common with them.
    """
    votes, known = Counter(), set(masks)
    for mask in sorted(masks, key=digest)[:20]:
        found = [ending(image[::way], mask[::way]) for image in images]
        longest = max(n for n, *_ in found)
        votes.update({tuple(ends) for n, *ends in found if n == longest > 0})
    rules = {}
    for (a, b), _ in votes.most_common(10):
        fit = [i for i in images if i[::way].endswith(a) and len(i) > len(a)]
        names = {i: i[::way][: len(i) - len(a)] + b for i in fit}
        rules[a[::way], b[::way]] = {i: m[::way] for i, m in names.items() if m[::way] in known}
    return rules


def naming(images, masks):
    """How masks are named after images: ({image stem: mask stem}, that in words).

    They have equal stems, or one beginning or one ending takes the place of another: what pairs
    more than half of the images or of the masks. Else what equal stems there are.
    images, masks: lists of stems. UserError: two such ways that give an image different masks.
    """
    enough, known = min(len(images), len(masks)) / 2, set(masks)
    same = {stem: stem for stem in images if stem in known}
    found = [(same, "masks are named NAME")] if len(same) > enough else []
    for way in (1, -1) if len(same) < len(known) else ():
        for (a, b), pairs in renamings(images, masks, way).items():
            a, b = (f"NAME{a}", f"NAME{b}") if way == 1 else (f"{a}NAME", f"{b}NAME")
            words = f"masks are named {b}" + (f" where images are named {a}" if a != "NAME" else "")
            found += [(pairs, words)] if len(pairs) > enough else []
    for pairs, words in found[1:]:
        differs = any(pairs.get(stem, mask) != mask for stem, mask in found[0][0].items())
        rule = "an image must have one mask, and masks are named in two ways; keep one of them"
        refuse(differs, f"{rule}: {found[0][1]}, {words}")
    pairs, words = max(found, key=lambda rule: len(rule[0])) if found else (same, "")
    return pairs, words if pairs != same else ""


# ---------------------------------------- pairs and their division


def patients_of(stems, group):
    """{stem: patient}: what the regular expression finds in it, or its first group, if it has one.

    Without one, each stem is a patient. UserError: no regular expression, or a stem without match.
    """
    try:
        pattern = re.compile(group or "(.+)", re.DOTALL)
    except re.error as e:
        raise UserError(f"--group must be a regular expression, got {group}: {e}") from e
    found = {stem: pattern.search(stem) for stem in stems}
    patients = {stem: m and m[1 if pattern.groups else 0] for stem, m in found.items()}
    none = [stem for stem, patient in patients.items() if not patient]
    refuse(none, f"--group must find a patient in every name, got {group}: none in {listed(none)}")
    return patients


def divide(patients):
    """{stem: split} of {stem: patient}, as above. UserError: fewer than three patients."""
    members, count = {}, dict.fromkeys(SPLITS, 0)
    for stem, patient in patients.items():
        members.setdefault(patient, []).append(stem)
    rule = "Train, Val and Test need at least 3 images, of 3 patients where --group says so"
    refuse(len(members) < 3, f"{rule}; found {listed(list(members))}")

    def order(patient):
        return -len(members[patient]), digest(patient)

    split_of = {}
    for patient in sorted(members, key=order):
        n = len(members[patient])
        split = min(SPLITS, key=lambda s: (count[s] > 0, (count[s] + n / 2) / SHARES[s]))
        count[split] += n
        split_of |= dict.fromkeys(members[patient], split)
    return split_of


def find(root, group=""):
    """([Pair, ...] in the order of their names, what was found in one line) of a folder.

    group: the regular expression of --group, see patients_of. No file is opened. UserError: other
    folders than those above; two files of one stem; no pair in a folder; two ways to pair; what
    patients_of and divide refuse; a patient in two splits that are given.
    """
    root, folders = layout(root)
    images, masks, pairs = {}, {}, []
    left = {"images without a mask": [], "masks without an image": [], "no image files": []}
    for split, folder in folders.items():
        for part, stems in zip(PARTS, (images, masks)):
            names, others = image_files(folder / part)
            stems[folder] = by_stem(folder / part, names)
            left["no image files"] += [str(Path(split, part, name)) for name in others]
    mask_of, words = naming(
        *(list(dict.fromkeys(sum(map(list, stems.values()), []))) for stems in (images, masks))
    )
    for split, folder in folders.items():
        both = {i: mask_of[i] for i in images[folder] if mask_of.get(i) in masks[folder]}
        rule = f"{folder}: a mask must have its image's name, as 1.tif or 1_mask.tif for 1.png"
        ours, theirs = (listed(list(stems[folder].values())) for stems in (images, masks))
        refuse(not both, f"{rule}; found images {ours} and masks {theirs}")
        for i, m in both.items():
            image, mask = images[folder].pop(i), masks[folder].pop(m)
            pairs.append(Pair(str(Path(split, image)), split, folder, image, mask))
        left["images without a mask"] += [str(Path(split, n)) for n in images[folder].values()]
        left["masks without an image"] += [str(Path(split, n)) for n in masks[folder].values()]
    pairs = with_splits(sorted(pairs), group)
    count = Counter(pair.split for pair in pairs)
    facts = [f"{len(pairs)} pairs", *(f"{count[split]} {split}" for split in SPLITS)]
    facts = [", ".join(facts), *filter(None, [words])]
    if any(Path(pair.mask).suffix.lower() in data.JPEG for pair in pairs):
        facts.append("JPEG masks are cut at 128, if no threshold is given")
    facts += [f"{what}: {listed(names)}" for what, names in left.items() if names]
    return pairs, f"{root}: {'; '.join(facts)}"


def with_splits(pairs, group):
    """The pairs with their split: a given one stays. UserError: it divides a patient's images."""
    patients = patients_of([Path(pair.name).stem for pair in pairs], group)
    if all(not pair.split for pair in pairs):
        split_of = divide(patients)
        return [pair._replace(split=split_of[Path(pair.name).stem]) for pair in pairs]
    homes = {}
    for pair in pairs if group else ():
        homes.setdefault(patients[Path(pair.name).stem], set()).add(pair.split)
    torn = [patient for patient, splits in homes.items() if len(splits) > 1]
    rule = f"--group must not find a patient in two splits, got {group}"
    refuse(torn, f"{rule}: it finds {listed(torn)} in two; move the images, or leave the flag out")
    return pairs


def as_csv(pairs):
    """split.csv as bytes: the split of each pair, by the name of its image."""
    text = io.StringIO()
    rows = [(pair.name, pair.split) for pair in pairs]
    csv.writer(text, lineterminator="\n").writerows([("image", "split"), *rows])
    return os.fsencode(text.getvalue())


def verify(file, pairs):
    """UserError: the split.csv of a run is missing, or differs from these pairs."""
    rule = f"{file}: must say how the images were divided when the run began"
    refuse(not file.is_file(), f"{rule}, and is missing; begin a new run")
    differ = set(file.read_bytes().splitlines()) ^ set(as_csv(pairs).splitlines())
    names = sorted({os.fsdecode(line).rpartition(",")[0] for line in differ})
    way = "put the files back as they were, or begin a new run"
    refuse(names, f"{rule}; new, gone or in another split since: {listed(names)}; {way}")


# ---------------------------------------- the pixels


def load(pairs, split, image_size=64, threshold=0, cache=None, progress=None):
    """The images and masks of a split -> data.Split, in the order of their names.

    threshold, cache, progress: as data.read_mask and data.load have them; 0 is no threshold.
    UserError: what data.decode refuses; an image and a mask of different size; a threshold that
    leaves no pixel of Train inside.
    """
    (folder,) = {pair.folder for pair in pairs if pair.split == split}
    here = [pair for pair in pairs if pair.folder == folder]  # the cache holds a whole folder
    files = {folder / part: {} for part in PARTS}
    for pair in here:
        for part, name in zip(PARTS, (pair.image, pair.mask)):
            stat = os.stat(folder / part / name)
            files[folder / part][name] = (stat.st_size, stat.st_mtime_ns)
    cache, n = data.CACHE if cache is None else cache, len(here)
    pixels, shapes = data.decode_folders(files, image_size, cache, progress, threshold)
    wrong = []
    for i in np.flatnonzero((shapes[:n] != shapes[n:]).any(1)):
        sizes = [f"{w}x{h}" for h, w in (shapes[i], shapes[n + i])]
        wrong.append(f"{here[i].name} ({sizes[0]}, its mask {sizes[1]})")
    refuse(wrong, f"{folder}: an image and its mask must be of one size; not so: {listed(wrong)}")
    rows = np.array([pair.split == split for pair in here])
    images, masks = pixels[:n, None][rows], pixels[n:, None][rows]
    blank = threshold and split == "Train" and not masks.any()
    rule = f"--set threshold must leave something inside a mask of Train, got {threshold}"
    refuse(blank, f"{rule}: every value is below it")
    own = [pair for pair in here if pair.split == split]
    paths = [folder / "masks" / pair.mask for pair in own]
    return data.Split(images, masks, [pair.name for pair in own], paths)


def thumbnails(images):
    """(N, 1, S, S) uint8 -> (N, 256) float32: 16x16, less the mean of 5x5 around; of norm 1.

    So the product of two is their correlation, about what is fine: all chests are alike coarsely.
    """
    small = np.stack([data.area_mean(image[0], 16) for image in images])
    around = np.pad(small, ((0, 0), (2, 2), (2, 2)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(around, (5, 5), (1, 2)).mean((-1, -2))
    fine = (small - around).reshape(len(images), -1)
    fine -= fine.mean(1, keepdims=True)
    return fine / np.maximum(np.linalg.norm(fine, axis=1, keepdims=True), 1e-6)


def near_duplicates(splits):
    """["a.png and b.png", ...]: images of different splits that look the same, most alike first.

    splits: {name: data.Split}. Of each image the most alike in an earlier split is named.
    """
    found, names = [], list(splits)
    small = {name: thumbnails(split.images) for name, split in splits.items()}
    for k, second in enumerate(names):
        for first in names[:k]:
            for row, thumbnail in enumerate(small[second]):
                alike = small[first] @ thumbnail
                i = int(alike.argmax())
                if alike[i] > ALIKE:
                    both = f"{splits[first].names[i]} and {splits[second].names[row]}"
                    found.append((-float(alike[i]), both))
    return [both for _, both in sorted(found)]


def splits_of(cfg, names, earlier=None):
    """{name: data.Split} of a Config, and a line about what was found.

    earlier: the folder or a checkpoint of a run that goes on, see verify. A new run that names no
    --group is warned of near duplicates; so all three splits are read, whatever the names.
    """
    pairs, line = find(cfg.data, cfg.group)
    message(line)
    if earlier:
        run = Path(earlier)
        verify((run if run.is_dir() else run.parent) / "split.csv", pairs)
    how = dict(image_size=cfg.image_size, threshold=cfg.threshold)
    how |= dict(progress=progress_line("decoding"))
    splits = {name: load(pairs, name, **how) for name in SPLITS}
    if not (earlier or cfg.group) and (alike := near_duplicates(splits)):
        rule = "look the same, and are in different splits; their scores may be too good"
        advice = "--group 'REGEX' keeps the images of a patient in one split"
        message(f"warning: {listed(alike)} {rule}; {advice}")
    return {name: splits[name] for name in names}
