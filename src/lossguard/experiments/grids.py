"""Appendix E's grids in several scalings of the inputs: which rates win, beside the paper's."""

from collections.abc import Mapping

from ..curves import divided, mark_loss, over_seeds
from ..records import Record

STEPS = 300
"""The length of the grids in appendix E."""
CHOSEN: Mapping[str, tuple[str, str]] = {
    "mnist-mlp": ("Adam 0.001", "SGDnm tau 50000"),
    "mnist-conv": ("Adam 0.01", "SGDnm tau 20000"),
    "circles-mlp": ("Adam 0.01", "SGDnm tau 50000"),
    "spirals-mlp": ("Adam 0.01", "SGDnm tau 50000"),
    "cifar10-conv": ("Adam 0.001", "SGDnm tau 20000"),
}
"""By task: what the paper's grids chose."""


def losses_of(record: Record) -> dict[tuple[str, str], dict[str, float]]:
    """By task and scaling: each method's loss over steps 270 to 300, the mean over seeds.

    Args:
        record: put together by ``joined.join`` with the labels "mnist-mlp unit" and so on.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name, loss in over_seeds(mark_loss(record.curves, STEPS), "loss").items():
        label, _, method = name.partition(": ")
        task, scaling = label.split()
        found.setdefault((task, scaling), {})[method] = loss
    return found


def over_best(losses: Mapping[str, float]) -> dict[str, float]:
    """Each method's loss over the best of the same optimizer.

    >>> over_best({"Adam 0.01": 2.0, "Adam 0.1": 1.0, "SGDnm tau 2000": 0.5})
    {'Adam 0.01': 2.0, 'Adam 0.1': 1.0, 'SGDnm tau 2000': 1.0}
    """

    def best(method: str) -> float:
        return min(loss for one, loss in losses.items() if one.split()[0] == method.split()[0])

    return {method: divided(loss, best(method)) for method, loss in losses.items()}
