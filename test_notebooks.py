"""The notebooks: each runs from top to bottom in a real kernel; outputs are of one clean run."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import data
import phantoms

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def notebooks():
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of modules and notebooks, with a few small phantoms and no runs.

    What the kernels write stays there.
    """
    root = tmp_path_factory.mktemp("project")
    for file in [
        *ROOT.glob("*.py"),
        *ROOT.glob("notebooks/*.*"),
        *ROOT.glob("results/*/*.json"),
        *ROOT.glob("weights/*.pt"),
    ]:
        (root / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file.relative_to(ROOT))
    for tree in phantoms.PHANTOM_COUNTS:
        counts = {
            split: dict.fromkeys(data.CLASSES, n)
            for split, n in (("Train", 4), ("Val", 4), ("Test", 1))
        }
        phantoms.write_phantoms(root / "phantoms", tree, counts, size=64)
    return root


@notebooks()
def test_it_runs_from_top_to_bottom(path, project, monkeypatch):
    """FAST=1: two steps of training, two passes of sampling, every cell.

    Claims that need no training are checked here too.
    """
    monkeypatch.setenv("FAST", "1")
    notebook = nbformat.read(project / "notebooks" / path.name, 4)
    where = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(notebook, timeout=300, resources=where).execute()


def test_there_is_a_notebook_for_every_figure_and_table_and_the_readme_links_it():
    """Figures 1 to 7 and Tables 1 and 2: each in a notebook's title, which the README links."""
    titles = {
        path: "".join(cells(path, "markdown")[0]["source"]).splitlines()[0] for path in NOTEBOOKS
    }
    for what in [*(f"Figure {i}" for i in range(1, 8)), "Table 1", "Table 2"]:
        kind, number = what.split()
        ours = [
            path
            for path, title in titles.items()
            if re.search(rf"{kind}s?[^)]*\b{number}\b", title.replace("Table", " Table"))
        ]
        assert ours, what
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in README


@notebooks()
def test_it_opens_with_its_question_and_closes_with_an_exercise(path):
    """Title, question, what it reproduces, needs and takes; at the end what was seen."""
    texts = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    assert texts[0].startswith(f"# {path.stem[0]} · ")
    words = ("Report: §", "Code: `", "Takes ", "?")
    assert all(word in texts[0] for word in words)
    assert any(text.startswith("## What was seen") for text in texts)
    assert any(text.startswith("## Exercise") for text in texts)


@notebooks()
def test_it_begins_with_the_same_lines(path):
    """The same beginning in all notebooks; only the imports that a notebook uses differ."""
    first = cells(path, "code")[0]["source"]
    assert first[:3] == cells(NOTEBOOKS[0], "code")[0]["source"][:3]
    assert first[-1] == "device = lesson.begin()"


@notebooks()
def test_its_cells_are_short_and_its_words_carry_it(path):
    """At most 15 lines of 90 columns a cell, no magics, no assert; six words a line of code."""
    sources = ["".join(cell["source"]) for cell in cells(path, "code")]
    lines = [line for source in sources for line in source.splitlines()]
    assert max(source.count("\n") + 1 for source in sources) <= 15
    assert max(map(len, lines)) <= 90
    assert not re.search(r"^\s*[%!]|pip install|^\s*assert ", "\n".join(sources), re.M)
    words = sum(len("".join(cell["source"]).split()) for cell in cells(path, "markdown"))
    assert words >= 6 * sum(bool(line.strip()) for line in lines)


@notebooks()
def test_the_committed_outputs_come_from_one_clean_run(path):
    """All cells in order, in full and not in rehearsal, without an error, on named data.

    The file is small enough for a browser. Nothing was written to stderr.
    """
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert "rehearsal" not in "".join(code[0]["outputs"][0]["text"])
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 3
    text = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert "phantoms" in text and not re.search(r"/(work|root|home|tmp)/", text)
    assert path.stat().st_size < 1_000_000
