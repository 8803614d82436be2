"""The guards for PyTorch training loops. Nothing here imports JAX.

>>> from lossguard.torch import LossGuard
"""

from lossguard.torch.decision import Decision as Decision
from lossguard.torch.facade import LossStep as LossStep
from lossguard.torch.guard import LossGuard as LossGuard
from lossguard.torch.lstm import LSTMOptimizer as LSTMOptimizer
from lossguard.torch.residual import ResidualGuard as ResidualGuard
from lossguard.torch.sequences import Sequence as Sequence
from lossguard.torch.sequences import arithmetic_average as arithmetic_average
from lossguard.torch.sequences import ema as ema
from lossguard.torch.sequences import geometric as geometric
from lossguard.torch.sequences import recent_max as recent_max
from lossguard.torch.sequences import recent_term as recent_term

__all__ = [
    "Decision",
    "LSTMOptimizer",
    "LossGuard",
    "LossStep",
    "ResidualGuard",
    "Sequence",
    "arithmetic_average",
    "ema",
    "geometric",
    "recent_max",
    "recent_term",
]
