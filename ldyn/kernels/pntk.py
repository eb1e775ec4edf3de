"""The pseudo-NTK: one number in the place of a block (V, V) of the tangent kernel.

Three different numbers go by the name. For the block K = J(x) J(x')ᵀ of a model with V outputs f,

- "first" is K_11, the kernel of the first output: one gradient of a number for each example;
- "sum" is 1ᵀK1 / V, the kernel of Σ_a f_a / √V: as cheap. Gradient descent on cross-entropy leaves the sum of the rows
  of the last layer as it was drawn, so that afterwards this number looks at the network through an untrained head;
- "trace" is tr K / V, the mean over outputs: the multiple of the identity nearest to K, at every width and at any time.
  It needs the gradients of all outputs, but not their V² inner products.

At initialisation all three have the same mean where the entries of the head are independent, with mean zero and one
variance. `pntk` computes tables of them for any model, `pseudo_ntks` reads them off blocks, and `pntk_error` measures
what they miss. Beside these, this module gathers what is built on them:

- how large the error of one block can be over a random head (`pntk_error_bound`, `pntk_variance`, ...): the chapter
  *How wide is wide enough for one number?*;
- regression with one number a pair (`predict`, `prediction_gap`, ...): the chapter *What one number a pair predicts*;
- tables larger than memory (`tiled_gram`, `open_gram`, `solve`), which need the extra ``tiles``: the chapter *Kernels
  larger than memory*.

Derived in the chapter *The pseudo-NTK: one number for a block*.
"""

from __future__ import annotations

from ldyn.kernels._pntk_blocks import PNTKError, PseudoNTKs, pntk_error, pseudo_ntks
from ldyn.kernels.entk import KINDS, pntk
from ldyn.kernels.pntk_bound import (
    ErrorBound,
    pntk_chaos_bound,
    pntk_chaos_factor,
    pntk_error_bound,
    pntk_markov_bound,
    pntk_second_moment,
    pntk_variance,
)
from ldyn.kernels.pntk_regression import (
    Extremes,
    Factorisation,
    PredictionGap,
    extreme_eigenvalues,
    factorise,
    predict,
    prediction_gap,
    relative_ridge,
)
from ldyn.kernels.tiles import NotConverged, Solution, TiledGram, open_gram, solve, tiled_gram

__all__ = [
    "KINDS",
    "ErrorBound",
    "Extremes",
    "Factorisation",
    "NotConverged",
    "PNTKError",
    "PredictionGap",
    "PseudoNTKs",
    "Solution",
    "TiledGram",
    "extreme_eigenvalues",
    "factorise",
    "open_gram",
    "pntk",
    "pntk_chaos_bound",
    "pntk_chaos_factor",
    "pntk_error",
    "pntk_error_bound",
    "pntk_markov_bound",
    "pntk_second_moment",
    "pntk_variance",
    "predict",
    "prediction_gap",
    "pseudo_ntks",
    "relative_ridge",
    "solve",
    "tiled_gram",
]
