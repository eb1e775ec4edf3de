"""Models that have tripped tangent-kernel code, or could: each a small module and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

F64 = torch.float64
WIDTH, POSITIONS, TOKENS = 6, 5, 11

Example = tuple[nn.Module, Tensor | dict[str, Tensor]]


class Calls(nn.Module):
    """A module from a function of its submodules and parameters."""

    def __init__(self, call: Callable[..., object], **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def vectors(count: int, *, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, dtype=F64)


def sequences(count: int) -> Tensor:
    return torch.randn(count, POSITIONS, WIDTH, dtype=F64)


def tokens(count: int) -> Tensor:
    return torch.randint(TOKENS, (count, POSITIONS))


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 6, 5, dtype=F64)


class Double(torch.autograd.Function):
    """A user's own differentiable operation, invisible to every rule: x wᵀ twice over."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return 2 * grad @ w, 2 * grad.transpose(-1, -2) @ x


def _lin(*sizes: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(*[nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)])


def _residual(block: nn.Module, head: nn.Module) -> nn.Module:
    return Calls(lambda m, x: m.head(torch.tanh(x + m.block(x)).mean(1)), block=block, head=head)


def _conv(**options) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.Tanh(), nn.Conv2d(6, 2, 2), nn.Flatten(), nn.LazyLinear(3))


def _tied(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.mix(m.embed(x))).mean(1), m.embed.weight)


def _causal(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(mixed.transpose(1, 2).flatten(2))[:, -1]


def _looped(m: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0, :4])
    for step in x.unbind(1):
        state = torch.tanh(m.recur(state) + m.read(step))
    return m.head(state)


def _encoder_layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, **options)


VECTOR_MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, 3)),
    "linear alone": lambda: nn.Linear(WIDTH, 4),
    "no bias": lambda: _lin(WIDTH, 5, 3, bias=False),
    "called twice": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, 3)
    ),
    "in-place activation": lambda: nn.Sequential(
        nn.Linear(WIDTH, 7), nn.ReLU(inplace=True), nn.Linear(7, 3), nn.ELU(inplace=True)
    ),
    "in-place first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 3)),
    "bias shared by two": lambda: Calls(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.v, m.b)), m.w, m.b),
        v=weight(WIDTH, WIDTH),
        w=weight(WIDTH, WIDTH),
        b=weight(WIDTH),
    ),
    "weight with two biases": lambda: Calls(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.a)), m.w, m.b),
        w=weight(WIDTH, WIDTH),
        a=weight(WIDTH),
        b=weight(WIDTH),
    ),
    "bias once without": lambda: Calls(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w, m.b), w=weight(WIDTH, WIDTH), b=weight(WIDTH)
    ),
    "transposed": lambda: Calls(lambda m, x: torch.tanh(F.linear(x, m.w.t())) @ m.w.T, w=weight(WIDTH, 5)),
    "forth and back": lambda: Calls(lambda m, x: torch.tanh(F.linear(x, m.w)) @ m.w, w=weight(5, WIDTH)),
    "matmul and addmm": lambda: Calls(
        lambda m, x: torch.addmm(m.b, torch.tanh(x @ m.w), m.v), w=weight(WIDTH, 5), v=weight(5, 3), b=weight(3)
    ),
    "slice": lambda: Calls(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w[:4], m.b[:4])), m.w[:, :4]), w=weight(5, WIDTH), b=weight(5)
    ),
    "masked": lambda: Calls(
        lambda m, x: F.linear(x, m.w * m.mask), w=weight(5, WIDTH), mask=(torch.rand(5, WIDTH) > 0.5).to(F64)
    ),
    "known and unknown": lambda: Calls(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w**2), w=weight(WIDTH, WIDTH)
    ),
    "own function": lambda: Calls(
        lambda m, x: m.head(torch.tanh(Double.apply(x, m.w))), w=weight(5, WIDTH), head=nn.Linear(5, 2)
    ),
    "einsum": lambda: Calls(
        lambda m, x: m.head(torch.tanh(torch.einsum("ni,oi->no", x, m.w))), w=weight(5, WIDTH), head=nn.Linear(5, 2)
    ),
    "bilinear": lambda: Calls(
        lambda m, x: m.head(m.two(x, torch.tanh(x))), two=nn.Bilinear(WIDTH, WIDTH, 4), head=nn.Linear(4, 2)
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)),
    "prelu": lambda: nn.Sequential(nn.Linear(WIDTH, 7), nn.PReLU(7), nn.Linear(7, 3)),
    "scale and shift": lambda: Calls(
        lambda m, x: m.head(torch.tanh(m.s * x + m.b - m.c)) * m.t,
        s=weight(WIDTH),
        b=weight(),
        c=weight(1, WIDTH),
        t=weight(1),
        head=nn.Linear(WIDTH, 3),
    ),
    "parameter in front": lambda: Calls(
        lambda m, x: m.head(m.a - x * m.b), a=weight(WIDTH), b=weight(1, 1), head=nn.Linear(WIDTH, 3)
    ),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, 5)), nn.Tanh(), nn.Linear(5, 2)),
    "unused parameter": lambda: Calls(lambda m, x: m.a(x), a=nn.Linear(WIDTH, 3), b=nn.Linear(2, 2)),
    "returns a tuple": lambda: Calls(lambda m, x: (m.a(x), x), a=nn.Linear(WIDTH, 3)),
    "returns a dict": lambda: Calls(lambda m, x: {"logits": m.a(x)}, a=nn.Linear(WIDTH, 3)),
    "returns an object": lambda: Calls(lambda m, x: SimpleNamespace(logits=m.a(x)), a=nn.Linear(WIDTH, 3)),
    "one output, no axis": lambda: Calls(
        lambda m, x: m.a(torch.tanh(m.b(x)))[:, 0], a=nn.Linear(5, 2), b=nn.Linear(WIDTH, 5)
    ),
    "two output axes": lambda: Calls(lambda m, x: m.a(x).unflatten(1, (2, 3)), a=nn.Linear(WIDTH, 6)),
    "dead units": lambda: Calls(
        lambda m, x: m.a(torch.relu(m.b(x) - 100)) + m.a(x[:, :5]), a=nn.Linear(5, 2), b=nn.Linear(WIDTH, 5)
    ),
    "parameters without data": lambda: Calls(
        lambda m, x: m.a(x) + torch.tanh(m.p @ m.q), a=nn.Linear(WIDTH, 3), p=weight(1, 4), q=weight(4, 3)
    ),
}

SEQUENCE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "mean over positions": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Linear(WIDTH, 7), b=nn.Linear(7, 3)
    ),
    "output at each position": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(WIDTH, 7), b=nn.Linear(7, 2)
    ),
    "positions first": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1))).mean(0)), a=nn.Linear(WIDTH, 7), b=nn.Linear(7, 3)
    ),
    "flattened": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x.reshape(-1, WIDTH))).view(len(x), -1)),
        a=nn.Linear(WIDTH, 4),
        b=nn.Linear(4 * POSITIONS, 3),
    ),
    "flattened, positions outside": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1).reshape(-1, WIDTH))).view(POSITIONS, len(x), -1).sum(0)),
        a=nn.Linear(WIDTH, 4),
        b=nn.Linear(4, 3),
    ),
    "folded in the middle": lambda: Calls(
        lambda m, x: m.b(
            torch.tanh(m.a(x.reshape(-1, WIDTH).unflatten(0, (1, -1)).repeat(2, 1, 1))).sum(0).view(len(x), -1)
        ),
        a=nn.Linear(WIDTH, 4),
        b=nn.Linear(4 * POSITIONS, 3),
    ),
    "causal attention": lambda: Calls(_causal, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, 3)),
    "nn attention": lambda: Calls(
        lambda m, x: m.head(m.mix(x, x, x, need_weights=False)[0].mean(1)),
        mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        head=nn.Linear(WIDTH, 3),
    ),
    "nn attention, its weights": lambda: Calls(
        lambda m, x: m.mix(x, x, x)[1].flatten(1)[:, :4], mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    ),
    "nn attention, positions first": lambda: Calls(
        lambda m, x: m.mix(*[x.transpose(0, 1)] * 3)[0][-1], mix=nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True)
    ),
    "nn cross attention": lambda: Calls(
        lambda m, x: m.mix(x, torch.tanh(x), x)[0].mean(1), mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    ),
    "encoder layer": lambda: _residual(_encoder_layer(batch_first=True), nn.Linear(WIDTH, 3)),
    "encoder layer, norm first": lambda: _residual(
        _encoder_layer(batch_first=True, norm_first=True), nn.Linear(WIDTH, 3)
    ),
    "encoder": lambda: _residual(nn.TransformerEncoder(_encoder_layer(batch_first=True), 2), nn.Linear(WIDTH, 3)),
    "gru": lambda: Calls(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.GRU(WIDTH, 4, batch_first=True), head=nn.Linear(4, 3)
    ),
    "lstm": lambda: Calls(
        lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=nn.LSTM(WIDTH, 4, batch_first=True), head=nn.Linear(4, 3)
    ),
    "recurrence by hand": lambda: Calls(_looped, recur=nn.Linear(4, 4), read=nn.Linear(WIDTH, 4), head=nn.Linear(4, 3)),
    "rms norm": lambda: Calls(
        lambda m, x: m.b(m.norm(m.a(x))).sum(1), a=nn.Linear(WIDTH, 5), norm=nn.RMSNorm(5), b=nn.Linear(5, 3)
    ),
    "norm over two axes": lambda: Calls(
        lambda m, x: m.b(m.norm(x).flatten(1)), norm=nn.LayerNorm((POSITIONS, WIDTH)), b=nn.Linear(POSITIONS * WIDTH, 3)
    ),
    "learned positions": lambda: Calls(
        lambda m, x: m.b(torch.tanh(x + m.p)).mean(1), p=weight(POSITIONS, WIDTH), b=nn.Linear(WIDTH, 3)
    ),
    "learned positions, own axis": lambda: Calls(
        lambda m, x: m.b(torch.tanh(x * m.p + m.q)).mean(1),
        p=weight(1, POSITIONS, 1),
        q=weight(1, 1, WIDTH),
        b=nn.Linear(WIDTH, 3),
    ),
    "shifted in place": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x).add_(m.p))).mean(1),
        a=nn.Linear(WIDTH, WIDTH),
        p=weight(POSITIONS, WIDTH),
        b=nn.Linear(WIDTH, 3),
    ),
    "class token": lambda: Calls(
        lambda m, x: m.b(torch.tanh(torch.cat([m.c.expand(len(x), 1, -1), x], 1).cumsum(1))[:, 0]) + m.b(x.mean(1)),
        c=weight(1, 1, WIDTH),
        b=nn.Linear(WIDTH, 3),
    ),
    "channel norms": lambda: Calls(
        lambda m, x: m.b(m.g(m.n(m.a(x.mT)))).mean(-1),
        a=nn.Conv1d(WIDTH, 4, 2),
        n=nn.BatchNorm1d(4),
        g=nn.GroupNorm(2, 4),
        b=nn.Conv1d(4, 3, 1),
    ),
    "separate projections": lambda: Calls(
        lambda m, x: m.mix(x, x[..., :3], x[..., :2])[0].mean(1),
        mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=3, vdim=2),
    ),
}

TOKEN_MODELS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x)).mean(1)), embed=nn.Embedding(TOKENS, 4), b=nn.Linear(4, 3)
    ),
    "embedding, padded": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x)).mean(1)),
        embed=nn.Embedding(TOKENS, 4, padding_idx=-2),
        b=nn.Linear(4, 3),
    ),
    "embedding, renormalised": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x)).mean(1)), embed=nn.Embedding(TOKENS, 4, max_norm=0.5), b=nn.Linear(4, 3)
    ),
    "one token": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x[:, 0]))), embed=nn.Embedding(TOKENS, 4), b=nn.Linear(4, 3)
    ),
    "embedding bag": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x))), embed=nn.EmbeddingBag(TOKENS, 4), b=nn.Linear(4, 3)
    ),
    "position embedding": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x) + m.place(torch.arange(POSITIONS))).mean(1)),
        embed=nn.Embedding(TOKENS, 4),
        place=nn.Embedding(9, 4),
        b=nn.Linear(4, 3),
    ),
    "tied": lambda: Calls(_tied, embed=nn.Embedding(TOKENS, 4), mix=nn.Linear(4, 4)),
    "two tables in one": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.embed(x) * m.embed((x + 1) % TOKENS)).mean(1)),
        embed=nn.Embedding(TOKENS, 4),
        b=nn.Linear(4, 3),
    ),
}

IMAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: _conv(padding=1),
    "stride and dilation": lambda: _conv(stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
    "same padding": lambda: _conv(padding="same", dilation=2),
    "valid padding": lambda: _conv(padding="valid", bias=False),
    "circular padding": lambda: _conv(padding=1, padding_mode="circular"),
    "groups": lambda: _conv(groups=2),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
    "in three dimensions": lambda: Calls(
        lambda m, x: m.b(m.a(x.unsqueeze(1)).flatten(1)), a=nn.Conv3d(1, 2, (2, 3, 2), stride=2), b=nn.LazyLinear(3)
    ),
    "transposed convolution": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x)).mean((2, 3))), a=nn.ConvTranspose2d(4, 5, 2), b=nn.Linear(5, 3)
    ),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.GroupNorm(3, 6),
        nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "weight-normed convolution": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 5, 3)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)
    ),
    "shared over patches": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.a(x.flatten(0, 1).unsqueeze(1))).flatten(1).view(len(x), -1)),
        a=nn.Conv2d(1, 2, 3),
        b=nn.LazyLinear(3),
    ),
    "one call unbatched": lambda: Calls(
        lambda m, x: torch.stack([m.b(m.a(each).flatten()) for each in x]), a=nn.Conv2d(4, 2, 3), b=nn.LazyLinear(3)
    ),
}

FAMILIES = [(VECTOR_MODELS, vectors), (SEQUENCE_MODELS, sequences), (TOKEN_MODELS, tokens), (IMAGE_MODELS, images)]
NAMES = [name for family, _ in FAMILIES for name in family]


def build(name: str, *counts: int) -> tuple[nn.Module, list[Tensor]]:
    """Return a model by name in double precision and evaluation mode, its parameters random, and inputs for it."""
    torch.manual_seed(sum(map(ord, name)))
    make, draw = next((family[name], draw) for family, draw in FAMILIES if name in family)
    model, inputs = make().to(F64).eval(), [draw(count) for count in counts]
    with torch.no_grad():
        model(inputs[0].clone())  # lazy layers learn their sizes
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, inputs


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """Return (N, V, P) gradients, one example and one output at a time, by nothing but plain reverse mode."""
    parameters = list(model.parameters())
    rows = []
    for example in x.split(1):
        output = model(example.clone())
        output = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
        output = output[0] if isinstance(output, tuple) else output
        for value in output.reshape(-1):
            parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(parameter) if part is None else part).reshape(-1)
                        for part, parameter in zip(parts, parameters, strict=True)
                    ]
                )
            )
    return torch.stack(rows).view(len(x), -1, rows[0].numel())
