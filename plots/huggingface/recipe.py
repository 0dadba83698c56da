"""MoL on a Hugging Face model: a collator, a Trainer and its loss.

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    MolTrainer(model, TrainingArguments(..., bf16=True), collate, pairs, base=base).train()

Copy this file, hidden.py and losses.py. Load the weights in float32: in bfloat16 they lose small
updates. example.py is a complete program. README.md explains the settings, memory, sharding, and
tested versions. In a training loop of your own use mol_loss.
"""

import inspect
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.utils import logging

from losses import PADDING, mixture_of_losses
from plots.huggingface.hidden import mixture_from_hidden

logger = logging.get_logger(__name__)


def collate(items):
    """Rows -> input_ids, attention_mask and labels (B, T), is_domain (B,).

    A row is (tokens, is_domain), or {"input_ids": ..., "is_domain": ...} with columns of a dataset;
    its "labels" may be -100 at tokens that are no targets, as in the prompts of a chat. An item is
    a pair (domain row, general row), so that every batch is mixed 1:1, or (row,), or a dict.
    """
    try:
        rows = [row for item in items for row in ([item] if hasattr(item, "keys") else item)]
        rows = [row if hasattr(row, "keys") else dict(zip(("input_ids", "is_domain"), row,
                                                          strict=True)) for row in rows]
        tokens, labels = ([torch.as_tensor(row.get(name, row["input_ids"]), dtype=torch.int64)
                           for row in rows] for name in ("input_ids", "labels"))
        masks = [torch.ones(len(row), dtype=torch.int64) for row in tokens]
        flags = torch.tensor([bool(row["is_domain"]) for row in rows])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError("an item of the dataset must be ((domain tokens, True), (general tokens, "
                         "False)), ((tokens, flag),) or {'input_ids': tokens, 'is_domain': flag}, "
                         f"not {str(items[0])[:80]}") from error
    return {"input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=PADDING),
            "is_domain": flags}


# --- the loss ------------------------------------------------------------------------------------

def mol_loss(model, base, batch, direction="reverse", strength=1.0, chunk=None):
    """A batch of the collator -> the loss, its CE part and its KL part, as mixture_of_losses.

    base is frozen; None: the model without its adapters. Both may be in DDP, FSDP2 or DeepSpeed.
    The loss is computed inside the forward pass of the model's head, and that in the one of the
    base's head. Only there are sharded heads whole, once in a step, whatever the number of chunks.
    """
    tokens, is_domain = batch["input_ids"], batch["is_domain"].bool()  # (B, T), (B,)
    mask, positions, targets = mask_positions_targets(batch)
    G = int((~is_domain).sum())
    # A sharded base must be called in every process: if there are no general rows, on a row that
    # does not count.
    is_called = G or torch.distributed.is_initialized()
    general = [x[~is_domain] if G else x[:1] for x in (tokens, mask, positions)]
    heads = [head_of(which, mask) for which in ([model, base] if base else [model])]
    is_learning, parts, kept = torch.is_grad_enabled(), [], []

    def call_base(at_head):
        which = base or extract_model_from_parallel(model, keep_torch_compile=False)
        with torch.no_grad(), without_adapters_and_dropout(which, not base):
            return call(which, at_head, *general)

    def mixture(hidden, weight, base_hidden, base_weight):
        with torch.set_grad_enabled(is_learning):
            parts[:] = mixture_from_hidden(hidden, weight, targets, is_domain, base_hidden[:G],
                                           base_weight, direction, strength, chunk)
        return parts[0]

    def in_both_heads(hidden, weight):
        call_base(lambda *of_base: mixture(hidden, weight, *of_base) and None)
        return parts[0]

    if None in heads:
        if is_called:
            kept.append(call_base(None)[:G, :-1])
        logits = call(model, None, tokens, mask, positions)[:, :-1]
        return mixture_of_losses(logits, targets, is_domain, *kept, direction, strength)
    if is_called and not base:
        call_base(lambda hidden, weight: kept.append(hidden))
    loss = call(model, in_both_heads if is_called and base else lambda hidden, weight: mixture(
        hidden, weight, kept[0] if kept else hidden[:0], weight), tokens, mask, positions)
    return loss.view(()), *parts[1:]


def mask_positions_targets(batch):
    """-> attention mask and positions (B, T), targets (B, T - 1). Padding may be on either side."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    if "position_ids" in batch and not mask.all():
        raise ValueError("position_ids need rows without padding, or documents are not apart")
    # A position has a target if it and the next one are tokens.
    is_target = mask[:, :-1] & mask[:, 1:]
    if "labels" in batch:
        is_target &= batch["labels"][:, 1:] != PADDING
    positions = batch.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))
    return mask, positions, tokens[:, 1:].masked_fill(~is_target, PADDING)


def call(model, at_head, tokens, mask, positions):
    """The logits; or, if at_head is a function, what it makes of the head's input and weight.

    The input is (B, T - 1, C): the last position has no target. A bias becomes a column of the
    weight.
    """
    plain = plain_of(model)
    more = {} if mask.all() else {"attention_mask": mask.long()}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        more["position_ids"] = positions
    head = plain.get_output_embeddings()

    @torch.compiler.disable
    def forward(hidden):
        hidden, weight = hidden[:, :-1], head.weight
        if head.bias is not None:
            weight = torch.cat([weight, head.bias[:, None]], dim=1)
            hidden = F.pad(hidden, (0, 1), value=1.0)
        found = at_head(hidden, weight)
        return (hidden.new_zeros(()) if found is None else found).view(1, 1, 1)

    before = vars(head).get("forward")
    if at_head:
        head.forward = forward
    try:
        return model(input_ids=tokens, use_cache=False, **more).logits
    finally:
        if at_head:
            del head.forward
            if before:
                head.forward = before


def plain_of(model):
    """Without DDP, DeepSpeed, compilation and adapters."""
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    return getattr(plain, "get_base_model", lambda: plain)()


@contextmanager
def without_adapters_and_dropout(model, has_adapters=False):
    """peft makes all weights of the adapters trainable at the end; here they stay as they were."""
    was_training, trainable = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    if has_adapters:
        with model.disable_adapter():
            yield
    else:
        yield
    model.train(was_training)
    for p, before in trainable if has_adapters else ():
        p.requires_grad_(before)


def head_of(model, mask):
    """The model's head, or None if the model changes its output, for example with a soft cap.

    The first call tries it, and whether padding or positions change what the model says of a row.
    """
    plain = plain_of(model)
    if not hasattr(plain, "tried_by_mol"):
        with torch.no_grad(), without_adapters_and_dropout(model):
            plain.tried_by_mol = tried(extract_model_from_parallel(model), plain)
    head, wrong = plain.tried_by_mol
    for side, is_used in (("no padding", True), ("padding on the left", not mask[:, 0].all()),
                          ("padding on the right", not mask[:, -1].all())):
        if side in wrong and is_used:
            raise ValueError(f"{type(plain).__name__} gives other logits for a row with {side} and "
                             "the positions 0, 1, 2, ... than for the row alone: MoL would be "
                             "wrong. Use rows of equal length, or padding on the other side")
    return head


def tried(model, plain):
    """-> the head or None, and the kinds of padding with which the model is wrong."""
    head, device = plain.get_output_embeddings(), plain.device
    V = getattr(head, "out_features", None) or head.weight.shape[0]
    row = torch.linspace(V // 4, V // 2, 8, device=device).long()[None]
    # The model gets large outputs in place of those of its head. Does it return them unchanged?
    given = torch.linspace(-100, 100, V, device=device).bfloat16().to(plain.dtype)
    with head.register_forward_hook(lambda _, x, out: given.expand_as(out)):
        logits = model(input_ids=row, use_cache=False).logits[0, -1]
    is_plain = type(head) is torch.nn.Linear and torch.equal(logits.float(), given.float())
    alone, wrong = model(input_ids=row, use_cache=False).logits[0].float(), []
    for side, left, right in (("no padding", 0, 0), ("padding on the left", 3, 0),
                              ("padding on the right", 0, 3)):
        mask = F.pad(torch.ones_like(row), (left, right)).bool()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = call(model, None, F.pad(row, (left, right)), mask, positions)[mask].float()
        if (logits - alone).norm() > 0.1 * (alone - alone.mean(dim=1, keepdim=True)).norm():
            wrong.append(side)
    return head if is_plain else None, wrong


# --- the Trainer ---------------------------------------------------------------------------------

class MolTrainer(Trainer):
    """transformers.Trainer with MoL as its loss, and more arguments. It logs mean CE and mean KL.

    base                          the frozen model of the KL; None: the model without its adapters
    direction, strength, chunk    as in mixture_from_hidden

    The loss of a step is the mean over its micro-batches and processes. The base is sharded like
    the model. predict() gives the CE and the KL part of the batches in place of logits. Raises
    ValueError for settings that would make the loss wrong.
    """

    def __init__(self, model=None, args=None, data_collator=collate, *arguments, base=None,
                 direction="reverse", strength=1.0, chunk=None, **named):
        super().__init__(model, args, data_collator, *arguments, **named)
        self.refuse_what_is_wrong(base)
        self.base = self.prepared(base.requires_grad_(False).eval()) if base else None
        self.options = {"direction": direction, "strength": strength, "chunk": chunk}
        self.sums = torch.zeros(4, device=self.args.device)  # CE, KL, domain rows, general rows
        self.args.remove_unused_columns = False  # otherwise is_domain is removed
        self.label_names = ["is_domain"]  # otherwise evaluation has no loss
        # Otherwise Trainer assumes, if there are labels, that the loss is already divided by the
        # number of tokens, and gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False

    def prepared(self, base):
        """The base on the device of the model, in shards if the model will be."""
        if self.is_deepspeed_enabled:
            import deepspeed
            config = {**self.accelerator.state.deepspeed_plugin.deepspeed_config}
            if config["zero_optimization"]["stage"] == 3:
                for training in ("optimizer", "scheduler"):
                    config.pop(training, None)
                return deepspeed.initialize(model=base, config=config)[0]
        elif self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model
            return fsdp2_prepare_model(self.accelerator, base)
        # A base in 8 bit cannot be moved.
        return base if base.device == self.args.device else base.to(self.args.device)

    def refuse_what_is_wrong(self, base):
        args, model = self.args, self.model
        adapters = getattr(model, "peft_config", {}).values()
        starts = [str(getattr(a, "init_lora_weights", "")).lower() for a in adapters]
        shared = base and {*map(id, model.parameters())} & {*map(id, base.parameters())}
        is_tied = getattr(model.config, "tie_word_embeddings", False)
        for is_wrong, needed in [
            (args.n_gpu > 1, "one GPU per process: CUDA_VISIBLE_DEVICES=0, or torchrun"),
            (args.label_smoothing_factor, "label_smoothing_factor=0"),
            (getattr(args, "train_sampling_strategy", "") == "group_by_length",
             "rows in any order: a pair of rows has no length to group by"),
            (self.compute_loss_func or self.compute_metrics or self.model_init,
             "no compute_loss_func, compute_metrics or model_init"),
            (getattr(model.config, "output_router_logits", False), "output_router_logits=False"),
            (self.is_fsdp_enabled and not self.accelerator.is_fsdp2, "fsdp_version 2"),
            (shared, "base=copy.deepcopy(model), made before adapters; it shares weights"),
            (base and base.config.get_text_config().vocab_size
             != model.config.get_text_config().vocab_size, "a base with the same vocabulary"),
            (not base and not adapters, "base=copy.deepcopy(model), or adapters of peft"),
            (any(a.is_prompt_learning for a in adapters), "adapters that add no tokens to rows"),
            (not base and any(getattr(a, "bias", "none") != "none" for a in adapters),
             "adapters with bias='none', or a base: the biases would change the base"),
            (not base and any(start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
                              for start in starts),
             "a base, or another init_lora_weights: this one changes the weights of the base"),
            (is_tied and any(getattr(a, "ensure_weight_tying", False) for a in adapters),
             "ensure_weight_tying=False: on merging peft would apply the update twice"),
            (base and Path(base.name_or_path, "trainer_state.json").exists(),
             "the original model as base; to continue use train(resume_from_checkpoint=...)"),
        ]:
            if is_wrong:
                raise ValueError(f"MolTrainer needs {needed}")
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
               for p in model.parameters()) and not self.is_deepspeed_enabled:
            logger.warning("Weights that train in bfloat16 lose most of their small updates. Use "
                           "from_pretrained(..., dtype=torch.float32).")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "is_domain" not in inputs:
            raise ValueError("a batch has no is_domain: use the collate of this file, or add it")
        with self.accelerator.autocast():  # Trainer's own does not cover the base and the head
            loss, ce, kl = mol_loss(model, self.base, inputs, **self.options)
        if model.training:
            *_, targets = mask_positions_targets(inputs)
            is_counted, is_domain = (targets != PADDING).any(dim=1), inputs["is_domain"].bool()
            if not is_counted.any():
                logger.warning_once("A batch has no token to predict; its loss is 0.")
            self.sums += torch.stack([
                ce * len(targets), kl * len(targets), (is_counted & is_domain).sum(),
                (is_counted & ~is_domain).sum()]).detach()
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def log(self, logs, *more):
        """Add the mean CE of the domain rows and the mean KL of the general rows."""
        if "loss" in logs:
            ce, kl, domain, general = self.accelerator.reduce(self.sums).tolist()
            logs |= {"ce": ce / domain} if domain else {}
            logs |= {"kl": kl / general} if general else {}
        if "loss" in logs or "train_loss" in logs:
            self.sums.zero_()
        super().log(logs, *more)
