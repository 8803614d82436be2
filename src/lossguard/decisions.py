"""What a guard decided, as a table, as numbers for a logger and as a figure, and ``Rewind`` too.

Takes what both frameworks have, and imports neither.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .extras import needed
from .validation import check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = ("learned", "fallback", "fallback alone")
"""The names of ``Decision.winner``, from 0."""
NEITHER = "neither"
"""The name of -1: the guard stayed where it was, or went back."""
COLUMNS = ("learned_loss", "fallback_loss", "winner", "gradients", "forwards", "learned_updates")
"""Fields of a decision that are columns as they are."""


def decision_table(decisions: Any, *, start: int = 0) -> dict[str, np.ndarray]:
    """Decisions as columns, a row for each cycle: ``polars.DataFrame(decision_table(decisions))``.

    - ``step``: optimizer steps by the end of the cycle,
    - ``loss``: the mean of the cycle's losses, without those that are NaN,
    - ``learned``: the part of its steps that were the learned optimizer's,
    - ``price_of_step``: gradients, and a third for each forward pass, for each of its steps,
    - ``learned_loss``, ``fallback_loss``, ``winner``, ``gradients``, ``forwards`` and
      ``learned_updates``: as ``Decision`` has them.

    Args:
        decisions: of one run: those that ``rollout`` returns stacked, or a list of what it
            returned time after time, or of single ones, as the ``history`` of a guard for PyTorch.
            Those of several runs under ``vmap`` look like ``rollout``'s: take one run's.
        start: optimizer steps before the first of them.

    Returns:
        The columns by name, NumPy arrays of one length.

    Raises:
        ValueError: if there is no decision, they are of several runs or differ in nt, or start
            isn't an integer of at least 0.

    >>> from lossguard.torch import Decision
    >>> lost = Decision([False] * 2, [3.0, 1.0], winner=1, gradients=5, learned_updates=2)
    >>> table = decision_table([lost, lost])
    >>> table["step"].tolist(), table["loss"].tolist(), table["price_of_step"].tolist()
    ([2, 4], [2.0, 2.0], [2.5, 2.5])
    """
    start, fields = check_count("start", start, least=0), _stacked(decisions)
    losses, known = fields["losses"], ~np.isnan(fields["losses"])
    cycles, nt = losses.shape
    sums = losses.sum(axis=1, where=known)
    nothing = np.full(cycles, np.nan, np.result_type(losses, np.float32))
    return {
        "step": start + nt * np.arange(1, cycles + 1),
        "loss": np.divide(sums, known.sum(axis=1), out=nothing, where=known.any(axis=1)),
        "learned": fields["used_learned"].mean(axis=1),
        "price_of_step": (fields["gradients"] + fields["forwards"] / 3) / nt,
    } | {name: fields[name] for name in COLUMNS}


def scalars(decision: Any) -> dict[str, float]:
    """One decision as numbers that any logger takes.

        wandb.log(scalars(decision), step=guard.steps)

        for name, value in scalars(decision).items():
            writer.add_scalar(f"guard/{name}", value, guard.steps)  # TensorBoard

    Args:
        decision: of one cycle.

    Returns:
        The columns of ``decision_table`` but ``step``, and without losses that don't apply.

    Raises:
        ValueError: if it isn't one decision.

    >>> from lossguard.torch import Decision
    >>> numbers = scalars(Decision([True], [3.0], winner=0, gradients=1, learned_updates=1))
    >>> numbers["loss"], numbers["price_of_step"], "learned_loss" in numbers
    (3.0, 1.0, False)
    """
    table = decision_table(decision)
    if len(table.pop("step")) != 1:
        raise ValueError(f"decision must be of one cycle, got {len(table['loss'])}")
    numbers = {name: float(column[0]) for name, column in table.items()}
    return {
        name: value
        for name, value in numbers.items()
        if name not in ("learned_loss", "fallback_loss") or not np.isnan(value)
    }


def plot_decisions(decisions: Any, *, names: Sequence[str] = LANES, start: int = 0) -> "Figure":
    """One figure: the loss, whose parameters the guard returned, and what each step cost.

    Args:
        decisions: as for ``decision_table``.
        names: of the lanes, from ``winner`` 0 on. With ``best_of`` give those of its members: else
            they get the names of other guards' lanes.
        start: optimizer steps before the first decision.

    Returns:
        A figure of Matplotlib: ``plot_decisions(decisions).savefig("decisions.png")``.

    Raises:
        ModuleNotFoundError: without Matplotlib.
        ValueError: as ``decision_table``, or if a winner has no name.

    >>> from lossguard.torch import Decision
    >>> lost = Decision([False] * 2, [3.0, 1.0], winner=1, gradients=5, learned_updates=2)
    >>> [axes.get_ylabel() for axes in plot_decisions([lost, lost]).axes]
    ['Training loss', 'Returned', 'Price of a step']
    """
    check_count("start", start, least=0)
    with needed("lossguard.plot_decisions"):
        from matplotlib.figure import Figure

        from .runs.drawing import log_losses
    if isinstance(decisions, Iterator):
        decisions = list(decisions)
    table = decision_table(decisions, start=start)
    losses = _stacked(decisions)["losses"]
    if (most := table["winner"].max()) >= len(names):
        told = f"0 to {most}, got {tuple(names)!r}"
        raise ValueError(f"names must have one for each winner, {told}")
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    loss, leader, price = figure.subplots(
        3, sharex=True, gridspec_kw={"height_ratios": [4, 1.4, 1.6]}
    )
    each = start + np.arange(losses.size)
    loss.plot(each, losses.ravel(), color="0.75", lw=0.6, label="before each step")
    loss.plot(table["step"], table["loss"], color="black", lw=1.4, label="mean of a cycle")
    log_losses(loss)
    loss.set(ylabel="Training loss")
    loss.legend(frameon=False, loc="upper right")
    edges = np.append(start, table["step"])
    _draw_winners(leader, edges, table["winner"], names)
    _draw_prices(price, edges, table, losses.shape[1])
    price.set(xlabel="Optimizer step", xlim=(start, start + losses.size))
    return figure


def plot_rewind(rewind: Any) -> "Figure":
    """One figure of a run with ``lossguard.torch.Rewind``: losses, what it saw, and what it did.

    Above, the mean loss of each read with a line where a return stayed, came to nothing, or where
    it suspected and did not go back; trials are shaded. Then the detector's score, which is
    suspicious above the threshold, and what rates were multiplied by.

    Args:
        rewind: with at least one read, which ``rewind.read()`` makes.

    Returns:
        A figure of Matplotlib: ``plot_rewind(rewind).savefig("rewind.png")``.

    Raises:
        ModuleNotFoundError: without Matplotlib.
        ValueError: if it isn't a ``Rewind``, or has read nothing.

    >>> import torch
    >>> from lossguard.torch import Rewind
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> rewind = Rewind(model, optimizer)
    >>> for minibatch in range(3):
    ...     loss = model(torch.ones(1)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     rewind.observe(loss)
    >>> rewind.read()
    >>> [axes.get_ylabel() for axes in plot_rewind(rewind).axes]
    ['Training loss', 'Score', 'Rate times']
    """
    with needed("lossguard.plot_rewind"):
        from matplotlib.figure import Figure

        from .runs.drawing import log_losses
    if not all(hasattr(rewind, name) for name in ("history", "events", "logged")):
        raise ValueError(f"rewind must be a Rewind, got {type(rewind).__name__}")
    if not rewind.history:
        raise ValueError("rewind must have read losses, got none: rewind.read()")
    calls, losses, scores, thresholds, scales, on_trial = map(
        np.array, zip(*rewind.history, strict=True)
    )
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    loss, score, scale = figure.subplots(
        3, sharex=True, gridspec_kw={"height_ratios": [4, 1.4, 1.2]}
    )
    loss.plot(calls, losses, color="black", lw=1, label="mean of a read")
    log_losses(loss)
    _draw_events(loss, rewind.events)
    score.plot(calls, scores, color="C0", lw=1, label="score")
    score.plot(calls, thresholds, color="C3", lw=1, ls="--", label="threshold")
    scale.plot(calls, scales, color="C0", lw=1.4, drawstyle="steps-post")
    for axes in (loss, score, scale):
        _shade(axes, calls, on_trial.astype(bool))
    loss.set(ylabel="Training loss")
    score.set(ylabel="Score", ylim=(0, None))
    scale.set(ylabel="Rate times", ylim=(0, 1.05), xlabel="Optimizer step", xlim=(0, calls[-1]))
    loss.legend(frameon=False, loc="upper right")
    score.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=2)
    return figure


RETURNS = {
    "return": ("C3", "--", "went back"),
    "forward": ("C0", "-.", "forward again"),
    "unanswered": ("C1", ":", "suspected, not gone back"),
}
"""How events of these kinds are drawn, and what they are called."""


def _draw_events(axes: "Axes", events: Any) -> None:
    """A line for each suspicion, where it ended, and a mark for skipped steps."""
    named = set[str]()
    for event in events:
        if event.kind in RETURNS:
            color, style, name = RETURNS[event.kind]
            label = "" if name in named else name
            axes.axvline(event.call, color=color, ls=style, lw=1, label=label)
            named.add(name)
    skips = [event.call for event in events if event.kind == "skipped"]
    if skips:
        on_the_edge = axes.get_xaxis_transform()
        above = [0.02] * len(skips)
        axes.plot(skips, above, "k|", transform=on_the_edge, label="steps left out")


def _shade(axes: "Axes", calls: np.ndarray, on_trial: np.ndarray) -> None:
    """Behind what was read within a trial."""
    before = np.append(0, calls[:-1])
    started = np.append(False, on_trial[:-1])
    for first, last, trial in zip(before, calls, started, strict=True):
        if trial:
            axes.axvspan(first, last, color="C1", alpha=0.25, lw=0)


def _draw_winners(
    axes: "Axes", edges: np.ndarray, winners: np.ndarray, names: Sequence[str]
) -> None:
    """A bar for each stretch of cycles, on a row for each winner that there was."""
    seen, changes = np.unique(winners), np.flatnonzero(np.diff(winners)) + 1
    bounds = [0, *changes, len(winners)]
    for row, winner in enumerate(seen):
        spans = [
            (float(edges[first]), float(edges[end] - edges[first]))
            for first, end in pairwise(bounds)
            if winners[first] == winner
        ]
        axes.broken_barh(spans, (row - 0.35, 0.7), color=f"C{winner % 10}", lw=0)
    axes.set_yticks(range(len(seen)), [NEITHER if k < 0 else names[int(k)] for k in seen])
    axes.set(ylabel="Returned", ylim=(len(seen) - 0.5, -0.5))


def _draw_prices(axes: "Axes", edges: np.ndarray, table: dict[str, np.ndarray], nt: int) -> None:
    """What a step of each cycle cost, in layers."""
    learned = np.minimum(table["learned_updates"], table["gradients"])
    layers = {
        ("learned", "C0"): learned,
        ("fallback", "C1"): table["gradients"] - learned,
        ("forward passes", "0.6"): table["forwards"] / 3,
    }
    below = np.zeros(len(edges))
    for (name, color), spent in layers.items():
        if spent.any():
            above = below + np.append(spent, spent[-1]) / nt
            axes.fill_between(edges, below, above, step="post", color=color, lw=0, label=name)
            below = above
    axes.set(ylabel="Price of a step", ylim=(0, None))
    if len(axes.collections) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=3)


def _stacked(decisions: Any) -> dict[str, np.ndarray]:
    """Their fields, with a leading axis for the cycles."""
    listed = isinstance(decisions, Iterable) and not hasattr(decisions, "losses")
    several = list(decisions) if listed else [decisions]
    if others := [type(d).__name__ for d in several if not hasattr(d, "losses")]:
        raise ValueError(
            "decisions must be a Decision, or a list of them, as rollout returns second, got "
            f"{others[0]}"
        )
    names = ("losses", "used_learned", *COLUMNS)
    parts = []
    for decision in several:
        part = {name: np.asarray(getattr(decision, name)) for name in names}
        shape = part["losses"].shape
        if len(shape) not in (1, 2):
            raise ValueError(f"decisions must be of one run, got losses of shape {shape}")
        one = len(shape) == 1
        parts.append({name: values[None] if one else values for name, values in part.items()})
    if len(lengths := {part["losses"].shape[1] for part in parts}) > 1:
        raise ValueError(f"decisions must have the same nt, got {sorted(lengths)}")
    if not any(len(part["losses"]) for part in parts):
        raise ValueError("decisions must be at least one, got none")
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
