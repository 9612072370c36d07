"""Prompt methods on a PeftModel: weft's prompt adapters stand on the model itself as a site, and `prompt_encoder` is a view of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import DynamicCache

from weft.adapters.attach import device_of
from weft.adapters.formats import format_for, key
from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.methods import method_of
from weft.compat.peft.state import live_names
from weft.compat.peft.views import HiddenSlot, Through, hide
from weft.compat.peft.wrappers import choose_whole, wrap_whole
from weft.core import Adapter, Method, Site, activate, modules, open_site, sites, slot_of

BARE = "prompt_embeddings"
# a parameter of weft's prompt adapters -> its place in peft's encoders; what begins with mlp_ or lstm_ follows a rule
_PLACES = {"P": "embedding.weight", "E": "embedding.weight", "W1": "transform.0.weight", "b1": "transform.0.bias",
           "W2": "transform.2.weight", "b2": "transform.2.bias"}  # fmt: skip


class Prompting:
    """The part of PeftModel that has to do with virtual tokens."""

    base_model: Any
    peft_config: dict[str, Any]
    active_adapter: Any

    def attach_prompt(self, name: str, config: Any) -> None:
        """Build a prompt adapter on the model."""
        fill(config, self.base_model)
        me: Any = self
        if "prompt_encoder" not in me._modules:
            self.base_model.requires_grad_(False)
            me.prompt_encoder = nn.ModuleDict()
            me.prompt_tokens = {}
        self._put(name, method_of(config, []))
        me.prompt_tokens[name] = torch.arange(config.num_virtual_tokens * config.num_transformer_submodules)
        wrap_whole(self.base_model, config, name, name == self.active_adapter)
        self.use_prompt(self.active_adapter, self.peft_config[self.active_adapter].inference_mode)

    def _put(self, name: str, method: Method) -> None:
        with as_value_error():
            built = method.build_all({"": cast(Site, self.base_model)})
            everything = dict(modules(self.base_model))
            for path, adapter in built.items():
                adapter.method = method
                site = open_site(everything[path], path)
                hide(site)
                slot_of(site)[name] = adapter.to(device_of(everything[path])).train(everything[path].training)
        cast(Any, self).prompt_encoder[name] = encoder_view(built[""])

    def _whole(self, name: str) -> Any:
        return slot_of(self.base_model)[name]

    def _doors(self) -> Iterator[Site]:
        for site in sites(self.base_model).values():
            if isinstance(slot_of(site), HiddenSlot) and "fronts" not in site.__dict__:
                yield site

    def use_prompt(self, name: str, inference_mode: bool = False) -> None:
        """Let one prompt work, and train unless it is for inference."""
        for site in self._doors():
            activate(site, (name,))
        for other in self.peft_config:
            if other in slot_of(self.base_model):
                self._whole(other).requires_grad_(other == name and not inference_mode)
        choose_whole(self.base_model, name, inference_mode)

    def remove_prompt(self, name: str) -> None:
        """Take a prompt off; the first of those left works instead."""
        me: Any = self
        for site in self._doors():
            if name in slot_of(site):
                del slot_of(site)[name]
                activate(site, tuple(n for n in site.active if n != name))
        del me.prompt_encoder[name], me.prompt_tokens[name]
        if self.active_adapter == name:
            self.active_adapter = next(iter(self.peft_config), [])
            if self.active_adapter:
                text = f"Adapter {name} was active which is now deleted. Setting active adapter to {self.active_adapter}."
                warnings.warn(text, stacklevel=3)
                self.use_prompt(self.active_adapter)

    @contextmanager
    def without_prompt(self) -> Iterator[None]:
        """Inside, no prompt works."""
        before = [(site, site.active) for site in self._doors()]
        for site, _ in before:
            activate(site, ())
        try:
            yield
        finally:
            for site, names in before:
                activate(site, names)

    @property
    def word_embeddings(self) -> nn.Module:
        """The model's input embeddings."""
        return cast(nn.Module, self.base_model.get_input_embeddings())

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """(virtual tokens, width) what a prompt's file holds."""
        return cast(Tensor, self._whole(adapter_name).values().detach().cpu())

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """(rows, virtual tokens, width) the vectors in front of every row; of a prefix, the cache that it fills."""
        whole = self._whole(self.active_adapter)
        if not hasattr(whole, "block"):
            return whole.values().repeat(batch_size, 1, 1)
        blocks = [whole.block(i) for i in range(whole.layers)]
        return DynamicCache([(k.expand(batch_size, -1, -1, -1), v.expand(batch_size, -1, -1, -1)) for k, v in blocks])

    def prompt_state(self, name: str) -> dict[str, Tensor]:
        """A prompt as peft's file has it."""
        me: Any = self
        state = me.state_dict()
        return {BARE: self.get_prompt_embedding_to_save(name)} | {k: state[v] for k, v in live_names(me, name, state).items()}

    def prompt_network(self, name: str) -> dict[str, Tensor]:
        """The weights of the network that makes a prompt, which weft stores beside it, so that training can go on."""
        whole: Adapter = self._whole(name)
        return {key("", whole, n): p.detach() for n, p in whole._parameters.items() if p is not None and n != "P"}

    def load_prompt_state(self, name: str, state: Mapping[str, Tensor]) -> Any:
        """Put a file's tensors into a prompt. Without its network, the vectors themselves become the adapter."""
        whole = self._whole(name)
        config = {"peft_type": getattr(self.peft_config[name].peft_type, "value", self.peft_config[name].peft_type)}
        meant = format_for(config).told(whole.method, list(state))
        if meant != whole.method:
            self._put(name, meant)
            whole = self._whole(name)
            self.use_prompt(self.active_adapter, self.peft_config[self.active_adapter].inference_mode)
        for parameter, p in whole._parameters.items():
            value = state.get(key("", whole, parameter))
            if p is None or value is None:
                continue
            if p.shape != value.shape:
                name = key("", whole, parameter)
                raise RuntimeError(f"size mismatch for {name}: {tuple(value.shape)} in the file, {tuple(p.shape)} here")
            p.data.copy_(value)
        me: Any = self
        own = live_names(me, name, me.state_dict())
        me.load_state_dict({own[k]: v for k, v in state.items() if k in own}, strict=False)
        return _IncompatibleKeys([], [])


def encoder_view(adapter: Adapter) -> nn.Module:
    """A prompt adapter as peft's encoder: `embedding.weight` and, where there is one, the network's layers."""
    top = nn.Module()
    for name in adapter._parameters:
        head, _, rest = name.partition("_")
        place = _PLACES.get(name) or f"{head}_head." + (rest.replace("_", ".") if head == "mlp" else rest)
        *path, last = place.split(".")
        at = top
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = cast(nn.Module, at._modules[part])
        if not isinstance(at.__dict__["_parameters"], Through):
            at.__dict__["_parameters"] = Through({})
        at.__dict__["_parameters"].places[last] = (adapter, name)
    return top


def fill(config: Any, model: Any) -> None:
    """Write into a configuration what it leaves to the model: layers, heads, widths (a prefix: those of the keys)."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config

    def read(field: str, *names: str) -> Any:
        found = next((v for n in names if (v := getattr(text, n, None)) is not None), None)
        if found is None:
            raise ValueError(f"Please specify `{field}` in `peft_config`")
        return found

    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    if config.num_layers is None:
        config.num_layers = read("num_layers", "num_hidden_layers", "num_layers", "n_layer")
    if config.token_dim is None:
        config.token_dim = read("token_dim", "hidden_size", "n_embd", "d_model")
    if config.num_attention_heads is None:
        config.num_attention_heads = read("num_attention_heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    heads = getattr(text, "num_key_value_heads", None)
    if config.peft_type == "PREFIX_TUNING" and heads:
        size = getattr(text, "head_dim", None) or config.token_dim // config.num_attention_heads
        config.token_dim, config.num_attention_heads = size * heads, heads
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim
