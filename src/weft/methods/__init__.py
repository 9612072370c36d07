"""One PEFT method a file: the paper, the equation, the hyper-parameters, the module."""

from weft.methods.adalora import AdaLoRA
from weft.methods.alora import ALoRA
from weft.methods.bitfit import BitFit
from weft.methods.bottleneck import Bottleneck
from weft.methods.dora import DoRA
from weft.methods.full import Full
from weft.methods.ia3 import IA3
from weft.methods.ln_tuning import LNTuning
from weft.methods.loha import LoHa
from weft.methods.lokr import LoKr
from weft.methods.lora import LoRA
from weft.methods.oft import OFT
from weft.methods.prefix import PrefixTuning
from weft.methods.prompt import PromptTuning
from weft.methods.ptuning import PTuning
from weft.methods.subspace import Subspace
from weft.methods.trainable_tokens import TrainableTokens
from weft.methods.vera import VeRA

__all__ = [
    "IA3",
    "OFT",
    "ALoRA",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Full",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Subspace",
    "TrainableTokens",
    "VeRA",
]
