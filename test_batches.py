"""What step k sees: which images, t and eps, and the augmentation; a function of (seed, k)."""

import math

import pytest
import torch

import batches
import conditions
import config
import data
import diffusion
import score
from conditions import Given
from testing import tensors, tiny

# ---------------------------------------- the batch of a step


@pytest.mark.parametrize("supervised", [False, True])
def test_a_batch_is_the_files_of_its_rows_with_the_noise_of_its_step(supervised):
    """x0, y, t and eps of step 3 by the functions below; a supervised network has no noise."""
    cfg, (images, masks) = tiny(model="unet" if supervised else "diffusion"), tensors(6)
    x0, y, t, eps = batches.batch(cfg, 3, images, masks)
    rows = batches.batch_indices(cfg, 6, 3)
    assert torch.equal(y, data.to_float(images[rows])) and torch.equal(x0 > 0, y > 0)
    assert x0.unique().tolist() == [-1, 1]
    if supervised:
        assert t is None and eps is None
    else:
        expected = batches.draws(cfg, 3, x0)
        assert torch.equal(t, expected[0]) and torch.equal(eps, expected[1])
    x0, y, *_ = batches.batch(cfg, 3, images, None)
    assert y is None and torch.equal(x0, data.to_float(images[rows]))


def test_a_batch_of_pictures_is_given_what_is_left_of_the_conditions_of_its_rows():
    """x0 are the pictures, y is by conditions.some_of with the draw of the step; in parts too."""
    cfg = tiny(task="synthesis", cond="concat", given="class+lung", drop=0.6)
    images, masks = tensors(6)
    given = Given(masks, torch.arange(6) % 3 + 1)
    batch = batches.batch(cfg, 3, images, given)
    rows = batches.batch_indices(cfg, 6, 3)
    taken = batches.generator(cfg.seed, diffusion.Purpose.CONDITIONS, 3)
    y = conditions.some_of(conditions.rows_of(given, rows), 0.6, taken)
    assert torch.equal(batch.x0, data.to_float(images[rows]))
    assert torch.equal(batch.y.masks, y.masks) and torch.equal(batch.y.label, y.label)
    parts = batch.parts(3)
    assert [len(part.y.label) for part in parts] == [len(part.x0) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.y.masks for part in parts]), y.masks)
    assert not torch.equal(batches.batch(cfg, 4, images, given).y.masks, y.masks)


@pytest.mark.parametrize("given", ["", "class", "class+lung+infection"])
def test_noise_stands_for_a_split_where_a_step_is_timed(given):
    """As many pictures and masks as the network takes, in the ranges of a split."""
    cfg = tiny(task="synthesis", given=given)
    images, others = batches.on_device(cfg, batches.noise_split(cfg, 5), "cpu")
    assert images.shape == (5, 1, 16, 16) and images.dtype == torch.uint8 and images.max() > 250
    assert (others is None) == (given == "")
    if others and others.masks is not None:
        assert others.masks.shape == (5, 2, 16, 16) and others.masks.unique().tolist() == [0, 255]
    images, masks = batches.on_device(tiny(), batches.noise_split(tiny(), 5), "cpu")
    assert masks.shape == images.shape and masks.unique().tolist() == [0, 255]


def test_micro_batches_divide_the_images_each_beside_its_own_xray_t_and_eps():
    """5 images, at most 2 at once: 2, 2 and 1. In synthesis there is no X-ray."""
    x0 = torch.arange(5).view(5, 1, 1, 1).float()
    parts = batches.Batch(x0, x0 + 100, x0.flatten() + 200, x0 + 300).parts(2)
    assert [len(part.x0) for part in parts] == [2, 2, 1]
    for part in parts:
        number = part.x0.flatten()
        assert torch.equal(part.y.flatten(), number + 100) and torch.equal(part.t, number + 200)
        assert torch.equal(part.eps.flatten(), number + 300)
    assert torch.equal(torch.cat([part.x0 for part in parts]), x0)
    (whole,) = batches.Batch(x0, None, None, None).parts(20)
    assert torch.equal(whole.x0, x0) and whole.y is None


# ---------------------------------------- which images


def test_every_epoch_holds_each_image_once_and_its_order_depends_on_the_seed_and_the_epoch():
    """Batches of 4 from 10 images: 20 places in a row are two permutations, and two others."""
    cfg = tiny()
    places = [batches.batch_indices(cfg, 10, step) for step in range(1, 6)]
    places = torch.cat(places).tolist()
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    orders = [batches.order_of(0, epoch, 10).tolist() for epoch in range(6)]
    assert places == orders[0] + orders[1] and len(set(map(tuple, orders))) == 6
    assert places[:4] != batches.batch_indices(tiny(seed=1), 10, 1).tolist()
    assert len(batches.batch_indices(tiny(batch_size=25), 10, 1)) == 25  # more than there are


# ---------------------------------------- t and eps


def test_the_noise_of_a_step_comes_from_the_seed_and_the_step_alone():
    """Drawn twice the same, another for another step or seed; t in 1..T."""
    like = torch.zeros(4, 1, 16, 16)
    t, eps = batches.draws(tiny(), 3, like)
    again = batches.draws(tiny(), 3, like)
    assert torch.equal(t, again[0]) and torch.equal(eps, again[1])
    assert 1 <= t.min() and t.max() <= 1000 and t.dtype == torch.int64
    for other in (batches.draws(tiny(), 4, like), batches.draws(tiny(seed=1), 3, like)):
        assert not torch.equal(eps, other[1])


@pytest.mark.parametrize("power", [1, 2, 0.5])
def test_eq7_t_is_drawn_from_1_to_T_with_the_density_of_t_power(power):
    """P(t <= k) = (k / T)^power, to 4 standard errors of 20,000 draws; power 1: Eq. (7)'s t."""
    t = batches.draws(tiny(T=4, t_power=power), 1, torch.zeros(20_000, 1))[0]
    for k in range(5):
        expected = (k / 4) ** power
        error = math.sqrt(expected * (1 - expected) / 20_000)
        assert (t <= k).double().mean() == pytest.approx(expected, abs=4 * error)


def test_sec21_each_objective_draws_its_own_times():
    """ncsn: ten steps, the first and the last among them; vp: real numbers in [1, T]; eps: ints."""
    like = torch.zeros(4000, 1, 1, 1)
    t = {
        name: batches.draws(tiny(objective=name, t_power=1.0), 1, like)[0]
        for name in config.OBJECTIVES
    }
    steps, counts = t["ncsn"].unique(return_counts=True)
    assert len(steps) == 10 and steps[0] == 1 and steps[-1] == 1000 and counts.min() > 300
    process = score.steps_of(diffusion.linear_schedule().abar)
    sigmas = [score.level(process, int(k) / 1000) for k in steps]
    levels = score.geometric(sigmas[-1], sigmas[0], 10)
    on_steps = score.on_grid(score.process_of(1000), levels, 1000)
    assert sigmas[::-1] == pytest.approx(on_steps)
    assert t["vp"].dtype == torch.float64 and 1 <= t["vp"].min() and t["vp"].max() <= 1000
    assert (t["vp"] % 1 > 0.01).float().mean() > 0.9
    assert torch.equal(t["vp"].ceil().long(), t["eps"])


def test_sec21_ncsns_levels_are_drawn_with_the_same_density_from_the_smallest_up():
    """P(one of the k smallest levels) = (k / 10)^t_power, to 4 standard errors."""
    t = batches.draws(tiny(objective="ncsn", t_power=4.0), 1, torch.zeros(20_000, 1))[0]
    for k, step in enumerate(sorted(score.ncsn_steps(1000)), 1):
        expected = (k / 10) ** 4
        error = math.sqrt(expected * (1 - expected) / 20_000)
        assert (t <= step).double().mean() == pytest.approx(expected, abs=4 * error)


# ---------------------------------------- augmentation

# the horizontal coordinate of affine_grid; linear, so bilinear sampling is exact
RAMP = (2 * (torch.arange(32) + 0.5) / 32 - 1).expand(32, 32)


def augmented(x, n, strength=1.0, seed=0):
    """n draws for one (32, 32) image that is its own mask. The same seed: the same draws."""
    x = x.expand(n, 1, 32, 32).clone()
    return batches.augment(x, x, torch.Generator().manual_seed(seed), strength)


def moves_of(n, strength):
    """Contrast, brightness, and the place (n, 2, 32, 32) that each pixel shows.

    All are read off images whose values are places.
    """
    brightness = augmented(torch.zeros(32, 32), n, strength)[0].mean((1, 2, 3))
    gray = augmented(torch.full((32, 32), 0.5), n, strength)[0].mean((1, 2, 3))
    contrast = (gray - brightness) / 0.5
    ramps = [augmented(0.5 * ramp, n, strength)[0][:, 0] for ramp in (RAMP, RAMP.T)]
    places = [(r - brightness[:, None, None]) / contrast[:, None, None] / 0.5 for r in ramps]
    return contrast, brightness, torch.stack(places, 1)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_augmentation_is_the_stated_map_within_the_stated_ranges(strength):
    """Ramps give the map back: a rotation times a scale, never a flip.

    2000 draws reach the ends of each range.
    """
    contrast, brightness, place = moves_of(2000, strength)
    inner = place[:, :, 12:20, 12:20]  # away from the edge, which repeats
    step = 2 / 32
    right, down = inner.diff(dim=3).mean((2, 3)), inner.diff(dim=2).mean((2, 3))
    matrix = torch.stack([right, down], 2) / step  # its columns
    s = matrix.det().sqrt()
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    torch.testing.assert_close(matrix, s[:, None, None] * rotation, atol=1e-4, rtol=0)
    d = inner.mean((2, 3))
    ranges = [(angle, math.radians(10)), (s.log(), math.log(1.1)), (d[:, 0], 0.1), (d[:, 1], 0.1)]
    for values, largest in ranges + [(contrast.log(), math.log(1.25)), (brightness, 0.2)]:
        largest *= strength
        assert 0.95 * largest < values.max() <= 1.001 * largest
        assert -0.95 * largest > values.min() >= -1.001 * largest
        assert abs(values.mean()) < 0.06 * largest
    six = torch.stack([angle, s.log(), d[:, 0], d[:, 1], contrast.log(), brightness])
    together = torch.corrcoef(six) - torch.eye(6)
    assert together.abs().max() < 5 / math.sqrt(2000)  # each is drawn by itself


def test_augmentation_moves_the_mask_with_its_xray_and_keeps_it_two_valued():
    """A disc off the centre: the mask is the disc at the places that the X-ray's own ramps show.

    They agree up to the disc's pixelated edge.
    """

    def disc(right, down):
        return (right - 0.3) ** 2 + (down + 0.2) ** 2 < 0.16

    _, _, place = moves_of(200, 1.0)
    expected = disc(place[:, 0], place[:, 1])
    mask = augmented(torch.where(disc(RAMP, RAMP.T), 1.0, -1.0), 200)[1]
    assert mask.unique().tolist() == [-1, 1]

    def dice(a):
        return 2 * (a & expected).sum((1, 2)) / (a.sum((1, 2)) + expected.sum((1, 2)))

    assert dice(mask[:, 0] > 0).min() > 0.93
    assert dice(disc(RAMP, RAMP.T).expand(200, 32, 32)).min() < 0.8


def test_augmentation_of_strength_0_changes_nothing_and_stays_within_the_range_otherwise():
    """Strength 0 is the identity. An X-ray beyond -1..1 is clipped to it, not folded or scaled."""
    x = torch.rand(32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    same, mask = augmented(x, 3, 0.0)
    torch.testing.assert_close(same[:, 0], x.expand(3, 32, 32), atol=1e-5, rtol=0)
    assert torch.equal(mask[0, 0] > 0, x > 0)
    assert augmented(0.9 * RAMP.sign(), 50)[0].abs().max() == 1
