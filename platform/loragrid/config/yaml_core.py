"""YAML 1.2's core schema: which plain values are null, true, false and numbers; a loader and a dumper that agree.

PyYAML itself reads YAML 1.1, where `010` is 8, `1:30` is 90, `1_000` is 1000 and `no` is false. The regular expressions
are those of the YAML 1.2.2 specification, section 10.3.2.
"""

import math
import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml

from loragrid.schema.errors import is_unicode

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str"))

# Tag -> the plain values that have it, and their first characters.
_CORE_SCHEMA: dict[str, tuple[re.Pattern[str], str]] = {
    _NULL: (re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~"),
    _BOOL: (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    _INT: (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    _FLOAT: (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
}
_FIRST_GROUP = re.compile(r"0|[1-9][0-9]{0,2}")
_LATER_GROUP = re.compile(r"0[0-9]{2,}")
_WHOLE_PART, _DECIMALS = re.compile(r"[-+]?[0-9.]+"), re.compile(r"[0-9]+(?:[eE][-+]?[0-9]+)?")


class _CoreConstructor(yaml.constructor.BaseConstructor):
    """Makes plain data of nodes, and refuses what would silently mean something else."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        text = super().construct_scalar(node)
        # "\ud800" is a lone surrogate: it cannot be written to a file, a terminal or MLflow.
        if not is_unicode(text):
            raise _error(f"{text!r} is not text in Unicode", node)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for place, (key_node, value_node) in enumerate(node.value):
            if place and node.flow_style and _is_empty(value_node):
                _refuse_cut_value(node.value[place - 1][1], key_node)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"the key {key_node.value!r} is not text: put it in quotes if it is meant so", key_node)
            if key == "<<" and not key_node.style:
                raise _error("YAML 1.2 has no merge keys (<<): write the keys out", key_node)
            if key in mapping:
                raise _error(f"the key {key!r} occurs twice", key_node)
            if _is_empty(value_node):
                raise _error(
                    f"the key {key!r} has no value: write one, null, or {{}} for a section's defaults", key_node
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> list[Any]:
        for before, item in zip([None, *node.value], node.value, strict=False):
            if _is_empty(item):
                raise _error("a list has an entry without a value: write null if it is meant so", item)
            if before is not None and _is_cut_number(before, item):
                number = f"{before.value},{item.value}"
                problem = f"{number} is not one number, because a comma separates the entries of a list"
                raise _error(f"{problem}: write it without the comma, or a blank after the comma", before)
        return [self.construct_object(item, deep=True) for item in node.value]


def _refuse_cut_value(before: yaml.Node, key: yaml.Node) -> None:
    """Refuse a value in braces that its own comma has cut: `{lr: 0,001}` and `{question: Yes, or no}`.

    before: the value before a key that has none.
    """
    if not isinstance(before, yaml.ScalarNode) or not isinstance(key, yaml.ScalarNode) or before.style or key.style:
        return
    is_adjacent = bool(before.end_mark and key.start_mark and key.start_mark.index == before.end_mark.index + 1)
    if is_adjacent and _WHOLE_PART.fullmatch(before.value) and _DECIMALS.fullmatch(key.value):
        raise _error(
            f"{before.value},{key.value} is not one number, because a comma separates the keys in braces: write it "
            "without the comma, with a point before decimals (0.001)",
            before,
        )
    raise _error(
        f"the value {before.value!r} ends at its comma, because a comma separates the keys in braces, and the key "
        f"{key.value!r} has no value: put a text that holds a comma in quotes, or give the key a value",
        before,
    )


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL and node.value == ""


def _is_cut_number(before: yaml.Node, item: yaml.Node) -> bool:
    """Whether two entries are the halves of a number such as 1,000 or 0,001."""
    return (
        isinstance(before, yaml.ScalarNode)
        and isinstance(item, yaml.ScalarNode)
        and bool(before.end_mark and item.start_mark and item.start_mark.index == before.end_mark.index + 1)
        and bool(_FIRST_GROUP.fullmatch(before.value) and _LATER_GROUP.fullmatch(item.value))
    )


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _construct_null(loader: _CoreConstructor, node: yaml.ScalarNode) -> None:
    _check_tagged(loader, node, "null")


def _construct_bool(loader: _CoreConstructor, node: yaml.ScalarNode) -> bool:
    return _check_tagged(loader, node, "bool").lower() == "true"


def _construct_int(loader: _CoreConstructor, node: yaml.ScalarNode) -> int:
    text = _check_tagged(loader, node, "int")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text[2:] if base != 10 else text, base)
    except ValueError:  # Python refuses a decimal number of more than 4,300 digits
        raise _error(f"a number of {len(text)} digits is too large", node) from None


def _construct_float(loader: _CoreConstructor, node: yaml.ScalarNode) -> float:
    text = _check_tagged(loader, node, "float")
    if text.lower().endswith((".inf", ".nan")):
        return float(text.replace(".", "", 1))
    value = float(text)
    mantissa = re.split("[eE]", text)[0]
    if math.isinf(value) or (value == 0 and mantissa.strip("+-0.")):
        size = "large" if value else "small"
        raise _error(f"{text} is too {size} for a 64-bit number, which would make it {value:g}", node)
    return value


def _check_tagged(loader: _CoreConstructor, node: yaml.ScalarNode, kind: str) -> str:
    """The text of a node; a value with an explicit tag (`!!int 1:30`) must have the form that the tag demands."""
    text: str = loader.construct_scalar(node)
    if not _CORE_SCHEMA[f"{_TAG}{kind}"][0].match(text) and not (kind == "float" and _CORE_SCHEMA[_INT][0].match(text)):
        raise _error(f"{text!r} is not a value of the tag !!{kind} in YAML 1.2", node)
    return text


def _refuse_tag(loader: _CoreConstructor, node: yaml.Node) -> None:
    raise _error(f"the tag {node.tag.replace(_TAG, '!!')} is not allowed: write plain values", node)


_CONSTRUCTORS: dict[str | None, Callable[..., Any]] = {
    _NULL: _construct_null,
    _BOOL: _construct_bool,
    _INT: _construct_int,
    _FLOAT: _construct_float,
    _TEXT: _CoreConstructor.construct_scalar,
    f"{_TAG}seq": _CoreConstructor.construct_sequence,
    f"{_TAG}map": _CoreConstructor.construct_mapping,
    None: _refuse_tag,
}
for _tag, _construct in _CONSTRUCTORS.items():
    _CoreConstructor.add_constructor(_tag, _construct)


class CoreLoader(
    yaml.reader.Reader,
    yaml.scanner.Scanner,
    yaml.parser.Parser,
    yaml.composer.Composer,
    _CoreConstructor,
    yaml.resolver.BaseResolver,
):
    """Reads one document of YAML 1.2 in the core schema, without aliases, merge keys and other tags."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _CoreConstructor.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few nested aliases describe billions of values ("billion laughs").
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed: write the value out", problem_mark=mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def process_directives(self) -> Any:
        version, tags = super().process_directives()  # type: ignore[no-untyped-call]
        if version is not None and version < (1, 2):
            problem = f"the file declares YAML {version[0]}.{version[1]}, and experiment files are YAML 1.2"
            raise yaml.MarkedYAMLError(problem=f"{problem}: remove the line %YAML", problem_mark=self.get_mark())
        return version, tags


def load_document(text: str) -> Any:
    """The plain data of the one document in the text; raises yaml.YAMLError and RecursionError."""
    return CoreLoader(text).get_single_data()


def text_after_value(text: str) -> str:
    """The comment behind the value of a readable document; empty without one."""
    node = CoreLoader(text).get_single_node()
    return text[node.end_mark.index :].strip() if node is not None and node.end_mark else text.strip()


class CoreDumper(yaml.SafeDumper):
    """Writes data so that YAML 1.2 and YAML 1.1 read the same: text that either takes for something else is quoted."""


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _characters: list[Any] = [*_first, *([""] if _tag == _NULL else [])]
    CoreLoader.add_implicit_resolver(_tag, _pattern, _characters)
    CoreDumper.add_implicit_resolver(_tag, _pattern, _characters)
