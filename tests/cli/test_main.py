import subprocess
import sys

import pytest

import lit_align
from lit_align.__main__ import COMMANDS, USAGE, main

HEAVY = ("torch", "transformers", "lightning", "datasets")


def run(*args):
    check = f"import sys\nfrom lit_align.__main__ import main\nstatus = main({list(args)!r})\n"
    check += f"print([name for name in {HEAVY} if name in sys.modules])\nsys.exit(status)"
    root = str(__import__("pathlib").Path(lit_align.__file__).parents[1])
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=root, check=False)


def test_help_names_every_command_and_imports_nothing_heavy():
    done = run("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if f"  {name} " not in USAGE] == []
    assert done.stdout.startswith("usage: lit-align") and done.stdout.endswith("[]\n")


def test_a_plain_command_imports_nothing_heavy():
    done = run("pipeline", "--stages", "[]", "--table", "{}")
    assert done.returncode == 1
    assert "expected at least one stage" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout.endswith("[]\n")


def test_no_command_is_an_error_that_shows_the_usage(capsys):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_an_unknown_command_gets_the_closest_one(capsys):
    assert main(["fitt"]) == 2
    assert "did you mean fit?" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lit_align.__version__


@pytest.mark.parametrize("name", [name for name in lit_align.__all__ if name != "__version__"])
def test_every_name_of_the_library_can_be_had_from_it(name):
    assert getattr(lit_align, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LitNothing"):
        _ = lit_align.LitNothing
