"""One page from the records of runs: claims about them, and each run's figure with switches.

The page holds all that it needs, Plotly included, and is read without a network. What is on it is
gathered here; how it looks is in ``report.html`` and ``report.css``, what its switches do in
``report.js``.
"""

import base64
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from plotly.offline import get_plotlyjs

from ..curves import last_step
from ..files import write_whole
from ..metatrain.figure import OTHERS, kept, on_others
from ..records import EVALUATIONS, MANIFEST, Record, read_parquet
from .claims import judge_claims
from .evidence import has_settings
from .figures import (
    SMOOTHED_FROM,
    by_seed,
    ceiling,
    drawn_points,
    ends_of,
    floor,
    guards,
    heatmap_of,
    smooth,
    style_numbers,
    summary,
)
from .folders import read_runs
from .recipes import PAPERS


def report(folders: Sequence[Path], file: Path) -> Path:
    """Write a page about these runs, or folders of runs; returns its file.

    Claims of the paper are on it if they are about one of the runs.

    Raises:
        ValueError: as ``read_runs``, or if the file is a folder, or a manifest lacks provenance, or
            evaluations are damaged.
    """
    if file.is_dir():  # found out now, not after the claims are judged
        raise ValueError(f"out must be a file, but {file} is a folder")
    records, others = read_runs(folders)
    sections = [_section(folder, record) for folder, record in records.items()]
    runs = _in_order(sections)
    figures = {run["figure"]: run["id"] for run in reversed(runs) if run["figure"]}
    claims = [
        claim
        for claim in judge_claims(records)
        if claim.figure in figures or claim.verdict != "not run"
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        claims=claims,
        figures=figures,
        runs=runs,
        others=others,
        smoothed_from=SMOOTHED_FROM,
        style=_beside("report.css"),
        script=_beside("report.js"),
        plotly=get_plotlyjs(),
    )
    write_whole(file, page.encode(), "the report", make_folder=True)
    return file


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _in_order(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the paper's figure, then name, those with the recipe's settings first, then the latest.

    Each section gets ``id``, its place on the page.
    """

    def place(section: dict[str, Any]) -> tuple[float, str, bool]:
        return float(section["figure"] or "inf"), section["name"], not section["by_recipe"]

    latest = sorted(sections, key=lambda section: section["time"], reverse=True)
    sections = sorted(latest, key=place)
    for number, section in enumerate(sections, 1):
        section["id"] = f"run-{number}"
    return sections


def _figure(name: str, meta: bool) -> str | None:
    """The number of the paper's figure that a run of this name is about."""
    if meta:
        return next((number for part, number in META.items() if part in name), None)
    found = re.match(r"fig0*(\d+)", name)
    return found[1] if found else None


META = {"mnist-mlp": "2", "cifar10-conv": "11"}
"""Figures about a meta-training, by what its name contains."""


def _section(folder: Path, record: Record) -> dict[str, Any]:
    """What the page says about one run."""
    config, made, curves = record
    if missing := [field for field in PROVENANCE if field not in made]:
        raise ValueError(f"{folder / MANIFEST} lacks {', '.join(missing)}")
    meta = record.is_meta
    name = f"Meta-training of {config['name']}" if meta else config["name"]
    figure = _figure(config["name"], meta)
    many = config.get("seeds", 1)
    steps = int(curves["meta_step"].max()) if meta else last_step(curves)  # pyright: ignore
    unit, seeds = ("meta-steps", "") if meta else ("steps", f", {many} seed{'s' * (many > 1)}")
    titled = f"{name}: {config['title']}" if not meta and config["title"] else name
    number = f"fig{int(figure):02}: " if meta and figure else ""
    return {
        "folder": folder.name,
        "name": name,
        "figure": figure,
        "title": f"{number}{titled}, {steps:,} {unit}{seeds}",
        "time": made["time"],
        "by_recipe": config["name"] not in PAPERS or has_settings(config),
        "note": made.get("data", ""),
        "panels": _meta_panels(curves) if meta else None,
        "curves": None if meta else _curves(config, made, curves),
        "tables": [] if meta else [_summary(record), *_heatmap(record), *_evaluations(folder)],
        "provenance": _provenance(made),
        "config": json.dumps(config, indent=2),
    }


def _curves(config: dict[str, Any], made: dict[str, Any], curves: pl.DataFrame) -> dict[str, Any]:
    """What ``report.js`` draws: for each method its points, arrays in base 64.

    ``style`` of its line, ``step`` [m], ``loss`` [seeds, m] smoothed as in the figure, ``use``
    [seeds, m] likewise, for guards only (rows end where their seeds do, and are None of a seed that
    a method wasn't run with), ``gradients`` [seeds, m] spent until the step, or one
    number if it is always the same a step, ``seconds`` a step of one seed, their mean. ``ceiling``
    and ``floor`` are where the axis ends at first, if lines leave there.
    """
    methods, means, shown, recorded = [], [], 0, 0
    guarded, styles = guards(curves), style_numbers(config["methods"])
    seeds = curves["seed"].unique().sort().to_list()
    for name in config["methods"]:
        steps, loss = by_seed(curves, name, "loss")
        _, used = by_seed(curves, name, "used_learned")
        _, gradients = by_seed(curves, name, "gradients")
        ends, keep = ends_of(curves, name), drawn_points(steps)
        lengths = {seed: int((steps[keep] <= end).sum()) for seed, end in ends.items()}
        shown, recorded = max(shown, len(keep)), max(recorded, len(steps))
        rate = float(gradients[0, 0] / steps[0])
        smoothed = smooth(steps, loss)[:, keep]
        means.append(smoothed[:, : min(lengths.values())].mean(axis=0))
        methods.append(
            {
                "name": name,
                "style": styles[name],
                "step": _base64(steps[keep]),
                "loss": _rows(smoothed, lengths, seeds),
                "use": _rows(smooth(steps, 0.5 + 0.5 * used)[:, keep], lengths, seeds)
                if name in guarded
                else None,
                "gradients": rate
                if np.isclose(gradients, rate * steps, equal_nan=True)[~np.isnan(gradients)].all()
                else _rows(gradients[:, keep], lengths, seeds),
                "seconds": made["seconds"][name] / sum(ends.values()),
            }
        )
    return {
        "methods": methods,
        "seeds": [config["seed"] + seed for seed in seeds],
        "ceiling": ceiling(curves, means),
        "floor": floor(curves, means),
        "shown": shown,
        "recorded": recorded,
    }


def _rows(values: np.ndarray, lengths: dict[int, int], seeds: list[int]) -> list[str | None]:
    """Each seed's, to its end; None where it has none."""
    rows = dict(zip(lengths, values, strict=True))
    return [_base64(rows[seed][: lengths[seed]]) if seed in rows else None for seed in seeds]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _meta_panels(curves: pl.DataFrame) -> list[dict[str, Any]]:
    """The outer loop's losses, the optimizee's at first and with the weights kept, other data."""
    steps, validation = curves["meta_step"].to_numpy(), curves["validation"].to_numpy()
    means = validation.mean(axis=1)
    best = kept(validation)
    inner = np.arange(1, validation.shape[1] + 1)
    outer = {
        "training": (steps, curves["meta_loss"].to_numpy()),
        f"validation, mean of {len(inner)} steps": (steps, means),
    }
    rollouts = {
        f"meta-step {steps[0]:,}": (inner, validation[0]),
        f"meta-step {steps[best]:,}, kept": (inner, validation[best]),
    }
    panels = [
        {"x": "Meta-step", "y": "Loss", "log_x": False, "lines": _lines(outer)},
        {"x": "Optimizer step", "y": "Validation loss", "log_x": True, "lines": _lines(rollouts)},
    ]
    if others := {name: (steps, loss) for name, loss in on_others(curves).items()}:
        panels.append({"x": "Meta-step", "y": OTHERS, "log_x": False, "lines": _lines(others)})
    return panels


def _lines(lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "x": _base64(x), "y": _base64(np.asarray(y))}
        for name, (x, y) in lines.items()
    ]


Rows = list[list[str]]


def _summary(record: Record) -> tuple[str, list[str], Rows]:
    """The table of ``lossguard plot``: caption, headers, rows."""
    table = summary(record)
    columns = [list(column.cells) for column in table.columns]
    rows = [[str(cell) for cell in row] for row in zip(*columns, strict=True)]
    caption = "Training loss, mean over seeds and over the last tenth of the steps up to a mark"
    return caption, [str(column.header) for column in table.columns], rows


def _heatmap(record: Record) -> list[tuple[str, list[str], Rows]]:
    """The map of ``lossguard plot``, if there is one."""
    if (heatmap := heatmap_of(record.config["methods"])) is None:
        return []
    last, losses = heatmap.losses(record.curves)
    rows = [
        [rate, *(f"{loss:#.4g}" for loss in row)]
        for rate, row in zip(heatmap.rates, losses, strict=True)
    ]
    caption = f"Training loss at step {last:,}, by {heatmap.name}'s rate and its decay's time scale"
    return [(caption, ["rate", *(f"tau {tau}" for tau in heatmap.taus)], rows)]


def _evaluations(folder: Path) -> list[tuple[str, list[str], Rows]]:
    """What the last iterates score on whole splits, if that was recorded."""
    if not (folder / EVALUATIONS).exists():
        return []
    table = read_parquet(folder / EVALUATIONS)
    names = [name for name in table.columns if name.endswith(("_loss", "_accuracy"))]
    if lack := [name for name in names if not _are_numbers(table[name])]:
        raise ValueError(f"{folder / EVALUATIONS} is not of a run: it lacks numbers in {lack[0]}")
    try:
        last = table.filter(pl.col("cycle") == pl.col("cycle").max().over("method"))
        means = last.group_by("method", maintain_order=True).agg(pl.col(names).mean())
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder / EVALUATIONS} is not of a run: {reason}") from error
    rows = [[row[0], *(f"{value:.4g}" for value in row[1:])] for row in means.iter_rows()]
    caption = "The last iterate on the whole of both splits, mean over seeds"
    return [(caption, [name.replace("_", " ") for name in means.columns], rows)]


def _are_numbers(column: pl.Series) -> bool:
    return column.dtype.is_numeric() and not column.null_count()


PROVENANCE = ("time", "command", "commit", "device", "platform", "versions", "python")
"""What ``records.manifest`` has of every run."""


def _provenance(made: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    later = ", ".join(
        f"{part.get('time', 'unknown')} (commit {part.get('commit') or 'unknown'})"
        for part in made.get("resumed", ())
    )
    parts = "; ".join(
        f"{', '.join(run['methods'])} ({len(run['seeds'])} seeds to {run['steps']:,}, "
        f"{run['time']}, commit {run['commit'] or 'unknown'})"
        for run in made.get("runs", ())
    )
    return {
        "Made": made["time"],
        "Command": shlex.join(made["command"]),
        "Commit": made["commit"] or "unknown",
        "Device": f"{made['device']}, {made['platform']}",
        "Versions": f"Python {made['python']}, {versions}",
        "Resumed": later,
        "Put together from": parts,
        "Data": made.get("data", ""),
    }
