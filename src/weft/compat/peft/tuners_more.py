"""`base_model` for each method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.compat.peft import families, layers_lora
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import fronts
from weft.compat.peft.tuner import BaseTuner
from weft.compat.peft.weighted import add_weighted_adapter, add_weighted_ia3
from weft.core import Adapter


class LoraModel(BaseTuner):
    """LoRA on a model."""

    prefix = "lora_"
    tuner_layer_cls = layers_lora.LoraLayer
    KIND = PeftType.LORA
    add_weighted_adapter = add_weighted_adapter


class RankAllocator:
    """The schedule of ranks. The importance of triplets is kept by the adapters themselves."""

    def __init__(self, model: AdaLoraModel, peft_config: Any, adapter_name: str) -> None:
        self.model, self.peft_config, self.adapter_name = model, peft_config, adapter_name

    def set_total_step(self, total_step: int) -> None:
        """Say how many steps there are, where that was not known before."""
        self.peft_config.total_step = total_step

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(how many triplets all layers may have after this step, whether they are shared out in it)."""
        config, parts = self.peft_config, self.model._parts()
        method: Any = next(iter(parts.values())).method
        due = step > config.total_step - config.tfinal or (step > config.tinit and step % config.deltaT == 0)
        return method.budget(step, config.total_step, len(parts)), due


class AdaLoraModel(LoraModel):
    """AdaLoRA on a model."""

    tuner_layer_cls = layers_lora.AdaLoraLayer
    KIND = PeftType.ADALORA

    @property
    def trainable_adapter_name(self) -> str:
        """The one adapter that trains."""
        return next((n for n, c in self.peft_config.items() if not c.inference_mode), self.active_adapters[0])

    @property
    def rankallocator(self) -> RankAllocator:
        return RankAllocator(self, self.peft_config[self.trainable_adapter_name], self.trainable_adapter_name)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if sum(not c.inference_mode for c in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 trainable adapter. When using multiple adapters, set inference_mode to True for "
                "all adapters except the one you want to train."
            )

    def _parts(self) -> dict[str, Adapter]:
        name = self.trainable_adapter_name
        return {p: m.slot[name] for p, m in self.model.named_modules() if isinstance(m, layers_lora.AdaLoraLayer) and name in m.trains}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        if getattr(out, "loss", None) is not None and self.training and not any(f.disable_adapters for f in fronts(self.model)):
            out.loss = out.loss + sum(adapter.penalty() for adapter in self._parts().values())
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """Share the ranks out again: to be called after every optimiser step, before the gradients are cleared; steps count from 1.

        What is left stands in `peft_config[...].rank_pattern` after each sharing-out.
        """
        parts, name = self._parts(), self.trainable_adapter_name
        config, last = self.peft_config[name], self.peft_config[name].total_step - self.peft_config[name].tfinal
        next(iter(parts.values())).method.after_step(parts, global_step - 1, config.total_step)
        if global_step == last or (config.tinit < global_step < last and global_step % config.deltaT == 0):
            kept = {p: (~a.dropped).tolist() for p, a in parts.items()}  # type: ignore[operator, union-attr]
            config.rank_pattern = {f"{p}.lora_E.{name}": flags for p, flags in kept.items()}

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Not offered for AdaLoRA, as in peft."""
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")


class IA3Model(BaseTuner):
    """(IA)³ on a model."""

    prefix = "ia3_"
    tuner_layer_cls = families.IA3Layer
    KIND = PeftType.IA3
    add_weighted_adapter = add_weighted_ia3


class LoHaModel(BaseTuner):
    """LoHa on a model."""

    prefix = "hada_"
    tuner_layer_cls = families.LoHaLayer
    KIND = PeftType.LOHA


class LoKrModel(BaseTuner):
    """LoKr on a model."""

    prefix = "lokr_"
    tuner_layer_cls = families.LoKrLayer
    KIND = PeftType.LOKR


class OFTModel(BaseTuner):
    """OFT on a model."""

    prefix = "oft_"
    tuner_layer_cls = families.OFTLayer
    KIND = PeftType.OFT


class VeraModel(BaseTuner):
    """VeRA on a model."""

    prefix = "vera_lambda_"
    tuner_layer_cls = families.VeraLayer
    uses_shared_state = True
    KIND = PeftType.VERA

    @property
    def vera_A(self) -> dict[str, Tensor]:
        """By adapter, the A that all layers share."""
        return {n: a for f in fronts(self.model) if isinstance(f, families.VeraLayer) for n, a in f.vera_A.items()}

    @property
    def vera_B(self) -> dict[str, Tensor]:
        """By adapter, the B that all layers share."""
        return {n: b for f in fronts(self.model) if isinstance(f, families.VeraLayer) for n, b in f.vera_B.items()}


class LNTuningModel(BaseTuner):
    """LayerNorm tuning on a model."""

    prefix = "ln_tuning_"
    tuner_layer_cls = families.LNTuningLayer
    KIND = PeftType.LN_TUNING


class TrainableTokensModel(BaseTuner):
    """Trainable tokens on a model."""

    prefix = "trainable_tokens_"
    tuner_layer_cls = families.TrainableTokensLayer
    KIND = PeftType.TRAINABLE_TOKENS


TUNERS: dict[PeftType, type[BaseTuner]] = {
    t.KIND: t for t in (LoraModel, AdaLoraModel, IA3Model, LoHaModel, LoKrModel, OFTModel, VeraModel, LNTuningModel, TrainableTokensModel)
}
PREFIXES = {kind: tuner.prefix for kind, tuner in TUNERS.items()}
