"""The tensors of one layer, read when they are asked for, with what was folded into them so far."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from fedtune.inference.quantize.fold import Change, Fold, changes

__all__ = ["Read", "Weights"]

Read = Callable[[str, int, int], Tensor]  # name, first and last row of a tensor → those rows


class Weights(Mapping[str, Tensor]):
    """Tensors by their names in the layer (`mlp.up_proj.weight` …), float32; none of them is kept.

    Args:
        names: Name in the layer → in the model.
        sizes: Of the model's tensors.
        read: Reads those.
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
        """Some rows of a tensor (of a vector, entries)."""
        part = self._read(self._names[name], first, last).float()
        for change in self._changes.get(name, ()):
            part = change(part, first, last)
        return part

    def fold(self, fold: Fold, scale: Tensor, width: int) -> None:
        """Move a scale, for all that is read from here on; the arguments are those of `changes`."""
        for name, change in changes(fold, scale, self.sizes[f"{fold.source}.weight"][0], width).items():
            if name in self._names:
                self._changes.setdefault(name, []).append(change)
