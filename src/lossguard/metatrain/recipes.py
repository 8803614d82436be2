"""How learned optimizers are meta-trained: those that the package ships, and the paper's."""

from ..tasks.models import ConvNet
from .loop import MetaTraining


def mnist_mlp() -> MetaTraining:
    """``lstm-mnist-mlp``: MNIST and the MLP with 20 hidden units (paper, section 4)."""
    return MetaTraining(name="lstm-mnist-mlp")


def mnist_mlp_paper() -> MetaTraining:
    """MNIST and the MLP as the paper's text has it; nothing is chosen by validation.

    Rollouts of 100 steps are section 4's; ``--shortest 600 --longest 600`` are appendix D's. A
    meta-step is an update of the LSTM's weights, which follows each piece of 20 steps.
    """
    return MetaTraining(
        name="lstm-mnist-mlp-paper",
        scaling="symmetric",
        optimizees=1,
        truncation=20,
        shortest=100,
        longest=100,
        meta_steps=10_000,
        rate=1e-3,
        decay=False,
        clip=None,
        validate_every=500,
        validation_steps=1_000,
        select=False,
        validation_optimizees=2,
    )


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


RECIPES = {"mnist-mlp": mnist_mlp, "mnist-mlp-paper": mnist_mlp_paper, "cifar10-conv": cifar10_conv}
