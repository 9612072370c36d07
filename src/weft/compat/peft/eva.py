"""EVA under peft's names (Paischer et al. 2024, arXiv:2410.07170): A starts as the principal components of its layer's inputs.

`weft.adapters.eva.eva` is weft's own, which does not centre the inputs and has no convergence to wait for; here it is as in peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from weft.compat.peft.incremental_pca import IncrementalPCA
from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.layers_lora import LoraLayer, resize
from weft.compat.peft.targets import check_target_module_exists, get_pattern_key
from weft.core import is_conv1d, is_linear

UNSUPPORTED_LORA_MODULES: tuple[type[LoraLayer], ...] = ()
MOST = 1000  # a rho above this means "as many directions as there can be"
Prepare = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    """Call a model with a dictionary of its keywords."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """(tokens, 2) the places of a batch that count: neither padding nor, if `use_label_mask`, without a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """(tokens, in) a layer's inputs at those places."""
    return _first(layer_input, layer_name)[model_input.T.unbind()]


def _first(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, please provide a custom "
            "prepare_layer_inputs_fn"
        )
    return found


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    found = _first(layer_input, layer_name)
    return found.reshape(-1, found.shape[-1])


class _Watched:
    """One layer whose inputs are looked at: its components, and which of them have settled."""

    def __init__(self, name: str, layer: nn.Module, prepare: Prepare, many: int) -> None:
        self.name, self.layer, self.prepare, self.many = name, layer, prepare, many
        self.asked = many  # its own rank; `many` is how many components are looked for
        self.source = self  # the layer whose components these are: the first with the same inputs
        self.settled = torch.zeros(many, dtype=torch.bool)

    def start(self, most: int) -> None:
        self.many, self.settled = most, torch.zeros(most, dtype=torch.bool)
        self.svd = IncrementalPCA(most, lowrank=True, lowrank_seed=42)

    def learn(self, rows: Tensor, tau: float) -> None:
        if len(rows) < self.many:
            print(f"skipping SVD for {self.name} because there are less than {self.many} examples")
            return
        before = self.svd.components_ if self.svd.n_samples_seen_ else None
        self.svd.partial_fit(rows.float())
        if before is not None:
            self.settled = nn.functional.cosine_similarity(self.svd.components_, before).cpu() >= tau

    def rank_settled(self, rank: int) -> bool:
        return bool(self.settled[:rank].all())


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The first A of every adapted layer (its rank, in) by the layer's path: principal components of its inputs.

    Ranks move between layers within `eva_config.rho`: the components that explain most of their layer's inputs get the ranks there are.

    Args:
        model: A PeftModel, or any model together with `peft_config`.
        dataloader: Batches, gone through again and again until the components stay: until the cosine of each with itself one batch
            before is at least `eva_config.tau`.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: (batch, config) -> what `prepare_layer_inputs_fn` gets as its second argument.
        prepare_layer_inputs_fn: (a layer's inputs, that, the layer's name) -> rows (n, in) to look at; or one for each layer.
        gather_distributed_inputs: Taken for peft's sake: every process looks at its own batches.
    Raises:
        ValueError: no configuration, no batches, batches with fewer tokens than ranks, a function for a layer that is not there.
    """
    wrapped = hasattr(model, "peft_config")
    config = model.peft_config[adapter_name] if wrapped and peft_config is None else peft_config
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    watched = _watched(model, config, wrapped, prepare_layer_inputs_fn)
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if wrapped and hasattr(model, "disable_adapter") else nullcontext():
            ranks = _look(model, dataloader, config, watched, forward_fn, prepare_model_inputs_fn, show_progress_bar)
    finally:
        model.train(training)
    found = {}
    for name, rank in ranks.items():
        svd = watched[name].source.svd
        rows = svd.components_[:rank]
        found[name] = rows / svd.singular_values_[:rank, None].sqrt() if config.eva_config.whiten else rows.clone()
    return found


def _watched(model: Any, config: Any, wrapped: bool, prepare: Any) -> dict[str, _Watched]:
    own = dict(prepare) if isinstance(prepare, Mapping) else {}
    found = {}
    for name, module in model.named_modules():
        if wrapped:
            chosen = isinstance(module, BaseTunerLayer) and is_linear(module.get_base_layer())
        else:
            linear = isinstance(module, nn.Linear) or is_conv1d(module)
            chosen = linear and (config.target_modules is None or bool(check_target_module_exists(config, name)))
        if chosen:
            function = own.pop(name, None) if isinstance(prepare, Mapping) else prepare
            rank = (config.rank_pattern or {}).get(get_pattern_key(list(config.rank_pattern or {}), name), config.r)
            found[name] = _Watched(name, module, function or _all_rows, rank)
    if own:
        raise ValueError(f"prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: {list(own)}")
    return found


def _look(
    model: Any, batches: Iterable[Any], config: Any, watched: dict[str, _Watched], call: Any, prepare: Any, show: bool
) -> dict[str, int]:
    """Go through the batches until all components that get a rank have settled; the ranks."""
    rho = config.eva_config.rho
    if rho > MOST:
        rho = min(rho, max(max(p.shape) for p in model.parameters() if p.dim()) // config.r)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    seen: dict[str, Any] = {}
    batch = _to(next(iter(batches)), device)
    _run(model, batch, config, watched.values(), call, prepare, lambda w, rows: seen.__setitem__(w.name, rows))
    for name, w in watched.items():
        w.source = next(o for o in watched.values() if o.source is o and _equal(seen[o.name], seen[name])) if name in seen else w
    budget = sum(w.asked for w in watched.values())
    for w in [w for w in watched.values() if w.source is w]:
        w.start(max(round(o.asked * rho) for o in watched.values() if o.source is w))
    sources = [w for w in watched.values() if w.source is w]
    ranks = {n: w.source.many for n, w in watched.items()}
    bar = tqdm(cycle(batches), leave=False, disable=not show)
    for step, batch in enumerate(bar):
        open_ones = [w for w in sources if not w.rank_settled(max(ranks[n] for n, o in watched.items() if o.source is w))]
        bar.set_description(f"{len(sources) - len(open_ones)}/{len(sources)} layers have converged")
        if not open_ones:
            break
        if isinstance(batches, Sized) and step >= len(batches) and any(not w.svd.n_samples_seen_ for w in open_ones):
            short = [w.name for w in open_ones if not w.svd.n_samples_seen_]
            raise ValueError(
                f"no batch holds as many tokens as EVA looks for components in {short[:3]}: give larger batches or a smaller rank"
            )
        _run(model, _to(batch, device), config, open_ones, call, prepare, lambda w, rows: w.learn(rows, config.eva_config.tau))
        if all(w.svd.n_samples_seen_ for w in sources):
            ranks = _shared_out(watched, budget)
    bar.close()
    return ranks


def _run(model: Any, batch: Any, config: Any, watched: Iterable[_Watched], call: Any, prepare: Any, take: Any) -> None:
    places = prepare(batch, config) if prepare is not None else batch

    def hook(w: _Watched) -> Any:
        return lambda module, inputs, output: take(w, w.prepare(inputs[0] if len(inputs) == 1 else inputs, places, w.name))

    handles = [w.layer.register_forward_hook(hook(w)) for w in watched]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _shared_out(watched: dict[str, _Watched], budget: int) -> dict[str, int]:
    """The `budget` components that explain most of their layer's inputs, counted by layer."""
    shares = [(n, s) for n, w in watched.items() for s in w.source.svd.explained_variance_ratio_.tolist()]
    chosen = [n for n, _ in sorted(shares, key=lambda share: -share[1])[:budget]]
    return {n: chosen.count(n) for n in watched}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _to(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: _to(v, device) for k, v in inputs.items()}
    return type(inputs)(_to(v, device) for v in inputs) if isinstance(inputs, tuple | list) else inputs


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter with `init_lora_weights="eva"` start as EVA says: ranks and A by `get_eva_state_dict`, or by `eva_state_dict`.

    A layer that gets no rank loses its adapter. Make the optimiser afterwards: tensors whose rank changed are new ones.
    Raises ValueError for a model without adapters, several that work at once, another start, neither batches nor a state.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    _fill(model, eva_state_dict, adapter_name, config)


def _fill(model: Any, state: Mapping[str, Tensor], adapter_name: str, config: Any) -> None:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    kept: list[str] = []
    missing: list[str] = []
    new_ranks: dict[str, int] = {}
    new_alphas: dict[str, float] = {}
    for name, front in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.trains]:
        path = name.replace("base_model.model.", "")
        rank, alpha = (
            ranks.get(get_pattern_key(list(ranks), path), config.r),
            alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha),
        )
        A = state.get(name)
        if A is None:
            missing.append(path)
            resize(front, adapter_name, rank, alpha, config)
            front.reset_lora_parameters(adapter_name, True)
        elif len(A) == 0:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, front.leave())
            continue
        else:
            alpha = alpha * len(A) / rank if config.eva_config.adjust_scaling_factors and len(A) != rank else alpha
            rank = len(A)
            made = resize(front, adapter_name, rank, alpha, config)
            made.B.zero_()
            made.A.copy_(A)
            kept.append(path)
        if rank != config.r:
            new_ranks[path] = rank
        if alpha != config.lora_alpha:
            new_alphas[path] = alpha
    config.target_modules, config.rank_pattern, config.alpha_pattern = kept + missing, new_ranks, new_alphas
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva state_dict: "
            f"{missing}",
            stacklevel=3,
        )
