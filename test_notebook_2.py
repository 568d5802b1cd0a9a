"""What notebook 2 says of weights/synthesis.pt, on phantoms of its own."""

import dataclasses

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import unet
from testing import CPU, chests, network


@pytest.fixture(scope="module")
def trained():
    """(network, config, schedule) of weights/synthesis.pt, in float32."""
    model, cfg = network("synthesis")
    cfg = dataclasses.replace(cfg, precision="fp32")
    return model, cfg, diffusion.schedule(cfg.T, cfg.pixel_shift)


@pytest.fixture(scope="module")
def x0():
    """16 phantoms of a seed that no run has, as x_0."""
    return data.to_float(chests(9, range(16)).images)


def noised(trained, images, t):
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return diffusion.q_sample(trained[2], images, t, eps), eps


def one_pass(trained, images, t, told=None):
    """(x_t, eps, eps_theta, hat x_0), where the network is told another t."""
    model, cfg, s = trained
    xt, eps = noised(trained, images, t)
    told = told or t
    with torch.no_grad():
        answer = evaluate.eps_model_of(model, cfg, s, CPU)(xt, torch.full((len(xt),), told), None)
    return xt, eps, answer, diffusion.predict_x0(s, xt, told, answer)


def rms(error):
    return float(error.square().mean().sqrt())


def error_at(trained, x0, t, told=None):
    return rms(one_pass(trained, x0, t, told)[3] - x0)


def test_a_step_removes_little_and_a_jump_most(trained, x0):
    """At t = 300: less than one percent of the distance from x_0, and five sixths of it."""
    s = trained[2]
    xt, _, answer, guess = one_pass(trained, x0, 300)
    mean, variance = diffusion.p_step(s, xt, 300, answer)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    step = rms((mean + variance.sqrt() * z) / s.abar[299].sqrt().float() - x0)
    before = rms(xt / s.abar[300].sqrt().float() - x0)
    assert 0.99 * before < step < before
    assert rms(guess - x0) < before / 6


def test_eq_7_falls_while_the_x_ray_gets_worse(trained, x0):
    """And the squared error of v changes a thousand times less than Eq. (7)."""
    eq7, of_x0 = [], []
    ts = [1, 100, 300, 500, 1000]
    for t in ts:
        _, eps, answer, guess = one_pass(trained, x0, t)
        eq7.append(rms(eps - answer) ** 2)
        of_x0.append(rms(guess - x0))
    assert eq7 == sorted(eq7, reverse=True) and of_x0 == sorted(of_x0)
    of_v = np.array(eq7) / trained[2].abar[ts].numpy()
    assert 1000 * of_v.max() / of_v.min() < eq7[0] / eq7[-1]
    mean_xray = rms(x0.mean(0, keepdim=True) - x0)
    assert of_x0[-1] == pytest.approx(mean_xray, rel=0.15)
    assert 0.5 < of_x0[ts.index(500)] / mean_xray < 0.8


def error_without(trained, x0, t, modules):
    """The error of hat x_0 when these modules give zeros."""
    hooks = [m.register_forward_hook(lambda m, x, out: 0 * out) for m in modules]
    error = error_at(trained, x0, t)
    for hook in hooks:
        hook.remove()
    return error


def test_the_8x8_level_carries_the_noisy_steps_and_attention_none(trained, x0):
    """8x8 off: level at t = 20, 30 % worse at t = 500. Attention off: less than 1 % worse."""
    net = trained[0].unet
    attention = [m.out for m in net.modules() if isinstance(m, unet.LinearAttention)]
    ends = [block[-1] for block in net.decoder]
    deepest = [b for b in ends if isinstance(getattr(b, "resample", 0), torch.nn.Upsample)][:1]
    assert len(attention) == 4 and len(deepest) == 1
    for t in (20, 300, 500, 900):
        whole = error_at(trained, x0, t)
        assert error_without(trained, x0, t, attention) < 1.01 * whole
        if t in (20, 500):
            growth = error_without(trained, x0, t, deepest) / whole
            assert growth < 1.1 if t == 20 else growth > 1.3


def half_radius(trained, x0, t, row=34, column=20):
    """The radius around a pixel of hat x_0 within which half of its gradient lies."""
    model, cfg, s = trained
    xt = noised(trained, x0, t)[0].requires_grad_()
    answer = evaluate.eps_model_of(model, cfg, s, CPU)(xt, torch.full((len(xt),), t), None)
    guess = diffusion.predict_x0(s, xt, t, answer)
    (gradient,) = torch.autograd.grad(guess[:, 0, row, column].sum(), xt)
    places = torch.arange(64)
    far = torch.hypot(places[:, None] - row, places - column + 0.0).flatten()
    order = far.argsort()
    share = gradient.abs().mean((0, 1)).flatten()[order].cumsum(0)
    return float(far[order][int((share < share[-1] / 2).sum())])


def test_the_more_noise_the_wider_the_network_looks(trained, x0):
    """From less than 3 pixels at t = 20 to more than 20 at t = 700."""
    radii = [half_radius(trained, x0[:8], t) for t in (20, 100, 300, 700)]
    assert radii == sorted(radii) and radii[0] < 3 and radii[-1] > 20


def looked_at(trained, images, t):
    """How much each of the 8x8 places in the middle is looked at, on average."""
    layer, caught = trained[0].unet.middle[1], []
    hook = layer.qkv.register_forward_hook(lambda m, x, out: caught.append(out))
    one_pass(trained, images, t)
    hook.remove()
    q, k, _ = (unet.split_heads(z, layer.D) for z in caught[0].chunk(3, 1))
    return unet.attend(q, k, torch.eye(64)).mean((0, 1, 2)).view(8, 8)


def correlation(a, b):
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def test_attention_prefers_places_of_the_picture_and_does_not_turn_with_the_chest(trained, x0):
    """Mirrored X-rays give the same map, not its mirror. Gray images give it too."""
    for t in (100, 500):
        plain, mirrored = looked_at(trained, x0, t), looked_at(trained, x0.flip(-1), t)
        assert correlation(plain, mirrored) > 0.95 > correlation(plain.flip(-1), mirrored) + 0.05
        assert correlation(plain, looked_at(trained, torch.zeros_like(x0), t)) > 0.7


def test_x_rays_upside_down_change_the_attention_and_do_not_turn_it(trained, x0):
    """At t = 100, and by far more than other X-rays do."""
    plain, other = looked_at(trained, x0[:8], 100), looked_at(trained, x0[8:], 100)
    upside_down = looked_at(trained, x0.flip(-2), 100)
    assert correlation(plain, other) > 0.9
    assert correlation(plain, upside_down) < 0.7
    assert correlation(plain.flip(-2), upside_down) < 0.6


def test_without_an_edge_attention_has_no_favourite_place(trained, x0, monkeypatch):
    """Circular padding takes two thirds of the pattern and more."""
    gray = torch.zeros_like(x0)
    edged = looked_at(trained, gray, 1000).std()
    for m in trained[0].unet.modules():
        if isinstance(m, torch.nn.Conv2d) and m.padding != (0, 0):
            monkeypatch.setattr(m, "padding_mode", "circular")
    assert looked_at(trained, gray, 1000).std() < edged / 3


def test_a_told_t_that_is_too_small_costs_more_than_one_too_large(trained, x0):
    """x_300, told 200, 300 and 400."""
    small, right, large = (error_at(trained, x0, 300, told) for told in (200, 300, 400))
    assert small > 1.2 * large > 1.2 * right
