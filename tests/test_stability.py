"""``benchmarks/stability``: its faults, its runs and its numbers, on four clouds of points."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
command = pytest.importorskip("benchmarks.stability.__main__")
from benchmarks.stability import faults, report, run, tasks  # noqa: E402
from benchmarks.stability.faults import CLEAN, FAULTS, Happening  # noqa: E402
from benchmarks.stability.report import Key, Records  # noqa: E402

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "stability"
recorded = pytest.mark.skipif(not RECORD.is_dir(), reason="there are no records here")
BY_NAME = {fault.name: fault for fault in (CLEAN, *FAULTS)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy() -> tasks.Task:
    centres = np.random.default_rng(0).normal(size=(4, 8))

    def draw(random: np.random.Generator, size: int = 16) -> tasks.Batch:
        t = random.integers(4, size=size)
        x = centres[t] + 0.7 * random.normal(size=(size, 8))
        return torch.from_numpy(x).float(), torch.from_numpy(t)

    def model() -> torch.nn.Module:
        return torch.nn.Linear(8, 4)

    return tasks.Task(model, draw, draw(np.random.default_rng(1), 256), 4, 120)


def struck(name: str, batches: int = 1000) -> list[tuple[bool, bool, float, bool]]:
    """Of each minibatch: whether x changed, whether t did, the rate's factor, bad gradients."""
    happening, found = Happening(BY_NAME[name], 4), []
    for k in range(batches):
        batch = torch.zeros(32, 8), torch.zeros(32).long()
        x, t = happening.strike(batch, k, k / batches, np.random.default_rng(k))
        found.append((bool(x.any()), bool(t.any()), happening.factor, happening.nan))
    return found


@pytest.mark.parametrize("name", ["clean", "rate x30"])
def test_nothing_happens_on_the_way(name: str) -> None:
    assert set(struck(name)) == {(False, False, 1.0, False)}


def test_faults_on_the_way() -> None:
    """They are where the module says."""
    short = [400 <= k < 400 + faults.SHORT for k in range(1000)]
    assert [x and t and factor == 1 for x, t, factor, _ in struck("burst")] == short
    assert [factor for _, _, factor, _ in struck("jump")] == [50.0 if now else 1.0 for now in short]
    assert [t and not x for x, t, *_ in struck("labels")] == [400 <= k < 600 for k in range(1000)]
    assert 2 <= sum(nan for *_, nan in struck("nan")) <= 25


def test_a_run_is_the_loop_that_one_would_write() -> None:
    """AdamW, minibatch by minibatch."""
    task = toy()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    loss = torch.nn.functional.cross_entropy
    for k in range(task.gradients):
        x, t = task.draw(np.random.default_rng([5, k]))
        optimizer.zero_grad()
        loss(model(x), t).backward()
        optimizer.step()
    made = run.record(task, "AdamW", CLEAN, 0.03, 5)
    x, t = task.held
    assert made["curve"][-1] == (120, round(loss(model(x), t).item(), 5))
    assert made["error"] == "" and made["minibatches"] == 120


def test_statistics_of_batchnorm_are_those_of_averaged_parameters() -> None:
    """An average of twice the weights has means that are twice as large."""
    task = toy()._replace(model=lambda: torch.nn.Sequential(toy().model(), torch.nn.BatchNorm1d(4)))
    training = run.Training(task, "AdamW", CLEAN, 0.03, 5)
    linear, normalized = training.model  # pyright: ignore[reportGeneralTypeIssues]

    class Average:
        def eval(self) -> None:
            linear.weight.data *= 2

        def train(self) -> None:
            linear.weight.data /= 2

    training.method = training.method._replace(average=Average())
    before = linear.weight.clone()
    training.held_loss()
    x, _ = task.draw(np.random.default_rng(9), 10_000)
    mean = (2 * x @ before.T + linear.bias).mean(0)
    torch.testing.assert_close(normalized.running_mean, mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(linear.weight, before)


def test_runs_have_as_many_gradients_and_survive_what_they_can() -> None:
    """NaN gradients ruin AdamW, not Rewind; a guard of two lanes takes fewer minibatches."""
    task, nan = toy(), BY_NAME["nan"]
    plain, watched = (run.record(task, name, nan, 0.03, 5) for name in ("AdamW", "Rewind"))
    assert math.isnan(plain["curve"][-1][1]) and report.final(plain) == plain["start"]
    assert report.final(watched) < 0.7 * watched["start"]
    guarded = run.record(task, "BestOf", CLEAN, 0.03, 5)
    assert guarded["curve"][-1][0] >= 120 > guarded["minibatches"]


def test_an_error_is_a_part_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> run.Method:
        def step(gradient: Any) -> None:
            raise ArithmeticError("no more")

        return run.METHODS["AdamW"](*given)._replace(step=step)

    monkeypatch.setitem(run.METHODS, "clipping", broken)
    made = run.record(toy(), "clipping", CLEAN, 0.03, 5)
    assert made["error"] == "ArithmeticError: no more" and report.final(made) == made["start"]


def test_the_command_goes_on_where_it_was(tmp_path: Path, monkeypatch, capsys) -> None:
    """What is recorded isn't run again; a line that was cut off is."""
    monkeypatch.setitem(tasks.TASKS, "toy", toy)
    monkeypatch.setattr(command, "RATES", (0.01, 0.03))
    monkeypatch.setattr(command, "ROUNDS", 2)
    words = [str(tmp_path), "--tasks", "toy", "--methods", "AdamW", "Rewind", "--seeds", "7"]
    words += ["--result", str(tmp_path / "result")]
    with pytest.raises(SystemExit):
        command.main([*words, "--minutes", "0"])
    assert "there is no result to leave" in capsys.readouterr().err
    command.main(words)
    file = tmp_path / "runs.jsonl"
    whole = file.read_text()
    assert len(whole.splitlines()) == 2 * 2 * 2 + 2 + 2 * len(BY_NAME)
    command.main(words)
    assert file.read_text() == whole
    file.write_text(whole[:-10])
    command.main(words)
    again = [json.loads(text.splitlines()[-1]) for text in (whole, file.read_text())]
    kept = gzip.decompress((tmp_path / "result" / "runs.jsonl.gz").read_bytes()).decode()
    assert sorted(kept.splitlines()) == sorted(file.read_text().splitlines())
    assert again[0] | {"seconds": 0} == again[1] | {"seconds": 0}
    files = {path.name for path in (tmp_path / "result").iterdir()}
    assert files == {"figure.png", "runs.jsonl.gz", "table.csv"}


def test_numbers_of_the_table() -> None:
    """By hand: two seeds, a method that is twice as bad under faults and as dear, and one more."""

    def made(loss: float, spent: int = 100) -> dict[str, Any]:
        curve = [(spent * k // 10, 9.0 if k == 5 else loss) for k in range(1, 11)]
        return {"start": 8.0, "curve": curve, "minibatches": 50, "acted": 1, "error": ""}

    records: Records = {}
    for method, time, factor in (("AdamW", 1.0, 1), ("clipping", 2.0, 2), ("Rewind", 3.0, 0.5)):
        cost = {"time": time, "low": 0.9, "high": 1.1, "copies": 3.0}
        records[Key("toy", method, "cost", 0)] = cost
        for seed, oracle in ((7, 1.0), (8, 2.0)):
            for name in BY_NAME:
                loss = oracle * (1 if name == "clean" else factor * (1 + (seed == 8)))
                records[Key("toy", method, name, seed)] = made(loss)
    plain, worse, better = report.rows(records)
    assert plain.cells["clean"] == pytest.approx(1) and plain.faults == pytest.approx(2**0.5)
    assert worse.faults == pytest.approx(8**0.5) and better.faults == pytest.approx(0.5**0.5)
    assert worse.tasks == {"toy": worse.faults}
    assert (plain.front, worse.front, better.front) == (True, False, True)
    # Student's t with one degree of freedom, of the logarithms of 1 and 2.
    assert plain.high / plain.faults == pytest.approx(math.exp(12.706 * math.log(2) / 2), rel=1e-3)
    assert plain.worst == pytest.approx(8 / 2**0.5) and plain.acted == 20
    # At a cost of 2 the clock stops after half of the gradients, where the loss is the start's.
    assert worse.seconds == pytest.approx(8 / 2**0.5) and worse.time == 4


@pytest.fixture(scope="module")
def finals() -> pl.DataFrame:
    """``final`` of each run of the results: the mean of its losses over the last tenth."""
    if not RECORD.is_dir():
        pytest.skip("there are no records here")
    lines = gzip.decompress((RECORD / "runs.jsonl.gz").read_bytes()).decode().splitlines()
    rows = []
    for one in map(json.loads, lines):
        if one["fault"] in BY_NAME:
            last = 0.9 * one["curve"][-1][0]
            known = [min(loss, one["start"]) for spent, loss in one["curve"] if spent > last]
            known = [one["start"] if math.isnan(loss) else loss for loss in known]
            final = one["start"] if one["error"] else sum(known) / len(known)
            rows.append({name: one[name] for name in Key._fields} | {"final": final})
    return pl.DataFrame(rows)


def test_the_table_is_of_the_runs_that_are_recorded(finals: pl.DataFrame) -> None:
    """Its means, by polars."""
    runs = finals
    oracle = runs.filter(method="AdamW", fault="clean").select("task", "seed", oracle="final")
    ratio = (pl.col("final") / pl.col("oracle")).log()
    means = runs.join(oracle, on=["task", "seed"]).group_by("method", "fault").agg(ratio.mean())
    fault_is_bad = pl.col("fault") != "clean"
    over = means.filter(fault_is_bad).group_by("method").agg(pl.col("final").mean())
    told = pl.read_csv(RECORD / "table.csv").join(over, on="method")
    assert len(told) == len(run.METHODS)
    np.testing.assert_allclose(told["faults"], told["final"].exp(), rtol=2e-3)
    for column, is_rate in (("rates", True), ("others", False)):
        some = means.filter(pl.col("fault").str.starts_with("rate") == is_rate, fault_is_bad)
        some = told.join(some.group_by("method").agg(part=pl.col("final").mean()), on="method")
        np.testing.assert_allclose(some[column], some["part"].exp(), rtol=1e-4)
    for fault in BY_NAME:
        cells = told.join(means.filter(fault=fault), on="method")
        np.testing.assert_allclose(cells[fault], cells["final_right"].exp(), rtol=2e-3)


@recorded
def test_the_page_shows_that_table() -> None:
    page = (ROOT / "docs" / "stability.md").read_text()
    table = pl.read_csv(RECORD / "table.csv")
    for part in page.split("<!-- results/stability -->\n")[1:]:
        lines = part.split("\n\n")[0].splitlines()
        names, _, *shown = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        assert [row[0] for row in shown] == table["method"].to_list()
        for column, name in enumerate(names[1:], start=1):
            values = table[f"rate {name}" if name[0] == "x" else name.lower()]
            told = ["" if value is None else f"{value:.2f}" for value in values]
            assert [row[column] for row in shown] == told, name
