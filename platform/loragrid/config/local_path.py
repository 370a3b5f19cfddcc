"""Turns a path that an experiment names into one of this machine, or says which key names an impossible one."""

from pathlib import Path


def local_path(key: str, text: str) -> Path:
    """The path, `~` replaced by the home folder; there may be nothing there.

    Raises:
        ValueError: no path of this machine; the message names `key`.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # asks the system, which knows how long a name may be and who may look
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the `~name` of nobody
        raise ValueError(f"{key}: {text}: is no path here: {reason_of(error)}") from error
    return path


def reason_of(error: Exception) -> str:
    """What went wrong, on one line: the system's own words, without the path that the caller names anyway."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    first, *rest = text.splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
