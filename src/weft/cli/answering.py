"""Answers from a model, as they are written: one chat or several at once, each through the adapter that is named for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers.generation.streamers import BaseStreamer

import weft.adapters
from weft.core import WeftError
from weft.data import DataConfig, Encoder, Row
from weft.models import room
from weft.train.evaluate import end_of_turn, left_padded, prompt_ids

Chat = Sequence[dict[str, str]]
OnText = Callable[[int, str], None]  # (row, what it says next)
UNFINISHED = "\ufffd"  # how a character decodes of which not all bytes are there yet


def _unheard(row: int, text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [] if self.max_tokens > 0 else [f"--max-tokens {self.max_tokens} must be at least 1"]
        wrong += [] if self.temperature >= 0 else [f"--temperature {self.temperature:g} must not be below 0 (0 is greedy)"]
        wrong += [] if 0 < self.top_p <= 1 else [f"--top-p {self.top_p:g} must lie above 0 and be at most 1"]
        if wrong:
            raise WeftError("; ".join(wrong))


class Speaker:
    """A model and its tokenizer, ready to answer. plain: prompts are continued as they are, without the chat template."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, plain: bool = False) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.plain = plain or not tokenizer.chat_template
        self.encoder = Encoder(tokenizer, DataConfig(train="", template="plain"))
        self.stop = end_of_turn(tokenizer, model)
        self.room = room(model)
        if sampling.temperature:
            torch.manual_seed(sampling.seed)

    def ids(self, chat: Chat) -> list[int]:
        """The tokens of a chat up to where the answer begins, as in training."""
        if self.plain:
            return self.encoder.prompt(Row("the prompt", "prompt", (*chat, {"role": "assistant", "content": ""})))
        try:
            return prompt_ids(self.tokenizer, chat)
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            raise WeftError(f"the tokenizer's chat template refuses this conversation: {e}") from e

    def fits(self, chat: Chat) -> bool:
        """Whether the model can still answer this chat with at least a few tokens."""
        return len(self.ids(chat)) + min(self.sampling.max_tokens, 16) <= self.room

    def check(self, *chats: Chat) -> None:
        """Raise WeftError for a chat that leaves no place for an answer, or that has nothing to go on from."""
        lengths = [len(self.ids(chat)) for chat in chats]
        if max(lengths) >= self.room:
            raise WeftError(f"a prompt of {max(lengths):,} tokens does not fit: this model takes {self.room:,}, prompt and answer together")
        if not min(lengths):
            raise WeftError("an empty prompt: there is nothing to go on from")

    def answer(self, chats: Sequence[Chat], names: Sequence[str | None] | None = None, on_text: OnText = _unheard) -> list[str]:
        """The answers to some chats, in one batch.

        Args:
            names: the adapter of each row, None for the bare base; left out: whatever works now on all of them.
            on_text: called with (row, text) as the answers grow.
        Raises:
            WeftError: a prompt is longer than the model's context.
        """
        self.check(*chats)
        prompts, s = [self.ids(chat) for chat in chats], self.sampling
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop[0]
        ids, mask = left_padded(prompts, pad)
        listener = _Listener(self.tokenizer, self.stop, len(chats), on_text)
        sampled = {"do_sample": True, "temperature": s.temperature, "top_p": s.top_p, "top_k": 0} if s.temperature else {
            "do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # fmt: skip
        device = next(self.model.parameters()).device
        with weft.adapters.rows(self.model, names) if names is not None else nullcontext(), torch.inference_mode():
            self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=min(s.max_tokens, self.room - longest),
                eos_token_id=self.stop, pad_token_id=pad, streamer=listener, **sampled,
            )  # fmt: skip
        return listener.said


class _Listener(BaseStreamer):
    """Hears each token of each row as it is chosen, and passes on what has become text for good."""

    def __init__(self, tokenizer: Any, stop: Sequence[int], rows: int, on_text: OnText) -> None:
        self.tokenizer, self.stop, self.on_text = tokenizer, set(stop), on_text
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.said = [""] * rows
        self.open = [True] * rows
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """value: the prompts (rows, T) first, then one token a row (rows,)."""
        if self.prompt:
            self.prompt = False
            return
        for row, token in enumerate(value.reshape(-1).tolist()):
            if self.open[row] and token in self.stop:
                self.open[row] = False
                self._pass_on(row, last=True)
            elif self.open[row]:
                self.tokens[row].append(token)
                self._pass_on(row)

    def end(self) -> None:
        for row, still in enumerate(self.open):
            if still:
                self._pass_on(row, last=True)

    def _pass_on(self, row: int, last: bool = False) -> None:
        text = self.tokenizer.decode(self.tokens[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith(UNFINISHED) and not last:
            return
        if len(text) > len(self.said[row]):
            self.on_text(row, text[len(self.said[row]) :])
            self.said[row] = text
