"""Rules for all scripts of the repository: functions marked `# shared` are the same everywhere, a script is one file,
its header agrees with requirements.txt, importing it does nothing, and nothing silences warnings or unpickles
arbitrary objects."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = sorted(os.path.join(ROOT, n) for n in os.listdir(ROOT) if n.endswith(".py"))
each_script = pytest.mark.parametrize("path", [pytest.param(p, id=os.path.basename(p)) for p in SCRIPTS])


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def shared(path):
    """{name: source text} of the top-level functions and classes whose first line says `# shared`."""
    source, found = read(path), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
            if "# shared" in source.splitlines()[node.lineno - 1]:
                found[node.name] = text
    return found


def drifted(paths):
    """[(name, files with one text, files with another, ...)] of everything shared that has two texts."""
    texts = {}
    for path in paths:
        for name, text in shared(path).items():
            texts.setdefault(name, {}).setdefault(text, []).append(os.path.basename(path))
    return [(name, *versions.values()) for name, versions in texts.items() if len(versions) > 1]


def unmarked(paths):
    """[(name, file)]: top-level definitions named like a shared one, but without the mark (but for the interface)."""
    names = {name for path in paths for name in shared(path)} - INTERFACE
    tops = {
        p: {n.name for n in ast.parse(read(p)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} for p in paths
    }
    names -= HOMONYMS
    return [(name, os.path.basename(p)) for p in paths for name in sorted(names & tops[p] - set(shared(p)))]


# What every script has under the same name and fills in its own way: how it is used, not what it is made of.
INTERFACE = set(
    "Args main train evaluate_run report check_args probe_env load_agent agent_policy DreamEnv open_loop play "
    "count_params".split()
)
# Functions of the algorithms that bear one name in the literature but are two: IRIS's codes are nearest by distance and
# its loss is a function of its own; Genie's are nearest by cosine, and the loss comes with them. Random play of World
# Models holds its actions, elsewhere it draws new ones at every step.
HOMONYMS = {"vector_quantize", "random_policy"}


def two_meanings(paths):
    """Names of top-level definitions with different texts in different scripts, but for the interface and homonyms."""
    texts = {}
    for path in paths:
        source = read(path)
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                texts.setdefault(node.name, set()).add(ast.get_source_segment(source, node))
    return sorted(name for name, found in texts.items() if len(found) > 1 and name not in INTERFACE | HOMONYMS)


def test_shared_functions_are_the_same_in_every_script():
    assert any(shared(path) for path in SCRIPTS)
    assert drifted(SCRIPTS) == [] and unmarked(SCRIPTS) == []


def test_one_name_has_one_meaning():
    assert two_meanings(SCRIPTS) == []


def test_drift_is_noticed(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(
        "def fail(m):  # shared\n    exit(2)\n\n\nclass A:  # shared\n    x = 1\n\n\ndef own():\n    return 1\n"
    )
    two.write_text(one.read_text().replace("return 1", "return 2"))
    assert drifted([one, two]) == [] and unmarked([one, two]) == []
    assert two_meanings([one, two]) == ["own"]
    two.write_text(one.read_text().replace("exit(2)", "exit(1)"))
    assert drifted([one, two]) == [("fail", ["one.py"], ["two.py"])]
    two.write_text("import functools\n\n\n@functools.cache\n" + one.read_text())
    assert [name for name, *_ in drifted([one, two])] == ["fail"]  # a decorator is part of it
    two.write_text(one.read_text().replace("class A:  # shared\n    x = 1", "class A:\n    x = 2"))
    assert drifted([one, two]) == [] and unmarked([one, two]) == [("A", "two.py")]


def imported(source):
    """First parts of the names of all modules a source imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {(node.module or "").split(".")[0]} if not node.level else {a.name for a in node.names} | {node.module}
            )
    return found


@each_script
def test_a_script_is_one_file(path):
    local = {
        n.removesuffix(".py") for n in os.listdir(ROOT) if n.endswith(".py") or os.path.isdir(os.path.join(ROOT, n))
    }
    assert not imported(read(path)) & local, "imports another file of the repository"


def test_imports_are_found():
    assert imported("import a.b\ndef f():\n    from c import d\nfrom . import e") >= {"a", "c", "e"}


def requirements(text):
    """{package: extras and specifiers} without comments and blanks; names as pip compares them."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", line).groups() for line in lines if line)
    return {re.sub(r"[-_.]+", "-", name).lower(): re.sub(r"\s", "", rest) for name, rest in pairs}


def header(path):
    """The PEP 723 header as a dict, None without one."""
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", read(path), re.M)
    lines = block[1].splitlines(True) if block else []
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in lines)) if block else None


@each_script
def test_header_agrees_with_requirements(path):
    assert header(path), "no PEP 723 header"
    assert header(path)["requires-python"] == ">=3.11,<3.14"
    mine = requirements("\n".join(header(path)["dependencies"]))
    pinned = requirements(read(os.path.join(ROOT, "requirements.txt")))
    assert mine and mine == {name: pinned.get(name) for name in mine}


@each_script
def test_header_names_what_is_imported(path):
    """Packages that are imported at the top of the file are dependencies."""
    top = [n for n in ast.parse(read(path)).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {{"PIL": "pillow"}.get(n, n) for n in imported("\n".join(map(ast.unparse, top)))} - set(
        sys.stdlib_module_names
    )
    assert "torch" in names and names <= set(requirements("\n".join(header(path)["dependencies"])))


CHECK = """
import os, sys, threading, warnings
before, env, filters = set(os.listdir(".")), dict(os.environ), len(warnings.filters)
import torch, gymnasium, signal
made = []
gymnasium.make = gymnasium.Env.__init__ = lambda *a, **k: made.append(a)
handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
random_state = torch.get_rng_state()
import importlib
importlib.import_module(sys.argv[1])
assert not made, "made an environment"
assert not torch.cuda.is_initialized(), "started CUDA"
assert set(os.listdir(".")) == before == set(), "wrote files"
assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], "changed signal handlers"
assert torch.equal(random_state, torch.get_rng_state()), "drew random numbers"
assert threading.active_count() == 1, "started threads"
print("nothing happened")
"""


@each_script
def test_importing_has_no_side_effects(path, tmp_path):
    name = os.path.basename(path).removesuffix(".py")
    env = os.environ | {"PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK, name], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing happened\n", "")


FORBIDDEN = [
    r"weights_only\s*=\s*False",
    r"filterwarnings\(\s*[\"']ignore[\"']\s*\)",
    r"simplefilter\(\s*[\"']ignore[\"']\s*\)",
]


@each_script
def test_forbidden_calls(path):
    source = read(path)
    assert not [pattern for pattern in FORBIDDEN if re.search(pattern, source)]
    loads = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    for call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), (
            "torch.load without weights_only"
        )


def test_forbidden_calls_are_found():
    bad = "torch.load(p, weights_only = False); warnings.filterwarnings('ignore'); warnings.simplefilter(\"ignore\")"
    assert all(re.search(pattern, bad) for pattern in FORBIDDEN)
    assert not any(
        re.search(pattern, 'warnings.filterwarnings("ignore", category=UserWarning)') for pattern in FORBIDDEN
    )


def test_ruff_finds_nothing():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
