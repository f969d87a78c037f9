"""The tensors of one layer, read on access, with the scales that are folded into them so far."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from fedtune.inference.quantize.fold import Change, Fold, changes

__all__ = ["Read", "Weights"]

Read = Callable[[str, int, int], Tensor]  # name, first row, end row (exclusive) → those rows


class Weights(Mapping[str, Tensor]):
    """Float32 tensors by their names in the layer (`mlp.up_proj.weight` …). Nothing is cached.

    Args:
        names: Name in the layer → name in the model.
        sizes: Name in the model → shape.
        read: Reads rows of a tensor by its name in the model.
    """

    def __init__(self, names: Mapping[str, str], sizes: Mapping[str, tuple[int, ...]], read: Read) -> None:
        self._names, self._read, self._changes = names, read, dict[str, list[Change]]()
        self.sizes = {own: sizes[name] for own, name in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.sizes[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of a tensor; entries of a vector."""
        part = self._read(self._names[name], first, last).float()
        for change in self._changes.get(name, ()):
            part = change(part, first, last)
        return part

    def fold(self, fold: Fold, scale: Tensor, width: int) -> None:
        """Fold a scale into all later reads; the arguments are those of `changes`."""
        for name, change in changes(fold, scale, self.sizes[f"{fold.source}.weight"][0], width).items():
            if name in self._names:
                self._changes.setdefault(name, []).append(change)
