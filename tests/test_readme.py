"""The README is kept by tests: its commands exist and parse, its test line is the one that CI runs, and its tables
explain every TensorBoard tag and every file that a run writes."""

import contextlib
import fnmatch
import importlib
import io
import os
import re
import shlex
import sys
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import ROOT, SCRIPTS, Script, only_run
from test_genie_lam_faults import GENIE

SCRIPTS = SCRIPTS | {"genie_lam": GENIE}
INSTALL = "pip install -r requirements.txt && "


def read(*parts):
    with open(os.path.join(ROOT, *parts), encoding="utf-8") as f:
        return f.read()


def code_lines(text):
    """Lines of all fenced blocks, continuation lines joined, prompts and comments removed."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def commands(text):
    """[(script, argv)] of every `python X.py ...` or `uv run X.py ...`, in fenced blocks and between backticks."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in [*code_lines(text), *spans]:
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part) if part.count("'") % 2 == 0 else part.split()
            for i, word in enumerate(words):
                if word.endswith(".py") and i and words[i - 1] in ("python", "run"):
                    found.append((word, words[i + 1 :]))
    return found


def table_names(text, header):
    """Everything between backticks in the rows of the tables whose first column is called `header`."""
    names, inside = [], False
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        inside = bool(cells) and (inside or header.lower() in cells[0].lower())
        names += re.findall(r"`([^`]+)`", line) if inside else []
    return names


def explained(name, patterns):
    """Whether a name is in the table; <...> and {...} in the table stand for anything."""
    return any(fnmatch.fnmatchcase(name, re.sub(r"<[^>]*>|\{[^}]*\}", "*", p)) for p in patterns)


def test_quick_start_is_there():
    lines = code_lines(read("README.md"))
    assert INSTALL + "python dreamerv3.py --preset cpu" in lines
    assert INSTALL + "python -m pytest tests" in lines


def test_ci_runs_the_readme_line():
    (line,) = [line for line in code_lines(read("README.md")) if line.startswith(INSTALL) and "pytest" in line]
    script = [line.strip() for line in read(".ci", "run").splitlines()]
    assert line in script
    assert not [x for x in script if x != line and re.search(r"\bpytest\b", x) and not x.startswith("#")]
    assert os.access(os.path.join(ROOT, ".ci", "run"), os.X_OK)


def test_commands_name_scripts_and_flags_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may be found here
    found = commands(read("README.md"))
    assert {s for s, _ in found} >= {f"{name}.py" for name in SCRIPTS}
    for path, argv in found:
        assert os.path.isfile(os.path.join(ROOT, path)), f"README names {path}, which does not exist"
        if path.removesuffix(".py") in SCRIPTS:
            problem = parse(path.removesuffix(".py"), argv, monkeypatch)
            assert not problem, f"python {path} {shlex.join(argv)}: {problem}"


def parse(name, argv, monkeypatch):
    """Parse a command line without running it: None, or what the parser said. Run directories need not exist."""
    mod, err = importlib.import_module(name), io.StringIO()
    monkeypatch.setattr(mod, "load_args", lambda run: {})
    monkeypatch.setattr(sys, "argv", [name + ".py", *argv])
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = mod.parse_args(mod.Args, mod.PRESETS, "")
            if not (args.resume or args.evaluate or getattr(args, "play", None)):
                mod.check_ranges(args, mod.RANGES)
    except SystemExit as e:
        return None if "--help" in argv else err.getvalue() or str(e)


def test_wrong_commands_are_noticed(monkeypatch):
    text = "```bash\npython nope.py --x\npip install y && python dreamerv3.py --lerning-rate 1 \\\n"
    text += "  --seed 2  # why\n```\nor `uv run a.py`"
    assert commands(text) == [
        ("nope.py", ["--x"]),
        ("dreamerv3.py", ["--lerning-rate", "1", "--seed", "2"]),
        ("a.py", []),
    ]
    assert "--learning-rate" in parse("dreamerv3", ["--lerning-rate", "1"], monkeypatch)
    assert "--seed" in parse("dreamerv3", ["--seed", "-1"], monkeypatch)
    assert parse("dreamerv3", ["--preset", "cpu", "--seed", "2"], monkeypatch) is None
    assert parse("dreamerv3", ["--evaluate", "runs/NAME"], monkeypatch) is None


@pytest.fixture(scope="module", params=SCRIPTS)
def written(request, tmp_path_factory):
    """Tags and files of a run that uses everything: reports, videos, evaluation, a resume, a dream."""
    home, folder = os.getcwd(), tmp_path_factory.mktemp("readme")
    os.chdir(folder)
    os.environ["SDL_VIDEODRIVER"], driver = "dummy", os.environ.get("SDL_VIDEODRIVER")
    try:
        script = Script(request.param, SCRIPTS[request.param])
        flags = ["--report-every", "48", "--capture-video", *script.extra]
        for argv in ([*script.tiny, *script.stub(**script.rich), *flags], ["--evaluate", "RUN"], ["--play", "RUN"]):
            argv = [only_run() if a == "RUN" else a for a in argv]
            result = script.call(*argv)
            assert result.code == 0, result.err
        run = only_run()
        assert os.path.isfile(os.path.join(run, "result.json"))
        events = EventAccumulator(run)
        events.Reload()
        tags = [t for kind in ("scalars", "images", "tensors") for t in events.Tags()[kind]]
        files = [os.path.relpath(os.path.join(d, n), run) for d, _, names in os.walk(run) for n in names]
        return tags, files
    finally:
        os.chdir(home)
        os.environ.pop("SDL_VIDEODRIVER")
        os.environ |= {"SDL_VIDEODRIVER": driver} if driver else {}


def test_every_tag_is_explained(written):
    names = table_names(read("README.md"), "tag")
    assert len(written[0]) > 10
    assert [t for t in written[0] if not explained(t, names)] == []


def test_every_file_is_explained(written):
    names = table_names(read("README.md"), "file")
    assert len(written[1]) > 8
    assert [f for f in written[1] if not explained(f, names)] == []


def test_tables_are_read():
    text = "| File | what |\n|-|-|\n| `ckpt.pt`, `ckpt.prev.pt` | x |\n| `videos/open_loop-<step>.gif` | |\n\n"
    text += "| other | |\n|-|-|\n| `no` | |"
    names = table_names(text, "file")
    assert names == ["ckpt.pt", "ckpt.prev.pt", "videos/open_loop-<step>.gif"]
    assert (
        explained("videos/open_loop-48.gif", names)
        and not explained("videos/other.gif", names)
        and not explained("no", names)
    )
