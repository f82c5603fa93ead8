"""Every key of a config, documented once; the reference and the JSON Schema are generated from here."""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
    model_validator,
)

DType = Literal["float32", "bfloat16", "float16"]
Recompute = Literal["none", "block", "selective", "parts"]
ExportFormat = Literal["diffusers", "comfyui", "kohya"]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what a generator takes
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """YAML reads on and yes as true, which Python counts as 1."""
        value = read(given)
        if isinstance(given, bool) and not isinstance(value, bool):
            raise ValueError(f"{'true (on, yes)' if given else 'false (off, no)'} found, a number expected")
        return value


def bytes_of(given: Any) -> Any:
    """A number of bytes from text such as 12GiB, 12GB or 12000MiB."""
    if not isinstance(given, str):
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?)?B?\s*", given)
    if found is None:
        raise ValueError(f"{given!r} is no amount of memory, such as 12GiB, 12GB or 12000MiB")
    prefix = found[2] or ""
    return int(float(found[1]) * (1024 if prefix.endswith("i") else 1000) ** " kMGT".index(prefix[0] if prefix else " "))


def _pattern(given: str) -> str:
    try:
        re.compile(given)
    except re.error as fault:
        raise ValueError(f"{given!r} is no regular expression: {fault}") from fault
    return given


Pattern = Annotated[str, AfterValidator(_pattern)]


def numbers_of(given: Any) -> Any:
    """What YAML takes for text where a number has an exponent and no dot, such as 1e-6, as a number."""
    if isinstance(given, dict):
        return {name: numbers_of(value) for name, value in given.items()}
    if isinstance(given, list):
        return [numbers_of(value) for value in given]
    return float(given) if isinstance(given, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", given, re.IGNORECASE) else given


def path_of(given: str) -> str:
    """A path, whose ~ at the start is the home folder."""
    if any(char < " " for char in given):
        raise ValueError(f"{given!r} holds what \\ and a letter mean in double quotes; write / for \\, or single quotes")
    return expanduser(given)


File = Annotated[Path, AfterValidator(lambda path: Path(path_of(str(path))))]
Place = Annotated[str, AfterValidator(path_of)]
# What is written is text with a unit, or a number of bytes.
Bytes = Annotated[int, Field(ge=1), BeforeValidator(bytes_of, json_schema_input_type=int | str)]


class RunConfig(Section):
    steps: Positive | None = Field(default=None, description="Optimizer steps to train; null trains `epochs`.")
    epochs: Positive | None = Field(
        default=None, description="Passes over the data; whichever of `steps` and `epochs` ends first ends the run."
    )
    seed: Seed = Field(default=0, description="Decides data order, noise, timesteps and new weights.")

    @model_validator(mode="after")
    def _has_an_end(self) -> RunConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set steps, epochs or both: the run would have no end")
        return self


IN_ROUNDS = ("eager-1f1b", "interleaved", "zero-bubble")  # schedules that need several stages, and rounds of one size


def fills_rounds(microbatches: int, stages: int) -> bool:
    """Whether a step's microbatches make rounds of one size, of at least as many as stages where there are so many."""
    return microbatches % max(1, microbatches // stages) == 0


class MeshConfig(Section):
    stages: Positive = Field(default=1, description="Pipeline stages the model is cut into.")
    replicate: Positive = Field(default=1, description="Copies of the pipeline that train on different samples.")
    shard: Positive = Field(
        default=1,
        description="Ranks that share the weights of a stage (FSDP2), each keeping a part of every weight, its gradient and its optimizer"
        " state; they train on different samples, as replicas do. Adapters are whole on each.",
    )
    reshard: bool = Field(
        default=True,
        description="With shard: true gathers the weights of a block for each of its passes, and shares gradients out behind each"
        " microbatch's, so that at most two blocks are whole at once; false gathers all of a stage once a step and shares gradients out"
        " at its end, which takes less communication and more memory.",
    )
    schedule: Literal["auto", "1f1b", "eager-1f1b", "interleaved", "gpipe", "zero-bubble"] = Field(
        default="auto",
        description="Order of a step's passes: `1f1b` takes a microbatch back as soon as it can; `eager-1f1b` does so behind nearly twice"
        " as many ahead, so that no stage waits for what is on its way; `interleaved` does so with several spans"
        " of units on each stage, which idles less and sends more; `gpipe` takes all ahead, then all back; `zero-bubble` fills what is idle"
        " with the gradients of weights (without adapter, mesh.shard and memory policies). `auto` is the one of these that is estimated to"
        " take least time and fits: never gpipe where there are as many microbatches as stages.",
    )
    spans: Positive | None = Field(
        default=None,
        description="Spans of units that each stage holds, for `interleaved` (2 or more) and `zero-bubble`; null is as many as are"
        " estimated to take least time.",
    )
    split: Literal["auto", "parameters", "time", "memory"] | list[Positive] = Field(
        default="auto",
        description="Where the model is cut: `parameters` balances bytes of weights; `time` how long units take, measured at the start and"
        " kept beside the cache; `auto` the same as estimated; `memory` how full stages are. Or the unit at which each span after the"
        " first begins, counted from 0, such as [10, 20].",
    )
    memory: list[Bytes] | None = Field(
        default=None,
        description="Most that each stage may hold on its device, such as [24GiB, 16GiB] for uneven cards: where there is a choice, the"
        " model is cut so that each fits. null is memory.budget for all, or what is free.",
    )
    timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds in which some rank must get on, and each give a sign of life, once training has begun; otherwise all end and"
        " name those at fault. Longer than the longest step.",
    )

    @property
    def replicas(self) -> int:
        """Ranks of a stage, which train on different samples."""
        return self.replicate * self.shard

    @property
    def all_spans(self) -> int:
        """Spans of the whole model, of which stage ``n`` holds those numbered n, n + stages, ..."""
        return self.stages * (self.spans or (2 if self.schedule == "interleaved" else 1))

    @model_validator(mode="after")
    def _schedule_fits(self) -> MeshConfig:
        if self.schedule in IN_ROUNDS and self.stages == 1:
            raise ValueError(f"schedule is {self.schedule}, which needs stages 2 or more; set it to auto")
        if self.schedule == "interleaved" and self.spans == 1:
            raise ValueError("schedule is interleaved, which needs spans 2 or more; set spans to null, or schedule to 1f1b")
        if (self.schedule in ("1f1b", "eager-1f1b", "gpipe") or self.stages == 1) and (self.spans or 1) > 1:
            raise ValueError(f"spans is {self.spans}, which needs schedule interleaved or zero-bubble and stages 2 or more; set it to null")
        return self

    @model_validator(mode="after")
    def _split_fits(self) -> MeshConfig:
        if isinstance(self.split, list):
            if len(self.split) != self.all_spans - 1:
                spans = f" of {self.all_spans // self.stages} spans" if self.all_spans > self.stages else ""
                raise ValueError(f"split has {len(self.split)} entries, but {self.stages} stages{spans} need {self.all_spans - 1}")
            if sorted(set(self.split)) != self.split:
                raise ValueError("split must rise strictly, such as [10, 20]")
        if self.memory is not None and len(self.memory) != self.stages:
            raise ValueError(f"memory has {len(self.memory)} entries for {self.stages} stages")
        return self


class BatchConfig(Section):
    micro: Positive = Field(default=1, description="Samples per microbatch on each replica.")
    accumulate: Positive = Field(
        default=1, description="Microbatches per optimizer step on each replica; fill the pipeline with 2-4 x mesh.stages."
    )
    may_change: bool = Field(
        default=False,
        description="Whether a run may go on with other samples per step (micro x accumulate x mesh.replicate x mesh.shard) than it was"
        " saved with. With the same number it sees the same samples on any mesh; with another, those that the epoch has not shown yet.",
    )


class MergeConfig(Section):
    path: File = Field(description="LoRA file (diffusers, ComfyUI or kohya keys).")
    weight: float = Field(default=1.0, description="What its update is multiplied by.")


class ModelConfig(Section):
    family: str = Field(description="Model family; `diffpipe models` lists them.")
    path: Place | None = Field(
        default=None,
        description="Diffusers folder of the whole pipeline, one file that holds several components, `hf:OWNER/NAME@REVISION` for a"
        " repository of the Hugging Face hub, or `toy:NAME` for a tiny random model; null takes every component from `files`.",
    )
    files: dict[str, File] = Field(
        default_factory=dict,
        description="Files or folders of single components (original, ComfyUI or diffusers tensor names), by diffusers' name of the"
        " component: the denoiser (transformer, or unet for SDXL), vae, text_encoder, text_encoder_2, image_encoder, tokenizer ...",
    )
    merge: list[MergeConfig] = Field(default_factory=list, description="LoRAs added to the denoiser's weights before training.")
    dtype: DType = Field(default="bfloat16", description="Type of computation, and of weights that are not trained.")
    trainable_dtype: DType = Field(
        default="float32", description="Type in which trained weights (adapter, or all in full fine-tuning) are kept: float32, or as dtype."
    )
    attention: Literal["sdpa", "fa4", "cudnn"] = Field(
        default="sdpa",
        description="Attention kernels: `sdpa` lets torch choose among flash, memory-efficient and plain ones; `fa4` has FlashAttention-4"
        " in the place of flash, near twice as fast on Hopper and Blackwell cards (pip install 'diffpipe[fa4]', Linux); `cudnn` adds"
        " cuDNN's, as fast there, until a gradient is not finite: then the step is repeated without them, and so is the rest of"
        " the run (which ends where blocks are stepped in the backward pass). In uncompiled blocks of Flux at 1024x1024 they gave gradients"
        " that were NaN, or finite and wrong.",
    )
    guidance: float = Field(default=1.0, description="Guidance value given to models with a guidance embedding (Flux dev, HunyuanVideo).")
    train_text_encoders: bool = Field(
        default=False,
        description="Train the text encoders too (SDXL); `optimizer.groups` that match `^text_encoder` give them rates of their own.",
    )

    @model_validator(mode="after")
    def _types_fit(self) -> ModelConfig:
        if self.trainable_dtype not in ("float32", self.dtype):
            raise ValueError(f"trainable_dtype is {self.trainable_dtype}, must be float32 or that of the computation, {self.dtype}")
        return self


class ObjectiveConfig(Section):
    timesteps: Literal["logit_normal", "uniform"] | None = Field(
        default=None,
        description="Distribution that timesteps t in [0, 1] are drawn from; 1 is pure noise. null takes the family's own: uniform for"
        " SDXL, logit_normal for the others.",
    )
    scale: float = Field(default=1.0, gt=0, description="Spread of the logit-normal: t = sigmoid(scale * z), z ~ N(0, 1).")
    shift: float | Literal["resolution"] | None = Field(
        default=None,
        description="Moves t towards noise: s*t / (1 + (s-1)*t) for a number s; `resolution` takes the s of Flux, which rises with size.",
    )
    min_t: Fraction = Field(default=0.0, description="Smallest t trained (after the shift).")
    max_t: Fraction = Field(default=1.0, description="Largest t trained (after the shift).")
    loss: Literal["mse", "huber", "smooth_l1"] = Field(default="mse", description="Loss of one element, as torch.nn.functional defines it.")
    delta: float = Field(default=1.0, gt=0, description="Where `huber` and `smooth_l1` turn from square to linear.")
    prediction: Literal["epsilon", "v"] | None = Field(
        default=None, description="What an SDXL model predicts: noise, or velocity; null is epsilon."
    )
    zero_terminal_snr: bool | None = Field(
        default=None, description="Rescale SDXL's noise schedule so that its last step is pure noise; null does for prediction v."
    )
    min_snr: float | None = Field(default=None, gt=0, description="Gamma of min-SNR loss weights (SDXL); null does not weight.")
    debiased: bool = Field(default=False, description="Debiased-estimation loss weights (SDXL).")

    @model_validator(mode="after")
    def _sane(self) -> ObjectiveConfig:
        if isinstance(self.shift, float | int) and not isinstance(self.shift, bool) and self.shift <= 0:
            raise ValueError(f"shift is {self.shift}, must be above 0; null leaves t as drawn")
        if self.min_t >= self.max_t:
            raise ValueError(f"min_t {self.min_t} must be below max_t {self.max_t}")
        return self


class AdapterConfig(Section):
    kind: Literal["lora", "dora", "lokr"] = Field(
        default="lora",
        description="Low-rank pairs; those with a trained magnitude for each output (dora); or Kronecker products (lokr).",
    )
    rank: Positive = Field(default=16, description="Rank of each low-rank pair.")
    ranks: dict[Pattern, Positive] = Field(
        default_factory=dict, description="Regular expressions searched in module names, with a rank for what they match; the first wins."
    )
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator: the update is alpha/rank * B A; null means alpha = rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    decompose_factor: int = Field(
        default=-1, description="LoKr: the size of the smaller Kronecker factor's sides; -1 makes both factors as equal as can be."
    )
    targets: list[Pattern] | None = Field(
        default=None, description="Regular expressions searched in module names; null adapts every linear layer in the model's blocks."
    )
    exclude: list[Pattern] = Field(default_factory=list, description="Regular expressions of module names never adapted.")
    init: File | None = Field(default=None, description="Adapter file to start from (diffusers, ComfyUI or kohya keys).")


class GroupConfig(Section):
    match: Pattern = Field(description="Regular expression searched in parameter names; the first group that matches takes the parameter.")
    lr: float | None = Field(default=None, ge=0, description="Learning rate of the group; 0 freezes it, null takes optimizer.lr.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay of the group; null takes optimizer.weight_decay.")


class OptimizerConfig(Section):
    kind: str = Field(
        default="adamw",
        min_length=1,
        description="`adamw` (torch), `adamw8bit` (bitsandbytes), `adamw8bit-kahan` (the same, whose small steps move 16-bit weights"
        " too), or any of the pytorch-optimizer package, such as `prodigy`, `adafactor`, `muon`, `lion`, `came`.",
    )
    options: Annotated[dict[str, Any], AfterValidator(numbers_of)] = Field(
        default_factory=dict, description="Further arguments of that optimizer."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="How `adamw` puts a step into bfloat16 weights (model.trainable_dtype): `stochastic` rounds by chance, so that small"
        " steps are not lost; its averages are then bfloat16 too.",
    )
    lr: float = Field(default=1e-4, gt=0, description="Learning rate after warm-up.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="Decay rates of the two moment averages.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay; parameters with one dim never decay.")
    clip: float | None = Field(default=1.0, gt=0, description="Largest global gradient norm over all stages; null does not clip.")
    on_nan: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a step does whose loss or gradient is NaN or infinite: `stop` ends the run, `skip` moves no weights and goes on;"
        " both name the files. Blocks that are stepped in the backward pass cannot be skipped.",
    )
    nan_limit: Positive = Field(default=10, description="Steps in a row, the last of them included, at which `skip` ends the run too.")
    release: bool = Field(
        default=False,
        description="Step each block as soon as its last backward pass of a step is over, so that no gradient outlives it; between"
        " microbatches they wait in host memory unless memory.order is layer. It needs clip null.",
    )
    offload: bool = Field(
        default=False, description="Keep the optimizer's state in host memory; each block's passes through the device when it is stepped."
    )
    groups: list[GroupConfig] = Field(default_factory=list, description="Parameters with rates of their own.")

    @property
    def rule(self) -> str:
        """What moves weights; the state of another is of no use to it."""
        return self.kind if self.rounding == "nearest" else f"{self.kind} with {self.rounding} rounding"


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Shape of the learning rate after warm-up; linear and cosine would reach 0 one step after the last."
    )
    warmup: int = Field(default=0, ge=0, description="Steps over which the rate rises linearly from lr/warmup to lr.")


class AspectConfig(Section):
    min: float = Field(default=0.5, gt=0, description="Smallest width/height.")
    max: float = Field(default=2.0, gt=0, description="Largest width/height.")
    count: Positive = Field(default=7, description="Number of ratios, evenly spaced in log scale.")

    @model_validator(mode="after")
    def _ordered(self) -> AspectConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class CaptionConfig(Section):
    extension: Annotated[str, StringConstraints(to_lower=True)] = Field(
        default=".txt", pattern=r"^\.\w+$", description="Ending of the caption file beside a media file, which has its stem."
    )
    prefix: str = Field(default="", description="Text put before every caption.")
    shuffle: int = Field(
        default=0,
        ge=0,
        description="Variants of each caption with its tags in a drawn order, of which one is shown at a time; 0 keeps it.",
    )
    delimiter: str = Field(default=",", min_length=1, description="What stands between tags.")
    keep: int = Field(default=0, ge=0, description="Tags at the start that stay in their places.")
    dropout: Fraction = Field(default=0.0, description="Share of showings with the empty caption instead, for classifier-free guidance.")


Ratio = Annotated[float, Field(gt=0)]
Size = Annotated[list[Positive], Field(min_length=2, max_length=3)]


class MediaConfig(Section):
    """What a folder may say for itself: a key set there takes the place of the same key of ``data``, as a whole."""

    resolutions: list[Positive] = Field(
        default_factory=lambda: [512],
        min_length=1,
        description="Sides of the square with a bucket's area, in pixels; every sample trains at each.",
    )
    aspect: AspectConfig | list[Ratio] = Field(
        default_factory=AspectConfig, description="Aspect ratios of the buckets: a range, or a list of width/height."
    )
    sizes: list[Size] | None = Field(
        default=None,
        description="Buckets as [width, height] or [width, height, frames], instead of those that resolutions, aspect and frames make;"
        " null leaves it to these.",
    )
    frames: list[Positive] = Field(
        default_factory=lambda: [1],
        min_length=1,
        description="Frame counts of the buckets at the model's frame rate; images always use 1, a video the largest that fits.",
    )
    clips: Literal["first", "middle", "all", "cover"] = Field(
        default="first",
        description="What of a video longer than its bucket trains: the first or the middle clip, all side by side (the rest at the end in"
        " a shorter bucket), or as many as show every frame, overlapping evenly.",
    )
    captions: CaptionConfig = Field(default_factory=CaptionConfig, description="Where captions lie and how they are changed.")
    recursive: bool = Field(default=False, description="Search folders inside the folder too.")


class FolderBase(Section):
    path: Place = Field(
        description="Folder of images, videos and .tar shards with their captions (files of the same name, captions.json or"
        " metadata.jsonl), or `toy:pictures`, `toy:clips`."
    )
    repeats: float = Field(default=1.0, gt=0, description="Times each sample is seen in an epoch; 0.5 shows each in every second epoch.")
    masks: File | None = Field(
        default=None,
        description="Folder of masks, pictures of the same stem and size (with recursive, in folders of the same names too): white trains,"
        " black does not; null trains all.",
    )
    controls: File | None = Field(
        default=None,
        description="Folder of control pictures, one of the same stem for each picture: what the model is shown to make it from, "
        "such as the picture before an edit. Only for families that take them; those need it. Also `toy:greys`.",
    )


_OVERRIDES: dict[str, Any] = {
    name: (field.annotation if field.default is None else field.annotation | None, Field(default=None, description=f"As data.{name}."))  # type: ignore[operator]
    for name, field in MediaConfig.model_fields.items()
}
FolderConfig = create_model("FolderConfig", __base__=FolderBase, **_OVERRIDES)


class DataConfig(MediaConfig):
    folders: list[FolderConfig] = Field(  # pyright: ignore[reportInvalidTypeForm] - made from MediaConfig's fields
        min_length=1, description="Where the training media lie. Null keys of a folder are those of data."
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="What a bad file does: `fail` ends caching with the list of all, `skip` leaves it out and counts it."
    )
    cache_dir: File | None = Field(default=None, description="Where encoded latents and text are kept; null means OUTPUT_DIR/cache.")
    encode_batch: Positive = Field(default=1, description="Samples encoded at once while caching.")
    encode_workers: int = Field(
        default=2, ge=0, description="Processes per rank that decode media while caching; 0 decodes in the process that encodes."
    )
    workers: int = Field(default=2, ge=0, description="Loader processes per rank; 0 loads in the training process.")
    normalize_masks: bool = Field(
        default=False, description="Divide a masked loss by the share of the picture that its mask leaves, so that small masks count fully."
    )

    def of(self, folder: FolderBase) -> MediaConfig:
        """What holds for a folder: its own keys, and those of ``data`` where it has none."""
        return MediaConfig.model_construct(
            **{n: getattr(self, n) if (own := getattr(folder, n)) is None else own for n in MediaConfig.model_fields}
        )


class EvalSetConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name in the metric eval/NAME/loss.")
    folders: list[FolderConfig] = Field(  # pyright: ignore[reportInvalidTypeForm] - made from MediaConfig's fields
        min_length=1, description="Held-out media, with the same keys as data.folders."
    )


class EvalConfig(Section):
    every_steps: Positive | None = Field(default=None, description="Steps between evaluations; one is always made at the end.")
    every_epochs: Positive | None = Field(default=None, description="Epochs between evaluations.")
    at_start: bool = Field(default=True, description="Evaluate before the first step too.")
    quantiles: list[Fraction] = Field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        min_length=1,
        description="Quantiles of the timestep distribution that each sample is evaluated at.",
    )
    sets: list[EvalSetConfig] = Field(default_factory=list, description="Held-out sets.")

    @model_validator(mode="after")
    def _distinct(self) -> EvalConfig:
        names = [s.name for s in self.sets]
        if len(set(names)) != len(names):
            raise ValueError(f"two sets share a name: {names}")
        return self


class PromptConfig(Section):
    prompt: str = Field(description="What is sampled.")
    negative: str | None = Field(default=None, description="What it is guided away from; null is that of preview.")
    seed: Seed | None = Field(default=None, description="Decides its noise; null is that of preview.")
    width: Positive | None = Field(default=None, description="Pixels across; null is that of preview.")
    height: Positive | None = Field(default=None, description="Pixels down; null is that of preview.")
    frames: Positive | None = Field(default=None, description="Frames of a clip; null is that of preview.")
    image: File | None = Field(
        default=None,
        description="Picture that it is made from, scaled and cropped to its size: a clip's first frame, or the picture before an edit."
        " Only for families that take one; those need it.",
    )


def _prompts(given: Any) -> Any:
    """A text alone stands for a prompt without further keys."""
    return [{"prompt": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


PromptList = Annotated[list[PromptConfig], BeforeValidator(_prompts, json_schema_input_type=list[PromptConfig | str])]


class PreviewConfig(Section):
    every_steps: Positive | None = Field(
        default=None, description="Steps between previews; where there are prompts, they are always made at the end."
    )
    every_epochs: Positive | None = Field(default=None, description="Epochs between previews.")
    at_start: bool = Field(default=False, description="Make them before the first step too.")
    prompts: PromptList = Field(
        default_factory=list,
        description="What is sampled, with the weights as they are: texts, or prompts with keys of their own. They are encoded before"
        " training, so a new one takes a resume.",
    )
    steps: Positive = Field(default=20, description="Steps from noise to a picture.")
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="Guidance scale: classifier-free, or that of the guidance embedding (Flux dev, HunyuanVideo), by which"
        " model.guidance is for training alone; null is what the family's pipeline in diffusers takes.",
    )
    negative: str | None = Field(
        default=None,
        description="What prompts are guided away from where they say nothing themselves; null is what the family's pipeline in diffusers"
        " takes. Only for families with classifier-free guidance.",
    )
    seed: Seed = Field(default=0, description="Decides the noise, which is drawn on the CPU and the same on any device and mesh.")
    width: Positive | None = Field(
        default=None, description="Pixels across; null is that of the squarest bucket of the data's largest resolution."
    )
    height: Positive | None = Field(default=None, description="Pixels down; null is that of the same bucket.")
    frames: Positive | None = Field(default=None, description="Frames of a clip; null is that of the longest bucket.")

    @model_validator(mode="after")
    def _has_prompts(self) -> PreviewConfig:
        if not self.prompts and (self.every_steps or self.every_epochs or self.at_start):
            raise ValueError("every_steps, every_epochs and at_start are of no use without prompts; add some")
        return self


class CheckpointConfig(Section):
    every_steps: Positive | None = Field(default=None, description="Steps between checkpoints; one is always written at the end.")
    every_minutes: float | None = Field(default=None, gt=0, description="Minutes between checkpoints.")
    every_epochs: Positive | None = Field(default=None, description="Epochs between checkpoints.")
    keep: Positive = Field(default=3, description="Newest checkpoints kept.")
    keep_best: bool = Field(
        default=False,
        description="Keep also the one with the lowest held-out loss, the mean of all eval.sets, however old it is. An evaluation behind a"
        " step that gives the lowest so far writes one. `diffpipe export RUN --checkpoint best` takes it.",
    )
    background: bool = Field(
        default=True,
        description="Write while training goes on, from a copy in host memory of as many bytes; false copies nothing and waits.",
    )


class ExportConfig(Section):
    every_steps: Positive | None = Field(default=None, description="Steps between exports; one is always written at the end.")
    every_epochs: Positive | None = Field(default=None, description="Epochs between exports.")
    formats: list[ExportFormat] = Field(
        default_factory=lambda: ["diffusers"],
        min_length=1,
        description="Names of `diffusers`, of `comfyui` (the original checkpoint's), or of `kohya` (adapters only).",
    )
    dtype: DType | None = Field(default=None, description="Type of exported weights; null keeps model.dtype.")


class MemoryConfig(Section):
    budget: Bytes | None = Field(
        default=None,
        description="Most that each stage may hold on its device, such as 12GiB: of recompute, recompute_every, swap and offload those that"
        " are not set are chosen to fit it at the least time. null leaves them as they are.",
    )
    host_budget: Bytes | None = Field(
        default=None,
        description="Most that each stage may hold in host memory: streamed weights, state and activations that wait there. null is what"
        " is free at the start, shared out among a machine's processes (`diffpipe plan` then knows no limit).",
    )
    on_oom: Literal["stop", "adapt"] = Field(
        default="stop",
        description="What a step that runs out of device memory does: `stop` ends the run and says what would make it fit; `adapt`"
        " recomputes, streams or offloads more, whatever these keys say, and repeats the step with the same noise (needs mesh.stages 1).",
    )
    recompute: Recompute = Field(
        default="block",
        description="What of a block the backward pass computes again: `block` all but what goes in; `selective` keeps the results of"
        " attention to 1024 tokens or more and, compiled, of the widest layers, where a gate that trains multiplies them; `parts` keeps"
        " also what passes between a block's parts, so that these are computed again one at a time, the least at once (needs compile, and"
        " is best with offload); `none` keeps all.",
    )
    recompute_every: Positive = Field(default=1, description="Recompute in every k-th block only.")
    recompute_kinds: dict[str, Recompute] = Field(
        default_factory=dict,
        description="What `recompute` says, for blocks of one kind, by the name of their class: `FluxTransformerBlock: block`. Where"
        " weights stream and activations are offloaded, a kind whose copies take longer than its computation is faster if it keeps less.",
    )
    feed_forward_chunks: Positive = Field(
        default=1,
        description="Parts that the tokens pass the feed-forward layers of a block in, one after another: these are several times"
        " wider than the rest, and of that width only a part is then held at once. With compile it needs recompute; without, each part"
        " is computed again in the backward pass.",
    )
    swap: Annotated[int, Field(ge=0)] | Literal["all", "auto"] = Field(
        default=0,
        description="Blocks of each stage whose weights lie in host memory and stream to the device as they are used; `auto` is as few as"
        " fit budget, or without one what is free on the device at the start. Weights that train are stepped as by optimizer.release, their"
        " state kept as by optimizer.offload; that needs optimizer.clip null.",
    )
    room: float | None = Field(
        default=None, gt=0, description="MiB on the device that streamed weights share; null is what two blocks take, the least there is."
    )
    pin: bool = Field(
        default=True, description="Page-lock streamed weights in host memory; false is slower, for machines that may not lock as much."
    )
    order: Literal["microbatch", "layer"] | None = Field(
        default=None,
        description="`microbatch` takes each microbatch through all blocks; `layer` takes all through a block before the next, so that"
        " a streamed block comes once for all, but what each saves is kept for all of them. It needs mesh.stages 1. null is `layer` where"
        " that holds, blocks stream and activations are offloaded.",
    )
    offload: bool = Field(default=False, description="Move saved activations to host memory between forward and backward.")
    offload_threshold: float = Field(default=16.0, gt=0, description="MiB from which a saved activation is moved.")
    quantize: Literal["none", "fp8", "fp8-plain", "fp8-block", "fp7", "nf4"] = Field(
        default="none",
        description="Kept form of the linear weights in blocks that adapters leave frozen: `fp8` (e4m3, scaled by row), `fp8-plain`"
        " (e4m3, not scaled), `fp8-block` (e4m3, scaled by 128 x 128 values), `fp7` (e3m3, scaled by row: an eighth less to hold and"
        " to copy, as near), `nf4` (4 bits, scaled by 64 values). What a file has in e4m3 each fp8 kind takes as it is, with the file's"
        " scales.",
    )
    products: bool | None = Field(
        default=None,
        description="Multiply `fp8`, `fp8-plain` and `fp7` weights in fp8 (Ada, Hopper and later cards); null does where the card can."
        " Those of `fp8-block` and `nf4` are always brought to model.dtype first.",
    )
    compile: bool = Field(default=False, description="Compile each block with torch.compile, once for each kind of block and bucket.")
    cuda_graphs: bool = Field(
        default=False,
        description="Capture the passes of a step as a CUDA graph, once for each bucket, and replay it: faster where the device waits for"
        " the host, as at one sample a step. What a step holds of activations is taken twice while a further bucket is first met. It"
        " needs a CUDA device, one process, and weights that are stepped behind the backward pass.",
    )

    def policy_of(self, unit: int, kind: str) -> str:
        """What the backward pass of a unit computes again, as ``recompute`` has it.

        Args:
            unit: its number within its stage.
            kind: its class's name.
        """
        return self.recompute_kinds.get(kind, self.recompute) if unit % self.recompute_every == 0 else "none"

    @property
    def policies(self) -> set[str]:
        """All that blocks may have."""
        return {self.recompute, *self.recompute_kinds.values()}

    @model_validator(mode="after")
    def _recompute_fits(self) -> MemoryConfig:
        if "parts" in self.policies and not self.compile:
            key = "recompute" if self.recompute == "parts" else "recompute_kinds"
            raise ValueError(f"{key} is parts, which needs compile: true; or set {key} to selective")
        return self

    @model_validator(mode="after")
    def _chunks_fit(self) -> MemoryConfig:
        if self.feed_forward_chunks > 1 and self.compile and "none" in self.policies:
            key = "recompute" if self.recompute == "none" else "recompute_kinds"
            raise ValueError(f"feed_forward_chunks is no use where compiled blocks keep all; set {key} to block, selective or parts")
        return self

    @model_validator(mode="after")
    def _products_fit(self) -> MemoryConfig:
        if self.products and self.quantize not in ("fp8", "fp8-plain", "fp7"):
            raise ValueError(f"products is true, which quantize: {self.quantize} has no use for; set it to null, or take fp8")
        return self


class WandbConfig(Section):
    project: str = Field(default="diffpipe", min_length=1, description="Project that runs are put into.")
    entity: str | None = Field(default=None, description="User or team that it belongs to; null is your default one.")
    name: str | None = Field(default=None, description="Name of the run; null is that of its folder.")


class MetricsConfig(Section):
    every_steps: Positive = Field(default=1, description="Steps between records on screen and in TensorBoard.")
    wandb: WandbConfig | None = Field(
        default=None,
        description="Record in Weights & Biases too, such as {project: mine}; null does not. It needs the package (pip install"
        " 'diffpipe[wandb]'), and your key in the environment variable WANDB_API_KEY: it is never written anywhere.",
    )


class Config(Section):
    output_dir: File = Field(default=Path("runs"), description="Folder that run folders, named by their start time, are made in.")
    run: RunConfig = Field(description="How long, and from which seed.")
    mesh: MeshConfig = Field(
        default_factory=MeshConfig, description="How processes share the work; torchrun must start stages x replicate x shard of them."
    )
    batch: BatchConfig = Field(default_factory=BatchConfig, description="Samples per step.")
    model: ModelConfig = Field(description="What is trained.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Timesteps.")
    adapter: AdapterConfig | None = Field(default=None, description="Adapter to train; null trains all weights.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="How weights move.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over steps.")
    data: DataConfig = Field(description="What is trained on.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Held-out loss.")
    preview: PreviewConfig = Field(default_factory=PreviewConfig, description="Pictures and clips sampled while training.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What a run needs to go on.")
    export: ExportConfig = Field(default_factory=ExportConfig, description="What a person takes away.")
    memory: MemoryConfig = Field(default_factory=MemoryConfig, description="Memory against time.")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="What is recorded.")

    def begun(self) -> Config:
        """This config for weights that a checkpoint holds, where the file that the adapter began with is no more needed."""
        if self.adapter is None:
            return self
        return self.model_copy(update={"adapter": self.adapter.model_copy(update={"init": None})})

    @property
    def steps_in_backward(self) -> bool:
        """Whether blocks are stepped in the backward pass: because weights that train stream, or all are to be released."""
        return self.optimizer.release or (self.adapter is None and bool(self.memory.swap))

    @property
    def shards_trained(self) -> bool:
        """Whether ranks share weights that train."""
        return self.mesh.shard > 1 and self.adapter is None

    @model_validator(mode="after")
    def _stepping_fits(self) -> Config:
        if self.steps_in_backward and self.optimizer.clip is not None:
            why = "optimizer.release is true" if self.optimizer.release else "memory.swap streams weights that train (no adapter section)"
            raise ValueError(
                f"{why}, so that blocks are stepped in the backward pass: optimizer.clip must be null, found {self.optimizer.clip},"
                " since the norm is known only behind it"
            )
        return self

    @model_validator(mode="after")
    def _skipping_fits(self) -> Config:
        if self.steps_in_backward and self.optimizer.on_nan == "skip":
            raise ValueError(
                "optimizer.on_nan is skip, but blocks are stepped in the backward pass (optimizer.release, or memory.swap without"
                " adapter), before it shows what is not finite; set it to stop"
            )
        return self

    @model_validator(mode="after")
    def _adapting_fits(self) -> Config:
        if self.memory.on_oom == "adapt" and (self.mesh.stages > 1 or self.adapter is None or self.optimizer.release):
            raise ValueError(
                "memory.on_oom is adapt, which needs mesh.stages 1, an adapter section and no optimizer.release; set it to stop"
            )
        return self

    @model_validator(mode="after")
    def _capturing_fits(self) -> Config:
        mesh = self.mesh
        found = [
            (
                mesh.stages * mesh.replicate * mesh.shard > 1,
                "mesh.stages, replicate and shard must be 1: a graph waits for no other process",
            ),
            (self.optimizer.release, "optimizer.release must be false: steps of the optimizer are no part of a graph"),
            (
                self.adapter is None and bool(self.memory.swap),
                "memory.swap must be 0 without an adapter section: streamed weights are stepped in the backward pass",
            ),
            (bool(self.memory.swap) and not self.memory.pin, "memory.pin must be true: a graph copies from page-locked memory alone"),
        ]
        faults = [told for unfit, told in found if unfit]
        if self.memory.cuda_graphs and faults:
            raise ValueError(f"memory.cuda_graphs is true, so {'; '.join(faults)}; or set it to false")
        return self

    @model_validator(mode="after")
    def _order_fits(self) -> Config:
        if self.memory.order == "layer" and self.mesh.stages > 1:
            raise ValueError(f"memory.order is layer, which needs mesh.stages 1, found {self.mesh.stages}; set it to microbatch or null")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Config:
        count, stages, schedule = self.batch.accumulate, self.mesh.stages, self.mesh.schedule
        named = schedule in IN_ROUNDS
        if (named or (self.mesh.spans or 1) > 1) and not fills_rounds(count, stages):
            told = f"mesh.schedule is {schedule}" if named else f"mesh.spans is {self.mesh.spans}"
            raise ValueError(
                f"{told}, which takes microbatches through in rounds of one size: batch.accumulate must be a multiple of mesh.stages"
                f" {stages}, or less than twice it, found {count}"
            )
        if self.mesh.memory is not None and self.memory.budget is not None:
            raise ValueError("mesh.memory and memory.budget both say what stages may hold; set one of them to null")
        if schedule == "zero-bubble" and (faults := self.against_zero_bubble):
            raise ValueError(f"mesh.schedule is zero-bubble, so {'; '.join(faults)}; or take another schedule")
        return self

    @property
    def against_zero_bubble(self) -> list[str]:
        """Why the gradients of weights cannot wait, with what would cure it."""
        memory = self.memory
        found = [
            (self.adapter is not None, "adapter must be null: where weights are frozen there is nothing that can wait"),
            (
                memory.policies != {"none"},
                "memory.recompute must be none, as must all recompute_kinds: each part of a pass would compute all again",
            ),
            (memory.budget is not None, "memory.budget must be null: what it might choose is none of these"),
            (memory.swap != 0, "memory.swap must be 0: weights would be gone before their gradients are computed"),
            (memory.offload, "memory.offload must be false: activations come back once"),
            (memory.compile, "memory.compile must be false: a compiled backward pass has no parts"),
            (self.optimizer.release, "optimizer.release must be false: gradients are complete only behind the backward pass"),
            (self.mesh.shard > 1, "mesh.shard must be 1: FSDP shares gradients out in the backward pass"),
        ]
        return [told for unfit, told in found if unfit]

    @model_validator(mode="after")
    def _sharding_fits(self) -> Config:
        if self.mesh.shard == 1:
            return self
        found = [
            (self.memory.swap != 0, "memory.swap", 0, "which of its weights a rank holds is decided by the shard"),
            (self.memory.order == "layer", "memory.order", "microbatch or null", "a block is whole for one microbatch at a time"),
            (self.memory.on_oom == "adapt", "memory.on_oom", "stop", "no rank can repeat a step alone"),
            (self.optimizer.release, "optimizer.release", False, "a gradient is shared out before it can be stepped"),
            (self.optimizer.offload, "optimizer.offload", False, "a rank's share of the state is kept beside its shard"),
        ]
        faults = [f"{key} must be {wanted}: {why}" for unfit, key, wanted, why in found if unfit]
        if faults:
            raise ValueError(f"mesh.shard is {self.mesh.shard}, so {'; '.join(faults)}")
        return self

    @model_validator(mode="after")
    def _best_is_judged(self) -> Config:
        if self.checkpoint.keep_best and not self.eval.sets:
            raise ValueError(
                "checkpoint.keep_best is true, but there are no eval.sets that tell which is best; add one, or set it to false"
            )
        return self

    @model_validator(mode="after")
    def _something_is_quantized(self) -> Config:
        if self.memory.quantize != "none" and self.adapter is None:
            raise ValueError(f"memory.quantize is {self.memory.quantize}, but without an adapter section all weights train; set it to none")
        return self
