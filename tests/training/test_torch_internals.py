"""Only one module uses torch's private parts, and they work as it documents."""

import ast
from pathlib import Path

import pytest
import torch

import loragrid.training.torch_internals
from loragrid.training.compilation import RECOMPILE_LIMIT, fuse_pieces
from loragrid.training.torch_internals import is_compiled, storage_id, uncompile

PLATFORM = Path(loragrid.training.torch_internals.__file__).parents[1]
PRIVATE_ATTRIBUTES = {"_dynamo", "_inductor", "_functorch", "_compiled_call_impl", "_cdata", "_C"}


def private_parts(source: str) -> set[str]:
    """The private modules and attributes of torch that a source file names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
            found.add(node.attr)
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {
            name for name in names if name.split(".")[0] == "torch" and any(p.startswith("_") for p in name.split("."))
        }
    return found


def test_only_one_module_touches_private_parts_of_torch() -> None:
    found = {path.relative_to(PLATFORM).as_posix(): private_parts(path.read_text()) for path in PLATFORM.rglob("*.py")}
    assert {path for path, parts in found.items() if parts} == {"training/torch_internals.py"}


@pytest.mark.parametrize(
    "line",
    [
        "torch._dynamo.reset()",
        "from torch._inductor import config",
        "import torch._functorch.config",
        "from torch import _dynamo",
        "layer._compiled_call_impl = None",
        "from torch.utils._pytree import tree_leaves",
    ],
)
def test_the_search_finds_every_way_to_touch_them(line: str) -> None:
    assert private_parts(line)


def test_storages_alive_have_different_ids_on_every_device() -> None:
    for device in ("cpu", "meta"):
        first, second = torch.zeros(3, device=device), torch.zeros(3, device=device)
        assert storage_id(first) == storage_id(first[1:])
        assert storage_id(first) != storage_id(second)


def test_uncompile_undoes_compile() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not is_compiled(layer)
    layer.compile(backend="eager")
    assert is_compiled(layer)
    uncompile(layer)
    assert not is_compiled(layer)


def test_the_public_recompile_limit_is_the_one_that_dynamo_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        class optimizer:  # noqa: N801  # an attribute of a pack's model
            update = None

    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 8)
    fuse_pieces(Model())  # type: ignore[arg-type]
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
