"""README and docs are kept by tests: commands exist and parse, the test line is the one that CI runs, the example
environment trains, links lead somewhere, and each script's page explains the tags and files that a run writes."""

import contextlib
import fnmatch
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import ROOT, SCRIPTS, TESTS, Script, only_run
from test_genie_lam_faults import GENIE

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))
import common  # noqa: E402
import report  # noqa: E402

OLD = {name: rows for name, rows in (SCRIPTS | {"genie_lam": GENIE}).items() if name != "dreamerv3"}
ALL = [*OLD, "dreamerv3", "planet_cem", "muzero", "iris", "diamond", "tdmpc2", "dyna", "ha2018_carracing", "ijepa"]
TEXTS = ["README.md", *sorted(os.path.join("docs", n) for n in os.listdir(os.path.join(ROOT, "docs")))]
INSTALL = "pip install -r requirements.txt && "
TINY = (
    "--no-cuda --num-envs 2 --total-timesteps 96 --learning-starts 16 --deter 16 --hidden 8 --units 8 --cnn-depth 8 "
    "--classes 4 --stoch 4 --blocks 2 --mlp-layers 1 --bins 15 --batch-size 2 --batch-length 4 --imag-starts 4 "
    "--imag-horizon 3 --train-ratio 1 --log-every 16 --save-every 32 --eval-episodes 2"
).split()


def read(*parts):
    with open(os.path.join(ROOT, *parts), encoding="utf-8") as f:
        return f.read()


def page(name):
    """What explains a script: its page, and the page about all of them."""
    return read("docs", f"{name}.md") + "\n" + read("docs", "runs.md")


def blocks(text, *languages):
    """Contents of the fenced blocks in one of some languages."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.M | re.S)
    return [block for language, block in found if language in languages]


def code_lines(text):
    """Lines of all fenced blocks that are no program, continuation lines joined, prompts and comments removed."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip().removeprefix("$ ") for block in blocks(text, "", "bash") for line in block.splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def commands(text):
    """[(path, argv)] of every `python X.py ...`, `uv run X.py ...` or `torchrun ... X.py ...`, in fenced blocks and
    between backticks. Not those of result tables, which are commands of their commits."""
    text = re.sub(r"<!-- results -->.*?<!-- end of results -->", "", text, flags=re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in [*code_lines(text), *spans]:
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part) if part.count("'") % 2 == 0 else part.split()
            for i, word in enumerate(words):
                if word.endswith(".py") and i and (words[i - 1] in ("python", "run") or words[0] == "torchrun"):
                    found.append((word, words[i + 1 :]))
    return found


def table_names(text, header):
    """Everything between backticks in the first column of the tables whose first column is called `header`."""
    names, inside = [], False
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        inside = bool(cells) and (inside or header.lower() == cells[0].lower())
        names += re.findall(r"`([^`]+)`", cells[0]) if inside else []
    return names


def explained(name, patterns):
    """Whether a name is in the table; <...> and {...} in the table stand for anything."""
    return any(fnmatch.fnmatchcase(name, re.sub(r"<[^>]*>|\{[^}]*\}", "*", p)) for p in patterns)


def unexplained(name, run):
    """(tags, files) of a run directory, and those of them that neither page explains."""
    events, text = EventAccumulator(run), page(name)
    events.Reload()
    tags = [t for kind in ("scalars", "images", "tensors") for t in events.Tags()[kind]]
    files = [os.path.relpath(os.path.join(d, n), run) for d, _, names in os.walk(run) for n in names]
    known = table_names(text, "tag"), table_names(text, "file")
    return (tags, files), [x for xs, names in zip((tags, files), known) for x in xs if not explained(x, names)]


def parse(name, argv):
    """Parse a script's command line without running it: None, or what the parser said. Run directories need not
    exist."""
    mod, err = importlib.import_module(name), io.StringIO()
    preset = next((b for a, b in zip(argv, argv[1:]) if a == "--preset"), "full")
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = tyro.cli(mod.Args, args=argv, default=mod.Args(**getattr(mod, "PRESETS", {}).get(preset, {})))
            if hasattr(mod, "check_ranges") and not (args.resume or args.evaluate or getattr(args, "play", None)):
                mod.check_ranges(args, mod.RANGES)
    except SystemExit as e:
        return None if "--help" in argv else err.getvalue() or str(e)


class Parsed(Exception):
    pass


def parse_tool(name, argv, monkeypatch):
    """The same for a program in benchmarks/: it is stopped as soon as it has parsed its command line."""
    tool, err, real = importlib.import_module(name), io.StringIO(), common.Parser.parse_args

    def parse_args(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(common.Parser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [name + ".py", *argv])
        try:
            tool.main()
        except Parsed:
            return None
        except SystemExit as e:
            return err.getvalue() or str(e)
    return "it has not asked its parser"


# ---- The texts -------------------------------------------------------------------------------------------------------


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


def test_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 180 and text.count("![") <= 1


@pytest.mark.parametrize("path", TEXTS)
def test_text(path):
    """Lines fit, except of tables; links lead to files; blocks of Python are Python; results are the report's."""
    text = read(path)
    assert [line for line in text.splitlines() if len(line) > 128 and not line.startswith("|")] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("https://")]
    assert [x for x in links if not os.path.exists(os.path.join(ROOT, os.path.dirname(path), x))] == []
    for block in blocks(text, "python"):
        compile(block, path, "exec")
    if "<!-- results -->" in text:
        script = None if path == "README.md" else os.path.basename(path).removesuffix(".md")
        assert common.swap_block(text, "results", report.readme_table(common.RESULTS, script)) == text


def test_every_script_has_a_page():
    scripts = {n.removesuffix(".py") for n in os.listdir(ROOT) if n.endswith(".py")}
    assert scripts == set(ALL)
    for name in scripts:
        assert f"](docs/{name}.md)" in read("README.md") and "<!-- results -->" in read("docs", f"{name}.md")


@pytest.mark.parametrize("path", TEXTS)
def test_commands_name_scripts_and_flags_that_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may be found here
    for script, argv in commands(read(path)):
        assert os.path.isfile(os.path.join(ROOT, script)), f"{path} names {script}, which does not exist"
        folder, name = os.path.split(script.removesuffix(".py"))
        problem = parse_tool(name, argv, monkeypatch) if folder == "benchmarks" else parse(name, argv)
        assert not problem, f"{path}: python {script} {shlex.join(argv)}: {problem}"


def test_every_script_and_tool_has_a_command():
    found = {script for path in TEXTS for script, _ in commands(read(path))}
    tools = set(re.findall(r"`(benchmarks/\w+\.py)`", read("docs", "benchmarks.md")))
    assert found >= {f"{name}.py" for name in ALL} | (tools - {"benchmarks/sb3.py"})


def test_wrong_commands_are_noticed(monkeypatch):
    text = "```bash\npython nope.py --x\npip install y && python dreamerv3.py --lerning-rate 1 \\\n"
    text += "  --seed 2  # why\ntorchrun --n 8 b.py --y\n```\nor `uv run a.py`\n<!-- results -->\n`python c.py`\n"
    text += "<!-- end of results -->\n```python\npython d.py\n```\n"
    assert commands(text) == [
        ("nope.py", ["--x"]),
        ("dreamerv3.py", ["--lerning-rate", "1", "--seed", "2"]),
        ("b.py", ["--y"]),
        ("a.py", []),
    ]
    assert "--learning-rate" in parse("dreamerv3", ["--lerning-rate", "1"])
    assert "--seed" in parse("dreamerv3", ["--seed", "x"])
    assert parse("dreamerv3", ["--preset", "cpu", "--seed", "2"]) is None
    assert "--preset" in parse("dreamerv3", ["--preset", "cpuu"])
    assert parse("genie_lam", ["--evaluate", "runs/NAME"]) is None
    assert "--num-envs" in parse("genie_lam", ["--preset", "cpu", "--num-envs", "0"])
    assert "--nme" in parse_tool("report", ["runs", "--nme", "x"], monkeypatch)
    assert "--workers" in parse_tool("run", ["--suite", "cpu", "--workers", "0"], monkeypatch)
    assert parse_tool("run", ["--suite", "cpu"], monkeypatch) is None


def test_tables_are_read():
    text = "| File | what |\n|-|-|\n| `ckpt.pt`, `ckpt.prev.pt` | as `x` |\n| `videos/open_loop-<step>.gif` | |\n\n"
    text += "| other | |\n|-|-|\n| `no` | |"
    names = table_names(text, "file")
    assert names == ["ckpt.pt", "ckpt.prev.pt", "videos/open_loop-<step>.gif"]
    assert explained("videos/open_loop-48.gif", names)
    assert not explained("videos/other.gif", names) and not explained("no", names)


# ---- Tags and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_page_explains_only_what_its_script_logs(name):
    """Every word of each tag in its table is somewhere in the script (or in the tool that adds to its logs)."""
    code = read(f"{name}.py") + (read("benchmarks", "dreams.py") if name == "dreamerv3" else "")
    for tag in table_names(read("docs", f"{name}.md"), "tag"):
        words = re.split("[<{]", tag.split("/")[1])[0].split("_")
        assert all(word in code for word in words), f"{name}.py does not log {tag}"


@pytest.mark.parametrize("name", OLD)
def test_tags_and_files_are_explained(name, tmp_path, monkeypatch):
    """Of a run that uses everything: reports, videos, evaluation, a dream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    script = Script(name, OLD[name])
    flags = ["--report-every", "48", "--capture-video", *script.extra]
    for argv in ([*script.tiny, *script.stub(**script.rich), *flags], ["--evaluate", "RUN"], ["--play", "RUN"]):
        result = script.call(*[only_run() if a == "RUN" else a for a in argv])
        assert result.code == 0, result.err
    (tags, files), missing = unexplained(name, only_run())
    assert len(tags) > 10 and len(files) > 8 and missing == []


def train(argv, folder, **env):
    """Run dreamerv3.py in a folder: its run directory there, and what it printed."""
    command = [sys.executable, os.path.join(ROOT, "dreamerv3.py"), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | env
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (name,) = os.listdir(os.path.join(folder, "runs"))
    return os.path.join(folder, "runs", name), done.stdout


def test_tags_and_files_of_dreamerv3_are_explained(tmp_path):
    env = ["--env-id", "stub_env:Stub-v0", "--env-kwargs", json.dumps({"obs": "dict"})]
    run, _ = train(["--preset", "cpu", *TINY, *env], tmp_path, PYTHONPATH=TESTS)
    (tags, files), missing = unexplained("dreamerv3", run)
    assert len(tags) > 20 and len(files) >= 6 and missing == []


def test_the_environment_of_the_readme_trains(tmp_path):
    """It is a whole file, gymnasium accepts it, and the command below it runs (here with a tiny model)."""
    text = read("README.md")
    (code,) = [b for b in blocks(text, "python") if "gym.register" in b]
    (argv,) = [a for _, a in commands(text) if "myenv:MyEnv-v0" in a]
    (tmp_path / "myenv.py").write_text(code)
    check = "import gymnasium as gym, myenv; from gymnasium.utils.env_checker import check_env;"
    check += "check_env(gym.make('MyEnv-v0').unwrapped)"
    command = [sys.executable, "-W", "ignore", "-c", check]
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 0
    run, said = train([*argv, *TINY, "--total-timesteps", "300"], tmp_path)
    with open(os.path.join(run, "result.json")) as f:
        result = json.load(f)
    assert result["global_step"] == 300 and result["random_return"] < 40 and "random" in said.splitlines()[-1]
