"""KL divergence of packed folders against the original: ours and llm-compressor's GPTQ, same scheme, samples and size.

usage: packed.py NEMOCONV PYTHON TEXTS WORK MODEL... [--schemes w4a16,w8a8] [--sequences 128] [--chunks 16]

PYTHON has llmcompressor, compressed-tensors and transformers; TEXTS holds calib.txt and eval.txt. Both sides read the same
sequences of 512 tokens of calib.txt. `nemoconv validate` measures both folders on eval.txt, int8 inputs simulated where
the folder declares them. One line per model and scheme, tab-separated: both means, their ratio, bytes, seconds.
"""
import argparse
import json
import os
import subprocess
import sys
import time

PEER = r'''
import sys, torch, time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
model_dir, out, scheme, text, count = sys.argv[1:]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
ids = tokenizer(open(text).read()).input_ids[: int(count) * 512]
rows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 512] * len(rows)})
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
start = time.time()
oneshot(model=model, tokenizer=tokenizer, dataset=data, max_seq_length=512, num_calibration_samples=len(rows),
        recipe=GPTQModifier(targets="Linear", scheme=scheme.upper(), ignore=["lm_head", "re:.*gate$"]))
print("SECONDS", time.time() - start)
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
'''


def run(*command, **more):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if done.returncode not in (0, 2):
        sys.exit(f"{command}: {done.stderr[-3000:]}")
    return done.stdout


def text_of(python, model, texts, work, sequences):
    """So much of calib.txt as gives the sequences, no more."""
    path = os.path.join(work, f"{os.path.basename(model)}-{sequences}.txt")
    if not os.path.exists(path):
        code = (
            "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
            "e = t(open(sys.argv[2]).read(), return_offsets_mapping=True);"
            "n = int(sys.argv[3]) * 512; end = e.offset_mapping[n + 64][0];"
            "open(sys.argv[4], 'w').write(open(sys.argv[2]).read()[:end])"
        )
        run(python, "-c", code, model, os.path.join(texts, "calib.txt"), sequences, path)
    return path


def kl(nemoconv, folder, model, texts, chunks):
    report = run(nemoconv, "validate", folder, "--reference", model, "--text", os.path.join(texts, "eval.txt"),
                 "--chunks", chunks, "--json", "-q", "--fail-on", "never")
    return json.loads(report)["logits"]["kl_divergence"]["mean"]["value"]


def bytes_of(folder):
    files = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return sum(os.path.getsize(os.path.join(folder, name)) for name in files)


def main():
    parser = argparse.ArgumentParser()
    for name in ("nemoconv", "python", "texts", "work"):
        parser.add_argument(name)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemes", default="w4a16,w8a8")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--flags", default="", help="more flags for nemoconv")
    parser.add_argument("--label", default="ours")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    print("model\tscheme\tours\ttheirs\tratio\tbytes\ttheir bytes\tseconds\ttheir seconds")
    for model in args.models:
        name = os.path.basename(model.rstrip("/"))
        text = text_of(args.python, model, args.texts, args.work, args.sequences)
        for scheme in args.schemes.split(","):
            theirs = os.path.join(args.work, f"{name}-{scheme}-{args.sequences}-peer")
            seconds = theirs + ".seconds"
            if not os.path.exists(seconds):
                out = run(args.python, "-c", PEER, model, theirs, scheme, text, args.sequences)
                line = next(line for line in out.splitlines() if line.startswith("SECONDS"))
                open(seconds, "w").write(line.split()[1])
            ours = os.path.join(args.work, f"{name}-{scheme}-{args.sequences}-{args.label}")
            subprocess.run(["rm", "-rf", ours], check=True)
            start = time.time()
            run(args.nemoconv, "to-safetensors", model, "-o", ours, "--scheme", scheme, "--calibration", text, "-q",
                *args.flags.split())
            took = time.time() - start
            a, b = (kl(args.nemoconv, folder, model, args.texts, args.chunks) for folder in (ours, theirs))
            print(f"{name}\t{scheme}\t{a:.6f}\t{b:.6f}\t{a / b:.3f}\t{bytes_of(ours)}\t{bytes_of(theirs)}\t{took:.1f}"
                  f"\t{float(open(seconds).read()):.1f}", flush=True)


if __name__ == "__main__":
    main()
