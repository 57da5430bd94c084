"""How much faster are tdmpc2.py's plans and updates than the authors' code?

    git clone https://github.com/nicklashansen/tdmpc2 && pip install tensordict
    python benchmarks/tdmpc2_peer.py tdmpc2            # size 5M, 24 observations and 6 actions, as walker-walk

Both have the same weights (the authors' are loaded by name), batches and allocator settings, run eagerly in one process
on one thread, and take turns; CPU time. The authors' code asks for a GPU: its device is replaced while it is imported.
First the losses of one update of both, which must agree but for dropout and the pairs of Qs that are drawn."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from common import ROOT, Parser, at_least, fail

sys.path.insert(0, str(ROOT))
import tdmpc2  # noqa: E402

# Their config.yaml, flattened, with what their parser adds for a task.
CONFIG = dict(
    obs="state", episodic=False, multitask=False, compile=False, mpc=True, batch_size=256, reward_coef=0.1,
    value_coef=0.1, termination_coef=1, consistency_coef=20, rho=0.5, lr=3e-4, enc_lr_scale=0.3, grad_clip_norm=20,
    tau=0.01, discount_denom=5, discount_min=0.95, discount_max=0.995, iterations=6, num_samples=512, num_elites=64,
    num_pi_trajs=24, horizon=3, min_std=0.05, max_std=2, temperature=0.5, log_std_min=-10, log_std_max=2,
    entropy_coef=1e-4, num_bins=101, vmin=-10, vmax=10, bin_size=0.2, num_enc_layers=2, enc_dim=256, num_channels=32,
    mlp_dim=512, latent_dim=512, task_dim=0, num_q=5, dropout=0.01, simnorm_dim=8, episode_length=500,
    obs_shape={"state": (24,)}, action_dim=6, tasks=["walker-walk"],
)  # fmt: skip


def load_peer(folder):
    """The authors' agent on a CPU, from a clone of their repository."""
    folder = Path(folder) / "tdmpc2"
    if not (folder / "common" / "world_model.py").is_file():
        fail(f"{folder.parent} is not a clone of nicklashansen/tdmpc2")
    if importlib.util.find_spec("tensordict") is None:
        fail("the authors' code needs tensordict: pip install tensordict")
    common = ModuleType("common")
    common.__path__ = [str(folder / "common")]
    mine, sys.modules["common"] = sys.modules["common"], common
    changes = {
        "cuda:0": "cpu",
        "capturable=True": "capturable=False",
        "WorldModel(cfg).to(self.device)": "WorldModel(cfg)",
    }
    modules = {}
    for name in ("math", "init", "layers", "scale", "world_model", "tdmpc2"):
        path = folder / f"{name}.py" if name == "tdmpc2" else folder / "common" / f"{name}.py"
        source = path.read_text(encoding="utf-8")
        for old, new in changes.items():
            source = source.replace(old, new)
        module = modules[name] = ModuleType(f"common.{name}" if name != "tdmpc2" else "peer")
        sys.modules[module.__name__] = module
        setattr(common, name, module)
        exec(compile(source, str(path), "exec"), module.__dict__)
    sys.modules["common"] = mine
    config = type("Config", (dict,), {"__getattr__": dict.__getitem__, "__setattr__": dict.__setitem__})(CONFIG)
    return modules["tdmpc2"].TDMPC2(config)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("peer", metavar="FOLDER", help="clone of nicklashansen/tdmpc2")
    parser.add_argument("--pairs", type=at_least(1), default=9, help="measured pairs (default: 9)")
    flags = parser.parse_args(argv)
    args, cpu = tdmpc2.Args(num_threads=1), torch.device("cpu")
    tdmpc2.seed_everything(args, cpu)
    torch.use_deterministic_algorithms(False)
    peer = load_peer(flags.peer)
    model = tdmpc2.WorldModel(tdmpc2.spaces.Box(-1, 1, (24,), np.float32), 6, tdmpc2.model_config(args))
    model.load_state_dict(tdmpc2.rename(peer.model.state_dict(), model))
    learner = tdmpc2.Learner(model, args, 0.99, cpu)
    obs, action = torch.randn(4, 256, 24), torch.rand(4, 256, 6) * 2 - 1
    reward, over = torch.rand(4, 256), torch.zeros(4, 256, dtype=torch.bool)
    now, mean = torch.randn(1, 24), torch.zeros(1, 3, 6)

    def their_update():
        return peer._update(obs, action[:-1], reward[1:, :, None], over[1:, :, None].float())

    def our_update():
        return learner.update({"obs": obs, "action": action, "reward": reward, "terminated": over})

    @torch.no_grad()
    def our_plan():
        return tdmpc2.plan(model, model.encoder(now), mean, args, 0.99)

    theirs, ours = their_update(), our_update()
    for name in ("consistency", "reward", "value"):
        pair = float(theirs[f"{name}_loss"]), float(ours[name])
        print("{} loss of the first update: authors {:.6f}, here {:.6f}".format(name, *pair))
    print("\n| what | authors, ms | here, ms | ratio (range over pairs) |\n|---|---|---|---|")
    pairs = {"plan": (lambda: peer._plan(now, t0=True), our_plan), "update": (their_update, our_update)}
    for name, functions in pairs.items():
        times = np.zeros((flags.pairs + 2, 2))
        for row in times:
            for i, function in enumerate(functions):
                start = time.process_time()
                function()
                row[i] = time.process_time() - start
        (a, b), ratio = np.median(times[2:], 0) * 1e3, times[2:, 1] / times[2:, 0]
        print(f"| {name} | {a:.0f} | {b:.0f} | {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
