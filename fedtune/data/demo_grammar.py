"""Words and sentence shapes of the demo task: rooms, devices, intents and manners of speaking.

Nothing here is random; ``fedtune.data.demo`` draws from these tables. One rule keeps the task honest: **the last entry
of every tuple of three or more variants never occurs in the backbone's pretraining text** (see :func:`known`), so that
federated training has new words and sentence shapes to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

# Canonical name -> its names. A name means the same thing in every home, since otherwise no global adapter could exist.
ROOMS: dict[str, tuple[str, ...]] = {
    "kitchen": ("kitchen", "galley", "cookhouse", "scullery"),
    "lounge": ("lounge", "living room", "front room", "snug"),
    "bedroom": ("bedroom", "sleeping nook", "boudoir", "bunk"),
    "office": ("office", "study", "den", "cave"),
    "bathroom": ("bathroom", "washroom", "tub room", "loo"),
    "hall": ("hall", "corridor", "entry", "foyer"),
    "nursery": ("nursery", "kids room", "play room", "nest"),
    "garage": ("garage", "workshop", "shed", "pit"),
    "attic": ("attic", "loft", "top floor", "roost"),
    "patio": ("patio", "terrace", "deck", "porch"),
}

DEVICES: dict[str, tuple[str, ...]] = {
    "light": ("light", "lamp", "bulb", "glow"),
    "thermostat": ("thermostat", "heating", "radiator", "climate box"),
    "blinds": ("blinds", "shades", "shutters", "curtains"),
    "fan": ("fan", "blower", "ventilator", "whirler"),
    "speaker": ("speaker", "stereo", "sound box", "boombox"),
    "timer": ("timer", "countdown", "egg clock", "ticker"),
    "alarm": ("alarm", "wake up call", "morning bell", "rooster"),
    "door": ("door", "gate", "entrance", "hatch"),
    "vacuum": ("vacuum", "hoover", "robot", "dust bunny"),
    "tv": ("tv", "telly", "television", "goggle box"),
    "list": ("list", "groceries", "basket", "notepad"),
    "sprinkler": ("sprinkler", "hose", "waterer", "rain maker"),
    "kettle": ("kettle", "tea maker", "pot", "brewer"),
    "oven": ("oven", "stove", "cooker", "roaster"),
}

VALUES: dict[str, tuple[str, ...]] = {
    "step": ("2", "3", "4", "5", "6"),
    "degree": ("16", "17", "18", "19", "20", "21", "22", "23", "24"),
    "minute": ("5", "10", "15", "20", "25", "30", "45", "60"),
    "hour": ("5", "6", "7", "8", "9", "10"),
    "channel": ("1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "water": ("70", "80", "90", "100"),
    "bake": ("150", "160", "180", "200", "220"),
    "colour": ("red", "blue", "green", "amber", "violet", "white"),
    "genre": ("jazz", "rock", "folk", "soul", "disco", "opera"),
    "item": ("milk", "eggs", "bread", "rice", "apples", "soap", "honey", "tea"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "which": ("front", "back", "side", "cellar"),
    "zone": ("lawn", "roses", "hedge", "herbs"),
}

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, kw_only=True)
class Intent:
    """One action of a device.

    Placeholders: ``{d}`` device, ``{r}`` room, ``{v}`` first value, ``{w}`` second value.

    Args:
        action: The command to the device, in canonical names.
        want: The same in plain English with canonical names; only the backbone's pretraining text uses it.
        ask: Direct requests; they read well after "could you".
        terse: Requests in as few words as possible.
        hint: Indirect requests.
        v: Key of ``VALUES`` that fills ``{v}``; empty for none.
        w: Key of ``VALUES`` that fills ``{w}``; empty for none.
    """

    action: str
    want: str
    ask: tuple[str, ...]
    terse: tuple[str, ...]
    hint: tuple[str, ...]
    v: str = ""
    w: str = ""

    @property
    def device(self) -> str:
        """Canonical device, the action's first word."""
        return self.action.split()[0]

    @property
    def verb(self) -> str:
        """The verb, e.g. ``dim``: the action's last word that is neither the device nor a placeholder."""
        return [word for word in self.action.split()[1:] if "{" not in word][-1]


# fmt: off
INTENTS: dict[str, Intent] = {
    "light.on": Intent(
        action="light {r} on",
        want="switch the light in the {r} on",
        ask=("turn on the {d} in the {r}", "switch the {r} {d} on", "get the {d} going in the {r}",
             "fire up the {r} {d}"),
        terse=("{r} {d} on", "{d} on in the {r}", "lit {d}, {r}"),
        hint=("it is pitch dark in the {r}", "i cannot see a thing in the {r}", "nobody could read in that gloomy {r}"),
    ),
    "light.off": Intent(
        action="light {r} off",
        want="switch the light in the {r} off",
        ask=("turn off the {d} in the {r}", "switch the {r} {d} off", "put out the {d} in the {r}", "kill the {r} {d}"),
        terse=("{r} {d} off", "{d} off in the {r}", "no {d}, {r}"),
        hint=("the {d} in the {r} is burning for nothing", "we left the {d} on in the {r}", "the {r} can go dark now"),
    ),
    "light.dim": Intent(
        action="light {r} dim {v}",
        want="dim the light in the {r} by {v}",
        v="step",
        ask=("dim the {d} in the {r} by {v}", "take the {r} {d} down {v} notches",
             "make the {r} {d} {v} notches softer"),
        terse=("{r} {d} down {v}", "dim {v} in the {r}", "{r} {v} softer"),
        hint=("it should be cosy in the {r}, {v} notches dimmer", "the {r} is too bright by {v} notches",
              "the {d} in the {r} hurts my eyes, {v} less"),
    ),
    "light.brighten": Intent(
        action="light {r} brighten {v}",
        want="brighten the light in the {r} by {v}",
        v="step",
        ask=("brighten the {d} in the {r} by {v}", "take the {r} {d} up {v} notches",
             "make the {r} {d} {v} notches stronger"),
        terse=("{r} {d} up {v}", "brighter by {v} in the {r}", "{r} {v} stronger"),
        hint=("the {r} is too dim by {v} notches", "i need {v} notches more to read in the {r}",
              "the {d} in the {r} is weak, {v} more"),
    ),
    "light.tint": Intent(
        action="light {r} tint {v}",
        want="tint the light in the {r} {v}",
        v="colour",
        ask=("make the {d} in the {r} {v}", "change the {r} {d} to {v}", "paint the {r} with {v} {d}"),
        terse=("{r} {d} {v}", "{v} {d} in the {r}", "{v} for the {r}"),
        hint=("{v} would look lovely in the {r}", "i am in a {v} mood in the {r}",
              "the {r} is best when it shines {v}"),
    ),
    "thermostat.set": Intent(
        action="thermostat {r} set {v}",
        want="set the thermostat in the {r} to {v}",
        v="degree",
        ask=("set the {d} in the {r} to {v}", "bring the {r} to {v} degrees", "put the {r} {d} at {v}"),
        terse=("{r} {v} degrees", "{r} {d} at {v}", "{d} {v}, {r}"),
        hint=("the {r} should be {v} degrees", "i like it at {v} degrees in the {r}", "{v} degrees would suit the {r}"),
    ),
    "thermostat.raise": Intent(
        action="thermostat {r} raise {v}",
        want="raise the thermostat in the {r} by {v}",
        v="step",
        ask=("turn the {d} in the {r} up by {v}", "make the {r} {v} degrees warmer", "heat the {r} by {v} more"),
        terse=("{r} {d} plus {v}", "{r} {v} warmer", "{v} hotter, {r}"),
        hint=("it is {v} degrees too cold in the {r}", "i am freezing in the {r}, {v} more",
              "the {r} lacks {v} degrees"),
    ),
    "thermostat.lower": Intent(
        action="thermostat {r} lower {v}",
        want="lower the thermostat in the {r} by {v}",
        v="step",
        ask=("turn the {d} in the {r} down by {v}", "make the {r} {v} degrees cooler", "chill the {r} by {v}"),
        terse=("{r} {d} minus {v}", "{r} {v} cooler", "{v} colder, {r}"),
        hint=("it is {v} degrees too hot in the {r}", "i am sweating in the {r}, {v} less",
              "the {r} is {v} degrees over"),
    ),
    "blinds.open": Intent(
        action="blinds {r} open",
        want="open the blinds in the {r}",
        ask=("open the {d} in the {r}", "pull up the {r} {d}", "let the sun into the {r}"),
        terse=("{r} {d} up", "open {d}, {r}", "sun in the {r}"),
        hint=("i want to look out of the {r}", "the {d} hide the view from the {r}", "the plants in the {r} want sun"),
    ),
    "blinds.close": Intent(
        action="blinds {r} close",
        want="close the blinds in the {r}",
        ask=("close the {d} in the {r}", "pull down the {r} {d}", "keep the sun out of the {r}"),
        terse=("{r} {d} down", "close {d}, {r}", "no sun in the {r}"),
        hint=("people can look into the {r}", "the sun blinds me in the {r}", "the neighbours stare at the {r}"),
    ),
    "fan.speed": Intent(
        action="fan {r} speed {v}",
        want="run the fan in the {r} at speed {v}",
        v="step",
        ask=("run the {d} in the {r} at {v}", "put the {r} {d} on level {v}", "spin the {r} {d} at {v}"),
        terse=("{r} {d} {v}", "{d} level {v}, {r}", "{r} air {v}"),
        hint=("the air in the {r} needs level {v}", "it is stuffy in the {r}, level {v} would help",
              "the {r} smells, go {v}"),
    ),
    "fan.off": Intent(
        action="fan {r} off",
        want="switch the fan in the {r} off",
        ask=("turn off the {d} in the {r}", "stop the {r} {d}", "park the {r} {d}"),
        terse=("{r} {d} off", "{d} stop, {r}", "no {d}, {r}"),
        hint=("the {d} in the {r} is too loud", "there is a draught in the {r}", "papers fly about in the {r}"),
    ),
    "speaker.play": Intent(
        action="speaker {r} play {v}",
        want="play {v} on the speaker in the {r}",
        v="genre",
        ask=("play {v} in the {r}", "put some {v} on the {r} {d}", "blast {v} from the {d} in the {r}"),
        terse=("{r} {v}", "{v} on the {r} {d}", "{d} {v}, {r}"),
        hint=("i would love to hear {v} in the {r}", "the {r} is too quiet without {v}", "{v} and the {r} go together"),
    ),
    "speaker.volume": Intent(
        action="speaker {r} volume {v}",
        want="set the volume of the speaker in the {r} to {v}",
        v="channel",
        ask=("set the {r} {d} to volume {v}", "play at volume {v} in the {r}", "crank the {r} {d} to {v}"),
        terse=("{r} volume {v}", "{d} volume {v}, {r}", "{r} loudness {v}"),
        hint=("volume {v} would be right for the {r}", "i can hear the {d} in the {r} best at volume {v}",
              "my ears want loudness {v} in the {r}"),
    ),
    "speaker.pause": Intent(
        action="speaker {r} pause",
        want="pause the speaker in the {r}",
        ask=("pause the {d} in the {r}", "stop the music in the {r}", "hush the {r} {d}"),
        terse=("{r} {d} pause", "music off, {r}", "quiet, {r}"),
        hint=("i am on the phone in the {r}", "there is too much noise in the {r}",
              "the baby sleeps in the {r}, no tunes"),
    ),
    "timer.start": Intent(
        action="timer {v} minutes",
        want="run the timer for {v} minutes",
        v="minute",
        ask=("set the {d} to {v} minutes", "start the {d} for {v} minutes", "count down {v} minutes",
             "ring in {v} minutes"),
        terse=("{v} minutes", "{d} {v}", "{v} on the {d}"),
        hint=("the eggs need {v} minutes", "the cake is done in {v} minutes", "i nap for {v} minutes"),
    ),
    "alarm.set": Intent(
        action="alarm {v} set {w}",
        want="set the alarm for {v} at {w}",
        v="day",
        w="hour",
        ask=("set the {d} for {v} at {w}", "wake me on {v} at {w}", "get me up at {w} on {v}"),
        terse=("{d} {v} {w}", "{v} at {w}", "up {v} by {w}"),
        hint=("i must be up at {w} on {v}", "my train leaves on {v} soon after {w}",
              "school is at {w} on {v}, no sleeping in"),
    ),
    "alarm.drop": Intent(
        action="alarm {v} drop",
        want="drop the alarm for {v}",
        v="day",
        ask=("cancel the {d} for {v}", "drop my {v} {d}", "forget about the {d} on {v}"),
        terse=("no {d} on {v}", "{v} {d} off", "scrap {v} {d}"),
        hint=("i want to sleep late on {v}", "{v} is a holiday", "no school on {v}"),
    ),
    "door.lock": Intent(
        action="door {v} lock",
        want="lock the {v} door",
        v="which",
        ask=("lock the {v} {d}", "bolt the {v} {d}", "make sure nobody gets through the {v} {d}"),
        terse=("{v} {d} locked", "lock {v}", "bolt {v}"),
        hint=("we are leaving, the {v} {d} is not locked", "the {v} {d} is not safe like that",
              "burglars like our {v} {d}"),
    ),
    "door.unlock": Intent(
        action="door {v} unlock",
        want="unlock the {v} door",
        v="which",
        ask=("unlock the {v} {d}", "let them in at the {v} {d}", "free the {v} {d}"),
        terse=("{v} {d} unlocked", "unlock {v}", "free {v}"),
        hint=("the postman waits at the {v} {d}", "i stand before the {v} {d} without keys",
              "grandma knocks at the {v} {d}"),
    ),
    "vacuum.clean": Intent(
        action="vacuum {r} clean",
        want="clean the {r} with the vacuum",
        ask=("clean the {r}", "run the {d} in the {r}", "send the {d} to the {r}", "suck up the dirt in the {r}"),
        terse=("{d} to the {r}", "{r} {d}", "dust, {r}"),
        hint=("there are crumbs all over the {r}", "the {r} floor is dirty", "the cat made a mess in the {r}"),
    ),
    "tv.channel": Intent(
        action="tv {r} channel {v}",
        want="switch the tv in the {r} to channel {v}",
        v="channel",
        ask=("switch the {r} {d} to channel {v}", "put channel {v} on in the {r}", "flip the {d} in the {r} to {v}"),
        terse=("{r} channel {v}", "{d} channel {v}, {r}", "{r} {d} number {v}"),
        hint=("my show is on channel {v} in the {r}", "i would watch channel {v} in the {r}",
              "what is on {v} in the {r}"),
    ),
    "tv.off": Intent(
        action="tv {r} off",
        want="switch the tv in the {r} off",
        ask=("turn off the {d} in the {r}", "switch the {r} {d} off", "shut down the {r} {d}"),
        terse=("{r} {d} off", "{d} off in the {r}", "no {d}, {r}"),
        hint=("nobody watches the {d} in the {r}", "the show in the {r} is over", "enough cartoons in the {r}"),
    ),
    "list.add": Intent(
        action="list add {v}",
        want="add {v} to the list",
        v="item",
        ask=("add {v} to the {d}", "put {v} on the {d}", "remember to buy {v}", "jot down {v} on the {d}"),
        terse=("{v} on the {d}", "buy {v}", "{d} {v}"),
        hint=("we are out of {v}", "there is no {v} left", "the {v} is all gone"),
    ),
    "sprinkler.run": Intent(
        action="sprinkler {w} run {v}",
        want="run the sprinkler on the {w} for {v} minutes",
        v="minute",
        w="zone",
        ask=("run the {d} on the {w} for {v} minutes", "water the {w} for {v} minutes",
             "soak the {w} with the {d} for {v}"),
        terse=("{w} {v} minutes", "{d} {w} {v}", "{w} wet for {v}"),
        hint=("the {w} could drink for {v} minutes", "the {w} need rain, say {v} minutes", "thirsty {w}, {v} minutes"),
    ),
    "kettle.heat": Intent(
        action="kettle heat {v}",
        want="heat the kettle to {v}",
        v="water",
        ask=("heat the {d} to {v}", "bring the water to {v} degrees", "boil the {d} up to {v}"),
        terse=("{d} {v}", "water {v}", "{v} in the {d}"),
        hint=("my tea wants water at {v}", "i fancy a cup at {v} degrees", "the coffee needs {v} degrees"),
    ),
    "oven.preheat": Intent(
        action="oven preheat {v}",
        want="preheat the oven to {v}",
        v="bake",
        ask=("preheat the {d} to {v}", "warm the {d} up to {v} degrees", "get the {d} to {v}"),
        terse=("{d} {v}", "{d} at {v} degrees", "{v} in the {d}"),
        hint=("the pizza bakes at {v} degrees", "i want to roast a chicken at {v}", "the pie goes in at {v}"),
    ),
}

# Manner -> frames around an "ask" ({c}); "hint" and "terse" have their own sentence shapes and only light frames.
MANNERS: dict[str, tuple[str, ...]] = {
    "plain": ("{c}", "now {c}", "{c} now"),
    "polite": ("could you {c} please", "would you kindly {c}", "please {c}, thank you", "might i ask you to {c}"),
    "chatty": ("we have guests tonight, so {c}", "the kids are home, {c}", "long day today, {c}",
               "before i forget, {c}"),
    "slangy": ("hey {c}, buddy", "go on and {c}, ok", "yo {c} will ya", "oi mate, {c}"),
    "terse": ("{c}", "{c}, now", "quick, {c}"),
    "indirect": ("{c}", "hmm, {c}", "you know, {c}", "honestly, {c}"),
}

# fmt: on


def known(ways: tuple[str, ...]) -> tuple[str, ...]:
    """The variants for the backbone's pretraining text: all but the last if there are three or more."""
    return ways[:-1] if len(ways) >= 3 else ways


def in_words(number: int) -> str:
    """``21`` -> ``"twenty one"``; 0 to 999."""
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number >= 20:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    return ONES[number]
