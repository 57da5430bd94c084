"""Finished runs of one task (seeds) as files to show: python benchmarks/run_report.py --name NAME runs/A runs/B ...

Writes NAME.json (scores, seeds, command, commit, versions, minutes), NAME.png (return and dream error against agent
steps) and NAME.gif (the first run's last open-loop video) into benchmarks/results, all read from the run directories,
and the README's result table from all files there. Without runs it only writes the table.
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ERRORS = {"open_loop_mse": "dream", "copy_last_mse": "copy of the last frame", "mean_frame_mse": "mean frame"}


def curve(events, tag):
    """Steps and values of a scalar tag; empty if the run did not write it."""
    points = [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def row(run, events):
    """One run's numbers, as the run wrote them."""
    start, result = json.loads((run / "args.json").read_text()), json.loads((run / "result.json").read_text())
    out = {k: start[k] for k in ("commit", "hardware", "versions")} | {k: start["args"][k] for k in ("env_id", "seed")}
    out["command"] = [Path(start["command"][0]).name, *start["command"][1:]]
    out |= {k: v for k, v in result.items() if k not in ("returns", "run")}
    return out | {tag: float(v[-1]) for tag in ERRORS if len(v := curve(events, f"eval/{tag}")[1])}


def report(runs, name):
    """NAME.json, NAME.png and NAME.gif of some runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    rows = []
    for i, run in enumerate(runs):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        rows.append(row(run, events))
        steps, returns = curve(events, "charts/episodic_return")
        window = max(1, len(returns) // 50)
        smooth = np.convolve(returns, np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, label=f"seed {rows[-1]['seed']}, mean of {window} episodes")
        for color, (tag, label) in zip("brg", ERRORS.items(), strict=True):
            right.plot(*curve(events, f"eval/{tag}"), color, label=None if i else label)
    left.axhline(np.mean([r["random_return"] for r in rows]), color="gray", linestyle=":", label="random policy")
    left.set(xlabel="agent steps", ylabel="episodic return", title=rows[0]["env_id"])
    right.set(xlabel="agent steps", ylabel="mean squared error", title="dreams about fresh episodes", yscale="log")
    for axis in (left, right):
        axis.locator_params(axis="x", nbins=5)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    videos = sorted(runs[0].glob("videos/open_loop-*.gif"), key=lambda p: int(p.stem.split("-")[1]))
    if videos:
        shutil.copy(videos[-1], RESULTS / f"{name}.gif")
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def table():
    """Markdown table of all reports: one line per task and command, the final evaluation of each seed."""
    head = [
        "task",
        "return per seed",
        "random",
        "agent steps",
        "updates",
        "minutes per run",
        "hardware",
        "commit",
        "command",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        words, one = [w for w in rows[0]["command"] if w != "--seed"], rows[0]
        if "--seed" in one["command"]:
            words.pop(one["command"].index("--seed"))
        cells = [one["env_id"], ", ".join(f"{r['episodic_return']:.1f}" for r in rows)]
        cells += [
            f"{np.mean([r['random_return'] for r in rows]):.1f}",
            f"{one['global_step']:,}",
            f"{one['updates']:,}",
        ]
        cells += [
            f"{np.mean([r['minutes'] for r in rows]):.1f}",
            one["hardware"],
            ", ".join(sorted({r["commit"] for r in rows})),
        ]
        lines.append("| " + " | ".join([*cells, f"`python {' '.join(words)}`"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run directories")
    parser.add_argument("--name", help="file name of the report, without suffix")
    flags = parser.parse_args()
    if flags.runs and not flags.name:
        parser.error("--name is needed with runs")
    if flags.runs:
        report(flags.runs, flags.name)
    begin, end, readme = "<!-- results -->\n", "<!-- end of results -->", ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(text.split(begin)[0] + begin + table() + "\n" + end + text.split(end)[1])
