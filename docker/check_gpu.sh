#!/usr/bin/env bash
# Are the GPUs usable inside the container? docker/check_gpu.sh [options of run.sh]
#
# Five checks, from the driver to a notebook; ends with 0 if all of them pass.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
options=("$@")
trap 'rm -rf "$work"' EXIT

inside() {
    printf '\n== %s\n' "$1"
    shift
    "$here/run.sh" --gpus all --work "$work" "${options[@]}" -- "$@"
}
inside "the driver" nvidia-smi

inside "torch: a product on each GPU equals the CPU's" python -c '
import torch
print("torch", torch.__version__, "built for CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "torch sees no GPU"
a, b = torch.randn(2, 512, 512, dtype=torch.float64)
for i in range(torch.cuda.device_count()):
    assert torch.allclose((a.to(i) @ b.to(i)).cpu(), a @ b), f"cuda:{i} computes something else"
    print(f"cuda:{i}", torch.cuda.get_device_name(i))
'

inside "Triton compiles and runs a kernel" bash -c 'cat >/tmp/kernel.py && python /tmp/kernel.py' <<'E2'
import torch, triton, triton.language as tl

@triton.jit
def double(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i))

x = torch.randn(1024, device="cuda")
y = torch.empty_like(x)
double[(8,)](x, y, BLOCK=128)
assert torch.equal(y, 2 * x)
print("triton", triton.__version__)
E2

inside "NCCL: the demo model over all GPUs scores as on one" python -c '
import torch, moekit
def loss(world_size):
    with moekit.load("demo", world_size, "cuda", "float32", progress=False) as model:
        return model.evaluate("demo", max_batches=16, progress=False).loss_base2
if __name__ == "__main__":
    n = torch.cuda.device_count()
    one, all_of_them = loss(1), loss(n)
    print(f"loss_base2 on 1 GPU {one:.5f}, on {n}: {all_of_them:.5f}")
    assert abs(one - all_of_them) < 1e-3
'

inside "run_inference.ipynb" papermill --no-progress-bar notebooks/run_inference.ipynb /work/out.ipynb -p device cuda
printf '\nAll five checks passed.\n'
