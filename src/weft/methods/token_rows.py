"""Rows of an embedding that stand in place of the base's: what `TrainableTokens` trains, and LoRA's `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Mixture, Site, WeftError, base_class, behind, logical, matcher, numbers, plain
from weft.core.site import Part

Ids = tuple[int, ...]


class TokenRows(Adapter):
    """New rows E (n, width) for n tokens of an embedding, or of a head tied to one.

    Args:
        tokens: Their numbers, in the order of E's rows.
        tied: The adapter of the layer that this one shares its weight with: they have one E.
    """

    E: nn.Parameter
    index: Tensor
    order: Tensor

    def __init__(self, layer: Site, tokens: Ids, tied: TokenRows | None = None) -> None:
        super().__init__()
        self.tokens, self.follows = tokens, tied is not None
        # on the CPU under torch.device("meta") too: they are known without the base's weights
        self.register_buffer("index", torch.tensor(tokens, device="cpu"), persistent=False)
        self.register_buffer("order", self.index.argsort(), persistent=False)
        if tied is not None:
            self.__dict__["_parameters"] = tied._parameters  # one dictionary: whoever puts in another E does so for all
            return
        (_, width), dtype = logical(layer)
        self.E = nn.Parameter(torch.empty(len(tokens), width, dtype=torch.promote_types(dtype, torch.float32)))
        if not self.E.is_meta:
            held = numbers(layer)
            self.E.data.copy_(held[self.index.to(held.device)])

    def forward(self, layer: Site | Around, x: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        module, y = plain(layer), layer.frozen(x, *inputs, **kwargs)
        if not isinstance(module, nn.Embedding):
            bias = None if module.bias is None else module.bias[self.index]
            return y.index_copy_(-1, self.index, F.linear(x, self.E.to(x.dtype), bias).to(y.dtype))  # type: ignore[no-any-return]
        found = torch.searchsorted(self.index[self.order], x.to(self.index.dtype)).clamp(max=len(self.tokens) - 1)
        row = self.order[found]
        own: Any = object.__new__(base_class(module))  # an embedding of these rows, which does with them all that the base's class does
        padding = self.tokens.index(module.padding_idx) if module.padding_idx in self.tokens else None
        own.__dict__ = module.__dict__ | {"_parameters": {"weight": self.E.to(logical(module)[1])}, "padding_idx": padding}
        return torch.where((self.index[row] == x).unsqueeze(-1), own.forward(row, *inputs, **kwargs), y)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        return {"weight": numbers(plain(layer)).float().index_copy(0, self.index, self.E.detach().float())}

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, x: Tensor, *inputs: Any, **kwargs: Any) -> Any:
        """The layer once for all rows, a whole output head too; then each owner's tokens in its own rows."""
        if inputs or kwargs:
            return super().mixed(mixture, layer, x, *inputs, **kwargs)
        owners, y = mixture.owners(x), layer.frozen(x)
        for i, adapter in enumerate(mixture.adapters):
            mine = (owners == i).nonzero().squeeze(1)
            part = x[mine]
            y = y.index_copy_(0, mine, adapter(Part(layer, part, y[mine]), part))
        return y

    def tie(self, key: str) -> nn.Parameter | None:
        return self.E if key == "weight" else None


class TokenRowsBeside(TokenRows):
    """The same beside another method, which its file names in another way."""

    kin: ClassVar[type[Adapter] | None] = TokenRows


def on_tokens(
    wanted: Mapping[str, Ids], modules: Mapping[str, nn.Module], kind: type[TokenRows], out: Callable[[str], bool] = lambda path: False
) -> dict[str, Adapter]:
    """The adapters of the layers that `wanted` names ("auto": the input embedding), and of all that share a weight with that embedding.

    Args:
        wanted: Target -> tokens.
        out: Paths that are left out, by name or by their tie.
    Raises:
        WeftError: a target without a layer, tokens that a layer does not have, tokens named twice: all that is wrong.
    """
    start, wrong = _start(modules), []
    asked: dict[str, Ids] = {}
    for target, tokens in wanted.items():
        hits = [p for p in modules if matcher(target)(p) and not out(p)] if target != "auto" else [] if start is None else [start]
        if not hits:
            wrong.append(f"{target!r} matches no module" if start or target != "auto" else "name the embedding: this model does not say it")
        for path in hits:
            wrong += _misfits(path, modules[path], tokens)
            wrong += [f"{path} is named twice, for different tokens"] if asked.setdefault(path, tokens) != tokens else []
    if start in asked:
        tied = [p for p, m in modules.items() if p not in asked and _weight(m) is _weight(modules[start]) and not out(p)]
        strange = {p: base_class(modules[p]).__name__ for p in tied if not isinstance(modules[p], nn.Embedding | nn.Linear)}
        wrong += [f"{p} has the same weight and is a {kind}, of which weft knows no rows of tokens" for p, kind in strange.items()]
        asked |= dict.fromkeys(tied, asked[start])
    if wrong:
        here = ", ".join(p for p, m in modules.items() if isinstance(m, nn.Embedding)) or "none"
        raise WeftError("\n".join(dict.fromkeys(wrong)) + f"\nEmbeddings here: {here}")
    built: dict[str, Adapter] = {}
    first: dict[tuple[int, Ids], TokenRows] = {}
    for path in sorted(asked, key=lambda p: p != start):
        key = id(_weight(modules[path])), asked[path]
        made = kind(cast(Site, modules[path]), asked[path], first.get(key))
        built[path] = first[key] = made
    return {path: built[path] for path in modules if path in built}


def _start(modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the input embedding: as the model says, or the only embedding that there is."""
    embeddings, model = [p for p, m in modules.items() if isinstance(m, nn.Embedding)], cast(Any, modules[""])
    try:
        said = behind(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):  # no transformers model, or one that has none
        return embeddings[0] if len(embeddings) == 1 else None
    return next((p for p in embeddings if modules[p] is said), None)


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")


def _misfits(path: str, module: nn.Module, tokens: Ids) -> Iterator[str]:
    """What speaks against training these tokens there."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        yield f"{path} is a {base_class(module).__name__}, which has no row for each token"
        return
    rows = logical(module)[0][0]
    odd = [t for t in tokens if type(t) is not int or not 0 <= t < rows]
    twice = sorted({t for t in tokens if t not in odd and tokens.count(t) > 1})
    if odd:
        yield f"{path} has no token {', '.join(map(repr, odd))}: its tokens are 0 to {rows - 1}"
    if twice:
        yield f"token {', '.join(map(str, twice))} is named twice; name each once"
    if not tokens:
        yield f"no token is named for {path}: give the numbers of those to train, as the tokenizer has them ([4, 5])"
