"""What layers keep waits in the host's memory: the same gradients, in time, with buffers used again. A CPU's streams do all at once."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor

import weft
from tests.step.test_loss import rows
from tests.step.test_twin import build as model_of
from weft.core import WeftError, amount
from weft.data import pad
from weft.step import capture, levels, offload, prepare, trial
from weft.step import fast as steps
from weft.step import regions as places
from weft.step.offload import Offload
from weft.step.regions import lenders

CPU = torch.device("cpu")


class Layer(nn.Module):
    """A layer that keeps several tensors, one of them not dense, another a part of a larger one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).chunk(2, -1)
        return x + self.two(torch.sin(a) * b.transpose(0, 1).contiguous().transpose(0, 1).exp().clamp(max=5))


@pytest.fixture(autouse=True)
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What was copied and computed, in order: the layer's number with it."""
    seen: list[tuple[str, int]] = []
    numbers: dict[int, int] = {}
    out, fetch = Offload._out, Offload._fetch

    def number(away: Any) -> int:
        return numbers.setdefault(id(away), len(numbers))

    def leaving(self: Offload, t: Tensor, away: Any) -> Any:
        seen.append(("out", number(away)))
        return out(self, t, away)

    def coming(self: Offload, away: Any) -> None:
        if away.absent:
            seen.append(("back", number(away)))
        fetch(self, away)

    monkeypatch.setattr(Offload, "_out", leaving)
    monkeypatch.setattr(Offload, "_fetch", coming)
    yield seen


def through(layers: list[Layer], x: Tensor, how: Offload | None, lend: Callable[[int], bool]) -> Tensor:
    for i, layer in enumerate(layers):
        if how is None:
            x = layer(x)
        else:
            with how.hooks(layer, lend(i)):
                x = layer(x)
    return x.square().mean()


def gradients(layers: list[Layer]) -> list[Tensor]:
    found = [p.grad.clone() for layer in layers for p in layer.parameters() if p.grad is not None]
    for layer in layers:
        layer.zero_grad()
    assert len(found) == 4 * len(layers)
    return found


def build(n: int, width: int = 7) -> list[Layer]:
    torch.manual_seed(3)
    return [Layer(width) for _ in range(n)]


@pytest.mark.parametrize(("n", "every"), [(1, 1), (3, 1), (9, 4), (5, 2)])
def test_the_same_gradients(n: int, every: int) -> None:
    layers, how = build(n), Offload(CPU, 2)
    for shape in ((2, 5, 7), (3, 11, 7), (1, 1, 7)):
        x = torch.randn(shape)
        through(layers, x, None, bool).backward()
        expected = gradients(layers)
        for _ in range(2):
            through(layers, x, how, lambda i: i % every == 0).backward()
            assert all(map(torch.equal, gradients(layers), expected))


def test_comes_back_so_many_layers_ahead(events: list[tuple[str, int]]) -> None:
    layers, how = build(9), Offload(CPU, 2)
    for i, layer in enumerate(layers):
        layer.two.register_full_backward_hook(lambda m, gi, go, i=i: events.append(("turn", i)))  # type: ignore[misc]
    through(layers, torch.randn(2, 5, 7), how, lambda i: i in (0, 4)).backward()
    order = [e for e in events if e[0] != "out"]
    assert [e for e in order if e[0] == "back"] == [("back", 1), ("back", 0)]
    back = [order.index(("turn", 6)), order.index(("turn", 2))]
    copies = [i for i, e in enumerate(order) if e[0] == "back"]
    assert all(copy < turn for copy, turn in zip(copies, back, strict=True)), order  # with the turn of the layer two behind
    assert copies[0] > order.index(("turn", 7)) and copies[1] > order.index(("turn", 3)), order  # and no earlier


def test_nothing_of_the_layers_own_leaves(events: list[tuple[str, int]]) -> None:
    layers, how = build(1), Offload(CPU)
    x = torch.randn(4, 7)
    own = {t.untyped_storage().data_ptr() for t in layers[0].parameters()}
    seen: list[int] = []
    out = how._out
    how._out = lambda t, away: (seen.append(t.untyped_storage().data_ptr()), out(t, away))[1]  # type: ignore[method-assign]
    through(layers, x, how, lambda i: True).backward()
    assert seen and not own & set(seen)


def test_memory_on_the_card_is_given_up() -> None:
    """Between the two passes nobody holds what was lent, and after the second one nothing at all; no garbage collector is waited for."""
    layers, how = build(6), Offload(CPU, 2)
    made: list[StorageWeakRef] = []
    for layer in layers:
        layer.one.register_forward_hook(lambda m, args, out: made.append(StorageWeakRef(out.untyped_storage())))
    gc.disable()
    try:
        loss = through(layers, torch.randn(2, 5, 7), how, lambda i: i in (0, 3))
        how._gone()
        assert [r.expired() for r in made] == [True, False, False, True, False, False]
        loss.backward()
        del loss
        assert all(r.expired() for r in made)
    finally:
        gc.enable()


def test_buffers_are_used_again_whatever_the_shape() -> None:
    layers, how = build(4), Offload(CPU)
    for n in (9, 16, 12, 10, 15, 9, 13):
        through(layers, torch.randn(n, 7), how, lambda i: True).backward()
        if n == 16:
            most = how.bytes
    assert how.bytes == most
    loss = through(layers, torch.randn(9, 7), how, lambda i: True)
    del loss  # no backward pass: its buffers are free all the same
    assert how.bytes == most == sum(size * len(free) for size, free in how.pinned.items())


def test_two_passes_before_their_backward_passes() -> None:
    layers, how = build(5), Offload(CPU, 2)
    a, b = torch.randn(3, 7), torch.randn(6, 7)
    (through(layers, a, None, bool) + through(layers, b, None, bool)).backward()
    expected = gradients(layers)
    first, second = (through(layers, x, how, lambda i: i % 2 == 0) for x in (a, b))
    (first + second).backward()
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(gradients(layers), expected, strict=True))


def test_reading_twice_is_refused() -> None:
    layers, how = build(2), Offload(CPU)
    loss = through(layers, torch.randn(3, 7), how, lambda i: True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives gradients once"):
        loss.backward()


def test_too_little_memory_in_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "free_in_host", lambda: 1000)
    with pytest.raises(torch.OutOfMemoryError, match="host's memory"):
        through(build(2), torch.randn(50, 7), Offload(CPU), lambda i: True)


GB = 1 << 30


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 1 << 62),  # a system that does not tell
    ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 4194304 kB\n"}, 4 * GB),
    ({"proc/meminfo": "MemAvailable: 4194304 kB", "proc/self/cgroup": "0::/\n"}, 4 * GB),  # the root has no limit
    ({"proc/self/cgroup": "0::/\n", "2/": "max 1 0"}, 1 << 62),
    ({"proc/self/cgroup": "0::/\n", "2/": f"{3 * GB} {2 * GB} 0"}, GB),
    ({"proc/self/cgroup": "0::/\n", "2/": f"{3 * GB} {2 * GB} {GB}"}, 2 * GB),  # a model's files, which can be read again
    ({"proc/self/cgroup": "0::/host/abc\n", "2/": f"{3 * GB} {2 * GB} 0"}, GB),  # in a container, where the path is the host's
    ({"proc/self/cgroup": "0::/job/step\n", "2/job/": f"{5 * GB} {3 * GB} 0", "2/job/step/": "max 1 0"}, 2 * GB),  # Slurm: above it
    ({"proc/self/cgroup": "9:cpuset:/\n4:cpu,memory:/job\n0::/\n", "1/job/": f"{3 * GB} {2 * GB} {GB}", "1/": f"{1 << 63} 1 0"}, 2 * GB),
])  # fmt: skip
def test_what_is_free_in_the_host(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for path, text in files.items():
        if path[0] in "12":
            base, *names = offload.GROUPS["" if path[0] == "2" else "memory"]
            most, now, again = text.split()
            for name, content in zip((*names[:2], "memory.stat"), (most, now, f"anon 7\n{names[2]} {again}\n"), strict=True):
                place = tmp_path / "sys/fs/cgroup" / base / path[2:] / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(content)
        else:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    assert offload.free_in_host(tmp_path) == expected


def test_what_is_free_here_is_shared_by_the_processes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 24 < offload.free_in_host() <= 1 << 62
    monkeypatch.setattr(offload, "free_in_host", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Offload(CPU).most == 100


def test_a_graph_that_is_given_up_holds_nothing() -> None:
    """Not even until the next layer that lends."""
    layers, how, made = build(2), Offload(CPU), []
    layers[0].two.register_forward_pre_hook(lambda m, args: made.append(StorageWeakRef(args[0].untyped_storage())))
    loss = through(layers, torch.randn(3, 7), how, lambda i: i == 0)
    assert not made[0].expired()
    del loss
    assert made[0].expired() and how.bytes == sum(size * len(free) for size, free in how.pinned.items())


@pytest.mark.parametrize("lend", [True, False])
def test_changed_in_place_is_refused(lend: bool) -> None:
    """As torch itself refuses it where there are no hooks."""

    class Changing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.two(x)
            z = y.sin()
            y.add_(1)
            return z

    torch.manual_seed(3)
    how, layers = Offload(CPU), [Changing(7)]
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        through([*layers], torch.randn(3, 7), None, bool).backward()
    with pytest.raises(RuntimeError, match="changed in place"):
        through([*layers], torch.randn(3, 7), how, lambda i: lend).backward()


def test_weights_gathered_for_a_call_stay() -> None:
    """As FSDP2 does it: the layer's parameters are others within its forward pass."""
    layers, how, seen = build(1), Offload(CPU), []
    gathered = nn.Parameter(layers[0].two.weight.detach().clone())
    layers[0].register_forward_pre_hook(lambda m, args: setattr(m.two, "weight", gathered))
    out = how._out
    how._out = lambda t, away: (seen.append(t.untyped_storage().data_ptr()), out(t, away))[1]  # type: ignore[method-assign]
    through(layers, torch.randn(4, 7), how, lambda i: True).backward()
    assert seen and gathered.untyped_storage().data_ptr() not in seen and gathered.grad is not None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_tensors_of_other_kinds_stay() -> None:
    how, layer = Offload(CPU), nn.ParameterList([torch.randn(3, 4)])
    a, b, x = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    both, sparse = TwoTensor(a, b).requires_grad_(), a.to_sparse_csr()
    layer.extend([both, nn.Parameter(sparse)])
    with how.hooks(layer, True):
        y, z, w = both.sin(), torch.sparse.mm(sparse, x), x.exp()
    (w.sum() + z.sum()).backward()
    y.sum().backward()
    assert how.bytes and x.grad is not None and torch.allclose(x.grad, a.t() @ torch.ones(3, 2) + x.exp())
    assert type(both.grad) is TwoTensor and torch.equal(both.grad.b, b.cos())


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, read: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(t)
        ctx.read = read
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.read(*ctx.saved_tensors)
        return grad, None, None


DTYPES = [torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bool, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_lent_comes_back_as_it_was(dtype: torch.dtype) -> None:
    """Numbers, shape and strides; and what has gaps takes no more of the host's memory than its numbers do."""
    how, base = Offload(CPU), torch.randn(6, 10, 4).mul(9).to(dtype)
    for t in (base, base.transpose(0, 2), base[1:, 2:7:2], base[:, 3].t(), base[2, 3, 1], base[:0], base[:1, :, :1],
              torch.randn(12).to(dtype).as_strided((4, 5), (2, 1)), base[:, :1].expand(6, 3, 4)):  # fmt: skip
        kept: list[Any] = []
        x = torch.ones(2, requires_grad=True)
        with how.hooks(nn.Identity(), True):
            y = Keeping.apply(x, t, kept.append)
        pinned = how.bytes - sum(size * len(free) for size, free in how.pinned.items())
        assert pinned <= 2 * t.numel() * t.element_size()
        y.sum().backward()
        back = kept[0]
        assert (back.dtype, back.shape, back.stride()) == (t.dtype, t.shape, t.stride())
        assert torch.equal(back.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)) if t.ndim else bool(back.eq(t))


def test_buffers_of_other_sizes_make_room() -> None:
    layers, how = build(2), Offload(CPU)
    through(layers, torch.randn(40, 7), how, lambda i: True).backward()
    how.most = how.bytes
    loss = through(layers, torch.randn(4, 7), how, lambda i: True)
    assert 0 < how.bytes < how.most
    loss.backward()
    through(layers, torch.randn(40, 7), how, lambda i: True).backward()
    assert how.bytes == how.most


def test_streams_are_of_the_layers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stream = torch.cpu.Stream
    monkeypatch.setattr(torch.cpu, "Stream", lambda device: (asked.append(device), stream())[1])
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device: (asked.append(device), stream())[1])
    through(build(2), torch.randn(4, 7), Offload(CPU), lambda i: True).backward()
    assert len(asked) > 2 and set(asked) == {CPU}


@pytest.mark.parametrize(("n", "share", "expected"), [
    (32, 0.25, list(range(0, 32, 4))), (16, 0.25, [0, 4, 8, 12]), (7, 0.25, [0]), (3, 0.25, []), (32, 0.1, [0, 10, 20]),
    (5, 1.0, [0, 1, 2, 3]), (1, 1.0, []), (8, 0.0, []),
])  # fmt: skip
def test_which_layers_lend(n: int, share: float, expected: list[int]) -> None:
    layers = build(n)
    assert [layers.index(m) for m in lenders(list(layers), share)] == expected  # type: ignore[arg-type]


def test_layers_without_a_backward_pass_lend_nothing() -> None:
    layers = build(20)
    for layer in layers[:10]:
        layer.requires_grad_(False)
    assert [layers.index(m) for m in lenders(list(layers), 0.25)] == [10, 14]  # type: ignore[arg-type]


def test_where_no_layer_is_trained_what_comes_before_them_is() -> None:
    layers = build(8)
    for layer in layers:
        layer.requires_grad_(False)
    assert [layers.index(m) for m in lenders(list(layers), 0.25)] == [0, 4]  # type: ignore[arg-type]
    assert lenders([], 0.25) == lenders([], 1.0) == []


def tried(compile: bool) -> tuple[steps.Fast, Any, Any]:
    torch.manual_seed(5)
    model, batch = model_of(), pad(rows([9, 4, 7]))
    parameters = weft.adapters.trainable(model, "default")
    fast = prepare(model, batch, parameters, compile=compile, memory=1.0, varying=False, say=pytest.fail)
    fast.cuda = True
    return fast, batch, parameters


def test_few_layers_of_which_none_can_lend() -> None:
    """They are within the budget all the same, and no more is said than is so."""
    fast, _, _ = tried(False)
    fast.compiled = True
    assert len(fast.layers) <= places.AHEAD + 1 and fast.away(0.75) == 0.0 and fast.away(0.0) == 1.0
    fast.layers = build(8)  # type: ignore[assignment]
    assert fast.away(0.75) == 0.25


def test_a_host_without_room_leaves_the_same_without_lending(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, batch, parameters = tried(False)
    expected = trial.measure(fast.model, [batch], fast.loss, parameters)
    monkeypatch.setattr(offload, "free_in_host", lambda: 1000)
    fast.install(0.0)
    assert fast.lending and "recomputed, what they keep in host memory" in fast.describe()
    said: list[str] = []
    found, why = trial.fast_pass(fast, batch, parameters, said.append)
    assert found is not None and not why and found[0] == pytest.approx(expected[0])
    assert (fast.level, fast.lending) == (0.0, 0) and fast.describe().endswith("layers recomputed")
    assert len(said) == 1 and "host's memory with 0% of the activations kept; trying without lending" in said[0]


def test_what_a_step_takes_counts_what_lies_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what an earlier, larger try took."""
    fast, batch, parameters = tried(False)
    moments = 8 * sum(p.numel() for p in parameters.values())
    for name, value in (("current_device", 0), ("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 600)):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    monkeypatch.setattr(capture, "_before", {0: 9000})
    for inside, most, expected in ((500, 1100, 1.0), (500, 1099, levels.LEVELS[1]), (0, 600, 1.0)):
        monkeypatch.setattr(capture, "_inside", {"graphs": (0, inside, 0)})
        fast.install(1.0)
        fast.most = most + moments
        said: list[str] = []

        def told(what: str, said: list[str] = said) -> None:
            said.append(what)
            monkeypatch.setattr(capture, "_inside", {})  # as where the next level has no graphs

        trial.fast_pass(fast, batch, parameters, told)
        assert fast.level == expected and len(said) == (expected < 1)
    fast.close()


def test_closing_gives_back_what_was_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, batch, _ = tried(False)
    fast.install(0.0)
    made: list[StorageWeakRef] = []
    place = Offload._place

    def placed(self: Offload, size: int) -> Tensor:
        made.append(StorageWeakRef((t := place(self, size)).untyped_storage()))
        return t

    monkeypatch.setattr(Offload, "_place", placed)
    fast.loss(batch).backward()  # type: ignore[no-untyped-call]
    assert made and not any(r.expired() for r in made)
    gone: list[bool] = []
    monkeypatch.setattr(places, "unpin", lambda device: gone.extend(r.expired() for r in made))
    fast.close()
    assert gone and all(gone)


def test_levels() -> None:
    assert [levels.lent(level) for level in (1.0, 0.75, 0.5, 0.3, 0.1, 0.0)] == [0.0, 0.25, 0.5, 0.0, 0.0, 1.0]
    assert levels.kept(0.75, 0.25) == levels.kept(1.0, 0.0) == levels.MOST  # so that one graph is right for all layers
    assert levels.kept(0.75, 0.0) == 0.75 and levels.kept(0.0, 1.0) == levels.AWAY and levels.kept(0.0, 0.0) == levels.THIN


CARDS = {"H100": (52e9, 7e14), "A100, PCIe 4": (25e9, 2.6e14), "T4, PCIe 3": (12e9, 5e13), "a slow link": (8e9, 7e14)}


@pytest.mark.parametrize(("card", "quarter", "half"), [
    ("H100", True, True), ("A100, PCIe 4", True, True), ("T4, PCIe 3", True, True), ("a slow link", False, False),
])  # fmt: skip
def test_lending_is_chosen_where_the_link_is_fast_enough(card: str, quarter: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an 8-billion Llama's 8192 tokens."""
    monkeypatch.setattr(levels, "rates", lambda device: CARDS[card])
    operations, need = 2 * 6.98e9 * 8192, levels.LEAN * 40e9
    assert [levels.pays(operations, share * need, CPU) for share in (0.25, 0.5)] == [quarter, half]


def llama() -> list[nn.Module]:
    """The layers of an 8-billion Llama, but for what they hold."""
    sizes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    with torch.device("meta"):
        return [nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in sizes) for _ in range(32)]


@pytest.mark.parametrize(("memory", "free", "card", "level"), [
    *((memory, 80e9, "H100", level) for memory, level in (
        (45e9, 1.0), (42e9, 0.9), (40e9, 0.75), (38e9, 0.75), (34e9, 0.5), (28e9, 0.3), (22e9, 0.0), (17e9, 0.0), (0.4, 0.4))),
    *((None, free, "H100", level) for free, level in ((62e9, 1.0), (27e9, 0.9), (24e9, 0.75), (20e9, 0.5), (7e9, 0.0))),
    *((None, free, "a slow link", level) for free, level in ((62e9, 1.0), (27e9, 0.3), (8e9, 0.1), (3e9, 0.0))),
    (45e9, 24e9, "H100", 0.75),
])  # fmt: skip
def test_the_level_that_fits(memory: float | None, free: float, card: str, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 the shares took 42.4, 40.5, 36.6, 31.2, 22.9, 20.6 and 18.4 GB; 16.4 of these are the model and what trains it."""
    monkeypatch.setattr(levels, "rates", lambda device: CARDS[card])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 17_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16_430_000_000)
    batch: Any = SimpleNamespace(input_ids=SimpleNamespace(device=torch.device("cuda:0"), numel=lambda: 8192))
    assert levels.fitting(batch, memory, llama(), compiled=True) == level


@pytest.mark.parametrize(("said", "meant"), [
    ("auto", None), (0.3, 0.3), (1, 1.0), ("0.75", 0.75), (3e9, 3e9), ("40GB", 40e9), ("37.5 gib", 37.5 * 2**30), (" 512 MB", 512e6),
])  # fmt: skip
def test_amounts(said: Any, meant: float | None) -> None:
    assert amount(said) == meant


@pytest.mark.parametrize("said", ["much", -1, "-1", "40 G", "GB", float("nan"), float("inf"), ""])
def test_no_amounts(said: Any) -> None:
    with pytest.raises(WeftError, match=r"^train\.memory: .* is not .auto., a share"):
        amount(said, "train.memory")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
def test_compiled_layers_lend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step whose layers lend gives the gradients of one whose layers do not, though a CPU has nothing to gain by it."""
    monkeypatch.setattr(places, "AHEAD", 0)
    found = []
    for lends in (False, True):
        torch.manual_seed(5)
        model = model_of()
        parameters = weft.adapters.trainable(model, "default")
        batch = pad(rows([9, 4, 7]))
        if lends:
            monkeypatch.setattr(steps, "lent", lambda level: 0.5)
        fast = prepare(model, batch, parameters, compile=True, memory=1.0, varying=False, say=pytest.fail)
        if lends:
            fast.cuda = True
            fast.install(0.75, True)
            assert fast.lending and f"those of {fast.lending} layers in host memory" in fast.describe()
        with torch.no_grad():
            for p in parameters.values():
                p += 0.1  # a B of zeros gives no A a gradient
        fast.loss(batch).backward()
        found.append([p.grad.clone() for p in parameters.values() if p.grad is not None])
        fast.close()
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(*found, strict=True))
