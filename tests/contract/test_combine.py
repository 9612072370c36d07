"""combine: exact on what the parts add to the weights, on every kind of layer; best at a rank; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, Plain, gpt2, jolt, llama
from weft.adapters import attached, combine_algebra, names
from weft.core import modules

L = weft.LoRA
MODELS: dict[str, tuple[Callable[[], nn.Module], weft.Method, weft.Method]] = {
    "llama": (
        llama,
        L(rank=4, alpha=3, rslora=True, targets=["q_proj", "down_proj"]),
        L(rank=2, alpha=8, init="gaussian", targets=["q_proj", "up_proj", "embed_tokens"]),
    ),
    "gpt2": (gpt2, L(rank=4, targets=["c_attn", "wpe"]), L(rank=3, targets=["c_attn", "c_fc"], bias="all")),
    "plain": (lambda: Plain().eval(), L(rank=4, targets=["up", "down"], lora_bias=True), L(rank=2, targets="up", bias="lora_only")),
    "conv": (lambda: ConvNet().eval(), L(rank=4, targets=["first", "third", "out"]), L(rank=8, targets=["second", "third"])),
}


def _two(kind: str) -> nn.Module:
    make, one, other = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    for seed, (name, method) in enumerate((("a", one), ("b", other))):
        weft.adapt(model, method, name)
        jolt(nn.ModuleList(attached(model, name).values()), 0.3, seed)
    return model


def _updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each parameter of its layers, by forward differences for grouped convolutions and from `merged` else."""
    layers, found = dict(modules(model)), {}
    for path, adapter in attached(model, name).items():
        layer: Any = layers[path]
        if getattr(layer, "groups", 1) > 1:
            x = torch.randn(40, layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
            found[path] = (adapter(layer, x) - layer.frozen(x)).detach()
            continue
        for key, value in adapter.merged(layer).items():
            own = layer._parameters.get(key)
            found[f"{path}.{key}"] = (value - (0 if own is None else own)).detach()
    return found


def _sum(a: dict[str, Tensor], b: dict[str, Tensor], wa: float, wb: float) -> dict[str, Tensor]:
    return {k: wa * a.get(k, torch.zeros(())) + wb * b.get(k, torch.zeros(())) for k in {*a, *b}}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_linear_is_exact_whatever_ranks_scales_and_targets(kind: str, how: Any) -> None:
    model = _two(kind)
    wanted = _sum(_updates(model, "a"), _updates(model, "b"), 0.7, -0.3)
    before = torch.get_rng_state()
    kept = weft.combine(model, {"a": 0.7, "b": -0.3}, "both", how)
    assert torch.equal(torch.get_rng_state(), before) and weft.adapters.active(model) == ("both",)
    assert kept.energy == 1 and kept.error == 0
    got = _updates(model, "both")
    assert {*got} == {*wanted}
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, atol=3e-6 * max(1.0, float(value.abs().max()))), key


def test_the_rank_is_the_true_one_and_a_lone_part_stays_itself() -> None:
    model = _two("llama")
    weft.combine(model, {"a": 1.0}, "same")
    weft.combine(model, {"a": 0.5, "same": 0.5}, "mean")
    for path, part in attached(model, "a").items():
        assert attached(model, "same")[path].A.shape[0] == attached(model, "mean")[path].A.shape[0] == 4
        assert torch.equal(attached(model, "same")[path].A, part.A)
    assert all(torch.allclose(v, _updates(model, "mean")[k], atol=1e-6) for k, v in _updates(model, "a").items())
    weft.combine(model, {"a": 1.0, "same": -1.0}, "nothing")
    assert all(float(v.abs().max()) < 1e-6 for v in _updates(model, "nothing").values())


def test_svd_is_the_best_at_its_rank() -> None:
    model = _two("llama")
    wanted = _sum(_updates(model, "a"), _updates(model, "b"), 1.0, 1.0)
    kept = weft.combine(model, {"a": 1.0, "b": 1.0}, "both", "svd", rank=3)
    got = _updates(model, "both")
    for key, value in wanted.items():
        S = torch.linalg.svdvals(value)
        lost = float((value - got[key]).norm()), float(S[3:].square().sum().sqrt())
        assert lost[0] == pytest.approx(lost[1], abs=2e-5)
        assert kept.layers[key.removesuffix(".weight")].kept == pytest.approx(float(S[:3].square().sum() / S.square().sum()), abs=1e-6)
        assert kept.layers[key.removesuffix(".weight")].norm == pytest.approx(float(value.norm()), rel=1e-5)
    assert "of ‖ΔW‖² kept on 7 layers, ranks 2 to 3" in str(kept)


def _reference(how: str, a: Tensor, b: Tensor, wa: float, wb: float, density: float) -> Tensor:
    """The papers' arithmetic on two dense updates, written element by element."""
    out = torch.zeros_like(a).flatten()
    flat = [a.flatten().tolist(), b.flatten().tolist()]
    floors = [sorted(map(abs, f), reverse=True)[int(density * len(f)) - 1] for f in flat]
    for i, pair in enumerate(zip(*flat, strict=True)):
        v = [w * x if abs(x) >= floor else 0.0 for w, x, floor in zip((wa, wb), pair, floors, strict=True)]
        if how == "magnitude_prune":
            out[i] = sum(v)
            continue
        sign = 1 if sum(v) >= 0 else -1
        agree = [x for x in v if x * sign > 0]
        out[i] = sum(agree) / max(len(agree), 1)
    return out.view_as(a)


@pytest.mark.parametrize("how", ["ties", "magnitude_prune_svd"])
def test_pruning_is_done_on_the_update(how: Any) -> None:
    model = _two("plain")
    a, b = (_updates(model, n)["up.weight"] for n in "ab")
    kept = weft.combine(model, {"a": 0.7, "b": -0.4}, "both", how, density=0.3, rank=16)
    assert torch.allclose(_updates(model, "both")["up.weight"], _reference(how.removesuffix("_svd"), a, b, 0.7, -0.4, 0.3), atol=1e-5)
    assert kept.layers["up"].kept == pytest.approx(1)


def test_dare_keeps_the_mean_is_seeded_and_forgets_the_order_of_loading() -> None:
    model = _two("plain")
    ask = dict(how="dare_linear", density=0.5, rank=16)
    wanted = _sum(_updates(model, "a"), _updates(model, "b"), 0.7, 0.3)["up.weight"]
    made = []
    for seed in range(60):
        weft.combine(model, {"a": 0.7, "b": 0.3}, "both", seed=seed, **ask)
        made.append(_updates(model, "both")["up.weight"])
        weft.remove(model, "both")
    first = made[0]
    assert not torch.equal(first, made[1])
    assert (torch.stack(made).mean(0) - wanted).norm() < 0.2 * wanted.norm()
    torch.manual_seed(0)
    other = MODELS["plain"][0]()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if ".weft." not in k})
    for name in "ba":
        weft.adapt(other, MODELS["plain"][1 + "ab".index(name)], name)
        for path, part in attached(other, name).items():
            part.load_state_dict(attached(model, name)[path].state_dict())
    weft.combine(other, {"a": 0.7, "b": 0.3}, "both", seed=0, **ask)
    assert torch.equal(_updates(other, "both")["up.weight"], first)


def test_the_randomised_svd_is_as_good_as_the_exact_one() -> None:
    torch.manual_seed(0)
    for shape, decay in (((1, 150, 220), 0.97), ((1, 300, 90), 1.0), ((2, 80, 130), 0.8)):
        M = torch.linalg.qr(torch.randn(*shape[:2], min(shape[1:])))[0] * decay ** torch.arange(min(shape[1:]))
        M = M @ torch.randn(shape[0], min(shape[1:]), shape[2])
        made, kept = combine_algebra.leading(M, 6)
        S = torch.linalg.svdvals(M)
        best = float(S[:, :6].square().sum() / S.square().sum())
        assert best * 0.999 <= kept <= best * 1.0001
        assert float((M - made.dense()).square().sum() / M.square().sum()) == pytest.approx(1 - kept, abs=1e-4)
        enough, share = combine_algebra.reaching(M, 0.9)
        least = next(r for r in range(1, 400) if float(S[:, :r].square().sum() / S.square().sum()) >= 0.9)
        assert share >= 0.8999 and abs(enough.rank - least) <= 1


def test_a_combined_adapter_is_an_adapter(tmp_path: Any, ids: Tensor) -> None:
    model = _two("llama")
    weft.combine(model, {"a": 0.7, "b": 0.3}, "both")
    assert all(p.requires_grad for p in weft.adapters.trainable(model, "both").values())
    want = model(ids).logits
    weft.save(model, tmp_path, "both")
    assert torch.equal(weft.load(llama(), tmp_path)(ids).logits, want)
    weft.use(model, ["a"])
    for part in attached(model, "a").values():
        part.scale *= 0.7
    for part in attached(model, "b").values():
        part.scale *= 0.3
    weft.use(model, ["a", "b"])  # several active at once add up
    assert torch.allclose(model(ids).logits, want, atol=1e-5)
    weft.use(model, ["b", "a"])
    assert torch.allclose(model(ids).logits, want, atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (dict(weights={}), "no part to combine"),
        (dict(weights={"a": 1.0, "z": 1.0}), "no adapter named 'z' here; there are 'e', 'a', 'b'"),
        (dict(weights={"a": float("nan")}), "a weight of nan for 'a'"),
        (dict(name="a"), "has an adapter named 'a' already"),
        (dict(how="tiez"), "how='tiez': write one of linear, cat, svd"),
        (dict(how="svd", rank=0), "a rank of 0"),
        (dict(rank=4), "for a rank of 4 write how='svd'"),
        (dict(how="ties"), "needs a density"),
        (dict(how="ties", density=1.5), "a density of 1.5"),
        (dict(how="ties", density={"a": 0.5}), "none for 'b'"),
        (dict(how="ties", density={"a": 0.5, "b": 0.5, "c": 1}), "density names 'c'"),
        (dict(density=0.5), "prunes nothing"),
        (dict(how="ties", density=0.5, majority="most"), "majority='most'"),
        (dict(weights={"a": 1.0, "full": 1.0}), r"'full' at norm is a Replaced on a LayerNorm.*weft.convert\(model, 'full'"),
        (dict(weights={"a": 1.0, "e": 1.0}), "lora_bias: an embedding has no place"),
        (dict(weights={"a": 1.0, "bad": 1.0}), "'bad' has numbers that are not finite, in up.A"),
    ],
)
def test_what_is_refused(request_: dict[str, Any], words: str) -> None:
    model = _two("plain")
    weft.adapt(model, weft.Full(targets="norm"), "full")
    weft.adapt(model, weft.LoRA(rank=2, targets="up"), "bad")
    weft.adapt(model, weft.LoRA(rank=2, targets="embed"), "e")
    attached(model, "bad")["up"].A.data[0, 0] = torch.nan
    weft.use(model, "a")
    with pytest.raises(weft.WeftError, match=words):
        weft.combine(model, **{"weights": {"a": 0.5, "b": 0.5}} | request_)
    assert {*names(model)} == {"a", "b", "full", "bad", "e"}
    assert weft.adapters.active(model) == ("a",)


def test_nothing_is_combined_into_a_merged_base() -> None:
    model = weft.merge(_two("plain"), "a")
    with pytest.raises(weft.WeftError, match="is merged into the base"):
        weft.combine(model, {"a": 1.0, "b": 1.0})
    assert {*names(model)} == {"a", "b"}

