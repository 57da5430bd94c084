"""dyna.py: updates in closed form, mazes, planning that converges to the optimum, and the textbook's claims."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dyna

ROOT = Path(dyna.__file__).parent


def tables(maze):
    """P (S, A, S) and R (S, A) of a maze; the goal keeps the agent, without reward."""
    size, width = len(maze) * len(maze[0]), len(maze[0])
    P, R = np.zeros((size, 4, size)), np.zeros((size, 4))
    for s in range(size):
        for a in range(4):
            (i, j), r, done = dyna.maze_step(divmod(s, width), a, maze)
            goal = maze[s // width][s % width] == "G"
            P[s, a, s if goal else i * width + j] = 1
            R[s, a] = 0.0 if goal else r
    return P, R


def test_q_update():
    Q = [[0.0, 1.0], [2.0, 3.0]]
    dyna.q_update(Q, 0, 1, 0.5, 1, False, 0.1, 0.9)
    assert Q[0][1] == pytest.approx(1 + 0.1 * (0.5 + 0.9 * 3 - 1))
    dyna.q_update(Q, 0, 0, 0.5, 1, True, 0.1, 0.9)
    assert Q[0][0] == pytest.approx(0.05)  # nothing follows the end


def test_maze():
    assert len(dyna.cells(dyna.DYNA, "#")) == 7 and dyna.cells(dyna.DYNA, "S") == [(2, 0)]
    assert dyna.maze_step((2, 0), 0) == ((1, 0), 0.0, False) and dyna.maze_step((2, 0), 2) == ((2, 0), 0.0, False)
    assert dyna.maze_step((1, 1), 3) == ((1, 1), 0.0, False)  # a wall
    assert dyna.maze_step((1, 8), 0) == ((0, 8), 1.0, True)
    found = [dyna.shortest_path(m) for m in (dyna.DYNA, dyna.BLOCKED_LEFT, dyna.BLOCKED_RIGHT, dyna.OPEN_BOTH)]
    assert found == [14, 10, 16, 10]
    big = dyna.enlarge(dyna.DYNA, 3)
    assert (len(big), len(big[0]), len(dyna.cells(big, "S"))) == (18, 27, 1) and dyna.shortest_path(big) > 36


def test_values_of_the_start():
    for maze, best in ((dyna.DYNA, 14), (dyna.BLOCKED_LEFT, 10), (dyna.BLOCKED_RIGHT, 16)):
        Q = dyna.value_iteration(*tables(maze), 0.95)
        i, j = dyna.cells(maze, "S")[0]
        assert Q[i * 9 + j].max() == pytest.approx(0.95 ** (best - 1))
        assert len(dyna.greedy_path(Q.tolist(), maze)) == best + 1


def test_planning_converges_to_the_optimum():
    model, Q = dyna.Model(54, 4), [[0.0] * 4 for _ in range(54)]
    free = [s for s in range(54) if dyna.DYNA[s // 9][s % 9] in ".S"]
    for s in free:
        for a in range(4):
            (i, j), r, done = dyna.maze_step(divmod(s, 9), a)
            model.learn(s, a, r, i * 9 + j, done)
    dyna.plan(Q, model, 100_000)
    best = dyna.value_iteration(*tables(dyna.DYNA), 0.95)
    assert abs(np.array(Q)[free] - best[free]).max() < 1e-6
    assert len(dyna.greedy_path(Q, dyna.DYNA)) == 15


def test_bonus_and_untried_actions():
    assert dyna.exploration_bonus(100, 1e-3) == pytest.approx(0.01)
    model, Q = dyna.Model(3, 2, all_actions=True), [[0.0, 0.0] for _ in range(3)]
    model.learn(0, 1, 0.0, 1, False)
    model.now += 99
    assert model.outcome[0] == [(0.0, 0, False), (0.0, 1, False)] and model.time[0] == [0, 1]
    dyna.plan(Q, model, 1, alpha=1.0, gamma=0.0, kappa=1e-3)
    assert sorted(map(max, Q))[-1] in (pytest.approx(1e-3 * 10), pytest.approx(1e-3 * 99**0.5))


def test_queue():
    queue = dyna.PriorityQueue(0.1)
    for item, priority in (("a", 0.5), ("b", 0.7), ("c", 0.1), ("a", 0.9), ("b", 0.2)):
        queue.push(item, priority)
    assert len(queue) == 2 and [queue.pop(), queue.pop()] == ["a", "b"] and len(queue) == 0


def test_sweeping_goes_backwards_from_the_reward():
    model, Q = dyna.Model(4, 1), [[0.0] for _ in range(4)]
    for s in range(3):
        model.learn(s, 0, float(s == 2), s + 1, s == 2)
    queue = dyna.PriorityQueue(1e-4)
    queue.push((2, 0), 1.0)
    assert dyna.sweep(Q, model, queue, 10, 1.0, 0.5) == 3
    assert [row[0] for row in Q] == [0.25, 0.5, 1.0, 0.0]


def test_the_maze_changes_after_so_many_steps_of_all_episodes():
    env = dyna.Maze(dyna.DYNA, dyna.OPEN_BOTH, 3)
    env.reset()
    for _ in range(3):
        env.step(2)
    env.reset()
    assert env.maze is dyna.DYNA
    env.step(2)
    assert env.maze is dyna.OPEN_BOTH


def test_figure_8_2():
    curves, found, *_ = dyna.learning_curves(10, 1)
    near = found["first_episode_below_20_steps"]
    assert near["n = 50"] <= 4 and near["n = 5"] <= 12 and near["n = 0"] > 20
    assert (curves["n = 0"][:, 0] == curves["n = 5"][:, 0]).all()  # nothing is known in the first episode
    assert curves["n = 50"][:, 10:20].mean() < 20 < 40 < curves["n = 0"][:, 10:20].mean()


def test_figures_8_4_and_8_5():
    _, found, *_ = dyna.EXPERIMENTS["figure_8_5"][0](3, 1)
    assert found["dyna_q_plus"]["shortest_episodes_after_the_change"] == [10] * 3
    assert min(found["dyna_q"]["shortest_episodes_after_the_change"]) >= 16
    assert found["dyna_q_plus"]["least"] > found["dyna_q"]["final_reward"]
    _, found, *_ = dyna.EXPERIMENTS["figure_8_4"][0](5, 1)
    assert found["dyna_q_plus"]["least"] > 90 > found["dyna_q"]["final_reward"]


def run(*argv, cwd):
    command = [sys.executable, str(ROOT / "dyna.py"), *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    done = run("--total-episodes", "30", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert (
        result["episodic_return"] == 1 and len(result["steps_per_episode"]) == 30 and (folder / "values.gif").exists()
    )
    lake = ["--env-id", "FrozenLake-v1", "--env-kwargs", '{"is_slippery": false}', "--epsilon", "0.2"]
    done = run(*lake, "--total-episodes", "300", "--seed", "2", cwd=tmp_path)
    assert "episodic_return 1.00" in done.stdout, done.stdout + done.stderr
    done = run("--experiment", "example_8_4", "--runs", "1", "--seed", "3", cwd=tmp_path)
    assert "updates_by_scale" in done.stdout and list((tmp_path / "runs").glob("*/example_8_4.png"))


@pytest.mark.parametrize("argv, words", [
    ("--env-id CartPole-v1", ["CartPole-v1", "Box", "dreamerv3.py"]), ("--env-id Nothing-v0", ["Nothing"]),
    ("--planning-steps -1", ["--planning-steps", "-1"]), ("--alpha 2", ["--alpha", "2"]),
    ("--env-kwargs [1", ["--env-kwargs"]), ("--total-episodes 0", ["--total-episodes", "0"]),
])  # fmt: skip
def test_wrong_input(tmp_path, argv, words):
    done = run(*argv.split(), cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and all(w in lines[0] for w in words), done.stderr
    assert list(tmp_path.iterdir()) == []
