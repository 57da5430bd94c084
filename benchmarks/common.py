"""What the benchmark tools share: errors of one line, where run directories are, and when a run counts as finished."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def fail(message):
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """argparse without the usage text above its errors, and without guessing flags from their first letters."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        fail(message.removeprefix("argument "))


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


def swap_block(text, name, content):
    """`text` with everything between <!-- name --> and <!-- end of name --> replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        fail(f"README.md must have one line {begin.strip()} and one {end}")
    return text.split(begin)[0] + begin + content + "\n" + end + text.split(end)[1]
