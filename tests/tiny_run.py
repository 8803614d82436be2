"""A run of two methods and one step: what its folder holds."""

from pathlib import Path

import polars as pl

from lossguard import records, run_folder

CONFIG = {
    "name": "mine",
    "title": "naïve",
    "methods": ("a", "b"),
    "seeds": 1,
    "seed": 0,
    "rate": 0.1,
}
TABLE = pl.DataFrame(
    {name: [1, 2] for name in records.EXPERIMENT[records.CURVES]}
    | {"method": ["a", "b"], "step": [1, 1]}
)
SECONDS = {"a": 1.5, "b": 2.5}


def leave(folder: Path) -> Path:
    """Its records, without checksums, as tests are to change them."""
    run_folder.open_folder(folder, CONFIG)
    records.write_parquet(folder / records.CURVES, TABLE)
    records.write_json(folder / records.MANIFEST, run_folder.manifest(seconds=SECONDS, data=""))
    return folder
