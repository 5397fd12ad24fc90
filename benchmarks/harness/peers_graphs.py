"""diffusers' network as a graph in the runtimes that serve one on CPUs: OpenVINO, ONNX Runtime.

Both run the network alone, of one batch, on as many threads as torch; the sampling step around it
stays Python's. A graph is written by a process of its own: the exporters leave hundreds of MB
behind, which are none of the runtime's.

    python -m harness.peers_graphs RUNTIME NAME BATCH PATH

in benchmarks/ is that process. The runtimes are imported where they are used.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import peers

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> output, until the next call


@dataclass(frozen=True)
class Runtime:
    """``packages``: what it and its exporter are imported by. ``write`` makes a file of the network
    for inputs like those given; ``load`` reads it, to compute in one of ``dtypes``."""

    packages: tuple[str, ...]
    file: str
    dtypes: tuple[torch.dtype, ...]
    write: Callable[[nn.Module, tuple[Tensor, Tensor], Path], None]
    load: Callable[[Path, torch.dtype], Network]


def network(runtime: str, name: str, batch: int, dtype: torch.dtype) -> Network:
    """diffusers' network of that name in the runtime. ImportError: it is not installed."""
    require(runtime)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RUNTIMES[runtime].file
        command = [sys.executable, "-m", __name__, runtime, name, str(batch), str(path)]
        benchmarks = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=benchmarks, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{runtime} exports no {name}: {done.stderr.strip()[-500:]}")
        return RUNTIMES[runtime].load(path, dtype)


def require(runtime: str) -> None:
    """ImportError where a package is missing, by its name."""
    for package in RUNTIMES[runtime].packages:
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed here")


def write(runtime: str, name: str, batch: int, path: Path) -> None:
    example = peers.images(name, batch), torch.full((batch,), 500)
    with torch.no_grad():
        RUNTIMES[runtime].write(_Answer(peers.diffusers_network(name)).eval(), example, path)


class _Answer(nn.Module):
    """A network that returns a tensor, as a graph does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t).sample


def _write_openvino(model: nn.Module, example: tuple[Tensor, Tensor], path: Path) -> None:
    import openvino

    graph = openvino.convert_model(model, example_input=example)
    # Of this shape alone, as the other compiled peers are.
    graph.reshape({at: list(x.shape) for at, x in zip(graph.inputs, example, strict=True)})
    openvino.save_model(graph, path, compress_to_fp16=False)  # the default would round the weights


def _load_openvino(path: Path, dtype: torch.dtype) -> Network:
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    # Unpinned: the machine's other programs, and the contenders of a race, move about too.
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,
    }
    graph = openvino.Core().compile_model(path, "CPU", settings)
    taken = graph.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != precision:
        raise RuntimeError(f"OpenVINO computes in {taken} on this CPU, where {precision} was asked")
    request = graph.create_infer_request()

    def call(x: Tensor, t: Tensor) -> Tensor:
        arrays = [x.numpy(), t.numpy()]
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return call


def _write_onnx(model: nn.Module, example: tuple[Tensor, Tensor], path: Path) -> None:
    program = torch.onnx.export(model, example, dynamo=True, input_names=["x", "t"], verbose=False)
    assert program is not None  # None is the other exporter's
    program.save(path)


def _load_onnxruntime(path: Path, dtype: torch.dtype) -> Network:
    import onnxruntime

    assert dtype == torch.float32  # the network's; its CPU kernels have no other
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(x: Tensor, t: Tensor) -> Tensor:
        arrays: Any = {"x": x.numpy(), "t": t.numpy()}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


RUNTIMES = {
    "openvino": Runtime(
        ("diffusers", "openvino"),
        "network.xml",
        (torch.float32, torch.bfloat16),
        _write_openvino,
        _load_openvino,
    ),
    "onnxruntime": Runtime(
        ("diffusers", "onnxruntime", "onnx", "onnxscript"),
        "network.onnx",
        (torch.float32,),
        _write_onnx,
        _load_onnxruntime,
    ),
}


if __name__ == "__main__":
    runtime, name, batch, path = sys.argv[1:]
    write(runtime, name, int(batch), Path(path))
