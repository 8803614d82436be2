"""Records against a NumPy reference, and what becomes of folders and files that are not whole."""

import errno
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from lossguard import records
from lossguard.guards.protocol import Decision

MEANS = ("loss", "used_learned", "learned_loss", "fallback_loss")


def made_up(steps: np.ndarray, nt: int, seed: int = 0) -> Decision:
    """Decisions [seeds, cycles, nt] of cycles with so many steps, drawn at random."""
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(*steps.shape, nt)).astype(np.float32)
    losses[np.arange(nt) >= steps[..., None]] = np.nan
    flags = np.ones(steps.shape, bool)
    return Decision(
        used_learned=rng.random((*steps.shape, nt)) < 0.5,
        losses=losses,
        steps=steps.astype(np.int32),
        learned_loss=rng.normal(size=steps.shape).astype(np.float32),
        fallback_loss=rng.normal(size=steps.shape).astype(np.float32),
        finite_learned=flags,
        finite_fallback=flags,
        reset_learned=~flags,
        reset_fallback=~flags,
        winner=np.zeros(steps.shape, np.int32),
        gradients=(2 * steps).astype(np.int32),
        forwards=rng.integers(0, 9, steps.shape).astype(np.int32),
        learned_updates=steps.astype(np.int32),
    )


def in_chunks(decisions: Decision, sizes: list[int]) -> list[pl.DataFrame]:
    """Thinned as a run thins them, a chunk of so many cycles at a time."""
    chunks, first = [], 0
    for size in sizes:
        part = Decision(*(leaf[:, first : first + size] for leaf in decisions))
        before = np.asarray(decisions.steps)[:, :first].sum(axis=1)
        spent = records.totals(chunks[-1]) if chunks else None
        chunks.append(records.thin(part, before, spent))
        first += size
    assert first == decisions.steps.shape[1]
    return chunks


def end_of_bin(step: int) -> int:
    """Three significant digits, rounded up."""
    width = 10 ** max(0, len(str(step)) - 3)
    return math.ceil(step / width) * width


def reference(decisions: Decision) -> list[dict[str, Any]]:
    """The curves, one step at a time."""
    rows = []
    for seed in range(decisions.steps.shape[0]):
        bins, step, spent = defaultdict(list), 0, dict.fromkeys(records.COUNTERS, 0)
        for cycle in range(decisions.steps.shape[1]):
            taken = int(decisions.steps[seed, cycle])
            for t in range(taken):
                step += 1
                share = (t + 1) / taken
                counters = {
                    name: before + share * float(getattr(decisions, name)[seed, cycle])
                    for name, before in spent.items()
                }
                values = {
                    "loss": decisions.losses[seed, cycle, t],
                    "used_learned": decisions.used_learned[seed, cycle, t],
                    "learned_loss": decisions.learned_loss[seed, cycle],
                    "fallback_loss": decisions.fallback_loss[seed, cycle],
                }
                bins[end_of_bin(step)].append({**values, **counters, "step": step})
            for name in spent:
                spent[name] += int(getattr(decisions, name)[seed, cycle])
        for entries in bins.values():
            means = {k: np.mean([e[k] for e in entries], dtype=np.float64) for k in MEANS}
            last = {k: entries[-1][k] for k in ("step", *records.COUNTERS)}
            rows.append({"seed": seed, **means, **last})
    return rows


FIXED = np.full((3, 130), 10)
ADAPTIVE = np.random.default_rng(1).choice([1, 10, 20, 40], (3, 70))


@pytest.mark.parametrize(("steps", "nt"), [(FIXED, 10), (ADAPTIVE, 40)])
@pytest.mark.parametrize("sizes", [[], [1, 33, 7]])
def test_curves_are_those_of_a_loop(steps: np.ndarray, nt: int, sizes: list[int]) -> None:
    decisions = made_up(steps, nt)
    sizes = [*sizes, steps.shape[1] - sum(sizes)]
    curves = records.join(in_chunks(decisions, sizes), "LGL2O")
    expected = pl.DataFrame(reference(decisions))
    assert curves["method"].unique().to_list() == ["LGL2O"]
    for name in ("seed", "step"):
        np.testing.assert_array_equal(curves[name], expected[name])
    for name in MEANS:
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-5, atol=1e-6)
    for name in records.COUNTERS:
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-12)


def test_chunks_that_cut_a_bin_are_joined_by_checkpointed_parts_too() -> None:
    decisions = made_up(FIXED, 10)
    first, second, third = in_chunks(decisions, [101, 8, 21])
    whole = records.join([first, second, third], "m")
    assert records.join([pl.concat([first, second]), third], "m").equals(whole)


@pytest.mark.parametrize(
    ("last", "step"),
    [
        (1, 1),
        (999, 999),
        (1_000, 1_000),
        (1_001, 1_010),
        (9_999, 10_000),
        (10_000, 10_000),
        (99_999, 100_000),
        (1_000_000, 1_000_000),
        (1_000_001, 1_010_000),
        (10**9, 10**9),
    ],
)
def test_bins_hold_three_significant_digits(last: int, step: int) -> None:
    chunk = records.thin(made_up(np.array([[1]]), 1), np.array([last - 1]))
    assert chunk["step"].item() == step == end_of_bin(last)


def test_last_bin_ends_where_the_run_does() -> None:
    curves = records.join(in_chunks(made_up(np.full((2, 123), 10), 10), [123]), "m")
    assert curves["step"].unique().sort()[-2:].to_list() == [1220, 1230]
    curves = records.join(in_chunks(made_up(np.full((2, 175), 7), 7), [100, 75]), "m")
    assert curves["step"].unique().sort()[-2:].to_list() == [1220, 1225]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_kept(bad: float, tmp_path: Path) -> None:
    decisions = made_up(np.full((2, 120), 10), 10)
    np.asarray(decisions.losses)[0, 3, 4] = bad  # step 35, a bin of its own
    np.asarray(decisions.losses)[0, 110, 4] = bad  # step 1,105, in the bin 1,110
    records.write_parquet(tmp_path / "t", records.join(in_chunks(decisions, [120]), "m"))
    curves = records.read_parquet(tmp_path / "t").filter(pl.col("seed") == 0)
    spoiled = curves.filter(~pl.col("loss").is_finite())
    assert spoiled["step"].to_list() == [35, 1110]
    np.testing.assert_array_equal(spoiled["loss"], [bad, bad])


def test_mark_loss_against_a_hand_made_answer() -> None:
    steps = [1, 2, 9, 10, 20, 25]
    losses = [9.0, 9.0, 1.0, 3.0, 5.0, 8.0]
    curves = pl.concat(
        pl.DataFrame({"method": m, "seed": s, "step": steps, "loss": [add + x for x in losses]})
        for m, s, add in (("a", 0, 0.0), ("a", 1, 10.0), ("b", 0, 20.0))
    )
    # Step 9 stands for 3 .. 9, step 20 for 11 .. 20, step 25 for 21 .. 25.
    for k, expected in ((10, (7 * 1 + 3) / 8), (25, 8.0), (2, 9.0), (22, 5.0)):
        marks = records.mark_loss(curves, k)
        assert marks.columns == ["method", "seed", "loss"]
        assert marks.rows() == [
            ("a", 0, pytest.approx(expected)),
            ("a", 1, pytest.approx(10 + expected)),
            ("b", 0, pytest.approx(20 + expected)),
        ]


def test_mark_loss_averages_the_steps_that_were_taken() -> None:
    decisions = made_up(np.full((2, 251), 5), 5)
    curves = records.join(in_chunks(decisions, [251]), "m")
    losses = np.asarray(decisions.losses, np.float64).reshape(2, -1)
    for k, first in ((100, 90), (1000, 900), (1255, 1121)):  # the bin 1,130 is taken whole
        marks = records.mark_loss(curves, k)["loss"].to_numpy()
        np.testing.assert_allclose(marks, losses[:, first - 1 : k].mean(axis=1), atol=1e-6)


CONFIG = {"name": "mine", "hidden": (20, 20), "rate": 0.1, "note": "naïve"}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "run"
    records.open_folder(folder, CONFIG)
    records.write_parquet(folder / records.CURVES, pl.DataFrame({"step": [1, 2]}))
    records.write_json(folder / records.MANIFEST, records.manifest(seconds=1.5))
    return folder


def test_round_trip(finished: Path) -> None:
    config, made, curves = records.read_run(finished)
    assert config == {**CONFIG, "hidden": [20, 20]}
    assert curves.equals(pl.DataFrame({"step": [1, 2]}))
    assert made["seconds"] == 1.5 and made["command"][0] == "lossguard"
    assert set(made["versions"]) >= {"jax", "optax", "lossguard"}
    assert made["commit"] is None or len(made["commit"].removesuffix("-dirty")) == 40
    assert sorted(entry.name for entry in finished.iterdir()) == [
        "config.json",
        "curves.parquet",
        "manifest.json",
    ]


def test_same_run_is_gone_on_with_when_asked(finished: Path) -> None:
    records.open_folder(finished, CONFIG, resume=True)
    with pytest.raises(ValueError, match=r"holds this run already: add --resume to go on with it$"):
        records.open_folder(finished, CONFIG)


@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_another_run_is_refused(finished: Path, resume: bool) -> None:
    before = (finished / records.CONFIG).read_bytes()
    with pytest.raises(
        ValueError, match=r"^folder must be empty or hold the same run, but .*run h"
    ):
        records.open_folder(finished, {**CONFIG, "rate": 0.2}, resume=resume)
    assert (finished / records.CONFIG).read_bytes() == before


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"^folder must be .*, but .* holds other files$"):
        records.open_folder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"^folder must be .*thesis\.tex is a file$"):
        records.open_folder(tmp_path / "thesis.tex", CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_a_run_killed_at_its_first_write_is_used(tmp_path: Path) -> None:
    (tmp_path / ".config.json.part").write_text("{")
    records.open_folder(tmp_path, CONFIG, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [records.CONFIG]


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "curves.parquet"])
def test_unfinished_run_is_refused(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(ValueError, match=rf"run holds no finished run: {name} is missing$"):
        records.read_run(finished)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "curves.parquet"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"\xff\xfe\x00", b"PAR1 and PAR1"])
def test_damaged_file_is_named(finished: Path, name: str, content: bytes) -> None:
    (finished / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is not|must hold)") as caught:
        records.read_run(finished)
    assert "\n" not in str(caught.value)
    if name == records.CONFIG:
        with pytest.raises(ValueError, match=r"config\.json (is not|must hold)"):
            records.open_folder(finished, CONFIG, resume=True)


def test_truncated_parquet_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    records.write_parquet(path, pl.DataFrame({"step": np.arange(1000), "loss": np.ones(1000)}))
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"curves\.parquet is not a readable Parquet file: "):
            records.read_parquet(path)


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_full_disk_leaves_the_old_file_and_no_half(
    finished: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    write = Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if failing == "write_bytes":
            write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, failing, full)
    curves, new = finished / records.CURVES, finished / "new" / "x.json"
    message = r"can't write a record: No space left on device: .*"
    with pytest.raises(OSError, match=message + r"curves\.parquet'$") as caught:
        records.write_parquet(curves, pl.DataFrame({"step": range(100)}))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=message + r"x\.json'$"):
        records.write_json(new, {"a": 1})
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before
    assert not list(new.parent.iterdir())


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't write a record: .*file/x\.json'"):
        records.write_json(tmp_path / "file" / "x.json", {})
    assert not (tmp_path / "file").read_bytes()


def test_numbers_survive_json(tmp_path: Path) -> None:
    numbers = {"a": 0.1, "b": 1e-300, "c": 2**53, "d": None, "e": True, "f": "ü"}
    records.write_json(tmp_path / "x.json", numbers)
    assert json.loads((tmp_path / "x.json").read_text()) == numbers
