"""`chat`: of any template, exactly what the assistant says is learned, with what ends its turn."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chunkft_compile.chat import ChatFormat
from chunkft_compile.data import Chat
from chunkft_compile.sequences import IGNORED, encode
from docs.building.samples import byte_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (  # as Gemma's: other names of roles, and what is said is trimmed
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MOVING = (  # as Mistral's: the system prompt stands before the last question
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}{% endif %}{% endfor %}"
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (ns.system if message == last else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3's: reasoning of earlier turns is left out, the last one shows some even if it is empty
    "{% for message in messages %}{% set said = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + message['role'] + '\n' + said + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}#{% endgeneration %}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + '|' }}{% endif %}{% endfor %}"
)

TALK = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "hello?"), ("assistant", "hi")]


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in messages), "data file x.jsonl line 3")


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def learned(template: str, *messages: tuple[str, str]) -> list[str]:
    """The stretches of text that are learned; a token of the tokenizer is a byte."""
    made = tokenizer(template)
    ids, mask = ChatFormat(made).encode(chat(*messages))
    assert len(ids) == len(mask)
    found: list[list[int]] = []
    inside = False
    for token, one in zip(ids, mask, strict=True):
        if one:
            found = [*found[:-1], [*found[-1], token]] if inside else [*found, [token]]
        inside = one
    return [str(made.decode(tokens)) for tokens in found]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (TRIMMING, "<end_of_turn>"), (MOVING, "</s>"), (THINKING, "<|im_end|>"), (MARKED, "#")],
    ids=["chatml", "trimming", "moving", "thinking", "marked"],
)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(template: str, end: str) -> None:
    assert learned(template, *TALK) == [f"hello{end}", f"hi{end}"]
    assert learned(template, ("user", "a"), ("assistant", "ä</s>🙂 <|im_start|>")) == [f"ä</s>🙂 <|im_start|>{end}"]


def test_an_answer_that_repeats_its_surroundings() -> None:
    same = "<|im_end|>\n<|im_start|>assistant\n"
    assert learned(CHATML, ("user", same), ("assistant", same), ("user", "x"), ("assistant", same + same)) == [
        same + "<|im_end|>",
        same + same + "<|im_end|>",
    ]


def test_white_space_that_the_template_trims() -> None:
    assert learned(TRIMMING, ("user", " q "), ("assistant", "\n a b\n\n")) == ["a b<end_of_turn>"]
    assert learned(CHATML, ("user", " q "), ("assistant", "\n a b\n\n")) == ["\n a b\n\n<|im_end|>"]


def test_an_answer_that_the_template_writes_twice() -> None:
    """Then the turn is what comes behind the prompt."""
    twice = CHATML.replace("message['content'] +", "message['content'] + message['content'] +")
    assert learned(twice, ("user", "q"), ("assistant", "ab")) == ["abab<|im_end|>"]


def test_reasoning_is_learned_where_the_template_shows_it() -> None:
    thought = ("assistant", "<think>\nwell\n</think>\n\nyes")
    assert learned(THINKING, ("user", "q"), thought) == ["<think>\nwell\n</think>\n\nyes<|im_end|>"]
    assert learned(THINKING, ("user", "q"), thought, ("user", "r"), ("assistant", "no")) == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_conversation_that_begins_with_the_assistant_and_one_of_marks() -> None:
    assert learned(CHATML, ("assistant", "hi"), ("user", "hello")) == ["hi<|im_end|>"]
    assert learned(CHATML, ("user", "\ue000"), ("assistant", "\ue000\ue001")) == ["\ue000\ue001<|im_end|>"]


def test_a_token_that_joins_a_header_and_an_answer_is_not_learned() -> None:
    """Loss is on answers only; with a tokenizer whose merges cross the border, one token less."""
    made = tokenizer("{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '.' }}{% endfor %}")
    joined = made.backend_tokenizer
    vocabulary = joined.get_vocab()
    from tokenizers import Tokenizer, models

    merged = Tokenizer(models.BPE(vocab={**vocabulary, "]y": len(vocabulary)}, merges=[("]", "y")]))
    merged.pre_tokenizer, merged.decoder = joined.pre_tokenizer, joined.decoder
    other = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<eos>")
    other.chat_template = made.chat_template
    ids, mask = ChatFormat(other).encode(chat(("user", "q"), ("assistant", "yes")))
    assert other.decode([token for token, one in zip(ids, mask, strict=True) if one]) == "es."


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "the tokenizer has no chat template: pass one with --chat-template FILE"),
        ("{% for", TALK, r"line 3: the chat template cannot write this conversation: "),
        ("{{ raise_exception('no system prompts') }}", TALK, r"cannot write this conversation: no system prompts"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", TALK, "writes nothing behind the assistant's turn"),
        (
            "{% for message in messages %}{{ message['role'] }}{% endfor %}",
            TALK,
            r"it cannot be told where the chat template puts message 3",
        ),
        (
            MOVING.replace("message['content'] + '</s>'", "message['content'] + message['content'] + '</s>'"),
            TALK,
            r"it cannot be told where the chat template puts message 3",
        ),
        ("{% generation %}{% endgeneration %}{{ messages[0]['content'] }}", TALK, "has {% generation %}, but not around what"),
    ],
)
def test_templates_that_are_refused(template: str | None, messages: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        encode([chat(*messages)], tokenizer(template), length=64, stream=False)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = copy.copy(tokenizer(CHATML))
    monkeypatch.setattr(type(made), "is_fast", False)
    with pytest.raises(ValueError, match="does not tell where its tokens stand in a text: convert it to a fast tokenizer"):
        ChatFormat(made)


def test_chats_and_pairs_in_one_file_are_cut_and_dropped_alike() -> None:
    long = chat(("user", "q"), ("assistant", "a" * 99))
    late = chat(("user", "q" * 99), ("assistant", "a"))
    found = encode([long, late], tokenizer(MARKED), length=24, stream=False)
    assert (len(found.rows), found.dropped, found.cut) == (1, 1, 1)
    (row,) = found.rows
    text = "user: q|A: " + "a" * 13
    assert tokenizer(None).decode(row.input_ids.tolist()) == text
    assert (row.labels != IGNORED).tolist() == [False] * 11 + [True] * 13
