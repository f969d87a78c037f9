"""Shared code of the methods that PEFT lacks: a switch for their hooks, and initial values for use before the first state is loaded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fedtune.config import PeftConfig
from fedtune.contracts.seeds import derive_seed
from fedtune.models.methods import swapped


class Switch:
    """Turns a method's hooks on and off; they read it at every call."""

    def __init__(self) -> None:
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which the hooks do nothing."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


def fill(
    parameters: Mapping[str, nn.Parameter], initial: Callable[[str, tuple[int, ...], PeftConfig, torch.Generator, float], Tensor],
    peft: PeftConfig, std: float,
) -> None:  # fmt: skip
    """Fill the parameters with the initial values of seed 0, so that they are never uninitialized memory; a state overwrites them."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(derive_seed(0, "init", name))
            parameter.copy_(initial(name, tuple(parameter.shape), peft, generator, std))


def untouched(values: Mapping[nn.Parameter, Tensor], switch: Switch | None = None) -> Callable[[], AbstractContextManager[None]]:
    """A function for `Attached.disabled`: in its context, the switch is off and the parameters have these values.

    Args:
        values: Parameter → its value before training (a classifier's head, the backbone's own tensors).
        switch: The switch of the method's hooks.
    """

    @contextmanager
    def disabled() -> Iterator[None]:
        with ExitStack() as stack:
            if switch is not None:
                stack.enter_context(switch.off())
            stack.enter_context(swapped(values))
            yield

    return disabled
