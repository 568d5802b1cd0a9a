"""§4.3's eight numbers against scikit-learn, the report's own tables and exact integers."""

import functools
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn import metrics as sk

import metrics
from metrics import (
    NAMES,
    Counts,
    auroc,
    calibration,
    central_interval,
    conformal_factor,
    confusion,
    coverage,
    crps,
    dice_difference,
    energy_distance,
    expected_calibration_error,
    interval_score,
    outline_distance,
    per_image,
    scores,
    share_report,
    shares,
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


# ---------------------------------------- masks as a distribution


def normal(B, N, seed=0):
    """Standard normal numbers, (B, N)."""
    return np.random.default_rng(seed).standard_normal((B, N))


def test_a_share_is_counted_over_the_whole_that_is_named():
    """Two images with two masks each, by hand; probabilities; a whole without a pixel is nan."""
    a = np.array([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]], bool)
    assert shares(a).tolist() == [[0.5, 0.25], [1, 0]]
    whole = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert shares(a, whole)[0].tolist() == [1, 0.5] and np.isnan(shares(a, whole)[1]).all()
    p = torch.full((1, 1, 2, 2), 0.25)
    assert shares(p, torch.tensor([[[True, False], [False, False]]])).tolist() == [[1.0]]


def test_an_interval_holds_one_more_draw_with_its_level():
    """19 samples: smallest and largest; 39: the second from each end; 25: 90 % of further draws.

    Between two samples in order the interpolation is exact for the uniform law.
    """
    x = normal(3, 39)
    low, high = central_interval(x)
    np.testing.assert_allclose([low, high], np.sort(x, 1)[:, [1, 37]].T, atol=1e-12)
    low, high = central_interval(x[:, :19])
    np.testing.assert_allclose([low, high], [x[:, :19].min(1), x[:, :19].max(1)], atol=1e-12)
    x = norm.cdf(normal(40_000, 26))
    assert coverage(*central_interval(x[:, 1:]), x[:, 0]) == pytest.approx(0.9, abs=0.006)
    assert coverage(*central_interval(x[:, 1:], 0.5), x[:, 0]) == pytest.approx(0.5, abs=0.01)
    few = coverage(*central_interval(x[:, 1:10]), x[:, 0])
    assert few == pytest.approx(8 / 10, abs=0.008)


def test_the_interval_score_has_its_closed_form_and_is_least_for_the_true_quantiles():
    """N(0, 1), +-z:   2 z + 4 / (1 - level) (phi(z) - z (1 - Phi(z)))."""
    x, level = normal(400_000, 1)[:, 0], 0.9

    def expected(z):
        return 2 * z + 4 / (1 - level) * (norm.pdf(z) - z * norm.sf(z))

    z = norm.ppf((1 + level) / 2)
    for end in (0.7 * z, z, 1.3 * z):
        got = interval_score(np.full_like(x, -end), np.full_like(x, end), x, level)
        assert got == pytest.approx(expected(end), rel=0.01)
    assert expected(z) < min(expected(0.7 * z), expected(1.3 * z)) - 0.1
    one = [np.array([value]) for value in (0.2, 0.4, 0.1)]
    assert interval_score(*one) == pytest.approx(0.2 + 20 * 0.1)


@pytest.mark.parametrize("mean, sd", [(0, 1), (1, 0.5), (-2, 3)])
def test_the_crps_of_a_gaussian_has_its_closed_form(mean, sd):
    """sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / sd; 25 samples or 2."""
    y, z = np.full(40_000, 0.3), (0.3 - mean) / sd
    exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)
    for N in (25, 2):
        got = crps(mean + sd * normal(len(y), N), y)
        assert got == pytest.approx(sd * exact, abs=0.02 * sd)


def test_the_crps_counts_every_pair_and_one_sample_is_the_absolute_error():
    x, y = normal(3, 5), np.array([0.1, -0.2, 3.0])
    pairs = [np.mean([abs(a - b) for i, a in enumerate(row) for b in row[:i]]) for row in x]
    want = np.mean(abs(x - y[:, None]).mean(1) - np.array(pairs) / 2)
    assert crps(x, y) == pytest.approx(want, abs=1e-12)
    assert crps(x[:, :1], y) == pytest.approx(abs(x[:, 0] - y).mean(), abs=1e-12)


def test_a_conformal_interval_covers_whatever_the_spread():
    """n = 99: the 90th ratio in order, for 90 %; over many draws it holds 90 in 100 new ones."""
    ratios = np.random.default_rng(0).permutation(99) + 1.0
    spread = np.random.default_rng(1).random(99) + 0.1
    assert conformal_factor(ratios * spread, spread) == pytest.approx(90)
    assert conformal_factor(ratios[:8], np.ones(8)) == np.inf  # 9 are the fewest for 90 %
    assert conformal_factor(np.array([0.0, 1.0] * 50), np.zeros(100)) > 1e300
    error = np.abs(normal(20_000, 20))  # 19 to learn from, one to be covered
    held = [row[19] <= conformal_factor(row[:19], np.ones(19)) for row in error]
    assert np.mean(held) == pytest.approx(18 / 20, abs=0.01)


def test_a_report_on_shares_is_that_of_its_parts():
    """Two images of four pixels with three masks each, by hand."""
    areas = np.array([[1, 2, 3], [2, 2, 4]])
    true = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool).reshape(2, 1, 2, 2)
    p = np.array([[0.9, 0.8, 0.1, 0], [0.6, 0.6, 0.2, 0.2]]).reshape(2, 1, 2, 2)
    report = share_report(p, areas, true)  # shares 0.5 and 0 against 1/4, 1/2, 3/4 and 1/2, 1/2, 1
    assert report["level"] == 0.5 and report["coverage"] == 0.5
    assert report["width"] == pytest.approx(0.5)
    assert report["interval score"] == pytest.approx(0.5 + 20 * 0.5 / 2)
    assert report["CRPS"] == pytest.approx(((1 / 6 - 1 / 6) + (2 / 3 - 1 / 6)) / 2)
    means = {
        "mean of the masks": [0, 2 / 3],
        "mask of the mean": [0, 0.5],
        "sum of the probabilities": [-0.05, 0.4],
    }
    for name, errors in means.items():
        assert report["bias"][name] == pytest.approx(np.mean(errors))
        assert report["mean absolute error"][name] == pytest.approx(np.abs(errors).mean())
    assert report["calibration error"] == expected_calibration_error(p, true)
    lungs = np.ones_like(true)
    lungs[:, :, 1, 1] = False  # three pixels
    of_lungs = share_report(p, areas, true, lungs)
    assert of_lungs["width"] == pytest.approx(0.5 * 4 / 3)
    assert of_lungs["bias"]["mask of the mean"] == pytest.approx(0.25 * 4 / 3)


def test_the_energy_distance_of_two_shapes_is_that_of_their_rates():
    """Shapes at distance d, at rates p and q:   2 d (p - q)^2;   against one truth 2 d p^2."""
    one, other = np.zeros((2, 4, 4), bool)
    one[:2], other[1:3] = True, True  # Jaccard index 1/3
    d = 2 / 3

    def set_of(k, n):
        return np.stack([one] * k + [other] * (n - k))[None]

    assert energy_distance(set_of(3, 10), set_of(3, 10)) == pytest.approx(0, abs=1e-6)
    got = energy_distance(set_of(3, 10), set_of(4, 5))
    assert got == pytest.approx(2 * d * (0.3 - 0.8) ** 2, abs=1e-6)
    got = energy_distance(set_of(7, 10), set_of(0, 1))
    assert got == pytest.approx(2 * d * 0.7**2, abs=1e-6)
    nothing = np.zeros((1, 3, 4, 4), bool)
    assert energy_distance(nothing, nothing) == 0
    assert energy_distance(nothing, set_of(2, 2)) == pytest.approx(2)
    soft = np.where(set_of(3, 10), 0.2, -0.2)  # masks in [-1, 1]
    assert energy_distance(soft, set_of(4, 5)) == pytest.approx(2 * d * 0.25, abs=1e-6)


def test_sec41_calibration_counts_what_comes_true():
    """True with probability p: no error but chance.

    Certain and right 7 times in 10: an error of 0.3. Empty bins are nan.
    """
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=g, dtype=torch.float64)
    mean, share, count = calibration(p, torch.rand(len(p), generator=g) < p)
    assert abs(mean - share).max() < 0.015 and count.sum() == len(p)
    assert (mean * 10).astype(int).tolist() == list(range(10))
    true = torch.rand(len(p), generator=g) < p
    assert expected_calibration_error(p, true) < 0.01
    sure, right = torch.ones(10), torch.arange(10) < 7
    mean, share, count = calibration(sure, right)
    assert (float(mean[-1]), float(share[-1])) == pytest.approx((1, 0.7))
    assert count.tolist() == [0] * 9 + [10] and np.isnan(mean[:9]).all()
    assert expected_calibration_error(sure, right) == pytest.approx(0.3)
    p = torch.cat([sure, torch.full((30,), 0.05)])  # 30 pixels that are never positive, at 0.05
    error = expected_calibration_error(p, torch.cat([right, torch.zeros(30) > 1]))
    assert error == pytest.approx((10 * 0.3 + 30 * 0.05) / 40)


def test_sec41_errors_of_calibration_do_not_cancel_between_bins():
    """Too low by 0.2 in one bin, too high by 0.2 in another: an error of 0.2, not of 0."""
    p = torch.tensor([0.25, 0.75]).repeat_interleave(100)
    true = torch.cat([torch.arange(100) < 45, torch.arange(100) < 55])
    assert expected_calibration_error(p, true) == pytest.approx(0.2)


def test_the_error_of_a_difference_of_dice_is_that_of_its_images():
    """b misses the same pixels as a and 50 more in each image: pooled by hand; no error.

    Where the 50 are missed in every other image, the error is that of the delta method.
    """
    B, rng = 400, np.random.default_rng(0)
    TP, FP = rng.integers(900, 1000, B), np.full(B, 50)
    a = Counts(TP, FP, 1000 - TP, np.full(B, 3000))
    assert dice_difference([a], [a], rng) == (0, 0)
    worse = 100 * (np.arange(B) % 2)
    b = Counts(TP - worse, FP, a.FN + worse, a.TN)
    difference, error = dice_difference([a], [b], rng)
    dice_a, dice_b = (scores(c.pooled())["DICE index"] for c in (a, b))
    assert difference == pytest.approx(dice_a - dice_b, abs=1e-12) and difference > 0.02

    def influence(c, dice):  # of an image on the quotient of two sums
        return (2 * c.TP - dice * (2 * c.TP + c.FP + c.FN)) / (2 * c.TP + c.FP + c.FN).mean()

    delta = (influence(a, dice_a) - influence(b, dice_b)).std(ddof=1) / np.sqrt(B)
    assert error == pytest.approx(delta, rel=0.1)
    apart = np.hypot(*(influence(c, d).std() / np.sqrt(B) for c, d in ((a, dice_a), (b, dice_b))))
    every = Counts(TP - 50, FP, a.FN + 50, a.TN)
    assert (
        dice_difference([a], [every], rng)[1] < 0.1 * apart
    )  # paired: what is common does not count
    both = dice_difference([a, b], [every, every], rng)[0]  # two seeds: the mean of their DICE
    dice_every = scores(every.pooled())["DICE index"]
    assert both == pytest.approx((dice_a + dice_b) / 2 - dice_every, abs=1e-12)


# ---------------------------------------- outlines


def test_the_distance_of_two_outlines_has_its_closed_form():
    """Half-planes 3 rows apart: 3. A square in another, k = 2 outside it: corners are farther."""
    rows = np.broadcast_to(np.arange(30)[:, None], (30, 40))
    assert outline_distance(rows > 10, rows > 13) == 3 == outline_distance(rows > 13, rows > 10)
    assert outline_distance(rows > 10, rows > 10) == 0
    y, x = np.mgrid[:40, :40]
    far = np.maximum(abs(x - 20), abs(y - 20))
    small, large = far <= 8, far <= 10
    # From the 64 pixels of the small outline 2 each; from the 80 of the large one 2 but at corners
    corners = 4 * (2 * np.sqrt(2) + 2 * np.hypot(2, 1))
    expected = (64 * 2 + (80 - 12) * 2 + corners) / 144
    assert outline_distance(small, large) == pytest.approx(expected)
    for blank in (np.zeros_like(small), np.ones_like(small)):
        assert np.isnan(outline_distance(small, blank)) and np.isnan(outline_distance(blank, small))


def test_outlines_of_a_million_pairs_are_measured_in_parts(monkeypatch):
    """The same number however many parts, by brute force."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 60, 60)) < 0.5
    found = outline_distance(a, b)
    p, q = metrics.outline(a), metrics.outline(b)
    assert len(p) * len(q) > 2**20
    far = np.hypot(*(p[:, None] - q).transpose(2, 0, 1))
    assert found == pytest.approx(np.concatenate([far.min(1), far.min(0)]).mean())
