"""A plain training loop with a guard in it: Adam at three times its good rate, guarded by SGD.

python examples/torch_mnist.py
"""

import torch
import tyro
from torch import nn
from torch_data import images, minibatches

from lossguard.torch import LossGuard


def main(calls: int = 600, seed: int = 0) -> LossGuard:
    """Train, print every fifth decision, and return the guard.

    Args:
        calls: minibatches of the stream; half of them train.
        seed: of the initialization and of the order of minibatches.
    """
    torch.manual_seed(seed)
    data = images()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(data[0][0].numel(), 20), nn.Sigmoid(), nn.Linear(20, 10)
    )

    learned = torch.optim.Adam(model.parameters(), lr=0.03)
    fallback = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = LossGuard(learned, fallback, nt=10, nc=10, callback=lambda _: report(guard))

    for pixels, labels in minibatches(data, size=128, count=calls):

        def closure(pixels=pixels, labels=labels):
            guard.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels), labels)
            loss.backward()
            return loss

        guard.step(closure)
    return guard


def report(guard: LossGuard) -> None:
    """What the last decision was, every fifth cycle."""
    decision = guard.last_decision
    if decision is None or len(guard.history) % 5:
        return
    names = {0: "learned", 1: "fallback", -1: "neither"}
    print(
        f"step {10 * len(guard.history):5d}   kept {names[decision.winner]:8}   check losses "
        f"{decision.learned_loss:.4f} (learned) {decision.fallback_loss:.4f} (fallback)"
    )


if __name__ == "__main__":
    tyro.cli(main)
