"""What the benchmark counts and calls; how fast this machine is, is no test."""

import json
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import batches
import benchmark
import config
import evaluate
import networks
import peers
import phantoms
import runs
import synthesis
import train
import unet
from benchmark import AS_IT_IS, PLAIN_FORMULA
from console import UserError
from testing import CPU, ROOT, shake, tiny

WORDS = "--size small --recipe best --channels 4 --batch-size 2 --rounds 1 --ddim-steps 1"
COMMAND = f"{WORDS} --precision fp32 --device cpu".split()

# ---------------------------------------- what is counted


@pytest.mark.parametrize(
    "in_channels, macs", [(1, 85_688_549_376), (16, 85_794_717_696), (17, 85_801_795_584)]
)
def test_sec32_the_reports_network_takes_the_published_number_of_multiply_accumulates(
    in_channels, macs
):
    """Counted on the meta device, one image of 64x64."""
    with torch.device("meta"):
        net, xt = unet.UNet(in_channels), torch.empty(1, in_channels, 64, 64)
        assert networks.flops_of(net, xt, torch.ones(1, dtype=torch.long)) == 2 * macs


def test_the_count_does_not_depend_on_the_device_and_grows_with_the_batch():
    """On the CPU, where torch hides the fused attention, as on meta."""

    def count(device, n):
        with torch.device(device):
            net, xt = networks.build_model(tiny()).unet, torch.zeros(n, 17, 16, 16)
            return networks.flops_of(net, xt, torch.ones(n, dtype=torch.long))

    assert count("cpu", 1) == count("meta", 1) and count("cpu", 3) == 3 * count("cpu", 1)


def test_counting_leaves_the_network_as_it_was():
    """The formula is counted on a copy: no hook, no other attention stays behind."""
    net = networks.build_model(tiny()).unet
    before = [module.__dict__.copy() for module in net.modules()]
    networks.flops_of(net, torch.zeros(1, 17, 16, 16), torch.ones(1, dtype=torch.long))
    assert before == [module.__dict__ for module in net.modules()]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_takes_two_products_and_its_projections(device):
    """N positions of C channels that look at M: 2 (2 N M C), whatever the width of a head.

    LinearAttention: M = N, and C -> 3 C -> C. CrossAttention: M tokens of 32 channels; queries and
    keys also take 24 numbers that say where they are.
    """
    C, N, M = 64, 4 * 4, 2 * 2
    with torch.device(device):
        x, context = torch.zeros(1, C, 4, 4), torch.zeros(1, 32, 2, 2)
        itself = networks.flops_of(unet.LinearAttention(C, 16), x)
        cross = networks.flops_of(unet.CrossAttention(C, 32, 16), x, context)
    assert itself == 4 * N * N * C + 2 * (3 * C * C + C * C) * N
    projections = (C + 24) * C * N + (32 + 24) * C * M + 32 * C * M + C * C * N
    assert cross == 4 * N * M * C + 2 * projections


def test_jobs_take_turns_and_the_median_counts(monkeypatch):
    """Rounds of a, b and b, a; the warm-up does not count, nor does one slow round."""
    calls, now = [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def job(name, *seconds):
        durations = iter(seconds)

        def run():
            calls.append(name)
            now[0] += next(durations)

        return run

    jobs = {"a": job("a", 90, 1, 2, 70), "b": job("b", 80, 5, 6, 4)}
    seconds = benchmark.interleaved(jobs, CPU, rounds=3)
    assert seconds == {"a": 2, "b": 5} and calls == ["b", "a", "a", "b"] * 2


def test_one_job_is_alive_at_a_time(monkeypatch):
    """timed: every turn makes a job anew and calls it twice; the second call counts.

    Then the job is gone, before another is made.
    """
    alive, calls, now = [], [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    class Job:
        def __init__(self, name, *seconds):
            assert not [other for other in alive if other() is not None]
            alive.append(weakref.ref(self))
            self.name, self.seconds = name, iter(seconds)

        def __call__(self):
            calls.append(self.name)
            now[0] += next(self.seconds)

    makers = {"a": (Job, "a", 90, 2), "b": (Job, "b", 80, 5)}
    assert benchmark.timed(makers, CPU, 3) == {"a": 2, "b": 5}
    assert "".join(calls) == "aabb" + "bbaa" + "aabb"


def test_a_job_that_runs_out_of_memory_is_left_out_and_said(capsys):
    """When it is made and when it is called, the first time or later; the others are measured."""
    calls = []

    def out_of_memory():
        raise torch.OutOfMemoryError("planted")

    def make(name):
        return out_of_memory if name == "no call fits" else partial(second_call, name)

    def second_call(name):
        calls.append(name)
        if name == "the fourth does not" and calls.count(name) == 4:
            raise UserError("out of memory with 1 images at once; try a smaller --micro-batch")

    names = ("fits", "no call fits", "the fourth does not")
    makers = {name: (make, name) for name in names} | {"cannot be made": (out_of_memory,)}
    assert list(benchmark.timed(makers, CPU, 3)) == ["fits"]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(f"{name}: out of memory, left out" for name in list(makers)[1:])


def test_rates_are_work_over_time(monkeypatch):
    """With every job at 2 s: two operations a multiply-accumulate, bytes read and written."""

    def two_seconds(jobs, *_, **__):
        product, image, copied = (job() for job in jobs.values())
        assert product.shape == (2048, 2048) and image.shape == (16, 64, 64, 64)
        assert copied.nbytes == 2**26
        return dict.fromkeys(jobs, 2.0)

    monkeypatch.setattr(benchmark, "interleaved", two_seconds)
    rates = benchmark.machine_rates(CPU, torch.float32)
    convolution = 9 * 64 * 64 * 16 * 64 * 64
    assert rates == {"matrix product": 2048**3, "convolution": convolution, "copy": 2**26}


def test_the_parts_of_a_step_make_up_the_step(monkeypatch):
    """By a clock that gives each job a time of its own. The jobs are run, too."""
    done = []

    def interleaved(jobs, device, rounds):
        done.extend([jobs["step"](), jobs["forward"](), jobs["batch"](), jobs["gradient"]()])
        return {"step": 10, "batch": 1, "forward": 2, "gradient": 7}

    monkeypatch.setattr(benchmark, "interleaved", interleaved)
    shares = benchmark.shares_of_a_step(tiny(), CPU, 3)
    assert list(shares.values()) == [0.1, 0.2, 0.5, 0.2]
    loss, _, batch, again = done
    assert len(batch.x0) == tiny().batch_size and loss > 0 and again > 0


def test_peak_memory_is_that_of_the_work_alone():
    """A process that holds 200 MB more reports 200 MB more."""
    held = torch.ones(100_000_000)  # of the parent, and not the child's
    small = benchmark.peak_memory(torch.ones, 10)
    large = benchmark.peak_memory(torch.ones, 50_000_000)
    assert large - small == pytest.approx(200e6, rel=0.1) and small < held.nbytes + 100e6


def test_the_exponent_of_a_power_law_is_its_power():
    """t = 3 n^2."""
    assert benchmark.exponent({n: 3 * n**2 for n in (1, 2, 4, 8)}) == pytest.approx(2)


# ---------------------------------------- what is called


def test_the_training_job_is_the_step_of_train_py(monkeypatch):
    """Each call moves one Trainer by one step."""
    steps = []

    def train_step(self, images, masks):
        steps.append((self.cfg, images.shape, masks.shape))

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    job = benchmark.training_job(tiny(), CPU)
    job(), job()
    assert steps == [(tiny(), (8, 1, 16, 16), (8, 1, 16, 16))] * 2


def test_the_sampling_job_is_the_sampler_of_an_evaluation(monkeypatch):
    """sample_masks with the passes asked for, on as many X-rays as asked for."""
    masks = []

    def sample_masks(model, cfg, y, index, *_):
        masks.append((cfg.ddim_steps, y.shape, len(index)))

    monkeypatch.setattr(evaluate, "sample_masks", sample_masks)
    benchmark.sampling_job(tiny(ddim_steps=7), CPU, 3)()
    assert masks == [(7, (3, 1, 16, 16), 3)]


def test_an_epoch_is_a_step_for_every_batch(monkeypatch):
    """After the one that warms up."""
    steps = []

    def train_step(self, images, masks):
        steps.append(len(images))

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    assert benchmark.epoch_seconds(tiny(), CPU, 12) >= 0 and steps == [12] * 4


def test_the_images_of_an_epoch_are_shuffled_once():
    """Cost linear in images: one permutation an epoch, not one a step."""
    batches.order_of.cache_clear()
    rows = torch.cat([batches.batch_indices(tiny(), 40, step) for step in range(1, 11)])
    assert sorted(rows.tolist()) == list(range(40))
    assert batches.order_of.cache_info().misses == 1


def test_decoding_and_start_up_work_on_phantoms_of_their_own(tmp_path):
    """They read what they drew; the run that start_up times has taken its step."""
    assert benchmark.seconds_to_decode(tmp_path, 4) > 0
    assert benchmark.seconds_from_cache(tmp_path) > 0
    assert benchmark.start_up(tmp_path, tiny(), CPU) > 0
    _, cfg, step = runs.load_run(tmp_path / "run")
    assert step == 1 and (cfg.size, cfg.recipe, cfg.channels) == ("small", "best", 4)


def test_files_of_phantoms_repeat_beyond_those_drawn(monkeypatch, tmp_path):
    """122 X-rays of 120 drawn: as many masks, and all are read."""
    draw = phantoms.write_phantoms

    def draw_small(root, tree, counts):
        assert sum(counts["Train"].values()) == 120
        draw(root, tree, counts, size=16)

    monkeypatch.setattr(phantoms, "write_phantoms", draw_small)
    assert benchmark.seconds_to_decode(tmp_path, 122) > 0
    split = benchmark.load_pairs(tmp_path)
    assert len(split.images) == len(split.masks) == len(set(split.names)) == 122
    again = [split.images[split.names.index(f"Normal/again ({i}).png")] for i in (120, 121)]
    assert (again[0] != again[1]).any()


# ---------------------------------------- --gains: each switch changes what it says, that alone

FUSED = {F.scaled_dot_product_attention}
LAST = torch.channels_last


def facts_of(model, cfg):
    """What the choices decide about a network, and whether anything else was set."""
    layers = list(model.modules())
    blocks = [layer for layer in layers if isinstance(layer, unet.Block)]
    norms = [layer for layer in layers if isinstance(layer, unet.GroupNorm)]
    attention = [layer for layer in layers if isinstance(layer, unet.LinearAttention)]
    images = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert min(map(len, (blocks, norms, attention, images))) > 2
    return {
        "precision": cfg.precision,
        "same settings": cfg == tiny(precision=cfg.precision, plan=cfg.plan),
        "attention": {layer.attend for layer in attention},
        "GroupNorm": {layer.contiguous_below for layer in norms},
        "recomputed": {block.recompute for block in blocks},
        "channels last": {p.is_contiguous(memory_format=LAST) for p in images},
    }


def facts_of_trainer(trainer):
    """facts_of, and what the choices decide about a Trainer."""
    model, optimizer = trainer.model, trainer.optimizer
    defaults = optimizer.defaults.copy()
    learned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return facts_of(model, trainer.cfg) | {
        "fused": bool(defaults.pop("fused")),
        "AdamW": (type(optimizer), defaults, learned == {id(p) for p in model.parameters()}),
        "compiled": trainer.parallel is not model,
        "micro-batch": trainer.micro_batch,
        "average last": facts_of(trainer.ema, trainer.cfg)["channels last"],
    }


def differences(facts, others):
    """{name: what `others` has} where that is not what `facts` has."""
    assert facts.keys() == others.keys()
    return {name: others[name] for name in facts if others[name] != facts[name]}


def trainers_of(jobs):
    """{choice: the Trainer whose step is timed}, of steps_without."""
    return {choice: make(*args).func.__self__ for choice, (make, *args) in jobs.items()}


def test_each_trainer_of_the_gains_does_without_one_choice():
    """It has the weights of the seed, its own; all else is as in the trainer as it is."""
    trainers = trainers_of(benchmark.steps_without(tiny(precision="bf16"), CPU))
    as_it_is = trainers.pop(AS_IT_IS)
    facts = facts_of_trainer(as_it_is)
    assert facts["same settings"] and facts["fused"] and facts["AdamW"][2]
    assert facts["attention"] == {unet.fast_attend} and facts["GroupNorm"] == {1024}
    changed = {c: differences(facts, facts_of_trainer(t)) for c, t in trainers.items()}
    assert changed == {
        "fused AdamW": {"fused": False},
        PLAIN_FORMULA: {"attention": FUSED},
        "contiguous images": {"channels last": {True}, "average last": {True}},
        "no recomputation": {"recomputed": {True}},
        "bf16": {"precision": "fp32"},
    }
    weights = list(as_it_is.model.parameters())
    for trainer in trainers.values():
        for p, q in zip(weights, trainer.model.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()


def test_on_a_gpu_one_trainer_more_is_compiled(monkeypatch):
    """torch.compile around its own network, which it trains; no other trainer is compiled."""
    monkeypatch.setattr(benchmark, "trainer_of", lambda cfg, device: train.Trainer(cfg, CPU))
    jobs = benchmark.steps_without(tiny(), torch.device("cuda"))
    trainers = trainers_of(
        {choice: (make, c, cfg, CPU) for choice, (make, c, cfg, _) in jobs.items()}
    )
    compiled = {choice: t for choice, t in trainers.items() if t.parallel is not t.model}
    assert list(compiled) == ["eager mode, not torch.compile"]
    (trainer,) = compiled.values()
    assert trainer.parallel._orig_mod is trainer.model
    as_it_is = facts_of_trainer(trainers[AS_IT_IS])
    assert differences(as_it_is, facts_of_trainer(trainer)) == {"compiled": True}
    assert "bf16" not in jobs  # nothing to do without in float32


def test_a_step_without_a_choice_computes_the_same():
    """float32: the same losses and weights after three steps, up to rounding."""
    trainers = list(trainers_of(benchmark.steps_without(tiny(), CPU)).values())
    images, masks = batches.on_device(tiny(), batches.noise_split(tiny(), 8), CPU)
    losses = []
    for trainer in trainers:
        shake(trainer.model)
        losses.append([float(trainer.train_step(images, masks)) for _ in range(3)])
    assert len(trainers) == 5
    for trainer, loss in zip(trainers, losses):
        assert loss == pytest.approx(losses[0], rel=1e-5) and len(set(loss)) == 3
        for p, q in zip(trainers[0].model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)


def test_a_switched_step_is_timed_as_switched(monkeypatch):
    """What runs in each job: the plain formula of attention, and how often a block is computed."""
    jobs = benchmark.steps_without(tiny(), CPU)
    none = {"plain formula": 0, "block": 0}
    formula, counts = unet.attend, none.copy()

    def counted(*qkv):
        counts["plain formula"] += 1
        return formula(*qkv)

    def block_computed(*_):
        counts["block"] += 1

    monkeypatch.setattr(unet, "attend", counted)
    found = {}
    for choice, (make, *args) in jobs.items():
        job = make(*args)
        counts.update(none)
        first_layer = job.func.__self__.model.unet.encoder[0][0]
        first_layer.register_forward_pre_hook(block_computed)
        job()
        found[choice] = (counts["plain formula"] > 0, counts["block"])
    assert found == dict.fromkeys(found, (True, 1)) | {
        PLAIN_FORMULA: (False, 1),
        "no recomputation": (True, 2),
    }


def embedded_every_pass(model):
    return isinstance(model, benchmark.EmbedsEveryPass)


def test_each_sampling_job_of_the_gains_does_without_one_choice():
    """All models are laid out for sampling but the one that measures it: channels last."""
    jobs = benchmark.samples_without(tiny(precision="bf16"), CPU)
    assert all(
        (make, device, n) == (benchmark.sampling_job, CPU, 4)
        for make, _, device, n, _ in jobs.values()
    )
    found, weights = {}, []
    for choice, (_, cfg, _, _, model) in jobs.items():
        network = model.model if embedded_every_pass(model) else model
        found[choice] = facts_of(network, cfg) | {"every pass": embedded_every_pass(model)}
        weights.append(list(network.parameters()))
        assert not any(p.requires_grad for p in weights[-1]) and not network.training
    facts = found.pop(AS_IT_IS)
    assert facts["same settings"] and facts["channels last"] == {True}
    assert facts["attention"] == {unet.fast_attend} and facts["GroupNorm"] == {1024}
    assert {choice: differences(facts, others) for choice, others in found.items()} == {
        "channels last on a CPU": {"channels last": {False}},
        "GroupNorm of small images laid out anew": {"GroupNorm": {0}},
        PLAIN_FORMULA: {"attention": FUSED},
        "X-ray embedded once a mask": {"every pass": True},
        "bf16": {"precision": "fp32"},
    }
    for others in weights:
        assert all(torch.equal(p, q) for p, q in zip(weights[0], others, strict=True))


def test_masks_sampled_without_a_choice_are_the_same():
    """float32, weights moved away from the zero initialisation: the same masks, up to rounding."""
    jobs, masks = benchmark.samples_without(tiny(ddim_steps=3), CPU), []
    y = torch.linspace(-1, 1, 2 * 16 * 16).view(2, 1, 16, 16)
    for _, cfg, _, _, model in jobs.values():
        shake(model.model if embedded_every_pass(model) else model)
        masks.append(evaluate.sample_masks(model, cfg, y, [0, 1]))
    assert len(masks) == 5 and masks[0].std() > 0.1
    for mask in masks:
        torch.testing.assert_close(mask, masks[0], rtol=1e-3, atol=1e-4)


def test_the_layout_of_small_images_is_changed_by_groupnorm_and_only_where_it_is_switched_on():
    """What torch's own GroupNorm is given: small images in the plain layout, or as they come."""
    x, seen = torch.randn(1, 8, 16, 16).to(memory_format=LAST), []
    jobs = benchmark.samples_without(tiny(), CPU)
    for choice in (AS_IT_IS, "GroupNorm of small images laid out anew"):
        norm = next(m for m in jobs[choice][-1].modules() if isinstance(m, unet.GroupNorm))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.GroupNorm, "forward", lambda self, x: seen.append(x.is_contiguous()))
            norm(x)
    assert seen == [True, False]


def test_the_x_ray_is_embedded_at_every_pass_where_that_is_what_is_timed():
    """EmbedsEveryPass gives the same masks by one embedding more a pass."""
    cfg, embedded = tiny(ddim_steps=3), []
    model = networks.build_model(cfg)
    model.embedder.register_forward_hook(lambda *_: embedded.append(1))
    y = torch.zeros(2, 1, 16, 16)
    once = evaluate.sample_masks(model, cfg, y, [0, 1])
    assert len(embedded) == 1
    every_pass = evaluate.sample_masks(benchmark.EmbedsEveryPass(model), cfg, y, [0, 1])
    torch.testing.assert_close(every_pass, once)
    assert len(embedded) == 1 + 3


def test_gains_are_the_time_without_a_choice_over_the_time_with_it(monkeypatch):
    """The choices are those of the published table, but for the one that is no choice any more."""

    def seconds(jobs, *_):
        return {name: 2.0 + i for i, name in enumerate(jobs)}

    monkeypatch.setattr(benchmark, "timed", seconds)
    ratios = benchmark.gains(tiny(precision="bf16"), CPU, 1)
    assert ratios["training: fused AdamW"] == 3 / 2
    assert ratios["sampling: GroupNorm of small images laid out anew"] == 4 / 2
    file = ROOT / "results" / "speed" / "cpu-32-channels.json"
    published = json.loads(file.read_text(encoding="utf-8"))["gains"]
    published.pop("training: OpenMP threads spin a moment before they sleep")
    assert list(ratios) == list(published)


# ---------------------------------------- --models, --scaling, --peers


def test_what_a_mask_costs_is_counted_pass_by_pass_and_timed_for_each_model(monkeypatch):
    """One pass of diffusion is the report's network, a further pass its U-Net alone.

    All are called on 4 X-rays, nine masks as nine.
    """
    drawn = []

    def sample_masks(model, cfg, y, index, members, device):
        drawn.append((cfg.model, len(y), cfg.ddim_steps, members))

    def training_job(cfg, device):
        return lambda: drawn.append(cfg.model)

    def two_seconds(makers, *_):
        return {name: make(*args)() or 2.0 for name, (make, *args) in makers.items()}

    monkeypatch.setattr(evaluate, "sample_masks", sample_masks)
    monkeypatch.setattr(benchmark, "training_job", training_job)
    monkeypatch.setattr(benchmark, "timed", two_seconds)
    cfg = tiny(ddim_steps=3, image_size=32)
    rows = {row["model"]: row for row in benchmark.models(cfg, CPU, 1)}
    assert drawn[:4] == ["unet", "res50attunet", "report-unet", "diffusion"]
    default = config.configure(config.parse("--task lung --size small".split()), CPU).ddim_steps
    assert set(drawn[4:]) == {
        ("unet", 4, default, 1),
        ("res50attunet", 4, default, 1),
        ("report-unet", 4, 3, 1),
        *(("diffusion", 4, passes, 1) for passes in (1, 3, 5, 50)),
        ("diffusion", 4, 3, 9),
    }
    flop = {name: row["flop"] for name, row in rows.items()}
    names = ("1 x DDIM-1", "1 x DDIM-5", "1 x DDIM-50", "9 x DDIM-3")
    one, five, fifty, nine = (flop[f"diffusion, {name}"] for name in names)
    net = networks.build_model(cfg).unet
    t = torch.ones(1, dtype=torch.long)
    a_pass = networks.flops_of(net, torch.zeros(1, 17, 32, 32), t)
    assert one == flop["report-unet"] > a_pass
    assert (five - one, fifty - one, nine - one) == (4 * a_pass, 49 * a_pass, 26 * a_pass)
    with torch.device("meta"):
        u_net, y = baselines.UNet2015(32), torch.empty(1, 1, 32, 32)
        assert flop["unet"] == networks.flops_of(u_net, y)
    assert rows["unet"]["parameters"] == 7_765_409
    assert rows["unet"]["mask"] == rows["unet"]["training"] == 0.5
    table = benchmark.tables(result(models=list(rows.values())))
    assert f"| unet | 7,765,409 | 500.0 | {flop['unet'] / 1e9:.2f} | 500.0 |" in table


def result(**parts):
    """What main writes, with these parts, as JSON gives it back."""
    facts = dict(hardware="h", torch="t", commit="c", python="3")
    whole = facts | dict(config=vars(tiny()), measured={}) | parts
    return json.loads(json.dumps(whole))


def test_scaling_measures_time_and_memory_and_its_table_has_their_exponents(monkeypatch, tmp_path):
    """Seconds that grow with the square and bytes that grow linearly, of the value varied."""

    def squares(jobs, *_):
        return {value: value**2 / 1e3 for value in jobs}

    def product(function, make, cfg, device):
        return cfg.batch_size * cfg.image_size * cfg.channels * 1e9

    monkeypatch.setattr(benchmark, "timed", squares)
    monkeypatch.setattr(benchmark, "training_job", lambda cfg, device: lambda: None)
    monkeypatch.setattr(benchmark, "peak_memory", product)
    monkeypatch.setattr(benchmark, "seconds_to_decode", lambda folder, n: n / 100)
    monkeypatch.setattr(benchmark, "epoch_seconds", lambda cfg, device, n: n / 50)
    rows = benchmark.scaling_of_a_step(tiny(batch_size=4), CPU, 1)
    rows |= benchmark.scaling_with_images(tiny(), CPU, tmp_path)
    assert rows["batch_size"][2] == [0.004, 2 * 16 * 4 * 1e9]
    assert rows["channels"][16] == [0.256, 4 * 16 * 16 * 1e9]
    table = benchmark.tables(result(scaling=rows)).splitlines()
    seconds, peaks = "8: 0.064, 16: 0.256, 32: 1.02", "8: 128.00, 16: 256.00, 32: 512.00"
    assert f"| image_size | {seconds} | 2.00 | {peaks} | 1.00 |" in table
    assert "| images decoded | 320: 3.2, 3200: 32 | 1.00 |  |  |" in table
    epoch = "images in an epoch (8 channels, 32x32)"
    assert f"| {epoch} | 320: 6.4, 3200: 64 | 1.00 |  |  |" in table


def test_a_batch_of_one_image_is_not_halved(monkeypatch):
    """No batch of 0 images."""
    monkeypatch.setattr(benchmark, "timed", lambda steps, *_: dict.fromkeys(steps, 1.0))
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 1)
    assert list(benchmark.scaling_of_a_step(tiny(batch_size=1), CPU, 1)["batch_size"]) == [1, 2]


def test_a_peer_that_does_not_fit_is_left_out_and_said(capsys):
    """Out of memory is an answer; another error is an error."""

    def failing(words):
        def job():
            raise RuntimeError(words)

        return job

    assert benchmark.fits("a", lambda: None)
    assert not benchmark.fits("b", failing("CUDA out of memory"))
    assert capsys.readouterr().err == "b: out of memory, left out\n"
    with pytest.raises(RuntimeError, match="sizes differ"):
        benchmark.fits("c", failing("sizes differ"))


class OneConvolution(nn.Module):
    """Stands for a peer's network, wherever none is installed."""

    def __init__(self, name, cfg):
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, xt, t, y=None):
        return self.net(xt)

    def embed(self, y):
        return None

    def denoise(self, xt, t, e):
        return self(xt, t)


def test_a_peer_learns_a_batch_that_fits_in_parts_as_the_whole_one(monkeypatch, capsys):
    """The batch is halved until it fits; then the parts' gradients add up to the whole batch's."""
    eps, sizes, gradients = torch.randn(4, 1, 16, 16), [], []

    def same_weights(name, cfg):
        torch.manual_seed(0)
        return OneConvolution(name, cfg)

    def l_simple(s, model, x0):
        if len(x0) > most:
            raise torch.OutOfMemoryError("planted")
        start = 4 - len(x0) if sizes and sizes[-1] + len(x0) == 4 else 0
        sizes.append(len(x0))
        return (model(x0, None) - eps[start : start + len(x0)]).square().mean()

    def keep_gradient(optimizer):
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(peers, "Peer", same_weights)
    monkeypatch.setattr(benchmark.diffusion, "l_simple", l_simple)
    monkeypatch.setattr(torch.optim.AdamW, "step", keep_gradient)
    for most in (4, 2):
        step = benchmark.peer_step_that_fits("monai", tiny(), CPU)
        assert step[-1] == most
    assert capsys.readouterr().err == "monai, 4 images at once: out of memory, left out\n"
    assert sizes == [4, 4, 2, 2, 2, 2]
    whole, _, parts, _ = gradients
    torch.testing.assert_close(parts, whole)
    most = 0
    assert benchmark.peer_step_that_fits("monai", tiny(), CPU) is None


def test_peers_and_we_see_each_image_once_a_step(monkeypatch):
    """Eq. (7), unconditional: whatever the recipe trains with, our step does what theirs does."""
    seen = []

    def job(cfg, *_):
        seen.append(cfg)
        return lambda: None

    monkeypatch.setattr(benchmark, "training_job", job)
    monkeypatch.setattr(benchmark, "sampling_job", job)
    monkeypatch.setattr(peers, "installed", lambda: [])
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 0)
    rows = benchmark.compare(tiny(precision="bf16"), CPU, 1)
    assert [row["network"] for row in rows] == ["here, bf16", "here, fp32"]
    assert [cfg.precision for cfg in seen] == ["bf16", "fp32"] * 2
    facts = {(c.target, c.cond, c.task, c.ddim_steps) for c in seen}
    assert facts == {("eps", None, "synthesis", 10)}


def test_the_comparison_has_a_row_for_each_network_that_fits(monkeypatch):
    """Ours, then the peers: parameters, seconds and memory of each; peers in float32."""
    monkeypatch.setattr(peers, "installed", lambda: ["diffusers", "monai"])
    monkeypatch.setattr(peers, "Peer", OneConvolution)
    monkeypatch.setattr(benchmark, "fits", lambda name, job: job() or name != "monai")
    precisions, memory = [], []
    sample = synthesis.sample_images

    def sample_images(model, cfg, index, device):
        precisions.append((type(model).__name__, cfg.precision, len(index)))
        return sample(model, cfg, index, device)

    def peak_memory(function, make, *args):
        memory.append(make)
        return 1e9

    monkeypatch.setattr(synthesis, "sample_images", sample_images)
    monkeypatch.setattr(benchmark, "peak_memory", peak_memory)
    rows = benchmark.compare(tiny(precision="bf16"), CPU, 1)
    assert [row["network"] for row in rows] == ["here, bf16", "here, fp32", "diffusers"]
    ours = networks.parameters(networks.without_memory(tiny(task="synthesis", cond=None)))
    assert [row["parameters"] for row in rows] == [ours, ours, 10]
    assert all(row["step"] > 0 and row["sampling"] > 0 and row["memory"] == 1e9 for row in rows)
    rows = [("ConditionalUNet", p, 8) for p in ("bf16", "fp32")]
    assert set(precisions) == {*rows, ("OneConvolution", "fp32", 8)}
    assert memory == [benchmark.training_job] * 2 + [benchmark.peer_training_job]


def test_a_peers_step_learns_eq7(monkeypatch):
    """Its loss is l_simple of its network on the images: the step lowers it."""
    monkeypatch.setattr(peers, "Peer", OneConvolution)
    losses, l_simple = [], benchmark.diffusion.l_simple

    def spy(s, model, x0):
        assert x0.shape == (4, 1, 16, 16) and s.T == 1000
        losses.append(l_simple(s, model, x0))
        return losses[-1]

    monkeypatch.setattr(benchmark.diffusion, "l_simple", spy)
    torch.manual_seed(0)
    job = benchmark.peer_training_job("monai", tiny(lr=0.01), CPU, 4)
    for _ in range(200):
        job()
    assert torch.stack(losses[-20:]).mean() < 0.9 * torch.stack(losses[:20]).mean()


# ---------------------------------------- the command


def embedder_flops(cfg):
    """Of one X-ray through the RRDBs: their 3x3 convolutions, each at the size of the image."""
    layers = networks.build_model(cfg).embedder.modules()
    kernels = [layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d)]
    return 2 * sum(kernels) * cfg.image_size**2


def test_what_does_not_fit_has_no_number(known_machine, monkeypatch, tmp_path, capsys):
    """Training does not fit, sampling does: their rows are measured or missing, never nan."""

    def job(cfg, device):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(benchmark, "training_job", job)
    numbers = benchmark.measure(tiny(ddim_steps=1), CPU, 1, tmp_path)
    assert numbers["sampling images/s, DDIM-1"] > 0 and all(x == x for x in numbers.values())
    assert not {"seconds a training step", "training images/s"} & numbers.keys()
    assert capsys.readouterr().err == "step: out of memory, left out\n"


@pytest.fixture
def known_machine(monkeypatch):
    """A machine whose rates, memory and disk are known."""
    rates = {"matrix product": 1e12, "convolution": 5e11, "copy": 1e10}
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 5e8)
    monkeypatch.setattr(benchmark, "machine_rates", lambda *_: rates)
    monkeypatch.setattr(benchmark, "start_up", lambda *_: 4.0)
    monkeypatch.setattr(benchmark, "seconds_to_decode", lambda *_: 0.3)
    monkeypatch.setattr(benchmark, "seconds_from_cache", lambda *_: 0.01)


def test_the_command_prints_its_table_and_writes_its_numbers(known_machine, tmp_path, capsys):
    """All measurements at the smallest size; shares and rates agree with their seconds."""
    file, words = tmp_path / "b.json", "--decode 1000 --ddim-steps 3".split()
    assert benchmark.main([*COMMAND, *words, "--out", str(file)]) == 0
    result = json.loads(file.read_text())
    m = result["measured"]
    assert m["training images/s"] == pytest.approx(2 / m["seconds a training step"])
    a_pass = networks.flops_of_a_pass(tiny(image_size=64))
    embedded = embedder_flops(tiny(image_size=64))
    flops = 3 * 2 * (a_pass + embedded)  # two images
    assert m["training FLOP a step"] == flops
    share = m["training share of matrix product"]
    assert share == pytest.approx(flops / m["seconds a training step"] / 1e12)
    assert m["training share of convolution"] == pytest.approx(2 * share)
    samples = (3 * a_pass + embedded) * m["sampling images/s, DDIM-3"]  # FLOP/s
    assert m["sampling share of matrix product"] == pytest.approx(samples / 1e12)
    assert m["training peak memory, GB"] == 0.5
    assert (m["decoding pairs/s"], m["cache pairs/s"]) == pytest.approx((400, 12000))
    assert result["decode"] == dict(images=1000, decoded=0.3, cached=0.01)
    assert {"commit", "hardware", "torch", "config"} <= result.keys()
    out = capsys.readouterr().out
    assert out.startswith("| lung, size small, recipe best, 4 channels, batch 2, fp32; ")
    assert all(f"| {name} |" in out for name in m)
    words = "1,000 X-rays and masks decoded in 0.3 s, read from the cache in 0.01 s"
    assert out.endswith(f"\n\n{words}\n")


def test_the_parts_asked_for_come_in_one_order(monkeypatch, known_machine, tmp_path, capsys):
    """Measured first, always; each part has its own table; a line tells how many are done."""
    rows = [dict(network="here, fp32", parameters=1, step=1.0, sampling=1.0, memory=1e9)]
    monkeypatch.setattr(benchmark, "measure", lambda *_: {"speed": 1.0})
    monkeypatch.setattr(benchmark, "compare", lambda *_: rows)
    monkeypatch.setattr(benchmark, "models", lambda *_: [])
    monkeypatch.setattr(benchmark, "gains", lambda *_: {"a choice": 1.5})
    monkeypatch.setattr(
        benchmark, "scaling_of_a_step", lambda *_: {"channels": {1: [1.0, 1e9], 2: [2.0, 2e9]}}
    )
    monkeypatch.setattr(
        benchmark, "scaling_with_images", lambda *_: {"images": {1: [1.0, None], 2: [4.0, None]}}
    )
    words = "--scaling --gains --models --peers".split()
    assert benchmark.main([*COMMAND, *words, "--out", str(tmp_path / "b.json")]) == 0
    parts = ["measured", "peers", "models", "gains", "scaling"]
    assert list(json.loads((tmp_path / "b.json").read_text()))[-5:] == parts
    out, err = capsys.readouterr()
    heads = [table.split("\n")[0] for table in out.split("\n\n")]
    begins = ("| lung, ", "| network ", "| model ", "| choice ", "| against ")
    assert all(head.startswith(begin) for head, begin in zip(heads, begins, strict=True))
    assert "| channels | 1: 1, 2: 2 | 1.00 | 1: 1.00, 2: 2.00 | 1.00 |" in out
    assert "| images | 1: 1, 2: 4 | 2.00 |  |  |" in out and "5/5" in err


def test_what_was_measured_before_an_error_is_kept(monkeypatch, tmp_path):
    """The file is written after every part."""
    monkeypatch.setattr(benchmark, "measure", lambda *_: {"speed": 1.0})
    monkeypatch.setattr(benchmark, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark.main([*COMMAND, "--peers", "--out", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["measured"] == {"speed": 1.0}


def test_the_table_of_an_older_result_names_its_preset():
    """A preset was both size and recipe."""
    old = result(measured={"copy, GB/s": 1234.567})
    old["config"] = {name: old["config"][name] for name in ("task", "channels", "batch_size")}
    old["config"] |= dict(preset="small", precision="bf16")
    head = "| lung, preset small, 4 channels, batch 4, bf16; h, torch t, c |  |"
    assert benchmark.tables(old) == f"{head}\n|---|---|\n| copy, GB/s | 1,235 |"


@pytest.mark.parametrize(
    "size, recipe, channels, target", [("report", "best", 192, "v"), ("small", "report", 16, "eps")]
)
def test_size_and_recipe_are_those_of_train_py(size, recipe, channels, target):
    """Two independent choices; the passes are 50 unless they are given."""
    args = benchmark.parse(["--size", size, "--recipe", recipe])
    cfg = benchmark.configure(args, CPU)
    assert (cfg.size, cfg.recipe, cfg.channels, cfg.target) == (size, recipe, channels, target)
    assert cfg.task == "lung" and cfg.ddim_steps == 50


REFUSALS = [
    ("--rounds 0", "--rounds must be at least 1, got 0"),
    ("--decode 0", "--decode must be at least 1, got 0"),
    ("--channels 6", "head_channels must divide"),
    ("--batch-size 0", "--batch-size must be between 1 and 1000000, got 0"),
    ("--device abacus", "--device must be cuda, mps or cpu, got abacus"),
    ("--out README.md", "--out must be a new file where one can be written, or a result of"),
    ("--out .", "or a result of benchmark.py, got ."),
    ("--out /dev/null", "or a result of benchmark.py, got /dev/null"),
]


@pytest.mark.parametrize("words, message", REFUSALS)
def test_bad_input_gets_one_line_and_exit_status_2(words, message, capsys):
    """As train.py; before anything is measured."""
    assert benchmark.main([*COMMAND, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("benchmark.py: error: ")
