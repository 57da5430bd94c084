"""What the agent sees: dreamerv3.py's `make_env` with spaces that users bring along, with Atari games and MinAtar."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

import dreamerv3 as d

SIX = Box(-1, 1, (6,), np.float32)


def image(side, channels=3):
    return Box(0, 255, (side, side, channels), np.uint8)


class Echo(gym.Env):
    """The spaces in `spaces`; sends what `sends(t)` gives and remembers its actions; ends after `end` steps."""

    spaces, sends, reward, end = (image(8), Discrete(4)), None, 1.0, 10**6

    def __init__(self, **kwargs):
        self.observation_space, self.action_space = self.spaces

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        return type(self).sends(0), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        self.actions.append(action)
        reward = float(self.t) if self.reward == "t" else self.reward
        return type(self).sends(self.t), reward, self.t >= self.end, False, {}


gym.register("Echo-v0", entry_point=Echo)
gym.register("ALE/Echo-v0", entry_point=Echo)  # gets the treatment of Atari games


@pytest.fixture
def echo(monkeypatch):
    def make(obs=SIX, action=SIX, sends=None, reward=1.0, end=10**6, env_id="Echo-v0", **flags):
        fixed = obs.sample()
        values = dict(spaces=(obs, action), sends=sends or (lambda t: fixed), reward=reward, end=end)
        for name, value in values.items():
            monkeypatch.setattr(Echo, name, value)
        return d.make_env(d.Args(**(dict(env_id=env_id, image_size=16) | flags)), 0)

    return make


def dot(t):
    """Frame t: pixel t alone is lit."""
    return np.eye(64, dtype=np.uint8)[t % 64].reshape(8, 8, 1).repeat(3, 2) * 200


def lit(frame):
    return np.flatnonzero(frame[..., 0]).tolist()


def test_atari_pools_the_last_two_frames_and_sums_rewards(echo, monkeypatch):
    game = dict(obs=image(8), action=Discrete(4), sends=dot, reward="t", env_id="ALE/Echo-v0", image_size=8)
    monkeypatch.setattr(d.Atari, "noop_max", 0)
    env = echo(**game)
    assert lit(env.reset(seed=0)[0]) == [0]
    for k in range(3):
        frame, reward, terminated, truncated, _ = env.step(2)
        assert lit(frame) == [4 * k + 3, 4 * k + 4] and reward == sum(range(4 * k + 1, 4 * k + 5))  # not clipped
        assert not terminated and not truncated
    assert env.unwrapped.actions == [2] * 12
    assert lit(env.reset(seed=0)[0]) == [0]  # the last frame of the old episode is not pooled into the new one
    for end, pooled in ((1, [1]), (2, [1, 2]), (3, [2, 3])):
        env = echo(**game | dict(end=end))
        env.reset(seed=0)
        frame, reward, terminated, _, _ = env.step(1)
        assert lit(frame) == pooled and terminated and reward == sum(range(1, end + 1))
    env = echo(**game | dict(action_repeat=1))
    env.reset(seed=0)
    assert [lit(env.step(0)[0]) for _ in range(3)] == [[1], [2], [3]]


def test_atari_noops_and_grey(echo):
    game, counts = dict(obs=image(8), action=Discrete(4), sends=dot, env_id="ALE/Echo-v0", image_size=8), []
    env = echo(**game)
    for seed in range(200):
        frame, _ = env.reset(seed=seed)
        counts.append(len(env.unwrapped.actions))
        assert set(env.unwrapped.actions) <= {0} and lit(frame) == [counts[-1]]
    assert min(counts) == 0 and max(counts) == 30 and len(set(counts)) > 25
    env.reset(seed=5)
    assert len(env.unwrapped.actions) == counts[5]
    env = echo(**game | dict(end=3))
    assert all(env.reset(seed=seed) and env.unwrapped.t < 3 for seed in range(20))  # no-ops survive an end
    colours = np.repeat(255 * np.eye(4, 3, dtype=np.uint8)[:, None], 8, 1).repeat(2, 0)
    grey, _ = echo(**game | dict(sends=lambda t: colours, grayscale=True)).reset(seed=0)
    assert grey.shape == (8, 8, 1) and np.abs(grey[::2, 0, 0].astype(int) - [76, 150, 29, 0]).max() <= 1


def test_minatar_episodes_do_not_depend_on_the_one_before():
    """The last action of the episode before would be repeated by a first action that sticks."""
    env = d.make_env(d.Args(env_id="MinAtar/Breakout-v1", max_episode_steps=30), 0)
    for seed in range(30):
        frames = []
        for before in (0, 2):
            env.reset(seed=99)
            env.step(before)
            frames.append([env.reset(seed=seed)[0], *(env.step(1)[0] for _ in range(3))])
        assert np.array_equal(*frames), seed


def test_freeway_is_cut_off_by_its_clock():
    env = d.make_env(d.Args(env_id="MinAtar/Freeway-v1", max_episode_steps=5000), 0)
    env.reset(seed=0)
    steps, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        _, _, terminated, truncated, _ = env.step(0)
        steps += 1
    assert truncated and not terminated and 2500 <= steps <= 2501


def test_minatar_pictures():
    env = d.make_env(d.Args(env_id="MinAtar/Breakout-v1", pixels=True, image_size=16), 0)
    frame, _ = env.reset(seed=0)
    assert env.observation_space == image(16) and frame.dtype == np.uint8
    state = env.unwrapped.game.state().any(-1)
    assert np.array_equal(frame[3:13, 3:13].any(-1), state) and not frame[:3].any() and not frame[13:].any()


numbers = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
STACK = np.arange(84 * 84 * 4).reshape(84, 84, 4).astype(np.uint8)
OBSERVATIONS = [  # space, value, flags, what the agent sees: an array, or its shape
    (Box(0, 255, (16, 16), np.uint8), numbers, {}, numbers[..., None]),
    (Box(0, 255, (16, 16, 1), np.uint8), numbers[..., None], {}, numbers[..., None]),
    (Box(0, 255, (84, 84, 4), np.uint8), STACK, dict(image_size=84), STACK),
    (Box(0, 255, (4, 84, 84), np.uint8), np.moveaxis(STACK, 2, 0), dict(image_size=84), STACK),
    (Box(0, 255, (4, 84, 84), np.uint8), np.moveaxis(STACK, 2, 0), dict(image_size=16), (16, 16, 4)),
    (Box(0, 255, (84, 84, 12), np.uint8), STACK.repeat(3, 2), dict(image_size=84), STACK.repeat(3, 2)),
    (Box(0, 255, (48, 96, 3), np.uint8), np.full((48, 96, 3), 77, np.uint8), {}, np.full((16, 16, 3), 77, np.uint8)),
    (Box(0, 255, (128,), np.uint8), np.arange(128, dtype=np.uint8), {}, np.arange(128, dtype=np.float32)),
    (Box(-9, 9, (2, 3), np.float64), np.arange(6.0).reshape(2, 3), {}, np.arange(6, dtype=np.float32)),
    (Box(0, 9, (), np.float32), np.array(3, np.float32), {}, np.array([3], np.float32)),
    (Box(0, 1, (16, 16, 3), np.float32), np.ones((16, 16, 3), np.float32), {}, np.ones(768, np.float32)),
    (Box(0, 10, (7, 7, 3), np.uint8), np.full((7, 7, 3), 9, np.uint8), {}, np.full(147, 9, np.float32)),
    (MultiBinary(4), np.array([1, 0, 0, 1], np.int8), {}, np.array([1, 0, 0, 1], np.float32)),
    (MultiDiscrete([3, 4]), np.array([2, 1]), {}, np.array([0, 0, 1, 0, 1, 0, 0], np.float32)),
    (Discrete(5, start=-2), -1, {}, np.array([0, 1, 0, 0, 0], np.float32)),
]  # fmt: skip


@pytest.mark.parametrize("space, value, flags, seen", OBSERVATIONS, ids=str)
def test_observations_are_converted(echo, space, value, flags, seen):
    for wrapped in (False, True):
        sent = {"key": value} if wrapped else value
        env = echo(Dict(key=space) if wrapped else space, sends=lambda t, sent=sent: sent, **flags)
        obs, _ = env.reset()
        assert env.observation_space.contains(obs)
        obs = obs["key"] if wrapped else obs
        assert obs.shape == seen if isinstance(seen, tuple) else np.array_equal(obs, seen) and obs.dtype == seen.dtype


@pytest.mark.parametrize("space", [Box(0, 1, (64, 64, 3), np.float32), Tuple([Discrete(2)]), Text(9)], ids=str)
def test_observations_that_cannot_be_used_are_refused(echo, space):
    for s in (space, Dict(fine=SIX, other=space)):
        with pytest.raises(ValueError, match="must be"):
            echo(s)


@pytest.mark.parametrize(
    "space", [image(16), image(8), Box(0, 255, (16, 16), np.uint8), Box(-9, 9, (3,), np.float32)], ids=str
)
def test_observations_are_kept_as_they_were_seen(echo, space):
    """Environments may draw every frame into one array."""
    canvas = np.zeros(space.shape, space.dtype)
    for wrap in (lambda x: x, lambda x: Dict(key=x) if x is space else {"key": x}):
        env = echo(wrap(space), sends=lambda t: [canvas.fill(t), wrap(canvas)][1])  # noqa: B023
        seen = [env.reset()[0], *(env.step(np.zeros(6))[0] for _ in range(3))]
        assert [np.max(x["key"] if isinstance(x, dict) else x) for x in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_reach_the_bounds_of_any_box_and_never_leave_it(echo, dtype):
    rng = np.random.default_rng(0)
    low = (10 ** rng.uniform(-3, 3, 3000) * rng.choice([-1, 1], 3000)).astype(dtype)
    space = Box(low, (low + 10 ** rng.uniform(-3, 3, 3000)).astype(dtype), dtype=dtype)
    env = echo(action=space)
    assert env.action_space == Box(-1, 1, (3000,), np.float32)
    env.reset()
    sent = [env.step(np.full(3000, x, np.float32)) and env.unwrapped.actions[-1] for x in (-1, 1, -7, 7, 0)]
    for got, expected in zip(sent, (space.low, space.high, space.low, space.high)):
        assert np.array_equal(got, expected)
    np.testing.assert_allclose(sent[4], (space.low.astype(float) + space.high) / 2, rtol=1e-5, atol=1e-4)
    for _ in range(50):
        env.step(2 * rng.standard_normal(3000).astype(np.float32))  # the environment checks them


def test_actions_of_half_open_boxes_and_numbers(echo):
    env = echo(action=Box(np.float32([0, -np.inf, -np.inf, -2]), np.float32([np.inf, np.inf, 0.5, 0])))
    env.reset()
    for action, sent in (([-0.7, 0.7, 0.7, 1], [0, 0.7, 0.5, 0]), ([0.3, -9, -0.3, -1], [0.3, -1, -0.3, -2])):
        env.step(np.float32(action))
        assert env.unwrapped.actions[-1].tolist() == pytest.approx(sent)
    for space, action, sent in (
        (Box(-1, 1, (2, 2), np.float32), [0.1, 0.2, 0.3, 0.4], [[0.1, 0.2], [0.3, 0.4]]),
        (Box(-1, 1, (), np.float32), [0.5], 0.5),
    ):
        env = echo(action=space)
        env.reset()
        env.step(np.float32(action))
        np.testing.assert_allclose(env.unwrapped.actions[-1], sent, rtol=1e-6)
    env = echo(action=Discrete(3, start=5))
    env.reset()
    env.step(np.int64(2))
    assert env.unwrapped.actions == [7] and env.action_space == Discrete(3)


@pytest.mark.parametrize(
    "space", [MultiDiscrete([2, 3]), MultiBinary(3), Box(0, 5, (2,), np.int64), Dict(a=SIX)], ids=str
)
def test_actions_that_cannot_be_used_are_refused(echo, space):
    with pytest.raises(ValueError, match="actions must be"):
        echo(action=space)


@pytest.mark.parametrize("sent", [np.array([3.0]), np.array(3), np.int64(3), np.float32(3), 3, True], ids=repr)
def test_rewards_become_floats_and_repeated_steps_add_them(echo, sent):
    env, number = echo(action=Discrete(2), reward=sent, end=6, action_repeat=4), float(np.asarray(sent).item())
    env.reset()
    (_, one, *_), (_, two, terminated, _, info) = env.step(0), env.step(0)
    assert (one, two, terminated) == (4 * number, 2 * number, True) and type(one) is float
    assert (float(info["episode"]["r"]), int(info["episode"]["l"])) == (6 * number, 2)


def test_a_first_reset_without_a_seed_goes_on_from_that_of_the_environment():
    args = d.Args(env_id="CartPole-v1")
    (a, b), c = (d.make_env(args, 7) for _ in range(2)), d.make_env(args, 8)
    firsts = [env.reset()[0] for env in (a, b, c)]
    assert np.array_equal(firsts[0], firsts[1]) and not np.array_equal(firsts[0], firsts[2])
    assert not np.array_equal(a.reset()[0], firsts[0])
    assert np.array_equal(a.reset(seed=3)[0], c.reset(seed=3)[0])
