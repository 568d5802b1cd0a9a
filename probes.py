r"""The other ways to segment of §4.1: a diffusion model that never saw a mask, and many masks instead of one.

anomaly maps, Pinaya et al. [12]               anomaly_map, reconstruct: a network of healthy X-rays is wrong where an X-ray is not healthy
label-efficient features, Baranchuk et al. [3] recorded, features, fit, classify: activations of the decoder, and a pixel classifier on them
ensembles, Amit et al. [1], Wolleb et al. [21] agreement, calibration: what N masks of one X-ray say together

x_0, eps and eps_model as in diffusion.py: (B, 1, H, W), images in [-1, 1]. This file knows no training run, no data and no device.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

from diffusion import ddim_sample, q_sample

# ------------------------------------------------------------------------------------- anomaly maps [12]


@torch.inference_mode()
def anomaly_map(s, eps_model, x0, ts, noise, y=None):
    r"""Eq. (7) pixel by pixel, mean over steps and noises:   mean_t (eps - eps_theta(x_t, t))^2,   (B, 1, H, W), 0 or more.

    ts       the steps, such as range(400, 601, 10); a step that is listed twice is visited with two noises
    noise()  fresh eps (B, 1, H, W) for each of them
    """
    total = torch.zeros_like(x0)
    for t in ts:
        eps = noise()
        eps_hat = eps_model(q_sample(s, x0, t, eps), torch.full((len(x0),), t, device=x0.device), y)
        total += (eps - eps_hat).square()
    return total / len(ts)


def reconstruct(s, eps_model, x0, t, steps, eps, y=None):
    r"""The X-ray as the network would have it: noised to step t by Eq. (2), denoised by DDIM in `steps` passes. x0 - this is the residual."""
    return ddim_sample(s, eps_model, lambda: q_sample(s, x0, t, eps), y, steps, start=t)


# ------------------------------------------------------------------------------------- label-efficient features [3]


@contextlib.contextmanager
def recorded(modules):
    """The output of the last call of each module while the context is open: {name: tensor}. Hooks that change nothing, removed at the end.

    modules  {name: module}
    """
    seen = {}
    hooks = [m.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output})) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def features(s, unet, x0, ts, blocks, eps):
    """What the decoder makes of each pixel: (B, D, H, W) float32, activations at every step of ts, blocks within a step.

    unet    an unconditional unet.UNet
    blocks  which of unet.decoder, such as (2, 3, 4, 5); their outputs are enlarged to H x W, bilinearly
    eps     (1, 1, H, W) or like x0: one noise for all steps, and, as [3] advises, for all images
    """
    found = []
    with recorded({i: unet.decoder[i] for i in blocks}) as seen:
        for t in ts:
            unet(q_sample(s, x0, t, eps.expand_as(x0)), torch.full((len(x0),), t, device=x0.device))
            found += [F.interpolate(seen[i].float(), size=x0.shape[2:], mode="bilinear") for i in blocks]
    return torch.cat(found, 1)


def pixel_classifier(D):
    """D numbers of a pixel -> its logit: two hidden layers of 128 and 32 with ReLU and batch norm [3]."""
    hidden = [[nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b)] for a, b in ((D, 128), (128, 32))]
    return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(32, 1))


def fit(x, positive, members=10, steps=2000, batch=64, lr=1e-3, seed=0):
    """An ensemble of pixel classifiers [3], each from its own weights and its own order of the pixels: a list of modules.

    x         (pixels, D) features, such as features(...).permute(0, 2, 3, 1).flatten(0, 2)
    positive  (pixels,) bool
    steps     of Adam, `batch` pixels each
    """
    classifiers = []
    for member in range(members):
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
            torch.manual_seed(1000 * seed + member)
            classifier = pixel_classifier(x.shape[1]).to(x.device)
            optimizer = torch.optim.Adam(classifier.parameters(), lr)
            for _ in range(steps):
                rows = torch.randint(len(x), (batch,)).to(x.device)
                loss = F.binary_cross_entropy_with_logits(classifier(x[rows])[:, 0], positive[rows].to(x.dtype))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        classifiers.append(classifier.eval().requires_grad_(False))
    return classifiers


def classify(classifiers, x):
    """(B, D, H, W) features -> (B, 1, H, W), the probability of a positive pixel, mean over the ensemble."""
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, D)
    p = sum(classifier(pixels).sigmoid() for classifier in classifiers) / len(classifiers)
    return p.view(len(x), 1, *x.shape[2:])


# ------------------------------------------------------------------------------------- ensembles [1], [21]


def agreement(masks):
    """What N masks of each image say together: mean probability, variance, and share of the masks that side with the majority.

    masks  (B, N, 1, H, W) in [-1, 1], such as train.sample_masks returns. Three arrays (B, 1, H, W); the last is 0.5 to 1.
    """
    p = (masks + 1) / 2
    positive = (masks > 0).float().mean(1)
    return p.mean(1), p.var(1, unbiased=False), torch.maximum(positive, 1 - positive)


def calibration(p, true, bins=10):
    """Is a pixel of probability p positive p of the time? Three (bins,) arrays: mean p, share of positive pixels, number of pixels.

    p     any shape, 0..1;  true  bool, like p. nan where a bin is empty. Bins are of equal width, the last holds 1.
    """
    place = (p.flatten() * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    total = lambda x: torch.bincount(place, weights=x.flatten().double(), minlength=bins) / count
    return total(p), total(true), count


def expected_calibration_error(p, true, bins=10):
    """Mean of |mean p - share of positive pixels| over the bins of `calibration`, each weighted by its pixels."""
    mean, share, count = calibration(p, true, bins)
    filled = count > 0
    return float(((mean - share).abs() * count)[filled].sum() / count.sum())
