"""What a frozen-base format is: a weight to a few plain tensors, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.core import WeftError

Packed = Mapping[str, Tensor]  # "weight" and what belongs to it: "absmax", "scale", ...

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
            weight: Any floating dtype. name: What to call it in an error. options: Those in `defaults`.
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
        if not weight.is_meta and not torch.isfinite(weight.detach().abs().amax()):
            bad = int((~torch.isfinite(weight)).sum())
            raise WeftError(f"{name} holds {bad} values that are NaN or infinite (of {weight.numel()}): the checkpoint is damaged")
        with torch.no_grad():
            return self._pack(weight.detach(), **options)

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
        return []

    @abstractmethod
    def _pack(self, weight: Tensor, **options: Any) -> dict[str, Tensor]: ...

    @abstractmethod
    def unpack(self, tensors: Packed, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False) -> Tensor:
        """The weight as numbers: computed in fp32, rounded once to `dtype`. `again`: see `weft.kernels.four_bit.dequantise_4bit`."""

    def part(self, tensors: Packed, shape: tuple[int, ...], index: int) -> dict[str, Tensor] | None:
        """The tensors of weight[index], without unpacking the rest; None where a block straddles the border."""
        return None


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
