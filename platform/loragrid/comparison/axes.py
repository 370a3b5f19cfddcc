"""Which parameters tell the trials of a sweep apart, and the short names that tables give them."""

from collections import Counter
from collections.abc import Mapping, Sequence

Scalar = str | int | float | bool | None

# The order of a table's columns: the rank first, the seed last.
_GROUPS = ("method.rank", "method.", "training.", "model.", "data.", "")


def varying_axes(parameters: Sequence[Mapping[str, Scalar]], reserved: Sequence[str] = ()) -> dict[str, str]:
    """Short name -> dotted path of every parameter with more than one value, the method's name aside.

    A parameter that only some trials have (VeRA has no alpha) varies only if *those* differ. The name is the last part
    of the path, or the whole path where two parameters share that part or it is `reserved`.
    """
    paths = sorted({path for row in parameters for path in row})
    paths.sort(key=lambda path: next(i for i, group in enumerate(_GROUPS) if path.startswith(group)))
    taken = Counter([*reserved, *(_last_part(path) for path in paths)])
    return {
        path if taken[_last_part(path)] > 1 else _last_part(path): path
        for path in paths
        if path != "method.name" and len({row[path] for row in parameters if path in row}) > 1
    }


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
