"""Experiments: what to run, how it is run, and what is drawn from its records."""

from collections.abc import Callable, Mapping

from . import price, tasks
from .experiment import Experiment as Experiment
from .recipes import PAPERS, READINGS

RECIPES: Mapping[str, Callable[[], Experiment]] = {
    **PAPERS,
    **READINGS,
    **price.RECIPES,
    **tasks.RECIPES,
}
"""All that ``lossguard run`` knows by name."""
