"""How the learned optimizers that the package ships were meta-trained."""

from .loop import MetaTraining


def mnist_mlp() -> MetaTraining:
    """``lstm-mnist-mlp``: MNIST and the MLP with 20 hidden units (paper, section 4)."""
    return MetaTraining(name="lstm-mnist-mlp")


RECIPES = {"mnist-mlp": mnist_mlp}
