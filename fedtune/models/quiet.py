"""Loading without chatter."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings from the libraries: what matters in them is checked and raised as an error."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.get_verbosity()  # transformers sets up its logger when it is first asked
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
    """Setting a level forgets what thousands of loggers know of theirs, even where it is the same: quiet inside quiet would take long."""
    if logger.level != level:
        logger.setLevel(level)
