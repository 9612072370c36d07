"""What the generated transformations draw their inputs from: words and sentences of one side of the corpus, and lists of names."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from lexicon import ADJECTIVES, COLOURS, NAMES, NOUNS, PLACES, SYLLABLES, VERBS, cased, number_words, plural


@dataclass
class Bank:
    """The words and the sentences are those of one side of the corpus."""

    rng: random.Random
    words: list[str]
    sentences: list[str]

    def pseudo(self) -> str:
        return "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.randint(2, 3)))

    def word(self) -> str:
        r = self.rng.random()
        if r < 0.5:
            return self.rng.choice(self.words)
        pool = NOUNS if r < 0.68 else ADJECTIVES if r < 0.76 else NAMES if r < 0.86 else PLACES if r < 0.92 else None
        if pool is not None:
            return self.rng.choice(pool)
        return self.pseudo() if r < 0.97 else cased(self.rng, self.pseudo())

    def distinct(self, low: int, high: int) -> list[str]:
        want, out = self.rng.randint(low, high), []
        while len(out) < want:
            w = self.word()
            if w not in out:
                out.append(w)
        return out

    def text(self) -> str:
        r = self.rng.random()
        if r < 0.35:
            return self.rng.choice(self.sentences)
        return " ".join(self.distinct(2, 7)) if r < 0.85 else self.story()[0]

    def number(self) -> int:
        return self.rng.randint(0, 10 ** self.rng.randint(1, 4))

    def value(self) -> str | int | float:
        r = self.rng.random()
        if r < 0.3:
            return self.number()
        if r < 0.38:
            return self.rng.randint(1, 9999) / 100
        return self.word() if r < 0.75 else " ".join(self.distinct(2, 3))

    def pairs(self) -> dict[str, str | int | float]:
        return {k: self.value() for k in self.distinct(2, 4)}

    def story(self) -> tuple[str, dict[str, str]]:
        """A plain sentence and what stands in it, by role."""
        r = self.rng
        n, unit = r.randint(2, 60), r.choice(NOUNS)
        got = {"person": r.choice(NAMES) if r.random() < 0.7 else cased(r, self.pseudo()), "place": r.choice(PLACES), "thing": r.choice(NOUNS),
               "colour": r.choice(COLOURS), "number": str(n) if r.random() < 0.6 else number_words(n), "verb": r.choice(VERBS), "quality": r.choice(ADJECTIVES)}
        p, q, t, c, k, v, a = (got[x] for x in ("person", "place", "thing", "colour", "number", "verb", "quality"))
        forms = [
            ("{p} {v} the {c} {t} in {q}.", "person verb colour thing place"), ("In {q}, {p} {v} {k} {ts}.", "place person verb number"),
            ("The {a} {t} from {q} was {v} by {p}.", "quality thing place verb person"), ("{p} from {q} has {k} {c} {us}.", "person place number colour"),
            ("There are {k} {ts} and a {c} {u} in {q}.", "number colour place"), ("Yesterday {p} {v} a {a}, {c} {t}.", "person verb quality colour thing"),
            ("Nobody in {q} knows why {p} {v} the {t}.", "place person verb thing"), ("Please send {k} {c} {ts} to {p} in {q}.", "number colour person place"),
            ("{p} said that the {t} is {a} and that it weighs {k} kilograms.", "person thing quality number"),
            ("After {k} hours, the {a} {t} reached {q}.", "number quality thing place"), ("We sold the {t} to {p}, who lives in {q}.", "thing person place"),
            ("The {c} one belongs to {p}; the other {k} are in {q}.", "colour person number place"),
        ]
        form, roles = r.choice(forms)
        text = form.format(p=p, q=q, t=t, ts=plural(t), c=c, k=k, v=v, a=a, u=unit, us=plural(unit))
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text), {x: got[x] for x in roles.split()}
