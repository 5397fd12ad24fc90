"""The codebases whose blocks are recognised, one file each; no list names them.

A file has ``fusions(module)``, a generator of what may fuse a module and of inputs to try it on
(fused_class.Fusion, Trials). Those that know no codebase come last: ``sequential``, GroupNorm in
any model, and ``traced``, which reads a forward.
"""

from importlib import import_module
from pkgutil import iter_modules

_GENERAL = ("sequential", "traced")
_names = sorted({found.name for found in iter_modules(__path__)} - {*_GENERAL})
FAMILIES = [import_module(f"{__name__}.{name}") for name in (*_names, *_GENERAL)]
