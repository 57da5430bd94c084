"""What a run survives, a column per script of the new shape (those that have `load`).

A new script adds its entry to SCRIPTS. Most rows run in this process (milliseconds); real processes are started where a
kill matters. The stub's episodes are longer than the distance of checkpoints unless a row says otherwise."""

import ast
import contextlib
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
import stub_env
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUB = "stub_env:Stub-v0"


def tdmpc2_rows(state):
    rows, first = state["replay"]["rows"], state["replay"]["place"] == 0
    named = {"obs/observation": rows["obs"], "reward": rows["reward"], "is_terminal": rows["terminated"]}
    return named | {"is_first": first, "is_last": torch.roll(first, -1, 1)}


def diamond_rows(state):
    """Row t holds what followed: shifted here to what came with t. Frames are told by their shades."""
    replay, env, found = state["replay"], 0, []
    rows = {k: v[env].float() for k, v in replay["rows"].items()}
    for i, (e, first, T) in enumerate(replay["episodes"]):
        if e == env:
            shade = rows["frames"][first : first + T + 1, 0, 0, 0]
            rewards = [0.0, *rows["rewards"][first:][:T].tolist()]
            for t, x in enumerate(((shade - shade[0]) / 10).tolist()):
                last = t == T and i not in replay["open"]
                end = last and bool(rows["ends"][first + T - 1])
                found.append((x, rewards[t], float(t == 0), float(last), float(end)))
    names = "obs/observation", "reward", "is_first", "is_last", "is_terminal"
    columns = {k: torch.tensor(v)[None] for k, v in zip(names, zip(*found))}
    return columns | {"obs/observation": columns["obs/observation"][..., None]}


def iris_rows(state):
    """An episode's last observation is not stored, and row t holds what followed: shifted here to what came with t."""
    replay, env, found = state["replay"], 0, []
    rows = {k: v[env].float() for k, v in replay["rows"].items()}
    for _, begin, end in (e for e in replay["episodes"] if e[0] == env):
        shade = rows["obs"][begin:end, 0, 0, 0]
        t = [*((shade - shade[0]) / 10).tolist(), float(end - begin)]
        rewards, over = [0.0, *rows["reward"][begin:end].tolist()], bool(rows["end"][end - 1])
        for i in range(len(t) - (not over)):
            last = float(over and i == len(t) - 1)
            found.append((t[i], rewards[i], float(i == 0), last, last))
    names = "obs/observation", "reward", "is_first", "is_last", "is_terminal"
    columns = {k: torch.tensor(v)[None] for k, v in zip(names, zip(*found))}
    return columns | {"obs/observation": columns["obs/observation"][..., None]}


def muzero_rows(state):
    rows = dict(state["replay"]["rows"])
    return rows | {"obs/observation": rows["obs"]}


def planet_rows(state):
    """Whole episodes, one after the other, as if from one environment. Ends are not stored: the model has none."""
    lengths, rows = state["replay"]["lengths"], state["replay"]["rows"]
    first = torch.zeros(1, sum(lengths), dtype=torch.bool)
    first[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    named = {"obs/observation": rows["obs"][None], "reward": rows["reward"][None], "is_first": first}
    return named | {"is_last": torch.roll(first, -1, 1), "is_terminal": torch.zeros_like(first)}


# tiny: flags of a run of the whole code path in a second: 192 agent steps in 2 environments, checkpoints at 32, 64 ...,
#   an update every 8 steps from step 16 on. update: the method that makes one update, with the learner as `self`.
# plant: a parameter whose NaN shows in the loss `term`. resize: a flag that would make it another network.
# usage: (argv, words of the one line) beside those that hold for all; None: the flag and its value.
# elsewhere: (preset, another environment, flags that must not follow it there).
# rows: the stored rows of a checkpoint, {name: (env, row, ...)}.
# Where a script differs: stub: faults that the stub always has; skip: cases that mean nothing to it, by a word of
# theirs; at: updates at which tests kill (twice), stop or poison a run; short: flags for episodes of one step; side: of
# small images; ends: whether ends are stored; blind: observations that it does not take.

SCRIPTS = {
    "diamond": dict(
        # one update of each of the three every 16 steps from step 32 on
        tiny="--preset cpu --no-cuda --no-pixels --num-envs 2 --total-timesteps 192 --learning-starts 32 "
        "--learning-starts-max 32 --collect-steps 16 --final-epochs 0 --first-denoiser-updates 1 "
        "--first-rew-end-updates 1 --first-actor-updates 1 --denoiser-updates 1 --rew-end-updates 1 "
        "--actor-updates 1 --denoiser-channels 8 --denoiser-depths 1 --denoiser-cond 16 --rew-end-channels 8 "
        "--rew-end-depths 1 --rew-end-cond 8 --rew-end-lstm 8 --actor-channels 4 --actor-lstm 8 --imag-envs 2 "
        "--imag-horizon 3 --start-pool 4 --batch-size 2 --rew-end-length 6 --denoising-steps 1 --image-size 16 "
        "--log-every 16 --save-every 32 --eval-episodes 2",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.rew_end_model.head[-1].weight,
        term="reward",
        usage=[
            ("--total-timesteps 20", None),
            ("--denoiser-cond 15", None),
            ("--imag-horizon 0", None),
            ("--actor-channels 8,8,8,8,8", None),
            ("--denoiser-channels 8,x", None),
            ("--denoiser-depths 1,1", ["--denoiser-depths", "--denoiser-channels"]),
            ("--rew-end-channels 40", None),
            ("--buffer-size 3", None),
            ("--init-from nothing.pt", None),
            ("--dataset nothing.npz", None),
            ("--env-id Pendulum-v1 --env-kwargs {} --pixels", ["Box(-2.0, 2.0, (1,), float32)", "dreamerv3.py"]),
            ("--env-id CartPole-v1 --env-kwargs {}", ["one uint8 image", "--pixels"]),
        ],
        resize="--actor-lstm 16",
        elsewhere=("cpu", "CartPole-v1", []),
        rows=diamond_rows,
        stub=dict(obs="image"),
        skip=["box"],
        blind=["dict", "discrete"],
        at=dict(kills=(9, 8), stop=7, poison=5),
        side=16,
    ),
    "dreamerv3": dict(
        tiny="--preset cpu --no-cuda --num-envs 2 --total-timesteps 192 --learning-starts 16 --deter 16 --hidden 8 "
        "--units 8 --cnn-depth 8 --classes 4 --stoch 4 --blocks 2 --mlp-layers 1 --bins 15 --batch-size 2 "
        "--batch-length 4 --imag-starts 4 --imag-horizon 3 --train-ratio 1 --log-every 16 --save-every 32 "
        "--eval-episodes 2",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.rew.out.bias,
        term="reward",
        usage=[
            ("--total-timesteps 20 --learning-starts 1000", ["--total-timesteps", "20"]),
            ("--deter 100 --blocks 8", None),
            ("--image-size 21", None),
            ("--imag-horizon 0", None),
            ("--unimix 2", None),
            ("--buffer-size 3", None),
        ],
        resize="--deter 32",
        elsewhere=("cpu_pixels", "CartPole-v1", ["env_kwargs"]),
        rows=lambda state: state["replay"]["rows"],
    ),
    "iris": dict(
        # epochs of 16 steps with 1, 2 and then 3 updates
        tiny="--preset cpu --no-cuda --num-envs 2 --total-timesteps 192 --steps-per-epoch 16 --tokenizer-start 0 "
        "--tokenizer-stop 100 --world-model-start 1 --actor-critic-start 2 --tokenizer-updates 1 "
        "--world-model-updates 1 --actor-critic-updates 1 --vocab-size 8 --code-dim 4 --tok-channels 8 "
        "--tok-latent 4 --tok-tiles 2 --revive-codes 3 --embed-dim 16 --num-layers 1 --num-heads 2 --imag-horizon 3 "
        "--burn-in 2 --lstm-size 8 --tokenizer-batch-size 4 --batch-size 2 --batch-length 4 --ac-batch-size 4 "
        "--image-size 16 --log-every 16 --save-every 32 --eval-episodes 2",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.actor_critic.critic_linear.bias,
        term="value",
        usage=[
            ("--total-timesteps 20 --tokenizer-start 9 --world-model-start 9 --actor-critic-start 9", None),
            ("--image-size 21", None),
            ("--num-heads 3", None),
            ("--tok-groups 3", None),
            ("--imag-horizon 1", None),
            ("--ac-channels 8,8,8,8,8", None),
            ("--buffer-size 3", None),
            ("--init-from nothing.pt", None),
            ("--env-id Pendulum-v1 --env-kwargs {} --pixels", ["Box(-2.0, 2.0, (1,), float32)", "dreamerv3.py"]),
            ("--env-id CartPole-v1 --env-kwargs {}", ["one uint8 image", "--pixels"]),
        ],
        resize="--lstm-size 16",
        elsewhere=("cpu", "MinAtar/Breakout-v1", []),
        rows=iris_rows,
        stub=dict(obs="image"),
        skip=["box"],
        blind=["dict", "discrete"],
        side=16,
        ends="always",
    ),
    "muzero": dict(
        # 28 updates for 192 steps
        tiny="--preset cpu --no-cuda --num-envs 2 --total-timesteps 192 --learning-starts 16 --hidden 8 --latent 4 "
        "--support 5 --unroll-steps 2 --td-steps 3 --num-simulations 3 --batch-size 4 --train-ratio 0.14 "
        "--channels 4 --consistency-scale 0 --blocks 1 --log-every 16 --save-every 32 --eval-episodes 2",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.reward[-1].bias,
        term="reward",
        usage=[
            ("--total-timesteps 20 --learning-starts 1000", ["--total-timesteps", "20"]),
            ("--gamma 2", None),
            ("--td-steps 0", None),
            ("--support 0", None),
            ("--q-norm bounds", None),
            ("--num-simulations 0", None),
            ("--env-id TicTacToe --env-kwargs {} --support 5 --td-steps 0", ["--gamma", "board"]),
            ("--network conv", ["--network conv"]),
            ("--buffer-size 3", None),
            ("--env-id Pendulum-v1 --env-kwargs {}", ["Box(-2.0, 2.0, (1,), float32)", "planet_cem.py"]),
        ],
        resize="--hidden 16",
        elsewhere=("atari100k", "CartPole-v1", ["env_kwargs", "max_episode_steps"]),
        rows=muzero_rows,
        skip=["box", "float_image"],
        side=16,
    ),
    "planet_cem": dict(
        # 6 updates after each episode
        tiny="--preset cpu --no-cuda --num-envs 2 --total-timesteps 192 --belief-size 8 --state-size 4 --hidden-size 8 "
        "--reward-units 8 --reward-layers 1 --cnn-depth 4 --batch-size 2 --batch-length 4 --plan-horizon 2 "
        "--plan-iterations 1 --plan-candidates 6 --plan-elites 2 --seed-episodes 1 --initial-updates 6 "
        "--updates-per-episode 6 --action-repeat 1 --log-every 16 --save-every 32 --eval-episodes 2",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.reward[-1].bias,
        term="reward",
        usage=[
            ("--total-timesteps 20 --seed-episodes 1 --max-episode-steps 20", ["--total-timesteps", "20"]),
            ("--image-size 21", ["--image-size", "16, 32, 64"]),
            ("--plan-elites 7", None),
            ("--plan-horizon 0", None),
            ("--bits 0", None),
            ("--buffer-size 3", None),
            ("--env-id CartPole-v1 --env-kwargs {}", ["Discrete(2)", "dreamerv3.py"]),
        ],
        resize="--belief-size 16",
        elsewhere=("cpu_pixels", "Pendulum-v1", ["env_kwargs"]),
        rows=planet_rows,
        stub=dict(action="box"),
        skip=["discrete"],
        at=dict(kills=(9, 14), stop=9, poison=9),
        side=16,
        ends=False,
    ),
    "tdmpc2": dict(
        # as many updates as steps from step 16 on
        tiny="--preset cpu --no-cuda --num-envs 2 --total-timesteps 192 --learning-starts 16 --enc-dim 8 --mlp-dim 8 "
        "--latent-dim 8 --batch-size 4 --horizon 2 --iterations 1 --num-samples 6 --num-elites 2 --num-pi-trajs 2 "
        "--action-repeat 1 --log-every 16 --save-every 32 --eval-episodes 2 --episodic",
        update=("Learner", "update"),
        plant=lambda learner: learner.model.reward[-1].bias,
        term="reward",
        usage=[
            ("--total-timesteps 20 --learning-starts 1000", ["--total-timesteps", "20"]),
            ("--latent-dim 12", None),
            ("--num-q 1", None),
            ("--num-samples 2", None),
            ("--num-elites 7", None),
            ("--pixels --image-size 21", ["--image-size", "21"]),
            ("--buffer-size 3", None),
            ("--init-from nothing.pt", None),
            ("--env-id CartPole-v1 --env-kwargs {}", ["Discrete(2)", "dreamerv3.py"]),
        ],
        resize="--latent-dim 16",
        elsewhere=("cpu_cartpole", "Pendulum-v1", ["action_repeat"]),
        rows=tdmpc2_rows,
        stub=dict(action="box"),
        skip=["float_image", "discrete"],
        at=dict(kills=(75, 70), stop=70, poison=70),
        short=["--horizon", 1],
    ),
}
# Wrong for every script: argv (a dict stands for a stub with these faults), words of the one line (None: flag, value).
USAGE = [
    ("--total-timesteps 0", None),
    ("--num-envs 0", None),
    ("--batch-size 0", None),
    ("--batch-length 0", None),
    ("--eval-episodes 0", None),
    ("--save-every 0", None),
    ("--log-every 0", None),
    ("--seed -1", None),
    ("--gamma 2", None),
    ("--env-id CartPoleX-v1", ["--env-id", "CartPole"]),
    ("--env-id no_such_module:Stub-v0", ["--env-id", "no_such_module"]),
    ("--env-id ALE/Nothing-v5", ["--env-id", "ALE/Nothing-v5"]),
    ("--env-kwargs [1]", ["--env-kwargs"]),
    ("--env-kwargs {nope", ["--env-kwargs"]),
    (f"--env-id {STUB} --env-kwargs {{\"nope\":1}}", ["nope"]),
    ([dict(action="multidiscrete")], ["--env-id", STUB, "MultiDiscrete([2 3])"]),
    ([dict(action="multibinary")], ["--env-id", STUB, "MultiBinary(3)"]),
    ([dict(action="integers")], ["--env-id", STUB, "int64"]),
    ([dict(action="dict")], ["--env-id", STUB, "Dict('a': Discrete(2))"]),
    ([dict(obs="text")], ["--env-id", STUB, "Text"]),
    ([dict(obs="float_image")], ["--env-id", STUB, "float32"]),
    ([dict(obs="nested")], ["--env-id", STUB, "inner"]),
    ([{}, "--pixels"], ["--env-id", STUB]),
]  # fmt: skip


class Script:
    """One script: run it in this process (`call`) or in its own (`start`)."""

    def __init__(self, name):
        self.name, self.path, self.mod = name, str(ROOT / f"{name}.py"), importlib.import_module(name)
        self.skip, self.short, self.at = [], [], dict(kills=(9, 8), stop=7, poison=6)
        self.side, self.ends, self.blind = 8, True, []
        own = dict(SCRIPTS[name])
        self.stubbed = own.pop("stub", {})
        self.__dict__.update(own)
        main = ast.parse(pathlib.Path(self.path).read_text()).body[-1]  # what runs where __name__ is "__main__"
        self.main = compile(ast.Module(main.body, []), self.path, "exec")
        self.owner, self.method = getattr(self.mod, self.update[0]), self.update[1]

    def stub(self, **faults):
        """Flags that choose the stub; episodes of 40 to 49 steps."""
        return [
            "--env-id",
            STUB,
            "--env-kwargs",
            json.dumps(dict(length=40, spread=10, reward="count") | self.stubbed | faults),
        ]

    def call(self, *argv):
        """Run the script here, in the current directory: exit code as the shell would see it, stdout, stderr."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        stub_env.StubEnv.made = 0
        stub_env.StubEnv.log.clear()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", [self.path, *map(str, argv)])
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    exec(self.main, dict(vars(self.mod)))
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
                err.write(f"{e.code}\n" if isinstance(e.code, str) else "")
        return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    def run(self, *argv, **faults):
        """A tiny training run on the stub; later flags win."""
        return self.call(*self.tiny.split(), *self.stub(**faults), *argv)

    def killed(self, *argv, at):
        """The same in a process of its own that is killed (SIGKILL) at the beginning of update `at`."""
        code = f"""
import os, signal, sys, {self.name} as mod
sys.argv.pop(0)
owner, calls, real = mod.{self.update[0]}, [], mod.{self.update[0]}.{self.method}
def update(self, *args):
    calls.append(0)
    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == {at} else real(self, *args)
owner.{self.method} = update
exec(compile(open({self.path!r}).read().split("if __name__ ==")[1].split(":", 1)[1].strip(), "main", "exec"), vars(mod))
"""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", code, self.path, *map(str, argv)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return Script(request.param)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty working directory, and a process that is left as it was found."""
    monkeypatch.chdir(tmp_path)
    handlers, environ = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}, dict(os.environ)
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)
    os.environ.clear()
    os.environ.update(environ)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def unbroken(script, tmp_path_factory):
    """The run directory of a finished, unbroken tiny run; never written to again."""
    folder = tmp_path_factory.mktemp("unbroken")
    with contextlib.chdir(folder):
        result = script.run()
        assert result.code == 0, result.err
        script.log = [*stub_env.StubEnv.log]
        return folder / only_run()


@pytest.fixture
def trained(unbroken):
    """A copy of it in the current directory."""
    return shutil.copytree(unbroken, "trained")


def only_run():
    (run,) = pathlib.Path("runs").iterdir()
    return run


def load(run, name="ckpt.pt"):
    return torch.load(os.path.join(run, name), weights_only=True)


def outcome(run):
    return json.loads(pathlib.Path(run, "result.json").read_text())


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


def finite(tree):
    return all(torch.isfinite(v.float()).all() for v in flat(tree).values() if torch.is_tensor(v))


def scalars(run):
    """{tag: [(step, value), ...]} as TensorBoard shows them, without those that contain time."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    timed = re.compile("SPS|per_s|seconds|time|hours")
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"] if not timed.search(t)}


def as_if_unbroken(run, unbroken):
    """The last checkpoint, the final metrics and all curves are those of the unbroken run."""
    mine, theirs = load(run), load(unbroken)
    for state in (mine, theirs):
        assert state["loop"].pop("seconds") > 0 and state.pop("args")
    same(mine, theirs)
    mine, theirs = (
        {k: v for k, v in outcome(r).items() if k not in ("minutes", "run", "peak_memory_gb")} for r in (run, unbroken)
    )
    assert mine == theirs
    same(scalars(run), scalars(unbroken))


def next_second(run):
    """TensorBoard sorts event files by name, which begins with the second they were made in."""
    made = max(int(p.name.split(".")[3]) for p in pathlib.Path(run).glob("events*"))
    while int(time.time()) <= made:
        time.sleep(0.02)


def one_line(script, result, words):
    """Exit code 2, one line that contains the words, no traceback."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code == 2 and len(lines) == 1, (result.code, result.out[-500:], result.err)
    assert all(word in lines[0] for word in words), f"{words} not in: {lines[0]}"


def before_update(script, monkeypatch, n, action):
    """Do `action(learner)` at the beginning of update n; gives a list that grows by one with each update."""
    real, calls = getattr(script.owner, script.method), []

    def update(self, *args):
        calls.append(0)
        if len(calls) == n:
            action(self)
        return real(self, *args)

    monkeypatch.setattr(script.owner, script.method, update)
    return calls


# ---- Wrong input: one line, exit code 2, nothing created -------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(USAGE)), ids=lambda i: str(USAGE[i][0]))
def test_wrong_input(script, case):
    argv = USAGE[case][0]
    flag = argv.split()[0].lstrip("-").replace("-", "_") if isinstance(argv, str) else "env_id"
    if not hasattr(script.mod.Args, flag) or any(word in str(argv) for word in script.skip if word != "discrete"):
        pytest.skip("means nothing to this script")
    check_usage(script, *USAGE[case])


def test_wrong_input_of_this_script(script):
    for argv, words in script.usage:
        check_usage(script, argv, words)


def check_usage(script, argv, words):
    argv = argv.split() if isinstance(argv, str) else argv
    flags = [w for a in argv for w in (script.stub(**a) if isinstance(a, dict) else [a])]
    result = script.call(*script.tiny.split(), *script.stub(), *flags)
    one_line(script, result, words or argv[:2])
    assert result.err.startswith(f"{script.name}.py: error: ") and os.listdir() == []


@pytest.mark.parametrize(
    "argv, word",
    [
        ("--lerning-rate 1e-3", "--learning-rate"),
        ("--learning-rate abc", "--learning-rate"),
        ("--total-timesteps 1e6", "--total-timesteps"),
        ("--preset tiny", "--preset"),
        ("stray", "stray"),
    ],
)
def test_what_the_parser_refuses(script, argv, word):
    result = script.run(*argv.split())
    assert result.code == 2 and word in result.out + result.err and "Traceback" not in result.err
    assert os.listdir() == []


def test_resume_of_what_is_no_run(script, trained):
    files = lambda: {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in pathlib.Path().rglob("*")}  # noqa: E731
    os.makedirs("empty")
    info = json.loads(pathlib.Path(trained, "args.json").read_text())
    other = "iris" if script.name != "iris" else "dreamerv3"
    for folder, change in (("other", dict(script=other)), ("young", {})):  # without a checkpoint yet
        os.makedirs(folder)
        pathlib.Path(folder, "args.json").write_text(json.dumps(info | change))
    before = files()
    for argv, words in (
        ("nowhere", ["--resume", "nowhere"]),
        ("empty", ["--resume", "empty"]),
        ("other", ["--resume", "other", f"{other}.py"]),
        ("young", ["young"]),
        ("trained --seed 2", ["--seed", "1", "2"]),
        ("trained --env-id CartPole-v1", ["--env-id", STUB, "CartPole-v1"]),
        (f"trained {script.resize}", script.resize.split()),
    ):
        one_line(script, script.call("--resume", *argv.split()), words)
        assert files() == before


@pytest.mark.parametrize("spelled", ["--env-id {}", "--env-id={}", "--env_id {}"])
def test_a_preset_belongs_to_its_environment(script, spelled, monkeypatch):
    preset, other, names = script.elsewhere
    seen, mod = [], script.mod
    monkeypatch.setattr(mod, "train", seen.append)
    for argv in ([], spelled.format(other).split(), [*spelled.format(other).split(), "--env-kwargs", "{}"]):
        script.call("--preset", preset, *argv)
    own, moved, same_flags = seen
    for name in names:
        assert getattr(own, name) == mod.PRESETS[preset][name]
        assert getattr(moved, name) == mod.Args.__dataclass_fields__[name].default
    assert moved == same_flags and moved.env_id == other
    assert moved.learning_rate == own.learning_rate  # what is not about the environment stays


# ---- Going on --------------------------------------------------------------------------------------------------------


def test_returns_and_lengths_are_those_of_whole_episodes(script, unbroken):
    """Although a checkpoint comes every 16 steps of each environment, and episodes have 40 and more."""
    ends = []
    found = {t: v for t, v in scalars(unbroken).items() if "episodic" in t and t.startswith("charts")}
    for instance in {i for i, *_ in script.log}:
        ts = [t for i, _, t, *_ in script.log if i == instance]
        if len(ts) - ts.count(0) == 96:  # an environment of training: all others are played for one episode
            lengths = [a for a, b in itertools.pairwise(ts) if b == 0 and a > 0]
            ends += zip((2 * n for n in itertools.accumulate(lengths)), lengths)
    assert len(ends) == 4 and len(set(ends)) > 2 and sorted(found["charts/episodic_length"]) == sorted(ends)
    assert sorted(found["charts/episodic_return"]) == sorted((step, n * (n + 1) / 2) for step, n in ends)


def test_killed_twice_and_resumed_is_as_if_unbroken(script, unbroken):
    script.killed(*script.tiny.split(), *script.stub(), at=script.at["kills"][0])
    run = only_run()
    first = load(run)["loop"]["global_step"]
    next_second(run)
    script.killed("--resume", run, at=script.at["kills"][1])
    assert 0 < first < load(run)["loop"]["global_step"] < 192
    next_second(run)
    result = script.call("--resume", run)
    assert result.code == 0, result.err
    as_if_unbroken(run, unbroken)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_stopped_and_resumed_is_as_if_unbroken(script, unbroken, monkeypatch, name, code):
    """The printed command goes on."""
    with monkeypatch.context() as patch:
        before_update(script, patch, script.at["stop"], lambda _: os.kill(os.getpid(), getattr(signal, name)))
        result = script.run()
    assert result.code == code and "Traceback" not in result.err, result.err
    run, last = only_run(), result.out.splitlines()[-1]
    assert 32 < load(run)["loop"]["global_step"] < 192 and not list(run.glob("*.tmp"))
    words = shlex.split(last.split("to go on: ")[1])
    assert words[:2] == ["python", script.path]
    next_second(run)
    result = script.call(*words[2:])
    assert result.code == 0, result.err
    as_if_unbroken(run, unbroken)


def test_stop_signals_outside_the_loop(script):
    """The random baseline and the final evaluation can take minutes: they are stopped too."""
    result = script.run(signal_at=2, only=3)  # environments 1 and 2 look at the spaces, are for training or come first
    instances = {i for i, *_ in stub_env.StubEnv.log}
    assert result.code == 143 and "Traceback" not in result.err and "global_step" not in result.out, result
    assert "to go on" not in result.out and not list(pathlib.Path("runs").glob("*/ckpt.pt"))  # there is nothing yet
    shutil.rmtree("runs", ignore_errors=True)
    result = script.run(signal_at=3, only=max(instances) + 2)  # the last environments are those of the evaluation
    assert result.code == 143 and "global_step=192" in result.out, result.out[-500:]
    assert load(only_run())["loop"]["global_step"] == 192 and not (only_run() / "result.json").exists()
    words = shlex.split(result.out.splitlines()[-1].split("to go on: ")[1])
    assert script.call(*words[2:]).code == 0 and (only_run() / "result.json").exists()


def test_the_previous_checkpoint_takes_over(script, trained, unbroken):
    os.remove(os.path.join(trained, "ckpt.pt"))
    assert load(trained, "ckpt.prev.pt")["loop"]["global_step"] == 160
    os.remove(os.path.join(trained, "result.json"))
    next_second(trained)
    result = script.call("--resume", trained)
    assert result.code == 0, result.err
    as_if_unbroken(trained, unbroken)


def test_minutes_count_all_processes_of_a_run(script, trained):
    state, before = load(trained), outcome(trained)["minutes"]
    state["loop"]["seconds"] += 6000
    torch.save(state, os.path.join(trained, "ckpt.pt"))
    assert script.call("--resume", trained, "--total-timesteps", 200).code == 0
    assert outcome(trained)["minutes"] > 100 + before / 2


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_full_disk(script, monkeypatch, unbroken):
    """Writing the third checkpoint fails in the middle: the second one is whole, and the run goes on from it."""
    real, calls = torch.save, []

    def save(state, f, *args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            with open(f, "wb") as half:
                half.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, f, *args, **kwargs)

    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(torch, "save", save)
        assert script.run().code not in (0, None)
    run = only_run()
    assert load(run)["loop"]["global_step"] == 64 and load(run, "ckpt.prev.pt")["loop"]["global_step"] == 32
    next_second(run)
    assert script.call("--resume", run).code == 0
    as_if_unbroken(run, unbroken)


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_bad_numbers_make_no_step(script, monkeypatch, what):
    kept = {}

    def poison(learner):
        weight = script.plant(learner)
        if what == "weight":
            weight.data.flatten()[0] = math.nan
        else:
            weight.register_hook(lambda g: g * math.inf)
        kept["params"], kept["before"] = learner.params, [p.detach().clone() for p in learner.params]

    calls = before_update(script, monkeypatch, script.at["poison"], poison)
    result = script.run()
    last = result.err.splitlines()[-1]
    assert result.code == 1 and len(calls) == script.at["poison"] and "Traceback" not in result.err
    assert "not finite" in last and "update" in last and (script.term if what == "weight" else "gradient norm") in last
    for p, before in zip(kept["params"], kept["before"]):
        assert torch.equal(p.nan_to_num(7.0), before.nan_to_num(7.0))
    assert finite(load(only_run())["learner"])


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_strangers_checkpoint_runs_no_code(script, trained):
    for state in (Malicious(), load(trained) | {"x": Malicious()}):
        torch.save(state, os.path.join(trained, "ckpt.pt"))
        one_line(script, script.call("--resume", trained), ["ckpt.pt"])
        with pytest.raises(SystemExit):
            script.mod.load(trained)
        assert not os.path.exists("owned")


# ---- What is stored and logged ---------------------------------------------------------------------------------------


def stored(script, run, env=0):
    """Rows of one environment, as numbers: observation, reward, is_first, is_last, is_terminal."""
    rows = script.rows(load(run))
    names = ("obs/observation", "reward", "is_first", "is_last", "is_terminal")
    obs, *rest = (rows[k][env].float() for k in names)
    return [(float(o[0]), *map(float, r)) for o, *r in zip(obs, *rest)]


@pytest.mark.parametrize("end", ["length", "truncate_at"])
def test_truncated_is_not_terminated(script, end):
    faults = dict(length=None, spread=0) | {end: 5}
    assert script.run("--total-timesteps", 64, **faults).code == 0
    rows, terminal = stored(script, only_run()), float(script.ends == "always" or end == "length" and script.ends)
    # Row t of an episode: observation t, the reward that came with it, and its flags.
    episode = [(t, t, t == 0, t == 5, terminal * (t == 5)) for t in range(6)]
    assert rows[:36] == (episode * 6)[:36]


def test_episodes_of_one_step(script):
    assert script.run("--total-timesteps", 64, *script.short, length=1, spread=0).code == 0
    assert stored(script, only_run())[:64] == [(0, 0, 1, 0, 0), (1, 1, 0, 1, bool(script.ends))] * 32
    assert {v for _, v in scalars(only_run())["charts/episodic_length"]} == {1}


@pytest.mark.parametrize("reward", [0, 1e6, -1e6])
def test_rewards_of_any_size(script, reward):
    result = script.run("--total-timesteps", 64, reward=reward, length=8, spread=0)
    assert result.code == 0, result.err
    assert outcome(only_run())["episodic_return"] == outcome(only_run())["random_return"] == 8 * reward
    assert finite(load(only_run())["learner"]) and 0.0 + reward in {r for _, r, *_ in stored(script, only_run())}


def test_nothing_is_printed_twice(script):
    """A run in which no episode ends says so; one that has logged a return does not repeat it."""
    result = script.run("--total-timesteps", 96, length=60, spread=0)
    lines = [line for line in result.out.splitlines() if "global_step=" in line]
    assert result.code == 0 and len(lines) == 6 and all("no episode" in line for line in lines)
    assert "charts/episodic_return" not in scalars(only_run()) and outcome(only_run())["train_return"] is None
    shutil.rmtree("runs")
    result = script.run("--total-timesteps", 96, length=20, spread=0)
    lines = [line for line in result.out.splitlines() if "global_step=" in line]
    said = [float(x) for line in lines for x in re.findall(r"episodic_return=([-\d.]+)", line)]
    assert said == [210, 210] and sum("no episode" in line for line in lines) == 4
    for out in (result.out.splitlines(),):
        assert len(out) == len(set(out))
    assert "+-" in result.out.splitlines()[-1]


def test_the_first_lines_say_what_the_agent_sees(script):
    action, word = ("discrete", "Discrete(3)") if "box" in script.skip else ("box", "Box(-1.0, 1.0, (2,)")
    obs, words = ("image", ["uint8"]) if "dict" in script.blind else ("pair", ["image", "vector"])
    result = script.run("--total-timesteps", 48, obs=obs, action=action)
    head = " ".join(result.out.splitlines()[:3])
    assert all(w in head for w in (*words, "16", word)), head


@pytest.mark.parametrize("obs, action", [("dict", "box"), ("grey2d", "discrete_start1"), ("channel_first", "box_inf"),
                                         ("rgba", "discrete"), ("discrete", "discrete")])  # fmt: skip
def test_spaces_that_are_handled(script, monkeypatch, obs, action):
    """To the end, and stopped and resumed in between: everything is in the checkpoint."""
    if any(action.startswith(word) for word in script.skip) or obs in script.blind:
        pytest.skip("means nothing to this script")
    flags, spaces = ["--total-timesteps", 64, "--image-size", script.side], dict(obs=obs, action=action, length=20)
    result = script.run(*flags, **spaces)
    assert result.code == 0 and np.isfinite(outcome(only_run())["episodic_return"]), result.err
    whole = shutil.move(only_run(), "whole")
    with monkeypatch.context() as patch:
        before_update(script, patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert script.run(*flags, **spaces).code == 143
    result = script.call("--resume", only_run())
    assert result.code == 0, result.err
    same(load(only_run())["learner"], load(whole)["learner"])
    same(load(only_run())["replay"], load(whole)["replay"])
