"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt that a small network makes of trained vectors.

    x' = [f(E); E(x)]        E ∈ ℝ^{V × width};  f an MLP of three layers, or a bidirectional LSTM with an MLP of two

The network is there for training alone: what is used is f(E), and that is all that peft stores. weft stores E and f beside it, so that
training can go on where it stopped; of a file without them f(E) itself is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.methods.prompt import Prompt, PromptTuning


class EncodedPrompt(Prompt):
    """E and the weights of f, under the names of peft's modules with "_" for "."."""

    def __init__(self, method: PTuning, width: int, inside: bool) -> None:
        super().__init__(method.tokens, torch.empty(0), inside)
        del self.P
        hidden, rows = method.hidden or width, method.tokens * method.copies
        self.lstm, self.depth, self.hidden, self.dropout = method.encoder == "lstm", method.depth, hidden, method.dropout
        self.E = nn.Parameter(torch.randn(rows, width))
        sizes = [2 * hidden, 2 * hidden, width] if self.lstm else [width, hidden, hidden, width]
        if self.lstm:
            made = nn.LSTM(width, hidden, method.depth, bidirectional=True, batch_first=True)
            self.names = [f"lstm_{name}" for name in made._flat_weights_names]
            for name, p in made.named_parameters():
                self.register_parameter(f"lstm_{name}", nn.Parameter(p.data))
        for i, (narrow, wide) in enumerate(pairwise(sizes)):
            linear: Any = nn.Linear(narrow, wide)
            self.register_parameter(f"mlp_{2 * i}_weight", linear.weight)
            self.register_parameter(f"mlp_{2 * i}_bias", linear.bias)
        self.layers = len(sizes) - 1

    def values(self) -> Tensor:
        x: Tensor = self.E
        weights = self._parameters
        if self.lstm:
            start = x.new_zeros(2 * self.depth, 1, self.hidden)
            flat: Any = [weights[name] for name in self.names]
            x = torch.lstm(x[None], (start, start), flat, True, self.depth, self.dropout, self.training, True, True)[0][0]
        for i in range(self.layers):
            weight = weights[f"mlp_{2 * i}_weight"]
            assert weight is not None
            x = F.linear(F.relu(x) if i else x, weight, weights[f"mlp_{2 * i}_bias"])
        return x


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptTuning):
    """Trains a prompt through a small network.

    Args:
        encoder: "mlp", "lstm", or "none": the prompt itself (what a file of peft's holds).
        hidden: The width of the network; None: that of the embeddings.
        depth: Layers of the LSTM.
        dropout: Between the LSTM's layers, while training.
    """

    init: Literal["vocab", "text", "random"] = "random"
    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    hidden: int | None = None
    depth: int = 2
    dropout: float = 0.0

    default_lr: ClassVar[float] = 1e-3

    def made(self, embedding: Any, model: Any, inside: bool) -> Prompt:
        if self.encoder == "none":
            return super().made(embedding, model, inside)
        return EncodedPrompt(self, embedding.embedding_dim, inside)
