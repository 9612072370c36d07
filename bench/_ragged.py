"""The ways of `ragged.py`: causal attention over rows that lie end to end, by cuDNN in several layouts, and in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.models import attention
from weft.models.layout import layout_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def bound(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


class Aten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        made = torch.ops.aten._cudnn_attention_forward(q, k, v, None, cu, cu, longest, longest, True, 0.0, True, False)
        ctx.save_for_backward(q, k, v, cu, made[0], made[1])
        ctx.longest = longest
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, cu, out, stats = ctx.saved_tensors
        none, n = torch.zeros((), dtype=torch.int64, device=q.device), ctx.longest  # dropout's seed, unused
        return (
            *torch.ops.aten._cudnn_attention_backward(grad, q, k, v, out, stats, none, none, None, cu, cu, n, n, 0.0, True),
            None,
            None,
        )


class Plan:
    """Both passes for up to `rows` rows of up to `longest` tokens, `tokens` in all; lengths are tensors, so any that fit will do.

    Offsets are in elements. The softmax's statistics lie (T, H) as the tokens do: cuDNN reserves too little for others.
    """

    Q, K, V, OUT, STATS, DOUT, DQ, DK, DV, LENGTHS_Q, LENGTHS_K, OFF_Q, OFF_K, OFF_STATS = range(1, 15)
    handles: dict[int, Any] = {}  # noqa: RUF012
    kept: dict[tuple[Any, ...], Plan] = {}  # noqa: RUF012

    @classmethod
    def of(cls, rows: int, longest: int, q: Tensor, k: Tensor) -> Plan:
        key = (q.device.index, q.dtype, rows, longest, *q.shape, k.shape[1])
        if key not in cls.kept:
            cls.kept[key] = cls(rows, longest, q, k)
        return cls.kept[key]

    def __init__(self, rows: int, longest: int, q: Tensor, k: Tensor) -> None:
        import cudnn

        self.cudnn, self.rows, (tokens, heads, width), groups = cudnn, rows, q.shape, k.shape[1]
        self.device = q.device.index or 0
        if self.device not in self.handles:
            self.handles[self.device] = cudnn.create_handle()
        kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[q.dtype]
        real, whole = cudnn.data_type.FLOAT, cudnn.data_type.INT32
        attributes = dict(attn_scale=width**-0.5, use_causal_mask=True, use_padding_mask=True)

        def lay(n: int, wide: int) -> dict[str, Any]:
            return dict(dim=(rows, n, longest, wide), stride=(longest * n * wide, wide, n * wide, 1))

        def graph() -> tuple[Any, dict[int, Any]]:
            kinds = dict(io_data_type=kind, intermediate_data_type=real, compute_data_type=real)
            g = cudnn.pygraph(handle=self.handles[self.device], **kinds)
            made = {}
            for uid in (self.LENGTHS_Q, self.LENGTHS_K, self.OFF_Q, self.OFF_K, self.OFF_STATS):
                n = rows if uid in (self.LENGTHS_Q, self.LENGTHS_K) else rows + 1
                made[uid] = g.tensor(uid=uid, name=f"i{uid}", dim=(n, 1, 1, 1), stride=(1, 1, 1, 1), data_type=whole)
            for uid, n, off in ((self.Q, heads, self.OFF_Q), (self.K, groups, self.OFF_K), (self.V, groups, self.OFF_K)):
                made[uid] = g.tensor(uid=uid, name=f"x{uid}", data_type=kind, ragged_offset=made[off], **lay(n, width))
            return g, made

        def written(tensor: Any, uid: int, n: int, wide: int, off: Any, data_type: Any = kind) -> None:
            place = lay(n, wide)
            tensor.set_uid(uid).set_output(True).set_data_type(data_type).set_dim(place["dim"]).set_stride(place["stride"])
            tensor.set_ragged_offset(off)

        def built(g: Any) -> tuple[Any, int]:
            g.validate()
            g.build_operation_graph()
            g.create_execution_plans([cudnn.heur_mode.A])
            g.check_support()
            g.build_plans()
            return g, g.get_workspace_size()

        g, t = graph()
        out, stats = g.sdpa(
            name="forward", q=t[self.Q], k=t[self.K], v=t[self.V], generate_stats=True, seq_len_q=t[self.LENGTHS_Q],
            seq_len_kv=t[self.LENGTHS_K], **attributes,
        )  # fmt: skip
        written(out, self.OUT, heads, width, t[self.OFF_Q])
        written(stats, self.STATS, heads, 1, t[self.OFF_STATS], real)
        self.ahead = built(g)

        g, t = graph()
        for uid in (self.OUT, self.DOUT):
            t[uid] = g.tensor(uid=uid, name=f"x{uid}", data_type=kind, ragged_offset=t[self.OFF_Q], **lay(heads, width))
        t[self.STATS] = g.tensor(uid=self.STATS, name="stats", data_type=real, ragged_offset=t[self.OFF_STATS], **lay(heads, 1))
        grads = g.sdpa_backward(
            name="backward", q=t[self.Q], k=t[self.K], v=t[self.V], o=t[self.OUT], dO=t[self.DOUT], stats=t[self.STATS],
            seq_len_q=t[self.LENGTHS_Q], seq_len_kv=t[self.LENGTHS_K], max_total_seq_len_q=tokens, max_total_seq_len_kv=tokens,
            **attributes,
        )  # fmt: skip
        places = ((self.DQ, heads, self.OFF_Q), (self.DK, groups, self.OFF_K), (self.DV, groups, self.OFF_K))
        for grad, (uid, n, off) in zip(grads, places, strict=True):
            written(grad, uid, n, width, t[off])
        self.back = built(g)

    def run(self, graph: tuple[Any, int], tensors: dict[int, Tensor]) -> None:
        handle = self.handles[self.device]
        self.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        room = torch.empty(max(graph[1], 1), dtype=torch.uint8, device=f"cuda:{self.device}")
        graph[0].execute({uid: t.data_ptr() for uid, t in tensors.items()}, room.data_ptr(), handle=handle)

    def ends(self, cu: Tensor, q: Tensor, k: Tensor) -> dict[int, Tensor]:
        """Lengths and offsets of a batch, on the device, from the rows' ends; rows that are not there are empty."""
        cu = torch.cat((cu, cu[-1:].expand(self.rows + 1 - len(cu))))
        (heads, width), lengths = q.shape[1:], cu.diff()
        offsets = {self.OFF_Q: cu * (heads * width), self.OFF_K: cu * (k.shape[1] * width), self.OFF_STATS: cu * heads}
        return {self.LENGTHS_Q: lengths, self.LENGTHS_K: lengths, **offsets}


class Frontend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, batch: dict[int, Tensor]) -> Tensor:
        out, stats = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        plan.run(plan.ahead, {plan.Q: q, plan.K: k, plan.V: v, plan.OUT: out, plan.STATS: stats, **batch})
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.plan, ctx.batch = plan, batch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (q, k, v, out, stats), plan = ctx.saved_tensors, ctx.plan
        made = [torch.empty_like(x) for x in (q, k, v)]
        given = dict(zip((plan.Q, plan.K, plan.V, plan.OUT, plan.STATS, plan.DOUT), (q, k, v, out, stats, grad.contiguous()), strict=True))
        plan.run(plan.back, given | dict(zip((plan.DQ, plan.DK, plan.DV), made, strict=True)) | ctx.batch)
        return *made, None, None


def dense(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block = [x.view(len(lengths), lengths[0], *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*block, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(q.shape)


def flex(lengths: Sequence[int], device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    tokens = sum(lengths)
    seen = create_block_mask(lambda b, h, i, j: (row[i] == row[j]) & (i >= j), None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention)
    turned = lambda x: x.transpose(0, 1)[None]  # noqa: E731
    return lambda q, k, v: compiled(turned(q), turned(k), turned(v), block_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def made(way: str, lengths: Sequence[int], cu: Tensor, in_graph: bool = False) -> Attend:
    """One way for one batch. in_graph: what depends on the rows' ends is computed in every call, from `cu` as it then is."""
    longest, on_card = bound(max(lengths)), cu.is_cuda
    if way == "varlen":
        return lambda q, k, v: attention.varlen(q, k, v, cu, longest, None, None)
    if way == "aten":
        return lambda q, k, v: Aten.apply(q, k, v, cu, longest)
    if way in ("frontend", "exact"):
        size = (bound(len(lengths)), longest) if way == "frontend" else (len(lengths), max(lengths))
        batch: list[dict[int, Tensor]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            plan = Plan.of(*size, q, k)
            if in_graph or not batch:
                batch[:] = [plan.ends(cu, q, k)]
            return Frontend.apply(q, k, v, plan, batch[0])

        return attend
    if way == "flex":
        return flex(lengths, cu.device)
    work: Attend = partial(dense, lengths)
    if way == "padded":
        layout_of(cu)  # once a batch, in training on the host and ahead

        def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.padded(q, k, v, cu, None, None)

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_card else nullcontext():
            return work(q, k, v)

    return by_cudnn


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients in fp64, by softmax and two products, row by row and group of heads by group."""
    group, width = q.shape[1] // k.shape[1], q.shape[2]
    whole = [torch.empty(x.shape, dtype=torch.float64, device=q.device) for x in (q, q, k, v)]
    start = 0
    for length in lengths:
        tokens = slice(start, start + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            a, b, c = (x.double().requires_grad_() for x in (q[tokens, heads].detach(), k[tokens, h].detach(), v[tokens, h].detach()))
            scores = torch.einsum("ihd,jd->hij", a, b) / math.sqrt(width)
            out = torch.einsum("hij,jd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), c)
            da, db, dc = torch.autograd.grad(out, (a, b, c), grad[tokens, heads].double())
            for place, found, which in zip(whole, (out, da, db, dc), (heads, heads, h, h), strict=True):
                place[tokens, which] = found.detach()
        start += length
    return tuple(whole)
