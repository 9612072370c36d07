"""What holds for every method on every kind of model: the base untouched, files, merging, mixed rows, gradients, removal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, Plain, gpt2, jolt, llama
from weft.adapters import active, attached, names, trainable
from weft.adapters.files import tensors
from weft.adapters.formats import format_of
from weft.core import METHODS, Adapter, Method
from weft.methods.lora_layers import LowRankConv

LINEAR = dict(llama="all-linear", gpt2="all-linear", plain="all-linear", conv="all-linear")
EMBED = dict(llama=("embed_tokens", "q_proj"), gpt2=("wpe", "c_fc"), plain=("embed", "up"), conv=("first", "second", "third", "out"))
SCALED = dict(llama="all-linear", gpt2="all-linear", plain=("up", "down"), conv="all")
SCALED_INSIDE = dict(llama=("down_proj", "q_proj"), gpt2="mlp.c_proj", plain="down", conv=("second", "third"))
EVERY = LINEAR | {"conv": "all"}
NECKS = dict(llama="auto", gpt2="auto", plain=("up", "down"), conv="out")
HELD = dict(llama="auto", gpt2="auto", plain="embed", conv="out")  # what has a row for each token
TOKENS = (4, 1, 3)  # in the batch, and not in order
INVOKED = 34  # stands in the first and the fourth row of ids
METHODS_TRIED: dict[str, Callable[[str], Method]] = {
    "lora": lambda m: weft.LoRA(rank=4, alpha=8, targets=LINEAR[m]),
    "rslora": lambda m: weft.LoRA(rank=4, alpha=3, rslora=True, init="gaussian", targets=LINEAR[m]),
    "lora-embedding-or-conv": lambda m: weft.LoRA(rank=4, targets=EMBED[m]),
    "lora-patterns": lambda m: weft.LoRA(rank=4, rank_pattern={r".*(up|q_proj|c_fc|out)\w*": 2}, alpha_pattern={"down_proj": 5.0}),
    "lora-biases": lambda m: weft.LoRA(rank=2, lora_bias=True, bias="all"),
    "lora-only-biases": lambda m: weft.LoRA(rank=2, bias="lora_only"),
    "ia3": lambda m: weft.IA3(targets=SCALED[m], feedforward=SCALED_INSIDE[m]),
    "ia3-auto": lambda m: weft.IA3(**{} if m in ("llama", "gpt2") else dict(targets="all", feedforward="*")),
    "bitfit": lambda m: weft.BitFit(add=m == "llama"),
    "bitfit-add": lambda m: weft.BitFit(add=True, targets="all-linear" if m != "conv" else "all"),
    "ln-tuning": lambda m: weft.LNTuning(targets="first" if m == "conv" else "auto"),
    "lora-orthogonal": lambda m: weft.LoRA(rank=4, init="orthogonal", targets=LINEAR[m]),
    "lora-pissa": lambda m: weft.LoRA(rank=4, init="pissa", targets=LINEAR[m], rank_pattern={"down_proj|c_fc|out": 2}, lora_bias=True),
    "lora-olora": lambda m: weft.LoRA(rank=3, alpha=2, rslora=True, init="olora", bias="lora_only", targets=LINEAR[m]),
    "lora-fa": lambda m: weft.LoRA(rank=3, train_A=False, targets=EVERY[m], exclude="third" if m == "conv" else ()),
    "lora-and-modules": lambda m: weft.LoRA(
        rank=2, alpha=4, targets=LINEAR[m], modules_to_save=dict(llama=("lm_head", "norm"), gpt2="ln_f", plain="norm", conv="first")[m]),
    "tokens": lambda m: weft.TrainableTokens(tokens=TOKENS, targets=HELD[m]),
    "lora-and-tokens": lambda m: weft.LoRA(
        rank=2, targets="first" if m == "conv" else LINEAR[m], trainable_token_indices={"out": (4, 0)} if m == "conv" else TOKENS),
    "adalora-and-tokens": lambda m: weft.AdaLoRA(
        rank=3, target_rank=2, targets=LINEAR[m], trainable_token_indices=() if m == "conv" else TOKENS[:2]),
    "vera": lambda m: weft.VeRA(rank=6, d_initial=1.0, targets=LINEAR[m]),
    "adalora": lambda m: weft.AdaLoRA(rank=4, target_rank=2, targets=LINEAR[m]),
    "dora": lambda m: weft.DoRA(rank=4, alpha=8, targets=LINEAR[m]),
    "dora-embedding-or-conv": lambda m: weft.DoRA(rank=4, targets=EMBED[m], exclude="third" if m == "conv" else (), bias="lora_only"),
    "prefix": lambda m: weft.PrefixTuning(tokens=3),
    "prefix-projected": lambda m: weft.PrefixTuning(tokens=3, projection=True, hidden=8),
    "prompt": lambda m: weft.PromptTuning(tokens=3),
    "p-tuning": lambda m: weft.PTuning(tokens=3, hidden=8, encoder="lstm"),
    "alora": lambda m: weft.ALoRA(rank=4, alpha=8, invocation_tokens=(INVOKED,)),
    "alora-biases": lambda m: weft.ALoRA(rank=2, lora_bias=True, rslora=True, invocation_tokens=(INVOKED,), targets=LINEAR[m]),
    "loha": lambda m: weft.LoHa(rank=2, alpha=4, targets=EVERY[m]),
    "loha-cored": lambda m: weft.LoHa(rank=2, use_effective_conv2d=True, rank_pattern={r".*(up|q_proj|c_fc|out)\w*": 3}, targets=EVERY[m]),
    "lokr": lambda m: weft.LoKr(rank=2, alpha=4, targets=EVERY[m]),
    "lokr-cored": lambda m: weft.LoKr(rank=1, decompose_both=True, use_effective_conv2d=True, decompose_factor=4, targets=EVERY[m]),
    "oft": lambda m: weft.OFT(block_size=4, targets=EVERY[m]),
    "oft-exact": lambda m: weft.OFT(block_size=0, blocks=2, block_share=True, use_cayley_neumann=False, targets=EVERY[m]),
    "bottleneck": lambda m: weft.Bottleneck(reduction=4, targets=NECKS[m], nonlinearity="relu"),
    "bottleneck-pfeiffer": lambda m: weft.Bottleneck(kind="pfeiffer", reduction=4, layernorm=True, train_norms=True, targets=NECKS[m]),
    "bottleneck-parallel": lambda m: weft.Bottleneck(kind="parallel", reduction=4, scale=4.0, targets=NECKS[m]),
    "subspace": lambda m: weft.Subspace(dimension=30, targets=EVERY[m]),
    "subspace-said": lambda m: weft.Subspace(dimension=40, structure_aware=True, dense_below=0, targets=EVERY[m]),
    "full": lambda m: weft.Full(),
    "full-norms": lambda m: weft.Full(targets=dict(llama="re:.*norm", gpt2="ln_*", plain="norm", conv="first")[m]),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "gpt2": gpt2, "plain": lambda: Plain().eval(), "conv": lambda: ConvNet().eval(),
}  # fmt: skip
# Exceptions. These put something in front of a language model's input: they change it from the start, are no change of weights, and need a
# model with an input of tokens. An activated LoRA needs one too.
IN_FRONT = (weft.PrefixTuning, weft.PromptTuning)
LANGUAGE = ("llama", "gpt2")


@dataclass
class Case:
    base: nn.Module
    method: Method
    batch: Tensor

    def __call__(self, model: nn.Module) -> Tensor:
        y: Any = model(self.batch)
        return y.logits if hasattr(y, "logits") else y


def _meets(method: str, model: str) -> bool:
    return model in LANGUAGE or not isinstance(METHODS_TRIED[method]("llama"), (*IN_FRONT, weft.ALoRA))


@pytest.fixture(params=[f"{method}/{model}" for method in METHODS_TRIED for model in MODELS if _meets(method, model)])
def case(request: pytest.FixtureRequest, ids: Tensor) -> Case:
    method, _, model = request.param.partition("/")
    torch.manual_seed(0)
    base = MODELS[model]()
    return Case(base, METHODS_TRIED[method](model), torch.randn(5, 3, 8, 8) if model == "conv" else ids)


def test_every_method_is_tried() -> None:
    tried = {type(make("llama")).__name__ for make in METHODS_TRIED.values()}
    assert tried == set(METHODS)


def test_the_base_is_untouched_and_comes_back(case: Case) -> None:
    keys, bytes_before, before = list(case.base.state_dict()), copy.deepcopy(case.base.state_dict()), case(case.base)
    kinds = {p: type(m) for p, m in case.base.named_modules()}
    model = weft.adapt(case.base, case.method)
    assert [k for k in model.state_dict() if ".weft." not in f".{k}"] == keys
    assert all(isinstance(model.get_submodule(p), kind) for p, kind in kinds.items())
    assert isinstance(case.method, IN_FRONT) or torch.allclose(case(model), before, atol=1e-6)
    jolt(model)
    assert not torch.allclose(case(model), before, atol=1e-3)
    with weft.using(model, None):
        assert torch.equal(case(model), before)
    weft.remove(model)
    assert torch.equal(case(model), before)
    assert {p: type(m) for p, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == keys and all(torch.equal(v, bytes_before[k]) for k, v in model.state_dict().items())


def test_gradients_reach_every_adapter_parameter_and_nothing_else(case: Case) -> None:
    model = weft.adapt(case.base, case.method)
    jolt(model)
    case(model.train()).square().mean().backward()
    own = {id(p) for p in trainable(model, "default").values()}
    unused = {"embed_tokens.weight"} if isinstance(case.method, weft.Full) else set()
    for key, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in own), (key, unused)


def test_save_then_load_is_the_same(case: Case, tmp_path: Path) -> None:
    model = weft.adapt(copy.deepcopy(case.base), case.method, name="one")
    jolt(model)
    weft.save(model, tmp_path, name="one")
    other = weft.load(case.base, tmp_path, name="two")
    assert torch.equal(case(other), case(model))
    form = format_of(type(case.method))
    mine, its = tensors(attached(model, "one"), form), tensors(attached(other, "two"), form)
    assert list(mine) == list(its) and all(torch.equal(mine[k], its[k]) for k in mine)


def test_merge_equals_forward_and_unmerge_is_exact(case: Case) -> None:
    model = weft.adapt(case.base, case.method)
    jolt(model)
    if not case.method.mergeable:
        with pytest.raises(weft.WeftError, match="no change of weights"):
            weft.merge(model)
        return
    want, state = case(model), {k: (v, v.clone()) for k, v in model.state_dict().items()}
    if any(type(a) is LowRankConv and model.get_submodule(p).groups > 1 for p, a in attached(model, "default").items()):
        with pytest.raises(weft.WeftError, match="mixes its channels"):
            weft.merge(model)
        assert torch.equal(case(model), want)
        return
    tied = hasattr(model, "transformer") and isinstance(case.method, weft.LoRA)
    weft.merge(model, untie=tied)
    assert torch.allclose(case(model), want, atol=2e-5)
    assert active(model) == ()
    with pytest.raises(weft.WeftError, match="unmerge"):
        weft.use(model, "default")
    weft.unmerge(model)
    now = model.state_dict()
    assert list(now) == list(state) and all(now[k].data_ptr() == v.data_ptr() and torch.equal(now[k], old) for k, (v, old) in state.items())
    assert torch.equal(case(model), want) and active(model) == ("default",)
    plain = weft.merge(model, keep=False, untie=tied)
    assert names(plain) == [] and not any(".weft." in k for k in plain.state_dict())
    assert torch.allclose(case(plain), want, atol=2e-5)


def test_closed_form_equals_probing(case: Case) -> None:
    model = weft.adapt(case.base, case.method)
    jolt(model)
    if not case.method.mergeable:
        return
    for path, adapter in attached(model, "default").items():
        site: Any = model.get_submodule(path)
        if not isinstance(site, nn.Linear | nn.Embedding) and type(site).__name__ != "SiteConv1D":
            continue
        probed, closed = Adapter.merged(adapter, site), adapter.merged(site)
        for key, value in closed.items():
            assert torch.allclose(probed[key], value, atol=1e-5), (path, key)


def test_mixed_rows_equal_one_by_one(case: Case) -> None:
    model = case.base
    for seed, name in enumerate(("a", "b", "c")):
        weft.adapt(model, case.method, name=name)
        jolt(nn.ModuleList(attached(model, name).values()), seed=seed)
    rows = ["b", None, "a", "c", "b"]
    with torch.no_grad():
        alone = []
        for i, name in enumerate(rows):
            with weft.using(model, name):
                alone.append(case(model)[i])
        if any(m._parameters and p.endswith("wpe") for p, m in model.named_modules()) and "wpe" in str(attached(model, "a").keys()):
            with pytest.raises(weft.WeftError, match="one name for every row"), weft.rows(model, rows):
                case(model)  # positions are looked up once for all rows, so rows cannot differ there
            return
        with weft.rows(model, rows):
            assert torch.allclose(case(model), torch.stack(alone), atol=1e-5)
            for p in trainable(model, "a").values():
                p.add_(0.05)
            moved = case(model)
        with weft.using(model, "a"):
            assert torch.allclose(case(model)[2], moved[2], atol=1e-5), "a weight changed inside the block counts at once"
    assert active(model) == ("c",)
    with weft.rows(model, rows):
        case(model).square().mean().backward()
    assert all(p.grad is not None for n in "abc" for p in trainable(model, n).values())


def test_compiled_equals_eager(case: Case) -> None:
    model = weft.adapt(case.base, case.method)
    jolt(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(case(compiled), case(model), atol=1e-5)


def test_copies_and_pickles(case: Case) -> None:
    model = weft.adapt(case.base, case.method)
    jolt(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case(twin), case(model))
        jolt(twin)
        assert not torch.equal(case(twin), case(model)), "the copy shares nothing"
        weft.use(twin, None)
        weft.remove(twin)


def test_a_bf16_base_keeps_fp32_masters_and_merges_with_one_rounding(case: Case) -> None:
    model = weft.adapt(case.base.to(torch.bfloat16), case.method)
    case.batch = case.batch.to(torch.bfloat16) if case.batch.is_floating_point() else case.batch
    jolt(model)
    assert all(p.dtype == torch.float32 for p in trainable(model, "default").values())
    y = case(model)
    assert y.dtype == torch.bfloat16
    if not case.method.mergeable:
        return
    exact = {}
    for path, adapter in attached(model, "default").items():
        site: Any = model.get_submodule(path)
        if type(adapter) is LowRankConv and site.groups > 1:
            return
        merged = {k: v for k, v in adapter.merged(site).items() if site._parameters.get(k) is not None or v.any()}
        exact |= {f"{path}.{k}": v.to(torch.bfloat16) for k, v in merged.items()}
    state = weft.merge(model, untie=True).state_dict()
    assert exact and all(torch.equal(state[k], v) for k, v in exact.items())
    assert (case(model) - y).norm() < 0.1 * y.norm()


def test_a_method_goes_to_json_and_back(case: Case) -> None:
    assert Method.from_dict(case.method.to_dict()) == case.method
