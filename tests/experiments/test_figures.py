"""Figures and tables say what the records say."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from pages import STEPS, curves_of
from tiny_run import leave

from lossguard.experiments import Experiment, figures
from lossguard.experiments.experiment import paper_methods
from lossguard.runs import drawing, records


def naive_windows(steps: list[int], losses: np.ndarray) -> dict[int, float]:
    """One window after another, down from the last step; bins weighted by their widths."""
    widths = np.diff(steps, prepend=0)
    shown, end = {}, steps[-1]
    while end >= 300:
        inside = [i for i, step in enumerate(steps) if 0.9 * end < step <= end and step >= 300]
        if inside:
            shown[steps[inside[-1]]] = np.average(losses[inside], weights=widths[inside])
        end *= 0.9
    return shown | {step: losses[i] for i, step in enumerate(steps) if step < 300}


def test_a_line_is_of_means_over_windows() -> None:
    """Down from the last step; up to 300 of each step. Bands are of all seeds, so averaged."""
    noise = np.random.default_rng(0).random((3, len(STEPS))).astype(np.float32)
    curves = curves_of({"L2O": 1.0}, seeds=3).with_columns(loss=pl.Series(noise.ravel()))
    one = figures.lines(curves, "steps")
    each = [naive_windows(STEPS.tolist(), loss) for loss in noise]
    assert one["x"].to_list() == sorted(each[0])
    expected = np.array([[seed[step] for step in sorted(seed)] for seed in each])
    for name, right in (("loss", np.mean), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose(one[name], right(expected, axis=0), rtol=1e-6)
    (axes,) = figures.draw(curves, "Title").axes[:1]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), one["loss"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e22])
def test_what_a_bad_loss_spoils_is_its_window(bad: float) -> None:
    steps = np.arange(1, 1001)
    curves = curves_of({"L2O": 1.0}, steps).with_columns(
        loss=pl.when(step=500, seed=1).then(bad).otherwise(0.1)
    )
    x, mean, high = figures.lines(curves, "steps").select("x", "loss", "high").to_numpy().T
    (spoiled,) = np.flatnonzero(~(high < 1))
    assert x[spoiled - 1] < 500 <= x[spoiled]
    assert np.isfinite(mean[spoiled]) == np.isfinite(bad) == np.isfinite(high[spoiled])
    np.testing.assert_allclose(np.delete(mean, spoiled), 0.1, rtol=1e-6)


def test_draw_has_a_line_and_a_band_for_each_method() -> None:
    curves = curves_of({"SGDnm": 1.0, "LGL2O": 2.0, "LGL2O over Adam": 3.0})
    figure = figures.draw(curves, "Title (JPEG)")
    first, second = figure.axes
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert first.get_title() == "Title (JPEG)"
    assert [line.get_label() for line in first.lines] == ["SGDnm", "LGL2O", "LGL2O over Adam"]
    assert len(first.collections) == 3
    widths = [line.get_linewidth() for line in first.lines]
    assert widths[0] > widths[1] > widths[2]  # where they coincide, the first is seen
    for drawn, level in zip(first.lines, (1.0, 2.0, 3.0), strict=True):
        x, y = np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())
        assert set(x) <= set(STEPS) and (x[0], x[-1]) == (1, STEPS[-1])
        exact = x < figures.SMOOTHED_FROM
        np.testing.assert_allclose(y[exact], 1.5 * level / np.sqrt(x[exact]), rtol=1e-6)
    assert second.get_ylabel() == "Led by" and len(second.lines) == 2
    x, use = (np.asarray(values) for values in second.lines[0].get_data())
    np.testing.assert_array_equal(use[:4], [0.5, 1.0, 0.5, 1.0])
    np.testing.assert_allclose(use[x >= 400], 0.75, atol=0.03)
    for guarded, track in zip(first.lines[1:], second.lines, strict=True):
        assert guarded.get_color() == track.get_color()


def test_a_line_goes_on_with_the_seeds_that_do() -> None:
    """In a record that is put together; the second seed, of twice the loss, ends at 500."""
    curves = curves_of({"SGDnm": 1.0, "LGL2O": 2.0})
    curves = curves.filter((pl.col("seed") == 0) | (pl.col("step") <= 500))
    first, second = figures.draw(curves, "Title").axes
    assert (len(first.lines), len(second.lines)) == (2, 1)
    x, y = (np.asarray(values) for values in first.lines[0].get_data())
    assert x[-1] == STEPS[-1]
    np.testing.assert_allclose(y[:299], 1.5 / np.sqrt(x[:299]), rtol=1e-6)
    np.testing.assert_allclose(y[x > 500], 1 / np.sqrt(0.95 * x[x > 500]), rtol=0.01)
    low, high = figures.lines(curves, "steps").filter(method="SGDnm").select("low", "high")
    assert (low[-1], high[-1]) == (y[-1], y[-1]) and high[0] == 2 * low[0]
    table = figures.summary(records.Record(MERGED, {"seconds": SECONDS}, curves))
    assert table["us a step"].to_list() == ["727", "727"]  # four seconds and 5,500 steps


MERGED = {"title": "", "name": "any", "methods": ["SGDnm", "LGL2O"], "seeds": 2}
SECONDS = {"SGDnm": 4.0, "LGL2O": 4.0}


def test_a_variant_looks_like_its_method_but_dashed() -> None:
    methods = ["SGDnm", "Adam", "Adam 0.01", "LGL2O", "LGL2O (nc 100)"]
    figure = figures.draw(curves_of(dict.fromkeys(methods, 1.0), np.arange(1, 20)), "Title")
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert styles[2][0] == styles[1][0] and styles[4][0] == styles[3][0] != styles[1][0]
    assert [dashes for _, dashes in styles] == ["-", "-", "--", "-", "--"]


def test_a_residual_guard_is_a_guard() -> None:
    """It decides without a forward pass."""
    curves = curves_of({"GL2O": 1.0, "SGDnm": 1.0})
    assert figures.guards(curves.filter(figures.LAST)) == ["GL2O"]
    figure = figures.draw(curves, "Title")
    losses, track = figure.axes
    assert [line.get_color() for line in track.lines] == [losses.lines[0].get_color()]


def test_draw_without_guards_has_one_axis() -> None:
    figure = figures.draw(curves_of({"SGDnm": 1.0}, np.arange(1, 50)), "Title")
    assert len(figure.axes) == 1


@pytest.mark.parametrize(("methods", "bands"), [(9, 9), (10, 0)])
def test_bands_of_many_methods_are_left_out(methods: int, bands: int) -> None:
    """They would hide each other."""
    named = {f"LGL2O over Adam {number}": 1.0 for number in range(methods)}
    figure = figures.draw(curves_of(named, np.arange(1, 20)), "Title")
    assert len(figure.axes[0].collections) == bands


def test_draw_leaves_no_method_out() -> None:
    """Nor are two drawn alike, nor does the legend leave the figure or lie on the curves."""
    methods = {f"LGL2O over Adam {number}": 1.0 + number for number in range(35)}
    figure = figures.draw(curves_of(methods, np.arange(1, 20)), "Many")
    assert [len(axes.lines) for axes in figure.axes] == [35, 35]
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 35
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(methods)
    assert legend.y0 > 0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    assert legend.y1 < figure.axes[-1].xaxis.label.get_window_extent().y0


def test_names_are_shown_as_they_are() -> None:
    """A line of a name that begins with _ is one that Matplotlib leaves out; $ begin formulas."""
    names = ["_mine", "$a_{$", "SGDnm"]
    figure = figures.draw(curves_of(dict.fromkeys(names, 1.0), np.arange(1, 20)), "$x_{$")
    figure.draw_without_rendering()  # a formula that is none would raise
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


@pytest.mark.parametrize("methods", [["L2O"], [f"SGDnm 0.0001 tau {i}0000" for i in range(25)]])
def test_title_and_legend_keep_clear(methods: list[str]) -> None:
    curves = curves_of(dict.fromkeys(methods, 1.0), np.arange(1, 20), seeds=1)
    title = "Learned on MNIST + MLP, tested on TinyImagenet50 + ConvNet"
    figure = figures.draw(curves, f"{title} (50 classes, 32 x 32 pixels, JPEG)")
    figure.draw_without_rendering()
    title, legend = figure.axes[0].title.get_window_extent(), figure.legends[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1
    assert not title.overlaps(legend)
    assert figure.axes[0].get_window_extent().height > 0.6 * 5.5 * figure.dpi


@pytest.mark.parametrize(("factor", "cut"), [(1e9, True), (2.0, False)])
def test_what_diverges_leaves_at_the_top(factor: float, cut: bool) -> None:
    """It would flatten the others: ten times the highest loss of the first step is enough."""
    curves = curves_of({"L2O": 1.0, "LGL2O": 2.0})
    lost = (pl.col("method") == "L2O") & (pl.col("step") > 100)
    loss = pl.when(lost).then(pl.col("loss") * factor).otherwise("loss")
    figure = figures.draw(curves.with_columns(loss), "Title")
    losses = figure.axes[0]
    lowest, highest = losses.get_ylim()
    assert losses.get_ylabel() == "Training loss" + " (lines leave at the top)" * cut
    if cut:
        assert highest == pytest.approx(10 * 2 * 2.0)
        assert 0.5 < lowest * np.sqrt(STEPS[-1]) / 2 < 1  # the margin is that of what is shown


@pytest.mark.parametrize(("factor", "ends"), [(1e9, "the top and the bottom"), (1, "the bottom")])
def test_what_is_zero_leaves_at_the_bottom(factor: float, ends: str) -> None:
    """A mean of few losses that are not 0, beside it, would set the axis."""
    curves = curves_of({"L2O": 1.0, "Adam": 1.0})
    step, is_adam = pl.col("step"), pl.col("method") == "Adam"
    lost = pl.when(~is_adam & (step > 100)).then(pl.col("loss") * factor).otherwise("loss")
    curves = curves.with_columns(lost)
    zero = pl.when(is_adam & (step > 200)).then(pl.when(step < 220).then(1e-13).otherwise(0.0))
    figure = figures.draw(curves.with_columns(loss=zero.otherwise("loss")), "Title")
    losses = figure.axes[0]
    assert losses.get_ylabel() == f"Training loss (lines leave at {ends})"
    lowest, highest = losses.get_ylim()
    assert lowest == pytest.approx(1e-8 * 2)
    assert highest == pytest.approx(20) if factor > 1 else 2 < highest < 20


@pytest.mark.parametrize("loss", [np.nan, np.inf, 0.0])
def test_what_a_logarithmic_axis_cannot_show_is_drawn(folder: Path, loss: float) -> None:
    config, made, curves = records.read_run(folder)
    curves = curves.with_columns(loss=pl.lit(loss, pl.Float32))
    assert drawing.save(figures.draw_run(records.Record(config, made, curves)), folder).is_file()
    alone = curves.with_columns(gradients=1.0 * pl.col("step"), forwards=pl.lit(0.0))
    assert drawing.save(figures.draw_run(records.Record(config, made, alone)), folder).is_file()


@pytest.mark.parametrize("first", [np.nan, np.inf])
def test_nothing_leaves_where_no_first_loss_is_finite(first: float) -> None:
    curves = curves_of({"L2O": 1.0}).with_columns(
        loss=pl.when(step=1)
        .then(first)
        .when(step=2)
        .then(1e9)
        .when(step=3)
        .then(0)
        .otherwise("loss")
    )
    assert figures.draw(curves, "Title").axes[0].get_ylabel() == "Training loss"


def test_a_method_that_diverged_is_drawn() -> None:
    curves = curves_of({"L2O": 1.0, "LGL2O": 1.0})
    lost = (pl.col("method") == "L2O") & (pl.col("step") > 100)
    curves = curves.with_columns(loss=pl.when(lost).then(float("nan")).otherwise("loss"))
    figure = figures.draw(curves, "Title")
    figure.draw_without_rendering()
    drawn = {one.get_label(): one for one in figure.axes[0].lines}
    steps, losses = drawn["L2O"].get_data()
    assert steps[np.isfinite(losses)].max() <= 100 < steps.max()
    assert np.isfinite(drawn["LGL2O"].get_ydata()).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of two methods with known losses."""
    methods = {"SGDnm": 1.0, "LGL2O": 4.0}
    config = {"name": "known", "title": "", "methods": list(methods), "seeds": 2, "seed": 0}
    made = {"data": "", "seconds": {"SGDnm": 0.01234, "LGL2O": 30.0}}
    return leave(tmp_path / "run", config, curves_of(methods), made)


def test_summary_says_what_the_records_say(folder: Path) -> None:
    table = figures.summary(records.read_run(folder), "steps")
    columns = ["method", "loss at 100", "loss at 1,000", "loss at 5,000", "learned", "seconds"]
    columns += ["us a step", "gradients", "forwards", "learned updates"]
    assert table.columns == columns
    assert table["method"].to_list() == ["SGDnm", "LGL2O"]
    for k, steps in ((100, range(90, 101)), (1000, range(900, 1001))):
        loss = np.mean([1.5 / np.sqrt(step) for step in steps])
        assert table[f"loss at {k:,}"].to_list() == [f"{loss:.4g}", f"{4 * loss:.4g}"]
    assert table["learned"].to_list() == ["50%", "50%"]
    assert table["seconds"].to_list() == ["0.0123", "30"]
    assert table["us a step"].to_list() == ["1", "3000"]
    assert table["gradients"].to_list() == ["5,000", "10,000"]
    assert table["learned updates"].to_list() == ["5,000", "5,000"]


def test_summary_is_over_what_was_spent(folder: Path) -> None:
    """A step of LGL2O costs 7 / 3 here; two seeds of 5,000 steps take four seconds."""
    record = records.read_run(folder)
    table = figures.summary(record)
    losses = ["loss at 100", "loss at 1,000", "loss at 10,000"]  # LGL2O alone gets to the last one
    assert table.columns[1:5] == [losses[0], losses[1], "loss at 5,000", losses[2]]
    assert table["loss at 10,000"][0] == ""
    expected = [f"{mean_loss(1.0, 900, 1000):.4g}", f"{4 * mean_loss(7 / 3, 900, 1000):.4g}"]
    assert table["loss at 1,000"].to_list() == expected
    record = records.Record(record.config, {"seconds": SECONDS}, record.curves)
    table = figures.summary(record, "seconds")
    at = [name for name in table.columns if "loss" in name]
    assert at == ["loss at 0.1 s", "loss at 1 s", "loss at 2 s"]
    loss = mean_loss(0.4, 900, 1000)  # milliseconds a step
    assert table["loss at 1 s"].to_list() == [f"{loss:.4g}", f"{4 * loss:.4g}"]


def mean_loss(cost: float, first: float, last: float) -> float:
    """Of SGDnm, over the part of an axis on which a step takes so much."""
    ends = cost * STEPS
    inside = np.minimum(ends, last) - np.maximum(ends - cost * np.diff(STEPS, prepend=0), first - 1)
    return float(np.average(1.5 / np.sqrt(STEPS), weights=np.maximum(inside, 0)))


def test_summary_has_the_last_step_once(folder: Path) -> None:
    config, made, curves = records.read_run(folder)
    curves = curves.filter(pl.col("step") <= 1000)
    headers = figures.summary(records.Record(config, made, curves), "steps").columns
    assert [header for header in headers if "loss" in header] == ["loss at 100", "loss at 1,000"]


def test_plot_leaves_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose ticks are powers of ten, in one notation."""
    found, save = [], Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        found.extend(label.get_text() for label in self.axes[0].get_yticklabels())

    monkeypatch.setattr(Figure, "savefig", spy)
    before = {*folder.iterdir()}
    file = drawing.save(figures.draw_run(records.read_run(folder)), folder)
    assert {*folder.iterdir()} - before == {file} == {folder / "figure.png"}
    assert file.read_bytes().startswith(b"\x89PNG")
    labels = set(re.findall(r"\\mathdefault{(.*?)}\$", " ".join(found)))
    assert {"10^{-1}", "10^{0}", "10^{1}", "10^{2}"} <= labels and all(
        text.startswith("10^{") for text in labels
    )


def test_drawing_leaves_the_users_backend(folder: Path) -> None:
    code = (
        "import matplotlib; matplotlib.use('svg'); from pathlib import Path\n"
        "from lossguard.runs import drawing, records; from lossguard.experiments import figures\n"
        f"folder = Path({str(folder)!r})\n"
        "drawing.save(figures.draw_run(records.read_run(folder)), folder)\n"
        "print(matplotlib.get_backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "svg\n"


def test_methods_look_alike_in_all_figures() -> None:
    """Those of the paper and ours; of others each has a style of its own."""
    colors = []
    for methods in (("SGDnm", "LGL2O"), ("Adam", "SGDnm", "L2O", "LGL2O"), ("LGL2O", "mine")):
        named = {method: 1.0 + number for number, method in enumerate(methods)}
        figure = figures.draw(curves_of(named, np.arange(1, 20)), "Title")
        drawn = {one.get_label(): one.get_color() for one in figure.axes[0].lines}
        assert len({*drawn.values()}) == len(methods)
        colors.append(drawn["LGL2O"])
    assert colors[0] == colors[1] != colors[2]
    known = figures.NAMED
    assert {*paper_methods(Experiment("any"))} == {*known}
    assert len({*known}) == len(known) <= figures.COLORS
