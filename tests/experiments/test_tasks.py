"""The benchmark on published tasks: made-up curves with known answers, and the command itself."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

import lossguard
from lossguard import cli
from lossguard.experiments import tasks
from lossguard.experiments.envelope import FILE, Envelope, smoothed
from lossguard.tasks import published
from lossguard.tasks.dataset import Dataset, make_dataset

HALVED = Envelope(np.array([0.0, 100_000]), np.array([1.0, 2.0**-100]))
"""It halves the loss every 1,000 steps."""


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
    found = {(row.method, row.by, row.mark): row.speedup for row in tasks.rows("a", table, HALVED)}
    for mark in (500, 1_000):
        assert found[tasks.TUNED, "steps", mark] == pytest.approx(1, rel=1e-3)
        assert found[tasks.TUNED, "price", mark] == pytest.approx(1, rel=1e-3)
        assert found["Fast", "price", mark] == pytest.approx(2, rel=1e-3)
        assert found["Dear", "steps", mark] == pytest.approx(2, rel=1e-3)
        assert found["Dear", "price", mark] == pytest.approx(1, rel=1e-3)
    assert {mark for _, _, mark in found} == {500, 1_000, 2_000}


def test_a_loss_that_is_not_finite_has_no_speedup() -> None:
    table = curves(Bad=(500, 1)).with_columns(
        loss=pl.when(pl.col("step") > 700).then(float("nan")).otherwise(pl.col("loss"))
    )
    found = {row.mark: row for row in tasks.rows("a", table, HALVED) if row.by == "steps"}
    assert found[500].speedup > 1
    assert found[1_000].speedup == 0 and found[1_000].loss == np.inf


def test_watched_losses_are_of_minibatches_that_are_not_trained_on() -> None:
    seen = []

    def objective(params: jax.Array, i: jax.Array) -> jax.Array:
        return params * 0 + i

    guard = tasks.watched(lossguard.unguarded(optax.sgd(1.0), nt=4), batches=3)
    state = guard.init(jnp.zeros(()))
    for cycle in range(3):
        state, decision = guard.step(state, objective)
        seen.append(decision.losses.tolist())
        assert int(state.minibatches) == 7 * (cycle + 1) and int(state.steps) == 4 * (cycle + 1)
    assert seen == [[1.0] * 4, [8.0] * 4, [15.0] * 4]


def test_watched_losses_are_before_the_cycle_and_training_is_not_changed() -> None:
    inner = lossguard.unguarded(optax.sgd(0.1), nt=2)
    plain, state = (guard.init(jnp.ones(3)) for guard in (inner, tasks.watched(inner)))

    def objective(params: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.sum(params**2)

    for _ in range(2):
        expected = float(objective(state.params, 0))
        state, decision = tasks.watched(inner).step(state, objective)
        plain, own = inner.step(plain, objective)
        np.testing.assert_allclose(decision.losses, expected, rtol=1e-6)
        np.testing.assert_allclose(state.params, plain.params)
        assert decision.gradients == own.gradients


def test_recipes_are_the_published_tasks() -> None:
    assert tasks.RECIPES.keys() == tasks.TRIED.keys() == published.PUBLISHED.keys()
    for name, recipe in tasks.RECIPES.items():
        e = recipe()
        assert e.methods[-3:] == ("MLP", "MLP, rewind", "MLP, guarded")
        assert e.name == name
        assert f"Adam {e.adam_rate:g}" in e.methods and e.steps == tasks.MARKS[-1]


def test_the_exponential_decay_loses_three_orders_of_magnitude_in_100_000_steps() -> None:
    rate = tasks.exponential(0.1)
    for step in (0, 1_000, 100_000):
        assert float(rate(step)) == pytest.approx(0.1 * np.exp(-7e-5 * step), rel=1e-4)


def test_the_root_decay_peaks_at_step_1_000() -> None:
    steps = np.array([1, 10, 1_000, 9_000])
    expected = 0.1 * np.array([0.001, 0.01, 1, 1 / 3])
    np.testing.assert_allclose(tasks.root(0.1)(steps), expected, rtol=1e-6)
    assert float(tasks.root(0.1)(0)) == pytest.approx(1e-4)


def small(name: str, *, scaling: str) -> Dataset:
    rng = np.random.default_rng(0)
    both = rng.integers(0, 256, (200, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, 200)
    return make_dataset(both, both, scaling=scaling, largest=255, name=name, classes=10)


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    """On made-up images; a second time nothing is run again."""
    name = "ImageMLP_FashionMnist8_Relu32"
    monkeypatch.setattr(published, "load_dataset", small)
    monkeypatch.setattr(tasks, "MARKS", (10, 40))
    monkeypatch.setattr(tasks, "LEARNED", {"LSTM": "lstm-mnist-mlp"})
    known = Envelope(np.array([0.0, 100]), np.array([3.0, 1.0]))
    monkeypatch.setattr(tasks, "envelope", lambda task: known)
    monkeypatch.setitem(tasks.TRIED, name, (("Adam", 0.01),))
    given = ("--steps", "40", "--seeds", "2", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lossguard", "benchmark", "tasks", name, *given])
    cli.main()
    out = capsys.readouterr().out
    assert all(label in out for label in (tasks.ENVELOPE, tasks.TUNED, "LSTM, guarded"))
    numbers = pl.read_csv(tmp_path / "tasks.csv")
    assert {*numbers["method"]} == {tasks.TUNED, "LSTM", "LSTM, rewind", "LSTM, guarded"}
    recorded = pl.read_parquet(tmp_path / name / "curves.parquet")
    losses = recorded.filter(method="LSTM", seed=1)["loss"].to_numpy()[::10]
    row = numbers.filter(method="LSTM", seed=1, by="steps", mark=10)
    assert row["loss"].item() == pytest.approx(smoothed(losses)[1], rel=1e-6)

    monkeypatch.setattr(published, "load_dataset", None)
    cli.main()
    assert "complete already" in capsys.readouterr().out


def test_bad_names_are_refused(monkeypatch, capsys) -> None:
    for arguments, part in ((("task",), "did you mean tasks?"), (("tasks", "x"), "ImageMLP_")):
        monkeypatch.setattr(sys, "argv", ["lossguard", "benchmark", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert part in capsys.readouterr().err


def test_a_missing_file_is_told_before_anything_is_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv(FILE, raising=False)
    monkeypatch.setattr(published, "load_dataset", small)
    name = "ImageMLP_FashionMnist8_Relu32"
    given = ["lossguard", "benchmark", "tasks", name, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert f"{FILE} must name the published file" in capsys.readouterr().err
    assert not (tmp_path / name / "methods").exists()
