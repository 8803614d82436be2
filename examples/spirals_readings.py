"""Figure 5 on Spirals of other shapes: the paper doesn't say which it is.

    lossguard run examples/spirals_readings.py:arms --turns 3
    lossguard run examples/spirals_readings.py:unscaled

It also shows an experiment with options and data of one's own.
"""

import math
from dataclasses import dataclass, fields, replace

from lossguard.experiments import Experiment
from lossguard.experiments.recipes import fig05
from lossguard.tasks import Task
from lossguard.tasks.points import spirals


@dataclass(frozen=True)
class OnSpirals(Experiment):
    """An experiment on two spirals, as the loader takes them, that end at a radius."""

    turns: float = 1.5
    noise: float = 0.02
    """Deviation of each coordinate."""
    radius: float = 1.0


def make_task(e: OnSpirals) -> Task:
    """The points of the loader, which end at 1, times the radius."""
    data = spirals(turns=e.turns, noise=e.noise / e.radius, scaling=e.scaling)
    return Task(replace(data, scale=e.radius * data.scale), e.model, e.batch_size)


def arms() -> OnSpirals:
    """Figure 5's first 200,000 steps, with the turns of one's choice."""
    e = fig05()
    changes = {
        "name": "spirals",
        "steps": 200_000,
        "methods": ("SGDnm", "L2O", "LGL2O"),
        "make_task": make_task,
    }
    return OnSpirals(**{f.name: getattr(e, f.name) for f in fields(e)} | changes)


def unscaled() -> OnSpirals:
    """A form seen often: arms of 780 degrees whose radius is their angle, inputs as they are."""
    angle = math.radians(780)
    return replace(arms(), turns=780 / 360, noise=0.5 / math.sqrt(12), radius=angle)
