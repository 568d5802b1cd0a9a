"""Distances of image sets against Gaussian worlds, kernels summed by hand, and finite sets."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu, norm

import image_metrics
from image_metrics import (
    frechet_distance,
    frechet_jackknife,
    image_features,
    kernel_distance,
    memorisation,
    precision_recall,
)


def gaussian(n, d, seed=0):
    """n points in d dimensions of N(0, I)."""
    return np.random.default_rng(seed).standard_normal((n, d))


# ---------------------------------------- features and Fréchet distance


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


def test_frechet_jackknife_takes_away_the_bias_of_few_images():
    """N(0, I) and N(1, 4 I) in three dimensions are 3 + 3 apart. 60 images add 5 tr(I) / 60 = 0.25
    by their means alone. The error is the spread of the distance over 300 worlds.
    """
    worlds = [(gaussian(60, 3, 2 * k), 1 + 2 * gaussian(60, 3, 2 * k + 1)) for k in range(300)]
    plain = np.array([frechet_distance(*world) for world in worlds])
    found, errors = np.array([frechet_jackknife(*world) for world in worlds]).T
    chance = found.std() / 300**0.5
    assert plain.mean() - 6 > 0.25 and abs(found.mean() - 6) < 3 * chance < 0.25
    assert np.mean(errors**2) ** 0.5 == pytest.approx(found.std(), rel=0.12)


def test_frechet_jackknife_of_two_groups_is_a_line_through_two_sizes():
    """2 F(N) - F(N / 2), and half the difference of the halves; sets of unequal size."""
    a, b = gaussian(40, 3), 2 * gaussian(60, 3, 1)
    first, second = frechet_distance(a[:20], b[:30]), frechet_distance(a[20:], b[30:])
    distance, error = frechet_jackknife(a, b, groups=2)
    assert distance == pytest.approx(2 * frechet_distance(a, b) - (first + second) / 2)
    assert error == pytest.approx(abs(first - second) / 2)


# ---------------------------------------- kernel distance


def test_kernel_distance_of_two_sets_of_three_numbers_by_hand():
    """(x y + 1)^3 is 1 beside a 0, else 8, 27.   29 / 3 + 1 - 2 (42 / 9) = 4 / 3."""
    a, b = np.array([[0.0], [1], [2]]), np.array([[0.0], [0], [1]])
    assert kernel_distance(a, b)[0] == pytest.approx(4 / 3) == kernel_distance(b, a)[0]
    twice = [np.repeat(x, 2, axis=1) for x in (a, b)]  # D = 2: the product is divided by it
    assert kernel_distance(*twice)[0] == pytest.approx(4 / 3)


@pytest.mark.parametrize("m", [0, 0.5])
def test_kernel_distance_is_right_on_average_even_of_few_numbers(m):
    """N(0, 1) and N(m, 1): the kernel sees three moments, 3 m^2 + 3 m^4 + (m^3 + 3 m)^2."""
    worlds = [(gaussian(20, 1, 2 * k), m + gaussian(16, 1, 2 * k + 1)) for k in range(4000)]
    found = np.array([kernel_distance(*world)[0] for world in worlds])
    chance = found.std() / len(found) ** 0.5
    assert abs(found.mean() - (3 * m**2 + 3 * m**4 + (m**3 + 3 * m) ** 2)) < 3 * chance < 0.5


@pytest.mark.parametrize("shift, excess", [(0, 1.2), (0.1, 1.1), (1, 1)])
def test_the_error_of_kernel_distance_is_its_spread(shift, excess):
    """Over 600 worlds of 60 and 40 points in six dimensions: laws that are equal, near, far.

    A fifth more where the laws are equal; without V_2's part it would be sqrt(2).
    """
    worlds = [(gaussian(60, 6, 2 * k), shift + gaussian(40, 6, 2 * k + 1)) for k in range(600)]
    found, errors = np.array([kernel_distance(*world) for world in worlds]).T
    assert np.mean(errors**2) ** 0.5 == pytest.approx(excess * found.std(), rel=0.1)
    assert errors.min() > 0.5 * excess * found.std() * (shift < 1)


def test_the_error_of_kernel_distance_leaves_out_one_image_at_a_time():
    """By brute force, and less what pairs add, which the test above measures."""
    a, b = gaussian(20, 4), 0.5 + gaussian(12, 4, 1)
    by_a = [kernel_distance(np.delete(a, i, 0), b)[0] for i in range(20)]
    by_b = [kernel_distance(a, np.delete(b, i, 0))[0] for i in range(12)]
    kernels = [image_metrics.kernel(x, y) for x, y in ((a, a), (b, b), (a, b))]
    pairs = image_metrics.variance_of_pairs(*kernels)
    want = 19 * np.var(by_a) + 11 * np.var(by_b) - pairs
    assert kernel_distance(a, b)[1] ** 2 == pytest.approx(want, rel=1e-9) and pairs > 0.02 * want


def test_what_single_images_explain_is_no_part_of_the_pairs():
    """k(x, y) = f(x) + g(y) has none. Of +-1 at random, without means, every square is 1."""
    f, g = gaussian(20, 1), gaussian(12, 1, 1)
    assert image_metrics.variance_of_pairs(f + f.T, g + g.T, f + g.T) == pytest.approx(0, abs=1e-20)
    signs = [np.resize([1.0, -1.0], n) for n in (20, 12)]
    a, b = signs
    found = image_metrics.variance_of_pairs(np.outer(a, a), np.outer(b, b), np.outer(a, b))
    assert found == pytest.approx(2 / (20 * 19) + 2 / (12 * 11) + 4 / (20 * 12))


# ---------------------------------------- nearest neighbours


def test_precision_and_recall_of_numbers_on_a_line():
    """k = 1: real 0, 1, 3 reach 1, 1, 2 far; drawn 2, 5, 5.5 reach 3, 1/2, 1/2; edges included."""
    real, drawn = np.array([[0.0], [1], [3]]), np.array([[2.0], [5], [5.5]])
    assert precision_recall(real, drawn, k=1) == (2 / 3, 1)  # 5.5 is outside
    assert precision_recall(drawn, real, k=1) == (1, 2 / 3)  # the two trade places
    assert precision_recall(real, drawn - 6, k=1) == (2 / 3, 1 / 3)  # -4, -1, -0.5
    assert precision_recall(real, drawn, k=2) == (1, 1)  # 3 reaches 3 far now


def test_precision_and_recall_are_those_of_every_ball_tried():
    """k = 3, sets of unequal size, by loops; a set beside itself; one of two clusters drawn."""
    real, drawn = gaussian(40, 2), 2 + gaussian(25, 2, 1)

    def share_inside(points, centres):
        hits = 0
        for p in points:
            for c in centres:
                reach = sorted(np.linalg.norm(c - other) for other in centres)[3]  # [0] is itself
                if np.linalg.norm(p - c) <= reach:
                    hits += 1
                    break
        return hits / len(points)

    want = share_inside(drawn, real), share_inside(real, drawn)
    assert precision_recall(real, drawn) == want and 0.2 < min(want) and max(want) < 0.96
    assert precision_recall(real, real) == (1, 1)
    clusters = np.concatenate([real, 100 + real])
    assert precision_recall(clusters, real) == (1, 0.5)
    with pytest.raises(ValueError, match="less than the 3 images, got 3"):
        precision_recall(real[:3], drawn)


def test_distances_of_many_images_are_measured_in_parts():
    """scipy's numbers, in less than half of the memory of all differences at once.

    Exactly 0 for an image and itself, however far from 0 both are.
    """
    x, y = 1e6 + gaussian(1500, 8), gaussian(1500, 8, 1)
    tracemalloc.start()
    found = image_metrics.squared_distances(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found, cdist(x, y, "sqeuclidean"), rtol=1e-12)
    assert peak - 2 * found.nbytes < 0.5 * x.nbytes * len(y)
    assert image_metrics.squared_distances(x[:5], x[:5]).diagonal().tolist() == [0] * 5


def test_memorisation_counts_ranks():
    """Distances 1, 2 against 3, 4, 5: U = 0, so -3 / sqrt(3); the other way round +3 / sqrt(3).

    scipy's Mann-Whitney test has the same chance of so few, on sets without ties.
    """
    near, far = np.array([[1.0], [2]]), np.array([[3.0], [4], [5]])
    train = np.array([[0.0], [50]])
    assert memorisation(near, train, far) == pytest.approx(-(3**0.5))
    assert memorisation(far, train, near) == pytest.approx(3**0.5)
    assert memorisation(near, train, near) == 0  # ties count half
    drawn, held_out = gaussian(30, 1, 1), 1.5 * gaussian(20, 1, 2)
    zero = np.zeros((1, 1))
    words = dict(alternative="less", use_continuity=False, method="asymptotic")
    want = mannwhitneyu(abs(drawn[:, 0]), abs(held_out[:, 0]), **words).pvalue
    z = memorisation(drawn, zero, held_out)
    assert 0.01 < want < 0.5 and norm.cdf(z) == pytest.approx(want, rel=1e-9)


def test_memorisation_is_a_z_score_where_nothing_was_copied():
    """Mean 0 and spread 1 over 400 worlds."""
    z = [memorisation(*(gaussian(30, 3, 3 * k + i) for i in range(3))) for k in range(400)]
    assert abs(np.mean(z)) < 3 / 20 and np.std(z) == pytest.approx(1, abs=0.11)


def test_memorisation_finds_copies_and_its_control_knows_them_from_dull_images():
    """40 of 100 drawn near training images: below -3, and about 0 beside other held-out images.

    Images drawn towards the mean, as blurred ones are, are near to both.
    """
    train, held_out, others, drawn = (gaussian(100, 8, i) for i in range(4))
    copies = np.concatenate([train[:40] + 0.01 * drawn[:40], drawn[40:]])
    assert memorisation(copies, train, held_out) < -3 < -2 < memorisation(copies, others, held_out)
    dull = drawn / 2
    assert max(memorisation(dull, x, held_out) for x in (train, others)) < -3
