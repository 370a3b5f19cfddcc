"""The value types of an experiment file, with their allowed values in words, and the base class of its sections."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"


@dataclass(frozen=True)
class Allowed:
    """Metadata of a type: the values that it accepts, as error messages name them."""

    text: str


@dataclass(frozen=True)
class Unit:
    """Metadata of a type: the unit of its numbers, for the generated reference page."""

    text: str


def allowed_by(metadata: Any) -> str:
    """The text of the first `Allowed` among a type's metadata; empty without one."""
    return next((entry.text for entry in metadata if isinstance(entry, Allowed)), "")


Text = Annotated[str, Field(strict=True, min_length=1, max_length=1000, pattern=ONE_LINE), Allowed("text on one line")]
OptionalText = Annotated[
    str | None,
    Field(strict=True, min_length=1, max_length=1000, pattern=ONE_LINE),
    Allowed("text on one line, or null"),
]
Label = Annotated[
    str | None,
    Field(strict=True, max_length=40, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .+()/=-]*$"),
    Allowed("at most 40 letters, digits, spaces and _.+()/=-, beginning with a letter, a digit or _, or null"),
]
Revision = Annotated[
    str | None,
    Field(
        strict=True,
        max_length=200,
        # The names that git allows, without `..`: the hub's cache uses the name as a path.
        pattern=r"^[^\x00-\x20\x7f./~^:?*\[\\]+([./][^\x00-\x20\x7f./~^:?*\[\\]+)*$",
    ),
    Allowed("text: the name of a commit, tag or branch, or null"),
]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT), Allowed(f"a whole number from 1 to {MAX_COUNT}")]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT), Allowed(f"a whole number from 0 to {MAX_COUNT}")]
OptionalCount = Annotated[
    int | None, Field(strict=True, ge=1, le=MAX_COUNT), Allowed(f"a whole number from 1 to {MAX_COUNT}, or null")
]
OptionalCountOrZero = Annotated[
    int | None, Field(strict=True, ge=0, le=MAX_COUNT), Allowed(f"a whole number from 0 to {MAX_COUNT}, or null")
]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), Allowed("a number above 0")]
OptionalPositive = Annotated[
    float | None, Field(strict=True, gt=0, allow_inf_nan=False), Allowed("a number above 0, or null")
]
OptionalShare = Annotated[
    float | None, Field(strict=True, ge=0, le=1, allow_inf_nan=False), Allowed("a number from 0 to 1, or null")
]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), Allowed("a number of 0 or more")]
Decay = Annotated[
    float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False), Allowed("a number of at least 0 and below 1")
]
Switch = Annotated[bool, Field(strict=True), Allowed("true or false")]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Allowed(f"a whole number from 0 to {MAX_SEED}")]


class Section(BaseModel):
    """A section of an experiment file: immutable, and without unknown keys.

    Every field has a `description` of one sentence and `examples`; a number also has a `Unit`. The reference page of
    all keys is generated from them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __hash__(self) -> int:
        # pydantic's own hash fails on dictionary fields, and grouping trials into packs hashes sections.
        return hash(self.model_dump_json())
