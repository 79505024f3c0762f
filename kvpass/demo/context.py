"""What the demo reads: a long real text that every Python carries, and a few added sentences to ask about."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

QUESTION = "\n\nQuestion about the text above. Answer: "


@dataclass(frozen=True)
class Needle:
    """A sentence that is put into the text; its first part is the question, its end the answer."""

    prompt: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.prompt} {self.answer}."

    @property
    def question(self) -> str:
        """What follows the text. Half a sentence to complete: a model of this size answers that best."""
        return QUESTION + self.prompt


# A number that nothing hints at, a name, a word: from hard to easy for a compressed context.
NEEDLES = (
    Needle("The special magic number for amber fox is", "73912"),
    Needle("The name of the museum's old black cat is", "Professor Whiskers"),
    Needle("The secret ingredient of the winning soup is", "ginger"),
)


@dataclass(frozen=True)
class Context:
    """A tokenized text and what to ask about it."""

    ids: Tensor  # i64[1, tokens]
    needles: tuple[Needle, ...]


def long_text() -> str:
    """Prose of the Python language reference, about 150 KB, in the order of its topic names.

    Grammar, code, tables and lists are left out. The text changes a little between versions of Python.
    """
    from pydoc_data.topics import topics  # half a megabyte

    blocks = (block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name]))
    return "\n\n".join(_plain(block) for block in blocks if _is_prose(block))


def make_context(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    needles: tuple[Needle, ...] = NEEDLES,
) -> Context:
    """The first `tokens` tokens of the text, with the needles at equal distances between its sentences."""
    added = sum(len(encode(tokenizer, f" {needle.sentence}")[0]) for needle in needles)
    text = long_text()
    end = len(str(tokenizer.decode(encode(tokenizer, text)[0, : tokens - added])))
    # From the last needle to the first: an insertion moves what follows it.
    for index, needle in reversed(list(enumerate(needles, start=1))):
        place = _sentence_end(text[:end], end * index // (len(needles) + 1))
        text = f"{text[:place]} {needle.sentence}{text[place:]}"
    return Context(encode(tokenizer, text)[:, :tokens], needles)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids i64[1, n] of the bare text, as a part of a longer one."""
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def _sentence_end(text: str, near: int) -> int:
    """The index behind the full stop nearest to `near` that a blank follows."""
    ends = [match.end() for match in re.finditer(r"\.(?=\s)", text)]
    return min(ends, key=lambda end: abs(end - near), default=len(text))


def _is_prose(block: str) -> bool:
    plain = _plain(block)
    return len(plain) > 80 and block[0].isupper() and plain.endswith(".") and "::=" not in plain


def _plain(block: str) -> str:
    quotes = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "*": None})
    return " ".join(block.translate(quotes).split())
