"""Half-trained trials and finished adapters on storage that every node reaches: what a killed process leaves behind."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loragrid.training.member_state import MemberState

NUM_KEPT = 2
"""States of a trial that are kept: the latest, and the one before for the day on which the latest cannot be read."""

OUTPUTS = ("adapter", "scores")
"""What a finished trial leaves: folders, of the same names in MLflow."""

_ENDED, _SUFFIX = ".ended", ".safetensors"
_TENSOR, _CURVE, _PROGRESS = "tensor/", "curve/", "progress"


@dataclass(frozen=True, kw_only=True)
class SavedTrial:
    """A trial that has not ended: its member's state, and what it has said of itself so far.

    records: its whole curve, `{"step": 3, "train/loss": 2.5}`. figures, seconds: as `PackUpdate` and `TrialEnd` have
    them. rankings: rung -> all trials that went on from it, of the rungs that this trial has passed.
    """

    state: MemberState
    records: list[dict[str, float]] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rankings: Mapping[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialStore:
    """One sweep's trials under `uri`, a path or any URI that pyarrow knows (`s3://bucket/path`, `gs://...`).

    Workers write states and adapters; the sweep's driver, once it has recorded a trial's end, marks that. A state's
    file name carries the digest of its content: one that was cut short or spoiled is known as such. Nothing that is
    read here can run code.
    """

    uri: str

    def save(self, trial_id: str, saved: SavedTrial) -> None:
        """Write a state beside the one before, and delete older ones.

        Raises:
            OSError: it could not be written; the one before is untouched.
        """
        with tempfile.TemporaryDirectory() as name:
            local = Path(name) / "state"
            try:
                save_file(_to_tensors(saved), local)
            except SafetensorError as error:
                raise OSError(f"the state could not be written: {error}") from error
            before = self._states(trial_id)
            # A state may be saved twice at one step: the number in front says which is the later.
            number = int(before[-1].partition(".")[0]) + 1 if before else 0
            target = f"{number:09d}.step-{saved.state.completed}.{_digest(local)}{_SUFFIX}"
            self._upload(local, self._path(trial_id, target))
        for old in [*before, target][:-NUM_KEPT]:
            self._filesystem.delete_file(self._path(trial_id, old))

    def load(self, trial_id: str) -> tuple[SavedTrial | None, list[str]]:
        """The latest state that can be read, None where there is none, and what is wrong with later ones."""
        spoiled: list[str] = []
        for name in reversed(self._states(trial_id)):
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / "state"
                try:
                    fs.copy_files(
                        self._path(trial_id, name),
                        str(local),
                        source_filesystem=self._filesystem,
                        destination_filesystem=fs.LocalFileSystem(),
                    )
                except FileNotFoundError:  # the trial has just ended, and the driver deleted its states
                    continue
                step = name.split(".")[1].removeprefix("step-")
                if _digest(local) != name.removesuffix(_SUFFIX).rpartition(".")[2]:
                    spoiled.append(
                        f"the state of step {step} is damaged: its checksum is not the one it was saved with"
                    )
                    continue
                try:
                    return _from_tensors(load_file(local)), spoiled
                except (SafetensorError, KeyError, ValueError) as error:
                    spoiled.append(f"the state of step {step} cannot be read: {error}")
        return None, spoiled

    def save_output(self, trial_id: str, output: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder, and keep that folder as one of `OUTPUTS`; one without files is not kept.

        Raises:
            OSError: it could not be written.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / output
            write(folder)
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()] if folder.exists() else []
            for file in files:
                self._upload(file, self._path(trial_id, f"{output}/{file.relative_to(folder).as_posix()}"))

    def fetch_output(self, trial_id: str, output: str, folder: Path) -> bool:
        """Copy one of `OUTPUTS` into `folder`; False where there is none."""
        source = self._path(trial_id, output)
        if not self._is_folder(source):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        fs.copy_files(
            source, str(folder), source_filesystem=self._filesystem, destination_filesystem=fs.LocalFileSystem()
        )
        return True

    def mark_ended(self, trial_id: str) -> None:
        """The trial's end is recorded: no worker needs to train it again in this run of the sweep."""
        self._filesystem.create_dir(self._path(_ENDED), recursive=True)
        with self._filesystem.open_output_stream(self._path(_ENDED, trial_id)) as stream:
            stream.write(b"")

    def reopen(self, trial_ids: Iterable[str]) -> None:
        """Trials whose ends no longer count."""
        for trial_id in set(trial_ids) & self.ended():
            self._filesystem.delete_file(self._path(_ENDED, trial_id))

    def ended(self) -> set[str]:
        """The trials that are marked."""
        selector = fs.FileSelector(self._path(_ENDED), allow_not_found=True)
        return {info.base_name for info in self._filesystem.get_file_info(selector)}

    def delete_states(self, trial_id: str) -> None:
        """Forget how far the trial had come, and its outputs; its mark stays."""
        for name in self._states(trial_id):
            self._filesystem.delete_file(self._path(trial_id, name))
        for output in OUTPUTS:
            if self._is_folder(self._path(trial_id, output)):
                self._filesystem.delete_dir(self._path(trial_id, output))

    def delete(self, trial_ids: Iterable[str]) -> None:
        """Forget trials, and with the last one the sweep."""
        gone = set(trial_ids)
        for trial_id in gone:
            if self._is_folder(self._path(trial_id)):
                self._filesystem.delete_dir(self._path(trial_id))
        self.reopen(gone)
        if self._is_folder(self._root):
            left = self._filesystem.get_file_info(fs.FileSelector(self._root, recursive=True))
            if all(info.type == fs.FileType.Directory for info in left):
                self._filesystem.delete_dir(self._root)

    def _states(self, trial_id: str) -> list[str]:
        """The file names of a trial's states, oldest first."""
        selector = fs.FileSelector(self._path(trial_id), allow_not_found=True)
        names = [info.base_name for info in self._filesystem.get_file_info(selector)]
        return sorted(name for name in names if name.endswith(_SUFFIX))

    def _is_folder(self, path: str) -> bool:
        return bool(self._filesystem.get_file_info(path).type == fs.FileType.Directory)

    def _upload(self, local: Path, target: str) -> None:
        self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        try:
            with local.open("rb") as source, self._filesystem.open_output_stream(target) as stream:
                while block := source.read(2**24):
                    stream.write(block)
        except OSError:
            if self._filesystem.get_file_info(target).type == fs.FileType.File:
                self._filesystem.delete_file(target)
            raise

    def _path(self, trial_id: str, name: str = "") -> str:
        return f"{self._root}/{trial_id}/{name}".rstrip("/")

    @property
    def _filesystem(self) -> Any:
        return self._location[0]

    @property
    def _root(self) -> str:
        return str(self._location[1]).rstrip("/")

    @cached_property
    def _location(self) -> tuple[Any, str]:
        if "://" in self.uri:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
            return filesystem, path
        return fs.LocalFileSystem(), self.uri

    def __getstate__(self) -> dict[str, str]:
        # A filesystem holds connections and locks: every process opens its own.
        return {"uri": self.uri}


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _to_tensors(saved: SavedTrial) -> dict[str, torch.Tensor]:
    progress = {
        "completed": saved.state.completed,
        "active": saved.state.active,
        "figures": dict(saved.figures),
        "seconds": dict(saved.seconds),
        "rankings": {str(rung): ids for rung, ids in saved.rankings.items()},
    }
    points: dict[str, list[tuple[float, float]]] = {}
    for record in saved.records:
        for key, value in record.items():
            if key != "step":
                points.setdefault(key, []).append((record["step"], value))
    tensors = {_TENSOR + name: tensor.contiguous() for name, tensor in saved.state.tensors.items()}
    tensors |= {_CURVE + key: torch.tensor(found, dtype=torch.float64) for key, found in points.items()}
    tensors[_PROGRESS] = torch.tensor(list(json.dumps(progress).encode()), dtype=torch.uint8)
    return tensors


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> SavedTrial:
    progress = json.loads(bytes(tensors[_PROGRESS].tolist()))
    records: dict[int, dict[str, float]] = {}
    for name, points in tensors.items():
        if name.startswith(_CURVE):
            for step, value in points.tolist():
                records.setdefault(int(step), {"step": int(step)})[name.removeprefix(_CURVE)] = value
    return SavedTrial(
        state=MemberState(
            completed=progress["completed"],
            active=progress["active"],
            tensors={
                name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items() if name.startswith(_TENSOR)
            },
        ),
        records=[records[step] for step in sorted(records)],
        figures=progress["figures"],
        seconds=progress["seconds"],
        rankings={int(rung): ids for rung, ids in progress["rankings"].items()},
    )
