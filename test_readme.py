"""Every README is true: what it names exists, its commands parse, its numbers stand in results/."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import networks

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
FILES = [ROOT / "README.md", ROOT / "weights/README.md", *sorted(RESULTS.glob("**/README.md"))]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README = TEXTS["README.md"]
ALL = "\n\n".join(TEXTS.values())
MODULES = {
    file.stem for file in ROOT.glob("*.py") if not file.stem.startswith(("test", "conftest"))
}
CPU = torch.device("cpu")

# ---------------------------------------- reading a README


def code(text):
    """Inline code and indented lines, in order."""
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return re.findall(r"`([^`\n]+)`", text) + indented


def commands(script):
    """The arguments of every call of this script in the READMEs, each once."""
    calls = [re.sub(r".*&& ", "", line) for line in code(ALL)]
    pattern = rf"(?:python|torchrun .*?) {re.escape(script)}(?: (.*))?"
    return sorted({match[1] or "" for call in calls if (match := re.fullmatch(pattern, call))})


def section(text, title):
    """What stands below a heading, up to the next one of its level."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_below(header, text=ALL):
    """The rows of the table with this header line."""
    assert text.count(header + "\n") == 1, header
    return text.split(header + "\n")[1].split("\n\n")[0].splitlines()[1:]


def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def digits(value, count=4):
    """A number; nothing where it was not run."""
    return "" if value is None else f"{value:.{count}f}"


def spread(values, count=4):
    """Mean ± standard deviation; of one seed the value alone, of none nothing."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{count}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{count}f}{deviation}"


def read(file):
    """A JSON of results/."""
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def published():
    """{file name: result} of the runs in results/."""
    return {file.name: read(file.name) for file in sorted(RESULTS.glob("*.json"))}


def studies(name):
    """A JSON of results/models/, which says where it comes from."""
    result = read(f"models/{name}.json")
    assert {"commits", "hardware", "torch", "images", "data", "what"} <= result.keys()
    assert len(result["rows"]) >= 5 and result.keys() & {"seed", "seeds"}
    return result


# ---------------------------------------- the first page


def test_the_readme_is_short():
    """At most 20 KB."""
    assert len(README.encode()) <= 20_000


def test_it_begins_with_two_lines_that_do_everything():
    """On a fresh machine: the first trains and draws, the second runs the tests."""
    block = README.split("\n\n    ")[1].split("\n\n")[0].splitlines()
    first, second = (line.strip() for line in block)
    fresh = "python3 -m venv .venv && . .venv/bin/activate && pip install -r "
    assert first == fresh + "requirements.txt && python train.py --task lung --cond concat"
    assert second == fresh + "requirements-dev.txt && pytest"


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    """.ci/run, with programs in place of python3, pip and pytest that write down their calls."""
    if not shutil.which("bash"):
        pytest.skip("no bash")
    for name in (".ci/run", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "pip", "pytest"):
        act = "mkdir -p .venv/bin && touch .venv/bin/activate" if name == "python3" else "true"
        (programs / name).write_text(
            f'#!/bin/sh\n{act}\necho "{name}" "$@" "$OMP_WAIT_POLICY" >> calls\n'
        )
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:/usr/bin:/bin"}
    subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=path, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    words = ("python3 -m venv .venv", "pip install -r requirements-dev.txt", "pytest")
    assert calls == [f"{call} PASSIVE" for call in words]


def test_the_shelves_hold_every_module():
    """The list of files, beside the files."""
    listed = re.findall(r"\b(?!test_)([a-z_]+)\.py\b", "\n".join(code(section(README, "Files"))))
    assert set(listed) == MODULES


@pytest.mark.parametrize("name", TEXTS)
def test_prose_is_at_most_100_columns_wide(name):
    """Commands, tables and pictures may be wider. No `code` is broken over two lines."""
    for line in TEXTS[name].splitlines():
        assert len(line) <= 100 or line.startswith(("|", "    ", "![")), line
        assert line.count("`") % 2 == 0, line


def test_nothing_is_left_to_fill_in():
    """No placeholder."""
    assert not re.search(r"@[A-Z]+|TODO|FIXME", ALL)


# ---------------------------------------- what is named exists


@pytest.mark.parametrize(
    "symbol", sorted(set(re.findall(rf"`((?:{'|'.join(sorted(MODULES))})\.\w+)`", ALL)))
)
def test_every_symbol_exists(symbol):
    """`module.name` can be imported."""
    module, name = symbol.split(".")
    assert name in ("py", "pt") or hasattr(importlib.import_module(module), name)


def test_every_file_it_names_exists():
    """name.py, in code."""
    named = set(re.findall(r"\b([\w/]+\.py)\b", "\n".join(code(ALL))))
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_test_it_names_exists_and_the_map_names_one_a_line():
    """The equation map's last column are functions of the test files."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)", sources, re.M))
    named = set(re.findall(r"`(test_[a-z]\w+)`", ALL))
    assert named <= tests, named - tests
    lines = section(README, "Where each equation is").splitlines()
    rows = [line for line in lines if re.match(r"\| (Eq\.|§)", line)]
    assert len(rows) >= 25
    assert all(re.search(r"\| `\w+\.\w+`.* \| `test_\w+`.* \|$", line) for line in rows)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_picture_is_in_the_project(name):
    """Relative targets of [text](target) and ![...](...). Every picture has a text in its place."""
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", TEXTS[name])
    inside = [link for link in links if not link[2].startswith("http")]
    assert inside
    for picture, text, target in inside:
        assert ((ROOT / name).parent / target.split("#")[0]).exists(), target
        assert text or not picture, target


# ---------------------------------------- commands


@functools.cache
def parser_of(script):
    """The parse of a script; train.py's stands in config.py."""
    module = "config" if script == "train.py" else script.removesuffix(".py")
    return importlib.import_module(module).parse


def changed(args):
    """The flags of a command line, and the settings of its --set."""
    given = {k for k, v in vars(args).items() if v is not None and v is not False and v != []}
    return (given - {"set"}) | {word.split("=")[0] for word in getattr(args, "set", None) or ()}


def accept_training(arguments):
    """Parse and resolve them, or check that they are settings that --resume may change."""
    config = importlib.import_module("config")
    args = config.parse(shlex.split(arguments))
    if args.resume:
        assert changed(args) <= {"resume", "data", "device", "test", *config.RESUMABLE}
    else:
        networks.describe(config.configure(args, CPU))


@pytest.mark.parametrize("arguments", commands("train.py"))
def test_every_training_command_is_accepted(arguments):
    """Also those of torchrun. --help stops by itself."""
    if arguments != "--help":
        accept_training(arguments)


@pytest.mark.parametrize("script", ["sample.py", "studies.py", "compare.py", "benchmark.py"])
def test_every_other_command_is_accepted(script):
    """Each script parses its own. Weights are there, runs are made by other commands."""
    assert commands(script)
    for arguments in commands(script):
        args = parser_of(script)(shlex.split(arguments))
        runs = getattr(args, "runs", None) or [args.run] if script != "benchmark.py" else []
        assert all(run.startswith("runs/") or (ROOT / run).is_file() for run in runs)
        assert runs or script == "benchmark.py"


@pytest.mark.parametrize(
    "script", ["train.py", "sample.py", "studies.py", "compare.py", "benchmark.py"]
)
def test_the_commands_of_the_docstrings_are_accepted(script):
    """What a script's own help shows. An example stands before two spaces and its words."""
    doc = importlib.import_module(script.removesuffix(".py")).__doc__
    lines = re.findall(rf"^    python {re.escape(script)}(?: (.*?))?(?:  +.*)?$", doc, re.M)
    assert len(lines) >= (5 if script == "train.py" else 2)
    for line in lines:
        if script == "train.py":
            accept_training(line)
        else:
            parser_of(script)(shlex.split(line))


# ---------------------------------------- the runs


def test_every_result_says_where_it_comes_from():
    """Configuration, seed, commit, hardware, data, evaluation; no path of one machine."""
    assert published()
    for name, result in published().items():
        origin = {"config", "evaluation", "commit", "hardware", "torch", "minutes", "command"}
        assert origin <= result.keys(), name
        assert {"seed", "phantoms", "task"} <= result["config"].keys(), name
    for file in RESULTS.glob("**/*.json"):
        assert not re.search(r"/(work|root|home|tmp)/", file.read_text(encoding="utf-8")), file


def test_every_table_of_results_says_where_it_comes_from():
    """Above a table, Source: data, seed, hardware, commit (that of a JSON), command."""
    files = [*RESULTS.glob("**/*.json"), *ROOT.glob("weights/*.json")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    commits = set(re.findall(r'"([0-9a-f]{7})[+"]', "\n".join(texts)))
    for name, text in TEXTS.items():
        blocks = text.split("\n\n") if name != "README.md" else []
        for k, block in enumerate(blocks):
            if not block.startswith("|"):
                continue
            above = [b for b in blocks[:k] if not b.startswith(("|", "    "))][-1]
            assert above.startswith("Source: "), block.splitlines()[0]
            for word in ("seed", "AMD EPYC", "commit", "command"):
                assert word in above, (word, above)
            assert re.search("phantoms|X-rays", above), above
            assert set(re.findall(r"\b[0-9a-f]{7}\b", above)) <= commits, above


def test_the_numbers_of_the_runs_are_those_of_results():
    """Each row `| [name](name.json) | ... | train | **validation** |`, and every published run."""
    pattern = r"^\|.*\]\(([\w-]+\.json)\).*\| (.+) \| \*?\*?([\d.]+)\*?\*? \|$"
    text, found = TEXTS["results/README.md"], set()
    for name, train, last in re.findall(pattern, section(text, "Runs"), re.M):
        evaluation = published()[name]["evaluation"]
        values = [evaluation[split]["pooled"]["DICE index"] for split in ("Train", "Val")]
        assert [train, last] == [digits(value) for value in values], name
        found.add(name)
    for name, samples, halves in re.findall(
        pattern.replace("(.+) ", r"\*\*(.+)\*\* "), section(text, "X-rays from noise (§3)"), re.M
    ):
        val = published()[name]["evaluation"]["Val"]
        keys = ("Fréchet distance", "Fréchet distance of two held-out halves")
        assert [samples, halves] == [digits(val[key]) for key in keys], name
        found.add(name)
    assert found == set(published())


def test_the_commands_of_the_runs_make_the_settings_that_results_recorded():
    """Flags were renamed since, settings were not. Aside: when it is evaluated, data, precision."""
    config = importlib.import_module("config")
    aside = {"preset", "data", "phantoms", "precision", "epochs", "evaluations", "eval_every"}
    rows = re.findall(r"^\| \[.*\]\(([\w-]+\.json)\) \| `python train.py (.+?)`", ALL, re.M)
    assert {name for name, _ in rows} == set(published())
    for name, arguments in rows:
        cfg = config.configure(config.parse(shlex.split(arguments)), CPU)
        now = json.loads(json.dumps(dataclasses.asdict(cfg))) | {"clip": cfg.max_grad_norm}
        now["noises"] = 1  # which was a setting
        for setting, value in published()[name]["config"].items():
            assert setting in aside or now[setting] == value, (name, setting)


def test_the_table_beside_the_report_is_what_evaluate_py_prints():
    """Word for word, by the command that stands above it."""
    (arguments,) = commands("evaluate.py")
    results = [json.loads((ROOT / name).read_text(encoding="utf-8")) for name in arguments.split()]
    table = importlib.import_module("evaluate").comparison(results)
    assert len(results) >= 5 and f"\n\n{table.strip()}\n\n" in README


# ---------------------------------------- models, switches, samplers


def test_the_table_of_switches_is_that_of_results():
    """One switch a row."""
    result, rows = studies("switches-phantoms"), []
    for r in result["rows"]:
        flags = f"`{r['flags']}`" if r["flags"] else ""
        rows.append(row(r["switch"], flags, *(spread(r[key]) for key in ("one", "nine", "five"))))
    header = ("switch", "flags", "one mask, 1 pass", "mean of 9, 2 passes", "one mask, 5 passes")
    assert table_below(row(*header)) == rows
    assert f"`{result['base']}`" in ALL and spread(result["supervised"]) in ALL


def test_a_switch_changes_what_it_names_and_nothing_else():
    """The base's flags and its own, together: train.py takes both."""
    config, result = importlib.import_module("config"), studies("switches-phantoms")

    def settings(flags):
        words = f"{result['base']} {flags}".split()[2:]
        return dataclasses.asdict(config.configure(config.parse(words), CPU))

    base = settings("")
    assert (base["t_power"], base["eval_every"]) == (2, 250)
    for r in result["rows"]:
        words = r["flags"].replace("--set ", "").replace("--", "").replace(" ", "=")
        named = set(re.findall(r"[a-z_]+(?==)", words)) & base.keys()
        now = settings(r["flags"])
        assert {name for name in base if now[name] != base[name]} == named, r["switch"]


def test_the_table_of_ways_to_begin_is_that_of_the_switches():
    """Addition, concatenation, concatenation that begins as addition; by Eq. (7)."""
    switches = {r["switch"]: r for r in studies("switches-phantoms")["rows"]}
    names = ("addition", "concatenation that begins as addition")
    columns = [switches[f"Eq. (7), {name}"] for name in names]
    columns.insert(1, switches["Eq. (7): ε, t uniform"])
    rows = [("mean of 9, 2 passes", "nine"), ("one mask, 5 passes", "five")]
    expected = [row(name, *(spread(column[key]) for column in columns)) for name, key in rows]
    header = "| | addition | concatenation | concatenation that begins as addition |"
    assert table_below(header) == expected


def test_the_table_of_samplers_is_that_of_results():
    """Mean ± standard deviation of the seeds, every row and no other."""
    result = read("samplers/small-phantoms.json")
    assert {"commit", "hardware", "torch", "seeds", "commands"} <= result.keys()
    rows = []
    for r in result["rows"]:
        synthesis, lung = r.get("synthesis", []), r.get("lung", [])
        assert {len(synthesis), len(lung)} <= {0, len(result["seeds"])}
        rows.append(row(r["sampler"], r["passes"], spread(synthesis, 3), spread(lung)))
    header = "| sampler | passes | synthesis: Fréchet distance | lung: DICE |"
    assert table_below(header) == rows and len(rows) > 8


# ---------------------------------------- speed and studies


def test_the_tables_of_speed_are_what_benchmark_py_printed():
    """Each JSON of results/speed/ as the script's own tables, word for word."""
    files = sorted((RESULTS / "speed").glob("*.json"))
    assert files
    for file in files:
        result = read(file)
        assert importlib.import_module("benchmark").tables(result) in ALL, file.name
        assert {"commit", "hardware", "torch", "config"} <= result.keys()


def test_the_tables_of_the_studies_are_what_the_scripts_printed():
    """Each JSON of these scripts as the script's own table, word for word."""
    found = {
        file: json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*/*.json")
    }
    scripts = {"study": "studies", "compare": "compare", "realism": "realism"}
    found = {file: r for file, r in found.items() if scripts.keys() & r.keys()}
    assert len(found) >= 8
    for file, result in found.items():
        (script,) = (scripts[key] for key in scripts.keys() & result.keys())
        assert importlib.import_module(script).table(result) in ALL, file.name
        assert {"commit", "hardware", "torch", "data"} <= result.keys()
