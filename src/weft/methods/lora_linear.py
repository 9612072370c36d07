"""LoRA on a linear layer (transformers' Conv1D too), and what all kinds of layer share. Shapes are those of peft's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Mixture, Site, features, is_conv1d, plain, unmerged
from weft.kernels.low_rank import low_rank_add
from weft.methods import lora_init, lora_rows
from weft.quant import dense

if TYPE_CHECKING:
    from weft.methods.lora import LoRA


class Factors(Adapter):
    """What the three kinds share: s · B A around a layer, and a trained copy of the layer's bias if the method wants one."""

    A: nn.Parameter
    B: nn.Parameter
    b: nn.Parameter | None  # lora_B's own bias
    bias: nn.Parameter | None  # the base's bias as trained

    def __init__(self, method: LoRA, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, method.dropout
        self.b = None
        self.start(method, layer, rank)
        if not method.train_A:
            self.fixed = frozenset({"A"})
            self.A.requires_grad_(False)
        own: Tensor | None = getattr(layer, "bias", None) if method.bias != "none" else None
        self.bias = None if own is None else nn.Parameter(own.detach().to("cpu" if not own.is_meta else "meta", torch.float32, copy=True))

    def start(self, method: LoRA, layer: Any, rank: int) -> None:
        """Make A and B."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its factors begin")

    def update(self, layer: Any, y: Tensor, x: Tensor, B: Tensor) -> Tensor:
        """y + s · B A x; may write into y."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds")

    def product(self) -> tuple[Tensor, Tensor]:
        """The A and B of the plain LoRA that adds the same, at this scale. What is computed from factors, and what a file holds."""
        return self.A, self.B

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        y = self.update(plain(layer), y, x, self.B)
        if self.b is not None:
            y = y + (self.scale * self.b).to(y.dtype)
        if self.bias is not None:
            y = y + self.along(self.bias - unmerged(layer).bias).to(y.dtype)
        return y

    def along(self, value: Tensor) -> Tensor:
        """(out,) shaped to meet y's features: the last axis, or a convolution's channels."""
        return value.view(-1, *(1 for _ in self.A.shape[2:]))

    def merged_bias(self, layer: Site | Around) -> dict[str, Tensor]:
        """The bias of the plain layer, if this adapter has a say in it."""
        if self.b is None and self.bias is None:
            return {}
        now, base = plain(layer).bias, unmerged(layer).bias
        bias = torch.zeros_like(self.B[:, 0]) if now is None else now.float()
        if self.bias is not None:
            bias = self.bias if now is base else self.bias + (now.float() - base.float())  # what was merged before this one stays
        return {"bias": (bias if self.b is None else bias + self.scale * self.b).detach()}


class LowRank(Factors):
    """The update of a linear layer."""

    def start(self, method: LoRA, layer: Any, rank: int) -> None:
        inside, outside = features(layer)
        self.A = method.first(torch.empty(rank, inside))
        self.B = nn.Parameter(torch.zeros(outside, rank))
        if method.init == "orthogonal" and not self.A.is_meta:
            lora_init.orthogonal(self.A.data, self.B.data)
        if method.lora_bias:
            self.b = nn.Parameter(torch.zeros(outside))

    def update(self, layer: Any, y: Tensor, x: Tensor, B: Tensor) -> Tensor:
        return low_rank_add(y, x, self.A, B, self.scale)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module: Any = plain(layer)
        W, (A, B) = dense(module).float(), (t.detach() for t in self.product())
        new = torch.addmm(W, A.T, B.T, alpha=self.scale) if is_conv1d(module) else torch.addmm(W, B, A, alpha=self.scale)
        return {"weight": new} | self.merged_bias(layer)

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """One batched product for all rows, where all are plain LoRAs or of their kin."""
        if not mixture.cache.setdefault("alike", all(map(_only_factors, mixture.adapters))):
            return super().mixed(mixture, layer, *inputs, **kwargs)
        return lora_rows.mixed(mixture, layer, *inputs)

    @classmethod
    def side_by_side(cls, mixture: Mixture, layer: Site, x: Tensor) -> Tensor:
        """One batched product where all are plain LoRAs with equally many lines; else one adapter after another."""
        if not mixture.even or not all(map(_plain_factors, mixture.adapters)):
            return super().side_by_side(mixture, layer, x)
        return lora_rows.side_by_side(mixture, layer, x)


def _only_factors(adapter: Any) -> bool:
    return LowRank in (type(adapter), type(adapter).kin) and adapter.b is None and adapter.bias is None and not adapter.dropout


def _plain_factors(adapter: Any) -> bool:
    return type(adapter) is LowRank and _only_factors(adapter)
