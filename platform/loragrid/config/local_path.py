"""Turns a path in an experiment into a path on this machine, or names the key of an impossible one."""

from pathlib import Path


def local_path(key: str, text: str) -> Path:
    """The path, with `~` replaced by the home folder; it need not exist.

    Raises:
        ValueError: the path is impossible on this machine; the message names `key`.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # the system checks the length of the name and the permissions
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of an unknown user
        raise ValueError(f"{key}: {text}: is no path here: {reason_of(error)}") from error
    return path


def reason_of(error: Exception) -> str:
    """The reason on one line: the system's message, without the path, which the caller names."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    first, *rest = text.splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
