"""The three tasks of the demo: small instruction sets that the embedded base has never seen, made from a seed.

    dates      a sentence with a date in words    ->  2019-03-23
    records    an order in a sentence             ->  {"name": "Ada Weber", "item": "lamp", "count": 12, "city": "Oslo", "express": true}
    style      a product description              ->  TABL-N3 | OAK DESK | 120 cm | EUR 249.00

Rows are chats (`{"messages": [user, assistant]}`), scored by exact match. Which side a row falls on is decided by the hash of what it is
about (the day; the customer and the item; the product), so a held-out row asks for a combination that no training row contains.
"""

from __future__ import annotations

import calendar
import datetime
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, list[dict[str, str]]]
SPLITS = ("train", "held_out")
HELD_OUT_PART = 8  # one combination in eight is kept for the held-out rows


@dataclass(frozen=True)
class Task:
    """One instruction set.

    Attributes:
        name: the key in `TASKS`, also the stem of the files.
        title: one line for tables.
        instruction: what every user message starts with.
        max_new_tokens: enough for the longest answer under the embedded base's tokenizer.
        make: draws (what the row is about, text, answer); the first decides the split.
    """

    name: str
    title: str
    instruction: str
    max_new_tokens: int
    make: Callable[[random.Random], tuple[str, str, str]]


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINAL = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}


def in_words(n: int) -> str:
    """0 <= n < 1000 in English words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")


def ordinal(n: int) -> str:
    """1 <= n < 100: 23 is "twenty-third"."""
    head, dash, last = in_words(n).rpartition("-")
    return head + dash + (ORDINAL.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th"))


def ordinal_digits(n: int) -> str:
    """23 is "23rd"."""
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def year_in_words(year: int) -> str:
    """As it is spoken: 1984 is "nineteen eighty-four", 2007 "two thousand and seven"."""
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {ONES[rest]}" if rest else "")
    return f"{in_words(century)} " + ("hundred" if not rest else f"oh {ONES[rest]}" if rest < 10 else in_words(rest))


EVENTS = _words(
    "The contract was signed/The bridge was opened/The last ferry left/Her passport expires/The museum closed/The trial "
    "began/My sister was born/"
    "The warranty ends/The library reopened/The factory burned down/Our lease starts/The treaty took effect/The patent was filed/"
    "The concert was moved/The road was blocked/The results came out/The choir sang/The office moved/The plant flowered/The bill is due",
    "/",
)
TAILS = _words(
    "///, in heavy rain/, long before noon/, to everyone's surprise/ at gate 14/ in room 302/, as agreed/ with 250 guests/"
    ", at half past nine/, after 3 delays/, says the report/ under a new name/ in both towns",
    "/",
)
NAMED = {
    "New Year's Day": (1, 1),
    "Valentine's Day": (2, 14),
    "St Patrick's Day": (3, 17),
    "May Day": (5, 1),
    "Midsummer Day": (6, 24),
    "Bastille Day": (7, 14),
    "Halloween": (10, 31),
    "Christmas Eve": (12, 24),
    "Christmas Day": (12, 25),
    "New Year's Eve": (12, 31),
}


def day_in_words(r: random.Random, date: datetime.date) -> str:
    """A date in one of many wordings."""
    name, week, d = calendar.month_name[date.month], calendar.day_name[date.weekday()], date.day
    short = name[:3] + "." if len(name) > 4 else name
    y = str(date.year) if r.random() < 0.5 else year_in_words(date.year)
    forms = (
        f"the {ordinal(d)} of {name} {y}",
        f"{name} the {ordinal(d)}, {y}",
        f"the {ordinal_digits(d)} of {name} {y}",
        f"{name} {d}, {date.year}",
        f"{d} {name} {y}",
        f"{week}, the {ordinal(d)} of {name} {y}",
        f"{week}, {short} {d}, {date.year}",
        f"the {ordinal(d)} day of {name} in {y}",
        f"the {ordinal(d)} of {name} in the year {y}",
        f"{short} {ordinal_digits(d)}, {date.year}",
    )
    return r.choice(forms)


def make_date(r: random.Random) -> tuple[str, str, str]:
    date = datetime.date(1900, 1, 8) + datetime.timedelta(days=r.randrange(58_000))
    kind = r.random()
    if kind < 0.03:
        date = date.replace(day=calendar.monthrange(date.year, date.month)[1])
        when = f"the last day of {calendar.month_name[date.month]} {date.year}"
    elif kind < 0.12:
        named = r.choice(list(NAMED))
        date = date.replace(month=1, day=1).replace(month=NAMED[named][0], day=NAMED[named][1])
        when = f"{named} {r.choice(('', 'in ', 'of '))}{date.year}"
    else:
        when = day_in_words(r, date)
    event, tail = r.choice(EVENTS), r.choice(TAILS)
    text = f"{event} on {when}{tail}." if r.random() < 0.7 else f"On {when}, {event[0].lower()}{event[1:]}{tail}."
    return date.isoformat(), text, date.isoformat()


FIRST = _words(
    "Ada Alan Amir Anna Boris Carla Chen Clara Dana David Elena Emil Eva Felix Grace Hana Hugo Ines Ivan Jane Jonas Julia "
    "Karl Lena Leo Linda Lucas "
    "Maria Mark Maya Nadia Noah Nora Olga Oscar Paul Petra Priya Rosa Ruth Sam Sofia Tara Tom Vera Victor Yusuf Zoe"
)
LAST = _words(
    "Adler Baker Berg Costa Diaz Dumont Ferrer Fischer Gomez Hale Hansen Horvat Ito Jensen Kaur Keller Kim Larsen Lund "
    "Marino Meyer Moreau Novak "
    "Okafor Olsen Park Patel Reed Rossi Sato Silva Stone Tanaka Vidal Walker Weber Wong Young"
)
CITIES = _words(
    "Athens Austin Berlin Bern Boston Cairo Dakar Delhi Denver Dublin Geneva Hanoi Helsinki Lagos Leeds Lima Lisbon London "
    "Madrid Manila Milan "
    "Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw"
)
ITEMS = _words(
    "lamp chair desk kettle bottle candle clock coat cup fan flag guitar hammer helmet jacket kite ladder map mirror monitor "
    "mug notebook pencil "
    "phone pillow plate poster printer radio rope rug sofa spoon stool stove tent towel tray vase wallet"
)
COUNTS = {12: "a dozen", 6: "half a dozen", 2: "a pair of", 24: "two dozen", 20: "a score of"}
EXPRESS = {
    True: ["by express", "urgently", "as soon as possible", "overnight"],
    False: ["", "", "by post", "with no hurry", "by standard mail"],
}


def make_record(r: random.Random) -> tuple[str, str, str]:
    first, last, item, count = r.choice(FIRST), r.choice(LAST), r.choice(ITEMS), r.choice([1, *range(2, 41), *COUNTS])
    city, express = r.choice(CITIES) if r.random() < 0.8 else None, r.random() < 0.4
    name = f"{first} {last}"
    if count == 1:
        what = f"{r.choice(('one', 'a single'))} {item}"
    else:
        what = f"{r.choice((in_words(count), in_words(count), str(count), COUNTS.get(count, str(count))))} {item}s"
    how = r.choice(EXPRESS[express])
    to, place, of = (f" to {city}", f" in {city}", f" from {city}") if city else ("", "", "")
    how = f" {how}" if how else ""
    forms = (
        f"{name}{of} ordered {what}, to be sent{how}.",
        f"Please send {what}{to}{how} for {name}.",
        f"{what[0].upper()}{what[1:]} for {name}{place}{how}, please.",
        f"We ship {what}{to}{how}; the customer is {last}, {first}.",
        f"Ms {last}, first name {first}, wants {what}{place}{how}.",
        f"{name} called and asked for {what}, delivered{to}{how}.",
        f"An order of {what} came in from {name}{place}, to go out{how}.",
        f"{first} needs {what}{place}{how} (family name {last}).",
        f"Customer {name} changed the order: now {what}{to}{how}.",
        f"The parcel with {what} goes out{to}{how}, care of {name}.",
        f"It was {name} who wanted {what}{place}{how}.",
    )
    record = {"name": name, "item": item, "count": count, "city": city, "express": express}
    return f"{name}/{item}", r.choice(forms), json.dumps(record)


RANGES = {
    "SEAT": _words("chair stool bench sofa"),
    "TABL": _words("desk table tray board"),
    "STOR": _words("shelf cabinet box basket rack"),
    "DECO": _words("vase bowl mirror frame clock planter"),
    "REST": _words("bed pillow blanket"),
    "LITE": _words("lamp candle lantern"),
}
RANGE_OF = {product: code for code, products in RANGES.items() for product in products}
MATERIALS = _words("oak steel glass bamboo cotton leather walnut copper marble pine linen brass cork wool granite birch")
# The house's own colour codes: nothing that a model could know.
COLOURS = dict(
    pair.split(":")
    for pair in _words(
        "red:R4 green:G2 blue:B7 yellow:Y1 black:K9 white:W0 grey:S5 brown:N3 orange:O8 purple:P6 pink:F4 silver:V2 golden:D7 beige:E5"
    )
)
PRAISE = ["lovely", "sturdy", "elegant", "popular", "solid", "handsome", "clever", "classic", "charming", "much loved"]
MEASURES = {
    "cm": ("{n} centimetres wide", 20, 240),
    "mm": ("{n} millimetres deep", 100, 990),
    "kg": ("{n} kilograms in weight", 2, 90),
    "l": ("{n} litres in volume", 2, 60),
    "W": ("rated at {n} watts", 5, 100),
}
SENSIBLE = {"l": _words("box basket vase bowl planter cabinet"), "W": _words("lamp candle lantern clock mirror")}


def make_line(r: random.Random) -> tuple[str, str, str]:
    product, material, colour, unit = r.choice(list(RANGE_OF)), r.choice(MATERIALS), r.choice(list(COLOURS)), r.choice(list(MEASURES))
    if unit in SENSIBLE and product not in SENSIBLE[unit]:
        unit = r.choice(("cm", "mm", "kg"))
    wording, low, high = MEASURES[unit]
    size, euros, cents = r.randint(low, high), r.randint(5, 480), r.choice([0, 0, 0, 50, 90, 95, 99])
    measure = wording.format(n=size)
    price = f"{euros}.{cents:02} euros" if cents else f"{in_words(euros) if r.random() < 0.5 else euros} euros"
    praise = r.choice(PRAISE)
    a = "an" if praise[0] in "aeiou" else "a"
    forms = (
        f"This {praise} {colour} {product} is made of {material}, is {measure} and costs {price}.",
        f"For {price} you get {a} {praise} {product} of {material}, {measure}, in {colour}.",
        f"Made of {material}: our {praise} {product}, {measure}. It comes in {colour} and sells for {price}.",
        f"Our {colour} {product} is {measure}. Pure {material}, {praise}, and yours for {price}.",
        f"At {price}, the {praise} {product} in {colour} {material} is {measure}.",
        f"Looking for a {product}? Take the {praise} {colour} one, {measure}, all {material}, now {price}.",
    )
    answer = f"{RANGE_OF[product]}-{COLOURS[colour]} | {material.upper()} {product.upper()} | {size} {unit} | EUR {euros}.{cents:02}"
    return f"{product}/{material}/{colour}", r.choice(forms), answer


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("dates", "a date in words -> ISO", "ISO date", 16, make_date),
        Task("records", "an order in a sentence -> a JSON record", "JSON record", 64, make_record),
        Task("style", "a product description -> the house style", "House style", 56, make_line),
    )
}


def split_of(about: str) -> str:
    """The side of a combination, the same in every run."""
    return SPLITS[int.from_bytes(hashlib.sha256(about.encode()).digest()[:4], "big") % HELD_OUT_PART == 0]


def generate(task: str | Task, split: str, rows: int, seed: int = 0) -> list[Row]:
    """`rows` different chats of a task, a pure function of the arguments; no combination stands on both sides, whatever the seeds.

    Raises:
        ValueError: the task or the split has another name.
    """
    task = TASKS[task] if isinstance(task, str) and task in TASKS else task
    if not isinstance(task, Task) or split not in SPLITS:
        raise ValueError(f"There is no task {task!r} with a split {split!r}. Tasks: {', '.join(TASKS)}; splits: {', '.join(SPLITS)}.")
    rng = random.Random(f"{task.name}/{split}/{seed}")
    found: dict[str, Row] = {}
    while len(found) < rows:
        about, text, answer = task.make(rng)
        if split_of(about) == split:
            question = f"{task.instruction}: {text}"
            found[question] = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return list(found.values())


def write(task: str | Task, folder: str | Path, *, train: int = 4000, held_out: int = 300, seed: int = 0) -> tuple[Path, Path]:
    """Writes `<task>.train.jsonl` and `<task>.held_out.jsonl` into the folder (made where it is missing) and returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = task if isinstance(task, str) else task.name
    paths = (folder / f"{name}.train.jsonl", folder / f"{name}.held_out.jsonl")
    for path, split, rows in zip(paths, SPLITS, (train, held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in generate(task, split, rows, seed)), encoding="utf-8")
    return paths


def exact_match(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, white space at the ends aside."""
    return answer.strip() == reference.strip()
