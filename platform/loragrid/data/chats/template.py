"""A chat template: which one a data set uses, what it renders, and what it gives the model before an answer."""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loragrid.config.local_path import local_path, reason_of
from loragrid.data.values import HALF_CHARACTERS
from loragrid.schema.errors import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The date that chat templates get as today's: the same rows must always become the same tokens."""

DATE_CODES = ("%-d", "%-m", "%d", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%H", "%M", "%S", "%F")

MAX_TEMPLATE_BYTES = 2**20

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
"""Name -> template of the names that need no file."""

OTHER_TEMPLATE = "data.chat_template can name another template"

QUESTION, ANSWER = "Qx7question7xQ", "Qx7answer7xQ"
"""Texts of a trial chat; no template contains them."""


class ChatRefusedError(ValueError):
    """A chat cannot be learnt; the message is the end of a sentence.

    column: the canonical column at fault. is_of_prompt: whether the fault is that the template refuses the chat, or
    that its prompt does not lead to the answer; no part of the messages is lost.
    """

    def __init__(self, what: str, column: str = "messages", *, is_of_prompt: bool = False) -> None:
        super().__init__(what)
        self.column, self.is_of_prompt = column, is_of_prompt


def template_texts(tokenizer: "PreTrainedTokenizerBase", chosen: str | None) -> dict[str, str]:
    """Name -> text of the templates that rows can use: `default`, and `tool_use` if rows with tools have their own.

    chosen: `data.chat_template`: the name of one of the tokenizer's templates or of a built-in one, or a file. Empty if
    none is chosen and the tokenizer has none.

    Raises:
        ValueError: there is no such template or file; the message names `data.chat_template` and the names there are.
    """
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, Mapping) else {} if own is None else {"default": str(own)}
    if chosen is None:
        if named and "default" not in named:
            raise ValueError(
                f"data.chat_template: null: the tokenizer of {tokenizer.name_or_path} has several templates and no "
                f"default; allowed: {', '.join(sorted(named))}, or a file"
            )
        return {name: text for name, text in named.items() if name in ("default", "tool_use")}
    if chosen in named:
        return {"default": named[chosen]}
    if chosen in BUILT_IN:
        return {"default": BUILT_IN[chosen]}
    return {"default": _template_file(chosen, [*sorted(named), *BUILT_IN])}


def _template_file(chosen: str, names: Sequence[str]) -> str:
    path = local_path("data.chat_template", chosen)
    if not path.is_file():
        raise ValueError(
            f"data.chat_template: {chosen}: there is neither a template of this name nor such a file; allowed: "
            f"{', '.join(names)}, or a file with a Jinja template"
        )
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ValueError(f"data.chat_template: {chosen}: has more than {MAX_TEMPLATE_BYTES} bytes: no template")
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: {chosen}: cannot be read as text: {reason_of(error)}") from error
    text = _text_in_json(chosen, text)
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"data.chat_template: {chosen}: holds no Jinja template: there is neither {{{{ nor {{% in it")
    return text


def _text_in_json(chosen: str, text: str) -> str:
    """The template in a JSON file such as tokenizer_config.json or chat_template.json; other texts unchanged."""
    try:
        held = json.loads(text)
    except ValueError:  # a Jinja template, which is no JSON
        return text
    found = held.get("chat_template") if isinstance(held, dict) else held
    if not isinstance(found, str):
        raise ValueError(
            f"data.chat_template: {chosen}: is JSON without one template as the text of its key chat_template; "
            "write the template's text into a file"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What stands between a question and its answer.

    is_known: whether a trial chat has shown it. is_given: whether `add_generation_prompt` changes what the template
    renders. prompt: the generation prompt, up to
    characters that it shares with the end of a chat. header: the role header that a template without a generation
    prompt writes before an answer; it is part of the prompt. always: the header that a template writes after every
    chat, asked or not. opener: the added token with which a rendered chat begins; it opens messages and ends none.
    """

    is_known: bool = False
    is_given: bool = False
    prompt: str = ""
    header: str = ""
    always: str = ""
    opener: str = ""


class ChatTemplate:
    """Renders chats with one template; it is the only place that does."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
        self.tokenizer, self.source = tokenizer, text
        self._text = _dated(text)
        self.has_generation_blocks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) is not None
        self.tags = _tags(text)
        added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
        ends = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
        self.token = any_of({*added, *ends})
        """Finds the tokenizer's added tokens, which no merge crosses, in a text."""
        self.special_token = any_of(str(token) for token in tokenizer.all_special_tokens)

    def mentions(self, word: str) -> bool:
        """Whether the template's source contains a word."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    def syntax_error(self) -> str | None:
        """Why the template cannot be compiled, on one line; None if it can."""
        from jinja2 import TemplateSyntaxError

        try:
            self.render([{"role": "user", "content": QUESTION}])
        except ChatRefusedError as error:
            cause = error.__cause__
            return f"line {cause.lineno}: {cause.message}" if isinstance(cause, TemplateSyntaxError) else None
        return None

    def names_role(self, role: str) -> bool:
        """Whether the template's source names a role: the word in quotation marks, not as a subscript."""
        return bool(role) and re.search(rf"(?<![\w\])]\[)['\"]{re.escape(role)}['\"]", self.source) is not None

    def render(self, messages: Messages, tools: Tools = None, *, asks: bool = False) -> str:
        """The chat as text; asks: with the generation prompt.

        Raises:
            ChatRefusedError: the template raises an exception, or its text is no Unicode.
        """
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                chat_template=self._text,
                add_generation_prompt=asks,
            )
        except Exception as error:  # a template is a program and can raise any exception
            reason = str(error).strip() or type(error).__name__
            raise ChatRefusedError(f"the chat template refuses it: {reason}", is_of_prompt=True) from error
        if not is_unicode(str(rendered)):
            raise ChatRefusedError(HALF_CHARACTERS)
        return str(rendered)

    def prompt(self, messages: Messages, tools: Tools = None) -> str:
        """What the model gets when it answers: the chat with the generation prompt, or with the role header."""
        return self.render(messages, tools, asks=True) + self.opening.header

    def generation_blocks(self, messages: Messages, tools: Tools = None) -> list[tuple[int, int]]:
        """The character ranges that the template marks with `{% generation %}` in `render`'s text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=self._text,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **dict[str, Any](self.tokenizer.special_tokens_map),
        )
        (ranges,) = rendered[1]
        return [(int(start), int(end)) for start, end in ranges]

    @cached_property
    def opening(self) -> Opening:
        """Found with a trial chat of one question and one answer."""
        question, answer = self.trial("user", QUESTION), self.trial("assistant", ANSWER)
        try:
            asked, plain = self.render([question], asks=True), self.render([question])
            answered = self.render([question, answer])
        except ChatRefusedError:
            return Opening()
        if ANSWER not in answered or QUESTION not in asked:
            return Opening(is_given=asked != plain)
        place = answered.rindex(ANSWER)
        before, after = answered[:place], answered[place + len(ANSWER) :]
        opener = self._opener(plain)
        prompt = asked[len(common_prefix(asked, plain)) :] if asked != plain else ""
        if before == asked and (
            always := self._always(before.removesuffix(prompt), after, opener, is_given=asked != plain)
        ):
            return Opening(
                is_known=True, is_given=asked != plain, prompt=prompt or always, always=always, opener=opener
            )
        if asked != plain:
            return Opening(is_known=True, is_given=True, prompt=prompt, opener=opener)
        added = before.removeprefix(asked)
        # Blanks before an answer are written by the model; anything else is the header of its role.
        header = added if added.strip() else ""
        if not before.startswith(asked):
            return Opening(opener=opener)
        return Opening(is_known=True, prompt=header, header=header, opener=opener)

    def _opener(self, question: str) -> str:
        """The added token with which the rendered chat of one question begins, behind the start token."""
        begin = question.removeprefix(str(self.tokenizer.bos_token or "")).lstrip()
        found = self.token.match(begin)
        return found.group() if found and found.end() <= begin.find(QUESTION) else ""

    def _always(self, before: str, after: str, opener: str, *, is_given: bool) -> str:
        """The header that a template writes after every chat, asked or not; empty without one.

        before: the trial chat up to the answer, without the generation prompt. after: what stands behind the answer.
        """
        shared = _common_suffix(before.rpartition(QUESTION)[2], after)
        try:
            chat = [self.trial("user", QUESTION), self.trial("assistant", ANSWER), self.trial("user", QUESTION)]
            continued = self.render(chat).rpartition(ANSWER)[2]
        except ChatRefusedError:
            continued = ""
        # A header of the assistant is not written before a question.
        if continued.startswith(after) or not shared.strip():
            return ""
        if opener and opener in shared:
            return shared[shared.rindex(opener) :]
        if is_given:
            return ""
        first = self.token.search(after)
        header = after[first.end() :] if first else shared
        return header if header.strip() else ""

    @cached_property
    def needs_parts(self) -> bool:
        """Whether contents must be lists of parts, because the template does not render text."""
        return not self._renders(QUESTION) and self._renders([{"type": "text", "text": QUESTION}])

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders a list with one part as it renders that part's text."""
        if self.needs_parts:
            return True
        try:
            as_list = self.render([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
            return as_list == self.render([{"role": "user", "content": QUESTION}])
        except ChatRefusedError:
            return False

    def trial(self, role: str, text: str) -> dict[str, Any]:
        """A message of a trial chat, as the template takes its content."""
        return {"role": role, "content": [{"type": "text", "text": text}] if self.needs_parts else text}

    def _renders(self, content: object) -> bool:
        try:
            return QUESTION in self.render([{"role": "user", "content": content}])
        except ChatRefusedError:
            return False


def _tags(source: str) -> "re.Pattern[str]":
    """Finds in a text the tags that the template itself reads or writes, such as <think>."""
    found = set(re.findall(r"</?[A-Za-z_][\w:-]*>|\[/?[A-Z_]{2,}\]|<\|/?\w+\|>|◁/?\w+▷", source))
    return any_of(found)


def any_of(texts: Iterable[str]) -> "re.Pattern[str]":
    """Finds any of the texts, the longest first; without texts it finds nothing."""
    ordered = sorted(set(texts) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _common_suffix(one: str, other: str) -> str:
    return common_prefix(one[::-1], other[::-1])[::-1]


def common_prefix(one: str, other: str) -> str:
    """The characters with which both texts begin."""
    number = next((number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other))] if number is None else one[:number]


def _dated(chat_template: str) -> str:
    """The template with a macro `strftime_now` of a fixed date; a template takes no functions as arguments."""
    if "strftime_now" not in chat_template:
        return chat_template
    codes = {"%-d": str(TEMPLATE_DATE.day), "%-m": str(TEMPLATE_DATE.month)}
    dates = {code: codes.get(code) or TEMPLATE_DATE.strftime(code) for code in DATE_CODES}
    filters = "".join(f" | replace('{code}', '{date}')" for code, date in dates.items())
    # The template must begin at the start of a line; the engine drops this newline from the output.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{chat_template}"
