"""The tables of the docs are what the records in ``results`` say."""

import itertools
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.readings import POLICIES, RULES, counts, judge_readings
from lossguard.experiments import benchmark_tasks, price
from lossguard.experiments.benchmark_tasks import FILE, envelope, interquartile_mean
from lossguard.experiments.claims import Verdict, judge_claims
from lossguard.runs.records import CURVES, EVALUATIONS, read_parquet, read_runs
from lossguard.tasks.published import PUBLISHED

ROOT = Path(__file__).parents[1]
if not (ROOT / "results").is_dir():
    pytest.skip("there are no records here", allow_module_level=True)
PAGE, COSTS = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("paper", "costs"))


def table(comment: str, page: str = PAGE) -> list[list[str]]:
    """The cells of the head and of the rows below a comment."""
    (found,) = re.findall(rf"^<!-- {comment} -->\n\n?((?:\|.*\n)+)", page, re.M)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return judge_claims(read_runs([ROOT / "results"])[0])


def test_claims_are_those_of_the_records(verdicts: list[Verdict]) -> None:
    """Every cell but the cause, which a row has if it is not reproduced, and which has no loss."""
    _, *rows = table("claims of results")
    told = [[v.id, v.says, v.numbers, v.seeds, v.verdict] for v in verdicts]
    assert [row[:5] for row in rows] == told
    for *_, verdict, cause in rows:
        assert bool(cause) == (verdict != "reproduced")
        assert not re.search(r"\d\.\d", cause)


def test_readings_are_those_of_the_records() -> None:
    """The reading that is named as best, and its count of claims."""
    names = "readings", "fig03", "fig03-early", "fig04", "fig04-early"
    names += "fig05", "fig06", "fig07", "fig08"
    folders = [ROOT / "results" / name for name in names]
    found = counts(judge_readings(read_runs(folders)[0]))
    reproduced, run = (
        {row[0]: [int(cell.split(" of ")[at]) for cell in row[1:]] for row in found.rows()}
        for at in (0, 1)
    )

    def joint(of: dict[str, list[int]], images: int, points: int, policy: str, rule: str) -> int:
        about = ("L2O", f"LGL2O, {policy}", f"GL2O, {rule}")
        return sum(of[one][at] for one in about for at in (images, points))

    readings = [*itertools.product((0, 1, 2), (3, 4), POLICIES, RULES)]
    most = max(joint(reproduced, *one) for one in readings)
    best = [one for one in readings if joint(reproduced, *one) == most]
    own = (1, 3, "reset in every cycle", "weight, every step")
    (told,) = re.findall(r"Two reproduce most: (\d+ of \d+)", PAGE)
    assert len(best) == 2 and own in best and told == f"{most} of {joint(run, *own)}"
    assert {(one[0], one[3].endswith("every step")) for one in best} == {(1, True)}
    (told,) = re.findall(r"only accepted steps count, it is at most\s(\d+)", PAGE)
    accepted = [one for one in readings if not one[3].endswith("every step")]
    assert max(joint(reproduced, *one) for one in accepted) == int(told)


def test_counts(verdicts: list[Verdict]) -> None:
    reproduced, failed = map(int, re.findall(r"(\d+) (?:of the paper's statements )?are", PAGE)[:2])
    counts = Counter(verdict.verdict for verdict in verdicts)
    assert counts == {"reproduced": reproduced, "not reproduced": failed}


def test_rows_named_in_the_text_are_as_it_says(verdicts: list[Verdict]) -> None:
    outcome = {verdict.id: verdict.verdict for verdict in verdicts}
    (failing,) = re.findall(r"\*\*What does not\.\*\*(.*?)\n\n", PAGE, re.S)
    named = re.findall(r"\b(\d+[a-e]|A)\b", failing)
    assert len(named) == 8 and {outcome[name] for name in named} == {"not reproduced"}
    assert {*re.findall(r"\b(\d+[a-e])\b(?!-\d)", PAGE)} <= outcome.keys()


def test_what_was_tried_is_told_in_short() -> None:
    assert (ROOT / "docs" / "tried.md").stat().st_size <= 6_144


@pytest.fixture(scope="module")
def slowdowns() -> pl.DataFrame:
    """Of all methods in all experiments; not the intervals, which take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price, "DRAWS", 1)
        return price.table({name: ROOT / "results" / "price" / name for name in price.RECIPES})[1]


def told(value: float) -> str:
    return "never" if np.isinf(value) else f"{value:.2f}"


def test_guards_are_those_of_the_records(slowdowns: pl.DataFrame) -> None:
    _, *rows = table("guards of results", COSTS)
    found = price.summary(slowdowns).filter(pl.col("method") != price.FALLBACK)
    assert rows == [price.summed_up(row) for row in found.rows(named=True)]


def test_the_first_paragraph_counts_them(slowdowns: pl.DataFrame) -> None:
    """As does the README; and at equal price losses on images are as far above as is said."""
    every = slowdowns.filter(method="Recommended", price=price.LATE)
    above = every.filter(~pl.col("reached") | (pl.col("highest") > price.BOUND))
    reached = above.filter("reached")
    most = f"{reached['highest'].max():.2f}"
    told = (20 - len(above), len(reached), len(above) - len(reached), most)
    assert told == (13, 6, 1, "1.60")
    readme = (ROOT / "README.md").read_text()
    assert "In 13 of 20 combinations" in COSTS and "six others" in COSTS and "60 %" in COSTS
    assert "on 7 of 20 combinations" in readme
    images = above.filter(pl.col("experiment").str.contains("-(mnist|fashion)-.*-"))["experiment"]
    assert len(images) == 4
    for name in images:
        evaluations = read_parquet(ROOT / "results" / "price" / name / EVALUATIONS)
        both = ("Recommended", price.FALLBACK)
        guard, fallback = (price.curves(evaluations, one).mean() for one in both)
        for at in guard.price[guard.price >= price.LATE]:
            assert not price.at(guard, at) / price.at(fallback, at) > 1.095, (name, at)


def test_slowdowns_are_those_of_the_records(slowdowns: pl.DataFrame) -> None:
    """And the prices of a step; not the intervals."""
    head, *rows = table("slowdowns of results", COSTS)
    marks = [int(re.sub(r"\D", "", cell)) for cell in head[4:]]
    assert len(rows) == len(price.RECIPES)
    for label, alone, cost, highest, *cells in rows:
        task, over, learned = label.split(", ")
        one = slowdowns.filter(experiment=f"price-{task}-{learned}-{over}")
        found = {(row["method"], row["price"]): row for row in one.to_dicts()}
        assert alone == told(found["Learned", 1_000]["slowdown"])
        assert [highest, cost] == price.summed_up(
            price.summary(one).row(by_predicate=pl.col("method") == "Recommended", named=True)
        )[-3:-1]
        for mark, cell in zip(marks, cells, strict=True):
            row = found.get(("Recommended", mark))
            slowdown = cell.partition(" ")[0].replace("inf", "never")
            assert slowdown == (told(row["slowdown"]) if row else "")


@pytest.mark.parametrize(
    ("kind", "tasks"), [("images", ("mnist", "fashion")), ("points", ("spirals", "circles"))]
)
def test_the_luck_of_the_seeds_is_that_of_the_records(kind: str, tasks: tuple[str, ...]) -> None:
    """Of the fallback's first ten seeds and its last ten, either way."""
    found = []
    for task, over in itertools.product(tasks, ("sgdnm", "adam")):
        folder = ROOT / "results" / "price" / f"price-{task}-mnist-{over}"
        every = price.curves(read_parquet(folder / EVALUATIONS), price.FALLBACK)
        one, other = every.mean(slice(10)), every.mean(slice(10, 20))
        found += [price.highest(*pair, one.price[-1]) for pair in ((one, other), (other, one))]
    (low, _), (high, reached) = min(found), max(found)
    told = f"{low:.2f} to {'' if reached else 'more than '}{high:.2f} on {kind}"
    assert told in " ".join(COSTS.split())


def test_how_late_the_guard_follows_is_as_in_the_records() -> None:
    """S of the guard over that of the learned optimizer alone, where that one is ahead."""

    def times(name: str) -> float:
        evaluations = read_parquet(ROOT / "results" / "price" / name / EVALUATIONS)
        methods = price.FALLBACK, price.LEARNED, "Recommended"
        fallback, learned, guard = (price.curves(evaluations, one).mean() for one in methods)
        most = 0.0
        for k in np.geomspace(100, guard.price[-1] / price.BOUND, 200):
            alone = price.slowdown(learned, fallback, k)
            if alone < 1:
                most = max(most, price.slowdown(guard, fallback, k) / alone)
        return most

    parts = ("mnist", "fashion", "spirals", "circles", "convnet-mnist", "convnet-cifar10")
    (_, cells) = table("followed late", COSTS)
    for part, cell in zip(parts, cells, strict=True):
        found = [times(name) for name in price.RECIPES if name.startswith(f"price-{part}-")]
        assert cell == f"{max(found):.2g}"


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
def test_speedups_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    every = {name: ROOT / "results" / name for name in PUBLISHED}
    _, numbers = benchmark_tasks.table(every)

    def speedups(task: str, method: str, by: str, mark: int) -> np.ndarray:
        if method != "Adam":
            rows = numbers.filter(task=task, method=method, by=by, mark=mark)
            return rows["speedup"].to_numpy()
        kind, rate = benchmark_tasks.TRIED[task][0]
        curves = benchmark_tasks.curves_of(read_parquet(every[task] / CURVES), f"{kind} {rate:g}")
        losses = curves.at(mark, "steps")
        assert losses is not None
        return np.asarray(envelope(task).steps_to(losses)) / mark

    (_, _, *marks), *rows = table("speedups of all", text)
    at = [int(mark.replace(",", "")) for mark in marks]
    for method, by, *told in rows:
        for mark, cell in zip(at, told, strict=True):
            each = [speedups(task, method, by, mark) for task in every]
            value = interquartile_mean(each, draws=10)[0]  # the interval takes longer
            assert cell.partition(" ")[0] == f"{value:.2f}"
    _, *rows = table("speedups of each task", text)
    assert {task for task, *_ in rows} == {f"`{task}`" for task in every}
    for task, method, by, *told in rows:
        for mark, cell in zip(at, told, strict=True):
            of_task = speedups(task.strip("`"), method, by, mark)
            assert cell == (f"{of_task.mean():.2f}" if len(of_task) else "")


def test_mlp_small_does_not_diverge_beyond_its_longest_rollout() -> None:
    """Means of 1,000 steps over the lowest before: the last one, and the highest on the way."""
    last, highest = 0.0, {}
    for name in PUBLISHED:
        curve = read_parquet(ROOT / "results" / "long" / name / CURVES).sort("step")
        steps, losses = curve["step"].to_numpy(), curve["loss"].to_numpy()
        assert steps[-1] == 200_000
        ends = np.searchsorted(steps, np.arange(1_000, 200_001, 1_000))
        sums = np.cumsum(losses * np.diff(steps, prepend=0))[ends]
        means = np.diff(sums, prepend=0) / 1_000
        over = means[1:] / np.minimum.accumulate(means)[:-1]
        last, highest[name] = max(last, over[-1]), over.max()
    of_mnist = highest.pop("ImageMLP_Mnist_128x128x128_Relu")
    (told,) = re.findall(
        r"1,000 steps is at most.*?(\d+) %.*?up to (\d+) %.*?up to (\d+) %",
        (ROOT / "docs" / "tasks.md").read_text(),
        re.S,
    )
    found = (last, max(highest.values()), of_mnist)
    assert [int(one) for one in told] == [round(100 * (one - 1)) for one in found]


def test_the_lstm_rises_as_the_text_says() -> None:
    """Means over seeds; all five tasks, of which one is named."""
    text = " ".join((ROOT / "docs" / "tasks.md").read_text().split())
    (told,) = re.findall(r"half above its least loss within .*? above its first loss .*?\.", text)
    half, of_one, first = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*00", told))
    for name in PUBLISHED:
        curve = read_parquet(ROOT / "results" / name / CURVES).filter(method="LSTM")
        means = curve.group_by("step").agg(pl.col("loss").mean()).sort("step")
        steps, losses = means["step"].to_numpy(), means["loss"].to_numpy()
        least = np.minimum.accumulate(losses)
        within = of_one if name == "ImageMLPAE_Mnist_128x32x128_bs128" else half
        assert steps[np.argmax(losses > 1.5 * least)] <= within, name
        assert losses[0] < losses[steps <= first].max()


def test_slowdowns_over_adam_are_those_of_the_records() -> None:
    """The highest of all prices from 1,000 on, as in the table of costs."""

    def curve(table: pl.DataFrame, method: str) -> price.Curve:
        one = benchmark_tasks.curves_of(table, method)
        grid = np.geomspace(100, one.price[:, -1].min(), 1_000)
        losses = [np.interp(grid, *seed) for seed in zip(one.price, one.loss, strict=True)]
        return price.Curve(grid, np.mean(losses, axis=0))

    _, *rows = table("slowdowns over Adam", (ROOT / "docs" / "tasks.md").read_text())
    for k, name in enumerate(PUBLISHED, 1):
        curves = read_parquet(ROOT / "results" / name / CURVES)
        kind, rate = benchmark_tasks.TRIED[name][0]
        adam = curve(curves, f"{kind} {rate:g}")
        for method, *cells in rows:
            one = curve(curves, method)
            highest, _ = price.highest(one, adam, one.price[-1])
            assert cells[k - 1] == f"{highest:.2f}", (name, method)


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
def test_what_updates_cost_is_counted_as_the_text_says() -> None:
    """With the gradients that an update of ``mlp-small`` takes the time of; and Tuned lands."""
    text = (ROOT / "docs" / "tasks.md").read_text()
    (told,) = re.findall(r"an update costs (.*?)\. Its update takes", text, re.S)
    low, high, *speeds = map(float, re.findall(r"\d\.\d+", told))
    tables = {name: read_parquet(ROOT / "results" / name / CURVES) for name in PUBLISHED}

    def speed(mark: int, update: float) -> float:
        each = []
        for name, table in tables.items():
            paid = pl.col("gradients") + update * pl.col("learned_updates")
            curves = benchmark_tasks.curves_of(table.with_columns(gradients=paid), "MLP")
            losses = curves.at(mark, "price")
            assert losses is not None
            each.append(envelope(name).steps_to(losses) / mark)
        return interquartile_mean(each, draws=10)[0]

    found = [speed(mark, update) for mark in (2_000, 10_000) for update in (high, low)]
    assert speeds == [round(one, 2) for one in found]
    _, numbers = benchmark_tasks.table({name: ROOT / "results" / name for name in PUBLISHED})
    tuned = numbers.filter(method=benchmark_tasks.TUNED, by="steps").group_by("task", "mark")
    for task, mark, loss in tuned.agg(pl.col("loss").mean()).iter_rows():
        over = loss / envelope(task).at(mark)
        late = {5_000: 1.16, 10_000: 4.23} if "_Mnist_128x128x128" in task else {}
        assert over <= late.get(mark, 1.04), (task, mark, over)


def test_a_million_steps_are_as_the_text_says() -> None:
    """How far the loss rose above its lowest before, from step 300 on and before."""
    rises, last, ends, count = [], [], [], 0
    for folder in sorted(
        path for path in (ROOT / "results" / "million").iterdir() if path.is_dir()
    ):
        table = read_parquet(folder / EVALUATIONS)
        for (method, _), one in table.group_by("method", "seed"):
            losses = one.sort("step")["train_loss"].to_numpy()
            steps = one.sort("step")["step"].to_numpy()
            lowest = np.minimum.accumulate(losses)
            over = zip(steps[1:], losses[1:] / lowest[:-1], strict=True)
            rises.append((method, folder.name, {int(k): float(r) for k, r in over}))
            last.append((method, losses[-1] / lowest[-1]))
            assert steps[-1] == 1_000_000
            count = len(steps)
        means = dict(
            table.filter(step=1_000_000).group_by("method").agg(pl.mean("train_loss")).rows()
        )
        ends.append(means["Recommended"] / means["Fallback"])
    guard = [one for one in rises if one[0] == "Recommended"]
    late = [(name, k, r) for _, name, of in guard for k, r in of.items() if k >= 300 and r > 1.1]
    (text,) = re.findall(r"In twenty runs of a million.*?\n\n", COSTS, re.S)
    numbers = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    steps = {k for _, k, _ in late}
    most = round(100 * (max(r for *_, r in late) - 1))
    assert len(guard) == 20 and all(name.startswith("circles") for name, *_ in late)
    assert sum(any(k >= 300 and r > 1.1 for k, r in of.items()) for *_, of in guard) == 3
    assert "a tenth above" in text and "three seeds" in text
    (above,) = (end - 1 for method, end in last if method == "Recommended" and end > 1)
    told = [count, 300, most, min(steps), max(steps), round(100 * above, 2)]
    assert numbers == [*told, round(min(ends), 2), round(max(ends), 2)]
