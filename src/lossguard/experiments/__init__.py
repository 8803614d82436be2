"""Experiments: what to run, how it is run, and what is drawn from its records."""

from collections.abc import Callable, Mapping

from .experiment import Experiment as Experiment
from .readings import READINGS
from .recipes import PAPERS

RECIPES: Mapping[str, Callable[[], Experiment]] = {**PAPERS, **READINGS}
"""All that ``lossguard run`` knows by name."""
