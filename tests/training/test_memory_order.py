"""AdamW on the CPU takes its step on contiguous views, and changes nothing else."""

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.data import ArrayDataset
from fastdiff.training import TrainConfig, Trainer
from fastdiff.training.memory_order import memory_order


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, (3, 1))]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def with_gradients(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def facts(model, optimizer):
    moments = [optimizer.state[p].values() for p in model.parameters()]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [value for values in moments for value in values]
    return [(value.shape, value.stride()) for value in tensors]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_gives_the_same_bits_and_layouts(fused):
    models = network(), network()
    plain, ordered = (torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused) for m in models)
    for step in range(3):
        for model in models:
            with_gradients(model, step)
        plain.step()
        memory = [p.data_ptr() for p in models[1].parameters()]
        with memory_order(ordered):
            assert all(p.is_contiguous() for p in models[1].parameters())
            ordered.step()
        assert [p.data_ptr() for p in models[1].parameters()] == memory
        assert facts(models[1], ordered) == facts(models[0], plain)
        for one, other in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(one, other)


def test_a_step_that_fails_leaves_shapes_as_they_were():
    model = with_gradients(network(), 0)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [(p.shape, p.stride(), p.grad.shape, p.grad.stride()) for p in model.parameters()]
    with pytest.raises(MemoryError), memory_order(optimizer):
        raise MemoryError
    assert before == [
        (p.shape, p.stride(), p.grad.shape, p.grad.stride()) for p in model.parameters()
    ]


def test_what_has_no_order_in_common_is_left_alone():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    unlike, without = nn.Parameter(weight), nn.Parameter(weight.clone())
    unlike.grad = torch.randn(4, 3, 3, 3)
    with memory_order(torch.optim.SGD([unlike, without], lr=0.1)):
        assert unlike.shape == without.shape == weight.shape
        assert not unlike.is_contiguous() and unlike.grad.is_contiguous()


def test_the_trainers_own_step_copies_no_gradient(tmp_path, monkeypatch):
    model = fastdiff.UNet.from_preset("digits")
    assert not all(p.is_contiguous() for p in model.parameters())
    data = ArrayDataset(torch.zeros(8, 8, 8, 1, dtype=torch.uint8).numpy())
    config = TrainConfig(batch_size=4, tensorboard=False)
    diffusion = fastdiff.create_diffusion(steps=100, learn_sigma=True)
    trainer = Trainer(model, diffusion, data, config, tmp_path, device="cpu", progress=False)
    contiguous = []
    take = trainer.optimizer.step

    def step(*args, **kwargs):
        contiguous.extend(p.grad.is_contiguous() for p in trainer.parameters)
        return take(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    trainer._train_step()
    assert contiguous and all(contiguous)
