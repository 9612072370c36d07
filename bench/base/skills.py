"""Generated text transformations of general kinds: the raw skills of the embedded base (copying, reordering, case, numbers and words, names of
months, key/value layouts, JSON syntax, picking a word out of a sentence, filling a template), in several wordings, as chat and as plain text.

None of them is a task of the demo (`weft.data.demo`): there is no full date, no sentence turned into a record, no product line. Everything is a pure
function of the seed and of the sentences that are handed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import grammar
from bank import Bank
from lexicon import (
    ABBREVIATIONS,
    MONTH_DAYS,
    MONTHS,
    NOUNS,
    OPPOSITES,
    WEEKDAYS,
    number_words,
    ordinal_digits,
    ordinal_words,
    plural,
    year_words,
)

Sample = Callable[[], tuple[str, str]]


@dataclass(frozen=True)
class Skill:
    """One transformation: wordings of the instruction, and a source of (input, output) pairs."""

    wordings: list[str]
    sample: Sample


def camel(words: list[str]) -> str:
    return words[0].lower() + "".join(w.capitalize() for w in words[1:])


JOINS = {"commas": ", ", "hyphens": "-", "underscores": "_", "semicolons": "; ", "slashes": "/", "plus signs": " + ", "colons": ":", "arrows": " -> ", "dots": "."}
# What to do with a text, taken as a list of words.
WORD_FUNCTIONS: list[tuple[list[str], Callable[[list[str]], str]]] = [
    (["Repeat the text", "Copy this exactly", "Say this again", "Echo"], " ".join),
    (["Write in upper case", "Upper case", "Make all letters capital", "Put this in capitals"], lambda w: " ".join(w).upper()),
    (["Write in lower case", "Lower case", "Make all letters small"], lambda w: " ".join(w).lower()),
    (["Capitalise every word", "Write in title case", "Start each word with a capital letter"], lambda w: " ".join(x[:1].upper() + x[1:] for x in w)),
    (["Reverse the order of the words", "Write the words backwards", "Last word first"], lambda w: " ".join(w[::-1])),
    (["Give the first word", "What is the first word?", "First word"], lambda w: w[0]),
    (["Give the last word", "What is the last word?", "Last word"], lambda w: w[-1]),
    (["Sort the words", "Put the words in alphabetical order"], lambda w: " ".join(sorted(w, key=str.lower))),
    (["How many words are there?", "Count the words"], lambda w: str(len(w))),
    (["Leave out the first word", "Drop the first word"], lambda w: " ".join(w[1:])),
    (["Leave out the last word", "Drop the last word"], lambda w: " ".join(w[:-1])),
    (["Put the text in quotes", "Quote this"], lambda w: '"' + " ".join(w) + '"'),
    (["Put each word in quotes", "Quote every word"], lambda w: " ".join(f'"{x}"' for x in w)),
    (["One word per line", "Write each word on its own line"], "\n".join),
    (["Number the words", "Make a numbered list"], lambda w: "\n".join(f"{i}. {x}" for i, x in enumerate(w, 1))),
    (["Make a list with dashes", "Write as bullet points"], lambda w: "\n".join(f"- {x}" for x in w)),
    (["Write as a Python list", "Python list of the words"], lambda w: repr(w)),
    (["Write as a JSON array", "JSON list of the words"], lambda w: json.dumps(w)),
    (["Write in snake case", "snake_case"], lambda w: "_".join(w).lower()),
    (["Write in camel case", "camelCase"], camel),
    (["First letters only", "Make an acronym"], lambda w: "".join(x[0].upper() for x in w)),
    (["Write the text twice", "Say it two times"], lambda w: " ".join(w + w)),
    (["Swap the first and the last word"], lambda w: " ".join([w[-1], *w[1:-1], w[0]]) if len(w) > 1 else w[0]),
    (["Which word is the longest?", "Longest word"], lambda w: max(w, key=len)),
    (["Write the first word in capitals"], lambda w: " ".join([w[0].upper(), *w[1:]])),
    (["Write the last word in capitals"], lambda w: " ".join([*w[:-1], w[-1].upper()])),
    (["Put the text in brackets", "Add round brackets"], lambda w: "(" + " ".join(w) + ")"),
    (["Remove the spaces", "Write as one word"], "".join),
] + [([f"Join the words with {name}", f"Put {name} between the words", f"Separate with {name}"], mark.join) for name, mark in JOINS.items()]


def on_words(b: Bank) -> Skill:
    wordings, f = b.rng.choice(WORD_FUNCTIONS)

    def sample() -> tuple[str, str]:
        words = b.distinct(2, 6) if b.rng.random() < 0.7 else b.text().split()[:10]
        return " ".join(words), f(words)

    return Skill(wordings, sample)


def on_lists(b: Bank) -> Skill:
    """From one layout of a list to another, or one item of it."""
    (a, mark), (c, other) = b.rng.sample(list(JOINS.items()), 2)
    n = b.rng.randint(1, 4)

    def items() -> list[str]:
        return [w if b.rng.random() < 0.7 else " ".join(b.distinct(2, 2)) for w in b.distinct(4, 6)]

    def pick() -> tuple[str, str]:
        got = items()
        return mark.join(got), got[n - 1]

    def change() -> tuple[str, str]:
        got = items()
        return mark.join(got), other.join(got)

    return b.rng.choice([Skill([f"Give item {n}", f"What is the {ordinal_words(n)} item?", f"Item number {n}"], pick),
                         Skill([f"Change the {a} to {c}", f"Replace {a} by {c}"], change)])


def on_a_word(b: Bank) -> Skill:
    """Edits that name a word of the text: replace, delete, insert after, capitalise."""
    kind = b.rng.randrange(4)

    def sample() -> tuple[str, str]:
        words = b.text().split()[:9]
        w, new = b.rng.choice(words), b.word()
        if kind == 0:
            return f'replace "{w}" by "{new}": ' + " ".join(words), " ".join(new if x == w else x for x in words)
        if kind == 1:
            return f'leave out "{w}": ' + " ".join(words), " ".join(x for x in words if x != w)
        if kind == 2:
            return f'after "{w}" put "{new}": ' + " ".join(words), " ".join(f"{x} {new}" if x == w else x for x in words)
        return f'"{w}" in capitals: ' + " ".join(words), " ".join(x.upper() if x == w else x for x in words)

    return Skill(["Edit the text", "Change the text", "Edit"], sample)


def on_letters(b: Bank) -> Skill:
    def spell() -> tuple[str, str]:
        w = b.word()
        return w, "-".join(w)

    def back() -> tuple[str, str]:
        w = b.word()[:7]
        return w, w[::-1]

    def join() -> tuple[str, str]:
        w = b.word()
        return " ".join(w), w

    def start() -> tuple[str, str]:
        w = b.word()
        return w, w[0]

    return b.rng.choice([Skill(["Spell the word", "Letter by letter"], spell), Skill(["Write the word backwards", "Reverse the letters"], back),
                         Skill(["Join the letters", "Which word is spelled here?"], join), Skill(["First letter"], start)])


def on_numbers(b: Bank) -> Skill:
    r = b.rng

    def pair(f: Callable[[int], str], g: Callable[[int], str], low: int, high: int) -> Sample:
        def sample() -> tuple[str, str]:
            n = r.randint(low, high if r.random() < 0.5 else min(high, low + 60))
            return f(n), g(n)

        return sample

    def several() -> tuple[str, str]:
        n = [r.randint(0, 99) for _ in range(r.randint(3, 5))]
        return " ".join(map(str, n)), " ".join(map(str, sorted(n)))

    width = r.choice((2, 2, 2, 3, 4))
    return r.choice([
        Skill(["Write the number in digits", "In digits", "Which number is this?"], pair(number_words, str, 0, 9999)),
        Skill(["Write the number in words", "In words", "Spell out the number"], pair(str, number_words, 0, 9999)),
        Skill(["Which position is this, in digits?", "Ordinal to number"], pair(ordinal_words, str, 1, 99)),
        Skill(["Write as an ordinal word", "Number to ordinal"], pair(str, ordinal_words, 1, 99)),
        Skill(["Write the year in digits", "Which year is this?", "Year"], pair(year_words, str, 1100, 2099)),
        Skill(["Read the year aloud", "Say the year in words"], pair(str, year_words, 1100, 2099)),
        Skill([f"Pad with zeros to {width} digits", f"Write with {width} digits"], pair(str, lambda n: str(n).zfill(width), 0, 10**width - 1)),
        Skill([f"Ordinal with {width} digits"], pair(ordinal_words, lambda n: str(n).zfill(width), 1, 99)),
        Skill(["Position in digits", "Only the digits"], pair(ordinal_digits, str, 1, 99)),
        Skill([f"Position with {width} digits"], pair(ordinal_digits, lambda n: str(n).zfill(width), 1, 99)),
        Skill(["Add one", "What comes next?"], pair(str, lambda n: str(n + 1), 0, 9999)),
        Skill(["Subtract one", "What comes before?"], pair(str, lambda n: str(n - 1), 1, 9999)),
        Skill(["Sort the numbers"], several),
        Skill(["Remove the commas", "Write without a separator"], pair(lambda n: f"{n:,}", str, 1000, 99999)),
        Skill(["Write with two decimals", "Two decimal places"], pair(str, lambda n: f"{n}.00", 0, 999)),
        Skill(["Cents to units", "Divide by one hundred"], pair(str, lambda n: f"{n / 100:.2f}", 1, 99999)),
    ])


def on_calendar(b: Bank) -> Skill:
    """Months and weekdays, one at a time: never a whole date."""
    r = b.rng
    names, what = r.choice([(MONTHS, "month"), (MONTHS, "month"), (WEEKDAYS, "day")])

    def pick(f: Callable[[int], str], g: Callable[[int], str]) -> Sample:
        def sample() -> tuple[str, str]:
            i = r.randrange(len(names))
            return f(i), g(i)

        return sample

    full, short = (lambda i: names[i % len(names)]), (lambda i: names[i][:3])
    return r.choice([
        Skill([f"Number of the {what}", f"Which number has this {what}?"], pick(full, lambda i: str(i + 1))),
        Skill([f"Number of the {what} with two digits", f"Two-digit {what} number"], pick(full, lambda i: f"{i + 1:02}")),
        Skill([f"Number of the {what}", f"From the short name to the {what} number"], pick(short, lambda i: str(i + 1))),
        Skill([f"Two-digit {what} number of the short name"], pick(short, lambda i: f"{i + 1:02}")),
        Skill([f"Which {what} has this number?", f"Name of the {what}"], pick(lambda i: str(i + 1), full)),
        Skill([f"Next {what}", f"Which {what} comes after?"], pick(full, lambda i: full(i + 1))),
        Skill([f"Previous {what}", f"Which {what} comes before?"], pick(full, lambda i: full(i - 1))),
        Skill(["How many days has the month?", "Days of the month"], lambda: (m := r.choice(MONTHS), str(MONTH_DAYS[MONTHS.index(m)]))),
        Skill(["Shorten the name", f"Short name of the {what}"], pick(full, short)), Skill(["Full name", f"Write out the {what}"], pick(short, full)),
    ])


def on_pairs(b: Bank) -> Skill:
    """Layouts of keys and values: lines, JSON, INI, Python, query strings; and questions about one key."""
    r = b.rng
    layouts: dict[str, Callable[[dict[str, str | int | float]], str]] = {
        "lines": lambda p: "\n".join(f"{k}: {v}" for k, v in p.items()), "JSON": json.dumps, "a Python dict": repr,
        "INI lines": lambda p: "\n".join(f"{k} = {v}" for k, v in p.items()), "assignments": lambda p: ", ".join(f"{k}={v}" for k, v in p.items()),
        "a sentence": lambda p: "; ".join(f"the {k} is {v}" for k, v in p.items()), "a table row": lambda p: " | ".join(str(v) for v in p.values()),
        "arrows": lambda p: ", ".join(f"{k} -> {v}" for k, v in p.items()), "query string": lambda p: "&".join(f"{k}={v}" for k, v in p.items()),
    }
    source, target = r.sample(list(layouts), 2)
    if source == "a table row":
        source = "lines"
    if r.random() < 0.25:
        target = "JSON"

    def convert() -> tuple[str, str]:
        p = b.pairs()
        return layouts[source](p), layouts[target](p)

    def value() -> tuple[str, str]:
        p = b.pairs()
        k = r.choice(list(p))
        return f"{layouts[source](p)}\nkey: {k}", str(p[k])

    def keys() -> tuple[str, str]:
        p = b.pairs()
        return layouts[source](p), ", ".join(p)

    def drop() -> tuple[str, str]:
        p = b.pairs()
        k = r.choice(list(p))
        return f"{layouts[source](p)}\nwithout {k}", layouts[source]({x: v for x, v in p.items() if x != k})

    convert_skill = Skill([f"Write as {target}", f"Convert to {target}", f"Same data as {target}"], convert)
    return r.choice([convert_skill, convert_skill, convert_skill, Skill(["Value of the key", "Look up"], value), Skill(["List the keys", "Which keys?"], keys),
                     Skill(["Remove one key", "Drop the key"], drop)])


def on_template(b: Bank) -> Skill:
    """Fill a pattern with named values: the pattern is part of the input."""
    r = b.rng
    marks = [" ", " - ", ", ", ": ", " / ", " (", ") ", " for ", " of ", " in ", "; ", " = ", " and ", "\n", " < ", " has ", " near ", ""]

    def sample() -> tuple[str, str]:
        p = b.pairs()
        order = r.sample(list(p), r.randint(2, len(p)))
        seps = [r.choice(marks) for _ in order]
        how = [r.choice(("plain", "plain", "upper", "lower")) for _ in order]
        shape = "".join(s + ("{" + (k if h == "plain" else f"{k} {h}") + "}") for s, k, h in zip(seps, order, how, strict=True)).strip()
        change = {"plain": str, "upper": lambda v: str(v).upper(), "lower": lambda v: str(v).lower()}
        out = "".join(s + change[h](p[k]) for s, k, h in zip(seps, order, how, strict=True)).strip()
        given = r.choice([", ".join(f"{k} = {v}" for k, v in p.items()), "\n".join(f"{k}: {v}" for k, v in p.items()), json.dumps(p)])
        return f"{given}\n{shape}", out

    return Skill(["Fill in the template", "Fill the pattern", "Write with these values"], sample)


QUESTIONS = {
    "person": ["Who is it about?", "Which person is named?", "Name the person", "Who?"], "place": ["Where?", "Which place is named?", "Name of the place"],
    "colour": ["Which colour?", "What colour is named?"], "number": ["Which number is in the text?", "How many?"], "thing": ["Which thing?", "Name the object"],
    "verb": ["What was done?", "Which verb?"], "quality": ["Which adjective?", "What is it like?"],
}


def on_story(b: Bank) -> Skill:
    """One or two parts of a plain sentence, in words: never a record."""
    r = b.rng
    roles = r.sample(list(QUESTIONS), 2 if r.random() < 0.5 else 1)
    joint, how = r.choice([", ", "; ", " / ", " and ", "\n"]), r.choice(["plain", "plain", "upper", "digits"])

    def show(text: str) -> str:
        if how == "digits" and not text.isdigit():
            return next((str(n) for n in range(61) if number_words(n) == text), text)
        return text.upper() if how == "upper" else text

    def sample() -> tuple[str, str]:
        while True:
            sentence, got = b.story()
            if all(role in got for role in roles):
                return sentence, joint.join(show(got[role]) for role in roles)

    end = {"plain": "", "upper": ", in capitals", "digits": ", numbers in digits"}[how]
    if len(roles) == 1:
        return Skill([q + end for q in QUESTIONS[roles[0]]], sample)
    label = {", ": "commas", "; ": "a semicolon", " / ": "a slash", " and ": "and", "\n": "a new line"}[joint]
    return Skill([f"Give {roles[0]} and {roles[1]} with {label}{end}", f"{roles[0].capitalize()}, then {roles[1]}, with {label}{end}"], sample)


def on_small_facts(b: Bank) -> Skill:
    table = b.rng.choice([ABBREVIATIONS, {v: k for k, v in ABBREVIATIONS.items()}, OPPOSITES, {n: plural(n) for n in NOUNS}, {plural(n): n for n in NOUNS}])
    name = {id(ABBREVIATIONS): ["Unit to its abbreviation", "Abbreviate"], id(OPPOSITES): ["Opposite", "What is the opposite?"]}.get(id(table))
    if name is None:
        name = ["Write out the unit"] if "kg" in table else ["Singular", "One of them"] if "chairs" in table else ["Plural", "More than one"]

    def sample() -> tuple[str, str]:
        k = b.rng.choice(list(table))
        n = b.number() if "kg" in table or table is ABBREVIATIONS else None
        return (k, table[k]) if n is None or b.rng.random() < 0.5 else (f"{n} {k}", f"{n} {table[k]}")

    return Skill(name, sample)


def on_sentences(b: Bank) -> Skill:
    """English itself: a missing word, a doubled word, the other half of a sentence."""
    r = b.rng

    def blank() -> tuple[str, str]:
        words = r.choice(b.sentences).split()
        i = r.randrange(1, len(words))
        return " ".join([*words[:i], "___", *words[i + 1:]]), words[i].strip(".,;:")

    def doubled() -> tuple[str, str]:
        words = r.choice(b.sentences).split()
        i = r.randrange(len(words))
        return " ".join([*words[:i], words[i], *words[i:]]), " ".join(words)

    def half() -> tuple[str, str]:
        words = r.choice(b.sentences).split()
        i = r.randrange(2, max(3, len(words) - 1))
        return " ".join(words[:i]), " ".join(words[i:])

    def repair() -> tuple[str, str]:
        s = r.choice(b.sentences)
        return s.lower().strip("."), s

    return r.choice([Skill(["Fill in the missing word", "Which word is missing?"], blank), Skill(["A word stands twice, correct it", "Correct"], doubled),
                     Skill(["Continue the sentence", "Complete"], half), Skill(["Correct the capital letters and the full stop", "Tidy up"], repair)])


def on_grammar(b: Bank) -> Skill:
    """One form of a generated technical sentence into another: tense, number, negation, voice, question."""
    wordings, sample = grammar.change(b.rng)
    return Skill(wordings, sample)


FAMILIES = [(on_words, 5), (on_lists, 2), (on_a_word, 2), (on_letters, 2), (on_numbers, 5), (on_calendar, 3), (on_pairs, 6), (on_template, 5), (on_story, 5),
            (on_small_facts, 2), (on_sentences, 3), (on_grammar, 6)]


def skill(b: Bank) -> Skill:
    return b.rng.choices([f for f, _ in FAMILIES], [w for _, w in FAMILIES])[0](b)
