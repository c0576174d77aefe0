"""Adapters as targets: step 0 equals the base, gradients reach every part, names and choices are as stated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gouache import Model
from gouache.errors import ModelError, RequestError
from gouache.files.open import open_model
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.initial import factor_pair
from gouache.training.targets.options import AdapterOptions
from tests.training.targets.steps import cases, output, train, weights

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"form": "locon", "conv_rank": 2},
    "dora": {"form": "dora"},
    "dora of convolutions": {"form": "locon", "dora": True},
    "loha": {"form": "loha", "modules": "conv"},
    "dora of loha": {"form": "loha", "dora": True},
    "lokr": {"form": "lokr", "modules": "conv", "rank": 2},
    "lokr, full": {"form": "lokr", "modules": "conv", "rank": 1000},
    "dora of lokr": {"form": "lokr", "dora": True},
    "ia3": {"form": "ia3"},
    "oft": {"form": "oft", "modules": "conv"},
    "oft, constrained": {"form": "oft", "constraint": 0.001},
    "full": {"form": "full", "modules": "all"},
    "norms": {"modules": "conv", "norms": True},
    "attention": {"modules": "attention"},
    "everything": {"modules": "all"},
}


@contextmanager
def attached(model: Model, *, seed: int = 0, start: Any = None, **values: Any) -> Iterator[AdapterTarget]:
    target = AdapterTarget(model, AdapterOptions(**{"rank": 4, **values}), seed=seed, start=start)
    try:
        yield target
    finally:
        target.detach()


def texts(model: Model) -> tuple[str, ...]:
    return ("unet", *model.text_encoders)


CASES = cases(
    FORMS,
    alike=("lokr, full", "dora of loha", "dora of lokr", "oft, constrained", "attention"),
    of_others=("dora of loha", "ia3", "oft"),
)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_step_0_equals_the_base_bit_for_bit_and_every_part_is_trained(
    family: str, case: str, models: Callable[[str], Model]
):
    model = models(family)
    base = output(model)

    with attached(model, parts=texts(model), **FORMS[case]) as target:
        assert torch.equal(output(model), base)
        before = weights(target)
        losses = train(model, target)
        after = weights(target)
        assert not torch.allclose(output(model), base, atol=1e-4)
        assert losses[-1] < losses[0]
        assert before.keys() == after.keys() == {name for group in target.groups() for name in group.parameters}
        for name, tensor in after.items():
            if "k_proj/diff_b" not in name:  # softmax does not depend on the bias of the keys
                assert not torch.equal(tensor, before[name]), name
        with target.frozen():
            assert torch.equal(output(model), base)
        assert not torch.equal(output(model), base)
    assert torch.equal(output(model), base)


@pytest.mark.parametrize(
    "form",
    ["lora", *(pytest.param(e, marks=pytest.mark.full) for e in ("dora", "loha", "lokr", "ia3", "oft", "full"))],
)
def test_step_0_equals_the_base_bit_for_bit_in_bfloat16(form: str, narrow: Any):
    import gouache

    model = gouache.load(narrow("sd1").file, device="cpu", dtype="bf16")
    base = output(model)

    with attached(model, form=form, modules="conv", parts=texts(model)) as target:
        assert torch.equal(output(model), base)
        assert all(parameter.dtype == torch.float32 for parameter in target.adapter.parameters())
        train(model, target)
        assert not torch.equal(output(model), base)


def test_names_and_values_depend_only_on_the_seed_and_the_module(models: Callable[[str], Model]):
    model = models("sd1")
    with attached(model) as target:
        few, config = weights(target), target.config()
    with attached(model, modules="conv", parts=texts(model)) as target:
        many = weights(target)
    with attached(model) as target:
        again, config_again = weights(target), target.config()
    with attached(model, seed=1) as target:
        other = weights(target)

    key = "adapter.unet/middle_block/1/transformer_blocks/0/attn2/to_k/lora_down/weight"
    assert few[key].shape == (4, 64) and few.keys() < many.keys()
    assert all(torch.equal(few[name], tensor) for name, tensor in again.items()) and config == config_again
    assert all(torch.equal(many[name], tensor) for name, tensor in few.items())
    assert not torch.equal(few[key], other[key])
    assert all(tensor.abs().sum() == 0 for name, tensor in few.items() if "lora_up" in name)


def test_a_factor_that_trains_gets_its_gradient_from_the_adapted_layer(models: Callable[[str], Model]):
    """At step 0 the gradient of B is that of the weight, times A transposed and alpha / rank."""
    model = models("sd1")
    path = "middle_block.1.transformer_blocks.0.attn2.to_k"
    layer = model.unet.get_submodule(path)
    from tests.training.targets.steps import loss

    layer.requires_grad_(True)
    try:
        loss(model).backward()
        expected = layer.weight.grad.clone()
    finally:
        layer.requires_grad_(False)
        layer.weight.grad = None
    with attached(model, alpha=2.0) as target:
        loss(model).backward()
        key = f"unet/{path.replace('.', '/')}/lora"
        up, down = (getattr(target.adapter, f"{key}_{part}/weight") for part in ("up", "down"))
        torch.testing.assert_close(up.grad, 0.5 * expected @ down.T, atol=1e-6, rtol=1e-4)
        assert all(parameter.grad is None for parameter in model.unet.parameters())


def test_ranks_alphas_and_rates_by_part_block_and_prefix(models: Callable[[str], Model]):
    model = models("sd1")
    options = {
        "parts": texts(model),
        "modules": "conv",
        "conv_rank": 3,
        "ranks": {"text_encoder": 2, "OUT11": 0, "input_blocks.4": 6, "unet.input_blocks.4.1.proj_in": 5},
        "alphas": {"M00": 1.0, "text_encoder": 8.0},
        "rates": {"text_encoder": 0.1, "M00": 0.5},
        "loraplus": 16.0,
    }

    with attached(model, **options) as target:
        ranks = {module: target.adapter.patch(module).rank for module in target.modules}
        alphas = {module: float(target.adapter.patch(module).parts["alpha"]) for module in target.modules}
        rates = {name: group.rate for group in target.groups() for name in group.parameters}

    assert ranks["unet", "input_blocks.4.1.proj_in"] == 5
    assert ranks["unet", "input_blocks.4.1.proj_out"] == 6
    assert ranks["unet", "input_blocks.4.0.in_layers.2"] == 3  # a 3x3 convolution
    assert ranks["unet", "output_blocks.3.1.proj_in"] == 4
    assert ranks["text_encoder", "text_model.encoder.layers.0.mlp.fc1"] == 2
    assert not any(path.startswith("output_blocks.11.") for _, path in ranks)
    assert alphas["unet", "middle_block.1.proj_in"] == 1.0
    assert alphas["text_encoder", "text_model.encoder.layers.0.mlp.fc1"] == 8.0
    assert alphas["unet", "output_blocks.3.1.proj_in"] == 4.0
    assert rates["adapter.unet/middle_block/1/proj_in/lora_down/weight"] == 0.5
    assert rates["adapter.unet/middle_block/1/proj_in/lora_up/weight"] == 8.0
    assert rates["adapter.text_encoder/text_model/encoder/layers/0/mlp/fc1/lora_down/weight"] == pytest.approx(0.1)
    assert rates["adapter.unet/input_blocks/4/1/proj_in/lora_down/weight"] == 1.0


def test_the_groups_do_not_depend_on_the_values_of_rates(models: Callable[[str], Model]):
    """So that all rates may change when a run is resumed, also from and to equal ones."""
    model, groups = models("sd1"), []
    for text, block, ratio in ((0.5, 0.5, 1.0), (1.0, 1.0, 1.0), (0.1, 2.0, 16.0), (0.5, 8.0, 2.0)):
        rates = {"text_encoder": text, "M00": block}
        with attached(model, parts=texts(model), rates=rates, loraplus=ratio) as target:
            groups.append([(list(group.parameters), group.decay) for group in target.groups()])
            factors = {group.rate for group in target.groups()}
            assert factors == target.options.rate_factors

    assert all(each == groups[0] for each in groups)


def test_the_modules_of_each_choice(models: Callable[[str], Model]):
    model = models("sd1")
    linear = {(p, n) for p in texts(model) for n, m in _networks(model)[p].named_modules() if isinstance(m, nn.Linear)}
    convolutions = {("unet", n) for n, m in model.unet.named_modules() if isinstance(m, nn.Conv2d)}
    found = {}
    for choice in ("attention", "linear", "conv", "all"):
        with attached(model, modules=choice, parts=texts(model)) as target:
            found[choice] = set(target.modules)

    assert found["all"] == linear | convolutions
    assert found["attention"] < found["linear"] < found["conv"] < found["all"]
    # kohya's LoRA of SD1: 12 linear layers per transformer block and 2 convolutions around each, 6 per text layer.
    blocks = sum(path.endswith("attn2.to_k") for _, path in found["linear"])
    layers = sum(path.endswith("fc1") for _, path in found["linear"])
    assert len(found["linear"]) == blocks * (8 + 2 + 2) + layers * 6
    left = found["all"] - found["conv"]
    assert {path for _, path in left} == {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"}


def _networks(model: Model) -> dict[str, nn.Module]:
    return {"unet": model.unet, **model.text_encoders}


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_layers_that_no_output_depends_on_are_not_trained(family: str, models: Callable[[str], Model]):
    """SDXL's context is the output of each encoder's last layer but one; the pooled vector is the second's last."""
    model = models(family)
    with attached(model, parts=texts(model)) as target:
        layers = {name: len(each.text_model.encoder.layers) for name, each in model.text_encoders.items()}
        trained = {n: {int(path.split(".")[3]) for part, path in target.modules if part == n} for n in layers}

    expected = {name: set(range(count)) for name, count in layers.items()}
    if family == "sdxl":
        expected["text_encoder"].discard(layers["text_encoder"] - 1)
    assert trained == expected


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1", 2), ("sd2", 1), ("sdxl", 1)])
def test_with_a_clip_skip_the_layers_are_trained_that_prompts_depend_on(
    family: str, clip_skip: int, models: Callable[[str], Model]
):
    model = models(family)
    with attached(model, parts=tuple(model.text_encoders), clip_skip=clip_skip) as target:
        found = model.encode_prompts(["a cat"], clip_skip=clip_skip)
        sums = [each.sum() for each in (found.context, found.vector) if each is not None]
        reached = torch.autograd.grad(sum(sums), [*target.adapter.parameters()], allow_unused=True)
        trained = len({(part, path.split(".")[3]) for part, path in target.modules})

    assert all(each is not None for each in reached)
    layers = {name: len(each.text_model.encoder.layers) for name, each in model.text_encoders.items()}
    pooled = layers.pop("text_encoder_2", 0)  # its last layer gives SDXL's vector
    assert trained == pooled + sum(layers.values()) - (clip_skip - 1) * len(layers)


@pytest.mark.parametrize(
    "form",
    ["lora", *(pytest.param(e, marks=pytest.mark.full) for e in ("oft", "dora", "loha", "lokr", "ia3", "full"))],
)
def test_training_goes_on_from_the_weights_of_a_file(form: str, models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    with attached(model, form=form, parts=texts(model)) as target:
        train(model, target)
        target.export({}, tmp_path / "first.safetensors", metadata={})
        expected, before = output(model), weights(target)

    with attached(model, start=open_model(tmp_path / "first.safetensors"), parts=texts(model)) as target:
        torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)
        assert weights(target).keys() == before.keys() and not target.notes
        train(model, target)
        assert not torch.allclose(output(model), expected, atol=1e-4)
        target.export({}, tmp_path / "second.safetensors", metadata={})
        trained = output(model)

    with attached(model, start=open_model(tmp_path / "second.safetensors"), parts=("unet",)) as target:
        assert len(target.notes) == 1 and "not trained, the first is text_encoder" in target.notes[0]
        assert not target.trains_text
    loaded = model.attach(tmp_path / "second.safetensors")
    torch.testing.assert_close(output(model), trained, atol=1e-4, rtol=1e-4)
    loaded.detach()


def test_a_text_encoder_stops_after_its_batches(models: Callable[[str], Model]):
    model = models("sd1")
    with attached(model, parts=texts(model), stop_after={"text_encoder": 2}) as target:
        assert target.trains_text
        train(model, target, steps=2)
        at_stop = weights(target)
        train(model, target, steps=2)  # batches 0 and 1 again
        assert not any(torch.equal(t, at_stop[n]) for n, t in weights(target).items() if n.startswith("adapter.text"))
        at_stop = weights(target)
        for number in (2, 3):
            target.begin_batch(number)
            frozen = [n for g in target.groups() for n, p in g.parameters.items() if not p.requires_grad]
            assert frozen and all(name.startswith("adapter.text_encoder/") for name in frozen)
        assert len(frozen) == sum(name.startswith("adapter.text_encoder/") for name in at_stop)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "lorax"}, "'lorax' is not known; use lora, locon"),
        ({"modules": "some"}, "use attention, linear, conv, all"),
        ({"parts": ("vae",)}, "'vae' is not a part; the model has unet, text_encoder"),
        ({"form": "ia3", "dora": True}, "does not apply to ia3; it applies to lora, loha, lokr"),
        ({"form": "oft", "loraplus": 2.0}, "does not apply to oft"),
        ({"rank": 0}, "is 0; expected 1 or more"),
        ({"ranks": {"IN99": 4}}, "'IN99' is no trained part, block or prefix of a module; the nearest is IN"),
        ({"ranks": {"unet": 0}}, "no module of unet is left"),
        ({"alpha": float("nan")}, "is nan; expected a number of 0 or more"),
        ({"stop_after": {"unet": 3}}, "stops all trained parts"),
        ({"stop_after": {"text_encoder": 3}}, "is not trained; trained are unet"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, Any], message: str, models: Callable[[str], Model]):
    model = models("sd1")
    with pytest.raises(RequestError, match=message):
        AdapterTarget(model, AdapterOptions(**{"rank": 4, **values}), seed=0)
    assert not list(model.adapters)


def test_an_adapter_of_another_family_is_not_a_start(models: Callable[[str], Model], tmp_path: Path):
    with attached(models("sdxl"), parts=("text_encoder_2",)) as target:
        target.export({}, tmp_path / "xl.safetensors", metadata={})
    with pytest.raises(ModelError, match="changes no module of unet of this model"):
        AdapterTarget(models("sd1"), AdapterOptions(), seed=0, start=open_model(tmp_path / "xl.safetensors"))


def test_pairs_of_factors_are_those_of_lycoris():
    lycoris = pytest.importorskip("lycoris.functional")
    for size in (1, 7, 12, 32, 64, 127, 250, 320, 360, 512, 640, 1280, 2048):
        for limit in (-1, 1, 2, 3, 4, 5, 8, 16, 50):
            assert factor_pair(size, limit) == lycoris.factorization(size, limit), (size, limit)
