"""The starter's two networks: pixels and token ids in, unit vectors of 640 dimensions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.export.towers import unit

__all__ = ["SEMANTIC", "VISUAL", "ImageNetwork", "Meaning", "TextNetwork", "class_table"]

SEMANTIC, VISUAL = 384, 256
SIZE = 224
PAD = 0


class ImageNetwork(nn.Module):
    """uint8 [batch, 224, 224, 3] → float32 [batch, 640].

    Args:
        network: A timm classifier with `forward_features`, `forward_head` and `classifier`, in eval mode.
        classes: float32 [1000, 384], a text vector for each class (see `class_table`).
        mean: float32 [features], subtracted from the square roots of the pooled features.
        basis: float32 [features, 256], what they are multiplied with.
        looks: a, the visual part's share of an image–image cosine, 0..1.
        best: How many of the most probable classes count (k of ConSE).
        sharpness: What the logits are multiplied with before the softmax; below 1 is softer.
        meaning: What was learned from captioned drawings, joined with ConSE; None is ConSE alone.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Tensor,
        mean: Tensor,
        basis: Tensor,
        *,
        looks: float,
        best: int = 10,
        sharpness: float = 1.0,
        meaning: Meaning | None = None,
    ) -> None:
        super().__init__()
        self.network, self.meaning = network, meaning
        self.classes, self.mean, self.basis = nn.Buffer(classes), nn.Buffer(mean), nn.Buffer(basis)
        self.looks, self.best, self.sharpness = looks, best, sharpness

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [batch, features], all ≥ 0, and class logits [batch, 1000]."""
        # 127 and 128, not timm's 127.5 twice, are what these weights were trained with.
        scaled = (pixels.permute(0, 3, 1, 2).float() - 127.0) / 128.0
        network: nn.Module = self.network
        pooled = network.forward_head(network.forward_features(scaled), pre_logits=True)  # type: ignore[operator]
        return pooled, network.classifier(pooled)  # type: ignore[operator]

    def join(self, pooled: Tensor, logits: Tensor) -> Tensor:
        """The vector from features and logits."""
        semantic = self.conse(logits)
        if self.meaning is not None:
            semantic = self.meaning.join(pooled, logits, semantic)
        # Square roots tame the few features that would otherwise decide alone (Hellinger's kernel).
        visual = torch.matmul(torch.sqrt(pooled) - self.mean, self.basis)
        share = self.looks
        return torch.cat([(1 - share) ** 0.5 * unit(semantic), share**0.5 * unit(visual)], dim=1)

    def conse(self, logits: Tensor) -> Tensor:
        """Class logits [batch, 1000] → the classes' mean by probability, of unit length [batch, 384]."""
        best, index = torch.topk(logits * self.sharpness, self.best + 1, dim=1)
        # Up to a factor that unit removes. A class counts by how far it is ahead of the first that does not,
        # so none appears or disappears with a jump when a picture changes a little.
        ahead = torch.exp(best - best[:, :1])
        weight = ahead[:, :-1] - ahead[:, -1:]
        return unit(torch.matmul(weight[:, None, :], F.embedding(index[:, :-1], self.classes))[:, 0])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.join(*self.features(pixels))


class Meaning(nn.Module):
    """A second opinion about what a picture shows: two layers fitted on captioned drawings (`meaning.py`).

    ConSE knows photographs of 1000 kinds of things, this knows drawings. How far each counts follows from the
    greatest class probability: high on photographs of what ImageNet has, low on most drawings.

    Args:
        features, hidden: Sizes of the input and of the layer between.
        share: The weight of the learned part where the greatest class probability is 0, and where it is 1.
    """

    def __init__(self, features: int = 1280, hidden: int = 1024, *, share: tuple[float, float]) -> None:
        super().__init__()
        self.share = share
        self.mean, self.scale = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))
        self.widen, self.narrow = nn.Linear(features, hidden), nn.Linear(hidden, SEMANTIC)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features [batch, features], all ≥ 0 → [batch, 384], not of unit length."""
        out: Tensor = self.narrow(F.gelu(self.widen((torch.sqrt(pooled) - self.mean) * self.scale)))
        return out

    def join(self, pooled: Tensor, logits: Tensor, conse: Tensor) -> Tensor:
        """Both opinions in one, [batch, 384], not of unit length."""
        sure = torch.softmax(logits, dim=1).amax(dim=1, keepdim=True)
        share = self.share[0] + (self.share[1] - self.share[0]) * sure
        return (1 - share) * conse + share * unit(self(pooled))


class TextNetwork(nn.Module):
    """int64 [batch, length] → float32 [batch, 640], the last 256 of them zero.

    BERT (Devlin et al. 2019) with exact GELU, mean-pooled over the tokens that are not padding, as
    sentence-transformers runs it. Written out because it is short, and exports to few ONNX nodes.

    Args:
        weights: Tensors under Hugging Face's `BertModel` names.
        context: Positions to keep.
        heads: Attention heads.
    """

    def __init__(self, weights: Mapping[str, Tensor], context: int, *, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Parameter(weights["embeddings.word_embeddings.weight"])
        kind = weights["embeddings.token_type_embeddings.weight"][0]  # every token is of sentence 0
        self.positions = nn.Parameter(weights["embeddings.position_embeddings.weight"][:context] + kind)
        self.norm = _layer_norm(weights, "embeddings.LayerNorm")
        layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
        self.layers = nn.ModuleList(_Layer(weights, f"encoder.layer.{i}.", heads) for i in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != PAD).float()
        # e^-10000 is 0 in float32, so padding has no weight at all rather than a small one.
        hidden_from = (1 - real)[:, None, None, :] * -10000.0
        hidden = self.norm(F.embedding(tokens, self.words) + self.positions[: tokens.shape[1]])
        for layer in self.layers:
            hidden = layer(hidden, hidden_from)
        pooled = torch.matmul(real[:, None, :], hidden)[:, 0]  # the mean, up to a factor
        return F.pad(unit(pooled), (0, VISUAL))


class _Layer(nn.Module):
    def __init__(self, weights: Mapping[str, Tensor], prefix: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        parts = [f"{prefix}attention.self.{name}" for name in ("query", "key", "value")]
        self.project = _linear(
            torch.cat([weights[f"{part}.weight"] for part in parts]),
            torch.cat([weights[f"{part}.bias"] for part in parts]),
        )
        self.attended = _named_linear(weights, f"{prefix}attention.output.dense")
        self.norm = _layer_norm(weights, f"{prefix}attention.output.LayerNorm")
        self.widen = _named_linear(weights, f"{prefix}intermediate.dense")
        self.narrow = _named_linear(weights, f"{prefix}output.dense")
        self.last_norm = _layer_norm(weights, f"{prefix}output.LayerNorm")

    def forward(self, hidden: Tensor, hidden_from: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        size = width // self.heads
        parts = self.project(hidden).view(batch, length, 3, self.heads, size)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, length, size]
        scores = torch.matmul(query, key.transpose(2, 3)) * size**-0.5 + hidden_from
        mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
        mixed = mixed.permute(0, 2, 1, 3).reshape(batch, length, width)
        hidden = self.norm(hidden + self.attended(mixed))
        out: Tensor = self.last_norm(hidden + self.narrow(F.gelu(self.widen(hidden))))
        return out


def class_table(
    descriptions: Sequence[tuple[Sequence[str], str]], embed: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """A text vector for each class, float32 [classes, 384].

    It is the mean of the class's names, taken one by one, plus the vector of its definition, and of unit
    length; then what all classes have in common is subtracted, because it says nothing about an image and
    draws all of them towards the same texts. (Definitions and centring were measured: see the model card.)

    Args:
        descriptions: Names and definition of each class, from `sources.class_descriptions`.
        embed: Texts → unit vectors [n, 384].
    """
    names = embed([name for words, _ in descriptions for name in words])
    counts = torch.tensor([len(words) for words, _ in descriptions])
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    means = unit(torch.zeros(len(counts), names.shape[1]).index_add(0, owner, names))
    table = unit(means + embed([definition for _, definition in descriptions]))
    return unit(table - table.mean(dim=0))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def _named_linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    return _linear(weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer_norm(weights: Mapping[str, Tensor], name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(weights[f"{name}.weight"].shape[0], eps=1e-12)
    norm.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
    return norm
