"""Writes a finished trial's output as a folder that other libraries load, one exporter per kind of folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from loragrid.formatting import count_of
from loragrid.models.base_files import CHAT_TEMPLATE, copy_companions, read_json, set_chat_template
from loragrid.models.loading import model_folder
from loragrid.tracking.recorded_base import FORCE, FoundBase, RecordedBase, refusal
from loragrid.worker.export import ADAPTER_CONFIG, complete_model_folder, export_merged, num_adapted_layers
from loragrid_methods import get_method

Kind = Literal["adapter", "merged model", "full model"]


@dataclass(frozen=True, kw_only=True)
class TrialOutput:
    """What a finished trial has left in MLflow: the files in `folder`, and the record of its base."""

    trial_id: str
    run_id: str
    method: str
    folder: Path
    recorded: RecordedBase

    @property
    def is_adapter(self) -> bool:
        """Whether the files are an adapter; otherwise they are a whole model."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def chat_template(self) -> str | None:
        """The template that the trial was trained with, if it is not the tokenizer's own."""
        path = self.folder / CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an exporter gets: the output, and the base if it was found. problem: why it was not. force: `--force`."""

    output: TrialOutput
    base: FoundBase | None
    problem: str
    force: bool

    @property
    def base_source(self) -> str:
        """The folder or hub id from which transformers loads the base."""
        if self.base is None:
            return self.output.recorded.record.location or self.output.recorded.model.name
        if self.base.now.commit is not None:
            return self.base.model.name
        return str(model_folder(self.base.model))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an exporter wrote. what: in words. notices: what a reader must know about it. snippet: Python that loads
    it, with `{folder}` for the folder."""

    what: str
    snippet: str
    notices: tuple[str, ...] = ()


def export_adapter(request: Request, folder: Path) -> Written:
    """The adapter in PEFT's format, with the tokenizer; its config names the base and, on the hub, the commit.

    An adapter can be written without its base. If the base is not there or has changed, this is said, and a tokenizer
    that is not the trial's is left out.
    """
    output, base = request.output, request.base
    recorded, model = output.recorded.record, output.recorded.model
    config = read_json(output.folder / ADAPTER_CONFIG)
    config |= {"base_model_name_or_path": request.base_source, "revision": recorded.commit}
    template = output.chat_template
    what = f"{config['peft_type']} on {count_of(num_adapted_layers(output.folder), 'layer')}"
    _move_files(output.folder, folder)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    notices = []
    has_tokenizer = base is not None and not base.tokenizer_differences
    if base is not None and has_tokenizer:
        copy_companions(model_folder(base.model), folder, tokenizer_only=True)
        if template is not None:
            set_chat_template(folder, template)
    if base is None:
        notices.append(f"without a tokenizer: {request.problem}")
    elif base.that_matter:
        changed = "; ".join(difference.text for difference in base.that_matter)
        without = "" if has_tokenizer else "; its tokenizer is left out"
        notices.append(
            f"the base in {base.now.location} is not the one that the adapter was trained on; these differ: {changed}"
            f"{without}; the adapter computes what the trial computed on the recorded base only"
        )
    arguments = [f'"{request.base_source}"']
    if recorded.commit is not None:
        arguments.append(f'revision="{recorded.commit}"')
    arguments.append(f'dtype="{model.dtype}"')
    code = ", trust_remote_code=True" if model.trust_remote_code else ""
    tokenizer = '"{folder}"' if has_tokenizer else f'"{request.base_source}"'
    snippet = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)}{code})\n"
        'model = PeftModel.from_pretrained(base, "{folder}")'
        f"; tokenizer = AutoTokenizer.from_pretrained({tokenizer}{code})"
    )
    return Written(what=what, snippet=snippet, notices=tuple(notices))


def export_merged_model(request: Request, folder: Path) -> Written:
    """The base with the adapter merged in, as a model folder of its own.

    Raises:
        ValueError: the base is not there, or is not the recorded one and nothing forces the export.
    """
    output, base = request.output, request.base
    if base is None:
        raise ValueError(f"{output.trial_id}: a merged model needs the base: {request.problem}")
    notices = []
    if base.that_matter:
        if not request.force:
            raise ValueError(refusal(output.recorded, base, output.trial_id))
        changed = "; ".join(difference.text for difference in base.that_matter)
        notices.append(f"merged into another base than the trial was trained on (--force); these differ: {changed}")
    export_merged(base.model, output.folder, get_method(output.method), folder, chat_template=output.chat_template)
    dtype = output.recorded.model.dtype
    return Written(what=f"weights in {dtype}", snippet=_whole_model(output), notices=tuple(notices))


def export_full_model(request: Request, folder: Path) -> Written:
    """The whole model that a method has trained. Only tokenizer and generation config come from the base.

    Raises:
        ValueError: the base's tokenizer is not there, or is not the recorded one, and nothing forces the export.
    """
    output, base = request.output, request.base
    notices = []
    if base is None:
        if not request.force:
            what = "a full model needs the base's tokenizer"
            raise ValueError(f"{output.trial_id}: {what}: {request.problem}, or {FORCE}")
        notices.append(f"without a tokenizer (--force): {request.problem}")
    elif base.tokenizer_differences:
        if not request.force:
            raise ValueError(refusal(output.recorded, base, output.trial_id))
        changed = "; ".join(difference.text for difference in base.tokenizer_differences)
        notices.append(f"with another tokenizer than the trial was trained with (--force); these differ: {changed}")
    config = output.recorded.record.config
    source = None if base is None else model_folder(base.model)
    if not config and base is not None and not base.that_matter:
        config = base.now.config or read_json(model_folder(base.model) / "config.json")
    template = output.chat_template
    _move_files(output.folder, folder)
    complete_model_folder(folder, source, config or None, template)
    dtype = output.recorded.model.dtype
    return Written(what=f"weights in {dtype}", snippet=_whole_model(output), notices=tuple(notices))


EXPORTERS: Mapping[Kind, Callable[[Request, Path], Written]] = MappingProxyType(
    {"adapter": export_adapter, "merged model": export_merged_model, "full model": export_full_model}
)


def kind_of(output: TrialOutput, *, merged: bool) -> Kind:
    """The kind of folder to write: an output that is a whole model stays one."""
    if not output.is_adapter:
        return "full model"
    return "merged model" if merged else "adapter"


def _whole_model(output: TrialOutput) -> str:
    code = ", trust_remote_code=True" if output.recorded.model.trust_remote_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{{folder}}", dtype="auto"{code})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{{folder}}"{code})'
    )


def _move_files(source: Path, target: Path) -> None:
    """Move files within one file system, because a whole model is large."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        path.rename(target / path.name)
