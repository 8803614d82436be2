"""Figure 2's first hundred steps on Circles of other shapes: the paper doesn't say which they are.

    lossguard run examples/circles_readings.py:first_steps --factor 0.3

It also shows an experiment with options and data of one's own.
"""

from dataclasses import dataclass, fields

from lossguard.experiments import Experiment
from lossguard.experiments.recipes import fig02
from lossguard.tasks import Task
from lossguard.tasks.points import circles


@dataclass(frozen=True)
class OnCircles(Experiment):
    """An experiment on two circles, as the loader takes them."""

    factor: float = 0.5
    """Radius of the inner one; the outer one's is 1."""
    noise: float = 0.05
    """Deviation of each coordinate."""


def make_task(e: OnCircles) -> Task:
    """The circles, with the experiment's model."""
    data = circles(factor=e.factor, noise=e.noise, scaling=e.scaling)
    return Task(data, e.model, e.batch_size)


def first_steps() -> OnCircles:
    """The learned optimizer's first hundred steps."""
    e = fig02("circles")
    changes = {"name": "circles", "make_task": make_task}
    return OnCircles(**{f.name: getattr(e, f.name) for f in fields(e)} | changes)
