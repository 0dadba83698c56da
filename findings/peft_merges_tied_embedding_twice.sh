#!/usr/bin/env bash
# peft: an adapter on a tied embedding, with ensure_weight_tying=True, is merged twice.
#
# One would expect that merge_and_unload() gives a model with the same logits: the option exists so
# that an adapter on the embedding and the one on the tied head stay the same.
# Seen: the shared weight gets the update of the adapter twice, once for each end, and the logits of
# the merged model are others. No warning. Without tied weights the logits stay the same.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0. Output seen:
#     tied False: logits after merging differ by 0.0000; the weight got 1.00 times the update
#     tied True: logits after merging differ by 1.0003; the weight got 2.00 times the update
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

seen = {}
for tied in (False, True):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied))
    weight = model.model.embed_tokens.weight.detach().clone()
    model = get_peft_model(model, LoraConfig(
        r=2, target_modules=["embed_tokens"], ensure_weight_tying=tied)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        update = model.get_base_model().model.embed_tokens.get_delta_weight("default")
        before = model(tokens).logits
        merged = model.merge_and_unload()
        after = merged(tokens).logits
    difference = ((after - before).norm() / before.norm()).item()
    got = merged.get_input_embeddings().weight - weight
    times = ((got * update).sum() / (update * update).sum()).item()
    seen[tied] = difference, times
    print(f"tied {tied}: logits after merging differ by {difference:.4f}; "
          f"the weight got {times:.2f} times the update")
assert seen[False][0] < 1e-4 and seen[True][0] > 0.5 and abs(seen[True][1] - 2) < 0.01
PYTHON
