"""Joint readings of what the paper leaves open, and the claims that each of them reproduces.

The paper states neither the scaling of inputs, nor what becomes of the losing branch's LSTM, nor
which of two weights theta is. One run of a figure in one scaling holds its methods in all policies
and with both thetas; a reading picks one scaling of images, one of points, one policy, one theta.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..config import as_config
from ..guards.loss_guard import loss_guard
from ..guards.protocol import Guard
from ..guards.residual_guard import residual_guard
from ..guards.sequences import ema
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from ..records import Record
from .claims import Verdict, judge_claims
from .experiment import Experiment, Methods, sgd_fallback, with_methods
from .joined import of
from .recipes import PAPERS

POLICIES = ("keep", "reset", "reset in every cycle")
"""Of the LSTM's memory: kept by a branch that lost, fresh after a loss, or fresh in every cycle."""
THETAS: Mapping[str, float] = {"weight": 0.9, "decay": 0.1}
"""The weight of the new residual, by what the paper's 0.9 is."""
IMAGES, POINTS = ("unit", "symmetric", "standardized"), ("none", "standardized")
"""Scalings. Points as they are lie within about [-1, 1]."""
FIGURES: Mapping[str, tuple[Sequence[str], float]] = {
    "fig03": (IMAGES, 0.001),
    "fig04": (POINTS, 0.01),
    "fig05": (POINTS, 0.01),
}
"""By figure: the scalings in which it is run, and Adam's rate there in appendix E."""


class Reading(NamedTuple):
    """What the paper leaves open, all of it decided."""

    images: str
    """One of ``IMAGES``."""
    points: str
    """One of ``POINTS``."""
    policy: str
    """One of ``POLICIES``."""
    theta: str
    """One of ``THETAS``."""


ALL = [Reading(*one) for one in product(IMAGES, POINTS, POLICIES, THETAS)]


def reading_run(figure: str, scaling: str) -> Experiment:
    """A figure in one scaling, its methods in every policy and with both thetas."""
    e, (_, adam_rate) = PAPERS[figure](), FIGURES[figure]
    toy = figure != "fig03"
    return with_methods(
        reading_methods,
        e,
        name=f"reading-{figure}-{scaling}",
        title=f"{e.title}: readings, inputs {scaling}",
        scaling=scaling,
        steps=10_000 if toy else 1_000,
        seeds=20 if toy else 5,
        adam_rate=adam_rate,
    )


def reading_methods(experiment: Experiment) -> Methods:
    """The paper's methods; LGL2O by policies, GL2O by thetas."""
    e = experiment

    def alone(optimizer: optax.GradientTransformation) -> Guard:
        return unguarded(optimizer, nt=e.nt, trusted=True)

    def guarded(policy: str) -> Guard:
        learned = pretrained(e.learned)
        if policy == "reset in every cycle":
            learned = restarting(learned, e.nt)
        loser = "reset" if policy == "reset" else "keep"
        return loss_guard(learned, sgd_fallback(e), nt=e.nt, nc=e.nc, loser=loser)

    def rival(theta: float) -> Guard:
        return residual_guard(pretrained(e.learned), sgd_fallback(e), sequence=ema(theta), nt=e.nt)

    return {
        "SGDnm": lambda: alone(sgd_fallback(e)),
        "Adam": lambda: alone(optax.adam(e.adam_rate)),
        "L2O": lambda: unguarded(pretrained(e.learned), nt=e.nt),
        **{f"GL2O, {name}": partial(rival, theta) for name, theta in THETAS.items()},
        **{f"LGL2O, {policy}": partial(guarded, policy) for policy in POLICIES},
    }


def restarting(optimizer: optax.GradientTransformation, every: int) -> optax.GradientTransformation:
    """The same optimizer, its state as at the start before every so many steps.

    >>> counting = optax.GradientTransformation(lambda params: 0, lambda u, n, p=None: (n, n + 1))
    >>> optimizer, seen = restarting(counting, 2), []
    >>> state = optimizer.init(None)
    >>> for _ in range(5):
    ...     update, state = optimizer.update(None, state)
    ...     seen.append(int(update))
    >>> seen
    [0, 1, 0, 1, 0]
    """

    def init(params: PyTree) -> PyTree:
        return optimizer.init(params), jnp.int32(0)

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, PyTree]:
        inner, taken = state
        fresh, again = optimizer.init(params), taken % every == 0
        inner = jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, inner)
        updates, inner = optimizer.update(updates, inner, params)
        return updates, (inner, taken + 1)

    return optax.GradientTransformation(init, update)


READINGS = {
    f"reading-{figure}-{scaling}": partial(reading_run, figure, scaling)
    for figure, (scalings, _) in FIGURES.items()
    for scaling in scalings
}
"""Recipes by their names."""

ADAM: Mapping[str, str] = {"fig03": "Adam", "fig04": "Adam", "fig05": "Adam 0.01"}
"""What claims call Adam at appendix E's rate."""


class Judged(NamedTuple):
    """A reading and what it makes of the paper's claims."""

    reading: Reading
    verdicts: Sequence[Verdict]

    def counts(self) -> Counter[str]:
        """How many claims have each verdict."""
        return Counter(verdict.verdict for verdict in self.verdicts)


def judge_readings(record: Record) -> list[Judged]:
    """Every reading, those first that reproduce the most claims.

    Args:
        record: of ``reading_run``, put together by ``joined.join`` with the labels "fig03 unit" and
            so on; of a method that it lacks the claims are "not run".
    """

    @cache
    def about(figure: str, scaling: str, policy: str, theta: str) -> list[Verdict]:
        names = {"SGDnm": "SGDnm", "Adam": ADAM[figure], "L2O": "L2O"}
        names |= {f"GL2O, {theta}": "GL2O", f"LGL2O, {policy}": "LGL2O"}
        curves = of(record.curves, f"{figure} {scaling}", names)
        if curves.is_empty():
            return [one for one in judge_claims({}) if one.id.startswith(figure[-1])]
        recipe = PAPERS[figure]()
        methods = tuple(curves["method"].unique(maintain_order=True))
        config = as_config(replace(recipe, methods=methods, seeds=curves["seed"].n_unique()))
        verdicts = judge_claims({Path(figure): Record(config, record.manifest, curves)})
        return [one for one in verdicts if one.id.startswith(figure[-1])]

    judged = []
    for one in ALL:
        scalings = {"fig03": one.images, "fig04": one.points, "fig05": one.points}
        parts = [about(figure, s, one.policy, one.theta) for figure, s in scalings.items()]
        judged.append(Judged(one, [verdict for part in parts for verdict in part]))
    return sorted(judged, key=lambda one: -one.counts()["reproduced"])
