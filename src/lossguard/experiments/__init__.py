"""Experiments: what to run, how it is run, and what is drawn from its records."""

from .experiment import Experiment

__all__ = ["Experiment"]
