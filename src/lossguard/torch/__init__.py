"""The guards for PyTorch training loops. Nothing here imports JAX.

>>> from lossguard.torch import LossGuard
"""

import lossguard.extras

with lossguard.extras.needed("lossguard.torch"):
    import torch  # noqa: F401 - before what needs it and knows no extras

from lossguard.torch.best_of import BestOf as BestOf
from lossguard.torch.chained import ChainedOptimizer as ChainedOptimizer
from lossguard.torch.criteria import Criterion as Criterion
from lossguard.torch.criteria import curtailed_criterion as curtailed_criterion
from lossguard.torch.criteria import mean_criterion as mean_criterion
from lossguard.torch.criteria import paired_criterion as paired_criterion
from lossguard.torch.criteria import sequential_criterion as sequential_criterion
from lossguard.torch.decision import Decision as Decision
from lossguard.torch.facade import LossStep as LossStep
from lossguard.torch.loss_guard import LossGuard as LossGuard
from lossguard.torch.lstm import LSTMOptimizer as LSTMOptimizer
from lossguard.torch.probing import Probing as Probing
from lossguard.torch.probing import always as always
from lossguard.torch.probing import backoff as backoff
from lossguard.torch.ratchet import Ratchet as Ratchet
from lossguard.torch.ratchet import ratchet as ratchet
from lossguard.torch.recommended import recommended as recommended
from lossguard.torch.residual_guard import ResidualGuard as ResidualGuard
from lossguard.torch.rewind import Rewind as Rewind
from lossguard.torch.rewind import RewindEvent as RewindEvent
from lossguard.torch.sequences import TrackingSequence as TrackingSequence
from lossguard.torch.sequences import arithmetic_average as arithmetic_average
from lossguard.torch.sequences import ema as ema
from lossguard.torch.sequences import geometric as geometric
from lossguard.torch.sequences import recent_max as recent_max
from lossguard.torch.sequences import recent_term as recent_term
from lossguard.torch.track_record import TrackRecord as TrackRecord
from lossguard.torch.track_record import track_record as track_record
