"""Play any environment into a file of frames and actions, or into a folder of images.

    python benchmarks/record.py pong.npz --env-id ALE/Pong-v5 --timesteps 10000
    python benchmarks/record.py breakout.npz --env-id MinAtar/Breakout-v1 --policy scripted
    python benchmarks/record.py cartpole.npz --policy runs/NAME                # the run's environment and agent
    python benchmarks/record.py games/train/pong/ --env-id ALE/Pong-v5 --every 4     # a class folder for ijepa.py

OUT.npz (compressed, plain arrays) has n rows, as all scripts read them; the rows of an episode follow each other:

    frames   (n, height, width, 1 or 3) uint8     the environment at time t
    actions  (n,) int64, or (n, A) float32        the action taken at frames[t]; it led to frames[t+1]
    rewards  (n,) float32                         the reward of that action
    ends     (n,) bool                            that action terminated the episode: frames[t+1] is its last frame
    lasts    (n,) bool                            frames[t] is the last frame of an episode; its action, reward and end
                                                  are zeros, and frames[t+1] begins another episode

So an episode of T actions has T + 1 rows. One that was truncated, or cut because --timesteps were over, has a last
frame and no end. The environments' rows stand one environment after the other.

Frames are the images that the script's make_env gives, of stacked frames the newest; where it gives none, the
environment's own picture, resized. --policy module:function plays function(env, observation, rng) -> action.
"""

import dataclasses
import importlib
import json
import os
import shutil
from pathlib import Path

import common
import numpy as np
from common import at_least, fail, stack
from pictures import is_image, last_frame, parts, rendered
from PIL import Image

KEY = 7_002  # of the seeds of episodes
COLUMNS = ("frames", "actions", "rewards", "ends", "lasts")


def breakout_player(env, obs, rng):
    """MinAtar Breakout: stay below the ball. One action in ten is random, so that others can learn what to do then."""
    game = env.unwrapped.game.env
    target = int(np.clip(game.ball_x + (1 if game.ball_dir in (1, 2) else -1), 0, 9))  # where it will be
    action = 1 if target < game.pos else 2 if target > game.pos else 0
    return int(rng.integers(3)) if rng.random() < 0.1 else action


SCRIPTED = {"MinAtar/Breakout-v1": breakout_player}  # --policy scripted, by --env-id


def scripted(args):
    """The player that --policy names, or None."""
    if args.policy == "scripted":
        if args.env_id not in SCRIPTED:
            fail(f"--policy scripted knows {', '.join(SCRIPTED)}, not {args.env_id}: give a module:function")
        return SCRIPTED[args.env_id]
    module, _, function = args.policy.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        fail(f"--policy {args.policy}: neither random, scripted, a run directory nor module:function ({e})")


def scripted_policy(player, envs, seed):
    """A player of single environments with the signature of an agent's `act`."""
    rng = np.random.default_rng(seed)

    def act(obs, state, first):
        return np.array([player(env, common.pick(obs, i), rng) for i, env in enumerate(envs)]), state

    return act


def script_args(script, args):
    """The script's Args for --env-id, with images."""
    known = {f.name for f in dataclasses.fields(script.Args)}
    wanted = dict(env_id=args.env_id, env_kwargs=args.env_kwargs, pixels=True, seed=args.seed)
    wanted |= {"image_size": args.image_size} if args.image_size else {}
    return script.Args(**{k: v for k, v in wanted.items() if k in known})


def build(script, args, env_seeds):
    try:
        return [script.make_env(args, seed=s) for s in env_seeds]
    except Exception as e:  # of whatever package the environment comes from
        fail(f"--env-id {args.env_id}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")


def prepare(args):
    """(environments, their seeds, policy) of the command line."""
    env_seeds = common.seeds(args.seed, KEY, n=args.num_envs)
    if os.path.isdir(args.policy):
        if args.env_id or args.env_kwargs != "{}" or args.script:
            fail("--policy RUN plays the run's own environment: leave out --env-id, --env-kwargs and --script")
        instead = f"record {args.out} --evaluate"
        script, agent = common.load_run(args.policy, common.choose_device(args.no_cuda), instead)
        agent.seed(args.seed)
        return build(script, agent.args, env_seeds), env_seeds, agent.act
    if not args.env_id:
        fail("--env-id is needed, or --policy RUN")
    player = None if args.policy == "random" else scripted(args)
    script = common.load_script(args.script or "dreamerv3")
    if not hasattr(script, "load"):
        hint = f": python {script.__name__}.py --record" if hasattr(script.Args, "record") else ""
        fail(f"--script: {script.__name__}.py does not offer its make_env to the tools yet{hint}")
    envs = build(script, script_args(script, args), env_seeds)
    if player:
        return envs, env_seeds, scripted_policy(player, envs, args.seed)
    return envs, env_seeds, common.random_policy(envs[0].action_space, args.seed)


def frame_of(env, obs, size):
    """What is recorded of one observation: (height, width, 1 or 3) uint8."""
    images = [last_frame(v) for *_, v in parts(env.observation_space, obs) if is_image(v)]
    frame = images[0] if images else rendered(env)
    if frame is None:
        fail("nothing to record: the environment gives no images and draws none")
    size = size or (None if images else 64)
    if size and frame.shape[:2] != (size, size):
        flat = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
        frame = np.asarray(flat.resize((size, size), Image.BILINEAR)).reshape(size, size, -1)
    return frame.copy()


def play(envs, env_seeds, act, timesteps, size):
    """Columns of the file, and the returns of the episodes that came to an end."""
    N, space = len(envs), envs[0].action_space
    obs = [env.reset(seed=s)[0] for env, s in zip(envs, env_seeds, strict=True)]
    frames = [frame_of(env, o, size) for env, o in zip(envs, obs, strict=True)]
    rows, first, state = [[] for _ in envs], np.ones(N, bool), None
    sums, returns, steps, progress = np.zeros(N), [], -(-timesteps // N), common.Progress()
    nothing = np.zeros(space.shape, space.dtype)
    for step in range(steps):
        actions, state = act(stack(obs), state, first)
        for i, env in enumerate(envs):
            obs[i], reward, terminated, truncated, _ = env.step(actions[i])
            reward, before = float(np.asarray(reward).item()), frames[i]
            frames[i], first[i] = frame_of(env, obs[i], size), terminated or truncated
            rows[i].append((before, actions[i], reward, terminated, False))
            sums[i] += reward
            if first[i] or step == steps - 1:
                rows[i].append((frames[i], nothing, 0.0, False, True))
            if first[i]:
                returns.append(sums[i])
                obs[i], _ = env.reset()
                frames[i], sums[i] = frame_of(env, obs[i], size), 0.0
        progress(f"{(step + 1) * N} of {steps * N} steps, {len(returns)} episodes over")
    action = np.int64 if hasattr(space, "n") else np.float32
    kinds = (np.uint8, action, np.float32, bool, bool)
    columns = zip(*[row for stream in rows for row in stream])
    return {k: np.array(c, kind) for k, kind, c in zip(COLUMNS, kinds, columns)}, returns


def write(data, out, every):
    """The file or folder, whole or not at all."""
    temp = Path(f"{out}.tmp")
    try:
        temp.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npz":
            with open(temp, "wb") as f:
                np.savez_compressed(f, **data)
                f.flush()
                os.fsync(f.fileno())
        else:
            temp.mkdir()
            for i, frame in enumerate(data["frames"][::every]):
                Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame).save(temp / f"{i:07d}.png")
        os.replace(temp, out)
    except OSError as e:
        raise SystemExit(f"could not write {out} ({type(e).__name__}: {e})") from None
    finally:
        shutil.rmtree(temp) if temp.is_dir() else temp.unlink(missing_ok=True)


def main(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="OUT.npz, or OUT/ for a folder of images")
    parser.add_argument("--env-id", help="any that the script can play")
    parser.add_argument("--env-kwargs", default="{}", help="JSON object passed to gymnasium.make")
    parser.add_argument("--policy", default="random", help="random (default), scripted, module:function, or a RUN")
    parser.add_argument("--timesteps", type=at_least(1), default=10_000, help="agent steps of all (default: 10000)")
    parser.add_argument("--num-envs", type=at_least(1), default=1, help="environments in lockstep (default: 1)")
    parser.add_argument("--image-size", type=at_least(2), help="frames of this size (default: the script's)")
    parser.add_argument("--every", type=at_least(1), help="of a folder: keep every n-th frame (default: all)")
    parser.add_argument("--script", help="whose make_env builds the environment (default: dreamerv3)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of environments and policy (default: 0)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in (".npz", "") or (out.suffix and args.out.endswith("/")):
        fail(f"OUT must end in .npz, or in / for a folder of images, got {args.out}")
    if out.exists():
        fail(f"{out} exists already")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        fail(f"{out}: {above} is no folder, or it cannot be written to")
    if args.every and out.suffix:
        fail("--every is for a folder of images: files keep every frame")
    try:
        if not isinstance(json.loads(args.env_kwargs), dict):
            raise ValueError("not an object")
    except ValueError as e:
        fail(f"--env-kwargs must be a JSON object, got {args.env_kwargs} ({e})")
    envs, env_seeds, act = prepare(args)
    try:
        data, returns = play(envs, env_seeds, act, args.timesteps, args.image_size)
    finally:
        for env in envs:
            env.close()
    write(data, out, args.every or 1)
    mean = f", mean return of the {len(returns)} that ended {np.mean(returns):.1f}" if returns else ""
    shape = "x".join(map(str, data["frames"].shape[1:]))
    print(
        f"wrote {(~data['lasts']).sum()} steps in {data['lasts'].sum()} episodes, frames {shape}{mean}, to {args.out}"
    )
    return 0


if __name__ == "__main__":
    common.run_tool(main)
