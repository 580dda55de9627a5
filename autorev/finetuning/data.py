"""What is trained on: text, prompts with completions, or conversations -> token ids, and which of them are learned.

    text file               one document
    JSONL, a line each      {"text": ...}
                            {"prompt": ..., "completion": ...}
                            {"messages": [{"role": ..., "content": ...}, ...]}      the tokenizer's chat template

Of a text every token is learned, of the others the completions (the assistant's messages) alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autorev.errors import DataError, UnreadableError, message_of
from autorev.files import read_bytes

IGNORED = -100
"""The label of a token that is not learned, as everywhere in PyTorch."""
TOPICS = "CPython's pydoc_data.topics"
_HELD_OUT = 10
"""One document in so many is for validation; of fewer documents, the last part of each."""


@dataclass(frozen=True, slots=True)
class Document:
    """Stretches of text with what is learned of them, in order."""

    stretches: tuple[tuple[str, bool], ...]
    where: str
    """`topics['if']`, `data.jsonl line 3`: for errors."""
    is_text: bool
    """May it be cut anywhere?"""
    special: bool = True
    """Does the tokenizer add its beginning and end? A chat template brings its own."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised document."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """Those of `ids` that are learned, `IGNORED` for the rest; never the first, which nothing comes before."""
    is_text: bool

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)

    def part(self, start: int, end: int) -> Example:
        """A stretch as an example of its own."""
        ids = self.ids[start:end]
        return Example(ids, (IGNORED, *self.labels[start + 1 : end])[: len(ids)], self.is_text)


def read_documents(path: Path | None, tokenizer: Any) -> tuple[list[Document], str]:
    """The documents of a file (None: the language reference that CPython carries), and where they come from.

    Raises:
        DataError: the file cannot be read, is empty or binary, or a line of it is not of the form above.
    """
    if path is None:
        from pydoc_data.topics import topics

        return [_text(topics[key], f"topics[{key!r}]") for key in sorted(topics)], TOPICS
    try:
        content = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give a text file, or JSONL") from None
    except UnreadableError as error:
        raise DataError(f"{path} {error}") from None
    if "\0" in content:
        raise DataError(f"{path} is binary, not text; give a text file, or JSONL")
    if not content.strip():
        raise DataError(f"{path} is empty; there is nothing to train on")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return [_text(content, str(path))], str(path)
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_of_line(line, f"{path} line {n}", tokenizer) for n, line in lines], str(path)


def split(documents: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(for training, for validation); the same for the same documents.

    Raises:
        DataError: there are too few to hold any out.
    """
    if len(documents) >= _HELD_OUT:
        held = range(_HELD_OUT - 1, len(documents), _HELD_OUT)
        return [d for n, d in enumerate(documents) if n not in held], [documents[n] for n in held]
    if all(d.is_text for d in documents):
        cuts = [len(d.ids) - len(d.ids) // _HELD_OUT for d in documents]
        training = [d.part(0, cut) for d, cut in zip(documents, cuts, strict=True)]
        held_out = [d.part(cut, len(d.ids)) for d, cut in zip(documents, cuts, strict=True)]
        if not any(d.learned for d in held_out):
            raise DataError("the text is too short to hold any of it out; give more, or `validation`")
        return training, held_out
    if len(documents) < 2:
        raise DataError("there is one example, and none left to validate on; give more, or `validation`")
    return list(documents[:-1]), list(documents[-1:])


def tokenize(documents: Sequence[Document], tokenizer: Any) -> list[Example]:
    """The documents as token ids, each with its end marked where the tokenizer has a token for that.

    Raises:
        DataError: in none of them is anything learned.
    """
    examples = [_tokenized(document, tokenizer) for document in documents]
    if not any(example.learned for example in examples):
        where = documents[0].where if documents else "the data"
        raise DataError(f"{where}: there is nothing to learn (no completion, no assistant's message, no text)")
    return examples


def _tokenized(document: Document, tokenizer: Any) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for number, (text, learned) in enumerate(document.stretches):
        found = tokenizer(text, add_special_tokens=document.special and number == 0, verbose=False).input_ids
        if found and found[-1] == tokenizer.eos_token_id and document.special:
            found = found[:-1]  # some tokenizers end every text
        ids += found
        labels += found if learned else [IGNORED] * len(found)
    if document.special and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return Example(tuple(ids), (IGNORED, *labels[1:]) if labels else (), document.is_text)


# -- forms


def _text(content: str, where: str) -> Document:
    return Document(((content, True),), where, is_text=True)


def _of_line(line: str, where: str, tokenizer: Any) -> Document:
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise DataError(
            f"{where} is nested too deep for a conversation; autorev reads 'text', 'prompt' with 'completion', or "
            "'messages'"
        ) from None
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    if not isinstance(data, dict):
        raise DataError(
            f"{where} is a {type(data).__name__}; a line is an object with text, prompt and completion, or messages"
        )
    if isinstance(data.get("text"), str):
        return _text(data["text"], where)
    if "messages" in data:
        return _conversation(data["messages"], 0, where, tokenizer)
    prompt, completion = data.get("prompt"), data.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Document(((prompt, False), (completion, True)), where, is_text=False)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], len(prompt), where, tokenizer)
    raise DataError(
        f"{where} has the keys {', '.join(map(repr, data)) or 'none'}; autorev reads 'text', 'prompt' with "
        "'completion', or 'messages'"
    )


def _conversation(messages: Any, learned_from: int, where: str, tokenizer: Any) -> Document:
    """A conversation in the tokenizer's form; learned are the assistant's messages from number `learned_from` on."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a conversation, and this model's tokenizer has no chat template to write it with; give "
            "'prompt' and 'completion' as text instead"
        )
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages) or not messages:
        raise DataError(f"{where}: messages is a list of objects with 'role' and 'content'")
    return Document(tuple(_stretches(messages, learned_from, where, tokenizer)), where, is_text=False, special=False)


def _stretches(messages: list[Any], learned_from: int, where: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    def written(count: int, **how: Any) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, **how)
        except Exception as error:  # a template is a program of its own, and says what it does not like
            why = message_of(error)
            raise DataError(f"{where}: the tokenizer's chat template refuses it: {why}") from None
        return text

    whole, done = written(len(messages)), 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < learned_from:
            continue
        before = written(number, add_generation_prompt=True) if number else ""
        after = written(number + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{where}: the tokenizer's chat template writes a message otherwise once others follow it, so it "
                "cannot be said which tokens are the assistant's; give one 'prompt' and 'completion' per answer"
            )
        yield whole[done : len(before)], False
        yield whole[len(before) : len(after)], True
        done = len(after)
    yield whole[done:], False
