"""How good are the dreams? Any trained run with a DreamEnv against its real environment.

    python benchmarks/dreams.py runs/A runs/B --name NAME

Real episodes are played (--policy agent or random). From each, a window is cut: the true observations and actions from
the episode's beginning up to some step are given to the dream as context, since recurrent models need them all; then
the dream goes on with the true actions, --dreams times with different noise. Written into benchmarks/results: NAME.md,
NAME.csv and NAME.png, all runs side by side.

  * frames: PSNR of single dreams and of the mean of the dreams, beside the last true frame repeated ("copy"). Images
    count in 0..255; a number of a vector in its range over the real data; a Discrete observation is right or wrong.
  * reward: an event is a reward unlike the usual one (the most frequent value; where rewards are continuous, one in the
    upper half). Precision and recall of events at their exact step, in steps 1..h, and the mean absolute error.
  * termination: whether the dream says that the episode ends within h steps, against whether it did. Dreams are not
    followed beyond the true end, for which there are no true actions: a dream that ends later has missed it.
  * calibration: how often the truth lies in the central 50, 80 and 95 % of the dreams. If the truth is one more draw
    from the same distribution, each of its N+1 ranks is equally likely, so the nominal share is met exactly when
    (N+1) times half of what is left out is a whole number: N = 39 serves all three. Ties are broken at random, values
    within --tolerance count as tied, and only numbers that move are counted: those where the truth or a dream differs
    from the last frame seen. Above the nominal share the dreams are too unsure, below it too sure of themselves.

What a script must have: DreamEnv, and, for the real side, Args and make_env; agent_policy for --policy agent. Where the
dream's observations are not the environment's but latent states (muzero.py), rewards and ends alone are measured.
"""

import csv
import importlib
import inspect
import os
import sys
import zlib
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Parser, at_least, fail, read_json

LEVELS = (0.5, 0.8, 0.95)
HORIZONS = (1, 5, 10, 20, 50)
KEY = 424_242  # of the real episodes' seeds: no training, report or evaluation uses it


# ---- The real side ---------------------------------------------------------------------------------------------------


def as_dict(obs):
    return obs if isinstance(obs, dict) else {"observation": obs}


def shapes_of(space):
    """{key: shape} of an observation space."""
    return {k: s.shape for k, s in getattr(space, "spaces", {"observation": space}).items()}


def load(run, device):
    """(dream, script module, its Args) of a run directory."""
    info = read_json(Path(run) / "args.json")
    if not isinstance(info, dict) or not {"script", "args"} <= set(info):
        fail(f"{run} is not a run directory: no readable args.json")
    if not (ROOT / f"{info['script']}.py").is_file():
        fail(f"{run} was made by {info['script']}.py, which is not in the repository")
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(info["script"])
    for name in ("DreamEnv", "Args", "make_env"):
        if not hasattr(script, name):
            fail(f"{info['script']}.py has no {name}: its dreams cannot be compared with reality")
    known = {f for f in script.Args.__dataclass_fields__}
    # A world of latent actions is compared with reality through its map from true ones.
    latent = "true_actions" in inspect.signature(script.DreamEnv).parameters
    return (
        script.DreamEnv(str(run), device=device, **({"true_actions": True} if latent else {})),
        script,
        script.Args(**{k: v for k, v in info["args"].items() if k in known}),
    )


def make_policy(kind, script, dream, args, device, seed):
    """A function (obs, is this the first step) -> action of one environment."""
    rng, space = np.random.default_rng(seed), dream.action_space
    if kind == "random":
        uniform = lambda: rng.uniform(-1, 1, space.shape).astype(np.float32)  # noqa: E731
        return lambda obs, first: int(rng.integers(space.n)) if hasattr(space, "n") else uniform()
    if not hasattr(script, "agent_policy"):
        fail(f"--policy agent: {script.__name__}.py has no agent_policy, use --policy random")
    extra = [args] if "args" in inspect.signature(script.agent_policy).parameters else []  # planners have settings
    policy, memory = script.agent_policy(dream.model, device, *extra), [None]

    def act(obs, first):
        memory[0] = None if first else memory[0]
        batch = {k: np.asarray(v)[None] for k, v in obs.items()}
        action, memory[0] = policy(batch, np.array([first]), memory[0])
        return action[0]

    return act


def play(env, act, steps):
    """One real episode of at most `steps` steps: {name: list}; observations have one entry more than the rest."""
    obs, _ = env.reset()
    out = dict(obs=[as_dict(obs)], action=[], reward=[], terminated=[])
    for t in range(steps):
        action = act(out["obs"][-1], t == 0)
        obs, reward, terminated, truncated, _ = env.step(action)
        out["obs"].append(as_dict(obs))
        for name, value in (("action", action), ("reward", float(reward)), ("terminated", bool(terminated))):
            out[name].append(value)
        if terminated or truncated:
            break
    return out


def windows(env, act, count, context, horizon, rng):
    """`count` windows of real experience: (episode, number of observations given as context). The dream starts at a
    random step between `context` and four times that, earlier where the episode is over before."""
    found, tries = [], 0
    while len(found) < count:
        tries += 1
        if tries > 20 * count:
            fail("the episodes are too short: almost none has two steps")
        episode = play(env, act, 4 * context + horizon)
        last = len(episode["action"]) - 1  # at least one step is left to be dreamed
        if last >= 1:
            found.append((episode, int(rng.integers(min(context, last), min(4 * context, last) + 1))))
    return found


# ---- The dream's side ------------------------------------------------------------------------------------------------


def dream_on(dream, episode, start, steps, seed):
    """One dream of `steps` steps from the context before `start`, with the true actions: observations, rewards, and
    the step (from 1) at which it said that the episode is over, or None. After that its last frame stays."""
    given = {k: np.stack([o[k] for o in episode["obs"][:start]]) for k in episode["obs"][0]}
    options = {"observations": given, "actions": np.stack(episode["action"][:start])}
    dream.reset(seed=seed, options=options)
    frames, rewards, end = [], [], None
    for t in range(steps):
        if end is None:
            obs, reward, terminated, truncated, _ = dream.step(episode["action"][start - 1 + t])
            frames.append(as_dict(obs))
            rewards.append(float(reward))
            if terminated:
                end = t + 1
            elif truncated and t + 1 < steps:
                fail("the dream was truncated by its own step limit: lower --horizon")
        else:
            frames.append(frames[-1])
            rewards.append(0.0)
    return frames, rewards, end


def scales(found):
    """{key: range of each number} by which differences are divided, so that errors have one unit. Discrete: None."""
    out = {}
    for key, first in found[0][0]["obs"][0].items():
        values = [np.asarray(o[key]) for episode, _ in found for o in episode["obs"]]
        if np.asarray(first).dtype == np.uint8:
            out[key] = np.float32(255)
        elif np.ndim(first) == 0 and np.issubdtype(np.asarray(first).dtype, np.integer):
            out[key] = None
        else:
            spread = np.ptp(np.stack(values), axis=0).astype(np.float32)
            out[key] = np.where(spread > 0, spread, 1)
    return out


def flat(obs, scale):
    """One observation as vectors in units of their range; Discrete entries stay as they are."""
    return {k: np.asarray(obs[k], np.float32).ravel() / (1 if s is None else np.ravel(s)) for k, s in scale.items()}


def difference(a, b, scale):
    """Squared differences of two flat observations, all keys after another; a wrong Discrete entry counts 1."""
    parts = [(a[k] != b[k]).astype(np.float32) if scale[k] is None else (a[k] - b[k]) ** 2 for k in scale]
    return np.concatenate([np.atleast_1d(p) for p in parts], -1)


# ---- What is measured ------------------------------------------------------------------------------------------------


def covered(truth, dreams, tolerance, rng, levels=LEVELS):
    """Whether each number of `truth` (M,) lies in the central part of `dreams` (N, M): {level: (M,) bool}. Ranks are
    uniform over 0..N if truth and dreams are drawn alike; ties get a random rank among themselves."""
    below = (dreams < truth - tolerance).sum(0)
    tied = (np.abs(dreams - truth) <= tolerance).sum(0)
    rank = below + rng.integers(tied + 1)
    n = len(dreams)
    out = {}
    for level in levels:
        cut = (1 - level) / 2 * (n + 1)  # ranks left out at either end
        if cut >= 1 - 1e-9:  # with fewer dreams the interval would need more than all of them
            out[level] = (rank >= round(cut)) & (rank <= n - round(cut))
    return out


def precision_recall(hits, said, true):
    """Two shares; None where there is nothing to be right or wrong about."""
    return (hits / said if said else None), (hits / true if true else None)


def reward_event(real):
    """A function reward -> whether it is an event, from all real rewards; None if they are all the same. Rewards of up
    to 20 values: nearest to a value that is not the most frequent one. Else: above the median."""
    values, counts = np.unique(np.round(real, 6), return_counts=True)
    if len(values) < 2:
        return None
    if len(values) <= 20:
        usual = np.argmax(counts)
        return lambda r: np.abs(np.subtract.outer(np.asarray(r), values)).argmin(-1) != usual
    middle = np.median(real)
    return lambda r: np.asarray(r) > middle


class Tally:
    """Sums over windows, per step of the horizon."""

    def __init__(self, horizon, levels):
        self.h, zero = horizon, lambda: np.zeros(horizon)
        self.error, self.mean_error, self.copy_error, self.count = zero(), zero(), zero(), zero()
        self.inside, self.moving = {level: zero() for level in levels}, zero()
        self.reward_inside, self.reward_count = {level: zero() for level in levels}, zero()
        self.hits, self.said, self.true, self.reward_error, self.steps = zero(), zero(), zero(), zero(), zero()
        self.end_hits, self.end_said, self.end_true = zero(), zero(), zero()  # ended by step h, cumulative
        self.windows, self.dreams, self.frames = 0, 0, True

    def add(self, episode, start, all_dreams, scale, event, tolerance, rng):
        truth = [flat(o, scale) for o in episode["obs"][start : start + self.h]]
        rewards, steps = episode["reward"][start - 1 :][: self.h], len(truth)
        last, N, self.frames = flat(episode["obs"][start - 1], scale), len(all_dreams), bool(scale)
        self.windows, self.dreams = self.windows + 1, self.dreams + N
        numbers = [k for k in scale if scale[k] is not None]
        reward_range = max(1e-6, float(np.ptp(episode["reward"])))
        for t in range(steps):
            flats = [flat(frames[t], scale) for frames, _, _ in all_dreams]
            self.count[t] += 1
            if scale:
                self.error[t] += np.mean([difference(f, truth[t], scale).mean() for f in flats])
                middle = {k: np.mean([f[k] for f in flats], 0) if k in numbers else flats[0][k] for k in scale}
                self.mean_error[t] += difference(middle, truth[t], scale).mean()
                self.copy_error[t] += difference(last, truth[t], scale).mean()
            for key in numbers:
                dreams = np.stack([f[key] for f in flats])
                moves = (np.abs(np.vstack([dreams, truth[t][key]]) - last[key]) > tolerance).any(0)
                for level, hit in covered(truth[t][key][moves], dreams[:, moves], tolerance, rng).items():
                    self.inside[level][t] += hit.mean() if len(hit) else 0.0
                self.moving[t] += bool(moves.any())  # windows count alike, however much moves in them
            dreamed = np.array([r[t] for _, r, _ in all_dreams])
            self.reward_error[t] += np.abs(dreamed - rewards[t]).mean()
            self.steps[t] += 1
            if event:
                said, true = event(dreamed), bool(event(rewards[t]))
                self.hits[t] += (said & true).mean()
                self.said[t] += said.mean()
                self.true[t] += true
                if said.any() or true:  # a reward that nobody doubts says nothing about calibration
                    for level, hit in covered(
                        np.array([rewards[t]]), dreamed[:, None], 0.01 * reward_range, rng
                    ).items():
                        self.reward_inside[level][t] += hit[0]
                    self.reward_count[t] += 1
        over = next((t + 1 for t, e in enumerate(episode["terminated"][start - 1 :][: self.h]) if e), None)
        known = self.h if over else len(rewards)  # beyond a truncation nobody knows when it would have ended
        for h in range(1, known + 1):
            ended = over is not None and over <= h
            said = np.mean([end is not None and end <= h for _, _, end in all_dreams])
            self.end_hits[h - 1] += said * ended
            self.end_said[h - 1] += said
            self.end_true[h - 1] += ended

    def rows(self):
        """[{step: h, measure: value}] for all steps of the horizon that any window reached."""
        out = []
        for t in range(self.h):
            n = self.count[t]
            if not n:
                break
            psnr = lambda total, n=n: float(-10 * np.log10(max(total / n, 1e-10))) if self.frames else None  # noqa: E731
            row = dict(step=t + 1, windows=int(n), psnr=psnr(self.error[t]), psnr_of_mean=psnr(self.mean_error[t]))
            row["psnr_copy"] = psnr(self.copy_error[t])
            for level in self.inside:
                row[f"coverage_{level:.0%}"] = self.inside[level][t] / self.moving[t] if self.moving[t] else None
                seen = self.reward_count[: t + 1].sum()
                inside = self.reward_inside[level][: t + 1].sum()
                row[f"reward_coverage_{level:.0%}"] = inside / seen if seen else None
            row["reward_mae"] = self.reward_error[t] / self.steps[t]
            pair = precision_recall(*(x[: t + 1].sum() for x in (self.hits, self.said, self.true)))
            row["reward_precision"], row["reward_recall"], row["reward_events"] = *pair, int(self.true[: t + 1].sum())
            pair = precision_recall(self.end_hits[t], self.end_said[t], self.end_true[t])
            row["end_precision"], row["end_recall"], row["ends"] = *pair, int(self.end_true[t])
            out.append(row)
        return out


def measure(run, flags):
    """All rows of one run, with a name for tables and pictures."""
    import torch

    torch.manual_seed(flags.seed)
    np.random.seed(flags.seed)
    device = "cuda" if torch.cuda.is_available() and not flags.no_cuda else "cpu"
    if device == "cpu":
        torch.set_num_threads(flags.threads)
    dream, script, args = load(run, device)
    rng = np.random.default_rng([flags.seed, zlib.crc32(b"dreams")])
    act = make_policy(flags.policy, script, dream, args, device, flags.seed)
    try:
        env = script.make_env(args, 0, KEY + flags.seed)()
    except Exception as e:  # a board game, say
        fail(f"{run}: cannot build {args.env_id} ({' '.join(str(e).split())})")
    found = windows(env, act, flags.windows, flags.context, flags.horizon, rng)
    env.close()
    event = reward_event([r for episode, _ in found for r in episode["reward"]])
    # A model without a decoder dreams latent states: only its rewards and ends can be compared.
    scale = scales(found) if shapes_of(dream.observation_space) == shapes_of(env.observation_space) else {}
    levels = [level for level in LEVELS if (1 - level) / 2 * (flags.dreams + 1) >= 1 - 1e-9]
    tally = Tally(flags.horizon, levels)
    for i, (episode, start) in enumerate(found):
        steps = min(flags.horizon, len(episode["action"]) - start + 1)
        dreams = [dream_on(dream, episode, start, steps, seed=1 + flags.seed + n) for n in range(flags.dreams)]
        tally.add(episode, start, dreams, scale, event, flags.tolerance, rng)
        if sys.stdout.isatty():
            print(f"\r{Path(run).name}: window {i + 1} of {len(found)}", end="", flush=True)
    print(f"{chr(13) if sys.stdout.isatty() else ''}{Path(run).name}: {len(found)} windows, {flags.dreams} dreams each")
    steps = (read_json(Path(run) / "result.json") or {}).get("global_step")
    trained = f"{steps:,} steps" if steps else "unfinished"
    title = f"{script.__name__}, {args.env_id}, {trained}, seed {args.seed}"
    return dict(run=Path(run).name, name=title, rows=tally.rows())


# ---- Writing ---------------------------------------------------------------------------------------------------------


def cell(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


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
    settings += f" beginning of the episode, at least {flags.context} steps where there are so many."
    parts = [f"# {name}", f"Written by `benchmarks/dreams.py`: {settings}", f"![{name}]({name}.png)"]
    frames = [[*counted(m, r), *(cell(r[k], 1) for k in ("psnr", "psnr_of_mean", "psnr_copy"))] for m, r in picked]
    head = ["run", "step"]
    parts += [
        "## Frames",
        "PSNR in dB, higher is better.",
        table([*head, "windows", "one dream", "mean of the dreams", "copy"], frames),
    ]
    keys = ("reward_precision", "reward_recall")
    events = [
        [*first(m, r), cell(r["reward_mae"], 3), *(cell(r[k]) for k in keys), str(r["reward_events"])]
        for m, r in picked
    ]
    parts += ["## Reward", "Events in steps 1..h; the error at step h.",
              table([*head, "mean absolute error", "precision", "recall", "real events"], events)]  # fmt: skip
    ends = [[*first(m, r), cell(r["end_precision"]), cell(r["end_recall"]), str(r["ends"])] for m, r in picked]
    parts += ["## Termination", "Ended within h steps.", table([*head, "precision", "recall", "real ends"], ends)]
    levels = [k for k in found[0]["rows"][0] if "coverage" in k]
    shares = [[*counted(m, r), *(cell(r[k]) for k in levels)] for m, r in picked]
    what = (
        "Share of true values inside the dreams' central interval: frames at step h, numbers that move only; rewards in"
    )
    what += " steps 1..h, where a dream or the truth has an event."
    parts += ["## Calibration", what, table([*head, "windows", *(k.replace("_", " ") for k in levels)], shares)]
    return "\n\n".join(parts) + "\n"


def picture(found, path):
    """NAME.png: four panels, one colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((frames, calibration), (reward, ends)) = plt.subplots(2, 2, figsize=(11, 7.5))
    styles = dict(zip(LEVELS, (":", "--", "-")))

    def line(axis, m, key, **look):
        points = [(r["step"], r[key]) for r in m["rows"] if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points), **look)

    for i, m in enumerate(found):
        color = f"C{i % 10}"
        line(frames, m, "psnr", color=color)
        frames.plot([], [], color=color, label=m["name"])
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
    frames.set(title="frames: a dream (-), mean of dreams (:), copy (--)", ylabel="PSNR, dB")
    calibration.set(title="calibration: truth inside the dreams' interval", ylabel="share", ylim=(-0.03, 1.03))
    reward.set(title="reward events up to here: recall (-), precision (--)", ylabel="share", ylim=(-0.03, 1.03))
    ends.set(title="episode over by here: recall (-), precision (--)", ylabel="share", ylim=(-0.03, 1.03))
    for axis in (frames, calibration, reward, ends):
        axis.set_xlabel("steps into the dream")
    frames.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--name", required=True, help="file name of the report, without suffix")
    parser.add_argument("--policy", choices=["agent", "random"], default="agent", help="who acts in the real episodes")
    parser.add_argument("--windows", type=at_least(1), default=20, help="real windows per run (default: 20)")
    parser.add_argument("--dreams", type=at_least(1), default=39, help="dreams per window (default: 39)")
    parser.add_argument("--horizon", type=at_least(1), default=50, help="steps of a dream (default: 50)")
    parser.add_argument("--context", type=at_least(1), default=16, help="least steps seen before it (default: 16)")
    tolerance = "values this close are tied, in units of the range (default: 0.02)"
    parser.add_argument("--tolerance", type=at_least(0, float), default=0.02, help=tolerance)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the real episodes and the dreams")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--no-cuda", action="store_true", help="do not use the GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: benchmarks/results)")
    flags = parser.parse_args()
    if Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    for run in flags.runs:
        if not (run / "args.json").is_file():
            fail(f"{run} is not a run directory: no args.json")
        if not any((run / name).is_file() for name in ("ckpt.pt", "ckpt.prev.pt")):
            fail(f"{run} has no checkpoint")
    if flags.dreams < 3:
        fail(f"--dreams must be at least 3 for a 50 % interval (9 for 80 %, 39 for 95 %), got {flags.dreams}")
    found = [measure(run.resolve(), flags) for run in flags.runs]
    flags.results.mkdir(parents=True, exist_ok=True)
    place = flags.results / flags.name
    rows = [dict(run=m["run"], name=m["name"]) | row for m in found for row in m["rows"]]
    with open(f"{place}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    Path(f"{place}.md").write_text(document(flags.name, found, flags), encoding="utf-8")
    picture(found, f"{place}.png")
    print(f"wrote {os.path.relpath(place)}.md, .csv and .png")


if __name__ == "__main__":
    main()
