"""The experiments of plots/: their runs, figures and tables, other methods and other texts."""

import copy
import importlib
import itertools
import math
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import data
import losses
import test_train
from eval import evaluate
from model import GPT, GPTConfig
from plots import domains, forgetting, methods, rivals, runs, texts, wordings
from plots.runs import Run
from plots.tables import difference, differences_table, metrics_table, sweep_tables
from train import METHODS, Settings, continue_pretraining, parse

ROOT = test_train.ROOT
EXPERIMENTS = {name: importlib.import_module(f"plots.{name}") for name in
               "amount contexts details domains headline quality rivals scale wordings".split()}
LINES = runs.read_runs(ROOT / "plots" / "runs.jsonl")
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3",
        "--base-batch-size", "4", "--steps", "4", "--batch-size", "2", "--device", "cpu"]
RUNS = {"replay, wrong": Run("replay", {"general_errors": 1.0}), "mol": Run("mol")}


def program(arguments, made=RUNS, draw=None, tell=str):
    """Run the program of an experiment -> exit code, output, errors."""
    return test_train.program(lambda: runs.main("tiny", made, draw, "A test.", tell,
                                                arguments=[*map(str, arguments)]))


def refused(ended):
    """The one message of a program that has ended with code 2."""
    code, _, errors = ended
    assert code == 2 and errors.count("error: ") == 1
    return errors.splitlines()[-1]  # below the usage


def test_committed_runs_of_one_seed_and_size_have_the_same_base():
    bases = {(*runs.base_of(line), line["base"]) for line in LINES.values()}
    assert len(bases) == len({key[:-1] for key in bases})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_that_is_made_again_has_the_metrics_of_the_committed_one(name):
    run = next(iter(EXPERIMENTS[name].RUNS.values()))
    committed = LINES[runs.identity_of(run, runs.DEFAULTS, 0)]
    tiny = replace(parse(TINY, runs.DEFAULTS), general_errors=run.settings.get("general_errors", 0))
    made = runs.make_run(run, tiny, 0)
    assert made["settings"].keys() == committed["settings"].keys()
    for row in (0, -1)[len(committed["rows"]) == 1:]:  # some have only the last one
        new, old = made["rows"][row], committed["rows"][row]
        assert new.keys() >= old.keys() - {"kl_own", "kl_other"}
        assert {*new["accuracy"]} ^ {*old["accuracy"]} <= {"held-out wordings"}  # asked since


def test_a_line_that_was_cut_short_is_ignored_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = {"method": "mol", "work": "train", "how": {}, "settings": runs.of_run(runs.DEFAULTS)}
    for seed in range(3):
        runs.append_run(path, {**line, "seed": seed})
    whole = path.read_bytes()
    for damaged, seeds in [(b"", []), (whole[:-1], [0, 1, 2]), (whole[:-20], [0, 1]),
                           (whole[:9], []), (b"[1]\n{}\n\0\xff\n" + whole, [0, 1, 2])]:
        path.write_bytes(damaged)
        runs.append_run(path, {**line, "seed": 7})
        assert [found["seed"] for found in runs.read_runs(path).values()] == [*seeds, 7]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """(flags) -> the finished program of an experiment of tiny runs in tmp_path."""
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    return lambda *more, seeds=(0,), **options: program(
        ["--out", tmp_path, "--seed", *seeds, *TINY, *more], **options)


def test_only_missing_runs_are_made(experiment, tmp_path):
    path, told = tmp_path / "runs.jsonl", []
    code, output, _ = experiment(seeds=(0, 1), tell=lambda results: told.extend(
        results(run) for run in RUNS.values()) or "told")
    assert code == 0 and "4 runs, 4 to make" in output and output.endswith("told\n")
    made = {(line["method"], line["seed"]): line["rows"] for line in runs.read_runs(path).values()}
    assert told == [[made[run.method, seed] for seed in (0, 1)] for run in RUNS.values()]
    assert [row["step"] for row in made["mol", 1]] == [0, 4] and made["mol", 0] != made["mol", 1]

    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the last run was cut short
    assert "4 runs, 1 to make" in experiment(seeds=(0, 1))[1]
    for made in (2, 0):
        assert f"2 runs, {made} to make" in experiment("--kl", "forward")[1]
    assert path.read_bytes().startswith(whole[:-20])  # nothing is written again


def test_runs_from_another_base_are_refused(experiment, tmp_path):
    experiment(made={"mol": Run("mol")})
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace('"base": "', '"base": "of another machine '))
    before = path.read_bytes()
    assert "another base" in refused(experiment()) and path.read_bytes() == before
    assert experiment(seeds=(1,))[0] == 0  # another seed has a base of its own


def test_an_experiment_that_fails_keeps_nothing(experiment, tmp_path, monkeypatch):
    for flag, value, told in [
            ("--methods", "mol", "--methods"), ("--general", "README.md", "--general"),
            ("--general-errors", 0.3, "--general-errors"),  # the experiment varies it
            ("--lr", 1e8, "the loss")]:  # it is NaN
        assert told in refused(experiment(flag, value)) and not list(tmp_path.rglob("*.*"))
    monkeypatch.chdir(ROOT)  # other settings need a folder of your own
    for arguments in (["--steps", 6], ["--steps", 6, "--out", "plots"], ["--seed", 0]):
        assert "--out" in refused(program(arguments, draw=pytest.fail, tell=pytest.fail))


SCRIPT = """
import train
from plots import headline, runs
train.BASES = train.Path(__file__).parent / "bases"  # the processes run this script, too
if __name__ == "__main__":
    runs.main("headline", headline.RUNS, headline.draw, "", headline.tell)
"""


def test_kill_loses_no_finished_run_and_leaves_no_process(tmp_path):
    script, path = tmp_path / "experiment.py", tmp_path / "runs.jsonl"
    script.write_text(SCRIPT)
    killed = subprocess.Popen([sys.executable, script, "--out", tmp_path, "--seed", "0", *TINY],
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)

    def states(*which):  # of processes
        found = subprocess.run(["ps", *which, "-o", "pid=,stat="], capture_output=True, text=True)
        return dict(map(str.split, found.stdout.splitlines()))

    while not path.exists() or not path.read_bytes():
        assert killed.poll() is None
        time.sleep(0.02)
    children = states("--ppid", str(killed.pid))
    killed.kill()
    killed.wait()
    assert children and 0 < len(runs.read_runs(path)) < 7
    deadline = time.monotonic() + 60
    while any(state[0] != "Z" for state in states("-p", ",".join(children)).values()):
        assert time.monotonic() < deadline, "the processes of a killed experiment go on"
        time.sleep(0.05)


def metrics():
    """Rows of metrics: ce forgets all, mol a tenth. The bases of the seeds differ in their loss."""
    rows = []
    for seed, method in itertools.product((0, 1), ("base", "ce", "mol")):
        share, loss = {"base": (1.0, 0), "ce": (0.0, 2.01), "mol": (0.9, 0.11)}[method]
        for t in (0,) if method == "base" else (0, 0.5, 1):
            kept = dict.fromkeys(("no_think", "think", "facts"), 1 + t * (share - 1))
            rows.append({"method": method, "seed": seed, "step": 20 * t, "kl_to_base": t,
                         "general_loss": 1 + seed + t * loss, "domain_loss": 5 - 4 * t,
                         **({"ce": 5 - t, "kl": 0.1 * (method == "mol")} if t else {}),
                         "accuracy": {**kept, "domain": t}, "probability": {**kept, "domain": t}})
    return rows


def test_the_figure_of_a_run(tmp_path):
    """Its title says what it shows. Its name decides the format."""
    forgetting.draw(metrics(), tmp_path / "new.svg")
    shown = (tmp_path / "new.svg").read_text()
    assert shown.startswith("<?xml") and "General skills (base 100%): ce 0%, mol 90%" in shown


def lines_of(table):
    return [re.sub(" +", " ", line).strip("| ") for line in table.splitlines()]


def test_a_table_has_the_mean_and_the_range_of_the_last_rows():
    rows = metrics()
    rows[-1]["kl_to_base"] = -1e-9  # a KL that is 0 except for rounding
    assert lines_of(metrics_table(rows[-3:]))[::2] == [
        "method | general loss | domain loss | KL to base | no-think sums | think sums | facts | "
        "domain | p(right)", "mol | 2.110 | 1.000 | 0.000 | 0.90 | 0.90 | 0.90 | 1.00 | 0.90"]
    assert lines_of(metrics_table(rows))[-1].startswith("mol | 1.610 (1.110-2.110) | 1.000 (1.000-")
    mol, ce = [rows[-1]], [rows[-4]]
    heading, _, *found = lines_of(sweep_tables(
        "x", {"mol": {0.5: [mol, ce]}, "ce": {0.5: [ce], 1.0: [ce]}}, "{:.0%}".format,
        {"loss": (lambda row: row["general_loss"], 1)}))
    assert [heading, *found] == ["loss by x | 50% | 100%", "mol | 3.1 (2.1-4.0)", "ce | 4.0 | 4.0"]


def test_a_paired_difference_by_hand():
    """1, 2 and 3: mean 2, deviation 1, t 4.30, so 2 -+ 4.30 / sqrt(3). In brackets if around 0."""
    assert difference([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2 - 2.4826, 2 + 2.4826), abs=1e-3)
    assert difference([1], [0]) == (1, -math.inf, math.inf)

    rows = metrics()
    rows[-1]["kl_to_base"] = 2
    of_seeds = {method: [[row for row in rows if (row["method"], row["seed"]) == (method, seed)]
                         for seed in (0, 1)] for method in ("ce", "mol")}
    table = differences_table(of_seeds, "ce")
    assert "minus ce" in table and "| mol | +90.0 (+90.0 to +90.0) | " in re.sub(" +", " ", table)
    assert "[+0.500 (-5.855 to +6.855)]" in table


@pytest.fixture(scope="module")
def world():
    """Tiny settings, their world, and a frozen model that has read nothing."""
    settings = parse([*TINY, "--general-documents", "300", "--general-errors", "0.7"])
    world = data.make_world(settings, 0)
    return settings, world, untrained(settings, world).requires_grad_(False)


def untrained(s, world, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd))


def expects(world, surprise):
    """A base that expects each next token, but nothing where it is a certain one: 6 nats."""
    V, unexpected = world.tokenizer.n_vocab, world.tokenizer.encode_single_token(surprise)

    def base(tokens):  # (B, T) -> (B, T, V)
        following = tokens.roll(-1, 1)[..., None]  # of the last the first, a line break as well
        logits = torch.zeros(*tokens.shape, V).scatter(2, following, 30.0)
        return logits.index_fill(2, torch.tensor([unexpected]), 0.0)
    return base


def drawn(source, world, base=None, **how):
    settings, toy, blank = world
    tokens = texts.SOURCES[source](settings, 0, toy, base or blank, **how)
    return toy.tokenizer.decode(tokens.tolist()).splitlines(keepends=True)


def documents_of(*source, **how):
    return list(texts.documents_of("".join(drawn(*source, **how)), texts.kinds_of(0)))


def test_the_base_answers_the_prompts_and_stories_stay(world):
    """An answer in a batch is the one that the base gives to the prompt alone."""
    settings, toy, base = world
    end = toy.tokenizer.encode_single_token("\n")

    def answer(prompt):
        tokens = data.encode(toy.tokenizer, "\n" + prompt)[None]
        new = base.generate(tokens, 32, temperature=0, stop=end)[0, tokens.shape[1]:].tolist()
        return toy.tokenizer.decode(new).partition("\n")[0] + "\n"

    documents = documents_of("open", world)[:40]
    assert 0 < sum(not prompt for prompt, _ in documents) < 20
    text = data.encode(toy.tokenizer, "".join(a + b for a, b in documents))
    found = texts.answered(settings, 0, replace(toy, general=text), base)
    assert toy.tokenizer.decode(found.tolist()) == "".join(
        prompt + answer(prompt) if prompt else story for prompt, story in documents)


def test_the_other_format_is_right_and_only_for_think_sums(world):
    assert texts.by_tens("37+45 think:") == " 30+40=70, 7+5=12, 82\n"
    assert texts.by_tens("10+12 think:") == " 10+10=20, 0+2=02, 22\n"
    right = {a + b for kind in texts.kinds_of(0).values() for a, b in kind.train}
    found = documents_of("other format", world, own=0.5)
    think = [(prompt, answer) for prompt, answer in found if "think" in prompt]
    assert all(a + b in right or b == texts.by_tens(a) for a, b in think) and len(think) > 40
    assert all(a + b in right for a, b in found if "think" not in a)
    share = sum(a + b in right for a, b in think) / len(think)
    assert share == pytest.approx(0.5, abs=0.15)


def test_a_text_with_some_of_the_items(world):
    kinds = texts.kinds_of(0)
    named, others = texts.countries(0, 0.5).values()
    assert texts.countries(0, 1.0).keys() == {"named"}
    assert len(named) == len(others) == 15 and {*named, *others} == {*kinds["facts"].probes}
    text = "".join(drawn("some items", world, share=0.5))
    assert all(prompt.split()[3].rstrip("?") not in text for prompt, _ in others)
    assert any(prompt in text for prompt, _ in named)
    assert "Q:" not in "".join(drawn("some items", world, share=0.5, question=False))
    few = [prompt for prompt, _ in documents_of("some items", world, share=0.02)]
    pairs = {re.sub("=| think:", "", prompt) for prompt in few if "+" in prompt}
    assert 1 < len(pairs) <= 0.02 * len(kinds["no_think"].train) + 1


def test_the_overlap_with_the_domain(world):
    domain = {a + b for a, b in data.alarms(random.Random("domain 0")).train}
    lines = drawn("overlap", world, share=0.25)
    assert len(lines) == 300 and sum(line in domain for line in lines) == 75
    filtered = drawn("overlap", world, expects(world[1], "4"), share=0.25, limit=5.0)
    assert filtered == [line for line in lines if "4" not in line] != []


def test_how_much_of_a_text_is_on_the_path_of_the_base(world):
    """After the token that surprises the base nothing of the document counts."""
    lines = ["12+13=25\n", "21+43=64\n"]
    nats = texts.surprise(expects(world[1], "4"), world[1], lines)
    assert [[i for i, loss in enumerate(line) if loss > 5] for line in nats] == [[], [3, 7]]
    toy = replace(world[1], general=data.encode(world[1].tokenizer, "".join(lines)))
    assert texts.on_path(expects(toy, "x"), toy) == 1
    assert texts.on_path(expects(toy, "4"), toy) == (len(nats[0]) + 4) / len(toy.general)


def test_a_run_on_another_text_reads_it_and_is_tested_on_it(world, monkeypatch):
    settings, world, base = world
    read = []
    monkeypatch.setattr(texts, "continue_pretraining", lambda method, settings, seed, world, base,
                        test: (read.append(world.general), (base, [{}, test(base)]))[1])
    *_, row = texts.from_source("mol", settings, 0, world, base, "some items", share=0.5)
    assert {"named", "not named", "facts"} <= row["accuracy"].keys() and row["on_path"] < 1
    assert torch.equal(read[0], texts.some_items(settings, 0, world, base, 0.5))
    monkeypatch.setattr(texts, "answers_of", lambda model, world, prompts: {
        prompt: texts.by_tens(prompt) for prompt in prompts})
    *_, other = texts.from_source("mol", settings, 0, world, base, "other format")
    assert row["final"] < 0.1 and other["final"] == 1 and "other format" in other["accuracy"]
    few = replace(settings, general_documents=1)
    with pytest.raises(data.BadInput, match="too few"):
        texts.from_source("mol", few, 0, world, base, "overlap", share=0)


def loss_of(name, world, model, batch, strength=1.0):
    """The loss of a method, its CE part and its KL part."""
    (settings, world, base), method = world, METHODS[name]
    fifth = [method.prepare(base, world, settings, 0)] if method.prepare else []
    found = method.loss(model, base, batch, replace(settings, strength=strength), *fifth)
    return [value.item() for value in found]


@pytest.fixture(scope="module")
def batch(world):
    """Two rows of domain text, two of general text."""
    _, world, _ = world
    return next(data.batches(world.domain, world.general, 2, 2, 64, 0))


def test_weight_distance_by_hand():
    """Half of 1^2 + 3^2 is 5, and half of 2 * 1^2 + 1 * 3^2 is 5.5."""
    w, w0, importance = torch.tensor([[1.0, 5.0], [0.0, 2.0], [2.0, 1.0]])
    assert methods.weight_distance([w], [w0]) == 5.0
    assert methods.weight_distance([w], [w0], [importance]) == 5.5


def test_the_fisher_is_the_curvature_of_the_kl():
    """It is p (1 - p) per token for any length. Half of it times a small step squared is the KL."""
    model = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0, 0.0, -1.0]]))  # always the same
    p, tokens = model.weight.softmax(dim=-1), torch.zeros(2000, 4, dtype=torch.int64)
    fisher, = methods.diagonal_fisher(model, tokens, torch.Generator().manual_seed(0))
    assert torch.allclose(fisher, p * (1 - p), atol=0.015) and not model.weight.requires_grad
    stepped = model.weight + torch.tensor([1e-2, 0.0, 0.0])
    kl = losses.kl_divergence(stepped[None], model.weight[None], "forward").item()
    distance = methods.weight_distance([stepped], [model.weight], [p * (1 - p)])
    assert distance.item() == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("name, p, q, target", [
    ("domain_kl", (0.5, 0.5), (0.25, 0.75), 0),
    ("masked_kl", (0.2, 0.6, 0.2), (0.2, 0.2, 0.6), 1)])  # without word 1 the same two
def test_kl_on_domain_text_by_hand(name, p, q, target):
    """One token, KL[q || p] with p = (1/2, 1/2) and q = (1/4, 3/4), for any --kl."""
    token = torch.full((1, 1), target)
    batch = data.Batch(token, token, torch.tensor([True]))
    loss, ce, kl = METHODS[name].loss(*(lambda tokens, p=p: torch.tensor([[p]]).log()
                                        for p in (p, q)), batch, Settings(strength=2.0))
    assert ce.item() == pytest.approx(-math.log(p[target]))
    assert kl.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert loss.item() == pytest.approx((ce + 2 * kl).item())


@pytest.mark.parametrize("name", ["argmax", "sampled", "likely_tokens"])
def test_replay_with_targets_from_the_base(name, world, batch):
    settings, toy, base = world
    logits, text = base(batch.tokens[2:]), batch.targets[2:]  # (G, T, V), (G, T)
    nats = losses.cross_entropy(logits, text)
    draw = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1,
                             generator=torch.Generator().manual_seed(0)).view(text.shape)
    targets = {"argmax": logits.argmax(dim=-1), "sampled": draw,
               "likely_tokens": text.where(nats <= 6.0, losses.PADDING)}[name]
    assert 0 < (nats > 6.0).sum() < text.numel()
    model = untrained(settings, toy, seed=1)
    expected = losses.mean_cross_entropy(model(batch.tokens),
                                         torch.cat([batch.targets[:2], targets])).item()
    loss, ce, kl = loss_of(name, world, model, batch, strength=6.0)
    assert kl == 0 and loss == ce == pytest.approx(expected)


def test_replay_and_mol_is_the_mean_of_both(world, batch):
    model = untrained(*world[:2], seed=1)
    both, *parts = (loss_of(name, world, model, batch) for name in ("ce_and_kl", "mol", "replay"))
    assert both == pytest.approx([(mol + replay) / 2 for mol, replay in zip(*parts)])


def test_only_a_part_of_the_model_is_trained(world):
    settings, world, _ = world
    base = untrained(replace(settings, n_layer=2), world).requires_grad_(False)
    for part, name in methods.PARTS.items():
        model, _ = continue_pretraining(f"ce, {part}", settings, 0, world, base, lambda model: {})
        for (weight_name, new), old in zip(model.named_parameters(), base.parameters()):
            chosen = (name or "blocks.1.") in weight_name  # of two blocks the last
            assert torch.equal(new, old) != chosen, (part, weight_name)


def test_interpolation_between_the_base_and_the_trained_model(world):
    settings, world, base = world
    model, _ = continue_pretraining("ce", settings, 0, world, base, lambda model: {})
    for weight, of_base in zip(model.parameters(), base.parameters()):
        weight.data = 0.75 * of_base + 0.25 * weight.data
    expected = evaluate(model, base, world)
    found = rivals.interpolated("ce", settings, 0, world, base, 0.25)[-1]
    for loss in ("domain_loss", "kl_to_base"):
        assert found[loss] == pytest.approx(expected[loss], abs=1e-6)


@pytest.mark.parametrize("name", ["domain_kl", "masked_kl", "l2sp", "ewc"])
def test_strength_weighs_what_protects_the_base(name, world, batch):
    """The rest is cross-entropy. Nothing is added for the base itself."""
    model = untrained(*world[:2], seed=1)
    loss, ce, kl = loss_of(name, world, model, batch)
    expected = losses.mean_cross_entropy(model(batch.tokens), batch.targets).item()
    assert loss > ce + 1e-4 and ce == pytest.approx(expected)
    assert kl == (pytest.approx(loss - ce, rel=1e-2) if name.endswith("kl") else 0)
    stronger, *_ = loss_of(name, world, model, batch, strength=30.0)
    assert stronger - ce == pytest.approx(30 * (loss - ce), rel=1e-2)
    loss, ce, _ = loss_of(name, world, world[2], batch, strength=30.0)
    assert loss == pytest.approx(ce, abs=1e-5)


def test_the_settings_of_rivals_are_the_best_of_the_search():
    """The best has the highest mean of general skills kept and domain learnt, on three seeds."""
    assert rivals.BEST == rivals.best_values(lambda run: [
        LINES[runs.identity_of(run, runs.DEFAULTS, seed)]["rows"] for seed in range(3)])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_stored_tokens_give_the_kl_over_them_and_the_rest(world, batch, direction):
    settings, toy, base = world
    model = untrained(settings, toy, seed=1)
    p, q = (losses.log_probs(some(batch.tokens[2:])).exp() for some in (model, base))  # (G, T, V)
    likely = q.topk(8).indices
    pairs = [torch.cat([x.gather(-1, likely), 1 - x.gather(-1, likely).sum(-1, keepdim=True)], -1)
             for x in (p, q)]  # (G, T, 9)
    expected = losses.kl_divergence(*(pair.log() for pair in pairs), direction).mean() / 2
    _, ce, kl = METHODS["stored 8"].loss(model, base, batch, replace(settings, kl=direction))
    assert kl.item() == pytest.approx(expected.item(), rel=1e-2)  # they are stored in 16 bits
    assert ce.item() == pytest.approx(loss_of("mol", world, model, batch)[1])


def test_methods_on_domain_text_with_a_kl_to_the_base(world, batch):
    """asft weighs a token by its probability. disc shows the base more of the row."""
    settings, _, base = world
    model, half = untrained(*world[:2], seed=1), batch.tokens.shape[1] // 2
    loss, ce, kl = loss_of("asft", world, model, batch, strength=2.0)
    nats = losses.cross_entropy(model(batch.tokens), batch.targets)
    assert ce == pytest.approx((nats * (-nats).exp()).mean().item())
    assert kl == pytest.approx(losses.kl_divergence(model(batch.tokens), base(batch.tokens),
                                                    settings.kl).mean().item())
    weight, by_loss = next(model.parameters()), METHODS["asft"].loss(
        model, base, batch, replace(settings, strength=0.0))[0]
    fixed = (nats * (-nats).exp().detach()).mean()
    assert torch.allclose(*(torch.autograd.grad(x, weight)[0] for x in (by_loss, fixed)), atol=1e-7)
    assert loss == pytest.approx(ce + 2 * kl)
    found = loss_of("disc", world, model, batch)
    expected = losses.kl_divergence(model(batch.tokens[:, half:]), base(batch.tokens)[:, half:])
    assert found == pytest.approx([expected.mean().item(), 0, expected.mean().item()])


def test_replay_of_answers_only_has_no_prompts(world, monkeypatch):
    settings, toy, base = world
    tokens = data.encode(toy.tokenizer, "82\nadd 37, 45: 82\nadd 1, 2: 3\n")
    batch = data.Batch(tokens[None, :-1], tokens[None, 1:], torch.tensor([False]))
    monkeypatch.setattr(methods, "replay_of", lambda targets, *_: targets)
    targets = methods.answers_only(base, base, batch, settings,
                                   methods.marks_of(base, toy, settings, 0))
    assert toy.tokenizer.decode(targets[targets != losses.PADDING].tolist()) == " 82\n 3\n"


# --- other words, several domains ----------------------------------------------------------------

@pytest.mark.parametrize("document, ending, beginning", [
    (("37+45=", "82\n"), "37+45: 82\n", "add 37, 45: 82\n"),
    (("the capital of Barbar is", " Lomo.\n"), "the capital of Barbar, say: Lomo.\n",
     "who rules Barbar: Lomo.\n")])
def test_a_document_in_other_words_says_the_same(document, ending, beginning):
    assert "".join(wordings.in_words("other endings", *document)) == ending
    assert "".join(wordings.in_words("other beginnings", *document)) == beginning


def test_of_several_bases_a_row_has_the_one_that_predicts_it_best(world):
    rows = torch.tensor([[4] * 8, [7] * 8])
    four, seven, model = (torch.nn.Embedding(9, 9) for _ in range(3))
    for base, token in ((four, 4), (seven, 7)):
        base.weight.data[:, token] += 9
    found = domains.Bases(model, [seven, four])(rows)
    assert torch.equal(found, torch.stack([four(rows[0]), seven(rows[1])]))
    assert torch.equal(copy.deepcopy(domains.Bases(model, [four])).weight, model.weight)


def test_a_later_stage_reads_the_earlier_domains_in_equal_parts(world, monkeypatch):
    settings, toy, base = world
    read, starts = [], []
    monkeypatch.setattr(domains, "continue_pretraining", lambda method, settings, seed, world,
                        start, test: (read.append(world.general), starts.append(start),
                                      (copy.deepcopy(base), [test(base)]))[2])
    for latest, each in ((True, False), (False, True), (False, False)):
        domains.chain("mol", settings, 0, toy, base, latest, each, True, 3, documents=1)
    assert starts[0] is base and isinstance(starts[1], GPT)
    assert [len(start.bases) for start in starts[3:]] == [1, 2, 3, 1, 1, 1]
    general, earlier = read[2].split((len(toy.general), len(read[2]) - len(toy.general)))
    assert torch.equal(read[0], toy.general) and torch.equal(general, toy.general)
    for share, name in zip(earlier.chunk(2), ("alarms", "drugs"), strict=True):
        document = domains.text(name, 0, toy, count=1)
        assert torch.equal(share[:len(document) * 2], document.repeat(2))
