"""What the methods that PEFT lacks share: a switch that their hooks ask, and values before the first state is loaded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fedtune.config import PeftConfig
from fedtune.contracts.seeds import derive_seed
from fedtune.models.methods import swapped


class Switch:
    """Whether a method acts: its hooks ask at every call."""

    def __init__(self) -> None:
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the method does not act."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


def fill(
    parameters: Mapping[str, nn.Parameter], initial: Callable[[str, tuple[int, ...], PeftConfig, torch.Generator, float], Tensor],
    peft: PeftConfig, std: float,
) -> None:  # fmt: skip
    """Values as a server with seed 0 would draw them, so that nobody trains on uninitialized memory; a state is loaded over them."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(derive_seed(0, "init", name))
            parameter.copy_(initial(name, tuple(parameter.shape), peft, generator, std))


def untouched(values: Mapping[nn.Parameter, Tensor], switch: Switch | None = None) -> Callable[[], AbstractContextManager[None]]:
    """An `Attached.disabled`: within it the switch is off and the parameters hold these values.

    Args:
        values: Parameter → what it was before anything was trained (a classifier's head, the backbone's own tensors).
        switch: Of the method's hooks.
    """

    @contextmanager
    def disabled() -> Iterator[None]:
        with ExitStack() as stack:
            if switch is not None:
                stack.enter_context(switch.off())
            stack.enter_context(swapped(values))
            yield

    return disabled
