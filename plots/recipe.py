"""MoL on a Hugging Face model: a collator and a Trainer. Copy this file and losses.py.

    pip install transformers accelerate        and peft for LoRA

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    args = TrainingArguments(..., bf16=True, remove_unused_columns=False,
                             dataloader_drop_last=True)
    MolTrainer(model, args, collate, pairs, eval_dataset=held_out, base=base).train()

Load the model in float32: bfloat16 weights lose small updates. Use bf16=True for speed, never
fp16. With PEFT, base=None means the model with its adapters off. Give a base if the adapters are
already trained, if the bias of LoraConfig is not "none", and for PiSSA, OLoRA and LoftQ.

Tested on one process and, without adapters, with DDP on two. FSDP with use_orig_params and ZeRO-3
of DeepSpeed shard the head: use losses.mixture_of_losses on the logits there.
"""

from contextlib import contextmanager, nullcontext

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from losses import PADDING, mixture_from_hidden


def collate(pairs):
    """Pairs of rows (tokens, is_domain) -> input_ids and attention_mask (B, T), is_domain (B,).

    An item of the dataset is a domain row with a general row, so that every batch is mixed 1:1.
    MolTrainer makes the targets. Labels are optional: where they are -100 there is no target.
    """
    rows = [row for pair in pairs for row in pair]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, (row, _) in enumerate(rows):
        tokens[i, :len(row)] = torch.as_tensor(row)
        mask[i, :len(row)] = 1
    is_domain = torch.tensor([is_domain for _, is_domain in rows])
    return {"input_ids": tokens, "attention_mask": mask, "is_domain": is_domain}


class MolTrainer(Trainer):
    """transformers.Trainer with MoL as its loss.

    The loss of a step is the mean over its sequences, also over micro-batches and processes. All of
    them must have the same size, so the last, smaller batch is dropped, in evaluation too.
    """

    def __init__(self, *arguments, base=None, **more):
        super().__init__(*arguments, **more)
        if self.args.remove_unused_columns or not self.args.dataloader_drop_last:
            raise ValueError("TrainingArguments need remove_unused_columns=False, or is_domain is "
                             "removed, and dataloader_drop_last=True, or a smaller last batch "
                             "counts as much as a full one")
        batch = self.args.train_batch_size * self.args.world_size
        if has_length(self.train_dataset) and len(self.train_dataset) < batch:
            raise ValueError(f"{len(self.train_dataset)} pairs fill no batch of {batch}")
        self.base = base.to(self.args.device).requires_grad_(False) if base else None
        # Otherwise Trainer assumes, if there are labels, that the loss is already divided by the
        # number of tokens, and gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self.label_names = ["is_domain"]  # otherwise evaluation has no loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # Trainer's own does not cover the base and the head
            loss, ce, kl = self.mixture(model, inputs)
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def mixture(self, model, inputs):
        tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()  # (B, T)
        is_domain = inputs["is_domain"].bool()  # (B,)
        # A position has a target if it and the next one are tokens. Padding may be on the left.
        is_target = mask[:, :-1] & mask[:, 1:]
        if "labels" in inputs:
            is_target &= inputs["labels"][:, 1:] != PADDING
        targets = tokens[:, 1:].masked_fill(~is_target, PADDING)  # (B, T - 1)
        of_base = None, None
        if not is_domain.all():
            with torch.no_grad(), self.base_of(model) as base:
                of_base = hidden_and_head(base, tokens[~is_domain], mask[~is_domain])
        hidden, head = hidden_and_head(model, tokens, mask)
        return mixture_from_hidden(hidden, head, targets, is_domain, *of_base)

    @contextmanager
    def base_of(self, model):
        """The base in eval mode, without dropout."""
        model = self.accelerator.unwrap_model(model)
        base = self.base or model
        was_training = base.training
        base.eval()
        with nullcontext() if self.base else model.disable_adapter():
            yield base
        base.train(was_training)


def hidden_and_head(model, tokens, mask):
    """The input of the head at all positions but the last, (B, T - 1, C), and its weight (V, C).

    DDP needs a call of the whole model; it computes logits at one position only. Raises ValueError
    if the head does more than multiply by its weight.
    """
    out = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True,
                logits_to_keep=1, use_cache=False)
    hidden, head = out.hidden_states[-1], getattr(model, "module", model).get_output_embeddings()
    expected = (hidden[:, -1:] @ head.weight.T).float()
    is_plain = getattr(head, "bias", None) is None and not hasattr(head, "lora_A")
    if not (is_plain and torch.allclose(out.logits.float(), expected, atol=1e-2, rtol=1e-2,
                                        equal_nan=True)):
        raise ValueError("the head of this model has a bias, a cap, a scale or adapters; use "
                         "losses.mixture_of_losses on its logits")
    return hidden[:, :-1], head.weight
