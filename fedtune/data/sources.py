"""Sources of rows: the demo homes, the hub, or local files. Rows keep the source's columns; `columns.py` maps them to fedtune's."""

import dataclasses

import datasets

from fedtune.config import Config
from fedtune.data.columns import demo_columns, read_columns
from fedtune.data.demo import generate
from fedtune.data.hub import read_hub
from fedtune.data.local import read_local


def read_source(config: Config) -> tuple[Config, datasets.Dataset, datasets.Dataset | None]:
    """The config with the source's templates and columns, the training rows, and the test rows (None: to be split off).

    Raises:
        DataError: The source cannot be read.
    """
    if config.data.source == "hub":
        return config, *read_hub(config.data)
    if config.data.source == "local":
        return config, *read_local(config.data, read_columns(config))
    train, test = (datasets.Dataset.from_list(rows) for rows in generate(config.seed, homes=config.data.homes))
    return dataclasses.replace(config, data=demo_columns(config)), train, test
