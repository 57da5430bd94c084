# ruff: noqa: F811 (fixtures of test_faults.py are imported, and arguments)
"""Bad inputs and faults of genie_lam.py. It records first and then trains in stages, so that steps and updates do not
alternate as in the other scripts: rows of test_faults.py that fit are taken from there, the others have their own form
here."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import stub_env
import torch
from test_faults import (  # noqa: F401 (tests and fixtures that are collected here, with the script below)
    ROOT,
    STUB,
    Script,
    as_if_unbroken,
    bytes_of,
    clean,
    damage,
    error_lines,
    finite,
    flat,
    largest_file,
    load,
    next_second,
    only_run,
    outcome,
    same,
    scalars,
    stop_once,
    test_15_package_of_the_environment_is_missing,
    test_21_no_time_limit,
    test_22_30_no_cuda_and_another_working_directory,
    test_23_no_compiler,
    test_27_output_folder_is_read_only,
    test_27_output_is_not_writable,
    test_28_two_runs_in_the_same_second,
    test_29_odd_names,
    test_31_help,
    test_32_empty_directory,
    test_34_checkpoint_of_another_script,
    test_35_run_stopped_before_its_first_episode,
    test_36_malicious_checkpoint,
    test_40_killed_while_saving,
    test_44_nohup_keeps_a_run_alive,
    test_44_other_stop_signals,
    test_47_48_killed_and_resumed_is_as_if_unbroken,
    test_56_reward_scales,
    test_59_60_bad_numbers_make_no_step,
    test_61_seeds,
    test_62_flags_are_frozen,
    test_64_without_optional_blocks,
    test_65_tracker_gets_the_curves_without_asking_for_a_key,
    test_65_tracker_is_missing,
    test_69_target_missed,
    test_71_reader_of_the_pipe_is_gone,
    test_parser,
    test_usage,
    test_usage_errors_of_evaluate,
    test_usage_errors_of_play,
    trained,
    unbroken,
    usage_error,
)

# 64 agent steps in two shards, then three updates of each part, a checkpoint after the second and the third.
# Environments of the stub: 0 and 1 probe, 2 and 3 are the random baseline, 4 and 5 the test video, 6 and 7 the
# demonstrations, 8 and 9 the video, then come those of the final evaluation.
GENIE = dict(
    tiny="--preset cpu --no-cuda --no-pixels --num-envs 2 --total-timesteps 64 --test-timesteps 32 --demo-steps 32 "
    "--shard-steps 32 --max-episode-steps None --image-size 16 --seq-len 4 --tok-patch 8 --tok-dim 8 --tok-heads 2 "
    "--tok-codes 8 --tok-code-dim 4 --num-actions 4 --action-dim 4 --lam-patch 8 --lam-dim 8 --lam-heads 2 "
    "--dyn-layers 1 --dyn-dim 8 --dyn-heads 2 --policy-dim 8 --policy-heads 2 --label-steps 8 --demonstrator random "
    "--tok-updates 3 --lam-updates 3 --dyn-updates 3 --policy-updates 3 --tok-batch-size 4 --batch-size 4 "
    "--eval-clips 4 --maskgit-steps 2 --log-every 1 --save-every 2 --report-every 0 --eval-episodes 2 "
    "--target-return None",
    train_instance=0,
    update=("GenieLearner", "update"),
    plant=lambda learner: learner.model.lam.decoder.head.bias,
    term="lam_recon",
    faults=dict(obs="image"),
    spaces=[],
    state="learner data updates counts random_return metrics map",
    exact_stop=True,
    early=None,
    resize=("--dyn-dim", "8", "16"),
    rich=dict(obs="image"),
    extra=["--report-every", "2"],
    pictures=[],
    other="ALE/Breakout-v5",
    chatty="--tok-updates 300 --lam-updates 1 --dyn-updates 1 --policy-updates 1 --save-every 10000",
    flags="action-cond action-dim action-repeat batch-size beta1 beta2 bf16 buffer-size capture-video clean-past "
    "compile cuda dataset demo-steps demonstrator dyn-dim dyn-head-dim dyn-heads dyn-layers dyn-updates env-id "
    "env-kwargs eval-clips eval-episodes evaluate exp-name ffn-mult full-action-space grayscale image-size "
    "image-width label-steps lam-dim lam-heads lam-layers lam-learning-rate lam-pair-input lam-patch lam-reset "
    "lam-residual lam-shift lam-updates learning-rate log-every lr-floor mask-min maskgit-steps "
    "max-episode-steps max-grad-norm noop-max num-actions num-envs num-threads pixels play policy-dim "
    "policy-heads policy-layers policy-updates preset prompt-frames recon-scale recorder replay-cuda "
    "report-every resume save-every seed seq-len shard-steps skip-bad stage sticky-actions target-return "
    "temperature test-timesteps tok-batch-size tok-code-dim tok-codes tok-decoder-dim tok-decoder-heads "
    "tok-decoder-layers tok-dim tok-fsq tok-heads tok-layers tok-learning-rate tok-local tok-lr-floor tok-patch "
    "tok-reset tok-updates tok-warmup token-temperature torch-deterministic total-timesteps track vq-beta "
    "wandb-entity wandb-project-name warmup-updates weight-decay",
)


@pytest.fixture(scope="session")
def script():
    return Script("genie_lam", GENIE)


# ---- Usage errors ----------------------------------------------------------------------------------------------------


USAGE = [
    ("6-tok-updates", ["--tok-updates", "0"], ["--tok-updates must be at least 1, got 0"]),
    ("6-seq-len", ["--seq-len", "1"], ["--seq-len must be 2 to", "got 1"]),
    ("8-beta", ["--beta2", "1"], ["--beta2 must be 0 to 0.999999, got 1"]),
    ("8-mask", ["--mask-min", "nan"], ["--mask-min must be 0 to 1, got nan"]),
    ("10-heads", ["--tok-dim", "100", "--tok-heads", "8"], ["--tok-dim 100", "--tok-heads 8", "remainder 4"]),
    ("10-odd", ["--dyn-dim", "6", "--dyn-heads", "2"], ["--dyn-dim 6", "--dyn-heads 2", "odd width 3"]),
    ("fsq", ["--tok-fsq", "8 x"], ["--tok-fsq", "'8 x'"]),
    ("fsq-one", ["--tok-fsq", "8 1"], ["--tok-fsq", "'8 1'"]),
    ("prompt", ["--prompt-frames", "4"], ["--prompt-frames 4", "--seq-len 4"]),
    ("labels", ["--label-steps", "33"], ["--label-steps 33", "--demo-steps 32"]),
    ("no-policy", ["--stage", "policy", "--label-steps", "0"], ["--stage policy", "--label-steps"]),
    ("no-target", ["--target-return", "1", "--label-steps", "0"], ["--target-return", "--label-steps"]),
    ("width", ["--image-width", "32"], ["--image-width", "--dataset"]),
    ("16-continuous", [dict(action="box")], ["--env-id", STUB, "Discrete actions", "Box("]),
    ("18-vector", [dict(obs="vector")], ["--env-id", STUB, "must be one image", "(3,)", "--pixels"]),
    ("19-several", [dict(obs="dict")], ["must be one image", "'discrete'", "'image'", "'vector'"]),
    ("recorder", ["--recorder", "nowhere:f"], ["--recorder", "'nowhere:f'"]),
    ("recorder-name", ["--recorder", "os:nothing"], ["--recorder", "'os:nothing'"]),
    ("recorder-game", [{}, "--recorder", "breakout"], ["--env-id", STUB, "MinAtar/Breakout-v1"]),
    ("68-no-folder", ["--dataset", "nowhere", "--label-steps", "0"], ["--dataset nowhere: no such folder"]),
    ("68-labels", ["--dataset", "."], ["--label-steps", "--dataset"]),
    ("control", ["--env-id", "dm_control/walker-walk-v0"], ["dm_control/walker-walk-v0", "no adapter"]),
]


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in USAGE])
def test_usage_of_stages(script, tmp_path, argv, words):
    usage_error(script, script.call(*script.tiny, *script.need(argv)), words)
    assert os.listdir(tmp_path) == []


def test_34_resume_cannot_change_the_run(script, trained):
    before = bytes_of(trained)
    for flag, old, new in (script.resize, ("--num-envs", "2", "4"), ("--seed", "1", "2"), ("--seq-len", "4", "3")):
        usage_error(script, script.call("--resume", trained, flag, new), [flag, old, new])
    assert bytes_of(trained) == before


def test_35_finished_run_resumed(script, trained):
    before = bytes_of(trained)
    result = script.call("--resume", trained)
    assert result.code == 0 and "nothing to do: tokenizer 3 of 3, lam 3 of 3" in result.out
    assert bytes_of(trained) == before


def test_67_headless(script, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    env = script.mod.make_env(script.mod.Args(env_id="CartPole-v1", pixels=True, image_size=16), 0)()
    image = np.asarray(next(iter(env.reset()[0].values())))
    env.close()
    assert image.shape == (16, 16, 3) and image.min() < image.max() and os.environ["SDL_VIDEODRIVER"] == "dummy"


# ---- Stages ----------------------------------------------------------------------------------------------------------


def test_stages_one_by_one_are_as_if_in_one_run(script, unbroken):
    """--stage X trains X and what it needs; --resume with another stage goes on, bit for bit."""
    assert script.run("--stage", "data").code == 0
    run = only_run()
    assert load(run)["counts"] == dict(tokenizer=0, lam=0, dynamics=0, policy=0) and load(run)["global_step"] == 64
    for stage, trained_parts in (("tokenizer", 1), ("lam", 2), ("dynamics", 3), ("policy", 4)):
        next_second(run)
        result = script.call("--resume", run, "--stage", stage)
        assert result.code == 0, result.err
        assert list(load(run)["counts"].values()) == [3] * trained_parts + [0] * (4 - trained_parts)
    mine, theirs = load(run), load(unbroken)
    same(mine["learner"], theirs["learner"])
    same(mine["data"], theirs["data"])
    keys = ("metrics", "returns", "episodic_return", "random_return", "demonstrator_return")
    assert all(outcome(run)[k] == outcome(unbroken)[k] for k in keys)


def test_true_actions_are_never_shown_to_the_model(script, trained, unbroken, tmp_path):
    """With all stored actions shuffled, every weight is the same; the evaluation is not, and the table is of other
    labels."""
    assert script.run("--stage", "data").code == 0
    run, changed = only_run(), 0
    for name in sorted(os.listdir(os.path.join(run, "data"))):
        path = os.path.join(run, "data", name)
        with np.load(path) as file:
            video = dict(file)
        known = np.flatnonzero(video["action"] >= 0)
        before = video["action"].copy()
        video["action"][known] = np.random.default_rng(0).permutation(video["action"][known])
        changed += (before != video["action"]).sum()
        np.savez_compressed(path, **video)
    assert changed > 50
    next_second(run)
    assert script.call("--resume", run, "--stage", "all").code == 0
    mine, theirs = load(run)["learner"], load(unbroken)["learner"]
    table = mine["model"].pop("action_table"), theirs["model"].pop("action_table")
    same(mine, theirs)
    assert not torch.equal(*table) and table[0].sum() == table[1].sum() == 8


def stored(run, name):
    with np.load(os.path.join(run, "data", f"{name}.npz")) as file:
        return dict(file)


@pytest.mark.parametrize("faults, length", [(dict(length=5), 5), (dict(length=None, truncate_at=6), 6)])
def test_57_stored_video(script, faults, length):
    """Frames, first marks and actions are those that the environment sent and got, the last frame of an episode
    included; two shards go on where the last one stopped, with new episodes."""
    assert script.run("--stage", "lam", faults=faults).code == 0
    run, log, found = only_run(), list(stub_env.StubEnv.log), []
    for instance in (4, 5):  # the probe (0, 1), the baseline and the test video come before... see below
        assert any(entry[0] == instance for entry in log)
    for name in ("shard-00000", "shard-00001"):
        video = stored(run, name)
        begins = [*np.flatnonzero(video["first"]), len(video["first"])]
        for a, b in zip(begins, begins[1:]):
            found.append((video["frames"][a:b, 0, 0, 0].tolist(), video["action"][a:b].tolist()))
    episodes = {}
    for instance, episode, t, action, start in log:
        if instance in (8, 9):
            episodes.setdefault((instance, episode), []).append((10 * (t % 20) + int(50 * start), action))
    made = []
    for rows in episodes.values():
        if len(rows) > 1:
            made.append(([frame for frame, _ in rows], [int(a) for _, a in rows[1:]] + [-1]))
    assert sorted(found) == sorted(made) and sum(len(f) - 1 for f, _ in found) == 64
    assert max(len(f) for f, _ in found) == length + 1


@pytest.mark.parametrize("argv, flag", [
    (["--test-timesteps", 2], "--test-timesteps"), (["--demo-steps", 4, "--label-steps", 4], "--demo-steps"),
    (["--shard-steps", 4], "--seq-len"),
])  # fmt: skip
def test_55_episodes_shorter_than_a_clip(script, argv, flag):
    usage_error_of_data(script.run(*argv), flag)


def test_55_episodes_that_end_at_once(script):
    usage_error_of_data(script.run(faults=dict(length=1)), "--seq-len")


def test_55_episodes_of_an_evaluation_shorter_than_a_clip(script, trained):
    before = bytes_of(trained)
    usage_error_of_data(script.call("--evaluate", trained, "--test-timesteps", 2), "--test-timesteps")
    assert bytes_of(trained) == before


def usage_error_of_data(result, flag):
    (line,) = result.err.splitlines()
    assert result.code == 2 and "no episode of 4 frames" in line and flag in line


def test_66_pictures(script):
    assert script.run("--capture-video").code == 0
    names = sorted(os.listdir(os.path.join(only_run(), "videos")))
    assert names == ["episode.gif", "grid-76.png", "open_loop-76.gif"]


def test_dream_env_of_a_run(script, trained):
    mod = script.mod
    env = mod.DreamEnv(trained)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs) and env.action_space.n == 4
    twice = []
    for _ in range(2):
        env.reset(seed=3)
        twice.append(np.stack([env.step(a)[0] for a in (0, 1, 2, 3, 0, 1)]))  # longer than the memory
    assert np.array_equal(*twice) and env.render().shape == (256, 256, 3)
    video = stored(trained, "test")["frames"][:3]
    obs, _ = env.reset(options={"observations": video})
    codes = env.model.lam.encode(mod.to_video(torch.as_tensor(video))[None])[0].tolist()
    other, _ = env.reset(options={"observations": video, "actions": [*codes, 0]})
    assert np.array_equal(obs, other)
    with pytest.raises(ValueError, match="observations must be"):
        env.reset(options={"observations": video[:, :8]})
    with pytest.raises(ValueError, match="need 2 actions"):
        env.reset(options={"observations": video, "actions": [0]})
    with pytest.raises(ValueError, match="not in"):
        env.step(4)
    true = mod.DreamEnv(trained, true_actions=True, max_steps=1)
    true.reset(seed=0)
    assert true.action_space.n == 3 and true.step(2)[3]


# ---- Videos of one's own ---------------------------------------------------------------------------------------------


def own_videos(n=3, frames=40, size=(12, 20), actions=True):
    os.makedirs("videos", exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        arrays = {"frames": rng.integers(0, 256, (frames, *size, 3), np.uint8)}
        arrays |= {"actions": rng.integers(0, 3, frames)} if actions else {}
        np.savez(f"videos/{i}.npz", **arrays)


DATASET = ["--dataset", "videos", "--label-steps", "0", "--image-size", "8", "--image-width", "16", "--tok-patch", "4"]


def test_68_dataset(script):
    own_videos()
    result = script.call(*script.tiny, *DATASET, "--total-timesteps", "100")
    assert result.code == 0, result.err
    run = only_run()
    assert stored(run, "shard-00000")["frames"].shape == (40, 8, 16, 3) and len(stored(run, "test")["frames"]) == 40
    assert "action_accuracy" in outcome(run)["metrics"] and "episodic_return" not in outcome(run)
    assert result.out.splitlines()[-1].count("ms per update")
    assert script.call("--evaluate", run).code == 0 and script.call("--play", run).code == 0
    shutil.rmtree("videos")
    shutil.rmtree("runs")
    own_videos(1, 60, actions=False)
    assert script.call(*script.tiny, *DATASET).code == 0
    assert "action_accuracy" not in outcome(only_run())["metrics"] and len(stored(only_run(), "test")["frames"]) == 6


@pytest.mark.parametrize("what", ["garbage", "short", "dtype", "actions", "pickle", "mp4", "empty"])
def test_68_bad_videos(script, what, monkeypatch):
    own_videos(2)
    path, good = "videos/bad.npz", np.zeros((40, 12, 20, 3), np.uint8)
    if what == "garbage":
        with open(path, "wb") as f:
            f.write(b"no video")
    elif what == "short":
        np.savez(path, frames=good[:2])
    elif what == "dtype":
        np.savez(path, frames=good.astype(float))
    elif what == "actions":
        np.savez(path, frames=good, actions=np.zeros(3, int))
    elif what == "pickle":
        np.savez(path, frames=np.array([object()]))
    elif what == "mp4":
        monkeypatch.setitem(sys.modules, "av", None)
        path = "videos/bad.mp4"
        open(path, "wb").close()
    else:
        shutil.rmtree("videos")
        os.mkdir("videos")
        path = "videos"
    result = script.call(*script.tiny, *DATASET, "--total-timesteps", "1000")
    (line,) = error_lines(result, script)
    assert result.code == 2 and path in line and "Traceback" not in result.err
    assert what != "mp4" or "pip install av" in line
    assert not os.path.exists("runs"), "nothing may be created for input that is wrong"
    if what not in ("mp4", "empty"):
        result = script.call(*script.tiny, *DATASET, "--skip-bad", "--total-timesteps", "1000")
        assert result.code == 0 and f"warning: left out {path}" in result.out


# ---- Checkpoints, signals, kills -------------------------------------------------------------------------------------


MORE = ["--tok-updates", "6"]  # resume goes on


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
def test_33_corrupt_checkpoint(script, trained, how):
    damage(os.path.join(trained, "ckpt.pt"), how)
    next_second(trained)
    result = script.call("--resume", trained, *MORE)
    assert result.code == 0, result.err
    assert re.search(r"warning: .*ckpt.pt is (damaged|not a plain).*going on from .*ckpt.prev.pt", result.out)
    assert load(trained)["counts"]["tokenizer"] == 6
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        damage(os.path.join(trained, name), how)
    usage_error(script, script.call("--resume", trained, *MORE), [trained, "ckpt.prev.pt is "])


def test_38_compiled_checkpoint(script, monkeypatch):
    compiled, real = [], torch.compile

    def fast(function, **kwargs):  # the graph is captured, only machine code is not made
        compiled.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", fast)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(self))
    result = script.run("--compile", "--stage", "lam")
    assert result.code == 0 and "warning: torch.compile" not in result.out and len(compiled) > 1
    assert not [k for k in flat(load(only_run())["learner"]) if "_orig_mod" in k]
    next_second(only_run())
    assert script.call("--resume", only_run(), "--no-compile", "--stage", "all").code == 0


def test_39_two_processes_resume_one_run(script, trained):
    hold = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "f.write(str(os.getpid())); f.flush(); print('held', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder = subprocess.Popen([sys.executable, "-S", "-c", hold, os.path.join(trained, "lock")], **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        before = bytes_of(trained)
        usage_error(script, script.call("--resume", trained, *MORE), [f"is being written by process {holder.pid}"])
        assert bytes_of(trained) == before
    finally:
        holder.kill()
        holder.communicate()


def test_41_disk_full(script, trained):
    before = bytes_of(trained)
    next_second(trained)
    with largest_file(len(before["ckpt.pt"][0]) // 2):
        result = script.call("--resume", trained, *MORE)
    assert result.code == 1 and result.err.splitlines()[-1].startswith(f"could not write {trained}/ckpt.pt")
    after = bytes_of(trained)
    assert "Traceback" not in result.err and not [n for n in after if n.endswith(".tmp")]
    assert after["ckpt.pt"] == before["ckpt.pt"] and after["ckpt.prev.pt"] == before["ckpt.prev.pt"]


def test_41_disk_full_while_recording(script):
    with largest_file(1024):
        process = script.start(*script.tiny, *script.stub())
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not write" in err.splitlines()[-1] and "Traceback" not in err


def test_43_44_stop_signals(script):
    """SIGTERM to a running process: it holds its lock, saves, says how to go on, and does so."""
    process = script.start(*script.tiny, *script.stub(), "--tok-updates", 10**6, "--save-every", 10**5)
    for line in process.stdout:
        if line.startswith("tokenizer: update 9 "):
            break
    run, began = only_run(), time.time()
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.time() - began < 10 and "Traceback" not in err, err
    count, last = load(run)["counts"]["tokenizer"], out.splitlines()[-1]
    assert count >= 9 and f"at update {count}" in last and f"python {script.path} --resume {run}" in last
    next_second(run)
    result = script.call("--resume", run, "--tok-updates", count + 2, "--stage", "tokenizer")
    assert result.code == 0 and load(run)["counts"]["tokenizer"] == count + 2, result.err


def test_45_second_signal(script):
    slow = script.at_update(5, "print('slow', flush=True); time.sleep(60)")
    process = script.start(*script.tiny, *script.stub(), prelude=slow)
    for line in process.stdout:
        if line == "slow\n":
            break
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the update
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and load(only_run())["updates"] == 3


STOPS = {
    "baseline": [(2, 2)],
    "test-video": [(4, 3)],
    "demonstrations": [(6, 3)],
    "first-shard": [(8, 5)],
    "second-shard": [(9, 20)],
    "first-update": [("update", 1)],
    "lam": [("update", 5)],
    "last-update": [("update", 12)],
    "evaluation": [(10, 3)],
    "twice": [(8, 20), ("update", 7)],
}


@pytest.mark.parametrize("points", [pytest.param(p, id=i) for i, p in STOPS.items()])
def test_47_48_stopped_and_resumed_is_as_if_unbroken(script, unbroken, monkeypatch, points):
    """SIGTERM anywhere: what was recorded of a shard is recorded again, updates go on where they were."""
    waiting = stop_once(script, monkeypatch, points)
    result = script.run()
    for _ in points:
        assert result.code == 143 and "Traceback" not in result.err, result.err
        run = only_run()
        next_second(run)
        result = script.call("--resume", run)
    assert result.code == 0 and not waiting, result.err
    as_if_unbroken(script, run, unbroken)


def test_47_killed_while_recording(script, unbroken):
    """SIGKILL in the second shard: the first one is kept."""
    process = script.start(*script.tiny, *script.stub(signal_at=20, signum=9, only=9))
    process.communicate(timeout=60)
    run = only_run()
    assert process.returncode == -signal.SIGKILL and load(run)["global_step"] == 32
    next_second(run)
    result = script.call("--resume", run)
    assert result.code == 0, result.err
    as_if_unbroken(script, run, unbroken)


FAULTS = [
    ("raise", dict(raise_at=20), "environment 1 failed at step 20: ValueError: boom"),
    ("nan", dict(nan_at=20), "environment 1 returned reward nan at step 20"),
    ("shape", dict(shape_change_at=20), "environment 1 failed at step 20: ValueError"),
]


@pytest.mark.parametrize("faults, summary", [pytest.param(f, s, id=i) for i, f, s in FAULTS])
def test_50_53_54_environment_faults(script, faults, summary):
    result = script.run(faults=faults | dict(only=9))
    assert result.code == 1 and "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith(summary), result.err
    assert load(only_run())["global_step"] == 32 and finite(load(only_run())["learner"])


# ---- Several processes -----------------------------------------------------------------------------------------------


def torchrun(script, n, *argv, env=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", script.path]
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | (env or {})
    return subprocess.run([*command, *map(str, argv)], env=env, capture_output=True, text=True, timeout=300)


def test_two_processes_train_as_one(script, unbroken):
    """The same global batch, masks, shifts, resets: losses and weights up to rounding."""
    done = torchrun(script, 2, *script.tiny, *script.stub())
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run()
    assert len(os.listdir("runs")) == 1 and done.stdout.count("parameters: ") == 1  # one of them speaks and writes
    mine, theirs = load(run)["learner"]["model"], load(unbroken)["learner"]["model"]
    for k in mine:
        away = (mine[k].float() - theirs[k].float()).abs()
        if k.startswith("policy."):
            # On some processors a few weights of the policy's attention (11 of 192) end up to 2e-4 apart: probably
            # those whose gradient is rounding alone, since Adam divides by its size.
            assert (away > 1e-4).float().mean() < 0.1 and away.max() < 1e-3 and away.square().mean() ** 0.5 < 1e-4, k
        else:
            assert torch.allclose(mine[k], theirs[k], atol=1e-4), k
    mine, theirs = scalars(run), scalars(unbroken)
    losses = [t for t in mine if t.startswith("losses/")]
    assert mine.keys() == theirs.keys() and len(losses) > 8
    for tag in losses:
        a, b = (np.array([v for _, v in x[tag]]) for x in (mine, theirs))
        assert np.allclose(a, b, rtol=1e-3, atol=1e-5), tag
    assert math.isfinite(outcome(run)["episodic_return"])
    wrong = torchrun(script, 2, *script.tiny, *script.stub(), "--batch-size", 3)
    assert wrong.returncode != 0 and wrong.stderr.count("error: --batch-size 3") == 1 and "2 processes" in wrong.stderr


def test_result_of_a_run(unbroken):
    result = outcome(unbroken)
    assert {"episodic_return", "random_return", "demonstrator_return", "minutes", "metrics"} <= set(result)
    with open(os.path.join(unbroken, "args.json"), encoding="utf-8") as f:
        assert json.load(f)["args"]["stage"] == "all"
