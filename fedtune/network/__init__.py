"""The real network: Flower's SuperLink and nodes in processes of our own, with nothing open that need not be.

Server: the main process holds a `SuperLink` (link.py), which keeps one child (superlink.py). Client: a `Node` (node.py) asks an `Executor`
(executor.py), which keeps one warm child (worker.py). Nothing here imports torch, and no code ever comes over the wire.
"""

APP = "fedtune/fedtune"  # publisher/name in Flower's books: what our runs are of, and the only app that a node of ours answers
