"""What a frozen-base format is: a weight to a few plain tensors, and back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.core import WeftError

Packed = Mapping[str, Tensor]  # "weight" and what belongs to it: "absmax", "scale", ...
Draw = Callable[[Tensor], Tensor]  # fresh uniform numbers in [0, 1) of a tensor's shape, fp32, on its device
ROUNDING = {"rounding": "nearest", "seed": 0}  # options of every format that can be written

FORMATS: dict[str, Format] = {}  # every format by its name


class Format(ABC):
    """A way to store a weight. Its tensors describe themselves: `unpack` finds block sizes and nesting from their shapes and dtypes.

    "weight" among the tensors has one byte an element, whatever it means, and rows of the weight are rows of it where they can be.
    """

    name: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ()  # the tensors that may stand beside "weight"
    defaults: ClassVar[Mapping[str, Any]] = {}  # the options of `pack`
    writable: ClassVar[bool] = True  # False: a format that weft reads only

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            FORMATS[cls.name] = cls()

    def pack(self, weight: Tensor, *, name: str = "the weight", **options: Any) -> dict[str, Tensor]:
        """The tensors that stand for a floating-point weight of any shape, on its own device.

        Args:
            weight: Any floating dtype. name: What to call it in an error. options: Those in `defaults`; of every format
                rounding: "nearest", or "stochastic": up or down to one of the two neighbouring levels with chances such that the mean is
                    the weight itself, E[Ŵ] = W. A single Ŵ is further from W than the nearest.
                seed: A whole number. With the weight's name, and on one kind of device, it decides every draw.
        Raises:
            WeftError: an option that there is not, a weight that is no floating-point tensor or holds NaN or Inf, a format only read.
        """
        if not self.writable:
            raise WeftError(f"weft reads {self.name} but does not write it: choose one of {', '.join(writable())}")
        options = self.checked(**options)
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise WeftError(f"{name} is stored as {weight.dtype}, so it cannot be quantised to {self.name}: give the 16- or 32-bit weight")
        if weight.numel() == 0:
            raise WeftError(f"{name} of shape {tuple(weight.shape)} is empty: there is nothing to quantise")
        if wrong := damage(weight.detach(), name):
            raise WeftError(f"{wrong}: the checkpoint is damaged")
        seed, draw = options.pop("seed"), None
        if options.pop("rounding") == "stochastic" and not weight.is_meta:
            draw = _draws(seed, name, weight.device)
        with torch.no_grad():
            return self._pack(weight.detach(), draw, **options)

    def checked(self, **options: Any) -> dict[str, Any]:
        """All options with their defaults filled in. Raises WeftError for one that the format does not have, or a wrong value."""
        wrong = []
        for key in options:
            if key not in self.defaults:
                near = get_close_matches(key, self.defaults, n=1)
                have = f"it has {', '.join(self.defaults)}" if self.defaults else "it has none"
                wrong.append(f"{self.name} has no option {key!r}; " + (f"did you mean {near[0]!r}?" if near else have))
        full = {**self.defaults, **options}
        wrong += self._wrong(full) if not wrong else []
        if wrong:
            raise WeftError("\n".join(wrong))
        return full

    def _wrong(self, options: dict[str, Any]) -> list[str]:
        """What is wrong with the options' values."""
        wrong = []
        if options.get("rounding", "nearest") not in ("nearest", "stochastic"):
            wrong.append(f"rounding={options['rounding']!r} is neither 'nearest' nor 'stochastic'")
        seed = options.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            wrong.append(f"seed={seed!r} is no whole number of at least 0")
        return wrong

    @abstractmethod
    def _pack(self, weight: Tensor, draw: Draw | None, **options: Any) -> dict[str, Tensor]:
        """`pack`; rounding to the nearest level if there is nothing to draw from."""

    @abstractmethod
    def unpack(self, tensors: Packed, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False) -> Tensor:
        """The weight as numbers: computed in fp32, rounded once to `dtype`. `again`: see `weft.kernels.four_bit.dequantise_4bit`."""

    def product(self, tensors: Packed, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
        """x Wᵀ straight from the packed tensors, without a gradient; None where it is better decoded, or there is no kernel for it."""
        return None

    def part(self, tensors: Packed, shape: tuple[int, ...], index: int) -> dict[str, Tensor] | None:
        """The tensors of weight[index], without unpacking the rest; None where a block straddles the border."""
        return None


def damage(weight: Tensor, name: str) -> str | None:
    """What is wrong with a weight's numbers; None if all of them are finite."""
    if weight.is_meta or not weight.numel() or torch.isfinite(weight.abs().amax()):
        return None
    return f"{name} holds {int((~torch.isfinite(weight)).sum())} values that are NaN or infinite (of {weight.numel()})"


def _draws(seed: int, name: str, device: torch.device) -> Draw:
    """Every weight has a stream of its own, whatever was packed before it: equal draws for two layers would err alike in both."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(start)
    return lambda t: torch.rand(t.shape, generator=generator, device=device)


def writable() -> list[str]:
    """The names of the formats that a weight can be quantised to."""
    return [name for name, form in FORMATS.items() if form.writable]


def format_of(name: str) -> Format:
    """The format of a name. Raises WeftError for an unknown one."""
    if name not in FORMATS:
        near = get_close_matches(str(name), FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise WeftError(f"{name!r} is no format of a frozen base; {hint}There are {', '.join(FORMATS)}")
    return FORMATS[name]
