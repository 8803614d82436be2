"""The paper's experiments, each a function without arguments; ``lossguard run NAME`` runs them.

Below them are the methods that single ones compare: guards by the names that records give them.

Settings are those of the paper's section 4 and its appendices D and E; where they are lost or not
stated, ``docs/deviations.md`` says what was chosen. The outer-loop curves of figures 2 and 11 are
the records of ``lossguard metatrain mnist-mlp`` and ``cifar10-conv-plain``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import optax

from ..schedules import paper_decay
from ..tasks.models import ConvNet, ReluMLP
from ..tasks.published import resized
from ..tasks.task import Task
from .experiment import (
    Experiment,
    Methods,
    alone,
    guarded,
    learned_alone,
    named_task,
    ours,
    sgd_fallback,
)

PAPER = ("SGDnm", "Adam", "L2O", "GL2O (every step)", "LGL2O")
"""What each of the paper's figures compares."""
JOINT: Mapping[str, Any] = {"methods": PAPER, "loser": "reset in every cycle"}
"""What the paper leaves open, by the joint reading that reproduces most; images are in [-1, 1]."""
CONVNET_5 = ConvNet((8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1))
"""The optimizee on TinyImagenet50."""
TAUS = (2_000, 5_000, 10_000, 20_000, 50_000)
"""Time scales of SGDnm's decay in appendix E's grid, in steps."""
ADAM_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Adam's learning rates in appendix E's grid."""
CONV_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""SGDnm's learning rates in figure 10's grid."""


def figure(name: str, on: str, dataset: str, steps: int, **settings: Any) -> Experiment:
    """A figure of table 1, which compares the paper's methods."""
    title = f"Learned on MNIST + MLP, tested on {on}"
    about = {"name": name, "title": title, "tested_on": on, "figure": name}
    return Experiment(**{**about, "dataset": dataset, "steps": steps, **JOINT, **settings})


def learned_on_cifar10(name: str, table_1: Callable[[], Experiment], **settings: Any) -> Experiment:
    """A figure of table 2: one of table 1 with the other learned optimizer."""
    e = table_1()
    title = f"Learned on CIFAR-10 + ConvNet, tested on {e.tested_on}"
    about = {"name": name, "title": title, "figure": name}
    return replace(e, **about, learned="lstm-cifar10-conv", **settings)


def upsampled_task(e: Experiment) -> Task:
    """With the paper's 64 x 64 pixels, made of 32 x 32, so that its ConvNet has the same head."""
    task = named_task(e)
    note = f"{task.dataset.note}, resized to 64 x 64"
    return replace(task, dataset=replace(resized(task.dataset, 64), note=note))


CONV: Mapping[str, Any] = {"model": ConvNet(), "sgd_rate": 0.01}
"""Of the figures on ConvNets."""
SLOWER: Mapping[str, float] = {"sgd_rate": 1e-4, "sgd_tau": 5e6}
"""Footnote 5: a rate of 0.0001 and a decay 100 times slower, in figures 13 and 16."""

# In distribution: data and optimizee.
fig03 = partial(figure, "fig03", "MNIST + MLP", "mnist", 200_000, scaling="symmetric")
# Out of distribution: the data, on Spirals with a plateau at first.
fig04 = partial(figure, "fig04", "Circles + MLP", "circles", 1_000_000, adam_rate=0.1)
fig05 = partial(figure, "fig05", "Spirals + MLP", "spirals", 1_000_000, adam_rate=0.1)
# Out of distribution: the optimizee, then data too.
fig06 = partial(figure, "fig06", "MNIST + ConvNet", "mnist", 100_000, **CONV, scaling="symmetric")
fig07 = partial(
    figure,
    "fig07",
    "CIFAR-10 + ConvNet",
    "cifar10",
    100_000,
    **CONV,
    scaling="symmetric",
    adam_rate=0.001,
)
fig08 = partial(
    figure,
    "fig08",
    "TinyImagenet50 + ConvNet",
    "tiny_imagenet50_32px",
    50_000,
    **CONV | {"model": CONVNET_5},
    scaling="symmetric",
    adam_rate=0.001,
    make_task=upsampled_task,
)
fig12 = partial(learned_on_cifar10, "fig12", fig03)
fig13 = partial(learned_on_cifar10, "fig13", fig06, **SLOWER)
fig14 = partial(learned_on_cifar10, "fig14", fig05)
fig15 = partial(learned_on_cifar10, "fig15", fig04)
# In distribution.
fig16 = partial(learned_on_cifar10, "fig16", fig07, **SLOWER)


def demo() -> Experiment:
    """A learned optimizer that is ahead and then fails, alone and guarded, on small images."""
    title = "A learned optimizer on a network that it was not made for: digits, two hidden layers"
    methods = "Guarded", "Learned alone", "SGD alone"
    model = ReluMLP((32, 32))
    data = {"dataset": "digits", "scaling": "unit", "model": model, "sgd_rate": 0.3}
    made = Experiment("demo", title=title, steps=2_000, seeds=3, methods=methods, **data)
    return replace(made, make_methods=demo_methods)


def demo_methods(e: Experiment) -> Methods:
    """By names that need no paper."""
    sgd = sgd_fallback(e)
    return {"Guarded": ours(e, sgd), "Learned alone": learned_alone(e), "SGD alone": alone(e, sgd)}


def fig09() -> Experiment:
    """Spirals + MLP with other fallbacks: SGD with momentum, and Adam."""
    e = fig05()
    title = f"{e.title}: LGL2O over other fallbacks"
    e = replace(e, name="fig09", title=title, figure="fig09", steps=120_000)
    return replace(e, methods=(), make_methods=fallback_methods)


def fig10() -> Experiment:
    """TinyImagenet50 + the deeper ConvNet: the grid of SGDnm's rate and decay."""
    title = "Rate and decay of SGDnm on TinyImagenet50 + ConvNet"
    e = replace(fig08(), name="fig10", title=title, figure="fig10", steps=1_000)
    e = replace(e, scaling="unit", loser="keep", make_task=named_task)
    return replace(e, methods=(), make_methods=rate_methods)


def fig02(dataset: str) -> Experiment:
    """Figure 2's first 100 steps of the learned optimizer on a data set + MLP."""
    return Experiment(
        name=f"fig02-{dataset}",
        title=f"Learned on MNIST + MLP, the first steps on {dataset} + MLP",
        figure="fig02",
        dataset=dataset,
        scaling="none" if dataset in ("moons", "circles", "spirals") else "symmetric",
        steps=100,
        methods=("L2O",),
    )


def grid(task: str) -> Experiment:
    """Appendix E's grids on one of ``GRIDS``, over 300 steps."""
    e = GRIDS[task]()
    title = f"Grids of appendix E on {e.tested_on}"
    e = replace(e, name=f"grid-{task}", title=title, figure="", steps=300)
    return replace(e, methods=(), make_methods=grid_methods)


def fallback_methods(e: Experiment) -> Methods:
    """Figure 9: LGL2O over SGDnm, over SGD with momentum 0.9, and over Adam at several rates."""
    decay = paper_decay(e.sgd_rate, e.sgd_tau)
    fallbacks = {
        f"SGDnm {e.sgd_rate:g}": optax.sgd(decay),
        f"SGD {e.sgd_rate:g}": optax.sgd(decay, momentum=0.9),
    } | {f"Adam {rate:g}": optax.adam(rate) for rate in ADAM_RATES}
    return {f"LGL2O over {name}": guarded(e, one) for name, one in fallbacks.items()}


def grid_methods(e: Experiment) -> Methods:
    """Appendix E's grids: SGDnm's time scale of decay at the experiment's rate, and Adam's rate."""
    sgd = {f"SGDnm tau {tau:g}": optax.sgd(paper_decay(e.sgd_rate, tau)) for tau in TAUS}
    adam = {f"Adam {rate:g}": optax.adam(rate) for rate in ADAM_RATES}
    return {name: alone(e, one) for name, one in (sgd | adam).items()}


def rate_methods(e: Experiment) -> Methods:
    """Figure 10's grid: SGDnm's learning rate and its time scale of decay."""
    return {
        f"SGDnm {rate:g} tau {tau:g}": alone(e, optax.sgd(paper_decay(rate, tau)))
        for rate, tau in product(CONV_RATES, TAUS)
    }


FIRST = ("mnist", "fashion_mnist", "moons", "circles", "spirals", "cifar10")
"""The data sets of figure 2."""
GRIDS: Mapping[str, Callable[[], Experiment]] = {
    "mnist-mlp": fig03,
    "mnist-conv": fig06,
    "circles-mlp": fig04,
    "spirals-mlp": fig05,
    "cifar10-conv": fig07,
}
"""The tasks of appendix E's table, each by a figure that has it."""
PAPERS: dict[str, Callable[[], Experiment]] = {
    recipe().name: recipe
    for recipe in (
        *(demo, fig03, fig04, fig05, fig06, fig07, fig08, fig09, fig10),
        *(fig12, fig13, fig14, fig15, fig16),
        *(partial(fig02, dataset) for dataset in FIRST),
        *(partial(grid, task) for task in GRIDS),
    )
}
SETS: Mapping[str, tuple[str, ...]] = {
    "table1": ("fig03", "fig06", "fig04", "fig05", "fig07", "fig08"),
    "table2": ("fig12", "fig13", "fig14", "fig15", "fig16"),
    "fig02": tuple(f"fig02-{dataset}" for dataset in FIRST),
    "grids": tuple(f"grid-{task}" for task in GRIDS),
}
"""Recipes that belong together: the experiments of tables 1 and 2, figure 2, appendix E's grids."""
ELSEWHERE: Mapping[str, str] = {name: f"sweep {name}" for name in SETS} | {
    "fig02": "sweep fig02, and its outer loop by lossguard metatrain mnist-mlp",
    "fig11": "metatrain cifar10-conv-plain",
}
"""Names of figures, tables and sets that are not one experiment, and the command that runs them."""
