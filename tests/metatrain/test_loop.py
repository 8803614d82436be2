"""Meta-training end to end, on few and small steps."""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import TINY, mean_loss, same

from lossguard import init_lstm_weights, load_weights, lstm_optimizer
from lossguard.learned.lstm import LSTMWeights
from lossguard.metatrain import bptt, loop
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.metatrain.loop import metatrain
from lossguard.metatrain.trainings import RECIPES
from lossguard.runs import records
from lossguard.tasks import MLP, Task


def test_records(whole: Path) -> None:
    config, made, curves = records.read_run(whole)
    assert config == {**asdict(TINY), "model": {"kind": "MLP", "hidden": [5]}}
    assert curves["meta_step"].to_list() == [0, 2, 4, 6]
    assert curves["validation"].to_numpy().shape == (4, 8)
    before, *numbers = curves.select("meta_loss", "gradient_norm").to_numpy()
    assert np.isnan(before).all() and (np.array(numbers) > 0).all()
    means = curves["validation"].to_numpy().mean(axis=1)[1:]
    assert made["best_validation"] == pytest.approx(means.min(), rel=1e-6)
    method, keys = TINY.method(), jax.random.split(jax.random.key(TINY.seed), 3)
    fresh = method.validate(method.start(keys[0])[0], keys[2])["validation"]
    np.testing.assert_allclose(curves["validation"][0], fresh, rtol=1e-6)
    assert made["data"] == ""  # digits are as they were
    assert not (whole / "checkpoints").exists()


def validated(task: Task, weights: LSTMWeights, steps: int) -> np.floating:
    """The mean loss of the validation's optimizees."""
    optimizer = lstm_optimizer(weights, scale=TINY.scale, p=TINY.p)
    _, _, validation_key = jax.random.split(jax.random.key(TINY.seed), 3)
    keys = jax.random.split(validation_key, TINY.validation_optimizees)
    return mean_loss(task, optimizer, map(jax.random.split, keys), steps)


def test_a_meta_step_goes_on_from_the_one_before(whole, tmp_path, monkeypatch) -> None:
    """With a key of its own, Adam and the curriculum where they were, and fresh optimizees."""
    step, keys, told = loop._meta_step, set(), []

    def spied(config: LSTMTraining, method: Any, state: Any, key: Any, done: Any) -> Any:
        keys.add(str(jax.random.key_data(key)))
        after, loss, norm = step(config, method, state, key, done)
        adam = jax.tree.leaves(state.adam.inner_state)
        counts = [leaf for leaf in adam if leaf.dtype == jnp.int32]
        assert counts and all(count == done for count in counts)
        assert (after.inner.step < after.inner.length).all()
        told.append((int(done), float(loss), float(norm)))
        return after, loss, norm

    monkeypatch.setattr(loop, "_meta_step", spied)
    curves = records.read_run(metatrain(TINY, tmp_path / "run").parent)[2]
    assert len(keys) == 6
    done, losses, norms = np.array(told).T
    assert done.tolist() == [0, 1, 2, 3, 4, 5]
    for name, values in (("meta_loss", losses), ("gradient_norm", norms)):
        np.testing.assert_allclose(curves[name][1:], values.reshape(3, 2).mean(axis=1), rtol=1e-6)
    assert curves.equals(records.read_run(whole)[2])


def test_rollouts_grow_to_the_longest() -> None:
    """In whole pieces, and geometrically: here by a factor of three in each of three meta-steps."""
    config = dataclasses.replace(
        TINY, optimizees=300, truncation=20, shortest=20, longest=540, curriculum=2
    )
    method, optimizer = config.method(), optax.sgd(0.1)
    fresh = jax.jit(lambda key, done: method.fresh(optimizer, key, done).length)
    ends = []
    for done in (0, 1, 2, 1000):
        length = np.asarray(fresh(jax.random.key(done), done))
        assert (length % 20 == 0).all()
        ends.append((length.min(), length.max()))
    assert ends == [(40, 60), (40, 180), (40, 540), (40, 540)]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_left_out(bad: float) -> None:
    """It would spoil the weights for the rest of meta-training."""
    adam, w = TINY.optimizer_of_weights(), jnp.zeros(2)
    gradient, state = jnp.array([3.0, -4.0]), adam.init(w)
    _, once = adam.update(gradient, state, w)
    twice, _ = adam.update(gradient, once, w)
    nothing, after = adam.update(jnp.array([bad, 1.0]), once, w)
    then, _ = adam.update(gradient, after, w)
    np.testing.assert_array_equal(nothing, [0.0, 0.0])
    np.testing.assert_array_equal(then, twice)


def test_weights_are_usable_and_say_how_they_were_made(whole: Path) -> None:
    found = load_weights(whole / loop.WEIGHTS)
    assert found.numbers == {"p": TINY.p, "scale": TINY.scale}
    _, made, _ = records.read_run(whole)
    assert found.made == {
        "made": " ".join(made["command"]),
        "commit": str(made["commit"]),
        "time": made["time"],
        "dataset": "digits",
        "best_validation": f"{made['best_validation']:.4f}",
    }
    assert not same(found.weights, init_lstm_weights(jax.random.key(0), hidden=4, layers=1))


def test_weights_that_were_lost_are_not_told_to_be_there(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    file = folder / loop.WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^weights must be a complete \.safetensors file"):
        metatrain(TINY, folder, resume=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"run has lost its weights\.safetensors: choose another"):
        metatrain(TINY, folder, resume=True)


def test_kept_weights_have_the_validation_that_is_told(whole: Path) -> None:
    """By an independent loop."""
    _, made, _ = records.read_run(whole)
    weights = load_weights(whole / loop.WEIGHTS).weights
    expected = validated(TINY.method().task, weights, TINY.validation_steps)
    np.testing.assert_allclose(made["best_validation"], expected, rtol=1e-5)


def answering(answers: list[float], seen: list[LSTMWeights]) -> Callable[..., Any]:
    """A validation that gives these answers, but the least of fresh weights; and notes of what."""

    def validate(config: LSTMTraining, task: Any, weights: LSTMWeights, key: Any) -> np.ndarray:
        seen.append(jax.tree.map(np.asarray, weights))
        return np.full(config.validation_steps, [0.1, *answers][len(seen) - 1])

    return validate


@pytest.mark.parametrize(
    ("answers", "select", "kept"),
    [
        ((3, 1, 2), True, 1),
        ((1, 2, 3), True, 0),
        ((np.nan, np.inf, 5), True, 2),
        ((2, np.nan, 2), True, 0),
        ((1, 2, 3), False, 2),
        ((3, 1, np.nan), False, 1),
    ],
)
def test_lowest_or_last_weights_are_kept(tmp_path, monkeypatch, answers, select, kept) -> None:
    seen: list[LSTMWeights] = []
    monkeypatch.setattr(bptt, "_validate", answering(answers, seen))
    file = metatrain(dataclasses.replace(TINY, select=select), tmp_path / "run")
    assert [same(load_weights(file).weights, weights) for weights in seen] == [
        number == kept + 1 for number in range(4)
    ]
    assert records.read_run(tmp_path / "run").manifest["best_validation"] == answers[kept]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("decay", [False, True])
def test_meta_optimizer_does_only_what_is_asked_for(clip: float | None, decay: bool) -> None:
    """Against Adam's formula, with gradients that clipping would change, halfway to the end."""
    config = dataclasses.replace(TINY, clip=clip, decay=decay, meta_steps=4, rate=0.1, b2=0.9)
    optimizer = config.optimizer_of_weights()
    weights = jnp.zeros(2)
    state, m, v = optimizer.init(weights), np.zeros(2), np.zeros(2)
    for t, raw in enumerate(np.array([[3.0, 4.0], [30.0, -40.0], [0.3, 0.4]])):
        update, state = optimizer.update(jnp.asarray(raw), state, weights)
        g = raw / max(1.0, np.linalg.norm(raw)) if clip else raw
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
        rate = 0.1 * (1 + np.cos(np.pi * t / 4)) / 2 if decay else 0.1
        expected = -rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_the_papers_recipe_does_nothing_that_the_paper_does_not_state() -> None:
    config = RECIPES["mnist-mlp-paper"]()
    assert (config.truncation, config.shortest, config.longest) == (20, 100, 100)
    assert (config.meta_steps, config.optimizees, config.batch_size) == (10_000, 1, 128)
    assert (config.clip, config.decay, config.select, config.curriculum) == (None, False, False, 0)
    assert (config.model, config.hidden, config.layers) == (MLP((20,)), 20, 2)


def test_no_weights_are_kept_if_all_diverged(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bptt, "_validate", answering([np.nan] * 3, []))
    with pytest.raises(ValueError, match=r"^no validation of tiny was finite: "):
        metatrain(TINY, tmp_path / "run")
    assert not (tmp_path / "run" / loop.WEIGHTS).exists()


def test_command_line(main, tmp_path, capsys) -> None:
    (tmp_path / "mine.py").write_text(
        "from lossguard.metatrain.bptt import LSTMTraining\n"
        "from lossguard.tasks import MLP\n"
        f"def recipe():\n    return {TINY}\n"
    )
    main("metatrain", "mine.py:recipe", "--out", "out")
    out = capsys.readouterr().out
    assert out == "weights: out/weights.safetensors\nfigure: out/figure.png\nrecords: out\n"
    assert load_weights("out/weights.safetensors").made["made"] == " ".join(sys.argv)
    assert Path("out/figure.png").read_bytes().startswith(b"\x89PNG")
