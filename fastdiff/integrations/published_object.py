"""Reading a diffusion object of improved-diffusion, guided-diffusion or DiT.

Its attributes say which process it is. Whether it computes what fastdiff would in its place is then
tried: both are run at every timestep on a few numbers, with a network whose answer is known. So a
subclass with another variance, clipping, scaling of timesteps or order of random draws is found by
what it does, whatever its methods are called.
"""

import inspect
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.process.gaussian import GaussianDiffusion

EXPECTED = "a GaussianDiffusion or SpacedDiffusion of improved-diffusion, guided-diffusion or DiT"
# The published DDIM has σ from float32 differences of ᾱ, and so 0.5 % of small ones off.
TOLERANCE = 1e-3


def process_of(diffusion: Any) -> GaussianDiffusion:
    """fastdiff's process with the schedule and the types of a published object."""
    try:
        mean_type = diffusion.model_mean_type.name.lower()
        var_type = diffusion.model_var_type.name.lower()
        loss_type = diffusion.loss_type.name.lower()
        betas = diffusion.betas
    except AttributeError as error:
        raise InputError(
            f"a {type(diffusion).__name__} cannot be accelerated ({error}); expected {EXPECTED}"
        ) from error
    return GaussianDiffusion(
        betas,
        mean_type="x_start" if mean_type == "start_x" else mean_type,
        var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=getattr(diffusion, "rescale_timesteps", False),
        timestep_map=getattr(diffusion, "timestep_map", None),
        original_num_steps=getattr(diffusion, "original_num_steps", None),
    )


def signature_of(diffusion: Any, name: str) -> inspect.Signature:
    """Of a method, as called on the object: the first one along its classes that names its
    arguments (SpacedDiffusion hands some of its own on as *args)."""
    for owner in type(diffusion).__mro__:
        if callable(vars(owner).get(name)):
            _, *parameters = inspect.signature(vars(owner)[name]).parameters.values()
            if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
                return inspect.Signature(parameters)
    raise InputError(f"{name} of a {type(diffusion).__name__} does not name its arguments")


def check_loops(diffusion: Any) -> None:
    """InputError for an object that has a whole loop from elsewhere than the loop's parts: what a
    loop does cannot be compared in a moment."""

    def home(name: str) -> Any:
        owners = (diffusion, *type(diffusion).__mro__)
        return next((owner for owner in owners if name in vars(owner)), None)

    for name, part in (
        ("p_sample_loop", "p_sample_loop_progressive"),
        ("ddim_sample_loop", "ddim_sample_loop_progressive"),
        ("calc_bpd_loop", "q_posterior_mean_variance"),
    ):
        if home(name) not in (None, home(part)):
            raise InputError(
                f"{name} of a {type(diffusion).__name__} is its own, not the published one; "
                f"expected {EXPECTED}"
            )


@torch.no_grad()
def gives_integers(diffusion: Any, process: GaussianDiffusion) -> bool:
    """Whether the object's networks are given integer timesteps.

    Raises InputError unless ``process`` computes, draws and gives to networks what the object does.
    """
    network = _Network(process)
    t = torch.arange(process.num_timesteps, device="cpu")
    x = network.x.expand(len(t), 1, 3)
    clipped = {"model": network, "x": x, "t": t}
    guided = clipped | {"cond_fn": network.cond_fn, "model_kwargs": {}}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("q_mean_variance", {"x_start": x, "t": t}),
        ("q_sample", {"x_start": x, "t": t}),
        ("q_posterior_mean_variance", {"x_start": x, "x_t": -x, "t": t}),
        ("p_mean_variance", clipped),
        ("p_mean_variance", clipped | {"clip_denoised": False, "denoised_fn": torch.sin}),
        ("p_sample", clipped),
        ("p_sample", guided),
        ("ddim_sample", clipped),
        ("ddim_sample", guided | {"eta": 0.5}),
        ("ddim_reverse_sample", clipped),
        ("ddim_reverse_sample", guided),
        # Not t = 0: the likelihood there is a difference of two float32 numbers close to 1.
        ("training_losses", {"model": network, "x_start": x[1:] / 3, "t": t[1:]}),
    ]
    for name in ("p_sample_loop_progressive", "ddim_sample_loop_progressive"):
        calls.append((name, {"model": network, "shape": (2, 1, 3), "device": "cpu"}))
    with torch.random.fork_rng(devices=[]):
        for name, arguments in calls:
            if not hasattr(diffusion, name) or (
                "cond_fn" in arguments and "cond_fn" not in signature_of(diffusion, name).parameters
            ):
                continue
            differs = _difference(network, diffusion, process, name, arguments)
            if differs is not None:
                raise InputError(
                    f"{name} of a {type(diffusion).__name__} differs from the published one in "
                    f"{differs}; expected {EXPECTED}"
                )
    return network.was_given_integers


class _Network:
    """Answers the same numbers everywhere, and notes the timesteps that it and a cond_fn get."""

    def __init__(self, process: GaussianDiffusion):
        self.x = torch.tensor([[1.0, 0.5, -0.7]], device="cpu", dtype=torch.float32)
        output = [[-0.9, -0.25, 0.1], [0.3, -0.8, 0.1]][: 1 + process.learns_variance]
        self.output = torch.tensor(output, device="cpu", dtype=torch.float32)
        self.timesteps: list[Tensor] = []
        self.was_given_integers = False

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.timesteps.append(timesteps)
        return self.output.expand(len(x), *self.output.shape)

    def cond_fn(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.timesteps.append(timesteps)
        return 0.3 * x


def _difference(
    network: _Network,
    diffusion: Any,
    process: GaussianDiffusion,
    name: str,
    arguments: dict[str, Any],
) -> str | None:
    """In what the two differ when they are called, or None."""
    state = torch.get_rng_state()
    try:
        theirs = _parts(getattr(diffusion, name)(**arguments))
    except Exception as error:
        return f"what it raises: {type(error).__name__} ({' '.join(str(error).split())})"
    their_timesteps, their_state = network.timesteps, torch.get_rng_state()
    torch.set_rng_state(state)
    network.timesteps = []
    ours = _parts(getattr(process, name)(**arguments))
    our_timesteps, our_state = network.timesteps, torch.get_rng_state()
    network.timesteps = []
    different = [part for part in theirs if not _agree(theirs[part], ours.get(part))]
    if different:
        return different[0]
    if not torch.equal(their_state, our_state):
        return "what it draws"
    if their_timesteps:
        given, expected = torch.cat(their_timesteps), torch.cat(our_timesteps)
        if given.shape != expected.shape or not torch.allclose(given.float(), expected):
            return "the timesteps it gives the network"
        network.was_given_integers = not given.is_floating_point()
    return None


def _parts(answer: Any) -> dict[str, Any]:
    """What a method answered, by name; of a loop, its first two steps."""
    if isinstance(answer, Tensor):
        return {"its result": answer}
    if isinstance(answer, dict):
        return answer
    if isinstance(answer, tuple):
        return {f"result {i}": part for i, part in enumerate(answer)}
    steps = [dict(step) for step in islice(answer, 2)]
    return {f"{part} of step {i}": step[part] for i, step in enumerate(steps) for part in step}


def _agree(theirs: Any, ours: Any) -> bool:
    if theirs is None:  # DiT's "extra", which only some networks have
        return True
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        return False
    return theirs.shape == ours.shape and torch.allclose(
        theirs.float(), ours.float(), rtol=TOLERANCE, atol=TOLERANCE
    )
