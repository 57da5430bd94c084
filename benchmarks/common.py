"""What the benchmark tools share: errors of one line, where run directories are, when a run counts as finished, and the
handling of batched observations that stands between a script's agent and its environments."""

import argparse
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def fail(message):
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """argparse without the usage text above its errors, without guessing flags from their first letters, and with a
    help that begins with the tool's description and its example."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        fail(message.removeprefix("argument "))

    def format_help(self):
        text, self.description = self.description, None
        rest, self.description = super().format_help(), text
        return f"{text.strip()}\n\n{rest}"


def at_least(low, kind=int):
    """A type for numbers that have a least value, with an error that says so."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < math.inf):
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {text}")
        return value

    return number


def read_json(path):
    """The content of a JSON file, or None if it is not there or not whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(data, path):
    """Write a JSON file; `path` is the new text or the old one, never half of either."""
    temp = Path(f"{path}.tmp")
    temp.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temp, path)


def read_result(run):
    """(result, problem) of a run directory: the content of result.json if the run finished and wrote a score, else
    None and the reason. Everything that counts runs asks here, so that half a result counts nowhere."""
    path = Path(run) / "result.json"
    if not path.exists():
        return None, "no result.json: not finished"
    result = read_json(path)
    if not isinstance(result, dict):
        return None, "result.json is damaged"
    if "score" in result:  # of a script without episodes
        result = {"episodic_return": result["score"], "random_return": result.get("random_score")} | result
    score = result.get("episodic_return")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        return None, f"result.json has no finite episodic_return: {score}"
    info = read_json(Path(run) / "args.json")
    if not isinstance(info, dict) or not isinstance(info.get("args"), dict):
        return None, "args.json is missing or damaged"
    return result, None


def find_runs(folders):
    """Every run directory (one with an args.json) below some folders, oldest first; runs are not searched inside."""
    found = {}
    for folder in folders:
        for path, names, files in os.walk(folder):
            if "args.json" in files:
                found[Path(path).resolve()] = (Path(path) / "args.json").stat().st_mtime
                names.clear()
    return sorted(found, key=lambda p: (found[p], p))


# ---- Scripts and their runs ------------------------------------------------------------------------------------------


def load_script(name, flag="--script"):
    """The module of a script, by its name."""
    if not str(name).isidentifier() or not (ROOT / f"{name}.py").is_file():
        fail(f"{flag}: there is no {name}.py in the repository")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def load_run(run, device="cpu", instead=None):
    """(script module, agent) of a run directory. `instead`: the flag by which scripts without `load` do the same."""
    info = read_json(Path(run) / "args.json")
    if not isinstance(info, dict) or not {"script", "args"} <= set(info):
        fail(f"{run} is not a run directory: it has no readable args.json")
    if not any((Path(run) / name).is_file() for name in ("ckpt.pt", "ckpt.prev.pt")):
        fail(f"{run} has no checkpoint")
    name = info["script"]
    script = load_script(name, str(run))
    if not hasattr(script, "load"):
        if instead and hasattr(script.Args, instead.split()[0]):
            more = f" (in Python: {name}.DreamEnv)" if instead == "play" and hasattr(script, "DreamEnv") else ""
            fail(f"{run} was made by {name}.py, which still has its own: python {name}.py --{instead} {run}{more}")
        fail(f"{run} was made by {name}.py, which does not offer its agent to the tools (no `load`)")
    agent = script.load(str(run), device=device)
    if not hasattr(agent, "act"):
        fail(f"{run} was made by {name}.py: it has no agent that acts")
    return script, agent


def choose_device(no_cuda):
    """The GPU if there is one and --no-cuda is not given."""
    import torch

    return "cuda" if torch.cuda.is_available() and not no_cuda else "cpu"


# ---- Observations and policies ---------------------------------------------------------------------------------------


def stack(observations, axis=0):
    """Observations, each an array or a dict of arrays, as one batch of the same kind."""
    if isinstance(observations[0], dict):
        return {k: stack([o[k] for o in observations], axis) for k in observations[0]}
    return np.stack([np.asarray(o) for o in observations], axis)


def pick(obs, index):
    """Entry `index` of a batch of observations."""
    return {k: pick(v, index) for k, v in obs.items()} if isinstance(obs, dict) else obs[index]


def seeds(*key, n):
    """n seeds for environments; different keys share none (for all practical purposes)."""
    return [int(s) for s in np.random.SeedSequence(key).generate_state(n)]


def random_policy(space, seed):
    """Uniform actions for a batch, with the signature of an agent's `act`."""
    rng = np.random.default_rng(seed)

    def act(obs, state, first):
        if hasattr(space, "n"):
            return rng.integers(space.n, size=len(first)), state
        return rng.uniform(space.low, space.high, (len(first), *space.shape)).astype(np.float32), state

    return act


# ---- Life signs ------------------------------------------------------------------------------------------------------


class Progress:
    """Prints what it is told, at most once in `seconds`; nothing for what is over before that."""

    def __init__(self, seconds=10):
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self, text):
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            print(text, flush=True)


def run_tool(main):
    """main() as a program: Ctrl-C ends it with one line and exit code 130."""
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\nstopped: what was not finished was not written", file=sys.stderr)
        raise SystemExit(130) from None


def swap_block(text, name, content):
    """`text` with everything between <!-- name --> and <!-- end of name --> replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        fail(f"README.md must have one line {begin.strip()} and one {end}")
    return text.split(begin)[0] + begin + content + "\n" + end + text.split(end)[1]
