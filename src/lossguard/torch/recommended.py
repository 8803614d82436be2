"""The guard that we would use: the loss guard with what did best in our experiments."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lossguard.torch.criteria import curtailed_criterion, mean_criterion
from lossguard.torch.lane import Loser
from lossguard.torch.loss_guard import LossGuard
from lossguard.torch.probing import backoff
from lossguard.torch.ratchet import ratchet
from lossguard.torch.track_record import track_record
from lossguard.validation import check_count, check_most


def recommended(
    learned: Optimizer | Sequence[Optimizer],
    fallback: Optimizer,
    *,
    nt: int = 10,
    nc: int = 0,
    most: int | None = None,
    patience: int = 200,
    loser: Loser = "reset",
    **options: Any,
) -> LossGuard:
    """A hedged loss guard that keeps its gains under noise and backs off where there are none.

    While the fallback alone has had the lower training losses of late, the model holds what it has
    come to, and the guard goes on beside it: so the losses that decisions report never sum up to
    more than the fallback's. It goes back to that path where it has been behind for longer, a
    learned lane that lost begins anew, and after many losses running it is probed ever less often.
    Where a hundred cycles' training losses are higher than those of the best x, it goes back there.

    Args:
        learned: the optimizer that is not trusted, or several, which compete in every cycle, as in
            ``LossGuard`` (in JAX each has a guard and a path of its own).
        fallback: the one that is.
        nt: train minibatches per cycle.
        nc: check minibatches per cycle. Those of a stream are lost for training, so that by default
            there are none: every call trains, and the training losses of the cycle's last nt // 2
            steps decide, in every lane. What the last step has done shows in the next cycle then;
            with nc=1 it is checked, and those of (nt - 1) // 2 steps count beside it.
        most: check minibatches of a cycle that is kept, where nc are enough for one that clearly
            loses; by default nc as well. (In JAX 10 and 160: with so many, runs that go on for
            hundreds of epochs keep what they have won.) Training losses don't count then.
        patience: lost cycles running after which the learned lanes pause, for longer and longer;
            200 are 2,000 calls of ``step`` at nt = 10, so take fewer in a short run.
        loser: what the optimizer of a lane that lost remembers, as in ``LossGuard``. "reset" is for
            learned optimizers that are at their best when they begin, as the LSTM is; "keep" for
            those that have a schedule of their own, as Celo and VeLO. An ordinary one, such as
            AdamW at a bold rate, does better with "keep" too, and mostly better still in
            ``BestOf``.
        options: ``model``, ``scaler``, ``schedulers``, ``offload``, ``process_group`` and
            ``callback``, as in ``LossGuard``.

    Raises:
        ValueError: as ``LossGuard``; or if most is no integer or below nc, or nc is 0 or 1 and most
            isn't; or an option is one that ``recommended`` sets.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> guard = recommended(torch.optim.SGD([w], lr=3.0), torch.optim.SGD([w], lr=0.1))
    >>> guard.cycle(lambda batch: w.square().sum(), range(10), range(10)).winner  # s, lane 2
    2
    """
    nt, most = check_count("nt", nt), nc if most is None else most
    check_most(nc, most)
    few = mean_criterion(training=(nt - 1 if nc else nt) // 2)
    for name in ("criterion", "hedge", "probing", "ratchet"):
        if name in options:
            raise ValueError(f"recommended sets {name} itself: use LossGuard to choose")
    return LossGuard(
        learned,
        fallback,
        nt=nt,
        nc=nc,
        criterion=few if most == nc else curtailed_criterion(first=nc, most=most),
        hedge=track_record(decay=0.7),
        loser=loser,
        probing=backoff(patience=patience, most=512, start="reset" if loser == "reset" else "keep"),
        ratchet=ratchet(),
        **options,
    )
