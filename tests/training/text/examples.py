"""A tokenizer of a few words, and Hugging Face folders with small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from training import torchvision_ops
from training.text import TextRules

__all__ = ["WORDS", "hugging_face_folder", "word_rules", "word_tokenizer"]

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "a", "shoe", "hat", *map(str, range(8)))


def word_tokenizer() -> Tokenizer:
    """Whole words, between a first and an end token."""
    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def word_rules(**changes: Any) -> TextRules:
    settings = {"context_length": 16, "vocabulary": len(WORDS)} | changes
    return TextRules(name="words", tokenizer=word_tokenizer().to_str(), pad_id=0, **settings)


def hugging_face_folder(folder: Path, *, vocabulary: int = len(WORDS), tokenizer: bool = True) -> Path:
    """A BERT of two layers with these words, as `save_pretrained` writes it."""
    torchvision_ops.register()
    import transformers

    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    transformers.BertModel(config).save_pretrained(folder)
    if tokenizer:
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=word_tokenizer(),
            unk_token="[UNK]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=24,
        ).save_pretrained(folder)
    return folder
