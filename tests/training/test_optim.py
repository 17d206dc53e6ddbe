"""Who is trained how: groups, optimizers against literal float64 versions, and the rates of each step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import FACTS, TinyConv
from training.backbones import build
from training.method import Batch, Losses, Method, MethodOptions, ParameterRule, Recipe
from training.optim import build_optimizer, set_rates
from training.schedules import Now
from training.views import Augmentation, View


class Small(Method[MethodOptions]):
    """A backbone, two linear layers and whatever rules a test wants."""

    Options = MethodOptions

    def __init__(self, backbone: Any = None) -> None:
        super().__init__(backbone or TinyConv(), MethodOptions(), FACTS)
        self.head = nn.Linear(16, 4)
        self.predictor = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(()))
        self.rules: list[ParameterRule] = []

    @classmethod
    def views(cls, augmentation: Augmentation, options: MethodOptions, facts: Any) -> tuple[View, ...]:
        return ()

    def loss(self, batch: Batch) -> Losses:
        return {}

    def parameter_rules(self) -> list[ParameterRule]:
        return self.rules


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    (found,) = [one for one in optimizer.param_groups if any(parameter is each for each in one["params"])]
    return found


def at(epoch: float, *, epochs: int = 100, steps_per_epoch: int = 10) -> Now:
    return Now(round(epoch * steps_per_epoch), epochs * steps_per_epoch, steps_per_epoch)


def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    method = Small()
    method.head.requires_grad_(False)
    optimizer = build_optimizer(method, Recipe())
    grouped = [id(one) for group in optimizer.param_groups for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in method.parameters() if one.requires_grad)
    assert id(method.head.weight) not in grouped


def test_a_parameter_that_two_modules_share_is_in_one_group() -> None:
    method = Small()
    method.predictor.weight = method.head.weight
    assert group_of(build_optimizer(method, Recipe()), method.head.weight)["decay"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_weights_decay_and_biases_norms_and_scalars_do_not(optimizer: Any) -> None:
    method = Small()
    recipe = Recipe(optimizer=optimizer, weight_decay=0.3, bias_lr=0.25)
    built = build_optimizer(method, recipe)
    set_rates(built, recipe, at(50), batch_size=256)
    convolution, norm = method.backbone.network[0], method.backbone.network[1]
    lr = group_of(built, convolution.weight)["lr"]
    for weight in (convolution.weight, method.head.weight):
        assert group_of(built, weight)["weight_decay"] == 0.3
    for vector in (norm.weight, norm.bias, method.head.bias, method.scale):
        assert group_of(built, vector)["weight_decay"] == 0
        assert group_of(built, vector)["lr"] == pytest.approx(0.25 * lr)


def test_tokens_and_position_embeddings_do_not_decay() -> None:
    method = Small(build("test_vit", 32, mask_token=True))
    built = build_optimizer(method, Recipe())
    network: Any = method.backbone.network
    for vector in (network.cls_token, network.pos_embed, method.backbone.mask_token):
        assert not group_of(built, vector)["decay"]
    assert group_of(built, network.patch_embed.proj.weight)["decay"]


def test_the_first_rule_that_fits_a_module_counts() -> None:
    method = Small()
    method.rules = [
        ParameterRule(module=method.predictor, fixed_lr=True),
        ParameterRule(module=method.predictor, lr=7.0),
        ParameterRule(module=method.head, lr=0.5, decay=False),
        ParameterRule(module=method, lr=2.0),
    ]
    recipe = Recipe(lr=1.0, weight_decay=0.1, bias_lr=0.1)
    built = build_optimizer(method, recipe)
    set_rates(built, recipe, at(100), batch_size=512)
    assert group_of(built, method.predictor.weight)["lr"] == pytest.approx(2.0)
    assert group_of(built, method.predictor.bias)["lr"] == pytest.approx(0.2)
    assert group_of(built, method.head.weight)["lr"] == pytest.approx(0.0, abs=1e-12)
    set_rates(built, recipe, at(10), batch_size=512)
    assert group_of(built, method.predictor.weight)["lr"] == pytest.approx(2.0)
    assert group_of(built, method.head.weight)["lr"] == pytest.approx(1.0)
    assert group_of(built, method.head.weight)["weight_decay"] == 0
    assert group_of(built, method.backbone.network[0].weight)["lr"] == pytest.approx(4.0)


def test_the_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine() -> None:
    method = Small()
    recipe = Recipe(lr=0.4, lr_end=0.01, warmup_epochs=5, weight_decay=0.1)
    built = build_optimizer(method, recipe)
    peak = 0.4 * 1024 / 256

    def lr(epoch: float) -> float:
        rates = set_rates(built, recipe, at(epoch), batch_size=1024)
        assert group_of(built, method.head.weight)["lr"] == rates["lr"]
        return rates["lr"]

    assert lr(0) == pytest.approx(peak / 50)  # the first of 50 steps moves already
    assert lr(2.4) == pytest.approx(peak / 2)
    assert lr(5) == pytest.approx(peak)
    assert lr(52.5) == pytest.approx(peak * 1.01 / 2)
    assert lr(100) == pytest.approx(peak * 0.01)


def test_the_warm_up_takes_at_most_a_tenth_of_a_short_training() -> None:
    built = build_optimizer(Small(), recipe := Recipe(warmup_epochs=10))
    short = [
        set_rates(built, recipe, at(epoch, epochs=20), batch_size=256)["lr"] for epoch in (1.8, 1.9, 2.0, 2.1)
    ]
    assert short[0] < short[1] == pytest.approx(recipe.lr)
    assert short[2] == pytest.approx(recipe.lr)
    assert short[3] < short[2]


def test_weight_decay_stays_or_follows_its_own_cosine_without_warm_up() -> None:
    built = build_optimizer(Small(), Recipe())
    steady, rising = Recipe(weight_decay=0.05), Recipe(weight_decay=0.04, weight_decay_end=0.4)
    for epoch in (0, 37, 100):
        assert set_rates(built, steady, at(epoch), batch_size=256)["weight_decay"] == 0.05
        expected = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * epoch / 100)) / 2
        rates = set_rates(built, rising, at(epoch), batch_size=256)
        assert rates["weight_decay"] == pytest.approx(expected)


def literal_sgd(weight: Any, steps: Any, *, adapt: bool, momentum: float) -> Any:
    """SGD with momentum, and LARS by You et al. 2017, algorithm 1, on one parameter in float64."""
    weight, velocity = weight.copy(), None
    for gradient, lr, decay in steps:
        update = gradient + decay * weight
        if adapt:
            norm, slope = np.sqrt((weight**2).sum()), np.sqrt((gradient**2).sum())
            if norm > 0 and slope > 0:
                update = update * 0.001 * norm / (slope + decay * norm)
        velocity = update if velocity is None else momentum * velocity + update
        weight = weight - lr * velocity
    return weight


def literal_adamw(weight: Any, steps: Any) -> Any:
    """Loshchilov & Hutter 2019, algorithm 2, with the learning rate inside the decay as in torch."""
    weight, first, second = weight.copy(), 0.0, 0.0
    for count, (gradient, lr, decay) in enumerate(steps, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        weight = weight - lr * decay * weight - lr * corrected
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_steps_agree_with_a_literal_float64_version(kind: Any, decay: float) -> None:
    torch.manual_seed(0)
    method = Small().double()
    recipe = Recipe(optimizer=kind, lr=0.3, weight_decay=decay, weight_decay_end=2 * decay, bias_lr=0.5)
    built = build_optimizer(method, recipe)
    nn.init.zeros_(method.predictor.weight)  # a weight without a norm: LARS must move it all the same
    watched = {
        "weights": [method.head.weight, method.backbone.network[0].weight, method.predictor.weight],
        "vectors": [method.head.bias, method.backbone.network[1].weight, method.scale],
    }
    start = {one: one.detach().numpy().copy() for ones in watched.values() for one in ones}
    steps: dict[Tensor, list[Any]] = {one: [] for one in start}
    for step in range(8):
        rates = set_rates(built, recipe, Now(step, 8, 2), batch_size=64)
        for name, ones in watched.items():
            for one in ones:
                one.grad = torch.randn_like(one)
                lr, decayed = (0.5 * rates["lr"], 0.0) if name == "vectors" else tuple(rates.values())
                steps[one].append((one.grad.numpy().copy(), lr, decayed))
        built.step()
    for name, ones in watched.items():
        for one in ones:
            if kind == "adamw":
                expected = literal_adamw(start[one], steps[one])
            else:
                adapt = kind == "lars" and name == "weights"
                expected = literal_sgd(start[one], steps[one], adapt=adapt, momentum=0.9)
            # LARS divides by a norm plus 1e-8.
            np.testing.assert_allclose(one.detach().numpy(), expected, rtol=1e-6, atol=1e-12)
            assert not np.allclose(expected, start[one])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_a_parameter_whose_gradient_was_taken_away_stays(kind: Any) -> None:
    torch.manual_seed(0)
    method = Small()
    built = build_optimizer(method, recipe := Recipe(optimizer=kind, weight_decay=0.1))
    set_rates(built, recipe, at(50), batch_size=256)
    for one in method.parameters():
        one.grad = torch.ones_like(one)
    method.predictor.weight.grad = None
    before = method.predictor.weight.detach().clone(), method.head.weight.detach().clone()
    built.step()
    assert torch.equal(method.predictor.weight, before[0])
    assert not torch.equal(method.head.weight, before[1])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_a_saved_optimizer_continues_bit_by_bit(kind: Any) -> None:
    def train(first: int, last: int, saved: Any = None) -> Any:
        torch.manual_seed(0)
        method = Small()
        built = build_optimizer(method, recipe := Recipe(optimizer=kind, weight_decay=0.1))
        if saved:
            method.load_state_dict(saved[0])
            built.load_state_dict(saved[1])
        for step in range(first, last):
            set_rates(built, recipe, Now(step, 8, 2), batch_size=64)
            for index, one in enumerate(method.parameters()):
                generator = torch.Generator().manual_seed(100 * step + index)
                one.grad = torch.randn(one.shape, generator=generator)
            built.step()
        return method.state_dict(), built.state_dict()

    whole = train(0, 6)[0]
    parts = train(3, 6, train(0, 3))[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_gpus_fused_sgd_takes_parameters_that_begin_to_move_later() -> None:
    """SwAV's prototypes are frozen at first; torch's fused kernel exists on the CPU as well."""

    def weights(*, fused: bool) -> Tensor:
        torch.manual_seed(0)
        method = Small()
        optimizer = build_optimizer(method, Recipe(optimizer="sgd", lr=0.1, weight_decay=0.01))
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=False)
        for step in range(3):
            method.head(torch.ones(2, 16)).square().sum().backward()
            if step > 0:
                method.predictor(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.cat([one.detach().flatten() for one in method.parameters()])

    torch.testing.assert_close(weights(fused=True), weights(fused=False))
