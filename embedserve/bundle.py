"""The encoder bundle: a folder that holds everything serving needs to know about an encoder.

    encoder.json     this module's `Description`: towers, preprocessing, scoring, hashes, probe
    image.onnx       uint8 [batch, height, width, 3] → float32 [batch, dim], unit length
    text.onnx        int64 [batch, length] → float32 [batch, dim], unit length
    tokenizer.json   Hugging Face tokenizers format
    README.md        the model card

Pixel scaling, masking (from the pad id), pooling and normalisation live inside the graphs, so whoever
reads a bundle needs none of the original code. Training writes bundles, serving reads them. This module
needs neither torch nor ONNX Runtime: it proves the files, `embedserve.encoder` proves the vectors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from embedserve.cleaning import Cleaning
from embedserve.errors import BundleError

__all__ = [
    "Bundle",
    "Description",
    "ImageOutputs",
    "ImageTower",
    "Preprocessing",
    "Probe",
    "Scoring",
    "TextTower",
    "check_out",
    "new_bundle",
    "open_bundle",
    "pack_vector",
    "seal",
    "unpack_vector",
]

MANIFEST = "encoder.json"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or set(name) & {"\\", "\0"} or not path.parts:
        raise ValueError(f"'{name}' leaves the bundle's folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(_Part):
    """How RGB pixels become the tensor. The order is resize, then centre crop to (height, width)."""

    height: PositiveInt
    width: PositiveInt
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """shortest: the shortest side becomes `resize_to`, the middle is cut out; longest: the longest side
    does, the rest is filled with `background`; squash: both sides are stretched (open_clip's names)."""
    resize_to: PositiveInt
    """Pixels; larger than the crop where the encoder was trained so (256 for a crop of 224)."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB that transparent pixels and the border of `longest` are filled with."""
    odd_crop: Literal["even", "down"] = "even"
    """Where the crop begins if half a pixel is left over: even: at the even pixel of the two (torchvision,
    open_clip, timm); down: at the first (Hugging Face)."""


class ImageOutputs(_Part):
    """What `image.onnx` gives beside the embedding, if asked: something for each cell of a grid, row by row.

    The outputs are named `patches` and `attention` and come after the embedding. The grid lies over the
    pixels that the tower gets.
    """

    rows: PositiveInt
    columns: PositiveInt
    patches: PositiveInt | None = None
    """Length of the vectors of `patches`, float32 [batch, rows · columns, length]; None: no such output."""
    attention: PositiveInt | None = None
    """Heads of `attention`, float32 [batch, heads, rows · columns]: what the token that becomes the embedding
    takes from each cell in the last block; None: no such output."""
    text_space: bool = False
    """Whether `patches` can be compared with texts, as the embedding can."""

    @model_validator(mode="after")
    def _has_an_output(self) -> ImageOutputs:
        if self.patches is None and self.attention is None:
            raise ValueError("name the length of 'patches', the heads of 'attention', or both")
        if self.text_space and self.patches is None:
            raise ValueError("'text_space' speaks of 'patches', which are not there")
        return self


class ImageTower(_Part):
    file: FileName = "image.onnx"
    preprocessing: Preprocessing
    outputs: ImageOutputs | None = None


class TextTower(_Part):
    file: FileName = "text.onnx"
    tokenizer: FileName = "tokenizer.json"
    context_length: PositiveInt
    """The most tokens, start and end tokens included; longer texts are cut there."""
    pad_id: int
    padding: Literal["longest", "context"] = "longest"
    """longest: to the longest text of the batch; context: always to `context_length` (SigLIP)."""
    cleaning: Cleaning = "none"
    """What happens to a text before the tokenizer that tokenizer.json cannot say."""


class Scoring(_Part):
    """How cosine similarities become zero-shot probabilities: activation(scale · cosine + bias)."""

    activation: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale: float = Field(100.0, gt=0)
    logit_bias: float = 0.0


class Probe(_Part):
    """One tiny input for each tower and the vectors they must give, as base64 of little-endian float32."""

    image: str | None = None
    """A PNG, base64."""
    image_vector: str | None = None
    text: str | None = None
    text_vector: str | None = None
    min_cosine: float = Field(0.999, gt=0, le=1)
    """Below this a machine's vectors do not count as those of the encoder. int8 kernels differ between
    processors, so quantised bundles allow more."""


class Description(_Part):
    """`encoder.json`."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    dim: PositiveInt
    image: ImageTower | None = None
    text: TextTower | None = None
    scoring: Scoring = Scoring()
    dims: tuple[PositiveInt, ...] = ()
    """Prefix lengths that work on their own once renormalised (Matryoshka); empty: any, at one's own risk."""
    precision: str = "float32"
    parity: Mapping[str, Any] = {}
    """Measured agreement with the original network."""
    evaluation: Mapping[str, Any] = {}
    """Measured quality, each with its command."""
    licence: str
    source: str
    probe: Probe = Probe()
    files: Mapping[FileName, str] = {}
    """sha256 of every file in the folder but this one, external weights included."""

    @model_validator(mode="after")
    def _has_a_tower(self) -> Description:
        if self.image is None and self.text is None:
            raise ValueError("an encoder needs an image tower, a text tower, or both")
        return self

    @model_validator(mode="after")
    def _patches_fit_texts(self) -> Description:
        outputs = self.image.outputs if self.image else None
        if outputs is not None and outputs.text_space and (self.text is None or outputs.patches != self.dim):
            raise ValueError(f"patches in the space of texts need a text tower and {self.dim} numbers")
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose files are proven to be the ones described."""

    folder: Path
    description: Description

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def dim(self) -> int:
        return self.description.dim

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the vectors: graphs, weights, tokenizer, preprocessing and token rules.

        A collection remembers it. A better model card leaves it as it is; other weights change it.
        """
        described = self.description
        decides = {
            "files": {name: digest for name, digest in described.files.items() if not name.endswith(".md")},
            "image": _deciding(described.image) if described.image else None,
            "text": _deciding(described.text) if described.text else None,
            "dim": described.dim,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def path(self, name: str) -> Path:
        return self.folder / name


def open_bundle(folder: Path, *, verify: bool = True) -> Bundle:
    """Reads the bundle in `folder`. Raises BundleError if it is missing, malformed or (`verify`) altered."""
    folder = Path(folder)
    manifest = folder / MANIFEST
    try:
        text = manifest.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"'{folder}' is not an encoder bundle: {MANIFEST} cannot be read ({error.strerror}). "
            "Make one with `embedserve export`, or use 'starter'."
        ) from None
    except UnicodeDecodeError:
        raise BundleError(f"'{manifest}' is not UTF-8 text; copy the bundle again.") from None
    try:
        description = Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BundleError(
            f"'{manifest}' is malformed at {where}: {first['msg']}. Export the bundle again."
        ) from None
    bundle = Bundle(folder, description)
    _check_named_files(bundle)
    if verify:
        _check_hashes(bundle)
    return bundle


def _check_named_files(bundle: Bundle) -> None:
    described = bundle.description
    needed = [described.image.file] if described.image else []
    needed += [described.text.file, described.text.tokenizer] if described.text else []
    for name in needed:
        if name not in described.files:
            raise BundleError(
                f"'{bundle.folder}': {MANIFEST} gives no sha256 for '{name}'. Export the bundle again."
            )


def _check_hashes(bundle: Bundle) -> None:
    for name, expected in bundle.description.files.items():
        try:
            found = _sha256(bundle.path(name))
        except OSError as error:
            raise BundleError(
                f"'{bundle.folder}': the file '{name}' cannot be read ({error.strerror}); "
                "copy the whole folder."
            ) from None
        if found != expected:
            raise BundleError(
                f"'{bundle.path(name)}' is not the file described: its sha256 is {found[:12]}…, "
                f"{MANIFEST} says {expected[:12]}…. Copy or export the bundle again."
            )


def _deciding(tower: ImageTower | TextTower) -> dict[str, Any]:
    """What of a tower's description changes its embeddings.

    Later fields count only where they say something, so that bundles from before keep their fingerprint.
    """
    decides = tower.model_dump(mode="json", exclude={"outputs"})
    if decides.get("cleaning") == "none":
        del decides["cleaning"]
    if decides.get("preprocessing", {}).get("odd_crop") == "even":
        del decides["preprocessing"]["odd_crop"]
    return decides


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place if the block succeeds and vanishes if it fails.

    Raises BundleError as `check_out` does.
    """
    check_out(out)
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    replaced = folder.with_name(f"{folder.name}-replaced")
    try:
        yield folder
        open_bundle(folder)
        folder.chmod(0o755)
        if (out / MANIFEST).is_file():
            out.rename(replaced)
        folder.rename(out)  # over an empty folder this works as well
    finally:
        if replaced.exists() and not out.exists():  # put it back
            replaced.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raises BundleError when `out` exists and is something other than a bundle or an empty folder."""
    out = Path(out).absolute()
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"'{out}' exists and is not an encoder bundle; choose another --out or remove it.")


def seal(folder: Path, description: Description) -> Bundle:
    """Writes `encoder.json` for the files that lie in `folder`, with their hashes, and returns the bundle."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and "__pycache__" not in path.parts
    )
    description = description.model_copy(update={"files": {name: _sha256(folder / name) for name in names}})
    temporary = folder / f".{MANIFEST}.new"
    temporary.write_text(
        description.model_dump_json(indent=2, exclude_defaults=False) + "\n", encoding="utf-8"
    )
    temporary.replace(folder / MANIFEST)
    return open_bundle(folder)


def pack_vector(vector: NDArray[np.float32]) -> str:
    """base64 of little-endian float32, the form that OpenAI's API and our probes use."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")


def unpack_vector(text: str) -> NDArray[np.float32]:
    """The unit vector that `pack_vector` packed. Raises BundleError if it is not one."""
    try:
        vector = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    except ValueError:
        raise BundleError(
            f"A golden vector in {MANIFEST} is not base64 of float32 values. Export the bundle again."
        ) from None
    length = float(np.linalg.norm(vector))
    if not abs(length - 1) <= 0.01:  # NaN compares false
        raise BundleError(
            f"A golden vector in {MANIFEST} has length {length:.3g} instead of 1. Export the bundle again."
        )
    return vector


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
