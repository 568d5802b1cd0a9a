"""§4.3's eight numbers against scikit-learn, the report's own tables and exact integers."""

import functools
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn import metrics as sk

from metrics import (
    NAMES,
    Counts,
    auroc,
    confusion,
    frechet_distance,
    image_features,
    per_image,
    scores,
)

ORACLE = {
    "DICE index": sk.f1_score,
    "Jaccard index": sk.jaccard_score,
    "Accuracy": sk.accuracy_score,
    "Sensitivity": sk.recall_score,
    "Specificity": functools.partial(sk.recall_score, pos_label=0),
    "Balanced Accuracy": sk.balanced_accuracy_score,
    "Precision": sk.precision_score,
    "MCC": sk.matthews_corrcoef,
}
HAND = Counts(TP=3, FP=1, FN=2, TN=10)  # all four different: no two can trade places unseen


def masks(n=7, seed=0, share=0.3):
    """A predicted and a true stack of n masks in {-1, +1}, 80 % of the pixels agreeing."""
    rng = np.random.default_rng(seed)
    true = np.where(rng.random((n, 1, 8, 8)) < share, 1.0, -1.0)
    return np.where(rng.random(true.shape) < 0.8, true, -true), true


# ---------------------------------------- the eight numbers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_sec43_the_eight_numbers_are_scikit_learns(seed, share):
    """All eight on random masks, to 1e-12, pooled and image by image."""
    predicted, true = masks(seed=seed, share=share)
    pooled, single = scores(confusion(predicted, true).pooled()), scores(confusion(predicted, true))
    predicted, true = predicted > 0, true > 0
    assert tuple(pooled) == NAMES == tuple(ORACLE)
    for name, oracle in ORACLE.items():
        assert pooled[name] == pytest.approx(oracle(true.ravel(), predicted.ravel()), abs=1e-12)
        for value, p, t in zip(single[name], predicted, true):
            if p.any() and t.any():  # scikit-learn's 0/0 is 0 or 1
                assert value == pytest.approx(oracle(t.ravel(), p.ravel()), abs=1e-12)


def test_sec43_counts_of_a_mask_counted_by_hand():
    """Found, not true is FP; true, not found is FN; the numbers of 3, 1, 2, 10 as fractions."""
    true = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    predicted = torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert confusion(predicted, true).pooled() == HAND
    got = scores(HAND)
    want = dict(zip(NAMES, (6 / 9, 3 / 6, 13 / 16, 3 / 5, 10 / 11, (3 / 5 + 10 / 11) / 2, 3 / 4)))
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-15)


def test_sec43_jaccard_is_dice_over_two_minus_dice():
    """J = D / (2 - D) to the last digits for pooled counts.

    The report's averaged ratios miss it by up to 0.0008.
    """
    got = scores(confusion(*masks(200)))
    D = got["DICE index"]
    np.testing.assert_allclose(got["Jaccard index"], D / (2 - D), rtol=1e-14)
    for dice, jaccard in ((0.9529, 0.9101), (0.9541, 0.9123), (0.6755, 0.5105), (0.4708, 0.3087)):
        assert 0.00003 < jaccard - dice / (2 - dice) < 0.001


def test_sec43_a_mask_against_itself_scores_1():
    """scores(truth, truth) = 1, all eight; against its opposite 0, and MCC -1."""
    _, true = masks()
    same, opposite = scores(confusion(true, true).pooled()), scores(confusion(-true, true).pooled())
    assert list(same.values()) == pytest.approx([1] * 8, abs=1e-15)
    assert list(opposite.values()) == pytest.approx([0] * 7 + [-1], abs=1e-15)


def test_sec43_pooling_batches_is_the_same_as_one_batch():
    """Counts add: image by image within a batch, batch by batch, in any grouping."""
    predicted, true = masks(12)
    whole = confusion(predicted, true).pooled()
    batches = [confusion(predicted[i : i + 4], true[i : i + 4]) for i in (0, 4, 8)]
    assert sum(map(Counts.pooled, batches), Counts(0, 0, 0, 0)) == whole
    assert (batches[0] + batches[1] + batches[2]).pooled() == whole
    assert confusion(predicted[None], true[None]).pooled() == whole


UNDEFINED = {
    Counts(0, 0, 0, 10): set(NAMES) - {"Accuracy", "Specificity"},
    Counts(10, 0, 0, 0): {"Specificity", "Balanced Accuracy", "MCC"},
    Counts(0, 3, 0, 7): {"Sensitivity", "Balanced Accuracy", "MCC"},
    Counts(0, 0, 3, 7): {"Precision", "MCC"},
    Counts(0, 0, 0, 0): set(NAMES),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", UNDEFINED)
def test_sec43_no_positive_pixel_anywhere_is_undefined_not_zero(counts):
    """0/0 is nan, and nothing else is, without a warning; the same for numbers and for arrays."""
    nan = {name for name, value in scores(counts).items() if np.isnan(value)}
    assert nan == UNDEFINED[counts]
    both = scores(Counts(*(np.array([a, b]) for a, b in zip(counts, HAND))))
    assert {name for name, value in both.items() if np.isnan(value[0])} == nan
    assert {name: value[1] for name, value in both.items()} == scores(HAND)


@pytest.mark.parametrize("pixels", [33_920 * 64 * 64, 10**12, 4 * 10**15])
def test_sec43_counts_of_a_whole_data_set_do_not_overflow(pixels):
    """All of COVID-QU-Ex at 64x64, and far beyond int64 in MCC's product, by exact integers."""
    TP, FP, FN = pixels // 5, pixels // 30, pixels // 40
    TN = pixels - TP - FP - FN
    got = scores(Counts(*np.array([TP, FP, FN, TN], dtype=np.int64)))
    squared = Fraction((TP * TN - FP * FN) ** 2, (TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert got["MCC"] == pytest.approx(float(squared) ** 0.5, rel=1e-12)
    assert got["Accuracy"] == pytest.approx(float(Fraction(TP + TN, pixels)), rel=1e-12)


def test_sec43_every_pixel_of_a_large_mask_is_counted():
    """300,000 pixels an image, in the smallest types a mask comes in."""
    for kind in (bool, np.uint8, np.int8, np.float32):
        ones = np.ones((2, 1, 500, 600), dtype=kind)
        assert confusion(ones, ones).pooled() == Counts(600_000, 0, 0, 0)


def test_sec43_threshold_0_is_half_of_the_range_from_0_to_1():
    """m > 0.5 in [0, 1] is 2 m - 1 > 0 in [-1, 1]; a pixel exactly on the threshold is negative."""
    p, true = np.random.default_rng(0).integers(0, 257, (2, 5, 1, 8, 8)) / 256
    assert (p == 0.5).any() or (true == 0.5).any()
    a, b = confusion(2 * p - 1, 2 * true - 1), confusion(p, true, threshold=0.5)
    assert all(map(np.array_equal, a, b))
    assert confusion(np.zeros((1, 3)), np.ones((1, 3))).pooled() == Counts(0, 0, 3, 0)


def test_sec43_bool_numpy_and_torch_masks_count_alike():
    """Any mix of them, [0, 1] or [-1, 1]."""
    predicted, true = masks()
    want = confusion(predicted, true)
    for p, t in (
        (predicted > 0, true > 0),
        (torch.from_numpy(predicted), true),
        (torch.from_numpy(predicted).float(), torch.from_numpy(true > 0)),
        (predicted > 0, torch.from_numpy(true).int()),
    ):
        assert all(map(np.array_equal, confusion(p, t), want))
    assert all(n.dtype == np.int64 and n.shape == (7,) for n in want)


def test_sec43_masks_of_different_shapes_are_refused_in_words():
    """Broadcasting would count something: (4, 1, 8, 8) against (1, 1, 8, 8) fits."""
    refusal = r"must have one shape, got \(4, 1, 8, 8\) and \(1, 1, 8, 8\)"
    with pytest.raises(ValueError, match=refusal):
        confusion(np.zeros((4, 1, 8, 8)), np.zeros((1, 1, 8, 8)))


def test_sec43_mean_and_spread_over_images_leave_out_the_undefined():
    """Mean and sample standard deviation over the images with a value, and their number.

    The oracle is the statistics module.
    """
    predicted, true = masks(6)
    predicted[2], true[2] = -1, -1  # no positive pixel, found or true
    counts = confusion(predicted, true)
    summary, values = per_image(counts), scores(counts)
    for name in NAMES:
        defined = [v for v in values[name] if v == v]
        want = (statistics.mean(defined), statistics.stdev(defined), len(defined))
        assert summary[name] == pytest.approx(want, rel=1e-12)
    assert (summary["DICE index"][2], summary["Accuracy"][2]) == (5, 6)
    mean, spread, n = per_image(confusion(predicted[2:4], true[2:4]))["DICE index"]
    assert n == 1 and mean == values["DICE index"][3] and np.isnan(spread)
    nothing = per_image(confusion(predicted[[2]], true[[2]]))
    assert np.isnan(nothing["DICE index"][:2]).all()


# ---------------------------------------- the report's own tables

TABLES = {  # Tables 1 and 2, in NAMES' order
    "lung, addition": (0.9529, 0.9101, 0.9792, 0.9455, 0.9888, 0.9672, 0.9604, 0.9396),
    "lung, concatenation": (0.9541, 0.9123, 0.9793, 0.9502, 0.9878, 0.9793, 0.9581, 0.9408),
    "infection, addition": (0.6755, 0.5105, 0.9183, 0.6687, 0.9550, 0.8119, 0.6838, 0.6293),
    "infection, concatenation": (0.4708, 0.3087, 0.8967, 0.3646, 0.9736, 0.6691, 0.6674, 0.4431),
}


def from_table(column):
    """The share p of positive pixels and the confusion matrix that a column implies.

    p follows from Accuracy = p Se + (1 - p) Sp.
    """
    _, _, accuracy, Se, Sp, *_ = TABLES[column]
    p = (Sp - accuracy) / (Sp - Se)
    return p, Counts(p * Se, (1 - p) * (1 - Sp), p * (1 - Se), (1 - p) * Sp)


@pytest.mark.parametrize("column", TABLES)
def test_tables_1_and_2_agree_with_their_own_sensitivity_specificity_and_accuracy(column):
    """Three printed numbers fix the matrix; the other five follow within 0.005.

    That is what averaging over batches costs.
    """
    got = scores(from_table(column)[1])
    for name, printed in zip(NAMES, TABLES[column]):
        if (column, name) != ("lung, concatenation", "Balanced Accuracy"):
            assert got[name] == pytest.approx(printed, abs=0.005), name


def test_table1_concat_balanced_accuracy_is_a_misprint_in_the_report():
    """(Se + Sp) / 2 = 0.9690; what is printed, 0.9793, is the Accuracy two rows above."""
    printed = dict(zip(NAMES, TABLES["lung, concatenation"]))
    implied = scores(from_table("lung, concatenation")[1])
    assert implied["Balanced Accuracy"] == pytest.approx(0.9690, abs=1e-12)
    assert printed["Balanced Accuracy"] == printed["Accuracy"] == 0.9793


def test_tables_1_and_2_imply_how_many_pixels_are_positive():
    """About 0.22 of a lung image, and 0.13 of an infection image: COVID-19 images alone."""
    shares = [from_table(column)[0] for column in TABLES]
    assert shares == pytest.approx([0.223, 0.227, 0.127, 0.127], abs=0.002)


# ---------------------------------------- synthesis


def whitened(n, d, seed=0):
    """n points in d dimensions with mean 0 and covariance I (n - 1 in the denominator), exactly."""
    z = np.random.default_rng(seed).standard_normal((n, d))
    z = z - z.mean(0)
    return z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T


def test_fig3_frechet_distance_of_two_known_gaussians_on_common_axes():
    """Covariances of common axes, standard deviations s_a, s_b: |m_a - m_b|^2 + |s_a - s_b|^2."""
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    s_a, s_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 0.1, 0.5, 5.0])
    a = whitened(50, 4) * s_a @ axes + 1
    b = whitened(80, 4, seed=2) * s_b @ axes - 1
    assert frechet_distance(a, b) == pytest.approx(4 * 4 + np.sum((s_a - s_b) ** 2), rel=1e-9)


def test_fig3_frechet_distance_is_scipys_square_root_of_the_product():
    """Covariances without common axes: the trace of sqrtm(C_a C_b); the same either way round."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5))
    b = rng.standard_normal((30, 5)) + 2
    C_a, C_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(C_a @ C_b))
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(C_a + C_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-9)


def test_fig3_frechet_distance_to_itself_is_0():
    """The same set in another order, with fewer images than features too; a shift is its length."""
    a = np.random.default_rng(0).standard_normal((20, 30))
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(30 * 4, abs=1e-6)


def test_fig3_image_features_are_mean_and_texture_of_each_cell_of_a_known_image():
    """A 16x32 image of 8x8 cells, each its own grey plus a checkerboard of its own height.

    Grey and height come back.
    """
    grey, height = np.random.default_rng(0).random((2, 3, 8, 8))
    board = np.kron(np.ones((8, 8)), np.array([[1, -1, 1, -1], [-1, 1, -1, 1]]))
    image = np.kron(grey, np.ones((2, 4))) + np.kron(height, np.ones((2, 4))) * board
    want = np.concatenate([grey.reshape(3, 64), height.reshape(3, 64)], 1)
    np.testing.assert_allclose(image_features(image[:, None]), want, atol=1e-12)
    np.testing.assert_allclose(image_features(torch.from_numpy(image[:, None])), want, atol=1e-12)


# ---------------------------------------- AUROC


def test_auroc_is_the_chance_that_a_positive_pixel_scores_higher():
    """Every pair counted, ties half; any shape, arrays and tensors."""
    rng = np.random.default_rng(0)
    score, true = rng.integers(0, 6, (7, 9)), rng.random((7, 9)) < 0.3
    pairs = score[true][:, None] - score[~true]
    expected = ((pairs > 0).sum() + (pairs == 0).sum() / 2) / pairs.size
    assert auroc(score, true) == pytest.approx(expected, abs=1e-12) and abs(expected - 0.5) > 0.01
    library = sk.roc_auc_score(true.ravel(), score.ravel())
    assert auroc(score, true) == pytest.approx(library, abs=1e-12)
    of_tensors = auroc(torch.from_numpy(score).float(), torch.from_numpy(true))
    assert of_tensors == pytest.approx(expected, abs=1e-12)


def test_auroc_of_the_truth_of_its_opposite_and_of_a_constant():
    """1, 0 and 1/2; any increasing function leaves it; nan where one class is missing.

    A truth that is not bool is refused.
    """
    true = np.array([True, False, True, False, False])
    score = np.array([0.9, 0.1, 0.8, 0.3, 0.2])
    assert (auroc(score, true), auroc(-score, true), auroc(0 * score, true)) == (1, 0, 0.5)
    assert auroc(np.exp(5 * score), true) == 1
    assert np.isnan(auroc(score, np.zeros(5, bool))) and np.isnan(auroc(score, np.ones(5, bool)))
    with pytest.raises(ValueError, match="the truth be bool"):
        auroc(score, true.astype(float))
