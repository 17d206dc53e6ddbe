"""The starter's text tower: all-MiniLM-L6-v2, from the package that carries it."""

from __future__ import annotations

from torch import Tensor, nn

from training.starter import sources
from training.starter.towers import PAD, SEMANTIC, TextNetwork
from training.text.base import TextTower
from training.text.rules import TextRules

__all__ = ["NAME", "sentences"]

NAME = "sentences"


class _Sentences(nn.Module):
    """int64 [B, length] → unit vectors [B, 384]: without the zeros that stand for an image's looks."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextNetwork(sources.sentence_weights(), sources.CONTEXT_LENGTH)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.text(tokens)[:, :SEMANTIC]
        return vectors


def sentences() -> TextTower:
    """The tower with its published weights. Raises BundleError when the package is not installed."""
    network = _Sentences()
    rules = TextRules(
        name=NAME,
        tokenizer=sources.tokenizer_json().decode("utf-8"),
        context_length=sources.CONTEXT_LENGTH,
        pad_id=PAD,
        vocabulary=len(network.text.words),
    )
    return TextTower(NAME, network, SEMANTIC, rules, trained=True, config={})
