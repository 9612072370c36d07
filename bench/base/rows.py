"""Rows of training text made of the transformations in `skills.py` and `grammar.py`: chats of one to three turns, and examples to follow."""

from __future__ import annotations

from bank import Bank
from skills import skill

SYSTEMS = ["Answer with the result only.", "You change texts as you are told.", "You are a careful assistant.", "Do what the user asks, without comment."]
Message = dict[str, str]


def conversation(b: Bank) -> list[Message]:
    """One row of training text: a chat of one to three turns, or examples to follow. Never plain text: a base that is given the start of a sentence is to
    go on with prose, not with exercises."""
    r = b.rng
    form = r.random()
    if form < 0.12:
        return examples(b)
    messages: list[Message] = []
    s = skill(b)
    if form < 0.44:  # the system says what to do, the user only gives texts
        messages.append({"role": "system", "content": r.choice(s.wordings) + r.choice(("", ".", " of what the user writes."))})
        for _ in range(r.choice((1, 1, 2, 3))):
            text, answer = s.sample()
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return messages
    if form < 0.52:
        messages.append({"role": "system", "content": r.choice(SYSTEMS)})
    for turn in range(r.choice((1, 1, 1, 2))):
        s = s if turn == 0 else skill(b)
        text, answer = s.sample()
        w = r.choice(s.wordings)
        ask = r.choice((f"{w}: {text}", f"{w}: {text}", f"{w}:\n{text}", f"{w}\n{text}", f"{text}\n{w}", f"{w[0].lower()}{w[1:]}: {text}"))
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return messages


def examples(b: Bank) -> list[Message]:
    """The same transformation shown two to four times without being named, then once more: to be read off the examples."""
    r = b.rng
    s = skill(b)
    shown = [s.sample() for _ in range(r.randint(3, 5))]
    if r.random() < 0.6:
        before = "\n".join(f"{text} -> {answer}" for text, answer in shown[:-1])
        return [{"role": "user", "content": f"{before}\n{shown[-1][0]} ->"}, {"role": "assistant", "content": shown[-1][1]}]
    return [m for text, answer in shown for m in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})]
