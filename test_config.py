"""Every setting once: the defaults of each run, the command line, its help and its refusals."""

import dataclasses
import itertools
import re

import pytest
import torch

import config
import devices
from config import MODELS, RECIPES, SAMPLERS, SETTINGS, SIZES, TASKS, Config
from testing import CPU, ROOT

CUDA = torch.device("cuda")


@pytest.fixture
def no_bf16(monkeypatch):
    """No device is fast in bf16, whatever the tests run on."""
    monkeypatch.setattr(devices, "bf16_is_fast", lambda device: False)


def configured(words, device=CPU):
    """The Config of a command line."""
    return config.configure(config.parse(words.split()), device)


def changes(before, after, device=CPU):
    """{setting: its value in the second command} where the defaults of two commands differ."""
    a, b = (dataclasses.asdict(configured(words, device)) for words in (before, after))
    return {name: b[name] for name in a if a[name] != b[name]}


# ---------------------------------------- defaults


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_size_report_and_recipe_report_are_the_defaults_of_the_fields(no_bf16, device):
    """§3, §4.4, §4.5: a task has its own classes, condition and epochs, and nothing else.

    Images of one's own may be few: steps are counted, not epochs.
    """
    for task in TASKS:
        expected = Config(task=task)
        if task == "synthesis":
            expected = dataclasses.replace(expected, cond=None)
        if task == "infection":
            expected = dataclasses.replace(expected, classes=("COVID-19",), epochs=2400)
        if task == "masks":
            expected = dataclasses.replace(expected, classes=(), steps=4000)
        words = f"--task {task} --size report --recipe report"
        assert configured(words, device) == expected


def test_the_defaults_of_the_fields_are_the_numbers_of_the_report():
    """§3.1, §3.2, §4.3, §4.4; AdamW as the README says; what the report does not have is off."""
    images = dict(image_size=64, batch_size=512, epochs=100, lr=0.003, eval_images=512)
    network = dict(channels=192, channel_mult=(1, 2, 3, 4), blocks=2, head_channels=64, rrdbs=1)
    diffusion = dict(T=1000, attention_levels=(1, 2, 3), sampler="ddim", ddim_steps=50, ensemble=1)
    eq7 = dict(objective="eps", target="eps", t_power=1, shift=1)
    off = dict(lr_decay="none", augment=0, eta=0, rrdb="report", stem="own")
    adamw = dict(weight_decay=0.01, warmup=200, max_grad_norm=1, ema=0.999)
    defaults = dataclasses.asdict(Config(task="lung"))
    assert (images | network | diffusion | eq7 | off | adamw).items() <= defaults.items()
    steps = "AdamW (weight decay 0.01), 200 steps of warm-up (small: 50), gradient norm at most 1, "
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{steps}EMA 0.999 (small: 0.995; " in readme


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_recipe_best_changes_these_settings_alone_at_either_size(task, size):
    """It predicts v at a falling rate; masks get more noise, two passes; infections are moved.

    X-rays are drawn by the flow ODE.
    """
    expected = dict(recipe="best", target="v", lr_decay="cosine")
    if task == "synthesis":
        expected |= dict(sampler="ode")
    else:
        expected |= dict(shift=0.5, t_power=4.0, ddim_steps=2)
    if task == "infection":
        expected |= dict(augment=1.0)
    words = f"--task {task} --size {size} --recipe"
    assert changes(f"{words} report", f"{words} best") == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "task, steps", [("synthesis", 1500), ("lung", 850), ("infection", 1700), ("masks", 850)]
)
def test_size_small_changes_these_settings_alone_in_either_recipe(task, steps, recipe):
    """Network, batch, lengths and evaluation."""
    network = dict(channels=16, blocks=1, attention_levels=(3,), head_channels=16, growth=8)
    training = dict(batch_size=16, steps=steps, warmup=50, ema=0.995)
    evaluation = dict(eval_images=64, evaluations=2)
    words = f"--task {task} --recipe {recipe} --size"
    found = changes(f"{words} report", f"{words} small")
    assert found == dict(size="small") | network | training | evaluation


@pytest.mark.parametrize("task", TASKS)
def test_without_a_gpu_the_defaults_are_small_and_best_and_with_one_the_reports(task, no_bf16):
    """Each of the two can be given alone: the other stays the device's."""
    words = f"--task {task}"
    assert changes(words, f"{words} --size small --recipe best") == {}
    assert changes(words, f"{words} --size report --recipe report", CUDA) == {}
    assert changes(f"{words} --size report", f"{words} --size report --recipe best") == {}
    assert changes(f"{words} --size small", f"{words} --size small --recipe report", CUDA) == {}


def test_the_precision_is_bf16_where_the_device_is_fast_at_it(monkeypatch):
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "bf16_is_fast", lambda device: fast)
        assert configured("--task lung").precision == precision
        assert configured("--task lung --precision fp32").precision == "fp32"


GRID = [
    f"--task {task} --size {size} --recipe {recipe}"
    for task, size, recipe in itertools.product(TASKS, SIZES, RECIPES)
]


@pytest.mark.parametrize("words", GRID)
def test_a_model_a_sampler_and_an_objective_change_what_they_must(words):
    """Published U-Nets: their width. Not DDIM: 50 passes. ncsn: Langevin in 101, or its sampler.

    The cosine schedule, which the flow ODE does not know: DDIM.
    """
    masks = "synthesis" not in words
    for model in MODELS[1:] if masks else ():
        expected = dict(model=model)
        if model != "report-unet":
            expected |= dict(cond=None, channels=32 if "small" in words else 64)
        assert changes(words, f"{words} --model {model}") == expected
    passes_of_others = {"ddim_steps": 50} if masks and "best" in words else {}
    ncsn = dict(objective="ncsn", ddim_steps=101)
    assert changes(words, f"{words} --objective vp") == dict(objective="vp")
    assert changes(words, f"{words} --objective ncsn") == ncsn | dict(sampler="langevin")
    default = "ode" if not masks and "best" in words else "ddim"
    cosine = dict(schedule="cosine") | ({} if default == "ddim" else dict(sampler="ddim"))
    assert changes(words, f"{words} --set schedule=cosine") == cosine
    for sampler in SAMPLERS:
        chosen = {} if sampler == default else dict(sampler=sampler)
        passes = {} if sampler == "ddim" else passes_of_others
        assert changes(words, f"{words} --sampler {sampler}") == chosen | passes
        assert changes(words, f"{words} --sampler {sampler} --objective ncsn") == ncsn | chosen


def test_few_passes_are_of_ddim_alone_unless_asked_for():
    """Recipe best has two passes; another sampler the report's 50, or what is asked for."""
    words = "--task lung --size report --recipe best"
    for sampler, passes in (
        ("", 2),
        ("--sampler ddim", 2),
        ("--sampler ode", 50),
        ("--sampler sde --ddim-steps 20", 20),
    ):
        assert configured(f"{words} {sampler}").ddim_steps == passes


def test_epochs_replace_the_steps_of_a_size_and_steps_the_epochs():
    """--epochs at size small, which counts in steps; --steps at size report, which does not."""
    assert changes("--task lung", "--task lung --epochs 3") == dict(steps=0, epochs=3)
    words = "--task lung --size report"
    assert changes(words, f"{words} --steps 3") == dict(steps=3)


# ---------------------------------------- the command line


def test_set_gives_the_settings_without_a_flag_in_their_own_type():
    """Several names after one --set, and a second --set; a later value wins; tuples with commas."""
    words = "--task lung --set ema=0 channel_mult=1,2 lr_decay=none T=50 --set eval_every=7 ema=0.5"
    given = dict(ema=0.5, channel_mult=(1, 2), lr_decay="none", T=50, eval_every=7)
    assert changes("--task lung", words) == given
    assert type(configured("--task lung --set shift=2").shift) is float
    assert {type(width) for width in configured(words).channel_mult} == {int}
    assert configured("--task lung --set attention_levels=3").attention_levels == (3,)


def test_the_command_line_has_at_most_30_flags_each_in_a_group_with_its_words(capsys, monkeypatch):
    """--help: a flag's words, its section and its defaults; and the name of every other setting."""
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = re.sub("\n {9,}", " ", capsys.readouterr().out)  # a long flag has a line of its own
    titles = [config.LEARN, config.IMAGES, config.TRAINING, config.SAMPLING, config.MACHINE]
    ungrouped, *groups = re.split(f"\n({'|'.join([*titles, config.RUN])}):\n", text)
    assert groups[::2] == [*titles, config.RUN]
    lines = {line.split()[0]: line for group in groups[1::2] for line in group.splitlines() if line}
    assert all(flag.startswith("--") for flag in lines) and len(lines) <= 30
    assert "  --" not in ungrouped.replace("--help", "")
    for name, field in SETTINGS.items():
        if field.metadata["group"]:
            line = lines[f"--{name.replace('_', '-')}"]
            assert field.metadata["words"] in line and field.metadata["section"] in line
        elif name not in ("data", "phantoms"):
            assert re.search(rf"\b{name}\b", lines["--set"])
    assert "(§3.2; default 50; best masks ddim: 2; ncsn: 101)" in lines["--ddim-steps"]
    classes = "(§3.1; default COVID-19, Non-COVID, Normal; masks: none; infection: COVID-19)"
    assert classes in lines["--classes"]


NAMES = ", ".join(
    "draw drop variance schedule shift t_power T threshold augment held_out lr_decay warmup "
    "max_grad_norm weight_decay ema channels channel_mult blocks attention_levels head_channels "
    "growth rrdbs rrdb stem eta evaluations eval_every plan".split()
)
REFUSALS = [
    ("", "--task is needed: one of synthesis, lung, infection, masks"),
    (
        "--task synthesis --cond add",
        "--cond is about masks; --task synthesis has none without --given lung or infection, "
        "got --cond add",
    ),
    ("--task lung --given class", "--given is about --task synthesis, got class"),
    ("--task infection --set draw=lung", "--set draw is about --task synthesis, got lung"),
    (
        "--task synthesis --given lungs",
        "--given must be some of class, lung, infection, joined by +; got lungs",
    ),
    (
        "--task synthesis --set draw=lung --given class+lung",
        "--set draw=lung cannot be --given too, got class+lung",
    ),
    ("--task synthesis --guidance 2", "--guidance needs a run that is --given something, got 2.0"),
    ("--task synthesis --set draw=heart", "--set draw must be one of X-rays, lung, infection"),
    (
        "--task synthesis --ensemble 3",
        "--ensemble averages masks; --task synthesis has none, got 3",
    ),
    (
        "--task synthesis --model unet",
        "--model unet finds masks; --task synthesis needs --model diffusion",
    ),
    (
        "--task lung --model unet --cond add",
        "--cond is about the report's network; --model unet is another, got add",
    ),
    (
        "--task lung --model unet --set rrdb=segdiff",
        "--set rrdb is about the report's network; --model unet is another, got segdiff",
    ),
    (
        "--task lung --model report-unet --set eta=0",
        "--set eta is about diffusion; --model report-unet answers in one pass, got 0.0",
    ),
    (
        "--task lung --model res50attunet --image-size 48",
        "--image-size must be divisible by 32 for --model res50attunet, got 48",
    ),
    (
        "--task lung --cond none --set rrdbs=2",
        "--set rrdbs and rrdb are about the embedder, and --cond none has none, got 2 and report",
    ),
    (
        "--task lung --cond add --set stem=add",
        "--set stem=add is about --cond concat, got --cond add",
    ),
    ("--task lung --set shift=0", "--set shift must be between 0.001 and 1000, got 0.0"),
    ("--task lung --set rrdbs=0", "--set rrdbs must be between 1 and 64, got 0"),
    ("--task lung --steps 4 --epochs 1", "--steps and --epochs say the same thing twice; give one"),
    ("--task lung --steps 0", "--steps must be at least 1, got 0"),
    (
        "--task lung --micro-batch some",
        "argument --micro-batch: must be auto or a number, got some",
    ),
    (
        "--task lung --sampler langevin --ddim-steps 5",
        "--ddim-steps must be between 11 and T = 1000 for --sampler langevin, got 5",
    ),
    (
        "--task lung --sampler sde --set eta=1",
        "--set eta is about --sampler ddim, got 1.0 for --sampler sde",
    ),
    ("--task lung --batch-size 0", "--batch-size must be between 1 and 1000000, got 0"),
    ("--task lung --lr nan", "--lr must be between 1e-09 and 100, got nan"),
    ("--task lung --set ema=1", "--set ema must be between 0 and 0.999999999, got 1.0"),
    ("--task lung --set augment=3", "--set augment must be between 0 and 2, got 3.0"),
    (
        "--task synthesis --set augment=1",
        "--set augment moves X-ray and mask; "
        "--task synthesis would learn to draw the moves, got 1.0",
    ),
    ("--task lung --set eta=1.5", "--set eta must be between 0 and 1, got 1.5"),
    (
        "--task lung --ddim-steps 1001",
        "--ddim-steps must be between 1 and T = 1000 for --sampler ddim, got 1001",
    ),
    ("--task lung --image-size 20", "image_size must be divisible by 8 for 4 levels, got 20"),
    (
        "--task lung --size small --set channels=6",
        "--set channels=6, --image-size 64: head_channels must divide the 24 channels",
    ),
    ("--task lung --lr inf", "--lr must be between 1e-09 and 100, got inf"),
    (f"--task lung --seed {2**32}", f"--seed must be between 0 and {2**32 - 1}, got {2**32}"),
    ("--task lung --epochs 1e308", "--epochs must be between 0.001 and 1000000, got 1e+308"),
    ("--task lung --set t_power=1e308", "--set t_power must be between 0.01 and 100, got 1e+308"),
    (
        "--task lung --set channel_mult=1,1,1,1000000000000",
        "--set channel_mult and attention_levels are at most 32 numbers from 0 to 64, "
        "got 1, 1, 1, 1000000000000, ",
    ),
    (
        "--task lung --classes Covid",
        "--classes must be some of COVID-19, Non-COVID, Normal, got Covid",
    ),
    (
        "--task infection --classes Normal",
        "--classes needs COVID-19 for --task infection: the masks of the others are blank, "
        "got Normal",
    ),
    ("--task lung --group (.+)_", "--group must not be given for --task lung, got (.+)_"),
    ("--task lung --set threshold=9", "--set threshold must not be given for --task lung, got 9"),
    (
        "--task masks --classes Normal",
        "--classes must not be given for --task masks, got Normal",
    ),
    ("--task masks --set threshold=-1", "--set threshold must be between 0 and 65535, got -1"),
    ("--task masks", "--task masks needs --data DIR, a folder with images/ and masks/, got none"),
    (
        "--task lung --data /no/such/folder",
        "/no/such/folder: no data for lung: no such folder",
    ),
    ("--task lung --device quantum", "--device must be cuda, mps or cpu, got quantum"),
    ("--task lung --device meta", "--device must be cuda, mps or cpu, got meta"),
    ("--task bone", "argument --task: invalid choice: 'bone'"),
    ("--resume /no/such/run", "/no/such/run"),
    (
        "--task lung --set emma=0",
        f"--set takes NAME=VALUE with a name of {NAMES}; got emma=0; did you mean ema=VALUE?",
    ),
    ("--task lung --set ema", f"--set takes NAME=VALUE with a name of {NAMES}; got ema"),
    ("--task lung --set data=x", f"--set takes NAME=VALUE with a name of {NAMES}; got data=x"),
    ("--task lung --set batch_size=4", "--set batch_size has a flag of its own: --batch-size 4"),
    ("--task lung --set warmup=1.5", "--set warmup must be a whole number, got 1.5"),
    ("--task lung --set ema=much", "--set ema must be a number, got much"),
    (
        "--task lung --set channel_mult=1,two",
        "--set channel_mult must be whole numbers, as in 1,2,3, got 1,two",
    ),
    ("--task lung --set rrdb=esrgan", "--set rrdb must be one of report, segdiff, got esrgan"),
]


@pytest.mark.parametrize("words, message", REFUSALS)
def test_bad_input_gets_one_line_and_exit_status_2(go, capsys, words, message):
    """One line that names the rule and the value; no traceback."""
    status, _ = go(words, given=None)
    error = capsys.readouterr().err
    assert status == 2 and message in error
    assert error.count("\n") == 1 and error.startswith("train.py: error: ")


def test_no_number_is_without_bounds_and_none_is_infinite():
    """The passes have a rule of their own: they are at most T."""
    for name, field in SETTINGS.items():
        if field.type in (int, float) and name != "ddim_steps":
            for word in ("1e308", "-1e308", "inf", "nan", "1e-320", "-1e-320"):
                rule = config.broken_rule(float(word), **field.metadata["rules"])
                least = field.metadata["rules"]["least"]
                zero = word == "1e-320" and least == 0 or "1e-320" in word and least < 0
                assert zero or rule.startswith("must be between "), (name, word)


def test_no_two_seeds_give_the_same_weights():
    """torch's generator reads 32 bits of a seed: there are no more."""
    most = config.SETTINGS["seed"].metadata["rules"]["most"]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, most, most + 1)]
    first, last, beyond = (torch.rand(4, generator=g) for g in generators)
    assert torch.equal(first, beyond) and not torch.equal(first, last)


# ---------------------------------------- what is shown


def test_every_setting_is_described_in_one_place():
    """Its words stand once in config.py, and in no other module if they are a phrase of five."""
    modules = [path for path in ROOT.glob("*.py") if not path.name.startswith("test")]
    everywhere = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    here = (ROOT / "config.py").read_text(encoding="utf-8")
    phrases = [field.metadata["words"] for field in SETTINGS.values()]
    assert all(phrases)
    for phrase in phrases:
        assert here.count(f'"{phrase}"') == 1
        assert len(phrase.split()) < 5 or everywhere.count(phrase) == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--task lung --cond add", "lung-add-0"),
        ("--task synthesis --seed 2", "synthesis-2"),
        ("--task lung --objective vp", "lung-concat-vp-0"),
        ("--task synthesis --classes Normal --objective ncsn", "synthesis-ncsn-Normal-0"),
        ("--task infection --classes COVID-19", "infection-concat-0"),
        ("--task lung --model unet", "lung-unet-0"),
        ("--task masks --seed 1", "masks-concat-1"),
        ("--task infection --model report-unet --cond add", "infection-report-unet-add-0"),
    ],
)
def test_runs_that_learn_other_things_have_other_folders(words, name):
    """Task, conditioning and seed, and what differs of model, objective and classes."""
    assert config.name_of(configured(words)) == name


# ---------------------------------------- of older runs


@pytest.mark.parametrize(
    "preset, words",
    [
        ("small", "--size small --recipe best"),
        ("best", "--size report --recipe best"),
        ("report", "--size report --recipe report"),
    ],
)
def test_a_checkpoint_with_a_preset_has_the_size_and_the_recipe_that_it_meant(preset, words):
    """What was called clip is max_grad_norm; every number stays."""
    cfg = configured(f"--task infection {words} --set max_grad_norm=0.7")
    settings = dataclasses.asdict(cfg) | dict(preset=preset, clip=0.7)
    del settings["size"], settings["recipe"], settings["max_grad_norm"]
    before = dict(settings)
    assert config.from_dict(settings) == cfg
    assert settings == before  # the caller's dict stays as it is
