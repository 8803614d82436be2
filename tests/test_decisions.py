"""Decisions of both frameworks, as a table, as numbers and as a figure."""

import sys
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

import lossguard
from lossguard import decision_table, plot_decisions, plot_rewind, scalars
from lossguard.decisions import LANES
from lossguard.guards.protocol import Decision


def objective(params, i):
    return jnp.sum(params**2)


def cycles(count: int, winners: list[int] | None = None) -> list[Decision]:
    """Of three steps each, with losses that tell where they come from."""
    return [
        Decision(
            used_learned=np.array([True, True, False]),
            losses=np.array([3.0, 2.0, 1.0]) + 10 * k,
            learned_loss=np.float32(k),
            fallback_loss=np.float32(np.nan),
            winner=np.int32(winners[k] if winners else 0),
            gradients=np.int32(4),
            forwards=np.int32(6),
            learned_updates=np.int32(3),
        )
        for k in range(count)
    ]


def test_a_table_by_hand() -> None:
    table = decision_table(cycles(2), start=30)
    assert table["step"].tolist() == [33, 36]
    assert table["loss"].tolist() == [2, 12]
    np.testing.assert_allclose(table["learned"], 2 / 3)
    np.testing.assert_allclose(table["price_of_step"], (4 + 6 / 3) / 3)
    assert table["learned_loss"].tolist() == [0, 1]
    assert pl.DataFrame(table).height == 2


def test_stacked_and_one_by_one_are_the_same() -> None:
    guard = lossguard.recommended(optax.sgd(0.4), optax.sgd(0.1))
    state, step = guard.init(jnp.ones(2)), jax.jit(lambda state: guard.step(state, objective))
    listed = []
    for _ in range(4):
        state, decision = step(state)
        listed.append(decision)
    _, stacked = lossguard.rollout(guard, guard.init(jnp.ones(2)), objective, cycles=4)
    one, other = decision_table(listed), decision_table(stacked)
    for name, column in one.items():
        np.testing.assert_allclose(column, other[name], rtol=1e-6)
    assert one["price_of_step"].sum() * 10 == sum(float(d.price()) for d in listed)
    half = [jax.tree.map(lambda leaf, of=of: leaf[of], stacked) for of in (slice(1), slice(1, 4))]
    for name, column in decision_table(half).items():
        np.testing.assert_array_equal(column, other[name])
    last = scalars(decision)
    assert {*last} <= {*one} and last["loss"] == pytest.approx(float(decision.losses.mean()))


def test_a_minibatch_that_is_passed_over_counts_in_no_mean() -> None:
    losses = [[1, np.nan, 3], [np.nan] * 3, [1, np.inf, np.nan]]
    pairs = zip(cycles(3), losses, strict=True)
    several = [decision._replace(losses=np.array(row)) for decision, row in pairs]
    np.testing.assert_array_equal(decision_table(several)["loss"], [2, np.nan, np.inf])


def test_a_history_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from lossguard.torch import LossGuard

    w = torch.nn.Parameter(torch.ones(2))
    bold, careful = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    guard = LossGuard(bold, careful, model=None, check=lambda k: w.square().sum(), nt=2)

    def closure():
        guard.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        guard.step(closure)
    assert isinstance(guard.history, deque)
    table = decision_table(guard.history)
    assert table["step"].tolist() == [2, 4]
    assert table["price_of_step"].tolist() == [d.price() / 2 for d in guard.history]
    assert table["winner"].tolist() == [0, 0]  # the bold rate halves more in a step
    plot_decisions(one for one in guard.history)


def test_scalars_leave_out_what_does_not_apply() -> None:
    (decision,) = cycles(1)
    assert scalars(decision) == scalars([decision])
    assert {*decision_table(decision)} - {*scalars(decision)} == {"step", "fallback_loss"}


def test_a_figure_shows_what_the_table_says() -> None:
    figure = plot_decisions(cycles(4, [1, -1, 2, 2]), start=2)
    loss, leader, price = figure.axes
    assert [text.get_text() for text in leader.get_yticklabels()] == ["neither", *LANES[1:]]
    each, mean = loss.lines
    assert each.get_xdata()[0] == 2 and len(each.get_xdata()) == 12
    assert mean.get_xdata().tolist() == [5, 8, 11, 14] and loss.get_yscale() == "log"
    shown = [text.get_text() for text in price.get_legend().get_texts()]
    assert shown == ["learned", "fallback", "forward passes"]
    top = max(path.vertices[:, 1].max() for c in price.collections for path in c.get_paths())
    assert top == pytest.approx(2)  # (4 + 6 / 3) / 3


def test_losses_below_0_are_drawn_whole() -> None:
    (decision,) = cycles(1)
    for losses, scale in (([2, 0.5, 0], "log"), ([2, 0.5, -0.5], "linear")):
        figure = plot_decisions(decision._replace(losses=np.array(losses)))
        assert figure.axes[0].get_yscale() == scale


def test_a_run_of_rewind_shows_what_it_saw_and_did() -> None:
    torch = pytest.importorskip("torch")
    from lossguard.torch import Rewind

    w = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(w.parameters(), lr=0.0)
    rewind, draws = Rewind(w, optimizer), np.random.default_rng(0)
    for k in range(1000):
        w(torch.ones(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewind.observe(1 + 0.1 * draws.normal() + (300 <= k < 340 or k > 600))
    (*_, back, last) = [event for event in rewind.events if event.kind != "trial"]
    loss, score, scale = plot_rewind(rewind).axes
    losses, *lines = loss.lines
    calls = [read.call for read in rewind.history]
    assert losses.get_xdata().tolist() == calls
    assert [line.get_xdata()[0] for line in lines] == [back.call, last.call]
    assert [line.get_label() for line in lines] == ["went back", "forward again"]
    for axes, names in ((score, ("score", "threshold")), (scale, ("scale",))):
        for line, name in zip(axes.lines, names, strict=True):
            assert line.get_ydata().tolist() == [getattr(read, name) for read in rewind.history]
    shaded = sum(patch.get_width() for patch in loss.patches)
    trials = [event for event in rewind.events if event.kind == "trial"]
    assert shaded == sum(
        end.call - start.call for start, end in zip(trials, (back, last), strict=True)
    )


def refused(reason: str, function, given, **options) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        function(given, **options)


def test_refusals() -> None:
    runs = jax.tree.map(lambda *leaves: np.stack([np.stack(leaves)] * 5), *cycles(2))
    none = jax.tree.map(lambda leaf: np.stack([leaf])[:0], cycles(1)[0])
    other = cycles(1)[0]._replace(losses=np.ones(2), used_learned=np.ones(2))
    refused("decisions must be at least one, got none$", decision_table, [])
    refused("decisions must be at least one, got none$", plot_decisions, none)
    refused("decisions must be of one run, got losses of shape", decision_table, runs)
    refused("decisions must be a Decision, or a list .*, got str$", plot_decisions, ["1.0"])
    for wrong, kind in ((None, "NoneType"), (3, "int"), ((1, 2), "int")):
        refused(f"decisions must be a Decision, or .*, got {kind}$", decision_table, wrong)
    refused("start must be an integer of at least 0, got -3$", plot_decisions, cycles(1), start=-3)
    refused("start must be an integer of at least 0, got -1$", decision_table, cycles(1), start=-1)
    refused(r"decisions must have the same nt, got \[2, 3\]$", decision_table, [*cycles(1), other])
    refused("decision must be of one cycle, got 2$", scalars, cycles(2))
    refused("rewind must be a Rewind, got list$", plot_rewind, [1.0])
    named = r"names must have one for each winner, 0 to 2, got \('a"
    refused(named, plot_decisions, cycles(1, [2]), names=["a", "b"])


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"lossguard.plot_decisions needs matplotlib: pip install matplotlib$"
    with pytest.raises(ModuleNotFoundError, match=message):
        plot_decisions(cycles(1))


def test_tensorboard_takes_them(tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step, decision in zip((3, 6), cycles(2), strict=True):
            for name, value in scalars(decision).items():
                writer.add_scalar(f"guard/{name}", value, step)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("guard/loss")
    assert [(event.step, event.value) for event in events] == [(3, 2.0), (6, 12.0)]


def test_weights_and_biases_takes_them(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path) as run:
        for step, decision in zip((3, 6), cycles(2), strict=True):
            run.log(scalars(decision), step=step, commit=True)
        assert run.summary["loss"] == 12
    assert list(tmp_path.rglob("*.wandb"))


def test_to_plot_needs_no_rich(monkeypatch) -> None:
    from lossguard.torch import Decision as Plain

    decision = Plain([True] * 2, [2.0, 1.0], winner=0, gradients=2, learned_updates=2)
    for name in [name for name in sys.modules if name.startswith("lossguard.runs.drawing")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lossguard.cli.terminal", "rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert plot_decisions([decision] * 3).axes
