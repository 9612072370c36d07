"""Targets, names, rows, merging and files: what is refused, in which words, and that nothing has changed then."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, Plain, gpt2, jolt, llama
from tests.parity.families import FAMILIES
from weft.adapters import attached, names, trainable
from weft.adapters.bypassed import never_called
from weft.adapters.formats import FORMATS


def _paths(model: nn.Module) -> list[str]:
    return list(attached(model, "default"))


def test_targets() -> None:
    first = "model.layers.0.self_attn."
    tried: dict[Any, list[str]] = {
        ("layers.0.self_attn.q_proj",): [first + "q_proj"],
        "*.0.self_attn.[qk]_proj": [first + "q_proj", first + "k_proj"],
        "re:.*0.*_attn.(o|v)_proj": [first + "v_proj", first + "o_proj"],
        ("lm_head", "layers.0.self_attn.v_proj"): [first + "v_proj", "lm_head"],
    }
    for targets, want in tried.items():
        assert _paths(weft.adapt(llama(), weft.LoRA(rank=2, targets=targets))) == want
    everything = _paths(weft.adapt(llama(), weft.LoRA(rank=2)))
    assert len(everything) == 14 and "lm_head" not in everything
    assert len(_paths(weft.adapt(llama(), weft.LoRA(rank=2, exclude="mlp.*")))) == 8
    assert "transformer.h.0.attn.c_attn" in _paths(weft.adapt(gpt2(), weft.LoRA(rank=2)))


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        ("q_prj", (), ["'q_prj' matches no module", "did you mean 'q_proj'", "q_proj (Linear × 2)"]),
        (("q_proj", "nothing", "void"), (), ["'nothing' matches no module", "'void' matches no module"]),
        ("self_attn", (), ["matches only LlamaAttention", "cannot adapt"]),
        ("q_proj", "q_proj", ["leaves no layer"]),
        ("q_proj", "never", ["exclude='never' matches no module"]),
        ("re:(", (), ["no regular expression"]),
    ],
)
def test_targets_that_match_nothing(targets: Any, exclude: Any, words: list[str]) -> None:
    model = llama()
    with pytest.raises(weft.WeftError) as error:
        weft.adapt(model, weft.LoRA(rank=2, targets=targets, exclude=exclude))
    assert all(w in str(error.value) for w in words), str(error.value)
    assert not names(model) and not any("weft" in k for k in model.state_dict())


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert set(_paths(weft.adapt(model, weft.LoRA(rank=2)))) == {"linear1", "linear2"}
    with pytest.raises(weft.WeftError, match="never calls it"):
        weft.adapt(nn.TransformerEncoderLayer(16, 2, 32), weft.LoRA(rank=2, targets="out_proj"))


def test_a_layer_whose_weight_alone_is_read_is_no_target() -> None:
    """Mamba computes with the weights of dt_proj and conv1d and calls neither: merged, an adapter there would be another function."""
    ids = torch.arange(3, 10)[None]
    for method in (weft.LoRA(rank=2), weft.BitFit(add=True), weft.Full(), weft.LoKr(rank=2, targets="all")):
        torch.manual_seed(0)
        model = FAMILIES["Mamba"].make().eval()
        ends = {p.rpartition(".")[2] for p in _paths(weft.adapt(model, method))}
        assert {"in_proj", "x_proj", "out_proj"} <= ends and not ends & {"dt_proj", "conv1d"}
        jolt(model, 0.05)
        model(ids).logits.square().mean().backward()
        assert all(p.grad is not None for p in weft.adapters.trainable(model, "default").values())
        want = model(ids).logits
        weft.merge(model, untie=True)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
    with pytest.raises(weft.WeftError, match="'dt_proj' is inside MambaMixer, which reads its weight and never calls it"):
        weft.adapt(FAMILIES["Mamba"].make(), weft.LoRA(rank=2, targets=["in_proj", "dt_proj"]))


def test_only_layers_that_are_never_called_are_left_out() -> None:
    for name, family in FAMILIES.items():
        everything = dict(family.make().named_modules())
        left = {p.rpartition(".")[2] for p in everything if never_called(everything, p)}
        assert left == ({"dt_proj", "conv1d"} if name == "Mamba" else set()), name


def test_torch_s_own_encoder_does_not_bypass_the_adapter() -> None:
    """In evaluation nn.TransformerEncoderLayer has a fused path that reads the weights of its layers and calls none of them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        before = model(x)
        weft.adapt(model, weft.LoRA(rank=2))
        jolt(model)
        after = model(x)
        assert (after - before).abs().max() > 1e-2
        weft.merge(model, keep=False)
        assert torch.allclose(model(x), after, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: weft.LoRA(rank=0), "a rank of 0"),
        (lambda: weft.LoRA(dropout=1.0), "a dropout of 1.0"),
        (lambda: weft.LoRA(rank_pattern={"q_proj": 0}), "a rank of 0"),
        (lambda: weft.LoRA(rank="8"), "LoRA cannot be built with rank='8': expected a whole number"),
        (lambda: weft.DoRA(alpha="16", dropout=None), "alpha='16': expected a number; nor with dropout=None: expected a number"),
        (lambda: weft.PromptTuning(tokens="5"), "PromptTuning cannot be built with tokens='5': expected a whole number"),
        (lambda: weft.LoRA(targets=None), "targets=None: write 'all-linear'"),
        (lambda: weft.load_base("embedded", device="gpu"), "device='gpu': write cpu, cuda or cuda:1"),
        (lambda: weft.load_base("embedded", device="cuda:99"), "device='cuda:99': torch finds"),
        (lambda: weft.LoRA(r=8, use_dora=True), r"LoRA has no 'r'; did you mean 'rank'\?\nLoRA has no 'use_dora'; .*, weft.DoRA"),
        (lambda: weft.DoRA(rnk=8), "DoRA has no 'rnk'; did you mean 'rank'"),
        (lambda: weft.Full(colour=8), "Full has no 'colour'; it has targets, exclude, "),
        (lambda: weft.LoRA(bias="lora"), "bias='lora': there are none, lora_only"),
        (lambda: weft.adapt(llama(), weft.LoRA), "as in weft.adapt.model, weft.LoRA.rank=8..; it was given a .*Llama.* and the class LoRA"),
        (lambda: weft.adapt(llama(), "LoRA"), "it was given a .*Llama.* and 'LoRA'"),
        (lambda: weft.save(weft.adapt(llama(), weft.LoRA()), __file__), r"test_adapters.py cannot be a folder for an adapter .File exists"),
        (lambda: weft.fit(llama(), {"data": {"train": "rows.jsonl"}}), "expected a Recipe, got a dict: weft.train.load_recipe"),
        (lambda: weft.core.Method.from_dict({"name": "LoRA", "rnk": 4}), "did you mean 'rank'"),
        (lambda: weft.core.Method.from_dict({"name": "Lora"}), "unknown method 'Lora'; there are"),
        (lambda: weft.adapt(llama(), weft.LoRA(), name="a.b"), "has no dot"),
        (lambda: weft.adapt(weft.adapt(llama(), weft.LoRA()), weft.LoRA()), "has an adapter named 'default' already"),
        (lambda: weft.use(weft.adapt(llama(), weft.LoRA()), "nobody"), "no adapter named 'nobody' here; there are 'default'"),
        (lambda: weft.remove(llama(), "nobody"), "this model has none"),
        (lambda: weft.merge(llama()), "nothing to merge"),
        (lambda: weft.unmerge(llama()), "nothing to unmerge"),
        (lambda: weft.adapt(ConvNet(), weft.LoRA(rank=3, targets="third")), "a multiple of the groups"),
        (lambda: weft.adapt(Plain(), weft.LoRA(targets="embed", lora_bias=True)), "lora_bias"),
        (lambda: weft.merge(weft.adapt(gpt2(), weft.LoRA(targets="lm_head"))), "is shared with transformer.wte"),
        (lambda: weft.merge(weft.adapt(gpt2(), weft.LoRA(targets="wte"))), "is shared with lm_head"),
        (lambda: weft.load_base("no-such-folder"), "is no folder here"),
        (lambda: weft.load_base("embedded", base="nf9"), "is not one of auto, fp32"),
    ],
)
def test_what_is_refused(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(weft.WeftError, match=words):
        wrong()


@pytest.mark.parametrize("method", FORMATS)
def test_what_peft_calls_a_hyper_parameter_is_answered_with_its_name_here(method: type[weft.Method]) -> None:
    """As the formats of files read peft's configurations; OFT's r, which counts blocks, is the one that means something else."""
    known = {f.name for f in fields(method)}
    for name, what in FORMATS[method].fields.items():
        if what.weft in known and name not in known and (method, name) != (weft.OFT, "r"):
            with pytest.raises(weft.WeftError, match=f"{method.__name__} has no {name!r}; did you mean {what.weft!r}"):
                method(**{name: 1})


def test_a_tied_head_unties_on_request_and_only_then() -> None:
    model = weft.adapt(gpt2(), weft.LoRA(rank=2, targets="lm_head"))
    jolt(model)
    ids = torch.arange(8)[None]
    want, embedding = model(ids).logits, model.transformer.wte.weight.clone()
    weft.merge(model, untie=True)
    assert torch.allclose(model(ids).logits, want, atol=1e-5) and torch.equal(model.transformer.wte.weight, embedding)


def test_full_fine_tuning_keeps_a_tie() -> None:
    model = weft.adapt(gpt2(), weft.Full())
    assert "transformer.wte.weight" in weft.adapters.trainable(model, "default")
    assert "lm_head.weight" not in weft.adapters.trainable(model, "default")
    jolt(model)
    weft.merge(model, keep=False)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_using_restores_and_touches_nothing() -> None:
    model = weft.adapt(llama(), weft.LoRA(rank=2))
    for p in weft.adapters.trainable(model, "default").values():
        p.requires_grad_(False)
    with pytest.raises(RuntimeError), weft.using(model, None):
        assert weft.adapters.active(model) == ()
        raise RuntimeError
    assert weft.adapters.active(model) == ("default",)
    assert not any(p.requires_grad for p in model.parameters())


def test_rows_in_generation_and_beam_search(ids: torch.Tensor) -> None:
    model = llama()
    for seed, name in enumerate(("a", "b")):
        weft.adapt(model, weft.LoRA(rank=2 + seed), name=name)
        jolt(nn.ModuleList(attached(model, name).values()), size=0.5, seed=seed)
    prompt = ids[:3].clamp_min(3)
    owners = ["b", None, "a"]
    for beams in (1, 2):
        options = dict(max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=None)
        with weft.rows(model, owners):
            mixed = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for i, name in enumerate(owners):
            with weft.using(model, name):
                alone = model.generate(prompt[i : i + 1], attention_mask=torch.ones_like(prompt[:1]), **options)
            assert torch.equal(mixed[i], alone[0])
    with pytest.raises(weft.WeftError, match=r"given 2 names, but .* received 3 rows"), weft.rows(model, ["a", "b"]):
        model(prompt)
    with pytest.raises(weft.WeftError, match="no adapter named 'c'"), weft.rows(model, ["c", None, None]):
        pass


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = weft.adapt(llama(), weft.LoRA(rank=4, targets=["q_proj", "v_proj"]))
    jolt(model)
    return weft.save(model, tmp_path / "adapter")


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "shape": (lambda f: _edit(f, lambda s: s.update({Q0: s[Q0][:, :5].contiguous()})), ["q_proj.lora_A.weight is (4, 5)", "needs (4, 32)"]),
    "rank": (lambda f: _config(f, r=8), ["8 tensors of another shape", "is (4, 32)", "needs (8, 32)"]),
    "missing": (lambda f: _edit(f, lambda s: s.pop(Q0)), ["1 tensor missing from the file", Q0]),
    "extra": (lambda f: _edit(f, lambda s: s.update(rubbish=torch.ones(1))), ["1 tensor in the file, but belonging to nothing", "rubbish"]),
    "targets": (
        lambda f: _config(f, target_modules=["o_proj"]),
        ["not one tensor of the file fits", "4 tensors missing", "8 tensors in the file"],
    ),
    "no-target": (lambda f: _config(f, target_modules=["query"]), ["leaves no layer to adapt", "q_proj (Linear × 2)"]),
    "truncated": (lambda f: _cut(f / "adapter_model.safetensors"), ["truncated"]),
    "header": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10\x00"), ["truncated"]),
    "pickle": (lambda f: torch.save({}, f / "adapter_model.safetensors"), ["a pickle with another name"]),
    "bin": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), ["a pickle", "refuses it", "save_file"]),
    "no-weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["has a configuration but no adapter_model.safetensors"]),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), ["it has no adapter_config.json"]),
    "json": (lambda f: (f / "adapter_config.json").write_text("{"), ["is not valid JSON"]),
    "no-type": (lambda f: (f / "adapter_config.json").write_text("{}"), ["does not say a peft_type"]),
    "type": (lambda f: _config(f, peft_type="ADAPTION_PROMPT"), ["does not have the method 'ADAPTION_PROMPT'"]),
    "dora": (lambda f: _config(f, use_dora=True), ["4 tensors missing from the file", "q_proj.lora_magnitude_vector"]),
    "variant": (lambda f: _config(f, use_qalora=True, kasa_config={"a": 1}), ["does not compute", "use_qalora", "kasa_config"]),
    "nan": (lambda f: _edit(f, lambda s: s[Q0].fill_(float("nan"))), ["not finite", Q0]),
    "task": (lambda f: _config(f, task_type="SEQ_CLS"), ["made for SEQ_CLS", "LlamaForCausalLM is CAUSAL_LM"]),
    "no-task": (lambda f: _config(f, task_type="POETRY"), ["task_type='POETRY'", "CAUSAL_LM"]),
    "zero-rank": (lambda f: _config(f, r=0), ["a rank of 0"]),
}  # fmt: skip


def test_fields_of_a_newer_peft_are_named_and_written_back(saved: Path, tmp_path: Path) -> None:
    _config(saved, use_magic=3, no_magic=None)
    with pytest.warns(UserWarning, match="does not know: use_magic=3"):
        model = weft.load(llama(), saved)
    again = json.loads((weft.save(model, tmp_path / "again") / "adapter_config.json").read_text())
    assert again["use_magic"] == 3 and "no_magic" not in again


@pytest.mark.parametrize("broken", BROKEN)
def test_files_that_do_not_fit(saved: Path, broken: str) -> None:
    spoil, words = BROKEN[broken]
    spoil(saved)
    model = llama()
    before = list(model.state_dict())
    with pytest.raises(weft.WeftError) as error:
        weft.load(model, saved)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert list(model.state_dict()) == before and not names(model)


def test_a_missing_folder_and_a_nested_one(saved: Path) -> None:
    with pytest.raises(weft.WeftError, match="there is no such folder"):
        weft.load(llama(), saved / "nowhere")
    with pytest.raises(weft.WeftError, match="there is one in adapter"):
        weft.load(llama(), saved.parent)


def test_what_peft_leaves_out_of_a_file_is_checked(saved: Path) -> None:
    """peft loads a file with tensors missing and only warns."""
    with pytest.raises(weft.WeftError, match="missing from the file"):
        weft.load(llama(num_hidden_layers=3), saved)


def test_saving_needs_a_name_when_there_are_several(tmp_path: Path) -> None:
    model = weft.adapt(weft.adapt(llama(), weft.LoRA(rank=2), name="a"), weft.LoRA(rank=2), name="b")
    with pytest.raises(weft.WeftError, match="there are 'a', 'b'"):
        weft.save(model, tmp_path)


def test_a_full_disk_leaves_the_old_adapter(saved: Path) -> None:
    """A limit on the size of files stands in for the disk: the write itself really fails, in a process of its own."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    code = f"""
import resource, signal, sys, weft
from tests.conftest import llama
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = weft.adapt(llama(), weft.LoRA(rank=16))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
try:
    weft.save(model, {str(saved)!r})
except weft.WeftError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent, check=True)
    assert "What lay there before is untouched" in done.stdout
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_what_is_loaded_lies_as_new_tensors_do(tmp_path: Path, ids: Tensor) -> None:
    """A product over memory that is not on a 16-byte border may come out otherwise in the last bit (DoRA's AAᵀ does on a CPU)."""
    model = weft.adapt(llama(), weft.DoRA(rank=4, targets=["q_proj", "v_proj", "up_proj"]))
    jolt(model)
    weft.save(model, tmp_path)
    loaded = weft.load(llama(), tmp_path)
    assert {p.data_ptr() % 64 for p in trainable(loaded, "default").values()} == {0}
    assert torch.equal(loaded(ids).logits, model(ids).logits)
