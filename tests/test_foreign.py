"""Optimizers of other libraries go into guards as docs/own_optimizer.md says: `make foreign`."""

import importlib
import re
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import lossguard

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries

X = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
T = np.tanh(X @ np.array([[1.0, -2.0], [0.5, 0.5], [-1.0, 3.0]], np.float32))
PARAMS = {"w": jnp.full((3, 2), 0.1), "b": jnp.zeros(2)}


def objective(params: Any, i: Any) -> jax.Array:
    """A layer's misfit on a minibatch of 20."""
    rows = jnp.arange(20) + 20 * (i % 5)
    return jnp.mean((jnp.asarray(X)[rows] @ params["w"] + params["b"] - jnp.asarray(T)[rows]) ** 2)


def block(name: str) -> str:
    """The page's code that has this name in it."""
    text = (DOCS / "own_optimizer.md").read_text()
    (code,) = (c for c in re.findall(r"^```py\n(.*?)^```", text, re.M | re.S) if name in c)
    return code


def for_optax(optimizer: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The page's."""
    names: dict[str, Any] = {}
    exec(block("def for_optax"), names)
    return names["for_optax"](optimizer, steps)


def test_learned_optimization_gets_the_loss_and_the_planned_steps(monkeypatch) -> None:
    """Of a stand-in, whose step is the loss over the planned steps."""

    def opt_to_optax_opt(rate: float, num_steps: int) -> optax.GradientTransformationExtraArgs:
        def update(gradients, state, params, *, extra_args):
            size = rate * extra_args["loss"] / num_steps
            return jax.tree.map(lambda g: -size * g, gradients), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    for parent in ("learned_optimization", "learned_optimization.optimizers"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    name = "learned_optimization.optimizers.opt_to_optax"
    module = SimpleNamespace(opt_to_optax_opt=opt_to_optax_opt)
    monkeypatch.setitem(sys.modules, name, module)
    guard = lossguard.unguarded(for_optax(0.5, 4), nt=2)
    state, decision = guard.step(guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2))
    w = np.ones(2)
    for loss in np.asarray(decision.losses):
        assert loss == pytest.approx((w**2).sum())
        w -= 0.5 * loss / 4 * 2 * w
    np.testing.assert_allclose(state.params, w, rtol=1e-6)


def assert_follows_the_better(learned: Any) -> None:
    """As `best_of` does, whose two members run in every cycle: it is never behind Adam for long."""
    alone = lossguard.unguarded(optax.adam(0.01), nt=5)
    guards = [alone, lossguard.best_of([alone, lossguard.unguarded(learned, nt=5)])]
    losses = []
    for guard in (*guards, lossguard.recommended(learned, optax.adam(0.01), nt=5)):
        state, decisions = lossguard.rollout(
            guard, guard.init(PARAMS), objective, cycles=STEPS // 5
        )
        losses.append(float(jnp.mean(jnp.stack([objective(state.params, i) for i in range(5)]))))
        assert np.isfinite(losses[-1])
    assert decisions.learned_updates.sum() > 0  # it was tried
    adam, *guarded = losses
    assert max(guarded) < 1.1 * adam


@pytest.fixture
def without_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """learned_optimization imports it for logs and files alone."""
    pytest.importorskip("haiku")
    for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v2"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, MagicMock(__spec__=ModuleSpec(name, None)))
    pytest.importorskip("learned_optimization")


def celo() -> Any:
    """With its weights, as the page makes it."""
    names: dict[str, Any] = {"for_optax": for_optax}
    path = "celo/algoperf/submissions/celo/theta.state"
    code = block("architecture = Celo")
    assert path in code
    exec(code.replace(path, published_weights("celo")), names)
    return names["published"]


def celo_adam() -> Any:
    """With its weights."""
    from celo.optimizers.celo_adam import Celo
    from celo.utils import init_lopt_from_ckpt

    architecture = Celo(
        lstm_hidden_size=64,
        initial_epsilon=1e-8,
        initial_momentum_decays=(0.9,),
        initial_rms_decays=(0.999,),
    )
    return init_lopt_from_ckpt(architecture, published_weights("celo_adam"))


def published_weights(name: str) -> str:
    """The file of them in Celo's repository."""
    import celo

    folder = Path(next(iter(celo.__path__))).parent / "algoperf" / "submissions" / name
    return str(folder / "theta.state")


def random(module: str, name: str, **options: Any) -> Any:
    """An architecture of learned_optimization with random weights."""
    architecture = getattr(importlib.import_module(f"learned_optimization.{module}"), name)
    learned = architecture(**options)
    return learned.opt_fn(learned.init(jax.random.key(0)))


MADE = {
    "Celo": celo,
    "Celo-Adam": celo_adam,
    "VeLO": lambda: random(
        "research.general_lopt.hyper_v2", "HyperV2", lstm_hidden_size=16, param_inits=4
    ),
    "AdafacMLP": lambda: random("learned_optimizers.adafac_mlp_lopt", "AdafacMLPLOpt"),
    "MLP": lambda: random("learned_optimizers.mlp_lopt", "MLPLOpt"),
    "NNAdam": lambda: random("learned_optimizers.nn_adam", "NNAdam"),
}


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize("name", MADE)
def test_learned_optimization(name: str) -> None:
    """Alone it takes the steps of the library's own loop."""
    if "Celo" in name:
        pytest.importorskip("celo")
    optimizer = MADE[name]()
    learned = for_optax(optimizer, STEPS)
    guard = lossguard.unguarded(learned, nt=5)
    state, _ = lossguard.rollout(guard, guard.init(PARAMS), objective, cycles=STEPS // 5)
    own = optimizer.init(PARAMS, num_steps=STEPS)
    for i in range(STEPS):
        loss, gradient = jax.value_and_grad(objective)(optimizer.get_params(own), i)
        own = optimizer.update(own, gradient, loss=loss, key=jax.random.key(i))
    params = optimizer.get_params(own)
    assert float(jnp.abs(params["w"] - PARAMS["w"]).max()) > 1e-4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), state.params, params)
    assert_follows_the_better(learned)


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_celo2(orthogonalize: bool) -> None:
    """It goes in as it is, alone or for matrices only, as its page has it."""
    module = pytest.importorskip("celo.optimizers.celo2_optax")
    weights = module.Celo2Transformation(theta=None).init_meta_params(jax.random.key(0))
    learned = optax.chain(
        module.scale_by_celo2(weights, orthogonalize=orthogonalize),
        optax.scale_by_learning_rate(0.01),
    )
    if orthogonalize:
        learned = optax.multi_transform(
            {"matrix": learned, "vector": optax.adamw(0.01)}, {"w": "matrix", "b": "vector"}
        )
    assert_follows_the_better(learned)


def evolution(*args: Any) -> optax.GradientTransformationExtraArgs:
    """The gallery's."""
    text = (DOCS / "gallery.md").read_text()
    (code,) = re.findall(r"^def evolution.*?^    return .*?\n", text, re.M | re.S)
    names = {"jax": jax, "jnp": jnp, "optax": optax, "ravel_pytree": ravel_pytree}
    exec(code, names)
    return names["evolution"](*args)


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["LearnedES", "DiscoveredES", "CMAAnchoredLES"])
def test_evosax(name: str) -> None:
    """Alone it is the strategy's own loop, and it learns."""
    algorithms = pytest.importorskip("evosax.algorithms")
    strategy = getattr(algorithms, name)(population_size=16, solution=PARAMS)
    options = strategy.default_params.replace(std_init=0.05)
    key = jax.random.key(0)
    learned = evolution(strategy, options, key)
    guard = lossguard.unguarded(learned, nt=5)
    state, _ = lossguard.rollout(guard, guard.init(PARAMS), objective, cycles=STEPS // 5)
    own = strategy.init(key, PARAMS, options)
    for i in range(STEPS):
        key, ask, tell = jax.random.split(key, 3)
        population, own = strategy.ask(ask, own, options)
        losses = jax.vmap(objective, (0, None))(population, i)
        own, _ = strategy.tell(tell, population, losses, own, options)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, state.params, strategy.get_mean(own))
    assert objective(state.params, 0) < objective(PARAMS, 0)
    assert_follows_the_better(learned)


def batches(steps: int) -> tuple[jax.Array, jax.Array]:
    """Minibatches of 20, one for each step."""
    rows = np.arange(20 * steps).reshape(steps, 20) % len(X)
    return jnp.asarray(X[rows]), jnp.asarray(T[rows])


def test_flax_nnx_with_batch_norm_and_dropout() -> None:
    """As the page has it: statistics and generators are `extra`; alone it is NNX's own loop."""
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def loss(params, rest, minibatch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        inputs, targets = minibatch
        return jnp.mean((model(inputs) - targets) ** 2), nnx.state(model, nnx.Not(nnx.Param))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    guard = lossguard.unguarded(optax.sgd(0.1), nt=5)
    state, _ = lossguard.rollout(guard, guard.init(params, rest), loss, batches(STEPS))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for minibatch in zip(*batches(STEPS), strict=True):
        misfit = lambda model, b=minibatch: jnp.mean((model(b[0]) - b[1]) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(misfit)(model))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, nnx.to_pure_dict(state.params), nnx.to_pure_dict(params))
    mean = state.extra["norm"]["mean"][...]
    close(mean, rest["norm"]["mean"][...])
    assert jnp.abs(mean).max() > 0.01

    guard = lossguard.recommended(optax.sgd(0.1), optax.sgd(0.02), nt=5)
    state, decisions = lossguard.rollout(
        guard, guard.init(*nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)[1:]), loss, batches(100)
    )
    assert decisions.losses[-1].mean() < decisions.losses[0, 0]
    assert jnp.isfinite(nnx.merge(graphdef, state.params, state.extra)(jnp.asarray(X))).all()


def test_flax_linen_with_batch_norm() -> None:
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
            return nn.Dense(2)(nn.relu(x))

    def loss(params, batch_stats, minibatch):
        inputs, targets = minibatch
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, new = Net().apply(variables, inputs, mutable=["batch_stats"])
        return jnp.mean((outputs - targets) ** 2), new["batch_stats"]

    variables = Net().init(jax.random.key(0), jnp.asarray(X))
    guard = lossguard.best_of(
        [lossguard.unguarded(optax.adam(rate), nt=5) for rate in (0.01, 0.1)], share=0.1
    )
    state = guard.init(variables["params"], variables["batch_stats"])
    state, decisions = lossguard.rollout(guard, state, loss, batches(100))
    assert decisions.losses[-1].mean() < 0.5 * decisions.losses[0, 0]
    mean = state.extra["BatchNorm_0"]["mean"]
    hidden = X @ state.params["Dense_0"]["kernel"] + state.params["Dense_0"]["bias"]
    np.testing.assert_allclose(mean, hidden.mean(axis=0), atol=0.3)


def test_orbax_keeps_a_state_with_keys(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")

    def loss(params, key, minibatch):
        return objective(params, 0) + 0 * minibatch, jax.random.split(key)[0]

    guard = lossguard.recommended(optax.adam(0.01), optax.sgd(0.01), nt=2)
    state, _ = guard.step(guard.init(PARAMS, jax.random.key(0)), loss, jnp.arange(2.0))
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        kept = saver.restore(tmp_path / "state", guard.init(PARAMS, jax.random.key(1)))
    key_data = partial(
        jax.tree.map,
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
    )
    for one, other in zip(
        jax.tree.leaves(key_data(kept)), jax.tree.leaves(key_data(state)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
