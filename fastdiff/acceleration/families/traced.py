"""Modules of unknown classes, by torch.fx: a GroupNorm, perhaps FiLM, and SiLU in their forward.

A trace keeps what a forward did once, so only forwards that can do nothing else are taken: straight
code without branches that names submodules, parameters and a few tensor operations.
"""

import copy
import dis
import inspect
import operator
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdiff.acceleration.calls import PLAIN
from fastdiff.acceleration.fused_class import Fusion, Refused, Trials
from fastdiff.acceleration.pieces import is_group_norm, is_normed, is_silu
from fastdiff.errors import first_line
from fastdiff.models.blocks import apply_norm

MULTIPLY = (operator.mul, torch.mul)
ADD = (operator.add, torch.add)
# What a forward may name beside its module's own parts.
OPERATIONS = frozenset(
    "torch F nn functional silu relu gelu tanh sigmoid softmax exp cat chunk split add mul sub div "
    "mean sum view reshape flatten unflatten permute transpose unsqueeze squeeze expand repeat "
    "contiguous size shape interpolate pad matmul bmm".split()
)


CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict


def fusions(module: nn.Module) -> Iterator[tuple[Fusion, Trials]]:
    """What fuses a module that owns a GroupNorm: its own forward, so there is nothing to try."""
    if any(map(is_group_norm, module.children())) and not isinstance(module, CONTAINERS):
        yield _fusion(module), ()


def _fusion(module: nn.Module) -> Fusion:
    try:
        return _traced(module)
    except Refused as refused:
        raise Refused(f"{refused}; its norms are fused one by one") from None


def _traced(module: nn.Module) -> Fusion:
    _check_straight(module)
    graph = _trace(module)
    bypassed = tuple(name for node in list(graph.nodes) for name in _fuse(module, graph, node))
    if not bypassed:
        raise Refused("no SiLU follows its norm")
    forward: Callable[..., Any] = type(fx.GraphModule(module, graph)).forward
    return Fusion("norm and activation in one (traced)", forward, bypassed)


def _check_straight(module: nn.Module) -> None:
    forward: Any = type(module).forward
    code: Any = getattr(forward, "__code__", None)
    if "forward" in module.__dict__ or not isinstance(code, CodeType):
        raise Refused("its forward is no plain method")
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise Refused("its forward takes any number of arguments, or some by keyword alone")
    defaults = [p.default for p in parameters if p.default is not p.empty]
    if not all(default is None or type(default) in PLAIN for default in defaults):
        raise Refused("its forward has optional arguments")
    nested = any(isinstance(constant, CodeType) for constant in code.co_consts)
    steps = [f"{step.opname} {step.argrepr}" for step in dis.Bytecode(code)]
    branches = any("JUMP" in step or "FOR_ITER" in step for step in steps)
    in_place = any(step.startswith("BINARY_OP") and step.endswith("=") for step in steps)
    compares = any(step.startswith("IS_OP") for step in steps)  # an argument with None
    if nested or branches or in_place or compares or code.co_freevars:
        raise Refused("its forward is not straight code")
    own = {*module._modules, *module._parameters, *module._buffers}
    strange = sorted(set(code.co_names) - own - OPERATIONS)
    if strange:
        raise Refused(f"its forward uses {strange[0]!r}")


class _Tracer(fx.Tracer):
    """Into a module's own forward, and no further."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(copy.copy(module))
    except Exception as error:  # whatever a forward does with what is no tensor
        raise Refused(f"torch.fx cannot trace it ({first_line(error)})") from None


def _fuse(module: nn.Module, graph: fx.Graph, norm: fx.Node) -> tuple[str, ...]:
    """Fuse what begins with this node, if anything: the names of the modules it then bypasses."""
    if norm.op != "call_module" or not is_group_norm(module.get_submodule(str(norm.target))):
        return ()
    chain, scale, shift = _film(norm)
    activation = _only_user(chain[-1])
    if activation is None or not _applies_silu(module, activation):
        return ()
    with graph.inserting_before(activation):
        layer = graph.get_attr(str(norm.target))
        fused = graph.call_function(norm_film_silu, (norm.args[0], layer, scale, shift))
    activation.replace_all_uses_with(fused)
    for node in (activation, *reversed(chain)):
        graph.erase_node(node)
    called = (norm, activation) if activation.op == "call_module" else (norm,)
    return tuple(str(node.target) for node in called)


def _film(norm: fx.Node) -> tuple[list[fx.Node], Any, Any]:
    """(its nodes, scale, shift) of norm·(1 + scale) + shift; ([norm], None, None) without."""
    product = _only_user(norm)
    total = None if product is None else _only_user(product)
    if product is None or total is None:
        return [norm], None, None
    factor, shift = _other(product, MULTIPLY, norm), _other(total, ADD, product)
    scale = None if factor is None else _other(factor, ADD, 1)
    if not isinstance(scale, fx.Node) or not isinstance(shift, fx.Node):
        return [norm], None, None
    return [norm, product, total], scale, shift


def _other(node: Any, functions: tuple[Any, ...], one: Any) -> Any:
    """The other operand of a binary ``node`` of which ``one`` is an operand; None otherwise."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in functions:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if left is one or (not isinstance(left, fx.Node) and left == one):
        return right
    return left if right is one or (not isinstance(right, fx.Node) and right == one) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _applies_silu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_silu(module.get_submodule(str(node.target)))
    copies = not node.kwargs.get("inplace")
    return node.op == "call_function" and node.target is F.silu and copies


def norm_film_silu(
    x: Tensor, norm: nn.Module, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """A norm with what follows it. FiLM of one value for each sample and channel is fused, FiLM of
    other shapes computed beside it."""
    if scale is None or shift is None:
        return apply_norm(norm, x) if is_normed(x) else F.silu(norm(x))
    if not is_normed(x) or not isinstance(scale, Tensor) or not isinstance(shift, Tensor):
        return F.silu(norm(x) * (1 + scale) + shift)
    rows = (*x.shape[:2], *[1] * (x.dim() - 2))
    if scale.shape == shift.shape == rows:
        scale, shift = (film.flatten(1).to(x.dtype) for film in (scale, shift))
        return apply_norm(norm, x, scale=scale, shift=shift)
    return F.silu(apply_norm(norm, x, activation=None) * (1 + scale) + shift)
