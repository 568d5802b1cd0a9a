r"""How far a set of drawn X-rays is from a set of real ones: distances, coverage, copies (§3).

All but image_features take features, arrays (N, D) of float: one row an image. Whatever they are,
of image_features or of classifier.py, numbers compare within one kind of features only, and beside
the same number of two sets of real images.

number               0 or 1 says                         how far chance moves it
frechet_distance     0: equal means and covariances      biased upwards by about c / N
frechet_jackknife    the same, without that bias         its standard error
kernel_distance      0 expected of two sets of one law   its standard error
precision_recall     1: all within the other set         compare two sets of real images
memorisation         0: as near to the training images   it is a z-score
                     as held-out images are
"""

import numpy as np

from metrics import as_array, auroc


def image_features(images):
    """128 plain numbers an image: mean and standard deviation of each cell of an 8x8 grid.

    The means show the layout, the standard deviations the texture.

    images  (N, 1, H, W) in [-1, 1], H and W multiples of 8. Returns (N, 128) float64.
    """
    x = as_array(images).astype(np.float64)
    N, _, H, W = x.shape
    cells = x.reshape(N, 8, H // 8, 8, W // 8).transpose(0, 1, 3, 2, 4).reshape(N, 64, -1)
    return np.concatenate([cells.mean(2), cells.std(2)], 1)


# ---------------------------------------- Fréchet distance


def frechet_distance(a, b):
    """Distance between the Gaussians fitted to two sets of features, (N, D) and (M, D).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    0 when mean and covariance agree. The formula is that of the Fréchet Inception Distance (Heusel
    et al., arXiv 1706.08500), on whatever features are given.

    Few images make it larger: two sets of one law are about c / N apart, not 0. So N and M belong
    to the number. With N < D a covariance is singular, and the bias follows no such simple rule.
    """
    C_a, C_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(C_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ C_b @ root_a)  # also those of C_a C_b
    root_trace = np.sqrt(eigenvalues.clip(0)).sum()
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(means + np.trace(C_a) + np.trace(C_b) - 2 * root_trace)


def frechet_jackknife(a, b, groups=10):
    """The Fréchet distance without its bias of c / N, and its standard error.

    Both sets are cut into `groups` parts, and each pair of parts is left out once:

        distance  G F - (G - 1) mean F_g,   where F_g lacks part g of both sets
        error^2   (G - 1) / G   sum (F_g - mean F_g)^2

    Where the bias is exactly c / N, the first line removes it: it is the straight line of Chong and
    Forsyth (arXiv 1911.07023) through two sizes, N and N (G - 1) / G, at 1 / N = 0. It may
    be below 0. A bootstrap would not do: it repeats images, which adds the bias again.

    a, b  (N, D), (M, D) in random order, N and M several times D. Where both sets are of one law,
          the error is too large rather than too small (Efron and Stein 1981)
    """
    parts_a, parts_b = (np.array_split(np.arange(len(x)), groups) for x in (a, b))
    pairs = zip(parts_a, parts_b)
    without = [frechet_distance(np.delete(a, i, 0), np.delete(b, j, 0)) for i, j in pairs]
    distance = groups * frechet_distance(a, b) - (groups - 1) * np.mean(without)
    return float(distance), float(jackknife_variance(np.array(without)) ** 0.5)


def jackknife_variance(without):
    """(G - 1) / G  sum (v_g - mean)^2 of the G values of a statistic that lacks one part each."""
    return (len(without) - 1) * np.var(without)


# ---------------------------------------- kernel distance


def kernel(x, y):
    """(x . y / D + 1)^3 of each pair: (N, D), (M, D) -> (N, M) float64."""
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


def kernel_distance(a, b):
    """Kernel Inception Distance (Binkowski et al., arXiv 1801.01401) and its standard error.

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean k(a_i, b_j)

    This is the squared MMD of Gretton et al. (2012), Eq. (3), without bias: two sets of one law
    have 0 on average, whatever N, and half of them less than 0. k is `kernel`. All images are used
    at once, where the paper averages over subsets.

    The variance is V_1 from single images and V_2 from pairs. Leaving out one image at a time gives
    V_1 + 2 V_2 on average (Efron and Stein 1981). V_2 is measured by itself and taken away. V_1 is
    0 where the laws are equal. It never counts as less, which makes the error a fifth to a third
    too large there.

    a, b  (N, D), (M, D), N and M at least 3, rows that are independent draws: sets with equally
          many of each class are less than 0 apart. N x M numbers must fit the memory
    """
    N, M = len(a), len(b)
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    pairs = variance_of_pairs(aa, bb, ab)
    np.fill_diagonal(aa, 0)
    np.fill_diagonal(bb, 0)
    sums = aa.sum(), bb.sum(), ab.sum()
    without_a = mmd(sums[0] - 2 * aa.sum(1), sums[1], sums[2] - ab.sum(1), N - 1, M)
    without_b = mmd(sums[0], sums[1] - 2 * bb.sum(1), sums[2] - ab.sum(0), N, M - 1)
    variance = jackknife_variance(without_a) + jackknife_variance(without_b) - pairs
    return float(mmd(*sums, N, M)), float(max(variance, pairs) ** 0.5)


def mmd(aa, bb, ab, N, M):
    """The squared MMD from the sums of the kernel: of i != j within the sets, and between them."""
    return aa / (N * (N - 1)) + bb / (M * (M - 1)) - 2 * ab / (N * M)


def variance_of_pairs(aa, bb, ab):
    """V_2: the part of kernel_distance's variance that no single image explains.

        2 E h_aa^2 / (N (N - 1)) + 2 E h_bb^2 / (M (M - 1)) + 4 E h_ab^2 / (N M)

    h is k without its row and column means. aa, bb, ab: the matrices of k, whole.
    """
    N, M = ab.shape
    h_aa, h_bb, h_ab = (centred(k) ** 2 for k in (aa, bb, ab))
    within_a = (h_aa.sum() - np.trace(h_aa)) / (N * (N - 1))
    within_b = (h_bb.sum() - np.trace(h_bb)) / (M * (M - 1))
    return 2 * within_a / (N * (N - 1)) + 2 * within_b / (M * (M - 1)) + 4 * h_ab.mean() / (N * M)


def centred(k):
    """A matrix without its row means and column means."""
    return k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()


# ---------------------------------------- nearest neighbours


def squared_distances(x, y):
    """(N, D), (M, D) -> (N, M) float64. Differences, not products: equal rows are exactly 0 apart.

    Parts need little memory.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    parts = np.array_split(x, 1 + len(x) * y.size // 2**22)
    return np.concatenate([((part[:, None] - y) ** 2).sum(2) for part in parts])


def precision_recall(real, drawn, k=3):
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, Eqs. 1 and 2).

    precision  the share of drawn images inside the real set: do they look real?
    recall     the share of real images inside the drawn set: are all kinds drawn?

    Inside a set is what is at most as far from one of its images as that image is from its k-th
    nearest neighbour in the set. Both grow with the size of the sets, and are below 1 for two
    halves of one set.

    real, drawn  (N, D), (M, D), both more than k
    """
    between = squared_distances(real, drawn)  # (N, M)
    precision = (between <= radii(real, k)[:, None]).any(0).mean()
    recall = (between <= radii(drawn, k)).any(1).mean()
    return float(precision), float(recall)


def radii(x, k):
    """(N,) squared distance of each row from its k-th nearest other one."""
    if not 1 <= k < len(x):
        raise ValueError(f"k must be at least 1 and less than the {len(x)} images, got {k}")
    within = squared_distances(x, x)
    np.fill_diagonal(within, np.inf)  # no neighbour of its own
    return np.partition(within, k - 1, axis=1)[:, k - 1]


def memorisation(drawn, train, held_out):
    """Are drawn images nearer to the training set than held-out ones? C_T, a z-score; < 0: yes.

    Meehan et al. (arXiv 2004.05675, one cell), the Mann-Whitney test of two sets of numbers:
    the distance of each drawn and of each held-out image from its nearest training image.

        C_T = (U - N M / 2) / sqrt(N M (N + M + 1) / 12)

    U counts the pairs in which the drawn image is farther away; a tie is half a pair. For images of
    the law of the held-out ones C_T is about N(0, 1). -3 and less: copies, or images that are near
    to all others, as blurred ones are. A control tells which: put other held-out images in the
    place of `train`. Copies then have about 0.

    drawn, train, held_out  (N, D), (T, D), (M, D)
    """
    near = [squared_distances(x, train).min(1) for x in (drawn, held_out)]
    N, M = len(drawn), len(held_out)
    is_drawn = np.arange(N + M) < N
    chance = auroc(np.concatenate(near), is_drawn)  # U / (N M)
    return float((chance - 1 / 2) * (N * M) ** 0.5 / ((N + M + 1) / 12) ** 0.5)
