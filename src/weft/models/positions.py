"""How many tokens a model has places for."""

from __future__ import annotations

from typing import Any

from torch import nn


def room(model: Any) -> int:
    """The places that the model was made for; of one that does not say, as many as anyone writes."""
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    return getattr(text, "max_position_embeddings", None) or 10**9


def ends(model: Any) -> bool:
    """Whether a token behind the last place is an error, since each place has a learned vector (GPT-2, OPT), and not only unfamiliar."""
    tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    most = room(model)
    # OPT's table begins with two rows that stand for nothing
    return any(isinstance(m, nn.Embedding) and m is not tokens and most <= m.num_embeddings <= most + 2 for m in model.modules())
