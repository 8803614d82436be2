"""The code in the documentation runs as it stands."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard
from lossguard.experiments.run import run

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
        if "://" in target or ("results/" in target and not (ROOT / "results").is_dir()):
            continue  # an sdist has no records
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page} links to {target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_are_whole(page: Path) -> None:
    """A blank line would make text of the rows after it."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    assert not re.search(r"^\|.*\|\n\n+\|(?!.*\n\|[ :-]*-)", text, re.M)


def test_jax_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top down in one namespace; what is trained fits the data."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, host, device, models, rates, alone, cycles, seeds, saving = blocks("docs/jax.md")

    def misfit(params: Any) -> Any:
        return jnp.mean((names["x"] @ params - names["t"]) ** 2)

    for block in (first, host):
        exec(block, names)
        names["x"] = jnp.asarray(names["draw"](size=(1000, 3)))
        names["t"] = names["x"] @ jnp.array([1.0, -2.0, 0.5])
        assert misfit(names["state"].params) < 0.01
    exec(device, names)
    assert misfit(names["state"].params) < 0.01
    exec(models, names)
    assert names["accuracy"].shape == (2, 10) and names["accuracy"][-1].mean() > 0.8
    assert names["decisions"].losses[-1].mean() < 0.3 * jnp.mean(names["t"] ** 2)
    assert jnp.isfinite(jax.tree.leaves(names["statistics"])[0]).all()
    exec(rates + alone, names)
    both = names["both"].init(jnp.zeros(3))
    both, _ = lossguard.rollout(names["both"], both, names["objective"], cycles=30)
    for params in (both.params, names["params"]):
        assert misfit(params) < 0.01
    exec(cycles, names)
    assert misfit(names["state"].params) < 0.01
    trained = names["state"]
    exec(seeds, names)
    assert names["states"].params.shape == (5, 3)
    exec(saving, names)
    assert names["state"] is not trained
    jax.tree.map(np.testing.assert_array_equal, names["state"], trained)


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """The loop in JAX."""
    names: dict[str, Any] = {}
    (loop,) = (block for block in blocks("README.md") if "lossguard.torch" not in block)
    exec(loop, names)
    alone, guarded = map(float, capsys.readouterr().out.split())
    assert round(alone, 2) == 0.06 and guarded < alone


def test_guides_to_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard undoes what hurts and learns the rest; the recipes are what the commands take."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (guard,) = blocks("docs/own_guard.md")
    exec(guard, names)
    assert (tmp_path / "undo.png").exists()
    np.testing.assert_allclose(names["state"].params, 1, atol=0.05)
    assert {1, -1} == set(np.asarray(names["decisions"].winner).tolist())
    wild = names["undo"](optax.sgd(1e30))
    state, _ = lossguard.rollout(wild, wild.init(jnp.zeros(3)), names["objective"], cycles=5)
    np.testing.assert_array_equal(state.params, 0)
    for block in blocks("docs/experiments.md"):
        exec(block, names)
    assert list(names["my_recipe"]().guards()) == ["lion", "sgd", "both"]
    own = run(replace(names["on_my_data"](), steps=20, seeds=1), tmp_path / "own")
    assert own.is_dir()
    (recipe,) = blocks("docs/metatrain.md")
    exec(recipe, names)
    names["mine"]().check()
    assert len(names["mine"]().method().tasks) == 3


def test_skeletons_of_optimizers() -> None:
    """Both fit their data alone and guarded, and the one for PyTorch is its formula."""
    of_jax, of_torch, in_parts = blocks("docs/own_optimizer.md")
    names: dict[str, Any] = {}
    exec(of_jax, names)
    alone = lossguard.unguarded(names["mine"](jnp.array([0.1, 3.0])))
    own, _ = lossguard.rollout(alone, alone.init(jnp.zeros(3)), names["objective"], cycles=10)
    for state in (own, names["state"]):
        np.testing.assert_allclose(state.params, 1, atol=0.1)
    assert names["decisions"].learned_updates.sum() > 0
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    exec(of_torch, names)
    assert names["loss"] < 0.1
    assert sum(decision.learned_updates for decision in names["guard"].history) > 0
    w, momentum = torch.ones(2, requires_grad=True), np.zeros(2)
    optimizer, expected = names["Mine"]([w]), np.ones(2)
    for gradient in ([1.0, -2.0], [0.5, 3.0]):
        w.grad = torch.tensor(gradient)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * np.array(gradient)
        expected -= 0.1 * np.tanh(3 * momentum)
    np.testing.assert_allclose(w.detach(), expected, rtol=1e-6)
    exec(in_parts, names)
    names["guard"].param_groups[0]["lr"] *= 0.5
    for _ in range(50):
        loss = names["guard"].step(names["closure"])
    assert loss < 0.1 and sum(d.learned_updates for d in names["guard"].history) > 0
    rates = [group["lr"] for group in names["learned"].param_groups]
    assert rates == [0.05, 0.005] and len(names["learned"].state) == 2
    names["guard"].load_state_dict(names["guard"].state_dict())


def test_readme_in_torch() -> None:
    """The loop around a step of one's own: the model learns, and nothing is set back."""
    torch = pytest.importorskip("torch")
    (loop,) = (block for block in blocks("README.md") if "lossguard.torch" in block)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(300, 64, 3)

    def train_step(x: Any, t: Any) -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), t)
        loss.backward()
        optimizer.step()
        return loss

    names = {"model": model, "optimizer": optimizer, "train_step": train_step}
    names["loader"] = [(x, x.sum(1, keepdim=True)) for x in inputs]
    exec(loop, names)
    assert names["loss"].item() < 0.1 and names["rewind"].events == []


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what it says."""
    pytest.importorskip("torch")
    names: dict[str, Any] = {}
    for block in blocks("docs/index.md"):
        exec(block, names)
    events, solution = capsys.readouterr().out.strip().split("\n", 1)
    assert events.count("kind='return'") == 1 and float(events.split()[-1]) < 0.05
    loss, price = map(float, solution.split()[-2:])
    assert loss < 0.1 and 600 <= price < 630
    assert len(names["table"]["step"]) == 50 and names["numbers"]["loss"] == pytest.approx(loss)


def test_torch_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top down in one namespace, on the CPU; each guard is of new optimizers."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # a block saves there
    names: dict[str, Any] = {
        "torch": torch,
        "model": torch.nn.Linear(3, 1),
        "loader": [(x, x.sum(1, keepdim=True)) for x in torch.randn(20, 8, 3)],
        "loss_fn": torch.nn.functional.mse_loss,
    }
    for block in blocks("docs/rewind.md"):
        exec(block, names)
    assert names["rewind"].calls == 0 and len(names["optimizers"]) == 2
    for block in blocks("docs/torch.md"):
        for name in ("learned", "fallback"):
            names[name] = torch.optim.SGD(names["model"].parameters(), lr=0.01)
        exec(block.replace('"cuda"', '"cpu"').replace("float16", "bfloat16"), names)
        assert isinstance(names["guard"], torch.optim.Optimizer)
