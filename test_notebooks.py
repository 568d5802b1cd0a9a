"""The notebooks: each runs from top to bottom in a real kernel, and what is committed came from one clean run."""

import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import data
from notebooks import figures

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def notebooks():
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the modules and notebooks, with a few small phantoms and no runs: what the kernels write stays there."""
    root = tmp_path_factory.mktemp("project")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.*"), *ROOT.glob("results/*/*.json")]:
        (root / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file.relative_to(ROOT))
    for tree in data.PHANTOM_COUNTS:
        counts = {split: dict.fromkeys(data.CLASSES, n) for split, n in (("Train", 4), ("Val", 4), ("Test", 1))}
        data.write_phantoms(root / "phantoms", tree, counts, size=64)
    return root


@notebooks()
def test_it_runs_from_top_to_bottom(path, project, monkeypatch):
    """FAST=1: two steps of training, two passes of sampling, every cell; claims that need no training are checked here too."""
    monkeypatch.setenv("FAST", "1")
    notebook = nbformat.read(project / "notebooks" / path.name, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(project / "notebooks")}}).execute()


def test_there_is_a_notebook_for_every_figure_and_table_and_the_readme_links_it():
    """Figures 1 to 7 and Tables 1 and 2, each in the title of one notebook, beside a link in the README."""
    titles = {path: "".join(cells(path, "markdown")[0]["source"]).splitlines()[0] for path in NOTEBOOKS}
    for what in [*(f"Figure {i}" for i in range(1, 8)), "Table 1", "Table 2"]:
        kind, number = what.split()
        ours = [path for path, title in titles.items() if re.search(rf"{kind}s?[^)]*\b{number}\b", title.replace("Table", " Table"))]
        assert ours, what
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in README


@notebooks()
def test_it_begins_with_the_same_two_cells(path):
    """What it reproduces, needs and takes; then one and the same cell in all notebooks."""
    first = "".join(cells(path, "markdown")[0]["source"])
    assert first.startswith(f"# {path.stem[0]} · ") and all(word in first for word in ("Report: §", "Code: `", "Needs: ", "Takes "))
    assert cells(path, "code")[0]["source"] == cells(NOTEBOOKS[0], "code")[0]["source"]


@notebooks()
def test_its_cells_are_short_and_it_asserts_what_it_claims(path):
    """No cell longer than a screen, no magics, no installation; at least two claims that can fail."""
    sources = ["".join(cell["source"]) for cell in cells(path, "code")]
    assert max(source.count("\n") + 1 for source in sources) <= 40
    assert not re.search(r"^\s*[%!]|pip install", "\n".join(sources), re.M)
    assert len(re.findall(r"^\s*assert ", "\n".join(sources), re.M)) >= 2


@notebooks()
def test_the_committed_outputs_come_from_one_clean_run(path):
    """All cells in order, in full and not in rehearsal, without an error, on named data; small enough for a browser."""
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert "FAST=False" in "".join(code[0]["outputs"][0]["text"])
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    drawings = len(re.findall(r"^figures\.\w+\(", "\n".join("".join(cell["source"]) for cell in code), re.M))
    assert pictures == drawings >= 3
    text = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert "phantoms" in text and not re.search(r"/(work|root|home|tmp)/", text)
    assert path.stat().st_size < 500_000


# ------------------------------------------------------------------------------------- figures.py


def gray(value, size=8):
    return np.full((1, size, size), value, np.uint8)


def test_image_rows_puts_each_array_in_its_place():
    """Rows, columns, labels, blanks; a row of numbers has one range and a colour bar, gray values are 0..255."""
    numbers = [np.eye(4), 3 * np.eye(4)]
    rows = {"a": [gray(10), None, gray(30)], "b": numbers}
    fig = figures.image_rows(rows, "title", "caption", ["x", "y", "z"], maps=["b"], above={"b": ["p", "q"]})
    grid = np.array(fig.axes[:6]).reshape(2, 3)
    assert np.all(grid[0, 0].images[0].get_array() == 10) and np.all(grid[0, 2].images[0].get_array() == 30)
    assert grid[0, 0].images[0].get_clim() == (0, 255) and not grid[0, 1].axison and not grid[1, 2].axison
    assert np.array_equal(grid[1, 1].images[-1].get_array(), numbers[1])
    assert [ax.images[-1].get_clim() for ax in grid[1, :2]] == [(0, 3), (0, 3)] and len(fig.axes) == 7
    assert [ax.get_title() for ax in grid[0]] == ["x", "y", "z"] and [ax.get_title() for ax in grid[1]] == ["p", "q", ""]
    assert [line[0].get_ylabel() for line in grid] == ["a", "b"] and fig.get_suptitle() == "title" and fig.get_supxlabel() == "caption"


def test_image_rows_outlines_the_masks_of_its_own_row():
    """The contour of column i encloses mask i, in the colour given."""
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[:, 2:4, 5:7] = 255
    fig = figures.image_rows({"a": [gray(0)], "b": [gray(0)]}, "", outlines={"b": [([mask], figures.TRUE, "solid")]})
    assert not fig.axes[0].collections
    (contour,) = fig.axes[1].collections
    low, high = contour.get_paths()[0].vertices.min(0), contour.get_paths()[0].vertices.max(0)
    assert np.allclose(low, [4.5, 1.5]) and np.allclose(high, [6.5, 3.5])
    assert figures.TRUE == "#" + "".join(f"{round(255 * c):02x}" for c in contour.get_edgecolor()[0][:3])


def test_planes_have_their_first_row_below_and_arrows_that_fill_a_step():
    """Density by extent, arrows in their direction: the longest one step of the grid, a quarter of it half a step; paths, points, labels."""
    positions = np.stack(np.meshgrid([0.5, 1.5], [0.5, 1.5]), 2).reshape(4, 2)
    panel = dict(extent=(0, 2, 0, 2), density=np.array([[1, 2], [3, 4]]), arrows=(positions, [[4, 0], [0, 1], [0, 0], [0, -4]]))
    path = [[0, 0], [1, 2], [2, 2]]
    fig = figures.planes({"row": [panel, dict(extent=(0, 2, 0, 2), paths=[path], points=[[1, 1]], title="paths", xlabel="t")]}, "title", "below")
    left, right = fig.axes
    assert left.images[0].origin == "lower" and left.images[0].get_extent() == [0, 2, 0, 2] and left.images[0].get_array()[0, 1] == 2
    (quiver,) = (c for c in left.collections if hasattr(c, "U"))
    assert np.allclose(quiver.U, [1, 0, 0, 0]) and np.allclose(quiver.V, [0, 0.5, 0, -1])
    assert (quiver.scale, quiver.scale_units, quiver.angles) == (1, "xy", "xy")
    assert right.lines[0].get_xydata().tolist() == path and right.lines[1].get_xydata().tolist() == [[1, 1]]
    assert (left.get_ylabel(), right.get_title(), right.get_xlabel(), fig.get_supxlabel()) == ("row", "paths", "t", "below")


def test_lines_differ_in_more_than_colour():
    """Each curve holds its own numbers; dashes and markers are all different, for grey printing."""
    x = np.arange(5)
    fig = figures.plot(dict(lines={str(k): (x, k * x) for k in range(5)}, style="both", marks={"level": 2}, xlabel="t"), title="")
    (ax,) = fig.axes
    lines = [container[0] for container in ax.containers]
    assert all(np.array_equal(line.get_ydata(), k * x) for k, line in enumerate(lines))
    assert len({(line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1])) for line in lines}) == 5
    assert len({line.get_marker() for line in lines}) == 5 and ax.get_xlabel() == "t"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["level", "0", "1", "2", "3", "4"]


def test_a_picture_shows_itself_in_a_notebook():
    """As a PNG of a browser's width and few bytes; grays within 4 levels of 255, black and white kept, colours kept."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64), np.uint8)
    fig = figures.image_rows({"a": [noise] * 4, "b": [gray(0), gray(255), gray(100)]}, "")
    drawn, png = io.BytesIO(), fig._repr_png_()
    fig.savefig(drawn, dpi=90)
    before, after = (np.asarray(Image.open(f).convert("RGB")).astype(int) for f in (drawn, io.BytesIO(png)))
    assert 400 < after.shape[1] < 1200 and len(png) < len(drawn.getvalue()) / 2
    assert np.abs(before - after).max() <= 4 and after.min() == 0 and after.max() == 255 and len(np.unique(after)) > 50
    colours = figures.plot(dict(lines={"x": ([0, 1], [0, 1]), "y": ([0, 1], [1, 0])}), title="")
    shown = np.asarray(Image.open(io.BytesIO(colours._repr_png_())).convert("RGB")).astype(int)
    orange = [int(figures.LINES[1][0][k : k + 2], 16) for k in (1, 3, 5)]
    assert (np.abs(shown - orange).max(2) < 20).any()


def test_the_mask_grid_goes_from_the_worst_to_the_best():
    """Columns in order of DICE, an undefined one last; missed pixels green, too many orange."""
    true, sampled = np.zeros((2, 3, 1, 8, 8), np.uint8)
    true[:, :, 2:4], sampled[:, :, 3:5] = 255, 255
    fig = figures.mask_grid(np.zeros_like(true), true, sampled, np.array([0.9, np.nan, 0.5]), "runs/x")
    grid = np.array(fig.axes).reshape(4, 3)
    assert [ax.get_title() for ax in grid[0]] == ["DICE 0.500", "DICE 0.900", "DICE nan"]
    difference = grid[3, 0].images[0].get_array()
    colour = lambda row: "#" + "".join(f"{int(c):02x}" for c in difference[row, 0])
    assert colour(2) == figures.TRUE and colour(4) == figures.SAMPLED and colour(3) == "#c8c8c8" and colour(0) == "#ffffff"


def test_the_curves_are_the_losses_and_the_evaluations_of_one_protocol():
    """Numbers in their places; an evaluation with other passes at the same step belongs to another curve."""
    scores = lambda v: {"pooled": {"DICE index": v, "Sensitivity": v / 2, "Precision": v / 4}}
    evaluation = lambda step, passes, v: {"step": step, "protocol": {"ddim_steps": passes}, "Val": scores(v), "Train": scores(v / 8)}
    lines = [{"step": k, "loss": 1 / k, "lr": 0.1} for k in (1, 2, 3)]
    fig = figures.curves([*lines, evaluation(2, 5, 0.4), evaluation(3, 5, 0.6), evaluation(3, 50, 0.8)], "runs/x")
    left, right = fig.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert left.get_xlim() == right.get_xlim() and right.get_title().endswith(", 5 passes")
    later = figures.curves([*lines, evaluation(3, 5, 0.6), evaluation(3, 50, 0.8)], "runs/x")  # as many of each: the last one's
    assert later.axes[1].get_title().endswith(", 50 passes")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert drawn["validation DICE index"] == [[2, 0.4], [3, 0.6]] and drawn["train DICE index"] == [[2, 0.05], [3, 0.075]]
    assert drawn["validation Sensitivity"] == [[2, 0.2], [3, 0.3]] and drawn["validation Precision"] == [[2, 0.1], [3, 0.15]]
