"""Figure 6 under other readings of what the paper leaves open about its ConvNets.

    lossguard run examples/convnet_readings.py:sigmoid      # or tanh, padded

It also shows an experiment with a model of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lossguard.experiments import Experiment
from lossguard.experiments.recipes import fig06
from lossguard.tasks import ConvNet
from lossguard.tasks.models import convolve

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class OtherConvNet(ConvNet):
    """With an activation by name, and the inputs of each layer padded by half a kernel or not."""

    activation: str = "relu"
    padded: bool = False

    def init(self, shape: Sequence[int], classes: int, key: PRNGKeyArray) -> Any:
        """As a ConvNet's; padded, a layer's outputs are as wide as its inputs over its stride."""
        layers = super().init(shape, classes, key)
        if not self.padded:
            return layers
        height, width, _ = shape
        for stride in self.strides:
            height, width = -(-height // stride), -(-width // stride)
        key = jax.random.split(key, len(layers))[-1]
        return *layers[:-1], eqx.nn.Linear(height * width * self.channels[-1], classes, key=key)

    def apply(
        self, params: Any, inputs: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch."""
        x = inputs
        for layer in params[:-1]:
            p = layer.kernel_size[0] // 2 if self.padded else 0
            x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
            x = convolve(x, layer.weight, layer.stride[0]) + layer.bias[:, 0, 0]
            x = ACTIVATIONS[self.activation](x)
        return jax.vmap(params[-1])(x.reshape(x.shape[0], -1))


def reading(name: str, model: ConvNet) -> Experiment:
    """Figure 6 with another model, three seeds and its first 600 steps."""
    e = fig06()
    return replace(
        e,
        name=f"fig06-{name}",
        title=f"{e.title}, {name}",
        model=model,
        steps=600,
        seeds=3,
        methods=("SGDnm", "L2O", "GL2O", "GL2O (theta as decay)", "LGL2O"),
    )


def sigmoid() -> Experiment:
    """Sigmoids for ReLUs."""
    return reading("sigmoid", OtherConvNet(activation="sigmoid"))


def tanh() -> Experiment:
    """Hyperbolic tangents for ReLUs."""
    return reading("tanh", OtherConvNet(activation="tanh"))


def padded() -> Experiment:
    """Padded inputs, so that the net is wider at its end."""
    return reading("padded", OtherConvNet(padded=True))
