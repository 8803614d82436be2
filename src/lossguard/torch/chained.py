"""Several optimizers, each for some of the parameters, as one."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lossguard.torch.closures import Closure, checked
from lossguard.torch.facade import Facade
from lossguard.torch.inner import params_of


class ChainedOptimizer(Optimizer):
    """Steps several optimizers, one after the other, which have different parameters.

    Muon, for example, is for matrices only, so that a model needs another optimizer beside it, and
    a guard asks for one optimizer of all parameters.

    Its parameter groups are those of all of them, and its state is theirs, so that it is saved,
    scheduled and guarded as any other.

    Args:
        optimizers: them; their states are by parameter. Step and load only the chain from then on.

    Raises:
        ValueError: if there are none, or two of them have a parameter in common, or one isn't an
            optimizer, or wraps others, or has ``train()`` and ``eval()``; where a parameter group
            is to be added, as it may belong to any of them.

    >>> w, b = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> chain = ChainedOptimizer([torch.optim.SGD([w], lr=0.5), torch.optim.Adam([b], lr=0.1)])
    >>> (w.sum() + b.sum()).backward()
    >>> chain.step()
    >>> w[0, 0].item(), round(b[0].item(), 4)
    (0.5, 0.9)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        for one in optimizers:
            wraps = isinstance(one, (Facade, ChainedOptimizer))
            if not isinstance(one, Optimizer) or wraps or hasattr(one, "train"):
                got = type(one).__name__ if isinstance(one, Optimizer) else repr(one)
                raise ValueError(
                    "optimizers must be of torch.optim, and neither wrap others nor have train(), "
                    f"got {got}"
                )
        groups = [group for one in optimizers for group in one.param_groups]
        params = [p for one in optimizers for p in params_of(one)]
        if not params or len({id(p) for p in params}) < len(params):
            raise ValueError(
                "optimizers must be at least one, each with parameters of its own, got "
                f"{len(optimizers)} with {len(params)} parameters, "
                f"{len({id(p) for p in params})} of them different"
            )
        state = defaultdict(dict)
        for one in optimizers:
            state.update(one.state)
        first, *others = (one.defaults for one in optimizers)
        defaults = {k: v for k, v in first.items() if all(k in other for other in others)}
        # Optimizer's own constructor would make new groups; this is how one is unpickled.
        self.__setstate__({"param_groups": groups, "state": state, "defaults": defaults})
        self.optimizers = list(optimizers)
        self._share()

    __getstate__ = Facade.__getstate__

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """A step of each, with the gradients of one call of the closure; returns its value."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = checked(closure)()
        for one in self.optimizers:
            one.step()
        return value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it may belong to any of them."""
        raise ValueError(
            "param_group must be added to one of the optimizers, before they are chained"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Have all of them work on the chain's groups, each on its own, and on its state."""
        groups = iter(self.param_groups)
        for one in self.optimizers:
            one.param_groups = [next(groups) for _ in one.param_groups]
            one.state = self.state
