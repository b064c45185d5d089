"""How fast answers are sampled: our generation beside transformers' `generate`, with an equal Llama.

In:  prompts of random tokens of different lengths, random weights; transformers gets the same numbers under its own names.
Out: printed and returned: tokens/s of both, with the range; their ratio; the machine's GEMM rate in the same minutes.

    python -m tests.speed.rollouts                      two threads, `small`, about two minutes
    python -m tests.speed.rollouts --device cuda --dtype bf16

Two jobs. `group`: several prompts with several answers each, sampled at temperature 1, as an update of RL needs them. `one`: a
single answer, taken greedily. One token in `answer_tokens` ends an answer, so answers differ in length: we read each prompt
once and drop rows that have ended, transformers reads each prompt for each answer and goes on until the last one has ended.
First both answer greedily, and every token must be equal. The head is a matrix of its own: one that is shared with the embedding
would make random weights repeat the last token for ever.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model import cli
from model.config import PRESETS, LLMConfig, VLMConfig
from model.devices import DTYPES
from model.export.llava import FAMILIES, text_config
from model.generate import generate
from model.vlm import VLM
from tests.speed import measuring
from tests.speed.measuring import gemm_rate, spread

IMAGE, PAD = 4, 2  # ids of the placeholder and of padding
ENCODER = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"  # never runs: prompts are text


@dataclass
class Config:
    preset: str = "small"  # nano | small | base: the language model's size
    device: str = "cpu"  # cpu | cuda
    dtype: str = "fp32"  # fp32 | bf16
    threads: int = 2  # of PyTorch; 1 when anything else runs on the machine
    rounds: int = 5  # counted rounds; in each, both run every job once
    prompts: int = 8  # of a group
    answers: int = 8  # to each prompt
    prompt_tokens: int = 80  # in the mean; lengths differ by a fifth
    answer_tokens: int = 32  # in the mean; where an answer ends is random
    max_new_tokens: int = 128  # the longest answer
    seed: int = 0  # of weights and prompts
    results: Path | None = measuring.RESULTS  # where a line of results goes; None: nowhere


@dataclass(frozen=True)
class Job:
    """Prompts, and how many answers each gets. `sampled`: at temperature 1; else the likeliest token."""

    prompts: list[list[int]]
    answers: int
    sampled: bool
    stop_ids: list[int]


class Ours:
    """Answers by model/generate.py."""

    def __init__(self, model: VLM, device: torch.device, dtype: torch.dtype, max_new_tokens: int):
        self.model, self.device, self.dtype, self.max_new_tokens = model, device, dtype, max_new_tokens

    def __call__(self, job: Job) -> list[list[int]]:
        """The tokens of every answer, without the stop token, first all to the first prompt."""
        batch = {name: rows.to(self.device) for name, rows in padded(job.prompts).items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = generate(self.model, batch, max_new_tokens=self.max_new_tokens, stop_ids=set(job.stop_ids),
                             temperature=float(job.sampled), group_size=job.answers)
        return [answer.tokens for answer in found]


class Theirs:
    """Answers by transformers."""

    def __init__(self, model: VLM, device: torch.device, dtype: torch.dtype, max_new_tokens: int):
        self.model, self.device, self.max_new_tokens = equal_model(model).to(device, dtype), device, max_new_tokens

    @torch.inference_mode()
    def __call__(self, job: Job) -> list[list[int]]:
        longest = max(map(len, job.prompts))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in job.prompts], device=self.device)
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in job.prompts], device=self.device)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if job.sampled else {
            "do_sample": False}
        found = self.model.generate(
            ids.repeat_interleave(job.answers, 0), attention_mask=real.repeat_interleave(job.answers, 0),
            max_new_tokens=self.max_new_tokens, eos_token_id=job.stop_ids or None, pad_token_id=PAD, **sampling)
        return [until_stop(tokens, job.stop_ids) for tokens in found[:, longest:].tolist()]


def equal_model(model: VLM) -> Any:
    """transformers' own class with the weights of our language model; every tensor must find its place."""
    import transformers

    values = {**text_config(model, []), "eos_token_id": None}
    theirs = getattr(transformers, FAMILIES[values["model_type"]])(transformers.AutoConfig.for_model(**values)).eval()
    weights = dict(model.llm.state_dict())
    if model.llm.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    return theirs


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """One prompt per row, padded on the right: (B, T)."""
    longest = max(map(len, prompts))
    rows = [(prompt, longest - len(prompt)) for prompt in prompts]
    values = {
        "input_ids": [prompt + [PAD] * empty for prompt, empty in rows],
        "position_ids": [[*range(len(prompt))] + [0] * empty for prompt, empty in rows],
        "document_ids": [[row] * len(prompt) + [-1] * empty for row, (prompt, empty) in enumerate(rows)],
    }
    return {name: torch.tensor(value) for name, value in values.items()}


def until_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def make_model(llm: LLMConfig, seed: int) -> VLM:
    """A model with random weights and a head of its own."""
    torch.manual_seed(seed)
    config = VLMConfig(replace(llm, tie_word_embeddings=False), ENCODER, "linear", IMAGE)
    return VLM(config).eval()


def make_jobs(config: Config, vocabulary: int) -> dict[str, Job]:
    """What is measured, and `equal`, the group taken greedily."""
    generator = torch.Generator().manual_seed(config.seed)
    shortest, longest = config.prompt_tokens * 4 // 5, config.prompt_tokens * 6 // 5
    lengths = torch.randint(shortest, longest + 1, (config.prompts,), generator=generator).tolist()
    prompts = [torch.randint(IMAGE + 1, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    stop_ids = list(range(IMAGE + 1, vocabulary, config.answer_tokens))
    return {
        "equal": Job(prompts, config.answers, False, stop_ids),
        "group": Job(prompts, config.answers, True, stop_ids),
        "one": Job(prompts[:1], 1, False, []),
    }


def tokens_per_second(answer: Callable[[Job], list[list[int]]], job: Job, device: torch.device) -> float:
    """Tokens of the answers by the seconds that they took."""
    found: list[list[int]] = []
    taken = measuring.seconds(lambda: found.extend(answer(job)), device)
    return sum(map(len, found)) / taken


def measure(config: Config, llm: LLMConfig | None = None) -> dict[str, Any]:
    """Rates of both in every round: {job: {"ours": [tokens/s], "theirs": [tokens/s], "ratio": of the medians}, "gemm": [...]}."""
    device, dtype = measuring.prepare(config.device, config.threads), DTYPES[config.dtype]
    model = make_model(llm or PRESETS[config.preset].llm, config.seed).to(device)
    systems = {"ours": Ours(model, device, dtype, config.max_new_tokens),
               "theirs": Theirs(model, device, dtype, config.max_new_tokens)}
    jobs = make_jobs(config, model.config.llm.vocab_size)
    for name in ("equal", "one"):  # which also warms both
        ours, theirs = (system(jobs[name]) for system in systems.values())
        assert dtype != torch.float32 or ours == theirs, f"{name}: greedy answers differ from those of transformers"
    measured: dict[str, Any] = {"gemm": [], **{name: {"ours": [], "theirs": []} for name in ("group", "one")}}
    for _ in range(config.rounds):
        measured["gemm"].append(gemm_rate(device))
        for name in ("group", "one"):
            for who, system in systems.items():
                measured[name][who].append(tokens_per_second(system, jobs[name], device))
    for name in ("group", "one"):
        measured[name]["ratio"] = statistics.median(measured[name]["ours"]) / statistics.median(measured[name]["theirs"])
    return measured


def main(config: Config) -> None:
    found = measure(config)
    print(f"{config.preset}, {config.dtype}, {config.threads} thread(s); greedy answers are equal; "
          f"GEMM rate {spread(found['gemm'], 0)} GFLOP/s; tokens/s, medians [range] of {config.rounds} rounds:")
    titles = {"group": f"{config.prompts} prompts x {config.answers} answers", "one": "one answer"}
    for name, title in titles.items():
        rates = found[name]
        print(f"{title:22} ours {spread(rates['ours'], 0)}   transformers {spread(rates['theirs'], 0)}   x{rates['ratio']:.2f}")
    measuring.add_result(config.results, "rollouts", asdict(config), found, measuring.prepare(config.device, config.threads))


if __name__ == "__main__":
    main(cli.parse(Config))
