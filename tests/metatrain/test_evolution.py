"""Meta-training by evolution strategies end to end, on few and small steps."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import mean_loss, same, stopping

from lossguard import load_weights, save_weights
from lossguard.learned.mlp import mlp_optimizer
from lossguard.metatrain import figure, loop
from lossguard.metatrain.evolution import VALIDATION_ROLLOUTS, MLPTraining, like_momentum
from lossguard.metatrain.family import Member, reference
from lossguard.metatrain.loop import metatrain
from lossguard.runs import folder as run_folder
from lossguard.runs import records
from lossguard.runs.drawing import save
from lossguard.tasks import MLP

HELD_OUT = Member("moons", MLP(()), batch_size=16)
TINY = MLPTraining(
    name="tiny",
    truncation=2,
    shortest=2,
    longest=6,
    meta_steps=4,
    hidden=2,
    layers=1,
    family=(
        Member("circles", MLP(()), batch_size=16, pairs=3),
        Member("spirals", MLP(()), batch_size=16, pairs=2),
    ),
    held_out=(HELD_OUT,),
    validate_every=2,
    validation_steps=4,
    sigma=0.02,
)

SHORT = dataclasses.replace(TINY, family=TINY.family[:1], meta_steps=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return metatrain(TINY, tmp_path_factory.mktemp("whole") / "run").parent


def test_records(whole: Path) -> None:
    config, made, curves = records.read_run(whole)
    assert config["family"][0]["dataset"] == "circles"
    assert curves["meta_step"].to_list() == [0, 2, 4]
    np.testing.assert_allclose(
        curves["validation"].to_numpy(), curves["validation_moons-mlp-"].to_numpy(), rtol=1e-5
    )
    assert load_weights(whole / loop.WEIGHTS).made["family"] == "circles-mlp-, spirals-mlp-"
    assert made["best_validation"] == pytest.approx(
        curves["validation"].to_numpy()[1:].mean(axis=1).min(), rel=1e-5
    )
    assert save(figure.draw(records.read_run(whole)), whole).is_file()


def test_kept_weights_have_the_validation_that_is_told(whole: Path) -> None:
    """By an independent loop."""
    task, optimizer = HELD_OUT.task(), mlp_optimizer(load_weights(whole / loop.WEIGHTS).weights)
    _, _, validation_key = jax.random.split(jax.random.key(TINY.seed), 3)
    keys = [
        jax.random.split(key, 3)[::2]
        for key in jax.random.split(validation_key, VALIDATION_ROLLOUTS)
    ]
    expected = mean_loss(task, optimizer, keys, TINY.validation_steps) / reference(task)
    _, made, _ = records.read_run(whole)
    assert expected == pytest.approx(made["best_validation"], rel=1e-4)


def test_stopped_it_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch) -> None:
    done = stopping(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        metatrain(TINY, tmp_path / "run")
    file = metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3]
    assert records.read_run(file.parent)[2].equals(records.read_run(whole)[2])
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)


def test_other_weights_than_it_went_on_from_are_refused(whole: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    first.write_bytes((whole / loop.WEIGHTS).read_bytes())
    config = dataclasses.replace(SHORT, start_from=str(first))
    folder = metatrain(config, tmp_path / "run").parent
    assert "the file first.safetensors" in records.read_run(folder)[1][records.INPUTS]

    (tmp_path / "again").mkdir()
    for name in (records.CONFIG, records.MANIFEST):  # as one that was killed before it had saved
        to = {records.MANIFEST: run_folder.STARTED}.get(name, name)
        (tmp_path / "again" / to).write_bytes((folder / name).read_bytes())
    save_weights(first, like_momentum(jax.random.key(1)), made={})
    with pytest.raises(ValueError, match=r"but the file first\.safetensors changed since"):
        metatrain(config, tmp_path / "again", resume=True)


def test_rollouts_that_are_over_begin_again() -> None:
    method = dataclasses.replace(SHORT, longest=2).method()  # of one piece each
    key = jax.random.key(0)
    weights, inner = method.start(key)
    _, _, after = eqx.filter_jit(method.gradient)(weights, inner, key, jnp.int32(0))
    for pairs in after.values():
        assert not pairs.plus.step.any() and not jax.tree.leaves(pairs.walked)[0].any()
    longer = dataclasses.replace(SHORT, shortest=4, longest=4).method()
    weights, inner = longer.start(key)
    _, gradient, after = eqx.filter_jit(longer.gradient)(weights, inner, key, jnp.int32(0))
    for pairs in after.values():
        assert (pairs.plus.step == 2).all() and (pairs.minus.length == 4).all()
        assert jax.tree.leaves(pairs.walked)[0].any()
    trained = jax.tree.leaves(gradient._replace(scheduler=None))
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in trained)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.scheduler))


@pytest.mark.parametrize("stage", ["rule", "scheduler"])
def test_a_stage_trains_its_own_part(whole: Path, tmp_path: Path, stage: str) -> None:
    """Of given weights, whatever their size."""
    given = whole / loop.WEIGHTS
    config = dataclasses.replace(SHORT, start_from=str(given), stage=stage, hidden=7)
    files = given, metatrain(config, tmp_path / "run")
    before, after = (load_weights(file).weights for file in files)
    for trained, was, now in (
        (stage == "scheduler", before.scheduler, after.scheduler),
        (stage == "rule", before._replace(scheduler=None), after._replace(scheduler=None)),
    ):
        pairs = zip(jax.tree.leaves(was), jax.tree.leaves(now), strict=True)
        changed = [not np.array_equal(*pair) for pair in pairs]
        assert all(changed) if trained else not any(changed)


def test_it_begins_as_a_momentum_method() -> None:
    """Whatever the others of its hidden units do, up to their noise."""
    weights = like_momentum(jax.random.key(0), rate=0.01)
    optimizer = mlp_optimizer(weights)
    w = jax.random.normal(jax.random.key(1), (6, 5))
    update, state, m = jax.jit(optimizer.update), optimizer.init(w), 0.0
    for k in range(3):
        gradient = jax.random.normal(jax.random.key(k), w.shape)
        ours, state = update(gradient, state, w)
        m = 0.9 * m + 0.1 * gradient
        scale = (30 / 1000) ** -0.25 * ((1 + k / 1000) * (1 + k / 10_000)) ** -0.5
        expected = -0.01 * scale * m / jnp.sqrt(jnp.mean(m**2) + 1e-5)
        np.testing.assert_allclose(ours, expected, atol=2e-3)
        assert jnp.abs(ours).max() > 0.02


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"family": (Member("moons", MLP(()), pairs=0),)},
            "^pairs must be an integer of at least 1, got 0$",
        ),
        ({"stage": "both"}, "^stage must be one of rule, scheduler, got 'both'$"),
        ({"hidden": 1}, "^hidden must be an integer of at least 2, got 1$"),
        ({"sigma": 0.0}, "^sigma must be positive and finite, got 0.0$"),
        (
            {"start_from": "lstm-mnist-mlp"},
            "^start_from must be an MLP optimizer, got lstm-mnist-mlp, an LSTM$",
        ),
        ({"start_from": "mlp"}, "^learned optimizer must be one of lstm-.*, got 'mlp'$"),
        ({"family": ()}, "^family must have members, got none$"),
        *(
            (held_out, "^family and held_out must have members of different titles, got .* twice$")
            for held_out in ({"held_out": (HELD_OUT, HELD_OUT)}, {"held_out": TINY.family[:1]})
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_fields_leave_no_folder(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        metatrain(dataclasses.replace(TINY, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
