"""Makes rows of a chat: all learnt turns in one row, the last one, or each as a row of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loragrid.data.chats.messages import Chat
from loragrid.data.chats.template import ChatRefusedError
from loragrid.data.chats.turns import LearntTurn, TurnFinder

Mode = Literal["auto", "all", "last", "separate"]
LAST_ONLY = "data.turns: last learns the last turn only"


@dataclass(frozen=True, kw_only=True)
class LearntChat:
    """A row that a chat becomes: its text, the character ranges that are learnt, and what was noticed."""

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def learnt_chats(finder: TurnFinder, chat: Chat, turns: Mode) -> list[LearntChat] | None:
    """The rows that a chat becomes; None with `turns="all"` if the template rewrites earlier turns.

    chat: has at least one learnt turn.

    Raises:
        ChatRefusedError: see `TurnFinder.find`. With `turns="auto"` an earlier turn that the template cannot render as
            a last one, or not as the answer to its prompt, leaves the last turn only. Any other fault of an earlier
            turn refuses the chat: the template loses or alters a part of it.
    """
    messages = finder.formed(chat)
    last = finder.find(messages, chat.tools, chat.learnt[-1])
    several = len(chat.learnt) > 1
    notes = list(chat.notes)
    if turns == "separate":
        found = [*(finder.find(messages, chat.tools, number) for number in chat.learnt[:-1]), last]
        return [_row([turn], turn, [*notes, *(["turns_separated"] if several else [])]) for turn in found]
    if chat.learnt[-1] < len(messages) - 1:
        notes.append("end_left_out")
    if turns == "last" or not several:
        return [_row([last], last, notes)]
    try:
        earlier = [finder.find(messages, chat.tools, number) for number in chat.learnt[:-1]]
    except ChatRefusedError as error:
        if turns == "all" or not error.is_of_prompt:
            raise ChatRefusedError(f"{error}; {LAST_ONLY}", column=error.column) from error
        return [_row([last], last, [*notes, "earlier_turns_apart"])]
    if not last.is_apart and all(not turn.is_apart and last.text.startswith(turn.text[: turn.end]) for turn in earlier):
        return [_row([*earlier, last], last, notes)]
    return None if turns == "all" else [_row([last], last, [*notes, "last_turn_only"])]


def _row(turns: Sequence[LearntTurn], last: LearntTurn, notes: Sequence[str]) -> LearntChat:
    spans = tuple(span for turn in turns for span in turn.spans)
    found = tuple(dict.fromkeys([*notes, *(note for turn in turns for note in turn.notes)]))
    return LearntChat(text=last.text, spans=spans, notes=found)
