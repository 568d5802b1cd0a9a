"""The methods of [10] against exact oracles: the cosine schedule, L_hybrid, few passes."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

import config
import data
import diffusion as D
import evaluate
import improved
import networks
import studies
import synthesis
import train
from console import UserError
from patches import to_patches
from test_diffusion import SHORT, S, close, gaussian_world, images, impulses, knows, noises
from testing import CPU, SIZES, shake, split, tiny

F64 = torch.float64
COSINE = improved.cosine_schedule()
SYNTHESIS = dict(task="synthesis", cond=None)
LEARNED = SYNTHESIS | dict(variance="learned")
M, V = 0.1, 0.04  # mean and variance of the pixels of a Gaussian world


def levels(*shape):
    """Random 8-bit levels as k / 127.5 - 1, float64."""
    return ((images(*shape) + 1) * 127.5).round() / 127.5 - 1


def four_pixels():
    """x_0 ~ N(M, V) and its noise, as (1, 1, 2, 2) each.

    What is quadratic in both has its mean over these pixels exactly.
    """
    x = torch.tensor([[-1, -1], [1, 1]], dtype=F64)[None, None]
    return M + V**0.5 * x, x.mT


def best_v(s, t):
    """The v whose sigma_t^2 is the variance of x_{t-1} given x_t in the Gaussian world: Bayes."""
    t = torch.as_tensor(t)
    before, alpha, beta = s.abar[t - 1] * V + 1 - s.abar[t - 1], s.alpha[t], s.beta[t]
    posterior = 1 / (1 / before + alpha / beta)  # before: the variance of x_{t-1}
    least = improved.least_variance(s)[t]
    return (posterior / least).log() / (beta / least).log()


def knows_both(s, v_of):
    """The Gaussian world's model of pairs (eps, v): v = v_of(t), one number for an image."""
    eps_model = gaussian_world(s, M, V)
    return lambda xt, t, y: (eps_model(xt, t, y), v_of(t).reshape(-1, 1, 1, 1).expand_as(xt))


# ---------------------------------------- the cosine schedule


def test_eq17_the_angle_of_the_cosine_grows_evenly():
    """arccos sqrt(f(t)) has equal steps up to T, from 0.008 / 1.008 of a right angle."""
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    angle = (COSINE.abar[:1000] * f0).sqrt().acos() / (math.pi / 2)
    close(angle.diff(), 1 / 1008, rel=1e-8)
    assert angle[0].item() == pytest.approx(0.008 / 1.008, rel=1e-9)


def test_eq17_only_the_last_beta_is_bounded():
    """f(T) = 0 would be beta_T = 1. Entry 0 is the clean image; all three belong together."""
    assert COSINE.T == 1000 and {v.dtype for v in COSINE} == {F64}
    assert COSINE.beta[1000] == 0.999 and COSINE.beta[:1000].max() < 0.8
    assert (COSINE.beta[0], COSINE.abar[0]) == (0, 1)
    close(COSINE.abar, torch.cumprod(COSINE.alpha, 0))
    close(COSINE.alpha, 1 - COSINE.beta)
    close(improved.cosine_schedule(1).abar, torch.tensor([1, 0.001], dtype=F64))
    with pytest.raises(ValueError, match="a schedule needs T >= 1, got T = 0"):
        improved.cosine_schedule(0)


def test_a_run_learns_samples_and_is_measured_by_its_schedule(monkeypatch):
    """--set schedule=cosine shift=0.5: one schedule in all of them, and in the studies."""
    words = f"--task synthesis {SIZES} --set schedule=cosine shift=0.5 channels=4"
    cfg = config.configure(config.parse(words.split()), CPU)
    model, used = networks.build_model(cfg), []

    def noted(function):
        return lambda s, *words, **how: used.append(s) or function(s, *words, **how)

    for name in ("l_simple", "ddim_sample", "vlb_terms"):
        monkeypatch.setattr(D, name, noted(getattr(D, name)))
    part = split(2)
    train.Trainer(cfg, CPU).train_step(torch.from_numpy(part.images), None)
    synthesis.eq7_loss(model, cfg, part, CPU)
    synthesis.sample_images(model, dataclasses.replace(cfg, ddim_steps=2), [0])
    masks = dataclasses.replace(cfg, task="lung", ddim_steps=2)
    evaluate.sample_masks(model, masks, data.to_float(part.images), [0, 1])
    studies.bounds(model, dataclasses.replace(cfg, T=3), part.images, np.arange(2), "beta", 3, CPU)
    expected = [D.shifted(improved.cosine_schedule(T), 0.5).abar for T in (cfg.T,) * 4 + (3,)]
    for s, abar in zip(used, expected, strict=True):
        close(s.abar, abar)


# ---------------------------------------- the learned variance


@pytest.mark.parametrize("s", [S, COSINE, improved.respaced(S, 25)])
def test_eq15_v_walks_from_beta_tilde_to_beta_in_the_logarithm(s):
    """v = 0: Eq. (4)'s variance, v = 1: beta_t, v = 1/4: a quarter of the way, at t = 2..T."""
    t = torch.arange(2, s.T + 1)
    x = torch.zeros(len(t), 1, 1, 2, dtype=F64)
    beta, posterior = s.beta[t].reshape(-1, 1, 1, 1), D.q_posterior(s, x, x, t)[1]
    of = functools.partial(improved.sigma2, s, t=t)
    close(of(x), posterior.expand_as(x))
    close(of(x + 1), beta.expand_as(x))
    close(of(x + 0.25) ** 4, (posterior**3 * beta).expand_as(x))


def test_eq15_each_pixel_has_its_own_variance_and_t_1_takes_beta_tilde_2():
    """beta~_1 = 0 has no logarithm, so no T of 1 has a learned variance."""
    v = torch.tensor([[0.0, 1.0]], dtype=F64)[None, None]
    close(improved.sigma2(S, v, 1).flatten(), torch.stack([D.sigma2(S, "beta~")[2], S.beta[1]]))
    with pytest.raises(ValueError, match="a learned variance needs T >= 2, got T = 1"):
        improved.sigma2(D.linear_schedule(1), v, 1)


@pytest.mark.parametrize("name", ["silent", "learned"])
def test_eq16_l_vlb_is_the_bounds_entry_at_every_t(name):
    """t = 1..T in one batch, one image and one noise: the terms of vlb_terms but for L_T."""
    x0, eps = levels(1, 1, 3, 3), images(1, 1, 3, 3, seed=1)
    v = images(1, 1, 3, 3, seed=2)

    def model(xt, t, y):
        var = v.expand_as(xt) if name == "learned" else torch.ones_like(xt)
        return 0.9 * xt, improved.sigma2(SHORT, var, t)

    t = torch.arange(1, SHORT.T + 1)
    many, noise = x0.expand(SHORT.T, -1, -1, -1), eps.expand(SHORT.T, -1, -1, -1)
    xt = D.q_sample(SHORT, many, t, noise)
    got = improved.l_vlb(SHORT, many, xt, t, *model(xt, t, None))
    close(got, D.vlb_terms(SHORT, model, x0, lambda: eps)[: SHORT.T, 0])
    if name == "silent":  # beta_t, as the fixed variance has it
        fixed = D.vlb_terms(SHORT, lambda xt, t, y: 0.9 * xt, x0, lambda: eps)
        close(got, fixed[: SHORT.T, 0])


@pytest.mark.parametrize("target", D.TARGETS)
def test_eq16_l_hybrid_is_l_simple_and_a_thousandth_of_the_whole_bound(target):
    """t = 1..T in one batch: T times the mean of the terms is their sum, without L_T.

    The first half of the channels has the gradient of L_simple alone, the second that of L_vlb.
    """
    T = SHORT.T
    x0, eps = levels(1, 1, 2, 2), images(1, 1, 2, 2, seed=1)
    answers = images(T, 2, 2, 2, seed=2).requires_grad_()
    t, many, noise = torch.arange(1, T + 1), x0.expand(T, -1, -1, -1), eps.expand(T, -1, -1, -1)
    loss = improved.l_hybrid(SHORT, lambda *_: answers, many, None, t, noise, target)
    (found,) = torch.autograd.grad(loss, answers)

    alone = answers[:, :1]
    simple = D.l_simple(SHORT, lambda *_: alone, many, None, t, noise, target)
    (of_simple,) = torch.autograd.grad(simple, answers, retain_graph=True)
    close(found[:, :1], of_simple[:, :1])
    assert found[:, 0].abs().min() > 0 and found[1:, 1].abs().min() > 0  # t = 1 can be certain

    def model(xt, k, y):
        answer, v = answers[k - 1].detach().split(1, 1)
        return D.eps_of(SHORT, target, answer, xt, k), improved.sigma2(SHORT, (1 + v) / 2, k)

    L = D.vlb_terms(SHORT, model, x0, lambda: eps)[:T]
    close(loss.detach(), simple.detach() + 0.001 * L.sum())

    # The second half: the slope of L_vlb by a small difference
    small = torch.zeros_like(answers)
    small[:, 1] = 1e-5
    both = [
        improved.l_hybrid(SHORT, lambda *_: answers + h, many, None, t, noise, target)
        for h in (-small, small)
    ]
    slope = (both[1] - both[0]).item() / 2e-5
    assert found[:, 1].sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("s", [S, COSINE, improved.respaced(S, 25), SHORT])
def test_eq16_the_best_variance_is_that_of_x_before_given_x_t(s):
    """x_0 ~ N(0.1, 0.04), exact eps: L_{t-1} has slope 0 in v at the true posterior's variance.

    Below it falls, above it rises: so L_vlb teaches v this variance. It lies between the two.
    """
    x0, eps = four_pixels()
    t = torch.arange(2, s.T + 1)
    many, noise = (x.expand(len(t), -1, -1, -1) for x in (x0, eps))
    xt = D.q_sample(s, many, t, noise)
    answer = gaussian_world(s, M, V)(xt, t, None)
    best = best_v(s, t)
    assert 0 < best.min() and best.max() < 1
    slopes = []
    for away in (-0.01, 0, 0.01):
        v = (best + away).reshape(-1, 1, 1, 1).requires_grad_()
        loss = improved.l_vlb(s, many, xt, t, answer, improved.sigma2(s, v.expand_as(xt), t))
        slopes.append(torch.autograd.grad(loss.sum(), v)[0].flatten())
    assert (slopes[0] < 0).all() and (slopes[2] > 0).all()
    assert (slopes[1].abs() < 1e-3 * slopes[2] + 1e-12).all()


# ---------------------------------------- few passes


def test_sec4_the_kept_steps_are_even_and_end_at_1_and_T():
    """0 stands for the clean image. All T steps are all T steps."""
    kept = improved.kept_steps(1000, 25)
    assert (kept[0], kept[1], kept[-1], len(kept)) == (0, 1, 1000, 26)
    assert set(kept[1:].diff().tolist()) == {41, 42}
    assert improved.kept_steps(7, 7).tolist() == list(range(8))
    assert improved.kept_steps(1000, 2).tolist() == [0, 1, 1000]
    for passes in (1, 1001):
        with pytest.raises(ValueError, match=f"between 2 and T = 1000, got {passes}"):
            improved.kept_steps(1000, passes)


def test_eq19_a_respaced_schedule_jumps_from_kept_step_to_kept_step():
    """Its q_sample is that of s at the kept steps; its Eq. (1), step by step, leads there."""
    s, kept = improved.respaced(S, 25), improved.kept_steps(1000, 25)
    x0, eps = images(1, 1, 2, 2), images(1, 1, 2, 2, seed=1)
    keep, var = 1.0, 0.0
    for k in range(1, 26):
        close(D.q_sample(s, x0, k, eps), D.q_sample(S, x0, int(kept[k]), eps))
        keep, var = keep * (1 - s.beta[k]).sqrt(), (1 - s.beta[k]) * var + s.beta[k]
        close(torch.stack([keep**2, var]), torch.stack([s.abar[k], 1 - s.abar[k]]))


@pytest.mark.parametrize("s", [S, COSINE, SHORT])
def test_eq19_all_T_steps_are_the_schedule_itself(s):
    for found, expected in zip(improved.respaced(s, s.T), s):
        close(found, expected)
    model = object()
    assert improved.walk(s, model, s.T) == (s, model)


def test_sec4_the_network_is_asked_at_the_steps_of_the_whole_schedule():
    """25 passes of DDPM and of the bound: at 1000, 958, ..., 1; one known image costs nothing.

    So what the network hears, what is in x_t and what the schedule says belong together.
    """
    x0, asked = levels(2, 1, 2, 2), []

    def model(xt, t, y):
        asked.append(t.unique().item())
        return knows(S, x0)(xt, t, y)

    s, eps_model = improved.walk(S, model, 25)
    x = D.ddpm_sample(s, eps_model, noises(x0))
    assert asked == improved.kept_steps(1000, 25)[1:].flip(0).tolist()
    close(x, x0, abs=1e-9)
    L = D.vlb_terms(s, eps_model, x0, noises(x0), variance="beta~")
    assert asked[25:] == asked[:25][::-1]
    close(L[1:25], torch.zeros(24, 2), abs=1e-9)


def bits(s, passes, variance):
    """The mean bound of the Gaussian world; "best": sigma_t^2 of the true posterior."""
    x0, eps = four_pixels()
    if variance != "best":
        s, model = improved.walk(s, gaussian_world(s, M, V), passes)
        return D.vlb_terms(s, model, x0, lambda: eps, variance=variance).sum().item()
    model, few = gaussian_world(s, M, V), improved.respaced(s, passes)
    strided = improved.strided(model, s.T, passes)
    both = improved.with_variance(few, lambda xt, k, y: (strided(xt, k, y), v_like(few, k, xt)))
    return D.vlb_terms(few, both, x0, lambda: eps).sum().item()


def v_like(s, t, x):
    """best_v at t, for each pixel of x."""
    return best_v(s, t).reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("s", [S, COSINE])
def test_the_bound_stays_above_the_entropy_and_the_best_variance_is_nearest(s):
    """x_0 ~ N(0.1, 0.04), exact eps. The fewer the passes, the more the fixed variances cost.

    The best variance costs the same at any number of passes, because the reverse step is Gaussian:
    what is left is the prior and the decoder at t = 1. The entropy is that of levels of width
    2 / 255.
    """
    entropy = 0.5 * math.log2(2 * math.pi * math.e * V) + math.log2(127.5)
    above = {
        v: [bits(s, k, v) - entropy for k in (25, 50, 100, 1000)] for v in ("beta", "beta~", "best")
    }
    for fixed in ("beta", "beta~"):
        assert all(a > b for a, b in zip(above[fixed], above[fixed][1:]))
        assert all(a > b for a, b in zip(above[fixed], above["best"]))
    assert above["best"] == pytest.approx([above["best"][0]] * 4, rel=1e-6)
    assert 0 < above["best"][0] < 0.004
    assert above["beta"][0] > 0.05


def test_sec4_samples_of_25_passes_have_the_worlds_variance_if_theirs_is_the_best():
    """The squares of all draws' weights in x_0 sum to V within 0.5 %; with beta they do not."""
    cfg = config.Config(**LEARNED, sampler="strided", ddim_steps=25)
    few, kept = improved.respaced(S, 25), improved.kept_steps(1000, 25).tolist()

    def v_of(t):
        return best_v(few, torch.tensor([kept.index(k) for k in t.tolist()]))

    def variance(cfg, model):
        x0 = improved.ancestral(cfg, S, model, impulses(25), None).flatten()
        return (x0[:-1] - x0[-1]).square().sum().item()

    assert variance(cfg, knows_both(S, v_of)) == pytest.approx(V, rel=0.005)
    for fixed in D.VARIANCES:
        how = dataclasses.replace(cfg, variance=fixed)
        assert variance(how, gaussian_world(S, M, V)) != pytest.approx(V, rel=0.05)


# ---------------------------------------- in a run


@pytest.mark.parametrize("size", [16, 128])
def test_a_network_that_learns_its_variance_has_a_second_half(size):
    """Fresh: target 0, v = 1/2. Its other weights are those of the seed's plain network.

    On patches each half is put together from its own channels.
    """
    cfg = tiny(**LEARNED, image_size=size)
    net = networks.build_model(cfg)
    plain = networks.build_model(dataclasses.replace(cfg, variance="beta")).state_dict()
    changed = [
        k for k, w in net.state_dict().items() if not torch.equal(w[: len(plain[k])], plain[k])
    ]
    assert changed == []
    xt, t = images(2, 1, size, size).float(), torch.tensor([3, 900])
    target, v = improved.halves(net(xt, t), xt)
    assert target.shape == v.shape == xt.shape
    assert (target == 0).all() and (v == 0.5).all()
    if size == 128:
        shake(net)
        inner = net.unet(to_patches(xt, 2), t)
        target, v = improved.halves(net(xt, t), xt)
        assert torch.equal(to_patches(target, 2), inner[:, :4])
        assert torch.equal(to_patches(v, 2), (1 + inner[:, 4:]) / 2)


@pytest.mark.parametrize("target", D.TARGETS)
def test_a_run_learns_by_l_hybrid_and_its_evaluation_by_eq7_is_that_of_the_first_half(target):
    """train.loss_of, and eq7_loss: what another v answers changes the first and not the second."""
    cfg = tiny(**LEARNED, target=target, eval_images=3)
    x0, eps = data.to_float(split(3).images), images(3, 1, 16, 16).float()
    t = torch.tensor([1, 40, 900])
    part = train.batches.Batch(x0, None, t, eps)
    learn, s = train.loss_of(cfg), D.schedule(cfg.T, cfg.pixel_shift)
    both = images(3, 2, 16, 16, seed=4).float()
    close(learn(lambda *_: both, part), improved.l_hybrid(s, lambda *_: both, *part, target))

    def measured(v):
        def model(xt, t, y):
            return torch.cat([0.3 * xt, torch.full_like(xt, v)], 1)

        return synthesis.eq7_loss(model, cfg, split(5), CPU)["loss"], float(learn(model, part))

    (loss, hybrid), (other, other_hybrid) = measured(-1.0), measured(1.0)
    plain = dataclasses.replace(cfg, variance="beta")
    expected = synthesis.eq7_loss(lambda xt, t, y: 0.3 * xt, plain, split(5), CPU)["loss"]
    assert loss == other == expected and hybrid != other_hybrid


@pytest.mark.parametrize("sampler, passes", [("ddpm", 20), ("strided", 6)])
@pytest.mark.parametrize("variance", improved.VARIANCES)
def test_ddpm_draws_with_the_variance_of_the_run(sampler, passes, variance):
    """X-rays of a random network: ddpm_sample's on the respaced schedule, by hand. T = 20."""
    cfg = tiny(
        **SYNTHESIS, variance=variance, target="v", T=20, shift=1.0, sampler=sampler, ddim_steps=6
    )
    config.check(cfg)
    model, s = shake(networks.build_model(cfg)), D.linear_schedule(20)
    kept = [round(1 + 19 * k / (passes - 1)) for k in range(passes)]
    assert evaluate.passes_of(cfg) == passes
    few = D.of_abar(s.abar[[0, *kept]])

    def eps_model(xt, k, y):
        t = torch.tensor(kept)[k - 1]
        answer = model(xt, t).detach()
        eps = D.eps_of(s, "v", answer[:, :1], xt, t)
        log_sigma2 = [D.at(v.log(), k, xt) for v in (few.beta, improved.least_variance(few))]
        v = (1 + answer[:, 1:]) / 2
        sigma2 = (v * log_sigma2[0] + (1 - v) * log_sigma2[1]).exp()
        return (eps, sigma2) if variance == "learned" else eps

    noise = D.ImageNoise(evaluate.EVAL_SEED, [4, 9], (1, 16, 16))
    fixed = "beta" if variance == "learned" else variance
    expected = D.ddpm_sample(few, eps_model, noise, None, fixed)
    close(synthesis.sample_images(model, cfg, [4, 9]), expected, rel=1e-4, abs=1e-4)


def test_other_samplers_and_studies_do_not_see_v():
    """DDIM and the pixel classifiers run with a network that has learned its variance."""
    cfg = tiny(**LEARNED, ddim_steps=2)
    model = shake(networks.build_model(cfg))
    assert synthesis.sample_images(model, cfg, [0]).shape == (1, 1, 16, 16)
    x, positive = data.to_float(split(2).images), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    answer = studies.from_scratch(cfg, x, positive, 0, CPU, steps=1, batch=1)(x)
    assert answer.shape == x.shape


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--set schedule=cosine --sampler ode",
            "§2.1 here reads its times off the linear schedule",
        ),
        ("--set schedule=cosine --objective vp", "got --objective vp, --sampler ddim"),
        ("--set variance=learned --objective vp", "needs --objective eps, and T of at least 2"),
        (
            "--set variance=learned T=1 --sampler ddim --ddim-steps 1",
            "T of at least 2, got eps and 1",
        ),
        ("--set variance=both", "--set variance must be one of beta, beta~, learned, got both"),
        (
            "--sampler strided --ddim-steps 1",
            "must be between 2 and T = 1000 for --sampler strided",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(words, message):
    with pytest.raises(UserError) as refusal:
        config.configure(config.parse(f"--task synthesis {words}".split()), CPU)
    assert message in str(refusal.value)


# ---------------------------------------- bits per dimension


def test_the_bounds_of_a_run_are_vlb_terms_in_few_passes_for_each_variance():
    """X-rays of a random network, T = 20 in 5 passes: each image's own noise, whatever its batch.

    x_0_hat is clipped: without it other numbers come out.
    """
    cfg, images = tiny(**LEARNED, T=20, target="v", shift=1.0), split(4).images
    model, s = shake(networks.build_model(cfg)), D.linear_schedule(20)
    rows, x0 = np.array([1, 3]), data.to_float(images[[1, 3]])
    for variance in improved.VARIANCES:
        counted = []
        found = studies.bounds(model, cfg, images, rows, variance, 5, CPU, counted.append)
        alone = studies.bounds(model, cfg, images, rows[1:], variance, 5, CPU)
        assert found[1] == pytest.approx(alone[0], rel=1e-4) and counted == [2] * 5
        answers = evaluate.eps_model_of(model, cfg, s, CPU, None, True)
        few = improved.respaced(s, 5)
        both = improved.with_variance(few, improved.strided(answers, 20, 5))

        def eps_model(xt, k, y, variance=variance, both=both):
            return both(xt, k, y) if variance == "learned" else both(xt, k, y)[0]

        def expected(clip, variance=variance, few=few, eps_model=eps_model):
            noise = D.ImageNoise(0, rows, (1, 16, 16), purpose=D.Purpose.LIKELIHOOD)
            how = dict(variance="beta~" if variance == "beta~" else "beta", clip=clip)
            return D.vlb_terms(few, eps_model, x0, noise, **how).sum(0).double()

        close(torch.from_numpy(found), expected(True), rel=1e-4)
        assert (torch.from_numpy(found) / expected(False) - 1).abs().min() > 1e-3


@pytest.fixture
def saved(tmp_path, root, elsewhere):
    """saved(**settings) -> a run folder with last.pt, whose images are the tiny data."""

    def save(**changes):
        cfg = tiny(**SYNTHESIS, T=20, ddim_steps=5, data=str(root), **changes)
        weights = shake(networks.build_model(cfg)).state_dict()
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        state = {"config": dataclasses.asdict(cfg), "step": 7, "ema": weights}
        torch.save(state, folder / "last.pt")
        return str(folder)

    return save


@pytest.mark.parametrize("variance, columns", [("beta", 2), ("learned", 3)])
def test_the_command_prints_bits_per_dimension_and_writes_those_of_each_image(
    saved, root, tmp_path, capsys, variance, columns
):
    """A row for each number of passes, a column for each variance: mean ± standard error."""
    out = tmp_path / "out" / "bits.json"
    words = ["--data", str(root), "--device", "cpu", "--out", str(out), "--images", "3"]
    run = saved(variance=variance)
    assert studies.main(["likelihood", run, *words, "--passes", "2", "5", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-4:]
    names = improved.VARIANCES[:columns]
    assert lines[0] == f"| passes | {' | '.join(f'bits per dimension, {n}' for n in names)} |"
    written = json.loads(out.read_text())
    assert written["study"] == "likelihood"
    assert [(b["passes"], b["variance"]) for b in written["bounds"]] == [
        (k, name) for k in (2, 5) for name in names
    ]
    for line, k in zip(lines[2:], (2, 5), strict=True):
        cells = [str(k)]
        for found in written["bounds"]:
            if found["passes"] == k:
                assert len(set(found["bits"])) == 3
                error = np.std(found["bits"], ddof=1) / 3**0.5
                cells.append(f"{np.mean(found['bits']):.4f} ± {error:.4f}")
        assert line == f"| {' | '.join(cells)} |"


def test_passes_out_of_range_are_refused_in_one_line(saved, capsys):
    """--passes 1 and 21 of T = 20; the other studies do not read them."""
    for passes in ("1", "21"):
        words = ["likelihood", saved(), "--device", "cpu", "--passes", "5", passes]
        assert studies.main(words) == 2
        rule = f"--passes must be between 2 and T = 20, got {passes}"
        assert capsys.readouterr().err == f"studies.py: error: {rule}\n"
