"""Is x as good as the losses that a guard reports? Its loss on the whole training set.

    lossguard run examples/whole_set.py:spirals         # or circles, mnist

A decision reports the training losses of the branch that was kept, so that those of a branch that
was given up, for a spike perhaps, are in no curve. Here curves are of x alone: its loss on all
training examples, after each cycle.
"""

from dataclasses import replace

import jax.numpy as jnp

from lossguard import Decision, Guard, GuardState
from lossguard.experiments import Experiment
from lossguard.experiments.experiment import Methods, paper_methods
from lossguard.experiments.recipes import fig03, fig04, fig05
from lossguard.guards.protocol import Objective
from lossguard.tasks import Task

METHODS = "SGDnm", "Adam", "LGL2O", "Recommended", "Recommended over Adam"


def on_whole_set(guard: Guard, task: Task) -> Guard:
    """The same guard, whose decisions report the loss of x on all training examples."""

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        state, decision = guard.step(state, objective)
        loss = task.evaluate(state.params)["train_loss"]
        return state, decision._replace(losses=jnp.full_like(decision.losses, loss))

    return Guard(guard.init, step)


def methods(e: Experiment) -> Methods:
    """The paper's methods and ours, so reported."""
    task = e.make_task(e)
    made = paper_methods(e).items()
    return {name: lambda make=make: on_whole_set(make(), task) for name, make in made}


def spirals() -> Experiment:
    """Figure 5's."""
    return _of(fig05(), 100_000)


def circles() -> Experiment:
    """Figure 4's."""
    return _of(fig04(), 10_000)


def mnist() -> Experiment:
    """Figure 3's."""
    return _of(fig03(), 3_000)


def _of(e: Experiment, steps: int) -> Experiment:
    name, title = f"whole-set-{e.dataset}", f"Loss on the whole training set, {e.dataset} + MLP"
    return replace(e, name=name, title=title, steps=steps, methods=METHODS, make_methods=methods)
