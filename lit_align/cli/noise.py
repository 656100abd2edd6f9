"""Messages of other libraries that help nobody in a run of ours."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning 2.6 on torch 2.13
    r".*does not have many workers which may be a bottleneck.*",  # micro-batches are planned and small
    r".*Experiment logs directory .* exists and is not empty.*",  # so it is meant: one folder holds the whole run
    r"(?s).*Be aware that when using `ckpt_path`, callbacks used.*",  # validate and predict need none of them
    r".*is smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",  # so it does after a resume
    r".*`is_gradient_checkpointing` is deprecated.*",  # peft on transformers 5
    r".*`self\.log\(.*sync_dist=True\)`.*",  # what is logged is reduced over the ranks already
    r".*module\(s\) in eval mode at the start of training.*",  # the reference and the reward model are
)
_ADVERTISEMENTS = ("litlogger", "litmodels")


def quieten() -> None:
    """Hides them, once per process."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    # bitsandbytes warns on every CPU that an optional package of kernels is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.logger_connector"):
        logging.getLogger(name).addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _ADVERTISEMENTS)
