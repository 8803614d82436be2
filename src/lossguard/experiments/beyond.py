"""Experiments beyond the paper: the loss guard's options one by one, and several candidates."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import optax

from ..guards.criteria import paired_criterion, sequential_criterion
from ..guards.loss_guard import loss_guard
from ..guards.probing import backoff
from ..guards.protocol import Guard
from ..guards.recommended import recommended
from ..guards.windows import adaptive
from ..learned.pretrained import pretrained
from ..schedules import paper_decay
from .experiment import Experiment, paper_methods
from .recipes import RECIPES as PAPERS
from .recipes import fig03, fig04, fig05

EVIDENCE = paired_criterion(confidence=0.95)
PATIENT = backoff(patience=30, most=512, start="reset")
ABLATION = {
    "the paper's": {},
    "loser rollback": {"loser": "rollback"},
    "loser reset": {"loser": "reset"},
    "hedge": {"hedge": True},
    "hedge only": {"hedge": "only"},
    "hedge, reset": {"hedge": True, "loser": "reset"},
    "evidence": {"hedge": EVIDENCE},
    "evidence, reset": {"hedge": EVIDENCE, "loser": "reset"},
    "paired": {"criterion": EVIDENCE},
    "sequential": {"criterion": sequential_criterion()},
    "adaptive": {"windows": adaptive()},
    "evidence, reset, paired": {"hedge": EVIDENCE, "loser": "reset", "criterion": EVIDENCE},
    "evidence, backoff": {"hedge": EVIDENCE, "probing": PATIENT},
    "recommended": {"hedge": EVIDENCE, "loser": "reset", "probing": PATIENT},
    "recommended, patience 10": {
        "hedge": EVIDENCE,
        "loser": "reset",
        "probing": backoff(patience=10, most=512, start="reset"),
    },
}
"""Options of ``loss_guard`` by the names that their records have."""


def ablation(task: str) -> Experiment:
    """The loss guard's options, on one of ``TASKS``."""
    e = TASKS[task]()
    return replace(
        e,
        name=f"ablation-{task}",
        title=f"Options of the guard on {e.title.partition('tested on ')[2]}",
        steps=5_000 if task == "mnist" else 50_000,
        methods=("SGDnm", *ABLATION),
        make_methods=ablation_methods,
    )


def candidates(task: str) -> Experiment:
    """Three candidates at once, and each of them alone, on one of ``TASKS``."""
    e = TASKS[task]()
    return replace(
        e,
        name=f"candidates-{task}",
        title=f"Several candidates on {e.title.partition('tested on ')[2]}",
        steps=5_000 if task == "mnist" else 50_000,
        methods=("SGDnm", *(f"{name} guarded" for name in (*CANDIDATES, "All three"))),
        make_methods=candidates_methods,
    )


def fashion() -> Experiment:
    """Fashion-MNIST + MLP, as figure 3."""
    title = "Learned on MNIST + MLP, tested on Fashion-MNIST + MLP"
    return replace(fig03(), name="fashion", title=title, dataset="fashion_mnist")


def ablation_methods(experiment: Experiment) -> Mapping[str, Callable[[], Guard]]:
    """SGDnm, and a guard for each of ``ABLATION``."""
    e = experiment

    def make(options: Mapping[str, object]) -> Guard:
        fallback = optax.sgd(paper_decay(e.sgd_rate, e.guard_tau))
        given = {"nt": e.nt, "nc": e.nc, "loser": e.loser, **options}
        return loss_guard(pretrained(e.learned), fallback, **given)  # pyright: ignore

    guards = {name: partial(make, options) for name, options in ABLATION.items()}
    return {"SGDnm": paper_methods(e)["SGDnm"], **guards}


CANDIDATES: Mapping[str, Callable[[Experiment], optax.GradientTransformation]] = {
    "L2O": lambda e: pretrained(e.learned),
    "Adam, rate too high": lambda e: optax.adam(100 * e.adam_rate),
    "signSGD": lambda e: optax.sign_sgd(0.01),
}


def candidates_methods(experiment: Experiment) -> Mapping[str, Callable[[], Guard]]:
    """SGDnm, and the recommended guard over it with each candidate and with all of them."""
    e = experiment

    def make(names: tuple[str, ...]) -> Guard:
        fallback = optax.sgd(paper_decay(e.sgd_rate, e.guard_tau))
        return recommended([CANDIDATES[name](e) for name in names], fallback, nt=e.nt, nc=e.nc)

    guards = {f"{name} guarded": partial(make, (name,)) for name in CANDIDATES}
    guards["All three guarded"] = partial(make, tuple(CANDIDATES))
    return {"SGDnm": paper_methods(e)["SGDnm"], **guards}


TASKS: Mapping[str, Callable[[], Experiment]] = {"mnist": fig03, "circles": fig04, "spirals": fig05}
BEYOND: Mapping[str, Callable[[], Experiment]] = {
    "fashion": fashion,
    **{f"ablation-{task}": partial(ablation, task) for task in TASKS},
    **{f"candidates-{task}": partial(candidates, task) for task in ("mnist", "spirals")},
}
RECIPES: Mapping[str, Callable[[], Experiment]] = {**PAPERS, **BEYOND}
"""All recipes by name, the paper's too."""
