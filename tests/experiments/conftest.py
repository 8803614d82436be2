"""What several test files of this folder use."""

from collections.abc import Iterator
from pathlib import Path

import jax
import polars as pl
import pytest
from jax.experimental.compilation_cache import compilation_cache
from pages import SPEND, VERDICTS, curves_of, write_meta, write_run
from tiny_run import open_folder

from lossguard.experiments import report as reporting
from lossguard.experiments.report import report
from lossguard.runs import records


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one test compiled, the others and the processes that they start reuse."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="package")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a folder with a run, a meta-training and two that are not finished."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    evaluated = {"method": ["SGDnm"] * 3, "seed": [0, 0, 1], "cycle": [1, 2, 2], "step": [1, 9, 12]}
    evaluations = pl.DataFrame(evaluated | {"test_accuracy": [0.1, 0.5, 0.75]})
    write_run(folder / "a_run", curves_of(list(SPEND)), evaluations=evaluations)
    write_meta(folder / "b_meta", "mine")
    open_folder(folder / "c_half", {"name": "half"})
    open_folder(folder / "d_failed", {"name": "failed"})
    records.write_json(folder / "d_failed" / "failed.json", {"reason": "OSError: no < data"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "judge_claims", lambda records: VERDICTS[: 2 + len(records)])
        return report([folder], folder.parent / "pages" / "report.html")
