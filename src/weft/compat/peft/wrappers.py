"""Modules that are trained whole beside an adapter (`modules_to_save`), each adapter with a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.compat.peft.layers import BaseTunerLayer, framework
from weft.core import Front, modules


class AuxiliaryTrainingWrapper(Front):
    """What stands at the place of a module that is trained in another way than by an adapter around it."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: Sequence[str] = ()
    quantization_backend: None = None

    def __init__(self, module_to_save: nn.Module) -> None:
        super().__init__()
        self.original_module = module_to_save
        self.training = module_to_save.training
        self._active_adapter: list[str] | str = []
        self._disable_adapters = False
        self._adapters: set[str] = set()
        if isinstance(module_to_save, nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList | BaseTunerLayer):
            raise TypeError(f"{self._error_message_name()} cannot be applied to modules of type {module_to_save.__class__}")

    def _error_message_name(self) -> str:
        return "training wrapper"

    @property
    def behind(self) -> nn.Module:
        return self.original_module

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> list[str] | str:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError(f"{type(self).__name__} does not say which adapters it has")

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of these names that this module has something for."""
        if isinstance(adapter_name, str):
            return adapter_name
        here = [n for n in adapter_name if n in self._get_available_adapters()]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def one_at_most(self, adapter_names: str | Sequence[str]) -> list[str]:
        """These names as a list, which may not be several."""
        chosen = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(chosen) > 1:
            raise ValueError(f"Attempted to set multiple ({chosen}) adapters at once for {self}.")
        return chosen

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapter that counts here."""
        raise NotImplementedError(f"{type(self).__name__} cannot choose an adapter")

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Drop what this module has for an adapter."""
        raise NotImplementedError(f"{type(self).__name__} cannot drop an adapter")

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the copies on or off."""
        self._disable_adapters = not enabled


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module and one trained copy of it for each adapter; the chosen adapter's copy computes."""

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(module_to_save)
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update(adapter_name)

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the copy for an adapter that has none."""
        self._adapters.add(adapter_name)
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)
        self.original_module.requires_grad_(False)
        if adapter_name in self.active_adapters:
            self.modules_to_save[adapter_name].requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = self.__dict__.get("_modules", {})
            if "original_module" not in held:
                raise
            copies, chosen = held.get("modules_to_save"), self.active_adapters
            if not self._disable_adapters and chosen and copies is not None and chosen[0] in copies:
                return getattr(copies[chosen[0]], name)
            return getattr(held["original_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None)
        chosen = [n for n in self.active_adapters if n in self.modules_to_save]
        if self._disable_adapters:
            return self.original_module(*args, **kwargs)
        if names is not None:
            return self._mixed(names, *args, **kwargs)
        return (self.modules_to_save[chosen[0]] if chosen else self.original_module)(*args, **kwargs)

    def _mixed(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} respectively."
            )
        out: Tensor | None = None
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            part: nn.Module = self.modules_to_save[name] if name in self.modules_to_save else self.original_module  # noqa: SIM401
            y = part(x[rows], *args, **kwargs)
            out = y.new_zeros(len(x), *y.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, y)
        return out

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the copy that computes and trains."""
        chosen = self.one_at_most(adapter_names)
        for name in chosen:
            if name not in self._adapters:
                raise ValueError(f"Adapter {name} not found in {self._adapters}")
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in chosen and not inference_mode)
        self._active_adapter = chosen[0] if chosen else []

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Drop a copy."""
        self._adapters.discard(adapter_name)
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        if adapter_name in self.active_adapters:
            here = [n for n in new_active_adapters or () if n in self.modules_to_save]
            self.set_adapter(here[:1])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let copies train or not."""
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in the file -> names in this module, for an adapter's copy."""
        if adapter_name not in self._adapters:
            return {}
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in self.modules_to_save[adapter_name].state_dict()}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's copy out of this module's state, under the names in the file."""
        return {k: state_dict[place] for k, place in self.adapter_state_dict_load_map(adapter_name).items() if place in state_dict}

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The module to put back: an adapter's copy if it is merged, else the original."""
        names = self.active_adapters if adapter_names is None else adapter_names
        here = [n for n in names if n in self.modules_to_save]
        if merge and len(here) > 1:
            raise ValueError(f"Cannot merge more than one of {here} at once for {self}.")
        return self.modules_to_save[here[0]] if merge and here else self.original_module


def wrap_whole(model: nn.Module, config: Any, name: str, activate: bool) -> None:
    """Give every module that `config.modules_to_save` names a copy for the adapter `name`."""
    wanted = getattr(config, "modules_to_save", None)
    if not wanted:
        return
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    found = dict(model.named_modules())
    inside = tuple(f"{p}." for p, m in found.items() if isinstance(m, AuxiliaryTrainingWrapper | BaseTunerLayer))
    for path, module in list(found.items()):
        if not any(path == w or path.endswith(f".{w}") for w in wanted) or (inside and path.startswith(inside)):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            module.update(name)
            module.set_adapter(module.active_adapters, inference_mode=config.inference_mode)
            continue
        new = ModulesToSaveWrapper(module, name)
        new.set_adapter([name] if activate else [], inference_mode=config.inference_mode)
        parent, _, last = path.rpartition(".")
        setattr(cast(nn.Module, found[parent]), last, new)


def choose_whole(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Let each wrapped module compute with the copy of one of these adapters, or with the original."""
    for _, module in list(framework(model)):
        if isinstance(module, AuxiliaryTrainingWrapper):
            chosen = module.check_set_adapter(names)
            module.set_adapter([chosen] if chosen in module._adapters else [], inference_mode=inference_mode)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by path, as if no front stood anywhere."""
    return dict(modules(model))
