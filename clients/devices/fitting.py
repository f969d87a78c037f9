"""A workspace's clients as devices: what each settles on when it says hello, and what it fits each turn to.

Precision and rank are chosen once, for the longest row that the task allows; batch, micro-batch, length and steps in each turn, for the
client's own rows and with what its last turns have taught. A simulated device's memory is that of the probe: its micro-batches are counted
and not run, since pieces of a batch leave the batch's gradient.

In a private turn the peer sees what was chosen, and ε depends on batch and steps. All of it then comes from public bounds: every row counts
as one of `task.max_length` tokens, the row count is public, and nothing that was measured on rows is reported or taught to the next turn.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedtune.clients.devices import probe
from fedtune.clients.devices.choice import Choice, Correction, Work, choose, choose_rank
from fedtune.clients.devices.estimate import QUANTIZED, STATE, Shapes, flops, memory_bytes, seconds, shapes_of, unpacked_bytes
from fedtune.clients.devices.simulate import is_offline, virtual_seconds
from fedtune.clients.steps import batches, steps_of
from fedtune.clients.store import ClientStore
from fedtune.clients.trainer import Trained
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DeviceClass, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.task import task_of
from fedtune.data import Example
from fedtune.errors import Decline, ModelError
from fedtune.models.backbone import pick_device
from fedtune.models.methods import method

LADDER = ("fp32", "bf16", "int8", "nf4")  # from the finest


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a client keeps to for the whole run; a rank of None is the server's to say."""

    precision: str
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A turn that fits.

    Args:
        device: The profile.
        choice: What it chose.
        work: What it was asked.
        used: The correction that it chose by.
        simulated: Whether device and time are.
        micro: Rows at once, after what has run out of memory.
        out_of_memory: How often a simulated device ran out.
        rest: Measured bytes beside the weights, of a simulated device.
        weights: Bytes of its weights.
    """

    device: DeviceClass
    choice: Choice
    work: Work
    used: Correction
    simulated: bool
    micro: int
    out_of_memory: int = 0
    rest: int = 0
    weights: int = 0


class Devices:
    """The devices of a host's clients.

    Args:
        config: The experiment.
        store: Where the clients keep what their last turns have taught.
        device: The profile of this machine, where it acts as one client; None simulates the config's classes.
        space: Gives what is loaded.
    """

    def __init__(self, config: Config, store: ClientStore, device: DeviceClass | None, space: Callable[[], Workspace]) -> None:
        self._config, self._store, self._device, self._open = config, store.beside("devices"), device, space
        self._settled: dict[str, Settled] = {}
        self._probed: dict[tuple[object, ...], int] = {}

    @property
    def _space(self) -> Workspace:
        return self._open()

    def of(self, client: str) -> DeviceClass | None:
        """The client's profile; None where devices are neither simulated nor measured."""
        return self._device or self._config.devices.classes.get(self._space.federation.clients[client].device_class)

    def is_offline(self, client: str, round: int) -> bool:
        """Whether a simulated device is away."""
        return self._device is None and is_offline(self.of(client), self._config.seed, round, client)

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self._config, self._space.labels)

    @property
    def deadline_s(self) -> float | None:
        config = self._config
        return config.devices.deadline_s if self._device is None else config.round_timeout_s

    def settle(self, client: str) -> Settled:
        """Precision and rank of the client, the same whenever it is asked.

        Raises:
            Decline: Nothing fits its memory.
            ModelError: Its profile asks for a precision that machine or architecture cannot do.
        """
        if client not in self._settled:
            self._settled[client] = self._chosen(client)
        return self._settled[client]

    def first_choice(self, client: str) -> Choice:
        """What it would do with its own rows and the config's own plan, before any turn has taught it better.

        Raises:
            Decline: Nothing fits.
        """
        config, c, device = self._config, self._config.client, self.of(client)
        assert device is not None
        plan = Plan(
            round=1, client=client, base_version=0, steps=c.steps, epochs=c.epochs, batch_size=c.batch_size, accumulate=c.accumulate,
            **terms(config),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        settled, examples = self.settle(client), self._space.examples(client, "train")
        entries = self.shapes.adapter(settled.rank)
        work = _work(plan, examples, config.task, entries, 2 * 4 * entries)
        kept = {"rank": settled.rank or 0, "precisions": [settled.precision], "deadline_s": self.deadline_s}
        return choose(device, self.shapes, work, **kept)  # pyright: ignore[reportArgumentType]

    def _chosen(self, client: str) -> Settled:
        config, device = self._config, self.of(client)
        if device is None:
            return Settled(precision=config.model.precision)
        return settle(config, device, self.shapes, self.deadline_s)

    # -- a turn ---------------------------------------------------------------------------------------------------------------------------

    def fit(self, plan: Plan, start: AdapterState, nbytes: int) -> tuple[Plan, Sequence[Example], Fitted] | None:
        """The plan as this client's device can do it, the rows at the length that it chose, and the choice; None where there is no device.

        Args:
            plan: The server's.
            start: The adapter that is trained.
            nbytes: Bytes that came and will go.

        Raises:
            Decline: It does not fit.
        """
        space, client, device = self._space, plan.client, self.of(plan.client)
        if device is None:
            return None
        task, settled, used = space.config.task, self.settle(client), self._read(client, plan.round)
        examples = space.examples(client, "train")
        entries = sum(start[n].numel() for n in matching(start.tensors, plan.train))
        work = _work(plan, examples, task, entries, nbytes)
        rank = max(start.spec.ranks.values(), default=0)
        kept = {"rank": rank, "precisions": [settled.precision], "correction": used, "deadline_s": self.deadline_s}
        choice = choose(device, self.shapes, work, **kept)  # pyright: ignore[reportArgumentType]
        if choice.length < work.longest:
            examples = space.examples(client, "train", choice.length)
        plan = dataclasses.replace(plan, batch_size=choice.batch, steps=choice.steps, epochs=None)
        fitted = Fitted(device=device, choice=choice, work=work, used=used, simulated=self._device is None, micro=choice.micro)
        return plan, examples, self._measured(plan, start, fitted) if fitted.simulated else fitted

    def _measured(self, plan: Plan, start: AdapterState, fitted: Fitted) -> Fitted:
        """A simulated device's memory: the probe's; out of it, it goes on with half the micro-batch.

        Raises:
            Decline: One row at a time is too much.
        """
        body, micro, out = self._space.body(fitted.choice.precision), fitted.choice.micro, 0
        weights = body.weights_bytes
        while True:
            rest = STATE * fitted.work.entries + unpacked_bytes(self.shapes, fitted.choice.precision)
            rest += self._kept(plan, start, fitted, micro)
            fitted = dataclasses.replace(fitted, micro=micro, out_of_memory=out, rest=rest, weights=weights)
            most = fitted.device.memory_mb
            if most is None or weights + rest <= most * 1e6:
                return fitted
            out += 1
            if micro == 1:
                self._write(plan, fitted, rest, None)
                needed = f"{(weights + rest) / 1e6:.1f} MB of {most:g} MB"
                raise Decline("memory", f"out of memory with a single row of {self._width(fitted)} tokens: {needed}")
            micro //= 2

    def _kept(self, plan: Plan, start: AdapterState, fitted: Fitted, micro: int) -> int:
        width = self._width(fitted)
        counted = max(1, min(fitted.work.counted, width - 1))
        key = fitted.choice.precision, start.spec.method, start.spec.mask, plan.train, micro, width, counted
        if key not in self._probed:
            body = self._space.body(fitted.choice.precision)
            slot = body.slot(start)
            names = matching(slot.parameters, plan.train)
            self._probed[key] = probe.kept_bytes(slot, self._config.task, names, micro, width, counted)
        return self._probed[key]

    @staticmethod
    def _width(fitted: Fitted) -> int:
        return min(fitted.choice.length, fitted.work.longest)

    def told(self, plan: Plan, examples: Sequence[Example], fitted: Fitted, turned: Trained | None, moved: int) -> dict[str, float]:
        """What the update says of the device's turn; what was measured against what was estimated is kept for its next.

        Args:
            plan: As it was done.
            examples: The rows.
            fitted: The choice.
            turned: What the turn did; None where it only looked.
            moved: Bytes that came and went.
        """
        choice, steps = fitted.choice, turned.steps if turned else 0
        measured = turned if turned and not fitted.simulated and plan.privacy == "none" else None
        micro, out = (measured.micro, measured.out_of_memory) if measured else (fitted.micro, fitted.out_of_memory)
        fitted = dataclasses.replace(fitted, micro=micro)
        said = {
            "rank": choice.rank,
            "batch": choice.batch,
            "micro_batch": micro,
            "length": choice.length,
            "out_of_memory": out,
            "estimated_mb": choice.memory_mb,
            "estimated_s": choice.seconds,
        }
        rest, took = fitted.rest, turned.seconds if turned else 0.0
        if fitted.simulated:
            tokens = _tokens(plan, examples, steps, self._width(fitted))
            operations = flops(self.shapes, tokens)
            took = virtual_seconds(fitted.device, operations, moved, seed=self._config.seed, round=plan.round, client=plan.client)
            said |= {"virtual_s": took, "peak_mb": (fitted.weights + rest) / 1e6}
        elif measured:
            rest = int((measured.peak_mb - measured.began_mb) * 1e6)
        if steps and (fitted.simulated or measured):
            self._write(plan, fitted, rest, took)
        return {name: float(value) for name, value in said.items()}

    # -- what turns teach -----------------------------------------------------------------------------------------------------------------

    def _read(self, client: str, round: int) -> Correction:
        kept = self._store.read(client, round)
        return Correction(memory=float(kept["memory"]), time=float(kept["time"])) if kept else Correction()

    def _write(self, plan: Plan, fitted: Fitted, rest: int, took: float | None) -> None:
        """Keep measured / estimated, as of this round. A turn's time has luck in it: its ratio counts half (geometric mean)."""
        work, precision, width = fitted.work, fitted.choice.precision, self._width(fitted)
        _, expected = memory_bytes(self.shapes, precision, work.entries, fitted.micro, width, min(work.counted, width))
        memory, time = rest / expected if rest > 0 else fitted.used.memory, fitted.used.time
        if took is not None and plan.steps:
            tokens = plan.steps * plan.batch_size * plan.accumulate * width
            if (raw := seconds(fitted.device, flops(self.shapes, tokens), work.nbytes)) > 0 and took > 0:
                time = math.sqrt(time * took / raw)
        values = {"memory": torch.tensor(memory, dtype=torch.float64), "time": torch.tensor(time, dtype=torch.float64)}
        self._store.write(plan.client, plan.round, AdapterState(values, AdapterSpec(method="device")))


def settle(config: Config, device: DeviceClass, shapes: Shapes, deadline_s: float | None) -> Settled:
    """Precision and rank for the longest row that the task allows; nothing is loaded for it.

    Raises:
        Decline: Nothing fits its memory.
        ModelError: The profile asks for a precision that machine, architecture or method cannot do.
    """
    rank, length = choose_rank(device, shapes, deadline_s), config.task.max_length
    counted = task_of(config.task).usual_targets(length)
    entries = shapes.adapter(rank)
    work = Work(batch=config.client.batch_size, steps=1, length=length, longest=length, counted=counted, entries=entries)
    choice = choose(device, shapes, work, rank=rank, precisions=precisions(config, device, shapes))
    return Settled(precision=choice.precision, rank=rank or None)


def for_device(config: Config, device: DeviceClass) -> Config:
    """The experiment in the precision that suits a real device, so that no finer backbone is ever loaded on it.

    Raises:
        Decline: Nothing fits its memory.
        ModelError: As `settle`.
    """
    labels = task_of(config.task).outputs(max(2, len(config.data.labels)))
    chosen = settle(config, device, shapes_of(config, labels), config.round_timeout_s)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=chosen.precision))


def precisions(config: Config, device: DeviceClass, shapes: Shapes) -> list[str]:
    """What machine, architecture and method can do, from the config's own down.

    Raises:
        ModelError: The profile asks for one that they cannot.
    """
    finest, fixed = config.model.precision, method(config.peft.method).fp32_only
    wanted = [device.precision] if device.precision else [finest] if fixed else list(LADDER[LADDER.index(finest) :])
    out, why = list[str](), ""
    for precision in wanted:
        try:
            _require(precision, config, shapes)
            out.append(precision)
        except ModelError as bad:
            why = str(bad)
    if not out:
        raise ModelError(why)
    return out


def _require(precision: str, config: Config, shapes: Shapes) -> None:
    """Raises ModelError where the backbone cannot be stored so."""
    if precision not in QUANTIZED:
        return
    if precision not in shapes.compute:
        raise ModelError(f"model.precision={precision} needs bitsandbytes: install it, or take bf16")
    if precision == "nf4" and not shapes.linear.keys() - shapes.whole:
        raise ModelError("model.precision=nf4: no layer of this backbone has rows of a whole number of blocks of 64: take int8 or bf16")
    from fedtune.models.quantize import require_kernel

    require_kernel(precision, shapes.compute[precision], pick_device(config.model.device))


def _work(plan: Plan, examples: Sequence[Example], task: TaskConfig, entries: int, nbytes: int) -> Work:
    length = task.max_length
    if plan.privacy == "none":
        longest = max(len(e.input_ids) for e in examples)
        counted = max(1, *(task_of(task).count(e) for e in examples))
    else:
        longest, counted = length, task_of(task).most_targets(length)
    return Work(
        batch=plan.batch_size,
        accumulate=plan.accumulate,
        steps=steps_of(plan, len(examples)),
        length=length,
        longest=longest,
        counted=counted,
        entries=entries,
        nbytes=nbytes,
    )


def _tokens(plan: Plan, examples: Sequence[Example], steps: int, width: int) -> float:
    """Tokens that go through the model in the turn, padding included: of private turns, whose rows are secret, those of full rows."""
    if plan.privacy != "none":
        return float(steps * plan.batch_size * plan.accumulate * width)
    lengths = [len(e.input_ids) for e in examples]
    stream = batches(len(lengths), plan.batch_size, plan.seed)
    some = (next(stream) for _ in range(steps * plan.accumulate))
    return float(sum(len(batch) * max(lengths[i] for i in batch) for batch in some))
