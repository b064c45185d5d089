"""Stage 3 by rules, from problems to a checkpoint: what a step moves, and the script as people run it."""

import dataclasses
import json
import re
import runpy
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dataset import rollouts
from dataset.rewards import Reward
from dataset.tokenizer import Tokenizer
from model import checkpoint, cli, reference
from model.by_rules import ByRules
from model.recipe import trainable
from model.reference import at_start
from model.registry import TEMPLATES
from model.rl import critic
from model.rl.policy import ALGORITHMS
from tests.conftest import ROOT, torchrun
from tests.miniatures import lines
from tests.test_dpo import SCRIPT, a_run, eyes, log_of, start, tiny_model  # noqa: F401  (start: a fixture)
from tests.test_rollouts import RIGHT, WRONG

TOKENIZER, TEMPLATE = Tokenizer(), TEMPLATES.make("pupil")
LIKES_A = """
def even(example, answer):
    return float(len(answer) % 2 == 0)
"""  # a reward that an untrained model gets half the time


@pytest.fixture(scope="session")
def even(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text(LIKES_A)
    return file


def arguments(start: Path, even: Path, *more) -> tuple:  # noqa: F811
    return ("--init", start, "--data", "arithmetic:rows=0", "--problems", 12, "--prompts", 4, "--answers", 4, "--chunk", 2,
            "--reward", f"{even}:even", "--max_new_tokens", 6, "--batch_size", 5, "--max_steps", 4, "--save_every", 2,
            "--lr", 1e-3, "--warmup", 1, "--bench", "", "--device", "cpu", *more)  # fmt: skip


# ---------------------------------------------------------------- what is minimised


def method(tmp_path, algo: str = "grpo", **changes) -> SimpleNamespace:
    """What is minimised (`ByRules`, with the script's own options) of a tiny model, and how it is asked."""
    model = tiny_model()
    for name, part in model.parts.items():
        trainable(part, "full" if name == "llm" else "freeze")
    trained = critic.apply(model) if algo == "ppo" else model
    config = SCRIPT.filled(SCRIPT.Config(algo=algo, out=tmp_path, device="cpu", **changes))
    banned = (TOKENIZER.image, TOKENIZER.pad, TOKENIZER.bos)
    begun = at_start(model) if config.beta else None
    objective = ByRules(a_run(tmp_path), trained, begun, SCRIPT.options_of(config), banned, config.clip)
    return SimpleNamespace(model=model, objective=objective, eyes=eyes(model), minimised=objective.minimised)


def an_update(made, right: int = 2) -> rollouts.Update:
    """One group of four answers to one picture, of which `right` are right, with the log-probabilities that they have now."""
    (problem,) = rollouts.problems(["arithmetic:rows=0"], 1, None, image_folder=None, allow_urls=False, bad_rows=Path("unused"),
                                   max_bad=0)  # fmt: skip
    prompt = rollouts.render_prompt(problem.prompt, TEMPLATE, TOKENIZER, made.model.image_tokens)
    said = []
    for k in range(4):
        text = RIGHT if k < right else WRONG
        tokens = TOKENIZER.encode(text)
        reward = Reward(1.0, 1.0, 1.1) if k < right else Reward(0.0, 1.0, 0.1)
        said.append(rollouts.as_rollout(prompt, TOKENIZER.end, tokens, [0.0] * (len(tokens) + 1), True, text, reward))
    (batch,) = rollouts.micro_batches(said, made.eyes, 64, 0, 1)
    made.model.eval()
    with torch.no_grad():
        logps = made.objective.scored(made.objective.trained, batch)[0].split([len(rollout) for rollout in said])
    made.model.train()
    said = [dataclasses.replace(rollout, logps=part.tolist()) for rollout, part in zip(said, logps)]
    return rollouts.Update([rollouts.Group(problem, said)], 1, {})


def learned(made, update: rollouts.Update) -> list[dict]:
    """Its micro-batches, with all that the loss needs."""
    batches = rollouts.micro_batches(update.rollouts, made.eyes, 64, 0, 1)
    return made.objective.weighed(batches, update.rewards(), update.lengths())


def sums(made, batch) -> torch.Tensor:
    with torch.no_grad():
        logps, _, answers, _ = made.objective.scored(made.objective.trained, batch)
    return torch.zeros(4).index_add(0, answers, logps)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_positive_advantage_raises_that_answer_and_a_negative_one_lowers_it(algo, tmp_path):
    made = method(tmp_path, algo, **({"lam": 1.0} if algo == "ppo" else {}))
    (batch,) = learned(made, an_update(made))
    before = sums(made, batch)
    optimizer = torch.optim.SGD([p for p in made.model.llm.parameters() if p.requires_grad], lr=0.05)
    loss, measured, peaks = made.minimised(batch)
    (loss / len(batch["places"])).backward()
    optimizer.step()
    after = sums(made, batch)
    assert (after - before)[:2].min() > 0 > (after - before)[2:].max()
    assert peaks["ratio_max"] == pytest.approx(1, abs=1e-4) and peaks["logp_gap"] < 1e-4
    assert measured["clipped_low"] == measured["clipped_high"] == 0


def test_on_policy_the_loss_is_about_zero_and_its_gradient_is_not(tmp_path):
    made = method(tmp_path, per_sequence=True)
    (batch,) = learned(made, an_update(made))
    loss, _, _ = made.minimised(batch)
    loss.backward()
    assert abs(loss.item()) < 1e-3
    assert max(p.grad.abs().max() for p in made.model.parameters() if p.grad is not None) > 1e-3


def test_without_beta_there_is_no_second_model(start, even, tmp_path, monkeypatch):  # noqa: F811
    """The script's own decision: with beta a copy of the start is asked for, without it none is."""
    copies = []
    monkeypatch.setattr(reference, "at_start", lambda model: copies.append(model) or at_start(model))
    for beta, made in ((None, 0), (0.1, 1)):
        SCRIPT.main(SCRIPT.filled(SCRIPT.Config(
            init=start, out=tmp_path / "out", data=("arithmetic:rows=0",), problems=4, prompts=2, answers=2, max_new_tokens=2,
            reward=f"{even}:even", beta=beta, max_steps=1, bench="", device="cpu")))  # fmt: skip
        assert len(copies) == made


def test_with_beta_the_kl_begins_at_zero_and_pulls_back(tmp_path):
    for kl in ("k2", "k3"):
        made = method(tmp_path, beta=10.0, kl=kl)
        (batch,) = learned(made, an_update(made, right=4))  # no advantage: the KL is all there is
        assert made.minimised(batch)[1]["kl"] == pytest.approx(0, abs=1e-4)
        with torch.no_grad():
            made.model.llm.model.norm.weight.mul_(1.3)
        loss, measured, _ = made.minimised(batch)
        assert measured["kl"] > 0.01
        loss.backward()
        with torch.no_grad():
            for p in made.model.llm.parameters():
                p.sub_(1e-3 * p.grad / (1 + p.grad.norm()))
        assert made.minimised(batch)[1]["kl"] < measured["kl"]


def test_k1_is_taken_from_the_reward_of_the_whole_answer(tmp_path):
    made = method(tmp_path, beta=0.5, kl="k1")
    with torch.no_grad():
        made.model.llm.model.norm.weight.mul_(1.3)
    update = an_update(made)
    (batch,) = learned(made, update)
    penalty = torch.zeros(4).index_add(0, batch["places"], batch["rollout_logps"] - batch["reference_logps"])
    rewards = torch.tensor([1.1, 1.1, 0.1, 0.1]) - 0.5 * penalty
    torch.testing.assert_close(batch["advantages"], (rewards - rewards.mean())[batch["places"]], atol=1e-4, rtol=1e-4)


def test_ppo_gives_every_token_an_advantage_of_its_own_and_its_value_head_learns(tmp_path):
    made = method(tmp_path, "ppo")
    (batch,) = learned(made, an_update(made))
    assert abs(batch["advantages"].mean()) < 1e-4 and abs(batch["advantages"].std(correction=0) - 1) < 1e-3
    assert len(batch["advantages"].unique()) > 4
    ends = torch.cat([batch["places"][1:] != batch["places"][:-1], torch.tensor([True])])
    assert batch["returns"][ends].tolist() == pytest.approx([1.1, 1.1, 0.1, 0.1])  # with values of 0: the reward
    made.minimised(batch)[0].backward()
    assert made.model.value_head.weight.grad.abs().sum() > 0
    checkpoint.save(tmp_path / "saved", made.model, TOKENIZER.file)
    assert checkpoint.load(tmp_path / "saved"), "a checkpoint for anyone holds no value head"


# ---------------------------------------------------------------- the script


LOGGED = {"step", "seconds", "reward", "accuracy", "format", "all_right", "all_wrong", "alike", "truncated", "groups",
          "asked", "loss", "entropy", "ratio", "clipped_low", "clipped_high", "ratio_max", "logp_gap", "lr", "gradient_norm",
          "gradient_threshold", "step_left_out", "tokens_per_second"}  # fmt: skip


@pytest.fixture(scope="session")
def one(run_script, start, even, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("one_grpo")
    run_script("3-rl_vlm.py", *arguments(start, even), cwd=folder)
    return folder / "out" / "grpo"


def test_a_run_writes_a_checkpoint_and_a_log_of_everything(one, start):  # noqa: F811
    rows = log_of(one)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[:4]:
        lengths = {"length_right": row["accuracy"] > 0, "length_wrong": row["accuracy"] < 1}
        assert set(row) == LOGGED | {name for name, there in lengths.items() if there}
        assert row["logp_gap"] < 1e-4 and row["ratio_max"] == pytest.approx(1, abs=1e-4) and 0 < row["entropy"]
        assert row["groups"] <= 4 <= row["asked"] <= 16
    assert {"model.safetensors", "config.json", "tokenizer.model", "curves.png"} <= {path.name for path in one.iterdir()}
    before, after = load_file(start / "model.safetensors"), load_file(one / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved == {name for name in before if name.startswith("llm.")}


def test_two_processes_equal_one(one, start, even, tmp_path):  # noqa: F811
    torchrun(2, "3-rl_vlm.py", *arguments(start, even), cwd=tmp_path)
    two = tmp_path / "out" / "grpo"
    for a, b in zip(log_of(one)[:4], log_of(two)[:4], strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4) for name in a.keys() - {"seconds", "tokens_per_second"})
    begun, ends = load_file(start / "model.safetensors"), [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in begun.items():
        assert (ends[0][name] - ends[1][name]).norm() <= 2e-3 * (ends[0][name] - weight).norm(), name


@pytest.mark.parametrize("more", [
    (), ("--algo", "ppo", "--beta", 0.1, "--kl", "k1"), ("--algo", "dpo", "--pairs", "policy"),
    ("--train.llm", "lora:4", "--beta", 0.1),
])  # fmt: skip
def test_a_killed_run_goes_on_to_exactly_the_same_weights(more, one, start, even, run_script, tmp_path):  # noqa: F811
    given = arguments(start, even, *more)
    whole = one
    if more:
        whole = tmp_path / "whole"
        run_script("3-rl_vlm.py", *given, "--out", whole, cwd=tmp_path)
    run_script("3-rl_vlm.py", *given, "--out", "half", cwd=tmp_path, die_at_step=3, expect=-signal.SIGKILL)
    run_script("3-rl_vlm.py", *given, "--out", "half", "--resume", cwd=tmp_path)
    ends = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "half")]
    assert ends[0].keys() == ends[1].keys() == load_file(start / "model.safetensors").keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    logs = [[{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in log_of(folder)]
            for folder in (whole, tmp_path / "half")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_finished_run_that_is_resumed_ends_as_it_did_and_forgets_nothing(one, start, even, run_script, tmp_path):  # noqa: F811
    again = shutil.copytree(one, tmp_path / "out" / "grpo")
    run_script("3-rl_vlm.py", *arguments(start, even, "--resume"), cwd=tmp_path)
    ends = [load_file(folder / "model.safetensors") for folder in (one, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    states = [json.loads((folder / "resume" / "000004" / "state.json").read_text()) for folder in (one, again)]
    assert states[0]["average"] == states[1]["average"] > 0


@pytest.mark.parametrize("algo", [algo for algo in ALGORITHMS if algo not in ("grpo", "ppo")])
def test_every_algorithm_takes_two_passes_over_its_answers(algo, start, even, run_script, tmp_path):  # noqa: F811
    run_script("3-rl_vlm.py", *arguments(start, even, "--algo", algo, "--passes", 2, "--max_steps", 4), cwd=tmp_path)
    rows = log_of(tmp_path / "out" / "grpo")
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-4) and rows[3]["ratio_max"] > 1.001
    assert rows[0]["reward"] == rows[1]["reward"], "the same answers"


def test_a_file_of_problems_is_learned_from_and_a_config_file_says_how(start, run_script, samples, tmp_path):  # noqa: F811
    settings = {"data": [str(samples / "eureka.jsonl"), str(samples / "lmm_r1.jsonl")], "init": str(start), "out": "run/grpo",
                "max_steps": 2, "prompts": 2, "answers": 2, "max_new_tokens": 4, "lr": "1e-4", "clip_high": 0.3,
                "bench": "arithmetic", "eval_examples": 2, "eval_every": 1, "device": "cpu", "reward": "rule"}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = run_script("3-rl_vlm.py", "--config", tmp_path / "run.yaml", "--rounds", 1, cwd=tmp_path)
    assert "8 problems, 2 steps of 2 x 2 answers on 1 x cpu" in done.out and "a loss of about 0 is normal" in done.out
    rows = log_of(tmp_path / "run" / "grpo")
    assert [row["step"] for row in rows if "arithmetic/accuracy" in row] == [0, 1, 2]
    assert [row["lr"] for row in rows if "lr" in row][0] == pytest.approx(1e-4 / 5)
    assert all(row["all_wrong"] == 1 and row["groups"] == 0 and row["gradient_norm"] == 0 for row in rows if "lr" in row)
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "## Reinforcement learning: grpo" in page and "| picture | question | truth | before | after |" in page
    assert "arithmetic/accuracy before" in page
    first, best = (json.loads((tmp_path / "run" / "grpo" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert "step 0 is kept" in done.out and first == best, "the report tells what the kept checkpoint says"
    assert "arithmetic/accuracy" in json.loads((tmp_path / "run" / "grpo" / "scores.json").read_text())


def test_bad_rows_of_problems_are_named_once_and_their_list_stays(start, run_script, tmp_path):  # noqa: F811
    rows = [{"conversations": [{"role": "user", "content": f"{k}?"}], "answer": answer} for k, answer in enumerate("7$77")]
    given = ("--data", lines(tmp_path / "rows.jsonl", rows), "--max_bad", 0.5, "--prompts", 1, "--answers", 2, "--rounds", 0,
             "--max_new_tokens", 2, "--bench", "", "--device", "cpu", "--init", start)  # fmt: skip
    for more in (("--max_steps", 2), ("--max_steps", 2, "--resume")):
        done = run_script("3-rl_vlm.py", *given, *more, cwd=tmp_path)
        assert done.err.count("skipped ") == 1
        (told,) = map(json.loads, (tmp_path / "out" / "grpo" / "bad_problems.jsonl").read_text().splitlines())
        assert told["row"].endswith("rows.jsonl:2") and "nothing can match it" in told["reason"]


@pytest.mark.parametrize("switch", ["--dry_run", "--check_data"])
def test_looking_writes_nothing(switch, start, run_script, tmp_path):  # noqa: F811
    done = run_script("3-rl_vlm.py", "--init", start, "--bench", "", "--device", "cpu", "--problems", 12, switch, cwd=tmp_path)
    assert "12 problems, " in done.out and " x 8 answers on 1 x cpu" in done.out
    assert ("[image]" in done.out and "right: " in done.out) == (switch == "--check_data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "message"), [
    (("--algo", "grppo"), "--algo is one of grpo, rloo"), (("--advantage", "best"), "--advantage is one of dr_grpo"),
    (("--kl", "k4"), "--kl is one of k1"), (("--temperature", 0), "--temperature is above 0"), (("--answers", 1), "at least 2"),
    (("--clip_low", 1.5), "clip_low is between 0 and 1"), (("--nll_weight", 0.5), "has no use for --nll_weight"),
    (("--algo", "ppo", "--advantage", "rloo"), "leave out --advantage"), (("--pairs", "policy"), "has no use for --pairs"),
    (("--algo", "dpo", "--passes", 2), "has no use for --problems"),
    (("--passes", 4, "--save_every", 6), "a multiple of --passes, 4"),
    (("--reward", "mine.py:no"), "my_file.py:function, not"), (("--data", "nowhere.jsonl"), "no data at nowhere.jsonl"),
    (("--resume",), "nothing to resume in out/grpo"), (("--pairs", "own"), "--pairs is policy, or left out"),
    (("--prompts", 0), "--prompts is at least 1, not 0"), (("--passes", 0), "--passes is at least 1, not 0"),
    (("--max_steps", 0), "--max_steps is at least 1, not 0"), (("--save_every", 0), "--save_every is at least 1, not 0"),
    (("--drift", 0.1), "has no use for --drift"), (("--algo", "cispo", "--clip_low", 0.1), "has no use for --clip_low"),
    (("--lam", 1), "has no use for --lam"), (("--kl", "k2"), "has no use for --kl without --beta"),
    (("--keep_all", "--rounds", 1), "--rounds asks other problems"), (("--max_length", 64), "has no use for --max_length"),
    (("--max_new_tokens", 4096), "leaves no room for prompt and answer"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_remedy(more, message, start, even, run_script, tmp_path):  # noqa: F811
    done = run_script("3-rl_vlm.py", *arguments(start, even), *more, cwd=tmp_path, expect=1)
    assert message in done.err


def test_a_run_that_compares_with_its_start_is_not_resumed_from_another(start, even, run_script, tmp_path):  # noqa: F811
    checkpoint.save(tmp_path / "start", tiny_model(), TOKENIZER.file)
    run_script("3-rl_vlm.py", *arguments(tmp_path / "start", even, "--max_steps", 2), cwd=tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.connector.proj.weight.add_(0.1)
    checkpoint.save(tmp_path / "start", model, TOKENIZER.file)
    done = run_script("3-rl_vlm.py", *arguments(tmp_path / "start", even, "--resume"), cwd=tmp_path, expect=1)
    assert "was started from other weights" in done.err


def test_a_run_that_learns_nothing_more_stops_with_advice_and_a_checkpoint(start, run_script, tmp_path):  # noqa: F811
    rows = [{"conversations": [{"role": "user", "content": f"{k}?"}], "answer": "7"} for k in range(4)]
    given = ("--data", lines(tmp_path / "hard.jsonl", rows), "--prompts", 1, "--answers", 2, "--rounds", 0, "--max_new_tokens", 2)
    done = run_script("3-rl_vlm.py", "--init", start, *given, "--bench", "", "--device", "cpu", "--max_steps", 30, cwd=tmp_path)
    assert re.search(r"stopped at step 20 of 30: 100% of the groups hold no right answer.*2-sft_vlm.py", done.out)
    assert (tmp_path / "out" / "grpo" / "model.safetensors").is_file()


# ---------------------------------------------------------------- flags


def test_every_default_that_depends_on_the_algorithm_is_known_for_all_families():
    fields = {field.name: getattr(SCRIPT.Config(), field.name) for field in dataclasses.fields(SCRIPT.Config)}
    assert {name for name, value in fields.items() if value is None} - set(SCRIPT.DEFAULTS) == {
        "clip_low", "clip_high", "reference", "image_folder", "questions"}  # fmt: skip
    for algo, out in (("grpo", "out/grpo"), ("dpo", "out/dpo")):
        filled = SCRIPT.filled(SCRIPT.Config(algo=algo))
        assert filled.out == Path(out) and all(getattr(filled, name) is not None for name in SCRIPT.DEFAULTS)
    assert SCRIPT.filled(SCRIPT.Config(algo="dpo")).data == () and SCRIPT.filled(SCRIPT.Config()).data == ("arithmetic",)
    assert SCRIPT.filled(SCRIPT.Config(algo="dpo", pairs="policy")).data == ("arithmetic",)
    assert SCRIPT.filled(SCRIPT.Config(lr=3.0, bench="")).lr == 3.0


def test_a_config_file_may_set_what_has_no_default_of_its_own():
    given = {"lr": "1e-4", "max_steps": 7, "out": "x", "data": "a.jsonl", "beta": None}
    read = cli.from_mapping(SCRIPT.Config(), given, "run.yaml")
    assert (read.lr, read.max_steps, read.out, read.data, read.beta) == (1e-4, 7, Path("x"), ("a.jsonl",), None)
    with pytest.raises(SystemExit, match="run.yaml: lr: 'fast' is not a float"):
        cli.from_mapping(SCRIPT.Config(), {"lr": "fast"}, "run.yaml")


def test_the_script_is_the_one_that_is_tested():
    assert SCRIPT.Config().algo == "grpo"
    assert SimpleNamespace(**runpy.run_path(str(ROOT / "3-rl_vlm.py"))).Config().algo == "grpo"
