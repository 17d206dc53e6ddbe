"""The layers that learn from captioned drawings: their arithmetic, what they learn, what they are shown."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from training.starter.meaning import fit, view  # noqa: E402
from training.starter.towers import SEMANTIC, ImageNetwork, Meaning  # noqa: E402

FEATURES, CLASSES = 24, 30


def network() -> ImageNetwork:
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.Linear(FEATURES, CLASSES)
    torch.nn.init.normal_(classifier.weight, generator=generator)
    body = torch.nn.Module()
    body.classifier = classifier
    classes = torch.nn.functional.normalize(torch.randn(CLASSES, SEMANTIC, generator=generator), dim=1)
    return ImageNetwork(body, classes, torch.zeros(FEATURES), torch.zeros(FEATURES, 8), looks=0.0, best=5)


def embed(texts: Sequence[str]) -> Tensor:
    """A direction of its own for each text."""
    rows = [torch.randn(SEMANTIC, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def test_the_learned_part_counts_by_how_unsure_the_classifier_is() -> None:
    generator = np.random.default_rng(0)
    meaning = Meaning(FEATURES, 6, share=(0.7, 0.3)).eval()
    pooled, logits = generator.uniform(0, 5, (4, FEATURES)), generator.normal(scale=2, size=(4, CLASSES))
    conse = generator.normal(size=(4, SEMANTIC))
    with torch.no_grad():
        found = meaning.join(*(torch.from_numpy(one).float() for one in (pooled, logits, conse))).numpy()
    weights = {name: value.numpy().astype(np.float64) for name, value in meaning.state_dict().items()}
    for row in range(4):
        hidden = weights["widen.weight"] @ np.sqrt(pooled[row]) + weights["widen.bias"]
        hidden = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
        learned = weights["narrow.weight"] @ hidden + weights["narrow.bias"]
        sure = np.exp(logits[row]).max() / np.exp(logits[row]).sum()
        share = 0.7 - 0.4 * sure
        expected = (1 - share) * conse[row] + share * learned / np.linalg.norm(learned)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_class_that_takes_anothers_place_makes_no_jump() -> None:
    logits = torch.linspace(3, 0, CLASSES).repeat(2, 1)
    logits[0, 5], logits[1, 5] = logits[0, 4] - 1e-4, logits[0, 4] + 1e-4  # the sixth becomes the fifth
    before, after = network().conse(logits)
    assert float(before @ after) > 1 - 1e-6


def test_it_learns_the_captions_it_was_shown_and_leaves_the_network_alone() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.uniform(0, 4, (12, 1, FEATURES))
    pooled = np.abs(np.repeat(kinds, 4, axis=0) + generator.normal(scale=0.1, size=(48, 3, FEATURES)))
    captions = [[f"thing {index // 4}", "thing"] for index in range(48)]
    untouched = network()
    before = [weight.clone() for weight in untouched.state_dict().values()]
    losses: list[float] = []
    meaning = fit(
        untouched,
        pooled.astype(np.float16),
        captions,
        embed,
        steps=60,
        report=lambda step, loss: losses.append(loss),
    )
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        found = meaning(torch.from_numpy(pooled[:, 0]).float())
    names = embed([f"thing {kind}" for kind in range(12)])
    assert (found @ names.T).argmax(dim=1).tolist() == [index // 4 for index in range(48)]
    assert all(map(torch.equal, before, untouched.state_dict().values()))


def test_a_view_is_the_drawing_on_white_or_an_altered_one() -> None:
    drawing = Image.new("RGBA", (224, 100), (200, 0, 0, 255))
    plain = view(drawing, None)
    assert plain.shape == (224, 224, 3)
    assert plain[0, 0].tolist() == [255, 255, 255]
    assert plain[112, 112].tolist() == [200, 0, 0]
    altered = [view(drawing, random.Random(seed)) for seed in range(4)]
    assert all(one.shape == plain.shape and one.dtype == np.uint8 for one in altered)
    assert len({one.tobytes() for one in altered}) == 4
    assert np.array_equal(altered[0], view(drawing, random.Random(0)))
