"""What OpenAI's own client gets from `moec serve`, and that it is what the engine says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from _serving import Server, serving

from moeruntime import Engine, Output, Request, SamplingParams

KEY = "a-key-for-the-tests"
PROMPT = "Tom has 3 apples and buys 4 more."
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def server(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    with serving(pack, "--device", "cpu", "--api-key-file", str(key)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def engine(pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(pack, device="cpu") as loaded:
        yield loaded


def ask(engine: Engine, prompt: Any, **params: Any) -> Output:
    (output,) = engine.generate([Request("math", prompt, SamplingParams(**params))])
    return output


def complete(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "math", "prompt": PROMPT, "temperature": 0, "max_tokens": 8} | options
    return client.completions.create(**options)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "python", "math", "shell"]
    assert client.models.retrieve("math").id == "math"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    answer, expected = complete(client), ask(engine, PROMPT, max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_a_stream_brings_the_same_text_and_then_usage(
    client: openai.OpenAI, engine: Engine
) -> None:
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    expected = ask(engine, PROMPT, max_tokens=8)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert len(chunks) > 4, "token by token"


def test_prompts_of_token_ids_and_several_at_once(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenize(Request("math", PROMPT))
    answer = complete(client, prompt=[ids, ids[:4]], n=2, temperature=0)
    expected = [ask(engine, one, max_tokens=8).text for one in (ids, ids, ids[:4], ids[:4])]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(ids) + 4


def test_a_seed_repeats_and_its_choices_differ(client: openai.OpenAI) -> None:
    first, again = (complete(client, temperature=1.5, seed=-7, n=3) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3


def test_stop_ends_before_the_text(client: openai.OpenAI, engine: Engine) -> None:
    whole = ask(engine, PROMPT, max_tokens=8).text
    word = whole.split()[2]
    answer = complete(client, stop=word)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(word)]


def test_log_probabilities_with_the_prompt_echoed(client: openai.OpenAI, engine: Engine) -> None:
    expected = ask(engine, PROMPT, max_tokens=3, logprobs=2, prompt_logprobs=2)
    (choice,) = complete(client, max_tokens=3, logprobs=2, echo=True).choices
    assert choice.text == PROMPT + expected.text
    found = choice.logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(
        [one.logprob for one in (*expected.prompt_logprobs, *expected.logprobs)], abs=1e-4
    )
    special = 1  # the tokenizer puts <s> first, which is no text
    assert "".join(found.tokens[special:]) == choice.text
    for token, offset in zip(found.tokens[special:], found.text_offset[special:], strict=True):
        assert choice.text[offset:].startswith(token)
    assert all(len(top) == 2 for top in found.top_logprobs[1:])
    streamed = list(complete(client, max_tokens=3, logprobs=2, echo=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [at for part in parts for at in part.text_offset] == found.text_offset
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_offsets_count_characters_though_they_are_several_tokens(client: openai.OpenAI) -> None:
    prompt = "日本 x 👍 y"
    (choice,) = complete(client, prompt=prompt, max_tokens=1, logprobs=0, echo=True).choices
    found = choice.logprobs
    assert found.text_offset == sorted(found.text_offset)
    whole = [
        (token, offset)
        for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True)
        if "\N{REPLACEMENT CHARACTER}" not in token
    ]
    assert 3 <= len(whole) < len(found.tokens) - 4
    for token, offset in whole:
        assert choice.text[offset:].startswith(token)


def test_a_prompt_that_fills_the_context_can_be_scored(client: openai.OpenAI) -> None:
    ids = [5] * 2048
    answer = complete(client, prompt=ids, max_tokens=0, logprobs=0, echo=True)
    assert len(answer.choices[0].logprobs.token_logprobs) == len(ids)
    with pytest.raises(openai.BadRequestError, match="no room in the context"):
        complete(client, prompt=ids, max_tokens=1)


def test_a_prompt_alone_can_be_scored(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=0, logprobs=0, echo=True)
    (choice,) = answer.choices
    assert choice.text == PROMPT and answer.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens


def test_chat_in_one_piece_and_streamed(client: openai.OpenAI, engine: Engine) -> None:
    options: dict[str, Any] = {"model": "math", "messages": CHAT, "temperature": 0}
    expected = ask(engine, CHAT, max_tokens=6)
    whole = client.chat.completions.create(**options, max_completion_tokens=6, n=2)
    assert [choice.message.content for choice in whole.choices] == [expected.text] * 2
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]
    options["messages"] = [{"role": "user", "content": parts}]
    chunks = list(client.chat.completions.create(**options, max_tokens=6, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_bytes_of_tokens_join_to_characters(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="math", messages=CHAT, temperature=4, seed=3, max_tokens=60, logprobs=True
    )
    content = answer.choices[0].logprobs.content
    joined = b"".join(bytes(one.bytes) for one in content).decode(errors="replace")
    assert joined.strip().startswith(answer.choices[0].message.content.strip()[:40])
    assert any(bytes(one.bytes) != one.token.encode() for one in content), "half a character"


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="math", messages=CHAT, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert (
        "".join(one.token for one in content).strip() == answer.choices[0].message.content.strip()
    )
    for one in content:
        assert bytes(one.bytes).decode() == one.token
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)
        assert len(one.top_logprobs) == 2


def test_tokens_of_texts_and_chats(server: Server, engine: Engine) -> None:
    for asked, prompt in (({"prompt": PROMPT}, PROMPT), ({"messages": CHAT}, CHAT)):
        answer = server.post("/tokenize", {"model": "math", **asked}, authorization=f"Bearer {KEY}")
        ids = engine.tokenize(Request("math", prompt))
        assert answer.json == {"tokens": ids, "count": len(ids), "max_model_len": 2048}


def test_errors_have_the_shape_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        complete(client, model="nobody")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        complete(client, temperature=-1)
    assert bad.value.type == "invalid_request_error" and bad.value.param == "temperature"
    other = openai.OpenAI(base_url=client.base_url, api_key="another-key", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        complete(other)


def test_metrics_have_names_that_dashboards_of_vllm_know(server: Server) -> None:
    """From the start: a rate of what was never counted is unknown, not 0."""
    text = server.get("/metrics", authorization=f"Bearer {KEY}").body.decode()
    for name in (
        "moec:num_requests_running",
        "moec:num_requests_waiting",
        "moec:kv_cache_usage_perc",
        "moec:prompt_tokens_total",
        "moec:generation_tokens_total",
        "moec:time_to_first_token_seconds_bucket",
        "moec:inter_token_latency_seconds_bucket",
        "moec:e2e_request_latency_seconds_bucket",
        "moec:request_success_total",
        "moec:request_rejected_total",
        "moec:activations_total",
    ):
        assert f"\n{name}" in text, name


@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/v1/models", "/tokenize", "/nothing"])
def test_everything_but_health_wants_the_key(server: Server, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic OndyaW5n"}):
        answer = server.send("POST" if path == "/tokenize" else "GET", path, None, headers)
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert server.get("/health/live").status == server.get("/health/ready").status == 200


def test_a_browser_may_give_the_key_as_a_password_to_look_but_not_to_act(server: Server) -> None:
    import base64

    basic = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
    page = server.get("/", authorization=basic)
    assert page.status == 200 and b"<title>moec</title>" in page.body
    assert "sha256-" in page.headers["content-security-policy"]
    assert server.get("/stats", authorization=basic).json["state"] == "ready"
    assert server.post("/tokenize", {}, authorization=basic).status == 401
