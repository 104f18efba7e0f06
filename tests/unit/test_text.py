"""Tokens to text, and chat templates from strangers."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from moeruntime import text as text_module
from moeruntime.errors import RequestError, TokenizerError
from moeruntime.pack import Pack
from moeruntime.text import MAX_PROMPT_CHARACTERS, ChatTemplates, TextStream, VariantText
from runtime_fixtures import EXAMPLES, texts

TOKENIZER = Tokenizer.from_file(str(EXAMPLES / "checkpoints" / "mini-base" / "tokenizer.json"))
VOCAB_SIZE = TOKENIZER.get_vocab_size()
MULTIBYTE = [
    "日本語のテキストと漢字、それから 中文字符。",
    "naïve café — “quotes” … ½",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇨🇭, e\u0301 combining",
    "Ω≈ç√∫≤≥÷ Ελληνικά עברית العربية हिन्दी",
    "  leading\n\n\ttabs and  spaces  \n",
    "mixed 漢a字b👍c",
    "\u0000\u0001\u007f\u0085 control characters",
    "a real \N{REPLACEMENT CHARACTER} in the text, and at its end \N{REPLACEMENT CHARACTER}",
]


def sentencepiece() -> Tokenizer:
    """A tokenizer as Mixtral has it: words begin with a mark, bytes stand for rare characters."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", *map(chr, range(33, 127)), "\u2581T", "\u2581To", "\u2581Tom", "\u2581h"]
    vocab = {name: idx for idx, name in enumerate(names)}
    merges = [("\u2581", "T"), ("\u2581T", "o"), ("\u2581To", "m"), ("\u2581", "h")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


SENTENCEPIECE = sentencepiece()


def run(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str]]:
    """Push until it stops, as the engine does, and finish."""
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream, pieces


# -- detokenisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", ["Tom has the  hat", "Tom", *MULTIBYTE[:5]])
def test_an_answer_goes_on_where_the_prompt_ends(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    for cut in range(len(ids)):
        # Half a character is no text: the answer has all of it.
        prompts = [tokenizer.decode(ids[:whole]) for whole in range(cut + 1)]
        prompt = [one for one in prompts if not one.endswith("\N{REPLACEMENT CHARACTER}")][-1]
        stream = TextStream(tokenizer, (), ids[:cut])
        pieces = [stream.push(token) for token in ids[cut:]]
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text
        assert prompt + stream.text == text


def test_an_answer_that_does_not_go_on_begins_without_a_space() -> None:
    stream = TextStream(SENTENCEPIECE, ())
    for token in SENTENCEPIECE.encode("Tom has").ids:
        stream.push(token)
    assert stream.text == "Tom has"
    assert TextStream(SENTENCEPIECE, (), SENTENCEPIECE.encode("Tom").ids).finish() == ""


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", MULTIBYTE[:6])
def test_bytes_of_tokens_join_to_the_text(tokenizer: Tokenizer, text: str, pack: Path) -> None:
    variant = VariantText(Pack(pack), "base")
    variant._tokenizer = tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(variant.token_bytes(token) for token in ids).decode()
    assert joined.removeprefix("" if tokenizer is TOKENIZER else " ") == text


@pytest.mark.parametrize("text", MULTIBYTE)
def test_multibyte_text_comes_out_whole(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert len(ids) > 5
    stream, _ = run(ids)
    assert stream.text == TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("name", ["english", "tldr", "python", "math"])
def test_documents_come_out_as_a_full_decode_does(name: str) -> None:
    for text in texts(name)[:10]:
        ids = TOKENIZER.encode(text).ids[:400]
        stream, _ = run(ids)
        assert stream.text == TOKENIZER.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_any_tokens_come_out_as_a_full_decode_does(ids: list[int]) -> None:
    stream, _ = run(ids)
    assert stream.text == TOKENIZER.decode(ids)


BYTE_IDS = [
    token
    for token in range(VOCAB_SIZE)
    if len(TOKENIZER.id_to_token(token)) == 1 and not TOKENIZER.id_to_token(token).isascii()
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(BYTE_IDS), min_size=1, max_size=30))
def test_broken_utf8_comes_out_as_a_full_decode_does(ids: list[int]) -> None:
    stream, _ = run(ids)
    assert stream.text == TOKENIZER.decode(ids)


def test_half_a_character_is_never_shown() -> None:
    ids = TOKENIZER.encode("字👍漢", add_special_tokens=False).ids
    assert len(ids) > 3, "these characters must take several tokens each"
    stream, pieces = run(ids)
    assert "" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert stream.text == "字👍漢"


def test_what_ends_in_half_a_character_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("ok 👍", add_special_tokens=False).ids[:-1]
    stream, pieces = run(ids)
    assert stream.text == TOKENIZER.decode(ids)
    assert stream.text.startswith("ok ")
    assert pieces[-1] != ""


def test_special_tokens_have_no_text() -> None:
    inner = TOKENIZER.encode("hello", add_special_tokens=False).ids
    stream, _ = run([1, *inner, 6, *inner, 2])
    assert stream.text == "hellohello"


# -- stop strings --------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("one",), ""),
        ("one two three", ("three",), "one two "),
        ("one two three", ("four",), "one two three"),
        ("one two three", ("three!",), "one two three"),
        ("one two three", ("three", "two"), "one "),
        ("aaaaab", ("aab",), "aaa"),
        ("x\n\nHuman: y", ("\n\nHuman:",), "x"),
        ("日本語の文", ("語",), "日本"),
        ("a 👩‍👩‍👧 b", ("👩‍👧",), "a 👩‍"),
        ("end.", (".",), "end"),
    ],
)
def test_text_ends_before_a_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    stream, pieces = run(encode(text), stop)
    assert stream.text == expected
    assert stream.stopped == (expected != text)
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown), "part of a stop string was shown"


def test_after_a_stop_nothing_more_is_shown() -> None:
    stream = TextStream(TOKENIZER, (" two",))
    for token in encode("one two three four"):
        stream.push(token)
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "one"


def test_stop_strings_across_any_token_borders_never_leak() -> None:
    rng = random.Random(0)
    documents = [*MULTIBYTE, *(text[:300] for text in texts("tldr")[:40])]
    num_stopped = 0
    for text in documents * 4:
        start = rng.randrange(max(1, len(text) - 12))
        stop = text[start : start + rng.randint(1, 12)]
        # Cut the text anywhere, so that token borders fall inside the stop string.
        cut = rng.randint(start, min(len(text), start + len(stop)))
        ids = encode(text[:cut]) + encode(text[cut:])
        stream, pieces = run(ids, (stop,))
        full = TOKENIZER.decode(ids)
        at = full.find(stop)
        if at >= 0:
            num_stopped += 1
            assert stream.stopped
            assert stream.text == full[:at]
        else:
            assert stream.text == full
        assert stop not in "".join(pieces)
    assert num_stopped > 100


def test_of_several_stop_strings_none_leaks() -> None:
    rng = random.Random(1)
    for document in texts("english")[:25]:
        text = document[:400]
        starts = [rng.randrange(len(text) - 8) for _ in range(4)]
        stop = tuple(text[at : at + rng.randint(1, 8)] for at in starts)
        stream, _ = run(encode(text), stop)
        assert stream.stopped
        assert not any(one in stream.text for one in stop)
        assert text.startswith(stream.text)
        assert text[len(stream.text) :].startswith(stop)


# -- a variant's text ----------------------------------------------------------------------------


@pytest.fixture
def source(pack: Path) -> Iterator[Pack]:
    with Pack(pack) as opened:
        yield opened


@pytest.fixture
def templates() -> Iterator[ChatTemplates]:
    worker = ChatTemplates()
    yield worker
    worker.close()


CONVERSATION = [
    {"role": "user", "content": "list all files, größer als 1 MB: 漢字 {{ 7 * 7 }} <b>&"},
    {"role": "assistant", "content": "ls"},
    {"role": "user", "content": "and hidden ones?"},
]


@pytest.mark.parametrize("name", ["math", "shell"])
def test_chats_are_encoded_as_transformers_does(
    source: Pack, templates: ChatTemplates, checkpoints: dict[str, Path], name: str
) -> None:
    reference = AutoTokenizer.from_pretrained(checkpoints[name])
    for messages in (CONVERSATION[:1], CONVERSATION):
        expected = reference.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        expected_ids = reference(expected, add_special_tokens=False)["input_ids"]
        assert VariantText(source, name).encode_chat(messages, templates) == expected_ids


@pytest.mark.parametrize("name", ["base", "python", "math", "shell"])
def test_plain_text_is_encoded_as_transformers_does(
    source: Pack, checkpoints: dict[str, Path], name: str
) -> None:
    reference = AutoTokenizer.from_pretrained(checkpoints[name])
    text = VariantText(source, name)
    for prompt in ("def f(x):\n    return", "", MULTIBYTE[0]):
        assert text.encode(prompt) == reference(prompt)["input_ids"]
        assert text.encode_document(prompt) == [*text.encode(prompt), reference.eos_token_id]


def test_a_variant_without_a_template_says_so(source: Pack, templates: ChatTemplates) -> None:
    with pytest.raises(TokenizerError, match="variant 'base' has no chat template; send a plain"):
        VariantText(source, "base").encode_chat(CONVERSATION, templates)


def test_prompts_that_are_not_text_or_too_long(source: Pack) -> None:
    text = VariantText(source, "base")
    with pytest.raises(RequestError, match="lone surrogate"):
        text.encode("broken \ud83d emoji")
    with pytest.raises(RequestError, match="prompt of 4194305 characters"):
        text.encode("a" * (MAX_PROMPT_CHARACTERS + 1))


# -- templates from strangers --------------------------------------------------------------------


def test_templates_see_messages_and_special_tokens(templates: ChatTemplates) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "[{{ m.content | trim }}]{% endfor %}{{ messages | tojson }}"
    )
    values = {"bos_token": "<s>", "messages": [{"role": "a", "content": " é<&> "}]}
    expected = '<s>[é<&>][{"role": "a", "content": " é<&> "}]'
    assert templates.render(template, values) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ self._TemplateReference__context.eval_ctx }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_the_sandbox_holds(templates: ChatTemplates, template: str) -> None:
    values: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(TokenizerError, match="chat template failed") as caught:
        templates.render(template, values)
    assert "\n" not in str(caught.value)
    assert "root:" not in str(caught.value)
    assert templates.render("{{ messages[0].role }}", values) == "user"


@pytest.mark.parametrize(
    "expression", ["''.__class__", "raise_exception.__globals__", "messages.append", "x.y"]
)
def test_what_the_sandbox_hides_prints_nothing(templates: ChatTemplates, expression: str) -> None:
    assert templates.render("{{ " + expression + " }}", {"messages": [], "x": {}}) == ""


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x' * 5000000 }}", "more than 4194304 characters"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "more than 4194304 characters"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_says_why(
    templates: ChatTemplates, template: str, complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        templates.render(template, {})
    assert templates.render("still {{ 'here' }}", {}) == "still here"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9**9999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x'*99999 %}{% set b = ('y'*99999)|list|sort %}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(
    templates: ChatTemplates, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    assert templates.render("warm", {}) == "warm"
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "RENDER_TIMEOUT_S", 0.5)
        with pytest.raises(
            TokenizerError, match=r"chat template (stopped: took over 0\.5 s|failed)"
        ):
            templates.render(template, {})
    assert templates.render("and {{ 'again' }}", {}) == "and again"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{% set x = 'a' * 10**9 %}",
        "{{ ['a'] * 10**9 }}",
        "{% set n = namespace(x='a' * 1000) %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'.ljust(10**9) }}",
    ],
)
def test_a_template_that_wants_all_memory_is_stopped(
    templates: ChatTemplates, template: str
) -> None:
    with pytest.raises(TokenizerError, match=r"memory|more than 4194304 characters"):
        templates.render(template, {})
    assert templates.render("and {{ 'again' }}", {}) == "and again"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_is_replaced(templates: ChatTemplates, how: signal.Signals) -> None:
    assert templates.render("one", {}) == "one"
    worker = templates._worker
    assert worker is not None
    os.kill(worker.pid, how)
    worker.wait()
    with pytest.raises(TokenizerError, match="chat template stopped"):
        templates.render("two", {})
    assert templates.render("three", {}) == "three"


def test_a_large_chat_passes_through_the_pipes(templates: ChatTemplates) -> None:
    content = "漢字 and more " * 50_000
    values: dict[str, object] = {"messages": [{"role": "user", "content": content}]}
    assert templates.render("{{ messages[0].content }}", values) == content


def test_closing_twice_and_using_it_again(templates: ChatTemplates) -> None:
    templates.close()
    assert templates.render("x", {}) == "x"
    templates.close()
    templates.close()
    assert templates.render("y", {}) == "y"


# -- tokenizer files that lie --------------------------------------------------------------------


class Folder:
    """One variant's side files, with the rest of the source taken from a real pack."""

    def __init__(self, real: Pack, folder: Path) -> None:
        self.root, self.manifest, self._folder = folder, real.manifest, folder

    def variant_path(self, name: str, file: str) -> Path | None:
        path = self._folder / file
        return path if path.exists() else None


@pytest.fixture
def side_files(source: Pack, tmp_path: Path) -> Callable[..., Any]:
    """side_files(**{"tokenizer.json": text}): a source with these files instead."""

    def make(**files: str) -> Folder:
        path = source.variant_path("base", "tokenizer.json")
        assert path is not None
        for name, content in {"tokenizer.json": path.read_text(encoding="utf-8"), **files}.items():
            if content:
                (tmp_path / name).write_text(content, encoding="utf-8")
        return Folder(source, tmp_path)

    return make


def test_end_of_sequence_tokens_come_from_the_generation_config_first(
    side_files: Callable[..., Any],
) -> None:
    def eos(**files: str) -> frozenset[int]:
        return VariantText(side_files(**files), "base").eos_ids

    assert eos() == frozenset()
    assert eos(**{"config.json": '{"eos_token_id": 2}'}) == {2}
    assert eos(**{"generation_config.json": '{"eos_token_id": [2, 6]}'}) == {2, 6}
    assert eos(**{"generation_config.json": '{"eos_token_id": null}'}) == {2}


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", "[]", "not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Mystery"}}', "not a tokenizer"),
        ("tokenizer_config.json", "[]", "must be a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "'chat_template' is neither"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag"}]}', "'chat_template' is"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "duplicate key"),
        ("generation_config.json", '{"eos_token_id": 4096}', "'eos_token_id' is 4096"),
        ("generation_config.json", '{"eos_token_id": -1}', "'eos_token_id' is -1"),
        ("generation_config.json", '{"eos_token_id": [2, "x"]}', "'eos_token_id' holds 'x'"),
        ("generation_config.json", '{"eos_token_id": true}', "'eos_token_id' must be"),
    ],
)
def test_side_files_that_make_no_sense_are_named(
    side_files: Callable[..., Any], file: str, content: str, complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint) as caught:
        VariantText(side_files(**{file: content}), "base")
    assert file in str(caught.value)


def test_a_template_file_wins_over_the_config_and_lists_have_a_default(
    side_files: Callable[..., Any],
) -> None:
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    listed = json.dumps({"chat_template": templates})
    assert VariantText(side_files(**{"tokenizer_config.json": listed}), "base").chat_template == "d"
    both = side_files(**{"tokenizer_config.json": listed, "chat_template.jinja": "file"})
    assert VariantText(both, "base").chat_template == "file"


def test_without_a_tokenizer_there_are_only_token_ids(source: Pack, tmp_path: Path) -> None:
    text = VariantText(Folder(source, tmp_path), "base")  # type: ignore[arg-type]
    for call in (lambda: text.encode("x"), lambda: text.stream(("x",)), lambda: text.tokenizer):
        with pytest.raises(TokenizerError, match="it takes prompts of token ids"):
            call()
    stream = text.stream(())
    assert (stream.push(5), stream.push(7), stream.finish(), stream.text) == ("", "", "", "")
