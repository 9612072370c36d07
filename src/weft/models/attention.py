"""The attention seam: the one place where a packed batch enters somebody else's model.

Rows lie end to end in one (1, T) sequence and must not see each other. transformers lets anybody register an attention function
and its mask (`AttentionInterface`, `AttentionMaskInterface`); weft registers one pair under the name "weft". It works on the
FlashAttention keywords that transformers hands down to every layer (`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`,
`max_length_k`), and no (T, T) mask is ever built. Without those keywords (generation with a cache, padded batches) both are
transformers' own "sdpa" functions; rows without padding may come with a placeholder for their mask.

Two twins do the same work: `padded` on any device and dtype, `varlen` (FlashAttention) for 16-bit tensors on CUDA.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from weft.core import FAILS
from weft.kernels.hadamard import power_of_two
from weft.models.layout import keep_layout, layout_of

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch built without it: the padded twin does the work
    varlen_attn = None

NAME = "weft"
# Since 2.13 heads in groups must be asked for; 2.11 takes them as they come and has no such argument.
GROUPED = {"enable_gqa": True} if varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# The share of the largest logit by which two right ways may lie apart. 16 bits: 0.045 was seen over the 32 layers of an 8-billion Llama of
# random weights, which magnify rounding; a token that sees another one is off by most of a logit.
APART = {"fp32": 1e-4, "16 bit": 0.1}
LEAK = {"fp32": 3e-6, "16 bit": 1e-3}  # and by which one way may change with what it must not see; its own numbers are the same
logger = logging.getLogger("weft")


def placeholder(device: torch.device) -> Tensor:
    """A mask for a model that `use` prepared, whose batch has no padding: transformers hands a mask of four dimensions down as it is, so it
    neither searches the position ids for row boundaries (a host sync a step) nor makes a (T, T) mask. `attend` takes it for none. Give
    position ids with it: some models (OPT) number tokens by their mask."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def packed_kwargs(cu_seqlens: Tensor, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """What a packed call of the model takes besides `input_ids` and `position_ids`.

    cu_seqlens: (rows + 1,) int32, where rows begin, and T.  lengths: the same on the host, when known: it spares a host sync.
    """
    lengths = lengths or cu_seqlens.diff().tolist()
    if cu_seqlens.device.type == "cpu":
        keep_layout(cu_seqlens, lengths)
    longest = power_of_two(max(lengths))  # a bound, and one that differs little between batches: compilers look at it
    return {
        "attention_mask": placeholder(cu_seqlens.device),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class _Spread(torch.autograd.Function):
    """x (T, ...) -> (size, ...): token t to place[t], zeros elsewhere. Its adjoint is `_Collect`, and the other way round.

    `index_select`'s own backward adds row by row on the CPU; here every place has one token, so a copy does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = size
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return _Collect.apply(grad, place, ctx.size), None, None


class _Collect(torch.autograd.Function):
    """x (size, ...) -> (T, ...): what stands at place[t]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = size
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return _Spread.apply(grad, place, ctx.size), None, None


# ----------------------------------------------------------------------------------------------------------------- twins


@torch.compiler.disable  # the blocks' shapes change with every batch: a compiled region would be compiled anew each time
def padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None, window: int | None, dropout: float = 0.0,
    cu_keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention within rows. q (T, H, D), k (S, Hkv, D), v (S, Hkv, Dv) -> (T, H, Dv).

    Rows are laid out in right-padded blocks of like length; causal attention never looks right, so padding is never seen.
    window: a token sees itself and the window - 1 tokens before it.
    cu_keys: where rows of keys begin, if they have a prefix; the queries are each row's last.
    """
    plan = layout_of(cu_seqlens if cu_keys is None else cu_keys)
    own = plan.place
    if cu_keys is not None:
        moved = torch.repeat_interleave((cu_keys - cu_seqlens)[1:].long(), cu_seqlens.diff().long(), output_size=len(q))
        own = plan.place[torch.arange(len(q), device=q.device) + moved]
    q, k, v = (_Spread.apply(x, place, plan.size) for x, place in ((q, own), (k, plan.place), (v, plan.place)))
    outs, offset = [], 0
    for rows, length in plan.blocks:
        end = offset + rows * length
        block = [x[offset:end].view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        band = None
        if window is not None and window < length:
            band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
        out = F.scaled_dot_product_attention(
            *block, attn_mask=band, is_causal=band is None, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2).reshape(rows * length, q.shape[1], v.shape[2]))
        offset = end
    return _Collect.apply(torch.cat(outs) if len(outs) > 1 else outs[0], own, plan.size)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, window: int | None,
    cu_keys: Tensor | None = None, longest_keys: int | None = None,
) -> Tensor:  # fmt: skip
    """The same by FlashAttention over the packed tokens as they lie. 16-bit CUDA tensors, equal head sizes up to 256."""
    reach = (-1, 0) if window is None else (window - 1, 0)
    ends = (cu, cu if cu_keys is None else cu_keys, longest, longest_keys or longest)
    return varlen_attn(q, k, v, *ends, scale=scale, window_size=reach, **GROUPED)


def can_varlen(q: Tensor, v: Tensor, dropout: float) -> bool:
    return (
        varlen_attn is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0.0
        and q.shape[-1] == v.shape[-1] <= 256
    )


# ------------------------------------------------------------------------------------------------ what transformers calls

_sdpa = AttentionInterface()["sdpa"]
_sdpa_mask = AttentionMaskInterface()["sdpa"]
CANNOT = ("softcap", "s_aux", "position_bias", "cache")  # what a layer may ask of attention and the packed path does not do
_watch: Any = None  # a _Watch while `use` tries a model out, else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query (n, H, T, D), key and value (n, Hkv, S, D) -> (n, T, H, D)."""
    if _watch is not None:
        _watch.saw(attention_mask, sliding_window, packed=cu_seq_lens_q is not None)
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1):
            attention_mask = _band(query.shape[2], sliding_window, query.device)
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window}
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    asked = [name for name in CANNOT if kwargs.get(name) is not None]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    cu_keys = None if cu_seq_lens_k is cu_seq_lens_q else cu_seq_lens_k
    if asked or not causal or query.shape[0] != 1 or (query.shape[2] != key.shape[2] and cu_keys is None):
        why = ", ".join(asked) or ("attention that is not causal" if not causal else "a cache or several sequences")
        raise ValueError(f"{type(module).__name__}: a packed batch does not go together with {why}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if can_varlen(q, v, dropout):
        out = varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window, cu_keys, max_length_k)
    else:
        out = padded(q, k, v, cu_seq_lens_q, scaling, sliding_window, dropout, cu_keys)
    return out[None], None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """What a causal layer needs to be told of rows without padding: nothing, unless its window is shorter than they are."""
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)[None, None]


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: sdpa's own. A packed call brings its placeholder and never comes here."""
    made = _sdpa_mask(*args, **kwargs)
    if _watch is not None:
        _watch.made(made, kwargs.get("local_size"))
    return made


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


# ------------------------------------------------------------------------------------------------------------------- use

_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Watch:
    """Notes, while a model is tried out, which mask and which window each attention layer used."""

    def __init__(self) -> None:
        self.windows: dict[int, int | None] = {}
        self.kept: list[Tensor] = []  # alive, so that ids stay theirs
        self.plain = self.packed = 0
        self.odd = ""

    def made(self, made: Tensor | None, window: int | None) -> None:
        if made is not None:
            self.kept.append(made)
            self.windows[id(made)] = window

    def saw(self, attention_mask: Tensor | None, window: int | None, packed: bool) -> None:
        if packed:
            self.packed += 1
            return
        self.plain += 1
        if id(attention_mask) not in self.windows:
            self.odd = "its layers use a mask of their own"
        elif self.windows[id(attention_mask)] != window:
            # Sliding windows are exact here when the layer says how wide; a window that is in the mask alone would be lost.
            self.odd = f"a layer's mask has a window of {self.windows[id(attention_mask)]} that the layer does not tell its attention"


def installed(model: nn.Module) -> bool:
    """Whether `use` has put the seam into this model (so that packed batches may be given to it)."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def maskless(model: nn.Module) -> bool:
    """Whether rows without padding may be given `placeholder`: not where an adapter of the whole model may add keys, nor a user's module
    around such a model, which may read the mask."""
    return installed(model) and isinstance(model, PreTrainedModel) and getattr(model, "plan", None) is None


def reason(model: nn.Module) -> str:
    """Why `use(model)` last said False; empty when it said True or was never asked."""
    return _reasons.get(model, "")


def use(model: nn.Module) -> bool:
    """Let a model take packed batches. True: installed. False: the model is as it was, and data must be padded instead.

    Whether a model can is found by trying: two short rows padded and packed must give the same logits (within `APART`), what stands in the
    first row must not reach the second, and every layer must have gone through the seam with the window that its mask has. Costs five
    forward passes of under 20 tokens; uses no random numbers; modes are restored.
    """
    if installed(model):
        return True
    why = _refused(model)
    if not why:
        before = model.config._attn_implementation
        why = "its trial was cut off"
        try:
            why = _tried(model)
        finally:
            if why:
                model.set_attn_implementation(before)
    if why:
        logger.info("%s keeps its own attention: %s", type(model).__name__, why)
        _reasons[model] = why
    else:
        _reasons.pop(model, None)
    return not why


def _refused(model: nn.Module) -> str:
    """Why this model is not even tried; empty: it is."""
    if not isinstance(model, PreTrainedModel):
        return "it is no transformers model"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation!r}, not 'sdpa'"
    if not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        return "its class does not use transformers' attention interface"
    if any(p.is_meta for p in model.parameters()):
        return "its weights are on the meta device"
    return ""


def _tried(model: PreTrainedModel) -> str:
    """Install the seam and try it. Returns what is wrong, or nothing."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _compare(model)
    except FAILS as error:
        return f"it fails when tried ({type(error).__name__}: {error})"
    finally:
        for module, mode in modes:
            module.training = mode


def _compare(model: PreTrainedModel) -> str:
    global _watch
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    call = partial(model, use_cache=False)

    def tokens(row: int, length: int) -> Tensor:
        return (torch.arange(length, device=device) * 7919 + 31 * row + 17) % vocabulary

    first, second = 5, 9
    ids = torch.zeros(2, second, dtype=torch.int64, device=device)
    ids[0, :first], ids[1] = tokens(0, first), tokens(1, second)
    there = torch.arange(second, device=device)[None] < torch.tensor([[first], [second]], device=device)
    own = call(input_ids=ids, attention_mask=there.long()).logits
    alone = torch.cat([own[0, :first], own[1]])

    model.set_attn_implementation(NAME)
    if not installed(model):
        return "transformers did not install the seam"
    watch = _watch = _Watch()
    try:
        if not torch.equal(call(input_ids=ids, attention_mask=there.long()).logits, own):
            return "its padded batches come out differently"
        lengths = [first, second]
        cu_seqlens = torch.tensor([0, first, first + second], dtype=torch.int32, device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        together, other = (
            call(
                input_ids=torch.cat([tokens(row, first), tokens(1, second)])[None],
                position_ids=positions,
                **packed_kwargs(cu_seqlens, lengths),
            ).logits[0]
            for row in (0, 2)
        )
    finally:
        _watch = None
    if watch.odd:
        return watch.odd
    if not watch.packed or watch.packed != 2 * watch.plain:
        return "its layers do not pass the packing on to their attention"
    largest = float(alone.abs().max())
    kind = "fp32" if alone.dtype in (torch.float32, torch.float64) else "16 bit"
    apart = float((together - alone).abs().max())
    leak = float((together[first:] - other[first:]).abs().max())
    if not apart <= APART[kind] * largest:
        return f"packed rows come out differently than padded ones (by {apart:.2g}, largest logit {largest:.2g})"
    if not leak <= LEAK[kind] * largest:
        return f"a packed row sees the one before it (by {leak:.2g})"
    return ""
