"""Less noise from transformers: progress bars of a second, and a report on weights that this library checks itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """While open, transformers shows no progress bars and no report on missing and unexpected weights."""
    log = getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    log.addFilter(_is_no_report)
    try:
        yield
    finally:
        log.removeFilter(_is_no_report)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_no_report(record: LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
