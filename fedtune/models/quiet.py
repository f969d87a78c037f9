"""Silence libraries during loading."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

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
    for logger in loggers:
        _set_level(logger, logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            _set_level(logger, level)


def _set_level(logger: logging.Logger, level: int) -> None:
    """Skip an unchanged level: setting it clears the cache of thousands of loggers, which makes nested `quiet` slow."""
    if logger.level != level:
        logger.setLevel(level)
