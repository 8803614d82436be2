"""The loss guard for PyTorch training loops: Algorithm 2 as a ``torch.optim.Optimizer``.

x    the kept iterate: what the model holds whenever ``step`` returns
y    the learned branch, lane 0
z    the fallback branch, lane 1; with ``hedge`` a second fallback on its own path is lane 2
nt   train minibatches per cycle: each is one optimizer step in every lane
nc   check minibatches per cycle: each is one loss in every lane
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch import arguments, checkpoint
from lossguard.torch.consensus import agree
from lossguard.torch.decision import FALLBACK, LEARNED, NOBODY, OWN_PATH, Decision, best
from lossguard.torch.facade import Closure, Facade
from lossguard.torch.forward_only import forward_only
from lossguard.torch.inner import Inner, clone, finite, local
from lossguard.torch.lane import Lane, scalar
from lossguard.torch.randomness import Randomness
from lossguard.torch.schedules import Schedules
from lossguard.torch.weights import Weights


class LossGuard(Facade):
    r"""Uses a learned optimizer where it beats a fallback on minibatches that neither has seen.

    A cycle takes nt + nc minibatches, numbered i, i+1, ...:

        y <- x;  z <- x
        y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t)),   t = 0 .. nt-1
        x <- y  if  mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j)  else  z,       j = 0 .. nc-1

    A branch that isn't finite can't win; if none is finite, x stays. Between calls the model holds
    x, parameters and buffers, so it may be validated or saved at any time.

    Args:
        learned: the optimizer that isn't trusted.
        fallback: the optimizer that is, over the same parameters. Its parameter groups are the
            guard's.
        nt: train minibatches per cycle.
        nc: check minibatches per cycle.
        loser: what the optimizer of a branch that lost remembers: ``keep`` (what it learned on that
            branch), ``rollback`` (what it knew before the cycle) or ``reset`` (what it knew when
            the guard was built). Schedules advance whoever wins.
        hedge: whether a third lane, s, runs the fallback on its own path, so that x is never worse
            than the fallback alone, up to the check's error. x becomes the best of y, z and s; ties
            go to s, then z. While x lies on that path z is s and costs nothing. Should s not stay
            finite, it begins again at x.
        model: the module whose buffers (BatchNorm's statistics) belong to a branch; needed with
            ``fully_shard``.
        scaler: a ``GradScaler`` for float16; each lane gets a copy. The closure then calls
            ``guard.scaler.scale(loss).backward()``.
        schedulers: learning-rate schedulers on ``learned`` or ``fallback``, which the guard steps
            once per train minibatch: nt times per cycle.
        offload: ``"cpu"`` keeps the copies of branches that aren't running there.
        process_group: the ranks that decide together; all of them by default.
        callback: called with every decision.

    Raises:
        ValueError: if an argument isn't one of the above.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, nt=2, nc=1)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for batch in range(3):
    ...     loss = guard.step(closure)
    >>> guard.last_decision.winner, round(float(w.detach()), 4)
    (0, 0.16)

    Source: Algorithm 2 of "A Simple Guard for Learned Optimizers".
    """

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        nt: int = 10,
        nc: int = 10,
        loser: str = "keep",
        hedge: bool = False,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        schedulers: Sequence[LRScheduler] = (),
        offload: str | None = None,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        params = arguments.shared_params(learned, fallback)
        arguments.check_policy(loser)
        arguments.check_count("nt", nt)
        arguments.check_count("nc", nc)
        arguments.check_schedulers(schedulers, learned, fallback)
        if offload not in (None, "cpu"):
            raise ValueError(f"offload must be None or 'cpu', got {offload!r}")
        if model is None and any(hasattr(p, "to_local") for p in params):
            raise ValueError("model must be the sharded module if parameters are sharded, got None")
        super().__init__(fallback)
        self.learned = learned
        self.fallback = fallback
        self.nt = nt
        self.nc = nc
        self.schedulers = list(schedulers)
        self.process_group = process_group
        self.callback = callback
        self.history: list[Decision] = []
        self._weights = Weights(params, model, torch.device("cpu") if offload else None)
        self._randomness = Randomness({p.device for p in params})
        self._x = self._weights.copy()
        self._lanes = [
            Lane(name, inner, policy, clone(scaler), self._weights.copy())
            for name, inner, policy in _lanes(Inner(learned), Inner(fallback), loser, hedge)
        ]
        self._running = self._lanes[FALLBACK]
        self._kept = OWN_PATH if hedge else FALLBACK
        self._on_own_path = hedge  # whether x lies on the fallback's own path, where z is s
        self._phase = 0  # minibatches seen in this cycle
        self._gradients = 0

    @property
    def last_decision(self) -> Decision | None:
        """The decision of the last whole cycle."""
        return self.history[-1] if self.history else None

    @property
    def checking(self) -> bool:
        """Whether the next minibatch is a check minibatch: only its loss is evaluated."""
        return self._phase >= self.nt

    @property
    def scaler(self) -> GradScaler:
        """The gradient scaler of the running branch; use it inside the closure."""
        if self._running.scaler is None:
            raise ValueError("scaler must be given to LossGuard to scale losses, got None")
        return self._running.scaler

    def unscale_(self) -> None:
        """Unscale the running branch's gradients, to clip them inside the closure."""
        if not self.checking:
            self.scaler.unscale_(self._running.inner.optimizer)

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one minibatch of the stream: nt times to train both branches, nc times to check.

        Args:
            closure: evaluates the minibatch's loss, calls ``backward`` and returns the loss. It is
                called once per lane; the guard clears the gradients before.

        Returns:
            The loss, of the lane that the last decision kept (the fallback before the first).
        """
        if closure is None:
            raise ValueError(
                "closure must be a function that returns the loss, got None (a GradScaler goes to "
                "LossGuard as scaler)"
            )
        if any(p.grad is not None for p in self._weights.params):
            raise ValueError(
                "gradients must be computed inside the closure, got some before the step (call "
                "zero_grad, and accumulate inside the closure)"
            )
        values = self._run([closure])
        value = values.get(self._kept, values[max(values)])[0]
        return value.detach() if isinstance(value, Tensor) else value

    def cycle(
        self,
        loss_fn: Callable[[Any], Tensor],
        train_batches: Iterable[Any],
        check_batches: Iterable[Any],
    ) -> Decision:
        """Take the minibatches of a whole cycle at once, one lane after the other.

        It does what ``step`` does on the same stream, and copies the parameters less often.

        Args:
            loss_fn: the loss of a minibatch; the guard calls ``backward``.
            train_batches: nt minibatches.
            check_batches: nc other minibatches.
        """
        train, check = list(train_batches), list(check_batches)
        for name, batches, count in (("train", train, self.nt), ("check", check, self.nc)):
            if len(batches) != count:
                raise ValueError(f"{name}_batches must be {count} minibatches, got {len(batches)}")
        if self._phase:
            raise ValueError(
                f"cycle must start where the last one ended, got one after {self._phase} of "
                f"{self.nt + self.nc} minibatches"
            )
        self._run(
            [lambda batch=batch: self._backward(loss_fn(batch)) for batch in (*train, *check)]
        )
        return self.history[-1]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to both optimizers, with their own defaults in the learned one.

        Args:
            param_group: as for any optimizer; its options are the fallback's.
        """
        if self._phase:
            raise ValueError(
                f"param_group must be added between cycles, got one after {self._phase} of "
                f"{self.nt + self.nc} minibatches"
            )
        self.fallback.add_param_group(param_group)
        params = self.fallback.param_groups[-1]["params"]
        self.learned.add_param_group({"params": list(params)})
        before = len(self._weights.params)
        self._weights.params += params
        self._weights.clear_gradients()  # theirs may be left from before
        news = self._weights.copy()[before : before + len(params)]
        for copy in (self._x, *(lane.copy for lane in self._lanes)):
            copy[before:before] = clone(news)
        for lane in self._lanes:
            lane.grow()

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the rest of the run depends on, at any point of a cycle.

        The keys ``state`` and ``param_groups`` are the fallback's, as for any optimizer.
        """
        return checkpoint.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state bit by bit: parameters, buffers and random numbers included."""
        checkpoint.load(self, state_dict)

    def __repr__(self) -> str:
        return f"LossGuard(learned={self.learned!r}, fallback={self.fallback!r})"

    def _active(self) -> list[int]:
        """The numbers of the lanes that run in this cycle; where z is s, only s does."""
        return [k for k in range(len(self._lanes)) if not (k == FALLBACK and self._on_own_path)]

    def _run(self, closures: Sequence[Closure]) -> dict[int, list[Any]]:
        """Run every lane over some minibatches, with the same random numbers; then x is back.

        Returns:
            The values of the closures, by the number of the lane.
        """
        weights, randomness, start = self._weights, self._randomness, self._phase
        last = min(self.nt, start + len(closures)) - 1  # the run's last train minibatch
        if start == 0:
            self._begin()
        schedules, values = Schedules(self.schedulers), {}
        draws = [randomness.state()]  # before each minibatch, and after the last
        try:
            for number in self._active():
                self._running = lane = self._lanes[number]
                weights.read(lane.copy if start or lane.own_path else self._x)
                values[number] = []
                for k, closure in enumerate(closures):
                    self._phase = start + k
                    randomness.set(draws[k])
                    values[number].append(self._evaluate(lane, closure, schedules, k))
                    draws += [randomness.state()] if number == LEARNED else []
                    if self._phase == last:
                        weights.write(lane.copy)
        except BaseException:
            self._phase = 0  # the cycle is lost, x is not
            raise
        finally:
            weights.clear_gradients()
            weights.read(self._x)
            randomness.set(draws[-1])
        self._phase = start + len(closures)
        if self._phase == self.nt + self.nc:
            self._decide()
        return values

    def _begin(self) -> None:
        self._gradients = 0
        self._weights.write(self._x)
        for number in self._active():
            self._lanes[number].begin()

    def _evaluate(self, lane: Lane, closure: Closure, schedules: Schedules, k: int) -> Any:
        """One minibatch in the lane that is in the model."""
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        if self.checking:
            value = forward_only(closure)
            lane.check.append(scalar(value))
            self._weights.read_buffers(lane.copy)  # a check leaves no trace
            return value

        def evaluate() -> Any:
            self._weights.clear_gradients()
            self._gradients += 1
            return closure()

        schedules.before(lane, lane.inner, k)
        with torch.no_grad(), self._weights.in_place():
            value = lane.step(evaluate)
        schedules.after(lane, lane.inner, k)
        return value

    def _backward(self, loss: Tensor) -> Tensor:
        if self.checking:
            return loss
        scaler = self._running.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def _decide(self) -> None:
        active = self._active()
        lanes = [self._lanes[number] for number in active]
        numbers, alarms = agree(
            [
                *(_mean(lane.check) for lane in lanes),
                *(v for lane in lanes for v in _all(lane.train)),
            ],
            [
                *(not finite(self._weights.params_of(lane.copy)) for lane in lanes),
                *(not lane.remembers_soundly() for lane in lanes),
            ],
            self.process_group,
            local(self._weights.params[0]).device,
        )
        checks, trains = numbers[: len(lanes)], numbers[len(lanes) :]
        lost = dict(zip(active, alarms, strict=False))
        broken = dict(zip(active, alarms[len(lanes) :], strict=True))
        sound = [
            math.isfinite(loss) and not lost[number]
            for number, loss in zip(active, checks, strict=True)
        ]
        row = best(checks, sound)
        trusted = (
            best(checks[1:], sound[1:]) % len(checks[1:]) + 1
        )  # the last lane if none is sound
        winner = NOBODY if row == NOBODY else active[row]
        if winner != NOBODY:
            self._kept = winner
            self._weights.read(self._lanes[winner].copy)
        reset_learned = self._lanes[LEARNED].settle(won=winner == LEARNED, broken=broken[LEARNED])
        reset_fallback = self._settle_fallback(winner, lost, broken)
        shown = trusted if row == NOBODY else row
        self._phase = 0
        self.history.append(
            Decision(
                used_learned=[winner == LEARNED] * self.nt,
                losses=trains[shown * self.nt : (shown + 1) * self.nt],
                learned_loss=checks[LEARNED],
                fallback_loss=checks[trusted],
                finite_learned=sound[LEARNED],
                finite_fallback=sound[trusted],
                reset_learned=reset_learned,
                reset_fallback=reset_fallback,
                winner=winner,
                steps=self.nt,
                gradients=self._gradients,
                forwards=self.nc * len(lanes),
                learned_updates=self.nt,
            )
        )
        if self.callback is not None:
            self.callback(self.history[-1])

    def _settle_fallback(self, winner: int, lost: dict[int, bool], broken: dict[int, bool]) -> bool:
        """Settle the lanes of the fallback; whether a memory or a path had to be made anew."""
        z, won = self._lanes[FALLBACK], winner in (FALLBACK, OWN_PATH)
        if OWN_PATH not in lost:
            return z.settle(won=won, broken=broken[FALLBACK])
        s = self._lanes[OWN_PATH]
        if FALLBACK in lost:
            reset = z.settle(won=won, broken=broken[FALLBACK])
        else:
            reset = z.settle_as(s, won=won, broken=broken[OWN_PATH])
        if lost[OWN_PATH]:  # s begins again at x
            self._weights.write(s.copy)
        if lost[OWN_PATH] or broken[OWN_PATH]:
            s.memory, reset = s.inner.fresh.copy(), True
        self._on_own_path = winner == OWN_PATH or lost[OWN_PATH]
        if self._on_own_path and s.memory is not None:  # z goes on from s, wherever x is s
            z.inner.restore(s.memory)
        return reset


def _all(losses: list[Tensor]) -> list[float]:
    return torch.stack(losses).tolist()


def _mean(losses: list[Tensor]) -> float:
    return sum(_all(losses)) / len(losses)


def _lanes(
    learned: Inner, fallback: Inner, loser: str, hedge: bool
) -> list[tuple[str, Inner, str]]:
    lanes = [("learned", learned, loser), ("fallback", fallback, loser)]
    return [*lanes, ("hedge", fallback, "keep")] if hedge else lanes
