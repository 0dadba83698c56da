"""MoL on a Hugging Face model: a collator and a Trainer. Copy this file, hidden.py and losses.py.

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    MolTrainer(model, TrainingArguments(..., bf16=True), collate, pairs, base=base).train()

Load the weights in float32: in bfloat16 they lose small updates. example.py is a complete program.
README.md explains the settings, memory, several processes, and tested versions.
"""

import inspect
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from losses import PADDING
from plots.huggingface.hidden import mixture_from_hidden


def collate(pairs):
    """Pairs of rows (tokens, is_domain) -> input_ids and attention_mask (B, T), is_domain (B,).

    A training item is (domain row, general row), so every batch is mixed 1:1. An evaluation item
    may be (row,). MolTrainer makes the targets.
    """
    try:
        tokens, flags = zip(*[(torch.as_tensor(tokens, dtype=torch.int64), bool(flag))
                              for pair in pairs for tokens, flag in pair])
        masks = [torch.ones(len(row), dtype=torch.int64) for row in tokens]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("an item of the dataset must be ((domain tokens, True), (general tokens, "
                         f"False)) or ((tokens, flag),), not {str(pairs[0])[:80]}") from error
    return {"input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "is_domain": torch.tensor(flags)}


class MolTrainer(Trainer):
    """transformers.Trainer with MoL as its loss, and more arguments. It logs mean CE and mean KL.

    base                          the frozen model of the KL; None: the model without its adapters
    direction, strength, chunk    as in mixture_from_hidden

    The loss of a step is the mean over its micro-batches and processes. Raises ValueError for
    settings that would make the loss wrong.
    """

    def __init__(self, model=None, args=None, data_collator=collate, *arguments, base=None,
                 direction="reverse", strength=1.0, chunk=None, **named):
        super().__init__(model, args, data_collator, *arguments, **named)
        self.refuse_what_is_wrong(base)
        if base and base.device != self.args.device:  # a base in 8 bit cannot be moved
            base = base.to(self.args.device)
        self.base = base.requires_grad_(False).eval() if base else None
        self.options = {"direction": direction, "strength": strength, "chunk": chunk}
        self.head = head_of(self.model)
        self.base_head = head_of(base) if base else self.head
        self.sums = torch.zeros(4, device=self.args.device)  # CE, KL, domain rows, general rows
        self.args.remove_unused_columns = False  # otherwise is_domain is removed
        self.label_names = ["is_domain"]  # otherwise evaluation has no loss
        # Otherwise Trainer assumes, if there are labels, that the loss is already divided by the
        # number of tokens, and gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False

        row = self._prepare_inputs(collate([((range(16), False),)]))
        with torch.no_grad():
            _, _, kl = self.mixture(self.model.eval(), row)
        if not base and kl > 1e-2:
            raise ValueError(f"the adapters already change the model (KL {kl:.2g}): continue with "
                             "train(resume_from_checkpoint=...), or give the base model as base=")

    def refuse_what_is_wrong(self, base):
        args, model = self.args, self.model
        adapters = getattr(model, "peft_config", {}).values()
        shared = base and {*map(id, model.parameters())} & {*map(id, base.parameters())}
        for is_wrong, needed in [
            (args.n_gpu > 1, "one GPU per process: CUDA_VISIBLE_DEVICES=0, or torchrun"),
            (args.label_smoothing_factor, "label_smoothing_factor=0"),
            (getattr(args, "train_sampling_strategy", "") == "group_by_length",
             "rows in any order: a pair of rows has no length to group by"),
            (self.compute_loss_func or self.compute_metrics or self.model_init,
             "no compute_loss_func, compute_metrics or model_init"),
            (getattr(model.config, "output_router_logits", False), "output_router_logits=False"),
            (shared, "base=copy.deepcopy(model), made before adapters; it shares weights"),
            (not base and not adapters, "base=copy.deepcopy(model), or adapters of peft"),
            (not base and any(getattr(a, "bias", "none") != "none" for a in adapters),
             "adapters with bias='none', or a base: the biases would change the base"),
            (base and Path(base.name_or_path, "trainer_state.json").exists(),
             "the original model as base; to continue use train(resume_from_checkpoint=...)"),
        ]:
            if is_wrong:
                raise ValueError(f"MolTrainer needs {needed}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "is_domain" not in inputs:
            raise ValueError("a batch has no is_domain: use the collate of this file, or add it")
        with self.accelerator.autocast():  # Trainer's own does not cover the base and the head
            loss, ce, kl = self.mixture(model, inputs)
        if model.training:
            count, domain = len(inputs["is_domain"]), inputs["is_domain"].sum()
            self.sums += torch.stack([ce * count, kl * count, domain, count - domain]).detach()
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def log(self, logs, *more):
        """Add the mean CE of the domain rows and the mean KL of the general rows."""
        if "loss" in logs:
            ce, kl, domain, general = self.accelerator.reduce(self.sums).tolist()
            logs |= {"ce": ce / max(domain, 1), "kl": kl / max(general, 1)}
        if "loss" in logs or "train_loss" in logs:
            self.sums.zero_()
        super().log(logs, *more)

    def mixture(self, model, inputs):
        """A batch of the collator -> the loss, its CE part and its KL part."""
        tokens = inputs["input_ids"]  # (B, T)
        mask = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
        if "position_ids" in inputs and not mask.all():
            raise ValueError("position_ids need rows without padding, or documents are not apart")
        is_domain = inputs["is_domain"].bool()  # (B,)
        # A position has a target if it and the next one are tokens. Padding may be on the left.
        is_target = mask[:, :-1] & mask[:, 1:]
        if "labels" in inputs:
            is_target &= inputs["labels"][:, 1:] != PADDING
        targets = tokens[:, 1:].masked_fill(~is_target, PADDING)  # (B, T - 1)
        positions = inputs.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))  # (B, T)
        of_base = None, None
        if not is_domain.all():
            rows, was_training = [x[~is_domain] for x in (tokens, mask, positions)], model.training
            base = self.base or self.accelerator.unwrap_model(model)
            with torch.no_grad(), nullcontext() if self.base else base.disable_adapter():
                of_base = hidden_and_head(base.eval(), self.base_head, *rows)  # without dropout
            model.train(was_training)
        hidden, head = hidden_and_head(model, self.head, tokens, mask, positions)
        return mixture_from_hidden(hidden, head, targets, is_domain, *of_base, **self.options)


def hidden_and_head(model, head, tokens, mask, positions):
    """The input of the head at all positions but the last, (B, T - 1, C), and the head.

    DDP needs a call of the whole model. A hook keeps the input of the head and passes only the last
    position to the head. If the head is None: the logits, and an identity head.
    """
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    plain = getattr(plain, "get_base_model", lambda: plain)()  # without adapters
    more = {} if mask.all() else {"attention_mask": mask.long()}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        more["position_ids"] = positions
    kept = []
    with plain.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: kept.append(inputs[0]) or (inputs[0][:, -1:],)
            ) if head else nullcontext():
        logits = model(input_ids=tokens, use_cache=False, **more).logits
    return (kept[0] if head else logits)[:, :-1], head or torch.nn.Identity()


def head_of(model):
    """The model's head, or None if the model changes its output, for example with a soft cap."""
    head = model.get_output_embeddings()
    # The model gets large outputs in place of those of its head. Does it return them unchanged?
    given = torch.linspace(-100, 100, len(head.weight), device=model.device, dtype=model.dtype)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), head.register_forward_hook(lambda _, x, out: given.expand_as(out)):
        logits = model(input_ids=token, use_cache=False).logits
    is_plain = type(head) is torch.nn.Linear and torch.equal(logits[0, 0].float(), given.float())
    return head if is_plain else None
