"""§4.3: a trained network in use; what is sampled and measured does not depend on who asks."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import data
import diffusion
import evaluate
import image_metrics
import metrics
import score
from testing import CPU, SIZES, Oracle, shake, split, tiny

# ---------------------------------------- sampling


@pytest.mark.parametrize("target", diffusion.TARGETS)
@pytest.mark.parametrize("sampler", config.SAMPLERS)
def test_every_sampler_finds_the_mask_that_the_network_knows_in_the_passes_it_says(sampler, target):
    """Ideal network, 12 passes (DDPM: 20 steps in all): the mask of every member.

    The progress line counts as many passes as were made.
    """
    T = 20 if sampler == "ddpm" else 1000
    cfg, counted = tiny(sampler=sampler, ddim_steps=12, target=target, T=T), []
    config.check(cfg)
    y = data.to_float(split(3).images)
    masks = evaluate.sample_masks(Oracle(cfg), cfg, y, [0, 1, 2], 2, progress=counted.append)
    passes = evaluate.passes_of(cfg)
    assert counted == [6] * passes and passes <= max(12, T if sampler == "ddpm" else 0)
    expected = torch.where(y > 0, 1.0, -1.0)[:, None].expand(3, 2, 1, 16, 16)
    torch.testing.assert_close(masks, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize(
    "sampler, passes", [("ddim", 1000), ("ode", 59), ("sde", 300), ("pc", 301), ("langevin", 901)]
)
def test_every_sampler_draws_the_distribution_that_the_network_knows(sampler, passes, shift):
    """Pixels N(0.3, 0.04), exact noise predictor: mean and standard deviation of 2048 pixels.

    On a shifted schedule too.
    """
    synthesis = dict(task="synthesis", cond=None, target="eps")
    cfg = tiny(**synthesis, sampler=sampler, ddim_steps=passes, shift=shift)
    s = diffusion.shifted(diffusion.linear_schedule(cfg.T), shift)

    class World:
        def denoise(self, xt, t, e):
            a, v = diffusion.at(s.abar.sqrt(), t, xt), diffusion.at(1 - s.abar, t, xt)
            return v.sqrt() * (xt - a * 0.3) / (a * a * 0.04 + v)

    x0 = evaluate.sample_images(World(), cfg, range(8))
    assert float(x0.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x0.std()) == pytest.approx(0.2, rel=0.08)


@pytest.mark.parametrize("sampler", config.SAMPLERS)
def test_every_sampler_keeps_an_image_beyond_the_range_at_its_end(sampler):
    """A network whose x_0 is 3 everywhere: x_0_hat is clipped in each pass, the sample is 1."""
    T = 20 if sampler == "ddpm" else 1000
    synthesis = dict(task="synthesis", cond=None, target="x0")
    cfg = tiny(**synthesis, sampler=sampler, ddim_steps=12, T=T)

    class Bright:
        def denoise(self, xt, t, e):
            return torch.full_like(xt, 3.0)

    x0 = evaluate.sample_images(Bright(), cfg, range(2))
    torch.testing.assert_close(x0, torch.ones_like(x0), rtol=0, atol=0.05)


def test_eta_is_that_of_ddim_and_comes_from_the_command_line():
    """--set eta=0.7: the masks are those of ddim_sample with eta = 0.7, and others than with 0."""
    words = f"--task lung {SIZES} --ddim-steps 4 --set channels=4 eta=0.7"
    cfg = config.configure(config.parse(words.split()), CPU)
    model, y = shake(config.build_model(cfg)), data.to_float(split(2).images)
    found = evaluate.sample_masks(model, cfg, y, [3, 8])[:, 0]
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    eps_model = evaluate.eps_model_of(model, cfg, s, CPU)
    noise, e = diffusion.ImageNoise(evaluate.EVAL_SEED, [3, 8], (1, 16, 16)), model.embed(y)
    torch.testing.assert_close(found, diffusion.ddim_sample(s, eps_model, noise, e, 4, eta=0.7))
    still = dataclasses.replace(cfg, eta=0.0)
    assert (evaluate.sample_masks(model, still, y, [3, 8])[:, 0] - found).abs().max() > 0.1


def test_the_corrector_has_the_signal_to_noise_ratio_of_its_paper(monkeypatch):
    """[20] corrects with r = 0.16; sampler sde does not correct."""
    ratios = []

    def reverse_sde(process, at_time, noise, ts, correct=None):
        ratios.append(correct)
        return noise()

    monkeypatch.setattr(score, "reverse_sde", reverse_sde)
    for sampler in ("pc", "sde"):
        cfg = tiny(task="synthesis", cond=None, sampler=sampler, ddim_steps=12)
        evaluate.sample_images(None, cfg, range(1))
    assert ratios == [0.16, None]


def test_sec44_the_mask_of_a_supervised_network_is_its_probability():
    """2 p - 1 in [-1, 1], above 0 where p is above 1/2; one pass an image, whatever the index."""
    cfg, passed = tiny(model="unet", cond=None), []
    model, y = config.build_model(cfg), data.to_float(split(3).images)
    found = evaluate.sample_masks(model, cfg, y, [5, 6, 7], progress=passed.append)
    torch.testing.assert_close(found, (2 * model(y).sigmoid() - 1)[:, None])
    assert passed == [3] and evaluate.passes_of(cfg) == 1 and found.shape == (3, 1, 1, 16, 16)


def test_every_run_evaluates_the_same_images_and_starts_from_the_same_x_T():
    """§4.3: the choice depends on the size of the split alone; too few images are all taken.

    Not on the run's seed.
    """
    assert evaluate.evaluated_rows(100, 5).tolist() == [5, 20, 36, 82, 93]
    assert len(set(evaluate.evaluated_rows(100, 50))) == 50
    assert evaluate.evaluated_rows(3, 5).tolist() == [0, 1, 2]
    x_T, y = [], data.to_float(split(2).images)

    class Records(Oracle):
        def denoise(self, xt, t, e):
            x_T.append(xt)
            return torch.zeros_like(xt)

    for seed in (0, 1):
        cfg = tiny(seed=seed, ddim_steps=1)
        evaluate.sample_masks(Records(cfg), cfg, y, [4, 9])
    assert torch.equal(*x_T)


def test_an_ensemble_is_the_mean_of_its_members_and_the_first_member_is_the_single_mask():
    """Amit et al.: average, then threshold."""
    cfg, images = tiny(ddim_steps=3), split(3).images
    model, y = shake(config.build_model(cfg)), data.to_float(images)
    members = evaluate.sample_masks(model, cfg, y, [0, 1, 2], 4)
    assert members.shape == (3, 4, 1, 16, 16) and members.std(1).mean() > 0.01
    of_four = dataclasses.replace(cfg, ensemble=4)
    mean = evaluate.segment(model, of_four, images, np.arange(3), CPU)
    torch.testing.assert_close(mean, members.mean(1), atol=1e-4, rtol=0)
    single = evaluate.sample_masks(model, cfg, y, [0, 1, 2])[:, 0]
    torch.testing.assert_close(single, members[:, 0], atol=1e-4, rtol=0)


def test_an_evaluation_does_not_depend_on_the_batch_size(monkeypatch):
    """The same masks, to rounding, for batches of 1, 3 and all: noise belongs to the image."""
    cfg, images = tiny(eval_images=7, ensemble=2, eta=0.5, ddim_steps=4), split(9).images
    model, rows, masks = shake(config.build_model(cfg)), evaluate.evaluated_rows(9, 7), []
    for size in (1, 3, 7):

        def in_chunks(function, rows, *_, size=size):
            return [(chunk, function(chunk)) for chunk in np.split(rows, range(size, 7, size))]

        monkeypatch.setattr(evaluate, "in_chunks", in_chunks)
        masks.append(evaluate.segment(model, cfg, images, rows, CPU))
    assert masks[0].std() > 0.1
    for m in masks[1:]:
        torch.testing.assert_close(m, masks[0], rtol=0, atol=1e-4)


# ---------------------------------------- measuring


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_an_oracle_scores_one_whatever_the_network_predicts(target):
    """A network that knows the mask gets DICE 1 through the whole evaluation, on both splits."""
    cfg = tiny(target=target, eval_images=5, ddim_steps=10)
    splits = {"Train": split(7), "Val": split(9, 1)}
    report, shown = evaluate.evaluate_masks(Oracle(cfg), cfg, splits, CPU)
    for name in ("Train", "Val"):
        assert report[name]["pooled"] == {n: 1.0 for n in metrics.NAMES}
        assert report[name]["images"] == 5
    assert np.array_equal(shown[1], shown[2])


@pytest.mark.parametrize("task", ["lung", "infection"])
def test_what_an_ensemble_says_about_the_share_is_what_its_masks_say(task, monkeypatch):
    """Each X-ray's masks drawn one X-ray at a time, and every number from them by metrics alone.

    Infections: as a share of the lungs, of the rows that are evaluated.
    """
    cfg, val = tiny(task=task, eval_images=5, ensemble=3, ddim_steps=4), split(9, 1)
    model, rows = shake(config.build_model(cfg)), evaluate.evaluated_rows(9, 5)
    asked = []
    monkeypatch.setattr(data, "load", lambda *_, masks, **how: asked.append(masks) or split(9, 2))
    report, _ = evaluate.evaluate_masks(model, cfg, {"Val": val}, CPU)
    y = data.to_float(val.images)
    masks = [evaluate.sample_masks(model, cfg, y[[i]], [i], 3)[0] for i in rows]
    masks, true = torch.stack(masks), val.masks[rows] > 127
    lungs = None if task == "lung" else split(9, 2).masks[rows] > 127
    inside, p = masks.numpy() > 0, (masks.mean(1).numpy() + 1) / 2
    want = metrics.share_report(p, inside.reshape(5, 3, -1).sum(2), true, lungs)
    want["energy distance"] = metrics.energy_distance(inside, true[:, None]).mean()
    got = report["Val"]["share"]
    assert got.keys() == want.keys() and got["width"] > 0.001
    assert asked == ([] if task == "lung" else ["lung masks"])
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    one, _ = evaluate.evaluate_masks(model, tiny(task=task, eval_images=5), {"Val": val}, CPU)
    assert "share" not in one["Val"]


def no_samples(model, cfg, index, *_):
    """Black images in place of sample_images, where only the loss is asked for."""
    return torch.zeros(len(index), 1, 16, 16)


def test_sec3_every_run_is_measured_by_eq7_at_the_same_t_and_eps():
    """However a run was trained, one network has one loss: t uniform, one noise, the same draws."""
    synthesis = dict(task="synthesis", cond=None)
    model = shake(config.build_model(tiny(**synthesis)))

    def loss(**how):
        return evaluate.eq7_loss(model, tiny(**synthesis, **how), split(40), CPU)["loss"]

    plain = dict(t_power=1.0, objective="eps", seed=0)
    for other in (dict(t_power=4.0), dict(objective="vp"), dict(seed=1)):
        assert loss(**plain | other) == loss(**plain)


def test_sec3_the_loss_of_a_perfect_network_is_zero_and_that_of_zeros_is_the_noises_square():
    """Black images alone: x_0 is known, so eps is; a network of zeros has the mean of eps^2."""
    cfg = tiny(task="synthesis", cond=None, target="eps", eval_images=5)
    black = data.Split(np.zeros((9, 1, 16, 16), np.uint8), None, [])
    s, noises = diffusion.schedule(cfg.T, cfg.pixel_shift), []

    def perfect(xt, t, y):
        noises.append(diffusion.predict_eps(s, xt, t, torch.full_like(xt, -1.0)))
        return noises[-1]

    assert evaluate.eq7_loss(perfect, cfg, black, CPU)["loss"] < 1e-6
    zeros = evaluate.eq7_loss(lambda xt, t, y: torch.zeros_like(xt), cfg, black, CPU)
    assert zeros["images"] == 5 == len(torch.cat(noises))
    assert zeros["loss"] == pytest.approx(float(torch.cat(noises).square().mean()), rel=1e-4)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_sec3_a_network_is_measured_by_what_it_predicts(target):
    """Black images: who answers what its target is scores 0, the others do not."""
    cfg = tiny(task="synthesis", cond=None, target=target, eval_images=5)
    black = data.Split(np.zeros((9, 1, 16, 16), np.uint8), None, [])
    s = diffusion.schedule(cfg.T, cfg.pixel_shift)
    for answered in diffusion.TARGETS:

        def perfect(xt, t, y, answered=answered):
            x0 = torch.full_like(xt, -1.0)
            eps = diffusion.predict_eps(s, xt, t, x0)
            return diffusion.target_of(s, answered, x0, t, eps)

        loss = evaluate.eq7_loss(perfect, cfg, black, CPU)["loss"]
        assert (loss < 1e-6) == (answered == target)


def test_a_shifted_schedule_is_the_one_a_run_is_measured_by(monkeypatch):
    """Eq. (7) in an evaluation is that of the shifted schedule, on both splits."""
    used, expected = [], diffusion.shifted(diffusion.linear_schedule(), 0.5).abar

    def l_simple(s, *_):
        used.append(s)
        return torch.zeros(())

    monkeypatch.setattr(diffusion, "l_simple", l_simple)
    monkeypatch.setattr(evaluate, "sample_images", no_samples)
    cfg = tiny(task="synthesis", cond=None, shift=0.5)
    evaluate.evaluate_images(None, cfg, {"Train": split(4), "Val": split(8)}, CPU)
    assert len(used) == 2 and all(torch.equal(s.abar, expected) for s in used)


def test_sec3_samples_are_compared_with_one_half_of_the_held_out_images(monkeypatch):
    """As many samples; the other half, which has no image of the first, is compared with it too."""

    def as_bytes(images):
        return [image.tobytes() for image in images.numpy()]

    pairs, held_out = [], split(9).images
    monkeypatch.setattr(image_metrics, "image_features", as_bytes)
    count = "frechet_distance"
    monkeypatch.setattr(image_metrics, count, lambda *pair: pairs.append(pair) or len(pairs))
    cfg = tiny(task="synthesis", cond=None)
    model = config.build_model(cfg)
    found, samples = evaluate.distances_to_held_out(model, cfg, held_out, CPU)
    (ours, reference), (others, again) = pairs
    assert list(found.values()) == [1, 2] and "halves" in list(found)[1] and again == reference
    expected = evaluate.sample_images(model, cfg, range(4))
    assert ours == as_bytes(expected)
    assert np.array_equal(samples, data.to_uint8(expected))
    every = set(as_bytes(data.to_float(held_out)))
    assert len({*reference, *others}) == 8 and {*reference, *others} < every
    of_three = dataclasses.replace(cfg, eval_images=3)
    evaluate.distances_to_held_out(model, of_three, held_out, CPU)
    assert [list(map(len, pair)) for pair in pairs[2:]] == [[3, 3], [3, 3]]


# ---------------------------------------- how long it takes


def test_an_evaluation_passes_as_many_images_as_are_foreseen(monkeypatch):
    """Masks: images of both splits times passes times members; synthesis: half of Val, one each."""
    sizes, splits = {"Train": 7, "Val": 5}, {"Train": split(7), "Val": split(5, 1)}
    masks = tiny(eval_images=6, ensemble=2, ddim_steps=3)
    images = tiny(task="synthesis", cond=None, eval_images=6, ddim_steps=3)
    measures = (evaluate.evaluate_masks, evaluate.evaluate_images)
    for cfg, measure, expected in zip((masks, images), measures, ((6 + 5) * 3 * 2, 2 * 3)):
        passed, model = [], config.build_model(cfg)
        measure(model, cfg, splits, CPU, passed.append)
        assert sum(passed) == evaluate.images_sampled(cfg, sizes) == expected


def test_the_time_left_is_that_of_the_steps_and_evaluations_to_come():
    """100 steps of 2 s, evaluations after 30, 60, 90 and 100; a pass takes a third of a step."""
    cfg = tiny(steps=100, eval_every=30, batch_size=4, eval_images=6, ddim_steps=3)
    sizes = {"Train": 7, "Val": 5}  # 11 images in 3 passes: 33 / 4 batches, 2 / 3 s each
    assert evaluate.time_left(cfg, sizes, 0, 2.0) == pytest.approx(200 + 4 * 5.5)
    assert evaluate.time_left(cfg, sizes, 30, 2.0) == pytest.approx(140 + 3 * 5.5)
    assert evaluate.time_left(cfg, sizes, 29, 2.0, evaluate_s=10) == pytest.approx(142 + 4 * 10)
    assert evaluate.time_left(cfg, sizes, 90, 2.0, evaluate_s=10) == pytest.approx(20 + 10)
    assert evaluate.time_left(cfg, sizes, 100, 2.0, evaluate_s=10) == 10  # the last one follows


# ---------------------------------------- tables


def test_the_table_stands_beside_the_reports_and_holds_the_pooled_numbers():
    """Every cell of the Markdown table is found in the evaluation or in Table 1 of the report."""
    scores = {name: 0.1 + 0.1 * i for i, name in enumerate(metrics.NAMES)}
    per_image = {name: (v / 2, v / 4, 7) for name, v in scores.items()}
    one = {"images": 7, "pooled": scores, "per image": per_image}
    other = {**one, "pooled": {name: v / 3 for name, v in scores.items()}}
    table = evaluate.markdown_table(tiny(), dict(step=10, Train=other, Val=one))
    row = next(line for line in table.splitlines() if line.startswith("| Balanced Accuracy"))
    numbers = "0.2000 | **0.6000** | 0.3000 ± 0.1500"
    assert row == f"| Balanced Accuracy | 0.9672 | 0.9793† | {numbers} |"
    assert table.endswith(" |\n\n† a misprint: (0.9502 + 0.9878) / 2 = 0.9690")


def result(task, cond, phantoms=True, model="diffusion"):
    """A results.json whose scores of validation are 0.1, 0.2, ..., in the order of the table."""
    pooled = {name: 0.1 + 0.1 * i for i, name in enumerate(metrics.NAMES)}
    settings = dict(task=task, cond=cond, phantoms=phantoms, model=model)
    train = {"pooled": dict.fromkeys(metrics.NAMES, 0.99)}
    return dict(config=settings, evaluation={"Train": train, "Val": {"pooled": pooled}})


def test_published_runs_stand_beside_the_reports_tables():
    """Columns of the report, then of the runs, first lung, then infection, eight rows."""
    runs = [result("infection", "add", phantoms=False), result("lung", "concat")]
    titles, _, *rows, _, note = evaluate.comparison(runs).splitlines()
    lung, infection = "report: lung, add | report: lung, concat", "report: infection, add"
    infection += " | report: infection, concat"
    runs = ("phantoms: lung, concat", "X-rays: infection, add")
    assert titles == f"|  | {lung} | {runs[0]} | {infection} | {runs[1]} |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in metrics.NAMES]
    i = metrics.NAMES.index("Jaccard index")
    here = f"{0.1 + 0.1 * i:.4f}"
    assert rows[i] == f"| Jaccard index | 0.9101 | 0.9123 | {here} | 0.5105 | 0.3087 | {here} |"
    assert "infection" not in evaluate.comparison([result("lung", "add")])
    assert note.startswith("† a misprint") and rows[5].count("†") == 1
    assert "†" not in evaluate.comparison([result("infection", "add")])


def test_a_published_supervised_run_is_named_by_its_model():
    """As everywhere: config.kind_of."""
    title = evaluate.comparison([result("lung", None, model="unet")]).splitlines()[0]
    assert title.endswith(" | phantoms: lung, unet |")


def test_the_command_prints_the_comparison_and_refuses_other_files(tmp_path, capsys):
    """results.json files; a file of another kind and a synthesis run in one line."""
    good, other, synthesis = (tmp_path / name for name in ("good", "other", "synthesis"))
    good.write_text(json.dumps(result("lung", "add")))
    assert evaluate.main([str(good)]) == 0
    assert capsys.readouterr().out == evaluate.comparison([result("lung", "add")]) + "\n"
    other.write_text("not JSON")
    losses = {"Val": {"loss": 0.1}}
    synthesis.write_text(json.dumps(dict(config={"task": "synthesis"}, evaluation=losses)))
    for path in (other, synthesis):
        assert evaluate.main([str(good), str(path)]) == 2
        rule = f"{path}: not the results.json of a run that has masks"
        assert capsys.readouterr().err == f"evaluate.py: error: {rule}\n"


@pytest.mark.parametrize("value", [None, "0.9", [1, 2], {}, 10**400])
def test_a_result_whose_numbers_are_none_is_refused_in_one_line(tmp_path, capsys, value):
    path, damaged = tmp_path / "results.json", result("lung", "add")
    damaged["evaluation"]["Val"]["pooled"]["Jaccard index"] = value
    path.write_text(json.dumps(damaged))
    assert evaluate.main([str(path)]) == 2
    rule = f"{path}: not the results.json of a run that has masks"
    assert capsys.readouterr().err == f"evaluate.py: error: {rule}\n"


def test_a_pipe_is_not_read_for_ever(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it would wait"))
    assert evaluate.main([str(tmp_path / "pipe")]) == 2
    assert "pipe: there is no file of that name\n" in capsys.readouterr().err
