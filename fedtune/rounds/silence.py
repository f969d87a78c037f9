"""Exponential backoff for clients that do not answer, because each of them delays its round until the deadline.

After n consecutive missed replies, a client is paused for 2^(n−1) rounds, at most 16. If the same reply is still missing after that, the
next pause begins immediately; checking for the reply costs nothing. A reply in time ends the pauses. A new hello, which a restarted client
sends, also ends them.
"""

from collections.abc import Callable, Mapping

from flwr.serverapp import Grid

from fedtune.rounds.membership import Client, replies

LONGEST_PAUSE = 16  # rounds


def record_miss(name: str, client: Client, round: int, message: str, note: Callable[[str], None]) -> None:
    """Record a missed reply and pause the client.

    Args:
        name: Logical id.
        client: The client that did not answer.
        round: The last round without its reply.
        message: Id of the unanswered message.
        note: Receives a sentence with the round until which the client is paused.
    """
    client.missed += 1
    client.paused_until, client.unanswered = round + 1 + min(LONGEST_PAUSE, 2 ** min(client.missed - 1, LONGEST_PAUSE)), message
    note(f"client {name} did not answer in round {round}: it is paused until round {client.paused_until}")


def paused_clients(grid: Grid, clients: Mapping[str, Client], round: int, note: Callable[[str], None]) -> set[str]:
    """Logical ids of the clients that are paused in this round.

    Args:
        grid: Grid to look for their replies on.
        clients: Logical id → client.
        round: The round.
        note: Receives a sentence for each client whose reply is still missing when its pause ends.
    """
    for name, client in sorted(clients.items()):
        if client.unanswered and client.paused_until <= round:
            if next(replies(grid, [client.unanswered], 0.0)) is None:
                record_miss(name, client, round - 1, client.unanswered, note)
            else:
                client.unanswered = ""
    return {name for name, client in clients.items() if client.paused_until > round}


def record_answer(client: Client) -> None:
    """Record that the client answered: end its pauses."""
    client.missed, client.paused_until, client.unanswered = 0, 0, ""
