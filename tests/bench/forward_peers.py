"""Prefill and decode speed beside llama-bench: same files, same threads, interleaved runs, medians of ratios.

python3 tests/bench/forward_peers.py OURS LLAMA_BENCH FILE.gguf... [--threads 2] [--runs 3]

OURS is the executable of `cargo bench --bench forward --no-run`. Prints one line per file: our tokens per second, theirs,
and the median of the ratios of neighbouring runs, which other load on the machine disturbs least.
"""
import argparse
import json
import statistics
import subprocess

parser = argparse.ArgumentParser()
parser.add_argument("ours")
parser.add_argument("llama_bench")
parser.add_argument("files", nargs="+")
parser.add_argument("--threads", default="2")
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--prompt", default="512")
parser.add_argument("--generate", default="16")
arguments = parser.parse_args()


def lines(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ours(path):
    out = lines([arguments.ours, path, "--threads", arguments.threads, "--runs", "1",
                 "--prompt", arguments.prompt, "--generate", arguments.generate])
    found = json.loads(out)
    return found["prefill_tokens_per_second"], found["decode_tokens_per_second"]


def theirs(path):
    out = lines([arguments.llama_bench, "-m", path, "-t", arguments.threads, "-p", arguments.prompt,
                 "-n", arguments.generate, "-r", "1", "-o", "json"])
    rows = json.loads(out)
    return (next(row["avg_ts"] for row in rows if row["n_prompt"]),
            next(row["avg_ts"] for row in rows if row["n_gen"]))


for path in arguments.files:
    pairs = [(ours(path), theirs(path)) for _ in range(arguments.runs)]
    for index, what in enumerate(["prefill", "decode"]):
        mine = [a[index] for a, _ in pairs]
        other = [b[index] for _, b in pairs]
        ratio = statistics.median(a / b for a, b in zip(mine, other))
        print(f"{path} {what}: ours {statistics.median(mine):.1f}, llama.cpp {statistics.median(other):.1f}, "
              f"ratio {ratio:.2f}", flush=True)
