"""The guard that we would use: the loss guard with what did best in our experiments."""

from typing import Any

from ..validation import check_count, check_most
from .best_of import best_of
from .criteria import curtailed_criterion, mean_criterion
from .lanes import Loser
from .loss_guard import loss_guard
from .probing import backoff
from .protocol import Guard, are_several
from .ratchet import ratchet
from .track_record import track_record


def recommended(
    learned: Any,
    fallback: Any,
    *,
    nt: int = 10,
    nc: int = 10,
    most: int | None = None,
    patience: int = 200,
    loser: Loser = "reset",
) -> Guard:
    """A hedged loss guard that keeps its gains under noise and backs off where there are none.

    While the fallback alone has had the lower training losses of late, the guard gives it out, and
    goes on beside it: so the losses that are reported never sum up to more than the fallback's. It
    goes back to that path where it has been behind for longer, a learned lane that lost begins
    anew, and after many losses running it is probed ever less often. A cycle of it is kept by 16 nc
    check minibatches, and given up after nc where these are clear: late, one that gains a little on
    most examples, and spoils a few, is not kept. What checks don't see shows in a hundred cycles'
    training losses: then x goes back to its best.
    Several learned optimizers have such a guard each, side by side, and the best is followed.

    Args:
        learned: the optimizer that is not trusted, or several.
        fallback: the one that is.
        nt: optimizer steps a cycle.
        nc: check minibatches of a cycle that clearly loses.
        most: those of one that is kept; by default 16 nc, numbered apart (``loss_guard``'s
            ``checks``). With nc itself all cycles take as many, which follow those of training, and
            the training losses of the last (nt - 1) // 2 steps count beside them. That suits
            minibatches that come from the host (``stacked``), with nc=1 and most=1; or with nc=0,
            where those of the last nt // 2 steps decide, and all minibatches train.
        patience: losses running after which the learned lane is probed less often. A few dozen do
            for short runs; where it wins late, they cost some of that.
        loser: what becomes of the optimizer state of a lane that lost, as in ``loss_guard``.
            "reset" is for learned optimizers that are at their best when they begin, as the LSTM
            is; "keep" for those that have a schedule of their own, as Celo and VeLO. An ordinary
            one, such as Adam at a bold rate, does better with "keep" too, and better still beside
            the fallback on a path of its own (``best_of``).

    Raises:
        ValueError: as ``loss_guard``; or if most is no integer or below nc, or nc is 0 or 1 and
            most isn't.

    >>> import jax.numpy as jnp, optax
    >>> guard = recommended(optax.sgd(3.0), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner)  # the fallback, on its own path
    2
    """
    if are_several(learned):
        check_count("the number of learned optimizers", len(learned))
        options = {"nt": nt, "nc": nc, "most": most, "patience": patience, "loser": loser}
        return best_of([recommended(one, fallback, **options) for one in learned])
    nt, nc = check_count("nt", nt), check_count("nc", nc, least=0)
    options = settings(nt, nc, 16 * nc if most is None else most, patience, loser)
    return loss_guard(learned, fallback, nt=nt, nc=nc, **options)


def settings(
    nt: int, nc: int, most: int, patience: int = 200, loser: Loser = "reset"
) -> dict[str, Any]:
    """The options of ``loss_guard`` that ``recommended`` sets."""
    check_most(nc, most)
    few = mean_criterion(training=(nt - 1 if nc else nt) // 2)
    return {
        "criterion": few if most == nc else curtailed_criterion(first=nc, most=most),
        "hedge": track_record(decay=0.7),
        "loser": loser,
        "probing": backoff(
            patience=patience, most=512, start="reset" if loser == "reset" else "keep"
        ),
        "ratchet": ratchet(),
        "checks": "next" if most == nc else "apart",
    }
