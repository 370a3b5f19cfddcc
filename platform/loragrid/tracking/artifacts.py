"""Finds what a recorded trial left in MLflow and exports it to a folder, whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError

from loragrid.config.local_path import local_path, reason_of
from loragrid.tracking.exporters import EXPORTERS, FOLDER, Kind, Request, kind_of
from loragrid.tracking.recorded_base import BaseNotFoundError, FoundBase, RecordedBase, find_base
from loragrid.tracking.search import search_experiments
from loragrid.trials.tags import REASON_TAG, TRIAL_TAG

ADAPTER_ARTIFACT = "adapter"
PROVENANCE = "provenance.json"
"""The file of an export that says where it comes from."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported. what: in words. snippet: three lines of Python that load it.

    notices: what the reader must know, such as a base that is not the recorded one.
    """

    kind: Kind
    folder: Path
    what: str
    snippet: str
    notices: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def export_run(
    run_id: str,
    tracking_uri: str,
    folder: str | Path,
    *,
    merged: bool = False,
    force: bool = False,
    base: str | None = None,
) -> Export:
    """Write a trial's adapter into `folder` in PEFT's format, or with `merged` the base with the adapter merged in.

    The result of a method that trains the base is a whole model either way. Every folder is complete: config,
    generation config, tokenizer and chat template are the base's own. The base is compared with the trial's record
    before anything is written. `folder` appears when it is whole.

    run_id: the trial's MLflow run id, or its trial id; of several runs of one trial the latest is taken. base: the
    folder or hub id of the base, if it is no longer where the record says. force: export although the base differs
    from the recorded one; the export says so.

    Raises:
        ValueError: there is no such run, the run has nothing to export, the folder exists or cannot be written, or the
            base is missing or differs.
    """
    folder = _free_folder(folder)
    client = MlflowClient(tracking_uri=tracking_uri)
    run = _find_run(client, run_id, tracking_uri)
    kind = kind_of(_stored_names(client, run, run_id), merged=merged)
    request = _request(run, base, force=force)
    exporter = EXPORTERS[kind]
    notices = (*exporter.check(request), *_more_notices(request, kind, merged=merged))
    with _written_beside(folder) as unfinished:
        target = unfinished / "export"
        written = exporter.write(request, _download(client, run, unfinished / "stored"), target)
        snippet = written.snippet.replace(FOLDER, json.dumps(str(folder)))
        export = Export(kind=kind, folder=folder, what=written.what, snippet=snippet, notices=notices)
        _write_provenance(target, request, export)
        target.rename(folder)
    return export


def _free_folder(folder: str | Path) -> Path:
    path = local_path("--to", str(folder), to_be_written=True)
    if path.exists() or path.is_symlink():
        raise ValueError(f"--to {folder}: exists already; allowed: a folder that does not exist")
    return path


def _stored_names(client: MlflowClient, run: Run, run_id: str) -> list[str]:
    """The names of the files that the trial left.

    Raises:
        ValueError: it left none.
    """
    names = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, ADAPTER_ARTIFACT)]
    if not names:
        reason = run.data.tags.get(REASON_TAG, f"its method ({run.data.params.get('method.name')}) leaves none")
        raise ValueError(f"{run_id}: the run has no adapter: {reason}")
    return names


def _download(client: MlflowClient, run: Run, folder: Path) -> Path:
    folder.mkdir()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        return Path(client.download_artifacts(run.info.run_id, ADAPTER_ARTIFACT, str(folder)))
    except MlflowException as error:
        raise ValueError(f"{run.info.run_id}: MLflow cannot read the run's files: {reason_of(error)}") from error


def _request(run: Run, base: str | None, *, force: bool) -> Request:
    recorded = RecordedBase.of(run)
    found: FoundBase | None = None
    problem = ""
    try:
        found = find_base(recorded, base)
    except BaseNotFoundError as error:
        problem = str(error)
    return Request(
        trial_id=run.data.tags.get(TRIAL_TAG, run.info.run_id),
        run_id=run.info.run_id,
        method=run.data.params["method.name"],
        recorded=recorded,
        base=found,
        problem=problem,
        force=force,
    )


def _more_notices(request: Request, kind: Kind, *, merged: bool) -> tuple[str, ...]:
    """What all kinds of exports say: what could not be compared, and what differs without consequence."""
    found, record = [], request.recorded.record
    if kind == "full model" and merged:
        found.append("--merged changes nothing: the method trains the base itself and leaves a whole model")
    if not record.weights:
        found.append("the record of this trial does not identify its base, so the base was not compared")
    elif not record.files and record.commit is None and "==" not in record.location:
        found.append("the record of this trial does not identify its tokenizer, so the tokenizer was not compared")
    if request.base is not None:
        found += [f"differs: {difference.text}" for difference in request.base.differences if not difference.matters]
    return tuple(found)


def _write_provenance(target: Path, request: Request, export: Export) -> None:
    """Write where the export comes from, for programs and for people."""
    recorded = request.recorded
    content = {
        "kind": export.kind,
        "trial": request.trial_id,
        "run": request.run_id,
        "method": request.method,
        "base": {"name": recorded.model.name, "commit": recorded.record.commit, "dtype": recorded.model.dtype},
        "base_recorded": recorded.record.weights or None,
        "base_used": None if request.base is None else request.base.now.weights,
        "notices": list(export.notices),
    }
    (target / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    notices = "".join(f"\n> {notice}\n" for notice in export.notices)
    card = f"""# {request.trial_id}

{export.kind.capitalize()} ({export.what}) of {request.method} on {recorded.model.name}, exported by LoraGrid.
Base: {recorded.record.weights or "not recorded"}.
{notices}
```python
{export.snippet}
```
"""
    (target / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A folder on the file system of `folder`, deleted at the end; what is ready is renamed out of it.

    Raises:
        ValueError: the file system refuses to write: no permission, no space.
    """
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
        yield unfinished
    except (OSError, SafetensorError) as error:
        of_file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        what = f"could not be written: {reason_of(error)}{of_file}"
        raise ValueError(f"--to {folder}: {what}; nothing was left there") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _find_run(client: MlflowClient, run_id: str, tracking_uri: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException:
        pass
    experiments = [experiment.experiment_id for experiment in search_experiments(client)]
    # Trial ids consist of these characters; others could end the quotes in the search condition.
    trial_id = "".join(character for character in run_id if character.isalnum() or character in "-_.")
    runs = client.search_runs(
        experiments, f"tags.`{TRIAL_TAG}` = '{trial_id}'", order_by=["attributes.start_time DESC"]
    )
    if not runs:
        raise ValueError(
            f"{run_id}: no such run or trial in {tracking_uri}; `loragrid compare NAME --csv` lists both ids"
        )
    return runs[0]
