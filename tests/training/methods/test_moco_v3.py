"""MoCo v3: the paper's loss for ResNets and vision transformers, its networks, and one rank against two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.agreement import doubled, gradients
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.backbones import build
from training.batch_norm import synchronize_batch_norms
from training.distributed import all_mean, rank, world_size
from training.method import Batch, Facts
from training.methods.moco_v3 import MoCoV3, MoCoV3Options
from training.views import Augmentation

IMAGENET = Facts(images=1_281_167, size=224, epochs=300, batch_size=4096, steps_per_epoch=312)
TRANSFORMER = replace(IMAGENET, backbone_kind="vit")

# ---------------------------------------------------------------- the loss


def moco_v3(**options: Any) -> Any:
    """In float64, with a momentum encoder that differs."""
    method: Any = tiny_method("moco_v3", **options).double()
    torch.manual_seed(1)
    for parameter in [*method.momentum_backbone.parameters(), *method.momentum_projector.parameters()]:
        parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def batch_of(method: Any, size: int = 6) -> Batch:
    return doubled(batch_for(method, size=size))


def literal_loss(queries: Tensor, keys: Tensor, ids: Tensor, temperature: float, beta: float) -> Tensor:
    """2τ × cross-entropy of each query over all keys (Chen et al. 2021, algorithm 1).

    Keys of the query's own group are left out; hard negatives weigh as in Robinson et al. 2021, eq. 4.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, query in enumerate(queries):
        logits = [query @ key / query.norm() / key.norm() / temperature for key in keys]
        negatives = torch.stack([one for one, id_ in zip(logits, ids, strict=True) if id_ != ids[i]])
        weights = (beta * negatives).exp() / (beta * negatives).exp().mean()
        positive = logits[i].exp()
        total = total - torch.log(positive / (positive + (weights * negatives.exp()).sum()))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4, 5), (0, 1, 2, 0, 4, 1)], ids=["images", "groups"])
def test_the_loss_and_all_gradients_are_those_of_the_paper(
    temperature: float, beta: float, ids: tuple[int, ...]
) -> None:
    method = moco_v3(temperature=temperature, beta=beta)
    batch = replace(batch_of(method), ids=torch.tensor(ids))
    queries = [method.predictor(method.projector(method.backbone(view))) for view in batch.views]
    with torch.no_grad():
        keys = [method.momentum_projector(method.momentum_backbone(view)) for view in batch.views]
    literal = literal_loss(queries[0], keys[1], batch.ids, temperature, beta) + literal_loss(
        queries[1], keys[0], batch.ids, temperature, beta
    )
    expected = gradients(method, literal)
    loss = method.loss(batch)["loss"]
    found = gradients(method, loss)
    torch.testing.assert_close(loss, literal)
    assert found.keys() == expected.keys()
    assert {name.split(".")[0] for name in found} == {"backbone", "projector", "predictor"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def step_on_rank() -> dict[str, Tensor]:
    """One step on this rank's share of 6 images: loss and gradients as DDP averages them."""
    method = moco_v3(beta=0.5)
    synchronize_batch_norms(method, torch.device("cpu"))
    joined = replace(batch_of(method), ids=torch.tensor([0, 1, 2, 0, 4, 1]))
    count = 6 // world_size()
    own = slice(rank() * count, (rank() + 1) * count)
    batch = replace(joined, views=[view[own] for view in joined.views], ids=joined.ids[own])
    loss = method.loss(batch)["loss"]
    found = {name: all_mean(one) for name, one in gradients(method, loss).items()}
    return found | {"loss": all_mean(loss.detach())}


def test_two_ranks_take_the_step_of_one_with_the_joined_batch() -> None:
    expected = step_on_rank()
    for found in on_ranks(step_on_rank):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


# ---------------------------------------------------------------- networks


def transformer(**options: Any) -> MoCoV3:
    torch.manual_seed(0)
    facts = replace(FACTS, size=32, backbone_kind="vit")
    backbone = build("test_vit", 32, **MoCoV3.backbone_options(facts))
    return MoCoV3(backbone, MoCoV3Options(hidden_dim=32, projection_dim=16, **options), facts)


def layers(module: nn.Module) -> list[str]:
    return [type(one).__name__ for one in module.children()]


HIDDEN = ["Linear", "BatchNorm1d", "ReLU"]


def test_a_resnet_has_two_layers_in_its_projector_and_no_norm_behind_its_predictor() -> None:
    method = moco_v3()
    assert layers(method.projector) == [*HIDDEN, "Linear", "BatchNorm1d"]
    assert layers(method.predictor) == [*HIDDEN, "Linear"]


def test_a_vision_transformer_has_one_more_and_a_norm_behind_its_predictor() -> None:
    method = transformer()
    assert layers(method.projector) == [*HIDDEN, *HIDDEN, "Linear", "BatchNorm1d"]
    assert layers(method.predictor) == [*HIDDEN, "Linear", "BatchNorm1d"]


def test_linear_layers_have_no_bias_and_output_norms_learn_nothing() -> None:
    for method in (moco_v3(), transformer()):
        for head in (method.projector, method.predictor):
            assert all(one.bias is None for one in head.modules() if isinstance(one, nn.Linear))
        assert not method.projector[-1].affine
    assert not transformer().predictor[-1].affine


def test_the_patch_embedding_and_positions_of_a_transformer_are_fixed() -> None:
    method: Any = transformer()
    batch = batch_for(method, facts=replace(FACTS, size=32))
    method.loss(batch)["loss"].backward()
    frozen = {name for name, one in method.backbone.named_parameters() if not one.requires_grad}
    assert frozen == {
        "network.patch_embed.proj.weight",
        "network.patch_embed.proj.bias",
        "network.pos_embed",
    }
    untrained = {name for name, one in method.backbone.named_parameters() if one.grad is None}
    assert untrained == frozen
    method.after_step(batch.now, batch.values)


def test_a_resnet_is_built_without_arguments() -> None:
    assert MoCoV3.backbone_options(FACTS) == {}


# ---------------------------------------------------------------- after the step


def test_the_momentum_encoder_takes_no_gradient_and_follows_the_step() -> None:
    method = moco_v3()
    batch = batch_of(method)
    gradients(method, method.loss(batch)["loss"])
    before = {name: one.clone() for name, one in method.state_dict().items()}
    method.after_step(batch.now, {"momentum": 0.75})
    for online, momentum in [("backbone", "momentum_backbone"), ("projector", "momentum_projector")]:
        for name, found in getattr(method, momentum).named_parameters():
            assert found.grad is None
            expected = 0.75 * before[f"{momentum}.{name}"] + 0.25 * before[f"{online}.{name}"]
            torch.testing.assert_close(found, expected)


def test_the_momentum_rises_to_one_along_a_cosine() -> None:
    method = tiny_method("moco_v3", momentum_start=0.9)
    schedule = method.schedules()["momentum"]
    values = [schedule(batch_for(method, step=step).now) for step in (0, 16, 32)]
    assert values == pytest.approx([0.9, 0.95, 1.0])


def test_a_whole_step_runs_under_autocast() -> None:
    method: Any = tiny_method("moco_v3")
    batch = batch_for(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(batch)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    method.after_step(batch.now, batch.values)


# ---------------------------------------------------------------- settings


def test_on_imagenet_a_resnet_has_the_papers_settings() -> None:
    assert MoCoV3Options.suited_to(IMAGENET) == MoCoV3Options()
    recipe = MoCoV3.recipe(IMAGENET)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("lars", 0.3, 1e-6)
    short, long = (MoCoV3.recipe(replace(IMAGENET, epochs=epochs)) for epochs in (100, 1000))
    assert (short.lr, short.weight_decay) == (0.6, 1e-6)
    assert (long.lr, long.weight_decay) == (0.3, 1.5e-6)
    assert MoCoV3Options.suited_to(replace(IMAGENET, epochs=1000)).momentum_start == 0.996


def test_on_imagenet_a_vision_transformer_has_the_papers_settings() -> None:
    options = MoCoV3Options.suited_to(TRANSFORMER)
    assert (options.temperature, options.momentum_start, options.momentum_end) == (0.2, 0.99, 1.0)
    recipe = MoCoV3.recipe(TRANSFORMER)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.warmup_epochs) == (
        "adamw",
        1.5e-4,
        0.1,
        40,
    )


def test_small_images_have_a_lower_temperature_and_sgd() -> None:
    assert MoCoV3Options.suited_to(FACTS).temperature == 0.2
    assert MoCoV3.recipe(FACTS).optimizer == "sgd"


def test_the_views_are_byols() -> None:
    first, second = MoCoV3.views(Augmentation(), MoCoV3Options(), IMAGENET)
    assert (first.blur, first.solarize, first.of) == (1.0, 0.0, "image")
    assert (second.blur, second.solarize, second.of) == (0.1, 0.2, "partner")
