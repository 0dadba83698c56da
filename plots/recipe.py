"""MoL on a Hugging Face model: a collator and a Trainer to copy into your code, with losses.py.

    pip install transformers accelerate        and peft for LoRA

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    args = TrainingArguments(..., bf16=True, remove_unused_columns=False,
                             dataloader_drop_last=True)
    MolTrainer(model, args, collate, pairs, eval_dataset=held_out, base=base).train()

float32 is said because a model saved in bfloat16 is loaded so, and small steps are lost in it;
bf16=True makes it quick all the same, fp16 is refused. With PEFT the base may be None: then it is
the model with its adapters off. That is right for adapters that start as no change. It is wrong for
trained ones, for a LoraConfig whose bias is not "none", and for PiSSA, OLoRA or LoftQ, which change
the weights themselves: give the base there.

Tested on one process and, without adapters, as DDP on two. FSDP with use_orig_params and
DeepSpeed's ZeRO-3 leave only a part of the head's weight on a process: there use
losses.mixture_of_losses on the logits.
"""

from contextlib import contextmanager, nullcontext

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from losses import PADDING, mixture_from_hidden


def collate(pairs):
    """Pairs of rows (tokens, is_domain) -> input_ids and attention_mask (B, T), is_domain (B,).

    An item of the dataset is a domain row and its general row together, so every batch is mixed 1:1
    whatever shuffles, shards or accumulates. Padding is known by the mask, not by its token, which
    is often the end token too. MolTrainer shifts the tokens to make the targets. It needs no
    labels; in a batch that has some, those of -100 are no targets, as in a prompt not to learn.
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
    """transformers.Trainer whose loss is MoL; `base` as above.

    Each step's loss is the mean over its sequences, over micro-batches and processes too, where all
    have as many: so the last, incomplete batch is dropped. It is dropped in evaluation too, where
    per_device_eval_batch_size must not exceed the number of pairs.
    """

    def __init__(self, *arguments, base=None, **more):
        super().__init__(*arguments, **more)
        if self.args.remove_unused_columns or not self.args.dataloader_drop_last:
            raise ValueError("TrainingArguments need remove_unused_columns=False, or the flag "
                             "is_domain is dropped, and dataloader_drop_last=True, or a last short "
                             "batch weighs as much as a full one")
        batch = self.args.train_batch_size * self.args.world_size
        if has_length(self.train_dataset) and len(self.train_dataset) < batch:
            raise ValueError(f"{len(self.train_dataset)} pairs fill no batch of {batch}, and "
                             "Trainer would train on nothing")
        self.base = base.to(self.args.device).requires_grad_(False) if base else None
        # Else Trainer believes, of a batch with labels, that the loss is divided by all of a step's
        # tokens already, and gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self.label_names = ["is_domain"]  # or evaluation would call the model, and have no loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # Trainer's own covers the model, but not base and head
            loss, ce, kl = self.mixture(model, inputs)
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def mixture(self, model, inputs):
        tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()  # (B, T)
        is_domain = inputs["is_domain"].bool()  # (B,)
        # The target of a position is the next token, if both are tokens: padding may be left of the
        # text too.
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
        """The base in eval mode: dropout would move its logits."""
        model = self.accelerator.unwrap_model(model)
        base = self.base or model
        was_training = base.training
        base.eval()
        with nullcontext() if self.base else model.disable_adapter():
            yield base
        base.train(was_training)


def hidden_and_head(model, tokens, mask):
    """What the head reads at all positions except the last, (B, T - 1, C), and its weight (V, C).

    The model is called as a whole, since DDP acts there; logits are made at one position. Raises
    ValueError for a head that does more than multiply by its weight: with a bias, a cap, adapters.
    """
    out = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True,
                logits_to_keep=1, use_cache=False)
    hidden, head = out.hidden_states[-1], getattr(model, "module", model).get_output_embeddings()
    expected = (hidden[:, -1:] @ head.weight.T).float()
    is_plain = getattr(head, "bias", None) is None and not hasattr(head, "lora_A")
    if not (is_plain and torch.allclose(out.logits.float(), expected, atol=1e-2, rtol=1e-2,
                                        equal_nan=True)):
        raise ValueError("this model's head is no plain product; use losses.mixture_of_losses on "
                         "its logits")
    return hidden[:, :-1], head.weight
