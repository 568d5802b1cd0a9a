"""Chest phantoms: what their masks promise, how a set is written, and which images a run takes."""

import dataclasses
import math
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import console
import data
import phantoms

LUNG, INFECTION = data.TREES["lung"], data.TREES["infection"]


# ---------------------------------------- where the data is


@pytest.fixture
def root(tmp_path):
    """The folders of the lung tree, as Kaggle unpacks them. `locate` looks no further."""
    for split in data.SPLITS:
        (tmp_path / "set" / LUNG / LUNG / split).mkdir(parents=True)
    return tmp_path / "set"


def test_locate_takes_a_given_folder_or_says_what_it_looked_for(root, tmp_path):
    assert phantoms.locate(str(root), "lung") == (root, False)
    looked = r"no data for infection: looked for Train, Val, Test in .*Infection Segm"
    with pytest.raises(console.UserError, match=looked):
        phantoms.locate(root, "infection")
    with pytest.raises(console.UserError, match=r"nowhere: no data for lung"):
        phantoms.locate(tmp_path / "nowhere", "lung")


def test_locate_without_a_folder_takes_the_first_home_that_is_there_else_phantoms(
    root, tmp_path, monkeypatch
):
    """A data set that lacks the task is refused: it is no reason for phantoms."""
    monkeypatch.setattr(phantoms, "DATA_HOMES", (tmp_path / "nowhere", root))
    assert phantoms.locate(None, "lung") == (root, False)
    with pytest.raises(console.UserError, match="no data for infection"):
        phantoms.locate(None, "infection")
    monkeypatch.setattr(phantoms, "DATA_HOMES", (tmp_path / "nowhere",))
    assert phantoms.locate(None, "infection") == (phantoms.PHANTOMS, True)


def test_phantoms_given_by_name_are_still_phantoms(root):
    assert not phantoms.locate(root, "lung")[1]
    (root / phantoms.PHANTOMS_NOTE).write_text("generated")
    assert phantoms.locate(root, "lung") == (root, True) and phantoms.locate(root / LUNG, "lung")[1]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The fields that find_data reads."""

    data: str
    phantoms: bool = True
    task: str = "lung"

    @property
    def images_of(self):
        return self.task


def test_a_run_on_phantoms_finds_its_images_again(tmp_path, monkeypatch, capsys):
    """Its own folder while it is there, else this checkout's; not a word about missing X-rays."""
    drawn = []
    monkeypatch.setattr(phantoms, "PHANTOMS", tmp_path / "here")
    monkeypatch.setattr(phantoms, "ensure_phantoms", lambda task, _: drawn.append(task))
    monkeypatch.setattr(phantoms, "locate", lambda given, task: (Path(given), True))
    there = RunConfig(data=str(tmp_path))
    assert phantoms.find_data(there, None) == there and drawn == []
    moved = phantoms.find_data(RunConfig(data=str(tmp_path / "gone")), None)
    assert moved.data == str(tmp_path / "here") and moved.phantoms and drawn == ["lung"]
    assert capsys.readouterr().out == ""


def test_phantoms_are_drawn_where_nothing_was_asked_for_and_never_take_the_place_of_xrays(
    tmp_path, monkeypatch, capsys
):
    """Without any data they are announced, with the places searched. Later runs are quiet.

    A folder of X-rays that is gone is refused, given now or by the run itself.
    """
    drawn = []
    monkeypatch.setattr(phantoms, "PHANTOMS", tmp_path)
    monkeypatch.setattr(phantoms, "DATA_HOMES", (tmp_path / "a", tmp_path / "b"))
    monkeypatch.setattr(phantoms, "ensure_phantoms", lambda task, _: drawn.append(task))
    found = phantoms.find_data(RunConfig(data="", phantoms=False), None)
    assert found == RunConfig(data=str(tmp_path)) and drawn == ["lung"]
    searched = f"COVID-QU-Ex is looked for in {tmp_path / 'a'} and {tmp_path / 'b'}. "
    assert capsys.readouterr().out.startswith(f"No X-rays found: {searched}")
    monkeypatch.setattr(phantoms, "DATA_HOMES", (tmp_path / "a", Path("a")))  # where this file is
    monkeypatch.chdir(tmp_path)
    phantoms.find_data(RunConfig(data="", phantoms=False), None)
    assert f"is looked for in {tmp_path / 'a'}. It can be had" in capsys.readouterr().out
    assert drawn.pop() == "lung"
    other_task = RunConfig(data=str(tmp_path), task="infection")
    assert phantoms.find_data(other_task, None) == other_task and drawn == ["lung", "infection"]
    assert capsys.readouterr().out == ""
    gone = str(tmp_path / "gone")
    for cfg, given in (RunConfig(gone, phantoms=False), None), (RunConfig(gone), gone):
        with pytest.raises(console.UserError, match="gone: no data for lung"):
            phantoms.find_data(cfg, given)
    assert drawn == ["lung", "infection"]


# ---------------------------------------- the phantom


@pytest.fixture(scope="module")
def examples():
    """24 phantoms of each class: {class: (images, lungs, infections)}, each (24, 64, 64)."""
    sets = {c: [phantoms.phantom(7, i, c, 64) for i in range(24)] for c in data.CLASSES}
    return {c: tuple(np.stack(part) for part in zip(*s)) for c, s in sets.items()}


def best_threshold_dice(images, masks):
    """The best pooled DICE of "brighter than c" and "darker than c" over all c."""
    inside, everywhere = (np.bincount(a, minlength=256) for a in (images[masks], images.ravel()))
    best = 0
    for order in (slice(None), slice(None, None, -1)):
        hits, found = np.cumsum(inside[order]), np.cumsum(everywhere[order])
        best = max(best, (2 * hits / (found + masks.sum())).max())
    return best


def test_a_phantom_is_a_function_of_seed_index_and_class(examples):
    """Drawn alone and last first, it is the same. Another seed, index or class: another picture."""
    again = [phantoms.phantom(7, i, "COVID-19", 64) for i in (23, 5)]
    for i, drawn in zip((23, 5), again):
        assert all(np.array_equal(a, b[i]) for a, b in zip(drawn, examples["COVID-19"]))
    others = (8, 5, "COVID-19"), (7, 6, "COVID-19"), (7, 5, "Normal")
    for seed, index, kind in others:
        assert not np.array_equal(again[1][0], phantoms.phantom(seed, index, kind, 64)[0])


def test_the_numbers_of_a_phantom_are_those_that_drew_the_published_ones(monkeypatch):
    """numpy's Philox of the key (seed, index), from its beginning."""

    class Began(Exception):
        pass

    def patient(rng, size):
        raise Began(rng.bit_generator.random_raw(100).tolist())

    monkeypatch.setattr(phantoms, "Patient", patient)
    with pytest.raises(Began) as began:
        phantoms.phantom(3, 7, "Normal", 64)
    assert began.value.args[0] == np.random.Philox(key=[3, 7]).random_raw(100).tolist()


def test_fluid_hides_the_base_of_the_lungs_in_as_many_phantoms_as_its_share(monkeypatch):
    """In none: a share of 0. In all: a share of 1; it fills the air below a level, and no other."""
    air = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(phantoms, "EFFUSION", share)
        patients = [phantoms.Patient(np.random.default_rng(i), 64) for i in range(8)]
        air[share] = [1 - patient.opacity("COVID-19")[0] for patient in patients]
    for patient, without, filled in zip(patients, air[0.0], air[1.0]):
        fluid = without - filled
        assert fluid.min() > -1e-6 and (fluid > 0.1).any()
        deep, high = patient.y > patient.diaphragm + 0.6, patient.y < patient.diaphragm - 0.8
        assert filled[deep & (patient.across < 1)].max(initial=0) < 0.05
        assert abs(fluid[high & patient.lung]).max(initial=0) < 1e-6


def test_devices_and_markers_are_as_frequent_as_their_shares(monkeypatch):
    """0.35 and 0.6 of 200 phantoms, to 4 standard errors."""
    drawn = []
    for name in ("devices", "side_marker"):
        monkeypatch.setattr(phantoms.Patient, name, lambda p, name=name: drawn.append(name) or 0)
    for i in range(200):
        phantoms.phantom(0, i, "Normal", 16)
    for name, share in (("devices", 0.35), ("side_marker", 0.6)):
        error = math.sqrt(share * (1 - share) / 200)
        assert drawn.count(name) / 200 == pytest.approx(share, abs=4 * error)


def test_a_marker_stands_on_the_side_that_it_names():
    """R beside the patient's right shoulder, at the picture's left, 7 times in 10; else L."""
    left = []
    for i in range(100):
        place = np.argwhere(phantoms.Patient(np.random.default_rng(i), 64).side_marker() > 0.5)
        if len(place):  # a patient who is turned or shifted can hide it
            left.append(place[:, 1].mean() < 32)
    assert len(left) > 60 and 0.5 < np.mean(left) < 0.9


def test_quantum_noise_is_of_its_size_and_grows_with_the_exposure(monkeypatch):
    """Between two films of one patient: 0.02 N(0, 1) (0.3 + gray)."""
    films = {}
    for size in (0.0, 0.02):
        monkeypatch.setattr(phantoms, "NOISE", (size, size))
        patients = [phantoms.Patient(np.random.default_rng(i), 64) for i in range(9)]
        films[size] = [patient.film(1 - patient.air) for patient in patients]
    z = [(b - a) / (0.3 + a) for a, b in zip(films[0.0], films[0.02])]
    assert np.median([part.std() for part in z]) == pytest.approx(0.02, rel=0.05)


def test_the_healthy_twin_of_a_phantom_differs_by_its_opacities_alone(monkeypatch):
    """No infection, the same lungs, darker where opacities were, and not a Normal phantom.

    The very same picture once opacities hold no density.
    """
    sick, lung, infection = phantoms.phantom(0, 3, "COVID-19")
    twin, same, blank = phantoms.phantom(0, 3, "COVID-19", healthy=True)
    assert np.array_equal(lung, same) and infection.any() and not blank.any()
    brighter = sick.astype(float) - twin
    assert brighter[infection].mean() > 10 + abs(brighter[~lung].mean())
    normal = phantoms.phantom(0, 3, "Normal")[0]
    assert np.array_equal(phantoms.phantom(0, 3, "Normal", healthy=True)[0], normal)
    assert not np.array_equal(normal, twin)
    opacity = phantoms.Patient.opacity

    def no_density(patient, kind):
        return [0 * part for part in opacity(patient, kind)]

    monkeypatch.setattr(phantoms.Patient, "opacity", no_density)
    assert np.array_equal(phantoms.phantom(0, 3, "COVID-19")[0], twin)


def test_the_masks_of_a_phantom_are_those_of_its_class(examples):
    """Infection lies within the lungs, in every COVID-19 phantom and in no other.

    Lung and infection take the shares of the picture that they have in real ones.
    """
    for c, (_, lung, infection) in examples.items():
        assert not (infection & ~lung).any()
        assert infection.any((1, 2)).all() == (c == "COVID-19") == infection.any()
        assert 0.15 < lung.mean() < 0.33
    assert 0.06 < examples["COVID-19"][2].mean() < 0.17


def contrast(images, inside, beside):
    """Mean gray of `inside` minus that of `beside`, over the images that have both."""
    pairs = [(x[a], x[b]) for x, a, b in zip(images, inside, beside) if a.any() and b.any()]
    return np.mean([a.mean() - b.mean() for a, b in pairs])


def test_the_masks_of_a_phantom_fit_its_picture(examples):
    """Lung is darker than what lies around it, infection brighter than the lung beside it.

    The masks of the next phantom fit worse.
    """
    images, lung, _ = examples["Normal"]
    around = np.zeros_like(lung)
    around[:, 3:-3, 3:-3] = True
    next_lung = np.roll(lung, 1, 0)
    fit = contrast(images, lung, around & ~lung)
    assert fit < -25 and contrast(images, next_lung, around & ~next_lung) > fit + 3
    images, lung, infection = examples["COVID-19"]
    next_infection = np.roll(infection, 1, 0)
    fit = contrast(images, infection, lung & ~infection)
    assert fit > 8
    assert contrast(images, next_infection & lung, lung & ~next_infection) < fit / 2


def test_no_threshold_solves_the_phantoms(examples):
    """The best one, either way, stays under 0.80 DICE on lung and under 0.50 on infection."""
    images, lungs = (np.concatenate([examples[c][k] for c in data.CLASSES]) for k in (0, 1))
    assert best_threshold_dice(images, lungs) < 0.80
    assert best_threshold_dice(examples["COVID-19"][0], examples["COVID-19"][2]) < 0.50


def test_a_phantom_is_the_same_patient_at_every_size(examples):
    """At three times the size, every third pixel shows the same place, so the lungs are the same.

    Opacities are levels of a resized noise and differ at their borders.
    """
    larger = [phantoms.phantom(7, i, "COVID-19", 192) for i in range(24)]
    lung, infection = (np.stack([x[k][1::3, 1::3] for x in larger]) for k in (1, 2))
    assert (lung != examples["COVID-19"][1]).sum() < 10  # of 98304: rounding, at an edge
    both = (infection & examples["COVID-19"][2]).sum((1, 2))
    dice = 2 * both / (infection.sum((1, 2)) + examples["COVID-19"][2].sum((1, 2)))
    assert dice.min() > 0.95


class MeanDraws:
    """A random generator that always draws the mean."""

    def normal(self, mean, sd, size=None):
        return mean if size is None else np.full(size, np.mean(mean))

    def uniform(self, low, high):
        return np.add(low, high) / 2 if np.ndim(low) else (low + high) / 2


def test_the_mean_patient_has_its_landmarks_where_its_numbers_say():
    """The heart lies to the patient's left, and takes less than half of the width of the chest.

    Read off the lung mask, to a pixel: apices, crest of the right diaphragm, the angles between
    diaphragm and wall, and the borders of heart and right atrium.
    """
    patient = phantoms.Patient(MeanDraws(), 400)
    pixel = 2 / 400 / 0.99
    right, left = patient.lung & ~patient.left, patient.lung & patient.left
    for lung in right, left:
        apex, lowest = patient.y[lung].argmin(), patient.y[lung].argmax()
        assert patient.y[lung][apex] == pytest.approx(-0.74, abs=2 * pixel)
        assert patient.lateral[lung][apex] == pytest.approx(0.30, abs=0.03)
        assert patient.lateral[lung][lowest] == pytest.approx(0.74, abs=2 * pixel)

    def ends(lung, at, value, of):
        """Smallest and largest `of` in the lung where `at` is `value`."""
        places = of[lung & (abs(at - value) < pixel / 2 + 1e-6)]
        return places.min(), places.max()

    crest = ends(right, patient.lateral, 0.33, patient.y)[1]
    atrium, wall = ends(right, patient.y, 0.2, patient.lateral)
    ventricle = ends(left, patient.y, 0.34, patient.lateral)[0]
    assert crest == pytest.approx(0.36, abs=pixel)
    assert atrium == pytest.approx(0.125 + 0.10, abs=pixel)
    assert ventricle == pytest.approx(0.125 + 0.28, abs=pixel)
    assert 0.40 < (atrium + ventricle) / (2 * wall) < 0.50  # the cardiothoracic ratio


class HighDraws(MeanDraws):
    """A random generator that draws two standard deviations above the mean, or the highest."""

    def normal(self, mean, sd, size=None):
        return super().normal(mean + 2 * sd, sd, size)

    def uniform(self, low, high):
        return super().uniform(high, high)


def test_a_stroke_lands_at_its_place_in_a_body_that_is_turned_scaled_and_shifted():
    """A dot drawn at x + iy covers the pixels whose place is x, y. There the spine is not bent."""
    patient = phantoms.Patient(HighDraws(), 400)
    x, y = 0.3, (math.pi - 2) / 2  # the zero of the scoliosis sin(2 y + 2)
    dot = patient.strokes([(np.array([[x + 1j * y, x + 0.001 + 1j * y]]), 0.02, 1.0)]) > 0.5
    assert patient.x[dot].mean() == pytest.approx(x, abs=0.01)
    assert patient.y[dot].mean() == pytest.approx(y, abs=0.01)


# ---------------------------------------- sets of phantoms


def test_phantoms_are_written_in_the_layout_and_read_by_the_loader(tmp_path):
    """Both trees: `load` returns what `phantom` drew, and no picture is in two splits."""
    counts = {split: dict.fromkeys(data.CLASSES, n) for split, n in zip(data.SPLITS, (2, 1, 1))}
    seen = []
    for tree, task in ((LUNG, "lung"), (INFECTION, "infection")):
        calls = []

        def count(done, total, calls=calls):
            calls.append((done, total))

        phantoms.write_phantoms(tmp_path, tree, counts, seed=3, size=32, progress=count)
        assert calls == [(i, 12) for i in range(1, 13)]
        index = 0
        for split in data.SPLITS:
            loaded = data.load(tmp_path, task, split, data.CLASSES, 32, tmp_path / "cache")
            kinds = [kind for kind, n in counts[split].items() for _ in range(n)]
            assert len(loaded.names) == len(kinds)
            for row, kind in enumerate(kinds):
                index += 1
                image, lung, infection = phantoms.phantom(3, index, kind, 32)
                assert np.array_equal(loaded.images[row, 0], image)
                mask = lung if task == "lung" else infection
                assert np.array_equal(loaded.masks[row, 0] > 0, mask)
            seen += [image.tobytes() for image in loaded.images] if task == "lung" else []
    assert len(set(seen)) == 12
    assert phantoms.locate(str(tmp_path), "lung") == (tmp_path, True)


def test_an_interrupted_drawing_leaves_no_tree(tmp_path):
    """Stopped after the third phantom: no part of the tree stays. The next call draws it whole.

    It removes what a killed drawing has left.
    """

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    counts = {split: {"Normal": 2} for split in data.SPLITS}
    with pytest.raises(KeyboardInterrupt):
        phantoms.write_phantoms(tmp_path, LUNG, counts, size=16, progress=stop)
    assert [f.name for f in tmp_path.iterdir()] == [phantoms.PHANTOMS_NOTE]
    (tmp_path / f".{LUNG}.killed" / LUNG).mkdir(parents=True)
    phantoms.write_phantoms(tmp_path, LUNG, counts, size=16)
    assert {f.name for f in tmp_path.iterdir()} == {phantoms.PHANTOMS_NOTE, LUNG}
    assert len(data.load(tmp_path, "lung", "Val", "Normal", 16, tmp_path / "cache").names) == 2


def test_each_task_gets_phantoms_of_its_own(tmp_path, monkeypatch):
    """ensure_phantoms draws the tree of the task, once, and the other tree from another seed."""
    drawn = []

    def draw(root, tree, counts, seed, progress):
        drawn.append((tree, seed))
        (root / tree).mkdir()

    monkeypatch.setattr(phantoms, "PHANTOMS", tmp_path)
    monkeypatch.setattr(phantoms, "write_phantoms", draw)
    for task in ("lung", "synthesis", "infection", "lung"):
        phantoms.ensure_phantoms(task)
    assert drawn == [(LUNG, 0), (INFECTION, 1)]


def test_a_stop_signal_while_phantoms_are_drawn_cancels_what_has_not_begun_and_leaves_nothing(
    tmp_path, monkeypatch
):
    """SIGTERM is a Ctrl-C here. The pool is told to cancel, and no half-written tree stays."""
    cancelled = []

    class Pool(console.ProcessPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            cancelled.append(cancel_futures)
            super().shutdown(wait, cancel_futures=cancel_futures)

    def interrupt(done, total):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(console, "ProcessPoolExecutor", Pool)
    counts, before = {"Train": {"Normal": 50}}, signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            phantoms.write_phantoms(tmp_path, LUNG, counts, size=16, progress=interrupt)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cancelled[0] is True
    assert [p.name for p in tmp_path.iterdir()] == [phantoms.PHANTOMS_NOTE]


def test_a_set_that_another_process_draws_is_waited_for_and_used(tmp_path, monkeypatch):
    """Two begin before there is one: it is drawn once, and both find it."""
    drawn = []

    def write_all(jobs, options, progress):
        drawn.append(jobs)
        jobs[0][0].mkdir(parents=True)
        if len(drawn) == 1:
            other.start()
            other.join(0.2)

    monkeypatch.setattr(phantoms, "write_all", write_all)
    where = (tmp_path, LUNG, {"Train": {"Normal": 1}})
    other = threading.Thread(target=phantoms.write_phantoms, args=where)
    phantoms.write_phantoms(*where)
    other.join()
    assert len(drawn) == 1
    assert {f.name for f in tmp_path.iterdir()} == {phantoms.PHANTOMS_NOTE, LUNG}
