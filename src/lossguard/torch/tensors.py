"""The numbers of many tensors at once."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

ONE = torch.ones((), dtype=torch.float32, device="cpu")
Number = Tensor | float
"""A tensor without dimensions, on a device that is waited for; or what is known on the host."""
PLAIN = {Tensor, nn.Parameter}
NORMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def transfer(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors, all at once."""
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


def leaves(value: Any) -> Iterator[Any]:
    """What nested dictionaries and sequences hold.

    >>> list(leaves({"a": [1, (2, None)], "b": "text"}))
    [1, 2, None, 'text']
    """
    if isinstance(value, (dict, list, tuple, deque)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value


def finite(value: Any) -> bool:
    """Whether every number in nested containers is finite: one read from each device.

    >>> finite({"a": [torch.ones(2), 3.0]}), finite([torch.tensor([1.0, math.nan])])
    (True, False)
    """
    found = list(leaves(value))
    numbers = [leaf for leaf in found if isinstance(leaf, float)]
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    return all(map(math.isfinite, numbers)) and bool(are_finite(tensors))


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every number is finite, as a tensor: nothing waits for the device."""
    parts = [part for one in tensors if (part := _measurable(one)).is_floating_point()]
    # On mps the largest number is that beside NaN; others may have no norms.
    apart = [part for part in parts if part.is_mps or type(part) not in PLAIN]
    normed = [part for part in parts if not part.is_mps and type(part) in PLAIN and part.numel()]
    flags = [part.isfinite().all() for part in apart]
    if normed:  # the largest number, or NaN; no overflow
        flags.append(nn.utils.get_total_norm(normed, math.inf) < math.inf)
    if not flags:
        return torch.tensor(True, device="cpu")
    return flags[0] if len(flags) == 1 else stacked(flags).all()


@torch.no_grad()
def zero_unsound(params: Iterable[Tensor]) -> Number:
    """Make all gradients 0 if one of them isn't finite, also in another rank's shards; whether
    that was so. Nothing waits for the device."""
    params = list(params)
    grads = [grad for p in params if (grad := p.grad) is not None]
    broken = _unsound_at_once(grads)
    if broken is None:
        grads = [grad._values() if grad.is_sparse else local(grad) for grad in grads]
        broken = ~are_finite(grads)
    broken = _on_any_rank(broken, params)  # by these: a rank may have no gradient
    if broken.is_cpu and not broken:  # elsewhere to look would be to wait
        return False
    on = {device: broken.to(device, torch.bool) for device in {g.device for g in grads}}
    for grad in grads:
        grad.masked_fill_(on[grad.device], 0)
    return True if broken.is_cpu else broken


def _unsound_at_once(grads: list[Tensor]) -> Tensor | None:
    """Whether a number isn't finite, by one call, where calls are what takes time; or None."""
    if torch.compiler.is_compiling():  # it would be refused where nobody asks for another way
        return None
    if not grads or not grads[0].is_cpu or not {*map(type, grads)} <= PLAIN:
        return None
    broken = torch.zeros_like(ONE)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, broken, ONE)  # pyright: ignore
    except RuntimeError:  # of another dtype, sparse, elsewhere, or with a number for several places
        return None
    return broken


def _on_any_rank(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Whether it is so on any rank that has shards of these: an all-reduce for each mesh."""
    tensors = () if {*map(type, tensors)} <= PLAIN else tensors
    meshes: dict[Any, None] = {t.device_mesh: None for t in tensors if is_sharded(t)}  # pyright: ignore
    for mesh in meshes:
        from torch.distributed.tensor import DTensor, Partial

        most = [Partial("max")] * mesh.ndim
        flag = DTensor.from_local(flag.float(), mesh, most).full_tensor()
    return flag


def local(tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # pyright: ignore


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor) not in PLAIN and hasattr(tensor, "to_local")


def is_expanded(tensor: Tensor) -> bool:
    """Whether one number stands for several, so that nothing can be written to it in place."""
    if tensor.layout is not torch.strided:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of which each number is its own, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if not is_expanded(buffer)}


@torch.no_grad()
def own_buffers(model: nn.Module, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """``buffers_of``, to be written to.

    Where a forward pass has put another tensor than is ``known``, such as its input, which is the
    user's, the model gets a copy of it.
    """
    found = buffers_of(model)
    for name in [name for name, buffer in found.items() if known.get(name) is not buffer]:
        owner, _, key = name.rpartition(".")
        found[name] = known[name] = found[name].detach().clone()
        setattr(model.get_submodule(owner), key, known[name])
    return found


def stacked(scalars: Sequence[Number]) -> Tensor:
    """One tensor of them, of no dtype that is narrower than those of the tensors: to be read at
    once, as each read waits for the device."""
    tensors = [one for one in scalars if isinstance(one, Tensor)]
    if not tensors:
        return torch.tensor(scalars, dtype=torch.float64, device="cpu")
    device, widest = tensors[0].device, torch.float32
    if device.type != "mps":  # which has no double precision
        widest = reduce(torch.promote_types, {one.dtype for one in tensors}, widest)
    return torch.stack([torch.as_tensor(one, dtype=widest, device=device) for one in scalars])


def _measurable(tensor: Tensor) -> Tensor:
    """The numbers that are here, in a dtype with norms: not complex ones, nor those of 8 bits."""
    if type(tensor) in PLAIN and tensor.dtype in NORMED and tensor.layout is torch.strided:
        return tensor
    tensor = local(tensor).detach()
    if tensor.layout is not torch.strided:
        tensor = (tensor.coalesce() if tensor.is_sparse else tensor).values()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    narrow = tensor.element_size() == 1 and tensor.is_floating_point()
    return tensor.bfloat16() if narrow else tensor
