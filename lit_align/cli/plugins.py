"""Finding classes that the command line may name without their module: the library's own and plugins'."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from importlib.util import find_spec

GROUP = "lit_align.plugins"
# In a checkout that is not installed there are no entry points; what pyproject.toml says then stands here.
IN_A_CHECKOUT = ("datamodules",)


def import_classes() -> tuple[str, ...]:
    """Imports the stages and every plugin.

    Returns:
        Top-level names of the packages whose own errors are messages for the user.

    Raises:
        ValueError: A plugin that is installed cannot be imported.
    """
    importlib.import_module("lit_align.stages")
    plugins = plugin_modules()
    for name in plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"plugin {name!r} (entry point group {GROUP!r}) cannot be imported: {error}; "
                "mend or uninstall the package that brings it"
            ) from error
    return ("lit_align", *dict.fromkeys(name.split(".")[0] for name in plugins))


def plugin_modules() -> tuple[str, ...]:
    """Modules named by the entry points; in a checkout that is not installed, those that lie in it."""
    installed = {point.value.split(":")[0] for point in entry_points(group=GROUP)}
    lying = {name for name in IN_A_CHECKOUT if find_spec(name) is not None}
    return tuple(sorted(installed | lying))
