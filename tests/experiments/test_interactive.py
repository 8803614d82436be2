"""The page's figures say what the records say, and work in a browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pages import SPEND, curves_of
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from lossguard.experiments.interactive import interactive
from lossguard.experiments.lines import lines
from lossguard.records import Record


def record(curves: pl.DataFrame) -> Record:
    methods = curves["method"].unique(maintain_order=True).to_list()
    return Record({"methods": methods}, {"seconds": dict.fromkeys(methods, 10.0)}, curves)


def layout(html: str) -> dict[str, Any]:
    """Of the figure, as it is handed to Plotly."""
    (found,) = re.findall(r'(\{"template".*\}),\s+\{"responsive"', html, re.S)
    return json.loads(found)


def test_axes_are_those_of_the_records() -> None:
    curves = curves_of(list(SPEND))
    html = interactive(record(curves))
    buttons = layout(html)["updatemenus"][0]["buttons"]
    assert [button["label"] for button in buttons] == ["price", "seconds", "steps"]
    price, seconds, steps = (button["args"][0]["x"] for button in buttons)
    assert len(price) == len(seconds) == len(steps) == 3 + 4 + 4  # line, band, and guards' use
    shown = lines(curves)["SGDnm"].at["steps"]
    assert steps[0] == price[0] == shown.tolist()
    np.testing.assert_allclose(price[3], 7 / 3 * shown, rtol=1e-5)  # of LGL2O, with a forward pass
    np.testing.assert_allclose(seconds[0], 10 / 2 / 5000 * shown, rtol=1e-5)


def test_bands_of_many_methods_are_left_out() -> None:
    curves = curves_of([f"LGL2O {number}" for number in range(6)], np.arange(1, 20))
    assert '"fill":"tonexty"' not in interactive(record(curves))
    few = curves.filter(pl.col("method") != "LGL2O 5")
    assert interactive(record(few)).count('"fill":"tonexty"') == 5


def test_axis_ends_where_a_mean_leaves() -> None:
    """At ten times the highest first loss, or at 1e-8 of it where a mean is 0."""
    curves = curves_of(["SGDnm"], np.arange(1, 201))
    late = pl.col("step") > 100
    for value, ends in ((1e9, {"clipmax": 20.0}), (0.0, {"clipmin": 2e-8})):
        loss = pl.when(late).then(pl.lit(value, pl.Float32)).otherwise("loss")
        html = interactive(record(curves.with_columns(loss=loss)))
        assert layout(html)["yaxis"]["autorangeoptions"] == pytest.approx(ends)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(chromium: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    chromium.get("about:blank")
    chromium.get(page.as_uri())
    drawn = "return document.querySelectorAll('.scatterlayer .trace').length > 0"
    WebDriverWait(chromium, 30).until(lambda _: chromium.execute_script(drawn))
    return chromium


PLOT = "document.querySelector('.js-plotly-plot')"


def test_opens_without_errors_or_network(opened: webdriver.Chrome) -> None:
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource')") == []
    assert opened.title == "lossguard: claims and runs"
    buttons = opened.execute_script(
        f"return [...{PLOT}.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    assert len(buttons) == 6 and not any("hare" in title for title in buttons)


def test_lines_are_means_over_seeds(opened: webdriver.Chrome) -> None:
    """And what is lost leaves a gap."""
    traces = opened.execute_script(
        f"return {PLOT}._fullData.filter((t) => t.showlegend)"
        ".map((t) => [t.name, Array.from(t.x), Array.from(t.y)])"
    )
    assert [name for name, *_ in traces] == list(SPEND)
    _, x, y = traces[0]
    assert len(x) == len(y) > 300
    np.testing.assert_allclose(y[:200], 1.5 / np.sqrt(x[:200]), rtol=1e-5)
    _, _, lost = traces[2]
    assert not isinstance(lost[-1], float) and lost[0] == pytest.approx(1.5)


def test_horizontal_axis_is_switched(opened: webdriver.Chrome) -> None:
    axis = f"const a = {PLOT}._fullLayout.xaxis; return [a.type, a.title.text, 10 ** a.range[1]]"
    kind, title, last = opened.execute_script(axis)
    assert kind == "log" and title.startswith("Price") and last > 7 / 3 * 5000 * 0.9
    opened.find_elements(By.CSS_SELECTOR, ".updatemenu-button")[2].click()
    switched = "Optimizer step"
    WebDriverWait(opened, 10).until(lambda b: b.execute_script(axis)[1] == switched)
    assert 4999 < opened.execute_script(axis)[2] < 6500


def test_a_method_is_switched_with_its_band_and_track(opened: webdriver.Chrome) -> None:
    opened.find_elements(By.CSS_SELECTOR, ".legendtoggle")[1].click()
    visible = f"return {PLOT}._fullData.filter((t) => t.visible === true).map((t) => t.name)"
    left = ["SGDnm"] * 3 + ["Backoff"] * 4
    WebDriverWait(opened, 10).until(lambda b: b.execute_script(visible) == left)


def test_claims_are_told_in_words(opened: webdriver.Chrome) -> None:
    outcomes = [one.text for one in opened.find_elements(By.CSS_SELECTOR, "#claims .outcome")]
    assert outcomes == ["reproduced", "not reproduced", "not run"]


@pytest.mark.parametrize("width", [375, 1600])
def test_fits_into_the_window(opened: webdriver.Chrome, width: int) -> None:
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    right = f"return {PLOT}.querySelector('.main-svg').getBoundingClientRect().right"
    try:
        WebDriverWait(opened, 10).until(
            lambda b: 0.8 * width < b.execute_script(right) <= min(width, 1400)
        )
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
