"""Returns of fresh episodes of trained agents, beside the random policy on the same episodes.

    python benchmarks/evaluate.py runs/NAME --episodes 20 --video

Every episode has its own environment and a seed that follows from --seed, so that two runs meet the same episodes; none
of the seeds is one of training's. Written into each run: eval-STEP.json, with --greedy eval-STEP-greedy.json, and with
--video eval-episode.gif: the first episode as the environment draws it, or its numbers as bars with their names.

Board games are played against --opponent, from either seat by chance: random, one_ply (wins at once or prevents a loss
at once if it can) or perfect (tic-tac-toe only). A return is 1 for a win, 0 for a draw, -1 for a loss.

Exit code 1 if a run's mean stays below --target-return. Spreads behind +- are standard deviations over episodes; the
standard error (se) says how exactly the mean of the random policy is known.
"""

import inspect
import os

import boards
import common
import numpy as np
from common import at_least, fail, random_policy, stack
from pictures import picture, save_gif

KEY = 7_001  # of the seeds of episodes
LIMIT = 27_000  # steps of an episode where the environment has no limit (30 minutes of an Atari game)
VIDEO = 1_000  # most frames of --video


def play(envs, act, env_seeds, name, video=False):
    """One episode in each environment, in lockstep: returns, lengths, pictures of the first. Environments whose episode
    is over are not stepped any more; the agent goes on seeing their last observation."""
    observations = [env.reset(seed=s)[0] for env, s in zip(envs, env_seeds, strict=True)]
    returns, lengths, alive = np.zeros(len(envs)), np.zeros(len(envs), int), np.ones(len(envs), bool)
    frames = [picture(envs[0], observations[0])] if video else []
    state, progress = None, common.Progress()
    for step in range(LIMIT):
        actions, state = act(stack(observations), state, np.full(len(envs), step == 0))
        for i in np.flatnonzero(alive):
            observations[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += float(np.asarray(reward).item())
            lengths[i] += 1
            alive[i] = not (terminated or truncated)
            if i == 0 and 0 < len(frames) < VIDEO:
                frames.append(picture(envs[0], observations[0]))
        if not alive.any():
            break
        done = f"mean return so far {returns[~alive].mean():.1f}" if not alive.all() else "none has ended yet"
        progress(f"{name}: step {step + 1}, {(~alive).sum()} of {len(envs)} episodes over, {done}")
    if alive.any():
        print(f"{name}: {alive.sum()} episodes had no end and were cut after {LIMIT} steps")
    return returns, lengths, frames


def standard_error(returns):
    """Of the mean; None for a single episode."""
    return float(np.std(returns, ddof=1) / np.sqrt(len(returns))) if len(returns) > 1 else None


def policy_of(agent, args, run):
    """agent.act with the settings of the command line."""
    settings = {"greedy": args.greedy}
    if args.temperature is not None:
        if "temperature" not in inspect.signature(agent.act).parameters:
            fail(f"--temperature: the agent of {run} has none")
        settings["temperature"] = args.temperature
    return lambda obs, state, first: agent.act(obs, state, first, **settings)


def evaluate(run, args, device):
    """Play, write and print; returns the mean."""
    script, agent = common.load_run(run, device, instead="evaluate")
    act, env_seeds = policy_of(agent, args, run), common.seeds(args.seed, KEY, n=args.episodes)
    more = {"opponent": boards.opponent(script, agent.args.env_id, args.opponent)} if args.opponent else {}
    envs = [script.make_env(agent.args, seed=s, **more) for s in env_seeds]
    try:
        agent.seed(args.seed)
        returns, lengths, frames = play(envs, act, env_seeds, run, args.video)
        chance = random_policy(envs[0].action_space, (args.seed, KEY))
        random_returns, *_ = play(envs, chance, env_seeds, "random policy")
    finally:
        for env in envs:
            env.close()
    mean, std = float(returns.mean()), float(returns.std())
    result = dict(episodic_return=mean, episodic_return_std=std, standard_error=standard_error(returns))
    result |= dict(returns=returns.tolist(), lengths=lengths.tolist(), random_return=float(random_returns.mean()))
    result |= dict(random_standard_error=standard_error(random_returns), random_returns=random_returns.tolist())
    result |= dict(env_id=agent.args.env_id, global_step=agent.global_step, seed=args.seed, greedy=args.greedy)
    result |= dict(temperature=args.temperature, opponent=args.opponent)
    name = f"eval-{agent.global_step}" + "-greedy" * args.greedy
    name += f"-temperature-{args.temperature:g}" if args.temperature is not None else ""
    name += f"-{args.opponent}" if args.opponent else ""
    common.write_json(result, os.path.join(run, name + ".json"))
    if args.video:
        save_gif(frames, path := os.path.join(run, "eval-episode.gif"), fps=15)
        print(f"wrote {path}: the first episode" + (f", its first {VIDEO} frames" if len(frames) == VIDEO else ""))
    print(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    error = "" if len(returns) == 1 else f" +- {result['random_standard_error']:.1f} se"
    line = f"{run}: episodic_return {mean:.1f} +- {std:.1f} (random {random_returns.mean():.1f}{error}"
    if args.target_return is not None:
        line += f", target {args.target_return:g}: {'reached' if mean >= args.target_return else 'missed'}"
    print(line + ")", flush=True)
    return mean


def main(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--episodes", type=at_least(1), default=10, help="of each run (default: 10)")
    parser.add_argument("--greedy", action="store_true", help="the most likely actions instead of sampled ones")
    parser.add_argument("--temperature", type=at_least(0, float), help="of the policy, for agents that have one")
    parser.add_argument("--opponent", choices=["random", "one_ply", "perfect"], help="board games: whom it meets")
    parser.add_argument("--video", action="store_true", help="also write the first episode as a GIF")
    parser.add_argument("--target-return", type=float, help="exit with code 1 below this mean")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the episodes and the policy (default: 0)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not os.access(run, os.W_OK):
            fail(f"{run}: no such folder, or it cannot be written to")
    means = [evaluate(run, args, common.choose_device(args.no_cuda)) for run in args.runs]
    return int(args.target_return is not None and not min(means) >= args.target_return)


if __name__ == "__main__":
    common.run_tool(main)
