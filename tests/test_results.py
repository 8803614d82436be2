"""The records in ``results`` are few, small and whole."""

from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from benchmarks.readings import READINGS
from lossguard import pretrained_names, pretrained_path
from lossguard.experiments import benchmark_tasks, price, report
from lossguard.learned.weights_file import noting_weights, read_weights
from lossguard.runs import records
from lossguard.runs.records import read_json

RESULTS = Path(__file__).parents[1] / "results"
if not RESULTS.is_dir():
    pytest.skip("there are no records here", allow_module_level=True)
NESTED = {
    "long": benchmark_tasks.RECIPES,
    "million": price.RECIPES,
    "price": price.RECIPES,
    "readings": {f"reading-{name}": recipe for name, recipe in READINGS.items()},
}
"""Records of several runs, each in a folder of its own, and the recipes of these."""
OTHERS = {
    "stability": ["README.md", "figure.png", "runs.jsonl.gz", "table.csv"],
    "long": ["README.md", "figure.png"],
    "million": ["README.md", "figure.png"],
    "price": ["README.md", "figure.png"],
    "readings": ["README.md", "figure.png"],
}
"""Records that are not those of one run, and their files."""
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name not in OTHERS)
PARTS = ["README.md", "config.json", "curves.parquet", "figure.png", "manifest.json"]


def test_they_are_few_and_small() -> None:
    assert len(FOLDERS) <= 40
    assert sum(file.stat().st_size for file in RESULTS.rglob("*")) <= 15e6
    assert [path.name for path in RESULTS.iterdir() if not path.is_dir()] == []


@pytest.mark.parametrize("name", OTHERS)
def test_others_have_all_parts(name: str) -> None:
    files = sorted(path.name for path in (RESULTS / name).iterdir() if path.is_file())
    assert files == OTHERS[name]
    assert len((RESULTS / name / "README.md").read_text().splitlines()) <= 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_has_all_parts(folder: Path) -> None:
    """And can be read; of meta-training there are no evaluations."""
    record = records.read_run(folder)
    assert {"config.json", "curves.parquet", "manifest.json"} <= record.manifest["sha256"].keys()
    parts = PARTS if record.is_meta else sorted([*PARTS, records.EVALUATIONS])
    assert sorted(path.name for path in folder.iterdir()) == parts
    assert len((folder / "README.md").read_text().splitlines()) <= 10
    for run in record.manifest.get("runs", [record.manifest]):
        assert {"time", "command", "commit", "device", "versions"} <= run.keys()
        assert len(run["commit"]) == 40 and "/" not in " ".join(run["command"]).replace("runs/", "")


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("fig??")), ids=lambda folder: folder.name)
def test_figures_of_the_paper_are_over_steps(folder: Path) -> None:
    """As the paper has them, and the text that stands beside them."""
    with Image.open(folder / "figure.png") as image:
        assert image.info["Description"] == "Optimizer step"


def test_a_page_shows_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its figures and claims, which take long and have tests of their own."""
    monkeypatch.setattr(report, "_image", lambda folder, draw: "")
    monkeypatch.setattr(report, "judge_claims", lambda records: [])
    for name in ("draw_run", "summary"):
        monkeypatch.setattr(report, name, lambda *_: pl.DataFrame())
    page = report.report([RESULTS], tmp_path / "report.html").read_text()
    assert page.count("Put together from") == sum(
        "runs" in records.read_run(folder).manifest for folder in FOLDERS
    )
    assert "seeds 0 (2026" in page


@pytest.mark.parametrize("name", NESTED)
def test_nested_ones_are_small_and_can_be_read(name: str) -> None:
    folders = [path for path in (RESULTS / name).iterdir() if path.is_dir()]
    read = [records.read_run(folder) for folder in folders]
    assert read
    for record in read:
        recipe = NESTED[name][record.config["name"]]()
        for setting in (
            "dataset",
            "scaling",
            "adam_rate",
            *(["loser"] if name != "readings" else []),
        ):
            assert record.config[setting] == getattr(recipe, setting)
    files = [path for path in (RESULTS / name).rglob("*") if path.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_no_learned_optimizer_made_the_steps_of_sgd_or_adam_alone() -> None:
    hand_made, seen = r"^(SGDnm|Adam|RAdam|Fallback)(,? [a-z0-9. ]+)?$", 0
    for file in RESULTS.rglob("curves.parquet"):
        if "method" in (curves := pl.read_parquet(file)).columns:
            own = curves.filter(pl.col("method").str.contains(hand_made))
            assert own.filter(pl.col("used_learned") + pl.col("learned_updates") > 0).is_empty(), (
                file
            )
            seen += own["method"].n_unique()
    assert seen > 100


def test_weights_that_a_record_names_are_those_that_are_shipped() -> None:
    named = 0
    with noting_weights() as shipped:
        for name in pretrained_names():
            read_weights(pretrained_path(name))
    for file in RESULTS.rglob("manifest.json"):
        inputs = read_json(file).get("inputs_sha256", {})
        for name in inputs.keys() & shipped.keys():
            assert inputs[name] == shipped[name], file
            named += 1
    assert named > 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_curve_is_of_a_run_that_is_named(folder: Path) -> None:
    """As long as it says; and no curve is of two of them."""
    config, made, curves = record = records.read_run(folder)
    if "runs" not in made:
        return
    if record.is_meta:
        seeds = [seed for run in made["runs"] for seed in run["seeds"]]
        assert sorted(seeds) == sorted(curves["seed"].unique())
        return
    ends = curves.select("method", "seed").unique()
    told = [(m, seed) for run in made["runs"] for m in run["methods"] for seed in run["seeds"]]
    assert sorted(told) == sorted(ends.iter_rows())
    for run in made["runs"]:
        of_run = curves.filter(method=run["methods"][0], seed=run["seeds"][0])
        assert of_run["step"].max() == run["steps"]
    assert config["seeds"] == curves["seed"].n_unique()
