"""How fast a script's update and acting step are, on random data and without an environment.

    python benchmarks/speed.py dreamerv3:size=1m planet_cem --kinds vector image
    python benchmarks/speed.py muzero:preset=atari100k iris diamond genie_lam --kinds image
    python benchmarks/speed.py dreamerv3:size=200m --modes eager compiled --precisions fp32 bf16 --name speed-gpu
    python benchmarks/speed.py dreamerv3:size=1m --vs /elsewhere/dreamerv3.py

A configuration is SCRIPT[:flag=value,...]; `preset=NAME` is a flag too. Each line of the table is measured in a
process of its own. One update is all that the learner's `update` does: losses, one backward, clipping, optimizer;
where networks learn apart from each other it is one update of each. An acting step is the agent's policy for
--num-envs environments, planning or tree search included; of genie_lam.py it is one imagined frame of each.
Columns:

  * ms per update, per acting step: median after a warm-up. On a CPU with one thread it is CPU time, which other
    processes do not lengthen; else wall time, on a GPU between synchronisations.
  * samples/s: rows of the batch per second.
  * memory: peak of the GPU's allocator, on a CPU of the whole process.
  * TFLOP: matrix products and convolutions of one update, counted in eager mode; share: of the rate that the device
    reached in a large matrix product of the same precision, measured here.
  * error: largest relative difference of a loss from the eager float32 process, after the first update and after the
    last one before timing. All start from the same weights, data and random numbers; a sampled latent that falls to
    the other side of a threshold makes it larger than rounding alone.

--vs compares updates of a configuration with those of another file of the same script, for example of an older commit
(git show COMMIT:dreamerv3.py > OLD.py): both live in one process and take turns, so that a busy machine slows down
both; allocator and thread settings are the same for both. The ratio is the median of the pairs' ratios.
"""

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Parser, at_least, fail

WARM_UP = 6  # updates before timing: a CUDA graph is captured at the fourth

# ---- Scripts ---------------------------------------------------------------------------------------------------------
# A script is measured through one function (script, args, obs_space, device) -> model, learner, batch, compile, spaces.


def random_batch(specs, shape, device, highs):
    """{name: shape + row} of random numbers of the types that the script's replay has."""
    import torch

    batch = {}
    for name, (row, dtype) in specs.items():
        size = (*shape, *row)
        if dtype == torch.bool:
            batch[name] = torch.zeros(size, dtype=dtype, device=device)
        elif dtype.is_floating_point:
            batch[name] = torch.randn(size, device=device).to(dtype)
        else:
            batch[name] = torch.randint(0, highs.get(name, 256), size, dtype=dtype, device=device)
    return batch


def dreamerv3_parts(script, args, obs_space, action_space, device):
    import torch

    config = script.make_config(args.size, **{k: getattr(args, k) for k in script.SHAPES})
    discrete, A = hasattr(action_space, "n"), int(getattr(action_space, "n", 0)) or action_space.shape[0]
    with torch.device(device):
        model = script.Dreamer(obs_space, action_space, config)
    shape = args.batch_size, args.batch_length + 1
    specs = script.Replay.specs(obs_space, A, config)
    batch = random_batch(specs, shape, device, {"stoch": config["classes"]})
    if discrete:
        batch["action"] = torch.eye(A, device=device)[torch.randint(0, A, shape, device=device)]
    return model, script.Learner(model, args, device), batch, script.compile_model


def planet_cem_parts(script, args, obs_space, action_space, device):
    import torch

    space, A, shape = obs_space["observation"], action_space.shape[0], (args.batch_length, args.batch_size)
    with torch.device(device):
        model = script.Planet(space, A, args)
    learner = script.Learner(model, args, device)
    learner.agent = agent = script.Agent(model, args, space, device)
    specs = {"obs": (space.shape, getattr(torch, space.dtype.name)), "action": ((A,), torch.float32)}
    batch = random_batch(specs | {"reward": ((), torch.float32)}, shape, device, {})
    batch |= {"action": batch["action"].clamp(-1, 1), "mask": torch.ones(shape, device=device)}
    return model, learner, batch, lambda model, learner: script.compile_model(model, learner, agent)


def muzero_parts(script, args, obs_space, action_space, device):
    """The batch is drawn from a replay full of random rows, without Reanalyse: that is a search of its own."""
    import torch

    space, A, rows, args.num_envs = obs_space["observation"], int(action_space.n), 300, 8
    with torch.device(device):
        model = script.MuZero(space, A, script.network_config(args, space))
    if device.type == "cuda" and model.config["network"] != "mlp":  # as in `train`
        model.bf16 = args.bf16
        model.to(memory_format=torch.channels_last)
    learner = script.Learner(model, args, device)
    learner.agent = agent = script.Agent(model, args, device)
    replay, rng = script.TrajectoryReplay(rows, args, space, A, device), np.random.default_rng(0)
    for t in range(rows):  # episodes of 100 steps
        flags = {k: np.full(8, t % 100 == at) for k, at in (("is_first", 0), ("is_last", 99), ("is_terminal", 99))}
        image, size = space.dtype == np.uint8, (8, *space.shape)
        flags["obs"] = rng.integers(0, 256, size, np.uint8) if image else rng.normal(size=size).astype(np.float32)
        policy = np.full((8, A), 1 / A, np.float32)
        replay.add(np.arange(8), flags | dict(action=rng.integers(A, size=8), policy=policy, reward=rng.normal(size=8)))
    batch, _ = replay.sample(args.batch_size)
    return model, learner, batch, lambda model, learner: script.compile_model(model, learner, agent)


class OneOfEach:
    """A learner of several networks: one update is one of each."""

    def __init__(self, learner):
        self.learner, self.check = learner, learner.check

    def update(self, batches):
        metrics = {}
        for part, batch in batches.items():
            metrics |= self.learner.update(part, batch)
        return metrics


def only_images(script, obs_space):
    if len(next(iter(obs_space.values())).shape) != 3:
        raise ValueError(f"{script.__name__}.py sees images only: --kinds image")


def iris_parts(script, args, obs_space, action_space, device):
    """The batches are drawn from a replay of random episodes; the actor-critic's update imagines its rollout. Encoding
    the replay, once per epoch, is not part of an update."""
    import torch

    only_images(script, obs_space)
    shape, A, N = next(iter(obs_space.values())).shape, int(action_space.n), 2
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = script.Iris(script.iris_config(args, shape[2], A)).eval()
    specs = script.EpisodeReplay.specs(shape, model.tokenizer.num_tokens)
    rows = 2 * (args.batch_length + args.burn_in)  # per environment: two episodes
    replay, rng = script.EpisodeReplay(rows, N, specs, device), np.random.default_rng(0)
    for t in range(rows):
        row = {"obs": rng.integers(0, 256, (N, *shape), np.uint8), "action": rng.integers(A, size=N)}
        last = np.full(N, t % (rows // 2) == rows // 2 - 1)
        replay.add(row | {"reward": rng.integers(-1, 2, N).astype(np.float32), "end": last}, last)
    replay.encode(model.tokenizer, device)
    table, learner = replay.table(), script.Learner(model, args, device)
    batches = {"tokenizer": replay.frames(table, args.tokenizer_batch_size)}
    batches["world_model"] = replay.segments(table, args.batch_size, args.batch_length)
    batches["actor_critic"] = replay.starts(table, args.ac_batch_size, args.burn_in)
    each = OneOfEach(learner)
    each.agent = script.Agent(model, args, device)
    return model, each, batches, lambda model, each: script.compile_model(model, each.learner)


def diamond_parts(script, args, obs_space, action_space, device):
    """The batches are drawn from a replay of random episodes; the actor-critic's update imagines its rollout."""
    import torch

    only_images(script, obs_space)
    shape, N = next(iter(obs_space.values())).shape, 4
    with torch.device(device):
        model = script.Diamond(shape, int(action_space.n), vars(args))
    model.to(memory_format=torch.channels_last)
    replay, everyone, rng = script.FrameReplay(200, N, shape, device), np.arange(N), np.random.default_rng(0)
    frames = lambda: rng.integers(0, 256, (N, *shape), np.uint8)  # noqa: E731
    for _ in range(4):  # episodes of 40 steps
        replay.begin(everyone, frames())
        for _ in range(40):
            actions, rewards = rng.integers(action_space.n, size=N), rng.integers(-1, 2, N)
            replay.add(everyone, actions, rewards, np.zeros(N, bool), frames())
        replay.close(everyone)
    learner = script.Learner(model, args, device)
    learner.begin(replay.batch("begin", args))
    batches = {kind: replay.batch(kind, args) for kind in learner.opts}
    each = OneOfEach(learner)
    each.agent = script.Agent(model, args, device)
    return model, each, batches, lambda model, each: script.compile_model(model, each.learner)


class BothNetworks:
    """V and M: one update is one of each. The dream has a benchmark of its own, world_models.py."""

    def __init__(self, **learners):
        self.learners = learners

    def update(self, batches):
        metrics = {}
        for name, learner in self.learners.items():
            found = learner.update(batches[name])
            metrics |= {k: v for k, v in found.items() if k not in ("c", "h", "grad_norm")}
        return metrics

    def check(self):
        for learner in self.learners.values():
            learner.check()


def ha2018_parts(script, args, obs_space, action_space, device):
    import torch

    only_images(script, obs_space)
    with torch.device(device):
        model = script.VMC(script.config_of(args, action_space))
    T, B, Z, A = args.rnn_batch_length, args.rnn_batch_size, args.latent_size, model.A
    shapes = dict(mu=(T, B, Z), logvar=(T, B, Z), next_mu=(T, B, Z), next_logvar=(T, B, Z), eps=(2, T, B, Z))
    shapes |= dict(action=(T, B, A), reward=(T, B), c=(B, args.rnn_size), h=(B, args.rnn_size))
    rnn = {k: torch.randn(s, device=device) for k, s in shapes.items()}
    rnn |= dict(done=torch.zeros(T, B, device=device), restart=torch.zeros(T, B, device=device))
    size = args.vae_batch_size, 64, 64, 3
    vae = dict(frames=torch.randint(0, 256, size, dtype=torch.uint8, device=device))
    vae["eps"] = torch.randn(args.vae_batch_size, Z, device=device)
    learners = dict(
        vae=script.FitLearner(model, model.vae, script.fit_vae, args, device, args.vae_learning_rate),
        rnn=script.FitLearner(
            model, model.rnn, script.fit_rnn, args, device, args.rnn_learning_rate, args.rnn_grad_clip
        ),
    )

    def compile_(model, both):
        script.compile_world(model, device)
        if device.type == "cuda":
            for learner in both.learners.values():
                learner.update = script.Graphed(learner.update)

    batches = dict(vae=vae, rnn=rnn | dict(seen=torch.ones(T, B, device=device)))
    return model, BothNetworks(**learners), batches, compile_


def genie_lam_parts(script, args, obs_space, action_space, device):
    """One update each of tokenizer, latent action model and dynamics; clips are drawn from a video of noise."""
    import torch

    only_images(script, obs_space)
    shape, length = next(iter(obs_space.values())).shape, 4 * args.seq_len
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = script.Genie(script.genie_config(args, shape[2], int(action_space.n)))

    class Noise:
        frames = torch.randint(0, 256, (length, *shape), dtype=torch.uint8, device=device)

        def clips(self, chosen):
            rows = (chosen * (length - args.seq_len)).astype(np.int64)[:, None] + np.arange(args.seq_len)
            return self.frames[torch.as_tensor(rows, device=device)]

    batches = {p: script.draws(args, p, 0, model, Noise(), 0, 1, device) for p in ("tokenizer", "lam", "dynamics")}
    for part, batch in batches.items():
        batch["lr"] = torch.tensor(script.learning_rate_of(args, part, 1000), device=device)
    learner = script.GenieLearner(model, args, device)
    return model, OneOfEach(learner), batches, lambda model, each: script.compile_genie(model, each.learner)


def imagined_frames(script, model, device, args):
    """The learned world in the place of a policy: the first call gives it its frames, later ones imagine one more."""
    import torch

    world = script.Imagination(model, args)

    def policy(obs, first, state):
        if state is None:
            (frames,) = obs.values()
            world.begin(script.to_video(torch.as_tensor(frames, device=device))[:, None])
        world.step(torch.zeros(len(first), dtype=torch.long, device=device))
        return None, True

    return policy


# Name: (parts, the kinds of observations with which it gets Discrete actions)
SCRIPTS = {
    "dreamerv3": (dreamerv3_parts, {"image"}),
    "planet_cem": (planet_cem_parts, set()),
    "muzero": (muzero_parts, {"vector", "image"}),
    "iris": (iris_parts, {"vector", "image"}),
    "diamond": (diamond_parts, {"vector", "image"}),
    "ha2018_carracing": (ha2018_parts, {"vector", "image"}),
    "genie_lam": (genie_lam_parts, {"vector", "image"}),
}


def split_config(text):
    """ "dreamerv3:size=1m,preset=cpu" -> ("dreamerv3", {"size": "1m", "preset": "cpu"})."""
    name, _, rest = text.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    if any(not equal for _, equal, _ in pairs):
        fail(f"{text}: wanted SCRIPT:flag=value,flag=value")
    if name not in SCRIPTS:
        fail(f"{text}: no script {name}, there are {', '.join(SCRIPTS)}")
    if not (ROOT / f"{name}.py").is_file():
        fail(f"{text}: {name}.py is not in the repository yet")
    return name, {key.replace("-", "_"): value for key, _, value in pairs}


def make_args(script, given, **more):
    """The script's Args with a preset, given flags as text, and settings of the measurement."""
    given = dict(given)
    preset = given.pop("preset", None)
    if preset is not None and preset not in script.PRESETS:
        fail(f"preset={preset}: {script.__name__}.py has {', '.join(script.PRESETS)}")
    values = {}
    for key, text in given.items():
        if key not in script.Args.__dataclass_fields__:
            fail(f"{key}={text}: {script.__name__}.py has no flag --{key.replace('_', '-')}")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return script.Args(**script.PRESETS.get(preset, {}) | values | more)


# ---- One measurement, in its own process -----------------------------------------------------------------------------


def timer(device, threads):
    """(clock, wait): what time is read from, and what is called before reading it."""
    import torch

    if device.type == "cuda":
        return time.perf_counter, torch.cuda.synchronize
    return (time.process_time if threads == 1 else time.perf_counter), lambda: None


def median_seconds(function, device, threads, seconds, least=5):
    """Median time of a call: at least `least` calls, and for `seconds`."""
    clock, wait = timer(device, threads)
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 1000):
        wait()
        start = clock()
        function()
        wait()
        times.append(clock() - start)
    return float(np.median(times))


def matrix_rate(device, precision, threads, seconds=2.0):
    """Floating-point operations per second of a large matrix product; the best of several."""
    import torch

    n = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock, wait = timer(device, threads)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        start = clock()
        for _ in range(3):
            a @ b
        wait()
        best = max(best, 3 * 2 * n**3 / (clock() - start))
    return best


def spaces_of(kind, size, discrete):
    """Observation and action space: an image or 24 numbers; 6 actions, or 6 dimensions of actions."""
    import gymnasium as gym

    if kind == "image":
        obs = gym.spaces.Dict(observation=gym.spaces.Box(0, 255, (size, size, 3), np.uint8))
    else:
        obs = gym.spaces.Dict(observation=gym.spaces.Box(-np.inf, np.inf, (24,), np.float32))
    box = gym.spaces.Box(-1, 1, (6,), np.float32)
    return obs, gym.spaces.Discrete(6) if discrete else box


def make_policy(script, model, learner, device, args, obs_space):
    """The script's policy: obs, first, state -> actions, state. Some take their flags as a third argument."""
    import inspect

    if hasattr(learner, "agent"):
        return lambda obs, first, state: learner.agent.act(obs["observation"], state, first)
    if hasattr(script, "Agent"):
        agent = script.Agent(model, args, obs_space, device)
        return lambda obs, first, state: agent.act(obs, state, first)
    if hasattr(script, "Imagination"):
        return imagined_frames(script, model, device, args)
    extra = [args] if "args" in inspect.signature(script.agent_policy).parameters else []
    return script.agent_policy(model, device, *extra)


def losses_of(output):
    """The metrics that an update returns, as numbers."""
    metrics = output[0] if isinstance(output, tuple) else output
    return {k: float(v) for k, v in metrics.items() if not k.startswith("learning_rate")}


def build(script, order):
    """(args, observation space, model, learner, batch, compile) of a line of the table."""
    import torch

    parts, discrete = SCRIPTS[order["script"]]
    device, threads = torch.device(order["device"]), order["threads"]
    more = dict(bf16=order["precision"] == "bf16", compile=order["mode"] == "compiled", num_threads=threads)
    args = make_args(script, order["given"], **more)
    script.seed_everything(args, device)
    torch.set_num_threads(threads)
    obs_space, action_space = spaces_of(order["kind"], args.image_size, order["kind"] in discrete)
    return args, obs_space, *parts(script, args, obs_space, action_space, device)


def versus(order):
    """CPU seconds per update of a script and of the file order["vs"], in turns: medians, and that of the ratios."""
    spec = importlib.util.spec_from_file_location("the_other_file", order["vs"])
    other = sys.modules["the_other_file"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    times, learners = [], [build(s, order)[3:5] for s in (importlib.import_module(order["script"]), other)]
    end = time.perf_counter() + order["seconds"]
    while len(times) < WARM_UP + 5 or time.perf_counter() < end:
        marks = [time.process_time()]
        for learner, batch in learners:
            learner.update(batch)
            marks.append(time.process_time())
        times.append(np.diff(marks))
    times = np.array(times[WARM_UP:])
    return dict(seconds=np.median(times, 0).tolist(), ratio=float(np.median(times[:, 0] / times[:, 1])))


def one(order):
    """Measure one line; `order` is what `main` writes. Returns a dict of plain numbers."""
    import resource

    import torch

    sys.path.insert(0, str(ROOT))
    device = torch.device("cuda" if order["device"] == "cuda" else "cpu")
    threads, precision, compiled = order["threads"], order["precision"], order.get("mode") == "compiled"
    torch.set_num_threads(threads)
    if order["script"] is None:
        torch.set_float32_matmul_precision("high")  # as the scripts do
        return dict(rate=matrix_rate(device, precision, threads))
    if order.get("vs"):
        return versus(order)
    script = importlib.import_module(order["script"])
    args, obs_space, model, learner, batch, compile_ = build(script, order)
    out = dict(parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    batch_size = getattr(args, "batch_size", None) or args.vae_batch_size
    out["samples"] = batch_size * getattr(args, "batch_length", getattr(args, "seq_len", 1))
    policy, num_envs = make_policy(script, model, learner, device, args, obs_space), order["num_envs"] or args.num_envs
    if compiled:
        import torch._inductor.config

        torch._inductor.config.fallback_random = True  # the random numbers of eager mode, to compare losses
        compile_(model, learner)
    torch.manual_seed(0)
    out["first"] = losses_of(learner.update(batch))
    for _ in range(WARM_UP - 1):
        last = learner.update(batch)
    out["last"] = losses_of(last)
    learner.check(*([last, "the end"] if hasattr(learner, "agent") else []))
    out["seconds_per_update"] = median_seconds(lambda: learner.update(batch), device, threads, order["seconds"])
    if device.type == "cuda":
        out["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        out["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if not compiled:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            learner.update(batch)
        out["flop"] = counter.get_total_flops()
    rng, obs = np.random.default_rng(0), {}
    for key, space in obs_space.items():
        size = num_envs, *space.shape
        value = rng.integers(0, 256, size) if space.dtype == np.uint8 else rng.normal(size=size)
        obs[key] = value.astype(space.dtype)
    state, first = [policy(obs, np.ones(num_envs, bool), None)[1]], np.zeros(num_envs, bool)

    def act():
        state[0] = policy(obs, first, state[0])[1]

    for _ in range(WARM_UP):
        act()
    out["seconds_per_act"] = median_seconds(act, device, threads, order["seconds"] / 2)
    return out | dict(num_envs=num_envs)


# ---- All lines and the table -----------------------------------------------------------------------------------------


def measure(order, timeout):
    """`one` in its own process: (what it returned, None) or (None, what went wrong)."""
    words = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(order)]
    env = os.environ | {k: str(order["threads"]) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"not measured within {timeout:g} s"
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    if done.returncode:
        return None, (done.stderr.strip() or lines[-1]).splitlines()[-1]
    return json.loads(lines[-1]), None


def difference(mine, reference):
    """Largest relative difference of two dicts of losses, and whose it is. Losses near 0 count against 1 % of the
    largest one, not against themselves."""
    floor = 0.01 * max(abs(v) for v in reference.values())
    errors = {k: abs(mine[k] - v) / max(abs(v), floor) for k, v in reference.items()}
    name = max(errors, key=errors.get)
    return errors[name], name


def plan(flags, device):
    """The lines to measure, the eager float32 one of each configuration first: the others are compared with it."""
    orders = []
    for text in flags.configs:
        name, given = split_config(text)
        for kind in flags.kinds:
            for precision in sorted(flags.precisions, reverse=True):
                for mode in sorted(flags.modes, reverse=True):
                    order = dict(config=text, script=name, given=given, kind=kind, precision=precision, mode=mode)
                    orders.append(order | dict(num_envs=flags.num_envs, seconds=flags.seconds))
    common = dict(device=device, threads=flags.threads)
    return [o | common for o in orders]


HEAD = ["script", "observations", "mode", "precision", "parameters", "batch rows", "ms per update", "samples/s"]
HEAD += ["ms per acting step", "environments", "memory, GB", "TFLOP per update", "TFLOP/s", "share", "error", "later"]


def cells_of(row):
    def show(key, form, scale=1.0):
        return "-" if row.get(key) is None else format(row[key] * scale, form)

    error = [f"{row[k]:.1e} ({row[k + '_of']})" if k in row else "-" for k in ("error", "error_later")]
    cells = [row["config"], row["kind"], row["mode"], row["precision"]]
    if row.get("problem"):
        return [*cells, row["problem"], *["-"] * (len(HEAD) - 5)]
    cells += [show("parameters", ",d", 1), show("samples", ",d", 1), show("seconds_per_update", ".2f", 1e3)]
    cells += [show("samples_per_s", ",.0f"), show("seconds_per_act", ".2f", 1e3), show("num_envs", "d", 1)]
    cells += [show("memory_gb", ".2f"), show("flop", ".3g", 1e-12), show("flops", ".3g", 1e-12), show("share", ".1%")]
    return cells + error


def rows_of(orders, results, rates):
    """Lines of the table from what was measured: [(found, problem), ...] in the order of `plan`, rates by precision."""
    rows, references, flops = [], {}, {}
    for order, (found, problem) in zip(orders, results, strict=False):
        group, precision = (order["config"], order["kind"]), order["precision"]
        row = {k: order[k] for k in ("config", "kind", "mode", "precision", "device", "threads")} | {"problem": problem}
        rows.append(row)
        if not found:
            continue
        row |= found
        if order["mode"] == "eager" and precision == "fp32":
            references[group] = found
        flops.setdefault(group, found.get("flop"))
        row["flop"] = flops[group]
        row["samples_per_s"] = found["samples"] / found["seconds_per_update"]
        row["flops"] = row["flop"] / found["seconds_per_update"] if row["flop"] else None
        row["share"] = row["flops"] / rates[precision] if row["flops"] and rates.get(precision) else None
        if group in references and references[group] is not found:
            row["error"], row["error_of"] = difference(found["first"], references[group]["first"])
            row["error_later"], row["error_later_of"] = difference(found["last"], references[group]["last"])
    return rows


def rate_order(device, threads, precision):
    """What `measure` needs to measure the device's matrix rate."""
    return dict(script=None, device=device, threads=threads, precision=precision)


def table_of(rows):
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join(lines + ["| " + " | ".join(cells_of(row)) + " |" for row in rows])


def run_all(orders, timeout):
    """Measure everything; print a line per order as it comes. Returns the rows and the device's matrix rates."""
    print(table_of([]), flush=True)
    results, rates = [], {}
    for order in orders:
        if order["precision"] not in rates:
            found, _ = measure(rate_order(order["device"], order["threads"], order["precision"]), timeout)
            rates[order["precision"]] = found["rate"] if found else None
        results.append(measure(order, timeout))
        print("| " + " | ".join(cells_of(rows_of(orders, results, rates)[-1])) + " |", flush=True)
    return rows_of(orders, results, rates), rates


def compare(orders, timeout):
    """Print CPU milliseconds per update of both files and their ratio; the exit code."""
    print("| script | observations | ms per update | of --vs | ratio |\n|---|---|---|---|---|", flush=True)
    problems = []
    for order in orders:
        found, problem = measure(order, timeout)
        problems += [problem] if problem else []
        cells = (
            [f"{1e3 * x:.2f}" for x in found["seconds"]] + [f"{found['ratio']:.3f}"] if found else [problem, "-", "-"]
        )
        print("| " + " | ".join([order["config"], order["kind"], *cells]) + " |", flush=True)
    print("\n" + hardware("cpu", 1) + ", CPU time")
    return 1 if problems else 0


def hardware(device, threads):
    import platform

    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((x.split(":")[1].strip() for x in f if x.startswith("model name")), name)
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def main():
    parser = Parser(__doc__)
    parser.add_argument("configs", nargs="*", help="SCRIPT[:flag=value,...]")
    parser.add_argument("--kinds", nargs="+", default=["vector", "image"], choices=["vector", "image"])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="default: fp32, on a GPU both")
    parser.add_argument("--no-cuda", action="store_true", help="measure on the CPU")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--num-envs", type=at_least(1), help="environments of an acting step (default: the script's)")
    parser.add_argument("--seconds", type=at_least(0.0, float), default=5.0, help="least time per number (default: 5)")
    parser.add_argument("--timeout", type=at_least(1.0, float), default=900.0, help="seconds per line (default: 900)")
    parser.add_argument("--name", help="also write NAME.md and NAME.csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: benchmarks/results)")
    parser.add_argument(
        "--vs", type=Path, metavar="FILE", help="compare with this file of the script, on one CPU thread"
    )
    parser.add_argument("--one", help="measure one line, given as JSON (used by this program)")
    flags = parser.parse_args()
    if flags.one:
        return print(json.dumps(one(json.loads(flags.one))))
    if not flags.configs:
        fail(f"wanted SCRIPT[:flag=value,...], for example dreamerv3:size=1m; there are {', '.join(SCRIPTS)}")
    if flags.name and Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    import torch

    device = "cuda" if torch.cuda.is_available() and not (flags.no_cuda or flags.vs) else "cpu"
    flags.precisions = flags.precisions or (["fp32", "bf16"] if device == "cuda" else ["fp32"])
    if device == "cpu" and "bf16" in flags.precisions:
        fail("--precisions bf16: the scripts compute in float32 on a CPU")
    sys.path.insert(0, str(ROOT))
    for text in flags.configs:  # wrong flags are found before anything is measured
        name, given = split_config(text)
        make_args(importlib.import_module(name), given)
    if flags.vs:
        if not flags.vs.is_file():
            fail(f"--vs {flags.vs}: no such file")
        flags.modes, flags.threads = ["eager"], 1
        orders = [o | dict(vs=str(flags.vs.resolve())) for o in plan(flags, device)]
        raise SystemExit(compare(orders, flags.timeout))
    rows, rates = run_all(plan(flags, device), flags.timeout)
    rate = ", ".join(f"{v / 1e12:.3g} TFLOP/s in {k}" for k, v in rates.items() if v)
    note = f"{hardware(device, flags.threads)}; large matrix products: {rate}."
    print("\n" + note)
    if flags.name:
        flags.results.mkdir(parents=True, exist_ok=True)
        text = (
            f"# {flags.name}\n\nWritten by `benchmarks/speed.py`; its first lines say what the columns are. {note}\n\n"
        )
        (flags.results / f"{flags.name}.md").write_text(text + table_of(rows) + "\n", encoding="utf-8")
        flat = [{k: v for k, v in r.items() if not isinstance(v, dict)} for r in rows]
        with open(flags.results / f"{flags.name}.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for r in flat for k in r)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
    raise SystemExit(1 if any(r["problem"] for r in rows) else 0)


if __name__ == "__main__":
    main()
