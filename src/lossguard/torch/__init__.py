"""The guards for PyTorch training loops. Nothing here imports JAX.

>>> from lossguard.torch import LossGuard
"""

from lossguard.torch.decision import Decision as Decision
from lossguard.torch.facade import LossStep as LossStep
from lossguard.torch.guard import LossGuard as LossGuard

__all__ = ["Decision", "LossGuard", "LossStep"]
