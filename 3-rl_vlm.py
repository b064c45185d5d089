"""Stage 3, reinforcement learning: from answers that sound right to answers that are.

Rules (--algo grpo, the default): the model answers a problem eight times with its reasoning, a rule checks each answer, and what
made the right ones differ from the wrong ones becomes likelier (MM-EUREKA, arXiv 2503.07365; LMM-R1, arXiv 2503.07536).
Preferences (--algo dpo): it describes pictures, each claim is checked, and one loss raises a better answer over a worse one,
measured against what the model said before (arXiv 2305.18290). Beside it an anchor keeps the better answer likely in itself:
without it the surest way never to be wrong is to say nothing.
One loop serves both: where a batch comes from, and what is minimised, is all that differs.

In:  out/sft, and problems (default: arithmetic), or preferences (default: the model's own answers about the embedded world).
Out: out/grpo or out/dpo, as in stage 1.

    python 3-rl_vlm.py                                              rules: sums of drawn digits and dice
    python 3-rl_vlm.py --data my_rows.jsonl --reward my_file.py:my_function
    python 3-rl_vlm.py --data arithmetic:text=true --out out/fre    LMM-R1: first reasoning, in words alone,
    python 3-rl_vlm.py --init out/fre                               and from there on pictures
    python 3-rl_vlm.py --algo dpo                                   preferences: a good minute on a CPU core
    python 3-rl_vlm.py --algo sft_chosen --out out/control          the control: fine-tuning on the better answers alone
    python 3-rl_vlm.py --algo dpo --iterations 3                    generate, learn, choose, and again from there
    python 3-rl_vlm.py --algo dpo --pairs_only --labeler judge --judge http://localhost:8000/v1,model=NAME
    python 3-rl_vlm.py --algo dpo --data RLAIF-V-Dataset rlhf-v.parquet:2 --train.llm lora:64 --lr 1e-5
    python 3-rl_vlm.py --algo dpo --pairs policy                    preferences by rules: the best and the worst of each group
"""

import copy
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dataset import preferences, rollouts
from dataset.collate import Batches
from dataset.conversations import BadRows
from dataset.evaluation import Ask, add_scores, evaluate, several
from dataset.eyes import Eyes
from dataset.feedback import divider_and_labeler, world_pairs
from dataset.labels import Labeler, YesNo, by_model
from dataset.mixture import pictures
from dataset.report import before_and_after, marked, section, sheet, table
from dataset.rewards import judge_from
from dataset.tokenizer import Tokenizer, load_tokenizer
from model import checkpoint, cli, critic, lora, policy, recipe
from model.chosen import Chosen, copy_checkpoint
from model.clipping import Clipped, DynamicClipping
from model.generate import evaluating, generate, prefill
from model.losses import (
    IGNORE,
    PER_TOKEN,
    PREFERENCE_LOSSES,
    WITHOUT_REFERENCE,
    Pairs,
    PreferenceOptions,
    anchor,
    answer_sums,
    as_pairs,
    next_token_targets,
    rewards,
    token_logps,
)
from model.optimizer import make_optimizer
from model.policy import ALGORITHMS
from model.registry import TASKS, TEMPLATES, specs
from model.runtime import Run, clip_gradients, draw_curves, learning_rate
from model.vlm import VLM, count_parameters

Batch = dict  # dataset/preferences.py: `join`; dataset/rollouts.py: `micro_batches`


@dataclass
class Train:
    connector: str = "freeze"  # freeze | full | partial:K (the last K linear maps) | lora:R
    llm: str = "full"  # freeze | full | partial:K (the last K blocks) | lora:R (adapters; their absence is the reference)
    encoder: str = "freeze"  # freeze | full | partial:K | lora:R; trained, it sees pixels at every step


@dataclass
class Config:
    # Rules: grpo rloo reinforce++ reinforce++_baseline ppo cispo gspo cpgd
    # Preferences: dpo ipo hinge robust simpo apo_zero bco mpo sft_chosen (the control)
    algo: str = "grpo"  # by rules: grpo, rloo, ppo, ...; by preferences: dpo, ipo, mpo, ...; an unknown one lists all
    data: tuple[str, ...] | None = None  # rules: tasks, files with answers; preferences: files, none: the model's own; by weight

    # Rules, and --pairs policy
    problems: int = 4096  # of each task or file; when all have been asked, they are asked again
    pass_rates: tuple[float, float] = (0.0, 1.0)  # files: leave out rows whose own pass_rate lies outside, as 0.1 0.9 (MM-EUREKA)
    prompts: int = 32  # groups that an update learns from, each of so many --answers
    rounds: int = 3  # how often others are asked in the place of problems whose answers are all alike
    reward: str = "rule"  # rule: a right answer in the right form, + 0.1 for the form | my_file.py:function
    max_new_tokens: int = 96  # of an answer
    chunk: int = 32  # problems that are answered together
    # Rules alone
    keep_all: bool = False  # learn from groups whose answers are all alike, too, and ask no others
    passes: int = 1  # steps on the answers of an update; from the second on they are those of an older policy
    advantage: str = ""  # dr_grpo | grpo | rloo | reinforce++ | reinforce++_baseline; default: the algorithm's own
    clip_low: float | None = None  # how far the probability of a token may fall: 0.2, to 0.8 of what it was; gspo 3e-4
    clip_high: float | None = None  # and how far it may rise: 0.28; gspo 4e-4
    per_sequence: bool = False  # mean over the tokens of an answer, then over answers, as GRPO was published: lengths collapse
    drift: float = 0.0  # cpgd: pull back to the policy that sampled
    lam: float = 0.95  # ppo: how far an advantage looks ahead; 1: to the end of the answer
    kl: str = "k3"  # the estimate of the KL to the start that --beta weighs: k1 (in the reward) | k2 | k3
    entropy_floor: float = 0.005  # nats a token; where it stays below, nothing new is tried, and the run ends

    # Preferences
    pairs: str = ""  # policy: the best and the worst of --answers to each problem, judged by the rule, sampled in every step
    scenes: int = 400  # without --data: scenes that the model describes in each iteration
    labeler: str = "truth"  # without --data: who labels; truth: the scene | self: the model | judge: --judge | a checkpoint
    judge: str = ""  # URL,model=NAME[,key=VARIABLE]: an OpenAI-compatible endpoint; it divides what no rule can
    divider: str = "claims"  # without --data: what is labelled; claims: each thing that an answer says | whole: all at once
    balance: bool = False  # without --data: drop pairs by length, until chosen and rejected answers are about equally long
    pairs_only: bool = False  # make the pairs, say where they are, and stop
    iterations: int = 1  # rounds of generate, learn, choose; each starts from, and compares with, the one chosen before
    nll_weight: float = 1.0  # of the anchor, the negative log-likelihood of the chosen answer; 0 invites silence
    smoothing: float = 0.0  # dpo, robust: the share of pairs that are taken to be swapped
    gamma: float = 1.0  # simpo: the margin to reach
    reference: Path | None = None  # the reference's log-probabilities, computed where they are missing; default: in --out
    epochs: float = 4.0  # passes over the pairs
    accumulate: int = 1  # micro-steps a step

    # Both; of two defaults the first is that of rules, the second that of preferences (DEFAULTS)
    answers: int = 8  # answers to each problem or question, sampled alike
    temperature: float | None = None  # of this sampling: 1; 0.7
    beta: float | None = None  # rules: weight of the KL to the start, 0; preferences: worth of a nat of log-ratio, 0.1 (simpo 2)
    image_folder: Path | None = None  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    init: Path = Path("out/sft")  # the checkpoint to start from
    out: Path | None = None  # where the checkpoint goes: out/grpo; out/dpo
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: Train = field(default_factory=Train)
    max_steps: int | None = None  # stop after so many steps: 70; 0, after the epochs
    batch_size: int | None = None  # of a process and micro-step: 64 answers; 8 pairs
    max_length: int = 1024  # preferences: tokens of prompt and answer; longer answers lose their end, both at the same token
    optimizer: str | None = None  # muon | adamw: muon; adamw
    lr: float | None = None  # peak learning rate: 1e-3; 2e-5; with LoRA twenty times that; of a pretrained model a hundredth
    lr_encoder: float = 0.0  # peak learning rate of the encoder alone; 0: --lr
    lr_connector: float = 0.0  # of the connector alone
    lr_llm: float = 0.0  # of the language model alone
    warmup: int | None = None  # steps of rising learning rate: 5; 10
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; rules: nor twice what is usual, and no step at ten times that
    seed: int = 0
    bench: str | None = None  # tasks to check on their validation split, which choose the checkpoint: arithmetic; hallucination
    eval_every: int | None = None  # steps between checks, from step 0 on: 20; 100; 0: at the end alone
    eval_examples: int | None = None  # pictures' worth of questions that a check asks of each task: 300; 1000
    save_every: int | None = None  # steps between saves for --resume: 20; 200; the end is always saved
    log_every: int | None = None  # steps between lines of log.jsonl: 1; 5
    max_bad: float = 0.01  # share of bad rows that stops the run
    feature_cache: Path = Path("out/features")  # features of the frozen encoder, computed once
    feature_cache_gb: float = 8.0  # above this the encoder runs at every step instead
    resume: bool = False  # go on exactly where the run in --out stopped
    checkpointing: bool = False  # less memory for one more forward pass: activations are computed again, not kept
    compile: bool = False  # torch.compile: a minute of waiting, then faster on a GPU
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps
    wandb: bool = False  # log to Weights & Biases as well
    dry_run: bool = False  # print parameters, rows and steps, and stop
    check_data: bool = False  # print three rows as the model will read them, what is learned in 【brackets】, and stop


DEFAULTS = {  # of flags that are not given: rules, preferences, preferences by rules
    "data": (("arithmetic",), (), ("arithmetic",)), "temperature": (1.0, 0.7, 1.0), "beta": (0.0, 0.1, 0.1),
    "out": (Path("out/grpo"), Path("out/dpo"), Path("out/dpo")), "max_steps": (70, 0, 40), "batch_size": (64, 8, 8),
    "lr": (1e-3, 2e-5, 2e-5), "optimizer": ("muon", "adamw", "adamw"), "warmup": (5, 10, 5),
    "bench": ("arithmetic", "hallucination", "arithmetic"),
    "eval_every": (20, 100, 10), "eval_examples": (300, 1000, 300), "save_every": (20, 200, 20), "log_every": (1, 5, 1),
}  # fmt: skip
ROLLOUT_FLAGS = ("problems", "pass_rates", "prompts", "rounds", "reward", "max_new_tokens", "chunk")
RULE_FLAGS = ("keep_all", "passes", "advantage", "clip_low", "clip_high", "per_sequence", "drift", "lam", "kl", "entropy_floor")
STORED_FLAGS = ("scenes", "labeler", "judge", "divider", "balance", "pairs_only", "iterations", "reference", "epochs",
                "accumulate")
PREFERENCE_FLAGS = ("pairs", *STORED_FLAGS, "nll_weight", "smoothing", "gamma")


def filled(config: Config) -> Config:
    """The config with the defaults of its algorithm; ValueError where that is unknown, or has no use for a flag that is set."""
    if config.algo not in (*ALGORITHMS, *PREFERENCE_LOSSES):
        raise ValueError(f"--algo is one of {', '.join((*ALGORITHMS, *PREFERENCE_LOSSES))}, not {config.algo!r}")
    if config.pairs not in ("", "policy"):
        raise ValueError(f"--pairs is policy, or left out, not {config.pairs!r}")
    family = 0 if config.algo in ALGORITHMS else 2 if config.pairs else 1
    idle = (PREFERENCE_FLAGS, ROLLOUT_FLAGS + RULE_FLAGS, STORED_FLAGS + RULE_FLAGS)[family]
    if given := [name for name in idle if getattr(config, name) != getattr(Config(), name)]:
        raise ValueError(f"--algo {config.algo}{' --pairs policy' if config.pairs else ''} has no use for --{', --'.join(given)}")
    return dataclasses.replace(config, **{name: values[family] for name, values in DEFAULTS.items()
                                          if getattr(config, name) is None})


def check(config: Config) -> None:
    """ValueError for what does not go together, before anything is loaded."""
    if config.algo in ALGORITHMS:
        policy_options(config)
        if config.save_every % config.passes:
            raise ValueError(f"a run is saved between updates: --save_every is a multiple of --passes, {config.passes}")
        return
    PreferenceOptions(config.beta, config.smoothing, config.gamma)
    if config.algo == "robust" and config.smoothing == 0:
        raise ValueError("robust without swapped pairs is dpo: say how many there are, --smoothing 0.1")
    if config.algo == "sft_chosen" and config.nll_weight == 0:
        raise ValueError("sft_chosen learns by the anchor alone: --nll_weight must be above 0")
    if config.pairs_only and (config.data or config.iterations > 1):
        raise ValueError("--pairs_only makes the pairs of one iteration: leave out --data and --iterations")
    if config.data and (config.labeler, config.judge, config.divider, config.balance) != ("truth", "", "claims", False):
        raise ValueError("--data has its labels: leave out --labeler, --judge, --divider and --balance")
    divider_and_labeler(config.divider, config.labeler, config.judge)  # what does not go together fails here, too


def main(config: Config) -> None:
    """Iterations of one thing: `learn`. With several, each has its own folder in --out, which gets the best of them."""
    config = filled(config)
    check(config)
    tasks = {name: TASKS.make(name) for name in specs(config.bench)}  # a wrong name fails here, not after training
    run = Run(config, config.algo)
    folders = [config.out] if config.iterations == 1 else [config.out / f"iteration-{n + 1}" for n in range(config.iterations)]
    if run.first and not (config.resume or config.dry_run or config.check_data or config.pairs_only):
        for folder in config.out.glob("iteration-*"):  # an earlier run's are not this one's
            shutil.rmtree(folder)
    run.wait()

    start, reference = config.init, config.reference
    for number, folder in enumerate(folders):
        run.out, run.history, run.state = folder, [], {}
        finished = config.resume and config.iterations > 1 and (folder / "chosen.json").is_file()
        if not finished:
            resume = config.resume and (number == 0 or (folder / "resume").is_dir())
            run.config = dataclasses.replace(config, init=start, reference=reference, out=folder, resume=resume,
                                             seed=config.seed + number)
            if not learn(run.config, run, tasks):
                return
        start, reference = folder, None  # the next one begins with, and is compared with, what this one chose
    if run.first and len(folders) > 1:
        best = max(reversed(folders), key=lambda folder: json.loads((folder / "chosen.json").read_text())["quality"])
        run.say(f"{best.name} of {len(folders)} is kept")  # the last one of equals, and where nothing was measured
        copy_checkpoint(best, config.out)
        add_scores(config.out, json.loads((best / "scores.json").read_text()))
    bench = "arithmetic,world" if config.algo in ALGORITHMS else "hallucination,world"
    run.finish(f"wrote {config.out}", f"python 4-eval_chat.py --bench {bench}, or python web_demo.py")


def learn(config: Config, run: Run, tasks: dict) -> bool:
    """One run, from config.init to config.out; False where it was only looked at."""
    torch.manual_seed(config.seed)  # each iteration is the same whether it is the first of its process or not
    model = checkpoint.load(config.init).train().to(run.device)
    if config.template:
        model.config = dataclasses.replace(model.config, template=config.template)
    tokenizer, template = load_tokenizer(checkpoint.tokenizer_file(config.init)), TEMPLATES.make(model.config.template)
    made_by = fingerprint(model, tokenizer, run)
    moving = recipe.apply(model, {name: getattr(config.train, name) for name in model.parts}, config.checkpointing)
    if config.algo == "ppo":
        critic.apply(model)
    optimizer = make_optimizer(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
                               own_lr={"encoder": config.lr_encoder, "connector": config.lr_connector, "llm": config.lr_llm})
    run.say(", ".join(f"{name} {count_parameters(part):,} ({moving[name]:,} trained)" for name, part in model.parts.items()))

    see = partial(Eyes, model.encoder, model.config.fit, model.config.tiles, run.device,
                  None if moving["encoder"] else config.feature_cache)
    banned = (tokenizer.image, tokenizer.pad, tokenizer.bos)
    sampling = dict(max_new_tokens=config.max_new_tokens, stop_ids={tokenizer.id(template.stop)}, banned=banned)
    ask = Ask(template, tokenizer, model.image_tokens, see(), run.generator(generate, model, temperature=0.0, **sampling))
    setting = Setting(config, run, model, tokenizer, template, see(rank=run.rank, world=run.world, wait=run.wait), ask, sampling,
                      made_by)
    # Two things make an algorithm: where a batch comes from, and what is minimised.
    method = (ByRule if config.algo in ALGORITHMS else ByOwnPairs if config.pairs else ByPairs)(setting)
    if method.steps == 0:
        return False

    method.wrapped = run.wrap(method.trained, config.compile)
    first_step, position = run.resume(model, optimizer)
    chosen = Chosen(run, method.measure)
    stream = method.stream(position)
    shown = [(task, example) for task in tasks.values() for example in task.examples("val", 8)[:14]]
    if run.first and first_step == 0:
        (run.out / "before.json").write_text(json.dumps(ask([example.prompt for _, example in shown])))
    run.progress(first_step, method.steps)
    for step in range(first_step, method.steps + 1):
        advice = method.advice()
        last = step == method.steps or bool(advice)

        if last or (step > first_step and step % config.save_every == 0):
            run.save(model, optimizer, tokenizer.file, step, position, made_by=made_by, **method.state)
        if last or (tasks and config.eval_every and step % config.eval_every == 0):  # step 0 too: what there was before
            scores = {}
            if run.first:
                for name, task in tasks.items():
                    scores.update(evaluate(name, task, "val", ask, config.eval_examples)[0])
                chosen.offer(model, tokenizer, step, scores)
            run.log(step, **scores)
            run.wait()
        if last:
            break

        position, micro_batches, facts = next(stream)
        weight = run.sum(sum(method.weight(batch) for batch in micro_batches))  # pairs, or learned tokens

        sums, peaks = Counter(), {}
        for batch in micro_batches:
            loss, measured, largest = method.minimised(batch)
            (loss * run.world / weight).backward()  # DDP takes the mean over ranks: undo it
            sums.update(measured)
            peaks = {name: max(value, peaks.get(name, value)) for name, value in largest.items()}

        rates = optimizer.set_lr(partial(learning_rate, step, warmup=config.warmup, total=method.steps))
        clipped = method.clip(model)
        if not clipped.skip:
            optimizer.step()
        optimizer.zero_grad()

        metrics = {name: run.sum(value) / weight for name, value in sums.items()}
        method.after(metrics)
        run.bar.update()
        run.count(sum(batch["input_ids"].numel() for batch in micro_batches))
        if step % config.log_every == 0:
            run.log(step, **facts, **metrics, **{name: run.max(value) for name, value in peaks.items()}, **rates,
                    **method.told(clipped), tokens_per_second=run.tokens_per_second())

    if advice:
        run.say(f"stopped at step {step} of {method.steps}: {advice}")
    if run.first:
        draw_curves(run.history, run.out / "curves.png")
        scores = chosen.keep() or scores
        add_scores(run.out, scores)
        report(config, run, shown, ask([example.prompt for _, example in shown]), scores)
    run.bar.close()
    run.wait()
    return True


def report(config: Config, run: Run, shown: list[tuple], said: list[str], scores: dict[str, float]) -> None:
    """The run's section of report.md: scores, curves, and what is said to held-out questions (task, example) before and after."""
    page, examples = config.out.parent / "report.md", [example for _, example in shown]
    curves = f"![]({run.out.name}/curves.png)\n\n"
    if config.algo in ALGORITHMS:
        before = json.loads((run.out / "before.json").read_text())
        right = [[task.score(example, answer) == 1 for (task, example), answer in zip(shown, answers, strict=True)]
                 for answers in (before, said)]
        start = next((row for row in run.history if row["step"] == 0 and scores.keys() & row.keys()), {})
        both = {f"{name}{when}": row[name] for name in scores for when, row in ((" before", start), ("", scores)) if name in row}
        section(page, f"Reinforcement learning: {run.out.name}", f"{table({**both, 'seconds': round(run.seconds)})}\n\n{curves}"
                f"{before_and_after(run.out, page, examples, (before, said), right)}")
        return
    section(page, f"Preference learning: {run.out.name}", f"{table({**scores, 'seconds': round(run.seconds)})}\n\n{curves}"
            f"{sheet(run.out, page, examples, said)}")


# ---------------------------------------------------------------- what an algorithm is


@dataclass(frozen=True)
class Setting:
    """What every algorithm is given."""

    config: Config
    run: Run
    model: VLM
    tokenizer: Tokenizer
    template: object
    eyes: Eyes
    ask: Ask
    sampling: dict  # options of `generate`, all but the temperature
    made_by: str  # tells the weights that the run starts from


class Method:
    """Where a batch comes from, `stream`, and what is minimised, `minimised`; below them what else may differ.

    steps      of the whole run; 0 where it was only looked at
    trained    what is called in training; `wrapped` is the same with the gradients of all processes averaged (Run.wrap)
    weight     of a batch: what sums over it are divided by
    """

    measure = "(1 - CHAIR_s) x Cover"  # what chooses the checkpoint
    steps = 0
    state: dict = {}  # saved for --resume

    def __init__(self, setting: Setting):
        self.__dict__.update({name: getattr(setting, name) for name in setting.__dataclass_fields__})
        self.trained = self.wrapped = self.model

    def stream(self, position: int) -> Iterator[tuple[int, list[Batch], dict]]:
        """(position to go on from, this rank's micro-batches of a step, facts for the log), for ever."""
        raise NotImplementedError

    def minimised(self, batch: Batch) -> tuple[Tensor, dict, dict]:
        """The loss summed over the batch, sums over it of what is logged, and largest values."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> int:
        raise NotImplementedError

    def clip(self, model: nn.Module) -> Clipped:
        return Clipped(clip_gradients(model, self.config.clip), self.config.clip, skip=False)

    def told(self, clipped: Clipped) -> dict[str, float]:
        return {"gradient_norm": clipped.norm}

    def after(self, metrics: dict[str, float]) -> None:
        """Called after each step."""

    def advice(self) -> str | None:
        """Why to stop here, if there is a reason."""


def require_same_start(run: Run, made_by: str) -> None:
    """ValueError where a run is resumed that began with other weights: what it compares with would be another model."""
    if run.state.get("made_by", made_by) != made_by:
        raise ValueError(f"{run.out} was started from other weights than those of {run.config.init} now: restore them, or start "
                         f"again without --resume")


def at_start(model: VLM) -> Callable[[], AbstractContextManager[VLM]]:
    """The model as it is now, for as long as is wanted: `with start() as model`. Called before the first step.

    Where adapters alone are trained it is the model with these switched off, at no memory; else a copy.
    """
    if all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):

        @contextmanager
        def switched_off() -> Iterator[VLM]:
            with lora.switched_off(model):
                yield model

        return switched_off
    kept = copy.deepcopy(model).requires_grad_(False).eval()
    return lambda: nullcontext(kept)


# ---------------------------------------------------------------- rules: where a batch comes from


def make_rollouts(setting: Setting, keep_all: bool) -> rollouts.Rollouts:
    """The stream of problems that the policy answers."""
    config, run = setting.config, setting.run
    asked = rollouts.problems(
        config.data, config.problems, judge_from(config.reward), image_folder=config.image_folder, allow_urls=config.allow_urls,
        bad_rows=run.out / "bad_rows.jsonl", max_bad=config.max_bad, pass_rates=config.pass_rates)

    def sample(batch: Batch, generator: torch.Generator) -> list:
        return run.generator(generate, setting.model, temperature=config.temperature, answers=config.answers,
                             generator=generator, **setting.sampling)(batch)

    run.say(f"{len(asked):,} problems, {config.max_steps} steps of {config.prompts} x {config.answers} answers "
            f"on {run.world} x {run.device}")
    if config.check_data:
        for problem in asked[:3]:
            prompt = rollouts.render_prompt(problem.prompt, setting.template, setting.tokenizer, setting.model.image_tokens,
                                            views=setting.eyes.views)
            run.say(f"{prompt.id}\n{marked(prompt, setting.tokenizer)}\nright: {problem.example.answer}\n")
    return rollouts.Rollouts(
        asked, sample, setting.template, setting.tokenizer, setting.model.image_tokens, setting.eyes, run.device,
        prompts=config.prompts, answers=config.answers, chunk=config.chunk, seed=config.seed, rounds=config.rounds,
        keep_all=keep_all, rank=run.rank, world=run.world, union=run.union)


def policy_options(config: Config) -> policy.PolicyOptions:
    """The numbers of the token loss; ValueError for an advantage or a KL that there is not."""
    if config.advantage not in ("", *policy.ADVANTAGES):
        raise ValueError(f"--advantage is one of {', '.join(policy.ADVANTAGES)}, not {config.advantage!r}")
    if config.advantage and config.algo == "ppo":
        raise ValueError("ppo has its advantages from the value head: leave out --advantage")
    if config.kl not in policy.KL:
        raise ValueError(f"--kl is one of {', '.join(policy.KL)}, not {config.kl!r}")
    if config.temperature <= 0:
        raise ValueError("--temperature is above 0: answers that are all alike teach nothing")
    names = ALGORITHMS[config.algo]
    return policy.PolicyOptions(names.clip_low if config.clip_low is None else config.clip_low,
                                names.clip_high if config.clip_high is None else config.clip_high, config.drift)


class ByRule(Method):
    """Verifiable rewards: answers of the policy itself, judged by a rule."""

    measure = "accuracy"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        config = self.config
        self.names, self.options = ALGORITHMS[config.algo], policy_options(config)
        self.advantage = config.advantage or self.names.advantage
        self.rollouts = make_rollouts(setting, config.keep_all or self.advantage in policy.NEEDS_NO_GROUPS)
        if config.dry_run or config.check_data:
            return
        self.steps = config.max_steps
        self.eyes.prepare(self.rollouts.pictures(-(-self.steps // config.passes)), config.feature_cache_gb, self.run.say)
        self.start = at_start(self.model) if config.beta else None
        self.trained = self.wrapped = critic.ActorCritic(self.model) if config.algo == "ppo" else self.model
        self.run.say("a loss of about 0 is normal: on policy it is minus the mean advantage; only its gradient means something")

    def stream(self, position: int) -> Iterator[tuple[int, list[Batch], dict]]:
        """Answers to P problems, then --passes steps on them."""
        require_same_start(self.run, self.made_by)
        state = self.run.state
        self.clipping = DynamicClipping(self.config.clip, state.get("average", 0.0), state.get("skipped", 0))
        while True:
            update = self.rollouts.update(position)
            position, micro_batches = update.position, self.learned(update)
            for _ in range(self.config.passes):
                yield position, micro_batches, update.facts

    def learned(self, update: rollouts.Update) -> list[Batch]:
        """This rank's micro-batches, with the advantage of each learned token, and its weight."""
        config, said = self.config, update.rollouts
        batches = [self.run.to_device(batch) for batch in
                   rollouts.micro_batches(said, self.eyes, config.batch_size, self.run.rank, self.run.world)]
        rewards = update.rewards().to(self.run.device)  # (P, G)
        if self.start:
            penalties = {}
            for batch in batches:
                batch["reference_logps"] = self.logps_at_start(batch)
                estimates = policy.k1(batch["rollout_logps"], batch["reference_logps"])
                for place in batch["places"].unique().tolist():
                    penalties[place] = float(estimates[batch["places"] == place].sum())
            if config.kl == "k1":  # as a loss its gradient would be 0 on average
                penalties = self.run.union(penalties)
                rewards = rewards - config.beta * rewards.new_tensor([penalties[k] for k in range(len(said))]).view_as(rewards)
        if config.algo == "ppo":
            self.by_value(batches, rewards.flatten())
        else:
            advantages = policy.ADVANTAGES[self.advantage](rewards).flatten()
            for batch in batches:
                batch["advantages"] = advantages[batch["places"]]
        weights = torch.ones(len(said))
        if config.per_sequence or self.names.per_sequence:
            weights = policy.per_sequence(torch.tensor([len(rollout) for rollout in said])).float()
        for batch in batches:
            batch["weights"] = weights.to(self.run.device)[batch["places"]]
        return batches

    @torch.no_grad()
    def logps_at_start(self, batch: Batch) -> Tensor:
        """(K,): the log-probabilities of the learned tokens under the model that the run started from."""
        with self.start() as model, evaluating(model), self.run.autocast():
            return self.scored(model, batch)[0]

    @torch.no_grad()
    def by_value(self, batches: list[Batch], rewards: Tensor) -> None:
        """ppo: advantages of every token from the value head, whitened over the update, the reward at the last token."""
        with self.run.autocast():
            for batch in batches:
                values = self.scored(self.wrapped, batch)[3]
                lengths = batch["places"].unique_consecutive(return_counts=True)[1]
                by_answer = pad_sequence(values.split(lengths.tolist()), batch_first=True)  # (answers, longest)
                given = torch.zeros_like(by_answer)
                given[torch.arange(len(lengths)), lengths - 1] = rewards[batch["places"].unique_consecutive()]
                real = torch.arange(by_answer.shape[1], device=values.device) < lengths[:, None]
                advantages, returns = policy.gae(given, by_answer, policy.DISCOUNT, self.config.lam)
                batch.update(values=values, advantages=advantages[real], returns=returns[real])
        found = torch.cat([batch["advantages"] for batch in batches]).double()
        count, total, squares = (self.run.sum(float(part)) for part in (len(found), found.sum(), found.square().sum()))
        mean = total / count
        deviation = max(0.0, squares / count - mean * mean) ** 0.5
        for batch in batches:
            batch["advantages"] = (batch["advantages"] - mean) / (deviation + 1e-8)

    def advice(self) -> str | None:
        return rollouts.advice(self.run.history, self.config.entropy_floor)

    # ------------------------------------------------------------ rules: what is minimised

    def weight(self, batch: Batch) -> int:
        return len(batch["rollout_logps"])

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of K learned tokens: log-probability, entropy, which answer of the batch they are of, and value (ppo)."""
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        learned = targets != IGNORE
        found = model(batch, learned)
        logits, values = found if isinstance(found, tuple) else (found, None)
        logps, entropy = policy.scored(logits, targets[learned], self.sampling["banned"], self.config.temperature)
        return logps, entropy, batch["document_ids"][learned], values

    def minimised(self, batch: Batch) -> tuple[Tensor, dict, dict]:
        """The policy's loss, and with them the KL's and the value's."""
        with self.run.autocast():
            logps, entropy, answers, values = self.scored(self.wrapped, batch)
        tokens = policy.Tokens(logps, batch["rollout_logps"], batch["advantages"], answers)
        losses, ratio = policy.TOKEN_LOSSES[self.names.loss](tokens, self.options)
        low, high = policy.clipped_shares(ratio, tokens.advantages, self.options)
        measured = {"entropy": entropy, "ratio": ratio, "clipped_low": low, "clipped_high": high}
        if self.start:
            measured["kl"] = policy.KL[self.config.kl](logps, batch["reference_logps"])
            if self.config.kl != "k1":
                losses = losses + self.config.beta * measured["kl"]
        if values is not None:
            measured["value_loss"] = policy.value_loss(values, batch["values"], batch["returns"], policy.VALUE_CLIP)
            losses = losses + policy.VALUE_WEIGHT * measured["value_loss"]
        loss = (batch["weights"] * losses).sum()
        sums = {name: float(values.detach().float().sum()) for name, values in measured.items()}
        gap = (logps.detach() - tokens.rollout).abs().max()
        return loss, {"loss": float(loss.detach()), **sums}, {"ratio_max": float(ratio.detach().max()), "logp_gap": float(gap)}

    def clip(self, model: nn.Module) -> Clipped:
        return self.clipping(model)

    def told(self, clipped: Clipped) -> dict[str, float]:
        return clipped.facts()

    @property
    def state(self) -> dict[str, float]:
        return self.clipping.state


# ---------------------------------------------------------------- preferences: where a batch comes from


class ByPairs(Method):
    """Preference learning from pairs that are there before the first step: files, or the model's own answers, judged."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        config, run, model = self.config, self.run, self.model
        self.options = PreferenceOptions(config.beta, config.smoothing, config.gamma)
        if config.data:
            source = preferences.mixture(config.data, config.image_folder, config.allow_urls)
        elif config.dry_run or config.check_data:
            run.say(f"the pairs will come from {config.scenes} scenes x {config.answers} answers of {config.init}")
            return
        else:
            sampler = partial(run.generator, generate, model, **self.sampling)
            source = own_pairs(config, run, model, self.made_by, self.ask, sampler)
        if config.pairs_only:
            run.say(f"{len(source):,} pairs in {source.path}. Next: the same command without --pairs_only, to learn from them")
            return
        self.batches = Batches(
            source,
            partial(preferences.render, template=self.template, tokenizer=self.tokenizer, image_tokens=model.image_tokens,
                    max_length=config.max_length, views=self.eyes.views),
            self.eyes, batch_size=config.batch_size, window=1, seed=config.seed,
            bad_rows=BadRows(run.out / "bad_rows.jsonl", len(source), config.max_bad), rank=run.rank, world=run.world,
            join=preferences.join)
        per_step = config.accumulate * run.world  # micro-batches a step
        steps = config.max_steps or max(1, round(config.epochs * len(self.batches) / per_step))
        run.say(f"{len(source):,} pairs, {steps} steps of {config.batch_size * per_step} on {run.world} x {run.device}")
        if config.check_data:
            for row in range(min(3, len(source))):
                pair = self.batches.render(source[row])
                run.say(f"{pair.id}\nchosen: {marked(pair.chosen, self.tokenizer)}\n"
                        f"rejected: {marked(pair.rejected, self.tokenizer)}\n")
        if config.dry_run or config.check_data:
            return
        self.steps, self.seen = steps, steps * per_step
        self.eyes.prepare(pictures(self.batches, self.seen), config.feature_cache_gb, run.say)

    def stream(self, position: int) -> Iterator[tuple[int, list[Batch], dict]]:
        """--accumulate micro-batches of pairs, with what the reference thinks of each answer."""
        self.options = dataclasses.replace(self.options, shift=self.run.state.get("shift", 0.0))
        reference = make_reference(self.config, self.run, self.model, self.made_by, self.batches, self.seen)
        found = compared(self.batches.start(position), reference, self.run)
        while True:
            micro_batches = []
            for _ in range(self.config.accumulate):
                position, batch = next(found)
                micro_batches.append(batch)
            yield position, micro_batches, {}

    def weight(self, batch: Batch) -> int:
        return len(batch["keys"])

    def minimised(self, batch: Batch) -> tuple[Tensor, dict, dict]:
        with self.run.autocast():
            logps, documents = answer_logps(self.wrapped, batch)
        pairs = as_pairs(logps, documents, batch["reference"])
        return *preference_objective(pairs, self.options, self.config.algo, self.config.nll_weight), {}

    def after(self, metrics: dict[str, float]) -> None:
        """The zero of bco follows the rewards."""
        mean_reward = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        self.options = dataclasses.replace(self.options, shift=0.9 * self.options.shift + 0.1 * mean_reward)

    @property
    def state(self) -> dict[str, float]:
        return {"shift": self.options.shift}


class ByOwnPairs(ByPairs):
    """The same loss on pairs that are sampled in every step and chosen by a rule: the best and the worst answer of a group."""

    measure = "accuracy"

    def __init__(self, setting: Setting):
        Method.__init__(self, setting)
        config = self.config
        self.options = PreferenceOptions(config.beta, config.smoothing, config.gamma)
        self.rollouts = make_rollouts(setting, keep_all=False)
        if config.dry_run or config.check_data:
            return
        self.steps = config.max_steps
        self.eyes.prepare(self.rollouts.pictures(self.steps), config.feature_cache_gb, self.run.say)
        self.start = at_start(self.model)

    def stream(self, position: int) -> Iterator[tuple[int, list[Batch], dict]]:
        require_same_start(self.run, self.made_by)
        config, run = self.config, self.run
        self.options = dataclasses.replace(self.options, shift=run.state.get("shift", 0.0))
        while True:
            update = self.rollouts.update(position)
            position, pairs = update.position, rollouts.best_and_worst(update.groups)
            if len(pairs) < run.world:  # no two answers differ: ask on
                continue
            micro_batches = []
            for places in rollouts.shares(len(pairs), config.batch_size, run.rank, run.world):
                batch = run.to_device(preferences.join([pairs[k] for k in places], self.eyes))
                with self.start() as model:
                    micro_batches.append({**batch, "reference": sums_now(model, run, batch)})
            yield position, micro_batches, {f"policy_{name}": value for name, value in update.facts.items()}


def own_pairs(config: Config, run: Run, model: VLM, made_by: str, ask: Ask, sampler: Callable) -> preferences.PreferenceFile:
    """Pairs of the model's own answers about the world, made by dataset/feedback.py; what was made is not made again."""

    def answers_to(prompts, answers: int, temperature: float) -> list[list[str]]:
        return several(dataclasses.replace(ask, generate=sampler(temperature=temperature)), prompts, answers)

    divider, labeler = divider_and_labeler(config.divider, config.labeler, config.judge)
    labeler = labeler or model_labeler(config, run, model, ask)
    options = dict(scenes=config.scenes, answers=config.answers, temperature=config.temperature, seed=config.seed,
                   balance=config.balance)
    folder = run.out / "feedback" / preferences.fingerprint(made_by, labeler.name, divider.name, repr(options))[:12]
    if run.first:
        world_pairs(answers_to, folder, divider=divider, labeler=labeler, model=made_by, say=run.say, **options)
    run.wait()
    return preferences.load(folder / "pairs.jsonl")


def model_labeler(config: Config, run: Run, model: VLM, ask: Ask) -> Labeler:
    """Labels by yes or no of the model itself, or of another checkpoint with its own tokenizer, template and eyes."""
    if config.labeler != "self":
        folder = Path(config.labeler)
        model = checkpoint.load(folder, run.device)
        ask = Ask(TEMPLATES.make(model.config.template), load_tokenizer(checkpoint.tokenizer_file(folder)), model.image_tokens,
                  Eyes(model.encoder, model.config.fit, model.config.tiles, run.device, config.feature_cache), ask.generate)
    first_logits = run.generator(lambda model, batch: prefill(model, batch, room=0)[0], model)
    yes_no = YesNo(ask.template, ask.tokenizer, ask.image_tokens, ask.eyes, first_logits)
    return by_model(fingerprint(model, ask.tokenizer, run), yes_no)


def fingerprint(model: VLM, tokenizer: Tokenizer, run: Run) -> str:
    """Tells what a model says from what any other says."""
    return preferences.fingerprint(model.config.to_json(), tokenizer.file.read_bytes(), str(run.dtype), lora.merged(model))


def compared(stream: Iterator[tuple[int, Batch]], reference: Callable[[Batch], Tensor], run: Run) -> Iterator[tuple[int, Batch]]:
    """The same stream, on the device, with what the reference thinks of each answer."""
    for position, batch in stream:
        batch = run.to_device(batch)
        yield position, {**batch, "reference": reference(batch)}


def answer_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every learned token (K,) and its document (K,): one function for the policy and its reference."""
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    learned = targets != IGNORE
    return token_logps(model(batch, learned), targets[learned]), batch["document_ids"][learned]


@torch.no_grad()
def sums_now(model: VLM, run: Run, batch: Batch) -> Tensor:
    """(2N,): the log-probabilities of a batch's answers under the model as it is, in its precision, in evaluation mode."""
    with evaluating(model), run.autocast():
        logps, documents = answer_logps(model, batch)
    return answer_sums(logps, documents, len(batch["ids"]))[0]


def make_reference(config: Config, run: Run, model: VLM, made_by: str, batches: Batches,
                   micro_batches: int) -> Callable[[Batch], Tensor]:
    """Batch -> (2N,) log-probabilities of its answers under the model that this run starts from.

    Called before the first step, or in a resumed run, which reads the file. Where adapters alone are trained, that is the
    model with these switched off. Else they are computed once and kept in a file that says what they were made by: a hash of
    config, tokenizer, precision and weights.
    """
    if config.algo in WITHOUT_REFERENCE:
        return lambda batch: torch.zeros(len(batch["ids"]), device=run.device)
    if all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):

        def switched_off(batch: Batch) -> Tensor:
            with lora.switched_off(model):
                return sums_now(model, run, batch)

        return switched_off

    file = config.reference or run.out / "reference.npz"
    if config.resume or (config.reference and file.is_file()):
        stored = preferences.Reference.read(file, made_by)
    else:
        logps = {}
        mine = range(run.rank, min(len(batches), micro_batches), run.world)  # an epoch shows every pair
        for number in tqdm(mine, desc="reference", unit="batch", disable=not run.first):
            batch = run.to_device(batches.batch(number))
            logps.update(zip(batch["keys"], map(tuple, sums_now(model, run, batch).view(-1, 2).tolist()), strict=True))
        stored = preferences.Reference(run.union(logps), made_by)
        if run.first:
            stored.write(file)
    return lambda batch: stored.of(batch).to(run.device)


# ---------------------------------------------------------------- preferences: what is minimised


def preference_objective(pairs: Pairs, options: PreferenceOptions, algo: str, nll_weight: float) -> tuple[Tensor, dict]:
    """The loss summed over the pairs, and sums over them of all that is logged."""
    preference, nll = PREFERENCE_LOSSES[algo](pairs, options), anchor(pairs)
    loss = preference + nll_weight * nll
    chosen, rejected = rewards(pairs.per_token() if algo in PER_TOKEN else pairs, options.beta)
    mean = pairs.per_token()
    measured = {
        "loss": loss, "preference_loss": preference, "nll": nll, "reward_chosen": chosen, "reward_rejected": rejected,
        "margin": chosen - rejected, "accuracy": (chosen > rejected).float(), "logp_chosen": mean.chosen,
        "logp_rejected": mean.rejected, "length_chosen": pairs.chosen_tokens, "length_rejected": pairs.rejected_tokens,
    }  # fmt: skip
    return loss.sum(), {name: float(values.detach().sum()) for name, values in measured.items()}


if __name__ == "__main__":
    cli.run(main, Config)
