"""Stage 3, reinforcement learning: from answers that sound right to answers that are. Two loops, chosen by --algo.

`grpo`, by rules: the model answers a problem eight times with its reasoning, a rule rewards each answer, and what made the right
ones differ from the wrong ones becomes likelier (MM-EUREKA, arXiv 2503.07365; LMM-R1, arXiv 2503.07536).
`dpo`, by preferences: the model describes pictures, each claim is checked, and one loss raises a better answer over a worse one,
measured against the model before training (arXiv 2305.18290). Beside it the SFT term keeps the better answer likely in itself:
without it the surest way never to be wrong is to say nothing.

In:  out/sft, and problems (default: arithmetic), or preferences (default: the model's own answers about the embedded world).
Out: out/grpo or out/dpo, as in stage 1.

    python 3-rl_vlm.py                                              rules: sums of drawn digits and dice
    python 3-rl_vlm.py --algo gspo:clip_high=4e-4                   another algorithm, or other options of one
    python 3-rl_vlm.py --data my_rows.jsonl --reward my_file.py:my_function
    python 3-rl_vlm.py --data arithmetic:text=true --out out/fre    LMM-R1: first reasoning, in words alone,
    python 3-rl_vlm.py --init out/fre                               and from there on pictures
    python 3-rl_vlm.py --algo dpo                                   preferences: a good minute on a CPU core
    python 3-rl_vlm.py --algo sft_chosen --out out/control          the control: fine-tuning on the better answers alone
    python 3-rl_vlm.py --algo dpo --iterations 3                    generate, learn, choose, and again from there
    python 3-rl_vlm.py --algo dpo --pairs_only --labeler judge --judge http://localhost:8000/v1,model=NAME
    python 3-rl_vlm.py --algo dpo --data RLAIF-V-Dataset rlhf-v.parquet:2 --train.llm lora:64 --lr 1e-5
    python 3-rl_vlm.py --algo dpo --pairs policy --data arithmetic  preferences by rules: the best and the worst of each group
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model import cli
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, UserError


@dataclass
class RolloutFlags:
    problems: cli.Count = cli.data_flag(4096)  # of each task or file; when all have been asked, they are asked again
    pass_rates: tuple[cli.Share, cli.Share] = cli.data_flag((0.0, 1.0))  # files: leave out rows whose own pass_rate lies outside
    prompts: cli.Count = cli.data_flag(32)  # prompts whose groups of answers an update learns from
    group_size: cli.Count = cli.data_flag(8)  # answers to each prompt, sampled alike
    resample_rounds: cli.CountOrZero = cli.data_flag(3)  # times to resample prompts whose group has no reward variance
    reward: str = cli.data_flag("rule")  # rule: a right answer in the right form, + 0.1 for the form | my_file.py:function
    max_new_tokens: cli.Count = cli.data_flag(128)  # of an answer
    temperature: cli.Positive = cli.data_flag(1.0)  # of sampling


@dataclass
class GRPO(RolloutFlags):
    algo: str = "grpo"  # grpo | rloo | reinforce++ | reinforce++_baseline | ppo | cispo | gspo | cpgd: gspo:clip_high=4e-4
    data: tuple[str, ...] = cli.data_flag(("arithmetic",))  # tasks, or files with answers, by weight
    keep_zero_variance: bool = cli.data_flag(False)  # learn from groups without reward variance, too, and resample none
    num_iterations: cli.Count = cli.data_flag(1)  # steps on the answers of an update; from the second on of an older policy
    entropy_floor: cli.PositiveOrZero = 0.005  # nats a token; where it stays below, nothing new is tried, and the run ends
    batch_size: cli.Count = 64  # answers a rank and micro-step
    init: Path = Path("out/sft")  # the checkpoint to start from
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: cli.Train = field(default_factory=lambda: cli.Train(connector="freeze"))
    optim: cli.SharedOptimizerFlags = cli.optim("muon", lr=1e-3, warmup=5, weight_decay=0.0, max_steps=20)
    run: cli.SharedFlags = cli.shared("out/grpo", "arithmetic", eval_every=10, eval_examples=300, save_every=20, log_every=1)


@dataclass
class DPO:
    algo: str = "dpo"  # dpo | ipo | hinge | robust | simpo | apo_zero | bco | mpo | sft_chosen (the control): dpo:beta=0.1
    data: tuple[str, ...] = cli.data_flag(())  # files of preferences, by weight; none: pairs of the model's own answers
    pairs: str = cli.data_flag("stored")  # policy: best and worst of answers sampled in every step; see --pairs policy --help
    scenes: cli.Count = cli.data_flag(400)  # without --data: scenes to describe in each iteration, or rows of --questions
    questions: Path | None = cli.data_flag(None)  # without --data: rows of one's own, a picture and a question each
    group_size: cli.Count = cli.data_flag(8)  # without --data: answers to each question, sampled alike
    max_new_tokens: cli.Count = cli.data_flag(128)  # without --data: of an answer
    temperature: cli.Positive = cli.data_flag(1.0)  # without --data: of sampling
    divider: str = cli.data_flag("claims")  # without --data: claims: each thing and its place | claims:places=false | whole
    labeler: str = cli.data_flag("truth")  # without --data: truth: the scene | self: the model | judge: --judge | a checkpoint
    judge: str = cli.data_flag("")  # URL,model=NAME[,key=VARIABLE]: an OpenAI-compatible endpoint; it divides what no rule can
    pairs_only: bool = False  # make the pairs, say where they are, and stop
    iterations: cli.Count = 1  # rounds of generate, learn, choose; each starts from, and compares with, the one chosen before
    sft_weight: cli.PositiveOrZero = 2.0  # of the SFT term, the chosen answer's negative log-likelihood; 0 invites silence
    reference: Path | None = None  # file of the reference's log-probabilities, computed where it is missing; default: in --out
    epochs: cli.Positive = 2.0  # passes over the pairs
    batch_size: cli.Count = cli.data_flag(8)  # pairs a rank and micro-step
    accumulate: cli.Count = cli.data_flag(1)  # micro-steps a step
    max_length: cli.Count = cli.data_flag(1024)  # tokens of prompt and answer; longer answers are cut, both at the same token
    init: Path = Path("out/sft")  # the checkpoint to start from
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: cli.Train = field(default_factory=lambda: cli.Train(connector="freeze"))
    optim: cli.SharedOptimizerFlags = cli.optim("adamw", lr=2e-5, warmup=10, weight_decay=0.0)
    run: cli.SharedFlags = cli.shared("out/dpo", "hallucination", eval_every=100, eval_examples=1000, save_every=200, log_every=5)


@dataclass
class OnlineDPO(RolloutFlags):
    algo: str = "dpo"  # as without --pairs policy
    data: tuple[str, ...] = cli.data_flag(("arithmetic",))  # tasks, or files with answers, by weight
    pairs: str = cli.data_flag("policy")  # the best and the worst of each group, judged by the rule, sampled in every step
    sft_weight: cli.PositiveOrZero = 1.0  # of the SFT term, the chosen answer's negative log-likelihood; 0 invites silence
    batch_size: cli.Count = cli.data_flag(8)  # pairs a rank and micro-step
    init: Path = Path("out/sft")  # the checkpoint to start from
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: cli.Train = field(default_factory=lambda: cli.Train(connector="freeze"))
    optim: cli.SharedOptimizerFlags = cli.optim("adamw", lr=2e-5, warmup=5, weight_decay=0.0, max_steps=40)
    run: cli.SharedFlags = cli.shared("out/dpo", "arithmetic", eval_every=10, eval_examples=300, save_every=20, log_every=1)


def family() -> type[GRPO | DPO | OnlineDPO]:
    """The flags of the algorithms that --algo is one of."""
    name = cli.given_value("algo", "grpo").partition(":")[0]
    if name in ALGORITHMS.declared():
        return GRPO
    if name in PREFERENCE_LOSSES.declared():
        return OnlineDPO if cli.given_value("pairs", "stored") == "policy" else DPO
    raise cli.refusal(cli.unknown_algorithm(name))


if __name__ == "__main__":  # before the imports below, which take seconds: --help and mistakes are answered at once
    config = cli.parse(family())

from dataset.early_stop import early_stop_reason
from dataset.evaluation import Answerer, make_tasks, validate
from dataset.feedback.labels import Labeler, YesNo, by_model
from dataset.feedback.own_pairs import OwnModel, check_flags, own_pairs
from dataset.feedback.pair_streams import SampledPairs, StoredPairs
from dataset.figures.finish import finish_figures
from dataset.mixture import training_batches
from dataset.own_rows import chosen_by, measuring, shown
from dataset.preferences import preference_mixture
from dataset.processor import Processor
from dataset.report import HeldOutAnswers, add_scores
from dataset.rollouts import add_to_tokens
from dataset.sampler import make_sampler
from dataset.tokenizer import Tokenizer, load_tokenizer
from model import checkpoint
from model.best import BestCheckpoint
from model.dpo import iterations, reference
from model.dpo.held_out import held_out_pairs
from model.dpo.losses import Pairs
from model.generate import generate, next_logits
from model.inspection import Inspector
from model.losses import sum_by_document, token_entropy
from model.optimizer import clip_gradients, lr_multiplier
from model.reference import policy_fingerprint, reference_model
from model.rl import critic, kl
from model.rl.clipping import DynamicClipping
from model.runtime import Run, StepMetrics, prepare
from model.vlm import VLM


def starting_policy(config: GRPO | DPO | OnlineDPO, run: Run) -> tuple[VLM, Tokenizer, str]:
    """The model of --init, its tokenizer, and what tells this model from any other."""
    model = checkpoint.load(config.init, run.device, template=config.template).train()
    tokenizer = load_tokenizer(checkpoint.tokenizer_file(config.init))
    return model, tokenizer, policy_fingerprint(model, tokenizer.file.read_bytes(), str(run.fit_dtype(model)))


def grpo(config: GRPO) -> None:
    """Sample answers, reward them, compare each with its group, and make what was better likelier: GRPO and its family."""
    algo, tasks = ALGORITHMS.make(config.algo), make_tasks(config.run.bench, config.data)
    run = Run(config.run, "grpo", config)
    if config.num_iterations < 1 or config.run.save_every % config.num_iterations:
        raise UserError(f"--num_iterations is at least 1, and --save_every a multiple of it, because a run is saved between "
                        f"updates: not {config.num_iterations} and {config.run.save_every}")
    keep_all = config.keep_zero_variance or not algo.needs_groups  # groups without reward variance, too
    if keep_all and config.resample_rounds != RolloutFlags.resample_rounds:
        raise UserError("--resample_rounds has no use where every group is kept: leave it out")
    model, tokenizer, fingerprint = starting_policy(config, run)
    actor_critic = critic.apply(model) if algo.has_critic else None
    policy, optimizer = prepare(model, run, config.train, config.optim, module=actor_critic)
    processor = Processor.of(model, tokenizer, run, run.feature_cache(model))
    sample = run.generator(generate, model, max_new_tokens=config.max_new_tokens, **processor.sampling)
    updates = -(-config.optim.max_steps // config.num_iterations)
    resample_rounds = None if keep_all or config.run.dry_run else config.resample_rounds  # a trial takes what comes
    sampler, own = make_sampler(config, run, processor, sample, updates, resample_rounds)
    if config.run.check_data:
        return
    run.print0("a loss of about 0 is normal: on policy it is minus the mean advantage; only its gradient means something")
    score_sampled = partial(run.score, temperature=config.temperature, banned=processor.banned)  # the distribution sampled from
    penalty = kl.KLPenalty(algo.kl, algo.kl_estimate, reference_model(model), score_sampled, run) if algo.kl else None

    steps = config.optim.max_steps
    first_step, sampler.position = run.resume(model, optimizer)
    run.require_same_start(fingerprint)
    clipping = DynamicClipping(config.optim.clip, run.state.get("average", 0.0), run.state.get("skipped", 0))
    answer = Answerer(processor.on_one_rank(), partial(sample, temperature=0.0))
    tasks.update(own)  # held-out questions of --data, by the reward that is trained
    best = BestCheckpoint(run, chosen_by(config.data, own))
    held_out = HeldOutAnswers(run, tasks, answer, first_step)
    for step in run.steps(first_step, steps):
        stop = early_stop_reason(run.history, config.entropy_floor)
        last = step == steps or stop is not None
        if last or run.save_due(step, multiple_of=config.num_iterations):
            run.save(model, optimizer, tokenizer.file, step, sampler.position, fingerprint=fingerprint, **clipping.state)
        if last or (tasks and config.run.eval_every and step % config.run.eval_every == 0):  # step 0 too: what there was before
            validation = validate(tasks, answer, config.run.eval_examples, run, step)
            if run.is_main and best.offer(model, tokenizer.file, step, validation):
                held_out.save("after")
        if last:
            break

        if step == first_step or step % config.num_iterations == 0:
            rollout = sampler.next()  # the policy answers Q prompts G times each, and a rule rewards every answer
            rewards = rollout.rewards.to(run.device)  # (Q, G)
            batches = [run.to_device(batch) for batch in rollout.micro_batches(config.batch_size, processor, run.data_ranks)]
            if penalty:
                rewards = penalty.off_rewards(rewards, batches)
            if actor_critic:
                critic.add_advantages(batches, rewards, policy, algo.lam, run)
            else:  # was an answer better than its group? The mean says what was to be expected of the prompt
                advantages = algo.advantages(rewards)  # (Q, G), grpo: rewards - rewards.mean(1, keepdim=True)
                add_to_tokens(batches, advantages=advantages)  # every token of an answer has the answer's
            add_to_tokens(batches, weights=algo.token_weights(rollout.lengths).to(run.device))  # grpo: 1

        sampled_tokens = run.sum(sum(len(batch["answer_ids"]) for batch in batches))
        metrics = StepMetrics(run)
        for batch in run.micro_steps(policy, batches):
            with run.autocast():
                scores = score_sampled(policy, batch)
            log_ratio = scores.logps - batch["rollout_logps"]  # (L,) of the L sampled tokens: 0 at the first step after sampling
            ratio = algo.ratio(log_ratio, scores.owner)  # (L,) grpo: exp(log_ratio)
            losses = algo.loss(ratio, batch["advantages"], scores.logps, log_ratio)  # (L,) grpo: -min(ratio A, clip(ratio) A)
            if penalty:
                losses = losses + penalty.of_tokens(scores.logps, batch, metrics)
            if actor_critic:
                losses = losses + critic.weighted_value_loss(scores, batch, metrics)
            loss = (batch["weights"] * losses).sum()
            (loss * run.world_size / sampled_tokens).backward()  # DDP takes the mean over ranks: undo it
            clipped_low, clipped_high = algo.clipped(ratio, batch["advantages"])
            entropy = run.all_tokens(token_entropy(scores.logits), batch)
            metrics.add(loss=loss, ratio=ratio, entropy=entropy, clipped_low=clipped_low,
                        clipped_high=clipped_high)
            metrics.peak(ratio_max=ratio, logp_gap=log_ratio.abs())

        rates = optimizer.scale_lr(lr_multiplier(step, warmup=config.optim.warmup, total=steps))
        clipped, measured = clipping(model), metrics.reduce(sampled_tokens)
        if run.is_finite(step, batches, measured["loss"], clipped.norm) and not clipped.skip:
            optimizer.step()  # skipped: no group had any variance, or the gradient is absurd
        optimizer.zero_grad()
        run.log_step(step, batches, **rollout.stats, **measured, **rates, **clipped.facts())

    if config.run.dry_run:
        return
    if stop and step < steps:
        run.print0(f"stopped at step {step} of {steps}: {stop}")
    finish(run, best, held_out, "Reinforcement learning", validation)
    run.finish(f"wrote {run.out}", f"{measuring(run, config.data, '--bench arithmetic,world')}, or "
                                   f"python web_demo.py --model {run.out}")


def dpo(config: DPO | OnlineDPO, run: Run) -> bool:
    """Raise each chosen answer over the rejected one, measured against the reference: DPO and its family. False: only looked."""
    files = [*config.data, *([] if isinstance(config, OnlineDPO) or not config.questions else [str(config.questions)])]
    algo, tasks = PREFERENCE_LOSSES.make(config.algo), make_tasks(config.run.bench, files)
    if config.algo.startswith("sft_chosen") and config.sft_weight == 0:
        raise UserError("sft_chosen learns by the SFT term alone: --sft_weight must be above 0")
    if isinstance(config, DPO):
        check_flags(config)
    model, tokenizer, fingerprint = starting_policy(config, run)
    policy, optimizer = prepare(model, run, config.train, config.optim)
    processor = Processor.of(model, tokenizer, run, run.feature_cache(model))
    sample = run.generator(generate, model, max_new_tokens=config.max_new_tokens, **processor.sampling)
    answer = Answerer(processor.on_one_rank(), partial(sample, temperature=0.0))

    # Where pairs come from: files, the model's own answers, or answers sampled in every step.
    rows, measure = None, "(1 - false) x Cover"  # held-out pairs of files, and what chooses the checkpoint
    if isinstance(config, OnlineDPO):
        steps = config.optim.max_steps
        sampler, own = make_sampler(config, run, processor, sample, steps, config.resample_rounds)
        tasks.update(own)  # held-out questions of --data, by the reward that is trained
        measure = chosen_by(config.data, own)
        pairs: StoredPairs | SampledPairs = SampledPairs(sampler, config.batch_size, processor, run.data_ranks)
    elif config.data or not run.preview_only:
        asked = OwnModel(fingerprint, Answerer(processor, partial(sample, temperature=config.temperature)).sampled,
                         partial(model_labeler, model, processor, run))
        source = preference_mixture(config.data, config.run) if config.data else own_pairs(config, run, asked)
        if config.pairs_only:
            run.print0("Next: the same command without --pairs_only, to learn from them")
            return False
        batches, steps, rows = training_batches(source, processor, config, run, pairs=True)
        measure = "held_out/accuracy" if rows.chooses else measure
        pairs = StoredPairs(batches, config.accumulate, run.data_ranks)
    else:
        run.print0(f"the pairs will come from {config.scenes} {config.questions or 'scenes'} x {config.group_size} answers: "
                   f"--pairs_only makes them, and says how many steps follow")
        return False
    if config.run.check_data:
        return False

    reference_logps: reference.ReferenceLogps = reference.none  # simpo's
    if algo.uses_reference and (isinstance(config, OnlineDPO) or run.preview_only):
        reference_logps = reference.live(reference_model(model), run)  # of the model before --resume brings later weights
    first_step, pairs.position = run.resume(model, optimizer)
    run.require_same_start(fingerprint)
    if algo.uses_reference and isinstance(config, DPO) and not run.preview_only:
        wanted = steps * config.accumulate * run.data_ranks.world_size
        if config.reference and not config.reference.is_file():  # it will hold every pair, not only those of so few steps
            processor.images.prepare(partial(batches.pictures, len(batches)), config.run.feature_cache_gb, run.print0)
        reference_logps = reference.precomputed(batches, wanted, run, model, fingerprint, config.reference)
    algo.shift = run.state.get("shift", 0.0)
    best = BestCheckpoint(run, measure)
    own_pairs_check = held_out_pairs(run, rows, steps, model, fingerprint, algo, best)
    held_out = HeldOutAnswers(run, tasks, answer, first_step, shown(rows))
    for step in run.steps(first_step, steps):
        stop = early_stop_reason(run.history, entropy_floor=0.0)  # of pairs that are sampled: stored ones log no groups
        last = step == steps or stop is not None
        if last or run.save_due(step):
            run.save(model, optimizer, tokenizer.file, step, pairs.position, fingerprint=fingerprint, shift=algo.shift)
        if last or (tasks and config.run.eval_every and step % config.run.eval_every == 0):  # step 0 too: what there was before
            validation = validate(tasks, answer, config.run.eval_examples, run, step)
            if run.is_main and best.offer(model, tokenizer.file, step, validation):
                held_out.save("after")
        if own_pairs_check.check(model, tokenizer.file, step, last) and run.is_main:
            held_out.save("after")
        if last:
            break

        micro_batches = [run.to_device(batch) for batch in pairs.next()]
        number_of_pairs = run.sum(sum(len(batch["keys"]) for batch in micro_batches))
        metrics = StepMetrics(run)
        for batch in run.micro_steps(policy, micro_batches):
            with run.autocast():
                scores = run.score(policy, batch)  # of the learned tokens of both answers
            logps, lengths = sum_by_document(scores.logps, scores.owner, len(batch["ids"]))  # (2N,) chosen, rejected, chosen, ...
            chosen, rejected = logps[0::2], logps[1::2]  # (N,) log pi(answer | prompt)
            reference_chosen, reference_rejected = reference_logps(batch).unflatten(0, (-1, 2)).T  # (N,) the same before training
            both = Pairs(chosen, rejected, reference_chosen, reference_rejected, lengths[0::2], lengths[1::2])
            preference_loss = algo(both)  # (N,) dpo: -log sigmoid(beta ((chosen - reference) - (rejected - reference)))
            sft_loss = -chosen / lengths[0::2]  # (N,) the chosen answer, likely in itself (arXiv 2404.19733; L_g in 2411.10442)
            loss = preference_loss + config.sft_weight * sft_loss
            (loss.sum() * run.world_size / number_of_pairs).backward()
            metrics.add(loss=loss, preference_loss=preference_loss, sft_loss=sft_loss, **algo.log(both))

        rates = optimizer.scale_lr(lr_multiplier(step, warmup=config.optim.warmup, total=steps))
        norm, measured = clip_gradients(model, config.optim.clip), metrics.reduce(number_of_pairs)
        if run.is_finite(step, micro_batches, measured["loss"], norm):  # else the step is left out
            optimizer.step()
            algo.after_step((measured["reward_chosen"] + measured["reward_rejected"]) / 2)
        optimizer.zero_grad()
        run.log_step(step, micro_batches, **pairs.stats, **measured, **rates, gradient_norm=norm)

    if config.run.dry_run:
        return False
    if stop and step < steps:
        run.print0(f"stopped at step {step} of {steps}: {stop}")
    finish(run, best, held_out, "Preference learning", validation)
    return True


def model_labeler(model: VLM, processor: Processor, run: Run, name: str) -> Labeler:
    """Labels by yes or no of the model itself ("self"), or of another checkpoint with its own tokenizer and template."""
    tokenizer = processor.tokenizer
    if name != "self":
        model, tokenizer = checkpoint.load(Path(name), run.device), load_tokenizer(checkpoint.tokenizer_file(Path(name)))
        processor = Processor.of(model, tokenizer, run, run.config.feature_cache)
    yes_no = YesNo(processor.on_one_rank(), run.generator(next_logits, model))
    return by_model(policy_fingerprint(model, tokenizer.file.read_bytes(), str(run.dtype)), yes_no)


def finish(run: Run, best: BestCheckpoint, held_out: HeldOutAnswers, title: str, validation: dict[str, float]) -> None:
    """Keep the best checkpoint, and write scores and report."""
    if run.is_main:
        validation = best.keep() or validation
        add_scores(run.out, validation)
        held_out.write_section(title, validation, compare=title == "Reinforcement learning")
    run.barrier()
    finish_figures(run, Inspector)


def dpo_iterations(config: DPO | OnlineDPO) -> None:
    """One run of DPO, or several (model/dpo/iterations.py)."""
    run = Run(config.run, "dpo", config)
    if iterations.iterate(dpo, config, run):
        run.finish(f"wrote {config.run.out}", f"python 4-eval_chat.py --model {config.run.out} --bench hallucination,world, or "
                                              f"python web_demo.py --model {config.run.out}")


if __name__ == "__main__":
    if isinstance(config, GRPO):
        cli.run(grpo, config)
    else:
        cli.run(dpo_iterations, config)
