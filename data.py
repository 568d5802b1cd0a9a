r"""§3.1: the folders of COVID-QU-Ex as arrays, and the one border between 0..255 and [-1, 1].

    <root>/Lung Segmentation Data/Lung Segmentation Data/{Train,Val,Test}/<class>/{images,lung masks}/NAME.png
    <root>/Infection Segmentation Data/.../{Train,Val,Test}/<class>/{images,infection masks}/NAME.png

as Kaggle unpacks them; the doubled folder may be single. An image and its mask have the same file name.

report            here            shape and range
X-ray             Split.images    (N, 1, S, S) uint8, 0..255
mask              Split.masks     (N, 1, S, S) uint8, 0 outside and 255 inside; None for synthesis (§3)
x_0, y            to_float(...)   (N, 1, S, S) float32 in [-1, 1], masks -1 outside and +1 inside
64 x 64 x 1       image_size = S  §3.1

Nothing is repaired and nothing is skipped: a file that breaks a rule stops the load with one line that names it.
"""

import hashlib
import io
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

TREES = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data",
         "synthesis": "Lung Segmentation Data"}
MASKS = {"lung": "lung masks", "infection": "infection masks", "synthesis": None}
CLASSES = ("COVID-19", "Non-COVID", "Normal")
SPLITS = ("Train", "Val", "Test")
DEFAULT_CLASSES = {"lung": CLASSES, "infection": ("COVID-19",), "synthesis": CLASSES}

HERE = Path(__file__).resolve().parent
DATA_HOMES = (HERE / "COVID-QU-Ex", Path("COVID-QU-Ex"))   # beside this file, then in the current folder
PHANTOMS = HERE / "phantoms"
PHANTOMS_NOTE = "PHANTOMS.txt"   # a root that holds this file holds phantoms, wherever it was copied to
CACHE = HERE / ".cache"
CACHE_FORMAT = 1            # raise it when the decoding or the resizing below changes: older caches are then stale
CACHE_MAGIC = b"data.py-cache"


class DataError(ValueError):
    """Bad data. The message is one line that names the file or folder and the rule it breaks."""


class Split(NamedTuple):
    images: np.ndarray          # (N, 1, S, S) uint8
    masks: np.ndarray | None    # (N, 1, S, S) uint8, 0 or 255
    names: list[str]            # "COVID-19/covid_12.png"


# ranges: the only place where 0..255 becomes [-1, 1]

def to_float(u8):
    r"""0..255 -> [-1, 1]:   x = u / 127.5 - 1.   uint8 array or tensor of any shape -> float32 tensor on its device."""
    u8 = torch.as_tensor(u8)
    if u8.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 (0..255), got {u8.dtype}")
    return u8.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(x):
    r"""[-1, 1] -> 0..255:   u = round(127.5 (x + 1)), clamped.   Float tensor of any shape -> uint8 numpy array."""
    if x.isnan().any():
        raise ValueError("to_uint8 got nan, which is no gray value")
    return x.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


# one file

def pixels(path):
    r"""(H, W) gray values as the file stores them: uint8 (1-bit files as 0 and 255), or uint16 where it holds 16 bits.

    Colour is accepted where R = G = B everywhere, and alpha where it is opaque everywhere; a 16-bit file with colour or
    alpha comes from Pillow at 8 bits. DataError: unreadable, truncated, damaged, several frames, coloured, transparent.
    """
    try:
        raw = io.BytesIO(Path(path).read_bytes())
        Image.open(raw).verify()                        # the checksum of every PNG chunk, which load() passes over
        image = Image.open(raw)
        image.load()
    except Exception as e:                              # Pillow's are OSError, SyntaxError, ValueError, struct.error...
        reason = "not an image file" if isinstance(e, UnidentifiedImageError) else e
        raise DataError(f"{path}: cannot be read: {reason}") from e
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: holds {image.n_frames} frames, one is wanted")
    if image.mode.startswith("I"):
        a = np.asarray(image)
        if a.min() < 0 or a.max() > 65535:
            raise DataError(f"{path}: gray values {a.min()}..{a.max()}, 0..65535 is wanted")
        return a.astype(np.uint16)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L"))
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise DataError(f"{path}: pixels of kind {image.mode}, gray is wanted")
    rgba = np.asarray(image.convert("RGBA"))            # (H, W, 4)
    if (rgba[..., 3] != 255).any():
        raise DataError(f"{path}: transparent pixels, an opaque gray image is wanted")
    if (rgba[..., :1] != rgba[..., 1:3]).any():
        raise DataError(f"{path}: coloured pixels, a gray image (R = G = B) is wanted")
    return rgba[..., 0]


def read_gray(path):
    """An X-ray of any size and bit depth -> (H, W) uint8. 16 bits are scaled, round(v / 257): 65535 -> 255."""
    a = pixels(path)
    return a if a.dtype == np.uint8 else ((a.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_mask(path):
    """A mask -> (H, W) bool, True inside. Its values must be 0 and 255, or 0 and 1 (or 65535 in 16 bits)."""
    a = pixels(path)
    top = a.max()
    if top not in (0, 1, 255, 65535) or ((a != 0) & (a != top)).any():
        found = np.unique(a).tolist()
        listed = ", ".join(map(str, found[:5])) + (f", ... ({len(found)} values)" if len(found) > 5 else "")
        raise DataError(f"{path}: a mask has the values 0 and 255, or 0 and 1; found {listed}")
    return a > 0


def area_mean(a, size):
    """(H, W) -> (size, size) float32: the mean over the pixels under each output pixel (Pillow's BOX, in float).

    256 -> 64: exactly the mean of 4 x 4 pixels. Enlarging repeats pixels. H != W is squeezed to a square, as the
    data set itself does.
    """
    return np.asarray(Image.fromarray(a).convert("F").resize((size, size), Image.Resampling.BOX))


def resize_image(a, size):
    """(H, W) uint8 -> (size, size) uint8: area mean, rounded."""
    return (area_mean(a, size) + 0.5).astype(np.uint8)


def resize_mask(a, size):
    """(H, W) bool -> (size, size) bool: inside where half or more of the pixels under it are; so, two-valued."""
    return np.round(area_mean(a.astype(np.uint8), size), 4) >= 0.5      # round: 18 x 1/36 is not always 0.5 in float


# one folder

def refuse(problems):
    """DataError with the first of the problems and the number of the others; nothing if there is none."""
    if problems:
        raise DataError(problems[0] + (f" (and {len(problems) - 1} more bad files)" if len(problems) > 1 else ""))


def scan(folder):
    """{file name: (bytes, mtime_ns)} of a folder of PNGs, by name in code points: `(10)` before `(2)`. Opens none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    entries = [e for e in os.scandir(folder) if not e.name.startswith(".") and e.name.lower() != "thumbs.db"]
    entries.sort(key=lambda e: e.name)
    refuse([f"{e.path}: only .png files belong here" for e in entries
            if not (e.name.lower().endswith(".png") and e.is_file())])
    if not entries:
        raise DataError(f"{folder}: holds no .png file")
    return {e.name: (s.st_size, s.st_mtime_ns) for e in entries for s in [e.stat()]}


def decode(paths, size, progress=None, workers=None):
    """Files -> (n, size, size) uint8 and their own (n, 2) heights and widths, in the order of `paths`.

    A file in a folder called `images` is an X-ray, in any other a mask. Threads do: Pillow decodes outside the GIL.
    """
    def one(path):
        try:
            if path.parent.name == "images":
                a = read_gray(path)
                return resize_image(a, size), a.shape
            a = read_mask(path)
            return np.uint8(255) * resize_mask(a, size), a.shape
        except DataError as e:
            return e

    out, shapes, problems = np.empty((len(paths), size, size), np.uint8), np.empty((len(paths), 2), np.int32), []
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for i, result in enumerate(pool.map(one, paths)):
            if isinstance(result, DataError):
                problems.append(str(result))
            else:
                out[i], shapes[i] = result
            if progress:
                progress(i + 1, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)              # Ctrl-C does not wait for what is still queued
    refuse(problems)
    return out, shapes


# the cache: one file per folder of PNGs, so that the tasks and any choice of classes share it

def cache_file(cache, folder, files, size):
    """Where a decoded folder is kept, and the fingerprint of the names, sizes and times of the files it is made of."""
    made_of = f"{CACHE_FORMAT}/{size}/" + "".join(f"{name}/{length}/{mtime}/" for name, (length, mtime) in files.items())
    where, what = (hashlib.sha256(text.encode()).hexdigest() for text in (str(folder), made_of))
    return Path(cache) / f"{'-'.join(folder.parts[-3:])}-{size}-{where[:12]}.bin", what


def write_cache(file, fingerprint, pixels, shapes):
    """One line of text (magic, fingerprint, checksum), then shapes, then pixels.

    Whole or not at all: written under a temporary name in the same folder, then renamed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(b"%s %s %08x\n" % (CACHE_MAGIC, fingerprint.encode(), zlib.crc32(pixels, zlib.crc32(shapes))))
            f.write(shapes)
            f.write(pixels)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_cache(file, fingerprint, pixels, shapes):
    """Fill pixels and shapes. False: no such cache, the files have changed since, or it is damaged (said on stderr)."""
    try:
        with open(file, "rb") as f:
            head = f.readline(200).split()
            if len(head) != 3 or head[0] != CACHE_MAGIC:
                raise ValueError("no cache of data.py")
            if head[1] != fingerprint.encode():
                return False
            if f.readinto(shapes) != shapes.nbytes or f.readinto(pixels) != pixels.nbytes or f.read(1):
                raise ValueError("wrong length")
            if zlib.crc32(pixels, zlib.crc32(shapes)) != int(head[2], 16):
                raise ValueError("wrong checksum")
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:
        print(f"cache {file} is damaged ({e}); decoding the images again", file=sys.stderr)
        return False


def decode_folders(folders, size, cache, progress):
    """`decode` of all files of {folder: files}: from the cache the folders it holds, into it those it does not."""
    n = sum(len(files) for files in folders.values())
    pixels, shapes = np.empty((n, size, size), np.uint8), np.empty((n, 2), np.int32)
    fresh, end = [], 0
    for folder, files in folders.items():
        rows = slice(end, end := end + len(files))
        key = cache_file(cache, folder, files, size)
        if not read_cache(*key, pixels[rows], shapes[rows]):
            fresh.append((folder, rows, key))
    rows = [i for _, r, _ in fresh for i in range(r.start, r.stop)]
    pixels[rows], shapes[rows] = decode([f / name for f, _, _ in fresh for name in folders[f]], size, progress)
    try:
        for _, rows, key in fresh:
            write_cache(*key, pixels[rows], shapes[rows])
    except OSError as e:
        print(f"cache cannot be written ({e}); the images will be decoded again next time", file=sys.stderr)
    return pixels, shapes


# one split

def tree_folder(root, task):
    """The folder that holds Train, Val and Test of a task: <root>/<tree>/<tree>, <root>/<tree>, or root itself."""
    if task not in TREES:
        raise DataError(f"task must be one of {', '.join(TREES)}; got {task!r}")
    root, tree = Path(root).expanduser().resolve(), TREES[task]
    places = [root / tree / tree, root / tree]
    if root.name not in set(TREES.values()) - {tree}:   # the other task's tree is not taken for this one's
        places.append(root)
    for place in places:
        if all((place / split).is_dir() for split in SPLITS):
            return place
    raise DataError(f"{root}: no data for {task}: looked for {', '.join(SPLITS)} in {', '.join(map(str, places))}")


def misfits(tree, split, c, images, masks):
    """Lines about the files of class c: an image without mask, a mask without image, a name that is in two splits."""
    here = tree / split / c / "images"
    lines = []
    if masks is not None:
        lines += [f"{here / name}: has no mask of the same name" for name in images if name not in masks]
        lines += [f"{here / name}: is missing, and has a mask" for name in masks if name not in images]
    for other in SPLITS:
        there = tree / other / c / "images"
        if other != split and there.is_dir():
            both = sorted(images.keys() & set(os.listdir(there)))
            lines += [f"{here / name}: is in {other} too; a file may be in one split only" for name in both]
    return lines


def load(root, task, split, classes=None, image_size=64, cache=None, progress=None):
    r"""One split of the data set of §3.1 -> Split.

    root        the folder that holds the two trees, or a tree itself
    task        synthesis, lung, infection
    split       Train, Val, Test
    classes     any of CLASSES; None: all three, and COVID-19 alone for infection. The order is CLASSES, then `scan`'s
    image_size  S >= 1; see resize_image, resize_mask
    cache       folder of the decoded arrays; None: .cache beside this file
    progress    called as progress(files decoded, files to decode), and not at all where the cache has everything

    DataError: a folder that is missing, empty or littered; an image without mask or a mask without image; a file name
    that is in another split too (training would leak into evaluation); a file that read_gray or read_mask refuses; an
    image and a mask of different size. Nothing is cached unless every file asked for could be read.
    """
    tree = tree_folder(root, task)
    asked = DEFAULT_CLASSES[task] if classes is None else [classes] if isinstance(classes, str) else list(classes)
    kept = [c for c in CLASSES if c in asked]
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if not kept or set(asked) - set(kept):
        raise DataError(f"classes must be some of {', '.join(CLASSES)}; got {', '.join(map(repr, asked)) or 'none'}")
    if image_size < 1:
        raise DataError(f"image_size must be 1 or more; got {image_size}")

    image_folders = [tree / split / c / "images" for c in kept]
    mask_folders = [tree / split / c / MASKS[task] for c in kept] if MASKS[task] else []
    folders = {f: scan(f) for f in image_folders + mask_folders}
    mask_files = [folders[f] for f in mask_folders] or [None] * len(kept)
    refuse([line for c, f, masks in zip(kept, image_folders, mask_files)
            for line in misfits(tree, split, c, folders[f], masks)])
    names = [f"{c}/{name}" for c, f in zip(kept, image_folders) for name in folders[f]]

    n, (pixels, shapes) = len(names), decode_folders(folders, image_size, CACHE if cache is None else cache, progress)
    if not mask_folders:
        return Split(pixels[:, None], None, names)                  # (N, 1, S, S)
    refuse([f"{tree / split}: {names[i]}: the image is {shapes[i].tolist()}, its mask {shapes[n + i].tolist()} (H, W)"
            for i in np.flatnonzero((shapes[:n] != shapes[n:]).any(1))])
    return Split(pixels[:n, None], pixels[n:, None], names)         # (N, 1, S, S), (N, 1, S, S)


def progress_line(label, start=0):
    """A progress(done, total) that writes `label 1200/33920 540/s 1:01 left` to stderr.

    On a terminal one line that overwrites itself, elsewhere a line about every 10 s; and a last one at done = total.
    start: what had been done before, so that the rate of a resumed run counts only its own.
    """
    began = shown = time.monotonic()

    def clock(seconds):
        minutes, s = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"

    def progress(done, total):
        nonlocal shown
        now, tty = time.monotonic(), sys.stderr.isatty()
        if done <= start or done < total and now - shown < (0.1 if tty else 10):
            return
        shown, rate = now, (done - start) / max(now - began, 1e-9)
        left = f"{clock((total - done) / rate)} left" if done < total else f"took {clock(now - began)}"
        line = f"{label} {done}/{total} {rate:.{0 if rate >= 10 else 2}f}/s {left}"
        print(f"\r{line:<70}" if tty else line, end="" if tty and done < total else "\n", file=sys.stderr, flush=True)

    return progress


# where the data is

def locate(data, task):
    """--data -> (root, whether it holds phantoms). None: the first of DATA_HOMES in the layout, else the phantoms."""
    if data is not None:
        tree = tree_folder(data, task)
        return Path(data).expanduser(), any(f == PHANTOMS or (f / PHANTOMS_NOTE).is_file() for f in tree.parents)
    for home in DATA_HOMES:
        try:
            tree_folder(home, task)
            return home, False
        except DataError:
            continue
    ensure_phantoms(task)
    return PHANTOMS, True


def ensure_phantoms(task):
    raise NotImplementedError("chest phantoms are not merged yet")
