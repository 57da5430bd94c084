"""Every family of environments through the real path, to the end: acting, replay, updates, dream video, evaluation."""

import importlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

# Scripts of the second shape: {name: flags of a run of the whole code path, 128 agent steps}.
TINY = {
    "dreamerv3": "--preset cpu --deter 32 --hidden 16 --units 16 --cnn-depth 8 --stoch 4 --classes 4 --batch-size 4 "
    "--batch-length 8 --imag-starts 8 --imag-horizon 5 --num-envs 2 --total-timesteps 128 --learning-starts 64 "
    "--train-ratio 4 --eval-episodes 1 --max-episode-steps 40 --log-every 50 --save-every 1000 --no-cuda"
}
PLANET = (
    "--preset cpu --belief-size 16 --state-size 6 --hidden-size 16 --reward-units 16 --reward-layers 1 --cnn-depth 4 "
    "--batch-size 4 --batch-length 8 --plan-horizon 4 --plan-iterations 2 --plan-candidates 12 --plan-elites 3 "
    "--num-envs 2 --total-timesteps 96 --seed-episodes 2 --initial-updates 3 --updates-per-episode 1 "
    "--eval-episodes 1 --max-episode-steps 24 --log-every 30 --save-every 1000 --no-cuda"
).split()
MUZERO = (
    "--preset cpu --hidden 16 --latent 8 --channels 4 --blocks 1 --num-simulations 4 --batch-size 4 --num-envs 2 "
    "--total-timesteps 96 --learning-starts 48 --td-steps 3 --unroll-steps 2 --train-ratio 0.14 --eval-episodes 1 "
    "--max-episode-steps 20 --log-every 50 --save-every 1000 --buffer-size 1000 --no-cuda"
).split()
# id of the case: (flags, what the agent sees, actions: their number or the shape of a box)
CASES = {
    "atari": ("--env-id ALE/Breakout-v5 --image-size 64", (64, 64, 3), 4),
    "atari-grey": (
        '--env-id ALE/Pong-v5 --image-size 32 --grayscale --env-kwargs {"full_action_space":true}',
        (32, 32, 1),
        18,
    ),
    "dmc-proprio": (
        "--env-id dm_control/walker-walk-v0",
        {"height": (1,), "orientations": (14,), "velocity": (9,)},
        (6,),
    ),
    "dmc-pixels": ("--env-id dm_control/cartpole-swingup-v0 --pixels --image-size 32", (32, 32, 3), (1,)),
    "box2d": ("--env-id BipedalWalker-v3 --action-repeat 2", (24,), (4,)),
    "minatar-vector": ("--env-id MinAtar/Freeway-v1", (700,), 3),
    "minatar-pixels": ("--env-id MinAtar/SpaceInvaders-v1 --pixels", (16, 16, 3), 4),
    "numbers": ("--env-id FrozenLake-v1", (16,), 4),
    "rendered": ("--env-id Pendulum-v1 --pixels --image-size 32", (32, 32, 3), (1,)),
}


def renders():
    """Whether DeepMind Control can draw on this machine (it needs the system's EGL library)."""
    code = "import os; os.environ.setdefault('MUJOCO_GL', 'egl')\nfrom dm_control import suite\n"
    code += "suite.load('cartpole', 'swingup').physics.render(32, 32)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", CASES)
def test_environment_family(name, case, tmp_path, monkeypatch):
    """make_env gives what the agent sees; then a whole run, and the agent of its checkpoint acts and dreams."""
    flags, shapes, actions = CASES[case]
    if case == "dmc-pixels" and not renders():
        pytest.skip("MuJoCo finds no EGL library to render with (Debian: libegl1)")
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY[name].split(), *flags.split()])
    args = script.parse_args(script.Args, script.PRESETS, "")
    env, shapes = script.make_env(args, seed=7), shapes if isinstance(shapes, dict) else {"observation": shapes}
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    as_dict = lambda x: dict(x) if set(shapes) != {"observation"} else {"observation": x}  # noqa: E731
    assert {k: v.shape for k, v in as_dict(obs).items()} == shapes
    assert (
        env.action_space.n if case not in ("dmc-proprio", "dmc-pixels", "box2d", "rendered") else env.action_space.shape
    ) == actions
    for v in as_dict(obs).values():
        assert v.dtype == (np.uint8 if v.ndim == 3 else np.float32)
        assert v.ndim < 3 or v.std() > 3
    result = script.train(args)
    assert result["global_step"] == 128 and result["updates"] > 3 and np.isfinite(result["episodic_return"])
    run = next((tmp_path / "runs").iterdir())
    rows = script.load_checkpoint(str(run))["replay"]["rows"]
    assert {k: v.shape[2:] for k, v in rows.items() if k.startswith("obs/")} == {
        f"obs/{k}": s for k, s in shapes.items()
    }
    assert rows["is_first"].sum() >= 2 and rows["is_last"].sum() >= 2
    agent = script.load(str(run))
    batch = {k: np.stack([v, v]) for k, v in obs.items()} if isinstance(obs, dict) else np.stack([obs, obs])
    chosen, _ = agent.act(batch, None, np.ones(2, bool))
    assert all(env.action_space.contains(np.clip(a, -1, 1) if a.ndim else a) for a in chosen)
    frames = {k: v[:, None] for k, v in batch.items()} if isinstance(batch, dict) else batch[:, None]
    state, seen = agent.observe(frames, chosen[:, None][:, :0])
    state, reward, alive, dreamed = agent.imagine(state, chosen)
    assert np.isfinite(reward).all() and reward.shape == alive.shape == (2,) and ((0 <= alive) & (alive <= 1)).all()
    for x, lead in ((seen, (2, 1)), (dreamed, (2,))):
        found = {k: (v.shape, v.dtype) for k, v in as_dict(x).items()}
        assert found == {k: ((*lead, *v.shape), v.dtype) for k, v in as_dict(obs).items()}


# The same for planet_cem.py: (flags, what the agent sees, dimensions of the action).
PLANET_CASES = {
    "dmc-proprio": ("--env-id dm_control/walker-walk-v0 --no-pixels", (24,), 6),
    "dmc-pixels": ("--preset cpu_pixels --env-id dm_control/cheetah-run-v0 --image-size 32", (32, 32, 3), 6),
    "rendered": ("--env-id Pendulum-v1 --pixels --image-size 32", (32, 32, 3), 1),
    "classic": ("--env-id Pendulum-v1 --no-pixels --reward-scale 0.1 --action-repeat 2", (3,), 1),
    "box2d": ("--env-id BipedalWalker-v3 --no-pixels --max-episode-steps 110 --total-timesteps 360", (24,), 4),
    "own-images": (
        "--env-id CarRacing-v3 --no-pixels --image-size 16 --max-episode-steps 8 --total-timesteps 32",
        (16, 16, 3),
        3,
    ),
}


@pytest.mark.parametrize("case", PLANET_CASES)
def test_planet_environment_family(case, tmp_path, monkeypatch):
    """Episodes are stored whole; the agent of the checkpoint acts, sees and dreams."""
    flags, shape, dimensions = PLANET_CASES[case]
    if case == "dmc-pixels" and not renders():
        pytest.skip("MuJoCo finds no EGL library to render with (Debian: libegl1)")
    script = importlib.import_module("planet_cem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["planet_cem.py", *PLANET, *flags.split()])
    args = script.parse_args(script.Args, script.PRESETS, "")
    result = script.train(args)
    (run,) = (tmp_path / "runs").iterdir()
    state, agent = script.load_checkpoint(str(run)), script.load(str(run))
    rows, lengths = state["replay"]["rows"], state["replay"]["lengths"]
    assert np.isfinite(result["episodic_return"]) and result["global_step"] == args.total_timesteps
    assert len(lengths) == sum(state["loop"]["episode"]) and result["updates"] == 3 + len(lengths) - 2 > 3
    assert max(lengths) <= args.max_episode_steps + 1 and rows["obs"].shape[1:] == shape
    assert rows["action"].shape[1:] == (dimensions,) and rows["action"].abs().max() <= 1
    assert sum((rows["action"] == 0).all(1)) == len(lengths)  # only the first row of an episode
    assert rows["obs"].float().std() > (3 if len(shape) == 3 else 0.01)
    obs, actions = rows["obs"][:4].numpy(), rows["action"][1:4].numpy()
    dream, seen = agent.observe(np.stack([obs, obs]), np.stack([actions, actions]))
    _, reward, alive, after = agent.imagine(dream, agent.act(obs[:2], None, np.ones(2, bool))[0])
    assert seen.shape == (2, 4, *shape) and seen.dtype == after.dtype == obs.dtype and after.shape == (2, *shape)
    assert np.isfinite(reward).all() and (alive == 1).all()


# The same for muzero.py: (flags, shape of an observation, actions).
ATARI = "--frame-stack 3 --image-size 32 --max-episode-steps 12 --total-timesteps 60 --learning-starts 24"
MUZERO_CASES = {
    "atari": (f"--env-id ALE/Breakout-v5 {ATARI} --network paper --action-planes", (32, 32, 3), 18),
    "atari100k": (
        f"--env-id ALE/Pong-v5 {ATARI} --network efficientzero --consistency-scale 2 --reanalyse 1 --augment "
        '--env-kwargs {"full_action_space":false} --clip-rewards --episodic-life --per-alpha 0.6 --optimizer sgd '
        "--grayscale",
        (32, 32, 1),
        6,
    ),
    "minatar": ("--env-id MinAtar/Breakout-v1 --network conv --search gumbel", (400,), 3),
    "minatar-pixels": ("--env-id MinAtar/Freeway-v1 --pixels --image-size 16", (16, 16, 3), 3),
    "box2d": ("--env-id LunarLander-v3 --action-repeat 2 --q-norm tree", (8,), 4),
    "numbers": ("--env-id FrozenLake-v1 --frame-stack 2", (16,), 4),
    "rendered": ("--env-id CartPole-v1 --pixels --image-size 32 --network conv", (32, 32, 3), 2),
    "tictactoe": ("--preset cpu_tictactoe --network conv --td-steps 0 --reanalyse 0.5 --temperature-moves 3", (18,), 9),
    "connect4": ("--preset connect4 --td-steps 0 --search gumbel --max-episode-steps 50", (84,), 7),
}


@pytest.mark.parametrize("case", MUZERO_CASES)
def test_muzero_environment_family(case, tmp_path, monkeypatch):
    """Acting, replay, Reanalyse, updates, evaluation, also interrupted; the agent acts, sees and dreams."""
    flags, shape, actions = MUZERO_CASES[case]
    script = importlib.import_module("muzero")
    update, calls, words = script.Learner.update, [], [*MUZERO, *flags.split(), "--save-every", "40"]

    def stopping(learner, batch):
        """A signal some steps after a scheduled checkpoint."""
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner, batch)

    results = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "parts":
            monkeypatch.setattr(script.Learner, "update", stopping)
            with pytest.raises(SystemExit, match="143"):
                run_script(script, words, monkeypatch)
            monkeypatch.setattr(script.Learner, "update", update)
            words = ["--resume", f"runs/{os.listdir('runs')[0]}"]
        result = run_script(script, words, monkeypatch)
        (run,) = (tmp_path / name / "runs").iterdir()
        results.append(result | dict(state=script.load_checkpoint(str(run))))
    whole, parts = results
    total = int(flags.split("--total-timesteps ")[1].split()[0]) if "--total" in flags else 96
    assert whole["global_step"] == total and whole["updates"] > 3 and np.isfinite(whole["episodic_return"])
    rows = whole["state"]["replay"]["rows"]
    assert rows["obs"].shape[2:] == shape and rows["policy"].shape[2:] == (actions,)
    assert len(shape) < 3 or rows["obs"].numpy().std() > 3
    assert rows["is_first"].sum() >= 2 and rows["is_last"].sum() >= 2
    for k, v in rows.items():
        assert torch.equal(v, parts["state"]["replay"]["rows"][k]), f"{k} differs after the interruption"
    model = parts["state"]["learner"]["model"]
    assert all(torch.equal(v, model[k]) for k, v in whole["state"]["learner"]["model"].items())
    assert whole["returns"] == parts["returns"]
    agent, obs = script.load(str(run)), rows["obs"][:, :4].numpy()
    chosen, _ = agent.act(obs[:, 0], None, np.ones(2, bool), greedy=True)
    assert chosen.shape == (2,) and ((0 <= chosen) & (chosen < actions)).all()
    state, seen = agent.observe(obs, rows["action"][:, :3].numpy())
    _, reward, alive, after = agent.imagine(state, chosen)
    assert seen.shape == (2, 4, *agent.dream_space.shape) and agent.dream_space.contains(after[0])
    assert (after != seen[:, -1]).any() and np.isfinite(reward).all() and (alive == 1).all()


def run_script(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return script.train(script.parse_args(script.Args, script.PRESETS, ""))


IRIS = (
    "--preset cpu --steps-per-epoch 16 --tokenizer-start 0 --tokenizer-stop 100 --world-model-start 1 "
    "--actor-critic-start 2 --tokenizer-updates 1 --world-model-updates 1 --actor-critic-updates 1 --tok-channels 8 "
    "--embed-dim 16 --num-layers 1 --imag-horizon 3 --lstm-size 8 --tokenizer-batch-size 4 --batch-size 2 "
    "--batch-length 4 --ac-batch-size 4 --num-envs 2 --total-timesteps 64 --eval-episodes 1 "
    "--max-episode-steps 20 --log-every 32 --save-every 1000 --no-cuda"
).split()
# The same for iris.py: (flags, number of actions, emulator frames per agent step).
IRIS_CASES = {
    "catch": ("--env-id Catch-v0 --image-size 32", 3, 1),
    "atari": ("--env-id ALE/Breakout-v5 --image-size 64", 4, 4),
    "atari-all-actions": ('--env-id ALE/Pong-v5 --image-size 32 --env-kwargs {"full_action_space":true}', 18, 4),
    "minatar": ("--env-id MinAtar/Breakout-v1 --pixels --image-size 32", 3, 1),
    "rendered": ("--env-id CartPole-v1 --pixels --image-size 32 --action-repeat 2", 2, 2),
}


@pytest.mark.parametrize("case", IRIS_CASES)
def test_iris_environment_family(case, tmp_path, monkeypatch):
    flags, actions, repeat = IRIS_CASES[case]
    script = importlib.import_module("iris")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["iris.py", *IRIS, *flags.split()])
    args = script.parse_args(script.Args, script.PRESETS, "")
    result = script.train(args)
    assert result["global_step"] == 64 and result["updates"] == 9 and np.isfinite(result["episodic_return"])
    run = next((tmp_path / "runs").iterdir())
    state, agent, side = script.load_checkpoint(str(run)), script.load(str(run)), args.image_size
    rows = state["replay"]["rows"]
    assert rows["obs"].shape == (2, 32, side, side, 3) and rows["obs"].numpy().std() > 3
    assert rows["action"].max() < actions and args.action_repeat in (None, repeat)
    assert len(state["replay"]["episodes"]) >= 4  # of at most 20 steps
    assert all(stop - start <= 20 for _, start, stop in state["replay"]["episodes"])
    obs = rows["obs"][:, :4].numpy()
    dream, seen = agent.observe(obs, rows["action"][:, :3].numpy())
    chosen, _ = agent.act(obs[:, 0], None, np.ones(2, bool))
    _, reward, alive, after = agent.imagine(dream, chosen)
    assert seen.shape == obs.shape and after.shape == obs[:, 0].shape and seen.dtype == after.dtype == np.uint8
    assert set(reward) <= {-1.0, 0.0, 1.0} and set(alive) <= {0.0, 1.0} and chosen.max() < actions


DIAMOND = (
    "--preset cpu --denoiser-channels 8,8 --denoiser-cond 16 --rew-end-channels 8,8 --rew-end-cond 8 --rew-end-lstm 8 "
    "--actor-channels 4,8 --actor-lstm 8 --imag-envs 2 --imag-horizon 3 --start-pool 4 --batch-size 2 "
    "--rew-end-length 6 --num-envs 2 --total-timesteps 120 --learning-starts 80 --learning-starts-max 80 "
    "--collect-steps 20 --first-denoiser-updates 2 --first-rew-end-updates 2 --first-actor-updates 2 "
    "--denoiser-updates 1 --rew-end-updates 1 --actor-updates 1 --eval-episodes 1 "
    "--max-episode-steps 40 --log-every 40 --save-every 1000 --no-cuda"
).split()
# id of the case: (flags, side and channels of the stored frames, actions)
DIAMOND_CASES = {
    "atari": ("--env-id ALE/Breakout-v5 --no-pixels --image-size 32", (32, 3), 4),
    "atari-all-actions": (
        '--env-id ALE/Pong-v5 --no-pixels --image-size 21 --num-envs 1 --env-kwargs {"full_action_space":true}',
        (21, 3),
        18,
    ),
    "minatar": ("--env-id MinAtar/SpaceInvaders-v1 --image-size 12", (12, 3), 4),
    "rendered": ("--env-id CartPole-v1 --image-size 16", (16, 3), 2),
}


@pytest.mark.parametrize("case", DIAMOND_CASES)
def test_diamond_environment_family(case, tmp_path, monkeypatch):
    flags, (side, channels), actions = DIAMOND_CASES[case]
    script = importlib.import_module("diamond")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diamond.py", *DIAMOND, *flags.split()])
    result = script.train(script.parse_args(script.Args, script.PRESETS, ""))
    assert result["global_step"] == 120 and result["updates"] == 6 + 2 * 3 and np.isfinite(result["episodic_return"])
    run = next((tmp_path / "runs").iterdir())
    replay, agent = script.load_checkpoint(str(run))["replay"], script.load(str(run))
    frames, taken = replay["rows"]["frames"][:, :5].numpy(), replay["rows"]["actions"][:, :4].numpy()
    assert frames.shape[2:] == (side, side, channels) and replay["rows"]["frames"].numpy().std() > 3
    assert sum(T for _, _, T in replay["episodes"]) == 120 and replay["rows"]["actions"].max() < actions
    dream, seen = agent.observe(frames, taken)
    chosen, _ = agent.act(frames[:, 0], None, np.ones(len(frames), bool))
    _, reward, alive, after = agent.imagine(dream, chosen)
    assert (seen == frames).all() and after.shape == frames[:, 0].shape and after.dtype == np.uint8
    assert set(reward) <= {-1.0, 0.0, 1.0} and ((0 < alive) & (alive < 1)).all() and chosen.max() < actions


# ha2018_carracing.py: both experiments of the paper with their full networks and real environments, few and short
# episodes and updates; and other families with small networks, which learn in the dream.
HA2018_SHORT = (
    "--no-cuda --no-compile --num-threads 1 --log-every 1 --generations 2 --popsize 4 --rollouts 1 --eval-every 1 "
    "--eval-rollouts 2 --eval-episodes 1 --save-generations 1"
)
HA2018_SMALL = (
    "--preset cpu_dream --num-envs 2 --collect-episodes 3 --vae-depth 2 --latent-size 4 --rnn-size 8 --vae-epochs 1 "
    "--vae-batch-size 8 --rnn-epochs 1 --rnn-batch-size 2 --rnn-batch-length 8 --max-episode-steps 12 --iterations 1"
)
HA2018_CASES = {
    "car-racing": (
        "--num-envs 2 --collect-episodes 3 --max-episode-steps 30 --vae-epochs 1 --vae-batch-size 30 --rnn-epochs 1 "
        "--rnn-batch-size 3 --rnn-batch-length 20 --num-workers 2",
        (3, "car"),
    ),
    "take-cover": (
        "--preset takecover --num-envs 2 --collect-episodes 2 --min-episode-steps 101 --vae-epochs 1 "
        "--vae-batch-size 100 --rnn-epochs 1 --rnn-batch-size 2 --rnn-batch-length 20 --max-episode-steps 150 "
        "--num-workers 2",
        (1, "box"),
    ),
    "atari": (f"{HA2018_SMALL} --env-id ALE/Breakout-v5 --predict-reward", (4, "discrete")),
    "minatar": (f"{HA2018_SMALL} --env-id MinAtar/Breakout-v1 --pixels", (3, "discrete")),
    "rendered": (f"{HA2018_SMALL} --env-id Pendulum-v1 --pixels --predict-reward --no-predict-done", (1, "box")),
    "box2d": (
        f"{HA2018_SMALL} --env-id LunarLander-v3 --pixels --action-repeat 2 --controller-hidden 3", (4, "discrete"),
    ),
    "car-dream": (f"{HA2018_SMALL} --env-id CarRacing-v3 --predict-reward --collect-policy momentum", (3, "car")),
}  # fmt: skip


@pytest.mark.parametrize("case", HA2018_CASES)
def test_ha2018_environment_family(case, tmp_path, monkeypatch):
    """Collect, V, M, C, measuring, the evaluation with the environment's own pictures; then the dream of it."""
    flags, (actions, kind) = HA2018_CASES[case]
    script = importlib.import_module("ha2018_carracing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ha2018_carracing.py", *flags.split(), *HA2018_SHORT.split()])
    args = script.parse_args(script.Args, script.PRESETS, "")
    result = script.main(args)
    assert os.listdir(tmp_path) == ["runs"]  # Doom's engine likes to write its settings here
    run = next((tmp_path / "runs").iterdir())
    state = script.load_checkpoint(str(run), "ha2018_carracing")
    assert state["stage"] == "done" and state["config"]["actions"] == actions and state["config"]["kind"] == kind
    assert np.isfinite(list(result["prediction_errors"].values())).all() and len(result["returns"]) == 1
    if case in ("car-racing", "take-cover"):  # the sizes of the paper
        counts = {k: sum(v.numel() for n, v in state["model"].items() if n.startswith(k)) for k in ("vae", "rnn")}
        counts["controller"] = state["model"]["controller.theta"].numel()
        sizes = (4_348_547, 422_368, 867) if case == "car-racing" else (4_446_915, 1_678_785, 1_088)
        assert tuple(counts.values()) == sizes
    files = sorted((run / "data").glob("*.npz"))
    assert len(files) == args.collect_episodes
    episode = np.load(files[0])
    assert episode["frames"].shape[1:] == (64, 64, 3) and episode["frames"].std() > 3
    assert episode["action"].shape == (len(episode["reward"]), actions) and episode["action"].std() > 0
    assert len(episode["reward"]) >= args.min_episode_steps
    env = script.DreamEnv(str(run))
    first, _ = env.reset(seed=0)
    action = env.action_space.sample()
    second = env.step(action)[0]
    seen = env.reset(seed=0, options={"observations": episode["frames"][:5], "actions": [action] * 5})[0]
    assert first.shape == second.shape == seen.shape == (64, 64, 3) and (first != second).any()


GENIE = (
    "--preset cpu --num-envs 2 --total-timesteps 80 --test-timesteps 40 --shard-steps 40 --tok-updates 1 "
    "--lam-updates 1 --dyn-updates 1 --tok-batch-size 2 --batch-size 2 --eval-clips 4 --label-steps 0 "
    "--max-episode-steps 20 --seq-len 4 --no-cuda"
).split()
# id of the case: (flags, side and channels of the stored frames, actions)
GENIE_CASES = {
    "atari": ("--env-id ALE/Breakout-v5 --env-kwargs {} --no-pixels --image-size 32 --tok-patch 8", (32, 3), 4),
    "atari-grey": ("--env-id ALE/Pong-v5 --env-kwargs {} --no-pixels --image-size 21 --grayscale --full-action-space "
                   "--num-envs 1 --tok-patch 7 --lam-patch 7", (21, 1), 18),
    "minatar": ("--env-id MinAtar/SpaceInvaders-v1 --image-size 12", (12, 3), 4),
    "rendered": ("--env-id CartPole-v1 --env-kwargs {} --image-size 16", (16, 3), 2),
    "continuous": ("--env-id Pendulum-v1 --env-kwargs {} --image-size 16", (16, 3), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", GENIE_CASES)
def test_genie_environment_family(case, tmp_path, monkeypatch):
    flags, (side, channels), actions = GENIE_CASES[case]
    script = importlib.import_module("genie_lam")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genie_lam.py", *GENIE, *flags.split()])
    result = script.main(script.parse_args(script.Args, script.PRESETS, ""))
    assert result["global_step"] == 80 and result["updates"] == 3 and np.isfinite(result["metrics"]["dream_psnr_1"])
    assert ("action_accuracy" in result["metrics"]) == (actions > 0)
    run = next((tmp_path / "runs").iterdir())
    assert len(list((run / "videos").glob("open_loop-*.gif"))) == len(list((run / "videos").glob("grid-*.png"))) == 1
    with np.load(run / "data" / "shard-00000.npz") as video:
        assert video["frames"].shape[1:] == (side, side, channels) and video["frames"].std() > 3
        assert video["first"].sum() >= 2 and (video["action"] >= 0).sum() == 40 * (actions > 0)
        assert video["action"].max() < max(1, actions)
    assert script.load_checkpoint(str(run), "genie_lam")["spaces"]["action"] == actions
