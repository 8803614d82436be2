"""``Rewind`` for trainers: callbacks, a few lines each.

``from lossguard.torch.integrations import lightning_rewind``: a function imports its trainer when
it is called, not before.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch

from lossguard.torch import Rewind
from lossguard.torch.distributed import mean_of_ranks
from lossguard.torch.tensors import stacked


def lightning_rewind(**options: Any) -> Any:
    """A Lightning ``Callback``: ``Trainer(callbacks=[lightning_rewind()])``.

    It observes the loss that ``training_step`` returns, after each step of the module's optimizer;
    of several minibatches whose gradients are accumulated, the last one's; none where it returns
    None. Its state is in Lightning's checkpoints. It reads the losses before a validation and when
    an epoch ends, before they are saved there. The loggers get its numbers, ``rewind/scale`` and
    others.

    Args:
        options: of ``Rewind``, which is its attribute ``rewind`` once training has begun.

    Raises:
        TypeError: if ``Rewind`` has no such option.
        ValueError: when training begins, if there isn't exactly one optimizer, or optimization is
            manual.
    """
    from lightning.pytorch.callbacks import Callback

    inspect.signature(Rewind).bind(None, None, **options)  # refused now, not when training begins

    class LightningRewind(Callback):
        rewind: Rewind
        _saved: dict[str, Any] | None = None
        _steps = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            count, automatic = len(trainer.optimizers), pl_module.automatic_optimization
            if count != 1 or not automatic:
                raise ValueError(
                    "the module must have one optimizer, and automatic_optimization=True, got "
                    f"{count} and {automatic} (build Rewind(self, self.optimizers()) in its "
                    "on_train_start, and call observe after the steps)"
                )
            self.rewind = Rewind(pl_module, trainer.optimizers[0], **options)
            self._steps = trainer.global_step
            if self._saved:
                self.rewind.load_state_dict(self._saved)
                self._saved = None

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step > self._steps:  # not while gradients are accumulated
                self._steps = trainer.global_step
                if outputs:
                    self.rewind.observe(outputs["loss"])
                if trainer.global_step % trainer.log_every_n_steps == 0:
                    for logger in trainer.loggers:
                        logger.log_metrics(_named(self.rewind), step=trainer.global_step)

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                self.rewind.read()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.rewind.read()  # not in on_train_end, where averaged weights may be in the model

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.rewind.close()

        def state_dict(self) -> dict[str, Any]:
            return self.rewind.state_dict() if hasattr(self, "rewind") else self._saved or {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict

    return LightningRewind()


def trainer_rewind(trainer: Any, **options: Any) -> Any:
    """``Rewind`` in a Hugging Face ``Trainer``: ``trainer_rewind(trainer)`` before it trains.

    It adds a ``TrainerCallback``, which it returns. Callbacks aren't told the loss, so it hears
    what the trainer's ``compute_loss`` returns, label smoothing and one of your own included: the
    sum of those between two steps. It reads them before the model is evaluated or saved. What the
    trainer logs has its numbers, ``rewind/scale`` and others. Its state is in the Trainer's
    checkpoints, as ``rewind-RANK.pt``; with more processes than there were it begins anew.

    Args:
        trainer: not to be given a ``compute_loss`` or ``train`` of your own afterwards.
        options: of ``Rewind``, which is the attribute ``rewind`` of the callback in training.

    Raises:
        TypeError: if ``Rewind`` has no such option.
        ValueError: in training, if it hears no loss.
    """
    from transformers import TrainerCallback

    inspect.signature(Rewind).bind(None, None, **options)  # refused now, not when training begins
    losses: list[torch.Tensor] = []
    compute, train, resumed = trainer.compute_loss, trainer.train, ""
    log = getattr(trainer, "log", None)

    def noting(resume_from_checkpoint: str | bool | None = None, *others: Any, **more: Any) -> Any:
        nonlocal resumed
        given = resume_from_checkpoint
        resumed = "" if given is None or isinstance(given, bool) else given
        return train(given, *others, **more)

    def logging(logs: dict[str, Any], *others: Any, **more: Any) -> Any:
        numbers = _named(callback.rewind) if hasattr(callback, "rewind") else {}
        return log(logs | numbers, *others, **more) if log else None

    def heard(model: Any, *inputs: Any, **more: Any) -> Any:
        result = compute(model, *inputs, **more)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            losses.append(loss.detach().mean())
        return result

    class TrainerRewind(TrainerCallback):
        rewind: Rewind

        def on_train_begin(self, args: Any, state: Any, control: Any, **running: Any) -> None:
            losses.clear()  # of a run that was interrupted, which has not closed its own
            self.rewind = Rewind(running["model"], running["optimizer"], **options)
            if not state.global_step:
                return
            file = _file(args, state, resumed)
            found = torch.tensor(float(file.exists()))
            if mean_of_ranks(found, options.get("process_group")) == 1:
                saved = torch.load(file, weights_only=True, map_location="cpu")
                self.rewind.load_state_dict(saved)
            else:
                told = f"trainer_rewind begins anew, as there is no {file} on every rank"
                warnings.warn(told, RuntimeWarning, stacklevel=2)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not losses:
                raise ValueError(
                    "trainer.compute_loss must stay the one of trainer_rewind, got a step without"
                )
            self.rewind.observe(stacked(losses).sum())
            losses.clear()
            self._read_if_due(control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._read_if_due(control)

        def _read_if_due(self, control: Any) -> None:
            """Not in on_train_end, where the best model may have been loaded."""
            if control.should_evaluate or control.should_save or control.should_training_stop:
                self.rewind.read()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            file = _file(args, state)
            if file.parent.is_dir():
                torch.save(self.rewind.state_dict(), file)
            else:  # as in a search, whose runs have folders of their own
                told = f"trainer_rewind isn't saved, as there is no {file.parent}"
                warnings.warn(told, RuntimeWarning, stacklevel=2)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.rewind.close()

    trainer.compute_loss, trainer.train, trainer.log = heard, noting, logging
    trainer.add_callback(callback := TrainerRewind())
    return callback


def _named(rewind: Rewind) -> dict[str, float]:
    return {f"rewind/{name}": value for name, value in rewind.logged().items()}


def _file(args: Any, state: Any, folder: str = "") -> Path:
    """Where its state is, in a checkpoint's folder: that of this step, unless another is given."""
    of_step = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return Path(folder or of_step) / f"rewind-{args.process_index}.pt"
