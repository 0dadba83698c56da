#!/usr/bin/env bash
# peft: leaving disable_adapter() makes frozen weights of the active adapter trainable.
#
# One would expect that a block without the adapter changes nothing that outlasts it. A user who
# freezes a part of an adapter, for example lora_A as in LoRA-FA, and asks the model without its
# adapter for reference log-probabilities, trains the frozen part from then on. No warning.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0. Output seen:
#     trainable before: 4 of 8 adapter weights; after disable_adapter(): 8 of 8
# Exits with 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

model = get_peft_model(
    LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2)),
    LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
for name, weight in weights.items():
    weight.requires_grad_("lora_B" in name)
before = sum(weight.requires_grad for weight in weights.values())
with torch.no_grad(), model.disable_adapter():
    model(torch.arange(9)[None])
after = sum(weight.requires_grad for weight in weights.values())
print(f"trainable before: {before} of {len(weights)} adapter weights; "
      f"after disable_adapter(): {after} of {len(weights)}")
assert before == 4 and after == 8
PYTHON
