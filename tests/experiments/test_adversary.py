"""Folders of records that somebody made to do harm: nothing is executed, nothing outside written.

What can't be read is refused with a sentence, by every command.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
from pages import curves_of, write_meta, write_run
from tiny_run import leave, open_folder

from lossguard.metatrain.trainings import cifar10_conv_plain
from lossguard.runs import folder as run_folder
from lossguard.runs import records
from lossguard.runs.config import as_config

NAMES = (
    "Adam\x1b]0;owned\x07\x1b[2J",
    "../../outside/precious",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "[red]$_{$",
)
CALLED = {"make_task": "os:system", "make_methods": "os:system", "model": {"kind": "os:system"}}
RUN = f"{tiny.__file__}:recipe"


@pytest.fixture
def world(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of somebody else's, beside which ``main`` runs from here on."""
    outside = tmp_path / "outside"
    write_run(outside / "a_run", curves_of(["SGDnm"]), name="mine")
    (outside / "precious").write_bytes(b"precious")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def executed(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"{arguments} was executed")

    monkeypatch.setattr(os, "system", executed)
    monkeypatch.setattr(os, "popen", executed)
    return tmp_path


def content(folder: Path) -> dict[str, bytes | str]:
    """Of all files in it, and where links lead."""
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def plant(folder: Path, outside: Path) -> None:
    """Links to somebody else's file, under every name that might be written to."""
    names = ("figure.png", "report.html", "failed.json")
    for name in (*names, *(f".{name}.part" for name in names)):
        (folder / name).symlink_to(outside / "precious")


@pytest.mark.parametrize("name", ["plot", "claims", "report"])
def test_what_reads_records_executes_nothing_and_writes_nothing_outside(
    world, main, capsys, name
) -> None:
    curves = curves_of(["SGDnm"] * len(NAMES))
    numbers = np.repeat(np.arange(len(NAMES)), len(curves) // len(NAMES))
    curves = curves.with_columns(method=pl.Series([NAMES[k] for k in numbers]))
    bad = write_run(Path("runs/a"), curves, name="fig03", **CALLED)
    forged = write_run(Path("runs/c"), curves)
    made = records.read_json(forged / records.MANIFEST)
    made["sha256"] |= {"../../outside/precious": "0" * 64, "/etc/passwd": "0" * 64}
    records.write_json(forged / records.MANIFEST, made)
    plant(bad, world / "outside")
    plant(write_meta(Path("runs/b"), NAMES[0]), world / "outside")
    Path("runs/link").symlink_to(world / "outside" / "a_run")
    (Path("runs") / "pipe").mkdir()
    os.mkfifo(Path("runs/pipe/config.json"))
    os.mkfifo(Path("runs/pipe/manifest.json"))
    before = content(world / "outside")

    main(name, "runs", *(("--out", "page.html") if name == "report" else ()))
    out, err = capsys.readouterr()
    assert content(world / "outside") == before
    assert not {"\x1b", "\x07"} & {*out, *err}
    if name == "plot":
        assert NAMES[0].replace("\x1b", r"\x1b").replace("\x07", r"\x07") in out
    told = err if name != "report" else Path("page.html").read_text()
    assert "runs/link is a link: name the folder that it leads to" in told
    assert "runs/pipe holds no finished run: " in told
    assert "runs/c/manifest.json is damaged" in told
    if name == "plot":
        assert (bad / "figure.png").is_file() and not (bad / "figure.png").is_symlink()
    if name == "report":
        assert "<script" not in told and not {"\x1b", "\x07"} & {*told}


def test_a_strange_record_leaves_the_others_shown(world, main, capsys) -> None:
    """Whatever of it each command stumbles over; of one alone it says that none is left."""
    curves = curves_of(["SGDnm"])
    write_run(Path("runs/good"), curves, name="fig03")
    write_run(Path("runs/a"), curves, name="fig03", changes={"command": [1, 2]})
    write_run(Path("runs/b"), curves, name="fig03", changes={"seconds": {"SGDnm": "x"}})
    write_run(Path("runs/c"), pl.concat([curves, curves]), name="fig03")
    meta = pl.DataFrame({"meta_step": [1], "meta_loss": [1.0]})
    leave(Path("runs/e"), as_config(cifar10_conv_plain()), meta, {})
    write_run(Path("runs/d"), curves.with_columns(step=None).cast({"step": pl.Int64}))
    main("report", "runs")
    page = Path("report.html").read_text()
    assert 'id="run-1"' in page and "runs/a can&#39;t be shown: TypeError: " in page
    main("claims", "runs")
    err = capsys.readouterr().err
    assert "runs/c can't be judged: ValueError: a step of a seed is there twice" in err
    assert "runs/e can't be judged: ColumnNotFoundError: " in err
    main("plot", "runs")
    out, err = capsys.readouterr()
    assert "runs/good/figure.png" in out and "runs/b can't be shown: " in err
    assert "runs/d can't be shown: " in err
    with pytest.raises(SystemExit):
        main("plot", "runs/b")
    assert capsys.readouterr().err.endswith("lossguard: none of these runs can be shown\n")


STRANGE = {
    "title": {"title": None},
    "name": {"name": ["fig03"]},
    "methods": {"methods": 5},
    "no method drawn": {"methods": ("a", "c")},
    "figure": {"figure": ["fig03"]},
    "number of a figure": {"figure": 3},
    "no number of a figure": {"figure": "xyz"},
    "seed": {"seed": "x"},
    "half a seed": {"seed": 0.5},
    "seconds": {"changes": {"seconds": 5}},
    "no seconds": {"changes": {"seconds": {"a": 1.0}}},
    "time": {"changes": {"time": 5, "data": None}},
    "command": {"changes": {"command": "lossguard"}},
    "versions": {"changes": {"versions": "3"}},
}
"""What is strange in a config, or in ``changes`` of a manifest."""
STRANGE_COLUMNS = {
    "words": pl.lit("x").alias("loss"),
    "numbers as words": pl.col("loss").cast(pl.String),
    "truth": (pl.col("step") > 2).alias("step"),
    "below 0": pl.col("step") * -1,
    "nothing": pl.lit(None, pl.Int64).alias("step"),
    "no seed": pl.lit(None, pl.Int64).alias("seed"),
    "no losses": pl.lit(None, pl.Float32).alias("loss"),
    "lists": pl.concat_list("loss").alias("loss"),
    "method": pl.lit(1).alias("method"),
}
"""The same of its curves."""


def test_no_strange_record_ends_what_is_told_of_others(world, main, capsys) -> None:
    """Such as somebody made by hand, with the right checksums."""
    curves = curves_of(["SGDnm", "L2O"], np.arange(1, 31))
    write_run(Path("runs/good"), curves)
    for name, how in STRANGE.items():
        write_run(Path("runs") / name, curves, **how)
    for name, column in STRANGE_COLUMNS.items():
        write_run(Path("runs") / name, curves.with_columns(column))
    for name in curves.columns:
        write_run(Path("runs") / f"without {name}", curves, name="fig03")
        folder = Path("runs") / f"without {name}"
        records.write_parquet(folder / records.CURVES, curves.drop(name))
        run_folder.finish(folder, records.read_json(folder / records.MANIFEST))
    write_run(Path("runs/empty"), curves.clear())
    main("plot", "runs")
    assert "records: runs/good\n" in capsys.readouterr().out
    main("report", "runs")
    assert '<span class="folder">good</span>' in Path("report.html").read_text()
    main("claims", "runs")
    assert "verdict" in capsys.readouterr().out
    main("claims", "runs/empty")


@pytest.mark.parametrize("name", ["run", "sweep"])
@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/0", "other"])
def test_a_run_does_not_go_on_where_links_lead_out(world, refused, name, link) -> None:
    folder = Path("out/recipe")
    place = folder / link
    place.parent.mkdir(parents=True)
    place.symlink_to(world / "outside", target_is_directory=True)
    (folder / records.CONFIG).write_text("{}")  # as of a run under way
    before = content(world)
    arguments = (RUN, "--out", folder, "--resume") if name == "run" else (RUN, "--out", "out")
    refused((name, *arguments), "folder must hold no links, but ")
    assert content(world) == before


def test_a_sweep_does_not_run_in_a_link(world, refused) -> None:
    (world / "outside" / "empty").mkdir()
    Path("out").mkdir()
    Path("out/recipe").symlink_to(world / "outside" / "empty", target_is_directory=True)
    refused(("sweep", RUN, "--out", "out"), "folder must be no link in a sweep, but ")
    assert not list((world / "outside" / "empty").iterdir())


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_config_that_names_other_functions_calls_none(world, refused, name) -> None:
    """What runs is the recipe that the command names: a config is only compared with it."""
    open_folder(Path("out/recipe"), {"name": "tiny", "methods": ["Signs"], **CALLED})
    out = "out/recipe" if name == "run" else "out"
    arguments = (name, RUN, "--out", out, *["--resume"] * (name == "run"))
    refused(arguments, "make_task (os:system, not tiny:make_task)")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"resumed": 5}', "started.json is not of a run"),
        ('{"inputs_sha256": {}, "resumed": []}', "started.json is not of a run"),
        ("[" * 100_000, "started.json is not readable JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_manifest_so_far_that_cannot_be_is_refused(world, refused, content, reason) -> None:
    open_folder(Path("out"), as_config(tiny.recipe()))
    Path("out", run_folder.STARTED).write_text(content)
    refused(("run", RUN, "--out", "out", "--resume"), reason)
