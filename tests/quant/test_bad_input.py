"""Mistakes get one complete message: what is wrong, where, and what to write instead."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import weft
from tests.conftest import Plain, llama
from weft.quant import FORMATS, bitsandbytes, format_of, quantise_

W = torch.randn(4, 64)


@pytest.mark.parametrize(
    ("base", "options", "said"),
    [
        ("nf4", dict(block=48), "block=48 is no block size of nf4: choose one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ("nf4", dict(blok=64, nest=True), "nf4 has no option 'blok'; did you mean 'block'?\nnf4 has no option 'nest'"),
        ("fp4", dict(quant_scale="best", nested=2), "nested=2 is neither True nor False\nquant_scale='best' is neither 'absmax' nor 'mse'"),
        ("int8", dict(block=64), "int8 has no option 'block'; it has rounding, seed"),
        ("mxfp4", {}, "weft reads mxfp4 but does not write it: choose one of nf4, fp4, int8, fp8, fp8-block"),
    ],
)  # fmt: skip
def test_options(base: str, options: dict, said: str) -> None:
    with pytest.raises(weft.WeftError, match=re.escape(said)):
        FORMATS[base].pack(W, **options)


def test_weights() -> None:
    model = Plain()
    with torch.no_grad():
        model.down.weight[2, 3], model.down.weight[2, 4] = float("nan"), float("inf")
        model.up.weight[0, 0] = float("-inf")
    with pytest.raises(weft.WeftError, match=r"up\.weight holds 1 .*\ndown\.weight holds 2 values that are NaN or infinite \(of 384\)"):
        quantise_(model, "nf4")
    assert type(model.up) is type(model.down) is nn.Linear, "nothing is packed"
    with pytest.raises(weft.WeftError, match=r"the weight holds 2 values that are NaN or infinite \(of 384\): the checkpoint is damaged"):
        FORMATS["fp8"].pack(model.down.weight)
    with pytest.raises(weft.WeftError, match=r"stored as torch\.uint8, so it cannot be quantised to int8"):
        FORMATS["int8"].pack(W.to(torch.uint8))
    with pytest.raises(weft.WeftError, match="has no rows"):
        FORMATS["fp8"].pack(W[0])


def test_models() -> None:
    with pytest.raises(weft.WeftError, match="'nf5' is no format of a frozen base; did you mean 'nf4'"):
        format_of("nf5")
    with pytest.raises(weft.WeftError, match="no linear layer and no fused experts"):
        quantise_(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(weft.WeftError, match="quantise the base first"):
        quantise_(weft.adapt(llama(), weft.LoRA(rank=2)))
    with pytest.raises(weft.WeftError, match="there is nothing to quantise"):
        quantise_(llama(), skip=["*_proj"])


def file(**changed: object) -> dict:
    held = bitsandbytes.write("m.weight", "nf4", FORMATS["nf4"].pack(W), W.shape, torch.bfloat16)
    return {k: v for k, v in (held | changed).items() if v is not None}


STATE = "m.weight.quant_state.bitsandbytes__nf4"


def state(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"m.weight.absmax": None}, "damaged or incomplete (there is no m.weight.absmax)"),
        ({"m.weight": torch.zeros(5, 1, dtype=torch.uint8)}, "m.weight has 5 bytes and 4 scales, where a weight of (4, 64) has 128 and 4"),
        ({"m.weight.quant_map": torch.zeros(16)}, "a table of levels that is not nf4's"),
        ({"m.weight.nested_quant_map": torch.zeros(256)}, "quantised otherwise than in blocks of 256"),
        ({STATE: state("{")}, "damaged or incomplete (JSONDecodeError"),
        ({STATE: state('{"quant_type": "nf4", "blocksize": 48, "dtype": "bfloat16", "shape": [4, 64]}')}, "a block size of 48"),
        ({STATE: None}, "not a 4-bit weight of bitsandbytes"),
    ],
)
def test_checkpoints(changed: dict, said: str) -> None:
    with pytest.raises(weft.WeftError, match=re.escape(said)):
        bitsandbytes.read("m.weight", file(**changed))


def test_schemes() -> None:
    with pytest.raises(weft.WeftError, match="bitsandbytes' 'af4', which weft does not know"):
        bitsandbytes.packed_keys(["m.weight", "m.weight.quant_state.bitsandbytes__af4"])
    with pytest.raises(weft.WeftError, match="hold nf4 and fp4"):
        bitsandbytes.write("m.weight", "int8", FORMATS["int8"].pack(W), W.shape, torch.bfloat16)
