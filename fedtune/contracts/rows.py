"""Rows as columns of Python values. With `datasets`, which loads pandas and Arrow, a training device would need 95 MB more memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RowSet"]


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows, with the columns of a source or with fedtune's. `rows["text"]` is a column, `rows[3]` a row.

    Args:
        columns: Column → one value a row; all columns have the same length.
        types: Column of a source → Arrow's name of its type, such as `string` or `int64`.
        classes: Column of class ids → the classes' names, if the source declares them.
    """

    columns: Mapping[str, Sequence[Any]]
    types: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, key: str | int | slice) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: values[key] for name, values in self.columns.items()}

    def select(self, indices: Sequence[int]) -> "RowSet":
        """The rows at these indices, in this order."""
        return RowSet({name: [values[i] for i in indices] for name, values in self.columns.items()}, self.types, self.classes)
