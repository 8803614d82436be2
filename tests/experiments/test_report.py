"""The page says what the records say."""

import base64
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pages import VERDICTS, curves_of, write_meta, write_run

from lossguard.experiments import figures
from lossguard.experiments import report as reporting
from lossguard.experiments.report import PNG, report
from lossguard.metatrain import figure
from lossguard.runs import records
from lossguard.runs.drawing import png


def test_a_part_of_no_known_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a package that was installed from a file."""
    monkeypatch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
    made = {"commit": None, "resumed": [{"time": "2026-01-03", "commit": None}, {}]}
    run = write_run(tmp_path / "run", curves_of(["SGDnm"], np.arange(1, 20)), changes=made)
    text = report([run], tmp_path / "report.html").read_text()
    assert "<dt>Commit</dt><dd>unknown</dd>" in text
    told = "2026-01-03 (commit unknown), unknown (commit unknown)"
    assert f"<dt>Resumed</dt><dd>{told}</dd>" in text


def test_page_tells_how_a_run_was_made(page: Path) -> None:
    text = page.read_text()
    for part in (
        ', 5,000 steps, 2 seeds <span class="folder">a_run</span></h2>\n',
        '<p class="small about">data: CIFAR-10 as JPEG</p>',
        '<h2>Meta-training of mine, 15 meta-steps <span class="folder">b_meta</span></h2>',
        "<h2>fig03: Spirals &amp; &lt;script&gt;",
        "<dd>lossguard run --methods &#39;LGL2O over Adam&#39;</dd>",
        "<dd>0123abc</dd>",
        "<dt>Resumed</dt><dd>2026-01-03 (commit 4567def)</dd>",
        "<dd>cpu (2 cores), Linux</dd>",
        "<dd>Python 3.11.7, jax 0.7</dd>",
        "&#34;name&#34;: &#34;fig03&#34;",
        "Where there are 9 methods or\nfewer, bands reach",
        "<th>loss at 5,000</th>",
        '<tr><th scope="row">SGDnm</th><td>12</td><td>0.625</td></tr>',
        "c_half holds no finished run: manifest.json is missing</li>",
        "d_failed is not finished: OSError: no &lt; data</li>",
    ):
        assert part in text


def test_each_run_is_shown_as_its_figure(page: Path) -> None:
    images = re.findall(r'<img src="data:image/png;base64,(.*?)"', page.read_text())
    run, meta = (
        records.read_run(page.parent.parent / "runs" / name) for name in ("a_run", "b_meta")
    )
    drawn = figures.draw_run(run), figure.draw(meta)
    assert [*map(base64.b64decode, images)] == [*map(png, drawn)]


def test_each_method_is_evaluated_where_it_ended(tmp_path, monkeypatch) -> None:
    """One whose cycles are longer has fewer of them; and both are compared at equal price."""
    monkeypatch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
    curves = curves_of(["SGDnm", "LGL2O"], np.arange(1, 11))
    table = {"method": ["SGDnm", "SGDnm", "LGL2O", "LGL2O"], "seed": 0, "cycle": [1, 4, 1, 2]}
    table |= {"step": [5, 20, 10, 20], "gradients": [5, 20, 10, 40], "forwards": 0}
    table |= {"train_loss": [4.0, 4.0, 6.0, 6.0], "test_loss": [3.0, 2.0, 1.5, 1.0]}
    run = write_run(tmp_path / "run", curves, evaluations=pl.DataFrame(table))
    text = report([run], tmp_path / "report.html").read_text()
    for method, train, test in (("SGDnm", 4, 2), ("LGL2O", 6, 1)):
        assert (
            f'<tr><th scope="row">{method}</th><td>20</td><td>{train}</td><td>{test}</td></tr>'
            in text
        )
    assert "After a price of 20 gradients, loss over that of SGDnm: LGL2O 1.5</p>" in text


def test_a_strange_record_leaves_the_others_on_the_page(tmp_path) -> None:
    write_run(tmp_path / "runs" / "fine", curves_of(["SGDnm"], np.arange(1, 11)))
    table = pl.DataFrame({"method": ["SGDnm"], "test_loss": [1.0]})
    strange = tmp_path / "runs" / "strange"
    write_run(strange, curves_of(["SGDnm"], np.arange(1, 11)), name="fig03", evaluations=table)
    text = report([tmp_path / "runs"], tmp_path / "report.html").read_text()
    assert "10 steps, 2 seeds" in text and "strange can&#39;t be shown: ColumnNotFound" in text
    with pytest.raises(ValueError, match=r"strange can't be shown: ColumnNotFoundError: "):
        report([strange], tmp_path / "report.html")


def test_runs_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By figure, the latest first; then those of none; meta-training last."""
    monkeypatch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
    curves = curves_of(["SGDnm"], np.arange(1, 20))
    for folder, name, time, settings in (
        ("a", "fig10", "2026-01-02", {"figure": "fig10"}),
        ("b", "mine", "2026-01-02", {}),
        ("c", "fig03", "2026-01-05", {"figure": ""}),
        ("d", "fig03", "2026-01-04", {}),
        ("e", "fig03", "2026-01-03", {}),
        ("f", "fig02-moons", "2026-01-02", {"figure": "fig02"}),
    ):
        write_run(tmp_path / folder, curves, name=name, changes={"time": time}, **settings)
    write_meta(tmp_path / "g", "lstm-cifar10-conv", "fig11")
    write_meta(tmp_path / "h", "lstm-mnist-mlp", "fig02")
    text = report([tmp_path], tmp_path / "report.html").read_text()
    found = re.findall(r'id="run-(\d)">\n<h2>(.*?)(?:: .*)? <span class="folder">(.)<', text)
    assert found == [
        ("1", "fig02-moons", "f"),
        ("2", "fig03", "d"),
        ("3", "fig03", "e"),
        ("4", "fig10", "a"),
        ("5", "fig03", "c"),
        ("6", "mine", "b"),
        ("7", "fig02", "h"),
        ("8", "fig11", "g"),
    ]
    assert "<h2>fig11: Meta-training of lstm-cifar10-conv, 15 meta-steps <" in text
    links = re.findall(r'<td data-label="Figure">(.*)</td>', text)
    assert links == 3 * ['<a href="#run-2">3</a>']


def test_claims_are_those_about_the_runs(tmp_path: Path) -> None:
    """The real ones: of one's own runs there are none, of figure 3 its own."""
    curves = curves_of(["SGDnm"], np.arange(1, 20))
    own = write_run(tmp_path / "own", curves, name="fig5_mine")
    text = report([own], tmp_path / "own.html").read_text()
    assert 'id="claims"' not in text and "not run" not in text and "<h1>Runs</h1>" in text
    figure_3 = write_run(tmp_path / "three", curves)
    text = report([own, figure_3], tmp_path / "both.html").read_text()
    assert re.findall(r'<th scope="row">(\d[a-z])</th>', text) == ["3a", "3b", "3c", "3d", "3e"]


def test_what_a_run_is_put_together_from_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reporting, "judge_claims", lambda records: VERDICTS)
    part = {"methods": ["LGL2O"], "seeds": [1], "steps": 20, "time": "2026-01-01", "commit": "abc"}
    curves = curves_of(["LGL2O"], np.arange(1, 21))
    run = write_run(tmp_path / "run", curves, changes={"runs": [part]})
    text = report([run], tmp_path / "report.html").read_text()
    assert "LGL2O (1 seeds to 20, 2026-01-01, commit abc)" in text


def test_command(page, main, tmp_path, capsys) -> None:
    """With the real claims."""
    folder = page.parent.parent / "runs" / "a_run"
    main("report", folder, "-o", tmp_path / "r")
    assert capsys.readouterr().out == f"report: {tmp_path / 'r'}\n"
    assert (tmp_path / "r").read_text().count("<img src=") == 1
    assert '<th scope="row">3a</th>' in (tmp_path / "r").read_text()


def test_a_page_is_not_a_folder(tmp_path, refused) -> None:
    told = f"lossguard: out must be a file, but {tmp_path} is a folder\n"
    refused(("report", "half", "-o", tmp_path), told)


def test_a_figure_that_a_run_left_is_not_drawn_again(tmp_path, monkeypatch) -> None:
    """What else has its name is not shown."""
    monkeypatch.setattr(reporting, "judge_claims", lambda records: [])
    folder = write_run(tmp_path / "run", curves_of(["SGDnm"], np.arange(1, 11)))
    drawn = png(figures.draw_run(records.read_run(folder)))
    for left, shown in ((PNG + b"as it was", PNG + b"as it was"), (b"<svg/>", drawn)):
        (folder / "figure.png").write_bytes(left)
        page = report([folder], tmp_path / "page.html").read_text()
        (image,) = re.findall(r'<img src="data:image/png;base64,(.*?)"', page)
        assert base64.b64decode(image) == shown
