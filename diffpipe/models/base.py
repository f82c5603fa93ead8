"""What a model family is: where its module may be cut, what its latents look like, and what one training example is."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, ConfigError, DiffpipeError
from diffpipe.flow import Key, timesteps
from diffpipe.models.adapter_files import merge_into, read_adapter
from diffpipe.models.blueprint import Blueprint, Component, read_blueprint
from diffpipe.models.encoders import Encoders, blank_component, diffusers_module, fingerprint, load_component, load_components, nowhere
from diffpipe.models.names import NameMap, Originals, first_blocks, original_names, to_diffusers, to_original
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
    written: ClassVar[str] = ""  # what is written before the names of full weights in that layout, where readers look for it
    base_version: ClassVar[str] = ""  # what kohya's tools call the base in an adapter's header, by which web UIs sort adapters
    encoding: ClassVar[int] = 1  # raised when the code of encode_media or encode_text changes what it gives
    process: ClassVar[str] = "rectified flow"  # what noise does to data, and so what is learned, in the words of the field
    timesteps: ClassVar[str] = "logit_normal"  # the distribution that null stands for in objective.timesteps
    high_precision: ClassVar[tuple[str, ...]] = ()  # patterns of layers in blocks that are never kept in few bits: small modulation
    unused: ClassVar[frozenset[str]] = frozenset()  # components of the pipeline that neither encoding nor training needs
    takes_controls: ClassVar[bool] = False  # whether each picture is made from a control picture, as data.folders.controls has it
    takes_image: ClassVar[bool] = False  # whether what is sampled is made from a picture, as preview.prompts.image has it
    waits: ClassVar[bool] = False  # whether forward copies from or to the host, so that no CUDA graph can be made of it
    guided: ClassVar[Literal["classifier-free", "distilled"] | None] = None  # how samples are; None where none can be made yet
    # Keys of the config that this family gives a meaning to, beside those that all do.
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig) -> None:
        self.config = config
        self._identities: dict[str, str] = {}  # by role, once asked for: they are read from files
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
        self._check_family(found[self.component].config, found[self.component].origin)
        return {
            name: replace(component, config=self.component_config(component)) if component.file and name != self.component else component
            for name, component in found.items()
            if name not in self.unused
        }

    def other_family(self, config: Mapping[str, Any]) -> str | None:
        """The family that a denoiser's config belongs to, where it is another one of the same diffusers class."""
        return None

    def _check_family(self, config: Mapping[str, Any], origin: str) -> None:
        if other := self.other_family(config):
            raise CheckpointError(
                f"holds a {self.denoiser} of the family {other}",
                where=origin,
                expected=f"that of {self.title}",
                fix=f"set model.family: {other}",
            )

    def component_config(self, component: Component) -> dict[str, Any]:
        """The config of a component beside the denoiser that is read from a file, where the file tells of another variant."""
        return component.config

    @property
    def trained(self) -> tuple[str, ...]:
        """The components of the pipeline that the trained module is made of."""
        return (self.component,)

    # -- act one: media and captions to tensors ------------------------------------------------------------------

    def load_encoders(self, device: torch.device) -> Encoders:
        """The VAE and the text encoders on ``device``, in evaluation mode, frozen."""
        return Encoders(self._pipeline_without(self.trained, device), device)

    def load_decoder(self, device: torch.device) -> Encoders:
        """The VAE alone on ``device``, as ``decode_media`` takes it; it works in tiles where it can."""
        return _in_tiles(Encoders(self._pipeline_without(self.blueprint.keys() - {"vae"}, device), device))

    def blank_decoder(self) -> Encoders:
        """What ``load_decoder`` gives, its parameters on meta."""
        absent, vae = dict.fromkeys(self.blueprint.keys() - {"vae"}), blank_component(self.blueprint["vae"])
        made = self.make_pipeline({**absent, "vae": vae.requires_grad_(False).eval()})
        return _in_tiles(Encoders(made, torch.device("cpu")))

    def _pipeline_without(self, absent: Collection[str], device: torch.device) -> Any:
        components = load_components(self.blueprint, absent, getattr(torch, self.config.dtype), device)
        return self.make_pipeline({**components, **dict.fromkeys(absent)})

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        """The diffusers pipeline of these components; None where one is not there."""
        made = getattr(diffusers_module(), self.pipeline)(**components)
        made.set_progress_bar_config(disable=True)
        return made

    @abstractmethod
    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised latents of ``pixels`` (B C F H W in [-1, 1]; F is 1 for an image), first dim B."""

    @abstractmethod
    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """Embeddings of ``captions`` at the family's fixed text length, first dim len(captions); where the length differs, a
        list of one tensor each, which ``align`` makes stackable."""

    def encode_negative(self, encoders: Encoders, texts: Sequence[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """What samples are guided away from, as ``encode_text`` gives captions."""
        return self.encode_text(encoders, texts)

    def decode_media(self, encoders: Encoders, latents: Tensor) -> Tensor:
        """Pixels B C F H W, about in [-1, 1], of ``latents`` as ``encode_media`` gives them, for a person to look at."""
        vae = encoders.vae
        pixels = self.decode(vae, self.denormalise(vae, latents.to(encoders.device, vae.dtype))).float().cpu()
        return pixels if pixels.ndim == 5 else pixels.unsqueeze(2)

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents as the VAE gave them, from those that ``encode_media`` made of them."""
        return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """What the VAE makes of its own latents."""
        return vae.decode(latents, return_dict=False)[0]

    def identity(self, role: str) -> str:
        """What the tensors of a role ("media" or "text") depend on besides the sample: the encoders' weights
        and configs by content, the type of computation, and ``encoding``, the version of the code here."""
        if role not in self._identities:
            read = fingerprint(self.blueprint, role, self.trained)
            self._identities[role] = f"{self.name}/{self.encoding}/{self.config.dtype}/{read}"
        return self._identities[role]

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
        try:
            told = self.file_config({name: tuple(t.shape) for name, t in self._file_tensors.items()})
        except KeyError as fault:
            raise CheckpointError(f"lacks {fault.args[0]}", where=str(source.file), expected=f"all tensors of {self.title}") from fault
        self._check_family({**source.config, **told}, source.origin)
        return {**source.config, **told}

    def class_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the class is made from, given the released config: another where a part of ``forward`` is done in ``prepare``."""
        return dict(config)

    def load_denoiser(self) -> nn.Module:
        """The whole denoiser with parameters on the meta device and real non-persistent buffers (RoPE tables)."""
        from accelerate import init_empty_weights

        # Some classes draw their tables even on meta; the random state belongs to the training.
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            module = self.make_module()
        return module.requires_grad_(False).train()

    def make_module(self) -> nn.Module:
        """The trained module: the denoiser, or one that holds it beside other trained components."""
        return self.denoiser_class().from_config(self.class_config(self.denoiser_config))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The trained module's parameters and saved buffers by name."""
        return {name: tuple(t.shape) for name, t in self.load_denoiser().state_dict().items()}

    def weights(self) -> WeightSource:
        """Where the trained module's tensors lie, under its names, read one by one on demand, LoRAs of ``model.merge`` added.

        Raises:
            CheckpointError: when they are not those of the model that the config says.
        """
        found = self.stored(self.shapes)
        for lora in self.config.merge:
            if not lora.path.is_file():
                raise ConfigError("no such file", where=f"model.merge: {lora.path}")
            found = WeightSource(merge_into(found.tensors, read_adapter(lora.path, self), lora.weight, str(lora.path)), found.origin)
        return found

    def stored(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightSource:
        """Where the denoiser's tensors of these shapes lie, under diffusers names.

        Raises:
            CheckpointError: when there are others.
        """
        source = self.blueprint[self.component]
        if source.file is None:
            if source.folder is None:
                raise nowhere(source)
            found = open_folder(source.folder)
        elif self._diffusers_names(self._file_tensors):
            found = WeightSource(self._file_tensors, source.file)
        else:
            known, held = self.denoiser_names(shapes), self._file_tensors
            extra = {n: t for n, t in held.items() if n not in known}
            found = WeightSource({**to_diffusers(held, known, shapes, str(source.file)), **extra}, source.file)
        unused = self._unused_names()
        found = WeightSource({n: t for n, t in found.tensors.items() if n in shapes or not unused.search(n)}, found.origin)
        try:
            found.check(shapes)
        except CheckpointError as fault:
            fix = fault.fix if source.file is None else self._advice(self._file_tensors, fault.fix)
            raise CheckpointError(fault.found, where=fault.where, expected=fault.expected, fix=fix) from None
        return found

    def _unused_names(self) -> re.Pattern[str]:
        """Names that checkpoints hold, and the family or its diffusers class has no use for."""
        of_class = self.denoiser_class()._keys_to_ignore_on_load_unexpected or []
        return re.compile("|".join([*(self.originals.ignored if self.originals else ()), *of_class]) or "(?!)")

    def qualified(self, name: str) -> str:
        """A parameter's name in the whole diffusers pipeline."""
        return f"{self.component}.{name}"

    def comfyui_layer(self, layer: str) -> str:
        """What ComfyUI calls an original layer in an adapter file."""
        return f"diffusion_model.{layer}"

    def kohya_layer(self, layer: str) -> str:
        """What kohya's tools call an original layer."""
        return f"lora_unet_{layer.replace('.', '_')}"

    def has_no_use_for(self, layer: str) -> bool:
        """Whether other programs' adapters may hold such a layer, and it has no effect on what the model gives."""
        return False

    def original_name(self, name: str) -> str:
        """The original name of a tensor that some program writes under another one."""
        return name

    def original_names(self) -> NameMap:
        """What the original format has of the trained module: its names, as pieces of the module's parameters.

        Raises:
            DiffpipeError: when a parameter has no original name.
        """
        return self.denoiser_names(self.shapes)

    def components(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Whole weights of the trained module by component, as the folders of a diffusers pipeline have them."""
        return {self.component: dict(tensors)}

    def folder_config(self, component: str) -> dict[str, Any]:
        """What ``config.json`` in a component's folder says."""
        return {**self.denoiser_config, "_class_name": self.denoiser}

    def single_file(self, components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Whole weights by component as the original checkpoint has them, with whatever else that holds."""
        own = components[self.component]
        return {self.written + name: tensor for name, tensor in to_original(own, self.denoiser_names(own)).items()}

    def denoiser_names(self, parameters: Collection[str]) -> NameMap:
        """The original tensors of the denoiser as pieces of its parameters, which are given by diffusers name.

        Raises:
            DiffpipeError: when a parameter has no original name.
        """
        if self.originals is None:
            raise DiffpipeError(f"the original names of {self.title} are not known", where="export.formats", fix="export as diffusers")
        return original_names(self.originals, parameters)

    @cached_property
    def _file_tensors(self) -> dict[str, Lazy]:
        """The tensors of the denoiser's file, scales applied.

        Raises:
            CheckpointError: when they have neither diffusers' nor the original names of this family.
        """
        file = self.blueprint[self.component].file
        assert file is not None
        tensors = {self.original_name(n): t for n, t in unscale(within(open_file(file), self.prefixes), str(file)).items()}
        missing = self._missing_originals(tensors)
        if missing and not self._diffusers_names(tensors):
            raise CheckpointError(
                f"its tensors are not those of {self.title}, such as {', '.join(sorted(tensors)[:3]) or 'none at all'}",
                where=str(file),
                expected=f"{missing[0]} and others",
                fix=self._advice(tensors, "change model.family, or name another file"),
            )
        return tensors

    def _advice(self, names: Collection[str], otherwise: str) -> str:
        """What to change when a file is not this family's: the families whose first blocks it has, the most particular of them."""
        from diffpipe.models import MODELS, model_class

        held = set(names)
        known = {f: first_blocks(originals) for f in MODELS if (originals := model_class(f).originals)}
        fitting = {f: len(first) for f, both in known.items() for first in both if first and first <= held}
        best = [f for f, count in fitting.items() if count == max(fitting.values())]
        return f"set model.family: {' or '.join(best)}" if best and self.name not in best else otherwise

    def _diffusers_names(self, tensors: Mapping[str, Any]) -> bool:
        """Whether a file already uses the names of the diffusers class."""
        if self.originals is None:
            return any(n.startswith(self.spec.units[0].removesuffix("*")) for n in tensors)
        original, own = first_blocks(self.originals)
        return not (own - original).isdisjoint(tensors) and bool(self._missing_originals(tensors))

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

    def times(self, latents: Tensor, keys: Sequence[Key]) -> Tensor:
        """The t in [0, 1] that each key draws for latents (B C h w or B C F h w), float32; 1 is pure noise."""
        *frames, height, width = latents.shape[2:]
        patch = self.geometry.patch
        return timesteps(keys, self.objective, math.prod(frames) * (height // patch) * (width // patch))

    # -- samples: noise to latents, by the loop of a diffusers pipeline ----------------------------------------------

    def make_sampler(self, denoiser: nn.Module) -> Any:
        """The diffusers pipeline whose loop samples, of a denoiser and the scheduler alone.

        Args:
            denoiser: what the loop calls for a prediction; answers as one of ``denoiser_class`` would.
        """
        absent = dict.fromkeys(self.blueprint.keys() - {"scheduler", self.component})
        return self.make_pipeline({**absent, "scheduler": self.load_scheduler(), self.component: denoiser})

    def load_scheduler(self) -> Any:
        """The scheduler of the pipeline; another where the config trains for that.

        Raises:
            CheckpointError: when the pipeline has none.
        """
        if "scheduler" not in self.blueprint:
            raise CheckpointError("its model_index.json names no scheduler", where="model.path", fix="take it from the released pipeline")
        return load_component(self.blueprint["scheduler"], torch.float32, self.blueprint)

    def released_denoiser(self) -> nn.Module:
        """The denoiser as its pipeline knows it, on meta."""
        from accelerate import init_empty_weights

        with torch.random.fork_rng(devices=[]), init_empty_weights():
            return self.denoiser_class().from_config(self.denoiser_config)

    @property
    def no_prompt(self) -> str | None:
        """What a sample is guided away from where nobody says; None where the pipeline needs no text for that."""
        return "" if self.guided == "classifier-free" else None

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the loop of ``make_sampler`` is called with beside sizes, noise and scales.

        Args:
            text: what ``encode_text`` gave for the prompt, first dim 1.
            negative: the same of what it is guided away from; None where there is nothing.
            shown: what ``encode_media`` gave for its picture, first dim 1; empty without one.
        """
        raise NotImplementedError(f"{self.name} has none, and must not say how it is guided")

    def inputs_of(self, call: dict[str, Any], shown: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inputs of ``forward``, as ``prepare`` gives them, for one call that the loop makes of the denoiser.

        Args:
            call: its arguments by name, B of all tensors being 1; what belongs to attention processors is left out.
            shown: as for ``conditions``.
        """
        return call

    def pack(self, latents: Tensor) -> Tensor:
        """Latents B C h w or B C f h w as the loop has them."""
        return latents

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """What ``pack`` made of latents of the shape of ``like``, back."""
        return packed

    # -- shapes, known before anything is encoded -------------------------------------------------------------------

    def blank(self, frames: int, height: int, width: int) -> dict[str, Tensor]:
        """The cached tensors of one sample of these dims in pixels, its caption as long as captions are kept; zeros."""
        media = self.blank_media(frames, height, width)
        if self.takes_controls:
            media |= {f"control_{name}": tensor for name, tensor in media.items()}
        return {**media, **self.blank_text(), "framing": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)}

    def blank_media(self, frames: int, height: int, width: int) -> dict[str, Tensor]:
        """Zeros of the shapes that ``encode_media`` gives."""
        vae, shape = self.blueprint["vae"].config, self.geometry
        cells = (height // shape.spatial, width // shape.spatial)
        latent_frames = ((frames - 1) // shape.temporal + 1,) if shape.fps else ()
        return {"latents": torch.zeros(vae["z_dim"] if "z_dim" in vae else vae["latent_channels"], *latent_frames, *cells)}

    @abstractmethod
    def blank_text(self) -> dict[str, Tensor]:
        """Zeros of the shapes that ``encode_text`` gives; masks are true, as of the longest caption."""

    def text_length(self, most: int, tokenizer: str = "tokenizer") -> int:
        """Tokens that captions are padded to: ``most``, or what the tokenizer's own config says."""
        component = self.blueprint[tokenizer]
        file = component.folder / "tokenizer_config.json" if component.folder else None
        told = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else component.config
        return int(min(most, told.get("model_max_length", most)))

    def align(self, rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The cached tensors of a step's samples, made stackable: a family whose captions differ in length pads here."""
        return rows

    def spread(self, mask: Tensor, target: Tensor) -> Tensor:
        """A mask of latent cells (B 1 h w) as a weight that broadcasts to a target; a family that packs latents packs it here."""
        return mask if target.ndim == 4 else mask.unsqueeze(2)

    def adapter_targets(self, module: nn.Module) -> list[str]:
        """Names of the layers an adapter goes on unless the config names others: every linear layer in a unit."""
        roots = tuple(unit.removesuffix("*") if unit.endswith(".*") else unit + "." for unit in self.spec.units)
        return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(roots)]


def _in_tiles(decoder: Encoders) -> Encoders:
    if hasattr(decoder.vae, "enable_tiling"):
        decoder.vae.enable_tiling()
    return decoder


def layers(names: Iterable[str], prefix: str) -> int:
    """How many numbered entries ``names`` have under ``prefix``."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
