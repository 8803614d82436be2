"""Experiments beyond the paper: the loss guard's options one by one, and several candidates."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import optax

from ..guards.best_of import best_of
from ..guards.criteria import (
    curtailed_criterion,
    mean_criterion,
    paired_criterion,
    sequential_criterion,
)
from ..guards.loss_guard import loss_guard
from ..guards.probing import always, backoff
from ..guards.protocol import Guard
from ..guards.recommended import recommended, settings
from ..guards.track_record import track_record
from ..guards.windows import adaptive
from ..learned.pretrained import pretrained
from .experiment import Experiment, MakeMethods, Methods, paper_methods, sgd_fallback
from .recipes import fig03, fig04, fig05

RECORD = track_record(decay=0.9, share=0)
PAIRED = paired_criterion(confidence=0.95)
RECOMMENDED = settings(nt=10, nc=10, most=160)
ABLATION: Mapping[str, Mapping[str, object]] = {
    "the paper's": {},
    "loser rollback": {"loser": "rollback"},
    "loser reset": {"loser": "reset"},
    "hedge": {"hedge": True},
    "hedge only": {"hedge": "only"},
    "hedge, rollback": {"hedge": True, "loser": "rollback"},
    "hedge, reset": {"hedge": True, "loser": "reset"},
    "record": {"hedge": RECORD},
    "record, rollback": {"hedge": RECORD, "loser": "rollback"},
    "record, reset": {"hedge": RECORD, "loser": "reset"},
    "paired": {"criterion": PAIRED},
    "sequential": {"criterion": sequential_criterion()},
    "curtailed": {"criterion": curtailed_criterion()},
    "nc 1": {"nc": 1},
    "nc 1, training": {"nc": 1, "criterion": mean_criterion(training=4)},
    "adaptive": {"windows": adaptive()},
    "hedge, adaptive": {"hedge": True, "windows": adaptive()},
    "record, reset, paired": {"hedge": RECORD, "loser": "reset", "criterion": PAIRED},
    "recommended, nc 10 at most": RECOMMENDED | {"criterion": mean_criterion()},
    "recommended, nc 80 at most": RECOMMENDED | {"criterion": curtailed_criterion(most=80)},
    "recommended, decay 0.9": RECOMMENDED | {"hedge": RECORD},
    "recommended, no ratchet": RECOMMENDED | {"ratchet": None},
    "recommended, share 0": RECOMMENDED | {"hedge": track_record(decay=0.7, share=0)},
    "recommended, checks next": RECOMMENDED | {"checks": "next"},
    "recommended, stream, nc 10": RECOMMENDED | {"criterion": mean_criterion(), "checks": "next"},
    "recommended, stream": {"nc": 1, **settings(nt=10, nc=1, most=1)},
    "recommended, stream, nc 0": {"nc": 0, **settings(nt=10, nc=0, most=0)},
    "recommended, always": RECOMMENDED | {"probing": always()},
    "recommended, patience 10": RECOMMENDED
    | {"probing": backoff(patience=10, most=512, start="reset")},
    "recommended, patience 10, keep": RECOMMENDED
    | {"probing": backoff(patience=10, most=512, start="keep")},
}
"""Options of ``loss_guard`` by the names that their records have."""


def ablation(task: str) -> Experiment:
    """The loss guard's options, on one of ``TASKS``."""
    methods = ("SGDnm", *ABLATION, "Recommended", "Best of two", "Best of its parts")
    return _on(task, "ablation", "Options of the guard", methods, ablation_methods)


def candidates(task: str) -> Experiment:
    """Three candidates at once, and each of them alone, on one of ``TASKS``."""
    guards = (f"{name} guarded" for name in (*CANDIDATES, "All three"))
    methods = ("SGDnm", *guards, "All three competing")
    return _on(task, "candidates", "Several candidates", methods, candidates_methods)


def fashion() -> Experiment:
    """Fashion-MNIST + MLP, as figure 3."""
    title = "Learned on MNIST + MLP, tested on Fashion-MNIST + MLP"
    return replace(fig03(), name="fashion", title=title, dataset="fashion_mnist")


def ablation_methods(experiment: Experiment) -> Methods:
    """SGDnm, a guard for each of ``ABLATION``, the recommended one, and two guards of guards.

    Best of two has the recommended one, and one that hedges by means and keeps its states: ahead
    early, on MNIST, and at full cost. Best of its parts has L2O and SGDnm.
    """
    e, paper = experiment, paper_methods(experiment)

    def make(options: Mapping[str, object]) -> Guard:
        given = {"nt": e.nt, "nc": e.nc, "loser": e.loser, **options}
        return loss_guard(pretrained(e.learned), sgd_fallback(e), **given)  # pyright: ignore

    guards = {name: partial(make, options) for name, options in ABLATION.items()}
    guards |= {name: paper[name] for name in ("SGDnm", "Recommended")}
    return guards | {
        "Best of two": lambda: best_of([guards["Recommended"](), guards["hedge"]()]),
        "Best of its parts": lambda: best_of([paper["L2O"](), paper["SGDnm"]()]),
    }


CANDIDATES: Mapping[str, Callable[[Experiment], optax.GradientTransformation]] = {
    "L2O": lambda e: pretrained(e.learned),
    "Adam, rate too high": lambda e: optax.adam(100 * e.adam_rate),
    "signSGD": lambda e: optax.sign_sgd(0.01),
}


def candidates_methods(experiment: Experiment) -> Methods:
    """SGDnm, and the recommended guard over it with each candidate and with all of them.

    Guarded, each candidate has a guard of its own; competing, they are lanes of one.
    """
    e = experiment
    options: Mapping[str, Any] = settings(e.nt, e.nc, 16 * e.nc)

    def make(names: tuple[str, ...], guard: Callable[..., Guard]) -> Guard:
        several = [CANDIDATES[name](e) for name in names]
        return guard(several, sgd_fallback(e), nt=e.nt, nc=e.nc)

    guards = {f"{name} guarded": partial(make, (name,), recommended) for name in CANDIDATES}
    guards["All three guarded"] = partial(make, tuple(CANDIDATES), recommended)
    guards["All three competing"] = partial(make, tuple(CANDIDATES), partial(loss_guard, **options))
    return {"SGDnm": paper_methods(e)["SGDnm"], **guards}


def _on(
    task: str, name: str, title: str, methods: tuple[str, ...], make_methods: MakeMethods
) -> Experiment:
    e = TASKS[task]()
    return replace(
        e,
        name=f"{name}-{task}",
        title=f"{title} on {e.tested_on}",
        steps=5_000 if task == "mnist" else 50_000,
        methods=methods,
        make_methods=make_methods,
    )


TASKS: Mapping[str, Callable[[], Experiment]] = {"mnist": fig03, "circles": fig04, "spirals": fig05}
BEYOND: Mapping[str, Callable[[], Experiment]] = {
    "fashion": fashion,
    **{f"ablation-{task}": partial(ablation, task) for task in TASKS},
    **{f"candidates-{task}": partial(candidates, task) for task in ("mnist", "spirals")},
}
