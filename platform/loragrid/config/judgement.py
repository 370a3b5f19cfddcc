"""The sections that say, before a sweep runs, how its methods will be compared, and on which trials."""

from typing import Annotated, Literal

from pydantic import Field

from loragrid.schema.fields import Allowed, OptionalPositive, OptionalText, Section, Unit


class VerdictConfig(Section):
    """How methods are compared: which pairs are tested, and how far behind the best a cheaper method may be.

    A sweep records the section before its first trial, so that the pairs cannot be chosen by their results.
    """

    against: OptionalText = Field(
        default=None,
        description="The method (its label, if it has one) that every other method is tested against; null tests every "
        "pair. Fewer pairs show smaller differences.",
        examples=["lora"],
    )
    margin: Annotated[OptionalPositive, Unit("the reported metric: nats per token, or a share of rows")] = Field(
        default=None,
        description="A cheaper method is recommended only if it is at most this far behind the best; null is 1 % of "
        "the best loss, or one point of an accuracy.",
        examples=[0.01],
    )
    cost: Annotated[Literal["parameters", "memory", "time"], Allowed("parameters, memory, time")] = Field(
        default="parameters",
        description="The cost by which the cheapest of several equally good methods is recommended: trained "
        "parameters, peak memory, or time per step.",
        examples=["memory"],
    )


class ConfirmConfig(Section):
    """Each method's chosen setting is trained again with fresh seeds; the verdict rests on these trials alone.

    A setting that is chosen by its seeds owes a part of its figures to their luck, and the part grows with the number
    of settings tried. Fresh seeds have no part in the choice. They are the smallest whole numbers above the largest
    seed of the grid. Early stopping ends no trial with a fresh seed.
    """

    seeds: Annotated[
        int,
        Field(strict=True, ge=3, le=1000),
        Allowed("a whole number from 3 to 1000; fewer seeds support no claim about a method"),
        Unit("seeds"),
    ] = Field(
        default=3, description="Fresh seeds with which each method's chosen setting is trained again.", examples=[5]
    )
