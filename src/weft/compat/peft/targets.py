"""peft's rules for which modules a configuration means."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from weft.compat.peft.kinds import NoMatchingPeftModuleError, PeftType, TaskType
from weft.core import is_linear, modules

HEADS = ("score", "classifier")
SHORTHAND = "all-linear"
DUMMY = "dummy-target-modules"
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20  # from here on a list of targets is written as the fewest endings that mean the same


class ExcludedModule:
    """False, for a module that was kept out on purpose."""

    def __bool__(self) -> bool:
        return False


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """A regular expression as `target_modules` means the whole path."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first key of a rank or alpha pattern that fits the end of a path; the path if none does."""
    return next((k for k in pattern_keys if re.match(rf"(.*\.)?({k})$", key_to_match)), key_to_match)


def check_target_module_exists(config: Any, key: str) -> Any:
    """Whether a configuration targets the module at a path; an ExcludedModule if it does but for an exclusion."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded:
        out = re.fullmatch(excluded, key) if isinstance(excluded, str) else _ends(key, excluded)
        if out:
            return ExcludedModule()
    if any(re.match(rf"(^|.*\.){m}($|\..*)", key) for m in getattr(config, "modules_to_save", None) or ()):
        return ExcludedModule()
    targets = config.target_modules
    if targets is None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True
    return any(key.endswith(f".{t}") for t in targets) and _in_layers(config, key)


def _ends(key: str, names: Any) -> bool:
    return key in names or any(key.endswith(f".{n}") for n in names)


def _in_layers(config: Any, key: str) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or (isinstance(wanted, list) and not wanted):
        return True
    given = getattr(config, "layers_pattern", None)
    if not given:
        patterns = [r".*?\.[^.]*\.(\d+)\."]  # lazily, so that the layer counts and not an expert inside it
    else:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([given] if isinstance(given, str) else given)]
    found = next((m for p in patterns if (m := re.match(p, key))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def include_all_linear(config: Any, model: nn.Module, everything: dict[str, nn.Module]) -> None:
    """Write the paths of all linear layers but the head into a configuration that says "all-linear"."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != SHORTHAND:
        return
    heads: set[str] = set()
    if hasattr(model, "get_output_embeddings") and hasattr(model, "config"):
        head: Any = model.get_output_embeddings()
        while head is not None and hasattr(head, "base_layer"):
            head = head.base_layer
        heads = {p for p, m in everything.items() if m is head}
        if head is None and config.task_type == TaskType.SEQ_CLS:
            first = next((h for h in HEADS if getattr(model, h, None) is not None), None)
            heads = {first} if first else set()
    config.target_modules = {p for p, m in everything.items() if is_linear(m) and p not in heads}


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which of a model's modules an adapter's configuration means, and which not."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in modules(tuner.model):
        found["matched" if check_target_module_exists(config, path) else "unmatched"].append(path)
    return found


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    include_all_linear(peft_config, model, dict(modules(model)))
    return peft_config


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest endings of paths that mean these modules and none of the others.

    Raises ValueError for no names, an empty one, or names that stand in both.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    wanted, others = set(target_modules), set(other_module_names)
    if "" in wanted:
        raise ValueError("target_modules should not contain an empty string.")
    if wanted & others:
        raise ValueError(f"target_modules and other_module_names contain common elements: {sorted(wanted & others)[:3]}")

    def endings(path: str) -> list[str]:
        parts = path.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = {e for path in others for e in endings(path)}
    found: set[str] = set()
    for path in sorted(wanted, key=endings):
        if not any(path.endswith(f".{e}") for e in found):
            found |= set([e for e in endings(path) if e not in taken and e not in found][:1])
    return found or wanted


def condense(config: Any, everything: Collection[str]) -> None:
    """Write a long list of targets as the fewest endings that mean the same, as peft does."""
    names = getattr(config, "target_modules", None)
    if isinstance(names, list | set) and len(names) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION and config.peft_type != PeftType.IA3:
        ends = tuple(f".{n}" for n in names)
        fewer = _find_minimal_target_modules(names, [p for p in everything if p and p not in names and not p.endswith(ends)])
        if len(fewer) < len(names):
            config.target_modules = fewer


def find_targets(
    config: Any, everything: Mapping[str, nn.Module], keys: Collection[str] | None, prefix: str, parameters: list[str]
) -> list[str]:
    """The paths that a configuration adapts; with the keys of a state, those that it names (and a warning where the two differ).

    Raises peft's errors if there are none. `parameters` are those found for `target_parameters`.
    """
    excluded, unmatched, targeted, meant = [], [], [], []
    wanted = None if keys is None else {k.rsplit("." + prefix, 1)[0].removeprefix("_orig_mod.") for k in keys}
    for path in everything:
        if not path:
            continue
        result = check_target_module_exists(config, path)
        if wanted is not None:
            (targeted if path in wanted else unmatched).append(path)
            if result:
                meant.append(path)
        elif isinstance(result, ExcludedModule):
            excluded.append(path)
        else:
            (targeted if result else unmatched).append(path)
    if wanted is not None and set(meant) != set(targeted):
        more, less = sorted(set(meant) - set(targeted)), sorted(set(targeted) - set(meant))
        text = "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        text += "state_dict. "
        text += "This is not necessarily an issue and can be ignored if this was the intent. "
        text += f"The PEFT config contained these additional target modules: {more}. " if more else ""
        text += f"The state_dict contained these additional target modules: {less}. " if less else ""
        warnings.warn(text, RuntimeWarning, stacklevel=6)
    check_found(config, targeted, excluded, unmatched, parameters)
    return targeted


def check_found(config: Any, targeted: list[str], excluded: list[str], unmatched: list[str], parameters: list[str]) -> None:
    """Raise peft's errors if nothing was targeted, and give its warnings if something asked for was not."""
    if config.target_modules == DUMMY:
        return
    if not targeted and not parameters:
        extra = ""
        if getattr(config, "layers_to_transform", None) is not None:
            extra += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
        if getattr(config, "layers_pattern", None) is not None:
            extra += f" You also specified 'layers_pattern': {config.layers_pattern}."
        if excluded and not unmatched:
            text = (
                "All modules were excluded. This is likely unintended. "
                "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
            )
        elif not excluded and not config.target_modules:
            text = "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments."
        elif not excluded:
            text = (
                f"Target modules {config.target_modules} not found in the base model. "
                f"Please check the target modules and try again.{extra}"
            )
        else:
            text = (
                "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules and "
                "excluded modules. Please check your `target_modules` and `exclude_modules` configuration. You may also have only "
                f"targeted modules that are marked to be saved (`modules_to_save`).{extra}"
            )
        raise NoMatchingPeftModuleError(text)
    if getattr(config, "exclude_modules", None) and not excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=4,
        )
    elif config.target_modules and not targeted:
        warnings.warn(f"target_modules={config.target_modules} were set but no module was matched.", RuntimeWarning, stacklevel=4)
    elif getattr(config, "target_parameters", None) and not parameters:
        text = f"target_parameters={config.target_parameters} were set but no parameter was matched."
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None) or {}
        idle = sorted(k for k in patterns if not any(re.match(rf"(.*\.)?({k})$", p) for p in targeted))
        if idle:
            text = f"The following {field} keys did not match any targeted module and were ignored: {idle}."
            warnings.warn(text, RuntimeWarning, stacklevel=4)
