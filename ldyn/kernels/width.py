"""Wide networks: parameterisations, the infinite-width kernel of a ReLU network, and what training does to a kernel.

A fully connected network of the book multiplies each weight matrix by m = gain / √fan-in, where gain² is 2 for
relu. Where m is put makes no difference to the function and all the difference to the tangent kernel:

- ``"standard"``: inside the weights, whose variance is then m² (this is `ldyn.models.mlp`);
- ``"ntk"``: in front of weights of variance 1, so that the kernel of a layer is multiplied by m²;
- ``"mean-field"``: as ``"ntk"``, but the last layer is divided by √fan-in once more.

Derived in the chapter *Width*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks, models
from ldyn.kernels.entk import entk

PARAMETERISATIONS = ("standard", "ntk", "mean-field")
"""What `wide_mlp` knows."""


class Scale(nn.Module):
    """Multiplies its input by a fixed number; it has no parameters."""

    def __init__(self, factor: float) -> None:
        """Fix the number.

        Args:
            factor: What to multiply by.
        """
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: (...) any tensor.

        Returns:
            (...) the product, in the dtype of `x`.
        """
        return x * self.factor

    def extra_repr(self) -> str:
        """Show the number when the module is printed."""
        return f"factor={self.factor:.6g}"


@dataclass(frozen=True, eq=False)
class Drift:
    """How far training has moved a network.

    Attributes:
        before: (N, N, V, V) tangent kernel on the training inputs at the start.
        after: (N, N, V, V) tangent kernel at the end.
        parameters: ‖θ_T − θ_0‖ / ‖θ_0‖.
        residual: ‖f_T − y‖ / ‖f_0 − y‖ on the training inputs.
    """

    before: Tensor
    after: Tensor
    parameters: float
    residual: float

    @property
    def kernel(self) -> float:
        """Relative change of the kernel, ‖K_T − K_0‖_F / ‖K_0‖_F."""
        return float(torch.linalg.vector_norm(self.after - self.before) / torch.linalg.vector_norm(self.before))


class Slope(NamedTuple):
    """An exponent measured as the slope of a line through logarithms.

    Attributes:
        slope: The exponent p in y ≈ c·xᵖ.
        error: Its standard error from the scatter of the points about the line.
    """

    slope: float
    error: float


def arc_cosine(angle: Tensor, degree: int) -> Tensor:
    """Arc-cosine function κ_n(α) = 2 E[relu(a)ⁿ relu(b)ⁿ] for standard normal a, b of correlation cos α.

    For n = 0 relu(·)⁰ is the indicator of a positive argument. κ_0 and κ_1 are 1 at α = 0, κ_2 is 3. The family is
    that of Cho and Saul, *Kernel methods for deep learning* (2009), normalised differently for n = 2.

    Args:
        angle: α, shape (...), in [0, π].
        degree: n, one of 0, 1, 2.

    Returns:
        κ_n(α), shape (...).

    Raises:
        ValueError: If the angles are not finite floating-point numbers in [0, π], or the degree is none of these.
    """
    alpha = _checks.require_real(angle, "angle")
    if _checks.known_truth(((alpha.detach() < 0) | (alpha.detach() > math.pi)).any()):
        raise ValueError(f"angle: expected values in [0, π], got {float(alpha.min()):.6g} to {float(alpha.max()):.6g}")
    if degree not in (0, 1, 2):
        raise ValueError(f"degree: expected 0, 1 or 2, got {_checks.describe(degree)}")
    rest = math.pi - alpha
    if degree == 0:
        return rest / math.pi
    if degree == 1:
        return (alpha.sin() + rest * alpha.cos()) / math.pi
    return (3 * alpha.sin() * alpha.cos() + rest * (1 + 2 * alpha.cos().square())) / math.pi


def relu_ntk(x1: Tensor, x2: Tensor | None = None, *, layers: int = 1) -> Tensor:
    """Infinite-width tangent kernel Θ of a fully connected ReLU network without biases, in closed form.

    It is the limit, and for one hidden layer at every width the mean, of the kernel of one output of
    ``wide_mlp((d, h, ..., h, V), parameterisation="ntk")``; the kernel of all outputs is Θ ⊗ I. With
    s(x, x') = 2 x·x' / d and α the angle between the inputs, one hidden layer has

        Θ(x, x') = √(s(x, x) s(x', x')) κ_1(α) + s(x, x') κ_0(α).

    Args:
        x1: (..., N1, d) inputs.
        x2: (..., N2, d) inputs; `x1` if left out.
        layers: Number of hidden layers, ≥ 1.

    Returns:
        (..., N1, N2), symmetric positive semidefinite if `x2` is left out.

    Raises:
        ValueError: If the inputs are not non-empty tensors of finite floating-point numbers of one dtype, device
            and dimension d, or `layers` is no positive integer.
    """
    count = _checks.require_integer(layers, "layers")
    size, inner, angle = _geometry(x1, x2)
    kernel = inner
    for layer in range(count):
        kernel = size * arc_cosine(angle, 1) + kernel * arc_cosine(angle, 0)
        if layer + 1 < count:
            angle = _next_angle(angle)
    return kernel


def relu_ntk_variance(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """Variance of the tangent kernel of one hidden ReLU layer at initialisation, times its width h.

    The kernel of one output of ``wide_mlp((d, h, V), parameterisation="ntk")`` is the mean of h independent
    terms, one for each hidden unit, so that its variance is this number divided by h, exactly. At x = x' it is
    3 Θ(x, x)².

    Args:
        x1: (..., N1, d) inputs.
        x2: (..., N2, d) inputs; `x1` if left out.

    Returns:
        (..., N1, N2).

    Raises:
        ValueError: If the inputs are not non-empty tensors of finite floating-point numbers of one dtype, device
            and dimension d.
    """
    size, inner, angle = _geometry(x1, x2)
    k0, k1, k2 = (arc_cosine(angle, degree) for degree in range(3))
    mean = size * k1 + inner * k0
    return 2 * (k2 * size.square() + 2 * k1 * size * inner + 3 * k0 * inner.square()) - mean.square()


def wide_mlp(
    sizes: Sequence[int],
    *,
    activation: str = "relu",
    parameterisation: str = "ntk",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build a fully connected network without biases in a given parameterisation.

    The same seed draws the same normal numbers whatever the parameterisation: ``"standard"`` and ``"ntk"`` are
    then the same function, and ``"mean-field"`` is that function divided by √(width of the last hidden layer).

    Args:
        sizes: Widths from input to output, at least two.
        activation: A key of ``ldyn.models.ACTIVATIONS``.
        parameterisation: ``"standard"``, ``"ntk"`` or ``"mean-field"``.
        seed: Seed of the private generator; the global one is left alone.
        dtype: Dtype of the parameters.

    Returns:
        A module that maps (..., sizes[0]) to (..., sizes[-1]).

    Raises:
        ValueError: If the parameterisation is unknown, or an argument is one that ``ldyn.models.mlp`` refuses.
    """
    if parameterisation not in PARAMETERISATIONS:
        raise ValueError(
            f"parameterisation: expected one of {list(PARAMETERISATIONS)}, got {_checks.describe(parameterisation)}"
        )
    plain = models.mlp(sizes, activation=activation, bias=False, seed=seed, dtype=dtype)
    if parameterisation == "standard":
        return plain
    gain = models.GAIN.get(activation, 1.0)
    fans, place = list(pairwise(sizes)), 0
    modules: list[nn.Module] = []
    for module in plain:
        modules.append(module)
        if isinstance(module, nn.Linear):
            factor = gain * fans[place][0] ** -0.5
            with torch.no_grad():
                module.weight.div_(factor)
            place += 1
            last = parameterisation == "mean-field" and place == len(fans)
            modules.append(Scale(factor * fans[-1][0] ** -0.5 if last else factor))
    return nn.Sequential(*modules)


def training_drift(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: float,
    steps: int,
) -> Drift:
    """Trains a copy of a network by full-batch gradient descent and measures what has changed.

    The loss is ‖f(X) − y‖² / (2N): summed over outputs, averaged over the N examples.

    Args:
        model: Network to start from; it is left as it is.
        inputs: (N, ...) examples.
        targets: (N, V) what the outputs should become.
        lr: Learning rate, > 0.
        steps: Number of steps, ≥ 1.

    Returns:
        The kernel before and after, the relative change of the parameters, and the residual that is left.

    Raises:
        ValueError: If the model is one that `entk` refuses or has frozen parameters, the targets do not fit the
            outputs, the outputs equal the targets at the start, an
            argument is out of range, or training diverges.
    """
    count = _checks.require_integer(steps, "steps")
    start = models.flat_parameters(model)
    before = entk(model, inputs)  # first of all: it refuses a model that is random or couples its examples
    with torch.no_grad():
        output = model(inputs)
    targets = _checks.require_shape(_checks.require_real(targets, "targets"), "targets", tuple(output.shape)).detach()
    first = float(torch.linalg.vector_norm(output - targets))
    if first == 0:
        raise ValueError("targets: expected targets that differ from the outputs, got the outputs themselves")
    trained = models.moved(model, torch.zeros_like(start))
    for _ in models.sgd(trained, inputs, targets, lr=lr, steps=count, clip=None, loss=_half_mean_square):
        pass
    with torch.no_grad():
        left = float(torch.linalg.vector_norm(trained(inputs) - targets)) / first
    if not math.isfinite(left):
        raise ValueError(f"lr: expected a learning rate at which training converges, got {lr!r}, where it diverges")
    moved = torch.linalg.vector_norm(models.flat_parameters(trained) - start)
    return Drift(
        before=before,
        after=entk(trained, inputs),
        parameters=float(moved / torch.linalg.vector_norm(start)),
        residual=left,
    )


def loglog_slope(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> Slope:
    """Fits a power law by least squares through logarithms.

    Args:
        x: (n,) positive numbers, n ≥ 3, not all equal.
        y: (n,) positive numbers.

    Returns:
        The exponent and its standard error.

    Raises:
        ValueError: If there are fewer than three points, the lengths differ, a number is not positive and
            finite, or all `x` are equal.
    """
    points = [_positive_vector(x, "x"), _positive_vector(y, "y")]
    _checks.require_shape(points[1], "y", tuple(points[0].shape))
    if len(points[0]) < 3:
        raise ValueError(f"x: expected at least three points, got {len(points[0])}")
    across, up = (p.log() - p.log().mean() for p in points)
    spread = float(across.square().sum())
    if spread == 0:
        raise ValueError("x: expected numbers that are not all equal, got equal ones")
    slope = float((across * up).sum()) / spread
    scatter = float((up - slope * across).square().sum()) / (len(across) - 2)
    return Slope(slope, math.sqrt(scatter / spread))


def _positive_vector(value: Sequence[float] | Tensor, name: str) -> Tensor:
    """Read positive numbers as a float64 vector."""
    vector = _checks.require_real(torch.as_tensor(value, dtype=torch.float64), name, ndim=1)
    if (vector <= 0).any():
        raise ValueError(f"{name}: expected positive numbers, got {float(vector.min()):.6g}")
    return vector.detach().cpu()


def _half_mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, averaged over the examples."""
    return (outputs - targets).square().sum() / (2 * len(targets))


def _geometry(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return √(s(x, x) s(x', x')), s(x, x') with s = 2 x·x'/d, and the angles, each (..., N1, N2)."""
    first = _checks.require_real(x1, "x1", min_ndim=2)
    second = first if x2 is None else _checks.require_real(x2, "x2", min_ndim=2)
    if second is not first:
        _checks.require_same(second, "x2", first, "x1")
        _checks.require_shape(second, "x2", ("...", None, first.shape[-1]))
    length1, length2 = (torch.linalg.vector_norm(x, dim=-1) for x in (first, second))
    unit1, unit2 = (
        x / n.clamp_min(torch.finfo(x.dtype).tiny)[..., None] for x, n in ((first, length1), (second, length2))
    )
    exact = "donot_use_mm_for_euclid_dist"
    # Twice the arc tangent of half chords: accurate for nearly parallel inputs, where an arc cosine is not.
    apart, along = (torch.cdist(unit1, sign * unit2, compute_mode=exact) for sign in (1, -1))
    angle = 2 * torch.atan2(apart, along)
    size = 2 * length1[..., :, None] * length2[..., None, :] / first.shape[-1]
    return size, size * angle.cos(), angle.clamp(max=math.pi)


def _next_angle(angle: Tensor) -> Tensor:
    """Return the angle of the next layer, whose cosine is κ_1(α), from 1 − κ_1 so that small angles stay accurate."""
    gap = 2 * math.pi * (angle / 2).sin().square() + angle * angle.cos() - angle.sin()
    return 2 * (gap.clamp_min(0) / (2 * math.pi)).sqrt().asin()
