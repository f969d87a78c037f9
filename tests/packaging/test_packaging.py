"""Units, images and the compose file contain valid commands. They cannot run here, so the tests parse them."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.cli import client, server
from fedtune.cli import main as cli
from fedtune.config.compose import compose
from fedtune.network.superlink import CONNECTIONS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "packaging"
UNITS = sorted(FOLDER.glob("*.service"))
IMAGES = sorted(FOLDER.glob("Dockerfile.*"))
PARSERS = {"fedtune-server": server._parser, "fedtune-client": client._parser, "fedtune": cli._parser}


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command with the command's own parser; argparse exits for an invalid one."""
    return PARSERS[Path(words[0]).name]().parse_args(words[1:])


def logical_lines(text: str) -> Iterator[str]:
    """Logical lines without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return (line.strip() for line in lines.replace("\\\n", " ").splitlines() if line.strip())


# -- systemd ------------------------------------------------------------------------------------------------------------------------------


def unit(path: Path) -> dict[str, list[str]]:
    results: dict[str, list[str]] = {}
    for line in logical_lines(path.read_text()):
        if not line.startswith("["):
            key, _, value = line.partition("=")
            results.setdefault(key, []).append(value)
    return results


def test_both_roles_have_a_unit_and_an_image() -> None:
    assert [p.stem for p in UNITS] == ["fedtune-client", "fedtune-server"]
    assert [p.suffix for p in IMAGES] == [".client", ".server"]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_unit_starts_its_command_with_valid_flags(path: Path) -> None:
    sections = unit(path)
    (start,) = sections["ExecStart"]
    words = shlex.split(re.sub(r"\$\{(\w+)\}", "x", start.replace("%d", "/creds").replace("%S", "/var/lib")))
    assert Path(words[0]).name == path.stem
    args = parse(words)
    handed = {c.partition(":")[0] for c in sections["LoadCredential"]}
    assert {p.name for p in map(Path, words) if str(p).startswith("/creds/")} == handed
    if path.stem == "fedtune-server":
        assert args.run == Path("/var/lib/fedtune-server/run") and not args.insecure  # a restart continues the same run
        assert int(sections["LimitNOFILE"][0]) > 2 * CONNECTIONS
    else:
        assert args.state == Path("/var/lib/fedtune-client") and not args.insecure and args.max_retries is None
    assert sections["StateDirectory"] == [path.stem] and sections["Restart"] == ["on-failure"]
    for key, value in {"DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": ""}.items():
        assert sections[key] == [value]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    stub = tmp_path / path.stem
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    (tmp_path / path.name).write_text(path.read_text().replace("/opt/fedtune/bin/", f"{tmp_path}/"))
    process = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)], capture_output=True, text=True, check=False
    )
    ours = [line for line in process.stderr.splitlines() if path.stem in line]
    assert process.returncode == 0 and not ours, process.stderr


# -- images -------------------------------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {"FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.suffix[1:])
def test_an_image_is_built_from_existing_files(path: Path) -> None:
    steps = [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in logical_lines(path.read_text())]
    assert {name for name, _ in steps} <= INSTRUCTIONS  # no ADD, no ARG that could carry a secret
    stages = [rest.split() for name, rest in steps if name == "FROM"]
    for image, *_ in stages:
        assert re.fullmatch(r"python:3\.11-slim-\w+", image)  # a release, never `latest`
    named = {words[2] for words in stages if len(words) == 3}
    copied = []
    for rest in (rest for name, rest in steps if name == "COPY"):
        words = rest.split()
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in named
            continue
        copied += words[:-1]
    assert all((ROOT / source).exists() for source in copied)
    assert not [c for c in copied if re.search(r"key|secret|\.pem|\.env|\.git|outputs|data", c)]
    packaged = re.search(r"only-include = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert packaged and set(json.loads(packaged[1])) <= set(copied)  # else the wheel in the image lacks a part
    last = {name: rest for name, rest in steps}
    assert last["USER"] not in ("root", "0") and [n for n, _ in steps].index("USER") < [n for n, _ in steps].index("ENTRYPOINT")
    assert json.loads(last["ENTRYPOINT"]) == [f"fedtune-{path.suffix[1:]}"]
    parse([*json.loads(last["ENTRYPOINT"]), "--server", "h:1"] if path.suffix == ".client" else json.loads(last["ENTRYPOINT"]))
    check = last["HEALTHCHECK"].partition("CMD ")[2]
    assert all(isinstance(word, str) for word in json.loads(check))
    runs = " ".join(rest for name, rest in steps if name == "RUN")
    assert runs.count("pip install") == runs.count("-c constraints.txt") == 2 and "download.pytorch.org/whl/cpu" in runs
    assert "curl" not in runs and "wget" not in runs


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.suffix[1:])
def test_the_command_in_a_dockerfiles_comment_is_valid(path: Path) -> None:
    head = " ".join(line.lstrip("# ").rstrip("\\") for line in path.read_text().splitlines() if line.startswith("#"))
    program = f"fedtune-{path.suffix[1:]}"
    words = head.partition("docker run")[2].partition("Keys are")[0].partition("Keys and")[0].split()
    parse(words[words.index(program) :])


# -- compose ------------------------------------------------------------------------------------------------------------------------------


def services(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())["services"]


def test_the_compose_file_starts_a_server_and_three_clients() -> None:
    whole = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    compose_services = services("compose.yaml")
    clients = sorted(set(compose_services) - {"keys", "server"})
    assert len(clients) == 3 and {"keys", "server"} < set(compose_services)
    for name, service in compose_services.items():
        program = "server" if name in ("keys", "server") else "client"
        assert service["image"] == f"fedtune-{program}:trial" and not service.get("privileged")
        if build := service.get("build"):
            assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / f"Dockerfile.{program}"
        assert name == "keys" or service["depends_on"] == {"keys": {"condition": "service_completed_successfully"}}
        for mount in service["volumes"]:
            source = mount["source"] if isinstance(mount, dict) else mount.split(":")[0]
            assert source in whole["volumes"]
    assert not any(
        "ports" in s or "environment" in s for s in compose_services.values()
    )  # nothing is open to the host, no secret in the environment


def test_its_commands_are_valid() -> None:
    compose_services = services("compose.yaml")
    words = shlex.split(compose_services["keys"]["command"][0].partition("|| ")[2])
    keys = parse(words)
    args = parse(["fedtune-server", *compose_services["server"]["command"]])
    compose(args.settings)  # the scenario and its keys exist
    assert {p.parent for p in (*args.certificates, args.allowed)} == {keys.out} and not args.insecure
    assert str(args.run).startswith("/var/lib/fedtune") and compose_services["server"]["ulimits"]["nofile"] > 2 * CONNECTIONS
    for name in sorted(set(compose_services) - {"keys", "server"}):
        asked = parse(["fedtune-client", *compose_services[name]["command"]])
        assert asked.client_id == name and name in keys.clients and asked.server == f"{keys.server_name}:8080"
        key = next(m for m in compose_services[name]["volumes"] if isinstance(m, dict))
        # of the volume with all keys a client sees its own folder only
        assert key["read_only"] and key["volume"]["subpath"] == f"{keys.out.relative_to('/keys')}/clients/{name}"
        assert {asked.key.parent, asked.root_certificates.parent} == {Path(key["target"])}
        assert f"{name}:{asked.state}" in compose_services[name]["volumes"]


def test_own_rows_are_mounted_where_the_client_looks() -> None:
    mine, base = services("compose.data.yaml"), services("compose.yaml")
    assert set(mine) == set(base) - {"keys", "server"}
    for name, service in mine.items():
        before, args = parse(["fedtune-client", *base[name]["command"]]), parse(["fedtune-client", *service["command"]])
        assert service["volumes"] == [f"./data/{name}:{args.data}:ro"]
        assert {**vars(args), "data": None} == vars(before)


def test_the_readme_gives_commands_that_exist() -> None:
    text = (FOLDER / "README.md").read_text()
    parse(shlex.split(re.search(r"^ {4}(fedtune keys .*)$", text, re.M)[1]))  # type: ignore[index]
    for name in re.findall(r"`?packaging/([\w.]+\.yaml)|`(Dockerfile\.\w+)`", text):
        assert (FOLDER / (name[0] or name[1])).exists()
