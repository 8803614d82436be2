"""Experiments: what to run, how it is run, and what is drawn from its records."""

from .experiment import Experiment as Experiment
from .recipes import RECIPES as RECIPES
