"""What a model family is: where its module may be cut, what its latents look like, and what one training example is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, ConfigError, DiffpipeError
from diffpipe.flow import Key
from diffpipe.models.adapter_files import merge_into, read_adapter
from diffpipe.models.blueprint import Blueprint, Component, read_blueprint
from diffpipe.models.encoders import Encoders, diffusers_module, fingerprint, load_components
from diffpipe.models.names import NameMap, Originals, original_names, to_diffusers
from diffpipe.models.weights import Lazy, WeightSource, open_file, open_folder, unscale, within

# Keys that some families have no use for: set there, they are an error rather than ignored.
OPTIONS = frozenset(
    {
        "model.guidance",
        "model.train_text_encoders",
        "objective.prediction",
        "objective.zero_terminal_snr",
        "objective.min_snr",
        "objective.debiased",
    }
)
Targets = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StageSpec:
    """Where a diffusers module may be cut.

    Attributes:
        units: module paths in the order ``forward`` calls them; ``blocks.*`` means every entry of a list.
        carry: modules used before the units whose outputs all stages need: run on the first, sent along.
        replicate: modules used before the units kept on every stage, where sending their output costs more.
        post: modules used only after the last unit.
        live: which units' outputs cross the border before unit ``b``; the default is the unit just before.
        lengths: name of the input, a mask B L, whose longest row decides how long some dims between units are: ``forward`` packs
            captions by their true length, and the mask's own length where every token counts.
    """

    units: tuple[str, ...]
    carry: tuple[str, ...] = ()
    replicate: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    live: Callable[[int], tuple[int, ...]] = field(default=lambda border: (border - 1,))
    lengths: str | None = None


@dataclass(frozen=True)
class Geometry:
    """The shape rules of a family's latents.

    Attributes:
        spatial: pixels per latent cell along height and width.
        temporal: frames per latent frame; valid counts are ``temporal * k + 1``. 1 for image families.
        patch: latent cells per token along height and width.
        fps: frame rate that videos are resampled to; None for image families, which take no video.
    """

    spatial: int
    temporal: int = 1
    patch: int = 2
    fps: float | None = None

    @property
    def multiple(self) -> int:
        """Pixels that a bucket's height and width must be a multiple of."""
        return self.spatial * self.patch

    def frames(self, wanted: int) -> int:
        """The largest valid frame count not above ``wanted``."""
        return (wanted - 1) // self.temporal * self.temporal + 1


class DiffusionModel(ABC):
    """One family. A subclass is one file; nothing in it knows of ranks, stages, caches or memory."""

    name: ClassVar[str]
    title: ClassVar[str]
    spec: ClassVar[StageSpec]
    geometry: ClassVar[Geometry]
    pipeline: ClassVar[str]  # name of the diffusers pipeline class, whose encode_prompt and LoRA loader are used
    denoiser: ClassVar[str]  # name of the diffusers class of the trained module
    component: ClassVar[str] = "transformer"  # the denoiser's name in the pipeline
    originals: ClassVar[Originals | None] = None  # the names of its original checkpoint, without which only diffusers' are known
    prefixes: ClassVar[tuple[str, ...]] = ("model.diffusion_model.", "diffusion_model.")  # what files put before those
    encoding: ClassVar[int] = 1  # raised when the code of encode_media or encode_text changes what it gives
    timesteps: ClassVar[str] = "logit_normal"  # the distribution that null stands for in objective.timesteps
    unused: ClassVar[frozenset[str]] = frozenset()  # components of the pipeline that neither encoding nor training needs
    # Keys of the config that this family gives a meaning to, beside those that all do.
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig) -> None:
        self.config = config
        self.objective = objective.model_copy(update={"timesteps": objective.timesteps or self.timesteps})
        for key in sorted(OPTIONS - self.options):
            section, _, name = key.partition(".")
            given: BaseModel = config if section == "model" else objective
            if getattr(given, name) != type(given).model_fields[name].default:
                raise ConfigError(f"{self.name} has no use for it", where=key, fix="take it out; `diffpipe models` tells who has")

    @cached_property
    def blueprint(self) -> Blueprint:
        """Where the components of the pipeline lie.

        Raises:
            CheckpointError: when ``model.path`` is no pipeline of this family.
        """
        found = read_blueprint(self.config, self.pipeline, f"{self.component}:{self.denoiser}")
        return {
            name: replace(component, config=self.component_config(component)) if component.file and name != self.component else component
            for name, component in found.items()
            if name not in self.unused
        }

    def component_config(self, component: Component) -> dict[str, Any]:
        """The config of a component beside the denoiser that is read from a file, where the file tells of another variant."""
        return component.config

    # -- act one: media and captions to tensors ------------------------------------------------------------------

    def load_encoders(self, device: torch.device) -> Encoders:
        """The VAE and the text encoders on ``device``, in evaluation mode, frozen."""
        components = load_components(self.blueprint, self.component, getattr(torch, self.config.dtype), device)
        pipeline = self.make_pipeline({**components, self.component: None})
        pipeline.set_progress_bar_config(disable=True)
        return Encoders(pipeline, device)

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        """The diffusers pipeline of these components."""
        return getattr(diffusers_module(), self.pipeline)(**components)

    @abstractmethod
    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised latents of ``pixels`` (B C F H W in [-1, 1]; F is 1 for an image), first dim B."""

    @abstractmethod
    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of ``captions`` at the family's fixed text length, first dim len(captions)."""

    def identity(self, role: str) -> str:
        """What the tensors of a role ("media" or "text") depend on besides the sample: the encoders' weights
        and configs by content, the type of computation, and ``encoding``, the version of the code here."""
        return f"{self.name}/{self.encoding}/{self.config.dtype}/{fingerprint(self.blueprint, role, self.component)}"

    # -- act two: tensors to a loss -------------------------------------------------------------------------------

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The config values that the original names and shapes of the denoiser's file tell.

        Args:
            shapes: by original name, of a file that has all of the family's marks.
        """
        return {}

    def denoiser_class(self) -> Any:
        return getattr(diffusers_module(), self.denoiser)

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The config of the diffusers class: its folder's or the shipped one, changed by what a file holds."""
        source = self.blueprint[self.component]
        if source.file is None or self._diffusers_names(self._file_tensors):
            return source.config
        return {**source.config, **self.file_config({name: tuple(t.shape) for name, t in self._file_tensors.items()})}

    def class_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the class is made from, given the released config: another where a part of ``forward`` is done in ``prepare``."""
        return dict(config)

    def load_denoiser(self) -> nn.Module:
        """The whole denoiser with parameters on the meta device and real non-persistent buffers (RoPE tables)."""
        from accelerate import init_empty_weights

        # Some classes draw their tables even on meta; the random state belongs to the training.
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            module = self.denoiser_class().from_config(self.class_config(self.denoiser_config))
        return module.requires_grad_(False).train()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The denoiser's parameters and saved buffers by name."""
        return {name: tuple(t.shape) for name, t in self.load_denoiser().state_dict().items()}

    def weights(self) -> WeightSource:
        """Where the denoiser's tensors lie, under diffusers names, read one by one on demand, LoRAs of ``model.merge`` added.

        Raises:
            CheckpointError: when they are not those of the model that the config says.
        """
        source, shapes = self.blueprint[self.component], self.shapes()
        if source.file is None:
            assert source.folder is not None
            found = open_folder(source.folder)
        elif self._diffusers_names(self._file_tensors):
            found = WeightSource(self._file_tensors, source.file)
        else:
            known, held = self.original_names(), self._file_tensors
            assert self.originals is not None
            pattern = re.compile("|".join(self.originals.ignored) or r"(?!)")
            extra = {n: t for n, t in held.items() if n not in known and not pattern.search(n)}
            found = WeightSource({**to_diffusers(held, known, shapes, str(source.file)), **extra}, source.file)
        found.check(shapes)
        for lora in self.config.merge:
            if not lora.path.is_file():
                raise ConfigError("no such file", where=f"model.merge: {lora.path}")
            found = WeightSource(merge_into(found.tensors, read_adapter(lora.path, self), lora.weight, str(lora.path)), found.origin)
        return found

    def qualified(self, name: str) -> str:
        """A parameter's name in the whole diffusers pipeline."""
        return f"{self.component}.{name}"

    def comfyui_layer(self, layer: str) -> str:
        """What ComfyUI calls an original layer in an adapter file."""
        return f"diffusion_model.{layer}"

    def kohya_layer(self, layer: str) -> str:
        """What kohya's tools call an original layer."""
        return f"lora_unet_{layer.replace('.', '_')}"

    def original_names(self) -> NameMap:
        """The original tensors of this model as pieces of its parameters.

        Raises:
            DiffpipeError: when a parameter has no original name.
        """
        if self.originals is None:
            raise DiffpipeError(f"the original names of {self.title} are not known", where="export.formats", fix="export as diffusers")
        return original_names(self.originals, self.shapes())

    @cached_property
    def _file_tensors(self) -> dict[str, Lazy]:
        """The tensors of the denoiser's file, scales applied.

        Raises:
            CheckpointError: when they have neither diffusers' nor the original names of this family.
        """
        file = self.blueprint[self.component].file
        assert file is not None
        tensors = unscale(within(open_file(file), self.prefixes), str(file))
        missing = self._missing_originals(tensors)
        if missing and not self._diffusers_names(tensors):
            raise CheckpointError(
                f"its tensors are not those of {self.title}, such as {', '.join(sorted(tensors)[:3]) or 'none at all'}",
                where=str(file),
                expected=f"{missing[0]} and others",
                fix="change model.family, or name another file",
            )
        return tensors

    def _diffusers_names(self, tensors: Mapping[str, Any]) -> bool:
        """Whether a file already uses the names of the diffusers class."""
        first = self.spec.units[0].removesuffix("*")
        return any(n.startswith(first) for n in tensors) and bool(self._missing_originals(tensors))

    def _missing_originals(self, tensors: Mapping[str, Any]) -> list[str]:
        """Names of the first blocks of the original layout that a file lacks; what lies outside of blocks differs by variant."""
        if self.originals is None:
            return [self.spec.units[0].removesuffix("*") + "0"]
        return [n for n in self.originals.shapes() if self.originals.in_block(n) and n not in tensors]

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that the frozen weight ``name`` is kept in: ``model.dtype``, or float32 where the class insists."""
        insists = self.denoiser_class()._keep_in_fp32_modules or []
        return torch.float32 if any(part in insists for part in name.split(".")) else getattr(torch, self.config.dtype)

    @abstractmethod
    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        """One microbatch of cached tensors (stacked, first dim B, one key each) to the keyword inputs of the
        denoiser's ``forward`` and, per output, the target and an optional weight of the squared error.
        All on the CPU, all noise and timesteps from ``keys`` alone."""

    def align(self, rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The cached tensors of a step's samples, made stackable: a family whose captions differ in length pads here."""
        return rows

    def adapter_targets(self, module: nn.Module) -> list[str]:
        """Names of the layers an adapter goes on unless the config names others: every linear layer in a unit."""
        roots = tuple(unit.removesuffix("*") if unit.endswith(".*") else unit + "." for unit in self.spec.units)
        return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(roots)]


def layers(names: Iterable[str], prefix: str) -> int:
    """How many numbered entries ``names`` have under ``prefix``."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
