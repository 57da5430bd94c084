# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "scikit-learn>=1.5",
#     "ale-py>=0.11", "gymnasium[box2d,classic-control]>=1.3,<2",
# ]
# ///
"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture.
Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun, Ballas. CVPR 2023; arXiv:2301.08243v3.

From one block of an image a small transformer predicts, for four other blocks, what an encoder makes of their patches:
representations, not pixels. The targets come from a moving average of the encoder, which sees the whole image. There is
no decoder, there are no negatives and no hand-made views: masking, stop-gradient and the moving average have to do.

    python ijepa.py --dataset /data/imagenet                    # ViT-B/16, 600 epochs (train/ and val/ class folders)
    python ijepa.py --preset cpu                                # real digits, three minutes on a laptop
    torchrun --standalone --nproc_per_node=8 ijepa.py --dataset /data/imagenet --preset vit_huge
    python ijepa.py --resume runs/NAME                          # go on, bit for bit on a CPU
    python ijepa.py --evaluate runs/NAME                        # linear probe, nearest neighbours, collapse, pictures
    python ijepa.py --init-from IN1K-vit.h.14-300e.pth.tar --preset vit_huge --dataset hf:NAME --total-steps 0

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

What collapses at small scale, one factor at a time (digits, 520 updates, seeds 1 and 2; variance of the target features
over held-out images and patches, 0.63 at the start; below 0.2 the probe is no better than a random encoder's):
  A: encoder 4e-4; predictor 2e-3, 64 wide; patch embedding of std 0.14   0.65 to 0.75 on seeds 2 to 5
  A with the predictor at the encoder's 4e-4                              0.62  0.10
  A with a predictor of width 32, half the encoder's                      0.13  0.62
  A with a patch embedding of std 0.02: tokens are almost only position   0.06  0.04
  B: both rates 5e-4; predictor 32 wide; patch embedding of std 0.14      0.03  0.06
  B with the predictor at 2e-3                                            0.06  0.17
  B with a predictor of width 64                                          0.52  0.08
  A with --target online: no stop-gradient, no moving average             0.00 after 130 updates
So there is no single cause: the predictor has to keep up with the encoder, which takes both its rate and its width, and
tokens must show some content next to their position. `--preset cpu` is A, three times as long.

Paper [P], authors' released code [O] (facebookresearch/ijepa) and this file, where they are not all the same:
  * The targets are layer-normed without affine parameters, and the loss is the mean smooth L1, as [O]; [P] writes an
    average L2 distance (`--loss l2`) and does not mention the norm.
  * Warm-up is 40 epochs from 2e-4, as [O]; [P] says 15 from 1e-4. The weight decay rises as a cosine, as [O].
  * [O]'s classes divide proj and fc2 of layer l by sqrt(2 l), but its training re-initialises every Linear afterwards:
    the effective init is 0.02 everywhere, as here. `--depth-rescale` is what was meant.
  * Blocks never touch the last row and column ([O]: the upper end of a random corner is exclusive), and of contexts of
    different length the first K patches are kept, which cuts their bottom rows. Both are [O]'s and the default here;
    `--mask-corners inclusive --mask-truncate random` are unbiased.
  * K is the shortest context of the images collated together. So that it does not depend on the batch, masks are drawn
    in groups of 128 images (`--mask-group`), the paper's batch per GPU; one group is one forward and backward pass.
  * [O] seeds all ranks alike, so that crops and masks repeat across GPUs. Here every image has its own, and a run on n
    processes is the run on one process.
  * The last predictor block computes only what is read: queries and MLP of the mask tokens. Context patches are
    gathered before the patch embedding. Both change no number.
  * No gradient scaler (bfloat16 needs none).

The algorithm is in the parts Maths, Networks and Losses and in the loop of `train`; a reader may stop there. The rest
of the file makes it usable alone: data, evaluation, checkpoints, checked flags.

Symbols in shape comments:
  B  images            G  patches per side           K  context patches of an image (equal within a group)
  C  channels          N  patches, G * G             P  patches of a target block (equal within a batch)
  S  pixels per side   D  width of the encoder       M  target blocks of an image
Rows of the predictor are mask-major: all images with their first target block, then all with their second one.
"""

import contextlib
import copy
import ctypes
import glob
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- Args and presets ------------------------------------------------------------------------------------------------


# A default without a source is both the paper's (appendix A) and the authors' released code's.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "ijepa"
    """name of the experiment, part of the run directory"""
    preset: Literal[
        "full",
        "vit_tiny",
        "vit_small",
        "vit_large",
        "vit_huge",
        "vit_huge_448",
        "vit_giant",
        "games",
        "cpu",
        "cpu_games",
    ] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, order of the images, crops, masks"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile the transformer blocks"""
    bf16: bool = True
    """forward passes in bfloat16 on a GPU (weights, moving average and loss stay float32); on a CPU always float32"""
    num_threads: Optional[int] = None
    """CPU threads of torch (default: torch's own choice)"""
    track: Optional[Literal["wandb", "trackio"]] = None
    """also send the curves to this tracker (needs its package)"""
    wandb_project_name: str = "world-models"
    """project name for --track"""
    wandb_entity: Optional[str] = None
    """team for --track wandb"""
    save_every: int = 1_000
    """updates between checkpoints"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    init_from: Optional[str] = None
    """checkpoint of the authors' code to start from; with --total-steps 0 it is only evaluated"""
    target_knn: Optional[float] = None
    """exit with code 1 if the accuracy of nearest neighbours stays below this at the end"""

    # ---- Data
    dataset: str = "games"
    """image folder (train/ and val/ with class folders, class folders, or images), local parquet, `hf:<id>` for a data
    set of Hugging Face; without a download: `digits` (real, from scikit-learn) or `games` (Atari frames, recorded)"""
    image_size: int = 224
    """S, pixels per side that the encoder sees"""
    canvas: Optional[int] = None
    """files are decoded to canvas x canvas pixels, crops are cut out of that on the device (default: 2 x image size)"""
    min_side: int = 32
    """images with a shorter side than this are refused"""
    skip_bad: bool = False
    """go on without images that cannot be decoded or are too small, taking their neighbours instead"""
    cache: bool = False
    """decode all files once and keep them as uint8 on the device"""
    num_workers: int = 10
    """processes that decode files (per process of torchrun); 0: none"""
    game_frames: int = 1_000
    """frames of each game in `--dataset games`"""
    crop_scale: str = "0.3,1.0"
    """share of the image's area in a random resized crop"""
    crop_ratio: str = "0.75,1.3333333"
    """aspect ratios of it; with scale and ratio 1,1 images are resized only"""
    hflip: bool = False
    """mirror half of the images (off in the released configurations)"""

    # ---- World model
    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"] = "vit_base"
    """sizes of encoder and predictor, see ARCHS"""
    patch_size: int = 16
    """pixels per side of a patch"""
    embed_dim: Optional[int] = None
    """D, instead of the arch's"""
    depth: Optional[int] = None
    """layers of the encoder, instead of the arch's"""
    num_heads: Optional[int] = None
    """attention heads of encoder and predictor, instead of the arch's"""
    pred_dim: int = 384
    """width of the predictor"""
    pred_depth: Optional[int] = None
    """layers of the predictor, instead of the arch's"""
    patch_init: float = 0.02
    """standard deviation of the patch embedding's initial weights"""
    depth_rescale: bool = False
    """divide initial proj and fc2 of layer l by sqrt(2 l), which the released code means to do"""
    checkpoint_activations: bool = False
    """recompute each block in the backward pass: less memory, a third more time"""

    # ---- Masks (released code, src/masks/multiblock.py)
    num_targets: int = 4
    """M, target blocks per image"""
    target_scale: str = "0.15,0.2"
    """share of the grid that a target block covers"""
    target_aspect: str = "0.75,1.5"
    """height / width of target blocks"""
    context_scale: str = "0.85,1.0"
    """share of the grid that the (square) context block covers before the targets are taken out"""
    min_keep: int = 10
    """a context must have more patches than this"""
    allow_overlap: bool = False
    """leave the target patches in the context"""
    mask_corners: Literal["exclusive", "inclusive"] = "exclusive"
    """exclusive: blocks never reach the last row and column, as released"""
    mask_truncate: Literal["first", "random"] = "first"
    """which patches of longer contexts are kept; first: cuts the bottom of the image, as released"""
    mask_group: int = 128
    """images that share a context length; the paper's batch per GPU. One forward and backward pass"""

    # ---- Optimization
    epochs: float = 600.0
    """passes over the images (ViT-H: 300)"""
    total_steps: Optional[int] = None
    """updates (default: --epochs)"""
    batch_size: int = 2048
    """images per update, all processes together"""
    micro_batch: Optional[int] = None
    """images per forward and backward pass, at most --mask-group (default: that); smaller saves memory"""
    learning_rate: float = 1e-3
    """peak, of AdamW"""
    predictor_lr: Optional[float] = None
    """peak for the predictor (default: --learning-rate)"""
    start_lr: float = 2e-4
    """at the beginning of the warm-up (released code; the paper: 1e-4)"""
    final_lr: float = 1e-6
    """at the end of the cosine"""
    warmup_epochs: float = 40.0
    """released code; the paper: 15"""
    weight_decay: float = 0.04
    """at the beginning"""
    final_weight_decay: float = 0.4
    """at the end"""
    ema: float = 0.996
    """momentum of the target encoder at the beginning"""
    final_ema: float = 1.0
    """at the end"""
    ipe_scale: float = 1.0
    """stretches the schedules beyond the end of the run (released configurations: 1.0)"""
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """l2: squared error, the paper's words"""
    target: Literal["ema", "online"] = "ema"
    """online: no moving average and no stop-gradient; it collapses, and is here to be compared with"""
    var_coeff: float = 0.0
    """weight of a hinge that keeps the standard deviation of pooled context features above 1 (not the paper's)"""

    # ---- Evaluation and logging
    probe_lr: float = 1e-3
    """of the online linear probe"""
    probe_images: int = 20_000
    """training images whose features nearest neighbours and linear probe are fitted to"""
    eval_images: int = 10_000
    """held-out images that are classified"""
    knn_k: int = 20
    """neighbours that vote"""
    log_every: int = 50
    """updates between log lines"""
    report_every: int = 5_000
    """updates between evaluations with pictures (0: only at the end)"""


# Encoder: width, layers, heads, ratio of the MLP; layers of the predictor (appendix A.1; tiny, small: not published).
ARCHS = {
    "vit_tiny": (192, 12, 3, 4.0, 6), "vit_small": (384, 12, 6, 4.0, 6), "vit_base": (768, 12, 12, 4.0, 6),
    "vit_large": (1024, 24, 16, 4.0, 12), "vit_huge": (1280, 32, 16, 4.0, 12), "vit_giant": (1408, 40, 16, 48 / 11, 16),
}  # fmt: skip
# fmt: off
PRESETS = {
    "full": {},  # ViT-B/16
    "vit_tiny": dict(arch="vit_tiny"),
    "vit_small": dict(arch="vit_small"),
    "vit_large": dict(arch="vit_large"),
    "vit_huge": dict(arch="vit_huge", patch_size=14, epochs=300.0),
    # 128 GPUs with 16 images each, so masks are collated in groups of 16.
    "vit_huge_448": dict(arch="vit_huge", image_size=448, epochs=300.0, mask_group=16),
    "vit_giant": dict(arch="vit_giant", epochs=600.0, warmup_epochs=40.0),
    # One GPU and no data set: frames of Atari games.
    "games": dict(
        dataset="games", arch="vit_small", image_size=128, patch_size=8, epochs=100.0, batch_size=512,
        warmup_epochs=5.0, canvas=160, probe_images=4_000, eval_images=2_000, report_every=500,
    ),
    # A laptop: 20,000 views of 1,297 real digits, 203 thousand parameters.
    "cpu": dict(
        dataset="digits", image_size=24, patch_size=4, embed_dim=64, depth=4, num_heads=4, pred_dim=64, pred_depth=2,
        patch_init=0.14, crop_scale="1,1", crop_ratio="1,1", min_keep=3, mask_corners="inclusive",
        mask_truncate="random", mask_group=64, batch_size=64, total_steps=1_500, learning_rate=4e-4,
        predictor_lr=2e-3, start_lr=4e-5, final_lr=4e-5, warmup_epochs=0.16, weight_decay=0.05,
        final_weight_decay=0.05, ema=0.996, final_ema=0.996, probe_images=4_000, eval_images=3_000, knn_k=10,
        num_workers=0, num_threads=1, compile=False, save_every=250, report_every=250, log_every=25,
    ),
}
# Atari frames on a laptop.
PRESETS["cpu_games"] = PRESETS["cpu"] | dict(
    dataset="games", image_size=64, patch_size=8, embed_dim=96, canvas=64, min_keep=4,
    total_steps=600, learning_rate=5e-4, predictor_lr=2e-3, patch_init=0.04,
)
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every image_size canvas min_side game_frames patch_size embed_dim depth num_heads pred_dim "
        "pred_depth num_targets mask_group batch_size micro_batch probe_images eval_images knn_k log_every".split(),
        (1, math.inf),
    ),
    **dict.fromkeys("min_keep report_every total_steps".split(), (0, 10**12)),
    **dict.fromkeys("weight_decay final_weight_decay warmup_epochs var_coeff".split(), (0, 1e9)),
    **dict.fromkeys("learning_rate predictor_lr start_lr final_lr probe_lr".split(), (1e-12, 1)),
    **{"seed": (0, 2**32 - 1), "num_workers": (0, 1024), "epochs": (1e-6, 1e9), "patch_init": (1e-9, 1e3)},
    **{"ema": (0, 1), "final_ema": (0, 1), "ipe_scale": (1, 100), "target_knn": (0, 1e300)},
}
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def get_2d_sincos_pos_embed(dim, grid):
    """Fixed positions of grid x grid patches: (grid^2, dim). First half of the channels: column, second half: row; each
    half is a block of sines and a block of cosines of the frequencies 10000^(-j / (dim / 4))."""
    if dim % 4:
        raise ValueError(f"positions need a width that is a multiple of 4, got {dim}")
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * omega  # (G, dim / 4)
    one = torch.cat([angle.sin(), angle.cos()], 1)  # (G, dim / 2)
    column, row = one[None].expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], 2).flatten(0, 1).float()  # (G * G, dim)


def apply_masks(x, masks):
    """Pick tokens: x (B, N, D), masks [(B, K), ...] -> (M * B, K, D), mask-major."""
    # NOTE: mask-major, so whatever is repeated for the masks must be repeated whole (`repeat`), not row by row.
    return torch.cat([x.gather(1, m[..., None].expand(-1, -1, x.shape[-1])) for m in masks])


def repeat_interleave_batch(x, B, repeat):
    """Repeat each batch of B rows: [a0, a1, b0, b1] with B = 2, repeat = 2 -> [a0, a1, a0, a1, b0, b1, b0, b1]."""
    return torch.cat([batch.repeat(repeat, *[1] * (x.dim() - 1)) for batch in x.split(B)])


def warmup_cosine_lr(step, warmup=25_000, total=187_500, start=2e-4, ref=1e-3, final=1e-6):
    """Learning rate of update `step`, counted from 1: linear warm-up, then a cosine to `final`."""
    if step < warmup:
        return start + step / warmup * (ref - start)
    progress = (step - warmup) / max(1, total - warmup)
    return max(final, final + (ref - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def cosine_wd(step, total=187_500, ref=0.04, final=0.4):
    """Weight decay of update `step`, counted from 1: a cosine from `ref` to `final`."""
    value = final + (ref - final) * 0.5 * (1 + math.cos(math.pi * step / total))
    return max(final, value) if final <= ref else min(final, value)


def ema_momentum(k, total=187_500, start=0.996, end=1.0):
    """Momentum of the target encoder after update k, counted from 0: linear from `start` to `end`."""
    return start + k * (end - start) / total


def feature_norm(h):
    """Targets: each token normalised over its features, without affine parameters, (..., D)."""
    # NOTE: the encoder's own norm is not enough: its affine parameters could shrink targets, and with them the loss.
    return F.layer_norm(h.float(), h.shape[-1:])


def jepa_loss(pred, target, loss="smooth_l1"):
    """Mean over patches and features of smooth L1 (beta 1) or of the squared error. No gradient into the target."""
    return distance(pred, target.detach(), loss)


def distance(pred, target, loss="smooth_l1"):
    """The same with gradients into both."""
    pred, target = pred.float(), target.float()
    return F.smooth_l1_loss(pred, target) if loss == "smooth_l1" else F.mse_loss(pred, target)


def random_resized_crop_params(h, w, scale, ratio, rng):
    """Random crops of images with sizes h, w (numbers, or tensors (B,)): top, left, height, width in pixels. Ten tries:
    area ~ U(scale) of the image, log of width / height ~ U(log ratio); the first that fits, else the most of it."""
    h, w = torch.as_tensor(h), torch.as_tensor(w)
    h, w = h[..., None], w[..., None]  # (B, 1)
    tries = (*h.shape[:-1], 10)
    draw = lambda: torch.rand(tries, generator=rng)  # noqa: E731
    area = h * w * (scale[0] + draw() * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + draw() * (math.log(ratio[1]) - math.log(ratio[0])))
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width > 0) & (height > 0) & (width <= w) & (height <= h)
    first = fits.int().argmax(-1, keepdim=True)
    # Fallback: the whole image if its aspect is allowed, else as much of it as that of the nearer bound.
    wide, tall = w / h > ratio[1], w / h < ratio[0]
    whole_w = torch.where(wide, (h * ratio[1]).round().long(), w)
    whole_h = torch.where(tall, (w / ratio[0]).round().long(), h)
    found = fits.any(-1, keepdim=True)
    width = torch.where(found, width.gather(-1, first), whole_w)
    height = torch.where(found, height.gather(-1, first), whole_h)
    place = lambda room: (torch.rand(room.shape, generator=rng) * (room + 1)).long().clamp(max=room)  # noqa: E731
    top = torch.where(found, place(h - height), (h - height) // 2)
    left = torch.where(found, place(w - width), (w - width) // 2)
    return tuple(x[..., 0] for x in (top, left, height, width))


def crop_resize(images, boxes, size, flip=None):
    """images (B, C, H, W) in 0..255, boxes (B, 4) top, left, height, width as shares of the image -> (B, C, S, S) in
    0..1. Bilinear with antialiasing, as PIL's resize with a box: each output pixel is a triangle-weighted mean, so that
    a crop of the whole batch is two matrix products."""

    def weights(pixels, begin, length):
        scale = length * pixels / size  # (B,) input pixels per output pixel
        centre = begin[:, None] * pixels + (torch.arange(size, device=boxes.device) + 0.5) * scale[:, None]  # (B, S)
        distance = torch.arange(pixels, device=boxes.device) + 0.5 - centre[..., None]  # (B, S, pixels)
        w = (1 - distance.abs() / scale.clamp(min=1)[:, None, None]).clamp(min=0)
        return w / w.sum(-1, keepdim=True)

    down, across = (
        weights(images.shape[2], boxes[:, 0], boxes[:, 2]),
        weights(images.shape[3], boxes[:, 1], boxes[:, 3]),
    )
    if flip is not None:
        across = torch.where(flip[:, None, None], across.flip(1), across)
    return down[:, None] @ (images.float() / 255) @ across.mT[:, None]


def effective_rank(x, centre=True):
    """exp of the entropy of the singular values of features (n, D); identity covariance: about D, rank one: 1."""
    x = x.double()
    x = x - x.mean(0) if centre else x
    sigma = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=1e-30)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def rankme(x):
    """RankMe (Garrido et al. 2023): the same of features that are not centred, with p = sigma / sum + 1e-7."""
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum().clamp(min=1e-30) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def collapse_metrics(x):
    """Of pooled features (n, D): what is small where a representation has collapsed."""
    return dict(feature_std=float(x.double().std(0).mean()), rankme=rankme(x), effective_rank=effective_rank(x))


# ---- Masks -----------------------------------------------------------------------------------------------------------


class MaskConfig(NamedTuple):
    """Sizes of the blocks, in shares of a grid x grid image (appendix A.1)."""

    grid: int = 14
    num_targets: int = 4
    target_scale: tuple = (0.15, 0.2)
    target_aspect: tuple = (0.75, 1.5)
    context_scale: tuple = (0.85, 1.0)
    min_keep: int = 10
    allow_overlap: bool = False
    corners: str = "exclusive"
    truncate: str = "first"


def sample_block_size(u, scale, aspect, grid):
    """Height and width of a block in patches; u in [0, 1)."""
    low, high = aspect if isinstance(aspect, (tuple, list)) else (aspect, aspect)
    # NOTE: one u for both, as released: small blocks are wide, large ones are tall.
    patches, ratio = int(grid * grid * (scale[0] + u * (scale[1] - scale[0]))), low + u * (high - low)
    height, width = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    return min(height, grid - 1), min(width, grid - 1)


def sample_sizes(cfg, rng):
    """((h, w) of target blocks, (h, w) of context blocks). NOTE: one draw for the whole batch, on all processes."""
    u = torch.rand(2, generator=rng).tolist()
    target = sample_block_size(u[0], cfg.target_scale, cfg.target_aspect, cfg.grid)
    return target, sample_block_size(u[1], cfg.context_scale, 1.0, cfg.grid)


def sample_masks(B, cfg, rng, sizes=None):
    """Multi-block masks of one group of B images (section 3, figure 4): context indices (B, K) and M target blocks
    [(B, P), ...], ascending. No loop over images."""
    G, N, M, ends = cfg.grid, cfg.grid**2, cfg.num_targets, cfg.corners == "inclusive"
    (h, w), (ch, cw) = sizes or sample_sizes(cfg, rng)
    # NOTE: as released, the upper end of a corner is exclusive: the last row and column are never in a block, and a
    # context block of G - 1 always lies in the upper left. `inclusive` repairs that.
    corner = lambda shape, room: torch.randint(0, room + ends, shape, generator=rng).numpy()  # noqa: E731
    block = lambda rows, columns: (np.arange(rows)[:, None] * G + np.arange(columns)).ravel()  # noqa: E731
    top, left = corner((B, M), G - h), corner((B, M), G - w)
    targets = (top * G + left)[..., None] + block(h, w)  # (B, M, P)
    image, line = np.arange(B)[:, None] * N, np.arange(G)  # where each image begins if all lie in one row

    def contexts(forbidden):
        """Context masks (B, N) with new corners, without the first `forbidden` target blocks."""
        row, column = line - corner((B, 1), G - ch), line - corner((B, 1), G - cw)  # (B, G) within the block
        row, column = (row >= 0) & (row < ch), (column >= 0) & (column < cw)
        mask = (row[:, :, None] & column[:, None]).reshape(-1)
        mask[targets[:, :forbidden].reshape(B, -1) + image] = False
        return mask.reshape(B, N)

    forbidden, tries = 0 if cfg.allow_overlap else M, 0
    mask = contexts(forbidden)
    count = mask.sum(1)
    while (few := count <= cfg.min_keep).any() and tries < 20 * (M + 1):
        tries += 1  # another corner, and after 20 of them one target block less is taken out
        mask[few] = contexts(max(0, forbidden - tries // 20))[few]
        count = mask.sum(1)
    K, tgts = int(count.min()), [torch.from_numpy(np.ascontiguousarray(targets[:, m])) for m in range(M)]
    if cfg.truncate == "random":  # the K largest of random numbers: a subset without a preference
        keys = torch.rand(B, N, generator=rng).masked_fill_(torch.from_numpy(~mask), -1.0)
        return torch.from_numpy(np.sort(keys.topk(K, sorted=False).indices.numpy(), 1)), tgts
    # NOTE: as released, the first K in raster order: the bottom of the image is rarely seen.
    found, first = np.flatnonzero(mask), np.cumsum(count) - count
    return torch.from_numpy(found[first[:, None] + np.arange(K)] - image), tgts


class MaskCollator:
    """Masks of update `step` for the images of one process: [(context, targets), ...], one pair per group. They depend
    on seed, step and the group's place in the whole batch only."""

    def __init__(self, cfg, seed, group):
        self.cfg, self.seed, self.group = cfg, seed, group

    def __call__(self, step, first, images):
        """first: index of the first of `images` images in the batch."""
        sizes = sample_sizes(self.cfg, keyed(self.seed, 1, step))
        starts = range(first, first + images, self.group)
        return [sample_masks(self.group, self.cfg, keyed(self.seed, 2, step, i // self.group), sizes) for i in starts]


def keyed(*key):
    """A generator whose numbers depend on the key alone: the same after --resume and on any number of processes."""
    number = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(number))


# ---- Networks --------------------------------------------------------------------------------------------------------
# Module names are those of the authors' code, so that its checkpoints fit.


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, tail=None):
        """(B, L, D) -> (B, L, D), or (B, tail, D) for the last `tail` tokens only."""
        split = lambda y, n: y.unflatten(-1, (n, self.heads, -1)).permute(2, 0, 3, 1, 4)  # noqa: E731
        if tail is None:
            q, k, v = split(self.qkv(x), 3)  # each (B, heads, L, D / heads)
        else:
            D = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = split(F.linear(x[:, -tail:], weight[:D], bias[:D]), 1)
            k, v = split(F.linear(x, weight[D:], bias[D:]), 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU


class Block(nn.Module):
    """Pre-norm transformer block; eps of all norms 1e-6."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, tail=None):
        x = (x if tail is None else x[:, -tail:]) + self.attn(self.norm1(x), tail)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel, written as a linear map of those patches that are wanted."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images, mask=None):
        """(B, C, S, S) -> (B, N, D); with mask (B, K) -> (B, K, D)."""
        B, C, S, _ = images.shape
        p = self.proj.kernel_size[0]
        x = images.view(B, C, S // p, p, S // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C p p)
        x = x if mask is None else apply_masks(x, [mask])
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def init_vit(model, patch_init=0.02, depth_rescale=False):
    """The released training's effective init: N(0, 0.02), also the patch embedding; biases 0, norms 1 and 0."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue  # positions
        if p.dim() > 1:  # NOTE: truncated at +-2, which is 100 standard deviations: not truncated at all
            nn.init.normal_(p, std=patch_init if name.startswith("patch_embed") else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        layer = re.search(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight", name)
        if layer and depth_rescale:
            with torch.no_grad():
                p.div_(math.sqrt(2 * (int(layer[1]) + 1)))


def positions(dim, grid):
    """Fixed table as a parameter without gradient: it counts, and is saved, as in the authors' code."""
    return nn.Parameter(get_2d_sincos_pos_embed(dim, grid)[None].to(torch.get_default_device()), requires_grad=False)


def run_block(block, x, recompute, *args):
    """A block, recomputed in the backward pass instead of kept in memory if `recompute`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, *args, use_reentrant=False)
    return block(x, *args)


class VisionTransformer(nn.Module):
    """Patches -> representations. No class token. Context patches are picked before the first layer, which sees no
    others: masked attention would cost what the whole image costs."""

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
        recompute=False,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.recompute = img_size // patch_size, recompute
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = positions(embed_dim, self.grid)  # (1, N, D)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_vit(self)

    def embed(self, x, mask=None):
        """Images -> tokens with positions: (B, N, D), or (B, K, D) of the patches in mask (B, K)."""
        # NOTE: positions are added before masking: the token knows where it was.
        return self.patch_embed(x, mask) + (self.pos_embed if mask is None else self.pos_embed[0][mask])

    def forward(self, x, masks=None):
        """x (B, C, S, S) -> (B, N, D); with masks (B, K), or a list of M of them, -> (M * B, K, D)."""
        masks = [masks] if masks is None or torch.is_tensor(masks) else masks
        x = torch.cat([self.embed(x, m) for m in masks])
        for block in self.blocks:
            x = run_block(block, x, self.recompute)
        return self.norm(x)

    def layers(self, x, last=4):
        """The outputs of the last layers, each through the final norm: [(B, N, D), ...]."""
        x, found = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - last:
                found.append(self.norm(x))
        return found


class Predictor(nn.Module):
    """From the representations of the context to those of each target block (section 3, "Prediction"). Narrow, with its
    own positions and one learned mask token for all patches that are to be predicted."""

    def __init__(
        self, num_patches=196, embed_dim=768, predictor_embed_dim=384, depth=6, num_heads=12, mlp_ratio=4.0,
        recompute=False,
    ):  # fmt: skip
        super().__init__()
        self.recompute = recompute
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim))
        self.predictor_pos_embed = positions(predictor_embed_dim, math.isqrt(num_patches))  # (1, N, width)
        blocks = [Block(predictor_embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(predictor_embed_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)
        init_vit(self)

    def forward(self, z, ctx, tgts):
        """z (B, K, D) of the patches ctx (B, K); tgts M x (B, P) -> (M * B, P, D)."""
        # NOTE: each target block is a sequence of its own, so that one block's mask tokens never see another's.
        table, M, P = self.predictor_pos_embed[0], len(tgts), tgts[0].shape[1]
        x = (self.predictor_embed(z) + table[ctx]).repeat(M, 1, 1)  # (M * B, K, width)
        wanted = self.mask_token + table[torch.cat(list(tgts))]  # (M * B, P, width)
        x = torch.cat([x, wanted.to(x.dtype)], 1)  # (M * B, K + P, width)
        for block in self.predictor_blocks[:-1]:
            x = run_block(block, x, self.recompute)
        x = run_block(self.predictor_blocks[-1], x, self.recompute, P)  # nobody reads the context's tokens any more
        return self.predictor_proj(self.predictor_norm(x))


class IJepa(nn.Module):
    """Context encoder, predictor and target encoder."""

    def __init__(self, config):
        super().__init__()
        dim, heads, ratio = config["embed_dim"], config["num_heads"], config["mlp_ratio"]
        self.encoder = VisionTransformer(
            config["image_size"], config["patch_size"], config["channels"], dim, config["depth"], heads, ratio,
            config.get("recompute", False),
        )  # fmt: skip
        self.predictor = Predictor(
            self.encoder.grid**2,
            dim,
            config["pred_dim"],
            config["pred_depth"],
            heads,
            4.0,
            config.get("recompute", False),
        )
        for part in (self.encoder, self.predictor):
            init_vit(part, config.get("patch_init", 0.02), config.get("depth_rescale", False))
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)


def official_weights(path, model):
    """State dicts {encoder, predictor, target_encoder} of a checkpoint of the authors' code, checked to fit `model`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(state, dict) and "target_encoder" in state
    except FileNotFoundError:
        fail(f"--init-from {path}: no such file")
    except Exception as e:
        fail(f"--init-from {path} is not a checkpoint of facebookresearch/ijepa ({type(e).__name__})")
    found = {}
    for name in ("encoder", "predictor", "target_encoder"):
        weights = {k.removeprefix("module."): v for k, v in (state.get(name) or {}).items()}
        if not weights and name != "target_encoder":
            say(f"warning: --init-from {path} has no {name}: it starts anew")
            continue
        mine = getattr(model, name).state_dict()
        for k in [k for k in mine if k.endswith("pos_embed") and k in weights]:
            # NOTE: at another resolution the table is computed anew: it is not learned, and has no class token's row.
            weights[k] = weights[k] if weights[k].shape == mine[k].shape else mine[k]
        wrong = [k for k in mine if k not in weights or weights[k].shape != mine[k].shape]
        wrong += [k for k in weights if k not in mine]
        if wrong:
            there, here = (tuple(x[wrong[0]].shape) if wrong[0] in x else "missing" for x in (weights, mine))
            fail(f"--init-from {path} does not fit: {name}.{wrong[0]} is {there} there, {here} here")
        found[name] = weights
    return found


def count_params(model):
    return sum(p.numel() for p in model.parameters())


def jepa_config(args, channels):
    """Sizes of the networks: the arch's, where flags do not say otherwise."""
    dim, depth, heads, ratio, pred_depth = ARCHS[args.arch]
    config = dict(embed_dim=args.embed_dim or dim, depth=args.depth or depth, num_heads=args.num_heads or heads)
    config |= dict(mlp_ratio=ratio, pred_depth=args.pred_depth or pred_depth, pred_dim=args.pred_dim, channels=channels)
    config |= {k: getattr(args, k) for k in ("image_size", "patch_size", "patch_init", "depth_rescale")}
    return config | dict(recompute=args.checkpoint_activations)


# ---- Losses ----------------------------------------------------------------------------------------------------------


class Online(nn.Module):
    """What learns, as one module, so that one DistributedDataParallel holds it. The target encoder stays outside."""

    def __init__(self, model, args):
        super().__init__()
        self.encoder, self.predictor, self.loss, self.var_coeff = (
            model.encoder,
            model.predictor,
            args.loss,
            args.var_coeff,
        )

    def forward(self, x, ctx, tgts, h):
        """Loss terms of images x (B, C, S, S) with masks ctx (B, K), tgts M x (B, P) and targets h (B, N, D), which are
        None if they come from this encoder, with gradients."""
        z = self.encoder(x, ctx)  # (B, K, D)
        pred = self.predictor(z, ctx, tgts)  # (M * B, P, D)
        if h is None:  # without stop-gradient
            losses = {"prediction": distance(pred, apply_masks(feature_norm(self.encoder(x)), tgts), self.loss)}
        else:
            losses = {"prediction": jepa_loss(pred, apply_masks(h, tgts), self.loss)}
        if self.var_coeff:
            std = z.float().mean(1).var(0).add(1e-4).sqrt()  # (D,)
            losses["variance"] = self.var_coeff * F.relu(1 - std).mean()
        return losses


class JepaLearner:
    """The networks, their optimizer, the online probe and the one update."""

    def __init__(self, model, args, device, total, ipe, classes=0, world=1):
        self.model, self.args, self.device, self.total, self.world = model, args, device, total, world
        self.online = Online(model, args)
        self.params = [p for p in self.online.parameters() if p.requires_grad]
        pairs = zip(model.target_encoder.parameters(), model.encoder.parameters())
        self.slow, self.fast = zip(*[(a, b.detach()) for a, b in pairs if b.requires_grad])
        self.forward = self.online
        # [optional: ddp
        if world > 1:
            where = [device.index] if device.type == "cuda" else None
            options = dict(device_ids=where, gradient_as_bucket_view=True)
            self.forward = nn.parallel.DistributedDataParallel(self.online, **options)
        # ddp]
        # NOTE: no decay for biases and norms; the mask token, which has three dimensions, does decay, as released.
        groups, predictor_lr = [], args.predictor_lr or args.learning_rate
        for part, peak in ((model.encoder, args.learning_rate), (model.predictor, predictor_lr)):
            named = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
            for decays in (True, False):
                chosen = [p for n, p in named if (p.dim() > 1 and "bias" not in n) == decays]
                groups.append(dict(params=chosen, peak=peak / args.learning_rate, decays=decays, weight_decay=0.0))
        self.opt = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
        # The schedules, stretched by ipe_scale (released configurations: 1).
        self.warmup, self.horizon = int(args.warmup_epochs * ipe), max(1, int(args.ipe_scale * total))
        self.probe = self.probe_opt = None
        if classes:  # online linear probe, on detached features
            D = model.encoder.norm.normalized_shape[0]
            self.probe = nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, classes)).to(device)
            self.probe_opt = torch.optim.AdamW(self.probe.parameters(), lr=args.probe_lr, weight_decay=0.0, fused=True)
        self.bf16 = args.bf16 and device.type == "cuda"
        self.group = min(args.mask_group, args.batch_size // world)
        self.micro = min(args.micro_batch or self.group, self.group)
        self.bad = None  # which loss terms, or the gradient norm, were not finite; set once, on the device

    def schedules(self, step):
        """Learning rate, weight decay and momentum of update `step`, counted from 1."""
        a = self.args
        lr = warmup_cosine_lr(step, self.warmup, self.horizon, a.start_lr, a.learning_rate, a.final_lr)
        decay = cosine_wd(step, self.horizon, a.weight_decay, a.final_weight_decay)
        momentum = ema_momentum(step - 1, self.horizon, a.ema, a.final_ema) if a.target == "ema" else 0.0
        return lr, decay, momentum

    def update(self, step, images, masks, labels=None):
        """Update `step` (from 1) on images (b, C, S, S) of this process with masks [(ctx, tgts), ...] per group.
        Returns metrics as tensors on the device."""
        lr, decay, momentum = self.schedules(step)
        for group in self.opt.param_groups:
            group["lr"], group["weight_decay"] = lr * group["peak"], decay if group["decays"] else 0.0
        self.opt.zero_grad()
        sums, pooled, b = {}, [], len(images)
        for g, (ctx, tgts) in enumerate(masks):
            x = images[g * self.group : (g + 1) * self.group]
            h = None
            if self.args.target == "ema":
                with torch.no_grad(), self.autocast():  # stop-gradient: the targets are given
                    # NOTE: the target encoder sees the whole image and is masked at its output (table 11).
                    raw = self.model.target_encoder(x)  # (group, N, D)
                    h = feature_norm(raw)
                pooled.append(raw.float().mean(1))
                # The earliest alarms of a collapse: over images and patches, and over images (the part that positions
                # do not explain).
                variance, mean = torch.var_mean(h, 0, correction=0)  # (N, D)
                variance, between = variance.mean(), mean.var(0).mean()
                for k, v in (("target_variance", variance + between), ("image_variance", variance)):
                    sums[k] = sums.get(k, 0) + v / len(masks)
            for i in range(0, len(x), self.micro):
                part = slice(i, i + self.micro)
                last = g == len(masks) - 1 and i + self.micro >= len(x)
                given = None if h is None else h[part]
                with contextlib.nullcontext() if last or self.world == 1 else self.forward.no_sync():
                    with self.autocast():
                        losses = self.forward(x[part], ctx[part], [t[part] for t in tgts], given)
                    (sum(losses.values()) * (len(ctx[part]) / b)).backward()
                for k, v in losses.items():
                    sums[k] = sums.get(k, 0) + v.detach() * (len(ctx[part]) / b)
        norm = torch.stack(torch._foreach_norm([p.grad for p in self.params])).norm()
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        names = [k for k in ("prediction", "variance") if k in sums]
        bad = ~torch.isfinite(torch.stack([*(sums[k] for k in names), norm]))
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*names, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        self.opt.found_inf = self.bad.any().float()  # the fused kernel then leaves parameters and moments alone
        self.opt.step()
        if self.device.type == "cuda" or not self.bad.any():  # on a GPU the loop looks later, and before it saves
            # NOTE: in float32: at the end 1 - momentum is about 2e-8, which bfloat16 would round away.
            torch._foreach_lerp_(self.slow, self.fast, 1 - momentum)
        return sums | {"grad_norm": norm} | self.update_probe(pooled, labels)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def update_probe(self, pooled, labels):
        """One step of the online probe on pooled target features, which cost nothing here."""
        if self.probe is None or sum(map(len, pooled)) < 2:  # batch norm needs two
            return {}
        logits = self.probe(torch.cat(pooled))
        loss = F.cross_entropy(logits, labels)
        self.probe_opt.zero_grad()
        loss.backward()
        # [optional: ddp
        if self.world > 1:
            for p in self.probe.parameters():
                dist.all_reduce(p.grad)
                p.grad /= self.world
        # ddp]
        self.probe_opt.found_inf = self.bad.any().float()
        self.probe_opt.step()
        return {"probe": loss.detach(), "probe_accuracy": (logits.argmax(1) == labels).float().mean()}

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        state = {"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}
        if self.probe is not None:
            state |= {"probe": self.probe.state_dict(), "probe_optimizer": self.probe_opt.state_dict()}
        return state

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])
            self.probe_opt.load_state_dict(state["probe_optimizer"])


# [optional: compile
def compile_jepa(model, learner):
    """Compile the transformer blocks, which are most of the work, for any number of tokens: K changes every step."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    for blocks in (model.encoder.blocks, model.target_encoder.blocks, model.predictor.predictor_blocks):
        for block in blocks:
            block.compile(dynamic=True)  # in place: parameter names in checkpoints stay as they are


# compile]


# ---- Data ------------------------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


class DataFault(Exception):
    """An image cannot be read, or is too small."""


class MemoryImages:
    """Images as uint8 (n, C, H, W), with labels (n,) or None; sizes (n, 2): of the files they come from."""

    def __init__(self, images, labels=None, classes=(), stats=IMAGENET, sizes=None):
        self.images, self.labels, self.classes, self.stats = images, labels, list(classes), stats
        self.sizes = torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes

    def __len__(self):
        return len(self.images)

    def batches(self, indices, workers=0):
        """For each list of indices: images, labels, sizes."""
        for batch in indices:
            at = torch.as_tensor(batch)
            here = at.to(self.images.device)
            yield self.images[here], None if self.labels is None else self.labels[here], self.sizes[at]


class FileImages(torch.utils.data.Dataset):
    """Image files, or rows of a Hugging Face data set, decoded when they are asked for. NOTE: the whole picture is
    squashed to canvas x canvas pixels, so that batches have one shape; crops are cut on the device in shares of the
    picture and undo the squashing, because they are resized to a square anyway."""

    def __init__(self, files, labels, classes, args, rows=None, column=None):
        self.files, self.labels, self.classes, self.rows, self.column = files, labels, list(classes), rows, column
        self.canvas, self.min_side = args.canvas or 2 * args.image_size, args.min_side
        self.skip_bad, self.stats = args.skip_bad, IMAGENET

    def __len__(self):
        return len(self.rows if self.files is None else self.files)

    def name(self, i):
        return f"row {i}" if self.files is None else self.files[i]

    def open(self, i):
        """The image as PIL, decoded; DataFault with its name and what is wrong."""
        try:
            image = self.rows[i][self.column] if self.files is None else Image.open(self.files[i])
            if min(image.size) < self.min_side:
                width, height = image.size
                raise DataFault(
                    f"{self.name(i)} is {width} x {height} pixels, too small for --min-side {self.min_side}"
                )
            size = image.height, image.width
            image.draft("RGB", (self.canvas, self.canvas))  # JPEG: decode at a half, a quarter or an eighth if enough
            return image.convert("RGB"), size  # reads the pixels
        except DataFault:
            raise
        except Exception as e:  # whatever PIL says about a broken file
            raise DataFault(f"cannot read {self.name(i)} ({type(e).__name__}: {e})") from None

    def __getitem__(self, i):
        for k in range(100):
            try:
                at = (i + k) % len(self)
                image, size = self.open(at)
                break
            except DataFault as e:
                # An exception of this kind would be wrapped by the worker with its traceback: hand it over as a string.
                if not self.skip_bad or k == 99:
                    return str(e)
        image = image.resize((self.canvas, self.canvas), Image.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, -1 if self.labels is None else self.labels[at], size, k

    def batches(self, indices, workers=0):
        """For each list of indices: images, labels, sizes (B, 2) that the files had."""
        options = dict(num_workers=workers, pin_memory=torch.cuda.is_available(), collate_fn=collate)
        options |= dict(generator=torch.Generator())  # not the global one, whose numbers others use
        options |= dict(prefetch_factor=2, worker_init_fn=quiet_worker) if workers else {}
        warned = False
        for batch in torch.utils.data.DataLoader(self, batch_sampler=indices, **options):
            if isinstance(batch, str):
                raise DataFault(batch)
            images, labels, sizes, skipped = batch
            if skipped and not warned:
                say("warning: --skip-bad: some images could not be read or were too small; others took their places")
                warned = True
            yield images, None if self.labels is None else labels, sizes

    def probe(self, n=32):
        """Open some images, to find out now what cannot work."""
        for i in sorted({int(x) for x in np.linspace(0, len(self) - 1, n)}):
            try:
                self.open(i)
            except DataFault as e:
                if not self.skip_bad:
                    fail(f"--dataset: {e} (--skip-bad goes on without such images)")


def collate(items):
    """Items of FileImages as a batch, or the first complaint."""
    bad = next((x for x in items if isinstance(x, str)), None)
    if bad:
        return bad
    images, labels, sizes, skipped = zip(*items)
    return torch.stack(images), torch.tensor(labels), torch.tensor(sizes), any(skipped)


def quiet_worker(index):
    """Decoding processes leave stop signals to the main process and end with it."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def list_images(folder):
    """Image files in a folder, sorted; without those in folders below."""
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file())


def scan(folder):
    """(files, labels or None, classes) of a folder: one class per folder with images, or images without labels."""
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and list_images(e.path))
    if not classes:
        return list_images(folder), None, []
    found = [(path, i) for i, name in enumerate(classes) for path in list_images(os.path.join(folder, name))]
    return [p for p, _ in found], [i for _, i in found], classes


def hold_out(n, seed=0):
    """Indices of a fixed tenth of n images (at least one, at most 50,000), and of the others."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, min(n // 10, 50_000))
    return sorted(order[:held]), sorted(order[held:])


def load_folder(args):
    """train and val of an image folder; without val/ a tenth is held out."""
    root, parts = args.dataset, {}
    for name in ("train", "val"):
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            parts[name] = scan(folder)
    if "train" not in parts:
        parts = {"train": scan(root)}
    for name, (files, *_) in parts.items():
        if not files:
            what = root if len(parts) == 1 else os.path.join(root, name)
            fail(f"--dataset {what} has no images ({', '.join(SUFFIXES)}), neither in it nor in folders of it")
    if "val" in parts and parts["val"][2] != parts["train"][2]:
        lost = sorted(set(parts["val"][2]) ^ set(parts["train"][2]))[:3]
        fail(f"--dataset {root}: train and val have different classes, for example {', '.join(lost)}")
    if "val" not in parts:
        files, labels, classes = parts["train"]
        if len(files) < 2:
            fail(f"--dataset {root} has one image: nothing can be held out")
        split = zip(("val", "train"), hold_out(len(files)))
        pick = lambda x, at: None if x is None else [x[i] for i in at]  # noqa: E731
        parts = {name: (pick(files, at), pick(labels, at), classes) for name, at in split}
    return [FileImages(*parts[name], args) for name in ("train", "val")]


def load_hub(args):
    """train and val of a Hugging Face data set or of local parquet files."""
    try:
        import datasets
    except ImportError:
        fail(f"--dataset {args.dataset} needs datasets: pip install datasets")
    path = args.dataset
    try:
        if path.startswith("hf:"):
            found = datasets.load_dataset(path[3:])
        else:
            files = sorted(glob.glob(os.path.join(path, "**", "*.parquet"), recursive=True)) or [path]
            splits = {"train": [f for f in files if not re.search(r"val|test", os.path.basename(f))]}
            splits["validation"] = [f for f in files if f not in splits["train"]]
            found = datasets.load_dataset("parquet", data_files={k: v for k, v in splits.items() if v})
    except Exception as e:  # a name that is not there, no network, a broken file: the library's words, in one line
        fail(f"--dataset {path}: {' '.join(str(e).split())[:300]}")
    names = [n for n in ("validation", "val", "test") if n in found]
    train = found["train"] if "train" in found else next(iter(found.values()))
    images = [c for c, kind in train.features.items() if isinstance(kind, datasets.Image)]
    if not images or not len(train):
        fail(f"--dataset {path} has no images: its columns are {', '.join(train.features)}")
    labels = [c for c, k in train.features.items() if isinstance(k, datasets.ClassLabel)]
    labels = labels or [c for c in ("label", "labels", "fine_label", "coarse_label") if c in train.features]
    if names:
        parts = train, found[names[0]]
    else:
        val, rest = hold_out(len(train))
        parts = train.select(rest), train.select(val)
    made = []
    for rows in parts:
        y = [int(v) for v in rows[labels[0]]] if labels else None
        classes = (
            [] if y is None else getattr(train.features[labels[0]], "names", None) or sorted(set(train[labels[0]]))
        )
        made.append(FileImages(None, y, [str(c) for c in classes], args, rows, images[0]))
    return made


def warp(images, n, size, rng):
    """n views of images (m, 8, 8) in 0..16 -> uint8 (n, 1, size, size), and which image each one is of: bicubic, with
    random size, aspect, rotation and place."""
    index = torch.randint(len(images), (n,), generator=rng)
    u = torch.rand(5, n, generator=rng) * 2 - 1
    zoom, aspect, angle, shift = 1 + 0.2 * u[0], 1 + 0.2 * u[1], 0.3 * u[2], 0.25 * u[3:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(())
    x = torch.stack([cos / zoom / aspect, -sin / zoom, zero.expand(n)], 1)  # where each output pixel looks
    y = torch.stack([sin / zoom, cos / zoom * aspect, zero.expand(n)], 1)
    theta = torch.stack([x, y], 1)  # (n, 2, 3)
    theta[:, :, 2] = -(theta[:, :, :2] @ shift.T[:, :, None])[:, :, 0]
    views = []
    for at in torch.arange(n).split(2_000):
        grid = F.affine_grid(theta[at], (len(at), 1, size, size), align_corners=False)
        seen = F.grid_sample(images[index[at], None].float(), grid, "bicubic", "zeros", align_corners=False)
        views.append((seen * 255 / 16).clamp(0, 255).round().byte())
    return torch.cat(views), index


def load_digits(args):
    """Real handwritten digits, 8 x 8 scans that come with scikit-learn: 20,000 warped views of 1,297 of them to train
    on, 3,000 of the other 500 to evaluate on."""
    try:
        from sklearn import datasets
    except ImportError:
        fail("--dataset digits needs scikit-learn: pip install scikit-learn")
    data = datasets.load_digits()
    images, labels = torch.as_tensor(data.images), torch.as_tensor(data.target)
    order, parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), []
    for at, n, seed in ((order[500:], 20_000, 1), (order[:500], 3_000, 2)):
        views, index = warp(images[at], n, args.image_size, torch.Generator().manual_seed(seed))
        parts.append((views, labels[at][index]))
    pixels = parts[0][0].float() / 255
    stats = (float(pixels.mean()),), (float(pixels.std()),)
    return [MemoryImages(*part, range(10), stats) for part in parts]


GAMES = "Pong Breakout MsPacman Seaquest SpaceInvaders Qbert Freeway BeamRider".split()


def load_games(args):
    """Frames of eight Atari games under random actions, four steps apart; the label is the game. The held-out frames
    are of other episodes."""
    import ale_py

    gym.register_envs(ale_py)
    canvas, parts = args.canvas or 2 * args.image_size, []
    size = (canvas, canvas) if canvas < 160 else (160, 210)  # NOTE: PIL wants width first
    say(f"recording {args.game_frames} frames of each of {len(GAMES)} games")
    for split, share in ((1, 1.0), (2, 0.25)):
        frames, labels = [], []
        for label, name in enumerate(GAMES):
            env, n = gym.make(f"ALE/{name}-v5"), max(2, int(args.game_frames * share))
            rng, ended, seed = np.random.default_rng((label, split)), True, split
            for t in range(4 * n):
                if ended:
                    obs, _ = env.reset(seed=1_000 * seed)
                    seed += 2  # the splits never share an episode
                obs, _, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
                ended = terminated or truncated
                if t % 4 == 3:
                    frame = Image.fromarray(obs)
                    frames.append(np.asarray(frame if frame.size == size else frame.resize(size, Image.BILINEAR)))
            labels += [label] * n
            env.close()
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
        parts.append(MemoryImages(images, torch.tensor(labels), GAMES))
    return parts


def load_data(args):
    """(train, val) of --dataset; every problem of the user's is one line and exit code 2."""
    if args.dataset in ("digits", "games"):
        return load_digits(args) if args.dataset == "digits" else load_games(args)
    if args.dataset.startswith("hf:") or args.dataset.endswith(".parquet"):
        train, val = load_hub(args)
    elif not os.path.isdir(args.dataset):
        fail(f"--dataset {args.dataset}: no such folder (and neither digits, games, hf:<id> nor a .parquet file)")
    elif glob.glob(os.path.join(args.dataset, "**", "*.parquet"), recursive=True):
        train, val = load_hub(args)
    else:
        train, val = load_folder(args)
    for part in (train, val):
        part.probe()
    return train, val


def keep(source, args, device):
    """What is in memory goes to the device if it fits there; with --cache files are decoded once and do too."""
    if isinstance(source, MemoryImages):
        if source.images.numel() < 0.5 * free_memory(device):
            source.images = source.images.to(device)
            source.labels = None if source.labels is None else source.labels.to(device)
        return source
    if not args.cache:
        return source
    need = len(source) * 3 * source.canvas**2
    if need > 0.8 * free_memory(device):
        fail(
            f"--cache needs {need / 1e9:.1f} GB, {free_memory(device) / 1e9:.1f} GB free: lower --canvas, or no --cache"
        )
    images = torch.empty(len(source), 3, source.canvas, source.canvas, dtype=torch.uint8, device=device)
    sizes, start, done = [], time.time(), 0
    for x, _, size in source.batches(some(len(source), len(source)), args.num_workers):
        images[done : done + len(x)] = x.to(device)
        sizes.append(size)
        done += len(x)
        if len(sizes) % 20 == 0 or done == len(source):
            say(f"decoded {done:,} of {len(source):,} images, {done / (time.time() - start):.0f} images/s")
    labels = None if source.labels is None else torch.tensor(source.labels, device=device)
    return MemoryImages(images, labels, source.classes, source.stats, torch.cat(sizes))


class BatchOrder:
    """Indices of the images of this process in updates begin + 1, ..., end: every epoch a new order, incomplete batches
    are dropped."""

    def __init__(self, n, batch, seed, begin, end, rank=0, world=1):
        self.n, self.batch, self.seed, self.begin, self.end = n, batch, seed, begin, end
        self.first, self.images = rank * batch // world, batch // world

    def __len__(self):
        return self.end - self.begin

    def __iter__(self):
        per_epoch, epoch = self.n // self.batch, None
        for step in range(self.begin, self.end):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.n, generator=keyed(self.seed, 0, epoch))
            at = step % per_epoch * self.batch + self.first
            yield order[at : at + self.images].tolist()


def pair(text):
    """ "0.3,1.0" -> (0.3, 1.0)."""
    low, high = map(float, text.split(","))
    return low, high


def normalise(images, stats):
    """(B, C, S, S) in 0..1 -> zero mean and unit variance over the data set."""
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    return (images - mean) / std


def random_crops(images, sizes, args, rng, first, stats):
    """Training crops (B, C, S, S), normalised, of images (B, C, H, W) of this process, the first of which is number
    `first` of the whole batch. sizes (B, 2): of the files."""
    S, scale, ratio = args.image_size, pair(args.crop_scale), pair(args.crop_ratio)
    if scale == ratio == (1.0, 1.0) and not args.hflip and images.shape[2:] == (S, S):
        return normalise(images.float() / 255, stats)
    # Random numbers of the whole batch, so that several processes make the crops of one.
    mine = slice(first, first + len(images))
    every = torch.ones(args.batch_size, 2, dtype=torch.long)
    every[mine] = sizes
    h, w = every.unbind(1)
    top, left, height, width = random_resized_crop_params(h, w, scale, ratio, rng)
    boxes = torch.stack([top / h, left / w, height / h, width / w], 1)[mine]
    flip = (torch.rand(args.batch_size, generator=rng) < 0.5)[mine].to(images.device) if args.hflip else None
    return normalise(crop_resize(images, boxes.to(images.device, non_blocking=True), S, flip), stats)


def centre_crops(images, sizes, args):
    """Evaluation crops (B, C, S, S) in 0..1: the middle seven eighths of the shorter side (256 -> 224)."""
    S = args.image_size
    if images.shape[2:] == (S, S) and args.dataset == "digits":
        return images.float() / 255
    h, w = sizes.float().unbind(1)
    side = 0.875 * torch.minimum(h, w)
    boxes = torch.stack([(1 - side / h) / 2, (1 - side / w) / 2, side / h, side / w], 1)
    return crop_resize(images, boxes.to(images.device), S)


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def knn_accuracy(train_x, train_y, test_x, test_y, k=20):
    """Share of features test_x (n, D) whose k nearest in train_x, by the cosine after subtracting the mean, mostly have
    their label."""
    mean = train_x.mean(0)
    train_x, hits = F.normalize(train_x - mean, dim=1), 0
    classes = int(max(train_y.max(), test_y.max())) + 1
    for x, y in zip(test_x.split(1_000), test_y.split(1_000)):
        near = (F.normalize(x - mean, dim=1) @ train_x.T).topk(min(k, len(train_x))).indices
        votes = F.one_hot(train_y[near], classes).sum(1)
        hits += int((votes.argmax(1) == y).sum())
    return hits / len(test_y)


def linear_probe(train_x, train_y, test_x, test_y, strengths=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1)):
    """Accuracy of logistic regression on whitened features (n, D). The L2 penalty is chosen on a fifth of the training
    features, never on the test features."""
    mean = train_x.mean(0)
    x = (train_x - mean).double()
    if len(x) > x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
    else:  # no more directions than images
        vectors, values, _ = torch.linalg.svd(x.T, full_matrices=False)
        values = values**2
    white = (vectors / ((values.clamp(min=0) + 1e-7 * values.max()) / len(x) + 1e-30).sqrt()).float()
    train_x, test_x = (train_x - mean) @ white, (test_x - mean) @ white
    classes, cut = int(max(train_y.max(), test_y.max())) + 1, max(1, len(train_x) // 5)
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    held, rest = order[:cut], order[cut:] if len(train_x) > 1 else order

    def fit(x, y, strength):
        w = torch.zeros(x.shape[1] + 1, classes, device=x.device, requires_grad=True)
        opt = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(x @ w[:-1] + w[-1], y) + strength * (w[:-1] ** 2).sum()
            loss.backward()
            return loss

        opt.step(closure)
        return w.detach()

    right = lambda w, x, y: float(((x @ w[:-1] + w[-1]).argmax(1) == y).float().mean())  # noqa: E731
    with torch.enable_grad():
        scores = [right(fit(train_x[rest], train_y[rest], s), train_x[held], train_y[held]) for s in strengths]
        best = fit(train_x, train_y, strengths[int(np.argmax(scores))])
    return right(best, test_x, test_y)


def some(n, most):
    """At most `most` of n indices, evenly spread, in lists of 256."""
    at = torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).round().long()
    return [x.tolist() for x in at.split(256)]


@torch.no_grad()
def embed(encoder, source, most, args, device):
    """Features of a frozen encoder on at most `most` images: last (n, D), mean over the patches of its last layer;
    last4 (n, 4 D), those of the last four layers side by side; labels; the variance over images of the normalised
    targets; and the images."""
    encoder.eval()
    last, last4, labels, images, sums = [], [], [], [], 0.0
    workers = args.num_workers if isinstance(source, FileImages) else 0
    for x, y, sizes in source.batches(some(len(source), most), workers):
        crops = centre_crops(x.to(device), sizes, args)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"):
            layers = [h.float() for h in encoder.layers(normalise(crops, source.stats))]
        h = feature_norm(layers[-1])  # (B, N, D)
        sums = sums + torch.stack([h.sum(0), (h**2).sum(0)])  # (2, N, D)
        # NOTE: mean over patches, of the target encoder: the online one, or one patch, is another representation.
        last4.append(torch.cat([h.mean(1) for h in layers], 1))
        last.append(layers[-1].mean(1))
        labels += [] if y is None else [torch.as_tensor(y).to(device)]
        images.append((crops * 255).round().byte().cpu() if len(images) * 256 < 2_000 else crops[:0].byte().cpu())
    encoder.train()
    n = sum(len(x) for x in last)
    mean, square = sums / n
    found = dict(last=torch.cat(last), last4=torch.cat(last4), labels=torch.cat(labels) if labels else None)
    found |= dict(image_variance=float((square - mean**2).mean()))  # of a patch, over images
    found |= dict(target_variance=float((square.mean(0) - mean.mean(0) ** 2).mean()))  # over images and patches
    return found | dict(images=torch.cat(images))


def evaluate_encoder(encoder, train, val, args, device, linear=True):
    """How good the frozen representation is, on held-out images: a dict of numbers, and the features."""
    a = embed(encoder, train, args.probe_images, args, device)
    b = embed(encoder, val, args.eval_images, args, device)
    found = collapse_metrics(b["last"]) | {k: b[k] for k in ("target_variance", "image_variance")}
    if b["labels"] is not None and a["labels"] is not None:
        for name, key in (("", "last"), ("_last4", "last4")):
            data = a[key], a["labels"], b[key], b["labels"]
            found["knn" + name] = knn_accuracy(*data, args.knn_k)
            if linear:
                found["linear" + name] = linear_probe(*data)
    return found, a, b


def describe(found):
    return ", ".join(f"{k}={v:.3f}" for k, v in found.items())


def show(image, side=96):
    """(C, S, S) uint8 -> PIL of at least `side` pixels."""
    image = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    zoom = max(1, -(-side // image.shape[0]))
    return Image.fromarray(np.ascontiguousarray(image).repeat(zoom, 0).repeat(zoom, 1))


def sheet(rows, path):
    """PIL images of equal size in rows -> PNG, and as (H, W, 3)."""
    width, height = rows[0][0].size
    page = Image.new("RGB", (max(map(len, rows)) * (width + 4) + 4, len(rows) * (height + 4) + 4), "white")
    for i, row in enumerate(rows):
        for k, image in enumerate(row):
            page.paste(image, (4 + k * (width + 4), 4 + i * (height + 4)))
    page.save(path)
    return np.asarray(page)


def draw_masks(images, cfg, seed, path):
    """Each image beside what the context encoder sees of it, with its target blocks as frames."""
    images, rows = images[:6], ([], [])
    ctx, tgts = sample_masks(len(images), cfg, torch.Generator().manual_seed(seed))
    for b, image in enumerate(images):
        picture = show(image, 192)
        cell, G = picture.size[0] / cfg.grid, cfg.grid
        seen = np.zeros(G * G, bool)
        seen[ctx[b]] = True
        seen = np.asarray(Image.fromarray(seen.reshape(G, G)).resize(picture.size, Image.NEAREST))
        masked = Image.fromarray(np.where(seen[..., None], np.asarray(picture), 70 + np.asarray(picture) // 8))
        pen = ImageDraw.Draw(masked)
        for t, color in zip(tgts, ("#ff4040", "#40c0ff", "#ffd030", "#50e050", "#ff60ff", "#ffffff")):
            y, x = np.divmod(t[b].numpy(), G)
            box = x.min() * cell, y.min() * cell, (x.max() + 1) * cell - 1, (y.max() + 1) * cell - 1
            pen.rectangle(box, outline=color, width=3)
        rows[0].append(picture)
        rows[1].append(masked)
    return sheet(rows, path)


@torch.no_grad()
def draw_pca(encoder, images, stats, device, path):
    """Images over the first three principal components of their patch features as red, green and blue: what has one
    colour is one thing to the encoder. One basis for all images."""
    crops = images[:8].to(device).float() / 255
    h = encoder(normalise(crops, stats)).float()  # (8, N, D)
    # NOTE: without the mean over images of each patch, which shows the positions and nothing of the images.
    h = (h - h.mean(0)).flatten(0, 1)
    basis = torch.linalg.eigh(h.T @ h).eigenvectors[:, -3:].flip(1)
    x = (h @ basis).cpu()
    low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
    colors = (
        ((x - low) / (high - low + 1e-9)).clamp(0, 1).mul(255).byte().view(len(crops), encoder.grid, encoder.grid, 3)
    )
    top = [show(image, 128) for image in images[:8]]
    below = [Image.fromarray(c.numpy()).resize(top[0].size, Image.NEAREST) for c in colors]
    return sheet([top, below], path)


def draw_neighbours(a, b, path):
    """Held-out images, each with the training images whose features are nearest."""
    queries = torch.linspace(0, len(b["images"]) - 1, 6).long()
    mean, known = a["last"].mean(0), a["last"][: len(a["images"])]
    near = F.normalize(b["last"][queries] - mean, dim=1) @ F.normalize(known - mean, dim=1).T
    near = near.topk(min(7, len(known))).indices.cpu()
    return sheet([[show(b["images"][q]), *(show(a["images"][i]) for i in row)] for q, row in zip(queries, near)], path)


def pictures(model, a, b, cfg, args, stats, folder, prefix, tag, device):
    """Masks, PCA and neighbours as PNG files: {name: (H, W, 3)}."""
    at = lambda name: os.path.join(folder, f"{prefix}{name}{tag}.png")  # noqa: E731
    images = b["images"][torch.linspace(0, len(b["images"]) - 1, 8).long()]
    found = {"masks": draw_masks(images, cfg, args.seed, at("masks"))}
    found["pca"] = draw_pca(model.target_encoder, images, stats, device, at("pca"))
    return found | {"neighbours": draw_neighbours(a, b, at("neighbours"))}


def load_agent(path, device="cpu"):
    """(networks, checkpoint) of a run directory; `model.target_encoder(images)` are its representations."""
    state = load_checkpoint(path, "ijepa")
    with torch.device(device):
        model = IJepa(state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.eval(), state


# ---- Plumbing (shared by all scripts) --------------------------------------------------------------------------------


def fail(message):  # shared
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(text):  # shared
    """Print a line; if the reader of a pipe is gone, stop cleanly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.kill(os.getpid(), signal.SIGTERM)


def parse_args(cls, presets, description):  # shared
    """Command line -> cls. Defaults: --preset, or the run given to --resume, --evaluate or --play. Flags win."""
    words = [w for a in sys.argv[1:] for w in a.split("=", 1)]
    given = {w.replace("_", "-"): v for w, v in zip(words, words[1:]) if w.startswith("--")}
    run = next((given[f] for f in ("--resume", "--evaluate", "--play") if f in given), None)
    defaults = {"preset": given["--preset"], **presets[given["--preset"]]} if given.get("--preset") in presets else {}
    known, names = {f.name for f in fields(cls)}, ("env_kwargs", "action_repeat", "episode_steps", "demonstrator")
    own = defaults.get("env_id", getattr(cls, "env_id", "")).split("/")[0]
    if given.get("--env-id", own).split("/")[0] != own:  # what a preset says about an environment is for its family
        defaults = {k: v for k, v in defaults.items() if not k.endswith(names)}
    defaults = load_args(run) | dict.fromkeys(("resume", "evaluate", "play")) if run is not None else defaults
    if hasattr(signal, "SIGPIPE"):  # `--help | head` ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    args = tyro.cli(cls, description=description, default=cls(**{k: v for k, v in defaults.items() if k in known}))
    if hasattr(signal, "SIGPIPE"):  # but a training run must not die with its reader: see `say`
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return args


def load_args(run):  # shared
    """The flags a run was started with, from its args.json."""
    path = os.path.join(run, "args.json")
    if not any(os.path.isfile(os.path.join(run, name)) for name in ("ckpt.pt", "ckpt.prev.pt")):
        fail(f"no checkpoint in {run}")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)["args"]
    except (OSError, ValueError, KeyError) as e:
        fail(f"cannot read {path} ({type(e).__name__})")


def check_ranges(args, ranges):  # shared
    for name, (low, high) in ranges.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not low <= value <= high:  # NaN fails too
            fail(f"{flag} must be {f'at least {low}' if high == math.inf else f'{low} to {high}'}, got {value}")
        if value is not None and not math.isfinite(value):
            fail(f"{flag} must be finite, got {value}")


def choose_device(args):  # shared
    """The GPU if there is one and --cuda is on; says which and why."""
    if args.cuda and torch.cuda.is_available():
        say(f"device: cuda ({torch.cuda.get_device_name()})")
        return torch.device("cuda")
    say(f"device: cpu ({'no CUDA device' if args.cuda else '--no-cuda'})")
    return torch.device("cpu")


def free_memory(device):  # shared
    """Bytes that can still be allocated, or infinity where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except OSError:
        return math.inf


def peak_memory(device):  # shared
    """Most memory used so far in GB, of the GPU's allocator or of this process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def passed(every, step, stride):  # shared
    """Whether the last `stride` steps went past a multiple of `every` (0: never)."""
    return bool(every) and step // every > (step - stride) // every


def seed_everything(args, device):  # shared
    """Seeds, determinism and the allocator of this process."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # repeated indices in an assignment: the last one wins, also with several threads
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # glibc hands every large tensor back to the system when it is freed and faults its pages in again when the
        # next one is made: a third of the CPU time of image models. Keep freed memory instead (M_MMAP_MAX 0,
        # M_TRIM_THRESHOLD 2 GB).
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt:
            mallopt(-4, 0)
            mallopt(-1, 2**31 - 1)
    if getattr(args, "num_threads", None):
        torch.set_num_threads(args.num_threads)


def rng_state():  # shared
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    host = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return host | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):  # shared
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def atomic_save(state, path):  # shared
    """Write a checkpoint; `path` is the new state or the old one, never half of either. Keeps the old as .prev.pt."""
    temp = path + ".tmp"
    try:
        with open(temp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            os.replace(path, path.replace(".pt", ".prev.pt"))
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:  # disk full, quota, file size limit
        if os.path.exists(temp):
            os.remove(temp)
        reason = f"({type(e).__name__}: {e})"
        raise SystemExit(f"could not write {path} {reason}; the previous checkpoint is untouched") from None


def write_json(data, path):  # shared
    """Write a JSON file; `path` is the new text or the old one."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(data, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise SystemExit(f"could not write {path} ({type(e).__name__}: {e})") from None


def load_checkpoint(run, script, repair=False):  # shared
    """The newest readable checkpoint of a run directory, plain types only; exit code 2 if there is none. `repair`:
    move a damaged ckpt.pt away, else the next save would put it in the place of the good older one."""
    problem = None
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        path = os.path.join(run, name)
        if not os.path.isfile(path):
            continue
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads what is used, later
            if not isinstance(state, dict) or state.get("script") != script:
                fail(f"{path} is not a checkpoint of {script}.py")
            if problem:
                say(f"warning: {problem}; going on from {path}")
                if repair:
                    os.replace(path.replace(".prev.pt", ".pt"), path.replace(".prev.pt", ".damaged.pt"))
            return state
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
            problem = f"{path} is damaged ({type(e).__name__})"
        except Exception as e:  # UnpicklingError: something else than tensors and plain types
            plain = "Weights only" not in str(e)
            problem = f"{path} is damaged ({type(e).__name__})" if plain else f"{path} is not a plain checkpoint"
    fail(problem or f"no checkpoint in {run}")


def new_run_dir(args):  # shared
    """Create runs/{env_id}__{exp_name}__{seed}__{time}, with a suffix if that exists already."""
    task = getattr(args, "env_id", None) or getattr(args, "dataset", "data")
    task = re.sub(r"[^A-Za-z0-9._-]", "-", task)
    base = os.path.join("runs", f"{task}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for suffix in ["", *(f"-{i}" for i in range(1, 100))]:
        try:
            os.makedirs(base + suffix)
            os.mkdir(os.path.join(base + suffix, "videos"))
            break
        except FileExistsError as e:
            if not os.path.isdir(base + suffix):
                fail(f"cannot write runs: {e}")
        except OSError as e:
            fail(f"cannot write runs: {e}")
    return base + suffix


def write_run_info(run, args, script, device):  # shared
    """args.json (flags, command, commit, versions, hardware) and a copy of the script: enough to repeat the run."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(script)), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    except (OSError, subprocess.TimeoutExpired):
        commit, cpu = "", platform.machine()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    info = dict(script=os.path.basename(script)[:-3], command=sys.argv, commit=commit or "unknown", hardware=hardware)
    info["versions"] = {m.__name__: m.__version__ for m in (torch, gym, np)} | {"python": platform.python_version()}
    write_json(info | {"args": asdict(args) | {"resume": None}}, os.path.join(run, "args.json"))
    copy = os.path.join(run, os.path.basename(script))
    if not os.path.exists(copy):
        try:
            shutil.copy(script, copy)
        except OSError as e:
            raise SystemExit(f"could not write {copy} ({type(e).__name__}: {e})") from None


def lock_run(run):  # shared
    """Hold the run directory as long as this process lives; exit code 2 if another process holds it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    try:
        handle = open(os.path.join(run, "lock"), "a+")
    except OSError as e:
        fail(f"cannot write {run}: {e}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        fail(f"{run} is being written by process {handle.read().strip()}")
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def save_gif(frames, path, fps=10):  # shared
    """Frames [(H, W, 3) uint8, ...] -> GIF file."""
    pictures = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


class StopSignal:  # shared
    """Remembers the first stop signal so that the main loop can save and leave; a second one kills at once."""

    def __init__(self):
        self.signum = 0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup stays nohup
                signal.signal(number, self)

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)


class Logger:  # shared
    """TensorBoard, the console and an optional tracker. If the disk is full it warns once and training goes on."""

    def __init__(self, run, args, purge_step=None):
        from torch.utils.tensorboard import SummaryWriter

        # [optional: track
        if args.track == "wandb":
            import wandb

            options = dict(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True)
            name = os.path.basename(run)
            wandb.init(**options, config=vars(args), name=name, id=name, resume="allow")
        self.tracker = None
        if args.track == "trackio":
            import trackio

            self.tracker = trackio
            trackio.init(project=args.wandb_project_name, name=os.path.basename(run), config=vars(args), resume="allow")
        # track]
        self.writer = SummaryWriter(run, purge_step=purge_step)
        # A full disk kills the writer's thread; the next call below reports it, in one line.
        hook = threading.excepthook
        threading.excepthook = lambda e: None if isinstance(e.exc_value, OSError) else hook(e)
        if purge_step is None:
            table = "\n".join(f"|{k}|{v}|" for k, v in vars(args).items())
            self.attempt(self.writer.add_text, "hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def attempt(self, function, *args):
        try:
            if self.writer:
                function(*args)
        except OSError as e:
            say(f"warning: could not write the logs ({e}); training goes on without them")
            self.writer = None

    def scalars(self, values, step):
        for tag, value in values.items():
            self.attempt(self.writer and self.writer.add_scalar, tag, value, step)
        # [optional: track
        if self.tracker:
            self.tracker.log({k: float(v) for k, v in values.items()}, step=step)
        # track]

    def video(self, tag, frames, step, path):
        """A GIF in the run directory and, as an image summary, in TensorBoard (add_video needs a fitting moviepy)."""
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary

            save_gif(frames, path)
            (height, width, _), gif = frames[0].shape, open(path, "rb").read()
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            self.attempt(self.writer and self.writer._get_file_writer().add_summary, summary, step)
        except OSError as e:
            say(f"warning: could not write {path} ({e})")

    def close(self):
        self.attempt(self.writer and self.writer.close)
        # [optional: track
        if self.tracker:
            self.tracker.finish()
        # track]


# ---- Main ------------------------------------------------------------------------------------------------------------

# What --resume may change; everything else would make it another run.
CHANGEABLE = set(
    "exp_name preset cuda compile num_threads track wandb_project_name wandb_entity resume evaluate target_knn "
    "total_steps epochs log_every num_workers cache skip_bad micro_batch checkpoint_activations init_from".split()
)


def mask_config(args):
    names = "num_targets min_keep allow_overlap".split()
    pairs = {k: pair(getattr(args, k)) for k in ("target_scale", "target_aspect", "context_scale")}
    return MaskConfig(
        args.image_size // args.patch_size, **{k: getattr(args, k) for k in names}, **pairs,
        corners=args.mask_corners, truncate=args.mask_truncate,
    )  # fmt: skip


def check_args(args, world=1):
    """Everything that can be said before data are read."""
    check_ranges(args, RANGES)
    for name, (least, most) in {
        "crop_scale": (0, 1), "crop_ratio": (0, 100), "target_scale": (0, 1), "target_aspect": (0, 100),
        "context_scale": (0, 1),
    }.items():  # fmt: skip
        try:
            low, high = pair(getattr(args, name))
            assert least < low <= high <= most
        except (ValueError, AssertionError):
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} must be two numbers LOW,HIGH in ({least}, {most}], got {getattr(args, name)!r}")
    config, size, patch = jepa_config(args, 3), args.image_size, args.patch_size
    heads, share = config["num_heads"], args.batch_size // world
    group = min(args.mask_group, max(1, share))
    micro = min(args.micro_batch or group, group)
    for wrong, message in [
        (size % patch, f"--image-size {size} must be a multiple of --patch-size {patch}: remainder {size % patch}"),
        (size // patch < 3, f"--image-size {size} has fewer than 3 patches of --patch-size {patch} per side"),
        (config["embed_dim"] % heads, f"--embed-dim {config['embed_dim']} must be a multiple of --num-heads {heads}: "
         f"remainder {config['embed_dim'] % heads}"),
        (args.pred_dim % heads, f"--pred-dim {args.pred_dim} must be a multiple of --num-heads {heads}: remainder "
         f"{args.pred_dim % heads}"),
        (config["embed_dim"] % 4, f"--embed-dim must be a multiple of 4, got {config['embed_dim']}"),
        (args.pred_dim % 4, f"--pred-dim must be a multiple of 4, got {args.pred_dim}"),
        (args.batch_size % world, f"--batch-size {args.batch_size} cannot be split among {world} processes: remainder "
         f"{args.batch_size % world}"),
        (share % group, f"--mask-group {group} must divide the {share} images of a process: remainder {share % group}"),
        (group % micro, f"--micro-batch {micro} must divide --mask-group {group}: remainder {group % micro}"),
        (args.target == "online" and args.init_from, "--target online does not go with --init-from"),
        (args.total_steps == 0 and not args.init_from, "--total-steps must be at least 1, got 0"),
        (re.search(r"[/\\\0]", args.exp_name), f"--exp-name must not contain a slash, got {args.exp_name!r}"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
    cfg = mask_config(args)
    for kind, scale, aspect in (
        ("target", cfg.target_scale, cfg.target_aspect), ("context", cfg.context_scale, 1.0),
    ):  # fmt: skip
        sizes = [sample_block_size(u, scale, aspect, cfg.grid) for u in np.linspace(0, 1, 101)]
        h, w = min(sizes, key=lambda s: s[0] * s[1])
        if h * w <= args.min_keep:
            where = f"on a grid of {cfg.grid} x {cfg.grid}"
            fail(f"--min-keep {args.min_keep}: {kind} blocks can be {h} x {w} patches {where}, and need more: lower it")
    if args.track:
        try:
            __import__(args.track)
        except ImportError:
            fail(f"--track {args.track} needs {args.track}: pip install {args.track}")


def rank_and_world():
    """This process's number, how many there are, and its number on this machine, as torchrun says."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


# [optional: ddp
def join_processes(args, rank, world, local):
    """Meet the other processes of torchrun. Returns this one's device (None: CPU) and a group for small messages."""
    import datetime

    cuda = args.cuda and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    patience = datetime.timedelta(hours=2)  # the first process evaluates alone
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    return torch.device("cuda", local) if cuda else None, dist.new_group(backend="gloo", timeout=patience)


# ddp]


def device_masks(masks, device):
    """Mask indices on the device, without waiting for it."""
    if device.type == "cpu":
        return masks
    move = lambda x: x.pin_memory().to(device, non_blocking=True)  # noqa: E731
    return [(move(ctx), list(move(torch.stack(tgts)).unbind())) for ctx, tgts in masks]


def verdict(args, found, random_found):
    """The last line of a run; exit code 1 if a target was set and missed."""
    name = "knn" if "knn" in found else "effective_rank"
    line, target = f"{name} {found[name]:.3f} (random encoder {random_found[name]:.3f}", args.target_knn
    if target is None or name != "knn":
        return say(line + ")")
    say(f"{line}, target {target:g}): {'reached' if found[name] >= target else 'missed'}")
    if not found[name] >= target:
        raise SystemExit(1)


def evaluate_run(args):
    """--evaluate RUN: linear probe, nearest neighbours and collapse metrics of the frozen target encoder, on the run's
    data or on another --dataset. Writes only RUN/eval-*."""
    check_args(args)
    state = load_checkpoint(args.evaluate, "ijepa")
    for name, value in jepa_config(args, state["config"]["channels"]).items():
        if name not in ("recompute", "patch_init", "depth_rescale") and value != state["config"][name]:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} is {state['config'][name]} in {args.evaluate}, got {value}: a trained model cannot change it")
    train, val = load_data(args)
    if channels_of(train) != state["config"]["channels"]:
        have = f"{channels_of(train)} colour channels, {args.evaluate} was trained on {state['config']['channels']}"
        fail(f"--dataset {args.dataset} has {have}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    found, a, b = evaluate_encoder(model.target_encoder, train, val, args, device)
    step = state["global_step"]
    pictures(model, a, b, mask_config(args), args, train.stats, args.evaluate, "eval-", f"-{step}", device)
    result = dict(global_step=step, dataset=args.dataset, metrics=found, random=state["random"])
    write_json(result, os.path.join(args.evaluate, f"eval-{step}.json"))
    say(f"{min(len(val), args.eval_images)} held-out images: {describe(found)}")
    verdict(args, found, state["random"])
    return result


def channels_of(source):
    return source.images.shape[1] if isinstance(source, MemoryImages) else 3


def main(args):
    """Returns the final metrics; raises SystemExit with the exit codes of the README."""
    try:
        return evaluate_run(args) if args.evaluate else train(args)
    except DataFault as e:
        raise SystemExit(f"{e} (--skip-bad goes on without such images); checkpoints are untouched") from None
    except FloatingPointError as e:
        raise SystemExit(f"{e}; ckpt.pt, if there is one, is from before it") from None


def uncompiled(args):  # shared
    """Run what is compiled eagerly inside: other batch sizes and lengths are not worth a compilation each."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def train(args):
    """The whole algorithm. Returns the metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    rank, world, local = rank_and_world()
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # one process speaks
    check_args(args, world)
    state = None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "ijepa"), os.path.join(args.resume, "result.json")
        total = total_steps(args, state["images_per_epoch"] // args.batch_size)
        if state["global_step"] >= total and os.path.exists(result):
            say(f"nothing to do: step {state['global_step']} of {total}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        if not rank:
            lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "ijepa", repair=not rank)  # nobody else writes from here on
    train_set, val_set = load_data(args)
    ipe = len(train_set) // args.batch_size  # updates per epoch; an incomplete last batch is dropped
    if not ipe:
        have = f"{len(train_set)} training images of --dataset {args.dataset}"
        fail(f"--batch-size {args.batch_size} is more than the {have}")
    total = total_steps(args, ipe)
    if not total and not args.init_from:
        fail(f"--epochs {args.epochs} is less than one update of --batch-size {args.batch_size}")
    device, flags = None, None
    # [optional: ddp
    if world > 1:
        device, flags = join_processes(args, rank, world, local)
        say(f"{world} processes, {args.batch_size // world} images each")
    # ddp]
    device = device or choose_device(args)
    seed_everything(args, device)
    config = jepa_config(args, channels_of(train_set))
    with torch.device(device):
        model = IJepa(config)
    official = official_weights(args.init_from, model) if args.init_from and not state else {}
    train_set, val_set = (keep(s, args, device) for s in (train_set, val_set))

    run, logger = args.resume, None
    if not rank:
        run = args.resume or new_run_dir(args)
        lock = lock if args.resume else lock_run(run)  # noqa: F841 (held until the process ends)
        write_run_info(run, args, __file__, device)
        logger = Logger(run, args, purge_step=state["global_step"] + 1 if state else None)
    stop = StopSignal()
    encoder, predictor = count_params(model.encoder), count_params(model.predictor)
    kind = f"{len(train_set.classes)} classes" if train_set.classes else "no labels"
    say(f"run: {run}\nparameters: encoder {encoder:,}, predictor {predictor:,}, target encoder {encoder:,}")
    say(f"data: {len(train_set):,} training images, {len(val_set):,} held out, {kind}; {ipe} updates per epoch")
    cfg, step, random_found = mask_config(args), 0, None

    def evaluate(linear=False):
        with uncompiled(args):
            return evaluate_encoder(model.target_encoder, train_set, val_set, args, device, linear)

    if state:
        random_found = state["random"]
    elif not rank:  # what an encoder that has learned nothing makes of the same images
        random_found, *_ = evaluate(linear=True)
        say(f"random encoder: {describe(random_found)}")
    for name, weights in official.items():
        getattr(model, name).load_state_dict(weights)
    learner = JepaLearner(model, args, device, total, ipe, len(train_set.classes), world)
    if state:
        learner.load_state_dict(state["learner"])
        set_rng_state(state["rng"])
        step = state["global_step"]
        say(f"resumed at step {step} of {total}")
    # [optional: compile
    if args.compile:
        compile_jepa(model, learner)
    # compile]

    def save():
        if rank:
            return
        plain = dict(script="ijepa", args=asdict(args), config=config, global_step=step, updates=step, rng=rng_state())
        plain |= dict(random=random_found, images_per_epoch=len(train_set), learner=learner.state_dict())
        atomic_save(plain, f"{run}/ckpt.pt")

    def part_ways():
        """The last time that processes meet, when the first one has saved. NOTE: one that left alone might abort in
        the threads of its connections, and torchrun would stop the others."""
        # [optional: ddp
        if world > 1:
            dist.barrier(group=flags)
            dist.destroy_process_group()
        # ddp]

    def stopped():
        """Leave after a stop signal: save, say how to go on."""
        save()
        part_ways()
        if logger:
            logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run or '')}"
        say(f"stopped by signal {stop.signum} at step {step}; to go on: {again}")
        raise SystemExit(128 + stop.signum)

    def must_stop():
        """Whether this or another process got a stop signal: all leave after the same update."""
        # [optional: ddp
        if world > 1:
            signum = torch.tensor(stop.signum)
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=flags)
            # NOTE: a signal that came while waiting is for the next time: the others do not know of it yet.
            stop.signum = int(signum) or stop.signum
            return int(signum)
        # ddp]
        return stop.signum

    if must_stop():
        stopped()
    b = args.batch_size // world
    collator, workers = MaskCollator(cfg, args.seed, learner.group), 0
    if isinstance(train_set, FileImages):
        workers = args.num_workers
    batches = train_set.batches(
        BatchOrder(len(train_set), args.batch_size, args.seed, step, total, rank, world), workers
    )
    clock = time.process_time if device.type == "cpu" else time.time
    start, began, waited, mark = (time.time(), step), clock(), 0.0, (time.time(), step, 0.0)
    asked = time.time()
    for images, labels, sizes in batches:
        # One update: crops and masks of this process, loss, AdamW, moving average.
        waited, step = waited + time.time() - asked, step + 1
        images = images.to(device, non_blocking=True)
        labels = None if labels is None else labels.to(device, non_blocking=True)
        crops = random_crops(images, sizes, args, keyed(args.seed, 3, step), rank * b, train_set.stats)
        masks = device_masks(collator(step, rank * b, b), device)
        try:
            metrics = learner.update(step, crops, masks, labels)
        except torch.cuda.OutOfMemoryError:
            hint = "lower --micro-batch or try --checkpoint-activations"
            raise SystemExit(f"out of GPU memory at step {step} (batches of {learner.micro}): {hint}") from None
        if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
            learner.check(f"step {step}, update {step}")

        # Log, evaluate, save. Metrics are read here only: reading waits for the device.
        ending = step >= total
        if passed(args.log_every, step, 1) or ending:
            learner.check(f"step {step}, update {step}")
            values = torch.stack([v.float() for v in metrics.values()])
            # [optional: ddp
            if world > 1:  # of all images, not of this process's alone
                dist.all_reduce(values)
                values /= world
            # ddp]
            if logger:
                seconds, steps, data = (x - y for x, y in zip((time.time(), step, waited), mark))
                mark = time.time(), step, waited
                lr, decay, momentum = learner.schedules(step)
                rate = steps * args.batch_size / max(seconds, 1e-9)
                tags = {"images_per_s": rate, "updates_per_s": steps / max(seconds, 1e-9), "epoch": step / ipe}
                tags |= {"learning_rate": lr, "weight_decay": decay, "momentum": momentum, "updates": step}
                tags |= {"data_wait_seconds": data / steps, "context_patches": masks[0][0].shape[1]}
                losses = {f"losses/{k}": v for k, v in zip(metrics, values.tolist())}
                logger.scalars({f"charts/{k}": float(v) for k, v in tags.items()} | losses, step)
                words = ", ".join(f"{k[7:]}={v:.4g}" for k, v in losses.items() if k != "losses/grad_norm")
                say(f"global_step={step}, {words}, images/s={rate:.0f}")
        if passed(args.report_every, step, 1) and not ending and not rank:
            report(model, evaluate(), cfg, args, train_set.stats, run, step, device, logger)
        if passed(args.save_every, step, 1) or ending:
            learner.check(f"step {step}, update {step}")
            save()
        if must_stop():
            learner.check(f"step {step}, update {step}")
            stopped()
        asked = time.time()

    # Final evaluation of the frozen target encoder on held-out images, and the self-check against --target-knn.
    seconds, steps = time.time() + 1e-9 - start[0], step - start[1]
    unit = "CPU seconds" if device.type == "cpu" else "seconds"
    pace = (
        f"{steps * args.batch_size / seconds:.0f} images/s, {(clock() - began) / max(1, steps):.4f} {unit} per update"
    )
    say(f"{seconds / 60:.1f} minutes, {pace}")
    result = None
    if not rank:
        found, a, pictured = evaluate(linear=True)
        report(model, (found, a, pictured), cfg, args, train_set.stats, run, step, device, logger)
        logger.close()
        name = "knn" if "knn" in found else "effective_rank"
        result = dict(score=found[name], random_score=random_found[name], score_name=name, metrics=found)
        result |= dict(random=random_found, global_step=step, updates=step, images=step * args.batch_size)
        result |= dict(minutes=seconds / 60, run=run, peak_memory_gb=peak_memory(device))
        if stop.signum:
            stopped()
        write_json(result, os.path.join(run, "result.json"))
    part_ways()
    if not rank:
        verdict(args, found, random_found)
    return result


def total_steps(args, ipe):
    return int(args.epochs * ipe) if args.total_steps is None else args.total_steps


def report(model, evaluation, cfg, args, stats, run, step, device, logger):
    """Metrics of the target encoder on held-out images, and pictures, to the console and to TensorBoard."""
    found, a, b = evaluation
    logger.scalars({f"eval/{k}": v for k, v in found.items()}, step)
    say(f"evaluation at step {step}: {describe(found)}")
    try:
        drawn = pictures(model, a, b, cfg, args, stats, os.path.join(run, "videos"), "", f"-{step}", device)
        for name, picture in drawn.items():
            logger.attempt(logger.writer and logger.writer.add_image, f"eval/{name}", picture, step, None, "HWC")
    except OSError as e:
        say(f"warning: could not write the pictures ({e})")


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
