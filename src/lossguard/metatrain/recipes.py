"""How the learned optimizers that the package ships were meta-trained."""

from ..tasks.models import ConvNet
from .loop import MetaTraining


def mnist_mlp() -> MetaTraining:
    """``lstm-mnist-mlp``: MNIST and the MLP with 20 hidden units (paper, section 4)."""
    return MetaTraining(name="lstm-mnist-mlp")


def cifar10_conv() -> MetaTraining:
    """``lstm-cifar10-conv``: CIFAR-10 and the ConvNet with three layers (paper, appendix D)."""
    return MetaTraining(
        name="lstm-cifar10-conv",
        dataset="cifar10",
        model=ConvNet(),
        scale=0.01,
        shortest=100,
        longest=600,
    )


RECIPES = {"mnist-mlp": mnist_mlp, "cifar10-conv": cifar10_conv}
