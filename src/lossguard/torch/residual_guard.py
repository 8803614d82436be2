"""The residual guard (GL2O, Safe-L2O): the paper's rival, from Heaton, Chen, Wang and Yin 2020.

Letters: T the fallback's operator, S(x) = x - T(x) its residual, r the residual's norm at the
learned proposal y, mu a running mean of the residuals accepted so far.
"""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import check_fallback
from lossguard.torch.closures import Closure, checked, scalar
from lossguard.torch.decision import FALLBACK, LEARNED, NEITHER, Decision, Seen
from lossguard.torch.guard import Guard
from lossguard.torch.lane import Lane
from lossguard.torch.memory import Memory
from lossguard.torch.tensors import read, stored
from lossguard.torch.watch import tell
from lossguard.torch.weights import Copy
from lossguard.validation import check_fraction

Gradient = list[Tensor | None]


class ResidualGuard(Guard):
    r"""GL2O: keep the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   if ok: mu <- theta r + (1 - theta) mu

    All of a step is on one minibatch, so ``step`` calls the closure twice: at x, and at y. The test
    at y uses a copy of the fallback's state, which itself advances once a step, from x, whatever
    was kept; the learned state runs on likewise. A proposal that isn't finite is rejected; if the
    fallback's step isn't finite either, x stays. Nothing is accepted until ||S(x)|| was finite
    once: then it becomes mu_1; nor while mu is 0, as it is where steps are lost in rounding.

    Args:
        learned, fallback, model, callback: as in ``Recommended``.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        theta: the weight of a new residual in mu; read as a decay the paper's is 0.1.
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

    forgives = False
    remembered = ("_mu", "_reports")

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
        check_fallback(fallback)
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
        self._mu = math.nan
        self._reports = [[NEITHER, True, True]] * self.nt
        """Of each step of a cycle: who was kept, and whether y and z were finite."""

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
        closure, loss = checked(closure), None
        with closing(super().lanes()) as lanes:
            for z in lanes:
                loss = self._minibatch(z, closure)
        return loss.detach().clone() if isinstance(loss, Tensor) else loss

    def _begin(self) -> list[Lane]:
        return []

    def _minibatch(self, z: Lane, closure: Closure) -> Any:
        weights, y, n = self._weights, self._lanes["y"], len(self._weights.params)
        x, start = [t.clone() for t in weights.live()], self._randomness.state()
        before = {lane: lane.memory().copy() for lane in (y, z)}
        try:
            loss = self._evaluate(closure)
            value, after = scalar(loss), self._randomness.state()
            gradient = self._gradient()
            evaluated = [*x[:n], *(t.clone() for t in weights.live()[n:])]
            at_z = _after_step(z, evaluated, gradient, loss)
            at_y = _after_step(y, evaluated, gradient, loss)
            self._randomness.set(start)
            r = self._residual(z, before[z], at_y, closure)
        except BaseException:
            for lane, memory in before.items():
                lane.remember(memory)
            weights.write(x)
            raise
        if not y.inner.is_finite(y.memory()):
            y.forget()
        finite_y = weights.is_finite(at_y) and math.isfinite(r)
        finite_z = weights.is_finite(at_z)
        mu = self._mu if math.isfinite(self._mu) else _distance(x[:n], at_z[:n])
        ok = finite_y and 0 < mu < math.inf and r <= self.alpha * mu
        self._mu = self.theta * r + (1 - self.theta) * mu if ok else mu
        weights.write(at_y if ok else at_z if finite_z else x)
        self._randomness.set(after)
        kept = LEARNED if ok else FALLBACK if finite_z else NEITHER
        self._reports[self.phase] = [kept, finite_y, finite_z]
        z.losses.append(value)
        z.stepped = True
        return loss

    def _residual(self, z: Lane, memory: Memory, y: Copy, closure: Closure) -> float:
        """||S(y)||, by a step of the fallback with such a memory; NaN where that raises."""
        self._weights.write(y)
        try:
            loss = self._evaluate(closure)
        except Exception as error:
            if not self._weights.have_diverged():
                raise
            tell(error, self._lanes["y"])
            return math.nan
        n, gradient, advanced = len(self._weights.params), self._gradient(), z.memory()
        z.remember(memory)
        after = _after_step(z, y, gradient, loss)
        z.remember(advanced)
        return _distance(y[:n], after[:n])

    def _evaluate(self, closure: Closure) -> Any:
        self._weights.clear_gradients()
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        with torch.enable_grad():
            value = closure()
        self._leader.check_gradients(scalar(value))
        return value

    def _gradient(self) -> Gradient:
        return [None if p.grad is None else p.grad.detach() for p in self._weights.params]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        kept, finite_y, finite_z = zip(*self._reports, strict=True)
        return Decision(
            used_learned=[one == LEARNED for one in kept],
            losses=seen["z"].losses,
            finite_learned=all(finite_y),
            finite_fallback=all(finite_z),
            winner=kept[-1],
            gradients=2 * self.nt,
            learned_updates=self.nt,
        )


def _after_step(lane: Lane, start: Copy, gradient: Gradient, loss: Any) -> Copy:
    """A copy of where one step from ``start`` leads; the model's buffers stay ``start``'s."""
    weights, blank = lane.weights, not lane.memory().state
    weights.write(start)
    lane.move_copies(start)
    for p, g in zip(weights.params, gradient, strict=True):
        p.grad = None if g is None else g.clone()
    lane.update(loss)
    if blank:
        lane.note_copies(weights.live())
    return [t.clone() for t in weights.live()]


def _distance(a: Copy, b: Copy) -> float:
    """The Euclidean norm of a - b: each tensor's in its own precision, at least single."""
    sizes = [stored(p - q).abs() for p, q in zip(a, b, strict=True)]  # of complex numbers too
    widened = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in sizes]
    return math.hypot(*read([t.norm() for t in widened]))
