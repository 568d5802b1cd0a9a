"""Every setting of a run, and all that follows from it: command line, help, dry run, refusals.

A setting of a group is a flag, such as --batch-size 16. Every other one is reached by --set, as in
--set ema=0 warmup=0. Two independent choices give the defaults. Size `report` is the report's
network, batch and evaluation; `small` is the same code at a size that two CPU cores train in
minutes. Recipe `report` is Eq. (7) and DDIM as printed; `best` is what wins here by measurement.
The defaults are report and report where there is an NVIDIA GPU, small and best elsewhere.
"""

import argparse
import dataclasses
import difflib

import baselines
import conditions
import devices
import diffusion
import improved
import patches
from conditional import CONDITIONINGS
from console import Parser, UserError, path_of, refuse
from data import CLASSES, DEFAULT_CLASSES

TASKS = ("synthesis", "lung", "infection", "masks")  # the last: of your own images
NOT_OF = {task: ("group", "threshold") for task in TASKS} | {"masks": ("classes",)}  # settings
MODELS = ("diffusion", *baselines.U_NETS, "report-unet")  # all but the first answer in one pass
SIZES, RECIPES = ("report", "small"), ("report", "best")
OBJECTIVES = ("eps", "ncsn", "vp")
SAMPLERS = ("ddim", "ddpm", "strided", "ode", "sde", "pc", "langevin")
LEAST_PASSES = {"strided": 2, "ode": 3, "sde": 2, "pc": 3, "langevin": 11}
# How an evaluation samples
PROTOCOL = ("eval_images", "sampler", "ddim_steps", "eta", "guidance", "ensemble")
RESUMABLE = ("steps", "micro_batch", "eval_every", *PROTOCOL)  # what --resume may change

LEARN, IMAGES, TRAINING = "what to learn", "the images", "training"
SAMPLING, MACHINE, RUN = "sampling and evaluation", "the machine", "the run"


def setting(default, words, section="", group=None, cases=None, about="", **rules):
    """A field of Config.

    default  at size report and recipe report
    words    one line for help and dry run; section of the report; group of the help (None: --set)
    cases    {words: value}: the default of a run that has all these words (words_of); last wins
    about    "diffusion", or "network" for the report's own: a model without it refuses the setting
    rules    choices, or least and most: see broken_rule
    """
    facts = dict(words=words, section=section, group=group, cases=cases or {}, about=about)
    return dataclasses.field(default=default, metadata=facts | dict(rules=rules))


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers. A field's own default is the report's."""

    task: str = setting(None, "X-rays from noise, or masks", "§3, §4.4, §4.5", LEARN, choices=TASKS)
    model: str = setting("diffusion", "diffusion, or a supervised network: X-ray in, mask out",
                         "§4.4, §4.5", LEARN, choices=MODELS)
    cond: str = setting("concat", "how RRDB(y) enters; lift: x_t convolved; none: y without it",
                        "§4.2", LEARN,
                        {"synthesis": None, "synthesis given": "concat", "published": None},
                        "network", choices=CONDITIONINGS)
    draw: str = setting("X-rays", "what synthesis draws: X-rays, or masks", "§3, §4",
                        choices=conditions.DRAWN)
    given: str = setting("", "what X-rays are drawn from: class, lung, infection, joined by +",
                       "§4", LEARN)
    drop: float = setting(0.4, "how often some of what is given is taken away", "[8]", least=0,
                          most=1)
    size: str = setting("report", "of network, batch and evaluation", "", LEARN,
                        {"no GPU": "small"}, choices=SIZES)
    recipe: str = setting("report", "as printed, or what wins here", "", LEARN,
                          {"no GPU": "best"}, choices=RECIPES)
    objective: str = setting("eps", "noise it learns: at steps 1..T; ncsn: ten levels; vp: all t",
                             "Eq. (7), §2.1", LEARN, {}, "diffusion", choices=OBJECTIVES)
    target: str = setting("eps", "what the network predicts", "Eq. (7)", LEARN,
                          {"best": "v"}, "diffusion", choices=diffusion.TARGETS)
    variance: str = setting("beta", "sigma^2 of DDPM; learned: by L_hybrid of [10]", "Eq. (5)",
                            None, {}, "diffusion", choices=improved.VARIANCES)
    schedule: str = setting("linear", "of the noise; cosine: that of [10]", "§3.2", None, {},
                            "diffusion", choices=tuple(improved.SCHEDULES))
    shift: float = setting(1.0, "signal-to-noise ratio times shift^2; below 1: more noise",
                           "arXiv 2301.10972", None, {"best masks": 0.5}, "diffusion",
                           least=1e-3, most=1000)
    t_power: float = setting(1.0, "t has density t^(t_power - 1); 1: uniform", "Eq. (7)", None,
                             {"best masks": 4.0}, "diffusion", least=0.01, most=100)
    T: int = setting(1000, "diffusion steps", "§3.2", about="network", least=1, most=10**6)

    data: str = setting("", "folder of the images")
    phantoms: bool = setting(False, "whether the images are generated")
    classes: tuple = setting(CLASSES, "which images", "§3.1", IMAGES, DEFAULT_CLASSES)
    image_size: int = setting(64, "side of an image in pixels", "§3.1", IMAGES, least=1, most=4096)
    group: str = setting("", "REGEX that finds the patient in the name of an image", group=IMAGES)
    threshold: int = setting(0, "inside a mask is N or more; 0: none", least=0, most=65535)
    augment: float = setting(0.0, "strength of the augmentation; 0: none", "", None,
                             {"best infection": 1.0}, least=0, most=2)
    held_out: float = setting(0.0, "share of Train kept to stand for Val", least=0, most=0.5)

    steps: int = setting(0, "gradient steps, instead of epochs", "§4.4, §4.5", TRAINING,
                         {"your own": 4000, "small synthesis": 1500, "small lung": 850,
                          "small infection": 1700, "small your own": 850}, least=0, most=10**12)
    epochs: float = setting(100.0, "passes over the training images, instead of steps",
                            "§4.4, §4.5", TRAINING, {"infection": 2400.0}, least=1e-3, most=10**6)
    batch_size: int = setting(512, "images a step", "§4.4", TRAINING, {"small": 16},
                              least=1, most=10**6)
    lr: float = setting(3e-3, "learning rate of AdamW", "§4.4", TRAINING, least=1e-9, most=100)
    lr_decay: str = setting("none", "after the warm-up; cosine: to 0", "", None,
                            {"best": "cosine"}, choices=("none", "cosine"))
    warmup: int = setting(200, "steps of linear warm-up; 0: none", "", None, {"small": 50},
                          least=0, most=10**12)
    max_grad_norm: float = setting(1.0, "largest gradient norm; 0: no limit", least=0, most=10**6)
    weight_decay: float = setting(0.01, "of AdamW", least=0, most=100)
    ema: float = setting(0.999, "decay of the averaged, evaluated weights, after a ramp; 0: none",
                         "", None, {"small": 0.995}, least=0, most=0.999999999)
    seed: int = setting(0, "of weights, order and noise", "", TRAINING, least=0, most=2**32 - 1)

    channels: int = setting(192, "width of the first level", "§3.2", least=2, most=4096,
                            cases={"small": 16, "published": 64, "small published": 32})
    channel_mult: tuple = setting((1, 2, 3, 4), "widths, times channels", "§3.2", about="network")
    blocks: int = setting(2, "residual blocks a level", "§3.2", None, {"small": 1}, "network",
                          least=1, most=64)
    attention_levels: tuple = setting((1, 2, 3), "levels with attention; the first is 0", "§3.2",
                                      None, {"small": (3,)}, "network")
    head_channels: int = setting(64, "of an attention head", "§3.2", None, {"small": 16}, "network",
                                 least=1, most=4096)
    growth: int = setting(32, "of the embedder's RDBs", "[1]", None, {"small": 8}, "network",
                          least=1, most=1024)
    rrdbs: int = setting(1, "RRDBs of the embedder", "§4.2", about="network", least=1, most=64)
    rrdb: str = setting("report", "segdiff: with the residual scaling of [1]", "§4.2",
                        about="network", choices=("report", "segdiff"))
    stem: str = setting("own", "add: concat begins with the weights of addition", "§4.2",
                        about="network", choices=("own", "add"))

    sampler: str = setting("ddim", "how samples are drawn", "§2, §2.1, §3.2", SAMPLING,
                           {"best synthesis": "ode", "cosine": "ddim", "ncsn": "langevin"},
                           "diffusion", choices=SAMPLERS)
    ddim_steps: int = setting(50, "passes of the network a sample, by any sampler but ddpm", "§3.2",
                              SAMPLING, {"best masks ddim": 2, "ncsn": 101}, "diffusion")
    eta: float = setting(0.0, "fresh noise in DDIM; 0: only x_T is random", "[18]",
                         about="diffusion", least=0, most=1)
    guidance: float = setting(0.0, "w of classifier-free guidance", "[8]", SAMPLING,
                              about="diffusion", least=-1, most=100)
    ensemble: int = setting(1, "masks averaged for one X-ray", "§4.3, [1]", SAMPLING,
                            about="diffusion", least=1, most=1000)
    eval_images: int = setting(512, "sampled images of train and of validation, always the same",
                               "§4.3", SAMPLING, {"small": 64}, least=2, most=10**6)
    evaluations: int = setting(10, "in a run", "§4.3", None, {"small": 2}, least=1, most=10**6)
    eval_every: int = setting(0, "steps between them; 0: by evaluations", least=0, most=10**12)

    precision: str = setting("fp32", "bf16: autocast, the parameters stay float32", "", MACHINE,
                             {"fast bf16": "bf16"}, choices=("bf16", "fp32"))
    micro_batch: int = setting(0, "images a forward pass, or auto: what fits; same gradient", "",
                               MACHINE, least=0, most=10**6)
    plan: str = setting("plain", "layout or compiler of the step; the same numbers to rounding",
                        choices=("plain", "channels-last", "compiled"))

    @property
    def supervised(self):
        """Whether the network sees the X-ray alone and answers in one pass."""
        return self.model != "diffusion"

    @property
    def images_are(self):
        """What tables and pictures call the images: phantoms, or X-rays."""
        return "phantoms" if self.phantoms else "X-rays"

    @property
    def images_of(self):
        """The task whose folders hold the images."""
        with_infections = "infection" in (self.draw, *conditions.kinds_of(self.given))
        return "infection" if with_infections else self.task

    @property
    def learned(self):
        """Whether samples are drawn with the variance that the network has learned."""
        return self.variance == "learned" and self.sampler in ("ddpm", "strided")

    @property
    def pixel_shift(self):
        """The shift of a pixel's schedule. The mean of a patch of p x p pixels, which the network
        sees at once, has 1/p of a pixel's noise; so a pixel has p times as much (2301.11093)."""
        return self.shift / patches.patch_of(self.image_size)
# fmt: on


SETTINGS = {field.name: field for field in dataclasses.fields(Config)}
FOUND = ("data", "phantoms")  # settings that nobody chooses: they say what --data led to
FLAGS = [name for name, field in SETTINGS.items() if field.metadata["group"]]
BY_SET = [name for name in SETTINGS if name not in FLAGS and name not in FOUND]


def flag(name):
    """A setting as the user gives it: --batch-size, or --set ema."""
    return f"--set {name}" if name in BY_SET else f"--{name.replace('_', '-')}"


# ---------------------------------------- the command line


def parse(argv, description=None):
    """The command line of train.py -> argparse.Namespace. What was not given is None."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("train.py", description=description, formatter_class=formatter)
    titles = (LEARN, IMAGES, TRAINING, SAMPLING, MACHINE, RUN)
    add = {title: p.add_argument_group(title).add_argument for title in titles}
    path = dict(type=path_of, metavar="DIR")
    add[IMAGES]("--data", **path, help="yours, or COVID-QU-Ex; default ./COVID-QU-Ex or phantoms")
    for name in FLAGS:
        add[SETTINGS[name].metadata["group"]](flag(name), **argument(SETTINGS[name]))
    add[SAMPLING]("--test", action="store_true", help="evaluate the Test split too, at the end")
    add[MACHINE]("--device", help="cuda, mps or cpu; default: the best there is")
    add[RUN]("--out", **path, help="run folder; default runs/<what it learns>-<seed>")
    add[RUN]("--resume", type=path_of, metavar="RUN", help="go on with a run, or evaluate it anew")
    add[RUN]("--dry-run", action="store_true", help="print settings, sizes and time, and stop")
    names = f"one of {', '.join(BY_SET)}"
    add[RUN]("--set", nargs="+", action="extend", metavar="NAME=VALUE", help=names)
    return p.parse_args(argv)


def argument(field):
    """What argparse is told about a setting: type, choices, and its words, section and defaults."""
    facts, kind, default = field.metadata, field.type, field.default
    if kind is tuple:
        default = ", ".join(default)
    cases = {k: ", ".join(v) or "none" if kind is tuple else v for k, v in facts["cases"].items()}
    defaults = [f"{case}: {value}" for case, value in cases.items() if value not in (None, default)]
    notes = [facts["section"], f"default {default}" if default else "", *defaults]
    text = f"{facts['words']} ({'; '.join(filter(None, notes))})".replace(" ()", "")
    if "choices" in facts["rules"]:
        return dict(choices=facts["rules"]["choices"], help=text)
    if kind is tuple:
        return dict(nargs="+", metavar="CLASS", help=text)
    reader = count_or_auto if field.name == "micro_batch" else kind
    return dict(type=reader, metavar="N" if kind is int else "X", help=text)


def count_or_auto(word):
    """--micro-batch: a number, or auto, which is 0."""
    if word != "auto" and not word.isdigit():
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {word}")
    return 0 if word == "auto" else int(word)


def settings_given(args):
    """{name: value} of the settings that the command line gives, as flags or by --set."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if "classes" in given:
        given["classes"] = tuple(given["classes"])
    for text in args.set or ():
        name, equals, value = text.partition("=")
        refuse(name in FLAGS, f"--set {name} has a flag of its own: {flag(name)} {value}")
        rule = f"--set takes NAME=VALUE with a name of {', '.join(BY_SET)}"
        close = "".join(difflib.get_close_matches(name, BY_SET, 1))
        hint = f"; did you mean {close}=VALUE?" if close else ""
        refuse(not equals or name not in BY_SET, f"{rule}; got {text}{hint}")
        given[name] = converted(name, value)
    return given


def converted(name, text):
    """The text of --set as a value of the setting's type; a tuple is written 1,2,3."""
    kind = SETTINGS[name].type
    try:
        return tuple(int(word) for word in text.split(",")) if kind is tuple else kind(text)
    except ValueError as e:
        wanted = {int: "a whole number", float: "a number", tuple: "whole numbers, as in 1,2,3"}
        raise UserError(f"--set {name} must be {wanted[kind]}, got {text}") from e


# ---------------------------------------- defaults and refusals


def configure(args, device):
    """The defaults of task, model, size and recipe, then what the command line gives -> Config.

    UserError names the flag and the value of what cannot be.
    """
    given = settings_given(args)
    refuse_contradictions(given)
    words = words_of(given, device)
    settings = {name: default_of(name, words) for name in SETTINGS} | given
    if "epochs" in given:
        settings["steps"] = 0
    cfg = Config(**settings)
    check(cfg)
    return cfg


def words_of(given, device):
    """What the cases of the settings speak of: the task, masks, published, no GPU, ..."""
    words = {given["task"], "your", "own"} if given["task"] == "masks" else {given["task"]}
    if device.type != "cuda":
        words |= {"no", "GPU"}
    if devices.bf16_is_fast(device):
        words |= {"fast", "bf16"}
    if given["task"] != "synthesis":
        words.add("masks")
    if conditions.masks_of(given.get("given", "")):
        words.add("given")
    if given.get("model") in baselines.U_NETS:
        words.add("published")
    for name in ("size", "recipe", "objective", "schedule", "sampler"):
        words.add(given.get(name) or default_of(name, words))
    return words


def default_of(name, words):
    """The default of a setting in a run that has these words."""
    default = SETTINGS[name].default
    for case, value in SETTINGS[name].metadata["cases"].items():
        if set(case.split()) <= words:
            default = value
    return default


def refuse_contradictions(given):
    """Refuse what says the same thing twice, and what this task or model has no use for."""
    refuse("task" not in given, f"--task is needed: one of {', '.join(TASKS)}")
    model, cond, steps = (given.get(name) for name in ("model", "cond", "steps"))
    if given["task"] == "synthesis":
        rule = "--cond is about masks; --task synthesis has none without --given lung or infection"
        masks = conditions.masks_of(given.get("given", ""))
        refuse(cond and not masks, f"{rule}, got --cond {cond}")
        rule = f"--model {model} finds masks; --task synthesis needs --model diffusion"
        refuse(model not in (None, "diffusion"), rule)
    refuse_foreign(given, model)
    twice = "--steps and --epochs say the same thing twice; give one"
    refuse(steps is not None and "epochs" in given, twice)
    refuse(steps is not None and steps < 1, f"--steps must be at least 1, got {steps}")


def refuse_foreign(given, model):
    """Refuse settings of diffusion for a supervised model, of the report's network for another."""
    for name, value in given.items():
        about = SETTINGS[name].metadata["about"]
        if about == "diffusion" and model not in (None, "diffusion"):
            rule = f"{flag(name)} is about diffusion; --model {model} answers in one pass"
            raise UserError(f"{rule}, got {value}")
        if about == "network" and model in baselines.U_NETS:
            rule = f"{flag(name)} is about the report's network; --model {model} is another"
            raise UserError(f"{rule}, got {value}")


def broken_rule(value, choices=None, least=None, most=None):
    """The rule of a setting that its value breaks, in words; None if it keeps all of them."""
    if choices is not None and value not in choices:
        return f"must be one of {', '.join(choices)}"
    if least is not None and not least <= value <= most:
        return f"must be between {least} and {most}"
    return None


def check(cfg):
    """Refuse settings out of range, and those that contradict one another, by the flag's name."""
    for name, field in SETTINGS.items():
        value = getattr(cfg, name)
        if value is not None and (rule := broken_rule(value, **field.metadata["rules"])):
            raise UserError(f"{flag(name)} {rule}, got {value}")

    levels = cfg.channel_mult + cfg.attention_levels
    wrong = len(levels) > 32 or any(type(n) is not int or not 0 <= n <= 64 for n in levels)
    rule = "--set channel_mult and attention_levels are at most 32 numbers from 0 to 64"
    refuse(wrong, f"{rule}, got {', '.join(map(str, levels))}")
    synthesis, cond, sampler = cfg.task == "synthesis", cfg.cond, cfg.sampler
    rule = "--ensemble averages masks; --task synthesis has none"
    refuse(synthesis and cfg.ensemble > 1, f"{rule}, got {cfg.ensemble}")
    for name in ("given", "draw"):
        rule, value = f"{flag(name)} is about --task synthesis", getattr(cfg, name)
        refuse(not synthesis and value != SETTINGS[name].default, f"{rule}, got {value}")
    rule = f"{flag('draw')}={cfg.draw} cannot be --given too"
    refuse(cfg.draw in conditions.kinds_of(cfg.given), f"{rule}, got {cfg.given}")
    rule = "--guidance needs a run that is --given something"
    refuse(cfg.guidance and not cfg.given, f"{rule}, got {cfg.guidance}")
    rule = "--set augment moves X-ray and mask; --task synthesis would learn to draw the moves"
    refuse(synthesis and cfg.augment, f"{rule}, got {cfg.augment}")
    rule = f"--set rrdbs and rrdb are about the embedder, and --cond {cond} has none"
    has_rrdbs = (cfg.rrdbs, cfg.rrdb) != (1, "report")
    refuse(cond in (None, "none") and has_rrdbs, f"{rule}, got {cfg.rrdbs} and {cfg.rrdb}")
    rule = "--set stem=add is about --cond concat"
    refuse(cfg.stem == "add" and cond != "concat", f"{rule}, got --cond {cond}")
    if cfg.model in baselines.U_NETS:
        shrinks = baselines.U_NETS[cfg.model].shrinks
        rule = f"--image-size must be divisible by {shrinks} for --model {cfg.model}"
        refuse(cfg.image_size % shrinks, f"{rule}, got {cfg.image_size}")
    least, passes = LEAST_PASSES.get(sampler, 1), cfg.ddim_steps
    rule = f"--ddim-steps must be between {least} and T = {cfg.T} for --sampler {sampler}"
    refuse(not least <= passes <= cfg.T, f"{rule}, got {passes}")
    rule = f"--set eta is about --sampler ddim, got {cfg.eta} for --sampler {sampler}"
    refuse(cfg.eta and sampler != "ddim", rule)
    steps_alone = sampler in ("ddim", "ddpm", "strided")
    got = f"got --objective {cfg.objective}, --sampler {sampler}"
    rule = "--set schedule=cosine has steps 1..T; §2.1 here reads its times off the linear schedule"
    of_21 = cfg.objective != "eps" or not steps_alone
    refuse(cfg.schedule == "cosine" and of_21, f"{rule}, {got}")
    rule = "--set variance=learned needs --objective eps, and T of at least 2"
    no_vlb = cfg.objective != "eps" or cfg.T < 2
    refuse(cfg.variance == "learned" and no_vlb, f"{rule}, got {cfg.objective} and {cfg.T}")
    for name in NOT_OF[cfg.task]:
        rule, value = f"{flag(name)} must not be given for --task {cfg.task}", getattr(cfg, name)
        refuse(value, f"{rule}, got {', '.join(value) if name == 'classes' else value}")
    found, unknown = ", ".join(cfg.classes), set(cfg.classes) - set(CLASSES)
    rule = f"--classes must be some of {', '.join(CLASSES)}"
    refuse(unknown or not cfg.classes and cfg.task != "masks", f"{rule}, got {found}")
    rule = "--classes needs COVID-19 for --task infection: the masks of the others are blank"
    refuse(cfg.task == "infection" and "COVID-19" not in cfg.classes, f"{rule}, got {found}")


def from_dict(settings):
    """The Config of a checkpoint, also of one from when there were noises, or a preset for both."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    settings.pop("noises", None)
    if "preset" in settings:
        preset, settings["max_grad_norm"] = settings.pop("preset"), settings.pop("clip")
        settings["size"] = "small" if preset == "small" else "report"
        settings["recipe"] = "report" if preset == "report" else "best"
    return Config(**settings)


# ---------------------------------------- what a configuration is called


def kind_of(cfg, noun=""):
    """What a run is, in words: "lung, concat", "lung, unet"; with a noun "lung masks, concat"."""
    model, noun = cfg.model if cfg.supervised else None, noun if cfg.task != "masks" else ""
    drawn = f" of {cfg.draw} masks" if cfg.draw != "X-rays" else ""
    drawn += f" given {cfg.given.replace('+', ' and ')}" if cfg.given else ""
    return ", ".join(filter(None, (cfg.task + noun + drawn, model, cfg.cond)))


def name_of(cfg):
    """A run's folder below runs/: lung-concat-0, lung-unet-0, synthesis-vp-Normal-0."""
    model = cfg.model if cfg.supervised else None
    objective = None if cfg.objective == "eps" else cfg.objective
    classes = () if cfg.classes == DEFAULT_CLASSES[cfg.task] else cfg.classes
    drawn = cfg.draw if cfg.draw != "X-rays" else None
    kind = cfg.task, drawn, cfg.given.replace("+", "-"), model, cfg.cond, objective
    return "-".join(filter(None, (*kind, *classes, str(cfg.seed))))
