"""Every form of adapter compared with the libraries that train it: the weights merged by LyCORIS and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gouache.adapters.patch import Patch
from gouache.adapters.read import read_lora
from gouache.files.open import open_model

lycoris = pytest.importorskip("lycoris.modules")
peft = pytest.importorskip("peft")


def layer(name: str) -> nn.Module:
    torch.manual_seed(3)
    return {
        "linear": lambda: nn.Linear(24, 16),
        "square": lambda: nn.Linear(16, 16),
        "conv": lambda: nn.Conv2d(8, 16, 3, padding=1),
        "pointwise": lambda: nn.Conv2d(8, 16, 1),
        "norm": lambda: nn.LayerNorm(16),
        "groups": lambda: nn.GroupNorm(4, 16),
    }[name]()


def randomise(module: nn.Module, keep: tuple[str, ...] = ("alpha", "on_input", "dora_scale")) -> None:
    """Add random values, because trainers initialise some parameters to zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if name.split(".")[-1] not in keep and "org_module" not in name and tensor.is_floating_point():
                tensor.copy_(tensor + 0.1 * torch.randn(tensor.shape, generator=generator))


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("LoConModule", "linear", {}),
    "lora of a convolution": ("LoConModule", "conv", {}),
    "lora of a 1x1 convolution": ("LoConModule", "pointwise", {}),
    "lora with a core": ("LoConModule", "conv", {"use_tucker": True}),
    "lora, rank-stabilised": ("LoConModule", "linear", {"rs_lora": True}),
    "dora by column": ("LoConModule", "linear", {"weight_decompose": True, "wd_on_out": False}),
    "dora by row": ("LoConModule", "linear", {"weight_decompose": True, "wd_on_out": True}),
    "dora of a convolution by column": ("LoConModule", "conv", {"weight_decompose": True, "wd_on_out": False}),
    "dora of a convolution by row": ("LoConModule", "conv", {"weight_decompose": True, "wd_on_out": True}),
    "loha": ("LohaModule", "linear", {}),
    "loha of a convolution": ("LohaModule", "conv", {}),
    "loha with cores": ("LohaModule", "conv", {"use_tucker": True}),
    "lokr": ("LokrModule", "linear", {"factor": 4}),
    "lokr, full": ("LokrModule", "linear", {"factor": 4, "lora_dim": 10000}),
    "lokr, both decomposed": ("LokrModule", "square", {"decompose_both": True, "lora_dim": 1, "factor": 4}),
    "lokr of a convolution": ("LokrModule", "conv", {"factor": 2}),
    "lokr with a core": ("LokrModule", "conv", {"factor": 2, "use_tucker": True, "lora_dim": 2}),
    "ia3 on inputs": ("IA3Module", "linear", {"train_on_input": True}),
    "ia3 on outputs": ("IA3Module", "linear", {}),
    "ia3 of a convolution": ("IA3Module", "conv", {}),
    "oft": ("DiagOFTModule", "linear", {}),
    "oft, constrained": ("DiagOFTModule", "linear", {"constraint": 0.01}),
    "oft, rescaled": ("DiagOFTModule", "linear", {"rescaled": True}),
    "oft of a convolution": ("DiagOFTModule", "conv", {}),
    "boft": ("ButterflyOFTModule", "linear", {}),
    "boft, rescaled": ("ButterflyOFTModule", "linear", {"rescaled": True}),
    "boft of a convolution": ("ButterflyOFTModule", "conv", {}),
    "glora": ("GLoRAModule", "linear", {}),
    "glora of a convolution": ("GLoRAModule", "conv", {}),
    "full difference": ("FullModule", "linear", {}),
    "full difference of a convolution": ("FullModule", "conv", {}),
    "layer norm": ("NormModule", "norm", {}),
    "group norm": ("NormModule", "groups", {}),
}


# With DoRA norms or rescaling, LyCORIS and image generators apply the strength differently; Gouache follows A1111.
AT_STRENGTH_1 = [(case, 1.0) for case in CASES]
AT_OTHER_STRENGTHS = [(case, 0.6) for case in CASES if "dora" not in case and "rescaled" not in case]


@pytest.mark.parametrize(("case", "strength"), [*AT_STRENGTH_1, *AT_OTHER_STRENGTHS])
def test_the_output_of_a_patched_layer_equals_that_of_lycoris(case: str, strength: float):
    name, layer_name, options = CASES[case]
    original = layer(layer_name)
    old = {name: tensor.detach().clone() for name, tensor in original.named_parameters()}
    module = getattr(lycoris, name)("x", original, strength, **{"lora_dim": 4, "alpha": 2, **options})
    module.apply_to()
    randomise(module)
    parts = {key: tensor.detach().float() for key, tensor in module.state_dict().items() if "org_module" not in key}
    x = torch.randn(2, *{"conv": (8, 5, 5), "pointwise": (8, 5, 5), "groups": (16, 3, 3)}.get(layer_name, (7, 24)))
    x = x[..., :16] if layer_name in ("square", "norm") else x

    made = Patch({{"w_norm": "diff", "b_norm": "diff_b"}.get(key, key): tensor for key, tensor in parts.items()})

    ours = layer(layer_name)
    with torch.no_grad():
        ours.weight.copy_(made.weight(old["weight"], strength))
        ours.bias.copy_(made.bias(old["bias"], strength))
        theirs = original(x)
        torch.testing.assert_close(ours(x), theirs, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(layer(layer_name)(x), theirs, atol=1e-2)


def test_oft_with_stored_rotations():
    """Early LyCORIS files store R itself as `oft_diag` (blocks, width, width); it rotates the rows."""
    weight = layer("linear").weight.detach()
    rotation = torch.linalg.qr(torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0)))[0]

    made = Patch({"oft_diag": rotation}).weight(weight, 1.0)

    expected = torch.cat([rotation[block].T @ weight[4 * block : 4 * block + 4] for block in range(4)])
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made.norm(), weight.norm())  # a rotation preserves norms


def test_a_sparse_residual_is_added_to_the_factors():
    weight = layer("linear").weight.detach()
    indices, values = torch.tensor([[0, 3], [5, 7]]), torch.tensor([2.0, -1.0])
    up, down = torch.randn(16, 2), torch.randn(2, 24)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "bias_indices": indices.float(), "bias_values": values}

    made = Patch({**parts, "bias_size": torch.tensor([16.0, 24.0])}).weight(weight, 0.5)

    expected = weight + 0.5 * up @ down
    expected[0, 5] += 1.0
    expected[3, 7] -= 0.5
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lin = nn.Linear(24, 16)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lin", "conv"]),
    "rank-stabilised": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["lin", "conv"]),
    "alpha and rank patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["lin", "conv"], alpha_pattern={"conv": 2}, rank_pattern={"lin": 2}
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["lin", "conv"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=["lin", "conv"]),
    "loha with cores": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=["lin", "conv"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=4, target_modules=["lin", "conv"]),
    "lokr with a core": lambda: peft.LoKrConfig(
        r=2, alpha=4, target_modules=["lin", "conv"], use_effective_conv2d=True, decompose_both=True
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["lin", "conv"], feedforward_modules=[]),
    "ia3 on inputs": lambda: peft.IA3Config(target_modules=["lin", "conv"], feedforward_modules=["lin", "conv"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["lin"], use_cayley_neumann=False),
    "oft, Cayley series": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["lin"], use_cayley_neumann=True),
    "oft of a convolution": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=["lin", "conv"], use_cayley_neumann=False
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["lin"]),
    "boft of a convolution": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["lin", "conv"]),
}


@pytest.mark.parametrize("case", PEFT)
def test_the_patched_weight_equals_pefts_merged_weight(case: str, tmp_path: Path):
    original = Net()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    model = peft.get_peft_model(original, PEFT[case]())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad and "magnitude" not in name:
                tensor.copy_(tensor + 0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()

    names = {"lin": (("net", "lin"),), "conv": (("net", "conv"),)}
    adapter = read_lora(open_model(tmp_path / "adapter_model.safetensors"), names)

    assert not adapter.unmatched
    assert {path for _, path in adapter.tensors} == set(PEFT[case]().target_modules)
    for module in adapter.tensors:
        weight = before[f"{module[1]}.weight"]
        made = adapter.patch(module).weight(weight, 1.0)
        torch.testing.assert_close(made, merged[f"{module[1]}.weight"], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(made, weight, atol=1e-3)


def test_a_butterfly_of_several_stages_equals_pefts(tmp_path: Path):
    """PEFT trains these only on a GPU, so its permutations and blocks are obtained one by one and multiplied here."""
    net = peft.get_peft_model(Net(), PEFT["boft"]()).base_model.model.lin
    generator = torch.Generator().manual_seed(2)
    data, scale = 0.3 * torch.randn(3, 8, 4, 4, generator=generator), 1 + 0.1 * torch.randn(16, 1, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    product = torch.eye(32)
    for stage in range(3):
        blocks = torch.block_diag(*net.cayley_batch(data[stage]))
        permutation = net.perm2mat(net.block_butterfly_perm(32, 8 // 2**stage, 2, 2))
        product = permutation @ blocks @ permutation.T @ product

    made = Patch({"boft_R": data, "boft_s": scale}).weight(weight, 1.0)

    torch.testing.assert_close(made, (product @ weight.T).T * scale, atol=1e-5, rtol=1e-5)


def test_alpha_from_the_header_that_diffusers_writes(tmp_path: Path):
    up, down = torch.randn(16, 4), torch.randn(4, 24)
    config = {"unet.lora_alpha": 2, "unet.r": 4, "unet.use_rslora": False}
    save_file(
        {"unet.lin.lora_A.weight": down, "unet.lin.lora_B.weight": up},
        tmp_path / "lora.safetensors",
        {"lora_adapter_metadata": json.dumps(config)},
    )

    adapter = read_lora(open_model(tmp_path / "lora.safetensors"), {"unet.lin": (("unet", "lin"),)})

    change = adapter.patch(("unet", "lin")).change(torch.zeros(16, 24), 1.0)
    torch.testing.assert_close(change, up @ down * 2 / 4)


def test_a_change_of_fused_modules_is_split(tmp_path: Path):
    """OpenCLIP stores query, key and value in one weight, and so does a LoRA trained on it."""
    up, down = torch.randn(48, 4), torch.randn(4, 16)
    save_file({"x_in_proj.lora_up.weight": up, "x_in_proj.lora_down.weight": down}, tmp_path / "lora.safetensors")
    names = {"x_in_proj": tuple(("te", part) for part in "qkv")}

    adapter = read_lora(open_model(tmp_path / "lora.safetensors"), names)

    for index, part in enumerate("qkv"):
        change = adapter.patch(("te", part)).change(torch.zeros(16, 16), 1.0)
        torch.testing.assert_close(change, (up @ down)[16 * index : 16 * index + 16])
