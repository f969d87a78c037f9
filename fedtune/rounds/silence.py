"""Clients that do not answer are asked less often: each time one of them costs a round its whole deadline.

After the n-th reply in a row that did not come in its round, a client sits out 2^(n−1) rounds, at most 16. If it is still at the same turn
after that, it sits out the next pause at once: looking for its reply costs nothing. A reply in time ends this, and so does a new hello,
which a client says that was started again.
"""

from collections.abc import Callable, Mapping

from flwr.serverapp import Grid

from fedtune.rounds.membership import Client, replies

LONGEST = 16  # rounds


def miss(name: str, client: Client, round: int, message: str, note: Callable[[str], None]) -> None:
    """Count a reply that did not come.

    Args:
        name: Logical id.
        client: Who did not answer.
        round: The last round that was held up.
        message: Id of the message that has no reply.
        note: Called with a sentence that says when the client is asked again.
    """
    client.missed += 1
    client.back, client.owes = round + 1 + min(LONGEST, 2 ** min(client.missed - 1, LONGEST)), message
    note(f"client {name} did not answer in round {round}: it is not asked before round {client.back}")


def resting(grid: Grid, clients: Mapping[str, Client], round: int, note: Callable[[str], None]) -> set[str]:
    """Logical ids of the clients that sit a round out.

    Args:
        grid: Where their replies come.
        clients: Logical id → client.
        round: The round.
        note: Called with a sentence for each client that is still at an old turn when its pause ends.
    """
    for name, client in sorted(clients.items()):
        if client.owes and client.back <= round:
            if next(replies(grid, [client.owes], 0.0)) is None:
                miss(name, client, round - 1, client.owes, note)
            else:
                client.owes = ""
    return {name for name, client in clients.items() if client.back > round}


def forget(client: Client) -> None:
    """A client has answered."""
    client.missed, client.back, client.owes = 0, 0, ""
