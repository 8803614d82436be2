"""Rollouts on a family of tasks, and how their losses are made comparable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lossguard.metatrain.family import (
    FLOOR,
    WORST,
    Member,
    begin,
    go_on,
    meta_loss,
    reference,
    relative,
)
from lossguard.metatrain.trainings import mlp_small, mlp_small_longer
from lossguard.tasks import MLP, Task, moons
from lossguard.tasks.goals import CLASSIFICATION
from lossguard.tasks.models import ReluMLP
from lossguard.tasks.published import PUBLISHED

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(moons(samples=200), MLP((3,)), batch_size=16)


def test_a_rollout_trains_in_coordinates_of_its_own(task: Task) -> None:
    """SGD at rate r on w / c is SGD on w at the rate r c^2 of each tensor."""
    optimizer = optax.sgd(0.5)

    @jax.jit
    def ours(key: jax.Array) -> tuple:
        rollout = begin(task, optimizer, key, jnp.int32(8), rescaling=3.0)
        return rollout, *go_on(task, optimizer, rollout, 4)

    rollout, losses, after = ours(KEY)
    factors = np.array(jax.tree.leaves(rollout.factors))
    assert (factors > 1 / 3).all() and (factors < 3).all() and len({*factors.tolist()}) == 4
    w = jax.tree.map(jnp.multiply, rollout.params, rollout.factors)
    first_key, _, _ = jax.random.split(KEY, 3)
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(task.init(first_key)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    slope = jax.jit(jax.value_and_grad(task.objective(rollout.key)))
    for i, loss in enumerate(losses):
        expected, gradient = slope(w, i)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        w = jax.tree.map(lambda a, g, c: a - 0.5 * c**2 * g, w, gradient, rollout.factors)
    assert (int(after.step), int(after.length), bool(after.lost)) == (4, 8, False)


def test_a_rollout_that_diverges_is_lost(task: Task) -> None:
    optimizer = optax.sgd(jnp.inf)
    rollout = begin(task, optimizer, KEY, jnp.int32(8))
    losses, after = jax.jit(lambda at: go_on(task, optimizer, at, 3))(rollout)
    assert jnp.isfinite(losses[0]) and not jnp.isfinite(losses[1:]).any()
    assert bool(after.lost)
    assert float(meta_loss(losses[1:], jnp.float32(1.0))) == pytest.approx(
        np.log(WORST + FLOOR), rel=1e-5
    )


def test_losses_are_told_over_those_of_outputs_that_are_zero(task: Task) -> None:
    assert float(reference(task)) == pytest.approx(np.log(2), rel=1e-6)
    auto = Member("digits", ReluMLP((4,)), reconstruct=True).task()
    pixels = np.asarray(auto.dataset.train.inputs[:1000]) / 16
    assert float(reference(auto)) == pytest.approx(((0.5 - pixels) ** 2).mean(), rel=1e-5)
    told = relative(jnp.array([1.0, 8.0, jnp.nan, jnp.inf]), jnp.float32(2.0))
    assert told.tolist() == [0.5, WORST, WORST, WORST]
    losses = jnp.array([0.1, 0.3])
    assert float(meta_loss(losses, jnp.float32(2.0))) == pytest.approx(
        np.log(0.1 + FLOOR), rel=1e-5
    )


def test_members_have_images_of_the_size_and_titles() -> None:
    member = Member("digits", ReluMLP((16, 8)), size=4, batch_size=32)
    task = member.task()
    assert (task.dataset.shape, task.batch_size, task.goal) == ((4, 4, 1), 32, CLASSIFICATION)
    assert member.title == "digits4-relumlp-16x8"
    of_points = Member("moons", MLP((3,)), reconstruct=True)
    assert of_points.title == "moons-mlp-3-auto"
    with pytest.raises(ValueError, match=r"^what is reconstructed must be images, got moons$"):
        of_points.task()
    with pytest.raises(ValueError, match=r"^size must be None for digits, whose images are as lar"):
        Member("digits", MLP((3,)), size=8).task()  # or it could be held out from itself


@pytest.mark.parametrize("recipe", [mlp_small(), mlp_small_longer()])
def test_nothing_that_mlp_small_is_measured_on_is_trained_or_validated_on(recipe) -> None:
    members = {(m.dataset, m.model, m.size) for m in (*recipe.family, *recipe.held_out)}
    measured = {(p.dataset, p.model, p.size) for p in PUBLISHED.values()}
    assert not members & (measured | {("mnist", MLP((20,)), None)})
    assert not {*recipe.family} & {*recipe.held_out}
