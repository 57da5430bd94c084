#!/usr/bin/env bash
# Guess: NormalizeReward divides by the spread of episode returns; the wrapper for one environment and that for a vector
#   of it agree, whatever the autoreset mode, when the episodes are the same.
# What happens: an episode that ends by its time limit does not end the running return in gymnasium's NormalizeReward
#   (nor in the vector one under NEXT_STEP): the sum runs on over the border into the next episode. Under SAME_STEP the
#   vector wrapper starts again from 0. The same rewards of the same episodes come out on different scales.
# Whom it hurts: all tasks that end by time (Pendulum, MuJoCo's swimmers and cheetahs, dm_control): a constant of the
#   wrapper's history instead of the task, and learning rates that no longer fit when the autoreset mode is changed.
# Seen with: gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   one environment: the last episode's mean reward -7.79 becomes -0.0674
#   vector, NEXT_STEP: the last episode's mean reward -7.79 becomes -0.0674
#   vector, SAME_STEP: the last episode's mean reward -7.79 becomes -0.0461
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import gymnasium as gym, numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers.vector import NormalizeReward as VectorNormalizeReward

EPISODES, LENGTH = 20, 200  # Pendulum always ends by its limit of 200 steps


class Record(gym.Wrapper):  # the plain rewards, below the wrapper
    def step(self, action):
        result = self.env.step(action)
        plain.append(float(result[1]))
        return result


def make():
    return Record(gym.make("Pendulum-v1"))


actions = np.random.default_rng(0).uniform(-2, 2, (EPISODES, LENGTH, 1)).astype(np.float32)
scaled, plain = {}, []
env = NormalizeReward(make())
env.reset(seed=0)
scaled["one environment"] = []
for episode in actions:
    scaled["one environment"] += [env.step(action)[1] for action in episode]
    env.reset()
first = plain
for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
    plain, rewards = [], []
    envs = VectorNormalizeReward(SyncVectorEnv([make], autoreset_mode=mode))
    envs.reset(seed=0)
    for episode in actions:
        rewards += [envs.step(action[None])[1][0] for action in episode]
        if mode == AutoresetMode.NEXT_STEP:
            envs.step(episode[:1])  # the step that only resets
    assert plain == first  # the same rewards in the same order
    scaled[f"vector, {mode.name}"] = rewards
mean = {name: np.mean(rewards[-LENGTH:]) for name, rewards in scaled.items()}
for name, value in mean.items():
    print(f"{name}: the last episode's mean reward {np.mean(plain[-LENGTH:]):.2f} becomes {value:.4f}")
one, next_step, same_step = mean.values()
assert np.isclose(one, next_step) and abs(same_step / one - 1) > 0.1
EOF
