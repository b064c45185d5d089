"""How fast each pair of channels turns with the position: RoPE's frequencies, and the ways to stretch them to longer texts.

In:  a config.  Out: frequencies (K / 2,), in radians a token.
`rope_scaling` of a config is Hugging Face's: {"rope_type": "llama3", "factor": 8.0, ...}; None leaves the frequencies alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import LLMConfig
from model.registry import UserError


def linear(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation (arXiv 2306.15595): everything turns `factor` times slower."""
    return frequencies / factor


def llama3(frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float,
           original_max_position_embeddings: int) -> Tensor:
    """Llama 3.1: pairs that turn often within the original context stay, those that hardly turn are slowed, others a blend."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


SCALINGS: dict[str, Callable[..., Tensor]] = {"linear": linear, "llama3": llama3}


def scaling(parameters: dict) -> dict | None:
    """`rope_scaling`, or `rope_parameters` since transformers 5, as LLMConfig keeps it; UserError for another kind, by name."""
    parameters = {key: value for key, value in parameters.items() if key not in ("rope_theta", "type")} | {
        "rope_type": parameters.get("rope_type", parameters.get("type", "default"))}
    if parameters["rope_type"] == "default":
        return None
    if parameters["rope_type"] not in SCALINGS:
        raise UserError(f"rope_type {parameters['rope_type']!r} is not written out; known: default, {', '.join(SCALINGS)}. "
                         f"--llm huggingface:... runs the model through transformers")
    return parameters


def frequencies(config: LLMConfig, device: torch.device) -> Tensor:
    """(K / 2,): pair i turns by 1 / theta^(2i/K) a token (arXiv 2104.09864, eq. 15), stretched where the config says so."""
    powers = torch.arange(0, config.head_channels, 2, device=device).float() / config.head_channels
    plain = 1.0 / (config.rope_theta**powers)
    if config.rope_scaling is None:
        return plain
    kind, options = config.rope_scaling["rope_type"], {k: v for k, v in config.rope_scaling.items() if k != "rope_type"}
    return SCALINGS[kind](plain, **options)
