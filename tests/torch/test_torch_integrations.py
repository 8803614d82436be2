"""``Rewind`` under Lightning, the Hugging Face Trainer and Accelerate, in AMP and accumulation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import quick, refuses
from torch import nn

from lossguard.torch import Recommended, Rewind
from lossguard.torch.integrations import lightning_rewind, trainer_rewind

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"every": 4}
FAULT = range(90, 150)
"""Steps whose losses are high, though the model is not worse."""


def data(rows=4096):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=rng)
    return x, (x[:, 0] > 0).long()


def module():
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 2)

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            return loss * (30 if self.global_step in FAULT else 1)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return lightning, Classifier


def loader(rows=4096):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(rows)), batch_size=8)


def fit(steps, callback, accumulate=1, rows=4096, **where):
    lightning, make = module()
    trainer = quick(lightning, steps, callback, accumulate_grad_batches=accumulate)
    model = make()
    trainer.fit(model, loader(rows), **where)
    return trainer, model


def test_lightning_resumes(tmp_path):
    """On one minibatch, as Lightning doesn't go on at the one where it stopped."""
    whole = lightning_rewind(**OPTIONS)
    _, model = fit(150, whole, rows=8)
    first, _ = fit(86, lightning_rewind(**OPTIONS), rows=8)
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = lightning_rewind(**OPTIONS)
    half = {"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}
    _, twin = fit(150, rest, rows=8, **half)
    assert rest.rewind.events == whole.rewind.events
    assert all(map(torch.equal, twin.parameters(), model.parameters()))
    assert rest.rewind.calls == 150
    fit(10, rest, rows=8)  # without the old state
    assert rest.rewind.calls == 10


def test_lightning_without_a_loss():
    """A minibatch that is left out, none yet, and steps that Lightning doesn't take itself."""
    lightning, make = module()

    class LeavesOut(make):
        def training_step(self, batch, index):
            return None if index % 5 == 2 else super().training_step(batch, index)

    callback = lightning_rewind(**OPTIONS)
    trainer = quick(lightning, 15, callback)
    assert callback.state_dict() == {}
    trainer.fit(LeavesOut(), loader())
    assert callback.rewind.calls == 12 and trainer.global_step == 15
    model = make()
    model.automatic_optimization = False
    told = "the module must have one optimizer, and automatic_optimization=True, got 1 and False"
    with refuses(f"{told} (build Rewind(self, self.optimizers()) in its on_train_start, and "):
        quick(lightning, 15, callback).fit(model, loader())


def test_lightning_validates_nothing_that_is_not_read():
    """Nor does the end of training, where averaged weights may be in the model."""
    lightning, make = module()
    callback, unread = lightning_rewind(**OPTIONS), []

    class Validated(make):
        def validation_step(self, batch, index):
            return super().training_step(batch, index)

    class Looks(lightning.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                unread.append((trainer.global_step, len(callback.rewind._unread)))

        def on_train_end(self, trainer, pl_module):
            self.on_validation_epoch_start(trainer, pl_module)

    often = {"val_check_interval": 7, "limit_val_batches": 1}
    trainer = quick(lightning, 18, Looks(), callback, **often)
    trainer.fit(Validated(), loader(), loader(8))
    assert unread == [(7, 0), (14, 0), (18, 0)]


def trainer_of(out, steps, accumulate=1, **options):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.seen = nn.Linear(4, 2), 0

        def forward(self, x, labels):
            logits = self.net(x)
            loss = nn.functional.cross_entropy(logits, labels)
            step = self.seen // accumulate
            self.seen += self.training
            return {"loss": loss * (30 if step in FAULT else 1), "logits": logits}

    x, t = data()
    return transformers.Trainer(
        Model(),
        transformers.TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulate,
            save_steps=options.pop("save_steps", 86),
            learning_rate=0.05,
            report_to="none",
            use_cpu=True,
            **options,
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, t, strict=True)],
        eval_dataset=[{"x": x[0], "labels": t[0]}],
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_trainers(tmp_path, trainer, accumulate):
    pytest.importorskip(trainer)
    if trainer == "lightning":
        callback = lightning_rewind(**OPTIONS)
        steps = fit(150, callback, accumulate)[0].global_step
    else:
        made = trainer_of(tmp_path, 150, accumulate)
        callback = trainer_rewind(made, **OPTIONS)
        steps = made.train().global_step
    rewind = callback.rewind
    assert rewind.calls == steps == 150
    kinds = [event.kind for event in rewind.events if event.kind != "skipped"]
    assert kinds[:2] == ["trial", "forward"] and rewind.scale == 1


def test_the_trainer_resumes(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, 150)
    whole = trainer_rewind(trainer, **OPTIONS)
    trainer.train()
    load, places = torch.load, {}

    def noted(file, *args, **options):
        places[getattr(file, "name", file)] = options.get("map_location")
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", noted)
    other = trainer_of(tmp_path / "other", 86)
    trainer_rewind(other, **OPTIONS)  # leaves a checkpoint of its own after as many steps
    other.train()
    again = trainer_of(tmp_path / "other", 150)
    rest = trainer_rewind(again, **OPTIONS)
    again.model.seen = 86
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-86"))
    assert rest.rewind.events == whole.rewind.events and rest.rewind.calls == 150
    assert places["rewind-0.pt"] == "cpu"  # there may be fewer devices than before
    assert all(map(torch.equal, again.model.parameters(), trainer.model.parameters()))


def test_the_trainer_evaluates_and_saves_nothing_that_is_not_read(tmp_path):
    """Nor does the end of training, where the best model has been loaded."""
    transformers = pytest.importorskip("transformers")
    often = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 14}
    trainer = trainer_of(tmp_path, 18, load_best_model_at_end=True, **often)
    unread = []

    class Looks(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            unread.append((state.global_step, len(callback.rewind._unread)))

        on_save = on_train_end = on_evaluate

    trainer.add_callback(Looks())
    callback = trainer_rewind(trainer, **OPTIONS)
    trainer.train()
    assert unread == [(7, 0), (14, 0), (14, 0), (18, 0), (18, 0), (18, 0)]


def test_losses_of_several_devices_are_added_up(tmp_path):
    """As nn.DataParallel has them, which the Trainer takes if it sees several GPUs."""
    pytest.importorskip("transformers")
    model, told = nn.Linear(2, 1), [torch.ones(2), torch.ones(2).double()]
    trainer = SimpleNamespace(
        compute_loss=lambda model: told.pop(), train=None, add_callback=lambda one: None
    )
    callback = trainer_rewind(trainer, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = SimpleNamespace(output_dir=tmp_path, process_index=0)
    state = SimpleNamespace(global_step=0)
    control = SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    assert [trainer.compute_loss(model).shape for _ in range(2)] == [(2,), (2,)]
    optimizer.step()
    callback.on_step_end(args, state, control)
    assert callback.rewind.calls == 1
    told.append((torch.ones(2), "outputs"))
    trainer.compute_loss(model)
    optimizer.step()
    callback.on_step_end(args, state, control)
    assert callback.rewind.calls == 2
    with refuses(
        "trainer.compute_loss must stay the one of trainer_rewind, got a step without", "$"
    ):
        callback.on_step_end(args, state, control)
    with pytest.warns(RuntimeWarning, match=r"isn't saved, as there is no .*checkpoint-0$"):
        callback.on_save(args, state, None)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_hears_the_loss_that_it_computes(tmp_path, smoothing, monkeypatch):
    """Where it smooths them, it takes the labels away before the model sees them."""
    trainer, told = trainer_of(tmp_path, 43), []
    forward = trainer.model.forward
    trainer.model.forward = lambda x, labels=None: forward(x, torch.zeros(len(x)).long())
    trainer.args.label_smoothing_factor = smoothing
    if smoothing:
        transformers = pytest.importorskip("transformers")
        trainer.label_smoother = transformers.trainer_pt_utils.LabelSmoother(smoothing)
    step = trainer.training_step
    trainer.training_step = lambda *given: told.append(step(*given)) or told[-1]
    callback = trainer_rewind(trainer, **OPTIONS)
    heard, observe = [], Rewind.observe
    monkeypatch.setattr(
        Rewind, "observe", lambda self, loss: heard.append(float(loss)) or observe(self, loss)
    )
    trainer.train()
    trainer.evaluate(trainer.train_dataset[:8])
    assert heard == [float(loss) for loss in told] and callback.rewind.calls == 43
    assert not callback.rewind._unread


@pytest.mark.parametrize("make", [lightning_rewind, trainer_rewind])
def test_options_that_rewind_does_not_have_are_refused_at_once(make):
    pytest.importorskip("lightning" if make is lightning_rewind else "transformers")
    given = [] if make is lightning_rewind else [SimpleNamespace(compute_loss=None)]
    with pytest.raises(TypeError, match=r"^got an unexpected keyword argument 'windw'$"):
        make(*given, windw=3)


@pytest.fixture
def accelerate():
    """What it is told is the process's, where other guards would refuse it."""
    package = pytest.importorskip("accelerate")

    def reset():
        package.state.GradientState._reset_state()
        package.state.AcceleratorState._reset_state(True)

    reset()
    yield package
    reset()


def test_accelerate_with_accumulated_gradients(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    rewind = Rewind(model, optimizer, **OPTIONS)
    for i, (x, t) in enumerate(batches):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), t) * (30 if i // 2 in FAULT else 1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rewind.observe(loss)
    assert rewind.calls == 256 and rewind.events
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler_skips_by_itself(dtype):
    """It skips a step that overflows; the loss alone says nothing of it."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rewind = Rewind(model, optimizer, **OPTIONS)
    x, t = data()
    for i in range(150):
        rows = slice(8 * i, 8 * i + 8)
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x[rows]), t[rows])
        optimizer.zero_grad()
        scaler.scale(loss * (torch.inf if i == 50 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        rewind.observe(loss * (30 if i in FAULT else 1))
        assert all(p.isfinite().all() for p in model.parameters())
    assert rewind.events and scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("of_step", [False, True])
def test_what_is_compiled(of_step):
    """The model, and in some loops the optimizer's step as well, which has a complex gradient."""
    net = nn.Linear(4, 2)
    net.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model = torch.compile(net, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rewind = Rewind(model, optimizer, **OPTIONS)
    step = torch.compile(optimizer.step, backend="eager") if of_step else optimizer.step
    x, t = data()
    for i in range(150):
        loss = nn.functional.cross_entropy(model(x[8 * i : 8 * i + 8]), t[8 * i : 8 * i + 8])
        optimizer.zero_grad()
        (loss + net.phase.abs().square().sum()).backward()
        step()
        rewind.observe(loss * (30 if i in FAULT else 1))
    assert rewind.events and rewind.calls == 150


def test_a_trainer_that_was_interrupted_trains_again(tmp_path):
    """Its optimizer is the same, and so would be the hooks on it."""
    trainer = trainer_of(tmp_path, 10)
    callback = trainer_rewind(trainer, **OPTIONS)
    real, calls = callback.on_step_end, []

    def interrupted(*args, **more):
        real(*args, **more)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    callback.on_step_end = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback.rewind.calls == 10
    assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == 0


def test_what_lightning_makes_of_a_guard_has_the_guard_do_it():
    """It takes the guard's class as a base, and a copy of the guard's attributes."""
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = nn.Linear(4, 2)
    bold, careful = (torch.optim.SGD(model.parameters(), lr=lr) for lr in (0.1, 0.01))
    guard = Recommended(bold, careful, model=model)
    wrapped: Any = LightningOptimizer(guard)
    before = guard.state_dict()
    for _ in range(13):
        for lane in wrapped.lanes():
            loss = model(torch.ones(4)).square().sum()
            loss.backward()
            lane.step(loss)
    assert (guard.steps, guard.phase) == (10, 3)
    wrapped.load_state_dict(before)
    assert (guard.steps, guard.phase) == (0, 0)


def test_a_guard_may_be_built_over_what_accelerate_has_prepared(accelerate):
    model = nn.Linear(4, 2)
    pair = [torch.optim.SGD(model.parameters(), lr=lr) for lr in (0.1, 0.01)]
    guard = Recommended(*accelerate.Accelerator(cpu=True).prepare(*pair), model=model)

    def closure():
        guard.zero_grad()
        loss = model(torch.ones(4)).square().sum()
        loss.backward()
        return loss

    assert guard.step(closure) > guard.step(closure)


def test_a_scheduler_may_be_on_what_accelerate_has_made_of_the_optimizer(accelerate):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(prepared, 5)
    assert not Rewind(model, prepared, also=[schedule]).events
