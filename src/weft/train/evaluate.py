"""What a model knows: mean loss per target token, and exact match by generation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import WeftError
from weft.data import Batch, DataConfig, Example, Row, question
from weft.models import ends, room
from weft.step import loss_sum


@dataclass(frozen=True)
class Match:
    """The share of answers that equal their reference, and for every row the prompt's last message, the reference and the answer."""

    share: float
    answers: list[tuple[str, str, str]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout) and without gradients, and afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_lengths(
    model: nn.Module, examples: Sequence[Example], rows: Sequence[Row], tokens: int, limit: str = "data.max_length",
    budget: str = "train.tokens",
) -> str | None:  # fmt: skip
    """What the user should know of rows that are longer than the model was made for; None if none is.

    limit, budget: what the user calls the longest row and the tokens of a batch.
    Raises WeftError for rows that are longer than a batch of `tokens`, or that the model has no places for.
    """
    longest, places = max(examples, key=len), room(model)
    where = f"{rows[longest.row].where} has {len(longest):,} tokens"
    if len(longest) > places and (ends(model) or len(longest) <= tokens):
        n = sum(len(e) > places for e in examples)
        many = f"{n:,} row{' is' if n == 1 else 's are'} longer than the {places:,} tokens that this model"
        advice = f"{limit} {places} cuts rows off there"
        if ends(model):
            raise WeftError(f"{many} has places for: {where}. {advice}")
        return f"{many} was made for: {where}. {advice}"
    if len(longest) > tokens:
        n = sum(len(e) > tokens for e in examples)
        many = f"{n:,} row{' is' if n == 1 else 's are'} longer than a batch, which holds {tokens:,} tokens"
        raise WeftError(f"{many}: {where}. {limit} {min(tokens, places)} cuts rows off there; {budget} says what a batch holds")
    return None


def mean_loss(model: nn.Module, batches: Iterable[Batch], between: Callable[[], None] = lambda: None) -> float:
    """Cross-entropy in nats, the mean over all target tokens of all batches. `between` is called after each batch."""
    device = next(model.parameters()).device
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for batch in batches:
            total += loss_sum(model, batch.to(device)).double()
            targets += batch.n_targets
            between()
    if not targets:
        raise WeftError("there is nothing to evaluate: no token of the evaluation data bears loss")
    return float(total) / targets


def exact_match(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int = 128, batch: int = 32,
    between: Callable[[], None] = lambda: None, config: DataConfig | None = None,
) -> Match:  # fmt: skip
    """Let the model write each row's last answer, and compare it with the row's own, outer space and Unicode form aside.

    `config` is the one the model was trained with: it says how a row becomes a prompt. `between` is called after each batch.
    Raises WeftError when no row has an answer.
    """
    asked = [r for r in rows if any(m["role"] == "assistant" for m in r.messages)]
    if not asked:
        raise WeftError("exact match needs rows with an answer (messages, or prompt and completion); there is none")
    prompts, references = zip(*(question(r, tokenizer, config or DataConfig(train="")) for r in asked), strict=True)
    given = generate(model, tokenizer, prompts, max_new_tokens, batch, between)
    right = sum(same(a, b) for a, b in zip(given, references, strict=True))
    asking = [next((m["content"] for m in reversed(r.messages) if m["role"] == "user"), "") for r in asked]
    return Match(right / len(asked), list(zip(asking, references, given, strict=True)))


def same(answer: str, reference: str) -> bool:
    return unicodedata.normalize("NFC", answer.strip()) == unicodedata.normalize("NFC", reference.strip())


def answers(model: Any, tokenizer: Any, chats: Sequence[Sequence[dict[str, str]]], max_new_tokens: int = 128, batch: int = 32) -> list[str]:
    """The model's greedy answer to each chat (a list of messages, the last one the user's), in the order given."""
    return generate(model, tokenizer, [prompt_ids(tokenizer, chat) for chat in chats], max_new_tokens, batch)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128, batch: int = 32,
    between: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """What the model writes after each prompt (token ids), greedily, in the order given.

    Prompts of like length go together, padded on the left; an answer ends at the tokenizer's end of turn.
    """
    stop = end_of_turn(tokenizer, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            ids, mask = left_padded([prompts[i] for i in some], pad)
            left = room(model) - ids.shape[1] if ends(model) else max_new_tokens
            made = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max(1, min(max_new_tokens, left)), do_sample=False,
                temperature=None, top_p=None, top_k=None, eos_token_id=stop, pad_token_id=pad,
            )[:, ids.shape[1] :]  # fmt: skip
            for i, row in zip(some, made.tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in stop), len(row))
                out[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
            between()
    return out


def prompt_ids(tokenizer: Any, chat: Sequence[dict[str, str]]) -> list[int]:
    """The token ids of a chat, up to where the assistant begins."""
    text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_of_turn(tokenizer: Any, model: Any = None) -> list[int]:
    """The tokens that end an answer: the end of text, and what the chat template puts behind the assistant's words."""
    found = [tokenizer.eos_token_id]
    if model is not None and getattr(model, "generation_config", None) is not None:
        eos = model.generation_config.eos_token_id
        found += eos if isinstance(eos, list) else [eos]
    if tokenizer.chat_template:
        mark = "weftweft"
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
        behind = tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        found += [t for t in behind[:1] if t in special]
    found = list(dict.fromkeys(int(t) for t in found if t is not None))
    if not found:
        raise WeftError("the tokenizer has no end-of-text token and its chat template ends a turn with none, so no answer would ever end")
    return found


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each (n, longest) int64, the rows flush right."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
