"""Values other than tensors in checkpoints are read as plain values, without the libraries that wrote them."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from gouache.files.open import open_model
from gouache.files.pickle_tree import Record
from gouache.files.record import TensorInfo

from .fake_modules import config, fake_modules


def extra_of(path: Path, value: Any, zipped: bool = True, protocol: int = 2) -> dict[str, Any]:
    torch.save(
        {"w": torch.zeros(1), "value": value},
        path / "extra.ckpt",
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    return dict(open_model(path / "extra.ckpt").extra)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None, True, -3, 2**100, -(2**200), 1.5, float("inf"), "text", "ünï\N{SMILING FACE WITH HORNS}", b"bytes\xff",
        bytes(300), [1, [2, []]], (1, (2,)), (1, 2, 3, 4), {}, {"a": {1: "b", 2.5: None}}, {1, 2}, set(),
        frozenset("a"), 2 + 3j, "x" * 300,
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_plain_values_are_preserved(tmp_path: Path, value: Any, protocol: int):
    assert extra_of(tmp_path, value, protocol=protocol)["value"] == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(a=1, b=[2]), {"a": 1, "b": [2]}),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.deque([1, 2], maxlen=5), [1, 2]),
        (bytearray(b"abc\xff"), b"abc\xff"),
        (torch.Size([2, 3]), (2, 3)),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (torch.float16, "torch.float16"),
        (torch.strided, "torch.strided"),
        (pathlib.PurePosixPath("/a/b/c.txt"), "/a/b/c.txt"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
        (pathlib.PureWindowsPath("C:\\a\\b"), "C:\\a\\b"),
        (numpy.float32(1.5), 1.5),
        (numpy.float64(-2.25), -2.25),
        (numpy.int64(-7), -7),
        (numpy.uint8(200), 200),
        (numpy.bool_(True), True),
        (numpy.complex64(1 + 2j), 1 + 2j),
        (argparse.Namespace(lr=0.1, tags=["a"]), Record("argparse.Namespace", (), {"lr": 0.1, "tags": ["a"]})),
        (datetime.timedelta(1), Record("datetime.timedelta", (1, 0, 0))),
        (nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_known_classes_become_plain_values(tmp_path: Path, value: Any, expected: Any):
    for zipped in (True, False):
        assert extra_of(tmp_path, value, zipped)["value"] == expected


def test_numpy_random_state_and_text_are_read(tmp_path: Path):
    found = extra_of(tmp_path, {"state": numpy.random.RandomState(3).get_state(), "text": numpy.str_("hello")})

    assert found["value.state.0"] == "MT19937"
    assert found["value.text"] == Record("numpy.scalar")
    assert open_model(tmp_path / "extra.ckpt").tensors["value.state.1"] == TensorInfo((624,), "U32")


def test_a_lightning_checkpoint_opens_without_lightning(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with fake_modules() as classes:
        callback = classes["ModelCheckpoint"]()
        callback.__dict__.update(monitor="val/loss", best_model_score=torch.tensor(0.5), dirpath=Path("/ckpt"))
        settings = config(classes, {"model": {"base_learning_rate": 1e-4, "layers": [1, 2]}, "name": "sd"})
        checkpoint = {
            "epoch": 3,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": model.state_dict(),
            "callbacks": {classes["ModelCheckpoint"]: {"best_model_score": torch.tensor(0.25)}, "object": callback},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [{"base_lrs": [1e-4], "_step_count": 2, "lr_lambdas": [None]}],
            "hyper_parameters": classes["AttributeDict"](unet_config=settings, scale_factor=0.18215),
            "hparams": settings,
        }
        torch.save(checkpoint, tmp_path / "lightning.ckpt")

    file = open_model(tmp_path / "lightning.ckpt")

    assert list(file) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert file.tensor(name).equal(tensor)
    assert file.extra["global_step"] == 470000
    expected = {"model": {"base_learning_rate": 1e-4, "layers": [1, 2]}, "name": "sd"}
    assert file.extra["hyper_parameters"] == {"unet_config": expected, "scale_factor": 0.18215}
    assert file.extra["hparams"] == expected
    key = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert file.extra["callbacks"][key] == {"best_model_score": TensorInfo((), "F32")}
    assert file.extra["callbacks"]["object"] == Record(
        key, (), {"monitor": "val/loss", "best_model_score": TensorInfo((), "F32"), "dirpath": "/ckpt"}
    )
    state = file.extra["optimizer_states"][0]
    assert state["state"][0]["exp_avg"] == TensorInfo((2, 3), "F32")
    assert state["param_groups"][0]["lr"] == 0.5
    assert file.notes == ()


@pytest.mark.parametrize("form", ["key", "value", "object"])
def test_an_unknown_class_is_refused_even_if_it_is_only_named(tmp_path: Path, form: str):
    from gouache.errors import UnsafeFile

    with fake_modules() as classes:
        unknown = classes["Callback"]
        values = {"key": {unknown: 1}, "value": unknown, "object": unknown()}
        torch.save({"w": torch.zeros(1), "callbacks": values[form]}, tmp_path / "unknown.ckpt")

    with pytest.raises(UnsafeFile, match=r"somewhere\.training\.Callback \(byte \d+\)"):
        open_model(tmp_path / "unknown.ckpt")


@pytest.mark.parametrize(
    "value",
    [collections.defaultdict(float), collections.defaultdict(str, {"a": "b"}), nn.ReLU, int, numpy.str_("ab"),
     numpy.datetime64("2024-01-01"), numpy.zeros(2, numpy.float16), numpy.zeros(3, "S2"), numpy.array(["a", "bc"])],
    ids=repr,
)  # fmt: skip
def test_default_factories_classes_and_plain_arrays_are_read(tmp_path: Path, value: Any):
    extra_of(tmp_path, value)


@pytest.mark.parametrize("value", [numpy.array([None, 1]), numpy.zeros(1, [("a", "f4"), ("b", "O")])], ids=["O", "V"])
def test_arrays_of_objects_and_fields_are_refused(tmp_path: Path, value: Any):
    from gouache.errors import UnsafeFile

    with pytest.raises(UnsafeFile, match=r"numpy\.dtype"):
        extra_of(tmp_path, value)


def test_a_pickled_module_is_refused_with_the_name_of_its_class(tmp_path: Path):
    from gouache.errors import UnsafeFile

    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")

    with pytest.raises(UnsafeFile, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_model(tmp_path / "module.pt")


def test_tensors_of_an_a1111_embedding_are_named_by_their_keys(tmp_path: Path):
    vectors = torch.randn(4, 768, generator=torch.Generator().manual_seed(1))
    embedding = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": nn.Parameter(vectors)},
        "name": "cat",
        "step": 9,
    }
    torch.save(embedding, tmp_path / "cat.pt")

    file = open_model(tmp_path / "cat.pt")

    assert list(file) == ["string_to_param.*"]
    assert file.tensor("string_to_param.*").equal(vectors)
    assert file.extra == {"string_to_token": {"*": 265}, "name": "cat", "step": 9}


def test_an_a1111_embedding_with_a_parameter_dict_gets_the_same_names(tmp_path: Path):
    torch.save({"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 8))})}, tmp_path / "old.pt")

    assert list(open_model(tmp_path / "old.pt")) == ["string_to_param.*"]


def test_tensors_of_an_a1111_hypernetwork_are_named_by_width_position_and_key(tmp_path: Path):
    half = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    halves = ({f"linear.{key}": value for key, value in half.state_dict().items()},) * 2
    network = {320: halves, "step": 5000, "name": "style", "layer_structure": [1, 2, 1], "activation_func": "relu",
               "is_layer_norm": False}  # fmt: skip
    torch.save(network, tmp_path / "style.pt")

    file = open_model(tmp_path / "style.pt")

    assert "320.0.linear.0.weight" in file and "320.1.linear.2.bias" in file and len(file) == 8
    assert file.extra["layer_structure"] == [1, 2, 1]
    assert file.extra["activation_func"] == "relu"


def test_plain_values_next_to_tensors_go_to_extra(tmp_path: Path):
    torch.save({"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}, "groups": [{"lr": 0.1}]}, tmp_path / "opt.pt")

    file = open_model(tmp_path / "opt.pt")

    assert list(file) == ["state.0.exp_avg"]
    assert file.extra == {"state.0.step": 5, "groups": [{"lr": 0.1}]}
