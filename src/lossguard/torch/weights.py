"""The parameters and buffers of a model, and the copies of them that the lanes own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lossguard.torch.tensors import finite, local

Copy = list[Tensor]


class Weights:
    """The live tensors: parameters first, then the buffers of ``model``.

    Of a sharded parameter only this rank's shard is copied.

    Args:
        params: the parameters that the optimizers update.
        model: the module whose buffers belong to a branch, if any.
        device: where copies are kept; None is each tensor's own device.
    """

    def __init__(
        self, params: list[Tensor], model: nn.Module | None, device: torch.device | None
    ) -> None:
        self.params = params
        self.model = model
        self.device = device

    def copy(self) -> Copy:
        """A copy of the live values."""
        return [self._copied(tensor) for tensor in self._live()]

    def others(self) -> list[Tensor]:
        """The parameters of the model that no optimizer has, if PyTorch counts their changes."""
        ours = {id(p) for p in self.params}
        params = () if self.model is None else self.model.parameters()
        others = [p for p in params if id(p) not in ours and not p.is_inference()]
        return [p for p in others if not hasattr(p, "to_local")]

    def overlap(self) -> bool:
        """Whether a plain parameter lies where another tensor of the model does."""

        def places(tensors: Sequence[Tensor]) -> list[int]:
            plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.numel()]
            return [t.untyped_storage().data_ptr() for t in plain if t.layout is torch.strided]

        ours = places(self.params)
        return len(set(ours)) < len(ours) or not set(ours).isdisjoint(
            places([*self._buffers(), *self.others()])
        )

    def copy_buffers(self) -> Copy:
        """A copy of the live buffers."""
        return [self._copied(buffer) for buffer in self._buffers()]

    def copy_to(self, copy: Copy, x: Copy | None = None) -> None:
        """Write x to ``copy``, by default the live values."""
        _transfer(copy, self._live() if x is None else x)

    def copy_from(self, copy: Copy) -> None:
        """Put the values of ``copy`` into the model."""
        self._reshard()
        _transfer(self._live(), copy)

    def copy_buffers_to(self, copy: Copy) -> None:
        """Write the live buffers to ``copy``, which has them alone."""
        _transfer(copy, self._buffers())

    def copy_buffers_from(self, copy: Copy) -> None:
        """Put the buffers of ``copy``, which has them alone, into the model."""
        _transfer(self._buffers(), copy)

    def is_finite(self, copy: Copy, x: Copy | None = None) -> bool:
        """Whether what is in ``copy`` is finite, or what x has there, by default the model's.

        BatchNorm's statistics stay bad for ever after one bad minibatch; masks may be infinite.
        """
        return finite(copy) or all(
            finite(b) or bool((b.isfinite() | _is_same(b, x.to(b.device))).all())
            for b, x in zip(copy, self._live() if x is None else x, strict=True)
        )

    def have_diverged(self) -> bool:
        """Whether the live parameters that are trained, or their gradients, aren't finite.

        Of shards it isn't asked: ranks would have to agree on it within a closure.
        """
        params = [p for p in self.params if p.requires_grad]
        sharded = any(hasattr(p, "to_local") for p in params)
        return not sharded and not finite([(p.detach(), p.grad) for p in params])

    def check_shapes(self, copy: Copy) -> None:
        """Refuse a copy of another model's values."""
        live = self._live()
        if len(copy) != len(live):
            raise ValueError(
                f"state_dict must be of {len(live)} parameters and buffers, got one of {len(copy)}"
            )
        for saved, own in zip(copy, live, strict=True):
            if saved.shape != own.shape:
                raise ValueError(
                    f"state_dict must be of the same model, with a tensor of shape "
                    f"{list(own.shape)}, got {list(saved.shape)}"
                )

    def params_of(self, copy: Copy) -> Copy:
        """The parameters in ``copy``, without the buffers."""
        return copy[: len(self.params)]

    def buffers_of(self, copy: Copy) -> Copy:
        """The buffers in ``copy``, without the parameters."""
        return copy[len(self.params) :]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give every parameter its own storage back afterwards, with the value that it then has.

        An optimizer may put another tensor into ``p.data``. One whose shape or type can't be a
        parameter's value counts as not finite.
        """
        homes = [p.data for p in self.params]
        try:
            yield
        finally:
            for p, home in zip(self.params, homes, strict=True):
                _bring_home(p, home)

    def have_gradients(self) -> bool:
        """Whether any parameter has one."""
        return any(p.grad is not None for p in self.params)

    def clear_gradients(self) -> None:
        """Forget the gradients, so that none leaks from one lane into another."""
        for p in self.params:
            p.grad = None

    def _live(self) -> Copy:
        return [*(local(p.detach()) for p in self.params), *self._buffers()]

    def _buffers(self) -> Copy:
        buffers = () if self.model is None else self.model.buffers()
        return [local(buffer.detach()) for buffer in buffers if not _is_expanded(buffer)]

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.device is None else tensor.to(self.device, copy=True)

    def _reshard(self) -> None:
        """Drop gathered parameters, which a forward without a backward leaves behind."""
        for module in () if self.model is None else self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None and hasattr(module, "unshard"):
                reshard()


def _is_same(b: Tensor, x: Tensor) -> Tensor:
    return (b == x) | (b.isnan() & x.isnan())


def _is_expanded(tensor: Tensor) -> bool:
    """Whether one number stands for several, so that nothing can be written to it in place."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _transfer(targets: Copy, values: Copy) -> None:
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
