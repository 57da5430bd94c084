"""How good are the dreams? Trained runs against their real environments.

    python benchmarks/dreams.py runs/A
    python benchmarks/dreams.py runs/A runs/B --name NAME
    python benchmarks/dreams.py runs/A --watch

Real episodes are played (--policy agent or random). From each, a window is cut: the true observations and actions from
the episode's beginning up to some step are given to the dream as context, since recurrent models need them all; then
the dream goes on with the true actions, --dreams times with different noise. Written into benchmarks/results: NAME.md,
NAME.csv and NAME.png, all runs side by side, and a NAME-RUN.gif for each: truth, dream and their difference below each
other, four windows side by side, the border green while the model sees the truth and red while it dreams. Without
--name all that is written into each run's directory, under the name dreams.

  * error: mean squared error per number, images in 0..1, vectors in symlog space, keys of a Dict alike. Of a dream at
    each step ("open loop") beside the last true frame repeated ("copy last"), the mean of all frames, and what the
    model makes of a frame that it sees ("posterior"); one step from a true past ("one step") beside the frame before
    ("copy previous"). Discrete observations do not count.
  * frames: PSNR of single dreams and of the mean of the dreams, beside the last true frame repeated ("copy"). Images
    count in 0..255; a number of a vector in its range over the real data; a Discrete observation is right or wrong. A
    dream that says it is over stays as it is.
  * reward: an event is a reward unlike the usual one (the most frequent value; where rewards are continuous, one in the
    upper half). Precision and recall of events at their exact step, in steps 1..h, and the mean absolute error.
  * termination: whether the dream says that the episode ends within h steps, against whether it did. Dreams are not
    followed beyond the true end, for which there are no true actions: a dream that ends later has missed it.
  * calibration: how often the truth lies in the central 50, 80 and 95 % of the dreams. If the truth is one more draw
    from the same distribution, each of its N+1 ranks is equally likely, so the nominal share is met exactly when
    (N+1) times half of what is left out is a whole number: N = 39 serves all three. Ties are broken at random, values
    within --tolerance count as tied, and only numbers that move are counted: those where the truth or a dream differs
    from the last frame seen. Above the nominal share the dreams are too unsure, below it too sure of themselves.

--watch follows a training that is running: for each new checkpoint it adds the errors (eval/open_loop_mse and the
others) and the GIF (eval/open_loop, also RUN/videos/open_loop-STEP.gif) to the run's TensorBoard, in an event file of
its own, until the training is done or Ctrl-C. (A tensorboard that runs with --load_fast false reads both files only
with --reload_multifile true.)

A script must offer load and make_env, its agent act, observe and imagine. Those that still have a DreamEnv instead are
measured as well, without posterior, one step and GIF (they write their own into RUN/videos). Where the dream's
observations are not the environment's but latent states, rewards and ends alone are measured.
"""

import contextlib
import inspect
import io
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path

import common
import dreams_report
import numpy as np
from common import at_least, choose_device, fail, load_run, pick, read_json, stack
from dreams_report import ERRORS, LEVELS
from pictures import caption, draw, is_image, save_gif

KEY = 424_242  # of the real episodes' seeds: no training, report or evaluation uses it
AHEAD = 8  # rows of a window that are predicted one step ahead: each costs a pass over the episode before it
COLUMNS = 4  # windows side by side in the GIF
SUFFIX = ".dreams"  # of the event file of --watch
PAUSE, TRIES = 2.0, 5  # seconds between two looks of --watch, and how often a checkpoint may fail to load

# All dreams of a window: frames {key: (N, S, ...)}, rewards (N, S), ends (N,): the step (from 1) at which a dream says
# that the episode is over, or infinity. seen {key: (T, ...)}: what the model makes of each true frame of the episode.
# ahead {t: {key: (1, ...)}}: frame t predicted from all before it. The last two are None and {} where a script has no
# way to tell.
Dream = namedtuple("Dream", "frames rewards ends seen ahead")


# ---- The dream's side ------------------------------------------------------------------------------------------------


def as_dict(obs):
    return obs if isinstance(obs, dict) else {"observation": obs}


class Seam:
    """The dreams of an agent with `observe` and `imagine`: all of a window at once, as a batch."""

    def __init__(self, script, agent):
        self.script, self.agent, self.args = script, agent, agent.args
        self.steps = agent.global_step
        self.code = getattr(agent, "latent_action", lambda action: action)  # for worlds of latent actions

    def make_env(self, seed):
        return self.script.make_env(self.args, seed=seed)

    def act(self, obs, state, first):
        return self.agent.act(obs, state, first)

    def observe(self, episode, count):
        """The state after the first `count` observations, and what the model makes of each of them."""
        actions = np.stack([self.code(a) for a in episode["action"]])[None, : count - 1]
        return self.agent.observe(stack([stack(episode["obs"][:count])]), actions)

    def imagine(self, state, action):
        return self.agent.imagine(state, np.stack([self.code(action)] * len(state[0])))

    def dream(self, episode, start, steps, count, rows=()):
        """`count` dreams after `start` observations, `steps` steps with the true actions; `rows`: the frames that are
        to be predicted one step ahead."""
        state, _ = self.observe(episode, start)
        state = tuple(s.repeat_interleave(count, 0) for s in state)
        frames, rewards, alive = [], [], []
        for action in episode["action"][start - 1 :][:steps]:
            state, reward, goes_on, obs = self.imagine(state, action)
            frames.append(obs)
            rewards.append(np.asarray(reward))
            alive.append(np.asarray(goes_on))
        over = np.stack(alive, 1) < 0.5  # (N, S)
        ends = np.where(over.any(1), over.argmax(1) + 1, np.inf)
        ahead = {t: as_dict(self.imagine(self.observe(episode, t)[0], episode["action"][t - 1])[3]) for t in rows}
        seen = as_dict(pick(self.observe(episode, start + steps)[1], 0))
        return Dream(as_dict(stack(frames, 1)), np.stack(rewards, 1), ends, seen, ahead)


class Old:
    """The same for scripts that have a DreamEnv and no `load`, one dream after another. Goes with the last of them."""

    def __init__(self, script, run, device, seed):
        import torch

        for name in ("DreamEnv", "Args", "make_env"):
            if not hasattr(script, name):
                fail(f"{script.__name__}.py has no {name}: its dreams cannot be compared with reality")
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.script, self.device, self.seed = script, device, seed
        # A world of latent actions is compared with reality through its map from true ones.
        latent = "true_actions" in inspect.signature(script.DreamEnv).parameters
        self.env = script.DreamEnv(str(run), device=device, **({"true_actions": True} if latent else {}))
        known, saved = script.Args.__dataclass_fields__, read_json(Path(run) / "args.json")["args"]
        self.args = script.Args(**{k: v for k, v in saved.items() if k in known})
        self.steps, self.policy = (read_json(Path(run) / "result.json") or {}).get("global_step"), None

    def make_env(self, seed):
        return self.script.make_env(self.args, 0, seed)()

    def act(self, obs, state, first):
        if self.policy is None:
            if not hasattr(self.script, "agent_policy"):
                fail(f"--policy agent: {self.script.__name__}.py has no agent_policy, use --policy random")
            make = self.script.agent_policy  # those of planners take settings
            extra = [self.args] if "args" in inspect.signature(make).parameters else []
            self.policy = make(self.env.model, self.device, *extra)
        return self.policy(as_dict(obs), first, state)

    def dream(self, episode, start, steps, count, rows=()):
        given = {"observations": as_dict(stack(episode["obs"][:start])), "actions": np.stack(episode["action"][:start])}
        frames, rewards, ends = [], np.zeros((count, steps)), np.full(count, np.inf)
        for n in range(count):
            self.env.reset(seed=1 + self.seed + n, options=given)
            dreamed = []
            for t in range(steps):
                if ends[n] < np.inf:
                    dreamed.append(dreamed[-1])
                    continue
                obs, rewards[n, t], terminated, truncated, _ = self.env.step(episode["action"][start - 1 + t])
                dreamed.append(as_dict(obs))
                if terminated:
                    ends[n] = t + 1
                elif truncated and t + 1 < steps:
                    fail("the dream was truncated by its own step limit: lower --horizon")
            frames.append(stack(dreamed))
        return Dream(stack(frames), rewards, ends, None, {})


def open_run(run, device, seed):
    """The dreams of a run directory, whichever shape its script has."""
    info = read_json(Path(run) / "args.json")
    script = common.load_script(info["script"], str(run)) if isinstance(info, dict) and "script" in info else None
    if script is not None and not hasattr(script, "load"):
        return Old(script, run, device, seed)
    script, agent = load_run(run, device)
    agent.seed(seed)
    return Seam(script, agent)


# ---- The real side ---------------------------------------------------------------------------------------------------


def play(env, act, steps):
    """One real episode of at most `steps` steps: {name: list}; observations have one entry more than the rest."""
    batch = stack([env.reset()[0]])  # a copy: some environments write every observation into the same array
    out, state = dict(obs=[pick(batch, 0)], action=[], reward=[], terminated=[]), None
    for t in range(steps):
        actions, state = act(batch, state, np.array([t == 0]))
        obs, reward, terminated, truncated, _ = env.step(actions[0])
        batch = stack([obs])
        values = pick(batch, 0), actions[0], float(np.asarray(reward).item()), bool(terminated)
        for name, value in zip(out, values, strict=True):
            out[name].append(value)
        if terminated or truncated:
            break
    return out


def windows(env, act, count, context, horizon, rng, name="windows"):
    """`count` windows of real experience: (episode, number of observations given as context). The dream starts at a
    random step between `context` and four times that; in short episodes anywhere in their second half."""
    found, tries, progress = [], 0, common.Progress()
    while len(found) < count:
        tries += 1
        if tries > 20 * count:
            fail("the episodes are too short: almost none has two steps")
        episode = play(env, act, 4 * context + horizon)
        last = len(episode["action"]) - 1  # at least one step is left to be dreamed
        if last >= 1:
            least = min(context, (last + 1) // 2)
            found.append((episode, int(rng.integers(least, min(4 * context, last) + 1))))
        progress(f"{name}: played {len(found)} of {count} episodes")
    return found


def scales(found):
    """{key: range of each number} by which differences are divided, so that errors have one unit. Discrete: None."""
    out = {}
    for key, first in as_dict(found[0][0]["obs"][0]).items():
        if np.asarray(first).dtype == np.uint8:
            out[key] = np.float32(255)
        elif np.ndim(first) == 0 and np.issubdtype(np.asarray(first).dtype, np.integer):
            out[key] = None
        else:
            values = [np.asarray(as_dict(o)[key]) for episode, _ in found for o in episode["obs"]]
            spread = np.ptp(np.stack(values), axis=0).astype(np.float32)
            out[key] = np.where(spread > 0, spread, 1)
    return out


def flat(obs, scale, lead=0):
    """Observations, behind `lead` axes, as vectors in units of their range; Discrete entries stay as they are."""
    out = {}
    for key, s in scale.items():
        value = np.asarray(obs[key], np.float32)
        out[key] = value.reshape(*value.shape[:lead], -1) / (1 if s is None else np.ravel(s))
    return out


def difference(a, b, scale):
    """Squared differences of two flat observations, all keys after another; a wrong Discrete entry counts 1."""
    parts = [(a[k] != b[k]).astype(np.float32) if scale[k] is None else (a[k] - b[k]) ** 2 for k in scale]
    return np.concatenate(parts, -1)


class Tally:
    """Values by name and step of the horizon; the step counts from 1, rows before the dream have 0 and less."""

    def __init__(self):
        self.values = {}

    def note(self, name, step, value):
        self.values.setdefault(name, {}).setdefault(step, []).append(float(value))

    def at(self, name, step):
        return self.values.get(name, {}).get(step, [])

    def upto(self, name, step):
        return [v for t, values in self.values.get(name, {}).items() if t <= step for v in values]


def mean(values):
    """None where there are none."""
    return float(np.mean(values)) if values else None


# ---- Squared errors --------------------------------------------------------------------------------------------------


def in_loss_units(obs):
    """{key: (...) float}: images in 0..1, vectors in symlog space; without Discrete entries."""
    values = {k: np.asarray(v) for k, v in as_dict(obs).items()}
    image = {k: v.astype(np.float32) / 255 for k, v in values.items() if v.dtype == np.uint8}
    vector = {k: np.sign(v) * np.log1p(np.abs(v)) for k, v in values.items() if np.issubdtype(v.dtype, np.floating)}
    return image | vector


def square(prediction, target):
    """Mean squared error per number, all keys alike; `prediction` may be a batch of them."""
    return float(np.mean([((prediction[k] - target[k]) ** 2).mean() for k in target]))


class Errors:
    """Squared errors of dreams and of the trivial predictors. The rows that count are the last `context` ones before
    the dream, which the model sees, and those that are dreamed."""

    def __init__(self, found, context, horizon):
        self.context, self.horizon, self.tally = context, horizon, Tally()
        rows, total = [(e, t) for e, start in found for t in self.rows(e, start)], {}
        for episode, t in rows:
            total = {k: total.get(k, 0.0) + v.astype(float) for k, v in in_loss_units(episode["obs"][t]).items()}
        self.mean = {k: v / len(rows) for k, v in total.items()}

    def rows(self, episode, start):
        return range(max(0, start - self.context), min(start + self.horizon, len(episode["obs"])))

    def ahead(self, episode, start):
        """The rows that are predicted one step ahead, evenly spread."""
        rows = [t for t in self.rows(episode, start) if t]
        return sorted({rows[int(i)] for i in np.linspace(0, len(rows) - 1, AHEAD).round()})

    def add(self, episode, start, dream):
        truth, frames = [in_loss_units(o) for o in episode["obs"]], in_loss_units(dream.frames)
        for t in self.rows(episode, start) if self.mean else ():
            step, said = t - start + 1, {"mean_frame_mse": self.mean}
            if dream.seen:
                said["posterior_mse"] = in_loss_units(pick(dream.seen, t))
            if t in dream.ahead:
                said |= {"one_step_mse": in_loss_units(dream.ahead[t]), "copy_previous_mse": truth[t - 1]}
            if step > 0:
                said["open_loop_mse"] = {k: v[:, step - 1] for k, v in frames.items()}
                said["copy_last_mse"] = truth[start - 1]
            for name, prediction in said.items():
                self.tally.note(name, step, square(prediction, truth[t]))

    def means(self):
        """{name: mean over all rows}, of the errors that there are."""
        return {name: mean(self.tally.upto(name, np.inf)) for name in ERRORS if name in self.tally.values}


def look(world, found, errors, count, name="dreams"):
    """Dream about every window: yields (episode, start, Dream) and adds to `errors`."""
    progress = common.Progress()
    for i, (episode, start) in enumerate(found):
        steps = min(errors.horizon, len(episode["action"]) - start + 1)
        dream = world.dream(episode, start, steps, count, errors.ahead(episode, start))
        if same_kind(dream, episode):
            errors.add(episode, start, dream)
        yield episode, start, dream
        progress(f"{name}: dreamed about {i + 1} of {len(found)} windows")


def same_kind(dream, episode):
    """Whether the dream is of the environment's observations, not of latent states."""
    real = {k: np.shape(v) for k, v in as_dict(episode["obs"][0]).items()}
    return {k: v.shape[2:] for k, v in dream.frames.items()} == real


def open_loop_errors(agent, found, context, horizon, dreams=1):
    """The means of ERRORS over `windows` of real experience, for an agent with the seam: {name: error}."""
    errors = Errors(found, context, horizon)
    for _ in look(Seam(None, agent), found, errors, dreams):
        pass
    return errors.means()


# ---- Rewards, ends, calibration, PSNR --------------------------------------------------------------------------------


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
    """Two shares, from lists; None where there is nothing to be right or wrong about."""
    return tuple(sum(hits) / sum(x) if sum(x) else None for x in (said, true))


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


def compare(tally, episode, start, dream, scale, event, levels, flags, rng):
    """Note all of one window but the squared errors. `scale`: of what can be compared, {} where frames can't be."""
    rewards, truths = episode["reward"][start - 1 :][: flags.horizon], [as_dict(o) for o in episode["obs"]]
    row, every = np.arange(len(rewards)), np.arange(len(dream.ends))
    dreamed = np.where(row < dream.ends[:, None], dream.rewards, 0)  # (N, S): a dream that is over has no rewards
    stays = np.minimum(row, dream.ends[:, None] - 1).astype(int)  # (N, S): and keeps its last frame
    last, numbers = flat(truths[start - 1], scale), [k for k in scale if scale[k] is not None]
    reward_range = max(1e-6, float(np.ptp(episode["reward"])))
    for t, reward in enumerate(rewards):
        note = lambda name, value, t=t: tally.note(name, t + 1, value)  # noqa: E731
        truth = flat(truths[start + t], scale)
        said = flat({k: v[every, stays[:, t]] for k, v in dream.frames.items()}, scale, 1)  # {key: (N, M)}
        if scale:
            middle = {k: v.mean(0) if k in numbers else v[0] for k, v in said.items()}
            for name, guess in (("psnr", said), ("psnr_of_mean", middle), ("psnr_copy", last)):
                note(name, difference(guess, truth, scale).mean())
        for key in numbers:
            moves = (np.abs(np.vstack([said[key], truth[key]]) - last[key]) > flags.tolerance).any(0)
            if moves.any():  # windows count alike, however much moves in them
                for level, hit in covered(truth[key][moves], said[key][:, moves], flags.tolerance, rng, levels).items():
                    note(f"coverage_{level:.0%}", hit.mean())
        note("reward_mae", np.abs(dreamed[:, t] - reward).mean())
        if event:
            claims, true = event(dreamed[:, t]), bool(event(reward))
            for name, value in (("hits", (claims & true).mean()), ("said", claims.mean()), ("true", true)):
                note(name, value)
            if claims.any() or true:  # a reward that nobody doubts says nothing about calibration
                hits = covered(np.array([reward]), dreamed[:, t : t + 1], 0.01 * reward_range, rng, levels)
                for level, hit in hits.items():
                    note(f"reward_coverage_{level:.0%}", hit[0])
    over = next((t + 1 for t, e in enumerate(episode["terminated"][start - 1 :][: flags.horizon]) if e), np.inf)
    known = flags.horizon if over < np.inf else len(rewards)  # nobody knows when a truncated one would have ended
    for h in range(1, known + 1):
        said, true = (dream.ends <= h).mean(), over <= h
        for name, value in (("end_hits", said * true), ("end_said", said), ("end_true", true)):
            tally.note(name, h, value)


def summary(tally, errors, levels):
    """[{step: h, measure: value}] for all steps of the horizon that any window reached."""
    out = []
    for h in sorted(tally.values["reward_mae"]):
        row = dict(step=h, windows=len(tally.at("reward_mae", h)))
        row |= {name: mean(errors.tally.at(name, h)) for name in ERRORS}
        for name in ("one_step_mse", "copy_previous_mse"):  # these do not depend on the horizon
            row[name] = errors.means().get(name)
        for name in ("psnr", "psnr_of_mean", "psnr_copy"):
            error = mean(tally.at(name, h))
            row[name] = None if error is None else float(-10 * np.log10(max(error, 1e-10)))
        for level in levels:
            row[f"coverage_{level:.0%}"] = mean(tally.at(f"coverage_{level:.0%}", h))
            row[f"reward_coverage_{level:.0%}"] = mean(tally.upto(f"reward_coverage_{level:.0%}", h))
        row["reward_mae"] = mean(tally.at("reward_mae", h))
        pair = precision_recall(*(tally.upto(name, h) for name in ("hits", "said", "true")))
        row["reward_precision"], row["reward_recall"], row["reward_events"] = *pair, int(sum(tally.upto("true", h)))
        pair = precision_recall(*(tally.at(name, h) for name in ("end_hits", "end_said", "end_true")))
        row["end_precision"], row["end_recall"], row["ends"] = *pair, int(sum(tally.at("end_true", h)))
        out.append(row)
    return out


# ---- A run -----------------------------------------------------------------------------------------------------------


def device_of(flags):
    import torch

    device = choose_device(flags.no_cuda)
    if device == "cpu":
        torch.set_num_threads(flags.threads)
    return device


def record(world, name, flags, rng):
    """(observation space, windows) of a run's environment."""
    try:
        env = world.make_env(KEY + flags.seed)
    except Exception as e:  # a board game, say
        fail(f"{name}: cannot build {world.args.env_id} ({' '.join(str(e).split())})")
    act = world.act if flags.policy == "agent" else common.random_policy(env.action_space, flags.seed)
    try:
        return env.observation_space, windows(env, act, flags.windows, flags.context, flags.horizon, rng, name)
    finally:
        env.close()


def measure(run, flags):
    """All rows of one run, with a name for tables and pictures, and the frames of its GIF."""
    world = open_run(run, device_of(flags), flags.seed)
    rng = np.random.default_rng([flags.seed, zlib.crc32(b"dreams")])
    space, found = record(world, run.name, flags, rng)
    event = reward_event([r for episode, _ in found for r in episode["reward"]])
    levels = [level for level in LEVELS if (1 - level) / 2 * (flags.dreams + 1) >= 1 - 1e-9]
    tally, errors, scale, shown = Tally(), Errors(found, flags.context, flags.horizon), scales(found), []
    for episode, start, dream in look(world, found, errors, flags.dreams, run.name):
        # A model without a decoder dreams latent states: only its rewards and ends can be compared.
        usable = scale if same_kind(dream, episode) else {}
        compare(tally, episode, start, dream, usable, event, levels, flags, rng)
        shown = keep(shown, episode, start, dream, flags.context)
    print(f"{run.name}: {len(found)} windows, {flags.dreams} dreams each", flush=True)
    trained = f"{world.steps:,} steps" if world.steps else "unfinished"
    title = f"{world.script.__name__}, {world.args.env_id}, {trained}, seed {world.args.seed}"
    frames = gif_frames(space, shown, flags.context, flags.horizon) if isinstance(world, Seam) else None
    return dict(run=run.name, name=title, rows=summary(tally, errors, levels), errors=errors.means(), frames=frames)


# ---- The GIF ---------------------------------------------------------------------------------------------------------


def keep(shown, episode, start, dream, context):
    """The windows that are longest so far, with the first of their dreams: [(episode, start, Dream)] for the GIF."""
    dream = dream._replace(frames={k: v[:1].copy() for k, v in dream.frames.items()})
    length = lambda x: min(x[1], context) + x[2].rewards.shape[1]  # noqa: E731
    return sorted([*shown, (episode, start, dream)], key=length, reverse=True)[:COLUMNS]


def column(real, truth, said, color):
    """Truth, model and difference below each other; difference of pictures, or bars of differences of numbers."""
    image = any(is_image(v) for v in truth.values())
    same = {k: np.shape(v) for k, v in truth.items()} == {k: np.shape(v) for k, v in said.items()}

    def paint(space, obs):
        obs = obs if hasattr(real, "spaces") else obs["observation"]
        return draw(space, obs, 128 if image else 192)

    pictures = [paint(real, truth), paint(real if same else None, said)]
    if same and image:
        pictures.append(((pictures[1].astype(int) - pictures[0]) // 2 + 128).astype(np.uint8))
    elif same:
        pictures.append(paint(None, {k: np.asarray(said[k], np.float32) - v for k, v in truth.items()}))
    widest, cells = max(p.shape[1] for p in pictures), []
    for picture, border in zip(pictures, ((0, 0, 0), color, (0, 0, 0))):
        cells.append(np.full((len(picture) + 6, widest + 6, 3), border, np.uint8))
        cells[-1][3:-3, 3 : picture.shape[1] + 3] = picture
    return np.concatenate(cells)


def gif_frames(space, shown, context, horizon):
    """Frames of the open-loop GIF: windows aligned where the dream begins. Outside its episode a window stands still,
    with a grey border."""
    seen = min(context, max(start for _, start, _ in shown))
    frames, dreamed = [], min(horizon, max(dream.rewards.shape[1] for *_, dream in shown))
    for t in range(-seen, dreamed):
        columns = []
        for episode, start, dream in shown:
            row = int(np.clip(start + t, 0, start + dream.rewards.shape[1] - 1))
            said = pick(dream.seen, row) if row < start else {k: v[0, row - start] for k, v in dream.frames.items()}
            color = (110, 110, 110) if row != start + t else (0, 180, 0) if row < start else (220, 0, 0)
            columns.append(column(space, as_dict(episode["obs"][row]), said, color))
        what = "the model sees" if t < 0 else f"the model dreams, step {t + 1}"
        frames.append(caption(np.concatenate(columns, 1), f"{what}: truth, model, difference"))
    return frames


# ---- Following a training --------------------------------------------------------------------------------------------


def glance(world, name, flags):
    """(errors, frames of the GIF) of a run's checkpoint."""
    space, found = record(world, name, flags, np.random.default_rng(flags.seed))
    errors, shown = Errors(found, flags.context, flags.horizon), []
    for episode, start, dream in look(world, found, errors, flags.dreams, name):
        shown = keep(shown, episode, start, dream, flags.context)
    return errors.means(), gif_frames(space, shown, flags.context, flags.horizon)


def log(writer, run, step, errors, frames):
    """Errors and GIF into TensorBoard; the GIF also into RUN/videos."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, value in errors.items():
        writer.add_scalar(f"eval/{name}", value, step)
    (run / "videos").mkdir(exist_ok=True)
    save_gif(frames, path := run / "videos" / f"open_loop-{step}.gif")
    height, width, _ = frames[0].shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
    # NOTE: add_video would encode anew, and needs a fitting moviepy.
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="eval/open_loop", image=image)]), step)
    writer.flush()


def version(path):
    """What changes when a file is replaced; None while there is none."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino


def watch(run, flags):
    """Measure each new checkpoint of a run until its training is done."""
    from torch.utils.tensorboard import SummaryWriter

    script = common.load_script(read_json(run / "args.json")["script"], str(run))
    if not hasattr(script, "load"):
        fail(f"--watch: {script.__name__}.py draws its own dreams while it trains, see {run}/videos")
    print(f"{run.name}: waiting for checkpoints until the training is done; Ctrl-C ends this", flush=True)
    seen = last = writer = None
    failures = 0
    try:
        while True:
            new, began, said = version(run / "ckpt.pt"), time.monotonic(), io.StringIO()
            if new in (None, seen):
                # A result that is older than the checkpoint is from before the run was resumed.
                if (result := version(run / "result.json")) and (new is None or result[0] >= new[0]):
                    break
                time.sleep(PAUSE)
                continue
            try:
                with contextlib.redirect_stderr(said):
                    world = Seam(*load_run(run, device_of(flags)))
            except (Exception, SystemExit):  # it is being replaced at this very moment
                failures += 1
                if failures == TRIES:
                    print(said.getvalue(), end="", file=sys.stderr)
                    raise
                time.sleep(PAUSE)
                continue
            seen, failures = new, 0
            if world.steps != last:
                world.agent.seed(flags.seed)
                errors, frames = glance(world, run.name, flags)
                writer = writer or SummaryWriter(str(run), filename_suffix=SUFFIX)
                log(writer, run, last := world.steps, errors, frames)
                words = [f"global_step={last}", *(f"{k}={v:.3g}" for k, v in errors.items())]
                print(", ".join(words) + f" ({time.monotonic() - began:.1f} s)", flush=True)
    except KeyboardInterrupt:
        print()
    finally:
        if writer:
            writer.close()
            print(f"wrote the dreams into {run}/videos and its TensorBoard")


# ---- The command line -----------------------------------------------------------------------------------------------


def main(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--name", help="file name of the report, without suffix (default: one in each run)")
    parser.add_argument("--watch", action="store_true", help="follow a running training instead of writing a report")
    parser.add_argument("--policy", choices=["agent", "random"], default="agent", help="who acts in the real episodes")
    parser.add_argument("--windows", type=at_least(1), help="real windows per run (default: 20, with --watch 4)")
    parser.add_argument("--dreams", type=at_least(1), help="dreams per window (default: 39, with --watch 4)")
    parser.add_argument("--horizon", type=at_least(1), help="steps of a dream (default: 50, with --watch 32)")
    parser.add_argument("--context", type=at_least(1), default=16, help="least steps seen before it (default: 16)")
    tolerance = "values this close are tied, in units of the range (default: 0.02)"
    parser.add_argument("--tolerance", type=at_least(0, float), default=0.02, help=tolerance)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the real episodes and the dreams")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--no-cuda", action="store_true", help="do not use the GPU")
    where = "where to write (default: benchmarks/results)"
    parser.add_argument("--results", type=Path, default=common.RESULTS, help=where)
    flags = parser.parse_args(argv)
    for key, usual, brief in (("windows", 20, 4), ("dreams", 39, 4), ("horizon", 50, 32)):
        if getattr(flags, key) is None:
            setattr(flags, key, brief if flags.watch else usual)
    for run in flags.runs:
        if not (run / "args.json").is_file():
            fail(f"{run} is not a run directory: no args.json")
        if not flags.watch and not any((run / name).is_file() for name in ("ckpt.pt", "ckpt.prev.pt")):
            fail(f"{run} has no checkpoint")
    if flags.watch:
        if len(flags.runs) > 1:
            fail(f"--watch follows one run, got {len(flags.runs)}")
        return watch(flags.runs[0].resolve(), flags)
    if flags.name is not None and (not flags.name or Path(flags.name).name != flags.name):
        fail(f"--name must be a file name, got {flags.name!r}")
    if flags.dreams < 3:
        fail(f"--dreams must be at least 3 for a 50 % interval (9 for 80 %, 39 for 95 %), got {flags.dreams}")
    if flags.name:
        dreams_report.write([measure(run.resolve(), flags) for run in flags.runs], flags, flags.results, flags.name)
    else:
        for run in flags.runs:
            dreams_report.write([measure(run.resolve(), flags)], flags, run, "dreams")


if __name__ == "__main__":
    common.run_tool(main)
