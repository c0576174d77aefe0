"""The tables of the settings of a training run: each is a class, each key a field with a default and a sentence."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from gouache.training.settings import setting

Initialisation = Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"]
Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")]


class Table(BaseModel):
    """A table of the file: unknown keys and impossible values are refused."""

    # Defaults are validated so that a float is one before it was written to a file and read from it.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _alone(cls, value: Any, about: ValidationInfo) -> Any:
        """A text or number alone is a list of one."""
        is_list = get_origin(cls.model_fields[about.field_name or ""].annotation) is list
        return [value] if is_list and isinstance(value, str | int | float) and not isinstance(value, bool) else value


class ModelSettings(Table):
    name: str = setting("mini", "The model to start from: a file, a folder, or a name in the library.")
    sha256: str = setting("", "Its hash, checked when the run starts or resumes; filled in at the start.")
    weights: Literal["last", "ema"] = setting(
        "last", "Of files that hold both: the last weights, or the averages (EMA)."
    )
    vae: str = setting("automatic", "Another file's autoencoder, or none for the model's own.")
    prediction: Literal["", "eps", "v"] = setting("", "What the U-Net predicts; empty: what the file says.")
    family: str = setting("", "sd1, sd2 or sdxl; empty: what the file says.")
    inpainting: bool = setting(
        False, "Train the 9-channel inpainting form; a 4-channel model grows by channels of zeros."
    )
    zero_terminal_snr: bool = setting(
        False, "Train on noise levels whose last has no signal; the exported file is marked."
    )
    clip_skip: int = setting(0, "Layer of the text encoders, from the end; 0: the model's own.", ge=0)
    resume: bool = setting(False, "Go on with the moments and the step in a training checkpoint of PyTorch Lightning.")


class DataSettings(Table):
    folder: str = setting(
        "", "A folder of pictures or tar shards, NAME-{000..123}.tar, kohya's TOML or JSON, or OneTrainer's concepts."
    )
    fixed: list[str] = setting([], "Keys of this table that replace those of a TOML or concepts.json; others do not.")
    caption_extension: str = setting("", "Of the caption files; empty: .txt, else .caption.")
    caption_column: str = setting("", "Where metadata has the captions; empty: one of the usual names.")
    trigger: str = setting("", "A word put in front of every caption that does not have it.")
    class_word: str = setting("", "What the subject is, in one or two words (DreamBooth).")
    class_folder: str = setting("", "Pictures of the class; empty: a folder of Gouache's, if some are to be painted.")
    class_pictures: int = setting(0, "Paint pictures of the class until there are so many.", ge=0)
    resolution: list[Resolution] = setting(
        [], 'In pixels, a side or "WIDTHxHEIGHT"; several: each picture at each. Empty: the model\'s.'
    )
    buckets: bool = setting(True, "A size for each shape of picture; false: all are cut to the resolution.")
    bucket_step: int = setting(64, "Sides of buckets are multiples of this.", gt=0)
    bucket_min: int = setting(0, "Smallest side of a bucket; 0: half of the resolution.", ge=0)
    bucket_max: int = setting(0, "Largest side of a bucket; 0: twice the resolution.", ge=0)
    upscale: bool = setting(True, "Enlarge pictures that are smaller than their bucket.")
    repeats: int = setting(1, "How often each picture is seen per epoch.", gt=0)
    filter: list[str] = setting([], 'Keep pictures by their scores, such as "punsafe<0.1".')
    weigh: str = setting("", "A score that multiplies the loss of its picture.")
    shuffle: bool = setting(False, "Shuffle the comma-separated parts of captions.")
    keep_tokens: int = setting(0, "So many parts stay in front.", ge=0)
    keep_tokens_separator: str = setting("", "Or those before this text, and after its second occurrence.")
    separator: str = setting(",", "What separates the parts of captions.")
    secondary_separator: str = setting("", "Joins parts that stay together.")
    caption_dropout: Share = setting(0.0, "Share of captions left out, for guidance without a prompt.")
    caption_dropout_epochs: int = setting(0, "All captions are left out in every so many epochs; 0: never.", ge=0)
    tag_dropout: Share = setting(0.0, "Share of the parts of each caption left out.")
    warmup_steps: float = setting(0.0, "The number of parts grows for so many steps, or a share of them.", ge=0)
    warmup_tags: int = setting(1, "From so many.", ge=0)
    template: str = setting(
        "", "subject, style, or a text file: a line of it, with [name] and [filewords], is each time the caption."
    )
    prefix: str = setting("", "Put before every caption.")
    suffix: str = setting("", "Put after every caption.")
    wildcard: bool = setting(False, "Draw one line of a caption file, and one of {a|b}, each time.")
    flip: bool = setting(False, "Mirror pictures at random.")
    random_crop: bool = setting(False, "Crop at random positions instead of the centre.")
    color: bool = setting(False, "Vary colours slightly.")
    masks: Literal["none", "alpha", "file"] = setting(
        "none", "Limit the loss to a mask: the alpha channel, or NAME.mask.png beside the picture."
    )
    cache: bool = setting(True, "Keep latents and text encodings on disk, and free the encoders.")
    cache_variations: int = setting(4, "Variations cached per picture where crops or colours vary.", gt=0)
    cache_folder: str = setting("", "Folder of the cache; empty: in the run's folder.")
    stream: bool = setting(False, "Decode the pictures of tar shards only when they are needed; for large sets.")
    window: int = setting(8, "Pictures in tar shards are shuffled within so many shards; 0: over all.", ge=0)
    workers: int = setting(2, "Threads that read pictures ahead.", ge=0)

    @field_validator("resolution", mode="before")
    @classmethod
    def _of_kohya(cls, value: Any) -> Any:
        """512, or kohya's "512,768" (width, height), instead of a list."""
        return re.sub(r"\s*,\s*", "x", value.strip()) if isinstance(value, str) else value


class AdapterSettings(Table):
    form: Literal["lora", "locon", "loha", "lokr", "dora", "ia3", "oft", "full", "none"] = setting(
        "lora", "lora, locon, loha, lokr, dora, ia3, oft; full: differences; none: the weights themselves."
    )
    rank: int = setting(16, "Rank of the factors (kohya: network_dim, with which alpha is 1 unless given).", gt=0)
    alpha: float = setting(0, "Scale of the change is alpha / rank; 0: as the rank.", ge=0)
    conv_rank: int = setting(0, "Rank for 3x3 convolutions, which are trained then; 0: as `rank`, if at all.", ge=0)
    conv_alpha: float = setting(0, "Alpha for 3x3 convolutions; 0: as `alpha`.", ge=0)
    ranks: dict[str, int] = setting({}, "Other ranks by part or block, such as {M00 = 32, text_encoder = 4}.")
    alphas: dict[str, float] = setting({}, "Other alphas, by the same names.")
    rates: dict[str, float] = setting({}, "Factors of the learning rate, by the same names.")
    modules: Literal["", "attention", "linear", "conv", "all"] = setting(
        "", "Trained layers: attention alone, linear ones, convolutions too, all; empty: usual for the form."
    )
    factor: int = setting(-1, "LoKr: largest size of the smaller factor; -1: its square root.")
    constraint: float = setting(0.0, "OFT: limit of the rotation; 0: none.", ge=0)
    rank_dropout: Share = setting(0.0, "Share of ranks left out per batch.")
    module_dropout: Share = setting(0.0, "Share of modules left out per batch.")
    dropout: Share = setting(0.0, "Share of what is between the two factors left out (kohya: network_dropout).")
    plus_ratio: float = setting(1.0, "LoRA+: rate of the up factors relative to the others; 16 is usual.", gt=0)
    start: str = setting("", "A LoRA, embedding or hypernetwork to start from; only its weights are taken.")


class EmbeddingSettings(Table):
    vectors: int | None = setting(
        None, "Vectors trained for data.trigger, as tokens in prompts; without it none (mode embedding: 1).", ge=0
    )
    init_word: str = setting("", "Words whose vectors they start as; empty: data.class_word, or *.")
    rate: float = setting(1.0, "Their rate, relative to the learning rate, beside a LoRA.", gt=0)


class HypernetworkSettings(Table):
    structure: list[float] = setting([1.0, 2.0, 1.0], "Widths of its layers, relative to that of their input.")
    activation: str = setting("linear", "Between layers, by A1111's names: relu, swish, ...; linear: none.")
    activate_output: bool = setting(False, "Also after the last layer.")
    layer_norm: bool = setting(False, "A layer norm after each layer.")
    use_dropout: bool = setting(False, "Drop 0.3 after all layers but the last two.")
    last_layer_dropout: bool = setting(False, "And after the last but one.")
    dropouts: list[Share] = setting([], "Or a share for each number of `structure`; the first is 0.")
    initialisation: Initialisation = setting(
        "Normal", "How weights begin: Normal, XavierUniform, XavierNormal, KaimingUniform, KaimingNormal."
    )
    widths: list[int] = setting([], "Widths of the inputs that are changed, such as 320; empty: all of the model.")

    @field_validator("structure", "dropouts", "widths", mode="before")
    @classmethod
    def _of_a1111(cls, value: Any, about: ValidationInfo) -> Any:
        """A1111's "1, 2, 1" instead of a list."""
        if not isinstance(value, str):
            return value
        try:
            return [float(each) for each in value.split(",")]
        except ValueError:
            example = {"structure": "1, 2, 1", "dropouts": "0, 0.3, 0"}.get(about.field_name or "", "320, 640")
            raise ValueError(f"expected numbers, such as {example}") from None

    @field_validator("activation", "initialisation", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any, about: ValidationInfo) -> Any:
        """A1111's names as they are written here."""
        if about.field_name == "activation" or not isinstance(value, str):
            return value.lower() if isinstance(value, str) else value
        return next((name for name in get_args(Initialisation) if name.lower() == value.lower()), value)


class SliderSettings(Table):
    file: str = setting("", "A file of prompts as of LECO or kohya's scripts, .yaml, .toml or .json; or instead of it:")
    target: str = setting("", "What the slider changes, such as person; may be empty.")
    positive: str = setting("", "What positive strengths make of it, such as an old person.")
    opposite: str = setting("", "What negative strengths make of it, such as a young person.")
    erase: str = setting("", "Or a concept to erase.")
    neutrals: list[str] = setting([], "Prompts that the change is added to; empty: the target, of erase the empty one.")
    guidance: float = setting(1.0, "How far it goes, unless in a file: guidance_scale there.", gt=0)
    size: int = setting(0, "In pixels, a multiple of 8; 0: as the file says, else the model's.", ge=0, multiple_of=8)
    denoising_steps: int = setting(
        40, "Of so many steps a part, at random, denoises what the loss is measured at.", ge=2
    )
    denoising_guidance: float = setting(3.0, "CFG scale of those steps.", ge=1)
    strengths: list[float] = setting([-2.0, 0.0, 2.0], "Samples are painted at each.", min_length=1)


class PretrainSettings(Table):
    part: Literal["vae", "text", "unet"] = setting("unet", "What is trained: vae, text (the text encoder) or unet.")
    initial_size: Literal["", "tiny", "small", "sd1"] = setting(
        "", "Begin with random weights of this size, by train.seed; empty: with those of model.name."
    )
    kl: float = setting(1e-6, "VAE: weight of the KL divergence of latents from a normal distribution.", ge=0)
    ssim: float = setting(0.1, "VAE: weight of structural similarity.", ge=0)
    perceptual: float = setting(0.1, "VAE: weight of the distance in the features of a random network.", ge=0)
    adversarial: float = setting(0.0, "VAE: weight of a patch discriminator; 0: none. 0.5 is usual.", ge=0)
    adversarial_start: int = setting(0, "Steps before the discriminator begins.", ge=0)


class PartsSettings(Table):
    unet: bool = setting(True, "Train the U-Net.")
    text_encoder: bool = setting(False, "Train the text encoder (SDXL: both).")
    text_rate: float = setting(0.5, "Its rate, relative to the learning rate; 0: it is frozen.", ge=0)
    text_rate_2: float | None = setting(None, "That of SDXL's second text encoder; without it: as the first.", ge=0)
    text_stop: int = setting(0, "Train the text encoders for so many steps; 0: to the end.", ge=0)


class LossSettings(Table):
    loss: Literal["l2", "l1", "huber", "smooth-l1"] = setting("l2", "Of the error of the prediction.")
    huber: float = setting(0.1, "Where huber and smooth-l1 turn from square to linear.", gt=0)
    huber_scale: float = setting(1.0, "Multiplies that, unless huber_schedule is snr.", gt=0)
    huber_schedule: Literal["constant", "exponential", "snr"] = setting("snr", "How that changes with noise.")
    weighting: Literal["none", "min-snr", "debiased", "velocity", "noise"] = setting(
        "none", "Weights by noise level: none, min-snr (Hang 2023), debiased, velocity, noise."
    )
    v_like: float = setting(0.0, "Adds so much of the loss as v-prediction would weigh it.", ge=0)
    gamma: float = setting(5.0, "Limit of min-snr and velocity.", gt=0)
    noise_offset: float = setting(0.0, "Noise that is equal over the picture, for very dark or light ones.", ge=0)
    noise_offset_random: bool = setting(False, "Draw the offset's strength per picture.")
    adaptive_noise_scale: float = setting(0.0, "Adds so much of the latent's mean to the offset.")
    pyramid_iterations: int = setting(0, "Levels of pyramid (multires) noise; 6 to 10 are usual.", ge=0)
    pyramid_discount: float = setting(0.3, "Strength of each further level.", gt=0, lt=1)
    input_perturbation: float = setting(0.0, "Additional noise on the input alone; 0.1 is usual.", ge=0)
    input_perturbation_random: bool = setting(False, "Draw its strength per picture.")
    timesteps: Literal["uniform", "logit-normal", "mode", "cos-map", "sigmoid", "parabola", "beta"] = setting(
        "uniform", "How timesteps are drawn."
    )
    timestep_shift: float = setting(1.0, "Above 1: more of the noisier timesteps.", gt=0)
    timestep_min: Share = setting(0.0, "Smallest timestep, as a share of all.")
    timestep_max: Share = setting(1.0, "Largest timestep, as a share of all.")
    prior: Literal["none", "pictures", "model"] = setting(
        "none", "Prior preservation: pictures of the class; or model: what it predicted before training."
    )
    prior_weight: float = setting(1.0, "Weight of the prior's loss.", ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> LossSettings:
        if self.timestep_min >= self.timestep_max:
            raise ValueError(f"timestep_min {self.timestep_min:g} must be below timestep_max {self.timestep_max:g}")
        return self


class ValidationSettings(Table):
    share: float = setting(0.0, "Share of the pictures held out, below 1; near duplicates stay together.", ge=0, lt=1)
    pictures: int = setting(0, "Or so many; 0 and a share of 0: training pictures with fixed noise.", ge=0)
    seed: int = setting(0, "Of the choice, which does not change with train.seed.", ge=0)
    timesteps: int = setting(8, "Fixed noise levels per picture.", gt=0)
    probe: int = setting(4, "So many training pictures are measured too, to see over-fitting.", ge=0)


class SampleSettings(Table):
    prompts: list[str] = setting([], "Painted at the moments below; empty: the first caption.")
    negative: str = setting("", "Negative prompt of all.")
    every: int = setting(0, "Steps between samples; 0: at the start, each quarter and the end.", ge=0)
    steps: int = setting(0, "Sampling steps; 0: the default of `paint`.", ge=0)
    seed: int = setting(1, "Seed of the first sample; it is the same at every moment.", ge=0)
    sampler: str = setting("", "Sampler; empty: the default of `paint`.")
    last: bool = setting(True, "With averages (EMA): paint with the last weights too.")


class MemorySettings(Table):
    dtype: Literal["", "fp32", "bf16", "fp16"] = setting("", "Of frozen weights; empty: fastest here.")
    autocast: Literal["auto", "yes", "no"] = setting("auto", "Compute in bf16 while weights stay float32.")
    checkpointing: bool = setting(False, "Compute activations twice instead of keeping them.")
    shard: bool = setting(False, "With several processes: each keeps a part of the trained weights (FSDP2).")
