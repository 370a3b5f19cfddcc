"""Writes a finished trial's output as a folder that other libraries load, one exporter per kind of folder.

An exporter first checks whether the base is the one that the trial was trained on, as far as its kind depends on that,
and then writes. `EXPORTERS` lists them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

from loragrid.formatting import count_of
from loragrid.models.base_files import CHAT_TEMPLATE, CONFIG, copy_companions, read_json, set_chat_template
from loragrid.models.base_record import BaseDifference
from loragrid.models.loading import model_folder
from loragrid.tracking.recorded_base import FORCE, FoundBase, RecordedBase, refusal
from loragrid.worker.export import ADAPTER_CONFIG, complete_model_folder, export_merged, num_adapted_layers
from loragrid_methods import get_method

FOLDER = "{folder}"
Kind = Literal["adapter", "merged model", "full model"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be exported: a trial, its base if it was found, and otherwise the `problem`. force: `--force`."""

    trial_id: str
    run_id: str
    method: str
    recorded: RecordedBase
    base: FoundBase | None
    problem: str = ""
    force: bool = False

    @property
    def base_source(self) -> str:
        """The folder or hub id from which transformers loads the base."""
        if self.base is None:
            return self.recorded.record.location or self.recorded.model.name
        return self.base.model.name if self.base.now.commit is not None else str(model_folder(self.base.model))

    @property
    def code_argument(self) -> str:
        """The argument of `from_pretrained` that lets the base's own code run, if it may."""
        return ", trust_remote_code=True" if self.recorded.model.trust_remote_code else ""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, in words, and three lines of Python that load it, with `FOLDER` for the folder's text."""

    what: str
    snippet: str


class Exporter(Protocol):
    """Writes one kind of folder."""

    def check(self, request: Request) -> list[str]:
        """What a reader must know about the base; nothing has been written yet.

        Raises:
            ValueError: the base is missing or differs in what this kind depends on, and nothing forces the export.
        """

    def write(self, request: Request, stored: Path, folder: Path) -> Written:
        """Write the `folder`, which does not exist, from the files that the trial left; they may be moved."""


class AdapterExporter:
    """The adapter in PEFT's format, with the tokenizer; its config names the base and, on the hub, the commit.

    An adapter can be written without its base. If the base is not there or has changed, this is said, and a tokenizer
    that is not the trial's is left out.
    """

    def check(self, request: Request) -> list[str]:
        base = request.base
        if base is None:
            return [f"without a tokenizer: {request.problem}"]
        if not base.that_matter:
            return []
        without = "; its tokenizer is left out" if base.tokenizer_differences else ""
        return [
            f"the base in {base.now.location} is not the one that the adapter was trained on; these differ: "
            f"{_listed(base.that_matter)}{without}; only on the recorded base does the adapter compute what the trial "
            "computed"
        ]

    def write(self, request: Request, stored: Path, folder: Path) -> Written:
        base, recorded = request.base, request.recorded
        config = read_json(stored / ADAPTER_CONFIG)
        config |= {"base_model_name_or_path": request.base_source, "revision": recorded.record.commit}
        template = _trained_template(stored)
        _move_files(stored, folder)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        has_tokenizer = base is not None and not base.tokenizer_differences
        if base is not None and has_tokenizer:
            copy_companions(model_folder(base.model), folder, tokenizer_only=True)
            if template is not None:
                set_chat_template(folder, template)
        revision = f', revision="{recorded.record.commit}"' if recorded.record.commit is not None else ""
        source = json.dumps(request.base_source) + revision
        base_arguments = f'{source}, dtype="{recorded.model.dtype}"{request.code_argument}'
        tokenizer = FOLDER if has_tokenizer else source
        return Written(
            what=f"{config['peft_type']} on {count_of(num_adapted_layers(folder), 'layer')}",
            snippet="from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"base = AutoModelForCausalLM.from_pretrained({base_arguments})\n"
            f"model = PeftModel.from_pretrained(base, {FOLDER}); "
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer}{request.code_argument})",
        )


class MergedExporter:
    """The base with the adapter merged in, as a model folder of its own."""

    def check(self, request: Request) -> list[str]:
        if request.base is None:
            raise ValueError(f"{request.trial_id}: a merged model needs the base: {request.problem}")
        changed = request.base.that_matter
        if not changed:
            return []
        if not request.force:
            raise ValueError(refusal(request.recorded, request.base, request.trial_id, changed))
        return [f"merged into another base than the trial was trained on (--force); these differ: {_listed(changed)}"]

    def write(self, request: Request, stored: Path, folder: Path) -> Written:
        assert request.base is not None
        method, template = get_method(request.method), _trained_template(stored)
        export_merged(request.base.model, stored, method, folder, chat_template=template)
        return _whole_model(request)


class FullExporter:
    """The whole model that a method has trained; only tokenizer and generation config come from the base.

    The store holds weights and config, because the base holds the rest once for all trials.
    """

    def check(self, request: Request) -> list[str]:
        if request.base is None:
            if not request.force:
                raise ValueError(
                    f"{request.trial_id}: a full model needs the base's tokenizer: {request.problem}, or {FORCE}"
                )
            return [f"without a tokenizer (--force): {request.problem}"]
        changed = request.base.tokenizer_differences
        if not changed:
            return []
        if not request.force:
            raise ValueError(refusal(request.recorded, request.base, request.trial_id, changed))
        return [f"with another tokenizer than the trial was trained with (--force); these differ: {_listed(changed)}"]

    def write(self, request: Request, stored: Path, folder: Path) -> Written:
        base, config, template = request.base, request.recorded.record.config, _trained_template(stored)
        source = None if base is None else model_folder(base.model)
        if not config and base is not None and source is not None and not base.that_matter:
            config = read_json(source / CONFIG)
        _move_files(stored, folder)
        complete_model_folder(folder, source, config or None, template)
        return _whole_model(request)


EXPORTERS: Mapping[Kind, Exporter] = MappingProxyType(
    {"adapter": AdapterExporter(), "merged model": MergedExporter(), "full model": FullExporter()}
)


def kind_of(stored_names: Sequence[str], *, merged: bool) -> Kind:
    """The kind of folder to write from files with these names: an output that is a whole model stays one."""
    if ADAPTER_CONFIG not in stored_names:
        return "full model"
    return "merged model" if merged else "adapter"


def _whole_model(request: Request) -> Written:
    code = request.code_argument
    return Written(
        what=f"weights in {request.recorded.model.dtype}",
        snippet="from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained({FOLDER}, dtype="auto"{code})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({FOLDER}{code})",
    )


def _listed(differences: Sequence[BaseDifference]) -> str:
    return "; ".join(difference.text for difference in differences)


def _trained_template(stored: Path) -> str | None:
    """The template that the trial was trained with, if it is not the tokenizer's own."""
    path = stored / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _move_files(source: Path, target: Path) -> None:
    """Move files within one file system, because a whole model is large."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        path.rename(target / path.name)
