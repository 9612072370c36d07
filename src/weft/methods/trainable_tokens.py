"""Trainable tokens: of an embedding only the rows of chosen tokens are trained. A method of the peft package; there is no paper.

    W'[i] = E[i] for the chosen tokens i, W[i] for all others        E ∈ ℝ^{n × width}; E[i] = W[i] at the start

What a layer tied to the embedding holds is the same W', so an output head gives the chosen tokens the logits E x. E replaces rows and adds
nothing to them: an adapter that works before it counts for the other rows only, and of two the later one's rows count. Weight decay pulls E
to zero, not to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from weft.core import Adapter, Method, Site, matcher, several
from weft.methods.token_rows import Ids, TokenRows, TokenRowsBeside, on_tokens


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Trains the embeddings of a few tokens and leaves all others as they are. A head that is tied to the embedding is trained with it.

    Args:
        tokens: The numbers of the tokens, as the tokenizer gives them.
        targets: "auto": the model's input embedding. Or names of embeddings and output heads; a head that is not tied must be named.
    """

    tokens: Ids = ()
    targets: str | tuple[str, ...] = "auto"

    layered: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3  # Adam moves a number by up to this a step, and the rows of an embedding are 0.02 to 1 in size
    site: ClassVar[str] = "embeddings, and linear layers with a row for each token"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def accepts(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding | nn.Linear)

    def build(self, layer: Site, path: str) -> Adapter:
        return TokenRows(layer, self.tokens)

    def elsewhere(self) -> bool:
        return True

    def beyond(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        out = several(self.exclude)
        return on_tokens(dict.fromkeys(several(self.targets), self.tokens), modules, TokenRows, lambda p: any(matcher(e)(p) for e in out))


@dataclass(frozen=True, kw_only=True)
class WithTokens:
    """For methods that train tokens beside their own adapters.

    Args:
        trainable_token_indices: Tokens whose embeddings are trained too, by their numbers: those of the input embedding and of what is tied
            to it, or {name of an embedding or head: numbers}.
    """

    trainable_token_indices: Ids | dict[str, Ids] = ()

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        given: Any = self.trainable_token_indices
        held = {name: tuple(ids) for name, ids in given.items()} if isinstance(given, Mapping) else tuple(given)
        object.__setattr__(self, "trainable_token_indices", held)

    def beyond(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        given = self.trainable_token_indices
        return on_tokens(given if isinstance(given, Mapping) else {"auto": given}, modules, TokenRowsBeside) if given else {}
