"""The MLP optimizer computes what the one in JAX does; copies, checkpoints, what is refused."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from models import refuses, squares
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.overrides import TorchFunctionMode

from lossguard.learned.weights_file import path_of, read_weights
from lossguard.torch import BestOf, MLPOptimizer, Recommended

SHAPES = [(), (5,), (6, 4), (4, 6), (5, 5), (8, 4, 3, 3), (2, 7, 3), (0, 3)]


def weights_of() -> dict[str, torch.Tensor]:
    """What is shipped, each time anew."""
    tensors = read_weights(path_of("mlp-small")).tensors
    return {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}


def make(p: nn.Parameter) -> MLPOptimizer:
    """Each time with the same weights."""
    return MLPOptimizer([p], weights_of())


@pytest.mark.parametrize(("hidden", "layers"), [(6, 1), (3, 3)])
def test_equals_the_one_in_jax(tmp_path, hidden, layers):
    """Under small gradients and large ones."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import lossguard

    path, key = tmp_path / "mlp.safetensors", jax.random.key(0)
    weights = lossguard.init_mlp_weights(key, hidden=hidden, layers=layers)
    noisy = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), weights)
    lossguard.save_weights(path, noisy, made={})
    reference = lossguard.pretrained(path)
    update = jax.jit(reference.update)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0):
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        optimizer = MLPOptimizer.pretrained(params, path)
        theirs = [jax.numpy.asarray(p.detach().numpy()) for p in params]
        state = reference.init(theirs)
        for _ in range(8):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = size * torch.randn(p.shape, generator=generator)
            optimizer.step()
            gradients = [jax.numpy.asarray(p.grad.numpy()) for p in params if p.grad is not None]
            updates, state = update(gradients, state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            for p, old, expected in zip(params, before, updates, strict=True):
                ours = torch.from_numpy(jax.device_get(expected).copy())
                torch.testing.assert_close(p.detach() - old, ours, rtol=1e-3, atol=1e-6)


def test_what_is_shipped_trains_as_in_jax():
    """The losses of a regression over 60 steps; roundings grow, tenfold in 25 of them."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import lossguard

    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(64, n, generator=generator) for n in (8, 3))
    params = [nn.Parameter(0.3 * torch.randn(s, generator=generator)) for s in ((8, 6), (6, 3))]
    theirs, data = (
        [jax.numpy.asarray(one.detach().numpy()) for one in of] for of in (params, (x, t))
    )
    optimizer = MLPOptimizer.pretrained(params, "mlp-small")
    reference = lossguard.pretrained("mlp-small")

    @jax.jit
    def step(params, state):
        def objective(params):
            return ((jax.numpy.tanh(data[0] @ params[0]) @ params[1] - data[1]) ** 2).mean()

        loss, gradients = jax.value_and_grad(objective)(params)
        updates, state = reference.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), state

    state, losses, expected = reference.init(theirs), [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((x @ params[0]).tanh() @ params[1] - t).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        loss, theirs, state = step(theirs, state)
        expected.append(float(loss))
    assert losses[:40] == pytest.approx(expected[:40], rel=1e-5)
    assert losses == pytest.approx(expected, rel=2e-4) and losses[-1] < 0.8 * losses[0]


def steps_of(shapes) -> list[torch.Tensor]:
    """Where parameters of these shapes are after five steps."""
    generator = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = MLPOptimizer(params, weights_of())
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


def test_stacks_and_blocks_change_nothing_but_roundings(monkeypatch):
    """Tensors of one shape go together, and few rows at a time, or not."""
    shapes = [(7, 5), (5,), (7, 5), (4, 3, 3, 2), (5,), (7, 5)]
    expected = steps_of(shapes)
    monkeypatch.setattr("lossguard.torch.learned.stacks.STACKED", 1)
    monkeypatch.setattr("lossguard.torch.learned.update.BLOCK", 10)
    torch.testing.assert_close(steps_of(shapes), expected, rtol=1e-5, atol=1e-6)


def test_a_scale_beyond_all_numbers_is_infinite():
    """As in JAX: a guard then sees that the lane broke."""
    p = nn.Parameter(torch.ones(6, 2))
    scaling = torch.tensor([800.0, 0, 800.0, 0, 0, 0, 0])
    optimizer = MLPOptimizer([p], weights_of() | {"scaling": scaling})
    p.grad = p.detach().clone()
    optimizer.step()
    assert not p.isfinite().any()


def test_its_memory_has_the_shapes_of_the_docstring():
    p = nn.Parameter(torch.randn(6, 2))
    optimizer = MLPOptimizer([p], weights_of())
    p.grad = p.detach().clone()
    optimizer.step()
    assert {name: tuple(t.shape) for name, t in optimizer.state[p].items()} == {
        "momenta": (3, 6, 2),
        "second_moment": (6, 2),
        "rows": (3, 1, 2),
        "columns": (3, 6, 1),
        "units": (8,),
    }


def test_channels_last_and_parameters_without_gradients():
    gradient = torch.randn(8, 4, 3, 3)
    params = [nn.Parameter(torch.ones(8, 4, 3, 3)) for _ in range(2)]
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    idle = nn.Parameter(torch.ones(2))
    optimizer = MLPOptimizer([*params, idle], weights_of())
    params[0].grad = gradient.clone()
    params[1].grad = gradient.to(memory_format=torch.channels_last)
    optimizer.step()
    assert torch.equal(*params)
    assert idle not in optimizer.state and torch.equal(idle.detach(), torch.ones(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad):
    p, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
    optimizer = MLPOptimizer([p, other], weights_of())
    p.grad, other.grad = torch.ones(3, 2), torch.ones(2)
    p.grad[1, 1] = bad
    optimizer.step()
    assert p[1, 1].isnan() and other.isfinite().all()
    assert not optimizer.state[p]["momenta"].isfinite().all()


def test_weights_of_another_architecture_are_refused():
    with refuses("weights must be an MLP's for MLPOptimizer, got those of an LSTM (which is for"):
        MLPOptimizer.pretrained([nn.Parameter(torch.ones(2))], "lstm-mnist-mlp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        (
            {"weights": {"mlp.0.weight": torch.ones(2, 39)}},
            "weights must hold mlp.0.weight, mlp.0.bias, mlp.1.weight, mlp.1.bias, "
            "momentum_decays, second_moment_decay, factored_decays, scaling, scheduler.input, "
            "scheduler.hidden, scheduler.bias, scheduler.output, got none of "
            "['mlp.0.bias', 'mlp.1.weight', 'mlp.1.bias', 'momentum_decays', "
            "'second_moment_decay', 'factored_decays', 'scaling', 'scheduler.input', "
            "'scheduler.hidden', 'scheduler.bias', 'scheduler.output']",
        ),
        (
            {"weights": weights_of() | {"momentum_decays": torch.zeros(2)}},
            "weights must have momentum_decays of shape [3], got [2]",
        ),
    ],
)
def test_errors(arguments, message):
    with refuses(message, "$"):
        MLPOptimizer([nn.Parameter(torch.ones(2))], **{"weights": weights_of(), **arguments})


def test_a_step_copies_nothing_from_the_host():
    """Which would wait for the device."""
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = MLPOptimizer(params, weights_of())
    called: list[str] = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for _ in range(2):  # the first step makes what stays
        for p in params:
            p.grad = torch.ones_like(p)
        called.clear()
        with Noted():
            optimizer.step()
    assert len(called) > 100
    assert not {"tensor", "as_tensor", "new_tensor", "from_numpy"} & {*called}


def test_in_a_guard_its_clock_is_that_of_the_run():
    """It loses its trials: the first ten steps, and those from 160 to 170."""
    p = nn.Parameter(torch.ones(3))
    learned = MLPOptimizer([p], weights_of())
    guard = Recommended(learned, torch.optim.SGD([p], lr=0.1), model=None)
    clocks = []
    for _ in range(200):
        guard.step(squares(p))
        clocks.append(learned.param_groups[0]["clock"])
    assert sum(decision.learned_updates for decision in guard.history) == 20
    assert clocks[149] == 10 and clocks[-1] == 170


def test_where_it_does_not_run_its_clock_goes_on():
    """It hardly moves, so that Adam leads, and it runs in few cycles after the first 100 steps."""
    p = nn.Parameter(torch.ones(3))
    learned = MLPOptimizer([p], weights_of(), lr=1e-6)
    guard = BestOf([torch.optim.Adam([p], lr=0.01), learned], model=None, share=0.05)
    for _ in range(300):
        guard.step(squares(p))
    assert sum(decision.gradients for decision in guard.history) == 400
    assert guard._lanes["1"].memory.now.options[0]["clock"] == 300


def test_a_closure_is_evaluated_with_gradients():
    p, q = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    alone, by_hand = make(p), make(q)
    q.square().sum().backward()
    by_hand.step()

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert alone.step(closure).item() == 6 and torch.equal(p, q)


def test_copies_and_checkpoints_go_on_alike():
    p = nn.Parameter(torch.randn(6, 3))
    optimizer = make(p)
    StepLR(optimizer, 100)  # replaces the optimizer's step

    def run(optimizer, steps):
        (p,) = optimizer.param_groups[0]["params"]
        for _ in range(steps):
            p.grad = p.detach().clone()
            optimizer.step()
        return p.detach()

    run(optimizer, 3)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    twins.append(make(nn.Parameter(p.detach().clone())))
    twins[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = run(optimizer, 3)
    for twin in twins:
        assert torch.equal(run(twin, 3), expected)


def test_schedulers_act_on_the_step():
    """Both are where the other one is before each step, as they see where they are."""
    plain, scheduled = (nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2))
    optimizers = make(plain), make(scheduled)
    scheduler = StepLR(optimizers[1], 1, gamma=0.5)
    for k in range(3):
        scheduled.data.copy_(before := plain.detach().clone())
        for p, optimizer in zip((plain, scheduled), optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
        scheduler.step()
        step = plain.detach() - before
        assert step.all()
        torch.testing.assert_close(scheduled.detach() - before, step / 2**k)


def test_each_group_moves_as_it_would_alone_with_its_rate():
    """Though tensors of one shape are stacked within a group; with a rate of 0 it stands still."""
    generator = torch.Generator().manual_seed(3)
    starts, gradients = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    rates = (1.0, 0.1, 0.0)

    def moved(which):
        params = [nn.Parameter(starts[k].clone()) for k in which]
        groups = [{"params": [p], "lr": rates[k]} for p, k in zip(params, which, strict=True)]
        optimizer = MLPOptimizer(groups, weights_of())
        for _ in range(5):
            for p, k in zip(params, which, strict=True):
                p.grad = gradients[k].clone()
            optimizer.step()
        return [p.detach() for p in params]

    together = moved([0, 1, 2])
    for k in range(3):
        assert torch.equal(together[k], moved([k])[0])
    assert not torch.equal(together[1], starts[1]) and torch.equal(together[2], starts[2])


def test_states_go_through_distributed_checkpoints_and_hooks():
    from torch.distributed.checkpoint import state_dict as dcp

    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)

    def optimizer_of(model):
        kind = make(model.weight)
        kind.add_param_group({"params": [model.bias]})
        return kind

    optimizer, other = optimizer_of(model), optimizer_of(twin)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, other, saved)
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, given: seen.append(given) or {**given})
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    assert seen
    for one, of in ((model, optimizer), (twin, other)):
        for _ in range(2):
            of.zero_grad()
            one(torch.ones(2, 3)).square().sum().backward()
            of.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_states_of_others_are_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer, other = make(p), torch.optim.Adam([p])
    p.grad = torch.ones_like(p)
    other.step()
    fresh = copy.deepcopy(optimizer.state_dict())
    with refuses("state must be one of MLPOptimizer, got another optimizer's"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == fresh


def test_numbers_are_checked_and_plain():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make(p)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^lr must be positive and finite"):
            optimizer.add_param_group({"params": [q], "lr": wrong})
    weights = {name: tensor.numpy() for name, tensor in weights_of().items()}
    groups = [{"params": [p]}, {"params": [q], "lr": np.float64(0.5)}]
    made = MLPOptimizer(groups, weights, lr=np.float32(0.5))  # pyright: ignore
    assert all(type(group["lr"]) is float for group in made.param_groups)
    for array in weights.values():
        array.fill(0)
    assert all(torch.equal(made.weights[name], t) for name, t in weights_of().items())
    with refuses("weights must be a Mapping such as a dictionary of tens"):
        MLPOptimizer([q], [*weights.values()])  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_memory_is_in_float32_and_stays_so(dtype):
    p = nn.Parameter(torch.randn(6, 2, dtype=dtype))
    optimizer = make(p)
    p.grad = p.detach().clone()
    optimizer.step()
    q = nn.Parameter(p.detach().clone())
    twin = make(q)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = q.grad = p.detach().clone()
    optimizer.step()
    twin.step()
    assert p.dtype == dtype and torch.equal(p, q)
    assert twin.state[q].keys() == optimizer.state[p].keys() and twin.state[q]
    for name, tensor in twin.state[q].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, optimizer.state[p][name])


def test_autocast_around_the_step_changes_nothing():
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    for p, enabled in zip(params, (False, True), strict=True):
        optimizer = make(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(2):
                p.grad = p.detach().clone()
                optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_other_gradients_are_refused(kind):
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64 if kind == "complex" else None))
    weight.grad = weight.detach().to_sparse() if kind == "sparse" else weight.detach()
    optimizer, other = make(weight), nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other]})
    optimizer.param_groups.reverse()
    other.grad = torch.ones(2)
    rule = "gradients must be real, dense and whole for MLPOptimizer"
    with refuses(f"{rule}, got a {kind} one", "$"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2)) and not optimizer.state


def test_a_step_in_the_capture_of_a_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refuses("optimizer.step must be called outside of a CUDA graph for MLPOptimizer"):
        make(nn.Parameter(torch.ones(2))).step()
