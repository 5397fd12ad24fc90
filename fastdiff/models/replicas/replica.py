"""A model that runs in eval mode, and on other weights, beside the one that it is made of.

Of every module that the model leads to a replica has a twin: an object of the same class with the
same attributes, buffers, hooks and parameters. The twin is in eval mode, its children are twins,
and a copy may stand in a parameter's place. So nothing of the model itself is exchanged while the
replica runs: others may train it, call it, and run replicas of their own meanwhile.
"""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.module import register_module_forward_pre_hook

from fastdiff.models.eval_mode import eval_mode
from fastdiff.models.replicas.opening import (
    DEPTH,
    PLAIN,
    is_module,
    modules_in,
    opened,
    parts_of_object,
)
from fastdiff.models.replicas.twin import HOOKS, Twin, same, update

_REGISTERED = frozenset(vars(nn.Module()))
# What these classes run is bound to the modules that they were made for: compiled code, graphs,
# sharded parameters, parameters without a shape yet.
_BOUND = ("torch.jit", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.modules.lazy")


class Escaped(Exception):
    """A forward has reached a module of the model itself, by a way that the replica did not see."""


class _Watch:
    """A hook on all modules of the process: Escaped where this thread runs one of ``originals``."""

    def __init__(self, originals: Collection[int]):
        self.originals, self.thread = originals, threading.get_ident()

    def __call__(self, module: nn.Module, _: Any) -> None:
        if threading.get_ident() == self.thread and id(module) in self.originals:
            raise Escaped


class Replica:
    """``call`` is the replica of ``model``: a module, or anything that calls modules.

    ``refresh()`` follows the model: modules, parameters, attributes and classes that it has now.
    ``left`` are the modules that can only be run as they are; ``run()`` keeps them in eval mode.
    """

    def __init__(self, model: Any):
        self.model = self.call = model
        self.twins: dict[int, Twin] = {}  # by the ids of the originals, which the twins keep alive
        self.originals: dict[int, Any] = {}
        self.made: dict[int, tuple[Any, list[Any], list[Any], Any]] = {}
        self.left: list[nn.Module] = []
        self.escaped = False  # a forward has been caught outside of it: the model runs as it is
        self.trusted = False  # a forward has been watched since something changed
        self.lock = threading.RLock()  # of all below
        self.refresh()

    def refresh(self) -> None:
        with self.lock:
            self._refresh()

    def _refresh(self) -> None:
        self._before, self.twins = self.twins, {}
        self._made_before, self.made = self.made, {}
        self._seen: dict[tuple[int, int, bool], tuple[Any, Any]] = {}
        self._open: set[int] = set()  # what is being replaced
        self.left = []
        # Twins do not serve this model, or somebody's hook on all modules would be given them.
        self.as_it_is = self.escaped or others_watch()
        if self.as_it_is:
            self.call = self.model
            self.left.extend(modules_in(self.model))
        else:
            self.call = self._replaced(self.model, DEPTH, objects=True)
        self.originals = {id(twin.twin): twin.original for twin in self.twins.values()}
        self._before, self._made_before, self._seen = {}, {}, {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``call``, inside of ``run()``. The first time since something changed it is watched, and
        gives way to the model itself where it leads there by another way."""
        if not self.trusted:
            try:
                with self._watched():
                    output = self.call(*args, **kwargs)
                self.trusted = True
                return output
            except Escaped:
                with self.lock:  # and what that forward has written to the twins is forgotten
                    self.escaped = self.trusted = True
                    self.refresh()
        if not self.as_it_is:
            return self.call(*args, **kwargs)
        with eval_mode(self.left):
            return self.model(*args, **kwargs)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        left = {id(part) for module in self.left for part in module.modules()}
        watch = _Watch({id(twin.original) for twin in self.modules()} - left)
        handle = register_module_forward_pre_hook(watch)
        try:
            yield
        finally:
            handle.remove()

    def modules(self) -> list[Twin]:
        return [twin for twin in self.twins.values() if twin.is_module]

    def parts(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every module with what runs in its place: its twin, or itself."""
        for twin in self.modules():
            yield twin.original, twin.twin
        for part in dict.fromkeys(part for module in self.left for part in module.modules()):
            yield part, part

    @contextmanager
    def run(self) -> Iterator[Any]:
        """``call``, which may be called inside. Afterwards the model has what was written to its
        attributes."""
        with eval_mode(self.left):
            try:
                yield self.call
            finally:
                with self.lock:
                    self.write_back()

    # --- Following the model ------------------------------------------------------------------

    def _replaced(self, value: Any, depth: int, objects: bool) -> Any:
        """The value with twins in the place of modules; itself where it leads to none."""
        if type(value) in PLAIN:
            return value
        if is_module(value):
            return self._twin_of(value)
        twin = self.twins.get(id(value))
        if twin is not None:
            return twin.twin
        if id(value) in self._open:  # a module refers back to the object that holds it
            twin = self._start(value) if opened(value) is None else None
            return value if twin is None else twin.twin
        if not depth:
            return value
        key = (id(value), depth, objects)
        if key not in self._seen:
            self._open.add(id(value))
            self._seen[key] = (value, self._replaced_anew(value, depth, objects))
            self._open.discard(id(value))
        return self._seen[key][1]

    def _replaced_anew(self, value: Any, depth: int, objects: bool) -> Any:
        found = opened(value)
        if found is None:
            return self._replaced_object(value, depth) if objects else value
        parts, make = found
        replaced = [self._replaced(part, depth - 1, objects) for part in parts]
        if same(parts, replaced):
            return value
        _, *before, made = self._made_before.get(id(value), (None, [], [], None))
        if not (same(before[0], parts) and same(before[1], replaced)):
            try:
                made = make(replaced)
            except Exception:  # Unfaithful; or a class of one's own that cannot be made like this
                self.left.extend(modules_in(value, depth, objects))
                return value
        # The same one as before as long as its parts are: torch.compile knows it then.
        self.made[id(value)] = (value, parts, replaced, made)
        return made

    def _replaced_object(self, value: Any, depth: int) -> Any:
        held = parts_of_object(value)
        if held is None or PLAIN.issuperset(map(type, held.values())):
            return value
        replaced = [self._replaced(part, depth - 1, False) for part in held.values()]
        if same(list(held.values()), replaced):
            return value
        twin = self.twins.get(id(value)) or self._start(value)
        if twin is None:
            self.left.extend(modules_in(value, depth))
            return value
        twin.set(dict(zip(held, replaced, strict=True)))
        return twin.twin

    def _twin_of(self, module: nn.Module) -> nn.Module:
        twin = self.twins.get(id(module))
        if twin is not None:
            return twin.twin
        twin = self._start(module)
        if twin is None:
            self.left.append(module)
            return module
        held = vars(module)
        fresh = not twin.is_of(held)
        if fresh:
            twin.source = list(held.values())
            twin.deep = [
                name
                for name, value in held.items()
                if type(value) not in PLAIN and name not in _REGISTERED
            ]
        elif twin.is_leaf(held):
            return twin.twin
        others = {name: self._replaced(held[name], DEPTH, objects=True) for name in twin.deep}
        for name in HOOKS:
            hooks = held.get(name)
            others[name] = twin.hooks_of(name, hooks) if hooks else hooks
            twin.hooked |= others[name] is not hooks
        children = {
            name: None if child is None else self._twin_of(child)
            for name, child in held["_modules"].items()
        }
        if fresh or not twin.has(others, children):
            twin.set(held | others, children)
            self.trusted = False
        return twin.twin

    def _start(self, original: Any) -> Twin | None:
        """The twin of before, or a new one; None for what can have none."""
        twin = self._before.get(id(original))
        if twin is None or twin.kind is not type(original):
            if not _can_have_a_twin(original):
                return None
            try:
                twin = twin or Twin(original)
            except TypeError:  # a class that is not made of Python alone
                return None
        elif vars(original).get("_compiled_call_impl") is not None:
            return None
        self.twins[id(original)] = twin
        return twin

    # --- What a forward writes ----------------------------------------------------------------

    def write_back(self) -> None:
        """Give the originals the attributes that their twins have bound anew."""
        for twin in self.twins.values():
            if twin.changed():
                twin.write_back(self._original_of)
            self._write_back_containers(twin)
        for value, _, replaced, made in self.made.values():
            if isinstance(value, list | dict):
                now = list(made) if isinstance(made, list) else [*made, *made.values()]
                if not same(now, replaced):
                    _fill(value, [self._original_of(part) for part in now])
                    replaced[:] = now

    def _write_back_containers(self, twin: Twin) -> None:
        """Put originals in the place of twins that a forward has put into the model's own lists and
        dicts."""
        for name in twin.deep:
            value = vars(twin.original).get(name)
            if type(value) in (list, dict):
                now = list(value) if isinstance(value, list) else [*value, *value.values()]
                if any(id(part) in self.originals for part in now):
                    _fill(value, [self._original_of(part) for part in now])

    def forget(self) -> None:
        """Hold nothing alive that a forward has written."""
        for twin in self.twins.values():
            for name in twin.rebound:
                vars(twin.twin).pop(name, None)
                twin.given.pop(name, None)
            twin.rebound.clear()

    def _original_of(self, value: Any, depth: int = DEPTH) -> Any:
        if id(value) in self.originals:
            return self.originals[id(value)]
        found = opened(value) if depth and type(value) not in PLAIN else None
        if found is None:
            return value
        parts, make = found
        replaced = [self._original_of(part, depth - 1) for part in parts]
        return value if same(parts, replaced) else make(replaced)


def _fill(value: Any, parts: list[Any]) -> None:
    """Make these the items of a list, or the keys and then the values of a dict."""
    if isinstance(value, list):
        value[:] = parts
    else:
        half = len(parts) // 2
        update(value, dict(zip(parts[:half], parts[half:], strict=True)))


@contextmanager
def replica_of(model: Any) -> Iterator[Replica]:
    """The model's replica, to be called inside."""
    replica = Replica(model)
    with replica.run():
        yield replica


@contextmanager
def twin_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module's twin, to try things on that change it; the module itself if it can have none."""
    with Replica(module).run() as twin:
        yield twin


def others_watch() -> bool:
    """Whether there are hooks on all modules beside ours. Private to PyTorch: without the names it
    keeps them under, none are seen."""
    hooks = [
        hook
        for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
        for hook in list(getattr(torch_modules, name, {}).values())
    ]
    return not all(isinstance(hook, _Watch) for hook in hooks)


def _can_have_a_twin(value: Any) -> bool:
    kinds = type(value).__mro__
    return not (
        hasattr(type(value), "__del__")
        or any(str(kind.__module__).startswith(_BOUND) for kind in kinds)
        or any(set(_slots(kind)) - {"__dict__", "__weakref__"} for kind in kinds)
        or vars(value).get("_compiled_call_impl") is not None  # module.compile()
    )


def _slots(kind: type) -> Any:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots
