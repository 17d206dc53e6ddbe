"""What holds for every method: it learns, two ranks are as one, and the checkpoint has all its state."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.batch_norm import synchronize_batch_norms
from training.distributed import rank, world_size
from training.method import Batch, Method, Texts
from training.methods import METHODS, find
from training.optim import build_optimizer, set_rates
from training.seeding import seed_everything

STEPS = 4


def train_steps(method: Method[Any], first: int, last: int) -> list[float]:
    """Steps `first` to `last` on batches of noise; on several ranks each takes its share of them."""
    network: Any = method
    if world_size() > 1:
        if not method.local_batch_norm:
            synchronize_batch_norms(method, torch.device("cpu"))
        network = DistributedDataParallel(method, forward_sync_buffers=False)
    recipe = find(_name(method)).recipe(FACTS)
    optimizer = build_optimizer(method, recipe)
    return _steps(method, network, optimizer, recipe, range(first, last))


def _steps(method: Method[Any], network: Any, optimizer: Any, recipe: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        whole = batch_for(method, size=8, seed=step, step=step)
        share = slice(rank() * (8 // world_size()), (rank() + 1) * (8 // world_size()))
        kind = next(method.parameters()).dtype
        texts = whole.texts and Texts(whole.texts.tokens[share], whole.texts.ids[share])
        views = [view[share].to(kind) for view in whole.views]
        batch = Batch(views, whole.ids[share], whole.now, whole.values, texts)
        set_rates(optimizer, recipe, batch.now, batch_size=8)
        seed_everything(0, step)
        loss = network(batch)["loss"]
        loss.backward()
        method.before_step(batch.now)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(batch.now, batch.values)
        losses.append(float(loss.detach()))
    return losses


def _name(method: Method[Any]) -> str:
    return next(name for name, kind in METHODS.items() if kind is type(method))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_moves_every_weight_that_it_trains(name: str) -> None:
    method = tiny_method(name)
    # A bias that a batch norm follows (BYOL's projector, through its predictor) has no gradient.
    weights = {key: value for key, value in method.named_parameters() if value.ndim > 1}
    before = {key: value.detach().clone() for key, value in weights.items()}
    losses = train_steps(method, 0, 12)  # longer than anything is frozen at first
    assert all(torch.isfinite(torch.tensor(losses)))
    trained = {key for key, value in weights.items() if value.requires_grad}
    still = {key for key, value in weights.items() if torch.equal(before[key], value)}
    assert not trained & still
    followers = {id(one) for _, momentum in method.momentum_pairs() for one in momentum.parameters()}
    assert not [key for key, value in weights.items() if id(value) in followers and key in still]


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_holds_all_that_the_next_losses_depend_on(name: str) -> None:
    straight = tiny_method(name)
    recipe = find(name).recipe(FACTS)
    optimizer = build_optimizer(straight, recipe)
    _steps(straight, straight, optimizer, recipe, range(STEPS))
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = _steps(straight, straight, optimizer, recipe, range(STEPS, 2 * STEPS))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny_method(name, seed=99)  # other first weights: all must come from the file
    optimizer = build_optimizer(resumed, recipe)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert _steps(resumed, resumed, optimizer, recipe, range(STEPS, 2 * STEPS)) == expected


def _weights_after_training(name: str) -> tuple[list[float], dict[str, Tensor]]:
    torch.set_num_threads(1)
    method = tiny_method(name).double()
    losses = train_steps(method, 0, 3)
    return losses, {key: value.detach().clone() for key, value in method.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_train_the_weights_of_one_with_the_joined_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    losses, alone = _weights_after_training(name)
    torch.set_num_threads(threads)
    (first, weights), (second, others) = on_ranks(_weights_after_training, name)
    mean = [(one + other) / 2 for one, other in zip(first, second, strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for key, value in alone.items():
        torch.testing.assert_close(
            weights[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
        torch.testing.assert_close(others[key], weights[key])


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_a_method_is_independent(name: str) -> None:
    method = tiny_method(name)
    twin = copy.deepcopy(method)
    train_steps(method, 0, 1)
    fresh = tiny_method(name).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in twin.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_in_evaluation_precision_is_float32_under_autocast(name: str) -> None:
    method = tiny_method(name)
    batch = batch_for(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(batch)
    assert losses["loss"].dtype == torch.float32
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_gives_features_for_transfer(name: str) -> None:
    method = tiny_method(name).eval()
    view = batch_for(method).views[0]
    with torch.no_grad():
        features = method.embed(view)
    assert features.shape[0] == 8
    assert torch.isfinite(features).all()
    assert any(module is method.encoder for module in method.modules())
