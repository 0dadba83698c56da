"""The page of a run in a real browser: what it shows is what the run computed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import data
import eval as testing
import losses
import train
from plots import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
AT = "#row=1&token=7&step="  # the first digit of the answer in 36+21=47


def show(path, fragment, folder):
    """The page as the browser draws it, as HTML."""
    if not BROWSER:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no browser: install chromium")
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=5000 --dump-dom".split()
    dom = subprocess.run([BROWSER, *flags, f"--user-data-dir={folder}", path.as_uri() + fragment],
                         capture_output=True, text=True, timeout=120).stdout
    assert "data-error" not in dom and '<td title="' in dom, dom[-300:]  # drawn to its end
    return dom


def content(path):  # the numbers in the page
    return json.loads(re.search('id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def pushes_in(dom):
    """-> {flag: [push, ...]}, in the order of the page."""
    return {flag: list(map(float, re.findall(f'title="{flag} row: push “.*?” by (.*?)"', dom)))
            for flag in ("general", "domain")}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    train.main(f"--out {folder} --strength 2 --steps 12 --eval-every 6 --base-steps 30 --n-embd 32"
               .split())
    return folder


@pytest.mark.parametrize("step", [0, 6, 12])
def test_answers_are_those_of_the_metrics(out, tmp_path, step):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    methods, shown = zip(*re.findall(r'<td style="--colour: var\(--(\w+)\);?">(\d+)%',
                                     show(out / "page.html", f"#step={step}", tmp_path)))
    rows = [row for row in rows if row["method"] == "base" or row["step"] == step]
    expected = [100 * row["accuracy"][skill] for skill in rows[0]["accuracy"] for row in rows]
    assert methods == ("base", "ce", "replay", "mol") * 4
    assert list(map(int, shown)) == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("kl", ["reverse", "forward", "mean"])
def test_pushes_are_those_of_autograd(out, tmp_path, kl):
    tokens = torch.tensor([content(out / "page.html")["rows"][0][2]])  # 36+21=47
    model, base = (testing.load_model(out / f"seed0/{name}.pt") for name in ("mol", "base"))
    logits, base_logits = model(tokens[:, :-1]).detach().requires_grad_(), base(tokens[:, :-1])
    p, p_0 = (losses.log_probs(each)[0, 6].exp() for each in (logits, base_logits))
    likely = [id for q in (p, p_0) for id in q.topk(5)[1].tolist() if max(p[id], p_0[id]) > 0.01]
    shown = sorted({tokens[0, 7].item(), *likely}, key=lambda id: -p_0[id].item())
    pushes = pushes_in(show(out / "page.html", f"{AT}12&method=mol&kl={kl}", tmp_path))
    for flag, loss in (("general", 2 * losses.kl_divergence(logits, base_logits, kl)),
                       ("domain", losses.cross_entropy(logits, tokens[:, 1:]))):
        push, = torch.autograd.grad(-loss[0, 6], logits)
        assert pushes[flag] == pytest.approx(push[0, 6, shown].tolist(), abs=2e-3)


def test_the_flag_switches_the_loss_and_its_push(out, tmp_path):
    for flag, loss in (("general", "KL"), ("domain", "CE")):
        dom = show(out / "page.html", f"{AT}0&method=mol&flag={flag}", tmp_path)
        assert f'class="chosen"><th scope="row">push by {loss} ({flag})' in dom
        pushes = pushes_in(dom)
        assert not any(pushes["general"]) and max(pushes["domain"]) > 0.5  # KL at step 0: nowhere
    ce, replay = (pushes_in(show(out / "page.html", f"{AT}12&method={name}", tmp_path))
                  for name in ("ce", "replay"))
    assert not any(ce["general"]) and any(ce["domain"]) and replay["general"] == replay["domain"]


def test_page_has_the_early_steps_and_the_answers_of_eval(out):
    seen, model = content(out / "page.html"), testing.load_model(out / "seed0/replay.pt")
    given = [testing.answer(model, data.toy_world(0), prompt) for _, prompt, _ in seen["questions"]]
    assert seen["steps"] == [0, 2, 5, 6, 10, 12] and seen["models"]["replay"][-1][0] == given


def test_hostile_text_is_shown_as_it_is(tmp_path):
    hostile = "</script><script>document.title='bad'</script> \"'&amp; DATA <!-- \\u003c ${1} "
    for name in ("general", "domain"):
        (tmp_path / name).write_text("".join(f"{hostile}{i} {name}\n" for i in range(300)))
    train.main(f"--out {tmp_path}/out --general {tmp_path}/general --domain {tmp_path}/domain "
               "--methods mol --steps 16 --eval-every 1 --base-steps 9 --n-embd 32".split())
    dom = show(tmp_path / "out/page.html", "", tmp_path / "browser")
    assert dom.count("<script") == 2 and dom.count("<option") == 12 and " nats<svg" in dom
    assert "<title>What" in dom and "&lt;script&gt;document.title='bad'&lt;/script&gt;" in dom


def test_committed_page_is_of_the_present_template():
    folder = Path(page.__file__).parent
    before, after = (folder / "page_template.html").read_text("utf-8").split("DATA")
    text = (folder / "page.html").read_text("utf-8")
    assert text.startswith(before) and text.endswith(after) and len(text) < 700_000
