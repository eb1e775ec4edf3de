"""The parameters of a Transformer block: their names, their checks, and those of PyTorch's own encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor, nn
from torch.nn import functional

from ldyn import _checks

__all__ = ["NAMES", "BlockOptions", "BlockParameters", "NormPlace", "block_parameters", "checked_parameters"]

NormPlace = Literal["pre", "post"]
"""Where the normalisation stands: before each branch, or after its sum with the input."""

NAMES = (
    "ln1.weight",
    "ln1.bias",
    "attn.W_Q",
    "attn.b_Q",
    "attn.W_K",
    "attn.b_K",
    "attn.W_V",
    "attn.b_V",
    "attn.W_O",
    "attn.b_O",
    "ln2.weight",
    "ln2.bias",
    "ffn.W1",
    "ffn.b1",
    "ffn.W2",
    "ffn.b2",
)
"""All parameters of a block, in the order in which its Hessian has them; any bias may be absent."""


class BlockOptions(TypedDict):
    """What else a block is made of, as keyword arguments of the functions that take one."""

    heads: int
    norm: NormPlace
    activation: str
    eps: float


class BlockParameters(NamedTuple):
    """A block read from a PyTorch layer.

    Attributes:
        parameters: Its parameters by name; views of the layer's, cut off from automatic differentiation.
        options: heads, norm, activation and eps.
    """

    parameters: dict[str, Tensor]
    options: BlockOptions


def block_parameters(layer: nn.TransformerEncoderLayer) -> BlockParameters:
    """Read the parameters of PyTorch's encoder layer, so that its Hessian can be computed.

    PyTorch keeps the three input maps of attention in one matrix and multiplies by transposes; here W_Q, W_K, W_V and
    W_O stand to the right of the tokens. W1 and W2 are as they are in ``nn.Linear``.

    Args:
        layer: In evaluation mode or without dropout; pre-LN or post-LN; its activation ReLU, GELU or SiLU.

    Returns:
        The parameters and the options: ``block(x, found.parameters, **found.options)`` is the layer's output for one
        sequence.

    Raises:
        ValueError: If it is no encoder layer, drops units out, its activation is not one of these, or its two
            normalisations differ in eps.
    """
    if not isinstance(layer, nn.TransformerEncoderLayer):
        raise ValueError(f"layer: expected a torch.nn.TransformerEncoderLayer, got {_checks.describe(layer)}")
    _checks.require_eval_mode(layer, "layer")
    attention = layer.self_attn
    if layer.norm1.eps != layer.norm2.eps:
        raise ValueError(f"layer: expected one eps, got {layer.norm1.eps} in norm1 and {layer.norm2.eps} in norm2")
    inputs, outputs = attention.in_proj_weight.detach().chunk(3), attention.out_proj
    found: dict[str, Tensor | None] = {
        "ln1.weight": layer.norm1.weight,
        "ln1.bias": layer.norm1.bias,
        **{f"attn.W_{letter}": weight.mT for letter, weight in zip("QKV", inputs, strict=True)},
        "attn.W_O": outputs.weight.mT,
        "attn.b_O": outputs.bias,
        "ln2.weight": layer.norm2.weight,
        "ln2.bias": layer.norm2.bias,
        "ffn.W1": layer.linear1.weight,
        "ffn.b1": layer.linear1.bias,
        "ffn.W2": layer.linear2.weight,
        "ffn.b2": layer.linear2.bias,
    }
    if attention.in_proj_bias is not None:
        biases = attention.in_proj_bias.detach().chunk(3)
        found |= {f"attn.b_{letter}": bias for letter, bias in zip("QKV", biases, strict=True)}
    present = {name: value.detach() for name in NAMES if (value := found.get(name)) is not None}
    norm: NormPlace = "pre" if layer.norm_first else "post"
    options: BlockOptions = {
        "heads": attention.num_heads,
        "norm": norm,
        "activation": _activation(layer.activation),
        "eps": layer.norm1.eps,
    }
    return BlockParameters(present, options)


def checked_parameters(parameters: object, x: Tensor, heads: object, *, prefix: str = "") -> dict[str, Tensor]:
    """Require the parameters of one block that fit each other and the input.

    Args:
        parameters: Tensors by name.
        x: (L, d).
        heads: The number of heads.
        prefix: What to put before the names in messages.

    Returns:
        The parameters in the order of `NAMES`.

    Raises:
        ValueError: If a name is unknown or missing, or a shape, dtype, device or value does not fit.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters: expected a mapping from names to tensors, got {_checks.describe(parameters)}")
    unknown = [name for name in parameters if name not in NAMES]
    if unknown:
        raise ValueError(f"parameters: expected names among {', '.join(NAMES)}, got {prefix}{unknown[0]}")
    missing = [name for name in NAMES if name not in parameters and not _is_bias(name)]
    if missing:
        raise ValueError(f"parameters: expected {prefix}{missing[0]}, which is missing")
    count = _checks.require_integer(heads, "heads")
    width = x.shape[1]
    keys, values, units = (_columns(parameters, name, prefix) for name in ("attn.W_Q", "attn.W_V", "ffn.W2"))
    shapes = {
        **dict.fromkeys(("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "attn.b_O", "ffn.b2"), (width,)),
        **dict.fromkeys(("attn.W_Q", "attn.W_K"), (width, keys)),
        **dict.fromkeys(("attn.b_Q", "attn.b_K"), (keys,)),
        "attn.W_V": (width, values),
        "attn.b_V": (values,),
        "attn.W_O": (values, width),
        "ffn.W1": (units, width),
        "ffn.b1": (units,),
        "ffn.W2": (width, units),
    }
    for name, value in parameters.items():
        tensor = _checks.require_real(value, f"{prefix}{name}")
        _checks.require_shape(tensor, f"{prefix}{name}", shapes[name])
        _checks.require_same(tensor, f"{prefix}{name}", x, "x")
    for name, size in (("attn.W_Q", keys), ("attn.W_V", values)):
        if size % count:
            raise ValueError(f"heads: expected a divisor of the {size} columns of {prefix}{name}, got {count}")
    return {name: parameters[name] for name in NAMES if name in parameters}


def _columns(parameters: Mapping[str, object], name: str, prefix: str) -> int:
    """Count the columns of a weight matrix."""
    return _checks.require_tensor(parameters[name], f"{prefix}{name}", ndim=2).shape[1]


def _is_bias(name: str) -> bool:
    """Say whether a block may do without a parameter."""
    return name.endswith("bias") or ".b" in name


def _activation(function: Callable[[Tensor], Tensor]) -> str:
    """Name the activation of a layer."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    known = {functional.relu: "relu", functional.gelu: "gelu", functional.silu: "silu"}
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu")):
        if isinstance(function, kind):
            return name
    if function not in known:
        raise ValueError(f"layer: expected the activation ReLU, GELU or SiLU, got {function!r}")
    return known[function]
