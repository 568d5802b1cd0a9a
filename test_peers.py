"""Other libraries' U-Nets: what they are asked for, and how they are called."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import config
import networks
import peers
import synthesis
import unet
from testing import CPU, tiny

UNCONDITIONAL = dict(task="synthesis", cond=None)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_takes_our_images_and_has_nearly_our_parameters(name):
    """Where it is installed: our shapes, and our number of parameters.

    denoising-diffusion-pytorch, which is built in another way: within a factor of two.
    """
    pytest.importorskip(peers.PEERS[name])
    cfg = tiny(**UNCONDITIONAL, channels=16, image_size=32)
    peer, ours = peers.Peer(name, cfg), networks.build_model(cfg)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([1, 1000])
    assert peer(x, t).shape == ours(x, t).shape
    ratio = networks.parameters(peer) / networks.parameters(ours)
    assert 0.5 < ratio < 2 and (name == "denoising-diffusion-pytorch" or ratio == 1)


class FakeNet(nn.Module):
    """Stands for a library's network: keeps what it is built with, and answers t / 1000 x_t."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.args, self.kwargs = args, kwargs

    def forward(self, xt, t):
        return xt * t[:, None, None, None] / 1000


class FakeDiffusersNet(FakeNet):
    def forward(self, xt, t):
        return SimpleNamespace(sample=super().forward(xt, t))


FAKES = {
    "diffusers": ("diffusers", "UNet2DModel", FakeDiffusersNet),
    "monai": ("monai.networks.nets", "DiffusionModelUNet", FakeNet),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", "Unet", FakeNet),
}


@pytest.fixture
def fakes(monkeypatch):
    """The three packages, each with a fake network."""
    for package, network, fake in FAKES.values():
        parts = package.split(".")
        for n in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:n]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, network, fake)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_is_called_like_our_network(name, fakes):
    """forward, embed and denoise: the library's answer at x_t and t, whatever y is."""
    peer = peers.Peer(name, tiny(**UNCONDITIONAL))
    x, t = torch.ones(2, 1, 16, 16), torch.tensor([250, 1000])
    wanted = torch.stack([x[0] / 4, x[1]])
    for answer in (peer(x, t), peer(x, t, x), peer.denoise(x, t, peer.embed(x))):
        torch.testing.assert_close(answer, wanted)


@pytest.mark.parametrize("name", peers.PEERS)
def test_our_sampler_runs_around_a_peer(name, fakes):
    """As benchmark.py times it: X-rays from noise."""
    cfg = tiny(**UNCONDITIONAL, target="eps", ddim_steps=3)
    images = synthesis.sample_images(peers.Peer(name, cfg), cfg, range(2))
    assert images.shape == (2, 1, 16, 16) and images.isfinite().all() and images.std() > 0


def test_the_peers_are_asked_for_the_reports_network(fakes):
    """§3.2: widths 192, 384, 576, 768, two blocks a level, attention at all levels but the first.

    Heads of 64; the groups of our own GroupNorm. The decoder's levels come in reverse.
    """
    cfg = config.Config(**UNCONDITIONAL)
    asked = {name: peers.Peer(name, cfg).net for name in peers.PEERS}
    widths, attends = [192, 384, 576, 768], [False, True, True, True]
    groups = unet.group_norm(192).num_groups

    diffusers = asked["diffusers"].kwargs
    assert diffusers["sample_size"] == 64 and diffusers["block_out_channels"] == widths
    assert diffusers["layers_per_block"] == 2 and diffusers["attention_head_dim"] == 64
    assert ["Attn" in block for block in diffusers["down_block_types"]] == attends
    assert ["Attn" in block for block in diffusers["up_block_types"]] == attends[::-1]
    assert diffusers["norm_num_groups"] == groups

    monai = asked["monai"].kwargs
    assert monai["channels"] == widths and monai["attention_levels"] == attends
    assert monai["num_res_blocks"] == 2 and monai["num_head_channels"] == 64
    assert monai["norm_num_groups"] == groups

    other = asked["denoising-diffusion-pytorch"]
    assert other.args == (192,) and other.kwargs["dim_mults"] == (1, 2, 3, 4)
    assert other.kwargs["full_attn"] == tuple(attends) and other.kwargs["attn_dim_head"] == 64
    assert other.kwargs["attn_heads"] * 64 == widths[-1]


@pytest.mark.parametrize("channels", [2, 4, 8, 12, 16, 32, 64, 192, 320])
def test_the_groups_divide_the_channels_as_in_our_network(channels):
    """The same number as unet.group_norm has at the first level."""
    assert peers.groups_of(tiny(channels=channels)) == unet.group_norm(channels).num_groups


def test_installed_are_the_peers_whose_package_is_there(monkeypatch):
    """No package is loaded to find out."""
    monkeypatch.setattr(peers, "PEERS", {"here": "json", "absent": "no_such_package"})
    assert peers.installed() == ["here"]


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="a peer is one of diffusers, monai, .* got 'keras'"):
        peers.Peer("keras", tiny())


def test_the_plain_loop_is_adamw_on_the_gradient_of_one_batch(monkeypatch):
    """A loss c w: at a constant gradient each step of AdamW moves w by lr sign(c).

    Before that, w decays by 0.01 lr. Gradients that were not reset would grow and move it less.
    """

    class OneWeight(nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))

    models = []

    def loss(model, part):
        models.append(model)
        return (part * model.w).sum()

    monkeypatch.setattr(peers, "Peer", OneWeight)
    c = torch.tensor([5.0, -0.1])
    step = peers.plain_loop("monai", tiny(lr=0.1), loss, CPU, [c[None], c[None]])
    w = torch.tensor([2.0, -3.0], dtype=torch.float64)
    for _ in range(4):
        step()
        w = w * (1 - 0.1 * 0.01) - 0.1 * torch.tensor([1.0, -1.0])
        torch.testing.assert_close(models[-1].w.data, w, rtol=1e-6, atol=0)


# ---------------------------------------- the table


def row(network, step, sampling):
    return dict(network=network, parameters=1_234_567, step=step, sampling=sampling, memory=2.5e9)


def test_the_table_compares_with_the_peer_of_the_fastest_step():
    """Both ratios are over it, also where another peer samples faster."""
    rows = [row("here, bf16", 1.0, 2.0), row("monai", 3.0, 1.0), row("diffusers", 2.0, 4.0)]
    head, line, *table = peers.table(rows).splitlines()
    assert (
        head.count("times as fast as diffusers") == 2 and line.count("---") == head.count("|") - 1
    )
    assert table == [
        "| here, bf16 | 1,234,567 | 1.000 | 2.00 | 2.000 | 2.00 | 2.50 |",
        "| monai | 1,234,567 | 3.000 | 0.67 | 1.000 | 4.00 | 2.50 |",
        "| diffusers | 1,234,567 | 2.000 | 1.00 | 4.000 | 1.00 | 2.50 |",
    ]


def test_without_a_peer_the_table_compares_with_our_first_network():
    """fp32 beside bf16."""
    table = peers.table([row("here, bf16", 1.0, 2.0), row("here, fp32", 2.0, 1.0)])
    assert "times as fast as here, bf16" in table
    assert "| here, fp32 | 1,234,567 | 2.000 | 0.50 | 1.000 | 2.00 | 2.50 |" in table
