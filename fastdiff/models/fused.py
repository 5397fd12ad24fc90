"""What marks a class that ``fastdiff.acceleration`` has put in the place of a module's own."""

import copy
from typing import Any


class Fused:
    """Mixed into every exchanged class.

    What fastdiff itself keeps with an object is its attribute ``_fastdiff``, which pickles lack.
    """

    fastdiff_original: type
    fastdiff_bypassed: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        original: Any = type(self)
        while issubclass(original, Fused):
            original = original.fastdiff_original
        # Of protocol 1, because later ones insist on the object's own class.
        reduced: Any = super().__reduce_ex__(1)
        make, arguments, *rest = reduced
        arguments = tuple(original if a is type(self) else a for a in arguments)
        if rest and isinstance(rest[0], dict):  # its state
            rest[0] = {name: held for name, held in rest[0].items() if name != "_fastdiff"}
        return make, arguments, *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def unfused(kind: Any) -> Any:
    """The class in whose place it is, or itself; also itself where somebody has derived it from a
    fused one."""
    while "fastdiff_original" in vars(kind):
        kind = kind.fastdiff_original
    return kind
