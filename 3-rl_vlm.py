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

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dataset import preferences, rollouts
from dataset.collate import Batches
from dataset.evaluation import Ask, add_scores, evaluate, several
from dataset.feedback.labels import Labeler, YesNo, by_model
from dataset.feedback.pipeline import divider_and_labeler, items_digest, own_items, world_items
from dataset.feedback.pipeline import preferences as preferences_of
from dataset.formats.conversations import BadRows, load
from dataset.mixture import look, pictures
from dataset.report import before_and_after, marked, section, sheet, table, with_before
from dataset.rewards import judge_from
from dataset.tokenizer import load_tokenizer
from dataset.vision.image_processor import Eyes
from model import checkpoint, cli, recipe, reference
from model.best import Chosen, best_of, copy_checkpoint
from model.by_preferences import ByPreferences, preference_options
from model.by_rules import ByRules, policy_options
from model.generate import generate, prefill, prompt_room
from model.losses import PREFERENCE_LOSSES, PreferenceOptions
from model.optimizer import make_optimizer
from model.registry import TASKS, TEMPLATES, specs
from model.rl import critic
from model.rl.policy import ALGORITHMS, NEEDS_NO_GROUPS, PolicyOptions
from model.runtime import Run, draw_curves, learning_rate
from model.vlm import VLM, count_parameters


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
    scenes: int = 400  # without --data: scenes that the model describes in each iteration, or rows of --questions
    questions: Path | None = None  # without --data: rows of one's own, a picture and a question each, in place of scenes
    labeler: str = "truth"  # without --data: who labels; truth: the scene | self: the model | judge: --judge | a checkpoint
    judge: str = ""  # URL,model=NAME[,key=VARIABLE]: an OpenAI-compatible endpoint; it divides what no rule can
    divider: str = "claims"  # without --data: what is labelled; claims: each thing that an answer says | whole: all at once
    balance: bool = False  # without --data: drop pairs by length, until chosen and rejected answers are about equally long
    pairs_only: bool = False  # make the pairs, say where they are, and stop
    iterations: int = 1  # rounds of generate, learn, choose; each starts from, and compares with, the one chosen before
    nll_weight: float = 1.0  # of the anchor, the chosen answer's negative log-likelihood; 0 invites silence
    smoothing: float = 0.0  # dpo, robust: the share of pairs that are taken to be swapped
    gamma: float = 1.0  # simpo: the margin to reach
    reference: Path | None = None  # the reference's log-probabilities, computed where they are missing; default: in --out
    epochs: float = 2.0  # passes over the pairs
    accumulate: int = 1  # micro-steps a step

    # Both; of two defaults the first is that of rules, the second that of preferences (DEFAULTS)
    answers: int = 8  # answers to each problem or question, sampled alike
    max_new_tokens: int = 128  # of an answer
    temperature: float | None = None  # of this sampling: 1; 0.7
    beta: float | None = None  # rules: weight of the KL to the start, 0; preferences: worth of a nat of log-ratio, 0.1 (simpo 2)
    image_folder: Path | None = None  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    init: Path = Path("out/sft")  # the checkpoint to start from
    out: Path | None = None  # where the checkpoint goes: out/grpo; out/dpo
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: Train = field(default_factory=Train)
    max_steps: int | None = None  # stop after so many steps: 20; 0, after the epochs
    batch_size: int | None = None  # of a process and micro-step: 64 answers; 8 pairs
    max_length: int = 1024  # preferences: tokens of prompt and answer; longer answers lose their end, both at the same token
    optimizer: str | None = None  # muon | adamw: muon; adamw
    lr: float | None = None  # peak learning rate: 1e-3; 2e-5; give ten times that to LoRA, a hundredth to a pretrained model
    lr_encoder: float = 0.0  # peak learning rate of the encoder alone; 0: --lr
    lr_connector: float = 0.0  # of the connector alone
    lr_llm: float = 0.0  # of the language model alone
    warmup: int | None = None  # steps of rising learning rate: 5; 10
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; rules: nor twice what is usual, and no step at ten times that
    seed: int = 0
    bench: str | None = None  # tasks to check on their validation split, which choose the checkpoint: arithmetic; hallucination
    eval_every: int | None = None  # steps between checks, from step 0 on: 10; 100; 0: at the end alone
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
    check_data: bool = False  # print some rows of each --data as the model reads them, what is learned in 【brackets】, and stop


DEFAULTS = {  # of flags that are not given: rules, preferences, preferences by rules
    "data": (("arithmetic",), (), ("arithmetic",)), "temperature": (1.0, 0.7, 1.0), "beta": (0.0, 0.1, 0.1),
    "out": (Path("out/grpo"), Path("out/dpo"), Path("out/dpo")), "max_steps": (20, 0, 40), "batch_size": (64, 8, 8),
    "lr": (1e-3, 2e-5, 2e-5), "optimizer": ("muon", "adamw", "adamw"), "warmup": (5, 10, 5),
    "bench": ("arithmetic", "hallucination", "arithmetic"),
    "eval_every": (10, 100, 10), "eval_examples": (300, 1000, 300), "save_every": (20, 200, 20), "log_every": (1, 5, 1),
}  # fmt: skip
SIMPO_BETA = 2.0  # of means over tokens, which are smaller than sums
ROLLOUT_FLAGS = ("problems", "pass_rates", "prompts", "rounds", "reward", "chunk")
RULE_FLAGS = ("keep_all", "passes", "advantage", "clip_low", "clip_high", "per_sequence", "drift", "lam", "kl", "entropy_floor")
STORED_FLAGS = ("scenes", "questions", "labeler", "judge", "divider", "balance", "pairs_only", "iterations", "reference",
                "epochs", "accumulate", "max_length")
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
    missing = {name: values[family] for name, values in DEFAULTS.items() if getattr(config, name) is None}
    if config.algo == "simpo" and "beta" in missing:
        missing["beta"] = SIMPO_BETA
    return dataclasses.replace(config, **missing)


def options_of(config: Config) -> PolicyOptions | PreferenceOptions:
    """The numbers of what is minimised; ValueError for what does not go together, before anything is loaded."""
    by_rules = config.algo in ALGORITHMS
    for name in ("prompts", "passes", "chunk", "answers", "batch_size", *(["max_steps"] if by_rules or config.pairs else [])):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is at least 1, not {getattr(config, name)}")
    if by_rules:
        options = policy_options(
            config.algo, config.advantage, config.clip_low, config.clip_high, config.per_sequence, drift=config.drift,
            temperature=config.temperature, beta=config.beta, kl=config.kl, lam=config.lam)
        if config.rounds != Config().rounds and (config.keep_all or options.advantage in NEEDS_NO_GROUPS):
            raise ValueError("--rounds asks other problems in the place of some; none is replaced here: leave it out")
        if config.save_every % config.passes:
            raise ValueError(f"a run is saved between updates: --save_every is a multiple of --passes, {config.passes}")
        return options
    options = preference_options(config.algo, config.beta, config.smoothing, config.gamma, config.nll_weight)
    if config.pairs_only and (config.data or config.iterations > 1):
        raise ValueError("--pairs_only makes the pairs of one iteration: leave out --data and --iterations")
    if config.data and (config.questions, config.labeler, config.judge, config.divider, config.balance) != (
            None, "truth", "", "claims", False):
        raise ValueError("--data has its labels: leave out --questions, --labeler, --judge, --divider and --balance")
    if config.questions and config.labeler == "truth":
        raise ValueError("--labeler truth knows the embedded world alone: with --questions, take self, judge or a checkpoint")
    divider_and_labeler(config.divider, config.labeler, config.judge)  # what does not go together fails here, too
    return options


def main(config: Config) -> None:
    """Iterations of one thing: `learn`. With several, each has its own folder in --out, which gets the best of them."""
    config = filled(config)
    options = options_of(config)
    tasks = {name: TASKS.make(name) for name in specs(config.bench)}  # a wrong name fails here, not after training
    run = Run(config, config.algo)
    folders = [config.out] if config.iterations == 1 else [config.out / f"iteration-{n + 1}" for n in range(config.iterations)]
    old = [] if config.resume else sorted(config.out.glob("iteration-*"))
    require_kept(config, old)

    def begin() -> None:
        """An earlier run's iterations are not this one's. Not before everything is there to begin with."""
        for folder in old:
            if folder != folders[0]:
                shutil.rmtree(folder)
        (folders[0] / "chosen.json").unlink(missing_ok=True)  # of an iteration that has ended
        (config.out / "scores.json").unlink(missing_ok=True)

    start, stored = config.init, config.reference
    for number, folder in enumerate(folders):
        run.out, run.history, run.state = folder, [], {}
        finished = config.resume and config.iterations > 1 and (folder / "chosen.json").is_file()
        if not finished:
            resume = config.resume and (number == 0 or (folder / "resume").is_dir())
            run.config = dataclasses.replace(config, init=start, reference=stored, out=folder, resume=resume,
                                             seed=config.seed + number)
            if not learn(run.config, run, tasks, options, begin if number == 0 and not config.resume else None):
                return
        start, stored = folder, None  # the next one begins with, and is compared with, what this one chose
    if run.first and len(folders) > 1:
        best = best_of(folders)
        run.say(f"{best.name} of {len(folders)} is kept")
        copy_checkpoint(best, config.out)
        add_scores(config.out, json.loads((best / "scores.json").read_text()))
    bench = "arithmetic,world" if config.algo in ALGORITHMS else "hallucination,world"
    run.finish(f"wrote {config.out}", f"python 4-eval_chat.py --model {config.out} --bench {bench}, or "
                                      f"python web_demo.py --model {config.out}")


def require_kept(config: Config, folders: list[Path]) -> None:
    """ValueError where a run would remove what it begins from."""
    for given in map(Path, filter(None, (config.init, config.reference, config.labeler))):
        if any(folder.resolve() in (given.resolve(), *given.resolve().parents) for folder in folders):
            raise ValueError(f"{given} is of an earlier run into {config.out}, which this one would replace: name another --out")


def learn(config: Config, run: Run, tasks: dict, options: PolicyOptions | PreferenceOptions,
          begin: Callable[[], None] | None) -> bool:
    """One run, from config.init to config.out; False where it was only looked at. `begin` is called before anything is replaced.

    Two things make an algorithm, and the loop does not ask which it is:
    stream      where a batch comes from. Its next: (position to go on from, this rank's micro-batches of a step, what their sums
                are divided by, facts for the log)
    objective   what is minimised. minimised(batch) -> (loss, sums for the log, largest values for the log), the loss summed as
                well; clip(model): its gradients; after(metrics) of a step; state: what it remembers, saved for --resume
    """
    torch.manual_seed(config.seed)  # each iteration is the same whether it is the first of its process or not
    model = checkpoint.load(config.init).train().to(run.device)
    if config.template:
        model.config = dataclasses.replace(model.config, template=config.template)
    tokenizer, template = load_tokenizer(checkpoint.tokenizer_file(config.init)), TEMPLATES.make(model.config.template)
    made_by = reference.made_by(model, tokenizer, run)
    moving = recipe.apply(model, {name: getattr(config.train, name) for name in model.parts}, config.checkpointing)
    trained = critic.apply(model) if config.algo == "ppo" else model
    optimizer = make_optimizer(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
                               own_lr={"encoder": config.lr_encoder, "connector": config.lr_connector, "llm": config.lr_llm})
    run.say(", ".join(f"{name} {count_parameters(part):,} ({moving[name]:,} trained)" for name, part in model.parts.items()))

    see = partial(Eyes, model.encoder, model.config.fit, model.config.tiles, run.device,
                  None if moving["encoder"] else config.feature_cache)
    eyes = see(rank=run.rank, world=run.world, wait=run.wait)
    banned = (tokenizer.image, tokenizer.pad, tokenizer.bos)
    sample = run.generator(generate, model, max_new_tokens=config.max_new_tokens, stop_ids={tokenizer.id(template.stop)},
                           banned=banned)
    ask = Ask(template, tokenizer, model.image_tokens, see(), partial(sample, temperature=0.0))

    by_rules = config.algo in ALGORITHMS
    sampled = by_rules or config.pairs == "policy"  # answers in every step; else pairs that are there beforehand
    if sampled:
        keep_all = config.keep_all or by_rules and options.advantage in NEEDS_NO_GROUPS
        source, steps = problems_to_ask(config, run, ask, eyes, sample, keep_all, prompt_room(model, config.max_new_tokens))
    else:
        source, steps = pairs_to_learn(config, run, model, made_by, ask, eyes, sample)
    if not steps:
        return False
    start = reference.at_start(model) if sampled and config.beta else None

    trained = run.wrap(trained, config.compile)
    if run.first and begin:
        begin()
    first_step, position = run.resume(model, optimizer)
    reference.require_same_start(run, made_by)
    if by_rules:
        objective = ByRules(run, trained, start, options, banned, config.clip)
        stream = source.batches(position, config.batch_size, config.passes, objective.weighed)
    elif sampled:
        objective = ByPreferences(run, trained, reference.live(start, run), config.algo, options, config.nll_weight, config.clip)
        stream = source.pairs(position, config.batch_size, objective.compared)
    else:
        known = reference.of_pairs(source, steps * config.accumulate * run.world, config.algo, run, model, made_by,
                                   config.reference, config.resume)
        objective = ByPreferences(run, trained, known, config.algo, options, config.nll_weight, config.clip)
        stream = preferences.stream(source, position, config.accumulate, objective.compared)

    chosen = Chosen(run, "accuracy" if sampled else "(1 - CHAIR_s) x Cover")
    shown = [(task, example) for task in tasks.values() for example in task.examples("val", 8)[:14]]
    before, after = run.out / "before.json", run.out / "after.json"  # what is said to these: at first, and by the best so far
    if run.first and first_step == 0:
        before.write_text(json.dumps(ask([example.prompt for _, example in shown])))
        after.unlink(missing_ok=True)
    run.progress(first_step, steps)
    for step in range(first_step, steps + 1):
        advice = rollouts.advice(run.history, config.entropy_floor)
        last = step == steps or bool(advice)

        if last or (step > first_step and step % config.save_every == 0):
            run.save(model, optimizer, tokenizer.file, step, position, made_by=made_by, **objective.state)
        if last or (tasks and config.eval_every and step % config.eval_every == 0):  # step 0 too: what there was before
            scores = {}
            if run.first:
                for name, task in tasks.items():
                    scores.update(evaluate(name, task, "val", ask, config.eval_examples)[0])
                if chosen.offer(model, tokenizer, step, scores):
                    after.write_text(json.dumps(ask([example.prompt for _, example in shown])))
            run.log(step, **scores)
            run.wait()
        if last:
            break

        position, micro_batches, weight, facts = next(stream)
        weight = run.sum(weight)  # learned tokens, or pairs

        sums, peaks = Counter(), {}
        for batch in micro_batches:
            loss, measured, largest = objective.minimised(batch)
            (loss * run.world / weight).backward()  # DDP takes the mean over ranks: undo it
            sums.update(measured)
            peaks = {name: max(value, peaks.get(name, value)) for name, value in largest.items()}

        rates = optimizer.set_lr(partial(learning_rate, step, warmup=config.warmup, total=steps))
        clipped = objective.clip(model)
        if not clipped.skip:
            optimizer.step()
        optimizer.zero_grad()

        metrics = {name: run.sum(value) / weight for name, value in sums.items()}
        objective.after(metrics)
        run.bar.update()
        run.count(sum(batch["input_ids"].numel() for batch in micro_batches))
        if step % config.log_every == 0:
            run.log(step, **facts, **metrics, **{name: run.max(value) for name, value in peaks.items()}, **rates,
                    **clipped.facts(), tokens_per_second=run.tokens_per_second())

    if advice and step < steps:
        run.say(f"stopped at step {step} of {steps}: {advice}")
    if run.first:
        draw_curves(run.history, run.out / "curves.png")
        scores = chosen.keep() or scores
        add_scores(run.out, scores)
        said = json.loads(after.read_text()) if after.is_file() else ask([example.prompt for _, example in shown])
        report(config, run, shown, said, scores)
    run.bar.close()
    run.wait()
    return True


def report(config: Config, run: Run, shown: list[tuple], said: list[str], scores: dict[str, float]) -> None:
    """The run's section of report.md: scores, curves, and what is said to held-out questions (task, example) before and after."""
    page = config.out.parent / "report.md"
    if config.algo in ALGORITHMS:
        title, scores = "Reinforcement learning", with_before(scores, run.history)
        answers = before_and_after(run.out, page, shown, json.loads((run.out / "before.json").read_text()), said)
    else:
        title, answers = "Preference learning", sheet(run.out, page, [example for _, example in shown], said)
    section(page, f"{title}: {run.out.name}", f"{table({**scores, 'seconds': round(run.seconds)})}\n\n"
            f"![]({run.out.name}/curves.png)\n\n{answers}")


# ---------------------------------------------------------------- where a batch comes from: problems, or pairs


def problems_to_ask(config: Config, run: Run, ask: Ask, eyes: Eyes, sample: Callable, keep_all: bool,
                    room: int) -> tuple[rollouts.Rollouts | None, int]:
    """The stream of problems that the policy answers, and the steps to learn from them; 0 where they were only looked at.

    room   tokens that a problem may have; a row of a file that has more is a bad row
    """
    looking, bad_rows = config.dry_run or config.check_data, run.out / "bad_problems.jsonl"
    if run.first and not looking:
        bad_rows.unlink(missing_ok=True)  # they are all found now, also by a run that goes on
    asked = rollouts.problems(
        config.data, config.problems, judge_from(config.reward), image_folder=config.image_folder, allow_urls=config.allow_urls,
        bad_rows=None if looking else bad_rows, max_bad=config.max_bad, pass_rates=config.pass_rates, report=run.first,
        check=lambda prompt: ask.require_room(prompt, room))
    run.say(f"{len(asked):,} problems, {config.max_steps} steps of {config.prompts} x {config.answers} answers "
            f"on {run.world} x {run.device}")
    if config.check_data:
        for problem in asked[:: -(-len(asked) // 6)]:  # from all parts of --data
            prompt = rollouts.render_prompt(problem.prompt, ask.template, ask.tokenizer, ask.image_tokens, views=eyes.views)
            run.say(f"{prompt.id}\n{marked(prompt, ask.tokenizer)}\nright: {problem.example.answer}\n")
    source = rollouts.Rollouts(
        asked, partial(sample, temperature=config.temperature, answers=config.answers), ask.template, ask.tokenizer,
        ask.image_tokens, eyes, run.device, prompts=config.prompts, answers=config.answers, chunk=config.chunk, seed=config.seed,
        rounds=config.rounds, keep_all=keep_all, rank=run.rank, world=run.world, union=run.union)
    if looking:
        return None, 0
    eyes.prepare(source.pictures(-(-config.max_steps // config.passes)), config.feature_cache_gb, run.say)
    if config.algo in ALGORITHMS:
        run.say("a loss of about 0 is normal: on policy it is minus the mean advantage; only its gradient means something")
    return source, config.max_steps


def pairs_to_learn(config: Config, run: Run, model: VLM, made_by: str, ask: Ask, eyes: Eyes,
                   sample: Callable) -> tuple[Batches | None, int]:
    """Micro-batches of pairs, from files or the model's own answers, and the steps; 0 where they were only looked at, or made."""
    if not config.data and (config.dry_run or config.check_data):
        asked = f"rows of {config.questions}" if config.questions else "scenes"
        run.say(f"the pairs will come from {config.scenes} {asked} x {config.answers} answers of {config.init}")
        return None, 0
    source = (preferences.mixture(config.data, config.image_folder, config.allow_urls) if config.data else
              own_pairs(config, run, model, made_by, ask, sample))
    if config.pairs_only:
        run.say(f"{len(source):,} pairs in {source.path}. Next: the same command without --pairs_only, to learn from them")
        return None, 0
    render = partial(preferences.render, template=ask.template, tokenizer=ask.tokenizer, image_tokens=ask.image_tokens,
                     max_length=min(config.max_length, model.config.llm.max_position_embeddings), views=eyes.views)
    batches = Batches(
        source, render, eyes, batch_size=config.batch_size, window=1, seed=config.seed,
        bad_rows=BadRows(run.out / "bad_rows.jsonl", len(source), config.max_bad), rank=run.rank, world=run.world,
        join=preferences.join)
    per_step = config.accumulate * run.world  # micro-batches a step
    steps = config.max_steps or max(1, round(config.epochs * len(batches) / per_step))
    run.say(f"{len(source):,} pairs, {steps} steps of {config.batch_size * per_step} on {run.world} x {run.device}")
    if config.check_data:
        def both(row) -> str:
            pair = render(row)
            return (f"{pair.id}\nchosen: {marked(pair.chosen, ask.tokenizer)}\n"
                    f"rejected: {marked(pair.rejected, ask.tokenizer)}")

        look(source, both, run.say)
    if config.dry_run or config.check_data:
        return None, 0
    eyes.prepare(partial(pictures, batches, steps * per_step), config.feature_cache_gb, run.say)
    return batches, steps


def own_pairs(config: Config, run: Run, model: VLM, made_by: str, ask: Ask, sample: Callable) -> preferences.PreferenceFile:
    """Pairs of the model's own answers, made by dataset/feedback/pipeline.py; what was made is not made again."""

    def answers_to(prompts, answers: int, temperature: float) -> list[list[str]]:
        return several(dataclasses.replace(ask, generate=partial(sample, temperature=temperature)), prompts, answers)

    divider, labeler = divider_and_labeler(config.divider, config.labeler, config.judge)
    labeler = labeler or model_labeler(config, run, model, ask)
    options = dict(answers=config.answers, temperature=config.temperature, seed=config.seed, balance=config.balance)
    if config.questions:
        rows = load(config.questions, config.image_folder, config.allow_urls, need_answer=False)
        listed = run.out / "bad_questions.jsonl"
        if run.first:
            listed.unlink(missing_ok=True)  # they are all found now, also by a run that goes on
        items = own_items(rows, config.scenes, config.seed, BadRows(listed, len(rows), config.max_bad), run.first)
    else:
        items = world_items(config.scenes, config.seed)
    known = reference.fingerprint(made_by, labeler.name, divider.name, items_digest(items), repr(options))
    folder = run.out / "feedback" / known[:12]
    if run.first:
        preferences_of(items, answers_to, folder, divider, labeler, model=made_by, say=run.say, **options)
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
    return by_model(reference.made_by(model, ask.tokenizer, run), yes_no)


if __name__ == "__main__":
    cli.run(main, Config)
