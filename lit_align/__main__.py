"""`python -m lit_align COMMAND ...`, installed as `lit-align`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: lit-align COMMAND [options]        (or: python -m lit_align COMMAND [options])

train and use one stage (LightningCLI; see COMMAND --help):
  fit        train:  lit-align fit --config configs/dpo.yaml [--config overlay.yaml] [--model.loss.beta=0.5]
  validate   metrics on the validation split of a checkpoint or of the model as it starts
  test       metrics on the test split
  predict    rewards, answers or log-probabilities, as rows in the run folder

before a run:
  data       check every record, or preview what the model will see:  lit-align data check --config configs/sft.yaml
  plan       what each device will hold and send, and how long it takes:  lit-align plan --config configs/dpo.yaml
  check      whether the update depends on how its work is split:  lit-align check --config configs/dpo.yaml

around the stages:
  pipeline   stages in a row, and a table of what each achieved:  --config configs/pipeline.yaml
  export     checkpoint, run folder or .gguf file to a Hugging Face folder:  --checkpoint PATH --out FOLDER
"""

TRAINING = ("fit", "validate", "test", "predict")
PLAIN = ("pipeline", "export")
DATA = ("data",)
CHECK = ("check",)
PLAN = ("plan",)
COMMANDS = (*TRAINING, *PLAIN, *DATA, *CHECK, *PLAN)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command and its options; by default those of the process.

    Returns:
        Exit status: 0, 1 for data that is not right, 2 for a configuration that is not right, 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        from lit_align import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        return _unknown_command(args[0])
    # The console script does not have the working directory on its path, `python -m` does; plugins may live there.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from lit_align.cli.noise import quieten

    quieten()  # before the imports, for some of it is made while libraries are imported
    # Lightning is imported only where it is needed: it takes seconds.
    if args[0] in TRAINING:
        from lit_align.cli.training import run
    elif args[0] in DATA:
        from lit_align.cli.data import run
    elif args[0] in CHECK:
        from lit_align.cli.check import run
    elif args[0] in PLAN:
        from lit_align.cli.plan import run
    else:
        from lit_align.cli.plain import run
    return run(args)


def _unknown_command(name: str) -> int:
    from difflib import get_close_matches

    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    print(f"lit-align: there is no command {name!r}{hint}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
