"""The sections that say how methods are judged once their settings are tuned."""

from typing import Annotated

from pydantic import Field

from loragrid.schema.fields import Allowed, Section, Unit


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
