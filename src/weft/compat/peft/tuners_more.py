"""`base_model` for each method."""

from __future__ import annotations

from typing import Any

from weft.compat.peft import families, layers_lora
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import fronts
from weft.compat.peft.tuner import BaseTuner
from weft.compat.peft.weighted import add_weighted_adapter
from weft.core import Adapter


class LoraModel(BaseTuner):
    """LoRA on a model."""

    prefix = "lora_"
    tuner_layer_cls = layers_lora.LoraLayer
    KIND = PeftType.LORA
    add_weighted_adapter = add_weighted_adapter


class AdaLoraModel(LoraModel):
    """AdaLoRA on a model."""

    tuner_layer_cls = layers_lora.AdaLoraLayer
    KIND = PeftType.ADALORA

    def _parts(self) -> dict[str, Adapter]:
        name = self.active_adapters[0]
        return {p: m.slot[name] for p, m in self.model.named_modules() if isinstance(m, layers_lora.AdaLoraLayer) and name in m.trains}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        if getattr(out, "loss", None) is not None and self.training and not any(f.disable_adapters for f in fronts(self.model)):
            out.loss = out.loss + sum(adapter.penalty() for adapter in self._parts().values())
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """Share the ranks out again: to be called after every optimiser step, before the gradients are cleared; steps count from 1."""
        parts = self._parts()
        config = self.peft_config[self.active_adapters[0]]
        next(iter(parts.values())).method.after_step(parts, global_step - 1, config.total_step)


class IA3Model(BaseTuner):
    """(IA)³ on a model."""

    prefix = "ia3_"
    tuner_layer_cls = families.IA3Layer
    KIND = PeftType.IA3


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
