"""The tools over the seam, on a script whose dream is exactly its environment (fake_world.py): what they must find is
known. And input that is wrong: one line, exit code 2, nothing created."""

import json
import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

import common  # noqa: E402
import dream_env  # noqa: E402
import evaluate  # noqa: E402
import fake_world  # noqa: E402
import pictures  # noqa: E402
import play  # noqa: E402
import record  # noqa: E402

TOOLS = {"evaluate": evaluate, "dream_env": dream_env, "play": play, "record": record}


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Scripts are those of tests/, and the working directory is empty."""
    monkeypatch.setattr(common, "ROOT", TESTS)
    monkeypatch.chdir(tmp_path)


def make_run(name="runs/a", script="fake_world", args=None, **env_kwargs):
    os.makedirs(name)
    info = {"script": script, "args": {"env_kwargs": json.dumps(env_kwargs), **(args or {})}}
    Path(name, "args.json").write_text(json.dumps(info))
    Path(name, "ckpt.pt").write_text("")
    return name


def frames_of(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield np.asarray(gif.convert("RGB"))


def tree():
    return {p: p.stat().st_mtime_ns for p in sorted(Path().rglob("*"))}


# ---- Shared ----------------------------------------------------------------------------------------------------------


def test_stack_and_pick():
    batch = common.stack([{"a": np.float32([1, 2]), "b": 3}, {"a": np.float32([4, 5]), "b": 6}])
    assert batch["a"].tolist() == [[1, 2], [4, 5]] and batch["b"].tolist() == [3, 6]
    assert common.pick(batch, 1)["a"].tolist() == [4, 5] and common.pick(batch["a"], 0).tolist() == [1, 2]


def test_seeds_of_different_keys_differ():
    found = [common.seeds(seed, key, n=100) for seed in range(20) for key in (1, 2)]
    assert len({s for group in found for s in group}) == 4000 and found[0] == common.seeds(0, 1, n=100)


def test_progress_speaks_seldom(capsys):
    seldom, always = common.Progress(1000), common.Progress(0)
    for i in range(3):
        seldom("never")
        always(f"step {i}")
    assert capsys.readouterr().out == "step 0\nstep 1\nstep 2\n"


def test_numbers_carry_their_names():
    space = gym.spaces.Dict(
        arm=gym.spaces.Box(np.float32([-2, 0]), np.float32([2, np.inf])), key=gym.spaces.Discrete(5)
    )
    found = pictures.numbers(space, {"arm": np.float32([1, 0.5]), "key": np.int64(4)})
    assert [name for name, *_ in found] == ["arm[0]", "arm[1]", "key"]
    assert [number for _, number, _ in found] == [1, 0.5, 4]
    np.testing.assert_allclose([height for *_, height in found], [0.5, np.tanh(0.5), 1], rtol=1e-6)
    assert [name for name, *_ in pictures.numbers(fake_world.VECTOR, np.zeros(3))] == ["obs[0]", "obs[1]", "obs[2]"]


def test_draw_shows_images_of_any_kind():
    grey, stacked = np.full((4, 6), 7, np.uint8), np.arange(4, dtype=np.uint8) * np.ones((5, 5, 1), np.uint8)
    assert (pictures.draw(None, grey, 60) == 7).all() and pictures.draw(None, grey, 60).shape == (40, 60, 3)
    assert (pictures.draw(None, stacked, 50) == 3).all()  # the newest frame
    both = pictures.draw(None, {"a": grey, "b": grey + 1, "c": np.zeros(3)}, 60)
    assert both.shape == (40, 120, 3) and (both[:, 60:] == 8).all()
    assert pictures.draw(fake_world.IMAGE, np.zeros((400, 600, 3), np.uint8), 60).shape == (40, 60, 3)
    many = gym.spaces.Box(-1, 1, (1000,))
    assert pictures.draw(many, many.sample(), 128).shape == (128, 128, 3)


def test_gif_holds_its_frames():
    pictures.save_gif([np.full((8, 9, 3), 20 * i, np.uint8) for i in range(4)], "a.gif", fps=20)
    assert [int(f.mean()) for f in frames_of("a.gif")] == [0, 20, 40, 60] and os.listdir() == ["a.gif"]
    with Image.open("a.gif") as gif:
        assert gif.info["duration"] == 50 and gif.size == (9, 8)


# ---- evaluate.py -----------------------------------------------------------------------------------------------------


def test_evaluate_returns(capsys):
    """Greedy: 2 for each step, episodes of 5 to 7 steps in lockstep. Random: played again here, one by one."""
    run = make_run(stagger=True)
    assert evaluate.main([run, "--episodes", "6", "--greedy", "--seed", "3"]) == 0
    result = json.loads(Path(run, "eval-700-greedy.json").read_text())
    lengths, chance = [], []
    policy, sums = common.random_policy(gym.spaces.Discrete(3), (3, evaluate.KEY)), np.zeros(6)
    for seed in common.seeds(3, evaluate.KEY, n=6):
        env = fake_world.Counter(0)
        env.reset(seed=seed)
        lengths.append(5 + env.start % 3)
    for t in range(max(lengths)):
        actions, _ = policy(None, None, np.zeros(6))
        sums += actions * (np.array(lengths) > t)
    chance = sums.tolist()
    assert len(set(lengths)) > 1
    assert result["lengths"] == lengths and result["returns"] == [2.0 * n for n in lengths]
    assert result["episodic_return"] == 2 * np.mean(lengths) and result["episodic_return_std"] == 2 * np.std(lengths)
    assert result["random_returns"] == chance and result["random_return"] == pytest.approx(np.mean(chance))
    assert result["random_standard_error"] == pytest.approx(np.std(chance, ddof=1) / 6**0.5)
    assert result["global_step"] == 700 and result["greedy"] is True
    line = (
        f"{run}: episodic_return {2 * np.mean(lengths):.1f} +- {2 * np.std(lengths):.1f} (random {np.mean(chance):.1f}"
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith(line + " +- ")


def test_evaluate_repeats_itself_and_seeds_matter():
    runs = make_run("runs/a", length=30), make_run("runs/b", length=30)
    found = []
    for seed in ("1", "2"):
        assert evaluate.main([*runs, "--episodes", "3", "--seed", seed]) == 0
        found += [json.loads(Path(run, "eval-700.json").read_text()) for run in runs]
    assert found[0] == found[1] and found[2] == found[3] and found[0]["returns"] != found[2]["returns"]


def test_evaluate_target(capsys):
    good, bad = make_run("runs/good"), make_run("runs/bad", length=2)
    command = ["--episodes", "1", "--greedy", "--target-return"]
    assert evaluate.main([good, *command, "10"]) == 0 and "target 10: reached)" in capsys.readouterr().out
    assert evaluate.main([good, *command, "10.5"]) == 1
    assert evaluate.main([good, bad, *command, "10"]) == 1


def test_evaluate_video_is_the_environments_picture():
    run = make_run()
    assert evaluate.main([run, "--episodes", "2", "--video"]) == 0
    frames = list(frames_of(f"{run}/eval-episode.gif"))
    assert [f.shape for f in frames] == [(160, 240, 3)] * 6  # 20x30, enlarged; one for each of 5 + 1 observations
    assert [int(f[..., 0].mean()) for f in frames] == [0, 10, 20, 30, 40, 50]


def test_evaluate_video_without_a_picture_draws_numbers():
    run = make_run(draws=False)
    assert evaluate.main([run, "--episodes", "1", "--video", "--greedy"]) == 0
    frames = list(frames_of(f"{run}/eval-episode.gif"))
    assert len(frames) == 6 and frames[0].shape == (96, 256, 3) and (frames[0] != frames[-1]).any()


def test_evaluate_temperature():
    run = make_run(args={"tempered": True})
    assert evaluate.main([run, "--temperature", "0", "--episodes", "2"]) == 0
    assert json.loads(Path(run, "eval-700-temperature-0.json").read_text())["returns"] == [10, 10]


def test_ctrl_c_writes_nothing(capsys):
    run = make_run(stop_at=3)
    before = tree()
    for tool, command in ((evaluate, [run]), (record, ["a.npz", "--policy", run]), (record, ["a/", "--policy", run])):
        with pytest.raises(SystemExit) as stop:
            common.run_tool(lambda tool=tool, command=command: tool.main(command))
        assert stop.value.code == 130 and "stopped" in capsys.readouterr().err and tree() == before


# ---- dream_env.py ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs", ["vector", "image", "dict", "number"])
@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.filterwarnings("ignore")
def test_dream_passes_gymnasiums_checks(obs, action):
    env = dream_env.DreamEnv(make_run(obs=obs, action=action))
    check_env(env)
    assert env.observation_space == fake_world.SPACES[obs]
    env.close()


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.parametrize("given", [0, 3])
def test_dream_goes_on_like_the_environment(obs, action, given):
    dream = dream_env.DreamEnv(make_run(obs=obs, action=action, length=8))
    real = fake_world.make_env(dream.agent.args, 5)
    real.action_space.seed(1)
    seen, actions = [real.reset()[0]], []
    for _ in range(given):
        actions.append(real.action_space.sample())
        seen.append(real.step(actions[-1])[0])
    for extra in ([], [real.action_space.sample()]):  # T - 1 or T actions
        options = {"observations": common.stack(seen), "actions": [*actions, *extra]}
        start, _ = dream.reset(options=options)
        np.testing.assert_equal(start, seen[-1])
    for t in range(given, 8):
        action = real.action_space.sample()
        truth, dreamed = real.step(action), dream.step(action)
        np.testing.assert_equal(dreamed[0], truth[0])
        assert dreamed[1] == truth[1] and dreamed[2] == truth[2] == (t == 7) and not dreamed[3]
        assert dreamed[4]["continue"] == float(t < 7)
        assert all(
            a.dtype == b.dtype for (*_, a), (*_, b) in zip(*(pictures.parts(None, o[0]) for o in (truth, dreamed)))
        )


def test_dreams_that_take_turns_do_not_disturb_each_other(monkeypatch):
    """Most agents draw from torch's generator; what others draw from it does not count."""

    def seed(self, seed):
        torch.manual_seed(seed)
        self.noise = None  # torch's own

    run = make_run(length=100, args={"noisy": True})
    monkeypatch.setattr(type(dream_env.DreamEnv(run).agent), "seed", seed)
    alone, *turns = (dream_env.DreamEnv(run) for _ in range(3))
    alone.reset(seed=3)
    expected = [alone.step(0)[1] for _ in range(8)]
    for env in turns:
        env.reset(seed=3)
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    found = [[env.step(0)[1] for env in turns] for _ in range(8)]
    assert found == [[r, r] for r in expected] and len(set(expected)) == 8
    assert torch.rand(1) == first  # nor do dreams change what others draw


def test_dream_begins_inside_episodes_and_repeats_itself():
    """Real stretches of 0 to `context` steps, never with an episode's last observation; all by the seed."""
    run, found = make_run(length=6, args={"noisy": True}), []
    for before in range(2):
        env, starts = dream_env.DreamEnv(run, context=20), []
        for seed in (*range(before), 7, *[None] * 60):  # what came before does not count
            obs, _ = env.reset(seed=seed)
            starts.append((*obs.tolist(), env.step(0)[1]))
        found.append(starts[before:])
    assert found[0] == found[1] and {t for t, *_ in found[0]} == set(range(6)) and len(set(found[0])) == 61
    env = dream_env.DreamEnv(run, context=0)
    assert env.reset(seed=1)[0][0] == 0 and env.reset(seed=1)[0].tolist() == env.reset(seed=1)[0].tolist()


def test_dream_ends_after_max_steps_and_stays_in_its_space():
    env = dream_env.DreamEnv(make_run(length=100, obs="image", args={"lies": True}), max_steps=3, context=0)
    env.reset(seed=1)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert env.render().dtype == np.uint8 and env.render().shape == (256, 256, 3)
    box = gym.spaces.Box(-1, 1, (2,), np.float32)
    assert dream_env.inside(box, np.float64([9, 0.5])).tolist() == [1, 0.5]


def test_dream_refuses_wrong_context():
    env = dream_env.DreamEnv(make_run())
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    for observations, actions in [
        (np.zeros((0, 3)), []),
        (np.zeros((3, 2)), [0, 0]),
        (np.zeros(3), []),
        (np.zeros((3, 3)), [0]),
        (np.zeros((3, 3)), [[0, 1], [0, 1]]),
        ({"vector": np.zeros((1, 3))}, []),
    ]:
        with pytest.raises(ValueError, match="observations"):
            env.reset(options={"observations": observations, "actions": actions})


@pytest.mark.filterwarnings("ignore")
def test_dream_from_the_command_line(capsys):
    assert dream_env.main([make_run(length=2), "--steps", "9"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("check_env passed") and 2 <= len(out) <= 3 and out[-1].endswith("continue 0.000")


# ---- play.py ---------------------------------------------------------------------------------------------------------


def test_play_without_a_display_writes_a_gif():
    run = make_run(length=4)
    assert play.main([run, "--gif", "--steps", "12", "--size", "128"]) == 0
    frames = list(frames_of(f"{run}/eval-dream.gif"))
    assert len(frames) == 13 and frames[0].shape == (3 * 32 + pictures.ROW + 2, 128, 3)
    game = play.Game(dream_env.DreamEnv(run, context=0), seed=1)
    play.film(game, 12, 64)  # two dreams of 4 steps, each followed by a beginning, and 2 steps of the third
    assert game.dream == 3 and game.env.steps == 2


def test_keys():
    mapping, idle = play.key_actions(gym.spaces.Discrete(3))
    assert mapping == {"1": 0, "2": 1, "3": 2} and idle == 0
    mapping, idle = play.key_actions(gym.spaces.Box(-1, 1, (2,), np.float32))
    assert {k: v.tolist() for k, v in mapping.items()} == {"1": [-1, 0], "2": [1, 0], "3": [0, -1], "4": [0, 1]}
    assert idle.tolist() == [0, 0] and "m" not in play.KEYS and len(set(play.KEYS)) == 35


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_play_with_keys(monkeypatch, capsys, action):
    """Keys 3 and 2 are held, then m hands over to the agent, then Escape; the window is SDL's dummy."""
    pygame = pytest.importorskip("pygame")
    down, up = (lambda k, kind=kind: pygame.event.Event(kind, key=k) for kind in (pygame.KEYDOWN, pygame.KEYUP))
    script = iter([[], [down(pygame.K_3)], [down(pygame.K_2)], [up(pygame.K_2)], [down(pygame.K_m)], [], [],
                   [down(pygame.K_ESCAPE)]])  # fmt: skip
    taken, step = [], play.Game.step
    monkeypatch.setattr(pygame.event, "get", lambda: next(script))
    monkeypatch.setattr(play, "no_display", lambda: False)
    monkeypatch.setattr(play.Game, "step", lambda game, a: (taken.append(np.asarray(a).tolist()), step(game, a)))
    monkeypatch.setattr(play.Game, "agent_action", lambda game: 9 if action == "discrete" else np.full(2, 0.9))
    assert play.main([make_run(length=900, action=action), "--fps", "1000"]) == 0
    if action == "discrete":
        assert taken == [0, 2, 1, 2, 9, 9, 9]
    else:
        assert taken == [[0, 0], [0, -1], [1, -1], [0, -1], *[[0.9, 0.9]] * 3]
    assert "keys: 1 = " in capsys.readouterr().out


# ---- record.py -------------------------------------------------------------------------------------------------------


def recorded(*command):
    assert record.main(["a.npz", "--script", "fake_world", *command]) == 0
    with np.load("a.npz", allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


def cycle(env, obs, rng):
    """A player whose actions are known: 0, 1, 2, 0 ... in every episode."""
    return env.unwrapped.t % 3


ENV = ["--env-id", "Counter-v0", "--policy", "test_tools:cycle"]


def test_record_against_a_list_made_by_hand():
    """Two environments, episodes of 3 steps, 4 steps each: one whole episode and one that is cut after its first."""
    data = recorded(*ENV, "--env-kwargs", '{"length": 3}', "--timesteps", "8", "--num-envs", "2")
    assert {k: (v.dtype, v.shape) for k, v in data.items()} == {
        "frames": (np.uint8, (12, 8, 8, 3)),
        "actions": (np.int64, (12,)),
        "rewards": (np.float32, (12,)),
        "ends": (bool, (12,)),
        "lasts": (bool, (12,)),
    }
    rows = [  # t, x, action, reward, end, last
        (0, 0, 0, 0, False, False), (1, 0, 1, 1, False, False), (2, 1, 2, 2, True, False), (3, 3, 0, 0, False, True),
        (0, 0, 0, 0, False, False), (1, 0, 0, 0, False, True),
    ]  # fmt: skip
    t, x, actions, rewards, ends, lasts = (list(c) * 2 for c in zip(*rows))
    assert data["frames"][:, 0, 0, 0].tolist() == t and data["frames"][:, 0, 0, 1].tolist() == x
    assert data["actions"].tolist() == actions and data["rewards"].tolist() == rewards
    assert data["ends"].tolist() == ends and data["lasts"].tolist() == lasts
    starts = data["frames"][:, 0, 0, 2].reshape(2, 6)
    assert all(len(set(s[:4])) == 1 and len(set(s[4:])) == 1 for s in starts.tolist())
    assert os.listdir() == ["a.npz"]


def test_record_truncated_is_no_end():
    data = recorded(*ENV, "--env-kwargs", '{"truncate_at": 2}', "--timesteps", "20")
    assert data["lasts"].tolist() == [False, False, True] * 10 and not data["ends"].any()
    assert len(set(data["frames"][::3, 0, 0, 2].tolist())) > 2  # episodes begin differently


def test_record_is_what_the_readers_read():
    """A round trip through diamond.py, genie_lam.py and ijepa.py, as long as they have readers of their own."""
    data = recorded(*ENV, "--env-kwargs", '{"length": 3}', "--timesteps", "5")
    import diamond
    import genie_lam
    import ijepa

    if hasattr(diamond, "load_dataset"):
        episodes, rewarded, actions = diamond.load_dataset("a.npz")
        assert rewarded and actions == 3 and [e["end"] for e in episodes] == [True, False]
        assert [e["actions"].tolist() for e in episodes] == [[0, 1, 2], [0, 1]]
        assert [e["rewards"].tolist() for e in episodes] == [[0, 1, 2], [0, 1]]
        np.testing.assert_equal(np.concatenate([e["frames"] for e in episodes]), data["frames"])
    if hasattr(genie_lam, "frames_of_npz"):
        frames, found = genie_lam.frames_of_npz("a.npz")
        np.testing.assert_equal(frames, data["frames"])
        np.testing.assert_equal(found, data["actions"])
    for name in ("pong", "qbert"):
        assert record.main([f"games/train/{name}/", "--script", "fake_world", *ENV, "--timesteps", "5"]) == 0
    if hasattr(ijepa, "scan"):
        files, labels, classes = ijepa.scan("games/train")
        assert classes == ["pong", "qbert"] and labels == [0] * 6 + [1] * 6 and len(files) == 12


def test_record_boxes_sizes_and_pictures():
    """Continuous actions; images resized; a RUN without images gives the environment's own picture."""
    data = recorded("--env-id", "x", "--env-kwargs", '{"action": "box"}', "--timesteps", "3", "--image-size", "5")
    assert data["actions"].dtype == np.float32 and data["actions"].shape == (4, 2) and (data["actions"][-1] == 0).all()
    assert data["frames"].shape == (4, 5, 5, 3) and data["frames"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    run = make_run()
    assert record.main(["b.npz", "--policy", run, "--timesteps", "3"]) == 0
    with np.load("b.npz") as file:
        assert file["frames"].shape == (4, 64, 64, 3) and (file["frames"][2, 5, 5] == (20, 200, 0)).all()


def test_record_folder_of_images():
    assert record.main(["out/", "--script", "fake_world", *ENV, "--timesteps", "5", "--every", "2"]) == 0
    names = sorted(os.listdir("out"))
    assert names == ["0000000.png", "0000001.png", "0000002.png"] and os.listdir() == ["out"]
    assert [int(np.asarray(Image.open(f"out/{n}"))[0, 0, 0]) for n in names] == [0, 2, 4]


def test_record_repeats_itself():
    found = []
    for name, seed in (("1.npz", "0"), ("2.npz", "0"), ("3.npz", "1")):
        command = [name, "--script", "fake_world", "--env-id", "x", "--timesteps", "30", "--num-envs", "3"]
        assert record.main([*command, "--seed", seed]) == 0
        with np.load(name) as file:
            found.append(file["frames"])
    assert (found[0] == found[1]).all() and (found[0].shape != found[2].shape or (found[0] != found[2]).any())


def test_record_scripted_player_of_breakout(capsys):
    assert record.SCRIPTED["MinAtar/Breakout-v1"] is record.breakout_player
    with pytest.raises(SystemExit):
        record.main(["a.npz", "--env-id", "Counter-v0", "--policy", "scripted", "--script", "fake_world"])
    assert "MinAtar/Breakout-v1" in capsys.readouterr().err


# ---- Wrong input -----------------------------------------------------------------------------------------------------

OUT = ["--script", "fake_world", "--env-id", "Counter-v0"]
WRONG = [
    *[
        (tool, command, words)
        for tool in ("evaluate", "dream_env", "play")
        for command, words in [
            ([], "required"),
            (["nowhere"], "nowhere"),
            (["empty"], "args.json"),
            (["runs/unfinished"], "no checkpoint"),
            (["runs/foreign"], "there is no elsewhere.py"),
            (["runs/old"], "old_world.py --"),
            (["runs/blind"], "no agent that acts"),
            (["runs/a", "--seed", "-1"], "--seed"),
            (["runs/a", "--bogus"], "--bogus"),
        ]
    ],
    ("evaluate", ["runs/a", "--episodes", "0"], "--episodes"),
    ("evaluate", ["runs/a", "--target-return", "many"], "--target-return"),
    ("evaluate", ["runs/a", "--temperature", "1"], "--temperature"),
    ("dream_env", ["runs/a", "--steps", "-1"], "--steps"),
    ("play", ["runs/a", "--size", "3"], "--size"),
    ("record", [], "required"),
    ("record", ["a.npz"], "--env-id is needed"),
    ("record", ["a.zip", *OUT], "OUT must end"),
    ("record", ["there.npz", *OUT], "exists already"),
    ("record", ["empty/", *OUT], "exists already"),
    ("record", ["there.npz/a.npz", *OUT], "is no folder"),
    ("record", ["a.npz", *OUT, "--env-kwargs", "[1]"], "--env-kwargs"),
    ("record", ["a.npz", *OUT, "--env-kwargs", '{"bogus": 1}'], "bogus"),
    ("record", ["a.npz", *OUT, "--policy", "best"], "--policy best"),
    ("record", ["a.npz", *OUT, "--policy", "runs/a"], "leave out --env-id"),
    ("record", ["a.npz", *OUT, "--timesteps", "0"], "--timesteps"),
    ("record", ["a.npz", *OUT, "--every", "2"], "--every"),
    ("record", ["a.npz", "--env-id", "x", "--script", "old_world"], "old_world.py"),
    ("record", ["a.npz", "--policy", "runs/old"], "old_world.py --record a.npz --evaluate runs/old"),
    ("record", ["a.npz", "--policy", "runs/dark"], "no images"),
]


@pytest.mark.parametrize("tool, command, words", WRONG)
def test_wrong_input_is_one_line(tool, command, words, capsys, monkeypatch):
    scripts = Path("scripts").absolute()
    scripts.mkdir()
    Path("empty").mkdir()
    Path("there.npz").write_text("")
    (scripts / "fake_world.py").write_text("")  # only its name is looked for: the module is loaded already
    (scripts / "old_world.py").write_text("class Args:\n    evaluate = play = record = None\n")
    (scripts / "blind_world.py").write_text("def load(run, device):\n    return object()\n")
    monkeypatch.setattr(common, "ROOT", scripts)
    monkeypatch.setattr(sys, "path", [str(scripts), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    make_run("runs/a")
    make_run("runs/dark", draws=False)
    make_run("runs/old", script="old_world")
    make_run("runs/blind", script="blind_world")
    make_run("runs/foreign", script="elsewhere")
    os.remove(Path(make_run("runs/unfinished"), "ckpt.pt"))
    before = tree()
    with pytest.raises(SystemExit) as stop:
        TOOLS[tool].main(command)
    for name in ("old_world", "blind_world"):
        sys.modules.pop(name, None)
    found = capsys.readouterr()
    assert stop.value.code == 2 and words in found.err and found.err.count("\n") == 1 and not found.out
    assert tree() == before


@pytest.mark.parametrize("tool", TOOLS)
def test_help_begins_with_an_example(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOLS[tool].main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[2].startswith(f"    python benchmarks/{tool}.py ")
