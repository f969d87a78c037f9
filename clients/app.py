"""The Flower ClientApp: answers the hello, trains according to a Plan, evaluates. It is the same on every engine and on a device.

A turn (one client's work in one round) has three parts: `prepare` reads the message and decides whether this device can participate, then
the client trains or measures, and `finish` writes the reply. An engine that trains many clients at once calls `prepare` and `finish`
itself; the messages are the same.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune.clients.declining import client_named, decline_on_error
from fedtune.clients.devices.choice import describe
from fedtune.clients.devices.fitting import Fit
from fedtune.clients.host import ClientHost
from fedtune.clients.loaded_model import LoadedModel
from fedtune.clients.steps import lr_at, steps_of
from fedtune.clients.trainer import TrainingResult, train
from fedtune.clients.turns import Turn, Work, check_private, make, turn_of
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.hello import ClientHello
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.privacy_terms import check_terms
from fedtune.contracts.scores import SHARED
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.wire import ServerMessage, read_message, read_offer
from fedtune.data import Example
from fedtune.errors import DataError, Decline, FedtuneError, PlanError
from fedtune.models import LiveAdapter
from fedtune.models.sparse import SparseSlot
from fedtune.privacy.noise import source
from fedtune.privacy.turn import TurnPrivacy, budget_error, privacy_measurements, turn_privacy
from fedtune.privacy.user import noised
from fedtune.traffic import Codec, decode_broadcast, encode_update

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PreparedTurn:
    """A turn that is ready to start.

    Args:
        message: The train message.
        plan: The server's plan, reduced to the device's limits.
        loaded_model: The backbone and adapter slots that the turn uses.
        start: The initial tensors.
        sent_bytes: Bytes of the tensors in the message.
        turn: The client side of the method.
        extra: The tensors that the server sent for `turn`.
        examples: The client's training rows.
        fit: The device's choice; None without a device profile.
        device_class: The name of the client's device class.
        private: Clipping and noise of the turn; None for a turn without privacy.
        sent: The decoded tensors of the message. An encoded reply contains differences from them.
    """

    message: Message
    plan: Plan
    loaded_model: LoadedModel
    start: AdapterState
    sent_bytes: int
    turn: Turn
    extra: Mapping[str, Tensor]
    examples: Sequence[Example]
    device_class: str
    fit: Fit | None = None
    private: TurnPrivacy | None = None
    sent: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Rows per micro-batch and kept layers, as arguments of `train`; None for a simulated device, which only reports them."""
        return (None, None) if self.fit is None or self.fit.simulated else (self.fit.micro, self.fit.kept_layers)


def make_client_app(host: ClientHost) -> ClientApp:
    """The ClientApp of this host's clients."""
    app = ClientApp()

    @app.query()
    @decline_on_error
    def hello(message: Message, context: Context) -> Message:
        client = client_of(host, context)
        with client_named(client):
            rows, fixed = host.space.federation.clients[client], host.devices.fixed_choice(client)
            model = host.space.loaded_model(fixed.precision)
        reply = ClientHello(
            client=client,
            device_class=rows.device_class,
            rank=fixed.rank,
            examples=len(rows.train),
            held_out=len(rows.held_out),
            base=host.space.backbone.fingerprint,
            shifts=model.frozen.versions,
            start=host.space.start[0] if host.space.start else "",
            remembers=host.config.engine.kind != "ray",  # on Ray, another worker may run this client's next turn
            device="" if host.device is None else describe(host.device, host.devices.first_choice(client)),
        )
        return Message(RecordDict({"hello": ConfigRecord({"json": reply.to_json()})}), reply_to=message)

    @app.query("offer")
    @decline_on_error
    def offer(message: Message, context: Context) -> Message:
        check_offer(host, message, context)
        return Message(RecordDict({"offer": ConfigRecord({"accepted": True})}), reply_to=message)

    @app.train()
    @decline_on_error
    def turn(message: Message, context: Context) -> Message:
        return take_turn(host, prepare(host, message, context))

    @app.evaluate()
    @decline_on_error
    def evaluate(message: Message, context: Context) -> Message:
        if host.floor is not None:
            raise Decline("privacy", "this device does not report exact scores of its rows (--min-privacy): set eval.clients=0")
        (reply,) = evaluate_together(host, [(message, context)])
        return reply

    return app


def _with_spent_privacy(who: Callable[P, tuple[ClientHost, str]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Attach the client's spent ε to every error of a step, because an earlier reply that reported it may be lost."""

    def wrap(step: Callable[P, R]) -> Callable[P, R]:
        @wraps(step)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return step(*args, **kwargs)
            except Exception as bad:
                host, client = who(*args, **kwargs)
                offline = isinstance(bad, Decline) and bad.kind == "offline"  # simulates a device that does not answer
                if host.storage.ledgers is not None and not offline:
                    privacy = host.config.privacy
                    with contextlib.suppress(FedtuneError):  # an unreadable ledger must not hide the first error
                        if (ledger := host.ledger(client)).spent():
                            cast(Any, bad).epsilon = ledger.epsilon(privacy.delta, privacy.accountant)
                raise

        return wrapped

    return wrap


@_with_spent_privacy(lambda host, todo: (host, todo.plan.client))
def take_turn(host: ClientHost, todo: PreparedTurn) -> Message:
    """Run one client's turn and write its reply."""
    plan, live = todo.plan, todo.loaded_model.slot(todo.start)
    live.load(todo.start)
    work = work_of(host, todo, live)
    if not todo.turn.trains:
        return _reply(host, todo, todo.turn.observe(work), {}, {"steps": 0})
    gradients, (micro, kept_layers) = None, todo.limits
    if plan.privacy == "record" and todo.private is not None:
        host.ledger(plan.client).spend(plan.round, todo.private.cost, plan.privacy)
        gradients = todo.private
    store = host.storage.store.substore("optimizer")
    done = train(
        work,
        todo.turn,
        micro=micro,
        kept_layers=kept_layers,
        private=gradients,
        secure_rng=host.config.privacy.secure_rng,
        moments=store.read(plan.client, plan.round) if plan.keep_optimizer else None,
    )
    if done.moments is not None:
        store.write(plan.client, plan.round, done.moments)
    return finish(host, todo, live.read(version=plan.base_version), done)


def work_of(host: ClientHost, todo: PreparedTurn, live: LiveAdapter | SparseSlot) -> Work:
    """The arguments of the turn's methods."""
    (micro, kept_layers), plan, store = todo.limits, todo.plan, host.storage.store.substore(f"turn-{todo.plan.turn}")

    def retrain(start: AdapterState, turn: Turn) -> AdapterState:
        live.load(start)
        train(dataclasses.replace(work, start=start), turn, micro=micro, kept_layers=kept_layers)
        return live.read(version=plan.base_version)

    work = Work(
        live=live,
        start=todo.start,
        plan=plan,
        task=host.config.task,
        examples=todo.examples,
        pad_id=host.space.pad_id,
        extra=todo.extra,
        recall=lambda: store.read(plan.client, plan.round),
        keep=lambda state: store.write(plan.client, plan.round, state),
        retrain=retrain if plan.privacy != "record" else None,
    )
    return work


def evaluate_together(host: ClientHost, requests: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Replies to evaluate messages. All messages have the same adapter; all clients have the same loaded model.

    If clients have personal adapters, their metrics are those of their own, and those of the shared adapter have the prefix `shared_`.
    """
    request = read_message(requests[0][0].content)
    clients = [client_of(host, context) for _, context in requests]
    model = host.loaded_model(clients[0])
    model.rebase(request.base, request.shifts, request.snapshot)
    rows = [host.space.examples(client, "held_out") for client in clients]
    turn = make(request.turn, request.params)
    if request.keep or turn.is_personal():
        store = host.storage.store.substore(f"turn-{request.turn}")  # an evaluation follows its round's turn, hence round + 1
        own = [turn.personal(host.complete(c, request), store.read(c, request.round + 1)) for c in clients]
        scores = [model.score(adapter, r)[0] for adapter, r in zip(own, rows, strict=True)]
        shared = model.score(request.adapter, *rows)
        scores = [mine | {SHARED + n: v for n, v in theirs.items()} for mine, theirs in zip(scores, shared, strict=True)]
    else:
        scores = model.score(request.adapter, *rows)
    replies = [RecordDict({"metrics": ConfigRecord({"json": json.dumps(metrics)})}) for metrics in scores]
    return [Message(content, reply_to=message) for content, (message, _) in zip(replies, requests, strict=True)]


@_with_spent_privacy(lambda host, message, context: (host, client_of(host, context)))
def prepare(host: ClientHost, message: Message, context: Context) -> PreparedTurn:
    """Read a train message.

    Raises:
        PlanError: The plan is invalid or for another client.
        Decline: The device is offline this round, the turn does not fit the device, or its privacy budget is spent.
        DataError: The client has no usable training row.
        UpdateMismatch: The adapter cannot be read.
    """
    request = read_message(message.content)
    host.take_start(request)
    sent_bytes = request.nbytes
    if request.encoding:
        request = dataclasses.replace(request, adapter=decode_broadcast(request.encoding, request.adapter, host.space.initial.tensors))
    model, start, plan, turn, examples, fit, private = _fit_turn(host, client_of(host, context), request, sent_bytes)
    model.rebase(request.base, request.shifts, request.snapshot)
    examples = model.with_reference(examples)
    return PreparedTurn(
        message=message,
        plan=plan,
        loaded_model=model,
        start=start,
        sent_bytes=sent_bytes,
        turn=turn,
        extra=request.extra,
        examples=examples,
        fit=fit,
        device_class=host.space.federation.clients[plan.client].device_class,
        private=private,
        sent=request.adapter.tensors,
    )


@_with_spent_privacy(lambda host, message, context: (host, client_of(host, context)))
def check_offer(host: ClientHost, message: Message, context: Context) -> None:
    """Check an offer: a train message without its tensors.

    Raises:
        FedtuneError: The errors of `prepare` that do not depend on the tensors' values, such as the message's size.
    """
    request, nbytes = read_offer(message.content)
    _fit_turn(host, client_of(host, context), request, nbytes)


def _fit_turn(
    host: ClientHost, client: str, request: ServerMessage, sent_bytes: int
) -> tuple[LoadedModel, AdapterState, Plan, Turn, Sequence[Example], Fit | None, TurnPrivacy | None]:
    """Loaded model, initial tensors, fitted plan, its turn, the rows, the device's choice, and clipping and noise."""
    plan = request.plan
    if plan is None:
        raise PlanError("the train message has no plan: run the same version of fedtune on server and client")
    if plan.client != client:
        raise PlanError(f"the plan is for client '{plan.client}', but this is client '{client}'")
    check_terms(plan, host.config)
    turn = turn_of(plan)
    check_private(plan)
    if host.floor is not None:
        host.floor.check(plan.privacy)
    if host.devices.is_offline(client, plan.round):
        raise Decline("offline", "the device is offline this round")
    model = host.loaded_model(client)
    if plan.codec:
        Codec.from_name(plan.codec)  # reject an unknown codec before training
    examples = host.space.examples(client, "train")
    if not examples:
        raise DataError(f"client {client} has no training row that it can use: {host.space.unusable(client)}")
    start = host.complete(client, request)
    sent = turn.sent_bytes
    if sent is None:
        sent = sum(start[n].nbytes for n in matching(start.tensors, plan.send))
    if found := host.devices.fit(plan, start, sent_bytes + sent):
        plan, examples, fit = found
    else:
        fit = None
    private = turn_privacy(plan, len(examples), steps_of(plan, len(examples)))
    if private is not None and host.floor is not None:
        host.floor.check_budget(private)
    if private is not None and (why := budget_error(plan, host.ledger(client), private)):
        raise Decline("privacy", why)
    return model, start, plan, turn, examples, fit, private


def finish(host: ClientHost, todo: PreparedTurn, trained: AdapterState, result: TrainingResult) -> Message:
    """The reply to a train message: the tensors of `plan.send` and the turn's measurements. Stores the tensors of `plan.keep`."""
    plan = todo.plan
    work, began = work_of(host, todo, todo.loaded_model.slot(todo.start)), time.perf_counter()
    trained = todo.turn.finish(dataclasses.replace(work, memory=result.memory), trained)
    result = dataclasses.replace(result, seconds=result.seconds + time.perf_counter() - began)
    if kept := matching(trained.tensors, plan.keep):
        host.storage.store.write(plan.client, plan.round, trained.subset(kept))
    sent = trained.subset(matching(trained.tensors, plan.send))
    losses = {"train_loss": result.loss, "start_loss": result.start_loss}
    metrics = {name: loss for name, loss in losses.items() if loss is not None}
    measurements = {
        "steps": result.steps,
        "lr_sum": sum(lr_at(plan, step, result.steps) for step in range(result.steps)),
    }
    if plan.privacy == "none":  # both depend on the rows' lengths and on the sampled rows
        measurements |= {"seconds": result.seconds, "peak_mb": result.peak_mb}
    if (private := todo.private) is not None:
        ledger = host.ledger(plan.client)
        if plan.privacy == "user":
            ledger.spend(plan.round, private.cost, plan.privacy)
            drawn = source(host.config.privacy.secure_rng, plan.seed, "noise")
            sent = sent.replace(noised(sent.tensors, todo.start.tensors, clip=private.clip, noise=private.noise, source=drawn))
            metrics = {}  # exact losses would disclose information about the rows
        measurements |= privacy_measurements(plan, ledger, private)
    return _reply(host, todo, _encoded(host, todo, sent) if plan.codec else sent, metrics, measurements, result)


def _encoded(host: ClientHost, todo: PreparedTurn, trained: AdapterState) -> AdapterState:
    """The encoded tensors. A codec with feedback stores the encoding error and adds it in the client's next turn."""
    plan, codec = todo.plan, Codec.from_name(todo.plan.codec)
    if missing := [n for n in trained.tensors if n not in todo.sent]:
        raise PlanError(
            f"the plan asks for the change of '{missing[0]}', which the server did not send: run the same version of fedtune on both sides"
        )
    store = host.storage.store.substore("residuals")
    kept = store.read(plan.client, plan.round) if codec.feedback else None
    before = kept.tensors if kept and kept.spec.method == trained.spec.method else {}
    sent, left = encode_update(codec, trained, todo.sent, before, derive_seed(plan.seed, "codec"))
    if codec.feedback:
        store.write(plan.client, plan.round, trained.replace(left))
    return sent


def _reply(
    host: ClientHost,
    todo: PreparedTurn,
    sent: AdapterState,
    metrics: Mapping[str, float],
    measurements: Mapping[str, float],
    result: TrainingResult | None = None,
) -> Message:
    plan = todo.plan
    sent = sent.replace(version=plan.base_version)
    if todo.fit is not None:
        report = host.devices.report(plan, todo.examples, todo.fit, result, todo.sent_bytes + sent.nbytes)
        measurements = {**measurements, **report}
    update = Update(
        client=plan.client,
        round=plan.round,
        base_version=plan.base_version,
        adapter=sent,
        examples=len(host.space.federation.clients[plan.client].train),
        metrics=metrics,
        measurements={"virtual_s": 0.0, **measurements},
        device_class=todo.device_class,
        precision=todo.fit.choice.precision if todo.fit else "",
    )
    record = ConfigRecord({"json": update.to_json(), "spec": sent.spec.to_json()})
    return Message(RecordDict({"adapter": sent.to_arrays(), "update": record}), reply_to=todo.message)


def client_of(host: ClientHost, context: Context) -> str:
    """The logical id of this node's client."""
    return host.space.client_ids[int(context.node_config["partition-id"])]
