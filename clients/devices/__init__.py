"""What a device is, what a turn would cost it, and what it chooses so that the turn fits its memory and the deadline.

estimate.py   memory and seconds of a turn, from the model's shapes alone
choice.py     profile, shapes and plan → precision, rank, batch, micro-batch, length, steps; or why it must decline
measure.py    the profile of the machine that this runs on
probe.py      the memory of a micro-batch, measured
simulate.py   the coin and the clock of a simulated device
fitting.py    all of it together, for the clients of a host
"""

from fedtune.clients.devices.choice import Choice, Correction, Work, choose, choose_rank, told
from fedtune.clients.devices.estimate import Shapes, shapes_of
from fedtune.clients.devices.measure import measure_device

__all__ = ["Choice", "Correction", "Shapes", "Work", "choose", "choose_rank", "measure_device", "shapes_of", "told"]
