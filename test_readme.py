"""The README is true: what it names exists, what it commands parses, and its numbers stand in results/."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", README) + [line.strip() for line in README.splitlines() if line.startswith("    ")]


def commands(script):
    """Every command of the README that calls this script, its arguments as a shell would split them."""
    calls = [re.sub(r".*&& ", "", code) for code in CODE]
    return sorted({call.split("#")[0].strip() for call in calls if call.startswith(f"python {script} ")})


MODULES = "|".join(file.stem for file in ROOT.glob("*.py") if not file.stem.startswith("test_"))


@pytest.mark.parametrize("symbol", sorted(set(re.findall(rf"`((?:{MODULES})\.\w+)`", README))))
def test_every_symbol_exists(symbol):
    """`module.name` in the README can be imported."""
    module, name = symbol.split(".")
    if name == "py":
        assert (ROOT / symbol).is_file()
    else:
        assert hasattr(importlib.import_module(module), name)


def test_every_test_it_names_exists_and_the_map_names_one_a_line():
    """The equation map's last column are functions of the test files."""
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(f.read_text() for f in ROOT.glob("test_*.py")), re.M))
    named = set(re.findall(r"`(test_[a-z]\w+)`", README))
    assert named <= tests, named - tests
    rows = re.findall(r"^\| (?:Eqs?\.|§).*\| (.*) \|$", README.split("## Where each equation is")[1].split("\n## ")[0], re.M)
    assert len(rows) >= 12 and all("`test_" in row for row in rows)


@pytest.mark.parametrize("command", commands("train.py"))
def test_every_training_command_is_accepted(command):
    """train.py parses and resolves it, or it is a --resume or --help."""
    train = importlib.import_module("train")
    words = shlex.split(command)[2:]
    if "--help" in words:
        return
    args = train.parse(words)
    if args.resume:
        given = {k for k, v in vars(args).items() if v is not None and v is not False} - {"resume"}
        assert given <= {"data", "device", "test", *train.RESUMABLE}
    else:
        train.describe(train.configure(args, train.torch.device("cpu")))


@pytest.mark.parametrize("command", commands("sample.py"))
def test_every_sampling_command_is_accepted(command):
    """sample.py parses it."""
    assert importlib.import_module("sample").parse(shlex.split(command)[2:]).run.startswith("runs/")


def test_the_training_commands_of_the_docstrings_are_accepted():
    """train.py's own docstring."""
    train = importlib.import_module("train")
    lines = re.findall(r"^    python train\.py (.*?)(?:  +.*)?$", train.__doc__, re.M)
    assert len(lines) >= 5
    for line in lines:
        args = train.parse(line.split())
        if not args.resume:
            train.configure(args, train.torch.device("cpu"))


def test_every_link_and_picture_is_in_the_project():
    """Relative targets of [text](target) and ![...](...)."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", README) if not t.startswith("http")]
    assert targets and all((ROOT / t).exists() for t in targets), targets


def published():
    """{file name: dict} of results/."""
    return {f.name: json.loads(f.read_text()) for f in sorted((ROOT / "results").glob("*.json"))}


def test_every_result_says_where_it_comes_from():
    """Each JSON of results/ has configuration, seed, commit, hardware, data and the evaluation."""
    assert published()
    for name, result in published().items():
        assert {"config", "evaluation", "commit", "hardware", "torch", "minutes", "command"} <= result.keys(), name
        assert {"seed", "phantoms", "task"} <= result["config"].keys(), name
        assert not re.search(r"/(work|root|home|tmp)/", json.dumps(result)), f"{name} holds a path of one machine"


def test_the_numbers_of_the_results_table_are_those_of_results():
    """Each row `| [name](results/name.json) | ... | **value** |` repeats the file's own validation score to four digits."""
    rows = re.findall(r"^\|.*\]\(results/([\w-]+\.json)\).*\*\*([\d.]+)\*\*.*\|$", README, re.M)
    assert len(rows) >= 5
    results = published()
    for name, value in rows:
        val = results[name]["evaluation"]["Val"]
        number = val["pooled"]["DICE index"] if "pooled" in val else val["Fréchet distance"]
        assert f"{number:.4f}" == value, name
    assert set(results) == {name for name, _ in rows}


def test_the_table_of_passes_repeats_the_evaluations_of_results():
    """Each row `| [name](results/name.json) | 1 pass | 2 | 5 | 50 |`: the file's evaluations of the last step, same images; empty where not run."""
    table = README.split("| run | 1 pass | 2 | 5 | 50 |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| \[.*\]\(results/([\w-]+\.json)\) \|(.*)\|$", table, re.M)
    assert len(rows) >= 5
    for name, numbers in rows:
        result = published()[name]
        same = {"step": result["evaluation"]["step"], "eval_images": result["config"]["eval_images"], "ensemble": 1}
        found = {}
        for e in result["evaluations"]:
            if {"step": e["step"], "eval_images": e["protocol"]["eval_images"], "ensemble": e["protocol"]["ensemble"]} == same:
                found[e["protocol"]["ddim_steps"]] = f"{e['Val']['DICE index']:.4f}"
        assert [number.strip() for number in numbers.split("|")] == [found.get(steps, "") for steps in (1, 2, 5, 50)], name


def test_the_tables_of_speed_are_what_benchmark_py_printed():
    """Each JSON of results/speed/ as the script's own tables, word for word."""
    files = sorted((ROOT / "results" / "speed").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert importlib.import_module("benchmark").tables(result) in README, file.name
        assert {"commit", "hardware", "torch", "config"} <= result.keys()


def test_the_table_of_samplers_is_that_of_results():
    """Each row `| sampler | passes | Fréchet distance | DICE |`, mean ± standard deviation of the seeds, and no other."""
    result = json.loads((ROOT / "results" / "samplers" / "small-phantoms.json").read_text(encoding="utf-8"))
    table = README.split("| sampler | passes | synthesis: Fréchet distance | lung: DICE |")[1].split("\n\n")[0]
    cell = lambda values, digits: f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}" if values else ""
    rows = [f"| {r['sampler']} | {r['passes']} | {cell(r.get('synthesis'), 3)} | {cell(r.get('lung'), 4)} |" for r in result["rows"]]
    assert table.splitlines()[2:] == rows and len(rows) > 8 and {"commit", "hardware", "torch", "seeds", "commands"} <= result.keys()
    assert all(len(r.get(key, result["seeds"])) == len(result["seeds"]) for r in result["rows"] for key in ("synthesis", "lung"))


@pytest.mark.parametrize("command", commands("probes.py"))
def test_every_study_command_is_accepted(command):
    """probes.py parses it."""
    assert importlib.import_module("probes").parse(shlex.split(command)[2:]).run.startswith("runs/")


def test_the_tables_of_the_studies_are_what_probes_py_printed():
    """Each JSON of results/probes/ as the script's own table, word for word."""
    files = sorted((ROOT / "results" / "probes").glob("*.json"))
    assert len(files) >= 2
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert importlib.import_module("probes").table(result) in README, file.name
        assert {"commit", "hardware", "torch", "data", "seed"} <= result.keys()


def table_below(header):
    """The lines of README's table under this header, in order."""
    return README.split(header + "\n")[1].split("\n\n")[0].splitlines()[1:]


def mean_and_spread(values):
    """Mean ± standard deviation to four digits; of one seed the value alone, of none nothing."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}" if values else ""


def models(name):
    """A JSON of results/models/, which says where it comes from."""
    result = json.loads((ROOT / "results" / "models" / name).read_text(encoding="utf-8"))
    assert {"commits", "hardware", "torch", "images", "data", "what"} <= result.keys() and len(result["rows"]) >= 5
    assert result.keys() & {"seed", "seeds"}
    return result


def test_the_table_of_models_is_that_of_results():
    """Each row of phantoms, and what its mask costs by benchmark.py --models."""
    speed = json.loads((ROOT / "results" / "speed" / "cpu-models.json").read_text(encoding="utf-8"))
    cost = {row["model"]: f"{1e3 * row['mask']:.1f}" for row in speed["models"]}
    cells = lambda r: (r["command"], r["passes"], cost[r["cost"]], mean_and_spread(r["one"]), mean_and_spread(r["nine"]))
    line = lambda r: "| {} | {} | {} | `{}` | {} | {} | {} | {} |".format(r["task"], r["steps"], r["model"], *cells(r))
    header = "| task | steps of 16 | model | command | passes a mask | ms a mask | DICE of one mask | of the mean of 9 |"
    result = models("small-phantoms.json")
    assert table_below(header) == [line(r) for r in result["rows"]]
    assert all(f"{dice:.4f}" in README for run in result["float32, seed 0"]["runs"] for dice in run["DICE"].values())


def test_the_table_of_real_xrays_is_that_of_results():
    """Train to Val, and to Test; empty where not run."""
    cells = lambda r: " | ".join("" if r[key] is None else f"{r[key]:.4f}" for key in ("Val", "Val, nine", "Test", "Test, nine"))
    rows = [f"| {r['model']} | `{r['command']}` | {r['passes']} | {cells(r)} |" for r in models("small-xrays.json")["rows"]]
    assert table_below("| model | command | passes a mask | Val: one mask | mean of 9 | Test: one mask | mean of 9 |") == rows


def test_the_table_of_switches_is_that_of_results():
    """One switch a row, each accepted by train.py."""
    train, result = importlib.import_module("train"), models("switches-phantoms.json")
    flags = lambda r: f"`{r['flags']}`" if r["flags"] else ""
    cells = lambda r: " | ".join(mean_and_spread(r[key]) for key in ("one", "nine", "five"))
    rows = [f"| {r['switch']} | {flags(r)} | {cells(r)} |" for r in result["rows"]]
    assert table_below("| switch | flags | one mask, 1 pass | mean of 9, 2 passes | one mask, 5 passes |") == rows
    assert f"`{result['base']}`" in README and mean_and_spread(result["supervised"]) in README
    for r in result["rows"]:
        train.configure(train.parse(f"{result['base']} {r['flags']}".split()[2:]), train.torch.device("cpu"))


@pytest.mark.parametrize("command", commands("benchmark.py"))
def test_every_benchmark_command_is_accepted(command):
    """benchmark.py parses it."""
    importlib.import_module("benchmark").parse(shlex.split(command)[2:])


def test_nothing_is_left_to_fill_in():
    """No placeholder."""
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", README)
