"""`moec report`: one file that needs nothing else, says the same every time, and trusts nobody."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeconsolidate.charts import (
    bytes_chart,
    dendrogram_chart,
    routing_chart,
    similarity_chart,
)
from moeconsolidate.cli import main
from moeconsolidate.html_report import read_curve, read_scores, render_report
from moeconsolidate.page import table, text
from moeconsolidate.stored_similarity import linkage_tree
from moeruntime.errors import InputError, ResourceError
from moeruntime.pack import Pack

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x07$x_1$"
SCORES = {
    "context": 512,
    "scores": [
        {"model": "base", "data": "some/base.jsonl", "tokens": 9, "nll": 2.5, "reference_nll": 2.4},
        {"model": "math", "data": "math.jsonl", "tokens": 9, "nll": 1.5, "reference_nll": None},
    ],
}
CURVE = [
    {"method": "average", "bytes": 0.25, "worst": 0.17, "mean": 0.06},
    {"method": "nested", "bytes": 0.25, "worst": 0.0011, "mean": 0.0001},
    {"method": "nested", "expert_ratio": 0.16, "worst": 0.0085, "mean": -0.003},
]


class Document(HTMLParser):
    """What a page refers to, its ids, and whether its tags close."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.references.append(str(value))
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def render(pack: Path, **options: Any) -> str:
    with Pack(pack) as opened:
        return render_report(opened, **options)[0]


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def check_self_contained(page: str) -> None:
    document = Document(page)
    assert len(set(document.ids)) == len(document.ids)
    for reference in document.references:
        assert reference.startswith(("#", "data:image/png;base64,"))
        if reference.startswith("#"):
            assert reference[1:] in document.ids
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target[1:] in document.ids
    assert not re.search(r"https?://|@import|//[a-z]+\.", page)
    assert not {"script", "link", "iframe", "object", "img", "base"} & set(document.tags)
    assert not document.handlers


def test_is_one_file_that_names_every_variant_and_layer(pack: Path, tmp_path: Path) -> None:
    scores = read_scores(write(tmp_path / "scores.json", SCORES), ("base", "math"))
    curve = read_curve(write(tmp_path / "curve.json", CURVE))
    page = render(pack, scores=scores, curve=curve)
    check_self_contained(page)
    for name in ("base", "python", "math", "shell"):
        assert f"other weights of {name}" in page
        assert f"<caption>{name}: experts across" in page
    for layer in range(4):
        assert f"<summary>Layer {layer}: " in page
        assert f'id="similarity-{layer}-title"' in page
        assert f'id="dendrogram-{layer}-title"' in page
    document = Document(page)
    assert document.tags.count("svg") == document.tags.count("title") - 1 == 2 * 4 + 3
    assert "prefers-color-scheme: dark" in page
    assert "+0.1000" in page  # the increase of base
    assert "some/" not in page  # a name says it; where files lay is nobody's business
    assert "-0.0030" in page  # a mean of the curve


def test_precision_is_private_bits_or_the_dtype(pack: Path, lossless_pack: Path) -> None:
    with Pack(pack) as opened:
        assert opened.manifest.nested is not None
        codes = opened.manifest.variants[0].private_codes[0][0]
    shown = f"{codes[0].bits} {codes[1].bits}"
    assert f'<td class="l{codes[0].bits} r{codes[1].bits}">{shown}</td>' in render(pack)
    plain = render(lossless_pack)
    check_self_contained(plain)
    assert ">bf16</td>" in plain
    assert "private bits" not in plain


def with_routing(pack: Path, folder: Path, routing: object) -> Path:
    shutil.copytree(pack, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"]["routing"] = routing
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_routing_is_drawn_where_the_pack_tells_it(pack: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = ("base", "python", "math", "shell")
    tables = {name: generator.integers(10, 9_000, (4, 8)) for name in names}
    tables["math"][2, 5] = 9_870
    tables["shell"][1, 3] = 2
    routing = {name: table.tolist() for name, table in tables.items()}
    page = render(with_routing(pack, tmp_path / "told", routing))
    check_self_contained(page)
    assert 'id="routing-title"' in page
    assert "98.7%: layer 2, expert 5" in page
    assert "each of 8 would get 25.0%" in page
    rare = int((tables["shell"] < 250).sum())
    assert rare >= 1
    assert re.search(rf'>shell</t[dh]>.*?<td class="n">{rare}</td>', page, re.DOTALL)
    assert "Routing" not in render(pack)


@pytest.mark.parametrize(
    "change",
    [
        lambda routing: {"base": routing["base"]},
        lambda routing: routing | {"math": HOSTILE},
        lambda routing: routing | {"math": [[True] * 8] * 4},
        lambda routing: routing | {"math": [[10_001] * 8] * 4},
        lambda routing: routing | {"math": [[1] * 8] * 5},
        lambda routing: routing | {"math": [[0.5] * 8] * 4},
        lambda routing: [routing],
        lambda routing: HOSTILE,
    ],
)
def test_routing_that_makes_no_sense_is_left_out(
    pack: Path, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    routing = {name: [[1] * 8] * 4 for name in ("base", "python", "math", "shell")}
    page = render(with_routing(pack, tmp_path / "pack", change(routing)))
    assert "<h2" in page
    assert "Routing" not in page


@pytest.mark.parametrize("num_variants", [1, 2, 3, 8, 11])
def test_a_routing_chart_has_a_map_for_every_variant(num_variants: int) -> None:
    tables = {f"variant-{idx}": np.full((40, 64), idx / 100) for idx in range(num_variants)}
    drawing = routing_chart(tables, uniform=2 / 64, title="use")
    assert drawing.count("<image") == num_variants + 1
    assert all(f">{name}<" in drawing for name in tables)


def test_same_pack_same_bytes(pack: Path, tmp_path: Path) -> None:
    first = render(pack)
    elsewhere = tmp_path / "another-name"
    shutil.copytree(pack, elsewhere)
    code = "import sys; from moeconsolidate.cli import main; main(sys.argv[1:])"
    out = tmp_path / "report.html"
    subprocess.run(
        [sys.executable, "-c", code, "report", elsewhere, "--out", out, "-q"],
        check=True,
        capture_output=True,
    )
    assert out.read_text(encoding="utf-8") == first
    assert str(tmp_path) not in first


def test_similarity_is_of_the_experts_as_stored(pack: Path) -> None:
    with Pack(pack) as opened:
        _, layers = render_report(opened)
        rows = [
            torch.cat(
                [opened.read_expert(v, 1, e, p).flatten().double() for p in ("gate_up", "down")]
            )
            for v in opened.manifest.variant_names
            for e in range(8)
        ]
    experts_EP = torch.stack(rows)
    similarity_EE = torch.nn.functional.cosine_similarity(
        experts_EP[:, None], experts_EP[None], dim=2
    )
    same = [
        float(similarity_EE[a * 8 + e, b * 8 + e])
        for e in range(8)
        for a in range(4)
        for b in range(a + 1, 4)
    ]
    assert layers[1].layer == 1
    assert layers[1].same_mean == pytest.approx(sum(same) / len(same), abs=1e-5)
    assert layers[1].same_min == pytest.approx(min(same), abs=1e-5)


def test_strings_from_outside_stay_text(pack: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "pack"
    shutil.copytree(pack, hostile)
    manifest = json.loads((hostile / "manifest.json").read_text())
    manifest["recipe"] = {HOSTILE: HOSTILE, "threshold": HOSTILE, "texts": {HOSTILE: [HOSTILE]}}
    (hostile / "manifest.json").write_text(json.dumps(manifest))
    scores = {"scores": [SCORES["scores"][0] | {"data": HOSTILE}]}  # type: ignore[index]
    curve = [{"method": name, "bytes": 0.2, "worst": 0, "mean": 0} for name in (HOSTILE, "_a")]
    page = render(
        hostile,
        scores=read_scores(write(tmp_path / "scores.json", scores), ("base",)),
        curve=read_curve(write(tmp_path / "curve.json", {"rows": curve})),
    )
    check_self_contained(page)
    assert "\x07" not in page
    assert "cut: " not in page  # a threshold that is no number draws none


def test_hostile_variant_names_stay_text_even_if_a_manifest_let_them_pass() -> None:
    similarity_EE = np.eye(4, dtype=np.float32)
    names = [HOSTILE, "b"]
    tree = linkage_tree(torch.eye(4))
    parts = [
        text(HOSTILE),
        table(HOSTILE, [HOSTILE], [[HOSTILE]]),
        bytes_chart({HOSTILE: {HOSTILE: 1}}, text(HOSTILE)),
        similarity_chart(similarity_EE, names, layer=0, max_side=9, title=text(HOSTILE)),
        dendrogram_chart(tree, names, layer=0, threshold=0.5, title=text(HOSTILE)),
    ]
    for part in parts:
        assert "<script" not in part
        assert "<img" not in part
        Document(part)


def test_many_layers_of_many_experts_stay_small() -> None:
    generator = np.random.default_rng(0)
    similarity_EE = generator.random((512, 512), dtype=np.float32)
    similarity_EE = (similarity_EE + similarity_EE.T) / 2
    np.fill_diagonal(similarity_EE, 1.0)
    names = [f"variant-{idx}" for idx in range(8)]
    drawing = similarity_chart(similarity_EE, names, layer=0, max_side=250, title="noise")
    tree = linkage_tree(torch.from_numpy(similarity_EE))
    tree_drawing = dendrogram_chart(tree, names, layer=0, threshold=0.9, title="noise")
    assert 32 * (len(drawing) + len(tree_drawing)) < 6_000_000


def test_command_writes_the_file_and_refuses_to_replace_one(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(SystemExit) as end:
        main(["report", str(pack), "--out", str(out), "--json", "--quiet"])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == out.stat().st_size
    assert [row["layer"] for row in printed["similarity"]] == [0, 1, 2, 3]
    with pytest.raises(SystemExit) as end:
        main(["report", str(pack), "--out", str(out)])
    assert end.value.code == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["report", str(pack), "--out", str(pack / "report.html")])
    assert end.value.code == 2


def test_says_how_to_get_matplotlib(
    pack: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "matplotlib" or name in CHART_MODULES:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoMatplotlib(), *sys.meta_path])
    import moeconsolidate

    for name in CHART_MODULES:
        monkeypatch.delattr(moeconsolidate, name.rpartition(".")[2], raising=False)
    with pytest.raises(SystemExit) as end:
        main(["report", str(pack), "--out", str(tmp_path / "report.html")])
    assert end.value.code == ResourceError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'moec[report]'" in error
    assert not (tmp_path / "report.html").exists()


CHART_MODULES = ("moeconsolidate.charts", "moeconsolidate.svg")


class NoMatplotlib:
    """An import finder for an environment without matplotlib."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "scores"),
        ({"scores": []}, "0 entries"),
        ({"scores": [{"model": "other", "data": "x", "tokens": 1, "nll": 1}]}, "not a variant"),
        ({"scores": [{"model": "base", "data": "x", "tokens": 1, "nll": "1"}]}, "number"),
    ],
)
def test_bad_scores_are_one_line(value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_scores(write(tmp_path / "scores.json", value), ("base",))


@pytest.mark.parametrize("value", [[], 3, [{"method": "a"}], [CURVE[0] | {"bytes": 1e9}]])
def test_bad_curves_are_one_line(value: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"curve\.json"):
        read_curve(write(tmp_path / "curve.json", value))
    with pytest.raises(InputError, match="no such file"):
        read_curve(tmp_path / "missing.json")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_in_light_and_dark(pack: Path, tmp_path: Path, scheme: str) -> None:
    from PIL import Image

    (tmp_path / "report.html").write_text(render(pack), encoding="utf-8")
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--screenshot={picture}", (tmp_path / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )  # fmt: skip
    with Image.open(picture) as image:
        paper, ink = image.convert("L").getpixel((2, 2)), image.convert("L").getextrema()
    assert (paper > 200) == (scheme == "light")
    assert ink[1] - ink[0] > 150
