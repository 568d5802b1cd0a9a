"""§2 and §3.2's samplers against exact oracles: no training, float64, on the CPU."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import diffusion as D

S = D.linear_schedule()  # the report's: T = 1000
HUNDRED = D.linear_schedule(100, 1e-3, 0.2)  # SegDiff's [1]
SHORT = D.linear_schedule(20, 1e-3, 0.6)  # nearly as noisy at its end, in 20 steps
EVERY_T = torch.arange(1, S.T + 1)
F64 = torch.float64


def images(*shape, seed=0):
    """Random images in [-1, 1], float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1


def noises(like, seed=0):
    """A noise callable: fresh N(0, I) like `like`, the same sequence for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def coefficients(f, n=1, k=2):
    """The k coefficients of a function linear in k images, each (n,): probe with (1, 0), (0, 1)."""
    probes = torch.eye(k, dtype=F64)[:, :, None, None, None, None].expand(k, k, n, 1, 1, 1)
    return torch.stack([f(*probe).flatten() for probe in probes])


def close(a, b, rel=1e-9, abs=1e-12):
    """a equals b: tensors of one shape, or b one number for all of a."""
    b = b if torch.is_tensor(b) else torch.full_like(a, b)
    torch.testing.assert_close(a, b, rtol=rel, atol=abs, check_dtype=False)


def knows(s, x0, target="eps"):
    """The exact model of a data set of one image: it reads eps off x_t."""
    return lambda xt, t, y: D.target_of(s, target, x0, t, D.predict_eps(s, xt, t, x0))


def silent(xt, t, y):
    """The model that answers 0."""
    return 0 * xt


def gaussian_world(s, m, v):
    """The exact eps_theta for x_0 ~ N(m, v) pixel by pixel: E[eps | x_t], by regression on x_t."""

    def eps_model(xt, t, y):
        a, b = D.at(s.abar.sqrt(), t, xt), D.at((1 - s.abar).sqrt(), t, xt)
        return b * (xt - a * m) / (a**2 * v + b**2)

    return eps_model


def finite_world(s, data):
    """The exact eps_theta for a finite data set (K, C, H, W): E[x_0 | x_t] is a mean of its images.

    Each image is weighted by the softmax of its log likelihood.
    """

    def eps_model(xt, t, y):
        a, b = D.at(s.abar.sqrt(), t, xt)[:, None], D.at((1 - s.abar).sqrt(), t, xt)[:, None]
        weight = Normal(a * data, b).log_prob(xt[:, None]).sum((2, 3, 4)).softmax(1)
        return D.predict_eps(s, xt, t, torch.einsum("bk,kchw->bchw", weight, data))

    return eps_model


def impulses(T):
    """Noise for a batch of T + 1: the k-th draw is 1 in image k, else 0.

    Image k then shows the weight of the k-th draw.
    """
    draws = iter(torch.eye(T + 1, dtype=F64)[:, :, None, None, None])
    return lambda: next(draws)


# ---------------------------------------- schedule


def test_sec32_schedule_has_the_reports_endpoints():
    """beta_1 = 1e-4, beta_1000 = 0.02 exactly, equal increments between; entry 0 is x_0's."""
    assert (S.T, S.beta[1].item(), S.beta[S.T].item()) == (1000, 1e-4, 0.02)
    assert (S.beta[0].item(), S.abar[0].item()) == (0, 1)
    close(S.beta[1:].diff(), (0.02 - 1e-4) / 999)


def test_sec32_schedule_is_float64_until_the_last_moment():
    """1 - abar_1 = beta_1 to 11 digits.

    The weight of the noise of a float32 image at t = 1 is 0.01 to float32's own precision.
    """
    assert {v.dtype for v in S} == {F64}
    assert (1 - S.abar[1]).item() == pytest.approx(1e-4, rel=1e-11)
    xt = D.q_sample(S, torch.zeros(1, 1, 1, 1), 1, torch.ones(1, 1, 1, 1))
    assert xt.dtype == torch.float32 and xt.item() == pytest.approx(0.01, rel=1e-7)


@pytest.mark.parametrize("arguments", [(0,), (10, 0.0, 0.02), (10, 1e-4, 1.0)])
def test_sec32_schedule_refuses_what_is_none(arguments):
    with pytest.raises(ValueError, match=r"T >= 1 and 0 < beta < 1, got T = \d+, beta_1 = "):
        D.linear_schedule(*arguments)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_a_shifted_schedule_noises_x0_as_if_it_were_scaled(scale):
    """Its q_sample is that of scale x_0 by §3.2's schedule, times what keeps the variance 1.

    alpha, beta and abar belong together.
    """
    s, x0, eps = D.shifted(S, scale), images(3, 1, 4, 4), images(3, 1, 4, 4, seed=1)
    assert s.abar[0] == 1 and s.beta[0] == 0 and s.T == 1000
    close(s.abar, torch.cumprod(s.alpha, 0), rel=1e-9, abs=0)
    close(s.beta, 1 - s.alpha)
    t = torch.tensor([1, 400, 1000])
    k = D.at((scale**2 * S.abar + 1 - S.abar).sqrt(), t, x0)
    close(k * D.q_sample(s, x0, t, eps), D.q_sample(S, scale * x0, t, eps))
    assert scale == 1 or bool((s.abar[1:] < S.abar[1:]).all()) == (scale < 1)


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_a_schedule_is_not_shifted_to_nothing(scale):
    with pytest.raises(ValueError, match=f"scale must be above 0 and finite, got {scale}"):
        D.shifted(S, scale)


def test_sec32_one_step_is_a_schedule():
    """T = 1: the only beta is beta_1; the noised image keeps 1 - beta_1 of the clean variance."""
    assert D.linear_schedule(1).abar.tolist() == [1, 1 - 1e-4]


# ---------------------------------------- forward process


def test_eq2_is_t_steps_of_eq1():
    """Mean and variance accumulated one q_step at a time are those of one q_sample, exactly."""
    keep, add = coefficients(lambda x, eps: D.q_step(S, x, EVERY_T, eps), S.T)
    jump = coefficients(lambda x, eps: D.q_sample(S, x, EVERY_T, eps), S.T)
    mean, var = 1.0, 0.0
    for t in range(S.T):
        mean, var = keep[t] * mean, keep[t] ** 2 * var + add[t] ** 2
        close(jump[:, t], torch.stack([mean, var.sqrt()]))


def test_eq2_at_t_0_is_the_clean_image_and_at_T_is_noise():
    """q_sample at t = 0 returns x_0; at T a tenth of a thousandth of the variance is left of it."""
    x0, eps = images(2, 1, 3, 3), images(2, 1, 3, 3, seed=1)
    assert torch.equal(D.q_sample(S, x0, 0, eps), x0)
    close(D.q_sample(S, x0, S.T, eps), eps, abs=0.01)


def test_eq2_takes_t_image_by_image():
    """A batch with its own t for each image is those images one by one with an int t."""
    x0, eps = images(3, 2, 4, 4), images(3, 2, 4, 4, seed=1)
    batch = D.q_sample(S, x0, torch.tensor([1, 500, 1000]), eps)
    one_by_one = [D.q_sample(S, x0[[i]], t, eps[[i]]) for i, t in enumerate([1, 500, 1000])]
    close(batch, torch.cat(one_by_one), rel=0, abs=0)


def test_eq4_posterior_is_bayes_rule():
    """x_{t-1} given x_0 is Gaussian (Eq. 2), x_t given x_{t-1} is linear in it (Eq. 1).

    One is conditioned on the other.
    """
    # x_{t-1} = a x_0 + b eps  and  x_t = c x_{t-1} + d eps'
    a, b = coefficients(lambda x, eps: D.q_sample(S, x, EVERY_T - 1, eps), S.T)
    c, d = coefficients(lambda x, eps: D.q_step(S, x, EVERY_T, eps), S.T)
    gain = b**2 * c / (c**2 * b**2 + d**2)  # regression of x_{t-1} on x_t
    mean = coefficients(lambda x0, xt: D.q_posterior(S, x0, xt, EVERY_T)[0], S.T)
    close(mean, torch.stack([a - gain * c * a, gain]))
    x = torch.zeros(S.T, 1, 1, 1, dtype=F64)
    close(D.q_posterior(S, x, x, EVERY_T)[1].flatten(), gain / c * d**2)


def test_eq4_posterior_at_t_1_is_the_image():
    """x_0 given x_0 is known: mean x_0 whatever x_1, variance 0."""
    x0 = images(2, 1, 3, 3)
    mean, var = D.q_posterior(S, x0, images(2, 1, 3, 3, seed=1), 1)
    close(mean, x0)
    assert var.item() == 0


# ---------------------------------------- x_0, eps and v


@pytest.mark.parametrize("target", D.TARGETS)
def test_eq7_eps_of_undoes_target_of(target):
    """At every t, a network's right answer turns back into the eps that made x_t."""
    x0, eps = images(S.T, 1, 2, 2), images(S.T, 1, 2, 2, seed=1)
    xt = D.q_sample(S, x0, EVERY_T, eps)
    answer = D.target_of(S, target, x0, EVERY_T, eps)
    close(D.eps_of(S, target, answer, xt, EVERY_T), eps, abs=1e-11)


def test_eq7_the_targets_are_what_they_are_called():
    """ "eps" is eps, "x0" is x_0; (x_t, v) is (x_0, eps) turned by an angle.

    That is a matrix of orthonormal rows whose determinant is +1.
    """
    x0, eps = images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    assert D.target_of(S, "eps", x0, 7, eps) is eps and D.target_of(S, "x0", x0, 7, eps) is x0
    xt = coefficients(lambda x0, eps: D.q_sample(S, x0, EVERY_T, eps), S.T)
    v = coefficients(lambda x0, eps: D.target_of(S, "v", x0, EVERY_T, eps), S.T)
    turn = torch.stack([xt, v]).permute(2, 0, 1)  # (T, 2, 2)
    close(turn @ turn.mT, torch.eye(2, dtype=F64).expand(S.T, 2, 2))
    close(torch.linalg.det(turn), torch.ones(S.T))


def test_eq2_predict_x0_and_predict_eps_solve_it():
    """Given x_t and one of (x_0, eps), the other comes back, at every t."""
    x0, eps = images(S.T, 1, 2, 2), images(S.T, 1, 2, 2, seed=1)
    xt = D.q_sample(S, x0, EVERY_T, eps)
    close(D.predict_x0(S, xt, EVERY_T, eps), x0, abs=1e-11)
    close(D.predict_eps(S, xt, EVERY_T, x0), eps, abs=1e-11)


# ---------------------------------------- reverse process and losses


def test_eq5_mean_through_x0_hat_is_the_mean_through_eps():
    """mu~(x_t, x0_hat) = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha) at every t."""
    want = torch.stack([S.alpha**-0.5, -S.beta / ((1 - S.abar) * S.alpha).sqrt()])[:, 1:]
    for variance in D.VARIANCES:
        close(coefficients(lambda xt, eps: D.p_step(S, xt, EVERY_T, eps, variance)[0], S.T), want)


def test_eq5_variances_are_beta_t_and_that_of_eq4():
    """sigma_t^2 = beta_t, that of Eq. (1)'s own noise, by default; "beta~" is the posterior's."""
    x = torch.zeros(S.T, 1, 1, 1, dtype=F64)
    _, step = coefficients(lambda x, eps: D.q_step(S, x, EVERY_T, eps), S.T)
    close(D.p_step(S, x, EVERY_T, x)[1].flatten(), step**2)
    close(D.p_step(S, x, EVERY_T, x, "beta~")[1], D.q_posterior(S, x, x, EVERY_T)[1], rel=0, abs=0)
    refusal = r"variance must be one of \('beta', 'beta~'\), got 'learned'"
    with pytest.raises(ValueError, match=refusal):
        D.p_step(S, x, EVERY_T, x, "learned")


def test_eq5_clip_moves_x0_hat_to_the_nearest_possible_image():
    """A model whose x0_hat is 3 or -3 is, clipped, one whose x0_hat is 1 or -1.

    A model whose x0_hat lies within [-1, 1] is untouched.
    """
    sign, eps = images(4, 1, 3, 3).sign(), images(4, 1, 3, 3, seed=1)
    for size, kept in ((3.0, 1.0), (0.5, 0.5)):
        xt = D.q_sample(S, size * sign, 300, eps)
        close(D.p_step(S, xt, 300, eps, clip=True)[0], D.q_posterior(S, kept * sign, xt, 300)[0])
        close(D.p_step(S, xt, 300, eps)[0], D.q_posterior(S, size * sign, xt, 300)[0])


@pytest.mark.parametrize("variance", D.VARIANCES)
def test_eq6_is_the_part_of_the_kl_that_depends_on_the_network(variance):
    """L_{t-1} of a wrong model minus that of the right one, by torch's KL, at every t = 2..T."""
    t = EVERY_T[1:]
    x0, eps, answer = (images(S.T - 1, 1, 2, 2, seed=seed) for seed in range(3))
    xt = D.q_sample(S, x0, t, eps)

    def kl(eps_hat):
        mean_q, var_q = D.q_posterior(S, x0, xt, t)
        mean_p, var_p = D.p_step(S, xt, t, eps_hat, variance)
        nats = kl_divergence(Normal(mean_q, var_q.sqrt()), Normal(mean_p, var_p.sqrt()))
        return nats.flatten(1).sum(1)

    got = D.l_weighted(S, lambda *a: answer, x0, t, eps, variance=variance)
    close(got, kl(answer) - kl(eps), rel=1e-6)
    if variance == "beta~":  # there is no other part
        close(got, kl(answer), rel=1e-6)


def test_eq6_at_t_1_is_the_decoders_squared_error():
    """At t = 1 x_{t-1} is x_0 itself: -log N(x_0; mu_theta, beta_1) above its least."""
    x0, eps, answer = (images(3, 1, 2, 2, seed=seed) for seed in range(3))
    t = torch.ones(3, dtype=torch.int64)
    mean, var = D.p_step(S, D.q_sample(S, x0, t, eps), t, answer)
    nats = Normal(x0, var.sqrt()).log_prob(x0) - Normal(mean, var.sqrt()).log_prob(x0)
    close(D.l_weighted(S, lambda *a: answer, x0, t, eps), nats.flatten(1).sum(1), rel=1e-6)


def test_eq7_is_zero_for_the_true_noise_and_one_for_silence():
    """A model that reads eps off x_t scores 0. One that answers 0 scores E eps^2 = 1.

    The second number is measured on 10^6 draws, within 5 standard errors.
    """
    x0 = images(8, 1, 4, 4)
    assert D.l_simple(S, knows(S, x0), x0).item() < 1e-18
    x0 = images(100, 1, 100, 100)
    standard_error = math.sqrt(2 / x0.numel())
    assert D.l_simple(S, silent, x0).item() == pytest.approx(1, abs=5 * standard_error)


@pytest.mark.parametrize("target", D.TARGETS)
def test_eq7_is_zero_for_the_true_answer_whatever_the_target(target):
    """A model that answers the target exactly has no loss; one that answers another target has."""
    x0 = images(8, 1, 4, 4)
    for answer in D.TARGETS:
        loss = D.l_simple(S, knows(S, x0, answer), x0, target=target).item()
        assert loss < 1e-18 if answer == target else loss > 0.1


def test_eq7_draws_every_step_from_1_to_T_and_no_other():
    """T = 5, 5000 draws: each step 1000 times within 5 standard errors; each image its own eps."""
    seen = []

    def model(xt, t, y):
        seen.extend([t, xt])
        return xt

    D.l_simple(D.linear_schedule(5), model, torch.zeros(5000, 1, 1, 1))
    count = torch.bincount(seen[0])
    assert len(count) == 6 and count[0] == 0
    assert (count[1:] - 1000).abs().max() < 5 * math.sqrt(1000 * 0.8)
    assert len(seen[1].unique()) > 4900


def test_eq7_keeps_the_t_and_eps_it_is_given():
    """Given t and eps the loss is no draw: the mean of (eps - answer)^2, x_t that of Eq. (2)."""
    x0, eps, t = images(2, 1, 3, 3), images(2, 1, 3, 3, seed=1), torch.tensor([3, 900])
    error = torch.tensor([1.0, 3.0], dtype=F64)[:, None, None, None]
    loss = D.l_simple(S, lambda xt, t, y: D.predict_eps(S, xt, t, x0) + error, x0, t=t, eps=eps)
    close(loss, 5.0)  # (1 + 9) / 2


def test_the_condition_reaches_the_model_untouched():
    """y is handed on as it is by both losses, the bound and both samplers."""
    x0, eps = images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    Y, seen = object(), []

    def model(xt, t, y):
        seen.append((y is Y, t.dtype, tuple(t.shape)))
        return 0 * xt

    D.l_simple(SHORT, model, x0, Y)
    D.l_weighted(SHORT, model, x0, torch.tensor([2, 3]), eps, Y)
    D.vlb_terms(SHORT, model, x0, lambda: eps, Y)
    D.ddpm_sample(SHORT, model, lambda: eps, Y)
    D.ddim_sample(SHORT, model, lambda: eps, Y, steps=5)
    assert len(seen) == 1 + 1 + 20 + 20 + 5 and set(seen) == {(True, torch.int64, (2,))}


def test_everything_stays_on_the_images_device():
    """torch's "meta" device stands for a GPU: the model gets t there, and all results are there."""
    x0 = torch.zeros(2, 1, 2, 2, device="meta")
    seen = []

    def model(xt, t, y):
        seen.append((xt.device.type, t.device.type, xt.dtype))
        return xt

    def noise():
        return torch.zeros_like(x0)

    t = torch.tensor([2, 3])
    out = [D.l_simple(SHORT, model, x0, t=t), D.l_weighted(SHORT, model, x0, t, x0)]
    out += [D.vlb_terms(SHORT, model, x0, noise), D.ddpm_sample(SHORT, model, noise)]
    out += [D.ddim_sample(SHORT, model, noise, steps=3, eta=1.0)]
    assert {z.device.type for z in out} == {"meta"}
    assert set(seen) == {("meta", "meta", torch.float32)}


# ---------------------------------------- the variational bound


def test_vlb_prior_term_is_the_kl_to_pure_noise():
    """The last of T + 1 terms is torch's KL of q(x_T | x_0) and N(0, I), in bits per dimension."""
    x0 = images(3, 1, 2, 2)
    L = D.vlb_terms(SHORT, knows(SHORT, x0), x0, noises(x0))
    a, b = coefficients(lambda x, eps: D.q_sample(SHORT, x, SHORT.T, eps)).flatten()
    nats = kl_divergence(Normal(a * x0, b), Normal(torch.zeros_like(x0), torch.ones_like(x0)))
    assert L.shape == (SHORT.T + 1, 3)
    close(L[SHORT.T], nats.mean((1, 2, 3)) / math.log(2))


def test_vlb_of_one_known_image_costs_nothing_but_prior_and_decoder():
    """Exact eps of a one-image data set, sigma^2 = beta~: L_1..L_{T-1} are 0.

    L_0 is the mass of the image's levels 0, 102 and 255; the outer two reach to infinity.
    """
    x0 = torch.tensor([[-1, -0.2, 1]], dtype=F64).reshape(1, 1, 1, 3)
    L = D.vlb_terms(S, knows(S, x0), x0, noises(x0), variance="beta~")
    close(L[1 : S.T], torch.zeros(S.T - 1, 1), abs=1e-9)
    inner = math.erf(1 / 255 / math.sqrt(2 * D.q_posterior(S, x0, x0, 2)[1].item()))
    nats = -(2 * math.log((1 + inner) / 2) + math.log(inner)) / 3
    assert L[0].item() == pytest.approx(nats / math.log(2), rel=1e-6)


@pytest.mark.parametrize("variance", D.VARIANCES)
def test_vlb_terms_are_eq6_and_a_constant(variance):
    """A wrong model's L_{t-1} minus the right one's is Eq. (6), with each image's own noise."""
    x0, eps = images(3, 1, 2, 2), images(3, 1, 2, 2, seed=1)
    wrong = D.vlb_terms(SHORT, silent, x0, lambda: eps, variance=variance)
    right = D.vlb_terms(SHORT, knows(SHORT, x0), x0, lambda: eps, variance=variance)
    for t in range(2, SHORT.T + 1):
        nats = D.l_weighted(SHORT, silent, x0, torch.full((3,), t), eps, variance=variance)
        close((wrong - right)[t - 1], nats / (4 * math.log(2)), rel=1e-7)  # bits per dimension


def test_vlb_bounds_the_likelihood_of_a_known_gaussian():
    """x_0 ~ N(0.1, 0.04), exact eps: the mean bound is 0.0115 bits a pixel above the entropy.

    The difference is what finite steps cost. Every term is quadratic in x_0 and in its own noise,
    so the four pixels (m +- std, noise +- 1) are its mean exactly. The entropy is that of levels of
    width 2 / 255.
    """
    m, v = 0.1, 0.04
    x0 = torch.tensor([[-1, -1], [1, 1]], dtype=F64)[None, None]
    z = x0.mT
    bound = D.vlb_terms(S, gaussian_world(S, m, v), m + v**0.5 * x0, lambda: z).sum().item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * v) + math.log2(127.5)
    assert bound - entropy == pytest.approx(0.0115, abs=0.0005)


@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.0031, 0.7, 1.2])
@pytest.mark.parametrize("std", [0.002, 0.1, 5.0])
def test_vlb_decoder_shares_all_mass_among_the_256_levels(mean, std):
    """The 256 probabilities sum to 1; the lower 128 hold the mass below 0, the border between."""
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    mean, std = torch.tensor([mean, std], dtype=F64)
    p = D.discretised_log_likelihood(levels, mean, std).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    below = Normal(mean, std).cdf(torch.tensor(0.0, dtype=F64))
    assert p[:128].sum().item() == pytest.approx(below.item(), abs=1e-9)


def test_vlb_gaussian_kl_is_torchs():
    """gaussian_kl against torch.distributions, all four arguments different."""
    m1, m2 = images(50), images(50, seed=1)
    v1, v2 = images(50, seed=2).exp(), images(50, seed=3).exp()
    want = kl_divergence(Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt()))
    close(D.gaussian_kl(m1, v1, m2, v2), want)


# ---------------------------------------- noise


def draw(seed, index, members=1, times=2):
    noise = D.ImageNoise(seed, index, (1, 4, 4), members)
    return torch.stack([noise() for _ in range(times)], 1)  # (B * members, times, 1, 4, 4)


def test_sec43_noise_of_an_image_depends_on_seed_and_image_alone():
    """Batch, order, companions and the ensemble's size change nothing in an image's own draws."""
    all_at_once = draw(0, range(6))
    assert torch.equal(draw(0, [5, 2]), all_at_once[[5, 2]])
    assert torch.equal(draw(0, torch.tensor([3])), all_at_once[[3]])
    assert torch.equal(draw(0, [4, 1], members=3)[[0, 3]], all_at_once[[4, 1]])
    assert torch.equal(draw(0, [4], members=3), draw(0, [1, 4], members=4)[4:7])


def test_sec43_noise_differs_for_another_seed_image_member_or_draw():
    """No two of many streams share a number; some agree in their low 32 bits, some trade places.

    The numbers are float32: a chance pair may be equal.
    """
    high = 2**32
    keys = [(0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (1 + high, 1), (1, 1 + high), (high, high)]
    values = torch.cat([draw(seed, [i], members=3, times=3).flatten() for seed, i in keys])
    assert len(values) == 8 * 3 * 3 * 16 and len(values.unique()) > len(values) - 3


def test_no_two_purposes_share_a_random_number():
    """2500 numbers of each stream, all different; the seeds for torch too, and the plain seeds."""
    seeds, images, members = (0, 1, 2**40), (0, 1, 513), (0, 1, 8)
    keys = list(itertools.product(seeds, D.Purpose, images, members))
    raw = [D.philox(*key).bit_generator.random_raw(2500) for key in keys]
    assert len(np.unique(raw)) == len(keys) * 2500
    words = set(D.Purpose) - {D.Purpose.PHANTOM}  # word 0 is no word to a SeedSequence
    states = [D.seed_of(*key) for key in itertools.product(seeds, words, range(30))]
    states += [int(np.random.SeedSequence(seed).generate_state(1)[0]) for seed in (0, 1)]
    assert len({*states, *seeds}) == len(states) + len(seeds)
    for purpose in D.Purpose:
        noise = D.ImageNoise(3, [5], (1, 4, 4), 2, purpose=purpose)()
        for member in range(2):
            expected = D.philox(3, purpose, 5, member).standard_normal((1, 4, 4), np.float32)
            assert np.array_equal(noise[member], expected)


def test_sec43_noise_is_standard_normal():
    """Moments 1 to 4 of 10^6 draws within 5 standard errors; images, pixels, draws uncorrelated."""
    z = D.ImageNoise(3, range(100), (1, 100, 100))
    z, later = z().double(), z().double()
    n = z.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (z**power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(spread / n))
    for a, b in ((z[1:], z[:-1]), (z[..., 1:], z[..., :-1]), (z, later)):
        assert (a * b).mean().item() == pytest.approx(0, abs=6 / math.sqrt(n))


# ---------------------------------------- DDPM


@pytest.mark.parametrize("variance", D.VARIANCES)
def test_ddpm_stays_near_a_known_gaussian(variance):
    """The squares of all draws' weights in x_0, read off by impulses, sum to v within 3 %.

    With beta the sum is above v, with beta~ below: the true reverse variance lies between the two
    (of x_0 ~ N(0, 1) and of a single image), so v must lie between.
    """
    m, v = 0.3, 0.1
    model = gaussian_world(S, m, v)
    x0 = D.ddpm_sample(S, model, impulses(S.T), variance=variance, clip=False).flatten()
    var = (x0[:-1] - x0[-1]).square().sum().item()  # image T has no noise at all
    assert x0[-1].item() == pytest.approx(m, abs=1e-5)
    assert (1 < var / v < 1.01) if variance == "beta" else (0.97 < var / v < 1)


def test_ddpm_with_sigma2_beta_is_exact_on_pure_noise():
    """For x_0 ~ N(0, 1) the reverse of Eq. (1) has variance beta_t exactly.

    Only the last step's variance is not added.
    """
    model = gaussian_world(S, 0.0, 1.0)
    x0 = D.ddpm_sample(S, model, impulses(S.T), variance="beta", clip=False).flatten()
    assert x0.square().sum().item() == pytest.approx(1 - 1e-4, rel=1e-9)


def test_ddpm_with_sigma2_beta_tilde_walks_eq2_backwards():
    """One known image, x_T drawn from q(x_T | x_0): x_t has Eq. (2)'s variance at every step."""
    x0 = torch.zeros(SHORT.T + 1, 1, 1, 1, dtype=F64)
    draws, scale = impulses(SHORT.T), iter([(1 - SHORT.abar[SHORT.T]).sqrt()] + [1] * SHORT.T)

    def noise():
        return draws() * next(scale)

    how = dict(variance="beta~", clip=False, trajectory=True)
    path = D.ddpm_sample(SHORT, knows(SHORT, x0), noise, **how)
    close(path.flatten(1).square().sum(1), 1 - SHORT.abar.flip(0))


def test_ddpm_takes_every_step_and_adds_no_noise_at_the_last():
    """The model is asked at T, T-1, ..., 1; noise is drawn T times: x_T, and z for t = T..2."""
    asked, drawn = [], []
    x = torch.zeros(2, 1, 1, 1, dtype=F64)

    def model(xt, t, y):
        asked.append(t.unique().item())
        return xt

    D.ddpm_sample(S, model, lambda: drawn.append(len(asked)) or x)
    assert asked == list(range(1000, 0, -1)) and drawn == list(range(1000))


# ---------------------------------------- DDIM


def test_ddim_timesteps_are_the_50_of_the_report_written_out():
    assert D.ddim_timesteps(1000, 50) == list(range(1000, -1, -20))


LENGTHS = [(1000, 1), (1000, 7), (1000, 50), (1000, 999), (1000, 1000), (20, 20), (1, 1)]


@pytest.mark.parametrize("T, steps", LENGTHS)
def test_ddim_timesteps_start_at_T_end_at_0_and_have_the_length_asked_for(T, steps):
    """Strictly downwards, and no stride more than one longer than another."""
    taus = D.ddim_timesteps(T, steps)
    strides = {a - b for a, b in zip(taus, taus[1:])}
    assert (taus[0], taus[-1], len(taus)) == (T, 0, steps + 1)
    assert min(strides) >= 1 and max(strides) - min(strides) <= 1


@pytest.mark.parametrize("steps", [0, 1001])
def test_ddim_timesteps_refuse_more_than_T(steps):
    with pytest.raises(ValueError, match=f"steps must be between 1 and T = 1000, got {steps}"):
        D.ddim_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_ddim_eq12_with_the_true_noise_stays_on_eq2(steps):
    """From q_sample(x_0, t, eps), with that eps, eta = 0 lands on q_sample(x_0, t_prev, eps)."""
    x0, eps = images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    taus = D.ddim_timesteps(S.T, steps)
    for t, t_prev in zip(taus, taus[1:]):
        landed = D.ddim_step(S, D.q_sample(S, x0, t, eps), eps, t, t_prev)
        close(landed, D.q_sample(S, x0, t_prev, eps), abs=1e-11)


def test_ddim_eq12_at_eta_1_is_the_eq4_posterior():
    """One step down with eta = 1: the mean is Eq. (4)'s at x0_hat, the noise its, at every t."""
    s, zero = HUNDRED, torch.zeros(1, 1, 1, 1, dtype=F64)
    for t in range(1, s.T + 1):
        step = coefficients(lambda xt, eps, z: D.ddim_step(s, xt, eps, t, t - 1, 1.0, z), k=3)
        mean = coefficients(lambda xt, eps: D.p_step(s, xt, t, eps, "beta~")[0])
        std = D.p_step(s, zero, t, zero, "beta~")[1].sqrt().reshape(1)
        close(step.flatten(), torch.cat([mean.flatten(), std]), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("t, t_prev", [(1000, 980), (500, 499), (20, 0), (1000, 0), (1, 0)])
def test_ddim_eq12_keeps_eq2s_marginal_at_any_eta(eta, t, t_prev):
    """x_0's weight is sqrt(abar_prev); eps and noise share the variance 1 - abar_prev.

    The standard deviation of the noise grows as eta.
    """
    a, b = coefficients(lambda x, eps: D.q_sample(S, x, t, eps)).flatten()
    want = coefficients(lambda x, eps: D.q_sample(S, x, t_prev, eps)).flatten()

    def weights(eta):
        def step(x, eps, z):
            return D.ddim_step(S, a * x + b * eps, eps, t, t_prev, eta, z)

        return coefficients(step, k=3).flatten()

    x, eps, noise = weights(eta)
    close(torch.stack([x, torch.hypot(eps, noise)]), want, abs=1e-11)
    close(noise, eta * weights(1.0)[2])
    assert (noise > 0) == (t_prev > 0)


def test_ddim_converges_to_a_known_gaussian():
    """x_0 ~ N(m, v), exact eps: the sampler is a line in x_T that maps mean to mean.

    Its slope tends to sqrt(v). The error is O(1/steps): doubling the steps halves it within 5 %.
    With the report's 50 steps a sample of N(m, 1/4) comes out 5.7 % too narrow.
    """
    m, v = 0.3, 0.25
    model = gaussian_world(S, m, v)
    abar_T = S.abar[S.T].item()
    z = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)[:, None, None, None]
    x_T = math.sqrt(abar_T) * m + math.sqrt(abar_T * v + 1 - abar_T) * z  # q(x_T), standardised
    short = {}
    for steps in (50, 100, 200, 400):
        x0 = D.ddim_sample(S, model, lambda: x_T, steps=steps, clip=False).flatten()
        close(x0[0] + x0[2], 2 * x0[1], abs=1e-12)
        close(x0[1], m, abs=1e-9)
        short[steps] = 1 - (x0[2] - x0[1]).item() / math.sqrt(v)
    assert short[50] == pytest.approx(0.057, abs=0.0005)
    for steps in (50, 100, 200):
        assert short[steps] / short[2 * steps] == pytest.approx(2, rel=0.05)


def test_ddim_eta_0_is_a_function_of_x_T_alone():
    """Noise is drawn once: the "nondeterministic nature" (§4.3) of DDIM is x_T.

    With eta > 0 noise is drawn for each step as well.
    """
    x, model = images(2, 1, 2, 2), gaussian_world(S, 0.3, 0.1)
    for eta, calls in ((0.0, 1), (0.2, 8), (1.0, 8)):
        drawn = []
        D.ddim_sample(S, model, lambda: drawn.append(0) or x, steps=7, eta=eta)
        assert len(drawn) == calls
    with pytest.raises(ValueError, match="eta must be between 0 and 1, got 1.5"):
        D.ddim_sample(S, model, lambda: x, eta=1.5)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_at_eta_1_and_all_T_steps_is_ddpm(clip):
    """The same draws through both samplers, sigma^2 = beta~: one path. Half the eta leaves it."""
    x, model = images(3, 1, 2, 2), gaussian_world(HUNDRED, 0.6, 0.3)
    ddpm = D.ddpm_sample(HUNDRED, model, noises(x), variance="beta~", clip=clip, trajectory=True)

    def ddim(eta):
        return D.ddim_sample(HUNDRED, model, noises(x), None, 100, eta, clip, trajectory=True)

    close(ddim(1.0), ddpm, abs=1e-9)
    assert (ddim(0.5) - ddpm)[-1].abs().max() > 0.1


def test_ddim_asks_the_model_at_the_steps_visited():
    """50 passes, at 1000, 980, ..., 20: the first where x_t is noise, none at 0."""
    asked = []

    def model(xt, t, y):
        asked.append(t.unique().item())
        return xt

    D.ddim_sample(S, model, lambda: images(2, 1, 2, 2))
    assert asked == list(range(1000, 0, -20))


# ---------------------------------------- both samplers

SAMPLERS = {
    "ddim": functools.partial(D.ddim_sample, steps=50),
    "ddim eta 1": functools.partial(D.ddim_sample, steps=100, eta=1.0),
    "ddpm": D.ddpm_sample,
    "ddpm beta~": functools.partial(D.ddpm_sample, variance="beta~"),
}


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sec32_sampling_a_finite_data_set_returns_its_images(name, clip):
    """With the exact eps of three images every sample is one of them, and in 24 each turns up."""
    data = images(3, 1, 4, 4).sign() * 0.9
    noise = noises(torch.empty(24, 1, 4, 4, dtype=F64))
    x0 = SAMPLERS[name](HUNDRED, finite_world(HUNDRED, data), noise, clip=clip)
    distance = (x0[:, None] - data).abs().amax((2, 3, 4))  # (24, 3)
    assert distance.amin(1).max().item() < 1e-5
    assert set(distance.argmin(1).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sec43_the_same_noise_gives_the_same_image_in_any_batch(name):
    """Image 6 sampled with two others is image 6 sampled alone; image 5 is another."""
    model = gaussian_world(HUNDRED, 0.2, 0.1)

    def sample(index):
        return SAMPLERS[name](HUNDRED, model, D.ImageNoise(0, index, (1, 4, 4)))

    three, one = sample([5, 6, 7]), sample([6])
    close(three[1:2], one, abs=1e-5)
    assert (three[0] - three[1]).abs().max() > 1e-2


def test_ddim_trajectory_goes_from_x_T_to_x_0_through_the_steps_visited():
    """One known image, eta = 0: entry k is Eq. (2) at the k-th step; the last is the sample."""
    x0, x_T = images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    model = knows(S, x0)
    path = D.ddim_sample(S, model, lambda: x_T, steps=7, trajectory=True)
    eps = D.predict_eps(S, x_T, S.T, x0)
    want = torch.stack([D.q_sample(S, x0, t, eps) for t in D.ddim_timesteps(S.T, 7)])
    close(path, want, abs=1e-10)
    assert torch.equal(path[-1], D.ddim_sample(S, model, lambda: x_T, steps=7))


def test_ddpm_trajectory_goes_from_x_T_to_x_0_one_step_at_a_time():
    """T + 1 entries; each follows from the one before and its draw by Eq. (5).

    The last is the sample.
    """
    x, model = images(2, 1, 2, 2), gaussian_world(SHORT, 0.2, 0.1)
    path = D.ddpm_sample(SHORT, model, noises(x), trajectory=True)
    sample = D.ddpm_sample(SHORT, model, noises(x))
    noise = noises(x)
    assert len(path) == SHORT.T + 1
    assert torch.equal(path[0], noise()) and torch.equal(path[-1], sample)
    for k, t in enumerate(range(SHORT.T, 1, -1)):
        mean, var = D.p_step(SHORT, path[k], t, model(path[k], t, None), clip=True)
        close((path[k + 1] - mean) / var.sqrt(), noise(), abs=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sec32_clipping_keeps_x0_hat_an_image_and_lets_eps_follow(name):
    """A model that believes in an image of 3s is, clipped, one that believes in an image of 1s.

    It walks the same whole path.
    """
    like = torch.empty(2, 1, 2, 2, dtype=F64)

    def path(belief, clip):
        model = knows(HUNDRED, torch.tensor(belief))
        return SAMPLERS[name](HUNDRED, model, noises(like), clip=clip, trajectory=True)

    close(path(3.0, clip=True), path(1.0, clip=False), abs=1e-8)
    close(path(3.0, clip=False)[-1], torch.full_like(like, 3.0), abs=1e-8)
