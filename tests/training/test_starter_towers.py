"""The starter's arithmetic against slow, literal float64 versions, on small random networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from training.starter.towers import ImageNetwork, TextNetwork, class_table  # noqa: E402
from training.starter.visual import fit  # noqa: E402

Array = NDArray[np.float64]


def unit(vector: Array) -> Array:
    return vector / math.sqrt(float((vector**2).sum()))


def literal_image_vector(
    pooled: Array,
    logits: Array,
    classes: Array,
    mean: Array,
    basis: Array,
    looks: float,
    best: int,
    sharp: float,
) -> Array:
    every = np.exp(sharp * logits - (sharp * logits).max())
    probability = every / every.sum()
    semantic = np.zeros(classes.shape[1])
    order = sorted(range(len(logits)), key=lambda i: -probability[i])
    for index in order[:best]:
        semantic += (probability[index] - probability[order[best]]) * classes[index]
    visual = np.array(
        [
            sum((math.sqrt(f) - m) * b for f, m, b in zip(pooled, mean, column, strict=True))
            for column in basis.T
        ]
    )
    return np.concatenate([math.sqrt(1 - looks) * unit(semantic), math.sqrt(looks) * unit(visual)])


@pytest.mark.parametrize("looks", [0.0, 0.7, 1.0])
def test_an_image_vector_is_conse_beside_whitened_features(looks: float) -> None:
    generator = np.random.default_rng(0)
    pooled, logits = generator.uniform(0, 6, (5, 40)), generator.normal(scale=3, size=(5, 30))
    classes, mean, basis = (
        generator.normal(size=(30, 12)),
        generator.uniform(0, 2, 40),
        generator.normal(size=(40, 8)),
    )
    as_float32 = [torch.from_numpy(one).float() for one in (classes, mean, basis)]
    network = ImageNetwork(torch.nn.Identity(), *as_float32, looks=looks, best=4, sharpness=0.7)
    found = network.join(torch.from_numpy(pooled).float(), torch.from_numpy(logits).float()).numpy()
    for row, (features, scores) in enumerate(zip(pooled, logits, strict=True)):
        expected = literal_image_vector(features, scores, classes, mean, basis, looks, 4, 0.7)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def random_bert(generator: np.random.Generator, width: int, layers: int) -> dict[str, Array]:
    """Weights of a tiny BERT, under Hugging Face's names."""
    weights: dict[str, Array] = {
        "embeddings.word_embeddings.weight": generator.normal(size=(20, width)),
        "embeddings.position_embeddings.weight": generator.normal(size=(16, width)),
        "embeddings.token_type_embeddings.weight": generator.normal(size=(2, width)),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(layers):
        at = f"encoder.layer.{i}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        shapes = {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (4 * width, width),
            "output.dense": (width, 4 * width),
        }
        for name, shape in shapes.items():
            weights[f"{at}.{name}.weight"] = generator.normal(size=shape) * 0.5
            weights[f"{at}.{name}.bias"] = generator.normal(size=shape[0])
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = (
            generator.normal(size=width),
            generator.normal(size=width),
        )
    return weights


def literal_text_vector(weights: dict[str, Array], tokens: list[int], layers: int, heads: int) -> Array:
    """BERT as in the paper, one token and one head at a time, over the given tokens only: nothing to mask."""

    def norm(vector: Array, name: str) -> Array:
        scaled = (vector - vector.mean()) / math.sqrt(vector.var() + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(vector: Array, name: str) -> Array:
        return weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"]

    def gelu(vector: Array) -> Array:
        return np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in vector])

    words, places, kinds = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    hidden = [norm(words[t] + places[i] + kinds[0], "embeddings.LayerNorm") for i, t in enumerate(tokens)]
    size = len(hidden[0]) // heads
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        queries, keys, values = (
            [linear(h, f"{at}.attention.self.{name}") for h in hidden] for name in ("query", "key", "value")
        )
        after = []
        for i, h in enumerate(hidden):
            mixed = np.zeros_like(h)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = np.array([queries[i][part] @ key[part] / math.sqrt(size) for key in keys])
                weight = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                mixed[part] = sum(w * value[part] for w, value in zip(weight, values, strict=True))
            h = norm(h + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
            wide = gelu(linear(h, f"{at}.intermediate.dense"))
            after.append(norm(h + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm"))
        hidden = after
    return unit(np.mean(hidden, axis=0))


def test_a_text_vector_is_berts_mean_over_the_tokens_that_are_not_padding() -> None:
    weights = random_bert(np.random.default_rng(1), width=12, layers=2)
    texts = [[2, 5, 9, 3], [2, 3], [2, 19, 18, 17, 16, 15, 3]]
    padded = np.zeros((3, 11), np.int64)
    for row, tokens in zip(padded, texts, strict=True):
        row[: len(tokens)] = tokens
    as_float32 = {name: torch.from_numpy(value).float() for name, value in weights.items()}
    network = TextNetwork(as_float32, context=12, heads=3).eval()
    with torch.no_grad():
        found = network(torch.from_numpy(padded)).numpy()
    for row, tokens in enumerate(texts):
        np.testing.assert_allclose(found[row, :12], literal_text_vector(weights, tokens, 2, 3), atol=2e-5)
    assert not found[:, 12:].any()


def test_a_class_is_its_names_and_definition_less_what_all_share() -> None:
    vectors = {text: np.random.default_rng(i).normal(size=6) for i, text in enumerate("abcdef")}
    described = [(["a", "b"], "c"), (["d"], "e"), (["a"], "f")]

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([unit(vectors[text]) for text in texts])).float()

    rows = []
    for names, definition in described:
        mean = sum(unit(vectors[name]) for name in names) / len(names)
        rows.append(unit(unit(mean) + unit(vectors[definition])))
    expected = [unit(row - np.mean(rows, axis=0)) for row in rows]
    np.testing.assert_allclose(class_table(described, embed).numpy(), expected, atol=1e-5)


def test_the_visual_axes_are_uncorrelated_half_whitened_and_the_same_every_time() -> None:
    pooled = np.random.default_rng(2).gamma(2.0, size=(900, 300)).astype(np.float32)
    mean, basis = fit(pooled)
    roots = np.sqrt(pooled.astype(np.float64))
    np.testing.assert_allclose(mean, roots.mean(axis=0), atol=1e-6)
    covariance = np.cov((roots - mean) @ basis.astype(np.float64), rowvar=False, bias=True)
    variances = np.sort(np.linalg.eigvalsh(np.cov(roots, rowvar=False, bias=True)))[::-1][:256]
    np.testing.assert_allclose(covariance, np.diag(np.sqrt(variances)), atol=1e-5)
    np.testing.assert_array_equal(basis, fit(pooled)[1])
