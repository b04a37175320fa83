"""Benchmark tasks beside lm-eval and llama-perplexity's hellaswag scorer: same documents, same threads, interleaved runs.

python3 tests/bench/eval_peers.py NEMOCONV LM_EVAL_PYTHON LLAMA_PERPLEXITY MODEL_FOLDER FILE.gguf DATA_FOLDER
    [--limit 50] [--batch 16] [--threads 2] [--runs 3]

Whole commands for nemoconv and llama-perplexity; of lm-eval only its own time in `loglikelihood`, without imports, loading
and reading. Prints medians and the median of the ratios of pairs. Where other programs run too, OMP_WAIT_POLICY=passive keeps
torch's threads from spinning while they wait.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

TASKS = {"arc_easy": ("arc/arc_easy.yaml", "test"), "arc_challenge": ("arc/arc_challenge.yaml", "test"),
         "piqa": ("piqa/piqa.yaml", "validation"), "winogrande": ("winogrande/default.yaml", "validation"),
         "hellaswag": ("hellaswag/hellaswag.yaml", "validation")}

# Runs inside lm-eval's Python; the tasks are its own, read from local files.
LM_EVAL = """
import json, os, sys, time
import lm_eval, torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
library = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
for name, (definition, split) in job["tasks"].items():
    path = os.path.join(job["data"], name, split + ".jsonl")
    task = {"include": os.path.join(library, definition), "task": name, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: path}}, "training_split": None,
            "validation_split": split if split == "validation" else None, "test_split": split if split == "test" else None}
    with open(os.path.join(job["folder"], name + ".yaml"), "w") as file:
        json.dump(task, file)
model = HFLM(pretrained=job["model"], dtype="float32", device="cpu", batch_size=job["batch"])
ask, spent = model.loglikelihood, 0.0
def timed(*args, **kwargs):
    global spent
    begun = time.perf_counter()
    answer = ask(*args, **kwargs)
    spent += time.perf_counter() - begun
    return answer
model.loglikelihood = timed
lm_eval.simple_evaluate(model, tasks=list(job["tasks"]), limit=job["limit"], bootstrap_iters=0,
                        task_manager=TaskManager(include_path=job["folder"], include_defaults=False))
print("seconds", spent)
"""

parser = argparse.ArgumentParser()
for name in ["nemoconv", "lm_eval_python", "llama_perplexity", "model", "gguf", "data"]:
    parser.add_argument(name)
parser.add_argument("--limit", type=int, default=50)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--runs", type=int, default=3)
arguments = parser.parse_args()
data = os.path.abspath(arguments.data)


def seconds_of(command):
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def ours(model, tasks):
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of([arguments.nemoconv, "-q", "eval", model, "--tasks", ",".join(tasks), "--data", data,
                           "--limit", str(arguments.limit), "--threads", str(arguments.threads), "--output", folder])


def lm_eval():
    with tempfile.TemporaryDirectory() as folder:
        job = {"threads": arguments.threads, "tasks": TASKS, "data": data, "folder": folder,
               "model": os.path.abspath(arguments.model), "batch": arguments.batch, "limit": arguments.limit}
        environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        run = subprocess.run([arguments.lm_eval_python, "-c", LM_EVAL, json.dumps(job)], capture_output=True, text=True,
                             env=environment)
        if run.returncode != 0:
            raise SystemExit(f"lm-eval failed: {run.stderr}")
        return float(run.stdout.rsplit("seconds", 1)[1])


def hellaswag_file(folder):
    """Six lines per document: context, answer, four endings."""
    path = os.path.join(folder, "hellaswag.txt")
    with open(os.path.join(data, "hellaswag", "validation.jsonl"), encoding="utf-8") as documents, \
            open(path, "w", encoding="utf-8") as out:
        for line in documents.readlines()[:arguments.limit]:
            document = json.loads(line)
            context = f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}"
            rows = [context, str(document["label"]), *document["endings"]]
            out.writelines(row.replace("\n", " ") + "\n" for row in rows)
    return path


def llama_hellaswag():
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of([arguments.llama_perplexity, "-m", arguments.gguf, "-f", hellaswag_file(folder), "--hellaswag",
                           "--hellaswag-tasks", str(arguments.limit), "-t", str(arguments.threads)])


def show(what, pairs):
    mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{what}: ours {statistics.median(mine):.2f} s, theirs {statistics.median(theirs):.2f} s, {ratio:.2f} x as fast",
          flush=True)


show("five tasks beside lm-eval", [(ours(arguments.model, TASKS), lm_eval()) for _ in range(arguments.runs)])
show("hellaswag beside llama-perplexity",
     [(ours(arguments.gguf, ["hellaswag"]), llama_hellaswag()) for _ in range(arguments.runs)])
