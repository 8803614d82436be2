"""Classification of images: Digits, MNIST, Fashion-MNIST, CIFAR-10 and Tiny ImageNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..extras import needed
from ..validation import check_choice, check_count
from .dataset import PIXEL_SCALINGS, Dataset, make_dataset


def digits(*, test_samples: int = 360, seed: int = 0, scaling: str = "unit") -> Dataset:
    """Scikit-learn's ``load_digits``: 1,797 grey images of 8 x 8 pixels with the values 0 to 16.

    It has no test split of its own: ``seed`` draws ``test_samples`` of its images.

    Raises:
        ValueError: if an argument is out of range.
    """
    with needed("the data set digits"):  # takes a second to import
        from sklearn.datasets import load_digits

    check_choice("scaling", scaling, PIXEL_SCALINGS)
    bunch: Any = load_digits()
    count = len(bunch.target)
    if check_count("test_samples", test_samples) >= count:
        raise ValueError(f"test_samples must be in 1 .. {count - 1}, got {test_samples}")
    check_count("seed", seed, least=0)
    inputs, labels = bunch.images[..., None].astype(np.uint8), bunch.target
    order = np.random.default_rng(seed).permutation(count)
    test, train = order[:test_samples], order[test_samples:]
    return make_dataset(
        (inputs[train], labels[train]),
        (inputs[test], labels[test]),
        scaling=scaling,
        largest=16,
        name="digits",
        classes=10,
    )


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
    encoding: str = "PNG"
    """Of the original images, "PNG" or "JPEG"."""


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

TINY_IMAGENET = ImageSource(
    name="tiny_imagenet",
    repository="zh-plus/tiny-imagenet",
    folder="data",
    shape=(64, 64, 3),
    classes=200,
    train=SplitSource("train", 100_000),
    test=SplitSource("valid", 10_000),
    encoding="JPEG",
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


def mnist(*, scaling: str = "unit") -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 x 1 pixels (LeCun and Cortes, 2010).

    Args:
        scaling: "unit", "standardized" or "symmetric".

    Raises:
        ValueError: if an argument is out of range, or the files aren't MNIST.
        ConnectionError: if it is neither in the folder that ``LOSSGUARD_DATA`` names nor to be had
            from the hub.
    """
    return _images(MNIST, scaling)


def fashion_mnist(*, scaling: str = "unit") -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28 x 28 x 1 pixels (Xiao et al., 2017).

    Arguments and errors are those of ``mnist``.
    """
    return _images(FASHION_MNIST, scaling)


def cifar10(*, scaling: str = "unit") -> Dataset:
    """CIFAR-10: 50,000 + 10,000 photographs, 32 x 32 x 3 pixels (Krizhevsky, 2009).

    Arguments and errors are those of ``mnist``. Where the local folder holds recompressed images,
    ``note`` says so.
    """
    return _images(CIFAR10, scaling)


def tiny_imagenet(*, classes: int = 200, seed: int = 0, scaling: str = "unit") -> Dataset:
    """Tiny ImageNet: 500 + 50 photographs of each of 200 classes, 64 x 64 x 3 pixels.

    The test split is the original's validation split, whose labels are public. Errors are those of
    ``mnist``.

    Args:
        classes: in 2 .. 200. Below 200, ``seed`` draws which; they get the labels 0 .. classes - 1
            in their original order. The paper's TinyImagenet50 has 50, and doesn't name them.
        seed: of the classes that are drawn.
        scaling: as ``mnist`` takes it.
    """
    total = TINY_IMAGENET.classes
    if not 2 <= classes <= total:
        raise ValueError(f"classes must be in 2 .. {total}, got {classes}")
    check_count("seed", seed, least=0)
    if classes == total:
        return _images(TINY_IMAGENET, scaling)
    drawn = np.random.default_rng(seed).choice(total, classes, replace=False)
    note = f"{classes} of {total} classes, seed {seed}"
    return _images(TINY_IMAGENET, scaling, selected=sorted(drawn.tolist()), note=note)


def tiny_imagenet50_32px(*, scaling: str = "unit") -> Dataset:
    """A stand-in for the paper's TinyImagenet50: 50 of its classes, 32 x 32 x 3 pixels.

    It comes from the local folder only. Arguments and errors are those of ``mnist``.
    """
    return _images(TINY_IMAGENET50_32PX, scaling, note="50 classes, 32 x 32 pixels")


def _images(
    source: ImageSource, scaling: str, *, selected: Sequence[int] | None = None, note: str = ""
) -> Dataset:
    check_choice("scaling", scaling, PIXEL_SCALINGS)
    with needed(f"the data set {source.name}"):
        from .parquet import load_images

    train, test, encoding = load_images(source, selected)
    return make_dataset(
        train,
        test,
        scaling=scaling,
        largest=255,
        name=source.name,
        classes=source.classes if selected is None else len(selected),
        note=", ".join(filter(None, (note, encoding))),
    )
