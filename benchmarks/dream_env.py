"""The dream of a trained run as a gymnasium environment: any library of agents can train in it.

    python benchmarks/dream_env.py runs/NAME       # gymnasium's own checks, then a few dreamed steps

    from dream_env import DreamEnv               # with benchmarks/ on the path
    env = DreamEnv("runs/NAME")
    obs, _ = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())

Spaces are those of the script's make_env. A dream begins where real experience stopped: reset() plays up to `context`
steps of the real environment with the run's agent, lets the model see them, and from there on nothing is real. The
first observation is what the model makes of the last real one. The same seed and actions dream the same dream.
"""

import contextlib
from copy import deepcopy

import gymnasium as gym
import numpy as np
from common import Parser, at_least, choose_device, load_run, pick, run_tool, stack
from pictures import draw


def inside(space, obs):
    """What a model predicts, as an element of the space: in its bounds, of its type."""
    if isinstance(space, gym.spaces.Dict):
        return {k: inside(s, obs[k]) for k, s in space.items()}
    if isinstance(space, gym.spaces.Discrete):
        return np.int64(obs)
    return np.clip(obs, space.low, space.high).astype(space.dtype)


class DreamEnv(gym.Env):
    """run: directory of a trained run; max_steps: truncates a dream; context: most real steps before a dream.

    reset(options={"observations": o, "actions": a}) starts from real experience of the caller's instead: T observations
    from the beginning of an episode, as the environment gives them (an array (T, ...), or a dict of arrays for Dict
    spaces), and the T - 1 actions between them; one action more, taken at the last observation, is ignored.
    step() terminates where the model thinks that the episode is more likely over than not; info["continue"] is its
    probability that the episode goes on. render() draws the dreamed observation."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, run, max_steps=1000, device="cpu", render_mode="rgb_array", context=50):
        self.script, self.agent = load_run(run, device, instead="play")
        self.max_steps, self.context, self.render_mode = max_steps, context, render_mode
        self.real = self.script.make_env(self.agent.args, seed=0)  # reset() gives it the seed that counts
        # A model without a decoder dreams of its latents.
        self.observation_space = getattr(self.agent, "dream_space", self.real.observation_space)
        self.real_space, self.action_space = self.real.observation_space, self.real.action_space
        self.state = None  # of the model; None before the first reset
        self.generators = None  # states of torch's generators between two uses of this dream

    @contextlib.contextmanager
    def noise(self):
        """Most agents draw from torch's generators. Within this context they are the dream's own, afterwards as before:
        so dreams that take turns do not disturb each other."""
        import torch

        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            if self.generators:
                torch.set_rng_state(self.generators[0])
                torch.cuda.set_rng_state_all(self.generators[1])
            yield
            self.generators = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in devices]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.memory = None  # what agent.act remembers of the real steps, for who lets it act in the dream
        with self.noise():
            self.agent.seed(int(self.np_random.integers(2**31)))
            if options and "observations" in options:
                observations, actions = self.given(options)
            else:
                observations, actions = self.played(int(self.np_random.integers(self.context + 1)))
            self.state, seen = self.agent.observe(stack([observations]), actions[None])  # a batch of one dream
        self.obs, self.steps = inside(self.observation_space, pick(pick(seen, 0), -1)), 0
        return self.obs, {}

    def step(self, action):
        if self.state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        with self.noise():
            self.state, reward, alive, obs = self.agent.imagine(self.state, self.batch([action]))
        self.obs, self.steps, alive = inside(self.observation_space, pick(obs, 0)), self.steps + 1, float(alive[0])
        return self.obs, float(reward[0]), alive < 0.5, self.steps >= self.max_steps, {"continue": alive}

    def render(self):
        return draw(self.observation_space, self.obs, 256)

    def close(self):
        self.real.close()

    def batch(self, actions):
        """Actions as one array (T,) or (T, A) of the space's type."""
        return np.asarray(actions, self.action_space.dtype).reshape(len(actions), *self.action_space.shape)

    def played(self, steps):
        """Observations and actions of a real episode's first `steps` steps; of all but its last, if it ends earlier."""
        obs, _ = self.real.reset(seed=int(self.np_random.integers(2**31)))
        observations, actions = [deepcopy(obs)], []
        for t in range(steps):
            chosen, memory = self.agent.act(stack([obs]), self.memory, np.array([t == 0]))
            obs, _, terminated, truncated, _ = self.real.step(chosen[0])
            if terminated or truncated:
                break
            observations.append(deepcopy(obs))  # some environments give the same array again
            actions.append(chosen[0])
            self.memory = memory
        return stack(observations), self.batch(actions)

    def given(self, options):
        """Observations and actions of reset's options, checked."""
        observations, actions = options["observations"], options.get("actions", ())
        spaces = getattr(self.real_space, "spaces", {None: self.real_space})
        arrays = observations if isinstance(observations, dict) else {None: observations}
        if set(arrays) != set(spaces):
            raise ValueError(f"observations must have the form of {self.real_space}, got keys {list(arrays)}")
        arrays = {k: np.asarray(v, spaces[k].dtype) for k, v in arrays.items()}
        lengths = {len(v) if v.ndim else 0 for v in arrays.values()}
        T = max(lengths)
        if len(lengths) > 1 or not T or any(v.shape[1:] != spaces[k].shape for k, v in arrays.items()):
            found = {k or "observations": v.shape for k, v in arrays.items()}
            raise ValueError(f"observations must be (T, ...) with T > 0 and entries of {self.real_space}: {found}")
        if np.shape(actions)[1:] != self.action_space.shape and T > 1 or len(actions) not in (T - 1, T):
            raise ValueError(
                f"{T} observations need {T - 1} or {T} actions of {self.action_space}: {np.shape(actions)}"
            )
        return (arrays if None not in arrays else arrays[None]), self.batch(actions[: T - 1])


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--steps", type=at_least(0), default=5, help="dreamed steps to print (default: 5)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the dream and its actions (default: 0)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(argv)
    env = DreamEnv(args.run, device=choose_device(args.no_cuda))
    from gymnasium.utils.env_checker import check_env

    check_env(env)
    print(f"check_env passed: observations {env.observation_space}, actions {env.action_space}")
    env.action_space.seed(args.seed)
    env.reset(seed=args.seed)
    for t in range(args.steps):
        _, reward, terminated, truncated, info = env.step(action := env.action_space.sample())
        print(f"step {t + 1}: action {action}, reward {reward:.3f}, continue {info['continue']:.3f}")
        if terminated or truncated:
            break
    env.close()
    return 0


if __name__ == "__main__":
    run_tool(main)
