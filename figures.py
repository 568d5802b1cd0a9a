r"""The pictures of runs and notebooks. Only this file knows matplotlib.

Images and masks are uint8: images (N, 1, H, W) 0..255, masks 0 or 255. A mask is drawn as a
contour: the true one solid, the sampled one dashed, so that a picture survives gray printing.
"""

import io
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

TRUE, SAMPLED = "#009e73", "#d55e00"  # green and orange that colour-blind eyes tell apart
MISSED = "#004d38"  # beside SAMPLED in one picture: darker, for gray printing
LINES = [  # colour, dash, marker
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", ":", "^"),
    ("#009e73", "-.", "v"),
    ("#cc79a7", (0, (7, 2, 1, 2, 1, 2)), "D"),
    ("#7f7f7f", (0, (9, 4)), "P"),
    ("#56b4e9", (0, (3, 1, 3, 4)), "X"),
]
GRAY = dict(cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # 0 is black, 255 white


class Picture(Figure):
    """A figure without pyplot's global state. A notebook shows it as the last value of a cell."""

    def _repr_png_(self):
        png = io.BytesIO()
        self.savefig(png, dpi=150)
        image = Image.open(png).convert("RGB")
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            image = red  # a third of the bytes
        png = io.BytesIO()
        image.save(png, "png", optimize=True)
        return png.getvalue()


def figure(rows, columns, width, height):
    """A figure of width x height inches, and its axes, (rows, columns)."""
    fig = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def annotate(fig, title, caption):
    """The title above and the caption below in smaller type, in lines as wide as the figure.

    A name such as lung-concat.pt stays in one line.
    """

    def wrapped(text, width):
        return textwrap.fill(text, round(width), break_on_hyphens=False)

    width = fig.get_figwidth()
    fig.suptitle(wrapped(title, 13 * width), fontsize=10, parse_math=False)
    if caption:
        fig.supxlabel(wrapped(caption, 14 * width), fontsize=9)


def show(ax, image, title=""):
    """An image in true gray, (H, W), or in its own colours, (H, W, 3). No ticks."""
    ax.imshow(image, **GRAY)
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


def blank(ax):
    """No picture; a label beside it or above it stays."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def contour(ax, mask, colour, style="solid"):
    """The outline of a mask, if it has one."""
    if mask.min() < 127.5 < mask.max():
        ax.contour(mask, levels=[127.5], colors=colour, linestyles=style, linewidths=1.2)


# ---------------------------------------- curves


def plot(*panels, title, caption="", height=3.2, width=4.8):
    """Curves in panels side by side, `width` inches each. A panel: the arguments of draw_curves."""
    fig, (axes,) = figure(1, len(panels), width * len(panels), height)
    for ax, panel in zip(axes, panels):
        draw_curves(ax, **panel)
    annotate(fig, title, caption)
    return fig


class Plain(LogFormatter):
    """Numbers of a logarithmic axis as 20 and 0.5, of which fewer collide than of 2 x 10^1."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw_curves(
    ax, lines, style="line", errors=None, marks=None, guides=None, legend="best", **axis
):
    """Curves that differ in dash and marker, not only in colour.

    lines   {label: (x, y)}
    style   "line", "points" or "both"
    errors  {label: half width of the error bars}
    marks   {label: y}: level lines
    guides  {label: (x, y)}: thin gray lines without a marker, which are no data
    legend  where it stands, as matplotlib says it: "upper right"
    axis    any of matplotlib's axis properties: xlabel, ylabel, title, xscale, yscale, xlim, ylim
    """
    errors, marks, guides = errors or {}, marks or {}, guides or {}
    if len(lines) + len(marks) > len(LINES):
        raise ValueError(f"at most {len(LINES)} lines can be told apart")
    for (label, (x, y)), (colour, dash, marker) in zip(lines.items(), LINES):
        dash = "" if style == "points" else dash
        marker = "" if style == "line" else marker
        look = dict(color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.4)
        ax.errorbar(x, y, errors.get(label), label=label, capsize=3, **look)
    for (label, y), (colour, dash, _) in zip(marks.items(), reversed(LINES)):
        ax.axhline(y, label=label, color=colour, linestyle=dash, linewidth=1)
    for label, (x, y) in guides.items():
        ax.plot(x, y, label=label, color="0.6", linewidth=1, zorder=1)
    ax.set(**axis)
    for name, one in (("x", ax.xaxis), ("y", ax.yaxis)):
        if one.get_scale() == "log" and f"{name}ticklabels" not in axis:
            one.set_major_formatter(Plain())
            one.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.4)))
    ax.title.set_fontsize(9)
    ax.grid(alpha=0.3)
    if len(lines) + len(marks) + len(guides) > 1:
        ax.legend(fontsize=9, loc=legend)


def intervals(estimate, low, high, true, reliability, title):
    """Two pictures of how far an ensemble's masks can be trusted.

    Left: each image's share with its 90 % interval, and the truth, sorted by the truth. Right: how
    often a pixel of probability p is positive. The diagonal is the ideal.

    estimate, low, high, true  (B,) each, see metrics.shares and metrics.central_interval
    reliability                (mean p, share of positive pixels), see metrics.calibration
    """
    order, rank = np.argsort(true), np.arange(len(true))
    bars = np.maximum([estimate - low, high - estimate], 0)[:, order]
    inside = np.mean((low <= true) & (true <= high))
    shares = dict(
        lines={"mean and interval": (rank, estimate[order]), "truth": (rank, true[order])},
        errors={"mean and interval": bars},
        style="points",
        xlabel="image, in the order of its true share",
        ylabel="share of positive pixels",
        title=f"{inside:.0%} of the truths are in their intervals; 90 % are wanted",
    )
    pixels = dict(
        lines={"found": reliability},
        guides={"ideal": ([0, 1], [0, 1])},
        style="both",
        xlabel="probability of a pixel",
        ylabel="share of positive pixels",
        title="calibration of the pixels",
    )
    return plot(shares, pixels, title=title, height=3.6)


def save_curves(path, *args):
    """curves into a file."""
    curves(*args).savefig(path, dpi=110)


def curves(lines, title):
    """Training loss and the metrics of the evaluations, from the dicts of log.jsonl."""
    losses = [(line["step"], line["loss"]) for line in lines if "lr" in line]
    evaluations, protocol = of_one_protocol([line for line in lines if "Val" in line])
    passes = f", {protocol['ddim_steps']} passes" if protocol else ""
    fig, ((left, right),) = figure(1, 2, 9, 3.4)
    left.semilogy(*np.array(losses).T, color="0.25", linewidth=1)
    left.set(xlabel="gradient step", ylabel="training loss", title="loss")
    steps = [line["step"] for line in evaluations]
    if evaluations and "pooled" in evaluations[0]["Val"]:
        draw_scores(right, steps, evaluations)
        right.set(title=f"metrics, pooled over all pixels{passes}", ylabel="score")
    else:
        names = ("Fréchet distance", "Fréchet distance of two held-out halves")
        for name, style in zip(names, ("o-", "--")):
            distances = [line["Val"][name] for line in evaluations]
            right.plot(steps, distances, style, label=name)
        right.set(title=f"samples against held-out images{passes}", ylabel="Fréchet distance")
        right.set_ylim(0, None)
    right.set(xlabel="gradient step", xlim=left.get_xlim())
    right.legend(fontsize=9)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.suptitle(title, fontsize=10, parse_math=False)
    return fig


def of_one_protocol(evaluations):
    """The evaluations under the protocol that most of them have, and that protocol (or None).

    Of two protocols with as many evaluations, the one of the last evaluation counts.
    """
    protocols = [line.get("protocol") for line in evaluations]
    most = max(protocols, key=lambda p: (protocols.count(p), p == protocols[-1]), default=None)
    return [line for line in evaluations if line.get("protocol") == most], most


def draw_scores(ax, steps, evaluations):
    """DICE, sensitivity and precision of validation, and DICE of training, over the steps."""
    for name, style in (("DICE index", "o-"), ("Sensitivity", "^:"), ("Precision", "v:")):
        scores = [line["Val"]["pooled"][name] for line in evaluations]
        ax.plot(steps, scores, style, label=f"validation {name}")
    scores = [line["Train"]["pooled"]["DICE index"] for line in evaluations]
    ax.plot(steps, scores, "s--", color="0.5", label="train DICE index")


# ---------------------------------------- images and masks


def image_rows(
    rows, title, caption="", columns=(), size=1.25, outlines=None, maps=(), above=None, under=None
):
    """Pictures in labelled rows.

    rows      {label: sequence of (H, W) or (1, H, W) arrays; None leaves its place blank}
    columns   a label over each column
    size      inches of a picture
    outlines  {label: [(masks, colour, style), ...]}: contours, a mask for each picture of the row
    maps      labels of rows of numbers, not gray values: each in its own range, with a colour bar
    above     {label: a line over each picture of the row}
    under     {label: X-rays}: a row of maps is drawn on them, and is clear where it is 0
    """
    outlines, above, under = outlines or {}, above or {}, under or {}
    width = max(len(row) for row in rows.values())
    height = size * len(rows) * (1.12 if above else 1) + 0.75
    fig, axes = figure(len(rows), width, size * width + 1.2, height)
    if maps:
        fig.get_layout_engine().set(w_pad=0.12)  # inches: room for the numbers of the colour bars
    for row_axes, (label, row) in zip(axes, rows.items()):
        for i, (ax, image) in enumerate(zip(row_axes, row)):
            if image is None:
                blank(ax)
                continue
            shape = np.shape(image)[-2:]
            show(ax, np.asarray(image).reshape(shape))
            for masks, colour, style in outlines.get(label, ()):
                contour(ax, np.asarray(masks[i]).reshape(shape), colour, style)
            if label in above:
                ax.set_title(above[label][i], fontsize=9)
        for ax in row_axes[len(row) :]:
            ax.axis("off")
        if label in maps:
            draw_range(fig, row_axes)
        for ax, image in zip(row_axes, under.get(label, ())):
            lay_over(ax, np.asarray(image))
        row_axes[0].set_ylabel(label, fontsize=9)
    for ax, label in zip(axes[0], columns):
        ax.set_title(label, fontsize=9)
    annotate(fig, title, caption)
    return fig


def draw_range(fig, row_axes):
    """One range of colours for the maps of a row, with a colour bar.

    From the smallest to the largest number; with both signs, as far below 0 as above it, and white
    at 0.
    """
    images = [ax.images[0] for ax in row_axes if ax.images]
    place = row_axes[-1].inset_axes([1.06, 0, 0.07, 1])  # beside the row, which keeps its columns
    low = min(image.get_array().min() for image in images)
    high = max(image.get_array().max() for image in images)
    if low < 0 < high:
        colours, low, high = "PuOr_r", min(low, -high), max(high, -low)
    else:
        colours = "magma"
    for image in images:
        image.set(cmap=colours, clim=(low, high))
    fig.colorbar(images[-1], cax=place).ax.tick_params(labelsize=9)


def lay_over(ax, image):
    """Put an X-ray under the map of these axes: the map is clear at 0, opaque at its limits."""
    (drawn,) = ax.images
    drawn.set(zorder=1, alpha=np.abs(drawn.get_array()) / max(np.abs(drawn.get_clim())))
    ax.imshow(image.reshape(drawn.get_array().shape), zorder=0, **GRAY)


def save_image_grid(path, images, title, columns=8, software="matplotlib"):
    """Images in a grid, (N, 1, H, W) uint8. software: what the PNG says of who wrote it."""
    rows = -(-len(images) // columns)
    fig, axes = figure(rows, columns, 1.1 * columns, 1.1 * rows + 0.4)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images):
        ax.imshow(image[0], **GRAY)
    fig.suptitle(title, fontsize=9, parse_math=False)
    fig.savefig(path, dpi=110, metadata={"Software": software})


def save_mask_grid(path, *args, **kwargs):
    """mask_grid into a file."""
    mask_grid(*args, **kwargs).savefig(path, dpi=110)


def mask_grid(images, true, sampled, dice, title, columns=8, chosen=None):
    """X-ray, true mask, sampled mask and their difference for `columns` images, the worst first.

    images, true, sampled  (N, 1, H, W) uint8
    dice                   (N,), nan where both masks are empty. The images are evenly spread over
                           its order, nan as if it were 1
    chosen                 the images to draw instead, by `spread_over` the DICE of another figure
    """
    shown = spread_over(dice, columns) if chosen is None else chosen
    fig, axes = figure(4, len(shown), 1.35 * len(shown) + 0.4, 6.2)
    for column, i in zip(axes.T, shown):
        show(column[0], images[i, 0], f"DICE {dice[i]:.3f}")
        contour(column[0], true[i, 0], TRUE)
        contour(column[0], sampled[i, 0], SAMPLED, "dashed")
        show(column[1], true[i, 0])
        show(column[2], sampled[i, 0])
        show(column[3], difference(true[i, 0] > 127, sampled[i, 0] > 127))
    for ax, label in zip(axes[:, 0], ("X-ray", "true mask", "sampled mask", "difference")):
        ax.set_ylabel(label, fontsize=9)
    order = "from the worst to the best image" if chosen is None else "the same images"
    first_line = f"{title}: {order}\n"
    contours = "contours: true solid green, sampled dashed orange\n"
    colours = "difference: dark green missed, orange too much, gray in both"
    fig.suptitle(first_line + contours + colours, fontsize=9, parse_math=False)
    return fig


def spread_over(dice, n):
    """n images from the worst to the best of these DICE, evenly by rank; nan counts as 1."""
    order = np.argsort(np.where(np.isnan(dice), 1.0, dice))
    return order[np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int)]


def difference(true, sampled):
    """(H, W) bool masks -> (H, W, 3) uint8: dark green missed, orange too much, gray in both."""
    picture = np.full((*true.shape, 3), 255, np.uint8)
    picture[true & sampled] = rgb("#c8c8c8")
    picture[true & ~sampled] = rgb(MISSED)
    picture[sampled & ~true] = rgb(SAMPLED)
    return picture


def rgb(colour):
    """Red, green and blue, 0..255, of a colour such as "#009e73"."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def save_overlay(path, image, mask, title, true=None, what="sampled mask", software="matplotlib"):
    """The outlines of a mask, dashed, and of the true mask, solid, on an X-ray of any size.

    image  (H, W) uint8;  mask, true  (H, W) bool;  what  the mask's name in the legend
    software  what the PNG says of who wrote it. A side is drawn at 1024 pixels or fewer
    """
    image = reduced(image)
    H, W = image.shape
    height = 7 * min(max(H / W, 0.3), 3)  # inches; a strip of pixels still gets a picture
    fig, ((ax,),) = figure(1, 1, 7, height + 0.6)
    show(ax, image)
    outlines = [(f"{what}, dashed orange", mask, SAMPLED, "dashed")]
    if true is not None:
        outlines.insert(0, ("true mask, solid green", true, TRUE, "solid"))
    labels = []
    for label, inside, colour, style in outlines:
        if min(H, W) > 1:  # contours need a plane
            contour(ax, reduced(np.uint8(255) * inside), colour, style)
        labels.append(label if inside.any() else f"{label} (empty)")
    ax.set_title("; ".join(labels), fontsize=9)
    fig.suptitle(title, fontsize=9, parse_math=False)
    fig.savefig(path, dpi=150, metadata={"Software": software})


def reduced(image):
    """(H, W) uint8 of any size at 1024 pixels a side or fewer, by means of pixels."""
    small = Image.fromarray(image)
    small.thumbnail((1024, 1024), Image.Resampling.BOX)
    return np.asarray(small)


# ---------------------------------------- functions of two numbers


def planes(rows, title, caption="", size=2.3):
    """Pictures of functions of two numbers in rows {label: [panel, ...]}, `size` inches each.

    Each panel is a dict of the arguments of draw_plane.
    """
    width = max(len(row) for row in rows.values())
    fig, axes = figure(len(rows), width, size * width + 0.4, size * len(rows) + 0.9)
    for row_axes, (label, row) in zip(axes, rows.items()):
        for ax, panel in zip(row_axes, row):
            draw_plane(ax, **panel)
        row_axes[0].set_ylabel(label or row[0].get("ylabel", ""), fontsize=9)
    annotate(fig, title, caption)
    return fig


def draw_plane(ax, extent, density=None, arrows=None, paths=(), points=None, **axis):
    """A density, arrows, paths and points in one plane. Only extent is required.

    extent   (left, right, bottom, top)
    density  (n, m) array, its first row at the bottom: dark where it is large
    arrows   (positions (k, 2), vectors (k, 2)) on a square grid
    paths    (k, steps, 2): a line each;  points  (k, 2): a dot each
    axis     title, xlabel, ylabel
    """
    left, right, bottom, top = extent
    if density is not None:
        shades = dict(cmap="Greys", origin="lower", aspect="auto", interpolation="nearest")
        ax.imshow(density, extent=extent, **shades)
    if arrows is not None:
        draw_arrows(ax, *arrows, right - left)
    for path in paths:
        ax.plot(*np.asarray(path).T, color=SAMPLED, linewidth=0.8)
    if points is not None:
        ax.plot(*np.asarray(points).T, ".", color=SAMPLED, markersize=2)
    ax.set(xlim=(left, right), ylim=(bottom, top), **axis)
    ax.title.set_fontsize(9)
    ax.tick_params(labelsize=9)


def draw_arrows(ax, positions, vectors, width):
    """Arrows on a square grid, `width` wide. The longest is a step of the grid long, and a quarter
    of it half a step.
    """
    positions, vectors = np.asarray(positions), np.asarray(vectors)
    length = np.hypot(*vectors.T)[:, None] + 1e-12
    relative = (length / length.max()) ** 0.5
    drawn = vectors / length * relative * width / len(positions) ** 0.5
    scale = dict(angles="xy", scale_units="xy", scale=1, width=0.008)
    ax.quiver(*positions.T, *drawn.T, color=TRUE, **scale)
