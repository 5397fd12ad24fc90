"""The launchers of attention against float64, on any device.

As a script, which test_triton_attention.py runs in a process of its own: in Triton's interpreter,
which is chosen at import.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from fastdiff.kernels import attention as kernels

SHORT = __name__ == "__main__" and sys.argv[1:] == ["short"]
# Of the interpreter, whose programs run one after another, a second run takes the same way.
TWICE = not SHORT


def check(
    samples,
    heads,
    tokens,
    head_dim,
    *,
    order="heads_first",
    dtype=torch.float32,
    token_major=False,
    spread=1.0,
    low=None,
    backward=True,
    device="cpu",
):
    """out within 2× the error of PyTorch's SDPA in the same dtype, the gradient within 3×, and a
    few ulps; lse to float32's precision; two runs bit-equal. low: (query, key, keys), what channel
    0 of one head's q and of the first keys has; of the others 0."""
    torch.manual_seed(0)
    width = heads * head_dim

    def blank(rows):
        sizes = (samples, tokens, rows) if token_major else (samples, rows, tokens)
        t = torch.full(sizes, float("nan"), dtype=dtype, device=device)
        return t.transpose(1, 2) if token_major else t

    qkv = blank(3 * width).copy_(torch.randn(samples, 3 * width, tokens) * spread)
    if low is not None:
        query, key, keys = low
        qkv[:, 0] = query
        qkv[:, head_dim] = 0
        qkv[:, head_dim, :keys] = key
    grad = blank(width).copy_(torch.randn(samples, width, tokens))

    def run():
        out, grad_qkv = blank(width), blank(3 * width)
        lse = torch.full((samples, heads, tokens), float("nan"), device=device)
        kernels.forward(qkv, heads, order, out)(qkv, out, lse)
        if backward:
            launch = kernels.backward(qkv, heads, order, out, grad, grad_qkv)
            launch(qkv, out, lse, grad, grad_qkv)
        return (out, lse, grad_qkv) if backward else (out, lse)

    def eager(to):
        packed = qkv.to(to).contiguous().detach().clone().requires_grad_()
        shape = (samples, heads, 3, head_dim, tokens)
        axis = 2
        if order == "qkv_first":
            shape, axis = (samples, 3, heads, head_dim, tokens), 1
        q, k, v = packed.view(shape).transpose(3, 4).unbind(axis)
        h = F.scaled_dot_product_attention(q, k, v)
        out = h.transpose(2, 3).reshape(samples, width, tokens)
        scores = (q.detach() @ k.detach().transpose(2, 3)) * head_dim**-0.5
        out.backward(grad.to(to))
        return out.detach(), torch.logsumexp(scores, -1), packed.grad

    ours, theirs, exact = run(), eager(dtype), eager(torch.float64)
    for i, (ours_, factor) in enumerate(zip(ours, (2, 2, 3), strict=False)):
        error = (ours_.double() - exact[i]).abs().max().item()
        their_error = (theirs[i].double() - exact[i]).abs().max().item()
        most = exact[i].abs().max().item()
        if i == 1:  # PyTorch's would be in the storage dtype; scores cancel in head_dim products
            largest = qkv.abs().max().item() ** 2 * head_dim**0.5
            allowed = 4 * torch.finfo(torch.float32).eps * max(most, largest)
        else:
            allowed = factor * their_error + 2 * torch.finfo(dtype).eps * most
        assert error <= allowed, (
            f"{('out', 'lse', 'grad_qkv')[i]} of {samples, heads, tokens, head_dim} {order} "
            f"{dtype}: {error:.2e}, PyTorch {their_error:.2e}, largest {most:.2e}"
        )
    for first, second in zip(ours, run() if TWICE else ours, strict=True):
        assert torch.equal(first, second), "two runs differ"


def main():
    half, brain = torch.float16, torch.bfloat16
    check(2, 1, 33, 8)
    check(1, 1, 40, 40, order="qkv_first", token_major=True)
    check(1, 2, 1, 64)
    if not SHORT:
        check(1, 2, 17, 24, order="qkv_first")
        check(1, 1, 34, 96)
        check(1, 1, 20, 144, token_major=True)
        check(1, 1, 18, 512)
    print("shapes: agree")

    for dtype in (half, brain):
        check(1, 1, 40, 128, dtype=dtype, token_major=True)
        if not SHORT:
            check(1, 1, 130, 64, dtype=dtype)
            check(1, 1, 20, 300, order="qkv_first", dtype=dtype)
    print("halves: agree")

    check(1, 1, 80, 32, spread=8.0)  # one key takes nearly everything
    print("large scores: agree")

    check(1, 1, 80, 32, low=(30.0, -40.0, 80))  # exp(-lse) overflows; the last block is not full
    check(1, 1, 80, 32, low=(1e20, -1e20, 70))  # the scores overflow, of two whole blocks
    print("low scores: agree")

    qkv = torch.randn(1, 24, 5)
    out, with_lse = torch.full((2, 1, 8, 5), float("nan"))
    launch = kernels.forward(qkv, 2, "heads_first", out)
    launch(qkv, out, None)
    launch(qkv, with_lse, torch.empty(1, 2, 5))
    assert torch.equal(out, with_lse)
    print("edges: agree")


if __name__ == "__main__":
    main()
