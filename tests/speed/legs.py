"""Ways to compute the same step, each a leg with its own copy of one model: padded as others do it, and as the scripts do it.

In:  a model, documents, and a form.  Out: seconds of the leg's micro-batches and of its update; losses.

A step is that of the stage's script: forward, backward, clip, update; of preferences the reference's log-probabilities are known.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.dpo.losses import DPO, Pairs
from model.in_threads import on_cores
from model.llm.attention import PackedSequences
from model.losses import IGNORE, next_token_targets, sum_by_document
from model.optimizer import clip_gradients, make_optimizer
from model.vlm import VLM
from tests.speed.measuring import seconds
from tests.speed.rows import Stage

SFT_WEIGHT = 1.5  # of the SFT term beside DPO's loss, as in 3-rl_vlm.py


@dataclass(frozen=True)
class Form:
    """One way to compute a step."""

    name: str
    padded: str  # "maximum": rows padded to a fixed length; "longest": to the micro-batch's longest; "": no padding
    everywhere: bool  # logits at every position, padding too; otherwise where something is learned
    stored: bool  # the frozen encoder's features are stored; otherwise it runs at every step


MAXIMUM = Form("padded to the maximum", "maximum", everywhere=True, stored=False)
LONGEST = Form("padded to the longest", "longest", everywhere=True, stored=False)
EVERY_STEP = Form("packed, encoder at every step", "", everywhere=False, stored=False)
OURS = Form("packed, features stored", "", everywhere=False, stored=True)
FORMS = (MAXIMUM, LONGEST, EVERY_STEP, OURS)
LADDER = (MAXIMUM, LONGEST, Form("+ logits where learned", "longest", everywhere=False, stored=False),
          Form("+ features stored", "longest", everywhere=False, stored=True), OURS)  # fmt: skip


class Times(NamedTuple):
    """What a leg took: seconds of the forward and backward passes of so many rows, and of one update."""

    rows: int
    passes: float
    update: float

    def samples_per_second(self, batch_size: int) -> float:
        """Rows a second where every update has this many, in micro-batches like those that were timed."""
        return 1 / (self.passes / self.rows + self.update / batch_size)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """What a padded implementation does: rows of one length are padded already, so nothing is copied."""
    q, k, v = (x.unflatten(0, (packed.count, packed.longest)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


class Leg:
    """A form with its own copy of the weights, its optimizer and its micro-batches."""

    def __init__(self, form: Form, stage: Stage, model: VLM, batches: list[dict], dtype: torch.dtype, optimizer: str):
        self.form, self.stage, self.dtype, self.batches = form, stage, dtype, batches
        self.device = next(model.parameters()).device
        self.model = VLM(model.config, encoder=model.encoder).to(self.device)  # the encoder is frozen: one serves all legs
        self.model.load_state_dict(model.state_dict())
        self.model.connector.requires_grad_(not stage.pairs)  # the scripts' recipes
        self.optimizer = make_optimizer(self.model, optimizer, lr=stage.lr, weight_decay=stage.weight_decay, dtype=dtype)
        self.called = self.model if form.padded else on_cores(self.model)
        if form.padded:
            for block in self.model.llm.blocks:
                block.self_attn.attend = attend_rows
        if stage.pairs:
            with torch.no_grad():
                for batch in batches:
                    batch["reference"] = self.answer_logps(batch)[0]

    def logps(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The log-probability of each token with logits, 0 where nothing is learned; its document; whether it is learned."""
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        wanted = torch.ones_like(targets, dtype=torch.bool) if self.form.everywhere else targets != IGNORE
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.called(batch, wanted)
        targets = targets[wanted]
        logps = -F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
        return logps, batch["document_ids"][wanted], targets != IGNORE

    def answer_logps(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(documents,), (documents,): the log-probability of each answer, and its tokens."""
        logps, owner, learned = self.logps(batch)
        documents = len(batch["ids"])
        return sum_by_document(logps, owner, documents)[0], torch.bincount(owner[learned], minlength=documents)

    def loss(self, batch: dict) -> Tensor:
        """The mean over learned tokens; of preferences, over pairs."""
        if not self.stage.pairs:
            logps, _, learned = self.logps(batch)
            return -logps.sum() / learned.sum()
        logps, lengths = self.answer_logps(batch)
        before = batch["reference"]
        pairs = Pairs(logps[0::2], logps[1::2], before[0::2], before[1::2], lengths[0::2], lengths[1::2])
        return (DPO()(pairs) - SFT_WEIGHT * pairs.chosen / pairs.chosen_tokens).mean()

    def update(self) -> None:
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: dict) -> float:
        """One update; returns the loss before it."""
        loss = self.loss(batch)
        loss.backward()
        self.update()
        return loss.item()

    def round(self) -> Times:
        """One pass over the micro-batches, and an update. Padded to the maximum, all cost the same, and one is enough."""
        batches = self.batches[:1] if self.form.padded == "maximum" else self.batches
        passes = seconds(lambda: [self.loss(batch).backward() for batch in batches], self.device)
        return Times(sum(len(batch["ids"]) for batch in batches), passes, seconds(self.update, self.device))

    def operations(self, batch_size: int) -> float:
        """Floating-point operations of one row in matrix products, with its share of an update."""
        self.called, called = self.model, self.called  # the counter sees those of its own thread
        with FlopCounterMode(display=False) as passes:
            for batch in self.batches:
                self.loss(batch).backward()
        with FlopCounterMode(display=False) as update:
            self.update()
        self.called, rows = called, sum(len(batch["ids"]) for batch in self.batches)
        return passes.get_total_flops() / rows + update.get_total_flops() / batch_size
