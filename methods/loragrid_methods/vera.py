"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454): one frozen random pair A, B for all layers, and two trained vectors.

Reference code: PEFT's `VeraModel`; A and B are drawn with the same bits.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.contract import Card, ParameterCount, require
from loragrid_methods.stacks.low_rank import LowRankTerm
from loragrid_methods.stacks.low_rank_stack import LowRankStack
from loragrid_methods.stacks.merging import check_adapter
from loragrid_methods.stacks.targeted import TargetedMethod
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class VeRA(TargetedMethod):
    """y = x W0^T + b * [(d * (x A^T)) B^T]; d (rank) and b (d_out) train, A and B are shared by all layers."""

    card: ClassVar[Card] = Card(
        title="VeRA",
        authors="Kopiczko et al.",
        year=2023,
        arxiv="2310.11454",
        paper="VeRA: Vector-based Random Matrix Adaptation",
        update_rule="W = W0 + diag(b) B diag(d) A; A (r x in) and B (out x r) are frozen random matrices shared by all "
        "layers, d and b train per layer. No alpha/r. b = 0 and d = 0.1 at the start.",
        differences="Layers of different shapes use the first `in` columns of A and the first `out` rows of B, as in "
        "PEFT. Backward keeps only u = x A^T, not the T x d_out product. Needs a learning rate about ten times "
        "LoRA's, and ranks of 256 to 1024.",
        peft_equivalent="VeraConfig(r, d_initial, projection_prng_key, save_projection=True)",
    )
    trained: ClassVar[tuple[str, ...]] = ("vera_lambda_d", "vera_lambda_b")

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "a whole number of at least 1")
        require(math.isfinite(self.d_initial), self.name, "d_initial", self.d_initial, "a finite number")
        require(self.projection_seed >= 0, self.name, "projection_seed", self.projection_seed, "0 or more")

    def stack_key(self) -> Hashable:
        return ("vera", self.rank, self.projection_seed, self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        targets = members[0].target_layers(layers)
        projections = SharedProjections(members[0], targets)
        return {layer.name: VeRAStack(members, layer, projections) for layer in targets}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        targets = self.target_layers(layers)
        trainable = sum(layer.out_features + self.rank for layer in targets)
        max_in, max_out = largest_shape(targets)
        shared = self.rank * (max_in + max_out)
        return ParameterCount(trainable=trainable, stored=trainable + shared, shared=shared)

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": self.rank,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "vera_dropout": 0.0,
            "target_modules": self.target_modules,
        }

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        keys = {"vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B"}
        settings = {"r", "d_initial", "projection_prng_key", "save_projection"}
        check_adapter(config, tensors, kind="VERA", settings=settings, keys=keys)
        out_features, in_features = weight.shape
        d, b = tensors["vera_lambda_d"].double(), tensors["vera_lambda_b"].double()
        shared_a, shared_b = tensors["vera_A"].double()[:, :in_features], tensors["vera_B"].double()[:out_features]
        return weight + b.unsqueeze(1) * (shared_b * d @ shared_a)


def largest_shape(layers: Sequence[LayerShape]) -> tuple[int, int]:
    """(largest d_in, largest d_out) over the layers; the two may come from different layers."""
    return max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)


class SharedProjections(nn.Module):
    """A (r, max d_in) and B (max d_out, r) of all layers, drawn as PEFT draws them."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, method: VeRA, layers: Sequence[LayerShape]) -> None:
        super().__init__()
        max_in, max_out = largest_shape(layers)
        generator = torch.Generator("cpu").manual_seed(method.projection_seed)
        self.register_buffer("vera_A", _kaiming(method.rank, max_in, generator), persistent=False)
        self.register_buffer("vera_B", _kaiming(max_out, method.rank, generator), persistent=False)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform in +-sqrt(3) sqrt(2) / sqrt(columns); PEFT's order of operations is kept to get the same bits."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeRAStack(LowRankStack):
    """The VeRA updates of one linear layer for members of one rank and projection seed.

    Shapes, with M members, T tokens per member, r the rank:
        vera_lambda_d (M, r), vera_lambda_b (M, d_out); projections A (r, >= d_in), B (>= d_out, r)
        x (M, T, d_in) -> (M, T, d_out)
    """

    def __init__(self, members: Sequence[VeRA], layer: LayerShape, projections: SharedProjections) -> None:
        super().__init__([member.rank for member in members])
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.projections = projections
        d_initial = torch.tensor([member.d_initial for member in members], dtype=torch.float64)  # the pack casts it
        self.vera_lambda_d = nn.Parameter(d_initial.unsqueeze(1).repeat(1, members[0].rank))
        self.vera_lambda_b = nn.Parameter(torch.zeros(len(members), layer.out_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A, (r, d_in), and of B, (d_out, r)."""
        return self.projections.vera_A[:, : self.in_features], self.projections.vera_B[: self.out_features]

    def term(self) -> LowRankTerm:
        a, b = self.factors()
        return LowRankTerm(down=a, up=b, inner=self.vera_lambda_d, outer=self.vera_lambda_b)

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        return self.member_tensors(member)

    def peft_shared_tensors(self) -> dict[str, Tensor]:
        return {"vera_A": self.projections.vera_A, "vera_B": self.projections.vera_B}
