"""Experiments: what to run, how it is run, and what is drawn from its records."""

from collections.abc import Callable, Mapping

from . import benchmark_tasks, price
from .experiment import Experiment as Experiment
from .recipes import PAPERS

RECIPES: Mapping[str, Callable[[], Experiment]] = {
    **PAPERS,
    **price.RECIPES,
    **benchmark_tasks.RECIPES,
}
"""All that ``lossguard run`` knows by name."""
