#!/usr/bin/env bash
# Guess: the last observation of an Atari episode shows the screen on which the episode ended.
# What happens: gymnasium's AtariPreprocessing stops skipping frames when the episode ends, but has by then copied no
#   new screen (it only copies in the last two of the skipped frames). It pools and returns its old buffers: the
#   observation of the step before, once more. The game itself has moved on.
# Whom it hurts: values bootstrapped from the last observation of a truncated episode; world models and replays, which
#   learn that the world stands still whenever a life is lost or the time is over.
# Seen with: gymnasium 1.4.0, ale-py 0.12.1, opencv-python-headless 5.0.0.93, numpy 2.4.6, Python 3.11. Printed:
#   time limit after 101 frames: last observation is the one before: True; pixels unlike the real screen: 29
#   40 lost lives of Breakout: the last observation is the one before in 40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 ale-py==0.12.1 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import ale_py, cv2, gymnasium as gym, numpy as np
from gymnasium.wrappers import AtariPreprocessing

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def play(env, actions):  # -> the last two observations
    obs, _ = env.reset()
    for action in actions:
        before, (obs, _, terminated, truncated, _) = obs, env.step(action)
        if terminated or truncated:
            return before, obs


game = dict(frameskip=1, repeat_action_probability=0.0)
env = AtariPreprocessing(gym.make("ALE/Pong-v5", max_episode_steps=101, **game), noop_max=0)
env.reset(seed=0)
before, last = play(env, [3, 2] * 50)
screen = cv2.resize(env.unwrapped.ale.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA)
repeated, wrong = np.array_equal(before, last), int((last != screen).sum())
print(
    f"time limit after 101 frames: last observation is the one before: {repeated}; "
    f"pixels unlike the real screen: {wrong}"
)
assert repeated and wrong > 0

env = AtariPreprocessing(gym.make("ALE/Breakout-v5", **game), noop_max=0, terminal_on_life_loss=True)
env.reset(seed=0)
rng = np.random.default_rng(0)
ends = [play(env, iter(lambda: int(rng.integers(4)), None)) for _ in range(40)]
repeated = sum(np.array_equal(before, last) for before, last in ends)
print(f"40 lost lives of Breakout: the last observation is the one before in {repeated}")
assert repeated > 20
EOF
