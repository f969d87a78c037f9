"""The demo task: homes whose voice assistants turn requests into actions, and the pretraining text of its backbone.

``"it should be cosy in the snug, two notches dimmer"`` -> ``light lounge dim 2``. Heterogeneous by nature: each home
owns some devices and rooms (label skew), talks more or less (quantity skew), and has its own manner and names for
things (feature skew). A name means the same in every home, so that one adapter can serve all homes, but each home
has only part of the language.

The seed determines everything, on any machine: generators are seeded with strings, never with ``hash()``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedtune.data.demo_grammar import DEVICES, INTENTS, MANNERS, ROOMS, VALUES, Intent, in_words, known

DEVICE_CLASSES = ("phone",) * 4 + ("single-board",) * 3 + ("laptop",) * 2 + ("workstation",)  # homes 0-9, homes 10-19, ..., shuffled
SMALLEST, LARGEST = 40, 160  # training examples a home


@dataclass(frozen=True, kw_only=True)
class Home:
    """One client: its devices, its number of requests and its language.

    Args:
        id: Stable logical id, e.g. ``home-007``; home 7 of a seed is the same home for any number of homes.
        device_class: ``phone``, ``single-board``, ``laptop`` or ``workstation``.
        examples: Training examples, 40 to 160.
        intents: Keys of ``INTENTS`` that this home uses, with their share of its requests (sums to 1).
        rooms: Canonical rooms, with their share of its requests (sums to 1).
        names: Canonical room or device -> this home's usual name for it.
        manners: Keys of ``MANNERS``, with their share of its requests (sums to 1).
        spelled: Probability that a number is in words rather than digits.
    """

    id: str
    device_class: str
    examples: int
    intents: dict[str, float]
    rooms: dict[str, float]
    names: dict[str, str]
    manners: dict[str, float]
    spelled: float


def homes(seed: int, count: int = 24) -> list[Home]:
    """The first ``count`` homes of a seed, in order of id."""
    if count < 0:
        raise ValueError(f"count is {count}, but must be at least 0")
    classes: list[str] = []
    for block in range((count + 9) // 10):
        deck = list(DEVICE_CLASSES)
        random.Random(f"demo/{seed}/classes/{block}").shuffle(deck)
        classes += deck
    return [_home(seed, index, classes[index]) for index in range(count)]


def generate(seed: int, homes: int = 24, test_size: int = 240) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw every home's training examples and one global test set.

    Args:
        seed: Seed of all draws.
        homes: Number of homes.
        test_size: Total number of test examples, spread evenly over the homes. Their requests are distinct and occur
            in no home's training examples.

    Returns:
        ``(train, test)``, rows ``{"client", "device_class", "request", "action", "intent", "parts", "rejected"}``; train is grouped by
        home. ``parts`` are the action's device, verb and room, separated by commas; ``rejected`` is another action, of another home if
        there are several.
    """
    people = _homes(seed, homes)
    if test_size and not people:
        raise ValueError(f"test_size is {test_size} but there are no homes to draw it from")
    test: list[dict[str, str]] = []
    held_out: set[str] = set()
    # Test requests are drawn before training requests, so that frequent requests are tested too.
    draws = {home.id: random.Random(f"demo/{seed}/test/{home.id}") for home in people}
    tries = 0
    while len(test) < test_size:
        home = people[len(test) % len(people)]
        row = _example(draws[home.id], home)
        tries += 1
        if row["request"] not in held_out:
            held_out.add(row["request"])
            test.append(row)
        elif tries > 200 * test_size:
            raise ValueError(f"test_size is {test_size}, but {homes} homes have fewer distinct requests: lower it")
    train: list[dict[str, str]] = []
    for home in people:
        rng = random.Random(f"demo/{seed}/train/{home.id}")
        mine = 0
        while mine < home.examples:
            row = _example(rng, home)
            if row["request"] not in held_out:
                train.append(row)
                mine += 1
    for name, rows in (("test", test), ("train", train)):
        rng = random.Random(f"demo/{seed}/rejected/{name}")
        for row in rows:
            row["rejected"] = _other_action(rng, row, train, alone=homes == 1)
    return train, test


def _other_action(rng: random.Random, row: dict[str, str], rows: Sequence[dict[str, str]], *, alone: bool) -> str:
    """The action of a random row with another action and, unless there is one home only, of another home."""
    while True:
        other = rng.choice(rows)
        if other["action"] != row["action"] and (alone or other["client"] != row["client"]):
            return other["action"]


def pretraining_text(seed: int) -> Iterator[str]:
    """Endless documents (about 60 to 200 tokens each) about the demo's homes, without the demo's task.

    People make requests and explain them in plain English, answer questions, explain names, spell numbers and copy
    words. The prompt format, the actions, and the held-out names and sentence shapes (see ``demo_grammar``) do not occur.
    """
    rng = random.Random(f"demo/{seed}/pretraining")
    kinds = (_scene, _questions, _minutes_of_the_day, _glossary, _numbers, _copies)
    while True:
        yield rng.choices(kinds, weights=(30, 30, 25, 6, 5, 4))[0](rng)


_homes = homes  # ``generate`` has a parameter of that name


# --- homes and their requests ---


def _home(seed: int, index: int, device_class: str) -> Home:
    rng = random.Random(f"demo/{seed}/home/{index}")
    owned = rng.sample(sorted(DEVICES), rng.randint(4, 6))
    intents = [name for name, intent in INTENTS.items() if intent.device in owned]
    rooms = rng.sample(sorted(ROOMS), rng.randint(3, 5))
    favorite, second = rng.sample(sorted(MANNERS), 2)
    examples = int(min(max(rng.lognormvariate(4.3, 0.5), SMALLEST), LARGEST))
    return Home(
        id=f"home-{index:03d}",
        device_class=device_class,
        examples=examples,
        intents=_shares(rng, intents, concentration=0.7),
        rooms=_shares(rng, rooms, concentration=1.5),
        names={thing: rng.choice(ways) for table in (ROOMS, DEVICES) for thing, ways in table.items()},
        manners={favorite: 0.7, second: 0.3},
        spelled=rng.choice((0.1, 0.5, 0.9)),
    )


def _shares(rng: random.Random, keys: Sequence[str], concentration: float) -> dict[str, float]:
    """A draw from a symmetric Dirichlet, floored at 1 % so that a home uses all its devices and rooms."""
    weights = [rng.gammavariate(concentration, 1.0) for _ in keys]
    total = sum(weights)
    weights = [max(weight / total, 0.01) for weight in weights]
    return {key: weight / sum(weights) for key, weight in zip(keys, weights, strict=True)}


def _example(rng: random.Random, home: Home) -> dict[str, str]:
    key = _draw(rng, home.intents)
    intent = INTENTS[key]
    room = _draw(rng, home.rooms)
    names = {thing: home.names[thing] if rng.random() < 0.8 else thing for thing in (room, intent.device)}
    values = _values(rng, intent)
    request = _say(rng, intent, _draw(rng, home.manners), names[room], names[intent.device], values, home.spelled)
    return {
        "client": home.id,
        "device_class": home.device_class,
        "request": request,
        "action": intent.action.format(r=room, **values),
        "intent": key,
        "parts": ", ".join([intent.device, intent.verb, *([room] if "{r}" in intent.action else [])]),
    }


def _draw(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def _values(rng: random.Random, intent: Intent) -> dict[str, str]:
    return {slot: rng.choice(VALUES[kind]) for slot, kind in (("v", intent.v), ("w", intent.w)) if kind}


def _say(
    rng: random.Random,
    intent: Intent,
    manner: str,
    room: str,
    device: str,
    values: dict[str, str],
    spelled: float,
    *,
    all_ways: bool = True,
) -> str:
    shapes = {"terse": intent.terse, "indirect": intent.hint}.get(manner, intent.ask)
    frames = MANNERS[manner]
    if not all_ways:
        shapes, frames = known(shapes), known(frames)
    heard = dict(values)
    for slot, value in values.items():
        if value.isdigit() and rng.random() < spelled:
            heard[slot] = in_words(int(value))
    return rng.choice(frames).format(c=rng.choice(shapes).format(d=device, r=room, **heard))


# --- the backbone's pretraining text ---

PEOPLE = (
    "Ada", "Ben", "Carla", "Dev", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mia", "Nora",
    "Omar", "Pia", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Vito", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
TIMES = ("morning", "evening", "afternoon", "night", "Sunday", "Monday", "winter day", "summer day")
PLACES = ("Mill Lane", "Oak Street", "River Road", "Hill Park", "Church Square", "Station Road")
THINGS = (
    "chair", "table", "spoon", "cat", "window", "book", "carpet", "picture", "mirror", "bottle", "coat", "plant",
    "candle", "cup", "shelf", "sofa", "bed", "broom",
)  # fmt: skip
DOINGS = (
    "sits down",
    "reads a book",
    "looks around",
    "waits for a friend",
    "sings a song",
    "drinks some tea",
    "sleeps",
    "talks to the cat",
)


def _wish(rng: random.Random) -> tuple[str, Intent, str, dict[str, str]]:
    """A request for the pretraining text, with its intent, canonical room and values."""
    intent = INTENTS[rng.choice(list(INTENTS))]
    room = rng.choice(list(ROOMS))
    values = _values(rng, intent)
    manner = rng.choice([manner for manner in MANNERS if manner != "slangy"])
    device_name, room_name = rng.choice(known(DEVICES[intent.device])), rng.choice(known(ROOMS[room]))
    return _say(rng, intent, manner, room_name, device_name, values, 0.5, all_ways=False), intent, room, values


def _scene(rng: random.Random) -> str:
    who, other = rng.sample(PEOPLE, 2)
    parts = [f"{who} and {other} live in {rng.choice(PLACES)} {rng.randint(1, 99)}."]
    parts.append(f"One {rng.choice(TIMES)} they were at home.")
    for _ in range(rng.randint(3, 5)):
        request, intent, room, values = _wish(rng)
        want = intent.want.format(r=room, **values)
        speaker = rng.choice((who, other))
        parts.append(
            rng.choice((
                f'{speaker} said: "{request}." So the house was asked to {want}.',
                f'"{request}," said {speaker}. That means: {want}.',
                f'{speaker} wanted to {want}, and so {speaker} said: "{request}."',
            ))
        )  # fmt: skip
    return " ".join(parts)


def _questions(rng: random.Random) -> str:
    parts: list[str] = []
    for _ in range(rng.randint(2, 4)):
        request, intent, room, values = _wish(rng)
        facts = [
            ("Which device", intent.device),
            ("What should it do", intent.verb),
            ("What is the wish", intent.want.format(r=room, **values)),
        ]
        if "{r}" in intent.action:
            facts.append(("Which room", room))
        if intent.v:
            facts.append((_question(intent.v), values["v"]))
        if intent.w:
            facts.append((_question(intent.w), values["w"]))
        rng.shuffle(facts)
        answers = " ".join(f"{question}? {answer}." for question, answer in facts[: rng.randint(2, len(facts))])
        parts.append(f'{rng.choice(PEOPLE)}: "{request}." {answers}')
    return "\n".join(parts)


def _question(kind: str) -> str:
    if kind in ("colour", "genre", "item", "day"):
        return f"Which {kind}"
    return {"which": "Which one", "zone": "Where"}.get(kind, "How much")


def _minutes_of_the_day(rng: random.Random) -> str:
    """A log: each line has a spoken request, then its facts in random order, comma-separated."""
    lines = [f"Notes of {rng.choice(PEOPLE)}, {rng.choice(TIMES)}"]
    for _ in range(rng.randint(3, 6)):
        request, intent, room, values = _wish(rng)
        facts = [intent.device, intent.verb, *values.values(), *([room] if "{r}" in intent.action else [])]
        rng.shuffle(facts)
        lines.append(f"- {request} ({', '.join(facts)})")
    return "\n".join(lines)


def _glossary(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(5, 9)):
        table = rng.choice((ROOMS, DEVICES))
        thing = rng.choice(list(table))
        lines.append(f"When {rng.choice(PEOPLE)} says {rng.choice(known(table[thing]))}, that is the {thing}.")
    return " ".join(lines)


def _numbers(rng: random.Random) -> str:
    shown = [rng.choice((rng.randint(0, 30), rng.randrange(0, 251, 5))) for _ in range(rng.randint(6, 12))]
    start = rng.randint(0, 60)
    lines = [f"{in_words(n)} is {n}" if rng.random() < 0.5 else f"{n} is {in_words(n)}" for n in shown]
    return ", ".join(lines) + ". Count: " + ", ".join(str(n) for n in range(start, start + 8)) + "."


def _copies(rng: random.Random) -> str:
    who = rng.choice(PEOPLE)
    parts = [f"{who} {rng.choice(DOINGS)} in the {rng.choice(list(ROOMS))}."]
    for _ in range(rng.randint(2, 4)):
        words = " ".join(rng.sample(THINGS, rng.randint(2, 5)))
        parts.append(rng.choice((f'{who} says "{words}" and the parrot says "{words}".', f"Say {words}: {words}.")))
    return " ".join(parts)
