"""SimCLR v2: the layer that stays, and its memory, literally and slowly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import assert_same_gradients, assert_two_ranks_train_as_one, doubled
from tests.training.tiny import FACTS, TinyConv, batch_for, tiny_method
from training.method import Facts
from training.methods.simclr_v2 import SimCLRv2, SimCLRv2Options, memory_loss
from training.schedules import Now

PHOTOGRAPHS = Facts(images=1_281_167, size=224, epochs=800, batch_size=4096, steps_per_epoch=312)


def simclr_v2(**options: Any) -> SimCLRv2:
    method = tiny_method("simclr_v2", **options).double()
    assert isinstance(method, SimCLRv2)
    return method


def cross_entropy(query: Tensor, positive: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    def similarity(key: Tensor) -> Tensor:
        return (query @ key / (query.norm() * key.norm()) / temperature).exp()

    denominator = similarity(positive) + sum(map(similarity, negatives), torch.zeros(()))
    return -(similarity(positive) / denominator).log()


def test_without_memory_the_loss_is_nt_xent() -> None:
    method = simclr_v2()
    batch = doubled(batch_for(method))
    first, second = (method.head(method.backbone(view)) for view in batch.views)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        others = [rows[k] for rows in (first, second) for k in range(8) if k != i]
        total = total + cross_entropy(first[i], second[i], others, 0.5) / 16
        total = total + cross_entropy(second[i], first[i], others, 0.5) / 16
    assert_same_gradients(method, method(batch)["loss"], total)


def test_with_memory_keys_come_from_the_momentum_encoder_and_earlier_ones_repel_too() -> None:
    method = simclr_v2(memory=24)
    with torch.no_grad():
        for _, follower in method.momentum_pairs():
            for parameter in follower.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    method(doubled(batch_for(method, seed=5)))
    method.after_step(Now(0, 32, 8), {"momentum": 0.9})
    batch = doubled(batch_for(method, step=1))
    # Images 0 to 7 are in the memory already: none is a negative of itself. The last 8 rows are not filled.
    batch = type(batch)(batch.views, torch.arange(4, 12), batch.now, batch.values)
    queries = [method.head(method.backbone(view)) for view in batch.views]
    keys = [method.memory_head(method.memory_backbone(view)).detach() for view in batch.views]
    remembered = list(zip(method.memory.rows[:16].clone(), method.memory.ids[:16].tolist(), strict=True))
    assert [of for _, of in remembered] == [*range(8), *range(8)]
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in ((0, 1), (1, 0)):
        for i in range(8):
            negatives = [rows[k] for rows in keys for k in range(8) if k != i]
            negatives += [row for row, of in remembered if of != i + 4]
            total = total + cross_entropy(queries[mine][i], keys[theirs][i], negatives, 0.5) / 16
    assert_same_gradients(method, method(batch)["loss"], total)


def test_a_memory_that_is_still_empty_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, rows = torch.nn.functional.normalize(torch.randn(3, 6, 4, generator=generator), dim=2)
    ids, nothing = torch.arange(6), torch.full((6,), -1)
    without = memory_loss(queries, keys, ids, rows[:0], nothing[:0], temperature=0.1)
    torch.testing.assert_close(memory_loss(queries, keys, ids, rows, nothing, temperature=0.1), without)


def test_the_memorys_encoder_and_head_follow_by_the_momentum() -> None:
    method = simclr_v2(memory=24)
    followers = [*method.memory_backbone.parameters(), *method.memory_head.parameters()]
    sources = [*method.backbone.parameters(), *method.head.parameters()]
    with torch.no_grad():
        for source in sources:
            source += 1
    before = [one.clone() for one in followers]
    method.after_step(Now(0, 32, 8), {"momentum": 0.9})
    for was, now, source in zip(before, followers, sources, strict=True):
        assert not now.requires_grad
        torch.testing.assert_close(now, 0.9 * was + 0.1 * source.data)


def test_the_memory_takes_both_views_after_the_step() -> None:
    method = simclr_v2(memory=24)
    batch = doubled(batch_for(method))
    method(batch)
    assert method.memory.filled == 0
    method.after_step(batch.now, {"momentum": 0.9})
    assert method.memory.filled == 16


def test_two_ranks_with_a_memory_train_as_one() -> None:
    assert_two_ranks_train_as_one("simclr_v2", 4, memory=24)


def test_without_memory_there_is_no_momentum_encoder() -> None:
    method = simclr_v2()
    assert not method.momentum_pairs()
    assert not method.schedules()
    assert not [name for name, _ in method.named_parameters() if name.startswith("memory")]


def test_features_are_those_of_the_heads_first_layer() -> None:
    method = simclr_v2(hidden_dim=24).eval()
    backbone = TinyConv().double().eval()
    backbone.network.load_state_dict(method.backbone.network.state_dict())
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    features = method.embed(images)
    linear, norm, relu = method.encoder.layer
    torch.testing.assert_close(features, relu(norm(linear(backbone(images)))))
    assert features.shape == (4, 24)
    assert method.encoder.dim == 24
    assert (features >= 0).all()


def test_with_the_layer_that_stays_the_head_has_three() -> None:
    method = simclr_v2()
    layers = [one for one in method.modules() if isinstance(one, nn.Linear)]
    assert [(one.in_features, one.out_features) for one in layers] == [(16, 32), (32, 32), (32, 32)]


def test_the_encoder_has_the_backbones_name_and_patches() -> None:
    method = simclr_v2().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    _, patches = method.encoder.features(images)
    assert patches.shape == (2, method.encoder.patch_dim, 4, 4)
    assert (method.encoder.name, method.encoder.kind) == ("tiny", "conv")


def test_the_networks_weights_are_saved_once_under_the_name_that_others_start_from() -> None:
    saved = simclr_v2().state_dict()
    network = {f"backbone.network.{name}" for name in TinyConv().network.state_dict()}
    rest = {name for name in saved if not name.startswith(("head.", "backbone.layer."))}
    assert rest == network


def test_the_memorys_encoder_computes_with_its_own_weights() -> None:
    method = simclr_v2(memory=8).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    online, followed = method.backbone(images), method.memory_backbone(images)
    torch.testing.assert_close(online, followed)
    with torch.no_grad():
        next(method.memory_backbone.network.parameters()).zero_()
    torch.testing.assert_close(method.backbone(images), online)
    assert not torch.allclose(method.memory_backbone(images), followed)


def test_a_copy_computes_with_its_own_weights() -> None:
    method = simclr_v2().eval()
    twin = copy.deepcopy(method)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = method.embed(images)
    with torch.no_grad():
        next(twin.backbone.network.parameters()).zero_()
    torch.testing.assert_close(method.embed(images), before)
    assert not torch.allclose(twin.embed(images), before)


def test_photographs_have_the_papers_settings() -> None:
    options = SimCLRv2Options.suited_to(PHOTOGRAPHS)
    assert options == SimCLRv2Options()
    assert (options.temperature, options.momentum_start, options.momentum_end) == (0.1, 0.999, 0.999)
    recipe = SimCLRv2.recipe(PHOTOGRAPHS)
    assert recipe.lr * 4096 / 256 == pytest.approx(0.1 * 4096**0.5)
    assert (recipe.optimizer, recipe.warmup_epochs, recipe.weight_decay) == ("lars", 40, 1e-4)


def test_small_images_have_a_softer_temperature_and_a_quicker_memory() -> None:
    options = SimCLRv2Options.suited_to(FACTS)
    assert options.temperature == 0.5
    assert options.momentum_start < 0.999
    assert SimCLRv2.recipe(FACTS).optimizer == "sgd"
