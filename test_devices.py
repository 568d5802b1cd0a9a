"""The machine: precision and several processes change no number of a run."""

import functools
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batches
import data
import devices
import diffusion
import evaluate
import improved
import memory
import networks
import runs
import score
import train
from testing import (
    CPU,
    ROOT,
    TINY,
    log_of,
    results_of,
    shake,
    split,
    start,
    state_of,
    tensors,
    tiny,
    torchrun,
    wait_for_log,
)


def test_channels_last_changes_a_mask_by_rounding_alone():
    """The layout for sampling on a CPU is that of a copy; the trained model stays as it is."""
    cfg = tiny(ddim_steps=3)
    model = shake(networks.build_model(cfg)).requires_grad_(False)
    copy, y = devices.laid_out(model, CPU), data.to_float(split(3).images)
    assert copy.unet.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.unet.stem.weight.is_contiguous()
    plain, fast = (evaluate.sample_masks(m, cfg, y, [0, 1, 2]) for m in (model, copy))
    assert plain.std() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)


def test_weights_cast_to_16_bits_once_give_the_masks_of_weights_cast_at_every_pass(monkeypatch):
    """Bit for bit. No layer of the U-Net is cast in a pass but the head's convolution."""
    cfg = tiny(ddim_steps=3, precision="bf16")
    model = shake(networks.build_model(cfg)).requires_grad_(False)
    images, seen = split(3).images, set()

    def weights(layer, args):
        seen.update({layer.weight.dtype})

    for layer in model.unet.modules():
        if (
            isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
            and layer is not model.unet.head[2]
        ):
            layer.register_forward_pre_hook(weights)
    once = evaluate.segment(model, cfg, images, np.arange(3), CPU)
    assert seen == {torch.bfloat16} and model.unet.stem.weight.dtype == torch.float32
    monkeypatch.setattr(evaluate, "cast_once", lambda model, cfg: model)
    assert torch.equal(evaluate.segment(model, cfg, images, np.arange(3), CPU), once)
    assert once.std() > 0.1 and torch.float32 in seen


# ---------------------------------------- the ways to run a step


def three_steps(plan):
    """(losses, weights, Trainer) of a Trainer's first three steps by this plan."""
    trainer = train.Trainer(tiny(plan=plan), CPU)
    shake(trainer.model)
    losses = [float(trainer.train_step(*tensors(8))) for _ in range(3)]
    return losses, dict(trainer.model.named_parameters()), trainer


@pytest.mark.parametrize("plan", ["channels-last", "compiled"])
def test_every_plan_takes_the_same_steps(plan, monkeypatch):
    """Losses and weights agree to rounding, under the same names; and the plan is carried out.

    Compiled: traced with its backward pass by torch.compile, as one graph without a break. No
    compiler is needed here: what it traced runs by torch's own kernels.
    """
    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    (losses, weights, trainer), (expected, plain, _) = three_steps(plan), three_steps("plain")
    assert losses == pytest.approx(expected, rel=1e-5) and len(set(losses)) == 3
    torch.testing.assert_close(weights, plain, rtol=1e-4, atol=1e-5)
    assert hasattr(trainer.parallel, "_orig_mod") == (plan == "compiled")
    for model in (trainer.model, trainer.ema):
        kernel = model.unet.encoder[0][0].conv_2.weight
        last = kernel.is_contiguous(memory_format=torch.channels_last)
        assert last == (plan == "channels-last")


def test_without_a_compiler_the_compiled_plan_is_refused_in_one_line(go, monkeypatch, capsys):
    """The error is the one that torch.compile raises there: it names the compiler."""
    missing = torch._inductor.exc.InvalidCxxCompiler()

    def raises(*_):
        raise torch._inductor.exc.InductorError(missing, None)

    monkeypatch.setattr(devices, "parallel", lambda model, plan: raises)
    assert go("--task lung --set plan=compiled")[0] == 2
    rule = "train.py: error: --set plan=compiled does not work here: No working C++ compiler found"
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(rule) and error.count("error") == 1


# ---------------------------------------- nothing waits for the CPU


class Copies(TorchDispatchMode):
    """Counts what is copied from the CPU to torch's meta device, which stands for a GPU here.

    Reading a number back from it is an error.
    """

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = any(x.device.type == "cpu" for x in tensors)
        self.count += isinstance(answer, torch.Tensor) and answer.is_meta and on_cpu
        return answer


META = torch.device("meta")


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("objective", ["eps", "ncsn", "vp"])
def test_a_step_waits_for_no_copy_and_reads_nothing_back(objective, target, monkeypatch):
    """All that goes to the device goes by `sent`, which does not wait: rows, t, eps, coefficients.

    By Eq. (7) and by §2.1's losses, whose coefficients come from the CPU.
    """
    cfg, sent = tiny(target=target, augment=1.0, objective=objective), []
    images, masks = (torch.empty(8, 1, 16, 16, dtype=torch.uint8, device=META) for _ in range(2))
    exact = score.sent
    for module in (batches, score):
        monkeypatch.setattr(module, "sent", lambda x, device: sent.append(x) or exact(x, device))
    model, loss = networks.without_memory(cfg), train.loss_of(cfg)
    improved.schedule_of(cfg, META)
    with Copies() as copies:
        batch = batches.batch(cfg, 1, images, masks)
        whole = 4 if objective == "eps" else 3  # rows, augmentation, eps; t of Eq. (7)
        assert copies.count == len(sent) == whole
        for part in batch.parts(3):
            loss(model, part).backward()
    in_parts = 0 if objective == "eps" else 2 * 3  # a, std and t of each
    assert copies.count == len(sent) == whole + in_parts


class NoFloat64(TorchDispatchMode):
    """Apple's MPS has no float64. Again the meta device stands for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(answer) if isinstance(x, torch.Tensor)]
        assert not any(x.is_meta and x.dtype == torch.float64 for x in tensors), operation
        return answer


@pytest.mark.parametrize("objective", ["ncsn", "vp"])
def test_sec21_no_float64_goes_to_the_device(objective):
    """The real-valued t of the SDE and its coefficients are float64 on the CPU alone."""
    cfg = tiny(objective=objective)
    images = torch.empty(8, 1, 16, 16, dtype=torch.uint8, device=META)
    model, loss = networks.without_memory(cfg), train.loss_of(cfg)
    with NoFloat64():
        for part in batches.batch(cfg, 1, images, images).parts(3):
            loss(model, part).backward()


def test_the_schedule_is_on_the_device_but_where_that_has_no_float64():
    """Every device has the same numbers in float64; MPS is given them by the CPU."""
    assert {v.device.type for v in diffusion.schedule(50, 0.3, "meta")} == {"meta"}
    assert {v.dtype for v in diffusion.schedule(50, 0.3, "meta")} == {torch.float64}
    on_cpu = diffusion.shifted(diffusion.linear_schedule(50), 0.3)
    for device in ("cpu", torch.device("mps")):
        assert all(map(torch.equal, diffusion.schedule(50, 0.3, device), on_cpu))


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_sampler_waits_for_no_copy_and_reads_nothing_back(eta):
    """DDIM: the coefficients of every step are on the device already."""
    cfg = tiny(ddim_steps=4, eta=eta, target="v")
    model, s = networks.without_memory(cfg), improved.schedule_of(cfg, META)
    eps_model = evaluate.eps_model_of(model, cfg, s, CPU)
    y = torch.empty(2, 1, 16, 16, device=META)
    with Copies() as copies:
        evaluate.sample_with(cfg, s, eps_model, lambda: torch.empty_like(y), model.embed(y))
    assert copies.count == 0


# ---------------------------------------- a GPU, played by a torch.cuda that answers as one


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda of a card with 80 bytes, 50 of them free, 20 reserved here and 7 in use.

    Returns the list of the devices that were set, and "emptied" for each emptied cache.
    """
    done, exact = [], torch.empty
    answers = dict(
        is_available=lambda: True,
        set_device=done.append,
        empty_cache=lambda: done.append("emptied"),
        mem_get_info=lambda device: (50, 80),
        memory_reserved=lambda device: 20,
        memory_allocated=lambda device: 7,
        max_memory_allocated=lambda: 64,
        is_bf16_supported=lambda including_emulation=True: not including_emulation,
        get_device_name=lambda device: f"card {device.index}",
    )
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    def empty(*sizes, device=None, **options):
        made = exact(*sizes, device="meta", **options)
        return SimpleNamespace(device=torch.device(device)) if "cuda" in str(device) else made

    monkeypatch.setattr(torch, "empty", empty)
    return done


def test_a_gpu_is_found_and_each_process_of_torchrun_has_its_own(gpu, monkeypatch):
    """The processes talk by the GPU that is set; --device cpu still means the CPU."""
    assert devices.choose_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.choose_device() == devices.choose_device("cuda") == torch.device("cuda:3")
    assert gpu == [torch.device("cuda"), torch.device("cuda:3"), torch.device("cuda:3")]


def test_what_is_asked_of_a_gpu(gpu):
    """Free is also what this process holds and does not use: 50 + 20 - 7. bf16 must be real."""
    card = torch.device("cuda:1")
    assert memory.free_memory(card) == 63 and devices.bf16_is_fast(card)
    assert memory.call_and_read_peak(gpu.append, "called") == 64 and gpu == ["called"]
    assert runs.provenance(card)["hardware"] == "card 1"


def test_a_tensor_goes_to_a_gpu_from_pinned_memory_without_waiting():
    """From pageable memory a copy waits, whatever non_blocking says. A CPU needs neither."""

    class OnItsWay:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking):
            return device.type, self.pinned, non_blocking

    assert score.sent(OnItsWay(), torch.device("cuda:0")) == ("cuda", True, True)
    assert score.sent(OnItsWay(), CPU) == ("cpu", False, False)


# ---------------------------------------- several processes


SHARED = f"--task lung {TINY} --batch-size 7 --steps 10 --eval-images 9"
SHARED += " --set eval_every=5 lr_decay=none"


def test_three_processes_learn_and_measure_what_one_does_and_one_goes_on_from_two(
    root, tmp_path, go
):
    """Batches of 7 images; ten steps and two evaluations.

    Loss and weights agree to rounding, every metric exactly. The run of two processes stops after
    six steps and is resumed by one. Each folder is whole, and written once.
    """
    words = [*SHARED.split(), "--data", root, "--micro-batch", "2"]
    commands = {
        "three": torchrun(3, ROOT / "train.py", [*words, "--out", "three"], tmp_path),
        "two": torchrun(2, ROOT / "train.py", [*words, "--out", "two", "--steps", "6"], tmp_path),
    }
    status, one = go(SHARED, "one", "")
    printed = {name: command.communicate(timeout=300) for name, command in commands.items()}
    assert status == 0
    for name, command in commands.items():
        assert command.returncode == 0, printed[name][1]
    resume = ["--resume", str(tmp_path / "two"), "--steps", "10", "--device", "cpu"]
    assert train.main(resume) == 0
    expected, log = state_of(one), log_of(one)
    for folder in (tmp_path / "three", tmp_path / "two"):
        state = state_of(folder)
        for kind in ("model", "ema"):
            torch.testing.assert_close(dict(state[kind]), dict(expected[kind]), rtol=0, atol=1e-5)
        lines = [line for line in log_of(folder) if line["step"] != 6 or "loss" in line]
        assert [x for x in lines if "Val" in x] == [x for x in log if "Val" in x]
        losses = [[line["loss"] for line in lines if "loss" in line] for lines in (lines, log)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 10
    out = printed["three"][0]
    assert out.count("validation DICE") == 2 and "3 processes" in out
    assert not list(tmp_path.glob("*/.*"))
    facts = results_of(tmp_path / "three")
    assert facts["command"].startswith("torchrun --nproc-per-node 3 train.py")
    assert facts["hardware"].endswith("3 processes")


FAILS = """import os, sys
sys.path.insert(0, {root!r})
import torch, console, train
trainer, adamw = train.Trainer, torch.optim.AdamW
owner, name, error = {planted}
exact, calls = getattr(owner, name), []
def planted(*args, **options):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "1") == "1":
        raise error
    return exact(*args, **options)
setattr(owner, name, planted)
sys.exit(train.main())
"""
USER_ERROR = 'trainer, "train_step", console.UserError("planted in the second process")'
MOMENTS = 'adamw, "step", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")'
PASS = 'trainer, "backward", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")'
MEMORY = "train.py: error: out of memory"
FAILURES = [
    (2, USER_ERROR, "train.py: error: planted in the second process"),
    (2, MOMENTS, f"{MEMORY}; --resume goes on from the last checkpoint"),
    (1, MOMENTS, f"{MEMORY}; --resume goes on from the last checkpoint"),
    (2, PASS, f"{MEMORY} with 3 images at once; try a smaller --micro-batch"),
]


@pytest.mark.parametrize("processes, planted, line", FAILURES)
def test_a_process_that_fails_ends_the_run_with_its_error(processes, planted, line, root, tmp_path):
    """The other one does not wait for it: it ends with a line, too. What was saved is whole."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=str(ROOT), planted=planted))
    words = [
        *SHARED.replace("--batch-size 7", "--batch-size 6").split(),
        "--data",
        root,
        "--out",
        "run",
    ]
    many = processes > 1
    command = torchrun(2, script, words, tmp_path) if many else start([script, *words], tmp_path)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == (1 if many else 2)
    assert [words for words in errors.splitlines() if words.startswith(line)], errors
    assert errors.count("train.py: error") == 1
    assert errors.count("train.py: stopped: another process ended") <= processes - 1
    assert state_of(tmp_path / "run")["step"] == 0


def test_processes_stop_together_and_are_saved(root, tmp_path):
    """Ctrl-C to torchrun: one checkpoint, at a step that all have taken."""
    words = [*SHARED.split(), "--data", root, "--steps", "1000000", "--out", "run"]
    words += ["--set", "eval_every=500000"]
    with torchrun(2, ROOT / "train.py", words, tmp_path) as command:
        wait_for_log(tmp_path / "run")
        command.send_signal(signal.SIGINT)
        out, errors = command.communicate(timeout=60)
    step = state_of(tmp_path / "run")["step"]
    assert step >= 1 and f"stopped and saved at step {step} of" in out, errors
    assert out.count("stopped and saved") == 1


def test_every_process_needs_an_image(go, monkeypatch, capsys, tmp_path):
    """A batch of one image for two processes is refused before anything is written."""
    monkeypatch.setattr(runs, "world", lambda: 2)
    status, folder = go("--task lung", given=TINY.replace("--batch-size 4", "--batch-size 1"))
    assert status == 2 and not folder.exists()
    assert "--batch-size must be at least the 2 processes, got 1" in capsys.readouterr().err


def test_what_a_step_keeps_counts_the_embedder_of_the_masks_that_are_given():
    """Of X-rays drawn from two masks: what an embedder of two channels keeps comes on top."""
    alone = tiny(task="synthesis", cond=None)
    given = tiny(task="synthesis", cond="none", given="lung+infection")
    embedded = tiny(task="synthesis", cond="concat", given="lung+infection")
    kept = [
        memory.kept_for_backward(networks.build_model(c), c, CPU) for c in (alone, given, embedded)
    ]
    assert kept[1] - kept[0] == 2 * 4 * 16 * 16  # the input of the stem, in float32
    assert kept[2] > 1.2 * kept[1]
