"""One rank of a ring, for tests/test_context_parallel.py: each case computed by all ranks, and by this one alone.

Out: one JSON line: {case: largest difference of the losses and of all gradients, relative to the largest gradient}.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/ring_worker.py 2       (and RANK=1 beside it)
"""

import copy
import json
import sys
from pathlib import Path

import torch

from model import recompute, ring_attention, sharding
from model.cli import RunFlags
from model.config import VLMConfig
from model.losses import Score, count_learned, score, sum_by_document, token_entropy
from model.recipe import Mode, set_trainable
from model.rl.variants import GSPO
from model.runtime import Run
from model.vlm import VLM
from tests import tiny

LINEAR, COMPARE = "linear", "pixel_shuffle_compare"
A_PICTURE_EACH = [(13, [4]), (9, []), (17, [1, 9])]  # documents: (length, where pictures begin); 39 tokens fill no chunks exactly
CASES = {  # name: (connector, a micro-batch for each group of ranks, what is trained of the language model, how)
    "one document": (LINEAR, [[(40, [])]] * 2, "full", "ddp"),
    "packed documents": (LINEAR, [[(5, []), (1, []), (23, []), (12, [])]] * 2, "full", "ddp"),
    "a picture across a boundary": (LINEAR, [[(40, [8, 17])]] * 2, "full", "ddp"),  # boundaries at 10, 20, 30; of 4 ranks 5, ...
    "a picture late": (LINEAR, [[(21, []), (19, [12])]] * 2, "full", "ddp"),
    "pictures that are compared": (COMPARE, [[(24, [1, 6, 11, 17]), (16, [0, 9])]] * 2, "full", "ddp"),
    "fewer tokens than chunks": (LINEAR, [[(3, [])], [(2, [])]], "full", "ddp"),
    "other micro-batches": (LINEAR, [A_PICTURE_EACH, [(30, []), (3, [])]], "full", "ddp"),
    "a connector alone": (LINEAR, [A_PICTURE_EACH] * 2, "freeze", "ddp"),
    "the last block": (LINEAR, [A_PICTURE_EACH] * 2, "partial:1", "ddp"),
    "adapters": (LINEAR, [A_PICTURE_EACH] * 2, "lora:2", "ddp"),
    "recomputed": (LINEAR, [A_PICTURE_EACH] * 2, "full", "recomputed"),
    "divided weights": (LINEAR, [A_PICTURE_EACH, [(30, []), (3, [])]], "full", "zero3"),
}


def make_model(connector: str, llm: str) -> VLM:
    """In fp64, with a connector that compares its pictures where it is wanted to."""
    model = tiny.vlm(num_hidden_layers=2, attention_bias=True, qk_norm=True)
    if connector != LINEAR:
        torch.manual_seed(1)
        encoder = "clip_random:size=12,patch=4,width=16,layers=1,heads=2"
        model = VLM(VLMConfig(tiny.llm_config(num_hidden_layers=2), encoder=encoder, connector=f"{connector}:side=3",
                              image_token_id=tiny.IMAGE))  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for part, mode in (("llm", llm), ("connector", "full"), ("encoder", "full" if llm == "full" else "freeze")):
        set_trainable(model.parts[part], Mode.parse(mode))
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def make_batch(documents: list[tuple[int, list[int]]], model: VLM, seed: int) -> dict:
    """Documents on one axis, with the pixels of their pictures; a picture takes as many tokens as the model gives it."""
    size, tokens = model.encoder.size, model.image_tokens
    rows = []
    for number, (length, places) in enumerate(documents):
        ids = tiny.document(length, [], seed=seed + number)
        for place in places:
            ids[place:place + tokens] = [tiny.IMAGE] * tokens
        rows.append(ids)
    batch = {**tiny.flat(rows), "ids": [f"document {number}" for number in range(len(rows))]}
    pictures = sum(len(places) for _, places in documents)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(pictures, 3, size, size, generator=generator, dtype=torch.float64)
    return {**batch, "pixels": pixels} if pictures else batch


def losses_of(tokens: Score, answers: Score, count: int) -> torch.Tensor:
    """(2,): a sum over tokens, as SFT's; and one of whole answers, as DPO's and gspo's."""
    sums, lengths = sum_by_document(answers.logps, answers.owner, count)
    ratio = GSPO().ratio(answers.logps + 3, answers.owner)
    return torch.stack([-tokens.logps.sum(), torch.nn.functional.softplus(sums / (1 + lengths)).sum() + ratio.square().sum()])


def difference(one: list, other: list) -> float:
    """The largest of all differences, relative to the largest value; a missing gradient is one of zeros."""
    pairs = [(torch.zeros_like(b) if a is None else a.detach(), torch.zeros_like(a) if b is None else b.detach())
             for a, b in zip(one, other) if a is not None or b is not None]  # fmt: skip
    largest = max(float(b.detach().abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def error_of(run: Run, connector: str, documents: list, llm: str, how: str) -> float:
    """How far the ring is from one process."""
    alone = make_model(connector, llm)
    model = copy.deepcopy(alone)
    if how == "recomputed":
        recompute.apply(model)
    batches = [make_batch(part, alone, seed=7 * k) for k, part in enumerate(documents)][:run.data_ranks.world_size]
    whole, wrapped = batches[run.data_ranks.rank], run.wrap(model, how if how == "zero3" else "ddp")
    copied = model if how == "zero3" else copy.deepcopy(model)  # as a reference is
    batch = run.to_device(whole)
    assert batch["input_ids"].numel() < 2 * run.ring.size + whole["input_ids"].numel() / run.ring.size

    scores = score(wrapped, batch)
    losses = losses_of(scores, run.context.gather_score(scores, batch), len(batch["ids"]))
    counts = [run.sum(count_learned(batch)), run.sum(len(batch["ids"]))]
    (losses @ torch.tensor(counts).double().reciprocal() * run.world_size).backward()
    means = torch.tensor([run.sum(float(loss)) / count for loss, count in zip(losses.detach(), counts)], dtype=torch.float64)

    own = [score(alone, one) for one in batches]
    expected = sum(losses_of(one, one, len(batch["ids"])) for one, batch in zip(own, batches))
    expected = expected / torch.tensor([sum(map(count_learned, batches)), sum(len(one["ids"]) for one in batches)])
    expected.sum().backward()
    with torch.no_grad():  # the copy scores as the model does, and an ordinary batch is read as before
        same, plain = run.score(copied, batch), score(model, whole)
        entropy = run.all_tokens(token_entropy(same.logits), batch)
    mine = own[run.data_ranks.rank]
    assert torch.equal(same.owner, mine.owner) and torch.equal(plain.logps, mine.logps)
    return max(difference([means, *(sharding.gather_tensor(p.grad) for p in model.parameters())],
                          [expected, *(p.grad for p in alone.parameters())]),
               difference([same.logps, entropy], [mine.logps, token_entropy(mine.logits)]))  # fmt: skip


def main(size: int) -> None:
    # Norms and log-probabilities are computed in fp32, whatever the weights are. To compare ten digits, here fp32 means fp64.
    torch.Tensor.float = torch.Tensor.double
    ring_attention.TILE = 4  # so that a chunk has several
    flags = RunFlags(Path("unused"), "", 0, 0, save_every=1, log_every=1, device="cpu", context_parallel=size)
    run = Run(flags, "test")
    print(json.dumps({name: error_of(run, *case) for name, case in CASES.items()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
