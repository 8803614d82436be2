"""How learned optimizers are meta-trained: those that the package ships, and the paper's."""

from dataclasses import replace

from ..tasks.models import MLP, ConvNet, ReluMLP
from .bptt import LSTMTraining
from .evolution import MLPTraining
from .family import Member


def mnist_mlp() -> LSTMTraining:
    """``lstm-mnist-mlp``: MNIST and the MLP with 20 hidden units (paper, section 4)."""
    return LSTMTraining(name="lstm-mnist-mlp", figure="fig02")


def mnist_mlp_paper() -> LSTMTraining:
    """MNIST and the MLP as the paper's text has it, which leaves scaling, rate and scale open.

    Rollouts of 100 steps are section 4's; ``--shortest 600 --longest 600`` are appendix D's. A
    meta-step is an update of the LSTM's weights, which follows each piece of 20 steps.
    """
    return LSTMTraining(
        name="lstm-mnist-mlp-paper",
        figure="fig02",
        scaling="unit",
        optimizees=1,
        truncation=20,
        shortest=100,
        longest=100,
        meta_steps=10_000,
        rate=3e-4,
        decay=False,
        clip=None,
        scale=0.01,
        validate_every=500,
        validation_steps=1_000,
        select=False,
        validation_optimizees=2,
    )


def cifar10_conv() -> LSTMTraining:
    """``lstm-cifar10-conv``: CIFAR-10 and the ConvNet with three layers (paper, appendix D).

    Rollouts begin with one piece and grow: a fresh learned optimizer moves every weight alike,
    which kills all of the ConvNet's ReLUs within some 50 steps, and then nothing is to be learned.
    """
    return LSTMTraining(
        name="lstm-cifar10-conv",
        figure="fig11",
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


def cifar10_conv_plain() -> LSTMTraining:
    """``fig11``: one optimizee, rollouts of 600 steps from the start, no clipping.

    As the paper's text has it, which leaves the output's ``scale`` open: losses stay high at 0.1.
    """
    return replace(
        cifar10_conv(),
        name="cifar10-conv-plain",
        optimizees=1,
        shortest=600,
        curriculum=0,
        meta_steps=10_000,
        rate=1e-4,
        decay=False,
        b2=0.999,
        clip=None,
        validate_every=50,
        select=False,
        validation_optimizees=2,
    )


def mlp_small() -> MLPTraining:
    """The MLP optimizer and eight shapes of networks on small images.

    None of them is a task that ``mlp-small`` is measured on.
    """
    return MLPTraining(
        name="mlp-small",
        truncation=50,
        shortest=50,
        longest=5000,
        curriculum=1200,
        meta_steps=4000,
        rate=2e-3,
        family=(
            Member("digits", ReluMLP((16, 16)), batch_size=32),
            Member("mnist", ReluMLP((32,)), size=8),
            Member("mnist", ReluMLP((16, 8, 16)), size=8, reconstruct=True),
            Member("fashion_mnist", MLP((16,)), size=20),
            Member("mnist", ReluMLP((64, 64)), pairs=2),
            Member("mnist", ReluMLP((128, 64)), pairs=2),
            Member("mnist", ReluMLP((96, 96, 96)), size=14, pairs=2),
            Member("fashion_mnist", ReluMLP((64, 16, 64)), size=14, reconstruct=True, pairs=2),
        ),
        held_out=(
            Member("mnist", ReluMLP((24,)), size=12),
            Member("fashion_mnist", ReluMLP((32, 32)), size=10),
            Member("fashion_mnist", ReluMLP((96, 96))),
            Member("mnist", ReluMLP((64, 24, 64)), size=20, reconstruct=True),
        ),
        validate_every=400,
        validation_steps=4000,
    )


def mlp_small_longer() -> MLPTraining:
    """What goes on from there, on longer rollouts and with two larger autoencoders.

    As it stands it goes on from the shipped weights; ``--start-from`` names others. ``mlp-small``
    is the mean of two such continuations, and a scheduler (``results/metatrain-mlp-small``).
    """
    begun = mlp_small()
    larger = (
        Member("fashion_mnist", ReluMLP((96, 32, 96)), size=20, reconstruct=True, pairs=2),
        Member("mnist", ReluMLP((96, 24, 96)), size=20, reconstruct=True, pairs=2),
    )
    held_out = Member(
        "fashion_mnist", ReluMLP((80, 24, 80)), size=24, reconstruct=True, batch_size=128
    )
    return replace(
        begun,
        name="mlp-small-longer",
        start_from="mlp-small",
        longest=20_000,
        curriculum=0,
        meta_steps=1500,
        rate=1e-3,
        family=(*begun.family, *larger),
        held_out=(*begun.held_out, held_out),
        validate_every=250,
        validation_steps=6000,
    )


def mlp_small_scheduler() -> MLPTraining:
    """The second stage of ``mlp-small``: its scheduler, which scales the steps of a tensor.

    As it stands it goes on with the shipped one.
    """
    return replace(
        mlp_small_longer(), name="mlp-small-scheduler", stage="scheduler", rate=3e-3, sigma=0.05
    )


RECIPES = {
    "mnist-mlp": mnist_mlp,
    "mnist-mlp-paper": mnist_mlp_paper,
    "cifar10-conv": cifar10_conv,
    "cifar10-conv-plain": cifar10_conv_plain,
    "mlp-small": mlp_small,
    "mlp-small-longer": mlp_small_longer,
    "mlp-small-scheduler": mlp_small_scheduler,
}
