"""The benchmark on published tasks: made-up curves with known answers, and the command itself."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from scipy import stats

import lossguard
from lossguard.experiments import benchmark_tasks
from lossguard.experiments.benchmark_tasks import FILE, Envelope, envelope, interquartile_mean
from lossguard.tasks import published
from lossguard.tasks.dataset import Dataset, make_dataset

HALVED = Envelope(np.array([0.0, 100_000]), np.array([1.0, 2.0**-100]))
"""It halves the loss every 1,000 steps."""
FALLING = Envelope(np.array([0.0, 100, 200, 1_000]), 2.0 ** -np.array([0.0, 1, 2, 10]))


def curves(last: int = 2_000, **methods: tuple[float, float]) -> pl.DataFrame:
    """Two seeds of methods that halve the loss in so many steps, each of so many gradients.

    Losses are such that they are right when smoothed.
    """
    step = np.arange(10, last + 1, 10)
    made = []
    for (name, (steps, cost)), seed in ((one, s) for one in methods.items() for s in (0, 1)):
        y = 2.0 ** (-(step - 10) / steps)
        loss = np.append(y[0], (y[1:] - 0.95 * y[:-1]) / 0.05)
        gradients = (step * cost).astype(int)
        made.append(
            pl.DataFrame({"method": name, "seed": seed, "step": step, "loss": loss})
            .with_columns(gradients=pl.Series(gradients), forwards=pl.lit(0))
            .sample(fraction=1.0, shuffle=True, seed=seed)  # rows in any order
        )
    return pl.concat(made)


def test_speedups_at_equal_steps_and_price() -> None:
    """Of what is tuned the better rate; a method twice as fast and twice as dear is as fast."""
    table = curves(
        **{"Adam 0.1": (1_000, 1), "Adam 1": (4_000, 1), "Fast": (500, 1), "Dear": (500, 2)}
    )
    rows = benchmark_tasks.rows("a", table, HALVED)
    found = {(method, by, mark): speedup for _, method, by, mark, *_, speedup in rows}
    for mark in (500, 1_000):
        assert found[benchmark_tasks.TUNED, "steps", mark] == pytest.approx(1, rel=1e-3)
        assert found[benchmark_tasks.TUNED, "price", mark] == pytest.approx(1, rel=1e-3)
        assert found["Fast", "price", mark] == pytest.approx(2, rel=1e-3)
        assert found["Dear", "steps", mark] == pytest.approx(2, rel=1e-3)
        assert found["Dear", "price", mark] == pytest.approx(1, rel=1e-3)
    assert {mark for _, _, mark in found} == {500, 1_000, 2_000}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_has_no_speedup(bad: float) -> None:
    table = curves(Bad=(500, 1)).with_columns(
        loss=pl.when(pl.col("step").is_between(700, 800)).then(bad).otherwise("loss")
    )
    rows = benchmark_tasks.rows("a", table, HALVED)
    found = {mark: (loss, speedup) for _, _, by, mark, _, loss, speedup in rows if by == "steps"}
    assert found[500][1] > 1 and found[1_000] == (np.inf, 0)


def test_smoothing_is_the_recursion_of_each_seed() -> None:
    losses = np.random.default_rng(0).uniform(size=(2, 50))
    table = curves(500, Any=(500, 1)).sort("seed", "step").with_columns(loss=losses.ravel())
    smoothed = benchmark_tasks.curves_of(
        table.sort("seed", "loss"), "Any"
    ).loss  # steps in any order
    for row, made in zip(losses, smoothed, strict=True):
        y = row[0]
        for loss, value in zip(row, made, strict=True):
            y = y if loss == row[0] else 0.95 * y + 0.05 * loss
            assert value == pytest.approx(y)


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(0.5, 100), (2.0**-1.5, 150), (2.0**-6, 600), (1.5, 0), (0, 1_000), (np.inf, 0), (np.nan, 0)],
)
def test_steps_to_a_loss(loss: float, steps: float) -> None:
    assert float(FALLING.steps_to(loss)) == pytest.approx(steps)
    if 0 < steps < 1_000:
        assert float(FALLING.at(steps)) == pytest.approx(loss)


def test_the_mean_is_of_the_middle_half() -> None:
    scores = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 1_000.0])]
    assert interquartile_mean(scores, draws=10)[0] == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_one_seed_has_no_interval() -> None:
    value, low, high = interquartile_mean([np.array([1.0]), np.array([3.0])])
    assert value == 2.0 and np.isnan([low, high]).all()


def test_the_interval_draws_seeds_within_tasks_only() -> None:
    """Tasks that differ, but whose seeds agree, leave no uncertainty; seeds that differ do."""
    assert interquartile_mean([np.full(5, 1.0), np.full(5, 9.0)], draws=50) == (5.0, 5.0, 5.0)
    rng = np.random.default_rng(1)
    normal = [rng.normal(size=500) for _ in range(2)]
    value, low, high = interquartile_mean(normal, draws=1_000)
    # The asymptotic variance of a trimmed mean of normals is 1.19 / n for a quarter on each side.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(1.19 / 1_000), rel=0.2)
    assert low < value < high
    assert value == pytest.approx(stats.trim_mean(np.concatenate(normal), 0.25))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as the published one, of one task."""
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({"a": [[0, 100], [2.0, 0.5]]}))
    monkeypatch.setenv(FILE, str(path))
    return path


@pytest.mark.usefixtures("file")
def test_it_is_read_from_the_published_file() -> None:
    assert envelope("a").at(50) == pytest.approx(1.0)  # the geometric mean


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
@pytest.mark.parametrize("task", published.PUBLISHED)
def test_the_published_file_has_every_task(task: str) -> None:
    one = envelope(task)
    assert one.steps[0] == 0 and one.steps[-1] == pytest.approx(100_000)
    assert (np.diff(one.steps) > 0).all() and (np.diff(one.loss) <= 0).all()


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
def test_losses_are_those_of_the_published_file() -> None:
    """Two that the file has, and whose they are."""
    assert envelope("ImageMLP_FashionMnist_Relu128x128").at(978) == pytest.approx(0.373, abs=1e-3)
    assert envelope("ImageMLP_Mnist_128x128x128_Relu").at(1_957) == pytest.approx(0.051, abs=1e-3)


@pytest.mark.usefixtures("file")
def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^task of an envelope must be one of a, got 'mnist'"):
        envelope("mnist")


def test_watched_losses_are_of_minibatches_that_are_not_trained_on() -> None:
    seen = []

    def objective(params: jax.Array, i: jax.Array) -> jax.Array:
        return params * 0 + i

    guard = benchmark_tasks.watched(lossguard.unguarded(optax.sgd(1.0), nt=4), batches=3)
    state = guard.init(jnp.zeros(()))
    for cycle in range(3):
        state, decision = guard.step(state, objective)
        seen.append(decision.losses.tolist())
        assert int(state.minibatches) == 7 * (cycle + 1) and int(state.steps) == 4 * (cycle + 1)
    assert seen == [[1.0] * 4, [8.0] * 4, [15.0] * 4]


def test_watched_losses_are_before_the_cycle_and_training_is_not_changed() -> None:
    inner = lossguard.unguarded(optax.sgd(0.1), nt=2)
    plain, state = (guard.init(jnp.ones(3)) for guard in (inner, benchmark_tasks.watched(inner)))

    def objective(params: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.sum(params**2)

    for _ in range(2):
        expected = float(objective(state.params, 0))
        state, decision = benchmark_tasks.watched(inner).step(state, objective)
        plain, own = inner.step(plain, objective)
        np.testing.assert_allclose(decision.losses, expected, rtol=1e-6)
        np.testing.assert_allclose(state.params, plain.params)
        assert decision.gradients == own.gradients


def test_recipes_are_the_published_tasks() -> None:
    assert (
        benchmark_tasks.RECIPES.keys() == benchmark_tasks.TRIED.keys() == published.PUBLISHED.keys()
    )
    for name, recipe in benchmark_tasks.RECIPES.items():
        e = recipe()
        assert e.names()[-4:] == ("MLP", "MLP, rewind", "MLP, best of", "MLP, guarded")
        assert e.name == name
        assert f"Adam {e.adam_rate:g}" in e.names() and e.steps == benchmark_tasks.MARKS[-1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "mnist"}, "dataset of a published task must be 'fashion_mnist', got 'mnist'"),
        ({"batch_size": 32}, "batch_size of a published task must be 128, got 32"),
        ({"learned": "lstm-cifar10-conv"}, "learned of a published task must be 'lstm-mnist-mlp'"),
    ],
)
def test_a_published_task_is_as_it_was_published(changes, reason) -> None:
    experiment = benchmark_tasks.RECIPES["ImageMLP_FashionMnist8_Relu32"]()
    with pytest.raises(ValueError, match=f"^{reason}"):
        experiment.make_task(replace(experiment, **changes))
    with pytest.raises(ValueError, match=r"^name of a published task must be one of "):
        replace(experiment, name="mine").guards()


def test_the_exponential_decay_loses_three_orders_of_magnitude_in_100_000_steps() -> None:
    rate = benchmark_tasks.exponential(0.1)
    for step in (0, 1_000, 100_000):
        assert float(rate(step)) == pytest.approx(0.1 * np.exp(-7e-5 * step), rel=1e-4)


def test_the_root_decay_peaks_at_step_1_000() -> None:
    steps = np.array([1, 10, 1_000, 9_000])
    expected = 0.1 * np.array([0.001, 0.01, 1, 1 / 3])
    np.testing.assert_allclose(benchmark_tasks.root(0.1)(steps), expected, rtol=1e-6)
    assert float(benchmark_tasks.root(0.1)(0)) == pytest.approx(1e-4)


def small(name: str, *, scaling: str) -> Dataset:
    rng = np.random.default_rng(0)
    both = rng.integers(0, 256, (200, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, 200)
    return make_dataset(both, both, scaling=scaling, largest=255, name=name, classes=10)


def test_the_command(main, tmp_path, monkeypatch, capsys) -> None:
    """On made-up images; a second time nothing is run again."""
    name = "ImageMLP_FashionMnist8_Relu32"
    monkeypatch.setattr(published, "load_dataset", small)
    monkeypatch.setattr(benchmark_tasks, "MARKS", (10, 40))
    monkeypatch.setattr(benchmark_tasks, "LEARNED", {"LSTM": "lstm-mnist-mlp"})
    known = Envelope(np.array([0.0, 100]), np.array([3.0, 1.0]))
    monkeypatch.setattr(benchmark_tasks, "envelope", lambda task: known)
    monkeypatch.setitem(benchmark_tasks.TRIED, name, (("Adam", 0.01),))
    command = ("benchmark", "tasks", name, "--steps", "40", "--seeds", "2", "--out", tmp_path)
    main(*command)
    out = capsys.readouterr().out
    assert all(
        label in out for label in (benchmark_tasks.ENVELOPE, benchmark_tasks.TUNED, "LSTM, guarded")
    )
    numbers = pl.read_csv(tmp_path / "tasks.csv")
    assert {*numbers["method"]} == {benchmark_tasks.TUNED, "LSTM", "LSTM, guarded"}
    recorded = pl.read_parquet(tmp_path / name / "curves.parquet")
    losses = recorded.filter(method="LSTM", seed=1)["loss"].to_numpy()[::10]
    row = numbers.filter(method="LSTM", seed=1, by="steps", mark=10)
    assert row["loss"].item() == pytest.approx(0.95 * losses[0] + 0.05 * losses[1], rel=1e-6)

    monkeypatch.setattr(published, "load_dataset", None)
    monkeypatch.setattr(benchmark_tasks, "MARKS", (500,))
    main(*command)
    assert "Too short: there are numbers from step 500 on." in capsys.readouterr().out
    (tmp_path / "tasks.csv").unlink()
    (tmp_path / "tasks.csv").symlink_to(tmp_path / "elsewhere")
    main(*command)
    assert "complete already" in capsys.readouterr().out
    assert (tmp_path / "tasks.csv").is_file() and not (tmp_path / "elsewhere").exists()


def test_bad_names_are_refused(refused) -> None:
    refused(("benchmark", "task"), "did you mean tasks?")
    refused(("benchmark", "tasks", "x"), "ImageMLP_")


def test_a_missing_file_is_told_before_anything_is_run(main, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv(FILE, raising=False)
    monkeypatch.setattr(published, "load_dataset", small)
    name = "ImageMLP_FashionMnist8_Relu32"
    with pytest.raises(SystemExit) as caught:
        main("benchmark", "tasks", name, "--out", tmp_path)
    assert caught.value.code == 1
    assert f"{FILE} must name the published file" in capsys.readouterr().err
    assert not (tmp_path / name / "checkpoints").exists()
