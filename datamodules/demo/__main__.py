"""Makes the committed files of the demo: `python -m datamodules.demo corpus`, `tokenizer`, `assets`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from datamodules.demo.corpus import corpus
from datamodules.demo.start import write_assets
from datamodules.demo.tokenizer import save_tokenizer, texts_of, train_tokenizer

HERE = Path(__file__).resolve().parent


def write_corpus(out: Path, seed: int) -> None:
    """Writes the files of all four data forms."""
    out.mkdir(parents=True, exist_ok=True)
    files = corpus(seed)
    for name, content in files.items():
        (out / name).write_bytes(content)
    print(f"{out}: {len(files)} files, {sum(map(len, files.values())) / 1e3:.0f} kB")


def write_tokenizer(out: Path, seed: int) -> None:
    """Trains the tokenizer on the corpus of that seed and writes it."""
    tokenizer = train_tokenizer(texts_of(corpus(seed)))
    save_tokenizer(tokenizer, out)
    print(f"{out}: {len(tokenizer)} entries")


COMMANDS: dict[str, tuple[Callable[[Path, int], None], Path]] = {
    "corpus": (write_corpus, HERE / "corpus"),
    "tokenizer": (write_tokenizer, HERE / "tokenizer"),
    "assets": (write_assets, HERE / "assets"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        arguments: What stands behind the program's name; None = taken from the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m datamodules.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, out) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("--out", type=Path, default=out, help="folder to write to (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0, help="of corpus or training (default: %(default)s)")
    options = parser.parse_args(arguments)
    run, _ = COMMANDS[options.command]
    run(options.out, options.seed)


if __name__ == "__main__":
    main()
