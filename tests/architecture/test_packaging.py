"""What is installed is what is needed, and the wheel holds both packages."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def pins():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)) for r in requirements}


def test_every_dependency_is_pinned_to_a_version_that_the_project_takes():
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        pin = pins()[canonicalize_name(requirement.name)]
        assert pin.operator == "==" and Version(pin.version) in requirement.specifier, str(requirement)


def test_pins_are_plain_versions_that_any_index_has():
    assert [name for name, pin in pins().items() if not re.fullmatch(r"[\w.]+", pin.version)] == []


def _imported_by_the_project():
    for path in [*(REPOSITORY / "lit_align").rglob("*.py"), *(REPOSITORY / "datamodules").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]


def test_every_library_that_is_imported_is_a_declared_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["vllm"]]
    declared = {canonicalize_name(Requirement(r).name) for r in wanted}
    other_names = {"yaml": "pyyaml", "lightning_utilities": "lightning", "jinja2": "transformers"}
    used = set(_imported_by_the_project()) - set(sys.stdlib_module_names) - {"lit_align", "datamodules"}
    assert {name for name in used if canonicalize_name(other_names.get(name, name)) not in declared} == set()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel installed in it, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("lit_align", "datamodules"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *built], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def _run(site, cwd, *command):
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_the_wheel_works_in_another_directory(installed, tmp_path):
    where = "import lit_align, datamodules; print(lit_align.__file__, datamodules.__file__)"
    assert all(path.startswith(str(installed)) for path in _run(installed, tmp_path, "-c", where).split())
    assert _run(installed, tmp_path, "-m", "lit_align", "--help").startswith("usage: lit-align")
    plugins = "from lit_align.cli.plugins import import_classes; print(import_classes())"
    assert "'datamodules'" in _run(installed, tmp_path, "-c", plugins)
    short_names = "fit", "--model.help=LitDPO"
    assert "--model.policy.path" in _run(installed, tmp_path, "-m", "lit_align", *short_names)


@pytest.mark.slow
def test_the_wheel_carries_the_demo_and_nothing_that_is_not_the_project(installed):
    def data(root):
        files = (path for path in Path(root, "datamodules", "demo").rglob("*") if path.is_file())
        return {str(path.relative_to(root)) for path in files if path.suffix not in (".py", ".pyc")}

    assert data(installed) == data(REPOSITORY)
    assert {path.name for path in installed.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")} == {
        "lit_align",
        "datamodules",
        "bin",
    }
