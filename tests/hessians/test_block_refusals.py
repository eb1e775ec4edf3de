"""What the Hessian of a Transformer block refuses, and what it says then."""

import pytest
import torch
from torch import nn

from ldyn.hessians import block as bl

F64 = torch.float64
X = torch.arange(12, dtype=F64).reshape(3, 4).sin()
R = torch.ones(3, 4, dtype=F64)
S = torch.eye(4, dtype=F64).expand(3, 4, 4)


def parameters(**changes):
    shapes = {
        "ln1.weight": (4,),
        "attn.W_Q": (4, 2),
        "attn.W_K": (4, 2),
        "attn.W_V": (4, 6),
        "attn.W_O": (6, 4),
        "ln2.weight": (4,),
        "ffn.W1": (5, 4),
        "ffn.W2": (4, 5),
    }
    made = {name: torch.ones(shape, dtype=F64).cumsum(0) / 10 for name, shape in shapes.items()}
    made |= changes
    return {name: value for name, value in made.items() if value is not None}


def refused(match, x=X, p=None, r=R, S=S, heads=2, **options):
    with pytest.raises(ValueError, match=match):
        bl.block_loss_hessian(x, parameters() if p is None else p, r, S, heads=heads, **options)


def test_the_plain_call_is_accepted():
    assert bl.block_loss_hessian(X, parameters(), R, S, heads=2).matrix().shape == (112, 112)


def test_parameters_that_do_not_fit():
    refused("parameters: expected a mapping", p=[1])
    refused("parameters: expected names among .* got attn.WQ", p=parameters(**{"attn.WQ": torch.ones(4, 2)}))
    refused("expected ffn.W1, which is missing", p=parameters(**{"ffn.W1": None}))
    refused("attn.W_K: expected shape", p=parameters(**{"attn.W_K": torch.ones(4, 4, dtype=F64)}))
    refused("attn.b_K: expected shape", p=parameters(**{"attn.b_K": torch.ones(3, dtype=F64)}))
    refused("ffn.W2: expected a tensor with 2", p=parameters(**{"ffn.W2": torch.ones(4, dtype=F64)}))
    refused("ffn.W1: expected the dtype", p=parameters(**{"ffn.W1": torch.ones(5, 4)}))
    refused("ln1.weight: expected finite", p=parameters(**{"ln1.weight": torch.full((4,), torch.nan, dtype=F64)}))
    refused("ln2.bias: expected a torch.Tensor", p=parameters(**{"ln2.bias": [0.0] * 4}))


def test_options_that_are_not_there():
    refused("heads: expected a divisor of the 2 columns of attn.W_Q", heads=4)
    refused("heads: expected an integer", heads=0)
    refused("norm: expected 'pre' or 'post'", norm="sandwich")
    refused("activation", activation="swish")
    refused("eps", eps=-1.0)
    refused("x: ", x=torch.ones(3, 4, dtype=F64), eps=0.0)
    refused("x: expected a tensor with 2", x=X[None])
    for wrt in (["ffn.W3"], ["x", "x"], [], "x", ["attn.b_Q"]):
        refused("wrt: expected distinct names", wrt=wrt)


def test_a_loss_that_does_not_fit():
    refused("r: expected shape", r=R[:2])
    refused("S: expected shape", S=S[0])
    refused("S: expected a symmetric", S=torch.ones(4, 4, dtype=F64).tril().expand(3, 4, 4))
    refused("S: expected the dtype", S=S.float())


def test_stacks():
    for stack in ([], parameters(), 3):
        with pytest.raises(ValueError, match="parameters: expected a sequence"):
            bl.stack_loss_hessian(X, stack, R, S, heads=2)
    with pytest.raises(ValueError, match=r"1\.ffn\.W1"):
        bl.propagate_curvature(X, [parameters(), parameters(**{"ffn.W1": None})], R, S, heads=2)


def test_layers_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"layer: expected a torch\.nn"):
        bl.block_parameters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer: expected evaluation mode"):
        bl.block_parameters(nn.TransformerEncoderLayer(4, 2, 5))
    with pytest.raises(ValueError, match="layer: expected the activation"):
        bl.block_parameters(nn.TransformerEncoderLayer(4, 2, 5, activation=torch.tanh).eval())
    odd = nn.TransformerEncoderLayer(4, 2, 5).eval()
    odd.norm2.eps = 1e-3
    with pytest.raises(ValueError, match="layer: expected one eps"):
        bl.block_parameters(odd)
