"""Names chosen by peers: checks of client ids and names, and file names for clients."""

import hashlib
import re

LONGEST_ID = 200  # characters
LONGEST_NAME = 64  # characters of a name that a client reports: every line of the metrics holds it
_LONGEST_FILE = 200  # bytes; file systems allow 255, suffixes included


def flaw(client: str) -> str:
    """What is wrong with a logical id, as the end of a sentence; "" if it is valid.

    Ids are shown in tables and logs: with invisible characters, two clients could appear to have the same name.
    """
    if not client.strip():
        return "is empty"
    if len(client) > LONGEST_ID:
        return f"has {len(client)} characters, more than the limit of {LONGEST_ID}"
    if bad := next((c for c in client if not c.isprintable()), ""):
        return f"has an unprintable character (U+{ord(bad):04X})"
    return ""


def file_name(client: str) -> str:
    """A file name for this client, unique for each id: special characters are replaced by their code points.

    A name that would be too long is cut and ends in a dot and a hash; other names have no dot.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", lambda m: f"%{ord(m[0]):06x}", client)
    if len(name) <= _LONGEST_FILE:
        return name
    return f"{name[: _LONGEST_FILE - 17]}.{hashlib.sha256(client.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def shown(client: str) -> str:
    """An id made safe to print: without control characters, at most 40 characters."""
    return "".join(c if c.isprintable() else " " for c in client[:40]) + "…" * (len(client) > 40)


def short(name: str) -> bool:
    """Whether a peer's name is short and printable enough for a log and a table."""
    return len(name) <= LONGEST_NAME and name.isprintable()


def is_run_name(name: str) -> bool:
    """Whether this run name can be a folder name on a client."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}", name) is not None
