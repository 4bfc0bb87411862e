"""``dllm-fast serve``, asked by OpenAI's own client: what it answers, and the page."""

import threading

import pytest
from browser import CHROMIUM, Browser

import dllm_fast
from dllm_fast.decoding.text import answer_text

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
serving = pytest.importorskip("serving", reason="the extra serve is not installed", exc_type=ImportError)

NAME, PROMPT, OTHER, OPTIONS = serving.NAME, serving.PROMPT, serving.OTHER, serving.OPTIONS
SLOW, expected = serving.SLOW, serving.expected
running, local, client, left_idle = serving.running, serving.local, serving.client, serving.left_idle

CASES = {
    "default": ({}, {}),
    "drawn": ({"temperature": 1.0, "seed": 5, "n": 3}, {"temperature": 1.0, "seed": 5, "rows": 3}),
    "options": (
        {"max_tokens": 40, "extra_body": {"block_length": 8, "schedule": "uniform=10", "cache": "prefix"}},
        {"gen_length": 40, "block_length": 8, "schedule": dllm_fast.Uniform(10), "cache": "prefix"},
    ),
    "policies": (
        {"extra_body": {"refresh": "window=13,4", "remask": "verify=0.5", "confidence": "margin", "cfg_scale": 0.5}},
        {"refresh": dllm_fast.Window(13, 4), "remask": dllm_fast.Verify(0.5), "confidence": "margin", "cfg_scale": 0.5},
    ),
    "likely": (
        {"temperature": 1.0, "seed": 5, "top_p": 0.5, "extra_body": {"top_k": 4}},
        {"temperature": 1.0, "seed": 5, "top_p": 0.5, "top_k": 4},
    ),
    "no end": ({"extra_body": {"eos_id": []}}, {"eos_id": []}),
    "two ends": ({"extra_body": {"eos_id": [1, 9]}}, {"eos_id": [1, 9]}),
    "drafted": ({"extra_body": {"speculate": 3, "schedule": "uniform=52"}}, {"schedule": dllm_fast.Uniform(52)}),
}


@pytest.mark.parametrize("asked, options", CASES.values(), ids=CASES)
def test_the_text_is_that_of_generate(client, local, asked, options):
    texts, out = expected(local, **options)
    reply = client.completions.create(model=NAME, prompt=PROMPT, **asked)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == list(range(len(texts)))
    if "speculate" not in asked.get("extra_body", {}):  # which takes fewer forwards
        assert reply.usage.nfe == sum(out.row_nfe)
    streamed = [""] * len(texts)
    for chunk in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_several_prompts_and_ids_are_rows_of_a_batch(client, local):
    model, tokenizer = local
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, OTHER)]
    reply = client.completions.create(model=NAME, prompt=prompts, n=2, temperature=1.0, seed=3)
    doubled = [prompts[0], prompts[0], prompts[1], prompts[1]]
    eos_ids = [tokenizer.eos_token_id]
    done = dllm_fast.generate_many(model, doubled, **OPTIONS, temperature=1.0, seed=3, eos_id=eos_ids)
    rows = [(row.sequence.tolist()[len(ids) :], ids) for row, ids in zip(done, doubled, strict=True)]
    assert [choice.text for choice in reply.choices] == [answer_text(tokenizer, ids, eos_ids) for ids, _ in rows]
    assert reply.usage.prompt_tokens == sum(map(len, doubled))


def test_without_a_seed_answers_are_drawn_anew(client):
    texts = {client.completions.create(model=NAME, prompt=OTHER, temperature=2.0).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_chat_streams_blocks_and_usage(client, local):
    texts, out = expected(local)
    asked = {"model": NAME, "messages": [{"role": "user", "content": PROMPT.rstrip("\n")}]}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == texts[0] and whole.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:].rstrip("\n")}]
    asked["messages"] = [{"role": "user", "content": parts}]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == texts[0] and len(pieces) == 4
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None, None, None, "stop"]
    assert not last.choices and last.usage.model_extra == whole.usage.model_extra
    assert last.usage.nfe == out.nfe
    assert last.usage.tokens_per_forward == round(last.usage.completion_tokens / out.nfe, 3)
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_drafts_are_steps_of_the_live_block(client, local):
    tokenizer = local[1]
    asked = {"max_tokens": 12, "extra_body": {"drafts": True, "schedule": "uniform=6", "block_length": 6, "eos_id": []}}
    drafts, text = [], ""
    for chunk in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **asked):
        if (draft := getattr(chunk.choices[0], "draft", None)) is not None:
            drafts.append(draft)
            assert chunk.choices[0].text == ""
        text += chunk.choices[0].text
    assert [draft.count(None) for draft in drafts] == [4, 2, 0] * 2
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(drafts[2] + drafts[5]) == text and len(ids) == 12


@pytest.mark.parametrize("stop", [" wolves", [" taught by", "never there"], ["."]], ids=str)
def test_a_stop_string_ends_the_answer_before_it(client, local, stop):
    stops = [stop] if isinstance(stop, str) else stop
    (text,), _ = expected(local, until=stops)
    reply = client.completions.create(model=NAME, prompt=PROMPT, stop=stop)
    assert reply.choices[0].text == text and reply.choices[0].finish_reason == "stop"
    size = len(local[1](text + stops[0], add_special_tokens=False).input_ids)
    assert reply.usage.completion_tokens == size
    pieces = client.completions.create(model=NAME, prompt=PROMPT, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == text


def test_lengths_are_cut_to_what_was_asked_for(client, local):
    texts, _ = expected(local, gen_length=13)
    reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5)
    assert reply.usage.completion_tokens == 5 and texts[0].startswith(reply.choices[0].text)
    assert reply.choices[0].finish_reason == "length"


def test_requests_at_the_same_time_get_their_own_tokens(client, local, running):
    """More than there are seats, of different lengths and seeds, some with other options."""
    cases = [{"temperature": 1.0 * (n % 3 > 0), "seed": n % 2, "max_tokens": 13 * (1 + n % 4)} for n in range(24)]
    found = [None] * len(cases)

    def ask(n):
        reply = client.completions.create(model=NAME, prompt=(PROMPT, OTHER)[n % 2], **cases[n])
        found[n] = reply.choices[0].text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, case in enumerate(cases):
        options = {"gen_length": case["max_tokens"], "temperature": case["temperature"], "seed": case["seed"]}
        assert [found[n]] == expected(local, (PROMPT, OTHER)[n % 2], **options)[0]


def test_a_short_request_takes_a_seat_while_a_long_one_runs(client, running):
    stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, **SLOW)
    next(iter(stream))
    client.completions.create(model=NAME, prompt=OTHER)
    running.until(lambda: running.gate.rows == 1)  # the long one is still there
    stream.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_shows_text_as_it_un_masks(running, local, tmp_path):
    (text,), out = expected(local, schedule=dllm_fast.Uniform(52))
    browser = Browser(str(tmp_path))
    try:
        browser.call("Page.navigate", url=running.url)
        browser.until("document.getElementById('status')?.textContent.includes('API key')")
        fields = {"prompt": PROMPT, "key": serving.KEY, "max_tokens": 52, "block_length": 13, "schedule": "uniform=52"}
        for name, value in fields.items():
            browser.see(f"document.getElementById({name!r}).value = {value!r}")
        browser.see("""window.masks = [];
            new MutationObserver(() => masks.push(document.querySelectorAll('.mask').length))
                .observe(document.getElementById('answer'), {childList: true});
            document.getElementById('run').click()""")
        browser.until("document.getElementById('status').textContent.includes('forwards')")
        assert browser.see("document.getElementById('answer').textContent") == text
        assert f"in {out.nfe} forwards" in browser.see("document.getElementById('status').textContent")
        masks = browser.see("masks")
        assert set(range(1, 13)) <= set(masks) and masks[-1] == 0
        assert browser.picture().startswith(b"\x89PNG")
        browser.see("document.getElementById('schedule').value = 'magic'; document.getElementById('run').click()")
        browser.until("document.getElementById('status').className == 'error'")
        assert "schedule: 'magic' is none of" in browser.see("document.getElementById('status').textContent")
    finally:
        browser.close()
