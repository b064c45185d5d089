"""How fast a training step is, beside padded training and beside the code of others, in each supervised stage and in DPO.

In:  rows with the lengths of real ones (rows.py), random weights; of peers, a folder with their code.
Out: printed: rows/s of every leg, what the scripts' two ways are to it, memory, the machine's rate of matrix products in the same
     minutes, and the share of it that they reach; a line of JSON at the end of tests/speed/results.jsonl.

    python -m tests.speed                               two threads, `small`, under five minutes
    python -m tests.speed --peer minimind-v:PATH --peer nanovlm:PATH --optimizer adamw --dtype fp32 --stage pretrain sft
    python -m tests.speed --ladder --stage pretrain     what each step from the padded form to ours brings
    python -m tests.speed --steps_compared 50 --dtype fp32 --stage pretrain        no times: are the losses equal?

Legs alternate, so that whatever else the machine does falls on all of them; each has its own copy of the same weights and sees
the same rows. A peer is a process of its own (peer_worker.py). Padding to the maximum is what MiniMind-V does, padding to the
longest row what trl, LLaVA and TinyLLaVA do. Reading and resizing pictures is left out of every leg: a step starts from tensors.
Micro-batches and an update are timed apart and added up to an update of --batch_size rows.
Ratios travel to another machine; seconds do not. tests/test_speed.py gates on what is counted, not timed.
"""

import contextlib
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from model import cli
from model.config import VLMConfig, preset
from model.devices import pick_dtype
from model.losses import IGNORE
from model.registry import UserError
from model.vlm import VLM, count_parameters
from tests.speed.alone import memory_alone
from tests.speed.legs import FORMS, LADDER, LONGEST, OURS, Form, Leg
from tests.speed.measuring import RESULTS, add_result, added_memory, gemm_rate, prepare, spread
from tests.speed.peers import Peer, name_and_commit, task
from tests.speed.rows import IMAGE, PACKING, STAGES, image_tables, make_documents, parts
from tests.speed.table import Measured, numbers, print_table

VOCABULARY = 6400  # of the tokenizer here, and of MiniMind-V's


@dataclass
class Config:
    stage: tuple[str, ...] = tuple(STAGES)  # pretrain | sft | dpo, one or more
    preset: str = "small"  # nano | small | base: the language model's size; small:hidden_size=640 and the like
    encoder: str = "clip_random:size=224,patch=32,width=768,layers=12,heads=12"  # ViT-B/32: 50 tokens an image
    optimizer: str = ""  # adamw | muon; default: that of each stage's script
    dtype: str = "auto"  # auto | fp32 | bf16, as in the scripts
    device: str = "auto"  # auto | cpu | cuda
    threads: cli.Count = 2  # of PyTorch; 1 when anything else runs on the machine
    rounds: cli.Count = 3  # counted rounds; in each, every leg runs once
    rows: cli.Count = 8  # rows a micro-batch
    steps: cli.Count = 2  # micro-batches a leg and round
    batch_size: cli.CountOrZero = 0  # rows an update; 0: as each stage's script: 40, of preferences 8 pairs
    maximum: cli.CountOrZero = 0  # what rows are padded to; 0: 512 in pretraining, 768 after it
    ladder: bool = False  # the steps between the padded forms and ours, in place of the encoder at every step
    peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # minimind-v:PATH | nanovlm:PATH: the folder of another's code
    same_settings: bool = True  # peers, too, multiply and allocate with the libraries and settings that are chosen here
    steps_compared: cli.CountOrZero = 0  # compare the losses of so many steps, padded and packed, and time nothing
    results: Path | None = RESULTS  # where a line of results goes; None: nowhere
    seed: cli.Seed = 222  # of rows and weights; 222 draws 16 rows of 92.9 and of 185.2 tokens: near the means of many


def model_config(config: Config) -> VLMConfig:
    return preset(config.preset, vocab_size=VOCABULARY, image_token_id=IMAGE, encoder=config.encoder)


def make_legs(config: Config, name: str, shape: VLMConfig, forms: tuple[Form, ...], count: int = 0) -> list[Leg]:
    """A leg for each form, all with the same weights and rows: `count` micro-batches, or --steps."""
    stage, device = STAGES[name], prepare(config.device, config.threads)
    dtype = pick_dtype(config.dtype, device, shape.llm.hidden_size)
    torch.manual_seed(config.seed)
    model = VLM(shape).to(device)
    model.encoder.requires_grad_(False)
    rows = config.rows * (count or config.steps)
    documents = make_documents(stage, rows, model.image_tokens, shape.llm.vocab_size, config.seed)
    tables = image_tables(documents, model.encoder, config.seed)

    def batches(form: Form) -> list[dict]:
        pack, length = PACKING[form.padded], config.maximum or stage.maximum
        made = [pack(part, tables[form.stored], length) for part in parts(documents, config.rows)]
        return [{key: value.to(device) if isinstance(value, Tensor) else value for key, value in one.items()} for one in made]

    return [Leg(form, stage, model, batches(form), dtype, config.optimizer or stage.optimizer) for form in forms]


def rows_an_update(config: Config, name: str) -> int:
    return config.batch_size or STAGES[name].batch_size


def forms_of(config: Config, name: str) -> tuple[Form, ...]:
    """The forms of a stage: of preferences the two that trainers have."""
    return LADDER if config.ladder else (LONGEST, OURS) if STAGES[name].pairs else FORMS


# ---------------------------------------------------------------- losses


def compare_losses(config: Config, name: str, shape: VLMConfig) -> float:
    """Train on rows padded to the longest and on packed ones; the largest relative difference of two losses of a step."""
    forms = (replace(LONGEST, name="padded to the longest, features stored", stored=True), OURS)
    padded, packed = make_legs(config, name, shape, forms, config.steps_compared)
    difference = 0.0
    for step, (batch, same) in enumerate(zip(padded.batches, packed.batches), 1):
        before, after = padded.step(batch), packed.step(same)
        difference = max(difference, abs(before - after) / abs(before))
        print(f"{name} step {step}: loss {before:.6f} padded, {after:.6f} packed; largest relative difference {difference:.1e}",
              flush=True)
    return difference


# ---------------------------------------------------------------- times


def describe(config: Config, name: str, leg: Leg) -> str:
    """What is trained, how, and on what."""
    rows = config.rows * config.steps
    tokens = sum(batch["input_ids"].numel() for batch in leg.batches) / rows
    learned = sum(int((batch["labels"] != IGNORE).sum()) for batch in leg.batches) / rows
    trained, frozen = count_parameters(leg.model.llm, leg.model.connector), count_parameters(leg.model.encoder)
    return (f"{name}: {config.preset}, {trained:,} parameters of language model and connector, {frozen:,} of the frozen encoder; "
            f"{config.optimizer or leg.stage.optimizer}, {leg.dtype}, {leg.device}, {config.threads} thread(s), "
            f"PyTorch {torch.__version__}\n{config.steps} micro-batches of {config.rows} rows, {tokens:.1f} tokens a row, "
            f"{learned:.1f} learned; an update every {rows_an_update(config, name)} rows")


def warm_up(legs: list[Leg], peers: list[Peer]) -> list[Measured]:
    """The discarded first steps: their losses must agree, and the memory of a second one is measured."""
    losses = [leg.step(leg.batches[0]) for leg in legs]
    limit = 1e-4 if legs[0].dtype == torch.float32 else 1e-2
    for leg, loss in zip(legs, losses):
        difference = abs(loss - losses[0]) / losses[0]
        print(f"loss {loss:.6f}  relative difference {difference:.1e}  {leg.form.name}")
        assert difference < limit, f"{leg.form.name} computes another loss than {legs[0].form.name}: {loss} and {losses[0]}"
    measured = [Measured(leg.form.name, added_memory(lambda leg=leg: leg.step(leg.batches[0]), leg.device)) for leg in legs]
    for peer in peers:
        loss, added, peak = peer.warm_up()
        print(f"loss {loss:.6f}  from its own random weights  {peer.name}", flush=True)
        measured.append(Measured(peer.name, added, peak))
    return measured


def take_rounds(count: int, batch_size: int, legs: list[Leg | Peer], measured: list[Measured], ours: Leg) -> list[float]:
    """Let the legs alternate; returns the rate of matrix products in each round, in GFLOP/s."""
    rates = []
    for number in range(1, count + 1):
        rates.append(gemm_rate(ours.device, ours.dtype))
        for leg, found in zip(legs, measured):
            found.times.append(leg.round())
        latest = ", ".join(f"{found.speeds(batch_size)[-1]:.2f}" for found in measured)
        print(f"round {number}: matrix products {rates[-1]:.0f} GFLOP/s; rows/s {latest}", flush=True)
    return rates


def measure(config: Config, name: str, shape: VLMConfig) -> dict[str, Any]:
    """One stage: its table, and the numbers in it."""
    legs = make_legs(config, name, shape, forms_of(config, name))
    ours, batch_size, specs = legs[-1], rows_an_update(config, name), () if STAGES[name].pairs else config.peer
    print("\n" + describe(config, name, ours))
    with contextlib.ExitStack() as stack:
        job = task(config, name, shape, ours) if specs else None
        peers = [stack.enter_context(contextlib.closing(Peer(spec, job))) for spec in specs]
        measured = warm_up(legs, peers)
        if peers:
            measured[len(legs) - 1].peak = memory_alone(config, name)
        rates = take_rounds(config.rounds, batch_size, [*legs, *peers], measured, ours)
    print_table(measured, batch_size)
    operations = ours.operations(batch_size)
    shares = [speed * operations / rate / 1e9 for speed, rate in zip(measured[len(legs) - 1].speeds(batch_size), rates)]
    print(f"matrix products {spread(rates, 0)} GFLOP/s, of which the last form of ours reaches {spread(shares, 2)}")
    return {"legs": numbers(measured, batch_size), "gemm_gflops": round(statistics.median(rates), 1),
            "share_of_gemm": round(statistics.median(shares), 3)}


def main(config: Config) -> None:
    if unknown := set(config.stage) - set(STAGES):
        raise UserError(f"--stage is {', '.join(STAGES)}, not {', '.join(sorted(unknown))}")
    if config.rows % 2 and any(STAGES[name].pairs for name in config.stage):
        raise UserError(f"--rows {config.rows}: a micro-batch of dpo holds pairs, so its rows are even")
    device, shape = prepare(config.device, config.threads), model_config(config)
    measured = compare_losses if config.steps_compared else measure
    found = {name: measured(config, name, shape) for name in config.stage}
    settings = {**asdict(config), "peer": [name_and_commit(spec) for spec in config.peer]}
    add_result(config.results, "losses" if config.steps_compared else "training", settings, found, device)


if __name__ == "__main__":
    cli.run(main, cli.parse(Config))
