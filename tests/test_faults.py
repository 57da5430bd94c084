"""Bad inputs and faults: what a script answers, that it answers before it creates anything, that checkpoints survive.

Of scripts of the first shape; see test_contract.py for the second. Rows whose flags a script does not have are skipped.
Most rows run in this process (milliseconds); real processes are started where signals, kills or the environment of the
process matter."""

import contextlib
import fcntl
import gc
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from dataclasses import fields

import numpy as np
import pytest
import stub_env
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = os.path.join(ROOT, "tests")
sys.path[:0] = [p for p in (ROOT, TESTS) if p not in sys.path]
STUB = "stub_env:Stub-v0"
# tiny: flags of a run of the whole code path in under a second: 96 agent steps in 2 environments, checkpoints at 32, 64
#   and 96, at least one update between two of them. train_instance: the StubEnv that is training environment 0 (the
#   first one made has number 0). update: the method that makes one update, with the learner as `self`. plant: a
#   parameter whose NaN shows in the loss `term`.
# faults: what the stub is like unless a row says otherwise. spaces: (observation, action) kinds of the stub that are
#   handled. rich: a stub with every kind of observation that the script knows. extra: flags that make the script log
#   what it does not log otherwise. other: an environment that can be used, with other spaces than the stub has.
# state: parts of a checkpoint that a killed and resumed run must share with an unbroken one. exact_stop: after a stop
#   signal the same holds. early: words of the line that warns, once, that episodes terminate.
# resize: a flag that shapes the networks, its value in `tiny` and another one. chatty: flags of a run that logs much
#   more than its checkpoint holds. pictures: steps of the plots in TensorBoard with --report-every 48.
# flags: every flag the script has. Removing or renaming one breaks its users: think twice before editing the list.
SCRIPTS = {}  # the rows of a script stand in its own test_NAME_faults.py


# ---- Tools -----------------------------------------------------------------------------------------------------------


class Script:
    """One script: run it in this process (`call`) or in its own (`start`)."""

    def __init__(self, name, rows=None):
        self.name, self.path, self.mod = name, os.path.join(ROOT, name + ".py"), importlib.import_module(name)
        self.__dict__.update(rows or SCRIPTS[name])
        gc.collect()
        gc.freeze()  # modules stay: `call` need not go through them each time
        self.tiny = self.tiny.split()
        self.owner = getattr(self.mod, self.update[0])
        self.method = self.update[1]

    def stub(self, **faults):
        """Flags that choose the stub; it is as this script needs it, except for `faults`."""
        return ["--env-id", STUB, "--env-kwargs", json.dumps(self.faults | faults)]

    def need(self, argv):
        """The flags as a list, where a dict of faults has become the flags of such a stub."""
        names = {f.name for f in fields(self.mod.Args)}
        argv = [word for a in argv for word in (self.stub(**a) if isinstance(a, dict) else [str(a)])]
        for word in argv:
            flag = word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            if word.startswith("--") and flag not in names:
                pytest.skip(f"{self.name}.py has no {word}")
        return argv

    def call(self, *argv, mod=None):
        """Run main() here, in the current directory: exit code as the shell would see it, stdout, stderr."""
        mod, out, err, old, code = mod or self.mod, io.StringIO(), io.StringIO(), sys.argv, 0
        stub_env.StubEnv.made = 0
        stub_env.StubEnv.log.clear()
        try:
            sys.argv = [self.path, *map(str, argv)]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mod.main(mod.parse_args(mod.Args, mod.PRESETS, ""))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            err.write(f"{e.code}\n" if isinstance(e.code, str) else "")
        finally:
            sys.argv = old
        gc.collect()  # file handles of a run that ended in an exception: the lock is one
        return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    def run(self, *argv, faults=None):
        """A tiny training run on the stub; later flags win."""
        return self.call(*self.tiny, *self.stub(**(faults or {})), *argv)

    def start(self, *argv, prelude="", launcher=(sys.executable,), **env):
        """The same as `call` in a process (and group) of its own; `prelude` is code that may change `mod` first."""
        command = [*launcher, self.path]
        if prelude:
            code = f"import sys; sys.argv.pop(0); import {self.name} as mod\n{prelude}\n"
            command = [sys.executable, "-c", code + "mod.main(mod.parse_args(mod.Args, mod.PRESETS, ''))", self.path]
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([ROOT, TESTS]), "PYTHONWARNINGS": "ignore"} | env
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        return subprocess.Popen([*command, *map(str, argv)], env=os.environ | env, **pipes)

    def at_update(self, n, action):
        """Prelude: do `action` at the beginning of update n."""
        return f"""
import os, signal, time
owner, calls = mod.{self.update[0]}, []
real = owner.{self.method}
def update(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == {n}:
        {action}
    return real(self, *args, **kwargs)
owner.{self.method} = update
"""


def only_run():
    (name,) = os.listdir("runs")
    return os.path.join("runs", name)


def load(run, name="ckpt.pt"):
    return torch.load(os.path.join(run, name), weights_only=True)


def outcome(run):
    """The final metrics of a run."""
    with open(os.path.join(run, "result.json"), encoding="utf-8") as f:
        return json.load(f)


def flat(tree, path=""):
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, x in items for k, v in flat(x, f"{path}/{name}").items()}
    return {path: tree}


def same(a, b):
    """Two trees of tensors and plain values are equal, bit for bit."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], f"{k} differs"


def scalars(run):
    """{tag: [(step, value), ...]} as TensorBoard shows them, without those that contain time."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    timed = re.compile("SPS|per_s|seconds|time|hours")
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"] if not timed.search(t)}


def finite(tree):
    return all(torch.isfinite(v.float()).all() for v in flat(tree).values() if torch.is_tensor(v))


def error_lines(result, script):
    return [line for line in result.err.splitlines() if line.startswith(f"{script.name}.py: error: ")]


def warnings_of(script, text):
    """Lines with warnings, without the one, which must be there, that the stub's episodes terminate."""
    lines = [line for line in text.splitlines() if "warning" in line]
    early = [line for line in lines if script.early and script.early in line]
    assert len(early) == (script.early is not None) and all(STUB in line for line in early), lines
    return [line for line in lines if line not in early]


def usage_error(script, result, words):
    """Exit code 2, one `error:` line that contains the words, no traceback, nothing created."""
    assert result.code == 2, result.err
    lines = error_lines(result, script)
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


def bytes_of(run):
    """{relative path: (content, time of change)} of all files of a directory."""
    found = {}
    for folder, _, names in os.walk(run):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                found[os.path.relpath(path, run)] = f.read(), os.stat(path).st_mtime_ns
    return found


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return Script(request.param)


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes in here: a full disk for this process and those it starts.

    Lifted before the test ends, for pytest itself writes to a file when its output is kept in one.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty working directory, and a process that is left as it was found."""
    monkeypatch.chdir(tmp_path)
    names = [s for s in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, s)]
    handlers = {s: signal.getsignal(getattr(signal, s)) for s in names}
    environ, hook = dict(os.environ), threading.excepthook
    yield
    threading.excepthook = hook
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)
    os.environ.clear()
    os.environ.update(environ)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def unbroken(script, tmp_path_factory):
    """The run directory of a finished, unbroken tiny run; never written to again."""
    home, folder = os.getcwd(), tmp_path_factory.mktemp("unbroken")
    os.chdir(folder)
    try:
        result = script.run()
        assert result.code == 0, result.err
        return os.path.join(folder, only_run())
    finally:
        os.chdir(home)


@pytest.fixture
def trained(unbroken):
    """A copy of that run to play with, in the current directory."""
    return shutil.copytree(unbroken, "trained")


def next_second(run):
    """TensorBoard sorts event files by name, which begins with the second they were made in."""
    made = max(int(n.split(".")[3]) for n in os.listdir(run) if n.startswith("events"))
    while int(time.time()) <= made:
        time.sleep(0.02)


# ---- Usage errors: one line, exit code 2, nothing created ------------------------------------------------------------


# The parser's own answers, in its box: (row of the table, argv, words).
BOXES = [
    ("1-typo", ["--lerning-rate", "1e-3"], ["--learning-rate"]),
    ("2-float", ["--learning-rate", "abc"], ["--learning-rate", "abc"]),
    ("2-int", ["--total-timesteps", "1e6"], ["--total-timesteps", "1e6"]),
    ("3-bool", ["--cuda", "False"], ["False"]),
    ("4-missing", ["--preset"], ["--preset"]),
    ("4-stray", ["foo"], ["foo"]),
    ("5-preset", ["--preset", "tiny"], ["full", "cpu"]),
]
# Ours: (row of the table, argv after the tiny flags, words in the one line). A dict in argv stands for a stub with
# these faults. Words that only some scripts say, or that differ: {script: words}.
USAGE = [
    ("6-zero-steps", ["--total-timesteps", "0"], ["--total-timesteps must be at least 1, got 0"]),
    ("6-minus-steps", ["--total-timesteps", "-5"], ["--total-timesteps must be at least 1, got -5"]),
    ("6-envs", ["--num-envs", "0"], ["--num-envs must be at least 1, got 0"]),
    ("6-batch-size", ["--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
    ("6-batch-length", ["--batch-length", "0"], ["--batch-length must be at least", "got 0"]),
    ("6-save-every", ["--save-every", "0"], ["--save-every must be at least 1, got 0"]),
    ("6-eval-episodes", ["--eval-episodes", "0"], ["--eval-episodes must be at least 1, got 0"]),
    (
        "7-untrained",
        ["--total-timesteps", "100", "--learning-starts", "1000"],
        ["--total-timesteps 100", "--learning-starts 1000"],
    ),
    (
        "7-unplanned",
        [{}, "--seed-episodes", "3", "--max-episode-steps", "8", "--total-timesteps", "32"],
        ["--total-timesteps 32", "--seed-episodes 3 (32 agent steps in 2 environments)", "nothing would be planned"],
    ),
    (
        "7-unplanned-unknown-length",
        [{}, "--seed-episodes", "3", "--total-timesteps", "4"],
        ["--total-timesteps 4", "--seed-episodes 3 (4 agent steps in 2 environments)", "nothing would be planned"],
    ),
    ("6-seed-episodes", ["--seed-episodes", "0"], ["--seed-episodes must be at least 1, got 0"]),
    ("6-initial-updates", ["--initial-updates", "0"], ["--initial-updates must be at least 1, got 0"]),
    ("6-horizon", ["--plan-horizon", "0"], ["--plan-horizon must be at least 1, got 0"]),
    ("6-report-every", ["--report-every", "-1"], ["--report-every must be 0 to", "got -1"]),
    ("8-nan", ["--learning-rate", "nan"], ["--learning-rate must be", " to ", "got nan"]),
    ("8-minus", ["--learning-rate", "-1"], ["--learning-rate must be", " to ", "got -1"]),
    ("8-inf", ["--learning-rate", "inf"], ["--learning-rate must be", " to ", "got inf"]),
    ("8-gamma", ["--gamma", "2"], ["--gamma must be 0 to 1, got 2"]),
    ("8-gae", ["--gae-lambda", "-1"], ["--gae-lambda must be 0 to 1, got -1"]),
    ("8-lambda", ["--return-lambda", "-1"], ["--return-lambda must be 0 to 1, got -1"]),
    ("8-noise", ["--action-noise", "nan"], ["--action-noise must be 0 to 10, got nan"]),
    ("8-bits", ["--bits", "9"], ["--bits must be 1 to 8, got 9"]),
    ("8-reward-scale", ["--reward-scale", "0"], ["--reward-scale must be", "got 0"]),
    ("8-min-stddev", ["--min-stddev", "0"], ["--min-stddev must be", "got 0"]),
    ("8-target", ["--target-return", "nan"], ["--target-return must be", "got nan"]),
    ("9-seed-minus", ["--seed", "-1"], ["--seed must be 0 to 4294967295, got -1"]),
    ("9-seed-large", ["--seed", "4294967296"], ["--seed must be 0 to 4294967295, got 4294967296"]),
    ("10-heads", ["--embed-dim", "100", "--num-heads", "8"], ["--embed-dim 100", "--num-heads 8", "remainder 4"]),
    ("10-elites", ["--plan-elites", "9"], ["--plan-elites 9 is more than --plan-candidates 8"]),
    (
        "11-buffer",
        ["--buffer-size", "10", "--batch-length", "64", "--total-timesteps", "500"],
        ["--buffer-size 10", "--batch-length"],
    ),
    (
        "12-memory",
        [{}, "--buffer-size", 10**13, "--total-timesteps", 10**13],
        ["replay needs", "GB free", "lower --buffer-size"],
    ),
    ("13-env-id", ["--env-id", "CartPoleX-v1"], ["--env-id", "CartPoleX", "Did you mean", "CartPole"]),
    ("13-module", ["--env-id", "no_such_module:Stub-v0"], ["--env-id", "no_such_module"]),
    ("14-box2d", ["--env-id", "CarRacing-v2"], ["--env-id", "CarRacing-v3"]),
    ("14-ale", ["--env-id", "ALE/Pong-v4"], ["--env-id", "v5"]),
    ("17-multi", [dict(action="multidiscrete")], ["--env-id", STUB, "Discrete", "MultiDiscrete([2 3])"]),
    ("17-dict", [dict(action="dict")], ["--env-id", STUB, "Discrete", "Dict('a': Discrete(2))"]),
    ("18-grey2d", [dict(obs="grey2d")], ["--env-id", STUB, "uint8 (16, 16)", "height, width"]),
    ("18-channel-first", [dict(obs="channel_first")], ["--env-id", STUB, "uint8 (3, 16, 16)", "height, width"]),
    ("18-rgba", [dict(obs="rgba")], ["--env-id", STUB, "uint8 (16, 16, 4)", "height, width"]),
    ("18-no-picture", [{}, "--pixels"], ["--env-id", STUB, "--pixels", "rgb_array"]),
    ("33-init-from", ["--init-from", "nowhere.pt"], ["--init-from nowhere.pt: no such file"]),
    ("33-lpips", ["--lpips-weights", "nowhere.pth"], ["--lpips-weights nowhere.pth: no such file"]),
    (
        "7-no-update",
        ["--tokenizer-start", "9", "--world-model-start", "9", "--actor-critic-start", "9"],
        ["--total-timesteps 96", "6 epochs of --steps-per-epoch 16", "nothing would be trained"],
    ),
    ("19-nested", [dict(obs="nested")], ["--env-id", STUB, "inner", "outer"]),
    ("20-dtype", [dict(obs="image", wrong_dtype=True)], ["--env-id", STUB, "uint8", "float64"]),
    ("29-slash", ["--exp-name", "a/b"], ["--exp-name", "a/b"]),
    ("32-missing", ["--resume", "nowhere"], ["no checkpoint in nowhere"]),
    ("32-evaluate", ["--evaluate", "nowhere"], ["no checkpoint in nowhere"]),
    ("32-play", ["--play", "nowhere"], ["no checkpoint in nowhere"]),
    ("json", ["--env-kwargs", "[1]"], ["--env-kwargs", "[1]"]),
    ("json-broken", ["--env-kwargs", "{"], ["--env-kwargs", "{"]),
    ("kwargs", [dict(colour="red")], ["--env-id", STUB, "colour"]),
]


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in BOXES])
def test_parser(script, tmp_path, argv, words):
    result = script.call(*argv)
    assert result.code == 2
    for word in words:
        assert word in result.err, result.err
    assert "Traceback" not in result.err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in USAGE])
def test_usage(script, tmp_path, argv, words):
    argv = script.need(argv)
    if isinstance(words, dict):
        words = words.get(script.name) or pytest.skip(f"{script.name}.py has no such limit")
    usage_error(script, script.call(*script.tiny, *argv), words)
    assert os.listdir(tmp_path) == []


def test_15_package_of_the_environment_is_missing(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    usage_error(
        script, script.call(*script.tiny, "--env-id", "ALE/Pong-v5"), ["ALE/Pong-v5 needs ale-py: pip install ale-py"]
    )
    assert os.listdir(tmp_path) == []


def test_27_output_is_not_writable(script, tmp_path):
    (tmp_path / "runs").write_text("a file")
    usage_error(script, script.run(), ["cannot write runs"])
    assert os.listdir(tmp_path) == ["runs"]


def test_27_output_folder_is_read_only(script, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    # Modes do not bind root: give that power away first (prctl 24: the next program may not have capability 1).
    drop = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); python = sys.executable; "
    drop += "os.execv(python, [python, *sys.argv[1:]])"
    process = script.start(*script.tiny, *script.stub(), launcher=(sys.executable, "-c", drop))
    _, err = process.communicate(timeout=60)
    usage_error(script, types.SimpleNamespace(code=process.returncode, err=err), ["cannot write runs"])
    assert os.listdir(tmp_path / "runs") == []


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--play"])
def test_32_empty_directory(script, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    usage_error(script, script.call(flag, "empty"), ["no checkpoint in empty"])
    assert os.listdir("empty") == []


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--eval-episodes", "0"], ["--eval-episodes must be at least 1, got 0"]),
        (["--seed", "-1"], ["--seed must be 0 to 4294967295, got -1"]),
        (["--plan-elites", "9"], ["--plan-elites 9 is more than --plan-candidates 8"]),
        (["--env-id", "CartPoleX-v1"], ["--env-id", "Did you mean"]),
        (["--env-id", "OTHER", "--env-kwargs", "{}"], ["--env-id", "OTHER", "was trained on"]),  # other shapes
    ],
)
def test_usage_errors_of_evaluate(script, trained, argv, words):
    before = bytes_of(trained)
    script.need(argv)
    argv, words = ([script.other if w == "OTHER" else w for w in x] for x in (argv, words))
    usage_error(script, script.call("--evaluate", trained, *argv), words)
    assert bytes_of(trained) == before


def test_usage_errors_of_play(script, trained):
    before = bytes_of(trained)
    usage_error(script, script.call("--play", trained, "--seed", "-1"), ["--seed must be 0 to 4294967295, got -1"])
    assert bytes_of(trained) == before


def test_62_flags_are_frozen(script):
    assert sorted(f.name.replace("_", "-") for f in fields(script.mod.Args)) == sorted(script.flags.split())


def test_65_tracker_is_missing(script, tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        usage_error(script, script.run("--track", name), [f"--track {name} needs {name}: pip install {name}"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_65_tracker_gets_the_curves_without_asking_for_a_key(script, monkeypatch, name):
    calls = []

    class Tracker(types.ModuleType):
        def __getattr__(self, attribute):
            return lambda *args, **kwargs: calls.append((attribute, args, kwargs))

    monkeypatch.setitem(sys.modules, name, Tracker(name))
    assert script.run("--track", name).code == 0
    assert calls[0][0] == "init" and calls[0][2]["name"] == os.path.basename(only_run())
    assert not any(c[0] == "login" for c in calls)
    if name == "trackio":
        logged = {tag for c in calls if c[0] == "log" for tag in c[1][0]}
        assert set(scalars(only_run())) <= logged
    else:
        assert calls[0][2]["sync_tensorboard"] is True


def test_67_headless(script, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    args = script.mod.Args(env_id="CartPole-v1", pixels=True, image_size=16)
    env = script.mod.make_env(args, 0)()
    image = np.asarray(next(iter(env.reset()[0].values())))
    env.close()
    assert image.shape == (16, 16, 3) and image.min() < image.max()
    assert os.environ.get("SDL_VIDEODRIVER") == "dummy"

    if script.name in ("muzero", "diamond"):
        return  # DeepMind Control has Box actions: refused before its import

    class NoDriver(types.ModuleType):  # what the import does on a machine without EGL
        @property
        def suite(self):
            assert os.environ["MUJOCO_GL"] == "egl"
            raise ImportError("Cannot initialize a EGL device display")

    monkeypatch.setitem(sys.modules, "dm_control", NoDriver("dm_control"))
    result = script.run("--env-id", "dm_control/walker-walk-v0", "--env-kwargs", "{}", "--pixels")
    usage_error(script, result, ["dm_control/walker-walk-v0", "MUJOCO_GL"])
    assert os.listdir(tmp_path) == []


# ---- Runs that work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, obs, action", [(name, *pair) for name, s in SCRIPTS.items() for pair in s["spaces"]], indirect=["script"]
)
def test_17_19_spaces_that_are_handled(script, obs, action):
    result = script.run("--report-every", "48", "--capture-video", faults=dict(obs=obs, action=action))
    assert result.code == 0, result.err  # the stub refuses actions outside its space
    taken = [entry[3] for entry in stub_env.StubEnv.log if entry[3] is not None]
    if action == "discrete_start1":
        assert {int(a) for a in taken} == {1, 2, 3}
    if action == "box":
        assert np.min(taken, 0)[0] < -1.5 and np.max(taken, 0)[0] > 2.5  # the whole range is reached, see the clipping


def test_21_no_time_limit(script):
    result = script.run("--max-episode-steps", "7", faults=dict(length=None))
    assert result.code == 0 and "time limit" not in result.out + result.err
    assert scalars(only_run())["eval/episodic_return"][-1][1] == 7.0
    result = script.run()
    lines = warnings_of(script, result.out + result.err)
    assert len(lines) == 1 and STUB in lines[0] and "--max-episode-steps" in lines[0]


def test_22_30_no_cuda_and_another_working_directory(script, tmp_path):
    (tmp_path / "näh er").mkdir()
    os.chdir("näh er")
    argv = [a for a in script.tiny if a != "--no-cuda"]
    process = script.start(*argv, *script.stub(), "--max-episode-steps", "9", CUDA_VISIBLE_DEVICES="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.splitlines()[0] == "device: cpu (no CUDA device)", out + err
    assert os.listdir(".") == ["runs"] and os.listdir("..") == ["näh er"]
    os.chdir("/")
    result = script.call(
        "--evaluate", os.path.join(tmp_path, "näh er", "runs", *os.listdir(tmp_path / "näh er" / "runs"))
    )
    assert result.code == 0, result.err


def test_23_no_compiler(script, unbroken, tmp_path):
    script.need(["--compile"])
    env = dict(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), CC="", CXX="")
    process = script.start(*script.tiny, *script.stub(), "--compile", "--max-episode-steps", "9", **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = warnings_of(script, out + err)
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile does not work here"), lines
    assert lines[0] in out
    same(load(only_run())["learner"], load(unbroken)["learner"])


def test_28_two_runs_in_the_same_second(script):
    # A clock that runs a thousand times slower: both are certain to start in the same second.
    slow = "import time; began = time.perf_counter(); time.time = lambda: 1e9 + (time.perf_counter() - began) / 1000"
    processes = [script.start(*script.tiny, *script.stub(), prelude=slow) for _ in range(2)]
    results = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    runs = sorted(os.listdir("runs"))
    assert len(runs) == 2 and runs[1] == runs[0] + "-1"
    for run in runs:
        assert sum(n.startswith("events") for n in os.listdir(os.path.join("runs", run))) == 1
        assert outcome(os.path.join("runs", run))["run"] == os.path.join("runs", run)


@pytest.mark.parametrize("name", ["with spaces", "Größe-世界", "..", "a=b", "-x"])
def test_29_odd_names(script, name):
    result = script.run(f"--exp-name={name}")
    assert result.code == 0, result.err
    assert name in only_run() and os.listdir(".") == ["runs"]


def test_31_help(script, tmp_path):
    result = script.call("--help")
    assert result.code == 0 and "--total-timesteps" in result.out and result.err == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "faults, argv, length",
    [(dict(length=1), [], 1), (dict(length=None), ["--max-episode-steps", "7"], 7), (dict(truncate_at=3), [], 3)],
)
def test_55_episode_lengths(script, faults, argv, length):
    result = script.run(*argv, faults=faults | dict(reward=2.0))
    assert result.code == 0, result.err
    found = scalars(only_run())
    assert {v for _, v in found["charts/episodic_length"]} == {length}
    assert {v for _, v in found["charts/episodic_return"]} == {2.0 * length}
    assert found["eval/episodic_return"][-1][1] == 2.0 * length
    assert finite(load(only_run())["learner"])


@pytest.mark.parametrize("reward", [0.0, 1.0, 1e6, -1e6])
def test_56_reward_scales(script, reward):
    assert script.run(faults=dict(reward=reward)).code == 0
    found = scalars(only_run())
    assert any(t.startswith("losses/") for t in found)
    assert all(math.isfinite(v) for values in found.values() for _, v in values)
    assert finite(load(only_run())["learner"])


def only_for(*names):
    """The test is about these scripts alone."""
    return pytest.mark.parametrize("script", names, indirect=True)


def stored_rows(run):
    """What the replay holds of each environment: [(t, start, reward, is_first, is_last, is_terminal, action), ...]."""
    rows, count = load(run)["replay"]["rows"], load(run)["replay"]["count"]
    obs, one_hot = next(v for k, v in rows.items() if k.startswith("obs")), rows["action"].dim() == 3
    names = ("reward", "is_first", "is_last", "is_terminal")
    return [
        [
            (
                *obs[e, i, :2].tolist(),
                *(rows[k][e, i].item() for k in names),
                int(action.argmax() if one_hot else action),
            )
            for i, action in enumerate(rows["action"][e, : count[e]])
        ]
        for e in range(len(count))
    ]


def handmade_rows(instance, terminal):
    """The same list from the stub's own log: reward t comes with observation t, the action is taken after it."""
    log, rows = [entry[1:] for entry in stub_env.StubEnv.log if entry[0] == instance], []
    for (episode, t, _, start), following in zip(log, [*log[1:], None]):
        last = following is None or following[0] != episode
        action = 0 if last else int(following[2])
        rows.append((float(t), start, float(t), t == 0, last, last and terminal, action))
    return rows


def stored_episodes(run):
    """What a replay of whole episodes holds: [[(t, start, reward), ...], ...], and the actions [(rows, A), ...]."""
    replay = load(run)["replay"]
    names = {k for k in replay["rows"] if k.startswith("obs/")}
    assert names == {"obs/observation"} and replay["rows"].keys() == names | {"action", "reward"}
    assert {len(v) for v in replay["rows"].values()} == {sum(replay["lengths"])}
    rows = [(*o[:2], r) for o, r in zip(*(replay["rows"][k].tolist() for k in ("obs/observation", "reward")))]
    ends = np.cumsum(replay["lengths"])
    actions = replay["rows"]["action"].numpy()
    return [rows[e - n : e] for e, n in zip(ends, replay["lengths"])], np.split(actions, ends[:-1])


def handmade_episodes(lengths):
    """The same from the stub's own log, {instance: length of its episodes}: those that were played to the end, row t
    with the action that led to observation t. Instances take turns."""
    episodes, actions = {i: [] for i in lengths}, {i: [] for i in lengths}
    for instance, length in lengths.items():
        log = [entry[1:] for entry in stub_env.StubEnv.log if entry[0] == instance]
        for number in {entry[0] for entry in log}:
            episode = [entry for entry in log if entry[0] == number]
            if len(episode) == length + 1:
                episodes[instance].append([(float(t), start, float(t)) for _, t, _, start in episode])
                actions[instance].append(np.array([a for _, _, a, _ in episode[1:]]))
    assert len({len(e) for e in episodes.values()}) == 1
    return tuple([e for turn in zip(*x.values()) for e in turn] for x in (episodes, actions))


def test_61_seeds(script, unbroken):
    first = script.run()
    starts = {entry[4] for entry in stub_env.StubEnv.log}
    assert first.code == 0
    same(scalars(only_run()), scalars(unbroken))
    same(load(only_run())["learner"], load(unbroken)["learner"])
    shutil.rmtree("runs")
    assert script.run("--seed", "2").code == 0
    other = {entry[4] for entry in stub_env.StubEnv.log}
    assert len(starts) > 20 and len(other) > 20 and not starts & other
    mine, theirs = scalars(only_run()), scalars(unbroken)
    losses = [t for t in mine if t.startswith("losses/")]
    assert sum(mine[t] != theirs[t] for t in losses) > len(losses) / 2


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
    sys.modules["stripped"] = mod  # dataclasses look their module up
    try:
        spec.loader.exec_module(mod)
        result = script.call(*script.tiny, *script.stub(), mod=mod)
    finally:
        del sys.modules["stripped"]
    assert result.code == 0, result.err
    assert load(only_run())["updates"] > 3


@pytest.mark.parametrize("version", [None, 1, 2])
def test_66_videos_do_not_depend_on_moviepy(script, monkeypatch, version):
    editor = types.ModuleType("moviepy.editor")
    monkeypatch.setitem(sys.modules, "moviepy", types.ModuleType("moviepy") if version else None)
    monkeypatch.setitem(sys.modules, "moviepy.editor", editor if version == 1 else None)
    assert script.run("--report-every", "48", "--capture-video").code == 0
    run = only_run()
    events = EventAccumulator(run)
    events.Reload()
    images = [image for tag in events.Tags()["images"] for image in events.Images(tag)]
    gifs = [n for n in os.listdir(os.path.join(run, "videos")) if n.endswith(".gif")]
    pictures = [i.step for i in images if i.encoded_image_string[:4] == b"\x89PNG"]
    assert pictures == script.pictures
    images = [i for i in images if i.encoded_image_string[:4] != b"\x89PNG"]
    assert [i.step for i in images] == [48, 96] and all(i.encoded_image_string[:3] == b"GIF" for i in images)
    assert len(gifs) == 3


def test_69_target_missed(script):
    result = script.run("--target-return", "1e9")
    assert result.code == 1 and "Traceback" not in result.err
    assert result.out.splitlines()[-1].endswith("target 1e+09): missed")
    assert os.path.isfile(os.path.join(only_run(), "result.json"))


def test_71_reader_of_the_pipe_is_gone(script):
    process = script.start(*script.tiny, *script.stub(), "--total-timesteps", 10**6)
    first = process.stdout.readline()
    process.stdout.close()
    _, err = process.stderr.read(), process.wait(timeout=60)
    assert first and "Traceback" not in _ and "Exception" not in _ and "Broken" not in _
    assert err != 0


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def damage(path, how):
    size = os.path.getsize(path)
    with open(path, "r+b") as f:
        if how == "truncated":
            f.truncate(size // 2)
        elif how == "empty":
            f.truncate(0)
        elif how == "garbage":
            f.write(b"not a checkpoint " * (size // 17))


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
def test_33_corrupt_checkpoint(script, trained, how):
    damage(os.path.join(trained, "ckpt.pt"), how)
    before = load(trained, "ckpt.prev.pt")["global_step"]
    next_second(trained)
    result = script.call("--resume", trained, "--total-timesteps", "128")
    assert result.code == 0, result.err
    warned = [line for line in result.out.splitlines() if line.startswith("warning:")]
    assert any(re.search(r"ckpt.pt is (damaged|not a plain).*going on from .*ckpt.prev.pt", line) for line in warned), (
        warned
    )
    assert f"resumed at step {before} of 128" in result.out and load(trained)["global_step"] == 128
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        damage(os.path.join(trained, name), how)
    before = bytes_of(trained)
    usage_error(script, script.call("--resume", trained, "--total-timesteps", "160"), [trained, "ckpt.prev.pt is "])
    assert bytes_of(trained).keys() == before.keys()


def test_33_damaged_checkpoint_never_replaces_the_good_one(script, trained):
    """Killed between the two renames of the first checkpoint after a damaged one: something readable must be left."""
    damage(os.path.join(trained, "ckpt.pt"), "truncated")
    kill = """
import os, signal
real = os.replace
def replace(a, b):
    if b.endswith("ckpt.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
"""
    process = script.start("--resume", trained, "--total-timesteps", "128", prelude=kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    result = script.call("--evaluate", trained)
    assert result.code == 0, result.err


def test_34_checkpoint_of_another_script(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        torch.save(load(trained, name) | {"script": "other"}, os.path.join(trained, name))
    before = bytes_of(trained)
    for flag in ("--resume", "--evaluate", "--play"):
        usage_error(script, script.call(flag, trained), [f"is not a checkpoint of {script.name}.py"])
    assert bytes_of(trained).keys() == before.keys()


@pytest.mark.parametrize(
    "flag, old, new", [("SIZE", "", ""), ("--embed-dim", "16", "32"), ("--num-envs", "2", "4"), ("--seed", "1", "2")]
)
def test_34_resume_cannot_change_the_run(script, trained, flag, old, new):
    flag, old, new = script.resize if flag == "SIZE" else (flag, old, new)
    script.need([flag])
    before = bytes_of(trained)
    usage_error(script, script.call("--resume", trained, flag, new, "--total-timesteps", "128"), [flag, old, new])
    assert bytes_of(trained) == before


def test_35_finished_run_resumed(script, trained):
    before = bytes_of(trained)
    result = script.call("--resume", trained)
    assert result.code == 0 and "nothing to do: step 96 of 96" in result.out
    assert bytes_of(trained) == before


def test_35_run_killed_in_its_last_evaluation_is_finished_by_resume(script, unbroken):
    """All steps are done but the result is missing: --resume owes it."""
    # Made after those of training, of the random baseline and, where there are more for measuring the model, of the
    # evaluation. The resumed run, without a baseline, makes fewer: it must not meet the fault again.
    late = script.train_instance + (12 if script.name == "muzero" else 4)
    process = script.start(*script.tiny, *script.stub(signal_at=2, signum=9, only=late))
    process.communicate(timeout=60)
    run = only_run()
    assert process.returncode == -signal.SIGKILL and load(run)["global_step"] == 96
    result = script.call("--resume", run)
    assert result.code == 0, result.err
    assert os.path.isfile(os.path.join(run, "result.json"))
    assert outcome(run)["returns"] == outcome(unbroken)["returns"]


def test_35_run_stopped_before_its_first_episode(script, monkeypatch):
    """There is nothing to evaluate or to dream from yet: said in one line, and --resume gets over it."""
    waiting = stop_once(script, monkeypatch, [(2, 2)])  # in the random baseline
    assert script.run().code == 143 and not waiting
    run = only_run()
    before = bytes_of(run)
    for flag in ("--evaluate", "--play"):
        usage_error(script, script.call(flag, run), [run, "--resume"])
        assert bytes_of(run) == before
    next_second(run)
    assert script.call("--resume", run).code == 0 and script.call("--evaluate", run).code == 0


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.path.abspath("executed"),)


def test_36_malicious_checkpoint(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        torch.save({"script": script.name, "learner": Payload()}, os.path.join(trained, name))
    for flag in ("--resume", "--evaluate", "--play"):
        usage_error(script, script.call(flag, trained), ["not a plain checkpoint"])
    assert not os.path.exists("executed")
    torch.load(os.path.join(trained, "ckpt.pt"), weights_only=bool(0))  # the payload is real
    assert os.path.exists("executed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_37_from_gpu_to_cpu_and_back(script, trained):
    next_second(trained)
    assert script.call("--resume", trained, "--total-timesteps", "128", "--cuda").code == 0
    next_second(trained)
    assert script.call("--resume", trained, "--total-timesteps", "160", "--no-cuda").code == 0
    next_second(trained)
    assert script.call("--evaluate", trained, "--cuda").code == 0
    assert load(trained)["global_step"] == 160


def test_38_compiled_checkpoint(script, monkeypatch):
    script.need(["--compile"])
    compiled, real = [], torch.compile

    def fast(function, **kwargs):  # the graph is captured, only machine code is not made
        compiled.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", fast)
    result = script.run("--compile", "--total-timesteps", "48")
    assert result.code == 0 and "warning: torch.compile" not in result.out and len(compiled) > 1
    run = only_run()
    assert not [k for k in flat(load(run)["learner"]) if "_orig_mod" in k]
    next_second(run)
    monkeypatch.setattr(torch, "compile", None)
    result = script.call("--resume", run, "--no-compile", "--total-timesteps", "96")
    assert result.code == 0, result.err


def test_39_two_processes_resume_one_run(script, trained):
    hold = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "f.write(str(os.getpid())); f.flush(); print('held', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder = subprocess.Popen([sys.executable, "-S", "-c", hold, os.path.join(trained, "lock")], **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        before = bytes_of(trained)
        result = script.call("--resume", trained, "--total-timesteps", "128")
        usage_error(script, result, [trained, f"is being written by process {holder.pid}"])
        assert bytes_of(trained) == before
    finally:
        holder.kill()
        holder.communicate()
    assert script.call("--resume", trained, "--total-timesteps", "128").code == 0  # a dead owner does not block


def test_40_killed_while_saving(script, tmp_path):
    """20 processes that save in a loop, killed at different moments: a whole checkpoint is always left."""
    code = f"""
import os, signal, sys, time
import torch
import {script.name} as mod
for i in range(20):
    path = os.path.join({str(tmp_path)!r}, str(i), "ckpt.pt")
    os.mkdir(os.path.dirname(path))
    pid = os.fork()
    if pid == 0:
        for k in range(10**6):
            mod.atomic_save({{"script": {script.name!r}, "k": k, "data": torch.full((300_000,), float(k))}}, path)
    while not os.path.exists(path):
        time.sleep(0.001)
    time.sleep(0.002 * i)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    state = mod.load_checkpoint(os.path.dirname(path), {script.name!r})
    assert (state["data"] == state["k"]).all() and len(state["data"]) == 300_000
    print("warned" if not os.path.exists(path) else "whole")
"""
    env = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 20 and "damaged" not in done.stdout, done.stderr


def test_41_disk_full_at_a_checkpoint(script, trained):
    before = bytes_of(trained)
    next_second(trained)
    with largest_file(len(before["ckpt.pt"][0]) // 2):
        result = script.call("--resume", trained, "--total-timesteps", "160")
    assert result.code == 1
    assert (
        result.err.splitlines()[-1].startswith(f"could not write {trained}/ckpt.pt") and "Traceback" not in result.err
    )
    after = bytes_of(trained)
    assert not [n for n in after if n.endswith(".tmp")]
    assert after["ckpt.pt"] == before["ckpt.pt"] and after["ckpt.prev.pt"] == before["ckpt.prev.pt"]


def test_41_disk_full_leaves_the_run_resumable(script, trained):
    """Not even args.json can be written: the old one stays, and the run goes on once there is space."""
    before = bytes_of(trained)
    next_second(trained)
    with largest_file(256), contextlib.suppress(OSError):
        assert script.call("--resume", trained, "--total-timesteps", "160").code == 1
    assert bytes_of(trained)["args.json"][0] == before["args.json"][0]
    next_second(trained)
    assert script.call("--resume", trained, "--total-timesteps", "128").code == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread is quiet
def test_42_disk_full_for_events(script, trained):
    # Thousands of scalars and a checkpoint, and a copy of the script, that are smaller than they are.
    limit = max(int(1.5 * os.path.getsize(os.path.join(trained, "ckpt.pt"))), os.path.getsize(script.path) + 4096)
    argv = script.chatty.split()
    assert script.run(*argv).code == 0
    whole = only_run()
    (events,) = [n for n in os.listdir(whole) if n.startswith("events")]
    assert (
        os.path.getsize(os.path.join(whole, events))
        > 1.5 * limit
        > 1.5 * os.path.getsize(os.path.join(whole, "ckpt.pt"))
    )
    learner = load(whole)["learner"]
    shutil.rmtree("runs")
    with largest_file(limit):
        result = script.run(*argv)
    assert result.code == 0, result.err
    warned = [
        line for line in (result.out + result.err).splitlines() if line.startswith("warning: could not write the logs")
    ]
    assert len(warned) == 1 and "Traceback" not in result.err
    same(load(only_run())["learner"], learner)
    assert os.path.isfile(os.path.join(only_run(), "result.json"))


# ---- Signals and kills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_43_44_stop_signals(script, name, code):
    """The whole process group gets the signal, as from a terminal. Also row 39: a running script holds its lock."""
    process = script.start(*script.tiny, *script.stub(), "--total-timesteps", 10**6, "--save-every", 10**5)
    for line in process.stdout:
        if "global_step=64" in line:
            break
    run = only_run()
    with open(os.path.join(run, "lock")) as f, pytest.raises(BlockingIOError):
        assert f.read() == str(process.pid)
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    began = time.time()
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and time.time() - began < 10, err
    assert "Traceback" not in err and "Error" not in err
    step, last = load(run)["global_step"], out.splitlines()[-1]
    assert f"at step {step}" in last and f"python {script.path} --resume {run}" in last  # can be pasted
    assert "ckpt.pt.tmp" not in os.listdir(run)
    next_second(run)
    result = script.call("--resume", run, "--total-timesteps", step + 32)
    assert result.code == 0 and f"resumed at step {step} of {step + 32}" in result.out, result.err
    assert load(run)["global_step"] == step + 32


def test_44_nohup_keeps_a_run_alive(script, monkeypatch):
    """A hangup that was ignored when the script started (nohup) does not stop it."""
    real, calls = getattr(script.owner, script.method), []

    def update(self, *args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGHUP))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.owner, script.method, update)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = script.run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.code == 0 and len(calls) > 4, result.err


@pytest.mark.parametrize("name, code", [("SIGUSR1", 138), ("SIGHUP", 129)])
def test_44_other_stop_signals(script, monkeypatch, name, code):
    real, calls = getattr(script.owner, script.method), []

    def update(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), getattr(signal, name))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.owner, script.method, update)
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        result = script.run()
    finally:
        signal.signal(getattr(signal, name), before)
    assert result.code == code and len(calls) == 4 and "Traceback" not in result.err
    assert load(only_run())["updates"] == 4 and "--resume" in result.out.splitlines()[-1]


def test_45_second_signal(script):
    slow = script.at_update(5, "print('slow', flush=True); time.sleep(60)")
    process = script.start(*script.tiny, *script.stub(), prelude=slow)
    for line in process.stdout:
        if line == "slow\n":
            break
    began = time.time()
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the update
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and time.time() - began < 5
    assert load(only_run())["global_step"] == 32


def test_46_signal_during_a_checkpoint(script, monkeypatch):
    real, calls = torch.save, []

    def save(state, f):
        calls.append(0)
        if len(calls) == 2:
            f.write(b"x")  # half a file
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            f.seek(0)
        real(state, f)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        result = script.run()
    assert result.code == 143 and "Traceback" not in result.err
    assert load(only_run())["global_step"] == 64 and "ckpt.pt.tmp" not in os.listdir(only_run())


@pytest.mark.parametrize("when, step, code", [("baseline", 0, 143), ("evaluation", 96, 143)])
def test_43_signal_outside_the_loop(script, when, step, code):
    """The random baseline and the final evaluation can take minutes: they are stopped too."""
    first = script.train_instance + (2 if when == "baseline" else 4)
    result = script.run(faults=dict(signal_at=2, only=first))
    assert result.code == code, result.out[-300:]
    assert "--resume" in result.out.splitlines()[-1] and load(only_run())["global_step"] <= step + 2


NOT_REPEATED = ("minutes", "run", "peak_memory_gb")  # of result.json


def as_if_unbroken(script, run, unbroken):
    mine, theirs = load(run), load(unbroken)
    for k in script.state.split():
        same(mine[k], theirs[k])
    mine, theirs = ({k: v for k, v in outcome(r).items() if k not in NOT_REPEATED} for r in (run, unbroken))
    assert mine == theirs
    same(scalars(run), scalars(unbroken))


@pytest.mark.parametrize("kills", [[6], [4, 6]])
def test_47_48_killed_and_resumed_is_as_if_unbroken(script, unbroken, kills):
    """SIGKILL between checkpoints, once and twice: weights, replay, returns and curves as of the run without it."""
    argv = [*script.tiny, *script.stub()]
    for n in kills:
        process = script.start(*argv, prelude=script.at_update(n, "os.kill(os.getpid(), signal.SIGKILL)"))
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        run = only_run()
        argv = ["--resume", run]
        assert 0 < load(run)["global_step"] < 96
        next_second(run)
    result = script.call(*argv)
    assert result.code == 0, result.err
    as_if_unbroken(script, run, unbroken)


def stop_once(script, monkeypatch, points):
    """SIGTERM at each point, one after the other: ("update", n), at the beginning of the n-th update of this process,
    or (instance, n), in step n of the stub that is `instance` places behind training environment 0."""
    points, calls = [*points], {}

    def watch(owner, method, key):
        real = getattr(owner, method)

        def wrapped(self, *args, **kwargs):
            calls[key(self)] = calls.get(key(self), 0) + 1
            if points and points[0] == (key(self), calls[key(self)]):
                points.pop(0)
                calls.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, wrapped)

    watch(script.owner, script.method, lambda learner: "update")
    watch(stub_env.StubEnv, "step", lambda env: env.instance - script.train_instance)
    return points


STOPS = {
    "in-the-baseline": [(2, 2)],
    "random-episode": [(0, 4)],
    "planned-episode": [(1, 20)],
    "last-step-of-an-episode": [(1, 16)],
    "first-update-after-an-episode": [("update", 4)],
    "last-update-after-an-episode": [("update", 5)],
    "only-update-after-an-episode": [("update", 1)],
    "very-last-update": [("update", 11)],
    "evaluation": [(5, 3)],
    "twice": [(0, 12), ("update", 5)],
    "twice-in-one-episode": [(0, 12), (1, 3)],
}


@only_for(*(name for name, s in SCRIPTS.items() if s["exact_stop"]))
@pytest.mark.parametrize("points", [pytest.param(p, id=i) for i, p in STOPS.items()])
def test_47_48_stopped_and_resumed_is_as_if_unbroken(script, unbroken, monkeypatch, points):
    """SIGTERM anywhere: episodes in progress are played again, updates go on where they were."""
    waiting = stop_once(script, monkeypatch, points)
    result = script.run()
    for _ in points:
        assert result.code == 143 and "Traceback" not in result.err, result.err
        run = only_run()
        next_second(run)
        result = script.call("--resume", run)
    assert result.code == 0 and not waiting, result.err
    as_if_unbroken(script, run, unbroken)


# ---- Environments that fail ------------------------------------------------------------------------------------------


FAULTS = [
    ("50-raise", dict(raise_at=40), "environment 1 failed at step 40: ValueError: boom"),
    ("53-reward-nan", dict(nan_at=40), "environment 1 returned reward nan at step 40"),
    ("53-reward-inf", dict(nan_at=40, nan=("reward", "-inf")), "environment 1 returned reward -inf at step 40"),
    ("53-obs-nan", dict(nan_at=40, nan=("obs", "nan")), "environment 1 returned observation"),
    ("54-shape", dict(shape_change_at=40), "environment 1 failed at step 40: ValueError"),
]


@pytest.mark.parametrize("faults, summary", [pytest.param(f, s, id=i) for i, f, s in FAULTS])
def test_50_53_54_environment_faults(script, faults, summary):
    images = script.faults.get("obs") == "image"
    if images and "obs" in faults.get("nan", ()):
        pytest.skip("integers have no NaN")
    result = script.run(faults=faults | dict(only=script.train_instance + 1))
    assert result.code == 1
    assert "Traceback" in result.err and result.err.splitlines()[-1].startswith(summary), result.err
    if "54" in summary or "shape" in str(faults):
        shapes = ("(16, 16, 3)", "(32, 16, 3)") if images else ("(3,)", "(6,)")
        assert all(shape in result.err.splitlines()[-1] for shape in shapes)
    state = load(only_run())
    assert state["global_step"] == 64 and finite(state["learner"]) and finite(state["replay"])


@pytest.mark.parametrize("later", [2, 3])
def test_50_environment_fails_outside_the_loop(script, later):
    """In the random baseline, whose environments are made after those of training, the summary is as clear."""
    try:
        result = script.run(faults=dict(raise_at=2, only=script.train_instance + later))
    except Exception as e:  # would have been printed with its traceback
        pytest.fail(f"ended with a bare {type(e).__name__}: {e}")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(f"environment {later - 2} failed at step 2: ValueError: boom")


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_59_60_bad_numbers_make_no_step(script, monkeypatch, what):
    """NaN planted in a weight, inf in a gradient, before update 6: named, nothing is changed, nothing is saved."""
    real, calls, kept = getattr(script.owner, script.method), [], {}

    def update(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 6:
            weight = script.plant(self)
            if what == "weight":
                weight.data.flatten()[0] = math.nan
            else:
                weight.register_hook(lambda g: g * math.inf)
            kept["self"], kept["before"] = self, [p.detach().clone() for p in self.params]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.owner, script.method, update)
    result = script.run()
    assert result.code == 1 and len(calls) == 6
    last = result.err.splitlines()[-1]
    assert "not finite" in last and "update 6" in last and "ckpt.pt" in last and "Traceback" not in result.err
    named = last.split(": ")[1].split("; ")[0].split(", ")
    assert script.term in named if what == "weight" else named == ["gradient norm"]
    for p, before in zip(kept["self"].params, kept["before"]):
        assert torch.equal(p.nan_to_num(7.0), before.nan_to_num(7.0))
    assert finite(load(only_run())["learner"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_24_out_of_gpu_memory(script, monkeypatch):
    real, calls = getattr(script.owner, script.method), []

    def update(self, *args, **kwargs):
        calls.append(torch.empty(2**48, device="cuda") if len(calls) == 5 else None)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.owner, script.method, update)
    result = script.run("--cuda")
    assert result.code == 1 and "Traceback" not in result.err
    assert re.search(r"out of GPU memory at step \d+ \(batch 2 x 4\): lower --batch-size or --batch-length", result.err)
    assert finite(load(only_run())["learner"])
