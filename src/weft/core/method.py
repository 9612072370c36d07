"""A method: the hyper-parameters of a way to fine-tune, which layers it adapts, and how it builds their adapters."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from torch import nn

from weft.core.adapter import Adapter
from weft.core.errors import WeftError
from weft.core.names import several
from weft.core.site import Site

METHODS: dict[str, type[Method]] = {}  # every concrete method by the name of its class
PEFT = {  # what peft calls a hyper-parameter, or what is a method of its own here
    "r": "rank", "init_r": "rank", "target_r": "target_rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "vera_dropout": "dropout",
    "target_modules": "targets", "exclude_modules": "exclude", "use_rslora": "rslora", "init_lora_weights": "init", "init_weights": "init",
    "use_dora": "weft.DoRA", "alora_invocation_tokens": "weft.ALoRA", "deltaT": "delta_t", "orth_reg_weight": "orth_weight",
    "oft_block_size": "block_size", "projection_prng_key": "seed", "feedforward_modules": "feedforward", "token_indices": "tokens",
    "num_virtual_tokens": "tokens", "num_transformer_submodules": "copies", "prompt_tuning_init": "init", "prompt_tuning_init_text": "text",
    "tokenizer_name_or_path": "tokenizer", "prefix_projection": "projection", "encoder_hidden_size": "hidden",
    "encoder_reparameterization_type": "encoder", "encoder_num_layers": "depth", "encoder_dropout": "dropout",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters of a PEFT method. A subclass is one file in methods/; defining it registers it.

    Args:
        targets: Which layers to adapt: "all-linear" (every linear layer but the output head), "auto" (what the method's paper adapts,
            for methods that know it), or one or several of: a name
            ("q_proj", "layers.0.mlp.up_proj": the path or its end), a glob ("*.layers.1?.*"), a regular expression ("re:.*(q|v)_proj").
        exclude: Layers to leave out, written like targets.
        modules_to_save: Modules trained whole beside the adapters and stored with them, written like targets: a classifier's head, say.
        layers_to_transform: Only the targets inside these layers of the model, by their numbers. A target written as a whole path counts
            wherever it is.
        layers_pattern: What the list of layers is called ("layers", "h"), where a path has several numbers; else the first one counts.
    """

    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    modules_to_save: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()

    layered: ClassVar[bool] = True  # whether it stands on layers; else on the model as one
    mergeable: ClassVar[bool] = True  # whether layer and adapter together are one plain layer
    default_lr: ClassVar[float] = 2e-4  # the learning rate that `weft train` starts from, for AdamW
    site: ClassVar[str] = "layers"  # for messages: what this method can adapt

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.__name__] = cls

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Raises WeftError for what is no hyper-parameter of this method, with the name that is meant."""
        known = [f.name for f in fields(cls)]
        if wrong := [f"{cls.__name__} has no {key!r}; {_hint(key, known)}" for key in values if key not in known]:
            raise WeftError("\n".join(wrong))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kinds = {"int": "a whole number", "float": "a number"}
        wrong = [
            f"{f.name}={value!r}: expected {kinds[str(f.type)]}" for f in fields(self)
            if str(f.type) in kinds and isinstance(value := getattr(self, f.name), str | bool | None)
        ]  # fmt: skip
        if self.targets is None:
            wrong.append("targets=None: write 'all-linear', 'auto' or names of layers, or leave it out")
        if wrong:
            raise WeftError(f"{type(self).__name__} cannot be built with {'; nor with '.join(wrong)}")
        # a list is welcome, and so is one number, but a frozen value must be hashable
        for name in ("targets", "exclude", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        if self.layers_to_transform is None and not self.layers_pattern:
            return
        if not self.layered:
            raise WeftError(f"{type(self).__name__} stands on the model and not on its layers: leave out layers_to_transform")
        numbers = self.layers_to_transform or ()
        for pattern in several(self.layers_pattern):
            try:
                re.compile(pattern)
            except re.error as e:
                raise WeftError(f"layers_pattern={pattern!r}: {e}; write what the list of layers is called, 'layers' say") from None
        if not numbers or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise WeftError(f"layers_to_transform={self.layers_to_transform!r}: write the numbers of layers, from 0, or leave it out"
                            + " and layers_pattern with it" * bool(self.layers_pattern))  # fmt: skip

    @abstractmethod
    def accepts(self, layer: nn.Module) -> bool:
        """Whether this method can adapt such a layer."""

    def takes(self, path: str) -> bool:
        """Whether a layer that `targets` means lies in one of `layers_to_transform`, by its path."""
        if self.layers_to_transform is None or path in several(self.targets):
            return True
        names = (re.match(rf"(?:.*?\.)??{name}\.(\d+)\.", f"{path}.") for name in several(self.layers_pattern or "[^.]*"))
        found = next((match for match in names if match), None)  # lazily: the layer's number, not that of an expert inside it
        return found is not None and int(found[1]) in self.layers_to_transform

    def auto(self, able: Mapping[str, nn.Module], heads: Collection[str]) -> Collection[str]:
        """The paths that targets="auto" means, out of those that this method can adapt; `heads` are those of the output head."""
        raise WeftError(f'{type(self).__name__} has no targets="auto": name the layers, or write "all-linear"')

    @abstractmethod
    def build(self, layer: Site, path: str) -> Adapter:
        """The adapter of one layer, starting as the identity unless the paper says otherwise."""

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        """The adapters of all layers by path. Override it to share state between layers."""
        return {path: self.build(layer, path) for path, layer in layers.items()}

    def also(self, modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        """Parameters of the base that this method trains whole, beside the adapters: module path -> names ("bias",)."""
        return {}

    def beyond(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        """Adapters of modules that are found in another way than by `targets`, by path."""
        return {}

    def elsewhere(self) -> bool:
        """Whether `beyond` finds all that is adapted, and `targets` no layer."""
        return False

    def lr_scale(self, parameter: str) -> float:
        """The learning rate of an adapter's parameter over that of the run."""
        return 1.0

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:  # noqa: B027 (most methods do nothing here)
        """Called after every optimiser step, for methods that move their rank or budget while training."""

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., hyper-parameters}, fit for JSON and for `Method.from_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": type(self).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> Method:
        """The method that `to_dict` described. Raises WeftError on an unknown name or hyper-parameter."""
        values = dict(given)
        cls = METHODS.get(str(values.pop("name", "")))
        if cls is None:
            raise WeftError(f"unknown method {given.get('name')!r}; there are {', '.join(sorted(METHODS))}")
        return cls(**values)


def _hint(key: str, known: Collection[str]) -> str:
    named = PEFT.get(key, key)
    if named.startswith("weft."):
        return f"that is a method of its own, {named}"
    near = [named] if named in known else get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
