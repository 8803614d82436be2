"""Checkpoints: what is kept, what comes back, and what becomes of one that is damaged."""

import os
import resource
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from jaxtyping import Array, PRNGKeyArray
from safetensors import safe_open
from safetensors.numpy import save

from lossguard.runs import checkpoints as checkpointing
from lossguard.runs import checksums
from lossguard.runs.checkpoints import Checkpoints
from lossguard.runs.progress_bar import STOPPING, stopping_at_interrupt


class State(NamedTuple):
    """What a run carries: numbers of several types, keys, and empty places and arrays."""

    params: dict[str, Array]
    keys: PRNGKeyArray
    step: Array
    nothing: tuple[()] = ()


def state(seed: int) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "half": jax.random.normal(keys[0], (4, 2), jnp.bfloat16),
        "single": jnp.array([1 / 3, jnp.nan, jnp.inf]) * seed,
        "flag": jnp.array([True, False]),
        "no rows": jnp.zeros((0, 3)),
    }
    return State(params, keys, jnp.int32(seed))


def table(rows: int) -> pl.DataFrame:
    """Numbers that 32 bits can't hold, and a column of vectors."""
    thirds = np.arange(1, rows + 1) / 3
    return pl.DataFrame(
        {
            "step": 10**12 + np.arange(rows),
            "loss": thirds,
            "single": thirds.astype(np.float32),
            "vector": np.outer(thirds, [1.0, 2.0, 3.0]),
        }
    )


def same(found: tuple[Any, ...] | None, step: int) -> None:
    assert found is not None
    assert found[0] == step
    expected = state(step)
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert found[2].schema == table(step).schema  # the order included
    assert found[2].equals(table(step))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder into which three were saved."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (5, 7, 20):
        checkpoints.save(step, state(step), table(step))
    return tmp_path / "checkpoints"


def test_nothing_is_found_and_made_where_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest(state(0)) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert Checkpoints(tmp_path / "empty").latest(state(0)) is None


def test_several_tables_come_back_in_their_order(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, state(1), table(2), table(0), table(3))
    found = Checkpoints(tmp_path).latest(state(0))
    assert found is not None and [one.height for one in found[2:]] == [2, 0, 3]


def test_types_that_numpy_lacks_come_back(tmp_path: Path) -> None:
    types = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.int4, jnp.uint2, jnp.bool
    kept = {str(n): jnp.array([0, 1, 1, 0], dtype) for n, dtype in enumerate(types)}
    kept |= {"none": jnp.ones((2, 0)), "one": jnp.array(2.5), "numpy": np.arange(3)}
    Checkpoints(tmp_path).save(1, kept)
    template = jax.tree.map(jnp.zeros_like, kept) | {"numpy": np.zeros(3, int)}
    found = Checkpoints(tmp_path).latest(template)
    assert found is not None
    for name, leaf in found[1].items():
        assert (leaf.dtype, leaf.shape) == (kept[name].dtype, kept[name].shape)
        assert (leaf == kept[name]).all()


def test_ctrl_c_while_one_is_read_leaves_it(saved, monkeypatch, capfd) -> None:
    read = checkpointing._read

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(checkpointing, "_read", read)  # a second one would end the tests
        signal.raise_signal(signal.SIGINT)
        return read(*arguments)

    monkeypatch.setattr(checkpointing, "_read", interrupted)
    with stopping_at_interrupt() as stopped:
        same(Checkpoints(saved).latest(state(0)), 20)
        assert stopped()
    assert capfd.readouterr().err == STOPPING.decode()


@pytest.mark.parametrize("kind", ["renamed", "pipe", "folder"])
def test_what_is_no_checkpoint_of_that_number_is_passed_over(saved, capfd, kind) -> None:
    """A run whose checkpoint has a higher number would count as further than it is."""
    other = saved / "99.safetensors"
    if kind == "renamed":
        other.write_bytes((saved / "20.safetensors").read_bytes())
    elif kind == "pipe":
        os.mkfifo(other)
    else:
        other.mkdir()
    same(Checkpoints(saved).latest(state(0)), 20)
    reason = "it is number 20" if kind == "renamed" else "it is not a file"
    assert capfd.readouterr().err.endswith(f": {reason}\n")


@pytest.mark.parametrize("part", ["leaf 0", "table 0"])
def test_one_whose_parts_are_not_those_that_it_tells_is_passed_over(saved, capfd, part) -> None:
    """Though its checksum is right."""
    newest = saved / "20.safetensors"
    with safe_open(newest, framework="np") as file:
        about, parts = dict(file.metadata()), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    parts[part] = parts[part][:1]
    about.pop(checksums.NAME)
    newest.write_bytes(save(parts, about | {checksums.NAME: checksums.of_arrays(parts, about)}))
    same(Checkpoints(saved).latest(state(0)), 7)
    assert "checkpoint 20 is damaged and was passed over" in capfd.readouterr().err


def damage(checkpoint: Path) -> None:
    """Cut it in half."""
    checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])


def test_one_that_cannot_be_read_now_is_left(saved: Path, monkeypatch) -> None:
    """For want of file descriptors, as on a machine that others use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = sorted(path.name for path in saved.iterdir())
    folder, free = Checkpoints(saved), os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    try:
        monkeypatch.setattr(folder, "_steps", lambda: [20, 7])  # to list them takes one
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with pytest.raises(OSError):
            folder.latest(state(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(path.name for path in saved.iterdir()) == names


def test_damaged_newest_is_passed_over_aloud(saved, capfd) -> None:
    damage(saved / "20.safetensors")
    before = (saved / "20.safetensors").read_bytes()
    same(Checkpoints(saved).latest(state(0)), 7)
    aside = saved / "20.damaged"
    err = capfd.readouterr().err
    assert err.startswith(f"checkpoint 20 is damaged and was passed over, it is now {aside}: ")
    assert err.count("\n") == 1
    assert aside.read_bytes() == before
    assert sorted(entry.name for entry in saved.iterdir()) == ["20.damaged", "7.safetensors"]


def test_bits_that_flipped_change_no_number(saved: Path) -> None:
    path = saved / "20.safetensors"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    header = rng.integers(0, 400, 50)
    for place in (*header, *rng.integers(0, len(content), 50)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        same(Checkpoints(saved).latest(state(0)), 7)
    path.write_bytes(content)
    same(Checkpoints(saved).latest(state(0)), 20)


def test_name_of_the_damaged_one_is_told_as_it_is(tmp_path, capfd) -> None:
    folder = tmp_path / "[/]:x:"
    Checkpoints(folder).save(7, state(7), table(7))
    damage(folder / "7.safetensors")
    assert Checkpoints(folder).latest(state(0)) is None
    assert f"it is now {folder / '7.damaged'}: " in capfd.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        state(0)._replace(step=jnp.zeros(2, jnp.int32)),
        state(0)._replace(params={"half": jnp.zeros((4, 2), jnp.bfloat16)}),
        state(0)._replace(step=jnp.uint32(0)),
        (state(0), jnp.float32(0)),
    ],
    ids=["shape", "leaves", "dtype", "structure"],
)
def test_checkpoint_of_another_structure_is_refused_and_left(saved, other, capfd) -> None:
    reason = r"^checkpoint must have the structure.*, but .*/20.safetensors has others: [^\n]*$"
    with pytest.raises(ValueError, match=reason):
        Checkpoints(saved).latest(other)
    assert not capfd.readouterr().err
    same(Checkpoints(saved).latest(state(0)), 20)


def test_full_disk_is_told_in_a_sentence(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(OSError, match="can't write a checkpoint: File too large") as caught:
            Checkpoints(saved).save(30, state(30), table(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(saved / "30.safetensors")
    assert not capfd.readouterr().err
    checkpoints = Checkpoints(saved)
    same(checkpoints.latest(state(0)), 20)
    checkpoints.save(30, state(30), table(30))  # the disk has room again
    same(Checkpoints(saved).latest(state(0)), 30)


def test_all_damaged_is_as_none(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage(saved / "7.safetensors")
    damage(saved / "20.safetensors")
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest(state(0)) is None
    assert capfd.readouterr().err.count("is damaged and was passed over") == 2
    checkpoints.save(5, state(5), table(5))  # and the computation starts again
    same(Checkpoints(saved).latest(state(0)), 5)


def test_half_written_one_is_no_checkpoint(saved: Path) -> None:
    (saved / ".0123456789abcdef.part").write_bytes(b"half")
    same(Checkpoints(saved).latest(state(0)), 20)


def test_folder_whose_name_is_relative_and_a_pattern(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Checkpoints(Path("lr[1]")).save(1, state(1), table(1))
    for folder in (Path("lr[1]"), tmp_path / "lr[1]"):
        same(Checkpoints(folder).latest(state(0)), 1)
