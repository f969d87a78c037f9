"""Map the source's columns to fedtune's: the task's columns, plus `client`, `device_class` and `label` if the source has them."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.config import Config, DataConfig, template_text
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Task, task_of, tasks
from fedtune.data import messages
from fedtune.data.local import Columns
from fedtune.data.values import fields, fill, in_order, label_sets, names_of, numbers, texts, to_bits, to_ids, vectors
from fedtune.errors import ConfigError, DataError

PARTITION_BY = {"natural": ("client",), "dirichlet": ("label",), "pathological": ("label",), "prior": ("label",)}
_PROMPT = "prompt"  # the column before a pair of answers
DEMO_PROMPT, DEMO_ANSWER = "Request: {request}\nAction:", " {action}"
DEMO_COLUMNS = {"text": "request", "label": "intent", "labels": "parts", "chosen": "action"}
DEMO_CHAT = ("{request}", "{action}")  # what the user and the assistant say


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in fedtune's columns.

    Args:
        columns: Column → one value a row. `label` is a class id; `Task.columns` defines the task's own columns; the others are strings.
            `row` is the name of a conversation's row in errors, `tools` the JSON text of its tools or "".
        labels: Name of each class id; () if the source has no labels.
    """

    columns: dict[str, list[Any]]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def canonical(source: RowSet, config: Config, what: str, labels: tuple[str, ...] | None = None) -> Table:
    """`source` in fedtune's columns.

    A column comes from, in this order: the templates `data.prompt` and `data.answer`; `data.columns` (a name, or a template if it contains
    a brace, such as ``text: '{sentence1} {sentence2}'``); the source's column of the same name.

    Args:
        source: The source's rows.
        config: Task, templates and column names.
        what: "training" or "test", for errors.
        labels: The class names, if they are known (those of the training rows).

    Raises:
        ConfigError: `data.columns` has an unknown key, or a template is malformed.
        DataError: A column or field is missing, or a row has no value in it.
    """
    data, task = config.data, task_of(config.task)
    check_names(source.column_names, config, what)
    maps, templates = mapping(data)
    out: dict[str, list[Any]] = {}
    for ours, kind in task.columns.items():
        if kind == "messages":
            out[ours] = _conversations(source, maps, templates, what)
            if messages.TOOLS in source.column_names and messages.form(source.column_names, maps, templates) not in ("pair", "alpaca"):
                out["tools"] = messages.read_tools(source[messages.TOOLS][:], what)
        else:
            out[ours] = _values(source, ours, maps, templates, what)
    if pair := _pair(task):
        better, worse = (out[ours] for ours in pair)
        out |= zip(pair, messages.read_pairs(_prompts(source, maps, templates), better, worse, what), strict=True)
    if task.conversational:
        out["row"] = [f"{what} row {number}" for number in range(1, len(source) + 1)]
    wanted = PARTITION_BY.get(config.partition.kind, ()) if what == "training" else ()
    several = next((ours for ours, kind in task.columns.items() if kind == "classes"), None)
    for ours in ("client", "device_class", "label"):
        if ours in out or (ours == "label" and (what == "test" or several)):
            continue
        theirs = maps.get(ours, ours)
        required = ours in templates or (ours in maps and what == "training")
        if required or (theirs in source.column_names and (ours in wanted or _usable(source, theirs))):
            out[ours] = _values(source, ours, maps, templates, what)
    if "label" in out:
        declared = source.classes.get(maps.get("label", "label")) if "label" not in templates else None
        values = names_of(out["label"], declared, what)
        names = (declared or in_order(values)) if labels is None else labels
        out["label"] = to_ids(values, names, what)
    elif several:
        declared = source.classes.get(maps.get(several, several)) if several not in templates else None
        sets = label_sets(out[several], declared, what)
        names = (declared or in_order([name for row in sets for name in row])) if labels is None else labels
        out[several] = to_bits(sets, names, what)
    else:
        names = ()
    for ours in out:
        theirs, kind = maps.get(ours, ours), task.columns.get(ours, "text")
        if kind == "numbers":
            out[ours] = vectors(out[ours], ours, theirs, config.task.outputs)
        elif ours != "label" and kind in _READ:
            out[ours] = _READ[kind](out[ours], ours, theirs)
    for ours in out.keys() & {"client", "device_class"}:  # invisible blanks must not create another client
        out[ours] = [value.strip() for value in out[ours]]
    for blank in task.drops_blank:
        kept = [i for i, text in enumerate(out[blank]) if text.strip()]
        out = {ours: [values[i] for i in kept] for ours, values in out.items()}
        if not kept:
            raise DataError(f"every {what} row has an empty {blank}: see data.columns")
    return Table(columns=out, labels=names)


def check_names(present: Collection[str], config: Config, what: str) -> None:
    """Check that a source has all required columns.

    Args:
        present: The source's columns.
        config: Task, partition, templates and column names.
        what: "training" or "test".

    Raises:
        ConfigError: `data.columns` has an unknown key, or a template is malformed.
        DataError: A column is missing.
    """
    task, there = task_of(config.task), ", ".join(present)
    maps, templates = mapping(config.data)
    own = {*task.columns, *([_PROMPT] if _pair(task) else [])}
    for ours in dict.fromkeys((*task.columns, *known_columns())):
        theirs = maps.get(ours, ours)
        if task.columns.get(ours) == "messages":
            _check_conversations(present, config, what)
        elif ours in templates and (ours in own or ours in ("client", "device_class") or (ours == "label" and what == "training")):
            if missing := sorted(fields(templates[ours], f"the {ours} template") - set(present)):
                template = templates[ours]
                raise DataError(f"the {ours} template {template!r} names '{missing[0]}', but the rows have only {there}: correct the name")
        elif theirs in present or ours in templates:
            continue
        elif ours in maps and (ours in own or (what == "training" and ours in ("client", "device_class", "label"))):
            raise DataError(f"the {what} rows have no column '{theirs}' (data.columns.{ours}), only {there}: correct the name")
        elif ours in task.columns:
            kind, more = config.task.kind, task.columns_hint
            raise DataError(f"task.kind={kind} needs '{ours}', but the {what} rows have only {there}: set data.columns.{ours}{more}")
        elif what == "training" and ours in PARTITION_BY.get(config.partition.kind, ()):
            raise no_clients() if ours == "client" else no_labels(config.partition.kind)


def _check_conversations(present: Collection[str], config: Config, what: str) -> None:
    """Raises DataError if a source has no conversations in any form."""
    maps, templates = mapping(config.data)
    if "messages" in templates:
        raise ConfigError("data.columns.messages is a template: name the column with the conversations")
    if messages.form(present, maps, templates):
        return
    there, theirs = ", ".join(present), maps.get("messages")
    if theirs is not None:
        raise DataError(f"the {what} rows have no column '{theirs}' (data.columns.messages), only {there}: correct the name")
    raise DataError(
        f"task.kind={config.task.kind} needs 'messages', but the {what} rows have only {there}: set data.columns.messages, or the templates"
        " data.prompt and data.answer"
    )


def no_clients() -> DataError:
    return DataError(
        "partition.kind=natural takes the clients from the data, but these rows name none:"
        " set data.columns.client or data.client_from_file=true, or take partition.kind=iid"
    )


def no_labels(kind: str) -> DataError:
    return DataError(f"partition.kind={kind} splits rows by label, but these rows have none: set data.columns.label or take iid")


def known_columns() -> tuple[str, ...]:
    """The columns of all tasks, then `client` and `device_class`."""
    return tuple(dict.fromkeys([*(column for task in tasks().values() for column in task.columns), "client", "device_class"]))


def mapping(data: DataConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Two mappings: fedtune's column → the source's column, and fedtune's column → template.

    Raises:
        ConfigError: `data.columns` has an unknown key.
    """
    if unknown := sorted(set(data.columns) - set(known := known_columns())):
        raise ConfigError(f"data.columns.{unknown[0]} is not known: choose from {', '.join(known)}")
    maps = {ours: theirs for ours, theirs in data.columns.items() if "{" not in theirs}
    templates = {ours: template_text(theirs) for ours, theirs in data.columns.items() if "{" in theirs}
    if data.prompt is not None and data.answer is not None:
        templates |= {"prompt": template_text(data.prompt), "answer": template_text(data.answer)}
    return maps, templates


def demo_columns(config: Config) -> DataConfig:
    """The data settings with the demo's templates and columns as defaults."""
    data = config.data
    own = DEMO_CHAT if task_of(config.task).conversational else (DEMO_PROMPT, DEMO_ANSWER)
    prompt, answer = data.prompt or own[0], data.answer or own[1]
    return dataclasses.replace(data, prompt=prompt, answer=answer, columns=DEMO_COLUMNS | data.columns)


def own_rows_columns(config: Config) -> dict[str, str]:
    """The entries of `data.columns` that a device's own rows need: the task's columns. They are not partitioned, so no label or client."""
    task = task_of(config.task)
    needed = {*task.columns, *(messages.PAIR if task.conversational else ())}
    return {ours: theirs for ours, theirs in config.data.columns.items() if ours in needed}


def read_columns(config: Config) -> Columns:
    """The source's columns to read: required by the task, the partition, `data.columns` or a template, or used if they are present.

    No other column is read.
    """
    maps, templates = mapping(config.data)
    task, conversations = task_of(config.task), set[str]()
    pair, own = _pair(task), {ours for ours, kind in task.columns.items() if kind != "messages"}
    if pair:
        conversations = {maps.get(ours, ours) for ours in (_PROMPT, *pair)}
    elif task.conversational:
        conversations = {maps["messages"]} if "messages" in maps else {*messages.COLUMNS}
        conversations.add(messages.TOOLS)
    required = {*own, *PARTITION_BY.get(config.partition.kind, ())} - set(maps) - set(templates)
    required |= set(maps.values())
    for ours, template in templates.items():
        required |= fields(template, f"the {ours} template")
    optional = {"client", "device_class", "label", *conversations}
    if task.conversational and not pair:
        optional |= {*messages.PAIR, *messages.ALPACA, *messages.ALPACA_OPTIONAL}
    return Columns(frozenset(required), frozenset(optional - required), frozenset(conversations))


def class_names(data: DataConfig) -> tuple[str, ...]:
    """`data.labels`, stripped like the labels of the rows."""
    return tuple(name.strip() for name in data.labels)


def _usable(source: RowSet, column: str) -> bool:
    """Whether an optional column can be a label or an id: it has a name or a whole number in every row."""
    kinds = ("string", "large_string", "int", "uint", "bool")  # a ClassLabel is int64
    return source.types[column].startswith(kinds) and None not in source[column][:]


def _values(source: RowSet, ours: str, maps: Mapping[str, str], templates: Mapping[str, str], what: str) -> list[Any]:
    """One of fedtune's columns; raises DataError with the number of a row without a value."""
    if ours in templates:
        return fill(templates[ours], source, f"the {ours} template")
    theirs = maps.get(ours, ours)
    values = source[theirs][:]
    for number, value in enumerate(values, 1):
        if value is None:
            raise DataError(f"{what} row {number} has no '{theirs}': fill it or remove the row")
    return values


def _conversations(source: RowSet, maps: Mapping[str, str], templates: Mapping[str, str], what: str) -> list[str]:
    """The column `messages`, from any form of conversations."""
    kind = messages.form(source.column_names, maps, templates)
    if kind == "pair":
        return messages.paired(*(texts(_values(source, ours, maps, templates, what), ours, maps.get(ours, ours)) for ours in messages.PAIR))
    if kind == "alpaca":
        asked, answers = (texts(_values(source, name, {}, {}, what), name, name) for name in messages.ALPACA)
        extra, system = (_optional(source, name) for name in messages.ALPACA_OPTIONAL)
        return messages.paired([messages.with_input(a, b) for a, b in zip(asked, extra, strict=True)], answers, system)
    return messages.read_messages(source[kind][:], what)


def _pair(task: Task) -> list[str]:
    """The task's columns of answers to one prompt; [] if it has none."""
    return [ours for ours, kind in task.columns.items() if kind == "answers"]


def _prompts(source: RowSet, maps: Mapping[str, str], templates: Mapping[str, str]) -> list[Any] | None:
    """What comes before the answers of each row; None if the source does not say."""
    if _PROMPT in templates:
        return fill(templates[_PROMPT], source, f"the {_PROMPT} template")
    theirs = maps.get(_PROMPT, _PROMPT)
    return source[theirs][:] if theirs in source.column_names else None


def _optional(source: RowSet, column: str) -> list[str]:
    """A column as text; "" for a missing value, and for all rows if the column is missing."""
    values = source[column][:] if column in source.column_names else [""] * len(source)
    return texts(["" if value is None else value for value in values], column, column)


_READ = {"text": texts, "number": numbers}  # converters by kind of column; `raw` columns stay unchanged
