"""The deployed network: Flower's SuperLink and nodes, in processes that fedtune starts, with as few open endpoints as possible.

Server: the main process owns a `SuperLink` (link.py), which runs one child process (superlink.py). Client: a `Node` (node.py) passes
messages to an `Executor` (executor.py), which runs one child process (worker.py). Nothing here imports torch. No code is sent.
"""

APP = "fedtune/fedtune"  # publisher/name of the Flower app that our runs register; our nodes answer no other app
