"""How fast the parts of ha2018_carracing.py are, beside the way of the authors' code: one rollout at a time.

    python benchmarks/world_models.py                        # everything, one thread
    python benchmarks/world_models.py --parts dream          # dreams of Take Cover's full M
    python benchmarks/world_models.py --name world_models    # also write the results

Parts: `scene`, steps of CarRacing per second with gymnasium's pictures, with --fast-render, and with none (physics and
rewards alone, what no drawing can beat); `encode`, frames per second through the full V, one by one as in the authors'
64 processes, and in batches; `dream`, imagined steps per second of the full M and C of Take Cover in batches of 1 (the
authors' way) to 1024 rollouts, ends ignored so that all stay alive; `evolution`, one generation of CMA-ES with 867
parameters and 64 candidates. Medians; on a CPU with one thread CPU time, which other processes do not lengthen.
"""

import csv
import sys
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Parser, at_least, fail
from search import median_time


def scene(script, device, clock, seconds):
    """Steps of CarRacing per second by way of drawing."""
    rows, steps = [], 50
    for name, fast, draws in (("gymnasium's", False, True), ("--fast-render", True, True), ("none", True, False)):
        env = script.make_env(script.Args(fast_render=fast), 0)()
        env.reset()
        if not draws:
            env.unwrapped.__class__._render = lambda self, mode: np.zeros((96, 96, 3), np.uint8)
        turn = [0]

        def drive():
            for _ in range(steps):
                turn[0] += 1  # noqa: B023
                ended = env.step(np.array([np.sin(turn[0] / 9), 0.4, 0], np.float32))[2:4]  # noqa: B023
                if any(ended):
                    env.reset()  # noqa: B023

        rows.append(("CarRacing steps", f"{name} pictures", steps / median_time(drive, clock, seconds)))
        env.close()
    return rows


def encode(script, device, clock, seconds):
    """Frames per second through V."""
    import torch

    model, rows = world(script, device, "car"), []
    for batch in (1, 16, 256):
        frames = torch.randint(0, 256, (batch, 64, 64, 3), dtype=torch.uint8, device=device)

        def once():
            with torch.no_grad():
                model.encode(frames)  # noqa: B023
            wait(device)

        rows.append(("frames through V", f"batch {batch}", batch / median_time(once, clock, seconds)))
    return rows


def dream(script, device, clock, seconds):
    """Imagined steps per second of Take Cover's world. The done head is held below 0: nothing dies."""
    import torch

    model, rows, steps = world(script, device, "takecover"), [], 2 * script.CHUNK
    with torch.no_grad():
        model.rnn.out.weight[0], model.rnn.out.bias[0] = 0, -1
    if device.type == "cuda":
        script.compile_world(model, device)
    starts = tuple(torch.zeros(8, model.rnn.Z, device=device) for _ in range(2))
    for candidates, rollouts in ((1, 1), (4, 16), (64, 16)):
        theta = 0.1 * torch.randn(candidates, model.controller.count(), device=device)

        def once():
            scores = script.dream_rollout(theta, model, starts, rollouts, 1.15, steps)  # noqa: B023
            assert float(scores.min()) == steps  # also waits for the device

        rate = candidates * rollouts * steps / median_time(once, clock, seconds)
        rows.append(("dreamed steps", f"{candidates} x {rollouts} rollouts", rate))
    return rows


def evolution(script, device, clock, seconds):
    strategy = script.Evolution(867, 64, 0.1, 1)

    def once():
        strategy.tell(-(strategy.ask() ** 2).sum(1))

    return [("generations of CMA-ES", "867 parameters, 64 candidates", 1 / median_time(once, clock, seconds))]


def world(script, device, which):
    """The full networks with random weights."""
    import gymnasium as gym
    import torch

    preset = {} if which == "car" else script.PRESETS[which]
    space = gym.spaces.Box(-1, 1, (3 if which == "car" else 1,), np.float32)
    torch.manual_seed(0)
    with torch.device(device):
        return script.VMC(script.config_of(script.Args(**preset), space)).eval()


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


PARTS = dict(scene=scene, encode=encode, dream=dream, evolution=evolution)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=at_least(0.0, float), default=5.0, help="least time per number (default: 5)")
    parser.add_argument("--no-cuda", action="store_true", help="measure on the CPU")
    parser.add_argument("--name", help="also write NAME.md and NAME.csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: benchmarks/results)")
    flags = parser.parse_args()
    if flags.name and Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    import speed
    import torch

    sys.path.insert(0, str(ROOT))
    import ha2018_carracing as script

    torch.set_num_threads(flags.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not flags.no_cuda else "cpu")
    single = device.type == "cpu" and flags.threads == 1
    rows, lines = [], ["| what | how | per second | times the first |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for part in flags.parts:
        clock = time.process_time if single or part == "scene" else time.perf_counter
        found = PARTS[part](script, device, clock, flags.seconds)
        for what, how, rate in found:
            rows.append(dict(what=what, how=how, per_second=rate, ratio=rate / found[0][2]))
            lines.append(f"| {what} | {how} | {rate:,.0f} | {rate / found[0][2]:.1f} |")
            print(lines[-1], flush=True)
    note = speed.hardware(device.type, flags.threads)
    print("\n" + note)
    if flags.name:
        flags.results.mkdir(parents=True, exist_ok=True)
        head = f"# {flags.name}\n\nWritten by `benchmarks/world_models.py`, which says what it measures. {note}.\n\n"
        (flags.results / f"{flags.name}.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
        with open(flags.results / f"{flags.name}.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
