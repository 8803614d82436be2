"""The guards of the paper: Algorithm 2 (LGL2O), and its rival GL2O of Heaton et al. 2020.

Letters: x the kept iterate, y the learned branch or proposal, z the fallback's, nt optimizer steps
a cycle, nc check minibatches, i and k the numbers of minibatches. Of GL2O: T the fallback's
operator, S(x) = x - T(x) its residual, r the residual's norm at y, mu a running mean of those
accepted so far.
"""

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import Closure, scalar
from lossguard.torch.guards.decision import FALLBACK, LEARNED, NEITHER, Decision, Seen, mean
from lossguard.torch.guards.guard import Guard, lost_loss
from lossguard.torch.guards.lane import Lane
from lossguard.torch.guards.weights import Copy
from lossguard.torch.memory import Memory
from lossguard.torch.tensors import clones, stacked
from lossguard.validation import check_choice, check_count, check_fraction, check_function

Loser = Literal["keep", "reset"]
Gradient = list[Tensor | None]
LANES = {"z": "fallback", "y": "learned"}
"""With the optimizer of each; the first is live."""


def refuse_half(guard: Guard) -> None:
    """Refuse what needs a scaler, which would leave out gradients that overflow."""
    if any(p.dtype == torch.float16 for p in guard._weights.params):
        raise ValueError(
            f"parameters must have more range than float16 for {type(guard).__name__}, where a "
            "gradient that overflows is not left out, got some of float16"
        )


class LossGuard(Guard):
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

        y <- x;  z <- x
        for t in 0 .. nt-1:  y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t))
        x <- y   if mean_j G(y, k+j) < mean_j G(z, k+j),  j in 0 .. nc-1,   else z
        i <- i + nt;  k <- k + nc

    Each call trains both branches, and the last of a cycle decides. Within a cycle the model is the
    branch that was kept last; at its end it is x. What isn't finite is treated as in
    ``lossguard.loss_guard``.

    Args:
        learned, fallback, model, process_group, callback: as in ``Recommended``.
        check: G: a function of a number k that returns the model's loss on check minibatch k, the
            same for both branches. In the paper these are fresh ones of the training data.
        nt, nc: optimizer steps and check minibatches a cycle.
        loser: the optimizer state of the branch that lost. "keep": it runs on from its own nt
            steps; "reset": as at the start.

    Raises:
        ValueError: if an argument isn't one of the above.

    Memory: two copies of the parameters and buffers beside the model, a third one while the other
    lane runs, and both optimizer states.
    Cost a cycle: 2 nt gradients, nt learned updates, 2 nc forward passes. Source: Algorithm 2.

    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, model=None, check=lambda k: w.square().sum(), nt=2)
    >>> for batch in range(2):
    ...     for lane in guard.lanes():
    ...         loss = w.square().sum()
    ...         loss.backward()
    ...         lane.step(loss)
    >>> guard.last_decision.winner, round(float(w.detach()), 4)
    (0, 0.16)
    """

    forgives = False

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        check: Callable[[int], Tensor],
        nt: int = 10,
        nc: int = 10,
        loser: Loser = "keep",
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        check_choice("loser", loser, get_args(Loser))
        check_function("check", check, "of a number")
        self.loser = loser
        optimizers, nc = {"fallback": fallback, "learned": learned}, check_count("nc", nc)
        super().__init__(optimizers, LANES, model, nt, check, nc, process_group, callback)
        refuse_half(self)

    def _begin(self) -> list[Lane]:
        (other,) = (lane for lane in self._lanes.values() if not lane.live)
        other.start_at(self._leader.point)  # lines 10, 11
        return [other]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        y, z, nt = seen["y"], seen["z"], self.nt
        check_y, check_z = mean(y.checks), mean(z.checks)
        finite_y, finite_z = (
            one.finite and math.isfinite(check) for one, check in ((y, check_y), (z, check_z))
        )
        keep_y = finite_y and (check_y < check_z or not finite_z)  # line 16
        if keep_y or finite_z:
            self._lead(self._lanes["y" if keep_y else "z"])  # lines 17, 19
        else:
            self._leader.go_back()
        loser = self._lanes["z" if keep_y else "y"]
        if self.loser == "reset":
            loser.forget()
        return Decision(
            used_learned=[keep_y] * nt,
            losses=y.losses if keep_y else z.losses if finite_z else [math.inf] * nt,
            learned_loss=check_y,
            fallback_loss=check_z,
            winner=LEARNED if keep_y else FALLBACK if finite_z else NEITHER,
            gradients=2 * nt,
            forwards=2 * self.nc,
            learned_updates=nt,
        )


class ResidualGuard(Guard):
    r"""GL2O: keep the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   if ok: mu <- theta r + (1 - theta) mu

    All of a step is on one minibatch, so ``step`` calls the closure twice: at x, and at y. States,
    and what isn't finite, are treated as in ``lossguard.residual_guard``.

    Args:
        learned, fallback, model, callback: as in ``Recommended``.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        theta: the weight of a new residual in mu; read as a decay the paper's is 0.1.
        nt: optimizer steps that make up one decision.

    Raises:
        ValueError: if an argument isn't one of the above.

    Memory: nine copies of the parameters beside the model and its gradients, while it steps. Cost a
    step: 2 gradients, the second after the learned update.

    Source: Heaton et al., "Safeguarded learned convex optimization", 2020, arXiv 2003.01880; the
    paper's GL2O and appendix E (alpha = 0.99, EMA with theta = 0.9).

    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = ResidualGuard(learned, fallback, nt=1, model=None)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = guard.step(closure)
    >>> guard.last_decision.used_learned, round(w.item(), 4)
    ([True], 0.8)
    """

    forgives = False
    remembered = ("_mu", "_kept")

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        alpha: float = 0.99,
        theta: float = 0.9,
        nt: int = 10,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        self.alpha, self.theta = check_fraction("alpha", alpha), check_fraction("theta", theta)
        optimizers = {"fallback": fallback, "learned": learned}
        super().__init__(optimizers, LANES, model, nt, callback=callback)
        refuse_half(self)
        if any(hasattr(p, "to_local") for p in self._weights.params):
            raise ValueError("parameters must be whole tensors, got sharded ones")
        if any(inner.switches for inner in self._inners.values()):
            raise ValueError("optimizers must have no train() and eval(), got one that switches")
        self._mu = math.nan
        self._kept = [NEITHER] * self.nt
        """Who was, of each step of a cycle."""

    def lanes(self) -> Generator[Lane, None, None]:
        """Refused: the second evaluation is where the first one leads."""
        raise ValueError("ResidualGuard has no lanes() to loop over: use step(closure)")

    def _run(self, lane: Lane, closure: Closure) -> Any:
        """A step of both lanes from x, and of the fallback's from y, for the residual there."""
        weights, z, y, n = self._weights, lane, self._lanes["y"], len(self._weights.params)
        x, draws = clones(weights.live()), self._randomness.state()
        before = {one: one.memory().copy() for one in (y, z)}
        try:
            loss, gradient, here = self._evaluate(closure, x)
            drawn = self._randomness.state()
            at_z = _after_step(z, here, here, gradient, loss)
            at_y = _after_step(y, here, here, gradient, loss)
            first = self.phase + 1 < min(2, self.nt)
            for one, at in ((z, at_z), (y, at_y)):
                if not one.inner.noted:
                    one.inner.note_copies(one.memory(), z.before, at, first=first)
            self._randomness.set(draws)
            r = self._residual(z, before[z], here, at_y, closure)
        except BaseException:
            for one, memory in before.items():
                one.remember(memory)
            weights.write(x)
            raise
        self._randomness.set(drawn)
        finite_y = weights.is_finite(at_y) and math.isfinite(r)
        finite_z = weights.is_finite(at_z)
        known = 0 < self._mu < math.inf
        mu = self._mu if known else _distance(here[:n], at_z[:n])
        ok = finite_y and 0 < mu < math.inf and r <= self.alpha * mu
        self._mu = self.theta * r + (1 - self.theta) * mu if ok else mu
        point = at_y if ok else at_z if finite_z else x
        weights.write(point)
        for one, at in ((y, at_y), (z, at_z)):
            if one.inner.is_finite(one.memory()):
                one.inner.move_copies(one.memory(), point, at)
            else:
                one.forget()
                one.inner.move_copies(one.memory(), point)
        self._kept[self.phase] = LEARNED if ok else FALLBACK if finite_z else NEITHER
        z.note(scalar(loss))
        return loss

    def _residual(self, z: Lane, memory: Memory, x: Copy, y: Copy, closure: Closure) -> float:
        """||S(y)||, by a step of the fallback with its memory at x; NaN where that raises."""
        beside = self._weights.gradients_beside()  # those at x stay
        self._weights.write(y)
        try:
            loss, gradient, here = self._evaluate(closure, y)
        except Exception as error:
            return float(lost_loss(self, self._lanes["y"], error))
        finally:
            self._weights.reset_gradients(beside)
        n, advanced = len(self._weights.params), z.memory()
        z.remember(memory)
        after = _after_step(z, here, x, gradient, loss)
        z.remember(advanced)
        return _distance(here[:n], after[:n])

    def _evaluate(self, closure: Closure, at: Copy) -> tuple[Any, Gradient, Copy]:
        """The loss and its gradient where the model is, ``at``; and that, as a forward pass has
        left it."""
        params = self._weights.params
        written = [p._version for p in params]
        self._weights.clear_gradients()
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        with torch.enable_grad():
            loss = closure()
        self._leader.check_gradients(scalar(loss))
        self._check_rates()
        if isinstance(loss, Tensor):  # which the other evaluation may overwrite
            loss = loss.detach().clone()
        live = self._weights.live()
        rows = zip(params, written, at, live, strict=False)
        here = [t.clone() if p._version != before else a for p, before, a, t in rows]
        gradient = [None if p.grad is None else p.grad.detach() for p in params]
        return loss, gradient, [*here, *clones(live[len(params) :])]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        return Decision(
            used_learned=[one == LEARNED for one in self._kept],
            losses=seen["z"].losses,
            winner=self._kept[-1],
            gradients=2 * self.nt,
            learned_updates=self.nt,
        )


def _after_step(lane: Lane, start: Copy, was: Copy, gradient: Gradient, loss: Any) -> Copy:
    """A copy of where one step from ``start`` leads; the model's buffers stay ``start``'s. The
    lane's memory is of the point where it ``was``."""
    weights = lane.weights
    weights.write(start)
    lane.inner.move_copies(lane.memory(), start, was)
    for p, g in zip(weights.params, gradient, strict=True):
        p.grad = None if g is None else g.clone()
    lane.update(loss)
    return clones(weights.live())


def _distance(a: Copy, b: Copy) -> float:
    """The Euclidean norm of a - b: each tensor's in its own precision, at least single."""
    sizes = [(p - q).abs() for p, q in zip(a, b, strict=True)]  # of complex numbers too
    widened = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in sizes]
    return math.hypot(*stacked([t.norm() for t in widened]).tolist())
