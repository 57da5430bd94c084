"""Board games of muzero.py: opponents to measure an agent with, and a game against it in the terminal.

For `benchmarks/evaluate.py RUN --opponent perfect` and `benchmarks/play.py RUN`."""

import functools

import numpy as np
from common import fail


@functools.cache
def solve(game):
    """Minimax: {board bytes: (value for the player to move, best actions)} of all positions of a small game."""
    table = {}

    def look(board):
        if board.tobytes() not in table:
            values = {}
            for action in np.flatnonzero(game.legal(board)):
                following, reward, done = game.step(board, action)
                values[int(action)] = float(reward) if done else -look(following)[0]
            best = max(values.values())
            table[board.tobytes()] = best, [a for a, v in values.items() if v == best]
        return table[board.tobytes()]

    look(np.zeros(game.cells, np.int8))
    return table


def perfect(game, board, rng):
    """One of the optimal moves."""
    return int(rng.choice(solve(game)[board.tobytes()][1]))


def one_ply(game, board, rng):
    """Wins if it can, else prevents an immediate loss if it can, else moves at random."""
    legal = np.flatnonzero(game.legal(board))
    for view in (board, -board):  # the same move by the opponent: a threat
        if wins := [a for a in legal if game.step(view, a)[1]]:
            return int(rng.choice(wins))
    return int(rng.choice(legal))


def opponent(script, env_id, name):
    """The opponent of that name for make_env; a line and exit code 2 if the game has none."""
    if env_id not in getattr(script, "GAMES", {}):
        fail(f"--opponent {name}: {env_id} is not a board game")
    if name == "perfect" and env_id != "TicTacToe":
        fail(f"--opponent perfect: {env_id} has too many positions; try one_ply")
    return {"random": script.random_move, "one_ply": one_ply, "perfect": perfect}[name]


def drawn(game, board, mine="X", other="O"):
    """The board as text, seen by the player to move."""
    cells = np.array([".", mine, other])[np.asarray(board).reshape(game.shape)]
    return "\n".join(" ".join(row) for row in cells)


def against_agent(script, agent):
    """A game in the terminal: you are O, the agent is X and shows its policy."""
    game = script.GAMES[agent.args.env_id]
    board, done = np.zeros(game.cells, np.int8), False
    human = input("do you begin? [y/n] ").strip().lower().startswith("y")
    while not done:
        if human:
            print(drawn(game, board, "O", "X"))
            answer = input(f"your move, 0 to {game.actions - 1}: ").strip()
            if not answer.isdigit() or int(answer) >= game.actions or not game.legal(board)[int(answer)]:
                print(f"not a legal move: {answer}")
                continue
            action = int(answer)
        else:
            actions, policy, value, _ = agent.decide(game.observe(board)[None], None, np.ones(1, bool), explore=False)
            action, shares = int(actions[0]), " ".join(f"{a}: {float(p):.2f}" for a, p in enumerate(policy[0]))
            print(f"X moves {action}; it expects {float(value[0]):+.2f}; policy {shares}")
        board, reward, done = game.step(board, action)
        human = not human
    print(drawn(game, board, *(("O", "X") if human else ("X", "O"))))
    print("a draw" if not reward else "X wins" if human else "you win")
