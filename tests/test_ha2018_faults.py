"""Bad inputs and faults of ha2018_carracing.py. It goes through stages (collect, V, M, C) and not through agent steps,
so it has this table of its own; the tools are those of test_faults.py."""

import gc
import importlib
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
from test_faults import (
    BOXES,
    ROOT,
    STUB,
    USAGE,
    Payload,
    Script,
    bytes_of,
    clean,  # noqa: F401 (a fixture)
    damage,
    fields,
    finite,
    largest_file,
    load,
    next_second,
    only_run,
    outcome,
    same,
    scalars,
    usage_error,
)
from test_readme import unexplained

NAME = "ha2018_carracing"
# Four episodes of five steps: 24 frames are 12 updates of V, 20 steps are 4 updates of M, then 3 generations. The stub
# has no time limit of its own.
TINY = (
    "--preset cpu --no-cuda --action-repeat 1 --num-envs 2 --collect-episodes 4 --collect-policy hold "
    "--max-episode-steps 7 --latent-size 4 --vae-depth 2 --rnn-size 8 --num-mixtures 2 --vae-epochs 2 "
    "--vae-batch-size 4 --rnn-epochs 2 --rnn-batch-size 2 --rnn-batch-length 4 --generations 3 --popsize 4 "
    "--rollouts 2 --eval-every 2 --eval-rollouts 2 --eval-episodes 2 --save-every 3 --save-generations 1 --log-every 1 "
    "--target-return None"
)
DREAM = ["--dream", "--predict-done", "--controller-input", "zch"]
FLAGS = (
    "action-repeat bf16 buffer-size capture-video collect-episodes collect-policy compile controller-bias "
    "controller-hidden controller-input cuda data-gb done-weight dream env-id env-kwargs env-timeout eval-episodes "
    "eval-every eval-rollouts evaluate exp-name explore fast-render from-run generations image-size iterations "
    "kl-tolerance latent-size log-every max-episode-steps min-episode-steps num-envs num-mixtures num-threads "
    "num-workers pixels play popsize predict-done predict-reward preset resume rnn-batch-length rnn-batch-size "
    "rnn-epochs rnn-grad-clip rnn-learning-rate rnn-lr-decay rnn-size rollouts sample-latent save-every "
    "save-generations seed sigma-init stage target-return tau-table temperature temperatures torch-deterministic track "
    "train-rnn vae-batch-size vae-depth vae-epochs vae-learning-rate wandb-entity wandb-project-name"
)
# What an interrupted and resumed run must share with an unbroken one.
STATE = "model rng told best updates ticks steps dream_steps iteration stage starts random_return train_return".split()


class Staged(Script):
    """The tools of Script for this script."""

    def __init__(self):
        self.name, self.path = NAME, os.path.join(ROOT, NAME + ".py")
        self.mod, self.tiny, self.faults = importlib.import_module(NAME), TINY.split(), dict(obs="image")
        self.early = None
        self.update, self.owner, self.method = ("FitLearner", "update"), self.mod.FitLearner, "update"


@pytest.fixture(scope="session")
def script():
    gc.collect()
    return Staged()


def finished(script, folder, *argv):
    home = os.getcwd()
    os.chdir(folder)
    try:
        result = script.run(*argv)
        assert result.code == 0, result.err
        return os.path.join(folder, only_run())
    finally:
        os.chdir(home)


@pytest.fixture(scope="session")
def unbroken(script, tmp_path_factory):
    """A finished run whose C was evolved in the dream; never written to again."""
    return finished(script, tmp_path_factory.mktemp("unbroken"), *DREAM)


@pytest.fixture(scope="session")
def unbroken_real(script, tmp_path_factory):
    """The same where C was evolved in the environment."""
    return finished(script, tmp_path_factory.mktemp("unbroken_real"))


@pytest.fixture
def trained(unbroken):
    """A copy of it to play with, in the current directory."""
    return shutil.copytree(unbroken, "trained")


def as_if_unbroken(run, unbroken):
    mine, theirs = load(run), load(unbroken)
    for k in STATE:
        same(mine[k], theirs[k])
    skip = ("minutes", "run", "peak_memory_gb")
    mine, theirs = ({k: v for k, v in outcome(r).items() if k not in skip} for r in (run, unbroken))
    assert mine == theirs
    same(scalars(run), scalars(unbroken))


# ---- Usage errors: one line, exit code 2, nothing created ------------------------------------------------------------


BOXES = [
    *((i, a, w) for i, a, w in BOXES if a[0] not in ("--learning-rate", "--total-timesteps", "--lerning-rate")),
    ("1-typo", ["--popsiz", "8"], ["--popsize"]),
    ("2-float", ["--temperature", "abc"], ["--temperature", "abc"]),
    ("2-int", ["--generations", "1e3"], ["--generations", "1e3"]),
    ("5-stage", ["--stage", "dream"], ["collect", "controller"]),
]
OWN = [
    *((f"6-{f}", [f"--{f}", "0"], [f"--{f} must be at least 1, got 0"]) for f in (
        "collect-episodes", "num-workers", "vae-batch-size", "rnn-batch-size", "latent-size", "rollouts", "generations",
        "eval-every", "save-generations", "buffer-size", "iterations",
    )),
    ("6-popsize", ["--popsize", "3"], ["--popsize must be at least 4, got 3"]),
    ("6-length", ["--rnn-batch-length", "1"], ["--rnn-batch-length must be at least 2, got 1"]),
    ("8-lr", ["--vae-learning-rate", "nan"], ["--vae-learning-rate must be", "got nan"]),
    ("8-lr-rnn", ["--rnn-learning-rate", "-1"], ["--rnn-learning-rate must be", "got -1"]),
    ("8-tau", ["--temperature", "0"], ["--temperature must be 0.001 to 10, got 0"]),
    ("8-kl", ["--kl-tolerance", "-1"], ["--kl-tolerance must be", "got -1"]),
    ("8-sigma", ["--sigma-init", "0"], ["--sigma-init must be", "got 0"]),
    ("8-explore", ["--explore", "2"], ["--explore must be 0 to 1, got 2"]),
    ("8-temperatures", ["--temperatures", "0.1,hot"], ["--temperatures", "'0.1,hot'"]),
    ("8-temperatures-zero", ["--temperatures", "0,1"], ["--temperatures", "'0,1'"]),
    ("8-temperatures-twice", ["--temperatures", "1,1.0"], ["--temperatures", "different", "'1,1.0'"]),
    ("10-image", ["--image-size", "96"], ["--image-size must be 64 to 64, got 96"]),
    ("10-short", ["--min-episode-steps", "8"], ["--min-episode-steps 8", "--max-episode-steps 7"]),
    ("12-memory", ["--buffer-size", 10**13, "--collect-episodes", 10**12], ["frames need", "GB free", "--buffer-size"]),
    ("12-envs", ["--num-envs", 10**9, "--collect-episodes", 10**9], ["frames need", "GB free", "--num-envs"]),
    ("21-endless", [{}, "--max-episode-steps", "None"], ["--env-id", STUB, "no time limit", "--max-episode-steps"]),
    ("16-nothing-to-dream", [*DREAM, "--no-predict-done"], ["--dream needs", "--predict-done or --predict-reward"]),
    ("from-run", ["--from-run", "nowhere"], ["no checkpoint in nowhere"]),
    ("from-run-iterations", ["--from-run", "x", "--iterations", "2"], ["--from-run", "--iterations must be 1, got 2"]),
    ("18-vector", [dict(obs="vector")], ["--env-id", STUB, "must be one image", "(3,)", "--pixels"]),
    ("18-numbers", [dict(obs="discrete")], ["--env-id", STUB, "must be one image", "Discrete(5)"]),
    ("14-buttons", ["--env-id", "CarRacing-v3", "--env-kwargs", '{"continuous": false}'], ["--env-id", "continuous"]),
]  # fmt: skip


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in BOXES])
def test_parser(script, tmp_path, argv, words):
    result = script.call(*argv)
    assert result.code == 2 and "Traceback" not in result.err and os.listdir(tmp_path) == []
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in USAGE + OWN])
def test_usage(script, tmp_path, argv, words):
    if isinstance(words, dict):
        pytest.skip("said in other words by other scripts")
    usage_error(script, script.call(*script.tiny, *script.need(argv)), words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("env_id, module, package", [
    ("ALE/Pong-v5", "ale_py", "ale-py"), ("VizdoomTakeCover-v1", "vizdoom", "vizdoom"),
])  # fmt: skip
def test_15_package_of_the_environment_is_missing(script, tmp_path, monkeypatch, env_id, module, package):
    for name in [m for m in sys.modules if m.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    result = script.call(*script.tiny, "--env-id", env_id)
    usage_error(script, result, [f"{env_id} needs {package}: pip install {package}"])
    assert os.listdir(tmp_path) == []


def test_27_output_is_not_writable(script, tmp_path):
    (tmp_path / "runs").write_text("a file")
    usage_error(script, script.run(), ["cannot write runs"])
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--play", "--from-run"])
def test_32_empty_directory(script, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    usage_error(script, script.call(flag, "empty"), ["no checkpoint in empty"])
    assert os.listdir(tmp_path) == ["empty"] and os.listdir("empty") == []


@pytest.mark.parametrize("argv, words", [
    (["--eval-episodes", "0"], ["--eval-episodes must be at least 1, got 0"]),
    (["--rnn-size", "16"], ["--rnn-size is 8 in trained, got 16"]),
    (["--controller-input", "z"], ["--controller-input is zch in trained, got z"]),
    (["--env-kwargs", '{"obs": "image", "action": "box"}'], ["action space", "was trained on Discrete(3)"]),
])  # fmt: skip
def test_usage_errors_of_evaluate(script, trained, argv, words):
    before = bytes_of(trained)
    usage_error(script, script.call("--evaluate", trained, *argv), words)
    assert bytes_of(trained) == before


def test_62_flags_are_frozen(script):
    assert sorted(f.name.replace("_", "-") for f in fields(script.mod.Args)) == sorted(FLAGS.split())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_65_tracker_is_missing(script, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    usage_error(script, script.run("--track", name), [f"--track {name} needs {name}: pip install {name}"])
    assert os.listdir(tmp_path) == []


# ---- Runs that work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs, action, flags", [
    ("image", "discrete_start1", DREAM), ("image", "box", DREAM), ("image", "box_inf", []), ("dict", "discrete", []),
    ("image", "box", [*DREAM, "--predict-reward", "--no-predict-done", "--iterations", "2"]),
])  # fmt: skip
def test_17_19_spaces_that_are_handled(script, obs, action, flags):
    """The whole way; of a Dict observation the one image is seen. The stub refuses actions outside its space."""
    result = script.run("--capture-video", *flags, faults=dict(obs=obs, action=action))
    assert result.code == 0, result.err
    videos = sorted(os.listdir(os.path.join(only_run(), "videos")))
    assert videos == ["episode.gif", "open_loop-3.gif"]
    taken = [entry[3] for entry in stub_env.StubEnv.log if entry[3] is not None]
    if action == "discrete_start1":
        assert {int(a) for a in taken} == {1, 2, 3}
    if action == "box":
        assert np.min(taken, 0)[0] < -1 and np.max(taken, 0)[0] > 2  # of [-2, 3]


@pytest.mark.parametrize("name", ["with spaces", "Größe-世界", "..", "-x"])
def test_29_odd_names(script, name):
    result = script.run(f"--exp-name={name}")
    assert result.code == 0 and name in only_run() and os.listdir(".") == ["runs"], result.err


def test_31_help(script, tmp_path):
    result = script.call("--help")
    assert result.code == 0 and "--temperature" in result.out and result.err == "" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("reward", [0.0, 1e6, -1e6])
def test_56_reward_scales(script, reward):
    result = script.run("--dream", "--predict-reward", "--generations", "1", faults=dict(reward=reward))
    assert result.code == 0, result.err
    assert all(math.isfinite(v) for values in scalars(only_run()).values() for _, v in values)
    assert finite(load(only_run())["model"])


def test_57_58_stored_episodes(script):
    """Every row as made by hand: frames, the action after each, its reward; one more frame than steps, and a truncated
    episode has not terminated."""
    for faults, terminated in ((dict(length=3), True), (dict(length=None, truncate_at=3), False)):
        assert script.run("--stage", "collect", faults=faults | dict(reward="count")).code == 0
        data = os.path.join(only_run(), "data")
        log = [entry for entry in stub_env.StubEnv.log if entry[0] >= 2]
        for name in sorted(os.listdir(data)):
            e = np.load(os.path.join(data, name))
            assert e["reward"].tolist() == [1, 2, 3] and bool(e["terminated"]) == terminated
            values = e["frames"][:, 0, 0, 0].tolist()
            assert len(values) == e["length"] == 4 and np.diff(values).tolist() == [10, 10, 10]
            (start,) = {x[4] for x in log if int(50 * x[4]) == values[0]}
            taken = [int(x[3]) for x in log if x[4] == start and x[3] is not None]
            assert e["action"].argmax(1).tolist() == taken and e["action"].shape == (3, 3)
        shutil.rmtree("runs")


def test_dropped_and_bounded_data(script):
    """Short episodes are replaced by further ones; at --data-gb collecting stops with a warning."""
    result = script.run("--stage", "collect", "--min-episode-steps", "6", faults=dict(length=5, truncate_at=None))
    assert result.code == 1 and "none of 4 episodes has --min-episode-steps 6 steps" in result.err
    shutil.rmtree("runs")
    # environment 0 plays episodes of 5 steps, environment 1 of 6 (each number is of two instances before)
    result = script.run("--stage", "collect", "--min-episode-steps", "6", faults=dict(length=5, stagger=1))
    assert result.code == 0, result.err
    data = os.listdir(os.path.join(only_run(), "data"))
    assert sum(n.endswith(".npz") for n in data) == 4
    shutil.rmtree("runs")
    result = script.run("--stage", "collect", "--collect-episodes", "40", "--data-gb", "1e-6")
    assert result.code == 0 and "warning: the episodes have reached --data-gb 1e-06" in result.out
    assert 1 <= len(os.listdir(os.path.join(only_run(), "data"))) < 40


def test_stages_one_at_a_time_are_as_all_at_once(script, unbroken):
    result = script.run(*DREAM, "--stage", "collect")
    run = only_run()
    for stage in ("vae", "rnn", "all"):
        assert result.code == 0 and f"--resume {run} --stage all" in result.out.splitlines()[-1], result.err
        assert not os.path.exists(os.path.join(run, "result.json"))
        next_second(run)
        result = script.call("--resume", run, "--stage", stage)
    assert result.code == 0, result.err
    as_if_unbroken(run, unbroken)


def test_from_run_takes_v_and_m(script, trained):
    before = bytes_of(trained)
    result = script.run(*DREAM, "--from-run", trained, "--temperature", "0.5", "--controller-input", "z")
    assert result.code == 0 and bytes_of(trained) == before, result.err
    mine, theirs = load(only_run())["model"], load(trained)["model"]
    for k in theirs:
        assert k.startswith("controller") or torch.equal(mine[k], theirs[k])
    shutil.rmtree("runs")
    result = script.run(*DREAM, "--from-run", trained, "--rnn-size", "4")
    usage_error(script, result, ["--from-run trained", "--rnn-size is 8 there, here 4"])
    result = script.run(*DREAM, "--from-run", trained, faults=dict(action="box"))
    usage_error(script, result, ["--from-run trained", "--env-id"])


def test_table_of_temperatures(script, trained):
    """Written beside the run, nothing else is touched; the same again is the same."""
    before, tables = bytes_of(trained), []
    for _ in range(2):
        result = script.call("--evaluate", trained, "--tau-table", "--temperatures", "0.1,1.0", "--generations", "2")
        assert result.code == 0, result.err
        with open(os.path.join(trained, "eval-temperatures.json")) as f:
            tables.append(json.load(f))
    rows = [line for line in result.out.splitlines() if line.startswith("|")]
    assert [r.split("|")[1].strip() for r in rows[2:]] == ["0.1", "1", "random policy"]
    assert tables[0]["rows"] == tables[1]["rows"] and len(tables[0]["rows"]) == 2
    after = bytes_of(trained)
    assert {k: v for k, v in after.items() if k in before} == before
    assert after.keys() - before.keys() == {"eval-temperatures.json"}


def test_evaluate_and_play_write_only_their_own_files(script, trained, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    before = bytes_of(trained)
    assert script.call("--evaluate", trained, "--capture-video").code == 0
    assert script.call("--play", trained).code == 0
    after = bytes_of(trained)
    assert {k: v for k, v in after.items() if k in before} == before
    assert after.keys() - before.keys() == {"eval-3.json", "eval-dream.gif", "eval-episode.gif"}


def test_61_seeds(script, unbroken):
    assert script.run(*DREAM).code == 0
    starts = {entry[4] for entry in stub_env.StubEnv.log}
    as_if_unbroken(only_run(), unbroken)
    shutil.rmtree("runs")
    assert script.run(*DREAM, "--seed", "2").code == 0
    other = {entry[4] for entry in stub_env.StubEnv.log}
    assert len(starts) > 10 and not starts & other
    mine, theirs = scalars(only_run()), scalars(unbroken)
    assert sum(mine[t] != theirs[t] for t in mine) > len(mine) / 2


def test_64_without_optional_blocks(script, tmp_path):
    with open(script.path, encoding="utf-8") as f:
        source = f.read()
    starts = re.findall(r"^ *# \[optional: (\w+)", source, re.M)
    for name in starts:
        source = re.sub(rf"^ *# \[optional: {name}\b.*?^ *# {name}\]\n", "", source, count=1, flags=re.M | re.S)
    assert starts and "[optional" not in source and not re.search(r"^ *# \w+\]$", source, re.M)
    (tmp_path / "stripped.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("stripped", tmp_path / "stripped.py")
    mod = importlib.util.module_from_spec(spec)
    sys.modules["stripped"] = mod
    try:
        spec.loader.exec_module(mod)
        result = script.call(*script.tiny, *script.stub(), *DREAM, mod=mod)
    finally:
        del sys.modules["stripped"]
    assert result.code == 0 and len(load(only_run())["told"]) == 3, result.err


def test_69_target_missed(script):
    result = script.run("--target-return", "1e9")
    assert result.code == 1 and result.out.splitlines()[-1].endswith("target 1e+09): missed")
    assert os.path.isfile(os.path.join(only_run(), "result.json"))


def test_71_reader_of_the_pipe_is_gone(script):
    process = script.start(*script.tiny, *script.stub(), "--generations", 10**6)
    first = process.stdout.readline()
    process.stdout.close()
    err, code = process.stderr.read(), process.wait(timeout=60)
    assert first and code != 0 and "Traceback" not in err and "Broken" not in err


def test_worker_processes_play_the_same(script, unbroken):
    """Two groups in two processes: the same episodes, weights and returns as in one process."""
    result = script.run(*DREAM, "--num-workers", "2")
    assert result.code == 0, result.err
    as_if_unbroken(only_run(), unbroken)


def test_docs_explain_everything(script, monkeypatch):
    """Every tag and every file of a run that uses everything is in the tables of its page."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert script.run(*DREAM, "--predict-reward", "--capture-video").code == 0
    run = only_run()
    for flags in (["--evaluate", run, "--capture-video"], ["--evaluate", run, "--tau-table"], ["--play", run]):
        assert script.call(*flags).code == 0
    (tags, files), missing = unexplained(NAME, run)
    assert len(tags) > 25 and len(files) > 12 and missing == []


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
def test_33_corrupt_checkpoint(script, trained, how):
    damage(os.path.join(trained, "ckpt.pt"), how)
    next_second(trained)
    result = script.call("--resume", trained, "--generations", "4")
    assert result.code == 0, result.err
    assert re.search(r"warning: .*ckpt.pt is (damaged|not a plain).*going on from .*ckpt.prev.pt", result.out)
    assert len(load(trained)["told"]) == 4 and os.path.exists(os.path.join(trained, "ckpt.damaged.pt"))
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        damage(os.path.join(trained, name), how)
    usage_error(script, script.call("--resume", trained, "--generations", "5"), [trained, "ckpt.prev.pt is "])


def test_33_damaged_episode(script, trained):
    (path, *_) = sorted(os.listdir(os.path.join(trained, "data")))
    damage(os.path.join(trained, "data", path), "truncated")
    state = load(trained) | dict(stage="vae", told=[], epoch=0, batch=0)
    torch.save(state, os.path.join(trained, "ckpt.pt"))
    os.remove(os.path.join(trained, "result.json"))
    result = script.call("--resume", trained)
    assert result.code == 1 and path in result.err and "is damaged" in result.err and "Traceback" not in result.err


def test_34_checkpoint_of_another_script(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        torch.save(load(trained, name) | {"script": "other"}, os.path.join(trained, name))
    for flag in ("--resume", "--evaluate", "--play"):
        usage_error(script, script.call(flag, trained), [f"is not a checkpoint of {NAME}.py"])


@pytest.mark.parametrize("flag, old, new", [("--rnn-size", "8", "16"), ("--popsize", "4", "8"), ("--seed", "1", "2")])
def test_34_resume_cannot_change_the_run(script, trained, flag, old, new):
    before = bytes_of(trained)
    usage_error(script, script.call("--resume", trained, flag, new, "--generations", "4"), [flag, old, new])
    assert bytes_of(trained) == before


def test_35_finished_run_resumed(script, trained):
    before = bytes_of(trained)
    result = script.call("--resume", trained)
    assert result.code == 0 and "nothing to do: generation 3 of 3" in result.out
    assert bytes_of(trained) == before


def test_35_run_stopped_before_v_and_m(script):
    """There is nothing to evaluate or to dream from yet: said in one line."""
    assert script.run(*DREAM, "--stage", "collect").code == 0
    run = only_run()
    before = bytes_of(run)
    for flag in ("--evaluate", "--play"):
        usage_error(script, script.call(flag, run), [run, "--resume"])
        assert bytes_of(run) == before
    usage_error(script, script.run(*DREAM, "--from-run", run), ["--from-run", "not trained yet"])


def test_36_malicious_checkpoint(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        torch.save({"script": NAME, "model": Payload()}, os.path.join(trained, name))
    for flag in ("--resume", "--evaluate", "--play"):
        usage_error(script, script.call(flag, trained), ["not a plain checkpoint"])
    assert not os.path.exists("executed")


def test_38_compiled_checkpoint(script, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="eager"))
    result = script.run(*DREAM, "--compile", "--stage", "vae")
    assert result.code == 0 and "warning: torch.compile" not in result.out, result.err
    run = only_run()
    assert not [k for k in load(run)["model"] if "_orig_mod" in k]
    next_second(run)
    monkeypatch.setattr(torch, "compile", None)
    assert script.call("--resume", run, "--no-compile", "--stage", "all").code == 0


def test_41_disk_full(script, trained):
    """At a checkpoint the old one stays; while episodes are written nothing half is left, and the run goes on later."""
    before = bytes_of(trained)
    next_second(trained)
    with largest_file(len(before["ckpt.pt"][0]) // 2):
        result = script.call("--resume", trained, "--generations", "6")
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(f"could not write {trained}/ckpt.pt")
    after = bytes_of(trained)
    assert not [n for n in after if n.endswith(".tmp")] and after["ckpt.pt"] == before["ckpt.pt"]
    assert script.run("--stage", "collect", "--collect-episodes", "1").code == 0  # so there is a run to go on with
    run = only_run()
    shutil.rmtree(os.path.join(run, "data"))
    torch.save(load(run) | dict(stage="collect"), os.path.join(run, "ckpt.pt"))
    real = np.savez_compressed

    def full(file, **data):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    try:
        np.savez_compressed = full
        result = script.call("--resume", run, "--stage", "collect")
    finally:
        np.savez_compressed = real
    assert result.code == 1 and "could not write" in result.err and ".npz" in result.err, result.err
    assert os.listdir(os.path.join(run, "data")) == []
    assert script.call("--resume", run, "--stage", "all").code == 0


# ---- Signals and kills -----------------------------------------------------------------------------------------------


def kill_at(what, n, signum):
    """Prelude: at the n-th update (of V and M together), stored episode or generation."""
    owner, method = dict(
        update=("mod.FitLearner", "update"), episode=("mod", "save_episode"), generation=("mod.Evolution", "tell")
    )[what]
    return f"""
import os, signal
calls, real = [], {owner}.{method}
def watched(*args, **kwargs):
    calls.append(0)
    if len(calls) == {n}:
        os.kill(os.getpid(), {int(signum)})
    return real(*args, **kwargs)
{owner}.{method} = watched
"""


@pytest.mark.parametrize("what, n", [("episode", 3), ("update", 5), ("update", 14), ("generation", 2)])
def test_47_killed_and_resumed_is_as_if_unbroken(script, unbroken, what, n):
    argv = [*script.tiny, *script.stub(), *DREAM]
    process = script.start(*argv, prelude=kill_at(what, n, signal.SIGKILL))
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    run = only_run()
    next_second(run)
    result = script.call("--resume", run)
    assert result.code == 0, result.err
    as_if_unbroken(run, unbroken)


@pytest.mark.parametrize("flags, kind", [(DREAM, "unbroken"), ([], "unbroken_real")], ids=["dream", "real"])
@pytest.mark.parametrize("points", [
    [("episode", 2)], [("update", 1), ("update", 4)], [("update", 13)], [("step", 60)], [("step", 75)], [("step", 4)],
], ids=str)  # fmt: skip
def test_43_48_stopped_and_resumed_is_as_if_unbroken(script, request, monkeypatch, points, flags, kind):
    """SIGTERM anywhere: in collecting, in updates, in a generation, in the random baseline: nothing is lost or done
    twice."""
    whole, calls, waiting = request.getfixturevalue(kind), {}, [*points]

    def watch(owner, method, key):
        real = getattr(owner, method)

        def wrapped(*args, **kwargs):
            calls[key] = calls.get(key, 0) + 1
            if waiting and waiting[0] == (key, calls[key]):
                waiting.pop(0)
                calls.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, wrapped)

    watch(script.mod.FitLearner, "update", "update")
    watch(script.mod, "save_episode", "episode")
    watch(stub_env.StubEnv, "step", "step")
    result = script.run(*flags)
    if result.code == 0 and flags:
        pytest.skip(f"in the dream there are too few real steps for {points}")
    for _ in points:
        assert result.code == 143 and "Traceback" not in result.err, result.err
        assert "--resume" in result.out.splitlines()[-1]
        run = only_run()
        next_second(run)
        result = script.call("--resume", run)
    assert result.code == 0, result.err
    as_if_unbroken(run, whole)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_43_44_stop_signals_with_workers(script, name, code):
    """The whole group gets the signal, as from a terminal; no process is left, no traceback."""
    process = script.start(*script.tiny, *script.stub(), "--num-workers", "2", "--generations", 10**6)
    for line in process.stdout:
        if line.startswith("generation=2,"):
            break
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err, err
    assert f"--resume {only_run()}" in out.splitlines()[-1] and len(load(only_run())["told"]) >= 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_49_parent_killed(script):
    process = script.start(*script.tiny, *script.stub(), "--num-workers", "2", "--generations", 10**6)
    for line in process.stdout:
        if line.startswith("generation=2,"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(50):
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        if not left:
            break
        time.sleep(0.1)
    assert not left
    process.stdout.close()
    process.stderr.close()


# ---- Environments that fail, bad numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("faults, summary", [
    (dict(raise_at=4), "failed at step 4: ValueError: boom"), (dict(nan_at=4), "returned reward nan at step 4"),
    (dict(shape_change_at=4), "failed at step 4: ValueError"),
])  # fmt: skip
def test_50_53_54_environment_faults(script, faults, summary, workers):
    result = script.run("--num-workers", workers, faults=faults)
    assert result.code == 1, result.err
    last = result.err.splitlines()[-1]
    assert "Traceback" in result.err and re.match(r"environment [01] ", last) and summary in last, result.err


def test_51_worker_killed(script):
    began = time.time()
    process = script.start(*script.tiny, *script.stub(signal_at=4, signum=9), "--num-workers", "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - began < 40
    assert re.match(r"environment process [01] died \(signal 9; out of memory\?\)", err.splitlines()[-1]), err


def test_52_environment_hangs(script):
    process = script.start(
        *script.tiny, *script.stub(signal_at=4, signum=19), "--num-workers", "2", "--env-timeout", "1"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert re.match(r"environment process [01] did not answer for 1 s \(--env-timeout\)", err.splitlines()[-1]), err


@pytest.mark.parametrize("what", ["weight", "gradient"])
@pytest.mark.parametrize("n, term", [(6, "vae_reconstruction"), (14, "rnn_z")])
def test_59_60_bad_numbers_make_no_step(script, monkeypatch, what, n, term):
    real, calls, kept = script.mod.FitLearner.update, [], {}

    def update(self, batch):
        calls.append(0)
        if len(calls) == n:
            weight = self.model.vae.decoder[-1].bias if n == 6 else self.model.rnn.out.bias
            if what == "weight":
                weight.data.flatten()[-1] = math.nan
            else:
                weight.register_hook(lambda g: g * math.inf)
            kept["self"], kept["before"] = self, [p.detach().clone() for p in self.params]
        return real(self, batch)

    monkeypatch.setattr(script.mod.FitLearner, "update", update)
    result = script.run(*DREAM)
    assert result.code == 1 and len(calls) == n
    last = result.err.splitlines()[-1]
    assert "not finite" in last and "ckpt.pt" in last and "Traceback" not in result.err
    named = last.split(": ")[1].split("; ")[0].split(", ")
    assert term in named if what == "weight" else named == ["gradient norm"]
    for p, before in zip(kept["self"].params, kept["before"]):
        assert torch.equal(p.nan_to_num(7.0), before.nan_to_num(7.0))
    assert finite(load(only_run())["model"])


def test_60_bad_scores_are_not_told(script, monkeypatch):
    real = script.mod.dream_rollout
    monkeypatch.setattr(script.mod, "dream_rollout", lambda *a, **k: real(*a, **k) * math.nan)
    result = script.run(*DREAM)
    assert result.code == 1 and "not finite at generation 0 of C: scores of 4 candidates" in result.err
    assert load(only_run())["told"] == []
