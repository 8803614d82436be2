"""The Trainer of Hugging Face transformers: AdamW at two rates, guarded by ``BestOf``.

    pip install --group examples '.[experiments,torch]'
    python examples/torch_trainer.py

A guard runs the forward and the backward pass once for each lane, so that its closure is what
``training_step`` does. The closure clips as well; ``max_grad_norm=0`` keeps the Trainer from it.
The Trainer's schedule, on the guard, drives both rates in proportion.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.optim import AdamW
from torch_characters import sequences
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lossguard.torch import BestOf


class TrainersBestOf(BestOf):
    """``BestOf``, which has nothing left to do when the Trainer steps after ``training_step``."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One minibatch."""
        return None if closure is None else super().step(closure)


class GuardedTrainer(Trainer):
    """A Trainer whose optimizer is a guard."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what the closure of a single minibatch can't do."""
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1, got "
                f"{self.args.gradient_accumulation_steps}: the guard steps on every minibatch"
            )
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a minibatch, on which each of the guard's optimizers takes a step."""
        forward_and_backward = super().training_step
        guard = self.optimizer.optimizer  # beneath Accelerate's wrapper, which returns no loss

        def closure() -> Tensor:
            guard.zero_grad()
            loss = forward_and_backward(model, *args, **kwargs)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        return guard.step(closure)


def main(
    steps: int = 300,
    careful: float = 3e-3,
    bold: float = 9e-2,
    out: Path = Path("runs/torch_trainer"),
    resume: bool = False,
    accumulate: int = 1,
) -> GuardedTrainer:
    """Train a small GPT-2 on characters, and return the trainer.

    Args:
        steps: minibatches.
        careful: the rate of the fallback.
        bold: that of the optimizer which isn't trusted.
        out: the folder of the Trainer's checkpoints.
        resume: go on from the last of them.
        accumulate: minibatches over which the Trainer is to add up gradients.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=32,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    learned, fallback = (AdamW(model.parameters(), lr=rate) for rate in (bold, careful))
    text = [piece[:-1] for pieces in sequences(64, seed=0) for piece in pieces]
    trainer = GuardedTrainer(
        model,
        TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=16,
            max_grad_norm=0,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type="linear",
            save_steps=max(1, steps // 2),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in text],
        optimizers=(TrainersBestOf([fallback, learned], model=model), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    decisions = trainer.optimizer.optimizer.history
    followed = sum(decision.winner == 1 for decision in decisions)
    print(f"the rate of {bold} was followed in {followed} of {len(decisions)} cycles")
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
