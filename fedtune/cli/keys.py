"""`fedtune keys`: create and change the certificates and client keys of a deployment."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Create a CA, the server's certificate and a key for each client; or change such a folder with --add, --rotate, --remove, ..."
    keys = commands.add_parser("keys", help="create certificates and client keys", description=about)
    keys.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create or change")
    keys.add_argument("--server-name", metavar="HOST[,IP...]", help="host names and addresses of the server")
    keys.add_argument("--clients", nargs="+", metavar="NAME", help="names of the clients")
    change = keys.add_mutually_exclusive_group()
    change.add_argument("--add", nargs="+", metavar="NAME", help="add clients to an existing folder")
    change.add_argument("--rotate", nargs="+", metavar="NAME", help="create new keys for clients; their old keys are refused")
    change.add_argument("--remove", nargs="+", metavar="NAME", help="clients that may no longer take part")
    change.add_argument("--renew-server", action="store_true", help="create a new server certificate, signed with DIR/ca.key")
    change.add_argument(
        "--renew-signing-key", action="store_true", help="create a new key that signs models; also for a folder that has none yet"
    )
    keys.add_argument("--ca-key", type=Path, metavar="FILE", help="the CA's key, if it is not DIR/ca.key (with --renew-server)")
    keys.add_argument("--days", type=int, metavar="N", help="days that the server's certificate is valid (default: 3650)")
    keys.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from fedtune.network import keys

    changes = {"add": keys.add_clients, "rotate": keys.rotate_clients, "remove": keys.remove_clients}
    asked = next((name for name in changes if getattr(args, name)), "")
    asked = asked or ("renew-server" if args.renew_server else "renew-signing-key" if args.renew_signing_key else "")
    useless = {"": ["ca_key"], "renew-server": ["clients"]}.get(asked, ["server_name", "clients", "days", "ca_key"])
    if extra := [f for f in useless if getattr(args, f) is not None]:
        what = f"--{asked} changes an existing folder" if asked else "a new folder gets its own CA"
        raise ConfigError(f"{what}: leave out --{extra[0].replace('_', '-')}")
    if asked in changes:
        return changes[asked](args.out, getattr(args, asked))
    if args.renew_signing_key:
        return keys.renew_signing_key(args.out)
    days = keys.DAYS if args.days is None else args.days
    hosts = [] if args.server_name is None else [host.strip() for host in args.server_name.split(",")]
    if asked:
        return keys.renew_server(args.out, hosts, days=days, ca_key=args.ca_key)
    if args.server_name is None or not args.clients:
        raise ConfigError(
            "a new folder of keys needs --server-name HOST and --clients NAME ...; --add, --rotate, --remove, --renew-server and"
            " --renew-signing-key change an existing one"
        )
    return keys.make_keys(args.out, hosts, args.clients, days=days)
