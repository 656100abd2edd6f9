"""Errors as a few lines for people: where, what, and how to mend it.

Two sources: what jsonargparse says about a configuration (long, nested, without file and line), and `ValueError`s
that this library, its plugins or Lightning raise on purpose. Whatever else is raised is a bug: it keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_align.cli.keys import class_at, class_names, closest, config_files, options_of, type_of, where_of

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":?\s*(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)'")
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
_OPTION = re.compile(r"Option '(?P<name>[^']+)' is not accepted")
_GROUP = re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'")
_SUBCOMMAND = re.compile(r"Subcommand '[^']+' does not accept option '(?P<name>[^']+)'")
_ARGUMENT = re.compile(r"[Uu]nrecognized arguments: (?:--)?(?P<name>[^\s=]+)")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
_NO_CLASS = re.compile(r"Expected a (?:path but|dot import path string:) (?P<name>[\w.]+)")
_NO_FILE = re.compile(r"File does not exist: '?(?P<path>[^']+)'?")
_TYPE = re.compile(r"Expected an? <class '(?P<type>[\w.]+)'>\. Got value: (?P<value>.*)")
_NO_FUNCTION = re.compile(r"expects a function or a callable class: (?P<why>.+?)(?:\. Got value: (?P<value>.*))?$")
_IN_VALUE = re.compile(r"class_path='(?P<path>[^']+)'")


@dataclass
class Problem:
    """What is wrong with a configuration.

    Attributes:
        what: One line.
        key: Dotted key that it is about.
        mend: What to do.
        where: Where the user wrote it, if that is known already.
    """

    what: str
    key: str = ""
    mend: str = ""
    where: str | None = None

    def text(self, args: Sequence[str]) -> str:
        """The lines to print, given the command that was asked for."""
        where = self.where or (where_of(self.key, args) if self.key else None)
        rows = {"where": ", ".join(filter(None, (where, self.key))), "problem": self.what, "mend": self.mend}
        lines = [f"  {name + ':':<9}{row}" for name, row in rows.items() if row]
        return "\n".join(["lit-align: the configuration is not right", *lines])


@dataclass
class _Complaint:
    """What jsonargparse's message says, taken apart."""

    keys: list[str] = field(default_factory=list)
    owner: Any = None
    leaves: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, message: str) -> _Complaint:
        self = cls()
        for raw in message.splitlines():
            line = raw.strip().removeprefix("- ")
            if match := _KEY.match(line):
                self.keys.append(match["key"])
                line = match["rest"]
            if match := _CLASS.match(line):
                self.owner = class_at(match["path"])
            elif line and not line.startswith(_NOISE):
                self.leaves.append(line)
        return self

    def key(self, name: str = "") -> str:
        return ".".join((*self.keys, name) if name else self.keys)


def explain(error: ArgumentError, args: Sequence[str], options: Iterable[str], packages: Iterable[str]) -> Problem:
    """Says what jsonargparse found wrong.

    Args:
        error: What it raised.
        args: The command's arguments.
        options: All dotted keys of the command.
        packages: Packages whose classes a user may have meant.
    """
    message = str(error)
    if broken := _broken_yaml(args):
        return broken
    complaint = _Complaint.parse(message)
    for leaf in complaint.leaves:
        problem = _option_problem(leaf, complaint, list(options)) or _value_problem(leaf, complaint, packages)
        if problem:
            return problem
    what = " ".join(dict.fromkeys(complaint.leaves[:3])) or message
    return Problem(what, complaint.key())


def _option_problem(leaf: str, complaint: _Complaint, options: list[str]) -> Problem | None:
    """An option that does not exist, or one that is missing."""
    if match := _SUBCOMMAND.search(leaf):
        return _unknown_top_level(match["name"], options)
    if match := _GROUP.search(leaf):
        return _unknown(f"{match['group']}.{match['name']}", complaint, complaint.owner, options)
    if match := _OPTION.search(leaf):
        inner = _IN_VALUE.search(leaf, match.end())
        return _unknown(match["name"], complaint, class_at(inner["path"]) if inner else complaint.owner, options)
    if match := _ARGUMENT.search(leaf):
        return _unknown(match["name"], complaint, complaint.owner, options)
    if match := _REQUIRED.search(leaf):
        names = [name.split(".", 1)[-1] for name in match["names"].split(", ")]
        key = complaint.key(names[0])
        what = f"{', '.join(names)} must be given" + (f" for {_name(complaint.owner)}" if complaint.owner else "")
        return Problem(what, key, f"set it in a file, or with --{key}=...")
    return None


def _value_problem(leaf: str, complaint: _Complaint, packages: Iterable[str]) -> Problem | None:
    """An option whose value cannot be."""
    if match := _NO_FILE.search(leaf):
        path = _relative(Path(match["path"]))
        near = closest(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else None
        return Problem(f"no file {path}", complaint.key(), f"did you mean {path.parent / near}?" if near else "")
    if match := _NO_CLASS.search(leaf):
        name = match["name"]
        near = closest(name.rsplit(".", 1)[-1], class_names(packages))
        mend = f"did you mean {near}?" if near else "give the import path of a class, module.Class"
        return Problem(f"there is no class {name}", complaint.key(), mend)
    if match := _NO_FUNCTION.search(leaf):
        return Problem(match["why"], complaint.key(), "give the import path of a function, module.function")
    if match := _TYPE.search(leaf):
        return Problem(f"expected {match['type']}, got {match['value']}", complaint.key())
    return None


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _unknown(name: str, complaint: _Complaint, owner: Any, top_level: list[str]) -> Problem:
    """Follows a dotted name into `owner` as far as it goes."""
    if owner is None:
        return _unknown_top_level(name, top_level)
    known: list[str] = []
    for part in name.split("."):
        options = options_of(owner)
        if part not in options:
            key = complaint.key(".".join((*known, part)))
            return Problem(_no_such(part, options, _name(owner)), key, _choices(options, _name(owner)))
        known.append(part)
        owner = type_of(owner, part)
    return Problem(f"{name} is not accepted here", complaint.key(name))


def _unknown_top_level(name: str, options: list[str]) -> Problem:
    first = name.split(".")[0]
    tops = list(dict.fromkeys(option.split(".")[0] for option in options))
    if first not in tops:
        return Problem(_no_such(first, tops, "the command"), first, _choices(tops, "the command"))
    near = closest(name, options)
    inner = [option.removeprefix(f"{first}.") for option in options if option.startswith(f"{first}.")]
    mend = f"did you mean {near}?" if near else _choices(inner, first)
    return Problem(f"there is no option {name}", name, mend)


def _no_such(name: str, options: list[str], owner: str) -> str:
    near = closest(name, options)
    return f"{owner} takes no option {name!r}" + (f"; did you mean {near!r}?" if near else "")


def _choices(options: list[str], owner: str) -> str:
    return f"{owner} takes: {', '.join(options)}" if options else ""


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or re.sub(r"[\w.]+\.(\w)", r"\1", str(kind))


def _broken_yaml(args: Sequence[str]) -> Problem | None:
    for file in config_files(args):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except OSError:
            continue  # jsonargparse has said it already
        except UnicodeDecodeError as error:
            return Problem(f"the file is not UTF-8: {error.reason} at byte {error.start}", where=str(file))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
            what = ", ".join(filter(None, (error.context, error.problem)))
            return Problem(f"not YAML: {what}", where=where)
    return None


def tell(error: Exception, packages: Iterable[str]) -> None:
    """Prints an error that was raised on purpose; a bug, or any error under LIT_ALIGN_DEBUG=1, is raised again."""
    message = message_for_user(error, packages)
    if message is None or os.environ.get("LIT_ALIGN_DEBUG") == "1":
        raise error
    print(f"lit-align: {message}\n(LIT_ALIGN_DEBUG=1 shows where it comes from)", file=sys.stderr)


def message_for_user(error: BaseException, packages: Iterable[str]) -> str | None:
    """The message of an error that was raised on purpose, for the user; None if it is a bug.

    On purpose: a `ValueError` or `FileNotFoundError` that a `raise` statement of one of `packages` threw, or
    Lightning's `MisconfigurationException`. A ValueError out of a built-in or another library is a bug.
    """
    tops = set(packages)
    for one in _chain(error):
        if type(one).__name__ == "MisconfigurationException":  # by name: plain commands do without Lightning
            return str(one)
        if isinstance(one, (ValueError, FileNotFoundError)) and _raised_in(one, tops):
            return str(one)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_in(error: BaseException, packages: set[str]) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    home = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
    # Built-ins have no frame: int("x") in our code ends in our frame too, but not at a raise statement.
    return home in packages and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
