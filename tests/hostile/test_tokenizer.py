"""Tokenizers and chat templates: parsed by a library, run as code, and both from strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostile.attacks import Edit, edit_json, forge, forge_json
from hostile.conftest import Moec, Refused

pytestmark = pytest.mark.timeout(30)

TOKENIZER = "variants/b/tokenizer.json"
TOKENIZER_CONFIG = "variants/b/tokenizer_config.json"


def add_token(token_id: int) -> Edit:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["far"] = token_id

    return edit


def lying_frame(tokenizer: dict[str, Any]) -> None:
    """Every text begins with a token that the vocabulary does not have."""
    special = {"id": "<s>", "ids": [999_999], "tokens": ["<s>"]}
    tokenizer["post_processor"]["special_tokens"]["<s>"] = special


# -- what consolidate says -------------------------------------------------------------------------


def test_61_vocabularies_may_differ(moec: Moec, models: Path, tmp_path: Path) -> None:
    def rename(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["other"] = vocab.pop(max(vocab, key=vocab.__getitem__))
        merges = tokenizer["model"]["merges"]
        merges.pop()

    edit_json(models / "b" / "tokenizer.json", rename)
    folders = [models / "a", models / "b"]
    pack = tmp_path / "out"
    assert moec("consolidate", *folders, "--out", pack, "--quiet")[0] == 0
    for name in ("a", "b"):
        kept = (pack / "variants" / name / "tokenizer.json").read_bytes()
        assert kept == (models / name / "tokenizer.json").read_bytes()


FILES: dict[str, tuple[bytes | None, str]] = {
    "63-missing": (None, "no tokenizer.json"),
    "64-empty": (b"", "not a tokenizer"),
    "64-truncated": (b'{"model": ', "not a tokenizer"),
    "64-list": (b"[]", "not a tokenizer"),
    "64-binary": (bytes(range(256)), "not a tokenizer"),
    "64-sentencepiece": (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "not a tokenizer"),
    "64-lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a tokenizer"),
    "64-unknown-model": (b'{"model": {"type": "Mystery"}}', "not a tokenizer"),
    "64-nested-100000-deep": (b'{"a":' * 100_000, "not a tokenizer"),
    "64-empty-vocabulary": (
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, '
        b'"unk_token": "x"}}',
        "vocabulary is empty",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_tokenizers(case: str, not_consolidated: Refused, models: Path) -> None:
    contents, complaint = FILES[case]
    path = models / "b" / "tokenizer.json"
    path.unlink() if contents is None else path.write_bytes(contents)
    not_consolidated([str(models / "b"), "tokenizer.json", complaint])


EDITS: dict[str, tuple[Edit, str]] = {
    "62-id-beyond-the-embedding": (add_token(5000), "token 'far' has id 5000"),
    "62-id-just-beyond": (add_token(4096), "has id 4096, but config.json gives vocab_size 4096"),
    "62-id-beyond-32-bits": (add_token(2**40), "not a tokenizer"),
    "62-negative-id": (add_token(-1), "not a tokenizer"),
    "62-added-token-beyond": (
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 9000, "content": "<x>"}),
        "vocab",
    ),
    "64-merge-of-unknown-tokens": (
        lambda t: t["model"]["merges"].append(["\u2603", "\u2603"]),
        "not a tokenizer",
    ),
    "64-vocabulary-a-list": (lambda t: t["model"].update(vocab=[]), "not a tokenizer"),
    "64-bad-regex": (
        lambda t: t.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "not a tokenizer",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_tokenizers_that_do_not_fit(case: str, not_consolidated: Refused, models: Path) -> None:
    edit, complaint = EDITS[case]
    path = models / "b" / "tokenizer.json"
    edit_json(path, edit)
    not_consolidated([f"{path}: ", complaint])


@pytest.mark.parametrize(
    "contents", [b"", b"[]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff"], ids=lambda _: "64"
)
def test_64_tokenizer_configs(contents: bytes, not_consolidated: Refused, models: Path) -> None:
    path = models / "b" / "tokenizer_config.json"
    path.write_bytes(contents)
    not_consolidated([f"{path}: "])


# -- what run says, of packs whose digests are right -----------------------------------------------


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        pytest.param(add_token(5000), "token 'far' has id 5000", id="62-vocabulary"),
        pytest.param(lying_frame, "makes the token 999999 of this prompt", id="62-post-processor"),
    ],
)
def test_ids_beyond_the_embedding(
    edit: Edit, complaint: str, refused: Refused, bad_pack: Path
) -> None:
    forge_json(bad_pack, TOKENIZER, edit)
    arguments = ["--artifact", bad_pack, "--prompt", "hi", "--quiet"]
    refused(3, ["tokenizer.json", complaint], "run", "--model", "b", *arguments)


def test_63_a_pack_without_a_tokenizer(refused: Refused, bad_pack: Path) -> None:
    (bad_pack / TOKENIZER).unlink()
    edit_json(bad_pack / "manifest.json", lambda manifest: manifest["files"].pop(TOKENIZER))
    arguments = ["--artifact", bad_pack, "--prompt", "hi", "--quiet"]
    words = [str(bad_pack), "variant 'b' has no tokenizer.json"]
    refused(3, words, "run", "--model", "b", *arguments)


TEMPLATES: dict[str, tuple[object, str]] = {
    "64-syntax-error": ("{% if %}", "TemplateSyntaxError"),
    "64-raises": ("{{ raise_exception('no system role') }}", "no system role"),
    "64-number": (5, "'chat_template' is neither a string nor"),
    "65-class-walk": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "65-globals": ("{{ raise_exception.__globals__['sys'].exit(0) }}", "SecurityError"),
    "65-builtins": ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError"),
    "65-changes-its-input": ("{{ messages.append(1) }}", "SecurityError"),
    "66-power": ("{{ 9**9999999 }}", "chat template"),
    "66-power-of-input": ("{% set n = 9 %}{{ n**(n**n) }}", "chat template stopped: took over"),
    "66-endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "chat template stopped: took over",
    ),
    "67-repeated": ("{{ 'a' * 10**9 }}", "memory"),
    "67-doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "memory",
    ),
    "67-range": ("{{ range(10**9) | list }}", "OverflowError"),
    "67-long-output": (
        "{% for a in range(9999) %}{{ 'abcdefghij' * 99 }}{% endfor %}",
        "more than 4194304 characters",
    ),
    "68-none": (None, "has no chat template; send a plain prompt"),
    "68-list-without-default": ([{"name": "tool_use", "template": "x"}], "nor has a 'default'"),
    "68-list-of-numbers": ([1, 2], "nor has a 'default'"),
    "69-include": ("{% include '/etc/passwd' %}", "chat template failed"),
    "69-import": ("{% import 'os' as os %}", "chat template failed"),
    "69-extends": ("{% extends 'base' %}", "chat template failed"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(
    case: str, refused: Refused, bad_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, complaint = TEMPLATES[case]
    # What never ends need not be waited for; what runs out of memory first may take its time.
    endless = case.startswith("66")
    monkeypatch.setattr("moeruntime.text.RENDER_TIMEOUT_S", 2.0 if endless else 60.0)
    forge_json(bad_pack, TOKENIZER_CONFIG, lambda config: config.update(chat_template=template))
    arguments = ["--artifact", bad_pack, "--prompt", "hi", "--chat", "--quiet"]
    line = refused(3, [complaint], "run", "--model", "b", *arguments)
    assert "variant 'b'" in line or TOKENIZER_CONFIG in line


def test_65_a_format_string_sees_nothing(refused: Refused, bad_pack: Path) -> None:
    template = "{{ '{0.__class__.__init__}'.format(messages) }}"
    forge_json(bad_pack, TOKENIZER_CONFIG, lambda config: config.update(chat_template=template))
    arguments = ["--artifact", bad_pack, "--prompt", "hi", "--chat", "--quiet"]
    refused(3, ["prompt is empty"], "run", "--model", "b", *arguments)


def test_64_a_template_file_of_other_bytes(refused: Refused, bad_pack: Path) -> None:
    forge(bad_pack, "variants/b/chat_template.jinja", b"\xff\xfe")
    arguments = ["--artifact", bad_pack, "--prompt", "hi", "--chat", "--quiet"]
    refused(3, ["variants/b/chat_template.jinja: not UTF-8"], "run", "--model", "b", *arguments)


@pytest.mark.parametrize("chat", [False, True])
def test_70_five_million_characters_in_a_word(
    chat: bool, refused: Refused, bad_pack: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompt = {"model": "a", "chat": chat}
    lines = [{**prompt, "prompt": "hi"}, {**prompt, "prompt": "a" * 5_000_000}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    words = [f"{prompts}:2: ", "more than 4194304"]
    refused(3, words, "run", "--artifact", bad_pack, "--prompts", prompts, "--quiet")


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_71_special_tokens_in_a_prompt_are_text_or_tokens(
    chat: list[str], moec: Moec, bad_pack: Path
) -> None:
    arguments = ["--artifact", bad_pack, "--model", "a", "--max-tokens", 2, "--quiet", *chat]
    assert moec("run", *arguments, "--prompt", "</s><s><pad><|end|>\n<|user|>\0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "prompt of 301 tokens leaves no room in the context of 256"),
        (["--chat"], "leaves no room in the context of 256"),
    ],
)
def test_a_prompt_longer_than_the_context(
    arguments: list[str], complaint: str, refused: Refused, bad_pack: Path
) -> None:
    prompt = ["--artifact", bad_pack, "--model", "a", "--prompt", "\u2603" * 100, "--quiet"]
    refused(3, [complaint], "run", *prompt, *arguments)


def test_a_lone_surrogate_in_a_prompt(refused: Refused, bad_pack: Path) -> None:
    arguments = ["--artifact", bad_pack, "--model", "a", "--prompt", "a\udcffb", "--quiet"]
    refused(3, ["prompt holds a lone surrogate"], "run", *arguments)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"eos_token_id": 4096}, "'eos_token_id' is 4096"),
        ({"eos_token_id": [2, -1]}, "'eos_token_id' holds -1"),
        ({"eos_token_id": "2"}, "'eos_token_id' must be an integer"),
        ({"eos_token_id": True}, "'eos_token_id' must be an integer"),
    ],
    ids=lambda value: "62-" + str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_end_tokens_beyond_the_vocabulary(
    entries: dict[str, object], complaint: str, refused: Refused, bad_pack: Path
) -> None:
    forge_json(bad_pack, "variants/b/config.json", lambda config: config.update(entries))
    arguments = ["--artifact", bad_pack, "--model", "b", "--prompt", "hi", "--quiet"]
    refused(3, ["variants/b/config.json: ", complaint], "run", *arguments)
