"""MoL on a Hugging Face model: a collator, the loss of a batch, and a Trainer.

Copy this file, hidden.py and losses.py. README.md explains them. example.py is a program.
"""

import inspect
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import extract_model_from_parallel, fsdp2_prepare_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.utils import logging

from losses import PADDING, log_probs

try:
    from plots.huggingface.hidden import mixture_from_hidden
except ImportError:  # a copy, with hidden.py and losses.py beside it
    from hidden import mixture_from_hidden

logger = logging.get_logger(__name__)
unwrapped = partial(extract_model_from_parallel, keep_torch_compile=False)  # without DDP and such
STORED = ("base_tokens", "base_log_probs")  # what store adds to a row


def collate(items):
    """Rows -> input_ids, attention_mask and labels (B, T), is_domain (B,).

    A row is (tokens, is_domain) or {"input_ids": tokens, "is_domain": flag}. Labels of a dict may
    be -100 at tokens that are no targets, such as the prompts of a chat. An item is a pair (domain
    row, general row), which makes every batch mixed 1:1, or (row,), or a dict.
    """
    try:
        rows = [row if hasattr(row, "keys") else {"input_ids": row[0], "is_domain": row[1]}
                for item in items for row in ([item] if hasattr(item, "keys") else item)]
        rows = [{"labels": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), **row}
                for row in rows]
        batch = {"is_domain": torch.tensor([bool(row["is_domain"]) for row in rows])}
        for name in ("input_ids", "attention_mask", "labels", *STORED):
            some = [row for row in rows if not (name in STORED and row["is_domain"])]
            if any(name in row for row in some):
                dtype = None if name in STORED else torch.int64
                values = [torch.as_tensor(row[name], dtype=dtype) for row in some]
                batch[name] = pad_sequence(values, True, PADDING if name == "labels" else 0)
        return batch
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError("an item of the dataset must be ((tokens, True), (tokens, False)), a row "
                         f"in (row,) or a dict, not {str(items[0])[:80]}") from error


def store(base, rows, k=64):
    """Add the base's k most likely next tokens to general rows, given as dicts. The base runs once.

    base_tokens (T, k) are int32, base_log_probs (T, k) float16: with k = 64 they take 384 bytes
    per token. Raises ValueError for rows with padding or position_ids.
    """
    found = []
    with asleep(base):
        for row in rows:
            tokens = torch.as_tensor(row["input_ids"], device=base.device)[None]
            if "position_ids" in row or not all(row.get("attention_mask", [1])):
                raise ValueError("store needs rows of one document, without padding")
            top = log_probs(base(tokens, use_cache=False).logits[0])
            top = top.topk(min(k, top.shape[-1]))
            found.append({**row, "base_tokens": top.indices.int().cpu(),
                          "base_log_probs": top.values.half().cpu()})
    return found


def mol_loss(model, base, batch, direction="reverse", strength=1.0, chunk=None):
    """A batch of the collator -> the loss, its CE part and its KL part, as mixture_from_hidden.

    base is frozen; None: what the rows have stored, or the model without its adapters. Both may be
    in DDP, FSDP2 or DeepSpeed. A sharded head is whole only in its forward pass: there the loss is
    computed, and the weight of the base's head is copied.
    """
    is_general, parts, of_base = ~batch["is_domain"].bool(), [], [None, None]
    mask, positions, targets = mask_positions_targets(batch)
    rows, G, T = (batch["input_ids"], mask, positions), int(is_general.sum()), targets.shape[1]
    stored = [F.pad(batch[name], (0, 0, 0, T - batch[name].shape[1]))  # or cut to T
              for name in STORED if name in batch and not base]
    has_base = base or hasattr(unwrapped(model), "disable_adapter")
    if G and not (stored or has_base):
        raise ValueError("MoL needs base=copy.deepcopy(model), adapters of peft, or rows of store")
    for some in (model, base) if base else (model,):
        try_once(some, mask)

    def in_base(hidden, weight):
        is_copied = base and is_shared and weight is not None
        of_base[:] = hidden[:G], weight.clone() if is_copied else weight
        return hidden

    def in_head(hidden, weight):
        of_base[1] = of_base[1] if base else weight
        parts[:] = mixture_from_hidden(hidden, weight, targets, ~is_general, *of_base, direction,
                                       strength, chunk, stored)
        return parts[0].view(1, 1, 1)

    # Sharding needs a call of the base in every process, if only on a row that does not count.
    is_shared = torch.distributed.is_initialized()
    if has_base and not stored and (G or is_shared):
        with asleep(base or unwrapped(model), adapters=not base):
            call(base or unwrapped(model), in_base, *(x[is_general] if G else x[:1] for x in rows))
        for module in base.modules() if base else ():  # FSDP2 would wait for a backward pass
            getattr(module, "reshard", lambda: None)()
    return call(model, in_head, *rows).view(()), *parts[1:]


def mask_positions_targets(batch):
    """-> attention mask and positions (B, T), targets (B, T - 1). Padding may be on either side."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    if "position_ids" in batch and not mask.all():
        raise ValueError("position_ids need rows without padding, or documents are not apart")
    is_target = mask[:, :-1] & mask[:, 1:]  # this position and the next one are tokens
    if "labels" in batch:
        is_target &= batch["labels"][:, 1:] != PADDING
    places = torch.arange(tokens.shape[1], device=tokens.device)
    starts = mask.long().argmax(dim=1, keepdim=True)  # after the padding on the left
    positions = batch.get("position_ids", (places - starts).clamp(min=0))
    return mask, positions, tokens[:, 1:].masked_fill(~is_target, PADDING)


def call(model, in_head, tokens, mask, positions):
    """Call the model with in_head(hidden (B, T - 1, C), weight) in place of its head -> what it
    returns. If the head is not plain, in_head gets the logits and None."""
    plain, more = unwrapped(model), {}
    head, is_plain = plain.get_output_embeddings(), plain.has_plain_head
    plain = getattr(plain, "get_base_model", lambda: plain)()  # without adapters
    if not mask.all():
        more["attention_mask"] = mask.long()
    if (positions[:, -1] < tokens.shape[1] - 1).any() and (
            "position_ids" in inspect.signature(plain.forward).parameters):
        more["position_ids"] = positions

    @torch.compiler.disable
    def in_place(hidden):
        return in_head(hidden[:, :-1], head.weight)  # the last position has no target

    with patch.object(head, "forward", in_place) if is_plain else nullcontext():
        found = model(input_ids=tokens, use_cache=False, **more).logits
    return found if is_plain else in_head(found[:, :-1], None)


@contextmanager
def asleep(model, adapters=False):
    """Without gradients, dropout and, if wished, adapters. peft makes frozen ones trainable."""
    was_training, before = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    without = model.disable_adapter() if adapters else nullcontext()
    try:
        with torch.no_grad(), without:
            yield
    finally:
        model.train(was_training)
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


def try_once(model, mask):
    """Raises ValueError if padding would change the logits. The first call tries it on one row.

    It sets has_plain_head, whether the head is linear and the last thing that the model does, and
    changed_by, the names of what changes the logits.
    """
    model = unwrapped(model)
    if "changed_by" not in vars(model):
        model.has_plain_head, model.changed_by = False, []
        head, vocab_size = model.get_output_embeddings(), model.config.get_text_config().vocab_size
        row = torch.linspace(1, vocab_size - 1, 8, device=model.device).long()[None]
        with asleep(model):
            alone = model(input_ids=row, use_cache=False).logits.float()
        for what, left in (("padding", 3), ("adapters", 0)):
            tokens, places = F.pad(row, (left, 0), value=1), torch.arange(-left, 8)[None].to(row)
            with asleep(model, what == "adapters" and hasattr(model, "disable_adapter")):
                logits = call(model, lambda logits, _: logits, tokens, places >= 0,
                              places.clamp(min=0))[:, left:]
            spread = (alone - alone.mean(dim=2, keepdim=True)).norm()
            if (logits - alone[:, :-1]).norm() > 0.02 * spread:
                model.changed_by.append(what)
        # The model gets large outputs in place of those of its head. Does it return them as such?
        given = torch.linspace(-100, 100, vocab_size, device=row.device).bfloat16().to(model.dtype)
        with asleep(model), head.register_forward_hook(lambda _, x, out: given.expand_as(out)):
            found = model(input_ids=row, use_cache=False).logits
        model.has_plain_head = (type(head) is torch.nn.Linear and head.bias is None
                                and found.float().equal(given.float().expand_as(found)))
    if "padding" in model.changed_by and not mask[:, 0].all():
        raise ValueError(f"{model.config.model_type} does not ignore padding on the left: pad on "
                         "the right")


class MolTrainer(Trainer):
    """transformers.Trainer with MoL, as in mol_loss. It logs the mean CE and the mean KL.

    The loss of a step is the mean over its micro-batches and processes. predict() returns the CE
    and KL parts of batches. Raises ValueError for settings that would make the loss wrong.
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
        self.model_accepts_loss_kwargs = False  # otherwise gradients grow with the micro-batches

    def prepared(self, base):
        """The base on the device of the model, in shards if the model will be."""
        plugin = self.accelerator.state.deepspeed_plugin
        if self.is_fsdp_enabled:
            return fsdp2_prepare_model(self.accelerator, base)
        if plugin and plugin.zero_stage == 3:
            import deepspeed
            config = {name: value for name, value in plugin.deepspeed_config.items()
                      if name not in ("optimizer", "scheduler")}
            return deepspeed.initialize(model=base, config=config)[0]
        return base if base.device == self.args.device else base.to(self.args.device)  # 8 bit stays

    def refuse_what_is_wrong(self, base):
        args, model = self.args, self.model
        adapters = getattr(model, "peft_config", {}).values()
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        for is_wrong, needed in [
            (args.n_gpu > 1, "one GPU per process: CUDA_VISIBLE_DEVICES=0, or torchrun"),
            (args.label_smoothing_factor or self.compute_loss_func or self.compute_metrics
             or self.model_init or args.train_sampling_strategy == "group_by_length",
             "no label smoothing, compute_loss_func, compute_metrics, model_init, group_by_length"),
            (getattr(model.config, "output_router_logits", False), "output_router_logits=False"),
            (self.is_fsdp_enabled and not self.accelerator.is_fsdp2, "fsdp_version 2"),
            (base and {*map(id, model.parameters())} & {*map(id, base.parameters())},
             "base=copy.deepcopy(model), made before adapters; it shares weights"),
            (base and Path(base.name_or_path, "trainer_state.json").exists(),
             "the original model as base; to continue use train(resume_from_checkpoint=...)"),
            (any(a.is_prompt_learning for a in adapters), "adapters that add no tokens to rows"),
            (model.config.tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends),
             "no adapters on tied embeddings: peft merges them wrongly"),
            (not base and any(getattr(a, "bias", "none") != "none" or str(getattr(
                a, "init_lora_weights", "")).lower().startswith(("pissa", "olora", "corda", "loftq",
                                                                 "lora_ga")) for a in adapters),
             "a base, or adapters with another bias or init_lora_weights: these change the base"),
        ]:
            if is_wrong:
                raise ValueError(f"MolTrainer needs {needed}")
        if not self.is_deepspeed_enabled and any(
                p.requires_grad and p.dtype.itemsize == 2 for p in model.parameters()):
            logger.warning("Trained weights in 16 bits lose small updates: use dtype=torch.float32")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "is_domain" not in inputs:
            raise ValueError("a batch has no is_domain: use the collate of this file, or add it")
        with self.accelerator.autocast():  # Trainer's own does not cover the base and the head
            loss, ce, kl = mol_loss(model, self.base, inputs, **self.options)
        if model.training:
            if "adapters" in unwrapped(model).changed_by and not (
                    self.base or self.state.global_step or STORED[0] in inputs
                    or inputs["is_domain"].all()):
                raise ValueError("the adapters already change the model: continue with "
                                 "train(resume_from_checkpoint=...), or give the base as base=")
            has_target = (mask_positions_targets(inputs)[2] != PADDING).any(dim=1)  # (B,)
            if not has_target.any():
                logger.warning_once("a batch has no target, only padding or labels of -100")
            domain, B = (has_target & inputs["is_domain"].bool()).sum(), len(has_target)
            self.sums += torch.stack([ce * B, kl * B, domain, has_target.sum() - domain]).detach()
        elif self.args.world_size > 1 and self.accelerator.gradient_state.remainder > 0:
            logger.warning_once("an evaluation set does not divide into full batches of all "
                                "processes: its losses count some rows twice")
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def log(self, logs, *more):
        """Add the mean CE of the domain rows and the mean KL of the general rows, with targets."""
        if "loss" in logs:
            ce, kl, domain, general = self.accelerator.reduce(self.sums).tolist()
            self.sums.zero_()
            logs |= {name: part / count for name, part, count in (
                ("ce", ce, domain), ("kl", kl, general)) if count}
        super().log(logs, *more)
