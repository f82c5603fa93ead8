"""A model's part: the model's own ``forward`` with holes where other stages hold the modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from diffpipe.models.base import StageSpec


def expand(module: nn.Module, paths: Iterable[str]) -> list[str]:
    """The paths with each ``list.*`` replaced by one path per entry of that list."""
    found: list[str] = []
    for path in paths:
        if path.endswith(".*"):
            entries = module.get_submodule(path[:-2])
            found += [f"{path[:-2]}.{i}" for i, _ in enumerate(entries.children())]
        else:
            found.append(path)
    return found


OWN = (dict, OrderedDict, set)  # what a module keeps its tensors, children and hooks in


def duplicate(module: nn.Module, made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The module tree once more, to take apart: the tensors and all plain attributes are shared.

    A deep copy goes through every hook dictionary and config of every layer, which takes many times as long.
    """
    made = {} if made is None else made
    if module not in made:
        made[module] = copy = module.__new__(type(module))
        copy.__dict__ = {k: v.copy() if type(v) in OWN else v for k, v in module.__dict__.items()}
        copy._modules = {name: child if child is None else duplicate(child, made) for name, child in module._modules.items()}
    return made[module]


@dataclass(frozen=True)
class Layout:
    """How the tensors of a payload form the outputs they were taken from.

    Attributes:
        calls: by module path, one tree per call of that module, with the leaves that are no tensors.
        index: for each tensor leaf in order, its place in the payload; a tensor used twice crosses once.
    """

    calls: dict[str, list[tuple[TreeSpec, dict[int, Any]]]]
    index: list[int]


class _Leave(Exception):
    """Ends the forward of a stage that is not the last."""


class _Known(Tensor):
    """A fake tensor whose values are known, for a ``forward`` that takes Python numbers from a mask.

    Sums and lists of it are real; to everything else it is its fake twin.
    """

    twin: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.sum, Tensor.tolist):
            with unset_fake_temporarily(), torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
            return out.as_subclass(cls) if isinstance(out, Tensor) else out
        args, kwargs = tree_map(lambda x: x.twin if isinstance(x, _Known) else x, (args, kwargs))
        return func(*args, **kwargs)


class Fakes:
    """Shapes without memory: copies of modules on fake tensors of the device they would run on.

    Fake rather than meta tensors, since autocast acts on them as on real ones.
    """

    def __init__(self, device: torch.device) -> None:
        # What is copied lies on meta, also while the mode is on.
        self.mode, self.device = FakeTensorMode(allow_non_fake_inputs=True), device
        self.outputs: dict[Any, Any] = {}  # of absent modules, by what decides their shapes

    def tensor(self, like: Tensor) -> Tensor:
        with self.mode:
            fake = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return fake.requires_grad_(like.requires_grad)

    def known(self, values: Tensor) -> Tensor:
        """A fake tensor with these values."""
        known = values.detach().cpu().as_subclass(_Known)
        known.twin = self.tensor(values)
        return known

    def fill(self, module: nn.Module) -> None:
        """Put fake tensors in the place of all parameters and buffers."""
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(self.tensor(p.detach()), requires_grad=p.requires_grad)
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = self.tensor(b)


class _Hole(nn.Module):
    """A module that another stage holds: answers for its attributes, owns no parameter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["absent"] = module
        first = next(module.parameters(), None)
        if first is not None:
            # diffusers asks modules for their dtype through their first parameter or buffer.
            self.register_buffer("dtype_tag", torch.empty(0, dtype=first.dtype), persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["absent"], name)


class _Stub(_Hole):
    """Gives outputs of the right structure and shape, zeros that take no memory."""

    def __init__(self, module: nn.Module, fakes: Fakes) -> None:
        super().__init__(module)
        self.__dict__["fakes"] = fakes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        device = next(x.device for x in leaves if isinstance(x, Tensor))
        if "structure" not in self.__dict__:
            self.__dict__["structure"] = structure_of(self.absent)
        signature = (self.structure, tree, signature_of(leaves), torch.is_autocast_enabled(device.type))
        if signature not in self.fakes.outputs:
            self.fakes.outputs[signature] = self._shapes(leaves, tree)

        def zeros(x: Any) -> Any:
            return torch.zeros((), dtype=x.dtype, device=device).expand(x.shape) if isinstance(x, Tensor) else x

        return tree_map(zeros, self.fakes.outputs[signature])

    def _shapes(self, leaves: list[Any], tree: TreeSpec) -> Any:
        twin = duplicate(self.absent)
        self.fakes.fill(twin)
        with torch.no_grad(), self.fakes.mode:
            fake = [torch.empty(x.shape, dtype=x.dtype, device=self.fakes.device) if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = tree_unflatten(fake, tree)
            out = twin(*args, **kwargs)
        return tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x, out)


class _Port(_Hole):
    """Replays, call by call, what an earlier stage computed in this module's place."""

    def __init__(self, module: nn.Module, replay: Callable[[], Any]) -> None:
        super().__init__(module)
        self.__dict__["replay"] = replay

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replay()


class _Exit(_Hole):
    """Ends the forward: what follows belongs to a later stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Leave


def signature_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What decides the shapes that follow from ``leaves``: shapes and types of tensors, values of the rest."""
    return tuple((tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else repr(x) for x in leaves)


def structure_of(module: nn.Module) -> str:
    """What of a module decides the shapes of its outputs: the blocks of a list mostly have it in common."""
    told: list[str] = []
    for path, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, int | float | str | tuple | None)}
        tensors = [(n, tuple(t.shape), t.dtype) for n, t in [*part._parameters.items(), *part._buffers.items()] if t is not None]
        told.append(f"{path} {type(part)} {plain} {tensors}")
    return "\n".join(told)


class Part(nn.Module):
    """Units ``[start, stop)`` of a model, run by the model's own ``forward``.

    Every parameter keeps its name under ``part.model``. The model passed in is changed: modules that other
    stages hold are replaced by holes. ``repeated`` are the parameters that every part has.

    Args:
        model: the whole model, parameters on meta.
        spec: where it may be cut.
        start, stop: the units held.
        fakes: finds the shapes of what is absent.
    """

    def __init__(self, model: nn.Module, spec: StageSpec, start: int, stop: int, fakes: Fakes) -> None:
        super().__init__()
        units = expand(model, spec.units)
        self.model = model
        self.first, self.last = start == 0, stop == len(units)
        self.units = units[start:stop]
        carry, post, replicate = expand(model, spec.carry), expand(model, spec.post), expand(model, spec.replicate)
        self.arriving = [] if self.first else [units[i] for i in spec.live(start)] + carry
        self.leaving = [] if self.last else [units[i] for i in spec.live(stop)] + carry
        self.received: dict[str, list[Any]] = {}
        self.captured: dict[str, list[Any]] = {}
        before = [] if self.first else _before_units(model, {*units, *post, *carry, *replicate})
        self.repeated = {f"{path}.{name}" for path in replicate for name, _ in model.get_submodule(path).named_parameters()}
        holes: dict[str, _Hole] = {}
        for i, path in enumerate(units):
            if path in self.arriving:
                holes[path] = self._port(path)
            elif i < start:
                holes[path] = _Stub(model.get_submodule(path), fakes)
            elif i >= stop:
                holes[path] = _Exit(model.get_submodule(path))
        if not self.first:
            holes |= {path: self._port(path) for path in carry}
            holes |= {path: _Stub(model.get_submodule(path), fakes) for path in before}
        bare = [name for name, _ in model.named_parameters(recurse=False)]
        for path in post:
            if not self.last and path not in bare:
                holes[path] = _Exit(model.get_submodule(path))
        for path, hole in holes.items():
            model.set_submodule(path, hole)
        for name in bare:
            if name in post and not self.last:
                setattr(model, name, None)
            elif name not in post and not self.first:
                _empty_parameter(model, name, fakes.device)
        for path in self.leaving:
            if path not in self.arriving:
                model.get_submodule(path).register_forward_hook(self._capture(path))

    def _port(self, path: str) -> _Port:
        def replay() -> Any:
            calls = self.received[path]
            return calls.pop(0) if len(calls) > 1 else calls[0]

        return _Port(self.model.get_submodule(path), replay)

    def _capture(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.captured.setdefault(path, []).append(output)

        return hook

    def forward(self, payload: Sequence[Tensor], layout: Layout | None, inputs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Layout | None]:
        """Run the part.

        Args:
            payload: tensors from the stage before, none on the first.
            layout: their structure, None on the first.
            inputs: keyword inputs of the model's forward.

        Returns:
            The payload for the next stage and its layout, or the model's outputs and None on the last.
        """
        self.received = _unpack(payload, layout) if layout is not None else {}
        self.captured = {path: list(calls) for path, calls in self.received.items() if path in self.leaving}
        try:
            outputs = self.model(**inputs, return_dict=False)
        except _Leave:
            sent = _pack({path: self.captured[path] for path in self.leaving})
            return sent
        finally:
            self.received, self.captured = {}, {}
        return tuple(o for o in tree_flatten(outputs)[0] if isinstance(o, Tensor)), None


def joined(parts: Sequence[Part]) -> nn.Module:
    """All that parts of one model hold, in one tree under the model's names, which is not for running; of one part, its model."""
    if len(parts) == 1:
        return parts[0].model
    held = [part.model.get_submodule(unit) for part in parts for unit in part.units]
    tree = duplicate(parts[0].model, {module: module for unit in held for module in unit.modules()})
    for part in parts[1:]:
        for path in [path for path, module in tree.named_modules() if isinstance(module, _Hole)]:
            own = part.model.get_submodule(path)
            if not isinstance(own, _Hole):
                tree.set_submodule(path, own)
        tree._parameters |= {name: p for name, p in part.model._parameters.items() if p is not None}
    return tree


def _before_units(model: nn.Module, others: set[str]) -> list[str]:
    """Outermost modules with parameters that are neither units, carried, replicated nor used after the units."""
    found: list[str] = []

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = prefix + name
            if path in others:
                continue
            if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(other.startswith(path + ".") for other in others):
                walk(path + ".", child)
            elif any(True for _ in child.parameters()):
                found.append(path)

    walk("", model)
    return found


def _empty_parameter(model: nn.Module, name: str, device: torch.device) -> None:
    """Put zeros of the same shape, without memory, in the place of a parameter that another stage holds."""
    old = getattr(model, name)
    delattr(model, name)
    model.register_buffer(name, torch.zeros((), dtype=old.dtype, device=device).expand(old.shape), persistent=False)


def _pack(outputs: dict[str, list[Any]]) -> tuple[tuple[Tensor, ...], Layout]:
    tensors: list[Tensor] = []
    index: list[int] = []
    place: dict[int, int] = {}
    calls: dict[str, list[tuple[TreeSpec, dict[int, Any]]]] = {}
    for path, results in outputs.items():
        calls[path] = []
        for result in results:
            leaves, tree = tree_flatten(result)
            calls[path].append((tree, {i: x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}))
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    if id(leaf) not in place:
                        place[id(leaf)] = len(tensors)
                        tensors.append(leaf)
                    index.append(place[id(leaf)])
    return tuple(tensors), Layout(calls, index)


def _unpack(payload: Sequence[Tensor], layout: Layout) -> dict[str, list[Any]]:
    tensors = iter([payload[i] for i in layout.index])
    received: dict[str, list[Any]] = {}
    for path, calls in layout.calls.items():
        received[path] = []
        for tree, constants in calls:
            leaves = [constants[i] if i in constants else next(tensors) for i in range(tree.num_leaves)]
            received[path].append(tree_unflatten(leaves, tree))
    return received


@dataclass(frozen=True, eq=False)
class Border:
    """What crosses from one stage to the next, or leaves the last: tensors on meta, and their structure.

    Attributes:
        ragged: for each tensor the dim that is as long as the longest caption makes it, None where none is; the
            tensors here have it at its longest.
    """

    tensors: tuple[Tensor, ...]
    layout: Layout | None
    ragged: tuple[int | None, ...]


NOTHING = Border((), None, ())  # before the first part and behind the last


class Probe:
    """Finds what crosses borders for given inputs, from one run of the parts before them on fake tensors.

    Args:
        parts: the model's first parts in order, filled by ``Fakes.fill``.
        fakes: the mode that the parts' tensors belong to.
        precision: makes the context the real parts run in (autocast).
        lengths: as in the model's ``StageSpec``.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        fakes: Fakes,
        precision: Callable[[], AbstractContextManager[Any]],
        lengths: str | None = None,
    ) -> None:
        self.parts, self.fakes, self.precision, self.lengths = parts, fakes, precision, lengths
        self.seen: dict[Any, list[Border]] = {}

    def borders(self, inputs: dict[str, Any]) -> list[Border]:
        """What leaves each part; with gradients as autograd is set now."""
        leaves, tree = tree_flatten(inputs)
        signature = (tree, signature_of(leaves), torch.is_grad_enabled())
        if signature not in self.seen:
            self.seen[signature] = self._find(inputs)
        return self.seen[signature]

    def unused(self, inputs: dict[str, Any]) -> int:
        """How much shorter than at their longest the ragged dims of a microbatch are."""
        if self.lengths is None:
            return 0
        mask = inputs[self.lengths]
        return mask.shape[1] - int(mask.sum(1).max())

    def _find(self, inputs: dict[str, Any]) -> list[Border]:
        if self.lengths is None:
            return [Border(tensors, layout, (None,) * len(tensors)) for tensors, layout in self._run(inputs)]
        longest, shorter = (self._run(self._with_length(inputs, less)) for less in (0, 1))
        return [Border(t, layout, _changed(t, other)) for (t, layout), (other, _) in zip(longest, shorter, strict=True)]

    def _with_length(self, inputs: dict[str, Any], less: int) -> dict[str, Any]:
        assert self.lengths is not None
        mask = torch.ones_like(inputs[self.lengths], device="cpu")
        mask[:, mask.shape[1] - less :] = 0
        return {**inputs, self.lengths: self.fakes.known(mask)}

    def _run(self, inputs: dict[str, Any]) -> list[tuple[tuple[Tensor, ...], Layout | None]]:
        fake = tree_map(lambda x: self.fakes.tensor(x) if isinstance(x, Tensor) and not isinstance(x, _Known) else x, inputs)
        borders: list[tuple[tuple[Tensor, ...], Layout | None]] = []
        payload: tuple[Tensor, ...] = ()
        layout: Layout | None = None
        with self.fakes.mode, self.precision():
            for part in self.parts:
                sent, layout = part(payload, layout, fake)
                # A rank's border: new leaves with the same shape, type and need of a gradient.
                payload = tuple(torch.empty(t.shape, dtype=t.dtype, device=self.fakes.device).requires_grad_(t.requires_grad) for t in sent)
                borders.append((payload, layout))
        return [
            (tuple(torch.empty(t.shape, dtype=t.dtype, device="meta").requires_grad_(t.requires_grad) for t in tensors), layout)
            for tensors, layout in borders
        ]


def _changed(longest: Sequence[Tensor], shorter: Sequence[Tensor]) -> tuple[int | None, ...]:
    """For each tensor the dim that is shorter in the other run."""
    return tuple(next((d for d in range(a.ndim) if a.shape[d] != b.shape[d]), None) for a, b in zip(longest, shorter, strict=True))
