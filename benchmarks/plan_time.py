"""Seconds per plan and per update of planet_cem.py on random data, without an environment:
python benchmarks/plan_time.py --help

A plan is what happens before every action: all iterations of the cross-entropy method for some environments at once. An
update is everything `ModelLearner.update` does. On a CPU the figures are CPU seconds (time.process_time), on a GPU
seconds between synchronisations; medians. `--reward-layers 2 --reward-units 200` is the paper's reward head. Prints one
Markdown row per configuration.
"""

import argparse
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import planet_cem as script  # noqa: E402


def seconds(function, device, repeats, warmup=3):
    """Median time of a call, CPU time on a CPU."""
    times, clock = [], time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(warmup + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return float(np.median(times[warmup:]))


def measure(args, kind, actions, environments, repeats, update):
    """Seconds per plan and, if asked for, per update; parameters; peak GPU memory in GB."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    script.seed_everything(args, device)
    side = args.image_size
    images, vectors = gym.spaces.Box(0, 255, (side, side, 3), np.uint8), gym.spaces.Box(-9, 9, (5,), np.float32)
    space = gym.spaces.Dict(o=images if kind == "image" else vectors)
    with torch.device(device):
        model = script.Planet(space, actions, {k: getattr(args, k) for k in script.SHAPES})
    learner = script.ModelLearner(model, args, device)
    if args.compile:
        script.compile_planner(model, learner)
    names = "plan_horizon", "plan_candidates", "plan_iterations", "plan_elites", "plan_bf16"
    settings, state = {k: getattr(args, k) for k in names}, model.rssm.initial(environments, device)
    plan = seconds(lambda: model.plan(state.sample, state.belief, settings), device, repeats, 5 if args.compile else 2)
    if not update:
        return plan, None, script.count_params(model), 0.0
    shape, batch = (args.batch_length, args.batch_size), {}
    for name, (row, dtype) in script.ReplayBuffer.specs(space, actions).items():
        size = (*shape, *row)
        numbers = torch.randint(0, 256, size, dtype=dtype) if dtype == torch.uint8 else torch.rand(size)
        batch[name] = numbers.to(device)
    batch["mask"] = torch.ones(shape, device=device)
    time_update = seconds(lambda: learner.update(batch), device, repeats, 5 if args.compile else 1)
    learner.check()
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return plan, time_update, script.count_params(model), memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full", choices=list(script.PRESETS))
    parser.add_argument("--kind", default="image", choices=["image", "vector"])
    parser.add_argument("--environments", type=int, nargs="+", default=[1])
    parser.add_argument("--actions", type=int, default=6)
    parser.add_argument("--reward-layers", type=int)
    parser.add_argument("--reward-units", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-update", action="store_true", help="plans only: a full update takes 10 s on a CPU core")
    flags = parser.parse_args()
    print("| environments | reward head | parameters | plan, float32 | plan, bfloat16 | update | GPU memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for n in flags.environments:
        chosen = dict(script.PRESETS[flags.preset], compile=flags.compile, num_threads=flags.threads)
        chosen |= {k: v for k in ("reward_layers", "reward_units") if (v := getattr(flags, k))}
        rows = []
        for bf16 in (False, True):
            args, last = script.Args(**chosen | dict(plan_bf16=bf16)), bf16 and not flags.no_update
            rows.append(measure(args, flags.kind, flags.actions, n, flags.repeats, last))
        (plain, *_), (low, update, params, memory) = rows
        head, update = f"{args.reward_layers} x {args.reward_units}", f"{update:.3f}" if update else "-"
        print(f"| {n} | {head} | {params:,} | {plain:.4f} | {low:.4f} | {update} | {memory:.1f} |", flush=True)
