"""Seconds per update of dreamerv3.py on random data, without an environment: python benchmarks/update_time.py --help

One update is everything `Learner.update` does: losses, one backward, clipping, optimizer, slow critic. On a CPU the
figure is CPU seconds (time.process_time), on a GPU seconds between synchronisations. Prints one Markdown row per
configuration.
"""

import argparse
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamerv3 as script  # noqa: E402


def random_batch(obs_space, actions, config, args, device):
    """One batch of B x (T+1) rows without episode ends."""
    batch, shape = {}, (args.batch_size, args.batch_length + 1)
    for name, (row, dtype) in script.Replay.specs(obs_space, actions, config).items():
        size = (*shape, *row)
        if dtype == torch.bool:
            batch[name] = torch.zeros(size, dtype=dtype, device=device)
        elif dtype == torch.uint8:
            batch[name] = torch.randint(
                0, config["classes"] if name == "stoch" else 256, size, dtype=dtype, device=device
            )
        else:
            batch[name] = torch.randn(size, device=device).to(dtype)
    batch["action"] = torch.eye(actions, device=device)[torch.randint(0, actions, shape, device=device)]
    return batch


def measure(size, kind, args, updates):
    """Median seconds per update, parameters, peak GPU memory in GB."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    script.seed_everything(args, device)
    if kind == "image":
        obs_space, action_space = (
            gym.spaces.Dict(o=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)),
            gym.spaces.Discrete(6),
        )
    else:
        obs_space = gym.spaces.Dict(o=gym.spaces.Box(-np.inf, np.inf, (24,), np.float32))
        action_space = gym.spaces.Box(-1, 1, (6,), np.float32)
    config = script.make_config(size)
    with torch.device(device):
        model = script.Dreamer(obs_space, action_space, config)
    learner, batch = script.Learner(model, args, device), random_batch(obs_space, 6, config, args, device)
    if args.compile:
        script.compile_model(model, learner)
    times = []
    for _ in range(updates + 5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        learner.update(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    learner.check()
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return float(np.median(times[5:])), script.count_params(model), memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1m"])
    parser.add_argument("--kinds", nargs="+", default=["vector", "image"], choices=["vector", "image"])
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-bf16", action="store_true")
    flags = parser.parse_args()
    print("| size | observations | parameters | batch | seconds per update | peak GPU memory, GB |")
    print("|---|---|---|---|---|---|")
    for size in flags.sizes:
        for kind in flags.kinds:
            args = script.Args(size=size, compile=flags.compile, num_threads=flags.threads, bf16=not flags.no_bf16)
            seconds, params, memory = measure(size, kind, args, flags.updates)
            shape = f"{args.batch_size} x {args.batch_length}"
            print(f"| {size} | {kind} | {params:,} | {shape} | {seconds:.4f} | {memory:.1f} |", flush=True)
