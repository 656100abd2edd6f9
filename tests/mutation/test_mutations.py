"""Tests of the tests: each wrong edit of the source turns the test red that is named beside it.

All edits are applied to copies of the package and run in one go; every edit then has a verdict of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.edit import Edit
from tests.mutation.edits import EDITS

REPOSITORY = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1

pytestmark = pytest.mark.timeout(900)  # the first test of an edit runs the copies of all

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="copies run in forked processes")


def copy_of_package(folder: Path, edit: Edit | None = None) -> Path:
    """A copy of lit_align below `folder`, with the edit applied."""
    shutil.copytree(REPOSITORY / "lit_align", folder / "lit_align", ignore=shutil.ignore_patterns("__pycache__"))
    if edit is not None:
        file = folder / "lit_align" / edit.file
        file.write_text(file.read_text().replace(edit.old, edit.new))
    return folder


def run_copies(runs: list[tuple[Path, list[str]]]) -> list[int]:
    """Pytest's exit code of each list of tests against its copy."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_copies.py")],
        input=json.dumps([(str(folder), nodes) for folder, nodes in runs]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each edit's test against the edited copy."""
    folders = [copy_of_package(tmp_path_factory.mktemp("edited"), edit) for edit in EDITS]
    codes = run_copies([(folder, [edit.test]) for folder, edit in zip(folders, EDITS, strict=True)])
    outputs = [(folder / "log.txt").read_text() for folder in folders]
    return {edit.name: verdict for edit, verdict in zip(EDITS, zip(codes, outputs, strict=True), strict=True)}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_the_text_to_be_replaced_stands_exactly_once(edit):
    assert (REPOSITORY / "lit_align" / edit.file).read_text().count(edit.old) == 1
    assert edit.old != edit.new


def test_names_are_unique():
    assert len({edit.name for edit in EDITS}) == len(EDITS)


@needs_fork
@pytest.mark.slow
def test_without_an_edit_every_named_test_is_green(tmp_path):
    folder = copy_of_package(tmp_path)
    (code,) = run_copies([(folder, sorted({edit.test for edit in EDITS}))])
    assert code == PASSED, (folder / "log.txt").read_text()


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_wrong_edit_turns_its_test_red(edit, verdicts):
    code, output = verdicts[edit.name]
    assert code == FAILED, output
