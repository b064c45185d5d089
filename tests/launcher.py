"""Runs scripts as processes of their own without importing torch for each: one process imports everything and forks.

In:  one JSON request a line: {"start": {...}} or {"wait": pid, "timeout": seconds}.  Out: one JSON answer a line.
A forked child runs the script exactly as `python SCRIPT ARGUMENTS` would, with its own folder, environment and streams.
`die_at_step` makes it kill itself once that step is logged: a crash at a known place; `dies_by` is the signal, SIGKILL or one
that a run may answer. `die_at_write` kills it when a file or a folder reaches the disk for the n-th time, a file before it has
its name; `file_limit` is the size in bytes above which the system writes no file, as on a full disk.
`fresh` makes it import the packages `model` and `dataset` anew, those beside the script: a copy with other files.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback


def warm_up() -> None:
    """Import what the scripts import, and what these import on first use. No thread may start before the forks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import torch
    from pyarrow import parquet  # noqa: F401

    from dataset import dialogue, evaluation, mixture, report  # noqa: F401
    from dataset.formats import native, tokenizer_json  # noqa: F401
    from dataset.world.openmoji import categories, plural
    from model import checkpoint, cli, generate, runtime  # noqa: F401
    from model.registry import ALGORITHMS, CONNECTORS, DIVIDERS, ENCODERS, LLMS, PREFERENCE_LOSSES, TASKS, TEMPLATES

    for registry in (ALGORITHMS, CONNECTORS, DIVIDERS, ENCODERS, LLMS, PREFERENCE_LOSSES, TASKS, TEMPLATES):
        registry.names()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports the compiler, a second or two
    plural(categories("nano")[0].en)
    draw_loss_alone()


def draw_loss_alone() -> None:
    """Plots of all metrics, and figures, would take longer than the three steps of most runs."""
    from dataset.figures import draw as figures
    from model import runtime

    figures.figures_section = lambda folder, name, inspect: []
    draw = runtime.draw_curves

    def draw_loss(history, file):
        draw([{name: row[name] for name in ("step", "loss") if name in row} for row in history], file)

    runtime.draw_curves = draw_loss


def die_at(step: int, by: int) -> None:
    from model.runtime import Run

    log, signals = Run.log, [by]

    def log_then_die(run, at, **metrics):
        log(run, at, **metrics)
        if at >= step and signals:
            os.kill(os.getpid(), signals.pop())

    Run.log = log_then_die


def die_at_write(count: int) -> None:
    fsync, flushed = os.fsync, []

    def flush_then_die(opened):
        fsync(opened)
        flushed.append(opened)
        if len(flushed) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = flush_then_die


def child(request: dict) -> int:
    """The life of a forked child, up to its exit status."""
    for number, (name, mode) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))):
        os.dup2(os.open(request[name], mode | (os.O_CREAT if number else 0)), number)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    if request["fresh"]:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("model", "dataset")]:
            del sys.modules[name]
    if request["die_at_step"] is not None:
        die_at(request["die_at_step"], request["dies_by"])
    if request["die_at_write"] is not None:
        die_at_write(request["die_at_write"])
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(request: dict) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child(request)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return pid


def wait(pid: int, timeout: float) -> int | None:
    """The exit status (negative: the signal that ended it); None, and it is killed, after the timeout."""
    end = time.time() + timeout
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request["start"]) if "start" in request else wait(request["wait"], request["timeout"])
        print(json.dumps(answer), file=answers, flush=True)
