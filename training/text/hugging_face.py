"""Text encoders of Hugging Face transformers from a folder: BERT, RoBERTa, XLM-R, MPNet, DistilBERT, …"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField, NotFound
from training import torchvision_ops
from training.export.tokenizers import from_hugging_face
from training.text.base import TextTower
from training.text.rules import TextRules

__all__ = ["PREFIX", "from_config", "from_folder"]

PREFIX = "hf:"
OFFSETS = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}
"""Positions that a kind of model keeps for itself: its padding's id + 1."""
TOKENIZERS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
"""Files that hold a tokenizer's words."""


class _Mean(nn.Module):
    """The mean over the tokens that are not padding, as sentence-transformers takes it. [B, L] → [B, dim]."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model, self.pad_id = model, pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != self.pad_id
        hidden: Tensor = self.model(input_ids=tokens, attention_mask=real.long()).last_hidden_state
        weights = real.to(hidden.dtype)[:, :, None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def from_folder(folder: str) -> TextTower:
    """The encoder and tokenizer that `save_pretrained` wrote into a folder.

    Raises:
        NotFound: There is no such folder.
        InvalidField: It holds no encoder of texts, or no tokenizer that a bundle can carry.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise NotFound(
            f"text={PREFIX}{folder}: there is no folder '{path}' with a config.json, as save_pretrained "
            "writes it.",
            param="text",
        )
    if not any((path / one).is_file() for one in TOKENIZERS):
        # transformers would make up one without words.
        raise InvalidField(
            f"text={PREFIX}{folder}: the folder has no tokenizer (none of {', '.join(TOKENIZERS)}). Save the "
            "model's own there, with tokenizer.save_pretrained.",
            param="text",
        )
    transformers = _library()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # of a moment
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InvalidField(
            f"text={PREFIX}{folder} cannot be loaded by transformers: {said}", param="text"
        ) from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    context = _context(config)
    tokens = from_hugging_face(tokenizer, min(context, max(int(tokenizer.model_max_length), 8)))
    rules = TextRules(
        name=PREFIX + folder,
        tokenizer=tokens.tokenizer,
        context_length=tokens.context_length,
        pad_id=tokens.pad_id,
        vocabulary=int(config.vocab_size),
        cleaning=tokens.cleaning,
    )
    return _tower(PREFIX + folder, model, rules, config.to_dict(), trained=True)


def from_config(name: str, config: Mapping[str, Any], rules: TextRules, *, trained: bool) -> TextTower:
    """The same network with random weights, from what a checkpoint carries."""
    transformers = _library()
    options = dict(config)
    kind = options.pop("model_type")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **options))
    return _tower(name, model, rules, config, trained=trained)


def _tower(
    name: str, model: nn.Module, rules: TextRules, config: Mapping[str, Any], *, trained: bool
) -> TextTower:
    settings: Any = model.config
    if getattr(settings, "is_encoder_decoder", False) or not hasattr(settings, "hidden_size"):
        raise InvalidField(
            f"text={name} is a {settings.model_type} model, which gives no vector for a token; choose an "
            "encoder of texts such as BERT, RoBERTa, XLM-R or MPNet.",
            param="text",
        )
    plain = {key: value for key, value in config.items() if _plain(value)}
    # Its pooler plays no part in the mean, and would have no gradient.
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010 -- nn.Module annotates its attributes as never None
    return TextTower(
        name, _Mean(model, rules.pad_id), int(settings.hidden_size), rules, trained=trained, config=plain
    )


def _context(config: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", 512))
    return positions - OFFSETS.get(config.model_type, 0)


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _plain(one) for key, one in value.items())
    return isinstance(value, str | int | float | bool | type(None))


def _library() -> Any:
    torchvision_ops.register()
    import transformers

    return transformers
