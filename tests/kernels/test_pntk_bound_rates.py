"""How fast the error of one number for a block falls with the width, as slopes within bands."""

import math

import pytest
import torch

from ldyn.kernels.entk import entk
from ldyn.kernels.pntk import pntk_error, pseudo_ntks
from ldyn.kernels.width import loglog_slope, wide_mlp

F64 = torch.float64
WIDTHS = (64, 128, 256, 512)
DOUBLE_ZERO = math.pi - 1.16556118520721  # tan ψ = 2ψ, where the mean of a block vanishes


def error(x: torch.Tensor, hidden: int, parameterisation: str, width: int, seed: int, kind: str) -> float:
    """Return the relative error over all pairs of some inputs."""
    net = wide_mlp((x.shape[1], *[width] * hidden, 10), parameterisation=parameterisation, seed=seed)
    kernel = entk(net, x)
    return pntk_error(kernel, getattr(pseudo_ntks(kernel), kind)).relative


@pytest.mark.parametrize("kind", ["first", "sum", "trace"])
@pytest.mark.parametrize(
    ("hidden", "parameterisation", "low", "high"),
    [(1, "standard", -1.6, -1.4), (1, "ntk", -0.6, -0.4), (2, "standard", -0.6, -0.4), (2, "ntk", -0.6, -0.4)],
)
def test_the_error_falls_at_the_stated_rate(
    hidden: int, parameterisation: str, low: float, high: float, kind: str
) -> None:
    x = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    squares = [
        torch.tensor([error(x, hidden, parameterisation, width, seed, kind) for seed in range(12)]).square().mean()
        for width in WIDTHS
    ]
    assert low <= loglog_slope(WIDTHS, [float(square.sqrt()) for square in squares]).slope <= high


def test_where_the_mean_vanishes_no_width_helps() -> None:
    assert math.tan(math.pi - DOUBLE_ZERO) == pytest.approx(2 * (math.pi - DOUBLE_ZERO), rel=1e-9)
    assert math.degrees(DOUBLE_ZERO) == pytest.approx(113.218, abs=1e-3)
    unit = torch.tensor([[1.0, 0.0], [math.cos(DOUBLE_ZERO), math.sin(DOUBLE_ZERO)]], dtype=F64)
    medians = []
    for width in (64, 256, 1024):
        errors = []
        for seed in range(100):
            block = entk(wide_mlp((2, width, 10), seed=seed), unit[:1], unit[1:])
            errors.append(pntk_error(block, pseudo_ntks(block).first).relative)
        medians.append(float(torch.tensor(errors).median()))
    assert abs(loglog_slope((64, 256, 1024), medians).slope) < 0.02
    assert min(medians) > 0.9
