"""KL divergence from the original beside llama-imatrix + llama-quantize: same text, same types, same bytes.

python3 tests/bench/quality/run.py NEMOCONV LLAMA_BIN_FOLDER TEXT_FOLDER SCRATCH_FOLDER MODEL_FOLDER...
    [--types q4_k_m,q4_0,...] [--chunks 16] [--flags "..."] [--label NAME] [--free] [--tensor-type REGEX=TYPE]

Both sides calibrate on TEXT_FOLDER/calib.txt and are measured by llama-perplexity on TEXT_FOLDER/eval.txt against the F32
file. Embedding and head are Q8_0 on both sides, since in small models they drown the rest; `--free` leaves all types to the
mix and gives nemoconv `--target-size` of the peer's file; `--tensor-type` is given to both in place of those two types. What
was made before is kept in the scratch folder.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
import time

# Largest share of the peer's KL divergence that is asked for.
BOUNDS = {"q4_k_m": 0.40, "q4_0": 0.35, "iq4_nl": 0.40, "iq4_xs": 0.45, "q5_k_m": 0.55, "q3_k_m": 0.55, "q6_k": 0.75,
          "q8_0": 1.0}
PINNED = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]

parser = argparse.ArgumentParser()
for name in ["nemoconv", "llama", "text", "scratch"]:
    parser.add_argument(name)
parser.add_argument("models", nargs="+")
parser.add_argument("--types", default=",".join(BOUNDS))
parser.add_argument("--chunks", type=int, default=16)
parser.add_argument("--flags", default="")
parser.add_argument("--label", default="ours")
parser.add_argument("--free", action="store_true")
parser.add_argument("--tensor-type", default="")
arguments = parser.parse_args()
os.makedirs(arguments.scratch, exist_ok=True)
calibration, evaluation = (os.path.join(arguments.text, name) for name in ["calib.txt", "eval.txt"])


def run(*command, must_succeed=True):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if must_succeed and done.returncode != 0:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def tool(name, *rest):
    return run(os.path.join(arguments.llama, name), *rest)


def once(path, make):
    if not os.path.exists(path):
        make()
    return path


def kl_divergence(gguf, base):
    # The tool sometimes ends, or crashes, before its totals are written.
    for _ in range(12):
        log = run(os.path.join(arguments.llama, "llama-perplexity"), "-m", gguf, "-c", "512", "-t", "1", "--kl-divergence-base", base, "--kl-divergence",
                  must_succeed=False)
        mean = re.search(r"Mean\s+KLD:\s+([-0-9.]+) ±\s+([0-9.]+)", log)
        top = re.search(r"Same top p:\s+([0-9.]+)", log)
        if mean and top:
            return float(mean[1]), float(mean[2]), float(top[1])
    sys.exit(f"llama-perplexity printed no totals for {gguf}")


print("model\ttype\tbytes\tpeer_bytes\tkl\tkl_error\ttop1\tpeer_kl\tratio\tbound\tseconds")
for model in arguments.models:
    stem = os.path.join(arguments.scratch, os.path.basename(model))
    f32 = once(f"{stem}-f32.gguf", lambda: run(arguments.nemoconv, "-q", "to-gguf", model, "-t", "f32", "-o", f"{stem}-f32.gguf"))
    base = once(f"{stem}-{arguments.chunks}.kld", lambda: tool(
        "llama-perplexity", "-m", f32, "-f", evaluation, "-c", "512", "--chunks", str(arguments.chunks),
        "--save-all-logits", f"{stem}-{arguments.chunks}.kld"))
    imatrix = once(f"{stem}-imatrix.gguf", lambda: tool(
        "llama-imatrix", "-m", f32, "-f", calibration, "-c", "512", "-o", f"{stem}-imatrix.gguf"))
    for name in arguments.types.split(","):
        pins = [] if arguments.free else PINNED
        kind = "free" if arguments.free else "pinned"
        if arguments.tensor_type:
            pins = ["--tensor-type", arguments.tensor_type]
            kind = re.sub(r"\W+", "_", arguments.tensor_type)
        peer = once(f"{stem}-{name}-{kind}-peer.gguf", lambda: tool(
            "llama-quantize", "--imatrix", imatrix, *pins, f32, f"{stem}-{name}-{kind}-peer.gguf", name.upper()))
        cache = f"{peer}.{arguments.chunks}.kl"
        if not os.path.exists(cache):
            with open(cache, "w") as file:
                file.write(" ".join(map(str, kl_divergence(peer, base))))
        peer_kl = float(open(cache).read().split()[0])
        ours = f"{stem}-{name}-{kind}-{arguments.label}.gguf"
        wanted = ["--target-size", str(os.path.getsize(peer))] if arguments.free else ["-t", name, *pins]
        begun = time.perf_counter()
        run(arguments.nemoconv, "-q", "to-gguf", model, *wanted, "--calibration", calibration, "-o", ours,
            *shlex.split(arguments.flags))
        seconds = time.perf_counter() - begun
        mean, error, top = kl_divergence(ours, base)
        bound = 0.5 if arguments.free else BOUNDS.get(name, 1.0)
        print(f"{os.path.basename(model)}\t{name}\t{os.path.getsize(ours)}\t{os.path.getsize(peer)}\t{mean:.6f}\t{error:.6f}\t"
              f"{top:.2f}\t{peer_kl:.6f}\t{mean / peer_kl:.3f}\t{bound:.2f}\t{seconds:.1f}", flush=True)
