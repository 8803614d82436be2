"""The image data sets: the real ones where they are at hand, and made-up ones for the rest."""

import io
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from PIL import Image

from lossguard.tasks import images


def needs(name: str) -> pytest.MarkDecorator:
    folder = os.environ.get("LOSSGUARD_DATA")
    absent = not folder or not (Path(folder) / name / "train.parquet").is_file()
    return pytest.mark.skipif(absent, reason=f"LOSSGUARD_DATA names no folder with {name}")


# Real


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        pytest.param("mnist", 0.3081, marks=needs("mnist")),
        pytest.param("fashion_mnist", 0.3530, marks=needs("fashion_mnist")),
    ],
)
def test_real_mnist_and_fashion_mnist(name: str, deviation: float) -> None:
    data = getattr(images, name)()
    assert data.train.inputs.shape == (60_000, 28, 28, 1)
    assert data.test.inputs.shape == (10_000, 28, 28, 1)
    assert data.classes == 10 and data.shape == (28, 28, 1)
    assert data.name == name and data.note == ""
    scaled = np.asarray(data.normalize(data.train.inputs))
    assert scaled.min() == 0 and scaled.max() == pytest.approx(1)
    assert scaled.std() == pytest.approx(deviation, abs=1e-4)


@needs("cifar10")
def test_real_cifar10() -> None:
    data = images.cifar10(scaling="standardized")
    assert data.train.inputs.shape == (50_000, 32, 32, 3)
    assert data.test.inputs.shape == (10_000, 32, 32, 3)
    assert data.note in ("", "JPEG")
    # The mean and the deviation of the original, in pixel values; recompression moves them little.
    np.testing.assert_allclose(data.offset, [125.3, 123.0, 113.9], atol=0.2)
    np.testing.assert_allclose(1 / data.scale, [63.0, 62.1, 66.7], atol=0.6)


@needs("tiny_imagenet50_32px")
def test_real_stand_in_for_tiny_imagenet50() -> None:
    data = images.tiny_imagenet50_32px()
    assert data.train.inputs.shape == (25_000, 32, 32, 3)
    assert data.test.inputs.shape == (2_500, 32, 32, 3)
    assert data.classes == 50
    assert data.note == "50 classes, 32 x 32 pixels, JPEG"


# Digits


def test_digits_splits_scikit_learns_images() -> None:
    data = images.digits()
    assert data.train.inputs.shape == (1437, 8, 8, 1) and data.test.inputs.shape == (360, 8, 8, 1)
    assert data.train.inputs.dtype == jnp.uint8 and data.classes == 10
    both = np.concatenate([data.train.inputs, data.test.inputs])
    assert both.max() == 16 and both.sum(dtype=int) == 561718
    assert data.normalize(data.train.inputs).max() == 1
    assert images.digits(scaling="symmetric").normalize(data.train.inputs).min() == -1


def test_digits_are_split_the_same_way_each_time() -> None:
    one, again = (images.digits() for _ in range(2))
    np.testing.assert_array_equal(one.test.inputs, again.test.inputs)
    np.testing.assert_array_equal(one.train.labels, again.train.labels)
    assert not np.array_equal(one.test.labels, np.sort(one.test.labels))


def test_a_wrong_scaling_of_digits_is_named() -> None:
    reason = "^scaling must be one of unit, standardized, symmetric, got 'none'$"
    with pytest.raises(ValueError, match=reason):
        images.digits(scaling="none")


# Made up


@pytest.fixture
def made_up(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small data set in the place of a real one: two training images and a test image a class."""
    source = getattr(images, request.param)
    train = replace(source.train, examples=2 * source.classes, sha256=None)
    test = replace(source.test, examples=source.classes, sha256=None)
    small = replace(source, shape=(3, 3, source.shape[2]), train=train, test=test)
    monkeypatch.setattr(images, request.param, small)
    monkeypatch.setenv("LOSSGUARD_DATA", str(tmp_path))
    (tmp_path / source.name).mkdir()
    for split in (train, test):
        labels = [index % source.classes for index in range(split.examples)]
        structs = [{"bytes": flat_image(label), "path": None} for label in labels]
        table = pl.DataFrame({"image": structs, "label": labels})
        table.write_parquet(tmp_path / source.name / f"{split.stem}.parquet")
    return source.name


def flat_image(value: int) -> bytes:
    """A grey image, each of whose pixels is its class."""
    stream = io.BytesIO()
    Image.new("L", (3, 3), value).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("made_up", "note"),
    [
        *((name, "") for name in ("MNIST", "FASHION_MNIST", "CIFAR10")),
        ("TINY_IMAGENET50_32PX", "50 classes, 32 x 32 pixels"),
    ],
    indirect=["made_up"],
)
def test_every_loader_names_its_data_and_scales_it(made_up: str, note: str) -> None:
    load = getattr(images, made_up)
    unit, symmetric = load(), load(scaling="symmetric")
    assert unit.name == made_up and unit.note == note
    assert unit.train.labels.shape == (2 * unit.classes,)
    np.testing.assert_array_equal(unit.train.inputs[:, 0, 0, 0], unit.train.labels)
    value = (unit.classes - 1) / 255
    assert unit.normalize(unit.train.inputs).max() == pytest.approx(value)
    assert symmetric.normalize(unit.train.inputs).max() == pytest.approx(2 * value - 1)
    with pytest.raises(ValueError, match=r"^scaling must be one of unit, .*, got 'none'$"):
        load(scaling="none")
