"""The server command: `fedtune-server conf=heterogeneous` runs the experiment of `python -m fedtune.sim` with real clients.

    fedtune-server [conf=NAME | conf=FILE.yaml] [KEY=VALUE ...] --certificates CA CERTIFICATE KEY --allowed FILE
    fedtune-server [conf=NAME] [KEY=VALUE ...] --insecure

Flower's SuperLink runs in its own process (fedtune/network). This process has the strategy, bridge, checkpoints and terminal.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedtune.cli._shared import host_and_port
from fedtune.config import Config, to_dict
from fedtune.config.compose import DEFAULT_SCENARIO, compose
from fedtune.config.stored import read_config
from fedtune.data import check_coordinator_data
from fedtune.errors import ConfigError, LinkLost, NetworkError, Stopped, user_message
from fedtune.rounds.find_strategy import make_strategy
from fedtune.storage.ids import is_run_name
from fedtune.version import __version__

if TYPE_CHECKING:
    from fedtune.delivery.signing import Signer
    from fedtune.experiment import EngineContext
    from fedtune.network.link import LinkSettings, SuperLink
    from fedtune.rounds.delivery import Delivery
    from fedtune.rounds.membership import JoinPolicy

ROUND_S = 600.0  # default timeout: a round on a network must end even if clients have left
_RETRY_S = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the experiment. Returns the exit code: 2 for an error, 130 if stopped."""
    args = _parser().parse_intermixed_args(argv)
    try:
        signal.signal(signal.SIGTERM, _stop)
        return _main(args)
    except Exception as bad:
        print(f"fedtune-server: {user_message(bad)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"fedtune-server: {stop if isinstance(stop, Stopped) else 'stopped before a run began'}", file=sys.stderr)
        return 130


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedtune-server",
        description="Run an experiment with real clients: wait for clients, train for all rounds, and write the adapter and the report.",
        epilog="For the settings see `python -m fedtune.sim --help`. Create keys and certificates with `fedtune keys`.",
    )
    parser.add_argument("settings", nargs="*", metavar="conf=NAME | KEY=VALUE", help=f"the experiment (default: conf={DEFAULT_SCENARIO})")
    parser.add_argument("--address", default="0.0.0.0:8080", metavar="HOST:PORT", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="the run directory: created if it does not exist; if it has a run, that run continues with its own settings (for services)",
    )
    parser.add_argument(
        "--certificates", nargs=3, type=Path, metavar=("CA", "CERTIFICATE", "KEY"), help="PEM files for TLS: ca.pem server.pem server.key"
    )
    parser.add_argument(
        "--allowed",
        type=Path,
        metavar="FILE",
        help="allowed.json, the public keys of the clients that may take part; reloaded when it changes",
    )
    parser.add_argument(
        "--signing-key",
        type=Path,
        metavar="FILE",
        help="signing.key of `fedtune keys`: sign the models that devices install; without it none is delivered",
    )
    parser.add_argument("--insecure", action="store_true", help="plain HTTP, and anyone may take part: for trials on one machine")
    parser.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="longest wait for clients, at the start and between rounds (default: 300)",
    )
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    return parser


def _main(args: argparse.Namespace) -> int:
    settings = list(args.settings)
    if odd := [s for s in settings if "=" not in s]:
        raise ConfigError(f"'{odd[0]}' is not a setting: write KEY=VALUE, such as conf=heterogeneous or rounds=5")
    if args.run is not None and (idle := [s for s in settings if s.startswith(("resume=", "output_dir="))]):
        raise ConfigError(f"--run {args.run} already sets the run directory: leave out {idle[0]}, or --run")
    if args.run is not None and (args.run / "config.yaml").is_file():  # a restarted service continues its run
        settings = _resumption(args.run, settings)
    (job,) = compose(settings)
    config = _for_a_network(job.config)
    check_coordinator_data(config)
    if (run := args.run or (Path(config.resume) if config.resume else None)) and not is_run_name(run.resolve().name):
        raise ConfigError(
            f"clients use the run's name '{run.resolve().name}' as a folder name: use only letters, digits, dots, dashes and underscores"
        )
    make_strategy(config)
    link = link_settings(args)
    print("loading the model and the test rows", file=sys.stderr, flush=True)  # torch takes its time
    from fedtune.clients.workspace import Workspace
    from fedtune.data import load_test
    from fedtune.experiment import run_experiment  # imports torch, so only after all checks

    space = Workspace(config, load_test(config))
    clients = len(link.allowed_keys) or config.clients_per_round
    signer = _signer(args)
    run_experiment(config, lambda context: serve(context, link, args.wait, signer), at=args.run, space=space, clients=clients, live=True)
    return 0


def _resumption(run: Path, settings: list[str]) -> list[str]:
    """Settings that resume `run`. From the given settings they keep `rounds` and those that allow foreign code.

    Raises:
        ConfigError: Another setting differs from the run's.
    """
    today, kept = compose(settings)[0].config, read_config(run)
    _check_same(run, settings, today, kept)
    again = [f"resume={run}", *(s for s in settings if s.startswith("rounds="))]
    if today.model.trust_remote_code:
        again.append("model.trust_remote_code=true")
    if kept.strategy["_target_"] == (target := today.strategy["_target_"]):
        again.append(f"strategy._target_={target}")
    return again


def _check_same(run: Path, settings: list[str], today: Config, kept: Config) -> None:
    """Compare the command's settings with the run's: a service restarts with its first command, and differences must not go unnoticed.

    A difference that comes only from the scenario file is printed, not refused: another version of fedtune may have changed the file.
    """
    asked, has = _flat(to_dict(_for_a_network(today))), _flat(to_dict(kept))
    changed = sorted(k for k in asked.keys() | has.keys() if asked.get(k) != has.get(k) and k not in ("rounds", "model.trust_remote_code"))
    given = [s.partition("=")[0].lstrip("+~") for s in settings]
    for key in (k for k in changed if any(k == g or k.startswith(f"{g}.") for g in given)):
        raise ConfigError(
            f"the run in {run} has {key}={has.get(key)}, but the command sets {key}={asked.get(key)}: only rounds can change;"
            " leave that setting out, or give another --run to start another run"
        )
    if changed and (conf := [s for s in settings if s.startswith("conf=")]):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        print(
            f"fedtune-server: the run in {run} keeps its own settings; {conf[0]} differs in {', '.join(changed[:3])}{more}",
            file=sys.stderr,
        )


def _flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{under}{key}.") if isinstance(value, dict) else {f"{under}{key}": value}
    return found


def _for_a_network(config: Config) -> Config:
    if config.engine.kind != "inprocess":
        raise ConfigError(f"engine={config.engine.kind} is for simulations: leave it out here")
    return config if config.round_timeout_s is not None else dataclasses.replace(config, round_timeout_s=ROUND_S)


def _signer(args: argparse.Namespace) -> "Signer | None":
    """The signer of models; None with --insecure or without --signing-key.

    Raises:
        ConfigError: The key cannot be read, is readable by others, or is given with --insecure.
    """
    if args.signing_key is None:
        return None
    if args.insecure:
        raise ConfigError("--insecure signs no models: leave out --signing-key, or --insecure")
    from fedtune.delivery.signing import Signer
    from fedtune.network.keys import check_private_key

    check_private_key(args.signing_key)
    return Signer(args.signing_key)


def link_settings(args: argparse.Namespace) -> "LinkSettings":
    """The SuperLink's address and security settings from the arguments.

    Raises:
        ConfigError: There are neither keys nor --insecure, or the address is invalid.
    """
    from fedtune.network.keys import check_private_key, read_allowed
    from fedtune.network.link import LinkSettings

    host, port = host_and_port("--address", args.address, "0.0.0.0:8080")
    if args.insecure:
        if args.certificates or args.allowed:
            raise ConfigError("--insecure uses neither TLS nor keys: leave out --certificates and --allowed, or --insecure")
        return LinkSettings(folder=Path(), host=host, port=port, certificates=None, insecure=True)
    if not args.certificates or not args.allowed:
        raise ConfigError(
            "--certificates and --allowed are both needed: create them with `fedtune keys`, or use --insecure for trials on one machine"
        )
    if missing := [path for path in args.certificates if not path.is_file()]:
        raise ConfigError(f"there is no file {missing[0]}: create certificates with `fedtune keys`")
    check_private_key(args.certificates[2])
    allowed = read_allowed(args.allowed)
    return LinkSettings(
        folder=Path(),
        host=host,
        port=port,
        certificates=tuple(args.certificates),
        insecure=False,
        allowed_keys=allowed,
        allowed_file=args.allowed,
    )


def serve(context: "EngineContext", settings: "LinkSettings", wait_s: float, signer: "Signer | None" = None) -> None:
    """Start the SuperLink and run all rounds on it. If it fails, restart it and continue from the last checkpoint.

    Args:
        context: The experiment.
        settings: Of the SuperLink.
        wait_s: Longest wait for clients, in seconds.
        signer: Signs the models that devices install. Without one only a server with --insecure delivers models.
    """
    from fedtune.network.allowed import AllowedClientsWatcher
    from fedtune.network.keys import read_allowed
    from fedtune.network.link import SuperLink
    from fedtune.network.logs import logging_to
    from fedtune.network.status_server import FILE, StatusServer
    from fedtune.rounds.delivery import Delivery
    from fedtune.rounds.membership import JoinPolicy

    run, observer, config = context.run.path, context.observer, context.config
    link = SuperLink(dataclasses.replace(settings, folder=run / "superlink", log=run / "logs" / "superlink.jsonl"))
    names = _Names(link) if not settings.insecure else None
    join = JoinPolicy(
        hello={"config": _shared_config(config), "run": run.resolve().name, "labels": list(context.space.federation.labels)},
        patience_s=wait_s,
        expected_clients=min(config.clients_per_round, len(settings.allowed_keys) or config.clients_per_round),
        retry_s=_RETRY_S,
        names=names,
    )
    delivery = Delivery(
        folder=run / "delivery",
        run=run.resolve().name,
        config=config.deliver,
        sign=None if signer is None else signer.sign,
        offers=signer is not None or settings.insecure,
        note=observer.note,
    )
    with logging_to(run / "logs" / "server.jsonl"):
        try:
            link.start()
            if settings.insecure:
                observer.note("WARNING: --insecure: no TLS and no keys; anyone who reaches this port can read and change the training")
            elif not delivery.offers and (config.deliver.at_end or config.deliver.every):
                observer.note("no --signing-key: devices will not get the model; `fedtune keys` makes one")
            observer.note(f"listening on {settings.host}:{link.port}; a round takes at most {config.round_timeout_s:g} s")
            with contextlib.ExitStack() as open_:
                board = open_.enter_context(StatusServer(run / FILE, _Status(context, link, f"{settings.host}:{link.port}")))
                if settings.allowed_file is not None:
                    open_.enter_context(
                        AllowedClientsWatcher(settings.allowed_file, settings.allowed_keys, read_allowed, link.allow, observer.note)
                    )
                observer.note(f"report {run / 'report.html'}   status: fedtune status {run}   or --control {board.control}")
                _serve(context, link, join, delivery)
        finally:
            link.stop()


def _serve(context: "EngineContext", link: "SuperLink", join: "JoinPolicy", delivery: "Delivery") -> None:
    losses: list[float] = []
    while True:
        try:
            return context.serve(link.open_run(context.run.path.name), join, delivery)
        except LinkLost as lost:
            losses = [t for t in losses if time.monotonic() - t < 600] + [time.monotonic()]
            if len(losses) > 5:
                raise NetworkError(f"the SuperLink failed {len(losses)} times in ten minutes, last with: {lost}") from None
            context.observer.note(f"{lost}; continuing from the last checkpoint")
            link.start()


class _Names:
    """Node id → name of the key that the node connected with."""

    def __init__(self, link: "SuperLink") -> None:
        self._link = link

    def __call__(self) -> dict[int, str]:
        return {node.node_id: node.name for node in self._link.nodes()}


class _Status:
    """The server's status, for `fedtune status`."""

    def __init__(self, context: "EngineContext", link: "SuperLink", address: str) -> None:
        self._context, self._link, self._address, self._started = context, link, address, time.time()
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        observer = self._context.observer
        seen = {node.node_id: node for node in self._link.nodes()} if self._link.alive else {}
        known = dict(observer.clients)
        rows = []
        for client, (node, device_class) in sorted(known.items()):
            at = seen.get(node)
            online, last = (at.online, at.last_seen) if at else (False, 0.0)
            rows.append({"client": client, "node": node, "device_class": device_class, "online": online, "last_seen": last})
        known_nodes = {node for node, _ in known.values()}
        rows += [
            {"client": n.name, "node": i, "device_class": "", "online": n.online, "last_seen": n.last_seen}
            for i, n in seen.items()
            if i not in known_nodes
        ]
        return {
            "run": str(self._context.run.path.resolve()),
            "started": self._started,
            "address": self._address,
            "round": observer.round,
            "rounds": self._context.config.rounds,
            "waiting_for": sorted(observer.waiting),
            "nodes": rows,
        }


def _shared_config(config: Config) -> dict[str, Any]:
    """The config that clients get: the experiment without this machine's own settings."""
    values = to_dict(config)
    for own in ("resume", "output_dir"):
        del values[own]
    del values["peft"]["from"]
    values["eval"]["where"] = "none"  # the global test is the server's; clients of an earlier version do not know the value "server"
    return values


if __name__ == "__main__":
    sys.exit(main())
