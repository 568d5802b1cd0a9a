"""sample.py: what a person gets from a trained run.

No training: weights are random, or the network's answer is known.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import devices
import evaluate
import figures
import fullsize
import memory
import metrics
import networks
import pairs
import runs
import sample
import synthesis as drawing
from conditional import ConditionalUNet
from conditions import Given
from testing import CPU

S = 16  # the network's image size


def settings(task="lung", **changes):
    """A Config of a tiny network, sampled in 3 passes."""
    run = dict(task=task, cond=None if task == "synthesis" else "none", ddim_steps=3)
    sizes = dict(image_size=S, channels=16, channel_mult=(1, 2), blocks=1, growth=4)
    attention = dict(attention_levels=(1,), head_channels=16)
    return config.Config(**run | sizes | attention | changes)


def write_run(folder, cfg):
    """A run folder with last.pt.

    Every weight is random, so that the mask depends on the X-ray and on x_T.
    """
    model = networks.build_model(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder.mkdir()
    state = {"config": dataclasses.asdict(cfg), "step": 7, "ema": model.state_dict()}
    torch.save(state, folder / "last.pt")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster so, and sums of floats come out the same each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lung(tmp_path):
    return write_run(tmp_path / "lung", settings())


@pytest.fixture
def synthesis(tmp_path):
    return write_run(tmp_path / "synthesis", settings("synthesis"))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A lung run that answers, as x_0, the X-ray itself.

    So its mask is where that is brighter than middle gray.
    """
    monkeypatch.setattr(ConditionalUNet, "denoise", lambda self, xt, t, e: e)
    return write_run(tmp_path / "mirror", settings(target="x0"))


@pytest.fixture(autouse=True)
def overlays(monkeypatch):
    """What save_overlay was given; drawing takes a while and is tested by itself."""
    calls, real = [], figures.save_overlay

    def record(path, **given):
        path.write_bytes(f"drawn by {given['software']}".encode())
        calls.append(given)

    record.real = real
    monkeypatch.setattr(figures, "save_overlay", record)
    return calls


@pytest.fixture
def call(capsys):
    """call(arguments) -> (exit status, stdout, stderr) of sample.py on the CPU."""

    def call(*args):
        try:
            status = sample.main([*map(str, args), "--device", "cpu"])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return call


def save(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)
    return path


def read(path):
    return np.asarray(Image.open(path))


def xrays(folder, n=3, size=(S, S)):
    """n random X-ray files."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(n)]
    return [save(folder / f"x{i}.png", image) for i, image in enumerate(images)]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def chunks_of(n):
    """An in_chunks that makes n chunks of the rows, whatever their number."""

    def in_chunks(function, rows, *_):
        return ((chunk, function(chunk)) for chunk in np.array_split(rows, n))

    return in_chunks


# ---------------------------------------- masks at the X-ray's own size


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(S, S), (3 * S, 2 * S), (2 * S, 6 * S), (S // 2, S // 4)])
def test_the_mask_lies_on_its_xray_at_its_own_size_whatever_its_shape(
    mirror, call, tmp_path, size, axis, depth
):
    """Bars along one axis, other ones if they were mirrored."""
    bars = np.array([True, True, False, True] if axis else [False, True, False, False])
    bars = bars.repeat(size[axis] // 4).reshape((-1, 1) if axis == 0 else (1, -1))
    inside = np.broadcast_to(bars, size)
    top = np.iinfo(depth).max
    path = save(tmp_path / "in" / "a.b.png", np.where(inside, top, 0).astype(depth))
    assert call(mirror, "--images", path)[0] == 0
    mask = read(mirror / "samples" / "a.b-mask.png")
    assert mask.dtype == np.uint8 and np.array_equal(mask, np.uint8(255) * inside)


def test_the_mask_is_enlarged_before_it_is_thresholded(mirror, call, tmp_path):
    """An edge inside a pixel of the network is found: that is 10 pixels of the X-ray."""
    ramp = np.clip(2 * np.arange(10 * S) - 41.5, 0, 255).round()  # 126 in column 84, 128 in 85
    path = save(tmp_path / "in" / "ramp.png", np.tile(ramp.astype(np.uint8), (8, 1)))
    assert call(mirror, "--images", path)[0] == 0
    first = (read(mirror / "samples" / "ramp-mask.png") > 0).argmax(1)
    assert set(first) == {85}


def test_no_number_of_4_bytes_is_held_for_each_pixel_of_a_large_xray(
    lung, call, tmp_path, monkeypatch
):
    """Nor are the pixels copied into wider ones: a strip of a million at a time."""
    sizes, widened = [], fullsize.widened

    def recorded(*args):
        strip = widened(*args)
        sizes.append(strip.numel())
        return strip

    monkeypatch.setattr(fullsize, "widened", recorded)
    path = save(tmp_path / "in" / "x.png", np.full((2000, 3000), 90, np.uint8))
    assert call(lung, "--images", path, "--ensemble", 2)[0] == 0
    assert max(sizes) <= 2**20 and sum(sizes) > 3 * 2000 * 3000


def test_xrays_of_one_pixel_a_side_and_empty_masks_are_no_special_case(mirror, call, tmp_path):
    for name, size in (("dot", (1, 1)), ("row", (1, 9)), ("dark", (20, 30))):
        path = save(tmp_path / "in" / f"{name}.png", np.full(size, 90, np.uint8))
        status, _, err = call(mirror, "--images", path)
        assert status == 0, err
        assert read(mirror / "samples" / f"{name}-mask.png").shape == size
        assert not read(mirror / "samples" / f"{name}-mask.png").any()


@pytest.mark.parametrize("cond", ["none", "concat", "add", "levels", "cross"])
def test_the_mask_is_the_one_that_an_evaluation_scores(tmp_path, call, cond, overlays):
    """evaluate.segment of the same X-rays, mean of two samples."""
    infection = dict(task="infection", classes=("COVID-19",))
    run = write_run(tmp_path / "run", settings(cond=cond, ensemble=2, **infection))
    paths = xrays(tmp_path / "in")
    assert call(run, "--images", *paths)[0] == 0 and overlays[-1]["what"] == "mean of 2 masks"
    model, cfg, _ = runs.load_run(run)
    images = np.stack([read(p)[None] for p in paths])
    masks = evaluate.segment(model, cfg, images, np.arange(3), CPU)
    assert 0 < (masks > 0).float().mean() < 1
    for path, mask in zip(paths, masks, strict=True):
        written = read(run / "samples" / f"{path.stem}-mask.png")
        assert np.array_equal(written > 0, mask[0].numpy() > 0)


def test_sec44_a_supervised_run_gives_its_mask_in_one_pass_and_has_no_ensemble(tmp_path, call):
    """Its mask is where the logit is above 0. Flags of diffusion are refused."""
    run = write_run(tmp_path / "run", settings(model="report-unet"))
    paths = xrays(tmp_path / "in")
    status, out, _ = call(run, "--images", *paths)
    said = "lung, report-unet, none, trained on X-rays, step 7; one pass, seed 0"
    assert status == 0 and said in out
    model, y = runs.load_run(run)[0], data.to_float(np.stack([read(p)[None] for p in paths]))
    for path, logits in zip(paths, model(y), strict=True):
        written = read(run / "samples" / f"{path.stem}-mask.png")
        assert np.array_equal(written > 0, logits[0].numpy() > 0)
    for flag, value in (("--ensemble", "2"), ("--ddim-steps", "3"), ("--sampler", "ode")):
        status, _, err = call(run, "--images", *paths, flag, value)
        rule = f"{flag} is about diffusion; --model report-unet answers in one pass, got {value}"
        assert status == 2 and rule in err


def test_grouping_changes_nothing(lung, call, tmp_path, monkeypatch):
    """The result of image i is that of its place in the list.

    It does not depend on how many go through the network together.
    """
    paths, ensemble = xrays(tmp_path / "in", 5), ("--ensemble", 3)
    assert call(lung, "--images", *paths, *ensemble, "--out", tmp_path / "all")[0] == 0
    assert call(lung, "--images", *paths[:2], *ensemble, "--out", tmp_path / "two")[0] == 0
    monkeypatch.setattr(memory, "in_chunks", chunks_of(3))
    assert call(lung, "--images", *paths, *ensemble, "--out", tmp_path / "split")[0] == 0
    for path in paths:
        for kind in ("mask", "mean", "disagreement"):
            name = f"{path.stem}-{kind}.png"
            others = ["split", "two"] if path in paths[:2] else ["split"]
            for other in others:
                together = read(tmp_path / "all" / name).astype(int)
                difference = np.abs(together - read(tmp_path / other / name))
                if kind == "mask":
                    assert (difference > 0).mean() < 0.01
                else:
                    assert difference.max() <= 1
    names = [f"{p.stem}-mean.png" for p in paths]
    assert len({read(tmp_path / "all" / name).tobytes() for name in names}) == 5


def test_the_seed_chooses_the_noise(lung, call, tmp_path):
    """Three seeds, three masks; the default is seed 0."""
    path = xrays(tmp_path / "in", 1)[0]
    seeds = ("0", "1", str(2**63 - 1))
    for seed in seeds:
        assert call(lung, "--images", path, "--seed", seed, "--out", tmp_path / seed)[0] == 0
    assert call(lung, "--images", path, "--out", tmp_path / "default")[0] == 0
    folders = (*seeds, "default")
    masks = {name: read(tmp_path / name / "x0-mask.png").tobytes() for name in folders}
    assert masks["default"] == masks["0"] and len(set(masks.values())) == 3


def test_ddim_steps_and_ensemble_are_passes_of_the_network(lung, call, tmp_path, monkeypatch):
    """3 X-rays, 2 masks each, 5 steps: 30."""
    passes, denoise = [], ConditionalUNet.denoise

    def counted(*args):
        passes.append(len(args[1]))
        return denoise(*args)

    monkeypatch.setattr(ConditionalUNet, "denoise", counted)
    flags = ("--ddim-steps", 5, "--ensemble", 2)
    _, out, err = call(lung, "--images", *xrays(tmp_path / "in"), *flags)
    assert sum(passes) == 3 * 2 * 5 and "passes 30/30" in err and "5 DDIM steps" in out


# ---------------------------------------- ensembles


def test_mean_and_disagreement_are_those_of_the_members(lung, call, tmp_path):
    """Mean and standard deviation of masks in [0, 1], whose spread is at most 1/2."""
    paths = xrays(tmp_path / "in", 2)
    assert call(lung, "--images", *paths, "--ensemble", 4)[0] == 0
    model, cfg, _ = runs.load_run(lung)
    y = data.to_float(np.stack([read(p)[None] for p in paths]))
    members = evaluate.sample_masks(model, cfg, y, [0, 1], 4)[:, :, 0].numpy().astype(np.float64)
    for x, path in zip(members, paths, strict=True):
        mean, spread = ((x + 1) / 2).mean(0), ((x + 1) / 2).std(0)
        names = {kind: f"{path.stem}-{kind}.png" for kind in ("mask", "mean", "disagreement")}
        found = {kind: read(lung / "samples" / name) for kind, name in names.items()}
        assert np.abs(found["mean"] - 255 * mean).max() < 0.6
        assert np.abs(found["disagreement"] - 510 * spread).max() < 0.6
        assert found["disagreement"].max() > 100
        sure = np.abs(mean - 0.5) > 1e-3
        assert np.array_equal(found["mask"][sure], 255 * (mean > 0.5)[sure])


def test_members_that_agree_disagree_nowhere(mirror, call, tmp_path):
    path = xrays(tmp_path / "in", 1)[0]
    assert call(mirror, "--images", path, "--ensemble", 5)[0] == 0
    assert read(mirror / "samples" / "x0-disagreement.png").max() == 0
    assert np.array_equal(read(mirror / "samples" / "x0-mean.png"), read(path))


def test_half_inside_and_half_outside_is_the_largest_disagreement(
    lung, call, tmp_path, monkeypatch
):
    halves = torch.tensor([-1.0, 1.0, 1.0, -1.0]).reshape(1, 4, 1, 1, 1).expand(1, 4, 1, S, S)
    monkeypatch.setattr(evaluate, "sample_masks", lambda *args, **kwargs: halves)
    path = xrays(tmp_path / "in", 1, (40, 24))[0]
    assert call(lung, "--images", path, "--ensemble", 4)[0] == 0
    disagreement = read(lung / "samples" / "x0-disagreement.png")
    assert disagreement.shape == (40, 24) and (disagreement == 255).all()


def test_nan_is_not_an_empty_mask(lung, call, tmp_path, monkeypatch):
    """It is a refusal in one line, and nothing is written."""
    monkeypatch.setattr(ConditionalUNet, "denoise", lambda self, xt, t, e: xt * torch.nan)
    status, _, error = call(lung, "--images", *xrays(tmp_path / "in", 1))
    assert status == 2 and "sample.py: error: the network draws nan" in error
    assert not contents(lung / "samples")


def test_one_mask_has_no_ensemble_pictures_and_the_runs_own_ensemble_is_the_default(
    tmp_path, call, overlays
):
    run, path = write_run(tmp_path / "run", settings(ensemble=3)), xrays(tmp_path / "in", 1)[0]
    assert call(run, "--images", path, "--ensemble", 1, "--out", tmp_path / "one")[0] == 0
    assert set(contents(tmp_path / "one")) == {"x0-mask.png", "x0-overlay.png"}
    assert overlays[-1]["what"] == "sampled mask"
    assert "4 files (all new)" in call(run, "--images", path)[1]
    kinds = ("mask", "overlay", "mean", "disagreement")
    assert set(contents(run / "samples")) == {f"x0-{kind}.png" for kind in kinds}


# ---------------------------------------- scores


def test_the_table_is_that_of_the_mask_files(lung, call, tmp_path):
    """§4.3 at the X-ray's own size; the last line pools the pixels of X-rays of different size.

    The third truth is empty, so its row has nan.
    """
    sizes, rng, images, masks = [(S, S), (30, 50), (41, 7)], np.random.default_rng(1), [], []
    for i, size in enumerate(sizes):
        image = rng.integers(0, 256, size, dtype=np.uint8)
        images.append(save(tmp_path / "in" / f"x|{i}.png", image))
        true = rng.random(size) < 0.3 if i < 2 else np.zeros(size, bool)
        masks.append(save(tmp_path / "true" / f"x|{i}.png", np.uint8(255) * true))
    _, out, _ = call(lung, "--images", *images, "--masks", *masks)
    assert "7 files (all new)" in out and out.endswith("scores.md\n")
    text = (lung / "samples" / "scores.md").read_text()
    assert text.strip() in out and "nan is 0/0" in text
    lines = [line.replace(r"\|", "_") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["image", *metrics.NAMES]
    found = [read(lung / "samples" / f"{p.stem}-mask.png") > 0 for p in images]
    true = [read(p) > 0 for p in masks]
    together = [np.concatenate([a.ravel() for a in arrays]) for arrays in (found, true)]
    assert len(rows) == 2 + 4
    for row, (a, b) in zip(rows[2:], [*zip(found, true), together], strict=True):
        expected = metrics.scores(metrics.confusion(a[None], b[None]).pooled())
        assert row[1:] == [f"{expected[name]:.4f}" for name in metrics.NAMES]
    assert "**all pixels together**" in lines[-1]
    assert [row[0] for row in rows[2:]] == ["x_0.png", "x_1.png", "x_2.png", "all pixels together"]


def test_an_ensemble_says_how_large_the_share_is_and_how_sure_it_is(tmp_path, call):
    """By hand from the masks of the evaluation: of the picture, and of the lungs of a lung run."""
    infection = write_run(tmp_path / "infection", settings("infection", ddim_steps=2))
    lungs = write_run(tmp_path / "lungs", settings(ddim_steps=2))
    images = xrays(tmp_path / "x", 2)
    status, out, err = call(infection, "--images", *images, "--ensemble", 5, "--lungs", lungs)
    assert status == 0, err
    small = np.stack([read(path)[None] for path in images])
    model, cfg, _ = runs.load_run(infection)
    masks = evaluate.sample_masks(model, cfg, data.to_float(small), [0, 1], 5) > 0
    other, lung_cfg, _ = runs.load_run(lungs)
    found = evaluate.sample_masks(other, lung_cfg, data.to_float(small), [0, 1])[:, 0] > 0
    *said, warning = [line for line in out.splitlines() if "interval" in line]
    assert "has not learned" in warning
    for line, path, own, whole in zip(said, images, masks, found.flatten(1).sum(1), strict=True):
        x = own.flatten(1).sum(1) / whole
        numbers = f"{x.mean():.3f} of the lungs, 67% interval of 5 masks {x.min():.3f} to "
        assert line == f"{path.name}: {numbers}{x.max():.3f}"
    _, out, _ = call(infection, "--images", *images, "--ensemble", 5)
    assert (
        f"{images[0].name}: {masks[0].flatten(1).sum(1).float().mean() / S**2:.3f} of the " in out
    )
    assert "of the picture, 67% interval" in out
    assert "interval" not in call(infection, "--images", *images)[1]


def test_no_table_without_masks(lung, call, tmp_path):
    _, out, _ = call(lung, "--images", *xrays(tmp_path / "in", 1))
    assert "DICE" not in out and "scores.md" not in contents(lung / "samples")


# ---------------------------------------- pictures


def test_the_overlay_shows_the_xray_the_written_mask_and_the_true_one(
    lung, call, tmp_path, overlays
):
    image = np.random.default_rng(0).integers(0, 65536, (30, 50), dtype=np.uint16)
    path = save(tmp_path / "in" / "a.png", image)
    true = save(tmp_path / "a-true.png", np.uint8(255) * np.eye(30, 50, dtype=bool))
    assert call(lung, "--images", path, "--masks", true)[0] == 0
    (given,) = overlays
    assert np.array_equal(given["image"], data.read_gray(path))
    assert np.array_equal(given["true"], read(true) > 0)
    assert np.array_equal(given["mask"], read(lung / "samples" / "a-mask.png") > 0)
    assert given["title"] == "a\nlung, none, trained on X-rays, step 7; not for diagnosis"


def test_save_overlay_draws_outlines_where_the_masks_are(tmp_path):
    """Orange along the sampled mask, green along the true one, each at its place."""
    draw = figures.save_overlay.real
    left, right = np.zeros((2, 60, 100), bool)
    left[20:40, 10:30] = right[20:40, 70:90] = True
    gray = np.full((60, 100), 128, np.uint8)

    def columns(colour, **masks):
        draw(tmp_path / "o.png", gray, title="", **masks)
        rgb = np.asarray(Image.open(tmp_path / "o.png").convert("RGB")).astype(int)
        colour = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        x = np.flatnonzero((np.abs(rgb - colour).max(2) < 30).any(0)) / rgb.shape[1]
        return (x.min(), x.max()) if len(x) else None

    assert columns(figures.SAMPLED, mask=left) == pytest.approx((0.1, 0.3), abs=0.02)
    assert columns(figures.TRUE, mask=left) is None
    both = columns(figures.TRUE, mask=left, true=right)
    assert both == pytest.approx((0.7, 0.9), abs=0.02)
    assert columns(figures.SAMPLED, mask=right & left) is None  # an empty mask has no outline
    draw(tmp_path / "row.png", gray[:1], left[25:26], "", left[25:26])  # nor has one row of pixels


def test_a_large_xray_is_drawn_at_1024_pixels_a_side(tmp_path, monkeypatch):
    """X-ray and masks alike; a small one is drawn as it is."""
    drawn = []
    monkeypatch.setattr(figures, "show", lambda ax, image: drawn.append(image))
    monkeypatch.setattr(figures, "contour", lambda ax, mask, *_: drawn.append(mask))
    for side, k in ((2048, 2), (64, 1)):
        gray = np.random.default_rng(0).integers(0, 256, (side, side // 2), np.uint8)
        mask, true = gray > 127, gray < 9
        figures.save_overlay.real(tmp_path / "o.png", gray, mask, "", true=true)
        for found, a in zip(drawn, (gray, np.uint8(255) * true, np.uint8(255) * mask)):
            mean = a.reshape(side // k, k, side // 2 // k, k).mean((1, 3))
            assert np.abs(found - mean).max() <= 1
        drawn.clear()


# ---------------------------------------- synthesis


def test_synthesis_writes_n_xrays_and_the_grid(synthesis, call, monkeypatch):
    """The X-rays of drawing.sample_images, one file each, and all of them in one picture."""
    grids, save_image_grid = [], figures.save_image_grid

    def recorded(*args, **given):
        grids.append(args)
        save_image_grid(*args, **given)

    monkeypatch.setattr(figures, "save_image_grid", recorded)
    status, out, _ = call(synthesis, "-n", 3)
    names = ["sample-0000.png", "sample-0001.png", "sample-0002.png", "samples.png"]
    assert status == 0 and sorted(contents(synthesis / "samples")) == names
    assert all(name in out for name in names)
    model, cfg, _ = runs.load_run(synthesis)
    expected = data.to_uint8(drawing.sample_images(model, cfg, range(3)))
    written = np.stack([read(synthesis / "samples" / name)[None] for name in names[:3]])
    assert np.array_equal(written, expected) and np.array_equal(grids[0][1], expected)
    assert read(synthesis / "samples" / "samples.png").std() > 0


def test_xray_i_is_the_same_whatever_n_and_another_with_another_seed(
    synthesis, call, tmp_path, monkeypatch
):
    """Also where they go through the network in two chunks. 16 are drawn without -n."""
    monkeypatch.setattr(
        figures, "save_image_grid", lambda path, *_, **__: path.write_bytes(b"drawn")
    )
    monkeypatch.setattr(sample, "GRID", 2)
    assert call(synthesis, "-n", 2, "--out", tmp_path / "two")[0] == 0
    monkeypatch.setattr(memory, "in_chunks", chunks_of(2))
    assert call(synthesis, "-n", 5, "--out", tmp_path / "five")[0] == 0
    assert call(synthesis, "-n", 2, "--seed", 1, "--out", tmp_path / "other")[0] == 0
    assert call(synthesis, "--out", tmp_path / "default")[0] == 0

    def drawn(folder, i):
        return read(tmp_path / folder / f"sample-{i:04}.png").astype(int)

    for i in range(2):
        assert np.abs(drawn("two", i) - drawn("five", i)).max() <= 1
        assert np.abs(drawn("two", i) - drawn("other", i)).mean() > 5
    assert len({drawn("five", i).tobytes() for i in range(5)}) == 5
    assert len(contents(tmp_path / "default")) == 16 + 1


def test_the_grid_holds_the_first_64(synthesis, call, monkeypatch):
    """Of 70 X-rays; its title says so."""
    grids = []

    def recorded(path, images, title, **_):
        path.touch()
        grids.append((images, title))

    monkeypatch.setattr(figures, "save_image_grid", recorded)
    assert call(synthesis, "-n", 70, "--ddim-steps", 1)[0] == 0
    first = [read(synthesis / "samples" / f"sample-{i:04}.png")[None] for i in range(64)]
    assert np.array_equal(grids[0][0], np.stack(first)) and "first 64 of 70" in grids[0][1]


# ---------------------------------------- files and words


def test_nothing_but_earlier_results_of_the_same_name_is_replaced(lung, call, tmp_path):
    """The folder of results is that of the X-rays, and holds a file of the user."""
    folder = tmp_path / "in"
    a, b = xrays(folder, 2)
    before = contents(folder)
    out = call(lung, "--images", a, "--out", folder)[1]
    assert "2 files (all new): x0-mask.png, x0-overlay.png" in out
    (folder / "notes.txt").write_text("mine")
    between = contents(folder)
    out = call(lung, "--images", a, b, "--out", folder, "--seed", 1)[1]
    after = contents(folder)
    assert "4 files (2 of them replaced)" in out
    assert after["x0-mask.png"] != between["x0-mask.png"]
    assert after["notes.txt"] == b"mine" and before.items() <= after.items()
    assert set(after) == {*between, "x1-mask.png", "x1-overlay.png"}


FOREIGN = {  # in the place of a result
    "picture": lambda path: save(path, np.zeros((S, S), np.uint8)),
    "folder": os.mkdir,
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_sample_py_did_not_write_is_not_replaced(lung, call, tmp_path, kind):
    """Before any work, in one line; the second X-ray's own results are no obstacle."""
    a, b = xrays(tmp_path / "in", 2)
    assert call(lung, "--images", b, "--out", tmp_path / "out")[0] == 0
    FOREIGN[kind](tmp_path / "out" / "x0-overlay.png")
    before = states(tmp_path / "out")
    status, out, err = call(lung, "--images", b, a, "--out", tmp_path / "out")
    rule = "x0-overlay.png is there, and sample.py did not write it; choose another --out"
    assert (status, out) == (2, "") and err == f"sample.py: error: {tmp_path / 'out' / rule}\n"
    assert states(tmp_path / "out") == before


def states(folder):
    found = [(path.name, path.lstat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_mode, stat.st_ino, stat.st_mtime_ns) for name, stat in found]


def test_scores_and_grids_are_known_as_sample_pys_own_too(lung, synthesis, call, tmp_path):
    """A table of the user is kept, and so is the samples.png that train.py wrote."""
    a, m = xrays(tmp_path / "in", 1)[0], save(tmp_path / "m.png", np.zeros((S, S), np.uint8))
    scored, drawn = (lung, "--images", a, "--masks", m), (synthesis, "-n", 1)
    for words, name in ((scored, "scores.md"), (drawn, "samples.png")):
        call(*words)
        assert call(*words)[0] == 0
        file = words[0] / "samples" / name
        figures.save_image_grid(tmp_path / "grid.png", np.zeros((1, 1, S, S), np.uint8), "a run's")
        (tmp_path / "grid.png").rename(file)
        before = contents(file.parent)
        assert call(*words)[0] == 2 and contents(file.parent) == before
    figures.save_overlay.real(m, read(a), read(a) > 0, "", software=sample.MARK)
    assert sample.written_here(m) and not sample.written_here(a)


def test_a_name_that_is_no_utf_8_is_kept_and_shown_as_escapes(lung, call, tmp_path, overlays):
    folder = tmp_path / os.fsdecode(b"\xff")
    path = save(folder / os.fsdecode(b"x\xfe.png"), np.zeros((S, S), np.uint8))
    status, out, err = call(lung, "--images", path, "--masks", path, "--out", folder)
    assert status == 0, err
    assert r"\udcff/: 3 files (all new): x\udcfe-mask.png, x\udcfe-overlay.png, scores.md" in out
    assert {b"x\xfe-mask.png", b"x\xfe-overlay.png"} < set(os.listdir(os.fsencode(folder)))
    assert overlays[0]["title"].startswith("x\\udcfe\n")
    assert r"| x\udcfe.png " in (folder / "scores.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", ["file", "link"])
@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_a_file_of_the_user_is_never_overwritten(lung, call, tmp_path, link, given):
    """The user's own true mask, or a link to it, is called like the result, and in its folder."""
    folder = tmp_path / "in"
    image = xrays(folder, 1)[0]
    home = folder if link is None else tmp_path / "true"
    true = save(home / "x0-mask.png", np.zeros((S, S), np.uint8))
    if link:
        link(true, folder / "x0-mask.png")
    true = folder / "x0-mask.png" if given == "link" else true
    before = contents(folder)
    status, _, err = call(lung, "--images", image, "--masks", true, "--out", folder)
    rule = "x0-mask.png would be overwritten by a result of that name; choose another --out"
    assert status == 2 and rule in err
    assert contents(folder) == before


def test_results_go_beside_a_checkpoint_file_too(lung, call, tmp_path):
    os.rename(lung / "last.pt", lung / "best.pt")
    assert call(lung / "best.pt", "--images", *xrays(tmp_path / "in", 1))[0] == 0
    assert "x0-mask.png" in contents(lung / "samples")


def test_a_model_of_phantoms_says_so(tmp_path, call, overlays):
    """On stdout and in the picture; a model of X-rays does not."""
    paths, said = xrays(tmp_path / "in", 1), "trained on phantoms, generated images: "
    for phantoms in (True, False):
        run = write_run(tmp_path / str(phantoms), settings(phantoms=phantoms))
        out = call(run, "--images", *paths)[1]
        assert (said + "what it makes of a real X-ray means nothing" in out) == phantoms
        assert ("trained on phantoms" in overlays[-1]["title"]) == phantoms
    run = write_run(tmp_path / "synthesis", settings("synthesis", phantoms=True))
    assert said + "what it draws are phantoms, not X-rays" in call(run, "-n", 1)[1]


def test_an_xray_of_12_bits_in_16_is_remarked_on(lung, call, tmp_path):
    path = save(tmp_path / "in" / "a.png", np.full((S, S), 4095, np.uint16))
    remark = f"{path}: is very dark, its brightest pixel is 16 of 255"
    assert remark in call(lung, "--images", path)[1]
    assert "very dark" not in call(lung, "--images", *xrays(tmp_path / "in", 1))[1]


def test_bf16_of_a_gpu_run_is_fp32_where_bf16_is_slow(monkeypatch):
    args = sample.parse(["run"])
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "bf16_is_fast", lambda device, fast=fast: fast)
        assert sample.configure(args, settings(precision="bf16"), CPU).precision == expected
    assert sample.configure(args, settings(precision="fp32"), CPU).precision == "fp32"


def test_ctrl_c_leaves_whole_files_and_one_line(synthesis, call, monkeypatch):
    """At the third X-ray: the first two are there."""
    monkeypatch.setattr(memory, "in_chunks", chunks_of(4))
    real = drawing.sample_images

    def stop_at_2(model, cfg, index, *args, **kwargs):
        if 2 in index:
            raise KeyboardInterrupt
        return real(model, cfg, index, *args, **kwargs)

    monkeypatch.setattr(drawing, "sample_images", stop_at_2)
    status, _, err = call(synthesis, "-n", 4)
    assert status == 130
    assert err == "\nsample.py: stopped; the files written until now are whole\n"
    assert sorted(contents(synthesis / "samples")) == ["sample-0000.png", "sample-0001.png"]


# ---------------------------------------- folders


def test_a_folder_is_its_image_files_and_nothing_is_written_there(mirror, call, tmp_path):
    """In the order of their names, beside a file of another folder; subfolders are not searched."""
    files = xrays(tmp_path / "in", 3)
    files[1] = files[1].rename(tmp_path / "in" / "x1.TIF")
    files[2] = files[2].rename(tmp_path / "one.png")
    Image.fromarray(read(tmp_path / "in" / "x0.png")).save(tmp_path / "in" / "x1.TIF")
    (tmp_path / "in" / "notes.txt").write_text("x")
    save(tmp_path / "in" / "more" / "x9.png", read(files[0]))
    before = sorted(tmp_path.glob("in/**/*"))
    one, folder = tmp_path / "one.png", tmp_path / "in"
    assert call(mirror, "--images", one, folder, "--out", tmp_path / "out")[0] == 0
    assert call(mirror, "--images", *[one, files[0], files[1]], "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "b")
    assert {name[:3] for name in contents(tmp_path / "out")} == {"one", "x0-", "x1-"}
    assert sorted(tmp_path.glob("in/**/*")) == before


def test_masks_of_a_folder_are_found_by_their_names(mirror, call, tmp_path):
    """Sorted they are 0-m, 1-m, 10-m, 2-m beside 1, 10, 2. Each X-ray is its own mask."""
    for i, name in enumerate(("1", "2", "10")):
        a = np.uint8(255) * (np.arange(S * S).reshape(S, S) < 40 * (i + 1))
        save(tmp_path / "in" / f"{name}.png", a)
        save(tmp_path / "true" / f"{name}-m.png", a)
    save(tmp_path / "true" / "0-m.png", a)
    words = ("--images", tmp_path / "in", "--masks", tmp_path / "true")
    status, out, _ = call(mirror, *words)
    rows = [line.split(" | ") for line in out.splitlines() if ".png" in line and "|" in line]
    assert status == 0 and len(rows) == 3 and all(row[1].strip() == "1.0000" for row in rows)
    (tmp_path / "true" / "2-m.png").unlink()
    status, _, err = call(mirror, *words)
    assert status == 2 and "--masks must have one for each X-ray, and none is for" in err


def test_a_mask_is_cut_where_those_of_the_run_were(tmp_path, call, monkeypatch):
    """Gray 99 is outside, 100 inside, by the run's own threshold; without one it is refused."""
    monkeypatch.setattr(ConditionalUNet, "denoise", lambda self, xt, t, e: e)
    a = np.where(np.arange(S)[:, None] < 5, np.uint8(100), np.uint8(99)).repeat(S, 1)
    xray = save(tmp_path / "x.png", np.uint8(255) * (a == 100))
    true = save(tmp_path / "m.png", a)
    own = dict(task="masks", classes=(), target="x0")
    run = write_run(tmp_path / "cut", settings(**own, threshold=100))
    status, out, _ = call(run, "--images", xray, "--masks", true)
    assert status == 0 and "| **1.0000**" in out.splitlines()[-3]
    run = write_run(tmp_path / "uncut", settings(**own))
    status, _, err = call(run, "--images", xray, "--masks", true)
    assert status == 2 and "a mask has the values 0 and 255, or 0 and 1; found 99, 100\n" in err


@pytest.mark.parametrize("way", ["itself", "a link", "the default"])
def test_results_do_not_go_into_a_folder_that_is_given(lung, call, tmp_path, way):
    xrays(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    out = ["--out", tmp_path / ("in" if way == "itself" else "link")]
    if way == "the default":
        (tmp_path / "in").rename(lung / "samples")
        out = []
    folder = lung / "samples" if way == "the default" else tmp_path / "in"
    before = contents(folder)
    status, _, err = call(lung, "--images", folder, *out)
    rule = "--out must not be a folder of --images or --masks, where nothing is written, got "
    assert status == 2 and rule in err and contents(folder) == before


# ---------------------------------------- X-rays from what is given: §4


def drawing_run(folder, given="", draw="X-rays", **changes):
    cond = "concat" if given.replace("class", "") else None
    return write_run(folder, settings("synthesis", cond=cond, given=given, draw=draw, **changes))


def test_a_class_and_its_guidance_change_the_xrays_and_nothing_given_does_not(tmp_path, call):
    """The pictures of synthesis.sample_images for these conditions; the same noise for all."""
    run = drawing_run(tmp_path / "run", "class")

    def drawn(name, *words):
        assert call(run, "-n", 2, *words, "--out", tmp_path / name)[0] == 0
        return [read(tmp_path / name / f"sample-000{i}.png") for i in (0, 1)]

    model, cfg, _ = runs.load_run(run)
    for name, words, w, label in (
        ("none", (), 0.0, 0),
        ("covid", ("--class", "COVID-19"), 0.0, 1),
        ("normal", ("--class", "Normal"), 0.0, 3),
        ("guided", ("--class", "Normal", "--guidance", 3), 3.0, 3),
    ):
        given = Given(None, torch.tensor(2 * [label]))
        how = dataclasses.replace(cfg, guidance=w)
        x0 = drawing.sample_images(model, how, range(2), given=given)
        assert np.array_equal(drawn(name, *words), data.to_uint8(x0)[:, 0])
    assert not np.array_equal(drawn("a"), drawn("b", "--class", "Normal"))


def test_pairs_are_a_folder_that_train_py_takes(tmp_path, call):
    """A mask first, an X-ray for it next: images/ and masks/, a pair of each name."""
    run = drawing_run(tmp_path / "run", "lung")
    masks = drawing_run(tmp_path / "of masks", draw="lung", target="x0")
    assert call(run, "--lung-mask", masks, "-n", 5, "--out", tmp_path / "pairs")[0] == 0
    found, line = pairs.find(tmp_path / "pairs")
    assert len(found) == 5 and "5 pairs" in line
    model, cfg, _ = runs.load_run(masks)
    drawn = drawing.draw(model, cfg, None, 5, torch.device("cpu")) > 0
    written = np.stack([read(tmp_path / f"pairs/masks/sample-{i:04}.png") for i in range(5)])
    assert np.array_equal(written[:, None], np.uint8(255) * drawn.numpy())
    assert 0 < drawn.float().mean() < 1
    model, cfg, _ = runs.load_run(run)
    x0 = drawing.sample_images(model, cfg, range(5), given=Given(drawn * 2.0 - 1, None))
    written = np.stack([read(tmp_path / f"pairs/images/sample-{i:04}.png") for i in range(5)])
    assert np.array_equal(written[:, None], data.to_uint8(x0))


def test_masks_of_files_are_taken_in_turn_and_two_kinds_have_two_folders(tmp_path, call):
    """Three lung masks for five X-rays; one infection mask for all; each is written beside it."""
    run = drawing_run(tmp_path / "run", "lung+infection")
    rng = np.random.default_rng(0)
    masks = [np.uint8(255) * (rng.random((S, S)) > 0.5) for _ in range(3)]
    for i, mask in enumerate(masks):
        save(tmp_path / "lungs" / f"{i}.png", mask)
    one = save(tmp_path / "one.png", masks[0].T)
    words = ("--lung-mask", tmp_path / "lungs", "--infection-mask", one, "-n", 5)
    status, out, _ = call(run, *words, "--out", tmp_path / "out")
    assert status == 0 and "16 files" in out
    for i in range(5):
        lung = read(tmp_path / "out" / "lung-masks" / f"sample-000{i}.png")
        infection = read(tmp_path / "out" / "infection-masks" / f"sample-000{i}.png")
        assert np.array_equal(lung, masks[i % 3]) and np.array_equal(infection, masks[0].T)
    assert len(contents(tmp_path / "out" / "images")) == 5
    # One kind alone: the other is not given, and the X-rays are others
    call(run, "--infection-mask", one, "-n", 5, "--out", tmp_path / "less")
    assert sorted(f.name for f in (tmp_path / "less").iterdir()) == [
        "images",
        "masks",
        "samples.png",
    ]
    both, less = (read(tmp_path / name / "images/sample-0001.png") for name in ("out", "less"))
    assert not np.array_equal(both, less)


@pytest.mark.parametrize(
    "words, message",
    [
        ("class --lung-mask m", "--lung-mask needs a run that was trained with --given lung; "),
        ("lung --class Normal", "--class needs a run that was trained with --given class; "),
        ("plain --guidance 1", "--guidance needs a run that is --given something, got 1.0"),
        ("class --guidance -2", "--guidance must be between -1 and 100, got -2.0"),
        ("lung --lung-mask gray", "a mask has the values 0 and 255, or 0 and 1; found 7"),
        (
            "lung --lung-mask class",
            "--lung-mask must be a run that draws lung masks at 16x16, got ",
        ),
        ("lung --lung-mask empty", "empty: must hold image files"),
        ("lung --lung-mask none", "none: cannot be read: [Errno 2] No such file or directory"),
        ("masks --class Normal --images m", "--class is about X-rays that are drawn; "),
    ],
)
def test_what_cannot_be_given_is_refused_in_one_line(tmp_path, call, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("class", "lung", "plain"):
        drawing_run(tmp_path / name, name.replace("plain", ""))
    write_run(tmp_path / "masks", settings())
    save(tmp_path / "m.png", np.zeros((S, S), np.uint8)).rename("m")
    save(tmp_path / "gray.png", np.full((S, S), 7, np.uint8)).rename("gray")
    (tmp_path / "empty").mkdir()
    status, _, err = call(*words.split())
    assert status == 2 and err.splitlines()[-1].startswith("sample.py: error: ")
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.rglob("sample*.png"))


# ---------------------------------------- refusals

# L and Y are the folders of the two runs
N_IS_SYNTHESIS = "-n draws X-rays from a synthesis run; L is a lung run: give --images"
SYNTHESIS_HAS_N = "is about masks; Y is a synthesis run, which draws X-rays: give -n"
TWO_OF_A_NAME = "would both become L/samples/{}-mask.png; segment them in two calls"
SEEDS = "--seed must be between 0 and 2^63 - 1, got"
PASSES = "--ddim-steps must be between 1 and T = 1000 for --sampler ddim, got"
MENDABLE = {  # arguments -> what the one line says
    "lung": "L is a lung run: give the X-rays to segment with --images FILE...",
    "lung -n 3": N_IS_SYNTHESIS,
    "lung -n 3 --images x0": N_IS_SYNTHESIS,
    "lung --masks m0": "--masks are the true masks of --images, and there are no --images",
    "lung --images x0 x1 --masks m0": "--masks must be as many as --images, got 1 for 2",
    "lung --images sub sub/more": "sub/more: must hold image files (PNG, JPEG, TIFF, BMP, PPM, ",
    "lung --images sub --masks sub": "X0.png: a mask has the values 0 and 255, or 0 and 1; found ",
    "lung --images x0 --masks wide": "wide.png: is 20x10 pixels, its image x0.png is 16x16",
    "lung --images x0 --masks x1": "x1.png: a mask has the values 0 and 255, or 0 and 1; found "
    "0, 2, 3, 4, 5, ... (",
    "lung --images x0 none": "none.png: cannot be read: [Errno 2] No such file or directory:",
    "lung --images x0 text": "text.png: cannot be read: not an image file",
    "lung --images x0 colour": "colour.png: coloured pixels, a gray image (R = G = B) is wanted",
    "lung --images x0 x0": f"x0.png and x0.png {TWO_OF_A_NAME.format('x0')}",
    "lung --images x0 sub/X0": f"x0.png and sub/X0.png {TWO_OF_A_NAME.format('X0')}",
    "lung --images x0 --ensemble 0": "--ensemble must be between 1 and 64, got 0",
    "lung --images x0 --ensemble 65": "--ensemble must be between 1 and 64, got 65",
    "lung --images x0 --ddim-steps 0": f"{PASSES} 0",
    "lung --images x0 --ddim-steps 1001": f"{PASSES} 1001",
    "lung --images x0 --seed -1": f"{SEEDS} -1",
    "lung --images x0 --seed 9223372036854775808": f"{SEEDS} 9223372036854775808",
    "lung --images x0 --lungs lung": "--lungs is about the share of an infection; L is a lung run",
    "synthesis --lungs lung": f"--lungs {SYNTHESIS_HAS_N}",
    "lung --images": "argument --images: expected at least one argument",
    "lung --out text --images x0": "text.png'",
    "synthesis --images x0": f"--images {SYNTHESIS_HAS_N}",
    "synthesis --images x0 --masks m0": f"--images {SYNTHESIS_HAS_N}",
    "synthesis --ensemble 2": f"--ensemble {SYNTHESIS_HAS_N}",
    "synthesis -n 0": "-n must be between 1 and 1000000, got 0",
    "synthesis -n 1000000000": "-n must be between 1 and 1000000, got 1000000000",
    "none -n 2": "none.png: no checkpoint there",
    "text -n 2": "text.png: not a checkpoint of train.py, or a damaged one (",
    "damaged -n 2": "damaged.png: not a checkpoint of train.py, or a damaged one (",
    "": "the following arguments are required: RUN",
}


@pytest.mark.parametrize("line", MENDABLE)
def test_what_cannot_be_is_refused_in_one_line_before_any_work(
    lung, synthesis, call, tmp_path, monkeypatch, line
):
    """No sample is drawn, nothing is shown but the progress of reading, no file is written."""
    monkeypatch.chdir(tmp_path)
    files = xrays(tmp_path, 2)
    save(tmp_path / "sub" / "X0.png", read(files[0]))
    (tmp_path / "sub" / "more").mkdir()
    save(tmp_path / "m0.png", np.zeros((S, S), np.uint8))
    save(tmp_path / "wide.png", np.zeros((10, 20), np.uint8))
    save(tmp_path / "colour.png", np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "damaged.png").write_bytes((synthesis / "last.pt").read_bytes()[:20_000])
    names = ("x0", "x1", "sub/X0", "m0", "wide", "colour", "text", "damaged", "none")
    before = sorted(tmp_path.rglob("*"))
    for module, function in ((evaluate, "sample_masks"), (drawing, "sample_images")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("work was begun"))
    status, out, err = call(*(f"{word}.png" if word in names else word for word in line.split()))
    message = err.splitlines()[-1]
    progress = [text for text in err.splitlines()[:-1] if not text.startswith("reading")]
    expected = MENDABLE[line].replace("Y is", "synthesis is")
    expected = expected.replace("L is", "lung is").replace("L/", "lung/")
    assert status == 2 and message.startswith("sample.py: error: ") and expected in message
    assert out == "" and not progress and sorted(tmp_path.rglob("*")) == before


def test_a_device_that_is_not_there_is_refused(lung, tmp_path, capsys):
    image = xrays(tmp_path / "in", 1)[0]
    assert sample.main([str(lung), "--images", str(image), "--device", "abacus"]) == 2
    message = "sample.py: error: --device must be cuda, mps or cpu, got abacus"
    assert message in capsys.readouterr().err
