#!/usr/bin/env bash
# Guess: PyTorch on a CPU reuses the memory of a freed tensor, or doesn't; a tensor of 33 MiB is handled like one of 31.
# What happens: torch has no cache of its own on CPUs, it asks glibc. glibc learns from freed blocks to keep them, but
#   only below 32 MiB: an operation with a larger result gets fresh pages from the system, one page fault per 4 KiB,
#   and gives them back at once, in every single call. Below the border there are none once some calls have been made.
# Whom it hurts: training of image models on CPUs, where activations are of this size (64 x 64 images, batch 16 x 64):
#   much of the time goes into page faults, and a batch that is a few percent larger can cost far more than that.
# (On Linux the index's default wheel of torch brings CUDA's libraries: some GB. The CPU wheel shows the same.)
# Cure: GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=... or mallopt before the first tensor.
# Seen with: torch 2.13.0, numpy 2.4.6, glibc 2.36, Linux x86-64, Python 3.11. Printed:
#   x + 1 with a result of 31 MiB: 0 page faults per call
#   x + 1 with a result of 33 MiB: 8449 page faults per call
#   33 MiB, mmap_max=0 and a high trim_threshold: 0 page faults per call
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/count.py" <<'EOF'
import resource, sys, torch

torch.set_num_threads(1)
x = torch.ones(int(sys.argv[1]) * 2**18)
for _ in range(60):  # until glibc has learned and its heap is large enough
    y = x + 1
    del y
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    y = x + 1
    del y
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) // 20)
EOF
cd "$folder"
below=$(venv/bin/python count.py 31)
above=$(venv/bin/python count.py 33)
cured=$(GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824 venv/bin/python count.py 33)
echo "x + 1 with a result of 31 MiB: $below page faults per call"
echo "x + 1 with a result of 33 MiB: $above page faults per call"
echo "33 MiB, mmap_max=0 and a high trim_threshold: $cured page faults per call"
[ "$below" -le 2 ] && [ "$above" -ge 16 ] && [ "$cured" -le 2 ] # 16: where the system hands out pages of 2 MiB
