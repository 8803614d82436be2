"""What changes a checksum, and what doesn't."""

import numpy as np
import pytest

from lossguard.runs import checksums

ARRAYS = {"x": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "b"], object)}


@pytest.mark.parametrize(
    "other",
    [
        ARRAYS | {"x": np.arange(6.0).reshape(3, 2)},
        ARRAYS | {"x": np.nextafter(ARRAYS["x"], 9)},
        ARRAYS | {"x": np.arange(6).reshape(2, 3)},
        ARRAYS | {"x": -ARRAYS["x"] * 0},
        ARRAYS | {"names": np.array(["b", "a"], object)},
        ARRAYS | {"names": np.array(["a', 'b"], object)},
        {"y": ARRAYS["x"], "names": ARRAYS["names"]},
        {"x": ARRAYS["x"]},
    ],
    ids=["shape", "bit", "type", "sign of zero", "order", "quotes", "name", "absent"],
)
def test_each_change_is_seen(other: dict[str, np.ndarray]) -> None:
    assert checksums.of_arrays(other) != checksums.of_arrays(ARRAYS)


def test_what_belongs_to_them_is_seen() -> None:
    assert len({checksums.of_arrays(ARRAYS, {"p": p}) for p in ("10", "11")}) == 2
    assert checksums.of_arrays(ARRAYS, {"p": "1"}) != checksums.of_arrays(ARRAYS, {"p1": ""})


def test_order_and_place_in_memory_are_not() -> None:
    same = {"names": ARRAYS["names"], "x": np.asfortranarray(ARRAYS["x"])}
    assert checksums.of_arrays(same) == checksums.of_arrays(ARRAYS)
    same["x"] = np.repeat(ARRAYS["x"], 2, axis=1)[:, ::2]
    assert checksums.of_arrays(same) == checksums.of_arrays(ARRAYS)
