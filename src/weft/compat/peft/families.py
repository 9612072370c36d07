"""The fronts of the methods beside LoRA, and which front a method's layer gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from weft.compat.peft import layers_lora
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.tokens import TrainableTokensLayer
from weft.compat.peft.views import Live
from weft.core import Adapter, is_linear

_PARAMETERS = nn.ParameterDict


class IA3Layer(BaseTunerLayer):
    """A layer with (IA)³ vectors."""

    FAMILY: ClassVar[str] = "ia3"
    told: ClassVar[bool] = False
    adapter_layer_names: tuple[str, ...] = ("ia3_l",)
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {"ia3_l": _PARAMETERS}

    def __init__(self, base_layer: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.is_feedforward = False

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        vector: Any = self.ia3_l
        self.is_feedforward = vector[name].shape[0] == 1


class LycorisLayer(BaseTunerLayer):
    """What LoHa's and LoKr's layers share."""

    other_param_names: tuple[str, ...] = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def __init__(self, base_layer: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.module_dropout: dict[str, float] = {}
        self.rank_dropout_scale: dict[str, bool] = {}

    @property
    def scaling(self) -> Live:
        """By adapter, what its update is multiplied by."""
        return Live(self.slot, "scale", self.names)

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        self.r[name], self.alpha[name] = config.r, config.alpha
        self.rank_dropout[name], self.module_dropout[name] = config.rank_dropout, config.module_dropout
        self.rank_dropout_scale[name] = bool(getattr(config, "rank_dropout_scale", False))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter's update by this factor over its own."""
        if adapter in self.trains:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the adapters that work."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.trains:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`."""
        for name in self.active_adapters:
            if name in self.trains:
                self.scaling[name] = self.alpha[name] / self.r[name] if scale is None else self.scaling[name] / scale


class LoHaLayer(LycorisLayer):
    """A layer with LoHa adapters."""

    FAMILY: ClassVar[str] = "loha"
    adapter_layer_names: tuple[str, ...] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = dict.fromkeys(adapter_layer_names, _PARAMETERS)


class LoKrLayer(LycorisLayer):
    """A layer with LoKr adapters."""

    FAMILY: ClassVar[str] = "lokr"
    adapter_layer_names: tuple[str, ...] = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )  # fmt: skip
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = dict.fromkeys(adapter_layer_names, _PARAMETERS)


class OFTLayer(BaseTunerLayer):
    """A layer with OFT adapters."""

    FAMILY: ClassVar[str] = "oft"
    adapter_layer_names: tuple[str, ...] = ("oft_R",)
    other_param_names: tuple[str, ...] = ("r", "oft_block_size")
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {"oft_R": nn.ModuleDict}

    def __init__(self, base_layer: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.oft_block_size: dict[str, int] = {}

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        made: Any = adapter
        self.r[name], self.oft_block_size[name] = made.blocks, made.size


class VeraLayer(BaseTunerLayer):
    """A layer with VeRA vectors."""

    FAMILY: ClassVar[str] = "vera"
    adapter_layer_names: tuple[str, ...] = ("vera_lambda_b", "vera_lambda_d")
    other_param_names: tuple[str, ...] = ("vera_A", "vera_B", "r")
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {"vera_lambda_b": _PARAMETERS, "vera_lambda_d": _PARAMETERS}

    @property
    def r(self) -> dict[str, int]:
        """By adapter, its rank."""
        vectors: Any = self.vera_lambda_d
        return {name: len(vectors[name]) for name in self.names}

    @property
    def vera_A(self) -> dict[str, Tensor]:
        """By adapter, the A that all layers share (rank, largest in)."""
        return {name: self._shared(name)[0] for name in self.names}

    @property
    def vera_B(self) -> dict[str, Tensor]:
        """By adapter, the B that all layers share (largest out, rank)."""
        return {name: self._shared(name)[1] for name in self.names}

    def _shared(self, name: str) -> tuple[Tensor, Tensor]:
        made: Any = self.slot[name]
        return made.shared.on(made.d.device)  # type: ignore[no-any-return]


class LNTuningLayer(BaseTunerLayer):
    """A norm with trained copies."""

    FAMILY: ClassVar[str] = "ln_tuning"
    adapter_layer_names: tuple[str, ...] = ("ln_tuning_layers",)
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {"ln_tuning_layers": nn.ModuleDict}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.active_adapters) != 1 and not self.disable_adapters and not self.merged and "adapter_names" not in kwargs:
            raise ValueError(
                f"Trying to run forward with {len(self.active_adapters)} active adapters, but LN tuning does not allow inference with "
                "more than one adapter at a time"
            )
        return super().forward(*args, **kwargs)


LAYERS: dict[PeftType, type[BaseTunerLayer]] = {
    PeftType.LORA: layers_lora.LoraLayer, PeftType.ADALORA: layers_lora.AdaLoraLayer, PeftType.IA3: IA3Layer, PeftType.LOHA: LoHaLayer,
    PeftType.LOKR: LoKrLayer, PeftType.OFT: OFTLayer, PeftType.VERA: VeraLayer, PeftType.LN_TUNING: LNTuningLayer,
    PeftType.TRAINABLE_TOKENS: TrainableTokensLayer,
}  # fmt: skip
_MADE: dict[tuple[type, str], type[BaseTunerLayer]] = {}


def front_class(kind: PeftType, base: Any) -> type[BaseTunerLayer]:
    """The class of the front for a layer: `Linear`, `Conv2d`, ... of the method's family, which is importable under peft's path."""
    family = LAYERS[kind]
    if kind == PeftType.LORA:
        return layers_lora.dispatch(base)
    if kind == PeftType.ADALORA:
        return layers_lora.SVDLinear
    if kind in (PeftType.LN_TUNING, PeftType.TRAINABLE_TOKENS):
        return family
    name = "Linear" if is_linear(base) else next(c.__name__ for c in type(base).__mro__ if c.__module__.startswith("torch.nn"))
    return named(family, name)


def named(family: type[BaseTunerLayer], name: str) -> type[BaseTunerLayer]:
    """The class `name` of a family; one and the same each time."""
    if (family, name) not in _MADE:
        made = type(f"{family.__name__}{name}", (family,), {"shown": name, "__module__": __name__, "__doc__": family.__doc__})
        _MADE[family, name] = globals()[made.__name__] = made
    return _MADE[family, name]
