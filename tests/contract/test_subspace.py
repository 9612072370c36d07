"""The random subspace: the transform and its dense twin, the exact transpose, columns of length one, and P from the seed alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weft
from tests.conftest import llama
from weft.adapters import attached, trainable
from weft.adapters.attach import build
from weft.kernels.hadamard import hadamard, hadamard_matrix, hadamard_reference
from weft.methods.subspace import fastfood, fastfood_reference


@pytest.mark.parametrize("shape", [(1,), (3, 2), (5, 32), (64,), (2, 3, 256), (8192,)])
def test_the_fast_transform_is_the_matrix(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(hadamard(x), hadamard_reference(x)) and torch.allclose(hadamard(hadamard(x)), shape[-1] * x)
    if shape[-1] <= 256:
        H = hadamard_matrix(shape[-1], x)
        assert torch.equal(H, H.T) and torch.equal(H @ H.T, shape[-1] * torch.eye(shape[-1], dtype=x.dtype))
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.ones(12))


@pytest.mark.parametrize(("d", "rows", "n"), [(1, 1, 1), (5, 13, 16), (20, 7, 32), (64, 200, 256)])
def test_backward_is_the_exact_transpose(d: int, rows: int, n: int) -> None:
    torch.manual_seed(1)
    theta = torch.randn(d, dtype=torch.float64, requires_grad=True)
    signs, order, gauss = torch.randint(0, 2, (n,)) * 2.0 - 1.0, torch.randperm(n), torch.randn(n, dtype=torch.float64)
    P = (signs.double(), order, gauss)
    y, other = fastfood(theta, *P, rows), torch.randn(rows, dtype=torch.float64)
    assert torch.equal(y, fastfood_reference(theta, *P, rows))
    (back,) = torch.autograd.grad(y, theta, other)
    assert torch.allclose(y @ other, theta @ back)  # ⟨Pθ, v⟩ = ⟨θ, Pᵀv⟩
    assert torch.allclose(back, torch.autograd.grad(fastfood_reference(theta, *P, rows), theta, other)[0])
    assert torch.autograd.gradcheck(lambda t: fastfood(t, *P, rows), theta)


@pytest.mark.parametrize("dense_below", [0, 10**9])
def test_columns_have_length_one(dense_below: int) -> None:
    model = weft.adapt(llama(), weft.Subspace(dimension=24, dense_below=dense_below))
    (theta,) = trainable(model, "default").values()
    assert theta.shape == (24,)
    lengths = []
    for j in range(24):
        with torch.no_grad():
            theta.copy_(torch.eye(24)[j])
        lengths.append(sum(float(a.delta(model.get_submodule(p)).detach().square().sum()) for p, a in attached(model, "default").items()))  # type: ignore[operator]
    assert all(0.85 < length < 1.15 for length in lengths), lengths


def test_the_file_holds_the_numbers_and_nothing_of_p(tmp_path: Path) -> None:
    for aware in (False, True):
        method = weft.Subspace(dimension=30, structure_aware=aware, dense_below=0, seed=5)
        weft.save(weft.adapt(llama(), method), tmp_path / str(aware))
        sizes = [t.numel() for t in load_file(tmp_path / str(aware) / "adapter_model.safetensors").values()]
        assert sum(sizes) == 30 and len(sizes) == (15 if aware else 1)


@pytest.mark.parametrize("dense_below", [0, 10**9])
def test_what_is_kept_in_evaluation_follows_every_change(dense_below: int, ids: Tensor, tmp_path: Path) -> None:
    def out(of: Any) -> Tensor:
        with torch.no_grad():
            return of(ids).logits  # type: ignore[no-any-return]

    def fresh(of: Any) -> Tensor:
        return out(copy.deepcopy(of))  # which keeps nothing

    model = weft.adapt(llama(), weft.Subspace(dimension=24, structure_aware=True, dense_below=dense_below))
    parts: list[Any] = list(attached(model, "default").values())
    theta = parts[0].theta
    seen = [out(model)]
    assert torch.equal(out(model), seen[0]) and all(a.kept["update"] is not None for a in parts), "one call keeps what the next one takes"
    kept = [a.kept["update"] for a in parts]
    out(model)
    assert all(a.kept["update"] is k for a, k in zip(parts, kept, strict=True))

    def changed() -> None:
        seen.append(out(model))
        assert torch.equal(seen[-1], fresh(model)) and not torch.equal(seen[-1], seen[-2])

    with torch.no_grad():
        theta.add_(1)
    changed()
    with torch.no_grad():
        parts[3].scale.mul_(3)
    changed()
    theta.data = theta.data + 1
    changed()
    theta.data = theta.data + 1  # where the first one lay, perhaps
    changed()
    optimiser = torch.optim.SGD(trainable(model, "default").values(), lr=0.1)
    model(ids).logits.square().sum().backward()
    assert all(a.kept["update"] is None for a in parts), "training lets go of it"
    optimiser.step()
    changed()
    assert all("update" not in b.kept and "P" not in b.kept for b in copy.deepcopy(parts))
    assert all("update" not in b.kept and "P" not in b.kept for b in pickle.loads(pickle.dumps(parts)))
    assert not any("kept" in key or key.endswith(".P") for key in model.state_dict()) and not list(parts[0].buffers())
    weft.save(model, tmp_path)
    assert torch.equal(out(weft.load(llama(), tmp_path)), seen[-1])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, seen[-1])
    model.double()
    assert all(a.kept["update"].dtype == torch.float64 for a in parts if out(model) is not None)
    model.to(torch.bfloat16)
    changed()


def test_under_the_meta_device_no_p_is_made(tmp_path: Path) -> None:
    with torch.device("meta"):
        parts = build(llama(), weft.Subspace(dimension=24))
    assert parts and not any(a.kept for a in parts.values())  # type: ignore[attr-defined]
    weft.save(weft.adapt(llama(), weft.Subspace(dimension=24)), tmp_path)
    loaded = attached(weft.load(llama(), tmp_path), "default").values()
    assert all("P" in a.kept for a in loaded), "so that a compiled forward finds it"  # type: ignore[attr-defined]


def test_what_is_refused() -> None:
    with pytest.raises(weft.WeftError, match="leaves nothing beside the scales of 14 matrices"):
        weft.adapt(llama(), weft.Subspace(dimension=14, structure_aware=True))
    with pytest.raises(weft.WeftError, match="a dimension of 0"):
        weft.Subspace(dimension=0)
