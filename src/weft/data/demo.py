"""The three tasks of the demo: small instruction sets that the embedded base has never seen, made from a seed.

    dates      a sentence with a date in words                 ->  2019-03-23
    records    an order in a sentence                          ->  {"name": "Ada Weber", "item": "lamp", "count": 3, "city": "Oslo"}
    style      a product description                           ->  OAK DESK | brown | 120 cm | EUR 249.00

Rows are chats (`{"messages": [user, assistant]}`), scored by exact match. Which side a row falls on is decided by the hash of what it is about (the
day; the customer and the item; the product), so a held-out row asks for a combination that no training row contains.
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


ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
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


EVENTS = ["The contract was signed", "The bridge was opened", "The last ferry left", "Her passport expires", "The museum closed", "The trial began", "My sister was born",
          "The warranty ends", "The library reopened", "The factory burned down", "Our lease starts", "The treaty took effect", "The patent was filed",
          "The concert was moved", "The road was blocked", "The results came out", "The choir sang", "The office moved", "The plant flowered", "The bill is due"]
TAILS = ["", "", "", ", in heavy rain", ", long before noon", ", to everyone's surprise", " at gate 14", " in room 302", ", as agreed", " with 250 guests",
         ", at half past nine", ", after 3 delays", ", says the report", " under a new name", " in both towns"]


def make_date(r: random.Random) -> tuple[str, str, str]:
    year, month = r.randint(1900, 2059), r.randint(1, 12)
    day = r.randint(1, calendar.monthrange(year, month)[1])
    date = datetime.date(year, month, day)
    name, week = calendar.month_name[month], calendar.day_name[date.weekday()]
    short = name[:3] + "." if len(name) > 4 else name
    y = str(year) if r.random() < 0.5 else year_in_words(year)
    forms = [f"the {ordinal(day)} of {name} {y}", f"{name} the {ordinal(day)}, {y}", f"the {ordinal_digits(day)} of {name} {y}", f"{name} {day}, {year}",
             f"{day} {name} {y}", f"{week}, the {ordinal(day)} of {name} {y}", f"{week}, {short} {day}, {year}", f"the {ordinal(day)} day of {name} in {y}",
             f"{short} {ordinal_digits(day)}, {year}"]
    when, event, tail = r.choice(forms), r.choice(EVENTS), r.choice(TAILS)
    text = f"{event} on {when}{tail}." if r.random() < 0.7 else f"On {when}, {event[0].lower()}{event[1:]}{tail}."
    return date.isoformat(), text, date.isoformat()


FIRST = ("Ada Alan Amir Anna Boris Carla Chen Clara Dana David Elena Emil Eva Felix Grace Hana Hugo Ines Ivan Jane Jonas Julia Karl Lena Leo Linda Lucas Maria "
         "Mark Maya Nadia Noah Nora Olga Oscar Paul Petra Priya Rosa Ruth Sam Sofia Tara Tom Vera Victor Yusuf Zoe").split()
LAST = ("Adler Baker Berg Costa Diaz Dumont Ferrer Fischer Gomez Hale Hansen Horvat Ito Jensen Kaur Keller Kim Larsen Lund Marino Meyer Moreau Novak Okafor Olsen "
        "Park Patel Reed Rossi Sato Silva Stone Tanaka Vidal Walker Weber Wong Young").split()
CITIES = ("Athens Austin Berlin Bern Boston Cairo Dakar Delhi Denver Dublin Geneva Hanoi Helsinki Lagos Leeds Lima Lisbon London Madrid Manila Milan Nairobi Oslo "
          "Paris Porto Prague Quito Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw").split()
ITEMS = ("lamp chair desk kettle bottle candle clock coat cup fan flag guitar hammer helmet jacket kite ladder map mirror monitor mug notebook pencil phone pillow "
         "plate poster printer radio rope rug sofa spoon stool stove tent towel tray vase wallet").split()
PRONOUNS = {True: "its", False: "their"}


def make_record(r: random.Random) -> tuple[str, str, str]:
    first, last, item, count = r.choice(FIRST), r.choice(LAST), r.choice(ITEMS), r.choice([1, *range(2, 41)])
    city = r.choice(CITIES) if r.random() < 0.8 else None
    name = f"{first} {last}"
    n = ("one" if r.random() < 0.5 else "a single") if count == 1 else in_words(count) if r.random() < 0.6 else str(count)
    what = f"{n} {item}" if count == 1 else f"{n} {item}s"
    to = f" to {city}" if city else ""
    place = f" in {city}" if city else ""
    of = f" from {city}" if city else ""
    forms = [f"{name}{of} ordered {what}.", f"Please send {what}{to} for {name}.", f"{what[0].upper()}{what[1:]} for {name}{place}, please.",
             f"We shipped {what}{to}; the customer is {last}, {first}.", f"Ms {last}, first name {first}, wants {what}{place}.",
             f"{name} called and asked for {what}, delivered{to or ' as usual'}.", f"An order of {what} came in from {name}{place}.",
             f"{first} needs {what}{place} (family name {last}).", f"Customer {name} changed the order: now {what}{to}.",
             f"The parcel with {what} goes{to or ' out today'}, care of {name}.", f"It was {name} who bought {what}{place}."]
    record = {"name": name, "item": item, "count": count, "city": city}
    return f"{name}/{item}", r.choice(forms), json.dumps(record)


PRODUCTS = ("desk chair lamp shelf table bench stool bowl vase tray clock mirror cabinet box basket frame bed ladder planter rack").split()
MATERIALS = "oak steel glass bamboo cotton leather walnut copper marble pine linen brass cork wool granite birch".split()
COLOURS = "red green blue yellow black white grey brown orange purple pink silver golden beige".split()
PRAISE = ["lovely", "sturdy", "elegant", "popular", "solid", "handsome", "clever", "classic", "charming", "much loved"]
UNITS = [("centimetres", "cm", (20, 240)), ("millimetres", "mm", (100, 990)), ("kilograms", "kg", (2, 90)), ("litres", "l", (2, 60)), ("watts", "W", (5, 100))]
MEASURE = {"cm": "{n} {u} wide", "mm": "{n} {u} deep", "kg": "{n} {u} in weight", "l": "{n} {u} in volume", "W": "rated at {n} {u}"}


def make_line(r: random.Random) -> tuple[str, str, str]:
    product, material, colour = r.choice(PRODUCTS), r.choice(MATERIALS), r.choice(COLOURS)
    unit, short, (low, high) = r.choice(UNITS)
    size, euros = r.randint(low, high), r.randint(5, 480)
    cents = r.choice([0, 0, 0, 50, 90, 95, 99])
    measure = MEASURE[short].format(n=size, u=unit)
    price = f"{euros}.{cents:02} euros" if cents else f"{in_words(euros) if r.random() < 0.5 else euros} euros"
    praise = r.choice(PRAISE)
    a = "an" if praise[0] in "aeiou" else "a"
    forms = [f"This {praise} {colour} {product} is made of {material}, is {measure} and costs {price}.",
             f"For {price} you get {a} {praise} {product} of {material}, {measure}, in {colour}.",
             f"Made of {material}: our {praise} {product}, {measure}. It comes in {colour} and sells for {price}.",
             f"Our {colour} {product} is {measure}. Pure {material}, {praise}, and yours for {price}.",
             f"At {price}, the {praise} {product} in {colour} {material} is {measure}.",
             f"Looking for a {product}? Take the {praise} {colour} one, {measure}, all {material}, now {price}."]
    return f"{product}/{material}/{colour}", r.choice(forms), f"{material.upper()} {product.upper()} | {colour} | {size} {short} | EUR {euros}.{cents:02}"


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("dates", "a date in words -> ISO", "ISO date", 16, make_date),
        Task("records", "an order in a sentence -> a JSON record", "JSON record", 56, make_record),
        Task("style", "a product description -> the house style", "House style", 48, make_line),
    )
}


def split_of(about: str) -> str:
    """The side of a combination, the same in every run."""
    return SPLITS[int.from_bytes(hashlib.sha256(about.encode()).digest()[:4], "big") % HELD_OUT_PART == 0]


def generate(task: str | Task, split: str, rows: int, seed: int = 0) -> list[Row]:
    """`rows` different chats of a task, a pure function of the arguments; no combination stands on both sides of the split, whatever the seeds.

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
