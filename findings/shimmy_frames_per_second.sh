#!/usr/bin/env bash
# Guess: an environment's metadata["render_fps"] says how many of its steps make a second, here 1 / (time of a step).
# What happens: Shimmy writes the length of a step in milliseconds there: 10 for steps of 0.01 s (100 a second), 40 for
#   steps of 0.04 s (25 a second). And it writes into the dictionary of the class, so that making another task changes
#   the environments that already exist.
# Whom it hurts: videos by gymnasium's RecordVideo and human play, which read it: cartpole ten times too slow, fish too
#   fast, and one task at another speed after an evaluation environment of another was made.
# Seen with: Shimmy 2.0.1, dm_control 1.0.50, mujoco 3.17.0, gymnasium 1.4.0, numpy 2.4.6, Python 3.11. Printed:
#   cartpole: 100 steps per second, render_fps 10
#   fish: 25 steps per second, render_fps 40
#   cartpole again, after fish was made: render_fps 40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q \
    "Shimmy[dm-control]==2.0.1" dm_control==1.0.50 mujoco==3.17.0 "gymnasium[mujoco]==1.4.0" numpy==2.4.6
cd "$folder"
MUJOCO_GL=disable venv/bin/python - <<'EOF'
import gymnasium as gym, shimmy

gym.register_envs(shimmy)
gym.logger.min_level = gym.logger.ERROR
cartpole = gym.make("dm_control/cartpole-swingup-v0")
fps = [cartpole.metadata["render_fps"]]
fish = gym.make("dm_control/fish-swim-v0")
fps += [fish.metadata["render_fps"], cartpole.metadata["render_fps"]]
print(f"cartpole: {1 / cartpole.unwrapped.dt:.0f} steps per second, render_fps {fps[0]:.0f}")
print(f"fish: {1 / fish.unwrapped.dt:.0f} steps per second, render_fps {fps[1]:.0f}")
print(f"cartpole again, after fish was made: render_fps {fps[2]:.0f}")
assert [round(f) for f in fps] == [10, 40, 40]
EOF
