"""The reference: the model that a run began with, which the policy is compared with.

In:  a model before its first step.  Out: `reference_model(model)`, which stays as it is while the policy learns.

    only lora:R trains    the model with its adapters switched off: no second model in memory
    else                  a copy
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from model import lora
from model.vlm import VLM

ReferenceModel = Callable[[], AbstractContextManager[VLM]]  # `with reference() as model:`


def only_adapters_train(model: VLM) -> bool:
    """Whether only LoRA adapters are trained."""
    return all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def reference_model(model: VLM) -> ReferenceModel:
    """The model as it is now, to use in `with reference() as model:`. Call this before the first step."""
    if not only_adapters_train(model):
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        return lambda: nullcontext(frozen)

    @contextmanager
    def switched_off() -> Iterator[VLM]:
        with lora.switched_off(model):
            yield model

    return switched_off


def fingerprint(*parts: str | bytes | dict[str, Tensor]) -> str:
    """A hash of everything but the pair that a log-probability depends on: config, tokenizer, weights, ..."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            for name, tensor in sorted(part.items()):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:32]


def policy_fingerprint(model: VLM, tokenizer_bytes: bytes, dtype: str) -> str:
    """A hash of all that decides a policy's log-probabilities: config, tokenizer, precision and weights."""
    return fingerprint(model.config.to_json(), tokenizer_bytes, dtype, lora.merged(model))
