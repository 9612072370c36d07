"""Rounding by chance: to a neighbouring level, right in the mean, the same again for the same seed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import weft
from tests.conftest import Plain, llama
from weft.adapters.loftq import loftq_
from weft.kernels.four_bit import dynamic, scales, table
from weft.quant import FORMATS, quantise_, roundtrip

CASES = [("nf4", {"nested": False}), ("nf4", {}), ("fp4", {"block": 32}), ("int8", {}), ("fp8", {}), ("fp8-block", {})]
CASE = pytest.mark.parametrize(("base", "options"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))


def weight(rows: int = 24, columns: int = 320) -> Tensor:
    torch.manual_seed(0)
    made = torch.randn(rows, columns) * torch.rand(rows, 1) * 0.1
    made[3] = 0  # blocks of zeros
    return made


def ladder(base: str, options: dict, w: Tensor) -> Tensor:
    """(rows, columns, levels), sorted: what each weight may become. Scales do not depend on the seed."""
    held = FORMATS[base].pack(w, rounding="stochastic", **options)
    if base in ("nf4", "fp4"):
        scale = scales(held["absmax"], held.get("nested_absmax"), held.get("nested_offset"))
        levels = table(base, w.device)
        full = scale.repeat_interleave(w.numel() // len(scale)).view(w.shape)
    else:
        every = torch.arange(256, dtype=torch.uint8).view(FORMATS[base].stored).float()
        levels = every[every.isfinite() & (every.abs() <= FORMATS[base].largest)]
        scale = held["scale"].repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1) if base == "fp8-block" else held["scale"]
        full = scale[:, : w.shape[1]].expand(w.shape)
    return (levels.unique() * full[..., None]).sort().values


@CASE
def test_only_neighbours_and_right_in_the_mean(base: str, options: dict) -> None:
    w, times = weight(), 400
    levels = ladder(base, options, w)
    near = 1e-6 * w.abs()
    low = torch.where(levels <= (w + near)[..., None], levels, -torch.inf).amax(-1)
    high = torch.where(levels >= (w - near)[..., None], levels, torch.inf).amin(-1)
    assert low.isfinite().all() and high.isfinite().all(), "no weight lies beyond the outermost levels"
    total, off = torch.zeros(w.shape, dtype=torch.float64), 0.0
    for seed in range(times):
        found = roundtrip(w, base, rounding="stochastic", seed=seed, **options)
        assert ((found - low).abs() <= near).logical_or((found - high).abs() <= near).all()
        total += found
        off += (found - w).square().mean().item() / times
    mean, gap = total / times, high - low
    error = mean - w
    assert (error.abs() <= 6 * gap / 2 / times**0.5 + near).all()
    assert abs(error.mean()) < 5 * gap.mean() / 2 / (times * w.numel()) ** 0.5
    nearest = roundtrip(w, base, **options) - w
    assert error.square().mean() < 0.02 * nearest.square().mean()  # rounding to the nearest errs in the same way each time
    assert 1.2 * nearest.square().mean() < off < 4 * nearest.square().mean()  # and what it costs: a larger error of each


@CASE
def test_the_seed_and_the_name_decide(base: str, options: dict) -> None:
    w, form = weight(), FORMATS[base]

    def packed(**more: object) -> Tensor:
        return form.pack(w, rounding="stochastic", **options | more)["weight"].view(torch.uint8)

    torch.manual_seed(1)
    first, state = packed(), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(packed(seed=0), first)
    assert not torch.equal(packed(seed=1), first) and not torch.equal(packed(name="another"), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global stream is not drawn from"


def test_a_model_is_packed_by_chance() -> None:
    def made(**options: object) -> dict[str, Tensor]:
        model = llama()
        quantise_(model, "nf4", **options)
        return model.state_dict()

    nearest, first, again, other = made(), made(rounding="stochastic"), made(rounding="stochastic"), made(rounding="stochastic", seed=9)
    up = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not torch.equal(first[up], nearest[up]) and not torch.equal(first[up], other[up])


def test_scales_go_up() -> None:
    """A weight above its block's stored scale could not be right in the mean."""
    absmax = torch.rand(1000) ** 4
    held = FORMATS["nf4"].pack(absmax[:, None] * torch.ones(64), rounding="stochastic")
    stored = scales(held["absmax"], held["nested_absmax"], held["nested_offset"])
    assert (stored >= absmax * (1 - 1e-6)).all() and len(dynamic(absmax.device)) == 256


@pytest.mark.parametrize(
    ("base", "options", "said"),
    [
        ("nf4", dict(rounding="random"), "rounding='random' is neither 'nearest' nor 'stochastic'"),
        ("int8", dict(rounding="up", seed=-1), "neither 'nearest' nor 'stochastic'\nseed=-1 is no whole number of at least 0"),
        ("fp8", dict(seed=1.5), "seed=1.5 is no whole number of at least 0"),
        ("fp4", dict(rounding="stochastic", quant_scale="mse"), "rounding='stochastic' wants absmax"),
    ],
)
def test_what_cannot_be(base: str, options: dict, said: str) -> None:
    model = Plain()
    with pytest.raises(weft.WeftError, match=re.escape(said)):
        quantise_(model, base, **options)
    assert type(model.up) is torch.nn.Linear
    with pytest.raises(weft.WeftError, match="leave rounding out"):
        loftq_(model, weft.LoRA(rank=2), "nf4", rounding="stochastic")
