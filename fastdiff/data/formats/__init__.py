"""Where images come from: each file here registers a format, and ``load_dataset`` asks them all."""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
