"""What is learned of a file, byte by byte; and every way in which a file is none that can be learned from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from autorev.errors import DataError
from autorev.finetuning.data import IGNORED, TOPICS, Document, Example, read_documents, split, tokenize
from tests.helpers.tiny_llm import END, START, tokenizer_of_bytes

TOKENIZER = tokenizer_of_bytes()
WITHOUT_CHAT = tokenizer_of_bytes(chat=False)
USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "2, é"}
ASKED = f"{START}user\n1+1?{END}\n{START}assistant\n"
"""The conversation up to where the assistant begins."""
ANSWERED = f"2, é{END}\n"
"""What the assistant writes, with the mark that ends it."""


def read(folder: Path, *lines: Any, tokenizer: Any = TOKENIZER) -> list[Example]:
    """The examples of a JSONL file with these lines; a string is a line as it stands."""
    file = folder / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return tokenize(read_documents(file, tokenizer)[0], tokenizer)


def written(ids: Any) -> str:
    """Token ids as text, special tokens included."""
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def learned(example: Example) -> str:
    """The text of the tokens that are learned; each label is the token at its place."""
    assert len(example.ids) == len(example.labels)
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    return written(label for label in example.labels if label != IGNORED)


def texts(*contents: str) -> list[Example]:
    """Each content as a text."""
    return tokenize([Document(((content, True),), "here", is_text=True) for content in contents], TOKENIZER)


# -- forms


def test_of_a_text_file_all_is_learned_but_the_first_token(tmp_path: Path) -> None:
    """It is one document, of one token per byte here, and it ends with the tokenizer's end."""
    file = tmp_path / "book.txt"
    file.write_text("Grüße\n\nand more\n", "utf-8")
    documents, source = read_documents(file, TOKENIZER)
    (example,) = tokenize(documents, TOKENIZER)
    assert source == str(file)
    assert written(example.ids) == f"Grüße\n\nand more\n{END}"
    assert len(example.ids) == len("Grüße\n\nand more\n".encode()) + 1
    assert example.labels == (IGNORED, *example.ids[1:])
    assert example.learned == len(example.ids) - 1
    assert example.is_text


def test_lines_with_text_are_documents(tmp_path: Path) -> None:
    """Blank lines are none; any other keys are let be."""
    examples = read(tmp_path, {"text": "one"}, "", "   ", {"text": "two", "id": 7})
    assert [written(example.ids) for example in examples] == [f"one{END}", f"two{END}"]
    assert [learned(example) for example in examples] == [f"ne{END}", f"wo{END}"]
    assert all(example.is_text for example in examples)


def test_of_a_prompt_with_its_completion_the_completion_is_learned(tmp_path: Path) -> None:
    """To the byte, with the end; both stand there as they are, nothing between them."""
    (example,) = read(tmp_path, {"prompt": "Q: 1+1? ", "completion": "A: 2"})
    assert written(example.ids) == f"Q: 1+1? A: 2{END}"
    assert learned(example) == f"A: 2{END}"
    assert not example.is_text


def test_nothing_comes_before_a_completion_without_prompt(tmp_path: Path) -> None:
    """Its first token is not learned: nothing predicts it."""
    (example,) = read(tmp_path, {"prompt": "", "completion": "abc"})
    assert learned(example) == f"bc{END}"


def test_of_a_conversation_every_answer_is_learned(tmp_path: Path) -> None:
    """From behind the template's header to behind its end mark, in each of the assistant's turns."""
    (example,) = read(tmp_path, {"messages": [USER, ASSISTANT, {"role": "user", "content": "Sure?"}, ASSISTANT]})
    assert written(example.ids) == f"{ASKED}{ANSWERED}{START}user\nSure?{END}\n{START}assistant\n{ANSWERED}"
    assert learned(example) == ANSWERED * 2
    first = len(TOKENIZER(ASKED).input_ids)
    assert example.labels[:first] == (IGNORED,) * first
    assert example.labels[first] != IGNORED


def test_of_a_conversational_completion_only_its_own_answers_are_learned(tmp_path: Path) -> None:
    """An answer in the prompt is an example, not a task."""
    before = [USER, {"role": "assistant", "content": "two"}, USER]
    (example,) = read(tmp_path, {"prompt": before, "completion": [ASSISTANT]})
    assert written(example.ids).count("two") == 1
    assert learned(example) == ANSWERED


def test_what_follows_the_last_answer_is_not_learned(tmp_path: Path) -> None:
    """A question at the end stays without one."""
    (example,) = read(tmp_path, {"messages": [USER, ASSISTANT, USER]})
    assert written(example.ids) == f"{ASKED}{ANSWERED}{START}user\n1+1?{END}\n"
    assert learned(example) == ANSWERED


def test_the_beginning_that_a_tokenizer_adds_is_added_once(tmp_path: Path) -> None:
    """Before the prompt alone; the end, once, behind the completion; a template brings its own of both."""
    framed = copy.deepcopy(TOKENIZER)
    start, end = (framed.convert_tokens_to_ids(token) for token in (START, END))
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    plain, chat = read(
        tmp_path, {"prompt": "ab", "completion": "cd"}, {"messages": [USER, ASSISTANT]}, tokenizer=framed
    )
    assert written(plain.ids) == f"{START}abcd{END}"
    assert learned(plain) == f"cd{END}"
    assert written(chat.ids) == ASKED + ANSWERED


def test_a_tokenizer_without_an_end_adds_none(tmp_path: Path) -> None:
    """What it has no token for is not made up."""
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    (example,) = read(tmp_path, {"text": "abc"}, tokenizer=endless)
    assert written(example.ids) == "abc"


def test_a_separator_within_a_line_does_not_end_it(tmp_path: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are, at which `str.splitlines` cuts; a mark of UTF-8 may come first."""
    content = "one\u2028two\x85three"
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": content}, ensure_ascii=False).encode() + b"\r\n")
    (document,) = read_documents(file, TOKENIZER)[0]
    assert document.stretches == ((content, True),)


def test_without_a_file_the_language_reference_is_read() -> None:
    """CPython carries it; the same texts in the same order each time."""
    from pydoc_data.topics import topics

    documents, source = read_documents(None, TOKENIZER)
    assert source == TOPICS
    assert [document.where for document in documents] == [f"topics[{name!r}]" for name in sorted(topics)]
    assert documents[0].stretches[0][0] == topics[min(topics)]


# -- what is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; there is nothing to train on"),
        (b" \n\t\n", "is empty; there is nothing to train on"),
        (b"MZ\x00\x01", "is binary, not text"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        ("Grüße".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """With the file's name; empty, binary, NUL, another encoding."""
    for name in ("data.txt", "data.jsonl"):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{name} {said}"):
            read_documents(file, TOKENIZER)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Missing, or a directory: the system's own words."""
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
        read_documents(tmp_path / "nowhere.txt", TOKENIZER)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_documents(tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', r"line 4 is not JSON \(Expecting ',' delimiter, column 13\)"),
        ("[1, 2]", "line 4 is a list; a line is an object"),
        ({"txt": "a", "b": 1}, "line 4 has the keys 'txt', 'b'; autorev reads 'text', 'prompt' with 'completion', or"),
        ('{"text": "a\\ud800b"}', "line 4 holds half of a surrogate pair"),
        ({}, "line 4 has the keys none"),
        ({"text": 5}, "line 4 has the keys 'text'"),
        ({"prompt": "a"}, "line 4 has the keys 'prompt'"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "line 4 has the keys 'prompt', 'completion'"),
        ({"messages": []}, "line 4: messages is a list of objects with 'role' and 'content'"),
        ({"messages": "hello"}, "line 4: messages is a list of objects"),
        ({"messages": [{"content": "hello"}]}, "line 4: messages is a list of objects"),
    ],
)
def test_a_line_of_another_form_is_refused_by_its_number(tmp_path: Path, line: Any, said: str) -> None:
    """Blank lines count, as they do in an editor."""
    with pytest.raises(DataError, match=rf"data\.jsonl {said}"):
        read(tmp_path, {"text": "good"}, "", {"text": "good"}, line, {"text": "good"})


@pytest.mark.parametrize("line", [{"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}])
def test_a_conversation_needs_a_chat_template(tmp_path: Path, line: Any) -> None:
    """A tokenizer without one is told what it can read instead."""
    with pytest.raises(DataError, match=r"line 1 is a conversation, and .* no chat template .*give 'prompt' and"):
        read(tmp_path, line, tokenizer=WITHOUT_CHAT)


def test_a_template_that_rewrites_what_came_before_is_refused(tmp_path: Path) -> None:
    """As those do that drop an earlier answer's thoughts: the answer could not be found in the whole."""
    forgetful = copy.deepcopy(TOKENIZER)
    forgetful.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
        "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    (example,) = read(tmp_path, {"messages": [USER, ASSISTANT]}, tokenizer=forgetful)
    assert learned(example) == ANSWERED
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template writes a message otherwise once others"):
        read(tmp_path, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, tokenizer=forgetful)


def test_what_a_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    """Templates raise exceptions of their own, which name no line."""
    strict = copy.deepcopy(TOKENIZER)
    strict.chat_template = "{{ raise_exception('roles must\n alternate') }}"
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template refuses it: roles must alternate"):
        read(tmp_path, {"messages": [USER, ASSISTANT]}, tokenizer=strict)


def test_data_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    """Questions without an answer; one that has one is enough."""
    with pytest.raises(DataError, match="line 1: there is nothing to learn"):
        read(tmp_path, {"messages": [USER]}, {"messages": [USER]})
    examples = read(tmp_path, {"messages": [USER]}, {"messages": [USER, ASSISTANT]})
    assert [example.learned > 0 for example in examples] == [False, True]


# -- training and validation


def test_every_tenth_document_is_held_out() -> None:
    """Of the topics and of anything as long: all others are trained on, and it is the same each time."""
    examples = tokenize(read_documents(None, TOKENIZER)[0], TOKENIZER)
    training, held = split(examples)
    assert held == examples[9::10]
    assert training == [example for n, example in enumerate(examples) if n % 10 != 9]
    assert split(examples) == (training, held)


def test_of_few_texts_the_last_part_of_each_is_held_out() -> None:
    """A tenth of the tokens; joined again they are the texts, and no part learns its first token."""
    examples = texts("a" * 99, "b" * 199)
    training, held = split(examples)
    assert [len(example.ids) for example in training] == [90, 180]
    assert [len(example.ids) for example in held] == [10, 20]
    for whole, first, second in zip(examples, training, held, strict=True):
        assert first.ids + second.ids == whole.ids
        assert first.labels + second.labels == (*whole.labels[: len(first.ids)], IGNORED, *second.ids[1:])
        assert first.is_text
        assert second.is_text


def test_texts_too_short_to_hold_any_out_are_refused() -> None:
    """A tenth of them would be a token or none, which is nothing to validate on."""
    for short in ("tiny", "a dozen bytes"):
        with pytest.raises(DataError, match=r"too short to hold any of it out.*`validation`"):
            split(texts(short))
    training, held = split(texts("tiny", "c" * 40))
    assert [len(example.ids) for example in held] == [0, 4]
    assert [len(example.labels) for example in [*training, *held]] == [5, 37, 0, 4]


def test_of_few_examples_the_last_is_held_out(tmp_path: Path) -> None:
    """A completion is not cut in two; and a single one leaves none."""
    line = {"prompt": "q", "completion": "a"}
    examples = read(tmp_path, line, {"text": "some"}, {**line, "prompt": "r"})
    assert split(examples) == (examples[:2], examples[2:])
    with pytest.raises(DataError, match=r"there is one example, and none left to validate on; give more, or"):
        split(examples[:1])
