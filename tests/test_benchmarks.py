"""The tools in benchmarks/: statistics against numbers made by hand and against SciPy, runs that fail, hang, are killed
and go on, and input that is wrong. Trainings are played by a small script without torch."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import dreams  # noqa: E402
import gpu  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import speed  # noqa: E402

# A training as the runner sees it: a run directory, a lock, checkpoints, a result, and faults on demand.
TRAINING = """
import argparse, fcntl, json, os, signal, sys, time
p = argparse.ArgumentParser()
for flag, kind, default in [("--seed", int, 1), ("--env-id", str, "x"), ("--resume", str, None), ("--steps", int, 6),
                            ("--fault-seed", int, -1), ("--fault", str, ""), ("--pace", float, 0.03)]:
    p.add_argument(flag, type=kind, default=default)
a = p.parse_args()
stop = []
signal.signal(signal.SIGTERM, lambda n, f: None if a.fault == "deaf" else stop.append(n))
run = a.resume or f"runs/{a.env_id.replace('/', '-')}__toy__{a.seed}__{time.time_ns()}"
os.makedirs(run, exist_ok=True)
lock = open(run + "/lock", "a+")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
lock.truncate(0); lock.write(str(os.getpid())); lock.flush()
info = dict(script="toy", command=sys.argv, commit="abc", hardware="none", versions={}, args=dict(env_id=a.env_id,
            seed=a.seed, preset="full"))
json.dump(info, open(run + "/args.json", "w"))
step = int(open(run + "/ckpt.pt").read()) if os.path.exists(run + "/ckpt.pt") else 0
faulty = a.seed == a.fault_seed
print(f"threads {os.environ['OMP_NUM_THREADS']} gpu {os.environ.get('CUDA_VISIBLE_DEVICES')} from {step}", flush=True)
while step < a.steps:
    time.sleep(a.pace)
    step += 1
    print(f"global_step={step}, episodic_return={a.seed}.5, SPS=1", flush=True)
    if faulty and a.fault == "raise" and step == 3:
        raise ValueError("boom")
    while faulty and a.fault in ("hang", "deaf") and not stop:
        time.sleep(0.01)
    if stop:
        open(run + "/ckpt.pt", "w").write(str(step))
        sys.exit(143)
if faulty and a.fault == "half":
    open(run + "/result.json", "w").write('{"episodic_return": 1')
elif faulty and a.fault == "nan":
    open(run + "/result.json", "w").write('{"episodic_return": NaN, "global_step": 6}')
else:
    result = dict(episodic_return=a.seed + 0.5, random_return=0.0, global_step=step, updates=step, minutes=0.1)
    json.dump(result, open(run + "/result.json", "w"))
sys.exit(1 if faulty and a.fault == "missed" else 0)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TRAINING)
    return tmp_path


def call(tool, *argv, timeout=60, **options):
    words = [sys.executable, str(BENCHMARKS / f"{tool}.py"), *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)


def runner(*argv, command="python toy.py", folder="out", **options):
    return call("run", "--command", command, "--env-ids", "CartPole-v1", "--folder", folder, *argv, **options)


def results(folder="out"):
    return sorted(p.parent.name.split("__")[2] for p in Path(folder).glob("*/runs/*/result.json"))


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_iqm_by_hand_and_as_scipy():
    stats = pytest.importorskip("scipy.stats")
    assert report.iqm(range(8)) == 3.5 and report.iqm([0, 1, 2, 3, 4, 5, 6, 700]) == 3.5
    assert report.iqm([7.0]) == 7 and report.iqm([1, 2]) == 1.5 and report.iqm([1, 2, 30]) == 11
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        x = rng.normal(size=n)
        assert report.iqm(x) == pytest.approx(stats.trim_mean(x, 0.25))


def test_statistics_over_tasks_by_hand():
    tasks = [np.array([0.0, 2.0]), np.array([4.0]), np.array([1.0, 3.0, 5.0, 7.0])]  # means 1, 4, 4
    values = {name: function(tasks) for name, function in report.STATISTICS.items()}
    assert values["mean"] == 3 and values["median"] == 4
    assert values["IQM"] == pytest.approx((2 + 3 + 4 + 5 + 1) / 5)  # of 0 1 2 3 4 5 7, one is left out at either end
    assert report.STATISTICS["optimality gap"]([np.array([0, 0.5, 2])]) == 0.5


def test_interval_draws_within_tasks():
    # Two tasks far apart: without the strata the mean would move by tens, within them by less than one.
    tasks = [np.array([0.0, 1.0, 2.0]), np.array([100.0, 101.0, 102.0])]
    low, high = report.interval(tasks, report.STATISTICS["mean"])
    assert 50 <= low < 51 < high <= 52
    assert report.interval([[5.0], [7.0]], report.STATISTICS["mean"]) is None
    assert report.interval([[5.0, 5.0]], report.STATISTICS["mean"]) == (5.0, 5.0)


def test_interval_as_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(1).exponential(size=12)
    for name, function in (("mean", np.mean), ("IQM", report.iqm)):
        mine = report.interval([x], report.STATISTICS[name], draws=4000)
        other = stats.bootstrap((x,), function, n_resamples=4000, method="percentile", vectorized=False, rng=2)
        spread = other.confidence_interval.high - other.confidence_interval.low
        assert mine == pytest.approx(tuple(other.confidence_interval), abs=0.06 * spread), name


def test_published_scores_give_the_published_aggregates():
    """Mean and median of all agents, from the scores per game with our normalisation."""
    published = report.read_published()
    assert all(row["source"] for row in published)
    tasks = {row["task"] for row in published if row["task"].startswith("ALE/")}
    assert len(tasks) == 26
    normal = {}
    for task in tasks:
        scores = {row["agent"]: row["score"] for row in published if row["task"] == task}
        low, high = report.normaliser(task, scores)
        for agent, score in scores.items():
            normal.setdefault(agent, []).append(np.array([(score - low) / (high - low)]))
    assert set(map(float, np.ravel(normal["Random"]))) == {0.0} and set(map(float, np.ravel(normal["Human"]))) == {1.0}
    known = report.read_aggregates(tasks)
    assert len(known) == 12 and report.read_aggregates(tasks - {"ALE/Pong-v5"}) == {}
    for agent, values in known.items():
        for name in ("mean", "median"):
            assert report.STATISTICS[name](normal[agent]) == pytest.approx(values[name], abs=2e-3), (agent, name)


def test_curves_are_averaged_over_seeds():
    edges = np.array([-1, 10, 20, 30, 40.0])
    row = report.binned(np.array([5, 6, 25]), np.array([1.0, 3.0, 8.0]), edges)
    assert row[:3].tolist() == [2, 5, 8] and np.isnan(row[3])  # a mean, a line over the gap, and nothing after the last
    mean, around = report.band(np.array([[0.0, 1.0], [2.0, 1.0]]))
    assert mean.tolist() == [1, 1] and around[:, 0].tolist() == [0, 2] and around[:, 1].tolist() == [1, 1]
    assert report.band(np.zeros((1, 2)))[1] is None


def test_calibration_of_known_ensembles():
    rng = np.random.default_rng(0)
    M, N = 40_000, 39
    truth, dreamed = rng.normal(size=M), rng.normal(size=(N, M))
    shares = {level: hit.mean() for level, hit in dreams.covered(truth, dreamed, 0.0, rng).items()}
    assert shares == pytest.approx({0.5: 0.5, 0.8: 0.8, 0.95: 0.95}, abs=0.01)
    sure = dreams.covered(truth, 0.3 * dreamed, 0.0, rng)
    unsure = dreams.covered(truth, 3 * dreamed, 0.0, rng)
    assert sure[0.8].mean() < 0.45 and unsure[0.8].mean() > 0.95
    # Whole numbers with many ties, and dreams that all equal the truth: still the nominal share.
    dice, many = rng.integers(3, size=M), rng.integers(3, size=(N, M))
    assert dreams.covered(dice, many, 0.0, rng)[0.5].mean() == pytest.approx(0.5, abs=0.01)
    assert dreams.covered(np.zeros(M), np.zeros((N, M)), 0.0, rng)[0.8].mean() == pytest.approx(0.8, abs=0.01)
    assert set(dreams.covered(truth, dreamed[:9], 0.0, rng)) == {0.5, 0.8}  # 9 dreams cannot span 95 %


def test_reward_events():
    event = dreams.reward_event([0, 0, 0, 1, 5])
    assert event(np.array([0.2, 0.6, 4.0, -3.0])).tolist() == [False, True, True, False]
    assert dreams.reward_event([1.0, 1.0]) is None
    dense = dreams.reward_event(np.linspace(0, 1, 101))
    assert dense(np.array([0.4, 0.6])).tolist() == [False, True]
    assert dreams.precision_recall([1, 2], [4], [6]) == (0.75, 0.5) and dreams.precision_recall([], [0], [2]) == (
        None,
        0,
    )


def test_differences_between_losses():
    assert speed.difference({"a": 1.1, "b": 0.0}, {"a": 1.0, "b": 0.0}) == (pytest.approx(0.1), "a")
    error, name = speed.difference({"a": 100.0, "b": 0.5}, {"a": 100.0, "b": 0.0})
    assert (error, name) == (0.5, "b")  # a loss near 0 counts against 1 % of the largest
    rows = [dict(config="c", mode="compiled", precision="fp32", error=e, error_of="x") for e in (0.001, 0.2, np.nan)]
    assert len(gpu.wrong_rows(rows)) == 2  # NaN is wrong too
    assert gpu.wrong_rows([dict(config="c", mode="eager", precision="fp32", problem="out of memory")])


# ---- Runner ----------------------------------------------------------------------------------------------------------


def test_a_failing_run_is_named_and_leaves_the_others_alone(home):
    done = runner("--num-seeds", 3, "--workers", 2, command="python toy.py --fault raise --fault-seed 2")
    assert done.returncode == 1
    assert results() == ["1", "3"] or len(list(home.glob("out/*/runs/*/result.json"))) == 2
    tail = done.stdout.split("did not finish:")[1]
    assert "1 of 3 runs" in done.stdout and "__2: failed, exit code 1: ValueError: boom" in tail
    assert "__1:" not in tail and "__3:" not in tail
    logs = sorted(home.glob("out/*/log.txt"))
    assert len(logs) == 3 and all("threads" in p.read_text() for p in logs)
    # The same command again: only the failed one is tried again, and fails again.
    before = {p: p.stat().st_mtime_ns for p in home.glob("out/*/runs/*/result.json")}
    again = runner("--num-seeds", 3, "--workers", 2, command="python toy.py --fault raise --fault-seed 2")
    assert again.returncode == 1 and "2 of them have results" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in home.glob("out/*/runs/*/result.json")}
    attempts = [len(json.loads(p.read_text())["attempts"]) for p in sorted(home.glob("out/*/job.json"))]
    assert attempts == [1, 2, 1]


@pytest.mark.parametrize("fault, reason", [("half", "no whole result.json"), ("nan", "no whole result.json"),
                                           ("missed", "exit code 1 after its result")])  # fmt: skip
def test_half_results_are_not_counted(home, fault, reason):
    done = runner(command=f"python toy.py --fault {fault} --fault-seed 1")
    assert done.returncode == 1 and reason in done.stdout
    if fault != "missed":  # what is left of the run is no result for the report either
        found = call("report", "out", "--name", "x", "--results", "res", "--readme", ROOT / "README.md")
        assert found.returncode == 2 and "no finished run" in found.stderr and not Path("res").exists()


@pytest.mark.parametrize("fault", ["hang", "deaf"])
def test_a_run_that_hangs_is_stopped(home, fault):
    start = time.time()
    done = runner("--num-seeds", 2, "--workers", 2, "--timeout", 0.02, "--grace", 0.5,
                  command=f"python toy.py --fault {fault} --fault-seed 2 --steps 2")  # fmt: skip
    assert done.returncode == 1 and time.time() - start < 20
    assert "timeout: not finished after 0.02 minutes" in done.stdout and "1 of 2 runs did not finish" in done.stdout


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_kill_and_go_on(home):
    """SIGKILL of the runner: the trainings save and leave, and the same command finishes without repeating."""
    words = [sys.executable, str(BENCHMARKS / "run.py"), "--command", "python toy.py --pace 0.05 --steps 15",
             "--env-ids", "CartPole-v1", "--folder", "out", "--num-seeds", "4", "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.time() + 30
    while len(list(home.glob("out/*/runs/*/result.json"))) < 2 or len(list(home.glob("out/*/runs/*/lock"))) < 4:
        assert time.time() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    locks = {int(p.read_text()) for p in home.glob("out/*/runs/*/lock")}
    while any(map(alive, locks)):
        assert time.time() < deadline, "a training outlived the runner"
        time.sleep(0.02)
    finished = {p: p.stat().st_mtime_ns for p in home.glob("out/*/runs/*/result.json")}
    assert len(finished) < 4 and list(home.glob("out/*/runs/*/ckpt.pt"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    now = {p: p.stat().st_mtime_ns for p in home.glob("out/*/runs/*/result.json")}
    assert len(now) == 4 and finished.items() <= now.items()
    assert len(list(home.glob("out/*/runs/*"))) == 4  # nothing began twice
    logs = "".join(p.read_text() for p in home.glob("out/*/log.txt"))
    assert logs.count("--resume") == 4 - len(finished) and logs.count("from 0") == 4


def test_a_stop_signal_reaches_the_runs(home):
    words = [sys.executable, str(BENCHMARKS / "run.py"), "--command", "python toy.py --steps 1000", "--folder", "out"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    while not list(home.glob("out/*/runs/*/lock")):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped by signal 15" in out
    assert list(home.glob("out/*/runs/*/ckpt.pt"))


def test_workers_get_gpus_in_turn_and_threads(home):
    done = runner("--num-seeds", 4, "--workers", 2, "--gpus", 5, 7, "--threads", 3)
    assert done.returncode == 0
    seen = [p.read_text().split(" from")[0].splitlines()[-1] for p in sorted(home.glob("out/*/log.txt"))]
    assert set(seen) == {"threads 3 gpu 5", "threads 3 gpu 7"}


def test_a_run_held_by_another_process_is_waited_for(home):
    """A training that is still alive is not started a second time; when it has finished, its result counts."""
    job = run.Job(home / "out", ["python", "toy.py"], "toy.py", "CartPole-v1", 1)
    job.folder.mkdir(parents=True)
    words = [sys.executable, str(home / "toy.py"), "--env-id", "CartPole-v1", "--steps", "40"]
    other = subprocess.Popen(words, cwd=job.folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list(home.glob("out/*/runs/*/args.json")):
        time.sleep(0.02)
    time.sleep(0.1)
    done = runner()
    assert other.wait(timeout=10) == 0 and done.returncode == 0, done.stdout
    assert len(list(home.glob("out/*/runs/*"))) == 1 and not job.log.exists()


def test_a_training_holds_its_job(home):
    """Also one that knows nothing of locks: it inherits the job's, so a second start of the runner leaves it alone."""
    job = run.Job(home / "out", ["python", "toy.py", "--steps", "1000"], "toy.py", "CartPole-v1", 1)
    job.folder.mkdir(parents=True)
    assert job.holder() is None
    child = run.Child(job, None, 1, 1)
    while not (found := list(home.glob("out/*/runs/*/lock"))):
        time.sleep(0.02)
    found[0].unlink()
    assert job.holder() == str(child.process.pid)
    child.kill()
    child.process.wait(timeout=10)
    assert job.holder() is None


def test_progress_is_read_from_the_log(home):
    job = run.Job(home / "out", ["python", "toy.py"], "toy.py", "CartPole-v1", 1)
    job.folder.mkdir(parents=True)
    for said, shown in (("-9.5 (3 episodes)", "-9.5"), ("no episode ended since the last line", ""), ("12", "12")):
        job.log.write_text(f"x\nglobal_step=1200, episodic_return={said}, updates=3, SPS=1\n")
        assert job.progress() == ("1,200", shown)


def test_one_runner_per_folder(home):
    words = [sys.executable, str(BENCHMARKS / "run.py"), "--command", "python toy.py --steps 60", "--folder", "out"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not (home / "out" / "lock").exists() or not (home / "out" / "lock").read_text():
        time.sleep(0.02)
    second = subprocess.run(words, capture_output=True, text=True, timeout=30)
    process.terminate()
    process.wait(timeout=30)
    assert second.returncode == 2 and f"in use by process {process.pid}" in second.stderr


def test_dry_run_and_suites(home):
    done = call("run", "--suite", "cpu", "--dry-run", "--num-seeds", 2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("start")]
    assert any("dreamerv3.py --preset cpu --env-id CartPole-v1 --seed 2" in line for line in lines)
    assert sorted(os.listdir(home)) == ["toy.py"]  # nothing was created
    for name, suite in run.read_suites().items():
        assert suite["about"] and suite["runs"], name
        for block in suite["runs"]:
            _, script = run.split_command(block["command"], name)
            for env_id in block.get("env_ids", []) if run.find_script(script) else []:
                if not env_id.startswith("dm_control/"):
                    run.check_env_id(env_id, script)


WRONG = [
    (["--suite", "nope"], "--suite nope"),
    (["--suite", "cpu", "--scripts", "nope"], "--scripts nope"),
    (["--suite", "cpu", "--env-ids", "Nope-v1"], "--env-ids Nope-v1"),
    (["--command", "python nope.py"], "nope.py"),
    (["--command", "toy.py"], "--command must look like"),
    (["--command", "python toy.py --seed 3"], "--num-seeds"),
    (["--command", "python toy.py --seed=3"], "--num-seeds"),
    (["--command", "python toy.py", "--env-ids", "CartPol-v1"], "--env-ids CartPol-v1"),
    (["--command", "python toy.py", "--env-ids", "dm_control/walker-wlk-v0"], "--env-ids dm_control/walker-wlk-v0"),
    (["--command", "python toy.py", "--num-seeds", "0"], "--num-seeds"),
    (["--command", "python toy.py", "--timeout", "nan"], "--timeout"),
    (["--command", "python toy.py", "--folder", "toy.py/x"], "--folder"),
    (["--command", "python toy.py", "--suite", "cpu"], "--suite and --command"),
    (["--command", "python toy.py 'x"], "--command"),
    (["--command", "python toy.py", "--wrkers", "2"], "--wrkers"),
    ([], "--suite and --command"),
]


@pytest.mark.parametrize("argv, named", WRONG)
def test_wrong_input_of_the_runner(home, argv, named):
    if "dm_control" in named:
        pytest.importorskip("dm_control")
    done = call("run", *argv)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert sorted(os.listdir(home)) == ["toy.py"]


def test_other_runs_in_the_folder_are_refused(home):
    assert runner().returncode == 0
    path = next(home.glob("out/*/job.json"))
    path.write_text(path.read_text().replace("toy.py", "other.py"))
    done = runner()
    assert done.returncode == 2 and "--folder" in done.stderr


@pytest.mark.parametrize("where", ["local", "debug"])
def test_cluster(home, where):
    pytest.importorskip("submitit")
    done = runner("--num-seeds", 2, "--workers", 2, "--cluster", where, "--poll", 0.1,
                  command="python toy.py --fault raise --fault-seed 2")  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(list(home.glob("out/*/runs/*/result.json"))) == 1
    assert "__2: failed, exit code 1: ValueError: boom" in done.stdout.split("did not finish:")[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_preemption_on_a_cluster(home):
    """The cluster's warning makes the training save, and the queued job goes on from there."""
    submitit = pytest.importorskip("submitit")
    job = run.Job(home / "out", ["python", "toy.py", "--steps", "60"], "toy.py", "CartPole-v1", 1)
    job.folder.mkdir(parents=True)
    common.write_json(job.info(), job.folder / "job.json")
    words = [sys.executable, str(BENCHMARKS / "run.py"), "--job", str(job.folder)]
    executor = submitit.AutoExecutor(folder=home / "submitit", cluster="local")
    executor.update_parameters(timeout_min=5)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *([path] if path else [])])  # to unpickle `run`
    try:
        ticket = executor.submit(run.requeueing(words))
        deadline = time.time() + 30
        while not (job.runs() and job.log.exists() and "global_step=5," in job.log.read_text()):
            assert time.time() < deadline
            time.sleep(0.05)
        (task,) = Path(f"/proc/{ticket.job_id}/task/{ticket.job_id}/children").read_text().split()
        os.kill(int(task), signal.SIGUSR2)  # as the cluster does
        while not ticket.done():
            assert time.time() < deadline
            time.sleep(0.05)
        assert ticket.result() == 0
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {"PYTHONPATH": path} if path else {}
    assert job.result()["global_step"] == 60 and len(job.runs()) == 1
    log = job.log.read_text()
    assert "--resume" in log and log.count("global_step=5,") == 1


# ---- Report ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(home):
    """Three finished runs with curves, one of them resumed, and one that did not finish."""
    from torch.utils.tensorboard import SummaryWriter

    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0), (4, None)):
        path = home / "in" / f"job{seed}" / "runs" / f"CartPole-v1__toy__{seed}__0"
        path.mkdir(parents=True)
        words = ["toy.py", "--preset", "cpu", "--seed", str(seed)]
        info = dict(script="toy", command=words, commit="abc", hardware="none", versions={})
        if seed == 2:
            info["command"] = ["toy.py", "--resume", "runs/x"]
        info["args"] = dict(env_id="CartPole-v1", seed=seed, preset="cpu")
        (path / "args.json").write_text(json.dumps(info))
        writer = SummaryWriter(str(path))
        for step in range(0, 100, 10):
            writer.add_scalar("charts/episodic_return", seed * step, step)
            writer.add_scalar("charts/updates_per_s", 2.0, step)
        for tag in ("open_loop_mse", "copy_last_mse", "mean_frame_mse"):
            writer.add_scalar(f"eval/{tag}", 0.1 * seed, 50)
        writer.close()
        with SummaryWriter(str(path), filename_suffix=".dreams") as dreamed:  # of a tool beside the training
            dreamed.add_scalar("eval/one_step_mse", 0.1, 50, walltime=time.time() + 9_000)
        if score:
            result = dict(episodic_return=score, random_return=1.0, global_step=100, updates=50, minutes=2.0, run="x")
            (path / "result.json").write_text(json.dumps(result))
        job = dict(command=["python", *words], script="toy.py", peak_rss_gb=0.5, attempts=[])
        (path.parent.parent / "job.json").write_text(json.dumps(job))
    (home / "R.md").write_text("# a\n<!-- results -->\nold\n<!-- end of results -->\nb\n")
    return home


def test_report(trained):
    flags = ["--name", "rep", "--results", "res", "--readme", "R.md"]
    done = call("report", "in", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir("res")) == ["rep.csv", "rep.json", "rep.md", "rep.png"]
    rows = list(csv.DictReader(open("res/rep.csv")))
    assert [float(r["episodic_return"]) for r in rows] == [10, 20, 60]
    assert {r["agent"] for r in rows} == {"toy --preset cpu"}  # also of the resumed one
    assert all(float(r["hours"]) < 1 for r in rows)
    assert {r["updates_per_s"] for r in rows} == {"2.0"} and {r["peak_memory_gb"] for r in rows} == {"0.5"}
    text = Path("res/rep.md").read_text()
    low, high = report.interval([[10.0, 20.0, 60.0]], report.STATISTICS["mean"])
    assert (
        f"| CartPole-v1 | **toy --preset cpu** | 3 | 30.0 | {low:.1f} to {high:.1f} | 30.0 | 20.0 | - | 1.00 |" in text
    )
    assert "CartPole-v1__toy__4__0`: no result.json: not finished" in text
    assert Path("res/rep.png").read_bytes()[:4] == b"\x89PNG" and Path("res/rep.png").stat().st_size > 10_000
    readme = Path("R.md").read_text()
    assert readme.startswith("# a\n<!-- results -->\n| task |") and readme.endswith("<!-- end of results -->\nb\n")
    line = next(line for line in readme.splitlines() if "CartPole" in line)
    assert "| 10.0, 20.0, 60.0 |" in line and "`python toy.py --preset cpu`" in line and "old" not in readme
    # Again without folders: the table alone, and the same.
    assert call("report", *flags[2:]).returncode == 0 and Path("R.md").read_text() == readme


@pytest.mark.parametrize("argv, named", [
    (["empty", "--name", "x"], "no run directory below empty"), (["nowhere", "--name", "x"], "no folder nowhere"),
    (["empty"], "--name"), (["--name", "x"], "--name"), (["empty", "--name", "a/b"], "--name"),
    (["empty", "--name", "x", "--readme", "nowhere.md"], "--readme"), (["empty", "--name", "x", "--nme", "y"], "--nme"),
    (["empty", "--name", "x", "--readme", "toy.py"], "README.md must have"),
])  # fmt: skip
def test_wrong_input_of_the_report(home, argv, named):
    (home / "empty").mkdir()
    shutil.copy(ROOT / "README.md", "R.md")
    done = call("report", *argv, "--results", "res", *([] if "--readme" in argv else ["--readme", "R.md"]))
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path("res").exists() and Path("R.md").read_text() == (ROOT / "README.md").read_text()


def test_readme_table_is_what_the_report_writes():
    text = (ROOT / "README.md").read_text()
    assert common.swap_block(text, "results", report.readme_table(common.RESULTS)) == text


# ---- Dreams ----------------------------------------------------------------------------------------------------------

# A world that a dream can know exactly: a counter with a reward at every third step and an end after nine.
WORLD = """
from dataclasses import dataclass
import gymnasium as gym
import numpy as np

@dataclass
class Args:
    env_id: str = "World-v0"
    seed: int = 1
    other: int = 0

SPACE, ACTIONS = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Discrete(2)

def picture(t):
    return np.full((4, 4, 3), 20 * t, np.uint8)

class World(gym.Env):
    observation_space, action_space = SPACE, ACTIONS
    def reset(self, *, seed=None, options=None):
        self.t = 0
        return {"observation": picture(0)}, {}
    def step(self, action):
        self.t += 1
        return {"observation": picture(self.t)}, float(self.t % 3 == 0), self.t == 9, False, {}

def make_env(args, index, key=0):
    return World

class DreamEnv(gym.Env):
    observation_space, action_space = SPACE, ACTIONS
    def __init__(self, path, device="cpu"):
        self.blur = "blurred" in path
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        given = options["observations"]["observation"]
        assert len(given) == len(options["actions"]) and (given[0] == picture(0)).all()
        self.t = int(given[-1].flat[0]) // 20
        return given[-1], {}
    def step(self, action):
        assert self.t < 9, "a step after the end"
        self.t += 1
        noise = self.np_random.integers(-60, 61, (4, 4, 3)) if self.blur else 0
        image = np.clip(picture(self.t).astype(int) + noise, 0, 255).astype(np.uint8)
        return image, float(self.t % 3 == 0) * (not self.blur), self.t == 9, False, {}
"""


LATENT_WORLD = """
class Latent(DreamEnv):
    observation_space = gym.spaces.Box(0, 1, (7,), np.float32)
    def step(self, action):
        return np.zeros(7, np.float32), *super().step(action)[1:]

DreamEnv = Latent
"""


@pytest.fixture
def world(home, monkeypatch):
    (home / "world_toy.py").write_text(WORLD)
    monkeypatch.setattr(common, "ROOT", home)
    for name in ("exact", "blurred"):
        (home / name).mkdir()
        info = dict(script="world_toy", args=dict(env_id="World-v0", seed=1, unknown=3))
        (home / name / "args.json").write_text(json.dumps(info))
        (home / name / "ckpt.pt").write_text("")
    yield home
    sys.modules.pop("world_toy", None)
    sys.path.remove(str(home))


def dream_about(*runs, **more):
    argv = [*runs, "--name", "d", "--results", "res", "--policy", "random", "--windows", "6", "--context", "1"]
    argv += [x for k, v in more.items() for x in (f"--{k}", str(v))]
    dreams.main(argv)
    rows = list(csv.DictReader(open("res/d.csv")))
    return {name: [r for r in rows if r["run"] == name] for name in runs}


def test_dreams_of_a_known_world(world):
    found = dream_about("exact", "blurred", horizon=9)
    exact, blurred = found["exact"], found["blurred"]
    assert sorted(os.listdir("res")) == ["d.csv", "d.md", "d.png"]
    assert {float(r["psnr"]) for r in exact} == {100.0}  # the floor of the error
    assert all(float(r["psnr_copy"]) < 25 for r in exact)
    # copying the last frame is 20 h / 255 off after h steps
    assert [float(r["psnr_copy"]) for r in exact] == pytest.approx(
        [-20 * np.log10(20 * h / 255) for h in range(1, len(exact) + 1)], abs=0.01
    )
    last = exact[-1]
    assert (float(last["reward_precision"]), float(last["reward_recall"])) == (1, 1) and int(last["reward_events"]) > 6
    assert float(blurred[-1]["reward_recall"]) == 0 and blurred[-1]["reward_precision"] == ""
    ended = [r for r in exact if int(r["ends"])]
    assert ended and all((float(r["end_precision"]), float(r["end_recall"])) == (1, 1) for r in ended)
    assert not any(r["end_precision"] or r["end_recall"] for r in exact if not int(r["ends"]))
    assert all(float(b["psnr_of_mean"]) > float(b["psnr"]) for b in blurred)
    text = Path("res/d.md").read_text()
    assert "## Calibration" in text and "coverage 95%" in text and "world_toy, World-v0" in text


def test_dreams_of_latent_states(world):
    """Where dreams are not of the environment's observations, rewards and ends are measured as ever, frames are not."""
    exact = dream_about("exact", horizon=9)["exact"]
    with open(world / "world_toy.py", "a") as f:
        f.write(LATENT_WORLD)
    sys.modules.pop("world_toy")
    found = dream_about("exact", horizon=9)["exact"]
    assert all(r["psnr"] == r["psnr_copy"] == r["coverage_50%"] == "" for r in found) and len(found) == len(exact)
    for name in ("reward_mae", "reward_precision", "reward_recall", "end_precision", "end_recall", "ends"):
        assert [r[name] for r in found] == [r[name] for r in exact]
    assert "## Reward" in Path("res/d.md").read_text()


def test_wrong_input_of_the_dreams(world, capsys):
    for argv, named in (
        (["nowhere"], "nowhere is not a run directory"),
        (["exact", "--dreams", "2"], "--dreams"),
        (["exact", "--policy", "agent"], "--policy agent"),
        (["exact", "--horizon", "0"], "--horizon"),
    ):
        with pytest.raises(SystemExit) as stopped:
            policy = [] if "--policy" in argv else ["--policy", "random"]
            dreams.main([*argv, *policy, "--name", "d", "--results", "res"])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and named in err and len(err.splitlines()) == 1, err
    assert not Path("res").exists()


@pytest.fixture
def counter(home, monkeypatch):
    """A run of tests/fake_world.py, whose dream is exactly its environment."""
    monkeypatch.setattr(common, "ROOT", ROOT / "tests")

    def make(name="a", **env_kwargs):
        os.makedirs(name)
        info = dict(script="fake_world", args=dict(env_kwargs=json.dumps(env_kwargs)))
        Path(name, "args.json").write_text(json.dumps(info))
        Path(name, "ckpt.pt").write_text("")
        return name

    return make


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_dreams_of_a_perfect_agent(counter, monkeypatch, obs):
    import fake_world

    sizes, imagine = set(), fake_world.Agent.imagine
    monkeypatch.setattr(fake_world.Agent, "imagine", lambda self, s, a: (sizes.add(len(s[0])), imagine(self, s, a))[1])
    name = counter(obs=obs, length=23)
    flags = "--windows 30 --horizon 12 --context 4".split()
    dreams.main([name, "--name", "d", "--results", "res", *flags])
    assert sizes == {39, 1}  # all dreams of a window at once; one row ahead
    rows = list(csv.DictReader(open("res/d.csv")))
    for row in rows:
        assert all(float(row[k]) == 0 for k in ("open_loop_mse", "one_step_mse", "posterior_mse", "reward_mae"))
        assert float(row["psnr"]) == 100 and float(row["mean_frame_mse"]) > 0
    far, near = ([float(r[k]) for r in rows] for k in ("copy_last_mse", "copy_previous_mse"))
    assert far == sorted(far) and far[0] > 0 and len(set(near)) == 1
    counted = [r for r in rows if r["coverage_50%"]]  # in an image, the first steps move by less than the tolerance
    shares = [np.mean([float(r[f"coverage_{level}%"]) for r in counted]) for level in (50, 80, 95)]
    assert shares == pytest.approx([0.5, 0.8, 0.95], abs=0.07)
    ends = [(float(r["end_precision"]), float(r["end_recall"])) for r in rows if int(r["ends"])]
    assert ends and set(ends) == {(1.0, 1.0)}
    assert sorted(os.listdir("res")) == ["d-a.gif", "d.csv", "d.md", "d.png"]
    dreams.main([name, *flags])  # without a name: the same, beside the run
    assert {"dreams-a.gif", "dreams.csv", "dreams.md", "dreams.png"} < set(os.listdir(name))
    assert Path(name, "dreams.csv").read_text() == Path("res/d.csv").read_text()
    text = Path("res/d.md").read_text()
    assert "![a](d-a.gif)" in text and "| open loop | copy last | one step | copy previous | posterior |" in text
    from PIL import Image

    with Image.open("res/d-a.gif") as gif:
        assert gif.n_frames == 4 + 12
        for t, color in ((0, (0, 180, 0)), (3, (0, 180, 0)), (4, (220, 0, 0)), (15, (220, 0, 0))):
            gif.seek(t)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            height = (frame.shape[0] - 18) // 3  # three pictures above a line of text
            truth, dream, gap = (frame[i * height + 3 : (i + 1) * height - 3] for i in range(3))
            assert abs(frame[height + 1, 1] - color).max() < 8 and frame[1, 1].max() < 8
            assert (truth[:, 3:100] == dream[:, 3:100]).all()
            assert obs == "vector" or (abs(gap[:, 3:100] - 128) < 8).all()


def test_errors_of_known_size(counter, monkeypatch):
    """Images that are 10 levels too bright when dreamed and 5 when seen, and numbers that are e times too large."""
    import fake_world

    def brighter(obs, levels):
        return {"image": obs["image"] + np.uint8(levels), "vector": np.expm1(np.log1p(obs["vector"]) + levels / 100)}

    real = fake_world.Agent.observe, fake_world.Agent.imagine

    def observe(self, obs, actions):
        state, seen = real[0](self, obs, actions)
        return state, brighter(seen, 5)

    def imagine(self, state, actions):
        *rest, obs = real[1](self, state, actions)
        return *rest, brighter(obs, 10)

    monkeypatch.setattr(fake_world.Agent, "observe", observe)
    monkeypatch.setattr(fake_world.Agent, "imagine", imagine)
    agent = fake_world.load(counter(obs="dict", length=60))
    env, rng = fake_world.make_env(agent.args, seed=3), np.random.default_rng(0)
    found = dreams.windows(env, agent.act, 5, 6, 20, rng)
    errors = dreams.open_loop_errors(agent, found, context=6, horizon=20, dreams=2)
    expected = lambda levels: ((levels / 255) ** 2 + (levels / 100) ** 2) / 2  # noqa: E731
    assert errors["open_loop_mse"] == pytest.approx(expected(10), rel=1e-3)
    assert errors["one_step_mse"] == pytest.approx(expected(10), rel=1e-3)
    assert errors["posterior_mse"] == pytest.approx(expected(5), rel=1e-3)
    # The trivial predictors, once more by hand.
    copies, all_rows = [], []
    for episode, start in found:
        assert 6 <= start <= 24
        x = [np.concatenate([o["image"][0, 0] / 255, np.log1p(o["vector"])]) for o in episode["obs"]]
        copies += [np.mean((x[t] - x[start - 1]) ** 2) for t in range(start, start + 20)]
        all_rows += x[start - 6 : start + 20]
    assert errors["copy_last_mse"] == pytest.approx(np.mean(copies), rel=1e-4)
    assert errors["mean_frame_mse"] == pytest.approx(np.mean((all_rows - np.mean(all_rows, 0)) ** 2), rel=1e-4)
    assert set(errors) == set(dreams.ERRORS)


def test_watching_a_training(counter, monkeypatch, capsys):
    import fake_world
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name, load = counter(obs="image", length=30), fake_world.load

    def loaded(run, device):
        step = int(Path(run, "ckpt.pt").read_text())  # fails while the file is not whole
        monkeypatch.setattr(fake_world.Agent, "global_step", step)
        return load(run, device)

    contents = ["", None, "", "100", "100", "", "200"]  # of ckpt.pt, one more each time the watcher waits

    def sleep(seconds):
        text = contents.pop(0) if contents else None
        if text is not None:
            Path("new").write_text(text)
            os.replace("new", f"{name}/ckpt.pt")
        if not contents:
            Path(name, "result.json").write_text("{}")

    monkeypatch.setattr(fake_world, "load", loaded)
    monkeypatch.setattr(dreams.time, "sleep", sleep)
    assert not dreams.main([name, "--watch", "--context", "4"])
    output = capsys.readouterr()
    assert output.out.count("global_step=") == 2 and not output.err
    assert sorted(os.listdir(f"{name}/videos")) == ["open_loop-100.gif", "open_loop-200.gif"]
    (events,) = Path(name).glob("events.*.dreams")
    found = EventAccumulator(str(events)).Reload()
    for tag in dreams.ERRORS:
        assert [e.step for e in found.Scalars(f"eval/{tag}")] == [100, 200]
    assert [e.value for e in found.Scalars("eval/open_loop_mse")] == [0, 0]
    images = found.Images("eval/open_loop")
    assert [e.step for e in images] == [100, 200] and images[0].encoded_image_string.startswith(b"GIF8")
    # A checkpoint that stays broken is told in the end; Ctrl-C is a way to end it.
    os.remove(f"{name}/result.json")
    monkeypatch.setattr(dreams.time, "sleep", lambda seconds: None)
    Path(name, "ckpt.pt").write_text("")
    with pytest.raises(ValueError):
        dreams.main([name, "--watch"])

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(dreams.time, "sleep", interrupted)
    os.remove(f"{name}/ckpt.pt")
    assert not dreams.main([name, "--watch"])


def test_wrong_input_of_watching(world, capsys):
    for argv, named in (
        (["exact", "--watch"], "world_toy.py draws its own"),
        (["exact", "blurred", "--watch"], "one run"),
        (["exact", "--name", ""], "--name"),
        (["exact", "--name", "a/b"], "--name"),
    ):
        with pytest.raises(SystemExit) as stopped:
            dreams.main([*argv, "--results", "res"])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and named in err and len(err.splitlines()) == 1, err
    assert sorted(os.listdir("exact")) == ["args.json", "ckpt.pt"] and not Path("res").exists()


# ---- The model-free baseline -----------------------------------------------------------------------------------------


def test_baseline_plays_the_episodes_of_the_scripts():
    import dreamerv3

    args = dreamerv3.Args(seed=3)
    assert common.seeds(3, 1, 7, 0, n=1) == [dreamerv3.episode_seed(args, 1, 7)]


def test_baseline_stops_goes_on_and_is_reported(home):
    pytest.importorskip("stable_baselines3")
    words = ["--preset", "cpu", "--algo", "dqn", "--no-cuda", "--total-timesteps", 1500]
    argv = [sys.executable, str(BENCHMARKS / "sb3.py"), *map(str, words)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("global_step"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 143
    (path,) = home.glob("runs/*")
    assert (path / "ckpt.pt").exists() and not (path / "result.json").exists()
    done = call("sb3", *words, "--resume", path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("episodic_return "), done.stderr
    result, _ = common.read_result(path)
    assert 1500 <= result["global_step"] < 1504 and len(result["returns"]) == 10 and result["updates"] > 0
    assert 8 < result["random_return"] < 60
    shutil.copy(ROOT / "README.md", "R.md")
    assert call("report", "runs", "--name", "x", "--results", "res", "--readme", "R.md").returncode == 0
    wrong = call("sb3", *words, "--algo", "ppo", "--resume", path)
    assert wrong.returncode == 2 and "--resume" in wrong.stderr


# ---- Speed and the GPU check -----------------------------------------------------------------------------------------


def test_speed_of_a_small_model(home):
    config = "dreamerv3:preset=cpu,batch-size=2,batch_length=4,imag_starts=4"
    done = call("speed", config, "--kinds", "vector", "--no-cuda", "--seconds", 0, "--name", "s", "--results", "res")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(open("res/s.csv"))
    assert int(row["samples"]) == 8 and float(row["seconds_per_update"]) > 0 and float(row["seconds_per_act"]) > 0
    assert float(row["flop"]) > 1e6 and 0 < float(row["share"]) < 1 and float(row["memory_gb"]) > 0.05
    assert "TFLOP/s in fp32" in Path("res/s.md").read_text()


def test_speed_beside_another_file(home):
    other = shutil.copy(ROOT / "dreamerv3.py", home / "other.py")
    config = "dreamerv3:preset=cpu,batch-size=2,batch_length=4,imag_starts=4"
    done = call("speed", config, "--kinds", "vector", "--seconds", 0, "--vs", other)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| dreamerv3")]
    mine, theirs, ratio = map(float, line.split("|")[3:6])
    assert mine > 0 and theirs > 0 and 0.3 < ratio < 3
    wrong = call("speed", config, "--vs", "nowhere.py")
    assert wrong.returncode == 2 and "--vs nowhere.py" in wrong.stderr


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_speed_of_a_search(home, kind):
    sizes = "batch_size=3,num_simulations=2,hidden=8,latent=4,network=auto,channels=4,blocks=1,image_size=32"
    config = f"muzero:preset=cpu,{sizes}"
    done = call("speed", config, "--kinds", kind, "--no-cuda", "--seconds", 0, "--name", "s", "--results", "res")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(open("res/s.csv"))
    assert int(row["samples"]) == 3 and float(row["seconds_per_update"]) > 0 and float(row["seconds_per_act"]) > 0


@pytest.mark.parametrize(
    "script, sizes",
    [
        ("iris", "tokenizer_batch_size=4,batch_size=1,ac_batch_size=2,imag_horizon=2,lstm_size=8"),
        ("diamond", "batch_size=2,imag_envs=2,start_pool=2,imag_horizon=2,rew_end_length=6"),
        ("ha2018_carracing", "vae_batch_size=2,rnn_batch_size=2,rnn_batch_length=3"),
        ("genie_lam", "tok_batch_size=2,batch_size=1,seq_len=2,maskgit_steps=2"),
    ],
)
def test_speed_of_several_networks(home, script, sizes):
    config = f"{script}:preset=cpu,{sizes}"
    done = call("speed", config, "--no-cuda", "--seconds", 0, "--name", "s", "--results", "res")
    assert done.returncode == 1, done.stdout + done.stderr
    vector, image = csv.DictReader(open("res/s.csv"))
    assert vector["problem"].endswith(f"{script}.py sees images only: --kinds image") and not image["problem"]
    assert int(image["samples"]) == 2 and float(image["seconds_per_update"]) > 0 and float(image["seconds_per_act"]) > 0


def test_search_rate(home):
    flags = "--trees 2 5 --actions 3 --simulations 4 --kinds puct gumbel --seconds 0 --no-cuda --no-mctx".split()
    done = call("search", *flags, "--name", "s", "--results", "res")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(open("res/s.csv")))
    assert [(r["search"], r["trees"]) for r in rows] == [(k, n) for k in ("puct", "gumbel") for n in ("2", "5")]
    assert all(float(r["ours"]) > 0 for r in rows) and "1 thread" in Path("res/s.md").read_text()
    wrong = call("search", "--actions", "1")
    assert wrong.returncode == 2 and wrong.stderr.startswith("search.py: error: --actions") and wrong.stdout == ""


def test_rates_of_world_models(home):
    done = call(
        "world_models", "--seconds", 0, "--no-cuda", "--parts", "encode", "evolution", "--name", "w", "--results", "r"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(open("r/w.csv")))
    assert [r["how"] for r in rows[:3]] == ["batch 1", "batch 16", "batch 256"] and len(rows) == 4
    assert all(float(r["per_second"]) > 0 for r in rows) and "1 thread" in Path("r/w.md").read_text()
    wrong = call("world_models", "--parts", "nope")
    assert wrong.returncode == 2 and "--parts" in wrong.stderr and wrong.stdout == ""


def test_gpu_check_in_slices(home, monkeypatch):
    """Each slice does what fits into it; what was measured is not measured again; wrong losses are named."""
    measured, slow = [], [True]

    def measure(order, timeout):
        if order["script"] is None:
            return dict(rate=1e12), None
        if order["mode"] == "compiled" and slow[0]:
            time.sleep(timeout)
            return None, "not measured"
        measured.append(order["mode"])
        loss = 1.0 if order["mode"] == "eager" else 1.5
        return dict(first=dict(x=loss), last=dict(x=1.0), seconds_per_update=0.1, samples=8, flop=1e9), None

    def slice_of(minutes, words):
        monkeypatch.setattr(gpu, "learning_command", lambda *a: words)
        argv = f"gpu.py --allow-cpu --minutes {minutes} --folder g --configs dreamerv3:preset=cpu".split()
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            gpu.main()
        return stopped.value.code, Path("g/gpu.md").read_text()

    monkeypatch.setattr(gpu.speed, "measure", measure)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    runs = [sys.executable, str(BENCHMARKS / "run.py"), "--command", "python toy.py --steps 60"]
    runs += ["--folder", "g/learning"]
    monkeypatch.setattr(gpu, "MARGIN", 57)  # a minute's slice with three seconds in it
    code, text = slice_of(1, runs)
    assert code == 3 and measured == ["eager"] and "1 of 2 measurements and the learning runs are left" in text
    slow[0] = False
    monkeypatch.setattr(gpu, "LEARNING_MARGIN", 1.5)
    code, text = slice_of(1, runs)  # the runs are stopped in the middle
    assert code == 1 and measured == ["eager", "compiled"] and "x differs by 0.5" in text
    assert "0 of 2 measurements and the learning runs are left" in text
    assert list(home.glob("g/learning/*/runs/*/ckpt.pt"))
    monkeypatch.setattr(gpu, "MARGIN", 30)
    code, text = slice_of(1, runs)
    assert code == 1 and measured == ["eager", "compiled"] and "no learning runs are left" in text
    assert "| finished |" in text and "1.5 | 0.0 | 60 |" in text
    assert "--resume" in next(home.glob("g/learning/*/log.txt")).read_text()


@pytest.mark.parametrize("tool, argv, named", [
    ("speed", [], "wanted SCRIPT"), ("speed", ["nope"], "no script nope"), ("speed", ["dreamerv3:x"], "dreamerv3:x"),
    ("speed", ["dreamerv3:sizes=1m"], "sizes=1m"), ("speed", ["dreamerv3:preset=nope"], "preset=nope"),
    ("sb3", ["--algo", "nope"], "--algo"),
    ("gpu", ["--allow-cpu", "--suite", "nope"], "--suite nope"), ("gpu", ["--minutes", "0"], "--minutes"),
])  # fmt: skip
def test_wrong_input_of_speed_and_gpu(home, tool, argv, named):
    done = call(tool, *argv)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(home)) == ["toy.py"]


def test_optional_packages_are_optional():
    """Nothing but the standard library, numpy and what is imported inside functions is needed to import the tools."""
    code = "import sys; sys.path.insert(0, {!r}); import run, report, dreams, speed, gpu;"
    code += "print(sorted(set(sys.modules) & {}))"
    names = {"matplotlib", "submitit", "stable_baselines3", "torch", "tensorboard", "gymnasium"}
    words = [sys.executable, "-c", code.format(str(BENCHMARKS), names)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
