#!/usr/bin/env bash
# The example in two processes, in two ways; model and base in shards. Call it as
#     bash plots/huggingface/sharded.sh MODEL DOMAIN_FOLDER GENERAL_FOLDER OUT_FOLDER
# As it stands it runs on CPUs. On GPUs set:
cpu=true  # false
set -euo pipefail
mkdir -p "$4"
[ $cpu = false ] || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

# 1. accelerate launch with FSDP2. On CPUs accelerate has no FSDP, and each process has all weights.
cat > "$4/fsdp.yaml" <<YAML
distributed_type: $([ $cpu = true ] && echo MULTI_CPU || echo FSDP)
use_cpu: $cpu
num_machines: 1
num_processes: 2
mixed_precision: $([ $cpu = true ] && echo '"no"' || echo bf16)
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP,
              fsdp_state_dict_type: FULL_STATE_DICT, fsdp_reshard_after_forward: true}
YAML
accelerate launch --config_file "$4/fsdp.yaml" -m plots.huggingface.example "${@:1:3}" "$4/fsdp"

# 2. torchrun with ZeRO-3 of DeepSpeed. DeepSpeed clips gradients at 1 if the file does not say so.
cat > "$4/zero3.json" <<JSON
{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": true},
 "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
 "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": true}
JSON
torchrun --standalone --nproc_per_node 2 -m plots.huggingface.example --deepspeed "$4/zero3.json" \
    "${@:1:3}" "$4/zero3"
