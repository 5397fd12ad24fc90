"""Sampling methods: each a file here that registers what it writes into the rows of a step table.

A method is added by its file alone: ``Sampler(method=…)``, ``fastdiff sample --method``, the
benchmarks and the tests of all methods find it in ``registry.METHODS``.
"""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
