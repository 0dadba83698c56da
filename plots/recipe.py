"""MoL on a Hugging Face model: a collator and a Trainer to copy into your code, with losses.py.

    pip install transformers accelerate        and peft for LoRA

    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    args = TrainingArguments(..., remove_unused_columns=False, dataloader_drop_last=True)
    MolTrainer(model, args, collate, pairs, base=base).train()

The base is a second copy of the model, or None with PEFT: then it is the model itself with its
adapters off. What runs Trainer on many machines, DDP, FSDP or DeepSpeed, is not touched.
"""

from contextlib import contextmanager, nullcontext

import torch
from transformers import Trainer

from losses import PADDING, mixture_from_hidden


def collate(pairs):
    """Pairs of rows (tokens, is_domain) -> input_ids and attention_mask (B, T), is_domain (B,).

    An item of the dataset is a domain row and its general row together, so every batch is mixed 1:1
    whatever shuffles, shards or accumulates. There are no labels: the model would shift them once
    more. Padding is known by the mask, not by its token, which is often the end token too.
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
    have as many: so the last, incomplete batch is dropped.
    """

    def __init__(self, *arguments, base=None, **more):
        super().__init__(*arguments, **more)
        if self.args.remove_unused_columns or not self.args.dataloader_drop_last:
            raise ValueError("TrainingArguments need remove_unused_columns=False, or the flag "
                             "is_domain is dropped, and dataloader_drop_last=True, or a last short "
                             "batch weighs as much as a full one")
        self.base = base.to(self.args.device).requires_grad_(False) if base else None
        # Else Trainer believes that the loss is divided by all of a step's tokens already, and
        # gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # of Trainer's own, only the model knows
            loss, ce, kl = self.mixture(model, inputs)
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def mixture(self, model, inputs):
        tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()  # (B, T)
        is_domain = inputs["is_domain"].bool()  # (B,)
        # The target of a position is the next token, if both are tokens: padding may be left of the
        # text too.
        is_target = mask[:, :-1] & mask[:, 1:]
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

    The model is called as a whole, since DDP and FSDP act there; logits are made at one position.
    Raises ValueError for a model whose head does more than multiply, as one with a bias or a cap.
    """
    out = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True,
                logits_to_keep=1, use_cache=False)
    hidden, head = out.hidden_states[-1], getattr(model, "module", model).get_output_embeddings()
    expected = hidden[:, -1:] @ head.weight.T
    if not torch.allclose(out.logits.float(), expected.float(), atol=1e-2, rtol=1e-2):
        raise ValueError("this model's head is no plain product; use losses.mixture_of_losses on "
                         "its logits")
    return hidden[:, :-1], head.weight
