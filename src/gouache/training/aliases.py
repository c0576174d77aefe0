"""Settings under the names of kohya's scripts, LyCORIS, diffusers' examples and A1111, with their effect there.

What they mean is applied by `overrides.with_overrides`. A name without a counterpart is in `INSTEAD`, with what to
use.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from gouache.errors import RequestError
from gouache.training.alias_values import CHANGED, TEXT_RATES, Meaning, switch

EPOCHS = "train.epochs"
"""A number of epochs, which becomes steps where the pictures are known."""


def meaning(name: str, value: JsonValue) -> Meaning | None:
    """What `name` = `value` of another trainer means; None if it is not such a name.

    Raises RequestError for a value that has no counterpart, and for a name in `INSTEAD`.
    """
    if name in INSTEAD or (name == "resume" and not isinstance(value, bool)):  # a switch here, a folder there
        raise RequestError(name, INSTEAD.get(name, _RESUME))
    if name in SAME:
        return Meaning({SAME[name]: value})
    if name in SWITCHES:
        return SWITCHES[name] if switch(name, value) else Meaning()
    return CHANGED[name](name, value) if name in CHANGED else None


def together(given: Mapping[str, JsonValue], settings: Mapping[str, JsonValue]) -> Meaning:
    """What all names of other trainers in `given` mean together, beyond each alone. Applied after those.

    `settings` are the values that the names have set, as `table.key`, and the form, rank and alpha of the file. Raises
    RequestError for names that exclude one another here.
    """
    values, implied = dict[str, JsonValue](), dict[str, JsonValue]()
    weights = [name for name in _WEIGHTS if given.get(name)]
    if len(weights) > 1:
        raise RequestError(weights[0], f"cannot be combined with {weights[1]}: losses have one weighting; omit one")
    if "unet_lr" in given:  # learning_rate is that of the text encoders then
        values["train.learning_rate"] = given["unet_lr"]
        others = next((given[name] for name in ("learning_rate", "lr", "train.learning_rate") if name in given), None)
        if others is not None and not any(key.startswith("parts.text_") and "rate" in key for key in settings):
            values[TEXT_RATES[0]] = others
    if "network_alpha" in given and given.get("network_module") == "networks.oft":  # there it is the constraint
        values |= {"adapter.alpha": 0, "adapter.constraint": given["network_alpha"]}
    elif "network_dim" in given and not settings.get("adapter.alpha") and settings.get("adapter.form") not in _NO_ALPHA:
        implied["adapter.alpha"] = 1.0  # the scripts' default of network_alpha
    if given.get("lr_scheduler", "cosine_with_restarts") != "cosine_with_restarts" and _CYCLES & given.keys():
        values["train.restarts"] = 0
    caches = [given[name] for name in _CACHES if name in given]
    if len(caches) > 1:  # there is one cache here
        values["data.cache"] = True in caches
    return Meaning(values, implied)


_WEIGHTS = ("min_snr_gamma", "snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")
_CACHES = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs")
_NO_ALPHA = ("ia3", "oft", "full", "none")  # forms
_CYCLES = {"lr_scheduler_num_cycles", "lr_num_cycles"}


def names() -> list[str]:
    return [*SAME, *SWITCHES, *CHANGED, *INSTEAD]


# Another name for a setting with the same values.
SAME: Mapping[str, str] = {
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",  # of networks.oft: see `together`
    "lora_alpha": "adapter.alpha",
    "conv_dim": "adapter.conv_rank",
    "network_dropout": "adapter.dropout",
    "lora_dropout": "adapter.dropout",  # between the factors here, of their input in PEFT
    "network_weights": "adapter.start",
    "loraplus_lr_ratio": "adapter.plus_ratio",
    "layer_structure": "hypernetwork.structure",
    "activation_func": "hypernetwork.activation",
    "weight_init": "hypernetwork.initialisation",
    "weight_initialization": "hypernetwork.initialisation",
    "add_layer_norm": "hypernetwork.layer_norm",
    "is_layer_norm": "hypernetwork.layer_norm",
    "dropout_structure": "hypernetwork.dropouts",
    "prompts_file": "slider.file",
    "max_denoising_steps": "slider.denoising_steps",
    "leco_denoise_guidance_scale": "slider.denoising_guidance",
    "pretrained_model_name_or_path": "model.name",
    "pretrained_vae_model_name_or_path": "model.vae",
    "train_data_dir": "data.folder",
    "instance_data_dir": "data.folder",
    "dataset_config": "data.folder",
    "in_json": "data.folder",
    "reg_data_dir": "data.class_folder",
    "class_data_dir": "data.class_folder",
    "placeholder_token": "data.trigger",
    "token_string": "data.trigger",
    "initializer_token": "embedding.init_word",
    "num_vectors": "embedding.vectors",
    "num_vectors_per_token": "embedding.vectors",
    "class_tokens": "data.trigger",  # the caption of pictures without one, with the rare word; not what a class shows
    "class_prompt": "data.class_word",
    "instance_prompt": "data.trigger",
    "caption_column": "data.caption_column",
    "shuffle_caption": "data.shuffle",
    "caption_dropout_rate": "data.caption_dropout",
    "proportion_empty_prompts": "data.caption_dropout",
    "caption_dropout_every_n_epochs": "data.caption_dropout_epochs",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "caption_separator": "data.separator",
    "caption_prefix": "data.prefix",
    "caption_suffix": "data.suffix",
    "enable_wildcard": "data.wildcard",
    "token_warmup_min": "data.warmup_tags",
    "token_warmup_step": "data.warmup_steps",
    "flip_aug": "data.flip",
    "random_flip": "data.flip",
    "color_aug": "data.color",
    "cache_latents": "data.cache",
    "cache_latents_to_disk": "data.cache",
    "cache_text_encoder_outputs": "data.cache",
    "enable_bucket": "data.buckets",
    "min_bucket_reso": "data.bucket_min",
    "max_bucket_reso": "data.bucket_max",
    "bucket_reso_steps": "data.bucket_step",
    "num_repeats": "data.repeats",
    "max_data_loader_n_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "train_text_encoder": "parts.text_encoder",
    "max_train_steps": "train.steps",
    "max_train_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "epochs": EPOCHS,
    "epoch": EPOCHS,
    "train_batch_size": "train.batch",
    "batch_size": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "max_grad_norm": "train.clip_norm",
    "lr": "train.learning_rate",
    "unet_lr": "train.learning_rate",  # also where learning_rate is given: see `together`
    "lr_warmup_steps": "train.warmup",
    "lr_decay_steps": "train.decay",
    "lr_scheduler_power": "train.power",
    "lr_power": "train.power",
    "lr_scheduler_min_lr_ratio": "train.final_rate",
    "adam_weight_decay": "train.weight_decay",
    "save_last_n_epochs": "train.keep",
    "checkpoints_total_limit": "train.keep",
    "checkpointing_steps": "train.save_steps",
    "seed": "train.seed",
    "steps": "train.steps",
    "timesteps": "loss.timesteps",
    "huber_c": "loss.huber",
    "noise_offset_random_strength": "loss.noise_offset_random",
    "multires_noise_iterations": "loss.pyramid_iterations",
    "multires_noise_discount": "loss.pyramid_discount",
    "ip_noise_gamma": "loss.input_perturbation",
    "ip_noise_gamma_random_strength": "loss.input_perturbation_random",
    "prior_loss_weight": "loss.prior_weight",
    "v_pred_like_loss": "loss.v_like",
    "zero_terminal_snr": "model.zero_terminal_snr",
    "gradient_checkpointing": "memory.checkpointing",
    "validation_split": "validation.share",
    "validation_seed": "validation.seed",
    "sample_every_n_steps": "samples.every",
}

# Set to true they mean these settings, set to false nothing.
SWITCHES: Mapping[str, Meaning] = {
    "debiased_estimation_loss": Meaning({"loss.weighting": "debiased"}),
    "scale_v_pred_loss_like_noise_pred": Meaning({"loss.weighting": "noise"}),
    "use_object_template": Meaning({"data.template": "subject"}),
    "use_style_template": Meaning({"data.template": "style"}),
    "alpha_mask": Meaning({"data.masks": "alpha"}),
    "masked_loss": Meaning(implied={"data.masks": "file"}),
    "network_train_unet_only": Meaning({"parts.unet": True, "parts.text_encoder": False}),
    "network_train_text_encoder_only": Meaning({"parts.unet": False, "parts.text_encoder": True}),
    "with_prior_preservation": Meaning({"loss.prior": "pictures"}),
    "no_metadata": Meaning({"lineage": "none"}),
    "full_bf16": Meaning({"memory.dtype": "bf16"}),
    "use_8bit_adam": Meaning({"train.optimizer": "adamw8bit"}),
    "use_lion_optimizer": Meaning({"train.optimizer": "lion"}),
    "use_ema": Meaning(implied={"train.ema_decay": 0.9999}),
    "sample_at_first": Meaning(),
    "dim_from_weights": Meaning(),
}

_NOT_NEEDED = "is not needed here: {}; leave it out"
_ATTENTION = _NOT_NEEDED.format("attention never takes the memory of its whole matrix")
_RESUME = "is not a setting: `gouache train run RUN` goes on with a run exactly where it stopped"
_LOGS = _NOT_NEEDED.format("every run writes log.jsonl; `gouache train report RUN` draws it")
_BY_BLOCK = "is not available; use adapter.{}, by part or block, such as adapter.{}={{IN04 = {}, text_encoder = {}}}"

INSTEAD: Mapping[str, str] = {
    "face_crop_aug_range": "is not available; use data.random_crop, or crop the pictures yourself",
    "weighted_captions": "is not available: captions are plain text, brackets included; leave it out",
    "scale_weight_norms": "is not available; use train.weight_decay or adapter.dropout to limit the change",
    "loss_weights": "is not available; use data.weigh with a score of the metadata",
    "conditioning_data_dir": "belongs in kohya's TOML; or call masks NAME.mask.png, beside NAME.png",
    "block_lr": _BY_BLOCK.format("rates", "rates", "0.5", "0.1"),
    "down_lr_weight": _BY_BLOCK.format("rates", "rates", "0.5", "0.1"),
    "mid_lr_weight": _BY_BLOCK.format("rates", "rates", "0.5", "0.1"),
    "up_lr_weight": _BY_BLOCK.format("rates", "rates", "0.5", "0.1"),
    "block_dims": _BY_BLOCK.format("ranks", "ranks", "8", "4"),
    "block_alphas": _BY_BLOCK.format("alphas", "alphas", "8", "4"),
    "full_fp16": "is not available: half precision needs scaled losses; use memory.dtype = bf16",
    "fp8_base": "is not available; use memory.dtype = bf16",
    "fused_backward_pass": "is not available; use memory.checkpointing and train.accumulate",
    "fused_optimizer_groups": "is not available; use memory.checkpointing and train.accumulate",
    "no_half_vae": _NOT_NEEDED.format("a VAE that overflows in half precision is computed in float32"),
    "xformers": _ATTENTION,
    "sdpa": _ATTENTION,
    "mem_eff_attn": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "persistent_data_loader_workers": _NOT_NEEDED.format("threads read pictures, for the whole run"),
    "lowram": _NOT_NEEDED.format("weights are mapped from the file"),
    "v2": _NOT_NEEDED.format("the family is read from the file, or given as model.family"),
    "resume_from_checkpoint": _RESUME,
    "save_state": _RESUME,
    "skip_until_initial_step": _RESUME,
    "initial_step": _RESUME,
    "logging_dir": _LOGS,
    "log_with": _LOGS,
    "report_to": _LOGS,
    "output_dir": "is not a setting; name the file with its folder, -o FOLDER/NAME.safetensors",
    "save_model_as": "is not a setting; files are .safetensors, see also `gouache train export` and `gouache convert`",
    "save_precision": "is not a setting; see `gouache convert --dtype`",
    "save_n_epoch_ratio": "is not available; use train.save_epochs",
    "scale_lr": "is not available; set train.learning_rate itself",
    "dream_training": "is not available; use loss.weighting",
    "train_inpainting": "is not available; use model.inpainting",
}
