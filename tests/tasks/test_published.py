"""The published tasks: their shapes, their data against PyTorch and NumPy, how they begin."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lossguard.tasks import moons, published
from lossguard.tasks.dataset import Dataset, make_dataset
from lossguard.tasks.goals import RECONSTRUCTION
from lossguard.tasks.models import ReluMLP
from lossguard.tasks.published import PUBLISHED, published_task, resized
from lossguard.tasks.task import Task


def images(examples: int) -> Dataset:
    """Made-up images of 28 x 28 pixels."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (examples, 28, 28, 1), dtype=np.uint8)
    both = made, rng.integers(0, 10, examples)
    return make_dataset(both, both, scaling="unit", largest=255, name="made", classes=10)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ImageMLP_FashionMnist_Relu128x128", (784, 128, 128, 10)),
        ("ImageMLP_Mnist_128x128x128_Relu", (784, 128, 128, 128, 10)),
        ("ImageMLP_FashionMnist8_Relu32", (64, 32, 10)),
        ("ImageMLPAE_FashionMnist_128x32x128_bs128", (784, 128, 32, 128, 784)),
        ("ImageMLPAE_Mnist_128x32x128_bs128", (784, 128, 32, 128, 784)),
    ],
)
def test_shapes(name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(published, "TRAINED_ON", 150)
    monkeypatch.setattr(
        published, "load_dataset", lambda *given, **options: asked.append(given) or images(200)
    )
    task = published_task(name)
    assert asked == [("fashion_mnist" if "Fashion" in name else "mnist",)]
    shapes = [layer.weight.shape for layer in task.init(jax.random.key(0))]
    assert shapes == [(n, m) for m, n in pairwise(sizes)]
    assert len(task.dataset.train.labels) == 150 and len(task.dataset.test.labels) == 200
    assert task.batch_size == 128
    # Untrained: about even odds of ten classes, or grey images.
    loss = task.loss(task.init(jax.random.key(0)), *jax.tree.leaves(task.dataset.test))
    assert float(loss) == pytest.approx(1 / 12 if "AE" in name else np.log(10), rel=0.15)


def test_all_are_tested() -> None:
    assert len(PUBLISHED) == 5


def test_resizing_is_pytorch_s_bilinear_without_antialiasing() -> None:
    torch = pytest.importorskip("torch")
    data = images(3)
    pixels = torch.from_numpy(np.array(data.train.inputs[..., 0], np.float32))[:, None]
    expected = torch.nn.functional.interpolate(pixels, (8, 8), mode="bilinear")[:, 0]
    small = resized(data, 8)
    np.testing.assert_allclose(small.train.inputs[..., 0], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(small.test.inputs, small.train.inputs)
    assert float(small.normalize(small.train.inputs).max()) <= 1
    np.testing.assert_array_equal(small.train.labels, data.train.labels)


def test_the_first_examples_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(20)
    monkeypatch.setattr(published, "load_dataset", lambda name, scaling: data)
    monkeypatch.setattr(published, "TRAINED_ON", 7)
    found = published_task("ImageMLP_Mnist_128x128x128_Relu").dataset
    np.testing.assert_array_equal(found.train.inputs, data.train.inputs[:7])
    np.testing.assert_array_equal(found.train.labels, data.train.labels[:7])
    np.testing.assert_array_equal(found.test.labels, data.test.labels)


def test_layers_begin_as_haiku_s() -> None:
    """A truncated normal, whose deviation is that before it is cut; zero biases."""
    params = ReluMLP((100, 50)).init((20, 20, 1), 10, jax.random.key(3))
    assert [layer.weight.shape for layer in params] == [(100, 400), (50, 100), (10, 50)]
    for layer in params:
        values = np.asarray(layer.weight).ravel() * layer.weight.shape[1] ** 0.5
        assert stats.kstest(values, stats.truncnorm(-2, 2).cdf).pvalue > 1e-3
        assert layer.bias is not None and not layer.bias.any()
    one, other, _ = ReluMLP((6, 6)).init((6,), 10, jax.random.key(0))
    assert not np.isclose(one.weight, other.weight).any()


def test_relu_mlp_and_reconstruction_equal_numpy() -> None:
    data = images(60)
    task = Task(data, ReluMLP((9, 4, 9)), batch_size=16, goal=RECONSTRUCTION)
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.init(jax.random.key(0)))
    x = pixels = np.asarray(data.train.inputs, np.float64).reshape(60, -1) / 255
    for layer in params[:-1]:
        x = np.maximum(x @ np.asarray(layer.weight, np.float64).T + np.asarray(layer.bias), 0)
    out = x @ np.asarray(params[-1].weight, np.float64).T + np.asarray(params[-1].bias)
    expected = np.mean((1 / (1 + np.exp(-out)) - pixels) ** 2)
    found = task.loss(params, data.train.inputs, data.train.labels)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    evaluated = task.evaluate(params)
    assert evaluated.keys() == {"train_loss", "test_loss"}  # there is no accuracy
    assert float(evaluated["train_loss"]) == pytest.approx(expected, rel=1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^published task must be one of ImageMLP_.*got 'mnist'"):
        published_task("mnist")


def test_bad_sizes_are_refused() -> None:
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=r"^size must be an integer of at least 1, got"):
            resized(images(4), size)
    with pytest.raises(ValueError, match=r"^what is resized must be images, got moons$"):
        resized(moons(samples=4), 8)
    with pytest.raises(ValueError, match=r"^each of hidden must be an integer of at least 1"):
        ReluMLP((0,)).init((2,), 10, jax.random.key(0))
    params = ReluMLP(()).init((2,), 3, jax.random.key(0))
    assert ReluMLP(()).apply(params, jnp.ones((4, 2))).shape == (4, 3)
