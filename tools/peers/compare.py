"""Runs `bench`, llama.cpp and torch in turns on one shape and prints one table.

Every program runs once a round, so that what else the machine does falls on all of them; the medians over the rounds
count. All use the same number of threads and random weights of the same shape, one sequence: a prompt of --prefill
tokens, and --decode greedy tokens after --context positions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from shapes import SHAPES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OURS = ["candle-fp8, FP8 lm_head", "candle-fp8, BF16 lm_head"]
PEERS = {"llama.cpp": "llama.cpp, Q8_0", "torch": "torch, BF16 dequantized"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--layers", type=int, help="only the first layers, to try this script out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="f32", help="of our activations")
    parser.add_argument("--skip", action="append", default=[], choices=PEERS, help="leave a peer out; may be repeated")
    work = ROOT / "target" / "peers"
    parser.add_argument("--work", type=Path, default=work, help="where models are made once (default: target/peers)")
    parser.add_argument("--llama-bench", type=Path, default=work / "llama.cpp" / "build" / "bin" / "llama-bench")
    parser.add_argument("--gguf", type=Path, help="a model that exists (default: one is made)")
    parser.add_argument("--json", action="store_true", help="print the rates of all rounds as JSON")
    return parser.parse_args()


def output(command, env=None):
    """stdout of a command; its stderr is shown if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ | (env or {}))
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}\nfailed with exit code {done.returncode}")
    return done.stdout


def ours(args, head):
    command = [ROOT / "target" / "release" / "examples" / "bench", "--shape", args.shape, "--cpu", "--json"]
    command += ["--dtype", args.dtype, "--lm-head", head, "--batch", 1, "--context", args.context]
    command += ["--prefill", args.prefill, "--decode", args.decode]
    if args.layers:
        command += ["--layers", args.layers]
    report = json.loads(output(command, {"RAYON_NUM_THREADS": str(args.threads)}))
    decode = report["decode"][0]
    return {
        "prefill": report["prefill"][0]["tok_s"],
        "decode": decode["tok_s"],
        "gb_s": decode["gb_s"],
        "read_gb_s": report["machine"]["read_gb_s"],
        "read_percent": decode["read_percent"],
    }


def llama_cpp(args, model):
    def rate(*test):
        command = [args.llama_bench, "-m", model, "-t", args.threads, "-r", 1, "-o", "json", *test]
        (result,) = json.loads(output(command))
        return result["avg_ts"]

    return {
        "prefill": rate("-p", args.prefill, "-n", 0),
        "decode": rate("-p", 0, "-n", args.decode, "-d", args.context),
    }


def torch(args, folder):
    command = [sys.executable, HERE / "torch_bf16.py", "--shape", args.shape, "--dir", folder]
    command += ["--threads", args.threads, "--prefill", args.prefill, "--decode", args.decode]
    command += ["--context", args.context]
    if args.layers:
        command += ["--layers", args.layers]
    return json.loads(output(command, {"OMP_NUM_THREADS": str(args.threads)}))


def programs(args):
    """Name and function of everything that takes part; makes what it needs."""
    # The build is no part of a measurement, and neither is its warming of the processor.
    output(["cargo", "build", "--release", "--manifest-path", ROOT / "Cargo.toml", "--example", "bench"])
    yield OURS[0], lambda: ours(args, "fp8")
    yield OURS[1], lambda: ours(args, "bf16")
    name = f"{args.shape}-{args.layers or 'all'}"
    args.work.mkdir(parents=True, exist_ok=True)
    if "llama.cpp" not in args.skip:
        if not args.llama_bench.exists():
            sys.exit(f"{args.llama_bench} is not there: run tools/peers/build_llama_cpp.sh, or --skip llama.cpp")
        model = args.gguf or args.work / f"{name}.gguf"
        if not model.exists():
            # Under another name until it is whole.
            part = model.with_suffix(".part")
            command = [sys.executable, HERE / "make_gguf.py", "--shape", args.shape, "--out", part]
            output(command + (["--layers", args.layers] if args.layers else []))
            part.rename(model)
        yield PEERS["llama.cpp"], lambda: llama_cpp(args, model)
    if "torch" not in args.skip:
        yield PEERS["torch"], lambda: torch(args, args.work / name)


def table(rates, args):
    """Median, range, and our median (with the FP8 head) divided by each."""

    def median(name, key):
        return statistics.median(run[key] for run in rates[name])

    rows = [["", "decode tok/s", "range", "ours ÷", f"prefill-{args.prefill} tok/s", "range", "ours ÷"]]
    for name, runs in rates.items():
        row = [name]
        for key in ("decode", "prefill"):
            values = [run[key] for run in runs]
            row += [f"{median(name, key):.1f}", f"{min(values):.1f}–{max(values):.1f}"]
            row.append(f"{median(OURS[0], key) / median(name, key):.2f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    print()
    for name in OURS:
        values = [median(name, key) for key in ("gb_s", "read_gb_s", "read_percent")]
        print("{}: {:.1f} GB/s while decoding; a streaming read has {:.1f} GB/s: {:.1f}%".format(name, *values))


def main():
    args = parse()
    players = list(programs(args))
    rates = {name: [] for name, _ in players}
    for round_number in range(args.rounds):
        for name, run in players:
            rates[name].append(run())
            last = ", ".join(f"{key} {rates[name][-1][key]:.1f}" for key in ("decode", "prefill"))
            print(f"round {round_number + 1} of {args.rounds}: {name}: {last}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"shape": args.shape, "threads": args.threads, "rates": rates}))
    else:
        print(f"{args.shape}, {args.threads} threads, medians of {args.rounds} rounds\n")
        table(rates, args)


if __name__ == "__main__":
    main()
