"""What the command refuses, and the sentences that say so."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import RUN, TINY, open_folder

from lossguard.learned import weights_file
from lossguard.runs import folder as run_folder


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("rn",), ("command must be one of demo, run", "got 'rn' (did you mean run?)")),
        (("plot",), ("name the folder of a run, or several",)),
        (("plot", "nowhere"), ("there is no folder nowhere",)),
        (("run",), ("run needs a recipe, one that lossguard list shows or path/to/", "got none")),
        (("run", "mlp-small"), ("mlp-small is run by lossguard metatrain mlp-small",)),
        (("metatrain", "fig05"), ("fig05 is run by lossguard run fig05",)),
        (("run", "fgi03"), ("got 'fgi03' (did you mean fig03?)",)),
        (("run", "fig02"), ("fig02 is run by lossguard sweep fig02, and its outer loop by",)),
        (("run", "fig11"), ("fig11 is run by lossguard metatrain cifar10-conv",)),
        (("sweep", "fig11"), ("fig11 is run by lossguard metatrain cifar10-conv",)),
        (("metatrain", "mnist"), ("got 'mnist' (did you mean mnist-mlp?)",)),
        (("run", "no.py:recipe"), ("recipe no.py:recipe can't be read", "no such Python file")),
        (("run", ".py:"), ("can't be read",)),
        (("run", TINY), ("tiny.py: name it, as in ", "tiny.py:my_recipe\n")),
        (("run", f"{TINY}:recipes"), ("tiny.py:recipes can't be read", "no such function")),
        (("run", f"{TINY}:CHUNK"), ("no such function",)),
        (("run", f"{TINY}:number"), ("must return the Experiment that run takes, got int",)),
        (("run", f"{TINY}:make_task"), ("tiny.py:make_task: ", "missing 1 required", "experiment")),
        (("metatrain", f"{TINY}:recipe"), ("the MetaTraining that metatrain", "got Experiment")),
        (("run", "fig05", "--dataset", "spiral"), ("got 'spiral'", "(did you mean spirals?)")),
        (("run", "fig05", "--scaling", "unit"), ("scaling must be one of none, standardized",)),
        (("run", "fig5"), ("got 'fig5' (did you mean fig05?)",)),
        (
            ("run", "fig05", "--methods", "SGDnm", "Adm"),
            ("each of methods must be one of SGDnm", "got 'Adm' (did you mean Adam?)"),
        ),
        (("run", "fig05", "--methods", "sgdnm"), ("got 'sgdnm' (did you mean SGDnm?)",)),
        (("run", "fig09", "--methods", "LGL2O over adam .01"), ("mean LGL2O over Adam 0.01?)",)),
        (("run", "fig05", "--methods", "Adam", "Adam"), ("each once, got Adam Adam",)),
        (
            ("run", "fig05", "--learned", "lstm"),
            ("must be one of lstm-cifar10-conv, lstm-mnist-mlp", "got 'lstm'"),
        ),
        (("metatrain", "mnist-mlp", "--seed", str(2**63)), ("seed must be at most 4294967295",)),
        (
            ("run", "fig05", "--model.hidden", "9" * 4_000),
            ("each of hidden must be at most 1000000, got one of many digits",),
        ),
        (
            ("run", "fig05", "--model.hidden", "-1"),
            ("each of hidden must be an integer of at least 1, got -1",),
        ),
        (("metatrain", "mnist-mlp", "--dataset", "mnits"), ("(did you mean mnist?",)),
        (("metatrain", "mnist-mlp", "--meta-steps", "0"), ("meta_steps must be an integer of",)),
        (("metatrain", "mnist-mlp", "--validate-every", "0"), ("validate_every must be an",)),
        (("metatrain", "mnist-mlp", "--longest", "50"), ("longest must be at least shortest",)),
    ],
    ids=lambda value: " ".join(value).replace(TINY, "tiny.py") if value[0].islower() else "",
)
def test_bad_input(refused, tmp_path, arguments, parts) -> None:
    refused(arguments, *parts)
    assert not list(tmp_path.iterdir())


def test_an_error_in_ones_own_module_is_told_with_its_place(refused, tmp_path) -> None:
    module = tmp_path / "of_my_own.py"
    module.write_text("def recipe():\n    a, b = (1, 2, 3)\n")
    place = f"too many values to unpack (expected 2) ({module}, line 2)"
    refused(("run", f"{module}:recipe"), place)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "fig05", "--stesp", "3"),
        ("run", "fig05", "--steps", "many"),
        ("run", "fig05", "--loser", "kept"),
        ("metatrain", "mnist-mlp", "surplus"),
        ("claims", "results", "--steps", "3"),
        ("list", "all"),
    ],
)
def test_bad_options(main, capsys, tmp_path, arguments) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert arguments[-1] in err and "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_damaged_weights(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped" / "lstm-mnist-mlp.safetensors"
    shipped.parent.mkdir()
    shutil.copy(weights_file.pretrained_path("lstm-mnist-mlp"), shipped)
    shipped.write_bytes(shipped.read_bytes()[:-100])
    monkeypatch.setattr(weights_file, "SHIPPED", shipped.parent)
    refused(("run", "fig05"), "weights must be a complete .safetensors file")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "runs/lost/failed.json is not readable JSON: "),
        ("[]", "runs/lost/failed.json must hold a JSON object, but holds list"),
        ("{}", "runs/lost is not finished: it failed"),
    ],
)
def test_damaged_reason_of_a_failure_is_named(main, capsys, finished, content, told) -> None:
    shutil.copytree(finished, "runs/whole")
    open_folder(Path("runs/lost"), {})
    Path("runs/lost/failed.json").write_text(content)
    main("plot", "runs")
    assert capsys.readouterr().err.splitlines()[0].startswith(told)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_cannot_be_made(refused, tmp_path, monkeypatch, code) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    refused(RUN, f"lossguard: {os.strerror(code)}: out")
    assert not list(tmp_path.iterdir())


def test_error_of_the_system_without_a_path(refused, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "hold_folder", full)
    refused(RUN, "lossguard: No space left on device\n")
