"""Stage 3 from pairs to a checkpoint: the self-tests of DPO, the bugs that others have had, and the script as people run it.

The eight self-tests: step 0 is exactly ln 2, swapping flips the margin, padding and batch size change nothing, LoRA starts as the
base, a cached reference is the live one, five pairs overfit, a shuffled picture lowers accuracy, iterations renew the reference.
"""

import dataclasses
import itertools
import json
import math
import re
import runpy
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset import preferences
from dataset.chat import Conversation, Message
from dataset.collate import pad
from dataset.images import from_image
from dataset.preferences import Preference, join
from dataset.tokenizer import MODEL_FILE, Tokenizer
from model import checkpoint, lora
from model.best import Chosen, quality
from model.by_preferences import answer_logps, preference_objective, sums_now
from model.config import preset
from model.generate import Answer, generate
from model.losses import IGNORE, PREFERENCE_LOSSES, PreferenceOptions, answer_sums, as_pairs, next_token_targets, rewards
from model.optimizer import make_optimizer
from model.recipe import trainable
from model.reference import of_pairs
from model.registry import TEMPLATES
from model.runtime import Run
from model.vlm import VLM
from tests.conftest import ENCODER, ROOT, torchrun
from tests.miniatures import lines
from tests.test_preferences import OFFICIAL, write_official

SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "3-rl_vlm.py")))
TOKENIZER, TEMPLATE = Tokenizer(), TEMPLATES.make("pupil")
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
ORDERS = list(itertools.permutations(COLOURS, 2))  # (right, wrong): every colour is as often one as the other


def tiny_model() -> VLM:
    """The nano language model's little sister with a random encoder."""
    torch.manual_seed(0)
    config = preset("nano", encoder=ENCODER, vocab_size=TOKENIZER.vocab_size, image_token_id=TOKENIZER.image)
    llm = dataclasses.replace(config.llm, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                              intermediate_size=96)  # fmt: skip
    return VLM(dataclasses.replace(config, llm=llm))


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("start")
    checkpoint.save(folder, tiny_model(), MODEL_FILE)
    return folder


def about_colours(count: int) -> list[Preference]:
    """Pairs of which the picture alone says what is right: each answer is as often chosen as rejected, in the same words."""
    rows = []
    for k in range(count):
        right, wrong = ORDERS[k % len(ORDERS)]
        shown = from_image(Image.new("RGB", (32, 32), COLOURS[right]))
        prompt = Conversation(f"row{k}", (Message("user", (shown, "What colour is it?")),))
        rows.append(Preference(f"row{k}", prompt, f"It is {right}.", f"It is {wrong}."))
    return rows


def rendered(rows: list[Preference], model: VLM, max_length: int = 1000) -> list[preferences.Pair]:
    return [preferences.render(row, TEMPLATE, TOKENIZER, model.image_tokens, max_length) for row in rows]


def eyes(model: VLM):
    from dataset.vision.image_processor import Eyes

    return Eyes(model.encoder, model.config.fit, model.config.tiles, torch.device("cpu"), cache=None)


def a_run(tmp_path, dtype: str = "fp32") -> Run:
    return Run(SimpleNamespace(out=tmp_path, device="cpu", dtype=dtype, seed=0, wandb=False, resume=False), "test")


def scored(model: VLM, batch: dict, reference: torch.Tensor, beta: float = 0.1):
    """The pairs of a batch under the model, and the accuracy of their rewards."""
    with torch.no_grad():
        pairs = as_pairs(*answer_logps(model, batch), reference)
    chosen, rejected = rewards(pairs, beta)
    return pairs, (chosen > rejected).float().mean().item()


# ---------------------------------------------------------------- log-probabilities of answers


def test_the_sum_is_that_of_the_answer_and_its_end_one_token_at_a_time():
    """Against the plainest way: the prompt and the answer through the model, and log-softmax at each place."""
    model = tiny_model().eval()
    pairs = rendered(about_colours(2), model)
    sums = sums_now(model, a_run(Path("unused")), join(pairs, eyes(model)))
    for k, document in enumerate(document for pair in pairs for document in (pair.chosen, pair.rejected)):
        batch = join([dataclasses.replace(pairs[0], chosen=document, rejected=document)], eyes(model))
        half = {name: value[:, : len(document)] if name != "pixels" else value[:1] for name, value in batch.items()
                if torch.is_tensor(value)}  # fmt: skip
        with torch.no_grad():
            logps = model(half, half["document_ids"] >= 0).double().log_softmax(-1)  # (T, V)
        expected = sum(logps[t - 1, document.input_ids[t]].item() for t in range(len(document)) if document.learn[t])
        assert sums[k].item() == pytest.approx(expected, abs=1e-3)
        assert sum(document.learn) == len(TOKENIZER.encode(about_colours(2)[k // 2].chosen if k % 2 == 0 else
                                                           about_colours(2)[k // 2].rejected)) + 1  # fmt: skip


def test_what_the_sampler_said_is_scored_as_the_sampler_scored_it():
    model = tiny_model().eval()
    row = about_colours(1)[0]
    prompt = preferences.render(row, TEMPLATE, TOKENIZER, model.image_tokens, 1000).chosen
    length = prompt.learn.index(True)
    asked = dataclasses.replace(prompt, input_ids=prompt.input_ids[:length], learn=prompt.learn[:length])
    (answer,) = generate(model, pad([asked], eyes(model), TOKENIZER.pad), max_new_tokens=6, stop_ids={TOKENIZER.end},
                         temperature=1.0, generator=torch.Generator().manual_seed(1))  # fmt: skip
    tokens = answer.tokens + [TOKENIZER.end] * answer.stopped
    said = dataclasses.replace(prompt, input_ids=asked.input_ids + tokens, learn=asked.learn + [True] * len(tokens))
    sums = sums_now(model, a_run(Path("unused")), join([preferences.Pair(said, said)], eyes(model)))
    assert sums.tolist() == pytest.approx([sum(answer.logps)] * 2, abs=1e-4)


def test_padding_and_batch_size_leave_log_probabilities_unchanged():
    model = tiny_model().eval()
    pairs = rendered(about_colours(6), model)
    run = a_run(Path("unused"))
    together = sums_now(model, run, join(pairs, eyes(model)))
    alone = torch.cat([sums_now(model, run, join([pair], eyes(model))) for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    documents = [document for pair in pairs for document in (pair.chosen, pair.rejected)]
    padded = pad(documents, eyes(model), TOKENIZER.pad)
    torch.testing.assert_close(sums_now(model, run, padded), together, atol=1e-4, rtol=0)


def test_the_reference_is_taken_in_evaluation_mode_without_gradient_and_leaves_the_mode_as_it_was(tmp_path):
    """`the reference in train mode or another dtype`."""
    model = tiny_model().train()
    model.llm.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output + 100 * module.training)
    batch = join(rendered(about_colours(2), model), eyes(model))
    sums = sums_now(model, a_run(tmp_path), batch)
    assert model.training and not sums.requires_grad
    torch.testing.assert_close(sums, sums_now(model.eval(), a_run(tmp_path), batch))


@pytest.mark.parametrize(("mode", "dtype"), [("full", "fp32"), ("full", "bf16"), ("lora:4", "fp32"), ("lora:4", "bf16")])
def test_the_loss_at_step_zero_is_exactly_ln_2(tmp_path, mode, dtype):
    """Bit for bit: policy and reference go through one function in one precision, the policy in train mode."""
    model = tiny_model().train()
    for name, part in model.parts.items():
        trainable(part, mode if name == "llm" else "freeze")
    batch = join(rendered(about_colours(4), model), eyes(model))
    run = a_run(tmp_path, dtype)
    reference = made_reference(model, [batch], tmp_path, run)
    with run.autocast():
        logps, documents = answer_logps(model, batch)
    pairs = as_pairs(logps, documents, reference(batch))
    loss = PREFERENCE_LOSSES["dpo"](pairs, PreferenceOptions(0.1))
    assert torch.equal(loss, torch.full((4,), math.log(2)))
    total, measured = preference_objective(pairs, PreferenceOptions(0.1), "dpo", 0.0)
    assert total.item() == pytest.approx(4 * math.log(2)) and measured["margin"] == measured["accuracy"] == 0


class Given(list):
    """Batches that are there already."""

    batch = list.__getitem__


def made_reference(model: VLM, batches: list[dict], tmp_path, run: Run | None = None, resume: bool = False):
    """What dpo compares these batches with."""
    return of_pairs(Given(batches), len(batches), "dpo", run or a_run(tmp_path), model, "made", None, resume)


def test_a_cached_reference_is_the_live_one_and_stays_where_the_policy_leaves(tmp_path):
    """`the reference re-copied each step (loss stays ln 2)`: with the policy's own weights the margin could never move."""
    model = tiny_model()
    batches = [join(rendered(about_colours(6)[k : k + 2], model), eyes(model)) for k in (0, 2, 4)]
    live = [sums_now(model, a_run(tmp_path), batch) for batch in batches]
    reference = made_reference(model, batches, tmp_path)
    with torch.no_grad():
        model.connector.proj.weight.add_(0.5)
    assert all(torch.equal(reference(batch), expected) for batch, expected in zip(batches, live))
    assert not torch.allclose(sums_now(model, a_run(tmp_path), batches[0]), live[0])
    from_file = made_reference(model, batches, tmp_path, resume=True)  # read back, not computed with the weights of now
    assert all(torch.equal(from_file(batch), expected) for batch, expected in zip(batches, live))


def test_with_lora_the_reference_is_the_model_before_and_needs_no_file(tmp_path):
    model = tiny_model()
    batch = join(rendered(about_colours(3), model), eyes(model))
    before = sums_now(model, a_run(tmp_path), batch)
    for name, part in model.parts.items():
        trainable(part, "lora:4" if name == "llm" else "freeze")
    reference = made_reference(model, [batch], tmp_path)
    for part in lora.adapters(model):
        torch.nn.init.normal_(part.lora_b)
    assert torch.equal(reference(batch), before)
    assert not torch.allclose(sums_now(model, a_run(tmp_path), batch), before)
    assert not list(tmp_path.iterdir())


def test_adapters_switched_off_are_no_reference_where_the_connector_moves_too(tmp_path):
    model = tiny_model()
    batch = join(rendered(about_colours(3), model), eyes(model))
    before = sums_now(model, a_run(tmp_path), batch)
    for name, mode in (("llm", "lora:4"), ("connector", "full"), ("encoder", "freeze")):
        trainable(model.parts[name], mode)
    reference = made_reference(model, [batch], tmp_path)
    with torch.no_grad():
        model.connector.proj.weight.add_(0.5)
    assert torch.equal(reference(batch), before)


# ---------------------------------------------------------------- learning


def trained(model: VLM, pairs, steps: int, lr: float, algo: str = "dpo", nll_weight: float = 0.0, beta: float = 0.1):
    """Whole-batch steps of the script's own functions; returns the batch and the reference."""
    batch = join(pairs, eyes(model))
    reference = sums_now(model, a_run(Path("unused")), batch)
    optimizer = make_optimizer(model, "adamw", lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss, _ = preference_objective(as_pairs(*answer_logps(model, batch), reference),
                                              PreferenceOptions(beta), algo, nll_weight)  # fmt: skip
        (loss / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return batch, reference


@pytest.mark.parametrize(("algo", "mode"), [(algo, "full") for algo in PREFERENCE_LOSSES if algo != "sft_chosen"]
                         + [("dpo", "lora:8")])  # fmt: skip
def test_five_pairs_overfit_to_accuracy_one(algo, mode):
    model = tiny_model()
    for name, part in model.parts.items():
        trainable(part, "freeze" if name == "encoder" else mode if name == "llm" else "freeze")
    pairs = rendered(about_colours(5), model)
    batch, reference = trained(model, pairs, steps=40, lr=3e-3, algo=algo)
    _, accuracy = scored(model, batch, reference)
    assert accuracy == 1.0


def test_a_shuffled_picture_lowers_reward_accuracy():
    """Each answer is chosen as often as it is rejected, so words alone decide nothing."""
    model = tiny_model()
    model.encoder.requires_grad_(False)
    rows = about_colours(len(ORDERS))
    batch, reference = trained(model, rendered(rows, model), steps=60, lr=3e-3)
    assert scored(model, batch, reference)[1] == 1.0
    pictures = {row.chosen: row.pictures[0] for row in rows}
    shuffled = [dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, messages=(
        Message("user", (pictures[row.rejected], "What colour is it?")),))) for row in rows]  # fmt: skip
    other = join(rendered(shuffled, model), eyes(model))
    assert scored(model, other, sums_now(tiny_model(), a_run(Path("unused")), other))[1] <= 0.5


def test_the_anchor_keeps_the_chosen_answer_likely():
    """DPO alone is content to lower both answers as long as the rejected one falls faster."""
    ends = {}
    for weight in (0.0, 1.0):
        model = tiny_model()
        batch, reference = trained(model, rendered(about_colours(5), model), steps=40, lr=3e-3, nll_weight=weight)
        ends[weight] = (scored(model, batch, reference)[0].per_token().chosen - reference[0::2]).mean().item()
        assert scored(model, batch, reference)[1] == 1.0
    assert ends[1.0] > ends[0.0] + 1


def test_sft_on_the_chosen_minimises_their_likelihood_alone():
    model = tiny_model()
    batch = join(rendered(about_colours(3), model), eyes(model))
    pairs = as_pairs(*answer_logps(model, batch), torch.randn(6))
    loss, _ = preference_objective(pairs, PreferenceOptions(0.1), "sft_chosen", 1.0)
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    learned = targets != IGNORE
    logps, documents = answer_logps(model, batch)
    sums, tokens = answer_sums(logps, documents, 6)
    assert learned.sum() == tokens.sum()
    torch.testing.assert_close(loss, (-sums / tokens)[0::2].sum())


# ---------------------------------------------------------------- the script


def write_pairs(folder: Path, count: int = 24) -> Path:
    """Pipeline jsonl of pairs about colours, of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, row in enumerate(about_colours(count)):
        row.pictures[0].load().save(folder / f"{k}.png")
        rows.append({"image_path": f"{k}.png", "question": "What colour is it?" * (1 + k % 3), "chosen": row.chosen,
                     "rejected": row.rejected + " And a dog." * (k % 4)})  # fmt: skip
    return lines(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def arguments(start: Path, pairs: Path, *more) -> tuple:
    return ("--algo", "dpo", "--init", start, "--data", pairs, "--bench", "", "--device", "cpu", "--batch_size", 2,
            "--max_steps", 5, "--epochs", 1, "--save_every", 2, "--log_every", 1, "--warmup", 2, "--lr", 1e-3, *more)  # fmt: skip


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


LOGGED = {"step", "seconds", "loss", "preference_loss", "nll", "reward_chosen", "reward_rejected", "margin", "accuracy",
          "logp_chosen", "logp_rejected", "length_chosen", "length_rejected", "lr", "gradient_norm", "tokens_per_second"}


@pytest.fixture(scope="session")
def one(run_script, start, pairs_file, tmp_path_factory) -> Path:
    """One process that accumulates two micro-batches a step; mpo, whose loss has a memory (the shift of bco)."""
    folder = tmp_path_factory.mktemp("one_dpo")
    run_script("3-rl_vlm.py", *arguments(start, pairs_file, "--accumulate", 2, "--algo", "mpo"), cwd=folder)
    return folder / "out" / "dpo"


def test_a_run_writes_a_checkpoint_a_log_and_the_reference(one, start):
    rows = log_of(one)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and all(set(row) == LOGGED for row in rows[:5])
    assert rows[0]["preference_loss"] == pytest.approx(1.2 * math.log(2), rel=1e-5)  # ln 2 of dpo, twice of bco
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == 0 != rows[4]["margin"]
    assert rows[4]["loss"] < rows[0]["loss"]
    assert {"model.safetensors", "config.json", "tokenizer.model", "reference.npz", "curves.png"} <= {
        path.name for path in one.iterdir()}  # fmt: skip
    before, after = load_file(start / "model.safetensors"), load_file(one / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("llm.")}
    assert checkpoint.load(one)


def test_two_processes_equal_one_that_accumulates(one, start, pairs_file, tmp_path):
    torchrun(2, "3-rl_vlm.py", *arguments(start, pairs_file, "--algo", "mpo"), cwd=tmp_path)
    two = tmp_path / "out" / "dpo"
    for a, b in zip(log_of(one)[:5], log_of(two)[:5], strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5) for name in LOGGED - {"seconds", "tokens_per_second"})
    begun, ends = load_file(start / "model.safetensors"), [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in begun.items():
        assert (ends[0][name] - ends[1][name]).norm() <= 1e-3 * (ends[0][name] - weight).norm(), name


@pytest.mark.parametrize("mode", ["full", "lora:4"])
def test_a_killed_run_goes_on_to_exactly_the_same_weights(mode, one, start, pairs_file, run_script, tmp_path):
    """`mpo`: with the shift that was saved; `lora`: with the adapters, not with their sum."""
    given = arguments(start, pairs_file, "--accumulate", 2, "--algo", "mpo", "--train.llm", mode)
    whole = one
    if mode != "full":
        whole = tmp_path / "whole"
        run_script("3-rl_vlm.py", *given, "--out", whole, cwd=tmp_path)
    run_script("3-rl_vlm.py", *given, cwd=tmp_path, die_at_step=3, expect=-signal.SIGKILL)
    run_script("3-rl_vlm.py", *given, "--resume", cwd=tmp_path)
    ends = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out" / "dpo")]
    assert ends[0].keys() == ends[1].keys() == load_file(start / "model.safetensors").keys()  # merged: an ordinary checkpoint
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    logs = [[{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in log_of(folder)]
            for folder in (whole, tmp_path / "out" / "dpo")]  # fmt: skip
    assert logs[0] == logs[1]
    resumed = load_file(next((tmp_path / "out" / "dpo" / "resume").iterdir()) / "model.safetensors")
    assert any("lora_a" in name for name in resumed) == (mode != "full")


def test_resuming_from_another_start_is_refused(start, pairs_file, run_script, tmp_path):
    """`a stale reference cache silently reused`."""
    moved = shutil.copytree(start, tmp_path / "start")
    run_script("3-rl_vlm.py", *arguments(moved, pairs_file, "--max_steps", 2), cwd=tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.connector.proj.weight.add_(0.1)
    checkpoint.save(moved, model, MODEL_FILE)
    done = run_script("3-rl_vlm.py", *arguments(moved, pairs_file, "--max_steps", 4), "--resume", cwd=tmp_path, expect=1)
    assert "was started from other weights" in done.err and "start again without --resume" in done.err
    shared = tmp_path / "out" / "dpo" / "reference.npz"
    more = ("--reference", shared, "--out", "other")
    done = run_script("3-rl_vlm.py", *arguments(moved, pairs_file), *more, cwd=tmp_path, expect=1)
    assert "reference.npz is stale" in done.err
    run_script("3-rl_vlm.py", *arguments(moved, pairs_file, "--max_steps", 1), cwd=tmp_path)  # a fresh start makes its own


@pytest.fixture(scope="session")
def official(tmp_path_factory) -> Path:
    return write_official(tmp_path_factory.mktemp("official_dpo"))


def test_every_official_format_trains_three_steps(official, start, run_script, tmp_path):
    files = [official / name for name in OFFICIAL]
    more = ("--data", *files, "--batch_size", 7, "--max_steps", 0)  # an epoch: every row of every file
    done = run_script("3-rl_vlm.py", *arguments(start, Path()), *more, cwd=tmp_path)
    assert "20 pairs, 3 steps of 7 on 1 x cpu" in done.out
    rows = log_of(tmp_path / "out" / "dpo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[2]["margin"] > 0


def test_a_bad_row_is_named_and_the_rest_trains(start, pairs_file, run_script, tmp_path):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[3]["rejected"] = rows[3]["chosen"]
    bad = lines(pairs_file.parent / "bad.jsonl", rows)
    done = run_script("3-rl_vlm.py", *arguments(start, bad, "--max_bad", 0.1, "--max_steps", 0, "--batch_size", 4), cwd=tmp_path)
    assert "24 pairs, 6 steps of 4" in done.out
    assert f"skipped {bad}:4: chosen and rejected are the same answer" in done.err
    assert len((tmp_path / "out" / "dpo" / "bad_rows.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("algo", ["robust", "simpo", "sft_chosen"])
def test_losses_with_needs_of_their_own_train(algo, start, pairs_file, run_script, tmp_path):
    more = ("--smoothing", 0.1) if algo == "robust" else ("--beta", 2.0) if algo == "simpo" else ()
    run_script("3-rl_vlm.py", *arguments(start, pairs_file, "--algo", algo, "--max_steps", 3, *more), cwd=tmp_path)
    rows = log_of(tmp_path / "out" / "dpo")
    assert rows[2]["loss"] < rows[0]["loss"]
    assert (tmp_path / "out" / "dpo" / "reference.npz").is_file() == (algo != "simpo")


def test_a_trained_encoder_sees_pixels_and_its_reference_is_stored(start, pairs_file, run_script, tmp_path):
    run_script("3-rl_vlm.py", *arguments(start, pairs_file, "--max_steps", 3, "--train.encoder", "lora:2", "--train.connector",
                                         "full"), cwd=tmp_path)  # fmt: skip
    assert not list(tmp_path.rglob("out/features/**/*.npy"))
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "out" / "dpo" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {"connector.proj.weight", "encoder.transformer.resblocks.0.mlp.c_fc.weight"} <= moved
    assert "encoder.conv1.weight" not in moved


@pytest.mark.parametrize("switch", ["--dry_run", "--check_data"])
def test_looking_writes_nothing(switch, start, pairs_file, run_script, tmp_path):
    given = ("--algo", "dpo", "--init", start, "--bench", "", "--epochs", 1, switch)
    done = run_script("3-rl_vlm.py", *given, "--data", pairs_file, "--batch_size", 8, cwd=tmp_path)
    assert "24 pairs, 3 steps of 8 on 1 x" in done.out
    shown = "chosen: <s><|user|>1[image]What colour is it?<|assistant|>【It is red.<|end|>】" in done.out
    assert shown == (switch == "--check_data")
    done = run_script("3-rl_vlm.py", *given, cwd=tmp_path)
    assert "the pairs will come from 400 scenes x 8 answers" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "message"), [
    (("--algo", "dppo"), "--algo is one of grpo, rloo"), (("--algo", "robust"), "--smoothing 0.1"),
    (("--algo", "sft_chosen", "--nll_weight", 0), "--nll_weight must be above 0"), (("--smoothing", 0.7), "0 to below 0.5"),
    (("--train.llm", "freeze"), "every part is frozen"), (("--init", "nowhere"), "no checkpoint in nowhere"),
    (("--data", "nowhere.jsonl"), "no data at nowhere.jsonl"), (("--resume",), "nothing to resume in out/dpo"),
    (("--labeler", "self"), "--data has its labels"), (("--divider", "whole"), "--data has its labels"),
    (("--balance",), "--data has its labels"), (("--pairs_only",), "leave out --data and --iterations"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_remedy(more, message, start, pairs_file, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments(start, pairs_file), *more, cwd=tmp_path, expect=1)
    assert message in done.err


@pytest.mark.parametrize(("more", "message"), [
    ({"labeler": "slef"}, "--labeler is truth, self, judge or the folder of a checkpoint, not 'slef'"),
    ({"labeler": "judge"}, "add --judge http://localhost:8000/v1,model=NAME"), ({"divider": "half"}, "is claims or whole"),
    ({"judge": "http://localhost:1/v1,model=m"}, "add --labeler judge"), ({"iterations": 2}, "leave out --data and --iterations"),
    ({"judge": "http://localhost:1/v1,model=m", "labeler": "self", "divider": "whole"}, "leaves --judge nothing to do"),
])
def test_labels_that_no_one_can_give_are_refused_before_any_work(more, message, start, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        SCRIPT.main(SCRIPT.Config(algo="dpo", init=start, out=tmp_path / "out", device="cpu", pairs_only=True, **more))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- choosing a checkpoint


def test_quality_wants_what_is_there_and_nothing_else():
    def of(chair_s: float, cover: float) -> float:
        return quality({"hallucination/chair_s": chair_s, "hallucination/cover": cover, "world/exact": 1.0})

    assert of(0.07, 0.94) > of(0.58, 0.965) > of(0.046, 0.368)  # anchored, before, silent
    assert quality({"world/exact": 0.5}) is None


def chosen_in(tmp_path, history: list[dict]):
    run = SimpleNamespace(out=tmp_path, first=True, history=history, say=lambda text: None)
    return Chosen(run)


def scores(step: int, cover: float) -> dict:
    return {"step": step, "seconds": 1.0, "hallucination/chair_s": 0.0, "hallucination/cover": cover}


def marked_model(value: float) -> VLM:
    model = tiny_model()
    torch.nn.init.constant_(model.connector.proj.weight, value)
    return model


@pytest.mark.parametrize("first, kept", [(0.4, 100), (0.9, 0)])
def test_the_best_checkpoint_is_kept_and_that_may_be_the_start(tmp_path, first, kept):
    chosen = chosen_in(tmp_path, [])
    for step, cover in ((0, first), (50, 0.5), (100, 0.7), (150, 0.6)):
        chosen.offer(marked_model(step), SimpleNamespace(file=MODEL_FILE), step, scores(step, cover))
    best = max(first, 0.7)
    assert chosen.keep() == {"hallucination/chair_s": 0.0, "hallucination/cover": best}
    assert load_file(tmp_path / "model.safetensors")["connector.proj.weight"].unique().tolist() == [kept]
    assert json.loads((tmp_path / "chosen.json").read_text()) == {"quality": best}


def test_a_resumed_run_remembers_the_best_from_its_log(tmp_path):
    chosen_in(tmp_path, []).offer(marked_model(50), SimpleNamespace(file=MODEL_FILE), 50, scores(50, 0.8))
    chosen = chosen_in(tmp_path, [scores(0, 0.5), scores(50, 0.8), {"step": 60, "loss": 1.0}])
    chosen.offer(marked_model(100), SimpleNamespace(file=MODEL_FILE), 100, scores(100, 0.7))
    assert chosen.keep()["hallucination/cover"] == 0.8
    assert load_file(tmp_path / "model.safetensors")["connector.proj.weight"].unique().tolist() == [50]
    chosen = chosen_in(tmp_path, [])  # a fresh run forgets it
    assert chosen.keep() == {} and not (tmp_path / "chosen").exists()


def test_accuracy_in_training_is_no_check_on_the_validation_split(tmp_path):
    """A resumed run finds both in its log; the shares of right answers in training are higher, and would win."""
    history = [{"step": 0, "task/accuracy": 0.4}, {"step": 3, "accuracy": 0.99, "policy_accuracy": 1.0}]
    run = SimpleNamespace(out=tmp_path, first=True, history=history, say=lambda text: None)
    chosen = Chosen(run, "accuracy")
    assert chosen.best == 0.4
    assert not chosen.offer(marked_model(5), SimpleNamespace(file=MODEL_FILE), 5, {"task/accuracy": 0.3})
    assert chosen.offer(marked_model(10), SimpleNamespace(file=MODEL_FILE), 10, {"task/accuracy": 0.5})
    assert chosen.keep() == {"task/accuracy": 0.5}


def test_each_iteration_starts_from_and_compares_with_what_the_last_one_chose(start, pairs_file, run_script, tmp_path):
    """`the reference stale after an iteration`: at step 0 of each the loss is ln 2 again, under new weights."""
    given = arguments(start, pairs_file, "--iterations", 2, "--max_steps", 3)
    run_script("3-rl_vlm.py", *given, cwd=tmp_path)
    first, second = (tmp_path / "out" / "dpo" / f"iteration-{n}" for n in (1, 2))
    rows = [log_of(folder) for folder in (first, second)]
    assert [row["step"] for row in rows[1]] == [0, 1, 2, 3]
    for found in rows:
        assert found[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert found[2]["margin"] > 0
    assert rows[1][0]["nll"] < rows[0][0]["nll"]
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert not torch.equal(one["llm.model.norm.weight"], two["llm.model.norm.weight"])
    shutil.rmtree(second)  # killed before the second began
    before = (first / "log.jsonl").read_text()
    run_script("3-rl_vlm.py", *given, "--resume", cwd=tmp_path)
    assert (first / "log.jsonl").read_text() == before
    again = load_file(second / "model.safetensors")
    assert all(torch.equal(two[name], again[name]) for name in two)
    assert checkpoint.load(tmp_path / "out" / "dpo")


def random_sentences(model, batch: dict, **options) -> list[Answer]:
    """In place of `generate`: one to three sentences about things that may be there, where an untrained model babbles."""
    names, places = ("bus", "cow", "key", "bear", "star"), ("top left", "top", "center", "bottom")
    said = []
    for _ in batch["input_ids"]:
        draws = torch.randint(0, 60, (int(torch.randint(1, 4, ())),)).tolist()
        text = " ".join(f"At the {places[k % 4]} is one {names[k % 5]}." for k in draws)
        said.append(Answer(TOKENIZER.encode(text), [], stopped=True))
    return said


def own_pairs(start, tmp_path, monkeypatch, answers=random_sentences, **more) -> tuple[dict, list[dict], str]:
    """`--pairs_only`: the summary of the pairs, the claims of the first prompt's answers, and who labelled them."""
    monkeypatch.setitem(SCRIPT.main.__globals__, "generate", answers)
    monkeypatch.chdir(tmp_path)  # where what a judge said is kept
    config = SCRIPT.Config(algo="dpo", init=start, out=tmp_path / "out" / "dpo", scenes=6, answers=6, device="cpu", bench="",
                           pairs_only=True, feature_cache=tmp_path / "features", **more)
    SCRIPT.main(config)
    (folder,) = config.out.glob("feedback/*")
    claims = json.loads((folder / "claims.jsonl").read_text(encoding="utf-8").splitlines()[0])["claims"]
    labeler = json.loads((folder / "labels.made_from.json").read_text(encoding="utf-8"))["labeler"]
    return json.loads((folder / "summary.json").read_text()), claims, labeler


def test_pairs_alone_can_be_made_and_the_same_command_then_learns_from_them(start, tmp_path, monkeypatch, capsys):
    summary, _, labeler = own_pairs(start, tmp_path, monkeypatch)
    (pairs,) = tmp_path.glob("out/dpo/feedback/*/pairs.jsonl")
    assert labeler == "truth" and summary["questions_as_the_truth"] == summary["pairs_as_the_truth"] == 1.0
    assert f"{summary['pairs']} pairs in {pairs}. Next: the same command without --pairs_only" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "dpo").iterdir()] == ["feedback"]  # nothing was learned
    made = pairs.stat().st_mtime_ns
    SCRIPT.main(SCRIPT.Config(algo="dpo", init=start, out=tmp_path / "out" / "dpo", scenes=6, answers=6, device="cpu", bench="",
                              max_steps=1, feature_cache=tmp_path / "features"))
    assert list(tmp_path.glob("out/dpo/feedback/*/pairs.jsonl")) == [pairs] and pairs.stat().st_mtime_ns == made
    assert (tmp_path / "out" / "dpo" / "model.safetensors").is_file()


@pytest.mark.parametrize("labeler", ["self", "other"])
def test_the_model_or_another_checkpoint_labels_by_its_own_yes_and_no(labeler, start, tmp_path, monkeypatch):
    """In place of `prefill`: no to everything, and which model was asked."""
    asked = []

    def no(model, batch, room):
        asked.append(model.connector.proj.weight.unique().tolist())
        logits = torch.zeros(len(batch["input_ids"]), TOKENIZER.vocab_size)
        return logits.index_fill(1, torch.tensor(TOKENIZER.encode("no")[:1]), 9.0), None

    monkeypatch.setitem(SCRIPT.main.__globals__, "prefill", no)
    checkpoint.save(tmp_path / "other", marked_model(3.0), MODEL_FILE)
    summary, _, name = own_pairs(start, tmp_path, monkeypatch, labeler={"other": str(tmp_path / "other")}.get(labeler, labeler))
    assert asked and all((weights == [3.0]) == (labeler == "other") for weights in asked)
    assert summary["questions_rejected"] == summary["questions"] and summary["pairs"] > 0  # fewer claims win
    assert name != "truth" and summary["questions_as_the_truth"] < 1


def test_a_model_that_was_never_asked_anything_cannot_label(start, tmp_path, monkeypatch):
    model = tiny_model()
    model.config = dataclasses.replace(model.config, template="pretrain")
    checkpoint.save(tmp_path / "captioner", model, MODEL_FILE)
    with pytest.raises(ValueError, match="only a model that was fine-tuned to answer them can label"):
        own_pairs(start, tmp_path, monkeypatch, labeler=str(tmp_path / "captioner"))


def judge_says(said) -> str:
    """The address and name, as --judge has them, of a local server that answers `said(text)`."""
    pytest.importorskip("openai")
    from tests.test_judge import Server

    server = Server(said)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"{server.url},model=judge-1"


def test_a_judge_behind_an_address_labels(start, tmp_path, monkeypatch):
    judge = judge_says(lambda text: "No." if "bus" in text or "公交车" in text else "Yes.")
    summary, claims, name = own_pairs(start, tmp_path, monkeypatch, labeler="judge", judge=judge)
    assert name == "judge-1,please=True" and 0 < summary["questions_rejected"] < summary["questions"]
    for line in next(tmp_path.glob("out/dpo/feedback/*/pairs.jsonl")).read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["chosen"].count("bus") < json.loads(line)["rejected"].count("bus")


def test_whole_answers_are_labelled_in_one_piece_and_their_lengths_balanced(start, tmp_path, monkeypatch):
    judge = judge_says(lambda text: "No." if "bus" in text else "Yes.")
    summary, claims, _ = own_pairs(start, tmp_path, monkeypatch, labeler="judge", judge=judge, divider="whole", balance=True)
    assert all(len(found) == 1 and "entirely right" in found[0]["question"] for found in claims)
    assert summary["balance"] is not None


def test_a_judge_divides_what_the_rule_cannot(start, tmp_path, monkeypatch):
    """What the sentences of `random_sentences` are followed by here, no rule knows."""
    asked = []

    def answers(model, batch, **options):
        return [dataclasses.replace(answer, tokens=answer.tokens + TOKENIZER.encode(" It looks merry."))
                for answer in random_sentences(model, batch, **options)]

    def reply(text: str) -> str:
        if "List the facts" in text:
            asked.append(text)
            return "- There is a bus." if "bus" in text else "- It is sunny."
        if "Turn this statement" in text:
            return "Is there a bus?" if "bus" in text else "Is it sunny?"
        return "No." if "bus" in text else "Yes."

    summary, _, _ = own_pairs(start, tmp_path, monkeypatch, labeler="judge", judge=judge_says(reply), answers=answers)
    assert asked and all("merry" in text for text in asked)
    assert summary["answers_undivided"] == 0 and summary["pairs"] > 0


def test_a_model_labels_its_answers_to_questions_and_pictures_of_ones_own(start, samples, tmp_path, monkeypatch):
    rows = [{"image": "red.png", "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A"}]},
            {"image": "green.png", "messages": [{"role": "user", "content": "这是什么？"}]},
            {"messages": [{"role": "user", "content": "Without a picture?"}]}]  # fmt: skip
    questions = lines(samples / "asked.jsonl", rows)
    judge = judge_says(lambda text: "No." if "bus" in text else "Yes.")
    more = dict(labeler="judge", judge=judge, divider="whole", questions=questions, max_bad=0.5)
    try:
        summary, claims, _ = own_pairs(start, tmp_path, monkeypatch, **more)
    finally:
        questions.unlink()
    assert summary["prompts"] == 2 and summary["pairs"] > 0 and summary["pairs_as_the_truth"] is None
    folder = next(tmp_path.glob("out/dpo/feedback/*"))
    asked = [json.loads(line)["question"] for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert asked == ["What is it?", "这是什么？"] and "完全正确" in json.loads(
        (folder / "claims.jsonl").read_text(encoding="utf-8").splitlines()[1])["claims"][0][0]["question"]
    (bad,) = map(json.loads, (tmp_path / "out" / "dpo" / "bad_questions.jsonl").read_text().splitlines())
    assert bad["row"].endswith("asked.jsonl:3")
    with pytest.raises(ValueError, match="--labeler truth knows the embedded world alone"):
        SCRIPT.options_of(SCRIPT.filled(SCRIPT.Config(algo="dpo", questions=questions)))


def test_answers_that_were_cut_are_no_side_of_a_pair(start, tmp_path, monkeypatch):
    """To end where the limit ended them would be learned, however they are divided."""
    def answers(model, batch, **options):
        said = random_sentences(model, batch, **options)
        return [dataclasses.replace(answer, stopped=k % 3 > 0) for k, answer in enumerate(said)]

    judge = judge_says(lambda text: "No." if "bus" in text else "Yes.")
    summary, _, _ = own_pairs(start, tmp_path, monkeypatch, labeler="judge", judge=judge, divider="whole", answers=answers)
    assert summary["answers_undivided"] == 12 and summary["pairs"] > 0
    folder = next(tmp_path.glob("out/dpo/feedback/*"))
    cut = {text for row in map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
           for k, text in enumerate(row["answers"]) if k in row["cut"]}  # fmt: skip
    other = {text for row in map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
             for k, text in enumerate(row["answers"]) if k not in row["cut"]}  # fmt: skip
    said = {row[side] for row in map(json.loads, (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines())
            for side in ("chosen", "rejected")}  # fmt: skip
    assert said <= other and not said & (cut - other)


def test_a_run_removes_nothing_of_an_earlier_one_before_it_can_begin(start, tmp_path, monkeypatch):
    old = tmp_path / "out" / "dpo" / "iteration-2"
    shutil.copytree(start, old)
    given = dict(algo="dpo", out=tmp_path / "out" / "dpo", device="cpu", bench="")
    for name, value in (("init", old), ("labeler", str(old)), ("reference", old / "reference.npz")):
        with pytest.raises(ValueError, match="of an earlier run into .*, which this one would replace: name another --out"):
            SCRIPT.main(SCRIPT.Config(**{"init": start, **given, name: value}))
    for more in ({"init": tmp_path / "nowhere"}, {"init": start, "data": ("nowhere.jsonl",)}):
        with pytest.raises(FileNotFoundError):
            SCRIPT.main(SCRIPT.Config(**given, **more))
    assert (old / "model.safetensors").is_file()


@pytest.mark.parametrize(("more", "message"), [
    ({"algo": "ipo", "smoothing": 0.1}, "--algo ipo has no use for --smoothing"),
    ({"algo": "dpo", "gamma": 0.5}, "--algo dpo has no use for --gamma"),
])
def test_numbers_that_a_loss_does_not_have_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        SCRIPT.options_of(SCRIPT.filled(SCRIPT.Config(**more)))


def test_simpo_has_a_beta_of_its_own():
    assert SCRIPT.filled(SCRIPT.Config(algo="simpo")).beta == 2.0 and SCRIPT.filled(SCRIPT.Config(algo="dpo")).beta == 0.1
    assert SCRIPT.filled(SCRIPT.Config(algo="simpo", beta=3.0)).beta == 3.0


def test_an_address_that_answers_nothing_stops_the_run_and_leaves_no_labels_behind(start, tmp_path, monkeypatch):
    judge = judge_says(lambda text: (404, "{}"))
    with pytest.raises(ValueError, match="the labeler judge-1,please=True answered none of .* questions: NotFoundError"):
        own_pairs(start, tmp_path, monkeypatch, labeler="judge", judge=judge)
    (labels,) = tmp_path.rglob("labels.jsonl")
    assert labels.read_text() == ""  # once the server is there, the same command goes on


def test_without_data_the_model_makes_its_own_pairs_and_hallucination_chooses(start, tmp_path, monkeypatch):
    monkeypatch.setitem(SCRIPT.main.__globals__, "generate", random_sentences)
    config = SCRIPT.Config(algo="dpo", init=start, out=tmp_path / "out" / "dpo", scenes=12, answers=6, iterations=2, max_steps=2,
                           batch_size=2, eval_every=1, eval_examples=3, log_every=1, device="cpu",
                           feature_cache=tmp_path / "features")
    SCRIPT.main(config)
    folders = [config.out / f"iteration-{n}" for n in (1, 2)]
    asked = []
    for folder in folders:
        (pairs,) = folder.glob("feedback/*/pairs.jsonl")
        asked.append({json.loads(line)["id"].rpartition("/")[0] for line in pairs.read_text().splitlines()})
        assert [row["step"] for row in log_of(folder) if "hallucination/cover" in row] == [0, 1, 2]
        assert [row["step"] for row in log_of(folder) if "margin" in row] == [0, 1]
        kept = load_file(folder / "chosen" / "model.safetensors")
        assert all(torch.equal(kept[name], weight) for name, weight in load_file(folder / "model.safetensors").items())
        assert "hallucination/cover" in json.loads((folder / "scores.json").read_text())
    assert asked[0] and asked[1] and not asked[0] & asked[1]  # new scenes in each iteration
    best = max(reversed(folders), key=lambda folder: json.loads((folder / "chosen.json").read_text())["quality"])
    assert (config.out / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    shutil.rmtree(folders[1] / "resume")
    (folders[1] / "chosen.json").unlink()
    times = {file: file.stat().st_mtime_ns for file in config.out.rglob("pairs.jsonl")}
    SCRIPT.main(dataclasses.replace(config, resume=True))  # the second iteration again, from the pairs that were made
    assert times == {file: file.stat().st_mtime_ns for file in config.out.rglob("pairs.jsonl")}
    assert (folders[1] / "chosen.json").is_file()
