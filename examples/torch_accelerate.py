"""Hugging Face Accelerate: prepare the guard like any optimizer; ``backward`` is in the closure.

Accumulate gradients inside the closure: with ``accelerator.accumulate`` it would not be called.

python examples/torch_accelerate.py
accelerate launch examples/torch_accelerate.py
"""

import torch
import tyro
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_data import images

from lossguard.torch import Recommended


def main(calls: int = 200, seed: int = 0) -> Recommended:
    """Train, print after how many cycles AdamW led, and return the guard."""
    torch.manual_seed(seed)
    accelerator = Accelerator()
    data = images()
    loader = DataLoader(TensorDataset(*data), batch_size=128, shuffle=True, drop_last=True)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(data[0][0].numel(), 20), nn.ReLU(), nn.Linear(20, 10)
    )

    # Prepare the model first: the guard is built on the parameters that it is to update.
    model, loader = accelerator.prepare(model, loader)
    guard = Recommended(
        torch.optim.AdamW(model.parameters(), lr=0.03),
        torch.optim.SGD(model.parameters(), lr=0.3),
        model=model,
    )
    optimizer = accelerator.prepare(guard)

    done = 0
    while done < calls:
        for pixels, labels in loader:

            def closure(pixels=pixels, labels=labels):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(pixels), labels)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
            done += 1
            if done == calls:
                break
    led = sum(decision.winner == 0 for decision in guard.history)
    accelerator.print(f"AdamW led after {led} of {len(guard.history)} cycles")
    return guard


if __name__ == "__main__":
    tyro.cli(main)
