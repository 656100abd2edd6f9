"""The small tokenizers and chat templates of the data modules' tests, for the properties too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "datamodules" / "conftest.py"
_spec = importlib.util.spec_from_file_location("datamodules_conftest", _path)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

make_tokenizer, tokenizer, write, _own_cache = (
    _shared.make_tokenizer,
    _shared.tokenizer,
    _shared.write,
    _shared._own_cache,
)
