"""What a client's reply says, read and checked before it counts: nothing that a peer claims is taken on trust."""

import itertools
import math

from flwr.app import RecordDict

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import MOST_NUMBERS, Update, matching, short
from fedtune.contracts.strategy import Assignment
from fedtune.errors import UpdateError, UpdateMismatch
from fedtune.privacy.verify import verify
from fedtune.storage.parsing import parse_json
from fedtune.traffic import Codec, decode_update

_ADAMW = (1 - 0.9) / (1 - 0.999) ** 0.5
_SLACK = 1.5  # codecs round what was trained
_ROUNDING = 1e-3
OURS = (
    "round",
    "client",
    "dropped",
    "bytes_up",
    "bytes_down",
    "staleness",
    "late",
    "weight",
)  # of a client's line, only the server writes them


def read_update(content: RecordDict, assignment: Assignment, *, examples: int | None = None) -> Update:
    """Read and check what a client sent against what it was asked for.

    Args:
        content: The reply.
        assignment: What was asked.
        examples: Rows that the client said it has when it said hello; None where it did not.

    Raises:
        UpdateError: One sentence with the first thing that is wrong.
    """
    try:
        return _read_update(content, assignment, examples)
    except OverflowError:  # JSON knows whole numbers of any length
        raise UpdateError("the update has a number that is too large to count with") from None


def _read_update(content: RecordDict, assignment: Assignment, examples: int | None) -> Update:
    plan = assignment.plan
    try:
        said = content.config_records["update"]
        arrays = content.array_records["adapter"]
        spec, text = str(said["spec"]), str(said["json"])
    except KeyError as bad:
        raise UpdateError(f"the reply has no record {bad}: the peers run different versions of fedtune") from None
    due, got = wanted(assignment), AdapterSpec.from_json(spec)
    if assignment.may_prune:
        due = _pruned(due, got)
    if (got.method, got.base) != (due.spec.method, due.spec.base):
        raise UpdateMismatch(f"the update is {got.method} on backbone {got.base[:12]}, asked was {due.spec.method} on {due.spec.base[:12]}")
    if dict(got.ranks) != dict(due.spec.ranks) or dict(got.scaling) != dict(due.spec.scaling):
        raise UpdateMismatch("the update's ranks or scaling are not those of the adapter that was sent")
    if plan.codec:  # from here on nobody sees that it was encoded
        adapter = decode_update(Codec.from_name(plan.codec), AdapterState.from_arrays(arrays, got), due)
    else:
        adapter = AdapterState.from_arrays(arrays, got, due)
    update = Update.from_json(text, adapter)
    if examples is not None and update.examples != examples:
        raise UpdateError(f"the update counts {update.examples} examples, the client said hello with {examples}: its weight is fixed there")
    _check_numbers(update, assignment)
    _check_reach(update, assignment)
    verify(plan, update.measurements)
    for name, came, asked in (
        ("client", update.client, plan.client),
        ("round", update.round, plan.round),
        ("base_version", update.base_version, plan.base_version),
    ):
        if came != asked:
            raise UpdateError(f"the update is for {name} {came}, asked was {asked}: it is stale or not this client's own")
    return update


def wanted(assignment: Assignment) -> AdapterState:
    """What a reply must look like, once it is decoded."""
    return assignment.expect or assignment.adapter.subset(matching(assignment.adapter.tensors, assignment.plan.send))


def _check_numbers(update: Update, assignment: Assignment) -> None:
    """What strategies count with must be there, and possible, whatever the client says."""
    plan = assignment.plan
    if assignment.expect is None:
        steps, lr_sum = (update.measurements.get(n, -1.0) for n in ("steps", "lr_sum"))
        if not (steps >= 0 and lr_sum >= 0):
            raise UpdateError("the update's steps and lr_sum must be there and not negative: the peers run different versions of fedtune")
        most = plan.steps
        if most is None:
            most = max(1, math.ceil(update.examples * (plan.epochs or 0) / (plan.batch_size * plan.accumulate)))
        if steps > most:
            raise UpdateError(f"the update tells of {steps:g} steps, asked were {most} at most")
        if lr_sum > steps * max(plan.lr, plan.lr_last) * (1 + 1e-6):
            raise UpdateError(f"the update's lr_sum={lr_sum:g} is more than {steps:g} steps of the plan's learning rate come to")
    if missing := [n for n in plan.measure if not update.metrics.get(n, -1.0) >= 0]:
        raise UpdateError(f"the update's {missing[0]} was asked for, and must be there and not negative")


def _check_reach(update: Update, assignment: Assignment) -> None:
    """No update can be farther away than its steps could have gone: what is, was made up, or the client is broken.

    AdamW moves an entry by at most lr·(1 − β1)/√(1 − β2) = 3.2·lr a step, whatever the gradient (Kingma & Ba 2015, arXiv:1412.6980, §2.1),
    and lr·decay of itself. SGD goes where the gradient says, so that only a clipped one has a bound: lr·clip a step, over all tensors
    and with all that a turn adds.
    Noise for privacy and what an earlier update left out are no steps: with them there is no bound.
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
        most = reach * (_ADAMW if plan.optimizer == "adamw" else float(plan.clip_norm or 0.0))
        limit = _SLACK * grown * (most + plan.weight_decay * reach * before.abs().max().item()) if tensor.numel() else 0.0
        if moved > limit + _ROUNDING * (1.0 + before.abs().max().item() if tensor.numel() else 0.0):
            raise UpdateError(
                f"the update moves an entry of '{name}' by {moved:.3g}, and {update.measurements['steps']:g} steps of the plan could have"
                f" moved it by {limit:.3g} at most: it was not trained so, and must not count"
            )


def _pruned(sent: AdapterState, got: AdapterSpec) -> AdapterState:
    """What must come back where a client was free to give up ranks; as it was sent where the client claims more than it may."""
    ranks = sent.spec.ranks
    if got.ranks.keys() != ranks.keys() or any(got.ranks[m] > r for m, r in ranks.items()):
        return sent
    tensors = dict(sent.tensors)
    for module, rank in got.ranks.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        tensors.update({n: t for n, t in ((a, sent[a][:rank]), (b, sent[b][:, :rank])) if n in tensors})
    return sent.replace(tensors, ranks=got.ranks)


def read_metrics(content: RecordDict) -> dict[str, float]:
    """A client's metrics; what is not a finite number is left out, and so is what has no short name or comes after too many others."""
    try:
        raw = parse_json(str(content.config_records["metrics"]["json"]))
        some = itertools.islice(raw.items(), MOST_NUMBERS)
        return {k: float(v) for k, v in some if k not in OURS and short(k) and isinstance(v, (int, float)) and math.isfinite(v)}
    except (KeyError, ValueError, AttributeError, OverflowError):
        return {}
