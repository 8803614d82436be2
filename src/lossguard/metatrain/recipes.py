"""How the learned optimizers that the package ships were meta-trained."""

from ..tasks.models import ConvNet
from .loop import MetaTraining


def mnist_mlp() -> MetaTraining:
    """``lstm-mnist-mlp``: MNIST and the MLP with 20 hidden units (paper, section 4)."""
    return MetaTraining(name="lstm-mnist-mlp")


def cifar10_conv() -> MetaTraining:
    """``lstm-cifar10-conv``: CIFAR-10 and the ConvNet with three layers (paper, appendix D).

    Rollouts begin with one piece and grow: a fresh learned optimizer moves every weight alike,
    which kills all of the ConvNet's ReLUs within some 50 steps, and then nothing is to be learned.
    """
    return MetaTraining(
        name="lstm-cifar10-conv",
        dataset="cifar10",
        model=ConvNet(),
        truncation=20,
        shortest=20,
        longest=600,
        curriculum=1500,
        meta_steps=4000,
        rate=1e-3,
        b2=0.99,
        scale=0.01,
    )


RECIPES = {"mnist-mlp": mnist_mlp, "cifar10-conv": cifar10_conv}
