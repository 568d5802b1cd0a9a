r"""The diffusion process of §2: schedule, Eqs. (1)-(7), variational bound, DDPM [7] and DDIM [18].

report            here                      shape and range
x_0               x0                        (B, C, H, W) float, in [-1, 1]
x_t               xt                        like x0
t                 t                         int, or (B,) int64: 1..T; t = 0 means "the clean image"
beta, alpha, abar s.beta, s.alpha, s.abar   (T+1,) float64; entry t is the subscript t; abar_0 = 1
eps               eps                       like x0, N(0, I)
y                 y                         what a mask is conditioned on (§4), or None
eps_theta         eps_model(xt, t, y)       like x0; any callable, t as (B,) int64 on xt's device

This file knows no network, no data and no device: an exact solution and a trained U-Net are called
alike. Numbers in brackets are the report's references.
"""

import enum
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

# ---------------------------------------- schedule: §3.2, Eq. (3)


class Schedule(NamedTuple):
    """beta_t, alpha_t and abar_t for t = 0..T, float64.

    Entry 0 is the clean image: beta_0 = 0, abar_0 = 1.
    """

    beta: torch.Tensor
    alpha: torch.Tensor
    abar: torch.Tensor

    @property
    def T(self):
        return len(self.beta) - 1


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    r"""The linear noise schedule of §3.2, with Eq. (3).

        alpha_t = 1 - beta_t,   abar_t = prod_{s<=t} alpha_s

    T               int >= 1, the number of diffusion steps
    beta_1, beta_T  in (0, 1), the first and the last variance; the report's "beta_0" is beta_1 here

    float64 on purpose: in float32 the variance 1 - abar_1 of Eq. (2) is already wrong by 2e-4.
    """
    if T < 1 or not (0 < beta_1 < 1 and 0 < beta_T < 1):
        got = f"T = {T}, beta_1 = {beta_1}, beta_T = {beta_T}"
        raise ValueError(f"a schedule needs T >= 1 and 0 < beta < 1, got {got}")
    beta = torch.cat([torch.zeros(1), torch.linspace(beta_1, beta_T, T, dtype=torch.float64)])
    return Schedule(beta, 1 - beta, torch.cumprod(1 - beta, 0))


def shifted(s, scale):
    r"""The schedule whose signal-to-noise ratio is scale^2 times that of s at every t.

    scale  above 0. Below 1 there is more noise at each step, as if x_0 had been multiplied by scale
           before noising.

    The ratio is abar_t / (1 - abar_t). Beyond the report: Chen, arXiv 2301.10972.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
    return of_abar(scale**2 * s.abar / (1 - s.abar + scale**2 * s.abar))


def of_abar(abar):
    """The schedule of these abar_0 = 1, ..., abar_T, (T+1,) float64: Eq. (3) solved for alpha."""
    alpha = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return Schedule(1 - alpha, alpha, abar)


@functools.lru_cache(maxsize=8)
def schedule(T, shift=1.0, device="cpu", kind=linear_schedule):
    """The schedule of a run: kind(T), §3.2's linear one, shifted by `shift` unless that is 1.

    It lies on the device, so that no step has to wait for a coefficient from the CPU. Apple's MPS
    has no float64, so there it stays on the CPU.
    """
    s = kind(T)
    s = s if shift == 1 else shifted(s, shift)
    return s if torch.device(device).type == "mps" else Schedule(*(v.to(device) for v in s))


def at(v, t, x):
    """v[t] for each image of the batch, ready to multiply x.

    t (B,) gives (B, 1, 1, 1), an int t gives (1, 1, 1, 1). v (T+1,) is computed in float64 and cast
    to x's dtype here, at the last moment.
    """
    t = t.to(v.device) if isinstance(t, torch.Tensor) else t
    return v[t].to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------- forward process: Eqs. (1)-(4)


def q_step(s, x_prev, t, eps):
    r"""x_t ~ q(x_t | x_{t-1}), Eq. (1):   x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps."""
    return at((1 - s.beta).sqrt(), t, x_prev) * x_prev + at(s.beta.sqrt(), t, x_prev) * eps


def q_sample(s, x0, t, eps):
    r"""x_t ~ q(x_t | x_0), Eqs. (2)-(3):   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    One jump instead of t steps of Eq. (1). The report's Eq. (2) prints alpha_t where abar_t is
    meant; test_eq2_is_t_steps_of_eq1 shows it.
    """
    return at(s.abar.sqrt(), t, x0) * x0 + at((1 - s.abar).sqrt(), t, x0) * eps


def q_posterior(s, x0, xt, t):
    r"""Mean and variance of q(x_{t-1} | x_t, x_0), Eq. (4): Bayes' rule on Eqs. (1) and (2).

        mu~    = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0
                 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
        beta~  = (1 - abar_{t-1}) / (1 - abar_t) beta_t

    t in 1..T. At t = 1 the posterior is x_0 itself, with variance 0.
    Returns (mean like x0, variance (B, 1, 1, 1)).
    """
    abar_prev = s.abar.roll(1)  # entry t is abar_{t-1}; entry 0 is never asked for
    from_x0 = abar_prev.sqrt() * s.beta / (1 - s.abar)
    from_xt = s.alpha.sqrt() * (1 - abar_prev) / (1 - s.abar)
    mean = at(from_x0, t, x0) * x0 + at(from_xt, t, x0) * xt
    return mean, at(sigma2(s, "beta~"), t, x0)


VARIANCES = ("beta", "beta~")


def sigma2(s, variance):
    r"""sigma_t^2 for t = 0..T, (T+1,) float64; entry 0 is never asked for.

    variance  "beta": beta_t (§2), or "beta~": that of Eq. (4), which is 0 at t = 1
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")
    return s.beta if variance == "beta" else (1 - s.abar.roll(1)) / (1 - s.abar) * s.beta


# ---------------------------------------- x_0, eps and v: three names of one unknown


def predict_x0(s, xt, t, eps):
    r"""Eq. (2) solved for x_0:   x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    return (xt - at((1 - s.abar).sqrt(), t, xt) * eps) / at(s.abar.sqrt(), t, xt)


def predict_eps(s, xt, t, x0):
    r"""Eq. (2) solved for eps:   eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
    return (xt - at(s.abar.sqrt(), t, xt) * x0) / at((1 - s.abar).sqrt(), t, xt)


TARGETS = ("eps", "v", "x0")


def target_of(s, target, x0, t, eps):
    r"""What a network of this target should answer at x_t, like x0.

    "eps" (Eq. 7), "x0", or "v":   v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.
    """
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    return at(s.abar.sqrt(), t, x0) * eps - at((1 - s.abar).sqrt(), t, x0) * x0


def eps_of(s, target, answer, xt, t):
    r"""The inverse of target_of, given x_t: a network's answer as eps, all that the rest knows."""
    return eps_from(target, answer, xt, at(s.abar.sqrt(), t, xt), at((1 - s.abar).sqrt(), t, xt))


def eps_from(target, answer, xt, a, std):
    r"""eps_of for any x_t = a x_0 + std eps; in Eq. (2) a = sqrt(abar_t), std = sqrt(1 - abar_t).

    From x_0:   eps = (x_t - a x_0) / std.      From v = a eps - std x_0:   eps = a v + std x_t.
    """
    if target == "eps":
        return answer
    if target == "x0":
        return (xt - a * answer) / std
    return a * answer + std * xt


# ---------------------------------------- reverse process and losses: Eqs. (5)-(7)


def p_step(s, xt, t, eps, variance="beta", clip=False):
    r"""Mean and variance of p_theta(x_{t-1} | x_t), Eq. (5), through the noise predictor as in [7].

        mu_theta = mu~(x_t, x0_hat)  with  x0_hat = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
                 = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t)     (without clipping)

    eps       eps_theta(x_t, t), already evaluated; or, from a network that answers its variance
              too (improved.py), the pair (eps, sigma_t^2), both like xt
    variance  "beta": sigma_t^2 = beta_t (§2; the report prints sigma_t = beta_t),
              or "beta~": that of Eq. (4)
    clip      clamp x0_hat to [-1, 1] first

    Returns (mean like xt, variance (B, 1, 1, 1), or the sigma_t^2 it was given).
    """
    eps, var = eps if isinstance(eps, tuple) else (eps, at(sigma2(s, variance), t, xt))
    x0_hat = predict_x0(s, xt, t, eps)
    mean, _ = q_posterior(s, x0_hat.clamp(-1, 1) if clip else x0_hat, xt, t)
    return mean, var


def l_weighted(s, eps_model, x0, t, eps, y=None, variance="beta"):
    r"""The weighted loss of Eq. (6), one number an image, in nats.

        beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t))
            || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2

    t (B,) int64 in 1..T; with variance "beta~" in 2..T, because beta~_1 = 0. The norm is the sum
    over pixels. The loss is the part of L_{t-1} in vlb_terms that depends on the network.
    Returns (B,).
    """
    weight = s.beta**2 / (2 * sigma2(s, variance) * s.alpha * (1 - s.abar))
    xt = q_sample(s, x0, t, eps)
    error = (eps - eps_model(xt, t.to(xt.device), y)).flatten(1)
    return at(weight, t, error)[:, 0] * error.square().sum(1)


def l_simple(s, model, x0, y=None, t=None, eps=None, target="eps"):
    r"""L_simple, Eq. (7), one number for the batch.

        E_{x_0, eps, t} || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2

    t       (B,) int64; None: a fresh draw, uniform on 1..T
    eps     like x0; None: a fresh draw
    target  "v" or "x0" asks the model for those instead of eps (target_of): another weight on each
            t, the same optimum

    The norm is averaged over pixels (MSE), as in the code of [7]: the scale differs from Eq. (7) by
    C*H*W, the minimiser does not. A model that answers 0 scores 1.
    """
    t = torch.randint(1, s.T + 1, (len(x0),)) if t is None else t
    eps = torch.randn_like(x0) if eps is None else eps
    xt = q_sample(s, x0, t, eps)
    answer = model(xt, t.to(xt.device), y).to(x0.dtype)
    return (target_of(s, target, x0, t, eps) - answer).square().mean()


@torch.no_grad()
def vlb_terms(s, eps_model, x0, noise, y=None, variance="beta", clip=False):
    r"""The terms of the variational bound on -log p(x_0) (§2), in bits per dimension: [7], Eq. (5).

        L_0     = -log p_theta(x_0 | x_1)                                 the decoder
        L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t) )   t = 2..T
        L_T     = KL( q(x_T | x_0) || N(0, I) )                           the prior: no parameters

    The decoder integrates p_theta over each of the 256 levels of an 8-bit image. At t = 1, where
    beta~_1 = 0, the decoder with variance "beta~" takes beta~_2, as [10] does.

    x0     (B, C, H, W), 8-bit levels as k / 127.5 - 1
    noise  callable, noise() -> like x0, a fresh draw for every t
    clip   clamp x0_hat to [-1, 1] at every step

    Returns L (T+1, B): entry k is L_k, and L.sum(0) is the bound. T evaluations of the model.
    """
    L = x0.new_zeros(s.T + 1, len(x0))
    for t in range(1, s.T + 1):
        xt = q_sample(s, x0, t, noise())
        eps = eps_model(xt, torch.full((len(x0),), t, device=x0.device), y)
        mean, var = p_step(s, xt, t, eps, variance, clip)
        if t == 1:
            var = at(sigma2(s, "beta~"), min(2, s.T), x0) if variance == "beta~" else var
            nats = -discretised_log_likelihood(x0, mean, var.sqrt())
        else:
            nats = gaussian_kl(*q_posterior(s, x0, xt, t), mean, var)
        L[t - 1] = nats.flatten(1).mean(1)
    mean_T, var_T = at(s.abar.sqrt(), s.T, x0) * x0, at(1 - s.abar, s.T, x0)  # of q(x_T | x_0)
    prior = gaussian_kl(mean_T, var_T, torch.zeros_like(x0), torch.ones_like(x0))
    L[s.T] = prior.flatten(1).mean(1)
    return L / math.log(2)


def gaussian_kl(mean_1, var_1, mean_2, var_2):
    """KL( N(mean_1, var_1) || N(mean_2, var_2) ) pixel by pixel, in nats."""
    return 0.5 * (torch.log(var_2 / var_1) + (var_1 + (mean_1 - mean_2).square()) / var_2 - 1)


def discretised_log_likelihood(x0, mean, std):
    """log of the mass that N(mean, std^2) gives to x0's 8-bit level, in nats.

    A level has width 2/255; the outer two reach to infinity.
    """
    cdf = torch.special.ndtr
    upper = torch.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) / std))
    lower = torch.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) / std))
    return (upper - lower).clamp(min=1e-12).log()


# ---------------------------------------- sampling: DDPM [7], DDIM [18]


class Purpose(enum.IntEnum):
    """What random numbers are drawn for: a word of each key, so that no two uses of a seed meet.

    Two uses have the seed alone: the weights of a network, and which images are evaluated.
    """

    PHANTOM = 0
    ORDER = 1  # of the images in an epoch
    NOISE = 2  # t and eps of a batch; batch 0 is that of an evaluation by Eq. (7)
    AUGMENTATION = 3
    SAMPLE = 4  # x_T and the later noise of an image that is sampled
    ANOMALY_MAP = 5
    PROBE = 6  # the noises of a probe's activations
    CLASSIFIER = 7  # weights and pixels of a probe
    LABELS = 8  # which images have labels
    FROM_SCRATCH = 9  # the batches of those images
    AMBIGUOUS = 10  # pictures whose mask is uncertain
    BOOTSTRAP = 11  # which images are counted how often
    JUDGE = 12  # weights, batches and alterations of a classifier of X-rays
    ALTERATION = 13  # what happens to the X-rays that measure it
    CONDITIONS = 14  # which conditions of a picture are taken away
    LIKELIHOOD = 15  # the noise of a bound on -log p(x_0)


def philox(seed, purpose, i, member=0):
    """A generator of its own for each member of image i: a key and a stretch of the counter."""
    return np.random.Generator(np.random.Philox(key=[seed, i], counter=[0, 0, purpose, member]))


def seed_of(seed, purpose, *numbers):
    """A seed for torch, 0..2^32 - 1, that depends on these numbers alone."""
    return int(np.random.SeedSequence([seed, purpose, *numbers]).generate_state(1)[0])


class ImageNoise:
    r"""Standard normal noise for a batch of images: the draws of image i come from (seed, i) alone.

    The same image gets the same x_T and the same later noise whatever the batch size, the order and
    the device. Philox is counter-based: its key is (seed, i), and each purpose, and each member of
    an ensemble, starts in a stretch of its own.

    seed     int >= 0
    index    B ints >= 0, the number i of each image in its data set
    shape    (C, H, W)
    members  draw this many noises an image, image by image: the batch becomes B * members
    purpose  of the noise

    noise() returns the next draw, (B * members, C, H, W) float32 on `device`. The first draw of a
    sampler is x_T.
    """

    def __init__(self, seed, index, shape, members=1, device="cpu", purpose=Purpose.SAMPLE):
        self.streams = [philox(seed, purpose, int(i), k) for i in index for k in range(members)]
        self.shape, self.device = shape, device

    def __call__(self):
        draws = [stream.standard_normal(self.shape, dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(draws)).to(self.device)


@torch.no_grad()
def ddpm_sample(s, eps_model, noise, y=None, variance="beta", clip=True, trajectory=False):
    r"""Ancestral sampling of [7], "the classical approach" of §3.2: T passes of Eq. (5).

        x_{t-1} = mu_theta + sigma_t z

    noise       callable, noise() -> (B, C, H, W): x_T, then z for t = T..2; the last step adds none
    variance    sigma_t^2, see p_step
    clip        clamp x0_hat to [-1, 1] at every step
    trajectory  return all of x_T, ..., x_0 as (T+1, B, C, H, W) instead of x_0 (B, C, H, W)
    """
    xt = noise()
    path = [xt]
    for t in range(s.T, 0, -1):
        eps = eps_model(xt, torch.full((len(xt),), t, device=xt.device), y)
        mean, var = p_step(s, xt, t, eps, variance, clip)
        xt = mean + var.sqrt() * noise() if t > 1 else mean
        if trajectory:
            path.append(xt)
    return torch.stack(path) if trajectory else xt


def ddim_timesteps(T, steps):
    """The steps + 1 steps visited, T first and 0 last: (1000, 50) -> [1000, 980, ..., 20, 0]."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and T = {T}, got {steps}")
    return torch.linspace(T, 0, steps + 1, dtype=torch.float64).round().long().tolist()


def ddim_step(s, xt, eps, t, t_prev, eta=0.0, noise=None):
    r"""One DDIM update x_t -> x_{t_prev}, Eq. (12) of [18], used with 50 steps in §3.2.

        x0_hat = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
        sigma  = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
        x_prev = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - sigma^2) eps + sigma noise

    x0_hat is the "predicted x_0" of [18], sigma its Eq. (16). [18] writes alpha for what the report
    calls abar.

    xt, eps  (B, C, H, W)  the image at step t, and eps_theta(x_t, t), already evaluated
    t        int, 1..T     the step xt is at
    t_prev   int, 0..t-1   the step to land on; 0 returns x0_hat itself, because abar_0 = 1
    eta      0..1          0: a function of x_T alone
                           1 and t_prev = t - 1: Eq. (4), the DDPM of sigma^2 = beta~
    noise    like xt       needed only where eta > 0

    Clipping x0_hat is the sampler's business, not this equation's.
    """
    abar, abar_prev = s.abar[t], s.abar[t_prev]
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    x0_hat = predict_x0(s, xt, t, eps)
    eps_weight = (1 - abar_prev - sigma**2).clamp(min=0).sqrt()
    x_prev = abar_prev.sqrt() * x0_hat + eps_weight * eps
    return x_prev if eta == 0 else x_prev + sigma * noise


@torch.no_grad()
def ddim_sample(
    s, eps_model, noise, y=None, steps=50, eta=0.0, clip=True, trajectory=False, start=None
):
    r"""DDIM sampling [18] of §3.2: `steps` passes of the network, any number from 1 to T.

    noise       callable, noise() -> (B, C, H, W): x_T, then fresh noise for each step where eta > 0
    start       1..T: begin there, noise() being x_start first; None: at T
    eta         0..1, see ddim_step
    clip        clamp x0_hat to [-1, 1] at every step, and let eps follow it
    trajectory  return x at every visited step, x_T first, as (steps+1, B, C, H, W)
                instead of x_0 (B, C, H, W)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    taus = ddim_timesteps(start or s.T, steps)
    xt = noise()
    path = [xt]
    for t, t_prev in zip(taus[:-1], taus[1:]):  # (1000, 980), (980, 960), ..., (20, 0)
        eps = eps_model(xt, torch.full((len(xt),), t, device=xt.device), y)
        if clip:
            eps = predict_eps(s, xt, t, predict_x0(s, xt, t, eps).clamp(-1, 1))
        xt = ddim_step(s, xt, eps, t, t_prev, eta, noise() if eta > 0 else None)
        if trajectory:
            path.append(xt)
    return torch.stack(path) if trajectory else xt
