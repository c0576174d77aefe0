"""Fake modules whose objects pickle like those of the libraries that write real checkpoints.

They exist only while a test writes a file (`fake_modules`); reading it must not need them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLASSES = {
    "pytorch_lightning.callbacks.model_checkpoint": ["ModelCheckpoint"],
    "omegaconf.dictconfig": ["DictConfig"],
    "omegaconf.listconfig": ["ListConfig"],
    "omegaconf.base": ["ContainerMetadata", "Metadata"],
    "omegaconf.nodes": ["AnyNode"],
    "somewhere.training": ["Callback"],
}


@contextmanager
def fake_modules() -> Iterator[dict[str, Any]]:
    """The classes by name; inside the block they can be imported from their modules."""
    made: dict[str, Any] = {}
    modules: dict[str, types.ModuleType] = {}
    for module_name, class_names in _CLASSES.items():
        for end in range(1, module_name.count(".") + 2):
            part = ".".join(module_name.split(".")[:end])
            modules.setdefault(part, types.ModuleType(part))
        for class_name in class_names:
            made[class_name] = type(class_name, (), {"__module__": module_name})
            setattr(modules[module_name], class_name, made[class_name])
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    attribute = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    parsing.AttributeDict = made["AttributeDict"] = attribute  # type: ignore[attr-defined]
    sys.modules[parsing.__name__] = parsing
    try:
        yield made
    finally:
        sys.modules.pop(parsing.__name__)
        for name, module in saved.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module


def config(classes: dict[str, Any], value: Any, parent: Any = None) -> Any:
    """`value` as OmegaConf stores it: containers with references to their parents, and nodes with metadata."""

    def made(kind: str, **state: Any) -> Any:
        node = classes[kind]()
        metadata = classes["ContainerMetadata" if "Config" in kind else "Metadata"]()
        metadata.__dict__.update(ref_type=Any, object_type=dict, optional=True, key="k", flags={}, flags_root=False)
        node.__dict__.update(_metadata=metadata, _parent=parent, _flags_cache=None, **state)
        return node

    if isinstance(value, dict):
        node = made("DictConfig", _content={})
        node._content.update({key: config(classes, item, node) for key, item in value.items()})
        return node
    if isinstance(value, list):
        node = made("ListConfig", _content=[])
        node._content.extend(config(classes, item, node) for item in value)
        return node
    return made("AnyNode", _val=value)
