"""Run by test_gated.py under TRITON_INTERPRET=1, which Triton reads when imported: the kernels of a step against their plain twins."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gated import gated_backward_and_s_reference, gated_backward_reference, gated_reference
from weft.kernels.launch import kernels
from weft.kernels.linear_cross_entropy import _slice, linear_cross_entropy, linear_cross_entropy_reference

BACK: tuple[dict[str, Any], ...] = (  # blocks that are cut off, and more splits than there are blocks
    {}, dict(rows=32, columns=128, splits=3), dict(rows=64, columns=32, splits=5, stages=2),
)  # fmt: skip
BLOCKS: tuple[dict[str, int], ...] = (dict(rows=32, columns=64, splits=1), dict(rows=128, columns=64, splits=7, stages=2))


def near(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    error = float((a.double() - b.double()).norm() / b.double().norm())
    assert error <= (1e-5 if a.dtype == torch.float32 else 2e-3), (error, a.shape, a.dtype)


def columns_of_one(*parts: Tensor) -> list[Tensor]:
    """The same numbers as columns of one tensor, which is a little wider than they are together; what lies between them is NaN."""
    wide = torch.full((len(parts[0]), sum(t.shape[1] + 3 for t in parts)), torch.nan, dtype=parts[0].dtype)
    places = [at[:, 3:] for at in wide.split([t.shape[1] + 3 for t in parts], 1)]
    return [place.copy_(t) for place, t in zip(places, parts, strict=True)]


def in_wider_tensors(triton: Any, back: tuple[Any, ...]) -> int:
    """Both kernels on columns of wider tensors, whose rows lie differently far apart, against themselves on tensors of their own."""
    dh, dS, g, u, Sg, Bg, Su, Bu, A, *how = back
    (dh_, g_), (u_, Sg_), (Su_,), (dS_,) = columns_of_one(dh, g), columns_of_one(u, Sg), columns_of_one(Su), columns_of_one(dS)
    assert len({t.stride(0) for t in (dh_, u_, Su_)}) == 3
    for work in (triton.gated_by_columns, triton.gated_by_rows):
        assert all(map(torch.equal, work(g_, u_, Sg_, Bg, Su_, Bu, A, *how), work(g, u, Sg, Bg, Su, Bu, A, *how)))
    for work in (triton.gated_backward_triton, gated_backward_reference):
        dg, du = columns_of_one(torch.zeros_like(g), torch.zeros_like(u))
        (wide,) = {t._base for t in (dg, du)}
        found = work(dh_, dS_, g_, u_, Sg_, Bg, Su_, Bu, A, *how, dg=dg, du=du)
        assert found[0] is dg and found[1] is du and int(wide.isnan().sum()) == 6 * len(g)  # nothing beside them was written
        for a, b in zip(found, work(*back), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-4) if a.dtype == torch.float32 else torch.equal(a, b)
    return 1


def back_and_s(back: tuple[Any, ...]) -> int:
    """The backward kernel that gives dS_g and dS_u too: against the twin, repeated, and into columns beside which nothing is written."""
    tried, (dh, dS, g, u, Sg, Bg, Su, Bu, A, *_, gelu) = 0, back
    (dh_, g_), (u_, Sg_), (Su_,), (dS_,) = columns_of_one(dh, g), columns_of_one(u, Sg), columns_of_one(Su), columns_of_one(dS)
    module, seven = kernels("triton_gated_back"), lambda found: (*found[:5], *found[-2:])
    works = [lambda *t, **where: seven(module.gated_backward_and_s_triton(*t[:9], None, None, gelu, **where))]
    works += [lambda *t, how=how, **where: module.gated_backward_and_s(*t[:9], gelu, **how, **where) for how in BACK]
    want = seven(gated_backward_and_s_reference(dh, dS, g, u, Sg, Bg, Su, Bu, A, None, None, gelu))
    for work in works:
        found, again = work(*back), work(*back)
        for a, b, c in zip(found, want, again, strict=True):
            assert torch.equal(a, c) and a.is_contiguous() and a.shape == b.shape
            near(a, b)
            tried += 1
        places = columns_of_one(*map(torch.zeros_like, (g, u, Sg, Su)))
        (base,) = {t._base for t in places}
        into = work(dh_, dS_, g_, u_, Sg_, Bg, Su_, Bu, A, **dict(zip(("dg", "du", "dSg", "dSu"), places, strict=True)))
        assert all(a is b for a, b in zip((*into[:2], *into[-2:]), places, strict=True)) and int(base.isnan().sum()) == 12 * len(g)
        for a, b in zip(into, found, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-4) if a.dtype == torch.float32 else torch.equal(a, b)
    with_c = module.gated_backward_and_s_triton(*back)  # by the kernel that leaves dS to two products
    for a, b in zip(with_c, gated_backward_and_s_reference(*back), strict=True):
        if a.numel():
            near(a, b)
    return tried


def main() -> None:
    torch.manual_seed(0)
    triton, tried = kernels("triton_gated"), 0
    cases = [(5, 7, 1, 2, 3, torch.float32), (130, 200, 8, 16, 20, torch.float32), (64, 128, 16, 16, 16, torch.float16),
             (1100, 96, 4, 40, 16, torch.float32), (1, 300, 16, 16, 16, torch.float16), (17, 130, 33, 5, 1, torch.float16)]  # fmt: skip
    for n, width, rg, ru, rd, dtype in cases:
        g, u, dh, Sg, Su, dS = (torch.randn(n, k).to(dtype) for k in (width, width, width, rg, ru, rd))
        Bg, Bu, A = (0.3 * torch.randn(width, r).to(dtype) for r in (rg, ru, rd))
        A = A.T.contiguous()
        c = [1 + torch.rand(width) if there else None for there in (n != 64, n > 100)]
        how = (*c, width % 3 == 2)
        forward = (g, u, Sg, Bg, Su, Bu, A, *how)
        works = [triton.gated_triton, triton.gated_by_columns, triton.gated_by_rows, *(partial(triton.gated_by_rows, **b) for b in BLOCKS)]
        for work in works:
            for a, b in zip(work(*forward), gated_reference(*forward), strict=True):
                near(a, b)
                tried += 1
        back = (dh, dS, g, u, Sg, Bg, Su, Bu, A, *how)
        for a, b in zip(triton.gated_backward_triton(*back), gated_backward_reference(*back), strict=True):
            assert a.shape == b.shape
            if a.numel():
                near(a, b)
                tried += 1
        tried += in_wider_tensors(triton, back) + back_and_s(back)
    for n, vocabulary, dtype in ((5, 7, torch.float32), (9, 5000, torch.float32), (3, 8192, torch.float16)):
        logits, targets = (3 * torch.randn(n, vocabulary)).to(dtype), torch.randint(0, vocabulary, (n,))
        targets[1] = -100
        for a, b in zip(kernels("triton_cross_entropy").slice_triton(logits.clone(), targets, -100), _slice(logits, targets), strict=True):
            near(a, b)
            tried += 1
    h, W, targets = torch.randn(37, 16, requires_grad=True), torch.randn(97, 16), torch.randint(0, 97, (37,))
    got, want = (f(h, W, targets) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    near(got, want)
    near(*(torch.autograd.grad(loss, h)[0] for loss in (got, want)))
    print(tried, "equal")


if __name__ == "__main__":
    main()
