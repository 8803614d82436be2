"""The parameters and buffers of a model, and how another lane's get into it for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lossguard.torch.tensors import finite, local

Copy = list[Tensor]
"""Parameters first, then buffers; of a sharded parameter this rank's shard alone."""


class Weights:
    """The live tensors: what the model is, and what the leader's lane is.

    Another lane's parameters get into the model by pointer, which copies nothing; by value where a
    parameter is sharded or shares its storage. Its buffers always go by value.

    Args:
        params: the parameters that the optimizers update.
        model: the module whose buffers belong to a lane, if any.
    """

    def __init__(self, params: list[Tensor], model: nn.Module | None) -> None:
        self.params = params
        self.model = model
        self.jumped = False
        """Whether the model was given another lane's values, or earlier ones."""
        self._homes: list[Tensor] | None = None
        self._aside: Copy | None = None

    def live(self) -> Copy:
        """The live tensors themselves."""
        return [*(local(p.detach()) for p in self.params), *self._buffers()]

    def write(self, values: Copy) -> None:
        """Put values into the model, for good."""
        self.reshard()
        transfer(self.live(), values)
        self.jumped = True

    def enter(self, values: Copy) -> None:
        """Put a lane into the model until ``leave`` or ``undo``; none: the live one stays."""
        self._aside = [t.clone() for t in self._buffers()]
        if not values:
            return
        self.reshard()
        if self._by_pointer():
            self._homes = [p.data for p in self.params]
            for p, value in zip(self.params, values, strict=False):
                p.data = value
            transfer(self._buffers(), values[len(self.params) :])
        else:
            self._aside = [t.clone() for t in self.live()]
            transfer(self.live(), values)

    def leave(self, values: Copy) -> None:
        """Note in ``values`` what has become of the lane, and put back what was there before."""
        if values:
            start = len(self.params) if self._homes is not None else 0
            transfer(values[start:], self.live()[start:])
            self.undo()
        self._aside = None

    def undo(self) -> None:
        """Put back what was there before ``enter``; of the leader its buffers."""
        if self._homes is not None:
            for p, home in zip(self.params, self._homes, strict=True):
                p.data = home
            self._homes = None
        if self._aside is not None:
            whole = len(self._aside) > len(self._buffers())
            if whole:
                self.reshard()
            transfer(self.live() if whole else self._buffers(), self._aside)
            self._aside = None

    def renew_buffers(self, values: Copy) -> None:
        """Put the buffers of the lane inside back, as they were when it entered."""
        if values or self._aside:
            transfer(self._buffers(), values[len(self.params) :] if values else self._aside or [])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Every parameter has its own storage afterwards, with the value that it then has.

        An optimizer may put another tensor into ``p.data``. One whose shape or type can't be a
        parameter's value counts as not finite. ``requires_grad`` stays as it was.
        """
        before = [(p.data, p.requires_grad) for p in self.params]
        try:
            yield
        finally:
            for p, (home, trained) in zip(self.params, before, strict=True):
                _bring_home(p, home)
                if p.requires_grad != trained:
                    p.requires_grad_(trained)

    def is_finite(self, values: Copy, reference: Copy) -> bool:
        """Whether values are finite, or what ``reference`` is there: masks may be infinite."""
        return finite(values) or all(
            finite(b) or bool((b.isfinite() | (b == x) | (b.isnan() & x.isnan())).all())
            for b, x in zip(values, reference, strict=True)
        )

    def have_diverged(self) -> bool:
        """Whether the live parameters that are trained, or their gradients, aren't finite."""
        return not finite([(p.detach(), p.grad) for p in self.params if p.requires_grad])

    def have_gradients(self) -> bool:
        """Whether any parameter has one."""
        return any(p.grad is not None for p in self.params)

    def clear_gradients(self) -> None:
        """Forget the gradients, so that none leaks from one lane into another."""
        for p in self.params:
            p.grad = None

    def others(self) -> list[Tensor]:
        """The parameters of the model that no optimizer has, if PyTorch counts their changes."""
        ours = {id(p) for p in self.params}
        params = () if self.model is None else self.model.parameters()
        others = [p for p in params if id(p) not in ours and not p.is_inference()]
        return [p for p in others if not hasattr(p, "to_local")]

    def reshard(self) -> None:
        """Drop gathered parameters, which a forward without a backward leaves behind."""
        for module in () if self.model is None else self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None and hasattr(module, "unshard"):
                reshard()

    def _buffers(self) -> Copy:
        buffers = () if self.model is None else self.model.buffers()
        return [local(buffer.detach()) for buffer in buffers if not _is_expanded(buffer)]

    def _by_pointer(self) -> bool:
        """Whether every parameter is a plain tensor and has a storage to itself.

        Someone else may hold the storage that several share: cuDNN's flat weights, or FSDP's.
        """
        if not all(_is_plain(p) for p in self.params):
            return False
        ours, theirs = _places(self.params), _places([*self._buffers(), *self.others()])
        return len(set(ours)) == len(ours) and set(ours).isdisjoint(theirs)


def transfer(targets: Copy, values: Copy) -> None:
    """Copy values, all at once."""
    if not targets and not values:
        return
    try:
        with torch.no_grad():
            torch._foreach_copy_(targets, values)  # pyright: ignore
    except RuntimeError as error:
        if [t.shape for t in targets] == [v.shape for v in values]:
            raise
        raise ValueError(
            "model must keep the number and the shapes of its buffers, got others than before: "
            "have those that a forward pass makes, such as masks, made before the guard is built"
        ) from error


def _is_plain(p: Tensor) -> bool:
    return (
        type(p) in (Tensor, nn.Parameter)
        and type(p.data) is Tensor
        and p.untyped_storage().nbytes() == p.numel() * p.element_size()
    )


def _places(tensors: Sequence[Tensor]) -> list[int]:
    plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.numel()]
    return [t.untyped_storage().data_ptr() for t in plain if t.layout is torch.strided]


def _is_expanded(tensor: Tensor) -> bool:
    """Whether one number stands for several, so that nothing can be written to it in place."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _bring_home(p: Tensor, home: Tensor) -> None:
    value = p.data
    if hasattr(value, "to_local") or _is_same_storage(value, home):
        return
    p.data = home
    fits = value.shape == home.shape and value.layout == home.layout
    if fits and torch.can_cast(value.dtype, home.dtype):
        home.copy_(value)
    else:
        home.fill_(torch.nan)


def _is_same_storage(value: Tensor, home: Tensor) -> bool:
    return (
        value.dtype == home.dtype
        and value.shape == home.shape
        and value.stride() == home.stride()
        and value.layout == home.layout
        and value.data_ptr() == home.data_ptr()
    )
