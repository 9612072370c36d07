"""A base that is packed while it loads equals one that is loaded and packed, whatever its file looks like."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from tests.conftest import gpt2, llama
from weft.models import packed, shards
from weft.models.load import _check_numbers
from weft.quant import FORMATS, is_quantised, parse_base, quantise_

IDS = torch.arange(5, 14)[None]


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


MODELS = {
    "llama": llama, "gpt2": gpt2, "mixtral": mixtral,
    "tied, with biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
}  # fmt: skip


def saved(folder: Path, model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> Path:
    for p in model.parameters():  # not the buffers
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size="8KB")
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("base", ["nf4", "fp4:block=32,nested=false", "nf4:quant_scale=mse"])
@pytest.mark.parametrize("kind", MODELS)
def test_streaming_equals_loading_then_packing(kind: str, base: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, MODELS[kind]())
    streamed = weft.load_base(folder, base, "cpu")
    plain = weft.load_base(folder, str(streamed.dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf"), "cpu")
    name, options = parse_base(base)
    quantise_(plain, name, **options)
    assert [type(m).__name__ for m in streamed.modules()] == [type(m).__name__ for m in plain.modules()]
    theirs = dict(plain.state_dict())
    for key, value in streamed.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, theirs[key]), key
    assert torch.equal(logits(streamed), logits(plain)) and streamed.config.to_dict() == plain.config.to_dict()
    assert not any(p.requires_grad for p in streamed.parameters()) and not streamed.training
    for name, buffer in streamed.named_buffers():
        assert not buffer.is_meta, name
    head = streamed.get_output_embeddings()
    assert not is_quantised(head) and (head.weight is streamed.get_input_embeddings().weight) == plain.config.tie_word_embeddings
    weft.adapt(streamed, weft.LoRA(rank=2))
    streamed(IDS).logits.float().sum().backward()


def written(folder: Path, model: torch.nn.Module, method: str = "weft") -> Path:
    """A packed model as `weft quantize` writes it."""
    state = {}
    for path, module in model.named_modules():
        for key in getattr(module, "shapes", {}):
            name = f"{path}.{key}"
            state |= packed.to_file(name, module.form.name, module.shapes[key], module.tensors(key), module.dtype)
    for name, p in model.named_parameters():
        state.setdefault(name, p.data)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": {"quant_method": method, "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("base", ["nf4", "fp4:block=32,nested=false"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_packed_file_is_read_as_it_is(kind: str, base: str, tmp_path: Path) -> None:
    model = weft.load_base(saved(tmp_path / "plain", MODELS[kind]()), base, "cpu")
    folder = written(tmp_path / "packed", model)
    for again in (weft.load_base(folder, device="cpu"), weft.load_base(folder, base.partition(":")[0], "cpu")):
        mine = again.state_dict()
        assert all(torch.equal(v, mine[k]) for k, v in model.state_dict().items())
        assert torch.equal(logits(again), logits(model))
    dense = weft.load_base(folder, "fp32", "cpu")
    assert not any(map(is_quantised, dense.modules()))
    assert torch.allclose(logits(dense), logits(model).float(), atol=3e-2)


def damaged(folder: Path, name: str, value: float) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(name: str, value: float, tmp_path: Path) -> None:
    damaged(saved(tmp_path, llama()), name, value)
    with pytest.raises(weft.WeftError, match=f"{name}.*NaN or Inf"):
        weft.load_base(tmp_path, "nf4", "cpu")


def test_what_is_looked_at_on_a_card(tmp_path: Path) -> None:
    """Whatever a file can hold and no packing has looked at: buffers too, such as the corrections of a router's scores."""
    read = shards.Shards(saved(tmp_path, llama()))
    model = weft.load_base(tmp_path, "nf4", "cpu")
    model.model.register_buffer("own", torch.tensor([torch.inf]), persistent=False)  # such as a mask
    model.model.register_buffer("correction", torch.zeros(3))
    _check_numbers(read, model)
    for name in ("model.correction", "model.norm.weight"):
        held = model.state_dict()[name]
        held[1] = torch.nan
        with pytest.raises(weft.WeftError, match=f"{name}.*NaN or Inf"):
            _check_numbers(read, model)
        held[1] = 0


def test_shards_that_are_not_whole_are_named_together(tmp_path: Path) -> None:
    saved(tmp_path, llama())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    files[1].write_bytes(files[1].read_bytes()[:-7])
    files[2].write_bytes(b"no")
    files[3].write_bytes(struct.pack("<Q", 12) + b"{not json at all")
    with pytest.raises(weft.WeftError) as told:
        weft.load_base(tmp_path, "nf4", "cpu")
    assert all(f.name in str(told.value) for f in files[1:4]) and files[0].name not in str(told.value)
    files[0].unlink()
    with pytest.raises(weft.WeftError, match=files[0].name):
        weft.load_base(tmp_path, "nf4", "cpu")


def test_weights_of_another_model(tmp_path: Path) -> None:
    saved(tmp_path, llama())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(weft.WeftError, match=r"of another shape: .*mlp"):
        weft.load_base(tmp_path, "nf4", "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(weft.WeftError, match=r"missing: model\.layers\.2"):
        weft.load_base(tmp_path, "nf4", "cpu")


def test_an_unknown_scheme(tmp_path: Path) -> None:
    saved(tmp_path, llama())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "magic"}}))
    with pytest.raises(weft.WeftError, match="quantised by 'magic'"):
        weft.load_base(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("base", "says"),
    [("nf3", "not one of"), ("nf4:block=48", "block=48"), ("nf4:blok=64", "did you mean 'block'"), ("bf16:block=64", "no options"),
     ("nf4:nested", "write options as"), ("mxfp4", "not one of")],
)  # fmt: skip
def test_a_base_that_cannot_be(base: str, says: str) -> None:
    with pytest.raises(weft.WeftError, match=says):
        weft.load_base("embedded", base)


def test_reading_takes_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors read, none of the packed ones is alive when the next is read."""
    alive: list[weakref.ref] = []
    most, read = [0], shards.Shards.read

    def counted(self: shards.Shards, name: str, *how: bool) -> torch.Tensor:
        most[0] = max(most[0], sum(r() is not None for r in alive))
        value = read(self, name, *how)
        if "proj" in name:
            alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(shards.Shards, "read", counted)
    weft.load_base(saved(tmp_path, llama()), "nf4", "cpu")
    assert len(alive) == 14 and most[0] <= 1


@pytest.mark.parametrize("layout", ["LLM.int8", "block fp8"])
def test_files_in_eight_bits_as_others_write_them(layout: str, tmp_path: Path) -> None:
    base, method = {"LLM.int8": ("int8", "bitsandbytes"), "block fp8": ("fp8-block", "fp8")}[layout]
    if base not in FORMATS:
        pytest.skip(f"no {base} here")
    model = llama()
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    wanted = {}
    for name in [k for k in state if "proj" in k]:
        weight = state[name].float()
        if base == "int8":
            size = weight.abs().amax(1)
            state[name] = (weight / size[:, None] * 127).round().to(torch.int8)
            state[name.removesuffix("weight") + "SCB"] = size
            wanted[name] = state[name].float() * size[:, None] / 127
        else:
            scale = (weight.abs().amax() / 448).view(1, 1)
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            state[name + "_scale_inv"] = scale
            wanted[name] = state[name].float() * scale
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = {"quant_method": method, "load_in_8bit": True} if base == "int8" else {"quant_method": method, "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": told}))
    packed_model = weft.load_base(tmp_path, device="cpu")
    dense_model = weft.load_base(tmp_path, "fp32", "cpu")
    for name, value in wanted.items():
        layer = packed_model.get_submodule(name.removesuffix(".weight"))
        assert is_quantised(layer) and layer.form.name == base
        torch.testing.assert_close(layer.unpacked(dtype=torch.float32), value)
        torch.testing.assert_close(dense_model.get_parameter(name).data, value)
