"""§4.2's Residual in Residual Dense Block against its description in words."""

import pytest
import torch

from rrdb import RDB, RRDB, ConditionEmbedder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def silenced(block, last_bias=0.0):
    """The block with all parameters 0, but for the bias of each dense block's last convolution."""
    for p in block.parameters():
        p.data.zero_()
    for m in block.modules():
        if isinstance(m, RDB):
            m.convs[-1].bias.data.fill_(last_bias)
    return block.double()


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def test_sec42_each_convolution_sees_the_input_and_all_outputs_before_it():
    """Convolution k is fed [x, LeakyReLU of outputs 1..k-1].

    The block answers x + LeakyReLU of output 5.
    """
    block, x, entered, left = RDB(16, 8).double(), randn(2, 16, 6, 5), [], []
    for conv in block.convs:
        conv.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
        conv.register_forward_hook(lambda m, args, out: left.append(leaky(out)))
    answer = block(x)
    assert len(left) == 5
    for k in range(5):
        assert torch.equal(entered[k], torch.cat([x, *left[:k]], 1))
    torch.testing.assert_close(answer, x + left[4])


def test_sec42_a_silent_block_is_its_residual_connections():
    """All convolutions 0: an RDB is x, an RRDB x + x.

    The embedder of n RRDBs is 2^n times its first convolution.
    """
    x, y = randn(2, 16, 5, 4), randn(2, 1, 5, 4)
    torch.testing.assert_close(silenced(RDB())(x), x)
    torch.testing.assert_close(silenced(RRDB())(x), 2 * x)
    for blocks in (1, 2):
        embedder = ConditionEmbedder(blocks=blocks).double()
        silenced(embedder.blocks)
        torch.testing.assert_close(embedder(y), 2**blocks * embedder.lift(y))


@pytest.mark.parametrize("bias, added", [(1.0, 1.0), (-1.0, -0.2)])
def test_sec42_an_rrdb_is_three_rdbs_in_a_row_with_an_activation_after_the_fifth_convolution(
    bias, added
):
    """Each silent RDB whose last convolution answers 1 (-1) adds LeakyReLU(1) = 1 (-0.2).

    There are three of them; then comes + x.
    """
    x = randn(1, 16, 4, 4)
    torch.testing.assert_close(silenced(RRDB(), bias)(x), 2 * x + 3 * added)


@pytest.mark.parametrize("bias", [1.0, -1.0])
def test_sec42_segdiffs_rrdb_scales_twice_and_has_no_fifth_activation(bias):
    """[1]: each RDB is x + 0.2 b, be b negative or not; the RRDB is x + 0.2 (x + 3 x 0.2 b).

    The four activations inside stay.
    """
    x = randn(1, 16, 4, 4)
    torch.testing.assert_close(silenced(RRDB(segdiff=True), bias)(x), x + 0.2 * (x + 0.6 * bias))
    one, other = RDB(16, 8).double(), RDB(16, 8, segdiff=True).double()
    other.load_state_dict(one.state_dict())
    added, last = (one(x) - x), (other(x) - x) / 0.2
    torch.testing.assert_close(added, leaky(last))


def test_sec42_the_embedder_turns_one_channel_into_the_reports_16():
    """64x64x1 -> 64x64x16, no two features alike; a pixel is seen 1 + 3 x 5 pixels away."""
    embedder, y = ConditionEmbedder().double(), torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    spot = y.clone()
    spot[0, 0, 32, 32] = 1e6
    with torch.no_grad():
        reach = (embedder(spot) - embedder(y))[0].abs()
    different = {tuple(feature.flatten().tolist()) for feature in reach}
    assert reach.shape == (16, 64, 64) and len(different) == 16
    rows, columns = (reach.amax(0) > 1e-12).nonzero().T
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [16, 48, 16, 48]


def test_sec42_every_parameter_of_the_embedder_receives_a_gradient():
    """No convolution is built and not used."""
    embedder = ConditionEmbedder(growth=4, blocks=2).double()
    embedder(randn(2, 1, 8, 8)).square().sum().backward()
    for name, p in embedder.named_parameters():
        assert p.grad is not None and p.grad.abs().max() >= 1e-9, name


def test_sec42_growth_is_what_each_inner_convolution_adds():
    """Channels in and out of the five convolutions, with SegDiff's growth of 32 at 16 features."""
    shapes = [(conv.in_channels, conv.out_channels) for conv in RDB().convs]
    assert shapes == [(16, 32), (48, 32), (80, 32), (112, 32), (144, 16)]
