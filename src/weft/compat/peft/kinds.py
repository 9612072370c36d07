"""The names that peft gives to methods and tasks, and the errors and warnings that its users catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from weft.core import WeftError


class PeftType(str, Enum):  # noqa: UP042 (as in peft: its text is "PeftType.LORA")
    """Every method that peft 0.21 has a name for; `weft.compat.peft.PEFT_TYPE_TO_TUNER_MAPPING` holds those that weft computes."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, Enum):  # noqa: UP042
    """What a model is for; it chooses the class that wraps it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftError(Exception):
    """The root of peft's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration that fits no module of the model."""


class PeftWarning(UserWarning):
    """The root of peft's own warnings."""


class FaceError(WeftError, ValueError):
    """A WeftError as it leaves this face: peft's users catch ValueError."""


@contextmanager
def as_value_error() -> Iterator[None]:
    """Inside, a WeftError becomes a FaceError with the same message."""
    try:
        yield
    except FaceError:
        raise
    except WeftError as e:
        raise FaceError(str(e)) from e
