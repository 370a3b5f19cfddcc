"""Turns a rendered chat and the character ranges that are learnt into labelled tokens.

A prompt is tokenized by itself, because an answer is generated from exactly these tokens. So the tokens of a chat are
those of its whole text, as long as these begin with the prompt's own at every learnt range. Otherwise a token would
span the prompt's end and the answer; then the text is cut there, by the rule of `boundary`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loragrid.data.boundary import Boundary
from loragrid.data.chats.rows import LearntChat
from loragrid.data.chats.template import ChatRefusedError, ChatTemplate
from loragrid.data.labelled_tokens import LabelledTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_KEPT_OPENINGS = 4096


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """The tokens of a text with their character ranges."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class ChatTokens:
    """Tokenizes rendered chats."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> None:
        self._tokenizer, self._token = tokenizer, template.token
        self._boundary = Boundary(tokenizer)
        self._openings: dict[str, tuple[int, ...]] = {}

    def tokenize(self, chats: Sequence[LearntChat]) -> list[LabelledTokens | ChatRefusedError]:
        """The tokens of each chat, or why it has none."""
        if not chats:
            return []
        # The template has already written the special tokens.
        encoded = self._tokenizer(
            [chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found: list[LabelledTokens | ChatRefusedError] = []
        for chat, ids, offsets in zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            try:
                found.append(self._labelled(chat, ids, offsets))
            except ChatRefusedError as error:
                found.append(error)
        return found

    def _labelled(self, chat: LearntChat, ids: list[int], offsets: Sequence[Any]) -> LabelledTokens:
        cut = _Cut(ids=ids, starts=[start for start, _ in offsets], ends=[end for _, end in offsets])
        tokens = [(found.start(), found.end()) for found in self._token.finditer(chat.text)]
        labels: list[int] = []
        notes = list(chat.notes)
        shift = 0  # characters of the text before those that `cut` describes
        kept: list[int] = []  # tokens of these characters
        for begin, end in chat.spans:
            first = self._first(chat.text, cut, tokens, begin, shift)
            if first is None:
                notes.append("boundary_moved")
                head, cut = self._parted(chat.text, cut, tokens, begin, shift)
                kept += head
                shift, first = begin, 0
            last = first
            while last < len(cut.ids) and self._is_inside(cut, last, end - shift, tokens, shift):
                last += 1
            labels += range(len(kept) + first, len(kept) + last)
        # Nothing predicts token 0.
        positions = tuple(label - 1 for label in dict.fromkeys(labels) if label)
        return LabelledTokens((*kept, *cut.ids), positions, tuple(dict.fromkeys(notes)))

    def _first(self, text: str, cut: _Cut, tokens: list[tuple[int, int]], begin: int, shift: int) -> int | None:
        """The number of the first token from character `begin` on; None if a token spans it."""
        start = self._last_token(tokens, begin, shift)
        opening = self._opening(text[start:begin]) if shift == 0 or start > shift else None
        if opening is None:
            # The tokens since the last cut continue others: only their ranges can be compared.
            first = bisect_left(cut.starts, begin - shift)
            return first if first == 0 or cut.ends[first - 1] <= begin - shift else None
        first = bisect_left(cut.starts, start - shift)
        end = first + len(opening)
        return end if tuple(cut.ids[first:end]) == opening else None

    def _parted(
        self, text: str, cut: _Cut, tokens: list[tuple[int, int]], begin: int, shift: int
    ) -> tuple[list[int], _Cut]:
        """The tokens up to character `begin`, and those behind it."""
        start = self._last_token(tokens, begin, shift)
        opening, rest = text[start:begin], text[begin:]
        (pair,) = self._boundary.join([opening], [rest])
        if pair.completion is None:
            raise ChatRefusedError(
                "a token of the tokenizer spans the end of the prompt and the answer, and no other tokens continue the "
                "prompt's; an answer that begins with another character mends it"
            )
        head = [*cut.ids[: bisect_left(cut.starts, start - shift)], *pair.prompt]
        return head, self._with_ranges(pair.completion, rest)

    def _with_ranges(self, ids: Sequence[int], text: str) -> _Cut:
        """The tokens that continue a prompt, with the character ranges that they have in the text by itself."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        own, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # From behind, because the texts differ at their beginnings only.
        num_equal = 0
        while num_equal < min(len(own), len(ids)) and own[-1 - num_equal] == ids[-1 - num_equal]:
            num_equal += 1
        num_new = len(ids) - num_equal
        begin = offsets[len(own) - num_equal][0] if num_equal else len(text)
        ranges = [(0, begin)] * num_new + list(offsets[len(own) - num_equal :])
        return _Cut(ids=list(ids), starts=[start for start, _ in ranges], ends=[end for _, end in ranges])

    def _last_token(self, tokens: list[tuple[int, int]], begin: int, shift: int) -> int:
        """Where the last added token before character `begin` starts; without one, where the tokens begin."""
        number = bisect_right(tokens, (begin, -1)) - 1
        while number >= 0 and tokens[number][1] > begin:
            number -= 1
        return max(shift, tokens[number][0]) if number >= 0 else shift

    def _opening(self, text: str) -> tuple[int, ...]:
        """The tokens of a text by itself; most prompts end with one of few texts."""
        if text not in self._openings:
            if len(self._openings) >= MOST_KEPT_OPENINGS:
                self._openings.clear()
            (self._openings[text],) = self._boundary.tokens([text])
        return self._openings[text]

    def _is_inside(self, cut: _Cut, number: int, end: int, tokens: list[tuple[int, int]], shift: int) -> bool:
        """Whether a token ends in the range, or is an added token that also takes white space behind it."""
        start = cut.starts[number]
        if cut.ends[number] <= end:
            return start < end or start == cut.ends[number] < end
        place = bisect_left(tokens, (start + shift, -1))
        return (
            start < end
            and place < len(tokens)
            and tokens[place][0] == start + shift
            and tokens[place][1] <= end + shift
        )
