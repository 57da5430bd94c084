"""Run directories -> tables and pictures: python benchmarks/report.py FOLDER ... --name NAME

Every finished run below the folders goes in; the others are listed with the reason why they do not count. Writes into
benchmarks/results: NAME.json and NAME.csv (one row per run), NAME.md (scores with intervals beside published ones, all
tasks together, cost), NAME.png (learning curves) and NAME.gif (the last dream of the first run). Then the README's
result table, and in docs/ beside it the rows that concern a script, are made anew from all reports there; without
folders only that is done.

Numbers: "interval" is the 95 % interval of the stratified bootstrap (runs are drawn again within each task). IQM is
the mean of the middle half of all runs of all tasks (Agarwal et al., 2021). Normalised scores are 0 for a random policy
and 1 for a human on Atari, and return / 1000 on DeepMind Control, where 1000 is the most there is.
"""

import csv
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Parser, fail, find_runs, read_json, read_result, swap_block, write_json

PUBLISHED = ROOT / "benchmarks" / "published"
DREAMS = {"open_loop_mse": "dream", "copy_last_mse": "copy of the last frame", "mean_frame_mse": "mean frame"}
DREAMED = ".dreams"  # of the event file of dreams.py --watch, which runs beside the training
BLANK = "-"

# ---- Statistics ------------------------------------------------------------------------------------------------------


def iqm(scores):
    """Mean of the middle half: a quarter of the scores, rounded down, is left out at either end."""
    scores = np.sort(np.ravel(scores))
    cut = len(scores) // 4
    return float(scores[cut : len(scores) - cut].mean())


def pooled(function):
    """A statistic of all runs of all tasks together."""
    return lambda tasks: function(np.concatenate([np.ravel(t) for t in tasks]))


# Each takes a list with one array of scores per task. Mean and median are over the tasks' means.
STATISTICS = {
    "mean": lambda tasks: float(np.mean([np.mean(t) for t in tasks])),
    "median": lambda tasks: float(np.median([np.mean(t) for t in tasks])),
    "IQM": pooled(iqm),
    "optimality gap": pooled(lambda scores: float(np.mean(1 - np.minimum(scores, 1)))),
}


def interval(tasks, statistic, level=0.95, draws=2000, seed=0):
    """Percentile interval of the stratified bootstrap: each task draws as many of its runs as it has, with
    replacement. None if no task has two runs: there is nothing to learn about the spread from."""
    tasks = [np.asarray(t, float) for t in tasks]
    if max(len(t) for t in tasks) < 2:
        return None
    rng = np.random.default_rng(seed)
    values = [statistic([t[rng.integers(len(t), size=len(t))] for t in tasks]) for _ in range(draws)]
    return tuple(float(x) for x in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))


def normaliser(task, scores):
    """(low, high) for which a score becomes 0 and 1, or None. `scores`: {agent: published score} of this task."""
    if {"Random", "Human"} <= set(scores):
        return scores["Random"], scores["Human"]
    return (0.0, 1000.0) if task.startswith("dm_control/") else None


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_published():
    """[{task, agent, score, budget, observations, source}] of all files with scores per task."""
    rows = []
    for path in sorted(PUBLISHED.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as f:
            rows += [r | {"score": float(r["score"])} for r in csv.DictReader(f) if "task" in r]
    return rows


def read_aggregates(tasks):
    """{agent: {"mean": value, "IQM": value, ...}} made from single runs, if `tasks` are exactly all of Atari 100k."""
    with open(PUBLISHED / "atari100k.csv", newline="", encoding="utf-8") as f:
        if set(tasks) != {r["task"] for r in csv.DictReader(f)}:
            return {}
    out, names = {}, {"iqm": "IQM", "optimality_gap": "optimality gap"}
    with open(PUBLISHED / "atari100k_aggregates.csv", newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            metric = names.get(row["metric"], row["metric"])
            out.setdefault(row["agent"], {})[metric] = float(row["value"])
    return out


def agent_of(command):
    """A command without program, environment and seed: what is the same for all runs of an agent."""
    words, kept, skip = list(command), [], False
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if skip or flag in ("--env-id", "--seed"):
            skip = not skip and "=" not in word
        else:
            kept.append(word)
    return " ".join([kept[0].removesuffix(".py"), *kept[1:]])


class Curves:
    """The scalars of a run, and for how long its processes wrote them."""

    def __init__(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        self.events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        self.events.Reload()
        self.tags, self.hours = set(self.events.Tags()["scalars"]), 0.0
        for path in Path(run).glob("events.out.tfevents.*"):  # one per start: a resumed run has several
            if path.suffix == DREAMED:
                continue
            times = [event.wall_time for event in EventFileLoader(str(path)).Load()]
            self.hours += (max(times) - min(times)) / 3600 if times else 0.0

    def __call__(self, tag):
        """Steps and values of a tag; empty if the run did not write it."""
        points = [(e.step, e.value) for e in self.events.Scalars(tag)] if tag in self.tags else []
        return np.array([p[0] for p in points], float), np.array([p[1] for p in points])


def read_run(run, result, curves):
    """One run's numbers, as the run wrote them."""
    start, job = read_json(run / "args.json"), read_json(run.parent.parent / "job.json") or {}
    row = {k: start.get(k) for k in ("commit", "hardware", "versions")}
    task = start["args"].get("env_id") or start["args"].get("dataset")
    row |= {"env_id": task, "seed": start["args"].get("seed")}
    words = list(start.get("command") or [run.name])
    if "--resume" in words:  # the last start's; what defines the run was said at the first one
        first = job.get("command") or [f"{start['script']}.py", "--preset", start["args"]["preset"]]
        words = first[next(i for i, w in enumerate(first) if w.endswith(".py")) :]
    path = Path(words[0])
    name = f"benchmarks/{path.name}" if path.parent.name == "benchmarks" else path.name
    row["command"] = [name, *words[1:]]
    row |= {k: v for k, v in result.items() if k not in ("returns", "run")}
    row |= {tag: float(v[-1]) for tag in DREAMS if len(v := curves(f"eval/{tag}")[1])}
    paces = curves("charts/updates_per_s")[1]
    pace = np.median(paces[paces > 0]) if (paces > 0).any() else 0
    if not pace and result.get("updates") and result.get("minutes"):
        pace = result["updates"] / (60 * result["minutes"])
    row["updates_per_s"] = round(float(pace), 4) or None
    row["hours"] = round(curves.hours, 4)
    row["peak_memory_gb"] = result.get("peak_memory_gb") or job.get("peak_rss_gb")
    return row


def collect(folders):
    """(rows, curves, skipped) of all run directories: what counts, newest last, and why the others do not."""
    rows, curves, skipped = {}, {}, []
    runs = find_runs(folders)
    if not runs:
        fail(f"no run directory below {', '.join(map(str, folders))}")
    for run in runs:
        result, problem = read_result(run)
        if not result:
            skipped.append((run, problem))
            continue
        seen = Curves(run)
        row = read_run(run, result, seen)
        key = row["env_id"], agent_of(row["command"]), row["seed"]
        if key in rows:
            skipped.append((curves[key][0], f"the same command was run again: {run.name}"))
            del rows[key]
        rows[key], curves[key] = row, (run, seen)
    if not rows:
        first = f"{skipped[0][0].name}: {skipped[0][1]}"
        fail(f"no finished run below {', '.join(map(str, folders))} ({len(skipped)} unfinished, {first})")
    return rows, curves, skipped


def group(rows):
    """{task: {agent: rows by seed}}, in order of appearance."""
    out = {}
    for row in rows:
        out.setdefault(row["env_id"], {}).setdefault(agent_of(row["command"]), []).append(row)
    return {t: {a: sorted(r, key=lambda x: x["seed"]) for a, r in agents.items()} for t, agents in out.items()}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def markdown(head, lines):
    rows = ["| " + " | ".join(cells) + " |" for cells in [head, *lines]]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def number(value, digits=None):
    """A cell; by default with one digit after the point, outcomes of games and other small numbers with two."""
    if value is None or not np.isfinite(value):
        return BLANK
    return f"{value:,.{(1 if abs(value) >= 2 else 2) if digits is None else digits}f}"


def span(pair, digits=None):
    return BLANK if pair is None else f"{number(pair[0], digits)} to {number(pair[1], digits)}"


def mean_of(rows, key):
    values = [r[key] for r in rows if r.get(key) is not None]
    return float(np.mean(values)) if values else None


def label(published):
    """A published agent with what it was given."""
    given = [published.get(k) for k in ("observations", "budget") if published.get(k)]
    return published["agent"] + (f" ({', '.join(given)})" if given else "")


def score_table(tasks, published):
    """One line per task and agent, published agents under ours."""
    head = ["task", "agent", "runs", "mean", "95 % interval", "IQM", "median", "normalised", "random"]
    lines = []
    for task, agents in tasks.items():
        theirs = [p for p in published if p["task"] == task]
        norm = normaliser(task, {p["agent"]: p["score"] for p in theirs})
        scale = lambda x, n=norm: BLANK if n is None else number((x - n[0]) / (n[1] - n[0]), 3)  # noqa: E731
        for agent, rows in agents.items():
            scores = [r["episodic_return"] for r in rows]
            mean = float(np.mean(scores))
            cells = [task, f"**{agent}**", str(len(rows)), number(mean)]
            cells += [span(interval([scores], STATISTICS["mean"])), number(iqm(scores)), number(np.median(scores))]
            lines.append([*cells, scale(mean), number(mean_of(rows, "random_return"))])
        for p in theirs:
            cells = [task, label(p), p.get("runs") or BLANK, number(p["score"]), BLANK, BLANK, BLANK]
            lines.append([*cells, scale(p["score"]), BLANK])
    return markdown(head, lines)


def normalised(tasks, published):
    """{agent: {task: normalised scores}} of our agents, and the same of published ones, by (agent,
    label), with one mean per task."""
    ours, theirs = {}, {}
    for task, agents in tasks.items():
        there = [p for p in published if p["task"] == task]
        norm = normaliser(task, {p["agent"]: p["score"] for p in there})
        if norm is None:
            continue
        low, high = norm
        for agent, rows in agents.items():
            scores = np.array([r["episodic_return"] for r in rows])
            ours.setdefault(agent, {})[task] = (scores - low) / (high - low)
        for p in there:
            theirs.setdefault((p["agent"], label(p)), {})[task] = np.array([(p["score"] - low) / (high - low)])
    return ours, theirs


def aggregate_table(tasks, published):
    """All tasks together, in normalised scores. A published agent is shown where it has every task that ours has; its
    IQM and gap need its single runs, which tables of averages do not have."""
    ours, theirs = normalised(tasks, published)
    head = ["agent", "tasks", "runs", *(h for name in STATISTICS for h in (name, "95 % interval"))]
    lines = []
    for agent, scores in ours.items():
        values = list(scores.values())
        cells = [f"**{agent}**", str(len(values)), str(sum(map(len, values)))]
        for statistic in STATISTICS.values():
            cells += [number(statistic(values), 3), span(interval(values, statistic), 3)]
        lines.append(cells)
    wanted = set().union(*(s for s in ours.values())) if ours else set()
    known = read_aggregates(wanted)
    for (agent, shown), scores in theirs.items():
        if wanted <= set(scores) and agent not in ("Random", "Human"):
            values = [scores[task] for task in sorted(wanted)]
            made = {name: STATISTICS[name](values) for name in ("mean", "median")} | known.get(agent, {})
            cells = [shown, str(len(values)), BLANK]
            lines.append(cells + [x for name in STATISTICS for x in (number(made.get(name), 3), BLANK)])
    return markdown(head, lines) if any(len(scores) > 1 for scores in ours.values()) else ""


def cost_table(tasks):
    head = ["task", "agent", "agent steps", "updates", "hours", "updates/s", "peak memory, GB", "hardware", "commit"]
    lines = []
    for task, agents in tasks.items():
        for agent, rows in agents.items():
            memory = [r["peak_memory_gb"] for r in rows if r.get("peak_memory_gb")]
            cells = [task, agent, f"{rows[0].get('global_step', 0):,}", f"{rows[0].get('updates') or 0:,}"]
            cells += [number(mean_of(rows, "hours"), 3), number(mean_of(rows, "updates_per_s"), 2)]
            cells += [number(max(memory), 2) if memory else BLANK]
            cells += [", ".join(sorted({str(r.get(k)) for r in rows})) for k in ("hardware", "commit")]
            lines.append(cells)
    return markdown(head, lines)


def document(name, tasks, published, skipped, pictures):
    """NAME.md"""
    source = "Written by `benchmarks/report.py` from run directories. Bold agents are ours, one command each; the"
    source += " others are published scores, whose sources are in `benchmarks/published`."
    note = "Return of the final evaluation. Intervals of two or three runs are too narrow: a bootstrap never leaves"
    note += " the range of the runs it draws from."
    parts = [f"# {name}", source, *(f"![{p}]({p})" for p in pictures)]
    parts += ["## Scores", note, score_table(tasks, published)]
    together = aggregate_table(tasks, published)
    if together:
        parts += ["## All tasks together", "Normalised scores.", together]
    parts += ["## Cost", cost_table(tasks)]
    commands = {
        f"python {' '.join(r['command'])}" for agents in tasks.values() for rows in agents.values() for r in rows
    }
    parts += ["## Commands", "```\n" + "\n".join(sorted(commands)) + "\n```"]
    if skipped:
        parts += ["## Not counted", "\n".join(f"- `{run.name}`: {problem}" for run, problem in skipped)]
    return "\n\n".join(parts) + "\n"


def concerns(page, agent):
    """Whether runs of an agent stand on a script's page (None: on the README): its own, and baselines beside it."""
    name, _, flags = agent.partition(" ")
    if name == "benchmarks/sb3":
        words = flags.split()
        name = words[words.index("--script") + 1] if "--script" in words else "dreamerv3"
    return page in (None, name)


def readme_table(results, page=None):
    """All reports, or those that concern a script: one line per task and command."""
    head = ["task", "return per seed", "95 % interval of the mean", "random", "agent steps", "updates"]
    head += ["minutes per run", "hardware", "commit", "command"]
    lines = []
    for path in sorted(results.glob("*.json")):
        rows = read_json(path)
        if not isinstance(rows, list):
            fail(f"{path} is damaged")
        for task, agents in group(rows).items():
            for agent, runs in agents.items():
                if not concerns(page, agent):
                    continue
                scores, one = [r["episodic_return"] for r in runs], runs[0]
                minutes = [60 * r["hours"] if r.get("hours") else r["minutes"] for r in runs]
                cells = [task, ", ".join(number(s) for s in scores), span(interval([scores], STATISTICS["mean"]))]
                cells += [number(mean_of(runs, "random_return")), f"{one['global_step']:,}", f"{one['updates']:,}"]
                cells += [number(np.mean(minutes), 1), one["hardware"], ", ".join(sorted({r["commit"] for r in runs}))]
                script, _, flags = agent.partition(" ")
                words = f"python {script}.py {flags}".strip()
                if "--env-id" in one["command"]:
                    words += f" --env-id {task}"
                lines.append([*cells, f"`{words}`"])
    return markdown(head, lines)


def write_csv(rows, path):
    """One row per run; nested values are left to the JSON file."""
    keys = list(dict.fromkeys(k for r in rows for k, v in r.items() if not isinstance(v, (dict, list))))
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["agent", *keys], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"agent": agent_of(r["command"])} | r for r in rows)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def binned(steps, values, edges):
    """Mean value in each bin of steps; bins without an episode are filled by a line between their neighbours, and are
    NaN before the first and after the last one."""
    which = np.digitize(steps, edges) - 1
    inside = (which >= 0) & (which < len(edges) - 1)
    count = np.bincount(which[inside], minlength=len(edges) - 1)
    total = np.bincount(which[inside], values[inside], minlength=len(edges) - 1)
    full = np.flatnonzero(count)
    if not len(full):
        return np.full(len(count), np.nan)
    return np.interp(np.arange(len(count)), full, total[full] / count[full], left=np.nan, right=np.nan)


def band(curves, draws=2000, seed=0):
    """Mean over seeds (rows) and its 95 % bootstrap interval; with one seed the interval is None."""
    mean = curves.mean(0)
    if len(curves) < 2:
        return mean, None
    picks = np.random.default_rng(seed).integers(len(curves), size=(draws, len(curves)))
    return mean, np.quantile(curves[picks].mean(1), [0.025, 0.975], axis=0)


def draw_curves(axis, runs, tag, color, style, name, bins=50):
    """One agent's curve: the mean of its seeds and the interval around it."""
    found = [curves(tag) for curves in runs]
    found = [(s, v) for s, v in found if len(s)]
    if not found:
        return
    last = max(s[-1] for s, _ in found)
    bins = min(bins, max(len(s) for s, _ in found))  # few reports: as many points as there are
    edges = np.linspace(0, last * (1 + 1e-9), bins + 1)
    edges[0] = -1
    rows = np.stack([binned(s, v, edges) for s, v in found])
    steps = found[0][0]
    if len(steps) == len(set(steps)) <= bins and all(np.array_equal(s, steps) for s, _ in found):
        edges, rows = np.append(-1, steps), np.stack([v for _, v in found])  # the same few steps: no bins
    seen = np.isfinite(rows).all(0)
    middle, (mean, around) = edges[1:][seen], band(rows[:, seen])
    marker = dict(marker="o", markersize=3) if len(mean) < 8 else {}
    axis.plot(middle, mean, color=color, linestyle=style, label=name, **marker)
    if around is not None:
        axis.fill_between(middle, *around, color=color, alpha=0.2, linewidth=0)


# What is drawn against steps, the last one that a run has.
SCORES = ("eval/knn", "charts/episodic_return")


def picture(tasks, curves, published, path):
    """NAME.png: returns against agent steps, one panel per task that has such curves; for up to four tasks the dreams'
    error too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    agents = list(dict.fromkeys(a for t in tasks.values() for a in t))
    colors = {a: f"C{i % 10}" for i, a in enumerate(agents)}
    by = {key: seen for key, (_, seen) in curves.items()}
    drawn = {task: tag for (task, *_), seen in by.items() for tag in SCORES if tag in seen.tags}
    tasks = {task: there for task, there in tasks.items() if task in drawn} or tasks  # not self-play
    dreams = len(tasks) <= 4 and any(f"eval/{d}" in seen.tags for seen in by.values() for d in DREAMS)
    columns = len(tasks) if dreams else min(4, len(tasks))
    lines = 2 if dreams else -(-len(tasks) // columns)
    lines, columns = (1, 2) if dreams and len(tasks) == 1 else (lines, columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines + 0.6), squeeze=False)
    for axis in axes.flat[lines * columns if dreams else len(tasks) :]:
        axis.axis("off")
    for i, (task, there) in enumerate(tasks.items()):
        top, below = axes.flat[i], axes.flat[len(tasks) + i] if dreams else None
        for agent, rows in there.items():
            runs = [by[task, agent, r["seed"]] for r in rows]
            short = "\n    ".join(textwrap.wrap(agent, 44, max_lines=2, placeholder=" ...", break_on_hyphens=False))
            name = f"{short} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            draw_curves(top, runs, drawn.get(task, SCORES[-1]), colors[agent], "-", name)
            if dreams:
                for style, (tag, what) in zip(("-", "--", ":"), DREAMS.items()):
                    draw_curves(below, runs, f"eval/{tag}", colors[agent], style, what)
        returns = drawn.get(task, SCORES[-1]) == SCORES[-1]
        chance = mean_of([r for rows in there.values() for r in rows], "random_return")
        if chance is not None:
            top.axhline(chance, color="gray", linestyle=":", label="random policy" if returns else "random encoder")
        human = next((p["score"] for p in published if (p["task"], p["agent"]) == (task, "Human")), None)
        if human is not None:
            top.axhline(human, color="black", linestyle=":", label="human")
        top.set(title=task, xlabel="agent steps" if returns else "updates")
        top.set(ylabel="episodic return" if returns else "accuracy of nearest neighbours")
        if dreams:
            below.set(xlabel="agent steps", ylabel="mean squared error", title="dreams about fresh episodes")
            below.set_yscale("log")
    for axis in axes.flat:
        if axis.has_data():
            axis.locator_params(axis="x", nbins=5)
            handles = dict(zip(*axis.get_legend_handles_labels()[::-1]))  # each name once
            axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---- Main ------------------------------------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="*", help="run directories, or folders with some below")
    parser.add_argument("--name", help="file name of the report, without suffix")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where reports are (default: benchmarks/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the result table's markers")
    flags = parser.parse_args()
    if bool(flags.folders) != bool(flags.name):
        fail("--name and folders are needed together")
    if flags.name and Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    for folder in flags.folders:
        if not folder.is_dir():
            fail(f"no folder {folder}")
    try:
        text = flags.readme.read_text(encoding="utf-8")
    except OSError as e:
        fail(f"--readme: {e}")
    swap_block(text, "results", "")  # the markers are there, before anything is written
    if flags.folders:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail("the pictures need matplotlib: pip install matplotlib")
        rows, curves, skipped = collect(flags.folders)
        tasks, published, place = group(rows.values()), read_published(), flags.results / flags.name
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(tasks, curves, published, place.with_name(flags.name + ".png"))
        pictures = [flags.name + ".png"]
        first, _ = next(iter(curves.values()))
        videos = sorted(first.glob("videos/open_loop-*.gif"), key=lambda p: int(p.stem.split("-")[1]))
        if videos:
            shutil.copy(videos[-1], place.with_name(flags.name + ".gif"))
            pictures.append(flags.name + ".gif")
        ordered = [row for agents in tasks.values() for same in agents.values() for row in same]
        write_csv(ordered, place.with_name(flags.name + ".csv"))
        place.with_name(flags.name + ".md").write_text(
            document(flags.name, tasks, published, skipped, pictures), encoding="utf-8"
        )
        write_json(ordered, place.with_name(flags.name + ".json"))
        print(f"{len(rows)} runs in {flags.results / flags.name}.md")
        for run, problem in skipped:
            print(f"not counted: {run}: {problem}", file=sys.stderr)
    flags.readme.write_text(swap_block(text, "results", readme_table(flags.results)), encoding="utf-8")
    for page in sorted((flags.readme.parent / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if "<!-- results -->" in text:
            page.write_text(swap_block(text, "results", readme_table(flags.results, page.stem)), encoding="utf-8")


if __name__ == "__main__":
    main()
