"""Trained tokens: peft's layer for them, its wrapper where they are trained beside LoRA, and how both come to a model.

A layer that is tied to the embedding shows the embedding's rows as its own, as weft's adapters have them in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from weft.compat.peft.layers import BaseTunerLayer, fronts
from weft.compat.peft.views import BufferDict
from weft.compat.peft.wrappers import AuxiliaryTrainingWrapper
from weft.core import Adapter, Method, behind, numbers, unmerged
from weft.methods.token_rows import TokenRows, TokenRowsBeside
from weft.methods.trainable_tokens import WithTokens


class TrainableTokensLayer(BaseTunerLayer):
    """An embedding with trained rows, or a head tied to one."""

    FAMILY: ClassVar[str] = "trainable_tokens"
    told: ClassVar[bool] = False
    adapter_layer_names: tuple[str, ...] = ("trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_indices", "trainable_tokens_original")
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "trainable_tokens_delta": nn.ParameterDict, "trainable_tokens_original": BufferDict,
    }  # fmt: skip

    def __init__(self, base_layer: Any, tied_adapter: TrainableTokensLayer | None = None, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.token_indices: dict[str, list[int]] = {}
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]  # in a list, and so no submodule
        self.alike = [self]  # all layers that have these rows in common
        if tied_adapter is not None:
            self.trainable_tokens_delta, self.trainable_tokens_original = (getattr(tied_adapter, name) for name in self.CONTAINERS)
            self.token_indices, self.alike = tied_adapter.token_indices, tied_adapter.alike
            self.alike.append(self)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows these are, if they are not this one's own."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def parts(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        return {"trainable_tokens_delta": {"": "E"}}  # beside LoRA too, where the wrapper makes the rest of the name

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        rows = cast(TokenRows, adapter)
        self.token_indices[name] = list(rows.tokens)
        held = numbers(unmerged(cast(Any, self.get_base_layer())))
        cast(Any, self.trainable_tokens_original)[name] = held[rows.index.to(held.device)].clone()

    def get_merged_weights(self, active_adapters: Iterable[str]) -> Tensor:
        """The base's weight with the rows of these adapters in it."""
        W = self.weight
        for name in active_adapters:
            rows = cast(TokenRows, self.slot[name])
            W = W.index_copy(0, rows.index, rows.E.to(W))
        return W

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        super().merge(safe_merge, adapter_names)
        site = self.get_base_layer()
        for other in self.alike:  # those that went through the same have one weight again
            if other is not self and other.merged_adapters == self.merged_adapters and other.merged:
                site._parameters["weight"] = other.get_base_layer()._parameters["weight"]


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """What stands at an embedding's place whose tokens are trained beside LoRA; `token_adapter` does the work."""

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, module_to_save: nn.Module, tied_adapter: TrainableTokensLayer | None = None) -> None:
        super().__init__(module_to_save)
        self._modules["original_module"] = None
        self.token_adapter = TrainableTokensLayer(module_to_save, tied_adapter)
        self.token_adapter.stored = tied_adapter is None

    def _error_message_name(self) -> str:
        return "trainable_token_indices"

    @property
    def original_module(self) -> nn.Module:
        """The embedding itself."""
        return self.token_adapter.base_layer

    @property
    def behind(self) -> nn.Module:
        return self.token_adapter

    @property
    def weight(self) -> Tensor:
        return self.token_adapter.get_merged_weights([] if self._disable_adapters else self.active_adapters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter":
                raise
            return getattr(self.token_adapter.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.trains)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose whose rows count, and train."""
        chosen = self.one_at_most(adapter_names)
        self.token_adapter.set_adapter(chosen, inference_mode)
        self._active_adapter = chosen

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Drop the rows of an adapter."""
        self._adapters.discard(adapter_name)
        was = adapter_name in self.active_adapters
        self.token_adapter.set_adapter([n for n in self.token_adapter.active_adapters if n != adapter_name])
        self.token_adapter.delete_adapter(adapter_name)
        if was:
            self.set_adapter([n for n in new_active_adapters or () if n in self._adapters][:1])


def check(config: Any, model: nn.Module, everything: Mapping[str, nn.Module]) -> None:
    """Raise what peft raises for tokens of a module that is not there, or that is trained whole."""
    given = getattr(config, "trainable_token_indices", None)
    if given is None:
        return
    meant: dict[int, Any] = {}  # a weight -> its tokens
    whole = [config.modules_to_save] if isinstance(config.modules_to_save, str) else config.modules_to_save or ()
    for name in list(given) if isinstance(given, Mapping) else [input_embedding(model, everything)]:
        paths = [p for p in everything if p == name or p.endswith(f".{name}")]
        if any(p == w or p.endswith(f".{w}") for p in paths for w in whole):
            raise ValueError(
                f"The embedding layer is already marked to be trained fully: leave {name} out of `modules_to_save`, or out of "
                "`trainable_token_indices`"
            )
        for path in paths if isinstance(given, Mapping) and config.ensure_weight_tying else ():
            if meant.setdefault(id(everything[path]._parameters.get("weight")), given[name]) != given[name]:
                raise ValueError(
                    f"Cannot ensure weight tying when different token indices are specified for tied layers: {dict(given)}. Name the same "
                    "tokens for all of them, or set ensure_weight_tying=False."
                )
        if not paths:
            raise ValueError(f"Target modules { {name} } not found in the base model. Please check the target modules and try again.")


def input_embedding(model: nn.Module, everything: Mapping[str, nn.Module]) -> str:
    """The path of a model's input embedding; where a model does not say it, "embed_tokens"."""
    found = behind(model.get_input_embeddings()) if hasattr(model, "get_input_embeddings") else None
    return next((p for p, m in everything.items() if m is found), "embed_tokens")


def build(method: Method, everything: Mapping[str, nn.Module], targeted: Sequence[str]) -> dict[str, Adapter]:
    """The adapters of the layers whose tokens a method trains, by path; those that follow another one come last."""
    if not isinstance(method, WithTokens):
        found = method.beyond(everything) if method.elsewhere() else {}
    else:
        found = WithTokens.beyond(method, everything)
    for path in found:
        others = [f for f in everything[path].__dict__.get("fronts", ()) if not isinstance(f, TrainableTokensLayer)]
        if others or (path in targeted and isinstance(method, WithTokens)):
            raise TypeError(f"trainable_token_indices cannot be applied to modules of type {type(others[0]) if others else 'lora.Layer'}: "
                            f"{path} (or the embedding that it is tied to) is adapted as a layer, too")  # fmt: skip
    for path in targeted if not found or isinstance(method, WithTokens) else ():
        if any(isinstance(f, TrainableTokensLayer) for f in everything[path].__dict__.get("fronts", ())):
            raise ValueError(f"Target module {path} is not supported: another adapter trains its tokens.")
    rows = {p: a for p, a in found.items() if isinstance(a, TokenRows)}
    return dict(sorted(rows.items(), key=lambda item: item[1].follows))


def put(model: nn.Module, above: nn.Module, last: str, site: nn.Module, adapter: TokenRows, name: str, config: Any) -> None:
    """Show the rows at their layer's place, those of a tied layer as the embedding's."""
    if getattr(config, "init_weights", True) is False and not adapter.follows and not adapter.E.is_meta:
        nn.init.normal_(adapter.E)
    here, beside = cast(Any, above._modules[last]), isinstance(adapter, TokenRowsBeside)
    tied = None
    if adapter.follows:
        many = [f for f in fronts(model) if isinstance(f, TrainableTokensLayer) and name in f.trains]
        tied = next(f for f in many if f.slot[name]._parameters is adapter._parameters and f.tied_adapter is None)
    front = next((f for f in site.__dict__.get("fronts", ()) if isinstance(f, TrainableTokensLayer)), None)
    if front is None:
        made: Any = TrainableTokensWrapper(here, tied) if beside else TrainableTokensLayer(here, tied)
        setattr(above, last, made)
        front = made.token_adapter if beside else made
    elif front.tied_adapter is not tied:
        raise ValueError(f"adapter {name!r} ties {last} in another way than those that are there: name the same modules for its tokens")
    front.add(name, adapter, config)
    if beside:
        cast(Any, above._modules[last])._adapters.add(name)
