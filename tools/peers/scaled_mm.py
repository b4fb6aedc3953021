"""PyTorch's FP8 and bf16 products on a GPU, for the CUDA bench to compare with.

Reads lines "M N K" from stdin and answers each with the microseconds of one product: FP8 with a scale for each row of both
operands, FP8 with one scale for each operand, and bf16. As the bench does, products are captured in a graph over weights
that do not fit the L2 cache together, and the median of its replays counts.
"""

import sys

import torch
from torch.nn.functional import ScalingType, scaled_mm

PAST_L2 = 300_000_000
REPLAYS = 15
DEVICE = "cuda"


def quantize(x):
    """Codes and scales of rows, as FP8 models hold them."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def microseconds(products):
    """The median time of one of the products, captured in one graph."""
    for product in products:
        product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    times = []
    for replay in range(2 + REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end))
    return sorted(times)[REPLAYS // 2] * 1e3 / len(products)


class Weights:
    def __init__(self, n, k):
        count = max(2, PAST_L2 // (n * k))
        first = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
        self.dense = [first.clone() for _ in range(count)]
        self.quantized = [quantize(weight) for weight in self.dense]


def products(weights, m, k):
    """Row-wise FP8, tensor-wise FP8 and bf16, a list of calls each."""
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    codes, scale = quantize(x)
    one = torch.ones((), device=DEVICE)
    row, tensor = ScalingType.RowWise, ScalingType.TensorWise

    def by_rows(weight, weight_scale):
        return lambda: scaled_mm(
            codes, weight.t(), scale, row, weight_scale.reshape(1, -1), row, output_dtype=torch.bfloat16
        )

    def by_tensor(weight):
        return lambda: scaled_mm(codes, weight.t(), one, tensor, one, tensor, output_dtype=torch.bfloat16)

    yield [by_rows(*quantized) for quantized in weights.quantized]
    yield [by_tensor(weight) for weight, _ in weights.quantized]
    yield [lambda weight=weight: x @ weight.t() for weight in weights.dense]


def main():
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    held, weights = None, None
    for line in sys.stdin:
        m, n, k = map(int, line.split())
        if held != (n, k):
            weights = None
            torch.cuda.empty_cache()
            held, weights = (n, k), Weights(n, k)
        print(*(f"{microseconds(calls):.4f}" for calls in products(weights, m, k)), flush=True)


if __name__ == "__main__":
    main()
