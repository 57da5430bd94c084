"""How benchmarks/dreams.py writes what it found: tables, rows and a plot for all runs, a GIF for each."""

import csv
import os
from pathlib import Path

import numpy as np
from pictures import save_gif

LEVELS = (0.5, 0.8, 0.95)  # of intervals
ERRORS = ("open_loop_mse", "copy_last_mse", "one_step_mse", "copy_previous_mse", "posterior_mse", "mean_frame_mse")
HORIZONS = (1, 5, 10, 20, 50)  # in the tables


def cell(value, form=".2f"):
    return "-" if value is None else format(value, form)


def table(head, lines):
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(x) + " |" for x in lines)]
    )


def document(name, found, flags):
    """NAME.md: one table per question, one line per run and horizon."""
    picked = [(m, row) for m in found for row in m["rows"] if row["step"] in HORIZONS]
    first = lambda m, row: [m["name"], str(row["step"])]  # noqa: E731
    counted = lambda m, row: [*first(m, row), str(row["windows"])]  # noqa: E731
    settings = f"{flags.windows} windows per run, {flags.dreams} dreams each, {flags.policy} policy, context from the"
    settings += f" beginning of the episode, at least {flags.context} steps or half of it."
    parts = [f"# {name}", f"Written by `benchmarks/dreams.py`: {settings}", f"![{name}]({name}.png)"]
    parts += [f"{m['name']}:\n\n![{m['run']}]({name}-{m['run']}.gif)" for m in found if m["frames"]]
    words = lambda names: [k.removesuffix("_mse").replace("_", " ") for k in names]  # noqa: E731
    whole = [[m["name"], *(cell(m["errors"].get(k), ".3g") for k in ERRORS)] for m in found]
    errors = ("open_loop_mse", "copy_last_mse", "posterior_mse", "mean_frame_mse")
    steps = [[*counted(m, r), *(cell(r[k], ".3g") for k in errors)] for m, r in picked]
    what = "Mean squared error per number, images in 0..1, vectors in symlog space. All steps:"
    parts += ["## Errors", what, table(["run", *words(ERRORS)], whole)]
    parts += ["Step h of the dream:", table(["run", "step", "windows", *words(errors)], steps)]
    frames = [[*counted(m, r), *(cell(r[k], ".1f") for k in ("psnr", "psnr_of_mean", "psnr_copy"))] for m, r in picked]
    head = ["run", "step"]
    head = ["run", "step"]
    parts += ["## Frames", "PSNR in dB, higher is better."]
    parts += [table([*head, "windows", "one dream", "mean of the dreams", "copy"], frames)]
    keys = ("reward_precision", "reward_recall")
    scores = [[cell(r["reward_mae"], ".3f"), *(cell(r[k]) for k in keys), str(r["reward_events"])] for _, r in picked]
    events = [[*first(m, r), *words] for (m, r), words in zip(picked, scores, strict=True)]
    parts += ["## Reward", "Events in steps 1..h; the error at step h."]
    parts += [table([*head, "mean absolute error", "precision", "recall", "real events"], events)]
    ends = [[*first(m, r), cell(r["end_precision"]), cell(r["end_recall"]), str(r["ends"])] for m, r in picked]
    parts += ["## Termination", "Ended within h steps.", table([*head, "precision", "recall", "real ends"], ends)]
    levels = [k for k in found[0]["rows"][0] if "coverage" in k]
    shares = [[*counted(m, r), *(cell(r[k]) for k in levels)] for m, r in picked]
    what = "Share of true values inside the dreams' central interval: frames at step h, numbers that move only; rewards"
    what += " in steps 1..h, where a dream or the truth has an event."
    parts += ["## Calibration", what, table([*head, "windows", *(k.replace("_", " ") for k in levels)], shares)]
    return "\n\n".join(parts) + "\n"


def picture(found, path):
    """NAME.png: five panels, one colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((errors, frames, calibration), (reward, ends, names)) = plt.subplots(2, 3, figsize=(15, 7.5))
    styles = dict(zip(LEVELS, (":", "--", "-")))

    def line(axis, m, key, least=-np.inf, **look):
        points = [(r["step"], max(r[key], least)) for r in m["rows"] if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points), **look)

    for i, m in enumerate(found):
        color = f"C{i % 10}"
        names.plot([], [], color=color, label=m["name"])
        for key, look in (("open_loop", "-"), ("copy_last", "--"), ("mean_frame", ":")):
            line(errors, m, f"{key}_mse", 1e-7, color=color, linestyle=look)
        line(frames, m, "psnr", color=color)
        line(frames, m, "psnr_of_mean", color=color, linestyle=":")
        line(frames, m, "psnr_copy", color=color, linestyle="--", alpha=0.5)
        for level, style in styles.items():
            line(calibration, m, f"coverage_{level:.0%}", color=color, linestyle=style)
        for axis, what in ((reward, "reward"), (ends, "end")):
            line(axis, m, f"{what}_recall", color=color)
            line(axis, m, f"{what}_precision", color=color, linestyle="--")
    last = max(m["rows"][-1]["step"] for m in found)
    for level in LEVELS:
        calibration.axhline(level, color="gray", linewidth=0.8, linestyle=styles[level])
        calibration.annotate(f"{level:.0%}", (last, level), color="gray", fontsize=8, va="bottom", ha="right")
    errors.set(title="error: a dream (-), copy last (--), mean frame (:)", ylabel="mean squared error", yscale="log")
    frames.set(title="frames: a dream (-), mean of dreams (:), copy (--)", ylabel="PSNR, dB")
    calibration.set(title="calibration: truth inside the dreams' interval", ylabel="share", ylim=(-0.03, 1.03))
    reward.set(title="reward events up to here: recall (-), precision (--)", ylabel="share", ylim=(-0.03, 1.03))
    ends.set(title="episode over by here: recall (-), precision (--)", ylabel="share", ylim=(-0.03, 1.03))
    for axis in (errors, frames, calibration, reward, ends):
        axis.set_xlabel("steps into the dream")
    names.axis("off")
    names.legend(frameon=False, loc="center left")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(found, flags, folder, name):
    """NAME.md, NAME.csv, NAME.png and the GIFs."""
    folder.mkdir(parents=True, exist_ok=True)
    place, gifs = folder / name, [m for m in found if m["frames"]]
    rows = [dict(run=m["run"], name=m["name"]) | row for m in found for row in m["rows"]]
    with open(f"{place}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for m in gifs:
        save_gif(m["frames"], f"{place}-{m['run']}.gif")
    Path(f"{place}.md").write_text(document(name, found, flags), encoding="utf-8")
    picture(found, f"{place}.png")
    more = f", and {len(gifs)} GIF{'s' * (len(gifs) > 1)}" if gifs else ""
    print(f"wrote {os.path.relpath(place)}.md, .csv and .png{more}")
