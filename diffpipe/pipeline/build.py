"""Everything that is done to a model before it trains, in order: adapt, cut, shard, read, recompute, schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from diffpipe.models.adapter_files import read_adapter
from diffpipe.models.adapters import attach, base_name, check_given, initialise, is_adapter, matching, resolve_targets
from diffpipe.models.base import DiffusionModel, StageSpec
from diffpipe.models.padding import processors
from diffpipe.pipeline.attention import Attention, packs_here
from diffpipe.pipeline.cut import Fakes, Part, Probe, duplicate, expand
from diffpipe.pipeline.memory.chunks import chunk
from diffpipe.pipeline.memory.layer import MemoryLayer
from diffpipe.pipeline.memory.quantize import FrozenLinear, has_products, quantize
from diffpipe.pipeline.memory.recompute import kind_of
from diffpipe.pipeline.memory.stream import Home
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.shard import Shards, gathered, shard_of
from diffpipe.pipeline.split import Span, split
from diffpipe.pipeline.stage import Stage

LoadProgress = Callable[[int, int], None]  # bytes read, bytes to read


def build(
    config: Config,
    model: DiffusionModel,
    mesh: Mesh,
    progress: LoadProgress = lambda done, total: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> Pipeline:
    """The pipeline of a config, this rank's weights read and on its device.

    Args:
        lap: told the name of each phase when it is over.
    """
    whole, spans = outline(config, model)
    # A step cannot be repeated once weights have moved in its backward pass, on whichever stage.
    attention = Attention(config.model.attention, mesh.device, repeats=not any(mesh.exchange(config.steps_in_backward)))
    padded = processors(whole)
    packs = bool(padded) and packs_here(config.model.attention, getattr(torch, config.model.dtype), mesh.device)
    for processor in padded:
        processor.packs = packs
    precision = precision_of(config, mesh.device)
    fakes = Fakes(mesh.device)
    numbers = range(mesh.stage, len(spans), mesh.stages)
    # What crosses this rank's borders follows from the parts before them; nothing crosses behind the last.
    twins = [Part(duplicate(whole), model.spec, *span, fakes) for span in spans[:-1][: numbers[-1] + 1]]
    for twin in twins:
        fakes.fill(twin)
    probe = Probe(twins, fakes, precision, model.spec.lengths)
    parts = parts_of(whole, model.spec, [spans[n] for n in numbers], fakes)
    for part in parts:
        quantize(part.model, part.units, config.memory, model, has_products(mesh.device), model.weights())
    units = [part.model.get_submodule(unit) for part in parts for unit in part.units]
    for unit in units:
        chunk(unit, config.memory.feed_forward_chunks, config.memory.compile)
    shards = [] if mesh.axes is None else [Shards(part, mesh.axes, config.mesh.reshard) for part in parts]
    memory = MemoryLayer(config.memory, units, mesh.device, config.optimizer)
    lap("build")
    read_weights(parts, model, config, mesh.device, progress, memory.homes.values())
    lap("weights")
    memory.wrap()
    stages = [Stage(part, precision, mesh.device, model.objective) for part in parts]
    return Pipeline(stages, config.mesh.schedule, mesh, probe, memory, attention, shards)


def parts_of(whole: nn.Module, spec: StageSpec, spans: Sequence[Span], fakes: Fakes) -> list[Part]:
    """A part for each span of one rank, which takes the model apart; what every part has they hold once."""
    shared = {module: module for path in expand(whole, spec.replicate) for module in whole.get_submodule(path).modules()}
    models = [duplicate(whole, dict(shared)) for _ in spans[1:]] + [whole]
    return [Part(model, spec, *span, fakes) for model, span in zip(models, spans, strict=True)]


def outline(config: Config, model: DiffusionModel) -> tuple[nn.Module, list[Span]]:
    """The whole model on meta, adapted, in the types it is kept in, with only trained parameters requiring gradients; and its spans.

    Raises:
        ConfigError: when the mesh cuts it where it cannot be cut, or ``memory.recompute_kinds`` names blocks that it has not.
    """
    whole = _adapted_whole(config, model)
    return whole, split(whole, model.spec, config.mesh)


def check_trained(config: Config, model: DiffusionModel) -> None:
    """Find out before anything is encoded that what the config says of trained parameters and kinds of blocks is so, and that the adapter
    to start from fits.

    Raises:
        DiffpipeError: when a pattern or a name finds nothing, or the file is missing or another adapter's.
    """
    whole = _adapted_whole(config, model)
    if config.adapter is not None and config.adapter.init is not None:
        file = config.adapter.init
        if not file.is_file():
            raise ConfigError("no such file", where=f"adapter.init: {file}", expected="one adapter file")
        check_given(whole, config.adapter, read_adapter(file, model))


def _adapted_whole(config: Config, model: DiffusionModel) -> nn.Module:
    whole = model.load_denoiser()
    kinds = {kind_of(whole.get_submodule(unit)) for unit in expand(whole, model.spec.units)}
    if unknown := sorted(config.memory.recompute_kinds.keys() - kinds):
        raise ConfigError(
            f"no block is a {unknown[0]}",
            where=f"memory.recompute_kinds.{unknown[0]}",
            expected=f"the name of a class of this model's blocks: {', '.join(sorted(kinds))}",
            fix="correct the name, or leave it out",
        )
    if config.adapter is not None:
        ranks = resolve_targets(model, whole, config.adapter)
        attach(whole, ranks, config.adapter, getattr(torch, config.model.trainable_dtype))
    else:
        whole.requires_grad_(True)
    _freeze(whole, config)
    _set_types(whole, model, config)
    return whole


def precision_of(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context that computes in ``model.dtype``."""
    dtype = getattr(torch, config.model.dtype)
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


def read_weights(
    parts: Sequence[Part], model: DiffusionModel, config: Config, device: torch.device, progress: LoadProgress, homes: Collection[Home] = ()
) -> None:
    """Fill what the parts own, one tensor at a time straight to where it stays, so that the host never holds two.

    Of a tensor that is sharded this rank keeps its shard, so that it never holds all of any two.

    Args:
        homes: of weights that stay in host memory.
    """
    source = model.weights()
    at_home = {id(s.owner._parameters[s.leaf]) for home in homes for s in home.slices}
    named = [(part.model, n, t) for part in parts for n, t in [*part.model.named_parameters(), *part.model.named_buffers()]]
    wanted = [(m, n, t) for m, n, t in named if (t.is_meta or id(t) in at_home) and not is_adapter(n)]
    total = sum(t.nbytes for _, _, t in wanted)
    done = 0
    for module, name, empty in wanted:
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, FrozenLinear) or leaf == "bias":
            values = {leaf: source.read(base_name(name), empty.dtype)}
        elif leaf == "codes":
            values = layer.encoded(source, base_name(f"{owner}.weight"), device)
        else:
            values = {}  # came with the codes
        for part_leaf, value in values.items():
            old = layer._parameters.get(part_leaf)
            if id(old) in at_home:
                assert old is not None
                old.data.copy_(value)
            else:
                _place(layer, part_leaf, value, device)
        done += empty.nbytes
        progress(done, total)
    if config.adapter is not None:
        given = read_adapter(config.adapter.init, model) if config.adapter.init is not None else None
        for module in [part.model for part in parts]:
            initialise(module, config.adapter, config.run.seed, device, given, lambda layer, of=module: _adapted(of, layer).float())
    for owner_module in [module for part in parts for module in part.modules()]:
        for leaf, tensor in [*owner_module._parameters.items(), *owner_module._buffers.items()]:
            if tensor is not None and id(tensor) not in at_home and tensor.device != device:
                _place(owner_module, leaf, tensor, device)


def _adapted(module: nn.Module, layer: str) -> torch.Tensor:
    """The frozen weight that an adapter was wrapped around, as the layer computes with it."""
    wrapper: Any = module.get_submodule(layer)
    base = duplicate(wrapper.base_layer)
    for leaf, p in base._parameters.items():
        base._parameters[leaf] = None if p is None else nn.Parameter(gathered(p.detach()), requires_grad=False)
    return cast(torch.Tensor, base.weight)


def _place(module: nn.Module, leaf: str, value: torch.Tensor, device: torch.device) -> None:
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(shard_of(value.detach(), old, device), requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value.to(device)


def _set_types(module: nn.Module, model: DiffusionModel, config: Config) -> None:
    """Give weights on meta the types they are read in: on them depends what type a module's output has, and so what crosses a border."""
    trainable = getattr(torch, config.model.trainable_dtype)
    for name, parameter in module.named_parameters():
        if not is_adapter(name):
            parameter.data = parameter.data.to(trainable if parameter.requires_grad else model.dtype_of(base_name(name)))


def _freeze(module: nn.Module, config: Config) -> None:
    """Parameters of groups whose rate is 0 do not train.

    Raises:
        ConfigError: when a group finds no parameter that trains, or none is left.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    matching(trained, [group.match for group in config.optimizer.groups], "optimizer.groups", "parameter that trains")
    for name, parameter in module.named_parameters():
        group = next((g for g in config.optimizer.groups if re.search(g.match, name)), None)
        if group is not None and group.lr == 0:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("no parameter is left to train", where="optimizer.groups", fix="give some group a rate above 0")
