"""The guards for PyTorch training loops. Nothing here imports JAX.

>>> from lossguard.torch import Recommended
"""

import lossguard.extras

with lossguard.extras.needed("lossguard.torch"):
    import torch  # noqa: F401 - before what needs it and knows no extras

from lossguard.torch.best_of import BestOf as BestOf
from lossguard.torch.decision import Decision as Decision
from lossguard.torch.hedged import Hedged as Hedged
from lossguard.torch.lstm import LSTMOptimizer as LSTMOptimizer
from lossguard.torch.mlp import MLPOptimizer as MLPOptimizer
from lossguard.torch.paper import LossGuard as LossGuard
from lossguard.torch.paper import ResidualGuard as ResidualGuard
from lossguard.torch.recommended import Recommended as Recommended
from lossguard.torch.rewind import Rewind as Rewind
from lossguard.torch.rewind import RewindEvent as RewindEvent
