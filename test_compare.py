"""Runs side by side: rows from known counts, logs and shares, and what the commands print."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import benchmark
import compare
import data
import evaluate
import fullsize
import intervals
import networks
from console import UserError
from data import CLASSES
from metrics import Counts
from test_intervals import gaussian_shares
from testing import CPU, split, tiny


def ignore(*_):
    """A progress that shows nothing."""


def trained(name, seed=0, model=None, **changes):
    """A Trained run, without a network unless one is given."""
    return compare.Trained(f"{name}-{seed}", name, model, tiny(seed=seed, **changes))


# ---------------------------------------- the runs


def test_runs_that_differ_in_their_seed_alone_are_one_row():
    """In the order given; another setting, or one seed twice, is refused by name.

    Copies of the data are not: with --data all runs are judged on one folder.
    """
    a, b, c = trained("a", 0), trained("b", 0, steps=11), trained("a", 1)
    assert compare.groups_of([b, a, c]) == {"b": [b], "a": [a, c]}
    copy = trained("a", 3, data="elsewhere")
    assert compare.groups_of([a, copy]) == {"a": [a, copy]}
    with pytest.raises(UserError, match="^a-2 differs from a-0 in lr, ema; give runs of different"):
        compare.groups_of([a, trained("a", 2, lr=1.0, ema=0.5)])
    with pytest.raises(UserError, match="^a-1: a run named a has its seed, 1$"):
        compare.groups_of([a, c, c])


def test_what_was_held_out_is_looked_at_and_never_what_was_learned(root, elsewhere):
    """Half of Train: the other rows than those that a run with held_out=0.5 learns from."""
    one = trained("a", 0, held_out=0.5)
    everything = data.load(root, "lung", "Train", None, 16)
    learned, expected = data.divided(everything, 0.5)
    found = compare.split_of("held-out", one, root)
    assert found.names == expected.names and not set(found.names) & set(learned.names)
    np.testing.assert_array_equal(found.masks, expected.masks)
    for name in ("Val", "Test"):
        assert compare.split_of(name, one, root).names == data.load(root, "lung", name).names
    one = trained("a", 0, task="infection", classes=("COVID-19",))
    lungs = compare.split_of("Val", one, root, "lung masks")
    where = dict(classes="COVID-19", image_size=16, masks="lung masks")
    np.testing.assert_array_equal(lungs.masks, data.load(root, "infection", "Val", **where).masks)


# ---------------------------------------- DICE


def test_each_way_is_sampled_as_it_says_and_counted_image_by_image(monkeypatch):
    """A mask that says how it was made: its first (masks + 10 passes) pixels; supervised once."""

    def segment(model, cfg, images, rows, device, progress):
        mask = torch.full((len(rows), 256), -1.0)
        mask[:, : cfg.ensemble + 10 * cfg.ddim_steps] = 1
        return mask.view(len(rows), 1, 16, 16)

    monkeypatch.setattr(evaluate, "segment", segment)
    of = split(3)
    found = compare.judge(trained("a"), [(1, 2), (9, 3)], of, False, CPU, ignore)
    assert list(found) == [(1, 2), (9, 3)]
    for (masks, passes), (counts, _) in found.items():
        inside = (of.masks > 127).reshape(3, -1)[:, : masks + 10 * passes]
        np.testing.assert_array_equal(counts.TP, inside.sum(1))
        np.testing.assert_array_equal(counts.TP + counts.FP, masks + 10 * passes)
    supervised = trained("u", model="unet")
    supervised = supervised._replace(cfg=dataclasses.replace(supervised.cfg, model="unet"))
    assert list(compare.judge(supervised, [(1, 2), (9, 3)], of, False, CPU, ignore)) == [(1, 1)]


def test_the_judgement_at_full_size_is_that_of_the_files(root, monkeypatch):
    """Masks that are right at 8x8, files of 16x16: what fullsize says, image by image."""
    Val = data.load(root, "lung", "Val", None, 8)
    right = torch.from_numpy(Val.masks / 127.5 - 1).float()
    monkeypatch.setattr(evaluate, "segment", lambda *_: right)
    found = compare.judge(trained("a"), [(1, 2)], Val, True, CPU, ignore)[1, 2]
    counts, outlines = fullsize.measured(right, Val.files)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.outlines, outlines)
    assert sum(counts.pooled()) == 4 * Val.masks.size


def test_a_row_has_the_dice_of_each_seed_and_its_difference_to_the_first_row():
    """By hand: DICE 2 TP / (2 TP + FP + FN) pooled over two images; seeds are averaged."""

    def counts(TP):
        TP = np.array(TP)
        return compare.Judged(Counts(TP, 0 * TP, 10 - TP, 90 + 0 * TP), None)

    found = {"u-0": {(1, 1): counts([8, 8])}, "u-1": {(1, 1): counts([6, 8])}}
    found["d-0"] = {(1, 2): counts([9, 9]), (9, 2): counts([10, 10])}
    groups = {"u": [trained("u", 0), trained("u", 1)], "d": [trained("d", 0, steps=7)]}
    first, one, nine = compare.rows_of_dice(groups, found)
    u = [2 * 16 / (2 * 16 + 4), 2 * 14 / (2 * 14 + 6)]
    assert first["DICE"] == pytest.approx(u) and first["seeds"] == [0, 1]
    assert "difference" not in first
    assert one["DICE"] == pytest.approx([36 / 38]) and nine["DICE"] == [1.0]
    assert one["difference"] == pytest.approx(36 / 38 - np.mean(u))
    assert (nine["masks"], nine["passes"], nine["steps"]) == (9, 2, 7)
    lines = compare.table_of_dice([first, one, nine]).splitlines()
    assert lines[2] == "| u | 10 | 2 | 1 x 1 | 0.8562 ± 0.0462 |  |"
    assert lines[4].startswith("| d | 7 | 1 | 9 x 2 | 1.0000 | +0.1438 ± ")
    apart = {"u-0": [1.0, np.nan], "u-1": [2.0, 4.0], "d-0": [1.0, 1.25]}  # nan: undefined
    for run, ways in found.items():
        found[run] = {w: one._replace(outlines=np.array(apart[run])) for w, one in ways.items()}
    lines = compare.table_of_dice(compare.rows_of_dice(groups, found)).splitlines()
    assert lines[0].endswith("| less the first row's | outlines, pixels apart |")
    assert lines[2].endswith(" |  | 2.00 ± 1.41 |") and lines[4].endswith(" | 1.12 |")


# ---------------------------------------- minutes


def logged(folder, evaluations, **changes):
    """A Trained run whose log has these evaluations, {step: DICE}, and others beside them."""
    folder.mkdir()
    one = trained(folder.name, **changes)._replace(run=str(folder))
    protocol = compare.runs.protocol_of(one.cfg)
    lines = [{"step": 1, "loss": 0.5, "lr": 0.1}]
    for step, dice in evaluations.items():
        lines.append({"step": step, "protocol": protocol, "Val": {"pooled": {"DICE index": dice}}})
    nine = {"protocol": protocol | {"ensemble": 9}, "Val": {"pooled": {"DICE index": 1.0}}}
    lines.append({"step": 20} | nine)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return one


def test_dice_over_minutes_is_the_mean_of_the_seeds_at_the_steps_of_all(tmp_path):
    """Steps of 6 s: 10 and 20 are minutes 1 and 2. Reached: at the first that has it."""
    a, b = (
        logged(tmp_path / "a", {10: 0.9, 20: 0.96, 30: 0.99}),
        logged(tmp_path / "b", {10: 0.8, 20: 0.94}),
    )
    (row,) = compare.rows_of_time({"a": [a, b]}, {"a": 6.0}, [0.85, 0.86, 0.95, 0.97])
    assert row["minutes"] == pytest.approx([1, 2]) and row["DICE"] == pytest.approx([0.85, 0.95])
    reached = {k: None if v is None else round(v, 6) for k, v in row["reached"].items()}
    assert reached == {"0.85": 1, "0.86": 2, "0.95": 2, "0.97": None}
    line = compare.table_of_time([row]).splitlines()[-1]
    assert line == "| a | 2 | 6.000 | 2.0 | 0.9500 | 1.0 | 2.0 | 2.0 |  |"


@pytest.mark.parametrize("text", ["{", "[1]", '{"Val": 3, "protocol": 4}', '{"Val": {}}'])
def test_a_log_that_is_damaged_is_named(text, tmp_path):
    """Also none at all, and one without an evaluation."""
    one = logged(tmp_path / "a", {10: 0.9})
    log = tmp_path / "a" / "log.jsonl"
    log.write_text(text)
    with pytest.raises(UserError, match="log.jsonl: (cannot be read, or is damaged|holds no)"):
        compare.curve_of(one)
    log.unlink()
    with pytest.raises(UserError, match=r"log.jsonl: cannot be read, .* \(FileNotFoundError\)"):
        compare.curve_of(one)


# ---------------------------------------- a share and its interval


def test_the_study_of_shares_learns_on_what_was_held_out(
    root, lung_run, tmp_path, monkeypatch, capsys
):
    """From the command to the table: the rows that each of the two gets; lungs of infections."""
    seen = []

    def shares_of(networks, split, lungs, masks, device, progress):
        seen.append((split.names, lungs is not None and lungs.sum(), masks))
        return gaussian_shares(20, 1.0, len(seen))

    monkeypatch.setattr(intervals, "shares_of", shares_of)
    change(lung_run, task="infection", classes=("COVID-19",), held_out=0.5)
    out = tmp_path / "shares.json"
    words = ["--masks", "7", "--device", "cpu", "--out", str(out)]
    assert compare.main(["shares", str(lung_run), *words]) == 0
    Train, Val = (data.load(root, "infection", s, "COVID-19", 16) for s in ("Train", "Val"))
    assert [names for names, *_ in seen] == [Train.names[1::2], Val.names]
    lungs = data.load(root, "infection", "Val", "COVID-19", 16, masks="lung masks")
    assert seen[1][1:] == ((lungs.masks > 127).sum(), 7)
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[0] == "| 25 masks" and row[1] == "0.9000" and len(row) == 12
    facts = json.loads(out.read_text())["rows"][0]["conformal"]
    kinds = ("coverage", "width", "interval score")
    assert row[8:11] == [f"{facts[kind]:.3f}" for kind in kinds]


# ---------------------------------------- the command


def change(run, **settings):
    """Write other settings into a run's checkpoint."""
    state = torch.load(run / "last.pt", weights_only=True)
    state["config"] |= settings
    torch.save(state, run / "last.pt")


def test_the_commands_print_their_tables_and_write_their_numbers(
    lung_run, tmp_path, monkeypatch, capsys
):
    """DICE on all images as evaluate.py has it; minutes with a picture; where they come from."""
    monkeypatch.setattr(benchmark, "timed", lambda jobs, device, rounds: dict.fromkeys(jobs, 3.0))
    shutil.copytree(lung_run, tmp_path / "other")
    change(tmp_path / "other", eval_images=5)
    out, runs = tmp_path / "new" / "numbers.json", [str(lung_run), str(tmp_path / "other")]
    words = ["--device", "cpu", "--out", str(out)]
    assert compare.main(["dice", *runs, "--ways", "2x2", "1x1", *words]) == 0
    assert "passes 150/150 " in capsys.readouterr().err  # 15 images, 2 runs, 5 passes each
    numbers = json.loads(out.read_text())
    assert {"compare", "commit", "hardware", "torch", "data", "split", "runs"} <= numbers.keys()
    commit = json.loads((lung_run / "results.json").read_text())["commit"]
    assert numbers["images"] == 15 and numbers["runs"] == dict.fromkeys(runs, commit)
    model, cfg, _ = compare.runs.load_run(lung_run)
    every = dataclasses.replace(cfg, ensemble=2, eval_images=15)
    Val = {"Val": data.load(cfg.data, "lung", "Val", None, 16)}
    report, _ = evaluate.evaluate_masks(model, every, Val, CPU)
    assert numbers["rows"][0]["DICE"] == [report["Val"]["pooled"]["DICE index"]]
    assert numbers["rows"][2]["difference"] == 0 and (numbers["data"], numbers["split"]) == (
        "X-rays",
        "Val",
    )
    assert compare.main(["time", runs[0], *words]) == 0
    numbers = json.loads(out.read_text())
    assert numbers["rows"][0]["minutes"] == pytest.approx([0.1, 0.2])  # evaluated at 2 and 4
    assert compare.table(numbers) in capsys.readouterr().out
    assert (tmp_path / "new" / "numbers.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_two_sizes_compare_at_the_size_of_the_files_alone(
    lung_run, tmp_path, monkeypatch, capsys
):
    """Each is given its own images; without --full-size the two are refused."""
    other = shutil.copytree(lung_run, tmp_path / "other")
    change(other, image_size=32)
    words = ["dice", str(lung_run), str(other), "--device", "cpu", "--ways", "1x1"]
    assert compare.main(words) == 2
    assert f"{other} differs from {lung_run} in image_size" in capsys.readouterr().err
    sizes = []

    def segment(model, cfg, images, rows, device, progress):
        sizes.append((cfg.image_size, images.shape[-1]))
        return torch.ones(len(rows), 1, *images.shape[-2:])

    monkeypatch.setattr(evaluate, "segment", segment)
    out = tmp_path / "numbers.json"
    assert compare.main([*words, "--full-size", "--out", str(out)]) == 0
    one, two = json.loads(out.read_text())["rows"]
    assert sizes == [(16, 16), (32, 32)] and two["difference"] == 0 and one["DICE"] == two["DICE"]


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ("time --full-size", {}, "--full-size is about dice, got time"),
        ("dice", dict(task="synthesis", cond=None), "draws X-rays; compare.py is about masks"),
        ("shares", {}, "must be trained with --set held_out=0.2, got 0"),
        ("dice --split held-out", {}, "must be trained with --set held_out=0.2, got 0"),
        ("shares --masks 1", {}, "--masks must be at least 2 for each of 1 runs, got 1"),
        ("time --rounds 0", {}, "--rounds must be at least 1, got 0"),
        ("dice --out {run}/log.jsonl", {}, "--out must be a new file where one can be written"),
        ("time --out {run}/curves.json", {}, "must not replace anything else, got"),
        ("time --out {run}/new.png", {}, "must not replace anything else, got"),
        ("dice --ddim-steps 5000", {}, "--ddim-steps must be between 1 and T = 1000"),
        ("dice --ways 1x5000", {}, "--ddim-steps must be between 1 and T = 1000"),
    ],
)
def test_bad_input_is_one_line_and_status_2(lung_run, words, changes, message, capsys):
    """The rule and the offending value."""
    if changes:
        cfg = dataclasses.replace(compare.runs.load_run(lung_run)[1], **changes)
        weights = networks.build_model(cfg).state_dict()
        state = {"config": dataclasses.asdict(cfg), "step": 4, "ema": weights}
        torch.save(state, lung_run / "last.pt")
    study, *rest = words.format(run=lung_run).split()
    assert compare.main([study, str(lung_run), *rest, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare.py: error: ") and message in error and error.count("\n") == 1


def test_a_damaged_results_json_is_one_line(lung_run, capsys):
    """It would say at which commit the run was trained."""
    (lung_run / "results.json").write_text("{")
    assert compare.main(["dice", str(lung_run), "--device", "cpu", "--ways", "1x1"]) == 2
    error = capsys.readouterr().err
    assert "results.json: not the results.json of a run that has masks\n" in error
    assert error.count("\n") == 1


def test_runs_of_two_tasks_or_two_folders_are_not_compared(root, lung_run, tmp_path, capsys):
    """Nor what is not masks x passes."""
    other = shutil.copytree(lung_run, tmp_path / "other")
    change(other, task="infection", classes=("COVID-19",))
    assert compare.main(["dice", str(lung_run), str(other), "--device", "cpu"]) == 2
    assert f"{other} differs from {lung_run} in task, classes" in capsys.readouterr().err
    change(other, task="lung", classes=CLASSES, data="elsewhere")
    words = ["dice", str(lung_run), str(other), "--device", "cpu", "--ways", "1x1"]
    assert compare.main(words) == 2
    assert f"{other} differs from {lung_run} in data\n" in capsys.readouterr().err
    assert compare.main([*words, "--data", str(root)]) == 0  # one folder for both
    for way in ("9", "9x0", "x2", "9x2x2", "-1x2"):
        with pytest.raises(SystemExit) as stopped:
            compare.main(["dice", str(lung_run), f"--ways={way}"])
        assert stopped.value.code == 2
        assert f"must be masks x passes, such as 9x2, got {way}" in capsys.readouterr().err
