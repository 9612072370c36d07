"""`base_model` of a PeftModel: the user's model with fronts at the adapted layers, and what peft does to all of them at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weft.adapters.attach import device_of
from weft.compat.peft import parameters, starts, tokens, tying
from weft.compat.peft.activated import drop_door, put_door, told
from weft.compat.peft.config import PeftConfig
from weft.compat.peft.defaults import IA3_FEEDFORWARD, TARGETS
from weft.compat.peft.families import LAYERS, front_class
from weft.compat.peft.kinds import PeftType, as_value_error
from weft.compat.peft.layers import BaseTunerLayer, cast_adapter, framework, fronts
from weft.compat.peft.layers_lora import mend_fan_in_fan_out
from weft.compat.peft.methods import method_of
from weft.compat.peft.moe import fuse_config
from weft.compat.peft.small import replicate_layers
from weft.compat.peft.switching import delete_adapter, enable, set_adapter, set_requires_grad
from weft.compat.peft.targets import check_target_module_exists, condense, find_targets, include_all_linear
from weft.compat.peft.wrappers import ModulesToSaveWrapper, base_modules, wrap_whole
from weft.core import Adapter, Front, base_class, behind, is_conv1d, open_site
from weft.methods import LoRA
from weft.methods.parameters import LowRankParameters
from weft.methods.token_rows import TokenRows

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class BaseTuner(Front):
    """Adapters of one method on a model."""

    prefix: str = ""
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    uses_shared_state: bool = False
    KIND: ClassVar[PeftType]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        given = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        before = getattr(model, "peft_config", None)
        if before is not None and before is not given:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in the model. "
                "Make sure to know what you are doing!",
                stacklevel=3,
            )
            given = {**before, **given}
        self.peft_config: dict[str, Any] = given
        self.active_adapter: str | list[str] = adapter_name
        self.inject_adapter(model, adapter_name, True, low_cpu_mem_usage, state_dict, autocast_adapter_dtype)
        model.__dict__["peft_config"] = self.peft_config

    @property
    def behind(self) -> nn.Module:
        return self.model

    @property
    def target_module_mapping(self) -> dict[str, Any]:
        """Which layers the method adapts by itself, by `model_type`."""
        return TARGETS.get(self.KIND, {})

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's configuration as a dictionary; for a model without one, a stand-in that says "custom"."""
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        return cast("dict[str, Any]", config.to_dict() if hasattr(config, "to_dict") else config)

    # ---- a new adapter

    _check_target_module_exists = staticmethod(check_target_module_exists)

    def _prepare_adapter_config(self, config: Any, model_config: Mapping[str, Any]) -> None:
        if getattr(config, "target_modules", None) is None:
            found = TARGETS.get(self.KIND, {}).get(model_config.get("model_type"))
            if self.KIND == PeftType.TRAINABLE_TOKENS:
                found = tokens.input_embedding(self.model, base_modules(self.model))
            if found is None and getattr(config, "target_parameters", None):
                return
            if found is None:
                raise ValueError(
                    "Please specify `target_modules` or `target_parameters`in `peft_config`"
                    if self.KIND == PeftType.LORA
                    else "Please specify `target_modules` in `peft_config`"
                )
            config.target_modules = found if isinstance(found, str) else set(found)
        if self.KIND == PeftType.IA3 and config.feedforward_modules is None:
            config.feedforward_modules = set(IA3_FEEDFORWARD.get(str(model_config.get("model_type")), ()))

    def _check_new_adapter_config(self, config: Any) -> None:
        if sum(getattr(c, "bias", "none") != "none" for c in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )
        if getattr(config, "bias", "none") not in ("none", "all") and not str(config.bias).endswith("_only"):
            raise NotImplementedError(f"Requested bias: {config.bias}, is not implemented.")
        parameters.check_set(config, self.peft_config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast: bool = True,
    ) -> None:
        """Build the adapter of `self.peft_config[adapter_name]` on a model. Nothing is changed if that fails."""
        if "." in adapter_name:
            raise KeyError(f'module name can\'t contain ".", got: {adapter_name}')
        config = self.peft_config[adapter_name]
        if getattr(config, "layer_replication", None):
            replicate_layers(model, config.layer_replication)
        everything = base_modules(model)
        fuse_config(config, model, everything)
        self._check_new_adapter_config(config)
        self._prepare_adapter_config(config, self.get_model_config(model))
        include_all_linear(config, model, everything)
        condense(config, everything)
        if state_dict and getattr(config, "target_parameters", None):
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is not supported -- "
                "when using `target_parameters`, please inject the adapter without the state_dict."
            )
        tokens.check(config, model, everything)
        source, others = tying.tied(config, model, everything)
        beyond = parameters.find(config, everything)
        targeted = find_targets(config, everything, state_dict, self.prefix, list(beyond))
        targeted += [p for p in others if source in targeted and p not in targeted]
        parameters.check(config, beyond, everything, targeted)
        for path in targeted:
            self._check_target(config, path, everything[path])
            if isinstance(everything.get(path.rpartition(".")[0]), nn.MultiheadAttention):
                raise ValueError(f"{path} is inside nn.MultiheadAttention, which never calls it: an adapter there would do nothing")
        method = method_of(config, targeted)
        if isinstance(method, LoRA):
            for path in targeted:
                starts.check(config, path, everything[path], method.scaled(path)[0])
        for path in targeted:
            if not method.accepts(everything[path]):
                raise ValueError(f"Target module {everything[path]} is not supported. {type(method).__name__} can adapt {method.site}.")
        with as_value_error(), torch.device("meta" if low_cpu_mem_usage else "cpu"):
            built = {} if method.elsewhere() else method.build_all({p: cast(Any, everything[p]) for p in targeted})
            built |= parameters.build(method, everything, beyond) | tokens.build(method, everything, targeted)
        there = fronts(model)
        owners = [*(m for _, m in framework(model)), *(f.slot[n] for f in there for n in f.names)] if there else []
        trains = {id(p): (p, p.requires_grad) for m in owners for p in m._parameters.values() if p is not None}
        for adapter in built.values():
            adapter.method = method
        put_door(model, built, adapter_name, [cast(Any, everything[p]) for p in targeted])
        for path, adapter in built.items():
            self._put(model, path, everything[path], adapter, adapter_name, config, autocast and autocast_adapter_dtype)
        tying.tie_factors(model, adapter_name, source, [p for p in others if p in targeted])
        self.targeted_module_names += [p for p in targeted if p not in self.targeted_module_names]
        self.targeted_parameter_names += [p for p in beyond if p not in self.targeted_parameter_names]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._freeze(model)
        wrap_whole(model, config, adapter_name, adapter_name in self.active_adapters)
        tying.tie_whole(model, config, adapter_name, adapter_name in self.active_adapters, source, others)
        tying.warn(config, model, everything)
        for p, flag in trains.values():
            p.requires_grad_(flag)

    def _check_target(self, config: Any, path: str, module: nn.Module) -> None:
        if hasattr(config, "fan_in_fan_out"):
            mend_fan_in_fan_out(config, module, is_conv1d(module))

    def _put(self, model: nn.Module, path: str, module: nn.Module, adapter: Adapter, name: str, config: Any, autocast: bool) -> None:
        with as_value_error():
            site = open_site(module, path)
        if not any(p.is_meta for p in adapter.parameters()):
            cast_adapter(adapter, module, autocast)
            place = device_of(module)
            if place.type not in ("cpu", "meta"):
                adapter.to(place)
        adapter.train(module.training)
        parent, _, last = path.rpartition(".")
        above = _seen(model, parent)
        if isinstance(adapter, TokenRows):
            tokens.put(model, above, last, module, adapter, name, config)
            return
        starts.begin(config, site, adapter)
        if isinstance(adapter, LowRankParameters):
            parameters.put(above, last, adapter, name, config)
            return
        here = cast(nn.Module, above._modules[last])
        front = next((f for f in site.__dict__.get("fronts", ()) if isinstance(f, LAYERS[self.KIND])), None)
        if front is None:
            front = front_class(self.KIND, module)(cast(Any, here))
            setattr(above, last, front)
        front.add(name, adapter, config)

    def _freeze(self, model: nn.Module) -> None:
        """Only adapters, copies and the biases that were asked for may train."""
        own = {id(p) for _, m in framework(model) if isinstance(m, ModulesToSaveWrapper) for p in m.parameters()}
        for _, module in framework(model):  # which shows no adapter's own
            for p in module._parameters.values():
                if p is not None and id(p) not in own:
                    p.requires_grad_(False)
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none") if name in self.peft_config else "none"
            if bias == "all":
                for key, p in model.named_parameters():
                    if key == "bias" or key.endswith(".bias"):
                        p.requires_grad_(True)
            elif bias != "none":
                for f in fronts(model):
                    if isinstance(f, self.tuner_layer_cls) and getattr(f.get_base_layer(), "bias", None) is not None:
                        cast(Tensor, f.bias).requires_grad_(True)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **kwargs: Any) -> None:
        """One more adapter; the ones that work stay the same."""
        self.peft_config[adapter_name] = peft_config
        self.inject_adapter(self.model, adapter_name, **kwargs)

    def cast(self, adapter_name: str, autocast: bool) -> None:
        """Bring an adapter to peft's dtype for its layers."""
        for front in fronts(self.model):
            if adapter_name in front.trains:
                cast_adapter(front.slot[adapter_name], front.get_base_layer(), autocast)

    # ---- all layers at once

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that work (and train, unless for inference) on every layer."""
        set_adapter(self.model, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else list(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not."""
        set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off every layer."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        merged = sorted({n for f in fronts(self.model) for n in f.merged_adapters if n == adapter_name})
        if merged:
            raise ValueError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        del self.peft_config[adapter_name]
        self.active_adapter = delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls) or []
        drop_door(self.model, adapter_name)

    def enable_adapter_layers(self) -> None:
        """Let the chosen adapters work again."""
        enable(self.model, True)

    def disable_adapter_layers(self) -> None:
        """The base's output, but for biases that were trained in place."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same output as the base "
                    "model would without adaption.",
                    stacklevel=3,
                )
        enable(self.model, False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights; `unmerge_adapter` gives the base's bytes back."""
        self._check_merge_allowed()
        for front in fronts(self.model):
            front.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Give every layer its own weights back, exactly."""
        for front in fronts(self.model):
            front.unmerge()

    def _check_merge_allowed(self) -> None:
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
        """The plain model with the adapters in its weights."""
        self._check_merge_allowed()
        return self._unload(True, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The plain model without adapters."""
        return self._unload(False)

    def _unload(self, merge: bool, safe: bool = False, names: list[str] | None = None) -> nn.Module:
        for front in fronts(self.model) if merge else ():
            front.merge(safe_merge=safe, adapter_names=names)
        for path, module in reversed(list(self.model.named_modules())):
            parent, _, last = path.rpartition(".")
            if isinstance(module, ModulesToSaveWrapper):
                put: nn.Module = module.unload_and_optionally_merge_module(merge, safe, names)
            elif isinstance(module, tokens.TrainableTokensWrapper):
                put = module.token_adapter  # the embedding itself by now: what is inside comes first
            elif isinstance(module, BaseTunerLayer):
                if merge:
                    module.merged_for_good()
                elif module.merged:
                    module.unmerge()
                put = module.leave()
            else:
                continue
            setattr(self.model.get_submodule(parent) if parent else self.model, last, put)
        drop_door(self.model)
        self.model.__dict__.pop("peft_config", None)
        if merge:
            _untied(self.model)
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
        if names is None:
            with told(self.model, None, offsets):
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        have = {n for f in fronts(self.model) for n in f.names}
        unknown = sorted({n for n in names if n != "__base__"} - have)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        many = [n for n in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else list(names)
        encoder = self.model.get_encoder() if beams and beams > 1 and hasattr(self.model, "get_encoder") else None
        inside = {id(m) for m in encoder.modules()} if encoder is not None and encoder is not self.model else set()
        handles = []
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
                mine = list(names) if id(module) in inside else many
                handles.append(module.register_forward_pre_hook(_with_names(mine), with_kwargs=True))
        try:
            with told(self.model, names, offsets):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(names: list[str]) -> Any:
    return lambda module, args, kwargs: (args, kwargs | {"adapter_names": names})


def _seen(model: nn.Module, path: str) -> nn.Module:
    """The base's module at a path, behind all fronts on the way."""
    at = behind(model)
    for part in path.split(".") if path else ():
        at = behind(cast(nn.Module, at._modules[part]))
    return at


def _untied(model: Any) -> None:
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    ends = [getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    if all(w is not None for w in ends) and ends[0].data_ptr() != ends[1].data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in the model config.",
            stacklevel=4,
        )


def shown_name(module: nn.Module) -> str:
    """The name of a module's class as it was before weft gave it a slot."""
    return base_class(module).__name__
