"""The network of a configuration, and the configuration in words."""

import pytest
import torch
from torch import nn

import conditions
import networks
from config import SETTINGS
from test_config import configured
from testing import tiny
from unet import LinearAttention

OF_DIFFUSION = {"objective", "target", "variance", "schedule", "shift", "t_power"}
OF_DIFFUSION |= {"sampler", "ddim_steps", "eta", "ensemble"}
OF_THE_NETWORK = {"cond", "T", "channel_mult", "blocks", "attention_levels", "head_channels"}
OF_THE_NETWORK |= {"growth", "rrdbs", "rrdb", "stem"}
OF_YOUR_OWN = {"group", "threshold"}
OF_SYNTHESIS = {"draw", "given", "drop", "guidance"}


@pytest.mark.parametrize(
    "words, absent",
    [
        ("--task lung", {"epochs"} | OF_YOUR_OWN),
        ("--task infection --size report", {"steps"} | OF_YOUR_OWN),
        ("--task lung --model report-unet", {"epochs"} | OF_YOUR_OWN | OF_DIFFUSION),
        ("--task masks --model unet", {"epochs", "classes"} | OF_DIFFUSION | OF_THE_NETWORK),
    ],
)
def test_a_dry_run_tells_the_flag_the_words_and_the_section_of_every_used_setting(words, absent):
    """One line each, with the value; without words the value alone; unused ones have no line."""
    cfg = configured(words)
    lines = networks.describe(cfg, words=True).splitlines()
    shown = {line.split()[0]: line for line in lines if not line.endswith(" parameters")}
    assert set(shown) == set(SETTINGS) - {"data", "phantoms"} - absent - OF_SYNTHESIS
    values = networks.describe(cfg).splitlines()
    for name, line in shown.items():
        facts, value = SETTINGS[name].metadata, getattr(cfg, name)
        value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        way = f"--{name.replace('_', '-')}" if facts["group"] else f"--set {name}"
        section = f" ({facts['section']})" if facts["section"] else ""
        assert line.startswith(f"  {name:17}{value} ")
        assert line.endswith(f" {way}: {facts['words']}{section}")
        assert f"  {name:17}{value}" in values


def test_the_weights_of_a_network_depend_on_its_seed_alone():
    """Not on what torch drew before; and torch draws afterwards as if none had been built."""
    torch.manual_seed(1)
    first, state = networks.build_model(tiny()), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = networks.build_model(tiny()), networks.build_model(tiny(seed=1))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, c) for a, c in zip(first.parameters(), other.parameters()))


def test_each_size_of_the_network_is_that_of_its_setting():
    """Growth, width, levels, blocks, attention and its heads; T of a network that sees none."""
    words = "--task lung --size small --recipe report --image-size 32 --set growth=12 channels=24"
    words = f"{words} channel_mult=1,2,3 blocks=2 attention_levels=0,2 head_channels=8 T=70"
    net = networks.build_model(configured(f"{words} eval_every=5"))
    assert net.embedder.blocks[0].rdbs[0].convs[0].weight.shape == (12, 16, 3, 3)
    unet = net.unet
    resamples = [block for block in unet.encoder if not isinstance(block[0].resample, nn.Identity)]
    assert (len(unet.encoder), len(resamples), len(unet.decoder)) == (3 * 2 + 2, 2, 3 * 3)
    attention = [m for m in unet.encoder.modules() if isinstance(m, LinearAttention)]
    assert [m.qkv.in_channels for m in attention] == [24, 24, 72, 72]
    assert {m.D for m in unet.modules() if isinstance(m, LinearAttention)} == {8}
    assert networks.build_model(configured(f"{words} --model report-unet")).T == 70


def test_each_switch_of_the_conditioning_reaches_the_network():
    """RRDBs of the embedder and their scaling; the first convolution of concatenation; widths."""
    switches = dict(rrdbs=3, rrdb="segdiff", stem="add")
    plain, switched = networks.build_model(tiny()), networks.build_model(tiny(**switches))
    assert [len(net.embedder.blocks) for net in (plain, switched)] == [1, 3]
    assert [net.embedder.blocks[0].scale for net in (plain, switched)] == [1.0, 0.2]
    for net, is_sum in ((plain, False), (switched, True)):
        weight = net.unet.stem.weight
        assert torch.allclose(weight[:, 0], weight[:, 1:].sum(1), atol=1e-6) == is_sum
    widths = [
        configured(f"--task lung --model {model} {size}").channels
        for size in ("--size report", "--size report --recipe best", "--size small")
        for model in ("unet", "report-unet")
    ]
    assert widths == [64, 192, 64, 192, 32, 16]


def test_a_network_that_draws_takes_in_what_it_is_given():
    """A channel of y for each mask, a vector for each class and one for none; in patches p^2."""

    def net(given, size=16):
        cond = "concat" if conditions.masks_of(given) else None
        how = dict(task="synthesis", cond=cond, given=given, image_size=size)
        return networks.build_model(tiny(**how))

    both = net("class+lung+infection")
    assert both.embedder.lift.in_channels == 2 and both.of_class.num_embeddings == 1 + 3
    only = net("class")
    assert only.embedder is None and only.unet.in_channels == 1 and only.of_class is not None
    assert net("infection").embedder.lift.in_channels == 1 and net("infection").of_class is None
    assert net("lung+infection", 128).embedder.lift.in_channels == 2 * 4
