"""A process that trains with the code of another project, one round whenever it is asked: tests/speed/peers.py starts it.

In:  a name and the folder of its code; on stdin a task (peers.Task), then "warm up" and "round", each a line of JSON.
Out: on stdout a line of JSON for each: loss and memory, or rows and seconds.

    python -m tests.speed.peer_worker minimind-v PATH

Both peers train what is trained here, with their own model, loss, collation and AdamW: the language model and the projector.
Pictures are tensors, drawn at random, and encoders have random weights. OpenMP waits as it does here. What is ours:

    minimind-v   rows are padded to the max_seq_len of its scripts, as its VLMDataset does; that class would read JPEGs. The ViT
                 is transformers' SiglipVisionModel from a config. On a CPU its scripts compute in fp32 alone.
    nanovlm      data.processors is replaced, which would fetch a tokenizer and import einops; no weights are loaded. Its knapsack
                 fills sequences as long as a padded row of the stage. Its attention gets no mask of the padding beside the causal
                 one: newer versions of PyTorch refuse both, and without it costs less. It computes in bf16, but in fp32 where
                 the benchmark does.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.speed.measuring import added_memory, peak_memory, pick_device, prepare, seconds

IMAGE, PAD = 4, 2  # as in rows.py, which this process must not import
MAX_SEQ_LEN = {"pretrain": 450, "sft": 768}  # of trainer/train_pretrain_vlm.py and train_sft_vlm.py of MiniMind-V
SEQUENCES = 2  # TrainConfig.batch_size of nanoVLM; its knapsack takes the rows of four such batches at a time


class System:
    """A peer with its micro-batches: a subclass makes `model`, `batches` and `loss`."""

    model: nn.Module
    batches: list[dict[str, Any]]  # with `rows`, the rows that each holds
    loss: Callable[[dict[str, Any]], Tensor]

    def __init__(self, task: dict[str, Any]):
        self.task, self.device = task, pick_device(task["device"])
        self.patches = (task["encoder"]["size"] // task["encoder"]["patch"]) ** 2
        self.make()
        self.model.to(self.device)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=task["lr"])
        self.next_batch = itertools.cycle(self.batches)

    def make(self) -> None:
        raise NotImplementedError

    def autocast(self, wanted: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted and self.task["dtype"] == "bf16")

    def rows(self) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """(token ids, labels, pixels (1, 3, S, S)) of each document. A class token, which peers lack, becomes one of the text."""
        size = self.task["encoder"]["size"]
        for ids, learn in self.task["documents"]:
            ids = [IMAGE + 1] * (self.task["image_tokens"] - self.patches) + ids[self.task["image_tokens"] - self.patches:]
            yield ids, [token if flag else -100 for token, flag in zip(ids, learn)], torch.randn(1, 3, size, size)

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        loss = self.loss(next(self.next_batch))
        loss.backward()
        self.update()
        return loss.item()

    def warm_up(self) -> tuple[float, float, float]:
        """The loss of a first step, what a second one adds, and the peak of both."""
        loss, first = self.step(), peak_memory(self.device)
        added = added_memory(self.step, self.device)
        return loss, added, max(first, peak_memory(self.device))

    def round(self) -> tuple[int, float, float]:
        """Rows, seconds of the passes, seconds of the update."""
        batch = next(self.next_batch)
        return batch["rows"], seconds(lambda: self.loss(batch).backward(), self.device), seconds(self.update, self.device)


class MiniMindV(System):
    def make(self) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        llm, encoder = self.task["llm"], self.task["encoder"]
        from model.model_vlm import MiniMindVLM, VLMConfig  # the peer's
        from trainer.trainer_utils import vlm_collate_fn

        names = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
                 "intermediate_size", "max_position_embeddings", "rope_theta")  # fmt: skip
        self.model = MiniMindVLM(VLMConfig(image_ids=[IMAGE], image_hidden_size=encoder["width"], image_token_len=self.patches,
                                           **{name: llm[name] for name in names}), vision_model_path="none")  # fmt: skip
        vision = SiglipVisionConfig(
            hidden_size=encoder["width"], intermediate_size=4 * encoder["width"], num_hidden_layers=encoder["layers"],
            num_attention_heads=encoder["heads"], image_size=encoder["size"], patch_size=encoder["patch"], vision_use_head=False)
        self.model.vision_encoder = SiglipVisionModel(vision).eval().requires_grad_(False)
        length = MAX_SEQ_LEN.get(self.task["stage"], self.task["maximum"])
        rows = [(torch.tensor(ids + [PAD] * (length - len(ids))), torch.tensor(labels + [-100] * (length - len(ids))),
                 {"pixel_values": pixels}) for ids, labels, pixels in self.rows()]  # fmt: skip
        self.batches = []
        for start in range(0, len(rows), self.task["rows"]):
            part = rows[start : start + self.task["rows"]]
            ids, labels, pixels = vlm_collate_fn(part)
            self.batches.append({"rows": len(part), "input_ids": ids.to(self.device), "labels": labels.to(self.device),
                                 "pixel_values": {name: value.to(self.device) for name, value in pixels.items()}})  # fmt: skip

    def loss(self, batch: dict[str, Any]) -> Tensor:
        with self.autocast(self.device.type == "cuda"):
            result = self.model(batch["input_ids"], labels=batch["labels"], pixel_values=batch["pixel_values"])
        return result.loss + result.aux_loss


class NanoVLM(System):
    def make(self) -> None:
        tokenizer = types.SimpleNamespace(pad_token_id=PAD, image_token_id=IMAGE, eos_token_id=PAD)
        processors: Any = types.ModuleType("data.processors")
        processors.get_tokenizer = lambda *_: tokenizer
        sys.modules["data.processors"] = processors
        from data.advanced_datasets import ConstantLengthDataset  # the peer's
        from data.collators import VQACollator
        from models.config import VLMConfig
        from models.vision_language_model import VisionLanguageModel

        llm, encoder, length = self.task["llm"], self.task["encoder"], self.task["maximum"]
        self.model = VisionLanguageModel(VLMConfig(
            vit_hidden_dim=encoder["width"], vit_inter_dim=4 * encoder["width"], vit_patch_size=encoder["patch"],
            vit_img_size=encoder["size"], vit_n_heads=encoder["heads"], vit_n_blocks=encoder["layers"],
            lm_hidden_dim=llm["hidden_size"], lm_inter_dim=llm["intermediate_size"], lm_vocab_size=llm["vocab_size"],
            lm_n_heads=llm["num_attention_heads"], lm_n_kv_heads=llm["num_key_value_heads"], lm_n_blocks=llm["num_hidden_layers"],
            lm_re_base=llm["rope_theta"], lm_max_length=length, mp_pixel_shuffle_factor=1, mp_image_token_length=self.patches,
        ), load_backbone=False)  # fmt: skip
        self.model.vision_encoder.requires_grad_(False)  # as its lr_vision_backbone of 0 does
        rows = [{"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long),
                 "labels": torch.tensor([*labels[1:], -100]), "images": [pixels]}  # shifted, as its VQADataset does
                for ids, labels, pixels in self.rows()]  # fmt: skip
        packed = ConstantLengthDataset(Rows(rows, tokenizer, self.patches), infinite=True, max_sample_length=length,
                                       seq_length=length, num_of_sequences=4 * SEQUENCES)  # fmt: skip
        collate, sequences, self.batches = VQACollator(tokenizer, length), iter(packed), []
        for _ in range(6):
            batch = collate(list(itertools.islice(sequences, SEQUENCES)))
            tensors = {name: batch[name].to(self.device) for name in ("input_ids", "labels")}
            images = [[image.to(self.device) for image in row] for row in batch["images"]]
            self.batches.append({"rows": sum(map(len, images)), "images": images, **tensors})

    def loss(self, batch: dict[str, Any]) -> Tensor:
        with self.autocast(True):
            return self.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1]


class Rows:
    """What nanoVLM's ConstantLengthDataset asks of a data set."""

    def __init__(self, rows: list[dict], tokenizer: Any, image_tokens: int):
        self.dataset, self.tokenizer, self.mp_image_token_length = rows, tokenizer, image_tokens

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return dict(self.dataset[index])


def become(folder: str) -> None:
    """Let `import model` and the like find the peer's packages: ours, which have the same names, are forgotten."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("model", "dataset", "data", "models", "trainer"):
            del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", os.getcwd()))]


def main(name: str, folder: str) -> None:
    replies, task = sys.stdout, json.loads(sys.stdin.readline())
    if task["same_settings"]:
        prepare(task["device"], task["threads"])
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    become(folder)
    with contextlib.redirect_stdout(io.StringIO()):  # peers print
        system = {"minimind-v": MiniMindV, "nanovlm": NanoVLM}[name](task)
        for line in sys.stdin:
            answer = system.warm_up() if json.loads(line) == "warm up" else system.round()
            print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
