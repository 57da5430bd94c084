"""How fast the masks and the training step of ijepa.py are, beside the procedures of the released code.

    python benchmarks/jepa.py                                     # the sizes of --preset cpu, ViT-Ti/16 and ViT-B/16
    python benchmarks/jepa.py --sizes cpu --seconds 20 --name jepa

The peers are written here, plainly, after what facebookresearch/ijepa does; they are not its code:

  * masks: a Python loop over images and blocks that draws corners until enough patches are left, one set of masks of
    128 images at a time.
  * step: attention by an explicit matrix, the patch convolution of the whole image before context patches are picked,
    all tokens through every predictor block, the loss and the gradient norm of every weight read each step, a moving
    average tensor by tensor, AdamW with its defaults.

Both steps get the same weights, images and masks, and their first losses are compared; "with masks" is the ratio when
each also draws its masks, as one thread has to. Columns are medians of CPU time
with one thread, measured in turns, which other processes do not lengthen; on a GPU wall time between synchronisations.
"""

import copy
import csv
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, ROOT, Parser, at_least, fail
from torch import nn

sys.path.insert(0, str(ROOT))

# ---- Masks, one image at a time --------------------------------------------------------------------------------------


def slow_masks(B, grid, rng, scales=((0.15, 0.2), (0.85, 1.0)), aspect=(0.75, 1.5), blocks=4, min_keep=10):
    """Masks of B images as the released collator draws them: context (B, K), targets 4 x (B, P), block sizes. rng: a
    torch generator, asked for one number at a time."""
    sizes = []
    for (low, high), (narrow, wide) in ((scales[0], aspect), (scales[1], (1.0, 1.0))):
        u = torch.rand(1, generator=rng).item()
        keep, ratio = int(grid * grid * (low + u * (high - low))), narrow + u * (wide - narrow)
        h, w = int(round(math.sqrt(keep * ratio))), int(round(math.sqrt(keep / ratio)))
        while h >= grid:
            h -= 1
        while w >= grid:
            w -= 1
        sizes.append((h, w))

    def block(size, allowed=None):
        """Patches of one block (as indices) and the complement of it on the grid."""
        h, w = size
        tries, patience = 0, 20
        while True:
            top = torch.randint(0, grid - h, (1,), generator=rng)
            left = torch.randint(0, grid - w, (1,), generator=rng)
            mask = torch.zeros((grid, grid), dtype=torch.int32)
            mask[top : top + h, left : left + w] = 1
            if allowed is not None:
                for region in allowed[: max(len(allowed) - tries, 0)]:
                    mask *= region
            found = torch.nonzero(mask.flatten())
            if len(found) > min_keep:
                break
            patience -= 1
            if patience == 0:
                tries, patience = tries + 1, 20
        rest = torch.ones((grid, grid), dtype=torch.int32)
        rest[top : top + h, left : left + w] = 0
        return found.squeeze(1), rest

    contexts, targets = [], []
    for _ in range(B):
        chosen, allowed = [], []
        for _ in range(blocks):
            found, rest = block(sizes[0])
            chosen.append(found)
            allowed.append(rest)
        targets.append(chosen)
        contexts.append(block(sizes[1], allowed)[0])
    K, P = min(map(len, contexts)), min(len(t) for chosen in targets for t in chosen)
    context = torch.stack([c[:K] for c in contexts])
    return context, [torch.stack([chosen[m][:P] for chosen in targets]) for m in range(blocks)], sizes


# ---- The step, plainly -----------------------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        matrix = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((matrix @ v).transpose(1, 2).reshape(B, L, D)), matrix


class PlainBlock(nn.Module):
    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, heads)
        hidden = int(dim * ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):
        y, _ = self.attn(self.norm1(x))
        x = x + y
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def pick(x, masks):
    """Tokens of each mask, one mask after the other."""
    return torch.cat([torch.gather(x, 1, m.unsqueeze(-1).repeat(1, 1, x.size(-1))) for m in masks], dim=0)


class PlainEncoder(nn.Module):
    def __init__(self, size, patch, channels, dim, depth, heads, ratio):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, dim), requires_grad=False)
        self.blocks = nn.ModuleList([PlainBlock(dim, heads, ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, masks=None):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if masks is not None:
            x = pick(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainPredictor(nn.Module):
    def __init__(self, patches, dim, width, depth, heads):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, patches, width), requires_grad=False)
        self.predictor_blocks = nn.ModuleList([PlainBlock(width, heads, 4.0) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, z, context, targets):
        B, K = context.shape
        table = self.predictor_pos_embed.repeat(B, 1, 1)
        x = self.predictor_embed(z) + pick(table, [context])
        wanted = pick(table, targets)
        x = torch.cat([x.repeat(len(targets), 1, 1), self.mask_token + wanted], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, K:])


class PlainTrainer:
    """Encoder, predictor, target encoder and one update at constant rates."""

    def __init__(self, config, weights):
        c = config
        self.encoder = PlainEncoder(
            c["image_size"], c["patch_size"], c["channels"], c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"]
        )
        patches = (c["image_size"] // c["patch_size"]) ** 2
        self.predictor = PlainPredictor(patches, c["embed_dim"], c["pred_dim"], c["pred_depth"], c["num_heads"])
        self.encoder.load_state_dict(weights["encoder"])
        self.predictor.load_state_dict(weights["predictor"])
        self.target = copy.deepcopy(self.encoder)
        for p in self.target.parameters():
            p.requires_grad = False
        groups = []
        for part in (self.encoder, self.predictor):
            named = list(part.named_parameters())
            groups.append({"params": [p for n, p in named if "bias" not in n and p.ndim > 1]})
            groups.append({"params": [p for n, p in named if "bias" in n or p.ndim == 1], "weight_decay": 0.0})
        self.opt = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.04)

    def to(self, device):
        for part in (self.encoder, self.predictor, self.target):
            part.to(device)
        return self

    def loss(self, images, context, targets):
        with torch.no_grad():
            h = self.target(images)
            h = pick(F.layer_norm(h, (h.size(-1),)), targets)
        z = self.encoder(images, [context])
        return F.smooth_l1_loss(self.predictor(z, context, targets), h)

    def step(self, images, context, targets, momentum=0.996):
        loss = self.loss(images, context, targets)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        norms = [float(p.grad.norm()) for p in self.encoder.parameters() if p.grad is not None and p.ndim > 1]
        with torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target.parameters()):
                k.data.mul_(momentum).add_((1.0 - momentum) * q.detach().data)
        return loss.item(), norms


# ---- Measuring -------------------------------------------------------------------------------------------------------

SIZES = {
    "cpu": dict(preset="cpu"),
    "vit_tiny": dict(arch="vit_tiny", batch_size=8),
    "vit_small": dict(arch="vit_small", batch_size=8),
    "vit_base": dict(arch="vit_base", batch_size=2),
}


def clock_of(device):
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    return now


def in_turns(functions, seconds, now, least=3):
    """Median time of each function, all called in turns, after one round to warm up."""
    times, end = [[] for _ in functions], None
    while end is None or len(times[0]) <= least or time.perf_counter() < end:
        for found, function in zip(times, functions):
            start = now()
            function()
            found.append(now() - start)
        end = end or time.perf_counter() + seconds
    return [float(np.median(t[1:])) for t in times]


def measure_masks(seconds, images=128, cfg=None):
    """CPU seconds per set of masks (default: at 224/16): (ours, the slow one)."""
    import ijepa

    cfg, a, b = cfg or ijepa.MaskConfig(), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    fast = lambda: [ijepa.sample_masks(images, cfg, a) for _ in range(50)]  # noqa: E731
    slowly = lambda: slow_masks(images, cfg.grid, b, min_keep=cfg.min_keep)  # noqa: E731
    ours, slow = in_turns([fast, slowly], seconds, time.process_time)
    return ours / 50, slow


def measure_step(name, device, seconds):
    """One line of the table: a dict."""
    import ijepa

    given = dict(SIZES[name])
    preset = given.pop("preset", "full")
    args = ijepa.Args(**ijepa.PRESETS[preset] | given | dict(compile=False, bf16=False, num_threads=1))
    ijepa.seed_everything(args, device)
    channels = 1 if args.dataset == "digits" else 3
    config = ijepa.jepa_config(args, channels)
    model = ijepa.IJepa(config).to(device)
    parts = {k: getattr(model, k).state_dict() for k in ("encoder", "predictor")}
    plain = PlainTrainer(config, copy.deepcopy(parts)).to(device)
    learner = ijepa.JepaLearner(model, args, device, 10**6, 10**4)
    size = args.image_size
    images = torch.randn(args.batch_size, channels, size, size, device=device)
    cfg, rng = ijepa.mask_config(args), torch.Generator().manual_seed(0)
    group = learner.group
    drawn = [[ijepa.sample_masks(group, cfg, rng) for _ in range(args.batch_size // group)] for _ in range(8)]
    drawn = [ijepa.device_masks(masks, device) for masks in drawn]
    assert len(drawn[0]) == 1, "the plain step has one group of masks"
    counts = [0, 0]

    def ours():
        counts[0] += 1
        return learner.update(counts[0], images, drawn[counts[0] % 8])

    def theirs():
        counts[1] += 1
        return plain.step(images, *drawn[counts[1] % 8][0])

    with torch.no_grad():
        first = float(plain.loss(images, *drawn[1][0]))
    mine = float(ours()["prediction"])
    theirs()
    fast, slow = in_turns([ours, theirs], seconds, clock_of(device))
    row = dict(size=name, images=args.batch_size, ours=fast, plain=slow, ratio=slow / fast)
    a, b = measure_masks(seconds / 4, args.batch_size, cfg)
    return row | dict(with_masks=(slow + b) / (fast + a), error=abs(mine - first) / first)


HEAD = ["what", "images", "ijepa.py, ms", "plain, ms", "ratio", "with masks", "difference of the first losses"]


def cells(row):
    error = f"{row['error']:.0e}" if "error" in row else "-"
    numbers = [f"{1e3 * row['ours']:.3g}", f"{1e3 * row['plain']:.4g}", f"{row['ratio']:.2f}"]
    masks = f"{row['with_masks']:.2f}" if "with_masks" in row else "-"
    return [row["size"], str(row["images"]), *numbers, masks, error]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["cpu", "vit_tiny", "vit_base"])
    parser.add_argument("--seconds", type=at_least(0.0, float), default=20.0, help="per line (default: 20)")
    parser.add_argument("--no-cuda", action="store_true", help="measure on the CPU")
    parser.add_argument("--name", help="also write NAME.md and NAME.csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default: benchmarks/results)")
    flags = parser.parse_args()
    if flags.name and Path(flags.name).name != flags.name:
        fail(f"--name must be a file name, got {flags.name!r}")
    import speed

    device = torch.device("cuda" if torch.cuda.is_available() and not flags.no_cuda else "cpu")
    torch.set_num_threads(1)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    print("\n".join(lines), flush=True)
    rows = []
    for name in ("masks", *flags.sizes):
        if name == "masks":
            ours, slow = measure_masks(flags.seconds)
            rows.append(dict(size="masks, 14 x 14", images=128, ours=ours, plain=slow, ratio=slow / ours))
        else:
            row = measure_step(name, device, flags.seconds)
            rows.append(row | dict(size=f"step, {name}"))
        lines.append("| " + " | ".join(cells(rows[-1])) + " |")
        print(lines[-1], flush=True)
    note = speed.hardware(device.type, 1)
    print("\n" + note)
    if flags.name:
        flags.results.mkdir(parents=True, exist_ok=True)
        text = f"# {flags.name}\n\nWritten by `benchmarks/jepa.py`; its first lines say what is compared. {note}.\n\n"
        (flags.results / f"{flags.name}.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
        with open(flags.results / f"{flags.name}.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
