"""One page from the records of runs: claims about them, and each run's figure and numbers.

The page holds all that it needs and runs no script. What is on it is gathered here; how it looks is
in ``report.html`` and ``report.css``.
"""

import base64
import json
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from matplotlib.figure import Figure

from ..cli.terminal import shown
from ..metatrain import figure as meta
from ..runs.curves import last_step
from ..runs.drawing import FIGURE, png
from ..runs.files import write_whole
from ..runs.records import EVALUATIONS, Record, read_parquet, read_runs
from .claims import judge_claims
from .figures import BANDS, SMOOTHED_FROM, draw_run, summary
from .price import at_equal_price

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG file begins."""
CAPTION = (
    "Training loss, mean over seeds and over the last tenth of the price up to a mark, in "
    "gradients. LGL2O, Hedged and best_of report, with hindsight, the losses of the run that "
    "turned out ahead"
)


def report(folders: Sequence[Path], file: Path) -> Path:
    """Write a page about these runs, or folders of runs; returns its file.

    Claims of the paper are on it if they are about one of the runs.

    Raises:
        ValueError: as ``read_runs``, or if the file is a folder.
    """
    if file.is_dir():  # found out now, not after the claims are judged
        raise ValueError(f"out must be a file, but {file} is a folder")
    records, others = read_runs(folders)
    runs, read = [], {}
    for folder, record in records.items():
        try:
            section = _section(folder, record) | {"id": ""}
            _page(runs=[section], claims=[], figures={}, others=[])
            runs.append(section)
            read[folder] = record
        except Exception as error:  # whatever a strange record makes fail, the others are shown
            others.append(f"{folder} can't be shown: {type(error).__name__}: {error}")
    if not runs:
        raise ValueError("; ".join(others))
    # Meta-trainings last; by the paper's figure; then the latest.
    runs.sort(key=lambda run: str(run["made"]["time"]), reverse=True)
    runs.sort(key=lambda run: (not run["tables"], float(run["figure"] or "inf"), run["name"]))
    for number, run in enumerate(runs, 1):
        run["id"] = f"run-{number}"
    figures = {run["figure"]: run["id"] for run in reversed(runs) if run["figure"]}
    claims = [
        claim
        for claim in judge_claims(read)
        if claim.figure in figures or claim.verdict != "not run"
    ]
    page = _page(claims=claims, figures=figures, runs=runs, others=others)
    write_whole(file, page.encode("utf-8", "backslashreplace"), "the report", make_folder=True)
    return file


@cache
def _template() -> jinja2.Template:
    """The page's; of what records hold it shows control characters, and obeys none."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shell"] = shlex.join
    return environment.get_template("report.html")


def _page(**content: Any) -> str:
    return _template().render(
        **content,
        smoothed_from=SMOOTHED_FROM,
        bands=BANDS,
        style=(Path(__file__).parent / "report.css").read_text("utf-8"),
    )


def _section(folder: Path, record: Record) -> dict[str, Any]:
    """What the page says about one run."""
    config, made, curves = record
    name, figure = config["name"], config.get("figure", "")
    about = {
        "folder": folder.name,
        "figure": figure and str(int(figure.removeprefix("fig"))),
        "made": made,
        "config": json.dumps(config, indent=2),
    }
    if record.is_meta:
        number = f"{figure}: " if figure else ""
        return about | {
            "name": f"Meta-training of {name}",
            "title": f"{number}Meta-training of {name}, {curves['meta_step'].max():,} meta-steps",
            "image": _image(folder, lambda: meta.draw(record)),
            "tables": [],
            "worth": "",
        }
    scores, worth = _evaluations(folder)
    titled = config["title"] or name
    titled = titled if titled.startswith(name) else f"{name}: {titled}"
    steps = last_step(curves)
    whole = curves.filter(step=steps)["seed"].n_unique()  # of those put together some end earlier
    seeds = f"{whole} seed{'s' * (whole > 1)}"
    return about | {
        "name": name,
        "title": f"{titled}, {steps:,} steps, {seeds}",
        "image": _image(folder, lambda: draw_run(record)),
        "tables": [(CAPTION, summary(record)), *scores],
        "worth": worth,
    }


def _image(folder: Path, draw: Callable[[], Figure]) -> str:
    """The figure that the run left; drawn if it left none, or something else."""
    file = folder / FIGURE
    left = b"" if file.is_symlink() or not file.is_file() else file.read_bytes()
    return base64.b64encode(left if left.startswith(PNG) else png(draw())).decode()


def _evaluations(folder: Path) -> tuple[list[tuple[str, pl.DataFrame]], str]:
    """Scores of the last iterates on whole splits, and worth at equal price, if recorded."""
    if not (folder / EVALUATIONS).exists():
        return [], ""
    table = read_parquet(folder / EVALUATIONS)
    names = [name for name in table.columns if name.endswith(("_loss", "_accuracy"))]
    last = table.filter(pl.col("cycle") == pl.col("cycle").max().over("method"))
    of_each = last.group_by("method", maintain_order=True)
    means = of_each.agg(pl.col("step").max(), pl.col(names).mean())
    at = pl.col("step").map_elements("{:,}".format, pl.String).alias("at step")
    told = means.select("method", at, pl.col(names).map_elements("{:.4g}".format, pl.String))
    caption = "The last iterate on the whole of both splits, mean over seeds"
    first, *others = means["method"]
    worth = at_equal_price(first, folder) if others and "gradients" in table.columns else ""
    return [(caption, told.rename({name: name.replace("_", " ") for name in names}))], worth
