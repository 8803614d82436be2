"""A run of two methods and one step: what its folder holds."""

import polars as pl

from lossguard import records

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
