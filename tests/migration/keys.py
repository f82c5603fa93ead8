"""Every key of diffusion-pipe's configs, of its first and its latest version, with a value and what it becomes here.

A row is the table, the key with its value, what becomes of it, the keys here with their values, and more of the same table where
the key needs it. Tables are named as they are told of: nothing for the top, ``model.`` and so on. In ``type TABLE`` the model is that type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CARRIED, CHANGED, LEFT = "carried", "changed", "left out"


class Row(NamedTuple):
    table: str
    text: str
    outcome: str
    here: dict[str, Any] = {}  # noqa: RUF012 - never changed
    more: str = ""
    kind: str = "flux"
    top: str = ""

    @property
    def key(self) -> str:
        return self.text.partition("=")[0].strip()


def left(table: str, *keys: str, kind: str = "flux") -> list[Row]:
    return [Row(table, f"{key} = 1", LEFT, kind=kind) for key in keys]


TOP = [
    Row("", "output_dir = 'out'", CARRIED, {"output_dir": "out"}),
    Row("", "dataset = 'data.toml'", CARRIED),
    Row("", "eval_datasets = [{name = 'held out', config = 'data.toml'}]", CARRIED, {"eval.sets.0.name": "held_out"}),
    Row("", "epochs = 7", CARRIED, {"run.epochs": 7}),
    Row("", "max_steps = 70", CARRIED, {"run.steps": 70}),
    Row("", "micro_batch_size_per_gpu = 3", CARRIED, {"batch.micro": 3}),
    Row("", "micro_batch_size_per_gpu = [[512, 4], [1024, 2]]", CHANGED, {"batch.micro": 2}),
    Row("", "image_micro_batch_size_per_gpu = 8", LEFT),
    Row("", "gradient_accumulation_steps = 6", CARRIED, {"batch.accumulate": 6}),
    Row("", "pipeline_stages = 2", CARRIED, {"mesh.stages": 2}),
    Row("", "gradient_clipping = 0.5", CARRIED, {"optimizer.clip": 0.5}),
    Row("", "gradient_clipping = 0", CHANGED, {"optimizer.clip": None}),
    Row("", "warmup_steps = 10", CHANGED, {"schedule.warmup": 11}),
    Row("", "warmup_steps = 0", CARRIED, {"schedule.warmup": 0}),
    Row("", "lr_scheduler = 'cosine'", CARRIED, {"schedule.kind": "cosine"}),
    Row("", "force_constant_lr = 3e-5", CHANGED, {"optimizer.lr": 3e-5, "schedule.kind": "constant", "schedule.warmup": 0}),
    Row("", "blocks_to_swap = 20", CHANGED, {"memory.swap": 31}),
    Row("", "blocks_to_swap = 20", CHANGED, {"memory.swap": 20}, kind="wan"),
    Row("", "blocks_to_swap = 20", LEFT, {"memory.swap": 0}, top="pipeline_stages = 2"),
    Row("", "disable_block_swap_for_eval = true", LEFT),
    Row("", "activation_checkpointing = false", CHANGED, {"memory.recompute": "none"}),
    Row("", "activation_checkpointing = true", CHANGED, {"memory.recompute": "block", "memory.offload": False}),
    Row("", "activation_checkpointing = 'unsloth'", CHANGED, {"memory.recompute": "block", "memory.offload": True}),
    Row("", "reentrant_activation_checkpointing = true", LEFT),
    Row("", "partition_method = 'parameters'", CARRIED, {"mesh.split": "parameters"}),
    Row("", "partition_method = 'uniform'", LEFT, {"mesh.split": "auto"}),
    Row("", "partition_split = [21]", CHANGED, {"mesh.split": [19]}, top="partition_method = 'manual'\npipeline_stages = 2"),
    Row("", "partition_split = [4]", LEFT, {"mesh.split": "auto"}),
    Row("", "eval_every_n_epochs = 1", CARRIED, {"eval.every_epochs": 1}),
    Row("", "eval_every_n_steps = 50", CARRIED, {"eval.every_steps": 50}),
    Row("", "eval_every_n_examples = 100", CHANGED, {"eval.every_steps": 16}, top="gradient_accumulation_steps = 6"),
    Row("", "eval_every_n_examples = 5", LEFT, {"eval.every_steps": None}, top="gradient_accumulation_steps = 6"),
    Row("", "eval_before_first_step = true", CARRIED, {"eval.at_start": True}),
    Row("", "eval_before_first_step = false", CARRIED, {"eval.at_start": False}),
    *left("", "eval_micro_batch_size_per_gpu", "eval_image_micro_batch_size_per_gpu", "image_eval_micro_batch_size_per_gpu"),
    *left("", "eval_gradient_accumulation_steps"),
    Row("", "save_every_n_epochs = 2", CARRIED, {"export.every_epochs": 2}),
    Row("", "save_every_n_steps = 200", CARRIED, {"export.every_steps": 200}),
    Row("", "save_every_n_examples = 100", CHANGED, {"export.every_steps": 100}),
    Row("", "checkpoint_every_n_epochs = 1", CARRIED, {"checkpoint.every_epochs": 1}),
    Row("", "checkpoint_every_n_minutes = 120", CARRIED, {"checkpoint.every_minutes": 120.0}),
    Row("", "save_dtype = 'float16'", CARRIED, {"export.dtype": "float16"}),
    Row("", "save_dtype = 'float8'", LEFT, {"export.dtype": None}),
    Row("", "caching_batch_size = 4", CARRIED, {"data.encode_batch": 4}),
    Row("", "map_num_proc = 8", CHANGED, {"data.encode_workers": 4}, top="pipeline_stages = 2"),
    Row("", "steps_per_print = 5", LEFT, {"metrics.every_steps": 1}),
    Row("", "logging_steps = 5", CARRIED, {"metrics.every_steps": 5}),
    Row("", "video_clip_mode = 'single_beginning'", CHANGED, {"data.clips": "first"}),
    Row("", "video_clip_mode = 'single_middle'", CHANGED, {"data.clips": "middle"}),
    Row("", "video_clip_mode = 'multiple_overlapping'", CHANGED, {"data.clips": "cover"}),
    *left("", "resume_from_checkpoint", "regenerate_cache", "x_axis_examples", "pseudo_huber_c"),
    Row("", "uncond_fraction = 0.1", CARRIED, {"data.captions.dropout": 0.1}),
    Row("", "compile = true", CARRIED, {"memory.compile": True}),
    Row("", "huber_delta = 0.2", CHANGED, {"objective.loss": "huber", "objective.delta": 0.2}),
    Row("", "smooth_l1_beta = 0.3", CHANGED, {"objective.loss": "smooth_l1", "objective.delta": 0.3}),
    Row("", "smooth_l1_beta = 0.3", LEFT, {"objective.loss": "huber"}, top="huber_delta = 0.2"),
    Row("monitoring.", "enable_wandb = true", CARRIED, {"metrics.wandb.project": "diffpipe"}),
    Row("monitoring.", "wandb_tracker_name = 'mine'\nenable_wandb = true", CARRIED, {"metrics.wandb.project": "mine"}),
    Row("monitoring.", "wandb_run_name = 'first'\nenable_wandb = true", CARRIED, {"metrics.wandb.name": "first"}),
    *left("monitoring.", "wandb_api_key", "wandb_tracker_name", "wandb_run_name"),
    Row("monitoring.", "enable_wandb = false", LEFT, {"metrics.wandb": None}),
]
ADAPTER = [
    Row("adapter.", "type = 'lora'", CARRIED, {"adapter.kind": "lora"}),
    Row("adapter.", "type = 'lokr'", CARRIED, {"adapter.kind": "lokr"}),
    Row("adapter.", "rank = 8", CARRIED, {"adapter.rank": 8}),
    Row("adapter.", "rank = 1e6", CHANGED, {"adapter.rank": 1_000_000}),
    Row("adapter.", "alpha = 4", CARRIED, {"adapter.alpha": 4.0}),
    Row("adapter.", "dropout = 0.1", CARRIED, {"adapter.dropout": 0.1}),
    Row("adapter.", "dtype = 'bfloat16'", CARRIED, {"model.trainable_dtype": "bfloat16"}),
    Row("adapter.", "dtype = 'float16'", CHANGED, {"model.trainable_dtype": "float32"}),
    Row("adapter.", "init_from_existing = 'runs/epoch5'", CHANGED, {"adapter.init": "runs/epoch5/pytorch_lora_weights.safetensors"}),
    Row("adapter.", "init_from_existing = 'runs/epoch5'", CHANGED, {"adapter.init": "runs/epoch5/lora.safetensors"}, kind="sdxl"),
    Row(
        "adapter.",
        "fuse_adapters = [{path = 'a.safetensors', weight = 0.5}]",
        CHANGED,
        {"model.merge": [{"path": "a.safetensors", "weight": 0.5}]},
    ),
    Row("adapter.", "exclude_modules = ['to_out.0']", CHANGED, {"adapter.exclude": [r"(?:^|\.)to_out\.0$"]}),
    Row("adapter.", "exclude_modules = ['ffn.0']", LEFT, {"adapter.exclude": []}, kind="wan"),
    Row("adapter.", "decompose_factor = 4", CARRIED, {"adapter.decompose_factor": 4}),
    Row("adapter.", "rank_dropout = 0.1", LEFT),
]


def optimizer(kind: str, text: str, outcome: str, here: dict[str, Any] | None = None) -> Row:
    return Row("optimizer.", text, outcome, here or {}, more=f"type = '{kind}'", top="gradient_accumulation_steps = 4")


OPTIMIZER = [
    Row("optimizer.", "type = 'adamw'", CARRIED, {"optimizer.kind": "adamw"}),
    Row("optimizer.", "type = 'AdamW8bit'", CHANGED, {"optimizer.kind": "adamw8bit"}),
    Row(
        "optimizer.",
        "type = 'adamw_optimi'",
        CHANGED,
        {"optimizer.kind": "adamw", "model.trainable_dtype": "float32", "optimizer.eps": 1e-6},
    ),
    Row("optimizer.", "type = 'stableadamw'", CARRIED, {"optimizer.kind": "stableadamw", "optimizer.weight_decay": 0.0}),
    Row("optimizer.", "type = 'sgd'", CARRIED, {"optimizer.kind": "sgd", "optimizer.weight_decay": 0.0}),
    Row("optimizer.", "type = 'AdamW8bitKahan'", CHANGED, {"optimizer.kind": "adamw8bit-kahan", "model.trainable_dtype": "bfloat16"}),
    Row("optimizer.", "type = 'offload'", CHANGED, {"optimizer.kind": "adamw", "optimizer.offload": True}),
    Row("optimizer.", "type = 'automagic'", CHANGED, {"optimizer.kind": "adamw"}),
    Row("optimizer.", "type = 'genericoptim'", CHANGED, {"optimizer.kind": "adamw"}),
    Row("optimizer.", "type = 'Prodigy'", CHANGED, {"optimizer.kind": "prodigy", "optimizer.weight_decay": 0.0}),
    Row("optimizer.", "lr = 3e-4", CARRIED, {"optimizer.lr": 3e-4}),
    Row("optimizer.", "betas = [0.9, 0.98]", CARRIED, {"optimizer.betas": (0.9, 0.98)}),
    Row("optimizer.", "eps = 1e-7", CARRIED, {"optimizer.eps": 1e-7}),
    Row("optimizer.", "weight_decay = 0.1", CARRIED, {"optimizer.weight_decay": 0.1}),
    Row("optimizer.", "gradient_release = true", CHANGED, {"optimizer.release": True, "optimizer.clip": None}),
    optimizer("genericoptim", "beta2_half_life = 4", CHANGED, {"optimizer.betas": (0.9, 0.5)}),
    optimizer("AdamW8bitKahan", "stabilize = false", LEFT),
    optimizer("Prodigy", "d_coef = 2.0", CARRIED, {"optimizer.options": {"d_coef": 2.0}}),
    optimizer("sgd", "momentum = 0.9", CARRIED, {"optimizer.options": {"momentum": 0.9}}),
    optimizer("adamw", "amsgrad = true", LEFT),
    *(
        optimizer("automagic", f"{key} = 1", LEFT)
        for key in (
            "lr",
            "min_lr",
            "max_lr",
            "lr_bump",
            "eps",
            "clip_threshold",
            "beta2",
            "do_paramiter_swapping",
            "paramiter_swapping_factor",
        )
    ),
    optimizer("automagic", "weight_decay = 0.2", CARRIED, {"optimizer.weight_decay": 0.2}),
    *(
        optimizer("genericoptim", f"{key} = true", LEFT)
        for key in (
            *("correct_bias", "momentum_type", "second_moment_type", "correct_dim", "kahan_buffer_offload", "polar_express", "automagic"),
            *("min_lr", "max_lr", "lr_bump", "lr_decrease_factor", "skip_invalid_grads", "rank", "proj_type", "update_proj_gap"),
        )
    ),
    optimizer("genericoptim", "cpu_offload = true", CARRIED, {"optimizer.offload": True}),
    optimizer("genericoptim", "muon = true", CARRIED, {"optimizer.kind": "muon"}),
    optimizer("genericoptim", "adamuon = true", CARRIED, {"optimizer.kind": "adamuon"}),
    optimizer("genericoptim", "normuon = true", CARRIED, {"optimizer.kind": "normuon"}),
]


def model(kind: str, text: str, outcome: str, here: dict[str, Any] | None = None, more: str = "") -> Row:
    return Row("model.", text, outcome, here or {}, more, kind)


MODEL = [
    *(
        model(kind, f"type = '{kind}'", CARRIED, {"model.family": kind})
        for kind in ("sdxl", "flux", "ltx-video", "hunyuan-video", "cosmos", "wan", "chroma")
    ),
    model("lumina_2", "type = 'lumina_2'", CHANGED, {"model.family": "lumina2"}),
    model("flux", "dtype = 'float16'", CARRIED, {"model.dtype": "float16"}),
    model("flux", "transformer_dtype = 'float8'", CHANGED, {"memory.quantize": "fp8-plain", "memory.products": False}),
    model("wan", "transformer_dtype = 'float8_e4m3fn'", CHANGED, {"memory.quantize": "fp8-plain"}),
    model("chroma", "transformer_dtype = 'float8_e5m2'", CHANGED, {"memory.quantize": "fp8"}),
    model("flux", "transformer_dtype = 'nf4'", CARRIED, {"memory.quantize": "nf4"}),
    model("flux", "transformer_dtype = 'bfloat16'", CARRIED, {"memory.quantize": "none"}),
    model("sdxl", "transformer_dtype = 'float8'", LEFT, {"memory.quantize": "none"}),
    model("flux", "timestep_sample_method = 'uniform'", CARRIED, {"objective.timesteps": "uniform"}),
    model("cosmos", "timestep_sample_method = 'uniform'", LEFT, {"objective.timesteps": None}),
    model("wan", "sigmoid_scale = 1.5", CARRIED, {"objective.scale": 1.5}),
    model("wan", "shift = 3", CARRIED, {"objective.shift": 3.0}),
    model("wan", "shift = 0", CHANGED, {"objective.shift": None}),
    model("ltx-video", "shift = 3", LEFT, {"objective.shift": None}),
    model("flux", "flux_shift = true", CHANGED, {"objective.shift": "resolution"}),
    model("chroma", "flux_shift = true", LEFT, {"objective.shift": 2.0}, more="shift = 2"),
    model("lumina_2", "lumina_shift = true", CHANGED, {"objective.shift": "resolution"}),
    model("hunyuan-video", "guidance = 6.0", CARRIED, {"model.guidance": 6.0}),
    model("chroma", "guidance = 6.0", LEFT, {"model.guidance": 1.0}),
    model("wan", "min_t = 0.4", CARRIED, {"objective.min_t": 0.4}),
    model("wan", "max_t = 0.8", CARRIED, {"objective.max_t": 0.8}),
    model("wan", "cache_text_embeddings = false", LEFT),
    model("wan", "text_encoder_fp8 = true", LEFT),
    model("sdxl", "checkpoint_path = 'xl.safetensors'", CARRIED, {"model.path": "xl.safetensors"}),
    model("sdxl", "v_pred = true", CHANGED, {"objective.prediction": "v"}),
    model("sdxl", "min_snr_gamma = 5", CARRIED, {"objective.min_snr": 5.0}),
    model("sdxl", "debiased_estimation_loss = true", CARRIED, {"objective.debiased": True}),
    model("sdxl", "debiased_estimation_loss = false", CHANGED, {"objective.debiased": False}),
    model("sdxl", "unet_lr = 4e-5", CARRIED, {"optimizer.groups.0.match": "^unet\\.", "optimizer.groups.0.lr": 4e-5}),
    model("sdxl", "text_encoder_1_lr = 2e-5", CARRIED, {"optimizer.groups.0.match": "^text_encoder\\.", "model.train_text_encoders": True}),
    model("sdxl", "text_encoder_2_lr = 2e-5", CARRIED, {"optimizer.groups.0.match": "^text_encoder_2\\."}),
    Row("model.", "unet_lr = 4e-5", LEFT, {"optimizer.lr": 1e-5, "optimizer.groups": []}, kind="sdxl", top="force_constant_lr = 1e-5"),
    model("sdxl", "text_encoder_1_lr = 0", CHANGED, {"model.train_text_encoders": False}, more="text_encoder_2_lr = 0"),
    model("flux", "diffusers_path = 'FLUX'", CARRIED, {"model.path": "FLUX"}),
    model("flux", "transformer_path = 'f.safetensors'", CARRIED, {"model.files.transformer": "f.safetensors"}),
    model("flux", "bypass_guidance_embedding = true", LEFT),
    model("ltx-video", "single_file_path = 'ltx.safetensors'", CARRIED, {"model.path": "ltx.safetensors"}),
    model(
        "ltx-video",
        "diffusers_path = 'LTX'",
        CHANGED,
        {"model.files.text_encoder": "LTX/text_encoder", "model.files.tokenizer": "LTX/tokenizer"},
        more="single_file_path = 'ltx.safetensors'",
    ),
    model("ltx-video", "diffusers_path = 'LTX'", CARRIED, {"model.path": "LTX"}),
    model("ltx-video", "first_frame_conditioning_p = 1.0", LEFT),
    model("hunyuan-video", "ckpt_path = 'ck'", CHANGED, {"model.files.vae": "ck/hunyuan-video-t2v-720p/vae/pytorch_model.pt"}),
    model("hunyuan-video", "transformer_path = 'h.safetensors'", CARRIED, {"model.files.transformer": "h.safetensors"}, "ckpt_path = 'ck'"),
    model("hunyuan-video", "vae_path = 'v.safetensors'", CARRIED, {"model.files.vae": "v.safetensors"}),
    model("hunyuan-video", "llm_path = 'llama'", CARRIED, {"model.files.text_encoder": "llama", "model.files.tokenizer": "llama"}),
    model("hunyuan-video", "clip_path = 'clip'", CARRIED, {"model.files.text_encoder_2": "clip", "model.files.tokenizer_2": "clip"}),
    model("cosmos", "text_encoder_path = 't5.safetensors'", CARRIED, {"model.files.text_encoder": "t5.safetensors"}),
    model("lumina_2", "llm_path = 'gemma.safetensors'", CARRIED, {"model.files.text_encoder": "gemma.safetensors"}),
    model("wan", "ckpt_path = 'Wan2.1-T2V-1.3B'", CHANGED, {"model.files.tokenizer": "Wan2.1-T2V-1.3B/google/umt5-xxl"}),
    model("wan", "ckpt_path = 'Wan2.1-T2V-14B'", CHANGED, {"model.files.transformer": "Wan2.1-T2V-14B"}),
    model("wan", "type = 'wan'", CHANGED, {"model.family": "wan-i2v"}, more="ckpt_path = 'Wan2.1-I2V-14B-480P'"),
    model("chroma", "diffusers_path = 'FLUX'", CHANGED, {"model.files.text_encoder": "FLUX/text_encoder_2"}),
    *left(
        "model.",
        *(
            "llama3_path",
            "llama3_4bit",
            "max_llama3_sequence_length",
            "t5_path",
            "text_encoder_nf4",
            "multiscale_loss_weight",
            "self_attn_lr",
        ),
        *("cross_attn_lr", "mlp_lr", "mod_lr", "llm_adapter_lr", "llm_adapter_path", "byt5_path", "max_sequence_length", "diffusion_model"),
        *("vae", "text_encoders", "text_encoder", "diffusion_model_dtype", "merge_adapters", "audio_vae", "cfg", "image_shift"),
    ),
]


def data(text: str, outcome: str, here: dict[str, Any] | None = None, more: str = "") -> list[Row]:
    """A key of the dataset config, at its top and in a directory."""
    return [Row(table, text, outcome, here or {}, more) for table in ("dataset: ", "dataset: directory.0.")]


DATA = [
    Row("dataset: ", "directory = [{path = 'a'}, {path = 'b', num_repeats = 2}]", CARRIED, {"data.folders.1.repeats": 2.0}),
    Row("dataset: directory.0.", "path = 'pictures'", CARRIED, {"data.folders.0.path": "pictures"}),
    Row("dataset: directory.0.", "mask_path = 'masks'", CARRIED, {"data.folders.0.masks": "masks"}),
    Row("dataset: directory.0.", "default_mask_file = 'mask.png'", LEFT),
    Row("dataset: directory.0.", "control_path = 'before'", CARRIED, {"model.family": "flux-kontext", "data.folders.0.controls": "before"}),
    Row("dataset: directory.0.", "control_path = 'before'", LEFT, {"data.folders.0.controls": None}, kind="wan"),
    Row("dataset: directory.0.", "control_paths = ['a', 'b']", LEFT),
    *data("resolutions = [768, 512, 512]", CARRIED, {"data.resolutions": [512, 768]}),
    *data("resolutions = [[1280, 720]]", CHANGED, {"data.resolutions": [960]}),
    *data("enable_ar_bucket = false", CHANGED, {"data.aspect": [1.0]}),
    *data("enable_ar_bucket = true", CARRIED, {"data.aspect.count": 9}, more="min_ar = 0.4\nmax_ar = 2.5\nnum_ar_buckets = 9"),
    *data("min_ar = 0.4", CARRIED, {"data.aspect.min": 0.4}, more="enable_ar_bucket = true\nmax_ar = 2.5\nnum_ar_buckets = 9"),
    *data("max_ar = 2.5", CARRIED, {"data.aspect.max": 2.5}, more="enable_ar_bucket = true\nmin_ar = 0.4\nnum_ar_buckets = 9"),
    *data("num_ar_buckets = 9", CARRIED, {"data.aspect.count": 9}, more="enable_ar_bucket = true\nmin_ar = 0.4\nmax_ar = 2.5"),
    *data("ar_buckets = [1.0, 1.5]", CARRIED, {"data.aspect": [1.0, 1.5]}, more="enable_ar_bucket = true"),
    *data("ar_buckets = [[512, 512], [448, 560]]", CHANGED, {"data.aspect": [1.0, 0.8]}, more="enable_ar_bucket = true"),
    *data("frame_buckets = [1, 33]", CARRIED, {"data.frames": [1, 33]}),
    *data("size_buckets = [[960, 704, 1]]", CARRIED, {"data.sizes": [[960, 704, 1]]}),
    *data("num_repeats = 2.5", CARRIED, {"data.folders.0.repeats": 2.5}),
    *data("shuffle_tags = true", CHANGED, {"data.captions.shuffle": 1, "data.folders.0.repeats": 1.0}),
    *data("cache_shuffle_num = 3", CHANGED, {"data.captions.shuffle": 3, "data.folders.0.repeats": 6.0}, more="num_repeats = 2"),
    *data("cache_shuffle_delimiter = '; '", CHANGED, {"data.captions.delimiter": ";"}),
    *data("caption_prefix = 'Style: '", CARRIED, {"data.captions.prefix": "Style: "}),
    Row("dataset: ", "subsample_ratio = 0.25", CHANGED, {"data.folders.0.repeats": 0.5}, more="num_repeats = 2"),
    *data("skip_empty_caption = true", LEFT),
    *data("skip_empty_caption = false", CARRIED),
    *data("online_captions = true", LEFT),
    *data("shuffle_metadata = false", LEFT),
]
ROWS = [*TOP, *ADAPTER, *OPTIMIZER, *MODEL, *DATA]
