"""Our conversions beside the stock converter and llama-quantize, on one checkpoint in one run.

    peers.py --nemoconv BIN --llama-bin DIR --convert "PYTHON CONVERTER..." --model FOLDER --work DIR [--runs 3]

`--convert` is the stock converter's command line up to the model's path. The peer's way to a quantized file is the
converter to BF16, then llama-quantize. Prints medians: CPU milliseconds (user + system) per million weights, peak
memory of the largest process, and ratios. `cargo fixtures FOLDER --preset 1b` (or `4b`) writes a checkpoint to compare on.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nemoconv", required=True)
parser.add_argument("--llama-bin", required=True)
parser.add_argument("--convert", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--types", default="bf16,q8_0,q4_0,q4_k_m,iq4_xs")
args = parser.parse_args()


def measure(command):
    """CPU seconds and peak memory in MB of one command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {shlex.join(command)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


plan = subprocess.run([args.nemoconv, "plan", args.model, "-t", "bf16", "--json"], check=True, capture_output=True)
millions = json.loads(plan.stdout)["weights"] / 1e6
peer_bf16, ours_file, peer_file = (f"{args.work}/{name}.gguf" for name in ("peer-bf16", "ours", "peer"))
convert = [*shlex.split(args.convert), args.model, "--outtype", "bf16", "--outfile", peer_bf16]
types = args.types.split(",")
runs = {}
for _ in range(args.runs):
    runs.setdefault("peer converter", []).append(measure(convert))
    for kind in types:
        ours = [args.nemoconv, "to-gguf", args.model, "-o", ours_file, "-t", kind, "-q"]
        runs.setdefault(f"ours {kind}", []).append(measure(ours))
        if kind != "bf16":
            peer = [f"{args.llama_bin}/llama-quantize", peer_bf16, peer_file, kind, str(os.cpu_count())]
            runs.setdefault(f"peer {kind}", []).append(measure(peer))


def median(name, index):
    return statistics.median(run[index] for run in runs[name])


base = median("peer converter", 0)
print(f"{millions:.0f} million weights, {args.runs} runs each, medians\n")
print("| type | ours, ms/M | peer, ms/M | ratio | ours, peak MB | peer, peak MB |\n|---|---|---|---|---|---|")
for kind in types:
    ours = median(f"ours {kind}", 0)
    peer = base + (median(f"peer {kind}", 0) if kind != "bf16" else 0)
    memory = max(median("peer converter", 1), median(f"peer {kind}", 1) if kind != "bf16" else 0)
    print(f"| {kind} | {1000 * ours / millions:.2f} | {1000 * peer / millions:.2f} | {ours / peer:.3f} "
          f"| {median(f'ours {kind}', 1):.0f} | {memory:.0f} |")
