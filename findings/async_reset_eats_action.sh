#!/usr/bin/env bash
# Guess: SyncVectorEnv and AsyncVectorEnv, with or without shared memory, are the same environment at different speeds;
#   after `reset()` the first action moves the world.
# What happens: with shared_memory=False (needed for spaces that do not fit into shared memory) a worker remembers that
#   its episode ended and `reset()` does not make it forget. The first `step` after the reset ignores its action and
#   resets once more: reward 0, a second start state. With shared memory and in SyncVectorEnv this does not happen.
# Whom it hurts: whoever resets when all episodes are over (evaluation, planners, episodes of fixed length): one action
#   per episode is lost, and the seed given to `reset(seed=...)` no longer decides where the episode starts.
# Seen with: gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   sync: rewards of the first step after reset [-1. -1.]
#   async, shared memory: rewards of the first step after reset [-1. -1.]
#   async, shared_memory=False: rewards of the first step after reset [0. 0.]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6
cat >"$folder/show.py" <<'EOF'
import gymnasium as gym, numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv


def make():
    return gym.make("MountainCar-v0", max_episode_steps=3)  # reward -1 in every step


def first_step_after_reset(name, envs):
    envs.reset(seed=1)
    for _ in range(3):
        *_, truncated, _ = envs.step(np.array([2, 2]))
    assert truncated.all()
    envs.reset(seed=7)
    obs, reward, *_ = envs.step(np.array([2, 2]))
    envs.close()
    print(f"{name}: rewards of the first step after reset {reward}")
    return obs, reward


if __name__ == "__main__":
    right, reward = first_step_after_reset("sync", SyncVectorEnv([make] * 2))
    assert (reward == -1).all()
    obs, reward = first_step_after_reset("async, shared memory", AsyncVectorEnv([make] * 2))
    assert np.array_equal(obs, right) and (reward == -1).all()
    envs = AsyncVectorEnv([make] * 2, shared_memory=False)
    obs, reward = first_step_after_reset("async, shared_memory=False", envs)
    assert (reward == 0).all() and (obs[:, 0] != right[:, 0]).all()
    assert (obs[:, 1] == 0).all()  # a car at rest: a start state
EOF
cd "$folder"
venv/bin/python show.py
