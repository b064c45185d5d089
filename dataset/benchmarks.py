"""`--bench all`: every benchmark whose files are present, and a line for each that lacks some.

In:  the flag --bench.  Out: its tasks by name.

    python 4-eval_chat.py --bench all                                                  the folder `benchmarks`
    python 4-eval_chat.py --bench all:path=/data/eval,judge=http://localhost:8000/v1,model=NAME
    python 4-eval_chat.py --bench all,textvqa:ocr=true                                 one of them with options of its own

Each benchmark has a folder of its name there (dataset/README.md lists the files); the embedded tasks need none.
"""

from __future__ import annotations

from dataset.evaluation import make_tasks
from dataset.formats.official import BENCHMARKS
from dataset.tasks import Task
from model.registry import TASKS, UserError, option_and_value, specs, split_options

ALL = {  # task -> where its files are, under the folder of all
    "vqav2": {"path": "vqav2"},
    "gqa": {"path": "gqa"},
    "textvqa": {"path": "textvqa"},
    "scienceqa": {"path": "scienceqa"},
    "pope": {"path": "pope"},
    "mme": {"path": "mme"},
    "mmvet": {"path": "mmvet"},
    "mmmu": {"path": "mmmu"},
    "object_halbench": {"path": "object_halbench/obj_halbench_300_with_image.jsonl", "annotations": "object_halbench/annotations",
                        "images": "object_halbench/images"},
    "mmhal": {"path": "mmhal/response_template.json", "images": "mmhal/images"},
    "refomb": {"path": "refomb/gpt4v_RefoMB_dev_0521.jsonl", "images": "refomb/images"},
    "amber": {"path": "amber/data", "images": "amber/image"},
    "easy_vqa": {}, "world": {}, "world_words": {}, "reflection": {},
}  # fmt: skip
JUDGED = ("judge", "model", "key")


def benchmarks(bench: str, examples: int = 0) -> dict[str, Task]:
    """The tasks of --bench, by name; `all` stands for those of `ALL` whose files are present, unless named beside it.

    examples   pictures' worth of questions that will be asked; 0: all. Each of their pictures is looked for, none is opened
    """
    given = specs(bench)
    options = [spec.partition(":")[2] for spec in given if spec.partition(":")[0] == "all"]
    if not options:
        return make_tasks(bench)
    named = make_tasks(",".join(spec for spec in given if spec.partition(":")[0] != "all"))
    present = {}
    for name, spec in expanded(options[0]).items():
        if name not in named:
            try:
                task = TASKS.make(spec)
                if ALL[name]:  # what needs no file lacks none
                    task.examples("test", examples or task.size)
                present[name] = task
            except FileNotFoundError as missing:
                print(f"left out {name}: {missing}")
    return {**present, **named}


def expanded(options: str) -> dict[str, str]:
    """Task -> its spec, for the options of `all`: path, and those of a judge. UserError for any other."""
    known: dict[str, str] = {}
    for option in split_options(options):
        key, value = option_and_value(option)
        if key not in (None, "path", *JUDGED):
            raise UserError(f"--bench all has no option {option!r}. Options: path, {', '.join(JUDGED)}")
        known[key or "path"] = value
    root = known.pop("path", str(BENCHMARKS))
    result = {}
    for name, files in ALL.items():
        judge = known if "judge" in TASKS.parameters(name) else {}
        own = [f"{key}={root}/{file}" for key, file in files.items()] + [f"{key}={value}" for key, value in judge.items()]
        result[name] = f"{name}:{','.join(own)}" if own else name
    return result
