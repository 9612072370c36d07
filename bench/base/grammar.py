"""Generated sentences of technical English in several grammatical forms, and the changes from one form into another."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

AGENTS = ["parser", "function", "module", "handler", "loader", "server", "client", "thread", "process", "iterator", "decoder", "method", "test", "user", "program", "compiler", "interpreter", "caller", "worker", "editor", "script", "writer", "reader", "scanner", "manager"]
THINGS = ["file", "value", "list", "string", "buffer", "socket", "argument", "exception", "warning", "package", "cache", "queue", "lock", "timer", "stream", "record", "message", "header", "token", "table", "index", "path", "directory", "encoding", "result", "object", "class", "name", "line", "key", "field", "attribute", "option", "setting", "pattern", "frame", "symbol", "request", "reply", "block", "page", "report"]
QUALITIES = ["new", "old", "empty", "first", "last", "current", "local", "global", "optional", "missing", "default", "large", "small", "nested", "open", "closed", "unknown", "valid", "temporary", "hidden", "public"]
# base, third person, past, participle
VERBS = [v.split("/") for v in ["read/reads/read/read", "write/writes/wrote/written", "open/opens/opened/opened", "close/closes/closed/closed", "return/returns/returned/returned", "create/creates/created/created", "delete/deletes/deleted/deleted", "check/checks/checked/checked", "copy/copies/copied/copied", "send/sends/sent/sent", "receive/receives/received/received", "store/stores/stored/stored", "load/loads/loaded/loaded", "update/updates/updated/updated", "replace/replaces/replaced/replaced", "accept/accepts/accepted/accepted", "ignore/ignores/ignored/ignored", "count/counts/counted/counted", "print/prints/printed/printed", "find/finds/found/found", "skip/skips/skipped/skipped", "remove/removes/removed/removed", "hold/holds/held/held", "release/releases/released/released", "keep/keeps/kept/kept", "build/builds/built/built", "lose/loses/lost/lost", "choose/chooses/chose/chosen", "change/changes/changed/changed", "use/uses/used/used", "need/needs/needed/needed", "hide/hides/hid/hidden", "save/saves/saved/saved"]]
PLACES = ["", "", "", "in the current directory", "by default", "at the end", "before the test", "after the call", "without an error", "from the cache", "in memory",
          "at the same time", "for every request", "on the first line", "with a lock", "during the import", "in a separate thread", "as soon as possible"]
CONDITIONS = ["the cache is empty", "the name is unknown", "the file does not exist", "no argument is given", "the lock is held", "the connection fails",
              "the timer runs out", "the list has more than one item", "the option is set", "an error occurs", "the user agrees", "both paths are equal",
              "the value is not a number", "the buffer is full"]


def plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


@dataclass(frozen=True)
class Phrase:
    """A noun with its article and its adjective."""

    noun: str
    quality: str = ""
    many: bool = False
    definite: bool = True

    def __str__(self) -> str:
        words = f"{self.quality} " * bool(self.quality) + (plural(self.noun) if self.many else self.noun)
        if self.definite:
            return "the " + words
        return words if self.many else ("an " if words[0] in "aeiou" and not words.startswith("use") else "a ") + words


@dataclass(frozen=True)
class Sentence:
    """Who does what to what; `str` writes it out."""

    subject: Phrase
    verb: list[str]
    thing: Phrase
    place: str = ""
    condition: str = ""
    tense: str = "present"  # or "past", "future", "must", "can"
    negative: bool = False
    passive: bool = False
    question: bool = False

    def __str__(self) -> str:
        first = self.thing if self.passive else self.subject
        base, third, past, participle = self.verb
        before, after = self.parts(first.many, base, third, past, participle)
        tail = (f" by {self.subject}" if self.passive else f" {self.thing}") + (f" {self.place}" if self.place else "")
        text = f"{before} {first} {after}{tail}" if self.question else f"{first} {before} {after}{tail}"
        text = " ".join(text.split()).replace("can not", "cannot")
        if self.condition:
            text = f"if {self.condition}, {text}"
        return text[0].upper() + text[1:] + ("?" if self.question else ".")

    def parts(self, many: bool, base: str, third: str, past: str, participle: str) -> tuple[str, str]:
        """The auxiliary, and the rest of the verb."""
        no = "not " if self.negative else ""
        modal = {"future": "will", "must": "must", "can": "can"}.get(self.tense)
        if self.passive:
            be = ("are" if many else "is") if self.tense == "present" else "were" if many else "was"
            return (modal, f"{no}be {participle}") if modal else (be, no + participle)
        if modal:
            return modal, no + base
        if self.negative or self.question:
            return ("did" if self.tense == "past" else "do" if many else "does"), no + base
        return "", past if self.tense == "past" else base if many else third


def draw(r: random.Random) -> Sentence:
    def phrase(nouns: list[str]) -> Phrase:
        return Phrase(r.choice(nouns), r.choice(QUALITIES) if r.random() < 0.35 else "", r.random() < 0.35, r.random() < 0.65)

    return Sentence(phrase(AGENTS), r.choice(VERBS), phrase(THINGS), r.choice(PLACES), r.choice(CONDITIONS) if r.random() < 0.2 else "",
                    r.choice(("present", "present", "present", "past", "future", "must", "can")), r.random() < 0.2, r.random() < 0.15)


CHANGES: list[tuple[list[str], dict[str, object], dict[str, object]]] = [
    (["Make the sentence negative", "Negate", "Say the opposite with not"], {"negative": False}, {"negative": True}),
    (["Remove the negation", "Make it positive"], {"negative": True}, {"negative": False}),
    (["Put into the past tense", "Past tense"], {"tense": "present"}, {"tense": "past"}),
    (["Put into the present tense", "Present tense"], {"tense": "past"}, {"tense": "present"}),
    (["Put into the future", "Future tense"], {"tense": "present"}, {"tense": "future"}),
    (["Use must", "Say that it has to happen"], {"tense": "present"}, {"tense": "must"}),
    (["Use can", "Say that it is possible"], {"tense": "present"}, {"tense": "can"}),
    (["Put into the passive", "Passive voice"], {"passive": False}, {"passive": True}),
    (["Put into the active voice", "Active voice"], {"passive": True}, {"passive": False}),
    (["Turn into a question", "Ask whether it is so"], {"negative": False, "condition": ""}, {"question": True}),
    (["Turn the question into a statement", "State it"], {"negative": False, "condition": "", "question": True}, {"question": False}),
]


def change(r: random.Random) -> tuple[list[str], Callable[[], tuple[str, str]]]:
    """A change of form: its wordings, and a source of (sentence, changed sentence)."""
    kind = r.randrange(len(CHANGES) + 5)

    def form() -> tuple[str, str]:
        _, before, after = CHANGES[kind]
        s = replace(draw(r), **before)
        return str(s), str(replace(s, **after))

    def number() -> tuple[str, str]:
        s = draw(r)
        one, several = (replace(s, subject=replace(s.subject, many=m)) for m in (False, True))
        return str(one), str(several)

    def condition() -> tuple[str, str]:
        s = replace(draw(r), condition=r.choice(CONDITIONS))
        text = str(replace(s, condition=""))
        return f"{text} Condition: {s.condition}", str(s)

    def asked(what: str) -> tuple[str, str]:
        s = replace(draw(r), passive=False)
        return str(s), str(s.subject if what == "who" else s.thing if what == "what" else s.verb[0])

    if kind < len(CHANGES):
        return CHANGES[kind][0], form
    if kind == len(CHANGES):
        return ["Make the subject plural", "More than one of them does it"], number
    if kind == len(CHANGES) + 1:
        return ["Join the sentence and its condition", "Begin with the condition"], condition
    what = ("who", "what", "verb")[kind - len(CHANGES) - 2]
    wordings = {"who": ["Subject of the sentence", "Who or what does it?"], "what": ["Object of the sentence", "What is it done to?"], "verb": ["Base form of the verb", "Which verb?"]}
    return wordings[what], lambda: asked(what)
