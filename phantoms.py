r"""Chest phantoms: generated frontal X-rays whose masks are known. And where a run's images are.

A phantom is a map of attenuation, a sum of anatomical parts. A film curve turns it into gray.
Maps and places are (size, size) float32.

attenuation  0 is air, about 1 the soft tissue of the whole chest; negative is air inside the body
x, y         place in the body: x to the image's right, which is the patient's left, y downwards.
             The picture shows about [-1, 1] x [-1, 1]; x = 0 is the spine
lateral      |x|, the distance from the spine
across       0 at the spine, 1 at the inner chest wall: lateral over the half width of the rib cage
"""

import contextlib
import dataclasses
import shutil
import tempfile
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import conditions
import console
import pairs
from data import CLASSES, SPLITS, TREES, tree_folder
from diffusion import Purpose, philox

HERE = Path(__file__).resolve().parent
DATA_HOMES = (HERE / "COVID-QU-Ex", Path("COVID-QU-Ex"))  # here, then in the current folder
PHANTOMS = HERE / "phantoms"
PHANTOMS_NOTE = "PHANTOMS.txt"  # a root with this file holds phantoms, wherever it was copied to
NAMES = {"COVID-19": "covid_{}.png", "Non-COVID": "non_COVID ({}).png", "Normal": "Normal ({}).png"}
PHANTOM_COUNTS = {
    TREES["lung"]: {s: dict.fromkeys(CLASSES, n) for s, n in zip(SPLITS, (400, 100, 20))},
    TREES["infection"]: {
        s: dict(zip(CLASSES, (n, n // 8, n // 8))) for s, n in zip(SPLITS, (800, 200, 80))
    },
}

# What makes the masks hard to find: ranges, drawn anew for each phantom.
DENSITY = {"COVID-19": (0.3, 1.0), "Non-COVID": (0.7, 1.1)}  # share of air an opacity replaces
FUZZ = 0.3, 1.2  # width of an opacity's border, in standard deviations of its field
CONTRAST = 0.26, 0.56  # attenuation missing where there is air
BEHIND = 0.1, 0.5  # share of the air that lies behind heart and diaphragm
EDGE = 0.03, 0.26  # depth, in body units, over which the lung's edge fades in
NOISE = 0.006, 0.03  # quantum noise, of the full gray scale
EFFUSION = 0.30  # share of the phantoms with opacities that also have fluid over a diaphragm

LEFT, RIGHT = True, False  # the patient's
BULGES = (  # of the mediastinum's border: side, how far out, y, half length
    (RIGHT, 0.03, -0.35, 0.20),  # superior vena cava
    (RIGHT, 0.10, 0.20, 0.22),  # right atrium
    (LEFT, 0.07, -0.34, 0.08),  # aortic knob
    (LEFT, 0.05, -0.14, 0.11),  # pulmonary trunk
    (LEFT, 0.28, 0.34, 0.27),  # left ventricle
)


def step(a):
    """Smooth step: 0 below 0, 1 above 1."""
    a = np.clip(a, 0, 1)
    return a * a * (3 - 2 * a)


def dome(a):
    """Chord of a round body, entered at a = 0 and at its full thickness from a = 1 on."""
    return np.sqrt(1 - (1 - np.clip(a, 0, 1)) ** 2)


def bell(a, b=0.0):
    return np.exp(-(a**2) - b**2)


def radius(a, b):
    return np.sqrt(a * a + b * b)  # np.hypot is five times slower


class Patient:
    """A patient. Numbers are drawn in reading order: a draw that moves changes every phantom."""

    def __init__(self, rng, size):
        self.rng, self.size, self.normal, self.uniform = rng, size, rng.normal, rng.uniform
        self.turn = np.exp(1j * self.normal(0, 0.035))
        self.scale = self.uniform([0.82, 0.84], [1.16, 1.14])  # across the spine, along it
        self.shift = complex(self.normal(0, 0.05), self.normal(0, 0.05))
        scoliosis, phase = np.float32(self.normal(0, 0.02)), np.float32(self.normal(0, 1))
        pixel = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
        place = pixel + 1j * pixel[:, None] - np.complex64(self.shift)
        place = place * np.complex64(self.turn.conjugate())
        self.y = place.imag / np.float32(self.scale[1])
        self.x = place.real / np.float32(self.scale[0]) - scoliosis * np.sin(2 * self.y + phase)
        self.lateral, self.left = np.abs(self.x), self.x > 0
        self.breathe_in()

    def sides(self, mean, sd):
        """A number for each side of the body: the patient's left, x > 0, and the right."""
        return np.where(self.left, *self.normal(mean, sd, 2).astype(np.float32))

    def noise(self, cells):
        """N(0, 1), smooth over 1/cells of the picture."""
        a = Image.fromarray(self.rng.standard_normal((cells, cells), np.float32))
        a = np.asarray(a.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return a / a.std()

    def breathe_in(self):
        """Outlines, then `lung`, the mask, and `air`, 0..1, the thickness of lung in the beam."""
        top, base, apex = self.normal(-0.74, 0.04), self.normal(0.5, 0.05), self.sides(0.30, 0.02)
        down = np.clip((self.y - top) / (base - top), 0, 1)  # from the apex to the base
        pointed, width = self.uniform(0.1, 0.5), self.sides(0.74, 0.03)  # half width at the base
        wall = apex + (width - apex) * ((1 - pointed) * dome(down) + pointed * down * (2 - down))
        inner = apex + (self.sides(0.12, 0.015) - apex) * dome(down / 0.17)  # beside the spine
        cage = np.minimum(wall - self.lateral, self.lateral - inner) * (self.y > top)
        self.across = self.lateral / wall
        height, steepness = self.sides(self.normal(0.36, 0.08), 0.04), self.uniform(0.7, 1.6)
        self.diaphragm = self.diaphragm_domes(height, steepness, crest=self.sides(0.33, 0.04))
        self.border = self.sides(0.125, 0.02)  # of the mediastinum: its distance from the spine
        for side, out, y, length in BULGES:
            out, y = out * self.normal(1, 0.2), self.normal(y, 0.025)
            self.border += np.where(self.left == side, out * bell((self.y - y) / length), 0)
        self.lung, self.air = self.lungs(cage, self.uniform(*BEHIND), edge=self.uniform(*EDGE))

    def diaphragm_domes(self, height, steepness, crest):
        """y of the diaphragm. crest: the distance of each dome's top from the spine."""
        return height + steepness * (self.lateral - crest) ** 2

    def lungs(self, cage, behind, edge):
        """(mask, air). Heart and diaphragm cut the mask. cage: distance to the rib cage's walls."""
        front = np.minimum(np.minimum(cage, self.lateral - self.border), self.diaphragm - self.y)
        rear = np.minimum(cage, 0.9 * (self.diaphragm + 0.16 - self.y))  # behind both
        haze = 1 - 0.25 * bell((self.lateral - 0.15) / 0.2, self.y / 0.35)
        air = 0.4 * step(front / edge) + 0.6 * dome(front / 0.22)
        return front > 0, haze * ((1 - behind) * air + behind * dome(rear / 0.2))

    def soft_tissue(self):
        """Torso, shoulders, neck, chin, the arms beside them. 0 outside the body."""
        shoulder, width = self.normal(-0.78, 0.05), self.normal(0.94, 0.04)
        neck, chin = self.normal(0.27, 0.03), self.normal(-1.35, 0.12)
        axis, slant = self.sides(1.2, 0.08), self.normal(0.15, 0.08)
        half = width + 0.2 * step((0.1 - self.y) / 0.6)
        half = half - (half - neck) * np.sqrt(step((shoulder + 0.2 - self.y) / 0.42))
        torso = dome(0.95 * (half - self.lateral) / half)
        head = dome((1 - radius(self.x / 0.42, (self.y - chin) / 0.4)) / 0.5)
        off_axis = np.abs(self.lateral - axis - slant * self.y)  # of the arms
        flesh, bone = dome(1 - off_axis / 0.18), step((0.06 - off_axis) / 0.03)
        arms = step((self.y - shoulder) / 0.2) * (0.5 * flesh + 0.15 * bone)
        return np.maximum(0.85 * torso, arms) + 0.3 * head

    def breasts(self):
        """Soft shadows over the lower lungs, sharp at their lower edge; faint or absent in half."""
        x, y = self.sides(0.48, 0.05), self.sides(self.normal(0.22, 0.08), 0.02)
        shadow = dome((1 - radius((self.lateral - x) / 0.34, (self.y - y) / 0.30)) / 0.6)
        return max(0, self.normal(0.03, 0.06)) * shadow

    def mediastinum(self):
        """Heart, great vessels, hila, spine, trachea (dark)."""
        heart, hilum = self.heart(density=self.normal(0.17, 0.03)), self.sides(-0.06, 0.02)
        hila = 0.10 * bell((self.lateral - 0.17) / 0.06, (self.y - hilum) / 0.11)
        spine = self.spine(vertebra=self.normal(0.115, 0.008), phase=self.normal(0, 1))
        trachea = step((0.05 - np.abs(self.x + 0.01)) / 0.03) * step((-0.2 - self.y) / 0.06)
        return heart + hila + self.normal(0.10, 0.03) * spine - 0.10 * trachea

    def heart(self, density):
        return density * dome((self.border - self.lateral) / 0.2) * step((self.y + 0.75) / 0.4)

    def spine(self, vertebra, phase):
        """Vertebrae, each `vertebra` high, with their pedicles."""
        level = self.y / vertebra + phase
        level = np.abs(level - np.rint(level))  # 0 in the middle of a vertebra, 0.5 between two
        column = step((0.10 + 0.02 * level - self.lateral) / 0.04)
        pedicles = 0.4 * bell((self.lateral - 0.055) / 0.02, level / 0.14)
        return column * (0.7 + 0.3 * step((0.45 - level) / 0.12)) + pedicles

    def abdomen(self):
        """Liver and stomach below the diaphragm. Half of the patients have gas in the left dome."""
        below = self.y - self.diaphragm
        organs = 0.10 * dome(below / 0.12) + 0.10 * step(below / 0.5)
        x, width = self.normal(0.36, 0.06), self.normal(0.13, 0.03)  # of the gas
        depth, height = self.normal(0.16, 0.04), self.normal(0.08, 0.02)
        gas = radius((self.x - x) / width, (below - depth) / height) + 0.15 * self.noise(12)
        density = (self.rng.random() < 0.5) * self.uniform(0.1, 0.3)
        return organs * step((1.12 - self.across) / 0.15) - density * step((1 - gas) / 0.6)

    def rib_cage(self):
        """Posterior ribs fall away from the spine, fainter anterior ones rise from the sternum."""
        below, inward = self.y + 0.75, 1 - np.minimum(self.across, 1)
        cube = self.across * self.across * self.across
        fall = (1 + 0.5 * below) * (0.16 * cube - 0.05 * np.sin(2.6 * self.across))
        rise = (0.55 + 0.3 * below) * inward * (0.7 + 0.3 * inward)
        spacing = self.normal(0.155, 0.01)
        posterior = self.ribs(fall, spacing, phase=self.normal(0, 1), half=0.21, begin=0.1)
        anterior = self.ribs(rise, spacing, phase=self.normal(0, 1), half=0.26, begin=0.38)
        air = 0.35 + 0.65 * step((self.diaphragm + 0.1 - self.y) / 0.2)  # fainter below
        inside = air * step((1.06 - self.across) / 0.04) * step(below / 0.1)
        rim = 0.6 + np.minimum(cube, 1) ** 2  # seen edge-on at the wall
        return self.uniform(0.06, 0.2) * inside * (posterior * rim + 0.35 * anterior)

    def ribs(self, course, spacing, phase, half, begin):
        """Bands along `course`, which is y relative to a rib's root. half: half width / spacing."""
        off_axis = (self.y - course) / spacing + phase
        off_axis = np.abs(off_axis - np.rint(off_axis))  # 0 on a rib, 0.5 between two
        cortex = 0.55 + 0.45 * np.clip(off_axis / half, 0, 1) ** 2  # is denser
        return step((half - off_axis) / 0.08) * cortex * step((self.lateral - begin) / 0.08)

    def shoulders(self):
        """Clavicles, scapulae and heads of the humerus."""
        y = self.sides(self.normal(-0.52, 0.05), 0.03)
        rise = self.sides(self.normal(0.25, 0.1), 0.05)
        border, slant = self.sides(0.70, 0.05), self.normal(0.18, 0.08)
        bones = self.normal(0.14, 0.03) * self.clavicles(y, rise)
        bones = bones + self.normal(0.10, 0.03) * self.scapulae(border, slant)
        return bones + 0.14 * step((0.13 - radius(self.lateral - 1.0, self.y + 0.62)) / 0.04)

    def clavicles(self, y, rise):
        """An S from the sternum at height y, rising outwards."""
        out = self.lateral - 0.06
        off_axis = np.abs(self.y - y + rise * out - 0.035 * np.sin(7 * out))
        shaft = step((0.045 + 0.1 * (out - 0.4) ** 2 - off_axis) / 0.025)  # with thick ends
        return shaft * step((out - 0.02) / 0.06) * step((0.85 - self.lateral) / 0.05)

    def scapulae(self, border, slant):
        """border: distance of the medial border from the spine, at y = 0."""
        out = self.lateral - border - slant * self.y
        blade = step(out / 0.03) * step((0.3 - out) / 0.2)
        return blade * step((0.05 - self.y) / 0.4) * step((self.y + 0.72) / 0.12)

    def strokes(self, lines):
        """0..1: polylines, drawn in order; each points x + iy (lines, points), width, gray 0..1."""
        picture = Image.new("L", (2 * self.size, 2 * self.size))  # finer, then reduced
        pencil = ImageDraw.Draw(picture)
        for points, width, gray in lines:
            upright = points.real * self.scale[0] + 1j * points.imag * self.scale[1]
            pixels = (upright * self.turn + self.shift + (1 + 1j)) * self.size
            for line in pixels.astype(np.complex64).view(np.float32).tolist():  # x0, y0, x1, ...
                pencil.line(line, round(255 * gray), max(1, round(width * self.size)))
        return np.asarray(picture.reduce(2), np.float32) / 255

    def vessels(self):
        """Arteries and veins, a tree of strokes from each hilum; and a streak of atelectasis."""
        lines = self.vessel_tree(-1) + self.vessel_tree(1)
        start = complex(self.rng.choice([-1, 1]) * self.uniform(0.25, 0.6), self.uniform(0, 0.35))
        end = start + self.uniform(0.1, 0.3) * np.exp(1j * self.normal(0, 0.5))
        lines.append((np.array([[start, end]]), 0.015, self.uniform(0, 1)))
        tree = self.uniform(0.08, 0.18) * self.strokes(lines[::-1])
        return self.air * (tree + 0.015 * self.noise(70))

    def vessel_tree(self, side):
        """8 vessels from a hilum. A fork halves the cross-section. side: the sign of x, -1 or 1."""
        angle = np.linspace(-1.5, 1.4, 8) + self.normal(0, 0.12, 8)
        start, lines = side * 0.16 + 1j * self.normal(-0.05, 0.03, 8), []
        for width, gray in (0.024, 1.0), (0.016, 0.8), (0.011, 0.65), (0.008, 0.5), (0.006, 0.4):
            length = self.uniform(0.07, 0.14, len(start))
            end = start + length * (side * np.cos(angle) + 1j * np.sin(angle))
            lines.append((np.stack([start, end], -1), width, gray))
            start = np.repeat(end, 2)
            angle = np.repeat(angle, 2) + self.normal(0, 0.38, len(start))
        return lines

    def opacity(self, kind):
        """Share of air replaced, 0..1, and infection mask, blank for Non-COVID as in COVID-QU-Ex.

        An opacity is where a smooth random field is above the level that a share of the lungs
        exceeds. COVID-19 prefers the periphery and the bases of both lungs, Non-COVID one lobe.
        """
        field = self.noise(5) + 0.35 * self.noise(14) + self.normal(1.8, 0.8) * self.y
        if kind == "COVID-19":
            field += 2 * self.across + self.sides(0, 0.5)
            share = 0.06 + 0.8 * self.rng.beta(2, 2)
        else:
            x, y = self.rng.choice([-1, 1]) * self.uniform(0.3, 0.55), self.uniform(-0.4, 0.4)
            field -= 6 * radius(self.x - x, self.y - y)
            share = self.uniform(0.1, 0.5)
        above = (field - np.quantile(field[self.lung], 1 - share)) / self.uniform(*FUZZ)
        texture = 1 + 0.08 * self.noise(20) + 0.12 * self.noise(50)
        density = self.uniform(*DENSITY[kind]) * step(above / 2 + 0.4) * texture
        if self.rng.random() < EFFUSION:  # hides the base, is no infection
            level = self.y - self.diaphragm + self.sides(0.1, 0.15) + 0.1 * self.across
            density = density + step(level / 0.2)
        return np.clip(density, 0, 1), (above > 0) & self.lung & (kind == "COVID-19")

    def devices(self):
        """Leads, each with its electrode, and a tube in the trachea or the stomach."""
        s, lines = np.linspace(0, 1, 12), []
        for _ in range(self.rng.integers(1, 4)):
            x = self.uniform(-0.9, 0.9, 4)
            a, b, c, d = x + 1j * self.uniform([-1.1, -0.6, -0.4, 0], [-0.6, 0.3, 0.8, 1.1])
            lead = a * (1 - s) ** 3 + 3 * b * s * (1 - s) ** 2 + 3 * c * s * s * (1 - s) + d * s**3
            electrode = d + 0.035 * np.exp(2j * np.pi * s)
            lines += (lead[None], 0.012, self.uniform(0.4, 1)), (electrode[None], 0.02, 1.0)
        tube = 0.02 * np.sin(3 * s) + 1j * (-1.1 + s * self.rng.choice([0.75, 1.9]))
        return self.strokes([*lines, (tube[None], 0.022, self.uniform(0.3, 0.9))])

    def side_marker(self):
        """A burnt-in letter, R or L, beside the shoulder."""
        x, letter = 0.85, [0, 1j, 0.6 + 1j]  # L
        if self.rng.random() < 0.7:
            bow = [0, 0.45, 0.6 + 0.12j, 0.6 + 0.38j, 0.45 + 0.5j, 0.5j]
            x, letter = -0.95, [1j, *bow, 0.25 + 0.5j, 0.65 + 1j]  # R
        corner, height = x + 1j * self.uniform(-0.95, -0.4), self.uniform(0.08, 0.14)
        return self.strokes([(corner + height * np.array(letter)[None], 0.022, 1.0)])

    def film(self, a):
        """Attenuation -> gray, about 0..1: scatter, window, film curve, noise, collimation."""
        blurred = Image.fromarray(a).resize((8, 8), Image.Resampling.BOX)
        blurred = np.asarray(blurred.resize(a.shape, Image.Resampling.BICUBIC))
        uneven = 0.025 * self.noise(5) + 0.012 * self.noise(40)
        a = a + step(a / 0.2) * (uneven - self.uniform(0, 0.5) * (blurred - a.mean()))
        low, high = np.quantile(a[::4, ::4], [0.1, 0.97]).astype(np.float32)
        steepness, exposure = self.uniform(3, 4.5), self.normal(0, 0.4)
        gray = 1 / (1 + np.exp(steepness * ((low + high) / 2 - a) / (high - low) + exposure))
        gray = self.uniform(-0.1, 0.06) + gray * self.uniform(0.85, 1.05)
        gray += self.uniform(*NOISE) * self.rng.standard_normal(a.shape, np.float32) * (0.3 + gray)
        if self.rng.random() < 0.15:  # edges of the collimator
            gray = gray * (np.maximum(abs(self.x), abs(self.y)) < self.uniform(0.95, 1.1))
        return gray


def phantom(seed, index, kind, size=256, healthy=False):
    """Phantom number `index`: (image uint8, lung bool, infection bool), each (size, size).

    kind     one of CLASSES. Normal has no opacity; only COVID-19 has an infection mask
    healthy  the same phantom before its illness: every other draw alike, no opacity, a blank mask
    """
    patient = Patient(philox(seed, Purpose.PHANTOM, index), size)
    air, infection = patient.air, np.zeros_like(patient.lung)
    if kind != "Normal":
        density, mask = patient.opacity(kind)  # for the healthy too: all later draws are alike
        if not healthy:
            air, infection = air * (1 - density), mask
    tissue = patient.soft_tissue() + patient.mediastinum() + patient.abdomen() + patient.rib_cage()
    tissue = tissue + patient.shoulders() + patient.breasts() + patient.vessels()
    attenuation = tissue - patient.uniform(*CONTRAST) * air
    if patient.rng.random() < 0.35:
        attenuation = attenuation + 0.25 * patient.devices()
    gray = patient.film(attenuation)
    if patient.rng.random() < 0.6:
        gray = np.maximum(gray, patient.side_marker())
    return (np.clip(gray, 0, 1) * 255).round().astype(np.uint8), patient.lung, infection


def write_one(folder, kind, index, seed, size, infections):
    """Write phantom `index` as the PNG files of COVID-QU-Ex, masks as 0 and 255, into `folder`."""
    image, lung, infection = phantom(seed, index, kind, size)
    parts = {"images": image, "lung masks": lung * np.uint8(255)}
    if infections:
        parts["infection masks"] = infection * np.uint8(255)
    for part, pixels in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / part / NAMES[kind].format(index))


def write_all(jobs, options, progress):
    """write_one for each job, in parallel."""
    with console.worker_processes() as pool:
        futures = [pool.submit(write_one, *job, i, *options) for i, job in enumerate(jobs, 1)]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            progress(done, len(jobs))


def write_phantoms(root, tree, counts, seed=0, size=256, progress=lambda *_: None):
    """Write a set of phantoms. Its path <root>/<tree> appears when it is complete.

    A set that is there stays. Another process that draws it is waited for.

    tree      a name of TREES. The infection tree has infection masks too
    counts    {split: {class: number of phantoms}}, numbered in this order: each is in one split
    progress  called as progress(done, total) after each phantom
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / PHANTOMS_NOTE).write_text("Chest phantoms: generated pictures, not X-rays of people.\n")
    with open(root / PHANTOMS_NOTE, "a") as note:
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            fcntl.flock(note, fcntl.LOCK_EX)  # released by the death of its process, too
            for killed in root.glob(f".{tree}.*"):
                shutil.rmtree(killed, ignore_errors=True)
        if (root / tree).exists():
            return
        with tempfile.TemporaryDirectory(prefix=f".{tree}.", dir=root) as partial:
            jobs, whole = [], Path(partial, tree)
            for split in counts:
                for kind, n in counts[split].items():
                    jobs += n * [(whole / tree / split / kind, kind)]
            write_all(jobs, (seed, size, tree == TREES["infection"]), progress)
            whole.rename(root / tree)


def ensure_phantoms(task, progress=lambda *_: None):
    """Draw the phantoms of a task into PHANTOMS on the first call. No picture is in both trees."""
    tree = TREES[task]
    if not (PHANTOMS / tree).is_dir():
        seed = list(PHANTOM_COUNTS).index(tree)
        write_phantoms(PHANTOMS, tree, PHANTOM_COUNTS[tree], seed=seed, progress=progress)


def locate(folder, task):
    """(root, whether it holds phantoms). No folder: the first of DATA_HOMES, else PHANTOMS.

    UserError: the folder, or the home that is there, does not have the layout of the task; none
    given for masks of one's own.
    """
    own, rule = task == "masks", "--task masks needs --data DIR, a folder with images/ and masks/"
    console.refuse(own and folder is None, f"{rule}, got none")
    homes = [home for home in DATA_HOMES if home.is_dir()]
    if folder is None and not homes:
        return PHANTOMS, True
    root = Path(homes[0] if folder is None else folder).expanduser()
    tree = pairs.layout(root)[0] / "images" if own else tree_folder(root, task)
    return root, any((parent / PHANTOMS_NOTE).is_file() for parent in tree.parents)


def root_of(cfg, given):
    """(root, whether it holds phantoms): `given`, else the run's own, else what `locate` finds."""
    here = cfg.data != str(PHANTOMS) and Path(cfg.data).is_dir() or cfg.task == "masks"
    if given is None and cfg.phantoms and not here:  # of another machine: the same are drawn here
        return PHANTOMS, True
    return locate(given or cfg.data or None, cfg.images_of)


def find_data(cfg, given):
    """cfg with the root of its images. Phantoms are announced, and drawn on the first use."""
    root, drawn = root_of(cfg, given)
    if given is None and root == PHANTOMS:
        if not cfg.data:
            homes = " and ".join(dict.fromkeys(str(home.resolve()) for home in DATA_HOMES))
            console.message(
                f"No X-rays found: COVID-QU-Ex is looked for in {homes}. It can be had from Kaggle "
                "(anasmohammedtahir/covidqu); unpack it there, or name its folder with --data. "
                "Until then this run, and its numbers, are about chest phantoms: generated X-rays."
            )
        ensure_phantoms(cfg.images_of, console.progress_line("drawing phantoms"))
    return dataclasses.replace(cfg, data=str(root), phantoms=drawn)


def splits_of(cfg, names, run=None, masks=None):
    """{name: data.Split} of a run's images. run: one that goes on; masks: as data.load has it."""
    if cfg.task == "masks":
        return pairs.splits_of(cfg, names, run)

    lines = {name: console.progress_line(f"decoding {name}") for name in names}
    return {name: conditions.load(cfg, name, line, masks) for name, line in lines.items()}
