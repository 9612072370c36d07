"""Which layers a method adapts: names, globs and regular expressions against the paths of a model's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from weft.adapters.bypassed import never_called
from weft.core import Method, WeftError, base_class, is_linear, matcher, modules, several

HEADS = ("score", "classifier")  # the task heads of transformers' classifiers, which have no get_output_embeddings()


def find(model: nn.Module, method: Method, strict: bool = True) -> dict[str, nn.Module]:
    """The modules that `method` adapts, by path, in the model's order.

    Args:
        strict: Every single target must match something, and a layer that is never called is none. Without it (files made elsewhere) only
            no match at all is an error.
    Raises:
        WeftError: naming each target that matches nothing, or nothing that the method can adapt, with what could have matched.
    """
    if method.elsewhere():
        if strict and method.layers_to_transform is not None:
            raise WeftError("layers_to_transform chooses among the targets, and there are none: name parameters with their layer")
        return {}
    everything = dict(modules(model))
    able = {path: m for path, m in everything.items() if method.accepts(m) and not (strict and never_called(everything, path))}
    head = _heads(model, everything)
    chosen: set[str] = set()
    wrong: list[str] = []
    for target in several(method.targets):
        if target in ("all-linear", "all"):
            hits = {p for p, m in able.items() if target == "all" or (is_linear(m) and p not in head)}
        elif target == "auto":
            hits = set(method.auto(able, head))
        else:
            hits = {p for p in able if matcher(target)(p)}
            if not hits and strict:
                wrong.append(_why(target, everything, able, method))
        chosen |= hits
    there = chosen
    chosen = {p for p in there if method.takes(p)}
    if strict and method.layers_to_transform is not None and there:
        none = [n for n in method.layers_to_transform if not any(replace(method, layers_to_transform=(n,)).takes(p) for p in there)]
        where = f" (layers_pattern={method.layers_pattern!r})" if method.layers_pattern else ""
        wrong += [f"layers_to_transform={n}{where}: none of the targets lies in a layer of that number" for n in none]
    out = [e for e in several(method.exclude) if not any(matcher(e)(p) for p in everything)] if strict else []
    wrong += [f"exclude={e!r} matches no module" for e in out]
    chosen -= {p for p in chosen if any(matcher(e)(p) for e in several(method.exclude))}
    if wrong or not chosen:
        left = f"targets={method.targets!r} with exclude={method.exclude!r} leaves no layer to adapt"
        what = "\n  ".join(wrong) or (left if able else f"this model has nothing that {type(method).__name__} can adapt")
        raise WeftError(f"{what}\n{type(method).__name__} can adapt {method.site}. In this model: {listing(able)}")
    return {path: m for path, m in able.items() if path in chosen}


def whole(model: nn.Module, method: Method, strict: bool = True) -> dict[str, nn.Module]:
    """The modules that own parameters at and below what `method.modules_to_save` names. Raises WeftError for a name without a module."""
    everything = dict(modules(model))
    tops = {t: [p for p in everything if matcher(t)(p)] for t in several(method.modules_to_save)}
    if strict and (missing := [t for t, hits in tops.items() if not hits]):
        ends = sorted({p.rpartition(".")[2] for p in everything if p})
        near = {t: get_close_matches(t, ends, n=1) for t in missing}
        raise WeftError("\n".join(
            f"modules_to_save={t!r} matches no module" + (f"; did you mean {near[t][0]!r}?" if near[t] else "") for t in missing
        ))  # fmt: skip
    roots = {p for hits in tops.values() for p in hits}
    return {
        path: m for path, m in everything.items()
        if any(p is not None for p in m._parameters.values()) and any(path == r or path.startswith(f"{r}.") for r in roots)
    }  # fmt: skip


def with_tied(model: nn.Module, method: Method, there: Callable[[str], bool]) -> Method:
    """A method that does to the layers which share an embedding's weight what it does to the embedding: peft's `ensure_weight_tying`.

    there: Whether a file has something for the layer at a path; peft looks for embeddings by their name, and does not know all of them.
    """
    everything = dict(modules(model))
    targeted, kept = find(model, method, strict=False), whole(model, method, strict=False)

    def beside(chosen: Mapping[str, nn.Module]) -> tuple[str, ...]:
        weights = {id(m.weight) for m in chosen.values() if isinstance(m, nn.Embedding)}
        return tuple(p for p, m in everything.items() if id(m._parameters.get("weight")) in weights and p not in chosen and there(p))

    return replace(
        method,
        targets=(*several(method.targets), *beside(targeted)),
        modules_to_save=(*several(method.modules_to_save), *beside(kept)),
    )


def listing(found: Mapping[str, nn.Module], most: int = 20) -> str:
    """The ends of many paths with their types and numbers: "q_proj (Linear × 32), lm_head (Linear)"."""
    kinds = Counter((path.rpartition(".")[2] or "(the model itself)", base_class(m).__name__) for path, m in found.items())
    if not kinds:
        return "nothing"
    names = [f"{name} ({kind}{f' × {n}' if n > 1 else ''})" for (name, kind), n in kinds.items()]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _heads(model: nn.Module, everything: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the output head, which "all-linear" leaves out: it is a task's own, often tied to the embedding, and costs most."""
    ask = getattr(model, "get_output_embeddings", None)
    if ask is None:
        return set()
    head = ask()
    return {p for p, m in everything.items() if (head is not None and m is head) or p in HEADS}


def _why(target: str, everything: Mapping[str, nn.Module], able: Mapping[str, nn.Module], method: Method) -> str:
    match = matcher(target)
    hits = [p for p in everything if match(p)]
    if hits:
        kind = base_class(everything[hits[0]]).__name__
        if never_called(everything, hits[0]):
            parent = base_class(everything[hits[0].rpartition(".")[0]]).__name__
            return f"targets={target!r} is inside {parent}, which reads its weight and never calls it: an adapter there would do nothing"
        return f"targets={target!r} matches only {kind} ({hits[0]}), which {type(method).__name__} cannot adapt"
    if "," in target and not target.startswith("re:"):
        return f"targets={target!r} matches no module; several are a list: '[{', '.join(w.strip(' []') for w in target.split(','))}]'"
    near = get_close_matches(target, sorted({p.rpartition(".")[2] for p in able} | set(able)), n=1)
    return f"targets={target!r} matches no module" + (f"; did you mean {near[0]!r}?" if near else "")
