"""The gallery's code runs as it stands, makes its figures, and they show what the page says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_docs import blocks

pytestmark = pytest.mark.weekly
GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


PAGES = {"docs/gallery.md": ("helps", "", "", ""), "docs/gallery_torch.md": ("", "", "", "", "")}
"""What is kept after each block under this name: the tables of the two runs."""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the blocks leave, one after another; figures go to a folder beside the pages'."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("evosax")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several take five times as long with matrices so small
    folder = tmp_path_factory.mktemp("docs") / "gallery"
    folder.mkdir()
    left: dict[str, Any] = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        for page, kept in PAGES.items():
            names: dict[str, Any] = {}
            for block, name in zip(blocks(page), kept, strict=True):
                exec(block, names)
                if name:
                    table_of = names["lossguard"].decision_table
                    left[name] = names["table"], table_of(names["decisions"])
            left |= names
    torch.set_num_threads(threads)
    return left


def test_it_makes_the_figures_of_the_page(names) -> None:
    made = {path.name: path for path in names["folder"].iterdir()}
    assert {*made} == {path.name for path in GALLERY.iterdir()}
    assert sum(path.stat().st_size for path in GALLERY.iterdir()) < 200_000
    for name, path in made.items():
        np.testing.assert_allclose(gray(path), gray(GALLERY / name), atol=45, err_msg=name)


def gray(path: Path) -> np.ndarray:
    """Means of squares of 20 pixels, from 0 to 255."""
    with Image.open(path) as image:
        size = image.width // 20, image.height // 20
        return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), float)


def test_rewind_ends_the_spike(names) -> None:
    *_, trial, back = names["rewind"].events
    assert (trial.kind, trial.call) == ("trial", 432)
    assert (back.kind, back.call, back.thrown) == ("return", 440, 48)
    unguarded, guarded = names["unguarded"], names["guarded"]
    before = np.mean(guarded[300:400])
    assert np.mean(guarded[-100:]) < before < np.mean(unguarded[-100:]) / 1e3


def test_the_learned_optimizer_helps(names) -> None:
    alone, guarded = names["helps"]
    assert (guarded["winner"] == 0).all() and guarded["learned"][1:].all()
    assert guarded["loss"][1] < alone["loss"][1] / 5
    assert (guarded["price_of_step"][1:20] == 1).all()


def test_the_learned_optimizer_hurts(names) -> None:
    told = names["told"]
    assert not told["Learned"]["loss"][-1] < 1e3
    assert told["Hedged"]["loss"].sum() <= told["Adam"]["loss"].sum()
    hedged, adam = (told[name]["loss"][6:50] for name in ("Hedged", "Adam"))
    np.testing.assert_allclose(hedged, adam, rtol=0.05)  # within six cycles of the take-over
    assert told["Hedged"]["price_of_step"].mean() < 1.1
    assert told["Recommended"]["loss"][20] > 4 * told["Adam"]["loss"][20]
    assert 20 < np.argmax(told["Recommended"]["winner"] == 2) < 35  # goes back to s
    assert told["Recommended"]["loss"][-10:].mean() < 1.4 * told["Adam"]["loss"][-10:].mean()


def test_an_optimizer_of_another_library_leaves_the_minimum_that_adam_stays_in(names) -> None:
    (_, adam), (alone, learned), (price, guarded) = (
        names["spent"][name] for name in ("Adam", "LearnedES", "Recommended")
    )
    assert adam[-100:].mean() == pytest.approx(104, abs=1)
    assert learned[-20:].mean() < 20 and guarded[-100:].mean() < 20  # rounding moves them by a few
    assert len(guarded) == 3 * len(learned) and price[-1] < alone[-1]
    winner = np.asarray(names["decisions"].winner)
    assert (winner[:30] == 0).all() and (winner[-200:] == 1).all()


def test_a_rate_that_is_too_high_costs_the_fallback_nothing(names) -> None:
    low, high = names["guarded_ends"][:2], names["guarded_ends"][2:]
    assert high == [names["fallback"]] * 2
    for alone, guarded in zip(names["alone"], low, strict=False):
        assert alone < guarded < names["fallback"]
    assert min(names["alone"][2:]) > names["fallback"]
    assert sum(decision.gradients for decision in names["histories"][0.3]) == 430


def test_the_decision_log_is_as_told(names) -> None:
    table = names["table"]
    assert table["step"][np.isfinite(table["learned_loss"])].tolist() == [10, 170, 290]
    assert table["winner"].tolist() == [0] * 8 + [1] * 32
    assert (table["price_of_step"] > 1).sum() == 9 and table["gradients"].sum() == 490
    assert table["learned_updates"].sum() == 110


def test_the_highest_rate_leads(names) -> None:
    history = names["lossguard"].decision_table(names["guard"].history)
    price = history["price_of_step"]
    assert (history["winner"] == 2).all()
    assert (price[:10] == 3).all() and 1.15 < price[10:].mean() < 1.25


def test_chance_decides_a_check_near_the_minimum(names) -> None:
    ends = names["ends"]
    assert 30 < ends["LGL2O, nc = 10"] / ends["SGD"] < 60
    assert 20 < ends["LGL2O, nc = 100"] / ends["SGD"] < 40
    assert ends["Recommended"] == pytest.approx(ends["SGD"], rel=1e-3) and ends["Adam"] > 7e-3
