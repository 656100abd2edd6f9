"""A preview as text, for terminals and for files."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby

from datamodules.pieces import BLANK, LINE_END, PART, TAB, printable, visible
from datamodules.views import ExampleView, Part, Preview, Token

TRAINED, SEEN, RESET = "\033[1;32m", "\033[2m", "\033[0m"
OPENS, CLOSES = "⟦", "⟧"
WIDEST_ROLE = 16


def as_text(preview: Preview, color: bool, width: int) -> str:
    """The preview's lines; see `Preview.text`."""
    return "\n".join(_lines(preview, color, width))


def legend(color: bool) -> str:
    """One line that explains the signs."""
    trained = (
        f"{TRAINED}trained{RESET} {SEEN}seen, not trained{RESET}" if color else f"{OPENS}trained{CLOSES}, else seen"
    )
    signs = f"{LINE_END} line break, {BLANK} blank, {TAB} tab, {PART} part of a character that goes on"
    return f"legend: {trained}; {signs}"


def _lines(preview: Preview, color: bool, width: int) -> Iterator[str]:
    yield printable(preview.title)
    yield legend(color)
    yield from (printable(f"warning: {text}") for text in preview.warnings)
    for number, view in enumerate(preview.examples, start=1):
        yield ""
        yield printable(f"example {number}: {view.origin} (number {view.index} of the split)")
        yield f"  {view.batch}"
        yield from _part_lines(view)
        for part in view.parts:
            yield f"  {part.name}, as text:"
            yield from (f"    {line}" for line in _text_lines(part, color))
        yield f"  tokens\n    {'column':>6} {'pos.':>6} {'weight':>6}  {'role':<{WIDEST_ROLE}} id and text of each"
        for part in view.parts:
            yield from _token_lines(part, color, width)


def _part_lines(view: ExampleView) -> Iterator[str]:
    for part in view.parts:
        trained = sum(token.weight > 0 for token in part.tokens)
        place = f"columns {part.start}:{part.stop} of row {part.row}, {trained} of {len(part.tokens)} tokens trained"
        prefix = f", also sees the prompt in {part.prefix[0]}:{part.prefix[1]}" if part.prefix else ""
        yield f"  {part.name:<10}{place}{prefix}"
    if view.values:
        yield "  " + ", ".join(f"{name} {value:g}" for name, value in view.values.items())


def _text_lines(part: Part, color: bool) -> list[str]:
    """The text with line breaks shown and kept; what is trained is marked on each line anew."""
    lines = [""]
    for trained, group in groupby(part.tokens, key=lambda token: token.weight > 0):
        text = _unmarked(printable("".join(token.text for token in group)), color).replace("\n", f"{LINE_END}\n")
        first, *rest = text.split("\n")
        lines[-1] += _marked(first, trained, color)
        lines += [_marked(line, trained, color) for line in rest]
    return lines if lines[-1] else lines[:-1]


def _unmarked(text: str, color: bool) -> str:
    """The data's text without the signs that mean something here."""
    return text if color else text.translate({ord(OPENS): "\\u27e6", ord(CLOSES): "\\u27e7"})


def _marked(text: str, trained: bool, color: bool) -> str:
    if not text or (not color and not trained):
        return text
    return f"{TRAINED if trained else SEEN}{text}{RESET}" if color else f"{OPENS}{text}{CLOSES}"


def _token_lines(part: Part, color: bool, width: int) -> Iterator[str]:
    for (role, weight), group in groupby(part.tokens, key=lambda token: (token.role, token.weight)):
        line, used = "", 0
        first: Token | None = None
        for token in group:
            text = f"{token.id} {_unmarked(visible(token.text), color)}"
            if first is not None and used + _columns(text) > width - 34:
                yield _token_line(first, role, weight, line, color)
                line, used, first = "", 0, None
            first = first or token
            line += f"  {text}" if line else text
            used += _columns(text) + 2
        if first is not None:
            yield _token_line(first, role, weight, line, color)


def _token_line(first: Token, role: str, weight: float, line: str, color: bool) -> str:
    shown = _marked(line, weight > 0, color)
    return f"    {first.place:>6} {first.position:>6} {weight:>6.3g}  {role[:WIDEST_ROLE]:<{WIDEST_ROLE}} {shown}"


def _columns(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
