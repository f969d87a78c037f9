"""Writes and reads the server's messages to clients. The format is the same on every engine and on a device.

adapter     ArrayRecord     the adapter's tensors
spec        ConfigRecord    the adapter's spec
frame       ConfigRecord    the round, the versions of the shifts that the frozen weights must include, the patterns of the client's
                            personal tensors, the encoding of `adapter`, and in an evaluation the turn that defines the personal adapter;
                            in a warm start the digest of the start, if `adapter` omits some of its tensors
plan        ConfigRecord    the client's plan (train messages only)
extra       ArrayRecord     additional tensors that the plan's turn needs; absent if there are none
start       ArrayRecord     the adapter of a warm start; absent if the client has it, or if `adapter` omits none of its tensors
shift-V     ArrayRecord     the shift that round V merged into the frozen weights; absent if the client has it
snapshot    ArrayRecord     sums of all shifts, for weights whose sum is smaller than the missing shifts; the shifts then omit these weights

An offer precedes a message with shifts. It has `spec`, `frame` and `plan` as above, and no tensors. The client accepts it, or declines it
if the message does not fit its device.

offer       ConfigRecord    bytes of the message's tensors, and shapes of `adapter`
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
class ServerMessage:
    """The server's message to one client, after parsing.

    Args:
        round: The message's round.
        adapter: The adapter's tensors.
        base: Versions of all shifts that the frozen weights must include, in order.
        shifts: The shifts in this message.
        snapshot: Sums of all shifts for the weights that it names; the shifts then omit these weights.
        keep: Patterns of the client's personal tensors.
        encoding: Encoding of `adapter`, for fedtune.traffic; "" if it is not encoded.
        plan: The client's plan; None in an evaluation.
        turn: Evaluation: the client's next turn, which defines its personal adapter.
        params: Parameters of `turn`.
        extra: Additional tensors that the plan's turn needs.
        start_digest: Digest of the start, from which the client takes the tensors that `adapter` omits; "": the client draws them.
        start: The start, if it is in this message.
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
    start_digest: str = ""
    start: AdapterState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter, start, shifts and snapshot."""
        return sum(state.nbytes for state in (self.adapter, self.start, *self.shifts, self.snapshot) if state is not None)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The record `frame`; its fields are those of `ServerMessage`."""

    round: int
    base: tuple[int, ...]
    keep: tuple[str, ...]
    encoding: str
    turn: str = PLAIN
    params: Mapping[str, Scalar] = field(default_factory=dict)
    start: str = ""


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """The record `offer`."""

    bytes: int
    shapes: Mapping[str, tuple[int, ...]]


class MessageWriter:
    """Writes the messages of one round. Tensors that many clients get are encoded once.

    Args:
        round: The round.
        shifts: Shifts merged into the frozen weights.
        encode: Adapter → (encoded adapter, name of the encoding); None sends adapters unencoded.
        snapshot: Sums of all shifts, for the weights whose sum is smaller than its factors.
        start: The start of a warm start; None: clients draw the first adapter.
    """

    def __init__(
        self,
        round: int,
        shifts: Sequence[AdapterState],
        encode: Callable[[AdapterState], tuple[AdapterState, str]] | None = None,
        snapshot: AdapterState | None = None,
        start: AdapterState | None = None,
    ) -> None:
        self._round, self._shifts, self._encode, self._snapshot, self._start = round, tuple(shifts), encode, snapshot, start
        self._digest = start.digest if start else ""
        self._base = tuple(s.spec.version for s in self._shifts)
        summed = {n.removesuffix(".weight") for n in snapshot.tensors} if snapshot else set[str]()
        self._unsummed = [_without(s, summed) for s in self._shifts] if summed else []
        self._adapters: dict[int, tuple[AdapterState, AdapterState, str]] = {}  # holds the state, so that its id is not reused
        self._encoded: dict[int, tuple[AdapterState, ArrayRecord]] = {}

    def write(
        self,
        adapter: AdapterState,
        *,
        held: Sequence[int],
        plan: Plan | None = None,
        extra: Mapping[str, Tensor] | None = None,
        next_plan: Plan | None = None,
        started: str = "",
    ) -> RecordDict:
        """The content of one message to a client that holds the shifts `held` and the start with the digest `started`.

        A train message has a `plan`; an evaluation has the client's `next_plan`.
        """
        sent, encoding = self._encode_adapter(adapter)
        relevant = plan or next_plan
        frame = {"round": self._round, "base": list(self._base), "keep": list(relevant.keep) if relevant else [], "encoding": encoding}
        if next_plan is not None:
            frame |= {"turn": next_plan.turn, "params": dict(next_plan.params)}
        begins = self._start is not None and _omits(adapter, self._start)
        if begins:
            frame["start"] = self._digest
        content = RecordDict(
            {"adapter": self._arrays(sent), "spec": _text(adapter.spec.to_json()), "frame": _text(json.dumps(frame))}  # type: ignore[arg-type]
        )
        if plan is not None:
            content["plan"] = _text(plan.to_json())
        if extra:
            content["extra"] = AdapterState(extra, adapter.spec).to_arrays()
        if self._start is not None and begins and started != self._digest:
            content["start"], content["start-spec"] = self._arrays(self._start), _text(self._start.spec.to_json())
        for name, state in self._missing(held):
            content[name], content[f"{name}-spec"] = self._arrays(state), _text(state.spec.to_json())
        return content

    def offer(self, content: RecordDict, adapter: AdapterState, held: Sequence[int]) -> RecordDict | None:
        """The offer that precedes the message `content` to a client that holds the shifts `held`; None if the message has no shifts."""
        if not (shifts := self._missing(held)):
            return None
        start = self._start.nbytes if self._start is not None and "start" in content.array_records else 0
        nbytes = self._encode_adapter(adapter)[0].nbytes + start + sum(state.nbytes for _, state in shifts)
        offer = {"bytes": nbytes, "shapes": {n: list(t.shape) for n, t in adapter.tensors.items()}}
        return RecordDict({**{name: content[name] for name in ("spec", "frame", "plan")}, "offer": _text(json.dumps(offer))})  # type: ignore[arg-type]

    def _missing(self, held: Sequence[int]) -> list[tuple[str, AdapterState]]:
        """The records that update weights with these shifts to the current version: missing shifts, or the snapshot if it is smaller."""
        has = len(held) if tuple(held) == self._base[: len(held)] else 0  # a client with other shifts resets its weights to W0
        shifts = [(f"shift-{s.spec.version}", s) for s in self._shifts[has:]]
        if self._snapshot is None or not shifts:
            return shifts
        short = [("snapshot", self._snapshot), *((f"shift-{s.spec.version}", s) for s in self._unsummed[has:])]
        return min(shifts, short, key=lambda records: sum(state.nbytes for _, state in records))

    def _encode_adapter(self, adapter: AdapterState) -> tuple[AdapterState, str]:
        if self._encode is None or not adapter.tensors:
            return adapter, ""
        if id(adapter) not in self._adapters:
            self._adapters[id(adapter)] = adapter, *self._encode(adapter)
        return self._adapters[id(adapter)][1:]

    def _arrays(self, state: AdapterState) -> ArrayRecord:
        if id(state) not in self._encoded:
            self._encoded[id(state)] = state, state.to_arrays()
        return self._encoded[id(state)][1]


def read_message(content: RecordDict) -> ServerMessage:
    """Read what `MessageWriter.write` wrote.

    Raises:
        PlanError: The message or its plan is not valid in this version of fedtune.
        UpdateMismatch: The tensors cannot be read.
    """
    try:
        frame = read_object(_Frame, _json_of(content, "frame"), ValueError, "frame")
        spec = _spec_of(content, "spec")
        sent = [n for n in ("start", "snapshot", *(f"shift-{v}" for v in frame.base)) if n in content.array_records]
        states = {
            n: AdapterState.from_arrays(content.array_records[n], AdapterSpec.from_json(_json_of(content, f"{n}-spec"))) for n in sent
        }
        extra = content.array_records.get("extra")
        return ServerMessage(
            round=frame.round,
            adapter=AdapterState.from_arrays(content.array_records["adapter"], spec),
            base=frame.base,
            start_digest=frame.start,
            start=states.pop("start", None),
            snapshot=states.pop("snapshot", None),
            shifts=tuple(states.values()),
            keep=frame.keep,
            encoding=frame.encoding,
            plan=Plan.from_json(_json_of(content, "plan")) if "plan" in content.config_records else None,
            turn=frame.turn,
            params=frame.params,
            extra=AdapterState.from_arrays(extra, spec).tensors if extra else {},
        )
    except (KeyError, ValueError, TypeError) as bad:
        raise PlanError(f"the server's message cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None


def start_in(content: RecordDict) -> str:
    """Digest of the start that a message of `MessageWriter.write` contains; "" if it contains none."""
    if "start" not in content.array_records:
        return ""
    return read_object(_Frame, _json_of(content, "frame"), ValueError, "frame").start


def read_offer(content: RecordDict) -> tuple[ServerMessage, int]:
    """Read an offer: the announced message, with zeros as its tensors, and the bytes of the real tensors.

    Raises:
        PlanError: The offer or its plan is not valid in this version of fedtune.
    """
    try:
        frame = read_object(_Frame, _json_of(content, "frame"), ValueError, "frame")
        offer = read_object(_Offer, _json_of(content, "offer"), ValueError, "offer")
        if min(offer.bytes, *(d for shape in offer.shapes.values() for d in shape), 0) < 0:
            raise ValueError("a size is negative")
        tensors = {name: torch.zeros(()).expand(shape) for name, shape in offer.shapes.items()}
        adapter = AdapterState(tensors, _spec_of(content, "spec"))
        return ServerMessage(
            round=frame.round, adapter=adapter, keep=frame.keep, plan=Plan.from_json(_json_of(content, "plan")), start_digest=frame.start
        ), offer.bytes
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as bad:
        raise PlanError(f"the server's offer cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None


def _omits(adapter: AdapterState, start: AdapterState) -> bool:
    """Whether a client completes this adapter with tensors of the start."""
    return adapter.spec.method == start.spec.method and any(n not in adapter.tensors for n in start.tensors)


def _without(shift: AdapterState, modules: set[str]) -> AdapterState:
    """The shift without these modules."""
    names = [m for m in shift.spec.ranks if m not in modules]
    tensors = {n: t for n, t in shift.tensors.items() if n.rpartition(".")[0] in names}
    return shift.replace(tensors, ranks={m: shift.spec.ranks[m] for m in names}, scaling={m: shift.spec.scaling[m] for m in names})


def _text(json_text: str) -> ConfigRecord:
    return ConfigRecord({"json": json_text})


def _spec_of(content: RecordDict, name: str) -> AdapterSpec:
    return AdapterSpec.from_json(_json_of(content, name))


def _json_of(content: RecordDict, name: str) -> str:
    try:
        return str(content.config_records[name]["json"])
    except KeyError:
        raise ValueError(f"the record '{name}' is missing") from None
