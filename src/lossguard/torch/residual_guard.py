"""The residual guard for PyTorch: GL2O (Safe-L2O), the loss guard's rival.

T    the fallback's operator: one step of it
S    its residual, S(x) = x - T(x); for SGD the learning rate times the gradient
r    ||S(y)|| at the learned proposal y, over all parameters
mu   the bound that a tracking sequence makes of the residuals accepted so far
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch import arguments
from lossguard.torch.closures import Closure, Watch, own, scalar
from lossguard.torch.decision import NEITHER, Decision
from lossguard.torch.guard import Guard
from lossguard.torch.inner import Inner
from lossguard.torch.randomness import Randomness
from lossguard.torch.sequences import Track, TrackingSequence, ema
from lossguard.torch.tensors import clone, read, stored
from lossguard.torch.weights import Copy, Weights
from lossguard.validation import check_choice, check_count, check_fraction, check_kind

LEARNED, FALLBACK = 0, 1
Residual = Literal["step", "gradient"]


class ResidualGuard(Guard):
    r"""Keeps the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   if ok: mu <- update(mu, r)

    All of a step is on one minibatch, so ``step`` calls the closure twice: at x, and at y. The test
    at y uses a copy of the fallback's state, which itself advances once a step, from x, whatever
    was kept; the learned state runs on likewise. A proposal that isn't finite is rejected; if the
    fallback's step isn't finite either, x stays. Nothing is accepted until ||S(x)|| was finite
    once: then it becomes mu_1; nor while mu is 0, as it is where steps are lost in rounding.

    Args:
        learned: the optimizer that isn't trusted.
        fallback: the optimizer that is, over the same parameters. Its parameter groups are the
            guard's; a scheduler on it is stepped once per call.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        sequence: how mu follows the accepted residuals; ``ema(0.9)`` by default.
        residual: ``step``, S as above, or ``gradient``, without the learning rate.
        nt: optimizer steps that make up one entry of ``history``.
        model: the module whose buffers go with the iterate.

    Raises:
        ValueError: if an argument isn't one of the above.

    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> guard = ResidualGuard(torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1), nt=1)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = guard.step(closure)
    >>> guard.last_decision.used_learned, round(w.item(), 4)
    ([True], 0.8)

    Source: Heaton et al., "Safeguarded learned convex optimization", 2020; the setting of "A Simple
    Guard for Learned Optimizers", appendix E: EMA, alpha = 0.99, theta = 0.9.
    """

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        alpha: float = 0.99,
        sequence: TrackingSequence = ema(0.9),
        residual: Residual = "step",
        nt: int = 10,
        model: nn.Module | None = None,
    ) -> None:
        params = arguments.shared_params([learned], fallback)
        alpha, nt = check_fraction("alpha", alpha), check_count("nt", nt)
        check_choice("residual", residual, get_args(Residual))
        check_kind("sequence", sequence, TrackingSequence, "ema(0.9)")
        if any(hasattr(p, "to_local") for p in params):
            raise ValueError("parameters must be whole tensors, got sharded ones")
        arguments.check_model(model, params)
        super().__init__(learned, fallback, Weights(params, model, None))
        self.alpha = alpha
        self.sequence = sequence
        self.residual = residual
        self.nt = nt
        self._watch = Watch(self._weights)
        self._randomness = Randomness(params)
        self._learned, self._fallback = self._inners
        self._track: Track | None = None
        self._steps: list[dict[str, Any]] = []

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one optimizer step.

        Args:
            closure: evaluates the minibatch's loss, calls ``backward`` and returns the loss. It is
                called twice; the guard clears the gradients before.

        Returns:
            The loss at x, before the step.
        """
        closure = self._check_step(closure)
        weights, start = self._weights, self._randomness.state()
        x = kept = weights.copy()
        after = start
        try:
            loss = self._evaluate(closure)
            at_x = own(loss)
            after = self._randomness.state()
            evaluated = [*weights.params_of(x), *weights.copy_buffers()]
            y, z, mu_1, r = self._proposals(closure, evaluated, loss, start)
            finite_y = weights.is_finite(y, x) and math.isfinite(r)
            finite_z = weights.is_finite(z, x)
            if self._track is None and math.isfinite(mu_1):
                self._track = self.sequence.init(mu_1)
            mu = 0.0 if self._track is None else self.sequence.bound(self._track)
            ok = finite_y and mu > 0 and r <= self.alpha * mu
            kept = y if ok else z if finite_z else x
        finally:
            weights.clear_gradients()
            weights.copy_from(kept)
            torch.clear_autocast_cache()
            self._randomness.set(after)
        if ok and self._track is not None:
            self._track = self.sequence.update(self._track, r)
        self._record(ok, scalar(at_x).item(), finite_y, finite_z)
        return at_x

    def _proposals(
        self, closure: Closure, x: Copy, loss: Any, start: list[Tensor]
    ) -> tuple[Copy, Copy, float, float]:
        """y = learned(x), z = T(x), and the residuals ||S(x)|| and ||S(y)||."""
        gradient, of_steps = self._gradient(), self.residual == "step"
        before = self._fallback.remember() if of_steps else None
        z = self._stepped(self._fallback, x, gradient, loss)
        y = self._stepped(self._learned, x, gradient, loss)
        self._weights.copy_from(y)
        self._randomness.set(start)
        mu_1 = _norm(gradient) if before is None else self._distance(x, z)
        try:
            loss_y = self._evaluate(closure)
            gradient_y = self._gradient()
            if before is None:
                return y, z, mu_1, _norm(gradient_y)
            with self._fallback.remembering(before):
                after_y = self._stepped(self._fallback, y, gradient_y, loss_y)
        except Exception as error:
            if not self._weights.have_diverged():
                raise
            self._watch.tell(error, self._learned.optimizer)
            return y, z, mu_1, math.nan
        return y, z, mu_1, self._distance(y, after_y)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to both optimizers, with their own defaults in the learned one."""
        self._weights.params += self._add_group(param_group, [self._learned.optimizer])
        self._weights.clear_gradients()  # theirs may be left from before
        self._randomness = Randomness(self._weights.params)
        self._learned.grow()
        self._fallback.grow()

    def _save(self) -> dict[str, Any]:
        return {
            "track": clone(self._track),
            "steps": clone(self._steps),
            "random": self._randomness.state(),
            "x": self._weights.copy(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._track = clone(state["track"])
        self._steps = clone(state["steps"])
        self._weights.copy_from(state["x"])
        self._randomness.set(state["random"])

    def _evaluate(self, closure: Closure) -> Any:
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        with torch.enable_grad():
            return self._watch.call(closure)

    def _gradient(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach() for p in self._weights.params]

    def _stepped(self, inner: Inner, start: Copy, gradient: list[Tensor | None], loss: Any) -> Copy:
        """A copy of where one step from ``start`` leads; the model's buffers stay ``start``'s."""
        self._weights.copy_from(start)
        for p, g in zip(self._weights.params, gradient, strict=True):
            p.grad = None if g is None else g.clone()
        with torch.no_grad(), self._weights.in_place(), inner.stepping():
            inner.optimizer.step(lambda: loss)
        return self._weights.copy()

    def _distance(self, a: Copy, b: Copy) -> float:
        params = self._weights.params_of
        return _norm([p - q for p, q in zip(params(a), params(b), strict=True)])

    def _record(self, ok: bool, loss: float, finite_y: bool, finite_z: bool) -> None:
        reset = [inner.renew() for inner in (self._learned, self._fallback)]
        kept = LEARNED if ok else FALLBACK if finite_z else NEITHER
        self._steps.append(
            {"kept": kept, "loss": loss, "finite": [finite_y, finite_z], "reset": reset}
        )
        if len(self._steps) < self.nt:
            return
        steps, self._steps = self._steps, []
        self.history.append(
            Decision(
                used_learned=[step["kept"] == LEARNED for step in steps],
                losses=[step["loss"] for step in steps],
                learned_loss=math.nan,
                fallback_loss=math.nan,
                finite_learned=all(step["finite"][LEARNED] for step in steps),
                finite_fallback=all(step["finite"][FALLBACK] for step in steps),
                reset_learned=any(step["reset"][LEARNED] for step in steps),
                reset_fallback=any(step["reset"][FALLBACK] for step in steps),
                winner=steps[-1]["kept"],
                steps=self.nt,
                gradients=2 * self.nt,
                forwards=0,
                learned_updates=self.nt,
            )
        )


def _norm(tensors: list[Tensor] | list[Tensor | None]) -> float:
    """The Euclidean norm over all of them: each in its own precision, at least single."""
    present = [stored(t) for t in tensors if t is not None]
    sizes = [t.abs() for t in present]  # of complex numbers too
    widened = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in sizes]
    return math.hypot(*read([t.norm() for t in widened]))
