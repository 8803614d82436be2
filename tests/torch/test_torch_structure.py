"""How the package is built: few floors, small classes, and few private names of PyTorch."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType

import pytest
from models import minibatches, mlp, run, two

import lossguard.torch
from lossguard.torch import BestOf, Recommended

FOLDER = Path(lossguard.torch.__file__).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path.read_text()
    for path in FOLDER.rglob("*.py")
    if path.stem != "__init__"
}


@cache
def floor(name: str) -> int:
    """1 for what imports nothing of the package."""
    beneath = re.findall(r"^from (lossguard\.torch[\w.]*) import (\w+)", FILES[name], re.M)
    named = {word for module, item in beneath for word in (module, f"{module}.{item}")}
    names = FILES.keys() & {word.removeprefix("lossguard.torch.") for word in named}
    return 1 + max((floor(one) for one in names), default=0)


def test_there_are_at_most_five_floors() -> None:
    assert max(map(floor, FILES)) <= 5


def test_no_class_is_over_200_lines() -> None:
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for text in FILES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None
    }
    assert max(sizes.values()) <= 200, sizes


@pytest.mark.parametrize("kind", [BestOf, Recommended])
def test_a_later_cycle_crosses_at_most_10_files_and_80_functions(kind: type) -> None:
    """What somebody has to read who follows it; the first cycle, with its checks, has more."""
    model = mlp()
    guard = two(kind, model)
    run(guard, model, minibatches(300))
    crossed = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and FOLDER in Path(code.co_filename).parents and "<" not in code.co_name:
            crossed.add((code.co_filename, code.co_firstlineno))

    sys.setprofile(note)
    try:
        run(guard, model, minibatches(10))
    finally:
        sys.setprofile(None)
    assert len({file for file, _ in crossed}) <= 10
    assert 20 < len(crossed) <= 80


PRIVATE = {
    "_values": "test_sparse_and_missing_gradients",
    "_opt_called": "test_a_scheduler_on_a_guard_in_a_loop_over_lanes_does_not_warn",
    "_version": "test_what_is_not_trained_is_not_copied",
    "_optimizer_step_pre_hooks": "test_another_one_of_the_same_optimizer_closes_it",
    "_optimizer_step_post_hooks": "test_a_scheduler_in_a_hook_goes_on_from_its_own_rates",
    "_amp_foreach_non_finite_check_and_unscale_": "test_one_bad_number_makes_all_gradients_0",
    "_foreach_copy_": "test_models",
    "_foreach_mul_": "test_gradients_are_clipped_as_pytorch_does_it",
    "_foreach_norm": "test_gradients_that_are_not_finite_or_out_of_line_become_0",
    "_fsdp_flattened": "test_what_it_refuses",
}
"""Of PyTorch, with the test that would notice a change."""


def test_private_names_of_pytorch_are_these() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    ours = set(re.findall(r"(?:def |self\.|\.holder\.|lane\.)(_[a-z]\w*)", "".join(FILES.values())))
    used = {
        node.attr
        for text in FILES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
    }
    used |= set(re.findall(r'getattr\(\w+, "(_[a-z]\w*)"', "".join(FILES.values())))
    theirs = {name for name in used - ours if re.match(r"_[a-z]", name)}
    of_named_tuples = {"_asdict", "_fields", "_replace"}
    assert theirs - of_named_tuples <= set(PRIVATE) <= used
    assert all(f"def {test}(" in tests for test in PRIVATE.values())
    assert not any("gc.get_objects" in text or "scipy" in text for text in FILES.values())
    assert not any(re.search(r"(from|import) torch[\w.]*\._", text) for text in FILES.values())
