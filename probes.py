r"""The other ways to segment of §4.1: without masks, from few masks, by many masks of an X-ray.

anomaly maps [12]             anomaly_map, reconstruct: a network that learned healthy X-rays is
                              wrong where an X-ray is not healthy
label-efficient features [3]  recorded, features, fit, classify: activations of the decoder, and a
                              pixel classifier that reads them
ensembles [1] [21]            agreement, expected_dice: what N masks of one X-ray say
                              together

x_0, eps and eps_model are those of diffusion.py: (B, 1, H, W), images in [-1, 1]. studies.py puts
these questions to a trained run.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

from diffusion import Purpose, ddim_sample, q_sample, seed_of

# ---------------------------------------- anomaly maps [12]


@torch.inference_mode()
def anomaly_map(s, eps_model, x0, ts, noise, y=None):
    r"""Eq. (7) pixel by pixel, and the same without the square: two maps (B, 1, H, W).

        loss    mean_t (eps_theta(x_t, t) - eps)^2,   0 or more
        signed  mean_t (eps_theta(x_t, t) - eps)

    ts       the steps, such as range(400, 601, 10); a step that is listed twice has two noises
    noise()  fresh eps (B, 1, H, W) for each of them

    With x_0_hat, the image that the network expects,

        eps_theta - eps = sqrt(abar_t / (1 - abar_t)) (x_0 - x_0_hat)

    The signed map is above 0 where the image is brighter than expected. Errors that point both ways
    cancel in it.
    """
    loss, signed = torch.zeros_like(x0), torch.zeros_like(x0)
    for t in ts:
        eps = noise()
        xt = q_sample(s, x0, t, eps)
        error = eps_model(xt, torch.full((len(x0),), t, device=x0.device), y) - eps
        loss += error.square()
        signed += error
    return loss / len(ts), signed / len(ts)


def reconstruct(s, eps_model, x0, t, steps, eps, y=None):
    r"""The X-ray as the network expects it, like x0.

    Eq. (2) with eps noises it to step t. DDIM denoises it from there in `steps` passes.
    """
    return ddim_sample(s, eps_model, lambda: q_sample(s, x0, t, eps), y, steps, start=t)


# ---------------------------------------- label-efficient features [3]


@contextlib.contextmanager
def recorded(modules):
    """While the context is open, the output of each module's last call: {name: tensor}.

    modules  {name: module}

    The hooks change nothing. They are removed when the context ends, also by an error.
    """
    outputs = {}

    def hook_of(name):
        def hook(module, inputs, output):
            outputs[name] = output

        return hook

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def features(s, unet, x0, ts, blocks, noises):
    """What the decoder makes of each pixel: (B, D, H, W) float32.

    The D channels are the outputs of all blocks at the first step of ts, then at the second, ...

    unet    an unconditional unet.UNet
    blocks  which of unet.decoder, such as (2, 3, 4, 5); bilinear interpolation enlarges their
            outputs to H x W
    noises  (R, 1, H, W): each serves all steps and, as [3] advises, all images. The activations
            are the mean over the R; [3] has R = 1
    """

    def enlarged(output):
        return F.interpolate(output.float(), size=x0.shape[2:], mode="bilinear")

    def activations(t, eps):
        xt = q_sample(s, x0, t, eps.expand_as(x0))
        unet(xt, torch.full((len(x0),), t, device=x0.device))
        return torch.cat([enlarged(outputs[i]) for i in blocks], 1)

    with recorded({i: unet.decoder[i] for i in blocks}) as outputs:
        means = [sum(activations(t, eps) for eps in noises) / len(noises) for t in ts]
    return torch.cat(means, 1)


def pixels(x):
    """(B, D, H, W) -> (B H W, D): what a pixel classifier takes."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_classifier(D):
    """D numbers of a pixel -> its logit. Two hidden layers of 128 and 32, ReLU, batch norm [3]."""
    return nn.Sequential(
        nn.Linear(D, 128),
        nn.ReLU(),
        nn.BatchNorm1d(128),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 1),
    )


def fit(x, positive, members=10, steps=2000, batch=64, lr=1e-3, seed=0):
    """An ensemble of pixel classifiers [3]: a list of modules.

    Each member has its own weights and its own order of the pixels.

    x         (pixels, D) features, such as pixels(features(...))
    positive  (pixels,) bool
    steps     of Adam, each on `batch` pixels
    """
    classifiers = []
    for member in range(members):
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
            torch.manual_seed(seed_of(seed, Purpose.CLASSIFIER, member))
            classifiers.append(fit_member(x, positive, steps, batch, lr))
    return classifiers


def fit_member(x, positive, steps, batch, lr):
    """One member of `fit`, with the weights and the pixels of torch's current seed."""
    classifier = pixel_classifier(x.shape[1]).to(x.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,)).to(x.device)
        logits, truth = classifier(x[rows])[:, 0], positive[rows].to(x.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval().requires_grad_(False)


def classify(classifiers, x):
    """(B, D, H, W) features -> (B, 1, H, W), the probability of a positive pixel.

    It is the mean over the ensemble.
    """
    rows = pixels(x)
    p = sum(classifier(rows).sigmoid() for classifier in classifiers) / len(classifiers)
    return p.view(len(x), 1, *x.shape[2:])


# ---------------------------------------- ensembles [1], [21]


def agreement(masks):
    """What N masks of each image say together: three tensors (B, 1, H, W).

    They are the mean probability, its variance, and the share of the masks that side with the
    majority, 0.5 to 1.

    masks  (B, N, 1, H, W) in [-1, 1], such as evaluate.sample_masks returns
    """
    p = (masks + 1) / 2
    positive = (masks > 0).float().mean(1)
    return p.mean(1), p.var(1, unbiased=False), torch.maximum(positive, 1 - positive)


def expected_dice(p, q):
    r"""DICE of a mask that is drawn from p against another one that is drawn from q.

        2 sum p q / (sum p + sum q)

    p, q  alike, any shape: each pixel's probability to be inside; 0 and 1 for a certain mask

    This is the quotient of expected numbers of pixels. It is exact where pixels are many, also if
    they depend on one another. Let p be the right probabilities. Against one truth, a network that
    samples perfectly scores expected_dice(p, p), and the mask {p > 1/2} scores
    expected_dice(p > 0.5, p), which is more: a sample pays for its diversity.
    """
    p, q = p.double(), q.double()
    return float(2 * (p * q).sum() / (p.sum() + q.sum()))
