"""One finished run as files to show: python benchmarks/run_report.py runs/NAME benchmarks/results/NAME

Writes NAME.json (score, seeds, command, commit, versions, minutes), NAME.png (return and dream error against agent
steps) and NAME.gif (the last open-loop video), all read from the run directory.
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def curve(events, tag):
    """Steps and values of a scalar tag, empty if the run did not write it."""
    if tag not in events.Tags()["scalars"]:
        return np.zeros(0), np.zeros(0)
    points = [(e.step, e.value) for e in events.Scalars(tag)]
    return tuple(np.array(x) for x in zip(*points, strict=True))


def report(run, out):
    start, result = json.loads((run / "args.json").read_text()), json.loads((run / "result.json").read_text())
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    steps, returns = curve(events, "charts/episodic_return")
    window = max(1, len(returns) // 50)
    smooth = np.convolve(returns, np.ones(window) / window, "valid")
    left.plot(steps[window - 1 :], smooth, label=f"mean of {window} episodes")
    left.axhline(result["random_return"], color="gray", linestyle=":", label="random policy")
    left.set(xlabel="agent steps", ylabel="episodic return", title=start["args"]["env_id"])
    for tag, label in {
        "open_loop_mse": "dream",
        "copy_last_mse": "copy of the last frame",
        "mean_frame_mse": "mean frame",
    }.items():
        right.plot(*curve(events, f"eval/{tag}"), label=label)
    right.set(xlabel="agent steps", ylabel="mean squared error", title="open loop on fresh episodes", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=80)
    videos = sorted(run.glob("videos/open_loop-*.gif"), key=lambda p: int(p.stem.split("-")[1]))
    if videos:
        shutil.copy(videos[-1], out.with_suffix(".gif"))
    row = {
        "command": start["command"],
        "commit": start["commit"],
        "versions": start["versions"],
        "seed": start["args"]["seed"],
    }
    row |= {k: v for k, v in result.items() if k not in ("returns", "run")}
    row |= {tag: float(curve(events, f"eval/{tag}")[1][-1]) for tag in ("open_loop_mse", "copy_last_mse") if videos}
    out.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, help="path without suffix")
    flags = parser.parse_args()
    report(flags.run, flags.out)
