"""The phases side by side, as GGUF and as packed folder: bytes, KL divergence, perplexity, five benchmark tasks.

usage: phases.py NEMOCONV TEXTS BENCHMARKS WORK MODEL... [--sequences 64] [--chunks 16] [--limit 100]

Every artifact is calibrated on TEXTS/calib.txt, measured on TEXTS/eval.txt with activations as its runtime takes them, and
asked the first documents of arc_easy, arc_challenge, piqa, winogrande and hellaswag beside the original. One Markdown row
each: accuracy per task as `original -> artifact`, and the smallest p of McNemar's tests.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

TASKS = "arc_easy,arc_challenge,piqa,winogrande,hellaswag"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode not in (0, 2):
        sys.exit(f"{command}: {done.stderr[-3000:]}")
    return done.stdout


def size_of(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if name.endswith(".safetensors"))


def main():
    parser = argparse.ArgumentParser()
    for name in ("nemoconv", "texts", "benchmarks", "work"):
        parser.add_argument(name)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100)
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    calibration = ["--calibration", os.path.join(args.texts, "calib.txt"), "--calibration-sequences", args.sequences, "-q"]
    print("| model | artifact | bytes | mean KL | perplexity | " + TASKS.replace(",", " | ") + " | p |")
    print("|---" * 11 + "|")
    for model in args.models:
        name = os.path.basename(model.rstrip("/"))
        for phase in (1, 2, 3):
            gguf = os.path.join(args.work, f"{name}-phase-{phase}.gguf")
            folder = os.path.join(args.work, f"{name}-phase-{phase}")
            shutil.rmtree(folder, ignore_errors=True)
            run(args.nemoconv, "to-gguf", model, "-o", gguf, "--phase", phase, *calibration)
            run(args.nemoconv, "to-safetensors", model, "-o", folder, "--phase", phase, *calibration)
            for artifact in (gguf, folder):
                row(args, model, name, phase, artifact)


def row(args, model, name, phase, artifact):
    report = json.loads(run(args.nemoconv, "validate", artifact, "--reference", model, "--text",
                            os.path.join(args.texts, "eval.txt"), "--chunks", args.chunks, "--json", "-q", "--fail-on", "never"))
    logits = report["logits"]
    results = json.loads(run(args.nemoconv, "eval", artifact, "--tasks", TASKS, "--data", args.benchmarks, "--baseline",
                             model, "--limit", args.limit, "--json", "-q"))
    comparison = {entry["task"]: entry for entry in results["comparison"]["tasks"]}
    cells, least = [], 1.0
    for task in TASKS.split(","):
        entry = next(metric for metric in comparison[task]["metrics"] if metric["metric"] == "acc")
        cells.append(f"{entry['baseline']:.2f} -> {entry['model']:.2f}")
        least = min(least, entry["mcnemar_p"])
    kind = "GGUF" if artifact.endswith(".gguf") else "packed"
    print(f"| {name} | phase {phase}, {kind} | {size_of(artifact)} | {logits['kl_divergence']['mean']['value']:.6f} | "
          f"{logits['perplexity']['value']:.3f} | " + " | ".join(cells) + f" | {least:.2f} |", flush=True)


if __name__ == "__main__":
    main()
