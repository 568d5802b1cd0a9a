"""figures.py: each number and each mask stands at its place, in its colour, dash and range."""

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import figures


def gray(value, size=8):
    return np.full((1, size, size), value, np.uint8)


def hex_of(rgb):
    """(158, 0, 115) -> "#9e0073"."""
    return "#" + "".join(f"{round(c):02x}" for c in rgb)


def pixels_of(png):
    """The (H, W, 3) pixels of a file, as int."""
    return np.asarray(Image.open(png).convert("RGB")).astype(int)


def titles(axes):
    return [ax.get_title() for ax in axes]


def test_intervals_are_drawn_in_the_order_of_the_truth_and_counted():
    """Three images out of order: bars from low to high at their place, 2 of 3 truths inside."""
    true, estimate = np.array([0.5, 0.1, 0.3]), np.array([0.55, 0.4, 0.3])
    low, high = estimate - 0.06, estimate + [0.1, 0.1, 0.2]
    fig = figures.intervals(estimate, low, high, true, ([0.1, 0.9], [0.2, 0.7]), "t")
    left, right = fig.axes
    assert left.get_title().startswith("67% of the truths")
    means, truths = (line for line in left.lines if line.get_marker() in "os")
    assert means.get_ydata().tolist() == [0.4, 0.3, 0.55]
    assert truths.get_ydata().tolist() == [0.1, 0.3, 0.5]
    bars = left.collections[0].get_segments()
    want = [[0.34, 0.5], [0.24, 0.5], [0.49, 0.65]]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], want)
    found = [line for line in right.lines if line.get_marker() == "o"][0]
    assert found.get_xydata().tolist() == [[0.1, 0.2], [0.9, 0.7]]


# ---------------------------------------- images in rows


@pytest.mark.filterwarnings("error")
def test_a_mask_of_one_value_has_no_outline():
    """Neither a blank mask nor a full one is drawn, and matplotlib has nothing to warn of."""
    _, ((ax,),) = figures.figure(1, 1, 2, 2)
    for value in (0, 255):
        figures.contour(ax, gray(value)[0], figures.TRUE)
    assert not ax.collections


def test_image_rows_puts_each_array_in_its_place():
    """Rows, columns, labels, blanks. A row of numbers has one range and a colour bar.

    Gray values are 0..255. The colour bar does not move its row against the others.
    """
    numbers = [np.eye(4), 3 * np.eye(4)]
    rows = {"a": [gray(10), None, gray(30)], "b": numbers}
    above = {"b": ["p", "q"]}
    columns = ["x", "y", "z"]
    fig = figures.image_rows(rows, "title", "caption", columns, maps=["b"], above=above)
    grid = np.array(fig.axes[:6]).reshape(2, 3)
    assert np.all(grid[0, 0].images[0].get_array() == 10)
    assert np.all(grid[0, 2].images[0].get_array() == 30)
    assert grid[0, 0].images[0].get_clim() == (0, 255)
    assert not grid[0, 1].images and not grid[1, 2].axison
    assert np.array_equal(grid[1, 1].images[-1].get_array(), numbers[1])
    assert [ax.images[-1].get_clim() for ax in grid[1, :2]] == [(0, 3), (0, 3)]
    assert [len(ax.child_axes) for ax in grid.flat] == [0, 0, 0, 0, 0, 1]
    fig.draw_without_rendering()
    left, right = (ax.get_position().x0 for ax in (grid[0, 0], grid[1, 0]))
    assert left == pytest.approx(right)
    assert titles(grid[0]) == columns and titles(grid[1]) == ["p", "q", ""]
    assert [ax.get_ylabel() for ax in grid[:, 0]] == ["a", "b"]
    assert (fig.get_suptitle(), fig.get_supxlabel()) == ("title", "caption")


def test_a_title_is_wrapped_between_words_and_not_within_a_name():
    """weights/lung-concat.pt stays in one line, where a line is 26 characters wide."""
    fig, _ = figures.figure(1, 1, 2, 2)
    figures.annotate(fig, "lungs weights/lung-concat.pt", "")
    assert fig.get_suptitle() == "lungs\nweights/lung-concat.pt"


def test_image_rows_outlines_the_masks_of_its_own_row():
    """The contour of column i encloses mask i, in the colour given."""
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[:, 2:4, 5:7] = 255
    rows = {"a": [gray(0)], "b": [gray(0)]}
    fig = figures.image_rows(rows, "", outlines={"b": [([mask], figures.TRUE, "solid")]})
    assert not fig.axes[0].collections
    (contour,) = fig.axes[1].collections
    vertices = contour.get_paths()[0].vertices
    assert np.allclose(vertices.min(0), [4.5, 1.5]) and np.allclose(vertices.max(0), [6.5, 3.5])
    assert hex_of(255 * contour.get_edgecolor()[0][:3]) == figures.TRUE


# ---------------------------------------- curves and planes


def test_planes_have_their_first_row_below_and_arrows_that_fill_a_step():
    """Density by extent; arrows in their direction; paths, points and labels.

    The longest arrow is one step of the grid, an arrow of a quarter of its length half a step.
    """
    positions = np.stack(np.meshgrid([0.5, 1.5], [0.5, 1.5]), 2).reshape(4, 2)
    extent, path = (0, 2, 0, 2), [[0, 0], [1, 2], [2, 2]]
    arrows = (positions, [[4, 0], [0, 1], [0, 0], [0, -4]])
    field = dict(extent=extent, density=np.array([[1, 2], [3, 4]]), arrows=arrows)
    dots = dict(extent=extent, paths=[path], points=[[1, 1]], title="paths", xlabel="t")
    fig = figures.planes({"row": [field, dots]}, "title", "below")
    left, right = fig.axes
    (density,) = left.images
    assert density.origin == "lower" and density.get_extent() == [0, 2, 0, 2]
    assert density.get_array()[0, 1] == 2
    (quiver,) = (c for c in left.collections if hasattr(c, "U"))
    assert np.allclose(quiver.U, [1, 0, 0, 0]) and np.allclose(quiver.V, [0, 0.5, 0, -1])
    assert (quiver.scale, quiver.scale_units, quiver.angles) == (1, "xy", "xy")
    assert right.lines[0].get_xydata().tolist() == path
    assert right.lines[1].get_xydata().tolist() == [[1, 1]]
    assert (left.get_ylabel(), right.get_title(), right.get_xlabel()) == ("row", "paths", "t")
    assert fig.get_supxlabel() == "below"


def test_lines_differ_in_more_than_colour():
    """Each curve holds its own numbers; all dashes and markers are different, for gray printing."""
    x = np.arange(5)
    lines = {str(k): (x, k * x) for k in range(7)}
    fig = figures.plot(dict(lines=lines, style="both", xlabel="t"), title="")
    (ax,) = fig.axes
    drawn = [container[0] for container in ax.containers]
    assert all(np.array_equal(line.get_ydata(), k * x) for k, line in enumerate(drawn))
    patterns = [line._dash_pattern[1] and tuple(line._dash_pattern[1]) for line in drawn]
    dashes = {(line.get_linestyle(), pattern) for line, pattern in zip(drawn, patterns)}
    assert len(dashes) == len({line.get_marker() for line in drawn}) == len(drawn) == 7
    assert ax.get_xlabel() == "t"


def test_level_lines_and_curves_share_the_dashes():
    """All are named in the legend; more of them than can be told apart are refused."""
    lines = {str(k): ([0, 1], [0, k]) for k in range(6)}
    fig = figures.plot(dict(lines=lines, marks={"level": 2}), title="")
    legend = fig.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["level", *lines]
    assert (
        len({line._dash_pattern[1] and tuple(line._dash_pattern[1]) for line in legend.get_lines()})
        == 7
    )
    with pytest.raises(ValueError, match="at most 7 lines"):
        figures.plot(dict(lines=lines, marks={"level": 2, "other": 3}), title="")


def test_a_guide_is_a_line_without_markers_that_the_legend_names():
    """So the ideal diagonal cannot be taken for data."""
    diagonal = {"ideal": ([0, 1], [0, 1])}
    panel = dict(lines={"found": ([0, 1], [0, 2])}, guides=diagonal, style="both")
    (ax,) = figures.plot(panel, title="").axes
    (guide,) = (line for line in ax.lines if line.get_label() == "ideal")
    assert guide.get_marker() == "None" and list(guide.get_ydata()) == [0, 1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ideal", "found"]


def test_a_logarithmic_axis_has_plain_numbers():
    """0.6 and 20 instead of powers of ten."""
    panel = dict(lines={"a": ([5, 100], [0.5, 8])}, xscale="log", yscale="log")
    fig = figures.plot(panel, title="")
    fig.canvas.draw()
    (ax,) = fig.axes
    for axis, expected in ((ax.xaxis, {"10", "100"}), (ax.yaxis, {"0.6", "1", "4"})):
        labels = axis.get_ticklabels(which="both")
        assert expected <= {label.get_text() for label in labels}
        assert not any("$" in label.get_text() for label in labels)


def test_a_logarithmic_axis_keeps_the_labels_it_is_given():
    """All of them, and no other: 1, 2, 5 and 25 passes."""
    k = [1, 2, 5, 25]
    panel = dict(lines={"a": (k, k)}, xscale="log", xticks=k, xticklabels=k)
    fig = figures.plot(panel, title="")
    fig.canvas.draw()
    labels = fig.axes[0].get_xticklabels(which="both")
    assert [label.get_text() for label in labels if label.get_text()] == ["1", "2", "5", "25"]


def test_panels_stand_side_by_side_each_as_wide_as_asked():
    """Two panels of 3.5 inches make a picture of 7, the width of a page."""
    panel = dict(lines={"a": ([0, 1], [0, 1])})
    fig = figures.plot(panel, panel, title="", height=3, width=3.5)
    assert fig.get_size_inches().tolist() == [7, 3]
    left, right = (ax.get_subplotspec().colspan.start for ax in fig.axes)
    assert left < right


def scores(dice):
    return {"pooled": {"DICE index": dice, "Sensitivity": dice / 2, "Precision": dice / 4}}


def evaluation(step, passes, dice):
    """A line of log.jsonl."""
    protocol = {"ddim_steps": passes}
    return {"step": step, "protocol": protocol, "Val": scores(dice), "Train": scores(dice / 8)}


def test_the_curves_are_the_losses_and_the_evaluations_of_one_protocol():
    """Numbers at their places.

    An evaluation with other passes at the same step belongs to another curve.
    """
    losses = [{"step": k, "loss": 1 / k, "lr": 0.1} for k in (1, 2, 3)]
    two_of_5 = [evaluation(2, 5, 0.4), evaluation(3, 5, 0.6)]
    fig = figures.curves([*losses, *two_of_5, evaluation(3, 50, 0.8)], "runs/x")
    left, right = fig.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert left.get_xlim() == right.get_xlim() and right.get_title().endswith(", 5 passes")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert drawn["validation DICE index"] == [[2, 0.4], [3, 0.6]]
    assert drawn["train DICE index"] == [[2, 0.05], [3, 0.075]]
    assert drawn["validation Sensitivity"] == [[2, 0.2], [3, 0.3]]
    assert drawn["validation Precision"] == [[2, 0.1], [3, 0.15]]


def test_of_two_protocols_with_as_many_evaluations_the_last_one_is_drawn():
    losses = [{"step": k, "loss": 1 / k, "lr": 0.1} for k in (1, 2, 3)]
    fig = figures.curves([*losses, evaluation(3, 5, 0.6), evaluation(3, 50, 0.8)], "runs/x")
    assert fig.axes[1].get_title().endswith(", 50 passes")


# ---------------------------------------- masks, and the picture in a notebook


def test_the_overlay_of_a_strip_is_a_picture_of_moderate_sides(tmp_path):
    """1x200 and 200x1 pixels: 7 inches wide, 2.7 and 21.6 high, at 150 dpi."""
    for shape, inches in (((1, 200), 2.7), ((200, 1), 21.6)):
        strip, mask = np.zeros(shape, np.uint8), np.ones(shape, bool)
        figures.save_overlay(tmp_path / "strip.png", strip, mask, "title")
        width, height = Image.open(tmp_path / "strip.png").size
        assert width == 7 * 150 and abs(height - inches * 150) <= 1


def test_a_title_with_dollars_is_a_title(tmp_path):
    """A file may be called so; matplotlib would read it as a formula, here a broken one."""
    black = np.zeros((1, 1, 8, 8), np.uint8)
    name = "$\\frac{$.png"
    figures.save_overlay(tmp_path / "overlay.png", black[0, 0], black[0, 0] > 0, name)
    figures.save_mask_grid(tmp_path / "masks.png", black, black, black, np.array([1.0]), name)
    figures.save_image_grid(tmp_path / "grid.png", black, name)
    figures.save_curves(tmp_path / "curves.png", [{"step": 1, "loss": 1.0, "lr": 0.1}], name)
    figures.plot(dict(lines={"a": ([0, 1], [0, 1])}), title=name).savefig(tmp_path / "plot.png")
    assert len(list(tmp_path.iterdir())) == 5


def test_the_mask_grid_goes_from_the_worst_to_the_best():
    """Columns in order of DICE, an undefined one last; missed dark green, too much orange."""
    true, sampled = np.zeros((2, 3, 1, 8, 8), np.uint8)
    true[:, :, 2:4], sampled[:, :, 3:5] = 255, 255
    dice = np.array([0.9, np.nan, 0.5])
    fig = figures.mask_grid(np.zeros_like(true), true, sampled, dice, "runs/x")
    grid = np.array(fig.axes).reshape(4, 3)
    assert titles(grid[0]) == ["DICE 0.500", "DICE 0.900", "DICE nan"]
    difference = grid[3, 0].images[0].get_array()
    missed, too_much, both, neither = (hex_of(difference[row, 0]) for row in (2, 4, 3, 0))
    assert (missed, too_much) == (figures.MISSED, figures.SAMPLED)
    assert (both, neither) == ("#c8c8c8", "#ffffff")
    assert "dark green missed, orange too much, gray in both" in fig.get_suptitle()


# Linear red, green and blue as a deuteranope sees them (Machado, Oliveira and Fernandes 2009)
DEUTERANOPE = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]


def test_the_four_colours_of_a_difference_differ_in_gray_and_for_a_deuteranope():
    """By 50 of 255 in luminance, and missed from too much by 60."""
    true, sampled = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    linear = (figures.difference(true, sampled)[0] / 255) ** 2.2
    for seen in (linear, linear @ np.transpose(DEUTERANOPE)):
        gray = 255 * np.clip(seen, 0, 1) ** (1 / 2.2) @ [0.299, 0.587, 0.114]
        both, missed, too_much, neither = gray
        assert np.diff(sorted(gray)).min() > 50 and too_much - missed >= 60


def test_a_picture_shows_itself_in_a_notebook_pixel_for_pixel():
    """At 150 dpi, as matplotlib draws it; a picture without colours takes a third of the bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64), np.uint8)
    gray_picture = figures.image_rows({"a": [noise] * 4, "b": [gray(0), gray(255)]}, "")
    two_lines = dict(lines={"x": ([0, 1], [0, 1]), "y": ([0, 1], [1, 0])})
    for fig, mode in ((gray_picture, "L"), (figures.plot(two_lines, title=""), "RGB")):
        drawn, png = io.BytesIO(), io.BytesIO(fig._repr_png_())
        fig.savefig(drawn, dpi=150)
        assert Image.open(png).mode == mode
        np.testing.assert_array_equal(pixels_of(png), pixels_of(drawn))


def test_a_map_of_both_signs_is_white_at_0():
    """As far below 0 as above it, alike in gray; one of a single sign has its own range."""
    maps = {"signed": [np.array([[-1.0, 0.0], [0.0, 3.0]])], "positive": [np.eye(2) + 1]}
    fig = figures.image_rows(maps, "", maps=list(maps))
    signed, positive = (ax.images[0] for ax in fig.axes[:2])
    assert signed.get_clim() == (-3, 3) and positive.get_clim() == (1, 2)
    low, zero, high = signed.cmap([0.0, 0.5, 1.0])[:, :3] @ [0.299, 0.587, 0.114]
    assert zero > 0.95 and low < 0.4 and high < 0.4


def test_a_map_on_an_x_ray_is_clear_at_0_and_opaque_at_its_limits():
    """The X-ray lies below it in true gray."""
    disagreement = np.array([[0.0, 0.1], [0.05, 0.2]])
    fig = figures.image_rows({"a": [disagreement]}, "", maps=["a"], under={"a": [gray(90, 2)]})
    drawn, xray = fig.axes[0].images
    np.testing.assert_allclose(drawn.get_alpha(), disagreement / 0.2)
    assert (xray.get_array() == 90).all() and xray.get_clim() == (0, 255)
    assert xray.get_zorder() < drawn.get_zorder()


def test_no_text_is_smaller_than_nine_points():
    """In each kind of picture."""
    plane = dict(extent=(0, 1, 0, 1), density=np.eye(2), title="t", xlabel="x")
    rows = {"a": [np.eye(4)]}
    dark = np.zeros((2, 1, 8, 8), np.uint8)
    for fig in (
        figures.plot(
            dict(lines={"a": ([0], [0]), "b": ([0], [1])}, title="t"), title="", caption="c"
        ),
        figures.image_rows(rows, "", "c", ["x"], maps=["a"], above={"a": ["p"]}),
        figures.planes({"": [plane]}, "", "c"),
        figures.mask_grid(dark, dark, dark, np.ones(2), ""),
        figures.curves([{"step": 1, "loss": 1.0, "lr": 0.1}], ""),
    ):
        fig.draw_without_rendering()
        assert min(text.get_fontsize() for text in fig.findobj(Text)) >= 9


def test_two_figures_show_the_same_images():
    """Those that are spread over the DICE of the first, in its order."""
    dice = np.array([0.9, 0.5, np.nan, 0.7, 0.8])
    chosen = figures.spread_over(dice, 3)
    assert chosen.tolist() == [1, 4, 2]
    images = np.arange(5, dtype=np.uint8).repeat(64).reshape(5, 1, 8, 8)
    for given in (None, chosen):
        other = dice if given is None else dice[::-1]
        fig = figures.mask_grid(images, images, images, other, "", 3, given)
        assert [ax.images[0].get_array()[0, 0] for ax in fig.axes[:3]] == [1, 4, 2]
    assert "the same images" in fig.get_suptitle()


def test_a_row_keeps_its_label_where_its_first_picture_is_left_out():
    """The label and the column's title are drawn; the place itself stays white."""
    gray = np.full((4, 4), 9, np.uint8)
    fig = figures.image_rows({"a row": [None, gray]}, "title", columns=["one", "two"])
    first, second = fig.axes[:2]
    assert first.axison and (first.get_ylabel(), first.get_title()) == ("a row", "one")
    assert not any(spine.get_visible() for spine in first.spines.values())
    assert not first.images and not len(first.get_xticks()) and second.images
