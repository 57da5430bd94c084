"""Model-free baseline: PPO or DQN of stable-baselines3 on exactly the environments of a script.

    python benchmarks/sb3.py --algo ppo --preset cpu_pixels                       # as many agent steps as dreamerv3.py
    python benchmarks/sb3.py --algo ppo --script planet_cem --preset cpu
    python benchmarks/run.py --suite cpu_model_free --workers 2

Environments, wrappers, agent steps, seeds and the final evaluation are the script's with that preset; the algorithm and
its settings are the library's defaults (pip install stable-baselines3), except: PPO collects its 2048 steps in 8
environments, DQN's replay is not larger than the run, and images below 36 pixels, too small for the library's network,
get two 3x3 convolutions. PPO ends with the update in which it reaches its agent steps. A run directory like the
scripts' comes out, so that the runner and the report take it as one more agent.
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import ROOT, Parser, at_least, fail, load_script, random_policy, read_json, read_result, seeds, write_json

ENVIRONMENTS = {"ppo": 8, "dqn": 1}


def make_env(script, args, index, key=0):
    """(environment, seed of its first episode): number `index` of the script's, key 0 for training, 1 for the
    evaluation, 2 for the random baseline."""
    import gymnasium as gym

    (seed,) = seeds(args.seed, key, index, 0, n=1)  # as the scripts' episode_seed
    if hasattr(script, "load"):
        return script.make_env(args, seed), seed
    env = script.make_env(args, index, key)()  # seeds its episodes itself
    if list(env.observation_space) == ["observation"]:
        space = env.observation_space["observation"]
        env = gym.wrappers.TransformObservation(env, lambda o: o["observation"], space)
    return env, seed


def policy_of(space):
    """Name of the library's policy for an observation space, and its settings."""
    import gymnasium as gym
    import torch
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    if isinstance(space, gym.spaces.Dict):
        return "MultiInputPolicy", {}
    if len(space.shape) < 3:
        return "MlpPolicy", {}

    class Small(BaseFeaturesExtractor):
        """Two convolutions and a layer of 128 units; images come as (N, C, H, W) in 0..1."""

        def __init__(self, space):
            super().__init__(space, 128)
            convolutions = [torch.nn.Conv2d(space.shape[0], 16, 3), torch.nn.Conv2d(16, 32, 3)]
            sides = (space.shape[1] - 4) * (space.shape[2] - 4)
            layers = [x for c in convolutions for x in (c, torch.nn.ReLU())]
            self.net = torch.nn.Sequential(
                *layers, torch.nn.Flatten(), torch.nn.Linear(32 * sides, 128), torch.nn.ReLU()
            )

        def forward(self, x):
            return self.net(x)

    return "CnnPolicy", {"features_extractor_class": Small} if space.shape[0] < 36 else {}


def play(script, args, act, key, stop):
    """Returns of one episode in each of --eval-episodes fresh environments, the same as the script's."""
    returns = []
    for i in range(args.eval_episodes):
        (env, seed), total = make_env(script, args, i, key), 0.0
        obs, _ = env.reset(seed=seed)
        for _ in range(args.max_episode_steps or 27_000):
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            total += float(reward)
            if terminated or truncated or stop:
                break
        env.close()
        returns.append(total)
    return returns


def build(algo, script, args, run):
    """The library's model, new or from the run's checkpoint."""
    import stable_baselines3
    from stable_baselines3.common.vec_env import DummyVecEnv

    def maker(index):
        return lambda: make_env(script, args, index)[0]

    try:
        envs = DummyVecEnv([maker(i) for i in range(ENVIRONMENTS[algo])])
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        fail(f"--env-id {args.env_id}: {' '.join(str(e).split())}")
    kind = {"ppo": stable_baselines3.PPO, "dqn": stable_baselines3.DQN}[algo]
    if algo == "dqn" and not hasattr(envs.action_space, "n"):
        fail(f"--algo dqn needs Discrete actions, {args.env_id} has {envs.action_space}")
    device = "auto" if args.cuda else "cpu"
    if run:
        model = kind.load(os.path.join(run, "ckpt.pt"), env=envs, device=device)
        if algo == "dqn":
            model.load_replay_buffer(os.path.join(run, "replay.pkl"))
        return model
    policy, settings = policy_of(envs.observation_space)
    # PPO: 2048 steps between updates, the library's number for one environment, so that small budgets have updates.
    more = (
        dict(buffer_size=min(1_000_000, args.total_timesteps)) if algo == "dqn" else dict(n_steps=2048 // envs.num_envs)
    )
    return kind(policy, envs, seed=args.seed, device=device, policy_kwargs=settings, **more)


def save(model, algo, run):
    """Model and, for DQN, its replay; the checkpoint is the new one or the old one, never half of either."""
    if algo == "dqn":
        model.save_replay_buffer(os.path.join(run, "replay.tmp.pkl"))
        os.replace(os.path.join(run, "replay.tmp.pkl"), os.path.join(run, "replay.pkl"))
    model.save(os.path.join(run, "ckpt.pt.tmp"))
    os.replace(os.path.join(run, "ckpt.pt.tmp"), os.path.join(run, "ckpt.pt"))


def start_run(args, device, resume):
    """Run directory, new or resumed, with args.json; what the report reads of it is as the scripts write it."""
    import gymnasium as gym
    import stable_baselines3
    import torch

    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', args.env_id)}__{args.exp_name}__{args.seed}__{time.time():.0f}"
    run = resume or os.path.join("runs", name)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cpu = subprocess.run(["grep", "-m1", "model name", "/proc/cpuinfo"], capture_output=True, text=True).stdout
    hardware = f"{cpu.split(':')[-1].strip() or platform.machine()}, {torch.get_num_threads()} threads"
    info = dict(script="sb3", command=sys.argv, commit=git.stdout.strip() or "unknown")
    info["hardware"] = torch.cuda.get_device_name() if device.type == "cuda" else hardware
    info["versions"] = {m.__name__: m.__version__ for m in (torch, gym, np, stable_baselines3)}
    try:
        os.makedirs(run, exist_ok=bool(resume))
        write_json(info | {"args": dataclasses.asdict(args) | {"resume": None}}, os.path.join(run, "args.json"))
    except OSError as e:
        fail(f"cannot write {run}: {e}")
    return run


def make_callback(args, algo, run, writer, stop):
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        """Curves under the scripts' names, checkpoints, and the end after a stop signal."""

        def _on_training_start(self):
            self.mark = time.time(), self.num_timesteps, self.model._n_updates
            self.recent = []

        def passed(self, every):
            return self.num_timesteps // every > (self.num_timesteps - self.training_env.num_envs) // every

        def _on_step(self):
            for info in self.locals["infos"]:
                if "episode" in info:
                    self.recent.append(float(np.squeeze(info["episode"]["r"])))
                    length = int(np.squeeze(info["episode"]["l"]))
                    writer.add_scalar("charts/episodic_return", self.recent[-1], self.num_timesteps)
                    writer.add_scalar("charts/episodic_length", length, self.num_timesteps)
            if self.passed(args.log_every):
                now = time.time(), self.num_timesteps, self.model._n_updates
                seconds, steps, updates = (a - b for a, b in zip(now, self.mark))
                self.mark, seconds = now, max(seconds, 1e-9)
                tags = {"SPS": steps / seconds, "updates_per_s": updates / seconds, "updates": now[2]}
                for tag, value in tags.items():
                    writer.add_scalar(f"charts/{tag}", value, self.num_timesteps)
                shown = f"{np.mean(self.recent[-10:]):.1f}" if self.recent else "none yet"
                pace = f"updates={now[2]}, SPS={tags['SPS']:.0f}"
                print(f"global_step={self.num_timesteps}, episodic_return={shown}, {pace}", flush=True)
            if self.passed(args.save_every):
                save(self.model, algo, run)
            return not stop

    return Watch()


def train(flags, script, args):
    """The final metrics; exits with code 1 if they miss the target, 128+n after a stop signal."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    algo, began = flags.algo, time.time()
    if flags.resume and read_result(flags.resume)[0]:
        return print("nothing to do: the run has its result")
    script.seed_everything(args, torch.device("cpu"))
    torch.use_deterministic_algorithms(False)  # the library's operations do not all have a deterministic form
    model = build(algo, script, args, flags.resume)
    run = start_run(args, model.device, flags.resume)
    writer = SummaryWriter(run, purge_step=model.num_timesteps + 1 if flags.resume else None)
    stop = load_script("dreamerv3").stop_signals()  # long scripts have a class of another form
    print(f"run: {run}\nparameters: {sum(p.numel() for p in model.policy.parameters()):,}", flush=True)
    chance = random_policy(model.action_space, args.seed)
    random_returns = play(script, args, lambda obs: chance(obs, None, [True])[0][0], 2, stop)
    left = args.total_timesteps - model.num_timesteps
    if left > 0 and not stop:
        callback = make_callback(args, algo, run, writer, stop)
        model.learn(left, callback=callback, reset_num_timesteps=False)
        save(model, algo, run)
    returns = play(script, args, lambda obs: model.predict(obs, deterministic=algo == "dqn")[0], 1, stop)
    if stop:
        writer.close()
        print(f"stopped by signal {stop[0]} at step {model.num_timesteps}", flush=True)
        raise SystemExit(128 + stop[0])
    score, std, chance = float(np.mean(returns)), float(np.std(returns)), float(np.mean(random_returns))
    writer.add_scalar("eval/episodic_return", score, model.num_timesteps)
    writer.add_scalar("eval/episodic_return_std", std, model.num_timesteps)
    writer.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=chance)
    result |= dict(global_step=model.num_timesteps, updates=model._n_updates, minutes=(time.time() - began) / 60)
    write_json(result | {"run": run}, os.path.join(run, "result.json"))
    target = args.target_return
    verdict = "" if target is None else f", target {target:g}: {'reached' if score >= target else 'missed'}"
    print(f"episodic_return {score:.1f} +- {std:.1f} over {len(returns)} episodes (random {chance:.1f}{verdict})")
    if target is not None and not score >= target:
        raise SystemExit(1)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--algo", choices=list(ENVIRONMENTS), default="ppo")
    parser.add_argument("--script", default="dreamerv3", help="whose environments (default: dreamerv3)")
    parser.add_argument("--preset", default="cpu", help="the script's preset (default: cpu)")
    parser.add_argument("--env-id", help="environment (default: the preset's)")
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--total-timesteps", type=at_least(1), help="agent steps (default: the preset's)")
    parser.add_argument("--num-threads", type=at_least(1), default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--target-return", type=float, help="exit with code 1 if the final evaluation stays below this")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--resume", help="run directory to continue")
    flags = parser.parse_args()
    try:
        import stable_baselines3  # noqa: F401
    except ImportError:
        fail("stable-baselines3 is missing: pip install stable-baselines3")
    script = load_script(flags.script)
    if flags.preset not in script.PRESETS:
        fail(f"--preset {flags.preset}: {flags.script}.py has {', '.join(script.PRESETS)}")
    values = dict(script.PRESETS[flags.preset])
    if flags.resume:
        info = read_json(Path(flags.resume) / "args.json")
        if not info or not (Path(flags.resume) / "ckpt.pt").is_file():
            fail(f"--resume {flags.resume}: no checkpoint there")
        values = info["args"]
        if values.get("exp_name") != f"sb3_{flags.algo}":
            fail(f"--resume {flags.resume} was begun as {values.get('exp_name')}, this is sb3_{flags.algo}")
    values |= dict(preset=flags.preset, seed=flags.seed, exp_name=f"sb3_{flags.algo}", compile=False)
    values |= dict(num_threads=flags.num_threads, cuda=not flags.no_cuda, target_return=flags.target_return)
    values |= {k: v for k in ("env_id", "total_timesteps") if (v := getattr(flags, k)) is not None}
    args = script.Args(**values)
    if args.total_timesteps is None:
        fail(f"--total-timesteps is needed: {flags.script}.py computes its own")
    try:
        json.loads(args.env_kwargs)
        probe, seed = make_env(script, args, 0)
        probe.reset(seed=seed)
        probe.close()
    except Exception as e:
        fail(f"--env-id {args.env_id}: {' '.join(str(e).split())}")
    train(flags, script, args)


if __name__ == "__main__":
    main()
