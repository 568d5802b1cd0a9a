"""Score networks and SDEs (§2.1) against closed forms.

They are Gaussian worlds, a finite data set, and the report's own schedule.
"""

import itertools
import math

import pytest
import torch

import diffusion
import score as sc

S = diffusion.linear_schedule()
PROCESSES = {"vp": sc.vp(), "ve": sc.ve(), "steps": sc.steps_of(S.abar)}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
M, V = 0.3, 0.04  # the Gaussian world: data N(M, V) in every pixel


def world(process, m=M, v=V):
    """The exact score of N(m, v) data: p_t = N(a m, a^2 v + std^2)."""

    def score(x, t):
        a, std = process.marginal(t)
        return (a * m - x) / (a * a * v + std * std)

    return score


def draws(shape, seed=0):
    """noise(): fresh float64 standard normal draws."""
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def f64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def moments(x, mean, var):
    """Mean and variance of independent pixels, within 4 standard errors."""
    n = x.numel()
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(var / n)
    assert abs(float(x.var()) / var - 1) < 4 * math.sqrt(2 / n)


# ---------------------------------------- processes


@every_process
@pytest.mark.parametrize("t", [0.0105, 0.3005, 0.7005, 0.9995])
def test_sec21_the_marginal_solves_the_sde(process, t):
    """d log a / dt = f and d std^2 / dt = 2 f std^2 + g^2, by central differences.

    The times lie on the report's steps and between them.
    """
    h, f, g = 1e-5, process.f(t), process.g(t)
    (a_0, std_0), (a_1, std_1), (_, std) = (process.marginal(u) for u in (t - h, t + h, t))
    assert (math.log(a_1) - math.log(a_0)) / (2 * h) == pytest.approx(f, rel=1e-5, abs=1e-9)
    assert (std_1**2 - std_0**2) / (2 * h) == pytest.approx(2 * f * std**2 + g**2, rel=1e-5)


def test_sec21_the_vp_sde_in_1000_steps_is_the_reports_schedule():
    """beta_k = beta((k - 1) / 999) / 1000."""
    beta = [sc.vp().g(k / 999) ** 2 / 1000 for k in range(1000)]
    torch.testing.assert_close(f64(beta), S.beta[1:], rtol=1e-12, atol=0)


def test_sec21_the_reports_steps_have_eq_2_at_every_step_and_its_noise_levels():
    """(a, std) at k/T; sigma = std / a is 0.0100 to 157.4.

    time_of is the inverse, and stops at both ends.
    """
    process = PROCESSES["steps"]
    for k in (1, 2, 500, 999, 1000):
        eq2 = math.sqrt(S.abar[k]), math.sqrt(1 - S.abar[k])
        assert process.marginal(k / 1000) == pytest.approx(eq2, rel=1e-9)
        assert sc.time_of(process, sc.level(process, k / 1000)) == pytest.approx(k / 1000, abs=1e-9)
    assert process.marginal(0.0) == (1.0, 0.0)
    first, second = S.alpha[1:3].log().tolist()  # the slope goes on to 0 as it comes
    assert process.f(0.0) == pytest.approx(1000 * (1.5 * first - 0.5 * second) / 2)
    least, largest = sc.level(process, 1e-3), sc.level(process, 1.0)
    assert (f"{least:.4f}", f"{largest:.1f}") == ("0.0100", "157.4")
    assert sc.time_of(process, 1e6) == pytest.approx(1)
    assert sc.time_of(process, 0.0) == pytest.approx(0)


def test_sec21_ncsns_levels_and_the_ve_process():
    """Ten geometric levels from 1 to 0.01; sigma(t) = 0.01 5000^t."""
    sigmas = sc.geometric()
    assert len(sigmas) == 10 and sigmas[0] == 1 and sigmas[-1] == pytest.approx(0.01)
    assert all(a / b == pytest.approx(100 ** (1 / 9)) for a, b in itertools.pairwise(sigmas))
    stds = [sc.ve().marginal(t)[1] for t in (0.0, 0.5, 1.0)]
    assert stds == pytest.approx([0.01, math.sqrt(0.5), 50.0])


@every_process
def test_sec21_the_simulated_sde_has_the_marginals_moments(process):
    """From one image, half of the way: mean a x_0, variance std^2.

    The VE process begins with sigma_min of its own.
    """
    x0 = torch.full((40_000,), 0.5, dtype=torch.float64)
    x = sc.forward(process, x0, draws(40_000), steps=2000, t_end=0.5)
    (a, std), (_, std_0) = process.marginal(0.5), process.marginal(0.0)
    assert abs(float(x.mean()) - a * 0.5) < 4 * std / 200
    assert float(x.var()) == pytest.approx(std * std - std_0 * std_0, rel=0.03)


# ---------------------------------------- scores


def test_sec21_the_score_of_a_noise_predictor_is_the_score():
    """In the Gaussian world E[eps | x] = std (x - a m) / (a^2 v + std^2).

    The network hears t T, and y.
    """
    process, heard = PROCESSES["steps"], []

    def eps_model(x, t, y):
        heard.append((t, y))
        a, std = process.marginal(float(t[0]) / 1000)
        return std * (x - a * M) / (a * a * V + std * std)

    x = draws((3, 1, 2, 2))()
    score = sc.score_of_eps(process, eps_model, 1000, "the X-ray")
    torch.testing.assert_close(score(x, 0.25), world(process)(x, 0.25))
    t, y = heard[0]
    assert y == "the X-ray" and t.tolist() == [250] * 3 and t.dtype == torch.int64
    score(x, 1e-9), score(x, 1.0), score(x, 0.2504)
    assert [int(t[0]) for t, _ in heard[1:]] == [1, 1000, 250]
    sigma = sc.level(process, 0.25)  # y = x_0 + sigma z: N(M, V + sigma^2)
    at_level = sc.score_at_level(process, score)
    torch.testing.assert_close(at_level(x, sigma), (M - x) / (V + sigma**2))


def test_sec21_a_clipped_score_points_at_an_image_in_range():
    """Tweedie's x_0 of the clipped score is the network's, clamped; one in [-1, 1] stays."""
    process, eps, x = PROCESSES["steps"], draws((2, 1, 4, 4), 3)(), draws((2, 1, 4, 4))()

    def x0_hat(clip):
        score = sc.score_of_eps(process, lambda x, t, y: eps, 1000, clip=clip)
        return sc.denoised(process, score, x, 0.4)

    plain, clipped = x0_hat(clip=False), x0_hat(clip=True)
    assert plain.abs().max() > 1.1
    torch.testing.assert_close(clipped, plain.clamp(-1, 1))


def test_sec21_noise_levels_of_the_grid_are_those_of_steps():
    """A level becomes that of the nearest step, 0 the clean image; a level on the grid stays."""
    process = PROCESSES["steps"]
    given = [sc.level(process, 0.5), sc.level(process, 0.3004), 1e-6, 0.0]
    expected = [sc.level(process, 0.5), sc.level(process, 0.3), sc.level(process, 1e-3), 0.0]
    assert sc.on_grid(process, given, 1000) == pytest.approx(expected)
    assert sc.times(2, 0.04, rho=2.0) == pytest.approx([1.0, 0.36, 0.04])
    assert sc.times(3, 1e-4, 10) == [1.0, 0.7, 0.3, 0.1]
    assert sc.times(2, 0.2) == pytest.approx([1.0, 0.6, 0.2])


def test_sec21_a_step_is_the_nearest_one_whatever_float_makes_of_its_time():
    """0.029 times 1000 is 28.999...; 250.6 is nearer to 251; the ends are 1 and T."""
    given = [0.029, 0.2506, 0.2504, 1e-9, 0.9999, 1.0]
    assert [sc.nearest_step(t, 1000) for t in given] == [29, 251, 250, 1, 1000, 1000]
    assert all(sc.nearest_step(k / 1000, 1000) == k for k in range(1, 1001))


@every_process
def test_sec21_tweedies_formula_is_the_posterior_mean(process):
    """In the Gaussian world: (v a x + std^2 m) / (a^2 v + std^2)."""
    x = draws((2, 1, 3, 3))()
    a, std = process.marginal(0.2)
    mean = (V * a * x + std * std * M) / (a * a * V + std * std)
    torch.testing.assert_close(sc.denoised(process, world(process), x, 0.2), mean)


# ---------------------------------------- losses


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_sec21_the_ncsn_loss_has_its_closed_form(c):
    """s_theta(x) = -c x and data N(0, v): lambda (c^2 (v + sigma^2) - 2 c + 1 / sigma^2).

    It is least at the true score, c = 1 / (v + sigma^2).
    """
    n, sigma = 400_000, 0.5
    x0, z = math.sqrt(V) * draws((n, 1))(), draws((n, 1), 1)()
    sigmas = torch.full((n,), sigma, dtype=torch.float64)

    def score(x, sigma):
        return -c * x

    for weight in (sigma**2, 1.0):
        loss = sc.dsm_loss(score, x0, sigmas, z, lambda s, w=weight: w + 0 * s)
        closed = weight * (c**2 * (V + sigma**2) - 2 * c + 1 / sigma**2)
        assert float(loss) == pytest.approx(closed, rel=0.01)
    default = sc.dsm_loss(score, x0, sigmas, z)
    assert float(default) == pytest.approx(sigma**2 * float(loss))


def test_sec21_the_ncsn_loss_hands_every_image_its_own_level():
    """Image i at sigma_i: a score that knows the answer has loss 0."""
    x0, z, sigma = draws((3, 1, 2, 2))(), draws((3, 1, 2, 2), 1)(), f64([0.1, 1.0, 5.0])

    def knows(x, level):
        right = torch.where(level == sigma, 1.0, torch.nan).prod()
        return right * (x0 - x) / sigma.view(3, 1, 1, 1) ** 2

    assert float(sc.dsm_loss(knows, x0, sigma, z)) == pytest.approx(0, abs=1e-20)


@every_process
def test_sec21_the_continuous_loss_of_the_true_score_is_what_cannot_be_known(process):
    """E |std score + z|^2 = Var(z | x) = a^2 v / (a^2 v + std^2)."""
    n, t = 400_000, 0.35
    a, std = process.marginal(t)
    x0, z = M + math.sqrt(V) * draws((n, 1))(), draws((n, 1), 1)()
    loss = sc.sde_loss(process, world(process), x0, t, z)
    assert float(loss) == pytest.approx(a * a * V / (a * a * V + std * std), rel=0.01)


# ---------------------------------------- samplers


@every_process
@pytest.mark.parametrize("correct", [None, 0.16])
def test_sec21_the_reverse_sde_samples_the_data(process, correct):
    """1000 steps with the exact score: mean and variance of the Gaussian world.

    They are right within 4 standard errors and 2 or 3 % of discretisation.
    """
    n = 20_000
    x = sc.reverse_sde(process, world(process), draws((2, n)), sc.times(1000, 1e-4), correct)
    assert abs(float(x.mean()) - M) < 4 * math.sqrt(V / x.numel()) + 0.02 * math.sqrt(V)
    assert float(x.var()) == pytest.approx(V, rel=4 * math.sqrt(2 / x.numel()) + 0.03)


def test_sec21_the_corrector_comes_first_and_by_its_signal_to_noise_ratio():
    """At every time the score is asked twice; between, x moves by alpha score + sqrt(2 alpha) z.

    alpha = 2 (r |z| / |score|)^2.
    """
    process, asked = sc.vp(), []
    exact = world(process)

    def score(x, t):
        asked.append((x, t))
        return exact(x, t)

    ts = sc.times(3)
    sc.reverse_sde(process, score, draws((4, 10)), ts, correct=0.16)
    assert [t for _, t in asked] == pytest.approx([ts[0]] * 2 + [ts[1]] * 2 + [ts[2]] * 2 + [ts[3]])
    noise = draws((4, 10))
    x, z = process.prior_std * noise(), noise()
    gradient = exact(x, 1.0)
    alpha = 2 * (0.16 * float(z.norm(dim=1).mean() / gradient.norm(dim=1).mean())) ** 2
    torch.testing.assert_close(asked[1][0], x + alpha * gradient + math.sqrt(2 * alpha) * z)


@pytest.mark.parametrize("step", [1e-3, 1e-2])
def test_sec21_langevins_stationary_law(step):
    """One level, long: x' = (1 - h/w) x + sqrt(2 h) z has variance w / (1 - h / (2 w)).

    w = v + sigma^2.
    """
    sigma, noise = 0.2, draws(20_000)
    w = V + sigma**2
    how = dict(steps=int(5 * w / step), step=step, denoise=False)
    x = sc.langevin(lambda x, sigma: -x / w, noise, [sigma], **how)
    moments(x, 0.0, w / (1 - step / (2 * w)))


def test_sec21_langevins_steps_shrink_with_the_square_of_the_level_and_it_ends_denoised():
    """alpha = step (sigma / sigma_L)^2, from sigma_1 z, here z = 1.

    Without later noise each move is alpha score, and the last sigma_L^2 score.
    """
    silence, asked = iter([f64([1]), *[f64([0])] * 4]), []

    def score(x, sigma):
        asked.append((float(x), sigma))
        return torch.ones(1)

    x = sc.langevin(score, lambda: next(silence), [2.0, 0.5], steps=2, step=0.01)
    assert [sigma for _, sigma in asked] == [2.0, 2.0, 0.5, 0.5, 0.5]
    assert [a for a, _ in asked] == pytest.approx([2.0, 2.16, 2.32, 2.33, 2.34])
    assert float(x) == pytest.approx(2.34 + 0.25)


# ---------------------------------------- the probability-flow ODE


@every_process
def test_sec21_the_flow_of_a_gaussian_has_a_closed_form_and_comes_back(process):
    """(x_t - a m) / sqrt(a^2 v + std^2) stays what it was; out and back returns the image."""
    rhs, x = sc.flow(process, world(process)), M + math.sqrt(V) * draws((2, 1, 4, 4))()
    moved, evaluations = sc.ode_rk45(rhs, x, 1e-3, 1.0, 1e-7, 1e-7)

    def mean_and_std(t):
        a, std = process.marginal(t)
        return a * M, math.sqrt(a**2 * V + std**2)

    (mean_0, std_0), (mean_1, std_1) = mean_and_std(1e-3), mean_and_std(1.0)
    exact = mean_1 + std_1 / std_0 * (x - mean_0)
    torch.testing.assert_close(moved, exact, rtol=1e-4, atol=1e-4)
    back, _ = sc.ode_rk45(rhs, moved, 1.0, 1e-3, 1e-7, 1e-7)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    assert evaluations > 20


def test_runge_kutta_is_of_the_fifth_order_and_counts_its_evaluations():
    """dx/dt = x cos t, x = exp(sin t): the error follows the tolerance, a looser one costs less.

    Every evaluation is counted. Steps of any size are exact for polynomials of degree 4.
    """
    calls, evaluations = [], []

    def rhs(x, t):
        calls.append(t)
        return x * math.cos(t)

    for tol in (1e-4, 1e-9):
        calls.clear()
        x, n = sc.ode_rk45(rhs, f64([1]), 0.0, 2.0, tol, tol)
        assert n == len(calls) and abs(float(x) - math.exp(math.sin(2.0))) < 10 * tol
        evaluations.append(n)
    assert evaluations[0] < evaluations[1] < 400
    x, _ = sc.ode_rk45(lambda x, t: 5 * torch.full_like(x, t) ** 4, f64([0]), 0.0, 1.0, 1e9, 1e9)
    assert float(x) == pytest.approx(1, abs=1e-12)


def test_runge_kutta_takes_no_step_that_is_too_long():
    """A rotation of 40 radians: the radius is 1 and the angle 40 to 1e-4.

    A first step of 2 radians would miss by percents.
    """
    turn = f64([[0, -20], [20, 0]])
    x, _ = sc.ode_rk45(lambda x, t: x @ turn.T, f64([1, 0]), 0.0, 2.0, 1e-7, 1e-7)
    assert x.tolist() == pytest.approx([math.cos(40), math.sin(40)], abs=1e-4)


def test_sec32_euler_in_the_noise_level_is_ddim():
    """y = x / sqrt(abar): one step of ode_heun lands where ddim_step does, at sigma 0 and before.

    The slope eps is the same at both ends of the step: Heun is Euler, y + (sigma' - sigma) eps.
    """
    process, eps, xt = PROCESSES["steps"], draws((2, 1, 3, 3), 1)(), draws((2, 1, 3, 3))()
    a, sigma = process.marginal(0.5)[0], sc.level(process, 0.5)
    a_next, sigma_next = process.marginal(0.3)[0], sc.level(process, 0.3)

    def step_to(sigma_next):
        return sc.ode_heun(lambda y, sigma: -eps / sigma, xt / a, [sigma, sigma_next])

    torch.testing.assert_close(step_to(0.0), diffusion.ddim_step(S, xt, eps, 500, 0))
    between = a_next * step_to(sigma_next)
    torch.testing.assert_close(between, diffusion.ddim_step(S, xt, eps, 500, 300))


def test_heuns_levels_are_even_in_their_root_and_end_at_the_data():
    """rho = 2: 16, 6.25, 1 have the roots 4, 2.5, 1; rho = 7 by default; then 0."""
    assert sc.heun_levels(16, 1, 3, rho=2) == pytest.approx([16, 6.25, 1, 0])
    assert sc.heun_levels(3**7, 1, 3) == pytest.approx([3**7, 2**7, 1, 0])


def test_heuns_method_is_of_the_second_order_and_ends_at_the_data():
    """Gaussian world: y_0 = m + sqrt(v / (v + sigma^2)) (y - m).

    Twice the steps leave a quarter of the error; n steps take 2 n - 1 evaluations.
    """
    y, calls, errors = draws((1, 1, 4, 4))() * 80, [], []

    def score(y, sigma):
        calls.append(sigma)
        return (M - y) / (V + sigma**2)

    exact = M + math.sqrt(V / (V + 80.0**2)) * (y - M)
    for steps in (20, 40, 80):
        calls.clear()
        y_0 = sc.ode_heun(score, y, sc.heun_levels(80.0, 0.002, steps))
        errors.append(float((y_0 - exact).abs().max()))
        assert len(calls) == 2 * steps - 1
    assert 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5
    levels = sc.heun_levels(80.0, 0.002, 18)
    assert (levels[0], levels[-2]) == pytest.approx((80, 0.002))
    assert levels[-1] == 0 and levels == sorted(levels)[::-1]


def finite(points, process):
    """The exact score of data that is one of a few points: sum of w_i (a x_i - x) / std^2.

    w_i is the posterior probability of point i.
    """

    def score(x, t):
        a, std = process.marginal(t)
        gap = a * points - x[:, None]  # (B, points, D)
        w = (-gap.square().sum(2) / (2 * std * std)).softmax(1)
        return (w[..., None] * gap).sum(1) / std**2

    return score


@every_process
def test_sec21_every_sampler_finds_a_finite_data_set(process):
    """Four points in the plane, exact score: samplers end on the points, and on all of them."""
    points = f64([[-0.8, -0.8], [0.8, -0.6], [-0.7, 0.9], [0.6, 0.7]])
    score, noise = finite(points, process), draws((300, 2))
    at_level = sc.score_at_level(process, score)
    top = sc.level(process, 1.0)
    ends = {
        "sde": sc.reverse_sde(process, score, noise, sc.times(500)),
        "pc": sc.reverse_sde(process, score, noise, sc.times(500), 0.16),
        "ode": sc.ode_heun(at_level, top * noise(), sc.heun_levels(top, 0.01, 30)),
        "langevin": sc.langevin(at_level, noise, sc.geometric(2.0, 0.02, 10), 20, 4e-5),
    }
    for name, x in ends.items():
        distance = torch.cdist(x, points)
        assert float(distance.min(1).values.quantile(0.98)) < 0.05, name
        counts = torch.bincount(distance.argmin(1), minlength=4)
        assert counts.min() > 40, f"{name}: {counts.tolist()}"


# ---------------------------------------- likelihood


@every_process
def test_sec21_the_likelihood_of_gaussian_data_is_its_density(process):
    """-log2 N(x; 0, v) a pixel, within 1e-3 bits; the VE process sees data with sigma_min of noise.

    Mean 0, because the prior is: a mean m costs up to a m / std at t = 1, 0.003 bits at m = 0.3.
    """
    x = math.sqrt(V) * draws((5, 1, 4, 4))()
    probe = draws((5, 1, 4, 4), 2)().sign()
    bits, evaluations = sc.bits_per_dimension(process, world(process, m=0.0), x, probe)
    v = V + process.marginal(0.0)[1] ** 2
    exact = (x.square() / v + math.log(2 * math.pi * v)).flatten(1).mean(1) / (2 * math.log(2))
    torch.testing.assert_close(bits, exact, rtol=0, atol=1e-3)
    assert evaluations > 20


def test_sec21_hutchinsons_estimate_is_the_trace_in_expectation():
    """Correlated pixels: the mean over all four sign vectors is the exact likelihood.

    Single ones are not.
    """
    process = sc.vp()
    C = f64([[0.05, 0.03], [0.03, 0.08]])
    eye = torch.eye(2, dtype=torch.float64)
    x = f64([0.2, -0.1]).view(1, 1, 1, 2)

    def score(x, t):
        a, std = process.marginal(t)
        return -(x.flatten(1) @ torch.linalg.inv(a * a * C + std * std * eye)).view_as(x)

    def bits_with(signs):
        probe = f64(signs).view(1, 1, 1, 2)
        return sc.bits_per_dimension(process, score, x, probe, rtol=1e-6, atol=1e-6)[0]

    bits = torch.cat([bits_with(signs) for signs in itertools.product([-1, 1], repeat=2)])
    nats = -torch.distributions.MultivariateNormal(f64([0, 0]), C).log_prob(x.flatten())
    exact = float(nats) / (2 * math.log(2))
    assert float(bits.mean()) == pytest.approx(exact, abs=1e-3) and float(bits.std()) > 0.01
