"""What a method, the loop and an export may ask of a text tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from training.text.rules import TextRules

__all__ = ["TextTower"]


class TextTower(nn.Module):
    """int64 [B, length] → float [B, dim]. Padding at the end of a row does not change its vector.

    Args:
        name: What `build_text` was asked for.
        network: Takes ids of any length up to the context.
        dim: Length of its vectors.
        rules: How texts become ids.
        trained: Whether its weights were trained before; random ones learn faster.
        config: What the network can be built from again, plain values; see `rebuild_text`.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        dim: int,
        rules: TextRules,
        *,
        trained: bool,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name, self.network, self.dim = name, network, dim
        self.rules, self.trained, self.config = rules, trained, dict(config)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.network(tokens)
        return vectors

    def carried(self) -> dict[str, Any]:
        """All but the weights that `rebuild_text` needs, in plain values."""
        return {
            "name": self.name,
            "trained": self.trained,
            "config": self.config,
            "rules": self.rules.as_json(),
        }
