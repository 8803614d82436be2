"""What a guard is to loops and trainers: an optimizer."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch import arguments
from lossguard.torch.guards.decision import Decision
from lossguard.torch.guards.weights import Weights
from lossguard.torch.memory import Inner
from lossguard.torch.process import Randomness
from lossguard.torch.rates import RATES_INSIDE, Rates, group_copy
from lossguard.validation import check_count

if TYPE_CHECKING:
    from lossguard.torch.guards.lane import Lane


class Face(arguments.Uncopied, Optimizer):
    """An optimizer that has lanes, but doesn't run them: all but ``step`` and ``lanes``.

    Attributes:
        nt: train minibatches per cycle.
        nc: check minibatches per cycle, where there is a ``check``; ``checked``: so far.
        phase: minibatches seen of this cycle; 0 between cycles.
        steps: optimizer steps of the live lane in all cycles so far.
        history: the last 1,000 decisions since it was built; they aren't saved.
    """

    remembered: tuple[str, ...] = ()
    """What the rules of a guard know, by the names of its attributes."""

    nc: int
    callback: Callable[[Decision], object] | None
    _lanes: "dict[str, Lane]"
    _leader: "Lane"

    def __init__(
        self, optimizers: Mapping[str, Optimizer], model: nn.Module | None, nt: int
    ) -> None:
        params = arguments.check_optimizers(optimizers)
        arguments.check_model(model, params)
        self.nt = check_count("nt", nt)
        self.phase, self.steps = 0, 0
        self.history: deque[Decision] = deque(maxlen=1000)
        self._inners = {name: Inner(one, params) for name, one in optimizers.items()}
        first = next(iter(optimizers.values()))
        super().__init__([group_copy(group) for group in first.param_groups], dict(first.defaults))
        self.state.update({p: {} for p in params})  # else checkpointing would step to make some
        self._rates = Rates(self.param_groups, list(optimizers.values()))
        self._randomness = Randomness(params)
        self._weights = Weights(params, model)
        self._others: list[Lane] = []
        """Those that run beside the leader in this cycle."""
        self._order: list[Lane] = []
        """All that run on the minibatch that is under way."""
        self._shared: list[tuple[Tensor, int]] = []
        """What no lane has, and how often it had been written to when the run began."""
        self._alike = True
        """Whether the next minibatch is the first, on which all lanes are at one point."""
        arguments.refuse_steps_beside(self)

    @property
    def last_decision(self) -> Decision | None:
        """That of the last cycle."""
        return self.history[-1] if self.history else None

    def _tell(self) -> None:
        """Hand on the decision if a cycle is over."""
        if self.phase == 0 and self.callback is not None:
            self.callback(self.history[-1])

    def eval(self) -> None:
        """Have the model be what an optimizer with ``train()`` and ``eval()`` evaluates."""
        self.check_between("eval")
        self._leader.enter("eval")

    @property
    def itself(self) -> Any:
        """The guard, also beneath what Lightning makes of it: that has a copy of its attributes."""
        return vars(self).get("_optimizer", self)

    def _check_rates(self) -> None:
        if any(self._rates.changes()):
            raise ValueError(RATES_INSIDE)
        for inner in self._inners.values():
            inner.check_rates()

    def check_between(self, call: str) -> None:
        if self._order:
            raise ValueError(
                f"{call} must be called between minibatches, got a call within one (or after a "
                "loop that was left: delete its guard.lanes())"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, except when the guard is built."""
        if hasattr(self, "_weights"):
            raise ValueError(
                "parameters must be in the optimizers when the guard is built, got others later: "
                "build another guard"
            )
        super().add_param_group(param_group)
