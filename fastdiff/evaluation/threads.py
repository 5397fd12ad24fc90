"""One thread where more would only wait for each other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Run the block on one CPU thread, if ``wanted``, and restore torch's setting.

    For work of many operations of microseconds: a second thread gains nothing there, and on busy
    cores the two wait for each other (measured on two busy cores with 8x8 images: 14 times the
    CPU time). The result then does not depend on the number of cores either. The number is the
    calling thread's; of MKL, while this runs, the whole process's.
    """
    threads = torch.get_num_threads()
    try:
        if wanted:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
