"""The reference of the methods, made from their cards and their hyperparameters."""

from docs.generate.markdown import page, plain, table
from loragrid.config.method_settings import describe_type, hyperparameter_types
from loragrid_methods import get_method, method_names

INTRODUCTION = """
Each method is one file in `methods/loragrid_methods/`; this page is made from the cards in these files, which
`loragrid methods` prints too. An experiment file uses the *name* below each title. A card states where the
implementation departs from the paper, and why.
"""


def methods_page() -> str:
    """The page, in Markdown."""
    return page("Methods", INTRODUCTION, [_method(name) for name in method_names()])


def _method(name: str) -> str:
    method = get_method(name)
    types = hyperparameter_types(name)
    rows = [(f"`{key}`", f"`{_shown(value)}`", describe_type(types[key])) for key, value in method.defaults().items()]
    hyperparameters = table(["hyperparameter", "default", "allowed"], rows) if rows else "It has no hyperparameters."
    heading, _, text = method.card.to_markdown().partition("\n")
    packing = "" if method.packable else "It writes the base, so each of its trials trains in a pack of its own."
    parts = [f"{heading} {{ #{name} }}", f"**Name.** `{name}`", with_plain_text(text), packing, hyperparameters]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def with_plain_text(card: str) -> str:
    """A card whose formulas keep their `_` and `*`; its bold words stay bold."""
    return "**".join(plain(part) for part in card.split("**"))


def _shown(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value
