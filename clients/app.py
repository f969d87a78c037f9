"""The Flower ClientApp: says hello, trains by a Plan, evaluates. The same on every engine and on a device.

A turn is `prepare` (read the message, may this device take part?), training or scoring, and `finish` (the reply). An engine that trains
many clients at once calls the two ends itself; the messages are the same.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune.clients.declining import declining, naming
from fedtune.clients.devices.choice import told
from fedtune.clients.devices.fitting import Fitted
from fedtune.clients.host import ClientHost
from fedtune.clients.loaded_model import Body
from fedtune.clients.steps import lr_at, steps_of
from fedtune.clients.trainer import Trained, train
from fedtune.clients.turns import Turn, Work, check_private, make, turn_of
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.hello import ClientHello
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.privacy_terms import check_terms
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
class Prepared:
    """A turn that can begin.

    Args:
        message: What asked for it.
        plan: The server's plan, as far as the device can do it.
        body: What it computes in.
        start: The tensors that it starts from.
        sent_bytes: Bytes of the tensors that came with the message.
        turn: What the method's client half does.
        extra: Tensors that the server sent for it.
        examples: The client's training rows.
        fitted: What the device chose; None where there is none.
        device_class: Its class's name.
        private: What the turn applies for privacy; None where it applies nothing.
        sent: The tensors that came with the message, decoded: what an encoded reply is the difference from.
    """

    message: Message
    plan: Plan
    body: Body
    start: AdapterState
    sent_bytes: int
    turn: Turn
    extra: Mapping[str, Tensor]
    examples: Sequence[Example]
    device_class: str
    fitted: Fitted | None = None
    private: TurnPrivacy | None = None
    sent: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def micro(self) -> int | None:
        """Rows at once; a simulated device's are counted, not run."""
        return None if self.fitted is None or self.fitted.simulated else self.fitted.micro


def make_client_app(host: ClientHost) -> ClientApp:
    """The ClientApp of one experiment, whose clients this host is."""
    app = ClientApp()

    @app.query()
    @declining
    def hello(message: Message, context: Context) -> Message:
        client = client_of(host, context)
        with naming(client):
            rows, settled = host.space.federation.clients[client], host.devices.settle(client)
            body = host.space.body(settled.precision)
        said = ClientHello(
            client=client,
            device_class=rows.device_class,
            rank=settled.rank,
            examples=len(rows.train),
            held_out=len(rows.held_out),
            base=host.space.backbone.fingerprint,
            shifts=body.frozen.versions,
            remembers=host.config.engine.kind != "ray",  # any of Ray's workers may act for this client the next time
            device="" if host.device is None else told(host.device, host.devices.first_choice(client)),
        )
        return Message(RecordDict({"hello": ConfigRecord({"json": said.to_json()})}), reply_to=message)

    @app.query("offer")
    @declining
    def offer(message: Message, context: Context) -> Message:
        weigh(host, message, context)
        return Message(RecordDict({"offer": ConfigRecord({"accepted": True})}), reply_to=message)

    @app.train()
    @declining
    def turn(message: Message, context: Context) -> Message:
        return take_turn(host, prepare(host, message, context))

    @app.evaluate()
    @declining
    def evaluate(message: Message, context: Context) -> Message:
        if host.floor is not None:
            raise Decline("privacy", "this device tells no exact scores of its rows (--min-privacy): set eval.clients=0")
        (reply,) = score_together(host, [(message, context)])
        return reply

    return app


def _telling(who: Callable[P, tuple[ClientHost, str]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let what goes wrong in a step of a turn say what the client has spent of its privacy: an earlier reply may be lost."""

    def wrap(step: Callable[P, R]) -> Callable[P, R]:
        @wraps(step)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return step(*args, **kwargs)
            except Exception as bad:
                host, client = who(*args, **kwargs)
                away = isinstance(bad, Decline) and bad.kind == "offline"  # it stands for a device that says nothing
                if host.storage.ledgers is not None and not away:
                    privacy = host.config.privacy
                    with contextlib.suppress(FedtuneError):  # a ledger that cannot be read: what went wrong is told all the same
                        if (ledger := host.ledger(client)).spent():
                            cast(Any, bad).epsilon = ledger.epsilon(privacy.delta, privacy.accountant)
                raise

        return told

    return wrap


@_telling(lambda host, todo: (host, todo.plan.client))
def take_turn(host: ClientHost, todo: Prepared) -> Message:
    """Do one client's turn on its own, and write its reply."""
    plan, live = todo.plan, todo.body.slot(todo.start)
    live.load(todo.start)
    work = work_of(host, todo, live)
    if not todo.turn.trains:
        return _reply(host, todo, todo.turn.observe(work), {}, {"steps": 0})
    gradients = None
    if plan.privacy == "record" and todo.private is not None:
        host.ledger(plan.client).spend(plan.round, todo.private.cost)
        gradients = todo.private
    done = train(work, todo.turn, micro=todo.micro, private=gradients, secure_rng=host.config.privacy.secure_rng)
    return finish(host, todo, live.read(version=plan.base_version), done)


def work_of(host: ClientHost, todo: Prepared, live: LiveAdapter | SparseSlot) -> Work:
    """The turn as the method's client half sees it."""
    plan, store = todo.plan, host.storage.store.beside(f"turn-{todo.plan.turn}")

    def again(start: AdapterState, turn: Turn) -> AdapterState:
        live.load(start)
        train(dataclasses.replace(work, start=start), turn, micro=todo.micro)
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
        again=again if plan.privacy == "none" else None,
    )
    return work


def score_together(host: ClientHost, asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Replies to evaluate messages that all carry the adapter of the first, of clients that compute in the same body."""
    request = read_message(asked[0][0].content)
    clients = [client_of(host, context) for _, context in asked]
    body = host.body_of(clients[0])
    body.rebase(request.base, request.shifts, request.snapshot)
    rows = [host.space.examples(client, "held_out") for client in clients]
    turn = make(request.turn, request.params)
    if request.keep or type(turn).personal is not Turn.personal:
        store = host.storage.store.beside(f"turn-{request.turn}")  # an evaluation comes after the round's own turn
        own = [turn.personal(host.complete(c, request), store.read(c, request.round + 1)) for c in clients]
        found = [body.score(adapter, r)[0] for adapter, r in zip(own, rows, strict=True)]
    else:
        found = body.score(request.adapter, *rows)
    replies = [RecordDict({"metrics": ConfigRecord({"json": json.dumps(metrics)})}) for metrics in found]
    return [Message(content, reply_to=message) for content, (message, _) in zip(replies, asked, strict=True)]


@_telling(lambda host, message, context: (host, client_of(host, context)))
def prepare(host: ClientHost, message: Message, context: Context) -> Prepared:
    """Read a train message.

    Raises:
        PlanError: The plan is not understood, or is another client's.
        Decline: The device is offline this round, the turn does not fit it, or its privacy budget is spent.
        DataError: The client has nothing to learn from.
        UpdateMismatch: The adapter cannot be read.
    """
    request = read_message(message.content)
    sent_bytes = request.nbytes
    if request.encoding:
        request = dataclasses.replace(request, adapter=decode_broadcast(request.encoding, request.adapter, host.space.initial.tensors))
    body, start, plan, turn, examples, fitted, private = _fitted(host, client_of(host, context), request, sent_bytes)
    body.rebase(request.base, request.shifts, request.snapshot)
    return Prepared(
        message=message,
        plan=plan,
        body=body,
        start=start,
        sent_bytes=sent_bytes,
        turn=turn,
        extra=request.extra,
        examples=examples,
        fitted=fitted,
        device_class=host.space.federation.clients[plan.client].device_class,
        private=private,
        sent=request.adapter.tensors,
    )


@_telling(lambda host, message, context: (host, client_of(host, context)))
def weigh(host: ClientHost, message: Message, context: Context) -> None:
    """Read the offer of a train message whose tensors have not been sent.

    Raises:
        FedtuneError: What `prepare` would raise, for the message's size or for anything else that is known without its tensors.
    """
    request, nbytes = read_offer(message.content)
    _fitted(host, client_of(host, context), request, nbytes)


def _fitted(
    host: ClientHost, client: str, request: ServerMessage, sent_bytes: int
) -> tuple[Body, AdapterState, Plan, Turn, Sequence[Example], Fitted | None, TurnPrivacy | None]:
    """What a client computes in and starts from; the plan, its turn and the rows as they fit its device; what it applies for privacy."""
    plan = request.plan
    if plan is None:
        raise PlanError("the message asks to train without a plan: the peers run different versions of fedtune")
    if plan.client != client:
        raise PlanError(f"the plan is for client '{plan.client}', this is '{client}'")
    check_terms(plan, host.config)
    turn = turn_of(plan)
    check_private(plan)
    if host.floor is not None:
        host.floor.check(plan.privacy)
    if host.devices.is_offline(client, plan.round):
        raise Decline("offline", "the device is offline this round")
    body = host.body_of(client)
    if plan.codec:
        Codec.from_name(plan.codec)  # known before the work, not after it
    examples = host.space.examples(client, "train")
    if not examples:
        raise DataError(f"client {client} has no training row of two tokens or more: nothing to learn from")
    start = host.complete(client, request)
    sent = sum(start[n].nbytes for n in matching(start.tensors, plan.send))
    if fits := host.devices.fit(plan, start, sent_bytes + sent):
        plan, examples, fitted = fits
    else:
        fitted = None
    private = turn_privacy(plan, len(examples), steps_of(plan, len(examples)))
    if private is not None and host.floor is not None:
        host.floor.check_budget(private)
    if private is not None and (why := budget_error(plan, host.ledger(client), private)):
        raise Decline("privacy", why)
    return body, start, plan, turn, examples, fitted, private


def finish(host: ClientHost, todo: Prepared, trained: AdapterState, turned: Trained) -> Message:
    """The reply to a train message: what the plan asks to be sent, and what the turn cost; what it asks to be kept is kept."""
    plan = todo.plan
    trained = todo.turn.finish(work_of(host, todo, todo.body.slot(todo.start)), trained)
    if kept := matching(trained.tensors, plan.keep):
        host.storage.store.write(plan.client, plan.round, trained.subset(kept))
    sent = trained.subset(matching(trained.tensors, plan.send))
    losses = {"train_loss": turned.loss, "start_loss": turned.start_loss}
    metrics = {name: loss for name, loss in losses.items() if loss is not None}
    measurements = {
        "steps": turned.steps,
        "lr_sum": sum(lr_at(plan, step, turned.steps) for step in range(turned.steps)),
    }
    if plan.privacy == "none":  # both depend on how long the rows are, and on which were sampled
        measurements |= {"seconds": turned.seconds, "peak_mb": turned.peak_mb}
    if (private := todo.private) is not None:
        ledger = host.ledger(plan.client)
        if plan.privacy == "user":
            ledger.spend(plan.round, private.cost)
            drawn = source(host.config.privacy.secure_rng, plan.seed, "noise")
            sent = sent.replace(noised(sent.tensors, todo.start.tensors, clip=private.clip, noise=private.noise, source=drawn))
            metrics = {}  # exact losses over its rows would tell of them
        measurements |= privacy_measurements(plan, ledger, private)
    return _reply(host, todo, _encoded(host, todo, sent) if plan.codec else sent, metrics, measurements, turned)


def _encoded(host: ClientHost, todo: Prepared, trained: AdapterState) -> AdapterState:
    """What travels in place of the trained tensors; what it leaves out is kept for the client's next turn, where the codec says so."""
    plan, codec = todo.plan, Codec.from_name(todo.plan.codec)
    if missing := [n for n in trained.tensors if n not in todo.sent]:
        raise PlanError(f"the plan asks how '{missing[0]}' differs from what was sent, and nothing was: the peers differ in their versions")
    store = host.storage.store.beside("residuals")
    kept = store.read(plan.client, plan.round) if codec.feedback else None
    before = kept.tensors if kept and kept.spec.method == trained.spec.method else {}
    sent, left = encode_update(codec, trained, todo.sent, before, derive_seed(plan.seed, "codec"))
    if codec.feedback:
        store.write(plan.client, plan.round, trained.replace(left))
    return sent


def _reply(
    host: ClientHost,
    todo: Prepared,
    sent: AdapterState,
    metrics: Mapping[str, float],
    measurements: Mapping[str, float],
    turned: Trained | None = None,
) -> Message:
    plan = todo.plan
    sent = sent.replace(version=plan.base_version)
    if todo.fitted is not None:
        cost = host.devices.told(plan, todo.examples, todo.fitted, turned, todo.sent_bytes + sent.nbytes)
        measurements = {**measurements, **cost}
    update = Update(
        client=plan.client,
        round=plan.round,
        base_version=plan.base_version,
        adapter=sent,
        examples=len(host.space.federation.clients[plan.client].train),
        metrics=metrics,
        measurements={"virtual_s": 0.0, **measurements},
        device_class=todo.device_class,
        precision=todo.fitted.choice.precision if todo.fitted else "",
    )
    said = ConfigRecord({"json": update.to_json(), "spec": sent.spec.to_json()})
    return Message(RecordDict({"adapter": sent.to_arrays(), "update": said}), reply_to=todo.message)


def client_of(host: ClientHost, context: Context) -> str:
    """The logical id of the node's client."""
    return host.space.client_ids[int(context.node_config["partition-id"])]
