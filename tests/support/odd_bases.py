"""Small bases whose linear maps are reached, held and called in unusual ways."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, VOCABULARY, NUM_EXPERTS = 8, 20, 4


class OddBase(nn.Module):
    """A language model of two layers: `proj`, a part that a subclass adds, and the head. `vision` sees no text."""

    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(_Layer(part) for _ in range(2))
            self.vision = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH), "fc": nn.Linear(WIDTH, WIDTH)})
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.eval()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class _Layer(nn.Module):
    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.proj, self.part = nn.Linear(WIDTH, WIDTH), part()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.part(torch.tanh(self.proj(x)))
        return y


class Plain(nn.Module):
    """One linear layer, called as usual; only the type and the shape of its weight are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        assert self.up.weight.shape[1] == x.shape[-1]
        y: Tensor = self.up(x.to(self.up.weight.dtype))
        return y


class StackedExperts(nn.Module):
    """Experts as one stacked weight, and a router that is a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH))
        self.gate_up_proj = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, self.router).softmax(-1).topk(2)
        y = torch.einsum("rlkoi,rli->rlko", self.gate_up_proj[chosen], x)
        return (weights.unsqueeze(-1) * y).sum(2)


class FlatExperts(nn.Module):
    """All experts in one matrix, which is cut into their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(NUM_EXPERTS * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.w1.view(NUM_EXPERTS, WIDTH, WIDTH)
        return sum((x @ pieces[expert].T for expert in range(NUM_EXPERTS)), torch.zeros_like(x))


class RoutedExperts(nn.Module):
    """A list of experts that each get the tokens routed to them, and a router that is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(WIDTH, WIDTH)}) for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = self.gate(flat).argmax(-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero().squeeze(1)
            y[tokens] = expert["w1"](flat[tokens])  # type: ignore[index]
        return y.view_as(x)


class CapacityExperts(nn.Module):
    """A list of experts that each get a fixed number of tokens, so no decision needs a value."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        half = len(flat) // 2
        y: Tensor = torch.cat([self.experts[0](flat[:half]), self.experts[1](flat[half:])]).view_as(x)
        return y


class ReadsTheWeight(nn.Module):
    """Uses the weight of `dt` in place of calling it, and hands that of `out` to a kernel in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dt, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            _kernel(self.out.weight)
        y: Tensor = self.out(x @ self.dt.weight)
        return y


def _kernel(weight: Tensor) -> None:
    """A kernel that is not installed."""


class TorchsAttention(nn.Module):
    """torch's own attention, which reads the weight of its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


class NoGradient(nn.Module):
    """A layer whose output only chooses, so no gradient comes back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser, self.up = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x) * (self.chooser(x) > 0)
        return y


class LengthFirst(nn.Module):
    """A layer whose input begins with the position in the row, not with the row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x.transpose(0, 1)).transpose(0, 1)
        return y


class TwoOutputs(nn.Module):
    """A layer derived from `nn.Linear` that returns more than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.router = _Router(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.router(x)[0]
        return y


class _Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        y = super().forward(input)
        return y, y.topk(1)


class SharedLayer(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)})
        self.second = nn.ModuleDict({"up": self.first["up"]})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second["up"](self.first["up"](x))
        return y
