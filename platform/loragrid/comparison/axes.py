"""Finds the parameters in which the trials of a sweep differ, and their short names in tables."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

Scalar = str | int | float | bool | None

# The order of the columns in a table: the rank first, the seed last.
_GROUPS = ("method.rank", "method.", "training.", "model.", "data.", "")


def varying_axes(
    parameters: Sequence[Mapping[str, Scalar]], reserved: Sequence[str] = (), found: Collection[str] = ()
) -> dict[str, str]:
    """Short name -> dotted path of every parameter with more than one value, except the method's name.

    found: paths whose values follow from other parameters and the rows (see `Trial.found`); they are no axes.

    If only some trials have a parameter (VeRA has no alpha), only their values are compared. The short name is the last
    part of the path. It is the whole path if two parameters share the last part, or if that part is `reserved`.
    """
    paths = sorted({path for row in parameters for path in row})
    paths.sort(key=lambda path: next(i for i, group in enumerate(_GROUPS) if path.startswith(group)))
    taken = Counter([*reserved, *(_last_part(path) for path in paths)])
    return {
        path if taken[_last_part(path)] > 1 else _last_part(path): path
        for path in paths
        if path not in ("method.name", *found) and len({row[path] for row in parameters if path in row}) > 1
    }


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
