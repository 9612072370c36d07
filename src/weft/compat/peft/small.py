"""Small helpers that scripts import from the inner modules of peft."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import file_exists
from packaging import version
from torch import Tensor, nn

from weft.compat.peft.switching import set_adapter
from weft.quant import dense

Function = TypeVar("Function", bound=Callable[..., Any])
_HERE = version.parse(transformers.__version__).release
is_transformers_ge_v5, is_transformers_ge_v5_1_0, is_transformers_ge_v5_4_0 = (v <= _HERE for v in ((5, 0), (5, 1), (5, 4)))
is_transformers_ge_v5_6_0, is_transformers_ge_v5_13_0, is_transformers_ge_v5_17_0 = (v <= _HERE for v in ((5, 6), (5, 13), (5, 17)))
is_transformers_le_4_53 = _HERE < (4, 54)
is_transformers_dtensor_tp = False
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_set_adapter = set_adapter


def _no() -> bool:
    return False


is_bnb_available = is_bnb_4bit_available = is_auto_gptq_available = is_gptqmodel_available = is_aqlm_available = _no
is_auto_awq_available = is_eetq_available = is_hqq_available = is_inc_available = is_torchao_available = is_xpu_available = _no
is_torch_tpu_available = is_optimum_available = is_diffusers_available = is_torchao_ge_v0_18_0 = is_te_available = _no
is_te_pytorch_available = _no


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside, new parameters take no memory (torch's meta device)."""
    with torch.device("meta"):
        yield


@contextmanager
def _skip_init_on_device() -> Iterator[None]:
    with torch.device("cpu"):
        yield


def skip_init_on_device(func: Function) -> Function:
    """A function that makes real tensors also inside `init_empty_weights`."""

    @functools.wraps(func)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with _skip_init_on_device():
            return func(*args, **kwargs)

    return inner  # type: ignore[return-value]


def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> AbstractContextManager[None]:
    """Nothing to gather: weft shards by FSDP2."""
    return nullcontext()


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed has sharded the parameters: it has not."""
    return False


def dequantize_module_weight(module: Any) -> Tensor:
    """A layer's weight as numbers, whatever it is packed in."""
    return dense(module.get_base_layer() if hasattr(module, "get_base_layer") else module)


def get_bnb_param_type(param: Tensor) -> str | bool:
    """"4bit" or "8bit" for bitsandbytes' parameters, else False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Where the parts of a model are, or all of it on one device."""
    found = getattr(model, "hf_device_map", None)
    return found or {"": next((p.device for p in model.parameters()), torch.device("cpu"))}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """How a model was quantised, if it was by that method."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if config is not None and getattr(model, "quantization_method", None) == method else None


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """The same for tensors that share their memory, and for no others."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    """1 for a yes and 0 for a no, in any of their usual spellings. Raises ValueError for another word."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {word}")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file; None where the hub cannot be asked."""
    try:
        return bool(file_exists(repo_id, filename, **kwargs))
    except Exception:  # noqa: BLE001 (offline, private, no such name: nothing is known)
        return None


def _get_no_split_modules(model: Any) -> set[str]:
    """The classes of layers that stay on one device."""
    return set(getattr(model, "_no_split_modules", None) or ())


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The rows of a batch, given as ids or as embeddings. Raises ValueError for neither."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return int(given.shape[0])


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The path of a model's input embedding."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    wanted = model.get_input_embeddings()
    return next((n for n, m in model.named_modules() if m is wanted), default)


def _get_in_out_features(module: Any) -> tuple[int, int] | tuple[None, None]:
    """(in, out) of a layer; (None, None) if it has no such sizes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    if type(module).__name__.endswith("Conv1D"):
        inside, outside = module.weight.shape
        return inside, outside
    return None, None


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; with `share_weights` its parameters are the original's."""
    memo = {id(p): p for p in module.parameters()} if share_weights else {}
    return deepcopy(module, memo)  # type: ignore[arg-type]


def replicate_layers(model: Any, layer_map: Sequence[Sequence[int]]) -> None:
    """Put layers into a transformer several times, with shared weights: [[0, 4], [2, 5]] gives the layers 0, 1, 2, 3, 2, 3, 4.

    Raises ValueError if there is no list of layers at `layers`, `encoder.layer` or `h`.
    """
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    home, name = (model.encoder, "layer") if hasattr(getattr(model, "encoder", None), "layer") else (model, "layers")
    name = "h" if not hasattr(home, name) else name
    layers = getattr(home, name, None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures."
        )
    made = nn.ModuleList(clone_module(layers[i], share_weights=True) for start, end in layer_map for i in range(start, end))
    for place, layer in enumerate(made):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    setattr(home, name, made)
    if hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers = len(made)


class DoraCaching:
    """weft's DoRA finds its norm from the factors in the forward pass; there is nothing to cache. Taken for peft's sake."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> DoraCaching:
        self.enabled = enabled
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: object) -> None:
        return None
