"""Modules of unknown classes, by torch.fx: a GroupNorm, perhaps FiLM, and SiLU in their forward."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdiff.acceleration.fused_class import Fusion
from fastdiff.acceleration.pieces import is_group_norm, is_silu
from fastdiff.ops.group_norm_silu import group_norm_silu

MULTIPLY = (operator.mul, torch.mul)
ADD = (operator.add, torch.add)
SIMPLE = (bool, int, float, str, type(None), torch.dtype, tuple)


class Untraceable(Exception):
    """Why a module's forward cannot be rewritten."""


def fusion(module: nn.Module) -> Fusion:
    """The fused forward of a module that owns a GroupNorm. Untraceable where there is none."""
    graphs = [_trace(module, training) for training in (False, True)]
    if str(graphs[0].python_code("self").src) != str(graphs[1].python_code("self").src):
        raise Untraceable("its forward depends on the training mode")
    graph = graphs[0]
    bypassed = tuple(name for node in list(graph.nodes) for name in _fuse(module, graph, node))
    if not bypassed:
        raise Untraceable("no SiLU follows its norm")
    rewritten = fx.GraphModule(module, graph)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    forward: Callable[..., Any] = type(rewritten).forward
    # What the trace took for constant.
    unchanged = tuple(
        name
        for name, value in module.__dict__.items()
        if isinstance(value, SIMPLE) and name != "training" and not name.startswith("_")
    )
    return Fusion("norm and activation in one (traced)", forward, bypassed, unchanged)


class _Tracer(fx.Tracer):
    """Into a module's own forward, and no further."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    was = module.training
    module.training = training
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward does with what is no tensor
        raise Untraceable(f"torch.fx cannot trace it ({str(error).splitlines()[0]})") from None
    finally:
        module.training = was
    if any("_tensor_constant" in str(node.target) for node in graph.nodes):
        raise Untraceable("its forward makes tensors of its own, which a trace takes for constant")
    return graph


def _fuse(module: nn.Module, graph: fx.Graph, norm: fx.Node) -> tuple[str, ...]:
    """Fuse what begins with this node, if anything: the names of the modules it then bypasses."""
    if norm.op != "call_module" or not is_group_norm(module.get_submodule(str(norm.target))):
        return ()
    layer: Any = module.get_submodule(str(norm.target))
    last, scale, shift = _film(norm)
    activation = _only_user(last)
    if activation is None or not _applies_silu(module, activation):
        return ()
    with graph.inserting_before(activation):
        weight, bias = (graph.get_attr(f"{norm.target}.{name}") for name in ("weight", "bias"))
        arguments = (norm.args[0], layer.num_groups, weight, bias, layer.eps, scale, shift)
        fused = graph.call_function(norm_film_silu, arguments)
    activation.replace_all_uses_with(fused)
    called = (norm, activation) if activation.op == "call_module" else (norm,)
    return tuple(str(node.target) for node in called)


def _film(norm: fx.Node) -> tuple[fx.Node, Any, Any]:
    """(the last node, scale, shift) of norm·(1 + scale) + shift; (norm, None, None) without."""
    product = _only_user(norm)
    total = None if product is None else _only_user(product)
    if product is None or total is None:
        return norm, None, None
    factor, shift = _other(product, MULTIPLY, norm), _other(total, ADD, product)
    scale = None if factor is None else _other(factor, ADD, 1)
    if not isinstance(scale, fx.Node) or not isinstance(shift, fx.Node):
        return norm, None, None
    return total, scale, shift


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
    return node.op == "call_function" and node.target is F.silu


def norm_film_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """group_norm_silu whose FiLM may be of any shape that broadcasts; one for each sample and
    channel is fused."""
    film: list[Tensor] = []
    for tensor in (scale, shift):
        if tensor is not None and tensor.shape == (*x.shape[:2], *[1] * (x.dim() - 2)):
            film.append(tensor.flatten(1).to(x.dtype))
    if scale is None or shift is None:
        return group_norm_silu(x, num_groups, weight, bias, eps)
    if len(film) == 2:
        return group_norm_silu(x, num_groups, weight, bias, eps, scale=film[0], shift=film[1])
    h = group_norm_silu(x, num_groups, weight, bias, eps, activation=None)
    return F.silu(h * (1 + scale) + shift)
