"""A pytest plugin: tests run on the native library that FASTDIFF_TEST_LIBRARY names.

Its CUDA kernels take CPU tensors (csrc/emulation/emulation.h), in an order of threads that is
another one in each run; ``FASTDIFF_EMULATION_ORDER`` repeats one.
"""

import importlib.util
import os
import sys
import time

import torch  # noqa: F401  before the library, which uses its OpenMP


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fastdiff._native", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastdiff._native"] = module
    spec.loader.exec_module(module)


load(os.environ["FASTDIFF_TEST_LIBRARY"])
ORDER = int(os.environ.get("FASTDIFF_EMULATION_ORDER") or time.time_ns() % 2**32)


def pytest_report_header(config):
    return f"FASTDIFF_EMULATION_ORDER={ORDER} repeats this order of threads"


def pytest_configure(config):
    from fastdiff.ops import native

    assert native.emulates_cuda()
    native.library().set_emulation_order(ORDER)
