"""Layers that hold a packed weight: plain tensors on a module, decoded when the layer is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.core import Site, WeftError, base_class
from weft.kernels.fp8_gemm import E4M3, fp8_linear
from weft.kernels.scratch import scratch
from weft.quant.formats import FORMATS, Format


class Quantised(nn.Module):
    """Mixin in front of a layer's own class: some of its parameters are packed.

    A packed parameter keeps its name and holds the format's "weight", one byte an element; the format's other tensors are buffers beside
    it, `<name>_absmax` and so on. So FSDP shards the bytes by rows and every process has the small rest. `.to(dtype)`, `.half()` and
    `.float()` change what numbers the layer decodes to and what else it owns, never the bytes or the scales.

    A parameter may also hold plain numbers of the logical shape again, as after merging: then the layer is what it was before.
    """

    form: Format  # the format of all packed parameters of this layer
    shapes: dict[str, torch.Size]  # parameter -> its shape as numbers
    dtype: torch.dtype  # the dtype of those numbers, that which the weight had before
    own: type  # the class of the layer before it was packed; one for a class

    def is_packed(self, name: str = "weight") -> bool:
        """Whether this parameter holds packed bytes now."""
        held = self._parameters.get(name)
        return name in self.shapes and held is not None and held.element_size() == 1

    def tensors(self, name: str = "weight") -> dict[str, Tensor]:
        """The format's tensors of a packed parameter; fp8's bytes as the parameter has them, uint8."""
        found = {"weight": getattr(self, name)}
        for key in self.form.beside:
            value = self._buffers.get(f"{name}_{key}")
            if value is not None:
                found[key] = value
        return found

    def unpacked(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """A parameter as numbers, in the layer's own layout; fresh memory if it is packed."""
        if not self.is_packed(name):
            return cast(Tensor, getattr(self, name)).detach()
        with torch.no_grad():
            return self.form.unpack(self.tensors(name), self.shapes[name], dtype or self.dtype)

    def logical(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a parameter as numbers."""
        held = cast(Tensor, self._parameters[name])
        return (self.shapes[name], self.dtype) if self.is_packed(name) else (held.shape, held.dtype)

    def hold(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Let a parameter be these packed tensors."""
        held = tensors["weight"]
        held = held.view(torch.uint8) if held.is_floating_point() else held  # gloo knows no fp8, and FSDP2's mixed precision would cast it
        self._parameters[name] = nn.Parameter(held, requires_grad=False)
        for key in self.form.beside:
            value = tensors.get(key)
            if value is not None or f"{name}_{key}" in self._buffers:
                self.register_buffer(f"{name}_{key}", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {id(t) for name in self.shapes if self.is_packed(name) for t in self.tensors(name).values()}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in kept or moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Packed bytes have no gradient; everything else follows."""
        for name, p in self.named_parameters():
            if name not in self.shapes or not self.is_packed(name):
                p.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form.name}".lstrip(", ")


class QuantLinear(Quantised, nn.Linear):
    """A linear layer with a packed weight: y = x Wᵀ + b, W decoded to x's dtype (on a CPU without 16-bit products to fp32).

    Only packed bytes are kept for the backward pass, which decodes again. Made by `quantise_` or `QuantLinear.of`.
    """

    own = nn.Linear
    narrow = False  # whether a training pass multiplies in fp8, which `weft.step` turns on for an fp8 base

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, base: str = "nf4", dtype: torch.dtype = torch.float32
    ) -> None:
        nn.Module.__init__(self)  # an empty shell: `hold` brings the weight
        self.in_features, self.out_features = in_features, out_features
        self.form, self.dtype = FORMATS[base], dtype
        self.shapes = {"weight": torch.Size((out_features, in_features))}
        self.register_parameter("weight", None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], base: str, dtype: torch.dtype, bias: Tensor | None = None
    ) -> QuantLinear:
        """A layer around packed tensors, which are not copied."""
        made = cls(shape[1], shape[0], base=base, dtype=dtype)
        made.hold("weight", tensors)
        made._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed():
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.narrow and torch.is_grad_enabled():
            y: Tensor = self.in_fp8(x.to(dtype))
            return y if self.bias is None else y + self.bias.to(dtype)
        recorded = torch.is_grad_enabled() and x.requires_grad
        few = None if recorded else self.form.product(self.tensors(), self.shapes["weight"], x.to(dtype))
        y = self.decoded(x.to(dtype)) if few is None else few
        return y if self.bias is None else y + self.bias.to(dtype)

    def decoded(self, x: Tensor) -> Tensor:
        """x Wᵀ by way of W as numbers."""
        held = slots(self.form, self.tensors())
        return Product.apply(x, self.form.name, self.shapes["weight"], False, *held)  # type: ignore[no-any-return, no-untyped-call]

    def in_fp8(self, x: Tensor) -> Tensor:
        """x Wᵀ by fp8 products, W being stored as fp8 with a scale a row."""
        return fp8_linear(x, self.weight.view(E4M3), cast(Tensor, self.weight_scale))


class Product(torch.autograd.Function):
    """x Wᵀ, or x W where the layer holds W turned, with W from its packed tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: str, shape: torch.Size, turned: bool, weight: Tensor, first: Tensor | None, second: Tensor | None,
        third: Tensor | None,
    ) -> Tensor:  # a slot for each tensor that a format may have: torch.compile mistakes a Function with *args  # fmt: skip
        ctx.save_for_backward(weight, first, second, third)
        ctx.base, ctx.shape, ctx.turned = base, shape, turned
        wide = computing(x.dtype, x.device)
        W = decode(base, shape, (weight, first, second, third), wide, scratch(shape, weight, wide))
        y = F.linear(x.to(wide), W.mT if turned else W)
        return y if wide == x.dtype else y.to(x.dtype)  # torch 2.11's compiler takes the gradient for zero behind a `to` that does nothing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        wide, held = computing(g.dtype, g.device), ctx.saved_tensors  # asked for once: a layer that is computed again gives them once
        W = decode(ctx.base, ctx.shape, held, wide, scratch(ctx.shape, held[0], wide), again=True)
        dx = g.to(wide) @ (W.mT if ctx.turned else W)
        return dx.to(g.dtype), None, None, None, None, None, None, None


def slots(form: Format, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
    """A format's tensors, the weight first, in as many places as any format has."""
    held = [tensors.get(key) for key in ("weight", *form.beside)]
    return held + [None] * (4 - len(held))


def decode(
    base: str, shape: torch.Size, held: Sequence[Tensor | None], dtype: torch.dtype, out: Tensor | None = None, again: bool = False
) -> Tensor:
    """The numbers of what `slots` gave. `out`, `again`: see `Format.unpack`."""
    form = FORMATS[base]
    tensors = {key: t for key, t in zip(("weight", *form.beside), held, strict=False) if t is not None}
    return form.unpack(tensors, shape, dtype, out, again)


# Asked once and here: a compiler that meets the question in a forward pass leaves its graph for it.
CPU_MULTIPLIES_IN_16_BITS = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def computing(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a product: x's own, but fp32 on a CPU without AVX512-BF16 or AMX, where a 16-bit g·W takes 60 to 120 times as long."""
    narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and not (dtype == torch.bfloat16 and CPU_MULTIPLIES_IN_16_BITS) else dtype


def settle(module: nn.Module) -> None:
    """A layer none of whose parameters is packed any longer gets its own class back; others stay as they are."""
    if not isinstance(module, Quantised) or isinstance(module, Site) or any(map(module.is_packed, module.shapes)):
        return
    own = module.own
    for name in module.shapes:
        for key in module.form.beside:
            module._buffers.pop(f"{name}_{key}", None)
    for name in ("form", "dtype", "shapes"):
        del module.__dict__[name]
    module.__class__ = own


def unpack_(module: nn.Module) -> None:
    """Let a layer hold numbers in place of its packed parameters, as the class that it had before."""
    if isinstance(module, Quantised):
        for name in filter(module.is_packed, module.shapes):
            module._parameters[name] = nn.Parameter(module.unpacked(name), requires_grad=False)
    settle(module)


def dense(layer: Any, name: str = "weight") -> Tensor:
    """A parameter of any layer as a floating-point tensor, in the layer's own layout and dtype.

    Raises WeftError for a format that weft cannot read.
    """
    if isinstance(layer, Quantised):
        return layer.unpacked(name)
    weight = getattr(layer, name)
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise WeftError(f"a weight stored as {weight.dtype} ({base_class(layer).__name__}) is a format that weft cannot read")
    return weight.detach()  # type: ignore[no-any-return]


def is_quantised(layer: object) -> bool:
    """Whether a layer holds a packed weight now."""
    return isinstance(layer, Quantised) and any(map(layer.is_packed, layer.shapes))
