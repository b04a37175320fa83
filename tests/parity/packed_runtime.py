"""Loads packed folders with transformers and compressed-tensors, or their linears with GPTQModel, on CPU.

stdin: JSON {"folders": [path, ...], "tokens": [ids], "out": folder}
stdout: one JSON line per folder: {"file": safetensors with what was found, or null, "skipped": why, or null}

The file holds every linear as it was decoded, in F32 under its name in the checkpoint, and for compressed-tensors the
logits of the folder taken in four ways:
  exact        scales in F32, so that decoding rounds nothing (but experts, which are decoded to BF16 while they are loaded)
  kernels      the same, with 8-bit inputs per token scaled by max / 127 as in vLLM's kernels, not max / 127.5
  plain        as everybody loads it: BF16, decoded by the first pass
  dequantized  decoded to BF16 while it is loaded
All of them then compute in F32.
"""
import contextlib
import importlib.util
import json
import os
import re
import sys
import unittest.mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def to_f32(model):
    # The model's own `float` refuses quantized models.
    return torch.nn.Module.float(model)


@torch.no_grad()
def logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False, logits_to_keep=0).logits[0].contiguous()


def load(folder, **flags):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **flags).eval()


def linears(model):
    found = {}
    for name, weight in model.named_parameters():
        name = re.sub("^model[.]", "backbone.", name)
        stack = re.fullmatch("(.*[.]experts)[.](up|down)_proj", name)
        if stack:
            for expert, matrix in enumerate(weight):
                found[f"{stack[1]}.{expert}.{stack[2]}_proj.weight"] = matrix
        elif name.endswith(".weight") and weight.ndim == 2:
            found[name] = weight
    return {name: weight.detach().float().clone().contiguous() for name, weight in found.items()}


def scale_of_kernels(value, args, module, global_scale=None):
    scale = value.abs().amax(-1, keepdim=True) / 127
    return scale.clamp(min=torch.finfo(scale.dtype).tiny), torch.zeros_like(scale)


def with_compressed_tensors(folder, tokens):
    from transformers import CompressedTensorsConfig
    model = to_f32(load(folder))
    found = {"logits.exact": logits(model, tokens)} | linears(model)
    with unittest.mock.patch("compressed_tensors.quantization.lifecycle.forward.compute_dynamic_scales_and_zp", scale_of_kernels):
        found["logits.kernels"] = logits(model, tokens)
    model = load(folder)
    logits(model, tokens[:8])
    found["logits.plain"] = logits(to_f32(model), tokens)
    model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    found["logits.dequantized"] = logits(to_f32(model), tokens)
    return found


def with_gptqmodel(folder, config):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    found = {}
    settings = dict(bits=config["bits"], group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"])
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    for name, words in stored.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        codes_per_word = 32 // config["bits"]
        linear = TorchLinear(in_features=words.shape[0] * codes_per_word, out_features=words.shape[1], bias=False,
                             register_buffers=True, **settings)
        linear.load_state_dict({part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")})
        convert_gptq_v1_to_v2_format_module(linear, bits=config["bits"], pack_dtype=linear.pack_dtype)
        # It decodes to the dtype of its scales, F16.
        linear.scales = linear.scales.float()
        linear.eval()
        found[f"{module}.weight"] = linear.dequantize_weight().t().float().contiguous()
    return found


request = json.load(sys.stdin)
for number, folder in enumerate(request["folders"]):
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)["quantization_config"]
    package = {"gptq": "gptqmodel"}.get(config["quant_method"], "compressed_tensors")
    if importlib.util.find_spec(package) is None:
        print(json.dumps({"file": None, "skipped": f"this Python has no {package}"}), flush=True)
        continue
    with contextlib.redirect_stdout(sys.stderr):
        found = with_gptqmodel(folder, config) if package == "gptqmodel" else with_compressed_tensors(folder, request["tokens"])
    path = os.path.join(request["out"], f"{number}.safetensors")
    save_file(found, path)
    print(json.dumps({"file": path, "skipped": None}), flush=True)
