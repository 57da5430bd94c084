"""Every family of environments through the real path, to the end: acting, replay, updates, dream video, evaluation."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

TINY = (
    "--preset cpu --deter 32 --hidden 16 --units 16 --cnn-depth 8 --stoch 4 --classes 4 --batch-size 4 "
    "--batch-length 8 --imag-starts 8 --imag-horizon 5 --num-envs 2 --total-timesteps 128 --learning-starts 64 "
    "--train-ratio 4 --eval-episodes 1 --report-every 100 --max-episode-steps 40 --log-every 50 "
    "--save-every 1000 --no-cuda"
).split()
# id of the case: (flags, kind of observation, whether it needs a renderer)
CASES = {
    "atari": (["--env-id", "ALE/Breakout-v5", "--image-size", "64", "--sticky-actions", "0"], "image", False),
    "atari-grey": (
        ["--env-id", "ALE/Pong-v5", "--image-size", "32", "--grayscale", "--full-action-space"],
        "image",
        False,
    ),
    "dmc-proprio": (["--env-id", "dm_control/walker-walk-v0"], "vector", False),
    "dmc-pixels": (["--env-id", "dm_control/cartpole-swingup-v0", "--pixels", "--image-size", "32"], "image", True),
    "box2d": (["--env-id", "BipedalWalker-v3", "--action-repeat", "2"], "vector", False),
    "minatar-vector": (["--env-id", "MinAtar/Freeway-v1"], "vector", False),
    "minatar-pixels": (["--env-id", "MinAtar/SpaceInvaders-v1", "--pixels"], "image", False),
    "numbers": (["--env-id", "FrozenLake-v1"], "number", False),
    "rendered": (["--env-id", "Pendulum-v1", "--pixels", "--image-size", "32"], "image", False),
}


def renders():
    """Whether DeepMind Control can draw on this machine (it needs the system's EGL library)."""
    code = "import os; os.environ.setdefault('MUJOCO_GL', 'egl')\nfrom dm_control import suite\n"
    code += "suite.load('cartpole', 'swingup').physics.render(32, 32)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("name", ["dreamerv3"])
@pytest.mark.parametrize("case", CASES)
def test_environment_family(name, case, tmp_path, monkeypatch):
    flags, kind, needs_renderer = CASES[case]
    if needs_renderer and not renders():
        pytest.skip("MuJoCo finds no EGL library to render with (Debian: libegl1)")
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY, *flags])
    args = script.parse_args(script.Args, script.PRESETS, "")
    result = script.main(args)
    assert result["global_step"] == 128 and result["updates"] > 3 and np.isfinite(result["episodic_return"])
    run = next((tmp_path / "runs").iterdir())
    assert json.loads((run / "result.json").read_text())["updates"] == result["updates"]
    assert len(list((run / "videos").glob("open_loop-*.gif"))) == 1
    rows = script.load_checkpoint(str(run), name)["replay"]["rows"]
    seen = {k: v for k, v in rows.items() if k.startswith("obs/")}
    assert rows["is_first"].sum() >= 2 and rows["is_last"].sum() >= 2
    if kind == "image":
        (image,) = seen.values()
        side = args.image_size
        assert image.shape[2:] == (side, side, 1 if args.grayscale else 3) and image.numpy().std() > 3
    elif kind == "vector":
        assert all(v.dim() == 3 and v.is_floating_point() for v in seen.values())
    else:
        assert all(v.dim() == 2 and not v.is_floating_point() for v in seen.values())
