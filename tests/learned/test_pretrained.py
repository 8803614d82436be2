"""Weights on disk: the round trip, what is shipped, and every way in which a file can be wrong."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lossguard import (
    init_lstm_weights,
    init_mlp_weights,
    load_weights,
    lstm_optimizer,
    mlp_optimizer,
    pretrained,
    save_weights,
)
from lossguard.learned.lstm import LSTMWeights
from lossguard.learned.mlp import MLPLayer
from lossguard.learned.weights_file import pretrained_names, pretrained_path

LSTM, MLP = init_lstm_weights(jax.random.key(0)), init_mlp_weights(jax.random.key(0))
LSTM_OF_NAN = LSTM._replace(linear_bias=jnp.array([jnp.nan]))
MLP_OF_1 = MLP._replace(layers=MLP.layers[-1:])
WIDE = init_mlp_weights(jax.random.key(0), hidden=8).layers[1]
MIXED = MLP._replace(layers=(MLP.layers[0], MLPLayer(WIDE.weight[:, :4], WIDE.bias), MLP.layers[2]))
"""Layers that differ in size: ``mlp_optimizer`` takes them, and a file has one number for all."""
ABOUT = {"architecture": "lstm", "hidden": "20", "layers": "2", "p": "10.0", "scale": "0.1"}


@pytest.fixture
def saved(tmp_path: Path, weights: LSTMWeights) -> Path:
    path = tmp_path / "mine.safetensors"
    save_weights(path, weights, p=10, scale=0.1, made={"command": "lossguard metatrain x"})
    return path


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        (LSTM, {"p": 10, "scale": 0.1}),
        (init_lstm_weights(jax.random.key(2), hidden=4, layers=1), {"p": 7, "scale": 0.02}),
        *(
            (init_mlp_weights(jax.random.key(2), hidden=hidden, layers=layers), {})
            for hidden, layers in ((4, 2), (7, 1), (3, 3))
        ),
    ],
)
def test_round_trip_is_exact(tmp_path, weights, numbers) -> None:
    """And the optimizer has the numbers of the file."""
    path = tmp_path / "small.safetensors"
    save_weights(path, weights, made={"seed": "2"}, **numbers)
    loaded = load_weights(path)
    assert loaded[1:] == (numbers, {"seed": "2"})
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(weights)
    for ours, theirs in zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(weights), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    gradient = jnp.array([1e-4, -3.0])
    make = lstm_optimizer if numbers else mlp_optimizer
    both = pretrained(path), make(weights, **numbers)
    found, expected = (one.update(gradient, one.init(gradient), gradient)[0] for one in both)
    np.testing.assert_array_equal(found, expected)


def test_layout_of_an_mlp_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "mlp.safetensors"
    save_weights(path, init_mlp_weights(jax.random.key(0)), made={})
    with safe_open(path, framework="np") as file:
        found = file.metadata()
    assert len(found.pop("sha256")) == 64
    assert found == {"architecture": "mlp", "hidden": "4", "layers": "2"}
    assert {name: tensor.shape for name, tensor in load_file(path).items()} == {
        "mlp.0.weight": (4, 39),
        "mlp.0.bias": (4,),
        "mlp.1.weight": (4, 4),
        "mlp.1.bias": (4,),
        "mlp.2.weight": (2, 4),
        "mlp.2.bias": (2,),
        "momentum_decays": (3,),
        "second_moment_decay": (1,),
        "factored_decays": (3,),
        "scaling": (7,),
        "scheduler.input": (8, 15),
        "scheduler.hidden": (8, 8),
        "scheduler.bias": (8,),
        "scheduler.output": (8,),
    }
    save_file(load_file(path), path, {**found, "layers": "1"})
    refused(path, r"it holds mlp\.2\.bias, mlp\.2\.weight, which no mlp of 1 layers has")
    save_file(load_file(path), path, {**found, "architecture": "lstm", "p": "1", "scale": "1"})
    refused(path, r"it lacks linear\.bias")


def test_everything_shipped_loads_and_says_how_it_was_made() -> None:
    for name in pretrained_names():
        assert load_weights(pretrained_path(name)).made
        with safe_open(pretrained_path(name), framework="np") as file:
            assert len(file.metadata()["sha256"]) == 64
        optimizer = pretrained(name)
        w = jnp.ones(3)
        update, _ = optimizer.update(w, optimizer.init(w), w)
        assert jnp.isfinite(update).all()


def test_wrong_name_lists_the_right_ones(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr("lossguard.learned.weights_file.SHIPPED", saved.parent)
    assert pretrained_names() == ["mine"]
    reason = r"^learned optimizer must be one of mine, .*, got 'mime' \(did you mean"
    with pytest.raises(ValueError, match=reason):
        pretrained("mime")
    with pytest.raises(ValueError, match=r"^learned optimizer must be one of mine, .*, got"):
        pretrained("../mine")
    with pytest.raises(ValueError, match=r"^learned optimizer must be a str such as 'mlp-small', "):
        pretrained(None)  # pyright: ignore


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 300, -1])
def test_truncated_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    refused(saved, "Error while deserializing header")


def test_a_bit_that_flipped_is_noticed_wherever_it_is(saved: Path) -> None:
    """Also one in the numbers of the metadata, which are read as well as before."""
    content = saved.read_bytes()
    at = [content.index(b'"10.0"') + 1, *range(0, len(content), 997), len(content) - 1]
    for place in at:
        for bit in (0, 6):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            saved.write_bytes(flipped)
            refused(saved, "^weights must be a complete")
    saved.write_bytes(content)
    assert load_weights(saved).numbers["scale"] == 0.1


def test_a_file_of_another_program_needs_no_checksum(saved: Path) -> None:
    save_file(load_file(saved), saved, ABOUT)
    assert load_weights(saved).made == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p": None}, "its metadata lack p"),
        ({"hidden": None, "layers": None}, "its metadata lack hidden, layers"),
        ({"architecture": "gru"}, "its architecture must be one of lstm, mlp, got 'gru'"),
        ({"hidden": "many"}, "invalid literal"),
        ({"hidden": "10"}, r"must be F32 \[40, 2\], got F32 \[80, 2\]"),
        ({"layers": "0"}, "layers must be an integer of at least 1, got 0"),
        ({"layers": "1"}, "it holds lstm.bias_hh_l1, .* which no lstm of 1 layers has"),
        ({"layers": "3"}, "it lacks lstm.bias_hh_l2"),
        ({"layers": "101"}, "layers must be at most 100, got 101"),
        ({"hidden": "10001"}, "hidden must be at most 10000, got 10001"),
        ({"layers": "9" * 4_000}, "layers must be at most 100, got one of many digits"),
        ({"layers": "9" * 5_000}, "Exceeds the limit"),
        ({"p": "-10"}, "p must be above 0 and at most 80, got -10.0"),
        ({"scale": "nan"}, "scale must be positive and finite, got nan"),
    ],
)
def test_wrong_metadata_are_refused(saved: Path, change: dict[str, Any], reason: str) -> None:
    about = {name: value for name, value in {**ABOUT, **change}.items() if value is not None}
    save_file(load_file(saved), saved, about)
    refused(saved, reason)


def test_missing_metadata_are_refused(saved: Path) -> None:
    save_file(load_file(saved), saved)
    refused(saved, "its metadata lack architecture, hidden, layers$")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("linear.bias", None, "it lacks linear.bias"),
        ("other", np.zeros(1, np.float32), "it holds other, which"),
        ("linear.bias", np.zeros(2, np.float32), r"must be F32 \[1\], got F32 \[2\]"),
        ("linear.bias", np.zeros(1, np.float16), r"must be F32 \[1\], got F16 \[1\]"),
        ("linear.bias", np.full(1, np.nan, np.float32), "its tensor linear.bias is not finite"),
        ("linear.bias", np.full(1, np.inf, np.float32), "its tensor linear.bias is not finite"),
    ],
)
def test_wrong_tensors_are_refused(saved, name, tensor, reason) -> None:
    tensors = {**load_file(saved), name: tensor}
    save_file({k: v for k, v in tensors.items() if v is not None}, saved, ABOUT)
    refused(saved, reason)


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def refused(path: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_weights(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message


@pytest.mark.parametrize("name", ["nothing.safetensors", "."])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^weights must be a file, but there is none at"):
        load_weights(tmp_path / name)


@pytest.mark.parametrize("place", ["nowhere/x.safetensors", "file/x.safetensors"])
def test_unwritable_place_is_named(tmp_path: Path, weights: LSTMWeights, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't write the weights: .*x\.safetensors"):
        save_weights(tmp_path / place, weights, p=10, scale=0.1, made={})
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("weights", "arguments", "reason"),
    [
        (LSTM, {"p": 0.0}, "p must be above 0 and at most 80, got 0.0$"),
        (LSTM, {"scale": np.inf}, "scale must be positive and finite, got inf$"),
        (LSTM, {"q": 1.0}, "numbers of LSTMWeights must be p, scale, got p, scale, q$"),
        (
            LSTM,
            {"made": {"p": "10"}},
            "made must map strings other than architecture, .* got 'p': '10'",
        ),
        (LSTM._replace(linear_bias=jnp.array([1j])), {}, "weights must be real, got complex ones$"),
        (LSTM_OF_NAN, {}, r"weights must be finite, but linear\.bias is not$"),
        (MLP, {"scale": 1.0}, "numbers of MLPWeights must be none, got scale$"),
        (MLP_OF_1, {}, "layers must be an integer of at least 1, got 0$"),
        (MIXED, {}, r"weights must have mlp\.1\.weight of shape \[4, 4\], "),
        (None, {}, "weights must be an LSTMWeights such as .*, got None$"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path, weights, arguments, reason) -> None:
    numbers = {"p": 10.0, "scale": 0.1} if isinstance(weights, LSTMWeights) else {}
    with pytest.raises(ValueError, match=f"^{reason}"):
        save_weights(tmp_path / "x", weights, **{"made": {}, **numbers, **arguments})
    assert not names_in(tmp_path)


@pytest.mark.parametrize("name", ["lstm-mnist-mlp", "mlp-small"])
def test_products_are_in_single_precision_on_all_devices(name: str) -> None:
    optimizer, w = pretrained(name), jnp.ones((3, 2))
    made = str(jax.make_jaxpr(optimizer.update)(w, optimizer.init(w), w))
    assert made.count("dot_general[") == made.count("precision=(Precision.HIGHEST") > 0
