"""What the benchmark counts and calls; how fast this machine is, is no test."""

import dataclasses
import json

import pytest
import torch

import benchmark
import data
import train
import unet

CPU = torch.device("cpu")
TINY = "--preset small --channels 4 --batch-size 2 --rounds 1 --ddim-steps 1 --precision fp32 --device cpu".split()


def config(**settings):
    args = train.parse(
        "--task lung --preset small --channels 4 --image-size 16 --batch-size 4 --steps 10 --precision fp32".split()
    )
    return dataclasses.replace(train.configure(args, CPU), **settings)


@pytest.mark.parametrize(
    "in_channels, macs", [(1, 85_688_549_376), (16, 85_794_717_696), (17, 85_801_795_584)]
)
def test_sec32_the_reports_network_takes_the_published_number_of_multiply_accumulates(
    in_channels, macs
):
    """Counted on the meta device, one image of 64x64."""
    with torch.device("meta"):
        count = benchmark.flops_of(
            unet.UNet(in_channels),
            torch.empty(1, in_channels, 64, 64),
            torch.ones(1, dtype=torch.long),
        )
    assert count == 2 * macs


def test_the_count_does_not_depend_on_the_device_and_grows_with_the_batch():
    """On the CPU, where torch hides the fused attention, as on meta; and no hook is left behind."""
    arguments = lambda n, device: (
        torch.zeros(n, 17, 16, 16, device=device),
        torch.ones(n, dtype=torch.long, device=device),
    )
    net = train.build_model(config()).unet
    with torch.device("meta"):
        same = train.build_model(config()).unet
    one = benchmark.flops_of(net, *arguments(1, "cpu"))
    assert (
        one == benchmark.flops_of(same, *arguments(1, "meta"))
        and benchmark.flops_of(net, *arguments(3, "cpu")) == 3 * one
    )
    assert not any(module._forward_hooks for module in net.modules())


def test_jobs_take_turns_and_the_median_counts(monkeypatch):
    """Rounds of a, b and b, a; the warm-up is not counted, and one slow round does not move the median."""
    calls, now = [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def job(name, *seconds):
        durations = iter(seconds)

        def run():
            calls.append(name)
            now[0] += next(durations)

        return run

    seconds = benchmark.interleaved(
        {"a": job("a", 90, 1, 2, 70), "b": job("b", 80, 5, 6, 4)}, CPU, rounds=3
    )
    assert seconds == {"a": 2, "b": 5} and calls == ["b", "a", "a", "b"] * 2


def test_the_training_job_is_the_step_of_train_py(monkeypatch):
    """Each call moves one Trainer by one step; the sampling job calls sample_masks with the passes asked for."""
    steps, masks = [], []
    monkeypatch.setattr(
        train.Trainer,
        "train_step",
        lambda self, images, masks: steps.append((self.cfg, images.shape, masks.shape)),
    )
    cfg = config()
    job = benchmark.training_job(cfg, CPU)
    job(), job()
    assert steps == [(cfg, (8, 1, 16, 16), (8, 1, 16, 16))] * 2
    monkeypatch.setattr(
        train,
        "sample_masks",
        lambda model, cfg, y, index, *_: masks.append((cfg.ddim_steps, y.shape, len(index))),
    )
    benchmark.sampling_job(config(ddim_steps=7), CPU, 3)()
    assert masks == [(7, (3, 1, 16, 16), 3)]


def test_the_exponent_of_a_power_law_is_its_power():
    """t = 3 n^2."""
    assert benchmark.exponent({n: 3 * n**2 for n in (1, 2, 4, 8)}) == pytest.approx(2)


def test_rates_are_work_over_time(monkeypatch):
    """With every job at 2 s: two operations a multiply-accumulate, bytes read and written."""
    monkeypatch.setattr(benchmark, "interleaved", lambda jobs, *_, **__: dict.fromkeys(jobs, 2.0))
    rates = benchmark.machine_rates(CPU, torch.float32)
    assert rates == {
        "matrix product": 2048**3,
        "convolution": 9 * 64 * 64 * 16 * 64 * 64,
        "copy": 2**26,
    }


def test_peak_memory_is_that_of_the_work_alone():
    """A process that holds 200 MB more reports 200 MB more."""
    held = torch.ones(100_000_000)  # of the parent, and not the child's
    small, large = (
        benchmark.peak_memory(torch.ones, 10),
        benchmark.peak_memory(torch.ones, 50_000_000),
    )
    assert large - small == pytest.approx(200e6, rel=0.1) and small < held.nbytes + 100e6


def test_decoding_and_start_up_work_on_phantoms_of_their_own(tmp_path):
    """They read what they drew; the run that start_up times has taken its step and has a checkpoint."""
    decoded, cached = benchmark.decoding_seconds(tmp_path, 4)
    assert decoded > 0 and cached > 0
    assert benchmark.start_up(tmp_path, config(channels=4), CPU) > 0
    assert train.load_run(tmp_path / "run")[2] == 1


def test_the_command_prints_its_table_and_writes_its_numbers(monkeypatch, tmp_path, capsys):
    """All measurements at the smallest size; shares and rates are consistent with the seconds they come from."""
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 5e8)
    monkeypatch.setattr(
        benchmark,
        "machine_rates",
        lambda *_: {"matrix product": 1e12, "convolution": 5e11, "copy": 1e10},
    )
    monkeypatch.setattr(benchmark, "start_up", lambda *_: 4.0)
    monkeypatch.setattr(benchmark, "decoding_seconds", lambda *_: (0.3, 0.01))
    assert benchmark.main([*TINY, "--out", str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    m = result["measured"]
    assert m["training images/s"] == pytest.approx(2 / m["seconds a training step"])
    assert m["training share of matrix product"] == pytest.approx(
        m["training FLOP a step"] / m["seconds a training step"] / 1e12
    )
    assert m["training share of convolution"] == pytest.approx(
        2 * m["training share of matrix product"]
    )
    assert {"commit", "hardware", "torch", "config"} <= result.keys()
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in m)


def test_every_sampling_job_of_the_gains_is_laid_out_but_the_one_that_measures_it(monkeypatch):
    """So that a ratio is the worth of one choice: channels last everywhere else."""
    laid = {}

    def job(cfg, device, n, model=None):
        model = getattr(model, "model", model)  # of EmbedsEveryPass
        laid[len(laid)] = model is None or model.unet.stem.weight.is_contiguous(
            memory_format=torch.channels_last
        )
        return lambda: None

    monkeypatch.setattr(benchmark, "sampling_job", job)
    monkeypatch.setattr(benchmark, "interleaved", lambda jobs, *_: dict.fromkeys(jobs, 1.0))
    monkeypatch.setattr(benchmark, "in_process_of_its_own", lambda *_, **__: 1.0)
    benchmark.gains(config(), CPU, 1)
    assert list(laid.values()) == [True, False, True, True, True]


def test_gains_change_one_thing_each(monkeypatch):
    """What is timed without a choice is without it, and only while it is timed; ratios are over "as it is"."""
    timed, steps = {}, []
    monkeypatch.setattr(
        benchmark,
        "interleaved",
        lambda jobs, *_: timed.update(jobs) or {name: 1.0 + i for i, name in enumerate(jobs)},
    )
    monkeypatch.setattr(
        benchmark,
        "in_process_of_its_own",
        lambda work, *_, environment: steps.append(environment) or 5.0 + len(environment),
    )
    found = benchmark.gains(config(ddim_steps=1), CPU, 1)
    assert (
        found["training: fused AdamW"] == 2
        and found["sampling: GroupNorm of small images laid out anew"] == 3
    )
    assert (
        found["training: OpenMP threads spin a moment before they sleep"] == 6 / 5
        and steps == [{}, {"GOMP_SPINCOUNT": "0"}] * 3
    )
    assert (
        timed["no recomputation"].trainer.optimizer.defaults["fused"]
        and not timed["fused AdamW"].trainer.optimizer.defaults["fused"]
    )
    assert timed["no recomputation"].trainer.model.unet.recompute
    formula, seen, ours = unet.attend, [], unet.fused_attend
    monkeypatch.setattr(unet, "attend", lambda *qkv: seen.append(1) or formula(*qkv))
    timed["attention of few positions by the plain formula on a CPU"]()
    assert not seen and unet.fused_attend is ours
    timed["no recomputation"]()
    assert seen


def test_the_x_ray_is_embedded_at_every_pass_where_that_is_what_is_timed():
    """EmbedsEveryPass gives the same masks by one embedding more a pass."""
    cfg, embedded = config(ddim_steps=3), []
    model = train.build_model(cfg)
    model.embedder.register_forward_hook(lambda *_: embedded.append(1))
    y = torch.zeros(2, 1, 16, 16)
    once = train.sample_masks(model, cfg, y, [0, 1])
    assert len(embedded) == 1
    torch.testing.assert_close(
        train.sample_masks(benchmark.EmbedsEveryPass(model), cfg, y, [0, 1]), once
    )
    assert len(embedded) == 1 + 3


def test_the_images_of_an_epoch_are_shuffled_once(monkeypatch):
    """Cost linear in images: one permutation an epoch, not one a step."""
    train.order_of.cache_clear()
    cfg = config(batch_size=4)
    rows = torch.cat([train.batch_indices(cfg, 40, step) for step in range(1, 11)])
    assert sorted(rows.tolist()) == list(range(40)) and train.order_of.cache_info().misses == 1


def test_what_a_mask_costs_is_counted_pass_by_pass_and_timed_for_each_model(monkeypatch):
    """One pass of diffusion is the report's network, a further pass its U-Net alone; all are called on 4 X-rays, nine masks as nine."""
    drawn = []
    monkeypatch.setattr(
        train,
        "sample_masks",
        lambda model, cfg, y, index, members, device: drawn.append(
            (cfg.model, len(y), cfg.ddim_steps, members)
        ),
    )
    monkeypatch.setattr(
        benchmark, "training_job", lambda cfg, device: lambda: drawn.append(cfg.model)
    )
    monkeypatch.setattr(
        benchmark,
        "interleaved",
        lambda jobs, *_: {name: job() or 2.0 for name, job in jobs.items()},
    )
    rows = {
        row["model"]: row for row in benchmark.models(config(ddim_steps=5, image_size=32), CPU, 1)
    }
    assert drawn[:4] == ["unet", "res50attunet", "report-unet", "diffusion"]
    assert set(drawn[4:]) == {(m, 4, 5, 1) for m in ("report-unet", "diffusion")} | {
        ("diffusion", 4, 1, 1),
        ("diffusion", 4, 50, 1),
        ("diffusion", 4, 5, 9),
    } | {(m, 4, train.PRESETS["small"]["lung"]["ddim_steps"], 1) for m in ("unet", "res50attunet")}
    flop = {name: row["flop"] for name, row in rows.items()}
    one, five, fifty, nine = (
        flop[f"diffusion, {name}"]
        for name in ("1 x DDIM-1", "1 x DDIM-5", "1 x DDIM-50", "9 x DDIM-5")
    )
    net = train.build_model(config(image_size=32)).unet
    a_pass = benchmark.flops_of(net, torch.zeros(1, 17, 32, 32), torch.ones(1, dtype=torch.long))
    assert one == flop["report-unet"] > a_pass and (five - one, fifty - one, nine - one) == (
        4 * a_pass,
        49 * a_pass,
        44 * a_pass,
    )
    with torch.device("meta"):
        assert flop["unet"] == benchmark.flops_of(
            train.baselines.UNet2015(32), torch.empty(1, 1, 32, 32)
        )
    assert (
        rows["unet"]["parameters"] == 7_765_409
        and rows["unet"]["mask"] == rows["unet"]["training"] == 0.5
    )
    result = dict(
        config=dataclasses.asdict(config()),
        measured={},
        models=list(rows.values()),
        hardware="",
        torch="",
        commit="",
    )
    assert f"| unet | 7,765,409 | 500.0 | {flop['unet'] / 1e9:.2f} | 500.0 |" in benchmark.tables(
        result
    )


def test_scaling_measures_time_and_memory_and_its_table_has_their_exponents(monkeypatch, tmp_path):
    """Seconds that grow with the square and bytes that grow linearly, of the value that was varied."""
    monkeypatch.setattr(
        benchmark, "interleaved", lambda jobs, *_: {value: value**2 / 1e3 for value in jobs}
    )
    monkeypatch.setattr(benchmark, "training_job", lambda cfg, device: lambda: None)
    monkeypatch.setattr(
        benchmark,
        "peak_memory",
        lambda work, make, cfg, device: cfg.batch_size * cfg.image_size * cfg.channels * 1e9,
    )
    monkeypatch.setattr(benchmark, "decoding_seconds", lambda folder, n: (n / 100, 0.0))
    monkeypatch.setattr(benchmark, "epoch_seconds", lambda cfg, device, n: n / 50)
    found = benchmark.scaling(config(batch_size=4), CPU, 1, tmp_path)
    assert found["batch_size"][2] == [0.004, 2 * 16 * 4 * 1e9] and found["channels"][16] == [
        0.256,
        4 * 16 * 16 * 1e9,
    ]
    facts = {
        "hardware": "h",
        "torch": "t",
        "commit": "c",
        "config": dataclasses.asdict(config()),
        "measured": {},
    }
    table = benchmark.tables(facts | {"scaling": json.loads(json.dumps(found))})
    assert (
        "| image_size | 8: 0.064, 16: 0.256, 32: 1.02 | 2.00 | 8: 128.00, 16: 256.00, 32: 512.00 | 1.00 |"
        in table
    )
    assert "| images decoded | 320: 3.2, 3200: 32 | 1.00 |  |  |" in table


def test_a_peer_that_does_not_fit_is_left_out_and_said(capsys):
    """Out of memory is an answer; another error is an error."""

    def fails(words):
        raise RuntimeError(words)

    assert benchmark.fits("a", lambda: None) and not benchmark.fits(
        "b", lambda: fails("CUDA out of memory")
    )
    assert capsys.readouterr().err == "b: out of memory, left out\n"
    with pytest.raises(RuntimeError, match="sizes differ"):
        benchmark.fits("c", lambda: fails("sizes differ"))


def test_peers_and_we_see_each_image_once_a_step(monkeypatch):
    """Eq. (7), unconditional: whatever the preset trains with, our step does the work that theirs does."""
    seen = []
    monkeypatch.setattr(
        benchmark, "training_job", lambda cfg, device: seen.append(cfg) or (lambda: None)
    )
    monkeypatch.setattr(
        benchmark, "sampling_job", lambda cfg, *_: seen.append(cfg) or (lambda: None)
    )
    monkeypatch.setattr(benchmark, "PEERS", {})
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 0)
    benchmark.compare(config(noises=2), CPU, 1)
    assert len(seen) >= 2 and {
        (c.noises, c.target, c.cond, c.task, c.ddim_steps) for c in seen
    } == {(1, "eps", None, "synthesis", 10)}


def test_what_was_measured_before_an_error_is_kept(monkeypatch, tmp_path):
    """The file is written after every part."""
    monkeypatch.setattr(benchmark, "measure", lambda *_: {"speed": 1.0})
    monkeypatch.setattr(benchmark, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark.main([*TINY, "--peers", "--out", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["measured"] == {"speed": 1.0}


def test_an_epoch_is_a_step_for_every_batch(monkeypatch):
    """After the one that warms up."""
    steps = []
    monkeypatch.setattr(
        train.Trainer, "train_step", lambda self, images, masks: steps.append(len(images))
    )
    assert benchmark.epoch_seconds(config(), CPU, 12) >= 0 and steps == [12] * 4


def test_files_of_phantoms_repeat_beyond_those_drawn(monkeypatch, tmp_path):
    """122 X-rays of 120 drawn: as many masks, and all are read."""
    draw = data.write_phantoms
    monkeypatch.setattr(
        data, "write_phantoms", lambda root, tree, counts: draw(root, tree, counts, size=16)
    )
    assert min(benchmark.decoding_seconds(tmp_path, 122)) > 0


REFUSALS = [
    ("--rounds 0", "--rounds must be at least 1, got 0"),
    ("--decode 0", "--decode must be at least 1, got 0"),
    ("--channels 6", "head_channels must divide"),
]


@pytest.mark.parametrize("words, message", REFUSALS)
def test_bad_input_gets_one_line_and_exit_status_2(words, message, capsys):
    """As train.py."""
    assert benchmark.main([*TINY, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("benchmark.py: error: ")


@pytest.mark.parametrize("name", benchmark.PEERS)
def test_a_peer_takes_our_images_and_has_nearly_our_parameters(name):
    """Where it is installed: the same shapes, and a number of parameters within a factor of two of ours."""
    pytest.importorskip(benchmark.PEERS[name])
    cfg = config(task="synthesis", cond=None, channels=16, image_size=32)
    peer, ours = benchmark.Peer(name, cfg), train.build_model(cfg)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([1, 1000])
    assert peer(x, t).shape == ours(x, t).shape
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert 0.5 < count(peer) / count(ours) < 2 and (
        name == "denoising-diffusion-pytorch" or count(peer) == count(ours)
    )
