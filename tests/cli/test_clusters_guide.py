"""The guide's snippets are commands and code that parse; nothing of them is run."""

import ast
import re
import shlex
import subprocess

import pytest

from lit_align.cli.plugins import import_classes
from lit_align.cli.training import AlignCLI


@pytest.fixture
def snippets(repository):
    text = (repository / "docs" / "clusters.md").read_text(encoding="utf-8")
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def commands(snippets):
    """Every `lit_align fit` of the guide, as a list of arguments."""
    found = []
    for kind, code in snippets:
        if kind == "python":
            code = next(n.value.value for n in ast.parse(code).body if isinstance(n, ast.Assign))
        for line in code.replace("\\\n", " ").splitlines():
            if " lit_align fit " in line:
                found.append(shlex.split(line.partition(" lit_align fit ")[2]))
    return found


def test_the_python_is_valid(snippets):
    (code,) = [code for kind, code in snippets if kind == "python"]
    (call,) = [n.value for n in ast.parse(code).body if isinstance(n, ast.Expr)]
    assert {k.arg for k in call.keywords} >= {"name", "machine", "num_machines", "command"} and not call.args


def test_the_scripts_are_valid(snippets):
    scripts = [code for kind, code in snippets if kind == "bash"]
    assert len(scripts) == 2
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_every_command_is_a_configuration(snippets, repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(AlignCLI, "before_instantiate_classes", lambda self: None)
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(AlignCLI, "_run_subcommand", lambda self, name: None)
    packages, found = import_classes(), commands(snippets)
    assert len(found) == 3
    for arguments in found:
        config = AlignCLI(["fit", *arguments], packages).command_config
        assert config["trainer"]["num_nodes"] in (2, 4) and config["trainer"]["strategy"] == "fsdp2"
        assert config["resume"] is True and config["checkpoint_every"] == 100
