"""What each ingredient of a calibrated conversion is worth, and each kind of tensor.

python3 tests/bench/quality/ablation.py NEMOCONV LLAMA_BIN_FOLDER TEXT_FOLDER SCRATCH_FOLDER MODEL_FOLDER...
    [--type q4_k_m] [--sequences 64] [--kinds-only | --ingredients-only]

First table: everything on, then one thing changed at a time. Second: one kind of tensor as Q4_K, all else Q8_0. Measured as
`run.py` does, by llama-perplexity beside llama-imatrix + llama-quantize.
"""
import argparse
import os
import subprocess
import sys

INGREDIENTS = [
    ("all", ""),
    ("rotation none", "--rotate none"),
    ("rotation hadamard", "--rotate hadamard"),
    ("rotation klt", "--rotate klt"),
    ("no smoothing", "--no-smoothing"),
    ("sorting", "--sort"),
    ("no rewrites at all", "--no-rewrites --rotate none"),
    ("no target correction", "--target-correction 0"),
    ("no coordinate descent", "--passes 0"),
    ("neither of the two", "--passes 0 --target-correction 0"),
    ("gradients at outputs too", "--gradient-sequences 32"),
    ("biases absorb means too", "--bias-absorption"),
    ("rewrites, imatrix search", "--method imatrix"),
    ("rewrites, nearest", "--method rtn"),
    ("imatrix search alone", "--method imatrix --no-rewrites --rotate none"),
]
KINDS = [r"ssm_in\.", r"ssm_out\.", r"attn_(q|k|v)\.", r"attn_output\.", r"ffn_up", r"ffn_down", r"^token_embd", r"^output\."]

parser = argparse.ArgumentParser()
for name in ["nemoconv", "llama", "text", "scratch"]:
    parser.add_argument(name)
parser.add_argument("models", nargs="+")
parser.add_argument("--type", default="q4_k_m")
parser.add_argument("--sequences", type=int, default=64)
group = parser.add_mutually_exclusive_group()
group.add_argument("--kinds-only", action="store_true")
group.add_argument("--ingredients-only", action="store_true")
arguments = parser.parse_args()


def measure(name, model, *rest, flags=""):
    flags = f"--calibration-sequences {arguments.sequences} {flags}"
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "run.py"), arguments.nemoconv, arguments.llama,
               arguments.text, arguments.scratch, model, "--label", "ablation", *rest, "--flags", flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    header, row = (line.split("\t") for line in done.stdout.splitlines()[:2])
    row = dict(zip(header, row))
    print("\t".join([row["model"], name, row["kl"], row["peer_kl"], row["ratio"], row["seconds"]]), flush=True)


print("model\twhat\tkl\tpeer_kl\tratio\tseconds")
for model in arguments.models:
    if not arguments.kinds_only:
        for name, flags in INGREDIENTS:
            measure(name, model, "--types", arguments.type, flags=flags)
    if not arguments.ingredients_only:
        for kind in KINDS:
            measure(f"{kind} alone", model, "--types", "q8_0", "--tensor-type", f"{kind}=q4_k")
