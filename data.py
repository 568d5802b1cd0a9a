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

import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError

TREES = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data", "synthesis": "Lung Segmentation Data"}
MASKS = {"lung": "lung masks", "infection": "infection masks", "synthesis": None}
CLASSES = ("COVID-19", "Non-COVID", "Normal")
SPLITS = ("Train", "Val", "Test")
DEFAULT_CLASSES = {"lung": CLASSES, "infection": ("COVID-19",), "synthesis": CLASSES}

HERE = Path(__file__).resolve().parent
DATA_HOMES = (HERE / "COVID-QU-Ex", Path("COVID-QU-Ex"))  # beside this file, then in the current folder
PHANTOMS = HERE / "phantoms"
PHANTOMS_NOTE = "PHANTOMS.txt"  # a root that holds this file holds phantoms, wherever it was copied to
CACHE = HERE / ".cache"
CACHE_FORMAT = 1  # raise it when the decoding or the resizing below changes: older caches are then stale
CACHE_MAGIC = b"data.py-cache"


class DataError(ValueError):
    """Bad data. The message is one line that names the file or folder and the rule it breaks."""


class Split(NamedTuple):
    images: np.ndarray  # (N, 1, S, S) uint8
    masks: np.ndarray | None  # (N, 1, S, S) uint8, 0 or 255
    names: list[str]  # "COVID-19/covid_12.png"


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


def augment(x, mask, generator, strength=1.0):
    r"""An X-ray and its mask as another exposure of the same patient could have shown them, each pair by its own draw.

        p = R(a) s p' + d                              the place p' of the new picture shows the old place p
        x = contrast x(p) + brightness, clipped        in [-1, 1]
        mask = +1 where mask(p) > 0, else -1

    x, mask    (B, 1, S, S) float in [-1, 1]
    generator  torch.Generator on the CPU: the draws are the same on every device
    strength   0: nothing changes. 1: rotation a to 10 degrees, scale s from 1/1.1 to 1.1, shift d to a twentieth of the
               side, contrast from 1/1.25 to 1.25, brightness to 0.1 of the range, each uniform (s and contrast in their
               logarithm). What moves in from outside repeats the edge.

    No flips: the heart is on one side.
    """
    u = strength * (2 * torch.rand(6, len(x), 1, 1, generator=generator) - 1).to(x)  # -strength..strength
    angle, s, right, down, contrast, brightness = math.pi / 18 * u[0], 1.1 ** u[1], 0.1 * u[2], 0.1 * u[3], 1.25 ** u[4], 0.2 * u[5]
    rows = (s * angle.cos(), -s * angle.sin(), right), (s * angle.sin(), s * angle.cos(), down)  # each (B, 1, 1)
    places = F.affine_grid(torch.cat([torch.cat(row, -1) for row in rows], 1), x.shape, align_corners=False)
    moved = F.grid_sample(torch.cat([x, mask], 1), places, padding_mode="border", align_corners=False)
    x = moved[:, :1] * contrast[:, None] + brightness[:, None]
    return x.clamp(-1, 1), torch.where(moved[:, 1:] > 0, 1.0, -1.0)


# one file


def pixels(path):
    r"""(H, W) gray values as the file stores them: uint8 (1-bit files as 0 and 255), or uint16 where it holds 16 bits.

    Colour is accepted where R = G = B everywhere, and alpha where it is opaque everywhere; a 16-bit file with colour or
    alpha comes from Pillow at 8 bits. DataError: unreadable, truncated, damaged, several frames, coloured, transparent.
    """
    try:
        raw = io.BytesIO(Path(path).read_bytes())
        Image.open(raw).verify()  # the checksum of every PNG chunk: load() alone accepts one flipped bit in seven
        image = Image.open(raw)
        image.load()
    except Exception as e:  # Pillow's are OSError, SyntaxError, ValueError, struct.error...
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
    rgba = np.asarray(image.convert("RGBA"))  # (H, W, 4)
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
    return area_mean(a.astype(np.uint8), size) >= 0.5


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
    refuse([f"{e.path}: only .png files belong here" for e in entries if not (e.name.lower().endswith(".png") and e.is_file())])
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
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(one, paths)):
            if isinstance(result, DataError):
                problems.append(str(result))
            else:
                out[i], shapes[i] = result
            if progress:
                progress(i + 1, len(paths))
    refuse(problems)
    return out, shapes


# the cache: one file per folder of PNGs, so that the tasks and any choice of classes share it


def cache_file(cache, folder, files, size):
    """Where a decoded folder is kept, and the fingerprint of the names, sizes and times of the files it is made of."""
    made_of = f"{CACHE_FORMAT}/" + "".join(f"{name}/{length}/{mtime}/" for name, (length, mtime) in files.items())
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
    if root.name not in set(TREES.values()) - {tree}:  # the other task's tree is not taken for this one's
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


def load(root, task, split, classes=None, image_size=64, cache=None, progress=None, masks=None):
    r"""One split of the data set of §3.1 -> Split.

    root        the folder that holds the two trees, or a tree itself
    task        synthesis, lung, infection
    split       Train, Val, Test
    classes     any of CLASSES; None: all three, and COVID-19 alone for infection. The order is CLASSES, then `scan`'s
    image_size  S >= 1; see resize_image, resize_mask
    cache       folder of the decoded arrays; None: .cache beside this file
    progress    called as progress(files decoded, files to decode), and not at all where the cache has everything
    masks       the folder of the masks; None: the task's own. The infection tree has "lung masks" too

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
    masks = masks or MASKS[task]
    mask_folders = [tree / split / c / masks for c in kept] if masks else []
    folders = {f: scan(f) for f in image_folders + mask_folders}
    mask_files = [folders[f] for f in mask_folders] or [None] * len(kept)
    refuse([line for c, f, files in zip(kept, image_folders, mask_files) for line in misfits(tree, split, c, folders[f], files)])
    names = [f"{c}/{name}" for c, f in zip(kept, image_folders) for name in folders[f]]

    n, (pixels, shapes) = len(names), decode_folders(folders, image_size, CACHE if cache is None else cache, progress)
    if not mask_folders:
        return Split(pixels[:, None], None, names)  # (N, 1, S, S)
    refuse(
        [
            f"{tree / split}: {names[i]}: the image is {shapes[i].tolist()}, its mask {shapes[n + i].tolist()} (H, W)"
            for i in np.flatnonzero((shapes[:n] != shapes[n:]).any(1))
        ]
    )
    return Split(pixels[:n, None], pixels[n:, None], names)  # (N, 1, S, S), (N, 1, S, S)


class StatusLine:
    """A line on stderr: on a terminal one that overwrites itself, elsewhere a line every 10 s; and the last one."""

    def __init__(self):
        self.shown = time.monotonic()

    def show(self, text, last=False):
        now, tty = time.monotonic(), sys.stderr.isatty()
        if last or now - self.shown >= (0.1 if tty else 10):
            self.shown = now
            print(f"\r{text:<78}" if tty else text, end="" if tty and not last else "\n", file=sys.stderr, flush=True)


def clock(seconds):
    """Seconds as 0:07, 12:05 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


def progress_line(label):
    """A progress(done, total) that shows `label 1200/33920 540/s 1:01 left`, and how long it took at done = total."""
    status, began = StatusLine(), time.monotonic()

    def progress(done, total):
        seconds = time.monotonic() - began
        rate = done / max(seconds, 1e-9)
        left = f"{clock((total - done) / rate)} left" if done < total else f"took {clock(seconds)}"
        status.show(f"{label} {done}/{total} {rate:.{0 if rate >= 10 else 2}f}/s {left}", last=done == total)

    return progress


# ------------------------------------------------------------------------------------- where the data is


def locate(data, task):
    """--data -> (root, whether it holds phantoms). None: the first of DATA_HOMES that is there, else where the phantoms go.

    DataError: the folder is not there, or not in the layout of the task; so it is for a home that is there.
    """
    if data is not None:
        tree = tree_folder(data, task)
        return Path(data).expanduser(), any((f / PHANTOMS_NOTE).is_file() for f in tree.parents)
    for home in DATA_HOMES:
        if home.is_dir():
            return locate(home, task)
    return PHANTOMS, True


# ------------------------------------------------------------------------------------- chest phantoms
#
# Chest phantoms: generated frontal chest X-rays whose lung and infection masks are known exactly.
#
# A phantom is an attenuation map, a sum of anatomical parts, turned into gray values by a film curve.
#
# u, x, y     (size, size) float32, body coordinates: the picture shows about [-1, 1] x [-1, 1], x to the image's right,
#             which is the patient's left, y downwards; x = 0 is the spine and u = |x|
# q           u over the half width of the rib cage at that height: 0 at the spine, 1 at the inner chest wall
# attenuation 0 is air, about 1 the soft tissue of the whole chest; negative contributions are air inside the body
# z = x + iy  a point, for what is drawn as lines; `_Patient.strokes` turns points into pixels

NAMES = {"COVID-19": "covid_{}.png", "Non-COVID": "non_COVID ({}).png", "Normal": "Normal ({}).png"}

# What makes the masks hard to find: ranges, drawn anew for each phantom.
DENSITY = {"COVID-19": (0.3, 1.0), "Non-COVID": (0.7, 1.1)}  # share of a lung's air that an opacity replaces
FUZZ = 0.3, 1.2  # width of an opacity's border, in standard deviations of its field
CONTRAST = 0.26, 0.56  # attenuation missing where there is air
BEHIND = 0.1, 0.5  # share of the air that lies behind heart and diaphragm
EDGE = 0.03, 0.26  # depth, in body units, over which the lung's edge fades in
NOISE = 0.006, 0.03  # quantum noise, of the full gray scale
EFFUSION = 0.30  # share of the phantoms with opacities that also have fluid over a diaphragm


def _ramp(a):
    """Smooth step: 0 below 0, 1 above 1."""
    a = np.clip(a, 0, 1)
    return a * a * (3 - 2 * a)


def _dome(a):
    """Chord of a round body, entered at a = 0 and at its full thickness from a = 1 on."""
    return np.sqrt(1 - (1 - np.clip(a, 0, 1)) ** 2)


def _radius(x, y):
    return np.sqrt(x * x + y * y)  # np.hypot is five times slower


def _wave(a):
    """Distance to the nearest whole number, 0..0.5: what repeats along the spine."""
    return np.abs(a - np.rint(a))


def _resize(a, size, how=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(a).resize((size, size), how))


def _blur(a, cells):
    """a without what is finer than 1/cells of the picture."""
    return _resize(_resize(a, cells, Image.Resampling.BOX), len(a))


class _Patient:
    """The random draws all parts share: position in the picture, outline of the rib cage, lungs and heart.

    air     (size, size)  0..1, thickness of lung in the beam
    lung    (size, size)  bool, the mask: lungs in front of neither heart nor diaphragm
    """

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        n, between = rng.normal, rng.uniform
        self.turn = np.exp(1j * n(0, 0.035))
        self.scale, self.shift = between([0.82, 0.84], [1.16, 1.14]), complex(n(0, 0.05), n(0, 0.05))
        p = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
        z = (p + 1j * p[:, None] - np.complex64(self.shift)) * np.complex64(self.turn.conjugate())
        y = z.imag / np.float32(self.scale[1])
        x = z.real / np.float32(self.scale[0])
        x = x - np.float32(n(0, 0.02)) * np.sin(2 * y + np.float32(n(0, 1)))  # scoliosis
        self.x, self.y, self.u, self.left = x, y, np.abs(x), x > 0

        top, base, apex = n(-0.74, 0.04), n(0.5, 0.05), self.sides(0.30, 0.02)
        t = np.clip((y - top) / (base - top), 0, 1)
        pointed = between(0.1, 0.5)
        self.wall = apex + (self.sides(0.74, 0.03) - apex) * ((1 - pointed) * _dome(t) + pointed * t * (2 - t))
        inner = apex + (self.sides(0.12, 0.015) - apex) * _dome(t / 0.17)
        self.q = self.u / self.wall
        self.diaphragm = self.sides(n(0.36, 0.08), 0.04) + between(0.7, 1.6) * (self.u - self.sides(0.33, 0.04)) ** 2
        self.border = self.sides(0.125, 0.02)  # of the mediastinum, in u
        for left, height, at, spread in (
            (0, 0.03, -0.35, 0.2),
            (0, 0.10, 0.2, 0.22),  # vena cava, right atrium
            (1, 0.07, -0.34, 0.08),
            (1, 0.05, -0.14, 0.11),  # aortic knob, pulmonary trunk
            (1, 0.28, 0.34, 0.27),
        ):  # left ventricle
            bump = height * n(1, 0.2) * np.exp(-(((y - n(at, 0.025)) / spread) ** 2))
            self.border += np.where(self.left == left, bump, 0)

        cage = np.minimum(self.wall - self.u, self.u - inner) * (y > top)  # distance to its walls
        front = np.minimum(np.minimum(cage, self.u - self.border), self.diaphragm - y)
        self.lung = front > 0
        behind = np.minimum(cage, 0.9 * (self.diaphragm + 0.16 - y))  # heart and diaphragm in front
        haze = 1 - 0.25 * np.exp(-(((self.u - 0.15) / 0.2) ** 2) - (y / 0.35) ** 2)
        share = between(*BEHIND)
        self.air = haze * ((1 - share) * (0.4 * _ramp(front / between(*EDGE)) + 0.6 * _dome(front / 0.22)) + share * _dome(behind / 0.2))

    def sides(self, mean, sd):
        """A number for each lung, as an array: the patient's right where x < 0, the left where x > 0."""
        return np.where(self.left, *self.rng.normal(mean, sd, 2).astype(np.float32))

    def noise(self, cells):
        """(size, size) N(0, 1), smooth over 1/cells of the picture."""
        a = _resize(self.rng.standard_normal((cells, cells), np.float32), self.size)
        return a / a.std()

    def strokes(self, lines):
        """(size, size) 0..1: bundles of polylines (points z (lines, points), width, gray 0..1), drawn in order."""
        picture = Image.new("L", (2 * self.size, 2 * self.size))  # finer, then reduced
        draw = ImageDraw.Draw(picture)
        for z, width, gray in lines:
            p = (z.real * self.scale[0] + 1j * z.imag * self.scale[1]) * self.turn + self.shift + (1 + 1j)
            for line in (p * self.size).astype(np.complex64).view(np.float32).tolist():  # x0, y0, x1, y1, ...
                draw.line(line, round(255 * gray), max(1, round(width * self.size)))
        return np.asarray(picture.reduce(2), np.float32) / 255


def _body(b):
    """Soft tissue: torso, shoulders, neck, chin, the arms beside them. 0 outside the body."""
    n, y, u = b.rng.normal, b.y, b.u
    slope = n(-0.78, 0.05)  # height of the shoulders
    half = n(0.94, 0.04) + 0.2 * _ramp((0.1 - y) / 0.6)  # half width of the torso
    half = half - (half - n(0.27, 0.03)) * np.sqrt(_ramp((slope + 0.2 - y) / 0.42))  # narrowing to the neck
    torso = _dome(0.95 * (half - u) / half)
    chin = _dome((1 - _radius(b.x / 0.42, (y - n(-1.35, 0.12)) / 0.4)) / 0.5)
    arm = np.abs(u - b.sides(1.2, 0.08) - n(0.15, 0.08) * y)  # from its axis
    arms = _ramp((y - slope) / 0.2) * (0.5 * _dome(1 - arm / 0.18) + 0.15 * _ramp((0.06 - arm) / 0.03))
    return np.maximum(0.85 * torso, arms) + 0.3 * chin


def _mediastinum(b):
    """Heart, great vessels, hila, trachea (dark), spine with its vertebrae."""
    n, y, u = b.rng.normal, b.y, b.u
    heart = n(0.17, 0.03) * _dome((b.border - u) / 0.2) * _ramp((y + 0.75) / 0.4)
    hila = 0.10 * np.exp(-(((u - 0.17) / 0.06) ** 2) - ((y - b.sides(-0.06, 0.02)) / 0.11) ** 2)
    r = _wave(y / n(0.115, 0.008) + n(0, 1))  # one vertebra
    spine = _ramp((0.10 + 0.02 * r - u) / 0.04) * (0.7 + 0.3 * _ramp((0.45 - r) / 0.12))
    spine += 0.4 * np.exp(-(((u - 0.055) / 0.02) ** 2) - (r / 0.14) ** 2)  # pedicles
    trachea = _ramp((0.05 - np.abs(b.x + 0.01)) / 0.03) * _ramp((-0.2 - y) / 0.06)
    return heart + hila + n(0.10, 0.03) * spine - 0.10 * trachea


def _abdomen(b):
    """Liver and stomach below the diaphragm, in part of the phantoms with gas under the left dome."""
    n = b.rng.normal
    depth = b.y - b.diaphragm
    below = (0.10 * _dome(depth / 0.12) + 0.10 * _ramp(depth / 0.5)) * _ramp((1.12 - b.q) / 0.15)
    gas = _radius((b.x - n(0.36, 0.06)) / n(0.13, 0.03), (depth - n(0.16, 0.04)) / n(0.08, 0.02)) + 0.15 * b.noise(12)
    return below - (b.rng.random() < 0.5) * b.rng.uniform(0.1, 0.3) * _ramp((1 - gas) / 0.6)


def _ribs(b):
    """Posterior ribs, falling away from the spine, and fainter anterior ones, rising away from the sternum."""
    n, t, d, cube = b.rng.normal, b.y + 0.75, 1 - np.minimum(b.q, 1), b.q * b.q * b.q
    pitch = n(0.155, 0.01)
    back = (1 + 0.5 * t) * (0.16 * cube - 0.05 * np.sin(2.6 * b.q))
    front = (0.55 + 0.3 * t) * d * (0.7 + 0.3 * d)
    air = 0.35 + 0.65 * _ramp((b.diaphragm + 0.1 - b.y) / 0.2)  # fainter below the diaphragm
    bands = []
    for curve, half, inner in (back, 0.21, 0.1), (front, 0.26, 0.38):
        r = _wave((b.y - curve) / pitch + n(0, 1))
        edge = 0.55 + 0.45 * np.clip(r / half, 0, 1) ** 2  # the cortex is denser
        bands.append(_ramp((half - r) / 0.08) * edge * _ramp((b.u - inner) / 0.08))
    rim = 0.6 + np.minimum(cube, 1) ** 2  # seen edge-on at the wall
    inside = air * _ramp((1.06 - b.q) / 0.04) * _ramp(t / 0.1)
    return b.rng.uniform(0.06, 0.2) * inside * (bands[0] * rim + 0.35 * bands[1])


def _shoulders(b):
    """Clavicles, scapulae and heads of the humerus."""
    n = b.rng.normal
    c = b.u - 0.06
    clavicle = np.abs(b.y - b.sides(n(-0.52, 0.05), 0.03) + b.sides(n(0.25, 0.1), 0.05) * c - 0.035 * np.sin(7 * c))
    clavicle = _ramp((0.045 + 0.1 * (c - 0.4) ** 2 - clavicle) / 0.025) * _ramp((c - 0.02) / 0.06) * _ramp((0.85 - b.u) / 0.05)
    edge = b.u - b.sides(0.70, 0.05) - n(0.18, 0.08) * b.y  # medial border of the scapula
    scapula = _ramp(edge / 0.03) * _ramp((0.3 - edge) / 0.2) * _ramp((0.05 - b.y) / 0.4) * _ramp((b.y + 0.72) / 0.12)
    head = _ramp((0.13 - _radius(b.u - 1.0, b.y + 0.62)) / 0.04)
    return n(0.14, 0.03) * clavicle + n(0.10, 0.03) * scapula + 0.14 * head


def _breasts(b):
    """Soft shadows over the lower lungs, sharpest at their lower edge; faint or absent in half of the phantoms."""
    x, y = b.sides(0.48, 0.05), b.sides(b.rng.normal(0.22, 0.08), 0.02)
    return max(0, b.rng.normal(0.03, 0.06)) * _dome((1 - _radius((b.u - x) / 0.34, (b.y - y) / 0.30)) / 0.6)


def _vessels(b):
    """Arteries and veins: a tree of strokes from each hilum, halving in width as it forks; and a streak of atelectasis."""
    rng, lines = b.rng, []
    for side in -1, 1:
        angle = np.linspace(-1.5, 1.4, 8) + rng.normal(0, 0.12, 8)
        z = side * 0.16 + 1j * rng.normal(-0.05, 0.03, 8)
        for width, gray in (0.024, 1.0), (0.016, 0.8), (0.011, 0.65), (0.008, 0.5), (0.006, 0.4):
            way = rng.uniform(0.07, 0.14, len(z)) * (side * np.cos(angle) + 1j * np.sin(angle))
            lines.append((np.stack([z, z + way], -1), width, gray))
            z, angle = np.repeat(z + way, 2), np.repeat(angle, 2) + rng.normal(0, 0.38, 2 * len(z))
    z = complex(rng.choice([-1, 1]) * rng.uniform(0.25, 0.6), rng.uniform(0, 0.35))
    lines.append((np.array([[z, z + rng.uniform(0.1, 0.3) * np.exp(1j * rng.normal(0, 0.5))]]), 0.015, rng.uniform(0, 1)))
    return b.air * (rng.uniform(0.08, 0.18) * b.strokes(lines[::-1]) + 0.015 * b.noise(70))


def _opacity(b, kind):
    """Share of air replaced, 0..1, and the mask of an infection.

    An opacity is where a smooth random field is above the level that a share of the lungs exceeds. COVID-19 prefers
    the periphery and the bases of both lungs, Non-COVID one lobe; its mask is blank, as in COVID-QU-Ex.
    """
    covid, rng = kind == "COVID-19", b.rng
    field = b.noise(5) + 0.35 * b.noise(14) + rng.normal(1.8, 0.8) * b.y
    if covid:
        field += 2 * b.q + b.sides(0, 0.5)
        share = 0.06 + 0.8 * rng.beta(2, 2)
    else:
        field -= 6 * _radius(b.x - rng.choice([-1, 1]) * rng.uniform(0.3, 0.55), b.y - rng.uniform(-0.4, 0.4))
        share = rng.uniform(0.1, 0.5)
    above = (field - np.quantile(field[b.lung], 1 - share)) / rng.uniform(*FUZZ)
    texture = 1 + 0.08 * b.noise(20) + 0.12 * b.noise(50)
    density = rng.uniform(*DENSITY[kind]) * _ramp(above / 2 + 0.4) * texture
    if rng.random() < EFFUSION:  # hides the base, is no infection
        density = density + _ramp((b.y - b.diaphragm + b.sides(0.1, 0.15) + 0.1 * b.q) / 0.2)
    return np.clip(density, 0, 1), (above > 0) & b.lung & covid


def _devices(b):
    """Tubes, leads and electrodes over some of the patients."""
    rng, lines = b.rng, []
    s = np.linspace(0, 1, 12)
    for _ in range(rng.integers(1, 4)):  # leads
        ends = rng.uniform(-0.9, 0.9, 4) + 1j * rng.uniform([-1.1, -0.6, -0.4, 0], [-0.6, 0.3, 0.8, 1.1])
        z = ends[0] * (1 - s) ** 3 + 3 * ends[1] * s * (1 - s) ** 2 + 3 * ends[2] * s * s * (1 - s) + ends[3] * s**3
        ring = ends[3] + 0.035 * np.exp(2j * math.pi * s)
        lines += [(z[None], 0.012, rng.uniform(0.4, 1)), (ring[None], 0.02, 1.0)]
    tube = 0.02 * np.sin(3 * s) + 1j * (-1.1 + s * rng.choice([0.75, 1.9]))  # in the trachea or the stomach
    return b.strokes(lines + [(tube[None], 0.022, rng.uniform(0.3, 0.9))])


def _letter(b):
    """A burnt-in side marker, R or L, beside the shoulder."""
    rng = b.rng
    right = rng.random() < 0.7
    letter = np.array([1j, 0, 0.45, 0.6 + 0.12j, 0.6 + 0.38j, 0.45 + 0.5j, 0.5j, 0.25 + 0.5j, 0.65 + 1j] if right else [0, 1j, 0.6 + 1j])
    corner = (-0.95 if right else 0.85) + 1j * rng.uniform(-0.95, -0.4)
    return b.strokes([(corner + rng.uniform(0.08, 0.14) * letter[None], 0.022, 1.0)])


def _film(b, a):
    """Attenuation -> gray values in [0, 1]: scatter, window, film curve, quantum noise, collimation."""
    rng = b.rng
    a = a + _ramp(a / 0.2) * (0.025 * b.noise(5) + 0.012 * b.noise(40) - rng.uniform(0, 0.5) * (_blur(a, 8) - a.mean()))
    low, high = np.quantile(a[::4, ::4], [0.1, 0.97]).astype(np.float32)
    v = 1 / (1 + np.exp(rng.uniform(3, 4.5) * ((low + high) / 2 - a) / (high - low) + rng.normal(0, 0.4)))
    v = rng.uniform(-0.1, 0.06) + v * rng.uniform(0.85, 1.05)
    v += rng.uniform(*NOISE) * rng.standard_normal(v.shape, np.float32) * (0.3 + v)
    if rng.random() < 0.15:  # edges of the collimator
        v = v * (np.maximum(abs(b.x), abs(b.y)) < rng.uniform(0.95, 1.1))
    return v


def phantom(seed, index, kind, size=256, healthy=False):
    """Phantom number `index`: (image uint8, lung bool, infection bool), each (size, size); a function of its arguments.

    kind     one of CLASSES; opacities only where kind is not Normal, an infection mask only where it is COVID-19
    healthy  the same phantom before its illness: every other draw alike, no opacity, a blank infection mask
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    b = _Patient(rng, size)
    air, infection = b.air, np.zeros_like(b.lung)
    if kind != "Normal":
        density, opacity = _opacity(b, kind)  # drawn for the healthy too: every later draw is then alike
        if not healthy:
            air, infection = air * (1 - density), opacity
    a = _body(b) + _mediastinum(b) + _abdomen(b) + _ribs(b) + _shoulders(b) + _breasts(b) + _vessels(b)
    a = a - rng.uniform(*CONTRAST) * air
    if rng.random() < 0.35:
        a = a + 0.25 * _devices(b)
    v = _film(b, a)
    if rng.random() < 0.6:
        v = np.maximum(v, _letter(b))
    return (np.clip(v, 0, 1) * 255).round().astype(np.uint8), b.lung, infection


def _write_one(folder, kind, index, seed, size, infections):
    """Phantom `index` as PNG files in `folder`, in COVID-QU-Ex's layout: 0 and 255 in the masks."""
    image, lung, infection = phantom(seed, index, kind, size)
    parts = {"images": image, "lung masks": lung * np.uint8(255)}
    if infections:
        parts["infection masks"] = infection * np.uint8(255)
    for part, pixels in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / part / NAMES[kind].format(index))


@contextlib.contextmanager
def cancelling(pool):
    """An error or Ctrl-C within it cancels the pool's work that has not begun."""
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)  # and waits for the work that has begun
        raise


def write_phantoms(root, tree, counts, seed=0, size=256, progress=None):
    """Write a set of phantoms in the layout of COVID-QU-Ex; its path <root>/<tree> appears when it is complete.

    tree      "Lung Segmentation Data" or "Infection Segmentation Data"; the second has infection masks too
    counts    {split: {class: number of phantoms}}, the splits and classes in the order in which they are numbered
    progress  called as progress(done, total) after each phantom, or None

    A phantom's number, its index, is unique over the tree, so no picture is in two splits.
    """
    root = Path(root)
    if (root / tree).exists():
        raise FileExistsError(f"phantoms are written to a new folder, and {root / tree} is there already")
    root.mkdir(parents=True, exist_ok=True)
    (root / PHANTOMS_NOTE).write_text("Chest phantoms: generated pictures, not X-rays of people.\n")
    partial = root / f".{tree}.{os.getpid()}"
    jobs = [(partial / tree / split / kind, kind) for split in counts for kind, n in counts[split].items() for _ in range(n)]
    try:
        quiet = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is this process's affair
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), **quiet) as pool, cancelling(pool):
            writing = [pool.submit(_write_one, *job, i, seed, size, tree.startswith("Infection")) for i, job in enumerate(jobs, 1)]
            for done, future in enumerate(as_completed(writing), 1):
                future.result()
                if progress:
                    progress(done, len(jobs))
        partial.rename(root / tree)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


PHANTOM_COUNTS = {
    "Lung Segmentation Data": {split: dict.fromkeys(CLASSES, n) for split, n in (("Train", 400), ("Val", 100), ("Test", 20))},
    "Infection Segmentation Data": {
        split: {"COVID-19": n, "Non-COVID": n // 8, "Normal": n // 8} for split, n in (("Train", 800), ("Val", 200), ("Test", 80))
    },
}


def ensure_phantoms(task, progress=None):
    """The phantoms of a task in PHANTOMS, drawn on the first call; no picture is in both trees."""
    tree = TREES[task]
    if not (PHANTOMS / tree).is_dir():
        write_phantoms(PHANTOMS, tree, PHANTOM_COUNTS[tree], seed=list(PHANTOM_COUNTS).index(tree), progress=progress)
