"""MoL on a Hugging Face model: a collator, the loss of a batch, and a Trainer.

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = copy.deepcopy(model)
    pairs = [((domain_tokens, True), (general_tokens, False)), ...]
    MolTrainer(model, TrainingArguments(...), collate, pairs, base=base).train()

Copy this file, hidden.py and losses.py. example.py is a complete program. README.md explains the
settings, precision, memory, sharding, and tested versions.
"""

import inspect
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import extract_model_from_parallel
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


STORED = ("base_tokens", "base_log_probs")  # what store adds to a row


def as_dict(row):
    return row if hasattr(row, "keys") else {"input_ids": row[0], "is_domain": row[1]}


def collate(items):
    """Rows -> input_ids, attention_mask and labels (B, T), is_domain (B,).

    A row is (tokens, is_domain) or {"input_ids": tokens, "is_domain": flag}. Labels of a dict may
    be -100 at tokens that are no targets, such as the prompts of a chat. An item is a pair (domain
    row, general row), which makes every batch mixed 1:1, or (row,), or a dict. If the general rows
    are of store(), there are base_tokens and base_log_probs (B, T, k) too.
    """
    try:
        rows = [as_dict(row) for item in items
                for row in ([item] if hasattr(item, "keys") else item)]
        tokens, labels = ([torch.as_tensor(row.get(name, row["input_ids"]), dtype=torch.int64)
                           for row in rows] for name in ("input_ids", "labels"))
        batch = {"input_ids": tokens, "attention_mask": [torch.ones_like(row) for row in tokens]}
        for name in STORED if any(STORED[0] in row for row in rows) else ():
            like = next(torch.as_tensor(row[name]) for row in rows if name in row)
            batch[name] = [like.new_zeros(len(row["input_ids"]), like.shape[1])
                           if row["is_domain"] else torch.as_tensor(row[name]) for row in rows]
        batch = {name: pad_sequence(some, batch_first=True) for name, some in batch.items()}
        return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=PADDING),
                        "is_domain": torch.tensor([bool(row["is_domain"]) for row in rows])}
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError("an item of the dataset must be ((domain tokens, True), (general tokens, "
                         "False)), ((tokens, flag),) or {'input_ids': tokens, 'is_domain': flag}, "
                         f"not {str(items[0])[:80]}") from error


def store(base, rows, k=64, batch_size=8):
    """General rows -> the same rows as dicts, with what the base predicts, so MoL needs no base.

    base_tokens     (n, k) int32    the k most likely next tokens after each token of the row
    base_log_probs  (n, k) float16  their log-probabilities: with k = 64 it is 384 bytes per token

    Training is against the k tokens and "any other token": see completed in hidden.py.
    """
    found, rows = [], [as_dict(row) for row in rows]
    for i in range(0, len(rows), batch_size):
        batch = collate(rows[i:i + batch_size])
        batch = {name: x.to(unwrapped(base).device) for name, x in batch.items()}
        mask, positions, _ = mask_positions_targets(batch)
        try_once(base, mask)
        with asleep(base):
            top = log_probs(forward(base, batch["input_ids"], mask, positions)).topk(k)
        for row, log_q, tokens in zip(rows[i:], top.values.half().cpu(), top.indices.int().cpu()):
            found.append(row | dict(zip(STORED, (x[:len(row["input_ids"])].clone()
                                                 for x in (tokens, log_q)))))
    return found


def mol_loss(model, base, batch, direction="reverse", strength=1.0, chunk=None):
    """A batch of the collator -> the loss, its CE part and its KL part, as mixture_from_hidden.

    base is frozen; None: what the rows have stored, or the model without its adapters. Both models
    may be in DDP, FSDP2 or DeepSpeed. Only the forward pass of a head has a sharded weight whole.
    So the loss is computed inside the forward pass of the model's head, and there inside that of
    the base's head.
    """
    is_general, learns = ~batch["is_domain"].bool(), torch.is_grad_enabled()  # (B,)
    mask, positions, targets = mask_positions_targets(batch)
    rows, G, parts, of_base = (batch["input_ids"], mask, positions), int(is_general.sum()), [], []
    stored = [batch[name][is_general, :-1] for name in STORED if name in batch]
    if G and not (stored or base or has_adapters(model)):
        raise ValueError("MoL needs base=copy.deepcopy(model), adapters of peft, or store(...)")

    for some in (model, base) if base else (model,):
        try_once(some, mask)

    def call_base(in_head):
        some = base or unwrapped(model)
        with asleep(some, adapters=not base):
            call(some, lambda hidden, weight: in_head(hidden[:G], weight),
                 *(x[is_general] if G else x[:1] for x in rows))
        for module in base.modules() if base else ():  # FSDP2 would wait for a backward pass
            getattr(module, "reshard", lambda: None)()

    def mixture(hidden, weight, base_hidden, base_weight):
        with torch.set_grad_enabled(learns):
            parts[:] = mixture_from_hidden(hidden, weight, targets, ~is_general, base_hidden,
                                           base_weight, direction, strength, chunk, stored)

    def in_head(hidden, weight):
        if base and is_called:
            call_base(lambda *of_base: mixture(hidden, weight, *of_base))
        else:
            mixture(hidden, weight, of_base[0] if of_base else None, weight)
        return parts[0]

    # Sharding needs a call of the base in every process, if only on a row that does not count.
    is_called = not stored and (G or torch.distributed.is_initialized())
    if is_called and not base and has_adapters(model):
        call_base(lambda hidden, weight: of_base.append(hidden))
    return call(model, in_head, *rows), *parts[1:]


def mask_positions_targets(batch):
    """-> attention mask and positions (B, T), targets (B, T - 1). Padding may be on either side."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    if "position_ids" in batch and not mask.all():
        raise ValueError("position_ids need rows without padding, or documents are not apart")
    is_target = mask[:, :-1] & mask[:, 1:]  # this position and the next one are tokens
    if "labels" in batch:
        is_target &= batch["labels"][:, 1:] != PADDING
    positions = batch.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))
    return mask, positions, tokens[:, 1:].masked_fill(~is_target, PADDING)


def forward(model, tokens, mask, positions):
    """-> the logits (B, T, V), or what the head has given in place of them."""
    names, more = inspect.signature(unwrapped(model, adapters=False).forward).parameters, {}
    if not mask.all():
        more["attention_mask"] = mask.long()
    if "position_ids" in names:
        more["position_ids"] = positions
    return model(input_ids=tokens, use_cache=False, **more).logits


def call(model, in_head, *rows):
    """Call the model with in_head(input of its head (B, T - 1, C), weight) in place of its head.

    in_head returns a scalar, or None. A bias becomes a column. If the head is not plain, in_head
    gets the logits, and None.
    """
    if not unwrapped(model).has_plain_head:
        return in_head(forward(model, *rows)[:, :-1], None)
    head = unwrapped(model, adapters=False).get_output_embeddings()

    @torch.compiler.disable
    def in_place(hidden):
        hidden, weight = hidden[:, :-1], head.weight  # the last position has no target
        if head.bias is not None:
            hidden = F.pad(hidden, (0, 1), value=1.0)
            weight = torch.cat([weight, head.bias[:, None]], dim=1)
        found = in_head(hidden, weight)
        return (hidden.new_zeros(()) if found is None else found).view(1, 1, 1)

    with patch.object(head, "forward", in_place):
        return forward(model, *rows).view(())


def unwrapped(model, adapters=True):
    """The model without DDP, DeepSpeed and compilation and, if wished, without its adapters."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if adapters else getattr(model, "get_base_model", lambda: model)()


def has_adapters(model):
    return hasattr(unwrapped(model), "disable_adapter")


@contextmanager
def asleep(model, adapters=False):
    """Without gradients, dropout and, if wished, adapters. peft makes frozen ones trainable."""
    was_training, before = model.training, [(p, p.requires_grad) for p in model.parameters()]
    with torch.no_grad(), model.eval().disable_adapter() if adapters else nullcontext(model.eval()):
        yield
    model.train(was_training)
    for p, requires_grad in before:
        p.requires_grad_(requires_grad)


def try_once(model, mask):
    """Raises ValueError if padding changes what the model says. The first call tries it on one row.

    Sets has_plain_head, is the head linear and the last thing the model does, and changed_by, what
    changes the logits of the row: its positions, padding, adapters.
    """
    model, plain = unwrapped(model), unwrapped(model, adapters=False)
    if "changed_by" not in vars(model):
        head, vocab_size = plain.get_output_embeddings(), plain.config.get_text_config().vocab_size
        row, changed_by = torch.linspace(1, vocab_size - 1, 8, device=plain.device).long()[None], []
        # The model gets large outputs in place of those of its head. Does it return them as such?
        given = torch.linspace(-100, 100, vocab_size, device=row.device).bfloat16().to(plain.dtype)
        with asleep(model), head.register_forward_hook(lambda _, x, out: given.expand_as(out)):
            logits = model(input_ids=row, use_cache=False).logits[0, -1]
        is_plain = type(head) is torch.nn.Linear and logits.float().equal(given.float())
        with asleep(model):
            alone = model(input_ids=row, use_cache=False).logits[0].float()
        for what, left, right in (("positions from 0 on", 0, 0), ("padding on the left", 3, 0),
                                  ("padding on the right", 0, 3), ("adapters", 0, 0)):
            padded = F.pad(row, (left, right), value=int(row[0, 0]))
            ones = F.pad(torch.ones_like(row), (left, right)).bool()
            with asleep(model, what == "adapters" and has_adapters(model)):
                logits = forward(model, padded, ones, (ones.cumsum(1) - 1).clamp(min=0))[ones]
            if (logits - alone).norm() > 0.02 * (alone - alone.mean(dim=1, keepdim=True)).norm():
                changed_by.append(what)
        model.has_plain_head, model.changed_by = is_plain, changed_by
    is_used = {"positions from 0 on": True, "padding on the left": not mask[:, 0].all(),
               "padding on the right": not mask[:, -1].all(), "adapters": False}
    for what in filter(is_used.get, model.changed_by):
        raise ValueError(f"{what} should not change the logits of a row, but in "
                         f"{type(plain).__name__} it does, and MoL would be wrong. Try rows of "
                         "equal length, or padding on the other side")


class MolTrainer(Trainer):
    """transformers.Trainer with MoL as its loss, and more arguments. It logs mean CE and mean KL.

    base                          the frozen model of the KL; None: the model without its adapters
    direction, strength, chunk    as in mixture_from_hidden

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
        # Otherwise Trainer assumes, if there are labels, that the loss is already divided by the
        # number of tokens, and gradients grow with the number of micro-batches.
        self.model_accepts_loss_kwargs = False

    def prepared(self, base):
        """The base on the device of the model, in shards if the model will be."""
        if self.is_deepspeed_enabled:
            config = dict(self.accelerator.state.deepspeed_plugin.deepspeed_config)
            if config["zero_optimization"]["stage"] == 3:
                import deepspeed
                config = {k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}
                return deepspeed.initialize(model=base, config=config)[0]
        elif self.is_fsdp_enabled:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model
            return fsdp2_prepare_model(self.accelerator, base)
        return base if base.device == self.args.device else base.to(self.args.device)  # 8 bit stays

    def refuse_what_is_wrong(self, base):
        args, model = self.args, self.model
        adapters = getattr(model, "peft_config", {}).values()
        shared = base and {*map(id, model.parameters())} & {*map(id, base.parameters())}
        config, base_config = (some.config.get_text_config() for some in (model, base or model))
        for is_wrong, needed in [
            (args.n_gpu > 1, "one GPU per process: CUDA_VISIBLE_DEVICES=0, or torchrun"),
            (args.label_smoothing_factor or self.compute_loss_func or self.compute_metrics
             or self.model_init
             or getattr(args, "train_sampling_strategy", "") == "group_by_length",
             "no label smoothing, compute_loss_func, compute_metrics, model_init, group_by_length"),
            (getattr(config, "output_router_logits", False), "output_router_logits=False"),
            (self.is_fsdp_enabled and not self.accelerator.is_fsdp2, "fsdp_version 2"),
            (shared, "base=copy.deepcopy(model), made before adapters; it shares weights"),
            (config.vocab_size != base_config.vocab_size, "a base with the same vocabulary"),
            (base and Path(base.name_or_path, "trainer_state.json").exists(),
             "the original model as base; to continue use train(resume_from_checkpoint=...)"),
            (any(a.is_prompt_learning for a in adapters), "adapters that add no tokens to rows"),
            (model.config.tie_word_embeddings and any(hasattr(end, "base_layer") for end in (
                model.get_input_embeddings(), model.get_output_embeddings())),
             "no adapters on tied embeddings: peft merges them wrongly"),
            (not base and any(getattr(a, "bias", "none") != "none" for a in adapters),
             "adapters with bias='none', or a base: the biases would change the base"),
            (not base and any(str(getattr(a, "init_lora_weights", "")).lower().startswith(
                ("pissa", "olora", "corda", "loftq", "lora_ga")) for a in adapters),
             "a base, or another init_lora_weights: this one changes the base"),
        ]:
            if is_wrong:
                raise ValueError(f"MolTrainer needs {needed}")
        if not self.is_deepspeed_enabled and any(
                p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
                for p in model.parameters()):
            logger.warning("Trained weights in 16 bits lose most of their small updates: load the "
                           "model with dtype=torch.float32")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "is_domain" not in inputs:
            raise ValueError("a batch has no is_domain: use the collate of this file, or add it")
        with self.accelerator.autocast():  # Trainer's own does not cover the base and the head
            loss, ce, kl = mol_loss(model, self.base, inputs, **self.options)
        if model.training:
            if not (self.base or self.state.global_step or STORED[0] in inputs) and (
                    "adapters" in unwrapped(model).changed_by):
                raise ValueError("the adapters already change the model: continue with "
                                 "train(resume_from_checkpoint=...), or give the base as base=")
            has_target = (mask_positions_targets(inputs)[2] != PADDING).any(dim=1)  # (B,)
            if not has_target.any():
                logger.warning_once("a batch has no target, only padding or labels of -100")
            domain = (has_target & inputs["is_domain"].bool()).sum()
            self.sums += torch.stack([ce * len(has_target), kl * len(has_target), domain,
                                      has_target.sum() - domain]).detach()
        return (loss, {"ce": ce, "kl": kl}) if return_outputs else loss

    def log(self, logs, *more):
        """Add the mean CE of the domain rows and the mean KL of the general rows, with targets."""
        if "loss" in logs:
            ce, kl, domain, general = self.accelerator.reduce(self.sums).tolist()
            means = {"ce": (ce, domain), "kl": (kl, general)}
            logs |= {name: sum / count for name, (sum, count) in means.items() if count}
        if "loss" in logs or "train_loss" in logs:
            self.sums.zero_()
        super().log(logs, *more)

    def get_eval_dataloader(self, *arguments):
        loader = super().get_eval_dataloader(*arguments)
        if self.args.world_size > 1 and (
                len(loader.dataset) % (self.args.world_size * self.args.eval_batch_size)):
            logger.warning_once("the evaluation set does not divide into full batches of all "
                                "processes: its losses count some rows twice")
        return loader
