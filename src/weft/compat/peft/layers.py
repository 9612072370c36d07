"""What stands at an adapted layer's place for peft's users: `base_layer`, the adapters under peft's names, merging, switching.

The layer itself is a weft Site and stays behind this front; a front keeps only what a site has no place for: which of its adapters are
chosen while all are switched off, and which are merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weft.adapters.merge import fold
from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.views import BufferDict, HiddenSlot, bare, frozen_dtype, hide, holder, parts, show
from weft.core import Adapter, Front, Mixture, Site, Slot, activate, close_site, is_conv1d, masters, slot_of, unmerged
from weft.quant import dense, settle


class BaseTunerLayer(Front):
    """A front of one layer for one family of methods."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    FAMILY: ClassVar[str] = ""
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {}
    told: ClassVar[bool] = True  # whether the family stands before the class in what is printed
    stored: bool = True  # whether its adapters stand in their file; where two layers share them, one does not
    shown: ClassVar[str] = ""  # the name of the class in peft, where it differs
    quantization_backend: None = None  # how the base is packed is the base's own affair
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: Site | BaseTunerLayer, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = cast(nn.Module, base_layer)
        for name, kind in self.CONTAINERS.items():
            setattr(self, name, kind())
        self.kwargs: dict[str, Any] = {}
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.trains: dict[str, tuple[str, ...]] = {}  # which parameters of each adapter are there to be trained
        site = self.get_base_layer()
        self.training = site.training
        hide(cast(Site, site))
        site.__dict__.setdefault("fronts", []).append(self)
        self._sizes(site)

    def _sizes(self, site: Any) -> None:
        if is_conv1d(site):
            self.in_features, self.out_features = site.weight.shape
        elif isinstance(site, nn.Embedding):
            self.in_features, self.out_features = site.num_embeddings, site.embedding_dim
        else:
            for mine, theirs in (("in_features", "in_channels"), ("out_features", "out_channels")):
                size = getattr(site, mine, getattr(site, theirs, None))
                if size is not None:
                    setattr(self, mine, size)
        self.fan_in_fan_out = is_conv1d(site)

    @property
    def behind(self) -> nn.Module:
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        """The model's own layer, behind all fronts."""
        layer: nn.Module = self
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer

    @property
    def slot(self) -> HiddenSlot:
        """weft's own container of this layer's adapters."""
        return cast(HiddenSlot, slot_of(cast(Site, self.get_base_layer())))

    @property
    def names(self) -> list[str]:
        """The adapters of this family on this layer."""
        return list(self.trains)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.get_base_layer().weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.get_base_layer().bias)

    def get_base_weight(self) -> Tensor:
        """The base's weight as numbers, whatever it is packed in."""
        return dense(self.get_base_layer())

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put another tensor in the place of the base's weight."""
        self.weight.data = weight_data

    def _get_name(self) -> str:
        return self.shown or type(self).__name__

    def __repr__(self) -> str:
        return f"{self.FAMILY}.{super().__repr__()}" if self.told else super().__repr__()

    # ---- adapters come and go

    def add(self, name: str, adapter: Adapter, config: Any) -> None:
        """Take in a built adapter. An adapter that has this name already is replaced."""
        self.slot[name] = adapter
        base, mine = self.get_base_layer(), self.parts(adapter)
        shown = {n for inside in mine.values() for n in inside.values()}
        self.trains[name] = tuple(n for n, p in adapter._parameters.items() if n in shown and p is not None and p.requires_grad)
        for container, inside in mine.items():
            if not hasattr(self, container):
                setattr(self, container, nn.ParameterDict() if "" in inside else nn.ModuleDict())
            into: Any = getattr(self, container)
            if isinstance(into, nn.ParameterDict):
                bare(into, name, adapter, next(iter(inside.values())))
            else:
                into[name] = holder(container, adapter, {k or "weight": v for k, v in inside.items()}, base)
        self._added(name, adapter, config)

    def parts(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        """Which of an adapter's parameters this front shows, and under which names."""
        return parts(adapter)

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        """For a family with more to show than tensors."""

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.trains)

    def _get_available_adapters(self) -> set[str]:
        return set(self.trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer; if it was chosen, another one is."""
        if adapter_name in self.trains:
            for child in list(self._modules.values()):
                if isinstance(child, nn.ModuleDict | nn.ParameterDict | BufferDict) and adapter_name in child:
                    del child[adapter_name]
            for key, value in self.__dict__.items():
                if isinstance(value, dict) and key[0] != "_" and adapter_name in value:
                    del value[adapter_name]
            if adapter_name in self.slot:
                del self.slot[adapter_name]
        chosen = [n for n in self.active_adapters if n != adapter_name]
        if adapter_name in self.active_adapters:
            if not chosen and self.trains:
                chosen = [sorted(self.trains)[0]]
                text = f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {chosen[0]}."
                warnings.warn(text, stacklevel=3)
            self.set_adapter(chosen)

    def leave(self) -> nn.Module:
        """The layer without this front; without its slot too if no adapter is left in it."""
        site: Any = self.get_base_layer()
        if isinstance(site, Site):
            for name in self.names:
                if name in self.slot:
                    del self.slot[name]
            site.__dict__["fronts"] = [f for f in site.__dict__["fronts"] if f is not self]
            if not site.__dict__["fronts"]:
                del site.__dict__["fronts"]
                show(site)
                close_site(site)
                settle(site)  # a packed layer whose weight has become numbers is a plain layer from now on
        return self.base_layer

    # ---- which of them work

    @property
    def active_adapter(self) -> list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that work. Those train from now on (unless for inference), the others do not."""
        chosen = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._require_grad({name: name in chosen and not inference_mode for name in self.trains})
        self._active_adapter = chosen
        self.settle()

    def _require_grad(self, flags: Mapping[str, bool]) -> None:
        slot = self.slot
        for name, flag in flags.items():
            held = slot[name]._parameters
            for parameter in self.trains[name]:
                p = held[parameter]
                if p is not None and p.requires_grad != flag and p.is_floating_point():
                    p.requires_grad_(flag)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, whether they work or not."""
        named = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._require_grad(dict.fromkeys(named & set(self.trains), requires_grad))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this layer on or off; which ones are chosen is kept, and so is what may train."""
        self._disable_adapters = not enabled
        self.settle()

    def settle(self) -> None:
        """Tell the site which adapters work."""
        site = self.get_base_layer()
        working: list[str] = []
        merged = {n for front in site.__dict__["fronts"] for n in front.merged_adapters}
        for front in site.__dict__["fronts"]:
            if not front._disable_adapters:
                working += [n for n in front.active_adapters if n in front.trains and n not in merged]
        activate(cast(Site, site), tuple(dict.fromkeys(working)))

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (those that work, by default) into the weights. `safe_merge` refuses a result that is not finite."""
        given = check_adapters_to_merge(self, adapter_names)
        new = [n for n in given if n in self.trains]
        if not new:
            return
        site: Any = self.get_base_layer()
        for name in new:
            adapter = self.slot[name]
            method = type(adapter.method)
            why = adapter.unmergeable(site) or (None if method.mergeable else f"a {method.__name__} is no change of weights")
            if why:
                raise ValueError(f"adapter {name!r} cannot be merged: {why}")
            with torch.no_grad(), as_value_error():
                if safe_merge and not all(torch.isfinite(v).all() for v in masters(adapter).merged(site).values()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        together = list(dict.fromkeys(self._unfold() + new))
        activate(site, tuple(together))
        with torch.no_grad(), as_value_error():
            fold(site, together, {}, True)
        self.merged_adapters = self.merged_adapters + new
        self.settle()

    def _unfold(self) -> list[str]:
        """Put the base's own bytes back, and say what was merged, by this front and others of the layer."""
        site = self.get_base_layer()
        for name, own in site.__dict__.pop("kept", {}).items():
            site._parameters[name] = own
        site.__dict__.pop("kept_for", None)
        return [n for front in site.__dict__["fronts"] for n in front.merged_adapters]

    def unmerge(self) -> None:
        """Give the layer its own bytes back, exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._unfold()
        self.merged_adapters = []
        rest = list(dict.fromkeys(n for front in self.get_base_layer().__dict__["fronts"] for n in front.merged_adapters))
        if rest:
            with torch.no_grad():
                fold(cast(Site, self.get_base_layer()), rest, {}, True)
        self.settle()

    def merged_for_good(self) -> None:
        """Keep the merged weights and forget the old ones."""
        site = self.get_base_layer()
        site.__dict__.pop("kept", None)
        site.__dict__.pop("kept_for", None)
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging this adapter adds to the weight, in the weight's own layout."""
        site: Any = self.get_base_layer()
        before: Any = unmerged(site)
        with torch.no_grad(), as_value_error():
            return masters(self.slot[adapter]).merged(before)["weight"] - dense(before).float()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    # ---- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged:
            self.unmerge()
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self.base_layer(*args, **kwargs)
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        self._rows_given(names, args)
        site = cast(Site, self.get_base_layer())
        activate(site, self._mixture(names, args[0].device))
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self.settle()

    def _rows_given(self, names: Sequence[str], args: Sequence[Any]) -> None:
        if len(names) != len(args[0]):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(args[0])} respectively."
            )

    def _mixture(self, names: Sequence[str], device: torch.device) -> Mixture | tuple[str, ...]:
        here = [n for n in dict.fromkeys(names) if n in self.slot]
        rows = torch.tensor([here.index(n) if n in here else -1 for n in names], device=device)
        return Mixture([self.slot[n] for n in here], rows, self.FAMILY) if here else ()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        own: Any = next((p for p in self.get_base_layer()._parameters.values() if p is not None), None)
        target = device if device is not None else None if own is None else own.device
        for key, buffer in self.slot[adapter_name]._buffers.items() if adapter_name in self.slot else ():
            if buffer is not None and buffer.is_meta and key in self.slot[adapter_name]._non_persistent_buffers_set:
                self.slot[adapter_name]._buffers[key] = torch.zeros_like(buffer, device=target)  # state of training: no file holds it
        if target is not None and adapter_name in self.slot and not any(p.is_meta for p in self.slot[adapter_name].parameters()):
            self.slot[adapter_name].to(target)


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that a layer is asked to merge and has not merged yet."""
    names = module.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    if module.merged:
        names = [n for n in names if n not in module.merged_adapters]
        if names:
            warnings.warn(
                f"Already following adapters were merged {','.join(module.merged_adapters)}. "
                f"You are now additionally merging {','.join(names)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return list(names)


def framework(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules()`, but nothing of what adapters are made of: the cost does not grow with their number."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen or isinstance(module, Slot):
            continue
        seen.add(id(module))
        yield path, module
        inside = ["base_layer"] if isinstance(module, BaseTunerLayer) else list(module._modules)
        stack.extend((f"{path}.{n}" if path else n, child) for n in reversed(inside) if (child := module._modules[n]) is not None)


def fronts(model: nn.Module) -> list[BaseTunerLayer]:
    """All fronts in a model."""
    return [m for _, m in framework(model) if isinstance(m, BaseTunerLayer)]


def cast_adapter(adapter: Adapter, site: nn.Module, autocast: bool) -> None:
    """peft's rule for an adapter's dtype: the base's own, but 16 bits and less become fp32 unless `autocast` is off."""
    own = frozen_dtype(site)
    if own is None or not own.is_floating_point:
        return
    wide = own if own.itemsize >= 4 or not autocast else torch.float32
    if wide.itemsize >= 2:
        adapter.to(wide)


def every(names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)
