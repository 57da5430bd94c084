#!/usr/bin/env bash
# Guess: ViZDoom's gymnasium environments "treat the episode's timeout as truncation" (an option, on by default):
#   terminated=False, truncated=True, and the last picture to bootstrap from.
# What happens: a timeout is reported as terminated=True AND truncated=True, with an all-black picture and zero game
#   variables in place of the last observation. Code that masks by `terminated`, as gymnasium asks for, sees a death.
# Whom it hurts: every agent on Basic, Health Gathering and the other tasks with a clock: the value at the time limit is
#   learned as 0, from a picture that is not in the game.
# Seen with: vizdoom 1.3.2, gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   after 75 steps: terminated True, truncated True; brightest pixel 0 (255 a step before),
#   ammunition 0 (50 a step before)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vizdoom==1.3.2 gymnasium==1.4.0 numpy==2.4.6
cd "$folder"
SDL_VIDEODRIVER=dummy venv/bin/python - <<'EOF'
import gymnasium as gym
from vizdoom import gymnasium_wrapper  # registers the environments

env = gym.make("VizdoomBasic-v1", frame_skip=4)
obs, _ = env.reset(seed=0)
terminated = truncated = False
steps = 0
while not (terminated or truncated):  # no-op: nobody dies here, the clock of 300 frames runs out
    before, (obs, _, terminated, truncated, _) = obs, env.step(0)
    steps += 1
env.close()
bright = [int(o["screen"].max()) for o in (obs, before)]
ammo = [int(o["gamevariables"][0]) for o in (obs, before)]
print(
    f"after {steps} steps: terminated {terminated}, truncated {truncated}; "
    f"brightest pixel {bright[0]} ({bright[1]} a step before), ammunition {ammo[0]} ({ammo[1]} a step before)"
)
assert terminated and truncated and bright[0] == 0 and bright[1] > 0 and ammo[0] == 0 and ammo[1] == 50
EOF
