"""What a guard accepts, and the sentences with which it refuses the rest."""

import inspect
import sys
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


def check_optimizers(optimizers: Mapping[str, Optimizer]) -> list[Tensor]:
    """The parameters of all optimizers, in the first one's order."""
    seen: dict[int, str] = {}
    first: list[Tensor] = []
    for name, one in optimizers.items():
        if not isinstance(one, Optimizer):
            raise ValueError(f"{name} must be a torch.optim.Optimizer, got {one!r}")
        if hasattr(one, "lanes"):
            raise ValueError(f"{name} must be no guard itself, got a {type(one).__name__}")
        first_argument = next(iter(inspect.signature(one.step).parameters.values()), None)
        if first_argument and first_argument.name != "loss" and is_needed(first_argument):
            raise ValueError(
                f"{name} must have step(), step(closure=None) or step(loss), as a guard evaluates "
                f"once a step, got {type(one).__name__} with step({first_argument})"
            )
        if id(one) in seen:
            raise ValueError(f"{name} must be another optimizer than {seen[id(one)]}, got the same")
        for group in one.param_groups:
            if id(group) in seen:
                raise ValueError(
                    f"{name} must have parameter groups of its own, got a dictionary that is "
                    f"{seen[id(group)]}'s too: their rates would be one (copy the groups)"
                )
        seen |= dict.fromkeys(map(id, [one, *one.param_groups]), name)
        params = [p for group in one.param_groups for p in group["params"]]
        first = first or params
        common = {id(p) for p in first} & {id(p) for p in params}
        if len(params) != len(first) or len(common) != len(first):
            raise ValueError(
                f"{name} must have the parameters of {next(iter(optimizers))}, {len(first)} "
                f"tensors, got {len(params)}, of which {len(common)} are the same"
            )
    return first


def is_needed(argument: inspect.Parameter) -> bool:
    """Whether a function can't be called without it."""
    stars = (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    return argument.default is argument.empty and argument.kind not in stars


def check_fallback(fallback: Optimizer) -> None:
    """Refuse one that can't be trusted."""
    if any(group.get("maximize") for group in getattr(fallback, "param_groups", [])):
        raise ValueError("fallback must minimize the loss, got one with maximize=True")


def check_model(model: object, params: Sequence[Tensor]) -> None:
    """Refuse what isn't the parameters' module, and ways to hold parameters that no lane can."""
    if any(hasattr(p, "ds_id") for p in params):
        raise ValueError("parameters must be PyTorch's own, got some that DeepSpeed has taken over")
    if model is None:
        if any(hasattr(p, "to_local") for p in params):
            raise ValueError("model must be the sharded module if parameters are sharded, got None")
        return
    ours = {id(p) for p in params}
    if not isinstance(model, nn.Module) or ours.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            "model must be an nn.Module that holds parameters of the optimizers, got "
            f"{'one without' if isinstance(model, nn.Module) else repr(model)}"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model must be sharded by fully_shard, if it is, got FullyShardedDataParallel, whose "
            "flat parameters no lane can take over"
        )


def check_accumulation() -> None:
    """Refuse gradients that Accelerate accumulates: it would skip the guard's calls in between."""
    states = sys.modules.get("accelerate.state")
    steps = states.GradientState().num_steps if states else 1
    if steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1 for Accelerate, got {steps}: it would leave "
            "out the guard's calls in between (accumulate in the body, before lane.step)"
        )


def check_scaler_and_callback(scaler: object, callback: object) -> None:
    """Refuse what doesn't scale gradients, and what can't be called with decisions."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ValueError(f"scaler must be None or a torch.amp.GradScaler, got {scaler!r}")
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback must be None or a function of a decision, got {callback!r}")
