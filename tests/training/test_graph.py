"""Training steps as CUDA graphs: the same steps, on a GPU and on a fake of torch.cuda (tests/tools/
fake_cuda.py), whose graphs are the operators' calls repeated on their memory."""

import pytest
import torch
from torch.backends import cudnn

from fake_cuda import faked
from fastdiff.errors import InputError
from fastdiff.models import unet_inputs
from fastdiff.process.edm import EDM
from fastdiff.ranks import Ranks
from fastdiff.training import TrainConfig, Trainer, graph
from on_both import on_both
from training_tools import make_dataset, make_diffusion, make_model, read_lines

# Rates are numbers of float32, in which a graph reads them: the bits are then the same.
SETTINGS = {
    "batch_size": 8,
    "steps": 6,
    "lr": 2.0**-10,
    "lr_schedule": "linear",
    "warmup": 2,
    "weight_decay": 0.01,
    "ema": (0.9, 0.99),
    "label_dropout": 0.2,
    "flip": True,
    "log_every": 3,
    "save_every": 0,
    "tensorboard": False,
}
OF_A_GAUSSIAN = {"timestep_sampler": "loss-second-moment", "microbatch": 4}
OF_EDM = {"offset_noise": 0.1, "grad_clip": 0.0}


@pytest.fixture(autouse=True)
def labels_unseen(monkeypatch):
    """As on a GPU, which nobody waits for to look at them."""
    monkeypatch.setattr(unet_inputs, "_check_labels", lambda *_: None)


def trainer_on(device, run, how, process=None, model=None, callbacks=(), **settings):
    """Dropout, two averages; rates, timesteps, labels and images that differ from step to step."""
    return Trainer(
        make_model(out_channels=2 if process is None else 1) if model is None else model,
        make_diffusion() if process is None else process,
        make_dataset(),
        TrainConfig(**{**SETTINGS, **settings, "graph": how}),
        run,
        device=device,
        progress=False,
        callbacks=callbacks,
    )


def steps_of(trainer, count=4):
    for _ in range(count):
        trainer._train_step()
        for callback in trainer.callbacks:
            callback(trainer, {})
    return trainer


def assert_same_weights(captured, eager):
    """And the same averages, moments and buffers."""
    exact = captured.device.type == "cpu"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(state(captured), state(eager), **tolerance)


def state(trainer):
    averages = [shadow for shadows in trainer.ema.shadows.values() for shadow in shadows]
    moments = [value for _, value in sorted(trainer.update.tensors().items())]
    weights = [p.detach() for p in trainer.parameters]
    return [*weights, *averages, *moments, *trainer.model.buffers()]


@pytest.mark.seconds
@on_both("of_edm", cpu=[(False,), (True,)])
def test_captured_steps_are_the_eager_ones(device, of_edm, tmp_path):
    settings, process = (OF_EDM, EDM(8)) if of_edm else (OF_A_GAUSSIAN, None)
    captured, eager = (
        trainer_on(device.name, tmp_path / how, how, process, **settings) for how in ("on", "off")
    )
    captured.fit()
    eager.fit()
    assert captured.graphs.why == "the step runs as CUDA graphs"
    assert captured.graphs.applied is not None  # AdamW's update too
    assert_same_weights(captured, eager)
    lines = [read_lines(trainer.run_dir) for trainer in (captured, eager)]
    assert len(lines[0]) == 2
    for mine, theirs in zip(*lines, strict=True):
        assert mine == (theirs if device.name == "cpu" else pytest.approx(theirs, rel=1e-3))


@pytest.mark.seconds
@on_both()
def test_a_run_goes_on_with_graphs(device, tmp_path):
    settings = {**OF_A_GAUSSIAN, "lr_schedule": "constant"}  # another would follow the steps
    trainer_on(device.name, tmp_path / "run", "off", steps=2, **settings).fit()
    captured = Trainer.resume(
        tmp_path / "run",
        make_dataset(),
        changes={"steps": 6, "graph": "on"},
        device=device.name,
        progress=False,
    )
    eager = trainer_on(device.name, tmp_path / "eager", "off", **settings)
    assert_same_weights(steps_of(captured), steps_of(eager, 6))


@pytest.mark.seconds
@on_both()
def test_what_callbacks_and_the_network_change_is_seen(device, tmp_path):
    def freeze(trainer, values):
        trainer.model.zero_grad()
        if trainer.step == 3:
            trainer.model.out[2].bias.requires_grad_(False)

    def trained(how):
        trainer = trainer_on(device.name, tmp_path / how, how, callbacks=[freeze])
        trainer.model.seen = torch.nn.BatchNorm2d(1, affine=False, device=device.name)
        trainer.model.register_forward_pre_hook(lambda m, given: (m.seen(given[0]), *given[1:]))
        return steps_of(trainer, 6)

    assert_same_weights(trained("on"), trained("off"))


def looking(model):
    """``model``, which reads a value back from the device."""
    model.register_forward_pre_hook(lambda module, given: float(given[0].mean()) and None)
    return model


@pytest.mark.seconds
@on_both()
def test_a_step_that_cannot_be_captured_runs_eagerly(device, tmp_path):
    captured = trainer_on(device.name, tmp_path / "auto", "auto", model=looking(make_model()))
    with pytest.warns(RuntimeWarning, match="the step runs eagerly: it cannot be captured as a"):
        steps_of(captured, 1)
    eager = trainer_on(device.name, tmp_path / "off", "off", model=looking(make_model()))
    assert_same_weights(steps_of(captured, 2), steps_of(eager, 3))
    assert device.draw(3).isfinite().all()
    assert device.cuda.get_sync_debug_mode() == 0 and not cudnn.benchmark

    asked = trainer_on(device.name, tmp_path / "on", "on", model=looking(make_model()))
    with pytest.raises(InputError, match="graph is 'on', and the step has to run eagerly: it cann"):
        steps_of(asked, 1)
    other = trainer_on(device.name, tmp_path / "other", "on")  # torch can capture as before
    plain = trainer_on(device.name, tmp_path / "plain", "off")
    assert_same_weights(steps_of(other, 3), steps_of(plain, 3))


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("eagerly", "replayed", "words"),
    [
        (0.002, 0.001, "the step runs as CUDA graphs (1 ms for gradients, 2 ms eagerly)"),
        (0.001, 0.002, "the step runs eagerly: measured faster than as CUDA graphs (2 ms for"),
    ],
)
def test_auto_takes_what_is_faster(monkeypatch, tmp_path, eagerly, replayed, words):
    times = iter([eagerly, replayed])
    found = lambda call, device: (call(), next(times))[1]  # noqa: E731
    monkeypatch.setattr(graph, "seconds_a_call", found)
    with faked() as cuda:
        chosen = steps_of(trainer_on("cpu", tmp_path / "auto", "auto"), 3)
        assert len(cuda.graphs) == (2 if replayed < eagerly else 1)
    assert chosen.graphs.why.startswith(words)
    assert_same_weights(chosen, steps_of(trainer_on("cpu", tmp_path / "off", "off"), 3))


@pytest.mark.parametrize(
    ("settings", "ranks", "words"),
    [
        ({"dtype": "float16"}, Ranks(), "in float16 it is left out where gradients overflow"),
        ({"self_condition": "x0"}, Ranks(), "with self_condition it has one or two passes"),
        ({}, Ranks(1, 2, group=object()), "it is taken by 2 processes together"),
    ],
)
def test_steps_that_are_no_graphs(settings, ranks, words):
    with faked():
        assert graph.obstacle(TrainConfig(**settings), torch.device("cpu"), ranks).startswith(words)


def test_graphs_that_cannot_be_are_one_line(tmp_path):
    words = "graph is 'on', and the step has to run eagerly: CUDA graphs need a CUDA device, and it"
    with pytest.raises(InputError, match=words):
        trainer_on("cpu", tmp_path / "run", "on")
    assert trainer_on("cpu", tmp_path / "run", "auto").graphs.eager
