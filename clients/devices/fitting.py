"""The devices of a host's clients: their fixed choices, made at the hello, and their choices for each turn.

Precision and rank are chosen once, for the longest row that the task allows. Batch, micro-batch, length and steps are chosen for each turn,
for the client's own rows and with corrections learned from its earlier turns. A simulated device's memory is measured by the probe. It
reports its micro-batch but trains whole batches, because splitting a batch does not change its gradient.

In a private turn, the server sees the choice, and ε depends on batch and steps. The choice then depends only on public values: every row
counts as `task.max_length` tokens, the row count is public, and measurements on rows are neither reported nor used for corrections.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedtune.clients.devices import probe
from fedtune.clients.devices.choice import Choice, Correction, Workload, choose, choose_rank
from fedtune.clients.devices.estimate import QUANTIZED, STATE, Shapes, dequantized_bytes, flops, memory_bytes, seconds, shapes_of
from fedtune.clients.devices.simulate import is_offline, virtual_seconds
from fedtune.clients.steps import batches, steps_of
from fedtune.clients.store import ClientStore
from fedtune.clients.trainer import TrainingResult
from fedtune.clients.turns import turn_of
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DeviceClass, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.task import task_of
from fedtune.data import Example
from fedtune.errors import Decline, ModelError
from fedtune.models import lean
from fedtune.models.backbone import pick_device
from fedtune.models.methods import method

LADDER = ("fp32", "bf16", "int8", "nf4")  # highest precision first


@dataclass(frozen=True, kw_only=True)
class FixedChoice:
    """A client's choices for the whole run; if the rank is None, the server decides."""

    precision: str
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A turn fitted to a device.

    Args:
        device: The profile.
        shapes: The shapes of the model, without a lean step if this turn takes none.
        choice: The device's choice.
        work: The plan's work.
        used: The correction that the choice used.
        simulated: Whether device and time are simulated.
        micro: Rows per micro-batch, halved until they fit the memory.
        kept_layers: Layers that keep intermediate tensors; see `Choice`.
        out_of_memory: Number of times that a simulated device ran out of memory.
        rest: Bytes of a simulated device's memory excluding the weights, measured by the probe.
        weights: Bytes of the weights of a simulated device.
    """

    device: DeviceClass
    shapes: Shapes
    choice: Choice
    work: Workload
    used: Correction
    simulated: bool
    micro: int
    kept_layers: int | None = None
    out_of_memory: int = 0
    rest: int = 0
    weights: int = 0


class Devices:
    """The devices of a host's clients.

    Args:
        config: The experiment.
        store: Stores the clients' corrections.
        device: The profile of this machine if it is a real device (with one client); None simulates the config's classes.
        space: Returns the workspace.
    """

    def __init__(self, config: Config, store: ClientStore, device: DeviceClass | None, space: Callable[[], Workspace]) -> None:
        self._config, self._store, self._device, self._open = config, store.substore("devices"), device, space
        self._fixed: dict[str, FixedChoice] = {}
        self._probed: dict[tuple[object, ...], int] = {}

    @property
    def _space(self) -> Workspace:
        return self._open()

    def of(self, client: str) -> DeviceClass | None:
        """The client's profile; None if devices are neither simulated nor real."""
        return self._device or self._config.devices.classes.get(self._space.federation.clients[client].device_class)

    def is_offline(self, client: str, round: int) -> bool:
        """Whether a simulated device is offline."""
        return self._device is None and is_offline(self.of(client), self._config.seed, round, client)

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self._config, self._space.labels)

    @property
    def deadline_s(self) -> float | None:
        config = self._config
        return config.devices.deadline_s if self._device is None else config.round_timeout_s

    def fixed_choice(self, client: str) -> FixedChoice:
        """The client's precision and rank, chosen at the first call.

        Raises:
            Decline: No precision fits its memory.
            ModelError: The machine or the architecture does not support the profile's precision.
        """
        if client not in self._fixed:
            self._fixed[client] = self._chosen(client)
        return self._fixed[client]

    def first_choice(self, client: str) -> Choice:
        """The choice for the config's own plan and the client's rows, without a correction.

        Raises:
            Decline: No choice fits.
        """
        config, c, device = self._config, self._config.client, self.of(client)
        assert device is not None
        plan = Plan(
            round=1, client=client, base_version=0, steps=c.steps, epochs=c.epochs, batch_size=c.batch_size, accumulate=c.accumulate,
            **terms(config),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        fixed, examples = self.fixed_choice(client), self._space.examples(client, "train")
        entries = self.shapes.adapter(fixed.rank)
        work = _work(plan, examples, config.task, entries, 2 * 4 * entries)
        limits = {"rank": fixed.rank or 0, "precisions": [fixed.precision], "deadline_s": self.deadline_s}
        return choose(device, self.shapes, work, **limits)  # pyright: ignore[reportArgumentType]

    def _chosen(self, client: str) -> FixedChoice:
        config, device = self._config, self.of(client)
        if device is None:
            return FixedChoice(precision=config.model.precision)
        return fixed_choice(config, device, self.shapes, self.deadline_s)

    # -- a turn ---------------------------------------------------------------------------------------------------------------------------

    def fit(self, plan: Plan, start: AdapterState, nbytes: int) -> tuple[Plan, Sequence[Example], Fit] | None:
        """The plan fitted to the client's device, the rows at the chosen length, and the fit; None without a device.

        Args:
            plan: The server's plan.
            start: The adapter to train.
            nbytes: Bytes received and to be sent.

        Raises:
            Decline: The turn does not fit the device.
        """
        space, client, device = self._space, plan.client, self.of(plan.client)
        if device is None:
            return None
        task, fixed, used = space.config.task, self.fixed_choice(client), self._read(client, plan.round)
        examples = space.examples(client, "train")
        entries = sum(start[n].numel() for n in matching(start.tensors, plan.train))
        work = _work(plan, examples, task, entries, nbytes)
        rank = max(start.spec.ranks.values(), default=0)
        limits = {"rank": rank, "precisions": [fixed.precision], "correction": used, "deadline_s": self.deadline_s}
        shapes = self._shapes_in(start, fixed.precision)
        choice = choose(device, shapes, work, **limits)  # pyright: ignore[reportArgumentType]
        if choice.length < work.longest:
            examples = space.examples(client, "train", choice.length)
            if not examples:  # of a task that leaves out rows instead of cutting them
                raise Decline("memory", f"only rows of {choice.length} tokens fit the device's memory, but all its rows are longer")
        plan = dataclasses.replace(plan, batch_size=choice.batch, steps=choice.steps, epochs=None)
        fit = Fit(
            device=device, shapes=shapes, choice=choice, work=work, used=used, simulated=self._device is None, micro=choice.micro,
            kept_layers=choice.kept_layers,
        )  # fmt: skip
        return plan, examples, self._measured(plan, start, fit) if fit.simulated else fit

    def _shapes_in(self, start: AdapterState, precision: str) -> Shapes:
        """The shapes for a turn from this start. A sparse turn, and quantized weights with shifts, have no lean step."""
        is_lean = lean.step_of(self._space.loaded_model(precision).slot(start).model) is not None
        return self.shapes if is_lean else dataclasses.replace(self.shapes, lean=frozenset())

    def _measured(self, plan: Plan, start: AdapterState, fit: Fit) -> Fit:
        """The fit with the memory that the probe measured. Until it fits the simulated device, the micro-batch is halved. If a single row
        does not fit, a lean step's layers stop keeping intermediate tensors.

        Raises:
            Decline: A single row does not fit.
        """
        model, micro, kept, out = self._space.loaded_model(fit.choice.precision), fit.micro, fit.kept_layers, 0
        weights = model.weights_bytes
        while True:
            rest = STATE * fit.work.entries + dequantized_bytes(self.shapes, fit.choice.precision)
            rest += self._kept(plan, start, fit, micro, kept)
            fit = dataclasses.replace(fit, micro=micro, kept_layers=kept, out_of_memory=out, rest=rest, weights=weights)
            most = fit.device.memory_mb
            if most is None or weights + rest <= most * 1e6:
                return fit
            out += 1
            if micro == 1 and kept != 0 and fit.choice.precision in fit.shapes.lean and not fit.shapes.checkpointing:
                kept = 0
                continue
            if micro == 1:
                self._write(plan, fit, rest, None)
                needed = f"{(weights + rest) / 1e6:.1f} MB of {most:g} MB"
                raise Decline("memory", f"out of memory with a single row of {self._width(fit)} tokens: {needed}")
            micro //= 2

    def _kept(self, plan: Plan, start: AdapterState, fit: Fit, micro: int, kept_layers: int | None) -> int:
        """Bytes that the probe measures for a micro-batch of this size; measured once for equal arguments."""
        width = self._width(fit)
        counted = max(1, min(fit.work.counted, width - 1))
        key = fit.choice.precision, start.spec.method, start.spec.mask, plan.train, micro, width, counted, kept_layers
        if key not in self._probed:
            model = self._space.loaded_model(fit.choice.precision)
            slot = model.slot(start)
            names = matching(slot.parameters, plan.train)
            with lean.keeping(slot.model, kept_layers):
                self._probed[key] = probe.kept_bytes(slot, self._config.task, names, micro, width, counted)
        return self._probed[key]

    @staticmethod
    def _width(fit: Fit) -> int:
        return min(fit.choice.length, fit.work.longest)

    def report(self, plan: Plan, examples: Sequence[Example], fit: Fit, result: TrainingResult | None, moved: int) -> dict[str, float]:
        """The device's measurements for the update; stores the correction for the client's next turn.

        Args:
            plan: The fitted plan.
            examples: The rows.
            fit: The fit.
            result: Loss and cost of training; None if the turn did not train.
            moved: Bytes received and sent.
        """
        choice, steps = fit.choice, result.steps if result else 0
        measured = result if result and not fit.simulated and plan.privacy == "none" else None
        by = measured or fit
        micro, kept, out = by.micro, by.kept_layers, by.out_of_memory
        fit = dataclasses.replace(fit, micro=micro, kept_layers=kept)
        report = {
            "rank": choice.rank,
            "batch": choice.batch,
            "micro_batch": micro,
            "kept_layers": fit.shapes.layers if kept is None else kept,
            "length": choice.length,
            "out_of_memory": out,
            "estimated_mb": choice.memory_mb,
            "estimated_s": choice.seconds,
        }
        rest, took = fit.rest, result.seconds if result else 0.0
        if fit.simulated:
            tokens = _tokens(plan, examples, steps, self._width(fit))
            operations = flops(self.shapes, fit.work.passes * tokens)
            took = virtual_seconds(fit.device, operations, moved, seed=self._config.seed, round=plan.round, client=plan.client)
            report |= {"virtual_s": took, "peak_mb": (fit.weights + rest) / 1e6}
        elif measured:
            rest = int((measured.peak_mb - measured.began_mb) * 1e6)
        if steps and (fit.simulated or measured):
            self._write(plan, fit, rest, took)
        return {name: float(value) for name, value in report.items()}

    # -- corrections ----------------------------------------------------------------------------------------------------------------------

    def _read(self, client: str, round: int) -> Correction:
        kept = self._store.read(client, round)
        return Correction(memory=float(kept["memory"]), time=float(kept["time"])) if kept else Correction()

    def _write(self, plan: Plan, fit: Fit, rest: int, took: float | None) -> None:
        """Store this round's ratios measured / estimated. A turn's time is noisy, so the geometric mean of old and new ratio is stored."""
        work, precision, width = fit.work, fit.choice.precision, self._width(fit)
        _, expected = memory_bytes(fit.shapes, precision, work.entries, fit.micro, width, min(work.counted, width), fit.kept_layers)
        memory, time = rest / expected if rest > 0 else fit.used.memory, fit.used.time
        if took is not None and plan.steps:
            tokens = work.passes * plan.steps * plan.batch_size * plan.accumulate * width
            if (raw := seconds(fit.device, flops(self.shapes, tokens), work.nbytes)) > 0 and took > 0:
                time = math.sqrt(time * took / raw)
        values = {"memory": torch.tensor(memory, dtype=torch.float64), "time": torch.tensor(time, dtype=torch.float64)}
        self._store.write(plan.client, plan.round, AdapterState(values, AdapterSpec(method="device")))


def fixed_choice(config: Config, device: DeviceClass, shapes: Shapes, deadline_s: float | None) -> FixedChoice:
    """Precision and rank for the longest row that the task allows, without loading the model.

    Raises:
        Decline: No precision fits the memory.
        ModelError: The machine, the architecture or the method does not support the profile's precision.
    """
    rank, length = choose_rank(device, shapes, deadline_s), config.task.max_length
    counted = task_of(config.task).usual_targets(length)
    entries = shapes.adapter(rank)
    work = Workload(batch=config.client.batch_size, steps=1, length=length, longest=length, counted=counted, entries=entries)
    choice = choose(device, shapes, work, rank=rank, precisions=precisions(config, device, shapes))
    return FixedChoice(precision=choice.precision, rank=rank or None)


def for_device(config: Config, device: DeviceClass) -> Config:
    """The experiment in a real device's precision, so that the device never loads a backbone of higher precision.

    Raises:
        Decline: No precision fits the memory.
        ModelError: See `fixed_choice`.
    """
    labels = task_of(config.task).outputs(max(2, len(config.data.labels)))
    chosen = fixed_choice(config, device, shapes_of(config, labels), config.round_timeout_s)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=chosen.precision))


def precisions(config: Config, device: DeviceClass, shapes: Shapes) -> list[str]:
    """The precisions that machine, architecture and method support, from the config's precision to lower ones.

    Raises:
        ModelError: They do not support the profile's precision.
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
    """Raises ModelError if the backbone cannot be stored in this precision."""
    if precision not in QUANTIZED:
        return
    if precision not in shapes.compute:
        raise ModelError(f"model.precision={precision} needs bitsandbytes: install it, or take bf16")
    if precision == "nf4" and not shapes.linear.keys() - shapes.whole:
        raise ModelError("model.precision=nf4: no layer of this backbone has a row length that is a multiple of 64: take int8 or bf16")
    from fedtune.models.quantize import require_kernel

    require_kernel(precision, shapes.compute[precision], pick_device(config.model.device))


def _work(plan: Plan, examples: Sequence[Example], task: TaskConfig, entries: int, nbytes: int) -> Workload:
    length = task.max_length
    if plan.privacy == "none":
        longest = max(len(e.input_ids) for e in examples)
        counted = max(1, *(task_of(task).count(e) for e in examples))
    else:
        longest, counted = length, task_of(task).most_targets(length)
    return Workload(
        batch=plan.batch_size,
        accumulate=plan.accumulate,
        steps=steps_of(plan, len(examples)),
        length=length,
        longest=longest,
        counted=counted,
        entries=entries,
        nbytes=nbytes,
        passes=turn_of(plan).passes,
    )


def _tokens(plan: Plan, examples: Sequence[Example], steps: int, width: int) -> float:
    """Tokens of the turn, including padding; a private turn counts every row at full length, because row lengths are secret."""
    if plan.privacy != "none":
        return float(steps * plan.batch_size * plan.accumulate * width)
    lengths = [len(e.input_ids) for e in examples]
    stream = batches(len(lengths), plan.batch_size, plan.seed)
    some = (next(stream) for _ in range(steps * plan.accumulate))
    return float(sum(len(batch) * max(lengths[i] for i in batch) for batch in some))
