"""A caller's model, for the tests of several rooms: made without a trace, and compared with itself afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a module in float64 and evaluation mode; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def snapshot(model: nn.Module, x: object = None) -> dict[str, Any]:
    """Keep everything that a function must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": [(id(value), value.data_ptr(), value.requires_grad) for value in model.parameters()],
        "grad": [None if value.grad is None else value.grad.clone() for value in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "x": x.clone() if isinstance(x, Tensor) else None,
        "rng": torch.get_rng_state(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


def same(one: object, two: object) -> bool:
    """Compare two snapshots, or parts of them."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two
