"""Hub data sets by name, and folders written by `datasets`. A data set's own code never runs: `datasets` 4 does not support it."""

from pathlib import Path

import datasets

from fedtune.config import DataConfig
from fedtune.contracts.rows import RowSet
from fedtune.errors import DataError


def read_hub(config: DataConfig) -> tuple[RowSet, RowSet | None]:
    """`data.split` of the data set and, if set, `data.test_split`, with the data set's columns.

    Raises:
        DataError: The data set, subset or split does not exist, or there is no network.
    """
    return _rows(load_split(config, config.split)), (_rows(load_split(config, config.test_split)) if config.test_split else None)


def _rows(found: datasets.Dataset) -> RowSet:
    """The data set's columns, which are read when they are indexed."""
    plain, features = found.with_format(None), found.features
    types = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    kinds = {name: getattr(feature, "feature", feature) for name, feature in features.items()}  # of a list: that of its values
    return RowSet(
        {name: plain[name] for name in found.column_names},
        types,
        {name: tuple(kind.names) for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)},
    )


def load_split(config: DataConfig, split: str) -> datasets.Dataset:
    what = f"data.name={config.name}" + (f" data.subset={config.subset}" if config.subset else "") + f" split '{split}'"
    try:
        if any((Path(config.name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):  # written by save_to_disk
            found = _saved(config, split)
        else:
            found = datasets.load_dataset(config.name, config.subset, split=split)
    except DataError:
        raise
    except Exception as bad:  # the library raises many unrelated types here: network, HTTP, not found, bad split, bad file
        reason = str(bad).strip().splitlines()[0][:200] if str(bad).strip() else ""
        raise DataError(
            f"cannot load {what}: {type(bad).__name__}: {reason}; check the name, the subset, the split and the network, or use data=local"
        ) from None
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{what} is a {type(found).__name__} instead of one split of rows: check data.split")
    if not len(found):
        raise DataError(f"{what} has no rows")
    return found


def _saved(config: DataConfig, split: str) -> datasets.Dataset:
    found = datasets.load_from_disk(config.name)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"data.name={config.name} has no split '{split}': choose from {', '.join(map(str, found))}")
        return found[split]
    if split != config.split:
        raise DataError(f"data.name={config.name} is a single split, without data.test_split={split}: set it to null")
    return found
