"""The page works in a browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pages import SPEND, VERDICTS, curves_of, write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from lossguard.experiments import report as reporting
from lossguard.experiments.report import report


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


def opening(browser: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    """At its first figure."""
    browser.set_window_size(1280, 900)
    load(browser, page)
    scroll_to(browser, plots(browser)[0])
    return browser


def load(browser: webdriver.Chrome, page: Path) -> None:
    """Whole: ``get`` returns before the page is there, now and then, and finds the one before."""
    browser.get("about:blank")
    browser.get(page.as_uri())
    whole = "return document.readyState === 'complete' && location.protocol === 'file:'"
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script(whole))


@pytest.fixture
def opened(chromium: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    return opening(chromium, page)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of twelve methods, of which the first diverges after 100 steps."""
    folder = tmp_path_factory.mktemp("many")
    curves = curves_of([f"LGL2O {number}" for number in range(12)], np.arange(1, 1001))
    lost = (pl.col("method") == "LGL2O 0") & (pl.col("step") > 100)
    loss = pl.when(lost).then(pl.lit(1e9, pl.Float32)).otherwise("loss")
    run = write_run(folder / "run", curves.with_columns(loss=loss))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
        return report([run], folder / "report.html")


def plots(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CLASS_NAME, "plot")


def is_drawn(plot: WebElement) -> bool:
    return bool(plot.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace"))


def scroll_to(browser: webdriver.Chrome, plot: WebElement) -> None:
    """A figure is drawn when it comes near the view."""
    browser.execute_script("arguments[0].scrollIntoView()", plot)
    WebDriverWait(browser, 30).until(lambda _: is_drawn(plot))


def traces(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    """Those of the run's figure, without the bands."""
    found: list[dict[str, Any]] = browser.execute_script(
        """return arguments[0].data.map((t) => ({
             name: t.name, x: Array.from(t.x), y: Array.from(t.y), track: t.yaxis === "y2",
             band: t.fill === "toself"}))""",
        plots(browser)[0],
    )
    return found


def losses(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    return [trace for trace in traces(browser) if not trace["band"] and not trace["track"]]


def switch(browser: webdriver.Chrome, name: str, value: str = "on") -> None:
    selector = f".switches input[name={name}]" + (f"[value='{value}']" if value != "on" else "")
    browser.find_element(By.CSS_SELECTOR, selector).click()


def axis(browser: webdriver.Chrome, name: str) -> dict[str, Any]:
    found: dict[str, Any] = browser.execute_script(
        "const {type, range, title} = arguments[0]._fullLayout[arguments[1]];"
        "return {type, range, title: title.text}",
        plots(browser)[0],
        name,
    )
    return found


def test_opens_without_errors_or_network_and_draws_every_figure(opened: webdriver.Chrome) -> None:
    for plot in plots(opened):
        scroll_to(opened, plot)
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource')") == []
    assert opened.title == "lossguard: claims and runs"
    assert [
        len(plot.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace")) for plot in plots(opened)
    ] == [3 * 2 + 2, 2, 2, 1]
    buttons = opened.execute_script(
        "return [...arguments[0].querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)",
        plots(opened)[0],
    )
    assert len(buttons) == 6 and not any("hare" in title for title in buttons)


@pytest.fixture
def low_window(chromium: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """The figures are far below what is seen of it."""
    device = {"width": 1280, "height": 200, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    load(chromium, page)
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_only_what_comes_near_the_view_is_drawn(low_window: webdriver.Chrome) -> None:
    first, *_, last = plots(low_window)
    assert not is_drawn(first) and not is_drawn(last)
    scroll_to(low_window, last)
    assert not is_drawn(first)


def test_all_is_drawn_for_the_printer(low_window: webdriver.Chrome) -> None:
    low_window.execute_cdp_cmd("Page.printToPDF", {})
    assert all(is_drawn(plot) for plot in plots(low_window))


def test_figures_follow_the_color_scheme(opened: webdriver.Chrome) -> None:
    def front(scheme: str) -> str:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        body = opened.find_element(By.TAG_NAME, "body").value_of_css_property("color")
        color = "return getComputedStyle(document.body).color == arguments[0].layout.font.color"
        WebDriverWait(opened, 30).until(lambda _: opened.execute_script(color, plots(opened)[0]))
        return body

    assert front("dark") != front("light")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def labels(browser: webdriver.Chrome, name: str) -> list[str]:
    ticks = plots(browser)[0].find_elements(By.CSS_SELECTOR, f".{name}tick text")
    return [str(tick.get_attribute("textContent")) for tick in ticks]


def test_labels_are_plain_numbers(opened: webdriver.Chrome) -> None:
    assert {"1", "10", "100", "1000"} <= set(labels(opened, "x"))
    assert {"0.1", "1"} <= set(labels(opened, "y"))
    zoom = "Plotly.relayout(arguments[0], {'xaxis.range': [3.1, 3.2], 'yaxis.range': [-2.5, -2.4]})"
    opened.execute_script(zoom, plots(opened)[0])
    assert {"1,300", "1,400", "1,500"} <= set(labels(opened, "x"))
    assert {"0.0035"} <= set(labels(opened, "y"))


def test_of_many_methods_there_are_lines_only(chromium: webdriver.Chrome, many: Path) -> None:
    """Their samples are dashed as they are."""
    browser = opening(chromium, many)
    assert len(losses(browser)) == 12 and not any(trace["band"] for trace in traces(browser))
    style = "return arguments[0].data.map((t) => [t.line.color, t.line.dash])"
    drawn = browser.execute_script(style, plots(browser)[0])
    style = """return [...document.querySelectorAll(".line")].map((sample) => {
      const {stroke, strokeDasharray} = getComputedStyle(sample);
      return [stroke, strokeDasharray.replaceAll(" ", "")]})"""
    samples = browser.execute_script(style)
    numbers = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color, _ in drawn]
    assert [stroke for stroke, _ in samples] == [
        "rgb({}, {}, {})".format(*number)
        for number in numbers[::2]  # each is in the track too
    ]
    assert [dash for _, dash in samples] == [dash for _, dash in drawn[::2]]
    assert len({tuple(sample) for sample in samples}) == 12
    for number in range(6):
        switch(browser, "method", str(number))
    assert not any(trace["band"] for trace in traces(browser))
    switch(browser, "method", "6")
    assert sum(trace["band"] for trace in traces(browser)) == 5


def test_each_line_is_thinner_than_the_one_before(chromium: webdriver.Chrome, many: Path) -> None:
    """So that both are seen where they coincide, as these do; the samples are as thick."""
    browser = opening(chromium, many)
    style = "return arguments[0].data.filter((t) => !t.yaxis).map((t) => t.line.width)"
    widths = browser.execute_script(style, plots(browser)[0])
    assert widths[0] == 3 and widths[-1] == 1 and (np.diff(widths) < 0).all()
    style = "return [...document.querySelectorAll('.line')].map((one) => one.style.strokeWidth)"
    samples = [float(width) for width in browser.execute_script(style)]
    np.testing.assert_allclose(samples, widths, rtol=1e-4)


def test_all_methods_are_switched_at_once(chromium: webdriver.Chrome, many: Path) -> None:
    browser = opening(chromium, many)
    none, all_ = (browser.find_element(By.CSS_SELECTOR, f"[value={v}]") for v in ("none", "all"))
    none.click()
    assert traces(browser) == [] and hint(browser) == "Choose a method above"
    switch(browser, "method", "3")
    assert [trace["name"] for trace in losses(browser)] == ["LGL2O 3"] and hint(browser) == ""
    all_.click()
    assert len(losses(browser)) == 12
    assert browser.get_log("browser") == []


def test_few_methods_have_no_buttons(opened: webdriver.Chrome) -> None:
    assert opened.find_elements(By.CSS_SELECTOR, ".switches button") == []


def hint(browser: webdriver.Chrome) -> str:
    found = plots(browser)[0].find_elements(By.CSS_SELECTOR, ".annotation-text")
    return " ".join(element.text for element in found)


def test_what_diverges_leaves_at_the_top(chromium: webdriver.Chrome, many: Path) -> None:
    """At ten times the highest loss of the first step, 2; the rest is a zoom away."""
    browser = opening(chromium, many)
    assert "Lines leave at the top, above 20: zoom out" in browser.find_element(
        By.CLASS_NAME, "run"
    ).text.replace("\n", " ")
    lowest, highest = axis(browser, "yaxis")["range"]
    assert highest == pytest.approx(np.log10(20))
    assert -0.2 < lowest - np.log10(1.5 / np.sqrt(1000)) < 0
    (out,) = (
        button
        for button in plots(browser)[0].find_elements(By.CLASS_NAME, "modebar-btn")
        if button.get_attribute("data-title") == "Zoom out"
    )
    browser.execute_script("arguments[0].dispatchEvent(new Event('click'))", out)
    WebDriverWait(browser, 30).until(lambda _: axis(browser, "yaxis")["range"][1] > highest + 0.5)
    switch(opening(chromium, many), "method", "0")
    assert axis(browser, "yaxis")["range"][1] < 0.5


def test_what_is_zero_leaves_at_the_bottom(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    curves = curves_of(["SGDnm", "LGL2O"], np.arange(1, 1001))
    step = pl.col("step")
    small = pl.when(step > 110).then(0.0).otherwise(1e-13)
    zero = pl.when(pl.col("method") == "LGL2O", step > 100).then(small)
    run = write_run(tmp_path / "run", curves.with_columns(loss=zero.otherwise("loss")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
        browser = opening(chromium, report([run], tmp_path / "report.html"))
    told = browser.find_element(By.CLASS_NAME, "run").text.replace("\n", " ")
    assert "Lines leave at the bottom, below 2e-08, where the loss is 0" in told
    assert axis(browser, "yaxis")["range"][0] == pytest.approx(np.log10(2e-8), abs=0.6)


def test_titles_of_axes_are_whole(opened: webdriver.Chrome) -> None:
    """Also a long one, beside a plot of little height."""
    plot = plots(opened)[-1]
    scroll_to(opened, plot)
    title = plot.find_element(By.CLASS_NAME, "ytitle").rect
    assert title["y"] >= plot.rect["y"]
    assert title["y"] + title["height"] <= plot.rect["y"] + plot.rect["height"]


def test_claims_are_told_in_words(opened: webdriver.Chrome) -> None:
    rows = opened.find_elements(By.CSS_SELECTOR, ".claims tbody tr")
    assert [row.find_element(By.CLASS_NAME, "outcome").text for row in rows] == [
        "reproduced",
        "not reproduced",
        "not run",
    ]
    assert "1 reproduced, 1 not reproduced, 1 not run." in opened.find_element(By.ID, "claims").text
    assert "L2O is fast & stable" in rows[0].text
    colors = {
        row.find_element(By.CLASS_NAME, "outcome").value_of_css_property("color") for row in rows
    }
    assert len(colors) == 3


def test_lines_are_means_over_seeds(opened: webdriver.Chrome) -> None:
    assert (axis(opened, "xaxis")["type"], axis(opened, "yaxis")["type"]) == ("log", "log")
    assert [trace["name"] for trace in losses(opened)] == list(SPEND)
    first, *_ = losses(opened)
    steps = np.array(first["x"])
    np.testing.assert_allclose(first["y"][:299], 1.5 / np.sqrt(steps[:299]), rtol=1e-6)
    band = next(trace for trace in traces(opened) if trace["band"])
    np.testing.assert_allclose(band["y"][:299], 2 / np.sqrt(steps[:299]), rtol=1e-6)
    np.testing.assert_allclose(band["y"][:-300:-1], 1 / np.sqrt(steps[:299]), rtol=1e-6)
    tracks = [trace for trace in traces(opened) if trace["track"]]
    assert [trace["name"] for trace in tracks] == ["LGL2O", "Backoff"]
    assert tracks[0]["y"][:4] == [1.0, 0.5, 1.0, 0.5] and tracks[0]["x"] == first["x"]


def test_what_is_lost_leaves_a_gap(opened: webdriver.Chrome) -> None:
    backoff = losses(opened)[2]
    lost = [value is None or not np.isfinite(value) for value in backoff["y"]]
    assert lost == [step >= 3000 for step in backoff["x"]]
    switch(opened, "seed", "1")
    assert np.isfinite(losses(opened)[2]["y"]).all()


def test_horizontal_axis_is_switched(opened: webdriver.Chrome) -> None:
    switch(opened, "x", "gradients")
    assert axis(opened, "xaxis")["title"].startswith("Gradient evaluations")
    assert [trace["x"][-1] for trace in losses(opened)] == [5000, 10000, 6000]
    assert {trace["x"][-1] for trace in traces(opened) if trace["track"]} == {10000, 6000}
    switch(opened, "x", "seconds")
    assert axis(opened, "xaxis")["title"].startswith("Seconds of one seed (mean over seeds")
    assert [trace["x"][-1] for trace in losses(opened)] == pytest.approx([5.0] * 3)
    switch(opened, "x", "step")
    assert [trace["x"][-1] for trace in losses(opened)] == [5000] * 3


def test_methods_are_switched_and_the_zoom_stays(opened: webdriver.Chrome) -> None:
    zoom = "Plotly.relayout(arguments[0], {'xaxis.range': [1, 2], 'yaxis.range': [-1, 0]})"
    opened.execute_script(zoom, plots(opened)[0])
    switch(opened, "method", "1")
    assert {trace["name"] for trace in traces(opened)} == {"SGDnm", "Backoff"}
    assert (axis(opened, "xaxis")["range"], axis(opened, "yaxis")["range"]) == ([1, 2], [-1, 0])
    switch(opened, "method", "1")
    assert [trace["name"] for trace in losses(opened)] == list(SPEND)
    switch(opened, "x", "gradients")  # another axis has another range, in which all is seen
    assert axis(opened, "xaxis")["range"][1] == pytest.approx(4, abs=0.5)
    lowest, highest = axis(opened, "yaxis")["range"]
    assert lowest < np.log10(1 / np.sqrt(5000)) and highest > np.log10(2)


def test_seeds_are_switched(opened: webdriver.Chrome) -> None:
    switch(opened, "apart")
    assert [trace["name"] for trace in losses(opened)] == [m for m in SPEND for _ in range(2)]
    ratio = np.array(losses(opened)[1]["y"]) / np.array(losses(opened)[0]["y"])
    np.testing.assert_allclose(ratio, 2, rtol=1e-6)
    switch(opened, "apart")
    switch(opened, "seed", "0")
    first, *_ = losses(opened)
    expected = 2 / np.sqrt(first["x"][:299])
    np.testing.assert_allclose(first["y"][:299], expected, rtol=1e-6)
    band = next(trace for trace in traces(opened) if trace["band"])
    for edge in (band["y"][:299], band["y"][:-300:-1]):
        np.testing.assert_allclose(edge, expected, rtol=1e-6)
    switch(opened, "seed", "1")
    assert traces(opened) == [] and hint(opened) == "Choose a seed above"
    assert opened.get_log("browser") == []


def test_tracks_are_of_the_seeds_that_are_shown(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    """Of two, the second has always used the learned update, and the first never."""
    curves = curves_of(["LGL2O"], np.arange(1, 101))
    used = pl.col("seed").cast(pl.Float32)
    run = write_run(tmp_path / "run", curves.with_columns(used_learned=used))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
        browser = opening(chromium, report([run], tmp_path / "report.html"))
    for use in (0.75, 1.0):
        (track,) = (trace for trace in traces(browser) if trace["track"])
        assert {*track["y"]} == {use}
        switch(browser, "seed", "0")


@pytest.mark.parametrize("width", [375, 1600])
def test_fits_into_the_window(opened: webdriver.Chrome, page: Path, width: int) -> None:
    device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    load(opened, page)
    for plot in plots(opened):
        scroll_to(opened, plot)
    sizes = opened.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth,"
        " ...[...document.querySelectorAll('.plot')].map((p) => p.getBoundingClientRect().right)]"
    )
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert sizes[1] == width and max(sizes) == width
