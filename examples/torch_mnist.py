"""A plain training loop with a guard in it: `mlp-small`, a learned optimizer, guarded by SGD.

python examples/torch_mnist.py
"""

import torch
import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_data import images, minibatches

from lossguard.torch import Decision, MLPOptimizer, Recommended

LEADS = {0: "learned", 1: "fallback from there", 2: "fallback by itself"}


def main(calls: int = 300, seed: int = 0) -> Recommended:
    """Train with a guard, which prints every fifth decision, and without; return the guard.

    Args:
        calls: minibatches of the stream.
        seed: of the initialization and of the order of minibatches.
    """
    data = images()
    torch.manual_seed(seed)
    model = network(data[0][0].numel())
    learned = MLPOptimizer.pretrained(model.parameters(), "mlp-small")
    fallback = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = Recommended(
        learned, fallback, model=model, callback=lambda decision: report(guard.steps, decision)
    )
    train(model, guard, data, calls)

    torch.manual_seed(seed)
    alone = network(data[0][0].numel())
    train(alone, torch.optim.SGD(alone.parameters(), lr=1.0), data, calls)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(data[0]), data[1]) for net in (model, alone)]
    print(f"loss on all images: guarded {losses[0]:.4f}, SGD alone {losses[1]:.4f}")
    return guard


def network(pixels: int) -> nn.Module:
    """The paper's MLP, for images of so many pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 20), nn.Sigmoid(), nn.Linear(20, 10))


def train(model: nn.Module, optimizer: Optimizer, data: tuple[Tensor, Tensor], calls: int) -> None:
    """The same loop with a guard and with an ordinary optimizer."""
    for pixels, labels in minibatches(data, size=128, count=calls):

        def closure(pixels=pixels, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def report(steps: int, decision: Decision) -> None:
    """What the last decision was, every fifth cycle."""
    if steps % 50 == 0:
        print(
            f"step {steps:5d}   leads: {LEADS[decision.winner]:20}   loss {decision.losses[-1]:.4f}"
            f"   gradients a step {decision.price() / len(decision.losses):.1f}"
        )


if __name__ == "__main__":
    tyro.cli(main)
