"""A preview as one HTML page: no script, no other file, nothing from the network; all data escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from datamodules.pieces import BLANK, LINE_END, PART, TAB, printable, visible
from datamodules.views import ExampleView, Part, Preview, Token

STYLE = """
:root { color-scheme: light dark; --line: #8886; --trained: #0a7d3322; --mark: #0a7d33; --soft: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1rem; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .1rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
td.l, th.l { text-align: left; overflow-wrap: anywhere; white-space: pre-wrap; } th { color: var(--soft); }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem; }
.t { outline: 1px solid var(--line); outline-offset: -1px; padding: 2px 0; }
.y { background: var(--trained); border-bottom: 2px solid var(--mark); }
.s { color: var(--soft); } .role, .soft { color: var(--soft); font: 12px system-ui, sans-serif; }
.role { border: 1px solid var(--line); border-radius: 3px; padding: 0 .3rem; margin-right: .3rem; }
.warning { border-left: 3px solid #c60; padding-left: .6rem; }
summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def as_html(preview: Preview) -> str:
    """The whole page; see `Preview.html`."""
    return "\n".join(_page(preview)) + "\n"


def _page(preview: Preview) -> Iterator[str]:
    title = _safe(preview.title)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield f"<p>{_legend()}</p>"
    yield from (f'<p class="warning">{_safe(text)}</p>' for text in preview.warnings)
    for number, view in enumerate(preview.examples, start=1):
        yield from _section(number, view)
    yield "</body>\n</html>"


def _legend() -> str:
    signs = f"{LINE_END} line break, {BLANK} blank, {TAB} tab, {PART} part of a character that goes on"
    return (
        '<span class="t y">trained</span> <span class="t s">seen, not trained</span>; '
        f"each frame is a token, which says its numbers when it is pointed at; {signs}"
    )


def _section(number: int, view: ExampleView) -> Iterator[str]:
    note = f'<span class="soft">number {view.index} of the split</span>'
    yield f"<section>\n<h2>{number}. {_safe(view.origin)} {note}</h2>"
    yield f'<p class="soft">{_safe(view.batch)}</p>'
    if view.values:
        yield f"<p>{_safe(', '.join(f'{name} {value:g}' for name, value in view.values.items()))}</p>"
    yield _part_table(view)
    for part in view.parts:
        yield f'<div class="soft">{_safe(part.name)}</div>\n<div class="text">{_runs(part)}</div>'
    yield _token_table(view)
    yield "</section>"


def _part_table(view: ExampleView) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("row", "start", "stop", "also sees", "tokens", "trained"))
    rows = []
    for part in view.parts:
        prefix = f"{part.prefix[0]}:{part.prefix[1]}" if part.prefix else ""
        trained = sum(token.weight > 0 for token in part.tokens)
        cells = (part.row, part.start, part.stop, prefix, len(part.tokens), trained)
        rows.append(f'<tr><td class="l">{_safe(part.name)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return f'<table><tr><th class="l">part</th>{head}</tr>{"".join(rows)}</table>'


def _runs(part: Part) -> str:
    """The text, token by token, with a label where the role changes."""
    runs = []
    for role, group in groupby(part.tokens, key=lambda token: token.role):
        label = f'<span class="role">{_safe(role)}</span>' if role else ""
        runs.append(label + "".join(_token(token) for token in group))
    return "".join(runs)


def _token(token: Token) -> str:
    numbers = f"id {token.id}, position {token.position}, column {token.place}, weight {token.weight:g}"
    text = _safe(_shown(token.text)).replace("\n", f"{LINE_END}\n")
    return f'<span class="t {"y" if token.weight > 0 else "s"}" title="{numbers}">{text}</span>'


def _shown(text: str) -> str:
    """A text to be read; a token of blanks alone is made visible."""
    if not text.strip(" \t"):
        return visible(text)
    return text.replace("\t", TAB)


def _token_table(view: ExampleView) -> str:
    names = ("column", "position", "id", "weight")
    head = "".join(f"<th>{name}</th>" for name in names) + '<th class="l">role</th><th class="l">token</th>'
    rows = "".join(_token_row(token) for part in view.parts for token in part.tokens)
    return f"<details><summary>all tokens</summary><table><tr>{head}</tr>{rows}</table></details>"


def _token_row(token: Token) -> str:
    cells = "".join(f"<td>{cell}</td>" for cell in (token.place, token.position, token.id, f"{token.weight:g}"))
    text = f'<span class="{"y" if token.weight > 0 else "s"}">{_safe(visible(token.text))}</span>'
    return f'<tr>{cells}<td class="l">{_safe(token.role)}</td><td class="l">{text}</td></tr>'


def _safe(text: str) -> str:
    return escape(printable(text), quote=True)
