"""The residual guard (GL2O, Safe-L2O): the paper's rival, from Heaton, Chen, Wang and Yin 2020.

Letters: T the fallback's operator, S(x) = x - T(x) its residual, r the residual's norm at the
learned proposal y, mu the bound that a tracking sequence makes of the residuals accepted so far.
"""

import math
from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import check_fallback
from lossguard.torch.closures import Closure, checked, scalar
from lossguard.torch.decision import FALLBACK, LEARNED, NEITHER, Decision
from lossguard.torch.guard import Guard
from lossguard.torch.interrupts import Held
from lossguard.torch.lane import Lane
from lossguard.torch.sequences import Track, TrackingSequence, ema
from lossguard.torch.tensors import read, stored
from lossguard.torch.weights import Copy
from lossguard.validation import check_choice, check_fraction, check_kind

Residual = Literal["step", "gradient"]
Gradient = list[Tensor | None]


class Report(NamedTuple):
    """What one optimizer step did."""

    kept: int
    loss: float
    finite_y: bool
    finite_z: bool


class ResidualGuard(Guard):
    r"""GL2O: keep the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   if ok: mu <- update(mu, r)

    All of a step is on one minibatch, so ``step`` calls the closure twice: at x, and at y. The test
    at y uses a copy of the fallback's state, which itself advances once a step, from x, whatever
    was kept; the learned state runs on likewise. A proposal that isn't finite is rejected; if the
    fallback's step isn't finite either, x stays. Nothing is accepted until ||S(x)|| was finite
    once: then it becomes mu_1; nor while mu is 0, as it is where steps are lost in rounding.

    Args:
        learned, fallback, model, callback: as in ``Recommended``.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        sequence: how mu follows the accepted residuals; ``ema(0.9)`` by default.
        residual: ``step``, S as above, or ``gradient``, without the learning rate.
        nt: optimizer steps that make up one decision.

    Memory: seven copies of the parameters beside the model, while it steps. Cost a step: 2
    gradients, the second after the learned update.

    Raises:
        ValueError: if an argument isn't one of the above.

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

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        alpha: float = 0.99,
        sequence: TrackingSequence = ema(0.9),
        residual: Residual = "step",
        nt: int = 10,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        self.alpha = check_fraction("alpha", alpha)
        check_choice("residual", residual, get_args(Residual))
        check_kind("sequence", sequence, TrackingSequence, "ema(0.9)")
        check_fallback(fallback)
        self.sequence, self.residual = sequence, residual
        super().__init__(
            {"fallback": fallback, "learned": learned},
            {"y": "learned", "z": "fallback"},
            leader="z",
            nt=nt,
            model=model,
            callback=callback,
        )
        if any(hasattr(p, "to_local") for p in self._weights.params):
            raise ValueError("parameters must be whole tensors, got sharded ones")
        if any(lane.switches for lane in self._lanes.values()):
            raise ValueError("optimizers must have no train() and eval(), got one that switches")
        self._track: Track | None = None
        self._reports: list[Report] = []

    def lanes(self) -> Generator[Lane, None, None]:
        """Refused: the second evaluation is where the first one leads."""
        raise ValueError("ResidualGuard has no lanes() to loop over: use step(closure)")

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one optimizer step.

        Args:
            closure: evaluates the minibatch's loss, calls ``backward`` and returns the loss. It is
                called twice; the guard clears the gradients before.

        Returns:
            The loss at x, before the step.
        """
        if closure is None and self._is_asked_to_fill():
            return self._fill()
        closure = checked(closure)
        self._watch.check(self._inners)
        self._rates.apply()
        held = Held()
        with held:
            loss, report = self._minibatch(closure, held)
            decision = self._record(report)
        if decision is not None and self.callback is not None:
            self.callback(decision)
        return loss.detach().clone() if isinstance(loss, Tensor) else loss

    def _minibatch(self, closure: Closure, held: Held) -> tuple[Any, Report]:
        weights, start = self._weights, self._randomness.state()
        x = [t.clone() for t in weights.live()]
        memories = {lane: lane.memory().copy() for lane in self._lanes.values()}
        try:
            loss = self._evaluate(closure, held)
            at_x, after = scalar(loss), self._randomness.state()
            self._randomness.set(start)
            y, z, mu_1, r = self._proposals(closure, held, x, loss)
        except BaseException:
            for lane, memory in memories.items():
                lane.remember(memory)
            weights.clear_gradients()
            weights.write(x)
            self._randomness.set(start)
            raise
        finite_y = weights.is_finite(y, x) and math.isfinite(r)
        finite_z = weights.is_finite(z, x)
        if self._track is None and math.isfinite(mu_1):
            self._track = self.sequence.init(mu_1)
        mu = 0.0 if self._track is None else self.sequence.bound(self._track)
        ok = finite_y and mu > 0 and r <= self.alpha * mu
        if ok and self._track is not None:
            self._track = self.sequence.update(self._track, r)
        weights.clear_gradients()
        weights.write(y if ok else z if finite_z else x)
        self._randomness.set(after)
        kept = LEARNED if ok else FALLBACK if finite_z else NEITHER
        return loss, Report(kept, read([at_x])[0], finite_y, finite_z)

    def _proposals(
        self, closure: Closure, held: Held, x: Copy, loss: Any
    ) -> tuple[Copy, Copy, float, float]:
        """y = learned(x), z = T(x), and the residuals ||S(x)|| and ||S(y)||."""
        learned, fallback = self._lanes["y"], self._lanes["z"]
        gradient, before = _gradient(self._weights.params), fallback.memory().copy()
        n = len(gradient)
        evaluated = [*x[:n], *(t.clone() for t in self._weights.live()[n:])]
        z = self._stepped(fallback, evaluated, gradient, loss)
        y = self._stepped(learned, evaluated, gradient, loss)
        self._weights.write(y)
        mu_1 = _norm(gradient) if self.residual == "gradient" else _distance(evaluated[:n], z[:n])
        try:
            loss_y = self._evaluate(closure, held)
            gradient_y = _gradient(self._weights.params)
            if self.residual == "gradient":
                return y, z, mu_1, _norm(gradient_y)
            advanced = fallback.memory()
            fallback.remember(before)
            after_y = self._stepped(fallback, y, gradient_y, loss_y)
            fallback.remember(advanced)
        except Exception as error:
            if not self._weights.have_diverged():
                raise
            self._watch.tell(error, learned)
            return y, z, mu_1, math.nan
        return y, z, mu_1, _distance(y[:n], after_y[:n])

    def _evaluate(self, closure: Closure, held: Held) -> Any:
        self._weights.clear_gradients()
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        with held.let_in(), torch.enable_grad():
            value = closure()
        if not self._weights.have_gradients() and math.isfinite(scalar(value)):
            raise ValueError("closure must call backward, got no gradients from it")
        return value

    def _stepped(self, lane: Lane, start: Copy, gradient: Gradient, loss: Any) -> Copy:
        """A copy of where one step from ``start`` leads; the model's buffers stay ``start``'s."""
        self._weights.write(start)
        for p, g in zip(self._weights.params, gradient, strict=True):
            p.grad = None if g is None else g.clone()
        with torch.no_grad(), self._weights.in_place(), lane.inner.stepping():
            lane.optimizer.step(*lane.given(loss))
        return [t.clone() for t in self._weights.live()]

    def _record(self, report: Report) -> Decision | None:
        for lane in self._lanes.values():
            if not lane.remembers_soundly():
                lane.forget()
        if not self.state:
            self.state.update({p: {} for p in self._weights.params})
        self._reports.append(report)
        self.phase = len(self._reports) % self.nt
        if self.phase:
            return None
        reports, self._reports = self._reports, []
        self.steps += self.nt
        self.history.append(decision_of(reports))
        return self.history[-1]

    def _numbers(self) -> dict[str, Any]:
        return {"track": list(self._track or []), "reports": [list(one) for one in self._reports]}

    def _read(self, numbers: dict[str, Any]) -> Any:
        return list(numbers["track"]) or None, [Report(*one) for one in numbers["reports"]]

    def _set_rules(self, rules: Any) -> None:
        self._track, self._reports = rules


def decision_of(reports: list[Report]) -> Decision:
    """The decision of so many steps."""
    return Decision(
        used_learned=[one.kept == LEARNED for one in reports],
        losses=[one.loss for one in reports],
        learned_loss=math.nan,
        fallback_loss=math.nan,
        finite_learned=all(one.finite_y for one in reports),
        finite_fallback=all(one.finite_z for one in reports),
        winner=reports[-1].kept,
        gradients=2 * len(reports),
        forwards=0,
        learned_updates=len(reports),
    )


def _gradient(params: list[Tensor]) -> Gradient:
    return [None if p.grad is None else p.grad.detach() for p in params]


def _distance(a: Copy, b: Copy) -> float:
    return _norm([p - q for p, q in zip(a, b, strict=True)])


def _norm(tensors: Copy | Gradient) -> float:
    """The Euclidean norm over all of them: each in its own precision, at least single."""
    present = [stored(t) for t in tensors if t is not None]
    sizes = [t.abs() for t in present]  # of complex numbers too
    widened = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in sizes]
    return math.hypot(*read([t.norm() for t in widened]))
