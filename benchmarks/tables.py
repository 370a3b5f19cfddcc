"""A benchmark's table, printed and written row by row, so a later failure loses no row."""

from collections.abc import Sequence
from pathlib import Path

from loragrid.worker.environment import hardware_tags, version_tags

REASON_LENGTH = 200


class Table:
    """A Markdown table below a paragraph that describes the measurement; if `path` is None, it is only printed."""

    def __init__(self, path: Path | None, about: str, columns: Sequence[str]) -> None:
        self._path, self._num_columns = path, len(columns)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")
        self._write(about, "", _row(columns), "|---" * len(columns) + "|")

    def add(self, *cells: object) -> None:
        """Add a row; missing cells at its end stay empty."""
        assert len(cells) <= self._num_columns
        self._write(_row([*cells, *[""] * (self._num_columns - len(cells))]))

    def _write(self, *lines: str) -> None:
        text = "\n".join(lines)
        print(text, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def failed(reason: str) -> str:
    """The cell of a row that could not be measured: the reason, shortened."""
    line = " ".join(reason.split()).replace("|", "/")
    return "failed: " + (line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…")


def hardware(device: str) -> str:
    """The machine and the versions that a benchmark runs on, read without opening a CUDA context."""
    tags = hardware_tags() | version_tags()
    machine = f"{tags['loragrid.cpu.num_cores']} CPU cores"
    if device == "cuda":
        machine = tags.get("loragrid.gpu", "GPUs that nvidia-smi does not name")
    versions = ", ".join(f"{name} {tags[f'loragrid.version.{name}']}" for name in ("torch", "transformers", "ray"))
    return f"{machine}; {versions}"
