"""Locates an experiment's files: states of half-trained trials, and the record on its way to MLflow."""

import contextlib
import hashlib
import tempfile
from pathlib import Path

import ray
from pyarrow import fs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loragrid.config.experiment import Experiment
from loragrid.config.local_path import local_path, reason_of, refuse_unexpanded
from loragrid.models.cache import cache_folder
from loragrid.tracking.spool import SPOOL_FOLDER
from loragrid.worker.checkpoints import TrialStore

NODE_ANSWERS_SECONDS = 60.0


def storage_uri(experiment: Experiment) -> str:
    """The URI or absolute folder of `storage.path`; absolute, because Ray's processes have other working folders.

    Raises:
        ValueError: it is neither a folder of this machine nor a URI that pyarrow knows.
    """
    path = experiment.storage.path
    if "://" not in path:
        return str(local_path("storage.path", path, to_be_written=True).resolve())
    refuse_unexpanded("storage.path", path)
    try:
        fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise ValueError(
            f"storage.path: {path}: {reason_of(error)}; allowed: a folder, or a URI such as s3://bucket/path, "
            "gs://bucket/path, hdfs://..., file:///path"
        ) from error
    if "#" in path:
        raise ValueError(f"storage.path: {path}: '#' starts a fragment, which a path cannot have; allowed: %23")
    return path.rstrip("/")


def below(uri: str, *parts: str) -> str:
    """A folder below a storage URI; options stay at its end, as in `s3://bucket/path?endpoint_override=host:9000`."""
    folder, question_mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([folder.rstrip("/"), *parts]) + question_mark + options


def local_folder(experiment: Experiment) -> Path:
    """The folder for files that only this machine needs: the storage folder, or for a URI one in LoraGrid's cache."""
    uri = storage_uri(experiment)
    if "://" in uri:
        return cache_folder() / "storage" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(uri)


def trial_store(experiment: Experiment, sweep: str) -> TrialStore:
    """The store of the states of a sweep's half-trained trials."""
    return TrialStore(below(storage_uri(experiment), "trials", sweep))


def spool_folder(experiment: Experiment) -> Path:
    """The folder in which the record waits for MLflow."""
    return local_folder(experiment) / SPOOL_FOLDER


def check_storage(experiment: Experiment) -> None:
    """Check that the storage can be written.

    Raises:
        ValueError: it cannot.
    """
    uri = storage_uri(experiment)
    try:
        if "://" in uri:
            filesystem, path = fs.FileSystem.from_uri(uri)
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/.loragrid-probe"):
                pass
            filesystem.delete_file(f"{path}/.loragrid-probe")
        folder = local_folder(experiment)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"storage.path: {uri}: cannot be written: {reason_of(error)}") from error


def check_nodes_share(experiment: Experiment) -> None:
    """Check that all machines of the cluster see the storage, because a trial may continue on any of them.

    Raises:
        ValueError: a machine does not see it.
    """
    uri = storage_uri(experiment)
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in alive if node["NodeID"] != own}
    if ("://" in uri and not uri.startswith("file:")) or not others:
        return
    folder = fs.FileSystem.from_uri(uri)[1] if "://" in uri else uri

    def sees(path: str) -> bool:  # a local function, which Ray sends by value: the node may lack LoraGrid
        import os.path

        return os.path.exists(path)

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".loragrid-probe-") as probe:
        for node_id, address in others.items():
            task = ray.remote(sees).options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            )
            answer = False
            with contextlib.suppress(ray.exceptions.RayError):  # a node that is just leaving does not see it either
                answer = ray.get(task.remote(probe.name), timeout=NODE_ANSWERS_SECONDS)
            if not answer:
                raise ValueError(
                    f"storage.path: {uri}: the cluster's node {address} does not see what this machine writes there: "
                    "no trial could continue on another node; allowed: a folder that all nodes share, or a URI such as "
                    "s3://bucket/path"
                )
