"""`stub_env:Stub-v0`: a tiny environment with faults on demand: `--env-kwargs '{"raise_at": 7}'`.

Everything named `..._at` counts steps from 1: faults those of one instance over its whole life, `truncate_at` those of
an episode. Observations depend on nothing but the reset seed and the step within the episode, so that stored rows can
be compared with a list made by hand: a vector is (t, start, 0), where `start` is drawn from the seed; images and
numbers encode t."""

import os

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text

OBSERVATIONS = {
    "vector": Box(-np.inf, np.inf, (3,), np.float32),
    "image": Box(0, 255, (16, 16, 3), np.uint8),
    "grey2d": Box(0, 255, (16, 16), np.uint8),
    "channel_first": Box(0, 255, (3, 16, 16), np.uint8),
    "rgba": Box(0, 255, (16, 16, 4), np.uint8),
    "discrete": Discrete(5),
}
OBSERVATIONS["dict"] = Dict({k: OBSERVATIONS[k] for k in ("discrete", "image", "vector")})
OBSERVATIONS["pair"] = Dict({k: OBSERVATIONS[k] for k in ("image", "vector")})
OBSERVATIONS["text"] = Dict(vector=OBSERVATIONS["vector"], mission=Text(9))
OBSERVATIONS["float_image"] = Box(0, 1, (64, 64, 3), np.float32)
OBSERVATIONS["nested"] = Dict(inner=Dict(vector=OBSERVATIONS["vector"]), outer=OBSERVATIONS["vector"])
ACTIONS = {
    "discrete": Discrete(3),
    "discrete_start1": Discrete(3, start=1),
    "box": Box(np.float32([-2, 0]), np.float32([3, 1])),
    "box_inf": Box(-np.inf, np.inf, (2,), np.float32),
    "multidiscrete": MultiDiscrete([2, 3]),
    "multibinary": MultiBinary(3),
    "integers": Box(0, 5, (2,), np.int64),
    "dict": Dict(a=Discrete(2)),
}


class StubEnv(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    made = 0  # instances so far in this process
    log = []  # (instance, episode, t, action, start) of every reset (action None) and step; tests clear both

    def __init__(
        self,
        obs="vector",
        action="discrete",
        length=5,  # the episode terminates after this many steps; None: never
        truncate_at=None,  # the episode is truncated after this many steps
        spread=0,  # and less than this many steps more, drawn from the reset seed
        stagger=0,  # environment i takes i times this many steps more until either end
        reward=1.0,  # a number, or "count" for t
        raise_at=None,
        nan_at=None,
        nan=("reward", "nan"),  # what becomes what
        shape_change_at=None,
        signal_at=None,
        signum=15,  # sent to this process
        wrong_dtype=False,  # images are declared uint8 and sent as float
        only=None,  # faults hit only this instance (0 is the first one made)
        render_mode=None,
    ):
        self.observation_space, self.action_space, self.render_mode = OBSERVATIONS[obs], ACTIONS[action], render_mode
        self.reward, self.wrong_dtype, self.spread = reward, wrong_dtype, spread
        self.instance, self.steps, self.episode, self.t, self.start = StubEnv.made, 0, -1, 0, 0.0
        StubEnv.made += 1
        self.length, self.truncate_at = (n and n + stagger * self.instance for n in (length, truncate_at))
        faulty = only in (None, self.instance)
        chosen = (x if faulty else None for x in (raise_at, nan_at, shape_change_at, signal_at))
        self.raise_at, self.nan_at, self.shape_change_at, self.signal_at = chosen
        self.nan, self.signum = nan, signum

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.start, self.episode = 0, float(np.float32(self.np_random.random())), self.episode + 1
        self.log.append((self.instance, self.episode, 0, None, self.start))
        return self.observe(self.observation_space), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} is not in {self.action_space}")
        self.t, self.steps = self.t + 1, self.steps + 1
        self.log.append((self.instance, self.episode, self.t, action, self.start))
        if self.steps == self.raise_at:
            raise ValueError("boom")
        if self.steps == self.signal_at:
            os.kill(os.getpid(), self.signum)
        obs, reward = self.observe(self.observation_space), float(self.t if self.reward == "count" else self.reward)
        if self.steps == self.nan_at and self.nan[0] == "reward":
            reward = float(self.nan[1])
        elif self.steps == self.nan_at:
            obs = np.full_like(obs, float(self.nan[1]))
        if self.steps == self.shape_change_at:
            obs = np.concatenate([obs, obs])
        over = lambda n: n is not None and self.t == n + int(self.spread * self.start)  # noqa: E731
        return obs, reward, over(self.length), over(self.truncate_at), {}

    def observe(self, space):
        if isinstance(space, Dict):
            return {k: self.observe(s) for k, s in space.items()}
        if isinstance(space, (Discrete, Text)):
            return self.t % 5 if isinstance(space, Discrete) else "go"
        if space.dtype == np.uint8:
            image = np.full(space.shape, 10 * (self.t % 20) + int(50 * self.start), np.uint8)
            return image / 255 if self.wrong_dtype else image
        return np.array([self.t, self.start, 0], np.float32)

    def render(self):
        return None  # as environments do that were built without a picture


if "Stub-v0" not in gym.registry:
    gym.register("Stub-v0", entry_point=StubEnv)
