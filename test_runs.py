"""A run's folder: nothing is lost or silently wrong, and a run goes on where it stopped."""

import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import torch

import config
import data
import devices
import evaluate
import phantoms
import runs
import synthesis
import train
from console import UserError
from testing import (
    CPU,
    ROOT,
    TINY,
    assert_same,
    evaluations_of,
    log_of,
    results_of,
    start,
    state_of,
    tiny,
)

DRAWN = ["--task lung --cond concat", "--task synthesis"]  # each kind of picture once
RUNS = [f"--task lung --cond {cond}" for cond in ("add", "none", "cross")]
RUNS += ["--task infection --cond add", "--task infection --model report-unet"]
RUNS += ["--task lung --target eps --ensemble 2 --set eta=1"]
RUNS += ["--task lung --cond lift --set rrdbs=2 rrdb=segdiff shift=0.5"]


@pytest.mark.parametrize("words", DRAWN + RUNS)
def test_a_run_folder_holds_what_the_docstring_says_and_its_numbers_come_from_its_checkpoint(
    go, root, words, capsys, request
):
    """The last evaluation in results.json equals one made anew from last.pt.

    So the checkpoint is the model that was measured.
    """
    if words not in DRAWN:
        request.getfixturevalue("no_pictures")
    status, folder = go(words)
    assert status == 0
    files = {"config.json", "log.jsonl", "table.md", "results.json", "curves.png"}
    files |= {"last.pt", "best.pt", "samples.png" if "synthesis" in words else "masks.png"}
    assert {f.name for f in folder.iterdir()} == files
    assert all(name in runs.__doc__ for name in files)
    results = results_of(folder)
    model, cfg, step = runs.load_run(folder)
    assert step == 4 and cfg.steps == 4 and results["evaluation"]["step"] == 4
    splits = {name: data.load(root, cfg.task, name, cfg.classes, 16) for name in ("Train", "Val")}
    draws = cfg.task == "synthesis"
    measure = synthesis.evaluate_images if draws else evaluate.evaluate_masks
    report, _ = measure(model, cfg, splits, CPU)
    for name in report:
        assert json.dumps(report[name]) == json.dumps(results["evaluation"][name])
    assert (folder / "table.md").read_text().strip() in capsys.readouterr().out


# ---------------------------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A writer that dies half-way leaves the older file as it was, and nothing beside it."""
    target = tmp_path / "last.pt"
    runs.write_whole(target, lambda f: f.write_text("old"))

    def dies(f):
        f.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_whole(target, dies)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_log_cut_off_by_a_power_cut_is_read_up_to_there(tmp_path):
    """Half a last line: dropped, and the file whole again."""
    path = tmp_path / "log.jsonl"
    log = runs.Log(path)
    log.add(step=1, loss=0.5)
    log.add(step=2, loss=0.25)
    text = path.read_text()
    path.write_text(text[:-5])
    assert runs.Log(path, 9).lines == [dict(step=1, loss=0.5)]
    assert path.read_text() == text.splitlines(keepends=True)[0]


DAMAGED = [b"\xff\xfe\x00", b"3", b"[1, 2]", b'{"loss": 1}', b'{"step": "2"}', b'{"step": 2.0}']
DAMAGED += [b"[" * 10**5, b'{"a":' * 10**5, b'{"step": 2, "lr": 1, "loss": "x"}', b"null", b""]
DAMAGED += [b'{"step": 2, "lr": 1}', b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 2, "Val": 3}']


@pytest.mark.parametrize("words", ["--task lung", "--task synthesis"])
def test_a_run_goes_on_with_the_good_lines_of_a_damaged_log(go, words, no_pictures, capsys):
    """Bytes, numbers, lists, no step, deep nesting, evaluations without a part: left out, told."""
    _, folder = go(words)
    path, good = folder / "log.jsonl", (folder / "log.jsonl").read_bytes().splitlines()
    line = json.loads(good[-1])
    assert "Val" in line
    lacking = [{k: v for k, v in line.items() if k != name} for name in ("protocol", "Train")]
    first = next(name for name in line["Val"] if name != "images")
    lacking += [line | {"Val": {k: v for k, v in line["Val"].items() if k != first}}]
    lacking += [line | {"Val": line["Val"] | {first: "x"}}, line | {"protocol": 3}]
    bad = DAMAGED + [json.dumps(dict(step=3) | part).encode() for part in lacking]
    path.write_bytes(b"\n".join([*bad, *good, *bad, b'{"st']))
    assert train.main(["--resume", str(folder)]) == 0
    assert path.read_bytes().splitlines() == good
    assert f"{path}: {2 * len(bad) + 1} damaged lines are left out\n" in capsys.readouterr().out


def test_what_a_killed_write_leaves_is_known_by_its_name_for_every_file(tmp_path):
    """And a hidden file of somebody else is not taken for it."""
    temporaries = []
    for name in runs.FILES:
        runs.write_whole(tmp_path / name, lambda f: temporaries.append(f.name) or f.touch())
    assert len(temporaries) == 11
    assert all(re.fullmatch(runs.TEMPORARY, name) for name in temporaries)
    assert not re.fullmatch(runs.TEMPORARY, ".notes.7.md")


def test_a_log_is_cut_back_to_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    """Killed after step 2 was logged, with a checkpoint of step 1: step 2 is logged once."""
    log = runs.Log(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.add(step=step, loss=0.5)
    again = runs.Log(tmp_path / "log.jsonl", 1)
    again.add(step=2, loss=0.5)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]


def limited(monkeypatch, what):
    """Writing fails from now on as on a full disk."""

    def fails(*_, **__):
        raise what

    monkeypatch.setattr(torch, "save", fails)


@pytest.mark.parametrize("what", [RuntimeError("torch: unexpected pos"), OSError(28, "No space")])
def test_a_checkpoint_that_does_not_fit_the_disk_is_one_line_and_the_older_one_stays(
    lung_run, monkeypatch, capsys, what
):
    """The file, what it needs and what is free. Torch has a RuntimeError for a full disk."""
    before = {name: (lung_run / name).read_bytes() for name in ("last.pt", "best.pt")}
    limited(monkeypatch, what)
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
    err = capsys.readouterr().err
    why = "(No space left on device|No space|torch: unexpected pos)"
    line = (
        rf"train.py: error: {lung_run}/(\w+.pt): not written: {why}; a new file needs (.+) MB and "
    )
    name, _, size = re.search(line + "an inode beside the old one, which stays; ", err).groups()
    assert float(size) == pytest.approx(len(before[name]) / 1e6, rel=0.3)
    assert err.count("error") == 1 and "Traceback" not in err
    assert before == {name: (lung_run / name).read_bytes() for name in before}
    assert not list(lung_run.glob(".*"))


def test_no_line_of_the_log_is_lost_in_silence_on_a_full_disk(tmp_path):
    """/dev/full: the line names the file."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = runs.Log(tmp_path / "log.jsonl")
    log.path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: not written: No space left on device"):
        log.add(step=1)


def test_a_rename_is_made_to_last_by_its_folder(tmp_path, monkeypatch):
    """After os.replace the folder is synchronised too: in this order."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    def replaced(*paths):
        calls.append("replaced")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    runs.write_whole(tmp_path / "table.md", runs.as_text("a"))
    assert calls == [False, "replaced", True]


def test_a_run_ends_well_where_there_is_no_git(go, monkeypatch, no_pictures):
    """results.json then says that the commit is unknown."""

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    status, folder = go("--task lung")
    assert status == 0 and results_of(folder)["commit"] == "unknown"


# ---------------------------------------- checkpoints


def test_the_commit_is_that_of_this_checkout_and_tells_what_differs_from_it(tmp_path, monkeypatch):
    """Short hash; "+changes" where a file of it differs; nothing for a folder inside of another."""
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "runs.py").write_text("first")
    somebody = ("-c", "user.name=a", "-c", "user.email=b")
    for words in (("init",), ("add", "runs.py"), (*somebody, "commit", "-m", "first")):
        runs.git(*words)
    hash_ = runs.git("rev-parse", "--short", "HEAD")
    assert hash_ and runs.commit() == hash_
    (tmp_path / "results.json").touch()  # what git does not know of is no change
    assert runs.commit() == hash_
    (tmp_path / "runs.py").write_text("second")
    assert runs.commit() == f"{hash_}+changes"
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "archive" / "runs.py"))
    (tmp_path / "archive").mkdir()
    assert runs.commit() == ""


def test_a_damaged_checkpoint_is_refused_by_name(lung_run, capsys):
    """Cut in half: one line, not a traceback; the file is left as it is."""
    last, best = lung_run / "last.pt", lung_run / "best.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert train.main(["--resume", str(lung_run)]) == 2
    rule = f"{last}: not a checkpoint of train.py, or a damaged one"
    assert rule in capsys.readouterr().err and len(last.read_bytes()) == len(whole) // 2
    state = torch.load(best, weights_only=True)
    state["config"]["channels"] = 8
    torch.save(state, best)
    with pytest.raises(UserError, match="best.pt: its weights do not fit its configuration"):
        runs.load_run(best)
    state["config"]["channels"] = 4
    next(iter(state["ema"].values()))[0] = math.nan
    torch.save(state, best)
    with pytest.raises(UserError, match="best.pt: a weight is not finite"):
        runs.load_run(best)


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(lung_run):
    """40 bits all over the file: each is refused, or lies where nothing is stored."""
    path = lung_run / "last.pt"
    whole, expected = path.read_bytes(), runs.read_checkpoint(path)
    rng, seen = random.Random(0), 0
    for _ in range(40):
        place = rng.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << rng.randrange(8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        try:
            found = runs.read_checkpoint(path)
        except UserError as e:
            seen += str(e).startswith(f"{path}: not a checkpoint of train.py, or a damaged one (")
        else:
            assert_same(found | {"written": 0}, expected | {"written": 0})
    assert seen >= 36


WRONG = dict(
    step=[-5, 1.5, None, True, math.nan, 3, "4", [4]],
    minutes=[math.nan, -1.0, "1", None],
    images=[0, 1.5, None, True],
    command=[3, None],
    model=[None, {}, 3],
    ema=[None, {}, 3],
    optimizer=[None, {}, dict(state={}), dict(state=3), dict(state=[])],
    config=[None, {}, 3, dict(T=3)],
)
WRONG_SETTINGS = dict(
    objective=["x", None],
    sampler=["y", 3],
    task=["z", None, "synthesis"],
    channels=[10**9, "4", None, 4.0, True],
    blocks=[10**7, -1],
    T=[10**10, None],
    rrdbs=[10**9],
    growth=[10**9],
    head_channels=[10**12],
    image_size=[10**9, 16.0],
    channel_mult=[(1,) * 10**6, (10**9, 1, 1, 1), ("1", 1, 1, 1), (1.5, 1, 1, 1), 3],
    attention_levels=[(-1,), ("3",), (10**10,)],
    weight_decay=[math.inf, math.nan, None],
    cond=["w", None, "none"],
    classes=[("x",), (3,), ()],
    surprise=[1],
)


def refused(path, state, capsys):
    """--resume of this state is one line with status 2, and changes nothing. Returns the line."""
    folder = path.parent
    torch.save(state, path)
    before = contents_of(folder) | {"log": (folder / "log.jsonl").read_bytes()}
    assert train.main(["--resume", str(folder), "--steps", "6"]) == 2
    assert contents_of(folder) | {"log": (folder / "log.jsonl").read_bytes()} == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and len(err) < 600
    return err


def test_every_part_of_a_checkpoint_is_checked_before_anything_is_built(lung_run, capsys):
    """Missing, of another type, or out of range: one line, status 2, and nothing is written."""
    path, state = lung_run / "last.pt", torch.load(lung_run / "last.pt", weights_only=True)
    wrong = [{name: value} for name, values in WRONG.items() for value in values]
    for name, values in WRONG_SETTINGS.items():
        wrong += [{"config": state["config"] | {name: value}} for value in values]
    for changes in wrong[::8]:
        assert str(path) in refused(path, state | changes, capsys), changes
    for changes in wrong:  # the same without the command: nothing is written by reading
        torch.save(state | changes, path)
        with pytest.raises(UserError) as error:
            runs.read_checkpoint(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value), changes
    for name in WRONG:
        refused(path, {k: v for k, v in state.items() if k != name}, capsys)
    refused(path, [state], capsys)


def test_every_tensor_of_a_checkpoint_is_checked_before_anything_is_written(lung_run, capsys):
    """A moment of another shape made AdamW write out of bounds."""
    path, whole = lung_run / "last.pt", torch.load(lung_run / "last.pt", weights_only=True)
    first = next(iter(whole["ema"]))
    for part in ("ema", "model"):
        tensor = whole[part][first]
        for value in (tensor[:1], tensor.double(), 3, None, tensor.to_sparse()):
            refused(path, whole | {part: whole[part] | {first: value}}, capsys)
        refused(path, whole | {part: whole[part] | {"more": tensor}}, capsys)
        for value in (math.nan, math.inf):
            line = refused(path, whole | {part: whole[part] | {first: tensor * value}}, capsys)
            assert f"a weight is not finite: {part}" in line
    state = whole["optimizer"]["state"]
    shape = state[0]["exp_avg"].shape
    changes = [dict(exp_avg=torch.zeros(3)), dict(exp_avg=torch.zeros(shape).double())]
    changes += [dict(exp_avg=torch.zeros(1).expand(shape)), dict(exp_avg=None), dict(more=3)]
    changes += [dict(exp_avg_sq=torch.full(shape, value)) for value in (math.nan, math.inf, -1.0)]
    changes += [dict(step=torch.tensor(value)) for value in (-1.0, 3.0, math.nan, 4)]
    for change in changes:
        moments = state | {0: state[0] | change}
        optimizer = whole["optimizer"] | {"state": moments}
        refused(path, whole | {"optimizer": optimizer}, capsys)
    lacking = {k: v for k, v in state.items() if k}
    for moments in ({}, lacking, {0: state[0]}):
        refused(path, whole | {"optimizer": whole["optimizer"] | {"state": moments}}, capsys)


def test_a_best_pt_in_the_place_of_last_pt_can_be_sampled_but_not_gone_on_from(lung_run, capsys):
    shutil.copy(lung_run / "best.pt", lung_run / "last.pt")
    assert train.main(["--resume", str(lung_run)]) == 2
    what = "last.pt has no command, images, minutes, model, optimizer; a best.pt has the averaged"
    assert what in capsys.readouterr().err
    assert runs.load_run(lung_run)[2] in (2, 4)


def test_a_run_with_a_preset_is_read_and_goes_on_with_the_same_numbers(lung_run, tmp_path):
    """Before size and recipe were two choices, a checkpoint had preset and clip in their place."""
    other = shutil.copytree(lung_run, tmp_path / "other")
    state = torch.load(other / "last.pt", weights_only=True)
    settings = state["config"]
    assert (settings.pop("size"), settings.pop("recipe")) == ("small", "best")
    settings |= dict(preset="small", clip=settings.pop("max_grad_norm"))
    torch.save(state, other / "last.pt")
    (model, *rest), (expected, *same) = runs.load_run(other), runs.load_run(lung_run)
    assert rest == same
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    for folder in (lung_run, other):
        assert train.main(["--resume", str(folder), "--steps", "6"]) == 0
    assert_same(state_of(other), state_of(lung_run))
    assert json.dumps(log_of(other)) == json.dumps(log_of(lung_run))


def test_a_run_of_several_noises_is_read_but_trains_no_further(lung_run, capsys):
    """Its batches cannot be drawn any more; its masks can."""
    state = torch.load(lung_run / "last.pt", weights_only=True)
    state["config"]["noises"] = 2
    torch.save(state, lung_run / "last.pt")
    assert train.main(["--resume", str(lung_run), "--ensemble", "2"]) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
    assert "several noises an image, which is no more" in capsys.readouterr().err


# ---------------------------------------- going on


RESUMED = ["--task lung", "--task synthesis", "--task lung --model unet"]
RESUMED += ["--task lung --precision bf16 --set eta=0.5 augment=1"]


@pytest.mark.parametrize("words", RESUMED)
def test_a_resumed_run_is_an_uninterrupted_run_bit_for_bit(
    go, monkeypatch, words, capsys, no_pictures
):
    """SIGINT in the first step and in the third, --resume after each.

    Weights, averages, optimiser and evaluations equal those of a run that was left alone.
    """
    words = f"{words} --steps 5 --batch-size 5"
    given = TINY.replace("--batch-size 4 ", "").replace("--steps 4 ", "")
    given = given.replace("--precision fp32 ", "") if "bf16" in words else given
    _, whole = go(words, "whole", given)
    step = train.Trainer.train_step

    def interrupted(self, *batch):
        loss = step(self, *batch)
        if self.step in (1, 3):
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    status, folder = go(words, "stopped", given)
    for stopped_at in (1, 3):
        go_on = f"go on with: python train.py --resume {folder}"
        assert status == 130 and go_on in capsys.readouterr().out
        assert state_of(folder)["step"] == stopped_at
        status = train.main(["--resume", str(folder)])
    assert status == 0
    assert_same(state_of(whole), state_of(folder))
    evaluations = [json.dumps(evaluations_of(folder)) for folder in (whole, folder)]
    assert evaluations[0] == evaluations[1] and len(evaluations_of(whole)) == 3


@pytest.mark.parametrize("objective", ["ncsn", "vp"])
def test_sec21_a_run_learns_samples_and_is_resumed_by_each_objective(go, objective, no_pictures):
    """ncsn is sampled at its own levels, and half a run goes on as an uninterrupted one.

    The configuration says what it learned, and it learned something else than Eq. (7).
    """
    words = f"--task lung --objective {objective} --set lr_decay=none"
    given = TINY.replace("--ddim-steps 2", "--ddim-steps 11")
    status, whole = go(words, "whole", given)
    _, half = go(words, "half", given.replace("--steps 4", "--steps 2"))
    resume = ["--resume", str(half), "--steps", "4", "--device", "cpu"]
    assert status == 0 and train.main(resume) == 0
    weights = dict(state_of(whole)["model"])
    torch.testing.assert_close(dict(state_of(half)["model"]), weights, rtol=0, atol=0)
    by_eq7 = state_of(go("--task lung --set lr_decay=none", "other")[1])["model"]
    assert any(not torch.equal(v, by_eq7[k]) for k, v in weights.items())
    cfg = runs.read_checkpoint(whole)["config"]
    sampler = {"ncsn": "langevin", "vp": "ddim"}[objective]
    assert (cfg.objective, cfg.sampler) == (objective, sampler)


def test_a_finished_run_is_not_overwritten_and_can_be_prolonged(go, lung_run, capsys):
    """The same command again is refused with what to do; --resume --steps goes on.

    Fewer steps, or a setting that is fixed, are refused.
    """
    assert go("--task lung")[0] == 2
    rule = f"{lung_run} holds a run already; go on with --resume {lung_run}"
    assert rule in capsys.readouterr().err
    resume = ["--resume", str(lung_run)]
    assert train.main([*resume, "--lr", "1", "--set", "ema=0"]) == 2
    rule = "--resume keeps the run's settings, but steps, data, device and evaluation"
    assert f"{rule}, got --lr, --set ema\n" in capsys.readouterr().err
    assert train.main([*resume, "--steps", "3"]) == 2
    assert "--steps must be at least the 4 steps" in capsys.readouterr().err
    assert train.main([*resume, "--seed", "0"]) == 2  # 0 is a value too
    assert train.main([*resume, "--set", "eta=0"]) == 0
    assert train.main(["--resume", str(lung_run / "best.pt")]) == 2
    rule = f"--resume takes the run folder: --resume {lung_run}"
    assert rule in capsys.readouterr().err
    assert train.main([*resume, "--steps", "6"]) == 0
    assert state_of(lung_run)["step"] == 6
    assert [line["step"] for line in evaluations_of(lung_run)] == [2, 4, 6]


def contents_of(folder):
    """{path: bytes} of a folder, but for the log."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "log.jsonl"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_a_finished_run_is_evaluated_anew_under_another_protocol_and_not_trained(
    lung_run, capsys, monkeypatch
):
    """--resume --ensemble 3: another folder, the same weights; asked twice, made once.

    The run keeps its files, its best.pt and how it samples. Its log gains a line. Then the run
    goes on under its own protocol. An interrupted evaluation changes nothing.
    """
    before, name, sample = contents_of(lung_run), "ddim-2-x3-5", evaluate.sample_masks
    words = ["--resume", str(lung_run), "--ensemble", "3", "--eval-images", "5"]

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return sample(*args, **kwargs)

    monkeypatch.setattr(evaluate, "sample_masks", interrupted)
    assert train.main(words) == 130 and contents_of(lung_run) == before
    assert "stopped; the run stays as it was\n" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "sample_masks", sample)
    for _ in range(2):
        assert train.main(words) == 0
    out = capsys.readouterr().out
    assert out.count(f"evaluations/{name}/\n") == 3 and "best so far" not in out
    after = contents_of(lung_run)
    beside = {f"evaluations/{name}/{file}" for file in ("table.md", "results.json", "masks.png")}
    assert after.keys() == before.keys() | beside and after.items() >= before.items()
    lines = evaluations_of(lung_run)
    assert [line["protocol"]["ensemble"] for line in lines] == [1, 1, 3]
    assert lines[-1]["Val"]["images"] == 5
    last = results_of(lung_run / "evaluations" / name)["evaluation"]
    assert {k: v for k, v in last.items() if k != "seconds"} == lines[-1]
    assert runs.load_run(lung_run)[1].ensemble == 1
    assert train.main(["--resume", str(lung_run)]) == 0 and contents_of(lung_run) == after
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 0
    assert [line["protocol"]["ensemble"] for line in evaluations_of(lung_run)] == [1, 1, 3, 1]
    assert results_of(lung_run)["evaluation"]["step"] == 6


def test_a_run_can_be_measured_on_a_part_of_train_that_it_does_not_learn(root, go, monkeypatch):
    """--set held_out=0.5: half of Train is learned, the other half evaluated; the table says so."""
    seen = {}
    monkeypatch.setattr(train.Run, "__init__", spy(train.Run.__init__, seen))
    status, folder = go("--task lung --set held_out=0.5")
    whole = data.load(root, "lung", "Train", image_size=16)
    learned, held_out = data.divided(whole, 0.5)
    assert status == 0 and seen["Train"] == learned.names and seen["Val"] == held_out.names
    assert "of held-out train**" in (folder / "table.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["held_out"] == 0.5
    n = results["evaluation"]["Train"]["images"]
    assert n == min(len(learned.names), 4)


def spy(init, seen):
    """Run.__init__ that notes the names of its splits."""

    def noted(self, cfg, device, path, splits, *rest):
        seen.update({name: split.names for name, split in splits.items()})
        init(self, cfg, device, path, splits, *rest)

    return noted


def test_a_run_killed_before_its_results_are_written_writes_them_when_it_goes_on(lung_run):
    """results.json of an older step, or none: --resume of the finished run writes it."""
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 0
    whole, path = results_of(lung_run), lung_run / "results.json"
    older = whole | {"evaluation": whole["evaluation"] | {"step": 4}}
    for text in (json.dumps(older), "[1", "[" * 100_000):
        path.write_text(text)
        assert train.main(["--resume", str(lung_run)]) == 0
        assert results_of(lung_run)["evaluation"] == whole["evaluation"]
    path.unlink()
    assert train.main(["--resume", str(lung_run)]) == 0 and path.exists()


def test_a_run_killed_after_it_logged_an_evaluation_has_its_best_pt(go, monkeypatch, no_pictures):
    """It was saved at that step already, so that --resume does not evaluate it again."""
    add = runs.Log.add

    def killed(log, **line):
        add(log, **line)
        if "Val" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(runs.Log, "add", killed)
    status, folder = go("--task lung", given=TINY.replace("--steps 4", "--steps 2"))
    assert status == 130 and state_of(folder)["step"] == 2
    monkeypatch.setattr(runs.Log, "add", add)
    assert train.main(["--resume", str(folder)]) == 0
    assert runs.load_run(folder / "best.pt")[2] == 2 and len(evaluations_of(folder)) == 1


@pytest.mark.parametrize("name", ["log.jsonl", "results.json", "curves.png"])
def test_a_pipe_in_a_run_folder_is_refused_before_anything_is_read_or_written(
    lung_run, monkeypatch, capsys, name
):
    read, path = Path.read_bytes, lung_run / name
    path.unlink()
    os.mkfifo(path)
    before = {file: read(file) for file in lung_run.iterdir() if file != path}
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: pytest.fail("waits") if p == path else read(p)
    )
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
    assert f"train.py: error: {path}: is there, and is not a file" in capsys.readouterr().err
    assert before == {file: read(file) for file in lung_run.iterdir() if file != path}


def test_a_log_that_cannot_be_read_leaves_config_json_as_it_was(lung_run, monkeypatch, capsys):
    def unreadable(*_):
        raise PermissionError("log.jsonl")

    before = (lung_run / "config.json").read_bytes()
    monkeypatch.setattr(runs, "Log", unreadable)
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
    assert (lung_run / "config.json").read_bytes() == before
    assert "train.py: error: log.jsonl" in capsys.readouterr().err


def test_sec44_a_finished_supervised_run_is_prolonged_but_has_no_passes_to_change(
    go, no_pictures, capsys
):
    status, folder = go("--task lung --model unet")
    assert status == 0 and train.main(["--resume", str(folder), "--ensemble", "9"]) == 2
    rule = "--ensemble is about diffusion; --model unet answers in one pass, got 9"
    assert rule in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--steps", "5", "--eval-images", "5"]) == 0
    assert state_of(folder)["step"] == 5


# ---------------------------------------- whose folder it is


def test_two_runs_at_once_in_one_folder_the_second_is_refused(lung_run, go, capsys, tmp_path):
    """By --resume and by --out: one line. The lock leaves no file, and dies with its holder."""
    before = contents_of(tmp_path)
    with devices.locked(lung_run):
        assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
        rule = f"train.py: error: {lung_run}: another run is writing there; choose another --out\n"
        assert capsys.readouterr().err == rule and contents_of(tmp_path) == before
    (tmp_path / "new").mkdir()
    holder = "import pathlib, sys, time, devices\nwith devices.locked(pathlib.Path(sys.argv[1])):"
    holder += "\n    print(1, flush=True); time.sleep(99)"
    with start(["-c", holder, tmp_path / "new"], ROOT) as process:
        process.stdout.readline()
        assert go("--task lung", "new")[0] == 2 and not list((tmp_path / "new").iterdir())
        process.kill()
        process.wait()
        assert go("--task lung", "new")[0] == 0


def test_a_run_that_another_process_went_on_with_meanwhile_is_not_rewound(lung_run, monkeypatch):
    """last.pt is read, then another process writes it and ends, then the lock is free."""
    load = runs.load_splits

    def meanwhile(*args):
        other = torch.load(lung_run / "last.pt", weights_only=True)
        runs.write_whole(lung_run / "last.pt", lambda f: torch.save(other, f))
        return load(*args)

    monkeypatch.setattr(runs, "load_splits", meanwhile)
    before = (lung_run / "log.jsonl").read_bytes()
    assert train.main(["--resume", str(lung_run), "--steps", "6"]) == 2
    assert state_of(lung_run)["step"] == 4 and (lung_run / "log.jsonl").read_bytes() == before


def test_a_new_run_does_not_take_the_folder_of_one_that_began_meanwhile(
    go, finished_run, tmp_path, monkeypatch, capsys
):
    """The folder is free, then another process trains there and ends, then the lock is free."""
    load = runs.load_splits

    def meanwhile(*args):
        shutil.copytree(finished_run, tmp_path / "run")
        return load(*args)

    monkeypatch.setattr(runs, "load_splits", meanwhile)
    status, folder = go("--task lung --seed 1")
    assert status == 2 and f"{folder} holds a run already; " in capsys.readouterr().err
    assert contents_of(folder) == contents_of(finished_run)


@pytest.mark.parametrize("name", ["config.json", "table.md", "notes.txt", ".git"])
def test_a_folder_of_other_files_is_no_run_folder(go, tmp_path, capsys, name):
    """Also where their names are those of a run's files: nothing is overwritten."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    status, folder = go("--task lung")
    rule = f"{folder} holds other files, such as {name}; choose another --out"
    assert status == 2 and rule in capsys.readouterr().err
    assert contents_of(folder) == {name: b"mine"}


def test_a_run_whose_first_step_never_came_leaves_its_folder_free(go, monkeypatch, no_pictures):
    """Killed in its first step; also before last.pt was whole. The next run starts anew."""

    def dies(*_):
        raise SystemExit(9)

    with monkeypatch.context() as first:
        first.setattr(train.Trainer, "train_step", dies)
        assert go("--task lung --seed 1")[0] == 9
    status, folder = go("--task lung")
    assert status == 0 and runs.load_run(folder)[1].seed == 0
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".last.7.pt").write_text("ha")
    assert go("--task lung")[0] == 0


def test_what_a_killed_run_left_behind_is_removed_when_the_run_goes_on(lung_run):
    """Its own temporary files, and no other."""
    places = [lung_run, lung_run / "evaluations" / "ddim-2-x1-4"]
    places[1].mkdir(parents=True)
    for place in places:
        for name in (".last.123.pt", ".results.7.json", ".mine.7.json", ".last.pt"):
            (place / name).touch()
    assert train.main(["--resume", str(lung_run), "--steps", "5"]) == 0
    left = {f.name for place in places for f in place.glob(".*")}
    assert left == {".mine.7.json", ".last.pt"}


# ---------------------------------------- the images of a run


def test_without_a_dataset_phantoms_are_announced_and_a_given_folder_never_falls_back(
    root, nowhere, monkeypatch, capsys, tmp_path, no_pictures, elsewhere
):
    """The paragraph names where it looked; everything that the run writes says phantoms."""
    monkeypatch.setattr(phantoms, "PHANTOMS", root)
    monkeypatch.setattr(phantoms, "ensure_phantoms", lambda *_: None)
    folder = tmp_path / "run"
    assert train.main(["--task", "lung", *TINY.split(), "--out", str(folder)]) == 0
    home = nowhere / "COVID-QU-Ex"
    assert f"No X-rays found: COVID-QU-Ex is looked for in {home}" in capsys.readouterr().out
    assert "phantoms" in (folder / "table.md").read_text()
    assert results_of(folder)["config"]["phantoms"] is True
    assert train.main(["--task", "lung", "--data", str(nowhere), *TINY.split()]) == 2


def test_a_run_goes_on_with_the_images_it_began_with(lung_run, monkeypatch, capsys):
    """Another number of training images is refused.

    A run on phantoms given by name does not move to other images.
    """
    state = torch.load(lung_run / "last.pt", weights_only=True)
    seen, load = [], data.load

    def recorded(root, *args, **kwargs):
        seen.append(root)
        return load(root, *args, **kwargs)

    monkeypatch.setattr(data, "load", recorded)
    settings = state["config"] | {"phantoms": True}
    torch.save(state | {"config": settings}, lung_run / "last.pt")
    assert train.main(["--resume", str(lung_run)]) == 0 and set(seen) == {settings["data"]}
    torch.save(state | {"images": 99}, lung_run / "last.pt")
    assert train.main(["--resume", str(lung_run)]) == 2
    rule = f"{lung_run} was trained on 99 images, and Train of"
    assert rule in capsys.readouterr().err


def found(words, cfg):
    """images_found of a command line."""
    return runs.images_found(config.parse(words.split()), cfg)


@pytest.mark.parametrize("words", ["", "--test"])
def test_the_images_that_a_dry_run_counts_are_those_that_a_run_loads(root, elsewhere, words):
    """Of each task and of chosen classes; Test where it is asked for; which kind they are."""
    words = f"--data {root} {words}"
    for changes in (
        dict(),
        dict(task="infection", classes=("COVID-19",)),
        dict(task="synthesis", cond=None),
        dict(classes=("Normal", "COVID-19")),
    ):
        cfg = tiny(**changes)
        where, sizes = found(words, cfg)
        _, splits = runs.load_splits(config.parse(words.split()), cfg, None, None)
        assert sizes == {name: len(split.images) for name, split in splits.items()}
        assert where == f"{root}, X-rays" and ("Test" in sizes) == ("--test" in words)


def test_phantoms_that_are_not_drawn_yet_are_counted_as_they_will_be(nowhere, monkeypatch):
    """Before and after: the same numbers. Nothing is drawn by counting."""

    def write_all(jobs, options, progress):  # in this process
        for index, job in enumerate(jobs, 1):
            phantoms.write_one(*job, index, *options)

    lung, infection = (2, 1, 1), (3, 1, 2)  # of each class
    counts = {
        data.TREES[task]: {split: dict(zip(data.CLASSES, numbers)) for split in data.SPLITS}
        for task, numbers in (("lung", lung), ("infection", infection))
    }
    counts[data.TREES["lung"]]["Val"]["COVID-19"] = 4
    monkeypatch.setattr(phantoms, "PHANTOM_COUNTS", counts)
    monkeypatch.setattr(phantoms, "write_all", write_all)
    cases = [("--test", tiny()), ("", tiny(classes=("COVID-19",))), ("", tiny(task="synthesis"))]
    cases += [("", tiny(task="infection", classes=("COVID-19",)))]
    before = [found(words, cfg) for words, cfg in cases]
    assert not nowhere.exists()
    assert {where for where, _ in before} == {f"{phantoms.PHANTOMS}, phantoms, to be drawn"}
    assert before[0][1] == {"Train": 4, "Val": 6, "Test": 4}
    for task in ("lung", "infection"):
        phantoms.ensure_phantoms(task)
    after = [found(words, cfg) for words, cfg in cases]
    assert [sizes for _, sizes in after] == [sizes for _, sizes in before]
    assert {where for where, _ in after} == {f"{phantoms.PHANTOMS}, phantoms"}


def test_the_images_of_a_run_on_phantoms_that_lie_elsewhere_are_counted_as_they_will_be(nowhere):
    """As find_data: the same phantoms of this checkout, drawn or not."""
    cfg = tiny(phantoms=True, data=str(nowhere / "another machine's"))
    assert found("", cfg)[0] == f"{phantoms.PHANTOMS}, phantoms, to be drawn"


def test_steps_and_evaluations_follow_from_the_images():
    """3 epochs of 10 images in batches of 4: 7.5, so 8 steps; 3 evaluations: after 3, 6 and 8."""
    cfg = runs.with_steps(tiny(steps=0, epochs=3.0, evaluations=3), 10)
    assert (cfg.steps, cfg.eval_every) == (8, 3)
    assert runs.with_steps(tiny(steps=0, epochs=2.5), 10).steps == 7  # of 6.25
    cfg = runs.with_steps(tiny(steps=5, epochs=3.0, eval_every=4), 10)
    assert (cfg.steps, cfg.eval_every) == (5, 4)


def test_guidance_belongs_to_the_protocol_of_a_run_that_is_given_something():
    """A run from before there was guidance finds its own evaluations again."""
    assert "guidance" not in runs.protocol_of(tiny())
    given = tiny(task="synthesis", cond=None, given="class", guidance=2.0)
    assert runs.protocol_of(given)["guidance"] == 2.0
