#!/usr/bin/env bash
# Guess: a vector environment's `info` holds what its environments put into theirs.
# What happens: the array for a key gets the type of the first environment that has the key in this step, and the
#   others' values are cast to it. FrozenLake's `prob` is the integer 1 after a reset and the float 1/3 after a step on
#   ice: whenever environment 0 is being reset, the other environments' probability reads 0.
# Whom it hurts: every log or learner that reads `info`; nothing warns, and the same key is right in the next step. The
#   like happens to True/2.5, to 0/0.75 and to float32/float64.
# Seen with: gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   step 7: vector [1 1 0], the environments themselves [1.0, 1.0, 0.333]
#   200 steps: 45 probabilities of 1/3 were reported as 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import gymnasium as gym, numpy as np


class Remember(gym.Wrapper):  # keeps what this environment said
    def reset(self, **kwargs):
        obs, self.said = self.env.reset(**kwargs)
        return obs, self.said

    def step(self, action):
        *rest, self.said = self.env.step(action)
        return *rest, self.said


envs = gym.vector.SyncVectorEnv([lambda: Remember(gym.make("FrozenLake-v1"))] * 3)
envs.reset(seed=0)
envs.action_space.seed(0)
lost = 0
for step in range(200):
    info = envs.step(envs.action_space.sample())[-1]
    true = np.array([env.said["prob"] for env in envs.envs])
    wrong = (info["prob"] == 0) & (true > 0)
    if wrong.any() and not lost:
        print(f"step {step}: vector {info['prob']}, the environments themselves {[round(float(p), 3) for p in true]}")
    lost += int(wrong.sum())
print(f"200 steps: {lost} probabilities of 1/3 were reported as 0")
assert lost > 10
EOF
