"""What an experiment is: a task, a length, and the methods that it compares, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import optax
import tyro

from ..guards.best_of import best_of
from ..guards.clocks import renew
from ..guards.loss_guard import loss_guard
from ..guards.protocol import Decision, Guard, GuardState, Loss
from ..guards.recommended import recommended
from ..guards.residual_guard import TrackingSequence, ema, residual_guard
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from ..schedules import paper_decay
from ..tasks.datasets import load_dataset
from ..tasks.models import MLP, ConvNet, ReluMLP
from ..tasks.task import Task
from ..validation import check_choice, check_kind, freeze_lists


def named_task(experiment: "Experiment") -> Task:
    """The task that an experiment names: its data set by name, its model."""
    dataset = load_dataset(experiment.dataset, scaling=experiment.scaling)
    return Task(dataset, experiment.model, experiment.batch_size)


Method = Callable[[], Guard]
"""Makes the guard when the method is run."""
Methods = Mapping[str, Method]
"""By the names that their records give them."""


def sgd_fallback(experiment: "Experiment") -> optax.GradientTransformation:
    """SGDnm, alone and as the guards have it."""
    return optax.sgd(paper_decay(experiment.sgd_rate, experiment.sgd_tau))


def alone(e: "Experiment", optimizer: optax.GradientTransformation) -> Method:
    """An optimizer that is trusted, by itself."""
    return lambda: unguarded(optimizer, nt=e.nt, trusted=True)


def learned_alone(e: "Experiment") -> Method:
    """The learned optimizer by itself."""
    return lambda: unguarded(pretrained(e.learned), nt=e.nt)


Policy = Literal["keep", "reset", "reset in every cycle"]
"""Of the losing branch's optimizer state. The last one is of the learned optimizer, won or lost."""


def guarded(e: "Experiment", fallback: optax.GradientTransformation) -> Method:
    """LGL2O over a fallback."""

    def make() -> Guard:
        check_choice("loser", e.loser, get_args(Policy))
        learned = pretrained(e.learned)
        loser = "keep" if e.loser == "reset in every cycle" else e.loser
        guard = loss_guard(learned, fallback, nt=e.nt, nc=e.nc, loser=loser)
        return guard if loser == e.loser else forgetful(guard, learned)

    return make


def forgetful(guard: Guard, learned: optax.GradientTransformation) -> Guard:
    """LGL2O whose learned optimizer begins every cycle without memory."""

    def step(state: GuardState, loss: Loss, minibatches: Any = None) -> tuple[GuardState, Decision]:
        fresh = renew(learned, state.params, state.inner.learned)
        inner = state.inner._replace(learned=fresh)
        return guard.step(state._replace(inner=inner), loss, minibatches)

    return Guard(guard.init, step, guard.per_cycle)


def rival(e: "Experiment", sequence: TrackingSequence) -> Method:
    """GL2O over SGDnm."""
    return lambda: residual_guard(
        pretrained(e.learned), sgd_fallback(e), sequence=sequence, nt=e.nt
    )


def every_step(sequence: TrackingSequence) -> TrackingSequence:
    """The same that follows the residuals of rejected steps too."""
    return sequence._replace(reject=sequence.update)


def ours(e: "Experiment", fallback: optax.GradientTransformation) -> Method:
    """The recommended guard over a fallback."""
    return lambda: recommended(pretrained(e.learned), fallback, nt=e.nt)


def best_of_both(*methods: Method) -> Method:
    """Two that run by themselves: whichever is ahead, the other in a twentieth of the cycles."""
    return lambda: best_of([make() for make in methods], share=0.05)


def paper_methods(e: "Experiment") -> Methods:
    """The paper's methods, by the names in its legends, our readings of them, and our guards."""
    sgd, adam = sgd_fallback(e), optax.adam(e.adam_rate)
    return {
        "SGDnm": alone(e, sgd),
        "Adam": alone(e, adam),
        "L2O": learned_alone(e),
        "GL2O": rival(e, ema(0.9)),
        "GL2O (theta as decay)": rival(e, ema(0.1)),
        "GL2O (every step)": rival(e, every_step(ema(0.9))),
        "LGL2O": guarded(e, sgd),
        "LGL2O over Adam": guarded(e, adam),
        "Recommended": ours(e, sgd),
        "Recommended over Adam": ours(e, adam),
    }


MakeMethods = Callable[["Experiment"], Methods]


@dataclass(frozen=True)
class Experiment:
    """Everything that the records of an experiment depend on; the defaults are the paper's."""

    name: str
    """Of the recipe."""
    title: str = ""
    """Of its figure."""
    tested_on: Annotated[str, tyro.conf.Suppress] = ""
    """Its data and its model, in words."""
    figure: Annotated[str, tyro.conf.Suppress] = ""
    """Of the paper, as "fig05", if its records are to judge the claims about one."""
    dataset: str = "spirals"
    """A name that lossguard list shows."""
    scaling: str = "none"
    """Of the inputs: unit, symmetric or standardized; of points none or standardized."""
    model: MLP | ReluMLP | ConvNet = MLP()
    """What is trained."""
    batch_size: int = 128
    """Examples of a minibatch."""
    steps: int = 20_000
    """Optimizer steps of each method, rounded up to whole cycles."""
    seeds: int = 5
    """How many runs of each method."""
    seed: int = 0
    """The first seed."""
    methods: tuple[str, ...] = ("SGDnm", "Adam", "L2O", "GL2O", "LGL2O")
    """Names of what is compared, all if none is named; a wrong one is told with all there are."""
    vectorize: bool = False
    """Seeds side by side, which pays on accelerators only: what guards skip is then computed."""
    learned: str = "lstm-mnist-mlp"
    """A learned optimizer: a name that lossguard list shows, or a path/to/weights.safetensors."""
    nt: int = 10
    """Optimizer steps a cycle."""
    nc: int = 10
    """Check minibatches a cycle."""
    loser: Policy = "keep"
    """What becomes of the losing branch's optimizer state, or of the learned optimizer's."""
    sgd_rate: float = 3.0
    """Of SGDnm, the guards' fallback, at the start."""
    sgd_tau: float = 50_000.0
    """Time scale of SGDnm's decay, in steps."""
    adam_rate: float = 0.01
    """Of Adam."""
    make_task: Annotated[Callable[["Experiment"], Task], tyro.conf.Suppress] = named_task
    make_methods: Annotated[MakeMethods, tyro.conf.Suppress] = paper_methods
    """Name to guard, for ``methods`` to choose from. Put your own optimizers in here."""

    __post_init__ = freeze_lists

    def names(self) -> tuple[str, ...]:
        """Of ``methods``, or of all that ``make_methods`` makes."""
        return self.methods or tuple(self.make_methods(self))

    def guards(self) -> dict[str, Guard]:
        """The guards of ``names``, in their order.

        Raises:
            ValueError: if there is no method, one twice, one that ``make_methods`` doesn't have, or
                one that is no guard.
        """
        known = self.make_methods(self)
        names = self.methods or tuple(known)
        for method in names:
            check_choice("each of methods", method, known)
        if not names or len({*names}) < len(names):
            given = " ".join(names) or "none"
            raise ValueError(f"methods must be one or more, each once, got {given}")
        made: dict[str, Any] = {
            name: known[name]() if callable(known[name]) else known[name] for name in names
        }
        for name, guard in made.items():
            check_kind(f"method {name}", guard, Guard, "unguarded(optimizer)")
        return made
