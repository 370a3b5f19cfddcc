"""What a worker says of itself and of its inputs, as MLflow tags: on a cluster the driver's machine is another."""

import platform
from functools import lru_cache
from pathlib import Path

import torch

from loragrid.data.dataset import TokenizedData
from loragrid.models.loading import model_digest
from loragrid.trials.tags import DEVICE_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.environment import environment_tags


class WorkerEnvironment:
    """Gives the tags of a trial that this worker trains; what never changes is found out once."""

    def __init__(self, device: torch.device, num_workers: int, *, shard: bool = False) -> None:
        workers = {"loragrid.workers": f"{num_workers} × {'a share of the base' if shard else 'the whole base'}"}
        self._own = {**environment_tags(), **arithmetic_tags(device), **workers}

    def __call__(self, trial: Trial, data: TokenizedData) -> dict[str, str]:
        """Of the worker, the trial's base and its rows; the first time, a base's files are read as a whole."""
        return {
            **self._own,
            **input_tags(model_digest(trial.model), data.digest),
            "loragrid.model.dtype": trial.model.dtype,
        }


def input_tags(weights: str, rows: str) -> dict[str, str]:
    """What identifies a base (`model_digest`) and the rows; a commit on the hub is of files that it names by hash."""
    revision = {} if weights.startswith("sha256:") else {"loragrid.model.revision": weights.rpartition("@")[2]}
    return {"loragrid.model.weights": weights, "loragrid.data.digest": rows, **revision}


def arithmetic_tags(device: torch.device) -> dict[str, str]:
    """What does the arithmetic, and the switches that decide how exactly."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tags = {
        DEVICE_TAG: cpu_name(),
        "loragrid.precision.float32_matmul": torch.get_float32_matmul_precision(),
        "loragrid.deterministic": str(torch.are_deterministic_algorithms_enabled()).lower(),
        "loragrid.threads": str(torch.get_num_threads()),
    }
    if device.type != "cuda":
        return tags
    major, minor = torch.cuda.get_device_capability(device)
    return tags | {
        DEVICE_TAG: torch.cuda.get_device_name(device),
        "loragrid.gpu.capability": f"{major}.{minor}",
        "loragrid.version.cuda": str(torch.version.cuda),
        "loragrid.precision.tf32": f"matmul {_on(matmul.allow_tf32)}, cudnn {_on(cudnn.allow_tf32)}",
        "loragrid.precision.reduced_bfloat16_sums": _on(matmul.allow_bf16_reduced_precision_reduction),
    }


def cpu_name() -> str:
    """The processor, with the instructions that torch uses of it."""
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's model name; where the system does not say, its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _on(switch: bool) -> str:
    return "on" if switch else "off"
