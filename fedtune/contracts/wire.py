"""What a server's message to a client holds, written and read: the same on every engine and on a device.

adapter     ArrayRecord     the tensors that the client is sent
spec        ConfigRecord    what they mean
frame       ConfigRecord    the round, what the frozen weights must have had merged into them, which tensors are the client's own, how
                            `adapter` is encoded, and in an evaluation the turn whose personal adapter is meant
plan        ConfigRecord    what to do (train messages only)
extra       ArrayRecord     what the plan's turn needs beside the adapter, where it needs anything
shift-V     ArrayRecord     what was merged into the frozen weights in round V, where the client lacks it
snapshot    ArrayRecord     what all rounds have merged into some of the weights, where that is smaller than the shifts that the client
                            lacks; these then lack those weights

An offer goes before a message that brings shifts: `spec`, `frame` and `plan` as above, and no tensors. The client declines what does not
fit its device, or says that the message may come.

offer       ConfigRecord    the bytes of the message's tensors, and the shapes of `adapter`
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import PLAIN, Plan, Scalar
from fedtune.errors import PlanError
from fedtune.storage.reading import read_object

OFFER = "query.offer"  # the type of the message that carries an offer


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One message of the server, as its client reads it.

    Args:
        round: The round that it belongs to.
        adapter: The tensors that were sent.
        base: Versions of all shifts that the frozen weights must carry, in order.
        shifts: Those of them that came along.
        snapshot: What all of them have added to the weights that it names; the shifts then lack these.
        keep: Patterns of the tensors that are the client's own.
        encoding: What `adapter` is where it is encoded, for fedtune.traffic to read; "" where it is as it stands.
        plan: What to do; None in an evaluation.
        turn: Evaluation: the turn that the client takes next, which knows the adapter that the client uses itself.
        params: Its parameters.
        extra: Tensors that the plan's turn needs beside the adapter.
    """

    round: int
    adapter: AdapterState
    base: tuple[int, ...] = ()
    shifts: tuple[AdapterState, ...] = ()
    snapshot: AdapterState | None = None
    keep: tuple[str, ...] = ()
    encoding: str = ""
    plan: Plan | None = None
    turn: str = PLAIN
    params: Mapping[str, Scalar] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that came."""
        return sum(state.nbytes for state in (self.adapter, *self.shifts, self.snapshot) if state is not None)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The record `frame`; its fields are those of `Letter`."""

    round: int
    base: tuple[int, ...]
    keep: tuple[str, ...]
    encoding: str
    turn: str = PLAIN
    params: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """The record `offer`."""

    bytes: int
    shapes: Mapping[str, tuple[int, ...]]


class Envelopes:
    """Writes the messages of one round; tensors that many clients get are encoded once.

    Args:
        round: The round.
        shifts: What has been merged into the frozen weights.
        encode: Adapter → what travels in its place, and the text that says what that is; None sends adapters as they are.
        snapshot: The sum of all shifts, for the weights where that is smaller than their factors.
    """

    def __init__(
        self,
        round: int,
        shifts: Sequence[AdapterState],
        encode: Callable[[AdapterState], tuple[AdapterState, str]] | None = None,
        snapshot: AdapterState | None = None,
    ) -> None:
        self._round, self._shifts, self._encode, self._snapshot = round, tuple(shifts), encode, snapshot
        self._base = tuple(s.spec.version for s in self._shifts)
        summed = {n.removesuffix(".weight") for n in snapshot.tensors} if snapshot else set[str]()
        self._rest = [_without(s, summed) for s in self._shifts] if summed else []
        self._adapters: dict[int, tuple[AdapterState, AdapterState, str]] = {}  # the state is kept, so that its id stays its own
        self._encoded: dict[int, tuple[AdapterState, ArrayRecord]] = {}

    def write(
        self,
        adapter: AdapterState,
        *,
        held: Sequence[int],
        plan: Plan | None = None,
        extra: Mapping[str, Tensor] | None = None,
        coming: Plan | None = None,
    ) -> RecordDict:
        """The content of one message, to a client that holds the shifts of these versions.

        A message to train has a `plan`; one to evaluate has the plan that is `coming` next.
        """
        sent, encoding = self._sent(adapter)
        meant = plan or coming
        frame = {"round": self._round, "base": list(self._base), "keep": list(meant.keep) if meant else [], "encoding": encoding}
        if coming is not None:
            frame |= {"turn": coming.turn, "params": dict(coming.params)}
        content = RecordDict(
            {"adapter": self._arrays(sent), "spec": _text(adapter.spec.to_json()), "frame": _text(json.dumps(frame))}  # type: ignore[arg-type]
        )
        if plan is not None:
            content["plan"] = _text(plan.to_json())
        if extra:
            content["extra"] = AdapterState(extra, adapter.spec).to_arrays()
        for name, state in self._missing(held):
            content[name], content[f"{name}-spec"] = self._arrays(state), _text(state.spec.to_json())
        return content

    def offer(self, content: RecordDict, adapter: AdapterState, held: Sequence[int]) -> RecordDict | None:
        """What goes before the message `content` with this adapter, to a client that holds `held`; None where it brings no shift."""
        if not (shifts := self._missing(held)):
            return None
        nbytes = self._sent(adapter)[0].nbytes + sum(state.nbytes for _, state in shifts)
        said = {"bytes": nbytes, "shapes": {n: list(t.shape) for n, t in adapter.tensors.items()}}
        return RecordDict({**{name: content[name] for name in ("spec", "frame", "plan")}, "offer": _text(json.dumps(said))})  # type: ignore[arg-type]

    def _missing(self, held: Sequence[int]) -> list[tuple[str, AdapterState]]:
        """The records that bring the weights from these versions to now: the missing shifts, or the snapshot if that is less."""
        has = len(held) if tuple(held) == self._base[: len(held)] else 0  # weights that carry anything else go back to W0
        shifts = [(f"shift-{s.spec.version}", s) for s in self._shifts[has:]]
        if self._snapshot is None or not shifts:
            return shifts
        short = [("snapshot", self._snapshot), *((f"shift-{s.spec.version}", s) for s in self._rest[has:])]
        return min(shifts, short, key=lambda records: sum(state.nbytes for _, state in records))

    def _sent(self, adapter: AdapterState) -> tuple[AdapterState, str]:
        if self._encode is None or not adapter.tensors:
            return adapter, ""
        if id(adapter) not in self._adapters:
            self._adapters[id(adapter)] = adapter, *self._encode(adapter)
        return self._adapters[id(adapter)][1:]

    def _arrays(self, state: AdapterState) -> ArrayRecord:
        if id(state) not in self._encoded:
            self._encoded[id(state)] = state, state.to_arrays()
        return self._encoded[id(state)][1]


def read_letter(content: RecordDict) -> Letter:
    """Read what `Envelopes.write` wrote.

    Raises:
        PlanError: It is not a message of this version of fedtune, or its plan is not understood.
        UpdateMismatch: Its tensors cannot be read.
    """
    try:
        frame = read_object(_Frame, _said(content, "frame"), ValueError, "frame")
        spec = AdapterSpec.from_json(_said(content, "spec"))
        sent = [n for n in ("snapshot", *(f"shift-{v}" for v in frame.base)) if n in content.array_records]
        states = {n: AdapterState.from_arrays(content.array_records[n], AdapterSpec.from_json(_said(content, f"{n}-spec"))) for n in sent}
        extra = content.array_records.get("extra")
        return Letter(
            round=frame.round,
            adapter=AdapterState.from_arrays(content.array_records["adapter"], spec),
            base=frame.base,
            snapshot=states.pop("snapshot", None),
            shifts=tuple(states.values()),
            keep=frame.keep,
            encoding=frame.encoding,
            plan=Plan.from_json(_said(content, "plan")) if "plan" in content.config_records else None,
            turn=frame.turn,
            params=frame.params,
            extra=AdapterState.from_arrays(extra, spec).tensors if extra else {},
        )
    except (KeyError, ValueError, TypeError) as bad:
        raise PlanError(f"the server's message cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None


def read_offer(content: RecordDict) -> tuple[Letter, int]:
    """The message that an offer announces, its tensors zeros of the announced shapes, and the bytes of its tensors.

    Raises:
        PlanError: It is not an offer of this version of fedtune, or its plan is not understood.
    """
    try:
        frame = read_object(_Frame, _said(content, "frame"), ValueError, "frame")
        offer = read_object(_Offer, _said(content, "offer"), ValueError, "offer")
        if min(offer.bytes, *(d for shape in offer.shapes.values() for d in shape), 0) < 0:
            raise ValueError("it has a negative size")
        tensors = {name: torch.zeros(()).expand(shape) for name, shape in offer.shapes.items()}
        adapter = AdapterState(tensors, AdapterSpec.from_json(_said(content, "spec")))
        return Letter(round=frame.round, adapter=adapter, keep=frame.keep, plan=Plan.from_json(_said(content, "plan"))), offer.bytes
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as bad:
        raise PlanError(f"the server's offer cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None


def _without(shift: AdapterState, modules: set[str]) -> AdapterState:
    """The shift of the other modules."""
    names = [m for m in shift.spec.ranks if m not in modules]
    tensors = {n: t for n, t in shift.tensors.items() if n.rpartition(".")[0] in names}
    return shift.replace(tensors, ranks={m: shift.spec.ranks[m] for m in names}, scaling={m: shift.spec.scaling[m] for m in names})


def _text(json_text: str) -> ConfigRecord:
    return ConfigRecord({"json": json_text})


def _said(content: RecordDict, name: str) -> str:
    try:
        return str(content.config_records[name]["json"])
    except KeyError:
        raise ValueError(f"it has no record '{name}'") from None
