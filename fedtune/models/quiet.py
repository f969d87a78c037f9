"""Silence libraries during loading."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without the libraries' progress bars, log lines and warnings: fedtune checks their causes itself and raises errors."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.get_verbosity()  # the first call sets up transformers' logger
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "peft")]
    levels = [logger.level for logger in loggers]
    if bars:
        hf_logging.disable_progress_bar()
    _set_levels(loggers, [logging.ERROR] * len(loggers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
        _set_levels(loggers, levels)


def _set_levels(loggers: Sequence[logging.Logger], levels: Sequence[int]) -> None:
    """Set the levels that change. `setLevel` clears the caches of thousands of loggers, so it is called once, for the last one."""
    changed = [(logger, level) for logger, level in zip(loggers, levels, strict=True) if logger.level != level]
    for logger, level in changed:
        logger.level = level
    for logger, level in changed[-1:]:
        logger.setLevel(level)
