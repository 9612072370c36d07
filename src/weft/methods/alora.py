"""Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): LoRA from a sequence of tokens on, and the bare base before it.

    h_t = W₀x_t + [t ≥ t₀] · s · B A x_t        t₀: where the invocation begins, the last time that it occurs in the row

Keys and values before t₀ are the base's own, so that a cache which the base filled goes on being used. A row without the invocation is
the base's. `methods/invocation.py` finds where it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Site, WeftError, base_class, is_linear
from weft.kernels.low_rank import low_rank_add
from weft.methods.alora_door import Door
from weft.methods.invocation import Gate
from weft.methods.lora import LoRA
from weft.methods.lora_linear import Factors, LowRank
from weft.methods.virtual import takes


class Activated(LowRank):
    """The update of a linear layer from the invocation on."""

    gate: Gate  # shared by all layers of one adapter; `build_all` sets it

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        off = self.gate.before(y, self.gate.off)
        y = low_rank_add(y, x, self.A, self.B, self.scale, off)
        return y if self.b is None else y + ~off * (self.scale * self.b).to(y.dtype)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        raise WeftError("an ALoRA begins at its invocation and cannot be merged: a weight is the same for every token")


Activated.kin = LowRank


@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    """LoRA that begins at an invocation. It has the hyper-parameters of LoRA, and

    Args:
        invocation_tokens: The ids of the tokens with which it begins, as the tokenizer gives them where they stand in the text.
        rank: r; the authors' own code has 32, since fewer tokens are adapted than by LoRA.

    The paper adapts queries, keys and values; `targets` are all linear layers, as for LoRA, unless others are named.
    """

    invocation_tokens: tuple[int, ...] = ()
    rank: int = 32

    mergeable: ClassVar[bool] = False
    site: ClassVar[str] = "linear layers and transformers' Conv1D"

    def __post_init__(self) -> None:
        object.__setattr__(self, "invocation_tokens", tuple(self.invocation_tokens))
        super().__post_init__()
        tokens, wrong = self.invocation_tokens, []
        if not tokens or any(not isinstance(t, int) or isinstance(t, bool) or t < 0 for t in tokens):
            wrong.append(f"invocation_tokens={tokens!r}: they are the ids of one token or more, such as tokenizer(text)['input_ids']")
        if self.bias != "none":
            wrong.append(f"bias={self.bias!r}: a trained bias of the base would act before the invocation too; lora_bias=True begins at it")
        if self.from_base:
            wrong.append(f'init="{self.init}": use "kaiming", "gaussian" or "orthogonal"')
        if wrong:
            raise WeftError("ALoRA cannot be built with " + "; nor with ".join(wrong))

    __hash__ = LoRA.__hash__

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer)

    def kind(self, layer: object) -> type[Factors]:
        return Activated

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        gate = Gate(self.invocation_tokens)
        built: dict[str, Adapter] = {path: self.build(layer, path) for path, layer in layers.items()}
        for adapter in built.values():
            adapter.gate = gate  # type: ignore[assignment]
        return {"": Door(gate)} | built

    def beyond(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        model: Any = modules[""]
        if "input_ids" not in takes(model) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise WeftError(
                f"ALoRA finds its invocation among the input_ids of a decoder, and {base_class(model).__name__} is given none: "
                "adapt the language model itself"
            )
        return super().beyond(modules)
