r"""§3.1: the folders of COVID-QU-Ex as arrays, and the one border between 0..255 and [-1, 1].

    <root>/Lung Segmentation Data/Lung Segmentation Data/SPLIT/CLASS/{images,lung masks}/NAME.png
    <root>/Infection Segmentation Data/.../SPLIT/CLASS/{images,lung masks,infection masks}/NAME.png

SPLIT is Train, Val or Test; CLASS is COVID-19, Non-COVID or Normal. An image and its mask have the
same NAME. The doubled folder is Kaggle's; it may be single.

report            here            shape and range
X-ray             Split.images    (N, 1, S, S) uint8, 0..255
mask              Split.masks     (N, 1, S, S) uint8, 0 outside, 255 inside; None for synthesis (§3)
x_0, y            to_float(...)   (N, 1, S, S) float32 in [-1, 1], masks -1 outside and +1 inside
64 x 64 x 1       image_size = S  §3.1

No file is repaired or skipped. A file that breaks a rule stops the load; one line names both.
"""

import hashlib
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from PIL import Image, UnidentifiedImageError

from console import UserError, printable, refuse, write_whole

LUNG_TREE, INFECTION_TREE = "Lung Segmentation Data", "Infection Segmentation Data"
TREES = {"lung": LUNG_TREE, "infection": INFECTION_TREE, "synthesis": LUNG_TREE}
MASKS = {"lung": "lung masks", "infection": "infection masks", "synthesis": None}
CLASSES = ("COVID-19", "Non-COVID", "Normal")
SPLITS = ("Train", "Val", "Test")
DEFAULT_CLASSES = {"masks": (), "lung": CLASSES, "infection": ("COVID-19",), "synthesis": CLASSES}

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP", "JPEG2000")  # of images
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")  # the one format in which a mask may ring
MOST_PIXELS, MOST_SIDE = 10**8, 2**16  # of an image: larger ones are refused by their header

CACHE, CACHE_FORMAT = Path(__file__).resolve().parent / ".cache", 2  # raised when decoding changes


class Split(NamedTuple):
    images: np.ndarray  # (N, 1, S, S) uint8
    masks: np.ndarray | None  # (N, 1, S, S) uint8, 0 or 255
    names: list[str]  # "COVID-19/covid_12.png"
    files: list | None = None  # of the masks, at their own size


# ---------------------------------------- ranges: here alone 0..255 becomes [-1, 1]


def to_float(u8):
    r"""0..255 -> [-1, 1]:   x = u / 127.5 - 1.   uint8 of any shape -> float32 tensor."""
    u8 = torch.as_tensor(u8)
    if u8.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 (0..255), got {u8.dtype}")
    return u8.to(torch.float32).div_(127.5).sub_(1)


def without_nan(x):
    """x itself. UserError: a network whose weights have grown too large draws nan."""
    if x.isnan().any():
        raise UserError("the network draws nan, which is no gray value; try a smaller --lr")
    return x


def to_uint8(x):
    r"""[-1, 1] -> 0..255:   u = round(127.5 (x + 1)), clamped.   Float tensor -> uint8 array."""
    u = without_nan(x).detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return u.to(torch.uint8).cpu().numpy()


# ---------------------------------------- one file


def open_image(path):
    """The one picture in a file, decoded. UserError: unreadable, too large, or several frames.

    The limits are those above. Pillow's own, which warns at 89 megapixels, is switched off.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: is not a file")
    Image.MAX_IMAGE_PIXELS = None
    try:
        with open(path, "rb") as f:
            image = Image.open(f, formats=FORMATS)
            if max(image.size) > MOST_SIDE or math.prod(image.size) > MOST_PIXELS:
                most = f"{MOST_PIXELS // 10**6} megapixels and {MOST_SIDE} a side"
                raise ValueError(f"{image.width} x {image.height} pixels; at most {most} are read")
            # A PNG's checksums; load() alone accepts one flipped bit in seven
            image.verify()
            image = Image.open(f, formats=FORMATS)
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"holds {frames} frames, one is wanted")
            image.load()
    except Exception as e:  # Pillow's are OSError, SyntaxError, ValueError, struct.error...
        reason = "not an image file" if isinstance(e, UnidentifiedImageError) else e
        raise UserError(f"{path}: cannot be read: {reason}") from e
    return image


def strips(shape):
    """Slices of the rows of an (H, W) array: a million pixels each, or a row."""
    rows = max(1, 2**20 // shape[1])
    return [slice(top, min(top + rows, shape[0])) for top in range(0, shape[0], rows)]


def gray_values(path):
    """(H, W) gray values as the file stores them: uint8, or uint16 where it holds 16 bits.

    A 1-bit file gives 0 and 255. A file with colour or alpha is 8-bit, as Pillow reads it.
    UserError: what open_image refuses; a pixel that is not R = G = B and opaque; other numbers.
    """
    image = open_image(path)
    deep = image.mode.startswith("I")
    if not deep and image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(f"{path}: pixels of kind {image.mode}, gray is wanted")
    low, high = image.getextrema() if image.mode == "I" else (0, 0)
    if low < 0 or high > 65535:
        raise UserError(f"{path}: gray values {low}..{high}, 0..65535 is wanted")
    is_gray = image.mode in ("1", "L") and "transparency" not in image.info
    values = np.empty((image.height, image.width), np.uint16 if deep else np.uint8)
    for rows in strips(values.shape):  # memory holds no second copy of a large picture
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if deep or is_gray:
            values[rows] = strip if deep else strip.convert("L")
            continue
        rgba = np.asarray(strip.convert("RGBA"))  # (h, W, 4)
        if (rgba[..., 3] != 255).any():
            raise UserError(f"{path}: transparent pixels, an opaque gray image is wanted")
        if (rgba[..., :1] != rgba[..., 1:3]).any():
            raise UserError(f"{path}: coloured pixels, a gray image (R = G = B) is wanted")
        values[rows] = rgba[..., 0]
    return values


def read_gray(path):
    """An X-ray of any size -> (H, W) uint8. 16 bits are scaled, round(v / 257): 65535 -> 255."""
    values = gray_values(path)
    if values.dtype == np.uint8:
        return values
    gray = np.empty(values.shape, np.uint8)
    for rows in strips(values.shape):
        gray[rows] = (values[rows].astype(np.uint32) + 128) // 257
    return gray


def read_mask(path, threshold=None):
    """A mask -> (H, W) bool, True inside.

    Its values must be 0 and 255, or 0 and 1, or in a 16-bit file 0 and 65535. UserError: others.
    A JPEG file may ring around 0 and 255 (at most 1 % is in 64..191): inside is 128 or more.
    A threshold N > 0 takes any values: inside is N or more, as stored (16 bits: of 0..65535).
    """
    values = gray_values(path)
    if threshold:
        return values >= threshold
    top = values.max()
    if top in (0, 1, 255, 65535) and ((values == 0) | (values == top)).all():
        return values > 0
    between = np.mean((values >= 64) & (values < 192))
    if Path(path).suffix.lower() in JPEG and top >= 192 and between <= 0.01:
        return values >= 128
    found = np.unique(values).tolist()
    some = ", ".join(map(str, found[:5]))
    more = f", ... ({len(found)} values)" if len(found) > 5 else ""
    way = "" if threshold is None else "; --set threshold=N makes inside what is N or more"
    raise UserError(f"{path}: a mask has the values 0 and 255, or 0 and 1; found {some}{more}{way}")


def area_mean(a, size):
    """(H, W) -> (size, size) float32: the mean over the pixels under each output pixel.

    256 -> 64: exactly the mean of 4 x 4 pixels (Pillow's BOX, in float). Enlarging repeats pixels.
    H != W is squeezed to a square, as the data set itself does.
    """
    return np.asarray(Image.fromarray(a).convert("F").resize((size, size), Image.Resampling.BOX))


def resize_image(a, size):
    """(H, W) uint8 -> (size, size) uint8: area mean, rounded."""
    return (area_mean(a, size) + 0.5).astype(np.uint8)


def resize_mask(a, size):
    """(H, W) bool -> (size, size) bool: inside where half or more of the pixels under it are."""
    return area_mean(a.view(np.uint8), size) >= 0.5


# ---------------------------------------- one folder


def refuse_files(problems, names=()):
    """UserError with the first problem and the number of the others. No problem: no error."""
    if problems:
        named = f": {', '.join(names[1:5])}" if names else ""  # five with the first
        others = f" (and {len(problems) - 1} more bad files{named})" if len(problems) > 1 else ""
        raise UserError(problems[0] + others)


def scan(folder):
    """{file name: (bytes, mtime_ns)} of a folder of PNGs, in the order of code points: 10 before 2.

    No file is opened. Hidden files and Thumbs.db are passed over. UserError: no such folder, no PNG
    in it, or something else in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [e for e in entries if not e.name.startswith(".") and e.name.lower() != "thumbs.db"]
    others = [e for e in entries if not (e.name.lower().endswith(".png") and e.is_file())]
    refuse_files([f"{entry.path}: only .png files belong here" for entry in others])
    if not entries:
        raise UserError(f"{folder}: holds no .png file")
    return {e.name: (e.stat().st_size, e.stat().st_mtime_ns) for e in entries}


def decode(paths, size, progress=None, workers=None, threshold=None):
    """Files -> (n, size, size) uint8, and their own heights and widths, (n, 2) int32.

    A file in a folder called `images` is an X-ray; a file in any other folder is a mask, 0 or 255.
    Rows are in the order of `paths`. Threads share the files: Pillow decodes outside the GIL.
    UserError: what read_gray or read_mask refuses, after the last file.
    """

    def read(path):
        try:
            if path.parent.name == "images":
                image = read_gray(path)
                return resize_image(image, size), image.shape
            mask = read_mask(path, threshold)
            return np.uint8(255) * resize_mask(mask, size), mask.shape
        except UserError as e:
            return e

    pixels = np.empty((len(paths), size, size), np.uint8)
    shapes = np.empty((len(paths), 2), np.int32)
    problems = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(read, paths)):
            if isinstance(result, UserError):
                problems[paths[i]] = str(result)
            else:
                pixels[i], shapes[i] = result
            if progress:
                progress(i + 1, len(paths))
    refuse_files(list(problems.values()), [path.name for path in problems])
    return pixels, shapes


# ---------------------------------------- the cache: an npz file for each folder of PNGs


def cache_file(cache, folder, size):
    """The file in the folder `cache` that holds the decoded PNGs of `folder`.

    The tasks and any choice of classes share it. Two data sets, or two sizes, have two files.
    """
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return Path(cache) / f"{'-'.join(folder.parts[-3:])}-{size}-{place[:12]}.npz"


def fingerprint_of(files, threshold=None):
    """What `scan` returns -> (32,) uint8 that changes with each name, size, time; CACHE_FORMAT."""
    lines = [f"{name}/{size}/{time}/" for name, (size, time) in files.items()]
    lines += [f"threshold {threshold}"] if threshold else []
    digest = hashlib.sha256(os.fsencode(f"{CACHE_FORMAT}/{''.join(lines)}")).digest()
    return np.frombuffer(digest, np.uint8)


def write_cache(file, fingerprint, shapes, pixels):
    """Write a cache file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda f: np.savez(f, fingerprint=fingerprint, shapes=shapes, pixels=pixels))


def read_cache(file, fingerprint, shapes, pixels):
    """Fill shapes and pixels from a cache file. Returns whether they are filled.

    They are not if there is no such file, if its fingerprint is another (the PNGs have changed
    since), or if it is damaged. A damaged file is named on stderr.
    """
    try:
        if not file.is_file():  # reading a pipe might never end
            return False
        with open(file, "rb") as f, NpzFile(f, allow_pickle=False) as saved:
            if saved.zip.testzip():  # the name of the first array whose checksum is wrong, or None
                raise ValueError("wrong checksum")
            if not np.array_equal(saved["fingerprint"], fingerprint):
                return False
            for name, array in ("shapes", shapes), ("pixels", pixels):
                a = saved[name]  # each access reads the file
                if a.shape != array.shape or a.dtype != array.dtype:
                    raise ValueError(f"wrong shape or type of {name}")
                array[:] = a
            return True
    except Exception as e:  # those of zipfile, zlib and numpy: a flipped bit can raise a dozen
        reason = str(e) or type(e).__name__
        said = f"cache {file} is damaged ({reason}); decoding the images again"
        print(printable(said), file=sys.stderr)
        return False


def decode_folders(folders, size, cache, progress, threshold=None):
    """`decode` of all files of {folder: files}, through the cache.

    Folders that the cache holds are read from it. The files of the others are decoded, then cached.
    """
    counts = [len(files) for files in folders.values()]
    shapes = np.empty((sum(counts), 2), np.int32)
    pixels = np.empty((sum(counts), size, size), np.uint8)

    caches = zip(
        [cache_file(cache, folder, size) for folder in folders],
        [fingerprint_of(files, threshold) for files in folders.values()],
        np.split(shapes, np.cumsum(counts)[:-1]),  # views: what is read into them is in shapes
        np.split(pixels, np.cumsum(counts)[:-1]),
    )
    missing = {folder: c for folder, c in zip(folders, caches) if not read_cache(*c)}
    paths = [folder / name for folder in missing for name in folders[folder]]
    rows = np.repeat([folder in missing for folder in folders], counts)
    pixels[rows], shapes[rows] = decode(paths, size, progress, None, threshold)
    try:
        for c in missing.values():
            write_cache(*c)
    except (OSError, UserError) as e:
        later = "the images will be decoded again next time"
        print(printable(f"cache cannot be written ({e}); {later}"), file=sys.stderr)
    return pixels, shapes


# ---------------------------------------- one split


def tree_folder(root, task):
    """The folder that holds Train, Val and Test of a task.

    It is <root>/<tree>/<tree>, <root>/<tree>, or root; not root if that is the other task's tree.
    """
    refuse(task not in TREES, f"task must be one of {', '.join(TREES)}; got {task!r}")
    root, tree = Path(os.path.realpath(Path(root).expanduser())), TREES[task]
    own = [folder for folder in (root, root / "Train") if (folder / "images").is_dir()]
    refuse(own, f"{root}: a folder of images/ and masks/ is for --task masks, got --task {task}")
    places = [root / tree / tree, root / tree]
    if root.name not in set(TREES.values()) - {tree}:
        places.append(root)
    for place in places:
        if all((place / split).is_dir() for split in SPLITS):
            return place
    why = f"looked for {', '.join(SPLITS)} in {', '.join(map(str, places))}"
    raise UserError(f"{root}: no data for {task}: {why if root.is_dir() else 'no such folder'}")


def ordered_classes(task, classes):
    """One class, several, or None (the task's DEFAULT_CLASSES) -> a list in CLASSES' own order."""
    asked = DEFAULT_CLASSES[task] if classes is None else classes
    asked = [asked] if isinstance(asked, str) else list(asked)
    if not asked or set(asked) - set(CLASSES):
        got = ", ".join(map(repr, asked)) or "none"
        raise UserError(f"classes must be some of {', '.join(CLASSES)}; got {got}")
    return [c for c in CLASSES if c in asked]


def unpaired(folder, images, masks):
    """A line for each image without a mask of the same name, then for each mask without image."""
    lines = [f"{folder / n}: has no mask of the same name" for n in images if n not in masks]
    return lines + [f"{folder / n}: is missing, and has a mask" for n in masks if n not in images]


def in_other_splits(tree, split, c, images):
    """A line for each image of class c whose name another split has too: training would see it."""
    lines = []
    for other in SPLITS:
        there = tree / other / c / "images"
        if other != split and there.is_dir():
            for name in sorted(images.keys() & set(os.listdir(there))):
                here = tree / split / c / "images" / name
                lines.append(f"{here}: is in {other} too; a file may be in one split only")
    return lines


def load(root, task, split, classes=None, image_size=64, cache=None, progress=None, masks=None):
    r"""One split of the data set of §3.1 -> Split. Rows in the order of CLASSES, then of `scan`.

    root        the folder that holds the two trees, or a tree itself
    task        synthesis, lung, infection
    split       Train, Val, Test
    classes     any of CLASSES; None: all three, and COVID-19 alone for infection
    image_size  S >= 1; see resize_image, resize_mask
    cache       folder of the decoded arrays; None: .cache beside this file
    progress    called as progress(done, total) after each file decoded; never if all are cached
    masks       the folder of masks; None: the task's own. The infection tree has "lung masks" too

    UserError: a folder that is missing, empty or littered; an image without mask or a mask without
    image; a file name that is in another split too (training would leak into evaluation); a file
    that read_gray or read_mask refuses; an image and a mask of different size.
    Nothing is cached unless every file asked for could be read.
    """
    tree = tree_folder(root, task)
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    classes = ordered_classes(task, classes)
    if image_size < 1:
        raise UserError(f"image_size must be 1 or more; got {image_size}")

    masks = masks or MASKS[task]
    image_folders = [tree / split / c / "images" for c in classes]
    mask_folders = [tree / split / c / masks for c in classes] if masks else []
    files = {folder: scan(folder) for folder in image_folders + mask_folders}

    problems = []
    for i, c in enumerate(classes):
        images = files[image_folders[i]]
        if masks:
            problems += unpaired(image_folders[i], images, files[mask_folders[i]])
        problems += in_other_splits(tree, split, c, images)
    refuse_files(problems)

    names = [f"{c}/{name}" for c, folder in zip(classes, image_folders) for name in files[folder]]
    pixels, shapes = decode_folders(files, image_size, CACHE if cache is None else cache, progress)
    pixels, n = pixels[:, None], len(names)  # (N, 1, S, S), or with masks (2N, 1, S, S)
    if not masks:
        return Split(pixels, None, names)

    for i in np.flatnonzero((shapes[:n] != shapes[n:]).any(1)):
        pair = f"the image is {shapes[i].tolist()}, its mask {shapes[n + i].tolist()} (H, W)"
        problems.append(f"{tree / split}: {names[i]}: {pair}")
    refuse_files(problems)
    return Split(pixels[:n], pixels[n:], names, [f / n for f in mask_folders for n in files[f]])


def divided(split, share):
    """(what a network learns from, what is held out): two Splits. A share of 0.2: every fifth.

    Choices are made on what is held out, so that Val and Test stay unseen.
    """
    out = np.diff(np.floor(np.arange(len(split.names) + 1) * share)) > 0

    def part(rows):
        masks = None if split.masks is None else split.masks[rows]
        names, files = ([x[i] for i in np.flatnonzero(rows)] if x else None for x in split[2:])
        return Split(split.images[rows], masks, names, files)

    return part(~out), part(out)
