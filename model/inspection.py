"""A finished model under the microscope: where it looks, which shapes pass through it, how likely an answer is to it.

In:  the folder of a checkpoint, and batches (dataset/collate.py).  Out: plain tensors, for figures.
Legend: T tokens of a document, L learned tokens of a batch, H heads, K channels per head.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import checkpoint
from model.generate import Answer, generate
from model.llm.attention import PackedSequences
from model.losses import score, sum_by_document
from model.registry import UserError

ROOT = Path(__file__).parents[1]


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The weights of one document: q (T, H, K), k (T, fewer heads, K) -> (H, T, T), causal, each row sums to 1.

    What `model/llm/attention.py` writes out in its docstring: softmax(q k^T / sqrt(K)). A fused kernel returns only weights @ v.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (T, H, K): heads that share a key get copies of it
    scores = torch.einsum("qhk,thk->hqt", q.float(), k.float()) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


class Seen(NamedTuple):
    """What the attention of one block was given and what it returned, all documents on one axis."""

    q: Tensor
    k: Tensor
    v: Tensor
    packed: PackedSequences
    out: Tensor


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[list[Seen]]:
    """A list that fills, inside the block, with what each block's attention sees. UserError for an `llm` that is not ours.

    Another thread may use the model at the same time: what it computes is not recorded.
    """
    layers: list[Any] = [getattr(block, "self_attn", None) for block in model.llm.blocks]
    if not all(hasattr(layer, "attend") for layer in layers):
        raise UserError(f"the attention of {model.config.llm_name} is inside another library: only gpt shows its weights")
    seen: list[Seen] = []
    thread = threading.get_ident()

    def recorder(attend: Any) -> Any:
        def attend_and_record(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
            out = attend(q, k, v, packed)
            if threading.get_ident() == thread:
                seen.append(Seen(q, k, v, packed, out))
            return out

        return attend_and_record

    for layer in layers:
        layer.attend = recorder(layer.attend)  # of the instance: it hides the function of the class
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.attend


class Step(NamedTuple):
    """A part that a batch passed: its file, and the shapes of the first tensor that it took and of the one that it gave."""

    file: str
    took: tuple[int, ...]
    gave: tuple[int, ...]


def beside(folder: Path) -> dict[str, Path]:
    """Name -> folder of the checkpoints in the same place, itself included: the stages in their order, then the others."""
    found = {}
    for file in sorted(folder.resolve().parent.glob("*/config.json")):
        with contextlib.suppress(UserError):  # what another program wrote
            checkpoint.read_config(file.parent)
            found[file.parent.name] = file.parent
    stages = [name for name in reversed(checkpoint.STAGES) if name in found]
    return {name: found[name] for name in dict.fromkeys([*stages, *found])}


class Inspector:
    """A model and the questions that figures and the page ask it; batches may lie on another device."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.folder, self.model = folder, checkpoint.load(folder, device)
        self.tokenizer_file = checkpoint.tokenizer_file(folder)

    def on_device(self, batch: dict) -> dict:
        """The batch where the model is."""
        device = next(self.model.parameters()).device
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}

    @torch.inference_mode()
    def attention(self, batch: dict, block: int = -1) -> list[Tensor]:
        """The attention weights of one block, by default the last, in each document of the batch: (H, T, T) each."""
        with recorded(self.model) as seen:
            score(self.model, self.on_device(batch))
        lengths = seen[block].packed.lengths.tolist()
        return [attention_weights(q, k) for q, k in zip(seen[block].q.split(lengths), seen[block].k.split(lengths))]

    @torch.inference_mode()
    def answer_logps(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(documents,), (documents,): the log-probability of what is learned of each document in nats, and its tokens."""
        scores = score(self.model, self.on_device(batch))
        return sum_by_document(scores.logps, scores.owner, len(batch["ids"]))

    @torch.inference_mode()
    def likeliest(self, batch: dict, count: int, banned: Sequence[int] = ()) -> list[list[tuple[int, float]]]:
        """For each learned token of a batch the `count` likeliest tokens at its place: (id, probability), the likeliest first."""
        top = score(self.model, self.on_device(batch), banned=banned).logits.softmax(-1).topk(count)  # (L, count)
        return [list(zip(ids, shares)) for ids, shares in zip(top.indices.tolist(), top.values.tolist())]

    def sample(self, batch: dict, group_size: int, *, temperature: float, **options: Any) -> list[Answer]:
        """`group_size` answers to each prompt of a padded batch; the same ones whenever this is called."""
        return generate(self.model, batch, group_size=group_size, temperature=temperature,
                        generator=torch.Generator().manual_seed(0), **options)

    @torch.inference_mode()
    def steps(self, batch: dict) -> dict[str, Step]:
        """encoder, connector, llm -> what went in and came out, of a batch with pixels."""
        steps: dict[str, Step] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, taken: tuple, given: Tensor) -> None:
                file = Path(inspect.getfile(type(module)))
                known = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
                steps[name] = Step(known, tuple(taken[0].shape), tuple(given.shape))

            return hook

        handles = [part.register_forward_hook(watch(name)) for name, part in self.model.parts.items()]
        try:
            score(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return steps
