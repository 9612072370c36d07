"""A base packed while it streams in: one tensor is read, packed and placed, then the next.

The skeleton, conversions of checkpoints (renamed or fused weights), ties and buffers are transformers' own work: it loads from a state
dict whose values are made when it asks for them (`Lazy`), through its public quantizer interface, whose one operation here puts a packed
layer where the plain one stood on the meta device. Host memory peaks at the packed model and one tensor; on an accelerator so does the
device's, since a tensor is packed where it will stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from weft.core import WeftError
from weft.quant import install

Tensors = dict[str, Tensor]
Wants = Callable[[nn.Module], dict[str, list[str]]]
Pack = Callable[[str, Tensor], tuple[str, Tensors]]  # (name of a weight, its values) -> (format, its packed tensors, where they will stay)



@register_quantization_config("weft")
class Streaming(QuantizationConfigMixin):
    """How one load goes: which weights are packed, and by what; and what came of it."""

    def __init__(self, wants: Wants, pack: Pack, done: Callable[[str, Tensor, str, Tensors], None] | None) -> None:
        self.quant_method = "weft"
        self.wants, self.pack, self.done = wants, pack, done
        self.layers: dict[str, list[str]] = {}  # path -> names of the parameters to pack
        self.waiting: dict[str, dict[str, tuple[str, torch.Size, Tensors]]] = {}  # of a layer with several: those packed so far
        self.wrong: list[str] = []  # weights of another shape, told together at the end


@register_quantizer("weft")
class _Quantizer(HfQuantizer):
    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs | {"pre_quantized": False})
        self.names: set[str] | None = None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.names is None:  # once, while every layer is still the plain one
            self.quantization_config.layers = self.quantization_config.wants(model)
            layers = self.quantization_config.layers.items()
            self.names = {f"{path}.{name}" if path else name for path, names in layers for name in names}
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Place(self.quantization_config)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Place(ConversionOps):
    """Puts each weight into its packed layer; hands nothing back that transformers would have to set."""

    def __init__(self, streaming: Streaming) -> None:
        self.streaming = streaming

    @torch.no_grad()
    def convert(
        self, input_dict: Mapping[str, Any], model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:  # fmt: skip
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            if missing_keys is not None:
                missing_keys.discard(name)
            shape = module._parameters[key].shape
            if value.shape != shape:
                self.streaming.wrong.append(f"{name} (is {tuple(value.shape)}, should be {tuple(shape)})")
                continue
            base, tensors = self.streaming.pack(name, value)
            if self.streaming.done is not None:
                self.streaming.done(name, value, base, tensors)
            waiting = self.streaming.waiting.setdefault(path, {})
            waiting[key] = base, shape, tensors
            if set(waiting) == set(self.streaming.layers[path]):
                del self.streaming.waiting[path]
                held = {k: t for k, (_, _, t) in waiting.items()}
                new = install(model, path, held, {k: s for k, (_, s, _) in waiting.items()}, base, value.dtype)
                for mine in (new, *(new._parameters[k] for k in waiting)):
                    mine._is_hf_initialized = True  # type: ignore[union-attr,assignment]  # else transformers draws random numbers for it
        return {}


def load(
    cls: Any, config: Any, state: Mapping[str, Any], wants: Wants, pack: Pack, dtype: torch.dtype,
    done: Callable[[str, Tensor, str, Tensors], None] | None = None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The model of a class and configuration, its weights from `state` (name to `Lazy`), and transformers' account of the keys.

    Args:
        wants: which parameters of the skeleton are to be packed, by the path of their layer.
        pack: packs one.
        dtype: of everything that is not packed.
        done: called with name, values, format and packed tensors of each.
    Raises:
        WeftError: what reading or packing raises, and packed weights of another shape than the configuration's.
    """
    streaming = Streaming(wants, pack, done)
    model, info = cls.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, quantization_config=streaming, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():  # what `_assign_is_quantized` marked, so that `config` is again what was in the folder
        if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
    if streaming.wrong:
        more = f" and {len(streaming.wrong) - 5} more" if len(streaming.wrong) > 5 else ""
        raise WeftError(f"the weights do not belong to the config.json; of another shape: {', '.join(streaming.wrong[:5])}{more}")
    return model, info
