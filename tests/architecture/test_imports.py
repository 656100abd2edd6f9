"""Arrows between the packages run one way."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted([*(REPOSITORY / "lit_align").rglob("*.py"), *(REPOSITORY / "datamodules").rglob("*.py")])
OWN = ("lit_align", "datamodules")

# Part of the tree (first match counts) -> which of our packages it may import, besides itself.
INNER = {
    "lit_align.losses": (),
    "lit_align.batch": (),
    "lit_align.rollout.advantages": ("lit_align.losses",),
    "lit_align.models": ("lit_align.batch", "lit_align.sharded_checkpoint"),
    "lit_align.rollout": ("lit_align.batch", "lit_align.losses", "lit_align.models"),
    "lit_align.stages": ("lit_align.batch", "lit_align.losses", "lit_align.models", "lit_align.rollout"),
    "lit_align.runs": ("lit_align.sharded_metadata",),
    "lit_align.sharded_checkpoint": ("lit_align.sharded_metadata",),
    "lit_align.sharded_metadata": (),
    "lit_align.pipeline": ("lit_align.runs",),
    "lit_align.machine": (),
    "lit_align.callbacks": (
        "lit_align.batch",
        "lit_align.machine",
        "lit_align.models",
        "lit_align.rollout",
        "lit_align.runs",
    ),
    "lit_align": ("lit_align",),
    "datamodules": ("lit_align.batch",),
}
# Part of the tree -> the only libraries of others that it may import.
OUTER = {
    "lit_align.losses": {"torch"},
    "lit_align.batch": {"torch", "numpy"},
    "lit_align.rollout.advantages": {"torch"},
    "lit_align.runs": set(),
    "lit_align.sharded_checkpoint": {"torch"},
    "lit_align.sharded_metadata": {"torch"},
    "lit_align.pipeline": set(),
    "lit_align.machine": {"torch"},
}


def module_name(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(source, inside=""):
    """Modules named by the import statements of a file, wherever in it they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside}: relative imports hide where the arrow points"
            # `from lit_align import runs` imports the module `lit_align.runs`.
            whole = node.module == "lit_align"
            yield from (f"{node.module}.{alias.name}" if whole else node.module for alias in node.names)


def within(module, package):
    return module == package or module.startswith(f"{package}.")


def part_of(module):
    return next(part for part in INNER if within(module, part))


def wrong(module, source):
    """The imports of a module that point the wrong way."""
    part = part_of(module)
    for name in set(imports(source, module)):
        top = name.split(".")[0]
        if top in OWN:
            # A name of the package itself, such as its version, is no arrow.
            harmless = name == "lit_align" or name.startswith("lit_align.__")
            if not harmless and not any(within(name, package) for package in (part, *INNER[part])):
                yield name
        elif part in OUTER and top not in OUTER[part] and top not in sys.stdlib_module_names:
            yield name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_points_the_wrong_way(path):
    assert sorted(wrong(module_name(path), path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("lit_align.losses.policy", "def f():\n    import numpy", ["numpy"]),
        ("lit_align.losses.policy", "from lit_align.batch import pack", ["lit_align.batch"]),
        ("lit_align.models.load", "from lit_align.stages import LitSFT", ["lit_align.stages"]),
        ("lit_align.stages.dpo", "import datamodules.base", ["datamodules.base"]),
        ("lit_align.cli.training", "from datamodules import SFTDataModule", ["datamodules"]),
        ("datamodules.sft", "from lit_align.models import forward", ["lit_align.models"]),
        ("datamodules.sft", "from lit_align import LitSFT", ["lit_align.LitSFT"]),
        ("lit_align.rollout.advantages", "from transformers import AutoModel", ["transformers"]),
        ("lit_align.stages.dpo", "import math\nfrom lit_align.losses.preference import IPO", []),
        ("lit_align.callbacks.run_folder", "import lit_align\nfrom lit_align import __version__", []),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(module, source, found):
    assert list(wrong(module, source)) == found


def test_the_parts_are_all_there():
    names = {module_name(path) for path in FILES}
    assert [part for part in INNER if not any(within(name, part) for name in names)] == []


def test_only_the_plugin_finder_names_the_data_modules():
    said = [path for path in FILES if path.is_relative_to(REPOSITORY / "lit_align") and _names_datamodules(path)]
    assert [module_name(path) for path in said] == ["lit_align.cli.plugins"]


def _names_datamodules(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(isinstance(n, ast.Constant) and n.value == "datamodules" for n in nodes)
