"""Asks an unmodified llama.cpp (the `xllamacpp` wheel) about GGUF files.

stdin: JSON {"files": [path, ...], "prompts": [[token ids], ...], "generate": n, "ubatch": rows computed together}
stdout: one JSON line per file: {"logprobs": [[log-probability of every token], ...], "generated": n}
"""
import json
import sys

import xllamacpp

# A token of plain text in every model asked about. Tokens that are only part of a character are answered without
# probabilities, so sampling is pushed to this one; the probabilities are those before any push.
WHOLE_CHARACTER = 70

request = json.load(sys.stdin)
for path in request["files"]:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.n_ubatch = request["ubatch"]
    server = xllamacpp.Server(params)

    def complete(prompt, count, probs):
        answer = server.handle_completions({
            "prompt": prompt, "n_predict": count, "n_probs": probs, "temperature": -1.0,
            "post_sampling_probs": False, "cache_prompt": False, "ignore_eos": True,
            "logit_bias": [[WHOLE_CHARACTER, 1e9]] if probs else [],
        })
        return json.loads(answer) if isinstance(answer, str) else answer

    rows = []
    for prompt in request["prompts"]:
        answer = complete(prompt, 1, request["vocab"])
        row = [None] * request["vocab"]
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    generated = complete(request["prompts"][0], request["generate"], 0)
    tokens = generated.get("usage", {}).get("completion_tokens", 0)
    print(json.dumps({"logprobs": rows, "generated": tokens}), flush=True)
    del server
