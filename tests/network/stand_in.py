"""A worker whose app follows the message's instructions, for the tests of the executor; run as a program."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedtune.network.worker import main


def make_app(settings: Mapping[str, Any]) -> ClientApp:
    """An app that counts its starts in the settings' folder."""
    lives = Path(settings["folder"]) / "lives"
    lives.write_text(str(int(lives.read_text()) + 1 if lives.exists() else 1))
    if settings.get("broken"):
        raise ImportError("no module named 'torch'")
    seen: list[str] = []
    app = ClientApp()

    def act(message: Message, context: Context) -> Message:
        order = str(message.content["c"]["do"])
        seen.append(order)
        print("a library prints to standard output", flush=True)
        os.write(1, b"and one writes to its descriptor\n")
        match order.split():
            case ["kill", number]:
                os.kill(os.getpid(), int(number))
            case ["kill-once", number]:
                if lives.read_text() == "1":
                    os.kill(os.getpid(), int(number))
            case ["exit", code]:
                sys.exit(int(code))
            case ["raise"]:
                raise ValueError("it does not fit")
            case ["memory"]:
                raise MemoryError("out of memory")
            case ["hang"]:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            case ["fork"]:  # a child process that inherits every descriptor and outlives this one
                if os.fork() == 0:
                    time.sleep(30)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["read"]:
                assert sys.stdin.read() == "" and os.read(0, 10) == b""
        status = {
            "pid": os.getpid(),
            "seen": " ".join(seen),
            "lives": int(lives.read_text()),
            "settings": str(settings["name"]),
            "ids": f"{context.run_id} {context.node_id} {TaskIdentity.run_id} {TaskIdentity.node_id}",
            "node": str(dict(context.node_config)),
        }
        return Message(RecordDict({**message.content, "status": ConfigRecord(status)}), reply_to=message)  # type: ignore[dict-item]

    app.query()(act)
    app.train()(act)
    app.evaluate()(act)
    return app


if __name__ == "__main__":
    main(make_app)
