"""Answers requests from a device's current model, also while the model changes.

This process holds the listening socket and loads no torch. A child process serves the current version on that socket. When another version
becomes current, a second child loads it; once it accepts connections, the first one answers what it has accepted and leaves. Without a
child that is ready, this process itself answers: 503, with the reason.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedtune.delivery.served import Child
from fedtune.delivery.versions import Versions
from fedtune.delivery.waiting import Waiting
from fedtune.errors import CheckpointError
from fedtune.inference.serve.limits import KEY_VARIABLE, ApiKeys
from fedtune.inference.serve.listener import listen, public_warning, url

POLL_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a child that died is started again; doubled each time
STEADY_S = 60.0  # a child that served this long has recovered
DEATHS = 3  # while it loads: then the version counts as broken, if there is another one
GRACE_S = 30.0
_log = logging.getLogger("fedtune.delivery")


class DeviceServer:
    """Serves `models/current` of a client's state folder, in OpenAI's protocol.

    The socket is open as soon as the object exists; `start` begins to answer. API keys come from the variable FEDTUNE_API_KEY. The model's
    name is the version's, and `current`.

    A version that cannot be loaded is not served: the one that answers, or the newest older one that can be loaded, becomes current again.

    Args:
        state: The client's state folder.
        host: Address to listen on.
        port: Port; 0 takes any free one.
        report: Called with each sentence for the operator, from another thread.

    Raises:
        NetworkError: The address is not available.
        ConfigError: The port or the API key is invalid.
    """

    def __init__(self, state: Path, host: str, port: int, report: Callable[[str], object]) -> None:
        keyed = bool(ApiKeys.find(None))
        self._listener = listen(host, port, option="--serve")
        self.url = url(self._listener)
        self._versions, self._log, self._report = Versions(state), state / "logs" / "serve.log", report
        if warning := public_warning(self._listener, keyed=keyed, option=f"variable {KEY_VARIABLE}"):
            report(warning)
        self._waiting = Waiting(self._listener)
        self._serving: Child | None = None
        self._loading: Child | None = None
        self._leaving: list[Child] = []
        self._current: str | None = None
        self._wanted: str | None = None
        self._broken: set[str] = set()  # versions that could not be loaded, since another one became current
        self._mute: str | None = None  # a version that generates no text
        self._reported = ""
        self._deaths, self._pause, self._not_before = 0, FIRST_PAUSE_S, 0.0
        self._stopping, self._until = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch, name="device server", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._waiting.begin("no model has been delivered to this device yet")
        self._thread.start()

    def stop(self, grace: float = GRACE_S) -> None:
        """End all: accepted requests may finish within the grace time. A further call, from another thread, can shorten it.

        Args:
            grace: Seconds.
        """
        until = time.monotonic() + grace
        self._until = min(self._until, until) if self._stopping.is_set() else until
        self._stopping.set()
        if self._thread.ident is None:
            self._listener.close()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        """Linux ends a child with the thread that started it: all of them start and end here."""
        try:
            while not self._stopping.wait(POLL_S):
                self._step()
        except Exception:
            _log.exception("the device server failed")
            self._report(f"{self.url} no longer answers, because of an error in fedtune: the log has it; start the client again")
        finally:
            self._end()

    def _step(self) -> None:
        for child in [child for child in self._leaving if child.overdue or child.exit_code is not None]:
            child.kill()
            self._leaving.remove(child)
        target = self._wanted = self._target()
        if self._serving is not None and self._serving.exit_code is not None:
            self._replace(self._serving)
        if self._loading is not None and self._loading.ready:  # first of all: it answers already
            self._hand_over(self._loading)
        elif self._loading is not None and self._loading.name != target:  # another version has become current meanwhile
            self._leave(self._loading)
            self._loading = None
        elif self._loading is not None:
            if self._loading.exit_code is not None:
                self._give_up(self._loading)
        elif target is None:
            if self._serving is not None:  # all versions were removed
                self._leave(self._serving)
                self._serving = None
                self._waiting.begin("no model has been delivered to this device yet")
        elif (self._serving is None or self._serving.name != target) and time.monotonic() >= self._not_before:
            if self._serving is None:
                self._waiting.begin("the model is being loaded")
            self._load(target)

    def _target(self) -> str | None:
        """The version to serve; None for none. The same as before while the link is invalid."""
        serving = None if self._serving is None else self._serving.name
        try:
            current = self._versions.current()
            if current != self._current:
                self._change_to(current)
            if current is None or current not in self._broken | {self._mute}:
                return current
            if serving is not None or current == self._mute:
                return serving
            return next(iter(self._older(current)), None)
        except CheckpointError as bad:
            if str(bad) != self._reported:
                self._reported = str(bad)
                self._report(self._reported)
            return self._wanted

    def _change_to(self, current: str | None) -> None:
        """Another version is current: what is known of the earlier ones no longer counts."""
        self._current, self._mute, self._reported = current, None, ""
        self._broken.clear()
        self._deaths, self._pause, self._not_before = 0, FIRST_PAUSE_S, 0.0

    def _older(self, current: str) -> list[str]:
        """Versions to fall back to, newest first."""
        try:
            names = [version.name for version in self._versions.names()]
        except CheckpointError:
            return []
        return [name for name in names[names.index(current) + 1 :] if name not in self._broken] if current in names else []

    def _load(self, name: str) -> None:
        try:
            self._loading = Child(name, self._versions.model(name), self._listener.fileno(), self._log)
        except CheckpointError as bad:  # removed a moment ago
            self._break(name, str(bad))
        except OSError as bad:
            self._retry(f"the model {name} cannot be loaded now ({bad.filename or 'its process'}: {bad.strerror})")

    def _hand_over(self, child: Child) -> None:
        old, self._serving, self._loading = self._serving, child, None
        self._waiting.end()
        if old is not None:
            self._leave(old)
        self._deaths = 0
        self._report(f"the model {child.name} answers at {self.url} ({child.description})")
        if self._current in self._broken:
            self._go_back(child.name)

    def _leave(self, child: Child) -> None:
        child.leave()
        self._leaving.append(child)

    def _give_up(self, child: Child) -> None:
        """A child has ended before it was ready."""
        child.kill()
        self._loading = None
        if child.generates_no_text:
            self._mute = child.name
            self._waiting.change(f"the model {child.name} generates no text")
            self._report(f"the model {child.name} is not served: {child.failure}")
        elif child.failure:
            self._break(child.name, child.failure)
        else:
            self._deaths += 1
            if self._deaths >= DEATHS and (self._serving is not None or self._older(child.name)):
                self._break(child.name, f"its process {child.end} {self._deaths} times")
            else:
                self._retry(f"the process of the model {child.name} {child.end} while it loaded the model")

    def _break(self, name: str, why: str) -> None:
        self._deaths, self._not_before = 0, 0.0
        self._broken.add(name)
        self._waiting.change(f"the model {name} cannot be loaded")
        self._report(f"the model {name} cannot be loaded: {why}")
        if self._serving is not None:
            self._go_back(self._serving.name)

    def _go_back(self, name: str) -> None:
        """Make a version current again that can be loaded, unless another one has become current meanwhile."""
        try:
            with self._versions.locked():
                if self._versions.current() not in self._broken:
                    return
                self._versions.activate(name)
        except CheckpointError as bad:
            self._report(str(bad))
        else:
            self._change_to(name)  # now: if a broken version becomes current before the next step, it is tried again
            self._report(f"the model {name} is current again")

    def _replace(self, child: Child) -> None:
        """The child that serves has ended."""
        child.kill()
        self._serving = None
        self._waiting.begin("the model is being loaded")
        if child.age > STEADY_S:
            self._pause = FIRST_PAUSE_S
        self._retry(f"the process of the model {child.name} {child.end} while it served the model")

    def _retry(self, why: str) -> None:
        self._report(f"{why}: starting another one in {self._pause:g} s")
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)

    def _end(self) -> None:
        self._waiting.end()
        children = [child for child in (self._serving, self._loading, *self._leaving) if child is not None]
        for child in children:
            child.terminate()
        while time.monotonic() < self._until and any(child.exit_code is None for child in children):
            time.sleep(0.05)
        for child in children:
            child.kill()
        self._waiting.close()
        self._listener.close()
