"""Play inside the dream of a trained run with the keyboard, or watch its agent there.

    python benchmarks/play.py runs/NAME

The picture is what the model dreams; the line below it shows the dreamed reward and how sure the model is that the
episode goes on. The keys are printed at the start; m hands over to the run's agent and back. Where there is no display
(or with --gif) RUN/eval-dream.gif is written instead: the agent acting in the dream, --steps steps, one dream after
another.

Runs of a board game are played in the terminal, you against the agent.
"""

import os
import sys

import boards
import numpy as np
from common import Parser, Progress, at_least, choose_device, fail, load_run, run_tool, stack
from dream_env import DreamEnv
from pictures import caption, draw, save_gif

KEYS = "1234567890abcdefghijklnopqrstuvwxyz"  # m is taken


class Game:
    """Dreams one after another, with the agent at hand."""

    def __init__(self, env, seed):
        self.env, self.dream = env, 0
        self.begin(seed)

    def begin(self, seed=None):
        self.obs, _ = self.env.reset(seed=seed)
        self.dream, self.score, self.over = self.dream + 1, 0.0, False
        self.memory = self.env.memory
        self.text = "begins after real experience"

    def agent_action(self):
        """NOTE: asked for at every step, also while a human plays: agents with a memory must see everything."""
        if hasattr(self.env.agent, "dream_space"):  # it cannot act on latents
            return self.env.action_space.sample()
        first = np.array([self.memory is None and self.env.steps == 0])
        with self.env.noise():
            actions, self.memory = self.env.agent.act(stack([self.obs]), self.memory, first)
        return actions[0]

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.score, self.over = self.score + reward, terminated or truncated
        self.text = f"step {self.env.steps}  reward {reward:.1f}  sum {self.score:.1f}  goes on {info['continue']:.2f}"

    def picture(self, size):
        picture = draw(self.env.observation_space, self.obs, size)
        return caption(picture, f"dream {self.dream}: {self.text}")


def key_actions(space):
    """({key: action}, the action of no key). Discrete: a key each; Box: two keys for each number, -1 and 1."""
    if hasattr(space, "n"):
        return dict(zip(KEYS, range(int(space.n)))), 0
    ends = [row for i in range(space.shape[0]) for row in np.outer((-1, 1), np.eye(space.shape[0])[i])]
    return dict(zip(KEYS, np.asarray(ends, np.float32))), np.zeros(space.shape, np.float32)


def describe(mapping, env):
    """The keys as a line, with the names of actions where the environment has them (Atari)."""
    try:
        names = env.real.get_wrapper_attr("get_action_meanings")()
    except AttributeError:
        names = []
    text = {k: names[a] if np.ndim(a) == 0 and a < len(names) else f"{a}" for k, a in mapping.items()}
    return ", ".join(f"{k} = {v}" for k, v in text.items())


def film(game, steps, size):
    """Frames of the agent in its dreams."""
    frames, progress = [game.picture(size)], Progress()
    for t in range(steps):
        game.begin() if game.over else game.step(game.agent_action())
        frames.append(game.picture(size))
        progress(f"{t + 1} of {steps} steps")
    return frames


def interact(game, mapping, idle, size, fps):
    """A window until Escape. Several keys of a Box add up; of Discrete actions the key pressed last counts."""
    import pygame

    frame = game.picture(size)
    pygame.init()
    screen, clock = pygame.display.set_mode(frame.shape[1::-1]), pygame.time.Clock()
    held, piloted = [], False
    try:
        while True:
            for event in pygame.event.get():
                if event.type == pygame.QUIT or event.type == pygame.KEYDOWN and event.key == pygame.K_ESCAPE:
                    return
                if event.type in (pygame.KEYDOWN, pygame.KEYUP):
                    key = pygame.key.name(event.key)
                    held = [k for k in held if k != key] + [key] * (event.type == pygame.KEYDOWN and key in mapping)
                    piloted ^= event.type == pygame.KEYDOWN and key == "m"
            if game.over:
                pygame.time.wait(1000)  # so that the end is seen
                game.begin()
            else:
                agents = game.agent_action()
                own = mapping[held[-1]] if held and np.ndim(idle) == 0 else idle + sum(mapping[k] for k in held)
                game.step(agents if piloted else np.clip(own, -1, 1) if np.ndim(idle) else own)
            screen.blit(pygame.surfarray.make_surface(game.picture(size).swapaxes(0, 1)), (0, 0))
            pygame.display.flip()
            clock.tick(fps)
    finally:
        pygame.quit()


def no_display():
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform == "linux" and not display or os.environ.get("SDL_VIDEODRIVER") == "dummy"


def main(argv=None):
    headless = no_display()  # NOTE: before a script is loaded, which lets environments draw without one
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--gif", action="store_true", help="write RUN/eval-dream.gif although there is a display")
    parser.add_argument("--steps", type=at_least(1), default=100, help="of the GIF (default: 100)")
    parser.add_argument("--fps", type=at_least(1), default=10, help="steps in a second (default: 10)")
    parser.add_argument("--size", type=at_least(64), default=384, help="of the picture, in pixels (default: 384)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the dreams (default: 0)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(argv)
    if (args.gif or headless) and not os.access(args.run, os.W_OK):
        fail(f"{args.run}: no such folder, or it cannot be written to")
    script, agent = load_run(args.run, choose_device(args.no_cuda), instead="play")
    if agent.args.env_id in getattr(script, "GAMES", {}):
        boards.against_agent(script, agent)
        return 0
    env = DreamEnv(args.run, device=choose_device(args.no_cuda))
    try:
        game = Game(env, args.seed)
        if args.gif or headless:
            save_gif(film(game, args.steps, args.size), path := os.path.join(args.run, "eval-dream.gif"), args.fps)
            print(f"{'' if args.gif else 'no display to play on: '}wrote the agent's dreams to {path}")
        else:
            mapping, idle = key_actions(env.action_space)
            print(f"keys: {describe(mapping, env)}, m = the agent or you; Escape ends")
            interact(game, mapping, idle, args.size, args.fps)
    finally:
        env.close()
    return 0


if __name__ == "__main__":
    run_tool(main)
