"""Every method on every kind of site that it takes, in a small module: base in fp32 and bf16; eager, and compiled once for a whole life."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from tests.conftest import jolt, llama
from weft.adapters import attached
from weft.core import METHODS, Method
from weft.methods.lora_layers import LowRankConv
from weft.quant import quantise_

INVOKED, ROWS = 9, ["b", None, "a", "b"]


class Around(nn.Module):
    """One layer between others that nobody adapts: (4, ...) in, (4, n) out."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], tokens: bool = False) -> None:
        super().__init__()
        self.layer, self.shape, self.tokens = layer, shape, tokens

    def batch(self) -> Tensor:
        torch.manual_seed(3)
        return torch.randint(0, 20, (4, 5)) if self.tokens else torch.randn(4, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return torch.tanh(y).flatten(1)


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.layer.weight

    def batch(self) -> Tensor:
        torch.manual_seed(3)
        return torch.randint(0, 20, (4, 5))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(ids)))
        return y


def _language(model: nn.Module) -> nn.Module:
    """A language model, for what stands on the whole of it or reads its tokens."""

    def batch() -> Tensor:
        torch.manual_seed(3)
        ids = torch.randint(10, 40, (4, 6))
        ids[:, 2] = INVOKED
        return ids

    model.batch = batch  # type: ignore[assignment]
    return model


def _packed() -> nn.Module:
    model = Around(nn.Linear(64, 32), (3, 64))
    quantise_(model, "nf4", block=32)
    return model


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _language(transformers.MixtralForCausalLM(config))


CONV: dict[str, Any] = dict(stride=2, dilation=2, padding=2, padding_mode="circular")
SITES: dict[str, Callable[[], Any]] = {
    "linear": lambda: Around(nn.Linear(12, 8), (3, 12)),
    "linear-no-bias": lambda: Around(nn.Linear(12, 8, bias=False), (3, 12)),
    "Conv1D": lambda: Around(Conv1D(8, 12), (3, 12)),
    "conv1d": lambda: Around(nn.Conv1d(4, 8, 3, **CONV), (4, 9)),
    "conv2d": lambda: Around(nn.Conv2d(4, 8, 3, **CONV), (4, 9, 7)),
    "conv3d": lambda: Around(nn.Conv3d(4, 8, 3, **CONV), (4, 9, 7, 7)),
    "grouped": lambda: Around(nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 5, 5)),
    "embedding": lambda: Around(nn.Embedding(20, 8), (5,), tokens=True),
    "tied": Tied,
    "norm": lambda: Around(nn.LayerNorm(12), (3, 12)),
    "packed": _packed,
    "experts": _mixtral,
    "model": lambda: _language(llama()),
}
ON: dict[str, Any] = dict(targets="layer")
KINDS: dict[str, Callable[[str], Method]] = {
    "LoRA": lambda s: weft.LoRA(rank=2, targets=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    if s == "experts" else weft.LoRA(rank=2, **ON),
    "DoRA": lambda s: weft.DoRA(rank=2, **ON),
    "ALoRA": lambda s: weft.ALoRA(rank=2, invocation_tokens=(INVOKED,)),
    "AdaLoRA": lambda s: weft.AdaLoRA(rank=2, target_rank=1, **ON),
    "VeRA": lambda s: weft.VeRA(rank=4, d_initial=1.0, **ON),
    "IA3": lambda s: weft.IA3(feedforward=(), **ON),
    "BitFit": lambda s: weft.BitFit(add=s != "norm", **ON),
    "LNTuning": lambda s: weft.LNTuning(**ON),
    "LoHa": lambda s: weft.LoHa(rank=2, **ON),
    "LoKr": lambda s: weft.LoKr(rank=2, **ON),
    "OFT": lambda s: weft.OFT(block_size=4, **ON),
    "Bottleneck": lambda s: weft.Bottleneck(reduction=2, **ON),
    "Subspace": lambda s: weft.Subspace(dimension=12, **ON),
    "TrainableTokens": lambda s: weft.TrainableTokens(tokens=(3, 1), **ON),
    "PrefixTuning": lambda s: weft.PrefixTuning(tokens=2),
    "PromptTuning": lambda s: weft.PromptTuning(tokens=2),
    "PTuning": lambda s: weft.PTuning(tokens=2, hidden=8),
    "Full": lambda s: weft.Full(**ON),
}  # fmt: skip
# what each method stands on
PLACES: dict[str, str] = {
    "LoRA": "linear Conv1D conv1d conv2d conv3d grouped embedding tied packed experts",
    "DoRA": "linear Conv1D conv1d conv2d conv3d embedding tied packed",
    "ALoRA": "model",
    "AdaLoRA": "linear Conv1D packed",
    "VeRA": "linear Conv1D packed",
    "IA3": "linear Conv1D conv1d conv2d conv3d grouped packed",
    "BitFit": "linear linear-no-bias Conv1D conv1d conv2d conv3d grouped norm packed",
    "LNTuning": "norm",
    "LoHa": "linear Conv1D conv1d conv2d conv3d grouped packed",
    "LoKr": "linear Conv1D conv1d conv2d conv3d grouped packed",
    "OFT": "linear Conv1D conv1d conv2d conv3d grouped packed",
    "Bottleneck": "linear Conv1D packed",
    "Subspace": "linear Conv1D conv1d conv2d conv3d grouped packed",
    "TrainableTokens": "embedding tied",
    "PrefixTuning": "model",
    "PromptTuning": "model",
    "PTuning": "model",
    "Full": "linear Conv1D conv1d conv2d conv3d grouped embedding tied norm packed",
}
CASES = [f"{kind}/{site}" for kind, sites in PLACES.items() for site in sites.split()]


def test_no_method_is_left_out() -> None:
    assert set(KINDS) == set(PLACES) == set(METHODS)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("LNTuning", "TrainableTokens")])  # these take other sites by name too
def test_other_sites_are_refused(kind: str) -> None:
    for site in set(SITES) - {*PLACES[kind].split(), "linear-no-bias", "model", "experts"}:
        with pytest.raises(weft.WeftError, match=r"can adapt|cannot adapt|ALoRA finds|with groups"):
            weft.adapt(SITES[site](), KINDS[kind](site))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning", "ignore:Dynamo detected a call")  # torch's own
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("named", CASES)
def test_a_whole_life(named: str, dtype: torch.dtype, how: str, tmp_path: Path) -> None:
    kind, _, site = named.partition("/")
    torch.manual_seed(0)
    model = SITES[site]().to(dtype).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    x = model.batch()
    x = x.to(dtype) if x.is_floating_point() else x
    loose = 2e-2 if dtype == torch.bfloat16 else 5e-5
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend="eager") if how == "compiled" else model

    def out(of: Any = None) -> Tensor:
        with torch.no_grad():
            found: Any = (of or run)(x)
        y: Tensor = found.logits if hasattr(found, "logits") else found
        assert y.dtype == dtype
        return y

    def near(a: Tensor, b: Tensor) -> bool:
        return bool((a.float() - b.float()).norm() <= loose * b.float().norm())

    bare, bytes_before = out(), {k: v.clone() for k, v in model.state_dict().items()}
    method = KINDS[kind](site)
    for seed, name in enumerate("ab"):
        weft.adapt(model, method, name)
        if not seed:
            assert kind in ("PrefixTuning", "PromptTuning", "PTuning") or near(out(), bare), "the base is untouched at the start"
        jolt(nn.ModuleList(attached(model, name).values()), 0.1 if site == "model" else 0.3, seed)
    alone = {None: bare}
    for name in "ab":
        weft.use(model, name)
        alone[name] = out()
        assert not near(alone[name], bare)
    with weft.using(model, None):
        assert torch.equal(out(), bare)
    with weft.rows(model, ROWS):
        assert near(out(), torch.stack([alone[n][i] for i, n in enumerate(ROWS)])), "mixed rows equal one by one"
    weft.save(model, tmp_path, "a")
    weft.load(twin, tmp_path, "other")
    assert near(out(twin), alone["a"]) and (how == "compiled" or torch.equal(out(twin), alone["a"]))
    mixing = any(type(a) is LowRankConv for a in attached(model, "a").values()) and site == "grouped"
    if method.mergeable and not mixing:
        weft.use(model, "a")
        weft.merge(model, "a", untie=site == "tied")
        assert near(out(), alone["a"]), "merging equals forward"
        weft.unmerge(model)
        assert torch.equal(out(), alone["a"])
    for name in "ab":
        weft.remove(model, name)
    assert torch.equal(out(), bare)
    now = model.state_dict()
    assert list(now) == list(bytes_before) and all(torch.equal(v, now[k]) for k, v in bytes_before.items())
