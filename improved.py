r"""Improved DDPM [10]: a schedule, a variance that is learned, few passes. arXiv 2102.09672

[10]               says                               here
Eqs. (10), (15)    beta~_t, and Sigma_theta           least_variance, sigma2
Eq. (16)           L_hybrid                           l_vlb, l_hybrid
Eq. (17)           the cosine schedule                cosine_schedule
§4, Eq. (19)       S_1 < ... < S_K of the T steps     kept_steps, respaced, strided

A network that learns its variance answers 2C channels (halves): the target, then v. Below it is a
model of pairs (eps, v). diffusion.p_step takes pairs (eps, sigma_t^2).
"""

import math

import torch

import diffusion

VARIANCES = (*diffusion.VARIANCES, "learned")
WEIGHT = 0.001  # lambda, of L_vlb in L_hybrid


# ---------------------------------------- the cosine schedule


def cosine_schedule(T=1000):
    r"""The cosine schedule, [10], Eq. (17), as a diffusion.Schedule. T: int >= 1.

        abar_t = f(t) / f(0),   f(t) = cos((t/T + 0.008) / (1 + 0.008) pi/2)^2
        beta_t = 1 - abar_t / abar_{t-1}, at most 0.999

    The bound on beta_t keeps abar_T above 0. In the middle abar_t falls almost linearly.
    """
    if T < 1:
        raise ValueError(f"a schedule needs T >= 1, got T = {T}")
    f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    beta = diffusion.of_abar(f / f[0]).beta.clamp(max=0.999)
    return diffusion.Schedule(beta, 1 - beta, torch.cumprod(1 - beta, 0))


SCHEDULES = {"linear": diffusion.linear_schedule, "cosine": cosine_schedule}


def schedule_of(cfg, device="cpu"):
    """The diffusion.Schedule of a run, on the device."""
    return diffusion.schedule(cfg.T, cfg.pixel_shift, device, SCHEDULES[cfg.schedule])


# ---------------------------------------- the learned variance


def halves(answer, xt):
    """A network's answer of 2C channels as (target, v), both like xt; of C channels v is empty.

    v = (1 + the second half) / 2. So a fresh network, which answers 0, stands half way.
    """
    C = xt.shape[1]
    return answer[:, :C], (1 + answer[:, C:]) / 2


def least_variance(s):
    """beta~_t (T+1,), but beta~_1 = 0 has no logarithm: beta~_2 stands for it, as in [10]. T >= 2.

    Entry 0 is never asked for.
    """
    if s.T < 2:
        raise ValueError(f"a learned variance needs T >= 2, got T = {s.T}")
    t = torch.arange(s.T + 1).clamp(min=2)
    return diffusion.sigma2(s, "beta~")[t]


def sigma2(s, v, t):
    r"""Sigma_theta of [10], Eq. (15):   sigma_t^2 = exp(v log beta_t + (1 - v) log beta~_t).

    v  (B, C, H, W), see halves; 0: beta~_t, 1: beta_t; not bounded
    t  int or (B,) int64, 1..T

    Returns sigma_t^2 like v: each pixel has its own.
    """
    most, least = s.beta.log(), least_variance(s).log()
    return (v * diffusion.at(most, t, v) + (1 - v) * diffusion.at(least, t, v)).exp()


def l_vlb(s, x0, xt, t, eps, var):
    r"""L_{t-1} of diffusion.vlb_terms for each image, at its own t: (B,) in bits per dimension.

    x0, xt  (B, C, H, W): 8-bit levels as k / 127.5 - 1, and q_sample(s, x0, t, .)
    t       (B,) int64 in 1..T
    eps     like x0: eps_theta(x_t, t)
    var     like x0: sigma_t^2
    """
    mean, var = diffusion.p_step(s, xt, t, (eps, var))
    decoder = -diffusion.discretised_log_likelihood(x0, mean, var.sqrt())
    mean_q, _ = diffusion.q_posterior(s, x0, xt, t)
    # At t = 1 the KL is not used; with beta~_1 = 0 in it the gradient would be nan all the same
    kl = diffusion.gaussian_kl(mean_q, diffusion.at(least_variance(s), t, x0), mean, var)
    nats = torch.where((t == 1)[:, None, None, None], decoder, kl)
    return nats.flatten(1).mean(1) / math.log(2)


def l_hybrid(s, model, x0, y, t, eps, target="eps"):
    r"""L_hybrid of [10], Eq. (16), one number for the batch; arguments as diffusion.l_simple.

        L_hybrid = L_simple + 0.001 L_vlb,   L_vlb = T E_t L_{t-1}

    model  answers (B, 2C, H, W), see halves

    v learns by L_vlb alone, and all that gives the mean by L_simple alone: no gradient of L_vlb
    goes through eps. L_T has no parameters and is left out. With t of another density
    (batches.draws) both losses weigh it alike.
    """
    xt = diffusion.q_sample(s, x0, t, eps)
    answer, v = halves(model(xt, t.to(xt.device), y).to(x0.dtype), xt)
    simple = diffusion.l_simple(s, lambda *_: answer, x0, y, t, eps, target)
    mean_of = diffusion.eps_of(s, target, answer.detach(), xt, t)
    vlb = s.T * l_vlb(s, x0, xt, t, mean_of, sigma2(s, v, t)).mean()
    return simple + WEIGHT * vlb


def without_v(model):
    """The model without v, for diffusion.l_simple; one that has no v stays as it is."""
    return lambda xt, t, y: halves(model(xt, t, y), xt)[0]


def with_variance(s, model):
    """The model of pairs (eps, v) as diffusion.p_step takes it: one of pairs (eps, sigma_t^2)."""

    def eps_model(xt, t, y):
        eps, v = model(xt, t, y)
        return eps, sigma2(s, v, t)

    return eps_model


# ---------------------------------------- few passes


def kept_steps(T, passes):
    """0, then S_1 = 1 < ... < S_K = T, K = passes of them: evenly spaced and rounded, [10], §4.

    passes  int in 2..T
    """
    if not 2 <= passes <= T:
        raise ValueError(f"passes must be between 2 and T = {T}, got {passes}")
    steps = torch.linspace(1, T, passes, dtype=torch.float64).round().long()
    return torch.cat([steps.new_zeros(1), steps])


def respaced(s, passes):
    r"""The schedule of a walk over `passes` of the T steps of s, [10], Eq. (19).

        abar_k = abar_{S_k},   beta_k = 1 - abar_{S_k} / abar_{S_{k-1}}

    Its step k is the step S_k of s: the network is asked there (strided).
    """
    return diffusion.of_abar(s.abar[kept_steps(s.T, passes)])


def strided(model, T, passes):
    """The model of a schedule of T steps, as model(xt, k, y) on the respaced one."""
    steps = kept_steps(T, passes)
    return lambda xt, k, y: model(xt, steps.to(k.device)[k], y)


def walk(s, model, passes, learned=False):
    """A schedule of `passes` steps and the model on it, for ddpm_sample and vlb_terms.

    model    of the T steps of s: it answers eps, or (eps, v) where `learned` is true
    passes   2..T; with T the schedule is s itself
    """
    if passes != s.T:
        s, model = respaced(s, passes), strided(model, s.T, passes)
    return s, with_variance(s, model) if learned else model


def ancestral(cfg, s, model, noise, y):
    """x_0 by diffusion.ddpm_sample, with the variance of a run: in T passes, or strided.

    The sampler "strided" takes cfg.ddim_steps passes. model: see walk, with cfg.learned.
    """
    s, eps_model = walk(s, model, cfg.ddim_steps if cfg.sampler == "strided" else s.T, cfg.learned)
    return diffusion.ddpm_sample(s, eps_model, noise, y, fixed(cfg.variance))


def fixed(variance):
    """The `variance` of diffusion's functions: where it is learned they read the model's own."""
    return "beta" if variance == "learned" else variance
