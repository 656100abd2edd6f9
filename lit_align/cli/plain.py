"""Commands that are plain typed functions: `pipeline` and `export`."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli, auto_parser

from lit_align import runs
from lit_align.cli.errors import explain, message_for_user
from lit_align.pipeline import pipeline


def export(
    checkpoint: Path,
    out: Path,
    role: str | None = None,
    merge_lora: bool = True,
    trust_remote_code: bool = False,
    for_trunk: bool = False,
) -> None:
    """Turns what was trained into a Hugging Face folder that plain transformers loads.

    Args:
        checkpoint: A .ckpt file, a run folder (its newest checkpoint), or a .gguf file (it is dequantised).
        out: The folder to write; one that holds an exported model and nothing else is replaced.
        role: Which network of the checkpoint: policy, reward_model or critic; by default the one that the stage trains.
        merge_lora: Fold adapters into their base; false writes the adapter alone.
        trust_remote_code: Run Python code that comes with the model, if it was trained with such code. Read it first.
        for_trunk: Write adapters and head alone, for `shared_trunk` of LitPPO (docs/ppo_trunk.md).
    """
    if not checkpoint.exists():
        raise ValueError(f"checkpoint: there is no {checkpoint}; expected a .ckpt, a run folder or a .gguf file")
    if checkpoint.suffix == ".gguf":
        _export_gguf(checkpoint, out)
    else:
        from lit_align.models.export import export as export_checkpoint

        whole_run = checkpoint.is_dir() and (checkpoint / runs.CHECKPOINTS).is_dir()
        found = runs.last_checkpoint(checkpoint) if whole_run else checkpoint
        if not runs.is_whole(found):
            raise ValueError(f"checkpoint: {found} is no checkpoint, or was cut; {_instead(found)}")
        export_checkpoint(str(found), str(out), role, merge_lora, trust_remote_code, for_trunk)
    print(f"wrote {out}")


def _instead(path: Path) -> str:
    """What the user may have meant: the checkpoint of a run in or around the path."""
    runs_inside = sorted(folder.parent for folder in path.glob(f"*/{runs.CHECKPOINTS}"))
    for run_dir in (path / runs.LATEST, path.parent, path.parent.parent, *reversed(runs_inside)):
        if (found := runs.newest_checkpoint(run_dir)) is not None:
            return f"give the run folder {run_dir}, or one of its checkpoints: {found}"
    return "a run folder gives its newest whole one"


def _export_gguf(file: Path, out: Path) -> None:
    from lit_align.models.export import export_module
    from lit_align.models.folder import place_for
    from lit_align.models.load import load_causal_lm
    from lit_align.models.source import ModelSource
    from lit_align.models.tokens import load_tokenizer

    place_for(out)
    source = ModelSource(path=str(file))
    export_module(load_causal_lm(source), load_tokenizer(source), out)


COMMANDS: dict[str, Callable[..., None]] = {"pipeline": pipeline, "export": export}


def run(args: Sequence[str]) -> int:
    """Runs one command; see `lit_align.__main__.main` for the exit status."""
    name, rest = args[0], list(args[1:])
    settings: dict[str, Any] = {"as_positional": False, "prog": f"lit-align {name}", "exit_on_error": False}
    try:
        auto_cli(COMMANDS[name], args=rest, **settings)
    except ArgumentError as error:
        parser = auto_parser(COMMANDS[name], **settings)
        options = parser.get_defaults(skip_validation=True).keys()
        print(explain(error, rest, options, ()).text(rest), file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        message = message_for_user(error, ("lit_align",))
        if message is None:
            raise
        print(f"lit-align: {message}", file=sys.stderr)
        return 1
    return 0
