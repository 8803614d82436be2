"""What a guard accepts, and the sentences with which it refuses the rest, or warns of it."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.rates import beside_state, options_of
from lossguard.torch.tensors import Number, leaves, local, stacked
from lossguard.validation import check_kind, told

Closure = Callable[[], Any]

MADE_BY_STEPS = "step", "momentum_buffer", "momenta", "exp_avg", "exp_avg_sq", "z"
"""Of what optimizers remember, that which is 0 or missing in all that we know until they step."""
SAME = 1e-4
"""The part of a loss by which rounding may change it."""


class Uncopied:
    """What is no longer itself in a copy: its optimizers would have no model, or no hooks."""

    def __getstate__(self) -> Any:
        raise ValueError(
            f"a {type(self).__name__} can't be copied or pickled: build another one, and load "
            "state_dict() into it"
        )


def check_optimizers(optimizers: Mapping[str, Optimizer]) -> list[Tensor]:
    """The parameters of all optimizers, in the first one's order."""
    seen: dict[int, str] = {}
    first: list[Tensor] = []
    for name, one in optimizers.items():
        if not isinstance(one, Optimizer) or hasattr(one, "lanes"):
            raise ValueError(
                f"{name} must be a torch.optim.Optimizer and no guard, got {type(one).__name__}"
            )
        check_wrapped(name, one)
        _check_step(name, one)
        _check_watched(name, one)
        _check_new(name, one)
        for group in one.param_groups:
            if group.get("maximize"):
                raise ValueError(f"{name} must minimize the loss, got one with maximize=True")
            if (owner := seen.setdefault(id(group), name)) != name:
                raise ValueError(
                    f"{name} must have parameter groups of its own, got a dictionary that is "
                    f"{owner}'s too: their rates would be one (copy the groups)"
                )
        params = [p for group in one.param_groups for p in group["params"]]
        check_made(params)
        first = first or params
        common = {id(p) for p in first} & {id(p) for p in params}
        if len(params) != len(first) or len(common) != len(first):
            raise ValueError(
                f"{name} must have the parameters of {next(iter(optimizers))}, {len(first)} "
                f"tensors, got {len(params)}, of which {len(common)} are the same"
            )
    return first


def check_rates(rates: Sequence[Any], made: Sequence[Any]) -> None:
    found = [str(list(map(options_of, getattr(one, "param_groups", ())))) for one in made]
    for k, (rate, theirs) in enumerate(zip(rates, found, strict=True)):
        if rate not in rates[:k] and theirs in found[:k]:
            same = rates[found.index(theirs)]
            raise ValueError(f"a function of a rate must use it, got for {rate} what {same} gives")


def check_made(params: Iterable[Tensor]) -> None:
    params = list(params)
    if any(p.numel() == 0 for p in params):
        raise ValueError(
            "parameters must have numbers, got an empty one, as DeepSpeed's partitioning leaves it"
        )
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "model must be sharded by fully_shard, if it is, got FullyShardedDataParallel, whose "
            "parameters are parts of flat ones"
        )


def check_functions(**given: Any) -> None:
    for name, one in given.items():
        if not (one is None or callable(one)):
            raise ValueError(f"{name} must be None or a function, got {one!r}")


def check_wrapped(name: str, optimizer: Any) -> None:
    """Refuse an optimizer around others that remember for themselves: they would not go along."""
    for inner in leaves(beside_state(optimizer)):
        if isinstance(inner, Optimizer) and inner.state is not getattr(optimizer, "state", None):
            outer = type(optimizer).__name__
            raise ValueError(
                f"{name} must keep all that it remembers in its state, got {outer} around "
                f"{type(inner).__name__} (build the optimizer without {outer}; if that only holds "
                "several, give Rewind a list of these)"
            )


def _check_step(name: str, optimizer: Optimizer) -> None:
    """Refuse what needs a closure: it may evaluate again, where a loop's body can't follow."""
    for one in inspect.signature(optimizer.step).parameters.values():
        stars = one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if one.default is one.empty and not stars and one.name not in ("self", "loss"):
            raise ValueError(
                f"{name} must have step(), step(closure=None) or step(loss), as a guard evaluates "
                f"once a step, got {type(optimizer).__name__} with step({one})"
            )


def _check_new(name: str, optimizer: Optimizer) -> None:
    """Refuse one that has stepped: a lane that begins afresh would remember these steps."""
    entries = [found for found in optimizer.state.values() if isinstance(found, dict)]
    made = leaves([[found.get(key) for key in MADE_BY_STEPS] for found in entries])
    numbers = [torch.as_tensor(one) for one in made if isinstance(one, int | float | Tensor)]
    if any(local(one).to_dense().any() for one in numbers):
        raise ValueError(
            f"{name} must be new when the guard is built, got {type(optimizer).__name__} that has "
            "stepped (build the guard with a new one, then guard.load_state_dict(its state_dict()) "
            "to go on from there)"
        )


def _check_watched(name: str, optimizer: Optimizer) -> None:
    """Refuse one whose ``Rewind`` would set the model back under a guard."""
    for hook in innermost(optimizer)._optimizer_step_pre_hooks.values():
        owner: Any = getattr(hook, "__self__", None)
        if getattr(owner, "in_use", False):
            raise ValueError(f"{name} must be watched by no Rewind, got one that is (close it)")


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer beneath wrappers such as Accelerate's and Lightning's, which step that one."""
    inner = optimizer
    if hasattr(inner, "lanes"):
        raise ValueError(f"optimizer must be no guard, got a {type(inner).__name__}")
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        check_wrapped("optimizer", inner)
        inner = inner.optimizer
    check_kind("optimizer", inner, Optimizer, "torch.optim.AdamW(model.parameters())")
    check_wrapped("optimizer", inner)
    return inner


def all_innermost(optimizers: Any) -> list[Optimizer]:
    several = isinstance(optimizers, list | tuple) and len(optimizers) > 0
    found = [innermost(one) for one in (optimizers if several else [optimizers])]
    if len({*map(id, found)}) < len(found):
        raise ValueError("optimizers must each be given once, got one twice")
    for hook in [h for one in found for h in one._optimizer_step_pre_hooks.values()]:
        if (guard := getattr(hook, "guard", lambda: None)()) is not None:
            raise ValueError(f"optimizer must be no guard's, got one of a {type(guard).__name__}")
    return found


def refuse_steps_beside(guard: Any) -> None:
    """Refuse steps of a guard's optimizers, in a body or closure, that aren't its lanes'."""
    itself = weakref.ref(guard)

    def refuse(optimizer: Any, *_: Any) -> None:
        guard = itself()
        if guard and guard._order and not guard._rates.stepping:
            raise ValueError(
                "lane.step(loss) must make every step while the guard runs, got "
                f"{type(optimizer).__name__}.step() in the body or closure (take it out)"
            )

    refuse.guard = itself  # pyright: ignore[reportFunctionMemberAccess]
    for optimizer in guard._optimizers.values():
        hook = innermost(optimizer).register_step_pre_hook(refuse)
        weakref.finalize(guard, hook.remove)


def check_model(model: Any, params: Sequence[Tensor]) -> nn.Module | None:
    """The module whose buffers go with the lanes, if there is one."""
    if model is ...:
        raise ValueError(
            "model must be given, as its buffers go with the parameters (model=net; model=None if "
            "the parameters are in no module)"
        )
    if model is None:
        if any(hasattr(p, "to_local") for p in params):
            raise ValueError("model must be the sharded module if parameters are sharded, got None")
        return None
    check_kind("model", model, nn.Module, "nn.ModuleList([encoder, head])")
    if missing := len({*map(id, params)} - {*map(id, model.parameters())}):
        raise ValueError(
            "model must hold all parameters of the optimizers, as its buffers go with them, got "
            f"{missing} beside it (nn.ModuleList([encoder, head]) holds those of two)"
        )
    return model


def check_loop(optimizers: Iterable[Optimizer], params: Sequence[Tensor]) -> None:
    for one in optimizers:
        count = sum(len(group["params"]) for group in one.param_groups)
        if count != len(params):
            raise ValueError(
                "parameters must be in the optimizers when the guard is built, got "
                f"{type(one).__name__} with {count} instead of {len(params)}"
            )
    if any(p.grad is not None for p in params):
        raise ValueError(
            "gradients must be computed inside the closure, got some before the step (call "
            "zero_grad, which sets them to None, before it, and accumulate inside the closure)"
        )


def checked(closure: Any) -> Closure:
    if callable(closure):
        return closure
    hint = " (or loop over guard.lanes(), as float16 needs)" if closure is None else ""
    raise ValueError(f"closure must be a function that returns the loss, got {told(closure)}{hint}")


def scalar(loss: Any, rule: str = "closure must return the loss, one number") -> Tensor:
    """A loss as a tensor without dimensions, which stays if the loss is overwritten."""
    if isinstance(loss, Tensor):
        plain = loss.layout is torch.strided and not (loss.is_complex() or loss.is_meta)
        if plain and loss.numel() == 1:
            return local(loss).detach().clone().reshape(())
    elif isinstance(loss, Real):
        try:
            return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        except OverflowError:
            pass
    raise ValueError(f"{rule}, got {told(loss)}")


def number(loss: Any, rule: str) -> Number:
    """A loss as it is known on the host; as a tensor where one would have to wait for it."""
    value = scalar(loss, rule)
    return value.item() if value.is_cpu else value


def compare(losses: Sequence[Tensor]) -> None:
    """Warn if lanes that were at one point had different losses on the first minibatch there."""
    numbers = stacked(losses).tolist()
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if high - low > SAME * max(abs(low), abs(high)):
        warnings.warn(
            f"closure gave different losses at the same parameters ({high:.4g} and {low:.4g}): "
            "draw the minibatch, and all random numbers but PyTorch's, outside it",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_if_written(params: Iterable[Tensor], versions: Iterable[int]) -> None:
    pairs = zip(params, versions, strict=True)
    if written := [list(p.shape) for p, before in pairs if p._version != before]:
        warnings.warn(
            f"closure changed parameters that no optimizer has, such as one of shape {written[0]}: "
            "all lanes share them (give them to all optimizers, with requires_grad_(False))",
            RuntimeWarning,
            stacklevel=2,
        )
