"""Lightning: automatic optimization takes the guard as it is, and manual optimization works too.

Automatic optimization passes the guard a closure that evaluates ``training_step``, so that it is
called once for each lane that runs. Manual optimization is for losses that aren't one step's.

    python examples/torch_lightning.py
    python examples/torch_lightning.py --manual
"""

import lightning
import torch
import tyro
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_data import Batch, images

from lossguard.torch import Recommended


class Classifier(lightning.LightningModule):
    """A small network whose optimizer is a guard.

    Args:
        inputs: pixels of an image.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)
        )

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Recommended:
        return Recommended(
            torch.optim.AdamW(self.parameters(), lr=0.03),
            torch.optim.SGD(self.parameters(), lr=0.3),
            model=self,
        )


class Manual(Classifier):
    """The same with manual optimization."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, index: int) -> None:  # pyright: ignore
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def main(calls: int = 200, manual: bool = False, seed: int = 0) -> Recommended:
    """Train, print the last decision, and return the guard."""
    lightning.seed_everything(seed, verbose=False)
    data = images()
    loader = DataLoader(TensorDataset(*data), batch_size=128, shuffle=True, drop_last=True)
    model = (Manual if manual else Classifier)(data[0][0].numel())
    trainer = lightning.Trainer(
        max_steps=calls,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    guard = trainer.optimizers[0]
    assert isinstance(guard, Recommended)
    print(guard.last_decision)
    return guard


if __name__ == "__main__":
    tyro.cli(main)
