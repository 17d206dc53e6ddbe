"""Reads pickles of numpy arrays in dictionaries, as BYOL's authors published theirs, without running them.

A pickle is a program that calls whatever it names. Here a name never leads to an import: `WORDS` has all
that may occur, each with a stand-in of this module's that only builds values. Everything else is refused.
Numpy's own constructors are not called either: dtype, shape and bytes are checked and make the array.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest

__all__ = ["is_plain_pickle", "read_arrays"]

TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850")
"""The number that opens files of `torch.save` from before its zip format, behind the protocol's two bytes."""


def is_plain_pickle(path: Path) -> bool:
    """Whether the file is a binary pickle that torch did not write. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(16)
    return start[:1] == b"\x80" and start[2 : 2 + len(TORCH_MAGIC)] != TORCH_MAGIC


def read_arrays(path: Path) -> Any:
    """Nested dictionaries, lists and tuples with numpy arrays and plain values; named tuples as dictionaries.

    Raises:
        BadRequest: The file asks for something else, or ends early.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Reader(file).load())
    except BadRequest:
        raise
    except _Forbidden as error:
        raise BadRequest(
            f"'{path}' holds a Python object ({error}), which could run code; give a file of numpy arrays in "
            "dictionaries alone, as BYOL's authors publish theirs.",
            param="start",
        ) from None
    except Exception as error:  # noqa: BLE001 -- a damaged pickle raises whatever its opcodes stumble over
        raise BadRequest(
            f"'{path}' cannot be read as a pickle of arrays ({str(error) or type(error).__name__}); is it "
            "complete?",
            param="start",
        ) from None


class _Forbidden(pickle.UnpicklingError):
    """The name of what a pickle must not have."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return WORDS[f"{module}.{name}"]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


class _Dtype:
    """Stands for numpy.dtype: a code such as "f4", and the byte order that follows as its state."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def numpy(self) -> np.dtype[Any]:
        if self.code[:1] not in "fiub" or not self.code[1:].isdecimal() or self.order not in "<>|=":
            raise _Forbidden(f"an array of dtype '{self.code}'")
        return np.dtype(f"{'<' if self.order in '|=' else self.order}{self.code}")


class _Array:
    """Stands for numpy.ndarray; dtype, shape and bytes come as its state."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, content = state
        flat = np.frombuffer(content, dtype.numpy())
        self.value = flat.reshape(shape, order="F" if columns_first else "C")


class _Fields:
    """Stands for a named tuple's class, which `names` completes."""

    names: tuple[str, ...] = ()
    values: dict[str, object]

    def __new__(cls, *values: object) -> _Fields:  # what pickles call for tuples
        self = super().__new__(cls)
        self.values = dict(zip(cls.names, values, strict=True))
        return self


def _named_tuple(name: str, fields: tuple[str, ...], *_: object) -> type[_Fields]:
    return type(str(name), (_Fields,), {"names": tuple(fields)})


class _ByolState(_Fields):
    """By name, as pickle itself writes BYOL's state; dill writes out its fields."""

    names = ("online_params", "target_params", "online_state", "target_state", "opt_state")


class _LarsState(_Fields):
    names = ("mu",)


class _Nothing(_Fields):
    """A state without fields."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _create_array(
    make: Callable[..., _Array], args: tuple[Any, ...], state: tuple[Any, ...], *_: object
) -> _Array:
    """dill's way to write an array."""
    array = make(*args)
    array.__setstate__(state)
    return array


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.numpy(), count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise _Forbidden(f"text in '{encoding}'")
    return text.encode("latin1")


def _mapping(items: Mapping[Any, Any] | list[Any] = ()) -> dict[Any, Any]:  # type: ignore[assignment]
    return dict(items)


def _no_bytes() -> bytes:
    return b""


WORDS: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.multiarray.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": _mapping,
    **{
        f"{dill}.{name}": stand_in
        for dill in ("dill._dill", "dill.dill")
        for name, stand_in in (("_create_namedtuple", _named_tuple), ("_create_array", _create_array))
    },
    **{f"haiku._src.data_structures.{name}": _mapping for name in ("FlatMapping", "FlatMap", "frozendict")},
    "byol.byol_experiment._ByolExperimentState": _ByolState,
    "byol.utils.optimizers.ScaleByLarsState": _LarsState,
    "byol.utils.optimizers.AddWeightDecayState": _Nothing,
    **{f"optax._src.{module}.ScaleState": _Nothing for module in ("transform", "base")},
    "optax._src.base.EmptyState": _Nothing,
}  # fmt: skip
"""What a pickle may name, and what it gets."""


def _plain(value: Any) -> Any:
    """The stand-ins exchanged for what they stand for."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without content")
        return value.value
    if isinstance(value, _Fields):
        return _plain(value.values)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
