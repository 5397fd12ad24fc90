"""The native CPU code under AddressSanitizer and UBSan, every operation and instruction set."""

import pytest

from fastdiff.ops import native
from paths import TOOLS

CHECK = str(TOOLS / "sanitizer_check.py")


def check(sanitized, extent, isas):
    done = sanitized.run(CHECK, extent)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    for isa in isas:
        for threads in (1, 3):
            assert f"ran group_norm_silu {isa} {threads}" in done.stdout


@pytest.mark.long
def test_no_operation_leaves_its_memory(sanitized):
    check(sanitized, "complete", native.library().supported_isas())


@pytest.mark.seconds
def test_no_operation_leaves_its_memory_on_few_shapes(sanitized):
    check(sanitized, "short", ["baseline"])


@pytest.mark.seconds
def test_the_sanitizer_is_awake(sanitized):
    done = sanitized.run(CHECK, "overflow")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
