"""The loss guard for PyTorch training loops: Algorithm 2 as a ``torch.optim.Optimizer``.

x    the kept iterate: what the model holds whenever ``step`` returns, but where a track record has
     it hold s
y    the learned branch, lane 0; with several learned optimizers lanes 0 to m - 1
z    the fallback branch, the next lane; with ``hedge`` the fallback on its own path, s, is the last
nt   train minibatches per cycle: each is one optimizer step in every lane
nc   check minibatches per cycle: each is one loss in every lane
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal, get_args

from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch import arguments
from lossguard.torch.checkpoint import check_lanes, load_lanes, save_lanes
from lossguard.torch.closures import Closure
from lossguard.torch.consensus import Outcome, outcome
from lossguard.torch.criteria import Criterion, mean_criterion
from lossguard.torch.decision import NEITHER, Decision
from lossguard.torch.lane import Loser
from lossguard.torch.lane_guard import LaneGuard
from lossguard.torch.lanes import Lanes
from lossguard.torch.probing import Probing, ProbingState, always
from lossguard.torch.ratchet import Ratchet
from lossguard.torch.track_record import TrackRecord
from lossguard.torch.verdict import Verdict, follow_first, judge
from lossguard.validation import check_choice, check_enough, check_kind


class LossGuard(LaneGuard):
    r"""Uses a learned optimizer where it beats a fallback on minibatches that neither has seen.

    A cycle takes nt + nc minibatches, numbered i, i+1, ...:

        y <- x;  z <- x
        y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t)),   t = 0 .. nt-1
        x <- y  if  mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j)  else  z,       j = 0 .. nc-1

    A branch that isn't finite can't win; if none is finite, x stays. Between calls the model holds
    x (or s), parameters and buffers, so it may be validated or saved at any time. Criteria may ask
    for more than nc check minibatches, and cycles without learned lanes take none.

    Args:
        learned: the optimizer that isn't trusted; or several, of which the best competes.
        fallback: the optimizer that is, over the same parameters. Its parameter groups are the
            guard's.
        nt: train minibatches per cycle.
        nc: check minibatches per cycle. 0, where the criterion counts training losses: all
            minibatches train.
        loser: what the optimizer of a branch that lost remembers: ``keep`` (what it learned on that
            branch), ``rollback`` (what it knew before the cycle) or ``reset`` (what it knew when
            the guard was built). Schedules advance whoever wins.
        hedge: whether a further lane, s, runs the fallback on its own path, so that x is never
            worse than the fallback alone, up to the check's error. While x lies on that path z is s
            and costs nothing. Should s not stay finite, it begins again at x. True: x goes back to
            s where its check mean is no higher, which forfeits what was gained; ``track_record()``:
            where x's training losses have been higher for a while; the model holds s while they
            are, without delay, and x goes on beside it. ``"only"`` is True without z.
        criterion: when a learned lane is better than the fallback's from x; by default
            ``mean_criterion()``, the paper's. Ties go to s, then z.
        probing: how often the learned lanes run; by default always.
        ratchet: when x goes back to its best; by default never. The learned optimizers begin anew
            there.
        model: the module whose buffers (BatchNorm's statistics) belong to a branch; needed where
            training changes buffers, and with ``fully_shard``.
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
        learned: Optimizer | Sequence[Optimizer],
        fallback: Optimizer,
        *,
        nt: int = 10,
        nc: int = 10,
        loser: Loser = "keep",
        hedge: Literal["only"] | bool | TrackRecord = False,
        criterion: Criterion = mean_criterion(),
        probing: Probing = always(),
        ratchet: Ratchet | None = None,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        schedulers: Sequence[LRScheduler] = (),
        offload: Literal["cpu"] | None = None,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        check_choice("loser", loser, get_args(Loser))
        if hedge not in (False, True, "only") and not isinstance(hedge, TrackRecord):
            raise ValueError(f"hedge must be False, True, 'only' or track_record(), got {hedge!r}")
        check_kind("criterion", criterion, Criterion, "mean_criterion()")
        check_kind("probing", probing, Probing, "backoff()")
        if ratchet is not None:
            check_kind("ratchet", ratchet, Ratchet, "ratchet()")
        self.nc = check_enough("nc", nc, criterion.least if criterion.looks is None else 1)
        check_enough("nt", nt, max(criterion.training, 1))
        super().__init__(
            learned,
            fallback,
            nt=nt,
            model=model,
            scaler=scaler,
            schedulers=schedulers,
            offload=offload,
            process_group=process_group,
            callback=callback,
        )
        self.criterion = criterion
        self.probing = probing
        self._lanes = Lanes(
            self._inners,
            loser=loser,
            hedge=hedge,
            ratchet=ratchet,
            scaler=scaler,
            weights=self._weights,
        )
        self._drive(self._lanes)
        self._looks = criterion.looks or (self.nc,)
        self._probes = ProbingState()

    def cycle(
        self,
        loss_fn: Callable[[Any], Tensor],
        train_batches: Iterable[Any],
        check_batches: Iterable[Any] = (),
    ) -> Decision:
        """Take the minibatches of a whole cycle at once, one lane after the other.

        Args:
            loss_fn: the loss of a minibatch; the guard calls ``backward``.
            train_batches: nt minibatches.
            check_batches: other minibatches, of which it draws as many as the decision takes: nc,
                more where the criterion is sequential, none where the learned lanes don't run.
        """
        train, check = self._check_train(train_batches), iter(check_batches)
        drawn = 0
        for look in self._looks_now:
            batches = list(islice(check, look - drawn))
            drawn += len(batches)
            if drawn < look:
                self._cycle.phase = 0
            arguments.check_drawn("check_batches", drawn, look, more_will_do=True)
            self._take(self._closures(loss_fn, [*train, *batches]))
            if self._cycle.phase == 0:
                break
            train = []
        return self.history[-1]

    @property
    def _probe(self) -> bool:
        """Whether the learned lanes run in this cycle."""
        return self._probes.left == 0

    @property
    def _looks_now(self) -> tuple[int, ...]:
        """Numbers of check minibatches after which this cycle's decision is asked for."""
        return self._looks if self._probe else (0,)

    def _run(self, closures: Sequence[Closure]) -> dict[int, list[Any]]:
        """Run every lane over some minibatches, and decide if those were enough."""
        cycle, active = self._cycle, self._lanes.active(probe=self._probe)
        anew = self._probes.wait > 0 and self.probing.start == "reset"
        anew = anew or (self._lanes.best is not None and self._lanes.best.anew)
        if cycle.phase == 0 and self._probe and anew:
            for lane in self._lanes.all[: self._lanes.m]:
                lane.forget()
        values = cycle.run(closures, active)
        if cycle.phase - self.nt in self._looks_now:
            self._decide(active)
        return values

    def _save(self) -> dict[str, Any]:
        return {
            **super()._save(),
            "looks": list(self._looks),
            "probes": list(self._probes),
            **save_lanes(self._lanes, self._cycle.phase),
        }

    def _load(self, state: dict[str, Any]) -> None:
        load_lanes(self._lanes, state)
        self._probes = ProbingState(*state["probes"])
        super()._load(state)

    def _check_saved(self, saved: dict[str, Any]) -> None:
        super()._check_saved(saved)
        state, looks = saved["guard"], list(self._looks)
        check_lanes(self._lanes, state)
        if state["phase"] and (state["nt"], state["looks"]) != (self.nt, looks):
            raise ValueError(
                f"state_dict from within a cycle must have nt={self.nt} and checks after {looks}, "
                f"got nt={state['nt']} and {state['looks']}"
            )

    def _decide(self, active: list[int]) -> None:
        """Lines 16 to 21 of Algorithm 2; unless the criterion wants to look again."""
        lanes, best = self._lanes, self._lanes.best
        seen = outcome(
            [lanes.all[number] for number in active],
            [] if best is None else best.losses,
            self._weights,
            self.process_group,
        )
        firsts = self._firsts(active, seen.trains)
        m, n = lanes.m if self._probe else 0, len(seen.checks[0])
        checked = len(lanes.checked(active))
        verdict = self._judge(seen, m, checked) if m else follow_first(seen.sound)
        if not verdict.settled and n < self._looks[-1]:
            return
        row = lanes.follow_record(verdict, seen, checked)
        winner, was_own = NEITHER if row == NEITHER else active[row], lanes.on_own
        lanes.take_in(self._weights)
        if winner != NEITHER:  # lines 17 and 19: x <- y or z; or s
            lanes.kept = winner
            self._weights.copy_from(lanes.all[winner].copy)
        reset_learned, reset_fallback = lanes.settle(winner, active, seen, self._weights)
        losses = seen.trains[verdict.best_fallback if row == NEITHER else row]
        if best is not None and self._probe:
            best.anew = False
        kept = [] if row == NEITHER else losses
        undone = lanes.hold(kept, seen.held, was_own, self._weights)
        won = 0 <= winner < lanes.m
        self._probes = self.probing.update(self._probes, self._probe, won)
        lanes.give_out(self._weights)
        if lanes.s_leads:
            winner, losses = active[-1], seen.trains[-1]
        elif undone:
            winner = NEITHER
        self._decided(
            Decision(
                used_learned=[0 <= winner < lanes.m] * self.nt,
                losses=losses,
                learned_loss=verdict.learned_loss,
                fallback_loss=verdict.fallback_loss,
                finite_learned=verdict.finite_learned,
                finite_fallback=verdict.finite_fallback,
                reset_learned=reset_learned,
                reset_fallback=reset_fallback,
                winner=winner,
                steps=self.nt,
                gradients=self._cycle.gradients,
                forwards=n * checked + len(seen.held),
                learned_updates=m * self.nt,
            ),
            firsts,
        )

    def _judge(self, seen: Outcome, m: int, checked: int) -> Verdict:
        """Line 16 over the lanes checked, the first m learned: mean F(y) < mean F(z), or alike."""
        late = self.nt - self.criterion.training
        rows = [t[late:] + c for t, c in zip(seen.trains, seen.checks, strict=True)]
        return judge(self.criterion, rows[:checked], seen.sound[:checked], m)
