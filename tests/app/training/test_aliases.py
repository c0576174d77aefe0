"""The names of kohya's scripts, LyCORIS and diffusers' examples have the effect that they have there, or one line."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import torch

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.objective import text_encoder
from gouache.errors import RequestError
from gouache.model.model import Model
from gouache.training import optimizers
from gouache.training.objective import Group
from gouache.training.overrides import with_overrides
from gouache.training.rates import rate
from gouache.training.run_settings import TABLES, RunSettings, checked
from tests.app.training.short_runs import settings_of
from tests.pipelines import Narrow

BASE: dict[str, Any] = {"train": {"steps": 1000, "batch": 1, "learning_rate": 1e-4}}


def chosen(*overrides: str) -> RunSettings:
    return checked(with_overrides(BASE, list(overrides)))


def value(settings: RunSettings, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(settings, table), name) if name else getattr(settings, table)


EFFECTS: list[tuple[str, dict[str, Any]]] = [
    ("min_snr_gamma=5", {"loss.weighting": "min-snr", "loss.gamma": 5}),
    ("snr_gamma=5", {"loss.weighting": "min-snr", "loss.gamma": 5}),
    ("debiased_estimation_loss=true", {"loss.weighting": "debiased"}),
    ("debiased_estimation_loss=false", {"loss.weighting": "none"}),
    ("scale_v_pred_loss_like_noise_pred=true", {"loss.weighting": "noise"}),
    ("v_pred_like_loss=0.5", {"loss.v_like": 0.5}),
    ("loss_type=smooth_l1", {"loss.loss": "smooth-l1"}),
    ("loss_type=huber", {"loss.loss": "huber"}),
    ("huber_schedule=exponential", {"loss.huber_schedule": "exponential"}),
    ("huber_c=0.2", {"loss.huber": 0.2}),
    ("huber_scale=2", {"loss.huber_scale": 2}),
    ("noise_offset=0.1", {"loss.noise_offset": 0.1}),
    ("noise_offset_random_strength=true", {"loss.noise_offset_random": True}),
    ("adaptive_noise_scale=0.01", {"loss.adaptive_noise_scale": 0.01}),
    ("multires_noise_iterations=6", {"loss.pyramid_iterations": 6}),
    ("multires_noise_discount=0.2", {"loss.pyramid_discount": 0.2}),
    ("ip_noise_gamma=0.1", {"loss.input_perturbation": 0.1}),
    ("ip_noise_gamma_random_strength=true", {"loss.input_perturbation_random": True}),
    ("min_timestep=200", {"loss.timestep_min": 0.2}),
    ("max_timestep=900", {"loss.timestep_max": 0.9}),
    ("prior_loss_weight=0.5", {"loss.prior_weight": 0.5}),
    ("with_prior_preservation=true", {"loss.prior": "pictures"}),
    ("num_class_images=20", {"data.class_pictures": 20, "loss.prior": "pictures"}),
    ("v_parameterization=true", {"model.prediction": "v"}),
    ("v_parameterization", {"model.prediction": "v"}),
    ("--v_parameterization", {"model.prediction": "v"}),
    ("prediction_type=v_prediction", {"model.prediction": "v"}),
    ("prediction_type=epsilon", {"model.prediction": "eps"}),
    ("zero_terminal_snr", {"model.zero_terminal_snr": True}),
    ("clip_skip=2", {"model.clip_skip": 2}),
    ("mixed_precision=no", {"memory.dtype": "fp32", "memory.autocast": "no"}),
    ("mixed_precision=bf16", {"memory.autocast": "yes"}),
    ("full_bf16=true", {"memory.dtype": "bf16"}),
    ("gradient_checkpointing=true", {"memory.checkpointing": True}),
    ("network_dim=8", {"adapter.rank": 8, "adapter.alpha": 1}),
    ("class_tokens=sks dog", {"data.trigger": "sks dog", "data.class_word": ""}),
    ("network_alpha=4", {"adapter.alpha": 4}),
    ("network_dropout=0.1", {"adapter.dropout": 0.1}),
    ("network_module=networks.lora", {"adapter.form": "lora"}),
    ("network_module=networks.oft", {"adapter.form": "oft"}),
    ("network_module=lycoris.kohya", {"adapter.form": "locon", "adapter.modules": "conv"}),
    ("algo=loha", {"adapter.form": "loha", "adapter.modules": "conv"}),
    ("algo=ia3", {"adapter.form": "ia3", "adapter.modules": ""}),
    ('network_args=["algo=lokr", "conv_dim=4", "conv_alpha=1", "factor=8", "rank_dropout=0.1"]',
     {"adapter.form": "lokr", "adapter.conv_rank": 4, "adapter.conv_alpha": 1, "adapter.factor": 8,
      "adapter.rank_dropout": 0.1}),
    ("network_args=algo=locon dora_wd=True", {"adapter.form": "dora", "adapter.modules": "conv"}),
    ("network_args=dora_wd=True algo=locon", {"adapter.form": "dora", "adapter.modules": "conv"}),
    ("network_args=loraplus_lr_ratio=16", {"adapter.plus_ratio": 16}),
    ("network_args=algo=loha preset=attn-only", {"adapter.form": "loha", "adapter.modules": "attention"}),
    ("conv_dim=4", {"adapter.conv_rank": 4}),
    ("network_train_unet_only=true", {"parts.unet": True, "parts.text_encoder": False}),
    ("network_train_text_encoder_only=true", {"parts.unet": False, "parts.text_encoder": True}),
    ("train_text_encoder=true", {"parts.text_encoder": True}),
    ("unet_lr=2e-4", {"train.learning_rate": 2e-4}),
    ("text_encoder_lr=5e-5", {"parts.text_encoder": True, "parts.text_rate": 0.5, "parts.text_rate_2": None}),
    ("text_encoder_lr=[5e-5, 1e-5]", {"parts.text_encoder": True, "parts.text_rate": 0.5, "parts.text_rate_2": 0.1}),
    ("text_encoder_lr=0", {"parts.text_encoder": False}),
    ("learning_rate_te1=5e-5", {"parts.text_encoder": True, "parts.text_rate": 0.5, "parts.text_rate_2": 1}),
    ("learning_rate_te2=5e-5", {"parts.text_encoder": True, "parts.text_rate": 1, "parts.text_rate_2": 0.5}),
    ("stop_text_encoder_training=50", {"parts.text_encoder": True, "parts.text_stop": 50}),
    ("stop_text_encoder_training=0", {"parts.text_encoder": False}),
    ("stop_text_encoder_training=-1", {"parts.text_encoder": False}),
    ("optimizer_type=AdamW", {"train.optimizer": "adamw"}),
    ("optimizer_type=AdamW8bit", {"train.optimizer": "adamw8bit"}),
    ("optimizer_type=Prodigy", {"train.optimizer": "prodigy"}),
    ("optimizer_type=Lion", {"train.optimizer": "lion"}),
    ("optimizer_type=Adafactor", {"train.optimizer": "adafactor"}),
    ("optimizer_type=AdaFactor", {"train.optimizer": "adafactor"}),
    ("optimizer_type=AdamWScheduleFree", {"train.optimizer": "schedule-free"}),
    ("optimizer_type=SGDNesterov",
     {"train.optimizer": "sgd", "train.optimizer_arguments": {"momentum": 0.9, "nesterov": True}}),
    ("optimizer_type=torch.optim.NAdam", {"train.optimizer": "torch.optim.NAdam"}),
    ('optimizer_args=["weight_decay=0.1", "betas=0.9,0.999", "amsgrad=True"]',
     {"train.weight_decay": 0.1, "train.betas": (0.9, 0.999), "train.optimizer_arguments": {"amsgrad": True}}),
    ("max_grad_norm=0", {"train.clip_norm": 0}),
    ("lr_warmup_steps=0.1", {"train.warmup": 0.1}),
    ("lr_scheduler=constant", {"train.schedule": "constant", "train.warmup": 0}),
    ("lr_scheduler=constant_with_warmup", {"train.schedule": "constant", "train.warmup": 100}),
    ("lr_scheduler=polynomial", {"train.schedule": "polynomial", "train.power": 1, "train.final_rate": 0}),
    ("lr_scheduler_type=torch.optim.lr_scheduler.ExponentialLR",
     {"train.schedule": "torch.optim.lr_scheduler.ExponentialLR"}),
    ('lr_scheduler_args=["gamma=0.99"]', {"train.schedule_arguments": {"gamma": 0.99}}),
    ("seed=7", {"train.seed": 7}),
    ("train_batch_size=3", {"train.batch": 3}),
    ("gradient_accumulation_steps=2", {"train.accumulate": 2}),
    ("max_train_steps=50", {"train.steps": 50}),
    ("save_every_n_steps=20", {"train.save_steps": 20, "train.keep": 1000}),
    ("save_every_n_epochs=2", {"train.save_epochs": 2, "train.keep": 1000}),
    ("resolution=512", {"data.resolution": [512]}),
    ("resolution=512,768", {"data.resolution": ["512x768"]}),
    ("resolution=[512, 768]", {"data.resolution": [512, 768]}),
    ("cache_latents=true", {"data.cache": True}),
    ("cache_latents=false", {"data.cache": False}),
    ("caption_extension=.cap", {"data.caption_extension": ".cap"}),
    ("caption_extension=txt", {"data.caption_extension": ".txt"}),
    ("keep_tokens=2", {"data.keep_tokens": 2}),
    ("keep_tokens_separator=|||", {"data.keep_tokens_separator": "|||"}),
    ("secondary_separator=;;;", {"data.secondary_separator": ";;;"}),
    ("shuffle_caption=true", {"data.shuffle": True}),
    ("caption_dropout_rate=0.1", {"data.caption_dropout": 0.1}),
    ("caption_dropout_every_n_epochs=3", {"data.caption_dropout_epochs": 3}),
    ("caption_tag_dropout_rate=0.1", {"data.tag_dropout": 0.1}),
    ("token_warmup_min=2", {"data.warmup_tags": 2}),
    ("token_warmup_step=0.5", {"data.warmup_steps": 0.5}),
    ("enable_wildcard=true", {"data.wildcard": True}),
    ("caption_prefix=a", {"data.prefix": "a"}),
    ("caption_suffix=z", {"data.suffix": "z"}),
    ("flip_aug=true", {"data.flip": True}),
    ("color_aug=true", {"data.color": True}),
    ("random_crop=true", {"data.random_crop": True}),
    ("alpha_mask=true", {"data.masks": "alpha"}),
    ("masked_loss=true", {"data.masks": "file"}),
    ("enable_bucket=false", {"data.buckets": False}),
    ("bucket_no_upscale=true", {"data.upscale": False}),
    ("bucket_reso_steps=32", {"data.bucket_step": 32}),
    ("min_bucket_reso=128", {"data.bucket_min": 128}),
    ("max_bucket_reso=640", {"data.bucket_max": 640}),
    ("num_repeats=10", {"data.repeats": 10}),
    ("validation_split=0.1", {"validation.share": 0.1}),
    ("max_token_length=225", {"data.prefix": ""}),
    ("sample_prompts=a red fox", {"samples.prompts": ["a red fox"]}),
    ("sample_every_n_steps=50", {"samples.every": 50}),
    ("output_name=style", {"output": "style.safetensors"}),
    ("no_metadata=true", {"lineage": "none"}),
    ("resume=true", {"model.resume": True}),
    ("layer_structure=1, 2, 2, 1", {"hypernetwork.structure": [1, 2, 2, 1]}),
    ("activation_func=Swish", {"hypernetwork.activation": "swish"}),
    ("weight_init=xavieruniform", {"hypernetwork.initialisation": "XavierUniform"}),
    ("add_layer_norm=true", {"hypernetwork.layer_norm": True}),
    ("dropout_structure=0, 0.3, 0", {"hypernetwork.dropouts": [0, 0.3, 0]}),
    ("initialisation=KAIMINGNORMAL", {"hypernetwork.initialisation": "KaimingNormal"}),
    ("widths=320", {"hypernetwork.widths": [320]}),
    ("widths=320, 640", {"hypernetwork.widths": [320, 640]}),
    ("resolution=512", {"data.resolution": [512]}),
    ("resolution=512,768", {"data.resolution": ["512x768"]}),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), EFFECTS, ids=[override for override, _ in EFFECTS])
def test_a_name_of_another_trainer_sets_what_it_means(override: str, expected: dict[str, Any]):
    settings = chosen(override)
    assert {key: value(settings, key) for key in expected} == expected


def test_a_value_alone_is_a_list_of_one():
    """Of every setting that is a list."""
    lists = [(table, key) for table, kind in TABLES.items() for key, each in getattr(kind, "model_fields", {}).items()
             if get_origin(each.annotation) is list]  # fmt: skip
    assert len(lists) > 8
    for table, key in lists:
        alone, several = (checked({**BASE, table: {key: each}}) for each in ("1", ["1"]))
        assert alone == several and len(getattr(getattr(alone, table), key)) == 1, f"{table}.{key}"


@pytest.mark.parametrize("key", ["structure", "dropouts", "widths"])
def test_numbers_that_are_none_are_refused_with_an_example(key: str):
    with pytest.raises(RequestError, match=rf"hypernetwork\.{key}: expected numbers, such as \d.*, received 'a'"):
        chosen(f"{key}=a")


def test_values_in_messages_are_ones_that_are_accepted():
    """Each value that a message lists for a setting of some, as it is written there."""
    choices = [(table, key) for table, kind in TABLES.items() for key, each in getattr(kind, "model_fields", {}).items()
               if get_origin(each.annotation) is Literal]  # fmt: skip
    assert len(choices) > 8
    for table, key in choices:
        with pytest.raises(RequestError) as caught:
            checked({**BASE, table: {**BASE.get(table, {}), key: "no such"}})
        listed = re.findall(r"'([^']*)'", str(caught.value).partition(", received")[0])
        assert listed, f"{table}.{key}"
        for each in listed:
            assert value(checked({**BASE, table: {**BASE.get(table, {}), key: each}}), f"{table}.{key}") == each


TOGETHER: list[tuple[set[str], dict[str, Any]]] = [
    ({"unet_lr=2e-4", "learning_rate=1e-4"}, {"train.learning_rate": 2e-4, "parts.text_rate": 0.5}),
    ({"unet_lr=2e-4", "learning_rate=5e-5"}, {"train.learning_rate": 2e-4, "parts.text_rate": 0.25}),
    ({"unet_lr=2e-4", "learning_rate=1e-4", "text_encoder_lr=2e-5"},
     {"train.learning_rate": 2e-4, "parts.text_rate": 0.1}),
    ({"unet_lr=2e-4", "learning_rate=1e-4", "text_rate=0.3"}, {"parts.text_rate": 0.3}),
    ({"network_dim=8", "network_alpha=4"}, {"adapter.rank": 8, "adapter.alpha": 4}),
    ({"network_dim=8", "alpha=8"}, {"adapter.alpha": 8}),
    ({"network_dim=8", "network_module=lycoris.kohya"}, {"adapter.form": "locon", "adapter.alpha": 1}),
    ({"network_dim=8", "algo=loha"}, {"adapter.form": "loha", "adapter.alpha": 1}),
    ({"network_dim=8", "network_args=algo=lokr preset=full"}, {"adapter.form": "lokr", "adapter.alpha": 1}),
    ({"network_dim=8", "network_module=networks.oft"}, {"adapter.form": "oft", "adapter.alpha": 0}),
    ({"network_dim=8", "network_module=networks.oft", "network_alpha=0.001"},
     {"adapter.form": "oft", "adapter.rank": 8, "adapter.alpha": 0, "adapter.constraint": 0.001}),
    ({"lr_scheduler=cosine", "lr_scheduler_num_cycles=3"}, {"train.schedule": "cosine", "train.restarts": 0}),
    ({"lr_scheduler=cosine_with_restarts", "lr_scheduler_num_cycles=3"}, {"train.restarts": 2}),
    ({"cache_latents=true", "cache_text_encoder_outputs=false"}, {"data.cache": True}),
    ({"cache_latents=false", "cache_text_encoder_outputs=false"}, {"data.cache": False}),
    ({"min_snr_gamma=5", "debiased_estimation_loss=false"}, {"loss.weighting": "min-snr"}),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), TOGETHER, ids=["+".join(sorted(each)) for each, _ in TOGETHER])
def test_names_that_are_given_together_mean_what_they_mean_there_in_any_order(
    overrides: set[str], expected: dict[str, Any]
):
    for order in (sorted(overrides), sorted(overrides, reverse=True)):
        settings = chosen(*order)
        assert {key: value(settings, key) for key in expected} == expected


@pytest.mark.parametrize("other", ["debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred"])
def test_two_weightings_of_the_loss_are_one_line(other: str):
    with pytest.raises(RequestError, match=f"min_snr_gamma: cannot be combined with {other}"):
        chosen("min_snr_gamma=5", f"{other}=true")


ONE_LINE = {
    "face_crop_aug_range=1.0,2.0": "data.random_crop",
    "scale_weight_norms=1.0": "weight_decay",
    "loss_weights=1": "data.weigh",
    "weighted_captions=true": "plain text",
    "block_lr=1e-4,1e-5": r"adapter\.rates",
    "down_lr_weight=1,1": r"adapter\.rates",
    "block_dims=4,4": r"adapter\.ranks",
    "fp8_base=true": "memory.dtype",
    "fused_backward_pass=true": "memory.checkpointing",
    "resume=runs/a": "gouache train run",
    "save_state=true": "gouache train run",
    "xformers=true": "leave it out",
    "mixed_precision=fp16": "bf16 or no",
    "max_token_length=75": "never cut off",
    "prediction_type=sample": "epsilon or v_prediction",
    "lr_scheduler=piecewise_constant": "dotted path",
    "lr_scheduler=adafactor": "dotted path",
    "network_module=networks.dylora": r"networks\.lora",
    "algo=glora": "loha, lokr",
    "network_args=block_dims=4": r"\[adapter\]",
    "network_args=algo": "key=value",
    "min_timestep=2000": "0 to 1000",
    "debiased_estimation_loss=1": "true or false",
    "text_encoder_lr=fast": "a number",
    "adam_beta1=0.9": "train.betas",
    "conditioning_data_dir=masks": r"NAME\.mask\.png",
    "netwrok_dim=8": "did you mean network_dim",
    "rnak=8": "did you mean rank or ranks?",
    "stesp=8": "did you mean steps or rates?",
    "resolution=wide": "resolution",
}


@pytest.mark.parametrize(("override", "said"), ONE_LINE.items(), ids=list(ONE_LINE))
def test_what_has_no_counterpart_is_one_line_that_says_what_to_use(override: str, said: str):
    with pytest.raises(RequestError, match=said) as caught:
        chosen(override)
    assert "\n" not in str(caught.value)
    assert override.partition("=")[0].removeprefix("netwrok_") in str(caught.value)


def test_an_explicit_setting_comes_before_what_a_name_implies_in_any_order():
    for overrides in (["final_rate=0.2", "lr_scheduler=cosine"], ["lr_scheduler=cosine", "final_rate=0.2"]):
        assert chosen(*overrides).train.final_rate == 0.2
    assert chosen("text_encoder_lr=1e-5", "unet_lr=2e-5").parts.text_rate == 0.5
    assert chosen("masked_loss=true", "alpha_mask=true").data.masks == "alpha"


@pytest.mark.parametrize(
    "values",
    [{"data": 5}, {"data": {"fixed": 5}}, {"data": {"fixed": [5, {}]}}, {"parts": 5}, {"train": 5},
     {"parts": {"text_learning_rate": "x"}}, {"train": {"learning_rate": "x"}}, {"train": {"learning_rate": 0}}],
)  # fmt: skip
@pytest.mark.parametrize("override", ["flip=true", "text_encoder_lr=1e-5", "seed=1"])
def test_files_of_settings_that_are_wrong_are_one_line(values: dict[str, Any], override: str):
    with pytest.raises(RequestError) as caught:
        checked(with_overrides(values, [override]))
    assert "\n" not in str(caught.value)


SCHEDULES = [
    (["lr_scheduler=cosine"], "get_cosine_schedule_with_warmup", {}),
    (["lr_scheduler=cosine_with_restarts", "lr_scheduler_num_cycles=3"],
     "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 3}),
    (["lr_scheduler=linear"], "get_linear_schedule_with_warmup", {}),
    (["lr_scheduler=polynomial", "lr_scheduler_power=2"], "get_polynomial_decay_schedule_with_warmup",
     {"power": 2, "lr_end": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "name", "options"), SCHEDULES, ids=[name for _, name, _ in SCHEDULES])
def test_schedules_are_those_of_transformers(overrides: list[str], name: str, options: dict[str, Any]):
    """The rates of the scripts, which count a warm-up from 0 where this one counts from 1."""
    import transformers

    settings = chosen(*overrides, "lr_warmup_steps=0", "max_train_steps=120").train
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    schedule = getattr(transformers, name)(optimizer, num_warmup_steps=0, num_training_steps=120, **options)
    for step in range(120):
        assert rate(settings, step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "DAdaptAdam", "CAME"])
def test_an_optimizer_of_a_missing_package_is_one_line_that_names_it(name: str):
    settings = chosen(f"optimizer_type={name}").train
    package = {"DAdaptAdam": "dadaptation", "CAME": "pytorch_optimizer"}.get(name, "bitsandbytes")
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(RequestError, match=package) as caught:
        optimizers.build(settings, [Group({"a": torch.nn.Parameter(torch.zeros(2, 2))})])
    assert "\n" not in str(caught.value)


def test_prompts_of_kohyas_file(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na fox --n blurry --d 7 --s 20\na red-haired cat, well--lit --n blurry --d 8 --s 20\n")
    samples = chosen(f"sample_prompts={file}").samples
    assert samples.prompts == ["a fox", "a red-haired cat, well--lit"]
    assert (samples.negative, samples.seed, samples.steps) == ("blurry", 7, 20)


OPTIONS = """
v_parameterization prediction_type min_snr_gamma debiased_estimation_loss
scale_v_pred_loss_like_noise_pred v_pred_like_loss loss_type huber_schedule huber_c huber_scale
noise_offset adaptive_noise_scale multires_noise_iterations multires_noise_discount ip_noise_gamma
input_perturbation zero_terminal_snr min_timestep max_timestep prior_loss_weight loss_weights
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate learning_rate_te1
learning_rate_te2 text_encoder_lr block_lr down_lr_weight block_dims block_alphas
fused_backward_pass fused_optimizer_groups full_bf16 fp8_base scale_weight_norms network_dropout
rank_dropout module_dropout weighted_captions max_token_length clip_skip train_data_dir reg_data_dir
num_repeats class_tokens caption_extension keep_tokens keep_tokens_separator secondary_separator
caption_prefix caption_suffix shuffle_caption token_warmup_min token_warmup_step flip_aug color_aug
random_crop face_crop_aug_range alpha_mask conditioning_data_dir validation_split enable_wildcard
bucket_no_upscale cache_latents optimizer_type lr_scheduler lr_warmup_steps masked_loss seed
sample_prompts
"""


def test_every_option_that_users_know_is_answered():
    """The names in the tables of options that other trainers have: each is a setting, or one line says what to use."""
    for name in OPTIONS.split():
        try:
            with_overrides(BASE, [f"{name}=1"])
        except RequestError as error:
            assert "is not a setting" not in str(error) or "gouache train run" in str(error), name


@pytest.fixture
def ready(
    narrow: Callable[[str], Narrow],
    pictures: Path,
    settings: Settings,
    tmp_path: Path,
) -> Callable[..., Any]:
    def make(family: str, *overrides: str) -> Any:
        usual = settings_of(narrow(family).file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2})
        values = with_overrides(usual.model_dump(), list(overrides))
        return prepare.prepared(
            checked(values), RunFolder(tmp_path / "run"), settings, on_note=lambda line: None,
            on_work=lambda what, done, total: None, fill_caches=False,
        )  # fmt: skip

    return make


def test_the_objective_is_the_one_that_the_names_describe(ready: Callable[..., Any]):
    overrides = ["min_snr_gamma=5", "noise_offset=0.1", "ip_noise_gamma=0.2", "min_timestep=100", "max_timestep=101"]
    overrides += ["loss_type=huber", "huber_schedule=constant", "huber_scale=3", "caption_dropout_rate=0.25"]
    with ready("sd1", *overrides) as found:
        objective, batch = found.objective, found.batches(0)
        t = torch.tensor([10, 500])
        snr = objective.schedule.snr(t)
        torch.testing.assert_close(objective.loss_weights(t), snr.clamp(max=5) / snr)
        assert set(objective.draws(batch, 0).t.tolist()) == {100}
        assert (objective.noise.offset, objective.noise.perturbation) == (0.1, 0.2)
        assert (objective.distance, objective.huber_scale, objective.dropout) == ("huber", 3, 0.25)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_counts_layers_as_kohyas_scripts_do(
    skip: int, ready: Callable[..., Any], narrow: Callable[[str], Narrow]
):
    pipeline = narrow("sd1").pipeline
    with ready("sd1", f"clip_skip={skip}") as found:
        conditioning = text_encoder(found.settings, found.model)(["zorb, red"], None)
    tokens = pipeline.tokenizer(["zorb, red"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-skip]
        network = pipeline.text_encoder
        wanted = getattr(network, "text_model", network).final_layer_norm(hidden)
    torch.testing.assert_close(conditioning.context, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "rates"),
    [
        ("text_encoder_lr=5e-5", {"unet": 1.0, "text_encoder": 0.5, "text_encoder_2": 0.5}),
        ("text_encoder_lr=[5e-5, 1e-5]", {"unet": 1.0, "text_encoder": 0.5, "text_encoder_2": 0.1}),
        ("text_encoder_lr=[0, 1e-5]", {"unet": 1.0, "text_encoder_2": 0.1}),
        ("text_encoder_lr=[1e-5, 0]", {"unet": 1.0, "text_encoder": 0.1}),
        ("network_train_unet_only=true", {"unet": 1.0}),
    ],
)
def test_absolute_rates_of_text_encoders_reach_the_optimizer(
    override: str, rates: dict[str, float], ready: Callable[..., Any]
):
    with ready("sdxl", "learning_rate=1e-4", override) as found:
        names = {id(parameter): name for name, parameter in found.target.adapter.named_parameters()}
        seen = dict[str, set[float]]()
        for group in found.target.groups():
            for parameter in group.parameters.values():
                part = re.split(r"[^a-z0-9_]|(?=_model)", names[id(parameter)])[0]
                key = next(each for each in ("text_encoder_2", "text_encoder", "unet") if part.startswith(each))
                seen.setdefault(key, set()).add(group.rate)
    assert seen == {part: {rate} for part, rate in rates.items()}


def test_zero_terminal_snr_reaches_the_schedule(ready: Callable[..., Any]):
    with ready("sd1", "v_parameterization=true", "zero_terminal_snr=true") as found:
        model: Model = found.model
        assert model.prediction == "v" and float(model.schedule.alphas_cumprod[-1]) < 1e-7
