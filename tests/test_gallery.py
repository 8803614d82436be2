"""The gallery's code runs as it stands, makes its figures, and they show what the page says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_docs import blocks

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the blocks leave, one after another; figures go to a folder beside the page's."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several take five times as long with matrices so small
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("docs") / "gallery"}
    names["folder"].mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"].parent)
        for block, kept in zip(blocks("docs/gallery.md"), ("", "helps", "", "", ""), strict=True):
            exec(block, names)
            if kept:
                names[kept] = names["table"], names["lossguard"].decision_table(names["decisions"])
    torch.set_num_threads(threads)
    return names


def test_it_makes_the_figures_of_the_page(names) -> None:
    made = {path.name: path for path in names["folder"].iterdir()}
    assert {*made} == {path.name for path in GALLERY.iterdir()}
    assert sum(path.stat().st_size for path in GALLERY.iterdir()) < 200_000


def test_rewind_ends_the_spike(names) -> None:
    (event,) = names["events"]
    assert (event.kind, event.call, event.thrown) == ("return", 448, 128)
    before, unguarded, guarded = (
        np.mean(losses)
        for losses in (
            names["guarded"][300:400],
            names["unguarded"][-100:],
            names["guarded"][-100:],
        )
    )
    assert guarded < before < unguarded / 1e3


def test_the_learned_optimizer_helps(names) -> None:
    alone, guarded = names["helps"]
    assert (guarded["winner"] == 0).all() and guarded["learned"][1:].all()
    assert guarded["loss"][1] < alone["loss"][1] / 5
    assert (guarded["price_of_step"][1:20] == 1).all()


def test_the_learned_optimizer_hurts(names) -> None:
    told = names["told"]
    assert not told["Learned"]["loss"][-1] < 1e3
    assert told["Hedged"]["loss"].sum() <= told["Adam"]["loss"].sum()
    hedged, adam = (told[name]["loss"][5:50] for name in ("Hedged", "Adam"))
    np.testing.assert_allclose(hedged, adam, rtol=0.05)  # from the fifth cycle on
    assert told["Hedged"]["price_of_step"].mean() < 1.1
    assert told["Recommended"]["loss"][20] > 4 * told["Adam"]["loss"][20]
    assert 20 < np.argmax(told["Recommended"]["winner"] == 2) < 35  # goes back to s
    assert told["Recommended"]["loss"][-10:].mean() < 1.4 * told["Adam"]["loss"][-10:].mean()


def test_the_highest_rate_leads(names) -> None:
    history = names["lossguard"].decision_table(names["guard"].history)
    assert (history["winner"][10:] == 2).all()
    assert 1.15 < history["price_of_step"].mean() < 1.25


def test_chance_decides_a_check_near_the_minimum(names) -> None:
    ends = names["ends"]
    assert 30 < ends["LGL2O, nc = 10"] / ends["SGD"] < 60
    assert 20 < ends["LGL2O, nc = 100"] / ends["SGD"] < 40
    assert ends["Recommended"] == pytest.approx(ends["SGD"], rel=1e-3) and ends["Adam"] > 7e-3
