"""From rows to token ids, and which of them bear loss.

The answers of a chat are found in one of two ways. A chat template that marks them with {% generation %} says so itself. For any other
the conversation is rendered up to each answer (with the generation prompt) and up to its end, and each of these must be, token for
token, the beginning of the next: what lies between is the answer. So the tokens before an answer in training are those that generation
starts from. The token that ends a turn is part of the answer: a model that never learns it never stops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from weft.core import WeftError
from weft.data.config import DataConfig
from weft.data.formats import Row
from weft.data.problems import Problems, shorten

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
DOCUMENT = 2048  # tokens of a piece of a plain-text document at most when no max_length is given


@dataclass(frozen=True, slots=True)
class Example:
    """ids: (T,) int32.  bears: (T,) bool; token t is learned, from the tokens before it.  row: index of the row it was made from."""

    ids: np.ndarray
    bears: np.ndarray
    row: int = -1

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Encodes rows with one tokenizer and one DataConfig."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.chat_template = _template(tokenizer)
        self.chat = config.template == "chat" or (config.template == "auto" and self.chat_template is not None)
        if config.template == "chat" and self.chat_template is None:
            raise WeftError("data.template is 'chat', but the tokenizer has no chat template; use 'auto' or 'plain'")
        self.marked = self.chat and getattr(tokenizer, "is_fast", False) and bool(GENERATION.search(self.chat_template or ""))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._begin: list[int] | None = None
        self.problems = Problems()

    def __call__(self, rows: Sequence[Row]) -> list[tuple[list[int], list[bool]] | None]:
        """Ids and mask of each row, before anything is cut; None where there is nothing to learn. Problems go to `self.problems`."""
        out: list[tuple[list[int], list[bool]] | None] = [None] * len(rows)
        for way, wants in ((self._texts, _is_text), (self._plain, self._is_plain), (self._chats, self._is_chat)):
            chosen = [i for i, row in enumerate(rows) if wants(row) and not _empty(row)]
            if chosen:
                for i, made in zip(chosen, way([rows[i] for i in chosen]), strict=True):
                    out[i] = made
        return out

    def prompt(self, row: Row) -> list[int]:
        """The ids that generation of a row's last answer starts from. Raises WeftError for a row without an answer."""
        last = _answers(row)
        if not last:
            raise WeftError(f"{row.where}: the row has no answer to be generated")
        if self._is_plain(row):
            return self._prefix() + self._ids([self._question(row)])[0]
        return self._ids([self._render(row, last[-1], prompt=True)])[0]

    # ------------------------------------------------------------------------------------------------- three ways

    def _is_plain(self, row: Row) -> bool:
        return row.text is None and not self.chat

    def _is_chat(self, row: Row) -> bool:
        return row.text is None and self.chat

    def _texts(self, rows: list[Row]) -> list[tuple[list[int], list[bool]]]:
        ids = [self._prefix() + ids + self.eos for ids in self._ids([row.text or "" for row in rows])]
        return [(i, [True] * len(i)) for i in ids]

    def _plain(self, rows: list[Row]) -> list[tuple[list[int], list[bool]] | None]:
        for row in rows:
            if row.format in ("messages", "sharegpt"):
                raise WeftError(
                    f"{row.where}: the row is a chat, but "
                    + ("data.template is 'plain'" if self.chat_template is not None else "the tokenizer has no chat template")
                    + ". Use a base with a chat template, set tokenizer.chat_template, or write rows as prompt + completion"
                )
        questions = self._ids([self._question(row) for row in rows])
        answers = self._ids([row.messages[-1]["content"] for row in rows])
        out: list[tuple[list[int], list[bool]] | None] = []
        for question, answer in zip(questions, answers, strict=True):
            head, tail = self._prefix() + question, answer + self.eos
            out.append((head + tail, [self.config.loss_on == "all"] * len(head) + [True] * len(tail)))
        return out

    def _question(self, row: Row) -> str:
        """A prompt without a chat template: as it was written; alpaca under headings."""
        *system, user = (message["content"] for message in row.messages[:-1])
        if row.format == "alpaca":
            return "".join(f"{text}\n\n" for text in system) + f"### Instruction:\n{user}\n\n### Response:\n"
        return "".join((*system, user))

    def _chats(self, rows: list[Row]) -> list[tuple[list[int], list[bool]] | None]:
        if self.marked:
            return [self._by_marks(row) for row in rows]
        return self._by_prefixes(rows)

    # -------------------------------------------------------------------------------------------------- chat masks

    def _by_marks(self, row: Row) -> tuple[list[int], list[bool]] | None:
        made = self._render(
            row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )  # fmt: skip
        if made is None:
            return None
        ids, marks = list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]
        if not any(marks) and self.config.loss_on != "all":
            what = f"{row.where}: the chat template's {{% generation %}} marks no token of the row's answers"
            self.problems.add("rows without a marked answer", what)
            return None
        spans = [(m.start(), m.end()) for m in re.finditer("1+", "".join("01"[m] for m in marks))]
        return self._with_loss(ids, [(a, self._end_of_mark(ids, b, made["offset_mapping"])) for a, b in spans])

    def _end_of_mark(self, ids: list[int], end: int, offsets: list[tuple[int, int]]) -> int:
        # transformers marks up to the first token of the last character; of a character of several bytes, others may follow.
        while end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
            end += 1
        # Some templates close the mark before the token that ends the turn.
        return end + 1 if end < len(ids) and ids[end - 1] not in self.special and ids[end] in self.special else end

    def _by_prefixes(self, rows: list[Row]) -> list[tuple[list[int], list[bool]] | None]:
        texts: list[str] = []
        plans: list[list[int] | None] = []  # of each row: the indices of its answers; None if it could not be rendered
        for row in rows:
            answers = {"answer": _answers(row), "last": _answers(row)[-1:], "all": []}[self.config.loss_on]
            parts = [self._render(row)]
            for i in answers:
                parts.append(self._render(row, i, prompt=True))
                parts.append(parts[0] if i == len(row.messages) - 1 else self._render(row, i + 1))
            good = None not in parts
            plans.append(answers if good else None)
            if good:
                texts.extend(parts)
        tokens = iter(self._ids(texts))
        out: list[tuple[list[int], list[bool]] | None] = []
        for row, answers in zip(rows, plans, strict=True):
            if answers is None:
                out.append(None)
                continue
            ids = next(tokens)
            spans = [(next(tokens), next(tokens)) for _ in answers]
            parts = [(i, part) for i, pair in zip(answers, spans, strict=True) for part in pair]
            good = all(self._begins(row, part, ids, i) for i, part in parts)
            out.append(self._with_loss(ids, [self._turn(ids, len(a), len(b)) for a, b in spans]) if good else None)
        return out

    def _begins(self, row: Row, part: list[int], ids: list[int], answer: int) -> bool:
        if ids[: len(part)] == part:
            return True
        at = next((i for i, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))
        decode = self.tokenizer.decode
        what = (
            f"{row.where}: message {answer}: the conversation up to this answer is not how the whole one begins: token {at} is "
            f"{shorten(repr(decode(part[at : at + 4])), 30)} there and {shorten(repr(decode(ids[at : at + 4])), 30)} in the whole. "
        )
        if at >= len(part) - 2:
            what += "The answer's first characters merge with the prompt's last token: strip white space at its beginning"
        else:
            what += "The template writes earlier turns differently: use one with {% generation %}, or set data.loss_on to 'last' or 'all'"
        self.problems.add("rows whose answers cannot be found", what)
        return False

    def _turn(self, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """An answer ends with the token that ends the turn; white space that the template writes after it is nobody's answer."""
        for i in range(end - 1, max(start, end - 4) - 1, -1):
            if ids[i] in self.special:
                return start, i + 1
            if self.tokenizer.decode([ids[i]]).strip():
                break
        return start, end

    def _with_loss(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        if self.config.loss_on == "last":
            spans = spans[-1:]
        bears = [False] * len(ids)
        for start, end in spans:
            bears[start:end] = [True] * (end - start)
        if spans and spans[-1][1] == len(ids) and ids[-1] not in self.special:  # a template that ends its turns with no token of its own
            ids, bears = ids + self.eos, bears + [True] * len(self.eos)
        return ids, [True] * len(ids) if self.config.loss_on == "all" else bears

    # ------------------------------------------------------------------------------------------------- the tokenizer

    def _render(self, row: Row, count: int | None = None, prompt: bool = False, tokenize: bool = False, **kwargs: Any) -> Any:
        """The first `count` messages through the chat template; None, and a problem, if the template refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                list(row.messages[:count]), tools=row.tools, add_generation_prompt=prompt, tokenize=tokenize, **kwargs
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            self.problems.add("rows that the chat template refuses", f"{row.where}: the chat template says: {shorten(str(error), 160)}")
            return None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text by itself (a beginning-of-text token, or nothing)."""
        if self._begin is None:
            bare, full = self.tokenizer("a", add_special_tokens=False)["input_ids"], self.tokenizer("a")["input_ids"]
            at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
            self._begin = list(full[:at])
        return self._begin


def _template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several the default one."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _is_text(row: Row) -> bool:
    return row.text is not None


def _answers(row: Row) -> list[int]:
    return [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]


def _empty(row: Row) -> bool:
    """Nothing to learn: an empty text, or no answer with a word in it (a call of a tool is a word)."""
    if row.text is not None:
        return not row.text.strip()
    return not any(row.messages[i]["content"].strip() or row.messages[i].get("tool_calls") for i in _answers(row))


def cut(ids: list[int], bears: list[bool], limit: int | None, row: int) -> Example | None:
    """An Example of at most `limit` tokens, cut off at the right, without the tail that nobody learns. None: no answer is left."""
    bears = [False, *bears[1:limit]]  # nothing predicts the first token
    while bears and not bears[-1]:
        bears.pop()
    if not bears:
        return None
    return Example(np.asarray(ids[: len(bears)], dtype=np.int32), np.asarray(bears, dtype=bool), row)
