"""The version of fedtune; pyproject.toml has it too, as a literal, because Flower reads it there."""

__version__ = "0.1.0"
