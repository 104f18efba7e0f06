"""README shows commands and figures: the commands run, and the figures are what they give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _serving import serving

from moeconsolidate.report import summarise
from moeruntime.pack import Pack

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `examples/` in it, and `moec` on the PATH."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    moec = folder / "bin" / "moec"
    moec.parent.mkdir()
    moec.write_text(
        f"#!{sys.executable}\nfrom moeconsolidate.cli import main\nmain()\n", encoding="utf-8"
    )
    moec.chmod(0o755)
    return folder


def run(workplace: Path, *command: str) -> str:
    path = os.pathsep.join([str(workplace / "bin"), os.environ["PATH"]])
    src = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=workplace,
        env=os.environ | {"PATH": path, "PYTHONPATH": src},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_run_and_then_the_python(workplace: Path) -> None:
    usage = next(block for block in blocks("bash") if block.startswith("moec consolidate"))
    run(workplace, "bash", "-euo", "pipefail", "-c", usage)
    assert (workplace / "math-again" / "model.safetensors").is_file()
    (program,) = blocks("python")
    said = run(workplace, sys.executable, "-c", program).splitlines()
    assert [line.split()[0] for line in said if line.split()[:1] in (["base"], ["math"])] == [
        "base",
        "math",
    ]


def test_every_command_and_option_exists(workplace: Path) -> None:
    known = {
        name: run(workplace, "moec", name, "--help")
        for name in ("consolidate", "plan", "inspect", "verify", "run", "bench", "eval", "export")
    }
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] == ["moec"]:
                for option in (word for word in words if word.startswith("--")):
                    assert option in known[words[1]], line


def test_files_that_are_linked_exist() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_bytes_in_the_table_are_what_comes_out(pack: Path, merged_pack: Path) -> None:
    rows = re.findall(r"^\| (default|averaged) \| mini \| ([0-9.]+)x", README, re.MULTILINE)
    assert dict(rows) == {"default": "0.258", "averaged": "0.250"}
    for recipe, folder in (("default", pack), ("averaged", merged_pack)):
        with Pack(folder) as opened:
            assert f"{summarise(opened).expert_ratio:.3f}" == dict(rows)[recipe]


def test_the_demo_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "demo")],
        env=os.environ | {"MOEC_VENV": sys.prefix, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all as the manifest says" in done.stdout
    assert done.stdout.count("$ moec run") == 4


def test_the_server_is_started_and_asked_as_shown(workplace: Path, pack: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")

    def shown(name: str) -> str:
        (block,) = re.findall(rf"^```bash {name}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        return str(block)

    command = shown("serve").split()
    assert command[:4] == ["moec", "serve", "--artifact", "pack"] and command[4] == "--port"
    with serving(pack, "--device", "cpu") as server:
        client = shown("client").replace(f"localhost:{command[5]}", f"127.0.0.1:{server.port}")
        said = run(workplace, "bash", "-euo", "pipefail", "-c", client)
    for part in (
        '"ready":true',
        '"text_completion"',
        "data: [DONE]",
        '"tokens":',
        "moec:num_requests",
    ):
        assert part in said
