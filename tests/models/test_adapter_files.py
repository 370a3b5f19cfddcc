"""A base with an adapter beside it, and an adapter alone, are refused, whether PEFT is installed or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loragrid.config.experiment import ModelConfig
from loragrid.models.adapter_files import ADAPTER_CONFIG, check_hub_repository
from loragrid.models.hub import HubCommit
from loragrid.models.loading import load_base, load_meta_model, load_tokenizer, max_context, model_digest

LOADERS = [load_base, load_meta_model, load_tokenizer, max_context, model_digest]


def write_adapter(folder: Path, **config: Any) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4} | config))
    (folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.fixture
def copied_llama(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture(params=[True, False], ids=["with PEFT", "without PEFT"])
def _peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks these two names whether PEFT is installed."""
    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: request.param)


@pytest.mark.usefixtures("_peft")
@pytest.mark.parametrize("load", LOADERS)
def test_a_base_with_an_adapter_beside_it_is_refused(copied_llama: Path, load: Any) -> None:
    write_adapter(copied_llama, base_model_name_or_path="some/base")
    with pytest.raises(
        ValueError, match=r"model\.name: .*holds a base .*and an adapter .*trained on some/base.*copy without"
    ):
        load(ModelConfig(name=str(copied_llama), dtype="float32"))


@pytest.mark.usefixtures("_peft")
@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_alone_is_refused_with_its_base_in_the_remedy(tmp_path: Path, load: Any) -> None:
    write_adapter(tmp_path, base_model_name_or_path="some/base")
    with pytest.raises(
        ValueError, match=r"holds only an adapter .*not a base; .*name its base \(model\.name: some/base"
    ):
        load(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_base_is_refused_too(tmp_path: Path, content: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(
        ValueError,
        match=r"holds only an adapter \(adapter_config\.json\), not a base; to train on its base, name its base;",
    ):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


def test_an_adapter_in_a_folder_below_is_nobodys_business(copied_llama: Path) -> None:
    (copied_llama / "adapter").mkdir()
    write_adapter(copied_llama / "adapter", base_model_name_or_path="some/base")
    base = load_base(ModelConfig(name=str(copied_llama), dtype="float32"))
    assert not [name for name, _ in base.named_modules() if "lora" in name]


def test_weights_of_an_adapter_are_no_weights_of_a_base(copied_llama: Path) -> None:
    from loragrid.models.loading import check_weights

    (copied_llama / "model.safetensors").rename(copied_llama / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*\.index\.json, only adapter_model"):
        check_weights(ModelConfig(name=str(copied_llama)))


def test_repositories_with_adapters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, base_model_name_or_path="some/base")
    asked = []

    def fetch(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        if revision is None:
            raise OSError("no network")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)

    def commit(*files: str, downloaded: Path | None = None) -> HubCommit:
        return HubCommit(commit="0" * 40, downloaded=downloaded, files=frozenset(files))

    check_hub_repository("a/b", commit("config.json", "model.safetensors", "sub/adapter_config.json"), None)
    check_hub_repository("a/b", commit(), None)
    with pytest.raises(ValueError, match=r"a/b: this repository holds only an adapter .*model\.name: some/base"):
        check_hub_repository("a/b", commit(ADAPTER_CONFIG), "v1")
    with pytest.raises(ValueError, match=r"a/b: this repository holds a base .*adapter_config\.json\), and it is open"):
        check_hub_repository("a/b", commit(ADAPTER_CONFIG, "config.json"), None)
    assert asked == [("a/b", ADAPTER_CONFIG, "v1"), ("a/b", ADAPTER_CONFIG, None)]
    with pytest.raises(ValueError, match="a/b: this folder holds only an adapter"):
        check_hub_repository("a/b", commit(downloaded=tmp_path), None)
