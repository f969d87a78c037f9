"""Sources of rows: the demo homes, the hub, or local files. The rows keep the source's columns; `columns.py` maps them to fedtune's."""

import dataclasses

from fedtune.config import Config
from fedtune.contracts.rows import RowSet
from fedtune.data.columns import demo_columns, read_columns
from fedtune.data.demo import generate
from fedtune.data.local import read_local


def read_source(config: Config) -> tuple[Config, RowSet, RowSet | None]:
    """The config with the source's templates and columns, the training rows, and the test rows (None: to be split off).

    Raises:
        DataError: The source cannot be read.
    """
    if config.data.source == "hub":
        from fedtune.data.hub import read_hub  # imported late, because it loads pandas and Arrow

        return config, *read_hub(config.data)
    if config.data.source == "local":
        return config, *read_local(config.data, read_columns(config))
    train, test = map(_rows, generate(config.seed, homes=config.data.homes))
    return dataclasses.replace(config, data=demo_columns(config)), train, test


def _rows(homes: list[dict[str, str]]) -> RowSet:
    return RowSet({name: [row[name] for row in homes] for name in homes[0]}, dict.fromkeys(homes[0], "string"))
