"""The studies of §4.1: ideal networks, learnable masks, and what the commands print."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import evaluate
import networks
import phantoms
import studies
from console import UserError
from test_probes import healthy, ideal
from testing import CPU

SIDE = 32


def settings(**changes):
    """A Config of a tiny synthesis run of healthy X-rays."""
    run = dict(task="synthesis", cond=None, classes=("Normal",), lr=0.01, target="x0")
    sizes = dict(channels=16, channel_mult=(1, 2, 2), blocks=1, attention_levels=())
    return config.Config(**run | sizes | dict(image_size=SIDE, head_channels=16) | changes)


def ignore(done, total):
    """A progress that shows nothing."""


def save(file, picture):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two healthy X-rays in the lung tree, and in the infection tree the same two with a square.

    The square is an infection in the left lung, brighter than the rest. Outside their lungs both
    have something bright that is no infection.
    """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    well = data.to_uint8(healthy(2, SIDE))
    lung, short, square, marker, label = np.zeros((5, SIDE, SIDE), np.uint8)
    lung[4:28, 3:14] = short[4:20, 3:14] = square[10:18, 5:12] = 255
    marker[10:18, 20:28] = label[20:26, 3:14] = 255

    def brighter(where, by):
        return np.where(where > 0, np.clip(well.astype(int) + by, 0, 255), well).astype(np.uint8)

    sick, labelled = brighter(square | marker, 60), brighter(label, 150)
    for split in data.SPLITS:
        for i in range(2):
            for c in data.CLASSES:
                name = phantoms.NAMES[c].format(f"{split}{i}")
                folder = tmp_path / "set" / data.LUNG_TREE / split / c
                save(folder / "images" / name, labelled[i, 0])
                save(folder / "lung masks" / name, short)
                folder = tmp_path / "set" / data.INFECTION_TREE / split / c
                save(folder / "images" / name, sick[i, 0])
                save(folder / "lung masks" / name, lung)
                save(folder / "infection masks" / name, square)
    return tmp_path / "set"


# ---------------------------------------- anomaly maps


def test_sec41_an_ideal_network_of_healthy_xrays_finds_every_infected_pixel_and_no_other(
    root, monkeypatch
):
    """AUROC 1 by the loss, by its sign and by the reconstruction; gray values do not know.

    The cost is 1 healthy pixel in 20.
    """
    monkeypatch.setattr(studies, "SMOOTH", 1)
    monkeypatch.setattr(studies, "BAND", range(200, 301, 50))
    images = data.to_float(data.to_uint8(healthy(2, SIDE)))
    monkeypatch.setattr(evaluate, "eps_model_of", lambda *_: ideal(images))
    seen = []
    found = studies.anomalies(None, settings(), root, CPU, 2, lambda *at: seen.append(at))
    for name in ("loss, Eq. (7)", "signed", "X-ray - reconstruction"):
        numbers = found["maps"][name]
        assert numbers["AUROC"] == pytest.approx(1, abs=1e-3) and numbers["Sensitivity"] == 1, name
        assert abs(numbers["threshold"]) < 1e-5
        assert 0.9 <= numbers["Specificity"] <= 1
    gray, everything = (found["maps"][k] for k in ("gray value itself", "every pixel of the lungs"))
    assert 0.5 < gray["AUROC"] < 0.9 and gray["DICE index"] < 0.9
    assert everything["DICE index"] == pytest.approx(2 * 56 / (264 + 56))
    assert (found["images"], found["healthy images"]) == (2, 2)
    assert found["infected share"] == pytest.approx(56 / 264)
    assert seen == [(1, 2), (2, 2)]


def test_every_xray_has_its_map_and_its_noise_however_many_there_are(monkeypatch):
    """18 X-rays, in two calls of the network: a map stands in its row, and has the noise of it."""
    images = np.random.default_rng(0).integers(0, 256, (18, 1, 4, 4), np.uint8)
    chests = studies.Chests(np.arange(5, 23), images, None, None)
    asked, shares = [], []

    def maps(model, cfg, x, index, device):
        asked.append(index.tolist())
        return {"X-ray": x}

    monkeypatch.setattr(studies, "anomaly_maps", maps)
    found = studies.maps_of(None, None, chests, CPU, shares.append)
    assert np.array_equal(found["X-ray"], data.to_float(images))
    assert np.array_equal(found["gray value itself"], images)
    assert asked == [list(range(5, 21)), [21, 22]] and shares == [16 / 18, 1]


def test_sec41_a_map_is_the_mean_of_its_neighbourhood_and_needs_nothing_beyond_the_edge():
    """Squares of 5; at the border the mean of the pixels that are there."""
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = x[0, 0, 0, 0] = 1
    found = studies.smooth(x)
    assert float(found[0, 0, 4, 4]) == pytest.approx(1 / 25)
    assert float(found[0, 0, 0, 0]) == pytest.approx(1 / 9)


def test_the_maps_of_an_xray_do_not_depend_on_its_place_in_the_batch(monkeypatch):
    """The noise of image i comes from i alone: two X-rays together, in turn, and one by itself."""
    monkeypatch.setattr(studies, "BAND", range(400, 601, 100))
    cfg, (x, _) = settings(image_size=16), bright_images(2, 0)
    model, x = random_network(cfg), x[..., ::2, ::2]
    both = studies.anomaly_maps(model, cfg, x, [7, 4], CPU)
    turned = studies.anomaly_maps(model, cfg, x.flip(0), [4, 7], CPU)
    alone = studies.anomaly_maps(model, cfg, x[1:], [4], CPU)
    for name, maps in both.items():
        torch.testing.assert_close(turned[name].flip(0), maps, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone[name], maps[1:], rtol=1e-3, atol=1e-4)


# ---------------------------------------- few labels


def bright_images(n, seed):
    """X-rays whose mask is where they are bright: smooth random pictures."""
    coarse = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
    return x, x > 0.2


def random_network(cfg):
    """The network of a configuration, whose zero-initialised layers are random too."""
    model = networks.build_model(cfg)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def test_sec41_a_probe_reads_the_middle_half_of_the_decoder_at_three_steps(monkeypatch):
    """[3]: blocks 1 to 4 of 6; four noises, the same for every image, others in another draw."""
    (x, positive), cfg, noises = bright_images(3, 0), settings(), []

    def features(s, net, x0, ts, blocks, eps):
        assert ts == (50, 150, 250) and list(blocks) == [1, 2, 3, 4] and len(net.decoder) == 6
        noises.append(eps)
        return x0

    monkeypatch.setattr(studies.probes, "features", features)
    for draw in (0, 0, 1):
        learned = studies.probe(networks.build_model(cfg), cfg, x, positive, draw, CPU, members=1)
        learned(x)
    assert all(eps.shape == (4, 1, SIDE, SIDE) for eps in noises)
    first, again, same, _, other, _ = noises
    assert torch.equal(first, again) and torch.equal(first, same) and not torch.equal(first, other)


def test_sec41_from_scratch_warms_up_for_a_tenth_and_falls_to_0(monkeypatch):
    """At the rates of train.learning_rate: 30 steps, 3 of them warm-up, then the cosine."""
    (x, positive), cfg, asked = bright_images(1, 0), settings(lr_decay="none", warmup=9), []
    rate = studies.train.learning_rate

    def learning_rate(cfg, step):
        asked.append((step, rate(cfg, step) / cfg.lr))
        return 0.0

    monkeypatch.setattr(studies.train, "learning_rate", learning_rate)
    studies.from_scratch(cfg, x, positive, 0, CPU, steps=30)
    assert [step for step, _ in asked] == list(range(1, 31))
    assert asked[0][1] == pytest.approx(1 / 3) and asked[29][1] < 0.01
    assert max(asked, key=lambda pair: pair[1])[0] == 3


@pytest.mark.parametrize("learner", ["probe", "from scratch"])
def test_sec41_both_learners_find_bright_pixels_from_a_few_images(learner):
    """Probe of a random network, and the same U-Net from scratch: unseen images, 0.85 DICE.

    Of other seeds, other answers.
    """
    (x, positive), (unseen, true), cfg = bright_images(6, 0), bright_images(4, 1), settings()

    def learned(seed):
        if learner == "probe":
            return studies.probe(random_network(cfg), cfg, x, positive, seed, CPU, members=2)
        return studies.from_scratch(cfg, x, positive, seed, CPU, steps=60)

    def dice(p):
        return 2 * float(((p > 0.5) & true).sum()) / float((p > 0.5).sum() + true.sum())

    p, other = learned(0)(unseen), learned(1)(unseen)
    assert p.shape == unseen.shape and 0 <= p.min() and p.max() <= 1 and dice(p) > 0.85
    assert not torch.allclose(p, other)


def test_sec41_from_scratch_begins_with_weights_of_its_own_seed():
    """With one labelled image there is no order to differ in: same seed, same answer."""
    (x, positive), (unseen, _), cfg = bright_images(1, 0), bright_images(1, 1), settings()

    def answer(seed):
        return studies.from_scratch(cfg, x, positive, seed, CPU, steps=3)(unseen)

    first = answer(0)
    assert torch.equal(answer(0), first) and not torch.allclose(answer(1), first)


def test_sec41_both_learners_see_the_same_few_images_and_all_of_validation(root, monkeypatch):
    """In a draw the fewer are among the more; DICE 1 for the truth and 0 for its opposite."""
    given, true = [], torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    true[..., 10:18, 5:12] = True

    def learner_of(answer):
        def learn(*args):
            given.append(args[-4:-1])  # images, labels, draw
            return lambda images: answer[: len(images)].float()

        return learn

    monkeypatch.setattr(studies, "probe", learner_of(true))
    monkeypatch.setattr(studies, "from_scratch", learner_of(~true))
    where = (None, settings(), "infection", root, CPU)
    rows = studies.few_labels(*where, (1, 2), 3, 64, ignore)
    found = [(row["labels"], row["draw"]) for row in rows]
    assert found == [(n, draw) for draw in range(3) for n in (1, 2)]
    assert all(row["probe"] == 1 and row["from scratch"] == 0 for row in rows)
    for a, b in zip(given[::2], given[1::2], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert [(len(x), draw) for x, _, draw in given[::2]] == found
    for fewer, more in zip(given[::4], given[2::4], strict=True):
        assert torch.equal(fewer[0][0], more[0][0])
    assert all(torch.equal(positive, true[: len(x)]) for x, positive, _ in given)
    with pytest.raises(UserError, match="--labels must be at most the 2 images of Train, got 3"):
        studies.few_labels(*where, (3,), 1, 64, ignore)


# ---------------------------------------- the command


@pytest.fixture
def run(tmp_path):
    """run(**settings) -> a folder with last.pt."""

    def write(**changes):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        cfg = settings(**changes)
        weights = networks.build_model(cfg).state_dict()
        state = {"config": dataclasses.asdict(cfg), "step": 7, "ema": weights}
        torch.save(state, folder / "last.pt")
        return str(folder)

    return write


def test_the_command_prints_its_table_and_writes_its_numbers(
    root, run, tmp_path, monkeypatch, capsys
):
    """Both studies; the JSON says where the numbers come from."""
    out = tmp_path / "out" / "numbers.json"
    words = ["--data", str(root), "--device", "cpu", "--out", str(out)]
    assert studies.main(["anomalies", run(), *words]) == 0
    assert "| signed |" in capsys.readouterr().out
    numbers = json.loads(out.read_text())
    assert {"study", "commit", "hardware", "torch", "seed", "data", "maps"} <= numbers.keys()
    assert numbers["data"] == "X-rays"
    rows = [{"labels": 5, "draw": k, "probe": 0.5 + k, "from scratch": 0.25} for k in range(2)]
    monkeypatch.setattr(studies, "few_labels", lambda *_: rows)
    assert studies.main(["labels", run(classes=data.CLASSES), *words]) == 0
    assert "| 5 | 1.0000 ± 0.7071 | 0.2500 ± 0.0000 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


def test_a_run_on_phantoms_gets_those_with_the_masks_of_the_study(run, monkeypatch, capsys):
    """A synthesis run has drawn the lung tree alone; infections are in the other one."""
    drawn = []
    monkeypatch.setattr(phantoms, "ensure_phantoms", lambda task, progress: drawn.append(task))
    monkeypatch.setattr(studies, "anomalies", lambda *_: {"maps": {}})
    monkeypatch.setattr(studies, "few_labels", lambda *_: [])
    folder = run(phantoms=True, data=str(phantoms.PHANTOMS))
    for words in (["anomalies"], ["labels"], ["labels", "--task", "lung"]):
        assert studies.main([words[0], folder, *words[1:], "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith(f"phantoms, {folder}, step 7\n")
    assert drawn == [*("synthesis", "infection") * 2, "synthesis", "lung"]


EVERY_CLASS = "healthy X-rays alone (--classes Normal), got COVID-19, Non-COVID, Normal"


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["anomalies"], {"classes": data.CLASSES}, EVERY_CLASS),
        (
            ["labels"],
            {"task": "lung", "cond": "none"},
            "must be a synthesis run, got lung",
        ),
        (
            ["labels"],
            {"given": "class", "draw": "lung"},
            "must draw X-rays, from noise alone, got synthesis of lung masks given class",
        ),
        (["likelihood"], {"given": "class"}, "from noise alone, got synthesis given class"),
        (["likelihood"], {"draw": "lung"}, "from noise alone, got synthesis of lung masks"),
        (["labels", "--draws", "0"], {}, "--draws must be at least 1, got 0"),
        (["labels", "--labels", "5", "0"], {}, "--labels must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, words, changes, message, capsys):
    """The rule and the offending value."""
    assert studies.main([words[0], run(**changes), *words[1:], "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("studies.py: error: ") and message in error and error.count("\n") == 1


def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    run, tmp_path, monkeypatch, capsys
):
    """A file of something else, a folder, below a file, in a folder of somebody else."""
    monkeypatch.setattr(phantoms, "find_data", None)
    folder, notes = run(), tmp_path / "notes.txt"
    notes.write_text("mine")
    for out in (notes, tmp_path, notes / "a.json", tmp_path / "new" / "a.json"):
        ours = out.parent.name != "new"
        monkeypatch.setattr(os, "access", lambda *_, ours=ours: ours)
        words = ["anomalies", folder, "--device", "cpu", "--out", str(out)]
        assert studies.main(words) == 2
        rule = "--out must be a new file where one can be written, or a result of studies.py"
        assert capsys.readouterr().err == f"studies.py: error: {rule}, got {out}\n"
    assert notes.read_text() == "mine" and not (tmp_path / "new").exists()
