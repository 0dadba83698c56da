"""MoL on a Hugging Face model: a collator and a Trainer. Copy this file and losses.py.

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    MolTrainer(model, TrainingArguments(..., bf16=True), collate, pairs, base=base).train()

Load the weights in float32: in bfloat16 they lose small updates. example.py is a complete program.
recipe.md tells how to choose the settings, how to save memory, what several processes need, and
which versions and models were tested.
"""

import inspect
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import Trainer

from losses import PADDING, mixture_from_hidden


def collate(pairs):
    """Pairs of rows (tokens, is_domain) -> input_ids and attention_mask (B, T), is_domain (B,).

    A training item is (domain row, general row), so every batch is mixed 1:1. An evaluation item
    may be (row,). MolTrainer makes the targets.
    """
    try:
        rows = [(torch.as_tensor(tokens), bool(flag)) for pair in pairs for tokens, flag in pair]
        longest = max(len(tokens) for tokens, _ in rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("an item of the dataset must be ((domain tokens, True), (general tokens, "
                         f"False)) or ((tokens, flag),), not {str(pairs[0])[:80]}") from error
    tokens, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, (row, _) in enumerate(rows):
        tokens[i, :len(row)], mask[i, :len(row)] = row, 1
    return {"input_ids": tokens, "attention_mask": mask,
            "is_domain": torch.tensor([flag for _, flag in rows])}


class MolTrainer(Trainer):
    """transformers.Trainer with MoL as its loss. It logs the mean CE and the mean KL.

    base       the frozen model of the KL; None: the model with its adapters off
    options    direction, strength and chunk, see losses.mixture_from_hidden

    The loss of a step is the mean over all its sequences, including all micro-batches and
    processes. Raises ValueError for settings that would make the loss wrong.
    """

    def __init__(self, *arguments, base=None, direction="reverse", strength=1.0, chunk=None,
                 **more):
        if len(arguments) < 3:
            more.setdefault("data_collator", collate)
        super().__init__(*arguments, **more)
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

        row = collate([((range(16), False),)])
        with torch.no_grad():
            _, _, kl = self.mixture(self.model.eval(), self._prepare_inputs(row))
        if not base and kl > 1e-2:
            raise ValueError(f"the adapters already change the model (KL {kl:.2g}). To go on with "
                             "them use train(resume_from_checkpoint=...), or give the original "
                             "model as base=")

    def refuse_what_is_wrong(self, base):
        args, model, pairs = self.args, self.model, self.train_dataset
        batch = args.train_batch_size * args.world_size
        adapters = [vars(config) for config in getattr(model, "peft_config", {}).values()]
        shared = base and {*map(id, model.parameters())} & {*map(id, base.parameters())}
        for is_wrong, needed in [
                (hasattr(pairs, "__len__") and len(pairs) < batch,
                 f"{batch} pairs, one batch; there are only {len(pairs or ())}"),
                (args.n_gpu > 1, "one GPU per process: CUDA_VISIBLE_DEVICES=0, or torchrun"),
                (args.label_smoothing_factor, "label_smoothing_factor=0"),
                (self.compute_loss_func or self.compute_metrics or self.model_init,
                 "no compute_loss_func, compute_metrics or model_init"),
                (getattr(args, "train_sampling_strategy", "") == "group_by_length",
                 "rows in any order: a pair of rows has no length to group by"),
                (getattr(model.config, "output_router_logits", False),
                 "output_router_logits=False in the config of the model"),
                (shared, "base=copy.deepcopy(model), made before adapters; it shares weights"),
                (not base and not adapters, "base=copy.deepcopy(model), or adapters of peft"),
                (not base and any(a.get("bias", "none") != "none" for a in adapters),
                 "adapters with bias='none', or a base: the biases would change the base"),
                (base and Path(base.name_or_path, "trainer_state.json").exists(),
                 "the original model as base; to go on from a checkpoint use "
                 "train(resume_from_checkpoint=...)")]:
            if is_wrong:
                raise ValueError(f"MolTrainer needs {needed}")

    def get_train_dataloader(self):
        """Drop a smaller last batch: it would count as much as a full one."""
        self.args.dataloader_drop_last = True
        batches = super().get_train_dataloader()
        self.args.dataloader_drop_last = False
        return batches

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
        tokens = inputs["input_ids"]  # (B, T)
        mask = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
        if "position_ids" in inputs and not mask.all():
            raise ValueError("position_ids need rows without padding: with an attention mask the "
                             "documents of a row are not kept apart")
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
    plain = extract_model_from_parallel(model, keep_torch_compile=False)  # and without adapters:
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
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
    """A function from the last hidden states (N, C) to logits (N, V), or None if it is unknown.

    Some models scale or cap what the weight of the head gives.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", 0)

    def after(logits):
        return torch.tanh(logits * scale / cap) * cap if cap else logits * scale

    # Is that all? Try it with large logits in place of those of the head.
    large = torch.linspace(-100, 100, len(head.weight), device=model.device, dtype=model.dtype)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), head.register_forward_hook(lambda _, x, logits: large.expand_as(logits)):
        logits = model(input_ids=token, use_cache=False).logits
    is_all = torch.allclose(logits[0, 0].float(), after(large).float(), rtol=1e-2, atol=1e-2)
    return (lambda x: after(head(x))) if is_all and type(head) is torch.nn.Linear else None
