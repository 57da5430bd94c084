"""Bad inputs and faults of ijepa.py, which has data instead of an environment: the rows of test_faults.py that apply
run here too (they are imported), those about environments are rows about data."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_faults as shared_rows
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import (
    ROOT,
    as_if_unbroken,
    bytes_of,
    finite,
    load,
    next_second,
    only_run,
    outcome,
    same,
    scalars,
    usage_error,
)
from test_readme import unexplained

# Fixtures and rows of test_faults.py, which run on the `script` below because they are names of this module.
ROWS = """
clean
trained
unbroken
test_27_output_folder_is_read_only
test_27_output_is_not_writable
test_28_two_runs_in_the_same_second
test_29_odd_names
test_33_corrupt_checkpoint
test_33_damaged_checkpoint_never_replaces_the_good_one
test_35_finished_run_resumed
test_38_compiled_checkpoint
test_39_two_processes_resume_one_run
test_40_killed_while_saving
test_41_disk_full_at_a_checkpoint
test_41_disk_full_leaves_the_run_resumable
test_43_44_stop_signals
test_44_nohup_keeps_a_run_alive
test_44_other_stop_signals
test_47_48_killed_and_resumed_is_as_if_unbroken
test_59_60_bad_numbers_make_no_step
test_62_flags_are_frozen
test_64_without_optional_blocks
test_65_tracker_gets_the_curves_without_asking_for_a_key
test_65_tracker_is_missing
test_71_reader_of_the_pipe_is_gone
"""
globals().update({name: getattr(shared_rows, name) for name in ROWS.split()})

# As in test_faults.py: tiny is a run of 96 updates with the whole code path.
IJEPA = dict(
    tiny="--preset cpu --no-cuda --image-size 24 --canvas 24 --min-side 16 --patch-size 4 --embed-dim 8 --depth 1 "
    "--num-heads 2 --pred-dim 8 --pred-depth 1 --min-keep 3 --batch-size 4 --total-steps 96 --log-every 16 "
    "--save-every 2 --report-every 0 --probe-images 16 --eval-images 8 --knn-k 3 --crop-scale 0.3,1.0 "
    "--crop-ratio 0.75,1.3333333",
    train_instance=0,
    update=("JepaLearner", "update"),
    plant=lambda learner: learner.model.predictor.predictor_proj.bias,
    term="prediction",
    faults={},
    state="learner rng random images_per_epoch updates global_step",
    resize=("--embed-dim", "8", "16"),
    early=None,
    chatty="",
    flags="allow-overlap arch batch-size bf16 cache canvas checkpoint-activations compile context-scale crop-ratio "
    "crop-scale cuda dataset depth depth-rescale ema embed-dim epochs eval-images evaluate exp-name final-ema final-lr "
    "final-weight-decay game-frames hflip image-size init-from ipe-scale knn-k learning-rate log-every loss "
    "mask-corners mask-group mask-truncate micro-batch min-keep min-side num-heads num-targets num-threads num-workers "
    "patch-init patch-size pred-depth pred-dim predictor-lr preset probe-images probe-lr report-every resume "
    "save-every seed skip-bad start-lr target target-aspect target-knn target-scale torch-deterministic total-steps "
    "track var-coeff wandb-entity wandb-project-name warmup-epochs weight-decay",
)


class DataScript(shared_rows.Script):
    """A script that reads data: its `stub` is a folder of images, and updates are its steps."""

    def __init__(self, pictures):
        self.name, self.path = "ijepa", os.path.join(ROOT, "ijepa.py")
        self.mod = importlib.import_module("ijepa")
        self.__dict__.update(IJEPA)
        self.tiny, self.owner, self.method = self.tiny.split(), self.mod.JepaLearner, "update"
        self.pictures = pictures

    def stub(self, **faults):
        return ["--dataset", self.pictures]

    def call(self, *argv, mod=None):
        return super().call(*("--total-steps" if a == "--total-timesteps" else a for a in argv), mod=mod)

    def start(self, *argv, **more):
        return super().start(*("--total-steps" if a == "--total-timesteps" else a for a in argv), **more)


def write_pictures(folder, n, seed, size=16):
    rng = np.random.default_rng(seed)
    for i, name in enumerate(("dark", "light")):
        os.makedirs(os.path.join(folder, name))
        for k in range(n):
            pixels = rng.integers(100 * i, 100 * i + 150, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(os.path.join(folder, name, f"{k}.png"))


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train", 10, 0)
    write_pictures(folder / "val", 4, 1)
    return DataScript(str(folder))


# ---- Usage errors: one line, exit code 2, nothing created ------------------------------------------------------------

BOXES = [
    ("1-typo", ["--lerning-rate", "1e-3"], ["--learning-rate"]),
    ("2-float", ["--learning-rate", "abc"], ["--learning-rate", "abc"]),
    ("2-int", ["--total-steps", "1e6"], ["--total-steps", "1e6"]),
    ("3-bool", ["--cuda", "False"], ["False"]),
    ("4-stray", ["foo"], ["foo"]),
    ("5-preset", ["--preset", "tiny"], ["full", "cpu"]),
    ("5-arch", ["--arch", "vit_titan"], ["vit_base", "vit_giant"]),
]
USAGE = [
    ("6-steps", ["--total-steps", "0"], ["--total-steps must be at least 1, got 0"]),
    ("6-batch-size", ["--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
    ("6-save-every", ["--save-every", "0"], ["--save-every must be at least 1, got 0"]),
    ("6-epochs", ["--epochs", "0"], ["--epochs must be", "got 0"]),
    ("8-nan", ["--learning-rate", "nan"], ["--learning-rate must be", "got nan"]),
    ("8-minus", ["--predictor-lr", "-1"], ["--predictor-lr must be", "got -1"]),
    ("8-ema", ["--ema", "1.1"], ["--ema must be 0 to 1, got 1.1"]),
    ("8-target", ["--target-knn", "nan"], ["--target-knn must be", "got nan"]),
    ("9-seed", ["--seed", "4294967296"], ["--seed must be 0 to 4294967295, got 4294967296"]),
    ("10-patch", ["--image-size", "18"], ["--image-size 18", "--patch-size 4", "remainder 2"]),
    ("10-grid", ["--image-size", "8"], ["--image-size 8", "fewer than 3 patches"]),
    ("10-heads", ["--num-heads", "3"], ["--embed-dim 8", "--num-heads 3", "remainder 2"]),
    ("10-pred", ["--pred-dim", "9"], ["--pred-dim 9", "--num-heads 2", "remainder 1"]),
    ("10-positions", ["--pred-dim", "6"], ["--pred-dim must be a multiple of 4, got 6"]),
    ("10-group", ["--mask-group", "3"], ["--mask-group 3", "4 images", "remainder 1"]),
    ("10-micro", ["--micro-batch", "3"], ["--micro-batch 3", "--mask-group 4", "remainder 1"]),
    ("10-scale", ["--crop-scale", "0.3"], ["--crop-scale must be two numbers", "'0.3'"]),
    ("10-order", ["--target-scale", "0.3,0.2"], ["--target-scale must be two numbers", "0.3,0.2"]),
    ("10-aspect", ["--target-aspect", "x,2"], ["--target-aspect must be two numbers", "x,2"]),
    ("10-keep", ["--min-keep", "9"], ["--min-keep 9", "grid of 6 x 6"]),
    ("11-batch", ["--batch-size", "32", "--mask-group", "32"], ["--batch-size 32", "20 training images"]),
    ("7-epochs", ["--epochs", "0.01", "--total-steps", "None"], ["--epochs 0.01", "less than one update"]),
    ("29-slash", ["--exp-name", "a/b"], ["--exp-name", "a/b"]),
    ("32-missing", ["--resume", "nowhere"], ["no checkpoint in nowhere"]),
    ("32-evaluate", ["--evaluate", "nowhere"], ["no checkpoint in nowhere"]),
    ("33-init-from", ["--init-from", "nowhere.pt"], ["--init-from nowhere.pt: no such file"]),
    ("68-missing", ["--dataset", "nowhere"], ["--dataset nowhere: no such folder"]),
    ("68-parquet", ["--dataset", "nowhere.parquet"], ["--dataset nowhere.parquet"]),
    ("target", ["--target", "online", "--init-from", "x"], ["--target online", "--init-from"]),
]


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in BOXES])
def test_parser(script, tmp_path, argv, words):
    result = script.call(*argv)
    assert result.code == 2 and "Traceback" not in result.err and os.listdir(tmp_path) == []
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize("argv, words", [pytest.param(a, w, id=i) for i, a, w in USAGE])
def test_usage(script, tmp_path, argv, words):
    usage_error(script, script.run(*argv), words)
    assert os.listdir(tmp_path) == []


def test_68_data_that_cannot_be_used(script, tmp_path):
    """Empty, broken, too small, without labels on one side: said before a run directory is made."""
    check = lambda words, *argv: usage_error(script, script.call(*script.tiny, "--dataset", "data", *argv), words)  # noqa: E731
    os.makedirs("data/train/a")
    check(["--dataset data", "has no images"])
    write_pictures("data/train/b", 3, 0)
    shutil.rmtree("data")
    write_pictures("data/train", 4, 0)
    write_pictures("data/val", 2, 1)
    with open("data/train/dark/2.png", "r+b") as f:
        f.truncate(60)
    check(["cannot read data/train/dark/2.png", "--skip-bad"])
    with open("data/train/dark/2.png", "w") as f:
        f.write("no picture")
    check(["cannot read data/train/dark/2.png"])
    Image.new("RGB", (40, 9)).save("data/train/dark/2.png")
    check(["data/train/dark/2.png is 40 x 9 pixels", "--min-side 16"])
    os.rename("data/val/dark", "data/val/gloomy")
    check(["train and val have different classes", "dark"], "--skip-bad")
    assert sorted(os.listdir(tmp_path)) == ["data"]


@pytest.mark.parametrize("workers", [0, 2])
def test_68_broken_files(script, monkeypatch, workers):
    """What the look at some files did not find ends the run in one line, or is skipped with one warning."""
    write_pictures("data/train", 10, 0)
    write_pictures("data/val", 2, 1)
    with open("data/train/light/7.png", "w") as f:
        f.write("no picture")
    monkeypatch.setattr(script.mod.FileImages, "probe", lambda self: None)
    argv = [*script.tiny, "--dataset", "data", "--num-workers", workers]
    result = script.call(*argv)
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("cannot read data/train/light/7.png")
    shutil.rmtree("runs")
    result = script.call(*argv, "--skip-bad", "--total-steps", 20)
    assert result.code == 0, result.err
    assert result.out.count("warning: --skip-bad") >= 1


def test_packages_that_are_missing(script, tmp_path, monkeypatch):
    for module, dataset, package in (("sklearn", "digits", "scikit-learn"), ("datasets", "hf:x/y", "datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        result = script.call(*script.tiny, "--dataset", dataset)
        usage_error(script, result, [f"--dataset {dataset} needs {package}: pip install {package}"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_32_empty_directory(script, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    usage_error(script, script.call(flag, "empty"), ["no checkpoint in empty"])
    assert os.listdir("empty") == []


def test_usage_errors_of_evaluate(script, trained):
    before = bytes_of(trained)
    for argv, words in (
        (["--seed", "-1"], ["--seed must be 0 to 4294967295, got -1"]),
        (["--depth", "2"], ["--depth is 1", "got 2", "a trained model cannot change it"]),
        (["--dataset", "digits"], ["--dataset digits has 1 colour channels", "trained on 3"]),
    ):
        usage_error(script, script.call("--evaluate", trained, *argv), words)
    assert bytes_of(trained) == before


# ---- Runs that work --------------------------------------------------------------------------------------------------


def test_22_30_no_cuda_and_another_working_directory(script, tmp_path):
    (tmp_path / "näh er").mkdir()
    os.chdir("näh er")
    argv = [a for a in script.tiny if a != "--no-cuda"]
    process = script.start(*argv, *script.stub(), CUDA_VISIBLE_DEVICES="")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.splitlines()[0] == "device: cpu (no CUDA device)", out + err
    assert os.listdir(".") == ["runs"] and os.listdir("..") == ["näh er"]
    os.chdir("/")
    result = script.call("--evaluate", os.path.join(tmp_path, "näh er", "runs", *os.listdir(tmp_path / "näh er/runs")))
    assert result.code == 0, result.err


def test_23_no_compiler(script, unbroken, tmp_path):
    env = dict(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), CC="", CXX="")
    process = script.start(*script.tiny, *script.stub(), "--compile", **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [x for x in (out + err).splitlines() if "warning" in x]
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile does not work here"), lines
    same(load(only_run())["learner"], load(unbroken)["learner"])


def test_25_processes_that_do_not_divide_the_batch(script, tmp_path):
    """Said once, by the first process."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")
    process = script.start(*script.tiny, *script.stub(), launcher=launcher)
    out, err = process.communicate(timeout=120)
    wanted = "--batch-size 4 cannot be split among 3 processes: remainder 1"
    assert process.returncode != 0 and err.count(wanted) == 1 and "runs" not in os.listdir(tmp_path), err


def test_26_43_one_process_of_two_dies_or_is_stopped(script):
    """SIGTERM to torchrun or to one process stops both after the same update, with a checkpoint; after SIGKILL of one
    none is left."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = [*script.tiny, *script.stub(), "--total-steps", 10**6, "--mask-group", 2]
    for name in ("SIGTERM", "SIGTERM to one", "SIGKILL"):
        process = script.start(*argv, launcher=launcher)
        for line in process.stdout:
            if "global_step=32" in line:
                break
        (run,) = os.listdir("runs")
        with open(f"runs/{run}/lock") as f:
            first = int(f.read())
        if name == "SIGTERM":
            process.terminate()
        else:
            children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
            (second,) = {int(x) for x in children.stdout.split()} - {first}
            os.kill(second, signal.SIGKILL if name == "SIGKILL" else signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert ("stopped by signal 15 at step" in out) == (name != "SIGKILL")
        assert process.returncode != 0
        assert not os.path.exists(f"/proc/{first}")
        state = load(f"runs/{run}")
        assert state["global_step"] >= 32 and finite(state["learner"])
        shutil.rmtree("runs")


def test_31_help(script, tmp_path):
    result = script.call("--help")
    assert result.code == 0 and "--mask-group" in result.out and result.err == ""
    assert os.listdir(tmp_path) == []


def test_61_seeds(script, unbroken):
    assert script.run().code == 0
    same(scalars(only_run()), scalars(unbroken))
    same(load(only_run())["learner"], load(unbroken)["learner"])
    shutil.rmtree("runs")
    assert script.run("--seed", "2").code == 0
    mine, theirs = scalars(only_run()), scalars(unbroken)
    losses = [t for t in mine if t.startswith("losses/")]
    assert sum(mine[t] != theirs[t] for t in losses) > len(losses) / 2


def test_workers_change_nothing(script, unbroken):
    """Decoding in other processes gives the same run, bit for bit."""
    assert script.run("--num-workers", 2).code == 0
    same(load(only_run())["learner"], load(unbroken)["learner"])


def test_69_target(script):
    result = script.run("--target-knn", "1.5", "--total-steps", 2)
    assert result.code == 1 and "Traceback" not in result.err
    assert result.out.splitlines()[-1].endswith("target 1.5): missed")
    assert os.path.isfile(os.path.join(only_run(), "result.json"))
    shutil.rmtree("runs")
    result = script.run("--target-knn", "0.0", "--total-steps", 2)
    assert result.code == 0 and result.out.splitlines()[-1].endswith("target 0): reached")


def test_weights_are_evaluated_without_training(script, trained):
    """--init-from with --total-steps 0: what pretrained features are worth on some data."""
    model = load(trained)["learner"]["model"]
    parts = {}
    for k, v in model.items():
        part, _, name = k.partition(".")
        parts.setdefault(part, {})["module." + name] = v
    torch.save(parts | {"epoch": 1}, "official.pth.tar")
    result = script.run("--init-from", "official.pth.tar", "--total-steps", 0)
    assert result.code == 0, result.err
    mine, theirs = outcome(only_run()), outcome(trained)
    assert mine["metrics"] == pytest.approx(theirs["metrics"], abs=1e-6) and mine["updates"] == 0
    assert mine["metrics"] != mine["random"]


# ---- Checkpoints, signals and kills ----------------------------------------------------------------------------------


def test_34_checkpoint_of_another_script(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        torch.save(load(trained, name) | {"script": "other"}, os.path.join(trained, name))
    for flag in ("--resume", "--evaluate"):
        usage_error(script, script.call(flag, trained), ["is not a checkpoint of ijepa.py"])


@pytest.mark.parametrize("flag, old, new", [
    ("--embed-dim", "8", "16"), ("--seed", "1", "2"), ("--batch-size", "4", "2"),
    ("--mask-truncate", "random", "first"),
])  # fmt: skip
def test_34_resume_cannot_change_the_run(script, trained, flag, old, new):
    before = bytes_of(trained)
    usage_error(script, script.call("--resume", trained, flag, new, "--total-steps", "128"), [flag, old, new])
    assert bytes_of(trained) == before


def test_36_malicious_checkpoint(script, trained):
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        state = {"script": script.name, "learner": shared_rows.Payload()}
        torch.save(state, os.path.join(trained, name))
    for flag in ("--resume", "--evaluate"):
        usage_error(script, script.call(flag, trained), ["not a plain checkpoint"])
    assert not os.path.exists("executed")


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
    assert load(only_run())["global_step"] == 4


@pytest.mark.parametrize("when", [1, 3, 96])
def test_47_48_stopped_and_resumed_is_as_if_unbroken(script, unbroken, monkeypatch, when):
    real, calls = script.owner.update, []

    def update(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.owner, "update", update)
    result = script.run("--num-workers", 2)
    assert result.code == 143 and "Traceback" not in result.err, result.err
    assert load(only_run())["global_step"] == when and "--resume" in result.out.splitlines()[-1]
    next_second(only_run())
    result = script.call("--resume", only_run())
    assert result.code == 0, result.err
    as_if_unbroken(script, only_run(), unbroken)


def test_42_disk_full_for_events(script, trained):
    """The logs end with one warning, the run goes on."""
    events = [n for n in os.listdir(trained) if n.startswith("events")]
    limit = max(os.path.getsize(os.path.join(trained, n)) for n in (*events, "ckpt.pt", "ijepa.py")) + 2_000
    flood = "real = mod.Logger.scalars\ndef scalars(self, values, step):\n"
    flood += "    for i in range(60):\n        real(self, {f'x/{i}-{k}': v for k, v in values.items()}, step)\n"
    flood += "mod.Logger.scalars = scalars\nimport resource\n"
    flood += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"
    process = script.start(*script.tiny, *script.stub(), "--log-every", 1, prelude=flood)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert (out + err).count("warning: could not write the logs") == 1
    assert os.path.isfile(os.path.join(only_run(), "result.json"))


# ---- The docs --------------------------------------------------------------------------------------------------------


def test_docs_explain_tags_and_files(script):
    result = script.run("--report-every", 48, "--var-coeff", 0.1)
    assert result.code == 0, result.err
    run = only_run()
    result = script.call("--evaluate", run)
    assert result.code == 0 and "8 held-out images: " in result.out, result.err
    events = EventAccumulator(run)
    events.Reload()
    (tags, files), missing = unexplained("ijepa", run)
    assert len(tags) > 20 and len(files) > 15 and missing == []
    assert {i.step for i in events.Images("eval/masks")} == {48, 96}


def test_result(script, unbroken):
    result = outcome(unbroken)
    assert result["updates"] == result["global_step"] == 96 and result["images"] == 384
    for found in (result["metrics"], result["random"]):
        assert found.keys() == {
            "knn", "knn_last4", "linear", "linear_last4", "feature_std", "rankme", "effective_rank", "target_variance",
            "image_variance",
        }  # fmt: skip
    assert result["score"] == result["metrics"]["knn"] and result["random_score"] == result["random"]["knn"]
    with open(os.path.join(unbroken, "args.json")) as f:
        assert json.load(f)["args"]["dataset"] == script.pictures
