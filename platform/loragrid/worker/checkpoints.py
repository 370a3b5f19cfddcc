"""Trials that have not ended, and adapters of finished ones, on storage that every node reaches."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loragrid.worker.saved_trial import SavedTrial, from_tensors, to_tensors
from loragrid.worker.storage import Storage

NUM_KEPT = 2
"""States kept per trial: the latest, and the one before it in case the latest cannot be read."""

OUTPUTS = ("adapter", "scores", "samples")
"""The folders that a finished trial leaves; they have the same names in MLflow."""

_ENDED, _DIVERGED, _SUFFIX = ".ended", ".diverged", ".safetensors"


@dataclass(frozen=True)
class TrialStore:
    """One sweep's trials under `uri`, a path or any URI that pyarrow knows (`s3://bucket/path`, `gs://...`).

    Workers write states and adapters; the sweep's driver marks a trial as ended once it has recorded its end. A state's
    file name contains the digest of its content, which reveals a truncated or damaged file. Reading a state cannot run
    code.
    """

    uri: str

    def save(self, trial_id: str, saved: SavedTrial) -> None:
        """Write a state beside the one before it, and delete older ones.

        Raises:
            OSError: it cannot be written; the one before it is untouched.
        """
        with tempfile.TemporaryDirectory() as name:
            local = Path(name) / "state"
            try:
                save_file(to_tensors(saved), local)
            except SafetensorError as error:
                raise OSError(f"the state could not be written: {error}") from error
            before = self._states(trial_id)
            # A state may be saved twice at one step: the number in front orders them.
            number = int(before[-1].partition(".")[0]) + 1 if before else 0
            target = f"{number:09d}.step-{saved.state.completed}.{_digest(local)}{_SUFFIX}"
            self._storage.upload(local, f"{trial_id}/{target}")
        for old in [*before, target][:-NUM_KEPT]:
            self._storage.delete_file(f"{trial_id}/{old}")

    def load(self, trial_id: str) -> tuple[SavedTrial | None, list[str]]:
        """The latest readable state (None if there is none), and the problems of later, unreadable ones."""
        spoiled: list[str] = []
        for name in reversed(self._states(trial_id)):
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / "state"
                try:
                    self._storage.download(f"{trial_id}/{name}", local)
                except FileNotFoundError:  # the trial has just ended, and the driver deleted its states
                    continue
                step = name.split(".")[1].removeprefix("step-")
                if _digest(local) != name.removesuffix(_SUFFIX).rpartition(".")[2]:
                    spoiled.append(
                        f"the state of step {step} is damaged: its checksum is not the one it was saved with"
                    )
                    continue
                try:
                    return from_tensors(load_file(local)), spoiled
                except (SafetensorError, KeyError, ValueError) as error:
                    spoiled.append(f"the state of step {step} cannot be read: {error}")
        return None, spoiled

    def save_output(self, trial_id: str, output: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder, and keep its files as one of `OUTPUTS`; a folder without files is not kept.

        Raises:
            OSError: it cannot be written.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / output
            try:
                write(folder)
            except SafetensorError as error:  # of a full disk, among others
                raise OSError(f"the {output} could not be written: {error}") from error
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()] if folder.exists() else []
            for file in files:
                self._storage.upload(file, f"{trial_id}/{output}/{file.relative_to(folder).as_posix()}")

    def fetch_output(self, trial_id: str, output: str, folder: Path) -> bool:
        """Copy one of `OUTPUTS` into `folder`; return False if there is none."""
        source = f"{trial_id}/{output}"
        if not self._storage.is_folder(source):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        self._storage.download(source, folder)
        return True

    def mark_ended(self, trial_id: str) -> None:
        """Note that the trial's end is recorded: no worker trains it again in this run of the sweep."""
        self._storage.touch(f"{_ENDED}/{trial_id}")

    def reopen(self, trial_ids: Iterable[str]) -> None:
        """Remove the marks of trials that are to be trained again."""
        for trial_id in set(trial_ids) & self.ended():
            self._storage.delete_file(f"{_ENDED}/{trial_id}")

    def ended(self) -> set[str]:
        """The trials that are marked as ended."""
        return set(self._storage.names(_ENDED))

    def mark_diverged(self, setting_id: str, trial_id: str) -> None:
        """Note that a trial has diverged: its setting is last at the rungs that its other seeds still reach."""
        self._storage.touch(f"{_DIVERGED}/{setting_id}.{trial_id}")

    def diverged_settings(self) -> set[str]:
        """The ids of the settings of which a trial is marked as diverged."""
        return {name.partition(".")[0] for name in self._storage.names(_DIVERGED)}

    def delete_states(self, trial_id: str) -> None:
        """Delete the trial's states and outputs; its mark stays."""
        for name in self._states(trial_id):
            self._storage.delete_file(f"{trial_id}/{name}")
        for output in OUTPUTS:
            if self._storage.is_folder(f"{trial_id}/{output}"):
                self._storage.delete_folder(f"{trial_id}/{output}")

    def delete(self, trial_ids: Iterable[str]) -> None:
        """Delete everything of these trials, and the store's folder once it is empty."""
        gone = set(trial_ids)
        for trial_id in gone:
            if self._storage.is_folder(trial_id):
                self._storage.delete_folder(trial_id)
        self.reopen(gone)
        for name in self._storage.names(_DIVERGED):
            if name.partition(".")[2] in gone:
                self._storage.delete_file(f"{_DIVERGED}/{name}")
        if self._storage.is_folder() and not self._storage.has_files():
            self._storage.delete_folder()

    def _states(self, trial_id: str) -> list[str]:
        """The file names of a trial's states, oldest first."""
        return sorted(name for name in self._storage.names(trial_id) if name.endswith(_SUFFIX))

    @cached_property
    def _storage(self) -> Storage:
        return Storage(self.uri)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
