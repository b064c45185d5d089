"""Any other causal language model, run by transformers instead of model/llm/gpt.py: GPT-NeoX, Phi, Gemma, StableLM, ...

In:  huggingface:SOURCE, a folder that `save_pretrained` wrote, or a name on the Hugging Face hub.
Out: a module that keeps the contract of model/llm/__init__.py. The checkpoint holds its weights and its complete config.

    python 1-pretrain_vlm.py --llm huggingface:microsoft/phi-1_5 --template chatml --train.llm freeze
Simple, not fast: it pads every document to the longest. It never runs code that comes with a model. RL by ppo needs gpt.
"""

import json
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from model.config import LLMConfig
from model.hub import local_folder, one_line
from model.llm import LanguageModel
from model.llm.attention import PackedSequences
from model.llm.pretrained import Pretrained
from model.registry import LLMS, PRETRAINED, UserError


class Cache:
    """Keys and values of B sequences, padded on the left so that in every row the newest token comes last."""

    def __init__(self, rows: int, config, device: torch.device):
        from transformers import DynamicCache

        self.past = DynamicCache(config=config)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens that each row holds
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=device)  # (B, filled slots), 0 on padding

    def advance(self, mask: Tensor) -> None:
        """Count tokens that are about to be stored: mask (B, T), 0 on padding."""
        self.mask, self.lengths = torch.cat([self.mask, mask], dim=1), self.lengths + mask.sum(1)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (indices), in this order."""
        self.past.batch_select_indices(rows)
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, side by side."""
        self.past.batch_repeat_interleave(times)
        self.lengths = self.lengths.repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)


KEPT: ContextVar[Tensor | None] = ContextVar("kept", default=None)  # a thread's own: model/in_threads.py computes in several


def keep_some(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A hook before a head: of hidden states (B, T, C) it gets only the kept ones, (L, C).

    Logits of all would need gigabytes where the vocabulary has 150,000 words.
    """
    return None if (kept := KEPT.get()) is None else (inputs[0].flatten(0, 1)[kept],)


@LLMS.register("huggingface")
class HuggingFace(LanguageModel):
    """Any causal language model of transformers."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        if config.transformers is None:
            raise UserError("huggingface needs a model: write --llm huggingface:FOLDER or huggingface:OWNER/NAME")
        from transformers import AutoConfig, AutoModelForCausalLM

        theirs = AutoConfig.for_model(**{**config.transformers, "vocab_size": config.vocab_size})
        self.lm = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, trust_remote_code=False)
        self.lm.get_output_embeddings().register_forward_pre_hook(keep_some)
        self.dim = self.lm.get_input_embeddings().embedding_dim
        self.register_state_dict_post_hook(drop_shared)

    @property
    def blocks(self) -> list[nn.Module]:
        """The first nn.ModuleList with num_hidden_layers modules."""
        layers = self.lm.config.num_hidden_layers
        return list(next(m for m in self.lm.modules() if isinstance(m, nn.ModuleList) and len(m) == layers))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) -> (T, C)."""
        return self.lm.get_input_embeddings()(input_ids)

    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences; it grows with them, whatever the capacity."""
        return Cache(rows, self.lm.config, self.lm.device)

    def forward(self, x: Tensor, position_ids: Tensor, packed: PackedSequences | None, logits_to_keep: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """x (T, C), position_ids (T,), logits_to_keep (T,) bool or None for all -> logits (selected, V)."""
        if packed is None and cache is not None:  # one new token for every row of the cache
            cache.advance(torch.ones_like(cache.lengths)[:, None])
            logits = self.lm(inputs_embeds=x[:, None], position_ids=position_ids[:, None], attention_mask=cache.mask,
                             past_key_values=cache.past).logits[:, 0]  # (B, V)  # fmt: skip
            return logits if logits_to_keep is None else logits[logits_to_keep]
        if packed is None:
            raise ValueError("attention needs packed sequences or a cache")
        shape, slots, cached = (packed.count, packed.longest), packed.padding.slots, {}
        if cache is not None:  # pad on the left; without a cache on the right, where causal attention needs no mask
            slots = slots + (packed.longest - packed.lengths)[packed.owner]
            cache.advance(torch.zeros(shape, dtype=torch.long, device=x.device).flatten().index_fill(0, slots, 1).view(shape))
            cached = {"attention_mask": cache.mask, "past_key_values": cache.past}

        def pad(values: Tensor) -> Tensor:
            """(T, ...) -> (documents, longest, ...)."""
            padded = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
            return padded.index_copy(0, slots, values).unflatten(0, shape)

        token = KEPT.set(slots if logits_to_keep is None else slots[logits_to_keep])
        try:
            return self.lm(inputs_embeds=pad(x), position_ids=pad(position_ids), use_cache=cache is not None, **cached).logits
        finally:
            KEPT.reset(token)


def drop_shared(module: nn.Module, tensors: dict, prefix: str, metadata: dict) -> None:
    """Remove a tensor's second name (that of a tied head), so that it is stored once."""
    seen = set()
    for name in [name for name in tensors if name.startswith(prefix)]:
        memory = tensors[name].data_ptr(), tensors[name].shape
        if memory in seen and tensors[name].numel() and tensors[name].device.type != "meta":
            del tensors[name]
        seen.add(memory)


@PRETRAINED.register("huggingface")
def huggingface(source: str) -> Pretrained:
    """Any causal language model that transformers can read."""
    from transformers import AutoModelForCausalLM

    folder = local_folder(str(source))
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot read {folder}, and code that comes with a model is never run: "
                        f"{one_line(error)}") from error
    values = json.loads(lm.config.to_json_string(use_diff=False))
    config = lm.config
    if config.get_text_config() is not config:
        raise UserError(f"{folder} holds more than a language model ({config.model_type}): name the language model inside it")
    table = lm.get_input_embeddings().weight
    shape = LLMConfig(
        vocab_size=len(table), hidden_size=table.shape[1], num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_attention_heads,
        intermediate_size=getattr(config, "intermediate_size", 4 * table.shape[1]),
        head_dim=getattr(config, "head_dim", None), max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings, transformers=values,
    )  # fmt: skip
    tensors = {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}
    head = lm.get_output_embeddings()
    tables = tuple(name for name, tensor in tensors.items() if any(
        tensor.data_ptr() == known.data_ptr() for known in (table, head.weight, head.bias) if known is not None))
    drop_shared(lm, tensors, "", {})
    return Pretrained("huggingface", folder, shape=shape, tensors=tensors, tables=tables)
