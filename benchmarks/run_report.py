"""One finished run as files to show: python benchmarks/run_report.py runs/NAME --name dreamerv3-breakout

Writes benchmarks/results/NAME.json (score, seed, command, commit, versions, minutes), NAME.png (return and dream error
against agent steps) and NAME.gif (the last open-loop video), all read from the run directory.
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
    row = {k: start[k] for k in ("command", "commit", "versions", "hardware")}
    row |= {k: start["args"][k] for k in ("env_id", "seed")}
    row |= {k: v for k, v in result.items() if k not in ("returns", "run")}
    row |= {tag: float(curve(events, f"eval/{tag}")[1][-1]) for tag in ("open_loop_mse", "copy_last_mse") if videos}
    out.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")


def table(folder):
    """Markdown table of all reported runs."""
    lines = [
        "| task | return, mean +- std | random | agent steps | minutes | updates | seed | hardware | commit | command |"
    ]
    lines.append("|" + "---|" * 10)
    for path in sorted(folder.glob("*.json")):
        r = json.loads(path.read_text())
        score = f"{r['episodic_return']:.1f} +- {r['episodic_return_std']:.1f}"
        command = "python " + " ".join(Path(w).name if w.endswith(".py") else w for w in r["command"])
        cells = [r["env_id"], score, f"{r['random_return']:.1f}", f"{r['global_step']:,}", f"{r['minutes']:.0f}"]
        cells += [f"{r['updates']:,}", str(r["seed"]), r["hardware"], r["commit"], f"`{command}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(readme, text):
    """Replace what stands between the two result markers of the README."""
    before, rest = readme.read_text().split("<!-- results -->\n")
    readme.write_text(
        before + "<!-- results -->\n" + text + "\n<!-- end of results -->" + rest.split("<!-- end of results -->")[1]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run directories, reported under --name")
    parser.add_argument("--name", help="file name of the report without suffix (one run) or its beginning (several)")
    flags = parser.parse_args()
    results = Path(__file__).resolve().parent / "results"
    for i, run in enumerate(flags.runs):
        report(run, results / (flags.name if len(flags.runs) == 1 else f"{flags.name}-{i + 1}"))
    write_table(results.parent.parent / "README.md", table(results))
