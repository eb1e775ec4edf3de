"""Bad input to the functions of the stability chapter is named."""

import math

import pytest
import torch

from ldyn.hessians import stability as sb

ONES = torch.ones(3, dtype=torch.float64)
BAD = [
    (lambda: sb.critical_learning_rate(0.0), "sharpness"),
    (lambda: sb.critical_learning_rate(-1.0), "sharpness"),
    (lambda: sb.critical_learning_rate(math.nan), "sharpness"),
    (lambda: sb.critical_learning_rate(torch.tensor([1.0, 0.0])), "sharpness"),
    (lambda: sb.critical_learning_rate(1.0, optimizer="sgd"), "optimizer"),
    (lambda: sb.critical_learning_rate(1.0, optimizer="momentum"), "beta"),
    (lambda: sb.critical_learning_rate(1.0, optimizer="momentum", beta=1.0), "beta"),
    (lambda: sb.critical_learning_rate(1.0, beta=0.9), "beta"),
    (lambda: sb.critical_learning_rate(1.0, optimizer="nesterov", beta=0.9, dampening=0.1), "dampening"),
    (lambda: sb.critical_learning_rate(1.0, optimizer="momentum", beta=0.9, dampening=1.0), "dampening"),
    (lambda: sb.mode_factor(1.0, lr=0.0), "lr"),
    (lambda: sb.mode_factor(math.inf, lr=1.0), "curvature"),
    (lambda: sb.best_learning_rate(2.0, 1.0), "smallest"),
    (lambda: sb.best_learning_rate(0.0, 1.0), "smallest"),
    (lambda: sb.quadratic_descent(torch.ones(2, 3), torch.ones(2), lr=0.1, steps=1), "hessian"),
    (lambda: sb.quadratic_descent(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), lr=0.1, steps=1), "hessian"),
    (lambda: sb.quadratic_descent(torch.eye(2), torch.ones(3), lr=0.1, steps=1), "start"),
    (lambda: sb.quadratic_descent(torch.eye(3), ONES, lr=0.1, steps=1), "start"),
    (lambda: sb.quadratic_descent(torch.eye(2), torch.ones(2), lr=0.1, steps=-1), "steps"),
    (lambda: sb.quadratic_descent(torch.eye(2), torch.ones(2), lr=0.1, steps=1.5), "steps"),
    (lambda: sb.quadratic_descent(torch.eye(2), torch.ones(2), lr=0.1, steps=[]), "steps"),
    (lambda: sb.quadratic_descent(torch.eye(2), torch.ones(2), lr=0.1, steps=1, momentum=1.0), "momentum"),
    (lambda: sb.descent_bound(1.0, -1.0, lr=0.1, smoothness=1.0), "gradient_norm"),
    (lambda: sb.descent_bound(1.0, 1.0, lr=0.1, smoothness=-1.0), "smoothness"),
    (lambda: sb.descent_bound(ONES, -ONES, lr=0.1, smoothness=1.0), "gradient_norm"),
    (lambda: sb.descent_bound(1.0, 1.0, lr=0.1, smoothness=1.0, noise=-1.0), "noise"),
    (lambda: sb.curvature_from_losses(ONES[:2], lr=0.1), "losses"),
    (lambda: sb.curvature_from_losses(ONES * math.nan, lr=0.1), "losses"),
    (lambda: sb.curvature_from_losses(ONES, lr=-0.1), "lr"),
    (lambda: sb.increment_bound(0, 1.0, loss_bound=1.0, smoothness=1.0), "count"),
    (lambda: sb.increment_bound(1, -1.0, loss_bound=1.0, smoothness=1.0), "distance"),
    (lambda: sb.increment_bound(1, 1.0, loss_bound=-1.0, smoothness=1.0), "loss_bound"),
    (lambda: sb.gauss_newton_bound([], ONES), "weights"),
    (lambda: sb.gauss_newton_bound([torch.ones(2, 4, dtype=torch.float64)], ONES), r"weights\[0\]"),
    (lambda: sb.gauss_newton_bound([torch.ones(2, 3)], ONES), r"weights\[0\]"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, name = BAD[case]
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        call()
