"""The training script: what one step does, what an evaluation measures, and that nothing is lost or silently wrong."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffusion
import metrics
import score
import train
import unet
from notebooks import figures

ROOT = Path(__file__).resolve().parent
TINY = "--preset small --channels 4 --image-size 16 --batch-size 4 --steps 4 --eval-every 2 --eval-images 4 --ddim-steps 2"
TINY += " --precision fp32 --device cpu"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Both trees with 6 Train, 5 Val and 1 Test image of each class, 16x16; a mask is where its image is brighter than 127."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for tree, parts in (("Lung", ("lung masks",)), ("Infection", ("lung masks", "infection masks"))):
        for split, n in (("Train", 6), ("Val", 5), ("Test", 1)):
            for c in data.CLASSES:
                folder = root / f"{tree} Segmentation Data" / split / c
                for part in ("images", *parts):
                    (folder / part).mkdir(parents=True)
                for i in range(n):
                    image = rng.integers(0, 256, (16, 16), np.uint8)
                    Image.fromarray(image).save(folder / "images" / f"{split} ({i}).png")
                    for part in parts:
                        Image.fromarray(np.uint8(255) * (image > 127)).save(folder / part / f"{split} ({i}).png")
    return root


@pytest.fixture
def no_pictures(monkeypatch):
    """Matplotlib takes seconds; one test draws, the others need not."""
    for name in ("save_curves", "save_mask_grid", "save_image_grid"):
        monkeypatch.setattr(figures, name, lambda path, *_: Path(path).touch())


@pytest.fixture
def go(root, tmp_path, monkeypatch):
    """go("--task lung ...") runs train.py in this process on the tiny data; returns (exit status, run folder)."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # away from the runs/ of whoever tests

    def go(words, out="run", given=TINY):
        folder = tmp_path / out
        given = given and given.replace(" --ddim-steps 2", "" if "--model" in words else " --ddim-steps 2")
        where = ["--data", str(root), "--out", str(folder)]
        try:
            status = train.main([*words.split(), *(given.split() if given else []), *(where if given else [])])
        except SystemExit as e:
            status = e.code
        return status, folder

    return go


def config(**settings):
    args = train.parse("--task lung --preset small --channels 4 --image-size 16 --batch-size 4 --steps 10 --precision fp32".split())
    return dataclasses.replace(train.configure(args, CPU), **settings)


def split(n, seed=0):
    """n random images, whose masks are where they are brighter than 127."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 1, 16, 16), np.uint8)
    return data.Split(images, np.uint8(255) * (images > 127), [str(i) for i in range(n)])


class Oracle(torch.nn.Module):
    """A network that knows the mask: x_0 = +-1 where the X-ray is above or below 0. It answers what its target asks for."""

    def __init__(self, cfg):
        super().__init__()
        self.s, self.target = diffusion.linear_schedule(cfg.T), cfg.target

    def embed(self, y):
        return y

    def denoise(self, xt, t, e):
        x0 = torch.where(e > 0, 1.0, -1.0)
        return diffusion.target_of(self.s, self.target, x0, t, diffusion.predict_eps(self.s, xt, t, x0))


# ------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    "words",
    [f"--task lung --cond {cond}" for cond in ("concat", "add", "none", "cross")]
    + ["--task infection --cond add", "--task synthesis", "--task lung --target eps --ensemble 2 --eta 1"]
    + ["--task infection --model report-unet", "--task lung --cond lift --rrdbs 2 --rrdb segdiff --shift 0.5"],
)
def test_a_run_folder_holds_what_the_docstring_says_and_its_numbers_come_from_its_checkpoint(go, root, words, capsys):
    """The last evaluation in results.json equals one made anew from last.pt: the checkpoint is the model that was measured."""
    status, folder = go(words)
    assert status == 0
    pictures = {"samples.png"} if "synthesis" in words else {"masks.png"}
    files = {"config.json", "log.jsonl", "table.md", "results.json", "curves.png", "last.pt", "best.pt"} | pictures
    assert {f.name for f in folder.iterdir()} == files
    results = json.loads((folder / "results.json").read_text())
    model, cfg, step = train.load_run(folder)
    assert step == 4 and cfg.steps == 4 and results["evaluation"]["step"] == 4
    splits = {name: data.load(root, cfg.task, name, cfg.classes, 16) for name in ("Train", "Val")}
    function = train.evaluate_images if cfg.task == "synthesis" else train.evaluate_masks
    report, _ = function(model, cfg, splits, CPU)
    for name in report:
        assert json.dumps(report[name]) == json.dumps(results["evaluation"][name])
    assert (folder / "table.md").read_text().strip() in capsys.readouterr().out


def test_the_table_stands_beside_the_reports_and_holds_the_pooled_numbers():
    """Every cell of the Markdown table is found in the evaluation or in Table 1 of the report."""
    scores = {name: 0.1 + 0.1 * i for i, name in enumerate(metrics.NAMES)}
    one = {"images": 7, "pooled": scores, "per image": {name: (v / 2, v / 4, 7) for name, v in scores.items()}}
    other = {**one, "pooled": {name: v / 3 for name, v in scores.items()}}
    table = train.markdown_table(config(), dict(step=10, Train=other, Val=one))
    row = next(line for line in table.splitlines() if line.startswith("| Balanced Accuracy"))
    assert row == "| Balanced Accuracy | 0.9672 | 0.9793 | 0.2000 | **0.6000** | 0.3000 ± 0.1500 |"


def test_dry_run_prints_the_reports_network_and_starts_nothing(go, capsys, tmp_path):
    """The parameter count of facts about §3.2 with 17 channels in, and no file."""
    assert train.main(["--task", "lung", "--preset", "report", "--dry-run", "--out", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert "epochs           100" in out and " steps " not in out and "phantoms" not in out
    assert "217,887,553 parameters" in out and "batch_size       512" in out and "lr               0.003" in out
    assert not (tmp_path / "x").exists()


REFUSALS = [
    ("", "--task is needed: one of synthesis, lung, infection"),
    ("--task synthesis --cond add", "--cond is about segmentation; --task synthesis is unconditional"),
    ("--task synthesis --ensemble 3", "--ensemble averages masks; --task synthesis has none"),
    ("--task synthesis --model unet", "--model unet finds masks; --task synthesis needs --model diffusion"),
    ("--task lung --model unet --cond add", "--cond is about the report's network; --model unet sees the X-ray itself, got --cond add"),
    ("--task lung --model report-unet --eta 0", "--eta is about diffusion; --model report-unet answers in one pass, got 0.0"),
    ("--task lung --model res50attunet --image-size 48", "--image-size must be divisible by 32 for --model res50attunet, got 48"),
    ("--task lung --cond none --rrdbs 2", "--rrdbs and --rrdb are about the embedder, and --cond none has none, got 2 and report"),
    ("--task lung --cond add --stem add", "--stem add is about --cond concat, got --cond add"),
    ("--task lung --shift 0", "--shift must be above 0 and finite, got 0.0"),
    ("--task lung --rrdbs 0", "--rrdbs must be at least 1, got 0"),
    ("--task lung --steps 4 --epochs 1", "--steps and --epochs say the same thing twice"),
    ("--task lung --micro-batch some", "argument --micro-batch: must be auto or a number, got some"),
    ("--task lung --sampler langevin --ddim-steps 5", "--ddim-steps must be at least 11 for --sampler langevin, got 5"),
    ("--task lung --sampler sde --eta 1", "--eta is about --sampler ddim, got 1.0 for --sampler sde"),
    ("--task lung --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("--task lung --lr nan", "--lr must be above 0 and finite, got nan"),
    ("--task lung --ema 1", "--ema must be below 1, got 1.0"),
    ("--task lung --augment 3", "--augment must be between 0 and 2, got 3.0"),
    ("--task synthesis --augment 1", "--augment moves an X-ray and its mask; --task synthesis would learn to draw the moves, got 1.0"),
    ("--task lung --eta 1.5", "--eta must be between 0 and 1, got 1.5"),
    ("--task lung --ddim-steps 1001", "--ddim-steps must be at most T = 1000, got 1001"),
    ("--task lung --image-size 20", "image_size must be divisible by 8 for 4 levels, got 20"),
    ("--task lung --preset small --channels 6", "--channels 6, --image-size 64: head_channels must divide the 24 channels"),
    ("--task lung --lr inf", "--lr must be above 0 and finite, got inf"),
    (f"--task lung --seed {2**64}", f"--seed must be below 2^63, got {2**64}"),
    ("--task lung --classes Covid", "--classes must be some of COVID-19, Non-COVID, Normal, got Covid"),
    ("--task infection --classes Normal", "--classes needs COVID-19 for --task infection: the masks of the others are blank, got Normal"),
    ("--task lung --data /no/such/folder", "/no/such/folder"),
    ("--task lung --device quantum", "--device must be cuda, mps or cpu, got quantum"),
    ("--task lung --device meta", "--device must be cuda, mps or cpu, got meta"),
    ("--task bone", "argument --task: invalid choice: 'bone'"),
    ("--resume /no/such/run", "/no/such/run: no checkpoint there"),
]


@pytest.mark.parametrize("words, message", REFUSALS)
def test_bad_input_gets_one_line_and_exit_status_2(go, capsys, words, message):
    """One line that names the rule and the value; no traceback."""
    status, _ = go(words, given=None)
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1 and error.startswith("train.py: error: ")


def test_without_a_dataset_phantoms_are_announced_and_a_given_folder_never_falls_back(root, monkeypatch, capsys, tmp_path, no_pictures):
    """The paragraph names where it looked; everything that the run writes says phantoms."""
    monkeypatch.setattr(data, "DATA_HOMES", (tmp_path / "nowhere",))
    monkeypatch.setattr(data, "PHANTOMS", root)
    monkeypatch.setattr(data, "ensure_phantoms", lambda *_: None)
    assert train.main(["--task", "lung", *TINY.split(), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"No X-rays found: COVID-QU-Ex is looked for in {tmp_path / 'nowhere'}" in out
    assert "phantoms" in (tmp_path / "run/table.md").read_text()
    assert json.loads((tmp_path / "run/results.json").read_text())["config"]["phantoms"] is True
    assert train.main(["--task", "lung", "--data", str(tmp_path / "nowhere"), *TINY.split()]) == 2


# ------------------------------------------------------------------------------------- one step


def test_the_network_sees_the_noised_mask_as_x0_and_the_xray_of_the_same_row_as_y(monkeypatch):
    """§4.1: diffusion runs on masks, conditioned on images; here a mask is a function of its image, so a mixed row shows."""
    seen = []
    loss = lambda s, m, x0, y, *_: seen.append((x0, y)) or sum(p.sum() for p in m.parameters())
    monkeypatch.setattr(diffusion, "l_simple", loss)
    cfg, tiny = config(noises=1), split(6)
    trainer = train.Trainer(cfg, CPU)
    trainer.train_step(torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks))
    (x0, y), images = seen[0], data.to_float(tiny.images)
    assert x0.unique().tolist() == [-1, 1] and torch.equal(x0 > 0, y > 0)
    assert all((image == images).flatten(1).all(1).any() for image in y)
    trainer.train_step(torch.from_numpy(tiny.images), None)
    assert seen[1][1] is None and not seen[1][0].unique().tolist() == [-1, 1]


def test_augmentation_changes_each_pair_of_a_step_by_the_seed_and_the_step_alone(monkeypatch):
    """Off, the network sees the files; on, it sees data.augment of the very rows, X-ray first, another draw at every step."""
    seen, tiny = [], split(4)
    images, masks = torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks)
    monkeypatch.setattr(diffusion, "l_simple", lambda s, m, x0, y, *_: seen.append((y, x0)) or sum(p.sum() for p in m.parameters()))
    for cfg in (config(noises=1), config(noises=1, augment=1.0), config(noises=1, augment=1.0)):
        trainer = train.Trainer(cfg, CPU)
        trainer.train_step(images, masks)
        trainer.train_step(images, masks)
    draws = []
    monkeypatch.setattr(data, "augment", lambda y, x0, g, strength: draws.append((y, x0, g.initial_seed(), strength)) or (x0, y))
    for step in (1, 2):
        trainer = train.Trainer(config(noises=1, augment=0.5), CPU)
        trainer.step = step - 1
        trainer.train_step(images, masks)
        (y, x0, _, strength), off = draws[-1], seen[step - 1]
        assert torch.equal(y, off[0]) and torch.equal(x0, off[1]) and strength == 0.5
        assert torch.equal(seen[-1][0], x0) and torch.equal(seen[-1][1], y)  # what augment gives is what is learned, in its order
    train.Trainer(config(noises=1, augment=0.5, seed=1), CPU).train_step(images, masks)
    assert len({draw[2] for draw in draws}) == 3  # three steps, three draws
    for a, b in zip(seen[2:4], seen[4:6]):  # the same seed
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], seen[0][0])


def test_the_gradient_does_not_depend_on_the_micro_batch_nor_on_recomputation():
    """Pieces of 1, 3 and all of 4 images, and blocks computed again: the same mean gradient, to float64 rounding."""
    gradients = []
    x0, y = data.to_float(split(4).masks).double(), data.to_float(split(4).images).double()
    for micro_batch, recompute in ((1, False), (3, False), (4, False), (3, True)):
        cfg = config(micro_batch=micro_batch)
        trainer = train.Trainer(cfg, CPU)
        trainer.model.unet.recompute = recompute
        shake(trainer.model.double())
        for _ in range(2):  # the second call starts from nothing, as every step does
            trainer.gradient(x0, y, *train.draws(cfg, 1, x0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert gradients[0].norm() > 0.1
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0], rtol=1e-9, atol=1e-12)


def test_several_noises_of_an_image_give_the_mean_of_their_gradients_and_one_embedding():
    """K = 3 noises each, in pieces of 2 images: the gradient is the mean of the three that know one noise; an X-ray is embedded once."""
    x0, y = data.to_float(split(4).masks).double(), data.to_float(split(4).images).double()
    cfg, gradients, embedded = config(noises=3, micro_batch=2, t_power=2.0), [], []
    t, eps = train.draws(cfg, 1, x0)
    for k in (0, 1, 2, None):
        one = config(noises=1, t_power=2.0) if k is not None else cfg
        trainer = train.Trainer(one, CPU)
        shake(trainer.model.double())
        trainer.model.embedder.register_forward_hook(lambda module, args, out: embedded.append(len(args[0])))
        trainer.gradient(x0, y, *((t, eps) if k is None else (t[:, k : k + 1], eps[:, k : k + 1])))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    *each, together = gradients
    assert (each[0] - each[1]).norm() > 0.1 * together.norm() > 0
    torch.testing.assert_close(together, sum(each) / 3, rtol=1e-6, atol=1e-9)
    assert embedded[-2:] == [2, 2]


def test_sec44_the_gradient_of_a_supervised_network_is_that_of_its_loss_in_pieces_too():
    """No noise is drawn: two pieces of 3 and 1 X-rays give the gradient of l_supervised on all 4."""
    cfg = config(model="unet", cond=None, micro_batch=3)
    trainer = train.Trainer(cfg, CPU)
    shake(trainer.model.double())
    x0, y = data.to_float(split(4).masks).double(), data.to_float(split(4).images).double()
    loss = trainer.gradient(x0, y, None, None)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    logits = trainer.model(y)
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, (x0 + 1) / 2)
    whole.backward()
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-6)
    for a, p in zip(found, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-7)


def test_sec44_the_mask_of_a_supervised_network_is_its_probability():
    """2 p - 1 in [-1, 1], above 0 where p is above 1/2; one forward pass an image, whatever the index."""
    cfg, passed = config(model="unet", cond=None), []
    model, y = train.build_model(cfg), data.to_float(split(3).images)
    found = train.sample_masks(model, cfg, y, [5, 6, 7], progress=passed.append)
    torch.testing.assert_close(found, (2 * model(y).sigmoid() - 1)[:, None])
    assert passed == [3] and train.passes_of(cfg) == 1 and found.shape == (3, 1, 1, 16, 16)


def test_the_test_split_is_seen_only_where_asked_for_and_decides_nothing(go, no_pictures, capsys, monkeypatch):
    """Three images of Test, evaluated once after training, beside the evaluations and not among them; the same run without it is the same."""
    status, plain = go("--task lung", "plain")
    assert status == 0 and "test" not in (plain / "log.jsonl").read_text().lower() and "Test" not in json.loads((plain / "results.json").read_text())
    load, read = data.load, []
    monkeypatch.setattr(data, "load", lambda root, task, name, *args, **kw: read.append(name) or load(root, task, name, *args, **kw))
    evaluate, judged = train.evaluate_masks, []
    monkeypatch.setattr(train, "evaluate_masks", lambda model, *rest: judged.append(model) or evaluate(model, *rest))
    status, folder = go("--task lung --test", "tested")
    assert status == 0 and read == ["Train", "Val", "Test"] and "Test, 3 images: DICE" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "Test" in line] == [4] and "Val" not in lines[-1]
    tested = json.loads((folder / "results.json").read_text())
    assert tested["Test"] == lines[-1]["Test"] and tested["Test"]["images"] == 3
    model, cfg, _ = train.load_run(folder)  # the averaged weights
    for mine, its in zip(model.parameters(), judged[-1].parameters(), strict=True):
        assert torch.equal(mine, its)
    again, _ = evaluate(model, cfg, {"Test": load(cfg.data, "lung", "Test", cfg.classes, 16)}, CPU)
    assert json.loads(json.dumps(again["Test"])) == tested["Test"]
    assert tested["evaluation"]["Val"] == json.loads((plain / "results.json").read_text())["evaluation"]["Val"]
    assert train.main(["--resume", str(plain), "--test"]) == 0 and json.loads((plain / "results.json").read_text())["Test"] == tested["Test"]
    assert go("--task synthesis --test", "no")[0] == 2 and "--test evaluates masks; --task synthesis has none" in capsys.readouterr().err


def test_sec44_a_finished_supervised_run_is_prolonged_but_has_no_passes_to_change(go, no_pictures, capsys):
    status, folder = go("--task lung --model unet")
    assert status == 0 and train.main(["--resume", str(folder), "--ensemble", "9"]) == 2
    assert "--ensemble is about diffusion; --model unet answers in one pass, got 9" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--steps", "5", "--eval-images", "5"]) == 0 and state_of(folder)["step"] == 5


def test_sec32_blocks_computed_again_keep_their_inputs_and_nothing_else():
    """The report's network at an eighth of its width: what enters each block by §3.2's table, and three maps of the head."""
    enter = {
        64: [192, 192, 192, 576, 384, 384, 3 * 192],
        32: [192, 384, 384, 960, 768, 576],
        16: [384, 576, 576, 1344, 1152, 960],
        8: [576, 768, 768, 1536, 1536, 1344],
    }
    cfg = dataclasses.replace(config(task="synthesis", cond=None), image_size=64)
    model = unet.ConditionalUNet(None, channels=24, head_channels=8)
    model.unet.recompute = True
    numbers = sum(side**2 * sum(channels) // 8 for side, channels in enter.items())
    for noises in (1, 3):
        kept = train.kept_for_backward(model, dataclasses.replace(cfg, noises=noises), CPU)
        assert kept == pytest.approx(noises * 4 * (numbers + 64 * 64), rel=1e-3)  # and x_t, for the first convolution


@pytest.mark.parametrize(
    "free, n, chosen",
    [
        (120e9, 512, (512, False)),  # 512 * 1.4 * 150 MB = 107.5 GB
        (107e9, 512, (256, False)),  # a little less: two pieces of the same size
        (20e9, 512, (86, False)),  # 95 fit: 6 pieces
        (3.4e9, 512, (16, False)),
        (3.3e9, 512, (74, True)),  # fewer than 16 fit; at 30 MB an image 78 do: 7 pieces
        (3.3e9, 8, (8, False)),  # all of them are few
        (1e6, 512, (1, True)),
        (-1e9, 512, (1, True)),
    ],
)
def test_as_few_pieces_as_the_memory_holds_and_recomputation_where_few_images_fit(free, n, chosen):
    """150 MB an image, 30 MB with blocks computed again; 1.4 times that on the way."""
    assert train.pieces_that_fit(n, free, 150e6, 30e6) == chosen


@pytest.mark.parametrize("card, chosen", [(139e9, (256, False)), (24e9, (57, False)), (8e9, (37, True))])
def test_the_reports_batch_fits_cards_of_three_sizes(card, chosen, monkeypatch):
    """218.5 million parameters, twice on the card already (2.35 GB with the driver's own); 204 or 44 MB an image."""
    trainer = train.Trainer(config(batch_size=512), CPU)
    kept = {False: 97.237 * 2**30 / 512, True: 21.0025 * 2**30 / 512}  # measured on the report's network, bf16, concatenation
    monkeypatch.setattr(train, "kept_for_backward", lambda model, cfg, device: kept[model.unet.recompute])
    monkeypatch.setattr(train, "free_memory", lambda device: card - 2.35e9)
    monkeypatch.setattr(trainer.model, "parameters", lambda: [torch.empty(218_500_000, device="meta")])
    trainer.fit_memory()
    assert (trainer.micro_batch, trainer.model.unet.recompute) == chosen


def test_the_memory_decides_unless_told_and_says_so(monkeypatch):
    """Room for three images without recomputation; a given micro-batch stays; where nothing is known, the whole batch."""
    trainer = train.Trainer(config(), CPU)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kept = train.kept_for_backward(trainer.model, trainer.cfg, CPU)
    monkeypatch.setattr(train, "FEW", 2)
    monkeypatch.setattr(train, "free_memory", lambda device: (12 * parameters + 3.1 * 1.4 * kept) / 0.9)
    assert trainer.fit_memory().startswith("2 of 4 images a forward pass") and not trainer.model.unet.recompute
    monkeypatch.setattr(train, "free_memory", lambda device: (12 * parameters + 1.9 * 1.4 * kept) / 0.9)
    assert "blocks computed again" in trainer.fit_memory() and trainer.model.unet.recompute
    trainer = train.Trainer(config(micro_batch=3), CPU)
    assert trainer.fit_memory().startswith("3 of 4") and trainer.micro_batch == 3 and trainer.model.unet.recompute
    monkeypatch.setattr(train, "free_memory", lambda device: None)
    trainer = train.Trainer(config(), CPU)
    assert "cannot be told" in trainer.fit_memory() and trainer.micro_batch == 4


def test_free_memory_is_that_of_the_machine(monkeypatch, tmp_path):
    """MemAvailable of /proc/meminfo in kB, shared by the processes of this machine; nothing where there is no such file."""
    monkeypatch.setattr(train, "lines_of", lambda path: ["MemTotal:  9 kB", "MemAvailable:  4 kB"])
    assert train.free_memory(CPU) == 4096
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.free_memory(CPU) == 1024
    monkeypatch.setattr(train, "lines_of", lambda path: [])
    assert train.free_memory(CPU) is None


def shake(model):
    """Weights away from the zero initialisation, so that every one has a gradient."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))


def test_when_memory_runs_out_the_pieces_halve_and_the_step_is_the_same(monkeypatch, capsys):
    """A loss that refuses more than one image at once gives the weights of --micro-batch 1, and says so."""
    tiny, weights = split(6), []
    exact = diffusion.l_simple

    pairs = []

    def small_memory(s, model, x0, *rest):
        pairs.append(len(x0))
        if len(x0) > 2 or len(x0) == 2 and pairs.count(2) == 2:  # the second pair, when the first has left its gradient
            raise torch.OutOfMemoryError("planted")
        return exact(s, model, x0, *rest)

    class Backward(torch.autograd.Function):
        """Runs out of memory while gradients are computed, when the activations of the piece are all there."""

        @staticmethod
        def forward(ctx, x):
            ctx.held = torch.zeros(1)  # lives as long as the graph
            graphs.append(weakref.ref(ctx.held))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise torch.OutOfMemoryError("planted")

    graphs = []

    def small_in_backward(s, model, x0, *rest):
        assert all(graph() is None for graph in graphs), "the piece that failed is still in memory"
        loss = exact(s, model, x0, *rest)
        return Backward.apply(loss) if len(x0) > 1 else loss

    for loss, cfg in ((exact, config(noises=1, micro_batch=1)), (small_memory, config(noises=1)), (small_in_backward, config(noises=1))):
        monkeypatch.setattr(diffusion, "l_simple", loss)
        trainer = train.Trainer(cfg, CPU)
        trainer.train_step(torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks))
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert "from here on 1 images at once; the batch stays 4" in capsys.readouterr().out
    assert pairs == [4, 2, 2, 1, 1, 1, 1]
    monkeypatch.setattr(diffusion, "l_simple", small_in_backward)
    with pytest.raises(train.UserError, match="out of memory with 2 images at once; try a smaller --micro-batch"):
        train.Trainer(config(noises=1, micro_batch=2), CPU).train_step(torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks))


def test_one_step_is_one_update_and_the_average_follows_it():
    """k steps move AdamW's own counter by k, and the EMA obeys its recursion with the warm-up of its decay."""
    tiny, trainer = split(6), train.Trainer(config(ema=0.3, micro_batch=3), CPU)
    expected = [p.clone() for p in trainer.model.parameters()]
    for step in range(1, 6):
        trainer.train_step(torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trainer.model.parameters())]
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {5}
    for e, p in zip(expected, trainer.ema.parameters()):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-7)
        assert not p.requires_grad and p.grad_fn is None  # else the graph of the whole run stays in memory


def test_every_epoch_holds_each_image_once_and_its_order_depends_on_the_seed_and_the_epoch():
    """Batches of 4 from 10 images: 20 consecutive places are two permutations, and two different ones."""
    cfg = config()
    places = torch.cat([train.batch_indices(cfg, 10, step) for step in range(1, 6)]).tolist()
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10)) and places[:10] != places[10:]
    assert places[:4] != train.batch_indices(config(seed=1), 10, 1).tolist()
    assert len(train.batch_indices(config(batch_size=25), 10, 1)) == 25  # more than there are


def test_the_noise_of_a_step_comes_from_the_seed_and_the_step_alone():
    """Drawn twice the same, another for another step or seed; t in 1..T."""
    like = torch.zeros(4, 1, 16, 16)
    (t, eps), again = train.draws(config(), 3, like), train.draws(config(), 3, like)
    assert torch.equal(t, again[0]) and torch.equal(eps, again[1])
    for other in (train.draws(config(), 4, like), train.draws(config(seed=1), 3, like)):
        assert not torch.equal(eps, other[1])


@pytest.mark.parametrize("power", [1, 2, 0.5])
def test_eq7_t_is_drawn_from_1_to_T_with_the_density_of_t_power(power):
    """P(t <= k) = (k / T)^power, within 4 standard errors of 20,000 draws; power 1 is the uniform t of Eq. (7)."""
    t = train.draws(config(T=4, t_power=power), 1, torch.zeros(20_000, 1))[0]
    for k in range(5):
        expected = (k / 4) ** power
        assert (t <= k).double().mean() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))


def test_the_noises_of_an_image_share_out_the_times():
    """Four noises each: their t lie in the four quarters of t's distribution, in order; their eps differ."""
    t, eps = train.draws(config(noises=4, t_power=2.0), 1, torch.zeros(3000, 1, 2, 2))
    assert t.shape == (3000, 4) and eps.shape == (3000, 4, 1, 2, 2) and not torch.equal(eps[:, 0], eps[:, 1])
    quarter = (t / 1000) ** 2 * 4
    for k in range(4):
        assert k < quarter[:, k].min() and quarter[:, k].max() <= k + 1.008 and abs(quarter[:, k].mean() - k - 0.5) < 0.03


def test_preset_best_is_the_reports_network_and_data_trained_and_sampled_as_the_small_preset_is():
    """Three presets: report and best differ in WINS alone, best and small in sizes and lengths alone."""
    sizes = {"steps", "epochs", "evaluations", "batch_size", "warmup", "ema", "channels", "blocks", "attention_levels", "head_channels", "growth"}
    for task in train.TASKS:
        of = lambda preset: dataclasses.asdict(train.configure(train.parse(["--task", task, "--preset", preset]), CPU))
        report, best, small = of("report"), of("best"), of("small")
        differ = lambda a, b: {name for name in a if a[name] != b[name]} - {"preset"}
        assert differ(report, best) == set(train.WINS[task]) - {name for name, v in train.WINS[task].items() if report[name] == v}
        assert differ(best, small) <= sizes | {"eval_images"} and not differ(best, small) & set(train.WINS[task])


def test_few_passes_are_of_ddim_alone_unless_asked_for():
    of = lambda words: train.configure(train.parse(f"--task lung --preset best {words}".split()), CPU).ddim_steps
    assert [of(w) for w in ("", "--sampler ddim", "--sampler ode", "--sampler sde --ddim-steps 20")] == [2, 2, 50, 20]


def test_the_learning_rate_warms_up_then_stays_or_falls_to_nothing():
    """Linear in the first steps, lr after them; the cosine ends within 1/steps^2 of 0."""
    cfg = config(lr=1.0, warmup=10, steps=1000, lr_decay="none")
    assert [train.learning_rate(cfg, step) for step in (1, 5, 10, 11, 1000)] == [0.1, 0.5, 1, 1, 1]
    cosine = dataclasses.replace(cfg, lr_decay="cosine", warmup=0)
    assert train.learning_rate(cosine, 1) == 1 and train.learning_rate(cosine, 501) == pytest.approx(0.5)
    assert 0 < train.learning_rate(cosine, 1000) < 1e-5


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(monkeypatch):
    """The norm of what AdamW gets is --clip where it was larger."""
    tiny = split(6)
    for clip, bounded in ((1e-3, True), (0.0, False)):
        trainer = train.Trainer(config(clip=clip), CPU)
        shake(trainer.model)
        trainer.train_step(torch.from_numpy(tiny.images), torch.from_numpy(tiny.masks))
        norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
        assert (norm == pytest.approx(1e-3, rel=1e-3)) if bounded else norm > 0.01


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_an_oracle_scores_one_whatever_the_network_predicts(target):
    """A network that knows the mask, asked for eps, v or x0, gets DICE 1 through the whole evaluation, on both splits."""
    cfg = config(target=target, eval_images=5, ddim_steps=10)
    report, shown = train.evaluate_masks(Oracle(cfg), cfg, {"Train": split(7), "Val": split(9, 1)}, CPU)
    for name in ("Train", "Val"):
        assert report[name]["pooled"] == {n: 1.0 for n in metrics.NAMES} and report[name]["images"] == 5
    assert np.array_equal(shown[1], shown[2])


def test_an_evaluation_does_not_depend_on_the_batch_size(monkeypatch):
    """The same masks, to float rounding, for batches of 1, 3 and all: noise belongs to the image."""
    cfg, tiny = config(eval_images=7, ensemble=2, eta=0.5, ddim_steps=4), split(9)
    model = train.build_model(cfg)
    shake(model)
    rows, masks = train.chosen(9, 7), []
    for size in (1, 3, 7):
        monkeypatch.setattr(train, "in_pieces", lambda work, rows, *_: [(r, work(r)) for r in np.split(rows, range(size, 7, size))])
        masks.append(train.segment(model, cfg, tiny.images, rows, CPU))
    assert masks[0].std() > 0.1
    for m in masks[1:]:
        torch.testing.assert_close(m, masks[0], rtol=0, atol=1e-4)


def test_every_run_evaluates_the_same_images_and_starts_from_the_same_x_T():
    """§4.3: the choice depends on the size of the split alone, not on the run's seed; too few images are all taken."""
    assert train.chosen(100, 5).tolist() == [5, 20, 36, 82, 93] and len(set(train.chosen(100, 50))) == 50
    assert train.chosen(3, 5).tolist() == [0, 1, 2]
    x_T = []
    for seed in (0, 1):
        cfg = config(seed=seed)
        y = data.to_float(split(2).images)
        grab = type("Grab", (Oracle,), {"denoise": lambda self, xt, t, e: x_T.append(xt) or torch.zeros_like(xt)})
        train.sample_masks(grab(cfg), dataclasses.replace(cfg, ddim_steps=1), y, [4, 9])
    assert torch.equal(*x_T)


def test_an_ensemble_is_the_mean_of_its_members_and_the_first_member_is_the_single_mask():
    """Amit et al.: average, then threshold."""
    cfg, tiny = config(ddim_steps=3), split(3)
    model = train.build_model(cfg)
    shake(model)
    y = data.to_float(tiny.images)
    members = train.sample_masks(model, cfg, y, [0, 1, 2], 4)
    assert members.shape == (3, 4, 1, 16, 16) and members.std(1).mean() > 0.01
    mean = train.segment(model, dataclasses.replace(cfg, ensemble=4), tiny.images, np.arange(3), CPU)
    torch.testing.assert_close(mean, members.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.sample_masks(model, cfg, y, [0, 1, 2])[:, 0], members[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", diffusion.TARGETS)
@pytest.mark.parametrize("sampler", train.SAMPLERS)
def test_every_sampler_finds_the_mask_that_the_network_knows_in_the_passes_it_says(sampler, target):
    """Ideal network, 12 passes (DDPM: 20 steps in all): the mask of every member, by as many passes as the progress line counts on."""
    cfg = config(sampler=sampler, ddim_steps=12, target=target, T=20 if sampler == "ddpm" else 1000)
    train.check(cfg)
    y, counted = data.to_float(split(3).images), []
    masks = train.sample_masks(Oracle(cfg), cfg, y, [0, 1, 2], 2, progress=counted.append)
    assert counted == [6] * train.passes_of(cfg) and train.passes_of(cfg) <= max(12, cfg.T if sampler == "ddpm" else 0)
    torch.testing.assert_close(masks, torch.where(y > 0, 1.0, -1.0)[:, None].expand(3, 2, 1, 16, 16), rtol=0, atol=0.05)


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("sampler, passes", [("ddim", 500), ("ode", 59), ("sde", 300), ("pc", 301), ("langevin", 901)])
def test_every_sampler_draws_the_distribution_that_the_network_knows(sampler, passes, shift):
    """Pixels N(0.3, 0.04), exact noise predictor: mean and standard deviation of 2048 pixels, on a shifted schedule too."""
    cfg = config(task="synthesis", cond=None, sampler=sampler, ddim_steps=passes, target="eps", shift=shift)
    s = diffusion.shifted(diffusion.linear_schedule(cfg.T), shift)

    class World:
        def denoise(self, xt, t, e):
            a, v = diffusion.at(s.abar.sqrt(), t, xt), diffusion.at(1 - s.abar, t, xt)
            return v.sqrt() * (xt - a * 0.3) / (a * a * 0.04 + v)

    x0 = train.sample_images(World(), cfg, range(8))
    assert float(x0.mean()) == pytest.approx(0.3, abs=0.03) and float(x0.std()) == pytest.approx(0.2, rel=0.08)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_sec21_the_losses_of_ncsn_and_of_the_sde_are_those_of_score_py(target):
    """One network, one noise: the same number from train.score_matching, score.sde_loss and score.dsm_loss; at whole steps Eq. (7)'s."""
    s, g = diffusion.linear_schedule(), torch.Generator().manual_seed(3)
    process = score.steps_of(s.abar)
    x0, eps, answer = (torch.randn(4, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    heard = []
    model = lambda xt, t, y: heard.append(t) or answer + 0.1 * xt
    for steps in (250.0, 250.7):
        a, std = process.marginal(steps / 1000)
        t = torch.full((4,), steps, dtype=torch.float64)
        loss = train.score_matching(process, 1000, model, x0, None, t, eps, target)
        assert heard[-1].tolist() == [steps] * 4
        of_answer, of_x = {"eps": (1, 0), "v": (a, std), "x0": (-a / std, 1 / std)}[target]
        eps_hat = lambda x, p=of_answer, q=of_x: p * (answer + 0.1 * x) + q * x
        assert float(loss) == pytest.approx(float(score.sde_loss(process, lambda x, _: -eps_hat(x) / std, x0, steps / 1000, eps)))
        sigma = torch.full((4,), std / a, dtype=torch.float64)
        assert float(loss) == pytest.approx(float(score.dsm_loss(lambda y, _: -eps_hat(a * y) / (std / a), x0, sigma, eps)))
    whole = torch.tensor([1, 20, 500, 1000])
    mixed = train.score_matching(process, 1000, model, x0, None, whole, eps, "eps")
    torch.testing.assert_close(mixed, diffusion.l_simple(s, model, x0, None, whole, eps))


def test_sec21_each_objective_draws_its_own_times():
    """ncsn: ten steps, all of them, the first and the last of the schedule among them; vp: real numbers in [1, T]; eps: as before."""
    like = torch.zeros(4000, 1, 1, 1)
    t = {name: train.draws(config(objective=name, t_power=1.0), 1, like)[0] for name in train.OBJECTIVES}
    steps, counts = t["ncsn"].unique(return_counts=True)
    assert len(steps) == 10 and steps[0] == 1 and steps[-1] == 1000 and counts.min() > 300
    sigmas = [score.level(score.steps_of(diffusion.linear_schedule().abar), int(k) / 1000) for k in steps]
    assert sigmas[::-1] == pytest.approx(score.on_grid(train.process_of(1000), score.geometric(sigmas[-1], sigmas[0], 10), 1000))
    assert t["vp"].dtype == torch.float64 and 1 <= t["vp"].min() and t["vp"].max() <= 1000 and (t["vp"] % 1 > 0.01).float().mean() > 0.9
    assert torch.equal(t["vp"].ceil().long(), t["eps"])


def test_a_shifted_schedule_is_the_one_a_run_learns_by_and_is_measured_by(monkeypatch):
    """Eq. (7) in training and in evaluation, and the real times of vp: all of the shifted schedule."""
    used, process = [], score.steps_of(diffusion.shifted(diffusion.linear_schedule(), 0.5).abar)
    monkeypatch.setattr(diffusion, "l_simple", lambda s, model, x0, *_: used.append(s) or (0 * model.unet.stem.weight).sum())
    monkeypatch.setattr(train, "score_matching", lambda process, T, model, *_: used.append(process) or (0 * model.unet.stem.weight).sum())
    monkeypatch.setattr(train, "sample_images", lambda model, cfg, i, *_: torch.zeros(len(i), 1, 16, 16))
    for objective in ("eps", "vp"):
        cfg = config(task="synthesis", cond=None, shift=0.5, objective=objective)
        trainer = train.Trainer(cfg, CPU)
        x0 = torch.zeros(4, 1, 16, 16)
        trainer.gradient(x0, None, *train.draws(cfg, 1, x0))
    train.evaluate_images(trainer.ema, cfg, {"Train": split(4), "Val": split(8)}, CPU)
    learned, process_used, *measured = used
    expected = diffusion.shifted(diffusion.linear_schedule(), 0.5).abar
    assert len(measured) == 2 and all(torch.equal(s.abar, expected) for s in (learned, *measured))
    assert process_used.marginal(0.3) == process.marginal(0.3) != train.process_of(1000).marginal(0.3)


def test_sec3_every_run_is_measured_by_eq7_at_the_same_t_and_eps(monkeypatch):
    """However a run was trained, one network has one loss: t uniform, one noise an image, the same draws."""
    monkeypatch.setattr(train, "sample_images", lambda model, cfg, i, *_: torch.zeros(len(i), 1, 16, 16))
    model = train.build_model(config(task="synthesis", cond=None))
    shake(model)

    def loss(**how):
        cfg = config(task="synthesis", cond=None, **how)
        return train.evaluate_images(model, cfg, {"Train": split(40), "Val": split(8)}, CPU)[0]["Train"]["loss"]

    ways = (dict(noises=3), dict(t_power=4.0), dict(objective="vp"), dict(seed=1))
    plain = dict(noises=1, t_power=1.0, objective="eps", seed=0)
    assert [loss(**plain | way) for way in ways] == [loss(**plain)] * 4


def test_each_switch_of_the_conditioning_reaches_the_network():
    """RRDBs of the embedder and their scaling; the first convolution of concatenation; widths of the supervised networks by preset."""
    plain, switched = (train.build_model(config(**how)) for how in ({}, dict(rrdbs=3, rrdb="segdiff", stem="add")))
    assert [len(net.embedder.blocks) for net in (plain, switched)] == [1, 3]
    assert [net.embedder.blocks[0].scale for net in (plain, switched)] == [1.0, 0.2]
    is_sum = [torch.allclose(w[:, 0], w[:, 1:].sum(1), atol=1e-6) for w in (plain.unet.stem.weight, switched.unet.stem.weight)]
    assert is_sum == [False, True]
    widths = [
        train.configure(train.parse(f"--task lung --model {model} --preset {preset}".split()), CPU).channels
        for preset in ("report", "best", "small")
        for model in ("unet", "report-unet")
    ]
    assert widths == [64, 192, 64, 192, 32, 16]


@pytest.mark.parametrize("objective", ["ncsn", "vp"])
def test_sec21_a_run_learns_samples_and_is_resumed_by_each_objective(go, objective, no_pictures):
    """The configuration says what it learned, ncsn is sampled at its own levels, and half a run goes on as an uninterrupted one."""
    words, tiny = f"--task lung --objective {objective} --lr-decay none", TINY.replace("--ddim-steps 2", "--ddim-steps 11")
    (status, whole), (_, half) = go(words, "whole", tiny), go(words, "half", tiny.replace("--steps 4", "--steps 2"))
    assert status == 0 and train.main(["--resume", str(half), "--steps", "4", "--device", "cpu"]) == 0
    torch.testing.assert_close(dict(state_of(half)["model"]), dict(state_of(whole)["model"]), rtol=0, atol=0)
    other = state_of(go("--task lung --lr-decay none", "other", tiny)[1])
    assert any(not torch.equal(v, other["model"][k]) for k, v in state_of(whole)["model"].items())
    cfg = train.read_checkpoint(whole)["config"]
    assert (cfg.objective, cfg.sampler) == (objective, {"ncsn": "langevin", "vp": "ddim"}[objective])


def test_sec21_a_synthesis_run_of_the_sde_is_evaluated_by_eq_7(go, no_pictures):
    """At whole steps, as every other run."""
    assert go("--task synthesis --objective vp")[0] == 0


def test_channels_last_changes_a_mask_by_rounding_alone():
    """The layout that sampling uses on a CPU, and the model as it was trained; the trained one stays as it is."""
    cfg, tiny = config(ddim_steps=3), split(3)
    model = train.build_model(cfg)
    shake(model)
    model.requires_grad_(False)
    copy, y = train.laid_out(model, CPU), data.to_float(tiny.images)
    assert copy.unet.stem.weight.is_contiguous(memory_format=torch.channels_last) and model.unet.stem.weight.is_contiguous()
    plain, fast = (train.sample_masks(m, cfg, y, [0, 1, 2]) for m in (model, copy))
    assert plain.std() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- several processes


def torchrun(n, script, words, folder):
    """Run a script on n processes of one thread, in `folder`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


SHARED = f"--task lung {TINY} --batch-size 7 --steps 10 --eval-every 5 --eval-images 9 --lr-decay none"


def without_time(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_three_processes_learn_and_measure_what_one_does_and_one_goes_on_from_two(root, tmp_path, go):
    """Batches of 7 images; ten steps and two evaluations: loss and weights agree to rounding, every metric exactly.

    The run of two processes stops after six steps and is resumed by one. Each folder is whole, and written once.
    """
    status, one = go(SHARED, "one", f"--data {root} --out {tmp_path / 'one'}")
    words = [*SHARED.split(), "--data", str(root), "--micro-batch", "2"]
    three = torchrun(3, ROOT / "train.py", [*words, "--out", "three"], tmp_path)
    two = torchrun(2, ROOT / "train.py", [*words, "--out", "two", "--steps", "6"], tmp_path)
    assert status == three.returncode == two.returncode == 0, three.stderr + two.stderr
    assert train.main(["--resume", str(tmp_path / "two"), "--steps", "10", "--device", "cpu"]) == 0
    expected, log = state_of(one), without_time(one)
    for folder in (tmp_path / "three", tmp_path / "two"):
        state = state_of(folder)
        for kind in ("model", "ema"):
            torch.testing.assert_close(dict(state[kind]), dict(expected[kind]), rtol=0, atol=1e-5)
        lines = [line for line in without_time(folder) if line["step"] != 6 or "loss" in line]
        assert [line for line in lines if "Val" in line] == [line for line in log if "Val" in line]
        losses = [[line["loss"] for line in lines if "loss" in line] for lines in (lines, log)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 10
    assert three.stdout.count("validation DICE") == 2 and "3 processes" in three.stdout and not list(tmp_path.glob("*/.*"))
    facts = json.loads((tmp_path / "three" / "results.json").read_text())
    assert facts["command"].startswith("torchrun --nproc-per-node 3 train.py") and facts["hardware"].endswith("3 processes")


FAILS = """import os, sys
sys.path.insert(0, {root!r})
import train
step = train.Trainer.train_step
def planted(self, *split):
    if self.step == 2 and os.environ["RANK"] == "1":
        raise train.UserError("planted in the second process")
    return step(self, *split)
train.Trainer.train_step = planted
sys.exit(train.main())
"""


def test_a_process_that_fails_ends_the_run_with_its_error(root, tmp_path):
    """The other one does not wait for it, and what was saved before is whole."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=str(ROOT)))
    result = torchrun(2, script, [*SHARED.split(), "--data", str(root), "--out", "run"], tmp_path)
    assert result.returncode == 1 and result.stderr.count("error: planted in the second process") == 1
    assert state_of(tmp_path / "run")["step"] == 0


def test_processes_stop_together_and_are_saved(root, tmp_path):
    """Ctrl-C to torchrun: one checkpoint, at a step that all have taken; and the rule that every process needs an image."""
    words = [*SHARED.split(), "--data", str(root), "--steps", "1000000", "--eval-every", "500000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *words, "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        log = tmp_path / "run" / "log.jsonl"
        for _ in range(600):
            if log.is_file() and log.read_text():
                break
            time.sleep(0.1)
        p.send_signal(signal.SIGINT)
        stdout, stderr = p.communicate(timeout=60)
    step = state_of(tmp_path / "run")["step"]
    assert step >= 1 and f"stopped and saved at step {step} of" in stdout and stdout.count("stopped and saved") == 1, stderr
    few = torchrun(2, ROOT / "train.py", [*words, "--batch-size", "1", "--out", "other"], tmp_path)
    assert "--batch-size must be at least the 2 processes, got 1" in few.stderr and not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------- nothing is lost


def state_of(folder):
    """The checkpoint, but for how long it took."""
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state.pop("minutes") >= 0 and state.pop("command").startswith(("python train.py --task ", "torchrun "))
    return state


def assert_same(a, b, where=""):
    """Bit for bit, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, list):
        for i, (c, d) in enumerate(zip(a, b, strict=True)):
            assert_same(c, d, f"{where}[{i}]")
    else:
        assert a == b, where


RESUMED = ["--task lung", "--task synthesis", "--task lung --precision bf16 --eta 0.5 --augment 1", "--task lung --model unet"]


@pytest.mark.parametrize("words", RESUMED)
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_is_an_uninterrupted_run_bit_for_bit(go, monkeypatch, words, stop_at, capsys, no_pictures):
    """SIGINT in a step, --resume: weights, averages, optimiser and evaluations equal those of a run that was left alone."""
    words = f"{words} --steps 5 --batch-size 5"
    given = TINY.replace("--batch-size 4 --steps 4 ", "")
    given = given.replace("--precision fp32", "") if "bf16" in words else given
    _, whole = go(words, "whole", given)
    step = train.Trainer.train_step

    def interrupted(self, *batch):
        loss = step(self, *batch)
        if self.step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    status, folder = go(words, "stopped", given)
    assert status == 130 and f"go on with: python train.py --resume {folder}" in capsys.readouterr().out
    assert state_of(folder)["step"] == stop_at
    monkeypatch.setattr(train.Trainer, "train_step", step)
    assert train.main(["--resume", str(folder)]) == 0
    assert_same(state_of(whole), state_of(folder))
    evaluations = lambda f: [{**line, "seconds": 0} for line in train.Log(f / "log.jsonl", 5).evaluations()]
    assert json.dumps(evaluations(whole)) == json.dumps(evaluations(folder)) and len(evaluations(whole)) == 3


@pytest.mark.parametrize("sig", train.STOP_SIGNALS[1:])
def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(go, monkeypatch, no_pictures, sig):
    """Stopped inside the evaluation of step 2: saved at step 2, and --resume evaluates step 2 first."""
    sample = train.sample_masks

    def interrupted(*args, **kwargs):
        signal.raise_signal(sig)
        return sample(*args, **kwargs)

    monkeypatch.setattr(train, "sample_masks", interrupted)
    status, folder = go("--task lung")
    assert status == 130 and state_of(folder)["step"] == 2 and not train.Log(folder / "log.jsonl", 2).evaluations()
    monkeypatch.setattr(train, "sample_masks", sample)
    assert train.main(["--resume", str(folder)]) == 0
    assert [line["step"] for line in train.Log(folder / "log.jsonl", 4).evaluations()] == [2, 4]


def test_sigterm_to_a_real_process_writes_a_checkpoint(root, tmp_path):
    """The command itself, killed from outside while it trains: status 130, a checkpoint, the line that says how to go on."""
    out = tmp_path / "run"
    words = TINY.replace("--steps 4", "--steps 100000").replace("--eval-every 2", "--eval-every 100000")
    command = [sys.executable, "train.py", "--task", "lung", *words.split(), "--data", str(root), "--out", str(out)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as p:
        for _ in range(600):
            if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text():
                break
            time.sleep(0.1)
        p.send_signal(signal.SIGTERM)
        stdout, stderr = p.communicate(timeout=60)
    assert p.returncode == 130 and f"--resume {out}" in stdout and "Traceback" not in stderr
    assert state_of(out)["step"] >= 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(go, monkeypatch, capsys, no_pictures):
    """Planted nan in step 3: status 1, the message has step and learning rate, last.pt is step 2's and finite."""
    step = train.Trainer.train_step

    def planted(self, *batch):
        return step(self, *batch) * (math.nan if self.step == 3 else 1)

    monkeypatch.setattr(train.Trainer, "train_step", planted)
    status, folder = go("--task lung --warmup 0 --lr-decay none --lr 0.001")
    assert status == 1
    assert f"the loss is nan at step 3 (learning rate 0.001); the last good checkpoint is {folder / 'last.pt'}" in capsys.readouterr().err
    assert state_of(folder)["step"] == 2 and all(v.isfinite().all() for v in state_of(folder)["model"].values())


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(go, monkeypatch, no_pictures, capsys):
    """The loss of step 3 is fine and its gradient is not: nothing is evaluated or saved after it."""
    gradient = train.Trainer.gradient

    def planted(self, *batch):
        loss = gradient(self, *batch)
        if self.step == 3:
            next(self.model.parameters()).grad[0] = math.nan
        return loss

    monkeypatch.setattr(train.Trainer, "gradient", planted)
    status, folder = go("--task lung --clip 0 --steps 3", given=TINY.replace("--steps 4 ", ""))
    assert status == 1 and "a weight is not finite at step 3" in capsys.readouterr().err
    assert state_of(folder)["step"] == 2 and all(v.isfinite().all() for v in state_of(folder)["model"].values())


def test_an_evaluation_that_does_not_fit_into_memory_takes_smaller_pieces():
    """Work that refuses more than 3 rows at once: all rows, in order, each once."""

    def work(rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("planted")
        return rows

    found = list(train.in_pieces(work, np.arange(10), "cpu"))
    assert np.concatenate([rows for rows, _ in found]).tolist() == list(range(10)) and max(len(rows) for rows, _ in found) == 2
    assert all(np.array_equal(rows, done) for rows, done in found)


def test_a_log_cut_off_by_a_power_cut_is_read_up_to_there(tmp_path):
    """Half a last line: dropped, and the file whole again."""
    log = train.Log(tmp_path / "log.jsonl")
    log.add(step=1, loss=0.5)
    log.add(step=2, loss=0.25)
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:-5])
    assert train.Log(tmp_path / "log.jsonl", 9).lines == [dict(step=1, loss=0.5)]
    assert (tmp_path / "log.jsonl").read_text() == text.splitlines(keepends=True)[0]


def test_a_log_is_cut_back_to_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    """Killed after step 2 was logged, with a checkpoint of step 1: step 2 is logged again, not twice."""
    log = train.Log(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.add(step=step, loss=0.5)
    again = train.Log(tmp_path / "log.jsonl", 1)
    again.add(step=2, loss=0.5)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_a_run_goes_on_with_the_images_it_began_with(go, monkeypatch, no_pictures, capsys):
    """Another number of training images is refused; a run on phantoms given by name does not move to other images."""
    _, folder = go("--task lung")
    state = torch.load(folder / "last.pt", weights_only=True)
    seen, load = [], data.load
    monkeypatch.setattr(data, "load", lambda root, *args, **kw: seen.append(root) or load(root, *args, **kw))
    torch.save(state | {"config": state["config"] | {"phantoms": True}}, folder / "last.pt")
    assert train.main(["--resume", str(folder)]) == 0 and set(seen) == {state["config"]["data"]}
    torch.save(state | {"images": 99}, folder / "last.pt")
    assert train.main(["--resume", str(folder)]) == 2
    assert f"{folder} was trained on 99 images, and Train of" in capsys.readouterr().err


def test_a_run_ends_well_where_there_is_no_git(go, monkeypatch, no_pictures):
    """results.json then says that the commit is unknown."""

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    status, folder = go("--task lung")
    assert status == 0 and json.loads((folder / "results.json").read_text())["commit"] == "unknown"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A writer that dies half-way leaves the older file as it was, and nothing beside it."""
    target = tmp_path / "last.pt"
    train.write_whole(target, lambda f: f.write_text("old"))

    def dies(f):
        f.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.write_whole(target, dies)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_finished_run_is_not_overwritten_and_can_be_prolonged(go, capsys, no_pictures):
    """The same command again is refused with what to do; --resume --steps goes on; fewer steps or another flag are refused."""
    _, folder = go("--task lung")
    capsys.readouterr()
    assert go("--task lung")[0] == 2 and f"holds a run already; go on with --resume {folder}" in capsys.readouterr().err
    resume = ["--resume", str(folder)]
    assert train.main([*resume, "--lr", "1"]) == 2 and "--resume keeps the run's settings" in capsys.readouterr().err
    assert train.main([*resume, "--steps", "3"]) == 2 and "--steps must be at least the 4 steps" in capsys.readouterr().err
    for zero in ("--eta 0", "--seed 0"):  # 0 is a value too
        status = train.main([*resume, *zero.split()])
        assert status == (2 if "seed" in zero else 0)
    assert train.main(["--resume", str(folder / "best.pt")]) == 2
    assert f"--resume takes the run folder: --resume {folder}" in capsys.readouterr().err
    assert train.main([*resume, "--steps", "6"]) == 0
    assert state_of(folder)["step"] == 6 and [x["step"] for x in train.Log(folder / "log.jsonl", 6).evaluations()] == [2, 4, 6]


def test_a_finished_run_is_evaluated_anew_under_another_protocol_and_not_trained(go, no_pictures):
    """--resume --ensemble 3: one more evaluation of the same weights, equal to that of evaluate_masks; asked twice, made once."""
    _, folder = go("--task lung")
    before = state_of(folder)
    for _ in range(2):
        assert train.main(["--resume", str(folder), "--ensemble", "3", "--eval-images", "5"]) == 0
    assert_same(before["ema"], state_of(folder)["ema"])
    last = train.Log(folder / "log.jsonl", 4).evaluations()
    assert train.load_run(folder / "best.pt")[2] in (2, 4) and state_of(folder)["step"] == 4
    assert [line["protocol"]["ensemble"] for line in last] == [1, 1, 3] and last[-1]["Val"]["images"] == 5
    assert json.loads((folder / "results.json").read_text())["evaluation"] == last[-1]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--task lung --cond add", "lung-add-0"),
        ("--task synthesis --seed 2", "synthesis-2"),
        ("--task lung --objective vp", "lung-concat-vp-0"),
        ("--task synthesis --classes Normal --objective ncsn", "synthesis-ncsn-Normal-0"),
        ("--task infection --classes COVID-19", "infection-concat-0"),
        ("--task lung --model unet", "lung-unet-0"),
        ("--task infection --model report-unet --cond add", "infection-report-unet-add-0"),
    ],
)
def test_runs_that_learn_other_things_have_other_folders(words, name):
    """Task, conditioning and seed, and what differs of model, objective and classes."""
    assert train.name_of(train.configure(train.parse(words.split()), torch.device("cpu"))) == name


def test_a_notebook_gets_the_finished_run_or_a_shorter_one_trained_here_and_the_next_time_found(root, tmp_path, monkeypatch, no_pictures):
    """open_run: trains a -4-steps run once, goes on with it after a stop, finds it again, and prefers the full run when there is one."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    words, short = f"--task lung --data {root}", TINY.replace("--preset small", "")
    words += " --preset small"
    begun, step = [], train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, *batch: begun.append(self.step) or step(self, *batch))
    stop = train.Run.evaluate
    monkeypatch.setattr(train.Run, "evaluate", lambda self, signals: signal.raise_signal(signal.SIGINT))
    with pytest.raises(train.Stopped, match="lung-concat-0-4-steps was not trained to its end"):
        train.open_run(words, short)
    monkeypatch.setattr(train.Run, "evaluate", stop)
    for _ in range(2):
        model, cfg, folder, label = train.open_run(words, short)
        assert begun == [0, 1, 2, 3] and folder == Path("runs/lung-concat-0-4-steps") and label == f"X-rays, {folder}, step 4"
    assert train.main([*words.split(), *short.split(), "--steps", "3"]) == 0 and len(begun) == 7
    assert train.open_run(words, short)[2] == folder and len(begun) == 7  # 3 steps are not the run of these words
    assert train.main(["--resume", "runs/lung-concat-0", "--steps", "5"]) == 0
    words += " --steps 5"
    assert train.open_run(words, short)[2] == Path("runs/lung-concat-0") and len(begun) == 9
    expected = train.load_run("runs/lung-concat-0")[0].state_dict()
    for name, value in train.open_run(words, short)[0].state_dict().items():
        assert torch.equal(value, expected[name])
    Path("runs/lung-concat-0").rename("runs/named")
    assert train.open_run(f"{words} --out runs/named", short)[2] == Path("runs/named") and len(begun) == 9


def test_a_run_on_phantoms_finds_its_images_again(tmp_path, monkeypatch, capsys):
    """Its own folder while it is there, else the same phantoms of this checkout; without a word about missing X-rays."""
    monkeypatch.setattr(data, "PHANTOMS", tmp_path / "here")
    drawn = []
    monkeypatch.setattr(data, "ensure_phantoms", lambda task, _: drawn.append(task))
    monkeypatch.setattr(data, "locate", lambda given, task: (Path(given), True))
    there = config(phantoms=True, data=str(tmp_path))
    assert train.find_data(there, None) == there and drawn == []
    moved = train.find_data(config(phantoms=True, data=str(tmp_path / "gone")), None)
    assert moved.data == str(tmp_path / "here") and moved.phantoms and drawn == ["lung"]
    assert capsys.readouterr().out == ""


def test_a_damaged_checkpoint_is_refused_by_name(go, capsys, no_pictures):
    """Cut in half: one line, not a traceback; the file is left as it is."""
    _, folder = go("--task lung")
    whole = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert train.main(["--resume", str(folder)]) == 2
    assert f"{folder / 'last.pt'}: not a checkpoint of train.py, or a damaged one" in capsys.readouterr().err
    assert len((folder / "last.pt").read_bytes()) == len(whole) // 2
    state = torch.load(folder / "best.pt", weights_only=True)
    state["config"]["channels"] = 8
    torch.save(state, folder / "best.pt")
    with pytest.raises(train.UserError, match="best.pt: its weights do not fit its configuration"):
        train.load_run(folder / "best.pt")
    state["config"]["channels"] = 4
    next(iter(state["ema"].values()))[0] = math.nan
    torch.save(state, folder / "best.pt")
    with pytest.raises(train.UserError, match="best.pt: a weight is not finite"):
        train.load_run(folder / "best.pt")


def test_best_pt_is_the_evaluation_with_the_highest_validation_dice(go, monkeypatch, no_pictures):
    """Planted scores 0.2, 0.9, 0.5: best.pt is the second evaluation's."""
    scores, evaluate = iter((0.2, 0.9, 0.5)), train.evaluate_masks

    def planted(*args):
        report, shown = evaluate(*args)
        report["Val"]["pooled"]["DICE index"] = next(scores)
        return report, shown

    monkeypatch.setattr(train, "evaluate_masks", planted)
    _, folder = go("--task lung --steps 6", given=TINY.replace("--steps 4 ", ""))
    assert train.load_run(folder / "best.pt")[2] == 4 and train.load_run(folder)[2] == 6
