"""Classification of images: Digits, MNIST, Fashion-MNIST, CIFAR-10, and a part of Tiny ImageNet."""

from typing import Any

import numpy as np

from ..extras import needed
from ..validation import check_choice
from .dataset import PIXEL_SCALINGS, Dataset, make_dataset
from .sources import CIFAR10, FASHION_MNIST, MNIST, TINY_IMAGENET50_32PX, ImageSource

DIGITS_TEST = 360
"""Images of its test split."""


def digits(*, scaling: str = "unit") -> Dataset:
    """Scikit-learn's ``load_digits``: 1,797 grey images of 8 x 8 pixels with the values 0 to 16.

    It has no test split of its own: ``DIGITS_TEST`` of its images are drawn, always the same.

    Raises:
        ValueError: if there is no such scaling.
    """
    with needed("the data set digits"):  # takes a second to import
        from sklearn.datasets import load_digits

    check_choice("scaling", scaling, PIXEL_SCALINGS)
    bunch: Any = load_digits()
    inputs, labels = bunch.images[..., None].astype(np.uint8), bunch.target
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return make_dataset(
        (inputs[train], labels[train]),
        (inputs[test], labels[test]),
        scaling=scaling,
        largest=16,
        name="digits",
        classes=10,
    )


def mnist(*, scaling: str = "unit") -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 x 1 pixels (LeCun and Cortes, 2010).

    Args:
        scaling: "unit", "standardized" or "symmetric".

    Raises:
        ValueError: if an argument is out of range, ``LOSSGUARD_DATA`` names no folder, or the files
            aren't MNIST.
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


def tiny_imagenet50_32px(*, scaling: str = "unit") -> Dataset:
    """A stand-in for the paper's TinyImagenet50: 50 of its classes, 32 x 32 x 3 pixels.

    It comes from the local folder only. Arguments and errors are those of ``mnist``.
    """
    return _images(TINY_IMAGENET50_32PX, scaling, note="50 classes, 32 x 32 pixels")


def _images(source: ImageSource, scaling: str, *, note: str = "") -> Dataset:
    check_choice("scaling", scaling, PIXEL_SCALINGS)
    with needed(f"the data set {source.name}"):
        from .parquet import load_images

    train, test, encoding = load_images(source)
    return make_dataset(
        train,
        test,
        scaling=scaling,
        largest=255,
        name=source.name,
        classes=source.classes,
        note=", ".join(filter(None, (note, encoding))),
    )
