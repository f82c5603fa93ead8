"""Stable Diffusion XL base, its text encoders frozen or trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.ddpm import Prediction, loss_weights, mix, step_of, velocity
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.flow import Key, noise, timesteps
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders, component_tensors
from diffpipe.models.ldm import CLIP_G, CLIP_L, UNET, VAE, open_clip_originals, unet_originals, vae_originals
from diffpipe.models.names import NameMap, Piece, original_names
from diffpipe.models.unet import Skips, unet_units
from diffpipe.models.weights import WeightSource

ENCODERS = ("text_encoder", "text_encoder_2")
COMFYUI = {"text_encoder": "clip_l.transformer", "text_encoder_2": "clip_g.transformer"}
KOHYA = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
UNUSED = r"encoder\.layers\.{}\.|final_layer_norm\."  # of the first text encoder, {} being its last layer


class UNetWithText(nn.Module):
    """What is trained: the UNet, and where they are trained too, both text encoders before it.

    Args:
        unet: diffusers' UNet2DConditionModel.
        encoders: first and second text encoder, those of ``encoder_classes``; none when captions come encoded.
    """

    text_encoder: nn.Module
    text_encoder_2: nn.Module

    def __init__(self, unet: nn.Module, encoders: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        for name, encoder in zip(ENCODERS, encoders, strict=False):
            self.add_module(name, encoder)
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        tokens: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The UNet's output.

        Args:
            sample: noisy latents, B C h w.
            timestep: steps from 0 to 999, B.
            time_ids: sizes and crop, B 6.
            text, pooled: encoded captions, B L D and B P.
            tokens: instead of those, each chunk's tokens for either encoder, B chunks 2 77.
        """
        if tokens is not None:
            count, chunks = tokens.shape[:2]
            first, second = tokens.flatten(0, 1).unbind(1)
            state = self.text_encoder(first)
            state_2, pooled_2 = self.text_encoder_2(second)
            text = torch.cat([state, state_2], -1).reshape(count, -1, state.shape[-1] + state_2.shape[-1])
            pooled = pooled_2.unflatten(0, (count, chunks))[:, 0]
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=return_dict)


@cache
def encoder_classes() -> tuple[Any, Any]:
    """The text encoders as they are trained: transformers' own, giving only what SDXL takes from them, so that only that crosses borders.

    Made when first asked for, so that reading captions does not import them.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    class PenultimateState(CLIPTextModel):
        """CLIP without its last layer and norm, of which SDXL takes nothing: B 77 to B 77 D."""

        def __init__(self, config: Any) -> None:
            config = copy.deepcopy(config)
            config.num_hidden_layers -= 1
            super().__init__(config)
            self.final_layer_norm = nn.Identity()

        def forward(self, input_ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            out: Any = super().forward(input_ids)
            return out.last_hidden_state

    class PenultimateStateAndPooled(CLIPTextModelWithProjection):
        """B 77 to B 77 D, the state before the last layer, and B P, the projected state of the end mark."""

        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            out: Any = super().forward(input_ids, output_hidden_states=True)
            return out.hidden_states[-2], out.text_embeds

    return PenultimateState, PenultimateStateAndPooled


class SDXL(DiffusionModel):
    name = "sdxl"
    title = "Stable Diffusion XL base 1.0"
    geometry = Geometry(spatial=8, patch=4)  # the UNet halves latents twice
    denoiser = "UNet2DConditionModel"
    high_precision = (r"time_emb_proj",)  # modulation, small beside a block
    component = "unet"
    pipeline = "StableDiffusionXLPipeline"
    prefixes = (*DiffusionModel.prefixes, "unet.")
    originals = unet_originals(
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), 2
    )
    base_version = "sdxl_base_v1-0"
    process = "DDPM"
    guided = "classifier-free"
    timesteps = "uniform"
    options = frozenset(
        {
            "model.train_text_encoders",
            "objective.prediction",
            "objective.zero_terminal_snr",
            "objective.min_snr",
            "objective.debiased",
        }
    )

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__(config, objective)
        self.prediction: Prediction = objective.prediction or "epsilon"
        self.zero_terminal_snr = self.prediction == "v" if objective.zero_terminal_snr is None else objective.zero_terminal_snr
        if objective.debiased and self.zero_terminal_snr and self.prediction == "epsilon":
            raise ConfigError(
                "weighs a step without signal infinitely", where="objective.debiased", fix="predict v, or set zero_terminal_snr to false"
            )

    @property
    def trained(self) -> tuple[str, ...]:
        return (self.component, *ENCODERS) if self.config.train_text_encoders else (self.component,)

    def _check_family(self, config: Mapping[str, Any], origin: str) -> None:
        """Other Stable Diffusions have the same class: only SDXL's UNet is told sizes, and its refiner's one number fewer."""
        told, wanted = config.get("addition_embed_type"), f"the UNet of {self.title}"
        if told != "text_time":
            raise CheckpointError(
                f"holds the UNet of an older Stable Diffusion (addition_embed_type is {told})",
                where=origin,
                expected=f"{wanted} (text_time)",
                fix="change model.path",
            )
        pooled = config["projection_class_embeddings_input_dim"] - 5 * config["addition_time_embed_dim"]
        if pooled == config["cross_attention_dim"]:
            raise CheckpointError("holds the UNet of the SDXL refiner", where=origin, expected=wanted, fix="change model.path")

    # -- act one ---------------------------------------------------------------------------------------------------

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C h w, the mode of the posterior: the same picture always gives the same latents."""
        vae = encoders.vae
        mode = vae.encode(pixels[:, :, 0].to(encoders.device, vae.dtype)).latent_dist.mode()
        return {"latents": (mode * vae.config.scaling_factor).float().cpu()}

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """``text`` chunks 77 D, the states before the last layer of both encoders side by side, and ``pooled`` P of the second
        one's first chunk; where text encoders are trained, ``tokens`` chunks 2 77.

        A caption is cut into chunks of 75 tokens. More than one are followed by the empty caption's, which ``align`` needs.
        """
        pipeline = encoders.pipeline
        tokens = [chunked(caption, (pipeline.tokenizer, pipeline.tokenizer_2)) for caption in captions]
        if self.config.train_text_encoders:
            return {"tokens": tokens}
        first, second = torch.cat(tokens).to(encoders.device).unbind(1)
        state = pipeline.text_encoder(first, output_hidden_states=True).hidden_states[-2]
        out = pipeline.text_encoder_2(second, output_hidden_states=True)
        counts = [len(chunks) for chunks in tokens]
        text = torch.cat([state, out.hidden_states[-2]], -1).cpu()
        return {"text": list(text.split(counts)), "pooled": [chunks[0] for chunks in out.text_embeds.cpu().split(counts)]}

    def blank_text(self) -> dict[str, Tensor]:
        """One chunk, of a caption of up to 75 tokens."""
        if self.config.train_text_encoders:
            return {"tokens": torch.zeros(1, 2, 77, dtype=torch.int64)}
        return {"text": torch.zeros(1, 77, self.denoiser_config["cross_attention_dim"]), "pooled": torch.zeros(self._pooled())}

    def _pooled(self) -> int:
        """How wide a pooled caption is."""
        unet = self.denoiser_config
        return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]

    def align(self, rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Captions of fewer chunks than the step's longest go on with empty ones."""
        name = "tokens" if self.config.train_text_encoders else "text"
        longest = max((row[name] for row in rows), key=len)
        most = max(1, len(longest) - 1)
        own = [row[name][: max(1, len(row[name]) - 1)] for row in rows]
        return [{**row, name: torch.cat([chunks, *[longest[-1:]] * (most - len(chunks))])} for row, chunks in zip(rows, own, strict=True)]

    # -- act two ---------------------------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> StageSpec:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from the config
        units = tuple(f"unet.{unit}" for unit in unet_units(self.denoiser_config))
        carry = (*self.trained[1:], "unet.time_embedding", "unet.add_embedding", "unet.conv_in")
        return StageSpec(units, carry, post=("unet.conv_norm_out", "unet.conv_out"), live=Skips.of(units))

    def make_module(self) -> nn.Module:
        from transformers import CLIPTextConfig

        configs = [CLIPTextConfig.from_dict(self.blueprint[name].config) for name in self.trained[1:]]
        return UNetWithText(super().make_module(), [make(config) for make, config in zip(encoder_classes(), configs, strict=False)])

    def stored(self, shapes: Mapping[str, tuple[int, ...]]) -> WeightSource:
        unet = super().stored(_within(self.component, shapes))
        found = {f"{self.component}.{n}": t for n, t in unet.tensors.items()}
        for name in self.trained[1:]:
            component, wanted = self.blueprint[name], _within(name, shapes)
            unused = re.compile(UNUSED.format(component.config["num_hidden_layers"] - 1))
            held = {n: t for n, t in self._encoder(name).items() if n in wanted or not unused.match(n)}
            WeightSource(held, Path(component.origin)).check(wanted)
            found |= {f"{name}.{n}": t for n, t in held.items()}
        return WeightSource(found, unet.origin)

    def _encoder(self, name: str) -> dict[str, Tensor]:
        """The tensors of a text encoder under the names of its class, which for the first lack the ``text_model.`` that files have."""
        held = component_tensors(self.blueprint[name])
        return held if name == "text_encoder_2" else {n.removeprefix("text_model."): t for n, t in held.items()}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        known = self.blueprint[self.component].config
        first = [1 + level * (known["layers_per_block"] + 1) for level in range(len(known["block_out_channels"]))]
        widths = [shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0] for number in first]
        head = known["block_out_channels"][0] // known["attention_head_dim"][0]
        return {
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "block_out_channels": widths,
            "attention_head_dim": [width // head for width in widths],
            "transformer_layers_per_block": [max(1, layers(shapes, f"input_blocks.{n}.1.transformer_blocks.")) for n in first],
            "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }

    def times(self, latents: Tensor, keys: Sequence[Key]) -> Tensor:
        """As for models of 2 x 2 cells a token: a UNet has none that its resolution shift could count."""
        height, width = latents.shape[2:]
        return timesteps(keys, self.objective, height // 2 * (width // 2))

    def load_scheduler(self) -> Any:
        """That of the released pipeline, for what the config trains the model to predict."""
        released = super().load_scheduler()
        changes: dict[str, Any] = {"prediction_type": "v_prediction"} if self.prediction == "v" else {}
        if self.zero_terminal_snr:
            # Sampling must begin at the last step, which is pure noise.
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return type(released).from_config(released.config, **changes)

    @property
    def no_prompt(self) -> str | None:
        """The pipeline takes zeros for embeddings, but none of tokens, which trained text encoders embed."""
        return "" if self.config.train_text_encoders else None

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for prefix, own in (("", text), ("negative_", negative)):
            if own is None:
                continue
            if self.config.train_text_encoders:
                # Tokens go through the loop in the place of embeddings: numbers that float32 holds exactly.
                tokens = own["tokens"].flatten(2).float()
                given |= {f"{prefix}prompt_embeds": tokens, f"{prefix}pooled_prompt_embeds": torch.zeros(len(tokens), self._pooled())}
            else:
                given |= {f"{prefix}prompt_embeds": own["text"].flatten(1, 2), f"{prefix}pooled_prompt_embeds": own["pooled"]}
        return given

    def inputs_of(self, call: dict[str, Any], shown: Mapping[str, Tensor]) -> dict[str, Any]:
        added, text = call["added_cond_kwargs"], call["encoder_hidden_states"]
        inputs = {"sample": call["sample"], "timestep": call["timestep"].view(-1), "time_ids": added["time_ids"]}
        if self.config.train_text_encoders:
            return {**inputs, "tokens": text.long().unflatten(2, (2, -1))}
        return {**inputs, "text": text, "pooled": added["text_embeds"]}

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        step = step_of(self.times(clean, keys))
        e = noise(keys, clean.shape[1:])
        inputs = {"sample": mix(clean, e, step, self.zero_terminal_snr), "timestep": step, "time_ids": batch["framing"].float()}
        if self.config.train_text_encoders:
            inputs["tokens"] = batch["tokens"]
        else:
            inputs |= {"text": batch["text"].float().flatten(1, 2), "pooled": batch["pooled"].float()}
        target = e if self.prediction == "epsilon" else velocity(clean, e, step, self.zero_terminal_snr)
        weights = loss_weights(
            step,
            self.prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            min_snr=self.objective.min_snr,
            debiased=self.objective.debiased,
        )
        return inputs, [(target, None if weights is None else weights.view(-1, 1, 1, 1))]

    # -- names of other programs -----------------------------------------------------------------------------------

    def qualified(self, name: str) -> str:
        component, _, own = name.partition(".")
        return f"{component}.{_in_file(component, own)}"

    def denoiser_names(self, parameters: Collection[str]) -> NameMap:
        known = self.denoiser_config
        originals = unet_originals(tuple(known["down_block_types"]), tuple(known["up_block_types"]), known["layers_per_block"])
        return original_names(originals, parameters)

    def original_names(self) -> NameMap:
        """Text encoders' layers have the names that ComfyUI and kohya share in adapter files, rather than OpenCLIP's."""
        shapes = self.shapes
        names = self.denoiser_names(_within(self.component, shapes))
        found = {n: [replace(p, name=f"{self.component}.{p.name}") for p in pieces] for n, pieces in names.items()}
        for component in self.trained[1:]:
            found |= {f"{COMFYUI[component]}.{_in_file(component, n)}": [Piece(f"{component}.{n}")] for n in _within(component, shapes)}
        return found

    def comfyui_layer(self, layer: str) -> str:
        return f"text_encoders.{layer}" if layer.startswith(tuple(COMFYUI.values())) else super().comfyui_layer(layer)

    def kohya_layer(self, layer: str) -> str:
        for component, name in COMFYUI.items():
            if layer.startswith(name):
                return f"{KOHYA[component]}_{layer.removeprefix(f'{name}.').replace('.', '_')}"
        return super().kohya_layer(layer)

    def has_no_use_for(self, layer: str) -> bool:
        """The first text encoder's last layer, which kohya's tools adapt too."""
        if not self.config.train_text_encoders:
            return False
        last = self.blueprint["text_encoder"].config["num_hidden_layers"] - 1
        return re.match(rf"(lora_te1_|text_encoder\.|text_encoders\.clip_l\.).*layers[._]{last}[._]", layer) is not None

    def adapter_targets(self, module: nn.Module) -> list[str]:
        """The text encoders' layers too, where they are trained."""
        encoders = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and re.match(r"text_encoder.*\.encoder\.layers\.", n)]
        return [*encoders, *super().adapter_targets(module)]

    def components(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Text encoders with the layers that SDXL has no use for, as they were."""
        return {
            name: _within(name, tensors)
            if name == self.component
            else {_in_file(name, n): t for n, t in {**self._encoder(name), **_within(name, tensors)}.items()}
            for name in self.trained
        }

    def folder_config(self, component: str) -> dict[str, Any]:
        if component == self.component:
            return super().folder_config(component)
        part = self.blueprint[component]
        # Without the type that the base was in, the library loads the weights in their own.
        told = {key: value for key, value in part.config.items() if key not in ("dtype", "torch_dtype")}
        return {**told, "architectures": [part.kind]}

    def single_file(self, components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """UNet, VAE and both text encoders; what was not trained is as the base has it."""
        first, second = (
            components[name] if name in components else {_in_file(name, n): t for n, t in self._encoder(name).items()} for name in ENCODERS
        )
        parts = {
            UNET: super().single_file(components),
            VAE: vae_originals(component_tensors(self.blueprint["vae"])),
            CLIP_L: first,
            CLIP_G: open_clip_originals(second),
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def chunked(caption: str, tokenizers: Sequence[Any]) -> Tensor:
    """The tokens of a caption for each tokenizer: chunks tokenizers 77.

    A chunk is the begin mark, up to 75 tokens, the end mark, and each tokenizer's own padding, so that a caption of one chunk is
    what diffusers' pipeline makes of it. Counts may differ (the second tokenizer pads with "!" and so never joins it with others):
    the shorter goes on with empty chunks. More than one chunk are followed by an empty one.
    """
    found = [list(_cut(t(caption, add_special_tokens=False, verbose=False).input_ids, t.model_max_length - 2)) for t in tokenizers]
    most = max(len(chunks) for chunks in found)
    filled = [chunks + [[]] * (most - len(chunks) + (most > 1)) for chunks in found]
    marked = [[_marked(chunk, t) for chunk in chunks] for chunks, t in zip(filled, tokenizers, strict=True)]
    return torch.tensor(marked).transpose(0, 1).contiguous()


def _cut(ids: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, max(1, len(ids)), size):
        yield ids[i : i + size]


def _marked(ids: list[int], tokenizer: Any) -> list[int]:
    padding = [tokenizer.pad_token_id] * (tokenizer.model_max_length - 2 - len(ids))
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]


def _in_file(component: str, name: str) -> str:
    """What files call a text encoder's parameter: transformers has left a level out of the first one's modules."""
    return f"text_model.{name}" if component == "text_encoder" else name


def _within(component: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """What has a component's name before it, without that."""
    return {n.removeprefix(f"{component}."): value for n, value in names.items() if n.startswith(f"{component}.")}
