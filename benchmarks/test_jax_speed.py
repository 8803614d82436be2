"""How fast the JAX core is, as ratios to eager PyTorch and to its own parts.

Nothing fails for being slow: the numbers go to the table of pytest-benchmark (``extra_info``) and
to the terminal with ``-s``. Off by default; ``make bench`` runs them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import guards_of, milliseconds
from jaxtyping import PyTree

from lossguard import Guard, init_lstm_weights, loss_guard, lstm_optimizer, rollout
from lossguard.guards.protocol import GuardState
from lossguard.metatrain.truncated import Optimizees, meta_gradient
from lossguard.tasks import MLP, ConvNet, Task, spirals
from lossguard.tasks.dataset import make_dataset

torch = pytest.importorskip("torch")
functional = torch.nn.functional

NT = NC = 10
WEIGHTS = init_lstm_weights(jax.random.key(0))
RATE = 0.1


def random_task(shape: tuple[int, ...], model: Any) -> Task:
    """As MNIST or CIFAR-10, save for what the pixels show."""
    rng = np.random.default_rng(0)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n)

    data = make_dataset(
        split(10_000), split(128), scaling="unit", largest=255, name="random", classes=10
    )
    return Task(data, model)


def ready(run: Callable[..., PyTree], *arguments: Any) -> Callable[[], PyTree]:
    """A candidate: compiled, and waited for."""
    compiled = eqx.filter_jit(run)
    return lambda: jax.block_until_ready(compiled(*arguments))


def steps_of(optimizer: optax.GradientTransformation, task: Task, steps: int) -> Callable:
    """``steps`` optimizer steps inside a scan, alone."""
    objective = task.objective(jax.random.key(2))

    def run(params: PyTree, state: PyTree) -> PyTree:
        def step(carry: tuple[PyTree, PyTree], i: jax.Array) -> tuple[PyTree, jax.Array]:
            params, state = carry
            loss, gradient = jax.value_and_grad(objective)(params, i)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), jnp.arange(steps))

    params = task.init(jax.random.key(1))
    return ready(run, params, optimizer.init(params))


def guard_steps(task: Task, cycles: int) -> Callable[[], PyTree]:
    """``cycles`` cycles of LGL2O over SGD."""
    guard = loss_guard(lstm_optimizer(WEIGHTS), optax.sgd(RATE), nt=NT, nc=NC)
    objective = task.objective(jax.random.key(2))
    params = task.init(jax.random.key(1))

    def run() -> GuardState:
        state = guard.init(jax.tree.map(jnp.copy, params))
        return jax.block_until_ready(rollout(guard, state, objective, cycles=cycles)[0])

    return run


def torch_layers() -> tuple[Any, Any]:
    """``nn.LSTM`` and ``nn.Linear`` with the same weights."""
    lstm, linear = torch.nn.LSTM(2, 20, 2), torch.nn.Linear(20, 1)
    tensors = [*lstm.parameters(), *linear.parameters()]
    for tensor, array in zip(tensors, jax.tree.leaves(WEIGHTS), strict=True):
        tensor.data = torch.from_numpy(np.array(array))
    return lstm, linear


def torch_features(g: Any) -> Any:
    small, floor = g.abs() < np.exp(-10.0), np.exp(-10.0)
    log = g.abs().clamp(min=floor).log() / 10
    return torch.stack([log, torch.where(small, g * np.exp(10.0), g.sign())], dim=1)


def torch_data(task: Task) -> tuple[Any, Any]:
    """Inputs, flat if the model is, and labels."""
    train = task.dataset.train
    x = torch.from_numpy(np.array(train.inputs))
    x = x.flatten(1) if isinstance(task.model, MLP) else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(np.array(train.labels)).long()


def torch_parameters(task: Task) -> list[Any]:
    leaves = jax.tree.leaves(task.init(jax.random.key(1)))
    return [torch.from_numpy(np.array(leaf)) for leaf in leaves]


def torch_mlp_loss(params: list[Any], x: Any, labels: Any) -> Any:
    hidden = torch.sigmoid(functional.linear(x, *params[:2]))
    return functional.cross_entropy(functional.linear(hidden, *params[2:]), labels)


class TorchMinibatches:
    """By epoch-wise shuffling, as a DataLoader does it but without its overhead."""

    def __init__(self, task: Task) -> None:
        self.x, self.labels = torch_data(task)
        self.scale = float(task.dataset.scale) if self.x.dtype == torch.uint8 else 1.0
        self.per_epoch = len(self.labels) // 128
        self.order = torch.randperm(len(self.labels))

    def __call__(self, i: int) -> tuple[Any, Any]:
        at = 128 * (i % self.per_epoch)
        if at == 0:
            self.order = torch.randperm(len(self.labels))
        rows = self.order[at : at + 128]
        return self.x[rows].float() * self.scale, self.labels[rows]


def torch_lgl2o(task: Task, cycles: int) -> Callable[[], None]:
    """Algorithm 2 in eager PyTorch, with the state of both optimizers kept."""
    minibatch = TorchMinibatches(task)
    (lstm, linear), start = torch_layers(), torch_parameters(task)
    sizes = [p.numel() for p in start]

    def gradients(params: list[Any], x: Any, labels: Any) -> list[Any]:
        at = [p.detach().requires_grad_() for p in params]
        return torch.autograd.grad(torch_mlp_loss(at, x, labels), at)

    @torch.no_grad()
    def learned(y: list[Any], gradient: list[Any], memory: Any) -> tuple[list[Any], Any]:
        g = torch.cat([part.flatten() for part in gradient])
        output, memory = lstm(torch_features(g)[None], memory)
        updates = (0.1 * linear(output)[0, :, 0]).split(sizes)
        return [p + u.view_as(p) for p, u in zip(y, updates, strict=True)], memory

    @torch.no_grad()
    def check(params: list[Any], batches: list[tuple[Any, Any]]) -> Any:
        return torch.stack([torch_mlp_loss(params, *batch) for batch in batches]).mean()

    def run() -> None:
        kept, memory, i = start, None, 0
        for _ in range(cycles):
            y = z = kept
            for t in range(NT):
                batch = minibatch(i + t)
                y, memory = learned(y, gradients(y, *batch), memory)
                z = [p - RATE * g for p, g in zip(z, gradients(z, *batch), strict=True)]
            batches = [minibatch(i + NT + j) for j in range(NC)]
            kept = y if check(y, batches) < check(z, batches) else z
            i += NT + NC

    return run


def torch_meta_gradient(task: Task, steps: int) -> Callable[[], None]:
    minibatch = TorchMinibatches(task)
    (lstm, linear), start = torch_layers(), torch_parameters(task)
    learned = [*lstm.parameters(), *linear.parameters()]
    sizes = [p.numel() for p in start]

    def run() -> None:
        params, memory, total = start, None, 0.0
        for i in range(steps):
            batch = minibatch(i)
            at = [p if p.requires_grad else p.clone().requires_grad_() for p in params]
            loss = torch_mlp_loss(at, *batch)
            total = total + loss
            gradient = torch.autograd.grad(loss, at, retain_graph=True)
            g = torch.cat([part.flatten() for part in gradient])
            output, memory = lstm(torch_features(g)[None], memory)
            updates = (0.1 * linear(output)[0, :, 0]).split(sizes)
            params = [p + u.view_as(p) for p, u in zip(params, updates, strict=True)]
        torch.autograd.grad(total / steps, learned)

    return run


@pytest.fixture(scope="module")
def mnist_mlp() -> Task:
    return random_task((28, 28, 1), MLP((20,)))


@pytest.fixture(scope="module")
def spirals_mlp() -> Task:
    return Task(spirals(), MLP((20,)))


def test_lstm_step(against_torch: Callable[..., None]) -> None:
    n, steps = 15_910, 100
    gradients = np.random.default_rng(0).normal(0, 0.01, (steps, n)).astype(np.float32)
    optimizer = lstm_optimizer(WEIGHTS)

    def ours(gradients: jax.Array, state: PyTree) -> PyTree:
        def step(state: PyTree, gradient: jax.Array) -> tuple[PyTree, jax.Array]:
            update, state = optimizer.update(gradient, state)
            return state, update

        return jax.lax.scan(step, state, gradients)

    lstm, linear = torch_layers()
    tensor = torch.from_numpy(gradients)

    @torch.no_grad()
    def theirs() -> list[Any]:
        memory, updates = None, []
        for gradient in tensor:
            output, memory = lstm(torch_features(gradient)[None], memory)
            updates.append(0.1 * linear(output)[0, :, 0])
        return updates

    run = ready(ours, jnp.asarray(gradients), optimizer.init(jnp.zeros(n)))
    np.testing.assert_allclose(run()[1], torch.stack(theirs()), rtol=1e-3, atol=1e-5)
    against_torch(run, theirs, target="at least 1.8 times faster")


@pytest.mark.parametrize("model", [MLP(), ConvNet()], ids=["MLP", "ConvNet-3"])
def test_cycles_against_their_parts(model: Any, report: Callable[..., None]) -> None:
    """Time of a run's first 200 steps, over that of the steps and forward passes that it counts."""
    task, cycles = random_task((28, 28, 1), model), 20
    learned, fallback = lstm_optimizer(WEIGHTS), optax.sgd(RATE)
    objective, params = task.objective(jax.random.key(2)), task.init(jax.random.key(1))

    def whole(guard: Guard) -> Callable[[], PyTree]:  # not donated: the same cycles again
        run = lambda state: rollout(guard, state, objective, cycles=cycles)  # noqa: E731
        return ready(run, guard.init(params))

    def forwards(params: PyTree) -> jax.Array:
        def check(total: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            return total + objective(params, j), None

        return jax.lax.scan(check, jnp.float32(0), jnp.arange(NC * cycles))[0]

    runs = {name: whole(guard) for name, guard in guards_of(learned, fallback).items()}
    parts = {
        "learned": steps_of(learned, task, NT * cycles),
        "fallback": steps_of(fallback, task, NT * cycles),
        "forwards": ready(forwards, params),
    }
    times, ratios = milliseconds(runs | parts, 9), {}
    for name, run in runs.items():
        counts = run()[1]
        of_learned, forwarded = int(counts.learned_updates.sum()), int(counts.forwards.sum())
        spent = of_learned, int(counts.gradients.sum()) - of_learned, forwarded
        each = (times[part] / (NT * cycles) for part in parts)
        expected = sum(count * time for count, time in zip(spent, each, strict=True))
        ratios[name] = round(times[name] / expected, 3)
    report(runs["recommended"], "each at most 1.05", **ratios)


def test_spirals_steps(spirals_mlp: Task, report: Callable[..., None]) -> None:
    steps = 2_000
    candidates = {
        "sgd": steps_of(optax.sgd(RATE), spirals_mlp, steps),
        "learned": steps_of(lstm_optimizer(WEIGHTS), spirals_mlp, steps),
    }
    times = milliseconds(candidates, 9)
    rounded = {f"{name} us a step": round(1e3 * v / steps, 1) for name, v in times.items()}
    report(candidates["learned"], "sgd under 20 us, learned under 80 us", **rounded)


def test_spirals_lgl2o(spirals_mlp: Task, against_torch: Callable[..., None]) -> None:
    cycles = 200  # so that starting the compiled loop counts little
    against_torch(
        guard_steps(spirals_mlp, cycles),
        torch_lgl2o(spirals_mlp, cycles),
        target="at least 8 times faster",
        rounds=5,
    )


def test_a_million_lgl2o_steps_on_spirals(spirals_mlp: Task, report: Callable[..., None]) -> None:
    steps = 20_000
    run = guard_steps(spirals_mlp, steps // NT)
    seconds = milliseconds({"run": run}, 3)["run"] / 1e3 * 1_000_000 / steps
    report(run, "under 300 s", seconds_extrapolated_from_20000_steps=round(seconds, 1))


def test_convnet_gradient_step(against_torch: Callable[..., None]) -> None:
    steps = 50
    task = random_task((32, 32, 3), ConvNet())
    minibatch = TorchMinibatches(task)
    sequence: list[Any] = []
    for inputs, outputs, kernel in ((3, 8, 5), (8, 16, 3), (16, 32, 3)):
        sequence += [torch.nn.Conv2d(inputs, outputs, kernel, 2), torch.nn.ReLU()]
    network = torch.nn.Sequential(*sequence, torch.nn.Flatten(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

    def theirs() -> None:
        for i in range(steps):
            x, labels = minibatch(i)
            optimizer.zero_grad()
            functional.cross_entropy(network(x), labels).backward()
            optimizer.step()

    against_torch(
        steps_of(optax.sgd(RATE), task, steps), theirs, target="at most 1.2 times PyTorch's time"
    )


def test_meta_gradient(mnist_mlp: Task, against_torch: Callable[..., None]) -> None:
    steps = 20
    keys = jax.random.split(jax.random.key(1), 1)
    params = jax.vmap(mnist_mlp.init)(keys)
    optimizees = Optimizees(
        params, lstm_optimizer(WEIGHTS).init(params), keys, jnp.zeros(1, int), jnp.full(1, steps)
    )
    ours = ready(
        lambda w, at: meta_gradient(lstm_optimizer, mnist_mlp, w, at, steps)[:2],
        WEIGHTS,
        optimizees,
    )
    against_torch(
        ours,
        torch_meta_gradient(mnist_mlp, steps),
        target="at least 2 times faster",
        rounds=5,
    )
