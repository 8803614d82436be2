"""Where image data sets come from, and what has to arrive."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitSource:
    """What one split must hold."""

    stem: str
    """Its file is ``<stem>.parquet``, or the hub's ``<stem>-00000-of-00001.parquet``."""
    examples: int
    """Number of images; the same number of every class unless a digest is given."""
    sha256: str | None = None
    """Of the bytes of the decoded images and of the labels (little-endian int32), for data sets
    that are distributed without loss."""


@dataclass(frozen=True)
class ImageSource:
    """Where an image data set comes from, and what must arrive."""

    name: str
    """The folder under ``LOSSGUARD_DATA``."""
    repository: str | None
    """On the hub; None where the hub doesn't have it."""
    folder: str
    """In the repository."""
    shape: tuple[int, int, int]
    """(height, width, channels) in pixels."""
    classes: int
    train: SplitSource
    test: SplitSource


MNIST = ImageSource(
    name="mnist",
    repository="ylecun/mnist",
    folder="mnist",
    shape=(28, 28, 1),
    classes=10,
    train=SplitSource(
        "train", 60_000, sha256="6a364e333ea1f8ab86e4d641d64a8cf8d8644433f54b0a78e32c2b9e143672d0"
    ),
    test=SplitSource(
        "test", 10_000, sha256="45a60edfded3b2bb860a7fd195c83431011e7f04318268b4f2de30030af9444e"
    ),
)

FASHION_MNIST = ImageSource(
    name="fashion_mnist",
    repository="zalando-datasets/fashion_mnist",
    folder="fashion_mnist",
    shape=(28, 28, 1),
    classes=10,
    train=SplitSource(
        "train", 60_000, sha256="c7d8cfe8172756709eda8bbe8b201cb44f70785b4cd9974a82408b36cc1f72e4"
    ),
    test=SplitSource(
        "test", 10_000, sha256="2589de149ea70a51076dfb7116c581fbd9b4c7b39b8e9c9f19ec089d65d659b8"
    ),
)

CIFAR10 = ImageSource(
    name="cifar10",
    repository="uoft-cs/cifar10",
    folder="plain_text",
    shape=(32, 32, 3),
    classes=10,
    train=SplitSource("train", 50_000),
    test=SplitSource("test", 10_000),
)

TINY_IMAGENET50_32PX = ImageSource(
    name="tiny_imagenet50_32px",
    repository=None,
    folder="",
    shape=(32, 32, 3),
    classes=50,
    train=SplitSource("train", 25_000),
    test=SplitSource("valid", 2_500),
)
