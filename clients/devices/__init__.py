"""Device profiles, the estimated cost of a turn, and the choice: the settings that fit a turn to the device's memory and the deadline.

estimate.py   memory and seconds of a turn, from the model's shapes alone
choice.py     profile, shapes and plan → precision, rank, batch, micro-batch, length, steps; or a reason to decline
measure.py    the profile of this machine
probe.py      the measured memory of a micro-batch
simulate.py   availability and virtual time of a simulated device
fitting.py    the devices of a host's clients
"""

from fedtune.clients.devices.choice import Choice, Correction, Workload, choose, choose_rank, describe
from fedtune.clients.devices.estimate import Shapes, shapes_of
from fedtune.clients.devices.measure import measure_device

__all__ = ["Choice", "Correction", "Shapes", "Workload", "choose", "choose_rank", "measure_device", "shapes_of", "describe"]
