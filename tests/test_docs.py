"""The code in the documentation runs as it stands."""

import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


PAGES = [path.relative_to(ROOT) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the repository, and to headings of pages."""
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", (ROOT / page).read_text()):
        target, _, heading = "".join(link).partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page} links to {target}#{heading}"


def test_jax_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top down in one namespace; what is trained fits the data."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    data, cycles, host, models, seeds, saving, devices = blocks("docs/jax.md")
    for block in (data, cycles, host):
        exec(block, names)
        misfit = names["x"] @ names["state"].params - names["t"]
        assert jnp.mean(misfit**2) < 0.01
    exec(models, names)
    misfit = jax.vmap(names["model"])(names["x"]) - names["t"]
    assert jnp.mean(misfit**2) < 0.9 * jnp.mean(names["t"] ** 2)
    trained = names["state"]
    exec(seeds, names)
    assert names["states"].params.shape == (5, 3)
    exec(saving, names)
    assert names["state"] is not trained
    jax.tree.map(np.testing.assert_array_equal, names["state"], trained)
    exec(devices, names)
    assert names["decisions"].losses[-1].mean() < names["decisions"].losses[0].mean()


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """The loop in JAX; the recipe of one's own is a module."""
    loop, recipe = (block for block in blocks("README.md") if "lossguard.torch" not in block)
    exec(loop, {})
    assert capsys.readouterr().out.strip().endswith(("learned", "fallback"))
    names: dict[str, Any] = {}
    exec(recipe, names)
    assert list(names["my_recipe"]().guards()) == ["mine", "sgd", "guarded"]


def test_readme_in_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """The loop: the model learns, and nothing is set back."""
    pytest.importorskip("torch")
    (loop,) = (block for block in blocks("README.md") if "lossguard.torch" in block)
    exec(loop, {})
    loss, _, events = capsys.readouterr().out.strip().partition(" ")
    assert float(loss) < 1 and events == "[]"


class Log:
    """In place of TensorBoard and Weights & Biases: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def add_scalar(self, *told: Any) -> None:
        self.told.append(told)

    def log(self, values: dict[str, Any]) -> None:
        self.told += values.items()


def test_torch_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top down in one namespace, on the CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # a block saves there
    log = Log()
    monkeypatch.setattr(
        torch.utils, "tensorboard", SimpleNamespace(SummaryWriter=lambda: log), raising=False
    )
    model = torch.nn.Linear(3, 1)
    loader = [(x, x.sum(1, keepdim=True)) for x in torch.randn(20, 8, 3)]

    def closure_of(batch: Any) -> Callable[[], Any]:
        def closure() -> Any:
            names["guard"].zero_grad()
            loss = names["loss_fn"](model(batch[0]), batch[1])
            loss.backward()
            return loss

        return closure

    names: dict[str, Any] = {
        "torch": torch,
        "itertools": itertools,
        "wandb": SimpleNamespace(init=lambda: log),
        "LossGuard": importlib.import_module("lossguard.torch").LossGuard,
        "model": model,
        "loader": loader,
        "held_out_loader": loader,
        "parts": loader[:2],
        "loss_fn": torch.nn.functional.mse_loss,
        "closure_of": closure_of,
        "cycles": 2,
        "steps": 20,
        "matrices": [model.weight],
        "others": [model.bias],
    }
    for block in blocks("docs/torch.md"):
        exec(block.replace('"cuda"', '"cpu"').replace("float16", "bfloat16"), names)
        guard = names["guard"]
        if "def closure():" in block:  # of which the guide doesn't show the call
            guard.step(names["closure"])
        if "def log" in block:
            for batch in loader:
                guard.step(closure_of(batch))
            names["log"](guard.last_decision)
    assert {name for name, *_ in log.told} >= {"guard/winner", "guard/used_learned"}
