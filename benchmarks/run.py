"""Runs many trainings: seeds x environments of one command, or a named suite (benchmarks/suites.toml).

    python benchmarks/run.py --suite cpu --workers 2
    python benchmarks/run.py --command "python dreamerv3.py --preset atari100k" --env-ids ALE/Boxing-v5 ALE/Krull-v5 \\
        --num-seeds 5 --workers 2
    python benchmarks/run.py --suite dmc --cluster slurm --workers 16 --slurm slurm_partition=gpu gpus_per_node=1

Every run has its own folder in --folder: job.json (command, attempts, memory), log.txt (what it printed) and runs/
(what the script writes). The same command again goes on: finished runs are left alone, begun ones continue with
--resume, failed ones are tried again. That holds after anything, also after kill -9 of this program: the trainings
are told when it dies, save, and leave.

Exit codes: 0 every run finished, 1 at least one did not (they are named), 2 the input was wrong, 128+n stopped by
signal n.
"""

import ctypes
import hashlib
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from pathlib import Path

from common import ROOT, Parser, at_least, fail, read_json, read_result, write_json

SUITES = ROOT / "benchmarks" / "suites.toml"
# Modules that register the environments of a family with gymnasium.
FAMILIES = {"ALE": "ale_py", "MinAtar": "minatar.gym", "Vizdoom": "vizdoom.gymnasium_wrapper"}


# ---- Jobs ------------------------------------------------------------------------------------------------------------


class Job:
    """One training: a command with a seed, and the folder that holds everything about it."""

    def __init__(self, folder, words, script, env_id, seed):
        self.words = [*words, *(["--env-id", env_id] if env_id else []), "--seed", str(seed)]
        self.script, self.env_id, self.seed = script, env_id, seed
        flags = words[words.index(script) + 1 :]
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", " ".join(flags)).strip("-")
        if len(slug) > 40 or slug != " ".join(flags).replace("--", "").replace(" ", "-"):  # not to be mixed up
            slug = slug[:32].rstrip("-") + "-" + hashlib.sha1("\0".join(flags).encode()).hexdigest()[:6]
        task = re.sub(r"[^A-Za-z0-9._]+", "-", env_id or "default")
        self.name = "__".join(filter(None, [task, Path(script).stem, slug, str(seed)]))
        self.folder, self.state, self.note = Path(folder) / self.name, "waiting", ""
        self.began = None

    @property
    def log(self):
        return self.folder / "log.txt"

    def info(self):
        """What is written about this job, or a fresh record."""
        found = read_json(self.folder / "job.json")
        if not isinstance(found, dict):
            found = dict(name=self.name, command=self.words, script=self.script, env_id=self.env_id, seed=self.seed)
        return dict(attempts=[], peak_rss_gb=0.0) | found

    def runs(self):
        """Its run directories, newest first: one, or more if attempts died before their first checkpoint."""
        found = (self.folder / "runs").glob("*/args.json")
        return [p.parent for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]

    def result(self):
        return next((result for run in self.runs() if (result := read_result(run)[0])), None)

    def resumable(self):
        """The newest run directory with a checkpoint."""
        return next((r for r in self.runs() if (r / "ckpt.pt").exists() or (r / "ckpt.prev.pt").exists()), None)

    def holder(self):
        """Process of its training, or None: it holds the lock that it inherited (see Child), or its run's own."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            return None
        for path in (self.folder / "lock", *(run / "lock" for run in self.runs())):
            if not path.exists():
                continue
            with open(path, "r+") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return f.read().strip() or "?"

    def look(self):
        """Set the state from what lies in the folder: finished, failed (after its result), or to be run."""
        result, attempts = self.result(), self.info()["attempts"]
        if result:
            code = attempts[-1]["code"] if attempts else 0
            # a result with another exit code: the run is complete, but missed its --target-return
            self.state, self.note = ("finished", "") if code == 0 else ("failed", f"exit code {code} after its result")
        else:
            self.state, self.note = "waiting", "resume" if self.resumable() else ""
        return result

    def command(self):
        """The words to start now: a begun run goes on."""
        if self.words[0] in ("python", "python3"):
            words = [sys.executable, *self.words[1:]]
        else:
            words = list(self.words)
        at = words.index(self.script)
        words[at] = str(find_script(self.script))
        run = self.resumable()
        return words + (["--resume", str(run.relative_to(self.folder))] if run else [])

    def last_line(self):
        """The last line its log has, without the rest of a progress bar."""
        try:
            with open(self.log, "rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
                lines = f.read().decode(errors="replace").replace("\r", "\n").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip(" │╰╯─╭╮")), "")

    def progress(self):
        found = re.search(r"global_step=(\d+)(?:, episodic_return=([^,\s]*\d))?", self.last_line())
        return (f"{int(found[1]):,}", found[2] or "") if found else ("", "")


def find_script(name):
    """A script of the repository, or of the folder this is called from."""
    return next((p.resolve() for p in (ROOT / name, Path(name)) if p.is_file()), None)


def split_command(text, flag):
    """Words of a command and the name of its script; exit code 2 if they do not fit this program."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        fail(f"{flag}: {e}: {text!r}")
    script = next((w for w in words if w.endswith(".py")), None)
    if not script or words[0] == script:
        fail(f'{flag} must look like "python SCRIPT.py --flags", got {text!r}')
    for word in words:
        taken = word.split("=")[0].replace("_", "-")
        if taken in ("--seed", "--resume", "--evaluate", "--play"):
            fail(f"{flag} must not contain {taken}: {'--num-seeds sets it' if taken == '--seed' else 'it trains'}")
    return words, script


def read_suites():
    try:
        return tomllib.loads(SUITES.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        fail(f"{SUITES}: {e}")


def plan(flags):
    """[(words, script, env_ids, seeds)] from --suite or --command."""
    if bool(flags.suite) == bool(flags.command):
        fail("one of --suite and --command is needed")
    if flags.command:
        if flags.scripts:
            fail("--scripts chooses from a --suite; with --command the script is in the command")
        words, script = split_command(flags.command, "--command")
        if flags.env_ids and any(w.split("=")[0].replace("_", "-") == "--env-id" for w in words):
            fail("--command must not contain --env-id when --env-ids is given")
        if not find_script(script):
            fail(f"--command: no script {script}")
        entries = [(words, script, flags.env_ids or [None], flags.num_seeds or 1)]
    else:
        suites, entries = read_suites(), []
        for name in flags.suite:
            if name not in suites:
                fail(f"--suite {name}: unknown, there are {', '.join(suites)}")
            for block in suites[name]["runs"]:
                words, script = split_command(block["command"], f"{SUITES.name}, {name}, command")
                env_ids = block.get("env_ids", [None])
                entries.append((words, script, env_ids, flags.num_seeds or suites[name].get("num_seeds", 1)))
        entries = choose(entries, flags)
    extra = shlex.split(flags.add_flags)
    return [
        (words + extra, script, env_ids, range(flags.start_seed, flags.start_seed + seeds))
        for words, script, env_ids, seeds in entries
    ]


def choose(entries, flags):
    """The part of a suite that --scripts and --env-ids ask for and that is there."""
    there = {Path(script).stem for _, script, _, _ in entries}
    for name in flags.scripts or []:
        stem = Path(name).stem
        if stem not in there:
            known = "is not in this suite" if find_script(stem + ".py") else "is unknown"
            fail(f"--scripts {name} {known}, the suite has {', '.join(sorted(there))}")
    wanted = {Path(name).stem for name in flags.scripts} if flags.scripts else there
    entries = [e for e in entries if Path(e[1]).stem in wanted]
    all_ids = {env_id for _, _, env_ids, _ in entries for env_id in env_ids if env_id}
    for env_id in flags.env_ids or []:
        if env_id not in all_ids:
            fail(f"--env-ids {env_id} is not in this suite, which has {', '.join(sorted(all_ids))}")
    if flags.env_ids:
        entries = [(w, s, [e for e in ids if e in flags.env_ids], n) for w, s, ids, n in entries]
    for missing in sorted({script for _, script, _, _ in entries if not find_script(script)}):
        if flags.scripts:
            fail(f"--scripts {Path(missing).stem}: {missing} is not in the repository yet")
        print(f"left out: {missing} is not in the repository yet")
    return [e for e in entries if find_script(e[1]) and e[2]]


def check_env_id(env_id, script):
    """Exit code 2 for an id that neither gymnasium, DeepMind Control nor the script knows. Nothing is built."""
    import gymnasium as gym

    module, _, plain = env_id.rpartition(":")
    family = plain.split("/")[0]
    if family == "dm_control":
        match = re.fullmatch(r"dm_control/(\w+)-(\w+)-v0", env_id)
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("MUJOCO_GL", "egl")  # as the scripts do
        try:
            from dm_control import suite
        except ModuleNotFoundError as e:
            fail(f"--env-ids {env_id}: {e}")
        except Exception:  # no OpenGL here: that says nothing about the id
            return
        if not match or match.groups() not in suite.ALL_TASKS:
            fail(f"--env-ids {env_id}: DeepMind Control has no such task (dm_control/<domain>-<task>-v0)")
        return
    try:
        if family in FAMILIES:
            loaded = importlib.import_module(FAMILIES[family])
            if family == "MinAtar" and plain not in gym.registry:
                loaded.register_envs()
        if module:
            importlib.import_module(module)
        gym.spec(plain)
    except (gym.error.Error, ModuleNotFoundError, ValueError) as e:
        if plain not in find_script(script).read_text(encoding="utf-8"):  # some scripts have environments of their own
            fail(f"--env-ids {env_id}: {' '.join(str(e).split())}")


# ---- The local pool --------------------------------------------------------------------------------------------------


class Stop:
    """Remembers the first stop signal; a second one ends this program at once."""

    def __init__(self):
        self.signum = 0
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup stays nohup
                signal.signal(number, self)

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)


def find_gpus(asked):
    """Indices to hand out: --gpus, else CUDA_VISIBLE_DEVICES, else what nvidia-smi lists; None: nobody knows."""
    if asked is not None:
        return asked
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [g for g in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if g.strip()]
    if not shutil.which("nvidia-smi"):
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))] or None


def before_exec():
    """In the child: be told with SIGTERM when this program dies, however it dies (Linux), and let Slurm's warning
    signal to everybody pass: it is this program that passes it on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Child:
    """A running training."""

    def __init__(self, job, gpu, threads, grace):
        self.grace = grace
        damaged = [r / "result.json" for r in job.runs() if (r / "result.json").exists() and not read_result(r)[0]]
        for path in damaged:  # a resumed run must not take it for its own
            path.replace(path.with_name("result.damaged.json"))
        words, self.job, self.resumed = job.command(), job, job.resumable() is not None
        env = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # Modules of the user's environments are found from where this was started, not from the job's folder.
        paths = [os.path.abspath(p) for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
        env["PYTHONPATH"] = os.pathsep.join([*paths, os.getcwd()])
        env["PYTHONUNBUFFERED"] = "1"
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with open(job.log, "a") as log, lock_of(job.folder) as lock:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            # A session of its own: Ctrl-C must reach it once, through this program, since a second signal kills it.
            self.process = subprocess.Popen(
                words, cwd=job.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=before_exec, pass_fds=[lock.fileno()],
            )  # fmt: skip
            lock.write(str(self.process.pid))
        self.began, self.told, self.reason, self.code, self.rss = time.time(), None, None, None, 0.0

    def poll(self):
        """Exit code (128 + n after signal n), or None while it runs."""
        if self.code is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.process.returncode = code
                self.code = code if code >= 0 else 128 - code
                self.rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
                self.kill()  # nobody it started lives on
        return self.code

    def tell(self, reason):
        """Ask it to save and leave; the second time, after the grace period, it is killed."""
        if self.told is None:
            self.told, self.reason = time.time(), reason
            self.process.terminate()
        elif time.time() - self.told > self.grace:
            self.kill()

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def record(self):
        """Write down how it ended, and set the job's state."""
        job, result = self.job, self.job.result()
        if self.reason:
            job.state, job.note = ("stopped" if self.reason.startswith("stopped") else "failed"), self.reason
        elif self.code == 0:
            job.state, job.note = ("finished", "") if result else ("failed", "exit code 0 but no whole result.json")
        else:
            how = f"killed by signal {self.code - 128}" if self.code > 128 else f"exit code {self.code}"
            job.state, job.note = "failed", how + (" after its result" if result else f": {job.last_line()}")
        info = job.info()
        attempt = dict(code=self.code, seconds=round(time.time() - self.began, 1), resumed=self.resumed, note=job.note)
        info["attempts"].append(attempt)
        info["peak_rss_gb"] = round(max(info["peak_rss_gb"], self.rss), 3)
        write_json(info, job.folder / "job.json")


def pool(jobs, show, stop, workers, gpus, threads, timeout, grace):
    """Run jobs, `workers` at a time; worker i uses GPU i modulo their number. No threads here: the kernel would take
    the end of a thread for the death of this program."""
    waiting, children = deque(jobs), [None] * workers
    while waiting or any(children):
        for slot, child in enumerate(children):
            if child is None and waiting and not stop.signum:
                job = waiting.popleft()
                if holder := job.holder():  # a training that outlived the last start of this program
                    job.state, job.note = "held", f"process {holder} is writing it"
                    waiting.append(job)
                    continue
                if job.state == "held" and job.look():  # and finished meanwhile
                    show(job)
                    continue
                gpu = gpus[slot % len(gpus)] if gpus else ("" if gpus == [] else None)
                children[slot] = Child(job, gpu, threads, grace)
                job.state, job.note, job.began = "running", f"GPU {gpu}" if gpu else "", time.time()
                show(job)
            elif child and child.poll() is not None:
                children[slot] = None
                child.record()
                show(child.job)
            elif child and (stop.signum or child.told):
                child.tell(f"stopped by signal {stop.signum}")
            elif child and timeout and time.time() - child.began > 60 * timeout:
                child.tell(f"timeout: not finished after {timeout:g} minutes")
        if stop.signum and not any(children):
            return
        show(None)
        time.sleep(0.1)


# ---- A cluster -------------------------------------------------------------------------------------------------------


def requeueing(words):
    """A job for submitit: this program with one job in it. When the cluster takes the node away, the training is told
    to save, and the same job is queued again; it goes on by itself because a begun run is resumed."""
    import submitit

    class Requeueing(submitit.helpers.Checkpointable):
        def __init__(self, words):
            self.words, self.pid = words, None

        def __call__(self):
            process = subprocess.Popen(self.words)
            self.pid = process.pid
            return self.wait()

        def wait(self):
            # NOTE: not Popen.wait, whose lock would be held when the signal handler below comes in the middle of it.
            try:
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:
                return None

        def checkpoint(self):
            if self.pid:
                os.kill(self.pid, signal.SIGTERM)
                self.wait()
            return submitit.helpers.DelayedSubmission(type(self)(self.words))

    return Requeueing(words)


def cluster(jobs, show, stop, flags):
    """Run jobs through submitit, --workers of them at a time."""
    executor = make_executor(flags)
    waiting, running = deque(jobs), {}
    while waiting or running:
        while waiting and len(running) < flags.workers and not stop.signum:
            job = waiting.popleft()
            words = [sys.executable, str(Path(__file__).resolve()), "--job", str(job.folder)]
            words += ["--grace", str(flags.grace), *(["--timeout", str(flags.timeout)] if flags.timeout else [])]
            running[job] = executor.submit(requeueing(words))
            job.state, job.note, job.began = "submitted", f"job {running[job].job_id}", time.time()
            write_json(job.info() | {"cluster_job": str(running[job].job_id)}, job.folder / "job.json")
            show(job)
        if flags.cluster == "debug":  # runs where it is asked for its result
            for ticket in running.values():
                ticket.exception()
        for job, ticket in list(running.items()):
            if ticket.done():
                del running[job]
                if not job.look():
                    attempts = job.info()["attempts"]
                    note = attempts[-1]["note"] if attempts else f"the job wrote nothing: see {ticket.paths.stderr}"
                    job.state, job.note = "failed", note
                show(job)
        if stop.signum:  # jobs in the queue live on: the same command again finds what they wrote
            print(f"stopped watching; {len(running)} jobs go on in the {flags.cluster} queue")
            return
        show(None)
        time.sleep(flags.poll)


def make_executor(flags):
    try:
        import submitit
    except ImportError:
        fail("--cluster needs submitit: pip install submitit")
    folder = Path(flags.folder) / "submitit"
    settings = {}
    for pair in flags.slurm or []:
        key, equal, value = pair.partition("=")
        if not equal:
            fail(f"--slurm takes KEY=VALUE, got {pair!r}")
        settings[key] = int(value) if value.lstrip("-").isdigit() else value
    if flags.cluster == "slurm":
        if not shutil.which("sbatch"):
            fail("--cluster slurm: no sbatch on this machine")
        settings = {"timeout_min": int(flags.timeout or 24 * 60), "name": "world-models"} | settings
    elif settings:
        fail("--slurm is for --cluster slurm")
    executor = submitit.AutoExecutor(folder=folder, cluster=flags.cluster, slurm_max_num_timeout=100)
    try:
        # For the local executor the limit stands for "never"; on Slurm the job is told before it and queued again.
        executor.update_parameters(**(settings or {"timeout_min": 60 * 24 * 30}))
    except (TypeError, ValueError, NameError) as e:
        fail(f"--slurm: {e}")
    return executor


# ---- Showing ---------------------------------------------------------------------------------------------------------


def line_of(job):
    """One line of the table: name, state, agent steps, return, minutes, remark."""
    step, score = job.progress()
    if result := job.result():
        step, score = f"{result.get('global_step', 0):,}", f"{result['episodic_return']:.1f}"
    attempts = job.info()["attempts"]
    seconds = sum(a["seconds"] for a in attempts)
    if job.state in ("running", "submitted") and job.began:
        seconds += time.time() - job.began
    minutes = f"{seconds / 60:.1f}" if seconds else ""
    return [job.name, job.state, step, score, minutes, job.note[:70]]


def table_of(jobs):
    rows = [["run", "state", "steps", "return", "minutes", ""], *map(line_of, jobs)]
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    aligned = [[f"{c:{a}{w}}" for c, a, w in zip(row, "<<>>><", widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in aligned]


class Show:
    """On a terminal a table that is drawn again and again; into a file one line per change."""

    def __init__(self, jobs, every=2.0):
        self.jobs, self.live, self.every, self.drawn, self.at = jobs, sys.stdout.isatty(), every, 0, 0.0

    def __call__(self, job):
        if not self.live:
            if job:
                print("  ".join(filter(None, line_of(job))), flush=True)
            return
        if job is None and time.time() - self.at < self.every:
            return
        self.at, (width, height) = time.time(), shutil.get_terminal_size()
        lines = table_of(self.jobs)
        if len(lines) > height - 2:  # what is going on, and how much there is of the rest
            active = [j for j in self.jobs if j.state not in ("finished", "waiting")]
            lines = table_of(active[: height - 4])
            done = sum(j.state == "finished" for j in self.jobs)
            lines.append(f"... {done} of {len(self.jobs)} finished")
        up = f"\033[{self.drawn}A" if self.drawn else ""
        print(up + "\n".join("\033[2K" + line[: width - 1] for line in lines) + "\033[J", flush=True)
        self.drawn = len(lines)


def summary(jobs):
    """Print the table and the list of what failed; the exit code."""
    print("\n" + "\n".join(table_of(jobs)))
    bad = [j for j in jobs if j.state != "finished"]
    if bad:
        print(f"\n{len(bad)} of {len(jobs)} runs did not finish:")
        for job in bad:
            print(f"  {job.name}: {job.state}{', ' if job.note else ''}{job.note} (log: {job.log})")
    return 1 if bad else 0


# ---- Main ------------------------------------------------------------------------------------------------------------


def lock_of(folder):
    """A folder's file "lock", empty, and locked for as long as a process has this handle open."""
    handle = open(folder / "lock", "a+")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # on Windows
        pass
    except OSError:
        handle.seek(0)
        fail(f"--folder {folder} is in use by process {handle.read().strip()}")
    handle.truncate(0)
    return handle


def lock_folder(folder):
    """Only one of this program works on a folder; the handle must live."""
    handle = lock_of(folder)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def run_one(flags):
    """--job FOLDER: one job that was prepared by --cluster, on the machine where it landed."""
    if hasattr(signal, "SIGUSR2"):  # Slurm warns every process of a job; submitit's is the one that acts on it
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    info = read_json(Path(flags.job) / "job.json")
    if not info:
        fail(f"--job {flags.job}: no job.json")
    at = info["command"].index("--seed")
    words = info["command"][: at - (2 if info["env_id"] else 0)]
    job = Job(Path(flags.job).parent, words, info["script"], info["env_id"], info["seed"])
    stop = Stop()
    if not job.look():
        # The cluster hands out the GPUs of its jobs: leave what it set.
        threads = flags.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or 1
        pool([job], Show([job]), stop, 1, None, threads, flags.timeout, flags.grace)
    raise SystemExit(128 + stop.signum if stop.signum else summary([job]))


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--suite", nargs="+", help="named suites of benchmarks/suites.toml")
    add("--command", help='what to run, without seed: "python dreamerv3.py --preset cpu"')
    add("--env-ids", nargs="+", help="environments for --command; with --suite only these of its environments")
    add("--scripts", nargs="+", help="only these scripts of the suite")
    add("--num-seeds", type=at_least(1), help="seeds per environment (default: the suite's, else 1)")
    add("--start-seed", type=at_least(0), default=1, help="first seed (default: 1)")
    add("--add-flags", default="", help='flags added to every command: --add-flags="--total-timesteps 2000"')
    add("--workers", type=at_least(1), default=1, help="runs at a time (default: 1)")
    add("--threads", type=at_least(1), help="CPU threads of each run (default: cores / workers)")
    add("--gpus", nargs="*", help="GPU indices, handed to the workers in turn (default: all; empty: none)")
    add("--timeout", type=at_least(0.01, float), help="minutes after which a run is stopped and counted as failed")
    add("--grace", type=at_least(0, float), default=120.0, help="seconds to save in, before a stopped run is killed")
    add("--folder", type=Path, help="where everything goes (default: runs/<suite or command>)")
    add("--cluster", choices=["slurm", "local", "debug"], help="submit through submitit (pip install submitit)")
    add("--slurm", nargs="+", help="submitit parameters for --cluster slurm: slurm_partition=gpu gpus_per_node=1")
    add("--poll", type=at_least(0.05, float), default=5.0, help="seconds between looks at the cluster (default: 5)")
    add("--dry-run", action="store_true", help="print the commands and do nothing")
    add("--list", action="store_true", help="print the suites")
    add("--job", help="run one prepared job folder (used by --cluster)")
    return parser.parse_args()


def main():
    flags = parse()
    if flags.list:
        for name, suite in read_suites().items():
            print(f"{name}: {suite.get('about', '')}")
        return
    if flags.job:
        run_one(flags)
    entries = plan(flags)
    if not flags.folder:
        name = "-".join(flags.suite) if flags.suite else Path(entries[0][1]).stem + "-command"
        flags.folder = Path("runs") / f"bench-{name}"
    flags.folder = flags.folder.absolute()
    for env_id, script in sorted({(e, script) for _, script, env_ids, _ in entries for e in env_ids if e}):
        check_env_id(env_id, script)
    # Seeds outside, so that a suite that is stopped half-way has something of everything.
    most = max((len(seeds) for _, _, _, seeds in entries), default=0)
    jobs = [
        Job(flags.folder, words, script, env_id, seeds[i])
        for i in range(most)
        for words, script, env_ids, seeds in entries
        if i < len(seeds)
        for env_id in env_ids
    ]
    if not jobs:
        fail("nothing to run")
    for name in {j.name for j in jobs if sum(j.name == other.name for other in jobs) > 1}:
        fail(f"{name} would be run twice")
    for job in jobs:
        job.look()
        if job.info()["command"] != job.words:
            fail(f"--folder {flags.folder} has other runs: {job.name} is {shlex.join(job.info()['command'])}")
    if flags.dry_run:
        if hasattr(signal, "SIGPIPE"):  # `--dry-run | head` ends quietly
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for job in jobs:
            what = "finished" if job.result() else "resume" if job.resumable() else "start"
            print(f"{what:8} {shlex.join(job.command()) if what != 'finished' else job.name}")
        return
    if flags.cluster:
        make_executor(flags)
    try:
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--folder: cannot write {flags.folder}: {e}")
    handle = lock_folder(flags.folder)  # noqa: F841 (held until the process ends)
    for job in jobs:
        write_json(job.info(), job.folder / "job.json")
    todo, stop, show = [j for j in jobs if not j.result()], Stop(), Show(jobs)
    print(f"{len(jobs)} runs in {flags.folder}, {len(jobs) - len(todo)} of them have results")
    if flags.cluster:
        cluster(todo, show, stop, flags)
    else:
        threads = flags.threads or max(1, (os.cpu_count() or 1) // flags.workers)
        pool(todo, show, stop, flags.workers, find_gpus(flags.gpus), threads, flags.timeout, flags.grace)
    code = summary(jobs)
    raise SystemExit(128 + stop.signum if stop.signum else code)


if __name__ == "__main__":
    main()
