"""`weft merge` of an adapter that was trained on a packed base: two honest merges, and a refusal of the third."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import weft
from tests.cli.conftest import Ran, World, snapshot, tokenizer
from tests.conftest import jolt
from weft.adapters import trainable
from weft.core import sites
from weft.quant import dense, is_quantised

Run = Callable[..., Ran]
IDS = torch.arange(5, 14)[None]


@torch.no_grad()
def logits(folder: Path, base: str, adapter: Path | None = None) -> torch.Tensor:
    model = weft.load_base(folder, base, "cpu")
    if adapter:
        weft.load(model, adapter)
    return model.float()(IDS).logits  # packed weights decode to fp32 then


def test_onto_the_source_and_onto_what_was_trained(world: World, run: Run, tmp_path: Path) -> None:
    words = ["merge", "--model", world.base, "--adapter", world.a, "--base", "nf4", "--device", "cpu"]
    for onto, base in (("source", "fp32"), ("trained", "nf4")):
        ran = run(*words, "--onto", onto, "--dtype", "fp32", "-o", tmp_path / onto)
        assert ran.code == 0, ran.err
        kept = [float(k) for k in re.findall(r"│ \S+proj\s+│ +[\d.]+ │ +([\d.]+) │", ran.out)]
        assert len(kept) == 14 and all(abs(k - 1) < 1e-2 for k in kept)
        assert ("-" in ran.out.split("proj")[1]) == (onto == "trained")
        wanted = logits(world.base, base, world.a)
        assert (logits(tmp_path / onto, "fp32") - wanted).norm() < 0.02 * wanted.norm()
        assert not any(map(is_quantised, weft.load_base(tmp_path / onto, device="cpu").modules()))


def test_into_four_bits(world: World, run: Run, tmp_path: Path) -> None:
    ran = run("merge", "--model", world.base, "--adapter", world.a, "--base", "nf4", "--into", "nf4", "-o", tmp_path / "packed")
    assert ran.code == 0, ran.err
    assert sum(map(is_quantised, weft.load_base(tmp_path / "packed", device="cpu").modules())) == 14
    kept = [float(k) for k in re.findall(r"│ \S+proj\s+│ +[\d.]+ │ +([\d.]+) │", ran.out)]
    assert len(kept) == 14 and all(0.7 < k < 1.3 for k in kept)
    ran = run("generate", "--model", tmp_path / "packed", "hello", "--max-tokens", 2)
    assert ran.code == 0
    before = snapshot(tmp_path)
    ran = run("merge", "--model", tmp_path / "packed", "--adapter", world.a, "-o", tmp_path / "again")
    assert ran.code == 2 and "--onto trained" in ran.err
    assert snapshot(tmp_path) == before
    assert run("merge", "--model", tmp_path / "packed", "--adapter", world.a, "--onto", "trained", "-o", tmp_path / "again").code == 0


@pytest.mark.parametrize("onto", ["source", "trained"])
def test_rounding_by_chance(onto: str, world: World, run: Run, tmp_path: Path) -> None:
    """The mean is kept, so what is trained may be packed again; what is printed is what is written."""
    words = ["merge", "--model", world.base, "--adapter", world.a, "--base", "nf4", "--onto", onto, "--device", "cpu", "--dtype", "fp32"]
    kept = {}
    for name, more in (("a", []), ("again", ["--seed", 0]), ("other", ["--seed", 5])):
        ran = run(*words, "--into", "nf4", "--rounding", "stochastic", *more, "-o", tmp_path / name)
        assert ran.code == 0, ran.err
        kept[name] = [float(k) for k in re.findall(r"│ \S+proj\s+│ +[\d.]+ │ +([\d.]+) │", ran.out)]
        assert len(kept[name]) == 14 and abs(sum(kept[name]) / 14 - 1) < 0.15
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in kept}
    assert weights["a"] == weights["again"] != weights["other"] and kept["a"] == kept["again"] != kept["other"]

    before = weft.load_base(world.base, "fp32" if onto == "source" else "nf4", "cpu")
    merged, after = weft.load(before, world.a), weft.load_base(tmp_path / "other", device="cpu")
    own = {path: dense(site).float() for path, site in sites(merged).items()}
    weft.merge(merged, keep=False)
    for (path, W), said in zip(own.items(), kept["other"], strict=True):
        change = dense(merged.get_submodule(path)).float() - W
        written = after.get_submodule(path).unpacked(dtype=torch.float32) - W
        assert float((written * change).sum() / change.square().sum()) == pytest.approx(said, abs=2e-3)


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--base", "nf4", "--onto", "trained", "--into", "nf4"], "--rounding stochastic"), (["--into", "bf16"], "no packed format"),
     (["--onto", "trained"], "trained on a plain base"), (["--rounding", "stochastic"], "--into nf4"),
     (["--into", "nf4", "--seed", 3], "--seed is for --rounding stochastic"), (["--into", "nf5"], "there are nf4, fp4, int8"),
     (["--into", "mxfp4"], "--into mxfp4 is no format that a merged model can be packed in"), (["--into", "auto"], "can be packed in"),
     (["--into", "nf4:block=48"], "block=48 is no block size"),
     (["--into", "nf4:quant_scale=mse", "--rounding", "stochastic"], "wants absmax")],
)  # fmt: skip
def test_what_is_refused(more: list[str], says: str, world: World, run: Run, tmp_path: Path) -> None:
    ran = run("merge", "--model", world.base, "--adapter", world.a, "-o", tmp_path / "out", *more)
    assert ran.code == 2 and says in ran.err and snapshot(tmp_path) == {}


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("packed", ["nf4", "int8"])
def test_conv1d_and_fused_experts(kind: str, packed: str, run: Run, tmp_path: Path) -> None:
    words = tokenizer()
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(words), n_embd=32, n_layer=1, n_head=4, n_positions=512, pad_token_id=256, bos_token_id=257, eos_token_id=257,
        ))  # fmt: skip
        method = weft.LoRA(rank=2, targets=("c_attn", "c_fc"))
    else:
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=256, bos_token_id=None, eos_token_id=257,
        ))  # fmt: skip
        method = weft.LoRA(rank=2, targets=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    assert run("quantize", tmp_path / "base", "--base", packed, "-o", tmp_path / "packed").code == 0
    tuned = weft.adapt(weft.load_base(tmp_path / "packed", device="cpu"), method)
    jolt(tuned, 0.05)
    weft.save(tuned, tmp_path / "adapter")
    before, merge = snapshot(tmp_path), ["merge", "--model", tmp_path / "packed", "--adapter", tmp_path / "adapter", "-o", tmp_path / "out"]
    for more, says in (([], "--onto trained"), (["--onto", "trained", "--into", packed], "--into"), (["--onto", "source"], "--onto")):
        ran = run(*merge, *more)
        assert ran.code == 2 and says in ran.err and snapshot(tmp_path) == before, (more, ran.err)
    ran = run(*merge, "--onto", "trained", "--dtype", "fp32")
    assert ran.code == 0, ran.err
    assert not any(map(is_quantised, weft.load_base(tmp_path / "out", device="cpu").modules()))
    wanted = logits(tmp_path / "packed", "auto", tmp_path / "adapter")
    assert (logits(tmp_path / "out", "fp32") - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("into", ["int8", "fp8"])
def test_into_eight_bits(into: str, world: World, run: Run, tmp_path: Path) -> None:
    words = ["merge", "--model", world.base, "--adapter", world.a, "--device", "cpu", "--dtype", "fp32", "--into", into]
    assert run(*words, "--rounding", "stochastic", "-o", tmp_path / "out").code == 0
    merged = weft.merge(weft.load(weft.load_base(world.base, "fp32", "cpu"), world.a), keep=False)
    packed = {p: m for p, m in weft.load_base(tmp_path / "out", device="cpu").named_modules() if is_quantised(m)}
    assert len(packed) == 14
    for path, layer in packed.items():
        W = merged.get_submodule(path).weight
        assert layer.form.name == into and (layer.unpacked(dtype=torch.float32) - W).norm() < {"int8": 0.02, "fp8": 0.06}[into] * W.norm()


def test_an_adapter_that_makes_weights_no_numbers(world: World, run: Run, tmp_path: Path) -> None:
    """Told when packing, with the layer's name, and nothing is written."""
    model = weft.load(weft.load_base(world.base, "fp32", "cpu"), world.a)
    for name, p in trainable(model, "default").items():
        if "layers.1.mlp.up_proj" in name and name.endswith("B"):
            p.data[2] = 3e38  # finite, and their product with A is not
    weft.save(model, tmp_path / "bad")
    before = snapshot(tmp_path)
    ran = run("merge", "--model", world.base, "--adapter", tmp_path / "bad", "--into", "nf4", "-o", tmp_path / "out")
    assert ran.code == 2 and "model.layers.1.mlp.up_proj.weight holds" in ran.err and "NaN or infinite" in ran.err
    assert snapshot(tmp_path) == before


def test_an_adapter_that_began_as_what_packing_lost(world: World, run: Run, tmp_path: Path) -> None:
    """It belongs to the packed base: every command takes that one, and merging does not add to the source what the source has."""
    adapter, words = tmp_path / "adapter", ["--device", "cpu"]
    train = ["--train.device", "cpu", "--train.steps", 1, "--train.lr", "1e-9", "--method.rank", 4, "--output", adapter]
    ran = run("train", "--model", world.base, "--data.train", world.rows, "--base", "nf4", "--method.init", "loftq", *train)
    assert ran.code == 0, ran.err
    told = {}
    for base in ("auto", "nf4", "fp32"):
        ran = run("eval", "--adapter", adapter, "--data", world.rows, "--base", base, "--json", *words)
        assert ran.code == 0 and ("the base is packed in nf4" in ran.err) == (base == "auto"), ran.err
        told[base] = [figure["loss"] for figure in json.loads(ran.out)["figures"]]
    assert told["auto"] == told["nf4"] != told["fp32"]

    ran = run("merge", "--adapter", adapter, "-o", tmp_path / "merged", "--dtype", "fp32", *words)
    assert ran.code == 0, ran.err
    wanted = logits(world.base, "nf4", adapter)
    assert (logits(tmp_path / "merged", "fp32") - wanted).norm() < 0.02 * wanted.norm()
    ran = run("merge", "--adapter", adapter, "-o", tmp_path / "twice", "--onto", "source", *words)
    assert ran.code == 2 and "would be there twice" in ran.err and not (tmp_path / "twice").exists()
    ran = run("merge", "--adapter", adapter, "-o", tmp_path / "twice", "--into", "nf4", *words)
    assert ran.code == 2 and "--onto source" not in ran.err and "--rounding stochastic" in ran.err
