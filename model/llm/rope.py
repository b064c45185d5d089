"""RoPE's frequencies: how fast each pair of channels rotates with the position, and how to stretch that to longer texts.

In:  a config.  Out: frequencies (K / 2,), in radians per token; K channels per head.
`rope_scaling` of a config is Hugging Face's: {"rope_type": "llama3", "factor": 8.0, ...}; None leaves the frequencies unchanged.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import LLMConfig
from model.registry import UserError


def linear(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation (arXiv 2306.15595): every pair rotates `factor` times slower."""
    return frequencies / factor


def llama3(frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float,
           original_max_position_embeddings: int) -> Tensor:
    """Llama 3.1: fast pairs, with many turns in the original context, stay; slow ones are slowed; those between are blended."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    unchanged = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)  # share of the old frequency
    return unchanged * frequencies + (1 - unchanged) * frequencies / factor


SCALINGS: dict[str, Callable[..., Tensor]] = {"linear": linear, "llama3": llama3}


def options(parameters: dict) -> dict:
    """Those keys of `rope_scaling` that its type computes with. Others, such as the length of training, change nothing."""
    _, *names = inspect.signature(SCALINGS[parameters["rope_type"]]).parameters
    return {name: parameters[name] for name in names if parameters.get(name) is not None}


def scaling(parameters: dict) -> dict | None:
    """Hugging Face's `rope_scaling` (transformers 5: `rope_parameters`) as LLMConfig stores it.

    UserError for a type that is not implemented, a missing key, or RoPE on a part of the channels.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    elsewhere = "--llm huggingface:... runs the model through transformers"
    if (parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not implemented; {elsewhere}")
    if kind == "default":
        return None
    if kind not in SCALINGS:
        raise UserError(f"rope_type {kind!r} is not implemented; known: default, {', '.join(SCALINGS)}. {elsewhere}")
    used = options({**parameters, "rope_type": kind})
    _, *needed = inspect.signature(SCALINGS[kind]).parameters
    if missing := [name for name in needed if name not in used]:
        raise UserError(f"rope_type {kind!r} needs {', '.join(missing)} in config.json: add what the model was trained with")
    return {"rope_type": kind, **used}


def frequencies(config: LLMConfig, device: torch.device) -> Tensor:
    """(K / 2,): pair i rotates by 1 / theta^(2i/K) radians per token (arXiv 2104.09864, eq. 15), stretched by rope_scaling."""
    powers = torch.arange(0, config.head_channels, 2, device=device).float() / config.head_channels
    unscaled = 1.0 / (config.rope_theta**powers)
    if config.rope_scaling is None:
        return unscaled
    return SCALINGS[config.rope_scaling["rope_type"]](unscaled, **options(config.rope_scaling))
