"""What a picture is drawn from: how it is loaded, taken away in training, and stressed."""

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal

import conditions
import data
import diffusion as D
from conditions import Given
from console import UserError
from test_diffusion import F64, HUNDRED, SAMPLERS, S, close, finite_world, images, noises
from testing import tiny


def synthesis(**changes):
    return tiny(task="synthesis", cond=None, classes=data.CLASSES, **changes)


def test_kinds_stand_in_their_own_order_and_others_are_refused():
    assert conditions.kinds_of("infection+class") == ["class", "infection"]
    assert conditions.masks_of("infection+class+lung") == ["lung", "infection"]
    assert conditions.kinds_of("") == conditions.masks_of("class") == []
    for wrong in ("lungs", "class+", "lung+lung", "+", "class lung"):
        rule = "--given must be some of class, lung, infection, joined by +; got"
        with pytest.raises(UserError, match=re.escape(f"{rule} {wrong}")):
            conditions.kinds_of(wrong)


@pytest.fixture(scope="module")
def unlike(root, tmp_path_factory):
    """The data set of the fixture `root`, where an infection is where the image is dark."""
    unlike = tmp_path_factory.mktemp("unlike") / "data"
    shutil.copytree(root, unlike)
    for file in unlike.rglob("infection masks/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    return unlike


@pytest.mark.parametrize("given", ["", "class", "lung", "infection", "class+lung+infection"])
@pytest.mark.parametrize("draw", conditions.DRAWN)
def test_a_split_holds_what_is_drawn_and_the_masks_that_are_given_row_by_row(unlike, given, draw):
    """Each beside the files of its own name, in the tree that has all of them."""
    if draw in given:
        pytest.skip("what is drawn is not given")
    cfg = synthesis(given=given, draw=draw, data=str(unlike))
    found = conditions.load(cfg, "Val")
    tree = "infection" if "infection" in (draw + given) else "synthesis"
    assert cfg.images_of == tree

    def files(masks):
        return data.load(unlike, tree, "Val", data.CLASSES, 16, masks=masks)

    xrays = files(None)
    drawn = xrays.images if draw == "X-rays" else files(f"{draw} masks").masks
    assert np.array_equal(found.images, drawn) and found.names == xrays.names
    kinds = conditions.masks_of(given)
    if not kinds:
        assert found.masks is None
    for place, kind in enumerate(kinds):
        assert np.array_equal(found.masks[:, [place]], files(f"{kind} masks").masks)
    of_split = conditions.of_split(cfg, found)
    if not given:
        assert of_split is None
    elif "class" in given:
        classes = [data.CLASSES[label - 1] for label in of_split.label]
        assert classes == [name.split("/")[0] for name in found.names] and len(set(classes)) == 3


def test_the_masks_of_a_folder_can_be_asked_for_whatever_is_given(unlike):
    """As a study does that draws X-rays and needs the lungs in them."""
    for given in ("", "lung"):
        found = conditions.load(synthesis(given=given, data=str(unlike)), "Val", masks="lung masks")
        expected = data.load(unlike, "synthesis", "Val", data.CLASSES, 16, masks="lung masks")
        assert np.array_equal(found.images, expected.images)
        assert np.array_equal(found.masks, expected.masks)


def given_of(n, M=2):
    """n pictures with M masks of -1 and +1, and a class each."""
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (n, M, 2, 2), generator=g) * 2.0 - 1
    return Given(masks, torch.randint(1, 4, (n,), generator=g))


def test_a_picture_keeps_each_subset_of_its_conditions_equally_often():
    """[8] drops one condition. Here 3: with drop = 0.8 each of 8 subsets has 0.1, all 0.2 more."""
    n, given = 20_000, given_of(20_000)
    kept = conditions.some_of(given, 0.8, torch.Generator().manual_seed(1))
    has = torch.stack([kept.label > 0, *(kept.masks.abs().amax((2, 3)) > 0).T], 1)
    for subset in itertools.product([False, True], repeat=3):
        found = (has == torch.tensor(subset)).all(1).float().mean()
        chance = 0.1 + 0.2 * all(subset)
        assert abs(float(found) - chance) < 5 * (chance * (1 - chance) / n) ** 0.5, subset
    # What is kept is as it was; what is taken away is 0
    assert torch.equal(kept.label[has[:, 0]], given.label[has[:, 0]])
    assert torch.equal(kept.masks[has[:, 1:]], given.masks[has[:, 1:]])
    assert not kept.label[~has[:, 0]].any() and not kept.masks[~has[:, 1:]].any()


def test_nothing_is_taken_away_without_drop_and_a_network_of_one_kind_loses_it_half_of_the_time():
    given, g = given_of(1000), torch.Generator()
    same = conditions.some_of(given, 0.0, g.manual_seed(0))
    assert torch.equal(same.masks, given.masks) and torch.equal(same.label, given.label)
    for one in (Given(given.masks[:, :1], None), Given(None, given.label)):
        lost = conditions.some_of(one, 1.0, g.manual_seed(0))
        left = lost.label > 0 if lost.masks is None else lost.masks.abs().amax((1, 2, 3)) > 0
        assert abs(float(left.float().mean()) - 0.5) < 0.08


@pytest.mark.parametrize("given, M", [("class", 0), ("lung", 1), ("class+lung+infection", 2)])
def test_what_is_unknown_looks_as_training_leaves_it_to_a_picture_that_loses_everything(given, M):
    masks = torch.ones(100, M, 16, 16) if M else None
    full = Given(masks, torch.ones(100, dtype=torch.long) if "class" in given else None)
    taken = conditions.some_of(full, 1.0, torch.Generator().manual_seed(0))
    left = sum(x.flatten(1).any(1) if x.ndim > 1 else x > 0 for x in taken if x is not None)
    (rows,) = torch.nonzero(left == 0, as_tuple=True)  # of pictures that have lost everything
    assert len(rows) > 3
    nothing = conditions.unknown(synthesis(given=given), len(rows))
    for expected, found in zip(conditions.part_of(taken, rows), nothing, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected) and found.dtype == expected.dtype
    assert conditions.unknown(synthesis(), 3) is None


def test_a_network_is_given_what_it_knows_of_anothers_conditions():
    """Kinds in its own order; what the other does not have is not given."""
    both = given_of(5)
    lung, infection = both.masks[:, :1], both.masks[:, 1:]
    one = conditions.selected(both, "class+lung+infection", "infection")
    assert torch.equal(one.masks, infection) and one.label is None
    more = conditions.selected(Given(infection, None), "infection", "class+lung+infection")
    assert torch.equal(more.masks, torch.cat([0 * lung, infection], 1))
    assert more.label.tolist() == [0] * 5
    label = conditions.selected(both, "class+lung+infection", "class")
    assert label.masks is None and torch.equal(label.label, both.label)
    assert conditions.selected(both, "class+lung+infection", "") is None


def test_rows_of_a_split_are_in_minus_1_to_1():
    masks = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    found = conditions.rows_of(Given(masks, torch.tensor([2, 3])), np.array([1, 0, 1]))
    assert found.masks[:, 0, 0, 0].tolist() == [1, -1, 1] and found.label.tolist() == [3, 2, 3]
    assert conditions.rows_of(None, [0]) is None


# ---------------------------------------- guidance [8]


def mixture_world(s, means, v):
    """The exact eps_theta of a mixture of N(m, v), one for each class: y 1, 2, ..., or 0: unknown.

    Its classes are equally likely. One pixel an image.
    """

    def eps_model(xt, t, y):
        a, b2 = D.at(s.abar.sqrt(), t, xt), D.at(s.abar, t, xt) * v + D.at(1 - s.abar, t, xt)
        log_p = torch.stack([Normal(a * m, b2.sqrt()).log_prob(xt) for m in means])
        score = torch.stack([(a * m - xt) / b2 for m in means])
        asked = torch.stack([(y == 0) | (y == k) for k in range(1, len(means) + 1)])
        weight = log_p.masked_fill(~asked[..., None, None, None], -torch.inf).softmax(0)
        return -D.at((1 - s.abar).sqrt(), t, xt) * (weight * score).sum(0)

    return eps_model


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 3.0])
def test_guidance_of_exact_scores_is_the_score_of_the_sharpened_density(w):
    """[8]: -eps / sqrt(1 - abar_t) is the gradient of log p(x_t) + (1 + w) log p(y | x_t)."""
    means, v = (-0.5, 0.1, 0.6), 0.05
    model = mixture_world(S, means, v)
    y, nothing = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long)
    for t in (1, 200, 999):
        t = torch.full((3,), t)
        xt = images(3, 1, 1, 1).requires_grad_()
        a, b2 = D.at(S.abar.sqrt(), t, xt), D.at(S.abar, t, xt) * v + D.at(1 - S.abar, t, xt)
        log_p = torch.stack([Normal(a * m, b2.sqrt()).log_prob(xt).flatten() for m in means], 1)
        log_x = log_p.logsumexp(1)
        log_y = log_p.gather(1, y[:, None] - 1)[:, 0] - log_x  # log p(y | x_t), up to a constant
        (score,) = torch.autograd.grad((log_x + (1 + w) * log_y).sum(), xt)
        eps = conditions.guided(model, w, nothing)(xt.detach(), t, y)
        close(-eps / D.at((1 - S.abar).sqrt(), t, eps), score, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_at_every_sampler_draws_the_images_of_the_class(name):
    """A finite data set, two images a class: w = 0 draws both of a class, w = -1 those of all."""
    data = images(4, 1, 4, 4).sign() * 0.9
    pairs = {0: finite_world(HUNDRED, data), 1: finite_world(HUNDRED, data[:2])}

    def model(xt, t, y):
        return pairs[y](xt, t, None)

    def drawn(w, n=32):
        noise = noises(torch.empty(n, 1, 4, 4, dtype=F64))
        x0 = SAMPLERS[name](HUNDRED, conditions.guided(model, w, 0), noise, 1, clip=True)
        distance = (x0[:, None] - data).abs().amax((2, 3, 4))
        assert distance.amin(1).max().item() < 1e-5
        return set(distance.argmin(1).tolist())

    assert drawn(0.0) == drawn(2.0) == {0, 1} and drawn(-1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("w", [-1.0, 0.0, 3.0])
def test_guidance_leaves_a_learned_variance_as_it_is(w):
    """Pairs (eps, v): eps is guided as it is alone, v that of y, with no part of the other."""
    xt, t = images(3, 1, 1, 1), torch.tensor([1, 200, 999])
    y, nothing = torch.tensor([1, 2, 2]), torch.zeros(3, dtype=torch.long)
    eps_model = mixture_world(S, (-0.5, 0.6), 0.05)

    def both(xt, t, y):
        return eps_model(xt, t, y), xt * y[:, None, None, None]

    eps, v = conditions.guided(both, w, nothing)(xt, t, y)
    assert torch.equal(eps, conditions.guided(eps_model, w, nothing)(xt, t, y))
    assert torch.equal(v, both(xt, t, y)[1])
