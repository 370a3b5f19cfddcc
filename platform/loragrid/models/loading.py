"""Turns a model's name (an embedded name, a local folder or a hub id) into a tokenizer and a frozen base."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import ModelConfig
from loragrid.config.local_path import local_path, reason_of
from loragrid.formatting import count_of
from loragrid.models.adapter_files import check_hub_repository, check_no_adapter
from loragrid.models.architecture import check_architecture
from loragrid.models.base_ends import BASE_ENDS, base_ends
from loragrid.models.base_files import SMALL_FILES
from loragrid.models.embedded import EMBEDDED_MODELS, converted_folder, source_sha256
from loragrid.models.file_hash import remembered_sha256
from loragrid.models.hub import NotOnHubError, resolve_commit
from loragrid.models.quiet import quiet_transformers
from loragrid.models.unused_weights import check_unused
from loragrid.models.versions import version_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""The keys of a config that limit the tokens of a row, the customary one first (MPT has `max_seq_len`)."""
LONGEST_CONTEXT = 10**9
"""A larger limit is none: configs say so with numbers such as 10^30."""
MAX_JSON_BYTES = 256 * 2**20
"""The largest tokenizers have 40 MiB; a much larger file is something else and would fill the memory."""


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """Load the model's tokenizer, with the base's end tokens as an attribute (see `base_ends`).

    If it has no pad token, it pads with the end token (no loss includes padding).
    """
    source = _locate(model)
    from transformers import AutoTokenizer

    with quiet_transformers(), _named_failure(model, "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source.arguments(model))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model.name: {model.name}: its tokenizer has neither a pad token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    with quiet_transformers():
        setattr(tokenizer, BASE_ENDS, base_ends(source.location, source.revision))
    return tokenizer


def load_base(model: ModelConfig) -> "PreTrainedModel":
    """Load the frozen base on the CPU in the configured dtype: no gradients, dropout off, no key-value cache.

    The embedded model is a de-quantised 4-bit GGUF: real pretrained weights, but not bit-equal to the checkpoint on
    the hub. It is converted once (about 20 s) and kept in float32, which holds the de-quantised values exactly.

    Raises:
        ValueError: the name is unknown, the folder is unreadable, the weights are pickled, incomplete or quantised, or
            some that the architecture does not use show that it is another model (`check_unused`).
    """
    # Before the slow imports, to report a wrong name at once.
    source = _locate(model)
    _load_config(model, source)
    with quiet_transformers(), _named_failure(model, "its weights cannot be loaded"):
        base, report = _with_report(model, source)
    if base._hf_peft_config_loaded:  # found in a place that was not looked at, such as a hub that lists no files
        raise ValueError(f"model.name: {model.name}: transformers has loaded an adapter into it; name a plain base")
    check_unused(model.name, base, report["unexpected_keys"], partial(_tensor, model))
    # transformers fills missing weights with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model.name: {model.name}: the checkpoint lacks {count_of(len(missing), 'weight')}, among them "
            f"{missing[0]}"
        )
    return _freeze(base)


def unused_weights(model: ModelConfig, *, is_fetched: bool = False) -> list[str]:
    """The weights of a checkpoint that its architecture does not use, see `check_unused`; reads only files' headers.

    is_fetched: whether `load_base` has fetched the files of a hub model; without them, nothing is known.

    Raises:
        ValueError: as `check_unused`.
    """
    source = _locate(model)
    if not is_fetched and not Path(source.location).is_dir():
        return []
    try:
        with quiet_transformers():
            base, report = _with_report(model, source, device_map="meta")
    except Exception:  # some models' own code cannot be loaded without data; `load_base` checks them
        return []
    return check_unused(model.name, base, report["unexpected_keys"], partial(_tensor, model))


def _with_report(model: ModelConfig, source: "_Source", **arguments: Any) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The base, and what transformers says about names that the base or the checkpoint lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    base, report = loader.from_pretrained(
        **source.arguments(model),
        dtype=getattr(torch, model.dtype),
        use_safetensors=True,  # never a pickle, which can run code
        **_adapter_arguments(source.revision),
        output_loading_info=True,
        **arguments,
    )
    return base, report


def _adapter_arguments(revision: str | None) -> dict[str, Any]:
    """Arguments that keep transformers 5.17 from looking for adapters on the main branch; later ones use `revision`."""
    if revision is None or version_of("transformers") >= (5, 18):
        return {}
    return {"adapter_kwargs": {"revision": revision}}


def check_weights(model: ModelConfig) -> None:
    """Refuse a folder whose weights no worker could load; it only reads the headers of the files.

    Raises:
        ValueError: there are no safetensors files (pickles are never read), or one of them is missing or broken.
    """
    folder = Path(_locate(model).location)
    if not folder.is_dir():
        return  # on the hub: the loader checks what it fetches
    from safetensors import safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present:
        raise ValueError(
            f"model.name: {model.name}: its weights cannot be loaded: there is no .safetensors file, and weights in "
            "other formats (pickles, which can run code) are never read; save_pretrained writes one"
        )
    wanted = {single.name} & present
    if not wanted and index.is_file():
        with _named_failure(model, f"its weights cannot be loaded: {index.name}"):
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    # Compared with the names in the folder, because an index could point anywhere.
    if not wanted:
        raise ValueError(
            f"model.name: {model.name}: its weights cannot be loaded: it has neither {single.name} nor {index.name}, "
            f"only {min(present)}"
        )
    if absent := sorted(wanted - present):
        raise ValueError(f"model.name: {model.name}: its weights cannot be loaded: it holds no file {absent[0]!r}")
    for name in sorted(wanted):
        with _named_failure(model, f"its weights cannot be loaded: {name}"), safe_open(folder / name, framework="pt"):
            pass


def stored_weights(model: ModelConfig) -> Iterator[tuple[str, "Tensor"]]:
    """Each tensor of the model's files with its name, read one by one; none of a model that is only on the hub."""
    folder = Path(_locate(model).location)
    if not folder.is_dir():
        return
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with _named_failure(model, f"its weights cannot be loaded: {path.name}"), safe_open(path, "pt") as file:
            names, read = list(file.keys()), file.get_tensor
            for name in names:
                yield name, read(name)


def _tensor(model: ModelConfig, name: str) -> "Tensor | None":
    """A tensor of a model's files; None if they hold none of this name, or are only on the hub."""
    folder = Path(_locate(model).location)
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118  # it is no mapping
                tensor: Tensor = file.get_tensor(name)
                return tensor
    return None


def load_config(model: ModelConfig) -> "PretrainedConfig":
    """The model's config.

    Raises:
        ValueError: it cannot be read, or describes a quantised checkpoint or something else than a causal model.
    """
    return _load_config(model, _locate(model))


def load_meta_model(model: ModelConfig) -> "PreTrainedModel":
    """Build the base from its config on the meta device: every shape, no weights."""
    config = _load_config(model, _locate(model))
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), _named_failure(model, "its config describes no text model"), torch.device("meta"):
        loader: Any = AutoModelForCausalLM
        base = loader.from_config(config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code)
    return _freeze(base)


def model_digest(model: ModelConfig) -> str:
    """The identity of the weights: `sha256:...` of an embedded or local model's files, `id@commit` of a hub model."""
    source = _locate(model)
    if source.digest is not None:
        return source.digest
    digest = hashlib.sha256()
    for path in sorted(Path(source.location).iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            digest.update(f"{path.name}:{remembered_sha256(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_folder(model: ModelConfig) -> Path:
    """The folder with the model's config, tokenizer and other small files; those of a hub model are fetched first.

    Raises:
        ValueError: the model is not found, or its files cannot be fetched.
    """
    source = _locate(model)
    folder = Path(source.location)
    if source.digest is None or folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    commit = source.digest.rpartition("@")[2]
    with _named_failure(model, "its files cannot be fetched"):
        return Path(snapshot_download(source.location, revision=commit, allow_patterns=list(SMALL_FILES)))


def max_context(model: ModelConfig) -> int | None:
    """The most tokens that the model processes at once; None if its config sets no limit."""
    config = _load_config(model, _locate(model)).get_text_config()
    for key in CONTEXT_KEYS:
        limit = getattr(config, key, None)
        # XLNet says -1 for "no limit", and others 0 or a number that no row can reach.
        if isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < LONGEST_CONTEXT:
            return int(limit)
    return None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The location of a model's files (a folder, or a hub id and its revision), and their digest if it is known."""

    location: str
    revision: str | None = None
    digest: str | None = None

    def arguments(self, model: ModelConfig) -> dict[str, Any]:
        """The arguments of every `from_pretrained`."""
        arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": self.location,
            "trust_remote_code": model.trust_remote_code,
        }
        if self.revision is not None:
            arguments["revision"] = self.revision
        return arguments


def _locate(model: ModelConfig) -> _Source:
    embedded = EMBEDDED_MODELS.get(model.name)
    folder = local_path("model.name", model.name)
    if (embedded is not None or folder.is_dir()) and model.revision is not None:
        raise ValueError(
            f"model.revision: {model.revision}: {model.name} is not on the hub; only hub models have revisions"
        )
    if embedded is not None:
        converted = converted_folder(model.name, embedded)
        return _Source(location=str(converted), digest=f"sha256:{source_sha256(converted)}")
    if folder.is_dir():
        check_no_adapter(model.name, folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.name: {model.name}: this folder holds no config.json, so it is not a saved model")
        for file in folder.glob("*.json"):
            if (size := file.stat().st_size) > MAX_JSON_BYTES:
                what = f"{file.name} has {size / 2**20:,.0f} MiB; allowed: at most {MAX_JSON_BYTES // 2**20}"
                raise ValueError(f"model.name: {model.name}: {what}")
        return _Source(location=str(folder.resolve()))
    try:
        found = resolve_commit(model.name, model.revision, "model")
    except NotOnHubError as error:
        raise ValueError(
            f"model.name: {model.name}: unknown model: not an embedded name ({', '.join(EMBEDDED_MODELS)}), "
            f"not a local folder ({folder.absolute()}), and on the hub: {error}"
        ) from error
    digest = f"{model.name}@{found.commit}"
    check_hub_repository(model.name, found, model.revision)
    if found.downloaded is not None:
        # Loading from the folder keeps the loaders from asking the unreachable hub for every optional file.
        return _Source(location=str(found.downloaded), digest=digest)
    # The revision, not its commit: the hub's cache knows the commit of a revision, even without a network.
    return _Source(location=model.name, revision=model.revision, digest=digest)


def _load_config(model: ModelConfig, source: _Source) -> "PretrainedConfig":
    from transformers import AutoConfig

    with quiet_transformers(), _named_failure(model, "its config cannot be loaded"):
        config: PretrainedConfig = AutoConfig.from_pretrained(**source.arguments(model))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model.name: {model.name}: the checkpoint is quantised; only plain weights are read")
    check_architecture(model.name, config, trust_remote_code=model.trust_remote_code)
    return config


def _freeze(base: "PreTrainedModel") -> "PreTrainedModel":
    base.requires_grad_(False).train(False)
    base.config.use_cache = False
    return base


@contextmanager
def _named_failure(model: ModelConfig, what: str) -> Iterator[None]:
    """Name the model in the message, because the loaders' own errors only mention files and classes."""
    try:
        yield
    except Exception as error:  # a config with wrong types can fail anywhere in a loader
        raise ValueError(f"model.name: {model.name}: {what}: {reason_of(error)}") from error
