"""How fast the tree search of muzero.py is, beside mctx, DeepMind's search library in JAX, where that is installed.

    python benchmarks/search.py                                  # 64 trees of 4 and of 18 actions, 50 simulations
    python benchmarks/search.py --trees 8 64 512 --actions 2 18 --kinds puct gumbel --name search

Both search the same trees, with the same small network for dynamics and prediction (64 numbers of latent state, two
layers) written in torch and in JAX, without noise. Columns: thousands of simulations per second, all trees together
(median of several searches after a warm-up; on a CPU with one thread CPU time, which other processes do not lengthen;
compilation is not counted), mctx's rate, the ratio, and for pUCT in how many trees both visited every action equally
often. On a GPU the search is one CUDA graph; mctx is measured on the device that JAX finds.
"""

import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Parser, at_least, fail

LATENT = 64


def weights(actions, seed=0):
    """(from latent and action, latent to latent, latent to reward, value and logits)."""
    rng = np.random.default_rng(seed)
    sizes = (LATENT + actions, LATENT), (LATENT, LATENT), (LATENT, actions + 2)
    into, through, out = (rng.normal(size=s).astype(np.float32) * scale for s, scale in zip(sizes, (0.1, 0.15, 0.3)))
    out[:, 0] *= 0.1  # rewards are small beside values, as they are in most environments
    return into, through, out


def roots(trees, actions, seed=1):
    """Root logits (trees, actions), values (trees,), latents (trees, LATENT)."""
    rng = np.random.default_rng(seed)
    size = (trees, actions), (trees,), (trees, LATENT)
    return [rng.normal(size=s).astype(np.float32) * scale for s, scale in zip(size, (1.0, 0.1, 1.0))]


def median_time(function, clock, seconds):
    """Median seconds of a call, after two for warming up; at least five calls."""
    times, end = [], time.perf_counter() + seconds
    for _ in range(2):
        function()
    while len(times) < 5 or time.perf_counter() < end:
        start = clock()
        function()
        times.append(clock() - start)
    return float(np.median(times))


def ours(trees, actions, simulations, kind, device, threads, seconds):
    """Seconds per search, visits (trees, actions)."""
    import torch

    sys.path.insert(0, str(ROOT))
    import muzero

    torch.set_num_threads(threads)
    into, through, out = (torch.as_tensor(w, device=device) for w in weights(actions))
    names = ("logits", "value", "latent")
    start = {k: torch.as_tensor(x, device=device) for k, x in zip(names, roots(trees, actions))}

    def step(latent, action):
        one_hot = torch.nn.functional.one_hot(action, actions).to(latent.dtype)
        s = torch.tanh(torch.relu(torch.cat([latent, one_hot], 1) @ into) @ through)
        y = s @ out
        return y[:, 0], y[:, 2:], y[:, 1], s

    def search(x):
        more = dict(gumbel=torch.zeros_like(x["logits"])) if kind == "gumbel" else {}
        return muzero.mcts(x["logits"], x["value"], x["latent"], step, simulations, 0.997, **more)

    if device == "cuda":
        search = muzero.Graphed(search)
        for _ in range(4):
            search(start)

    def once():
        with torch.no_grad():
            visits = search(start)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return visits

    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    return median_time(once, clock, seconds), once().cpu().numpy()


def theirs(trees, actions, simulations, kind, threads, seconds):
    """The same with mctx, or None if it is not installed."""
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    try:
        import jax
        import mctx
    except ImportError:
        return None
    import jax.numpy as jnp

    into, through, out = weights(actions)
    logits, value, latent = roots(trees, actions)

    def step(params, key, action, latent):
        one_hot = jax.nn.one_hot(action, actions)
        s = jnp.tanh(jax.nn.relu(jnp.concatenate([latent, one_hot], 1) @ into) @ through)
        y = s @ out
        discount = jnp.full(trees, 0.997)
        return mctx.RecurrentFnOutput(reward=y[:, 0], discount=discount, prior_logits=y[:, 2:], value=y[:, 1]), s

    @jax.jit
    def search(logits, value, latent):
        root, key = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=latent), jax.random.PRNGKey(0)
        if kind == "gumbel":
            found = mctx.gumbel_muzero_policy((), key, root, step, simulations, gumbel_scale=0.0)
        else:
            found = mctx.muzero_policy((), key, root, step, simulations, dirichlet_fraction=0.0)
        return found.search_tree.summary().visit_counts

    clock = time.process_time if jax.default_backend() == "cpu" and threads == 1 else time.perf_counter
    once = lambda: jax.block_until_ready(search(logits, value, latent))  # noqa: E731
    return median_time(once, clock, seconds), np.asarray(once())


HEAD = ["search", "trees", "actions", "simulations", "muzero.py, k/s", "mctx, k/s", "ratio", "equal trees"]


def measure(trees, actions, kind, flags, device):
    """One line of the table: a dict."""
    args = trees, actions, flags.simulations, kind
    seconds, visits = ours(*args, device, flags.threads, flags.seconds)
    other = None if flags.no_mctx else theirs(*args, flags.threads, flags.seconds)
    rate = lambda s: trees * flags.simulations / s / 1e3  # noqa: E731
    row = dict(search=kind, trees=trees, actions=actions, simulations=flags.simulations, ours=rate(seconds))
    if other:
        row |= dict(mctx=rate(other[0]), ratio=other[0] / seconds)
        if kind == "puct":  # Gumbel's trees are compared by their tests: mctx breaks their ties at random
            row["equal"] = int((visits == other[1]).all(1).sum())
    return row


def cells(row):
    numbers = [format(row[k], ".1f") if k in row else "-" for k in ("ours", "mctx", "ratio")]
    equal = f"{row['equal']} of {row['trees']}" if "equal" in row else "-"
    return [row["search"], *(str(row[k]) for k in ("trees", "actions", "simulations")), *numbers, equal]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--trees", type=at_least(1), nargs="+", default=[64], help="trees at once (default: 64)")
    parser.add_argument("--actions", type=at_least(2), nargs="+", default=[4, 18], help="actions (default: 4 18)")
    parser.add_argument("--simulations", type=at_least(1), default=50, help="per tree (default: 50)")
    parser.add_argument("--kinds", nargs="+", choices=["puct", "gumbel"], default=["puct", "gumbel"])
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=at_least(0.0, float), default=3.0, help="least time per number (default: 3)")
    parser.add_argument("--no-cuda", action="store_true", help="measure on the CPU")
    parser.add_argument("--no-mctx", action="store_true", help="leave mctx out")
    parser.add_argument("--name", help="also write NAME.md and NAME.csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: benchmarks/results)")
    flags = parser.parse_args()
    if flags.name and Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    import speed
    import torch

    device = "cuda" if torch.cuda.is_available() and not flags.no_cuda else "cpu"
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    print("\n".join(lines), flush=True)
    rows = []
    for kind in flags.kinds:
        for actions in flags.actions:
            for trees in flags.trees:
                rows.append(measure(trees, actions, kind, flags, device))
                lines.append("| " + " | ".join(cells(rows[-1])) + " |")
                print(lines[-1], flush=True)
    note = speed.hardware(device, flags.threads)
    print("\n" + note)
    if flags.name:
        flags.results.mkdir(parents=True, exist_ok=True)
        text = (
            f"# {flags.name}\n\nWritten by `benchmarks/search.py`; its first lines say what the columns are. {note}.\n"
        )
        (flags.results / f"{flags.name}.md").write_text(text + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
        with open(flags.results / f"{flags.name}.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
