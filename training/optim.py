"""The optimizer of a run: which parameter is trained how, and the rates of each step.

    optimizer = build_optimizer(method, recipe)
    rates = set_rates(optimizer, recipe, now, batch_size=batch_size)     # before every step

A parameter is either a *weight* or a *vector*: a bias, a scale or shift of a norm, a token, a position
embedding. Vectors have no weight decay and no layer-wise adaptation, as in SimCLR and BYOL: decay
would pull a norm's scale towards switching its channel off, and the ratio of norms that LARS adapts by says
nothing about a bias that starts at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from training.method import Method, ParameterRule, Recipe
from training.schedules import Now, constant, cosine, warmup

__all__ = ["build_optimizer", "set_rates"]

REFERENCE_BATCH = 256
"""The batch size that a recipe's learning rate is meant for (Goyal et al. 2017)."""

WARMUP_SHARE = 0.1
"""Warm-up takes at most this share of all epochs."""

TRUST = 1e-3
"""η of LARS (You et al. 2017): how far one step may move a layer, relative to the norm of its weights."""


def build_optimizer(method: Method[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """An optimizer of every parameter of `method` that takes a gradient, with the rates still to be set.

    Parameters lie in groups of one treatment. Beside the optimizer's own settings each group says what
    `set_rates` goes by: 'lr_factor', 'fixed_lr' and 'decay', and 'kind', which is 'weights' or 'vectors'.

    The three optimizers:

    - sgd: with momentum, dampening 0, decay added to the gradient.
    - adamw: decoupled weight decay (Loshchilov & Hutter 2019), β .9 and .999.
    - lars: timm's, which is You et al. 2017 with one freedom that Barlow Twins' and VICReg's codes take as
      well: as in torch's SGD the learning rate multiplies the momentum buffer instead of what enters it. It
      is told to adapt the weights even where they do not decay; on its own it would quietly be SGD then.

    Args:
        method: Its `parameter_rules` say which modules are treated otherwise.
        recipe: Which optimizer, and with what rates.
    """
    groups = _groups(method, recipe)
    places = {one.device.type for group in groups for one in group["params"]}
    # One kernel for all parameters on a GPU. On a CPU one pass over each instead of a dozen: a step of AdamW
    # on ten million took 16 ms instead of 91. SGD is left to torch there.
    fused = True if places == {"cuda"} else None
    if recipe.optimizer == "adamw":
        fused = True if places <= {"cuda", "cpu"} else None
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=0.0, fused=fused)
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.sgd_momentum, fused=fused)
        _begin_at_rest(sgd)
        return sgd
    from training import torchvision_ops

    torchvision_ops.register()
    from timm.optim.lars import Lars

    for group in groups:
        group["always_adapt"] = group["kind"] == "weights"
    lars: torch.optim.Optimizer = Lars(groups, lr=recipe.lr, momentum=recipe.sgd_momentum, trust_coeff=TRUST)
    return lars


def set_rates(
    optimizer: torch.optim.Optimizer, recipe: Recipe, now: Now, *, batch_size: int
) -> dict[str, float]:
    """Sets the learning rate and weight decay of every group for the step that comes.

    The learning rate is lr × batch size ÷ 256. It warms up linearly over `warmup_epochs`, at most a tenth of
    the training, then falls along half a cosine to its share `lr_end`. The weight decay goes along half a
    cosine over the whole training (Caron et al. 2021, section 3.2).

    Args:
        batch_size: Images of one step, over all ranks and accumulated parts.

    Returns:
        'lr' and 'weight_decay' of a weight that no rule changes, to be logged.
    """
    peak = recipe.lr * batch_size / REFERENCE_BATCH
    epochs = now.steps / now.steps_per_epoch
    lr = warmup(min(recipe.warmup_epochs, WARMUP_SHARE * epochs), cosine(peak, peak * recipe.lr_end))(now)
    last = recipe.weight_decay if recipe.weight_decay_end is None else recipe.weight_decay_end
    decay = (constant(last) if recipe.weight_decay == last else cosine(recipe.weight_decay, last))(now)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * (peak if group["fixed_lr"] else lr)
        group["weight_decay"] = decay if group["decay"] else 0.0
    return {"lr": lr, "weight_decay": decay}


def _begin_at_rest(sgd: torch.optim.SGD) -> None:
    """Gives every parameter a momentum of zero, which leads to the same weights as having none yet.

    torch's fused kernel cannot have both at once, as with prototypes that are frozen in the first steps.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _groups(method: Method[Any], recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups, in the order in which the method's parameters first need them."""
    rules = {}
    for rule in reversed(method.parameter_rules()):  # the first rule that fits is the last one written
        rules.update(dict.fromkeys(rule.module.parameters(), rule))
    everyone = ParameterRule(module=method)
    undecayed = set(_named_vectors(method))
    groups: dict[tuple[str, bool, float, bool], dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = rules.get(parameter, everyone)
        vector = parameter.ndim <= 1 or name.endswith(".bias") or parameter in undecayed
        kind = "vectors" if vector else "weights"
        factor = rule.lr * (recipe.bias_lr if vector else 1.0)
        decay = rule.decay and not vector
        group = groups.setdefault(
            (kind, decay, factor, rule.fixed_lr),
            {"params": [], "kind": kind, "decay": decay, "lr_factor": factor, "fixed_lr": rule.fixed_lr},
        )
        group["params"].append(parameter)
    return list(groups.values())


def _named_vectors(method: nn.Module) -> Iterator[nn.Parameter]:
    """What timm's networks name as parameters without decay, such as tokens and position embeddings."""
    for module in method.modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            # Not every network has all that it names.
            own = dict(module.named_parameters())
            yield from (own[name] for name in names() if name in own)
