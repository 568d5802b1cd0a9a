"""The step, the loop and the command: what is learned from what, measured when, and saved."""

import dataclasses
import json
import math
import re
import signal
import types

import pytest
import torch

import baselines
import batches
import data
import diffusion
import evaluate
import memory
import networks
import phantoms
import runs
import score
import synthesis
import train
from console import STOP_SIGNALS
from testing import (
    CPU,
    ROOT,
    TINY,
    evaluations_of,
    log_of,
    results_of,
    shake,
    split,
    start,
    state_of,
    tensors,
    tiny,
    wait_for_log,
)
from unet import recompute_blocks

# ---------------------------------------- the step


class Seen(list):
    """What training hands to diffusion.l_simple, call by call, as (x0, y). Its loss learns."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(diffusion, "l_simple", self.record)

    def record(self, s, model, x0, y, *_):
        self.append((x0, y))
        return sum(p.sum() for p in model.parameters())


def test_the_network_sees_the_noised_mask_as_x0_and_the_xray_of_the_same_row_as_y(monkeypatch):
    """§4.1: diffusion runs on masks, conditioned on images.

    Here a mask is a function of its image, so that a mixed row shows.
    """
    seen, (images, masks) = Seen(monkeypatch), tensors(6)
    trainer = train.Trainer(tiny(), CPU)
    trainer.train_step(images, masks)
    x0, y = seen[0]
    assert x0.unique().tolist() == [-1, 1] and torch.equal(x0 > 0, y > 0)
    every = data.to_float(images)
    assert all((every == image).flatten(1).all(1).any() for image in y)
    trainer.train_step(images, None)
    assert seen[1][1] is None and not seen[1][0].unique().tolist() == [-1, 1]


def test_augmentation_changes_each_pair_of_a_step_by_the_seed_and_the_step_alone(monkeypatch):
    """Off, the network sees the files; on, batches.augment of the very rows, X-ray first.

    Another draw at every step.
    """
    seen, files = Seen(monkeypatch), tensors(4)
    off, on = tiny(), tiny(augment=1.0)
    for cfg in (off, on, on):
        trainer = train.Trainer(cfg, CPU)
        trainer.train_step(*files)
        trainer.train_step(*files)
    for (x0, y), (again_x0, again_y) in zip(seen[2:4], seen[4:6]):  # the same seed
        assert torch.equal(x0, again_x0) and torch.equal(y, again_y)
        assert not torch.equal(x0, seen[0][0])
    given = []

    def augment(y, x0, generator, strength):
        given.append((y, x0, generator.initial_seed(), strength))
        return x0, y

    monkeypatch.setattr(batches, "augment", augment)
    half = tiny(augment=0.5)
    for step in (1, 2):
        trainer = train.Trainer(half, CPU)
        trainer.step = step - 1
        trainer.train_step(*files)
        y, x0, _, strength = given[-1]
        assert torch.equal(x0, seen[step - 1][0]) and torch.equal(y, seen[step - 1][1])
        assert strength == 0.5
        assert torch.equal(seen[-1][0], y) and torch.equal(seen[-1][1], x0)  # what augment gives
    train.Trainer(dataclasses.replace(half, seed=1), CPU).train_step(*files)
    assert len({seed for _, _, seed, _ in given}) == 3  # three steps, three draws


def whole_batch(cfg, images=4):
    """Batch 1 of a Config in float64: all of split(images), in order."""
    x0 = data.to_float(split(images).masks).double()
    y = data.to_float(split(images).images).double()
    t, eps = (None, None) if cfg.supervised else batches.draws(cfg, 1, x0)
    return batches.Batch(x0, y, t, eps)


def gradient_of(trainer, batch):
    """The gradient in float64, as one vector, away from the zero initialisation."""
    shake(trainer.model.double())
    for _ in range(2):  # the second call starts from nothing, as every step does
        loss = trainer.gradient(batch)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), loss


@pytest.mark.parametrize("cond", ["concat", "levels"])
def test_the_gradient_does_not_depend_on_the_micro_batch_nor_on_recomputation(cond):
    """Micro-batches of 1, 3 and 4 images, and blocks computed again: the same to rounding."""
    gradients = []
    for micro_batch, recompute in ((1, False), (3, False), (4, False), (3, True)):
        cfg = tiny(micro_batch=micro_batch, cond=cond)
        trainer = train.Trainer(cfg, CPU)
        assert recompute_blocks(trainer.model, recompute)
        gradients.append(gradient_of(trainer, whole_batch(cfg))[0])
    assert gradients[0].norm() > 0.1
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0], rtol=1e-9, atol=1e-12)


def test_sec44_the_gradient_of_a_supervised_network_is_that_of_its_loss_in_pieces_too():
    """No noise is drawn: micro-batches of 3 and 1 X-rays give the gradient of the loss on all 4."""
    cfg = tiny(model="unet", cond=None, micro_batch=3)
    trainer = train.Trainer(cfg, CPU)
    batch = whole_batch(cfg)
    found, loss = gradient_of(trainer, batch)
    trainer.model.zero_grad()
    target = (batch.x0 + 1) / 2
    logits = trainer.model(batch.y)
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    whole.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", [dict(), dict(objective="vp"), dict(model="unet", cond=None)])
def test_the_loss_of_a_run_is_the_equations_and_its_step_tells_the_batchs_mean(how):
    """Eq. (7), §2.1's or §4.4's on the whole batch, whatever the micro-batch."""
    cfg = tiny(micro_batch=3, **how)
    trainer = train.Trainer(cfg, CPU)
    batch = whole_batch(cfg)
    _, loss = gradient_of(trainer, batch)
    (part,), model = batch.parts(4), trainer.model
    if cfg.supervised:
        expected = baselines.l_supervised(model(part.y), part.x0)
    elif cfg.objective == "vp":
        process = score.process_of(1000, cfg.shift)
        expected = score.score_matching(process, 1000, model, *part, cfg.target)
    else:
        s = diffusion.schedule(cfg.T, cfg.shift)
        expected = diffusion.l_simple(s, model, *part, cfg.target)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_sec21_the_losses_of_ncsn_and_of_the_sde_are_those_of_score_py(target):
    """One network, one noise: one number by score_matching, sde_loss and dsm_loss.

    At whole steps it is that of Eq. (7).
    """
    s, g = diffusion.linear_schedule(), torch.Generator().manual_seed(3)
    process, heard = score.steps_of(s.abar), []
    shape, kind = (4, 1, 3, 3), dict(generator=g, dtype=torch.float64)
    x0, eps, answer = (torch.randn(shape, **kind) for _ in range(3))

    def model(xt, t, y):
        heard.append(t)
        return answer + 0.1 * xt

    for steps in (250.0, 250.7):
        a, std = process.marginal(steps / 1000)
        of_answer, of_x = {"eps": (1, 0), "v": (a, std), "x0": (-a / std, 1 / std)}[target]

        def eps_hat(x, of_answer=of_answer, of_x=of_x):
            return of_answer * (answer + 0.1 * x) + of_x * x

        t = torch.full((4,), steps, dtype=torch.float64)
        loss = float(score.score_matching(process, 1000, model, x0, None, t, eps, target))
        assert heard[-1].tolist() == pytest.approx([steps] * 4, rel=1e-7)  # in float32
        sde = score.sde_loss(process, lambda x, _: -eps_hat(x) / std, x0, steps / 1000, eps)
        assert loss == pytest.approx(float(sde))
        sigma = torch.full((4,), std / a, dtype=torch.float64)
        ncsn = score.dsm_loss(lambda y, _: -eps_hat(a * y) / (std / a), x0, sigma, eps)
        assert loss == pytest.approx(float(ncsn))
    whole = torch.tensor([1, 20, 500, 1000])
    mixed = score.score_matching(process, 1000, model, x0, None, whole, eps, "eps")
    torch.testing.assert_close(mixed, diffusion.l_simple(s, model, x0, None, whole, eps))


def test_a_shifted_schedule_is_the_one_a_run_learns_by(monkeypatch):
    """Eq. (7), and the real times of vp: all of the shifted schedule."""
    used = []

    def l_simple(s, model, *_):
        used.append(s)
        return 0 * model.unet.stem.weight.sum()

    def score_matching(process, T, model, *_):
        used.append(process)
        return 0 * model.unet.stem.weight.sum()

    monkeypatch.setattr(diffusion, "l_simple", l_simple)
    monkeypatch.setattr(score, "score_matching", score_matching)
    for objective in ("eps", "vp"):
        cfg = tiny(shift=0.5, objective=objective)
        train.Trainer(cfg, CPU).train_step(*tensors(4))
    s, process = used
    expected = diffusion.shifted(diffusion.linear_schedule(), 0.5).abar
    assert torch.equal(s.abar, expected)
    at_03 = score.steps_of(expected).marginal(0.3)
    assert process.marginal(0.3) == at_03 != score.process_of(1000).marginal(0.3)


def test_one_step_is_one_update_and_the_average_follows_it():
    """k steps move AdamW's own counter by k.

    The EMA obeys its recursion with the warm-up of its decay.
    """
    trainer = train.Trainer(tiny(ema=0.3, micro_batch=3), CPU)
    expected = [p.clone() for p in trainer.model.parameters()]
    for step in range(1, 6):
        trainer.train_step(*tensors(6))
        decay = min(0.3, (1 + step) / (10 + step))
        weights = [p.detach() for p in trainer.model.parameters()]
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, weights)]
    states = trainer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {5}
    for e, p in zip(expected, trainer.ema.parameters()):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-7)
        assert not p.requires_grad and p.grad_fn is None  # else a run's whole graph is kept


def test_a_run_begins_with_the_weights_of_its_seed():
    """The network and its average: those of networks.build_model, others for another seed."""
    stems = []
    for seed in (0, 1):
        trainer = train.Trainer(tiny(seed=seed), CPU)
        expected = networks.build_model(tiny(seed=seed))
        for model in (trainer.model, trainer.ema):
            for a, b in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(a, b)
        stems.append(trainer.model.unet.stem.weight)
    assert not torch.equal(*stems)


def test_the_learning_rate_warms_up_then_stays_or_falls_to_nothing():
    """Linear in the first steps, lr after them; the cosine ends within 1/steps^2 of 0."""
    cfg = tiny(lr=1.0, warmup=10, steps=1000, lr_decay="none")
    rates = [train.learning_rate(cfg, step) for step in (1, 5, 10, 11, 1000)]
    assert rates == [0.1, 0.5, 1, 1, 1]
    cosine = dataclasses.replace(cfg, lr_decay="cosine", warmup=0)
    assert train.learning_rate(cosine, 1) == 1
    assert train.learning_rate(cosine, 501) == pytest.approx(0.5)
    assert 0 < train.learning_rate(cosine, 1000) < 1e-5


def test_the_optimiser_takes_the_learning_rate_of_its_step():
    """Steps 1 and 2 of a warm-up of 4: a quarter and a half of lr."""
    trainer = train.Trainer(tiny(lr=0.4, warmup=4, lr_decay="none"), CPU)
    for expected in (0.1, 0.2):
        trainer.train_step(*tensors(6))
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [expected]


def test_clipping_bounds_the_gradient_that_the_optimiser_sees():
    """The norm of what AdamW gets is max_grad_norm where it was larger; 0: no limit."""
    for limit, bounded in ((1e-3, True), (0.0, False)):
        trainer = train.Trainer(tiny(max_grad_norm=limit), CPU)
        shake(trainer.model)
        trainer.train_step(*tensors(6))
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        norm = gradient.norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3) if bounded else norm > 0.01


# ---------------------------------------- the loop


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    go, monkeypatch, capsys, no_pictures
):
    """Planted nan in step 3: status 1; last.pt is step 2's and finite.

    The message has the step and the learning rate.
    """
    step = train.Trainer.train_step

    def planted(self, *batch):
        return step(self, *batch) * (math.nan if self.step == 3 else 1)

    monkeypatch.setattr(train.Trainer, "train_step", planted)
    status, folder = go("--task lung --lr 0.001 --set warmup=0 lr_decay=none")
    rule = "the loss is nan at step 3 (learning rate 0.001); the last good checkpoint is "
    assert status == 1 and f"{rule}{folder / 'last.pt'}" in capsys.readouterr().err
    state = state_of(folder)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    go, monkeypatch, no_pictures, capsys
):
    """The loss of step 3 is fine and its gradient is not: nothing is measured or saved after."""
    gradient = train.Trainer.gradient

    def planted(self, *batch):
        loss = gradient(self, *batch)
        if self.step == 3:
            next(self.model.parameters()).grad[0] = math.nan
        return loss

    monkeypatch.setattr(train.Trainer, "gradient", planted)
    given = TINY.replace("--steps 4", "--steps 3")
    status, folder = go("--task lung --set max_grad_norm=0", given=given)
    assert status == 1 and "a weight is not finite at step 3" in capsys.readouterr().err
    state = state_of(folder)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.parametrize("saved_by", ["a stop signal", "the clock"])
def test_no_save_writes_a_weight_that_is_not_finite(go, monkeypatch, capsys, saved_by):
    """Step 1 makes a nan, far from an evaluation: last.pt stays that of step 0."""
    train_step = train.Trainer.train_step

    def planted(self, *batch):
        loss = train_step(self, *batch)
        next(self.model.parameters()).detach()[0] = math.nan
        if saved_by == "a stop signal":
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train.Trainer, "train_step", planted)
    monkeypatch.setattr(train, "SAVE_EVERY", 300 if saved_by == "a stop signal" else -1)
    status, folder = go("--task lung", given=TINY.replace("eval_every=2", "eval_every=4"))
    assert status == 1 and "a weight is not finite at step 1" in capsys.readouterr().err
    assert runs.read_checkpoint(folder)["step"] == 0


@pytest.mark.parametrize("sig", STOP_SIGNALS[1:])
def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    go, monkeypatch, no_pictures, sig
):
    """Stopped inside the evaluation of step 2: saved at step 2, and --resume evaluates it first."""
    sample = evaluate.sample_masks

    def interrupted(*args, **kwargs):
        signal.raise_signal(sig)
        return sample(*args, **kwargs)

    monkeypatch.setattr(evaluate, "sample_masks", interrupted)
    monkeypatch.setattr(signal, "getsignal", lambda sig: None)  # the tests may run under nohup
    status, folder = go("--task lung")
    assert status == 130 and state_of(folder)["step"] == 2 and not evaluations_of(folder)
    monkeypatch.setattr(evaluate, "sample_masks", sample)
    assert train.main(["--resume", str(folder)]) == 0
    assert [line["step"] for line in evaluations_of(folder)] == [2, 4]


def test_sigterm_to_a_real_process_writes_a_checkpoint(root, tmp_path):
    """The command itself, killed from outside while it trains.

    Status 130, a checkpoint, the line that says how to go on.
    """
    out = tmp_path / "run"
    words = TINY.replace("--steps 4", "--steps 100000").replace("eval_every=2", "eval_every=100000")
    words = ["--task", "lung", "--data", root, "--out", out, *words.split()]
    with start(["train.py", *words], ROOT) as command:
        wait_for_log(out)
        command.send_signal(signal.SIGTERM)
        stdout, stderr = command.communicate(timeout=60)
    assert command.returncode == 130 and f"--resume {out}" in stdout and "Traceback" not in stderr
    assert state_of(out)["step"] >= 1


def test_best_pt_is_the_evaluation_with_the_highest_validation_dice(go, monkeypatch, no_pictures):
    """Planted scores 0.2, 0.9, 0.5: best.pt is the second evaluation's."""
    plant_scores(monkeypatch, 0.2, 0.9, 0.5)
    _, folder = go("--task lung", given=TINY.replace("--steps 4", "--steps 6"))
    assert runs.load_run(folder / "best.pt")[2] == 4 and runs.load_run(folder)[2] == 6


def plant_scores(monkeypatch, *scores):
    """These are the validation DICE of the evaluations to come."""
    scores, measure = iter(scores), evaluate.evaluate_masks

    def planted(*args):
        report, shown = measure(*args)
        report["Val"]["pooled"]["DICE index"] = next(scores)
        return report, shown

    monkeypatch.setattr(evaluate, "evaluate_masks", planted)


@pytest.mark.parametrize("words", ["lung", "lung --ensemble 2", "synthesis"])
def test_a_network_that_draws_nan_is_refused_in_one_line(go, monkeypatch, capsys, words):
    """Its losses and weights may all be finite: those of a large learning rate overflow."""
    draw = evaluate.sample_with
    for module in (evaluate, synthesis):
        monkeypatch.setattr(module, "sample_with", lambda *words: draw(*words) * torch.nan)
    assert go(f"--task {words}")[0] == 2
    assert "train.py: error: the network draws nan" in capsys.readouterr().err


def test_an_evaluation_that_is_nan_is_never_the_best_one(go, monkeypatch, no_pictures):
    """Not even the first of a run: nan, 0.3, nan."""
    plant_scores(monkeypatch, math.nan, 0.3, math.nan)
    _, folder = go("--task lung", given=TINY.replace("--steps 4", "--steps 6"))
    assert runs.load_run(folder / "best.pt")[2] == 4


def test_the_best_evaluation_is_that_under_the_runs_own_protocol(go, monkeypatch, capsys):
    """0.9 at step 2, then the run goes on with another protocol: 0.2 at step 2, 0.5 at step 4.

    The step that is evaluated anew leaves best.pt alone. Then step 4 is the best one.
    """

    def killed(*_):
        raise SystemExit(9)

    plant_scores(monkeypatch, 0.9, 0.2, 0.5)
    with monkeypatch.context() as twice:
        twice.setattr(runs.Folder, "write_pictures", killed)
        status, folder = go("--task lung")
        best = (folder / "best.pt").read_bytes()
        with pytest.raises(SystemExit):
            train.main(["--resume", str(folder), "--ensemble", "2"])
    assert [line["step"] for line in evaluations_of(folder)] == [2, 2]
    assert (folder / "best.pt").read_bytes() == best
    monkeypatch.setattr(runs.Folder, "write_pictures", lambda *_: None)
    assert train.main(["--resume", str(folder)]) == 0
    assert "validation DICE 0.5000 (best so far at step 4)" in capsys.readouterr().out
    assert runs.load_run(folder / "best.pt")[2] == 4
    assert [line["protocol"]["ensemble"] for line in evaluations_of(folder)] == [1, 2, 2]


def test_the_minutes_before_a_resume_count(lung_run):
    """An hour is added to last.pt: the run that goes on has it in last.pt and results.json."""
    state = torch.load(lung_run / "last.pt", weights_only=True)
    torch.save(state | {"minutes": state["minutes"] + 60}, lung_run / "last.pt")
    assert train.main(["--resume", str(lung_run), "--steps", "5"]) == 0
    assert 60 <= runs.read_checkpoint(lung_run)["minutes"] < 70
    assert 60 <= results_of(lung_run)["minutes"] < 70


def test_the_log_has_the_learning_rate_of_its_own_step(finished_run):
    """Four steps of a warm-up of 50, none of the next step's."""
    cfg = runs.read_checkpoint(finished_run)["config"]
    found = [line["lr"] for line in log_of(finished_run) if "lr" in line]
    assert found == [train.learning_rate(cfg, step) for step in (1, 2, 3, 4)] and cfg.warmup == 50


def test_the_test_split_is_seen_only_where_asked_for_and_decides_nothing(
    go, finished_run, lung_run, capsys, monkeypatch
):
    """Three images of Test, evaluated once after training, not among the evaluations.

    The same run without it is the same, and can be asked for it later.
    """
    assert "test" not in (finished_run / "log.jsonl").read_text().lower()
    plain = results_of(finished_run)
    assert "Test" not in plain
    load, measure, read, judged = data.load, evaluate.evaluate_masks, [], []

    def recorded(root, task, name, *args, **kwargs):
        read.append(name)
        return load(root, task, name, *args, **kwargs)

    def judge(model, *rest):
        judged.append(model)
        return measure(model, *rest)

    monkeypatch.setattr(data, "load", recorded)
    monkeypatch.setattr(evaluate, "evaluate_masks", judge)
    status, folder = go("--task lung --test", "tested")
    assert status == 0 and read == ["Train", "Val", "Test"]
    assert "Test, 3 images: DICE" in capsys.readouterr().out
    lines = log_of(folder)
    assert [line["step"] for line in lines if "Test" in line] == [4] and "Val" not in lines[-1]
    tested = results_of(folder)
    assert tested["Test"] == lines[-1]["Test"] and tested["Test"]["images"] == 3
    model, cfg, _ = runs.load_run(folder)  # the averaged weights
    for mine, its in zip(model.parameters(), judged[-1].parameters(), strict=True):
        assert torch.equal(mine, its)
    splits = {"Test": load(cfg.data, "lung", "Test", cfg.classes, 16)}
    again, _ = measure(model, cfg, splits, CPU)
    assert json.loads(json.dumps(again["Test"])) == tested["Test"]
    assert tested["evaluation"]["Val"] == plain["evaluation"]["Val"]
    assert "of Test" in (folder / "test.md").read_text()
    kept = (lung_run / "results.json").read_bytes()
    assert train.main(["--resume", str(lung_run), "--test"]) == 0
    beside = lung_run / "evaluations" / "ddim-2-x1-4"  # the finished run keeps its own
    assert results_of(beside)["Test"] == tested["Test"]
    assert (beside / "test.md").read_bytes() == (folder / "test.md").read_bytes()
    assert (lung_run / "results.json").read_bytes() == kept
    assert go("--task synthesis --test", "no")[0] == 2
    rule = "--test evaluates masks; --task synthesis has none"
    assert rule in capsys.readouterr().err


def test_sec21_a_synthesis_run_of_the_sde_is_evaluated_by_eq_7(go, no_pictures):
    """At whole steps, as every other run."""
    assert go("--task synthesis --objective vp")[0] == 0


@pytest.mark.parametrize(
    "words, much",
    [
        ("--batch-size 1000000", "images at least 2.0 GB (--batch-size 1000000, --image-size 16, "),
        ("--ensemble 1000 --image-size 512", "images at least 2.1 GB (--batch-size 4, "),
        ("--set channels=800", "weights and optimiser take "),
    ],
)
def test_what_the_memory_cannot_hold_is_refused_before_anything_is_done(
    go, monkeypatch, capsys, tmp_path, words, much
):
    """One line with the flags and the numbers. No folder, and no image is decoded."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    assert go("--task lung", given=f"{TINY} {words}")[0] == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: weights and optimiser take ") and much in err
    assert err.endswith("; 1.0 GB are free\n") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_resumed_is_not_weighed_again(lung_run, monkeypatch):
    """Its numbers are in memory already, and an evaluation has no gradient and no batch."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.0)
    assert train.main(["--resume", str(lung_run), "--ddim-steps", "1"]) == 0


# ---------------------------------------- --dry-run


def test_dry_run_prints_the_reports_network_and_starts_nothing(
    root, monkeypatch, capsys, tmp_path, elsewhere
):
    """§3.2's number of parameters with 17 channels in; no file; no time where it does not fit."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e9)
    words = ["--task", "lung", "--size", "report", "--recipe", "report", "--device", "cpu"]
    assert train.main([*words, "--data", str(root), "--dry-run", "--out", "x"]) == 0
    out = capsys.readouterr().out
    assert "  steps            4 " in out  # 100 epochs of 18 images in batches of 512
    assert "  epochs " not in out and "phantoms" not in out
    assert "217,887,553 parameters" in out and "  batch_size       512 " in out
    assert "  lr               0.003 " in out
    much = "weights and optimiser take 4.4 GB (--set channels=192), "  # 20 bytes for 218.2 million
    assert f"  time             not measured: {much}" in out and out.endswith("; 2.0 GB are free\n")
    assert not list(tmp_path.iterdir())


def test_dry_run_tells_images_steps_and_time_and_writes_nothing(
    go, root, monkeypatch, capsys, tmp_path
):
    """8 s of 4 steps, and 2 evaluations: 8 images in 2 passes each, a third of a step a batch."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "cost_of_a_step", lambda cfg, device: (2.0, 3.14e9))
    status, folder = go("--task lung --dry-run")
    out = capsys.readouterr().out
    assert status == 0 and out.startswith(f"{folder} on cpu\n")
    assert f"  data             {root}, X-rays\n" in out and "  steps            4 " in out
    assert "  Train            18 images, 4 evaluated\n" in out
    assert "  Val              15 images, 4 evaluated\n" in out and "  Test " not in out
    time = r"  time             about 0:13 \(2\.00? s a step, evaluations included\)\n"
    assert re.search(time + "  memory           about 3.1 GB at the peak of a step\n$", out)
    assert go("--task lung --test --dry-run")[0] == 0
    test = "  Test             3 images, all 3 evaluated (fewer than 4)\n"
    assert test in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_without_a_dataset_draws_no_phantoms(nowhere, elsewhere, capsys, tmp_path):
    """It says which it would draw, and how many. The time is measured, on noise."""
    assert train.main(["--task", "lung", *TINY.split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"  data             {phantoms.PHANTOMS}, phantoms, to be drawn\n" in out
    assert "  Train            1200 images, 4 evaluated\n" in out
    assert re.search(
        r"  time             about \d+:\d\d \(.* s a step, evaluations included\)\n", out
    )
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_resumed_run_tells_what_is_left(lung_run, capsys):
    """Of a finished run nothing; its images stand in one line; Test is evaluated once."""
    words = ["--resume", str(lung_run), "--test", "--dry-run", "--device", "cpu"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "  time             about 0:00 (" in out and out.count("\n  data ") == 1


def test_the_time_of_a_step_is_measured_on_as_many_images_as_take_five_seconds(monkeypatch):
    """By a clock on which AdamW and an image take so long, and a first step 100 s more.

    A larger batch is that line, continued.
    """
    now = 0.0

    def train_step(self, images, masks):
        nonlocal now
        now += 100.0 * (self.step == 0) + adamw + an_image * len(images)
        self.step += 1
        return torch.zeros(())

    sizes = []
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    monkeypatch.setattr(memory, "fit_memory", lambda trainer: sizes.append(trainer.images))
    monkeypatch.setattr(memory, "peak_with", lambda small, cfg: (small.images, cfg.batch_size))
    for adamw, an_image, images, measured in (
        (0, 0.5, 4, [1, 4]),  # the whole batch
        (0.25, 0.25, 100, [1, 10]),
        (2.0, 3.0, 4, [1, 2]),
        (2.0, 3.0, 1, [1]),
    ):
        sizes.clear()
        found, peak = train.cost_of_a_step(tiny(batch_size=images), CPU)
        assert found == pytest.approx(adamw + an_image * images) and sizes == measured
        assert peak == (1, images)
