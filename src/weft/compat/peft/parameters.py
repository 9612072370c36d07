"""LoRA on parameters that are no layer's weight (`target_parameters`): the fused experts of a mixture.

peft wraps a module once for each of its parameters, one wrapper inside the other. weft has one adapter for all of them, and each front
shows the factors of one. They are merged and unmerged together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.layers_lora import LoraLayer
from weft.compat.peft.starts import changes_base
from weft.compat.peft.views import Live
from weft.core import Adapter, logical
from weft.methods import LoRA
from weft.methods.parameters import LowRankParameters, on_parameters


class ParamWrapper(LoraLayer):
    """A module one of whose parameters has LoRA adapters."""

    def __init__(self, base_layer: Any, parameter_name: str, **kwargs: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, **kwargs)

    def _sizes(self, site: Any) -> None:
        shape, turned = logical(site, self.parameter_name)[0], bool(getattr(site, "is_transposed", False))
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self.out_features, self.in_features = shape[-2:] if not turned else shape[:-3:-1]
        self.fan_in_fan_out = False

    def parts(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        i = cast(LowRankParameters, adapter).names.index(self.parameter_name)
        return {"lora_A": {"weight": f"A{i}"}, "lora_B": {"weight": f"B{i}"}}

    @property
    def scaling(self) -> Live:
        """By adapter, what its update is multiplied by; writing here changes the adapter."""
        return _OfParameter(self, "scale")

    @property
    def r(self) -> Live:
        """By adapter, the rank that each expert has."""
        return _OfParameter(self, "rank")

    def get_param(self) -> Tensor:
        """The parameter itself, as numbers."""
        return cast(Tensor, getattr(self.get_base_layer(), self.parameter_name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        site = self.get_base_layer()
        own = cast(LowRankParameters, self.slot[adapter])
        return own.updates(site)[self.parameter_name].to(logical(site, self.parameter_name)[1])

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Start an adapter afresh: A as LoRA does, B at zero; False for random factors on both sides."""
        adapter: Any = self.slot[adapter_name]
        i = adapter.names.index(self.parameter_name)
        for side, zero in (("A", False), ("B", init_lora_weights is not False)):
            p = adapter._parameters[f"{side}{i}"]
            nn.init.zeros_(p) if zero else nn.init.kaiming_uniform_(p, a=5**0.5)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _rows_given(self, names: Any, args: Any) -> None:
        """A mixture itself knows how many rows the tokens belong to."""

    def __repr__(self) -> str:
        head, _, tail = super().__repr__().partition("(")
        return f"{head}(\n  parameter_name='{self.parameter_name}',{tail}"


class _OfParameter(Live):
    """A number of each adapter, for one of its parameters."""

    def __init__(self, front: ParamWrapper, attribute: str) -> None:
        super().__init__(front.slot, attribute, front.names)
        self.front = front

    def __getitem__(self, name: str) -> Any:
        if name not in self.slot:
            raise KeyError(name)
        adapter: Any = self.slot[name]
        i = adapter.names.index(self.front.parameter_name)
        return adapter.scales[i] if self.attribute == "scale" else adapter._parameters[f"A{i}"].shape[0] // self.front.num_experts

    def __setitem__(self, name: str, value: Any) -> None:
        if self.attribute == "rank":
            super().__setitem__(name, value)
        adapter: Any = self.slot[name]
        adapter.scales[adapter.names.index(self.front.parameter_name)] = value


def find(config: Any, everything: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """The parameters that `config.target_parameters` means, by their paths: (the module's path, the name)."""
    wanted = list(getattr(config, "target_parameters", None) or ())
    owned = {f"{p}.{n}" if p else n: (p, n) for p, m in everything.items() for n, v in m._parameters.items() if v is not None}
    return {full: place for full, place in owned.items() if full in wanted or any(full.endswith(f".{w}") for w in wanted)}


def check(config: Any, found: Mapping[str, tuple[str, str]], everything: Mapping[str, nn.Module], targeted: list[str]) -> None:
    """Raise what peft raises for a setting, a parameter or a module that cannot have this: before anything is changed."""
    if not found:
        return
    unfit = {"lora_dropout != 0": config.lora_dropout, "fan_in_fan_out": config.fan_in_fan_out, "lora_bias=True": config.lora_bias,
             "use_dora=True": config.use_dora, f"init_lora_weights={config.init_lora_weights!r}": _needs_a_matrix(config)}  # fmt: skip
    for what, is_set in unfit.items():
        if is_set:
            raise ValueError(f"lora.ParamWrapper does not work with {what}.")
    for path, name in found.values():
        module = everything[path]
        if not path:
            raise ValueError(f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{name}').")
        many = len(logical(module, name)[0])
        if many not in (2, 3):
            text = f"lora.ParamWrapper was initialized with {many} dimensional Parameter, but only 2d and 3d are supported."
            raise ValueError(text)
        others = [f for f in module.__dict__.get("fronts", ()) if not isinstance(f, ParamWrapper)]
        if path in targeted or others:
            raise ValueError(
                f"Trying to wrap an `nn.Parameter` of layer '{path}' of type {type(others[0]).__name__ if others else 'Linear'}, which is "
                "not a valid target. Make sure that this layer is not also targeted with `target_modules`. For some models, PEFT will do "
                "this automatically, try setting `target_modules=[]` to prevent it."
            )


def _needs_a_matrix(config: Any) -> bool:
    how = config.init_lora_weights
    return changes_base(how) or how in ("orthogonal", "eva", "lora_ga")


def check_set(config: Any, others: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter on the same model has other parameters: which one a tensor belongs to is told by its place alone."""
    mine = set(getattr(config, "target_parameters", None) or ())
    for name, other in others.items():
        theirs = set(getattr(other, "target_parameters", None) or ())
        if other is not config and mine and theirs and mine != theirs:
            raise ValueError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of parameters, but got "
                f"{sorted(mine)} for the new adapter and {sorted(theirs)} for adapter '{name}'."
            )


def build(method: Any, everything: Mapping[str, nn.Module], found: Mapping[str, tuple[str, str]]) -> dict[str, Adapter]:
    """The adapters of the modules whose parameters were found, by path."""
    if not found:
        return {}
    with as_value_error():
        return on_parameters(cast(LoRA, replace(method, target_parameters=tuple(found))), {p: everything[p] for p, _ in found.values()})


def put(above: nn.Module, last: str, adapter: LowRankParameters, name: str, config: Any) -> None:
    """Show an adapter at its module's place: a front for each of its parameters, the first one outermost."""
    for parameter in reversed(adapter.names):
        here = cast(Any, above._modules[last])
        site = here.get_base_layer() if isinstance(here, BaseTunerLayer) else here
        front = next((f for f in site.__dict__.get("fronts", ()) if getattr(f, "parameter_name", None) == parameter), None)
        if front is None:
            front = ParamWrapper(here, parameter)
            setattr(above, last, front)
        front.add(name, adapter, config)
