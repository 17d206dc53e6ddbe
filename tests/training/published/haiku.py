"""BYOL's checkpoint as its authors' code pickles it, with dill and haiku standing in by name.

Read off what dill 0.4.1 and dm-haiku 0.0.17 write for the state of a real haiku network, opcode by opcode.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["checkpoint", "state_of"]

Nested = dict[str, dict[str, NDArray[np.float32]]]


def state_of(network: nn.Module, root: str = "res_net50") -> tuple[Nested, Nested]:
    """Parameters and running averages of a ResNet of torchvision's names, by haiku's and in its layout."""
    params: Nested = {}
    averages: Nested = {}
    for name, tensor in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        where, norm = f"{root}/~/{haiku_name(module)}", tensor.ndim == 1
        if kind.startswith("running"):
            average = shaped(tensor)
            values = {"average": average, "hidden": average, "counter": np.array(7, np.int32)}
            averages[f"{where}/~/{kind.removeprefix('running_')}_ema"] = values
        elif norm:
            params.setdefault(where, {})["scale" if kind == "weight" else "offset"] = shaped(tensor)
        else:
            params[where] = {"w": np.ascontiguousarray(tensor.permute(2, 3, 1, 0).numpy())}
    return params, averages


def shaped(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.numpy().reshape(1, 1, 1, -1).copy()


def haiku_name(module: str) -> str:
    """layer2.0.downsample.1 → block_group_1/~/block_0/~/shortcut_batchnorm"""
    if not module.startswith("layer"):
        return {"conv1": "initial_conv", "bn1": "initial_batchnorm"}[module]
    stage, block, inside = module.removeprefix("layer").split(".", 2)
    if inside.startswith("downsample"):
        own = "shortcut_conv" if inside.endswith("0") else "shortcut_batchnorm"
    else:
        kind, number = ("conv", inside[4:]) if inside.startswith("conv") else ("batchnorm", inside[2:])
        own = f"{kind}_{int(number) - 1}"
    return f"block_group_{int(stage) - 1}/~/block_{block}/~/{own}"


def heads() -> tuple[Nested, Nested]:
    params: Nested = {"classifier": {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}}
    averages: Nested = {}
    for head in ("projector", "predictor"):
        params[f"{head}/linear"] = {"w": np.ones((4, 8), np.float32), "b": np.ones(8, np.float32)}
        params[f"{head}/batch_norm"] = {name: np.ones(8, np.float32) for name in ("scale", "offset")}
        params[f"{head}/linear_1"] = {"w": np.ones((8, 2), np.float32)}
        for kind in ("mean", "var"):
            averages[f"{head}/batch_norm/~/{kind}_ema"] = {"average": np.ones(8, np.float32)}
    return params, averages


def checkpoint(params: Nested, averages: Nested, *, today: bool = True) -> bytes:
    """The pickle. `today`: dill's and numpy's names of now, else those of 2020 where they differ."""
    more, more_averages = heads()
    params, averages = more | params, more_averages | averages
    # The other copies of the network are whole in truth; here the last tensors do.
    few = dict(list(params.items())[-4:])
    target = {module: {name: value + 1 for name, value in values.items()} for module, values in few.items()}
    with modules() as (state, mapping, reducer):
        frozen = "FlatMapping" if today else "frozendict"

        def flat(nested: Nested) -> Any:
            return mapping(frozen, {name: mapping(frozen, values) for name, values in nested.items()})

        content = {
            "experiment_state": state(
                flat(params), flat(target), flat(averages), flat(averages), [flat(few), ()]
            ),
            "step": np.int64(7),
            "rng": np.array([0, 7], np.uint32),
        }
        file = io.BytesIO()
        (reducer if today else pickle.Pickler)(file, protocol=2).dump(content)
    return file.getvalue() if today else file.getvalue().replace(b"numpy._core", b"numpy.core")


@contextmanager
def modules() -> Iterator[tuple[Any, Any, Any]]:
    """Modules of the authors' names, long enough to write what names them."""
    fake = {
        name: types.ModuleType(name)
        for name in (
            "byol", "byol.byol_experiment", "dill", "dill._dill", "haiku", "haiku._src",
            "haiku._src.data_structures",
        )
    }  # fmt: skip
    kept = {name: sys.modules.get(name) for name in fake}
    sys.modules.update(fake)
    try:
        fields = ["online_params", "target_params", "online_state", "target_state", "opt_state"]
        state = namedtuple("_ByolExperimentState", fields)
        state.__module__ = "byol.byol_experiment"
        fake["byol.byol_experiment"]._ByolExperimentState = state  # type: ignore[attr-defined]
        kinds = {
            name: placed(fake["haiku._src.data_structures"], name) for name in ("FlatMapping", "frozendict")
        }
        make = {name: placed(fake["dill._dill"], name) for name in ("_create_array", "_create_namedtuple")}

        class Mapping(dict[str, Any]):
            def __init__(self, kind: str, items: dict[str, Any]) -> None:
                super().__init__(items)
                self.kind = kind

            def __reduce__(self) -> Any:
                return kinds[self.kind], (dict(self),)

        class AsDill(pickle.Pickler):
            def reducer_override(self, value: Any) -> Any:
                if isinstance(value, np.ndarray):
                    function, args, content = value.__reduce__()
                    return make["_create_array"], (function, args, content, None)
                if value is state:
                    return make["_create_namedtuple"], (value.__qualname__, value._fields, value.__module__)
                return NotImplemented

        yield state, Mapping, AsDill
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def placed(module: types.ModuleType, name: str) -> type:
    found = type(name, (), {"__module__": module.__name__})
    setattr(module, name, found)
    return found


def tensors(nested: Nested) -> dict[str, dict[str, Tensor]]:
    return {
        module: {name: torch.from_numpy(value) for name, value in values.items()}
        for module, values in nested.items()
    }
