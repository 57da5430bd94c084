"""Everything that can only be checked on a GPU, in slices: python benchmarks/gpu.py --minutes 10

Environment report; for each script and size eager, compiled, float32 and bfloat16 against each other (losses of one
batch, speed, memory); then short learning runs with compiled bfloat16 updates (suite "gpu"), which must reach their
targets. All results go into one folder: gpu.md to read, gpu.json with every number, learning/ with the runs.

When the minutes are over it stops between two steps, or lets the learning runs save. The same command again goes on. A
fresh checkout with the packages of requirements.txt is enough.

Exit codes: 0 everything was done and is right, 1 something is wrong (gpu.md says what), 2 the input was wrong, 3 there
is more to do: the same command again.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import run
import speed
from common import ROOT, Parser, at_least, fail, find_runs, read_json, read_result, write_json

SPEED = [
    "dreamerv3:size=1m",
    "planet_cem",
    "muzero:preset=atari100k",
    "iris",
    "diamond",
    "ha2018_carracing:rnn_batch_length=100",
    "ha2018_carracing:preset=takecover,rnn_batch_length=100",
    "genie_lam",
    "muzero",
    "dreamerv3:size=12m",
    "dreamerv3:size=200m",
]
# Largest relative difference of a loss from eager float32 on the first batch that counts as the same computation.
LIMITS = {("compiled", "fp32"): 0.01, ("eager", "bf16"): 0.1, ("compiled", "bf16"): 0.1}
LINE_SECONDS = 300  # a measurement that takes longer is reported as a problem
LEAST_SECONDS = 60  # no step is begun with less time left
MARGIN, LEARNING_MARGIN = 15, 30  # seconds of a slice kept back, and those in which the learning runs save


def environment():
    """What the numbers were measured on."""
    import torch

    out = dict(python=platform.python_version(), torch=torch.__version__, system=platform.platform())
    out |= dict(cores=os.cpu_count(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        out |= dict(gpu=properties.name, gpus=torch.cuda.device_count(), gpu_memory_gb=properties.total_memory / 1e9)
        out |= dict(capability=".".join(map(str, torch.cuda.get_device_capability())))
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return out | dict(commit=git.stdout.strip() or "unknown")


def orders_of(configs, device):
    """The lines to measure, for scripts that are there."""
    there = [c for c in configs if (ROOT / f"{c.partition(':')[0]}.py").is_file()]
    precisions = ["fp32", "bf16"] if device == "cuda" else ["fp32"]
    flags = dict(configs=there, kinds=["image"], modes=["eager", "compiled"], precisions=precisions)
    return speed.plan(argparse.Namespace(**flags, threads=1, num_envs=None, seconds=3.0), device)


def learning_command(folder, suite, cuda):
    words = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--suite", suite, "--folder", str(folder)]
    words += ["--workers", str(min(4, os.cpu_count() or 1)), "--threads", "1", "--grace", "30"]
    return words + ([] if cuda else ["--add-flags=--no-cuda --no-compile"])


def learn(words, seconds):
    """Run the learning runs for at most `seconds`: the runner's exit code, or None if there is more to do."""
    process = subprocess.Popen(words)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the trainings save and leave
        code = process.wait()
        return code if code < 128 else None


def wrong_rows(rows):
    """Lines whose losses are too far from eager float32, or that could not be measured."""
    out = []
    for row in rows:
        what = f"{row['config']}, {row['mode']}, {row['precision']}"
        limit = LIMITS.get((row["mode"], row["precision"]))
        if row.get("problem"):
            out.append(f"{what}: {row['problem']}")
        elif limit and "error" in row and not row["error"] <= limit:
            out.append(f"{what}: {row['error_of']} differs by {row['error']:.2g}, limit {limit}")
        elif limit and "error" not in row:
            out.append(f"{what}: nothing to compare with")
    return out


def learning_table(folder):
    lines = ["| run | return | random | steps | updates | minutes | state |", "|---|---|---|---|---|---|---|"]
    for path in find_runs([folder]):
        result, problem = read_result(path)
        attempts = (read_json(path.parent.parent / "job.json") or {}).get("attempts") or [{}]
        if not result:
            lines.append(f"| {path.name} | - | - | - | - | - | {problem} |")
            continue
        cells = [path.name, f"{result['episodic_return']:.1f}", f"{result['random_return']:.1f}"]
        cells += [f"{result['global_step']:,}", f"{result['updates']:,}", f"{result['minutes']:.1f}"]
        state = "finished" if attempts[-1].get("code", 0) == 0 else f"exit code {attempts[-1]['code']}"
        lines.append("| " + " | ".join([*cells, state]) + " |")
    return "\n".join(lines) if len(lines) > 2 else "None yet."


def write_report(folder, state, orders):
    """gpu.md from everything that is known; returns what is wrong."""
    results = [state["lines"].get(key(o), (None, "not measured yet")) for o in orders]
    rows = speed.rows_of(orders, results, state["rates"])
    done = [row for row, order in zip(rows, orders) if key(order) in state["lines"]]
    wrong = wrong_rows(done)
    if state.get("learning") not in (None, 0):
        wrong.append(f"learning runs: exit code {state['learning']}")
    facts = "\n".join(f"- {k}: {v}" for k, v in state["environment"].items())
    rates = ", ".join(f"{v / 1e12:.3g} TFLOP/s in {k}" for k, v in state["rates"].items() if v) or "not measured yet"
    left = f"{len(orders) - len(done)} of {len(orders)} measurements and "
    left += "no learning runs are left." if "learning" in state else "the learning runs are left."
    verdict = "Nothing is wrong so far." if not wrong else "Wrong:\n\n" + "\n".join(f"- {w}" for w in wrong)
    parts = ["# GPU check", f"Written by `benchmarks/gpu.py`. {left} {verdict}", "## Environment", facts]
    parts += ["## Speed and correctness", f"Large matrix products: {rates}. Columns: see `benchmarks/speed.py`."]
    parts += [speed.table_of(rows), "## Learning", learning_table(folder / "learning")]
    (folder / "gpu.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return wrong


def key(order):
    return "|".join(order[k] for k in ("config", "kind", "precision", "mode"))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=at_least(1.0, float), default=10.0, help="length of this slice (default: 10)")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "gpu", help="for results (default: runs/gpu)")
    parser.add_argument("--configs", nargs="+", default=SPEED, help=f"what to measure (default: {' '.join(SPEED)})")
    parser.add_argument("--suite", default="gpu", help="learning runs (default: suite gpu)")
    parser.add_argument("--allow-cpu", action="store_true", help="try this program out on a machine without a GPU")
    flags = parser.parse_args()
    end = time.time() + 60 * flags.minutes - MARGIN
    try:
        import torch
    except ImportError:
        fail("torch is missing: pip install -r requirements.txt")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not flags.allow_cpu:
        fail("no CUDA device here (--allow-cpu tries this program out without one)")
    if flags.suite not in run.read_suites():
        fail(f"--suite {flags.suite}: unknown, there are {', '.join(run.read_suites())}")
    for config in flags.configs:
        if config not in SPEED:
            speed.split_config(config)
    orders = orders_of(flags.configs, device)
    try:
        flags.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--folder: {e}")
    file = flags.folder / "gpu.json"
    state = read_json(file) or dict(lines={}, rates={})
    here = environment()
    for what in ("gpu", "torch", "commit"):
        if state.get("environment", here).get(what) != here.get(what):
            before, now = state["environment"].get(what), here.get(what)
            fail(f"--folder {flags.folder} was begun with {what} {before}, here it is {now}: take a new folder")
    state["environment"] = here

    def left():
        return end - time.time()

    def save():
        write_json(state, file)
        return write_report(flags.folder, state, orders)

    save()
    for precision in dict.fromkeys(o["precision"] for o in orders):
        if precision not in state["rates"] and left() > LEAST_SECONDS:
            found, problem = speed.measure(speed.rate_order(device, 1, precision), left())
            state["rates"][precision] = found["rate"] if found else None
            print(
                f"matrix rate, {precision}: {problem or format(found['rate'] / 1e12, '.4g') + ' TFLOP/s'}", flush=True
            )
    for order in orders:
        if key(order) in state["lines"]:
            continue
        if left() < LEAST_SECONDS:
            break
        limit, began = min(LINE_SECONDS, left()), time.time()
        found, problem = speed.measure(order, limit)
        if problem and limit < LINE_SECONDS and time.time() - began >= limit - 1:
            break  # the slice was over, which says nothing about the line
        state["lines"][key(order)] = (found, problem)
        print(
            f"{key(order)}: {problem or format(1e3 * found['seconds_per_update'], '.2f') + ' ms per update'}",
            flush=True,
        )
        save()
    if "learning" not in state and all(key(o) in state["lines"] for o in orders) and left() > LEAST_SECONDS:
        code = learn(
            learning_command(flags.folder / "learning", flags.suite, device == "cuda"), left() - LEARNING_MARGIN
        )
        state |= {"learning": code} if code is not None else {}
    wrong = save()
    more = "learning" not in state
    print(f"{'more to do, the same command again' if more else 'done'}: {flags.folder / 'gpu.md'}")
    for line in wrong:
        print(f"wrong: {line}")
    raise SystemExit(1 if wrong else 3 if more else 0)


if __name__ == "__main__":
    main()
