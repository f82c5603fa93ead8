"""The graphs of a unit's passes that torch.compile would get, found on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from diffpipe.pipeline.cut import Fakes, duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.compiling import on_its_own
from diffpipe.pipeline.memory.footprint import Call
from diffpipe.pipeline.memory.tags import cut


@dataclass(frozen=True)
class Joint:
    """A unit's forward and backward pass in one graph.

    Attributes:
        module: the graph.
        outputs: how many of its results are the forward pass's; the rest are gradients.
        weights: names of the unit's parameters and buffers, its first inputs.
        leaves: how many inputs come next: the tensors that it is called with.
    """

    module: fx.GraphModule
    outputs: int
    weights: tuple[str, ...]
    leaves: int


def trace(unit: nn.Module, call: Call, fakes: Fakes) -> Joint:
    """The graph of a unit, on meta or fake tensors, as AOTAutograd gives it to inductor."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
    from torch._inductor.decomposition import select_decomp_table

    twin = duplicate(unit)
    fakes.fill(twin)
    named = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    tensors = [x for x in call.leaves if isinstance(x, Tensor)]
    with fakes.mode:
        # Laid out row by row, as ``compiled`` gives them to the compiler.
        inputs = [torch.empty(x.size(), dtype=x.dtype).requires_grad_(x.requires_grad) for x in tensors]
    kept: list[tuple[fx.GraphModule, int]] = []

    def run(weights: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        each = iter(given)
        args, kwargs = tree_unflatten([next(each) if isinstance(x, Tensor) else x for x in call.leaves], call.tree)
        out = functional_call(twin, dict(zip(named, weights, strict=True)), args, kwargs)
        return [on_its_own(x) for x in tree_flatten(out)[0] if isinstance(x, Tensor)]

    def keep(joint: fx.GraphModule, given: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        kept.append((_again(joint), num_fwd_outputs))
        return min_cut_rematerialization_partition(joint, given, num_fwd_outputs=num_fwd_outputs, **more)

    traced = aot_function(as_on_cuda(run, fused=False), nop, nop, partition_fn=keep, decompositions=select_decomp_table())
    with fakes.mode, call.precision():
        traced(list(named.values()), inputs)
    return Joint(*kept[0], tuple(named), len(inputs))


def halves(joint: Joint, policy: str) -> tuple[fx.Graph, fx.Graph]:
    """The forward and the backward pass, cut where ``compiling`` cuts them.

    Args:
        policy: as ``memory.recompute``.
    """
    # Weights are there anyway: to save them costs nothing.
    weights = list(range(len(joint.weights)))
    forward, backward = cut(_again(joint.module), policy, num_fwd_outputs=joint.outputs, static_lifetime_input_indices=weights)
    return forward.graph, backward.graph


def first_pass(joint: Joint) -> fx.Graph:
    """The forward pass with nothing that only a backward pass needs."""
    graph = fx.Graph()
    results = tree_leaves(graph.graph_copy(joint.module.graph, {}))
    graph.output(results[: joint.outputs])
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # torch keeps what might draw random numbers
    return graph


def _again(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, to take apart."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)
