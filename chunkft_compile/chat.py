"""Conversations as tokens, through the chat template of the tokenizer, and which of them are the assistant's.

A template is a program, so where a turn stands in its text is found out by rendering:

- A template with `{% generation %}` says itself what the assistant writes.
- Else each answer is replaced by one character that the text does not contain. What stays the same around that character is not the answer;
  what is in its place is. Behind the answer, the model also learns what ends its turn: what follows the character where the
  conversation is cut after this turn. This works for templates that trim answers, that move the system prompt, or that
  leave out something in earlier turns.
- Else, where the rendering depends on what the answer says (reasoning that is shown in some turns only), the conversation is rendered up
  to the turn with the generation prompt, and up to its end: where both begin the whole text, the turn is in between.

Learned are the tokens that lie in a turn wholly: one that joins the end of a header with the start of an answer is not.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chunkft_compile.data import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = ("\ue000", "\ue001", "\uf8ff")  # private use: no text has a meaning for them

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]


class ChatFormat:
    """The chat template of a tokenizer. Raises `ValueError` for a tokenizer that has none, or cannot say where its tokens stand."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        template = tokenizer.chat_template
        if not template:
            raise ValueError("the data has `messages`, and the tokenizer has no chat template: pass one with --chat-template FILE")
        if not tokenizer.is_fast:
            raise ValueError(
                f"the data has `messages`, and {type(tokenizer).__name__} does not tell where its tokens stand in a text: "
                f"convert it to a fast tokenizer (tokenizer.json), or write the data as `prompt` and `completion`"
            )
        self._tokenizer: Any = tokenizer
        self._marked = bool(_GENERATION.search(str(template)))

    def encode(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and for each whether it is to be learned.

        Raises `ValueError` with the place of the conversation where the template refuses it, or where turns cannot be found.
        """
        if self._marked:
            return self._as_marked(chat)
        text = self._render(chat.messages, chat)
        spans = [self._span(text, turn, chat) for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], [
            start < stop and any(first <= start and stop <= last for first, last in spans) for start, stop in found["offset_mapping"]
        ]

    def _as_marked(self, chat: Chat) -> tuple[list[int], list[bool]]:
        found = self._apply(chat.messages, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        if not any(found["assistant_masks"]):
            raise ValueError(f"{chat.where}: the chat template has {{% generation %}}, but not around what the assistant says here")
        return found["input_ids"], [bool(learned) for learned in found["assistant_masks"]]

    def _span(self, text: str, turn: int, chat: Chat) -> Span:
        """Where the assistant's turn stands in the text of the whole conversation."""
        mark = next((mark for mark in _MARKS if mark not in text), _MARKS[0])
        messages = [*chat.messages[:turn], {"role": "assistant", "content": mark}, *chat.messages[turn + 1 :]]
        whole, cut = (self._render(some, chat).split(mark) for some in (messages, messages[: turn + 1]))
        span = None
        if len(whole) == len(cut) == 2:
            span = _between(text, whole[0], whole[1], _turn_end(cut[1], chat))
        if span is None and min(len(whole), len(cut)) >= 2:  # it does write answers
            span = self._by_prefixes(text, turn, chat)
        if span is None:
            raise ValueError(
                f"{chat.where}: it cannot be told where the chat template puts message {turn + 1}, so other text would be learned: "
                f"mark the assistant's turns in the template with {{% generation %}} (--chat-template FILE), or leave this example out"
            )
        return span

    def _by_prefixes(self, text: str, turn: int, chat: Chat) -> Span | None:
        if turn == 0:
            return None  # no template writes an empty conversation
        before = self._render(chat.messages[:turn], chat, add_generation_prompt=True)
        whole = self._render(chat.messages[: turn + 1], chat)
        if not whole.startswith(before) or not text.startswith(whole):
            return None
        return len(before), len(whole.rstrip())

    def _render(self, messages: Messages, chat: Chat, **how: Any) -> str:
        text: str = self._apply(messages, chat, tokenize=False, **how)
        return text

    def _apply(self, messages: Messages, chat: Chat, **how: Any) -> Any:
        from jinja2 import TemplateError  # a dependency of torch, which only templates need

        try:
            return self._tokenizer.apply_chat_template(list(messages), **how)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"{chat.where}: the chat template cannot write this conversation: {' '.join(str(error).split())}") from error


def _between(text: str, before: str, after: str, end: str) -> Span | None:
    """Where the answer stands that `text` has between what is around the mark, up to and with the end of the turn."""
    stop = len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after) and after.startswith(end) and len(before) < stop):
        return None
    return len(before), stop + len(end)


def _turn_end(end: str, chat: Chat) -> str:
    """What ends a turn, without the line break before the next header."""
    if not end:
        raise ValueError(
            f"{chat.where}: the chat template writes nothing behind the assistant's turn, so the model could not learn to stop: "
            f"write the end-of-text token there (--chat-template FILE)"
        )
    return end.rstrip() or end
