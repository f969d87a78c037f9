"""Reads and checks a client's reply before aggregation. The server does not trust reported values."""

import itertools
import math

from flwr.app import RecordDict

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import MAX_NUMBERS, Update, matching, short
from fedtune.contracts.strategy import Assignment
from fedtune.errors import UpdateError, UpdateMismatch
from fedtune.privacy.verify import verify
from fedtune.storage.parsing import parse_json
from fedtune.traffic import Codec, decode_update

_ADAMW = (1 - 0.9) / (1 - 0.999) ** 0.5  # largest AdamW step, as a multiple of lr
_SLACK = 1.5  # tolerance for codecs, which round the trained values
_ROUNDING = 1e-3
SERVER_FIELDS = (
    "round",
    "client",
    "dropped",
    "bytes_up",
    "bytes_down",
    "staleness",
    "late",
    "weight",
)  # fields of a client's metrics that only the server writes


def read_update(content: RecordDict, assignment: Assignment, *, examples: int | None = None) -> Update:
    """Read a client's reply and check it against its assignment.

    Args:
        content: The reply.
        assignment: The client's assignment.
        examples: Rows that the client's hello reported; None skips that check.

    Raises:
        UpdateError: The reply is invalid; the message names the first error.
    """
    try:
        return _read_update(content, assignment, examples)
    except OverflowError:  # JSON integers have no size limit
        raise UpdateError("the update has a number that is too large for a float") from None


def _read_update(content: RecordDict, assignment: Assignment, examples: int | None) -> Update:
    plan = assignment.plan
    try:
        record = content.config_records["update"]
        arrays = content.array_records["adapter"]
        spec, text = str(record["spec"]), str(record["json"])
    except KeyError as bad:
        raise UpdateError(f"the reply has no record {bad}: the peers run different versions of fedtune") from None
    expected, got = expected_reply(assignment), AdapterSpec.from_json(spec)
    if assignment.may_prune:
        expected = _pruned(expected, got)
    want = expected.spec
    if (got.method, got.base) != (want.method, want.base):
        raise UpdateMismatch(f"the update is {got.method} on backbone {got.base[:12]}, wanted {want.method} on {want.base[:12]}")
    if got.basis != want.basis:
        raise UpdateMismatch("the update's basis differs from that of the adapter that the server sent")
    if dict(got.ranks) != dict(want.ranks) or dict(got.scaling) != dict(want.scaling):
        raise UpdateMismatch("the update's ranks or scaling differ from those of the adapter that the server sent")
    if plan.codec:  # everything after this sees decoded tensors
        adapter = decode_update(Codec.from_name(plan.codec), AdapterState.from_arrays(arrays, got), expected)
    else:
        adapter = AdapterState.from_arrays(arrays, got, expected)
    update = Update.from_json(text, adapter)
    if examples is not None and update.examples != examples:
        raise UpdateError(f"the update reports {update.examples} examples, but the client's hello reported {examples}")
    _check_numbers(update, assignment)
    _check_reach(update, assignment)
    verify(plan, update.measurements)
    for name, came, asked in (
        ("client", update.client, plan.client),
        ("round", update.round, plan.round),
        ("base_version", update.base_version, plan.base_version),
    ):
        if came != asked:
            raise UpdateError(f"the update is for {name} {came}, wanted {asked}: it is stale or belongs to another client")
    return update


def expected_reply(assignment: Assignment) -> AdapterState:
    """A state with the names, shapes and spec that the decoded reply must have."""
    return assignment.expect or assignment.adapter.subset(matching(assignment.adapter.tensors, assignment.plan.send))


def _check_numbers(update: Update, assignment: Assignment) -> None:
    """Check that the numbers that strategies use are present and within the plan's limits."""
    plan = assignment.plan
    if assignment.expect is None:
        steps, lr_sum = (update.measurements.get(n, -1.0) for n in ("steps", "lr_sum"))
        if not (steps >= 0 and lr_sum >= 0):
            raise UpdateError("the update's steps or lr_sum is missing or negative: the peers run different versions of fedtune")
        limit = plan.steps
        if limit is None:
            limit = max(1, math.ceil(update.examples * (plan.epochs or 0) / (plan.batch_size * plan.accumulate)))
        if steps > limit:
            raise UpdateError(f"the update reports {steps:g} steps; the plan allows at most {limit}")
        if lr_sum > steps * max(plan.lr, plan.lr_last) * (1 + 1e-6):
            raise UpdateError(f"the update's lr_sum={lr_sum:g} is more than {steps:g} steps at the plan's learning rate allow")
    if missing := [n for n in plan.measure if not update.metrics.get(n, -1.0) >= 0]:
        raise UpdateError(f"the update's {missing[0]}, which the plan asks for, is missing or negative")


def _check_reach(update: Update, assignment: Assignment) -> None:
    """Reject an update that changes an entry more than its steps allow: it was forged, or the client is faulty.

    AdamW with a new state moves an entry by at most lr·(1 − β1)/√(1 − β2) = 3.2·lr per step, for any gradient (Kingma & Ba 2015,
    arXiv:1412.6980, §2.1), plus lr·decay times the entry. SGD has a bound only with gradient clipping: lr·clip per step, over all
    tensors and including the turn's added gradients. Steps do not bound privacy noise and error feedback, so an update with either is not
    checked.

    A turn that recombines has a bound for the tensor w of n entries, not for each entry, where m is the bound of an entry: a rotation moves
    w by at most 2·‖w‖ + √n·m, a product with a scale 1 ± m by at most m·‖w‖ + √n·m·(1 + m).
    """
    plan, start = assignment.plan, assignment.adapter
    if assignment.expect is not None or plan.privacy == "user" or (plan.codec and Codec.from_name(plan.codec).feedback):
        return
    if plan.optimizer == "sgd" and plan.clip_norm is None:
        return
    reach = update.measurements["lr_sum"]
    grown = 1.0 + plan.weight_decay * reach
    for name, tensor in update.adapter.tensors.items():
        if name not in start.tensors:
            continue
        before = start[name][tuple(slice(size) for size in tensor.shape)].float()
        moved = (tensor.float() - before).abs().max().item() if tensor.numel() else 0.0
        most = assignment.stretch * reach * (_ADAMW if plan.optimizer == "adamw" else float(plan.clip_norm or 0.0))
        limit = _SLACK * grown * (most + plan.weight_decay * reach * before.abs().max().item()) if tensor.numel() else 0.0
        if assignment.recombines:
            limit = (2.0 + limit) * before.norm().item() + math.sqrt(tensor.numel()) * limit * (1.0 + limit)
        if moved > limit + _ROUNDING * (1.0 + before.abs().max().item() if tensor.numel() else 0.0):
            raise UpdateError(
                f"the update moves an entry of '{name}' by {moved:.3g}, but {update.measurements['steps']:g} steps of the plan move it by"
                f" at most {limit:.3g}: it was not trained with this plan"
            )


def _pruned(sent: AdapterState, got: AdapterSpec) -> AdapterState:
    """The expected reply of a client that may prune, truncated to the reply's ranks; unchanged if these exceed the sent ranks."""
    ranks = sent.spec.ranks
    if got.ranks.keys() != ranks.keys() or any(got.ranks[m] > r for m, r in ranks.items()):
        return sent
    tensors = dict(sent.tensors)
    for module, rank in got.ranks.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        tensors.update({n: t for n, t in ((a, sent[a][:rank]), (b, sent[b][:, :rank])) if n in tensors})
    return sent.replace(tensors, ranks=got.ranks)


def read_metrics(content: RecordDict) -> dict[str, float]:
    """A client's metrics. Ignores values that are not finite numbers, long names, and entries beyond MAX_NUMBERS."""
    try:
        raw = parse_json(str(content.config_records["metrics"]["json"]))
        some = itertools.islice(raw.items(), MAX_NUMBERS)
        return {k: float(v) for k, v in some if k not in SERVER_FIELDS and short(k) and isinstance(v, (int, float)) and math.isfinite(v)}
    except (KeyError, ValueError, AttributeError, OverflowError):
        return {}
