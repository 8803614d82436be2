"""What guards cost and are worth, on made-up evaluations for which the answer is known."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_run import SECONDS, leave

from lossguard.experiments import price
from lossguard.runs import folder as run_folder
from lossguard.runs.records import EVALUATIONS, MANIFEST, read_json, write_parquet


def evaluations(**factors: float) -> pl.DataFrame:
    """Losses 1 / steps of two seeds, of methods whose steps cost so many gradients."""
    steps = np.unique(np.geomspace(10, 20_000, 200).astype(int))
    rows = [
        pl.DataFrame(
            {
                "method": name,
                "seed": seed,
                "step": steps,
                "gradients": (steps * factor).astype(int),
                "forwards": 3 * steps,
                "train_loss": (1.0 + seed) / steps,
            }
        )
        for name, factor in factors.items()
        for seed in (0, 1)
    ]
    return pl.concat(rows)


def test_a_method_of_twice_the_price_is_twice_as_slow() -> None:
    table = evaluations(Fallback=1.0, Dear=3.0, Cheap=0.0)
    curves = {name: price.curves(table, name).mean() for name in ("Fallback", "Dear", "Cheap")}
    for mark in (100.0, 1_000.0, 10_000.0):
        for name, expected in (("Fallback", 1.0), ("Dear", 2.0), ("Cheap", 0.5)):
            slowdown = price.slowdown(curves[name], curves["Fallback"], mark)
            assert slowdown == pytest.approx(expected, rel=0.02)
        ratio = price.at(curves["Dear"], mark) / price.at(curves["Fallback"], mark)
        assert ratio == pytest.approx(2.0, rel=0.02)
    assert price.price_of_step(table, "Dear") == pytest.approx(4.0)


def test_a_curve_is_the_mean_of_the_seeds_over_the_last_tenth() -> None:
    one = price.curves(
        evaluations(Fallback=0.0), "Fallback"
    ).mean()  # a step costs 1: three forward passes
    # The mean of 1.5 / p over log-spaced p in [0.9 P, P], which is 1.5 / P times a constant.
    expected = 1.5 / 1_000 * (1 / 0.9 - 1) / np.log(1 / 0.9)
    assert price.at(one, 1_000.0) == pytest.approx(expected, rel=0.01)


def test_at_equal_price_who_ends_early_is_left_out_and_told(tmp_path: Path) -> None:
    """Or all others would be compared at the end of the shortest."""
    table = evaluations(A=0.0, B=1.0, C=0.0)
    short = (pl.col("method") == "C") & (pl.col("step") > 5_000)
    write_parquet(tmp_path / EVALUATIONS, table.filter(~short))
    told = price.at_equal_price("A", tmp_path)
    assert told.startswith("After a price of 20,000 gradients, loss over that of A: B 2\n")
    assert told.endswith("\nNot compared, as they end earlier: C")
    write_parquet(tmp_path / EVALUATIONS, table.filter(~short, pl.col("method") != "B"))
    told = "There is no other method that goes on as far to compare with A."
    assert price.at_equal_price("A", tmp_path) == told
    free = table.with_columns(gradients=0, forwards=0)
    write_parquet(tmp_path / EVALUATIONS, free)
    told = "A method that costs nothing can't be compared at equal price."
    assert price.at_equal_price("A", tmp_path) == told


def test_what_is_never_reached_is_infinite_and_what_is_unknown_is_not_a_number() -> None:
    table = evaluations(Fallback=1.0)
    reference = price.curves(table, "Fallback").mean()
    stuck = reference._replace(loss=np.ones_like(reference.loss))
    assert price.slowdown(stuck, reference, 1_000.0) == np.inf
    assert np.isnan(price.slowdown(reference, reference, 1e6))


def test_a_reference_that_diverges_has_the_lowest_loss_before() -> None:
    reference = price.curves(evaluations(Fallback=1.0), "Fallback").mean()
    late = reference._replace(loss=np.where(reference.price > 500, np.nan, reference.loss))
    end = reference.price[reference.price <= 500][-1] / 1_000
    assert price.slowdown(reference, late, 1_000.0) == pytest.approx(end, rel=1e-3)
    never = reference._replace(loss=np.full_like(reference.loss, np.nan))
    assert np.isnan(price.slowdown(reference, never, 1_000.0))


def test_the_interval_holds_the_slowdown_and_is_a_point_where_seeds_agree() -> None:
    table = evaluations(Fallback=1.0, Dear=3.0)
    each, reference = (price.curves(table, name) for name in ("Dear", "Fallback"))
    low, high = price.interval(each, reference, 1_000.0)
    assert low == pytest.approx(2.0, rel=0.03) and high == pytest.approx(2.0, rel=0.03)


def test_a_summary_counts_experiments_and_tells_the_worst(tmp_path: Path) -> None:
    found = {}
    for name, factor in (("cheap", 1.1), ("dear", 3.0)):
        folder = found[name] = leave(tmp_path / name)
        table = evaluations(Fallback=0.0, Guard=factor - 1.0)
        write_parquet(folder / EVALUATIONS, table)
        with pytest.raises(ValueError, match=r"evaluations\.parquet is damaged"):
            price.table({name: folder})
        seconds = {"seconds": SECONDS | {price.FALLBACK: 2.0, "Guard": factor}}
        run_folder.finish(folder, read_json(folder / MANIFEST) | seconds)
    _, numbers = price.table(found)
    fallback, guard = price.summary(numbers).rows(named=True)
    assert price.summed_up(fallback)[:3] == [price.FALLBACK, "2", "2"]
    assert price.summed_up(guard)[:3] == ["Guard", "2", "1"] and guard["reached"]
    assert price.summed_up(guard)[-1] == "0.6 to 1.5"
    numbers = guard["median"], guard["highest"], guard["price_of_step"]
    assert numbers == pytest.approx((2.05, 3.0, 3.0), rel=0.02)


@pytest.mark.parametrize(("last", "told"), [(60, "Too short: "), (600, f"run: {price.TITLE}")])
def test_of_short_runs_there_is_no_empty_table(tmp_path, last, told) -> None:
    table = evaluations(Fallback=0.0, Guard=1.0).filter(pl.col("step") <= last)
    made = {"data": "", "seconds": SECONDS | dict.fromkeys((price.FALLBACK, "Guard"), 1.0)}
    group, numbers = price.table({"run": leave(tmp_path / "run", made=made, evaluations=table)})
    (shown,) = group.renderables
    assert (shown if isinstance(shown, str) else shown.title).startswith(told)
    assert numbers.is_empty() == (last == 60)


def test_the_highest_slowdown_is_of_all_prices_not_of_the_marks() -> None:
    """1 at 1,000, 2,000 and 5,000, and 1.5 at 3,500, where a curve stands still for a while."""
    prices = np.geomspace(10, 20_000, 2_000)
    reference = price.Curve(prices, 1 / prices)
    still = (prices > 2_333) & (prices < 3_500)
    one = price.Curve(prices, np.where(still, 1 / 2_333, 1 / prices))
    for mark in (1_000, 2_000, 3_500, 5_000):
        assert price.slowdown(one, reference, mark) == pytest.approx(1.0, rel=0.01)
    found, reached = price.highest(one, reference, 20_000)
    assert found == pytest.approx(1.5, rel=0.02) and reached


def test_a_loss_that_is_not_reached_counts_by_the_end_of_the_curve() -> None:
    """At the shared end it is too late to say so: prices end where 1.15 times them is the end."""
    prices = np.geomspace(10, 20_000, 2_000)
    reference = price.Curve(prices, 1 / prices)
    stuck = price.Curve(prices, np.maximum(1 / prices, 1 / 8_000))
    found, reached = price.highest(stuck, reference, 20_000)
    assert found == pytest.approx(20_000 / 8_000, rel=0.03) and not reached
    assert price.highest(stuck, reference, 8_000)[0] == pytest.approx(1.0)
    row = {"method": "Guard", "experiments": 1, "within": 0, "median": np.inf, "highest": found}
    costs = {"price_of_step": 1.0, "least": 1.0, "most": 2.0}
    told = price.summed_up(row | {"reached": reached} | costs)
    assert told == ["Guard", "1", "0", "never", f"> {found:.2f}", "1.00", "1.0 to 2.0"]


def test_methods_are_summed_up_at_the_prices_that_all_have(tmp_path: Path) -> None:
    """A dear one goes on further, where the loss of the fallback would be reached by nobody."""
    falls = (pl.col("method") == "Fallback") & (pl.col("step") > 18_000)
    loss = pl.when(falls).then(0.1 * pl.col("train_loss")).otherwise("train_loss")
    table = evaluations(Fallback=0.0, Dear=2.0).with_columns(train_loss=loss)
    made = {"data": "", "seconds": SECONDS | dict.fromkeys((price.FALLBACK, "Dear"), 1.0)}
    folder = leave(tmp_path / "run", made=made, evaluations=table)
    _, numbers = price.table({"run": folder})
    dear = price.summary(numbers).row(1, named=True)
    assert dear["highest"] == pytest.approx(3.0, rel=0.02) and dear["reached"]


def test_prices_after_a_divergence_of_the_fallback_are_told(tmp_path: Path) -> None:
    lost = (pl.col("method") == "Fallback") & (pl.col("step") > 250)
    loss = pl.when(lost).then(np.nan).otherwise("train_loss")
    table = evaluations(Fallback=0.0, Other=0.0).with_columns(train_loss=loss)
    made = {"data": "", "seconds": SECONDS | dict.fromkeys((price.FALLBACK, "Other"), 1.0)}
    rows = price.rows(leave(tmp_path / "run", made=made, evaluations=table))
    found = {row[2]: row[3] for row in rows if row[1] == "Other"}
    assert found[200] == pytest.approx(1.0, rel=0.02) and found[10_000] < 0.05
