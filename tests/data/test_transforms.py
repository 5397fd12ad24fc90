"""torch.func over the fused operations: gradients of batches and batches of gradients."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import fastdiff
from fastdiff import GaussianDiffusion, StepTable, get_named_beta_schedule, ops
from fastdiff.errors import InputError

TABLE = StepTable.from_process(GaussianDiffusion(get_named_beta_schedule("cosine", 8)))
SIGNAL, SIGMA = torch.linspace(1, 0.1, 8), torch.linspace(0.1, 1, 8)
T = torch.tensor([1, 6])
NOISE = torch.linspace(-1, 1, 48).view(2, 6, 4)

OPERATIONS = {
    "q_sample": lambda x: ops.q_sample(x, T, SIGNAL, SIGMA, noise=NOISE)[0],
    "posterior_step": lambda x: ops.posterior_step(x, x.sin(), TABLE, 3, noise=NOISE)[0],
    "rms_norm_silu": lambda x: ops.rms_norm_silu(x, torch.linspace(0.5, 2, 6)),
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 2, None, None),
    "attention": lambda x: ops.attention(x, 1),
}


def transformed(operation):
    torch.manual_seed(0)
    x, batch = torch.randn(2, 6, 4), torch.randn(3, 2, 6, 4)

    def loss(x):
        return operation(x).sin().sum()

    yield "grad", grad(loss)(x)
    yield "vmap", vmap(operation)(batch)
    yield "grad of vmap", grad(lambda batch: vmap(loss)(batch).sum())(batch)
    yield "vmap of grad", vmap(grad(loss))(batch)
    yield "grad of grad", grad(lambda x: grad(loss)(x).sin().sum())(x)
    yield "jvp", jvp(operation, (x,), (torch.ones_like(x),))[1]


@pytest.mark.seconds
@pytest.mark.parametrize("name", OPERATIONS)
def test_transforms_give_what_the_reference_gives(name):
    actual = dict(transformed(OPERATIONS[name]))
    with fastdiff.backend("reference"):
        expected = dict(transformed(OPERATIONS[name]))
    for transform, value in expected.items():
        torch.testing.assert_close(actual[transform], value, msg=lambda m, t=transform: f"{t}: {m}")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("transform", "shape"), [(grad, (2, 6, 4)), (vmap, (3, 2, 6, 4))])
def test_a_named_kernel_under_a_transform_is_refused(transform, shape, name):
    with fastdiff.backend("native"):
        with pytest.raises(InputError, match=f"{name}: .*only 'reference' serves torch.func"):
            transform(OPERATIONS[name])(torch.randn(shape))
