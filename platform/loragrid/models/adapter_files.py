"""Refuses a base whose folder or repository holds an adapter: transformers would load it if PEFT is installed."""

import json
from pathlib import Path

from loragrid.models.hub import HubCommit

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
"""The file by which transformers finds an adapter. It looks in the folder of the model only."""


def check_no_adapter(name: str, folder: Path) -> None:
    """Refuse a folder that holds an adapter beside a base, or only an adapter; `name`: the value of model.name.

    Raises:
        ValueError: it holds one. transformers adds the adapter to the base if PEFT is installed, and else does not.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(_refusal(name, "folder", _trained_on(folder / ADAPTER_CONFIG), (folder / CONFIG).is_file()))


def check_hub_repository(name: str, found: HubCommit, revision: str | None) -> None:
    """As `check_no_adapter`, for a repository on the hub, before anything but its adapter's config is fetched."""
    if found.downloaded is not None:
        check_no_adapter(name, found.downloaded)
    elif ADAPTER_CONFIG in found.files:
        from huggingface_hub import hf_hub_download

        try:
            trained_on = _trained_on(Path(hf_hub_download(name, ADAPTER_CONFIG, revision=revision)))
        except Exception:  # the HTTP library's own errors; the refusal does not need the file
            trained_on = None
        raise ValueError(_refusal(name, "repository", trained_on, CONFIG in found.files))


def _trained_on(path: Path) -> str | None:
    """The base that an adapter's config names, if it can be read."""
    try:
        trained_on = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(trained_on) if trained_on else None


def _refusal(name: str, place: str, trained_on: str | None, has_base: bool) -> str:
    of = "" if trained_on is None else f", trained on {trained_on}"
    if has_base:
        return (
            f"model.name: {name}: this {place} holds a base ({CONFIG}) and an adapter ({ADAPTER_CONFIG}{of}), and it "
            "is open which of the two is meant; to train on the base alone, use a copy without the adapter's files; to "
            "train on both, merge the adapter first (PEFT: merge_and_unload) and save the result to another folder"
        )
    base = "its base" if trained_on is None else f"its base (model.name: {trained_on})"
    return (
        f"model.name: {name}: this {place} holds only an adapter ({ADAPTER_CONFIG}{of}), not a base; to train on its "
        f"base, name {base}; to train on both, merge the adapter first (PEFT: merge_and_unload) and save the result"
    )
