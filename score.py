r"""Score networks [19] and stochastic differential equations [20]: the other formulations of §2.1.

report                     here                  shape and range
x_t                        x                     (B, C, H, W) float
t                          t                     float: 0 is the data, 1 the noise
f(x, t)                    process.f(t) * x      every process here has a linear drift
sigma(t) of the SDE        process.g(t)          float; g as in [20], as sigma is a noise level here
p(x_t | x_0)               process.marginal(t)   (a, std): N(a x_0, std^2 I)
grad log p_t(x)            score(x, t)           like x; any callable, t one float for the batch
sigma_1 < ... < sigma_T    sigmas                list of floats, largest first, as sampling goes
s_theta(x_t, sigma_t)      score(x, sigma)       like x; at a = 1, where x_t = x_0 + sigma z

One network serves all formulations: s_theta = -eps_theta / std (score_of_eps). Divided by a, every
process is the same, y = x / a = x_0 + (std / a) z. So a network of §2 knows the score at every
noise level sigma = std / a (score_at_level). Numbers in brackets are the report's references.
This file knows no network, no data and no device.
"""

import functools
import math
from typing import Callable, NamedTuple

import torch

import diffusion

# ---------------------------------------- processes: dx = f(t) x dt + g(t) dw


class Process(NamedTuple):
    """A forward SDE with linear drift, and its solution: x_t | x_0 ~ N(a x_0, std^2 I).

    (a, std) = marginal(t), 0 <= t <= 1.
    """

    f: Callable
    g: Callable
    marginal: Callable

    @property
    def prior_std(self):
        """Standard deviation of the Gaussian that x_1 is drawn from."""
        return self.marginal(1.0)[1]


def variance_preserving(beta, log_abar):
    r"""dx = -beta(t)/2 x dt + sqrt(beta(t)) dw;   a^2 = exp(log_abar(t)),   std^2 = 1 - a^2."""
    return Process(
        f=lambda t: -beta(t) / 2,
        g=lambda t: math.sqrt(beta(t)),
        marginal=lambda t: (math.exp(log_abar(t) / 2), math.sqrt(-math.expm1(log_abar(t)))),
    )


def vp(beta_min=0.1, beta_max=20.0):
    r"""The variance-preserving SDE [20]:   dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,

        beta(t) = beta_min + t (beta_max - beta_min)

    a = exp(-1/2 int_0^t beta),  std^2 = 1 - a^2. In 1000 steps it becomes the linear schedule of
    §3.2. steps_of has the abar of that schedule exactly.
    """

    def beta(t):
        return beta_min + t * (beta_max - beta_min)

    def log_abar(t):
        return -t * beta_min - t**2 * (beta_max - beta_min) / 2

    return variance_preserving(beta, log_abar)


def ve(sigma_min=0.01, sigma_max=50.0):
    r"""The variance-exploding SDE [20]:   dx = sqrt(d sigma^2 / dt) dw,

        sigma(t) = sigma_min (sigma_max / sigma_min)^t

    a = 1, std = sigma(t): x at t = 0 is the data with noise of sigma_min, as in NCSN.
    """
    growth = math.log(sigma_max / sigma_min)

    def sigma(t):
        return sigma_min * math.exp(growth * t)

    return Process(
        f=lambda t: 0.0,
        g=lambda t: sigma(t) * math.sqrt(2 * growth),
        marginal=lambda t: (1.0, sigma(t)),
    )


def steps_of(abar):
    r"""The report's steps as a process in continuous time: Eq. (2) exactly at t = k/T, and a beta
    that is continuous between these times.

    abar  (T+1,) float64, entry 0 is 1. Between two steps log abar is the cubic that has the right
          value and slope at both (slopes by central differences), and beta = -d log abar / dt.
    """
    p, T = abar.log().tolist(), len(abar) - 1
    slopes = [(p[min(k + 1, T)] - p[k - 1]) / (min(k + 1, T) - k + 1) for k in range(1, T + 1)]
    slopes = [2 * (p[1] - p[0]) - slopes[0], *slopes]  # at t = 0 as if beta were linear there

    def interval(t):
        """The step k that ends the interval of t, and how far into the interval t lies, 0..1."""
        k = min(T, max(1, math.ceil(t * T)))
        return k, t * T - (k - 1)

    def log_abar(t):
        k, u = interval(t)
        ends = (1 + 2 * u) * (1 - u) ** 2 * p[k - 1] + u * u * (3 - 2 * u) * p[k]
        return ends + u * (1 - u) * ((1 - u) * slopes[k - 1] - u * slopes[k])

    def beta(t):
        k, u = interval(t)
        ends = 6 * u * (1 - u) * (p[k - 1] - p[k])
        return T * (ends - (1 - u) * (1 - 3 * u) * slopes[k - 1] - u * (3 * u - 2) * slopes[k])

    return variance_preserving(beta, log_abar)


@functools.lru_cache(maxsize=8)
def process_of(T, shift=1.0):
    """The schedule of a run (diffusion.schedule) as a process in continuous time."""
    return steps_of(diffusion.schedule(T, shift).abar)


def forward(process, x, noise, steps, t_end=1.0):
    r"""The SDE itself from data x at t = 0, by Euler-Maruyama:   x += f x dt + g sqrt(dt) z."""
    dt = t_end / steps
    for i in range(steps):
        x = x + process.f(i * dt) * x * dt + process.g(i * dt) * math.sqrt(dt) * noise()
    return x


# ---------------------------------------- the score of a noise predictor


def score_of_eps(process, eps_model, T, y=None, clip=False):
    r"""score(x, t) of a noise predictor of T steps (§2):

        grad log p_t(x) = -eps_theta(x, t T) / std(t)

    process    vp() or steps_of(abar), what the network was trained on
    eps_model  called as eps_model(x, t, y), t (B,) int64 in 1..T: the step nearest to t T. The
               samplers visit the times of steps, k / T (times, on_grid).
    clip       clamp the network's x_0 to [-1, 1] first, as diffusion.ddim_sample does
    """

    def score(x, t):
        a, std = process.marginal(t)
        eps = eps_model(x, torch.full((len(x),), nearest_step(t, T), device=x.device), y)
        if clip:
            eps = (x - a * ((x - std * eps) / a).clamp(-1, 1)) / std
        return -eps / std

    return score


def nearest_step(t, T):
    """The step of 1..T whose time k / T is nearest to t."""
    return min(T, max(1, round(t * T)))


def on_grid(process, sigmas, T):
    """Each sigma, moved to the level of the nearest step: the network knows these. 0 stays 0."""

    def nearest_level(sigma):
        return level(process, nearest_step(time_of(process, sigma), T) / T)

    return [nearest_level(sigma) if sigma else 0.0 for sigma in sigmas]


def level(process, t):
    """Noise beside the data, sigma = std / a: 0.0100 to 157.4 on the report's schedule."""
    a, std = process.marginal(t)
    return std / a


def time_of(process, sigma):
    """The t at which level(process, t) is sigma, by bisection; 0 or 1 for a sigma outside."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if level(process, middle) > sigma else (middle, high)
    return (low + high) / 2


def score_at_level(process, score):
    r"""The same score where the data is not shrunk, y = x / a = x_0 + sigma z:

        grad log p_sigma(y) = a score(a y, t)

    Returns score(y, sigma), what NCSN's Langevin dynamics and the flow in sigma take.
    """

    def at_level(y, sigma):
        t = time_of(process, sigma)
        a = process.marginal(t)[0]
        return a * score(a * y, t)

    return at_level


@functools.lru_cache(maxsize=8)
def ncsn_steps(T):
    """The ten steps of a schedule of T steps that stand for NCSN's noise levels, largest first.

    The levels are geometric, each moved to the nearest step. A shifted schedule has the same steps,
    because it multiplies all levels alike.
    """
    process = process_of(T)
    sigmas = geometric(level(process, 1.0), level(process, 1 / T), 10)
    return [nearest_step(time_of(process, sigma), T) for sigma in sigmas]


# ---------------------------------------- losses


def dsm_loss(score, x0, sigma, z, weight=lambda sigma: sigma**2):
    r"""Denoising score matching: the loss of §2.1 with its sign, square and weight mended.

        lambda(sigma) || s_theta(x_0 + sigma z, sigma) + z / sigma ||^2,   averaged over pixels,

    because grad log p(x_t | x_0) = -(x_t - x_0) / sigma^2 = -z / sigma.

    sigma   (B,) float: the noise level of each image, drawn from the levels of NCSN
    z       like x0, N(0, I)
    weight  lambda: sigma^2 makes every level count the same [19]. Returns a number.
    """
    column = sigma.reshape(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
    error = score(x0 + column * z, sigma) + z / column
    return (weight(column) * error.square()).mean()


def sde_loss(process, score, x0, t, z):
    r"""The continuous form [20], with lambda = std(t)^2:

        || std score(a x_0 + std z, t) + z ||^2,   averaged over pixels

    t: one float, 0..1, for the whole batch. score_matching is this loss for a network that is asked
    for x_0, eps or v.
    """
    a, std = process.marginal(t)
    return (std * score(a * x0 + std * z, t) + z).square().mean()


def score_matching(process, T, model, x0, y, t, eps, target):
    r"""dsm_loss and sde_loss with lambda = std(t)^2, as training calls them: a time for each image.

        || eps_hat(x_t, t) - eps ||^2  with  x_t = a x_0 + std eps,   averaged over pixels

    model   (x_t, t, y) -> like x_0: a network that is asked for `target`: eps, x0, or
            v = a eps - std x_0
    t       (B,) on the CPU, real numbers of steps in 1..T; the process has its (a, std) at t / T
    eps     like x_0, N(0, I)
    An NCSN of noise level sigma = std / a is the same network, fed with x / sqrt(1 + sigma^2).
    """
    a, std = zip(*(process.marginal(float(steps) / T) for steps in t))
    a, std = per_image(a, x0), per_image(std, x0)
    xt = a * x0 + std * eps
    t = sent(t.float(), xt.device)  # Apple's MPS has no float64; the network needs none
    answer = model(xt, t, y).to(x0.dtype)
    return (diffusion.eps_from(target, answer, xt, a, std) - eps).square().mean()


def per_image(numbers, x):
    """One number for each image, ready to multiply x: (B, 1, 1, 1), of x's dtype and device."""
    column = torch.tensor(numbers, dtype=torch.float64).to(x.dtype)
    return sent(column, x.device).reshape(-1, *[1] * (x.ndim - 1))


def sent(tensor, device):
    """A CPU tensor on its way to the device.

    Nobody waits for a GPU to receive it, so the CPU draws a batch while the step before it runs.
    """
    on_gpu = device.type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


# ---------------------------------------- samplers


def geometric(largest=1.0, smallest=0.01, levels=10):
    """The noise levels of NCSN [19], largest first."""
    return [largest * (smallest / largest) ** (i / (levels - 1)) for i in range(levels)]


@torch.no_grad()
def langevin(score, noise, sigmas, steps=100, step=2e-5, denoise=True):
    r"""Annealed Langevin dynamics, Algorithm 1 of [19]. At each sigma, largest first, `steps` times

        x += alpha score + sqrt(2 alpha) z   with  alpha = step (sigma / sigma_L)^2,

    sigma_L the smallest; and, to end with, x + sigma_L^2 score, the mean of the data given x.

    score  score(x, sigma), such as score_at_level's
    noise  noise() -> (B, C, H, W), N(0, I); the walk begins at one draw times the largest sigma
    """
    x = sigmas[0] * noise()
    for sigma in sigmas:
        alpha = step * (sigma / sigmas[-1]) ** 2
        for _ in range(steps):
            x = x + alpha * score(x, sigma) + math.sqrt(2 * alpha) * noise()
    return x + sigmas[-1] ** 2 * score(x, sigmas[-1]) if denoise else x


def times(steps, t_end=1e-3, T=None, rho=1.0):
    """steps + 1 times from 1 down to t_end, evenly spaced in t^(1/rho); with T, moved to k / T.

    t_end is above 0: at t = 0 -eps / std would divide by zero. With few steps rho = 1 leaves grain:
    the last step is long, and adds the noise of its length.
    """
    ts = [(1 - (1 - t_end ** (1 / rho)) * i / steps) ** rho for i in range(steps)] + [t_end]
    return [nearest_step(t, T) / T for t in ts] if T else ts


def denoised(process, score, x, t):
    r"""E[x_0 | x_t = x] = (x + std^2 score) / a, Tweedie's formula: every sampler's last step."""
    a, std = process.marginal(t)
    return (x + std**2 * score(x, t)) / a


def mean_norm(x):
    """The norm of each image, mean over the batch."""
    return x.flatten(1).norm(dim=1).mean()


@torch.no_grad()
def reverse_sde(process, score, noise, ts, correct=None):
    r"""The reverse SDE of §2.1 by Euler-Maruyama, along decreasing times; then the mean of x_0.

        x += (f x - g^2 score) dt + g sqrt(-dt) z,   dt < 0

    ts       decreasing from 1, such as times(1000); len(ts) evaluations
    correct  a signal-to-noise ratio r such as 0.16: predictor-corrector [20]. Before each such
             step, one of Langevin dynamics, norms averaged over the batch:
             x += alpha score + sqrt(2 alpha) z  with  alpha = 2 (r |z| / |score|)^2
    """
    x = process.prior_std * noise()
    for t, t_next in zip(ts[:-1], ts[1:]):
        if correct:
            gradient, z = score(x, t), noise()
            alpha = 2 * (correct * mean_norm(z) / mean_norm(gradient)) ** 2
            x = x + alpha * gradient + (2 * alpha).sqrt() * z
        dt, f, g = t_next - t, process.f(t), process.g(t)
        x = x + (f * x - g**2 * score(x, t)) * dt + g * math.sqrt(-dt) * noise()
    return denoised(process, score, x, ts[-1])


# ---------------------------------------- the probability-flow ODE


def flow(process, score):
    r"""dx/dt = f x - g^2/2 score, as rhs(x, t): its solutions have the SDE's marginals [20]."""
    return lambda x, t: process.f(t) * x - process.g(t) ** 2 / 2 * score(x, t)


def heun_levels(largest, smallest, steps, rho=7.0):
    """steps + 1 noise levels, dense near the data, and 0: evenly spaced in sigma^(1/rho)."""
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    return [(first + i / (steps - 1) * (last - first)) ** rho for i in range(steps)] + [0.0]


@torch.no_grad()
def ode_heun(score, y, sigmas):
    r"""The flow in the noise level, dy/dsigma = -sigma score(y, sigma), by Heun's method.

    y       (B, C, H, W) at the first of the sigmas: y = x / a
    sigmas  noise levels, decreasing; the last is 0, where y is x_0

    Two evaluations a step, one in the last: 2 (len(sigmas) - 1) - 1 in all. The slope is the noise
    eps itself; Euler's method alone would be DDIM.
    """

    def slope(y, sigma):
        return -sigma * score(y, sigma)

    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        h, d = sigma_next - sigma, slope(y, sigma)
        euler = y + h * d
        y = euler if sigma_next == 0 else y + h * (d + slope(euler, sigma_next)) / 2
    return y


# Dormand and Prince: where each stage of a step lies, and its weights of the stages before it
TABLEAU = [
    (0, []),
    (1 / 5, [1 / 5]),
    (3 / 10, [3 / 40, 9 / 40]),
    (4 / 5, [44 / 45, -56 / 15, 32 / 9]),
    (8 / 9, [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]),
    (1, [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]),
    (1, [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]),  # the fifth order itself
]
FOURTH = [5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40]


def ode_rk45(rhs, x, t, t_end, rtol=1e-5, atol=1e-5):
    r"""dx/dt = rhs(x, t) from t to t_end, forwards or backwards.

    The adaptive Runge-Kutta 4(5) of Dormand and Prince: a step is taken where the two orders differ
    by less than atol + rtol |x|, in root mean square. Returns (x at t_end, evaluations).
    """
    h, evaluations, slope = (t_end - t) / 20, 1, rhs(x, t)
    while abs(t_end - t) > 1e-12:
        h = math.copysign(min(abs(h), abs(t_end - t)), t_end - t)
        slopes = [slope]
        for c, weights in TABLEAU[1:]:
            stage = x + h * sum(w * k for w, k in zip(weights, slopes))
            slopes.append(rhs(stage, t + c * h))
            evaluations += 1
        fifth = stage  # the last stage is the fifth order
        fourth = x + h * sum(w * k for w, k in zip(FOURTH, slopes))
        tolerance = atol + rtol * torch.maximum(x.abs(), fifth.abs())
        error = float(((fifth - fourth) / tolerance).square().mean().sqrt())
        if error <= 1:
            x, t, slope = fifth, t + h, slopes[-1]
        h *= min(5.0, max(0.2, 0.9 * (error + 1e-10) ** -0.2))
    return x, evaluations


def bits_per_dimension(process, score, x, probe, t_start=1e-5, rtol=1e-5, atol=1e-5):
    r"""-log2 p(x) a dimension, by the instantaneous change of variables along the flow [20]:

        log p_0(x) = log p_1(x_1) + int_0^1 div(dx/dt) dt,

    with div by Hutchinson: probe^T (d rhs / d x) probe.

    x      (B, C, H, W) data; in [-1, 1] of 256 gray levels, add 7 bits: a level is 2/256 wide
    probe  like x, entries +1 or -1: the estimate's expectation is the trace
    Returns ((B,) float, evaluations).
    """
    rhs, B = flow(process, score), len(x)

    def joint(state, t):
        """d state / dt; state (B, D + 1): the pixels of x_t and, in the last column, log p."""
        with torch.enable_grad():
            xt = state[:, :-1].detach().reshape(x.shape).requires_grad_()
            slope = rhs(xt, t)
            product = torch.autograd.grad((slope * probe).sum(), xt)[0]
        divergence = (product * probe).flatten(1).sum(1, keepdim=True)
        return torch.cat([slope.detach().flatten(1), divergence], 1)

    state = torch.cat([x.flatten(1), x.new_zeros(B, 1)], 1)
    state, evaluations = ode_rk45(joint, state, t_start, 1.0, rtol, atol)
    D, std = x[0].numel(), process.prior_std
    distance = (state[:, :-1] / std).square().sum(1)
    log_prior = -0.5 * distance - D * math.log(std * math.sqrt(2 * math.pi))
    return -(log_prior + state[:, -1]) / (D * math.log(2)), evaluations
