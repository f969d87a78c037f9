"""Silence libraries during loading."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

from transformers.utils import logging as hf_logging

_LIBRARIES = ("transformers", "bitsandbytes", "peft")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without the libraries' progress bars, log lines and warnings: fedtune checks their causes itself and raises errors."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.get_verbosity()  # the first call sets up transformers' logger
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
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
    """Set the levels. `setLevel` would clear the caches of thousands of loggers, a millisecond; those of the libraries suffice."""
    if [logger.level for logger in loggers] == list(levels):
        return
    for logger, level in zip(loggers, levels, strict=True):
        logger.level = level
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith(_LIBRARIES) and isinstance(logger, logging.Logger):
            logger._cache.clear()  # type: ignore[attr-defined]
