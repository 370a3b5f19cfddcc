"""What the methods' tests train: a tiny float64 model, members with their own settings, and a plain loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loragrid_methods import Method, get_method
from loragrid_methods.stacks.optimizer import MemberAdamW
from loragrid_methods.stacks.pack import AdapterPack, member_order

torch.set_num_threads(1)

ROWS, LENGTH = 2, 6
"""Rows of one member in a batch, and their tokens."""


class TinyBlock(nn.Module):
    """Attention and MLP whose six linear layers have four different shapes; q, k and v share their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width // 2), nn.Linear(width, width // 2, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width - 4), nn.Linear(2 * width - 4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        down: Tensor = self.down_proj(torch.tanh(self.up_proj(self.norms[1](x))))
        return x + down


class TinyModel(nn.Module):
    """A causal language model that computes only in `dtype`; Llama always computes its norms in float32."""

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 12, vocabulary: int = 20) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(2))
            self.head = nn.Linear(width, vocabulary, bias=False)
        self.to(dtype).eval()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
"""The last parts of the names of `TinyModel`'s adaptable layers."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A method, its seed, and the member's own training settings."""

    method: Method
    seed: int = 0
    lr: float = 0.01
    weight_decay: float = 0.0
    clip_norm: float = math.inf


def small_method(name: str, **fields: Any) -> Method:
    """The method with rank 4 and start_step 1, if it has these hyperparameters, and with `fields`."""
    cls = get_method(name)
    small = {"rank": 4, "start_step": 1}
    return cls(**{key: value for key, value in small.items() if key in cls.field_names()} | fields)


def in_order(members: Sequence[Member]) -> list[Member]:
    """The members in an order that a pack accepts."""
    return [members[index] for index in member_order([member.method for member in members])]


def decay_slowly(step: int) -> float:
    """A schedule that changes at every step: step -> factor on the learning rate."""
    return 1.0 / (1.0 + 0.05 * step)


def token_ids(base: Any, seed: int, step: int) -> Tensor:
    """(ROWS, LENGTH) tokens that depend only on the seed and the step."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randint(base.get_input_embeddings().num_embeddings, (ROWS, LENGTH), generator=generator)


def next_token_losses(logits: Tensor, ids: Tensor, num_members: int) -> Tensor:
    """The mean cross entropy of every member: logits (M * rows, L, vocabulary), ids (M * rows, L) -> (M,)."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(num_members, -1).mean(1)


class PackRun:
    """A pack on `base`, its optimizer, and the number of steps done."""

    def __init__(
        self,
        base: Any,
        members: Sequence[Member],
        *,
        dtype: torch.dtype = torch.float64,
        schedule: Callable[[int], float] = decay_slowly,
        epsilon: float = 1e-8,
    ) -> None:
        self.base, self.members, self.schedule = base, list(members), schedule
        self.pack = AdapterPack(
            base,
            [(member.method, member.seed) for member in members],
            output_layer=base.get_output_embeddings(),
            dtype=dtype,
        )
        self.optimizer = MemberAdamW(
            self.pack.blocks,
            weight_decay=self._vector([member.weight_decay for member in members]),
            clip_norm=self._vector([member.clip_norm for member in members]),
            beta1=0.9,
            beta2=0.999,
            epsilon=epsilon,
        )
        self.completed = 0
        self.pack.train()

    def backward(self) -> Tensor:
        """Computes the gradients of the sum of the members' losses on this step's batches; returns the losses, (M,)."""
        self.pack.clock.step = self.completed
        ids = torch.cat([token_ids(self.base, member.seed, self.completed) for member in self.members])
        losses = next_token_losses(self.base(input_ids=ids).logits, ids, len(self.members))
        self.optimizer.zero_gradients()
        if losses.requires_grad:
            losses.sum().backward()
        return losses.detach()

    def step(self, active: Tensor | None = None) -> Tensor:
        """Runs one step of the contract's loop; returns the losses before the update, (M,)."""
        losses = self.backward()
        self.update(active)
        return losses

    def update(self, active: Tensor | None = None) -> None:
        """The part of a step after the backward pass. active (M,): the members to update; None for all."""
        self.optimizer.clip_gradients()
        self.pack.before_step()
        rate = self._vector([member.lr for member in self.members]) * self.schedule(self.completed)
        self.optimizer.step(rate, torch.ones(len(self.members), dtype=torch.bool) if active is None else active)
        self.completed += 1
        self.pack.after_step(self.completed)

    def train(self, num_steps: int) -> Tensor:
        """Runs `num_steps` steps; returns their losses, (num_steps, M)."""
        return torch.stack([self.step() for _ in range(num_steps)])

    def member_tensors(self, member: int) -> dict[str, Tensor]:
        """`layer.tensor` -> a copy of the tensor, without padding, for one member."""
        stacks, index = self.pack.member_stacks(member)
        return {
            f"{layer}.{name}": tensor.clone()
            for layer, stack in stacks.items()
            for name, tensor in stack.member_tensors(index).items()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies of all tensors that a continued run needs."""
        state = self.pack.state_tensors() | self.optimizer.state_tensors()
        return {name: tensor.clone() for name, tensor in state.items()}

    @staticmethod
    def _vector(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest absolute difference between entries; the names must be equal."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max().item() for name in ours), default=0.0)
