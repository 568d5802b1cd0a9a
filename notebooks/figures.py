r"""The plots of train.py, sample.py and the notebooks; the only file that knows matplotlib.

Images and masks are uint8: images (N, 1, H, W) 0..255, masks 0 or 255. Masks are drawn as contours, the true one
solid and the sampled one dashed, so that a picture survives grey printing.
"""

import io
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

TRUE, SAMPLED = "#009e73", "#d55e00"  # colours that differ in grey and to colour-blind eyes
LINES = [  # colour, dash, marker
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", ":", "^"),
    ("#009e73", "-.", "v"),
    ("#cc79a7", (0, (5, 1)), "D"),
]


class Picture(Figure):
    """A figure without the global state of pyplot, which a notebook shows when it is the last value of a cell."""

    def _repr_png_(self):
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, dpi=90)
        pixels = np.asarray(Image.open(drawn).convert("RGB")).astype(int)  # and then small, because noise hardly compresses:
        gray = pixels.mean(2, keepdims=True).astype(int)
        gray, colours = gray // 4 * 4 + gray // 64, pixels // 16 * 16 + 8  # 64 grays, 0 stays black and 255 white, and few colours
        if (np.ptp(pixels, 2) <= 16).all():
            picture = Image.fromarray(gray[..., 0].astype(np.uint8))
        else:
            pixels = np.where(np.ptp(pixels, 2, keepdims=True) <= 16, gray, colours)
            picture = Image.fromarray(pixels.astype(np.uint8)).quantize(256, Image.Quantize.MAXCOVERAGE)
        picture.save(small, "png", optimize=True)
        return small.getvalue()


def figure(rows, columns, width, height):
    """A figure and its axes."""
    fig = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def plot(*panels, title, caption="", height=3.2):
    """Curves in panels side by side, told apart by dash and marker, not by colour alone.

    Each panel is a dict: lines {label: (x, y)}, and any of matplotlib's axis properties (xlabel, ylabel, title, xscale,
    yscale, xlim, ylim); style "line" (default), "points" or "both"; errors {label: half width}; marks {label: y}, level lines.
    """
    fig, (axes,) = figure(1, len(panels), 4.8 * len(panels), height)
    for ax, panel in zip(axes, panels):
        panel = dict(panel)
        lines, style = panel.pop("lines"), panel.pop("style", "line")
        errors, marks = panel.pop("errors", {}), panel.pop("marks", {})
        for (label, (x, y)), (colour, dash, marker) in zip(lines.items(), LINES):
            look = dict(color=colour, linestyle="" if style == "points" else dash, marker="" if style == "line" else marker)
            ax.errorbar(x, y, errors.get(label), label=label, markersize=4, linewidth=1.4, capsize=3, **look)
        for (label, y), (colour, dash, _) in zip(marks.items(), reversed(LINES)):
            ax.axhline(y, label=label, color=colour, linestyle=dash, linewidth=1)
        ax.set(**panel)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
        if len(lines) + len(marks) > 1:
            ax.legend(fontsize=8)
    annotate(fig, title, caption)
    return fig


def annotate(fig, title, caption):
    """The title above, and the caption below in smaller type, in lines as wide as the figure."""
    width = fig.get_figwidth()
    fig.suptitle(textwrap.fill(title, round(13 * width)), fontsize=10)
    if caption:
        fig.supxlabel(textwrap.fill(caption, round(16 * width)), fontsize=8)


def image_rows(rows, title, caption="", columns=(), size=1.25, outlines=None, maps=(), above=None):
    """Pictures in labelled rows: rows {label: sequence of (H, W) or (1, H, W) arrays, None: a blank place}.

    columns   a label over each column
    outlines  {label: [(masks, colour, style), ...]}: contours on the pictures of that row, masks like the row
    maps      labels of the rows that hold numbers and not gray values: each is drawn in its own range, with a colour bar
    above     {label: a line over each picture of the row}
    """
    width = max(len(row) for row in rows.values())
    fig, axes = figure(len(rows), width, size * width + 1.2, size * len(rows) * (1.12 if above else 1) + 0.75)
    if maps:
        fig.get_layout_engine().set(w_pad=0.12)  # inches: room for the numbers of the colour bars
    for line, (label, row) in zip(axes, rows.items()):
        flat = [None if a is None else np.asarray(a).reshape(np.shape(a)[-2:]) for a in row]
        if label in maps:
            low, high = min(a.min() for a in flat if a is not None), max(a.max() for a in flat if a is not None)
        for i, (ax, a) in enumerate(zip(line, flat)):
            if a is None:
                ax.axis("off")
                continue
            show(ax, a)
            if label in maps:
                drawn = ax.images[0]
                drawn.set(cmap="magma", clim=(low, high))
            for masks, colour, style in (outlines or {}).get(label, ()):
                contour(ax, np.asarray(masks[i]).reshape(a.shape), colour, style)
            if above and label in above:
                ax.set_title(above[label][i], fontsize=8)
        for ax in line[len(flat) :]:
            ax.axis("off")
        if label in maps:
            fig.colorbar(drawn, ax=list(line), shrink=0.9, pad=0.01).ax.tick_params(labelsize=7)
        line[0].set_ylabel(label, fontsize=8)
    for ax, label in zip(axes[0], columns):
        ax.set_title(label, fontsize=8)
    annotate(fig, title, caption)
    return fig


def planes(rows, title, caption="", size=2.3):
    """Pictures of functions of two numbers: rows {label: [panel, ...]}. Each panel is a dict, all of it optional but extent:

    extent   (left, right, bottom, top)
    density  (n, m) array, its first row at the bottom: dark where it is large
    arrows   (positions (k, 2), vectors (k, 2)) on a square grid: the longest fills a step of it, a quarter of it is drawn half as long
    paths    (k, steps, 2): a line each; points (k, 2): a dot each
    title    a line above; xlabel, ylabel
    """
    width = max(len(row) for row in rows.values())
    fig, axes = figure(len(rows), width, size * width + 0.4, size * len(rows) + 0.9)
    for line, (label, row) in zip(axes, rows.items()):
        for ax, panel in zip(line, row):
            left, right, bottom, top = panel["extent"]
            if "density" in panel:
                ax.imshow(panel["density"], cmap="Greys", origin="lower", extent=panel["extent"], aspect="auto", interpolation="nearest")
            if "arrows" in panel:
                positions, vectors = (np.asarray(a) for a in panel["arrows"])
                length = np.hypot(*vectors.T)[:, None] + 1e-12
                drawn = vectors / length * (length / length.max()) ** 0.5 * (right - left) / len(positions) ** 0.5
                ax.quiver(*positions.T, *drawn.T, color=TRUE, angles="xy", scale_units="xy", scale=1, width=0.008)
            for path in panel.get("paths", ()):
                ax.plot(*np.asarray(path).T, color=SAMPLED, linewidth=0.8)
            if "points" in panel:
                ax.plot(*np.asarray(panel["points"]).T, ".", color=SAMPLED, markersize=2)
            ax.set(xlim=(left, right), ylim=(bottom, top), xlabel=panel.get("xlabel", ""), ylabel=panel.get("ylabel", ""))
            ax.set_title(panel.get("title", ""), fontsize=8)
            ax.tick_params(labelsize=6)
        line[0].set_ylabel(label or row[0].get("ylabel", ""), fontsize=8)
    annotate(fig, title, caption)
    return fig


def show(ax, image, title=""):
    ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_title(title, fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])


def contour(ax, mask, colour, style="solid"):
    """The outline of a mask, if it has one."""
    if mask.min() < 127.5 < mask.max():
        ax.contour(mask, levels=[127.5], colors=colour, linestyles=style, linewidths=1.2)


def save_mask_grid(path, *args, **kwargs):
    """mask_grid into a file."""
    mask_grid(*args, **kwargs).savefig(path, dpi=110)


def mask_grid(images, true, sampled, dice, title, columns=8):
    """X-ray, true mask, sampled mask and their difference for `columns` images, from the worst to the best DICE.

    images, true, sampled  (N, 1, H, W) uint8;  dice (N,), nan where both masks are empty
    """
    order = np.argsort(np.where(np.isnan(dice), 1.0, dice))
    chosen = order[np.linspace(0, len(order) - 1, min(columns, len(order))).round().astype(int)]
    fig, axes = figure(4, len(chosen), 1.35 * len(chosen) + 0.4, 6.2)
    for column, i in zip(axes.T, chosen):
        x, a, b = images[i, 0], true[i, 0], sampled[i, 0]
        t, p = a > 127, b > 127
        show(column[0], x, f"DICE {dice[i]:.3f}")
        contour(column[0], a, TRUE)
        contour(column[0], b, SAMPLED, "dashed")
        show(column[1], a)
        show(column[2], b)
        difference = np.full((*t.shape, 3), 255, np.uint8)
        for where, colour in ((t & p, "#c8c8c8"), (t & ~p, TRUE), (p & ~t, SAMPLED)):
            difference[where] = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        column[3].imshow(difference, interpolation="nearest")
        column[3].set_xticks([])
        column[3].set_yticks([])
    for ax, label in zip(axes[:, 0], ("X-ray", "true mask", "sampled mask", "difference")):
        ax.set_ylabel(label, fontsize=9)
    fig.suptitle(
        f"{title}: from the worst to the best image of validation\n"
        "contours: true solid green, sampled dashed orange; difference: green missed, orange too much",
        fontsize=9,
    )
    return fig


def save_image_grid(path, images, title, columns=8):
    """Images in a grid, (N, 1, H, W) uint8."""
    rows = -(-len(images) // columns)
    fig, axes = figure(rows, columns, 1.1 * columns, 1.1 * rows + 0.4)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images):
        ax.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=110)


def save_curves(path, *args):
    """curves into a file."""
    curves(*args).savefig(path, dpi=110)


def curves(lines, title):
    """Training loss and the metrics of the evaluations under one protocol, that of most of them; `lines` as in log.jsonl."""
    losses = [(line["step"], line["loss"]) for line in lines if "lr" in line]
    evaluations = [line for line in lines if "Val" in line]
    protocols = [line.get("protocol") for line in evaluations]
    most = max(protocols, key=lambda protocol: (protocols.count(protocol), protocol == protocols[-1]), default=None)
    evaluations = [line for line in evaluations if line.get("protocol") == most]
    passes = f", {most['ddim_steps']} passes" if most else ""
    fig, ((left, right),) = figure(1, 2, 9, 3.4)
    left.semilogy(*np.array(losses).T, color="0.25", linewidth=1)
    left.set(xlabel="gradient step", ylabel="training loss", title="loss")
    steps = [line["step"] for line in evaluations]
    if evaluations and "pooled" in evaluations[0]["Val"]:
        for name, style in (("DICE index", "o-"), ("Sensitivity", "^:"), ("Precision", "v:")):
            right.plot(steps, [e["Val"]["pooled"][name] for e in evaluations], style, label=f"validation {name}")
        right.plot(steps, [e["Train"]["pooled"]["DICE index"] for e in evaluations], "s--", color="0.5", label="train DICE index")
        right.set(title=f"metrics, pooled over all pixels{passes}", ylabel="score")
    else:
        names = ("Fréchet distance", "Fréchet distance of two held-out halves")
        for name, style in zip(names, ("o-", "--")):
            right.plot(steps, [e["Val"][name] for e in evaluations], style, label=name)
        right.set(title=f"samples against held-out images{passes}", ylabel="Fréchet distance", ylim=(0, None))
    right.set_xlabel("gradient step")
    right.set_xlim(left.get_xlim())
    right.legend(fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.suptitle(title, fontsize=10)
    return fig


def save_overlay(path, image, mask, title, true=None, what="sampled mask"):
    """The outline of a mask on an X-ray of any size, dashed, and of the true mask, if there is one, solid.

    image  (H, W) uint8;  mask, true  (H, W) bool
    """
    H, W = image.shape
    height = 7 * min(max(H / W, 0.3), 3)  # inches; a strip of pixels still gets a picture
    fig, ((ax,),) = figure(1, 1, 7, height + 0.6)
    show(ax, image)
    drawn = [(f"{what}, dashed orange", mask, SAMPLED, "dashed")]
    if true is not None:
        drawn.insert(0, ("true mask, solid green", true, TRUE, "solid"))
    for _, outline, colour, style in drawn:
        if min(H, W) > 1:  # contours need a plane
            contour(ax, np.uint8(255) * outline, colour, style)
    labels = [label + ("" if outline.any() else " (empty)") for label, outline, *_ in drawn]
    ax.set_title("; ".join(labels), fontsize=9)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=150)
