"""Gradient descent on a constant kernel: bad input is refused by the name of the argument."""

import pytest
import torch

from ldyn import models
from ldyn.kernels import regression as kr

F64 = torch.float64
GOOD = torch.eye(3, dtype=F64)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ([1.0], r"^kernel: expected a torch\.Tensor"),
        (torch.zeros(2, 3), r"^kernel: expected shape \(N, N, V, V\) or \(N, N\), got .*\(2, 3\)"),
        (torch.zeros(2, 2, 2), r"^kernel: expected shape \(N, N, V, V\) or \(N, N\)"),
        (torch.zeros(2, 2, 3, 2), r"^kernel: expected shape \(N, N, V, V\)"),
        (torch.eye(2).long(), "^kernel: expected a real floating-point dtype"),
        (torch.eye(2) / 0, "^kernel: expected finite values"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"^kernel: expected a symmetric matrix, .* 0\.5"),
        (torch.diag(torch.tensor([1.0, -0.5])), r"^kernel: expected a positive semidefinite .* -0\.5"),
        (-torch.eye(2), "^kernel: expected a positive semidefinite"),
    ],
)
def test_bad_kernels_are_refused_by_name(kernel, message):
    with pytest.raises(ValueError, match=message):
        kr.spectrum(kernel)
    with pytest.raises(ValueError, match=message):
        kr.gradient_descent(kernel, torch.zeros(2), steps=1, lr=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.zeros(2, dtype=F64)}, r"^targets: expected shape \(3\)"),
        ({"targets": torch.zeros(3)}, r"^targets: expected the dtype of kernel \(torch\.float64\)"),
        ({"targets": torch.zeros(3, dtype=F64, device="meta")}, r"^targets: expected the device of kernel"),
        ({"targets": None}, r"^targets: expected a torch\.Tensor, got None"),
        ({"initial": torch.zeros(3, 1, dtype=F64)}, r"^initial: expected shape \(3\)"),
        ({"cross": torch.zeros(2, 4, dtype=F64)}, r"^cross: expected shape \(M, 3\)"),
        ({"cross": torch.zeros(2, 3, 1, 1, dtype=F64)}, r"^cross: expected shape \(M, 3\)"),
        ({"initial_cross": torch.zeros(2, dtype=F64)}, "^initial_cross: expected it only together with cross"),
        (
            {"cross": GOOD, "initial_cross": torch.zeros(2, dtype=F64)},
            r"^initial_cross: expected shape \(3\)",
        ),
        ({"lr": 0.0}, "^lr: expected a number > 0, got 0"),
        ({"lr": "1"}, "^lr: expected a finite real number"),
        ({"steps": -1}, "^steps: expected an integer >= 0, got -1"),
        ({"steps": 1.5}, "^steps: expected an integer >= 0"),
        ({"steps": "12"}, "^steps: expected an integer >= 0"),
        ({"steps": []}, "^steps: expected at least one number, got none"),
        ({"loss": "mean"}, r"^loss: expected one of \['half_mean', 'half_sum', 'mse'\], got 'mean'"),
        ({"loss": ["mse"]}, r"^loss: expected one of .* got an object of type list"),
    ],
)
def test_bad_arguments_are_refused_by_name(changed, message):
    arguments = {"targets": torch.zeros(3, dtype=F64), "steps": 1, "lr": 0.1, **changed}
    with pytest.raises(ValueError, match=message):
        kr.gradient_descent(GOOD, **arguments)


def test_other_bad_arguments_are_refused_by_name():
    square, y = torch.eye(4, dtype=F64).reshape(2, 2, 2, 2).permute(0, 2, 1, 3), torch.zeros(2, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"^outputs: expected 2 as in the kernel's blocks, got 3"):
        kr.critical_learning_rate(square, outputs=3)
    with pytest.raises(ValueError, match=r"^tolerance: expected a number >= 0"):
        kr.spectrum(GOOD, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"^times: expected a number >= 0"):
        kr.gradient_flow(square, y, times=-1.0)
    with pytest.raises(ValueError, match=r"^targets: expected shape \(2, 2\)"):
        kr.kernel_regression(square, torch.zeros(2, dtype=F64))
    with pytest.raises(ValueError, match=r"^cross: expected shape \(M, 2, 2, 2\)"):
        kr.kernel_regression(square, y, cross=torch.zeros(1, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"^targets: expected shape \(2, 3\)"):
        kr.linearized_descent(models.mlp((1, 3)), torch.ones(2, 1, dtype=F64), y, steps=1, lr=0.1)
