"""What a guard accepts, and the sentences with which it refuses the rest."""

from collections.abc import Sequence
from types import NoneType
from typing import cast

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lossguard.torch.inner import params_of
from lossguard.validation import check_count

_ENDLESS = " (itertools.chain.from_iterable(itertools.repeat(loader)) doesn't end)"
_SO_MANY = " (itertools.islice(batches, guard.nt) draws so many)"


def listed(learned: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The learned optimizers, of which there may be one."""
    return [*learned] if isinstance(learned, (list, tuple)) else [cast(Optimizer, learned)]


def shared_params(learned: Sequence[Optimizer], fallback: Optimizer) -> list[Tensor]:
    """The parameters of all optimizers, in the fallback's order."""
    check_count("the number of learned optimizers", len(learned))
    for name, optimizer in (*(("learned", one) for one in learned), ("fallback", fallback)):
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"{name} must be a torch.optim.Optimizer, got {optimizer!r}")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{name} must be an optimizer that calls its closure once a step, got LBFGS"
            )
    if any(group.get("maximize") for group in fallback.param_groups):
        raise ValueError("fallback must minimize the loss, got one with maximize=True")
    if any(one is fallback for one in learned):
        raise ValueError("learned must be another optimizer than fallback, got the same one")
    if len({id(one) for one in learned}) < len(learned):
        raise ValueError("learned must be different optimizers, got one of them twice")
    params = params_of(fallback)
    for one in learned:
        others = params_of(one)
        if {id(p) for p in params} != {id(p) for p in others}:
            raise ValueError(
                f"learned must have the parameters of fallback, {len(params)} tensors, got "
                f"{len(others)}, of which {len({id(p) for p in params} & {id(p) for p in others})} "
                "are the same"
            )
    return params


def check_drawn(name: str, drawn: int, wanted: int, *, more_will_do: bool = False) -> None:
    """Refuse another number of minibatches for a cycle."""
    if drawn != wanted:
        least = "at least " if more_will_do else ""
        got = f"{drawn}{_ENDLESS}" if drawn < wanted else f"more{_SO_MANY}"
        raise ValueError(f"{name} must be {least}{wanted} minibatches, got {got}")


def check_scaler(scaler: object) -> None:
    """Refuse what doesn't scale gradients."""
    if not isinstance(scaler, (GradScaler, NoneType)):
        raise ValueError(f"scaler must be None or a torch.amp.GradScaler, got {scaler!r}")


def check_callback(callback: object) -> None:
    """Refuse what can't be called with decisions."""
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback must be None or a function of a decision, got {callback!r}")


def check_offload(offload: object) -> None:
    """Refuse to keep copies elsewhere."""
    if offload not in (None, "cpu"):
        raise ValueError(f"offload must be None or 'cpu', got {offload!r}")


def check_model(model: object, params: Sequence[Tensor]) -> None:
    """Refuse what isn't the parameters' module, and sharded ones without what gathers them."""
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


def check_schedulers(schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer]) -> None:
    """Refuse a scheduler that the guard can't step."""
    if not isinstance(schedulers, Sequence):
        raise ValueError(f"schedulers must be a list, got {type(schedulers).__name__}")
    for scheduler in schedulers:
        if not isinstance(scheduler, LRScheduler):
            raise ValueError(f"schedulers must be of torch.optim.lr_scheduler, got {scheduler!r}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "schedulers must step without a metric, got ReduceLROnPlateau (step it yourself)"
            )
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            raise ValueError(
                "schedulers must be built on learned or fallback, got one on "
                f"{type(scheduler.optimizer).__name__}"
            )
