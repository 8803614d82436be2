"""One page from the records of runs: the claims, and each run's figure with switches.

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

from ..metatrain.figure import OTHERS, on_others
from ..records import EVALUATIONS, Record, read_parquet, read_run
from .beyond import RECIPES
from .claims import judge_claims
from .evidence import has_settings
from .figures import SMOOTHED_FROM, by_seed, ceiling, guards, smooth, summary
from .folders import find_runs

POINTS_A_DECADE = 100
"""Of each line, from the step on from which lines are smoothed; every step before it."""


def report(folders: Sequence[Path], file: Path) -> Path:
    """Write a page about these runs, or folders of runs, and all claims; returns its file.

    Raises:
        ValueError: if a folder holds no finished run, or a file of it is damaged.
    """
    finished, others = find_runs(folders)
    runs = _in_order([_section(folder) for folder in finished])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        claims=judge_claims(finished),
        figures={_figure(run["name"]): run["id"] for run in reversed(runs) if run["by_recipe"]},
        ids={run["path"]: run["id"] for run in runs},
        runs=runs,
        others={folder.name: reason for folder, reason in others.items()},
        smoothed_from=SMOOTHED_FROM,
        style=_beside("report.css"),
        script=_beside("report.js"),
        plotly=get_plotlyjs(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)
    return file


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def _in_order(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's figures, then others by name; of one name the latest first, the others say so.

    ``id`` is where a section is on the page, ``later`` where the latest by its recipe is. A run
    with other settings takes no other's place.
    """

    def place(section: dict[str, Any]) -> tuple[float, str]:
        return float(_figure(section["name"]) or "inf"), section["name"]

    sections = sorted(sections, key=lambda section: section["time"], reverse=True)
    sections, latest = sorted(sections, key=place), {}
    for number, section in enumerate(sections, 1):
        section["id"] = f"run-{number}"
        section["later"] = latest.get(section["name"])
        if section["by_recipe"]:
            latest.setdefault(section["name"], section["id"])
    return sections


def _figure(name: str) -> str | None:
    """The number of the paper's figure that a run of this name is about."""
    found = re.match(r"fig0*(\d+)", name)
    return found[1] if found else {"Meta-training of lstm-cifar10-conv": "11"}.get(name)


def _by_recipe(config: dict[str, Any]) -> bool:
    """Whether a run has the settings of its recipe, if it is one of ours."""
    name = config["name"]
    return name not in RECIPES or has_settings(config, RECIPES[name]())


def _section(folder: Path) -> dict[str, Any]:
    """What the page says about one run."""
    record = read_run(folder)
    config, made, curves = record
    meta = record.is_meta
    name = f"Meta-training of {config['name']}" if meta else config["name"]
    return {
        "path": folder,
        "folder": folder.name,
        "name": name,
        "title": name if meta or not config["title"] else f"{name}: {config['title']}",
        "time": made["time"],
        "by_recipe": _by_recipe(config),
        "note": made.get("data", ""),
        "panels": _meta_panels(curves) if meta else None,
        "curves": None if meta else _curves(config, made, curves),
        "tables": [] if meta else [_summary(record), *_evaluations(folder)],
        "provenance": _provenance(made),
        "config": json.dumps(config, indent=2),
    }


def _curves(config: dict[str, Any], made: dict[str, Any], curves: pl.DataFrame) -> dict[str, Any]:
    """What ``report.js`` draws: for each method its points, arrays in base 64.

    ``step`` [m], ``loss`` [seeds, m] smoothed as in the figure, ``use`` [seeds, m] likewise, for
    guards only, ``gradients`` [seeds, m] spent until the step, or one number if it is always the
    same a step, ``seconds`` a step of one seed, their mean. ``ceiling`` is where the axis ends at
    first, if lines leave at the top.
    """
    methods, means, kept, recorded = [], [], 0, 0
    guarded = guards(curves)
    for name in config["methods"]:
        steps, loss = by_seed(curves, name, "loss")
        _, used = by_seed(curves, name, "used_learned")
        _, gradients = by_seed(curves, name, "gradients")
        keep = _thin(steps)
        kept, recorded = max(kept, len(keep)), max(recorded, len(steps))
        rate = float(gradients[0, 0] / steps[0])
        smoothed = smooth(steps, loss)[:, keep]
        means.append(smoothed.mean(axis=0))
        methods.append(
            {
                "name": name,
                "step": _base64(steps[keep]),
                "loss": [_base64(row) for row in smoothed],
                "use": [_base64(row[keep]) for row in smooth(steps, 0.5 + 0.5 * used)]
                if name in guarded
                else None,
                "gradients": rate
                if (gradients == rate * steps).all()
                else [_base64(row[keep]) for row in gradients],
                "seconds": made["seconds"][name] / len(loss) / float(steps[-1]),
            }
        )
    seeds = (config["seed"] + np.arange(config["seeds"])).tolist()
    return {
        "methods": methods,
        "seeds": seeds,
        "ceiling": ceiling(curves, means),
        "kept": kept,
        "recorded": recorded,
    }


def _thin(steps: np.ndarray) -> np.ndarray:
    """Which of the steps [m] are on the page, as indices; the last one always is."""
    number = np.floor(POINTS_A_DECADE * np.log10(steps))
    last = np.append(number[1:] != number[:-1], True)
    return np.flatnonzero(last | (steps < SMOOTHED_FROM))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _meta_panels(curves: pl.DataFrame) -> list[dict[str, Any]]:
    """The outer loop's losses, the optimizee's at first and with the weights kept, other data."""
    steps, validation = curves["meta_step"].to_numpy(), curves["validation"].to_numpy()
    means = validation.mean(axis=1)
    best = int(np.nanargmin(means))
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


def _evaluations(folder: Path) -> list[tuple[str, list[str], Rows]]:
    """What the last iterates score on whole splits, if that was recorded."""
    if not (folder / EVALUATIONS).exists():
        return []
    table = read_parquet(folder / EVALUATIONS)
    last = table.filter(pl.col("step") == pl.col("step").max().over("method"))
    names = [name for name in table.columns if name not in ("method", "seed", "cycle", "step")]
    means = last.group_by("method", maintain_order=True).agg(pl.col(names).mean())
    rows = [[row[0], *(f"{value:.4g}" for value in row[1:])] for row in means.iter_rows()]
    caption = "The last iterate on the whole of both splits, mean over seeds"
    return [(caption, [name.replace("_", " ") for name in means.columns], rows)]


def _provenance(made: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    later = ", ".join(
        f"{part['time']} (commit {part['commit']})" for part in made.get("resumed", ())
    )
    return {
        "Made": made["time"],
        "Command": shlex.join(made["command"]),
        "Commit": made["commit"] or "unknown",
        "Device": f"{made['device']}, {made['platform']}",
        "Versions": f"Python {made['python']}, {versions}",
        "Resumed": later,
        "Data": made.get("data", ""),
    }
