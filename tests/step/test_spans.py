"""Several adapters' updates at once, as a compiled layer has them: the plain twin's numbers, and no copy of y."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import weft
from weft.adapters import rows
from weft.kernels.spans import add_spans, add_spans_reference

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    torch.manual_seed(0)


def given(spans: int, n: int, inside: int, outside: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, W, A, B, and what y is asked for."""
    shapes = [(spans, n, inside), (outside, inside), (spans, rank, inside), (spans, outside, rank), (spans, n, outside)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, add) -> Tensor:
    return add(F.linear(x, W), x, A, B)


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= NEAR[a.dtype] * b.norm())


@quiet
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 5, 7, 11, 2), (2, 1, 9, 4, 8), (8, 6, 16, 3, 13)])
def test_the_operation_and_its_gradients(shape, dtype):
    x, W, A, B, dy = given(*shape, dtype)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, want = (f(x, W, A, B, add) for f, add in ((compiled, add_spans), (layer, add_spans_reference)))
    assert near(found, want)
    grads = torch.autograd.grad(found, leaves, dy)
    for mine, theirs, leaf in zip(grads, torch.autograd.grad(want, leaves, dy), leaves, strict=True):
        assert near(mine, theirs) and mine.dtype == dtype
        assert mine.stride() == leaf.stride()  # else they are added number by number


@quiet
def test_factors_that_are_not_trained_and_a_y_that_is_somebody_elses():
    x, W, A, B, dy = given(3, 4, 6, 5, 2, torch.float64)
    x, B = x.requires_grad_(), B.requires_grad_()

    def both(x, W, A, B, add):
        y = F.linear(x, W)
        return add(y, x, A, B), y * 2

    compiled = torch.compile(both, fullgraph=True)
    found, want = (f(x, W, A, B, add) for f, add in ((compiled, add_spans), (both, add_spans_reference)))
    grads, wanted = (torch.autograd.grad(made, (x, B), (dy, dy)) for made in (found, want))
    for a, b in zip((*found, *grads), (*want, *wanted), strict=True):
        assert near(a, b)


@quiet
def test_it_is_written_into_what_the_frozen_product_made():
    x, W, A, B, _ = given(2, 16, 32, 24, 8, torch.float32)
    for t in (x, A, B):
        t.requires_grad_()
    y, (code, *_) = run_and_get_code(torch.compile(layer, fullgraph=True), x, W, A, B, add_spans)
    assert near(y, layer(x, W, A, B, add_spans_reference))
    (line,) = (line for line in code.splitlines() if "torch.ops.weft.add_spans" in line)
    place = line.split("add_spans.default(")[1].removeprefix("reinterpret_tensor(").split(",")[0]
    made = [line for line in code.splitlines() if f"out={place})" in line or f"out=reinterpret_tensor({place}," in line]
    assert len(made) == 1 and ".mm(" in made[0], code


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 5)

    def forward(self, x):
        return self.proj(x)


def of_three(dtype: torch.dtype) -> tuple[Model, list[str], dict[str, list[Tensor]]]:
    """A model with adapters of unlike ranks, and what of each is trained."""
    model, names = Model().to(dtype), ["a", "b", "c"]
    for i, name in enumerate(names):
        weft.adapt(model, weft.LoRA(rank=1 + 3 * i, targets=["proj"]), name=name)
    parameters = {name: list(weft.adapters.trainable(model, name).values()) for name in names}
    for p in (p for some in parameters.values() for p in some):
        p.data.normal_()
        p.requires_grad_()
    return model, names, parameters


@quiet
def test_gradients_lie_as_their_parameters():
    """Of padded, cast and stacked factors, by inductor: only such are added all at once (`weft.step.capture`)."""
    model, names, parameters = of_three(torch.bfloat16)
    x = torch.randn(12, 6, dtype=torch.bfloat16, requires_grad=True)
    with rows(model, names, [4, 4, 4]):
        y = torch.compile(model)(x)
        every = [p for some in parameters.values() for p in some]
        assert [g.stride() for g in torch.autograd.grad(y.sum(), every)] == [p.stride() for p in every]


@quiet
def test_nothing_of_a_span_reaches_another():
    """Not even NaN, which 0 times NaN is: decision 0010."""
    model, names, parameters = of_three(torch.float32)
    with torch.no_grad():
        for p in parameters["b"]:
            p.fill_(torch.nan)
    x, dy = torch.randn(12, 6, requires_grad=True), torch.randn(12, 5)
    with rows(model, names, [4, 4, 4]):
        y = torch.compile(model, backend="aot_eager")(x)
        y.backward(dy)
    assert y.isnan().all(1).tolist() == x.grad.isnan().all(1).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert not any(p.grad.isnan().any() for name in "ac" for p in parameters[name])
    for name, span in (("a", slice(0, 4)), ("c", slice(8, 12))):
        with weft.using(model, name):
            want = torch.autograd.grad(model(x[span]), [x, *parameters[name]], dy[span])
        for mine, theirs in zip((x.grad[span], *(p.grad for p in parameters[name])), (want[0][span], *want[1:]), strict=True):
            assert near(mine, theirs)
