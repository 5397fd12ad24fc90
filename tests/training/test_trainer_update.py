"""The optimizer and the scheduler of the user's own: they train, and go on bit for bit."""

import functools

import pytest
import safetensors.torch
import torch
from torch.optim import lr_scheduler

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.errors import InputError, TrainingError
from fastdiff.training import TrainConfig, Trainer
from training_tools import make_dataset, make_diffusion, make_model, read_lines

PLAIN = {"batch_size": 4, "steps": 6, "log_every": 1, "tensorboard": False, "ema": ()}


def make(run, model=None, *, optimizer=None, scheduler=None, callbacks=(), **settings):
    return Trainer(
        model or make_model(),
        make_diffusion(),
        make_dataset(),
        TrainConfig(**{**PLAIN, **settings}),
        run,
        device="cpu",
        progress=False,
        optimizer=optimizer,
        scheduler=scheduler,
        callbacks=callbacks,
    )


def resume(run, steps=6, **options):
    changes = {"steps": steps, **options.pop("changes", {})}
    options |= {"device": "cpu", "progress": False}
    return Trainer.resume(run, make_dataset(), changes=changes, **options)


def assert_same_end(run, expected):
    for stem in ("model", "trainer"):
        mine, theirs = (
            safetensors.torch.load_file(list_checkpoints(r)[-1] / f"{stem}.safetensors")
            for r in (run, expected)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert read_lines(run) == read_lines(expected)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def two_groups(parameters):
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=1e-3)


def in_turn(optimizer):
    first = lr_scheduler.LinearLR(optimizer, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [first, steps_down(optimizer)], [2])


def steps_down(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)


def by_function(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (sgd, one_cycle),
        (None, steps_down),
        (two_groups, in_turn),
        (torch.optim.NAdam, by_function),
        (torch.optim.Adafactor, plateau),
        (torch.optim.ASGD, None),
        (torch.optim.RMSprop, lr_scheduler.CosineAnnealingWarmRestarts),
    ],
)
def test_a_run_of_their_own_goes_on_bit_for_bit(tmp_path, optimizer, scheduler):
    if scheduler is lr_scheduler.CosineAnnealingWarmRestarts:
        scheduler = functools.partial(scheduler, T_0=4)
    own = {"optimizer": optimizer, "scheduler": scheduler}
    make(tmp_path / "whole", **own).fit()
    make(tmp_path / "parts", **own, steps=3).fit()
    resume(tmp_path / "parts", **own).fit()
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    rates = [line["lr"] for line in read_lines(tmp_path / "whole")]
    assert scheduler is None or len(set(rates)) > 1


def test_their_steps_written_out(tmp_path):
    trainer = make(tmp_path, optimizer=sgd, scheduler=one_cycle, grad_clip=0.0, steps=2)
    weight = torch.nn.Parameter(trainer.parameters[0].detach().clone())
    optimizer = sgd([weight])
    scheduler = one_cycle(optimizer)
    for _ in range(2):
        rate = optimizer.param_groups[0]["lr"]
        trainer._train_step()
        weight.grad = trainer.parameters[0].grad.clone()
        optimizer.step()
        scheduler.step()
        assert torch.equal(weight, trainer.parameters[0]) and trainer.update.lr == rate


def test_an_object_is_taken_as_it_is(tmp_path):
    model = make_model()
    optimizer = sgd(model.parameters())
    scheduler = steps_down(optimizer)
    trainer = make(tmp_path, model, optimizer=optimizer, scheduler=scheduler, steps=2)
    before = model.out[2].weight.detach().clone()
    trainer.fit()
    assert trainer.optimizer is optimizer and scheduler.last_epoch == 2
    assert not torch.equal(model.out[2].weight, before)


def test_the_settings_schedule_moves_the_rate_of_every_group(tmp_path):
    def groups(parameters):
        return torch.optim.SGD(
            [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.5}], lr=0.1
        )

    trainer = make(tmp_path, optimizer=groups, warmup=4)
    trainer._train_step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1 / 4, 0.5 / 4]


class Hoarding(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["seen"] = object()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer= is a str"),
        ({"optimizer": lambda parameters: 1}, "optimizer= is or makes a int"),
        ({"optimizer": sgd([torch.nn.Parameter(torch.ones(1))])}, "1 of the optimizer's 1 param"),
        ({"optimizer": torch.optim.LBFGS}, "evaluates the loss several times"),
        ({"scheduler": one_cycle, "warmup": 2}, "warmup is 2, and a scheduler is given"),
        ({"scheduler": lambda _: steps_down(sgd(make_model().parameters()))}, "another optimizer"),
        ({"scheduler": lambda optimizer: optimizer}, "scheduler= is or makes a AdamW"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, own, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **own)


def test_a_state_that_no_checkpoint_can_hold_is_said_at_the_first_step(tmp_path):
    trainer = make(tmp_path, optimizer=functools.partial(Hoarding, lr=0.1))
    with pytest.raises(InputError, match="the state of Hoarding holds a object"):
        trainer.fit()


def test_a_run_is_resumed_with_what_it_was_started_with(tmp_path):
    make(tmp_path, optimizer=sgd, steps=1).fit()
    with pytest.raises(InputError, match="the run's optimizer was torch.optim.sgd.SGD, and now it"):
        resume(tmp_path)
    with pytest.raises(InputError, match="lr is 0.5 but the run was started with 0.0001"):
        resume(tmp_path, optimizer=sgd, changes={"lr": 0.5})
    with pytest.raises(InputError, match="has 1 groups of parameters, the checkpoint's had 2"):
        make(tmp_path / "two", optimizer=two_groups, steps=1).fit()
        resume(tmp_path / "two", optimizer=torch.optim.AdamW)


# Callbacks


def test_callbacks_are_told_of_every_step(tmp_path):
    told = []
    hear = [lambda trainer, values: told.append((trainer.step, values))]
    make(tmp_path, callbacks=hear, steps=5, log_every=2).fit()
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert [bool(values) for _, values in told] == [False, True, False, True, True]
    logged = {line["step"]: line["loss"] for line in read_lines(tmp_path)}
    assert {step: values["loss"] for step, values in told if values} == logged


def test_what_a_callback_raises_costs_no_step(tmp_path):
    def fail(trainer, values):
        if trainer.step == 3:
            raise InputError("that is enough")

    with pytest.raises(InputError, match="that is enough; step 3 is saved"):
        make(tmp_path / "run", callbacks=[fail]).fit()
    make(tmp_path / "whole").fit()
    resume(tmp_path / "run").fit()
    assert_same_end(tmp_path / "run", tmp_path / "whole")


# float16


def start_scale(trainer, scale, growth_interval=2):
    state = trainer.update.scaler.state_dict()
    state |= {"scale": scale, "growth_interval": growth_interval}
    trainer.update.scaler.load_state_dict(state)


@pytest.mark.seconds
@pytest.mark.parametrize("optimizer", [None, sgd])
def test_an_overflowing_step_changes_nothing_and_ends_no_run(tmp_path, optimizer):
    trainer = make(tmp_path, dtype="float16", optimizer=optimizer, steps=4, microbatch=2)
    start_scale(trainer, 2.0**30)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer._train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    start_scale(trainer, 2.0**10)
    trainer.fit()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert [line["loss_scale"] for line in read_lines(tmp_path)] == [2**10, 2**10, 2**11, 2**11]
    assert [line.get("skipped_steps") for line in read_lines(tmp_path)] == [1, None, None, None]


@pytest.mark.seconds
def test_a_run_in_float16_goes_on_bit_for_bit(tmp_path):
    for name, steps in (("whole", 4), ("parts", 2)):
        trainer = make(tmp_path / name, dtype="float16", steps=steps, warmup=3, batch_size=2)
        start_scale(trainer, 2.0**17, growth_interval=1)
        trainer.fit()
    resume(tmp_path / "parts", steps=4).fit()
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    scales = [line["loss_scale"] for line in read_lines(tmp_path / "whole")]
    assert len(set(scales)) > 1


def test_a_loss_that_is_not_finite_ends_a_run_in_float16(tmp_path):
    trainer = make(tmp_path, dtype="float16")
    with torch.no_grad():
        trainer.parameters[0].fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer.fit()
