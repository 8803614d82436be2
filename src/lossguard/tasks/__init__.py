"""Data sets, optimizees, and the two composed."""

from .dataset import Dataset, Split
from .datasets import (
    DATASETS,
    cifar10,
    circles,
    digits,
    fashion_mnist,
    load_dataset,
    mnist,
    moons,
    spirals,
    tiny_imagenet,
    tiny_imagenet50_32px,
)
from .models import MLP, ConvNet, Model
from .synthetic import Noisy, Quadratic, RidgeLogistic, quadratic, ridge_logistic
from .task import Task, TaskObjective

__all__ = [
    "DATASETS",
    "MLP",
    "ConvNet",
    "Dataset",
    "Model",
    "Noisy",
    "Quadratic",
    "RidgeLogistic",
    "Split",
    "Task",
    "TaskObjective",
    "cifar10",
    "circles",
    "digits",
    "fashion_mnist",
    "load_dataset",
    "mnist",
    "moons",
    "quadratic",
    "ridge_logistic",
    "spirals",
    "tiny_imagenet",
    "tiny_imagenet50_32px",
]
