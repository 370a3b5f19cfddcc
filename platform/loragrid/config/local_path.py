"""Turns a path in an experiment into a path on this machine, or names the key of an impossible one."""

from pathlib import Path


def local_path(key: str, text: str) -> Path:
    """The path, with `~` replaced by the home folder; it need not exist.

    Raises:
        ValueError: the path is impossible on this machine; the message names `key`.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # raises if the name is too long or a folder is not readable
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of an unknown user
        raise ValueError(f"{key}: {text}: is not a usable path on this machine: {reason_of(error)}") from error
    return path


def reason_of(error: Exception) -> str:
    """The reason on one line, without the path, because the caller names the path."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    first, *rest = text.splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
