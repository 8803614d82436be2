"""The parameters and buffers of a model, and how another lane's get into it for a while."""

from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from lossguard.torch.tensors import Number, finite, local, own_buffers, transfer

Copy = list[Tensor]
"""Parameters first, then buffers; of a sharded parameter this rank's shard alone."""
Beside = list[tuple[Tensor, Tensor | None]]


class Weights:
    """The live tensors: what the model is, and what the lane is that is in it.

    Another lane is copied into them while it runs, and out again. So a compiled model, a CUDA graph
    and whoever else holds the tensors see each lane. The model is for its buffers, if any.
    """

    def __init__(self, params: list[Tensor], model: nn.Module | None) -> None:
        self.params, self.model = params, model
        self._buffers = {} if model is None else dict(model.named_buffers())
        self.jumped = False
        """Whether the model was given another lane's values, or earlier ones."""
        self.holder: Any = None
        """The lane that is in the model."""
        ours = set(params)
        self._others = [] if model is None else [p for p in model.parameters() if p not in ours]
        live = self.live()
        self._checked = [True] * len(live) if finite(live) else [finite(one) for one in live]
        """Of each tensor whether it was finite; masks may be infinite."""
        if any(p.requires_grad and not ok for p, ok in zip(params, self._checked, strict=False)):
            raise ValueError("parameters must be finite, got some that aren't and are trained")

    def live(self) -> Copy:
        return [*(local(p.detach()) for p in self.params), *self.buffers()]

    def write(self, values: Copy) -> None:
        self.reshard()
        transfer(self.live(), values)

    def is_finite(self, values: Copy) -> bool:
        return finite(list(compress(values, self._checked)))

    def have_diverged(self) -> bool:
        """Whether the live parameters that are trained, or their gradients, aren't finite."""
        return not finite([(p.detach(), p.grad) for p in self.params if p.requires_grad])

    def mend(self, buffers: Copy, broken: Number) -> None:
        """Take the buffers back to a copy if a minibatch is broken.

        Inputs that aren't finite have made statistics of BatchNorm so, in the forward pass.
        """
        if broken is not False:
            for buffer, before in zip(self.buffers(), buffers, strict=False):
                if buffer.shape == before.shape and buffer.layout is torch.strided:
                    flag = torch.as_tensor(broken, dtype=torch.bool, device=buffer.device)
                    torch.where(flag, before, buffer, out=buffer)

    def clear_gradients(self) -> None:
        """Forget the gradients, so that none leaks from one lane into another."""
        for p in self.params:
            p.grad = None

    def gradients_beside(self) -> Beside:
        """Those of parameters that other optimizers step, and no lane."""
        grads = [(p, p.grad) for p in self._others if p.requires_grad]
        return [(p, None if grad is None else grad.clone()) for p, grad in grads]

    def note_shared(self) -> list[tuple[Tensor, int]]:
        """The parameters that nobody steps, and how often they were written to."""
        return [(p, p._version) for p in self._others if not p.requires_grad]

    def reset_gradients(self, beside: Beside) -> None:
        """Set those to what they were, or each lane would add to them."""
        for p, grad in beside:
            p.grad = None if grad is None else grad.clone()

    def reshard(self) -> None:
        """Drop gathered parameters, which a forward without a backward leaves behind."""
        for module in () if self.model is None else self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None and hasattr(module, "unshard"):
                reshard()

    def buffers(self) -> Copy:
        """The buffers themselves, except those of which one number stands for several."""
        buffers = {} if self.model is None else own_buffers(self.model, self._buffers)
        return [local(buffer.detach()) for buffer in buffers.values()]
