"""The tree: imports point one way, four packages, importing does nothing, one style."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion import Purpose

ROOT = Path(__file__).resolve().parent
LEVELS = [  # a module imports project modules of lower levels only
    {"diffusion", "rrdb", "metrics", "console", "figures", "tables"},
    {"peers", "unet", "score", "data", "probes", "image_metrics", "improved"},
    {"ambiguous", "conditions", "fullsize", "pairs"},
    {"batches", "conditional", "devices"},
    {"baselines", "patches", "memory"},
    {"config", "phantoms"},
    {"networks"},
    {"runs"},
    {"classifier"},
    {"evaluate"},
    {"synthesis"},
    {"train", "sample", "intervals"},
    {"studies", "benchmark", "realism"},
    {"compare"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
MOST_LINES = {"train": 400, "benchmark": 600}  # of 100 columns; of every other module 450
PACKAGES = {"numpy", "torch", "PIL", "matplotlib"}
PEERS = {"diffusers", "monai", "denoising_diffusion_pytorch"}  # peers.py, where they are installed
ALSO = {"peers": PEERS, "lesson": {"IPython"}}  # in functions: what is there where they are called
NOT_MODULES = ("test_", "testing", "conftest")

MODULES = [p for p in ROOT.glob("*.py") if not p.name.startswith(NOT_MODULES)]
MODULES.sort(key=lambda p: (LEVEL.get(p.stem, 9), p.stem))
QUIET = [p for p in MODULES if p.stem != "figures"]  # figures loads matplotlib, which reads files
SOURCES = [*MODULES, *ROOT.glob("notebooks/*.py")]
EVERY_FILE = [*SOURCES, *(p for p in ROOT.glob("*.py") if p not in MODULES)]


def files(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: path.relative_to(ROOT).as_posix()
    )


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


# ---------------------------------------- imports


def test_the_root_holds_the_modules_of_the_plan_and_no_other():
    """No utils.py: every module is one of the plan's, each with its level."""
    assert {p.stem for p in MODULES} == set(LEVEL)


@files(MODULES)
def test_imports_point_one_way(path):
    """A module imports project modules of lower levels only, also inside functions: no circle."""
    known = set(imports(parse(path))) & {p.stem for p in ROOT.glob("*.py")}
    assert all(LEVEL[name] < LEVEL[path.stem] for name in known if name in LEVEL)
    assert known <= set(LEVEL), "a module imports a test"
    assert "notebooks" not in set(imports(parse(path)))


@files(SOURCES)
def test_no_third_party_package_but_the_four(path):
    """The standard library, numpy, torch, pillow; matplotlib in figures.py, peers in peers.py."""
    own = {p.stem for p in MODULES}
    foreign = set(imports(parse(path))) - own - set(sys.stdlib_module_names)
    assert not (PEERS | {"IPython"}) & set(imports(at_import(parse(path))))
    assert foreign - ALSO.get(path.stem, set()) <= PACKAGES
    assert "matplotlib" not in foreign or path.stem == "figures"


def test_figures_is_a_leaf_that_is_loaded_when_something_is_drawn():
    """figures.py knows no torch, and no other module imports it while it is imported itself."""
    known = set(imports(parse(ROOT / "figures.py"))) - set(sys.stdlib_module_names)
    assert known <= {"numpy", "PIL", "matplotlib"}
    assert not any("figures" in set(imports(at_import(parse(path)))) for path in MODULES)


def test_sampling_needs_no_training_code():
    """sample.py runs where train.py cannot be imported."""
    blocked = "import sys; sys.modules['train'] = None; import sample, evaluate, runs, probes"
    command = [sys.executable, "-B", "-c", blocked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


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
    elif event in ("os.listdir", "os.scandir"):
        if "importlib" not in sys._getframe(1).f_code.co_filename:
            touched.append(event)
    elif event in ("os.mkdir", "socket.connect", "subprocess.Popen", "os.system"):
        touched.append(event)

for name in ("is_available", "device_count", "current_device", "set_device"):
    note = lambda *args, name=name: touched.append("torch.cuda." + name) or 0
    setattr(torch.cuda, name, note)

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
    command = [sys.executable, "-B", "-c", PROBE, str(ROOT), *(p.stem for p in QUIET)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    report, printed = done.stdout.strip().rsplit("\n", 1)[-1], done.stdout.count("\n") - 1
    return json.loads(report) | {"printed": printed + len(done.stderr)}


@files(QUIET)
def test_importing_a_module_does_nothing(path, side_effects):
    """No device chosen, no seed or global switch set, no file touched, no matplotlib loaded."""
    assert side_effects[path.stem] == []


def test_importing_prints_nothing(side_effects):
    assert side_effects["printed"] == 0


# ---------------------------------------- random numbers

PURPOSES = {  # each function that begins a stream of random numbers: what it names of Purpose
    "ambiguous.picture": {"AMBIGUOUS"},
    "batches.batch": {"AUGMENTATION", "CONDITIONS"},
    "batches.draws": {"NOISE"},
    "batches.order_of": {"ORDER"},
    "synthesis.sample_images": set(),  # SAMPLE is ImageNoise's default
    "evaluate.sample_masks": set(),
    "phantoms.phantom": {"PHANTOM"},
    "probes.fit": {"CLASSIFIER"},
    "studies.anomaly_maps": {"ANOMALY_MAP"},
    "studies.bounds": {"LIKELIHOOD"},
    "studies.few_labels": {"LABELS"},
    "studies.from_scratch": {"FROM_SCRATCH"},
    "studies.probe": {"PROBE"},
    "realism.pairs": {"LABELS"},  # the images that studies.few_labels has
    "diffusion.ImageNoise": {"SAMPLE"},
    "diffusion.philox": set(),  # these three hand on the purpose that they are given
    "diffusion.seed_of": set(),
    "batches.generator": set(),
    "compare.rows_of_dice": {"BOOTSTRAP"},
    "classifier.train_classifier": {"JUDGE"},
    "classifier.accuracy": {"ALTERATION"},
    "networks.build_model": set(),  # these four have the seed alone
    "evaluate.evaluated_rows": set(),
    "synthesis.distances_to_held_out": set(),
    "realism.reference": set(),  # the halves that distances_to_held_out has
    "diffusion.l_simple": set(),  # a draw of no seed, where t or eps is not given
    "probes.fit_member": set(),  # torch's seed, which probes.fit has set
    "batches.noise_split": set(),  # noise whose values do not matter
}
STREAMS = {"ImageNoise", "philox", "seed_of", "generator", "Generator", "manual_seed", "seed"}
DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
DRAWS |= {"bernoulli", "multinomial", "normal", "poisson"}


def begins_a_stream(call):
    """Whether a call makes a generator or sets a seed, or draws from a generator of no name."""
    name = ast.unparse(call.func)
    if name.startswith(("np.random.", "numpy.random.", "random.")):
        return True
    of_torch = name.removeprefix("torch.") in DRAWS and name.startswith("torch.")
    named = any(keyword.arg == "generator" for keyword in call.keywords)
    return name.rsplit(".", 1)[-1] in STREAMS or (of_torch and not named)


def test_every_stream_of_random_numbers_has_a_purpose_of_its_own():
    """No function draws but those above, each for its own purpose. benchmark.py measures time."""
    found = {}
    for path in MODULES:
        nodes = [] if path.stem in ("benchmark", "peers") else parse(path).body
        for node in nodes:
            inner = list(ast.walk(node))
            if any(isinstance(n, ast.Call) and begins_a_stream(n) for n in inner):
                words = [ast.unparse(n) for n in inner if isinstance(n, ast.Attribute)]
                purposes = {w.split(".")[1] for w in words if w.startswith("Purpose.")}
                found[f"{path.stem}.{getattr(node, 'name', node.lineno)}"] = purposes
    # ImageNoise names its default in its signature, and begins its streams by philox
    assert found == PURPOSES
    once = [list(names) for where, names in PURPOSES.items() if where != "realism.pairs"]
    assert sorted(sum(once, [])) == sorted(Purpose.__members__)


# ---------------------------------------- text


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff_has_nothing_to_say(command):
    """100 columns, one style, no unused or unsorted import, no named lambda; notebooks included."""
    words = [sys.executable, "-m", "ruff", *command.split(), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@files(MODULES)
def test_a_module_can_be_read_in_one_sitting(path):
    """train.py has at most 400 lines, benchmark.py 600, every other module 450."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES.get(path.stem, 450)


@files(EVERY_FILE)
@pytest.mark.filterwarnings("error")
def test_every_file_compiles_without_a_warning(path):
    """Python 3.11's grammar, and no escape such as "\\s" or "\\m" in a string that is not raw."""
    parse(path)
    compile(path.read_text(encoding="utf-8"), path.name, "exec")


@files(SOURCES)
def test_no_latex_is_read_as_control_characters(path):
    r"""\alpha, \beta, \frac, \rho, \theta in a string that is not raw: bell, backspace, ...

    A carriage return may start a string: it rewrites a progress line. A tab may stand outside
    docstrings.
    """
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search("[\a\b\f\v]|(?<!^)\r", node.value), (
                f"line {node.lineno}: {node.value!r}"
            )
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert "\t" not in (ast.get_docstring(node, clean=False) or ""), (
                f"{node!r}: {ast.get_docstring(node)!r}"
            )


@files(SOURCES)
def test_modules_functions_and_classes_say_what_they_are(path):
    """A docstring each, but for a main() and for functions and records of six lines or fewer."""
    tree = parse(path)
    assert ast.get_docstring(tree)
    nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    long = [node for node in nodes if node.end_lineno - node.lineno >= 6 and node.name != "main"]
    assert [node.name for node in long if not ast.get_docstring(node)] == []


@files([p for p in EVERY_FILE if p.name.startswith("test_")])
def test_no_test_hides_behind_another_of_its_name(path):
    """Two tests of one name in a file: only the second would run."""
    names = [node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in set(names) if names.count(name) > 1] == []
