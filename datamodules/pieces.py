"""Token ids as texts for people: what each token adds to the text, and what cannot be seen made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"

LINE_END, BLANK, TAB, PART = "↵", "·", "⇥", "⋯"
"""Stand for a line break, a blank, a tab, and a token that is only the beginning of a character."""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; together they are the whole text.

    A character that is spread over several tokens stands at the last of them; the others get an empty text.
    """
    texts: list[str] = []
    # Decoded anew are the tokens [start:]: [start:whole] for the blank that may belong between them and the next ones.
    start = whole = written = 0
    for stop in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:stop])
        sure = len(text if stop == len(ids) else text.rstrip(UNFINISHED))
        texts.append(text[written:sure])
        written = max(written, sure)
        if sure == len(text):
            start, whole = whole, stop
            written = len(_decode(tokenizer, ids[start:whole]))
    return texts


def visible(text: str) -> str:
    """A token's text with line breaks, tabs and blanks as signs, and all else that cannot be seen as escapes."""
    if not text:
        return PART
    return printable(text.replace("\n", LINE_END).replace("\t", TAB).replace(" ", BLANK))


def printable(text: str) -> str:
    """The text with what a terminal or a page would not show, or would obey, as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" or _is_blank(c) else _escape(c) for c in text)


def _is_blank(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
