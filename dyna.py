# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["numpy>=2", "tyro>=1", "pillow>=10", "matplotlib>=3.9", "gymnasium[box2d,classic-control]>=1.3,<2"]
# ///
"""Dyna: integrated planning, acting and learning, with a table as the world model.
Sutton, ICML 1990; Sutton and Barto, Reinforcement Learning, 2nd ed. (2018), chapter 8.

The idea behind all other scripts here, in its smallest form: every real step teaches the values (Q-learning) and a
model of the world; the model then supplies imagined steps that teach the values by the same rule. Dyna-Q imagines any
step that it knows; Dyna-Q+ adds a bonus for what was not tried for long; prioritized sweeping imagines where values
change.

    python dyna.py                                              # Dyna-Q in the textbook's maze: a second
    python dyna.py --algorithm prioritized_sweeping             # or dyna_q_plus
    python dyna.py --env-id FrozenLake-v1 --env-kwargs '{"is_slippery": false}' --epsilon 0.2 --total-episodes 300
    python dyna.py --experiment figure_8_2                      # the textbook's experiments: figure_8_4, figure_8_5,
                                                                # example_8_4; a PNG and the numbers
Deviations from the textbook, and what it leaves open:
  * Ties between greedy actions are broken at random (an agent that does not would stay in its corner for long).
  * The model keeps the last outcome of a pair, as the textbook's does; it is made for deterministic worlds.
  * No checkpoints: a run takes seconds.

S states, A actions, n planning steps. Q is a list of S lists of A numbers; plain lists are faster than arrays here.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from PIL import Image


@dataclass
class Args:
    env_id: str = "DynaMaze-v0"  # any gymnasium id with Discrete observations and actions
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make
    algorithm: Literal["dyna_q", "dyna_q_plus", "prioritized_sweeping"] = "dyna_q"  # what is imagined
    planning_steps: int = 50  # n, imagined steps per real step; 0 is Q-learning
    total_episodes: int = 50  # real episodes
    alpha: float = 0.1  # step size
    gamma: float = 0.95  # discount
    epsilon: float = 0.1  # share of random actions
    kappa: float = 1e-3  # Dyna-Q+: the bonus of a pair that was not tried for tau steps is kappa sqrt(tau)
    theta: float = 1e-4  # prioritized sweeping: least change that is worth a place in the queue
    seed: int = 1  # seed of everything random
    eval_episodes: int = 20  # greedy episodes at the end, and episodes of a random policy
    exp_name: str = "dyna"  # part of the run directory's name
    experiment: Optional[Literal["figure_8_2", "figure_8_4", "figure_8_5", "example_8_4"]] = None  # of the textbook
    runs: Optional[int] = None  # repetitions of an experiment (None: the textbook's)


# ---- Mazes -----------------------------------------------------------------------------------------------------------

# Six rows: S start, G goal, # wall. "after" replaces the maze at a real step.
DYNA = [".......#G", "..#....#.", "S.#....#.", "..#......", ".....#...", "........."]
BLOCKED_RIGHT = ["........G", ".........", ".........", ".########", ".........", "...S....."]
BLOCKED_LEFT = ["........G", ".........", ".........", "########.", ".........", "...S....."]
OPEN_BOTH = ["........G", ".........", ".........", ".#######.", ".........", "...S....."]
MAZES = {
    "DynaMaze-v0": dict(maze=DYNA),
    "BlockingMaze-v0": dict(maze=BLOCKED_LEFT, after=BLOCKED_RIGHT, change=1000),
    "ShortcutMaze-v0": dict(maze=BLOCKED_RIGHT, after=OPEN_BOTH, change=3000),
}
MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1)]  # up, down, left, right


def maze_step(s, a, maze=DYNA):
    """A step in a maze: s (row, column), a -> s2, reward, done. Walls and borders leave everything as it is; entering
    the goal gives 1."""
    row, column = s[0] + MOVES[a][0], s[1] + MOVES[a][1]
    inside = 0 <= row < len(maze) and 0 <= column < len(maze[0]) and maze[row][column] != "#"
    s2 = (row, column) if inside else tuple(s)
    done = maze[s2[0]][s2[1]] == "G"
    return s2, float(done), done


def cells(maze, mark):
    """Places (row, column) of a mark."""
    return [(i, j) for i, row in enumerate(maze) for j, c in enumerate(row) if c == mark]


def enlarge(maze, scale):
    """The maze with scale x scale cells for each; one start."""
    big = ["".join(c * scale for c in row) for row in maze for _ in range(scale)]
    i, j = cells(big, "S")[0]
    big = [row.replace("S", ".") for row in big]
    return big[:i] + [big[i][:j] + "S" + big[i][j + 1 :]] + big[i + 1 :]


def shortest_path(maze):
    """Actions from start to goal, by breadth-first search."""
    level, seen, steps = cells(maze, "S"), set(), 0
    while not any(maze[i][j] == "G" for i, j in level):
        seen |= set(level)
        level = list({maze_step(s, a, maze)[0] for s in level for a in range(4)} - seen)
        steps += 1
    return steps


class Maze(gym.Env):
    """A gridworld of the textbook; states are numbered row by row."""

    def __init__(self, maze=DYNA, after=None, change=0):
        self.maze, self.after, self.change, self.clock, self.columns = maze, after, change, 0, len(maze[0])
        self.observation_space, self.action_space = spaces.Discrete(len(maze) * self.columns), spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = cells(self.maze, "S")[0]
        return self.place[0] * self.columns + self.place[1], {}

    def step(self, action):
        self.clock += 1  # over all episodes
        if self.after and self.clock == self.change + 1:
            self.maze, self.after = self.after, None
        self.place, reward, done = maze_step(self.place, action, self.maze)
        return self.place[0] * self.columns + self.place[1], reward, done, False, {}


for name, kwargs in MAZES.items():
    gym.register(name, entry_point=Maze, kwargs=kwargs, max_episode_steps=10_000)


# ---- Learning and planning -------------------------------------------------------------------------------------------


def q_update(Q, s, a, r, s2, done, alpha, gamma):
    """Q-learning: Q(s, a) += alpha (r + gamma max Q(s2, .) - Q(s, a)); nothing follows where the episode is done."""
    row = Q[s]
    row[a] += alpha * (r + (0.0 if done else gamma * max(Q[s2])) - row[a])


def exploration_bonus(tau, kappa):
    """Bonus of Dyna-Q+ for a pair that was not tried for tau real steps: kappa sqrt(tau)."""
    return kappa * math.sqrt(tau)


class Model:
    """What every tried pair led to the last time: outcome[s][a] = (r, s2, done)."""

    def __init__(self, states, actions, all_actions=False):
        """all_actions: pairs never tried in a visited state count as (0, s), as Dyna-Q+ wants it."""
        self.outcome, self.time = ([[None] * actions for _ in range(states)] for _ in range(2))
        self.visited, self.tried = [], [[] for _ in range(states)]  # states, and actions tried in each
        self.before, self.all_actions, self.now = [set() for _ in range(states)], all_actions, 0
        self.useful = False  # whether an outcome has ever had a reward

    def learn(self, s, a, r, s2, done):
        self.now += 1
        if not self.tried[s]:
            self.visited.append(s)
            if self.all_actions:
                self.tried[s] = list(range(len(self.outcome[s])))
                self.outcome[s], self.time[s] = [(0.0, s, False)] * len(self.tried[s]), [0] * len(self.tried[s])
        if self.outcome[s][a] is None:
            self.tried[s].append(a)
        self.outcome[s][a], self.time[s][a], self.useful = (r, s2, done), self.now, self.useful or r != 0
        self.before[s2].add((s, a))


def plan(Q, model, n, alpha=1.0, gamma=0.95, rng=None, kappa=0.0):
    """n imagined steps: a visited state, then an action tried in it, both uniformly; the model's outcome; q_update.
    kappa: Dyna-Q+."""
    if not (model.useful or kappa):
        return  # all values are still 0 and would stay so
    rng = rng or np.random.default_rng(0)
    visited, tried, outcome, many = model.visited, model.tried, model.outcome, len(model.visited)
    for u, v in rng.random((n, 2)).tolist():
        s = visited[int(u * many)]
        a = tried[s][int(v * len(tried[s]))]
        r, s2, done = outcome[s][a]
        if kappa:
            r += exploration_bonus(model.now - model.time[s][a], kappa)
        row = Q[s]  # q_update, written out: this loop is all of the time
        row[a] += alpha * (r + (0.0 if done else gamma * max(Q[s2])) - row[a])


class PriorityQueue:
    """Items by priority. An item that is pushed again keeps its larger priority; those up to theta are left out."""

    def __init__(self, theta=0.0):
        self.theta, self.heap, self.priority = theta, [], {}

    def push(self, item, priority):
        if priority > max(self.theta, self.priority.get(item, 0.0)):
            self.priority[item] = priority
            heappush(self.heap, (-priority, item))

    def pop(self):
        """The item of the largest priority."""
        while True:
            priority, item = heappop(self.heap)
            if self.priority.get(item) == -priority:  # NOTE: else it was pushed again with more, and this is stale
                del self.priority[item]
                return item

    def __len__(self):
        return len(self.priority)


def sweep(Q, model, queue, n, alpha, gamma):
    """n imagined steps where values change most, and their predecessors into the queue. -> how many there were."""
    for k in range(n):
        if not len(queue):
            return k
        s, a = queue.pop()
        q_update(Q, s, a, *model.outcome[s][a], alpha, gamma)
        for before, action in model.before[s]:
            r, s2, done = model.outcome[before][action]
            if s2 == s:  # it may lead elsewhere by now
                error = r + (0.0 if done else gamma * max(Q[s])) - Q[before][action]
                queue.push((before, action), abs(error))
    return n


class Dyna:
    """Q, the model and one of the three ways to plan."""

    def __init__(self, states, actions, args, rng):
        self.args, self.rng, self.backups = args, rng, 0
        self.Q = [[0.0] * actions for _ in range(states)]
        self.model = Model(states, actions, args.algorithm == "dyna_q_plus")
        self.queue = PriorityQueue(args.theta)

    def act(self, s, epsilon):
        row = self.Q[s]
        if self.rng.random() < epsilon:
            return int(self.rng.integers(len(row)))
        best = max(row)
        best = [a for a, q in enumerate(row) if q == best]
        return best[int(self.rng.random() * len(best))] if len(best) > 1 else best[0]

    def learn(self, s, a, r, s2, done):
        """A real step: into values and model, then n imagined ones."""
        args, n = self.args, self.args.planning_steps
        self.model.learn(s, a, r, s2, done)
        if args.algorithm == "prioritized_sweeping":
            error = r + (0.0 if done else args.gamma * max(self.Q[s2])) - self.Q[s][a]
            self.queue.push((s, a), abs(error))
            self.backups += sweep(self.Q, self.model, self.queue, n, args.alpha, args.gamma)
            return
        q_update(self.Q, s, a, r, s2, done, args.alpha, args.gamma)
        kappa = args.kappa if args.algorithm == "dyna_q_plus" else 0.0
        plan(self.Q, self.model, n, args.alpha, args.gamma, self.rng, kappa)
        self.backups += 1 + n

    def episode(self, env, epsilon, learn=True, steps=None):
        """Play an episode, or `steps` steps of it -> rewards."""
        (s, _), rewards, over = env.reset(), [], False
        while not over and (steps is None or len(rewards) < steps):
            a = self.act(s, epsilon)
            s2, r, done, truncated, _ = env.step(a)
            if learn:
                self.learn(s, a, float(r), s2, done)
            s, over = s2, done or truncated
            rewards.append(float(r))
        return rewards


def greedy_path(Q, maze):
    """Cells of the greedy path from the start; its last one is the goal if it leads there."""
    s, path = cells(maze, "S")[0], []
    while s not in path:
        path.append(s)
        row = Q[s[0] * len(maze[0]) + s[1]]
        s = s if maze[s[0]][s[1]] == "G" else maze_step(s, row.index(max(row)), maze)[0]
    return path


def value_iteration(P, R, gamma, tolerance=1e-12):
    """Optimal values Q (S, A) of a known world: P (S, A, S) probabilities, R (S, A) mean rewards."""
    Q = np.zeros_like(R, dtype=float)
    while True:
        new = R + gamma * P @ Q.max(1)
        if np.abs(new - Q).max() < tolerance:
            return new
        Q = new


# ---- Pictures --------------------------------------------------------------------------------------------------------


def picture(maze, Q):
    """Values from white to blue, walls grey, in red the greedy path: (H, W, 3) uint8."""
    image = np.full((len(maze), len(maze[0]), 3), 255, np.uint8)
    value = np.array(Q).max(1).reshape(image.shape[:2])
    image[..., :2] = (255 * (1 - value / max(value.max(), 1e-9)))[..., None]
    for mark, color in (("#", (110, 110, 110)), ("S", (250, 220, 60)), ("G", (60, 180, 90))):
        for i, j in cells(maze, mark):
            image[i, j] = color
    size = 40
    image = image.repeat(size, 0).repeat(size, 1)
    image[::size], image[:, ::size] = 200, 200
    for i, j in greedy_path(Q, maze):
        image[i * size + 14 : (i + 1) * size - 14, j * size + 14 : (j + 1) * size - 14] = 200, 40, 40
    return image


def plot(curves, path, xlabel, ylabel):
    """Means of {name: (runs, points)} with their 95 % band, as a PNG."""
    from matplotlib import pyplot

    _, axis = pyplot.subplots(figsize=(7, 4.5))
    for name, values in curves.items():
        at, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
        band = 1.96 * values.std(0) / math.sqrt(len(values))
        axis.plot(at, mean, label=name)
        axis.fill_between(at, mean - band, mean + band, alpha=0.2)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    pyplot.savefig(path, dpi=120, bbox_inches="tight")


# ---- The textbook's experiments --------------------------------------------------------------------------------------


def learning_curves(runs, seed):
    """Figure 8.2: steps of each of 50 episodes with n = 0, 5, 50 planning steps."""
    curves = {}
    for n in (0, 5, 50):
        rows = []
        for k in range(runs):  # NOTE: the same seed for every n, so that first episodes are alike
            agent = Dyna(54, 4, Args(planning_steps=n), np.random.default_rng((seed, k)))
            rows.append([len(agent.episode(Maze(), 0.1)) for _ in range(50)])
        curves[f"n = {n}"] = np.array(rows)
    near = {name: int(np.argmax(c.mean(0) < 20) + 1) for name, c in curves.items()}
    return curves, dict(first_episode_below_20_steps=near), "episode", "steps per episode"


def changing_maze(name, n, kappa, steps):
    """Figures 8.4 and 8.5: cumulative reward of Dyna-Q and Dyna-Q+ in a maze that changes."""

    def experiment(runs, seed):
        curves, found = {}, {}
        for algorithm in ("dyna_q", "dyna_q_plus"):
            args, rows, best = Args(algorithm=algorithm, planning_steps=n, alpha=1.0, kappa=kappa), [], []
            for k in range(runs):
                env, agent = Maze(**MAZES[name]), Dyna(54, 4, args, np.random.default_rng((seed, k)))
                rewards, lengths = [], []
                while len(rewards) < steps:
                    after = len(rewards) > env.change
                    episode = agent.episode(env, 0.1, steps=steps - len(rewards))
                    rewards += episode
                    lengths += [len(episode)] if after and episode[-1] else []
                rows.append(np.cumsum(rewards))
                best.append(min(lengths, default=None))
            curves[algorithm] = np.array(rows)
            reward = curves[algorithm][:, -1]
            found[algorithm] = dict(final_reward=float(reward.mean()), least=float(reward.min()))
            found[algorithm]["shortest_episodes_after_the_change"] = best
        return curves, found | dict(shortest_path=shortest_path(env.maze)), "real step", "cumulative reward"

    return experiment


def sweeping(runs, seed):
    """Example 8.4: updates until the greedy path is at most 1.2 times the shortest, for larger and larger mazes."""
    curves, scales = {}, range(1, 6)
    for algorithm in ("dyna_q", "prioritized_sweeping"):
        args, rows = Args(algorithm=algorithm, planning_steps=5, alpha=0.5), []
        for k in range(runs):
            row = []
            for scale in scales:
                maze = enlarge(DYNA, scale)
                env, best = Maze(maze), shortest_path(maze)
                agent = Dyna(env.observation_space.n, 4, args, np.random.default_rng((seed, k, scale)))
                path = []
                while not (path and maze[path[-1][0]][path[-1][1]] == "G" and len(path) - 1 <= 1.2 * best):
                    agent.episode(env, 0.1)
                    path = greedy_path(agent.Q, maze)
                row.append(agent.backups)
            rows.append(row)
        curves[algorithm] = np.array(rows)
    means = {name: dict(zip(map(str, scales), c.mean(0).tolist())) for name, c in curves.items()}
    return curves, dict(updates_by_scale=means), "scale of the maze", "updates until the path is near-optimal"


EXPERIMENTS = {  # and the textbook's number of runs
    "figure_8_2": (learning_curves, 30),
    "figure_8_4": (changing_maze("BlockingMaze-v0", 10, 1e-4, 3000), 20),
    "figure_8_5": (changing_maze("ShortcutMaze-v0", 50, 1e-3, 6000), 5),
    "example_8_4": (sweeping, 5),
}


# ---- Main ------------------------------------------------------------------------------------------------------------


def fail(message):  # shared
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(args, seed):
    """The environment; ValueError with what was wanted and what was found."""
    env = gym.make(args.env_id, **json.loads(args.env_kwargs))
    for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, spaces.Discrete) or space.start:
            raise ValueError(f"{kind} must be Discrete from 0, found {space}; dreamerv3.py takes images and vectors")
    env.reset(seed=seed)
    return env


def train(args):
    """One run on an environment, or an experiment of the textbook. Returns the numbers."""
    least = dict(planning_steps=0, total_episodes=1, eval_episodes=1, seed=0, theta=1e-12, kappa=0, runs=1)
    for name, value in asdict(args).items():
        if name in least and value is not None and not value >= least[name]:
            fail(f"--{name.replace('_', '-')} must be at least {least[name]}, got {value}")
        if name in ("alpha", "gamma", "epsilon") and not 0 <= value <= 1:
            fail(f"--{name} must be within 0 and 1, got {value}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        fail(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {' '.join(str(e).split()) or type(e).__name__}")
    subject = (args.experiment or args.env_id).replace("/", "-").replace(":", "-")
    run = Path("runs") / f"{subject}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps(dict(script="dyna", command=sys.argv, args=asdict(args)), indent=1))
    print(f"run: {run}", flush=True)
    if args.experiment:
        experiment, runs = EXPERIMENTS[args.experiment]
        curves, result, *labels = experiment(args.runs or runs, args.seed)
        plot(curves, run / f"{args.experiment}.png", *labels)
        print(json.dumps(result))
    else:
        agent = Dyna(int(env.observation_space.n), int(env.action_space.n), args, np.random.default_rng(args.seed))
        chance = [sum(agent.episode(env, 1.0, learn=False)) for _ in range(args.eval_episodes)]
        maze, steps, frames = getattr(env.unwrapped, "maze", None), [], []
        for k in range(args.total_episodes):
            rewards = agent.episode(env, args.epsilon)
            steps.append(len(rewards))
            if maze is not None:
                frames.append(Image.fromarray(picture(env.unwrapped.maze, agent.Q)))
            if k % max(1, args.total_episodes // 20) == 0:
                print(f"episode={k + 1}, episodic_return={sum(rewards):.2f}, steps={steps[-1]}", flush=True)
        if frames:
            frames[0].save(run / "values.gif", save_all=True, append_images=frames[1:], duration=150, loop=0)
        returns = [sum(agent.episode(env, 0.0, learn=False)) for _ in range(args.eval_episodes)]
        result = dict(episodic_return=float(np.mean(returns)), random_return=float(np.mean(chance)), returns=returns)
        result |= dict(global_step=sum(steps), updates=agent.backups, steps_per_episode=steps)
        spread = f"+- {np.std(returns):.2f} over {len(returns)} episodes"
        print(f"episodic_return {np.mean(returns):.2f} {spread} (random {np.mean(chance):.2f})")
    (run / "result.json").write_text(json.dumps(result | dict(run=str(run)), indent=1))
    return result


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.split("\nDeviations")[0]))
