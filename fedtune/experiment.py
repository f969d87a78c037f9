"""Runs one experiment, from its config to its run directory, on any engine. All entry points use it."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.serverapp import Grid
from rich.console import Console

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import Config, to_dict
from fedtune.contracts import flower
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.contracts.task import Example, task_of, tasks_with
from fedtune.contracts.warm_start import WarmStart
from fedtune.errors import CheckpointError, ConfigError, DataError, FedtuneError, RunError, Stopped, disk_error
from fedtune.exchange import Exchange, make_exchange
from fedtune.export.huggingface import describe_folder, export_hf
from fedtune.export.origin import prompt_template
from fedtune.export.personal import global_note
from fedtune.models import load_backbone
from fedtune.models.evaluation import generate_answers
from fedtune.models.methods import mergeable
from fedtune.rounds.bridge import Bridge
from fedtune.rounds.delivery import Delivery
from fedtune.rounds.find_strategy import check_strategy, make_strategy
from fedtune.rounds.membership import JoinPolicy
from fedtune.runs.directory import RunDirectory
from fedtune.runs.observer import RunObserver
from fedtune.runs.report import print_partition, print_results, read_metrics, write_card, write_report
from fedtune.simulations.engines.ray import check_ray, ray_grid
from fedtune.warm_start import EarlierRows, fit, read_source, read_start, write_start


class Serve(Protocol):
    """Runs the remaining rounds on a grid, and on a network delivers the model; a second call continues from the newest checkpoint."""

    def __call__(self, grid: Grid, join: JoinPolicy, delivery: Delivery | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine needs to run an experiment.

    Args:
        config: The experiment.
        space: The server process's workspace: loaded model and data.
        run: The run directory.
        observer: Receives the events of the run.
        serve: Runs the remaining rounds.
    """

    config: Config
    space: Workspace
    run: RunDirectory
    observer: RunObserver
    serve: Serve


Engine = Callable[[EngineContext], None]


def simulate(config: Config, strategy: Strategy | None = None) -> Path:
    """Run or resume the experiment with virtual clients, and return its run directory. `strategy` overrides the config's."""
    if config.engine.kind == "ray":
        check_ray(config.engine)
    return run_experiment(config, _virtual_clients, strategy=strategy)


def run_experiment(
    config: Config,
    engine: Engine,
    *,
    at: Path | None = None,
    space: Workspace | None = None,
    clients: int | None = None,
    live: bool = False,
    strategy: Strategy | None = None,
) -> Path:
    """Run or resume the experiment on any engine, and return its run directory.

    Args:
        config: The experiment.
        engine: Creates a grid and serves the rounds on it.
        at: Directory of a new run; None generates a name.
        space: This process's workspace; None loads everything that virtual clients need.
        clients: Number of clients, which user-level privacy depends on; None counts those in the data.
        live: Whether to rewrite the report after each round, so that a browser can follow the run.
        strategy: Strategy of the run; None takes the config's.
    """
    flower.quiet()
    if strategy is None:
        strategy = make_strategy(config)
    else:
        check_strategy(strategy, config)
    # only a new run opens what peft.from names; the run directory has a copy for later
    source = read_source(config.peft.from_) if config.peft.from_ is not None and not config.resume else None
    space = space or workspace(json.dumps(to_dict(config)))
    space.check_examples()
    if source is None:
        run = RunDirectory.open(Path(config.resume), rounds=config.rounds) if config.resume else RunDirectory.create(config, at)
    else:
        needs_zero = strategy.requirements.assumes_zero_init
        start = fit(source, space.initial, config, space.federation.labels, needs_zero=needs_zero)
        run = RunDirectory.create(config, at, lambda path: write_start(path, start, source.config))
    try:
        warm, earlier = read_start(run.path) if config.peft.from_ is not None else (None, None)
        run.write_json("partition.json", space.federation.summary())
        exchange = make_exchange(config, len(space.client_ids) if clients is None else clients, run.path / "privacy")
        space.rebase((), ())  # an earlier run of this process may have left shifts with the same round numbers
        space.start = None
        state = _run(config, space, strategy, exchange, run, engine, live, warm, earlier)
        _write_results(config, space, state, run, warm)
    except BaseException as bad:
        if (run.path / "metrics.jsonl").exists():  # a stopped run gets a report too
            with contextlib.suppress(FedtuneError, OSError):  # a failing report must not hide the first cause
                write_report(run.path)
        if isinstance(bad, KeyboardInterrupt):
            raise Stopped(f"stopped; continue with resume={run.path}") from None
        if (why := disk_error(bad)) is not None:
            raise RunError(f"{why}: free disk space and continue with resume={run.path}") from None
        raise
    finally:
        run.close()
    return run.path


def _virtual_clients(context: EngineContext) -> None:
    config, nodes = context.config, len(context.space.client_ids)
    if config.engine.kind == "ray":
        with ray_grid(config, context.run.path, nodes, context.observer.note) as grid:
            context.serve(grid, JoinPolicy())
        return
    from fedtune.simulations.engines.grid import InProcessGrid
    from fedtune.simulations.engines.together import Together

    host = client_host(context)
    together = None if config.engine.batched == "none" else Together(host, config.engine.batched)
    context.serve(InProcessGrid(make_client_app(host), nodes, together), JoinPolicy())


def client_host(context: EngineContext) -> ClientHost:
    """The host of a run's virtual clients in this process; it shares the run's loaded model and data."""
    return ClientHost(context.config, Storage.in_folder(context.run.path / "clients", context.config), loaded=context.space)


def _run(
    config: Config,
    space: Workspace,
    strategy: Strategy,
    exchange: Exchange,
    run: RunDirectory,
    engine: Engine,
    live: bool,
    warm: WarmStart | None,
    earlier: Config | None,
) -> ServerState:
    found, damaged = run.newest()
    if found is None and damaged:
        raise CheckpointError(f"cannot resume {run.path}: none of its checkpoints can be read: {damaged[0]}")
    resumed = found.round if found else -1 if config.resume else None  # -1: stopped before the checkpoint of round 0, so it starts again
    final: list[ServerState] = []
    with RunObserver(run.path, resumed, live=live) as observer:
        observer.note(f"run {run.path}")
        for sentence in damaged:
            observer.note(f"skipped: {sentence}")
        if found and found.round == config.rounds:
            observer.note(f"all {found.round} rounds are done: to train further, set rounds=N with a larger N")
        print_partition(space.federation.summary(), Console(stderr=True))
        prompted = task_of(config.task).prompted and not task_of(config.task).conversational
        if prompted and space.backbone.tokenizer.chat_template:
            observer.note(
                f"the model has a chat template, which task.kind={config.task.kind} does not use: for a model that was tuned to chat, take"
                f" task={tasks_with(conversational=True)}"
            )

        sampled = _sampled(config, space)
        rows = _earlier_rows(warm, earlier, space, run, observer.note) if warm and config.eval.where == "server" else None

        def test(state: ServerState) -> Mapping[str, Any]:
            space.rebase(tuple(s.spec.version for s in state.shifts), state.shifts)
            kept = rows.score(state.adapter) if rows else {}
            scores = {**kept, **space.score(state.adapter, space.test_examples())[0]}
            if not sampled:
                return scores
            live = space.slot(state.adapter)  # `score` has loaded the adapter
            answers = generate_answers(live.model, space.backbone.tokenizer, sampled, config.task, batch_size=len(sampled))
            return {**scores, "answers": answers}

        def serve(grid: Grid, join: JoinPolicy, delivery: Delivery | None = None) -> None:
            bridge = Bridge(
                grid=grid,
                strategy=strategy,
                exchange=exchange,
                config=config,
                run=run,
                initial=space.initial,
                found=run.newest()[0],
                metric=task_of(config.task).primary,
                evaluate=test if config.eval.where == "server" and (rows or len(space.federation.test)) else None,
                observer=observer,
                join=join,
                delivery=delivery,
                warm=warm,
            )
            final.append(bridge.loop())

        engine(EngineContext(config=config, space=space, run=run, observer=observer, serve=serve))
    return final[0]


def _earlier_rows(
    warm: WarmStart, earlier: Config | None, space: Workspace, run: RunDirectory, note: Callable[[str], None]
) -> EarlierRows | None:
    """The test rows of the run that this one started from; None, with a note, if they are unknown or not on this machine."""
    note(f"the run starts from {warm.about['from']} (round {warm.about['round']}, sha256 {warm.about['sha256'][:12]})")
    try:
        if earlier is None:
            raise DataError("it started from an adapter folder, which names no test rows")
        return EarlierRows(earlier, space, read_metrics(run.path))
    except (ConfigError, DataError) as bad:
        note(f"forgetting is not measured: {bad}")
        return None


def _write_results(config: Config, space: Workspace, state: ServerState, run: RunDirectory, warm: WarmStart | None) -> None:
    """Write the adapter, model card, exported model and report, and print the results."""
    final, folder, task = state.adapter, run.path / "adapter", task_of(config.task)
    if final.spec.method != config.peft.method:  # too few rounds counted
        raise RunError(
            f"the run ended in its {final.spec.method} stage, before it had a {config.peft.method} adapter: continue with"
            f" resume={run.path} rounds=N"
        )
    space.rebase(tuple(s.spec.version for s in state.shifts), state.shifts)
    space.own.save(folder, final, state.shifts)
    if task.conversational:
        (folder / "chat_template.jinja").write_text(space.backbone.tokenizer.get_chat_template(), encoding="utf-8")
    labels, spec = list(space.federation.labels), dataclasses.asdict(final.spec)
    note = global_note(run.path, final, state.shifts)
    write_card(run.path, to_dict(config), spec, prompt_template(config), labels, read_metrics(run.path), space.backbone, note)
    merged = None
    if config.inference.export == "hf":
        merged = export_hf(run.path, run.path / "merged", replace=True, trust_remote_code=config.model.trust_remote_code)
    picked = _sampled(config, space)
    answers = _answers(config, space, state, run, merged, picked, warm or WarmStart(adapter=space.initial)) if picked else []
    write_report(run.path)
    print_results(read_metrics(run.path), Console(), space.federation.summary())
    for a in answers:
        print(f"\n{a['request']}\n  before  {a['before']}\n  after   {a['after']}\n  wanted  {a['wanted']}")
    print(f"\nadapter  {run.path / 'adapter'}")
    if merged:
        auto = task.auto_class(space.backbone.seq2seq)
        how = f'fedtune generate {merged} "..."' if task.gives_text else f"{auto}.from_pretrained('{merged}')"
        print(f"model    {merged}    (use it: {how})")
        if note := describe_folder(merged):
            print(f"         {note}")
    print(f"report   {run.path / 'report.html'}")


def _sampled(config: Config, space: Workspace) -> list[Example]:
    """`inference.samples` requests of the global test; none if the task has no requests."""
    if not task_of(config.task).prompted:
        return []
    examples = space.test_examples()
    count = min(config.inference.samples, len(examples))
    return [examples[i] for i in sorted(random.Random(derive_seed(config.seed, "samples")).sample(range(len(examples)), count))]


def _answers(
    config: Config,
    space: Workspace,
    state: ServerState,
    run: RunDirectory,
    merged: Path | None,
    picked: Sequence[Example],
    start: WarmStart,
) -> list[dict[str, str]]:
    """The sample requests with the model's answers before and after the run (from the merged model, if there is one)."""
    tokenizer, count = space.backbone.tokenizer, len(picked)
    if merged and mergeable(config.peft.method):
        loaded = load_backbone(
            dataclasses.replace(config.model, source="hub", name=str(merged), init="pretrained", precision="fp32"), config.task
        )
        after = generate_answers(loaded.model, loaded.tokenizer, picked, config.task, batch_size=count)
    else:
        live = space.slot(state.adapter)
        live.load(state.adapter)
        after = generate_answers(live.model, tokenizer, picked, config.task, batch_size=count)
    space.rebase(tuple(s.spec.version for s in start.shifts), start.shifts)
    space.slot(start.adapter).load(start.adapter)
    before = generate_answers(space.live.model, tokenizer, picked, config.task, batch_size=count)
    asked = [tokenizer.decode(e.input_ids[: e.prompt_length].tolist(), skip_special_tokens=True).strip() for e in picked]
    rows = zip(asked, picked, before, after, strict=True)
    answers = [{"request": r, "wanted": e.answer.strip(), "before": b, "after": a} for r, e, b, a in rows]
    run.write_json("answers.json", answers)
    return answers
