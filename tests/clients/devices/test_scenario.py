"""The default scenario's four classes choose four precisions and three ranks by themselves; nothing is pinned."""

import dataclasses

from fedtune.clients.devices.choice import choose_rank
from fedtune.clients.devices.estimate import shapes_of
from fedtune.clients.devices.fitting import fixed_choice
from fedtune.config.compose import compose


def test_each_class_of_the_default_scenario_makes_a_different_choice() -> None:
    config = compose(["conf=heterogeneous"])[0].config
    shapes = shapes_of(config)
    assert all(d.precision is None and d.rank is None for d in config.devices.classes.values())
    chosen = {n: fixed_choice(config, d, shapes, config.devices.deadline_s) for n, d in config.devices.classes.items()}
    assert {n: (s.precision, s.rank) for n, s in chosen.items()} == {
        "phone": ("nf4", 2),
        "single-board": ("int8", 4),
        "laptop": ("bf16", 8),
        "workstation": ("fp32", 8),
    }
    roomy = {n: dataclasses.replace(d, memory_mb=None) for n, d in config.devices.classes.items()}
    assert [choose_rank(d, shapes, config.devices.deadline_s) for d in roomy.values()] == [2, 4, 8, 8]  # the network alone
    assert [choose_rank(d, shapes, None) for d in config.devices.classes.values()] == [2, 4, 8, 8]  # the memory alone
