"""Each extra is enough for its part, and no more: environments of the built wheel, one for each.

They hold links to the installed packages that the wheel names for the extra, and to those that
these name, so that nothing is downloaded.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OF_JAX = {"jax", "jaxlib", "optax", "equinox", "jaxtyping"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    program = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(program, check=True, capture_output=True)
    return folder


class Environment:
    """Where the wheel is installed with one extra, and what that needs."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        self.folder, self.site = folder, folder / "site-packages"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
        (about,) = self.site.glob("lossguard-*.dist-info/METADATA")
        own = Parser().parsestr(about.read_text()).get_all("Requires-Dist") or []
        self.packages: set[str] = set()
        self._add(own, {extra}, own)
        for name in self.packages:
            for top in {file.parts[0] for file in metadata.files(name) or ()} - {".."}:
                if not (self.site / top).exists():
                    (self.site / top).symlink_to(metadata.distribution(name).locate_file(top))

    def _add(self, requirements: list[str], extras: set[str], own: list[str]) -> None:
        """What is required, and what that requires."""
        for requirement in map(Requirement, requirements):
            marker, name = requirement.marker, canonicalize_name(requirement.name)
            if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            if name == "lossguard":
                self._add(own, requirement.extras, own)
            elif name not in self.packages:
                self.packages.add(name)
                self._add(metadata.requires(name) or [], requirement.extras, own)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python there, without what is installed here."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HOME": str(self.folder)}
        program = [sys.executable, "-S", *arguments]
        return subprocess.run(
            program, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def runs(self, program: str) -> None:
        done = self.python("-c", program)
        assert done.returncode == 0, done.stderr

    def raises(self, program: str, last_line: str) -> None:
        done = self.python("-c", program)
        assert done.stderr.splitlines()[-1:] == [last_line], done.stderr


@pytest.fixture
def environment(built: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Environment:
    (wheel,) = built.glob("*.whl")
    return Environment(tmp_path, wheel, request.param)


def of(extra: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("environment", [extra], indirect=True, ids=[extra or "base"])


@of("")
def test_base(environment: Environment) -> None:
    """Small, quick to import, and it says what it lacks."""
    assert environment.packages == {"numpy", "safetensors", "lazy-loader", "packaging"}
    size = sum(
        file.locate().stat().st_size
        for name in environment.packages
        for file in metadata.files(name) or ()
        if file.locate().is_file()
    )
    assert size < 100e6
    environment.runs(
        "import lossguard, pydoc\n"
        "assert pydoc.render_doc(lossguard) and lossguard.__version__\n"
        "assert [getattr(lossguard, name) for name in dir(lossguard)]"
    )
    environment.runs("import sys, lossguard; assert 'numpy' not in sys.modules")  # quick to import
    environment.runs(
        "from lossguard.learned.weights_file import path_of, read_weights\n"
        "assert read_weights(path_of('lstm-mnist-mlp')).layers == 2"
    )
    for name in ("recommended", "Task", "lstm_optimizer"):
        environment.raises(
            f"import lossguard; lossguard.{name}",
            "ModuleNotFoundError: "
            f"lossguard.{name} needs {'equinox' if name == 'Task' else 'jax'}: "
            "pip install 'lossguard[jax]'",
        )
    environment.raises(
        "import lossguard; lossguard.recomended",
        "AttributeError: lossguard has no 'recomended' (did you mean recommended?)",
    )
    environment.raises(
        "import lossguard.torch",
        "ModuleNotFoundError: lossguard.torch needs torch: pip install 'lossguard[torch]'",
    )
    done = environment.python("-m", "lossguard", "demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "lossguard: the command lossguard needs tyro: pip install 'lossguard[experiments]'\n"
    )


@of("jax")
def test_jax(environment: Environment) -> None:
    """Every public name is there; data sets and the command say what they lack."""
    assert not environment.packages & {"polars", "matplotlib", "torch", "tyro", "rich"}
    environment.runs(
        "import jax.numpy as jnp, lossguard, optax\n"
        "for name in lossguard.__all__: getattr(lossguard, name)\n"
        "assert {*lossguard.__all__} <= {*dir(lossguard)} and lossguard.tasks.mnist\n"
        "learned = lossguard.pretrained('lstm-mnist-mlp')\n"
        "guard = lossguard.unguarded(learned)\n"
        "state = guard.init(jnp.ones(2))\n"
        "state, _ = lossguard.rollout(guard, state, lambda w, i: jnp.sum(w**2), cycles=2)\n"
        "assert jnp.isfinite(state.params).all()"
    )
    for name, package in {"mnist": "huggingface_hub", "moons": "sklearn"}.items():
        environment.raises(
            f"from lossguard.tasks import {name}; {name}()",
            f"ModuleNotFoundError: the data set {name} needs {package}: "
            "pip install 'lossguard[experiments]'",
        )
    assert environment.python("-m", "lossguard", "list").returncode == 2


@of("torch")
def test_torch(environment: Environment) -> None:
    """Nothing of JAX, and no SciPy."""
    assert not environment.packages & {*OF_JAX, "scipy", "polars", "matplotlib"}
    environment.runs(
        "import torch, lossguard.torch\n"
        "w = torch.nn.Parameter(torch.ones(3))\n"
        "optimizer = lossguard.torch.MLPOptimizer.pretrained([w], 'mlp-small')\n"
        "w.square().sum().backward()\n"
        "optimizer.step()\n"
        "assert w.isfinite().all() and (w < 1).all()"
    )
    environment.raises(
        "import lossguard; lossguard.recommended",
        "ModuleNotFoundError: lossguard.recommended needs jax: pip install 'lossguard[jax]'",
    )


@of("experiments")
def test_experiments(environment: Environment) -> None:
    """The wheel's demo runs."""
    assert "torch" not in environment.packages
    short = ("--steps", "20", "--seeds", "1", "--methods", "SGD alone", "--out", "here")
    done = environment.python("-m", "lossguard", "demo", *short)
    assert done.returncode == 0, done.stderr
    assert "figure: here/figure.png" in done.stdout
    assert (environment.folder / "here" / "figure.png").is_file()


@of("ray")
def test_ray(environment: Environment) -> None:
    """What the command needs for a cluster is there."""
    assert "torch" not in environment.packages
    environment.runs("import ray, lossguard.experiments.sweep, lossguard.cli.main")


@of("all")
def test_all(environment: Environment) -> None:
    """Every module of the package is imported."""
    environment.runs(
        "import importlib, pkgutil, lossguard\n"
        "for module in pkgutil.walk_packages(lossguard.__path__, 'lossguard.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)"
    )


def test_wheel_and_sdist_are_as_they_should_be(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    for program in (["twine", "check", "--strict", str(sdist)], ["check_wheel_contents"]):
        subprocess.run([sys.executable, "-m", *program, str(wheel)], check=True)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "lossguard = lossguard.__main__:main" in archive.read(entry).decode()
    for name in ("py.typed", "__init__.pyi", "learned/weights/lstm-mnist-mlp.safetensors"):
        assert f"lossguard/{name}" in names


def test_sdist_has_all_but_the_records(built: Path) -> None:
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("this is no repository")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    elsewhere = ("results/", ".ci/", ".github/")
    tracked = [name for name in git.stdout.splitlines() if not name.startswith(elsewhere)]
    assert [name for name in tracked if name not in found and (ROOT / name).exists()] == []
    assert not [name for name in found if name.startswith("results")]
