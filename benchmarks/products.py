"""What can a product of few rows with an expert's weight reach, by which way?

x @ W.T with W of [2 * I, H] and of [H, I], in float32 or bfloat16: as the sparse block does it, by `F.linear`, transposed
(W @ x.T), with weights packed beforehand for oneDNN and for MKL, and the floor: the longer of reading the weight once (the
fastest matrix-vector product) and of the arithmetic (a product of large matrices).
"""

import torch
import torch.nn.functional as F

from unimoe.modeling_unimoe.sorted_experts import _linear

from .common import Report, arguments, compare, read_other_memory

LARGE = 1024


def ways(weight: torch.Tensor, x: torch.Tensor) -> dict:
    """Every way to the same product, by its name."""
    rows = len(x)
    found = {
        "ours": lambda: _linear(x, weight, None),
        "F.linear": lambda: F.linear(x, weight),
        "W @ x.T": lambda: torch.mm(weight, x.t().contiguous()).t(),
    }
    if torch.backends.mkldnn.is_available():
        for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        found["packed for oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, for_onednn, None, "none", [], "")
    if torch.backends.mkl.is_available() and weight.dtype == torch.float32:
        for_mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        found["packed for MKL"] = lambda: torch.ops.mkl._mkl_linear(x, for_mkl, weight, None, rows)
    return found


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=2816)
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of an expert")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    report = Report("products", "What can a product of few rows with an expert's weight reach?", args)
    torch.manual_seed(0)
    for dtype_name in args.dtypes or (["float32", "bfloat16"] if args.full else ["float32"]):
        dtype = getattr(torch, dtype_name)
        large = torch.randn(LARGE, LARGE, dtype=dtype)
        shapes = [(2 * args.intermediate_size, args.hidden_size), (args.hidden_size, args.intermediate_size)]
        for shape in shapes if args.full else shapes[:1]:
            weight = torch.randn(shape, dtype=dtype)
            for rows in args.tokens or ([1, 2, 4, 8, 16, 32, 64, 128, 256] if args.full else [1, 8, 32, 128]):
                x = torch.randn(rows, shape[1], dtype=dtype)
                runs = ways(weight, x)
                runs["read"] = lambda weight=weight, x=x: torch.mv(weight, x[0])
                runs["read by ours"] = lambda weight=weight, x=x: _linear(x[:1], weight, None)
                runs["large product"] = lambda large=large: large @ large
                times = compare(runs, args.rounds, before=read_other_memory)
                arithmetic = times.pop("large product") * rows * weight.numel() / LARGE**3
                times["floor"] = max(min(times.pop("read"), times.pop("read by ours")), arithmetic)
                case = f"{dtype_name}, {rows} rows, weight {shape[0]} x {shape[1]}"
                for name, seconds in times.items():
                    if name != "ours":
                        report.add("product", case, name, seconds / times["ours"])
    return report.finish(
        ["floor: the longer of reading the weight once and of the arithmetic at a large product's speed"]
    )


if __name__ == "__main__":
    main()
