"""A script as the tools in benchmarks/ see one, whose model is perfect: its dream is exactly its environment. So what
the tools must find is known: returns, dreamed observations, the rows of a recording.

The environment counts: t steps so far, x the sum of the rewards, `start` a number drawn by reset. The reward is the
Discrete action, or whether the first number of a Box is positive. An episode terminates after `length` steps (with
`stagger`, after up to 2 more, by `start`) and must not be stepped on. Images are always the same array, filled anew.
Options come from --env-kwargs."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete

VECTOR, IMAGE = Box(-np.inf, np.inf, (3,), np.float32), Box(0, 255, (8, 8, 3), np.uint8)
SPACES = {"vector": VECTOR, "image": IMAGE, "dict": Dict(image=IMAGE, vector=VECTOR), "number": Discrete(100)}


@dataclass
class Args:
    env_id: str = "Counter-v0"
    env_kwargs: str = "{}"
    pixels: bool = False
    image_size: int = 8
    seed: int = 1
    tempered: bool = False  # the agent takes a temperature
    lies: bool = False  # the agent's dreams leave the bounds of the space
    noisy: bool = False  # dreamed rewards are random


def observation(space, t, x, start):
    """Of numbers or of arrays of numbers with any leading axes."""
    if isinstance(space, Dict):
        return {k: observation(s, t, x, start) for k, s in space.items()}
    if isinstance(space, Discrete):
        return np.asarray(t, np.int64) if np.ndim(t) else int(t)
    numbers = np.stack([np.asarray(v) for v in (t, x, start)], -1)
    if space.dtype == np.uint8:
        return np.broadcast_to(numbers[..., None, None, :], (*np.shape(t), *space.shape)).astype(np.uint8)
    return numbers.astype(np.float32)


def value_of(actions, space):
    """Rewards of actions with any leading axes."""
    return np.asarray(actions, float) if isinstance(space, Discrete) else (np.asarray(actions)[..., 0] > 0) * 1.0


class Counter(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self, seed, obs="vector", action="discrete", length=5, stagger=False, truncate_at=None, draws=True, stop_at=None
    ):
        self.seed, self.length, self.stagger, self.truncate_at, self.stop_at = (
            seed,
            length,
            stagger,
            truncate_at,
            stop_at,
        )
        self.observation_space = SPACES[obs]
        self.action_space = Discrete(3) if action == "discrete" else Box(-1, 1, (2,), np.float32)
        self.image = np.zeros(IMAGE.shape, np.uint8)
        self.render_mode = "rgb_array" if draws else None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=self.seed if seed is None else seed)
        self.seed, self.t, self.x, self.over = None, 0, 0.0, False
        self.start = int(self.np_random.integers(10))
        return self.observe(), {}

    def observe(self):
        obs = observation(self.observation_space, self.t, self.x, self.start)
        if self.observation_space is IMAGE:
            self.image[:] = obs
            return self.image
        return obs

    def step(self, action):
        assert not self.over, "stepped beyond the end of an episode"
        assert self.action_space.contains(action), action
        if self.stop_at == self.t:
            raise KeyboardInterrupt
        reward = float(value_of(action, self.action_space))
        self.t, self.x = self.t + 1, self.x + reward
        terminated, truncated = self.t == self.length + self.stagger * (self.start % 3), self.t == self.truncate_at
        self.over = terminated or truncated
        return self.observe(), reward, terminated, truncated, {}

    def render(self):
        return np.full((20, 30, 3), (10 * self.t, 200, 0), np.uint8)


def make_env(args, seed):
    options = json.loads(args.env_kwargs) | ({"obs": "image"} if args.pixels else {})
    return Counter(seed, **options)


class Agent:
    """Greedy: always action 2 (1.0 of a Box), else random. Its memory counts the steps of an episode."""

    global_step, random_return = 700, 5.0

    def __init__(self, args, device):
        self.args, self.device, self.noise = args, device, torch.Generator(device).manual_seed(0)
        env = make_env(args, 0)
        self.space, self.actions = env.observation_space, env.action_space
        self.length = env.length

    def seed(self, n):
        self.noise.manual_seed(n)

    def act(self, obs, state, first, greedy=False):
        assert state is not None or first.all()
        state = torch.zeros(len(first)) if state is None else state
        state = torch.where(torch.as_tensor(first), 0, state + 1)
        assert (state >= self.read(obs)[0]).all(), "the memory was lost, or an observation was not shown"
        if isinstance(self.actions, Discrete):
            random = torch.randint(3, (len(first),), generator=self.noise)
            return np.full(len(first), 2) if greedy else random.numpy(), state
        random = torch.rand((len(first), 2), generator=self.noise) * 2 - 1
        return np.ones((len(first), 2), np.float32) if greedy else random.numpy(), state

    def read(self, obs):
        """t, x, start of observations with any leading axes."""
        if isinstance(obs, dict):
            return self.read(obs["vector"])
        obs = torch.as_tensor(np.asarray(obs)).float()
        if isinstance(self.space, Discrete):
            return obs, obs * 0, obs * 0
        return (obs if obs.shape[-1:] == (3,) and self.space is not IMAGE else obs[..., 0, 0, :]).unbind(-1)

    def observe(self, obs, actions):
        values = self.read(obs)
        assert actions.shape == (len(values[0]), values[0].shape[1] - 1, *self.actions.shape), actions.shape
        if not isinstance(self.space, Discrete):
            sums = torch.as_tensor(value_of(actions, self.actions)).sum(1)
            assert (values[1][:, -1] == sums).all(), "these actions did not lead to these observations"
        return tuple(v[:, -1] for v in values), obs

    def imagine(self, state, actions):
        t, x, start = state
        reward = torch.as_tensor(value_of(actions, self.actions)).float()
        if self.args.noisy:
            reward = torch.rand(len(t), generator=self.noise)
        state = (t + 1, x + reward, start)
        obs = observation(self.space, *(1e4 * v if self.args.lies else v for v in state))
        return state, reward.numpy(), (state[0] < self.length).float().numpy(), obs


class Tempered(Agent):
    def act(self, obs, state, first, greedy=False, temperature=1.0):
        return super().act(obs, state, first, greedy or temperature == 0)


def load(run, device="cpu"):
    known = {f.name for f in fields(Args)}
    found = json.loads((Path(run) / "args.json").read_text())["args"]
    args = Args(**{k: v for k, v in found.items() if k in known})
    return (Tempered if args.tempered else Agent)(args, device)
