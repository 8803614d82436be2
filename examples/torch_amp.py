"""Mixed precision: bfloat16 on a CPU, float16 with a gradient scaler per lane on a GPU.

python examples/torch_amp.py
"""

from collections import defaultdict

import torch
import tyro
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch_data import images, minibatches

from lossguard.torch import Recommended


def main(calls: int = 200, seed: int = 0) -> Recommended:
    """Train, print the last decision, and return the guard."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    data = images()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    ).to(device)
    model(data[0][:2].to(device))

    guard = Recommended(
        torch.optim.AdamW(model.parameters(), lr=0.03),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        model=model,  # BatchNorm's statistics belong to a lane
    )
    # A lane that overflows must not lower the scale of the others.
    scalers = defaultdict(lambda: GradScaler(device, enabled=dtype == torch.float16))
    for batch in minibatches(data, size=128, count=calls):
        pixels, labels = (tensor.to(device) for tensor in batch)

        for lane in guard.lanes():
            with torch.autocast(device, dtype):
                loss = nn.functional.cross_entropy(model(pixels), labels)
            scaler = scalers[lane.name]
            scaler.scale(loss).backward()
            scaler.unscale_(lane.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lane.step(loss)  # with gradients of 0 where they overflowed
            scaler.update()
    print(guard.last_decision)
    return guard


if __name__ == "__main__":
    tyro.cli(main)
