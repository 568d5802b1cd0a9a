"""The tree: imports point one way, four packages, importing does nothing. Checked are the modules that exist."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
LEVELS = [  # a module imports project modules of lower levels only
    {"diffusion", "rrdb", "metrics", "data", "score"},
    {"unet"},
    {"baselines"},
    {"train"},
    {"sample", "benchmark", "probes"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
FIGURES = ROOT / "notebooks" / "figures.py"  # a leaf: plots arrays, knows no module
PACKAGES = {"numpy", "torch", "PIL", "matplotlib"}
PEERS = {"diffusers", "monai", "denoising_diffusion_pytorch"}  # benchmark.py measures them where they are installed

MODULES = [p for p in ROOT.glob("*.py") if not p.name.startswith(("test_", "conftest"))]
MODULES.sort(key=lambda p: (LEVEL.get(p.stem, 9), p.stem))
SOURCES = [*MODULES, *ROOT.glob("notebooks/*.py")]
EVERY_FILE = [*SOURCES, *ROOT.glob("test_*.py")]


def files(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports(tree):
    """Top-level names of all imports below a node; `from notebooks import figures` is notebooks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports: the modules are flat"
            yield node.module.split(".")[0]


def at_import(tree):
    """The part of a module that runs when it is imported: not the bodies of functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []
    return tree


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 11))


# ------------------------------------------------------------------------------------- imports


def test_the_root_holds_no_module_that_is_not_in_the_plan():
    """No utils.py: every module is one of the plan's, each with its level."""
    assert {p.stem for p in MODULES} <= set(LEVEL)


@files(MODULES)
def test_imports_point_one_way(path):
    """A module imports project modules of lower levels only, and notebooks' figures inside functions at most."""
    known = set(imports(parse(path))) & {p.stem for p in ROOT.glob("*.py")}
    assert all(LEVEL[name] < LEVEL[path.stem] for name in known if name in LEVEL)
    assert known <= set(LEVEL), "a module imports a test"
    assert "notebooks" not in set(imports(at_import(parse(path))))
    assert "notebooks" not in set(imports(parse(path))) or LEVEL[path.stem] >= LEVEL["train"]


@files(SOURCES)
def test_no_third_party_package_but_the_four(path):
    """numpy, torch, pillow; the standard library; the project's own modules; matplotlib, but in figures.py only."""
    own = {p.stem for p in MODULES} | {"notebooks", "figures"}
    foreign = set(imports(parse(path))) - own - set(sys.stdlib_module_names)
    assert not PEERS & set(imports(at_import(parse(path))))
    assert foreign - (PEERS if path.stem == "benchmark" else set()) <= PACKAGES
    assert "matplotlib" not in foreign or path == FIGURES


def test_figures_is_a_leaf():
    """It imports numpy, pillow and matplotlib, nothing of the project and no torch."""
    if not FIGURES.exists():
        pytest.skip("no notebooks/figures.py yet")
    assert set(imports(parse(FIGURES))) - set(sys.stdlib_module_names) <= {"numpy", "PIL", "matplotlib"}


PROBE = r"""
import importlib, json, os, random, sys, warnings
import numpy, torch, PIL.Image

root, names = sys.argv[1], sys.argv[2:]
sys.path.insert(0, root)
touched = []

def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path, mode = os.path.abspath(os.fsdecode(args[0])), args[2] or 0
        ours = path.startswith(root + os.sep) and not path.endswith((".py", ".pyc"))
        if ours or mode & (os.O_WRONLY | os.O_RDWR):
            touched.append("file " + path)
    elif event in ("os.mkdir", "os.listdir", "os.scandir", "socket.connect", "subprocess.Popen", "os.system"):
        if event not in ("os.listdir", "os.scandir") or "importlib" not in sys._getframe(1).f_code.co_filename:
            touched.append(event)

for name in ("is_available", "device_count", "current_device", "set_device"):
    setattr(torch.cuda, name, lambda *args, name=name: touched.append("torch.cuda." + name) or 0)

def state():
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch's seed": torch.initial_seed(),
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": [kind, keys.tolist(), *rest],
        "random's state": random.getstate(),
        "device": str(torch.get_default_device()),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "warning filters": list(warnings.filters),
        "matplotlib loaded": "matplotlib" in sys.modules,
    }

sys.addaudithook(watch)
report = {}
for name in names:
    touched.clear()
    before = state()
    importlib.import_module(name)
    after = state()
    report[name] = touched + [what for what in before if before[what] != after[what]]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def side_effects():
    """Module -> what importing it did, in one fresh interpreter, lower levels first."""
    command = [sys.executable, "-B", "-c", PROBE, str(ROOT), *(p.stem for p in MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    report, printed = done.stdout.strip().rsplit("\n", 1)[-1], done.stdout.count("\n") - 1
    return json.loads(report) | {"printed": printed + len(done.stderr)}


@files(MODULES)
def test_importing_a_module_does_nothing(path, side_effects):
    """No device chosen, no seed or global switch set, no file read or written, no matplotlib loaded."""
    assert side_effects[path.stem] == []


def test_importing_prints_nothing(side_effects):
    assert side_effects["printed"] == 0


# ------------------------------------------------------------------------------------- text


@files(EVERY_FILE)
@pytest.mark.filterwarnings("error")
def test_every_file_compiles_without_a_warning(path):
    """Python 3.11's grammar, and no escape such as "\\s" or "\\m" in a string that is not raw."""
    parse(path)
    compile(path.read_text(encoding="utf-8"), path.name, "exec")


@files(SOURCES)
def test_no_latex_is_read_as_control_characters(path):
    r"""\alpha, \beta, \frac, \rho, \varepsilon, \theta in a string that is not raw: bell, backspace, form feed, ...

    A carriage return that starts a string rewrites a progress line, and may; a tab may stand outside docstrings.
    """
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search("[\a\b\f\v]|(?<!^)\r", node.value), f"line {node.lineno}: {node.value!r}"
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert "\t" not in (ast.get_docstring(node, clean=False) or ""), f"{node!r}: {ast.get_docstring(node)!r}"


@files(SOURCES)
def test_modules_functions_and_classes_say_what_they_are(path):
    """A docstring each below the scripts' level, but for functions and records of six lines or fewer."""
    tree = parse(path)
    assert ast.get_docstring(tree)
    if LEVEL.get(path.stem, 9) < LEVEL["train"]:
        nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        silent = [node.name for node in nodes if not ast.get_docstring(node) and node.end_lineno - node.lineno >= 6]
        assert silent == []


@files([p for p in EVERY_FILE if p.name.startswith("test_")])
def test_no_test_hides_behind_another_of_its_name(path):
    """Two tests of one name in a file: only the second would run."""
    names = [node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in set(names) if names.count(name) > 1] == []
