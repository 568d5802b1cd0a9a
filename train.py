r"""Train one model of the report: X-rays from noise (§3), or masks from X-rays (§4).

    python train.py --task lung --cond concat        §4.4  lung masks       (Table 1, Figure 5)
    python train.py --task lung --cond add           §4.4                   (Table 1, Figure 4)
    python train.py --task infection --cond add      §4.5  infection masks  (Table 2, Figure 7)
    python train.py --task synthesis                 §3    chest X-rays     (Figure 3)
    python train.py --task masks --data DIR          your own: DIR/images and DIR/masks (pairs.py)
    python train.py --task lung --model unet         §4.4  without diffusion, in one pass
    python train.py --resume runs/lung-concat-0      go on with a run that was stopped
    python train.py --resume runs/lung-concat-0 --ensemble 9     evaluate it in another way

The images are those of COVID-QU-Ex in ./COVID-QU-Ex or --data DIR; without them, generated chest
phantoms. Ctrl-C saves the run and says how to go on. Several GPUs, or CPU processes, share a batch:

    torchrun --standalone --nproc-per-node 4 train.py --task lung     same batches, same numbers

A run folder, by default runs/<what it learns>-<seed>, holds checkpoints, log, tables and pictures
(runs.py lists them).
"""

import copy
import dataclasses
import math
import shlex
import sys
import time

import numpy as np
import torch
from torch import distributed
from torch.nn.utils import clip_grad_norm_

import baselines
import batches
import config
import devices
import diffusion
import evaluate
import improved
import memory
import networks
import runs
import score
import synthesis
from console import StatusLine, Stopped, StopSignals, UserError, clock, exit_status, message

SAVE_EVERY = 300  # seconds between checkpoints

# ---------------------------------------- the step


def loss_of(cfg):
    """The loss that a run learns by, as loss(model, micro-batch): it is chosen here, once."""
    l_simple = improved.l_hybrid if cfg.variance == "learned" else diffusion.l_simple

    def eq7(model, part):
        s = improved.schedule_of(cfg, part.x0.device)
        return l_simple(s, model, part.x0, part.y, part.t, part.eps, cfg.target)

    def sec21(model, part):
        process = score.process_of(cfg.T, cfg.pixel_shift)
        return score.score_matching(process, cfg.T, model, *part, cfg.target)  # x0, y, t, eps

    def sec44(model, part):
        return baselines.l_supervised(model(part.y), part.x0)

    if cfg.supervised:
        return sec44
    return eq7 if cfg.objective == "eps" else sec21


def learning_rate(cfg, step):
    """Linear warm-up, then constant, or a cosine whose last step is one short of 0."""
    warm = min(1.0, step / cfg.warmup) if cfg.warmup else 1.0
    if cfg.lr_decay == "none":
        return cfg.lr * warm
    return cfg.lr * warm * ((1 + math.cos(math.pi * (step - 1) / cfg.steps)) / 2)


class Trainer:
    """Model, averaged model (EMA) and optimiser, which a checkpoint holds; and the step."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.step = cfg, device, 0
        self.loss = loss_of(cfg)
        self.model = networks.build_model(cfg).to(device, memory_format=devices.layout(cfg.plan))
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        parameters, decay = self.model.parameters(), cfg.weight_decay
        self.optimizer = torch.optim.AdamW(parameters, cfg.lr, weight_decay=decay, fused=True)
        self.parallel = devices.parallel(self.model, cfg.plan)
        self.rows = devices.rows_of_this_process(cfg.batch_size)
        self.images = self.rows.stop - self.rows.start
        self.micro_batch = cfg.micro_batch or self.images

    def train_step(self, images, masks):
        """One gradient step. Returns the loss, still on the device.

        images, masks: the whole split, (N, 1, S, S) uint8 on the device; in synthesis `masks` is
        what is given, or None
        """
        self.step += 1
        batch = batches.batch(self.cfg, self.step, images, masks)  # x0, y, t, eps

        # The gradient of the mean loss over the batch
        loss = self.gradient(batch.rows(self.rows))

        # AdamW on the clipped gradient, at the learning rate of this step
        if self.cfg.max_grad_norm:
            clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step)
        self.optimizer.step()

        # The averaged weights, which are the ones that are evaluated
        decay = min(self.cfg.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averaged, weights = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        return loss

    @memory.halved_when_memory_runs_out
    def gradient(self, batch):
        """The gradient of the batch's mean loss, micro-batch by micro-batch. Returns that loss.

        batch: the rows of this process. The gradient is the sum over all processes, the loss the
        part of this one.
        """
        self.optimizer.zero_grad(set_to_none=True)
        *parts, last = batch.parts(self.micro_batch)
        with devices.without_exchange(self.parallel):
            losses = [self.backward(part) for part in parts]
        return sum(losses) + self.backward(last)

    def backward(self, part):
        """Backward pass of a micro-batch, weighted by its fraction of the batch, so that gradients
        add up to that of the mean. Returns the weighted loss."""
        with devices.autocast(self.cfg, self.device):
            loss = self.loss(self.parallel, part) * (len(part.x0) / self.cfg.batch_size)
        devices.backward(loss)
        return loss.detach()


# ---------------------------------------- the loop


class Run:
    """A run while it trains: the loop, and what it shows, measures and saves."""

    def __init__(self, cfg, device, path, splits, checkpoint, command):
        self.cfg, self.device, self.splits = cfg, device, splits
        self.sizes = {name: len(split.images) for name, split in splits.items()}
        self.trainer = Trainer(cfg, device)
        self.command, self.minutes_before = command, 0.0
        if checkpoint:
            runs.restore(self.trainer, checkpoint)
            self.command = f"{checkpoint['command']} && {command}"  # all that made this run
            self.minutes_before = checkpoint["minutes"]
        self.folder, self.protocol = runs.Folder(path, cfg, checkpoint), runs.protocol_of(cfg)
        self.losses = []  # since the last log line, on the device: a step reads nothing back
        self.mean_loss = "..."
        self.status, self.first_step = StatusLine(), self.trainer.step
        self.train_s = self.evaluate_s = 0.0
        self.began = self.saved_at = time.monotonic()
        if not checkpoint:
            self.save()  # the folder is taken from now on, and there is a checkpoint to go back to
        self.log = self.folder.begin(self.trainer.step, evaluate.markdown_table)

    def train(self):
        """Steps, log lines, evaluations and checkpoints, until cfg.steps or a stop signal."""
        trainer = self.trainer
        images, masks = batches.on_device(self.cfg, self.splits["Train"], self.device)
        log_every = min(50, max(1, self.cfg.steps // 100))
        with StopSignals() as signals:
            try:
                while True:
                    if self.evaluation_due():
                        self.evaluate(signals)
                    if trainer.step >= self.cfg.steps:
                        return
                    start = time.monotonic()
                    self.losses.append(trainer.train_step(images, masks))
                    if trainer.step % log_every == 0:
                        self.log_loss()
                    self.train_s += time.monotonic() - start
                    self.show()
                    old = time.monotonic() - self.saved_at > SAVE_EVERY
                    stop, old = devices.any_process(signals.received is not None, old)
                    if stop:
                        raise Stopped
                    if old:
                        self.save()
            except Stopped:
                self.save()
                raise

    def log_loss(self):
        """The mean loss since the last log line. FloatingPointError where a loss is not finite."""
        if not self.losses:
            return
        losses = devices.summed(torch.stack(self.losses).cpu()).tolist()
        first = self.trainer.step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self.not_finite(f"the loss is {loss}", step)
        lr = learning_rate(self.cfg, self.trainer.step)
        self.log.add(step=self.trainer.step, loss=float(np.mean(losses)), lr=lr)
        self.losses, self.mean_loss = [], f"{np.mean(losses):.4f}"

    def check_finite(self):
        """Before anything is measured or saved: no loss and no weight is nan or infinite."""
        self.log_loss()
        if not all(p.isfinite().all() for p in self.trainer.model.parameters()):
            raise self.not_finite("a weight is not finite", self.trainer.step)

    def not_finite(self, what, step):
        lr, last = learning_rate(self.cfg, step), self.folder.path / "last.pt"
        where = f"at step {step} (learning rate {lr:.2g})"
        return FloatingPointError(f"{what} {where}; the last good checkpoint is {last}")

    def save(self):
        """last.pt: all that --resume needs."""
        self.check_finite()
        facts = dict(images=self.sizes["Train"], command=self.command)
        state = runs.state_of(self.trainer) | facts | dict(minutes=self.minutes())
        self.folder.write_checkpoint("last.pt", state)
        self.saved_at = time.monotonic()

    def minutes(self):
        """Minutes this run has taken, including those before a resume. Loading is not counted."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def evaluation_due(self):
        """At every eval_every-th step and the last, once under each protocol."""
        step = self.trainer.step
        due = step > 0 and (step % self.cfg.eval_every == 0 or step == self.cfg.steps)
        return due and not any(line["step"] == step for line in self.log.evaluations(self.protocol))

    def evaluate(self, signals):
        """Evaluate train and validation, log and draw it, and keep last.pt and best.pt."""
        step, start = self.trainer.step, time.monotonic()
        self.check_finite()
        progress = evaluate.progress_of(self.cfg, f"step {step}", self.sizes, signals.check)
        masks = self.cfg.task != "synthesis"
        measure = evaluate.evaluate_masks if masks else synthesis.evaluate_images
        model = devices.laid_out(self.trainer.ema, self.device)
        report, shown = measure(model, self.cfg, self.splits, self.device, progress)
        self.evaluate_s = time.monotonic() - start
        seconds = dict(seconds=round(self.evaluate_s, 1))
        line = dict(step=step, protocol=self.protocol, **report, **seconds)

        # best.pt first: a run that is killed before the line is logged evaluates again
        earlier = self.log.evaluations(self.protocol)
        best = max([*earlier, line], key=evaluate.quality)["step"]
        if best == step and not any(known["step"] == step for known in self.log.evaluations()):
            self.folder.write_checkpoint("best.pt", runs.state_of(self.trainer))
        self.log.add(**line)
        self.save()
        self.folder.write_pictures(self.log.lines, shown, step)
        compared = "" if self.folder.finished else f" (best so far at step {best})"
        found = f"validation {evaluate.headline(report['Val'])}{compared}"
        message(f"step {step}: {found}; {self.folder.place}/")

    def test(self, splits):
        """{"Test": as evaluate_masks} of the Test split. Nothing is chosen by it."""
        progress = evaluate.progress_of(self.cfg, "Test", {"Test": len(splits["Test"].images)})
        model = devices.laid_out(self.trainer.ema, self.device)
        report, _ = evaluate.evaluate_masks(model, self.cfg, splits, self.device, progress)
        self.log.add(step=self.trainer.step, protocol=self.protocol, **report)
        message(f"Test, {report['Test']['images']} images: {evaluate.headline(report['Test'])}")
        return report

    def show(self):
        """Step, loss, images a second, and the time left with its evaluations."""
        cfg, step = self.cfg, self.trainer.step
        each = self.train_s / (step - self.first_step)
        left = clock(evaluate.time_left(cfg, self.sizes, step, each, self.evaluate_s))
        speed = f"{cfg.batch_size / each:.1f} images/s"
        text = f"step {step}/{cfg.steps}  loss {self.mean_loss}  {speed}  {left} left"
        self.status.show(text, last=step == cfg.steps)


def cost_of_a_step(cfg, device):
    """(seconds, peak bytes of this process) of a step on this machine: two are made, on noise.

    They have one image, then as many as take about five seconds. A larger batch costs more by what
    an image costs: AdamW's part is paid once.
    """

    def timed(n):
        trainer = Trainer(dataclasses.replace(cfg, batch_size=n, micro_batch=0), device)
        memory.fit_memory(trainer)
        images, masks = batches.on_device(cfg, batches.noise_split(cfg, n), device)
        trainer.train_step(images, masks).item()  # the first step sets up what it needs
        start = time.monotonic()
        losses = [trainer.train_step(images, masks) for _ in range(2)]
        losses[-1].item()  # waits for the device
        return (time.monotonic() - start) / 2, trainer

    batch, one = cfg.batch_size, devices.world()  # an image for each process
    first, trainer = timed(one)
    peak, trainer = memory.peak_with(trainer, cfg), None  # now: a process may keep what it frees
    if batch == one:
        return first, peak
    n = min(batch, max(2 * one, int(5 * one / first)))
    seconds, _ = timed(n)
    an_image = max(0.0, seconds - first) / (n - one)
    return seconds + (batch - n) * an_image, peak


# ---------------------------------------- the command


def dry_run(args, cfg, path, step, device):
    """What the run would be, in lines: settings, images, steps and time. Nothing is written."""
    where, sizes = runs.images_found(args, cfg)
    cfg = dataclasses.replace(runs.with_steps(cfg, sizes["Train"]), data="")
    lines = [f"{path} on {device}", networks.describe(cfg, words=True)]
    lines += [f"  data             {where}", runs.describe_sizes(cfg, sizes)]
    if much := memory.shortage(networks.without_memory(cfg), cfg, device):
        return "\n".join([*lines, f"  time             not measured: {much}"])
    each, peak = cost_of_a_step(cfg, device)
    sizes.pop("Test", None)  # it is evaluated once
    total = clock(evaluate.time_left(cfg, sizes, step, each))
    lines.append(f"  time             about {total} ({each:.2f} s a step, evaluations included)")
    lines.append(f"  memory           about {peak / 1e9:.1f} GB at the peak of a step")
    return "\n".join(lines)


def start(args, command):
    """Train the run that the command line asks for. Returns the exit status."""
    device = devices.choose_device(args.device)
    cfg, path, checkpoint = runs.prepare(args, device)
    if args.test and cfg.task == "synthesis":
        raise UserError("--test evaluates masks; --task synthesis has none")
    if args.dry_run:
        step = checkpoint["step"] if checkpoint else 0
        message(dry_run(args, cfg, path, step, device))
        return 0
    if not checkpoint:  # the numbers of a resumed run are in memory already
        much = memory.shortage(networks.without_memory(cfg), cfg, device)
        config.refuse(much, much)
    cfg, splits = runs.load_splits(args, cfg, checkpoint, path)
    test = {"Test": splits.pop("Test")} if args.test else {}
    processes = f", {devices.world()} processes" if devices.world() > 1 else ""
    sizes = {name: len(split.images) for name, split in splits.items()}
    message(f"{path} on {device}{processes}\n{networks.describe(cfg)}")
    message(runs.describe_sizes(cfg, sizes))

    with devices.locked(path):
        run = Run(cfg, device, path, splits, checkpoint, command)
        del checkpoint  # a copy of all that the run now holds
        message(f"  memory           {memory.fit_memory(run.trainer)}")
        return finish(run, test)


def finish(run, test):
    """Train a Run to its end, and write its results. Returns the exit status."""
    cfg, folder = run.cfg, run.folder
    try:
        run.train()
    except Stopped:
        go_on = f"python train.py --resume {shlex.quote(str(folder.path))}"
        at = f"stopped and saved at step {run.trainer.step} of {cfg.steps}"
        unchanged = "stopped; the run stays as it was"
        message(unchanged if folder.finished else f"{at}; go on with: {go_on}")
        return 130
    tested, last = run.test(test) if test else {}, run.log.evaluations(run.protocol)[-1]
    tables = evaluate.tables_of(cfg, last, tested)
    folder.write_results(tables, run.command, last, run.minutes(), tested, run.device)
    shown = "\n\n".join(tables.values())
    message(f"\n{shown}\n\ncheckpoint, pictures and numbers: {folder.place}/")
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = config.parse(argv, __doc__)

    def work():
        try:
            with devices.joined():
                launcher = ["torchrun", "--nproc-per-node", str(devices.world())]
                launcher = launcher if devices.world() > 1 else ["python"]
                return start(args, shlex.join([*launcher, "train.py", *argv]))
        except FloatingPointError as e:
            print(f"train.py: stopped: {e}", file=sys.stderr)
            return 1
        except RuntimeError as e:
            if not (distributed.is_initialized() and "peer" in str(e)):
                raise
            print("train.py: stopped: another process ended", file=sys.stderr)
            return 1

    # Ctrl-C is meant before or after the training. Within it, StopSignals saves.
    advice = "--resume goes on from the last checkpoint, --device cpu is slow but fits"
    return exit_status("train.py", work, advice, "what was written before is whole")


if __name__ == "__main__":
    sys.exit(main())
