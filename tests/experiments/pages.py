"""Made-up runs, whose numbers are known, for the report's page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tiny_run import leave

from lossguard.experiments.claims import Verdict

STEPS = np.array([*range(1, 1001), *range(1010, 5001, 10)])
SPEND = {"SGDnm": 1.0, "LGL2O": 2.0, "Backoff": 2.0}
TITLE = 'Spirals & <script>document.title = "run"</script>'
VERDICTS = [
    Verdict("3a", "3", "L2O is fast & stable", "L2O over SGDnm: 0.5", "2", 300, "reproduced"),
    Verdict("3b", "3", "L2O stops", "L2O over SGDnm: 0.5", "2", 5_000, "not reproduced"),
    Verdict("3c", "3", "LGL2O is good", "no run has LGL2O", "", 0, "not run"),
    Verdict("6a", "6", "L2O diverges", "no run of fig06", "", 0, "not run"),
]


def curves_of(
    methods: Sequence[str] | Mapping[str, float], steps: np.ndarray = STEPS, seeds: int = 2
) -> pl.DataFrame:
    """Losses (1 + seed) level / sqrt(step); the learned update is used every other step.

    ``methods`` with their levels, or all at 1. SGDnm takes a gradient a step, others two and a
    forward pass, but for GL2O, which checks nothing, and Backoff, which takes one after step 1000
    and whose second seed is lost from step 3000 on.
    """
    levels = methods if isinstance(methods, Mapping) else dict.fromkeys(methods, 1.0)
    tables = []
    for method, level in levels.items():
        spend = SPEND.get(method.split()[0], 2.0)
        for seed in range(seeds):
            loss, gradients = (1 + seed) * level / np.sqrt(steps), spend * steps
            if method == "Backoff":
                gradients = np.where(steps <= 1000, 2 * steps, 1000 + steps)
                loss = np.where((steps >= 3000) & (seed == 1), np.nan, loss)
            columns = {
                "method": method,
                "seed": seed,
                "step": steps,
                "loss": loss.astype(np.float32),
                "used_learned": (np.arange(len(steps)) % 2).astype(np.float32),
                "gradients": gradients.astype(float),
                "forwards": (spend - 1) * steps * (method != "GL2O"),
                "learned_updates": 1.0 * steps,
            }
            tables.append(pl.DataFrame(columns))
    return pl.concat(tables)


def write_run(
    folder: Path,
    curves: pl.DataFrame,
    *,
    name: str = "fig03",
    evaluations: pl.DataFrame | None = None,
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Of figure 3 by default; ``changes`` are those of its manifest."""
    methods = curves["method"].unique(maintain_order=True).to_list()
    config = {"name": name, "title": TITLE, "methods": methods}
    config |= {"figure": name} if name == "fig03" else {}
    config |= {"seeds": curves["seed"].n_unique(), "seed": 7, **settings}
    made = {"data": "CIFAR-10 as JPEG", "seconds": dict.fromkeys(methods, 10.0)}
    made |= {"resumed": [{"time": "2026-01-03", "commit": "4567def"}], **(changes or {})}
    return leave(folder, config, curves, made, evaluations)


def write_meta(folder: Path, name: str, figure: str = "") -> Path:
    """The weights of its second check are kept, which halve the loss on Moons."""
    validation = np.outer([2.0, 1.0, 3.0], np.linspace(2, 1, 60))
    columns = {"meta_step": [5, 10, 15], "meta_loss": [3.0, np.inf, 1.0], "validation": validation}
    moons = np.where(np.arange(60) < 50, 1, [[0.9], [0.5], [2.0]])
    curves = pl.DataFrame(columns | {"validation_moons": moons})
    return leave(
        folder, {"name": name, "figure": figure}, curves, {"seconds": 3.0, "best_validation": 1.5}
    )
