"""Libraries log nothing while something loads, and log as before afterward."""

import logging
from collections.abc import Iterator

import pytest

from fedtune.models.quiet import quiet

LIBRARIES = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "peft")]


@pytest.fixture
def verbose() -> Iterator[None]:
    levels = [logger.level for logger in LIBRARIES]
    for logger in LIBRARIES:
        logger.setLevel(logging.WARNING)
    yield
    for logger, level in zip(LIBRARIES, levels, strict=True):
        logger.setLevel(level)


def warn() -> list[bool]:
    """Whether a module of each library logs warnings; its logger remembers the answer."""
    return [logger.getChild("module").isEnabledFor(logging.WARNING) for logger in LIBRARIES]


@pytest.mark.usefixtures("verbose")
def test_the_loggers_of_libraries_are_silent_inside_only() -> None:
    assert warn() == [True, True, True]
    with quiet():
        assert warn() == [False, False, False]
        with quiet():
            assert warn() == [False, False, False]
        assert warn() == [False, False, False]
    assert warn() == [True, True, True]
