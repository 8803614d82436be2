"""The guards for PyTorch training loops. Nothing here imports JAX.

>>> from lossguard.torch import Recommended
"""

import lossguard.extras

with lossguard.extras.needed("lossguard.torch"):
    import torch  # noqa: F401 - before what needs it and knows no extras

from lossguard.torch.guards.best_of import BestOf as BestOf
from lossguard.torch.guards.decision import Decision as Decision
from lossguard.torch.guards.loss_guard import LossGuard as LossGuard
from lossguard.torch.guards.recommended import Recommended as Recommended
from lossguard.torch.learned.mlp import MLPOptimizer as MLPOptimizer
from lossguard.torch.rewind.rewind import Rewind as Rewind
from lossguard.torch.rewind.rewind import RewindEvent as RewindEvent
