"""A meta-training of few and small steps."""

import jax
import numpy as np

from lossguard.learned.lstm import LSTMWeights
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.tasks import MLP

TINY = LSTMTraining(
    name="tiny",
    dataset="digits",
    model=MLP(hidden=(5,)),
    batch_size=16,
    optimizees=2,
    truncation=4,
    shortest=4,
    longest=12,
    meta_steps=6,
    hidden=4,
    layers=1,
    validate_every=2,
    validation_steps=8,
    validation_optimizees=3,
    scale=0.05,
    p=8.0,
)


def same(a: LSTMWeights, b: LSTMWeights) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)
