"""Stage 2, supervised fine-tuning: from describing pictures to answering what is asked.

The data are conversations: one picture or several, one turn or many, some without a picture, some with their reasoning in
<think>...</think><answer>...</answer>, so that RL can start from it. Only the assistant's words and its end of turn are learned:
a model that also learned the user's would practise asking, and what people ask is not for it to predict.

In:  out/pretrain and conversations (default: world, world_unknown, easy_vqa, arithmetic, text).  Out: out/sft, as in stage 1.

    python 2-sft_vlm.py                                             10 to 15 minutes on two CPU cores
    python 2-sft_vlm.py --data world my_rows.jsonl:2 --image_folder pictures
    python 2-sft_vlm.py --data llava_instruct_230k.parquet --init out/pretrain --lr 4e-5 --batch_size 16
    python 2-sft_vlm.py --train.llm lora:16 --lr 1e-3               adapters alone; out/sft/adapter.safetensors holds them
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model import cli

MIXTURE = ("world:2.2", "world_unknown", "easy_vqa:1.2", "text:2", "arithmetic:read=1600,direct=0.45,plain=400",
           "arithmetic:text=true,rows=1200,lists=1000,plain=200")


@dataclass
class Config:
    data: tuple[str, ...] = cli.data_flag(MIXTURE)  # tasks or files, by weight: world my_rows.jsonl:2
    init: Path = Path("out/pretrain")  # the checkpoint to start from
    adapter: Path | None = None  # adapter.safetensors of an earlier LoRA run from --init, to go on from
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: cli.Train = field(default_factory=cli.Train)
    epochs: cli.Positive = 1.0  # passes over the data
    batch_size: cli.Count = cli.data_flag(40)  # conversations a rank and micro-step
    accumulate: cli.Count = cli.data_flag(1)  # micro-steps a step
    max_length: cli.Count = cli.data_flag(1024)  # tokens of a conversation, at most the model's context; longer ones are cut
    shard: str = "ddp"  # with torchrun: ddp: the whole model on each rank | zero2 | zero3: divided among them
    optim: cli.SharedOptimizerFlags = cli.optim("muon", lr=8e-3, warmup=20)  # small and base on real conversations: --lr 4e-5
    run: cli.SharedFlags = cli.shared("out/sft", "world,easy_vqa,arithmetic", eval_every=0, eval_examples=30, save_every=200,
                                      log_every=20)


if __name__ == "__main__":  # before the imports below, which take seconds: --help and mistakes are answered at once
    config = cli.parse(Config)

from dataset.evaluation import Answerer, make_tasks, validate
from dataset.figures.finish import finish_figures
from dataset.mixture import mixture, training_batches
from dataset.own_rows import measuring, shown
from dataset.processor import Processor
from dataset.report import finish_stage
from dataset.tokenizer import load_tokenizer
from model import checkpoint
from model.best import BestCheckpoint, HeldOutCheck, mean_loss
from model.generate import generate
from model.inspection import Inspector
from model.losses import count_learned, score
from model.optimizer import clip_gradients, lr_multiplier
from model.runtime import Run, prepare


def main(config: Config) -> None:
    tasks, run = make_tasks(config.run.bench, config.data), Run(config.run, "sft", config)
    # The model of stage 1 writes captions and has answered no question yet. By default all of it but the encoder is trained.
    model = checkpoint.load(config.init, run.device, template=config.template).train()
    tokenizer = load_tokenizer(checkpoint.tokenizer_file(config.init))
    policy, optimizer = prepare(model, run, config.train, config.optim, adapter=config.adapter, shard=config.shard)

    # Each conversation becomes one document: tokens, and labels that are -100 wherever somebody other than the assistant speaks.
    processor = Processor.of(model, tokenizer, run, run.feature_cache(model))
    conversations = mixture(config.data, "sft", config.run.image_folder, config.run.allow_urls)
    batches, steps, held_out = training_batches(conversations, processor, config, run)
    if config.run.check_data:
        return
    answer = Answerer.greedy(processor, run.generator, generate, model, max_new_tokens=128)
    first_step, position = run.resume(model, optimizer)
    own = HeldOutCheck(run, held_out, steps, partial(mean_loss, model, run), BestCheckpoint(run, "held_out/loss"))
    stream = batches.stream(position, run.data_ranks)
    for step in run.steps(first_step, steps):
        last = step == steps
        if last or run.save_due(step):
            run.save(model, optimizer, tokenizer.file, step, stream.position)
        if not last and step > 0 and config.run.eval_every and step % config.run.eval_every == 0:
            validate(tasks, answer, config.run.eval_examples, run, step)
        own.check(model, tokenizer.file, step, last)  # rows of files: their loss, which chooses the checkpoint
        if last:
            break

        # Long answers hold more learned tokens than short ones, and each token counts alike: the sum over all, divided by all.
        micro_batches = [run.to_device(next(stream)) for _ in range(config.accumulate)]
        learned_tokens = run.sum(sum(count_learned(batch) for batch in micro_batches))
        losses = []
        for batch in run.micro_steps(policy, micro_batches):
            with run.autocast():
                logps = score(policy, batch).logps  # (L,) of the learned tokens: answers and their ends of turn
            loss = -logps.sum()
            (loss * run.world_size / learned_tokens).backward()
            losses.append(loss.item())

        lr = optimizer.scale_lr(lr_multiplier(step, warmup=config.optim.warmup, total=steps))
        step_loss, norm = run.sum(sum(losses)) / learned_tokens, clip_gradients(model, config.optim.clip)
        if run.is_finite(step, micro_batches, step_loss, norm):  # else the step is left out
            optimizer.step()
        optimizer.zero_grad()

        run.log_step(step, micro_batches, loss=step_loss, **lr, gradient_norm=norm)

    if config.run.dry_run:
        return
    questions = [(task, example) for task in tasks.values() for example in task.examples("val", 2)[:14]]
    answer = Answerer.greedy(processor, run.generator, generate, own.keep(model), max_new_tokens=128)
    scores = validate(tasks, answer, config.run.eval_examples, run, steps)
    finish_stage(run, "Supervised fine-tuning", {**scores, **own.scores}, [*questions, *shown(held_out)], answer)
    finish_figures(run, Inspector)
    run.finish(f"wrote {run.out}", f"{measuring(run, config.data, '')}, python web_demo.py --model {run.out}, "
                                   f"or python 3-rl_vlm.py --init {run.out}")


if __name__ == "__main__":
    cli.run(main, config)
