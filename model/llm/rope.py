"""RoPE's frequencies: how fast each pair of channels rotates with the position, and how to stretch that to longer texts.

In:  a config.  Out: frequencies (K / 2,), in radians per token; K channels per head.
`rope_scaling` of a config is Hugging Face's: {"rope_type": "llama3", "factor": 8.0, ...}; None leaves the frequencies unchanged.
"""

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


def scaling(parameters: dict) -> dict | None:
    """Hugging Face's `rope_scaling` (transformers 5: `rope_parameters`) as LLMConfig stores it; UserError for an unknown type."""
    parameters = {key: value for key, value in parameters.items() if key not in ("rope_theta", "type")} | {
        "rope_type": parameters.get("rope_type", parameters.get("type", "default"))}
    if parameters["rope_type"] == "default":
        return None
    if parameters["rope_type"] not in SCALINGS:
        raise UserError(f"rope_type {parameters['rope_type']!r} is not implemented; known: default, {', '.join(SCALINGS)}. "
                         f"--llm huggingface:... runs the model through transformers")
    return parameters


def frequencies(config: LLMConfig, device: torch.device) -> Tensor:
    """(K / 2,): pair i rotates by 1 / theta^(2i/K) radians per token (arXiv 2104.09864, eq. 15), stretched by rope_scaling."""
    powers = torch.arange(0, config.head_channels, 2, device=device).float() / config.head_channels
    unscaled = 1.0 / (config.rope_theta**powers)
    if config.rope_scaling is None:
        return unscaled
    kind, options = config.rope_scaling["rope_type"], {k: v for k, v in config.rope_scaling.items() if k != "rope_type"}
    return SCALINGS[kind](unscaled, **options)
