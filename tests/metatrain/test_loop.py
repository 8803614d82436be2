"""Meta-training end to end, on few and small steps."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from matplotlib.figure import Figure

from lossguard import (
    cli,
    drawing,
    init_lstm_weights,
    load_weights,
    lstm_optimizer,
    records,
    run_folder,
)
from lossguard.config import as_config
from lossguard.learned.lstm import LSTMWeights
from lossguard.learned.weights_file import pretrained_names
from lossguard.metatrain import bptt, figure, loop
from lossguard.metatrain.bptt import Backpropagation, LSTMTraining
from lossguard.metatrain.loop import metatrain
from lossguard.metatrain.recipes import RECIPES
from lossguard.tasks import MLP, Dataset, Task, load_dataset

VALIDATE = Backpropagation.validate
TINY = LSTMTraining(
    name="tiny",
    dataset="digits",
    model=MLP(hidden=(5,)),
    batch_size=16,
    optimizees=2,
    truncation=4,
    shortest=4,
    longest=12,
    meta_steps=6,
    hidden=4,
    layers=1,
    validate_every=2,
    validation_steps=8,
    validation_optimizees=3,
    scale=0.05,
    p=8.0,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return metatrain(TINY, tmp_path_factory.mktemp("whole") / "run").parent


def same(a: LSTMWeights, b: LSTMWeights) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_records(whole: Path) -> None:
    config, made, curves = records.read_run(whole)
    assert config == {**asdict(TINY), "model": {"kind": "MLP", "hidden": [5]}, "others": []}
    assert curves["meta_step"].to_list() == [2, 4, 6]
    assert curves["validation"].to_numpy().shape == (3, 8)
    numbers = curves.select("meta_loss", "gradient_norm").to_numpy()
    assert np.isfinite(numbers).all() and (numbers > 0).all()
    means = curves["validation"].to_numpy().mean(axis=1)
    assert made["best_validation"] == pytest.approx(means.min(), rel=1e-6)
    assert made["data"] == ""  # digits are as they were
    assert not (whole / "checkpoints").exists()


def first_losses(dataset: Dataset) -> np.floating:
    """The mean loss of the validation's optimizees before their first step."""
    task = Task(dataset, TINY.model, TINY.batch_size)
    _, _, validation_key = jax.random.split(jax.random.key(TINY.seed), 3)
    losses = []
    for key in jax.random.split(validation_key, TINY.validation_optimizees):
        init_key, order_key = jax.random.split(key)
        losses.append(task.objective(order_key)(task.init(init_key), 0))
    return np.mean(losses)


def test_a_meta_step_goes_on_from_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        np.testing.assert_allclose(curves[name], values.reshape(3, 2).mean(axis=1), rtol=1e-6)
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


@pytest.mark.usefixtures("eager")
def test_settings_reach_the_task_and_the_optimizer() -> None:
    config = dataclasses.replace(TINY, scaling="symmetric", scale=0.02, p=7.0)
    task = config.method().task
    other = dataclasses.replace(TINY, others=("moons",)).method().others
    assert (float(task.dataset.offset), task.batch_size, task.model) == (8, 16, TINY.model)
    assert (other["moons"].batch_size, other["moons"].model) == (16, TINY.model)
    weights, gradient = init_lstm_weights(jax.random.key(0), hidden=4), jnp.array([1e-4, -3.0])
    updates = [
        optimizer.update(gradient, optimizer.init(gradient))[0]
        for optimizer in (config.optimizer(weights), lstm_optimizer(weights, scale=0.02, p=7.0))
    ]
    np.testing.assert_array_equal(*updates)


def without_kinds(config: Any) -> Any:
    """Older records don't have the kinds of models."""
    if isinstance(config, list):
        return [without_kinds(one) for one in config]
    if isinstance(config, dict):
        return {name: without_kinds(one) for name, one in config.items() if name != "kind"}
    return config


def test_shipped_recipes_are_those_of_the_records() -> None:
    results = Path(__file__).parents[2] / "results"
    if not results.is_dir():
        pytest.skip("there are no records here")
    for name, recipe in RECIPES.items():
        if recipe().name not in pretrained_names():
            continue
        folder = results / f"metatrain-{name}"
        config = json.loads((folder / records.CONFIG).read_text())
        ours, config = (without_kinds(one) for one in (as_config(recipe()), config))
        assert {field: ours[field] for field in config} == config


def test_other_data_is_validated_on_and_changes_nothing(whole: Path, tmp_path: Path) -> None:
    file = metatrain(dataclasses.replace(TINY, others=("moons",)), tmp_path / "run")
    curves = records.read_run(file.parent)[2]
    moons = curves["validation_moons"].to_numpy()
    assert moons.shape == (3, 8) and np.isfinite(moons).all()
    np.testing.assert_allclose(moons[:, 0], first_losses(load_dataset("moons")), rtol=1e-5)
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)
    assert records.read_run(whole)[2].equals(curves.drop("validation_moons"))


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


def test_kept_weights_have_the_validation_that_is_told(whole: Path) -> None:
    """An independent loop over the validation's optimizees."""
    _, made, _ = records.read_run(whole)
    weights = load_weights(whole / loop.WEIGHTS).weights
    optimizer = lstm_optimizer(weights, scale=TINY.scale, p=TINY.p)
    task = TINY.method().task
    _, _, validation_key = jax.random.split(jax.random.key(TINY.seed), 3)

    @jax.jit
    def losses(key: jax.Array) -> jax.Array:
        init_key, order_key = jax.random.split(key)
        params = task.init(init_key)
        state, objective, seen = optimizer.init(params), task.objective(order_key), []
        for i in range(TINY.validation_steps):
            loss, gradient = jax.value_and_grad(objective)(params, i)
            updates, state = optimizer.update(gradient, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            seen.append(loss)
        return jnp.stack(seen)

    each = [losses(key) for key in jax.random.split(validation_key, TINY.validation_optimizees)]
    np.testing.assert_allclose(np.mean(each), made["best_validation"], rtol=1e-5)


def answering(answers: list[float], seen: list[LSTMWeights]) -> Callable[..., Any]:
    """A validation that gives these answers, and remembers of what."""

    def validate(config: LSTMTraining, task: Any, weights: LSTMWeights, key: Any) -> np.ndarray:
        seen.append(jax.tree.map(np.asarray, weights))
        return np.full(config.validation_steps, answers[len(seen) - 1])

    return validate


@pytest.mark.parametrize(
    ("answers", "kept"),
    [((3, 1, 2), 1), ((1, 2, 3), 0), ((np.nan, np.inf, 5), 2), ((2, np.nan, 2), 0)],
)
def test_lowest_validation_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[float], kept: int
) -> None:
    seen: list[LSTMWeights] = []
    monkeypatch.setattr(bptt, "_validate", answering(answers, seen))
    file = metatrain(TINY, tmp_path / "run")
    assert [same(load_weights(file).weights, weights) for weights in seen] == [
        number == kept for number in range(3)
    ]


@pytest.mark.parametrize(("answers", "kept"), [((1, 2, 3), 2), ((3, 1, np.nan), 1)])
def test_last_weights_are_kept_if_none_are_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[float], kept: int
) -> None:
    seen: list[LSTMWeights] = []
    monkeypatch.setattr(bptt, "_validate", answering(answers, seen))
    file = metatrain(dataclasses.replace(TINY, select=False), tmp_path / "run")
    assert same(load_weights(file).weights, seen[kept])
    manifest = records.read_run(tmp_path / "run").manifest
    assert manifest["best_validation"] == answers[kept]


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


def test_no_weights_are_kept_if_all_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bptt, "_validate", answering([np.nan] * 3, []))
    with pytest.raises(ValueError, match=r"^no validation of tiny was finite: "):
        metatrain(TINY, tmp_path / "run")
    assert not (tmp_path / "run" / loop.WEIGHTS).exists()


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, stop: Callable[[], None]) -> list[int]:
    """Have something happen within a meta-step; returns the list of those that are done."""
    step, done = loop._meta_step, []

    def stepped(*arguments: Any) -> Any:
        done.append(int(arguments[-1]))
        if len(done) == at:
            stop()
        return step(*arguments)

    monkeypatch.setattr(loop, "_meta_step", stepped)
    return done


@pytest.mark.parametrize(
    ("at", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (3, signal.SIGINT)]
)
def test_stopped_it_goes_on_to_the_same_weights(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    number: signal.Signals,
) -> None:
    """Between two validations, and at one; no meta-step is lost."""
    monkeypatch.setattr(loop.Progress, "seconds", 10.0)  # of each part
    done = stopping(monkeypatch, at, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        metatrain(TINY, tmp_path / "run")
    started = json.loads((tmp_path / "run" / run_folder.STARTED).read_text())
    with pytest.raises(ValueError, match="add --resume"):
        metatrain(TINY, tmp_path / "run")
    file = metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 4, 5]
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)
    found, expected = (records.read_run(folder)[2] for folder in (file.parent, whole))
    assert found.equals(expected) and found.schema == expected.schema

    _, made, _ = records.read_run(file.parent)
    assert made["seconds"] == 20
    assert made == {**made, **started} and [*made["resumed"][0]] == ["time", "commit"]
    assert load_weights(file).made["time"] == started["time"]
    assert not (file.parent / run_folder.STARTED).exists()


@pytest.mark.parametrize("look", [2, 3, 4])
def test_a_signal_between_two_looks_at_it_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    looks: list[int] = []

    @contextmanager
    def stopping_at_a_look() -> Iterator[Callable[[], bool]]:
        yield lambda: bool(looks.append(1)) or len(looks) >= look

    done = stopping(monkeypatch, -1, lambda: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "stopping_at_interrupt", stopping_at_a_look)
        metatrain(TINY, tmp_path / "run")
    metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 4, 5]


def test_what_was_saved_a_minute_ago_is_not_done_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    done = stopping(monkeypatch, 4, lost)
    with pytest.raises(OSError, match="the disk is gone"):
        metatrain(TINY, tmp_path / "run")
    file = metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 3, 4, 5]
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)


def test_killed_while_it_validates_it_has_saved(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = stopping(monkeypatch, -1, lambda: None)
    for lost in range(1, 4):  # its first validation, its second one, ...
        validations = []

        def validate(*arguments: Any, so_far: list = validations, lost: int = lost) -> Any:
            so_far.append(1)
            if len(so_far) == lost:
                raise OSError("killed")
            return VALIDATE(*arguments)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
            patch.setattr(Backpropagation, "validate", validate)
            metatrain(TINY, tmp_path / str(lost))
        file = metatrain(TINY, tmp_path / str(lost), resume=True)
        assert done == [0, 1, 2, 3, 4, 5]
        done.clear()
        found, expected = (records.read_run(folder)[2] for folder in (file.parent, whole))
        assert found.equals(expected)


def test_its_progress_moves_with_every_meta_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        loop.Progress, "advance", lambda _, steps, **now: told.append((steps, now["loss"]))
    )
    metatrain(TINY, tmp_path / "run")
    assert [steps for steps, _ in told] == [1] * 6
    assert np.isfinite([loss for _, loss in told]).all()


def test_other_data_than_it_was_started_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        metatrain(TINY, tmp_path / "run")
    monkeypatch.setattr(Dataset, "checksum", lambda _: "of other data")
    with pytest.raises(
        ValueError,
        match=r"^a run must go on with what it was started with, but the data changed since .*run "
        r"was started: choose another --out, or put back what there was$",
    ):
        metatrain(TINY, tmp_path / "run", resume=True)


def test_finished_it_is_left_as_it_is(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert metatrain(TINY, whole, resume=True) == whole / loop.WEIGHTS
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_checkpoints_that_a_kill_left_of_a_finished_one_go(whole: Path) -> None:
    (whole / "checkpoints").mkdir()
    metatrain(TINY, whole, resume=True)
    assert not (whole / "checkpoints").exists()


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lossguard.metatrain.bptt import LSTMTraining\n"
        "from lossguard.tasks import MLP\n"
        f"def recipe():\n    return {TINY}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lossguard", "metatrain", "mine.py:recipe", "--out", "out"])
    cli.main()
    out = capsys.readouterr().out
    assert out == "weights: out/weights.safetensors\nfigure: out/figure.png\nrecords: out\n"
    assert load_weights("out/weights.safetensors").made["made"] == " ".join(sys.argv)
    assert Path("out/figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [8, 60, 100, 300])
def test_figure_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The lines are the record's: windows of 50 validation steps, the row that was kept."""
    drawn: list[Figure] = []
    monkeypatch.setattr(
        figure, "save", lambda of, folder: drawn.append(of) or drawing.save(of, folder)
    )
    run_folder.open_folder(tmp_path / "run", {"name": "mine $_{$"})
    validation, moons = 1 + np.random.default_rng(0).random((2, 4, steps))
    validation[2] = np.nan
    columns = {"meta_step": [1, 2, 3, 4], "meta_loss": [4.0, 3.0, 2.0, 1.0]}
    columns |= {"validation": validation, "validation_moons": moons}
    records.write_parquet(tmp_path / "run" / records.CURVES, pl.DataFrame(columns))
    run_folder.finish(tmp_path / "run", {"data": "JPEG q75"})
    file = figure.plot(tmp_path / "run", records.read_run(tmp_path / "run"))
    assert file.read_bytes().startswith(b"\x89PNG")

    assert drawn[0].get_suptitle() == "mine $_{$ (JPEG q75)"
    left, right, others = ([line.get_ydata() for line in of.lines] for of in drawn[0].axes)
    first = {8: [0], 60: [0, 10], 100: [0, 50], 300: [0, 50, 250]}[steps]
    means = [validation[:, i : i + 50].mean(axis=1) for i in first]
    np.testing.assert_allclose(left, [[4.0, 3.0, 2.0, 1.0], *means])
    kept = np.nanargmin(validation.mean(axis=1))
    np.testing.assert_array_equal(right, [validation[0], validation[kept]])
    np.testing.assert_allclose(others, [moons[:, :100][:, -10:].mean(axis=1) / moons[:, 0]])


def test_figure_where_all_is_lost(tmp_path: Path) -> None:
    run_folder.open_folder(tmp_path / "run", {"name": "mine"})
    columns = {"meta_step": [1, 2], "meta_loss": [1.0, 1.0], "validation": np.full((2, 60), np.nan)}
    records.write_parquet(tmp_path / "run" / records.CURVES, pl.DataFrame(columns))
    run_folder.finish(tmp_path / "run", {})
    assert figure.plot(tmp_path / "run", records.read_run(tmp_path / "run")).is_file()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(
            ({name: 0}, f"^{name} must be an integer of at least 1, got 0$")
            for name in (*loop.COUNTS, *bptt.COUNTS, "batch_size", "hidden", "layers")
        ),
        *(
            ({name: value}, f"^{name} must be positive and finite, got {value}$")
            for name in ("rate", "clip", "scale")
            for value in (0.0, np.inf)
        ),
        *(
            ({name: 1}, f"^{name} must be an integer of at least 2, got 1$")
            for name in loop.LENGTHS
        ),
        ({"longest": 10**11}, "^longest must be at most 2147483647, got 100000000000$"),
        ({"hidden": 10_001}, "^hidden must be at most 10000, got 10001$"),
        ({"layers": 101}, "^layers must be at most 100, got 101$"),
        ({"optimizees": 10_001}, "^optimizees must be at most 10000, got 10001$"),
        ({"b2": 1.0}, "^b2 must be at least 0 and below 1, got 1.0$"),
        ({"b2": -0.1}, "^b2 must be at least 0 and below 1, got -0.1$"),
        ({"curriculum": -1}, "^curriculum must be an integer of at least 0, got -1$"),
        ({"seed": 2**32}, "^seed must be at most 4294967295, got 4294967296$"),
        ({"seed": -1}, "^seed must be an integer of at least 0, got -1$"),
        ({"shortest": 13}, "^longest must be at least shortest, which is 13, got 12$"),
        ({"batch_size": 2000}, "^batch_size must be between 1 and samples = 1[0-9]*, got 2000"),
        ({"dataset": "digit"}, "did you mean digits"),
        ({"scaling": "none"}, "^scaling must be one of "),
    ],
)
def test_bad_fields_leave_no_folder(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        metatrain(dataclasses.replace(TINY, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another, which differs in "):
        metatrain(dataclasses.replace(TINY, rate=0.1), whole, resume=True)


@dataclass(frozen=True)
class Wider(MLP):
    """Another model with the same fields."""


def test_another_model_is_refused(whole: Path) -> None:
    wider = dataclasses.replace(TINY, model=Wider(hidden=TINY.model.hidden))
    with pytest.raises(ValueError, match=r"differs in model \(.*'MLP'.*, not .*'Wider'"):
        metatrain(wider, whole, resume=True)


@dataclass(frozen=True)
class OfAFile(LSTMTraining):
    """A user's own, with a field of its own."""

    file: Any = None


def test_fields_of_ones_own(whole: Path, tmp_path: Path) -> None:
    """A path is told, and goes on; what JSON can't hold leaves no folder."""
    given = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    mine = OfAFile(**given, file=Path("words.txt"))
    run_folder.open_folder(tmp_path / "run", as_config(mine))
    file = metatrain(mine, tmp_path / "run", resume=True)
    assert records.read_run(file.parent).config["file"] == "words.txt"
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)
    with pytest.raises(ValueError, match=r"^a run must be of numbers, .*, but holds b'words'$"):
        metatrain(dataclasses.replace(mine, file=b"words"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
