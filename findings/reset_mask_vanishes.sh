#!/usr/bin/env bash
# Guess: with autoreset disabled one resets the finished environments by `envs.reset(options={"reset_mask": done})`, and
#   RecordEpisodeStatistics, which reads that mask, goes on counting the episodes of the others.
# What happens: SyncVectorEnv and AsyncVectorEnv pop the mask out of the caller's dictionary. The statistics wrapper
#   looks for it afterwards, does not find it, and clears return and length of every environment. And a dictionary that
#   is used twice resets all environments the second time, in the middle of their episodes.
# Whom it hurts: whoever reads returns and lengths in this mode: most steps are in no reported episode, and long (good)
#   episodes are reported as short ones.
# Seen with: gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   8 CartPoles, 200 steps: 1600 steps played, 69 episodes over, true lengths of these 1453 steps, reported 226
#   the dictionary after reset: {}; used again it reset 8 of 8 environments
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import gymnasium as gym, numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 8, autoreset_mode=AutoresetMode.DISABLED)
envs = RecordEpisodeStatistics(envs)
obs, _ = envs.reset(seed=0)
envs.action_space.seed(0)
length, episodes, true, reported = np.zeros(8, int), 0, 0, 0
for _ in range(200):
    obs, _, terminated, truncated, info = envs.step(envs.action_space.sample())
    length += 1
    done = terminated | truncated
    if done.any():
        episodes, true = episodes + int(done.sum()), true + int(length[done].sum())
        reported += int(info["episode"]["l"][done].sum())
        length[done] = 0
        envs.reset(options={"reset_mask": done})
print(
    f"8 CartPoles, 200 steps: 1600 steps played, {episodes} episodes over, "
    f"true lengths of these {true} steps, reported {reported}"
)
assert reported < true / 2

first = {"reset_mask": np.array([True] + [False] * 7)}
envs.reset()
before, *_ = envs.step(envs.action_space.sample())
after, _ = envs.reset(options=first)
assert (after != before).any(1).sum() == 1  # as asked
left = dict(first)
again, _ = envs.reset(options=first)
count = int((again != after).any(1).sum())
print(f"the dictionary after reset: {left}; used again it reset {count} of 8 environments")
assert left == {} and count == 8
EOF
