r"""Turns a path in an experiment into a path on this machine, or names the key of an impossible one.

One rule for every path that a user writes: `~` and `~user` are home folders, a relative path is relative to the folder
in which the program was started, and nothing else is replaced. What only a shell or another system would replace or
understand (`$HOME`, `${DATA}`, `%TEMP%`, `C:\data`, `file:///data`, blanks at an end) is refused, because it would name
another file, or create a folder with that very name.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SHELL_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*)|\()")
_WINDOWS_VARIABLE = re.compile(r"%(?P<name>[A-Za-z_][A-Za-z0-9_]*)%")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|.*\\")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def local_path(key: str, text: str, *, to_be_written: bool = False) -> Path:
    """The path, with `~` replaced by the home folder; it need not exist.

    to_be_written: whether the path is written to. A file to be read may have a name such as `a$b.csv`, if it exists.

    Raises:
        ValueError: the path is impossible on this machine, or it is not the path that was meant; the message names
            `key` and says what to write.
    """
    try:
        path = Path(text).expanduser()
        exists = path.exists()  # raises if the name is too long or a folder is not readable
        new = str(path.relative_to(_existing_ancestor(path))) if path.is_absolute() else text
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of an unknown user
        raise ValueError(f"{key}: {text}: is not a usable path on this machine: {reason_of(error)}") from error
    if to_be_written or not exists:
        refuse_unexpanded(key, text, new)
        _refuse_foreign(key, text)
    return path


def _existing_ancestor(path: Path) -> Path:
    return next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())


def refuse_unexpanded(key: str, text: str, part: str | None = None) -> None:
    """Refuse a path or a URI with a variable that only a shell replaces.

    part: where to look for variables, by default in the whole text.

    Raises:
        ValueError: there is one; the message says what it is on this machine.
    """
    part = text if part is None else part
    found = _SHELL_VARIABLE.search(part)
    if found is None and "://" not in text:  # in a URI, % begins the code of a character
        found = _WINDOWS_VARIABLE.search(part)
    if found is None:
        return
    variable, name = found[0], next((group for group in found.groups() if group), "")
    value = os.environ.get(name)
    here = f"which is {value!r} here" if value else "which is not set here"
    meant = f"{variable}, {here}," if name else variable
    raise ValueError(
        f"{key}: {text}: {meant} is not replaced in a path; allowed: the path written out, ~ for the home folder, or "
        f'on the command line --set "KEY=PATH", in which the shell replaces variables'
    )


def _refuse_foreign(key: str, text: str) -> None:
    """Refuse what is a path elsewhere, or none."""
    if text != text.strip():
        raise ValueError(f"{key}: {text!r}: there are blanks at an end of the path; allowed: the path without them")
    if _ADDRESS.match(text):
        if text.startswith("file:"):
            what = f"is a URI; allowed: the path, {unquote(urlsplit(text).path)}"
        else:
            what = "is an address, and nothing is downloaded from addresses; allowed: a local path"
        raise ValueError(f"{key}: {text}: {what}, or the name of something on the hub")
    if os.sep == "/" and _WINDOWS_PATH.match(text):
        raise ValueError(f"{key}: {text}: is a path of Windows; allowed: a path here, with / between folders")


def reason_of(error: Exception) -> str:
    """The reason on one line, without the path, because the caller names the path."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    first, *rest = text.splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
