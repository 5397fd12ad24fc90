"""An installed wheel, tried: the native library loads, and each operation answers as its reference.

    python .ci/check_wheel.py                      the fastdiff that this Python imports
    python .ci/check_wheel.py --torch 2.11.0 --torch 2.13.0 fastdiff-*.whl
                                                   each, in a new environment for every torch

cibuildwheel runs the first form in every wheel's environment. The second shows that one wheel
serves several versions of torch: it needs a package index, and is for the nights.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    # One at a time: a list would take the wheel for a version too.
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION")
    parser.add_argument("wheels", nargs="*", type=Path, metavar="wheel")
    args = parser.parse_args()
    if not args.torch:
        check()
        return 0
    if not args.wheels:
        parser.error("--torch needs a wheel")
    wheels = [wheel.resolve() for wheel in args.wheels]
    failed = [version for version in args.torch if not serve(wheels, version)]
    print(f"failed with torch {', '.join(failed)}" if failed else "one wheel serves them all")
    return 1 if failed else 0


def serve(wheels: list[Path], version: str) -> bool:
    """Whether each of them does, one after another: that torch is fetched and installed once."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "--quiet"]
        for wheel in wheels:
            install = [*pip, "install", "--no-compile", f"torch=={version}", wheel]
            uninstall = [*pip, "uninstall", "--yes", "fastdiff"]
            for command in (install, [python, Path(__file__).resolve()], uninstall):
                if subprocess.run(command, cwd=folder).returncode != 0:
                    return False
    return True


def check() -> None:
    import torch

    import fastdiff
    from fastdiff.ops import native

    build = native.build_info()
    print(f"fastdiff {fastdiff.__version__} in {Path(fastdiff.__file__).parent}")
    print(f"torch {torch.__version__}; built by {build['compiler']} for {', '.join(build['isas'])}")
    for name, dtype, call in calls(torch, fastdiff):
        with fastdiff.backend("reference"):
            expected = call()
        with fastdiff.backend("native"):
            found = call()
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
        pairs = zip(flat(torch, found), flat(torch, expected), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        print(f"  {name} {str(dtype).removeprefix('torch.')}: as the reference")
    sampled(torch, fastdiff)


def calls(torch, fastdiff):
    """(operation, dtype, call)"""
    ops = fastdiff.ops
    torch.manual_seed(0)
    weight, bias, scale, shift = torch.randn(64), torch.randn(64), *torch.randn(2, 2, 64)
    t, signal, noise = torch.tensor([3, 998]), torch.rand(1000), torch.rand(1000)

    def norm(x):
        x = x.clone().requires_grad_()
        y = ops.group_norm_silu(x, 32, weight, bias, scale=scale, shift=shift)
        y.float().square().sum().backward()
        return y.detach(), x.grad

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
        qkv = torch.randn(2, 3 * 64, 33).to(dtype)
        yield "group_norm_silu", dtype, functools.partial(norm, x)
        yield "attention", dtype, functools.partial(ops.attention, qkv, 4)
        yield "q_sample", dtype, functools.partial(ops.q_sample, x, t, signal, noise, seed=7)


def flat(torch, values):
    return [values] if isinstance(values, torch.Tensor) else list(values)


def sampled(torch, fastdiff) -> None:
    model = fastdiff.UNet.from_preset("digits").eval()
    process = fastdiff.create_diffusion(steps=1000, learn_sigma=True)
    images = fastdiff.Sampler(model, process, steps=3).sample((2, 1, 8, 8), seed=0)
    assert images.shape == (2, 1, 8, 8) and bool(images.isfinite().all())

    def norm(x):
        return fastdiff.ops.group_norm_silu(x, 4, None, None) + 1

    x = torch.randn(1, 8, 4, 4)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), norm(x))
    print("  Sampler and torch.compile: fine")


if __name__ == "__main__":
    sys.exit(main())
