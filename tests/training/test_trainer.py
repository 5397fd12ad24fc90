"""The training step and what surrounds it, against the same arithmetic written out."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.data import BatchStream
from fastdiff.data.words import TIMESTEPS, uniform
from fastdiff.images import to_float
from fastdiff.ops.counters import training_step
from fastdiff.ops.normal import normal
from fastdiff.training import TrainConfig, Trainer
from fastdiff.training.config import learning_rate
from fastdiff.training.metrics import IntervalMeter
from training_tools import SETTINGS, make_dataset, make_diffusion, make_model, make_trainer

PLAIN = {"lr_schedule": "constant", "warmup": 0, "label_dropout": 0.0, "flip": False}


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# The step


@pytest.mark.parametrize("ema_warmup", [True, False])
def test_three_steps_written_out(tmp_path, ema_warmup):
    trainer = make_trainer(
        tmp_path,
        model={"dropout": 0.0},
        **PLAIN,
        steps=3,
        timestep_sampler="uniform",
        grad_clip=0.5,
        ema=(0.15, 0.5),
        ema_warmup=ema_warmup,
        seed=5,
    )
    trainer.fit()

    model, diffusion = make_model(dropout=0.0), make_diffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    averages = {"0.15": weights(model), "0.5": weights(model)}
    stream = BatchStream(make_dataset(), 8, seed=5)
    for step in range(3):
        images, labels = next(stream)
        x_start = to_float(images)
        t = torch.from_numpy(uniform(5, step, TIMESTEPS, 8) * 8).long()
        noise = normal(x_start.shape, seed=5, step=training_step(step))
        losses = diffusion.training_losses(model, x_start, t, {"y": labels}, noise=noise)
        optimizer.zero_grad()
        # In the trainer's order of operations: Adam divides by the gradient, so where that is
        # all rounding another order would move weights elsewhere.
        (losses["loss"].sum() / 8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for name, average in averages.items():
            rate = min(float(name), (1 + step) / (10 + step)) if ema_warmup else float(name)
            for a, p in zip(average, model.parameters(), strict=True):
                a.mul_(rate).add_(p.detach(), alpha=1 - rate)

    for mine, theirs in zip(trainer.parameters, model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for rate, average in averages.items():
        for mine, a in zip(trainer.ema.state_dict(rate).values(), average, strict=True):
            torch.testing.assert_close(mine, a, rtol=1e-5, atol=1e-7)


@pytest.mark.seconds
@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_microbatches_average_to_the_full_batch(tmp_path, microbatch):
    gradients, losses = [], []
    for size in (0, microbatch):
        trainer = make_trainer(
            tmp_path / str(size), model={"dropout": 0.0}, microbatch=size, steps=1, grad_clip=0.0
        )
        trainer.fit()
        gradients.append([p.grad for p in trainer.parameters])
        losses.append(json.loads((trainer.run_dir / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Convolutions of a part may be PyTorch's where those of the whole batch are the library's.
    scale = max(float(g.abs().max()) for g in gradients[0])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * scale)


def test_gradients_are_clipped_and_logged_unclipped(tmp_path):
    trainer = make_trainer(tmp_path, steps=1, grad_clip=0.01)
    trainer.fit()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters])
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] > 0.1


@pytest.mark.seconds
def test_training_fits_the_images(tmp_path):
    trainer = make_trainer(tmp_path, steps=120, log_every=20, save_every=0, lr=3e-3, warmup=0)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.8 * lines[0]["mse"]


@pytest.mark.seconds
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_computes_the_same_to_its_own(tmp_path, half):
    norms, losses, seen = [], [], []
    for dtype in ("float32", str(half).removeprefix("torch.")):
        trainer = make_trainer(
            tmp_path / dtype, model={"dropout": 0.0}, dtype=dtype, steps=1, grad_clip=0.0
        )
        trainer.model.middle_block[0].in_layers[2].register_forward_hook(
            lambda module, inputs, output: seen.append(output.dtype)
        )
        trainer.fit()
        line = json.loads((trainer.run_dir / "metrics.jsonl").read_text())
        losses.append(line["loss"])
        norms.append(line["grad_norm"])
        assert all(p.dtype == torch.float32 for p in trainer.parameters)
    assert seen == [torch.float32, half]
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.seconds
def test_labels_are_hidden_at_the_given_rate(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=2000, label_dropout=0.3)
    _, kwargs = trainer.feed.next_batch(trainer.step)
    given_labels = next(BatchStream(make_dataset(), 2000))[1]
    hidden = kwargs["y"] == trainer.model.null_label
    assert abs(hidden.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert torch.equal(kwargs["y"][~hidden], given_labels[~hidden])

    trainer = make_trainer(tmp_path, batch_size=2000, label_dropout=0.0)
    kept = trainer.feed.next_batch(trainer.step)[1]["y"]
    assert torch.equal(kept, given_labels)


def test_a_network_without_classes_gets_no_labels(tmp_path):
    trainer = make_trainer(
        tmp_path, model={"num_classes": None, "null_class": False}, label_dropout=0.0, steps=1
    )
    assert trainer.feed.next_batch(trainer.step)[1] == {}
    assert trainer.fit() == 1


@pytest.mark.seconds
@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_a_step_waits_for_nothing(tmp_path, sampler):
    """On the meta device no tensor has values, so reading one fails: .item(), bool(), nonzero."""
    trainer = Trainer(
        make_model(),
        make_diffusion(),
        make_dataset(),
        TrainConfig(**{**SETTINGS, "timestep_sampler": sampler, "microbatch": 3}),
        tmp_path,
        device="meta",
        progress=False,
    )
    for _ in range(3):
        trainer._train_step()
    assert trainer.step == 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.guard.check("")  # such a reading would have been noticed


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_waits_for_nothing_on_cuda(tmp_path, dtype):
    trainer = Trainer(
        make_model(),
        make_diffusion(),
        make_dataset(),
        TrainConfig(**{**SETTINGS, "dtype": dtype}),
        tmp_path,
        device="cuda",
        progress=False,
    )
    for _ in range(3):  # the first steps allocate
        trainer._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The learning rate


def test_learning_rate_by_hand():
    def rates(**settings):
        config = TrainConfig(steps=10, **settings)
        return [learning_rate(step, config, 1.0) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(lr_schedule="linear") == pytest.approx([1 - s / 10 for s in range(10)])
    assert rates(lr_schedule="cosine")[5] == pytest.approx(0.5)
    assert rates(lr_schedule="linear", warmup=2)[1:3] == [1.0, 1.0]


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 100),
)
def test_learning_rate_rises_then_falls(schedule, warmup, steps):
    config = TrainConfig(lr_schedule=schedule, warmup=warmup, steps=steps)
    rates = [learning_rate(step, config, 2.0) for step in range(steps + 1)]
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert all(a < b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    if schedule != "constant" and warmup < steps:
        assert rates[-1] == pytest.approx(0, abs=1e-12)


# What is measured


@given(
    seed=st.integers(0, 2**31),
    num_timesteps=st.integers(1, 50),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_interval_means(seed, num_timesteps, sizes):
    rng = np.random.default_rng(seed)
    meter = IntervalMeter(num_timesteps, torch.device("cpu"))
    everything = []
    for n in sizes:
        t = rng.integers(0, num_timesteps, n)
        w, loss = rng.uniform(0.1, 3, n), rng.uniform(0, 2, n)
        everything.append((t, w, loss))
        meter.add(
            torch.from_numpy(t),
            torch.from_numpy(w).float(),
            {"loss": torch.from_numpy(loss).float()},
            torch.tensor(float(n)),
        )
    t, w, loss = (np.concatenate(column) for column in zip(*everything, strict=True))
    restored = IntervalMeter(num_timesteps, torch.device("cpu"))
    restored.load_state_dict(meter.state_dict())
    result = meter.summary()
    assert restored.summary() == result
    assert result.pop("grad_norm") == pytest.approx(np.mean(sizes))
    assert result.pop("loss") == pytest.approx(np.mean(w * loss), rel=1e-5)
    for q in range(4):
        inside = [i for i in range(len(t)) if 4 * t[i] // num_timesteps == q]
        if inside:
            expected = np.average(loss[inside], weights=w[inside])
            assert result.pop(f"loss_q{q}") == pytest.approx(expected, rel=1e-4)
        if len(inside) > 1:
            spread = math.sqrt(np.average((loss[inside] - expected) ** 2, weights=w[inside]))
            assert result.pop(f"loss_q{q}_std") == pytest.approx(spread, rel=1e-3, abs=1e-3)
    assert result == {}
    assert meter.summary() == {}  # the interval is over


@pytest.mark.seconds
def test_metrics_file_and_tensorboard_say_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"sample_every": 6, "sample_count": 3, "sample_steps": 3}
    make_trainer(tmp_path, steps=12, tensorboard=True, nll_every=6, nll_images=3, **settings).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert set(lines[1]) == {"step", "bits_per_dim", "bits_per_dim_stderr"}
    assert lines[3]["samples"] == 96 and lines[3]["seconds_left"] == 0
    for line in lines[2:3]:
        assert {"loss", "mse", "vb", "lr", "grad_norm", "steps_per_second"} <= set(line)
        assert line["seconds_left"] == pytest.approx(4 / line["steps_per_second"])
        quartiles = [line[f"loss_q{q}"] for q in range(4)]
        assert min(quartiles) < line["loss"] < max(quartiles)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "loss_q2", "lr", "bits_per_dim"):
        written = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert written == pytest.approx(expected)
    assert [image.step for image in events.Images("samples")] == [6, 12]
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_00000006.png", "step_00000012.png"]
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000


@pytest.mark.seconds
def test_nll_is_that_of_the_slowest_average_on_the_evaluation_images(tmp_path):
    from fastdiff.process.likelihood import summarize_bpd

    other = make_dataset(5)
    other.images = other.images.flip(0).clone()
    settings = {**SETTINGS, "steps": 3, "nll_every": 3, "nll_images": 50, "microbatch": 4}
    trainer = Trainer(
        make_model(),
        make_diffusion(),
        make_dataset(),
        TrainConfig(**settings),
        tmp_path,
        eval_dataset=other,
        device="cpu",
        progress=False,
    )
    trainer.fit()
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    loaded = checkpoint.load(trainer.last_checkpoint, weights="0.99")
    terms = loaded.diffusion.calc_bpd_loop(
        loaded.model, to_float(other.images), model_kwargs={"y": torch.from_numpy(other.labels)}
    )
    summary = summarize_bpd(terms)
    assert logged["bits_per_dim"] == pytest.approx(summary.total, rel=0.05)
    assert trainer.model.training


# What is left behind


@pytest.mark.seconds
def test_checkpoints_describe_themselves_and_old_ones_go(tmp_path):
    trainer = make_trainer(tmp_path, steps=9, save_every=2, keep=2)
    trainer.fit()
    found = list_checkpoints(tmp_path)
    assert [path.name for path in found] == ["step_00000008", "step_00000009"]
    loaded = checkpoint.load(found[-1], weights="model")
    assert loaded.step == 9 and loaded.ema_rates == ["0.9", "0.99"]
    assert loaded.info["image_size"] == [8, 8] and loaded.info["class_names"] == ["c0", "c1", "c2"]
    assert loaded.diffusion.loss_type == "rescaled_mse"
    for mine, theirs in zip(loaded.model.parameters(), trainer.parameters, strict=True):
        assert torch.equal(mine, theirs)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert TrainConfig.from_dict(settings["train"]) == trainer.config
    assert settings["model"] == loaded.model.config


@pytest.mark.seconds
def test_keep_zero_keeps_all(tmp_path):
    make_trainer(tmp_path, steps=4, save_every=1, keep=0).fit()
    assert len(list_checkpoints(tmp_path)) == 4


def test_no_averages_at_all(tmp_path):
    settings = {"sample_every": 2, "sample_count": 2, "sample_steps": 2}
    make_trainer(tmp_path, steps=2, ema=(), **settings).fit()
    assert checkpoint.load(list_checkpoints(tmp_path)[0]).weights == "model"


def test_stray_entries_are_no_checkpoints(tmp_path):
    for name in ("step_00000005", "notes", ".step_00000009.saving-host-1", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000007").write_text("")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000005"]
