"""Our encoders for the library clip-benchmark, and runs of open_clip's models as checkpoints for its command.

    from clip_benchmark.metrics import zeroshot_classification
    from training.evaluate.clip_benchmark import load, templates

    model, transform, tokenizer = load("runs/mine")           # or a bundle, or 'starter'
    data = torchvision.datasets.ImageFolder("photos", transform)
    figures = zeroshot_classification.evaluate(
        model, DataLoader(data, 64), tokenizer, data.classes, templates(), "cpu", amp=False
    )

`python -m training.evaluate.clip_benchmark runs/mine model.pt` writes a checkpoint that open_clip loads by
the architecture's name, and so does `clip_benchmark eval --model NAME --pretrained model.pt`. Nothing here
needs clip-benchmark itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from embedserve.bundle import Preprocessing
from embedserve.encoder import Encoder
from embedserve.errors import EmbedServeError, InvalidField
from embedserve.label_sets import DEFAULT_TEMPLATES, check_templates
from embedserve.preprocess import preprocess
from training.durable import replacing
from training.evaluate.encoder import BundleEncoder, RunEncoder, open_encoder, require_reader
from training.evaluate.run_reader import RunReader
from training.export.sources.runs import EvaluationView
from training.export.text_networks import open_clip_text
from training.methods.image_text import ImageText
from training.open_clip_models import PREFIX, create
from training.run import open_run
from training.text import TextRules

__all__ = ["Loaded", "load", "save_open_clip", "templates"]

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[Sequence[str]], Tensor]
Loaded = tuple[nn.Module, Transform, Tokenize]
"""What clip-benchmark's `load_clip` gives."""

WHITE = (255, 255, 255)


def load(path: str, *, device: torch.device | str = "cpu") -> Loaded:
    """Model, transform and tokenizer of a run, a checkpoint or a bundle, as clip-benchmark takes them.

    The model's `encode_image` and `encode_text` give vectors of the space that both share. Images that reach
    the transform with their transparency are put on the encoder's background.

    Args:
        path: As `open_encoder` takes it.
        device: Where a run's networks are; bundles run on the CPU.

    Raises: As `open_encoder`, and InvalidField for an encoder without text.
    """
    encoder = open_encoder(path, device=device)
    reader = require_reader(encoder, "clip-benchmark")
    if isinstance(reader, RunReader) and isinstance(encoder, RunEncoder):
        view = EvaluationView(encoder.size, encoder.stored_size)
        model = _Run(encoder.module, reader.method).eval()
        return model, _Transform(view, WHITE), _RunTokens(reader.rules)
    if not isinstance(encoder, BundleEncoder):
        raise TypeError(type(encoder).__name__)
    spec, bundle = encoder.preprocessing, encoder.encoder
    return (
        _Bundle(bundle).eval(),
        _Transform(_Prepared(spec), spec.background),
        lambda texts: torch.from_numpy(bundle.tokenizer.pad(bundle.tokenize(texts))),
    )


def templates(given: Sequence[str] = DEFAULT_TEMPLATES) -> list[str]:
    """Our templates in clip-benchmark's words: the class goes where {c} is."""
    return [one.replace("{}", "{c}") for one in check_templates(given)]


class _Transform:
    """A class, as processes that load data must be able to copy it."""

    def __init__(self, view: Transform, background: tuple[int, int, int]) -> None:
        self.view, self.background = view, background

    def __call__(self, image: Image.Image) -> Tensor:
        return self.view(_flat(image, self.background))


def _flat(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB and upright."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(colours, mask=colours.getchannel("A"))
    return canvas


# ---------------------------------------------------------------------------------------------- a run


class _Run(nn.Module):
    def __init__(self, images: nn.Module, method: ImageText[Any]) -> None:
        super().__init__()
        self.images, self.method = images, method

    def encode_image(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.images(images)
        return vectors

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.method.text_vectors(tokens)


class _RunTokens:
    """Texts → int64 [n, length]."""

    def __init__(self, rules: TextRules) -> None:
        self.rules = rules

    def __call__(self, texts: Sequence[str]) -> Tensor:
        encoded = self.rules.encode(texts)
        tokens = torch.full(
            (len(encoded), self.rules.padded(max(map(len, encoded), default=1))), self.rules.pad_id
        )
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ------------------------------------------------------------------------------------------- a bundle


class _Bundle(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [n, height, width, 3], as the transform gives them."""
        return torch.from_numpy(self._encoder.embed_images(list(images.cpu().numpy()))).to(images.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self._encoder.embed_texts(tokens.tolist())).to(tokens.device)


class _Prepared:
    def __init__(self, spec: Preprocessing) -> None:
        self.spec = spec

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(preprocess(image, self.spec)))


# ------------------------------------------------------------------------------ a checkpoint of open_clip


def save_open_clip(run: str, out: Path) -> str:
    """Writes the weights of a run whose towers are an open_clip model as that model's state dict.

    Args:
        run: The run's folder, or a checkpoint.
        out: A file that open_clip takes for `pretrained`.

    Returns:
        The architecture, which is open_clip's `model_name`.

    Raises:
        InvalidField: The towers are not those of one open_clip model, or see images of another size.
        EmbedServeError: The file cannot be written.
    """
    trained = open_run(run)
    method = trained.method
    name = method.encoder.name
    if not isinstance(method, ImageText) or not name.startswith(PREFIX) or method.text.name != name:
        raise InvalidField(
            f"The towers of '{run}' are not those of one open_clip model. Train with the same one for both "
            "(backbone=open_clip:ViT-B-32 and text=open_clip:ViT-B-32), or give clip-benchmark's functions "
            "what training.evaluate.clip_benchmark.load gives.",
            param="run",
        )
    projected = [one for one in (method.image_projection, method.text_projection) if list(one.parameters())]
    architecture = name.removeprefix(PREFIX)
    model = create(architecture)
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    if projected or size != trained.settings.config.size:
        raise InvalidField(
            f"'{run}' has projections of its own, or sees {trained.settings.config.size} pixels where "
            f"open_clip's '{architecture}' sees {size}: its checkpoints cannot say that. Train with "
            f"size={size} and the architecture's own space, or use training.evaluate.clip_benchmark.load.",
            param="run",
        )
    model.visual.load_state_dict(method.encoder.network.state_dict())
    open_clip_text(model)[0].load_state_dict(method.text.network.state_dict())
    with torch.no_grad():
        model.logit_scale.copy_(method.log_scale)
        bias: Any = getattr(method, "bias", None)
        if model.logit_bias is not None and bias is not None:
            model.logit_bias.copy_(bias)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with replacing(out) as file:
        torch.save(state, file)
    return architecture


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m training.evaluate.clip_benchmark RUN FILE")
    try:
        written = save_open_clip(sys.argv[1], Path(sys.argv[2]))
    except EmbedServeError as error:
        sys.exit(str(error))
    print(f"written: {sys.argv[2]}; next: clip_benchmark eval --model {written} --pretrained {sys.argv[2]} …")
